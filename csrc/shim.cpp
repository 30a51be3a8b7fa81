// What tch 0.24 does not expose of libtorch. Every function returns null or -1 on failure and leaves the
// message in shim_last_error(); src/shim.rs is the only caller.
#include <ATen/Context.h>
#include <string>

static thread_local std::string last_error;

extern "C" {

const char *shim_last_error() { return last_error.c_str(); }

// Deterministic algorithms only; an operation without one raises.
int shim_use_deterministic_algorithms(int on) {
  try {
    at::globalContext().setDeterministicAlgorithms(on != 0, /*warn_only=*/false);
    return 0;
  } catch (const std::exception &e) {
    last_error = e.what();
    return -1;
  }
}

} // extern "C"
