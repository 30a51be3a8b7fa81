// Layer normalisation of rows of `width` elements, forward and backward.
//
//   forward   xhat = (x - mean) rstd,  y = xhat w + b
//   backward  dx = rstd (dy w - mean(dy w) - xhat mean(dy w xhat)),  dw = sum dy xhat,  db = sum dy  over the rows
//
// mean and variance are of a row; rstd = 1/sqrt(variance + epsilon). A row's lanes (8, 16 or 32 neighbours of a warp) hold
// it in registers, at most 8 packs of 16 bytes each, so that it is read once: 128 packs for 16 lanes, 256 for 32.
//
// Sums are f32 within a row and a piece of the rows and f64 over the pieces, always in the same order; how the rows are cut
// depends on their number alone.
// Memory, bytes per element of size s: forward 2 s; backward 3 s for dx and 2 s for dw and db.
#include "columns.cuh"

constexpr u32 MOST = 8;  // packs of a lane

// As `DeviceShape` in src/kernels/layer_norm.rs.
struct Shape {
  u32 rows, width, lanes;
  u32 rows_per_piece;
  u32 parameter_kind;  // of weight and bias: 0 f32, 1 bf16, 2 f16
  float epsilon;
};

template <class T>
constexpr u32 KIND = 0;
template <>
constexpr u32 KIND<bf16> = 1;
template <>
constexpr u32 KIND<f16> = 2;

// Sum over a row's lanes in a fixed order; every lane gets it. All threads of the warp call it.
__device__ __forceinline__ float row_sum(float v, u32 lanes) {
  for (u32 offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// WIDTH parameters from channel WIDTH*pack on.
template <class T>
__device__ __forceinline__ void load_parameters(const void *p, const Shape &shape, u32 pack, u32 count, bool vector,
                                                float *v) {
  if (vector && shape.parameter_kind == KIND<T>) {
    unpack(load_pack(static_cast<const T *>(p) + WIDTH<T> * pack, count, true), v);
    return;
  }
#pragma unroll
  for (u32 k = 0; k < WIDTH<T>; k++)
    v[k] = k < count ? load_parameter(p, shape.parameter_kind, WIDTH<T> * pack + k) : 0.f;
}

// This thread's row and its packs lane, lane + lanes, ...
template <class T>
struct Row {
  u32 row, lane, packs;
  bool active, vector;
  size_t begin;

  __device__ Row(const Shape &shape, bool is_aligned) {
    row = blockIdx.x * (THREADS / shape.lanes) + threadIdx.x / shape.lanes;
    lane = threadIdx.x % shape.lanes;
    packs = (shape.width + WIDTH<T> - 1) / WIDTH<T>;
    active = row < shape.rows;
    vector = shape.width % WIDTH<T> == 0 && is_aligned;
    begin = static_cast<size_t>(active ? row : 0) * shape.width;
  }

  __device__ __forceinline__ u32 pack(u32 i, const Shape &shape) const { return lane + i * shape.lanes; }
  __device__ __forceinline__ bool has(u32 pack) const { return active && pack < packs; }
  __device__ __forceinline__ u32 count(u32 pack, const Shape &shape) const {
    return min(WIDTH<T>, shape.width - WIDTH<T> * pack);
  }
};

template <class T>
__device__ __forceinline__ void forward(const T *x, const void *weight, const void *bias, T *y, float *mean, float *rstd,
                                        const Shape &shape) {
  const Row<T> at(shape, aligned_packs(x, y) && aligned_packs(weight, bias));
  Pack<T> packs[MOST];
  float sum = 0.f;
#pragma unroll
  for (u32 i = 0; i < MOST; i++) {
    const u32 pack = at.pack(i, shape);
    if (!at.has(pack)) break;
    packs[i] = load_pack(x + at.begin + WIDTH<T> * pack, at.count(pack, shape), at.vector);
  }
#pragma unroll
  for (u32 i = 0; i < MOST; i++) {
    if (!at.has(at.pack(i, shape))) break;
    float v[WIDTH<T>];
    unpack(packs[i], v);
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) sum += v[k];
  }
  const float of_row = row_sum(sum, shape.lanes) / shape.width;
  float squares = 0.f;
#pragma unroll
  for (u32 i = 0; i < MOST; i++) {
    const u32 pack = at.pack(i, shape);
    if (!at.has(pack)) break;
    const u32 count = at.count(pack, shape);
    float v[WIDTH<T>];
    unpack(packs[i], v);
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) {
      const float d = v[k] - of_row;
      if (k < count) squares = fmaf(d, d, squares);
    }
  }
  const float scale = 1.f / sqrtf(row_sum(squares, shape.lanes) / shape.width + shape.epsilon);
  if (at.active && at.lane == 0) {
    mean[at.row] = of_row;
    rstd[at.row] = scale;
  }
#pragma unroll
  for (u32 i = 0; i < MOST; i++) {
    const u32 pack = at.pack(i, shape);
    if (!at.has(pack)) break;
    const u32 count = at.count(pack, shape);
    float v[WIDTH<T>], w[WIDTH<T>], b[WIDTH<T>];
    unpack(packs[i], v);
    load_parameters<T>(weight, shape, pack, count, at.vector, w);
    load_parameters<T>(bias, shape, pack, count, at.vector, b);
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) v[k] = fmaf((v[k] - of_row) * scale, w[k], b[k]);
    store_pack(y + at.begin + WIDTH<T> * pack, v, count, at.vector);
  }
}

