/* Files as guest memory. A page of a mapped file can go away: the file was cut short, its disk failed, there
 * is no space left for it. An access of this process to one is SIGBUS, which would end it. */
#ifndef PYKVM_FILEMEM_H
#define PYKVM_FILEMEM_H

#include <stddef.h>

/* Maps `length` bytes of a file over [address, address + length), shared. 0 or -errno. */
int pk_map_shared(void *address, size_t length, int fd);

/* From now on an access to a page of [address, address + length) that is not there finds an empty page of our
 * own, and the eventfd is written: the owner has to end what relies on the data. A number for pk_unguard, or
 * -errno. */
int pk_guard(void *address, size_t length, int eventfd);
void pk_unguard(int number);

#endif
