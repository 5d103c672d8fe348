// Norms, in float32 inside.
#include "opapi/operator.h"

namespace emulator {

// ---- layer norm ------------------------------------------------------------------------------------------------------------------------

ACLNN(LayerNorm, Tensor input, Ints shape, Tensor weight, Tensor bias, double eps, Out out, Out mean, Out rstd) {
  return [=] {
    Tensor wide = input.to(at::kFloat);
    auto f32 = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t.to(at::kFloat)) : std::nullopt; };
    auto [y, m, r] = at::native_layer_norm(wide, shape, f32(weight), f32(bias), eps);
    out = y;
    // Without rows torch_npu makes room for other empty shapes of the statistics.
    if (mean) mean = m.reshape(mean->sizes());
    if (rstd) rstd = r.reshape(rstd->sizes());
  };
}
ACLNN(LayerNormBackward, Tensor grad, Tensor input, Ints shape, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Bools wanted, Out grad_input,
      Out grad_weight, Out grad_bias) {
  require(wanted.size() == 3, "output mask of ", wanted.size(), " entries; expected 3");
  return [=] {
    auto f32 = [](const Tensor& t) { return t.defined() ? std::optional<Tensor>(t.to(at::kFloat)) : std::nullopt; };
    auto [gi, gw, gb] = at::native_layer_norm_backward(grad.to(at::kFloat), input.to(at::kFloat), shape, mean.to(at::kFloat), rstd.to(at::kFloat), f32(weight),
                                                       f32(bias), {wanted[0], wanted[1], wanted[2]});
    if (wanted[0]) grad_input = gi;
    if (wanted[1]) grad_weight = gw;
    if (wanted[2]) grad_bias = gb;
  };
}

// ---- rms norm --------------------------------------------------------------------------------------------------------------------------

// Gamma spans the last dimensions of x.
static void require_gamma(const Tensor& x, const Tensor& gamma) {
  require_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16});
  require_dtype(gamma, "gamma", {at::kFloat, at::kHalf, at::kBFloat16});
  require(gamma.dim() >= 1 && gamma.dim() <= x.dim() && x.sizes().slice(x.dim() - gamma.dim()) == gamma.sizes(), "gamma = ", describe(gamma),
          " must have the last dimensions of x = ", describe(x));
  require(gamma.scalar_type() == x.scalar_type() || gamma.scalar_type() == at::kFloat, "gamma = ", describe(gamma), " beside x = ", describe(x),
          "; it has the dtype of x or float32");
}
static std::vector<int64_t> last_dims(const Tensor& x, const Tensor& gamma) {
  std::vector<int64_t> dims;
  for (int64_t d = x.dim() - gamma.dim(); d < x.dim(); d++) dims.push_back(d);
  return dims;
}

static void rms_norm(const Tensor& x, const Tensor& gamma, double eps, const Out& y, const Out& rstd) {
  Tensor wide = x.to(at::kFloat);
  Tensor r = at::rsqrt(at::mean(wide * wide, last_dims(x, gamma), true) + eps);
  y = wide * r * gamma.to(at::kFloat);
  rstd = r;
}

ACLNN(RmsNorm, Tensor x, Tensor gamma, double eps, Out y, Out rstd) {
  require_gamma(x, gamma);
  return [=] { rms_norm(x, gamma, eps, y, rstd); };
}
ACLNN(AddRmsNorm, Tensor x1, Tensor x2, Tensor gamma, double eps, Out y, Out rstd, Out sum) {
  require_shape(x2, "x2", x1.sizes());
  require_same_dtype(x1, "x1", x2, "x2");
  require_gamma(x1, gamma);
  return [=] {
    sum = x1.to(at::kFloat) + x2.to(at::kFloat);
    rms_norm(*sum, gamma, eps, y, rstd);
  };
}
ACLNN(RmsNormGrad, Tensor grad, Tensor x, Tensor rstd, Tensor gamma, Out grad_x, Out grad_gamma) {
  require_gamma(x, gamma);
  require_shape(grad, "grad", x.sizes());
  require_dtype(rstd, "rstd", {at::kFloat});
  require(!grad_gamma || grad_gamma.dtype() == at::kFloat, "grad_gamma is ", describe(*grad_gamma), "; the kernel writes float32");
  return [=] {
    Tensor normed = x.to(at::kFloat) * rstd, g = grad.to(at::kFloat), scaled = g * gamma.to(at::kFloat);
    grad_x = (scaled - normed * at::mean(scaled * normed, last_dims(x, gamma), true)) * rstd;
    Tensor products = g * normed;
    std::vector<int64_t> leading;
    for (int64_t d = 0; d < x.dim() - gamma.dim(); d++) leading.push_back(d);
    grad_gamma = leading.empty() ? products : at::sum(products, leading);
  };
}

}  // namespace emulator