template <class T>
__device__ __forceinline__ void backward(const T *x, const T *dy, const void *weight, const float *mean,
                                         const float *rstd, T *dx, const Shape &shape) {
  const Row<T> at(shape, aligned_packs(x, dy, dx) && aligned_packs(weight));
  Pack<T> packs[MOST], grads[MOST];
  const float of_row = at.active ? mean[at.row] : 0.f, scale = at.active ? rstd[at.row] : 0.f;
#pragma unroll
  for (u32 i = 0; i < MOST; i++) {
    const u32 pack = at.pack(i, shape);
    if (!at.has(pack)) break;
    packs[i] = load_pack(x + at.begin + WIDTH<T> * pack, at.count(pack, shape), at.vector);
    grads[i] = load_pack(dy + at.begin + WIDTH<T> * pack, at.count(pack, shape), at.vector);
  }
  float of_du = 0.f, of_products = 0.f;
#pragma unroll
  for (u32 i = 0; i < MOST; i++) {
    const u32 pack = at.pack(i, shape);
    if (!at.has(pack)) break;
    float v[WIDTH<T>], d[WIDTH<T>], w[WIDTH<T>];
    unpack(packs[i], v);
    unpack(grads[i], d);
    load_parameters<T>(weight, shape, pack, at.count(pack, shape), at.vector, w);
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) {
      // beyond a row's end dy and w are 0
      const float du = d[k] * w[k];
      of_du += du;
      of_products = fmaf(du, (v[k] - of_row) * scale, of_products);
    }
  }
  of_du = row_sum(of_du, shape.lanes) / shape.width;
  of_products = row_sum(of_products, shape.lanes) / shape.width;
#pragma unroll
  for (u32 i = 0; i < MOST; i++) {
    const u32 pack = at.pack(i, shape);
    if (!at.has(pack)) break;
    const u32 count = at.count(pack, shape);
    float v[WIDTH<T>], d[WIDTH<T>], w[WIDTH<T>];
    unpack(packs[i], v);
    unpack(grads[i], d);
    load_parameters<T>(weight, shape, pack, count, at.vector, w);
#pragma unroll
    for (u32 k = 0; k < WIDTH<T>; k++) {
      const float xhat = (v[k] - of_row) * scale;
      v[k] = scale * (d[k] * w[k] - of_du - xhat * of_products);
    }
    store_pack(dx + at.begin + WIDTH<T> * pack, v, count, at.vector);
  }
}

