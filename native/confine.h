/* What a helper process of pykvm does between fork and exec. */
#ifndef PYKVM_CONFINE_H
#define PYKVM_CONFINE_H

/* The kernel kills this process when the thread that forked it ends: 0 or -errno. */
int pk_die_with_parent(void);
/* Puts this process into a mount namespace of its own (in a user namespace of its own, where it is root, if
 * it is not root already). Returns 0 or -errno. */
int pk_own_mounts(void);
/* Shows the whole tree of mounts at the folder `at` as well: 0 or -errno. */
int pk_bind_root(const char *at);
/* Makes every mount of the process's namespace read-only, so that nothing it starts writes a file: 0 or
 * -errno. Needs Linux 5.12. */
int pk_readonly_mounts(void);

#endif
