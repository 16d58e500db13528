/* LD_PRELOAD library: counts the file-system events of a command below one directory, and kills the
 * command at a chosen event. See tests/chaos/crash_points.py.
 *
 * All processes of a command share the control file, mapped into memory. An event is logged before
 * it happens. At the target the library kills the driver and this process. Every other process
 * dies at its own next event, so nothing happens below the directory after the target. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define LONGEST 4096

struct control {
    int64_t count;  /* events so far */
    int64_t target; /* number of the event that kills; 0 for none */
    int64_t driver; /* process that is killed too; 0 for none */
    char root[LONGEST];
};

static struct control *control;
static const char *log_path;

static void attach(void) {
    const char *path = getenv("SKILLNET_CRASH_CONTROL");
    if (control != NULL || path == NULL) return;
    int descriptor = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (descriptor < 0) return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    syscall(SYS_close, descriptor);
    if (mapped == MAP_FAILED) return;
    log_path = getenv("SKILLNET_CRASH_LOG");
    control = mapped;
}

__attribute__((constructor)) static void start(void) { attach(); }

static int is_below(const char *path) {
    size_t length = strlen(control->root);
    return length > 0 && strncmp(path, control->root, length) == 0 &&
           (path[length] == '/' || path[length] == '\0');
}

/* Return whether the descriptor's file is below the root; writes its path. */
static int of_descriptor(int descriptor, char *path) {
    if (control == NULL || control->root[0] == '\0') return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, LONGEST - 1);
    if (length <= 0) return 0;
    path[length] = '\0';
    return is_below(path);
}

/* Return whether a path argument leads below the root; writes the absolute path. */
static int of_path(int folder, const char *given, char *path) {
    if (control == NULL || control->root[0] == '\0' || given == NULL) return 0;
    if (given[0] == '/') {
        snprintf(path, LONGEST, "%s", given);
        return is_below(path);
    }
    char base[LONGEST];
    const char *link = "/proc/self/cwd";
    char numbered[64];
    if (folder != AT_FDCWD) {
        snprintf(numbered, sizeof numbered, "/proc/self/fd/%d", folder);
        link = numbered;
    }
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
    if (length <= 0) return 0;
    base[length] = '\0';
    if (snprintf(path, LONGEST, "%s/%s", base, given) >= LONGEST) return 0;
    return is_below(path);
}

static void die(void) {
    if (control->driver > 0) syscall(SYS_kill, (pid_t)control->driver, SIGKILL);
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

/* Count an event, and log it; return whether it is the target. Past the target: die. */
static int is_target(const char *kind, const char *path) {
    int saved = errno;
    int64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    int64_t target = control->target;
    if (target > 0 && number > target) die();
    if (log_path != NULL) {
        char line[LONGEST + 64];
        int length = snprintf(line, sizeof line, "%lld %s %s\n", (long long)number, kind, path);
        int log = (int)syscall(SYS_openat, AT_FDCWD, log_path,
                               O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        if (log >= 0) {
            (void)!syscall(SYS_write, log, line, (size_t)length);
            syscall(SYS_close, log);
        }
    }
    errno = saved;
    return target > 0 && number == target;
}

#define REAL(name)                                                      \
    static __typeof__(&name) real_##name;                               \
    if (real_##name == NULL) {                                          \
        real_##name = (__typeof__(&name))dlsym(RTLD_NEXT, #name);       \
    }

/* Events that kill before they happen. */
#define BEFORE(kind, found, path) \
    if ((found) && is_target(kind, path)) die()

/* A write that is the target happens by half. */
#define WRITES(name, descriptor, size, half)                   \
    char path[LONGEST];                                        \
    if (of_descriptor(descriptor, path) && is_target(name, path)) { \
        (void)!(half);                                         \
        die();                                                 \
    }

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    WRITES("write", fd, size, real_write(fd, data, size / 2));
    return real_write(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    WRITES("write", fd, size, real_pwrite(fd, data, size / 2, at));
    return real_pwrite(fd, data, size, at);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    WRITES("write", fd, size, real_pwrite64(fd, data, size / 2, at));
    return real_pwrite64(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    WRITES("write", fd, count, real_writev(fd, parts, count / 2));
    return real_writev(fd, parts, count);
}

ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    REAL(sendfile);
    WRITES("write", out, size, real_sendfile(out, in, at, 1));
    return real_sendfile(out, in, at, size);
}

ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    REAL(sendfile64);
    WRITES("write", out, size, real_sendfile64(out, in, at, 1));
    return real_sendfile64(out, in, at, size);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range);
    WRITES("write", out, size, real_copy_file_range(in, from, out, to, 1, flags));
    return real_copy_file_range(in, from, out, to, size, flags);
}

