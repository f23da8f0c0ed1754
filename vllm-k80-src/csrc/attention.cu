// Attention over the paged cache of keys and values, and the writing of that cache.
//
//   reshape_and_cache_{f16,f32}                  new keys and values into the cache
//   paged_attention_{f16,f32}_d{64,128,256}_h{1,4,8}   decode
//   varlen_attention_{f16,f32}_d{64,128,256}     prefill and chunked prefill
//
// f16, f32: what the cache holds. d: the head sizes, multiples of 8, that a kernel is laid out
// for: up to 64, 128, 256. h: query heads that a block takes of those that share a key head.
//
//   query [tokens, heads, head_size], FP32 or FP16 (flag kHalfQuery), `query_stride` elements
//         from token to token, each 16 (FP16: 8) byte aligned.
//   cache [2, blocks, block_size, kv_heads, head_size], keys and then values, 16-byte aligned.
//         block_size is 1 << block_shift.
//   out   [tokens, heads, head_size], contiguous, FP32 or FP16 (kHalfOut).
//   seq_lens [sequences] int32, keys of each sequence in the cache.
//   table [sequences, table_width] int32, `table_stride` from row to row: its blocks in order.
//   slopes [heads] FP32 of ALiBi (arXiv:2108.12409) or null.
//   scale multiplies the scores, which then go through cap * tanh(score / cap) unless cap is 0. A
//   query sees the last `window` keys up to its own, or all if that is 0.
//
// Nothing here is bounded by what the host knew: lengths and tables are read on the device, and a
// length beyond the table or a block beyond the cache is cut to it, so that no bad value reads
// outside. All arithmetic is FP32. Softmax is the online one (arXiv:1805.02867), on powers of two.
//
// Predicted by tools/smx.py for 32 heads of 128 over 2048 tokens, in microseconds, with the
// memory's bound in brackets: decode of one sequence with 8 key heads 63 (48), of which 3 are the
// launch and 4 the combination of its splits, which took 7 as a kernel of its own; with 32 key heads
// 207 (192); of 8 sequences with 8 key heads 402 (385). What remains above the bound for one short
// sequence is the beginning and end of blocks, which nothing overlaps: with warps added up one
// after the other it was 7 more, and 11 or 16 splits in place of 8 cost 3 and 6 more. Prefill of 512 tokens with 8 key heads takes 1245,
// half of the FP32 units' speed on what causality leaves; it is bound mostly by shared memory,
// which it asks for 24 words for 128 multiplications at best.
#include <cuda_fp16.h>
#include <float.h>

namespace attention {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kHalfQuery = 1, kHalfOut = 2;  // flags
constexpr float kLog2e = 1.44269504f;
constexpr float kNone = -FLT_MAX;  // the maximum of no scores
constexpr int kSplitKeys = 32;  // a split's keys are a multiple of it

// What the kernels are told of the tensors: see above.
struct Batch {
  // group: query heads that share a key head.
  const int* seq_lens;
  const int* table;
  const float* slopes;
  int kv_heads, group, head_size, query_stride, blocks, block_shift, table_width, table_stride;
  int window, flags;
  float scale, cap;

