#ifndef PYKVM_LOCK_H
#define PYKVM_LOCK_H

#include <pthread.h>

/* A recursive mutex: what guards a device that C serves, too. */
pthread_mutex_t *pk_mutex_new(void);
void pk_mutex_free(pthread_mutex_t *mutex);
void pk_mutex_lock(pthread_mutex_t *mutex);
void pk_mutex_unlock(pthread_mutex_t *mutex);

#endif
