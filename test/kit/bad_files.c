// A file system that delays, refuses or lies, as a library that is loaded before the C library (LD_PRELOAD).
// Its rules are in a file that all its processes and the test have mapped: see kit/bad_files.py, which lays it out.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

// Kinds of calls, in the order of CALLS in bad_files.py.
enum {
  LOOK = 1 << 0, OPEN = 1 << 1, CREATE = 1 << 2, TMPFILE = 1 << 3, READ = 1 << 4, WRITE = 1 << 5, CLOSE = 1 << 6,
  SYNC = 1 << 7, SYNC_DIRECTORY = 1 << 8, LOCK = 1 << 9, RENAME = 1 << 10, LINK = 1 << 11, MKDIR = 1 << 12,
  RMDIR = 1 << 13, UNLINK = 1 << 14, LIST = 1 << 15, CHANGE = 1 << 16,
};
// What goes wrong, in the order of EFFECTS.
enum { REFUSE = 1, DELAY, HANG, KILL, HIDE, TEAR, CLOCK };

#define RULES 64
#define HIDDEN 64

struct rule {
  _Atomic uint32_t active;
  uint32_t effect;
  uint64_t calls;
  uint64_t first, last;  // of the calls that it is about, counted from 1 among all processes
  _Atomic uint64_t met, fired;
  int32_t number;  // an errno, or seconds
  uint32_t ms;
  uint32_t per_mille;
  uint32_t unused;
  char below[448];
};

struct table {
  _Atomic uint64_t hidden_count;
  uint64_t seed;
  struct { _Atomic uint64_t path; _Atomic int64_t until; } hidden[HIDDEN];
  struct rule rules[RULES];
};

static struct table *table;

static int64_t now_ms(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * 1000LL + at.tv_nsec / 1000000;
}

static void rest(uint32_t ms) {
  struct timespec left = {ms / 1000, ms % 1000 * 1000000L};
  while (nanosleep(&left, &left) < 0 && errno == EINTR) {
  }
}

static uint32_t chance(uint32_t below) {
  static __thread uint64_t state;
  if (!state) state = table->seed ^ (uint64_t)getpid() << 20 ^ (uint64_t)syscall(SYS_gettid) ^ 0x9E3779B97F4A7C15ULL;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return below ? state % below : 0;
}

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("KIT_BAD_FILES");
  if (!path) return;
  int file = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof(struct table), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  syscall(SYS_close, file);
  if (mapped != MAP_FAILED) table = mapped;
}

// Paths

static const char *path_of(int descriptor, char *room) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, room, 4095);
  room[length < 0 ? 0 : length] = 0;
  char *gone = length > 10 ? room + length - 10 : NULL;
  if (gone && !strcmp(gone, " (deleted)")) *gone = 0;
  return room;
}

static const char *path_at(int directory, const char *path, char *room) {
  if (!path || path[0] == '/') return path ? path : "";
  if (directory == AT_FDCWD) {
    if (syscall(SYS_getcwd, room, 4095) < 0) room[0] = 0;
  } else {
    path_of(directory, room);
  }
  size_t length = strlen(room);
  if (path[0]) snprintf(room + length, 4096 - length, "/%s", path);
  return room;
}

static int is_below(const char *path, const char *place) {
  size_t length = strlen(place);
  return !strncmp(path, place, length) && (path[length] == 0 || path[length] == '/');
}

static uint64_t mixed(uint64_t hash, char letter) { return (hash ^ (unsigned char)letter) * 0x100000001B3ULL; }

static uint64_t hash_of(const char *path) {
  uint64_t hash = 0xCBF29CE484222325ULL;
  while (*path) hash = mixed(hash, *path++);
  return hash;
}

static int is_hidden(const char *path) {
  int64_t now = now_ms();
  uint64_t hash = 0xCBF29CE484222325ULL;
  for (const char *letter = path;; letter++) {
    if ((*letter == '/' && letter > path) || !*letter)
      for (int each = 0; each < HIDDEN; each++)
        if (table->hidden[each].path == hash && table->hidden[each].until > now) return 1;
    if (!*letter) return 0;
    hash = mixed(hash, *letter);
  }
}

// Rules

static int any(uint64_t calls) {
  if (!table) return 0;
  for (int each = 0; each < RULES; each++)
    if (table->rules[each].active && table->rules[each].calls & calls) return 1;
  return 0;
}

