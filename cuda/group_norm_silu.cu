// Group normalisation, optionally followed by SiLU, of channels-last activations [N, pixels, C] plus a shift of every
// sample's channels [N, C] (a bias, a time embedding; or none), forward and backward.
//
//   forward   xhat = (x + shift - mean_g) rstd_g,  u = xhat w_c + b_c,  y = u or u s(u),  s(u) = 1/(1 + exp(-u))
//   backward  du = dy or dy s(u)(1 + u (1 - s(u))),  dw_c = sum du xhat,  db_c = sum du  over n and pixels,
//             dx = rstd_g (du w_c - A_g/M - xhat B_g/M),  A_g = sum du w_c,  B_g = sum du w_c xhat  over the M elements
//             of the group,
//             dshift = sum of dx over pixels = rstd_g (w_c sum du - pixels (A_g/M + mean xhat_c B_g/M))
// mean and variance are of x + shift over the M = pixels * C/groups elements of one sample's group; rstd = 1/sqrt(variance + epsilon).
//
// Three launches forward: channel sums of pieces of the pixels; statistics from them; y. Four backward: channel sums of
// du and du xhat; group sums from them; dw and db; dx. How the pixels are cut depends on their number alone, so a
// sample's result does not depend on the batch. Sums are f32 within a piece and f64 where pieces, channels and samples
// are put together, always in the same order; the forward sums are of x minus the channel's first pixel, so a mean far
// from 0 costs no digits.
//
// Threads: a block of 256 has one piece of one sample's pixels: columns of 16 bytes of channels (a pack) times rows of
// pixels, so that neighbouring threads read neighbouring channels; each thread has several pixels on the way at once.
// Statistics and group sums: one warp per sample and group. The exponential and the quotient of s(u) are the fast ones
// (2 units in the last place and one more per unit of |u|): the exact ones take longer than the memory does.
// Memory, bytes per element of size s: forward 3 s (x twice, y), backward 5 s (x and dy twice, dx).
#include "columns.cuh"

// As `DeviceShape` in src/kernels/group_norm_silu.rs.
struct Shape {
  u32 pixels, channels, groups;
  u32 pieces, pixels_per_piece;
  u32 silu;            // 0 or 1
  u32 parameter_kind;  // of weight and bias: 0 f32, 1 bf16, 2 f16
  double epsilon;

  __device__ __forceinline__ float shift_of(const float *shift, u32 channel) const {
    return shift ? shift[static_cast<size_t>(blockIdx.y) * channels + channel] : 0.f;
  }
  __device__ __forceinline__ u32 group_of(u32 channel) const { return channel / (channels / groups); }
  __device__ __forceinline__ float parameter(const void *p, u32 channel) const {
    return load_parameter(p, parameter_kind, channel);
  }
  // This thread's part of the block's piece.
  template <class T>
  __device__ __forceinline__ Place<T> place(const void *a, const void *b = nullptr, const void *c = nullptr) const {
    const u32 begin = blockIdx.x * pixels_per_piece;
    return Place<T>(channels, begin, min(begin + pixels_per_piece, pixels), aligned_packs(a, b, c));
  }
};

// What the channels of a pack need: u = (x - mean) scale + bias; the mean is that of x without the channel's shift.
template <class T>
struct ChannelConstants {
  float mean[WIDTH<T>], rstd[WIDTH<T>], weight[WIDTH<T>], scale[WIDTH<T>], bias[WIDTH<T>];

  __device__ __forceinline__ ChannelConstants(const Shape &shape, const float *shifts, const float *means,
                                              const float *rstds, const void *weights, const void *biases, u32 pack,
                                              u32 count) {
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) {
      const u32 channel = WIDTH<T> * pack + (k < count ? k : 0);
      const u32 group = blockIdx.y * shape.groups + shape.group_of(channel);
      mean[k] = means[group] - shape.shift_of(shifts, channel);
      rstd[k] = rstds[group];
      weight[k] = shape.parameter(weights, channel);
      scale[k] = rstd[k] * weight[k];
      bias[k] = shape.parameter(biases, channel);
    }
  }
};

