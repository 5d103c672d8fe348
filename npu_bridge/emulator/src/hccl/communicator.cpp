// Making, naming and ending communicators.
#include "hccl/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>

namespace emulator {

static std::mutex names_mutex;
static std::map<std::string, Communicator*>& names() {
  static auto* all = new std::map<std::string, Communicator*>;
  return *all;
}

Communicator& communicator(const std::string& name) {
  std::lock_guard<std::mutex> lock(names_mutex);
  auto i = names().find(name);
  if (i == names().end()) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "no communicator is named \"" + name + "\" in this process");
  return *i->second;
}

// Two ranks on one chip is what the real library refuses as well.
static void require_devices_apart(Communicator& c) {
  struct Place {
    char host[64];
    int device;
  } mine{};
  gethostname(mine.host, sizeof mine.host - 1);
  mine.device = current_device();
  std::vector<Place> all(c.size());
  c.transport->share(reinterpret_cast<char*>(&mine), sizeof mine, "introducing devices",
                     [&](uint32_t q, uint64_t offset, const char* piece, uint64_t n) { std::memcpy(reinterpret_cast<char*>(&all[q]) + offset, piece, n); });
  for (uint32_t p = 0; p < c.size(); p++)
    for (uint32_t q = 0; q < p; q++)
      if (!std::strcmp(all[p].host, all[q].host) && all[p].device == all[q].device)
        throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "ranks " + std::to_string(q) + " and " + std::to_string(p) + " both use device " + std::to_string(all[p].device) +
                                                      "; each rank calls torch.npu.set_device(local rank), and --devices gives as many as there are ranks");
}

// The buffers of the real library: two of HCCL_BUFFSIZE MiB, taken from the device's memory. Nothing is ever written there.
static void take_buffers(Communicator& c, uint32_t megabytes) {
  if (megabytes == 0 || megabytes == HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET) {
    const char* setting = std::getenv("HCCL_BUFFSIZE");
    megabytes = setting ? static_cast<uint32_t>(std::atoi(setting)) : HCCL_COMM_DEFAULT_BUFFSIZE;
  }
  for (int i = 0; i < 2; i++) {
    void* buffer = nullptr;
    if (aclrtMalloc(&buffer, static_cast<size_t>(megabytes) << 20, ACL_MEM_MALLOC_HUGE_FIRST))
      throw Refusal(ACL_ERROR_RT_MEMORY_ALLOCATION, "no device memory for the buffers of a communicator (2 x " + std::to_string(megabytes) + " MiB; HCCL_BUFFSIZE sets it): " + recent_error());
    c.buffers.push_back(buffer);
  }
}

static HcclComm make(const std::string& root, uint32_t rank, uint32_t size, const HcclCommConfig* config) {
  if (rank >= size) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "rank " + std::to_string(rank) + " of " + std::to_string(size));
  auto c = std::make_unique<Communicator>();
  c->root = root;
  c->name = config && config->hcclCommName[0] ? config->hcclCommName : root;
  c->name.resize(std::min<size_t>(c->name.size(), COMM_NAME_MAX_LENGTH - 1));
  c->transport = connect(root, rank, size);
  require_devices_apart(*c);
  take_buffers(*c, config ? config->hcclBufferSize : 0);
  std::lock_guard<std::mutex> lock(names_mutex);
  names()[c->name] = c.get();
  return c.release();
}

static Communicator& of(HcclComm handle) {
  if (!handle) throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "null communicator");
  return *static_cast<Communicator*>(handle);
}

