#include "filemem.h"
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, GUARDS = 1024 };

/* `end` is 0 in a free entry, and is written last and cleared first: the handler may run at any moment. */
static struct guard {
    uintptr_t start, end;
    int eventfd;
} guards[GUARDS];
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER; /* guards the table's writers, and `before` */
static struct sigaction before;                              /* whose signal it is otherwise */

int pk_map_shared(void *address, size_t length, int fd) {
    void *at = mmap(address, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    return at == MAP_FAILED ? -errno : 0;
}

static int replaced(uintptr_t address) {
    for (int i = 0; i < GUARDS; i++) {
        uintptr_t end = __atomic_load_n(&guards[i].end, __ATOMIC_ACQUIRE);
        if (address >= end || address < guards[i].start)
            continue;
        void *page = (void *)(address & ~(uintptr_t)(PAGE - 1));
        if (mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != page)
            return 0;
        uint64_t one = 1;
        return write(guards[i].eventfd, &one, sizeof one) == sizeof one || errno == EAGAIN;
    }
    return 0;
}

static void on_sigbus(int number, siginfo_t *info, void *context) {
    int saved = errno;
    int done = info->si_code > 0 && replaced((uintptr_t)info->si_addr); /* not one that somebody sent */
    errno = saved;
    if (done)
        return;
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else { /* as if there were no handler: it comes again when this one returns */
        sigaction(number, &before, NULL);
        raise(number);
    }
}

static int catch_sigbus(void) {
    struct sigaction now, ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    if (sigaction(SIGBUS, NULL, &now) < 0)
        return -errno;
    if (now.sa_flags & SA_SIGINFO && now.sa_sigaction == on_sigbus)
        return 0;
    before = now;
    return sigaction(SIGBUS, &ours, NULL) < 0 ? -errno : 0;
}

int pk_guard(void *address, size_t length, int eventfd) {
    pthread_mutex_lock(&changing);
    int result = catch_sigbus(), number = 0;
    while (result == 0 && number < GUARDS && guards[number].end)
        number++;
    if (result == 0 && number == GUARDS)
        result = -ENOSPC;
    if (result == 0) {
        guards[number].start = (uintptr_t)address;
        guards[number].eventfd = eventfd;
        __atomic_store_n(&guards[number].end, (uintptr_t)address + length, __ATOMIC_RELEASE);
        result = number;
    }
    pthread_mutex_unlock(&changing);
    return result;
}

void pk_unguard(int number) {
    pthread_mutex_lock(&changing);
    __atomic_store_n(&guards[number].end, 0, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&changing);
}
