#include "runtime/runtime.h"

#include <cstdlib>

namespace emulator {

static std::string variable(const char* name) {
  const char* value = std::getenv((std::string("NPU_EMULATOR_") + name).c_str());
  if (!value)
    throw Refusal(ACL_ERROR_RT_NO_DEVICE,
                  std::string("the emulator's libraries were loaded, but NPU_EMULATOR_") + name +
                      " is not set: this process was started without the launcher's environment. Start it with `python -m npu_bridge.emulator -- "
                      "python ...`, or hand the whole environment to child processes");
  return value;
}

static Settings read() {
  Settings s;
  s.devices = std::stoi(variable("DEVICES"));
  s.soc = variable("SOC");
  s.memory = std::stoull(variable("MEMORY"));
  s.execute = variable("EXECUTE") == "1";
  s.asynchronous = variable("ASYNCHRONOUS") == "1";
  s.delay = std::stod(variable("DELAY"));
  s.trace = variable("TRACE");
  s.timeout = std::stod(variable("TIMEOUT"));
  return s;
}

const Settings& settings() {
  static const Settings* all = new Settings(read());  // never destroyed: worker threads outlive static objects
  return *all;
}

}  // namespace emulator
