// Streams, their working off, and the checker. See model.h.

#include "model.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RANGES = 4096, WRONGS = 64, FAULTS = 8, NAMES = 64 };

typedef struct { uintptr_t at; size_t len; bool write; int stream; uint64_t number; const char *what; } Access;
typedef struct { uintptr_t at; size_t len; bool device; } Memory;

int mutation, held, lazy, strict, eager, register_held, unregister_held, capturing;
uint64_t register_limit = UINT64_MAX, register_most;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Stream streams[STREAMS];
static uint64_t issued[STREAMS];
static Clock host;
static Access *accesses;
static size_t access_count, access_room;
static Memory memories[RANGES];
static size_t memory_count;
static uint64_t registered_bytes;
static uint64_t dice;
static char wrongs[WRONGS][256];
static int wrong_count;
static struct { char name[64]; int skip, times, code; } faults[FAULTS];
static struct { char name[64]; int calls; } names[NAMES];

void lock(void) { pthread_mutex_lock(&mutex); }
void unlock(void) { pthread_mutex_unlock(&mutex); }

static uint64_t roll(void) {
    dice += 0x9e3779b97f4a7c15u;
    uint64_t mixed = (dice ^ (dice >> 30)) * 0xbf58476d1ce4e5b9u;
    mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
    return mixed ^ (mixed >> 31);
}

void wrong(const char *format, ...) {
    if (wrong_count < WRONGS) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(wrongs[wrong_count], sizeof wrongs[0], format, arguments);
        va_end(arguments);
    }
    wrong_count++;
}

int fault(const char *name) {
    for (int at = 0; at < NAMES; at++) {
        if (!names[at].name[0]) snprintf(names[at].name, sizeof names[at].name, "%s", name);
        if (!strcmp(names[at].name, name)) { names[at].calls++; break; }
    }
    for (int at = 0; at < FAULTS; at++) {
        if (faults[at].times && !strcmp(faults[at].name, name)) {
            if (faults[at].skip > 0) { faults[at].skip--; continue; }
            faults[at].times--;
            return faults[at].code;
        }
    }
    return OK;
}

void join(Clock *clock, const Clock *other) {
    for (int at = 0; at < STREAMS; at++)
        if (other->of[at] > clock->of[at]) clock->of[at] = other->of[at];
}

// The host has seen that all before this is over: later work comes after it, and its accesses are of no interest any more.
void observe(const Clock *clock) {
    join(&host, clock);
    size_t kept = 0;
    for (size_t at = 0; at < access_count; at++)
        if (accesses[at].number > host.of[accesses[at].stream]) accesses[kept++] = accesses[at];
    access_count = kept;
}

static bool meet(uintptr_t a, size_t a_len, uintptr_t b, size_t b_len) { return a < b + b_len && b < a + a_len; }

void use(Stream *stream, uintptr_t at, size_t len, bool write, enum Order order, const char *what) {
    // A source that may be read at any time comes after what the host has seen, and after nothing else.
    const Clock *clock = order == ORDER_ANY ? &host : &stream->clock;
    uint64_t number = issued[stream->id];
    for (size_t index = 0; index < access_count; index++) {
        const Access *other = &accesses[index];
        bool same = other->stream == stream->id && other->number == number;
        if (!same && (write || other->write) && meet(at, len, other->at, other->len) && clock->of[other->stream] < other->number)
            wrong("%s on stream %d may run beside %s on stream %d", what, stream->id, other->what, other->stream);
    }
    if (access_count == access_room) {
        access_room = access_room ? 2 * access_room : 1024;
        accesses = realloc(accesses, access_room * sizeof *accesses);
    }
    accesses[access_count++] = (Access){at, len, write, stream->id, number, what};
}

Stream *stream_of(void *handle) { return handle ? handle : &streams[0]; }

Stream *stream_new(bool compute) {
    for (int id = 1; id < STREAMS; id++) {
        if (!streams[id].alive) {
            streams[id] = (Stream){.id = id, .alive = true, .compute = compute, .clock = host};
            return &streams[id];
        }
    }
    return NULL;
}

void stream_end(Stream *stream) {
    while (stream->first && synchronize(stream)) {}
    stream->alive = false;
}

Op *op_new(Kind kind, size_t count) {
    Op *op = calloc(1, sizeof *op);
    op->kind = kind;
    op->count = count;
    op->pieces = count ? calloc(count, sizeof *op->pieces) : NULL;
    return op;
}

static void run(Op *op) {
    if (op->kind == RECORD) op->record->over = true;
    for (size_t at = 0; at < op->count; at++) {
        Piece piece = op->pieces[at];
        if (op->table && (op->table[at].to != piece.to || op->table[at].from != piece.from || op->table[at].len != piece.len))
            wrong("a kernel's table was changed before the kernel ran");
        if (op->kind == FILL) memset((void *)piece.to, op->byte, piece.len);
        if (op->kind != COPY) continue;
        if (op->inside) {
            if (!is_device(piece.from, piece.len) || !is_device(piece.to, piece.len)) wrong("packing in device memory that was freed");
            else memcpy((void *)piece.to, (void *)piece.from, piece.len);
            continue;
        }
        uintptr_t device = op->down ? piece.from : piece.to, memory = op->down ? piece.to : piece.from;
        if (!is_device(device, piece.len)) wrong("a copy of device memory that was freed");
        else if (!op->pageable && pinned(memory, piece.len) != 1) wrong("a copy of memory that was unpinned");
        else memcpy((void *)piece.to, (void *)piece.from, piece.len);
    }
}