__device__ __forceinline__ float sigmoid(float u) { return __fdividef(1.f, 1.f + __expf(-u)); }

__device__ __forceinline__ float2 *piece_of_block(const Shape &shape, float2 *partial) {
  return partial + (static_cast<size_t>(blockIdx.y) * shape.pieces + blockIdx.x) * shape.channels;
}

// Pixels of a thread that are on the way from memory at once.
constexpr u32 IN_FLIGHT = 4, IN_FLIGHT_OF_TWO = 2;

// partial[n][piece][channel] = sums of (x - first) and (x - first)^2; first = the channel's first pixel.
template <class T>
__device__ __forceinline__ void forward_sums(const T *x, float2 *partial, const Shape &shape) {
  const Place<T> place = shape.place<T>(x);
  x += static_cast<size_t>(blockIdx.y) * shape.pixels * shape.channels;
  for (u32 first = 0; first < place.packs; first += place.columns) {
    const u32 pack = first + place.column;
    float sum[WIDTH<T>] = {}, squares[WIDTH<T>] = {};
    if (place.active && pack < place.packs) {
      const u32 count = place.count(pack);
      const T *column = x + WIDTH<T> * pack;
      float origin[WIDTH<T>];
      unpack(load_pack(column, count, place.vector), origin);
      for (u32 pixel = place.begin + place.row; pixel < place.end; pixel += IN_FLIGHT * place.rows) {
        Pack<T> packs[IN_FLIGHT];
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; i++) {
          // beyond the end: the last pixel again, unused
          const u32 at = min(pixel + i * place.rows, place.end - 1);
          packs[i] = load_pack(column + static_cast<size_t>(at) * shape.channels, count, place.vector);
        }
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; i++) {
          if (pixel + i * place.rows >= place.end) break;
          float value[WIDTH<T>];
          unpack(packs[i], value);
#pragma unroll
          for (u32 k = 0; k < WIDTH<T>; k++) {
            const float d = value[k] - origin[k];
            sum[k] += d;
            squares[k] = fmaf(d, d, squares[k]);
          }
        }
      }
    }
    write_channel_sums<T>(place, first, sum, squares, piece_of_block(shape, partial));
  }
}

// Sum of a channel's pieces.
__device__ __forceinline__ double2 sum_of_pieces(const float2 *partial, const Shape &shape, u32 channel) {
  const float2 *at = partial + static_cast<size_t>(blockIdx.y) * shape.pieces * shape.channels + channel;
  double2 sum = make_double2(0.0, 0.0);
  for (u32 piece = 0; piece < shape.pieces; piece++) {
    const float2 part = at[static_cast<size_t>(piece) * shape.channels];
    sum.x += part.x;
    sum.y += part.y;
  }
  return sum;
}

// mean[n][group], rstd[n][group], and xhat[n][channel], the mean of a channel's xhat; one warp, blockIdx = (group, n).
// Means are relative to the group's first element, and variance = mean of the channels' variances + variance of the
// channels' means.
template <class T>
__device__ __forceinline__ void statistics(const T *x, const float *shift, const float2 *partial, float *mean,
                                           float *rstd, float *xhat, const Shape &shape) {
  const u32 width = shape.channels / shape.groups, first_channel = blockIdx.x * width;
  const double pixels = shape.pixels;
  x += static_cast<size_t>(blockIdx.y) * shape.pixels * shape.channels;
  const auto first_of = [&](u32 channel) {
    return static_cast<double>(to_float(x[channel])) + shape.shift_of(shift, channel);
  };
  const double origin = first_of(first_channel);
  double of_means = 0.0, of_squares = 0.0, within = 0.0;
  for (u32 i = threadIdx.x; i < width; i += 32) {
    const double2 sums = sum_of_pieces(partial, shape, first_channel + i);
    const double shifted = sums.x / pixels;
    const double channel_mean = shifted + (first_of(first_channel + i) - origin);
    of_means += channel_mean;
    of_squares += channel_mean * channel_mean;
    within += sums.y / pixels - shifted * shifted;
  }
  of_means = warp_sum(of_means) / width;
  of_squares = warp_sum(of_squares) / width;
  within = warp_sum(within) / width;
  const double variance = within + (of_squares - of_means * of_means);
  // NaN stays NaN; only rounding can make a variance negative
  const double scale = 1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + shape.epsilon);
  if (threadIdx.x == 0) {
    mean[blockIdx.y * shape.groups + blockIdx.x] = static_cast<float>(origin + of_means);
    rstd[blockIdx.y * shape.groups + blockIdx.x] = static_cast<float>(scale);
  }
  if (!xhat) return;
  for (u32 i = threadIdx.x; i < width; i += 32) {
    const u32 channel = first_channel + i;
    const double channel_mean = sum_of_pieces(partial, shape, channel).x / pixels + (first_of(channel) - origin);
    xhat[static_cast<size_t>(blockIdx.y) * shape.channels + channel] =
        static_cast<float>((channel_mean - of_means) * scale);
  }
}