// Whether a rule is about this call of its kind; it is counted.
static int applies(struct rule *rule, uint64_t call, const char *path) {
  if (!rule->active || !(rule->calls & call) || !is_below(path, rule->below)) return 0;
  uint64_t met = ++rule->met;
  if (met < rule->first || met > rule->last) return 0;
  if (rule->per_mille && chance(1000) >= rule->per_mille) return 0;
  rule->fired++;
  return 1;
}

// What a call is to say in place of doing what it should: an errno, or 0.
static int fault(uint64_t call, const char *path) {
  if (!table) return 0;
  for (int each = 0; each < RULES; each++) {
    struct rule *rule = &table->rules[each];
    if (rule->effect > HIDE || !applies(rule, call, path)) continue;
    sigset_t all, before;
    switch (rule->effect) {
      case REFUSE: return rule->number;
      case DELAY: rest(rule->per_mille ? chance(rule->ms + 1) : rule->ms); break;
      case KILL: kill(getpid(), SIGKILL); break;
      case HIDE:
        if (call != RENAME && is_hidden(path)) return ENOENT;
        rule->fired--;
        break;
      case HANG:
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        while (rule->active) rest(20);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    }
  }
  return 0;
}

static struct rule *of_effect(uint32_t effect, uint64_t call, const char *path) {
  for (int each = 0; table && each < RULES; each++)
    if (table->rules[each].effect == effect && applies(&table->rules[each], call, path)) return &table->rules[each];
  return NULL;
}

#define NEXT(name) ({ static __typeof__(&name) next; if (!next) next = dlsym(RTLD_NEXT, #name); next; })
#define FAIL_IF(error, value) do { int wrong_ = (error); if (wrong_) { errno = wrong_; return (value); } } while (0)

static int fault_at(uint64_t call, int directory, const char *path) {
  char room[4096];
  return any(call) ? fault(call, path_at(directory, path, room)) : 0;
}

static int fault_of(uint64_t call, int descriptor) {
  char room[4096];
  return any(call) ? fault(call, path_of(descriptor, room)) : 0;
}

// Opening

