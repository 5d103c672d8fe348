// libacl_op_compiler: options and system parameters are kept and read back; there is no compiler.
#include <cstring>
#include <map>

#include "runtime/runtime.h"

namespace emulator {
int refuse_legacy(const char* type, int inputs, const aclTensorDesc* const* in, int outputs, const aclTensorDesc* const* out);
}

static std::map<int, std::string>& options() {
  static auto* all = new std::map<int, std::string>;
  return *all;
}
static std::map<int, int64_t>& parameters() {
  static auto* all = new std::map<int, int64_t>;
  return *all;
}

EMULATED int aclSetCompileopt(int option, const char* value) {
  options()[option] = value;
  return ACL_SUCCESS;
}
EMULATED size_t aclGetCompileoptSize(int option) { return options()[option].size() + 1; }
EMULATED int aclGetCompileopt(int option, char* value, size_t size) {
  std::strncpy(value, options()[option].c_str(), size);
  return ACL_SUCCESS;
}
EMULATED int aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  parameters()[option] = value;
  return ACL_SUCCESS;
}
EMULATED int aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
EMULATED int aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  auto i = parameters().find(option);
  *value = i == parameters().end() ? 0 : i->second;
  return ACL_SUCCESS;
}
EMULATED int aclopCompileAndExecuteV2(const char* type, int inputs, aclTensorDesc* in[], aclDataBuffer*[], int outputs, aclTensorDesc* out[],
                                      aclDataBuffer*[], aclopAttr*, int, int, const char*, void*) {
  return emulator::refuse_legacy(type, inputs, in, outputs, out);
}
