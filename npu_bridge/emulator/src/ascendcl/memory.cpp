// Device memory is host memory with a limit. Pages are allocated when touched, so a program whose kernels are not executed may hold
// tens of gigabytes.
#include "ascendcl/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "runtime/runtime.h"

namespace emulator {

namespace {

constexpr uint64_t kPage = 4096;

struct Allocation {
  uint64_t size;
  int device;
  bool virtual_range = false;  // reserved addresses; counted when physical memory is mapped
};

// Leaked on purpose: torch frees memory while static objects are being destroyed.
struct Memory {
  std::mutex mutex;
  std::map<const char*, Allocation> device;  // by first address
  std::map<const char*, uint64_t> pinned;    // page-locked host memory
  std::vector<DeviceMemory> totals;
};
Memory& memory() {
  static Memory* m = [] {
    auto* made = new Memory;
    made->totals.assign(settings().devices, {settings().memory, 0, 0});
    return made;
  }();
  return *m;
}

template <class Map>
auto containing(Map& map, const void* address) {
  auto after = map.upper_bound(static_cast<const char*>(address));
  return after == map.begin() ? map.end() : std::prev(after);
}

uint64_t size_of(const Allocation& a) { return a.size; }
uint64_t size_of(uint64_t a) { return a; }

template <class Map>
bool holds(Map& map, const void* address) {
  auto i = containing(map, address);
  return i != map.end() && static_cast<const char*>(address) < i->first + size_of(i->second);
}

int require_device() {
  int device = current_device();
  if (device < 0) throw Refusal(ACL_ERROR_RT_CONTEXT_NULL, "this thread has chosen no device (aclrtSetDevice)");
  return device;
}

// The caller holds the lock.
void take(int device, uint64_t size) {
  DeviceMemory& m = memory().totals[device];
  if (m.used + size > m.limit)
    throw Refusal(ACL_ERROR_RT_MEMORY_ALLOCATION, "device " + std::to_string(device) + " has " + std::to_string(m.limit - m.used) + " of " +
                                                      std::to_string(m.limit) + " bytes left, " + std::to_string(size) +
                                                      " were asked for; the limit is --memory of the launcher");
  m.used += size;
  m.peak = std::max(m.peak, m.used);
}

char* map_pages(uint64_t size, int protection) {
  void* p = mmap(nullptr, size, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Refusal(ACL_ERROR_RT_MEMORY_ALLOCATION, "the host gave no " + std::to_string(size) + " bytes of address space");
  return static_cast<char*>(p);
}

int allocate(const char* function, void** out, size_t size) {
  return guarded(function, [&] {
    int device = require_device();
    uint64_t rounded = std::max<uint64_t>((size + kPage - 1) / kPage * kPage, kPage);
    std::lock_guard<std::mutex> lock(memory().mutex);
    take(device, rounded);
    char* p = map_pages(rounded, PROT_READ | PROT_WRITE);
    memory().device[p] = {rounded, device};
    static Counter counter(Kind::memory, "device");
    counter.add(rounded);
    *out = p;
  });
}

}  // namespace

std::vector<DeviceMemory> memory_of_devices() {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return memory().totals;
}

void reset_memory_peaks() {
  std::lock_guard<std::mutex> lock(memory().mutex);
  for (DeviceMemory& m : memory().totals) m.peak = m.used;
}

bool is_pinned_or_device(const void* address) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return holds(memory().device, address) || holds(memory().pinned, address);
}

void require_live(const void* address, const char* what) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  if (address && !holds(memory().device, address) && !holds(memory().pinned, address))
    throw Refusal(ACL_ERROR_RT_PARAM_INVALID,
                  std::string(what) + " of a captured graph uses memory that was given back since; addresses must stay valid between replays");
}

static bool on_device(const void* address) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  return holds(memory().device, address);
}

// ---- copies ------------------------------------------------------------------------------------------------------------------------

void refuse_in_capture(const char* function);  // graph.cpp

