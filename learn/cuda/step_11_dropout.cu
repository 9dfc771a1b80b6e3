// Step 11: dropout whose mask is a function of the position, so that it is never stored.
//
// Whether element (head, row, key) of P survives is computed from (seed, offset) and its position by Philox, a random
// number generator without state (philox.cuh). The backward, or another kernel with other tiles, computes the same mask
// again. Dropout acts on P after the softmax: the sum l, and lse, are those before it.
#include "philox.cuh"
#include "tiles.cuh"

constexpr int kBlockM = 128;
constexpr int kBlockN = 64;
constexpr int kHeadDim = HEAD_DIM;
constexpr int kNThreads = 128;

constexpr int kTiles = kBlockM / (kNThreads / 32) / 16;  // tiles of 16 rows a warp

static_assert(kBlockM == kNThreads / 32 * 16 * kTiles, "kBlockM must be a multiple of 16 rows for each warp");

struct alignas(128) SharedMemory {
    half Q[kBlockM * kHeadDim];
    half K[kBlockN * kHeadDim];
    half V[kBlockN * kHeadDim];
};
static_assert(sizeof(SharedMemory) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");

template <bool DROPOUT>
__global__ void __launch_bounds__(kNThreads) flash_attn_kernel(FlashArgs a, Dropout dropout) {
    DYNAMIC_SHARED(SharedMemory, smem);
    const int tile = a.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;  // the longest rows start first
    const int first_row = tile * kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const half* q = static_cast<const half*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const half* k = static_cast<const half*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const half* v = static_cast<const half*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);
    half* out = static_cast<half*>(a.out) + offset_of(a, a.seqlen_q, b, 0, h);

    // Row i sees the keys below visible(i). The block ends at the last key that its last row sees.
    const auto visible = [&](int row) {
        return a.causal ? min(a.seqlen_k, row + 1 + a.seqlen_k - a.seqlen_q) : a.seqlen_k;
    };
    const int end_key = visible(first_row + kBlockM - 1);

    const int row0 = threadIdx.x / kWarp * 16 * kTiles;
    half* my_rows = &smem.Q[row0 * kHeadDim];
    Rows<half, kHeadDim, kTiles> queries;
    float o[kTiles][kHeadDim / 8][4] = {};
    Softmax<kTiles> softmax;

    load_rows<kBlockM, kHeadDim, kNThreads>(smem.Q, q, stride, first_row, a.seqlen_q);
    load_rows<kBlockN, kHeadDim, kNThreads>(smem.K, k, stride, 0, a.seqlen_k);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    queries.load(my_rows);
    for (int first_key = 0; first_key < end_key; first_key += kBlockN) {
        cp_async_wait<0>();
        __syncthreads();  // K_j is here, and everybody has finished with V_{j-1}
        load_rows<kBlockN, kHeadDim, kNThreads>(smem.V, v, stride, first_key, a.seqlen_k);
        cp_async_commit();

        float s[kTiles][kBlockN / 8][4];
        multiply_transposed<half, kHeadDim>(s, queries, smem.K);

        cp_async_wait<0>();
        __syncthreads();  // V_j is here, and everybody has finished with K_j
        const int next_key = first_key + kBlockN;
        if (next_key < end_key) load_rows<kBlockN, kHeadDim, kNThreads>(smem.K, k, stride, next_key, a.seqlen_k);
        cp_async_commit();

        if (next_key > visible(first_row + row0))  // not on tiles that the first row, and so every row, sees whole
            hide_keys(s, first_key, [&](int row) { return visible(first_row + row0 + row); });
        softmax.update(s, o, a.scale * kLog2e);
        if (DROPOUT) dropout.apply(s, b * a.heads + h, first_row + row0, first_key);  // the sum stays that of all keys
        multiply_add<half, kHeadDim>(o, s, smem.V);
    }
    softmax.finish(o, lse_of(a, b, h), first_row + row0, a.seqlen_q, a.scale, dropout.keep);
    store_rows<half, kHeadDim>(o, my_rows, out, stride, first_row + row0, a.seqlen_q);
}

static void forward(const FlashArgs& a) {
    const dim3 grid(ceil_div(a.seqlen_q, kBlockM), a.heads, a.batch);
    const auto kernel = a.dropout_p > 0 ? flash_attn_kernel<true> : flash_attn_kernel<false>;
    launch(kernel, grid, kNThreads, sizeof(SharedMemory), a.stream, a, Dropout(a));
}

#ifndef FLASH_PART  // step 12 includes this file for its forward
static const FlashStep kStep = {"dropout by a counter", kHeadDim, kFp16, true, true};
FLASH_STEP(kStep, forward, nullptr)
#endif
