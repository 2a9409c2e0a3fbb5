/* Tap interfaces: what needs struct ifreq, whose layout only the C compiler knows. */
#ifndef PYKVM_TAP_H
#define PYKVM_TAP_H

#include <stdint.h>

#define PK_IFNAME_SIZE 16 /* IFNAMSIZ, checked in tap.c */

/* Opens a tap interface, creating it when there is none of this name; "" and "name%d" let the kernel choose.
 * `name` becomes the interface's. Returns a non-blocking fd whose frames start with a virtio_net_hdr, or
 * -errno. */
int pk_tap_open(char name[PK_IFNAME_SIZE]);
/* The interface and its IFF_* flags behind an fd: 0 or -errno (EBADFD, ENOTTY: it is no tap). */
int pk_tap_query(int fd, char name[PK_IFNAME_SIZE], uint32_t *flags);
/* Makes the header of each frame that of virtio 1 (12 bytes, little-endian): 0 or -errno. */
int pk_tap_use_header(int fd);
/* The MTU of an interface, or -errno. */
int pk_if_mtu(const char *name);
/* Sets it (0 leaves it alone) and switches the interface on: 0 or -errno. */
int pk_if_up(const char *name, int mtu);

#endif
