// Step 8: a swizzled layout in place of padding, and the scale folded into the exponent.
//
// Padding keeps 8 rows of a column in different banks at the price of memory. Exclusive or of the chunk number with the row
// number does the same for nothing (swizzled() in tiles.cuh), and rows stay powers of two. This step is step 7 written with
// the functions of tiles.cuh, which the later steps share. The exponential becomes 2^x of one multiply-add, and the four
// lanes of a row add up their sums once at the end.
#include "tiles.cuh"

constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kNThreads = 128;

static_assert(kBlockM == kNThreads / 32 * 16, "kBlockM must be 16 rows for each of the kNThreads / 32 warps");

struct alignas(128) SharedMemory {
    half Q[kBlockM * kHeadDim];
    half K[2][kBlockN * kHeadDim];
    half V[2][kBlockN * kHeadDim];
};
static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");

__global__ void __launch_bounds__(kNThreads) flash_attn_kernel(FlashArgs a) {
    DYNAMIC_SHARED(SharedMemory, smem);
    const int first_row = blockIdx.x * kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const half* q = static_cast<const half*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const half* k = static_cast<const half*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const half* v = static_cast<const half*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);
    half* out = static_cast<half*>(a.out) + offset_of(a, a.seqlen_q, b, 0, h);

    const int row0 = threadIdx.x / kWarp * 16;  // first row of this warp
    half* my_rows = &smem.Q[row0 * kHeadDim];
    const SharedRows<half, kHeadDim, 1> queries{my_rows};
    float o[1][kHeadDim / 8][4] = {};
    Softmax<1> softmax;

    load_rows<kBlockM, kHeadDim, kNThreads>(smem.Q, q, stride, first_row, a.seqlen_q);
    load_rows<kBlockN, kHeadDim, kNThreads>(smem.K[0], k, stride, 0, a.seqlen_k);
    load_rows<kBlockN, kHeadDim, kNThreads>(smem.V[0], v, stride, 0, a.seqlen_k);
    cp_async_commit();
    for (int first_key = 0; first_key < a.seqlen_k; first_key += kBlockN) {
        const int stage = first_key / kBlockN % 2;
        const int next_key = first_key + kBlockN;
        if (next_key < a.seqlen_k) {
            load_rows<kBlockN, kHeadDim, kNThreads>(smem.K[stage ^ 1], k, stride, next_key, a.seqlen_k);
            load_rows<kBlockN, kHeadDim, kNThreads>(smem.V[stage ^ 1], v, stride, next_key, a.seqlen_k);
        }
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();

        float s[1][kBlockN / 8][4];
        multiply_transposed<half, kHeadDim>(s, queries, smem.K[stage]);
        if (next_key > a.seqlen_k) hide_keys(s, first_key, [&](int) { return a.seqlen_k; });  // only the last tile
        softmax.update(s, o, a.scale * kLog2e);
        multiply_add<half, kHeadDim>(o, s, smem.V[stage]);
        __syncthreads();
    }
    cp_async_wait<0>();  // with no key at all nobody has waited for the copy of Q, and its memory is used again below
    __syncthreads();
    softmax.finish(o, lse_of(a, b, h), first_row + row0, a.seqlen_q, a.scale);
    store_rows<half, kHeadDim>(o, my_rows, out, stride, first_row + row0, a.seqlen_q);
}

static void forward(const FlashArgs& a) {
    const dim3 grid(ceil_div(a.seqlen_q, kBlockM), a.heads, a.batch);
    launch(flash_attn_kernel, grid, kNThreads, sizeof(SharedMemory), a.stream, a);
}

static const FlashStep kStep = {"swizzled layout, folded scale", kHeadDim, kFp16, false, false};
FLASH_STEP(kStep, forward, nullptr)
