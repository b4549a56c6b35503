/* Sees every call of a process that changes, flushes or reads files of one folder, and can end or fail at one of them.

   Preloaded (LD_PRELOAD), so it sees the calls of Python, Arrow, safetensors and Pillow alike; and what Rust's tempfile asks
   of the kernel without the C library (a rename) is trapped by seccomp (x86-64). It does nothing until `watch` is called. A log gets one record a call: struct call, both paths, the bytes written. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { CREATE = 'c', OPEN = 'o', WRITE = 'w', TRUNCATE = 't', FLUSH = 'f', RENAME = 'r', LINK = 'l', UNLINK = 'u', MKDIR = 'm', RMDIR = 'd', READ = 'R', MAP = 'M' };
enum { RECORD, KILL, FAIL, FULL, SHORT };

struct call { int32_t kind, path, other; int64_t offset, bytes; };

static char root[PATH_MAX];
static size_t root_length;
static long count, stop_at;
static int mode, number, log_fd = -1, trapped;
static void trap(void);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void watch(const char *folder, long at, int how, int error, int log) {
    strncpy(root, folder, PATH_MAX - 1);
    root_length = strlen(root);
    if (!trapped++) trap();
    count = 0; stop_at = at; mode = how; number = error; log_fd = log;
}

long calls(void) { return count; }

static int inside(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static int path_of(int fd, char *path) {
    char link[64];
    if (!root_length || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return inside(path) && !strstr(path, " (deleted)");
}

static int path_at(int folder, const char *name, char *path) {
    if (!root_length || !name) return 0;
    if (name[0] == '/') strncpy(path, name, PATH_MAX - 1);
    else {
        char base[PATH_MAX];
        if (folder == AT_FDCWD) { if (!getcwd(base, sizeof base)) return 0; }
        else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = syscall(SYS_readlink, link, base, PATH_MAX - 1);
            if (length <= 0) return 0;
            base[length] = 0;
        }
        if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return 0;
    }
    return inside(path);
}

static int takes_room(int kind) { return kind == CREATE || kind == WRITE || kind == MKDIR || kind == LINK || kind == TRUNCATE; }

/* Count a call. 0: go on; 1: it fails, with errno set; 2: half of it, and nothing after. */
static int begins(int kind) {
    pthread_mutex_lock(&lock);
    long at = count++;
    pthread_mutex_unlock(&lock);
    if (mode == KILL && at == stop_at) { syscall(SYS_kill, getpid(), SIGKILL); pause(); }
    if (mode == FAIL && at == stop_at) { errno = number; return 1; }
    if (mode == FULL && at >= stop_at && takes_room(kind)) { errno = number; return 1; }
    if (mode == SHORT && takes_room(kind)) {
        if (at == stop_at && kind == WRITE) return 2;
        if (at >= stop_at) { errno = number; return 1; }
    }
    return 0;
}

static void done(int kind, const char *path, const char *other, int64_t offset, const void *data, int64_t bytes) {
    if (log_fd < 0) return;
    struct call call = { kind, strlen(path), other ? strlen(other) : 0, offset, bytes };
    struct iovec parts[4] = { { &call, sizeof call }, { (void *)path, call.path }, { (void *)other, call.other }, { (void *)data, data ? bytes : 0 } };
    int saved = errno;
    pthread_mutex_lock(&lock);
    for (int each = 0; each < 4; each++)
        for (size_t at = 0; at < parts[each].iov_len;) at += syscall(SYS_write, log_fd, (char *)parts[each].iov_base + at, parts[each].iov_len - at);
    pthread_mutex_unlock(&lock);
    errno = saved;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int opened(int folder, const char *name, int flags, mode_t bits) {
    char path[PATH_MAX];
    if ((flags & O_PATH) || !path_at(folder, name, path)) return syscall(SYS_openat, folder, name, flags, bits);
    int is_new = (flags & O_CREAT) && syscall(SYS_faccessat, folder, name, F_OK) != 0;
    int cuts = (flags & O_TRUNC) && !is_new;
    int kind = is_new ? CREATE : cuts ? TRUNCATE : OPEN;
    if (begins(kind)) return -1;
    int fd = syscall(SYS_openat, folder, name, flags, bits);
    if (fd >= 0) done(kind, path, NULL, 0, NULL, 0);
    return fd;
}

#define OPENS(name) int name(const char *path, int flags, ...) { \
    mode_t bits = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); bits = va_arg(list, mode_t); va_end(list); } \
    return opened(AT_FDCWD, path, flags, bits); }
