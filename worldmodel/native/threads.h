/* Rows that do not depend on each other, shared out among threads. */
#ifndef WORLDMODEL_THREADS_H
#define WORLDMODEL_THREADS_H

#include <pthread.h>
#include <stdlib.h>

#include "tiles.h"

/* Does rows begin .. begin + rows - 1 of a job; nonzero where memory is lacking. */
typedef int (*Part)(const void *job, int begin, int rows);

typedef struct {
    Part part;
    const void *job;
    int rows, step, next, failed;
} Shared;

static void *work_on(void *argument)
{
    Shared *shared = argument;
    Tiles before;
    tiles_begin(&before);
    for (;;) {
        int begin = __atomic_fetch_add(&shared->next, shared->step, __ATOMIC_RELAXED);
        if (begin >= shared->rows) break;
        int rows = shared->rows - begin < shared->step ? shared->rows - begin : shared->step;
        if (shared->part(shared->job, begin, rows)) __atomic_store_n(&shared->failed, 1, __ATOMIC_RELAXED);
    }
    tiles_end(&before);
    return NULL;
}

/* All rows of a job on up to so many threads, at least `least` rows each, at most `most` at a time. */
static int share_out(Part part, const void *job, int rows, int least, int most, int threads)
{
    if (threads > rows / least) threads = rows / least ? rows / least : 1;
    int step = (rows + threads - 1) / threads;
    Shared shared = {part, job, rows, step < most ? step : most, 0, 0};
    pthread_t *others = threads > 1 ? malloc(threads * sizeof(pthread_t)) : NULL;
    int started = 0;
    while (others && started < threads - 1 && !pthread_create(others + started, NULL, work_on, &shared)) started++;
    work_on(&shared);
    while (started) pthread_join(others[--started], NULL);
    free(others);
    return shared.failed;
}

#endif
