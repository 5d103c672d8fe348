// Streams and events. A stream runs a task in the calling thread when nothing is queued before it, so that errors and times are where
// they arise. Tasks that wait for other processes (collectives) are queued on a thread, and so is what follows them. With
// --asynchronous every task stays in its queue for a while, so that a missing event gives a wrong result.
#include <cstdlib>
#include <cstring>
#include <map>

#include "ascendcl/graph.h"
#include "runtime/runtime.h"

namespace emulator {

using Clock = std::chrono::steady_clock;

static uint64_t now() { return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch()).count(); }

static std::atomic<bool> ending{false};
bool process_is_ending() { return ending; }

// ---- moments -----------------------------------------------------------------------------------------------------------------------

void Moment::reach() {
  std::lock_guard<std::mutex> lock(mutex);
  done = true;
  nanoseconds = now();
  changed.notify_all();
}

bool Moment::reached() {
  std::lock_guard<std::mutex> lock(mutex);
  return done;
}

void Moment::wait() {
  std::unique_lock<std::mutex> lock(mutex);
  while (!done && !ending) changed.wait_for(lock, std::chrono::milliseconds(50));
}

// ---- streams -----------------------------------------------------------------------------------------------------------------------

void Stream::submit(Task task) {
  if (takes_update(*this, task)) return;
  if (capture) {
    if (task.counter) task.counter->calls++, task.counter->captured++;
    capture->record(*this, std::move(task));
    return;
  }
  if (task.counter) task.counter->calls++;
  bool later = task.blocks || settings().asynchronous;
  if (!later) {
    std::lock_guard<std::mutex> lock(mutex_);
    later = running_ || !queue_.empty();
  }
  if (later) {
    enqueue(std::move(task));
  } else {
    rethrow_failure();
    task.run();
  }
}

void Stream::enqueue(Task task) {
  std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back({std::move(task), Clock::now()});
  if (!has_thread_) {
    has_thread_ = true;
    std::thread([this] { work(); }).detach();  // streams are never destroyed
  }
  changed_.notify_all();
}

void Stream::work() {
  auto delay = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(settings().asynchronous ? settings().delay : 0));
  std::unique_lock<std::mutex> lock(mutex_);
  while (!ending) {
    if (queue_.empty()) {
      changed_.wait_for(lock, std::chrono::milliseconds(100));
      continue;
    }
    Queued next = std::move(queue_.front());
    queue_.pop_front();
    running_ = true;
    lock.unlock();
    std::this_thread::sleep_until(next.since + delay);
    std::string failure;
    try {
      next.task.run();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    next.task = {};  // gives back what it holds before anybody hears that it is done
    lock.lock();
    if (!failure.empty() && failure_.empty()) failure_ = failure;
    running_ = false;
    changed_.notify_all();
  }
}

void Stream::rethrow_failure() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_.empty()) throw Refusal(ACL_ERROR_RT_AICORE_EXCEPTION, "earlier work on stream " + std::to_string(id) + " failed: " + failure_);
}

void Stream::drain(double seconds) {
  {
    auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds < 0 ? 0 : seconds));
    std::unique_lock<std::mutex> lock(mutex_);
    while ((running_ || !queue_.empty()) && !ending) {
      if (seconds >= 0 && Clock::now() >= end) throw Refusal(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "stream " + std::to_string(id) + " is not done after " + std::to_string(seconds) + " s");
      changed_.wait_for(lock, std::chrono::milliseconds(50));
    }
  }
  rethrow_failure();
}

bool Stream::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return !running_ && queue_.empty();
}

std::shared_ptr<Moment> Stream::mark() {
  auto moment = std::make_shared<Moment>();
  bool now_free = !settings().asynchronous && idle();
  if (now_free)
    moment->reach();
  else
    enqueue({nullptr, [moment] { moment->reach(); }});
  return moment;
}

void Stream::wait_for(std::shared_ptr<Moment> moment) {
  if (moment->reached()) return;
  enqueue({nullptr, [moment] { moment->wait(); }});
}

