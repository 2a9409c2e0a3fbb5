#ifndef PYKVM_DYNLIB_H
#define PYKVM_DYNLIB_H

#include <stddef.h>

/* The address of `symbol` in `library` (a soname), NULL where there is no such library or symbol. */
void *pk_dynamic_symbol(const char *library, const char *symbol);

#endif
