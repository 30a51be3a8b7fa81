// Rows of N(0, 1): row i is the stream of sample first_sample + i, the numbers of random::normal_rows.
//
//   z = Box-Muller(Philox4x32-10([position / 4, sample, iteration, purpose | task | step], seed))
//
// Threads: blockIdx.y is the row; a thread makes four neighbours at a time, one Philox block.
// Memory: writes 4 bytes per number, reads nothing.
#include "philox.cuh"

extern "C" __global__ void __launch_bounds__(256) normal_rows(float *__restrict__ out, u32 length, Stream stream) {
  const u32 quad = blockIdx.x * 256 + threadIdx.x;
  if (quad >= (length + 3) / 4) return;
  const u32 count = min(4u, length - 4 * quad);
  const bool vector = length % 4 == 0 && aligned(out);
  store_quad(out + static_cast<size_t>(blockIdx.y) * length + 4 * quad, normal_quad(stream, blockIdx.y, quad), count, vector);
}

// The generator itself, for its known-answer test: input of thread i is counter[4*i..] and key[2*i..].
extern "C" __global__ void __launch_bounds__(256)
    philox_words(const u32 *__restrict__ counters, const u32 *__restrict__ keys, u32 *__restrict__ words, u32 count) {
  const u32 i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  Words counter;
  for (int k = 0; k < 4; k++) counter.v[k] = counters[4 * i + k];
  const Words result = philox4x32_10(counter, keys[2 * i], keys[2 * i + 1]);
  for (int k = 0; k < 4; k++) words[4 * i + k] = result.v[k];
}