// Works off the first operation of a stream, if it may run.
static bool step(Stream *stream) {
    Op *op = stream->first;
    if (!op || (op->kind == WAIT && !op->record->over)) return false;
    stream->first = op->next;
    if (!stream->first) stream->last = NULL;
    run(op);
    free(op->pieces);
    free(op);
    return true;
}

void drain(void) {
    bool moved = true;
    while (moved) {
        moved = false;
        for (int id = 0; id < STREAMS; id++)
            while (step(&streams[id])) moved = true;
    }
}

// Some of what may run does, or nothing: called when the copier looks.
void work_off(void) {
    if (held || lazy) return;
    if (eager) { drain(); return; }
    for (uint64_t turns = roll() % 4; turns > 0; turns--) {
        int start = (int)(roll() % STREAMS);
        for (int at = 0; at < STREAMS; at++)
            if (step(&streams[(start + at) % STREAMS])) break;
    }
}

void give(Stream *stream, Op *op) {
    if (stream->last) stream->last->next = op; else stream->first = op;
    stream->last = op;
    if (eager && !held) drain();
}

// Opens a new place in the stream's order; accesses that follow belong to it.
void begin(Stream *stream) {
    join(&stream->clock, &host);
    stream->clock.of[stream->id] = ++issued[stream->id];
}

// One operation of any stream, or time passes where the device is held. False: none may run.
static bool turn(void) {
    if (held) { unlock(); usleep(200); lock(); return true; }
    int start = (int)(roll() % STREAMS);
    for (int at = 0; at < STREAMS; at++)
        if (step(&streams[(start + at) % STREAMS])) return true;
    wrong("streams wait for each other");
    return false;
}

// The stream that has been given the recording of this, if it is not over.
static Stream *recorder(const Record *record) {
    for (int id = 0; id < STREAMS; id++)
        for (Op *op = streams[id].first; op; op = op->next)
            if (op->kind == RECORD && op->record == record) return &streams[id];
    return NULL;
}

// One operation that a stream's next one depends on, or that one: nothing that it does not need.
static bool advance(Stream *stream) {
    for (int depth = 0; depth < STREAMS && stream; depth++) {
        if (step(stream)) return true;
        stream = stream->first ? recorder(stream->first->record) : NULL;
    }
    wrong("streams wait for each other");
    return false;
}

static bool work_until_empty(Stream *stream) {
    while (stream->first)
        if (!(lazy && !held ? advance(stream) : turn())) return false;
    return true;
}

bool synchronize(Stream *stream) {
    if (!work_until_empty(stream)) return false;
    observe(&stream->clock);
    return true;
}

bool is_device(uintptr_t at, size_t len) {
    for (size_t index = 0; index < memory_count; index++)
        if (memories[index].device && at >= memories[index].at && at + len <= memories[index].at + memories[index].len) return true;
    return false;
}

int pinned(uintptr_t at, size_t len) {
    int found = 0;
    for (size_t index = 0; index < memory_count; index++) {
        const Memory *memory = &memories[index];
        if (memory->device || !meet(at, len, memory->at, memory->len)) continue;
        if (at >= memory->at && at + len <= memory->at + memory->len) return 1;
        found = -1;
    }
    return found;
}

// Tests free what they called the device's without a word: what lies there now is something else.
static void disown(uintptr_t at, size_t len) {
    for (size_t index = memory_count; index-- > 0;)
        if (memories[index].device && meet(at, len, memories[index].at, memories[index].len)) memories[index] = memories[--memory_count];
}

int remember_memory(uintptr_t at, size_t len, bool device) {
    if (!device) disown(at, len);
    for (size_t index = 0; index < memory_count; index++)
        if (memories[index].device == device && meet(at, len, memories[index].at, memories[index].len)) return ALREADY_REGISTERED;
    if (memory_count == RANGES) return OUT_OF_MEMORY;
    if (!device && registered_bytes + len > register_limit) return OUT_OF_MEMORY;
    if (!device) registered_bytes += len;
    memories[memory_count++] = (Memory){at, len, device};
    return OK;
}

bool forget_memory(uintptr_t at, bool device) {
    for (size_t index = 0; index < memory_count; index++) {
        Memory memory = memories[index];
        if (memory.device != device || memory.at != at) continue;
        for (size_t other = 0; other < access_count; other++)
            if (meet(memory.at, memory.len, accesses[other].at, accesses[other].len))
                wrong("memory was given back before the host saw that %s was over", accesses[other].what);
        if (!device) registered_bytes -= memory.len;
        memories[index] = memories[--memory_count];
        return true;
    }
    return false;
}

// What tests call.

