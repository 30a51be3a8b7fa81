// One AdamW step over a table of ranges, and the sum of squares that the global gradient norm needs.
//
//   g <- scale g,   p <- p (1 - lr lambda) - lr/(1 - beta1^k) m / (sqrt(v)/sqrt(1 - beta2^k) + eps)
//   m <- m + (1 - beta1)(g - m),   v <- beta2 v + (1 - beta2) g^2,   copy <- bf16(p) where there is one
//
// Element-wise, in f32, in the order of adamw::reference: same bits as the reference. Any cut into ranges gives the same
// step.
//
// Threads: a block of 256 takes 4096 elements of one range; it finds its range by bisecting the table.
// Memory, bytes per element (s = size of a gradient's element): step 24 + s, and 2 for the bf16 copy; norm s.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr u32 CHUNK = 4096;  // elements per block

// One tensor, or one piece of the flat buffer; as `DeviceRange` in src/kernels/adamw.rs.
struct Range {
  float *param;
  u64 grad;           // bytes from the address that a launch gives, which is all that changes between steps
  float *exp_avg;     // m
  float *exp_avg_sq;  // v
  bf16 *copy;         // null: none
  u64 length;
  u64 first_block;  // blocks of the ranges before this one
};

// As `DeviceScalars` in src/kernels/adamw.rs.
struct Scalars {
  float grad_scale, decay, rest1, beta2, rest2, correction2, epsilon, negative_step_size;
};

// The range of this block: the last one whose first block is not beyond it. No range is empty.
__device__ __forceinline__ const Range &range_of_block(const Range *table, u32 ranges) {
  u32 low = 0, high = ranges;
  while (high - low > 1) {
    const u32 middle = (low + high) / 2;
    if (table[middle].first_block <= blockIdx.x)
      low = middle;
    else
      high = middle;
  }
  return table[low];
}

template <class T>
__device__ __forceinline__ const T *gradient(const Range &r, u64 grads) {
  return reinterpret_cast<const T *>(grads + r.grad);
}

template <class T>
__device__ __forceinline__ void adamw(const Range *table, u32 ranges, u64 grads, const Scalars &s) {
  const Range r = range_of_block(table, ranges);
  const T *grad = gradient<T>(r, grads);
  const u64 begin = (blockIdx.x - r.first_block) * CHUNK;
  const u32 length = static_cast<u32>(min(static_cast<u64>(CHUNK), r.length - begin));
  const bool vector = aligned(r.param) && aligned(grad) && aligned(r.exp_avg) && aligned(r.exp_avg_sq) && aligned(r.copy);
  for (u32 first = 4 * threadIdx.x; first < length; first += 4 * THREADS) {
    const u32 count = min(4u, length - first);
    const u64 at = begin + first;
    Quad p = load_quad(r.param + at, count, vector), m = load_quad(r.exp_avg + at, count, vector);
    Quad v = load_quad(r.exp_avg_sq + at, count, vector);
    const Quad g = load_quad(grad + at, count, vector);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float scaled = g.v[k] * s.grad_scale;
      m.v[k] += s.rest1 * (scaled - m.v[k]);
      v.v[k] = s.beta2 * v.v[k] + s.rest2 * scaled * scaled;
      const float denominator = sqrtf(v.v[k]) / s.correction2 + s.epsilon;
      p.v[k] = p.v[k] * s.decay + s.negative_step_size * m.v[k] / denominator;
    }
    store_quad(r.param + at, p, count, vector);
    store_quad(r.exp_avg + at, m, count, vector);
    store_quad(r.exp_avg_sq + at, v, count, vector);
    if (r.copy) store_quad(r.copy + at, p, count, vector);
  }
}

// Sum of g^2 of each block's elements in f64: partial[block].
template <class T>
__device__ __forceinline__ void sum_of_squares(const Range *table, u32 ranges, u64 grads, double *partial) {
  const Range r = range_of_block(table, ranges);
  const T *grad = gradient<T>(r, grads);
  const u64 begin = (blockIdx.x - r.first_block) * CHUNK;
  const u32 length = static_cast<u32>(min(static_cast<u64>(CHUNK), r.length - begin));
  double sum = 0.0;
  for (u32 first = 4 * threadIdx.x; first < length; first += 4 * THREADS) {
    const Quad g = load_quad(grad + begin + first, min(4u, length - first), aligned(grad));
#pragma unroll
    for (int k = 0; k < 4; k++) sum += static_cast<double>(g.v[k]) * static_cast<double>(g.v[k]);
  }
  sum = block_sum<THREADS>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block: the sum of all partial sums, in a fixed order.
extern "C" __global__ void __launch_bounds__(1024)
    sum_of_partials(const double *__restrict__ partial, u32 count, double *__restrict__ total) {
  double sum = 0.0;
  for (u32 i = threadIdx.x; i < count; i += 1024) sum += partial[i];
  sum = block_sum<1024>(sum);
  if (threadIdx.x == 0) *total = sum;
}

#define ADAMW(NAME, T)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS)                                             \
      adamw_##NAME(const Range *__restrict__ table, u32 ranges, u64 grads, Scalars scalars) {       \
    adamw<T>(table, ranges, grads, scalars);                                                        \
  }                                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS) sum_of_squares_##NAME(                      \
      const Range *__restrict__ table, u32 ranges, u64 grads, double *__restrict__ partial) {       \
    sum_of_squares<T>(table, ranges, grads, partial);                                               \
  }

ADAMW(f32, float)
ADAMW(bf16, bf16)
ADAMW(f16, f16)
