// Layer normalisation as one differentiable operation; see operation.h. Errors as in cuda.cpp: null, and the message in
// layer_norm_last_error().
#include "operation.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {

thread_local std::string last_error;

// One call of a launcher; as `Call` in src/kernels/layer_norm.rs. dy and dx are null in the forward pass, grad_weight and
// grad_bias also where nobody wants them.
struct Call {
  Place place;
  const void *x, *weight, *bias, *dy;
  void *y, *dx;
  float *mean, *rstd, *grad_weight, *grad_bias;
  void *workspace;
  int64_t workspace_bytes;
  int64_t rows, width;
  int32_t parameter_element;  // as place.element
  double epsilon;
};

int32_t (*launcher)(Call *) = nullptr;
int64_t (*workspace_bytes)(const Call *) = nullptr;

Call call_for(const at::Tensor &x, const at::Tensor &weight, const at::Tensor &bias, double epsilon) {
  Call call = {};
  call.place = place_of(x);
  call.x = x.const_data_ptr();
  call.weight = weight.const_data_ptr();
  call.bias = bias.const_data_ptr();
  call.width = weight.size(0);
  call.rows = call.width ? x.numel() / call.width : 0;
  call.parameter_element = element_of(weight, "weight");
  call.epsilon = epsilon;
  return call;
}

class LayerNorm : public torch::autograd::Function<LayerNorm> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext *ctx, const at::Tensor &x_any, const at::Tensor &weight,
                            const at::Tensor &bias, double epsilon) {
    const at::Tensor x = x_any.contiguous();
    const at::Tensor y = at::empty_like(x);
    Call call = call_for(x, weight, bias, epsilon);
    const at::Tensor mean = at::empty({call.rows}, x.options().dtype(at::kFloat));
    const at::Tensor rstd = at::empty_like(mean);
    call.y = y.mutable_data_ptr();
    call.mean = mean.mutable_data_ptr<float>();
    call.rstd = rstd.mutable_data_ptr<float>();
    launch(launcher, call);
    ctx->save_for_backward({x, weight, bias, mean, rstd});
    ctx->saved_data["epsilon"] = epsilon;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx,
                                                 torch::autograd::variable_list grads) {
    if (at::GradMode::is_enabled()) throw std::runtime_error("layer_norm has no second derivative");
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &rstd = saved[4];
    const at::Tensor dy = grads[0].to(x.scalar_type()).contiguous();
    const at::Tensor dx = at::empty_like(x);
    Call call = call_for(x, weight, bias, ctx->saved_data["epsilon"].toDouble());
    call.dy = dy.const_data_ptr();
    call.dx = dx.mutable_data_ptr();
    call.mean = mean.mutable_data_ptr<float>();
    call.rstd = rstd.mutable_data_ptr<float>();
    at::Tensor grad_weight, grad_bias, workspace;
    if (ctx->needs_input_grad(1) || ctx->needs_input_grad(2)) {
      grad_weight = at::empty({weight.size(0)}, mean.options());
      grad_bias = at::empty_like(grad_weight);
      call.grad_weight = grad_weight.mutable_data_ptr<float>();
      call.grad_bias = grad_bias.mutable_data_ptr<float>();
      call.workspace_bytes = workspace_bytes(&call);
      workspace = at::empty({call.workspace_bytes}, x.options().dtype(at::kByte));
      call.workspace = workspace.mutable_data_ptr();
    }
    launch(launcher, call);
    if (grad_weight.defined()) {
      grad_weight = grad_weight.to(weight.scalar_type());
      grad_bias = grad_bias.to(bias.scalar_type());
    }
    return {dx, grad_weight, grad_bias, at::Tensor()};
  }
};

}  // namespace

extern "C" {

const char *layer_norm_last_error() { return last_error.c_str(); }

void layer_norm_register(int32_t (*of_rust)(Call *), int64_t (*bytes)(const Call *)) {
  launcher = of_rust;
  workspace_bytes = bytes;
}

// x [..., width]; weight, bias [width], contiguous. Returns a new tensor like x.
at::Tensor *layer_norm_apply(const at::Tensor *x, const at::Tensor *weight, const at::Tensor *bias, double epsilon) {
  try {
    if (!launcher) throw std::runtime_error("layer_norm: no launcher is registered");
    return new at::Tensor(LayerNorm::apply(*x, *weight, *bias, epsilon));
  } catch (const std::exception &e) {
    last_error = e.what();
    return nullptr;
  }
}

}  // extern "C"
