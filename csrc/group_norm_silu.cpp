// Group normalisation with optional SiLU of channels-last tensors as one differentiable operation; see operation.h. Errors
// as in cuda.cpp: null, and the message in group_norm_silu_last_error().
#include "operation.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {

thread_local std::string last_error;

// One call of a launcher; as `Call` in src/kernels/group_norm_silu/autograd.rs. Null where a pass has no such tensor.
struct Call {
  Place place;
  const void *x, *weight, *bias, *grad_y;
  const float *shift;
  void *y, *grad_x;
  float *mean, *rstd, *channel_mean, *grad_weight, *grad_bias, *grad_shift;
  void *workspace;
  int64_t samples, pixels, channels, groups;
  int64_t workspace_bytes;
  int32_t parameter_element;  // as place.element
  int32_t silu;
  double epsilon;
};

typedef int32_t (*Launcher)(Call *);
typedef int64_t (*WorkspaceBytes)(const Call *);

Launcher launch_forward = nullptr, launch_backward = nullptr;
WorkspaceBytes workspace_bytes = nullptr;

// What both passes have in common.
Call call_for(const at::Tensor &x, const at::Tensor &shift, const at::Tensor &weight, const at::Tensor &bias,
              int64_t groups, double epsilon, bool silu) {
  Call call = {};
  call.place = place_of(x);
  call.x = x.const_data_ptr();
  call.shift = shift.defined() ? shift.const_data_ptr<float>() : nullptr;
  call.weight = weight.const_data_ptr();
  call.bias = bias.const_data_ptr();
  call.samples = x.size(0);
  call.channels = x.size(1);
  call.pixels = x.size(2) * x.size(3);
  call.groups = groups;
  call.parameter_element = element_of(weight, "weight");
  call.silu = silu;
  call.epsilon = epsilon;
  return call;
}

void run(Launcher launcher, Call &call, const at::Tensor &like) {
  call.workspace_bytes = workspace_bytes(&call);
  // on the stream of the call, so the allocator may hand it on as soon as this returns
  const at::Tensor workspace = at::empty({call.workspace_bytes}, like.options().dtype(at::kByte));
  call.workspace = workspace.mutable_data_ptr();
  launch(launcher, call);
}

class GroupNormSilu : public torch::autograd::Function<GroupNormSilu> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext *ctx, const at::Tensor &x_any,
                            const std::optional<at::Tensor> &shift_or_none, const at::Tensor &weight, const at::Tensor &bias, int64_t groups, double epsilon,
                            bool silu) {
    const at::Tensor x = x_any.contiguous(at::MemoryFormat::ChannelsLast);
    const at::Tensor shift = shift_or_none.value_or(at::Tensor());
    const at::Tensor y = at::empty_like(x, x.options(), at::MemoryFormat::ChannelsLast);
    const at::Tensor mean = at::empty({x.size(0), groups}, x.options().dtype(at::kFloat));
    const at::Tensor rstd = at::empty_like(mean);
    // of the normalised values, for the gradient of the shift
    const at::Tensor channel_mean = shift.defined() ? at::empty({x.size(0), x.size(1)}, mean.options()) : at::Tensor();
    Call call = call_for(x, shift, weight, bias, groups, epsilon, silu);
    call.y = y.mutable_data_ptr();
    call.mean = mean.mutable_data_ptr<float>();
    call.rstd = rstd.mutable_data_ptr<float>();
    call.channel_mean = shift.defined() ? channel_mean.mutable_data_ptr<float>() : nullptr;
    run(launch_forward, call, x);
    ctx->save_for_backward({x, shift, weight, bias, mean, rstd, channel_mean});
    ctx->saved_data["groups"] = groups;
    ctx->saved_data["epsilon"] = epsilon;
    ctx->saved_data["silu"] = silu;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx,
                                                 torch::autograd::variable_list grads) {
    if (at::GradMode::is_enabled()) throw std::runtime_error("group_norm_silu has no second derivative");
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &shift = saved[1], &weight = saved[2], &bias = saved[3];
    const at::Tensor &mean = saved[4], &rstd = saved[5], &channel_mean = saved[6];
    const at::Tensor grad_y = grads[0].to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
    const at::Tensor grad_x = at::empty_like(x, x.options(), at::MemoryFormat::ChannelsLast);
    const at::Tensor grad_weight = at::empty({x.size(1)}, mean.options());
    const at::Tensor grad_bias = at::empty_like(grad_weight);
    const at::Tensor grad_shift = shift.defined() ? at::zeros_like(shift) : at::Tensor();
    Call call = call_for(x, shift, weight, bias, ctx->saved_data["groups"].toInt(),
                         ctx->saved_data["epsilon"].toDouble(), ctx->saved_data["silu"].toBool());
    call.grad_y = grad_y.const_data_ptr();
    call.grad_x = grad_x.mutable_data_ptr();
    call.mean = mean.mutable_data_ptr<float>();
    call.rstd = rstd.mutable_data_ptr<float>();
    call.grad_weight = grad_weight.mutable_data_ptr<float>();
    call.grad_bias = grad_bias.mutable_data_ptr<float>();
    if (shift.defined()) {
      call.channel_mean = channel_mean.mutable_data_ptr<float>();
      call.grad_shift = grad_shift.mutable_data_ptr<float>();
    }
    run(launch_backward, call, x);
    const at::Tensor none;
    return {grad_x, grad_shift, grad_weight.to(weight.scalar_type()), grad_bias.to(bias.scalar_type()), none, none, none};
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

// x [N, C, H, W]; shift f32 [N, C] or null; weight, bias [C]; the last three contiguous. Returns a new tensor,
// channels-last, of x's number type.
at::Tensor *group_norm_silu_apply(const at::Tensor *x, const at::Tensor *shift, const at::Tensor *weight,
                                  const at::Tensor *bias, int64_t groups, double epsilon, int silu) {
  try {
    if (!launch_forward) throw std::runtime_error("group_norm_silu: no launcher is registered");
    // an undefined tensor is no argument for apply
    const std::optional<at::Tensor> shift_or_none = shift ? std::optional<at::Tensor>(*shift) : std::nullopt;
    return new at::Tensor(GroupNormSilu::apply(*x, shift_or_none, *weight, *bias, groups, epsilon, silu != 0));
  } catch (const std::exception &e) {
    last_error = e.what();
    return nullptr;
  }
}

}  // extern "C"
