// One DDIM transition: draws x_prev and scores it, or scores a given one.
//
//   eps = eps_uncond + g (eps_cond - eps_uncond),   mu = c_x x_t + c_eps eps
//   draw:  x_prev = mu + sigma z,   z from Philox in registers, the numbers of random::normal_rows
//   both:  log_prob = -mean_D((x_prev - mu)^2) / (2 sigma^2) - ln sigma - ln(2 pi)/2, of the x_prev that is stored
//
// sigma = 0: x_prev = mu, log_prob = NaN (there is no density).
//
// Threads: one block of 1024 per sample; a thread takes four neighbours, then the four 4096 further on. The sum is f32:
// within four neighbours, over a thread's groups, over the block by shuffles; always in that order.
// Memory: one pass. Draw: 2 s + 8 bytes per element (s = size of an element of eps); score: the same.
#include "philox.cuh"
#include "transition.cuh"

template <class T, bool DRAW>
__device__ __forceinline__ void ddim_step(const T *eps_uncond, const T *eps_cond, const float *x_t, float *x_prev,
                                          float *log_prob, u32 length, const Step &step, const Stream &stream) {
  const Inputs<T> inputs(eps_uncond, eps_cond, x_t, length);
  const bool vector = length % 4 == 0 && aligned(x_prev);
  x_prev += static_cast<size_t>(blockIdx.x) * length;
  float sum = 0.f;
  for (u32 quad = threadIdx.x; quad < inputs.quads(); quad += ROW_THREADS) {
    const u32 count = inputs.count(quad);
    const Quad mean = inputs.mean(quad, step);
    Quad value;
    if (DRAW) {
      value = mean;
      if (step.sigma > 0.f) {
        const Quad z = normal_quad(stream, blockIdx.x, quad);
#pragma unroll
        for (int k = 0; k < 4; k++) value.v[k] = mean.v[k] + step.sigma * z.v[k];
      }
      store_quad(x_prev + 4 * quad, value, count, vector);
    } else {
      value = load_quad(x_prev + 4 * quad, count, vector);
    }
    sum += square_sum(difference(value, mean, count));
  }
  sum = block_sum<ROW_THREADS>(sum);
  if (threadIdx.x == 0)
    log_prob[blockIdx.x] = step.sigma > 0.f ? log_prob_of(sum, length, step) : __uint_as_float(0x7fc00000u);
}

#define DDIM_STEP(NAME, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1) ddim_step_draw_##NAME(                                \
      const T *__restrict__ eps_uncond, const T *__restrict__ eps_cond, const float *__restrict__ x_t,            \
      float *__restrict__ x_prev, float *__restrict__ log_prob, u32 length, Step step, Stream stream) {           \
    ddim_step<T, true>(eps_uncond, eps_cond, x_t, x_prev, log_prob, length, step, stream);                        \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(ROW_THREADS, 1) ddim_step_score_##NAME(                               \
      const T *__restrict__ eps_uncond, const T *__restrict__ eps_cond, const float *__restrict__ x_t,            \
      const float *__restrict__ x_prev, float *__restrict__ log_prob, u32 length, Step step) {                    \
    ddim_step<T, false>(eps_uncond, eps_cond, x_t, const_cast<float *>(x_prev), log_prob, length, step, Stream{}); \
  }

DDIM_STEP(f32, float)
DDIM_STEP(bf16, bf16)
DDIM_STEP(f16, f16)
