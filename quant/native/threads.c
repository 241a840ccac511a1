/* Threads: torch's own pool, borrowed through a function pointer, so that two pools never compete
 * for the cores and nothing is linked. Without it, threads are started for each call; so they are
 * in a child after fork(), where the pool's threads do not exist and waiting for them would hang.
 */
#include "kern.h"

#include <stddef.h>

typedef int32_t (*torch_parallel_for)(int64_t, int64_t, int64_t, kern_range, void *);

static torch_parallel_for borrowed;
static int own_threads = 1;

#if defined(_WIN32)
static void watch_forks(void) {} /* there is no fork */

static void run_own(int64_t count, kern_range body, void *context) { body(0, count, context); }
#else
#include <pthread.h>

static void return_pool(void) { borrowed = NULL; }

static void watch_forks(void) {
    static int watching;
    if (!watching) watching = pthread_atfork(NULL, NULL, return_pool) == 0;
}

#define MOST_THREADS 64

typedef struct {
    int64_t begin, end;
    kern_range body;
    void *context;
} share;

static void *run_share(void *argument) {
    share *s = argument;
    s->body(s->begin, s->end, s->context);
    return NULL;
}

static void run_own(int64_t count, kern_range body, void *context) {
    int threads = own_threads < MOST_THREADS ? own_threads : MOST_THREADS;
    pthread_t started[MOST_THREADS];
    share shares[MOST_THREADS];
    int running[MOST_THREADS] = {0};
    for (int t = 0; t < threads; t++) {
        shares[t] = (share){count * t / threads, count * (t + 1) / threads, body, context};
        if (t + 1 < threads)
            running[t] = pthread_create(&started[t], NULL, run_share, &shares[t]) == 0;
        if (!running[t]) run_share(&shares[t]); /* the last share, or no thread to be had */
    }
    for (int t = 0; t < threads; t++)
        if (running[t]) pthread_join(started[t], NULL);
}
#endif

void kern_use_pool(void *parallel_for, int threads) {
    watch_forks();
    borrowed = (torch_parallel_for)(size_t)parallel_for;
    own_threads = threads;
}

/* Run body over 0..count-1 in ranges of at least `grain`. */
void kern_parallel(int64_t count, int64_t grain, kern_range body, void *context) {
    if (count <= grain)
        body(0, count, context);
    else if (borrowed)
        borrowed(0, count, grain, body, context);
    else
        run_own(count, body, context);
}
