/* A disk that fails, for a test that preloads this: calls of FAULT_CALL on files whose path holds FAULT_PATH answer
   FAULT_ERRNO, from the FAULT_NTH one on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int calls;

static int fails(const char *call, int file) {
    const char *name = getenv("FAULT_CALL"), *part = getenv("FAULT_PATH");
    char link[64], path[4096];
    if (!name || strcmp(name, call)) return 0;
    if (part && *part) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        ssize_t size = readlink(link, path, sizeof path - 1);
        path[size < 0 ? 0 : size] = 0;
        if (!strstr(path, part)) return 0;
    }
    if (++calls < atoi(getenv("FAULT_NTH"))) return 0;
    errno = atoi(getenv("FAULT_ERRNO"));
    return 1;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    REAL(pwrite64);
    return fails("pwrite", file) ? -1 : real(file, data, size, offset);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    REAL(pwrite);
    return fails("pwrite", file) ? -1 : real(file, data, size, offset);
}

ssize_t preadv64(int file, const struct iovec *parts, int count, off64_t offset) {
    REAL(preadv64);
    return fails("preadv", file) ? -1 : real(file, parts, count, offset);
}

ssize_t preadv64v2(int file, const struct iovec *parts, int count, off64_t offset, int flags) {
    REAL(preadv64v2);
    return fails("preadv", file) ? -1 : real(file, parts, count, offset, flags);
}

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    return fails("write", file) ? -1 : real(file, data, size);
}

int fsync(int file) {
    REAL(fsync);
    return fails("fsync", file) ? -1 : real(file);
}

int renameat2(int from, const char *one, int to, const char *other, unsigned flags) {
    REAL(renameat2);
    return fails("renameat2", -1) ? -1 : real(from, one, to, other, flags);
}
