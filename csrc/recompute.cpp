// Gradient checkpointing: a piece of a network whose activations are computed again in the backward pass instead of
// kept. Only its inputs are saved. src/models/recompute.rs is the only caller.
#include <ATen/core/grad_mode.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <string>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

thread_local std::string last_error;

extern "C" {
// Runs the piece on `inputs`: a new tensor, or null after a failure whose message is in `error` (of `capacity` bytes).
typedef Tensor *(*RunPiece)(void *piece, Tensor *const *inputs, size_t count, char *error, size_t capacity);
typedef void (*DropPiece)(void *piece);
}

// The Rust closure; dropped when neither the caller nor the graph needs it any more.
struct Piece {
  void *closure;
  RunPiece run_closure;
  DropPiece drop_closure;

  Piece(void *c, RunPiece r, DropPiece d) : closure(c), run_closure(r), drop_closure(d) {}
  Piece(const Piece &) = delete;
  ~Piece() { drop_closure(closure); }

  Tensor run(const variable_list &inputs) const {
    std::vector<Tensor *> pointers;
    for (const Tensor &input : inputs) pointers.push_back(const_cast<Tensor *>(&input));
    char error[512] = {0};
    Tensor *result = run_closure(closure, pointers.data(), pointers.size(), error, sizeof error);
    TORCH_CHECK(result != nullptr, error);
    Tensor output = std::move(*result);
    delete result;
    return output;
  }
};

// grad_fn of the piece's output: runs the piece again with gradients and differentiates it.
struct Recompute : public Node {
  std::shared_ptr<Piece> piece;
  std::vector<SavedVariable> inputs;
  std::vector<SavedVariable> parameters;

  std::string name() const override { return "Recompute"; }

  void release_variables() override {
    inputs.clear();
    parameters.clear();
    piece.reset();
  }

  variable_list apply(variable_list &&gradients) override {
    TORCH_CHECK(piece, "a recomputed piece of the network is differentiated a second time");
    variable_list result(inputs.size() + parameters.size());
    if (!gradients[0].defined()) return result;

    at::AutoGradMode with_gradients(true);
    variable_list fresh, wanted;
    std::vector<size_t> place;
    for (size_t i = 0; i < inputs.size(); i++) {
      Tensor input = inputs[i].unpack();
      fresh.push_back(input.detach().set_requires_grad(input.requires_grad()));
      if (input.requires_grad() && task_should_compute_output(i)) {
        wanted.push_back(fresh.back());
        place.push_back(i);
      }
    }
    for (size_t i = 0; i < parameters.size(); i++) {
      Tensor parameter = parameters[i].unpack();
      if (parameter.requires_grad() && task_should_compute_output(inputs.size() + i)) {
        wanted.push_back(parameter);
        place.push_back(inputs.size() + i);
      }
    }
    if (wanted.empty()) return result;
    Tensor output = piece->run(fresh);
    variable_list found = torch::autograd::grad({output}, wanted, {gradients[0]}, /*retain_graph=*/false,
                                                /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < found.size(); i++) result[place[i]] = found[i];
    return result;
  }
};

} // namespace

extern "C" {

const char *recompute_last_error() { return last_error.c_str(); }

// The piece's output for `inputs`. `parameters` are the leaves the piece uses besides. Takes over `closure`.
// Null after a failure, with the message in recompute_last_error().
Tensor *recompute_run(Tensor *const *inputs, size_t input_count, Tensor *const *parameters, size_t parameter_count,
                      void *closure, RunPiece run, DropPiece drop) {
  try {
    auto piece = std::make_shared<Piece>(closure, run, drop);
    variable_list given, everything;
    for (size_t i = 0; i < input_count; i++) given.push_back(*inputs[i]);
    everything = given;
    for (size_t i = 0; i < parameter_count; i++) everything.push_back(*parameters[i]);

    Tensor output;
    {
      at::AutoGradMode without_gradients(false);
      output = piece->run(given);
    }
    if (at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(everything)) {
      auto node = std::shared_ptr<Recompute>(new Recompute(), torch::autograd::deleteNode);
      node->set_next_edges(torch::autograd::collect_next_edges(everything));
      for (const Tensor &input : given) node->inputs.emplace_back(input, /*is_output=*/false);
      for (size_t i = 0; i < parameter_count; i++) node->parameters.emplace_back(*parameters[i], /*is_output=*/false);
      node->piece = piece;
      torch::autograd::set_history(output, node);
    }
    return new Tensor(std::move(output));
  } catch (const std::exception &e) {
    last_error = e.what();
    return nullptr;
  }
}

} // extern "C"
