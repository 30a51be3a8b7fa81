// A matrix [rows, channels] that a block goes through column by column of packs: the shape of normalisations.
#pragma once
#include "pack.cuh"

constexpr u32 THREADS = 256;

// Element of a parameter vector whose number type is known at run time: 0 f32, 1 bf16, 2 f16.
__device__ __forceinline__ float load_parameter(const void *p, u32 kind, u32 channel) {
  if (kind == 0) return static_cast<const float *>(p)[channel];
  if (kind == 1) return to_float(static_cast<const bf16 *>(p)[channel]);
  return to_float(static_cast<const f16 *>(p)[channel]);
}

// This thread's place: its rows of the matrix are begin + row, then every rows-th one below end; its channels are those of
// pack first + column, for first = 0, columns, 2 columns...
template <class T>
struct Place {
  u32 channels, packs, columns, column, row, rows, begin, end;
  bool active, vector;

  // `is_aligned`: all addresses that packs are moved to and from are.
  __device__ Place(u32 channels, u32 begin, u32 end, bool is_aligned) : channels(channels), begin(begin), end(end) {
    packs = (channels + WIDTH<T> - 1) / WIDTH<T>;
    // as few passes as possible, all of the same length
    const u32 passes = (packs + THREADS - 1) / THREADS;
    columns = (packs + passes - 1) / passes;
    rows = THREADS / columns;
    column = threadIdx.x % columns;
    row = threadIdx.x / columns;
    active = row < rows;
    vector = channels % WIDTH<T> == 0 && is_aligned;
  }

  __device__ __forceinline__ u32 count(u32 pack) const { return min(WIDTH<T>, channels - WIDTH<T> * pack); }
};

// Adds up the pairs of sums of the block's rows and writes those of channels WIDTH*first.. to out[channel].
template <class T>
__device__ __forceinline__ void write_channel_sums(const Place<T> &place, u32 first, const float *a, const float *b,
                                                   float2 *out) {
  __shared__ float2 sums[WIDTH<T> * THREADS];
  const u32 width = WIDTH<T> * place.columns;
  if (place.active)
    for (u32 k = 0; k < WIDTH<T>; k++)
      sums[place.row * width + WIDTH<T> * place.column + k] = make_float2(a[k], b[k]);
  __syncthreads();
  for (u32 i = threadIdx.x; i < width && WIDTH<T> * first + i < place.channels; i += THREADS) {
    float2 sum = sums[i];
    for (u32 row = 1; row < place.rows; row++) {
      sum.x += sums[row * width + i].x;
      sum.y += sums[row * width + i].y;
    }
    out[WIDTH<T> * first + i] = sum;
  }
  __syncthreads();
}
