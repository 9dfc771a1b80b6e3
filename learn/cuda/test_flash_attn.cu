// Tests and times one step, or several, given as shared libraries:
//
//   ./test_flash_attn build/native/64/flash_attn_minimal.so [more.so ...]      all: errors, then a timing table
//   ./test_flash_attn --check library.so                                      errors only (for compute-sanitizer)
//   ./test_flash_attn --once library.so                                       one launch, B=2 S=4096 H=16 (for ncu, nsys)
//
// The reference of the errors is float64 on the CPU. The reference of the times is standard attention on the GPU in the
// plainest way: three kernels that store the score matrix.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "common.cuh"

struct Library {
    std::string path;
    const char* (*idea)();
    int (*head_dim)();
    const char* (*forward)(const FlashArgs*);
};

static Library open_library(const char* path) {
    void* handle = dlopen(path[0] == '/' ? path : (std::string("./") + path).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) fail("%s", dlerror());
    Library lib{path, nullptr, nullptr, nullptr};
    const auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
        if (!function) fail("%s has no function %s: it is not a step of this ladder", path, name);
    };
    find(lib.idea, "flash_idea");
    find(lib.head_dim, "flash_head_dim");
    find(lib.forward, "flash_forward");
    return lib;
}

// One problem: random inputs on both sides.
struct Problem {
    int batch, heads, m, n, d;
    std::vector<half> q, k, v;
    FlashArgs args{};
    std::vector<void*> owned;

    Problem(int batch, int heads, int m, int n, int d) : batch(batch), heads(heads), m(m), n(n), d(d) {
        std::mt19937 generator(m * 31 + n);
        std::normal_distribution<float> normal;
        const auto fill = [&](std::vector<half>& x, int rows) {
            x.resize(static_cast<size_t>(batch) * rows * heads * d);
            for (auto& e : x) e = __float2half(normal(generator));
            return upload(x.data(), x.size() * sizeof(half));
        };
        args.q = fill(q, m), args.k = fill(k, n), args.v = fill(v, n);
        args.out = upload(nullptr, q.size() * sizeof(half));
        args.lse = static_cast<float*>(upload(nullptr, sizeof(float) * batch * heads * m));
        args.batch = batch, args.heads = heads, args.seqlen_q = m, args.seqlen_k = n, args.head_dim = d;
        args.dtype = kFloat16;
        args.scale = 1.0f / std::sqrt(static_cast<float>(d));
    }
    ~Problem() {
        for (void* p : owned) cudaFree(p);
    }
    Problem(const Problem&) = delete;

    void* upload(const void* from, size_t bytes) {
        void* p = nullptr;
        check_cuda(cudaMalloc(&p, std::max<size_t>(bytes, 16)), "cudaMalloc");
        owned.push_back(p);
        if (from)
            check_cuda(cudaMemcpy(p, from, bytes, cudaMemcpyHostToDevice), "copy to the GPU");
        else
            check_cuda(cudaMemset(p, 0xff, bytes), "cudaMemset");  // NaN: what is not written must show
        return p;
    }
};

// One row of attention in float64, and of the same sum over |V|, which bounds the effect of rounding P.
static void exact_row(const Problem& p, int b, int h, int row, std::vector<double>& out, std::vector<double>& size, double& lse) {
    const auto at = [&](const std::vector<half>& x, int rows, int r, int i) {
        return static_cast<double>(__half2float(x[((static_cast<size_t>(b) * rows + r) * p.heads + h) * p.d + i]));
    };
    std::vector<double> s(p.n);
    double top = -INFINITY, sum = 0.0;
    for (int j = 0; j < p.n; ++j) {
        for (int i = 0; i < p.d; ++i) s[j] += at(p.q, p.m, row, i) * at(p.k, p.n, j, i);
        s[j] *= p.args.scale;
        top = std::max(top, s[j]);
    }
    for (auto& x : s) sum += x = std::exp(x - top);
    out.assign(p.d, 0.0);
    size.assign(p.d, 0.0);
    for (int j = 0; j < p.n; ++j)
        for (int i = 0; i < p.d; ++i) {
            out[i] += s[j] / sum * at(p.v, p.n, j, i);
            size[i] += s[j] / sum * std::abs(at(p.v, p.n, j, i));
        }
    lse = top + std::log(sum);
}

