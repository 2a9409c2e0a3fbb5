/*
 * vsockcat PORT         connects to PORT of the host: stdin goes there, what comes back to stdout, until both
 * have ended vsockcat -l PORT      waits for one connection from the host, and sends it back all that it
 * sends
 *
 * For guests whose only other programs are busybox's, which know no AF_VSOCK.
 */
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PIECE = 65536 };

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void write_all(int fd, const char *data, ssize_t size) {
    while (size > 0) {
        ssize_t done = write(fd, data, (size_t)size);
        if (done < 0)
            fail("write");
        data += done;
        size -= done;
    }
}

/* Passes on what `from` has; 0 at its end. */
static int copy(int from, int to) {
    static char piece[PIECE];
    ssize_t size = read(from, piece, sizeof(piece));
    if (size < 0)
        fail("read");
    write_all(to, piece, size);
    return size > 0;
}

static void both_ways(int peer) {
    struct pollfd fds[2] = {{.fd = peer, .events = POLLIN}, {.fd = 0, .events = POLLIN}};
    while (fds[0].fd >= 0) {
        if (poll(fds, 2, -1) < 0)
            fail("poll");
        if (fds[0].revents && !copy(peer, 1))
            fds[0].fd = -1;
        if (fds[1].revents && !copy(0, peer)) {
            shutdown(peer, SHUT_WR);
            fds[1].fd = -1;
        }
    }
}

int main(int argc, char **argv) {
    int listen_here = argc == 3 && !strcmp(argv[1], "-l");
    if (argc != 2 && !listen_here) {
        fprintf(stderr, "usage: vsockcat PORT | vsockcat -l PORT\n");
        return 2;
    }
    struct sockaddr_vm address = {.svm_family = AF_VSOCK,
                                  .svm_cid = listen_here ? VMADDR_CID_ANY : VMADDR_CID_HOST,
                                  .svm_port = (unsigned)atoi(argv[argc - 1])};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket");
    if (!listen_here) {
        if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
            fail("connect");
        both_ways(fd);
        return 0;
    }
    if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, 1) < 0)
        fail("listen");
    int peer = accept(fd, NULL, NULL);
    if (peer < 0)
        fail("accept");
    while (copy(peer, peer))
        ;
    return 0;
}