  __device__ int length(int sequence) const {
    return max(0, min(__ldg(seq_lens + sequence), table_width << block_shift));
  }
  // The cache's row, of kv_heads heads, that holds a key of a sequence.
  __device__ unsigned row(int sequence, int key) const {
    const int* entry = table + static_cast<size_t>(sequence) * table_stride + (key >> block_shift);
    const unsigned block = min(static_cast<unsigned>(__ldg(entry)), blocks - 1u);
    return (block << block_shift) + (key & ((1 << block_shift) - 1));
  }
  __device__ size_t values() const {  // from the keys to the values, in elements
    return (static_cast<size_t>(blocks) << block_shift) * kv_heads * head_size;
  }
};

// Of numbers that are not negative, which costs less than of any.
__device__ __forceinline__ int divide(int a, int b) {
  return static_cast<unsigned>(a) / static_cast<unsigned>(b);
}

__device__ __forceinline__ float2 pair(unsigned bits) {
  return make_float2(__half2float(__ushort_as_half(bits & 0xffffu)),
                     __half2float(__ushort_as_half(bits >> 16)));
}

// Four neighbours, as they are loaded: loads come first and wait together.
template <class T>
struct Four;
template <>
struct Four<float> {
  float4 v;
  __device__ __forceinline__ void load(const float* p) {
    v = __ldg(reinterpret_cast<const float4*>(p));
  }
  __device__ __forceinline__ float4 unpack() const { return v; }
};
template <>
struct Four<__half> {
  uint2 q;
  __device__ __forceinline__ void load(const __half* p) {
    q = __ldg(reinterpret_cast<const uint2*>(p));
  }
  __device__ __forceinline__ float4 unpack() const {
    const float2 a = pair(q.x), b = pair(q.y);
    return make_float4(a.x, a.y, b.x, b.y);
  }
};
template <class T>
__device__ __forceinline__ float4 quad(const T* p) {
  Four<T> four;
  four.load(p);
  return four.unpack();
}
__device__ __forceinline__ float4 quad(const void* p, bool half, size_t at) {
  return half ? quad(static_cast<const __half*>(p) + at) : quad(static_cast<const float*>(p) + at);
}
__device__ __forceinline__ unsigned bits(float a, float b) {
  return __half_as_ushort(__float2half(a)) |
         static_cast<unsigned>(__half_as_ushort(__float2half(b))) << 16;
}
__device__ __forceinline__ void put(float* p, const float4& v) {
  *reinterpret_cast<float4*>(p) = v;
}
__device__ __forceinline__ void put(__half* p, const float4& v) {
  *reinterpret_cast<uint2*>(p) = make_uint2(bits(v.x, v.y), bits(v.z, v.w));
}

// Eight neighbours of a row of the cache, as they are loaded.
template <class T>
struct Eight;
template <>
struct Eight<__half> {
  uint4 q;
  __device__ __forceinline__ void load(const __half* p) {
    q = __ldg(reinterpret_cast<const uint4*>(p));
  }
  __device__ __forceinline__ void unpack(float* v) const {
    const float2 a = pair(q.x), b = pair(q.y), c = pair(q.z), d = pair(q.w);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
  }
};
template <>
struct Eight<float> {
  float4 a, b;
  __device__ __forceinline__ void load(const float* p) { a = quad(p), b = quad(p + 4); }
  __device__ __forceinline__ void unpack(float* v) const {
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  }
};

// ---- the cache

// Block x writes the key of token x, or with y = 1 its value. A slot outside of the cache (-1 pads
// a batch) is skipped.
template <class KV>
__device__ __forceinline__ void cache_token(const void* key, const void* value, KV* cache,
                                            const long long* slots, int key_stride,
                                            int value_stride, int width, long long cache_slots,
                                            bool half) {
  const long long slot = __ldg(slots + blockIdx.x);
  if (slot < 0 || slot >= cache_slots) return;
  const void* from = blockIdx.y ? value : key;
  const size_t at = static_cast<size_t>(blockIdx.x) * (blockIdx.y ? value_stride : key_stride);
  KV* to = cache + (slot + (blockIdx.y ? cache_slots : 0)) * width;
  for (int i = 4 * threadIdx.x; i < width; i += 4 * blockDim.x)
    put(to + i, quad(from, half, at + i));
}

// ---- decode
//
// A block takes a split of one sequence's keys for kHeads query heads of one key head. Each of its
// warps goes through its own part with an online softmax of its own, and they are put together at
// the end. kLanes lanes share a row of the cache, eight elements each, so that a load is coalesced
// and a warp loads 32 / kLanes rows at once. A step is kUnroll such loads of keys and of values.
// The products with the keys are summed over the lanes in such a way that each lane ends with one
// or few of the scores, on which it then works alone; the weights go to all lanes through shared
// memory.

// Which of a sequence's keys a split takes: those that are seen, in equal parts.
struct Split {
  int first, keys, part;
  __device__ Split(int length, int window, int splits) {
    first = window && length > window ? length - window : 0;
    keys = length - first;
    part = max(1, divide(keys + splits * kSplitKeys - 1, splits * kSplitKeys)) * kSplitKeys;
  }
};

// Sums of kCount values (a power of two) over each kLanes lanes. Lane l of them gets the sums of
// values l * kCount / kLanes and following or, if there are more lanes than values, of value
// l / (kLanes / kCount).
template <int kCount, int kLanes>
__device__ __forceinline__ void sums(float* v, int lane) {
  int count = kCount;
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) {
    if (count == 1) {
      v[0] += __shfl_xor_sync(kAll, v[0], offset);
      continue;
    }
    count /= 2;
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= count) continue;
      const float keep = upper ? v[i + count] : v[i];
      const float give = upper ? v[i] : v[i + count];
      v[i] = keep + __shfl_xor_sync(kAll, give, offset);
    }
  }
}

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;

