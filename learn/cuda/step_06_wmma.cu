// Step 6: tensor cores through nvcuda::wmma: one instruction multiplies two 16 x 16 tiles.
//
// On an H200 the tensor cores multiply 15 times faster than the ordinary units. wmma hides which lane holds which element
// of a tile, so nothing can be done with single rows in registers: the scores go to shared memory for the softmax, the
// probabilities come back from there, and so does the output, to be rescaled. That traffic is now the price.
#include "ptx.cuh"
#ifndef FLASH_EMULATE
#include <mma.h>
#endif

namespace wmma = nvcuda::wmma;

constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kNThreads = 128;

constexpr int kWarpRows = 16;  // a warp owns 16 rows of Q
constexpr int kStride = kHeadDim + 8;
constexpr int kStrideS = kBlockN + 4, kStrideP = kBlockN + 8, kStrideO = kHeadDim + 4;

static_assert(kBlockM == kNThreads / 32 * kWarpRows, "kBlockM must be 16 rows for each of the kNThreads / 32 warps");
static_assert(kHeadDim % 16 == 0 && kBlockN % 16 == 0, "kHeadDim and kBlockN must be multiples of 16");

struct alignas(32) SharedMemory {
    half Q[kBlockM][kStride];
    half K[2][kBlockN][kStride];
    half V[2][kBlockN][kStride];
    float S[kBlockM][kStrideS];
    half P[kBlockM][kStrideP];
    float O[kBlockM][kStrideO];
};
static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");

using A = wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major>;
using B = wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::row_major>;
using Bt = wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major>;  // K read as K^T
using C = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

template <int Rows>
__device__ void load_tile(half (&tile)[Rows][kStride], const half* head, size_t stride, int first, int seqlen) {
    for (int i = threadIdx.x; i < Rows * kHeadDim / 8; i += kNThreads) {
        const int row = i / (kHeadDim / 8), d = i % (kHeadDim / 8) * 8;
        const bool valid = first + row < seqlen;
        cp_async_16(&tile[row][d], valid ? &head[(first + row) * stride + d] : head, valid);
    }
}

__global__ void __launch_bounds__(kNThreads) flash_attn_kernel(FlashArgs a) {
    DYNAMIC_SHARED(SharedMemory, smem);
    const int first_row = blockIdx.x * kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const half* q = static_cast<const half*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const half* k = static_cast<const half*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const half* v = static_cast<const half*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);

    // In the softmax two lanes share a row: each takes every second column.
    const int row0 = threadIdx.x / 32 * kWarpRows, row = row0 + threadIdx.x % 32 / 2, part = threadIdx.x % 2;
    float m = -INFINITY, l = 0.0f;
    for (int d = part; d < kHeadDim; d += 2) smem.O[row][d] = 0.0f;

    load_tile(smem.Q, q, stride, first_row, a.seqlen_q);
    load_tile(smem.K[0], k, stride, 0, a.seqlen_k);
    load_tile(smem.V[0], v, stride, 0, a.seqlen_k);
    cp_async_commit();
    for (int first_key = 0; first_key < a.seqlen_k; first_key += kBlockN) {
        const int stage = first_key / kBlockN % 2;
        const int next_key = first_key + kBlockN;
        if (next_key < a.seqlen_k) {
            load_tile(smem.K[stage ^ 1], k, stride, next_key, a.seqlen_k);
            load_tile(smem.V[stage ^ 1], v, stride, next_key, a.seqlen_k);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();

        for (int n = 0; n < kBlockN; n += 16) {
            C s;
            wmma::fill_fragment(s, 0.0f);
#pragma unroll
            for (int d = 0; d < kHeadDim; d += 16) {
                A query;
                Bt keys;
                wmma::load_matrix_sync(query, &smem.Q[row0][d], kStride);
                wmma::load_matrix_sync(keys, &smem.K[stage][n][d], kStride);
                wmma::mma_sync(s, query, keys, s);
            }
            wmma::store_matrix_sync(&smem.S[row0][n], s, kStrideS, wmma::mem_row_major);
        }
        __syncwarp();

        float m_new = m;
        for (int j = part; j < kBlockN; j += 2)
            if (first_key + j < a.seqlen_k) m_new = fmaxf(m_new, smem.S[row][j] * a.scale);
        m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, 1));
        float sum = 0.0f;
        for (int j = part; j < kBlockN; j += 2) {
            const float p = first_key + j < a.seqlen_k ? __expf(smem.S[row][j] * a.scale - m_new) : 0.0f;
            smem.P[row][j] = __float2half(p);
            sum += p;
        }
        const float alpha = __expf(m - m_new);
        l = alpha * l + sum + __shfl_xor_sync(0xffffffff, sum, 1);
        m = m_new;
        for (int d = part; d < kHeadDim; d += 2) smem.O[row][d] *= alpha;
        __syncwarp();

        for (int d = 0; d < kHeadDim; d += 16) {
            C o;
            wmma::load_matrix_sync(o, &smem.O[row0][d], kStrideO, wmma::mem_row_major);
#pragma unroll
            for (int n = 0; n < kBlockN; n += 16) {
                A p;
                B values;
                wmma::load_matrix_sync(p, &smem.P[row0][n], kStrideP);
                wmma::load_matrix_sync(values, &smem.V[stage][n][d], kStride);
                wmma::mma_sync(o, p, values, o);
            }
            wmma::store_matrix_sync(&smem.O[row0][d], o, kStrideO, wmma::mem_row_major);
        }
        __syncthreads();
    }
    __syncwarp();

    if (first_row + row >= a.seqlen_q) return;
    const float inverse = l > 0.0f ? 1.0f / l : 0.0f;
    half* out = static_cast<half*>(a.out) + offset_of(a, a.seqlen_q, b, first_row + row, h);
    for (int d = part; d < kHeadDim; d += 2) out[d] = __float2half(smem.O[row][d] * inverse);
    if (part == 0) lse_of(a, b, h)[first_row + row] = l > 0.0f ? m + logf(l) : -INFINITY;
}

static void forward(const FlashArgs& a) {
    const dim3 grid(ceil_div(a.seqlen_q, kBlockM), a.heads, a.batch);
    launch(flash_attn_kernel, grid, kNThreads, sizeof(SharedMemory), a.stream, a);
}

static const FlashStep kStep = {"tensor cores by wmma", kHeadDim, kFp16, false, false};
FLASH_STEP(kStep, forward, nullptr)
