/* Reaching into a shared library that is used where the system has it, without linking to it. */
#include "dynlib.h"

#include <dlfcn.h>

void *pk_dynamic_symbol(const char *library, const char *symbol) {
    /* never closed: the symbol may be used at any time */
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    return handle ? dlsym(handle, symbol) : NULL;
}
