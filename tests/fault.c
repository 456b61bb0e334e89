/* Preloaded: makes the n-th call that writes below one directory fail, counted over all such calls of the process.
   fault_arm(directory, n, error) starts; error -1: a write writes half, then is full; fault_count() says how many. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[4096];
static int armed, at, error_number, count, full;

void fault_arm(const char *directory, int n, int error) {
    strncpy(place, directory, sizeof place - 1);
    at = n, error_number = error, count = 0, full = 0, armed = 1;
}
void fault_disarm(void) { armed = 0; }
int fault_count(void) { return count; }

static int below(const char *path) { return path && strncmp(path, place, strlen(place)) == 0; }

static int below_fd(int fd) {
    char link[64], target[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, target, sizeof target - 1);
    if (length < 0) return 0;
    target[length] = 0;
    return below(target);
}

/* 0: go on; 1: fail; 2: write half, and be full from then on. */
static int fate(int is_ours, int is_write) {
    if (!armed || !is_ours) return 0;
    if (full) { errno = ENOSPC; return is_write; }
    if (++count != at) return 0;
    if (error_number < 0 && is_write) { full = 1; return 2; }
    errno = error_number < 0 ? ENOSPC : error_number;
    return 1;
}

#define REAL(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    int what = fate(below_fd(fd), 1);
    if (what == 1) return -1;
    return REAL(ssize_t, write, int, const void *, size_t)(fd, data, what == 2 && size > 1 ? size / 2 : size);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    if (fate(below_fd(fd), 1)) { errno = error_number < 0 ? ENOSPC : error_number; return -1; }
    return REAL(ssize_t, writev, int, const struct iovec *, int)(fd, parts, n);
}
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    if (fate(below_fd(out), 1)) { errno = error_number < 0 ? ENOSPC : error_number; return -1; }
    return REAL(ssize_t, sendfile, int, int, off_t *, size_t)(out, in, offset, size);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    if (fate(below_fd(out), 1)) { errno = error_number < 0 ? ENOSPC : error_number; return -1; }
    return REAL(ssize_t, sendfile64, int, int, off64_t *, size_t)(out, in, offset, size);
}
int fsync(int fd) {
    return fate(below_fd(fd), 0) ? -1 : REAL(int, fsync, int)(fd);
}
int ftruncate(int fd, off_t size) {
    return fate(below_fd(fd), 0) ? -1 : REAL(int, ftruncate, int, off_t)(fd, size);
}
int ftruncate64(int fd, off64_t size) {
    return fate(below_fd(fd), 0) ? -1 : REAL(int, ftruncate64, int, off64_t)(fd, size);
}
int rename(const char *from, const char *to) {
    return fate(below(to), 0) ? -1 : REAL(int, rename, const char *, const char *)(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    return fate(below(to), 0) ? -1 : REAL(int, renameat, int, const char *, int, const char *)(a, from, b, to);
}
int mkdir(const char *path, mode_t mode) {
    /* Of what is there already the real call says so, however full the disk: nothing would be written. */
    int is_new = access(path, F_OK) != 0;
    return fate(is_new && below(path), 0) ? -1 : REAL(int, mkdir, const char *, mode_t)(path, mode);
}

static int opened(const char *name, const char *path, int flags, mode_t mode) {
    if ((flags & O_CREAT) && fate(below(path), 0)) return -1;
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, name))(path, flags, mode);
}
#define MODE(flags) mode_t mode = 0; \
    if (flags & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { MODE(flags) return opened("open", path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened("open64", path, flags, mode); }
