// What lies between the products and attention: rotary position embedding and activations.
//
//   rotary_embedding_{f32,f16}       query and key of a token rotated in place
//   rotary_and_cache_{f32,f16}       the query rotated in place, the key into the paged cache, and
//                                    the value beside it
//   silu_and_mul_{f32,f16,f32_f16}   y[t, i] = silu(x[t, i]) * x[t, columns + i]; f32_f16 of an FP32
//                                    x, a product that is rounded only now
//   gelu_and_mul_..., gelu_tanh_and_mul_...      the same with GELU, exact or by tanh
//   gelu_tanh_..., gelu_quick_...    y[t, i] = gelu(x[t, i])
//
// T is FP32 or FP16, row-major; all arithmetic is FP32. A block of 256 threads takes a part of one
// token: blockIdx.x is the token, blockIdx.y the part, so that one token fills the die too.
// Formulas: vllm_k80/ops/reference.py.
#include <cuda_fp16.h>

namespace layers {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float load(const float* p) { return __ldg(p); }
__device__ __forceinline__ float load(const __half* p) {
  return __half2float(__ushort_as_half(__ldg(reinterpret_cast<const unsigned short*>(p))));
}
// What the same kernel writes must not go through the read-only cache.
__device__ __forceinline__ float own(const float* p) { return *p; }
__device__ __forceinline__ float own(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float v) { *p = v; }
__device__ __forceinline__ void store(__half* p, float v) { *p = __float2half(v); }

// A warp rotates the first `rotary` elements of a head `from`, into `to`, which may be the same.
// A lane takes a pair of elements: i and i + rotary / 2 (NeoX), or 2 i and 2 i + 1. A position
// that is not in the cache gives NaN: it cannot be reported from here, and must not pass for a
// result.
template <class T>
__device__ __forceinline__ void rotate_head(const T* from, T* to, long long position,
                                            const T* cache, int rotary, int cached, int neox) {
  const bool known = position >= 0 && position < cached;
  const T* row = cache + (known ? position : 0) * rotary;
  const int half = rotary / 2;
  for (int i = threadIdx.x & 31; i < half; i += 32) {
    const int first = neox ? i : 2 * i, second = first + (neox ? half : 1);
    const float cos = known ? load(row + i) : nanf(""), sin = load(row + half + i);
    const float a = own(from + first), b = own(from + second);
    store(to + first, a * cos - b * sin);
    store(to + second, b * cos + a * sin);
  }
}

// positions [tokens]; query and key: rows of `heads` and `key_heads` heads of `head_size`, rows
// query_stride and key_stride elements apart; cache [cached, rotary]: cos, then sin, each
// rotary / 2 columns. A warp takes a head.
template <class T>
__device__ __forceinline__ void rotate(const long long* positions, T* query, T* key,
                                       const T* cache, int heads, int key_heads, int head_size,
                                       int rotary, int query_stride, int key_stride, int cached,
                                       int neox) {
  const int head = blockIdx.y * kWarps + (threadIdx.x >> 5);
  if (head >= heads + key_heads) return;
  T* x = head < heads
             ? query + static_cast<size_t>(blockIdx.x) * query_stride + head * head_size
             : key + static_cast<size_t>(blockIdx.x) * key_stride + (head - heads) * head_size;
  const long long position = __ldg(positions + blockIdx.x);
  rotate_head(x, x, position, cache, rotary, cached, neox);
}

// The same with `value` and a paged cache [2, cache_slots, key_heads, head_size], keys and then
// values; attention.cu says more of it. Warps past the key's heads copy the value's. A token whose
// slot is not in the cache (-1 pads a batch) leaves nothing there.
template <class T>
__device__ __forceinline__ void rotate_and_cache(const long long* positions, T* query, const T* key,
                                                 const T* value, const T* cache, T* kv_cache,
                                                 const long long* slots, int heads, int key_heads,
                                                 int head_size, int rotary, int query_stride,
                                                 int key_stride, int value_stride, int cached,
                                                 int cache_slots, int neox) {
  const int head = blockIdx.y * kWarps + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (head >= heads + 2 * key_heads) return;
  const size_t token = blockIdx.x;
  const long long position = __ldg(positions + token);
  if (head < heads) {
    T* x = query + token * query_stride + head * head_size;
    rotate_head(x, x, position, cache, rotary, cached, neox);
    return;
  }
  const long long slot = __ldg(slots + token);
  if (slot < 0 || slot >= cache_slots) return;
  const bool is_key = head < heads + key_heads;
  const int at = (head - heads - (is_key ? 0 : key_heads)) * head_size;
  const T* from = is_key ? key + token * key_stride + at : value + token * value_stride + at;
  T* to = kv_cache + (slot + (is_key ? 0 : cache_slots)) * key_heads * head_size + at;
  if (is_key) rotate_head(from, to, position, cache, rotary, cached, neox);
  for (int i = (is_key ? rotary : 0) + lane; i < head_size; i += 32) to[i] = from[i];
}

struct Silu {
  static __device__ __forceinline__ float of(float v) { return v / (1.f + expf(-v)); }
};
struct Gelu {
  static __device__ __forceinline__ float of(float v) {
    return 0.5f * v * (1.f + erff(v * 0.70710678f));  // 1 / sqrt(2)
  }
};
struct GeluTanh {
  static __device__ __forceinline__ float of(float v) {
    return 0.5f * v * (1.f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));  // sqrt(2 / pi)
  }
};
struct GeluQuick {
  static __device__ __forceinline__ float of(float v) { return v / (1.f + expf(-1.702f * v)); }
};

