// What every step shares: the C interface, the checks of the arguments, the launch. No attention in here.
//
// Tensors are (batch, seqlen, heads, head_dim), contiguous, as in flash_attn_func; lse is (batch, heads, seqlen_q), fp32,
// natural logarithm. Every step is built into one shared library with the functions at the end of this file, so that
// one driver (test_flash_attn.cu) and one Python module (ladder.py) test and time them all.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>

#ifdef FLASH_EMULATE
#include "emulator.h"  // the same source on a CPU, thread by thread: slow, needs no GPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DYNAMIC_SHARED(Type, name)                                    \
    extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
    Type& name = *reinterpret_cast<Type*>(dynamic_shared)
#endif

#ifndef HEAD_DIM
#define HEAD_DIM 64  // make HEAD_DIM=128
#endif

using half = __half;
using bfloat16 = __nv_bfloat16;

constexpr float kLog2e = 1.4426950408889634f;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // the most any GPU gives one block (H100, B200); A100 163 KB, RTX 99 KB

enum DType : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };
enum : unsigned { kFp16 = 1u << kFloat16, kBf16 = 1u << kBFloat16, kFp32 = 1u << kFloat32 };

struct FlashArgs {
    const void *q, *k, *v;
    void* out;
    float* lse;
    const void* dout;  // from here to delta: only for the backward
    void *dq, *dk, *dv;
    float* delta;  // (batch, heads, seqlen_q): room for rowsum(dout * out)
    void* stream;
    long long seed, offset;  // of the dropout mask
    double dropout_p;
    int batch, heads, seqlen_q, seqlen_k, head_dim;
    int dtype;   // DType
    int causal;  // query i sees keys j <= i + seqlen_k - seqlen_q
    float scale;
};

struct FlashStep {
    const char* idea;
    int head_dim;     // the one it is built for; 0: any multiple of 8 up to 256
    unsigned dtypes;  // set of kFp16, kBf16, kFp32
    bool causal, dropout;
};

[[noreturn]] inline void fail(const char* format, ...) {
    char text[512];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof(text), format, list);
    va_end(list);
    throw std::runtime_error(text);
}

inline void check(const FlashArgs& a, const FlashStep& step) {
    if (a.batch < 0 || a.heads < 0 || a.seqlen_q < 0 || a.seqlen_k < 0 || a.batch > 65535 || a.heads > 65535)
        fail("sizes must be at least 0, batch and heads at most 65535; got batch %d, heads %d, seqlen_q %d, seqlen_k %d",
             a.batch, a.heads, a.seqlen_q, a.seqlen_k);
    if (step.head_dim && a.head_dim != step.head_dim)
        fail("head_dim is %d but kHeadDim is %d: build again with make HEAD_DIM=%d, or use step_13 (any head_dim)",
             a.head_dim, step.head_dim, a.head_dim);
    if (!step.head_dim && (a.head_dim < 8 || a.head_dim > 256 || a.head_dim % 8))
        fail("head_dim must be a multiple of 8 from 8 to 256, got %d", a.head_dim);
    if (a.dtype < 0 || a.dtype > 2 || !(step.dtypes >> a.dtype & 1))
        fail("this step has no kernel for %s: see step_13 (other types)",
             a.dtype == kFloat16 ? "fp16" : a.dtype == kBFloat16 ? "bf16" : a.dtype == kFloat32 ? "fp32" : "this dtype");
    if (!(a.scale > 0)) fail("scale must be positive, got %g", a.scale);
    if (a.causal && !step.causal) fail("this step has no causal mask: see step_10_causal.cu");
    if (!(a.dropout_p >= 0 && a.dropout_p < 1)) fail("dropout_p must be in [0, 1), got %g", a.dropout_p);
    if (a.dropout_p > 0 && !step.dropout) fail("this step has no dropout: see step_11_dropout.cu");
}

#ifndef FLASH_EMULATE
inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction)
        fail("%s: built for another GPU; this one is sm_%d%d: make clean, then make CUDA_ARCH=sm_%d%d", what, major, minor,
             major, minor);
    fail("%s: %s", what, cudaGetErrorString(status));
}

struct DeviceLimits {
    int multiprocessors;
    size_t shared_bytes;  // of one block
};

inline DeviceLimits device_limits() {
    int device = 0, multiprocessors = 0, shared_bytes = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory limit");
    return {multiprocessors, static_cast<size_t>(shared_bytes)};
}

// A block gets more than 48 KB of shared memory only when asked for by name, and never more than the GPU has.
template <typename... Params>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes, void* stream, const Params&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    const size_t limit = device_limits().shared_bytes;
    if (shared_bytes > limit)
        fail("too much shared memory: the tiles need %zu bytes, a block of this GPU gets %zu: make kBlockM or kBlockN smaller",
             shared_bytes, limit);
    if (shared_bytes > 48 * 1024)
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)),
                   "cudaFuncSetAttribute");
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
    check_cuda(cudaGetLastError(), "kernel launch");
}
#endif

// Offset of element (b, row, h, 0) in a tensor (batch, seqlen, heads, head_dim).
__device__ __forceinline__ size_t offset_of(const FlashArgs& a, int seqlen, int b, int row, int h) {
    return ((static_cast<size_t>(b) * seqlen + row) * a.heads + h) * a.head_dim;
}

// From one row to the next.
__device__ __forceinline__ size_t row_stride(const FlashArgs& a) { return static_cast<size_t>(a.heads) * a.head_dim; }

__device__ __forceinline__ float* lse_of(const FlashArgs& a, int b, int h) {
    return a.lse + (static_cast<size_t>(b) * a.heads + h) * a.seqlen_q;
}

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// 0, or the message of what went wrong; the text lives until the next call of the same thread.
template <typename Run>
const char* report(const FlashArgs* a, const FlashStep& step, Run run) {
    static thread_local std::string message;
    try {
        check(*a, step);
        run(*a);
        return nullptr;
    } catch (const std::exception& e) {
        message = e.what();
        return message.c_str();
    }
}

using FlashRun = void (*)(const FlashArgs&);

// Bits 0 to 2: the types; then causal, dropout, backward.
inline unsigned features(const FlashStep& step, FlashRun backward) {
    return step.dtypes | step.causal << 3 | step.dropout << 4 | (backward != nullptr) << 5;
}

// Ends every step: FLASH_STEP(description, forward, backward or nullptr).
#define FLASH_STEP(step, forward, backward)                                                        \
    extern "C" const char* flash_idea() { return step.idea; }                                      \
    extern "C" int flash_head_dim() { return step.head_dim; }                                      \
    extern "C" unsigned flash_can() { return features(step, backward); }                           \
    extern "C" const char* flash_forward(const FlashArgs* a) { return report(a, step, forward); }  \
    extern "C" const char* flash_backward(const FlashArgs* a) {                                    \
        const FlashRun run = backward;                                                             \
        return report(a, step, [run](const FlashArgs& b) {                                         \
            if (!run) fail("this step has no backward: see step_12_backward.cu");                  \
            run(b);                                                                                \
        });                                                                                        \
    }
