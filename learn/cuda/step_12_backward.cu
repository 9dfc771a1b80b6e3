// Step 12: the backward, from q, k, v, out, lse and dout, recomputing P tile by tile.
//
// With P = exp(scale * Q K^T - lse) the gradients are
//
//   dV = P^T dO       dP = dO V^T       dS = P * (dP - delta), delta = rowsum(dO * O)
//   dQ = scale * dS K                   dK = scale * dS^T Q
//
// dK and dV are sums over queries, dQ is a sum over keys. Here two kernels each own their sums and write them once, which
// gives the same bits in every run, for seven products in place of the five that one kernel with atomic additions to dQ
// needs. The kernel for dK and dV computes S^T = K Q^T and dP^T = V dO^T: what a lane then holds of P^T and dS^T is again
// the left operand of the next product, so P and dS never touch shared memory. With dropout P and dP are masked by the same
// function as in the forward; the sign of P remembers what was dropped.
#include "philox.cuh"
#include "tiles.cuh"

#define FLASH_PART
#include "step_11_dropout.cu"  // its forward

constexpr int kRows = 64;  // queries, or keys, of a block, 16 for each warp
constexpr int kCols = 64;  // keys, or queries, of a tile

// delta of one row by one warp.
__global__ void __launch_bounds__(kNThreads) delta_kernel(FlashArgs a) {
    const int row = blockIdx.x * (kNThreads / kWarp) + threadIdx.x / kWarp, h = blockIdx.y, b = blockIdx.z;
    if (row >= a.seqlen_q) return;
    const size_t start = offset_of(a, a.seqlen_q, b, row, h);
    const half *out = static_cast<const half*>(a.out) + start, *dout = static_cast<const half*>(a.dout) + start;
    float sum = 0.0f;
    for (int d = lane_id(); d < kHeadDim; d += kWarp) sum += __half2float(out[d]) * __half2float(dout[d]);
UNROLL
    for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
    if (lane_id() == 0) a.delta[(static_cast<size_t>(b) * a.heads + h) * a.seqlen_q + row] = sum;
}

struct alignas(128) BackwardMemory {
    half own[2][kRows * kHeadDim];       // K and V of the block's keys, or Q and dO of its queries
    half other[2][2][kCols * kHeadDim];  // stage; Q and dO, or K and V
    float lse[2][kCols], delta[2][kCols];
};
static_assert(sizeof(BackwardMemory) <= kMaxSharedBytes, "too much shared memory: make kRows or kCols smaller");

// lse in base 2; +inf for rows that do not exist or see no key, so that their P = exp2(s - inf) is 0.
__device__ __forceinline__ float lse_log2(const float* lse, int row, int seqlen) {
    const float x = row < seqlen ? lse[row] : -INFINITY;
    return x == -INFINITY ? INFINITY : x * kLog2e;
}

