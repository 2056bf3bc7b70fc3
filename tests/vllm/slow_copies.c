/*
 * memcpy with a brake for threads named "kvcellar-copy...": those that copy blocks between vLLM's KV cache and the pool.
 *
 * On a GPU such copies last longer than the gap between two steps; in host memory they end before anybody looks.
 * `hold` stops pieces before their first byte until `let_go` or until HELD_MS_MAX have passed; after that each piece
 * takes the time of `pace`. Pieces shorter than PIECE_BYTES_MIN and other threads are not touched.
 */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#define PIECE_BYTES_MIN 1024
#define HELD_MS_MAX 20000

static atomic_int held;
static atomic_int pace_us;
static atomic_long pieces;

void hold(void) { atomic_store(&held, 1); }
void let_go(void) { atomic_store(&held, 0); }
void pace(int us) { atomic_store(&pace_us, us); }
long braked(void) { return atomic_load(&pieces); }

static void sleep_us(long us)
{
    struct timespec left = {us / 1000000, us % 1000000 * 1000};
    while (nanosleep(&left, &left) != 0) {
    }
}

static int copies_blocks(void)
{
    char name[16] = {0};
    return prctl(PR_GET_NAME, name) == 0 && strncmp(name, "kvcellar-copy", 13) == 0;
}

static void brake(void)
{
    for (int waited_ms = 0; atomic_load(&held) && waited_ms < HELD_MS_MAX; waited_ms++)
        sleep_us(1000);
    sleep_us(atomic_load(&pace_us));
    atomic_fetch_add(&pieces, 1);
}

void *memcpy(void *restrict to, const void *restrict from, size_t len)
{
    if (len >= PIECE_BYTES_MIN && (atomic_load(&held) || atomic_load(&pace_us)) && copies_blocks())
        brake();
    return memmove(to, from, len);
}
