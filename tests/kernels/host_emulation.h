// Runs a CUDA source on the host: the part of CUDA that cuda/*.cu use, for g++ (-DHOST_EMULATION, x86-64 or any POSIX).
//
// One block at a time; every thread of the block is a fiber that runs until it reaches a barrier or a warp shuffle.
// Warps and lanes run in ascending or, on request, descending order: a kernel whose result depends on it has a race.
// Shared memory is filled with NaN patterns before each block. It aborts on shuffles and barriers that not all threads
// reach. It does not find every race, and says nothing about speed.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static __attribute__((section("emulated_shared")))

struct float2 { float x, y; };
struct double2 { double x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline float erff(float v) { return std::erf(v); }
using std::fmaf;
using std::isnan;
using std::min;
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };

inline float __uint_as_float(unsigned u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
inline unsigned float_bits(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return u;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const unsigned u = float_bits(f);
  if (isnan(f)) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}

inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half v) {
  const unsigned sign = static_cast<unsigned>(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31, mantissa = v.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  const float size = exponent ? std::ldexp(static_cast<float>(1024 + mantissa), static_cast<int>(exponent) - 25)
                              : std::ldexp(static_cast<float>(mantissa), -24);
  return sign ? -size : size;
}
// Round to nearest, ties to even: the scaled mantissa is an integer after nearbyint in the default rounding mode.
inline __half __float2half_rn(float f) {
  const uint16_t sign = static_cast<uint16_t>(float_bits(f) >> 16 & 0x8000);
  if (isnan(f)) return {0x7fff};
  const double size = std::fabs(static_cast<double>(f));
  if (size >= 65520.0) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  const unsigned mantissa = static_cast<unsigned>(std::nearbyint(std::ldexp(size, -unit)));
  // a mantissa of 2048 carries into the exponent, which is what adding does
  const unsigned bits = mantissa < 1024 ? mantissa : (static_cast<unsigned>(unit + 24) << 10) + mantissa;
  return {static_cast<uint16_t>(sign | bits)};
}

namespace emulation {

enum class State : uint8_t { Running, AtShuffle, AtBarrier, Done };

struct Index { unsigned x, y, z; };

struct Fiber {
  ucontext_t context;
  void *stack_pointer;
  char *stack;
  State state;
  Index index;
  uint64_t value;
};

constexpr size_t STACK = 64 << 10;
static std::vector<Fiber> fibers;
static std::vector<char *> stacks;
static Fiber *current;
static ucontext_t scheduler;
static void *scheduler_stack_pointer;
static Index block_index;
static uint64_t published[32];
static void (*run_kernel)(void **);
static void **kernel_arguments;

[[noreturn]] inline void fail(const char *what) {
  fprintf(stderr, "host emulation: %s in block (%u, %u)\n", what, block_index.x, block_index.y);
  abort();
}

#if defined(__x86_64__)
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void **save, void *to);
asm(".text\n.hidden emulation_switch\n.weak emulation_switch\n.type emulation_switch,@function\nemulation_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
inline void to_scheduler() { emulation_switch(&current->stack_pointer, scheduler_stack_pointer); }
inline void to_fiber(Fiber &f) {
  current = &f;
  emulation_switch(&scheduler_stack_pointer, f.stack_pointer);
}
#else
inline void to_scheduler() { swapcontext(&current->context, &scheduler); }
inline void to_fiber(Fiber &f) {
  current = &f;
  swapcontext(&scheduler, &f.context);
}
#endif

static void entry() {
  run_kernel(kernel_arguments);
  current->state = State::Done;
  for (;;) to_scheduler();
}

inline void prepare(Fiber &f) {
  f.state = State::Running;
#if defined(__x86_64__)
  void **top = reinterpret_cast<void **>(f.stack + STACK);
  *--top = nullptr;
  *--top = reinterpret_cast<void *>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  f.stack_pointer = top;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack;
  f.context.uc_stack.ss_size = STACK;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
#endif
}

inline void wait(State state) {
  current->state = state;
  to_scheduler();
}

// Runs a warp until all its lanes are at the barrier or done.
inline void run_warp(Fiber *warp, bool descending) {
  for (;;) {
    for (int i = 0; i < 32; i++) {
      Fiber &f = warp[descending ? 31 - i : i];
      if (f.state == State::Running) to_fiber(f);
    }
    const auto at_shuffle = std::count_if(warp, warp + 32, [](const Fiber &f) { return f.state == State::AtShuffle; });
    if (at_shuffle == 0) return;
    if (at_shuffle != 32) fail("a shuffle that not all lanes of the warp reach");
    for (int i = 0; i < 32; i++) published[i] = warp[i].value;
    // each lane reads what it wants before any can publish again
    for (int i = 0; i < 32; i++) warp[i].state = State::Running;
    for (int i = 0; i < 32; i++) to_fiber(warp[i]);
  }
}

inline void poison_shared();

inline void run_block(unsigned threads, bool descending) {
  poison_shared();
  for (auto &f : fibers) prepare(f);
  for (;;) {
    const unsigned warps = threads / 32;
    for (unsigned w = 0; w < warps; w++) run_warp(&fibers[32 * (descending ? warps - 1 - w : w)], descending);
    const auto done = std::count_if(fibers.begin(), fibers.end(), [](const Fiber &f) { return f.state == State::Done; });
    if (static_cast<unsigned>(done) == threads) return;
    if (done) fail("a barrier that some threads passed by");
    for (auto &f : fibers) f.state = State::Running;
  }
}

inline void launch(const unsigned *grid, unsigned threads, void (*kernel)(void **), void **arguments, bool descending) {
  if (threads % 32) fail("a block that is not whole warps");
  while (stacks.size() < threads) stacks.push_back(static_cast<char *>(aligned_alloc(64, STACK)));
  fibers.resize(threads);
  for (unsigned t = 0; t < threads; t++) {
    fibers[t].stack = stacks[t];
    fibers[t].index = {t, 0, 0};
  }
  run_kernel = kernel;
  kernel_arguments = arguments;
  for (unsigned y = 0; y < grid[1]; y++)
    for (unsigned x = 0; x < grid[0]; x++) {
      block_index = {descending ? grid[0] - 1 - x : x, descending ? grid[1] - 1 - y : y, 0};
      run_block(threads, descending);
    }
}

// Calls a kernel with the arguments that cuLaunchKernel would get: pointers to values of its parameters' types.
template <class... A, size_t... I>
void unpack(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A> *>(arguments[I])...);
}
template <class... A>
void call(void (*kernel)(A...), void **arguments) {
  unpack(kernel, arguments, std::index_sequence_for<A...>{});
}

}  // namespace emulation

#define threadIdx (::emulation::current->index)
#define blockIdx (::emulation::block_index)

inline void __syncthreads() { emulation::wait(emulation::State::AtBarrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
  if (mask != 0xffffffffu) emulation::fail("a shuffle of a part of a warp");
  emulation::current->value = 0;
  memcpy(&emulation::current->value, &value, sizeof(T));
  emulation::wait(emulation::State::AtShuffle);
  T other;
  memcpy(&other, &emulation::published[(threadIdx.x % 32) ^ static_cast<unsigned>(offset)], sizeof(T));
  return other;
}

// One of these after the source for each of its kernels.
#define EMULATE(kernel)                                                                                         \
  extern "C" __attribute__((visibility("default"))) void emulate_##kernel(const unsigned *grid, unsigned threads, \
                                                                          void **arguments, int descending) {     \
    emulation::launch(grid, threads, [](void **a) { emulation::call(kernel, a); }, arguments, descending != 0);   \
  }

extern char __start_emulated_shared[] __attribute__((visibility("hidden"), weak));
extern char __stop_emulated_shared[] __attribute__((visibility("hidden"), weak));
inline void emulation::poison_shared() {
  std::fill(__start_emulated_shared, __stop_emulated_shared, static_cast<char>(0xff));
}