template <class T>
__device__ __forceinline__ void forward(const T *x, const float *shift, const void *weight, const void *bias, const float *mean,
                                        const float *rstd, T *y, const Shape &shape) {
  const Place<T> place = shape.place<T>(x, y);
  const size_t sample = static_cast<size_t>(blockIdx.y) * shape.pixels * shape.channels;
  if (!place.active) return;
  for (u32 pack = place.column; pack < place.packs; pack += place.columns) {
    const u32 count = place.count(pack);
    const ChannelConstants<T> c(shape, shift, mean, rstd, weight, bias, pack, count);
    const size_t column = sample + WIDTH<T> * pack;
    for (u32 pixel = place.begin + place.row; pixel < place.end; pixel += IN_FLIGHT * place.rows) {
      Pack<T> packs[IN_FLIGHT];
#pragma unroll
      for (u32 i = 0; i < IN_FLIGHT; i++) {
        const u32 at = min(pixel + i * place.rows, place.end - 1);
        packs[i] = load_pack(x + column + static_cast<size_t>(at) * shape.channels, count, place.vector);
      }
#pragma unroll
      for (u32 i = 0; i < IN_FLIGHT; i++) {
        const u32 at = pixel + i * place.rows;
        if (at >= place.end) break;
        float value[WIDTH<T>];
        unpack(packs[i], value);
#pragma unroll
        for (u32 k = 0; k < WIDTH<T>; k++) {
          const float u = fmaf(value[k] - c.mean[k], c.scale[k], c.bias[k]);
          value[k] = shape.silu ? u * sigmoid(u) : u;
        }
        store_pack(y + column + static_cast<size_t>(at) * shape.channels, value, count, place.vector);
      }
    }
  }
}

// du from dy and u.
__device__ __forceinline__ float grad_before_silu(float dy, float u, u32 silu) {
  if (!silu) return dy;
  const float s = sigmoid(u);
  return dy * (s * fmaf(u, 1.f - s, 1.f));
}

// partial[n][piece][channel] = sums of du and du xhat.
template <class T>
__device__ __forceinline__ void backward_sums(const T *x, const float *shift, const T *dy, const void *weight, const void *bias,
                                              const float *mean, const float *rstd, float2 *partial,
                                              const Shape &shape) {
  const Place<T> place = shape.place<T>(x, dy);
  const size_t sample = static_cast<size_t>(blockIdx.y) * shape.pixels * shape.channels;
  for (u32 first = 0; first < place.packs; first += place.columns) {
    const u32 pack = first + place.column;
    float sum[WIDTH<T>] = {}, products[WIDTH<T>] = {};
    if (place.active && pack < place.packs) {
      const u32 count = place.count(pack);
      const ChannelConstants<T> c(shape, shift, mean, rstd, weight, bias, pack, count);
      const size_t column = sample + WIDTH<T> * pack;
      for (u32 pixel = place.begin + place.row; pixel < place.end; pixel += IN_FLIGHT_OF_TWO * place.rows) {
        Pack<T> values[IN_FLIGHT_OF_TWO], grads[IN_FLIGHT_OF_TWO];
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT_OF_TWO; i++) {
          const size_t at = column + static_cast<size_t>(min(pixel + i * place.rows, place.end - 1)) * shape.channels;
          values[i] = load_pack(x + at, count, place.vector);
          grads[i] = load_pack(dy + at, count, place.vector);
        }
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT_OF_TWO; i++) {
          if (pixel + i * place.rows >= place.end) break;
          float value[WIDTH<T>], grad[WIDTH<T>];
          unpack(values[i], value);
          unpack(grads[i], grad);
#pragma unroll
          for (u32 k = 0; k < WIDTH<T>; k++) {
            const float centred = value[k] - c.mean[k];
            const float du = grad_before_silu(grad[k], fmaf(centred, c.scale[k], c.bias[k]), shape.silu);
            sum[k] += du;
            products[k] = fmaf(du, centred, products[k]);
          }
        }
      }
#pragma unroll
      for (u32 k = 0; k < WIDTH<T>; k++) products[k] *= c.rstd[k];
    }
    write_channel_sums<T>(place, first, sum, products, piece_of_block(shape, partial));
  }
}