// Of each (sequence, tile of heads) the splits that have left their results, in a launch under way;
// zero between launches. vllm_k80/ops/attention_kernels.py splits no batch that needs more of them.
// Launches that run side by side would share them: those of a device follow each other.
constexpr int kCounters = 16384;
__device__ unsigned arrivals[kCounters];

// The splits of head0 and the heads after it, `taken` of them, into their results, by a block of
// kDecodeThreads. Other blocks wrote them just now: they are read past the caches of this SMX.
template <int kQuads>
__device__ __forceinline__ void combine(const float* partial, void* __restrict__ out, int head0,
                                        int taken, int head_size, int splits, int used,
                                        int flags) {
  const int size = head_size + 4;
  for (int item = threadIdx.x; item < taken * kQuads; item += kDecodeThreads) {
    const int head = head0 + item / kQuads, i = item % kQuads * 4;
    if (i >= head_size) continue;
    const float* from = partial + static_cast<size_t>(head) * splits * size;
    constexpr int kBatch = 8;  // loads that wait together
    float most = kNone, total = 0.f;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int first = 0; first < used; first += kBatch) {
      float4 v[kBatch];
      float2 of_split[kBatch];
#pragma unroll
      for (int s = 0; s < kBatch; ++s) {
        const float* part = from + min(first + s, used - 1) * size;
        v[s] = __ldcg(reinterpret_cast<const float4*>(part + i));
        of_split[s] = __ldcg(reinterpret_cast<const float2*>(part + head_size));
      }
      float larger = most;
#pragma unroll
      for (int s = 0; s < kBatch; ++s) larger = fmaxf(larger, of_split[s].x);
      const float shrink = exp2f(most - larger);
      most = larger, total *= shrink;
      sum = make_float4(sum.x * shrink, sum.y * shrink, sum.z * shrink, sum.w * shrink);
#pragma unroll
      for (int s = 0; s < kBatch; ++s) {
        const float factor = first + s < used ? exp2f(of_split[s].x - most) : 0.f;
        total = fmaf(factor, of_split[s].y, total);
        sum = make_float4(fmaf(factor, v[s].x, sum.x), fmaf(factor, v[s].y, sum.y),
                          fmaf(factor, v[s].z, sum.z), fmaf(factor, v[s].w, sum.w));
      }
    }
    const float4 v = make_float4(sum.x / total, sum.y / total, sum.z / total, sum.w / total);
    const size_t at = static_cast<size_t>(head) * head_size + i;
    if (flags & kHalfOut)
      put(static_cast<__half*>(out) + at, v);
    else
      put(static_cast<float*>(out) + at, v);
  }
}

// partial, if there are several splits: of each (sequence, head, split) head_size sums, the largest
// score, the sum of the weights, and two unused to keep them aligned.
template <class KV, int kLanes, int kHeads, int kUnroll>
__device__ __forceinline__ void decode(const Batch& batch, const void* __restrict__ query,
                                       const KV* __restrict__ cache, void* __restrict__ out,
                                       float* __restrict__ partial, int splits) {
  constexpr int kRows = 32 / kLanes;
  constexpr int kKeys = kRows * kUnroll;  // of a step
  constexpr int kScores = kUnroll * kHeads;
  constexpr int kHeld = kScores > kLanes ? kScores / kLanes : 1;   // scores of a lane
  constexpr int kShare = kScores < kLanes ? kLanes / kScores : 1;  // lanes that hold the same one
  static_assert(kHeld <= kHeads && kKeys <= 32, "");
  __shared__ __align__(16) float weights[kDecodeWarps][kKeys + 1][kHeads];  // and a factor each
  __shared__ float tops[kDecodeWarps][kHeads], totals[kDecodeWarps][kHeads];
  __shared__ float4 mixed[kDecodeWarps][kHeads][2 * kLanes];

  // Block (x, y, z): a tile of query heads, a split, a sequence. Queries are loaded before the
  // length is used, so that nothing waits for one and then for the other.
  const int sequence = blockIdx.z, length = batch.length(sequence);
  const int tiles = (batch.group + kHeads - 1) / kHeads;
  const int kv_head = kHeads > 1 ? divide(blockIdx.x, tiles) : blockIdx.x;
  const int tile = kHeads > 1 ? blockIdx.x - kv_head * tiles : 0;
  const int head0 = kv_head * batch.group + tile * kHeads, heads = batch.kv_heads * batch.group;
  const int taken = min(kHeads, batch.group - tile * kHeads);

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int piece = lane % kLanes, row_of_load = lane / kLanes;
  // Lanes past the end of a row repeat its last eight elements; their query is zero.
  const int element = min(8 * piece, batch.head_size - 8);
  float q[kHeads][8], acc[kHeads][8];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = head0 + min(h, taken - 1);
    const int at = sequence * batch.query_stride + head * batch.head_size + element;
    const bool half = batch.flags & kHalfQuery;
    put(q[h], quad(query, half, at));
    put(q[h] + 4, quad(query, half, at + 4));
  }
  const Split split(length, batch.window, splits);
  const int begin = split.first + blockIdx.y * split.part, end = min(length, begin + split.part);
  if (begin >= end && blockIdx.y) return;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      q[h][i] *= element == 8 * piece ? batch.scale : 0.f;
      acc[h][i] = 0.f;
    }
  }
  // Of the scores that this lane holds: which they are, the largest so far, their weight.
  const int score0 = kShare > 1 ? piece / kShare : piece * kHeld;
  const int key_of_score = score0 / kHeads * kRows + row_of_load, head_of_score = score0 % kHeads;
  float top[kHeld], total[kHeld], slope[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    top[i] = kNone, total[i] = 0.f, slope[i] = 0.f;
    if (batch.slopes) slope[i] = __ldg(batch.slopes + min(head0 + head_of_score + i, heads - 1));
  }

  const size_t row_size = static_cast<size_t>(batch.kv_heads) * batch.head_size;
  const KV* keys = cache + kv_head * batch.head_size + element;
  const KV* values = keys + batch.values();
  int base = begin + warp * kKeys;
  unsigned row = 0;  // lane l has that of key base + l
  if (base < end) row = batch.row(sequence, min(base + lane % kKeys, end - 1));
