// What the kernels of csrc/gemv.cu are timed against: the obvious INT4 product, in the structure
// of the only prototype for this card whose times are public. A warp a row, x in shared memory as
// it is, 32 bits of weights a lane and step, each nibble shifted, masked and converted, scale and
// zero point loaded for every eight columns.
//
// qweight: INT4 layout of csrc/gemv.cu; scale, zero: FP32 [N, K/128]; x: FP32 [K], K up to
// 12,288 and a multiple of 128; y: FP32 [N]. 256 threads, eight rows a block.
extern "C" __global__ void __launch_bounds__(256)
    naive_gemv_w4(const unsigned* __restrict__ qweight, const float* __restrict__ scale,
                  const float* __restrict__ zero, const float* __restrict__ x,
                  float* __restrict__ y, int rows, int columns) {
  __shared__ float staged[12288];
  for (int k = threadIdx.x; k < columns; k += 256) staged[k] = x[k];
  __syncthreads();
  const int row = blockIdx.x * 8 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= rows) return;
  float sum = 0.f;
  for (int word = lane; word < columns / 8; word += 32) {
    const unsigned q = qweight[static_cast<size_t>(row) * (columns / 8) + word];
    const size_t group = static_cast<size_t>(row) * (columns / 128) + word / 16;
    const float s = scale[group], z = zero[group];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      sum += (static_cast<float>((q >> (4 * j)) & 15u) - z) * s * staged[word * 8 + j];
  }
  for (int offset = 16; offset; offset >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (lane == 0) y[row] = sum;
}
