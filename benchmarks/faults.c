/* Counts the system calls that change files below a folder, and does harm at one of them.

Preloaded by benchmarks/faults.py, whose child processes call fault_arm(FOLDER, NUMBER, HARM). With NUMBER 0, calls are
only counted (fault_calls). HARM is one of

    kill    the process is killed before the call
    tear    half of a write is done, then the process is killed; other calls as `kill`
    full    this call and all later ones that need space fail: no space left on device
    error   this call fails once: input/output error */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { KILL, TEAR, FULL, ERROR };

static char below[PATH_MAX];
static long at, calls;
static int harm;

void fault_arm(const char *folder, long number, const char *name) {
    at = number;
    calls = 0;
    harm = !strcmp(name, "kill") ? KILL : !strcmp(name, "tear") ? TEAR : !strcmp(name, "full") ? FULL : ERROR;
    snprintf(below, sizeof below, "%s", folder);
}

long fault_calls(void) { return calls; }

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

static void path_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void path_at(int folder, const char *name, char *path) {
    char base[PATH_MAX];
    if (name[0] == '/') { snprintf(path, PATH_MAX, "%s", name); return; }
    if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) base[0] = 0; }
    else path_of(folder, base);
    if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) path[0] = 0;
}

/* Returns 0 to go on, an error number, or -1 for half a write. */
static int met(const char *path, int needs_space, int is_write) {
    if (!below[0] || strncmp(path, below, strlen(below))) return 0;
    long now = __sync_add_and_fetch(&calls, 1);
    if (!at) return 0;
    if (harm == FULL) return now >= at && needs_space ? ENOSPC : 0;
    if (now != at) return 0;
    if (harm == ERROR) return EIO;
    if (harm == TEAR && is_write) return -1;
    die();
    return 0;
}

#define ORIGINAL(name) ({ static __typeof__(&name) found; if (!found) found = dlsym(RTLD_NEXT, #name); found; })
#define BY_NAME(folder, name, needs_space) \
    char path[PATH_MAX]; \
    if (below[0]) { path_at(folder, name, path); int is = met(path, needs_space, 0); if (is) { errno = is; return -1; } }
#define BY_FILE(needs_space) \
    char path[PATH_MAX]; int is = 0; \
    if (below[0]) { path_of(file, path); is = met(path, needs_space, 0); if (is) { errno = is; return -1; } }
#define OPEN(name, folder, call) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); } \
    if (flags & (O_CREAT | O_TRUNC)) { BY_NAME(folder, name, 1) } \
    return call;

int open(const char *name, int flags, ...) { OPEN(name, AT_FDCWD, ORIGINAL(open)(name, flags, mode)) }
int open64(const char *name, int flags, ...) { OPEN(name, AT_FDCWD, ORIGINAL(open64)(name, flags, mode)) }
int openat(int folder, const char *name, int flags, ...) { OPEN(name, folder, ORIGINAL(openat)(folder, name, flags, mode)) }
int openat64(int folder, const char *name, int flags, ...) { OPEN(name, folder, ORIGINAL(openat64)(folder, name, flags, mode)) }

#define WRITE(whole, half) \
    char path[PATH_MAX]; \
    if (below[0]) { \
        path_of(file, path); \
        int is = met(path, 1, 1); \
        if (is > 0) { errno = is; return -1; } \
        if (is < 0) { half; die(); } \
    } \
    return whole;

ssize_t write(int file, const void *bytes, size_t count) {
    WRITE(syscall(SYS_write, file, bytes, count), syscall(SYS_write, file, bytes, count / 2))
}
ssize_t pwrite(int file, const void *bytes, size_t count, off_t place) {
    WRITE(syscall(SYS_pwrite64, file, bytes, count, place), syscall(SYS_pwrite64, file, bytes, count / 2, place))
}
ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t place) {
    WRITE(syscall(SYS_pwrite64, file, bytes, count, place), syscall(SYS_pwrite64, file, bytes, count / 2, place))
}

int fsync(int file) { BY_FILE(0) return ORIGINAL(fsync)(file); }
int fdatasync(int file) { BY_FILE(0) return ORIGINAL(fdatasync)(file); }
int ftruncate(int file, off_t size) { BY_FILE(0) return ORIGINAL(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { BY_FILE(0) return ORIGINAL(ftruncate64)(file, size); }
int rename(const char *from, const char *to) { BY_NAME(AT_FDCWD, to, 0) return ORIGINAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { BY_NAME(b, to, 0) return ORIGINAL(renameat)(a, from, b, to); }
int unlink(const char *name) { BY_NAME(AT_FDCWD, name, 0) return ORIGINAL(unlink)(name); }
int unlinkat(int folder, const char *name, int flags) { BY_NAME(folder, name, 0) return ORIGINAL(unlinkat)(folder, name, flags); }
int rmdir(const char *name) { BY_NAME(AT_FDCWD, name, 0) return ORIGINAL(rmdir)(name); }
int mkdir(const char *name, mode_t mode) { BY_NAME(AT_FDCWD, name, 1) return ORIGINAL(mkdir)(name, mode); }