#define OPENS_AT(name) int name(int folder, const char *path, int flags, ...) { \
    mode_t bits = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); bits = va_arg(list, mode_t); va_end(list); } \
    return opened(folder, path, flags, bits); }
OPENS(open) OPENS(open64) OPENS_AT(openat) OPENS_AT(openat64)

static ssize_t written(int fd, const void *data, size_t bytes, int64_t offset) {
    char path[PATH_MAX];
    int ours = path_of(fd, path), half = 0;
    if (ours) {
        int answer = begins(WRITE);
        if (answer == 1) return -1;
        half = answer == 2;
    }
    if (half) bytes /= 2;
    int64_t at = offset;
    if (ours && offset < 0) {
        if (fcntl(fd, F_GETFL) & O_APPEND) { struct stat found; fstat(fd, &found); at = found.st_size; }
        else at = syscall(SYS_lseek, fd, 0, SEEK_CUR);
    }
    ssize_t wrote = offset < 0 ? syscall(SYS_write, fd, data, bytes) : syscall(SYS_pwrite64, fd, data, bytes, offset);
    if (ours && wrote > 0) done(WRITE, path, NULL, at, data, wrote);
    return wrote;
}

ssize_t write(int fd, const void *data, size_t bytes) { return root_length ? written(fd, data, bytes, -1) : syscall(SYS_write, fd, data, bytes); }
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) { return written(fd, data, bytes, offset); }
ssize_t pwrite64(int fd, const void *data, size_t bytes, off64_t offset) { return written(fd, data, bytes, offset); }
ssize_t writev(int fd, const struct iovec *parts, int number_of) {
    char path[PATH_MAX];
    if (!path_of(fd, path)) return syscall(SYS_writev, fd, parts, number_of);
    for (int each = 0; each < number_of; each++) if (parts[each].iov_len) return written(fd, parts[each].iov_base, parts[each].iov_len, -1);
    return 0;
}

static ssize_t in_kernel(int out, ssize_t moved, int64_t at, const char *path) {
    if (moved > 0) {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", out);
        int again = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY, 0);
        char *data = malloc(moved);
        ssize_t got = syscall(SYS_pread64, again, data, moved, at);
        done(WRITE, path, NULL, at, data, got);
        free(data);
        syscall(SYS_close, again);
    }
    return moved;
}

ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *end, size_t bytes, unsigned flags) {
    char path[PATH_MAX];
    int ours = path_of(to, path), answer = ours ? begins(WRITE) : 0;
    if (answer == 1) return -1;
    if (answer == 2) bytes = 100;
    int64_t at = ours ? (end ? *end : syscall(SYS_lseek, to, 0, SEEK_CUR)) : 0;
    ssize_t moved = syscall(SYS_copy_file_range, from, start, to, end, bytes, flags);
    return ours ? in_kernel(to, moved, at, path) : moved;
}

static ssize_t sent(int to, int from, off64_t *start, size_t bytes) {
    char path[PATH_MAX];
    int ours = path_of(to, path), answer = ours ? begins(WRITE) : 0;
    if (answer == 1) return -1;
    if (answer == 2) bytes = 100;
    int64_t at = ours ? syscall(SYS_lseek, to, 0, SEEK_CUR) : 0;
    ssize_t moved = syscall(SYS_sendfile, to, from, start, bytes);
    return ours ? in_kernel(to, moved, at, path) : moved;
}
ssize_t sendfile(int to, int from, off_t *start, size_t bytes) { return sent(to, from, start, bytes); }
ssize_t sendfile64(int to, int from, off64_t *start, size_t bytes) { return sent(to, from, start, bytes); }

#define ON_FILE(name, kind, given, call, offset) int name given { \
    char path[PATH_MAX]; int ours = path_of(fd, path); \
    if (ours && begins(kind)) return -1; \
    int answer = call; \
    if (ours && !answer) done(kind, path, NULL, offset, NULL, 0); \
    return answer; }
ON_FILE(fsync, FLUSH, (int fd), syscall(SYS_fsync, fd), 0)
ON_FILE(fdatasync, FLUSH, (int fd), syscall(SYS_fdatasync, fd), 0)
ON_FILE(ftruncate, TRUNCATE, (int fd, off_t size), syscall(SYS_ftruncate, fd, size), size)
ON_FILE(ftruncate64, TRUNCATE, (int fd, off64_t size), syscall(SYS_ftruncate, fd, size), size)

