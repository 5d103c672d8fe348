// Settings and reports that change nothing here: hints, time-outs, profiling, dumps, kernels of one's own. Calls that would have to
// compute something are not in this list; they refuse.
#include <unistd.h>

#include "runtime/runtime.h"

EMULATED aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
EMULATED aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
EMULATED aclError aclrtSetOpExecuteTimeOutV2(uint64_t asked, uint64_t* given) {
  if (given) *given = asked;
  return ACL_SUCCESS;
}
EMULATED aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
EMULATED aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
EMULATED aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }
EMULATED aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
  *flag = 0;
  return ACL_SUCCESS;
}
EMULATED aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) { return ACL_SUCCESS; }
EMULATED aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
EMULATED aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
EMULATED aclError aclrtProcessReport(int32_t) {
  usleep(1000);
  return ACL_SUCCESS;
}
EMULATED aclError aclrtCmoAsync(void*, size_t, aclrtCmoType, aclrtStream) { return ACL_SUCCESS; }

// Functions that torch_npu links against, with their arguments left unread.
#define ACCEPTED(NAME) \
  EMULATED long NAME() { return 0; }

ACCEPTED(MsprofGetHashId)
ACCEPTED(MsprofRegisterCallback)
ACCEPTED(MsprofReportAdditionalInfo)
ACCEPTED(MsprofReportApi)
ACCEPTED(MsprofReportCompactInfo)
ACCEPTED(MsprofSysCycleTime)
EMULATED void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}
EMULATED aclError aclmdlInitDump() { return ACL_SUCCESS; }
EMULATED aclError aclmdlSetDump(const char*) { return ACL_SUCCESS; }
EMULATED aclError aclmdlFinalizeDump() { return ACL_SUCCESS; }

// Kernels compiled for AI cores, and memory shared between processes by handle: nothing here can run or map them.
#define REFUSED(NAME)                                                                                                       \
  EMULATED int NAME() {                                                                                                     \
    return emulator::guarded(#NAME, [] {                                                                                    \
      throw emulator::Refusal(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "compiled device code and shared handles have no emulation"); \
    });                                                                                                                     \
  }

REFUSED(rtDevBinaryRegister)
REFUSED(rtFunctionRegister)
REFUSED(rtGetC2cCtrlAddr)
REFUSED(rtKernelLaunch)
#undef REFUSED
#define REFUSED(NAME, ...)                                                                                                  \
  EMULATED aclError NAME(__VA_ARGS__) {                                                                                     \
    return emulator::guarded(#NAME, [] {                                                                                    \
      throw emulator::Refusal(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "compiled device code and shared handles have no emulation"); \
    });                                                                                                                     \
  }
REFUSED(aclrtBinaryGetFunction, const aclrtBinHandle, const char*, aclrtFuncHandle*)
REFUSED(aclrtBinaryLoadFromData, const void*, size_t, const aclrtBinaryLoadOptions*, aclrtBinHandle*)
REFUSED(aclrtGetFunctionAddr, aclrtFuncHandle, void**, void**)
REFUSED(aclrtMemExportToShareableHandle, aclrtDrvMemHandle, aclrtMemHandleType, uint64_t, uint64_t*)
REFUSED(aclrtMemImportFromShareableHandle, uint64_t, int32_t, aclrtDrvMemHandle*)
REFUSED(aclrtMemSetPidToShareableHandle, uint64_t, int32_t*, size_t)
