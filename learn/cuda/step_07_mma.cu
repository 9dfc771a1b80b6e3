// Step 7: tensor cores by mma.sync: we know which lane holds what, so scores and output stay in registers.
//
// Of a 16 x 8 tile of scores a lane holds rows g and g + 8 (g = lane / 4) at two neighbouring columns (ptx.cuh). So four
// lanes share a row: two shuffles give its maximum. And the lane that holds scores at columns 2t, 2t + 1 needs just those
// probabilities for P V: the result of one product is, packed to 16 bits, the left operand of the next. S, P and O never
// touch shared memory.
#include "ptx.cuh"

constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kNThreads = 128;

constexpr int kStride = kHeadDim + 8;  // padded as in step 4: the 8 rows of one matrix lie in different banks

static_assert(kBlockM == kNThreads / 32 * 16, "kBlockM must be 16 rows for each of the kNThreads / 32 warps");
static_assert(kHeadDim % 16 == 0 && kBlockN % 16 == 0, "kHeadDim and kBlockN must be multiples of 16");

struct alignas(16) SharedMemory {
    half Q[kBlockM][kStride];
    half K[2][kBlockN][kStride];
    half V[2][kBlockN][kStride];
};
static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");

template <int Rows>
__device__ void load_tile(half (&tile)[Rows][kStride], const half* head, size_t stride, int first, int seqlen) {
    for (int i = threadIdx.x; i < Rows * kHeadDim / 8; i += kNThreads) {
        const int row = i / (kHeadDim / 8), d = i % (kHeadDim / 8) * 8;
        const bool valid = first + row < seqlen;
        cp_async_16(&tile[row][d], valid ? &head[(first + row) * stride + d] : head, valid);
    }
}

__device__ __forceinline__ float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

__global__ void __launch_bounds__(kNThreads) flash_attn_kernel(FlashArgs a) {
    DYNAMIC_SHARED(SharedMemory, smem);
    const int first_row = blockIdx.x * kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const half* q = static_cast<const half*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const half* k = static_cast<const half*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const half* v = static_cast<const half*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);

    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16;
    float o[kHeadDim / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};  // of rows lane / 4 and lane / 4 + 8

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

        // S = Q K^T. K lies in memory as the columns of K^T, which is what the right operand wants.
        float s[kBlockN / 8][4] = {};
#pragma unroll
        for (int d = 0; d < kHeadDim; d += 16) {
            uint32_t query[4];
            ldmatrix_x4(query, &smem.Q[row0 + lane % 16][d + lane / 16 * 8]);
#pragma unroll
            for (int n = 0; n < kBlockN; n += 16) {
                uint32_t keys[4];  // 16 keys: two right operands
                ldmatrix_x4(keys, &smem.K[stage][n + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]);
                mma_16x8x16<half>(s[n / 8], query, keys[0], keys[1]);
                mma_16x8x16<half>(s[n / 8 + 1], query, keys[2], keys[3]);
            }
        }

#pragma unroll
        for (int i = 0; i < 2; ++i) {  // rows g and g + 8
            float m_new = m[i];
#pragma unroll
            for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& x = s[n][2 * i + c];
                    x = first_key + n * 8 + lane % 4 * 2 + c < a.seqlen_k ? x * a.scale : -INFINITY;
                    m_new = fmaxf(m_new, x);
                }
            m_new = max_of_row(m_new);
            const float alpha = __expf(m[i] - m_new);
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < kBlockN / 8; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    float& x = s[n][2 * i + c];
                    x = __expf(x - m_new);
                    sum += x;
                }
            l[i] = alpha * l[i] + sum_of_row(sum);
            m[i] = m_new;
#pragma unroll
            for (int d = 0; d < kHeadDim / 8; ++d) {
                o[d][2 * i] *= alpha;
                o[d][2 * i + 1] *= alpha;
            }
        }

        // O += P V. V lies in memory row by row, so its matrices are transposed on the way.
#pragma unroll
        for (int n = 0; n < kBlockN; n += 16) {
            const float(&left)[4] = s[n / 8], (&right)[4] = s[n / 8 + 1];
            const uint32_t p[4] = {pack<half>(left[0], left[1]), pack<half>(left[2], left[3]),
                                   pack<half>(right[0], right[1]), pack<half>(right[2], right[3])};
#pragma unroll
            for (int d = 0; d < kHeadDim; d += 16) {
                uint32_t values[4];
                ldmatrix_x4_trans(values, &smem.V[stage][n + lane % 16][d + lane / 16 * 8]);
                mma_16x8x16<half>(o[d / 8], p, values[0], values[1]);
                mma_16x8x16<half>(o[d / 8 + 1], p, values[2], values[3]);
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first_row + row0 + lane / 4 + 8 * i;
        if (row >= a.seqlen_q) continue;
        const float inverse = l[i] > 0.0f ? 1.0f / l[i] : 0.0f;
        half* out = static_cast<half*>(a.out) + offset_of(a, a.seqlen_q, b, row, h);
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d)
            reinterpret_cast<uint32_t&>(out[d * 8 + lane % 4 * 2]) =
                pack<half>(o[d][2 * i] * inverse, o[d][2 * i + 1] * inverse);
        if (lane % 4 == 0) lse_of(a, b, h)[row] = l[i] > 0.0f ? m[i] + logf(l[i]) : -INFINITY;
    }
}

static void forward(const FlashArgs& a) {
    const dim3 grid(ceil_div(a.seqlen_q, kBlockM), a.heads, a.batch);
    launch(flash_attn_kernel, grid, kNThreads, sizeof(SharedMemory), a.stream, a);
}

static const FlashStep kStep = {"tensor cores by mma.sync, all in registers", kHeadDim, kFp16, false, false};
FLASH_STEP(kStep, forward, nullptr)