// partial[piece][channel] = sums of dy and dy xhat over a piece of the rows; blockIdx.x = piece.
template <class T>
__device__ __forceinline__ void backward_sums(const T *x, const T *dy, const float *mean, const float *rstd,
                                              float2 *partial, const Shape &shape) {
  const u32 begin = blockIdx.x * shape.rows_per_piece;
  const Place<T> place(shape.width, begin, min(begin + shape.rows_per_piece, shape.rows), aligned_packs(x, dy));
  constexpr u32 IN_FLIGHT = 2;
  for (u32 first = 0; first < place.packs; first += place.columns) {
    const u32 pack = first + place.column;
    float sum[WIDTH<T>] = {}, products[WIDTH<T>] = {};
    if (place.active && pack < place.packs) {
      const u32 count = place.count(pack);
      for (u32 row = place.begin + place.row; row < place.end; row += IN_FLIGHT * place.rows) {
        Pack<T> values[IN_FLIGHT], grads[IN_FLIGHT];
        float means[IN_FLIGHT], rstds[IN_FLIGHT];
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; i++) {
          // beyond the end: the last row again, unused
          const u32 r = min(row + i * place.rows, place.end - 1);
          const size_t at = static_cast<size_t>(r) * shape.width + WIDTH<T> * pack;
          values[i] = load_pack(x + at, count, place.vector);
          grads[i] = load_pack(dy + at, count, place.vector);
          means[i] = mean[r];
          rstds[i] = rstd[r];
        }
#pragma unroll
        for (u32 i = 0; i < IN_FLIGHT; i++) {
          if (row + i * place.rows >= place.end) break;
          float v[WIDTH<T>], d[WIDTH<T>];
          unpack(values[i], v);
          unpack(grads[i], d);
#pragma unroll
          for (u32 k = 0; k < WIDTH<T>; k++) {
            sum[k] += d[k];
            products[k] = fmaf(d[k], (v[k] - means[i]) * rstds[i], products[k]);
          }
        }
      }
    }
    write_channel_sums<T>(place, first, sum, products, partial + static_cast<size_t>(blockIdx.x) * shape.width);
  }
}

// dw and db of one channel per warp: its lanes share the pieces.
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_backward_parameters(const float2 *__restrict__ partial, float *__restrict__ grad_weight,
                                   float *__restrict__ grad_bias, u32 pieces, u32 width) {
  const u32 channel = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  double2 sum = make_double2(0.0, 0.0);
  if (channel < width)
    for (u32 piece = threadIdx.x % 32; piece < pieces; piece += 32) {
      const float2 part = partial[static_cast<size_t>(piece) * width + channel];
      sum.x += part.x;
      sum.y += part.y;
    }
  sum.x = warp_sum(sum.x);
  sum.y = warp_sum(sum.y);
  if (channel < width && threadIdx.x % 32 == 0) {
    grad_bias[channel] = static_cast<float>(sum.x);
    grad_weight[channel] = static_cast<float>(sum.y);
  }
}

#define LAYER_NORM(NAME, T)                                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                            \
      layer_norm_forward_##NAME(const T *__restrict__ x, const void *__restrict__ weight,                             \
                                const void *__restrict__ bias, T *__restrict__ y, float *__restrict__ mean,           \
                                float *__restrict__ rstd, Shape shape) {                                              \
    forward<T>(x, weight, bias, y, mean, rstd, shape);                                                                \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) layer_norm_backward_##NAME(                                \
      const T *__restrict__ x, const T *__restrict__ dy, const void *__restrict__ weight,                             \
      const float *__restrict__ mean, const float *__restrict__ rstd, T *__restrict__ dx, Shape shape) {              \
    backward<T>(x, dy, weight, mean, rstd, dx, shape);                                                                \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) layer_norm_backward_sums_##NAME(                           \
      const T *__restrict__ x, const T *__restrict__ dy, const float *__restrict__ mean,                              \
      const float *__restrict__ rstd, float2 *__restrict__ partial, Shape shape) {                                    \
    backward_sums<T>(x, dy, mean, rstd, partial, shape);                                                              \
  }

LAYER_NORM(f32, float)
LAYER_NORM(bf16, bf16)
LAYER_NORM(f16, f16)
