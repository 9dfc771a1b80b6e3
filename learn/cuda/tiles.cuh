// The parts of step 7 as functions on tiles, in the swizzled layout of step 8. A warp owns MT tiles of 16 rows; an
// accumulator is float[MT][columns / 8][4], each last [4] a 16 x 8 tile as mma.sync gives it (ptx.cuh).
#pragma once

#include "ptx.cuh"

#define UNROLL _Pragma("unroll")

constexpr int kWarp = 32;

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }

// Where 16-byte chunk `chunk` of row `row` lies in a tile of rows of D elements, in elements. The chunks of a row are
// permuted by exclusive or with the row number, so that one column of 8 rows in a row falls into 8 different groups of
// banks, and no element is spent on padding. Rows shorter than 8 chunks (D = 32, 96) repeat their banks every second row.
template <int D>
__device__ __forceinline__ int swizzled(int row, int chunk) {
    static_assert(D % 32 == 0, "kHeadDim must be a multiple of 32: 32, 64, 96, 128, ...");
    return row * D + (chunk ^ (D % 64 == 0 ? row & 7 : row >> 1 & 3)) * 8;
}

// Starts copying rows first ... first + ROWS - 1 of one head; zeros beyond row `seqlen` and column `head_dim`, since even
// 0 * NaN would reach the result.
template <int ROWS, int D, int THREADS, typename T>
__device__ __forceinline__ void load_rows(T* tile, const T* head, size_t stride, int first, int seqlen, int head_dim = D) {
    constexpr int kChunks = D / 8;
    static_assert(ROWS * kChunks % THREADS == 0, "a tile must be a whole number of 16-byte chunks for each thread");
    const int row0 = threadIdx.x / kChunks, chunk0 = threadIdx.x % kChunks;
    const T* from = head + (first + row0) * stride + chunk0 * 8;
UNROLL
    for (int i = 0; i < ROWS * kChunks / THREADS; ++i) {
        if constexpr (THREADS % kChunks == 0) {  // the usual case: every THREADS / kChunks-th row, always the same chunk
            const int row = row0 + i * (THREADS / kChunks);
            cp_async_16(&tile[swizzled<D>(row, chunk0)], from, first + row < seqlen && chunk0 * 8 < head_dim);
            from += THREADS / kChunks * stride;
        } else {
            const int index = threadIdx.x + i * THREADS, row = index / kChunks, chunk = index % kChunks;
            cp_async_16(&tile[swizzled<D>(row, chunk)], &head[(first + row) * stride + chunk * 8],
                        first + row < seqlen && chunk * 8 < head_dim);
        }
    }
}

// The left operand of a product, 16 MT rows of a tile: from shared memory at every use ...
template <typename T, int D, int MT>
struct SharedRows {
    const T* tile;  // first row of this warp
    __device__ __forceinline__ void load(const T* rows) { tile = rows; }
    __device__ __forceinline__ void get(uint32_t (&a)[MT][4], int d) const {
UNROLL
        for (int i = 0; i < MT; ++i) ldmatrix_x4(a[i], &tile[swizzled<D>(i * 16 + lane_id() % 16, d / 8 + lane_id() / 16)]);
    }
};

// ... or once, into registers.
template <typename T, int D, int MT>
struct RegisterRows {
    uint32_t words[D / 16][MT][4];
    __device__ __forceinline__ void load(const T* tile) {
UNROLL
        for (int d = 0; d < D; d += 16) SharedRows<T, D, MT>{tile}.get(words[d / 16], d);
    }
    __device__ __forceinline__ void get(uint32_t (&a)[MT][4], int d) const {
UNROLL
        for (int i = 0; i < MT; ++i)
UNROLL
            for (int j = 0; j < 4; ++j) a[i][j] = words[d / 16][i][j];
    }
};

// Whichever fits: up to 64 columns there are registers left.
template <typename T, int D, int MT>
using Rows = std::conditional_t<D <= 64, RegisterRows<T, D, MT>, SharedRows<T, D, MT>>;

