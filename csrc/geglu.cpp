// The gated activation a gelu(b) of h = [a | b] as one differentiable operation; see operation.h. Errors as in cuda.cpp:
// null, and the message in geglu_last_error().
#include "operation.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace {

thread_local std::string last_error;

// One call of a launcher; as `Call` in src/kernels/geglu.rs. dy is null in the forward pass.
struct Call {
  Place place;
  const void *h, *dy;
  void *out;  // y, or dh
  int64_t rows, width;
};

int32_t (*launcher)(Call *) = nullptr;

class Geglu : public torch::autograd::Function<Geglu> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext *ctx, const at::Tensor &h_any) {
    const at::Tensor h = h_any.contiguous();
    auto size = h.sizes().vec();
    size.back() /= 2;
    const at::Tensor y = at::empty(size, h.options());
    const int64_t width = size.back();
    Call call = {place_of(h), h.const_data_ptr(), nullptr, y.mutable_data_ptr(), width ? y.numel() / width : 0, width};
    launch(launcher, call);
    ctx->save_for_backward({h});
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx,
                                                 torch::autograd::variable_list grads) {
    if (at::GradMode::is_enabled()) throw std::runtime_error("geglu has no second derivative");
    const at::Tensor h = ctx->get_saved_variables()[0];
    const at::Tensor dy = grads[0].to(h.scalar_type()).contiguous();
    const at::Tensor dh = at::empty_like(h);
    const int64_t width = dy.size(-1);
    Call call = {place_of(h),          h.const_data_ptr(), dy.const_data_ptr(),
                 dh.mutable_data_ptr(), width ? dy.numel() / width : 0, width};
    launch(launcher, call);
    return {dh};
  }
};

}  // namespace

extern "C" {

const char *geglu_last_error() { return last_error.c_str(); }

void geglu_register(int32_t (*of_rust)(Call *)) { launcher = of_rust; }

// h [..., 2 width]; returns a new tensor [..., width].
at::Tensor *geglu_apply(const at::Tensor *h) {
  try {
    if (!launcher) throw std::runtime_error("geglu: no launcher is registered");
    return new at::Tensor(Geglu::apply(*h));
  } catch (const std::exception &e) {
    last_error = e.what();
    return nullptr;
  }
}

}  // extern "C"
