// What the differentiable operations share that run our kernels: libtorch holds the autograd node, launchers registered
// from Rust (src/kernels/operation.rs) do the work. There is no way without a launcher.
#pragma once
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/types.h>

#include <optional>
#include <stdexcept>
#include <string>

// Where a call runs, and where its error goes; `Place` in src/kernels/operation.rs.
struct Place {
  int32_t element;  // 0 f32, 1 bf16, 2 f16
  int32_t device;   // CUDA ordinal, -1 for the CPU
  uint64_t stream;
  char *message;  // what went wrong, a C string
  int64_t message_bytes;
};

inline int32_t element_of(const at::Tensor &t, const char *name) {
  switch (t.scalar_type()) {
    case at::kFloat: return 0;
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    default: throw std::runtime_error(std::string(name) + " must be f32, bf16 or f16");
  }
}

// On the current stream of the tensor's device.
inline Place place_of(const at::Tensor &x) {
  Place place = {element_of(x, "x"), -1, 0, nullptr, 0};
  if (x.is_cuda()) {
    const auto *guard = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
    place.device = x.get_device();
    place.stream = reinterpret_cast<uint64_t>(guard->getStreamNativeHandle(guard->getStream(x.device())));
  }
  return place;
}

template <class Call>
void launch(int32_t (*launcher)(Call *), Call &call) {
  char message[512] = "";
  call.place.message = message;
  call.place.message_bytes = sizeof(message);
  if (launcher(&call) != 0) throw std::runtime_error(message);
}
