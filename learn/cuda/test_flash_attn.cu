// Tests and times one step, or several, given as shared libraries:
//
//   ./test_flash_attn [library.so ...]            errors, then a timing table; without names: every step that was built
//   ./test_flash_attn --quick [library.so ...]    the same without the largest problem of the table
//   ./test_flash_attn --check [library.so ...]    errors only (for compute-sanitizer)
//   ./test_flash_attn --once [library.so ...]     one launch of B=2 S=4096 H=16 (for ncu and nsys)
//
// The reference of the errors is float64 on the CPU. The reference of the times is standard attention on the GPU in the
// plainest way: three kernels that store the score matrix.
#include <dlfcn.h>
#include <glob.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "philox.cuh"

#ifndef DEFAULT_LIBRARIES
#define DEFAULT_LIBRARIES "build/*/*"  // the Makefile and CMake name the folder they build into
#endif

struct Library {
    std::string path;
    const char* (*idea)();
    int (*head_dim)();
    unsigned (*can)();
    const char* (*forward)(const FlashArgs*);
    const char* (*backward)(const FlashArgs*);
};

static Library open_library(const char* path) {
    void* handle = dlopen(path[0] == '/' ? path : (std::string("./") + path).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) fail("%s", dlerror());
    Library lib{path, nullptr, nullptr, nullptr, nullptr, nullptr};
    const auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
        if (!function) fail("%s has no function %s: it is not a step of this ladder", path, name);
    };
    find(lib.idea, "flash_idea");
    find(lib.head_dim, "flash_head_dim");
    find(lib.can, "flash_can");
    find(lib.forward, "flash_forward");
    find(lib.backward, "flash_backward");
    return lib;
}

// One problem: random inputs on both sides.
struct Problem {
    int batch, heads, m, n, d;
    std::vector<half> q, k, v, dout;
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
        args.q = fill(q, m), args.k = fill(k, n), args.v = fill(v, n), args.dout = fill(dout, m);
        args.dq = upload(nullptr, q.size() * sizeof(half));
        args.dk = upload(nullptr, k.size() * sizeof(half));
        args.dv = upload(nullptr, k.size() * sizeof(half));
        args.delta = static_cast<float*>(upload(nullptr, sizeof(float) * batch * heads * m));
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

static void call(const char* (*function)(const FlashArgs*), const FlashArgs& args) {
    if (const char* message = function(&args)) fail("%s", message);
    check_cuda(cudaDeviceSynchronize(), "run");
}

template <typename T>
static std::vector<T> download(const void* from, size_t count) {
    std::vector<T> x(count);
    check_cuda(cudaMemcpy(x.data(), from, count * sizeof(T), cudaMemcpyDeviceToHost), "copy from the GPU");
    return x;
}

// Attention of one head in float64, with its gradients. `size` holds the same sums over absolute values, which bound what
// rounding P, dS, the output (in delta) and the result to fp16 can change: by 2^-11 of the size each.
struct Exact {
    std::vector<double> lse, out, out_size, dq, dq_size, dk, dk_size, dv, dv_size;

