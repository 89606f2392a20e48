/* Faults of disks and clocks, injected into a process by LD_PRELOAD; see __init__.py for the control file. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_RULES 64

enum kind { NONE, FAIL, SHORT, DELAY, LOG, SHIFT, SKIP };

struct rule {
    enum kind kind;
    int error;
    char call[16];
    char glob[PATH_MAX];
    uint64_t first, count, value;
};

static struct rule rules[MOST_RULES];
static int num_rules;
static uint64_t *hits; /* per rule: matching calls, injected faults; shared by all processes */
static int log_fd = -1;
static char log_path[PATH_MAX];

static int error_number(const char *name) {
    static const struct { const char *name; int number; } known[] = {
        {"EIO", EIO}, {"ESTALE", ESTALE}, {"ETIMEDOUT", ETIMEDOUT}, {"EAGAIN", EAGAIN}, {"EINTR", EINTR},
        {"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT}, {"EROFS", EROFS}, {"EMFILE", EMFILE}, {"EACCES", EACCES},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].name, name)) return known[i].number;
    return 0;
}

void faulty_io_load(const char *control) {
    num_rules = 0;
    FILE *file = fopen(control, "r");
    if (!file) abort();
    char fault[16], line[PATH_MAX + 256];
    int loaded = 0;
    while (fgets(line, sizeof line, file) && loaded < MOST_RULES) {
        struct rule *rule = &rules[loaded];
        if (sscanf(line, "%15s %15s %lu %lu %lu %4095[^\n]", fault, rule->call, &rule->first, &rule->count,
                   &rule->value, rule->glob) != 6)
            continue;
        rule->error = error_number(fault);
        rule->kind = rule->error                  ? FAIL
                     : !strcmp(fault, "short")    ? SHORT
                     : !strcmp(fault, "delay")    ? DELAY
                     : !strcmp(fault, "log")      ? LOG
                     : !strcmp(fault, "shift")    ? SHIFT
                     : !strcmp(fault, "skip")     ? SKIP
                                                  : NONE;
        if (rule->kind == NONE) abort();
        loaded++;
    }
    fclose(file);
    char path[PATH_MAX + 8];
    snprintf(path, sizeof path, "%s.hits", control);
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    size_t size = 2 * MOST_RULES * sizeof *hits;
    if (fd < 0 || ftruncate(fd, size)) abort();
    hits = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    snprintf(log_path, sizeof log_path, "%.4000s.log", control);
    if (log_fd >= 0) syscall(SYS_close, log_fd);
    log_fd = -1;
    num_rules = loaded;
}

__attribute__((constructor)) static void load_from_environment(void) {
    const char *control = getenv("FAULTY_IO");
    if (control) faulty_io_load(control);
}

static void pause_ms(uint64_t milliseconds) {
    struct timespec wait = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    syscall(SYS_nanosleep, &wait, NULL);
}

static void note(const char *call, const char *path) {
    char line[PATH_MAX + 32];
    int length = snprintf(line, sizeof line, "%s %.4000s\n", call, path);
    if (log_fd < 0)
        log_fd = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    syscall(SYS_write, log_fd, line, length);
}

/* Return the rule that hits a call on a path, NULL for none; delays and the log happen here. */
static struct rule *find(const char *call, const char *path) {
    struct rule *found = NULL;
    for (int i = 0; i < num_rules && !found; i++) {
        struct rule *rule = &rules[i];
        if ((strcmp(rule->call, call) && strcmp(rule->call, "any")) || fnmatch(rule->glob, path, 0)) continue;
        uint64_t number = __atomic_add_fetch(&hits[2 * i], 1, __ATOMIC_RELAXED);
        if (number < rule->first || (rule->count && number >= rule->first + rule->count)) continue;
        __atomic_add_fetch(&hits[2 * i + 1], 1, __ATOMIC_RELAXED);
        if (rule->kind == DELAY) pause_ms(rule->value);
        else if (rule->kind == LOG) note(call, path);
        else found = rule;
    }
    return found;
}

static struct rule *on_path(const char *call, int folder, const char *path) {
    if (!num_rules || !path) return NULL;
    char base[PATH_MAX] = "", whole[2 * PATH_MAX];
    if (path[0] == '/') return find(call, path);
    char link[64];
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
    base[length > 0 ? length : 0] = 0;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return find(call, whole);
}

static struct rule *on_fd(const char *call, int fd) {
    if (!num_rules) return NULL;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length <= 0) return NULL;
    path[length] = 0;
    return path[0] == '/' ? find(call, path) : NULL;
}

static int fails(struct rule *rule) {
    if (!rule || rule->kind != FAIL) return 0;
    errno = rule->error;
    return 1;
}

static size_t shortened(struct rule *rule, size_t count) {
    return rule && rule->kind == SHORT && count > rule->value ? rule->value : count;
}

#define REAL(name) ((typeof(&name))(real_##name ? real_##name : (real_##name = dlsym(RTLD_NEXT, #name))))
#define KEEP(name) static void *real_##name

/* open */
static mode_t mode_of(int flags, va_list *list) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(*list, mode_t) : 0; }

