// What the kernels share: number types, loads and stores of four neighbours, sums in a fixed order.
//
// One source for NVRTC and for the host emulation of the tests, which defines HOST_EMULATION. Compiled with
// --fmad=false: every product and every sum is rounded, so that two kernels which compute the same quantity get the
// same bits, and the plain Rust reference gets the bits of the element-wise part. The kernels wait for memory, not for
// arithmetic.
#pragma once
#ifndef HOST_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

typedef __nv_bfloat16 bf16;
typedef __half f16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Four neighbouring elements in registers, as f32.
struct Quad {
  float v[4];
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }

__device__ __forceinline__ void from_float(float v, float *out) { *out = v; }
__device__ __forceinline__ void from_float(float v, bf16 *out) { *out = __float2bfloat16_rn(v); }
__device__ __forceinline__ void from_float(float v, f16 *out) { *out = __float2half_rn(v); }

// Can four elements at any multiple of four be moved in one access?
template <class T>
__device__ __forceinline__ bool aligned(const T *p) {
  return (reinterpret_cast<size_t>(p) & (4 * sizeof(T) - 1)) == 0;
}

__device__ __forceinline__ Quad load_vector(const float *p) {
  const float4 w = *reinterpret_cast<const float4 *>(p);
  return {{w.x, w.y, w.z, w.w}};
}

// The two elements of a word; the low half comes first in memory. The last argument is their type.
__device__ __forceinline__ void to_two_floats(u32 word, float *v, bf16 *) {
  v[0] = __uint_as_float(word << 16);
  v[1] = __uint_as_float(word & 0xffff0000u);
}

// The low half of a word comes first in memory.
__device__ __forceinline__ Quad load_vector(const bf16 *p) {
  const uint2 w = *reinterpret_cast<const uint2 *>(p);
  return {{__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u), __uint_as_float(w.y << 16),
           __uint_as_float(w.y & 0xffff0000u)}};
}

__device__ __forceinline__ float half_bits(u32 word) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
}

__device__ __forceinline__ void to_two_floats(u32 word, float *v, f16 *) {
  v[0] = half_bits(word & 0xffffu);
  v[1] = half_bits(word >> 16);
}

__device__ __forceinline__ Quad load_vector(const f16 *p) {
  const uint2 w = *reinterpret_cast<const uint2 *>(p);
  return {{half_bits(w.x & 0xffffu), half_bits(w.x >> 16), half_bits(w.y & 0xffffu), half_bits(w.y >> 16)}};
}

__device__ __forceinline__ void store_vector(float *p, const Quad &q) {
  *reinterpret_cast<float4 *>(p) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
}

__device__ __forceinline__ u32 bits(bf16 v) { return __bfloat16_as_ushort(v); }
__device__ __forceinline__ u32 bits(f16 v) { return __half_as_ushort(v); }

template <class T>
__device__ __forceinline__ void store_vector(T *p, const Quad &q) {
  T v[4];
#pragma unroll
  for (int k = 0; k < 4; k++) from_float(q.v[k], &v[k]);
  *reinterpret_cast<uint2 *>(p) = make_uint2(bits(v[0]) | bits(v[1]) << 16, bits(v[2]) | bits(v[3]) << 16);
}

// Elements p[0..count], count <= 4, the others 0. `vector`: p is aligned; it is used where count = 4.
template <class T>
__device__ __forceinline__ Quad load_quad(const T *p, u32 count, bool vector) {
  if (vector && count == 4) return load_vector(p);
  Quad q;
#pragma unroll
  for (u32 k = 0; k < 4; k++) q.v[k] = k < count ? to_float(p[k]) : 0.f;
  return q;
}

template <class T>
__device__ __forceinline__ void store_quad(T *p, const Quad &q, u32 count, bool vector) {
  if (vector && count == 4) return store_vector(p, q);
#pragma unroll
  for (u32 k = 0; k < 4; k++)
    if (k < count) from_float(q.v[k], &p[k]);
}

// Sum over the warp in a fixed order; every lane gets it.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Sum over a block of THREADS (a multiple of 32, all of them here) in a fixed order; every thread gets it. Once per kernel.
template <int THREADS, class T>
__device__ __forceinline__ T block_sum(T v) {
  __shared__ T partial[THREADS / 32];
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  const u32 lane = threadIdx.x % 32;
  return warp_sum(lane < THREADS / 32 ? partial[lane] : T(0));
}
