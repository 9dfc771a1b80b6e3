// Step 4: 16 bytes at a time, from device memory and from shared memory.
//
// A load instruction costs about the same whether it brings 2 bytes a lane or 16. Step 3 brings 2. With 8 numbers a load
// there are 8 times fewer instructions, and a warp asks device memory for 512 bytes in a row. The padding grows to 16
// bytes: every row must start on a multiple of 16, and 16-byte reads are served 8 lanes at a time.
#include "common.cuh"

constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kNThreads = 128;
constexpr int kStride = kHeadDim + 8;  // of a row of Q, K, V in shared memory: an odd number of 16-byte words
constexpr int kStrideP = kBlockN + 4;  // of a row of P, the same

constexpr int kLanes = 8;  // lanes that share a row
constexpr int kRows = kBlockM / (kNThreads / kLanes);  // rows of a thread
constexpr int kCols = kBlockN / kLanes;  // keys of a thread, kLanes apart
constexpr int kGroups = kHeadDim / 64;  // groups of 8 neighbouring columns of the output of a thread, 64 apart

static_assert(kHeadDim % 64 == 0, "kHeadDim must be a multiple of 64: 8 lanes take 8 columns each");

struct alignas(16) SharedMemory {
    half Q[kBlockM][kStride];
    half K[kBlockN][kStride];
    half V[kBlockN][kStride];
    float P[kBlockM][kStrideP];
};
static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");

template <int Rows>
__device__ void load_tile(half (&tile)[Rows][kStride], const half* head, size_t stride, int first, int seqlen) {
    for (int i = threadIdx.x; i < Rows * kHeadDim / 8; i += kNThreads) {
        const int row = i / (kHeadDim / 8), d = i % (kHeadDim / 8) * 8;
        const uint4 zero = {0, 0, 0, 0};
        reinterpret_cast<uint4&>(tile[row][d]) =
            first + row < seqlen ? reinterpret_cast<const uint4&>(head[(first + row) * stride + d]) : zero;
    }
}

// Eight numbers by one 16-byte read.
__device__ __forceinline__ void load_8(float (&x)[8], const half* from) {
    const uint4 words = reinterpret_cast<const uint4&>(*from);
    const __half2* pairs = reinterpret_cast<const __half2*>(&words);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = __half22float2(pairs[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

// Butterfly: after exchanges at distance 1, 2 and 4 all 8 lanes hold the result.
__device__ __forceinline__ float max_of_lanes(float x) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, distance));
    return x;
}

__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) x += __shfl_xor_sync(0xffffffff, x, distance);
    return x;
}

__global__ void __launch_bounds__(kNThreads) flash_attn_kernel(FlashArgs a) {
    DYNAMIC_SHARED(SharedMemory, smem);
    const int first_row = blockIdx.x * kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const half* q = static_cast<const half*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const half* k = static_cast<const half*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const half* v = static_cast<const half*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);

    const int lane = threadIdx.x % kLanes, row0 = threadIdx.x / kLanes * kRows;
    float o[kRows][kGroups][8] = {}, m[kRows], l[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) m[r] = -INFINITY;

    load_tile(smem.Q, q, stride, first_row, a.seqlen_q);
    for (int first_key = 0; first_key < a.seqlen_k; first_key += kBlockN) {
        __syncthreads();
        load_tile(smem.K, k, stride, first_key, a.seqlen_k);
        load_tile(smem.V, v, stride, first_key, a.seqlen_k);
        __syncthreads();

        float s[kRows][kCols] = {};
        for (int d = 0; d < kHeadDim; d += 8) {
            float query[kRows][8];
#pragma unroll
            for (int r = 0; r < kRows; ++r) load_8(query[r], &smem.Q[row0 + r][d]);
#pragma unroll
            for (int c = 0; c < kCols; ++c) {
                float key[8];
                load_8(key, &smem.K[lane + c * kLanes][d]);
#pragma unroll
                for (int r = 0; r < kRows; ++r)
#pragma unroll
                    for (int i = 0; i < 8; ++i) s[r][c] += query[r][i] * key[i];
            }
        }

#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float m_new = m[r];
#pragma unroll
            for (int c = 0; c < kCols; ++c) {
                s[r][c] = first_key + lane + c * kLanes < a.seqlen_k ? s[r][c] * a.scale : -INFINITY;
                m_new = fmaxf(m_new, s[r][c]);
            }
            m_new = max_of_lanes(m_new);
            float sum = 0.0f;
#pragma unroll
            for (int c = 0; c < kCols; ++c) {
                const float p = __expf(s[r][c] - m_new);
                smem.P[row0 + r][lane + c * kLanes] = p;
                sum += p;
            }
            const float alpha = __expf(m[r] - m_new);
            l[r] = alpha * l[r] + sum_of_lanes(sum);
            m[r] = m_new;
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
#pragma unroll
                for (int i = 0; i < 8; ++i) o[r][g][i] *= alpha;
        }
        __syncwarp();  // the rows of P are written and read by the same warp

        for (int j = 0; j < kBlockN; j += 4) {
            float4 p[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) p[r] = reinterpret_cast<const float4&>(smem.P[row0 + r][j]);
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int g = 0; g < kGroups; ++g) {
                    float value[8];
                    load_8(value, &smem.V[j + n][g * 64 + lane * 8]);
#pragma unroll
                    for (int r = 0; r < kRows; ++r)
#pragma unroll
                        for (int i = 0; i < 8; ++i) o[r][g][i] += reinterpret_cast<const float*>(&p[r])[n] * value[i];
                }
        }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int row = first_row + row0 + r;
        if (row >= a.seqlen_q) break;
        const float inverse = l[r] > 0.0f ? 1.0f / l[r] : 0.0f;
        half* out = static_cast<half*>(a.out) + offset_of(a, a.seqlen_q, b, row, h);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            uint4 words;
            __half2* pairs = reinterpret_cast<__half2*>(&words);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                pairs[i] = __floats2half2_rn(o[r][g][2 * i] * inverse, o[r][g][2 * i + 1] * inverse);
            reinterpret_cast<uint4&>(out[g * 64 + lane * 8]) = words;
        }
        if (lane == 0) lse_of(a, b, h)[row] = l[r] > 0.0f ? m[r] + logf(l[r]) : -INFINITY;
    }
}

static void forward(const FlashArgs& a) {
    const dim3 grid(ceil_div(a.seqlen_q, kBlockM), a.heads, a.batch);
    launch(flash_attn_kernel, grid, kNThreads, sizeof(SharedMemory), a.stream, a);
}

static const FlashStep kStep = {"16-byte loads", kHeadDim, kFp16, false, false};
FLASH_STEP(kStep, forward, nullptr)