#define OPEN(name)                                              \
    KEEP(name);                                                 \
    int name(const char *path, int flags, ...) {                \
        va_list list;                                           \
        va_start(list, flags);                                  \
        mode_t mode = mode_of(flags, &list);                    \
        va_end(list);                                           \
        if (fails(on_path("open", AT_FDCWD, path))) return -1;  \
        return REAL(name)(path, flags, mode);                   \
    }
#define OPENAT(name)                                            \
    KEEP(name);                                                 \
    int name(int folder, const char *path, int flags, ...) {    \
        va_list list;                                           \
        va_start(list, flags);                                  \
        mode_t mode = mode_of(flags, &list);                    \
        va_end(list);                                           \
        if (fails(on_path("open", folder, path))) return -1;    \
        return REAL(name)(folder, path, flags, mode);           \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* read and write */
#define TRANSFER(name, call, buffer)                                        \
    KEEP(name);                                                             \
    ssize_t name(int fd, buffer data, size_t count) {                       \
        struct rule *rule = on_fd(call, fd);                                \
        if (fails(rule)) return -1;                                         \
        return REAL(name)(fd, data, shortened(rule, count));                \
    }
#define TRANSFER_AT(name, call, buffer)                                     \
    KEEP(name);                                                             \
    ssize_t name(int fd, buffer data, size_t count, off_t offset) {         \
        struct rule *rule = on_fd(call, fd);                                \
        if (fails(rule)) return -1;                                         \
        return REAL(name)(fd, data, shortened(rule, count), offset);        \
    }
/* A short transfer of several buffers is one of the first buffer. */
#define VECTOR(name, call, parameters, arguments)                           \
    KEEP(name);                                                             \
    ssize_t name parameters {                                               \
        struct rule *rule = on_fd(call, fd);                                \
        if (fails(rule)) return -1;                                         \
        struct iovec one;                                                   \
        if (count && shortened(rule, vectors[0].iov_len) < vectors[0].iov_len) { \
            one.iov_base = vectors[0].iov_base;                             \
            one.iov_len = rule->value;                                      \
            vectors = &one;                                                 \
            count = 1;                                                      \
        }                                                                   \
        return REAL(name) arguments;                                        \
    }
TRANSFER(read, "read", void *)
TRANSFER(write, "write", const void *)
TRANSFER_AT(pread, "read", void *)
TRANSFER_AT(pread64, "read", void *)
TRANSFER_AT(pwrite, "write", const void *)
TRANSFER_AT(pwrite64, "write", const void *)
#define PLAIN (int fd, const struct iovec *vectors, int count)
#define AT (int fd, const struct iovec *vectors, int count, off_t offset)
#define AT2 (int fd, const struct iovec *vectors, int count, off_t offset, int flags)
VECTOR(readv, "read", PLAIN, (fd, vectors, count))
VECTOR(writev, "write", PLAIN, (fd, vectors, count))
VECTOR(preadv, "read", AT, (fd, vectors, count, offset))
VECTOR(preadv64, "read", AT, (fd, vectors, count, offset))
VECTOR(preadv2, "read", AT2, (fd, vectors, count, offset, flags))
VECTOR(preadv64v2, "read", AT2, (fd, vectors, count, offset, flags))
VECTOR(pwritev, "write", AT, (fd, vectors, count, offset))
VECTOR(pwritev64, "write", AT, (fd, vectors, count, offset))

KEEP(copy_file_range);
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *to_at, size_t count, unsigned flags) {
    struct rule *reading = on_fd("read", from), *writing = on_fd("write", to);
    if (fails(reading) || fails(writing)) return -1;
    return REAL(copy_file_range)(from, at, to, to_at, shortened(writing, shortened(reading, count)), flags);
}