static ssize_t got(int fd, void *data, size_t bytes, int64_t offset) {
    char path[PATH_MAX];
    if (path_of(fd, path) && begins(READ)) return -1;
    return offset < 0 ? syscall(SYS_read, fd, data, bytes) : syscall(SYS_pread64, fd, data, bytes, offset);
}
ssize_t read(int fd, void *data, size_t bytes) { return got(fd, data, bytes, -1); }
ssize_t pread(int fd, void *data, size_t bytes, off_t offset) { return got(fd, data, bytes, offset); }
ssize_t pread64(int fd, void *data, size_t bytes, off64_t offset) { return got(fd, data, bytes, offset); }

static int named(int kind, int folder, const char *name, int other_folder, const char *other, long call, long a, long b) {
    char path[PATH_MAX], to[PATH_MAX] = "";
    int ours = path_at(folder, name, path), theirs = other && path_at(other_folder, other, to);
    if ((ours || theirs) && begins(kind)) return -1;
    int answer = kind == RENAME || kind == LINK ? syscall(call, folder, name, other_folder, other, a) : syscall(call, folder, name, a, b);
    if ((ours || theirs) && !answer) done(kind, path, other ? to : NULL, 0, NULL, 0);
    return answer;
}
int rename(const char *a, const char *b) { return named(RENAME, AT_FDCWD, a, AT_FDCWD, b, SYS_renameat2, 0, 0); }
int renameat(int f, const char *a, int g, const char *b) { return named(RENAME, f, a, g, b, SYS_renameat2, 0, 0); }
int renameat2(int f, const char *a, int g, const char *b, unsigned flags) { return named(RENAME, f, a, g, b, SYS_renameat2, flags, 0); }
int link(const char *a, const char *b) { return named(LINK, AT_FDCWD, a, AT_FDCWD, b, SYS_linkat, 0, 0); }
int linkat(int f, const char *a, int g, const char *b, int flags) { return named(LINK, f, a, g, b, SYS_linkat, flags, 0); }
int unlink(const char *a) { return named(UNLINK, AT_FDCWD, a, 0, NULL, SYS_unlinkat, 0, 0); }
int unlinkat(int f, const char *a, int flags) { return named(flags & AT_REMOVEDIR ? RMDIR : UNLINK, f, a, 0, NULL, SYS_unlinkat, flags, 0); }
int rmdir(const char *a) { return named(RMDIR, AT_FDCWD, a, 0, NULL, SYS_unlinkat, AT_REMOVEDIR, 0); }
int mkdir(const char *a, mode_t bits) { return named(MKDIR, AT_FDCWD, a, 0, NULL, SYS_mkdirat, bits, 0); }
int mkdirat(int f, const char *a, mode_t bits) { return named(MKDIR, f, a, 0, NULL, SYS_mkdirat, bits, 0); }

void *mmap(void *where, size_t bytes, int access, int flags, int fd, off_t offset) {
    char path[PATH_MAX];
    if ((access & PROT_WRITE) && (flags & MAP_SHARED) && path_of(fd, path)) { begins(MAP); done(MAP, path, NULL, offset, NULL, bytes); }
    return (void *)syscall(SYS_mmap, where, bytes, access, flags, fd, offset);
}
void *mmap64(void *where, size_t bytes, int access, int flags, int fd, off64_t offset) { return mmap(where, bytes, access, flags, fd, offset); }

#ifdef __x86_64__
/* The wrappers above ask the kernel by other numbers, so only calls that pass them by are trapped. */
static void on_trap(int sig, siginfo_t *info, void *context) {
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    long a = regs[REG_RDI], b = regs[REG_RSI], c = regs[REG_RDX], d = regs[REG_R10];
    int answer = -1, saved = errno;
    switch (info->si_syscall) {
    case SYS_rename: answer = rename((char *)a, (char *)b); break;
    case SYS_renameat: answer = renameat(a, (char *)b, c, (char *)d); break;
    case SYS_unlink: answer = unlink((char *)a); break;
    }
    regs[REG_RAX] = answer < 0 ? -errno : answer;
    errno = saved;
}

static void trap(void) {
    struct sigaction action = { .sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_NODEFER };
    sigaction(SIGSYS, &action, NULL);
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rename, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_unlink, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
    };
    struct sock_fprog program = { sizeof filter / sizeof *filter, filter };
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}
#else
static void trap(void) {}
#endif
