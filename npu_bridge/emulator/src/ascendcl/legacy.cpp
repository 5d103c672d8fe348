// Operators of the graph engine (aclop...): a chip's host compiles each at first use. Nothing here computes them, so a call fails and
// names the operator; returning success would leave a wrong number in the output.
#include <sstream>

#include <acl/acl_op_compiler.h>

#include "runtime/runtime.h"

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> dims;
  std::string name;
};
struct aclDataBuffer {
  void* data;
  size_t size;
};
struct aclopAttr {};

namespace emulator {

static void describe(std::ostream& out, int count, const aclTensorDesc* const* descriptions) {
  for (int i = 0; i < count; i++) {
    out << (i ? ", " : "") << "dtype " << descriptions[i]->type << " [";
    for (size_t d = 0; d < descriptions[i]->dims.size(); d++) out << (d ? ", " : "") << descriptions[i]->dims[d];
    out << "]";
  }
}

int refuse_legacy(const char* type, int inputs, const aclTensorDesc* const* in, int outputs, const aclTensorDesc* const* out) {
  return guarded("aclopCompileAndExecute", [&] {
    std::ostringstream message;
    message << "legacy graph-engine operator " << type << "(";
    describe(message, inputs, in);
    message << ") -> (";
    describe(message, outputs, out);
    message << ") has no emulation, at " << python_line()
            << ". On a device it is compiled when first met and cannot be captured; prefer the aten or npu operator that calls aclnn (docs/emulator.md)";
    std::fprintf(stderr, "npu emulator: %s\n", message.str().c_str());
    throw Refusal(ACL_ERROR_GE_FAILURE, message.str());
  });
}

}  // namespace emulator

EMULATED aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* dims, aclFormat format) {
  return new aclTensorDesc{type, format, std::vector<int64_t>(dims, dims + count), ""};
}
EMULATED void aclDestroyTensorDesc(const aclTensorDesc* d) { delete d; }
EMULATED aclDataType aclGetTensorDescType(const aclTensorDesc* d) { return d->type; }
EMULATED aclFormat aclGetTensorDescFormat(const aclTensorDesc* d) { return d->format; }
EMULATED size_t aclGetTensorDescNumDims(const aclTensorDesc* d) { return d->dims.size(); }
EMULATED aclError aclGetTensorDescDimV2(const aclTensorDesc* d, size_t i, int64_t* size) {
  if (i >= d->dims.size()) return ACL_ERROR_INVALID_PARAM;
  *size = d->dims[i];
  return ACL_SUCCESS;
}
EMULATED void aclSetTensorDescName(aclTensorDesc* d, const char* name) { d->name = name; }
EMULATED aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return ACL_SUCCESS; }
EMULATED aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }
EMULATED aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }
EMULATED aclDataBuffer* aclCreateDataBuffer(void* data, size_t size) { return new aclDataBuffer{data, size}; }
EMULATED aclError aclDestroyDataBuffer(const aclDataBuffer* b) {
  delete b;
  return ACL_SUCCESS;
}

EMULATED aclopAttr* aclopCreateAttr() { return new aclopAttr; }
EMULATED void aclopDestroyAttr(const aclopAttr* a) { delete a; }
#define ATTRIBUTE(NAME, ...) \
  EMULATED aclError aclopSetAttr##NAME(aclopAttr*, const char*, __VA_ARGS__) { return ACL_SUCCESS; }
ATTRIBUTE(Bool, uint8_t)
ATTRIBUTE(Int, int64_t)
ATTRIBUTE(Float, float)
ATTRIBUTE(String, const char*)
ATTRIBUTE(DataType, aclDataType)
ATTRIBUTE(ListBool, int, const uint8_t*)
ATTRIBUTE(ListInt, int, const int64_t*)
ATTRIBUTE(ListFloat, int, const float*)
ATTRIBUTE(ListListInt, int, const int*, const int64_t* const*)

EMULATED aclError aclopCompileAndExecute(const char* type, int inputs, const aclTensorDesc* const in[], const aclDataBuffer* const[], int outputs,
                                         const aclTensorDesc* const out[], aclDataBuffer* const[], const aclopAttr*, aclopEngineType, aclopCompileType,
                                         const char*, aclrtStream) {
  return emulator::refuse_legacy(type, inputs, in, outputs, out);
}
