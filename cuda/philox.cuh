// Philox4x32-10 (Salmon et al., SC 2011) and N(0, 1) from it: the numbers of src/random.rs.
//
// Counter: [position / 4, sample, iteration, purpose << 24 | task << 16 | step]; key: the seed.
#pragma once
#include "common.cuh"

struct Words {
  u32 v[4];
};

__device__ __forceinline__ Words philox4x32_10(Words counter, u32 key0, u32 key1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u32 high0 = __umulhi(0xD2511F53u, counter.v[0]), low0 = 0xD2511F53u * counter.v[0];
    const u32 high1 = __umulhi(0xCD9E8D57u, counter.v[2]), low1 = 0xCD9E8D57u * counter.v[2];
    counter = {{high1 ^ counter.v[1] ^ key0, low1, high0 ^ counter.v[3] ^ key1, low0}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Coordinates of a stream without the sample; as `Stream` in src/kernels/normal_rows.rs.
struct Stream {
  u32 key[2];
  u32 iteration;
  u32 tail;          // purpose << 24 | task << 16 | step
  u32 first_sample;  // global index of row 0
};

// Box-Muller, operation by operation as random::box_muller. The angle is below 2 pi: sincosf's way for arguments above
// 105,615, which may reserve a stack frame, is never taken.
__device__ __forceinline__ void box_muller(u32 word0, u32 word1, float *first, float *second) {
  const float to_unit = 1.f / 4294967296.f;
  const float u = (static_cast<float>(word0) + 1.f) * to_unit;
  const float angle = static_cast<float>(word1) * to_unit * 6.28318530717958647692f;
  const float radius = sqrtf(-2.f * logf(fminf(u, 1.f)));
  float sine, cosine;
  sincosf(angle, &sine, &cosine);
  *first = radius * cosine;
  *second = radius * sine;
}

// Numbers 4*quad .. 4*quad + 3 of the stream of row `row`.
__device__ __forceinline__ Quad normal_quad(const Stream &stream, u32 row, u32 quad) {
  const Words counter = {{quad, stream.first_sample + row, stream.iteration, stream.tail}};
  const Words words = philox4x32_10(counter, stream.key[0], stream.key[1]);
  Quad z;
  box_muller(words.v[0], words.v[1], &z.v[0], &z.v[1]);
  box_muller(words.v[2], words.v[3], &z.v[2], &z.v[3]);
  return z;
}
