/*
 * A brake on the threads named "kvcellar-copy...": those that copy blocks between vLLM's KV cache
 * and the pool.
 *
 * On a GPU such copies last longer than the gap between two steps; in host memory they end before
 * anybody looks. `hold` stops each of these threads by a signal, whatever it is doing, so that it
 * does not matter with which instructions it copies. It is free again after `let_go_in`, or once
 * the time of `hold` is over: whoever waits for a copy cannot be the one who lets it go.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static atomic_long held_until_us;
static atomic_int stopped;

static long now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000L + now.tv_nsec / 1000;
}

static void sleep_ms(void)
{
    struct timespec left = {0, 1000000};
    nanosleep(&left, NULL);
}

static void stop(int signal)
{
    int before = errno;
    (void)signal;
    atomic_fetch_add(&stopped, 1);
    while (now_us() < atomic_load(&held_until_us))
        sleep_ms();
    atomic_fetch_sub(&stopped, 1);
    errno = before;
}

static int copies_blocks(const char *thread)
{
    char path[64], name[16] = {0};
    snprintf(path, sizeof path, "/proc/self/task/%.20s/comm", thread);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return 0;
    size_t read = fread(name, 1, sizeof name - 1, file);
    fclose(file);
    return read >= 13 && strncmp(name, "kvcellar-copy", 13) == 0;
}

/* Lets all go after `ms`. */
void let_go_in(long ms) { atomic_store(&held_until_us, now_us() + ms * 1000); }

/* Stops all for `ms` at most, and returns how many there are once each of them stands still. */
int hold(long ms)
{
    struct sigaction action = {.sa_handler = stop, .sa_flags = SA_RESTART};
    int number = SIGRTMIN + 7, threads = 0;
    if (sigaction(number, &action, NULL) != 0)
        return -1;
    let_go_in(0);
    while (atomic_load(&stopped) > 0)
        sleep_ms();
    let_go_in(ms);
    DIR *tasks = opendir("/proc/self/task");
    if (tasks == NULL)
        return -1;
    for (struct dirent *task; (task = readdir(tasks)) != NULL;)
        if (task->d_name[0] != '.' && copies_blocks(task->d_name)
            && syscall(SYS_tgkill, getpid(), atoi(task->d_name), number) == 0)
            threads++;
    closedir(tasks);
    while (atomic_load(&stopped) < threads && now_us() < atomic_load(&held_until_us))
        sleep_ms();
    return threads;
}
