// Streams and CUDA graphs of libtorch, without CUDA's headers and without linking libtorch_cuda, so that one binary runs
// where there is no GPU: streams through the registry of device guards, the graph class (at::cuda::CUDAGraph, which gives
// the captured work a memory pool of its own) through its symbols in the libtorch_cuda that was opened at start.
// src/device/torch_cuda.rs is the only caller. Every function returns null or -1 after a failure.
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace {

thread_local std::string last_error;

template <typename Result, typename Work>
Result guarded(Result failed, Work work) {
  try {
    return work();
  } catch (const std::exception &e) {
    last_error = e.what();
    return failed;
  }
}

const c10::impl::DeviceGuardImplInterface *cuda() { return c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA); }

c10::Device device(int index) { return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)); }

// Of a pool of the allocator: work that is recorded takes its memory there.
using PoolId = std::pair<unsigned long long, unsigned long long>;

// at::cuda::CUDAGraph of libtorch 2.11: its methods, as the compiler names them. An object is `this` in the first argument.
struct GraphClass {
  PoolId (*new_pool)();
  void (*construct)(void *, bool keep_graph);
  void (*destroy)(void *);
  void (*capture_begin)(void *, PoolId pool, int mode);
  void (*capture_end)(void *);
  void (*replay)(void *);
};

template <typename Function>
void find(Function &function, const char *symbol) {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, symbol));
  if (function == nullptr) {
    throw std::runtime_error(std::string("libtorch_cuda has no ") + symbol + " (is it libtorch 2.11?)");
  }
}

const GraphClass &graph_class() {
  static const GraphClass loaded = [] {
    GraphClass c{};
    find(c.new_pool, "_ZN2at4cuda17graph_pool_handleEv");
    find(c.construct, "_ZN2at4cuda9CUDAGraphC1Eb");
    find(c.destroy, "_ZN2at4cuda9CUDAGraphD1Ev");
    find(c.capture_begin, "_ZN2at4cuda9CUDAGraph13capture_beginESt4pairIyyE21cudaStreamCaptureMode");
    find(c.capture_end, "_ZN2at4cuda9CUDAGraph11capture_endEv");
    find(c.replay, "_ZN2at4cuda9CUDAGraph6replayEv");
    return c;
  }();
  return loaded;
}

// Room for a CUDAGraph; libtorch 2.11.0's has 104 bytes and an alignment of 8.
constexpr size_t GRAPH_BYTES = 1024;

} // namespace

extern "C" {

const char *cuda_last_error() { return last_error.c_str(); }

// The device of this thread, and the process's numerics: f32 means f32 (no TF32), products of bf16 are summed in f32 to the
// end (also where a product is cut into parts along the sum), and cuDNN takes the same convolutions every time, so that
// roll-out and update agree. The backward pass of attention adds in no fixed order: see numerics.cpp.
int cuda_set_device(int index) {
  return guarded(-1, [&] {
    cuda()->setDevice(device(index));
    auto &context = at::globalContext();
    context.setAllowTF32CuDNN(false);
    context.setAllowTF32CuBLAS(false);
    context.setAllowBF16ReductionCuBLAS(false);
    context.setDeterministicCuDNN(true);
    context.setBenchmarkCuDNN(false);
    return 0;
  });
}

// CUDA's handle of this thread's current stream; the default stream's is 0.
int cuda_current_stream(int index, void **handle) {
  return guarded(-1, [&] {
    *handle = cuda()->getStreamNativeHandle(cuda()->getStream(device(index)));
    return 0;
  });
}

int cuda_synchronize(int index) {
  return guarded(-1, [&] {
    cuda()->synchronizeDevice(static_cast<c10::DeviceIndex>(index));
    return 0;
  });
}

// Makes a stream of libtorch's pool this thread's current one; `previous` (3 numbers) is for cuda_restore_stream.
int cuda_enter_side_stream(int index, int64_t *previous) {
  return guarded(-1, [&] {
    auto before = cuda()->exchangeStream(cuda()->getStreamFromGlobalPool(device(index), /*isHighPriority=*/false)).pack3();
    previous[0] = before.stream_id;
    previous[1] = before.device_index;
    previous[2] = static_cast<int64_t>(before.device_type);
    return 0;
  });
}

int cuda_restore_stream(const int64_t *previous) {
  return guarded(-1, [&] {
    cuda()->exchangeStream(c10::Stream::unpack3(previous[0], static_cast<c10::DeviceIndex>(previous[1]),
                                                static_cast<c10::DeviceType>(previous[2])));
    return 0;
  });
}

// Version of the cuDNN that libtorch_cuda has loaded, 91900 for 9.19.0.
int cuda_cudnn_version(int64_t *version) {
  return guarded(-1, [&] {
    const auto &hooks = at::detail::getCUDAHooks();
    *version = hooks.compiledWithCuDNN() ? hooks.versionRuntimeCuDNN() : 0;
    return 0;
  });
}

// Gives memory that libtorch holds and nobody uses back to the driver.
int cuda_empty_cache() {
  return guarded(-1, [&] {
    c10::getDeviceAllocator(c10::DeviceType::CUDA)->emptyCache();
    return 0;
  });
}

// A pool (2 numbers) that recordings can share, if one is replayed at a time.
int cuda_graph_pool(unsigned long long *pool) {
  return guarded(-1, [&] {
    const PoolId id = graph_class().new_pool();
    pool[0] = id.first;
    pool[1] = id.second;
    return 0;
  });
}

void *cuda_graph_new() {
  return guarded(static_cast<void *>(nullptr), [&] {
    const GraphClass &methods = graph_class();
    void *graph = std::aligned_alloc(64, GRAPH_BYTES);
    if (graph == nullptr) throw std::bad_alloc();
    try {
      methods.construct(graph, /*keep_graph=*/false);
    } catch (...) {
      std::free(graph);
      throw;
    }
    return graph;
  });
}

// Only work of this thread's current stream is recorded, which must not be the default stream. `mode` 1 is CUDA's
// cudaStreamCaptureModeThreadLocal: other threads (NCCL's watcher) may go on calling CUDA.
int cuda_graph_capture_begin(void *graph, const unsigned long long *pool) {
  return guarded(-1, [&] {
    graph_class().capture_begin(graph, {pool[0], pool[1]}, /*mode=*/1);
    return 0;
  });
}

int cuda_graph_capture_end(void *graph) {
  return guarded(-1, [&] {
    graph_class().capture_end(graph);
    return 0;
  });
}

int cuda_graph_replay(void *graph) {
  return guarded(-1, [&] {
    graph_class().replay(graph);
    return 0;
  });
}

int cuda_graph_delete(void *graph) {
  return guarded(-1, [&] {
    graph_class().destroy(graph);
    std::free(graph);
    return 0;
  });
}

} // extern "C"
