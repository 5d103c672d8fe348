// Devices, contexts, and properties of the chip.
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "runtime/runtime.h"

void write_trace();

namespace emulator {

void end_streams();

static thread_local int device_of_thread = -1;
int current_device() { return device_of_thread; }

static int cores() { return settings().soc.rfind("Ascend910B", 0) == 0 || settings().soc.rfind("Ascend910_93", 0) == 0 ? 24 : 32; }

static void require_number(int device) {
  if (device < 0 || device >= settings().devices)
    throw Refusal(ACL_ERROR_RT_INVALID_DEVICEID, "device " + std::to_string(device) + " asked for, this process has " + std::to_string(settings().devices) +
                                                     " (--devices of the launcher); a program of several processes needs a device for each rank of a machine");
}

static void at_end() {
  end_streams();
  write_trace();
}

}  // namespace emulator

using namespace emulator;

EMULATED aclError aclInit(const char*) {
  return guarded("aclInit", [&] {
    settings();
    static std::once_flag once;
    std::call_once(once, [] { std::atexit(at_end); });
  });
}
EMULATED aclError aclFinalize() { return ACL_SUCCESS; }

EMULATED aclError aclrtGetDeviceCount(uint32_t* count) {
  return guarded("aclrtGetDeviceCount", [&] { *count = settings().devices; });
}
EMULATED aclError aclrtSetDevice(int32_t device) {
  return guarded("aclrtSetDevice", [&] {
    require_number(device);
    device_of_thread = device;
  });
}
EMULATED aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }
EMULATED aclError aclrtGetDevice(int32_t* device) {
  if (device_of_thread < 0) return ACL_ERROR_RT_CONTEXT_NULL;  // torch_npu asks to learn whether the thread has one
  *device = device_of_thread;
  return ACL_SUCCESS;
}
// A context is its device's number plus one.
EMULATED aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (device_of_thread < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *context = reinterpret_cast<aclrtContext>(static_cast<intptr_t>(device_of_thread + 1));
  return ACL_SUCCESS;
}
EMULATED aclError aclrtSetCurrentContext(aclrtContext context) {
  return guarded("aclrtSetCurrentContext", [&] {
    int device = static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1;
    require_number(device);
    device_of_thread = device;
  });
}
EMULATED aclError aclrtGetPrimaryCtxState(int32_t, uint32_t* flags, int32_t* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return ACL_SUCCESS;
}

EMULATED const char* aclrtGetSocName() {
  static std::string* name = new std::string;
  return guarded("aclrtGetSocName", [&] { *name = settings().soc; }) == ACL_SUCCESS ? name->c_str() : nullptr;
}
EMULATED const char* aclGetRecentErrMsg() {
  static thread_local std::string message;
  message = recent_error();
  return message.c_str();
}
EMULATED aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
EMULATED aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
EMULATED aclError aclrtGetErrorVerbose(int32_t, aclrtErrorInfo* info) {
  std::memset(info, 0, sizeof *info);
  return ACL_SUCCESS;
}

// The version of CANN whose interface is offered: the one this torch_npu was made for. Attributes of single packages are the same.
EMULATED aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  std::memset(version, 0, sizeof *version);
  std::strcpy(version->version, "9.1.0");
  std::strcpy(version->majorVersion, "9");
  std::strcpy(version->minorVersion, "1");
  std::strcpy(version->releaseVersion, "0");
  return ACL_SUCCESS;
}
EMULATED aclError aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, "9.1.0");
  return ACL_SUCCESS;
}

EMULATED aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo what, int64_t* value) {
  *value = what == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? 2 * cores() : what == ACL_DEVICE_INFO_L2_SIZE ? int64_t{192} << 20 : cores();
  return ACL_SUCCESS;
}
EMULATED aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr what, int64_t* value) {
  *value = what == ACL_DEV_ATTR_VECTOR_CORE_NUM ? 2 * cores() : what == ACL_DEV_ATTR_L2_CACHE_SIZE ? int64_t{192} << 20
           : what == ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE ? static_cast<int64_t>(settings().memory) : cores();
  return ACL_SUCCESS;
}
EMULATED aclError aclGetCannAttribute(aclCannAttr, int32_t* value) {
  *value = 1;
  return ACL_SUCCESS;
}
EMULATED aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  static aclCannAttr none[1];
  *list = none;
  *count = 0;
  return ACL_SUCCESS;
}
EMULATED aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* info) {
  std::memset(info, 0, sizeof *info);
  return ACL_SUCCESS;
}
EMULATED aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}
EMULATED aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t* const logical) {
  *logical = user;
  return ACL_SUCCESS;
}
EMULATED aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}
EMULATED aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }

// Core limits: there is one kind of core, all of it always.
static aclError all_cores(uint32_t* value) {
  *value = cores();
  return ACL_SUCCESS;
}
EMULATED aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType, uint32_t* value) { return all_cores(value); }
EMULATED aclError aclrtGetResInCurrentThread(aclrtDevResLimitType, uint32_t* value) { return all_cores(value); }
EMULATED aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType, uint32_t* value) { return all_cores(value); }
EMULATED aclError aclrtUseStreamResInCurrentThread(aclrtStream) { return ACL_SUCCESS; }
EMULATED aclError aclrtUnuseStreamResInCurrentThread(aclrtStream) { return ACL_SUCCESS; }