static Counter& copy_counter(const void* to, const void* from) {
  static Counter in(Kind::copy, "host to device"), out(Kind::copy, "device to host"), inside(Kind::copy, "device to device"), host(Kind::copy, "host to host");
  return on_device(to) ? (on_device(from) ? inside : in) : (on_device(from) ? out : host);
}

static void require_room(size_t room, size_t size) {
  if (size > room)
    throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "copy of " + std::to_string(size) + " bytes into " + std::to_string(room));
}

}  // namespace emulator

using namespace emulator;

EMULATED aclError aclrtMalloc(void** p, size_t size, aclrtMemMallocPolicy) { return allocate("aclrtMalloc", p, size); }
EMULATED aclError aclrtMallocAlign32(void** p, size_t size, aclrtMemMallocPolicy) { return allocate("aclrtMallocAlign32", p, size); }

EMULATED aclError aclrtFree(void* p) {
  return guarded("aclrtFree", [&] {
    std::lock_guard<std::mutex> lock(memory().mutex);
    auto i = memory().device.find(static_cast<char*>(p));
    if (i == memory().device.end()) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "not an address that aclrtMalloc gave");
    memory().totals[i->second.device].used -= i->second.size;
    munmap(p, i->second.size);
    memory().device.erase(i);
  });
}

EMULATED aclError aclrtMallocHost(void** p, size_t size) {
  return guarded("aclrtMallocHost", [&] {
    uint64_t rounded = std::max<uint64_t>((size + kPage - 1) / kPage * kPage, kPage);
    std::lock_guard<std::mutex> lock(memory().mutex);
    char* made = map_pages(rounded, PROT_READ | PROT_WRITE);
    memory().pinned[made] = rounded;
    *p = made;
  });
}

EMULATED aclError aclrtFreeHost(void* p) {
  return guarded("aclrtFreeHost", [&] {
    std::lock_guard<std::mutex> lock(memory().mutex);
    auto i = memory().pinned.find(static_cast<char*>(p));
    if (i == memory().pinned.end()) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "not an address that aclrtMallocHost gave");
    munmap(p, i->second);
    memory().pinned.erase(i);
  });
}

EMULATED aclError aclrtHostRegister(void* p, uint64_t size, aclrtHostRegisterType, void** device) {
  return guarded("aclrtHostRegister", [&] {
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().pinned[static_cast<char*>(p)] = size;
    *device = p;
  });
}

EMULATED aclError aclrtHostUnregister(void* p) {
  return guarded("aclrtHostUnregister", [&] {
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().pinned.erase(static_cast<char*>(p));
  });
}

EMULATED aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  return guarded("aclrtGetMemInfo", [&] {
    DeviceMemory m = memory_of_devices()[require_device()];
    *total = m.limit;
    *free = m.limit - m.used;
  });
}

EMULATED aclError aclrtPointerGetAttributes(const void* p, aclrtPtrAttributes* attributes) {
  return guarded("aclrtPointerGetAttributes", [&] {
    std::memset(attributes, 0, sizeof *attributes);
    attributes->pageSize = kPage;
    std::lock_guard<std::mutex> lock(memory().mutex);
    if (holds(memory().device, p)) {
      attributes->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
      attributes->location.id = containing(memory().device, p)->second.device;
    } else {
      attributes->location.type = holds(memory().pinned, p) ? ACL_MEM_LOCATION_TYPE_HOST : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    }
  });
}

EMULATED aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind) {
  return guarded("aclrtMemcpy", [&] {
    require_room(room, size);
    refuse_in_capture("aclrtMemcpy");
    static Counter counter(Kind::synchronisation, "blocking copy");
    counter.add(size);
    copy_counter(to, from).add(size);
    std::memmove(to, from, size);
  });
}

