/* A netcat for vsock, for Linux guests: `vsockcat connect PORT` copies stdin to the host's PORT and what
 * comes back to stdout, until both have ended; `vsockcat echo PORT` takes one connection and sends back what
 * it gets. */
#include <linux/vm_sockets.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void write_all(int fd, const char *data, ssize_t size) {
    while (size > 0) {
        ssize_t done = write(fd, data, size);
        if (done < 0)
            fail("write");
        data += done;
        size -= done;
    }
}

static void echo(int fd) {
    static char data[65536];
    ssize_t size;
    while ((size = read(fd, data, sizeof data)) > 0)
        write_all(fd, data, size);
    if (size < 0)
        fail("read");
}

static void copy_both(int fd) {
    static char data[65536];
    struct pollfd fds[] = {{.fd = 0, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    while (fds[1].fd >= 0) {
        if (poll(fds, 2, -1) < 0)
            fail("poll");
        if (fds[1].revents) {
            ssize_t size = read(fd, data, sizeof data);
            if (size < 0)
                fail("read");
            if (size == 0)
                fds[1].fd = -1;
            write_all(1, data, size);
        }
        if (fds[0].revents) {
            ssize_t size = read(0, data, sizeof data);
            if (size < 0)
                fail("read");
            if (size == 0) {
                fds[0].fd = -1;
                shutdown(fd, SHUT_WR);
            }
            write_all(fd, data, size);
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 3 || (strcmp(argv[1], "connect") && strcmp(argv[1], "echo"))) {
        fprintf(stderr, "usage: vsockcat connect|echo PORT\n");
        return 2;
    }
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_port = strtoul(argv[2], NULL, 0)};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket");
    if (!strcmp(argv[1], "connect")) {
        const struct timeval patience = {.tv_sec = 30}; /* the default of 2 s is little on an emulated CPU */
        setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &patience, sizeof patience);
        address.svm_cid = VMADDR_CID_HOST;
        if (connect(fd, (struct sockaddr *)&address, sizeof address))
            fail("connect");
        copy_both(fd);
    } else {
        address.svm_cid = VMADDR_CID_ANY;
        if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 1))
            fail("listen");
        printf("listening\n");
        fflush(stdout);
        int peer = accept(fd, NULL, NULL);
        if (peer < 0)
            fail("accept");
        echo(peer);
        close(peer);
    }
    return 0;
}