#pragma unroll 1
  for (; base < end; base += kDecodeWarps * kKeys) {
    Eight<KV> k[kUnroll], v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const size_t at = __shfl_sync(kAll, row, u * kRows + row_of_load) * row_size;
      k[u].load(keys + at);
      v[u].load(values + at);
    }
    const int next = base + kDecodeWarps * kKeys;
    row = batch.row(sequence, min(next + lane % kKeys, end - 1));

    float s[kScores];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[8];
      k[u].unpack(x);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float sum = q[h][0] * x[0];
#pragma unroll
        for (int i = 1; i < 8; ++i) sum = fmaf(q[h][i], x[i], sum);
        s[u * kHeads + h] = sum;
      }
    }
    sums<kScores, kLanes>(s, piece);

    const int key = base + key_of_score;
    float larger[kHeld];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (batch.cap != 0.f) s[i] = batch.cap * tanhf(s[i] / batch.cap);
      s[i] = kLog2e * fmaf(slope[i], static_cast<float>(key - length + 1), s[i]);
      if (key >= end) s[i] = -INFINITY;
      float most = s[i];
#pragma unroll
      for (int offset = kShare * kHeads / kHeld; offset < 32; offset *= 2)
        most = fmaxf(most, __shfl_xor_sync(kAll, most, offset));
      larger[i] = fmaxf(most, top[i]);
      grew = grew || larger[i] > top[i];
    }
    float* mine = weights[warp][0];
    if (__any_sync(kAll, grew)) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const float factor = exp2f(top[i] - larger[i]);
        top[i] = larger[i];
        total[i] *= factor;
        mine[kKeys * kHeads + head_of_score + i] = factor;
      }
      __syncwarp();
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float factor = mine[kKeys * kHeads + h];
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[h][i] *= factor;
      }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float weight = exp2f(s[i] - top[i]);
      total[i] += weight;
      mine[key_of_score * kHeads + head_of_score + i] = weight;
    }
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float x[8], weight[kHeads];
      v[u].unpack(x);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) weight[h] = mine[(u * kRows + row_of_load) * kHeads + h];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[h][i] = fmaf(weight[h], x[i], acc[h][i]);
      }
    }
    __syncwarp();
  }

  // The warps' results, each with a maximum of its own, into one.
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
#pragma unroll
    for (int offset = kShare * kHeads / kHeld; offset < 32; offset *= 2)
      total[i] += __shfl_xor_sync(kAll, total[i], offset);
    tops[warp][head_of_score + i] = top[i];
    totals[warp][head_of_score + i] = total[i];
  }
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int offset = kLanes; offset < 32; offset *= 2)
        acc[h][i] += __shfl_xor_sync(kAll, acc[h][i], offset);
    }
    if (row_of_load) continue;