static uint64_t kind_of(int flags) {
  if ((flags & O_TMPFILE) == O_TMPFILE) return TMPFILE;
  return (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY ? CREATE : OPEN;
}

static int opened(int directory, const char *path, int flags, mode_t mode) {
  FAIL_IF(fault_at(kind_of(flags), directory, path), -1);
  return syscall(SYS_openat, directory, path, flags, mode);
}

#define MODE(flags) mode_t mode = 0; \
  if ((flags) & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }

int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return opened(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return opened(at, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static int fault_fopen(const char *path, const char *mode) {
  return fault_at(mode[0] == 'r' && !strchr(mode, '+') ? OPEN : CREATE, AT_FDCWD, path);
}
FILE *fopen(const char *path, const char *mode) {
  FAIL_IF(fault_fopen(path, mode), NULL);
  return NEXT(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
  FAIL_IF(fault_fopen(path, mode), NULL);
  return NEXT(fopen64)(path, mode);
}

DIR *opendir(const char *path) {
  FAIL_IF(fault_at(LIST, AT_FDCWD, path), NULL);
  return NEXT(opendir)(path);
}
DIR *fdopendir(int descriptor) {
  FAIL_IF(fault_of(LIST, descriptor), NULL);
  return NEXT(fdopendir)(descriptor);
}

// Looking

static int looked(int directory, const char *path, struct stat *found, int flags) {
  char room[4096];
  int is_asked = any(LOOK);
  const char *whole = !is_asked ? "" : path[0] ? path_at(directory, path, room) : path_of(directory, room);
  if (is_asked) FAIL_IF(fault(LOOK, whole), -1);
  int status = syscall(SYS_newfstatat, directory, path, found, flags);
  struct rule *clock = is_asked && status == 0 ? of_effect(CLOCK, LOOK, whole) : NULL;
  if (clock) {
    found->st_mtim.tv_sec += clock->number;
    found->st_ctim.tv_sec += clock->number;
  }
  return status;
}

int stat(const char *path, struct stat *found) { return looked(AT_FDCWD, path, found, 0); }
int lstat(const char *path, struct stat *found) { return looked(AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW); }
int fstat(int file, struct stat *found) { return looked(file, "", found, AT_EMPTY_PATH); }
int fstatat(int at, const char *path, struct stat *found, int flags) { return looked(at, path, found, flags); }
int stat64(const char *path, struct stat64 *found) { return stat(path, (struct stat *)found); }
int lstat64(const char *path, struct stat64 *found) { return lstat(path, (struct stat *)found); }
int fstat64(int file, struct stat64 *found) { return fstat(file, (struct stat *)found); }
int fstatat64(int at, const char *path, struct stat64 *found, int flags) {
  return fstatat(at, path, (struct stat *)found, flags);
}
int __xstat(int v, const char *path, struct stat *found) { return stat(path, found); }
int __lxstat(int v, const char *path, struct stat *found) { return lstat(path, found); }
int __fxstat(int v, int file, struct stat *found) { return fstat(file, found); }
int __fxstatat(int v, int at, const char *path, struct stat *found, int flags) { return fstatat(at, path, found, flags); }
int __xstat64(int v, const char *path, struct stat64 *found) { return stat64(path, found); }
int __lxstat64(int v, const char *path, struct stat64 *found) { return lstat64(path, found); }
int __fxstat64(int v, int file, struct stat64 *found) { return fstat64(file, found); }
int __fxstatat64(int v, int at, const char *path, struct stat64 *found, int flags) {
  return fstatat64(at, path, found, flags);
}

int access(const char *path, int mode) {
  FAIL_IF(fault_at(LOOK, AT_FDCWD, path), -1);
  return syscall(SYS_faccessat, AT_FDCWD, path, mode);
}
int faccessat(int at, const char *path, int mode, int flags) {
  FAIL_IF(fault_at(LOOK, at, path), -1);
  return NEXT(faccessat)(at, path, mode, flags);
}

// Changing directories

static int torn(const char *from, const char *to, uint32_t ms) {
  struct stat found;
  if (syscall(SYS_newfstatat, AT_FDCWD, from, &found, AT_SYMLINK_NOFOLLOW) < 0) return -1;
  if (!S_ISDIR(found.st_mode)) {
    int file = syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (file < 0) return -1;
    syscall(SYS_close, file);
    rest(ms);
    return syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
  }
  if (syscall(SYS_mkdirat, AT_FDCWD, to, 0755) < 0) return -1;
  DIR *files = NEXT(opendir)(from);
  if (!files) return -1;
  char old[4096], new[4096];
  for (struct dirent *each; (each = readdir(files));) {
    if (!strcmp(each->d_name, ".") || !strcmp(each->d_name, "..")) continue;
    rest(ms);
    snprintf(old, sizeof old, "%s/%s", from, each->d_name);
    snprintf(new, sizeof new, "%s/%s", to, each->d_name);
    syscall(SYS_renameat2, AT_FDCWD, old, AT_FDCWD, new, 0);
  }
  closedir(files);
  rest(ms);
  return syscall(SYS_unlinkat, AT_FDCWD, from, AT_REMOVEDIR);
}

static int renamed(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
  char from_room[4096], to_room[4096];
  if (!any(RENAME)) return syscall(SYS_renameat2, from_at, from, to_at, to, flags);
  const char *whole_from = path_at(from_at, from, from_room), *whole_to = path_at(to_at, to, to_room);
  FAIL_IF(fault(RENAME, whole_to), -1);
  struct rule *tear = of_effect(TEAR, RENAME, whole_to), *hide = NULL;
  for (int each = 0; each < RULES; each++)
    if (table->rules[each].active && table->rules[each].effect == HIDE && is_below(whole_to, table->rules[each].below))
      hide = &table->rules[each];
  int slot = hide ? table->hidden_count++ % HIDDEN : 0;
  if (hide) {  // before it is there: nobody is to see it in between
    table->hidden[slot].path = hash_of(whole_to);
    table->hidden[slot].until = now_ms() + hide->ms;
  }
  int status = tear ? torn(whole_from, whole_to, tear->ms)
                    : (int)syscall(SYS_renameat2, from_at, from, to_at, to, flags);
  if (hide && status < 0 && errno != EEXIST && errno != ENOTEMPTY) table->hidden[slot].until = 0;
  return status;
}

int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_at, const char *from, int to_at, const char *to) { return renamed(from_at, from, to_at, to, 0); }
int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
  return renamed(from_at, from, to_at, to, flags);
}

int link(const char *from, const char *to) {
  FAIL_IF(fault_at(LINK, AT_FDCWD, to), -1);
  return syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}
int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
  FAIL_IF(fault_at(LINK, to_at, to), -1);
  return syscall(SYS_linkat, from_at, from, to_at, to, flags);
}
int symlink(const char *text, const char *path) {
  FAIL_IF(fault_at(LINK, AT_FDCWD, path), -1);
  return syscall(SYS_symlinkat, text, AT_FDCWD, path);
}
int symlinkat(const char *text, int at, const char *path) {
  FAIL_IF(fault_at(LINK, at, path), -1);
  return syscall(SYS_symlinkat, text, at, path);
}
int mkdirat(int at, const char *path, mode_t mode) {
  FAIL_IF(fault_at(MKDIR, at, path), -1);
  return syscall(SYS_mkdirat, at, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlinkat(int at, const char *path, int flags) {
  FAIL_IF(fault_at(flags & AT_REMOVEDIR ? RMDIR : UNLINK, at, path), -1);
  return syscall(SYS_unlinkat, at, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
  int status = unlink(path);
  return status < 0 && errno == EISDIR ? rmdir(path) : status;
}

// Files that are open

ssize_t read(int file, void *data, size_t count) {
  FAIL_IF(fault_of(READ, file), -1);
  return NEXT(read)(file, data, count);
}
ssize_t write(int file, const void *data, size_t count) {
  FAIL_IF(fault_of(WRITE, file), -1);
  return NEXT(write)(file, data, count);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
  FAIL_IF(fault_of(WRITE, file), -1);
  return NEXT(writev)(file, parts, count);
}
ssize_t pwrite(int file, const void *data, size_t count, off_t at) {
  FAIL_IF(fault_of(WRITE, file), -1);
  return NEXT(pwrite)(file, data, count, at);
}
ssize_t pwrite64(int file, const void *data, size_t count, off64_t at) {
  FAIL_IF(fault_of(WRITE, file), -1);
  return NEXT(pwrite64)(file, data, count, at);
}
int close(int file) {
  int number = fault_of(CLOSE, file);
  int status = syscall(SYS_close, file);
  FAIL_IF(number, -1);
  return status;
}

static int fault_sync(int file) {
  struct stat found;
  if (!any(SYNC | SYNC_DIRECTORY)) return 0;
  int is_directory = !syscall(SYS_newfstatat, file, "", &found, AT_EMPTY_PATH) && S_ISDIR(found.st_mode);
  return fault_of(is_directory ? SYNC_DIRECTORY : SYNC, file);
}
int fsync(int file) {
  FAIL_IF(fault_sync(file), -1);
  return NEXT(fsync)(file);
}
int fdatasync(int file) {
  FAIL_IF(fault_sync(file), -1);
  return NEXT(fdatasync)(file);
}

int flock(int file, int operation) {
  FAIL_IF(operation & LOCK_UN ? 0 : fault_of(LOCK, file), -1);
  return syscall(SYS_flock, file, operation);
}
static int controlled(int file, int command, void *argument) {
  int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
  FAIL_IF(locks ? fault_of(LOCK, file) : 0, -1);
  return syscall(SYS_fcntl, file, command, argument);
}
int fcntl(int file, int command, ...) {
  va_list more;
  va_start(more, command);
  void *argument = va_arg(more, void *);
  va_end(more);
  return controlled(file, command, argument);
}
int fcntl64(int file, int command, ...) {
  va_list more;
  va_start(more, command);
  void *argument = va_arg(more, void *);
  va_end(more);
  return controlled(file, command, argument);
}

int utimensat(int at, const char *path, const struct timespec times[2], int flags) {
  FAIL_IF(fault_at(CHANGE, at, path), -1);
  return syscall(SYS_utimensat, at, path, times, flags);
}
int futimens(int file, const struct timespec times[2]) {
  FAIL_IF(fault_of(CHANGE, file), -1);
  return syscall(SYS_utimensat, file, NULL, times, 0);
}
int fchmodat(int at, const char *path, mode_t mode, int flags) {
  FAIL_IF(fault_at(CHANGE, at, path), -1);
  return NEXT(fchmodat)(at, path, mode, flags);
}
int chmod(const char *path, mode_t mode) { return fchmodat(AT_FDCWD, path, mode, 0); }