// ---- the streams of the process ----------------------------------------------------------------------------------------------------

static std::mutex streams_mutex;
static std::vector<Stream*>& streams() {
  static auto* all = new std::vector<Stream*>;
  return *all;
}

static Stream* make_stream(int device) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  streams().push_back(new Stream(static_cast<int>(streams().size()), device));
  return streams().back();
}

Stream& stream_of(aclrtStream handle) {
  if (handle) return *static_cast<Stream*>(handle);
  int device = current_device();
  if (device < 0) throw Refusal(ACL_ERROR_RT_CONTEXT_NULL, "this thread has chosen no device (aclrtSetDevice)");
  static std::mutex mutex;
  static auto* defaults = new std::map<int, Stream*>;
  std::lock_guard<std::mutex> lock(mutex);
  Stream*& stream = (*defaults)[device];
  if (!stream) stream = make_stream(device);
  return *stream;
}

static std::vector<Stream*> streams_on(int device) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  std::vector<Stream*> found;
  for (Stream* s : streams())
    if (s->device == device) found.push_back(s);
  return found;
}

static Counter stream_syncs(Kind::synchronisation, "stream"), device_syncs(Kind::synchronisation, "device"), event_syncs(Kind::synchronisation, "event");

static int synchronize_stream(aclrtStream handle, double seconds) {
  return guarded("aclrtSynchronizeStream", [&] {
    Stream& stream = stream_of(handle);
    refuse_to_wait_for_captured(stream, "waiting for a stream");
    stream_syncs.add();
    stream.drain(seconds);
  });
}

static int synchronize_device(double seconds) {
  return guarded("aclrtSynchronizeDevice", [&] {
    device_syncs.add();
    for (Stream* s : streams_on(current_device())) {
      refuse_to_wait_for_captured(*s, "waiting for the device");
      s->drain(seconds);
    }
  });
}

// At the end of the process: no task may run while torch's static objects go. A collective whose peers are gone times out.
void end_streams() {
  for (int device = 0; device < settings().devices; device++)
    for (Stream* s : streams_on(device)) {
      try {
        s->drain(1.0);
      } catch (const std::exception&) {  // nothing left to report to
      }
    }
  ending = true;
}

}  // namespace emulator

using namespace emulator;

EMULATED aclError aclrtCreateStream(aclrtStream* stream) {
  return guarded("aclrtCreateStream", [&] { *stream = make_stream(current_device()); });
}
EMULATED aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }
EMULATED aclError aclrtDestroyStream(aclrtStream stream) {
  return guarded("aclrtDestroyStream", [&] { stream_of(stream).drain(); });
}
EMULATED aclError aclrtDestroyStreamForce(aclrtStream) { return ACL_SUCCESS; }
EMULATED aclError aclrtSynchronizeStream(aclrtStream stream) { return synchronize_stream(stream, -1); }
EMULATED aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t ms) { return synchronize_stream(stream, ms < 0 ? -1 : ms / 1000.0); }
EMULATED aclError aclrtSynchronizeDevice() { return synchronize_device(-1); }
EMULATED aclError aclrtSynchronizeDeviceWithTimeout(int32_t ms) { return synchronize_device(ms < 0 ? -1 : ms / 1000.0); }
EMULATED aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
  return guarded("aclrtStreamQuery", [&] { *status = stream_of(stream).idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY; });
}
EMULATED aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  return guarded("aclrtStreamGetId", [&] { *id = stream_of(stream).id; });
}

// ---- events ------------------------------------------------------------------------------------------------------------------------

struct Event {
  std::mutex mutex;
  std::shared_ptr<Moment> moment;   // of the latest record; null before
  std::weak_ptr<Graph> captured_in;  // the graph into which the latest record went
  Stream* recorded_on = nullptr;
};

static Event& event_of(aclrtEvent handle) {
  if (!handle) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "null event");
  return *static_cast<Event*>(handle);
}

