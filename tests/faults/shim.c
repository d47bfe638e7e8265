/* Lets a file-system call of a process fail, or kills the process before it; LD_PRELOAD loads this.

   Nothing happens until fault_arm() names a folder. From then on each call that changes something
   below it is counted, and the call number `at` has the fate that `mode` says. What is flushed is
   copied into the folder `store`, so that somebody can put together what a power cut would leave:
   store/c<inode> holds a file's bytes, store/d<inode> a folder's names. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, ONCE, FULL, HALF_THEN_FULL, HALF };
enum { GO = 0, FAIL = -1, SHORT = 1 };
static char folder[PATH_MAX], store[PATH_MAX];
static int mode, full;
static long calls, at;

void fault_arm(const char *below, int how, long when, const char *kept) {
  mode = how, at = when, calls = 0, full = 0;
  snprintf(store, sizeof store, "%s", kept);
  snprintf(folder, sizeof folder, "%s/", below);
}
long fault_calls(void) { return calls; }

static int resolve(int dir, const char *path, char *found) { /* an absolute path; 0: it is below */
  char link[64], base[PATH_MAX] = "";
  if (!folder[0]) return -1;
  if (path && path[0] == '/') {
    snprintf(found, PATH_MAX, "%s", path);
  } else {
    if (dir == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, base, sizeof base - 1);
    if (n < 0) return -1;
    base[n] = 0;
    if (path) { if (snprintf(found, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return -1; }
    else snprintf(found, PATH_MAX, "%s/", base);
  }
  return strncmp(found, folder, strlen(folder));
}

/* What becomes of a call; takes: whether it needs room on the disk. */
static int fate(int dir, const char *path, int takes) {
  char found[PATH_MAX];
  if (resolve(dir, path, found)) return GO;
  calls++;
  if (mode == KILL && calls == at) kill(getpid(), SIGKILL);
  if (mode == ONCE && calls == at) { errno = EIO; return FAIL; }
  if ((mode == HALF_THEN_FULL || mode == HALF) && calls == at) { full = mode == HALF_THEN_FULL; return SHORT; }
  if (mode == FULL && calls == at) full = 1;
  if (full && takes) { errno = ENOSPC; return FAIL; }
  return GO;
}

/* The inode of what is deleted is kept, so that no later file gets its number. */
static void keep(int dir, const char *path) {
  char found[PATH_MAX];
  if (store[0] && !resolve(dir, path, found)) syscall(SYS_openat, dir, path, O_PATH | O_NOFOLLOW);
}

static void flushed(int fd) {
  char found[PATH_MAX], name[2 * PATH_MAX], buffer[1 << 16];
  struct stat s;
  if (!store[0] || resolve(fd, NULL, found) || fstat(fd, &s)) return;
  int is_folder = S_ISDIR(s.st_mode);
  snprintf(name, sizeof name, "%s/%c%lu", store, is_folder ? 'd' : 'c', (unsigned long)s.st_ino);
  int out = syscall(SYS_openat, AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, 0600);
  if (is_folder) {
    DIR *open = opendir(found);
    for (struct dirent *e; open && (e = readdir(open));)
      if (strcmp(e->d_name, ".") && strcmp(e->d_name, ".."))
        syscall(SYS_write, out, buffer, (size_t)sprintf(buffer, "%lu %s\n", (unsigned long)e->d_ino, e->d_name));
    if (open) closedir(open);
  } else {
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    int in = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY);
    for (ssize_t n; (n = syscall(SYS_read, in, buffer, sizeof buffer)) > 0;) syscall(SYS_write, out, buffer, (size_t)n);
    syscall(SYS_close, in);
  }
  syscall(SYS_close, out);
}

static int opening(int dir, const char *path, int flags, mode_t permissions) {
  int writes = flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR);
  if (writes && fate(dir, path, flags & O_CREAT) == FAIL) return -1;
  return syscall(SYS_openat, dir, path, flags, permissions);
}
#define OPEN(name, ARGUMENTS, dir)                                  \
  int name ARGUMENTS {                                              \
    mode_t permissions = 0;                                         \
    if (flags & (O_CREAT | __O_TMPFILE)) {                          \
      va_list more;                                                 \
      va_start(more, flags);                                        \
      permissions = va_arg(more, mode_t);                           \
      va_end(more);                                                 \
    }                                                               \
    return opening(dir, path, flags, permissions);           \
  }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD)
OPEN(openat, (int dir, const char *path, int flags, ...), dir)
OPEN(openat64, (int dir, const char *path, int flags, ...), dir)

ssize_t write(int fd, const void *data, size_t n) {
  int f = fate(fd, NULL, 1);
  return f == FAIL ? -1 : syscall(SYS_write, fd, data, f == SHORT ? n / 2 : n);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
  int f = fate(fd, NULL, 1);
  if (f == FAIL) return -1;
  return f == SHORT ? syscall(SYS_write, fd, parts[0].iov_base, parts[0].iov_len / 2) : syscall(SYS_writev, fd, parts, n);
}
ssize_t sendfile(int out, int in, off_t *from, size_t n) {
  int f = fate(out, NULL, 1);
  return f == FAIL ? -1 : syscall(SYS_sendfile, out, in, from, f == SHORT ? 1 : n);
}
ssize_t sendfile64(int out, int in, off64_t *from, size_t n) { return sendfile(out, in, (off_t *)from, n); }
int ftruncate(int fd, off_t n) { return fate(fd, NULL, 1) == FAIL ? -1 : syscall(SYS_ftruncate, fd, n); }
int ftruncate64(int fd, off64_t n) { return ftruncate(fd, n); }
int fsync(int fd) {
  if (fate(fd, NULL, 1) == FAIL) return -1;
  int status = syscall(SYS_fsync, fd);
  if (!status) flushed(fd);
  return status;
}
int mkdir(const char *path, mode_t m) {
  return fate(AT_FDCWD, path, 1) == FAIL ? -1 : syscall(SYS_mkdirat, AT_FDCWD, path, m);
}
int chmod(const char *path, mode_t m) {
  return fate(AT_FDCWD, path, 0) == FAIL ? -1 : syscall(SYS_fchmodat, AT_FDCWD, path, m);
}
int rename(const char *from, const char *to) {
  if (fate(AT_FDCWD, to, 0) == FAIL) return -1;
  keep(AT_FDCWD, to);
  return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int unlinkat(int dir, const char *path, int flags) {
  if (fate(dir, path, 0) == FAIL) return -1;
  keep(dir, path);
  return syscall(SYS_unlinkat, dir, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
