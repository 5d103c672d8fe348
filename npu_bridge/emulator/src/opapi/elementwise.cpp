// Arithmetic element by element: with a tensor or a scalar, into an output or in place; comparison, logic, rounding, casts and fills.
#include "opapi/operator.h"

namespace emulator {

// ---- two operands, scaled ------------------------------------------------------------------------------------------------------------

ACLNN(Add, Tensor self, Tensor other, Scalar alpha, Out out) { return [=] { out = at::add(self, other, alpha); }; }
ACLNN(Adds, Tensor self, Scalar other, Scalar alpha, Out out) { return [=] { out = at::add(self, other, alpha); }; }
ACLNN(InplaceAdd, Tensor self, Tensor other, Scalar alpha) { return [=] { self.add_(other, alpha); }; }
ACLNN(InplaceAdds, Tensor self, Scalar other, Scalar alpha) { return [=] { self.add_(other, alpha); }; }
ACLNN(AddV3, Scalar self, Tensor other, Scalar alpha, Out out) { return [=] { out = at::add(at::scalar_tensor(self, other.scalar_type()), other, alpha); }; }
ACLNN(Sub, Tensor self, Tensor other, Scalar alpha, Out out) { return [=] { out = at::sub(self, other, alpha); }; }
ACLNN(Subs, Tensor self, Scalar other, Scalar alpha, Out out) { return [=] { out = at::sub(self, other, alpha); }; }
ACLNN(InplaceSub, Tensor self, Tensor other, Scalar alpha) { return [=] { self.sub_(other, alpha); }; }
ACLNN(InplaceSubs, Tensor self, Scalar other, Scalar alpha) { return [=] { self.sub_(other, alpha); }; }
ACLNN(Rsub, Tensor self, Tensor other, Scalar alpha, Out out) { return [=] { out = at::rsub(self, other, alpha); }; }
ACLNN(Rsubs, Tensor self, Scalar other, Scalar alpha, Out out) { return [=] { out = at::rsub(self, other, alpha); }; }

// ---- two operands ----------------------------------------------------------------------------------------------------------------------

// NAME on tensors, NAMEs with a scalar, and both in place.
#define BINARY(NAME, FUNCTION)                                                                            \
  ACLNN(NAME, Tensor self, Tensor other, Out out) { return [=] { out = at::FUNCTION(self, other); }; }    \
  ACLNN(NAME##s, Tensor self, Scalar other, Out out) { return [=] { out = at::FUNCTION(self, other); }; } \
  ACLNN(Inplace##NAME, Tensor self, Tensor other) { return [=] { self.FUNCTION##_(other); }; }            \
  ACLNN(Inplace##NAME##s, Tensor self, Scalar other) { return [=] { self.FUNCTION##_(other); }; }
BINARY(Mul, mul)
BINARY(Div, div)
BINARY(FloorDivide, floor_divide)

// mode 0: true quotient, 1: rounded to zero, 2: rounded down
static std::optional<std::string_view> rounding(int mode) {
  require(mode >= 0 && mode <= 2, "rounding mode ", mode, "; expected 0, 1 or 2");
  return mode == 0 ? std::nullopt : std::optional<std::string_view>(mode == 1 ? "trunc" : "floor");
}
ACLNN(DivMod, Tensor self, Tensor other, int mode, Out out) {
  auto how = rounding(mode);
  return [=] { out = at::div(self, other, how); };
}
ACLNN(DivMods, Tensor self, Scalar other, int mode, Out out) {
  auto how = rounding(mode);
  return [=] { out = at::div(self, other, how); };
}
ACLNN(InplaceDivMod, Tensor self, Tensor other, int mode) {
  auto how = rounding(mode);
  return [=] { self.div_(other, how); };
}
ACLNN(InplaceDivMods, Tensor self, Scalar other, int mode) {
  auto how = rounding(mode);
  return [=] { self.div_(other, how); };
}

ACLNN(RemainderTensorTensor, Tensor self, Tensor other, Out out) { return [=] { out = at::remainder(self, other); }; }
ACLNN(RemainderTensorScalar, Tensor self, Scalar other, Out out) { return [=] { out = at::remainder(self, other); }; }
ACLNN(RemainderScalarTensor, Scalar self, Tensor other, Out out) { return [=] { out = at::remainder(self, other); }; }
ACLNN(InplaceRemainderTensorTensor, Tensor self, Tensor other) { return [=] { self.remainder_(other); }; }
ACLNN(InplaceRemainderTensorScalar, Tensor self, Scalar other) { return [=] { self.remainder_(other); }; }
ACLNN(FmodTensor, Tensor self, Tensor other, Out out) { return [=] { out = at::fmod(self, other); }; }
ACLNN(FmodScalar, Tensor self, Scalar other, Out out) { return [=] { out = at::fmod(self, other); }; }
ACLNN(Maximum, Tensor self, Tensor other, Out out) { return [=] { out = at::maximum(self, other); }; }
ACLNN(Minimum, Tensor self, Tensor other, Out out) { return [=] { out = at::minimum(self, other); }; }
ACLNN(Atan2, Tensor self, Tensor other, Out out) { return [=] { out = at::atan2(self, other); }; }

ACLNN(PowTensorScalar, Tensor self, Scalar exponent, Out out) { return [=] { out = at::pow(self, exponent); }; }
ACLNN(PowTensorTensor, Tensor self, Tensor exponent, Out out) { return [=] { out = at::pow(self, exponent); }; }
ACLNN(PowScalarTensor, Scalar self, Tensor exponent, Out out) { return [=] { out = at::pow(self, exponent); }; }
ACLNN(InplacePowTensorScalar, Tensor self, Scalar exponent) { return [=] { self.pow_(exponent); }; }
ACLNN(InplacePowTensorTensor, Tensor self, Tensor exponent) { return [=] { self.pow_(exponent); }; }

ACLNN(Addcmul, Tensor self, Tensor a, Tensor b, Scalar value, Out out) { return [=] { out = at::addcmul(self, a, b, value); }; }
ACLNN(Addcdiv, Tensor self, Tensor a, Tensor b, Scalar value, Out out) { return [=] { out = at::addcdiv(self, a, b, value); }; }
ACLNN(InplaceAddcmul, Tensor self, Tensor a, Tensor b, Scalar value) { return [=] { self.addcmul_(a, b, value); }; }
ACLNN(InplaceAddcdiv, Tensor self, Tensor a, Tensor b, Scalar value) { return [=] { self.addcdiv_(a, b, value); }; }
ACLNN(Lerp, Tensor self, Tensor end, Tensor weight, Out out) { return [=] { out = at::lerp(self, end, weight); }; }
ACLNN(Lerps, Tensor self, Tensor end, Scalar weight, Out out) { return [=] { out = at::lerp(self, end, weight); }; }
ACLNN(InplaceLerp, Tensor self, Tensor end, Tensor weight) { return [=] { self.lerp_(end, weight); }; }
ACLNN(InplaceLerps, Tensor self, Tensor end, Scalar weight) { return [=] { self.lerp_(end, weight); }; }

// ---- one operand -----------------------------------------------------------------------------------------------------------------------

#define UNARY(NAME, FUNCTION)                                                       \
  ACLNN(NAME, Tensor self, Out out) { return [=] { out = at::FUNCTION(self); }; }  \
  ACLNN(Inplace##NAME, Tensor self) { return [=] { self.copy_(at::FUNCTION(self)); }; }
UNARY(Abs, abs)
UNARY(Acos, acos)
UNARY(Asin, asin)
UNARY(Atan, atan)
UNARY(BitwiseNot, bitwise_not)
UNARY(Ceil, ceil)
UNARY(Cos, cos)
UNARY(Cosh, cosh)
UNARY(Erf, erf)
UNARY(Erfc, erfc)
UNARY(Erfinv, erfinv)
UNARY(Exp, exp)
UNARY(Exp2, exp2)
UNARY(Expm1, expm1)
UNARY(Floor, floor)
UNARY(Frac, frac)
UNARY(IsFinite, isfinite)
UNARY(Log, log)
UNARY(Log1p, log1p)
UNARY(Log2, log2)
UNARY(Log10, log10)
UNARY(LogicalNot, logical_not)
UNARY(Neg, neg)
UNARY(Reciprocal, reciprocal)
UNARY(Round, round)
UNARY(Rsqrt, rsqrt)
UNARY(Sin, sin)
UNARY(Sinh, sinh)
UNARY(Sqrt, sqrt)
UNARY(Tan, tan)
UNARY(Tanh, tanh)
UNARY(Trunc, trunc)
ACLNN(Sign, Tensor self, Out out) { return [=] { out = at::sign(self); }; }
ACLNN(Signbit, Tensor self, Out out) { return [=] { out = at::signbit(self); }; }
ACLNN(IsNegInf, Tensor self, Out out) { return [=] { out = at::isneginf(self); }; }
ACLNN(IsPosInf, Tensor self, Out out) { return [=] { out = at::isposinf(self); }; }
ACLNN(NanToNum, Tensor self, float nan, float positive, float negative, Out out) { return [=] { out = at::nan_to_num(self, nan, positive, negative); }; }
ACLNN(InplaceNanToNum, Tensor self, float nan, float positive, float negative) { return [=] { self.nan_to_num_(nan, positive, negative); }; }

ACLNN(Clamp, Tensor self, MaybeScalar low, MaybeScalar high, Out out) { return [=] { out = at::clamp(self, low, high); }; }
ACLNN(ClampMin, Tensor self, Scalar low, Out out) { return [=] { out = at::clamp_min(self, low); }; }
ACLNN(ClampMax, Tensor self, Scalar high, Out out) { return [=] { out = at::clamp_max(self, high); }; }
ACLNN(InplaceClampMax, Tensor self, Scalar high) { return [=] { self.clamp_max_(high); }; }
ACLNN(ClampMinTensor, Tensor self, Tensor low, Out out) { return [=] { out = at::clamp_min(self, low); }; }
ACLNN(ClampMaxTensor, Tensor self, Tensor high, Out out) { return [=] { out = at::clamp_max(self, high); }; }
ACLNN(InplaceClampMinTensor, Tensor self, Tensor low) { return [=] { self.clamp_min_(low); }; }
ACLNN(InplaceClampMaxTensor, Tensor self, Tensor high) { return [=] { self.clamp_max_(high); }; }
ACLNN(ClampTensor, Tensor self, Tensor low, Tensor high, Out out) {
  return [=] { out = at::clamp(self, low.defined() ? std::optional(low) : std::nullopt, high.defined() ? std::optional(high) : std::nullopt); };
}

// ---- comparison and logic -------------------------------------------------------------------------------------------------------------

#define COMPARE(NAME, FUNCTION)                                                                                \
  ACLNN(NAME##Tensor, Tensor self, Tensor other, Out out) { return [=] { out = at::FUNCTION(self, other); }; } \
  ACLNN(NAME##Scalar, Tensor self, Scalar other, Out out) { return [=] { out = at::FUNCTION(self, other); }; } \
  ACLNN(Inplace##NAME##Tensor, Tensor self, Tensor other) { return [=] { self.FUNCTION##_(other); }; }         \
  ACLNN(Inplace##NAME##Scalar, Tensor self, Scalar other) { return [=] { self.FUNCTION##_(other); }; }
COMPARE(Eq, eq)
COMPARE(Ne, ne)
COMPARE(Lt, lt)
COMPARE(Le, le)
COMPARE(Gt, gt)
COMPARE(Ge, ge)
COMPARE(BitwiseAnd, bitwise_and)
COMPARE(BitwiseOr, bitwise_or)
COMPARE(BitwiseXor, bitwise_xor)

ACLNN(LogicalAnd, Tensor self, Tensor other, Out out) { return [=] { out = at::logical_and(self, other); }; }
ACLNN(LogicalOr, Tensor self, Tensor other, Out out) { return [=] { out = at::logical_or(self, other); }; }
ACLNN(LogicalXor, Tensor self, Tensor other, Out out) { return [=] { out = at::logical_xor(self, other); }; }
ACLNN(InplaceLogicalAnd, Tensor self, Tensor other) { return [=] { self.logical_and_(other); }; }
ACLNN(InplaceLogicalOr, Tensor self, Tensor other) { return [=] { self.logical_or_(other); }; }
ACLNN(LeftShift, Tensor self, Tensor bits, Out out) { return [=] { out = at::bitwise_left_shift(self, bits); }; }
ACLNN(LeftShifts, Tensor self, Scalar bits, Out out) { return [=] { out = at::bitwise_left_shift(self, bits); }; }
ACLNN(RightShift, Tensor self, Tensor bits, Out out) { return [=] { out = at::bitwise_right_shift(self, bits); }; }
// The whole comparison is one number of the output.
ACLNN(Equal, Tensor self, Tensor other, Out out) {
  return [=] { out->fill_(self.sizes() == other.sizes() && at::equal(self, other)); };
}
ACLNN(SWhere, Tensor condition, Tensor self, Tensor other, Out out) { return [=] { out = at::where(condition, self, other); }; }
ACLNN(InplaceMaskedFillScalar, Tensor self, Tensor mask, Scalar value) { return [=] { self.masked_fill_(mask, value); }; }
ACLNN(InplaceMaskedFillTensor, Tensor self, Tensor mask, Tensor value) { return [=] { self.masked_fill_(mask, value.reshape({})); }; }

// ---- casts, copies and fills ----------------------------------------------------------------------------------------------------------

ACLNN(Cast, Tensor self, DType dtype, Out out) {
  require(out.dtype() == dtype, "out is ", describe(*out), ", the dtype asked for is ", c10::toString(dtype));
  return [=] { out = self; };
}
ACLNN(InplaceCopy, Tensor self, Tensor source) { return [=] { self.copy_(source); }; }
ACLNN(InplaceZero, Tensor self) { return [=] { self.zero_(); }; }
ACLNN(InplaceOne, Tensor self) { return [=] { self.fill_(1); }; }
ACLNN(InplaceFillScalar, Tensor self, Scalar value) { return [=] { self.fill_(value); }; }
ACLNN(InplaceFillTensor, Tensor self, Tensor value) {
  require(value.numel() == 1, "value is ", describe(value), "; one element is expected");
  return [=] { self.copy_(value.reshape({}).expand(self.sizes())); };
}
ACLNN(InplaceFillDiagonal, Tensor self, Scalar value, bool wrap) { return [=] { self.fill_diagonal_(value, wrap); }; }
ACLNN(Triu, Tensor self, int64_t diagonal, Out out) { return [=] { out = at::triu(self, diagonal); }; }
ACLNN(Tril, Tensor self, int64_t diagonal, Out out) { return [=] { out = at::tril(self, diagonal); }; }
ACLNN(InplaceTriu, Tensor self, int64_t diagonal) { return [=] { self.triu_(diagonal); }; }
ACLNN(InplaceTril, Tensor self, int64_t diagonal) { return [=] { self.tril_(diagonal); }; }

}  // namespace emulator
