#include "lock.h"

#include <stdlib.h>

pthread_mutex_t *pk_mutex_new(void) {
    pthread_mutexattr_t recursive;
    pthread_mutex_t *mutex = malloc(sizeof(*mutex));
    if (!mutex)
        return NULL;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(mutex, &recursive);
    pthread_mutexattr_destroy(&recursive);
    return mutex;
}

void pk_mutex_free(pthread_mutex_t *mutex) {
    pthread_mutex_destroy(mutex);
    free(mutex);
}

void pk_mutex_lock(pthread_mutex_t *mutex) { pthread_mutex_lock(mutex); }

void pk_mutex_unlock(pthread_mutex_t *mutex) { pthread_mutex_unlock(mutex); }