    Exact(const Problem& p, int b, int h) {
        const FlashArgs& a = p.args;
        const Dropout dropout(a);
        const auto at = [&](const std::vector<half>& x, int rows, int r, int i) {
            return static_cast<double>(__half2float(x[((static_cast<size_t>(b) * rows + r) * p.heads + h) * p.d + i]));
        };
        for (auto* x : {&out, &out_size, &dq, &dq_size}) x->assign(p.m * p.d, 0.0);
        for (auto* x : {&dk, &dk_size, &dv, &dv_size}) x->assign(p.n * p.d, 0.0);
        const auto add = [](std::vector<double>& x, std::vector<double>& size, int i, double value, double magnitude) {
            x[i] += value, size[i] += std::abs(magnitude);
        };
        std::vector<double> s(p.n), dp(p.n);
        for (int row = 0; row < p.m; ++row) {
            const int end = a.causal ? std::clamp(row + 1 + p.n - p.m, 0, p.n) : p.n;
            double top = -INFINITY, sum = 0.0, delta = 0.0;
            for (int j = 0; j < end; ++j) {
                s[j] = dp[j] = 0.0;
                for (int i = 0; i < p.d; ++i) {
                    s[j] += at(p.q, p.m, row, i) * at(p.k, p.n, j, i);
                    dp[j] += at(p.dout, p.m, row, i) * at(p.v, p.n, j, i);
                }
                s[j] *= a.scale;
                top = std::max(top, s[j]);
            }
            for (int j = 0; j < end; ++j) sum += s[j] = std::exp(s[j] - top);
            lse.push_back(end ? top + std::log(sum) : -INFINITY);
            for (int j = 0; j < end; ++j) {
                const bool kept = dropout.bits(b * p.heads + h, row, j / 16) >> j % 16 & 1;
                s[j] /= sum;
                dp[j] *= kept ? 1 / (1 - a.dropout_p) : 0.0;
                delta += s[j] * dp[j];
                const double weight = kept ? s[j] / (1 - a.dropout_p) : 0.0;
                for (int i = 0; i < p.d; ++i) {
                    const double value = at(p.v, p.n, j, i), dout = at(p.dout, p.m, row, i);
                    add(out, out_size, row * p.d + i, weight * value, weight * value);
                    add(dv, dv_size, j * p.d + i, weight * dout, weight * dout);
                }
            }
            double delta_size = std::abs(delta);  // delta is made from the output, rounded, of rounded P
            for (int i = row * p.d; i < (row + 1) * p.d; ++i)
                delta_size += std::abs(at(p.dout, p.m, row, i % p.d)) * (std::abs(out[i]) + out_size[i]);
            for (int j = 0; j < end; ++j)
                for (int i = 0; i < p.d; ++i) {
                    const double ds = s[j] * (dp[j] - delta) * a.scale;
                    const double size = s[j] * (std::abs(dp[j]) + delta_size) * a.scale;
                    add(dq, dq_size, row * p.d + i, ds * at(p.k, p.n, j, i), size * at(p.k, p.n, j, i));
                    add(dk, dk_size, j * p.d + i, ds * at(p.q, p.m, row, i), size * at(p.q, p.m, row, i));
                }
        }
    }
};

// Largest error of one head of a result; NaN, and whatever exceeds the bound, makes `good` false.
static double compare(const Problem& p, const std::vector<half>& got, int b, int h, const std::vector<double>& want,
                      const std::vector<double>& size, bool& good) {
    double worst = 0.0;
    const int rows = want.size() / p.d;
    for (int i = 0; i < rows * p.d; ++i) {
        const double x = __half2float(got[((static_cast<size_t>(b) * rows + i / p.d) * p.heads + h) * p.d + i % p.d]);
        const double error = std::abs(x - want[i]);
        worst = std::max(worst, error);
        if (!(error < (size[i] + std::abs(want[i])) / 2048 + 1e-6)) good = false;
    }
    return worst;
}

static bool check_problem(const Library& lib, int batch, int heads, int m, int n, int d, bool causal, double dropout_p) {
    Problem p(batch, heads, m, n, d);
    p.args.causal = causal;
    p.args.dropout_p = dropout_p;
    p.args.seed = 0x123456789abcdef, p.args.offset = 42;
    call(lib.forward, p.args);
    const bool backward = lib.can() & 32;
    if (backward) call(lib.backward, p.args);
    const auto out = download<half>(p.args.out, p.q.size());
    const auto lse = download<float>(p.args.lse, static_cast<size_t>(batch) * heads * m);
    std::vector<half> dq, dk, dv;
    if (backward) {
        dq = download<half>(p.args.dq, p.q.size());
        dk = download<half>(p.args.dk, p.k.size());
        dv = download<half>(p.args.dv, p.v.size());
    }
    double errors[5] = {};
    bool good = true;
    for (int b = 0; b < batch; ++b)
        for (int h = 0; h < heads; ++h) {
            const Exact exact(p, b, h);
            errors[0] = std::max(errors[0], compare(p, out, b, h, exact.out, exact.out_size, good));
            for (int i = 0; i < m; ++i) {
                const float x = lse[(b * heads + h) * m + i];
                if (x == exact.lse[i]) continue;  // both -inf
                errors[1] = std::max(errors[1], std::abs(x - exact.lse[i]));
                if (!(std::abs(x - exact.lse[i]) < 1e-5)) good = false;
            }
            if (!backward) continue;
            errors[2] = std::max(errors[2], compare(p, dq, b, h, exact.dq, exact.dq_size, good));
            errors[3] = std::max(errors[3], compare(p, dk, b, h, exact.dk, exact.dk_size, good));
            errors[4] = std::max(errors[4], compare(p, dv, b, h, exact.dv, exact.dv_size, good));
        }
    printf("  B=%d H=%d M=%-4d N=%-4d%s%s  errors: out %.1e  lse %.1e", batch, heads, m, n, causal ? " causal" : "",
           dropout_p > 0 ? " dropout" : "", errors[0], errors[1]);
    if (backward) printf("  dq %.1e  dk %.1e  dv %.1e", errors[2], errors[3], errors[4]);
    printf("  %s\n", good ? "ok" : "WRONG");
    return good;
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

// Median milliseconds of one call, of 3 to 20.
template <typename Run>
static float time_ms(Run run) {
    cudaEvent_t begin, end;
    check_cuda(cudaEventCreate(&begin), "cudaEventCreate");
    check_cuda(cudaEventCreate(&end), "cudaEventCreate");
    const auto once = [&] {
        float ms;
        check_cuda(cudaEventRecord(begin), "cudaEventRecord");
        run();
        check_cuda(cudaEventRecord(end), "cudaEventRecord");
        check_cuda(cudaEventSynchronize(end), "run");
        check_cuda(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
        return ms;
    };
    once();  // loads the kernel
    std::vector<float> times(std::clamp(static_cast<int>(100 / once()), 3, 20));
    for (auto& ms : times) ms = once();
    cudaEventDestroy(begin), cudaEventDestroy(end);
    std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
    return times[times.size() / 2];
}

static void timing_table(const Library& lib, bool quick) {
    // inputs and times of the reference are the same for every step
    static std::map<std::array<int, 4>, std::unique_ptr<Problem>> problems;
    static std::map<std::array<int, 4>, float> standard;
    const int d = lib.head_dim() ? lib.head_dim() : 64;
    printf("| Seq Len | Batch | Heads | Flash (ms) | Ref (ms) | Speedup | TFLOP/s |\n|---|---|---|---|---|---|---|\n");
    constexpr std::array<int, 3> shapes[] = {{128, 1, 1}, {512, 1, 1}, {1024, 1, 1}, {2048, 1, 1}, {512, 2, 8}, {4096, 2, 16}};
    for (const auto& [s, batch, heads] : shapes) {
        if (quick && s > 2048) continue;
        auto& problem = problems[{s, batch, heads, d}];
        if (!problem) problem = std::make_unique<Problem>(batch, heads, s, s, d);
        Problem& p = *problem;
        float& reference = standard[{s, batch, heads, d}];
        if (reference == 0.0f) {
            float* scores = static_cast<float*>(p.upload(nullptr, sizeof(float) * batch * heads * s * s));
            reference = time_ms([&] { standard_attention(p.args, scores); });
        }
        const float flash = time_ms([&] {
            if (const char* message = lib.forward(&p.args)) fail("%s", message);
        });
        printf("| %d | %d | %d | %.4f | %.4f | %.1fx | %.1f |\n", s, batch, heads, flash, reference, reference / flash,
               4.0 * batch * heads * s * s * d / flash / 1e9);
    }
}

static bool run_library(const char* path, const char* mode) {
    const Library lib = open_library(path);
    const int d = lib.head_dim() ? lib.head_dim() : 64;
    printf("%s: %s, head_dim %d\n", path, lib.idea(), d);
    if (!strcmp(mode, "--once")) {
        Problem p(2, 16, 4096, 4096, d);
        call(lib.forward, p.args);
        return true;
    }
    bool good = true;
    for (const auto& [b, h, m, n] : {std::array{2, 2, 128, 128}, {1, 2, 100, 150}, {1, 1, 150, 70}, {1, 3, 1, 65}}) {
        good &= check_problem(lib, b, h, m, n, d, false, 0.0);
        if (lib.can() & 8) good &= check_problem(lib, b, h, m, n, d, true, 0.0);
        if (lib.can() & 16) good &= check_problem(lib, b, h, m, n, d, true, 0.3);
    }
    if (strcmp(mode, "--check")) timing_table(lib, !strcmp(mode, "--quick"));
    return good;
}

int main(int count, char** words) {
    const bool has_mode = count > 1 && !strncmp(words[1], "--", 2);
    const char* mode = has_mode ? words[1] : "";
    if (has_mode && strcmp(mode, "--quick") && strcmp(mode, "--check") && strcmp(mode, "--once")) {
        fprintf(stderr, "usage: %s [--quick | --check | --once] [library.so ...]\n", words[0]);
        return 2;
    }
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // progress shows in a file too
    bool good = true;
    try {
        int devices = 0;
        if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
            fail("no GPU here: the libraries can be built, and the emulator can run them on a CPU (make emulate)");
        std::vector<std::string> paths(words + 1 + has_mode, words + count);
        if (paths.empty()) {
            glob_t found;
            if (glob(DEFAULT_LIBRARIES "/*.so", 0, nullptr, &found))
                fail("no library in %s: run make here first, or name the libraries", DEFAULT_LIBRARIES);
            paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
            globfree(&found);
        }
        for (const auto& path : paths) good &= run_library(path.c_str(), mode);
    } catch (const std::exception& e) {
        fprintf(stderr, "error: %s\n", e.what());
        return 1;
    }
    return good ? 0 : 1;
}
