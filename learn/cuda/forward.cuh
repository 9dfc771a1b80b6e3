// The kernel of step 11 with its constants as template parameters: what steps 13 and 14 choose from.
#pragma once

#include "philox.cuh"
#include "tiles.cuh"

// kHeadDim is the length of a row in shared memory; head_dim may be less, the rest is zeros.
template <typename T, int HeadDim, int BlockM, int BlockN, int NThreads>
struct ForwardTile {
    using Type = T;
    static constexpr int kBlockM = BlockM, kBlockN = BlockN, kHeadDim = HeadDim, kNThreads = NThreads;
    static constexpr int kTiles = BlockM / (NThreads / kWarp) / 16;  // tiles of 16 rows a warp
    static_assert(BlockM == NThreads / kWarp * 16 * kTiles, "kBlockM must be a multiple of 16 rows for each warp");
};

template <typename Tile>
struct alignas(128) SharedMemory {
    typename Tile::Type Q[Tile::kBlockM * Tile::kHeadDim];
    typename Tile::Type K[Tile::kBlockN * Tile::kHeadDim];
    typename Tile::Type V[Tile::kBlockN * Tile::kHeadDim];
};

template <typename Tile, bool DROPOUT>
__global__ void __launch_bounds__(Tile::kNThreads) flash_attn_kernel(FlashArgs a, Dropout dropout) {
    using T = typename Tile::Type;
    constexpr int kBlockM = Tile::kBlockM, kBlockN = Tile::kBlockN, kHeadDim = Tile::kHeadDim, kNThreads = Tile::kNThreads;
    constexpr int kTiles = Tile::kTiles;
    DYNAMIC_SHARED(SharedMemory<Tile>, smem);
    const int tile = a.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;  // the longest rows start first
    const int first_row = tile * kBlockM, h = blockIdx.y, b = blockIdx.z;
    const size_t stride = row_stride(a);
    const T* q = static_cast<const T*>(a.q) + offset_of(a, a.seqlen_q, b, 0, h);
    const T* k = static_cast<const T*>(a.k) + offset_of(a, a.seqlen_k, b, 0, h);
    const T* v = static_cast<const T*>(a.v) + offset_of(a, a.seqlen_k, b, 0, h);
    T* out = static_cast<T*>(a.out) + offset_of(a, a.seqlen_q, b, 0, h);

    // Row i sees the keys below visible(i). The block ends at the last key that its last row sees.
    const auto visible = [&](int row) {
        return a.causal ? min(a.seqlen_k, row + 1 + a.seqlen_k - a.seqlen_q) : a.seqlen_k;
    };
    const int end_key = visible(first_row + kBlockM - 1);

    const int row0 = threadIdx.x / kWarp * 16 * kTiles;
    T* my_rows = &smem.Q[row0 * kHeadDim];
    Rows<T, kHeadDim, kTiles> queries;
    float o[kTiles][kHeadDim / 8][4] = {};
    Softmax<kTiles> softmax;

    load_rows<kBlockM, kHeadDim, kNThreads>(smem.Q, q, stride, first_row, a.seqlen_q, a.head_dim);
    load_rows<kBlockN, kHeadDim, kNThreads>(smem.K, k, stride, 0, a.seqlen_k, a.head_dim);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    queries.load(my_rows);
    for (int first_key = 0; first_key < end_key; first_key += kBlockN) {
        cp_async_wait<0>();
        __syncthreads();  // K_j is here, and everybody has finished with V_{j-1}
        load_rows<kBlockN, kHeadDim, kNThreads>(smem.V, v, stride, first_key, a.seqlen_k, a.head_dim);
        cp_async_commit();

        float s[kTiles][kBlockN / 8][4];
        multiply_transposed<T, kHeadDim>(s, queries, smem.K);

        cp_async_wait<0>();
        __syncthreads();  // V_j is here, and everybody has finished with K_j
        const int next_key = first_key + kBlockN;
        if (next_key < end_key) load_rows<kBlockN, kHeadDim, kNThreads>(smem.K, k, stride, next_key, a.seqlen_k, a.head_dim);
        cp_async_commit();

        if (next_key > visible(first_row + row0))  // not on tiles that the first row, and so every row, sees whole
            hide_keys(s, first_key, [&](int row) { return visible(first_row + row0 + row); });
        softmax.update(s, o, a.scale * kLog2e);
        if (DROPOUT) dropout.apply(s, b * a.heads + h, first_row + row0, first_key);  // the sum stays that of all keys
        multiply_add<T, kHeadDim>(o, s, smem.V);
    }
    softmax.finish(o, lse_of(a, b, h), first_row + row0, a.seqlen_q, a.scale, dropout.keep);
    store_rows<T, kHeadDim>(o, my_rows, out, stride, first_row + row0, a.seqlen_q, a.head_dim);
}

template <typename Tile, bool HAS_DROPOUT>
void run_forward(const FlashArgs& a) {
    static_assert(sizeof(SharedMemory<Tile>) <= kMaxSharedBytes, "too much shared memory: make kBlockM or kBlockN smaller");
    const dim3 grid(ceil_div(a.seqlen_q, Tile::kBlockM), a.heads, a.batch);
    auto kernel = flash_attn_kernel<Tile, false>;
    if constexpr (HAS_DROPOUT)
        if (a.dropout_p > 0) kernel = flash_attn_kernel<Tile, true>;
    launch(kernel, grid, Tile::kNThreads, sizeof(SharedMemory<Tile>), a.stream, a, Dropout(a));
}
