// Rotary position embedding. Mode 0 turns the halves of a head, mode 1 its neighbours.
#include "opapi/operator.h"

namespace emulator {

static Tensor turn(const Tensor& x, int64_t mode) {
  if (mode == 0) {
    auto half = x.chunk(2, -1);
    return at::cat({-half[1], half[0]}, -1);
  }
  Tensor even = x.slice(-1, 0, x.size(-1), 2), odd = x.slice(-1, 1, x.size(-1), 2);
  return at::stack({-odd, even}, -1).flatten(-2);
}

// Tables broadcast over dimensions of size one, and nothing else.
static void require_tables(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode) {
  require(mode == 0 || mode == 1, "rotary mode ", mode, " has no emulation; 0 (half) and 1 (interleave) have");
  require_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16});
  require_same_dtype(x, "x", cos, "cos");
  require_same_dtype(x, "x", sin, "sin");
  require_shape(sin, "sin", cos.sizes());
  require(x.dim() == 4 && cos.dim() == 4, "x = ", describe(x), " and cos = ", describe(cos), "; both have 4 dimensions");
  require(x.size(3) % 2 == 0 && cos.size(3) == x.size(3), "x = ", describe(x), " and cos = ", describe(cos), "; the last dimension is even and the same");
  for (int d = 0; d < 3; d++)
    require(cos.size(d) == 1 || cos.size(d) == x.size(d), "dimension ", d, " of cos = ", describe(cos), " is neither 1 nor that of x = ", describe(x));
}

static Work rotary(Tensor x, Tensor cos, Tensor sin, int64_t mode, Out out) {
  require_tables(x, cos, sin, mode);
  return [=] {
    Tensor wide = x.to(at::kFloat);
    out = wide * cos.to(at::kFloat) + turn(wide, mode) * sin.to(at::kFloat);
  };
}
ACLNN(RotaryPositionEmbedding, Tensor x, Tensor cos, Tensor sin, int64_t mode, Out out) { return rotary(x, cos, sin, mode, out); }
ACLNN(RotaryPositionEmbeddingV2, Tensor x, Tensor cos, Tensor sin, int64_t mode, Tensor rotate, Out out) {
  require_absent(rotate, "rotate");
  return rotary(x, cos, sin, mode, out);
}
// The transpose of turn is -turn. x may be missing: then the tables get no gradient.
ACLNN(RotaryPositionEmbeddingGrad, Tensor grad, Tensor cos, Tensor sin, Tensor x, int64_t mode, Out grad_x, Out grad_cos, Out grad_sin) {
  require_tables(grad, cos, sin, mode);
  return [=] {
    Tensor g = grad.to(at::kFloat);
    grad_x = g * cos.to(at::kFloat) - turn(g * sin.to(at::kFloat), mode);
    if (!x.defined()) return;
    Tensor wide = x.to(at::kFloat);
    grad_cos = (g * wide).sum_to_size(grad_cos->sizes());
    grad_sin = (g * turn(wide, mode)).sum_to_size(grad_sin->sizes());
  };
}

}  // namespace emulator