// channel_sums[n][channel] = a channel's sums over all pieces; group_means[n][group] = A/M, B/M; dshift[n][channel] where
// there is one. One warp, blockIdx = (group, n).
extern "C" __global__ void __launch_bounds__(32)
    group_norm_silu_backward_groups(const float2 *__restrict__ partial, const void *__restrict__ weight,
                                    const float *__restrict__ rstd, const float *__restrict__ xhat,
                                    double2 *__restrict__ channel_sums, float2 *__restrict__ group_means,
                                    float *__restrict__ dshift, Shape shape) {
  const u32 width = shape.channels / shape.groups, first_channel = blockIdx.x * width;
  const u32 group = blockIdx.y * shape.groups + blockIdx.x;
  double of_du = 0.0, of_products = 0.0;
  for (u32 i = threadIdx.x; i < width; i += 32) {
    const u32 channel = first_channel + i;
    const double2 sums = sum_of_pieces(partial, shape, channel);
    channel_sums[static_cast<size_t>(blockIdx.y) * shape.channels + channel] = sums;
    const double w = shape.parameter(weight, channel);
    of_du += w * sums.x;
    of_products += w * sums.y;
  }
  const double elements = static_cast<double>(shape.pixels) * width;
  of_du = warp_sum(of_du) / elements;
  of_products = warp_sum(of_products) / elements;
  if (threadIdx.x == 0)
    group_means[group] = make_float2(static_cast<float>(of_du), static_cast<float>(of_products));
  if (!dshift) return;
  for (u32 i = threadIdx.x; i < width; i += 32) {
    const size_t at = static_cast<size_t>(blockIdx.y) * shape.channels + first_channel + i;
    const double of_channel = shape.parameter(weight, first_channel + i) * channel_sums[at].x;
    dshift[at] = static_cast<float>(rstd[group] * (of_channel - shape.pixels * (of_du + xhat[at] * of_products)));
  }
}

// dw and db of one channel per thread, over the samples in order.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    group_norm_silu_backward_parameters(const double2 *__restrict__ channel_sums, float *__restrict__ grad_weight,
                                        float *__restrict__ grad_bias, u32 samples, u32 channels) {
  const u32 channel = blockIdx.x * THREADS + threadIdx.x;
  if (channel >= channels) return;
  double2 sum = make_double2(0.0, 0.0);
  for (u32 n = 0; n < samples; n++) {
    const double2 part = channel_sums[static_cast<size_t>(n) * channels + channel];
    sum.x += part.x;
    sum.y += part.y;
  }
  grad_bias[channel] = static_cast<float>(sum.x);
  grad_weight[channel] = static_cast<float>(sum.y);
}