#pragma unroll
    for (int i = 0; i < 8; i += 4)
      mixed[warp][h][i / 4 * kLanes + piece] =
          make_float4(acc[h][i], acc[h][i + 1], acc[h][i + 2], acc[h][i + 3]);
  }
  __syncthreads();
  constexpr int kQuads = 2 * kLanes;  // of a head; the first and the second of each lane apart
  for (int item = threadIdx.x; item < taken * kQuads; item += kDecodeThreads) {
    const int h = item / kQuads, i = 8 * (item % kLanes) + item % kQuads / kLanes * 4;
    if (i >= batch.head_size) continue;
    float most = tops[0][h], all = 0.f;
#pragma unroll
    for (int w = 1; w < kDecodeWarps; ++w) most = fmaxf(most, tops[w][h]);
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float factor = exp2f(tops[w][h] - most);
      const float4 part = mixed[w][h][item % kQuads];
      all = fmaf(factor, totals[w][h], all);
      v = make_float4(fmaf(factor, part.x, v.x), fmaf(factor, part.y, v.y),
                      fmaf(factor, part.z, v.z), fmaf(factor, part.w, v.w));
    }
    const int head = sequence * heads + head0 + h;
    if (split.keys > split.part) {
      const size_t slot = static_cast<size_t>(head) * splits + blockIdx.y;
      float* to = partial + slot * (batch.head_size + 4);
      put(to + i, v);
      if (!i) put(to + batch.head_size, make_float4(most, all, 0.f, 0.f));
    } else {
      const float inverse = split.keys ? 1.f / all : 0.f;
      v = make_float4(v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse);
      const size_t at = static_cast<size_t>(head) * batch.head_size + i;
      if (batch.flags & kHalfOut)
        put(static_cast<__half*>(out) + at, v);
      else
        put(static_cast<float*>(out) + at, v);
    }
  }
  if (split.keys <= split.part) return;

  // The last split to arrive combines all, in the order of the keys whichever it is.
  __shared__ unsigned before;  // how many were there
  __threadfence();  // results are there before their arrival is counted
  __syncthreads();
  const unsigned used = divide(split.keys + split.part - 1, split.part);
  if (!threadIdx.x) {
    // The last arrival wraps the counter to zero: for the next launch, or replay of a graph.
    before = atomicInc(arrivals + blockIdx.z * gridDim.x + blockIdx.x, used - 1);
    __threadfence();  // the others' results are read after it
  }
  __syncthreads();
  if (before == used - 1)
    combine<kQuads>(partial, out, sequence * heads + head0, taken, batch.head_size, splits, used,
                    batch.flags);
}

// ---- prefill
//
// A block takes a tile of the rows (query, head) of one sequence and key head: all query heads that
// share the key head, so that they share its loads. It goes through the keys in tiles of 64 with an
// online softmax, as two products of matrices: scores = queries x keys and result += weights x
// values. A thread has kRows x 8 of the scores and kRows x kSize / 8 of the result in registers.
// What it multiplies is staged in shared memory in pieces: 16 elements of the queries and keys,
// transposed, and some rows of the values. The weights are not: the eight lanes that share a row
// take them from each other by shuffles, which cost what reading them would.

constexpr int kPrefillThreads = 64;
constexpr int kTileKeys = 64;
constexpr int kDepth = 16;
constexpr int kStaged = 2176;  // floats: two pieces of kDepth x 64 and their padding

// Position of element `depth` of column `column` in a staged piece of `width` columns: quads of
// elements are padded so that eight lanes that store quads of two columns hit different banks.
__device__ __forceinline__ constexpr int staged_at(int width, int depth, int column) {
  return depth * width + depth / 4 * 8 + column;
}

// Which column of a tile lane `tx` of a row has as its number `j`; rows alike. Reads of four
// columns by eight lanes hit different banks so.
__device__ __forceinline__ constexpr int column_of(int tx, int j) {
  return j / 4 * 32 + tx * 4 + j % 4;
}

