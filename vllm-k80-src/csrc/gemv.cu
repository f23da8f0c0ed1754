// Products of a few rows of x with a weight: y[t, n] = sum_k x[t, k] * w[n, k] + bias[n].
//
//   gemv_w4_{f16,f32,z16,z32}_m{1,2,4,8}   INT4, groups of 32, 64 or 128 columns
//   gemv_w8_{f16,f32}_m{1,2,4,8}           INT8, groups of 16, 32, 64 or 128 columns, or a row
//   gemv_f16_m{1,2,4,8}                    FP16
//   gated_gemv_...                         the same, INT4 and INT8 but for m8, of a weight whose
//                                          first N/2 rows are a gate's:
//                                          y[t, n] = silu(p[t, n]) * p[t, N/2 + n], where p is the
//                                          product and silu(v) = v / (1 + exp(-v))
//   dequant_w4_{f16,f32,z16,z32}, dequant_w8_{f16,f32}   rows of a weight as FP32, for cuBLAS
//
// m{1,2,4,8} is the most rows of x that a block takes; m8 takes more in tiles of eight. x [T, K]
// and y [T, N], or [T, N/2] if gated: FP32 or FP16 (flag kHalfX), row-major; with kFloatY, which m8
// of INT4 and INT8 knows, y is FP32 whatever x is. bias [N] FP32 or FP16 (kHalfBias) or null. scale
// and offset: FP16 in kernels ..._f16 and ..._z16, else FP32.
//
// Weight layouts, row-major, rows 16-byte aligned:
//   INT4  qweight [N, K/2] uint8; byte j of a row holds column 2j in its low and column 2j+1 in
//         its high half, so that nibble j of a little-endian 32-bit word is column 8*word + j.
//         scale, offset [N, K/group]. w = q * scale + offset; in ..._z16 and ..._z32 offset is a
//         zero point and w = (q - offset) * scale.
//   INT8  qweight [N, K] int8, scale [N, K/group]. w = q * scale.
//   FP16  weight [N, K].
// K is a multiple of the columns that 128 bits hold: 32, 16, 8.
//
// How it works. A warp computes kRows rows for up to kTokens rows of x. A lane takes 128 bits
// of each row in a step, so a step covers 1024, 512 or 256 columns and every load of weights is
// coalesced. x is staged in shared memory, each lane's columns apart by an odd number of
// 128-bit words, so that both sides are free of bank conflicts; the read-only cache, whose
// bandwidth on this card is the least certain of all, serves weights and scales alone.
//
// Unpacking. The card has no fused three-input logic and converts 32 values a clock at most,
// but FFMA takes denormals at full speed. A nibble or byte masked out of a word is, as the bits
// of a float, its value times 2^(position - 149), and stays so up to bit 23, where the exponent
// field turns from 0 to 1 and counts the same. One AND thus makes a factor; x is multiplied by
// 2^(kBias - position) when it is staged. What lies above bit 23 is shifted down first. The
// remaining 2^(kBias - 149) is taken out together with the group's scale. Denormals must not be
// flushed: no -ftz, no fast math. x has its full precision from 2^-43 to 2^38 and FP16's whole
// range with it; beyond 2^38 it overflows.
//
// The sum over a lane's columns of a step comes first, in FP32, then scale and offset are applied
// to it: offset needs the sum of x over them, which is made once, when x is staged. Sums of sums
// also round less.
//
// A warp of a gated product takes half as many rows of the gate and those of the other half that
// belong to them, so that it has both factors of its results in registers. Weights lie as ever.
// Predicted for 2 x 11008 x 4096 in INT4: 286 microseconds, as without; the activation is a third of
// a microsecond at the end, and a launch of its own would take 5.
//
// Predicted by tools/smx.py for an INT4 layer of 4096 x 4096, group 128, in microseconds, with
// the read-only cache at 64 / 32 bytes a clock (the memory's bound is 51): this design 63 / 65;
// x through the read-only cache, coalesced and with four rows a warp 65 / 106; two rows a warp
// 67 / 76, eight 68 / 68; scales in FP32 66; all of K = 11008 staged at once 173 / 185 where
// chunks of 4096 columns take 158 / 163.
#include <cuda_fp16.h>

