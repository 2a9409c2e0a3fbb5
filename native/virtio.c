#include "virtio.h"

void pk_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

uint32_t pk_word_or(uint32_t *word, uint32_t bits) { return __atomic_fetch_or(word, bits, __ATOMIC_SEQ_CST); }

uint32_t pk_word_and(uint32_t *word, uint32_t bits) {
    return __atomic_fetch_and(word, bits, __ATOMIC_SEQ_CST);
}
