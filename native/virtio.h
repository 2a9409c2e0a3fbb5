/* What a virtio device needs of the machine's memory model: barriers and atomic words. */
#ifndef PYKVM_VIRTIO_H
#define PYKVM_VIRTIO_H

#include <stdint.h>

/* A full barrier: a store to a ring before it is seen by the driver before a load after it
 * (virtio 1.2, 2.7.13). */
void pk_fence(void);
/* Sets bits of a word that vCPUs read and clear in their loop (PK_LOAD, PK_CLEAR); the word before. */
uint32_t pk_word_or(uint32_t *word, uint32_t bits);
/* Keeps only these bits of it; the word before. */
uint32_t pk_word_and(uint32_t *word, uint32_t bits);

#endif
