// The driver's functions that the copier uses, over the model. See model.h.
//
// Left out on demand, as by older drivers: WITHOUT_BATCHES, WITHOUT_MODULES, WITHOUT_EVENTS.

#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int Answer;

static int retained;
static __thread int depth, relaxed;

static int from_environment(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

// Begins a call: takes the lock; a fault that the test asked for is the answer.
#define CALL(name)                                 \
    lock();                                        \
    int answer = fault(name);                      \
    if (answer != OK) { unlock(); return answer; }

#define CALL_IN_CONTEXT(name)                                 \
    CALL(name)                                                \
    if (!depth) { wrong("%s without a context", name); unlock(); return INVALID_CONTEXT; }

// Calls that fail, and spoil the graph, when another thread captures one: unless this thread has said that it stays out of that.
#define NOT_IN_A_CAPTURE(name) \
    if (capturing && !relaxed) wrong("%s in a thread that a graph's capture forbids it", name);

Answer cuInit(unsigned flags) { (void)flags; return from_environment("KVCELLAR_STUB_INIT", OK); }
Answer cuDriverGetVersion(int *version) { *version = from_environment("KVCELLAR_STUB_VERSION", 12080); return OK; }
Answer cuDeviceGetCount(int *count) { *count = from_environment("KVCELLAR_STUB_DEVICES", 1); return OK; }

Answer cuGetErrorName(unsigned code, const char **name) {
    static const struct { unsigned code; const char *name; } known[] = {
        {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {100, "CUDA_ERROR_NO_DEVICE"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    };
    for (size_t at = 0; at < sizeof known / sizeof *known; at++)
        if (known[at].code == code) { *name = known[at].name; return OK; }
    *name = NULL;
    return INVALID_VALUE;
}

Answer cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < from_environment("KVCELLAR_STUB_DEVICES", 1) ? OK : 101;
}

Answer cuDeviceGetName(char *name, int len, int device) { (void)device; snprintf(name, (size_t)len, "Stub"); return OK; }

Answer cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
    case 75: *value = 9; break;   // compute capability
    case 76: *value = 0; break;
    case 16: *value = 132; break; // multiprocessors
    case 91: *value = 1; break;   // kernels use the host's addresses of pinned memory
    case 134:                     // the memory node next to the device: a driver before CUDA 12.2 does not know the question
        if (!getenv("KVCELLAR_STUB_NODE")) return INVALID_VALUE;
        *value = atoi(getenv("KVCELLAR_STUB_NODE"));
        break;
    default: return INVALID_VALUE;
    }
    return OK;
}

Answer cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    CALL("cuDevicePrimaryCtxRetain")
    retained++;
    *context = &retained;
    unlock();
    return OK;
}

Answer cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    CALL("cuDevicePrimaryCtxRelease_v2")
    if (--retained < 0) wrong("the context was released more often than retained");
    unlock();
    return OK;
}

Answer cuCtxPushCurrent_v2(void *context) { (void)context; CALL("cuCtxPushCurrent_v2") depth++; unlock(); return OK; }

Answer cuCtxPopCurrent_v2(void **context) {
    lock();
    if (--depth < 0) wrong("a context was popped that was not pushed");
    *context = &retained;
    unlock();
    return OK;
}

Answer cuThreadExchangeStreamCaptureMode(unsigned *mode) {
    CALL_IN_CONTEXT("cuThreadExchangeStreamCaptureMode")
    relaxed = *mode == 2;
    *mode = 0;
    unlock();
    return OK;
}

Answer cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }

Answer cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    CALL_IN_CONTEXT("cuStreamCreateWithPriority")
    if (flags != 1) wrong("a stream that waits for the default stream");
    if (priority != 0) wrong("a stream of priority %d takes the bus from the model", priority);
    *stream = stream_new(false);
    answer = *stream ? OK : OUT_OF_MEMORY;
    unlock();
    return answer;
}

Answer cuStreamDestroy_v2(void *stream) { CALL("cuStreamDestroy_v2") stream_end(stream_of(stream)); unlock(); return OK; }
Answer cuStreamSynchronize(void *stream) { CALL("cuStreamSynchronize") synchronize(stream_of(stream)); unlock(); return OK; }

Answer cuStreamQuery(void *handle) {
    CALL("cuStreamQuery")
    Stream *stream = stream_of(handle);
    NOT_IN_A_CAPTURE("cuStreamQuery")
    work_off();
    if (stream->first) answer = NOT_READY; else observe(&stream->clock);
    unlock();
    return answer;
}

