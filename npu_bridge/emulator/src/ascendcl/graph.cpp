// aclgraph: capture of streams and replay, with the rules a chip has.
#include "ascendcl/graph.h"

#include <algorithm>
#include <map>

namespace emulator {

static std::mutex captures_mutex;
static std::vector<std::weak_ptr<Graph>>& captures() {
  static auto* all = new std::vector<std::weak_ptr<Graph>>;
  return *all;
}
static thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

static std::vector<std::shared_ptr<Graph>> active() {
  std::lock_guard<std::mutex> lock(captures_mutex);
  std::vector<std::shared_ptr<Graph>> found;
  for (auto& weak : captures())
    if (auto graph = weak.lock(); graph && !graph->ended) found.push_back(graph);
  return found;
}

bool any_capture() { return !active().empty(); }

static void spoil(Graph& graph, const std::string& why) {
  if (graph.invalid.empty()) graph.invalid = why;
}

void refuse_in_capture(const char* what) {
  if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return;
  for (auto& graph : active()) {
    if (graph->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) continue;
    if (graph->mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL && graph->thread != std::this_thread::get_id()) continue;
    std::string message = std::string(what) + " while a graph is being captured, at " + python_line() + "; the capture is void";
    spoil(*graph, message);
    throw Refusal(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT, message);
  }
}

void refuse_to_wait_for_captured(Stream& stream, const char* what) {
  if (!stream.capture) return;
  std::string message = std::string(what) + " while a graph is being captured on it, at " + python_line() +
                        "; a captured step may not read the device (.item(), nonzero, boolean masks, blocking copies); the capture is void";
  spoil(*stream.capture, message);
  throw Refusal(ACL_ERROR_RT_STREAM_CAPTURED, message);
}

void Graph::record(Stream& stream, Task task) {
  if (open_group) open_group->nodes.push_back(tasks.size());
  if (&stream != origin) unjoined.insert(&stream);
  tasks.push_back(std::move(task));
}

// ---- updates of host-side arguments --------------------------------------------------------------------------------------------------

namespace {
struct Update {
  Graph* graph;
  TaskGroup* group;
  size_t next = 0;
};
}  // namespace

static std::mutex updates_mutex;
static std::map<Stream*, Update>& updates() {
  static auto* all = new std::map<Stream*, Update>;
  return *all;
}
static std::map<TaskGroup*, std::weak_ptr<Graph>>& owners() {
  static auto* all = new std::map<TaskGroup*, std::weak_ptr<Graph>>;
  return *all;
}

bool takes_update(Stream& stream, Task& task) {
  std::lock_guard<std::mutex> lock(updates_mutex);
  auto i = updates().find(&stream);
  if (i == updates().end()) return false;
  Update& update = i->second;
  if (update.next == update.group->nodes.size())
    throw Refusal(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "more tasks are sent than the captured group has (" + std::to_string(update.next) + ")");
  Task& old = update.graph->tasks[update.group->nodes[update.next++]];
  if (old.counter != task.counter)
    throw Refusal(ACL_ERROR_RT_FEATURE_NOT_SUPPORT_UPDATE_OP, std::string("the group holds ") + (old.counter ? old.counter->name : "?") + " where " +
                                                                 (task.counter ? task.counter->name : "?") + " is sent");
  old = std::move(task);
  return true;
}

// ---- replay ------------------------------------------------------------------------------------------------------------------------

static void replay(const std::shared_ptr<Graph>& graph, Stream& stream) {
  static Counter counter(Kind::graph, "replay");
  bool blocks = false;
  for (const Task& task : graph->tasks) {
    blocks |= task.blocks;
    for (const void* address : task.addresses) require_live(address, task.counter ? task.counter->name.c_str() : "a task");
  }
  // The tasks are copied: an update for the next replay may come before a late stream has run this one.
  auto tasks = std::make_shared<std::vector<Task>>(graph->tasks);
  stream.submit({&counter,
                 [tasks] {
                   for (Task& task : *tasks) {
                     if (task.counter) task.counter->replayed++;
                     task.run();
                   }
                 },
                 blocks});
}

}  // namespace emulator

using namespace emulator;

// Handles of graphs are pointers to shared pointers: a graph lives while a stream still replays it.
using Handle = std::shared_ptr<Graph>;

static Handle& graph_of(aclmdlRI handle) {
  if (!handle) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "null graph");
  return *static_cast<Handle*>(handle);
}
static std::map<Graph*, Handle*>& handles() {
  static auto* all = new std::map<Graph*, Handle*>;
  return *all;
}

EMULATED aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  return guarded("aclmdlRICaptureBegin", [&] {
    Stream& stream = stream_of(handle);
    if (!handle) throw Refusal(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "the default stream cannot be captured");
    if (stream.capture) throw Refusal(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured already");
    static std::atomic<uint32_t> count{1};
    auto graph = std::make_shared<Graph>();
    graph->id = count++;
    graph->origin = &stream;
    graph->mode = mode;
    graph->thread = std::this_thread::get_id();
    stream.capture = graph;
    std::lock_guard<std::mutex> lock(captures_mutex);
    captures().push_back(graph);
    handles()[graph.get()] = new Handle(graph);
  });
}

