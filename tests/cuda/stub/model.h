// A model of a GPU in host memory: streams as queues that are worked off late and in any order that events allow, and a checker of that order.
//
// What is modelled: streams, events, copies, kernels, pinned memory, one device. What is checked, by vector clocks and so whatever order the queues happened
// to be worked off in: no two accesses of the same bytes, one of them a write, without an order between them; no access by the host before it
// has seen that the device's is over; no copy of memory that is freed, unpinned or in two pieces.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { STREAMS = 16, OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_READY = 600, ALREADY_REGISTERED = 712 };

// What the stub does to the copier's calls, so that the checker can be shown to see it.
enum Mutation {
    NO_MUTATION,
    COPIES_WAIT_FOR_NOTHING, // our streams ignore what they are told to wait for
    EVENTS_ARE_OVER_AT_ONCE, // every event says that it is over
    COMPUTE_WAITS_FOR_NOTHING, // vLLM's stream ignores what it is told to wait for
    COPIES_IGNORE_EACH_OTHER, // our streams wait for vLLM's only
};

// When a source is read, as cuMemcpyBatchAsync numbers it.
enum Order { ORDER_STREAM = 1, ORDER_DURING_CALL = 2, ORDER_ANY = 3 };

typedef struct { uint64_t of[STREAMS]; } Clock;

// One record of an event. Who waits for it is not concerned by later ones. Never freed: a process makes few.
typedef struct { bool over; } Record;

typedef struct {
    Record *last;
    Clock clock; // of the last record
    bool destroyed, of_compute;
} Event;

typedef struct { uintptr_t to, from; size_t len; } Piece;

typedef enum { COPY, FILL, READ, RECORD, WAIT } Kind;

typedef struct Op {
    Kind kind;
    Record *record;
    Piece *pieces;
    size_t count;
    const Piece *table; // a kernel's own table, as device, host, length
    bool down, pageable, inside; // inside: from device memory to device memory
    unsigned char byte;
    struct Op *next;
} Op;

typedef struct Stream {
    int id;
    bool alive, compute;
    Clock clock;
    Op *first, *last;
} Stream;

Stream *stream_of(void *handle);
Stream *stream_new(bool compute);
void stream_end(Stream *stream);
void begin(Stream *stream);
void give(Stream *stream, Op *op);
Op *op_new(Kind kind, size_t count);
void use(Stream *stream, uintptr_t at, size_t len, bool write, enum Order order, const char *what);
bool synchronize(Stream *stream);
void work_off(void);
void observe(const Clock *clock);
void join(Clock *clock, const Clock *other);
void drain(void);
void wrong(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool is_device(uintptr_t at, size_t len);
// 1: in one pinned piece; 0: in none; -1: partly, or across two.
int pinned(uintptr_t at, size_t len);
void lock(void);
void unlock(void);
int fault(const char *name);
int remember_memory(uintptr_t at, size_t len, bool device);
bool forget_memory(uintptr_t at, bool device);

// lazy: work is done only where somebody waits for it, and not while the copier looks.
// register_most: the most bytes that one call pins; 0: any.
extern int mutation, held, lazy, strict, eager, register_held, unregister_held, capturing;
extern uint64_t register_limit, register_most;