namespace gemv {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kHalfX = 1, kHalfBias = 2, kFloatY = 4;  // flags

// 2^kBias is what x is multiplied with at bit position 0; 2^kUnbias takes it out again.
constexpr float kBias0 = 0x1p90f, kBias4 = 0x1p86f, kBias8 = 0x1p82f, kBias12 = 0x1p78f;
constexpr float kBias16 = 0x1p74f, kBias20 = 0x1p70f;
constexpr float kUnbias = 0x1p59f;

__device__ __forceinline__ float number(const float* p) { return __ldg(p); }
__device__ __forceinline__ float number(const __half* p) {
  return __half2float(__ushort_as_half(__ldg(reinterpret_cast<const unsigned short*>(p))));
}
__device__ __forceinline__ float2 pair(unsigned bits) {
  return make_float2(__half2float(__ushort_as_half(bits & 0xffffu)),
                     __half2float(__ushort_as_half(bits >> 16)));
}
__device__ __forceinline__ float bits(unsigned v) { return __uint_as_float(v); }
__device__ __forceinline__ void put(float* to, const float4& v) {
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ unsigned word(const uint4& q, int i) {
  return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w;
}

// A weight's format: columns in 128 bits, and `part` i of them (four columns) as factors.
struct Int4 {
  static constexpr int kColumns = 32, kBits = 4;
  static constexpr bool kScaled = true;
  // Odd parts hold nibbles 4 to 7 of a word, of which 6 and 7 were shifted down by 8.
  static __device__ __forceinline__ float4 factors(unsigned part) {
    return part & 1 ? make_float4(kBias16, kBias20, kBias16, kBias20)
                    : make_float4(kBias0, kBias4, kBias8, kBias12);
  }
  static __device__ __forceinline__ float4 unpack(const uint4& q, int part) {
    const unsigned v = word(q, part / 2), h = v >> 8;
    return part & 1 ? make_float4(bits(v & 0xf0000u), bits(v & 0xf00000u), bits(h & 0xf0000u),
                                  bits(h & 0xf00000u))
                    : make_float4(bits(v & 0xfu), bits(v & 0xf0u), bits(v & 0xf00u),
                                  bits(v & 0xf000u));
  }
};

// Bytes are made unsigned by adding 128, which the offset -128 * scale takes back.
struct Int8 {
  static constexpr int kColumns = 16, kBits = 8;
  static constexpr bool kScaled = true;
  static __device__ __forceinline__ float4 factors(unsigned) {
    return make_float4(kBias0, kBias8, kBias16, kBias0);
  }
  static __device__ __forceinline__ float4 unpack(const uint4& q, int part) {
    const unsigned v = word(q, part) ^ 0x80808080u;
    return make_float4(bits(v & 0xffu), bits(v & 0xff00u), bits(v & 0xff0000u), bits(v >> 24));
  }
};

struct Half {
  static constexpr int kColumns = 8;
  static constexpr bool kScaled = false;
  static __device__ __forceinline__ float4 factors(unsigned) { return make_float4(1.f, 1.f, 1.f, 1.f); }
  static __device__ __forceinline__ float4 unpack(const uint4& q, int part) {
    const float2 a = pair(word(q, 2 * part)), b = pair(word(q, 2 * part + 1));
    return make_float4(a.x, a.y, b.x, b.y);
  }
};

// What follows the scale in memory: a minimum, a zero point, or nothing (INT8).
enum Offset { kMinimum, kZero, kNone };

// Sums of kCount values (a power of two up to 32) over the warp, in 31 shuffles at most. Lane l
// gets the sum of value l / (32 / kCount).
template <int kCount>
__device__ __forceinline__ float warp_sums(float* v, int lane, int offset = 16) {
  const bool upper = lane & offset;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float keep = upper ? v[i + kCount / 2] : v[i];
    const float give = upper ? v[i] : v[i + kCount / 2];
    v[i] = keep + __shfl_xor_sync(kAll, give, offset);
  }
  return warp_sums<kCount / 2>(v, lane, offset >> 1);
}
template <>
__device__ __forceinline__ float warp_sums<1>(float* v, int, int offset) {
  float sum = v[0];
  for (; offset; offset >>= 1) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

// A warp's results: acc[r * kTokens + t] of all lanes is summed and, with the bias, becomes
// y[token0 + t, row0 + r].
template <int kRows, int kTokens>
__device__ __forceinline__ void store(float* acc, int lane, int row0, int token0,
                                      const void* __restrict__ bias, void* __restrict__ y, int rows,
                                      int tokens, int flags) {
  constexpr int kBatch = kRows * kTokens < 32 ? kRows * kTokens : 32;
#pragma unroll
  for (int first = 0; first < kRows * kTokens; first += kBatch) {
    float v = warp_sums<kBatch>(acc + first, lane);
    const int i = first + lane / (32 / kBatch);
    const int n = row0 + i / kTokens, t = token0 + i % kTokens;
    if (lane % (32 / kBatch) || n >= rows || t >= tokens) continue;
    if (bias)
      v += flags & kHalfBias ? number(static_cast<const __half*>(bias) + n)
                             : number(static_cast<const float*>(bias) + n);
    const size_t at = static_cast<size_t>(t) * rows + n;
    if (flags & kHalfX)
      static_cast<__half*>(y)[at] = __float2half(v);
    else
      static_cast<float*>(y)[at] = v;
  }
}

// The same of a gated product: the first half of acc belongs to rows row0 and following of the
// gate, the second to their factors, `outputs` rows on.
template <int kRows, int kTokens>
__device__ __forceinline__ void store_gated(float* acc, int lane, int row0, int token0,
                                            const void* __restrict__ bias, void* __restrict__ y,
                                            int outputs, int tokens, int flags) {
  constexpr int kResults = kRows * kTokens / 2;
  constexpr int kBatch = kResults < 32 ? 2 * kResults : 32;
  static_assert(kResults <= 32, "");
  float gate = warp_sums<kBatch>(acc, lane), factor;
  if (kResults < 32)
    factor = __shfl_down_sync(kAll, gate, 16);
  else
    factor = warp_sums<32>(acc + kResults, lane);
  const int i = lane / (32 / kBatch);
  const int n = row0 + i / kTokens, t = token0 + i % kTokens;
  if (lane % (32 / kBatch) || i >= kResults || n >= outputs || t >= tokens) return;
  if (bias && flags & kHalfBias) {
    gate += number(static_cast<const __half*>(bias) + n);
    factor += number(static_cast<const __half*>(bias) + outputs + n);
  } else if (bias) {
    gate += number(static_cast<const float*>(bias) + n);
    factor += number(static_cast<const float*>(bias) + outputs + n);
  }
  const float v = gate / (1.f + expf(-gate)) * factor;
  const size_t at = static_cast<size_t>(t) * outputs + n;
  if (flags & kHalfX)
    static_cast<__half*>(y)[at] = __float2half(v);
  else
    static_cast<float*>(y)[at] = v;
}

// kRows rows a warp, kTokens rows of x, kSteps steps staged at a time.
template <class W, class Scale, Offset kOffset, int kTokens, int kRows, int kSteps,
          bool kGated = false>
__device__ __forceinline__ void product(const uint4* __restrict__ weight,
                                        const Scale* __restrict__ scale,
                                        const Scale* __restrict__ offset,
                                        const void* __restrict__ x, const void* __restrict__ bias,
                                        void* __restrict__ y, int rows, int columns,
                                        int group_shift, int tokens, int flags) {
  constexpr int kParts = W::kColumns / 4;
  constexpr int kStride = 32 + 8 / kParts;  // of a part, in float4: no bank conflicts
  constexpr int kStagedStep = kTokens * kParts * kStride;
  constexpr bool kSums = W::kScaled;
  __shared__ float4 staged[kSteps * kStagedStep];
  __shared__ float sums[kSums ? kSteps * kTokens * 32 : 1];

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // More than eight rows of x: the blocks that read the same weights run side by side.
  const int block = kTokens == 8 ? blockIdx.y : blockIdx.x;
  const int token0 = kTokens == 8 ? blockIdx.x * kTokens : 0;
  constexpr int kRun = kGated ? kRows / 2 : kRows;  // neighbours of a warp
  const int outputs = kGated ? rows / 2 : rows;
  const int row0 = (block * kWarps + warp) * kRun;
  const int units = static_cast<unsigned>(columns) / W::kColumns;  // of 128 bits, in a row
  const int groups = ((units - 1) >> group_shift) + 1;
  const unsigned part = threadIdx.x % kParts;
  const float4 factor = W::factors(part);

  float acc[kRows * kTokens];
#pragma unroll
  for (int i = 0; i < kRows * kTokens; ++i) acc[i] = 0.f;
  int row[kRows];  // rows past the end repeat the last one and are not stored
#pragma unroll
  for (int r = 0; r < kRows; ++r) row[r] = min(row0 + r % kRun, outputs - 1) + r / kRun * outputs;

  for (int base = 0; base < units; base += kSteps * 32) {
    // Every load first, then all that waits for them.
    constexpr int kPieces = kSteps * kParts * 32 / kThreads;  // of four columns, a thread
    float4 v[kTokens * kPieces];
    const int k0 = base * W::kColumns + static_cast<int>(threadIdx.x) * 4;
#pragma unroll
    for (int i = 0; i < kTokens * kPieces; ++i) v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (flags & kHalfX) {
      const __half* from = static_cast<const __half*>(x) + static_cast<size_t>(token0) * columns + k0;
#pragma unroll
      for (int i = 0; i < kTokens * kPieces; ++i) {
        const int t = i / kPieces, k = i % kPieces * kThreads * 4;
        if (k0 + k >= columns || token0 + t >= tokens) continue;
        const uint2 h = __ldg(reinterpret_cast<const uint2*>(from + static_cast<size_t>(t) * columns + k));
        const float2 a = pair(h.x), b = pair(h.y);
        v[i] = make_float4(a.x, a.y, b.x, b.y);
      }
    } else {
      const float* from = static_cast<const float*>(x) + static_cast<size_t>(token0) * columns + k0;
#pragma unroll
      for (int i = 0; i < kTokens * kPieces; ++i) {
        const int t = i / kPieces, k = i % kPieces * kThreads * 4;
        if (k0 + k < columns && token0 + t < tokens)
          v[i] = __ldg(reinterpret_cast<const float4*>(from + static_cast<size_t>(t) * columns + k));
      }
    }
    if (base) __syncthreads();
#pragma unroll
    for (int i = 0; i < kTokens * kPieces; ++i) {
      constexpr int kStepThreads = kParts * 32;
      const unsigned piece = i % kPieces * kThreads + threadIdx.x;
      const unsigned slot = piece / kStepThreads * kTokens + i / kPieces;
      const unsigned owner = piece / kParts % 32;
      if (kSums) {
        float sum = (v[i].x + v[i].y) + (v[i].z + v[i].w);
#pragma unroll
        for (int o = 1; o < kParts; o *= 2) sum += __shfl_xor_sync(kAll, sum, o);
        if (!part) sums[slot * 32 + owner] = sum;
      }
      staged[(slot * kParts + part) * kStride + owner] = make_float4(
          v[i].x * factor.x, v[i].y * factor.y, v[i].z * factor.z, v[i].w * factor.w);
    }
    __syncthreads();

    const int steps = min(kSteps, (units - base + 31) >> 5);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      // Lanes past the end repeat the last unit; their x is zero.
      const int unit = min(base + step * 32 + lane, units - 1);
      uint4 q[kRows];
      float s[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) q[r] = __ldg(weight + static_cast<size_t>(row[r]) * units + unit);
#pragma unroll
      for (int r = 0; W::kScaled && r < kRows; ++r)
        s[r] = kUnbias * number(scale + static_cast<size_t>(row[r]) * groups + (unit >> group_shift));
      float sum[kRows * kTokens];
#pragma unroll
      for (int i = 0; i < kRows * kTokens; ++i) sum[i] = 0.f;
      const float4* mine = staged + step * kStagedStep + lane;
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        float4 v[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) v[t] = mine[(t * kParts + i) * kStride];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 w = W::unpack(q[r], i);
          float* into = sum + r * kTokens;
#pragma unroll
          for (int t = 0; t < kTokens; ++t) into[t] = fmaf(w.x, v[t].x, into[t]);
#pragma unroll
          for (int t = 0; t < kTokens; ++t) into[t] = fmaf(w.y, v[t].y, into[t]);
#pragma unroll
          for (int t = 0; t < kTokens; ++t) into[t] = fmaf(w.z, v[t].z, into[t]);
#pragma unroll
          for (int t = 0; t < kTokens; ++t) into[t] = fmaf(w.w, v[t].w, into[t]);
        }
      }
#pragma unroll
      for (int i = 0; !W::kScaled && i < kRows * kTokens; ++i) acc[i] += sum[i];
#pragma unroll
      for (int r = 0; W::kScaled && r < kRows; ++r) {
        float b;
        if (kOffset == kNone) {
          b = s[r] * (-128.f / kUnbias);
        } else {
          b = number(offset + static_cast<size_t>(row[r]) * groups + (unit >> group_shift));
          if (kOffset == kZero) b *= s[r] * (-1.f / kUnbias);
        }
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          float& a = acc[r * kTokens + t];
          a = fmaf(s[r], sum[r * kTokens + t], a);
          a = fmaf(b, sums[(step * kTokens + t) * 32 + lane], a);
        }
      }
    }
  }

  if (kGated)
    store_gated<kRows, kTokens>(acc, lane, row0, token0, bias, y, outputs, tokens, flags);
  else
    store<kRows, kTokens>(acc, lane, row0, token0, bias, y, rows, tokens, flags);
}