EMULATED aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* model) {
  return guarded("aclmdlRICaptureGetInfo", [&] {
    auto graph = stream_of(handle).capture;
    if (status)
      *status = !graph ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
                       : graph->invalid.empty() ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
    std::lock_guard<std::mutex> lock(captures_mutex);
    if (model) *model = graph ? handles()[graph.get()] : nullptr;
  });
}

EMULATED aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* model) {
  return guarded("aclmdlRICaptureEnd", [&] {
    Stream& stream = stream_of(handle);
    auto graph = stream.capture;
    if (model) *model = nullptr;
    if (!graph) throw Refusal(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "the stream is not being captured");
    if (graph->origin != &stream) throw Refusal(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "the capture began on another stream");
    graph->ended = true;
    stream.capture = nullptr;
    for (Stream* joined : graph->joined) joined->capture = nullptr;
    if (!graph->invalid.empty()) throw Refusal(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "the capture is void: " + graph->invalid);
    if (!graph->unjoined.empty())
      throw Refusal(ACL_ERROR_RT_STREAM_UNJOINED,
                    "stream " + std::to_string((*graph->unjoined.begin())->id) + " took part in the capture and the capturing stream does not wait for its last work");
    if (graph->open_group) throw Refusal(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "a task group was begun and not ended");
    static Counter counter(Kind::graph, "capture");
    counter.add();
    std::lock_guard<std::mutex> lock(captures_mutex);
    *model = handles()[graph.get()];
  });
}

EMULATED aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(*mode, emulator::thread_mode);
  return ACL_SUCCESS;
}

EMULATED aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
  return guarded("aclmdlRIExecuteAsync", [&] { emulator::replay(graph_of(model), stream_of(stream)); });
}

EMULATED aclError aclmdlRIExecute(aclmdlRI model, int32_t milliseconds) {
  return guarded("aclmdlRIExecute", [&] {
    emulator::replay(graph_of(model), stream_of(nullptr));
    stream_of(nullptr).drain(milliseconds < 0 ? -1 : milliseconds / 1000.0);
  });
}

EMULATED aclError aclmdlRIDestroy(aclmdlRI model) {
  return guarded("aclmdlRIDestroy", [&] {
    Handle* handle = &graph_of(model);
    std::lock_guard<std::mutex> lock(captures_mutex);
    handles().erase(handle->get());
    delete handle;
  });
}

EMULATED aclError aclmdlRIGetId(aclmdlRI model, uint32_t* id) {
  return guarded("aclmdlRIGetId", [&] { *id = graph_of(model)->id; });
}

static int print(aclmdlRI model, FILE* out) {
  return guarded("aclmdlRIDebugPrint", [&] {
    auto& graph = graph_of(model);
    std::fprintf(out, "{\"graph\": %u, \"tasks\": [", graph->id);
    const char* separator = "";
    for (const Task& task : graph->tasks) {
      std::fprintf(out, "%s\"%s\"", separator, task.counter ? task.counter->name.c_str() : "host");
      separator = ", ";
    }
    std::fprintf(out, "]}\n");
  });
}

EMULATED aclError aclmdlRIDebugPrint(aclmdlRI model) { return print(model, stderr); }
EMULATED aclError aclmdlRIDebugJsonPrint(aclmdlRI model, const char* path, uint32_t) {
  FILE* out = std::fopen(path, "w");
  if (!out) return ACL_ERROR_RT_FILE_OPEN;
  int code = print(model, out);
  std::fclose(out);
  return code;
}

EMULATED aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
  return guarded("aclmdlRICaptureTaskGrpBegin", [&] {
    auto graph = stream_of(stream).capture;
    if (!graph) throw Refusal(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "task groups exist only inside a capture");
    if (graph->open_group) throw Refusal(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "the last task group was not ended");
    graph->groups.push_back(std::make_unique<TaskGroup>());
    graph->open_group = graph->groups.back().get();
    std::lock_guard<std::mutex> lock(emulator::updates_mutex);
    emulator::owners()[graph->open_group] = graph;
  });
}

EMULATED aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp* group) {
  return guarded("aclmdlRICaptureTaskGrpEnd", [&] {
    auto graph = stream_of(stream).capture;
    if (!graph || !graph->open_group) throw Refusal(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "no task group was begun");
    *group = graph->open_group;
    graph->open_group = nullptr;
  });
}

EMULATED aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle) {
  return guarded("aclmdlRICaptureTaskUpdateBegin", [&] {
    Stream& on = stream_of(stream);
    auto* group = static_cast<TaskGroup*>(handle);
    std::lock_guard<std::mutex> lock(emulator::updates_mutex);
    auto owner = emulator::owners().find(group);
    auto graph = owner == emulator::owners().end() ? nullptr : owner->second.lock();
    if (!graph) throw Refusal(ACL_ERROR_RT_INVALID_HANDLE, "no such task group");
    emulator::updates()[&on] = {graph.get(), group};
  });
}

EMULATED aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
  return guarded("aclmdlRICaptureTaskUpdateEnd", [&] {
    std::lock_guard<std::mutex> lock(emulator::updates_mutex);
    auto i = emulator::updates().find(&stream_of(stream));
    if (i == emulator::updates().end()) throw Refusal(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "no update was begun");
    auto update = i->second;
    emulator::updates().erase(i);
    if (update.next != update.group->nodes.size())
      throw Refusal(ACL_ERROR_STREAM_TASK_GROUP_INTR, std::to_string(update.next) + " of " + std::to_string(update.group->nodes.size()) + " tasks were sent again");
  });
}
