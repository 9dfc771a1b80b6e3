// A CUDA block on one CPU core: every CUDA thread is a fiber, and barriers, shuffles and tensor-core instructions
// are meeting points of fibers. It stands in for nvcc (g++ -DFLASH_EMULATE), so that every step can be run and checked
// without a GPU and without the CUDA toolkit. It is exact in what a lane may see and when a copy lands, and says
// nothing about speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
struct uint3 {
    unsigned x, y, z;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The 16-bit types of cuda_fp16.h and cuda_bf16.h, rounding to nearest even, so that no CUDA toolkit is needed.
struct __half {
    uint16_t bits;
};
struct __half2 {
    __half x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

namespace emulator {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

}  // namespace emulator

inline __half __float2half(float x) {
    const uint32_t bits = emulator::bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    uint32_t result;
    if (size > 0x7f800000)
        result = 0x7e00;  // NaN
    else if (size >= 0x477ff000)
        result = 0x7c00;  // 65520 and more round to infinity
    else if (size < 0x38800000)
        result = emulator::bits_of(emulator::float_of(size) + 0.5f) - 0x3f000000;  // subnormal: steps of 2^-24, as in 0.5
    else
        result = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;  // another bias of the exponent, 13 bits fewer
    return {static_cast<uint16_t>(sign | result)};
}

inline float __half2float(__half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 0x3ff;
    if (exponent == 0) return fraction / (sign ? -16777216.0f : 16777216.0f);  // 2^24
    const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return emulator::float_of(sign | wide << 23 | fraction << 13);
}

inline __nv_bfloat16 __float2bfloat16(float x) {
    const uint32_t bits = emulator::bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 x) { return emulator::float_of(static_cast<uint32_t>(x.bits) << 16); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }

namespace emulator {

struct Copy {
    void* to;
    unsigned char data[16];
};

struct Barrier {
    int count = 0;
    unsigned generation = 0;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    uint3 index;
    bool done = false;
    unsigned exchanges = 0;
    std::deque<std::vector<Copy>> groups;  // asynchronous copies that were committed
    std::vector<Copy> open;                // and those not yet
};

struct Warp {
    Barrier barrier;
    alignas(16) unsigned char slots[2][32][64];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline Thread* current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<unsigned char> shared;
inline uint3 block_index;
inline dim3 grid_size, block_size;
inline unsigned long progress;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void meet(Barrier& b, int members) {
    const unsigned generation = b.generation;
    ++progress;
    if (++b.count == members) {
        b.count = 0;
        ++b.generation;
    } else {
        while (b.generation == generation) yield();
    }
}

inline int lane() { return current->index.x % 32; }
inline Warp& warp() { return warps[current->index.x / 32]; }

// What every lane of the warp gave. Two slots in turn: nobody can write slot k + 2 before all have read slot k.
template <typename T>
const T* share(const T& mine) {
    static_assert(sizeof(T) <= 64, "a lane's slot has 64 bytes");
    auto& slots = warp().slots[current->exchanges++ % 2];
    memcpy(slots[lane()], &mine, sizeof(T));
    meet(warp().barrier, 32);
    static T all[32];  // read before the next yield
    for (int i = 0; i < 32; ++i) memcpy(&all[i], slots[i], sizeof(T));
    return all;
}

inline void trampoline() {
    body();
    current->done = true;
    ++progress;
    yield();
}

inline void run_block(int count) {
    constexpr size_t kStack = 256 * 1024;
    memset(shared.data(), 0xff, shared.size());  // NaN: unwritten shared memory must show
    if (threads.size() != static_cast<size_t>(count)) {
        threads = std::vector<Thread>(count);
        for (auto& t : threads) t.stack.reset(new unsigned char[kStack]);
    }
    warps.assign(count / 32, Warp());
    block_barrier = Barrier();
    for (int i = 0; i < count; ++i) {
        Thread& t = threads[i];
        t.index = {static_cast<unsigned>(i), 0, 0};
        t.done = false;
        t.exchanges = 0;
        t.groups.clear();
        t.open.clear();
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.get();
        t.context.uc_stack.ss_size = kStack;
        makecontext(&t.context, trampoline, 0);
    }
    for (bool alive = true; alive;) {
        alive = false;
        const unsigned long before = progress;
        for (auto& t : threads) {
            if (t.done) continue;
            alive = true;
            current = &t;
            swapcontext(&scheduler, &t.context);
        }
        if (alive && progress == before) {
            fprintf(stderr, "emulator: deadlock, some threads wait at a barrier that others never reach\n");
            abort();
        }
    }
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define gridDim (emulator::grid_size)
#define blockDim (emulator::block_size)
#define DYNAMIC_SHARED(Type, name) Type& name = *reinterpret_cast<Type*>(emulator::shared.data())

inline void __syncthreads() { emulator::meet(emulator::block_barrier, static_cast<int>(emulator::threads.size())); }
inline void __syncwarp() { emulator::meet(emulator::warp().barrier, 32); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulator::share(value)[emulator::lane() ^ mask];
}

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
    return emulator::share(value)[source];
}

using std::max;
using std::min;
#define __expf expf

struct DeviceLimits {
    int multiprocessors;
    size_t shared_bytes;
};
inline DeviceLimits device_limits() { return {2, 227 * 1024}; }  // few, so that small problems fill it

template <typename... Params>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void*, const Params&... args) {
    using namespace emulator;
    shared.resize(shared_bytes + 128);
    grid_size = grid;
    block_size = dim3(threads);
    body = [&] { kernel(args...); };
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                block_index = {x, y, z};
                run_block(threads);
            }
}

// The instructions of ptx.cuh.
inline void cp_async_16(void* to, const void* from, bool valid) {
    emulator::Copy copy{to, {}};
    if (valid) memcpy(copy.data, from, 16);
    emulator::current->open.push_back(copy);
}

inline void cp_async_commit() {
    emulator::current->groups.push_back(std::move(emulator::current->open));
    emulator::current->open.clear();
}

// The data arrives as late as the rules allow, so that a missing wait shows.
template <int N>
void cp_async_wait() {
    auto& groups = emulator::current->groups;
    for (; groups.size() > N; groups.pop_front())
        for (auto& copy : groups.front()) memcpy(copy.to, copy.data, 16);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    const void* const* rows = emulator::share(row);
    const int lane = emulator::lane();
    for (int i = 0; i < 4; ++i) {
        uint16_t e[2];
        for (int j = 0; j < 2; ++j) {
            const int y = transposed ? 2 * (lane % 4) + j : lane / 4, x = transposed ? lane / 4 : 2 * (lane % 4) + j;
            e[j] = static_cast<const uint16_t*>(rows[8 * i + y])[x];
        }
        memcpy(&r[i], e, 4);
    }
    __syncwarp();  // the rows may be overwritten once every lane has read them
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { load_matrices(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { load_matrices(r, row, true); }

inline float to_float(__half x) { return __half2float(x); }
inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Words {
        uint32_t a[4], b[2];
    };
    Words mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const Words* all = emulator::share(mine);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    auto value = [](uint32_t word, int j) {
        T pair[2];
        memcpy(static_cast<void*>(pair), &word, 4);
        return to_float(pair[j]);
    };
    for (int i = 0; i < 4; ++i) {
        const int column = 2 * t + i % 2, lower = i / 2;  // c[0], c[1]: row g; c[2], c[3]: row g + 8
        for (int k = 0; k < 16; ++k) {
            const int lane = k % 8 / 2, high = k / 8;
            c[i] += value(all[4 * g + lane].a[lower + 2 * high], k % 2) * value(all[4 * column + lane].b[high], k % 2);
        }
    }
}

inline float fast_exp2(float x) { return exp2f(x); }

// The part of nvcuda::wmma that step_06 uses; every lane keeps the whole 16 x 16 tile.
namespace nvcuda::wmma {
struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = row_major>
struct fragment {
    float x[256];
};

template <typename U, typename T, typename L>
void load_matrix_sync(fragment<U, 16, 16, 16, T, L>& f, const T* from, unsigned stride) {
    __syncwarp();
    for (int i = 0; i < 256; ++i)
        f.x[i] = std::is_same<L, col_major>::value ? to_float(from[(i % 16) * stride + i / 16])
                                                   : to_float(from[(i / 16) * stride + i % 16]);
}

template <typename U>
void load_matrix_sync(fragment<U, 16, 16, 16, float>& f, const float* from, unsigned stride, layout_t) {
    __syncwarp();
    for (int i = 0; i < 256; ++i) f.x[i] = from[(i / 16) * stride + i % 16];
}

template <typename U>
void store_matrix_sync(float* to, const fragment<U, 16, 16, 16, float>& f, unsigned stride, layout_t) {
    __syncwarp();
    for (int i = 0; i < 256; ++i) to[(i / 16) * stride + i % 16] = f.x[i];
}

template <typename F>
void fill_fragment(F& f, float value) {
    std::fill(f.x, f.x + 256, value);
}

template <typename A, typename B, typename C>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) {
            float sum = c.x[16 * i + j];
            for (int k = 0; k < 16; ++k) sum += a.x[16 * i + k] * b.x[16 * k + j];
            d.x[16 * i + j] = sum;
        }
}
}  // namespace nvcuda::wmma