// Loads that stay on their side of a barrier. The compiler takes those of the read-only cache
// across to where their results find no registers.
__device__ __forceinline__ float plain(const float* p) { return __ldcg(p); }
__device__ __forceinline__ float plain(const __half* p) {
  return __half2float(__ushort_as_half(__ldcg(reinterpret_cast<const unsigned short*>(p))));
}
__device__ __forceinline__ void flip(uint4& q) {
  q.x ^= 0x80808080u, q.y ^= 0x80808080u, q.z ^= 0x80808080u, q.w ^= 0x80808080u;
}
template <class T>
__device__ __forceinline__ const T* advanced(const T* p, unsigned bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + bytes);
}

// Rows of the weight that a block takes, eight a warp, and SMX of a die.
constexpr int kTileRows = 64, kSmx = 13;
constexpr int kMostParts = 16, kMostTokenTiles = 4;
// Of the tiles that are in parts: each part's results, and how many of a tile's parts are there.
__device__ float partials[kMostTokenTiles][kSmx][kMostParts][kTileRows * 8];
__device__ unsigned parts_there[kMostTokenTiles][kSmx];

// The same for eight rows of x, a step staged at a time. Instructions bound it and not the memory:
// for 32 columns of eight rows a lane needs 2048 multiplications and 512 instructions to unpack and
// scale weights, which is done before they are multiplied. Sums of a step, with scales and offsets
// applied to them, would take as many registers as the results and leave room for two blocks
// instead of three, too few warps to hide each other's waits. A float4 of staged x is the same
// value of each of a unit's four words: these are at one bit position, so that one scale a row
// serves all, and goes on by a power of two from value to value. x itself is staged as it is.
// Weights are made kScaleDown times what they should be, or their scales, which take out the
// 2^-149, would overflow: scales may go up to 2^38, and products of less than 2^-66 lose precision.
//
// Each SMX has as many whole tiles of rows. Columns of the tiles that are left over, fewer than
// SMX, are split into parts, by which the grid is larger. The last part of a tile to arrive adds up
// all, in the order of the columns whichever it is; launches must follow each other, for all use
// the same memory for it. What a block must know of its part is in shared memory, for registers
// are the results', to the last one.
//
// There is no gated product of eight rows: with no registers for three blocks one was predicted to
// take 878 microseconds for 2 x 11008 x 4096; the product alone takes 651, and an activation of its
// own 5.
//
// Predicted for INT4 in microseconds, with the read-only cache at 64 / 32 bytes a clock: 133 / 136
// for 4096 x 4096, 329 / 333 for 11008 x 4096, 346 / 351 for 4096 x 11008, which is 2.1 to 2.2 times
// what one row takes; INT8 147 / 154.
// Before there were parts, and with a warp's first row kept in a register, 4096 x 4096 took
// 136 / 137; with scales applied to sums and two blocks an SMX 172 / 176; with x by way of the
// read-only cache 139 / 146; with a row of x staged by each warp 143 / 142; with x past the end
// zero instead of unused 140 / 141. The FP32 units alone bound it at 90.
template <class W, class Scale, Offset kOffset>
__device__ __forceinline__ void product_of_eight(
    const uint4* __restrict__ weight, const Scale* __restrict__ scale,
    const Scale* __restrict__ offset, const void* __restrict__ x, const void* __restrict__ bias,
    void* __restrict__ y, int rows, int columns, int group_shift, int tokens, int flags) {
  constexpr int kTokens = 8, kRows = 8;
  constexpr int kHalfValues = 16 / W::kBits;  // of half a word
  constexpr int kPieces = 8 * W::kColumns;    // of four columns, in a step
  // Of half the words, in floats: no bank conflicts where neighbouring pieces are different halves.
  constexpr int kHalf = kTokens * kHalfValues * 128 + (kHalfValues == 4 ? 16 : 0);
  constexpr int kStaged = kTokens * kPieces / kThreads;  // rows of x that a thread stages
  constexpr unsigned kFirst = (1u << W::kBits) - 1;      // of the values of a word
  constexpr float kScaleDown = 0x1p-60f, kScaleUp = 0x1p89f;
  __shared__ float4 staged[kHalf / 2];
  // Of the block: its tile, where its part of the columns ends, in units, the tile's parts and
  // which of them it is; then how many of them were there before.
  __shared__ volatile int tile, end, parts, part, before;

  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // The blocks that read the same weights run side by side.
  const int token0 = blockIdx.x * kTokens;
  const int units = static_cast<unsigned>(columns) / W::kColumns;  // of 128 bits, in a row
  const int groups = ((units - 1) >> group_shift) + 1;
  const int split = (rows + kTileRows - 1u) / kTileRows % kSmx;
  const int whole = (rows + kTileRows - 1u) / kTileRows - split;
  int base = 0;
  if (static_cast<int>(blockIdx.y) >= whole) {
    const unsigned i = blockIdx.y - whole, n = (gridDim.y - whole) / split;
    const unsigned steps = (units + 31u) >> 5;
    base = steps * (i % n) / n * 32;
    if (!threadIdx.x) {
      tile = whole + i / n, parts = n, part = i % n;
      end = steps * (i % n + 1) / n * 32;
    }
  } else if (!threadIdx.x) {
    tile = blockIdx.y, parts = 1, end = units;
  }
  __syncthreads();
  // A warp that rows run out for takes the last kRows, some of them like others do. Where there are
  // not so many, each warp takes one, kRows times.
  const int next = rows >= kRows;
  const unsigned row_bytes = next * units * 16;
  const unsigned group_bytes = next * groups * static_cast<unsigned>(sizeof(Scale));
  const int piece = threadIdx.x % kPieces, staged0 = threadIdx.x / kPieces * kStaged;
  float* const mine = reinterpret_cast<float*>(staged) + staged0 * kHalfValues * 128 +
                      (kHalfValues == 4 ? piece % 2 * kHalf + piece / 2 : piece);

  float acc[kRows * kTokens];
#pragma unroll
  for (int i = 0; i < kRows * kTokens; ++i) acc[i] = 0.f;

#pragma unroll 1
  for (; base < end; base += 32) {
    // Anew in each step and at the end, which leaves a register more.
    const int row0 =
        next ? min((tile * kWarps + warp) * kRows, rows - kRows) : min(warp, rows - 1);
    const uint4* const first_row = weight + static_cast<size_t>(row0) * units;
    const int unit = min(base + lane, units - 1);
    uint4 q[kRows];
    const uint4* from = first_row + unit;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      q[r] = __ldg(from);
      if (W::kBits == 8) flip(q[r]);
      from = advanced(from, row_bytes);
    }

    // Past the end of x its last columns are staged, and its last rows: nobody uses the former.
    float v[kStaged][4];
    const int token = min(token0 + staged0, tokens - 1), more = tokens - 1 - token;
    const size_t first = static_cast<size_t>(token) * columns +
                         min(base * W::kColumns + piece * 4, columns - 4);
    if (flags & kHalfX) {
      const __half* at = static_cast<const __half*>(x) + first;
      uint2 h[kStaged];
#pragma unroll
      for (int t = 0; t < kStaged; ++t) {
        h[t] = __ldcg(reinterpret_cast<const uint2*>(at));
        at = advanced(at, t < more ? columns * 2u : 0u);
      }
#pragma unroll
      for (int t = 0; t < kStaged; ++t) {
        const float2 a = pair(h[t].x), b = pair(h[t].y);
        put(v[t], make_float4(a.x, a.y, b.x, b.y));
      }
    } else {
      const float* at = static_cast<const float*>(x) + first;
#pragma unroll
      for (int t = 0; t < kStaged; ++t) {
        put(v[t], __ldcg(reinterpret_cast<const float4*>(at)));
        at = advanced(at, t < more ? columns * 4u : 0u);
      }
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kStaged; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mine[i / kHalfValues * kHalf + (t * kHalfValues + i % kHalfValues) * 128] = v[t][i];
    }
    const unsigned group =
        (row0 * groups + (unit >> group_shift)) * static_cast<unsigned>(sizeof(Scale));
    const Scale *scale_at = advanced(scale, group), *offset_at = advanced(offset, group);
    float s[kRows], b[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      s[r] = plain(scale_at);
      b[r] = kOffset == kNone ? -128.f : plain(offset_at);
      scale_at = advanced(scale_at, group_bytes), offset_at = advanced(offset_at, group_bytes);
    }
    __syncthreads();
    if (base + lane >= units) continue;

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      b[r] *= kOffset == kMinimum ? kScaleDown : (kOffset == kZero ? -s[r] : s[r]) * kScaleDown;
      s[r] *= kScaleUp;
    }
    // Half by half: with all of x before it, the compiler loads more than there are registers for.
    const float4* part_of_x = staged + lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kHalfValues; ++i) {
        float v[kTokens][4];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) put(v[t], part_of_x[(t * kHalfValues + i) * 32]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (i) s[r] *= 1.f / (1 << W::kBits);
          float* into = acc + r * kTokens;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float w = fmaf(bits(word(q[r], j) & kFirst << W::kBits * i), s[r], b[r]);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) into[t] = fmaf(w, v[t][j], into[t]);
          }
        }
      }
      asm volatile("" ::: "memory");
      if (half == 1) break;
      part_of_x += kHalf / 4;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        s[r] *= static_cast<float>(1 << (16 - W::kBits));
        q[r].x >>= 16, q[r].y >>= 16, q[r].z >>= 16, q[r].w >>= 16;
      }
    }
  }

  // Lane l gets results l and l + 32 of its warp: the tokens of a row lie side by side.
  float sum[2] = {warp_sums<32>(acc, lane), warp_sums<32>(acc + 32, lane)};
  if (parts > 1) {
    float(*const at)[kTileRows * kTokens] = partials[blockIdx.x][tile % kSmx];
    const int result = warp * 64 + lane;
    __stcg(at[part] + result, sum[0]), __stcg(at[part] + result + 32, sum[1]);
    __threadfence();  // results are there before their arrival is counted
    __syncthreads();
    if (!threadIdx.x) {
      // The last arrival wraps the counter to zero: for the next launch, or replay of a graph.
      before = atomicInc(&parts_there[blockIdx.x][tile % kSmx], parts - 1);
      __threadfence();  // the others' results are read after it
    }
    __syncthreads();
    if (before != parts - 1) return;
    sum[0] = sum[1] = 0.f;
#pragma unroll 1
    for (int i = 0; i < parts; ++i)
      sum[0] += __ldcg(at[i] + result), sum[1] += __ldcg(at[i] + result + 32);
  }
  const int row0 =
      next ? min((tile * kWarps + warp) * kRows, rows - kRows) : min(warp, rows - 1);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int n = row0 + (lane / kTokens + 4 * i) * next, t = token0 + lane % kTokens;
    // Rows before its tile are another block's, which may add up their columns in parts.
    if (t >= tokens || n < tile * kTileRows) continue;
    float v = sum[i] * (1.f / kScaleDown);
    if (bias)
      v += flags & kHalfBias ? number(static_cast<const __half*>(bias) + n)
                             : number(static_cast<const float*>(bias) + n);
    const size_t at = static_cast<size_t>(t) * rows + n;
    if ((flags & (kHalfX | kFloatY)) == kHalfX)
      static_cast<__half*>(y)[at] = __float2half(v);
    else
      static_cast<float*>(y)[at] = v;
  }
}