template <class KV, int kSize, int kRows>
__device__ __forceinline__ void prefill(const Batch& batch, const void* __restrict__ query,
                                        const KV* __restrict__ cache, void* __restrict__ out,
                                        const int* __restrict__ starts, int tokens) {
  constexpr int kTile = 8 * kRows;
  constexpr int kKeys = kTileKeys / 8;  // of a thread
  constexpr int kQuads = kSize / 32;    // of the result, a thread
  constexpr int kValueKeys = 2048 / kSize, kValueStep = kPrefillThreads * 4 / kSize;
  __shared__ float4 memory[kStaged / 4];
  __shared__ int query_at[kTile], out_at[kTile], position[kTile];
  __shared__ float slope[kTile];
  __shared__ float2 state[kTile];            // of a row: its largest score and its weight so far
  __shared__ const KV* key_rows[kTileKeys];  // in order of the lanes that take them, eight each
  float* staged_query = reinterpret_cast<float*>(memory);
  float* staged_key = staged_query + staged_at(kTile, kDepth, 0);
  float* staged_value = staged_query;

  // Block (x, y, z): a key head, a tile from the last on, a sequence.
  const int kv_head = blockIdx.x, sequence = blockIdx.z;
  const int group = batch.group, heads = batch.kv_heads * group;
  const int start = max(0, min(__ldg(starts + sequence), tokens));
  const int queries = min(__ldg(starts + sequence + 1), tokens) - start;
  const int before = batch.length(sequence) - queries;  // keys before the first query
  const int rows = queries * group;
  const int lane = threadIdx.x & 31, tx = threadIdx.x & 7, ty = threadIdx.x >> 3;
  // What this thread stages: of queries and keys quad `part` of a piece, and every 16th column; of
  // values a quad that begins at `dim`, and every kValueStep'th row. `slot` is the column's in
  // key_rows: 16 columns on are 32 slots, 32 columns on are 4.
  const int part = threadIdx.x & 3, column = threadIdx.x >> 2, slot = column / 4 * 8 + column % 4;
  const int dim = threadIdx.x % (kSize / 4) * 4, value_row = threadIdx.x / (kSize / 4);
  const size_t row_size = static_cast<size_t>(batch.kv_heads) * batch.head_size;
  const KV* keys = cache + kv_head * batch.head_size;

  // The longest first, so that the last to start are short.
  const int row0 = ((rows + kTile - 1) / kTile - 1 - static_cast<int>(blockIdx.y)) * kTile;
  if (row0 < 0) return;
  const int first = before + divide(row0, group);
  const int last = before + divide(min(row0 + kTile - 1, rows - 1), group);

  if (threadIdx.x < kTile) {
    const int row = min(row0 + static_cast<int>(threadIdx.x), rows - 1);
    const int token = divide(row, group), head = kv_head * group + row - token * group;
    query_at[threadIdx.x] = (start + token) * batch.query_stride + head * batch.head_size;
    out_at[threadIdx.x] = row0 + static_cast<int>(threadIdx.x) < rows
                              ? ((start + token) * heads + head) * batch.head_size
                              : -1;
    position[threadIdx.x] = before + token;
    slope[threadIdx.x] = batch.slopes ? __ldg(batch.slopes + head) : 0.f;
    state[threadIdx.x] = make_float2(kNone, 0.f);
  }
  __syncthreads();

  float acc[kRows][4 * kQuads];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) acc[r][i] = 0.f;
  }

#pragma unroll 1
  for (int key0 = batch.window ? max(0, first - batch.window + 1) : 0; key0 <= last;
       key0 += kTileKeys) {
    const int key_of_slot = key0 + column_of(threadIdx.x >> 3, threadIdx.x & 7);
    key_rows[threadIdx.x] = keys + batch.row(sequence, min(key_of_slot, last)) * row_size;
    float s[kRows][kKeys];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kKeys; ++j) s[r][j] = 0.f;
    }