EMULATED aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind, aclrtStream handle) {
  return guarded("aclrtMemcpyAsync", [&] {
    require_room(room, size);
    Stream& stream = stream_of(handle);
    Counter& counter = copy_counter(to, from);
    bool pageable_source = !is_pinned_or_device(from), pageable_target = !is_pinned_or_device(to);
    if (stream.capture && (pageable_source || pageable_target)) {
      refuse_in_capture("aclrtMemcpyAsync with pageable host memory (it would block)");
    }
    counter.add_bytes(size);
    if (pageable_source && size) {  // the device has read pageable memory before the call returns
      std::shared_ptr<char[]> staged(new char[size]);
      std::memcpy(staged.get(), from, size);
      stream.submit({&counter, [=] { std::memcpy(to, staged.get(), size); }, false, {to}});
    } else {
      bool skipped = !settings().execute && on_device(to) && on_device(from);  // a kernel's work in all but name
      stream.submit({&counter, [=] { if (!skipped) std::memmove(to, from, size); }, false, {to, from}});
    }
  });
}

EMULATED aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t size, aclrtMemcpyKind kind, aclrtStream stream) {
  return aclrtMemcpyAsync(to, room, from, size, kind, stream);
}

EMULATED aclError aclrtMemset(void* to, size_t room, int32_t value, size_t size) {
  return guarded("aclrtMemset", [&] {
    require_room(room, size);
    refuse_in_capture("aclrtMemset");
    std::memset(to, value, size);
  });
}

EMULATED aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t size, aclrtStream handle) {
  return guarded("aclrtMemsetAsync", [&] {
    require_room(room, size);
    static Counter counter(Kind::copy, "set");
    counter.add_bytes(size);
    stream_of(handle).submit({&counter, [=] { std::memset(to, value, size); }, false, {to}});
  });
}

// ---- virtual memory: PYTORCH_NPU_ALLOC_CONF=expandable_segments:True ---------------------------------------------------------------

struct Physical {
  uint64_t size;
  int device;
};

EMULATED aclError aclrtReserveMemAddress(void** p, size_t size, size_t, void*, uint64_t) {
  return guarded("aclrtReserveMemAddress", [&] {
    char* made = map_pages(size, PROT_NONE);
    std::lock_guard<std::mutex> lock(memory().mutex);
    memory().device[made] = {size, require_device(), true};
    *p = made;
  });
}

EMULATED aclError aclrtReleaseMemAddress(void* p) {
  return guarded("aclrtReleaseMemAddress", [&] {
    std::lock_guard<std::mutex> lock(memory().mutex);
    auto i = memory().device.find(static_cast<char*>(p));
    if (i == memory().device.end() || !i->second.virtual_range) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "not a reserved range");
    munmap(p, i->second.size);
    memory().device.erase(i);
  });
}

EMULATED aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t size, const aclrtPhysicalMemProp*, uint64_t) {
  return guarded("aclrtMallocPhysical", [&] {
    int device = require_device();
    std::lock_guard<std::mutex> lock(memory().mutex);
    take(device, size);
    *handle = reinterpret_cast<aclrtDrvMemHandle>(new Physical{size, device});
  });
}

EMULATED aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  auto* physical = reinterpret_cast<Physical*>(handle);
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().totals[physical->device].used -= physical->size;
  delete physical;
  return ACL_SUCCESS;
}

static std::map<void*, size_t>& mappings() {
  static auto* all = new std::map<void*, size_t>;
  return *all;
}

EMULATED aclError aclrtMapMem(void* p, size_t size, size_t, aclrtDrvMemHandle, uint64_t) {
  return guarded("aclrtMapMem", [&] {
    if (mprotect(p, size, PROT_READ | PROT_WRITE)) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "the range was not reserved");
    std::lock_guard<std::mutex> lock(memory().mutex);
    mappings()[p] = size;
  });
}

EMULATED aclError aclrtUnmapMem(void* p) {
  return guarded("aclrtUnmapMem", [&] {
    std::lock_guard<std::mutex> lock(memory().mutex);
    auto i = mappings().find(p);
    if (i == mappings().end()) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "nothing is mapped there");
    madvise(p, i->second, MADV_DONTNEED);
    mprotect(p, i->second, PROT_NONE);
    mappings().erase(i);
  });
}
