// The handles of aclnn: what aclCreateTensor and its kin make.
#pragma once

#include "opapi/aten.h"
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <acl/acl_base.h>

#include "runtime/runtime.h"

struct aclTensor {
  std::vector<int64_t> dims, strides;
  int64_t offset;
  aclDataType type;
  aclFormat format;
  char* data;
};
struct aclScalar {
  at::Scalar value;
};
struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclFloatArray {
  std::vector<float> values;
};
struct aclBoolArray {
  std::vector<bool> values;
};
struct aclTensorList {
  std::vector<const aclTensor*> values;
};
struct aclScalarList {
  std::vector<const aclScalar*> values;
};

namespace emulator {

// torch's name of an acl dtype. Throws Refusal for those torch has no CPU kernels for.
at::ScalarType scalar_type(aclDataType type);

// A view of device memory as a CPU tensor. Throws Refusal for private formats (NZ, FRACTAL_Z, ...).
at::Tensor view_of(const aclTensor* tensor);

// "float32[2, 3]", with strides where they are not those of a dense tensor.
std::string describe(const at::Tensor& tensor);
std::string describe_handle(const void* handle);  // of a pointer that may be an aclTensor; empty when it is none

}  // namespace emulator