// Largest errors of out and lse; every row of small problems, every 97th of large ones. NaN is an error.
static bool check_problem(const Library& lib, Problem& p) {
    if (const char* message = lib.forward(&p.args)) fail("%s", message);
    check_cuda(cudaDeviceSynchronize(), "run");
    std::vector<half> out(p.q.size());
    std::vector<float> lse(static_cast<size_t>(p.batch) * p.heads * p.m);
    check_cuda(cudaMemcpy(out.data(), p.args.out, out.size() * sizeof(half), cudaMemcpyDeviceToHost), "copy out");
    check_cuda(cudaMemcpy(lse.data(), p.args.lse, lse.size() * sizeof(float), cudaMemcpyDeviceToHost), "copy lse");
    double out_error = 0.0, lse_error = 0.0;
    bool all_within = true;
    const int total = p.batch * p.heads * p.m, every = total > 2000 ? 97 : 1;
    std::vector<double> want, size;
    for (int i = 0; i < total; i += every) {
        const int b = i / (p.heads * p.m), h = i / p.m % p.heads, row = i % p.m;
        double want_lse;
        exact_row(p, b, h, row, want, size, want_lse);
        lse_error = std::max(lse_error, std::abs(lse[i] - want_lse));
        all_within &= std::abs(lse[i] - want_lse) < 1e-5;
        for (int c = 0; c < p.d; ++c) {
            const double got = __half2float(out[((static_cast<size_t>(b) * p.m + row) * p.heads + h) * p.d + c]);
            const double error = std::abs(got - want[c]);
            out_error = std::max(out_error, error);
            // P and the result are each rounded to fp16, by at most 2^-11 of their size. NaN fails every comparison.
            all_within &= error < (size[c] + std::abs(want[c])) / 2048 + 1e-6;
        }
    }
    printf("  B=%d H=%d M=%-4d N=%-4d  out error %.1e  lse error %.1e  %s\n", p.batch, p.heads, p.m, p.n, out_error, lse_error,
           all_within ? "ok" : "WRONG");
    return all_within;
}

__global__ void scores_kernel(FlashArgs a, float* s) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y, bh = blockIdx.z;
    if (j >= a.seqlen_k) return;
    const half* q = static_cast<const half*>(a.q) + offset_of(a, a.seqlen_q, bh / a.heads, i, bh % a.heads);
    const half* k = static_cast<const half*>(a.k) + offset_of(a, a.seqlen_k, bh / a.heads, j, bh % a.heads);
    float sum = 0.0f;
    for (int d = 0; d < a.head_dim; ++d) sum += __half2float(q[d]) * __half2float(k[d]);
    s[(static_cast<size_t>(bh) * a.seqlen_q + i) * a.seqlen_k + j] = sum * a.scale;
}

__global__ void softmax_kernel(FlashArgs a, float* s) {
    float* row = s + (static_cast<size_t>(blockIdx.z) * a.seqlen_q + blockIdx.y) * a.seqlen_k;
    float top = -INFINITY, sum = 0.0f;
    for (int j = threadIdx.x; j < a.seqlen_k; j += 32) top = fmaxf(top, row[j]);
    for (int w = 16; w; w /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, w));
    for (int j = threadIdx.x; j < a.seqlen_k; j += 32) sum += row[j] = expf(row[j] - top);
    for (int w = 16; w; w /= 2) sum += __shfl_xor_sync(0xffffffff, sum, w);
    for (int j = threadIdx.x; j < a.seqlen_k; j += 32) row[j] /= sum;
}

__global__ void output_kernel(FlashArgs a, const float* p) {
    const int d = threadIdx.x, i = blockIdx.y, bh = blockIdx.z;
    const float* row = p + (static_cast<size_t>(bh) * a.seqlen_q + i) * a.seqlen_k;
    const half* v = static_cast<const half*>(a.v) + offset_of(a, a.seqlen_k, bh / a.heads, 0, bh % a.heads) + d;
    float sum = 0.0f;
    for (int j = 0; j < a.seqlen_k; ++j) sum += row[j] * __half2float(v[j * row_stride(a)]);
    static_cast<half*>(a.out)[offset_of(a, a.seqlen_q, bh / a.heads, i, bh % a.heads) + d] = __float2half(sum);
}

