// libcuda.so.1 for tests on a machine without a GPU: the part of the driver that src/comm/nccl.rs uses, with the host's
// memory as the GPU's. Streams are threads that work beside the caller, so a missing order between two streams shows as
// a wrong result. Handles that were destroyed, and calls without a current context, are refused as the driver refuses them.
#include "cuda_double.h"

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

namespace {

enum Code { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_READY = 600 };

// Work that may not have been done yet.
class Done {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;

 public:
  std::chrono::steady_clock::time_point when;

  void set() {
    std::lock_guard<std::mutex> lock(mutex);
    done = true;
    when = std::chrono::steady_clock::now();
    changed.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return done; });
  }
  bool is_set() {
    std::lock_guard<std::mutex> lock(mutex);
    return done;
  }
};

class Stream {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  bool closed = false;
  std::thread thread;

  void run() {
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [this] { return closed || !queue.empty(); });
        if (queue.empty()) return;
        work = std::move(queue.front());
        queue.pop_front();
      }
      work();
    }
  }

 public:
  Stream() : thread([this] { run(); }) {}
  // Returns when all work has been done.
  ~Stream() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      closed = true;
      changed.notify_all();
    }
    thread.join();
  }
  void put(std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex);
    queue.push_back(std::move(work));
    changed.notify_all();
  }
  std::shared_ptr<Done> mark() {
    auto mark = std::make_shared<Done>();
    put([mark] { mark->set(); });
    return mark;
  }
};

// The latest recording; null: none, which counts as done.
struct Event {
  std::shared_ptr<Done> recorded;
};

std::mutex registry;
std::set<Stream *> streams;
std::set<Event *> events;
std::set<char *> allocations;
int retained = 0;
int the_context = 0;  // its address is the handle
thread_local void *current = nullptr;

template <class T>
T *known(std::set<T *> &all, void *handle) {
  std::lock_guard<std::mutex> lock(registry);
  auto found = all.find(static_cast<T *>(handle));
  return found == all.end() ? nullptr : *found;
}

template <class T>
int made(std::set<T *> &all, void **handle) {
  if (!current) return INVALID_CONTEXT;
  T *one = new T;
  std::lock_guard<std::mutex> lock(registry);
  all.insert(one);
  *handle = one;
  return SUCCESS;
}

template <class T>
int destroyed(std::set<T *> &all, void *handle) {
  T *one = known(all, handle);
  if (!one) return INVALID_HANDLE;
  {
    std::lock_guard<std::mutex> lock(registry);
    all.erase(one);
  }
  delete one;
  return SUCCESS;
}

}  // namespace

extern "C" {

int double_enqueue(void *stream, void (*work)(void *), void *argument) {
  Stream *known_stream = known(streams, stream);
  if (!known_stream) return INVALID_HANDLE;
  known_stream->put([work, argument] { work(argument); });
  return SUCCESS;
}

int double_has_context() { return current != nullptr; }

int double_live_handles() {
  std::lock_guard<std::mutex> lock(registry);
  return static_cast<int>(streams.size() + events.size() + allocations.size()) + retained;
}

int cuInit(unsigned) { return SUCCESS; }

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(void **context, int) {
  std::lock_guard<std::mutex> lock(registry);
  retained++;
  *context = &the_context;
  return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int) {
  std::lock_guard<std::mutex> lock(registry);
  return retained-- > 0 ? SUCCESS : INVALID_CONTEXT;
}

int cuCtxSetCurrent(void *context) {
  if (context != &the_context) return INVALID_CONTEXT;
  current = context;
  return SUCCESS;
}

int cuStreamCreate(void **stream, unsigned) { return made(streams, stream); }
int cuStreamDestroy_v2(void *stream) { return destroyed(streams, stream); }

int cuStreamSynchronize(void *stream) {
  Stream *known_stream = known(streams, stream);
  if (!known_stream) return INVALID_HANDLE;
  known_stream->mark()->wait();
  return SUCCESS;
}

int cuStreamWaitEvent(void *stream, void *event, unsigned) {
  Stream *known_stream = known(streams, stream);
  Event *known_event = known(events, event);
  if (!known_stream || !known_event) return INVALID_HANDLE;
  // the recording as it is now: the event may be destroyed or recorded again before it is reached
  if (auto recorded = known_event->recorded) known_stream->put([recorded] { recorded->wait(); });
  return SUCCESS;
}

int cuLaunchHostFunc(void *stream, void (*work)(void *), void *argument) {
  return double_enqueue(stream, work, argument);
}

int cuEventCreate(void **event, unsigned) { return made(events, event); }
int cuEventDestroy_v2(void *event) { return destroyed(events, event); }

int cuEventRecord(void *event, void *stream) {
  Stream *known_stream = known(streams, stream);
  Event *known_event = known(events, event);
  if (!known_stream || !known_event) return INVALID_HANDLE;
  known_event->recorded = known_stream->mark();
  return SUCCESS;
}

int cuEventSynchronize(void *event) {
  Event *known_event = known(events, event);
  if (!known_event) return INVALID_HANDLE;
  if (auto recorded = known_event->recorded) recorded->wait();
  return SUCCESS;
}

int cuEventElapsedTime_v2(float *milliseconds, void *begins, void *ends) {
  Event *first = known(events, begins);
  Event *second = known(events, ends);
  if (!first || !second || !first->recorded || !second->recorded) return INVALID_HANDLE;
  if (!first->recorded->is_set() || !second->recorded->is_set()) return NOT_READY;
  *milliseconds = std::chrono::duration<float, std::milli>(second->recorded->when - first->recorded->when).count();
  return SUCCESS;
}

int cuMemAlloc_v2(unsigned long long *address, size_t bytes) {
  if (!current) return INVALID_CONTEXT;
  char *memory = new char[bytes];
  std::lock_guard<std::mutex> lock(registry);
  allocations.insert(memory);
  *address = reinterpret_cast<unsigned long long>(memory);
  return SUCCESS;
}

int cuMemFree_v2(unsigned long long address) {
  char *memory = reinterpret_cast<char *>(address);
  {
    std::lock_guard<std::mutex> lock(registry);
    if (allocations.erase(memory) == 0) return INVALID_VALUE;
  }
  delete[] memory;
  return SUCCESS;
}

int cuMemsetD8_v2(unsigned long long address, unsigned char value, size_t bytes) {
  std::memset(reinterpret_cast<char *>(address), value, bytes);
  return SUCCESS;
}

int cuEventQuery(void *event) {
  Event *known_event = known(events, event);
  if (!known_event) return INVALID_HANDLE;
  return !known_event->recorded || known_event->recorded->is_set() ? SUCCESS : NOT_READY;
}

}  // extern "C"