template <bool DROPOUT>
__global__ void __launch_bounds__(kNThreads) dkdv_kernel(FlashArgs a, Dropout dropout) {
    DYNAMIC_SHARED(BackwardMemory, smem);
    const int first_key = blockIdx.x * kRows, h = blockIdx.y, b = blockIdx.z, head = b * a.heads + h;
    const size_t stride = row_stride(a);
    const size_t q_start = offset_of(a, a.seqlen_q, b, 0, h), k_start = offset_of(a, a.seqlen_k, b, 0, h);
    const half *q = static_cast<const half*>(a.q) + q_start, *dout = static_cast<const half*>(a.dout) + q_start;
    const float *lse = lse_of(a, b, h), *delta = a.delta + static_cast<size_t>(head) * a.seqlen_q;

    const int row0 = threadIdx.x / kWarp * 16;
    half *my_keys = &smem.own[0][row0 * kHeadDim], *my_values = &smem.own[1][row0 * kHeadDim];
    const int offset = a.seqlen_k - a.seqlen_q;
    // Queries before first_key - offset see none of these keys.
    const int start = a.causal ? max(0, first_key - offset) / kCols * kCols : 0;

    const auto load = [&](int stage, int first) {
        load_rows<kCols, kHeadDim, kNThreads>(smem.other[stage][0], q, stride, first, a.seqlen_q);
        load_rows<kCols, kHeadDim, kNThreads>(smem.other[stage][1], dout, stride, first, a.seqlen_q);
        for (int i = threadIdx.x; i < kCols; i += kNThreads) {
            smem.lse[stage][i] = lse_log2(lse, first + i, a.seqlen_q);
            smem.delta[stage][i] = first + i < a.seqlen_q ? delta[first + i] : 0.0f;
        }
    };
    load_rows<kRows, kHeadDim, kNThreads>(smem.own[0], static_cast<const half*>(a.k) + k_start,
                                          stride, first_key, a.seqlen_k);
    load_rows<kRows, kHeadDim, kNThreads>(smem.own[1], static_cast<const half*>(a.v) + k_start,
                                          stride, first_key, a.seqlen_k);
    if (start < a.seqlen_q) load(0, start);
    cp_async_commit();

    float dk[1][kHeadDim / 8][4] = {}, dv[1][kHeadDim / 8][4] = {};
    int stage = 0;
    for (int first_row = start; first_row < a.seqlen_q; first_row += kCols, stage ^= 1) {
        if (first_row + kCols < a.seqlen_q) load(stage ^ 1, first_row + kCols);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();

        float p[1][kCols / 8][4];  // rows are keys, columns are queries
        multiply_transposed<half, kHeadDim>(p, SharedRows<half, kHeadDim, 1>{my_keys}, smem.other[stage][0]);
        const int key = first_key + row0 + lane_id() / 4;
UNROLL
        for (int n = 0; n < kCols / 8; ++n)
UNROLL
            for (int c = 0; c < 4; ++c) {
                const int col = n * 8 + lane_id() % 4 * 2 + c % 2;
                const bool hidden = a.causal && key + c / 2 * 8 > first_row + col + offset;
                p[0][n][c] = hidden ? 0.0f : fast_exp2(p[0][n][c] * (a.scale * kLog2e) - smem.lse[stage][col]);
            }
        if (DROPOUT) dropout.mark_transposed(p, head, first_row, first_key + row0);

        float ds[1][kCols / 8][4];
UNROLL
        for (int n = 0; n < kCols / 8; ++n)
UNROLL
            for (int c = 0; c < 4; ++c) ds[0][n][c] = fmaxf(p[0][n][c], 0.0f);
        multiply_add<half, kHeadDim>(dv, ds, smem.other[stage][1]);

        multiply_transposed<half, kHeadDim>(ds, SharedRows<half, kHeadDim, 1>{my_values}, smem.other[stage][1]);
UNROLL
        for (int n = 0; n < kCols / 8; ++n)
UNROLL
            for (int c = 0; c < 4; ++c) {
                const float dp = DROPOUT ? (p[0][n][c] > 0.0f ? ds[0][n][c] / dropout.keep : 0.0f) : ds[0][n][c];
                ds[0][n][c] = fabsf(p[0][n][c]) * (dp - smem.delta[stage][n * 8 + lane_id() % 4 * 2 + c % 2]);
            }
        multiply_add<half, kHeadDim>(dk, ds, smem.other[stage][0]);
        __syncthreads();
    }
    cp_async_wait<0>();
    __syncthreads();
UNROLL
    for (int d = 0; d < kHeadDim / 8; ++d)
UNROLL
        for (int c = 0; c < 4; ++c) {
            dk[0][d][c] *= a.scale;
            dv[0][d][c] *= 1.0f / dropout.keep;
        }
    store_rows<half, kHeadDim>(dk, my_keys, static_cast<half*>(a.dk) + k_start, stride, first_key + row0, a.seqlen_k);
    store_rows<half, kHeadDim>(dv, my_values, static_cast<half*>(a.dv) + k_start, stride, first_key + row0, a.seqlen_k);
}

