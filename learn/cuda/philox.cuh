// The dropout mask of flash_attn: element (batch, head, row, key) is kept by a function of (seed, offset) and its position.
//
// Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); key = (seed low, seed
// high ^ offset high), counter = (offset low, key / 8, row, batch * heads + head). One call gives four words: 16 bits for
// each of 8 neighbouring keys, the low half for even ones. Kept iff those are below round((1 - p) * 65536).
// flash_attn/reference/dropout.py is the same in torch integers; docs/numerics.md has the contract.
#pragma once

#include "common.cuh"

struct Dropout {
    uint32_t key0, key1, offset, threshold;
    float keep;  // 1 - p

    explicit Dropout(const FlashArgs& a)
        : key0(static_cast<uint32_t>(a.seed)),
          key1(static_cast<uint32_t>(static_cast<uint64_t>(a.seed ^ a.offset) >> 32)),
          offset(static_cast<uint32_t>(a.offset)),
          threshold(static_cast<uint32_t>(nearbyint((1.0 - a.dropout_p) * 65536.0))),
          keep(static_cast<float>(1.0 - a.dropout_p)) {}

    // Bit c: whether key 8 * group + c of the row is kept.
    __host__ __device__ __forceinline__ uint32_t bits(uint32_t head, uint32_t row, uint32_t group) const {
        uint32_t c0 = offset, c1 = group, c2 = row, c3 = head, k0 = key0, k1 = key1;
#pragma unroll
        for (int round = 0; round < 7; ++round) {
            const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(product1);
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(product0);
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        const uint32_t words[4] = {c0, c1, c2, c3};
        uint32_t kept = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            kept |= static_cast<uint32_t>((words[w] & 0xffff) < threshold) << (2 * w);
            kept |= static_cast<uint32_t>((words[w] >> 16) < threshold) << (2 * w + 1);
        }
        return kept;
    }

    // Zeroes what is dropped in accumulators whose rows are queries and whose columns are keys. The 8 keys of one call are
    // the columns of one 16 x 8 tile, spread over four lanes: each lane makes the calls of every fourth tile, then they
    // exchange the bits, 8 for row g and 8 for row g + 8.
    template <int MT, int NT>
    __device__ __forceinline__ void apply(float (&p)[MT][NT][4], int head, int first_row, int first_key) const {
        static_assert(NT % 4 == 0, "kBlockN must be a multiple of 32");
        const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
        for (int i = 0; i < MT; ++i) {
            const int row = first_row + i * 16 + lane / 4;
#pragma unroll
            for (int n = 0; n < NT; n += 4) {
                const int group = first_key / 8 + n + t;
                const uint32_t mine = bits(head, row, group) | bits(head, row + 8, group) << 8;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint32_t kept = __shfl_sync(0xffffffff, mine, (lane & ~3) | j) >> 2 * t;
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        if (!(kept >> (c / 2 * 8 + c % 2) & 1)) p[i][n + j][c] = 0.0f;
                }
            }
        }
    }

    // The same when rows are keys and columns are queries: lane l makes the call of query l % 8 and of the upper or lower 8
    // keys, for one of two neighbouring tiles. What is dropped is negated, not zeroed: the backward still needs its value.
    template <int MT, int NT>
    __device__ __forceinline__ void mark_transposed(float (&p)[MT][NT][4], int head, int first_row, int first_key) const {
        static_assert(NT % 2 == 0, "two tiles share the lanes of a warp");
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int n = 0; n < NT; n += 2) {
                const int row = first_row + (n + lane / 16) * 8 + lane % 8;
                const uint32_t mine = bits(head, row, first_key / 8 + i * 2 + lane / 8 % 2);
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        const int source = j * 16 + c / 2 * 8 + 2 * t + c % 2;
                        if (!(__shfl_sync(0xffffffff, mine, source) >> g & 1)) p[i][n + j][c] *= -1.0f;
                    }
            }
    }
};