#ifndef WITHOUT_EVENTS
Answer cuEventCreate(void **event, unsigned flags) {
    CALL_IN_CONTEXT("cuEventCreate")
    if (flags != 2) wrong("an event that takes times is slower");
    *event = calloc(1, sizeof(Event));
    unlock();
    return OK;
}

Answer cuEventDestroy_v2(void *event) { CALL("cuEventDestroy_v2") ((Event *)event)->destroyed = true; unlock(); return OK; }

Answer cuEventRecord(void *handle, void *stream_handle) {
    CALL_IN_CONTEXT("cuEventRecord")
    Event *event = handle;
    Stream *stream = stream_of(stream_handle);
    if (event->destroyed) wrong("a destroyed event was recorded");
    begin(stream);
    event->clock = stream->clock;
    event->of_compute = stream->compute;
    Op *op = op_new(RECORD, 0);
    op->record = event->last = calloc(1, sizeof *event->last);
    give(stream, op);
    unlock();
    return OK;
}

Answer cuEventQuery(void *handle) {
    CALL("cuEventQuery")
    Event *event = handle;
    NOT_IN_A_CAPTURE("cuEventQuery")
    work_off();
    if (event->destroyed) wrong("a destroyed event was asked");
    if (!event->last || event->last->over) observe(&event->clock);
    else if (mutation != EVENTS_ARE_OVER_AT_ONCE) answer = NOT_READY;
    unlock();
    return answer;
}
#endif

Answer cuStreamWaitEvent(void *stream_handle, void *handle, unsigned flags) {
    (void)flags;
    CALL("cuStreamWaitEvent")
    Event *event = handle;
    Stream *stream = stream_of(stream_handle);
    bool ignored = mutation == (stream->compute ? COMPUTE_WAITS_FOR_NOTHING : COPIES_WAIT_FOR_NOTHING);
    ignored |= mutation == COPIES_IGNORE_EACH_OTHER && !stream->compute && !event->of_compute;
    if (event->destroyed) wrong("a destroyed event was waited for");
    if (!ignored && event->last) {
        begin(stream);
        join(&stream->clock, &event->clock);
        Op *op = op_new(WAIT, 0);
        op->record = event->last;
        give(stream, op);
    }
    unlock();
    return OK;
}

Answer cuMemHostRegister_v2(void *start, size_t len, unsigned flags) {
    (void)flags;
    CALL_IN_CONTEXT("cuMemHostRegister_v2")
    NOT_IN_A_CAPTURE("cuMemHostRegister")
    if (register_most && len > register_most) answer = INVALID_VALUE;
    while (register_held) { unlock(); usleep(200); lock(); }
    if (answer == OK) answer = remember_memory((uintptr_t)start, len, false);
    unlock();
    return answer;
}

Answer cuMemHostUnregister(void *start) {
    CALL_IN_CONTEXT("cuMemHostUnregister")
    while (unregister_held) { unlock(); usleep(200); lock(); }
    // The driver reads the pages it lets go of: they are still mapped.
    (void)*(volatile char *)start;
    answer = forget_memory((uintptr_t)start, false) ? OK : INVALID_VALUE;
    unlock();
    return answer;
}

Answer cuMemHostAlloc(void **start, size_t len, unsigned flags) {
    (void)flags;
    CALL_IN_CONTEXT("cuMemHostAlloc")
    NOT_IN_A_CAPTURE("cuMemHostAlloc")
    *start = aligned_alloc(4096, (len + 4095) / 4096 * 4096);
    answer = remember_memory((uintptr_t)*start, len, false);
    unlock();
    return answer;
}

Answer cuMemFreeHost(void *start) {
    CALL_IN_CONTEXT("cuMemFreeHost")
    if (forget_memory((uintptr_t)start, false)) free(start); else answer = INVALID_VALUE;
    unlock();
    return answer;
}

Answer cuMemAlloc_v2(uint64_t *start, size_t len) {
    CALL_IN_CONTEXT("cuMemAlloc_v2")
    NOT_IN_A_CAPTURE("cuMemAlloc")
    *start = (uintptr_t)aligned_alloc(256, (len + 255) / 256 * 256);
    answer = remember_memory(*start, len, true);
    unlock();
    return answer;
}

Answer cuMemFree_v2(uint64_t start) {
    CALL_IN_CONTEXT("cuMemFree_v2")
    if (forget_memory(start, true)) free((void *)start); else answer = INVALID_VALUE;
    unlock();
    return answer;
}

