// Matrix products and convolutions. `cube_math_type` (HF32 and the like) chooses a rounding of the chip and changes nothing here.
#include "opapi/operator.h"

namespace emulator {

static void require_chain(const Tensor& a, const Tensor& b) {
  require(a.dim() >= 1 && b.dim() >= 1 && a.size(-1) == b.size(b.dim() > 1 ? -2 : 0), "self = ", describe(a), " and mat2 = ", describe(b), " do not chain");
  require_same_dtype(a, "self", b, "mat2");
}

ACLNN(Mm, Tensor self, Tensor mat2, Out out, int8_t cube_math_type) {
  require_chain(self, mat2);
  return [=] { out = at::mm(self, mat2); };
}
ACLNN(Matmul, Tensor self, Tensor mat2, Out out, int8_t cube_math_type) {
  require_chain(self, mat2);
  return [=] { out = at::matmul(self, mat2); };
}
ACLNN(BatchMatMul, Tensor self, Tensor mat2, Out out, int8_t cube_math_type) {
  require_chain(self, mat2);
  return [=] { out = at::bmm(self, mat2); };
}
ACLNN(Addmm, Tensor self, Tensor mat1, Tensor mat2, Scalar beta, Scalar alpha, Out out, int8_t cube_math_type) {
  require_chain(mat1, mat2);
  return [=] { out = at::addmm(self, mat1, mat2, beta, alpha); };
}
ACLNN(InplaceAddmm, Tensor self, Tensor mat1, Tensor mat2, Scalar beta, Scalar alpha, int8_t cube_math_type) {
  require_chain(mat1, mat2);
  return [=] { self.addmm_(mat1, mat2, beta, alpha); };
}
ACLNN(Baddbmm, Tensor self, Tensor batch1, Tensor batch2, Scalar beta, Scalar alpha, Out out, int8_t cube_math_type) {
  require_chain(batch1, batch2);
  return [=] { out = at::baddbmm(self, batch1, batch2, beta, alpha); };
}
ACLNN(Addbmm, Tensor self, Tensor batch1, Tensor batch2, Scalar beta, Scalar alpha, Out out, int8_t cube_math_type) {
  require_chain(batch1, batch2);
  return [=] { out = at::addbmm(self, batch1, batch2, beta, alpha); };
}
ACLNN(Addmv, Tensor self, Tensor mat, Tensor vec, Scalar alpha, Scalar beta, Out out, int8_t cube_math_type) {
  return [=] { out = at::addmv(self, mat, vec, beta, alpha); };
}
ACLNN(Mv, Tensor self, Tensor vec, Out out, int8_t cube_math_type) { return [=] { out = at::mv(self, vec); }; }
ACLNN(Dot, Tensor self, Tensor tensor, Out out) { return [=] { out = at::dot(self, tensor); }; }

// ---- convolutions ----------------------------------------------------------------------------------------------------------------------

ACLNN(Convolution, Tensor input, Tensor weight, Tensor bias, Ints stride, Ints padding, Ints dilation, bool transposed, Ints output_padding, int64_t groups,
      Out out, int8_t cube_math_type) {
  require_same_dtype(input, "input", weight, "weight");
  return [=] { out = at::convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups); };
}
ACLNN(ConvolutionBackward, Tensor grad, Tensor input, Tensor weight, Ints bias_sizes, Ints stride, Ints padding, Ints dilation, bool transposed,
      Ints output_padding, int64_t groups, Bools wanted, int8_t cube_math_type, Out grad_input, Out grad_weight, Out grad_bias) {
  require(wanted.size() == 3, "output mask of ", wanted.size(), " entries; expected 3");
  return [=] {
    auto [gi, gw, gb] = at::convolution_backward(grad, input, weight, bias_sizes.optional(), stride, padding, dilation, transposed, output_padding, groups,
                                                 {wanted[0], wanted[1], wanted[2]});
    if (wanted[0]) grad_input = gi;
    if (wanted[1]) grad_weight = gw;
    if (wanted[2]) grad_bias = gb;
  };
}

}  // namespace emulator