template <class T>
__device__ __forceinline__ void backward(const T *x, const float *shift, const T *dy, const void *weight, const void *bias,
                                         const float *mean, const float *rstd, const float2 *group_means, T *dx,
                                         const Shape &shape) {
  const Place<T> place = shape.place<T>(x, dy, dx);
  const size_t sample = static_cast<size_t>(blockIdx.y) * shape.pixels * shape.channels;
  if (!place.active) return;
  for (u32 pack = place.column; pack < place.packs; pack += place.columns) {
    const u32 count = place.count(pack);
    const ChannelConstants<T> c(shape, shift, mean, rstd, weight, bias, pack, count);
    float of_du[WIDTH<T>], of_products[WIDTH<T>];  // A/M, rstd B/M
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) {
      const u32 channel = WIDTH<T> * pack + (k < count ? k : 0);
      const float2 means = group_means[blockIdx.y * shape.groups + shape.group_of(channel)];
      of_du[k] = means.x;
      of_products[k] = c.rstd[k] * means.y;
    }
    const size_t column = sample + WIDTH<T> * pack;
    for (u32 pixel = place.begin + place.row; pixel < place.end; pixel += IN_FLIGHT_OF_TWO * place.rows) {
      Pack<T> values[IN_FLIGHT_OF_TWO], grads[IN_FLIGHT_OF_TWO];
#pragma unroll
      for (u32 i = 0; i < IN_FLIGHT_OF_TWO; i++) {
        const size_t at = column + static_cast<size_t>(min(pixel + i * place.rows, place.end - 1)) * shape.channels;
        values[i] = load_pack(x + at, count, place.vector);
        grads[i] = load_pack(dy + at, count, place.vector);
      }
#pragma unroll
      for (u32 i = 0; i < IN_FLIGHT_OF_TWO; i++) {
        const u32 at = pixel + i * place.rows;
        if (at >= place.end) break;
        float value[WIDTH<T>], grad[WIDTH<T>];
        unpack(values[i], value);
        unpack(grads[i], grad);
#pragma unroll
        for (u32 k = 0; k < WIDTH<T>; k++) {
          const float centred = value[k] - c.mean[k];
          const float du = grad_before_silu(grad[k], fmaf(centred, c.scale[k], c.bias[k]), shape.silu);
          // both roundings: a group of one element has the gradient 0
          value[k] = c.rstd[k] * (du * c.weight[k] - fmaf(centred, of_products[k], of_du[k]));
        }
        store_pack(dx + column + static_cast<size_t>(at) * shape.channels, value, count, place.vector);
      }
    }
  }
}

#define GROUP_NORM_SILU(NAME, T)                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                            \
      group_norm_silu_sums_##NAME(const T *__restrict__ x, float2 *__restrict__ partial, Shape shape) {               \
    forward_sums<T>(x, partial, shape);                                                                               \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(32) group_norm_silu_statistics_##NAME(                                 \
      const T *__restrict__ x, const float *__restrict__ shift, const float2 *__restrict__ partial,                   \
      float *__restrict__ mean, float *__restrict__ rstd, float *__restrict__ xhat, Shape shape) {                    \
    statistics<T>(x, shift, partial, mean, rstd, xhat, shape);                                                        \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 3) group_norm_silu_forward_##NAME(                            \
      const T *__restrict__ x, const float *__restrict__ shift, const void *__restrict__ weight,                      \
      const void *__restrict__ bias, const float *__restrict__ mean, const float *__restrict__ rstd,                  \
      T *__restrict__ y, Shape shape) {                                                                               \
    forward<T>(x, shift, weight, bias, mean, rstd, y, shape);                                                         \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) group_norm_silu_backward_sums_##NAME(                      \
      const T *__restrict__ x, const float *__restrict__ shift, const T *__restrict__ dy,                             \
      const void *__restrict__ weight, const void *__restrict__ bias, const float *__restrict__ mean,                 \
      const float *__restrict__ rstd, float2 *__restrict__ partial, Shape shape) {                                    \
    backward_sums<T>(x, shift, dy, weight, bias, mean, rstd, partial, shape);                                         \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) group_norm_silu_backward_##NAME(                           \
      const T *__restrict__ x, const float *__restrict__ shift, const T *__restrict__ dy,                             \
      const void *__restrict__ weight, const void *__restrict__ bias, const float *__restrict__ mean,                 \
      const float *__restrict__ rstd, const float2 *__restrict__ group_means, T *__restrict__ dx, Shape shape) {      \
    backward<T>(x, shift, dy, weight, bias, mean, rstd, group_means, dx, shape);                                      \
  }

GROUP_NORM_SILU(f32, float)
GROUP_NORM_SILU(bf16, bf16)
GROUP_NORM_SILU(f16, f16)
