// p(x_prev | x_t): guidance, mean and log-probability. ddim_step draws and scores with it, clipped_surrogate scores
// with it: the same operations on the same elements in the same order, so that before the first update
// exp(log_prob - log_prob_old) is exactly 1 as long as the model's output is the same.
#pragma once
#include "common.cuh"

// Threads of a block; one block has one sample. It fixes the order of the sum over a row.
constexpr int ROW_THREADS = 1024;

// What all samples share; as `DeviceStep` in src/kernels/ddim_step.rs.
struct Step {
  float c_x, c_eps, guidance_scale, sigma;
  double two_variance;  // 2 sigma^2
  double log_sigma;
};

// The three rows of one sample, `length` elements each.
template <class T>
struct Inputs {
  const T *eps_uncond;
  const T *eps_cond;
  const float *x_t;
  u32 length;
  bool vector;

  __device__ Inputs(const T *eps_uncond, const T *eps_cond, const float *x_t, u32 length)
      : eps_uncond(eps_uncond + static_cast<size_t>(blockIdx.x) * length),
        eps_cond(eps_cond + static_cast<size_t>(blockIdx.x) * length),
        x_t(x_t + static_cast<size_t>(blockIdx.x) * length),
        length(length),
        vector(length % 4 == 0 && aligned(eps_uncond) && aligned(eps_cond) && aligned(x_t)) {}

  __device__ __forceinline__ u32 quads() const { return (length + 3) / 4; }
  __device__ __forceinline__ u32 count(u32 quad) const { return min(4u, length - 4 * quad); }

  // mu = c_x x_t + c_eps (eps_uncond + g (eps_cond - eps_uncond))
  __device__ __forceinline__ Quad mean(u32 quad, const Step &step) const {
    const u32 n = count(quad);
    const Quad uncond = load_quad(eps_uncond + 4 * quad, n, vector);
    const Quad cond = load_quad(eps_cond + 4 * quad, n, vector);
    const Quad x = load_quad(x_t + 4 * quad, n, vector);
    Quad mean;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float eps = uncond.v[k] + step.guidance_scale * (cond.v[k] - uncond.v[k]);
      mean.v[k] = step.c_x * x.v[k] + step.c_eps * eps;
    }
    return mean;
  }
};

// x_prev - mu; 0 beyond the end of the row.
__device__ __forceinline__ Quad difference(const Quad &x_prev, const Quad &mean, u32 count) {
  Quad d;
#pragma unroll
  for (u32 k = 0; k < 4; k++) d.v[k] = k < count ? x_prev.v[k] - mean.v[k] : 0.f;
  return d;
}

__device__ __forceinline__ float square_sum(const Quad &d) {
  return (d.v[0] * d.v[0] + d.v[1] * d.v[1]) + (d.v[2] * d.v[2] + d.v[3] * d.v[3]);
}

// log p, nats per element, from the sum of (x_prev - mu)^2 over a row.
__device__ __forceinline__ float log_prob_of(float sum, u32 length, const Step &step) {
  const double half_ln_two_pi = 0.91893853320467274178;
  const double mean_square = static_cast<double>(sum) / static_cast<double>(length);
  return static_cast<float>(-mean_square / step.two_variance - step.log_sigma - half_ln_two_pi);
}
