// Step 13: bf16 and fp32 beside fp16, and every head_dim that is a multiple of 8 up to 256.
//
// The constants become template parameters (forward.cuh) and one table picks the instance. A head_dim between two built
// sizes uses the next larger one; the columns beyond are zeros in shared memory and are never written. bf16 differs in the
// name of the instruction alone. fp32 does not use the tensor cores, whose tf32 keeps 10 bits of the fraction: its error
// would be that of fp16. It uses step 4's kernel in fp32, and its exponentials are exact to fp32.
#include "forward.cuh"

constexpr int kLanes = 8;  // lanes that share a row, as in step 2

template <int HeadDim>
struct Float32Tile {
    static constexpr int kBlockM = 64, kBlockN = 32, kNThreads = 128, kHeadDim = HeadDim;
    static constexpr int kRows = kBlockM / (kNThreads / kLanes), kCols = kBlockN / kLanes;
    struct alignas(16) SharedMemory {
        float Q[kBlockM][HeadDim + 4];
        float K[kBlockN][HeadDim + 4];
        float V[kBlockN][HeadDim + 4];
        float P[kBlockM][kBlockN + 4];
    };
};

template <typename Tile, int Rows>
__device__ __forceinline__ void load_floats(float (&tile)[Rows][Tile::kHeadDim + 4], const float* head, size_t stride,
                                            int first, int seqlen, int head_dim) {
    for (int i = threadIdx.x; i < Rows * Tile::kHeadDim / 4; i += Tile::kNThreads) {
        const int row = i / (Tile::kHeadDim / 4), d = i % (Tile::kHeadDim / 4) * 4;
        const bool valid = first + row < seqlen && d < head_dim;
        cp_async_16(&tile[row][d], valid ? &head[(first + row) * stride + d] : head, valid);
    }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kNThreads) float32_kernel(FlashArgs a) {
    DYNAMIC_SHARED(typename Tile::SharedMemory, smem);
    constexpr int kRows = Tile::kRows, kCols = Tile::kCols, kGroups = Tile::kHeadDim / (4 * kLanes);
    const int first_row = blockIdx.x * Tile::kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const float* q = static_cast<const float*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const float* k = static_cast<const float*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const float* v = static_cast<const float*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);

    const int lane = threadIdx.x % kLanes, row0 = threadIdx.x / kLanes * kRows;
    const auto visible = [&](int row) {
        return a.causal ? min(a.seqlen_k, row + 1 + a.seqlen_k - a.seqlen_q) : a.seqlen_k;
    };
    const int end_key = visible(first_row + Tile::kBlockM - 1);
    float o[kRows][kGroups][4] = {}, m[kRows], l[kRows] = {};
UNROLL
    for (int r = 0; r < kRows; ++r) m[r] = -INFINITY;

    load_floats<Tile>(smem.Q, q, stride, first_row, a.seqlen_q, a.head_dim);
    for (int first_key = 0; first_key < end_key; first_key += Tile::kBlockN) {
        __syncthreads();
        load_floats<Tile>(smem.K, k, stride, first_key, a.seqlen_k, a.head_dim);
        load_floats<Tile>(smem.V, v, stride, first_key, a.seqlen_k, a.head_dim);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();

        float s[kRows][kCols] = {};
        for (int d = 0; d < Tile::kHeadDim; d += 4)
UNROLL
            for (int c = 0; c < kCols; ++c) {
                const float4 key = reinterpret_cast<const float4&>(smem.K[lane + c * kLanes][d]);
UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const float4 query = reinterpret_cast<const float4&>(smem.Q[row0 + r][d]);
                    s[r][c] += query.x * key.x + query.y * key.y + query.z * key.z + query.w * key.w;
                }
            }

