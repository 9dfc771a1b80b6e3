// Step 9: two tiles of 16 rows a warp, and copies hidden behind one product each.
//
// In step 8 every matrix of K and V that a warp reads from shared memory feeds one product. A warp with 32 rows uses it
// twice, which halves that traffic, the narrowest place of step 8. The two buffers of K and V shrink to one each: V_j
// travels during Q K_j^T, K_{j+1} during the softmax and P V_j. The memory saved lets two or three blocks share a
// multiprocessor, so that the tensor cores work for one block while another is at its softmax. Up to 64 columns Q stays in
// registers, which spares its reads as well.
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

__global__ void __launch_bounds__(kNThreads) flash_attn_kernel(FlashArgs a) {
    DYNAMIC_SHARED(SharedMemory, smem);
    const int first_row = blockIdx.x * kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const half* q = static_cast<const half*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const half* k = static_cast<const half*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const half* v = static_cast<const half*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);
    half* out = static_cast<half*>(a.out) + offset_of(a, a.seqlen_q, b, 0, h);

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
    for (int first_key = 0; first_key < a.seqlen_k; first_key += kBlockN) {
        cp_async_wait<0>();
        __syncthreads();  // K_j is here, and everybody has finished with V_{j-1}
        load_rows<kBlockN, kHeadDim, kNThreads>(smem.V, v, stride, first_key, a.seqlen_k);
        cp_async_commit();

        float s[kTiles][kBlockN / 8][4];
        multiply_transposed<half, kHeadDim>(s, queries, smem.K);

        cp_async_wait<0>();
        __syncthreads();  // V_j is here, and everybody has finished with K_j
        const int next_key = first_key + kBlockN;
        if (next_key < a.seqlen_k) load_rows<kBlockN, kHeadDim, kNThreads>(smem.K, k, stride, next_key, a.seqlen_k);
        cp_async_commit();

        if (next_key > a.seqlen_k) hide_keys(s, first_key, [&](int) { return a.seqlen_k; });
        softmax.update(s, o, a.scale * kLog2e);
        multiply_add<half, kHeadDim>(o, s, smem.V);
    }
    softmax.finish(o, lse_of(a, b, h), first_row + row0, a.seqlen_q, a.scale);
    store_rows<half, kHeadDim>(o, my_rows, out, stride, first_row + row0, a.seqlen_q);
}

static void forward(const FlashArgs& a) {
    const dim3 grid(ceil_div(a.seqlen_q, kBlockM), a.heads, a.batch);
    launch(flash_attn_kernel, grid, kNThreads, sizeof(SharedMemory), a.stream, a);
}

static const FlashStep kStep = {"32 rows a warp, one buffer each for K and V", kHeadDim, kFp16, false, false};
FLASH_STEP(kStep, forward, nullptr)