void stub_reset(uint64_t seed) {
    lock();
    held = register_held = unregister_held = 0;
    mutation = NO_MUTATION;
    drain();
    memset(&host, 0, sizeof host);
    memset(streams, 0, sizeof streams);
    memset(issued, 0, sizeof issued);
    memset(faults, 0, sizeof faults);
    memset(names, 0, sizeof names);
    streams[0] = (Stream){.alive = true, .compute = true};
    access_count = memory_count = 0;
    registered_bytes = 0;
    wrong_count = strict = eager = lazy = capturing = 0;
    register_limit = UINT64_MAX;
    register_most = 0;
    dice = seed;
    unlock();
}

void stub_set(const char *what, uint64_t value) {
    lock();
    if (!strcmp(what, "mutation")) mutation = (int)value;
    if (!strcmp(what, "held")) held = (int)value;
    if (!strcmp(what, "register_held")) register_held = (int)value;
    if (!strcmp(what, "unregister_held")) unregister_held = (int)value;
    if (!strcmp(what, "lazy")) lazy = (int)value;
    if (!strcmp(what, "strict")) strict = (int)value;
    if (!strcmp(what, "eager")) eager = (int)value;
    if (!strcmp(what, "capturing")) capturing = (int)value;
    if (!strcmp(what, "register_limit")) register_limit = value;
    if (!strcmp(what, "register_most")) register_most = value;
    unlock();
}

void stub_fail(const char *name, int skip, int times, int code) {
    lock();
    for (int at = 0; at < FAULTS; at++) {
        if (faults[at].times) continue;
        snprintf(faults[at].name, sizeof faults[at].name, "%s", name);
        faults[at].skip = skip;
        faults[at].times = times;
        faults[at].code = code;
        break;
    }
    unlock();
}

int stub_calls(const char *name) {
    int calls = 0;
    lock();
    for (int at = 0; at < NAMES; at++)
        if (!strcmp(names[at].name, name)) calls = names[at].calls;
    unlock();
    return calls;
}

// Memory that counts as the device's from here on.
void stub_adopt(uintptr_t at, size_t len) {
    lock();
    disown(at, len);
    remember_memory(at, len, true);
    unlock();
}

void *stub_compute(void) {
    lock();
    void *stream = stream_new(true);
    unlock();
    return stream;
}

// A forward pass: writes this byte into the ranges when it runs, or reads them.
void stub_forward(void *handle, const uintptr_t *starts, const size_t *lens, size_t count, int byte, int writes) {
    lock();
    Stream *stream = stream_of(handle);
    Op *op = op_new(writes ? FILL : READ, count);
    op->byte = (unsigned char)byte;
    begin(stream);
    for (size_t at = 0; at < count; at++) {
        op->pieces[at] = (Piece){starts[at], starts[at], lens[at]};
        use(stream, starts[at], lens[at], writes, ORDER_STREAM, writes ? "a step's write" : "a step's read");
    }
    give(stream, op);
    unlock();
}

// A kernel that computes in host memory, outside of the model, before and after it runs. Before:
// everything that its stream waits for is over, as on a device when a kernel begins; the host
// learns nothing of that. 0 where streams wait for each other.
int stub_reach(void *handle) {
    lock();
    Stream *stream = stream_of(handle);
    bool reached = work_until_empty(stream);
    unlock();
    return reached;
}

// After: it has read or written these ranges.
void stub_access(void *handle, const uintptr_t *starts, const size_t *lens, size_t count, int writes) {
    lock();
    Stream *stream = stream_of(handle);
    begin(stream);
    for (size_t at = 0; at < count; at++) use(stream, starts[at], lens[at], writes, ORDER_STREAM, writes ? "a step's write" : "a step's read");
    give(stream, op_new(READ, 0));
    unlock();
}

// The host waits for an event, whatever the mutation lies about events. 0 where streams wait for
// each other.
int stub_wait(void *handle) {
    lock();
    Event *event = handle;
    bool over = true;
    while (event->last && !event->last->over && over) over = lazy && !held ? advance(recorder(event->last)) : turn();
    if (over) observe(&event->clock);
    unlock();
    return over;
}

// The device has done all it was given, the host knows, and what the checker found so far counts no
// more.
void stub_forget(void) {
    lock();
    drain();
    for (int id = 0; id < STREAMS; id++) observe(&streams[id].clock);
    wrong_count = 0;
    unlock();
}

// The host reads or writes memory: nothing of the device's may be under way there, for all that the
// host has been told.
void stub_touch(uintptr_t at, size_t len, int write) {
    lock();
    for (size_t index = 0; index < access_count; index++)
        if ((write || accesses[index].write) && meet(at, len, accesses[index].at, accesses[index].len))
            wrong("the host %s memory before it saw that %s was over", write ? "reuses" : "reads", accesses[index].what);
    unlock();
}

void stub_finish(void) {
    lock();
    held = 0;
    drain();
    for (int id = 0; id < STREAMS; id++) observe(&streams[id].clock);
    unlock();
}

int stub_wrongs(char *text, size_t len) {
    lock();
    int count = wrong_count;
    if (count && len) snprintf(text, len, "%s", wrongs[0]);
    unlock();
    return count;
}
