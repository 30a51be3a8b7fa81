// The gated activation of the U-Net's transformers, forward and backward, for rows h = [a | b] of 2 width elements:
//
//   y = a g(b),   g(b) = b F(b),   F(b) = (1 + erf(b/sqrt 2))/2
//   da = dy g(b),   db = dy a (F(b) + b exp(-b^2/2)/sqrt(2 pi))
//
// Threads: a block of 256 takes 1024 packs of 16 bytes of y (fewer than 2^32 in all), each thread every 256th of them.
// Memory, bytes per element of y (s = size of an element): forward 3 s, backward 5 s.
#include "pack.cuh"

constexpr u32 THREADS = 256, PACKS = 4;

// F(b).
__device__ __forceinline__ float normal_distribution(float b) { return 0.5f + 0.5f * erff(b * 0.70710678118654752f); }

// Where a pack of y and of a begins; that of b is `width` further.
struct Position {
  size_t y, a;
  u32 count;

  __device__ __forceinline__ Position(u32 pack, u32 packs_per_row, u32 width, u32 pack_width) {
    const size_t row = pack / packs_per_row;
    const u32 column = pack % packs_per_row * pack_width;
    y = row * width + column;
    a = 2 * row * width + column;
    count = min(pack_width, width - column);
  }
};

template <class T>
__device__ __forceinline__ void forward(const T *h, T *y, u32 rows, u32 width) {
  const u32 packs_per_row = (width + WIDTH<T> - 1) / WIDTH<T>;
  const bool vector = width % WIDTH<T> == 0 && aligned_packs(h, y);
  for (u32 i = 0; i < PACKS; i++) {
    const u32 pack = (blockIdx.x * PACKS + i) * THREADS + threadIdx.x;
    if (pack >= rows * packs_per_row) return;
    const Position at(pack, packs_per_row, width, WIDTH<T>);
    const Pack<T> packed_a = load_pack(h + at.a, at.count, vector);
    const Pack<T> packed_b = load_pack(h + at.a + width, at.count, vector);
    float a[WIDTH<T>], b[WIDTH<T>];
    unpack(packed_a, a);
    unpack(packed_b, b);
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) a[k] *= b[k] * normal_distribution(b[k]);
    store_pack(y + at.y, a, at.count, vector);
  }
}

template <class T>
__device__ __forceinline__ void backward(const T *h, const T *dy, T *dh, u32 rows, u32 width) {
  const u32 packs_per_row = (width + WIDTH<T> - 1) / WIDTH<T>;
  const bool vector = width % WIDTH<T> == 0 && aligned_packs(h, dy, dh);
  for (u32 i = 0; i < PACKS; i++) {
    const u32 pack = (blockIdx.x * PACKS + i) * THREADS + threadIdx.x;
    if (pack >= rows * packs_per_row) return;
    const Position at(pack, packs_per_row, width, WIDTH<T>);
    const Pack<T> packed_a = load_pack(h + at.a, at.count, vector);
    const Pack<T> packed_b = load_pack(h + at.a + width, at.count, vector);
    const Pack<T> packed_dy = load_pack(dy + at.y, at.count, vector);
    float a[WIDTH<T>], b[WIDTH<T>], d[WIDTH<T>];
    unpack(packed_a, a);
    unpack(packed_b, b);
    unpack(packed_dy, d);
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) {
      const float distribution = normal_distribution(b[k]);
      const float density = 0.39894228040143268f * __expf(-0.5f * b[k] * b[k]);
      const float of_b = d[k] * a[k] * fmaf(b[k], density, distribution);
      a[k] = d[k] * (b[k] * distribution);
      b[k] = of_b;
    }
    store_pack(dh + at.a, a, at.count, vector);
    store_pack(dh + at.a + width, b, at.count, vector);
  }
}

#define GEGLU(NAME, T)                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                            \
      geglu_forward_##NAME(const T *__restrict__ h, T *__restrict__ y, u32 rows, u32 width) {                         \
    forward<T>(h, y, rows, width);                                                                                    \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                            \
      geglu_backward_##NAME(const T *__restrict__ h, const T *__restrict__ dy, T *__restrict__ dh, u32 rows, u32 width) {\
    backward<T>(h, dy, dh, rows, width);                                                                              \
  }

GEGLU(f32, float)
GEGLU(bf16, bf16)
GEGLU(f16, f16)
