// Activations and their gradients. The gated ones are written out, in float32, and rounded once.
#include <cmath>

#include "opapi/operator.h"

namespace emulator {

ACLNN(Sigmoid, Tensor self, Out out) { return [=] { out = at::sigmoid(self); }; }
ACLNN(InplaceSigmoid, Tensor self) { return [=] { self.sigmoid_(); }; }
ACLNN(SigmoidBackward, Tensor grad, Tensor result, Out out) { return [=] { out = at::sigmoid_backward(grad, result); }; }
ACLNN(TanhBackward, Tensor grad, Tensor result, Out out) { return [=] { out = at::tanh_backward(grad, result); }; }
ACLNN(Relu, Tensor self, Out out) { return [=] { out = at::relu(self); }; }
ACLNN(InplaceRelu, Tensor self) { return [=] { self.relu_(); }; }
ACLNN(ThresholdBackward, Tensor grad, Tensor self, Scalar threshold, Out out) { return [=] { out = at::threshold_backward(grad, self, threshold); }; }
ACLNN(LeakyRelu, Tensor self, Scalar slope, Out out) { return [=] { out = at::leaky_relu(self, slope); }; }
ACLNN(LeakyReluBackward, Tensor grad, Tensor self, Scalar slope, bool result, Out out) { return [=] { out = at::leaky_relu_backward(grad, self, slope, result); }; }
ACLNN(Softplus, Tensor self, Scalar beta, Scalar threshold, Out out) { return [=] { out = at::softplus(self, beta, threshold); }; }
ACLNN(SoftplusBackward, Tensor grad, Tensor self, Scalar beta, Scalar threshold, Out out) { return [=] { out = at::softplus_backward(grad, self, beta, threshold); }; }
ACLNN(Silu, Tensor self, Out out) { return [=] { out = at::silu(self); }; }
ACLNN(SiluBackward, Tensor grad, Tensor self, Out out) { return [=] { out = at::silu_backward(grad, self); }; }
ACLNN(LogSigmoid, Tensor self, Out out) { return [=] { out = at::log_sigmoid(self); }; }

// ---- gelu ------------------------------------------------------------------------------------------------------------------------------

ACLNN(Gelu, Tensor self, Out out) { return [=] { out = at::gelu(self, "none"); }; }
ACLNN(GeluBackward, Tensor grad, Tensor self, Out out) { return [=] { out = at::gelu_backward(grad, self, "none"); }; }
ACLNN(GeluV2, Tensor self, int64_t approximate, Out out) {
  require(approximate == 0 || approximate == 1, "approximate is ", approximate, "; expected 0 (erf) or 1 (tanh)");
  return [=] { out = at::gelu(self, approximate ? "tanh" : "none"); };
}
ACLNN(GeluBackwardV2, Tensor grad, Tensor self, Text approximate, Out out) {
  require(approximate == "none" || approximate == "tanh", "approximate is \"", approximate, "\"; expected \"none\" or \"tanh\"");
  return [=] { out = at::gelu_backward(grad, self, approximate); };
}

// ---- gated -----------------------------------------------------------------------------------------------------------------------------

static int64_t require_even(const Tensor& x, int64_t dim) {
  require(dim >= -x.dim() && dim < x.dim(), "dimension ", dim, " of x = ", describe(x));
  require(x.size(dim) % 2 == 0, "dimension ", dim, " of x = ", describe(x), " must be even: it holds the gate and the value");
  return dim;
}

// silu(first half) * second half
ACLNN(SwiGlu, Tensor x, int64_t dim, Out out) {
  require_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16});
  require_even(x, dim);
  return [=] {
    auto half = x.to(at::kFloat).chunk(2, dim);
    out = half[0] * at::sigmoid(half[0]) * half[1];
  };
}
ACLNN(SwiGluGrad, Tensor grad, Tensor x, int64_t dim, Out out) {
  require_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16});
  require_same_dtype(grad, "grad", x, "x");
  require_even(x, dim);
  return [=] {
    auto half = x.to(at::kFloat).chunk(2, dim);
    Tensor g = grad.to(at::kFloat), s = at::sigmoid(half[0]);
    out = at::cat({g * half[1] * s * (1 + half[0] * (1 - s)), g * half[0] * s}, dim);
  };
}

}  // namespace emulator