// c = A B^T: A gives rows, B is a tile of 8 NT rows.
template <typename T, int D, int MT, int NT, typename Left>
__device__ __forceinline__ void multiply_transposed(float (&c)[MT][NT][4], const Left& left, const T* tile) {
    const int lane = lane_id();
UNROLL
    for (int i = 0; i < MT; ++i)
UNROLL
        for (int n = 0; n < NT; ++n)
UNROLL
            for (int j = 0; j < 4; ++j) c[i][n][j] = 0.0f;
UNROLL
    for (int d = 0; d < D; d += 16) {
        uint32_t a[MT][4];
        left.get(a, d);
UNROLL
        for (int n = 0; n < NT; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, &tile[swizzled<D>(n * 8 + lane / 16 * 8 + lane % 8, d / 8 + lane / 8 % 2)]);
UNROLL
            for (int i = 0; i < MT; ++i) {
                mma_16x8x16<T>(c[i][n], a[i], b[0], b[1]);
                mma_16x8x16<T>(c[i][n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// c += P B: P an accumulator, rounded to T; B a tile of 8 NT rows of D.
template <typename T, int D, int MT, int NT>
__device__ __forceinline__ void multiply_add(float (&c)[MT][D / 8][4], const float (&p)[MT][NT][4], const T* tile) {
    const int lane = lane_id();
UNROLL
    for (int n = 0; n < NT; n += 2) {
        uint32_t a[MT][4];
UNROLL
        for (int i = 0; i < MT; ++i)
UNROLL
            for (int j = 0; j < 4; ++j) a[i][j] = pack<T>(p[i][n + j / 2][j % 2 * 2], p[i][n + j / 2][j % 2 * 2 + 1]);
UNROLL
        for (int d = 0; d < D / 8; d += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, &tile[swizzled<D>(n * 8 + lane % 16, d + lane / 16)]);
UNROLL
            for (int i = 0; i < MT; ++i) {
                mma_16x8x16<T>(c[i][d], a[i], b[0], b[1]);
                mma_16x8x16<T>(c[i][d + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Scores of keys at and beyond end(row) become -inf; `row` counts from the first row of the warp.
template <int MT, int NT, typename End>
__device__ __forceinline__ void hide_keys(float (&s)[MT][NT][4], int first_key, End end) {
UNROLL
    for (int i = 0; i < MT; ++i)
UNROLL
        for (int half_tile = 0; half_tile < 2; ++half_tile) {
            const int visible = end(i * 16 + lane_id() / 4 + 8 * half_tile) - first_key - lane_id() % 4 * 2;
UNROLL
            for (int n = 0; n < NT; ++n)
UNROLL
                for (int c = 0; c < 2; ++c)
                    if (n * 8 + c >= visible) s[i][n][2 * half_tile + c] = -INFINITY;
        }
}

// The four lanes that share a row.
__device__ __forceinline__ float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Running maximum of the unscaled scores, and this lane's share of the running sum, for rows g and g + 8 of each tile.
template <int MT>
struct Softmax {
    float m[MT][2], l[MT][2];

    __device__ __forceinline__ Softmax() {
UNROLL
        for (int i = 0; i < MT; ++i) m[i][0] = m[i][1] = -INFINITY, l[i][0] = l[i][1] = 0.0f;
    }

    // Scores become probabilities relative to the new maximum, and the output so far is rescaled. The scale is folded into
    // the exponent: exp(scale * s - scale * m) = 2^(s * scale_log2 - m * scale_log2), one multiply-add and one ex2.
    template <int NT, int OT>
    __device__ __forceinline__ void update(float (&s)[MT][NT][4], float (&o)[MT][OT][4], float scale_log2) {
UNROLL
        for (int i = 0; i < MT; ++i)
UNROLL
            for (int r = 0; r < 2; ++r) {
                float m_new = m[i][r];
UNROLL
                for (int n = 0; n < NT; ++n) m_new = fmaxf(m_new, fmaxf(s[i][n][2 * r], s[i][n][2 * r + 1]));
                m_new = max_of_row(m_new);
                // A row that has seen no key yet: -inf - -inf would be NaN.
                const float shift = m_new == -INFINITY ? 0.0f : m_new * scale_log2;
                const float alpha = fast_exp2(m[i][r] * scale_log2 - shift);
                m[i][r] = m_new;
                l[i][r] *= alpha;
UNROLL
                for (int n = 0; n < NT; ++n)
UNROLL
                    for (int c = 2 * r; c < 2 * r + 2; ++c) {
                        s[i][n][c] = fast_exp2(s[i][n][c] * scale_log2 - shift);
                        l[i][r] += s[i][n][c];
                    }
UNROLL
                for (int d = 0; d < OT; ++d) {
                    o[i][d][2 * r] *= alpha;
                    o[i][d][2 * r + 1] *= alpha;
                }
            }
    }

    // Divides the output by the sum (times `keep`, the share that dropout keeps) and writes lse, for rows below seqlen.
    template <int OT>
    __device__ __forceinline__ void finish(float (&o)[MT][OT][4], float* lse, int first_row, int seqlen, float scale,
                                           float keep = 1.0f) {
UNROLL
        for (int i = 0; i < MT; ++i)
UNROLL
            for (int r = 0; r < 2; ++r) {
                const float sum = sum_of_row(l[i][r]);
                const float inverse = sum > 0.0f ? 1.0f / (sum * keep) : 0.0f;
UNROLL
                for (int d = 0; d < OT; ++d) {
                    o[i][d][2 * r] *= inverse;
                    o[i][d][2 * r + 1] *= inverse;
                }
                const int row = first_row + i * 16 + lane_id() / 4 + 8 * r;
                if (lane_id() % 4 == 0 && row < seqlen)
                    lse[row] = sum > 0.0f ? m[i][r] * scale + logf(sum) : -INFINITY;
            }
    }
};

// An accumulator to device memory, through this warp's own rows of `tile`, so that whole 16-byte chunks are written.
template <typename T, int D, int MT>
__device__ __forceinline__ void store_rows(const float (&c)[MT][D / 8][4], T* tile, T* head, size_t stride, int first,
                                           int seqlen, int head_dim = D) {
    const int lane = lane_id();
    __syncwarp();
UNROLL
    for (int i = 0; i < MT; ++i)
UNROLL
        for (int d = 0; d < D / 8; ++d)
UNROLL
            for (int r = 0; r < 2; ++r)
                reinterpret_cast<uint32_t&>(tile[swizzled<D>(i * 16 + lane / 4 + 8 * r, d) + lane % 4 * 2]) =
                    pack<T>(c[i][d][2 * r], c[i][d][2 * r + 1]);
    __syncwarp();
UNROLL
    for (int i = lane; i < MT * 16 * D / 8; i += kWarp) {
        const int row = i / (D / 8), chunk = i % (D / 8);
        if (first + row < seqlen && chunk * 8 < head_dim)
            reinterpret_cast<uint4&>(head[(first + row) * stride + chunk * 8]) =
                reinterpret_cast<const uint4&>(tile[swizzled<D>(row, chunk)]);
    }
}
