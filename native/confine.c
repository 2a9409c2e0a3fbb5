#define _GNU_SOURCE
#include "confine.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* <sys/mount.h> cannot be included beside <linux/mount.h> everywhere, nor <linux/fcntl.h> beside <fcntl.h> */
extern int mount(const char *, const char *, const char *, unsigned long, const void *);
#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif

int pk_die_with_parent(void) { return prctl(PR_SET_PDEATHSIG, SIGKILL) ? -errno : 0; }

static int write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t size = (ssize_t)strlen(text);
    int result = write(fd, text, (size_t)size) == size ? 0 : -errno;
    close(fd);
    return result;
}

static int become_root_of(uid_t uid, gid_t gid) {
    char line[64];
    int failed = write_file("/proc/self/setgroups", "deny");
    if (failed)
        return failed;
    snprintf(line, sizeof line, "0 %u 1", uid);
    failed = write_file("/proc/self/uid_map", line);
    if (failed)
        return failed;
    snprintf(line, sizeof line, "0 %u 1", gid);
    return write_file("/proc/self/gid_map", line);
}

int pk_own_mounts(void) {
    uid_t uid = geteuid();
    gid_t gid = getegid();
    if (unshare(CLONE_NEWNS | (uid ? CLONE_NEWUSER : 0)))
        return -errno;
    int failed = uid ? become_root_of(uid, gid) : 0;
    if (failed)
        return failed;
    return mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) ? -errno : 0;
}

int pk_bind_root(const char *at) { return mount("/", at, NULL, MS_BIND | MS_REC, NULL) ? -errno : 0; }

int pk_readonly_mounts(void) {
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY};
    return syscall(SYS_mount_setattr, AT_FDCWD, "/", AT_RECURSIVE, &attributes, sizeof attributes) ? -errno
                                                                                                   : 0;
}
