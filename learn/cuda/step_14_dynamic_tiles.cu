// Step 14: the tile is chosen for the problem and the GPU at run time.
//
// Large tiles use what they read from shared memory most, but a short problem then has fewer blocks than the GPU has
// multiprocessors, and a GPU with less shared memory cannot run them. The kernel is built for several tiles; for each the
// host estimates the rows that the busiest multiprocessor gets, divided by how fast that tile goes when the GPU is full,
// and launches the least.
#include "forward.cuh"

constexpr int kHeadDim = HEAD_DIM;

struct Candidate {
    int block_m;
    size_t shared_bytes;
    float speed;  // measured on an H200, S = 8192, relative to the fastest
    FlashRun run;
};

template <int BlockM, int BlockN, int NThreads>
constexpr Candidate candidate(float speed) {
    using Tile = ForwardTile<half, kHeadDim, BlockM, BlockN, NThreads>;
    return {BlockM, sizeof(SharedMemory<Tile>), speed, run_forward<Tile, true>};
}

static const Candidate kCandidates[] = {
    candidate<128, 64, 128>(1.00f),
    candidate<64, 64, 128>(0.92f),
    candidate<32, 64, 64>(0.88f),
    candidate<32, 32, 64>(0.79f),  // the least shared memory
};

static void forward(const FlashArgs& a) {
    const DeviceLimits gpu = device_limits();
    const Candidate* best = nullptr;
    float best_cost = INFINITY;
    for (const auto& c : kCandidates) {
        if (c.shared_bytes > gpu.shared_bytes) continue;
        const long long blocks = static_cast<long long>(ceil_div(a.seqlen_q, c.block_m)) * a.heads * a.batch;
        const long long rows = (blocks + gpu.multiprocessors - 1) / gpu.multiprocessors * c.block_m;
        const float cost = rows / c.speed;
        if (cost < best_cost) best = &c, best_cost = cost;
    }
    if (!best)
        fail("too much shared memory: no tile for kHeadDim %d fits into %zu bytes: add one with a smaller kBlockM or kBlockN",
             kHeadDim, gpu.shared_bytes);
    best->run(a);
}

static const FlashStep kStep = {"tile chosen at run time", kHeadDim, kFp16, true, true};
FLASH_STEP(kStep, forward, nullptr)
