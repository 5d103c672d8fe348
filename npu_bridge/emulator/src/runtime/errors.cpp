// Messages, and the Python line that made a call. Python is found at run time: the libraries load without it, too.
#include "runtime/runtime.h"

#include <dlfcn.h>

namespace emulator {

static thread_local std::string recent;
static std::mutex any_mutex;
static std::string* any_recent = new std::string;  // the latest of any thread: torch_npu's queue fails in one thread and asks in another

void set_recent_error(const std::string& message) {
  recent = "npu emulator: " + message;
  std::lock_guard<std::mutex> lock(any_mutex);
  *any_recent = recent;
}

std::string recent_error() {
  if (!recent.empty()) return recent;
  std::lock_guard<std::mutex> lock(any_mutex);
  return *any_recent;
}

namespace {

// The few functions of Python's C interface that walk the frames of a thread.
struct Python {
  int (*is_initialized)();
  int (*gil_ensure)();
  void (*gil_release)(int);
  void* (*thread_frame)(void*);
  void* (*thread_state)();
  void* (*frame_code)(void*);
  void* (*frame_back)(void*);
  int (*frame_line)(void*);
  void* (*attribute)(void*, const char*);
  const char* (*utf8)(void*);
  void (*decrease)(void*);
  bool complete = false;

  template <class F>
  bool find(F& function, const char* name) {
    return (function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name))) != nullptr;
  }
  Python() {
    complete = find(is_initialized, "Py_IsInitialized") && find(gil_ensure, "PyGILState_Ensure") && find(gil_release, "PyGILState_Release") &&
               find(thread_frame, "PyThreadState_GetFrame") && find(thread_state, "PyThreadState_Get") && find(frame_code, "PyFrame_GetCode") &&
               find(frame_back, "PyFrame_GetBack") && find(frame_line, "PyFrame_GetLineNumber") && find(attribute, "PyObject_GetAttrString") &&
               find(utf8, "PyUnicode_AsUTF8") && find(decrease, "Py_DecRef");
  }
  std::string text(void* object, const char* name) {
    void* value = attribute(object, name);
    const char* characters = value ? utf8(value) : nullptr;
    std::string result = characters ? characters : "?";
    if (value) decrease(value);
    return result;
  }
};

bool is_library(const std::string& file) {
  for (const char* part : {"/torch/", "/torch_npu/", "<frozen", "<string>"})
    if (file.find(part) != std::string::npos) return true;
  return false;
}

}  // namespace

std::string python_line() {
  static Python python;
  if (!python.complete || !python.is_initialized()) return "no Python in this process";
  int gil = python.gil_ensure();
  std::string found;
  void* frame = python.thread_frame(python.thread_state());
  while (frame) {
    void* code = python.frame_code(frame);
    std::string file = python.text(code, "co_filename");
    if (!is_library(file)) found = file + ":" + std::to_string(python.frame_line(frame)) + " in " + python.text(code, "co_name");
    python.decrease(code);
    void* outer = found.empty() ? python.frame_back(frame) : nullptr;
    python.decrease(frame);
    frame = outer;
  }
  python.gil_release(gil);
  return found.empty() ? "a thread without Python code (autograd's or torch_npu's queue; torch.autograd.set_detect_anomaly(True) and "
                         "ASCEND_LAUNCH_BLOCKING=1 name the line)"
                       : found;
}

}  // namespace emulator