int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    char path[LONGEST];
    BEFORE("truncate", of_descriptor(fd, path), path);
    return real_ftruncate(fd, size);
}

int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    char path[LONGEST];
    BEFORE("truncate", of_descriptor(fd, path), path);
    return real_ftruncate64(fd, size);
}

int fsync(int fd) {
    REAL(fsync);
    char path[LONGEST];
    BEFORE("fsync", of_descriptor(fd, path), path);
    return real_fsync(fd);
}

int fdatasync(int fd) {
    REAL(fdatasync);
    char path[LONGEST];
    BEFORE("fsync", of_descriptor(fd, path), path);
    return real_fdatasync(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    char path[LONGEST];
    BEFORE("rename", of_path(AT_FDCWD, to, path), path);
    return real_rename(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    char path[LONGEST];
    BEFORE("rename", of_path(to_folder, to, path), path);
    return real_renameat(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    REAL(renameat2);
    char path[LONGEST];
    BEFORE("rename", of_path(to_folder, to, path), path);
    return real_renameat2(from_folder, from, to_folder, to, flags);
}

int link(const char *from, const char *to) {
    REAL(link);
    char path[LONGEST];
    BEFORE("link", of_path(AT_FDCWD, to, path), path);
    return real_link(from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    REAL(linkat);
    char path[LONGEST];
    BEFORE("link", of_path(to_folder, to, path), path);
    return real_linkat(from_folder, from, to_folder, to, flags);
}

int symlink(const char *content, const char *to) {
    REAL(symlink);
    char path[LONGEST];
    BEFORE("link", of_path(AT_FDCWD, to, path), path);
    return real_symlink(content, to);
}

int unlink(const char *given) {
    REAL(unlink);
    char path[LONGEST];
    BEFORE("unlink", of_path(AT_FDCWD, given, path), path);
    return real_unlink(given);
}

int unlinkat(int folder, const char *given, int flags) {
    REAL(unlinkat);
    char path[LONGEST];
    BEFORE("unlink", of_path(folder, given, path), path);
    return real_unlinkat(folder, given, flags);
}

int rmdir(const char *given) {
    REAL(rmdir);
    char path[LONGEST];
    BEFORE("unlink", of_path(AT_FDCWD, given, path), path);
    return real_rmdir(given);
}

int mkdir(const char *given, mode_t mode) {
    REAL(mkdir);
    char path[LONGEST];
    BEFORE("mkdir", of_path(AT_FDCWD, given, path), path);
    return real_mkdir(given, mode);
}

int mkdirat(int folder, const char *given, mode_t mode) {
    REAL(mkdirat);
    char path[LONGEST];
    BEFORE("mkdir", of_path(folder, given, path), path);
    return real_mkdirat(folder, given, mode);
}

/* A file that is created or emptied: the kill comes after it, when the file is empty. */
#define OPENS(name, folder, given, flags, ...)                                         \
    mode_t mode = 0;                                                                   \
    if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) {                   \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        mode = va_arg(rest, mode_t);                                                   \
        va_end(rest);                                                                  \
    }                                                                                  \
    char path[LONGEST];                                                                \
    struct stat before;                                                                \
    int creates = ((flags) & (O_CREAT | O_TRUNC)) && of_path(folder, given, path) &&   \
                  (((flags) & O_TRUNC) || stat(path, &before) != 0);                   \
    int target = creates && is_target("create", path);                                 \
    int opened = __VA_ARGS__;                                                          \
    if (target) die();                                                                 \
    return opened

int open(const char *given, int flags, ...) {
    REAL(open);
    OPENS(open, AT_FDCWD, given, flags, real_open(given, flags, mode));
}

int open64(const char *given, int flags, ...) {
    REAL(open64);
    OPENS(open64, AT_FDCWD, given, flags, real_open64(given, flags, mode));
}

int openat(int folder, const char *given, int flags, ...) {
    REAL(openat);
    OPENS(openat, folder, given, flags, real_openat(folder, given, flags, mode));
}

int openat64(int folder, const char *given, int flags, ...) {
    REAL(openat64);
    OPENS(openat64, folder, given, flags, real_openat64(folder, given, flags, mode));
}