/* whole files */
#define ON_FD(name, call)                              \
    KEEP(name);                                        \
    int name(int fd) {                                 \
        return fails(on_fd(call, fd)) ? -1 : REAL(name)(fd); \
    }
ON_FD(fsync, "fsync")
ON_FD(fdatasync, "fsync")

KEEP(rename);
int rename(const char *from, const char *to) {
    return fails(on_path("rename", AT_FDCWD, to)) ? -1 : REAL(rename)(from, to);
}
KEEP(renameat);
int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    return fails(on_path("rename", to_folder, to)) ? -1 : REAL(renameat)(from_folder, from, to_folder, to);
}

#define STAT(name, buffer)                                                              \
    KEEP(name);                                                                         \
    int name(const char *path, struct buffer *status) {                                 \
        return fails(on_path("stat", AT_FDCWD, path)) ? -1 : REAL(name)(path, status);  \
    }
STAT(stat, stat)
STAT(stat64, stat64)
STAT(lstat, stat)
STAT(lstat64, stat64)
KEEP(fstatat);
int fstatat(int folder, const char *path, struct stat *status, int flags) {
    return fails(on_path("stat", folder, path)) ? -1 : REAL(fstatat)(folder, path, status, flags);
}
KEEP(fstatat64);
int fstatat64(int folder, const char *path, struct stat64 *status, int flags) {
    return fails(on_path("stat", folder, path)) ? -1 : REAL(fstatat64)(folder, path, status, flags);
}

/* clocks: "shift clock" adds `value` seconds to the settable clock; "skip sleep" ends every wait after `value` ms */
static struct rule *clock_rule(void) { return num_rules ? find("clock", "/clock") : NULL; }

KEEP(clock_gettime);
int clock_gettime(clockid_t id, struct timespec *now) {
    int status = REAL(clock_gettime)(id, now);
    struct rule *rule = id == CLOCK_REALTIME ? clock_rule() : NULL;
    if (rule && rule->kind == SHIFT) now->tv_sec += (int64_t)rule->value;
    return status;
}
KEEP(gettimeofday);
int gettimeofday(struct timeval *now, void *zone) {
    int status = REAL(gettimeofday)(now, zone);
    struct rule *rule = clock_rule();
    if (rule && rule->kind == SHIFT) now->tv_sec += (int64_t)rule->value;
    return status;
}
KEEP(time);
time_t time(time_t *result) {
    time_t now = REAL(time)(NULL);
    struct rule *rule = clock_rule();
    if (rule && rule->kind == SHIFT) now += (int64_t)rule->value;
    if (result) *result = now;
    return now;
}
KEEP(clock_nanosleep);
int clock_nanosleep(clockid_t id, int flags, const struct timespec *wait, struct timespec *left) {
    struct rule *rule = num_rules ? find("sleep", "/sleep") : NULL;
    if (!rule || rule->kind != SKIP) return REAL(clock_nanosleep)(id, flags, wait, left);
    pause_ms(rule->value);
    return 0;
}
