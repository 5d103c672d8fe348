// One operator over lists of tensors. A factor arrives as a tensor of one element or as scalars, one a tensor.
#include "opapi/operator.h"

namespace emulator {

static void require_lists(size_t wanted, std::initializer_list<size_t> sizes) {
  for (size_t n : sizes) require(n == wanted, "lists of ", wanted, " and ", n, " tensors");
}
template <class F>
static Work each(const Outs& out, F value) {
  return [=] {
    for (size_t i = 0; i < out.size(); i++) out[i] = value(i);
  };
}

// ---- one list --------------------------------------------------------------------------------------------------------------------------

#define FOREACH(NAME, EXPRESSION)             \
  ACLNN(Foreach##NAME, Tensors x, Outs out) { \
    require_lists(x.size(), {out.size()});    \
    return each(out, [=](size_t i) { return EXPRESSION; }); \
  }
FOREACH(Abs, at::abs(x[i]))
FOREACH(Copy, x[i])
FOREACH(Exp, at::exp(x[i]))
FOREACH(Expm1, at::expm1(x[i]))
FOREACH(Log, at::log(x[i]))
FOREACH(Neg, at::neg(x[i]))
FOREACH(Reciprocal, at::reciprocal(x[i]))
FOREACH(Sigmoid, at::sigmoid(x[i]))
FOREACH(Sign, at::sign(x[i]))
FOREACH(Sqrt, at::sqrt(x[i]))
FOREACH(Tanh, at::tanh(x[i]))
ACLNN(ForeachZeroInplace, Tensors x) {
  return [=] {
    for (const Tensor& t : x) t.zero_();
  };
}
ACLNN(ForeachNorm, Tensors x, Scalar ord, Outs out) {
  return each(out, [=](size_t i) { return at::norm(x[i].to(at::kFloat), ord).reshape(out[i]->sizes()); });
}

// ---- a list and a number ---------------------------------------------------------------------------------------------------------------

#define FOREACH_SCALAR(NAME, FUNCTION)                                                        \
  ACLNN(Foreach##NAME##Scalar, Tensors x, Tensor scalar, Outs out) {                          \
    require_lists(x.size(), {out.size()});                                                    \
    return each(out, [=](size_t i) { return at::FUNCTION(x[i], scalar.reshape({})); });       \
  }                                                                                           \
  ACLNN(Foreach##NAME##ScalarV2, Tensors x, Scalar scalar, Outs out) {                        \
    require_lists(x.size(), {out.size()});                                                    \
    return each(out, [=](size_t i) { return at::FUNCTION(x[i], scalar); });                   \
  }                                                                                           \
  ACLNN(Foreach##NAME##ScalarList, Tensors x, Scalars scalars, Outs out) {                    \
    require_lists(x.size(), {scalars.size(), out.size()});                                    \
    return each(out, [=](size_t i) { return at::FUNCTION(x[i], scalars[i]); });               \
  }
FOREACH_SCALAR(Add, add)
FOREACH_SCALAR(Sub, sub)
FOREACH_SCALAR(Mul, mul)
FOREACH_SCALAR(Div, div)
FOREACH_SCALAR(Pow, pow)
FOREACH_SCALAR(Maximum, clamp_min)
FOREACH_SCALAR(Minimum, clamp_max)

// ---- two lists -------------------------------------------------------------------------------------------------------------------------

ACLNN(ForeachAddList, Tensors x, Tensors y, Tensor alpha, Outs out) {
  require_lists(x.size(), {y.size(), out.size()});
  return each(out, [=](size_t i) { return x[i] + y[i] * alpha.reshape({}); });
}
ACLNN(ForeachAddListV2, Tensors x, Tensors y, Scalar alpha, Outs out) {
  require_lists(x.size(), {y.size(), out.size()});
  return each(out, [=](size_t i) { return at::add(x[i], y[i], alpha); });
}
ACLNN(ForeachSubList, Tensors x, Tensors y, Tensor alpha, Outs out) {
  require_lists(x.size(), {y.size(), out.size()});
  return each(out, [=](size_t i) { return x[i] - y[i] * alpha.reshape({}); });
}
ACLNN(ForeachSubListV2, Tensors x, Tensors y, Scalar alpha, Outs out) {
  require_lists(x.size(), {y.size(), out.size()});
  return each(out, [=](size_t i) { return at::sub(x[i], y[i], alpha); });
}
#define FOREACH_LISTS(NAME, FUNCTION)                                                \
  ACLNN(Foreach##NAME##List, Tensors x, Tensors y, Outs out) {                       \
    require_lists(x.size(), {y.size(), out.size()});                                 \
    return each(out, [=](size_t i) { return at::FUNCTION(x[i], y[i]); });            \
  }
FOREACH_LISTS(Mul, mul)
FOREACH_LISTS(Div, div)
FOREACH_LISTS(Pow, pow)
FOREACH_LISTS(Maximum, maximum)
FOREACH_LISTS(Minimum, minimum)

ACLNN(ForeachLerpScalar, Tensors x, Tensors y, Scalar weight, Outs out) {
  require_lists(x.size(), {y.size(), out.size()});
  return each(out, [=](size_t i) { return at::lerp(x[i], y[i], weight); });
}
ACLNN(ForeachLerpList, Tensors x, Tensors y, Tensors weight, Outs out) {
  require_lists(x.size(), {y.size(), weight.size(), out.size()});
  return each(out, [=](size_t i) { return at::lerp(x[i], y[i], weight[i]); });
}

// ---- three lists -----------------------------------------------------------------------------------------------------------------------

#define FOREACH_ADDC(NAME, OPERATOR)                                                                                   \
  ACLNN(Foreach##NAME##Scalar, Tensors x, Tensors a, Tensors b, Tensor scalar, Outs out) {                             \
    require_lists(x.size(), {a.size(), b.size(), out.size()});                                                         \
    return each(out, [=](size_t i) { return x[i] + a[i] OPERATOR b[i] * scalar.reshape({}); });                        \
  }                                                                                                                    \
  ACLNN(Foreach##NAME##ScalarV2, Tensors x, Tensors a, Tensors b, Scalar scalar, Outs out) {                           \
    require_lists(x.size(), {a.size(), b.size(), out.size()});                                                         \
    return each(out, [=](size_t i) { return x[i] + a[i] OPERATOR b[i] * scalar; });                                    \
  }                                                                                                                    \
  ACLNN(Foreach##NAME##ScalarList, Tensors x, Tensors a, Tensors b, Scalars scalars, Outs out) {                       \
    require_lists(x.size(), {a.size(), b.size(), scalars.size(), out.size()});                                         \
    return each(out, [=](size_t i) { return x[i] + a[i] OPERATOR b[i] * scalars[i]; });                                \
  }
FOREACH_ADDC(Addcmul, *)
FOREACH_ADDC(Addcdiv, /)

// Check and scale in one pass, for mixed precision: gradients times inverse scale, and one number that says whether any was not finite.
ACLNN(ForeachNonFiniteCheckAndUnscale, Tensors grads, Tensor found, Tensor inverse_scale) {
  return [=] {
    for (const Tensor& g : grads) {
      if (!at::isfinite(g).all().item<bool>()) found.fill_(1);
      g.mul_(inverse_scale.reshape({}));
    }
  };
}

}  // namespace emulator