UNROLL
        for (int r = 0; r < kRows; ++r) {
            const int end = visible(first_row + row0 + r);
            float m_new = m[r], sum = 0.0f;
UNROLL
            for (int c = 0; c < kCols; ++c) {
                s[r][c] = first_key + lane + c * kLanes < end ? s[r][c] * a.scale : -INFINITY;
                m_new = fmaxf(m_new, s[r][c]);
            }
UNROLL
            for (int w = 1; w < kLanes; w *= 2) m_new = fmaxf(m_new, __shfl_xor_sync(0xffffffff, m_new, w));
            const float shift = m_new == -INFINITY ? 0.0f : m_new, alpha = expf(m[r] - shift);
UNROLL
            for (int c = 0; c < kCols; ++c) {
                const float p = expf(s[r][c] - shift);
                smem.P[row0 + r][lane + c * kLanes] = p;
                sum += p;
            }
UNROLL
            for (int w = 1; w < kLanes; w *= 2) sum += __shfl_xor_sync(0xffffffff, sum, w);
            l[r] = alpha * l[r] + sum;
            m[r] = m_new;
UNROLL
            for (int g = 0; g < kGroups; ++g)
UNROLL
                for (int i = 0; i < 4; ++i) o[r][g][i] *= alpha;
        }
        __syncwarp();

        for (int j = 0; j < Tile::kBlockN; ++j)
UNROLL
            for (int g = 0; g < kGroups; ++g) {
                const float4 value = reinterpret_cast<const float4&>(smem.V[j][g * 4 * kLanes + lane * 4]);
UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const float p = smem.P[row0 + r][j];
                    o[r][g][0] += p * value.x;
                    o[r][g][1] += p * value.y;
                    o[r][g][2] += p * value.z;
                    o[r][g][3] += p * value.w;
                }
            }
    }

UNROLL
    for (int r = 0; r < kRows; ++r) {
        const int row = first_row + row0 + r;
        if (row >= a.seqlen_q) break;
        const float inverse = l[r] > 0.0f ? 1.0f / l[r] : 0.0f;
        float* out = static_cast<float*>(a.out) + offset_of(a, a.seqlen_q, b, row, h);
UNROLL
        for (int g = 0; g < kGroups; ++g) {
            const int d = g * 4 * kLanes + lane * 4;
            if (d < a.head_dim)
                reinterpret_cast<float4&>(out[d]) = make_float4(o[r][g][0] * inverse, o[r][g][1] * inverse,
                                                                o[r][g][2] * inverse, o[r][g][3] * inverse);
        }
        if (lane == 0) lse_of(a, b, h)[row] = l[r] > 0.0f ? m[r] + logf(l[r]) : -INFINITY;
    }
}

template <int HeadDim>
void run_float32(const FlashArgs& a) {
    using Tile = Float32Tile<HeadDim>;
    using SharedMemory = typename Tile::SharedMemory;
    static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");
    launch(float32_kernel<Tile>, dim3(ceil_div(a.seqlen_q, Tile::kBlockM), a.heads, a.batch), Tile::kNThreads,
           sizeof(SharedMemory), a.stream, a);
}

// A warp holds 32 rows of the output up to 128 columns, 16 rows beyond: 128 registers a thread either way.
template <typename T>
FlashRun choose_16_bit(int head_dim) {
    if (head_dim <= 32) return run_forward<ForwardTile<T, 32, 128, 64, 128>, false>;
    if (head_dim <= 64) return run_forward<ForwardTile<T, 64, 128, 64, 128>, false>;
    if (head_dim <= 96) return run_forward<ForwardTile<T, 96, 128, 64, 128>, false>;
    if (head_dim <= 128) return run_forward<ForwardTile<T, 128, 128, 64, 128>, false>;
    if (head_dim <= 192) return run_forward<ForwardTile<T, 192, 128, 64, 256>, false>;
    return run_forward<ForwardTile<T, 256, 128, 64, 256>, false>;
}

static FlashRun choose_32_bit(int head_dim) {
    return head_dim <= 64 ? run_float32<64> : head_dim <= 128 ? run_float32<128> : run_float32<256>;
}

static void forward(const FlashArgs& a) {
    const FlashRun run = a.dtype == kFloat16    ? choose_16_bit<half>(a.head_dim)
                         : a.dtype == kBFloat16 ? choose_16_bit<bfloat16>(a.head_dim)
                                                : choose_32_bit(a.head_dim);
    run(a);
}

static const FlashStep kStep = {"fp16, bf16, fp32; head_dim 8 to 256", 0, kFp16 | kBf16 | kFp32, true, false};
FLASH_STEP(kStep, forward, nullptr)
