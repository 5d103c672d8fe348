#include "runtime/runtime.h"

#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

#include "ascendcl/memory.h"

namespace emulator {

static std::mutex list_mutex;
static Counter* first = nullptr;

Counter::Counter(Kind kind, std::string name) : kind(kind), name(std::move(name)) {
  std::lock_guard<std::mutex> lock(list_mutex);
  next = first;
  first = this;
}

static const std::pair<Kind, const char*> kinds[] = {{Kind::kernel, "kernels"},
                                                     {Kind::copy, "copies"},
                                                     {Kind::synchronisation, "synchronisations"},
                                                     {Kind::collective, "collectives"},
                                                     {Kind::graph, "graphs"},
                                                     {Kind::memory, "allocations"}};

std::string counters_as_json() {
  std::ostringstream out;
  out << "{";
  for (auto [kind, label] : kinds) {
    std::map<std::string, Counter*> used;
    {
      std::lock_guard<std::mutex> lock(list_mutex);
      for (Counter* c = first; c; c = c->next)
        if (c->kind == kind && (c->calls || c->replayed)) used[c->name] = c;
    }
    out << "\"" << label << "\": {";
    const char* separator = "";
    for (auto& [name, c] : used) {
      out << separator << "\"" << name << "\": {\"calls\": " << c->calls << ", \"captured\": " << c->captured << ", \"replayed\": " << c->replayed
          << ", \"bytes\": " << c->bytes << ", \"host_us\": " << c->host_nanoseconds / 1000.0 << ", \"compute_us\": " << c->compute_nanoseconds / 1000.0 << "}";
      separator = ", ";
    }
    out << "}, ";
  }
  out << "\"memory\": [";
  const char* separator = "";
  for (const DeviceMemory& m : memory_of_devices()) {
    out << separator << "{\"limit\": " << m.limit << ", \"used\": " << m.used << ", \"peak\": " << m.peak << "}";
    separator = ", ";
  }
  out << "]}";
  return out.str();
}

void reset_counters() {
  std::lock_guard<std::mutex> lock(list_mutex);
  for (Counter* c = first; c; c = c->next)
    for (auto* value : {&c->calls, &c->captured, &c->replayed, &c->bytes, &c->host_nanoseconds, &c->compute_nanoseconds}) *value = 0;
  reset_memory_peaks();
}

}  // namespace emulator

// Copies the counters into a buffer of `size` bytes and returns the bytes needed, for Python (ctypes).
EMULATED uint64_t npu_emulator_counters(char* buffer, uint64_t size) {
  std::string text = emulator::counters_as_json();
  if (buffer && text.size() < size) text.copy(buffer, text.size()), buffer[text.size()] = 0;
  return text.size() + 1;
}

EMULATED void npu_emulator_reset_counters() { emulator::reset_counters(); }

// Called at the end of a process that used a device.
void write_trace() {
  const std::string& path = emulator::settings().trace;
  if (path.empty()) return;
  const char *rank = std::getenv("RANK"), *world = std::getenv("WORLD_SIZE");
  std::ofstream(rank && world && std::string(world) != "1" ? path + ".rank" + rank : path) << emulator::counters_as_json() << "\n";
}
