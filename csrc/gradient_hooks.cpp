// A call to Rust as soon as a parameter's gradient is complete, while the backward pass goes on. Rust takes the gradient
// over, so it is not kept in .grad. src/models/gradient_hooks.rs is the only caller.
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <exception>
#include <memory>
#include <string>

namespace {

thread_local std::string last_error;

extern "C" {
// `gradient` is borrowed for the call.
typedef void (*GradientReady)(void *user, const at::Tensor *gradient);
}

struct Hook : public torch::autograd::PostAccumulateGradHook {
  GradientReady ready;
  void *user;

  Hook(GradientReady r, void *u) : ready(r), user(u) {}

  void operator()(const torch::autograd::Variable &leaf) override {
    at::Tensor gradient = leaf.grad();
    // before the call: what Rust does with it may need the memory of other gradients, not this reference
    leaf.mutable_grad().reset();
    ready(user, &gradient);
  }
};

int set_hook(const at::Tensor *leaf, std::unique_ptr<Hook> hook) {
  try {
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::move(hook));
    return 0;
  } catch (const std::exception &e) {
    last_error = e.what();
    return -1;
  }
}

} // namespace

extern "C" {

const char *gradient_hooks_last_error() { return last_error.c_str(); }

int gradient_hooks_set(const at::Tensor *leaf, GradientReady ready, void *user) {
  return set_hook(leaf, std::make_unique<Hook>(ready, user));
}

int gradient_hooks_remove(const at::Tensor *leaf) { return set_hook(leaf, nullptr); }

} // extern "C"
