// Group normalisation with optional SiLU of channels-last tensors as one differentiable operation: libtorch holds the
// autograd node, launchers registered from Rust (src/kernels/group_norm_silu) do the work. There is no way without a
// launcher. Errors as in shim.cpp: null or -1, and the message in group_norm_silu_last_error().
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <stdexcept>
#include <string>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/types.h>

namespace {

thread_local std::string last_error;

// One call of a launcher; as `Call` in src/kernels/group_norm_silu/autograd.rs. Null where a pass has no such tensor.
struct Call {
  const void *x, *weight, *bias, *grad_y;
  void *y, *grad_x;
  float *mean, *rstd, *grad_weight, *grad_bias;
  void *workspace;
  int64_t samples, pixels, channels, groups;
  int64_t workspace_bytes;
  int32_t element, parameter_element;  // 0 f32, 1 bf16, 2 f16
  int32_t silu, device;                // device: CUDA ordinal, -1 for the CPU
  double epsilon;
  uint64_t stream;
  char *message;  // what went wrong, a C string
  int64_t message_bytes;
};

typedef int32_t (*Launcher)(Call *);
typedef int64_t (*WorkspaceBytes)(const Call *);

Launcher launch_forward = nullptr, launch_backward = nullptr;
WorkspaceBytes workspace_bytes = nullptr;

int32_t element_of(const at::Tensor &t, const char *name) {
  switch (t.scalar_type()) {
    case at::kFloat: return 0;
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    default: throw std::runtime_error(std::string("group_norm_silu: ") + name + " must be f32, bf16 or f16");
  }
}

// What both passes have in common.
Call call_for(const at::Tensor &x, const at::Tensor &weight, const at::Tensor &bias, int64_t groups, double epsilon,
              bool silu) {
  Call call = {};
  call.x = x.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.bias = bias.const_data_ptr();
  call.samples = x.size(0);
  call.channels = x.size(1);
  call.pixels = x.size(2) * x.size(3);
  call.groups = groups;
  call.element = element_of(x, "x");
  call.parameter_element = element_of(weight, "weight");
  call.silu = silu;
  call.epsilon = epsilon;
  call.device = x.is_cuda() ? x.get_device() : -1;
  if (x.is_cuda()) {
    const auto *guard = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
    call.stream = reinterpret_cast<uint64_t>(guard->getStreamNativeHandle(guard->getStream(x.device())));
  }
  return call;
}

void run(Launcher launcher, Call &call, const at::Tensor &like) {
  char message[512] = "";
  call.message = message;
  call.message_bytes = sizeof(message);
  call.workspace_bytes = workspace_bytes(&call);
  // on the stream of the call, so the allocator may hand it on as soon as this returns
  const at::Tensor workspace = at::empty({call.workspace_bytes}, like.options().dtype(at::kByte));
  call.workspace = workspace.mutable_data_ptr();
  if (launcher(&call) != 0) throw std::runtime_error(std::string("group_norm_silu: ") + message);
}

class GroupNormSilu : public torch::autograd::Function<GroupNormSilu> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext *ctx, const at::Tensor &x_any, const at::Tensor &weight,
                            const at::Tensor &bias, int64_t groups, double epsilon, bool silu) {
    const at::Tensor x = x_any.contiguous(at::MemoryFormat::ChannelsLast);
    const at::Tensor y = at::empty_like(x, x.options(), at::MemoryFormat::ChannelsLast);
    const at::Tensor mean = at::empty({x.size(0), groups}, x.options().dtype(at::kFloat));
    const at::Tensor rstd = at::empty_like(mean);
    Call call = call_for(x, weight, bias, groups, epsilon, silu);
    call.y = y.mutable_data_ptr();
    call.mean = mean.mutable_data_ptr<float>();
    call.rstd = rstd.mutable_data_ptr<float>();
    run(launch_forward, call, x);
    ctx->save_for_backward({x, weight, bias, mean, rstd});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["epsilon"] = epsilon;
    ctx->saved_data["silu"] = silu;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx,
                                                 torch::autograd::variable_list grads) {
    if (at::GradMode::is_enabled()) throw std::runtime_error("group_norm_silu has no second derivative");
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &rstd = saved[4];
    const at::Tensor grad_y = grads[0].to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
    const at::Tensor grad_x = at::empty_like(x, x.options(), at::MemoryFormat::ChannelsLast);
    const at::Tensor grad_weight = at::empty({x.size(1)}, mean.options());
    const at::Tensor grad_bias = at::empty_like(grad_weight);
    Call call = call_for(x, weight, bias, ctx->saved_data["groups"].toInt(), ctx->saved_data["epsilon"].toDouble(),
                         ctx->saved_data["silu"].toBool());
    call.grad_y = grad_y.const_data_ptr();
    call.grad_x = grad_x.mutable_data_ptr();
    call.mean = mean.mutable_data_ptr<float>();
    call.rstd = rstd.mutable_data_ptr<float>();
    call.grad_weight = grad_weight.mutable_data_ptr<float>();
    call.grad_bias = grad_bias.mutable_data_ptr<float>();
    run(launch_backward, call, x);
    const at::Tensor none;
    return {grad_x, grad_weight.to(weight.scalar_type()), grad_bias.to(bias.scalar_type()), none, none, none};
  }
};

}  // namespace

extern "C" {

const char *group_norm_silu_last_error() { return last_error.c_str(); }

void group_norm_silu_register(Launcher forward, Launcher backward, WorkspaceBytes workspace) {
  launch_forward = forward;
  launch_backward = backward;
  workspace_bytes = workspace;
}

// x [N, C, H, W]; weight, bias [C], contiguous. Returns a new tensor, channels-last, of x's number type.
at::Tensor *group_norm_silu_apply(const at::Tensor *x, const at::Tensor *weight, const at::Tensor *bias, int64_t groups,
                                  double epsilon, int silu) {
  try {
    if (!launch_forward) throw std::runtime_error("group_norm_silu: no launcher is registered");
    return new at::Tensor(GroupNormSilu::apply(*x, *weight, *bias, groups, epsilon, silu != 0));
  } catch (const std::exception &e) {
    last_error = e.what();
    return nullptr;
  }
}

}  // extern "C"
