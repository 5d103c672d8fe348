// Arithmetic element by element: binary, unary, comparison, activation, cast and fill.
#include "opapi/operator.h"

namespace emulator {

ACLNN(Add, Tensor self, Tensor other, Scalar alpha, Out out) { return [=] { out = at::add(self, other, alpha); }; }
ACLNN(InplaceAdd, Tensor self, Tensor other, Scalar alpha) { return [=] { self.add_(other, alpha); }; }
ACLNN(Mul, Tensor self, Tensor other, Out out) { return [=] { out = at::mul(self, other); }; }

}  // namespace emulator
