// libnccl.so.2 for tests on a machine without a GPU: processes of one machine sum through shared memory, on the streams of
// cuda_double.cpp. Sums are those of the project's fixed tree over ranks, every partial sum of bf16 rounded, so that tests can
// compare bits with the sums of MPI (NCCL promises no order).
//
// As NCCL since 2.22, the first sum connects the ranks, in the call itself: it returns when all ranks have called.
//
// It checks what NCCL leaves to its caller: that all ranks start the same sums in the same order, with a current context and
// on a live stream. RLDIFF_NCCL_DOUBLE asks for a failure: "unique id", "joining" or "network", and "@" with a rank; "call N"
// (the N-th sum, from 1) and "abort" never return on that rank.
#include "cuda_double.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

enum Code { SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6 };
enum Type { FLOAT32 = 7, BFLOAT16 = 9 };
constexpr int SUM = 0;
constexpr int MOST_RANKS = 8;
constexpr size_t CHUNK = 1 << 16;

struct UniqueId {
  char internal[128];
};

struct Call {
  uint64_t number, count;
  int type;
};

// What the ranks share; a new file is all zeros.
struct Board {
  std::atomic<int> joined, waiting, generation;
  Call calls[MOST_RANKS];
  float values[MOST_RANKS][CHUNK];
};

struct Comm {
  Board *board;
  int ranks, rank;
  uint64_t calls = 0;
  std::atomic<int> error{SUCCESS};
  std::atomic<bool> aborted{false};
};

bool fails(const char *what, int rank) {
  const char *wanted = std::getenv("RLDIFF_NCCL_DOUBLE");
  return wanted && wanted == std::string(what) + "@" + std::to_string(rank);
}

[[noreturn]] void block() {
  for (;;) pause();
}

// False: the communicator was aborted meanwhile.
bool meet(Comm *comm) {
  Board *board = comm->board;
  const int generation = board->generation;
  if (++board->waiting == comm->ranks) {
    board->waiting = 0;
    board->generation++;
    return true;
  }
  while (board->generation == generation) {
    if (comm->aborted) return false;
    usleep(100);
  }
  return true;
}

float from_bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// To the nearest, ties to even; of finite numbers.
uint16_t to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// ((0+1)+(2+3))+..., an odd one carried up.
float tree(std::vector<float> values, int type) {
  while (values.size() > 1) {
    std::vector<float> next;
    for (size_t i = 0; i < values.size(); i += 2) {
      float sum = values[i];
      if (i + 1 < values.size()) {
        sum += values[i + 1];
        if (type == BFLOAT16) sum = from_bf16(to_bf16(sum));
      }
      next.push_back(sum);
    }
    values = next;
  }
  return values[0];
}

struct Reduction {
  Comm *comm;
  void *values;
  Call call;
};

// Runs on the stream.
void reduce(void *argument) {
  const Reduction work = *static_cast<Reduction *>(argument);
  delete static_cast<Reduction *>(argument);
  Comm *comm = work.comm;
  Board *board = comm->board;
  board->calls[comm->rank] = work.call;
  for (uint64_t begin = 0; begin < work.call.count; begin += CHUNK) {
    const size_t count = std::min<uint64_t>(CHUNK, work.call.count - begin);
    float *f32 = static_cast<float *>(work.values) + begin;
    uint16_t *bf16 = static_cast<uint16_t *>(work.values) + begin;
    for (size_t i = 0; i < count; i++)
      board->values[comm->rank][i] = work.call.type == FLOAT32 ? f32[i] : from_bf16(bf16[i]);
    if (!meet(comm)) return;
    for (int rank = 0; rank < comm->ranks; rank++) {
      const Call &other = board->calls[rank];
      if (other.number != work.call.number || other.count != work.call.count || other.type != work.call.type) {
        std::fprintf(stderr, "the double of NCCL: rank %d starts another sum than rank %d\n", comm->rank, rank);
        std::abort();
      }
    }
    std::vector<float> of_ranks(comm->ranks);
    for (size_t i = 0; i < count; i++) {
      for (int rank = 0; rank < comm->ranks; rank++) of_ranks[rank] = board->values[rank][i];
      const float sum = tree(of_ranks, work.call.type);
      if (work.call.type == FLOAT32)
        f32[i] = sum;
      else
        bf16[i] = to_bf16(sum);
    }
    if (!meet(comm)) return;
  }
}

}  // namespace

extern "C" {

int ncclGetVersion(int *version) {
  *version = 22803;
  return SUCCESS;
}

int ncclGetUniqueId(UniqueId *id) {
  if (fails("unique id", 0)) return SYSTEM_ERROR;
  std::snprintf(id->internal, sizeof id->internal, "/rldiff-nccl-double-%d", getpid());
  return SUCCESS;
}

int ncclCommInitRank(void **out, int ranks, UniqueId id, int rank) {
  if (!double_has_context() || ranks > MOST_RANKS) return UNHANDLED_CUDA_ERROR;
  if (fails("joining", rank)) return SYSTEM_ERROR;
  const int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, sizeof(Board)) != 0) return SYSTEM_ERROR;
  void *memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) return SYSTEM_ERROR;
  Comm *comm = new Comm;
  comm->board = static_cast<Board *>(memory);
  comm->ranks = ranks;
  comm->rank = rank;
  comm->board->joined++;
  while (comm->board->joined < ranks) usleep(100);
  if (rank == 0) shm_unlink(id.internal);
  *out = comm;
  return SUCCESS;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, void *handle, void *stream) {
  Comm *comm = static_cast<Comm *>(handle);
  if (!double_has_context()) return UNHANDLED_CUDA_ERROR;
  if (from != to || op != SUM || (type != FLOAT32 && type != BFLOAT16) || comm->aborted) return INVALID_ARGUMENT;
  if (fails("network", comm->rank)) comm->error = REMOTE_ERROR;
  const Call call = {++comm->calls, count, type};
  if (fails(("call " + std::to_string(call.number)).c_str(), comm->rank)) block();
  if (call.number == 1 && !meet(comm)) return SYSTEM_ERROR;
  return double_enqueue(stream, reduce, new Reduction{comm, to, call}) == 0 ? SUCCESS : UNHANDLED_CUDA_ERROR;
}

int ncclCommGetAsyncError(void *handle, int *error) {
  *error = static_cast<Comm *>(handle)->error;
  return SUCCESS;
}

int ncclCommAbort(void *handle) {
  if (fails("abort", static_cast<Comm *>(handle)->rank)) block();
  static_cast<Comm *>(handle)->aborted = true;  // not freed: sums that wait look at it
  return SUCCESS;
}

int ncclCommDestroy(void *handle) {
  Comm *comm = static_cast<Comm *>(handle);
  munmap(comm->board, sizeof(Board));
  delete comm;
  return SUCCESS;
}

const char *ncclGetErrorString(int code) {
  switch (code) {
    case SUCCESS: return "no error";
    case UNHANDLED_CUDA_ERROR: return "unhandled cuda error";
    case SYSTEM_ERROR: return "unhandled system error";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    default: return "invalid argument";
  }
}

}  // extern "C"
