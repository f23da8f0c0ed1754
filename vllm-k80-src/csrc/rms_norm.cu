// RMS normalization, with and without the addition of a residual.
//
//   y[t, h] = x[t, h] / sqrt(mean_h(x[t, h]^2) + eps) * weight[h]
//
// x, residual, y: [tokens, hidden], row-major and contiguous, FP32 or FP16 (T).
// weight: [hidden] in the same type. One block of 256 threads a token; any hidden size.
// All arithmetic is FP32. The fused form writes x + residual to `sum` and normalizes the
// sum before it is rounded.
#include <cuda_fp16.h>

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ float load(const float* p, int i) { return __ldg(p + i); }
__device__ float load(const __half* p, int i) {
  return __half2float(__ushort_as_half(__ldg(reinterpret_cast<const unsigned short*>(p) + i)));
}
__device__ void store(float* p, int i, float v) { p[i] = v; }
__device__ void store(__half* p, int i, float v) { p[i] = __float2half(v); }

// Sum over the block; every thread gets it.
__device__ float block_sum(float v) {
  __shared__ float partial[kWarps];
  for (int offset = 16; offset; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = v;
  __syncthreads();
  float total = 0.f;
  for (int warp = 0; warp < kWarps; ++warp) total += partial[warp];
  return total;
}

template <typename T, bool kAdd>
__device__ void normalize(const T* x, const T* residual, const T* weight, T* y, T* sum, int hidden,
                          float eps) {
  const size_t row = static_cast<size_t>(blockIdx.x) * hidden;
  float squares = 0.f;
  for (int i = threadIdx.x; i < hidden; i += kThreads) {
    float v = load(x + row, i);
    if (kAdd) v += load(residual + row, i);
    squares = fmaf(v, v, squares);
  }
  const float factor = rsqrtf(block_sum(squares) / hidden + eps);
  for (int i = threadIdx.x; i < hidden; i += kThreads) {
    float v = load(x + row, i);
    if (kAdd) {
      v += load(residual + row, i);
      store(sum + row, i, v);
    }
    store(y + row, i, v * factor * load(weight, i));
  }
}

}  // namespace

#define RMS_NORM(NAME, T)                                                                        \
  extern "C" __global__ void __launch_bounds__(kThreads) rms_norm_##NAME(                        \
      const T* x, const T* weight, T* y, int hidden, float eps) {                                \
    normalize<T, false>(x, nullptr, weight, y, nullptr, hidden, eps);                            \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads) fused_add_rms_norm_##NAME(              \
      const T* x, const T* residual, const T* weight, T* y, T* sum, int hidden, float eps) {     \
    normalize<T, true>(x, residual, weight, y, sum, hidden, eps);                                \
  }

RMS_NORM(f32, float)
RMS_NORM(f16, __half)