// 32 bits of a weight a thread: out[i] for its eight INT4 or four INT8 columns. `out` is FP32,
// row-major, of `words` * 8 or 4 elements; a group is `group_words` words.
template <class Scale, Offset kOffset>
__device__ __forceinline__ void dequantize(const unsigned* __restrict__ weight,
                                           const Scale* __restrict__ scale,
                                           const Scale* __restrict__ offset,
                                           float4* __restrict__ out, int words, int group_words) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= words) return;
  const unsigned group = i / group_words, v = __ldg(weight + i);
  const float s = number(scale + group);
  if (kOffset == kNone) {
    const int q = static_cast<int>(v);
    out[i] = make_float4(s * (q << 24 >> 24), s * (q << 16 >> 24), s * (q << 8 >> 24), s * (q >> 24));
    return;
  }
  const float b = number(offset + group);
  float w[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float q = v >> (4 * j) & 0xfu;
    w[j] = kOffset == kZero ? (q - b) * s : fmaf(q, s, b);
  }
  out[2 * i] = make_float4(w[0], w[1], w[2], w[3]);
  out[2 * i + 1] = make_float4(w[4], w[5], w[6], w[7]);
}

}  // namespace gemv

// BLOCKS must fit an SMX, for which only one with GK210's 128 K registers has room. PRODUCT ends
// with rows of x, rows a warp and steps staged at a time, or for eight rows of x with rows a warp.
// The bound would go into the PTX as well, where any newer GPU obeys it and spills.
#if defined(VLLM_K80_PTX) || defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 370
#define GEMV_FIT(BLOCKS) 1
#else
#define GEMV_FIT(BLOCKS) BLOCKS
#endif
#define GEMV_W4(NAME, SCALE, TOKENS, BLOCKS, PRODUCT)                                              \
  extern "C" __global__ void __launch_bounds__(gemv::kThreads, GEMV_FIT(BLOCKS))                   \
      NAME##_m##TOKENS(const uint4* weight, const SCALE* scale, const SCALE* offset,               \
                       const void* x, const void* bias, void* y, int rows, int columns,            \
                       int group_shift, int tokens, int flags) {                                   \
    PRODUCT(weight, scale, offset, x, bias, y, rows, columns, group_shift, tokens, flags);         \
  }