#pragma unroll 1
    for (int depth = 0; depth < batch.head_size; depth += kDepth) {
      __syncthreads();
      // Past the end of a row: its last elements again, times zero.
      const int at = min(depth + 4 * part, batch.head_size - 4);
      Four<KV> k[kTileKeys / 16];
#pragma unroll
      for (int i = 0; i < kTileKeys; i += 16)
        k[i / 16].load(key_rows[slot + i / 32 * 4 + i % 32 / 4 * 8] + at);
      float4 q[kTile / 16];
      if (batch.flags & kHalfQuery) {
        Four<__half> half[kTile / 16];
#pragma unroll
        for (int i = 0; i < kTile; i += 16)
          half[i / 16].load(static_cast<const __half*>(query) + query_at[i + column] + at);
#pragma unroll
        for (int i = 0; i < kTile / 16; ++i) q[i] = half[i].unpack();
      } else {
#pragma unroll
        for (int i = 0; i < kTile; i += 16)
          q[i / 16] = quad(static_cast<const float*>(query) + query_at[i + column] + at);
      }
      const float use = at == depth + 4 * part ? 1.f : 0.f;
#pragma unroll
      for (int i = 0; i < kTileKeys; i += 16) {
        float* to = staged_key + staged_at(kTileKeys, 4 * part, i + column);
        const float4 v = k[i / 16].unpack();
        to[0] = v.x, to[kTileKeys] = v.y, to[2 * kTileKeys] = v.z, to[3 * kTileKeys] = v.w;
      }
#pragma unroll
      for (int i = 0; i < kTile; i += 16) {
        float* to = staged_query + staged_at(kTile, 4 * part, i + column);
        const float4 v = q[i / 16];
        to[0] = use * v.x, to[kTile] = use * v.y;
        to[2 * kTile] = use * v.z, to[3 * kTile] = use * v.w;
      }
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        float a[kRows], b[kKeys];
        const float* rows_at = staged_query + staged_at(kTile, d, 4 * ty);
        const float* keys_at = staged_key + staged_at(kTileKeys, d, 4 * tx);
#pragma unroll
        for (int r = 0; r < kRows; r += 4)
          put(a + r, *reinterpret_cast<const float4*>(rows_at + column_of(0, r)));
#pragma unroll
        for (int j = 0; j < kKeys; j += 4)
          put(b + j, *reinterpret_cast<const float4*>(keys_at + column_of(0, j)));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int j = 0; j < kKeys; ++j) s[r][j] = fmaf(a[r], b[j], s[r][j]);
        }
      }
    }

    if (batch.cap != 0.f || batch.slopes) {
#pragma unroll 1
      for (int r = 0; r < kRows; ++r) {  // row r is in s[0], and they all move on by one
        const int row = column_of(ty, r);
        float done[kKeys];
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
          float x = batch.scale * s[0][j];
          if (batch.cap != 0.f) x = batch.cap * tanhf(x / batch.cap);
          const int key = key0 + column_of(tx, j);
          done[j] = fmaf(slope[row], static_cast<float>(key - position[row]), x);
#pragma unroll
          for (int i = 0; i + 1 < kRows; ++i) s[i][j] = s[i + 1][j];
          s[kRows - 1][j] = done[j];
        }
      }
    }
    const float factor = batch.cap != 0.f || batch.slopes ? kLog2e : kLog2e * batch.scale;
    const bool edge = key0 + kTileKeys > first + 1 || batch.window;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = column_of(ty, r);
      const float2 old = state[row];
      const int here = edge ? position[row] : 0;
      float most = old.x, sum = 0.f;
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        s[r][j] *= factor;
        const int behind = here - (key0 + column_of(tx, j));
        if (edge && (behind < 0 || (batch.window && behind >= batch.window))) s[r][j] = -INFINITY;
        most = fmaxf(most, s[r][j]);
      }
#pragma unroll
      for (int offset = 4; offset; offset /= 2)
        most = fmaxf(most, __shfl_xor_sync(kAll, most, offset));
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        s[r][j] = exp2f(s[r][j] - most);
        sum += s[r][j];
      }
#pragma unroll
      for (int offset = 4; offset; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
      const float shrink = exp2f(old.x - most);
      __syncwarp();  // the eight lanes of a row have all read its state
      state[row] = make_float2(most, fmaf(old.y, shrink, sum));
#pragma unroll
      for (int i = 0; i < 4 * kQuads; ++i) acc[r][i] *= shrink;
    }

#pragma unroll 1
    for (int source = 0; source < 8; source += kValueKeys / 8) {
      // The keys of lanes `source` and following, eight each.
      __syncthreads();
      // Past the end of a row: its last elements again, for results that nobody takes.
      const size_t at = batch.values() + min(dim, batch.head_size - 4);
      Four<KV> v[kValueKeys / kValueStep];
#pragma unroll
      for (int i = 0; i < kValueKeys; i += kValueStep)
        v[i / kValueStep].load(key_rows[8 * source + i + value_row] + at);
#pragma unroll
      for (int i = 0; i < kValueKeys; i += kValueStep)
        put(staged_value + i * kSize + 4 * threadIdx.x, v[i / kValueStep].unpack());
      __syncthreads();
#pragma unroll 1
      for (int lanes = 0; lanes < kValueKeys / 8; ++lanes) {
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
          float v[4 * kQuads];
#pragma unroll
          for (int c = 0; c < kQuads; ++c)
            put(v + 4 * c, *reinterpret_cast<const float4*>(
                               staged_value + (8 * lanes + j) * kSize + 32 * c + 4 * tx));
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const float weight = __shfl_sync(kAll, s[r][j], (lane & 24) + source + lanes);
#pragma unroll
            for (int i = 0; i < 4 * kQuads; ++i) acc[r][i] = fmaf(weight, v[i], acc[r][i]);
          }
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = column_of(ty, r);
    const float total = state[row].y, inverse = total == 0.f ? 0.f : 1.f / total;  // 0: no key
    if (out_at[row] < 0) continue;
#pragma unroll
    for (int c = 0; c < kQuads; ++c) {
      const int at = 32 * c + 4 * tx;
      if (at >= batch.head_size) continue;
      const float4 v = make_float4(acc[r][4 * c] * inverse, acc[r][4 * c + 1] * inverse,
                                   acc[r][4 * c + 2] * inverse, acc[r][4 * c + 3] * inverse);
      if (batch.flags & kHalfOut)
        put(static_cast<__half*>(out) + out_at[row] + at, v);
      else
        put(static_cast<float*>(out) + out_at[row] + at, v);
    }
  }
}

}  // namespace attention

