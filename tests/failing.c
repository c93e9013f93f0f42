/* Preloaded into the front: the n-th call from now of one function fails with an errno, as a file says that tests map. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <unistd.h>

struct order { int which, left, error, hits; };
static volatile struct order *order;

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("HAYHOST_TEST_FAILING");
    int descriptor = file ? open(file, O_RDWR | O_CLOEXEC) : -1;
    if (descriptor < 0) return;
    void *mapped = mmap(0, sizeof *order, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped != MAP_FAILED) order = mapped;
    close(descriptor);
}

static int fails(int which) {
    if (!order || order->which != which || __sync_sub_and_fetch(&order->left, 1) != 0) return 0;
    order->hits++;
    errno = order->error;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(number, type, name, parameters, arguments) \
    type name parameters { return fails(number) ? (type)-1 : REAL(name) arguments; }

WRAP(1, int, socketpair, (int a, int b, int c, int d[2]), (a, b, c, d))
WRAP(2, int, pipe2, (int a[2], int b), (a, b))
WRAP(3, ssize_t, sendmsg, (int a, const struct msghdr *b, int c), (a, b, c))
WRAP(4, ssize_t, send, (int a, const void *b, size_t c, int d), (a, b, c, d))
WRAP(5, ssize_t, recv, (int a, void *b, size_t c, int d), (a, b, c, d))
WRAP(6, ssize_t, recvmsg, (int a, struct msghdr *b, int c), (a, b, c))
WRAP(7, int, accept4, (int a, struct sockaddr *b, socklen_t *c, int d), (a, b, c, d))
WRAP(8, int, epoll_ctl, (int a, int b, int c, struct epoll_event *d), (a, b, c, d))
WRAP(9, void *, mmap, (void *a, size_t b, int c, int d, int e, off_t f), (a, b, c, d, e, f))

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return fails(10) ? -1 : REAL(open64)(path, flags, mode);
}


WRAP(11, int, mkdir, (const char *a, mode_t b), (a, b))
WRAP(12, ssize_t, write, (int a, const void *b, size_t c), (a, b, c))