static std::shared_ptr<Moment> moment_of(aclrtEvent handle) {
  Event& event = event_of(handle);
  std::lock_guard<std::mutex> lock(event.mutex);
  if (auto graph = event.captured_in.lock(); graph && !graph->ended) throw Refusal(ACL_ERROR_RT_EVENT_CAPTURED, "the event was recorded in a capture that goes on");
  return event.moment;
}

EMULATED aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) {
  *event = new Event;
  return ACL_SUCCESS;
}
EMULATED aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) { return aclrtCreateEventWithFlag(event, flag); }
EMULATED aclError aclrtCreateEvent(aclrtEvent* event) { return aclrtCreateEventWithFlag(event, 0); }
EMULATED aclError aclrtDestroyEvent(aclrtEvent event) {
  delete static_cast<Event*>(event);
  return ACL_SUCCESS;
}

EMULATED aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  return guarded("aclrtRecordEvent", [&] {
    Event& event = event_of(handle);
    Stream& stream = stream_of(stream_handle);
    std::lock_guard<std::mutex> lock(event.mutex);
    event.recorded_on = &stream;
    event.captured_in = stream.capture;
    if (stream.capture) {
      event.moment = std::make_shared<Moment>();
      event.moment->reach();  // not waited for after capture: a replay keeps the order of the program
    } else {
      event.moment = stream.mark();
    }
  });
}

EMULATED aclError aclrtResetEvent(aclrtEvent handle, aclrtStream) {
  return guarded("aclrtResetEvent", [&] { event_of(handle); });
}

EMULATED aclError aclrtStreamWaitEvent(aclrtStream stream_handle, aclrtEvent handle) {
  return guarded("aclrtStreamWaitEvent", [&] {
    Event& event = event_of(handle);
    Stream& stream = stream_of(stream_handle);
    std::lock_guard<std::mutex> lock(event.mutex);
    auto graph = event.captured_in.lock();
    if (graph && !graph->ended) {
      if (stream.capture && stream.capture != graph) throw Refusal(ACL_ERROR_STREAM_CAPTURE_CONFLICT, "the event belongs to another capture");
      if (!stream.capture) {
        stream.capture = graph;
        graph->joined.insert(&stream);
      }
      if (event.recorded_on != &stream) graph->unjoined.erase(event.recorded_on);
    } else if (stream.capture && event.moment && !event.moment->reached()) {
      throw Refusal(ACL_ERROR_RT_CAPTURE_DEPENDENCY, "a captured stream cannot wait for work outside of its capture");
    } else if (event.moment) {
      stream.wait_for(event.moment);
    }
  });
}

EMULATED aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  return guarded("aclrtSynchronizeEvent", [&] {
    event_syncs.add();
    if (auto moment = moment_of(handle)) moment->wait();
  });
}

EMULATED aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  return guarded("aclrtQueryEventStatus", [&] {
    auto moment = moment_of(handle);
    *status = !moment || moment->reached() ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  });
}

EMULATED aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
  return guarded("aclrtQueryEventWaitStatus", [&] {
    auto moment = moment_of(handle);
    *status = !moment || moment->reached() ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  });
}

static uint64_t time_of(aclrtEvent handle) {
  auto moment = moment_of(handle);
  if (!moment) throw Refusal(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID, "the event was never recorded");
  moment->wait();
  return moment->nanoseconds;
}

EMULATED aclError aclrtEventElapsedTime(float* ms, aclrtEvent start, aclrtEvent end) {
  return guarded("aclrtEventElapsedTime", [&] { *ms = static_cast<float>((static_cast<double>(time_of(end)) - static_cast<double>(time_of(start))) / 1e6); });
}
EMULATED aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
  return guarded("aclrtEventGetTimestamp", [&] { *microseconds = time_of(event) / 1000; });
}

EMULATED aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
  return guarded("aclrtLaunchHostFunc", [&] { stream_of(stream).submit({nullptr, [=] { function(argument); }}); });
}
EMULATED aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType, aclrtStream stream) {
  return guarded("aclrtLaunchCallback", [&] { stream_of(stream).submit({nullptr, [=] { function(argument); }}); });
}
