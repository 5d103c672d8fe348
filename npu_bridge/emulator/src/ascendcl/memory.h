#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

struct DeviceMemory {
  uint64_t limit, used, peak;  // bytes asked from the device: with torch_npu that is what its caching allocator reserves
};

std::vector<DeviceMemory> memory_of_devices();
void reset_memory_peaks();

}  // namespace emulator