// kGated: x has two halves of `columns` columns, of which the second is a factor.
template <class T, class Y, class Function, bool kGated>
__device__ __forceinline__ void activate(const T* x, Y* y, int columns) {
  const int i = blockIdx.y * kThreads + threadIdx.x;
  if (i >= columns) return;
  const T* from = x + static_cast<size_t>(blockIdx.x) * columns * (kGated ? 2 : 1) + i;
  float v = Function::of(load(from));
  if (kGated) v *= load(from + columns);
  store(y + static_cast<size_t>(blockIdx.x) * columns + i, v);
}

}  // namespace layers

#define ROTARY_EMBEDDING(NAME, T)                                                                  \
  extern "C" __global__ void __launch_bounds__(layers::kThreads) rotary_embedding_##NAME(          \
      const long long* positions, T* query, T* key, const T* cache, int heads, int key_heads,      \
      int head_size, int rotary, int query_stride, int key_stride, int cached, int neox) {         \
    layers::rotate(positions, query, key, cache, heads, key_heads, head_size, rotary,              \
                   query_stride, key_stride, cached, neox);                                        \
  }
#define ROTARY_AND_CACHE(NAME, T)                                                                  \
  extern "C" __global__ void __launch_bounds__(layers::kThreads) rotary_and_cache_##NAME(          \
      const long long* positions, T* query, const T* key, const T* value, const T* cache,          \
      T* kv_cache, const long long* slots, int heads, int key_heads, int head_size, int rotary,    \
      int query_stride, int key_stride, int value_stride, int cached, int cache_slots, int neox) { \
    layers::rotate_and_cache(positions, query, key, value, cache, kv_cache, slots, heads,          \
                             key_heads, head_size, rotary, query_stride, key_stride, value_stride, \
                             cached, cache_slots, neox);                                           \
  }
#define ACTIVATION_TO(NAME, T, Y, FUNCTION, GATED)                                                 \
  extern "C" __global__ void __launch_bounds__(layers::kThreads)                                   \
      NAME(const T* x, Y* y, int columns) {                                                        \
    layers::activate<T, Y, layers::FUNCTION, GATED>(x, y, columns);                                \
  }
#define ACTIVATION(NAME, SUFFIX, T, FUNCTION, GATED)                                               \
  ACTIVATION_TO(NAME##_##SUFFIX, T, T, FUNCTION, GATED)
#define LAYERS_ALL(SUFFIX, T)                                  \
  ROTARY_EMBEDDING(SUFFIX, T)                                  \
  ROTARY_AND_CACHE(SUFFIX, T)                                  \
  ACTIVATION(silu_and_mul, SUFFIX, T, Silu, true)              \
  ACTIVATION(gelu_and_mul, SUFFIX, T, Gelu, true)              \
  ACTIVATION(gelu_tanh_and_mul, SUFFIX, T, GeluTanh, true)     \
  ACTIVATION(gelu_tanh, SUFFIX, T, GeluTanh, false)            \
  ACTIVATION(gelu_quick, SUFFIX, T, GeluQuick, false)

LAYERS_ALL(f32, float)
LAYERS_ALL(f16, __half)
ACTIVATION_TO(silu_and_mul_f32_f16, float, __half, Silu, true)
