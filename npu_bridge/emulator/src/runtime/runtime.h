// What the emulated CANN libraries share: settings, errors, counters, tasks and streams. It lives in libascendcl.so; libopapi.so and
// libhccl.so link against it.
//
// A call of the C interface arrives in one of the files of ascendcl/, opapi/ or hccl/. It checks its arguments at once (the caller's
// Python line is still known then), makes a Task and hands it to a Stream, which runs it now, later on a thread, or records it into a
// graph.
#pragma once

#include <acl/acl.h>
#include <acl/acl_rt.h>
#include <acl/error_codes/rt_error_codes.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define EMULATED extern "C" __attribute__((visibility("default")))

namespace emulator {

// ---- settings: the environment variables NPU_EMULATOR_*, written by `python -m npu_bridge.emulator` --------------------------------

struct Settings {
  int devices;          // that a process sees
  std::string soc;      // Ascend910B2, ...; chooses host code inside torch_npu
  uint64_t memory;      // bytes a device
  bool execute;         // false: kernels are counted but compute nothing
  bool asynchronous;    // every stream works on a thread of its own
  double delay;         // seconds that work lies in a queue at least, when asynchronous
  std::string trace;    // file for the counters at the end of the process, or empty
  double timeout;       // seconds a collective may wait for its peers
};

// Throws Refusal when the process was not started through the launcher.
const Settings& settings();

// ---- errors ------------------------------------------------------------------------------------------------------------------------

// A call the emulator does not carry out. `code` is what the C interface returns.
struct Refusal : std::runtime_error {
  Refusal(int code, const std::string& message) : std::runtime_error(message), code(code) {}
  int code;
};

// "train.py:12 in forward", the innermost Python line outside torch and torch_npu; says so where the thread has no Python frame.
std::string python_line();

// What aclGetRecentErrMsg will say in this thread.
void set_recent_error(const std::string& message);
std::string recent_error();

// Runs the body of a C function: exceptions become its error code and the recent message.
template <class Body>
int guarded(const char* function, Body&& body) {
  try {
    body();
    return ACL_SUCCESS;
  } catch (const Refusal& refusal) {
    set_recent_error(std::string(function) + ": " + refusal.what());
    return refusal.code;
  } catch (const std::exception& error) {
    set_recent_error(std::string(function) + ": " + error.what());
    return ACL_ERROR_RT_INTERNAL_ERROR;
  }
}

// ---- counters ----------------------------------------------------------------------------------------------------------------------

enum class Kind { kernel, copy, synchronisation, collective, graph, memory };

// One line of the table. Objects are static and join a list when made; nothing is ever removed.
struct Counter {
  Counter(Kind kind, std::string name);
  void add(uint64_t bytes = 0) { calls++, this->bytes += bytes; }  // for what is not a task
  void add_bytes(uint64_t more) { bytes += more; }

  const Kind kind;
  const std::string name;
  std::atomic<uint64_t> calls{0};      // launched by the program, also into a graph
  std::atomic<uint64_t> captured{0};   // of these, recorded into a graph instead of run
  std::atomic<uint64_t> replayed{0};   // run by a replay
  std::atomic<uint64_t> bytes{0};
  std::atomic<uint64_t> host_nanoseconds{0};     // checks and bookkeeping in the calling thread
  std::atomic<uint64_t> compute_nanoseconds{0};  // ATen's time, in whatever thread
  Counter* next;
};

std::string counters_as_json();
void reset_counters();

class Stopwatch {
 public:
  explicit Stopwatch(std::atomic<uint64_t>& total) : total_(total), start_(std::chrono::steady_clock::now()) {}
  ~Stopwatch() { total_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::atomic<uint64_t>& total_;
  std::chrono::steady_clock::time_point start_;
};

// ---- streams -----------------------------------------------------------------------------------------------------------------------

// A point in the work of a stream that others can wait for.
struct Moment {
  void reach();
  bool reached();
  void wait();

  std::mutex mutex;
  std::condition_variable changed;
  bool done = false;
  uint64_t nanoseconds = 0;  // steady clock, when it was reached
};

struct Task {
  Counter* counter;           // nullptr: bookkeeping that nobody counts
  std::function<void()> run;  // throws what the program shall see
  bool blocks = false;        // waits for another process: must not hold up the calling thread
  std::vector<const void*> addresses = {};  // device memory it uses, checked before a replay
};

struct Graph;

class Stream {
 public:
  Stream(int id, int device) : id(id), device(device) {}

  // Runs the task now, queues it, or records it, whatever the stream is doing. Throws what the task throws when it runs at once, and
  // an earlier failure of this stream.
  void submit(Task task);
  // What follows on this stream starts after the moment.
  void wait_for(std::shared_ptr<Moment> moment);
  std::shared_ptr<Moment> mark();
  // Waits until everything submitted has run. Throws the stream's failure, and Refusal (107020) after `seconds` (negative: no limit).
  void drain(double seconds = -1);
  bool idle();

  const int id, device;
  std::shared_ptr<Graph> capture;  // not null while the stream is captured

 private:
  void enqueue(Task task);
  void work();
  void rethrow_failure();

  std::mutex mutex_;
  std::condition_variable changed_;
  struct Queued {
    Task task;
    std::chrono::steady_clock::time_point since;
  };
  std::deque<Queued> queue_;
  bool running_ = false, has_thread_ = false;
  std::string failure_;
};

// The stream of a handle; the default stream of the current device for nullptr. Throws Refusal when the thread has no device.
Stream& stream_of(aclrtStream handle);

// Device of the calling thread, -1 before aclrtSetDevice.
int current_device();

// Throws Refusal when the address lies in no live device allocation (used before a replay).
void require_live(const void* address, const char* what);

// True when the address is page-locked host memory or device memory.
bool is_pinned_or_device(const void* address);

// Queues must be empty and threads gone before static objects of torch are destroyed.
bool process_is_ending();

}  // namespace emulator
