// The dropout mask of flash_attn: element (batch, head, row, key) is kept by a function of (seed, offset) and its position.
//
// Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); key = (seed low, seed
// high ^ offset high), counter = (offset low, key / 16, batch * heads + head, row). One call serves 16 neighbouring keys,
// each word four of them: the low and the high half of the word, then those of the word rotated left by 8. Dropped iff the
// low 15 bits of the half are below round(p * 32768).
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
          threshold(static_cast<uint32_t>(nearbyint(a.dropout_p * 32768.0))),
          keep(static_cast<float>(1.0 - a.dropout_p)) {}

    // Bit c: whether key 16 * group + c of the row is kept.
    __host__ __device__ __forceinline__ uint32_t bits(uint32_t head, uint32_t row, uint32_t group) const {
        uint32_t c0 = offset, c1 = group, c2 = head, c3 = row, k0 = key0, k1 = key1;
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
        for (int c = 0; c < 16; ++c) {
            const uint32_t word = words[c / 4], turned = c & 2 ? word << 8 | word >> 24 : word;
            kept |= static_cast<uint32_t>((turned >> 16 * (c & 1) & 0x7fff) >= threshold) << c;
        }
        return kept;
    }

    // Zeroes what is dropped in accumulators whose rows are queries and whose columns are keys. The 16 keys of one call are
    // the columns of two 16 x 8 tiles, spread over four lanes: of the four calls that rows g and g + 8 of four tiles need,
    // each lane makes one, then they exchange the bits.
    template <int MT, int NT>
    __device__ __forceinline__ void apply(float (&p)[MT][NT][4], int head, int first_row, int first_key) const {
        static_assert(NT % 4 == 0, "kBlockN must be a multiple of 32");
        const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
        for (int i = 0; i < MT; ++i) {
            const int row = first_row + i * 16 + lane / 4;
#pragma unroll
            for (int n = 0; n < NT; n += 4) {
                const uint32_t mine = bits(head, row + t / 2 * 8, first_key / 16 + n / 2 + t % 2);
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int source = (lane & ~3) | half * 2 | j / 2;
                        const uint32_t kept = __shfl_sync(0xffffffff, mine, source) >> (j % 2 * 8 + 2 * t);
#pragma unroll
                        for (int c = 0; c < 2; ++c)
                            if (!(kept >> c & 1)) p[i][n + j][half * 2 + c] = 0.0f;
                    }
            }
        }
    }

    // The same when rows are keys and columns are queries: lane l makes the call of query l % 8 of tile l / 8, one of four
    // neighbouring ones. What is dropped is negated, not zeroed: the backward still needs its value.
    template <int MT, int NT>
    __device__ __forceinline__ void mark_transposed(float (&p)[MT][NT][4], int head, int first_row, int first_key) const {
        static_assert(NT % 4 == 0, "four tiles share the lanes of a warp");
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < MT; ++i)
#pragma unroll
            for (int n = 0; n < NT; n += 4) {
                const uint32_t mine = bits(head, first_row + n * 8 + lane, first_key / 16 + i);
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const uint32_t kept = __shfl_sync(0xffffffff, mine, j * 8 + 2 * t + c) >> g;
                        if (!(kept & 1)) p[i][n + j][c] *= -1.0f;
                        if (!(kept >> 8 & 1)) p[i][n + j][2 + c] *= -1.0f;
                    }
            }
    }
};
