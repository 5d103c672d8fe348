// A captured graph: the tasks of the captured streams in the order of the program, which respects every event between them.
#pragma once

#include <set>
#include <thread>

#include "runtime/runtime.h"

namespace emulator {

// Tasks that can be exchanged before a replay (attention whose lengths are host values).
struct TaskGroup {
  std::vector<size_t> nodes;  // positions in the graph
};

struct Graph {
  uint32_t id;
  Stream* origin;
  aclmdlRICaptureMode mode;
  std::thread::id thread;       // that began the capture
  std::string invalid;          // why the capture cannot end well, or empty
  std::vector<Task> tasks;
  std::set<Stream*> joined;     // streams drawn in by an event, beside the origin
  std::set<Stream*> unjoined;   // of these, with work the origin does not wait for yet
  std::vector<std::unique_ptr<TaskGroup>> groups;
  TaskGroup* open_group = nullptr;
  bool ended = false;

  void record(Stream& stream, Task task);
};

// Refuses a call that may not happen while a stream is captured, and spoils that capture, as aclgraph does.
void refuse_in_capture(const char* what);
// The same for a wait on a stream: only the captured streams themselves are forbidden.
void refuse_to_wait_for_captured(Stream& stream, const char* what);
bool any_capture();

// Not null while this thread re-sends the tasks of a group (aclmdlRICaptureTaskUpdateBegin .. End) on the stream.
bool takes_update(Stream& stream, Task& task);

}  // namespace emulator
