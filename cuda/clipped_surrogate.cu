// The clipped objective of one denoising step (Eq. 7): loss, diagnostics and both gradients of every sample.
//
//   w = exp(log_prob - log_prob_old),   L = scale * sum max(-A w, -A clip(w, 1 - c, 1 + c)),   scale = weight / N
//   dL/dlog_prob = -scale A w where the unclipped branch is active, else 0
//   dlog_prob/dmu = (x_prev - mu) / (sigma^2 D),   dmu/deps = c_eps,   deps/deps_cond = g,   deps/deps_uncond = 1 - g
//
// A sample whose advantage A is NaN is excluded: terms and gradients are exactly 0 whatever its rows hold. A NaN
// log-probability takes the unclipped branch and stays visible. The scalars of a sample are worked out in f64.
//
// Threads: one block of 1024 per sample, elements and sum as in ddim_step. A thread keeps its first 16 differences
// x_prev - mu in registers for the second half, the gradients; those beyond (rows over 16,384) are computed again.
// Memory: reads 2 s + 8 bytes per element (s = size of an element of eps), writes 8; once up to D = 16,384.
#include "transition.cuh"

constexpr int KEPT = 4;   // groups of four per thread in registers
constexpr int TERMS = 6;  // log_prob, ratio, loss, approx_kl, clipped, used

// As `DeviceObjective` in src/kernels/clipped_surrogate.rs.
struct Objective {
  double clip_range;
  double scale;
  double c_eps;
  double sigma;
};

// Terms of one sample; returns dloss/dlog_prob.
__device__ __forceinline__ double surrogate(float log_prob, float log_prob_old, float advantage, double clip_range,
                                            float *terms) {
  const double log_ratio = static_cast<double>(log_prob - log_prob_old);
  const double ratio = exp(log_ratio), low = 1.0 - clip_range, high = 1.0 + clip_range;
  const double kept = ratio < low ? low : ratio > high ? high : ratio;
  const double unclipped = -static_cast<double>(advantage) * ratio;
  const double clipped = -static_cast<double>(advantage) * kept;
  const bool stopped = clipped > unclipped;
  terms[0] = log_prob;
  terms[1] = static_cast<float>(ratio);
  terms[2] = static_cast<float>(stopped ? clipped : unclipped);
  terms[3] = static_cast<float>(0.5 * log_ratio * log_ratio);
  terms[4] = fabs(ratio - 1.0) > clip_range ? 1.f : 0.f;
  terms[5] = 1.f;
  return stopped ? 0.0 : unclipped;
}

// Writes both gradients of four neighbours; a gradient that is not wanted has a null pointer.
__device__ __forceinline__ void write_gradients(float *grad_uncond, float *grad_cond, u32 quad, u32 count, bool vector,
                                                const Quad &d, float factor, float guidance_scale) {
  Quad uncond, cond;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    // a factor of 0 means 0 also where the difference is infinite or NaN
    const float grad_eps = factor == 0.f ? 0.f : factor * d.v[k];
    uncond.v[k] = (1.f - guidance_scale) * grad_eps;
    cond.v[k] = guidance_scale * grad_eps;
  }
  if (grad_uncond) store_quad(grad_uncond + 4 * quad, uncond, count, vector);
  store_quad(grad_cond + 4 * quad, cond, count, vector);
}

template <class T>
__device__ __forceinline__ void clipped_surrogate(const T *eps_uncond, const T *eps_cond, const float *x_t,
                                                  const float *x_prev, const float *log_prob_old,
                                                  const float *advantage, float *terms, float *grad_uncond,
                                                  float *grad_cond, u32 length, const Step &step,
                                                  const Objective &objective) {
  const Inputs<T> inputs(eps_uncond, eps_cond, x_t, length);
  const u32 quads = inputs.quads();
  const bool read_vector = length % 4 == 0 && aligned(x_prev);
  const bool write_vector = length % 4 == 0 && aligned(grad_uncond) && aligned(grad_cond);
  const size_t row = static_cast<size_t>(blockIdx.x) * length;
  x_prev += row;
  grad_cond += row;
  if (grad_uncond) grad_uncond += row;
  terms += blockIdx.x * TERMS;
  const float of_sample = advantage[blockIdx.x];

  Quad kept[KEPT] = {};
  float sum = 0.f;
  const bool used = !isnan(of_sample);
  if (used) {
    auto at = [&](u32 quad) {
      const u32 count = inputs.count(quad);
      return difference(load_quad(x_prev + 4 * quad, count, read_vector), inputs.mean(quad, step), count);
    };
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
      const u32 quad = threadIdx.x + i * ROW_THREADS;
      if (quad < quads) {
        kept[i] = at(quad);
        sum += square_sum(kept[i]);
      }
    }
    for (u32 quad = threadIdx.x + KEPT * ROW_THREADS; quad < quads; quad += ROW_THREADS) sum += square_sum(at(quad));
  }
  sum = block_sum<ROW_THREADS>(sum);

  __shared__ float shared_factor;
  if (threadIdx.x == 0) {
    double slope = 0.0;
    if (used) {
      slope = surrogate(log_prob_of(sum, length, step), log_prob_old[blockIdx.x], of_sample, objective.clip_range, terms);
    } else {
      for (int i = 0; i < TERMS; i++) terms[i] = 0.f;
    }
    const double spread = objective.sigma * objective.sigma * static_cast<double>(length);
    shared_factor = slope == 0.0 ? 0.f : static_cast<float>(slope * objective.scale * objective.c_eps / spread);
  }
  __syncthreads();
  const float factor = shared_factor;

#pragma unroll
  for (int i = 0; i < KEPT; i++) {
    const u32 quad = threadIdx.x + i * ROW_THREADS;
    if (quad < quads)
      write_gradients(grad_uncond, grad_cond, quad, inputs.count(quad), write_vector, kept[i], factor, step.guidance_scale);
  }
  for (u32 quad = threadIdx.x + KEPT * ROW_THREADS; quad < quads; quad += ROW_THREADS) {
    const u32 count = inputs.count(quad);
    Quad d = {};
    if (factor != 0.f)
      d = difference(load_quad(x_prev + 4 * quad, count, read_vector), inputs.mean(quad, step), count);
    write_gradients(grad_uncond, grad_cond, quad, count, write_vector, d, factor, step.guidance_scale);
  }
}

#define CLIPPED_SURROGATE(NAME, T)                                                                                   \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1) clipped_surrogate_##NAME(                                \
      const T *__restrict__ eps_uncond, const T *__restrict__ eps_cond, const float *__restrict__ x_t,               \
      const float *__restrict__ x_prev, const float *__restrict__ log_prob_old, const float *__restrict__ advantage, \
      float *__restrict__ terms, float *__restrict__ grad_uncond, float *__restrict__ grad_cond, u32 length,         \
      Step step, Objective objective) {                                                                              \
    clipped_surrogate<T>(eps_uncond, eps_cond, x_t, x_prev, log_prob_old, advantage, terms, grad_uncond, grad_cond,  \
                         length, step, objective);                                                                   \
  }

CLIPPED_SURROGATE(f32, float)
CLIPPED_SURROGATE(bf16, bf16)
CLIPPED_SURROGATE(f16, f16)
