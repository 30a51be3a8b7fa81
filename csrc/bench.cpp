// What `rldiff bench` asks of libtorch and tch has no call for: the peak of a GPU's memory, by the allocator's own
// counts, and a backward pass from a given gradient. src/cli/bench/libtorch.rs is the only caller. Every function returns
// -1 after a failure.
#include <c10/core/CachingDeviceAllocator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <exception>
#include <string>

namespace {

thread_local std::string last_error;

template <typename Work>
int guarded(Work work) {
  try {
    work();
    return 0;
  } catch (const std::exception &e) {
    last_error = e.what();
    return -1;
  }
}

} // namespace

extern "C" {

const char *bench_last_error() { return last_error.c_str(); }

// Bytes: the most that tensors held at once, the most that the allocator held for them, what the card has free, and has.
int bench_gpu_memory(int index, int64_t *figures) {
  return guarded([&] {
    auto *allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    const auto device = static_cast<c10::DeviceIndex>(index);
    const auto stats = allocator->getDeviceStats(device);
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    const auto [free, total] = allocator->getMemoryInfo(device);
    figures[0] = stats.allocated_bytes[all].peak;
    figures[1] = stats.reserved_bytes[all].peak;
    figures[2] = static_cast<int64_t>(free);
    figures[3] = static_cast<int64_t>(total);
  });
}

// Adds the gradients of y·dy by all leaves that made y to their .grad.
int bench_backward(at::Tensor *y, at::Tensor *dy) {
  return guarded([&] { y->backward(*dy, /*retain_graph=*/false, /*create_graph=*/false); });
}

} // extern "C"