// HCCL's codes for what went wrong.
template <class Body>
static HcclResult answered(const char* function, Body&& body) {
  switch (guarded(function, body)) {
    case ACL_SUCCESS: return HCCL_SUCCESS;
    case ACL_ERROR_RT_WAIT_TIMEOUT: return HCCL_E_TIMEOUT;
    case ACL_ERROR_RT_MEMORY_ALLOCATION: return HCCL_E_OOM;
    case ACL_ERROR_RT_PARAM_INVALID: return HCCL_E_PARA;
    case ACL_ERROR_RT_FEATURE_NOT_SUPPORT: return HCCL_E_NOT_SUPPORT;
    case ACL_ERROR_RT_SUSPECT_REMOTE_ERROR: return HCCL_E_REMOTE;
    default: return HCCL_E_INTERNAL;
  }
}

}  // namespace emulator

using namespace emulator;

EMULATED HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  return answered("HcclGetRootInfo", [&] {
    std::memset(info, 0, sizeof *info);
    std::strncpy(info->internal, make_root().c_str(), sizeof info->internal - 1);
  });
}
EMULATED HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* info, uint32_t rank, const HcclCommConfig* config, HcclComm* made) {
  return answered("HcclCommInitRootInfoConfig", [&] { *made = make(info->internal, rank, size, config); });
}
EMULATED HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* info, uint32_t rank, HcclComm* made) {
  return HcclCommInitRootInfoConfig(size, info, rank, nullptr, made);
}
EMULATED HcclResult HcclCommInitClusterInfoConfig(const char*, uint32_t, HcclCommConfig*, HcclComm*) {
  return answered("HcclCommInitClusterInfoConfig", [] { throw Refusal(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "rank tables have no emulation; unset RANK_TABLE_FILE"); });
}

// The first of the ranks makes a root and sends it to the others over the parent.
EMULATED HcclResult HcclCreateSubCommConfig(HcclComm* parent, uint32_t count, uint32_t* ranks, uint64_t, uint32_t place, HcclCommConfig* config, HcclComm* made) {
  return answered("HcclCreateSubCommConfig", [&] {
    Communicator& whole = of(*parent);
    *made = nullptr;
    if (!ranks || !count) return;  // this rank is not in the group
    HcclRootInfo info{};
    std::vector<Message> messages;
    if (place == 0) {
      std::strncpy(info.internal, make_root().c_str(), sizeof info.internal - 1);
      for (uint32_t i = 1; i < count; i++) messages.push_back({true, ranks[i], info.internal, 512});
    } else {
      messages.push_back({false, ranks[0], info.internal, 512});
    }
    whole.transport->move(messages, "making a subgroup");
    *made = make(info.internal, place, count, config);
  });
}

EMULATED HcclResult HcclCommDestroy(HcclComm handle) {
  return answered("HcclCommDestroy", [&] {
    Communicator& c = of(handle);
    {
      std::lock_guard<std::mutex> lock(names_mutex);
      names().erase(c.name);
    }
    for (void* buffer : c.buffers) aclrtFree(buffer);
    c.buffers.clear();  // the object itself stays: a stream that is late may still hold it
  });
}

EMULATED uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }
EMULATED HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }
EMULATED HcclResult HcclGetConfig(HcclConfig, HcclConfigValue* value) {
  value->value = 1;
  return HCCL_SUCCESS;
}
EMULATED HcclResult HcclGetCommName(HcclComm handle, char* name) {
  return answered("HcclGetCommName", [&] { std::strncpy(name, of(handle).name.c_str(), COMM_NAME_MAX_LENGTH); });
}
EMULATED HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult* error) {
  return answered("HcclGetCommAsyncError", [&] { *error = of(handle).failed ? HCCL_E_REMOTE : HCCL_SUCCESS; });
}
EMULATED const char* HcclGetErrorString(HcclResult) {
  static thread_local std::string text;
  text = recent_error();
  return text.c_str();
}
EMULATED HcclResult HcclGetRankSize(HcclComm handle, uint32_t* size) {
  return answered("HcclGetRankSize", [&] { *size = of(handle).size(); });
}
EMULATED HcclResult HcclGetRankId(HcclComm handle, uint32_t* rank) {
  return answered("HcclGetRankId", [&] { *rank = of(handle).rank(); });
}
