// Memory accesses of 16 bytes, whatever the number type.
#pragma once
#include "common.cuh"

// Elements that one access of 16 bytes moves.
template <class T>
constexpr u32 WIDTH = 16 / sizeof(T);

// WIDTH neighbouring elements as they lie in memory.
template <class T>
struct Pack {
  uint4 bits;
};

// Elements p[0..count], the others 0. `vector`: count = WIDTH and p is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T *p, u32 count, bool vector) {
  if (vector) return {*reinterpret_cast<const uint4 *>(p)};
  T elements[WIDTH<T>];
#pragma unroll
  for (u32 k = 0; k < WIDTH<T>; k++) {
    if (k < count)
      elements[k] = p[k];
    else
      from_float(0.f, &elements[k]);
  }
  Pack<T> pack;
  memcpy(&pack, elements, sizeof(pack));
  return pack;
}

__device__ __forceinline__ void unpack(const Pack<float> &pack, float *v) {
  const uint4 w = pack.bits;
  v[0] = __uint_as_float(w.x);
  v[1] = __uint_as_float(w.y);
  v[2] = __uint_as_float(w.z);
  v[3] = __uint_as_float(w.w);
}

template <class T>
__device__ __forceinline__ void unpack(const Pack<T> &pack, float *v) {
  const u32 words[4] = {pack.bits.x, pack.bits.y, pack.bits.z, pack.bits.w};
#pragma unroll
  for (u32 k = 0; k < 4; k++) to_two_floats(words[k], v + 2 * k, static_cast<T *>(nullptr));
}

template <class T>
__device__ __forceinline__ void store_pack(T *p, const float *v, u32 count, bool vector) {
  T elements[WIDTH<T>];
#pragma unroll
  for (u32 k = 0; k < WIDTH<T>; k++) from_float(v[k], &elements[k]);
  if (vector) {
    uint4 bits;
    memcpy(&bits, elements, sizeof(bits));
    *reinterpret_cast<uint4 *>(p) = bits;
    return;
  }
#pragma unroll
  for (u32 k = 0; k < WIDTH<T>; k++)
    if (k < count) p[k] = elements[k];
}

// Can packs be moved to and from all these addresses?
__device__ __forceinline__ bool aligned_packs(const void *a, const void *b = nullptr, const void *c = nullptr) {
  return (reinterpret_cast<size_t>(a) | reinterpret_cast<size_t>(b) | reinterpret_cast<size_t>(c)) % 16 == 0;
}
