// The number type that libtorch computes f32 networks in for a while, and whether it may use kernels whose results differ from
// run to run. src/device/numerics.rs is the only caller. Flags of libtorch_cpu: nothing here needs a GPU.
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>

#include <cstdlib>

namespace {

c10::DeviceType type_of(int on_gpu) { return on_gpu ? c10::DeviceType::CUDA : c10::DeviceType::CPU; }

} // namespace

extern "C" {

// Whether products and convolutions of f32 on a GPU are TF32 from now on; gives what it was.
int numerics_set_tf32(int allow) {
  auto &context = at::globalContext();
  const bool before = context.allowTF32CuDNN();
  context.setAllowTF32CuDNN(allow != 0);
  context.setAllowTF32CuBLAS(allow != 0);
  return before;
}

// From now on this thread's products and convolutions of f32 on the device are bf16, where libtorch holds that to be safe
// (autocast). Gives whether it was so already, and leaves it then.
int numerics_begin_bf16(int on_gpu) {
  const auto type = type_of(on_gpu);
  if (at::autocast::is_autocast_enabled(type)) return 1;
  at::autocast::set_autocast_dtype(type, at::kBFloat16);
  at::autocast::set_autocast_enabled(type, true);
  at::autocast::increment_nesting();
  return 0;
}

void numerics_end_bf16(int on_gpu) {
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(type_of(on_gpu), false);
}

// From now on the process uses kernels alone whose results repeat, and an operation that has none throws with its name. Among
// the kernels of a GPU that differ are the backward pass of cuDNN's and of the memory-efficient attention, which add
// atomically, cuBLAS's on a work space that several streams share, and sums inside NVLink's switches (NCCL's NVLS); the last
// two are switched off through the environment, before the libraries start. What is read before it is written is a fault of
// ours, and filling it with NaN would cost a pass over memory.
void numerics_set_deterministic(int deterministic) {
  if (deterministic) {
    setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  }
  at::globalContext().setDeterministicAlgorithms(deterministic != 0, /*warn_only=*/false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

int numerics_is_deterministic() { return at::globalContext().deterministicAlgorithms(); }

} // extern "C"