#define ATTENTION_BATCH                                                                           \
  const int *seq_lens, const int *table, const float *slopes, int kv_heads, int group,            \
      int head_size, int query_stride, int blocks, int block_shift, int table_width,              \
      int table_stride, int window, int flags, float scale, float cap
#define ATTENTION_MAKE_BATCH                                                                      \
  const attention::Batch batch = {seq_lens,   table,       slopes,      kv_heads,     group,      \
                                  head_size,  query_stride, blocks,     block_shift,  table_width, \
                                  table_stride, window,    flags,       scale,        cap};

#define RESHAPE_AND_CACHE(NAME, KV)                                                               \
  extern "C" __global__ void __launch_bounds__(256) reshape_and_cache_##NAME(                     \
      const void* key, const void* value, KV* cache, const long long* slots, int key_stride,      \
      int value_stride, int width, int cache_slots, int half) {                                   \
    attention::cache_token(key, value, cache, slots, key_stride, value_stride, width, cache_slots, \
                           half);                                                                 \
  }
// KV, the head size, heads, loads of a step. Bounded to one block at least, or else the compiler
// spills registers to let more fit.
#define PAGED_ATTENTION(NAME, KV, SIZE, HEADS, UNROLL)                                            \
  extern "C" __global__ void __launch_bounds__(attention::kDecodeThreads, 1)                      \
      paged_attention_##NAME##_d##SIZE##_h##HEADS(const void* query, const KV* cache, void* out,  \
                                                  float* partial, ATTENTION_BATCH, int splits) {  \
    ATTENTION_MAKE_BATCH                                                                          \
    attention::decode<KV, SIZE / 8, HEADS, UNROLL>(batch, query, cache, out, partial, splits);    \
  }
#define PAGED_ATTENTION_ALL(NAME, KV)         \
  PAGED_ATTENTION(NAME, KV, 64, 1, 4)         \
  PAGED_ATTENTION(NAME, KV, 64, 4, 4)         \
  PAGED_ATTENTION(NAME, KV, 64, 8, 2)         \
  PAGED_ATTENTION(NAME, KV, 128, 1, 4)        \
  PAGED_ATTENTION(NAME, KV, 128, 4, 4)        \
  PAGED_ATTENTION(NAME, KV, 128, 8, 2)        \
  PAGED_ATTENTION(NAME, KV, 256, 1, 4)        \
  PAGED_ATTENTION(NAME, KV, 256, 4, 4)        \
  PAGED_ATTENTION(NAME, KV, 256, 8, 4)
// KV, the head size, rows a thread.
#define VARLEN_ATTENTION(NAME, KV, SIZE, ROWS)                                                    \
  extern "C" __global__ void __launch_bounds__(attention::kPrefillThreads)                        \
      varlen_attention_##NAME##_d##SIZE(const void* query, const KV* cache, void* out,            \
                                        const int* starts, ATTENTION_BATCH, int tokens) {         \
    ATTENTION_MAKE_BATCH                                                                          \
    attention::prefill<KV, SIZE, ROWS>(batch, query, cache, out, starts, tokens);                 \
  }
#define VARLEN_ATTENTION_ALL(NAME, KV) \
  VARLEN_ATTENTION(NAME, KV, 64, 8)    \
  VARLEN_ATTENTION(NAME, KV, 128, 8)   \
  VARLEN_ATTENTION(NAME, KV, 256, 4)

RESHAPE_AND_CACHE(f16, __half)
RESHAPE_AND_CACHE(f32, float)
PAGED_ATTENTION_ALL(f16, __half)
PAGED_ATTENTION_ALL(f32, float)
VARLEN_ATTENTION_ALL(f16, __half)
VARLEN_ATTENTION_ALL(f32, float)