template <bool DROPOUT>
__global__ void __launch_bounds__(kNThreads) dq_kernel(FlashArgs a, Dropout dropout) {
    DYNAMIC_SHARED(BackwardMemory, smem);
    const int tile = a.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const int first_row = tile * kRows, h = blockIdx.y, b = blockIdx.z, head = b * a.heads + h;
    const size_t stride = row_stride(a);
    const size_t q_start = offset_of(a, a.seqlen_q, b, 0, h), k_start = offset_of(a, a.seqlen_k, b, 0, h);
    const half *k = static_cast<const half*>(a.k) + k_start, *v = static_cast<const half*>(a.v) + k_start;

    const int row0 = threadIdx.x / kWarp * 16;
    half *my_queries = &smem.own[0][row0 * kHeadDim], *my_douts = &smem.own[1][row0 * kHeadDim];
    const auto visible = [&](int row) {
        return a.causal ? min(a.seqlen_k, row + 1 + a.seqlen_k - a.seqlen_q) : a.seqlen_k;
    };
    const int end_key = visible(first_row + kRows - 1);

    const auto load = [&](int stage, int first) {
        load_rows<kCols, kHeadDim, kNThreads>(smem.other[stage][0], k, stride, first, a.seqlen_k);
        load_rows<kCols, kHeadDim, kNThreads>(smem.other[stage][1], v, stride, first, a.seqlen_k);
    };
    load_rows<kRows, kHeadDim, kNThreads>(smem.own[0], static_cast<const half*>(a.q) + q_start,
                                          stride, first_row, a.seqlen_q);
    load_rows<kRows, kHeadDim, kNThreads>(smem.own[1], static_cast<const half*>(a.dout) + q_start,
                                          stride, first_row, a.seqlen_q);
    if (end_key > 0) load(0, 0);
    cp_async_commit();

    float lse[2], delta[2];
UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + row0 + lane_id() / 4 + 8 * r;
        lse[r] = lse_log2(lse_of(a, b, h), row, a.seqlen_q);
        delta[r] = row < a.seqlen_q ? a.delta[static_cast<size_t>(head) * a.seqlen_q + row] : 0.0f;
    }

    float dq[1][kHeadDim / 8][4] = {};
    int stage = 0;
    for (int first_key = 0; first_key < end_key; first_key += kCols, stage ^= 1) {
        if (first_key + kCols < end_key) load(stage ^ 1, first_key + kCols);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();

        float p[1][kCols / 8][4], ds[1][kCols / 8][4];
        multiply_transposed<half, kHeadDim>(p, SharedRows<half, kHeadDim, 1>{my_queries}, smem.other[stage][0]);
        if (first_key + kCols > visible(first_row + row0))
            hide_keys(p, first_key, [&](int row) { return visible(first_row + row0 + row); });
        multiply_transposed<half, kHeadDim>(ds, SharedRows<half, kHeadDim, 1>{my_douts}, smem.other[stage][1]);
        if (DROPOUT) dropout.apply(ds, head, first_row + row0, first_key);
UNROLL
        for (int n = 0; n < kCols / 8; ++n)
UNROLL
            for (int c = 0; c < 4; ++c) {
                const float probability = fast_exp2(p[0][n][c] * (a.scale * kLog2e) - lse[c / 2]);
                ds[0][n][c] = probability * (ds[0][n][c] * (1.0f / dropout.keep) - delta[c / 2]);
            }
        multiply_add<half, kHeadDim>(dq, ds, smem.other[stage][0]);
        __syncthreads();
    }
    cp_async_wait<0>();
    __syncthreads();
UNROLL
    for (int d = 0; d < kHeadDim / 8; ++d)
UNROLL
        for (int c = 0; c < 4; ++c) dq[0][d][c] *= a.scale;
    store_rows<half, kHeadDim>(dq, my_queries, static_cast<half*>(a.dq) + q_start, stride, first_row + row0, a.seqlen_q);
}

static void backward(const FlashArgs& a) {
    launch(delta_kernel, dim3(ceil_div(a.seqlen_q, kNThreads / kWarp), a.heads, a.batch), kNThreads, 0, a.stream, a);
    const bool drop = a.dropout_p > 0;
    launch(drop ? dkdv_kernel<true> : dkdv_kernel<false>, dim3(ceil_div(a.seqlen_k, kRows), a.heads, a.batch), kNThreads,
           sizeof(BackwardMemory), a.stream, a, Dropout(a));
    launch(drop ? dq_kernel<true> : dq_kernel<false>, dim3(ceil_div(a.seqlen_q, kRows), a.heads, a.batch), kNThreads,
           sizeof(BackwardMemory), a.stream, a, Dropout(a));
}

static const FlashStep kBackwardStep = {"backward by recomputation", kHeadDim, kFp16, true, true};
FLASH_STEP(kBackwardStep, forward, backward)