// One copy command, of one or many pieces. Ordinary memory is copied before the call returns, in the stream's order.
static int copy(Stream *stream, Op *op, enum Order order, bool single) {
    begin(stream);
    for (size_t at = 0; at < op->count; at++) {
        Piece piece = op->pieces[at];
        if (!single && op->table && is_device(piece.from, piece.len) && is_device(piece.to, piece.len)) {
            op->inside = true;
            use(stream, piece.from, piece.len, false, order, "packing's read");
            use(stream, piece.to, piece.len, true, ORDER_STREAM, "packing's write");
            continue;
        }
        op->down = is_device(piece.from, piece.len);
        uintptr_t device = op->down ? piece.from : piece.to, memory = op->down ? piece.to : piece.from;
        int place = pinned(memory, piece.len);
        if (!piece.len || !is_device(device, piece.len) || place < 0) {
            wrong("a copy of %zu bytes that are not whole on one side", piece.len);
            return INVALID_VALUE;
        }
        if (place == 0 && (strict || !single)) wrong("a copy of memory that is not pinned");
        op->pageable |= place == 0;
        use(stream, piece.from, piece.len, false, order, op->down ? "an offload's read" : "a load's read");
        use(stream, piece.to, piece.len, true, ORDER_STREAM, op->down ? "an offload's write" : "a load's write");
    }
    bool now = op->pageable || order == ORDER_DURING_CALL;
    give(stream, op);
    return now && !synchronize(stream) ? INVALID_VALUE : OK;
}

static Answer copy_one(const char *name, void *stream, uintptr_t to, uintptr_t from, size_t len) {
    CALL_IN_CONTEXT(name)
    Op *op = op_new(COPY, 1);
    op->pieces[0] = (Piece){to, from, len};
    answer = copy(stream_of(stream), op, ORDER_STREAM, true);
    unlock();
    return answer;
}

Answer cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t len, void *stream) {
    return copy_one("cuMemcpyHtoDAsync_v2", stream, to, (uintptr_t)from, len);
}

Answer cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t len, void *stream) {
    return copy_one("cuMemcpyDtoHAsync_v2", stream, (uintptr_t)to, from, len);
}

#ifndef WITHOUT_BATCHES
typedef struct { unsigned order; struct { unsigned type; int id; } from, to; unsigned flags; } Attributes;

Answer cuMemcpyBatchAsync(uint64_t *to, uint64_t *from, size_t *lens, size_t count, Attributes *attributes, size_t *indices, size_t attribute_count,
                          size_t *failed, void *stream) {
    CALL_IN_CONTEXT("cuMemcpyBatchAsync")
    if (!stream || !count || attribute_count != 1 || indices[0] != 0 || attributes->order < 1 || attributes->order > 3) {
        *failed = SIZE_MAX;
        unlock();
        return INVALID_VALUE;
    }
    Op *op = op_new(COPY, count);
    for (size_t at = 0; at < count; at++) op->pieces[at] = (Piece){to[at], from[at], lens[at]};
    answer = copy(stream_of(stream), op, attributes->order, false);
    unlock();
    return answer;
}
#endif

#ifndef WITHOUT_MODULES
Answer cuModuleLoadData(void **module, const void *image) {
    CALL_IN_CONTEXT("cuModuleLoadData")
    NOT_IN_A_CAPTURE("cuModuleLoadData")
    *module = (void *)image;
    unlock();
    return OK;
}

Answer cuModuleUnload(void *module) { (void)module; CALL_IN_CONTEXT("cuModuleUnload") unlock(); return OK; }

Answer cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return strcmp(name, "kvcellar_gather") ? 500 : OK;
}

// The gather kernel: a table of (device, host, length), and how many.
Answer cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, void *stream,
                      void **arguments, void **extra) {
    (void)function, (void)y, (void)z, (void)block_y, (void)block_z, (void)shared, (void)extra;
    CALL_IN_CONTEXT("cuLaunchKernel")
    if (x > 132 || block_x > 1024) wrong("a kernel of %u blocks takes the whole device", x);
    const Piece *table = *(const Piece *const *)arguments[0];
    Op *op = op_new(COPY, *(const unsigned *)arguments[1]);
    if (pinned((uintptr_t)table, op->count * sizeof *table) != 1) wrong("a kernel's table is not pinned");
    memcpy(op->pieces, table, op->count * sizeof *table);
    op->table = table;
    answer = copy(stream_of(stream), op, ORDER_STREAM, false);
    use(stream_of(stream), (uintptr_t)table, op->count * sizeof *table, false, ORDER_STREAM, "a kernel's table");
    unlock();
    return answer;
}
#endif