#define GEMV_W8(NAME, SCALE, TOKENS, BLOCKS, PRODUCT)                                              \
  extern "C" __global__ void __launch_bounds__(gemv::kThreads, GEMV_FIT(BLOCKS))                   \
      NAME##_m##TOKENS(const uint4* weight, const SCALE* scale, const void* x, const void* bias,   \
                       void* y, int rows, int columns, int group_shift, int tokens, int flags) {   \
    PRODUCT(weight, scale, scale, x, bias, y, rows, columns, group_shift, tokens, flags);          \
  }
#define GEMV_F16(NAME, TOKENS, ROWS, STEPS, BLOCKS, GATED)                                         \
  extern "C" __global__ void __launch_bounds__(gemv::kThreads, GEMV_FIT(BLOCKS))                   \
      NAME##_m##TOKENS(const uint4* weight, const void* x, const void* bias, void* y, int rows,    \
                       int columns, int tokens, int flags) {                                       \
    gemv::product<gemv::Half, float, gemv::kNone, TOKENS, ROWS, STEPS, GATED>(                     \
        weight, nullptr, nullptr, x, bias, y, rows, columns, 0, tokens, flags);                    \
  }
#define GEMV_W4_FEW(NAME, SCALE, OFFSET, GATED)                                                    \
  GEMV_W4(NAME, SCALE, 1, 5, (gemv::product<gemv::Int4, SCALE, OFFSET, 1, 4, 4, GATED>))           \
  GEMV_W4(NAME, SCALE, 2, 4, (gemv::product<gemv::Int4, SCALE, OFFSET, 2, 4, 2, GATED>))           \
  GEMV_W4(NAME, SCALE, 4, 4, (gemv::product<gemv::Int4, SCALE, OFFSET, 4, 4, 1, GATED>))
