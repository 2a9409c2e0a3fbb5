#include "tap.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

_Static_assert(PK_IFNAME_SIZE == IFNAMSIZ, "PK_IFNAME_SIZE");

static void set_name(struct ifreq *request, const char *name) {
    memset(request, 0, sizeof *request);
    strncpy(request->ifr_name, name, IFNAMSIZ - 1);
}

int pk_tap_open(char name[PK_IFNAME_SIZE]) {
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    struct ifreq request;
    set_name(&request, name);
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    int failed = ioctl(fd, TUNSETIFF, &request);
    if (failed && errno == EINVAL) { /* a persistent one of several queues wants to be asked for that */
        request.ifr_flags |= IFF_MULTI_QUEUE;
        failed = ioctl(fd, TUNSETIFF, &request);
    }
    if (failed) {
        int error = errno;
        close(fd);
        return -error;
    }
    memcpy(name, request.ifr_name, IFNAMSIZ);
    return fd;
}

int pk_tap_query(int fd, char name[PK_IFNAME_SIZE], uint32_t *flags) {
    struct ifreq request;
    set_name(&request, "");
    if (ioctl(fd, TUNGETIFF, &request))
        return -errno;
    memcpy(name, request.ifr_name, IFNAMSIZ);
    *flags = (uint16_t)request.ifr_flags;
    return 0;
}

int pk_tap_use_header(int fd) {
    int size = sizeof(struct virtio_net_hdr_v1), little = 1;
    if (ioctl(fd, TUNSETVNETHDRSZ, &size))
        return -errno;
    /* older kernels have no TUNSETVNETLE, and use the CPU's order, which is the same */
    return ioctl(fd, TUNSETVNETLE, &little) && errno != EINVAL && errno != ENOTTY ? -errno : 0;
}

/* One SIOC* ioctl on any socket of the network namespace. */
static int interface_ioctl(unsigned long number, struct ifreq *request) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    int error = ioctl(fd, number, request) ? -errno : 0;
    close(fd);
    return error;
}

int pk_if_mtu(const char *name) {
    struct ifreq request;
    set_name(&request, name);
    int error = interface_ioctl(SIOCGIFMTU, &request);
    return error ? error : request.ifr_mtu;
}

int pk_if_up(const char *name, int mtu) {
    struct ifreq request;
    set_name(&request, name);
    request.ifr_mtu = mtu;
    int error = mtu ? interface_ioctl(SIOCSIFMTU, &request) : 0;
    if (error)
        return error;
    set_name(&request, name);
    error = interface_ioctl(SIOCGIFFLAGS, &request);
    if (error)
        return error;
    request.ifr_flags |= IFF_UP;
    return interface_ioctl(SIOCSIFFLAGS, &request);
}
