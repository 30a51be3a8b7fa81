// Counts the allocations of one thread, and their bytes on the host, by libtorch's own memory reports.
// src/models/allocations.rs is the only caller.
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>

namespace {

struct Counter : public c10::MemoryReportingInfoBase {
  std::mutex mutex;
  int64_t now = 0;
  int64_t peak = 0;
  int64_t made[2] = {0, 0};  // allocations on the host, on GPUs

  void reportMemoryUsage(void *, int64_t size, size_t, size_t, c10::Device device) override {
    const bool on_host = device.type() == c10::DeviceType::CPU;
    std::lock_guard<std::mutex> guard(mutex);
    made[on_host ? 0 : 1] += size > 0;
    if (!on_host) return;
    now += size; // negative where memory is given back
    peak = std::max(peak, now);
  }
  bool memoryProfilingEnabled() const override { return true; }
};

} // namespace

extern "C" {

// Begins to count on this thread, backward passes that it starts included.
void allocations_begin() {
  c10::ThreadLocalDebugInfo::_push(c10::DebugInfoKind::PROFILER_STATE, std::make_shared<Counter>());
}

// Bytes that are alive of what was allocated since the beginning, the most that were, and how many allocations there were.
void allocations_read(int64_t *now, int64_t *peak, int64_t *made_on_host, int64_t *made_on_gpu) {
  auto *counter = static_cast<Counter *>(c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE));
  std::lock_guard<std::mutex> guard(counter->mutex);
  *now = counter->now;
  *peak = counter->peak;
  *made_on_host = counter->made[0];
  *made_on_gpu = counter->made[1];
}

void allocations_end() { c10::ThreadLocalDebugInfo::_pop(c10::DebugInfoKind::PROFILER_STATE); }

} // extern "C"
