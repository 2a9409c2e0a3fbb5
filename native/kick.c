/*
 * Kicks: make a vCPU leave KVM_RUN, from any thread, and lose none.
 *
 * A kick sets run->immediate_exit first and sends the signal second. A vCPU that is outside the guest finds
 * the flag at its next KVM_RUN, which returns EINTR at once; one that is inside is interrupted by the signal.
 * pk_run() publishes its thread before it enters and clears the flag only after KVM_RUN returned EINTR, so
 * whoever posts a message and then kicks knows that Python looks at its mailbox after that.
 *
 * KVM API documentation, 5 (kvm_run.immediate_exit).
 */
#define _GNU_SOURCE
#include "runloop.h"

#include <errno.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

static int kick_signal;

/* The signal only has to interrupt ioctl(2). */
static void on_kick(int signal_number) { (void)signal_number; }

int pk_kick_init(int signal_offset) {
    struct sigaction action = {.sa_handler = on_kick}; /* no SA_RESTART: KVM_RUN has to return */
    kick_signal = SIGRTMIN + signal_offset;
    if (kick_signal > SIGRTMAX)
        return -EINVAL;
    sigemptyset(&action.sa_mask);
    return sigaction(kick_signal, &action, NULL) ? -errno : 0;
}

int pk_kick(struct pk_vcpu *vcpu) {
    __atomic_add_fetch(&vcpu->kicks, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    int tid = __atomic_load_n(&vcpu->tid, __ATOMIC_SEQ_CST);
    if (tid == 0)
        return 0; /* outside pk_run(): the flag is enough */
    /* ESRCH: the thread has left and ended meanwhile */
    if (syscall(SYS_tgkill, getpid(), tid, kick_signal) && errno != ESRCH)
        return -errno;
    return 1;
}

int pk_thread_id(void) {
    static __thread int tid;
    if (tid == 0)
        tid = (int)syscall(SYS_gettid);
    return tid;
}

/* vCPU and I/O threads leave every other signal to the main thread, where Python's handlers run. */
void pk_thread_init(void) {
    sigset_t all;
    sigfillset(&all);
    sigdelset(&all, kick_signal);
    sigdelset(&all, SIGBUS); /* one of its own would kill the process, blocked: see filemem.c */
    pthread_sigmask(SIG_SETMASK, &all, NULL);
}
