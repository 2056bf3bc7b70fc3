// The gather kernel: many small fragments by a few multiprocessors, from pinned host memory into the KV cache, or from the KV cache into a buffer in the device's memory.
//
// A copy engine spends about as long on a fragment of 4 KiB as on one of 64 KiB; warps do not. Each warp takes whole fragments. It keeps 64 bytes a lane in
// flight, so a few multiprocessors fill the bus, and the others go on computing. `host` is where a fragment comes from, `device` where it goes. Neither includes nor
// libraries: NVRTC compiles this text alone, for the device at hand, before vLLM serves.

struct Fragment {
    unsigned long long device;
    unsigned long long host;
    unsigned long long len;
};

struct alignas(16) Word {
    unsigned int a, b, c, d;
};

// Bytes that are read once: they need no place in the first-level cache.
__device__ __forceinline__ Word read_once(const Word *from) {
    Word word;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word.a), "=r"(word.b), "=r"(word.c), "=r"(word.d)
                 : "l"(from));
    return word;
}

extern "C" __global__ void __launch_bounds__(1024) kvcellar_gather(const Fragment *fragments, unsigned int count) {
    const unsigned int lane = threadIdx.x % 32;
    const unsigned int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const unsigned int warps = gridDim.x * blockDim.x / 32;
    for (unsigned int index = warp; index < count; index += warps) {
        const Fragment fragment = fragments[index];
        unsigned long long done = 0;
        if ((fragment.device | fragment.host) % 16 == 0) {
            const Word *from = reinterpret_cast<const Word *>(fragment.host);
            Word *to = reinterpret_cast<Word *>(fragment.device);
            const unsigned long long words = fragment.len / 16;
            unsigned long long at = lane;
            for (; at + 96 < words; at += 128) {
                const Word first = read_once(from + at);
                const Word second = read_once(from + at + 32);
                const Word third = read_once(from + at + 64);
                const Word fourth = read_once(from + at + 96);
                to[at] = first;
                to[at + 32] = second;
                to[at + 64] = third;
                to[at + 96] = fourth;
            }
            for (; at < words; at += 32) {
                to[at] = read_once(from + at);
            }
            done = words * 16;
        }
        const unsigned char *from = reinterpret_cast<const unsigned char *>(fragment.host);
        unsigned char *to = reinterpret_cast<unsigned char *>(fragment.device);
        for (unsigned long long at = done + lane; at < fragment.len; at += 32) {
            to[at] = from[at];
        }
    }
}
