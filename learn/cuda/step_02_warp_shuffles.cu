// Step 2: a tile of scores per thread, in registers; warp shuffles for the maximum and the sum of a row.
//
// The minimal kernel reads two numbers from shared memory for every multiplication. Here a thread computes 4 x 8 scores
// at once, so that 4 + 8 reads feed 32 multiplications. A row then lies in the registers of 8 neighbouring lanes, which
// agree on its maximum and sum by __shfl_xor_sync, without shared memory and without waiting for other warps.
#include "common.cuh"

constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kNThreads = 128;

constexpr int kLanes = 8;  // lanes that share a row
constexpr int kRows = kBlockM / (kNThreads / kLanes);  // rows of a thread
constexpr int kCols = kBlockN / kLanes;  // keys of a thread, kLanes apart
constexpr int kDims = kHeadDim / kLanes;  // columns of the output of a thread, kLanes apart

static_assert(kHeadDim % kLanes == 0, "kHeadDim must be a multiple of 8");

struct SharedMemory {
    half Q[kBlockM][kHeadDim];
    half K[kBlockN][kHeadDim];
    half V[kBlockN][kHeadDim];
    float P[kBlockM][kBlockN];
};
static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");

template <int Rows>
__device__ void load_tile(half (&tile)[Rows][kHeadDim], const half* head, size_t stride, int first, int seqlen) {
    for (int i = threadIdx.x; i < Rows * kHeadDim; i += kNThreads) {
        const int row = i / kHeadDim, d = i % kHeadDim;
        tile[row][d] = first + row < seqlen ? head[(first + row) * stride + d] : __float2half(0.0f);
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
    float o[kRows][kDims] = {}, m[kRows], l[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) m[r] = -INFINITY;

    load_tile(smem.Q, q, stride, first_row, a.seqlen_q);
    for (int first_key = 0; first_key < a.seqlen_k; first_key += kBlockN) {
        __syncthreads();
        load_tile(smem.K, k, stride, first_key, a.seqlen_k);
        load_tile(smem.V, v, stride, first_key, a.seqlen_k);
        __syncthreads();

        float s[kRows][kCols] = {};
        for (int d = 0; d < kHeadDim; ++d) {
            float key[kCols];
#pragma unroll
            for (int c = 0; c < kCols; ++c) key[c] = __half2float(smem.K[lane + c * kLanes][d]);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float query = __half2float(smem.Q[row0 + r][d]);
#pragma unroll
                for (int c = 0; c < kCols; ++c) s[r][c] += query * key[c];
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
            for (int i = 0; i < kDims; ++i) o[r][i] *= alpha;
        }
        __syncwarp();  // the rows of P are written and read by the same warp

        for (int j = 0; j < kBlockN; ++j) {
            float value[kDims];
#pragma unroll
            for (int i = 0; i < kDims; ++i) value[i] = __half2float(smem.V[j][lane + i * kLanes]);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float p = smem.P[row0 + r][j];
#pragma unroll
                for (int i = 0; i < kDims; ++i) o[r][i] += p * value[i];
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
        for (int i = 0; i < kDims; ++i) out[lane + i * kLanes] = __float2half(o[r][i] * inverse);
        if (lane == 0) lse_of(a, b, h)[row] = l[r] > 0.0f ? m[r] + logf(l[r]) : -INFINITY;
    }
}

static void forward(const FlashArgs& a) {
    const dim3 grid(ceil_div(a.seqlen_q, kBlockM), a.heads, a.batch);
    launch(flash_attn_kernel, grid, kNThreads, sizeof(SharedMemory), a.stream, a);
}

static const FlashStep kStep = {"register tiles, warp shuffles", kHeadDim, kFp16, false, false};
FLASH_STEP(kStep, forward, nullptr)