static void standard_attention(const FlashArgs& a, float* scores) {
    scores_kernel<<<dim3(ceil_div(a.seqlen_k, 128), a.seqlen_q, a.batch * a.heads), 128>>>(a, scores);
    softmax_kernel<<<dim3(1, a.seqlen_q, a.batch * a.heads), 32>>>(a, scores);
    output_kernel<<<dim3(1, a.seqlen_q, a.batch * a.heads), a.head_dim>>>(a, scores);
    check_cuda(cudaGetLastError(), "standard attention");
}

// Median milliseconds of one call.
template <typename Run>
static float time_ms(Run run) {
    cudaEvent_t begin, end;
    check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<float> times;
    for (int i = 0; i < 25; ++i) {
        check_cuda(cudaEventRecord(begin), "cudaEventRecord");
        run();
        check_cuda(cudaEventRecord(end), "cudaEventRecord");
        check_cuda(cudaEventSynchronize(end), "run");
        float ms;
        check_cuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
        if (i >= 5) times.push_back(ms);  // the first ones warm up
    }
    cudaEventDestroy(begin), cudaEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

static void timing_table(const Library& lib) {
    const int shapes[][3] = {{128, 1, 1}, {512, 1, 1}, {1024, 1, 1}, {2048, 1, 1}, {512, 2, 8}, {4096, 2, 16}};
    printf("| Seq Len | Batch | Heads | Flash (ms) | Ref (ms) | Speedup | TFLOP/s |\n|---|---|---|---|---|---|---|\n");
    for (const auto& [s, batch, heads] : shapes) {
        Problem p(batch, heads, s, s, lib.head_dim() ? lib.head_dim() : 64);
        float* scores = static_cast<float*>(p.upload(nullptr, sizeof(float) * batch * heads * s * s));
        const float flash = time_ms([&] {
            if (const char* message = lib.forward(&p.args)) fail("%s", message);
        });
        const float standard = time_ms([&] { standard_attention(p.args, scores); });
        printf("| %d | %d | %d | %.4f | %.4f | %.1fx | %.1f |\n", s, batch, heads, flash, standard, standard / flash,
               4.0 * batch * heads * s * s * p.d / flash / 1e9);
    }
}

static bool run_library(const char* path, const char* mode) {
    const Library lib = open_library(path);
    const int d = lib.head_dim() ? lib.head_dim() : 64;
    printf("%s: %s, head_dim %d\n", path, lib.idea(), d);
    if (!strcmp(mode, "--once")) {
        Problem p(2, 16, 4096, 4096, d);
        if (const char* message = lib.forward(&p.args)) fail("%s", message);
        check_cuda(cudaDeviceSynchronize(), "run");
        return true;
    }
    bool good = true;
    const int shapes[][4] = {{2, 2, 128, 128}, {1, 2, 100, 150}, {1, 1, 150, 70}, {1, 3, 1, 65}};
    for (const auto& [b, h, m, n] : shapes) {
        Problem p(b, h, m, n, d);
        good &= check_problem(lib, p);
    }
    if (strcmp(mode, "--check")) timing_table(lib);
    return good;
}

int main(int count, char** words) {
    const char* mode = count > 1 && !strncmp(words[1], "--", 2) ? words[1] : "";
    const int first = *mode ? 2 : 1;
    if (first >= count || (*mode && strcmp(mode, "--check") && strcmp(mode, "--once"))) {
        fprintf(stderr, "usage: %s [--check | --once] library.so ...\n", words[0]);
        return 2;
    }
    bool good = true;
    try {
        int devices = 0;
        if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
            fail("no GPU here: the libraries can be built, and the emulator can run them on a CPU (./build_and_run.sh)");
        for (int i = first; i < count; ++i) good &= run_library(words[i], mode);
    } catch (const std::exception& e) {
        fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
    return good ? 0 : 1;
}