#define GEMV_W8_FEW(NAME, SCALE, GATED)                                                            \
  GEMV_W8(NAME, SCALE, 1, 5, (gemv::product<gemv::Int8, SCALE, gemv::kNone, 1, 4, 8, GATED>))      \
  GEMV_W8(NAME, SCALE, 2, 4, (gemv::product<gemv::Int8, SCALE, gemv::kNone, 2, 4, 4, GATED>))      \
  GEMV_W8(NAME, SCALE, 4, 4, (gemv::product<gemv::Int8, SCALE, gemv::kNone, 4, 4, 2, GATED>))
#define GEMV_W4_ALL(KIND, SCALE, OFFSET)                                                           \
  GEMV_W4_FEW(gemv_w4_##KIND, SCALE, OFFSET, false)                                                \
  GEMV_W4_FEW(gated_gemv_w4_##KIND, SCALE, OFFSET, true)                                           \
  GEMV_W4(gemv_w4_##KIND, SCALE, 8, 3, (gemv::product_of_eight<gemv::Int4, SCALE, OFFSET>))
#define GEMV_W8_ALL(KIND, SCALE)                                                                   \
  GEMV_W8_FEW(gemv_w8_##KIND, SCALE, false)                                                        \
  GEMV_W8_FEW(gated_gemv_w8_##KIND, SCALE, true)                                                   \
  GEMV_W8(gemv_w8_##KIND, SCALE, 8, 3, (gemv::product_of_eight<gemv::Int8, SCALE, gemv::kNone>))
#define GEMV_F16_ALL(NAME, GATED)     \
  GEMV_F16(NAME, 1, 4, 16, 5, GATED)  \
  GEMV_F16(NAME, 2, 4, 8, 4, GATED)   \
  GEMV_F16(NAME, 4, 4, 4, 4, GATED)   \
  GEMV_F16(NAME, 8, 4, 4, 3, GATED)

#define DEQUANT_W4(NAME, SCALE, OFFSET)                                                            \
  extern "C" __global__ void __launch_bounds__(gemv::kThreads)                                     \
      dequant_w4_##NAME(const unsigned* weight, const SCALE* scale, const SCALE* offset,           \
                        float4* out, int words, int group_words) {                                 \
    gemv::dequantize<SCALE, OFFSET>(weight, scale, offset, out, words, group_words);               \
  }
#define DEQUANT_W8(NAME, SCALE)                                                                    \
  extern "C" __global__ void __launch_bounds__(gemv::kThreads) dequant_w8_##NAME(                  \
      const unsigned* weight, const SCALE* scale, float4* out, int words, int group_words) {       \
    gemv::dequantize<SCALE, gemv::kNone>(weight, scale, scale, out, words, group_words);           \
  }

GEMV_W4_ALL(f16, __half, gemv::kMinimum)
GEMV_W4_ALL(f32, float, gemv::kMinimum)
GEMV_W4_ALL(z16, __half, gemv::kZero)
GEMV_W4_ALL(z32, float, gemv::kZero)
GEMV_W8_ALL(f16, __half)
GEMV_W8_ALL(f32, float)
GEMV_F16_ALL(gemv_f16, false)
GEMV_F16_ALL(gated_gemv_f16, true)
DEQUANT_W4(f16, __half, gemv::kMinimum)
DEQUANT_W4(f32, float, gemv::kMinimum)
DEQUANT_W4(z16, __half, gemv::kZero)
DEQUANT_W4(z32, float, gemv::kZero)
DEQUANT_W8(f16, __half)
DEQUANT_W8(f32, float)
