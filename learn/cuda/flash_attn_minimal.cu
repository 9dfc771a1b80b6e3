// Step 1: flash attention in one page: tiles, shared memory, online softmax, one kernel. Start here.
//
//   O = softmax(scale * Q K^T) V,   without ever storing the score matrix in device memory
//
// One block of threads owns kBlockM rows of Q (of one head of one sequence) and walks over the keys, kBlockN at a time:
//
//   m = -inf, l = 0, O = 0                      per row: maximum so far, sum so far, output so far (not yet divided)
//   for each tile (K_j, V_j):
//       S     = scale * Q K_j^T                 the scores of this tile, in shared memory
//       m_new = max(m, rowmax(S))
//       P     = exp(S - m_new)
//       alpha = exp(m - m_new)                  what was summed under the old maximum shrinks by this
//       l     = alpha * l + rowsum(P)
//       O     = alpha * O + P V_j
//       m     = m_new
//   O = O / l,  lse = m + log(l)                one division, at the end
//
// Nothing here is fast. The steps beside this file make it so, one idea at a time.
#include "common.cuh"

constexpr int kBlockM = 64;         // rows of Q per block
constexpr int kBlockN = 64;         // keys per tile
constexpr int kHeadDim = HEAD_DIM;  // length of one row of Q, K, V
constexpr int kNThreads = 128;      // threads per block

constexpr int kThreadsPerRow = kNThreads / kBlockM;

static_assert(kNThreads % kBlockM == 0, "kNThreads must be a multiple of kBlockM: whole threads share a row");
static_assert(kHeadDim % 8 == 0, "kHeadDim must be a multiple of 8");

struct SharedMemory {
    half Q[kBlockM][kHeadDim];
    half K[kBlockN][kHeadDim];
    half V[kBlockN][kHeadDim];
    float S[kBlockM][kBlockN];  // scores, then probabilities
    float m[kBlockM], l[kBlockM], alpha[kBlockM];
};
static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");

// Rows first ... first + Rows - 1 of one head to shared memory; zeros beyond the end, so that no garbage is multiplied.
template <int Rows>
__device__ void load_tile(half (&tile)[Rows][kHeadDim], const half* head, size_t stride, int first, int seqlen) {
    for (int i = threadIdx.x; i < Rows * kHeadDim; i += kNThreads) {
        const int row = i / kHeadDim, d = i % kHeadDim;
        tile[row][d] = first + row < seqlen ? head[(first + row) * stride + d] : __float2half(0.0f);
    }
}

__global__ void __launch_bounds__(kNThreads) flash_attn_kernel(FlashArgs a) {
    DYNAMIC_SHARED(SharedMemory, smem);
    const int first_row = blockIdx.x * kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const half* q = static_cast<const half*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const half* k = static_cast<const half*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const half* v = static_cast<const half*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);

    // Thread `tid` works on row tid / kThreadsPerRow, on every kThreadsPerRow-th column of it.
    const int tid = threadIdx.x;
    const int row = tid / kThreadsPerRow, part = tid % kThreadsPerRow;
    float o[kHeadDim / kThreadsPerRow] = {};  // its share of the output stays in registers, in fp32

    load_tile(smem.Q, q, stride, first_row, a.seqlen_q);
    if (tid < kBlockM) {
        smem.m[tid] = -INFINITY;
        smem.l[tid] = 0.0f;
    }

    for (int first_key = 0; first_key < a.seqlen_k; first_key += kBlockN) {
        __syncthreads();  // everybody has finished with the previous tile
        load_tile(smem.K, k, stride, first_key, a.seqlen_k);
        load_tile(smem.V, v, stride, first_key, a.seqlen_k);
        __syncthreads();

        // S = scale * Q K^T
        for (int j = part; j < kBlockN; j += kThreadsPerRow) {
            float sum = 0.0f;
            for (int d = 0; d < kHeadDim; ++d) sum += __half2float(smem.Q[row][d]) * __half2float(smem.K[j][d]);
            smem.S[row][j] = first_key + j < a.seqlen_k ? sum * a.scale : -INFINITY;
        }
        __syncthreads();

        // Online softmax, one thread a row. The first tile has at least one key, so m_new is finite.
        if (tid < kBlockM) {
            float m_new = smem.m[tid];
            for (int j = 0; j < kBlockN; ++j) m_new = fmaxf(m_new, smem.S[tid][j]);
            float sum = 0.0f;
            for (int j = 0; j < kBlockN; ++j) {
                const float p = expf(smem.S[tid][j] - m_new);
                smem.S[tid][j] = p;
                sum += p;
            }
            const float alpha = expf(smem.m[tid] - m_new);  // exp(-inf) = 0 on the first tile
            smem.l[tid] = alpha * smem.l[tid] + sum;
            smem.m[tid] = m_new;
            smem.alpha[tid] = alpha;
        }
        __syncthreads();

        // O = alpha * O + P V
        const float alpha = smem.alpha[row];
#pragma unroll  // an array lives in registers only if every index is known at compile time
        for (int i = 0; i < kHeadDim / kThreadsPerRow; ++i) {
            float sum = 0.0f;
            for (int j = 0; j < kBlockN; ++j) sum += smem.S[row][j] * __half2float(smem.V[j][part + i * kThreadsPerRow]);
            o[i] = alpha * o[i] + sum;
        }
    }
    __syncthreads();

    if (first_row + row >= a.seqlen_q) return;
    const float l = smem.l[row];
    const float inverse = l > 0.0f ? 1.0f / l : 0.0f;  // no key at all: the output is 0
    half* out = static_cast<half*>(a.out) + offset_of(a, a.seqlen_q, b, first_row + row, h);
#pragma unroll
    for (int i = 0; i < kHeadDim / kThreadsPerRow; ++i) out[part + i * kThreadsPerRow] = __float2half(o[i] * inverse);
    if (part == 0) lse_of(a, b, h)[first_row + row] = l > 0.0f ? smem.m[row] + logf(l) : -INFINITY;
}

static void forward(const FlashArgs& a) {
    const dim3 grid(ceil_div(a.seqlen_q, kBlockM), a.heads, a.batch);
    launch(flash_attn_kernel, grid, kNThreads, sizeof(SharedMemory), a.stream, a);
}

static const FlashStep kStep = {"tiles, online softmax, one kernel", kHeadDim, kFp16, false, false};
FLASH_STEP(kStep, forward, nullptr)
