// Reductions, softmax, sorting, cumulative sums.
#include "opapi/operator.h"

namespace emulator {

ACLNN(ReduceSum, Tensor self, Ints dims, bool keep, DType dtype, Out out) { return [=] { out = at::sum(self, at::IntArrayRef(dims), keep, dtype.type); }; }
ACLNN(Mean, Tensor self, Ints dims, bool keep, DType dtype, Out out) { return [=] { out = at::mean(self, at::IntArrayRef(dims), keep, dtype.type); }; }
ACLNN(Prod, Tensor self, DType dtype, Out out) { return [=] { out = at::prod(self, dtype.type).reshape(out->sizes()); }; }
ACLNN(ProdDim, Tensor self, int64_t dim, bool keep, DType dtype, Out out) { return [=] { out = at::prod(self, dim, keep, dtype.type); }; }
ACLNN(Amax, Tensor self, Ints dims, bool keep, Out out) { return [=] { out = at::amax(self, dims, keep); }; }
ACLNN(Amin, Tensor self, Ints dims, bool keep, Out out) { return [=] { out = at::amin(self, dims, keep); }; }
ACLNN(Max, Tensor self, Out out) { return [=] { out = at::max(self); }; }
ACLNN(Min, Tensor self, Out out) { return [=] { out = at::min(self); }; }
ACLNN(MaxDim, Tensor self, int64_t dim, bool keep, Out values, Out indices) {
  return [=] {
    auto [v, i] = at::max(self, dim, keep);
    values = v;
    indices = i;
  };
}
ACLNN(MinDim, Tensor self, int64_t dim, bool keep, Out values, Out indices) {
  return [=] {
    auto [v, i] = at::min(self, dim, keep);
    values = v;
    indices = i;
  };
}
ACLNN(ArgMax, Tensor self, int64_t dim, bool keep, Out out) { return [=] { out = at::argmax(self, dim, keep); }; }
ACLNN(ArgMin, Tensor self, int64_t dim, bool keep, Out out) { return [=] { out = at::argmin(self, dim, keep); }; }
ACLNN(Aminmax, Tensor self, Ints dims, bool keep, Out low, Out high) {
  return [=] {
    low = at::amin(self, dims, keep);
    high = at::amax(self, dims, keep);
  };
}

// No dimensions mean all of them.
static Tensor over(const Tensor& self, const Ints& dims, bool all) {
  Tensor result = self.to(at::kBool);
  if (dims.empty()) return all ? result.all() : result.any();
  for (int64_t d : dims) result = all ? at::all(result, d, true) : at::any(result, d, true);
  return result;
}
ACLNN(All, Tensor self, Ints dims, bool keep, Out out) { return [=] { out = over(self, dims, true).reshape(out->sizes()); }; }
ACLNN(Any, Tensor self, Ints dims, bool keep, Out out) { return [=] { out = over(self, dims, false).reshape(out->sizes()); }; }

ACLNN(Norm, Tensor self, Scalar p, Ints dims, bool keep, Out out) { return [=] { out = at::norm(self, std::optional<Scalar>(p), dims, keep); }; }
ACLNN(LinalgVectorNorm, Tensor self, Scalar p, Ints dims, bool keep, DType dtype, Out out) {
  return [=] { out = at::linalg_vector_norm(self, p, dims.empty() ? at::OptionalIntArrayRef() : dims.optional(), keep, dtype.type).reshape(out->sizes()); };
}
ACLNN(LogSumExp, Tensor self, Ints dims, bool keep, Out out) { return [=] { out = at::logsumexp(self, at::IntArrayRef(dims), keep); }; }
ACLNN(VarCorrection, Tensor self, Ints dims, int64_t correction, bool keep, Out out) {
  return [=] { out = at::var(self, dims.optional(), std::optional<Scalar>(correction), keep); };
}
ACLNN(Std, Tensor self, Ints dims, int64_t correction, bool keep, Out out) {
  return [=] { out = at::std(self, dims.optional(), std::optional<Scalar>(correction), keep); };
}
ACLNN(VarMean, Tensor self, Ints dims, int64_t correction, bool keep, Out variance, Out mean) {
  return [=] {
    auto [v, m] = at::var_mean(self, dims.optional(), std::optional<Scalar>(correction), keep);
    mean = m;
    variance = v;
  };
}

// ---- softmax ---------------------------------------------------------------------------------------------------------------------------

ACLNN(Softmax, Tensor self, int64_t dim, Out out) { return [=] { out = at::softmax(self, dim, out.dtype()); }; }
ACLNN(LogSoftmax, Tensor self, int64_t dim, Out out) { return [=] { out = at::log_softmax(self, dim, out.dtype()); }; }
ACLNN(SoftmaxBackward, Tensor grad, Tensor result, int64_t dim, Out out) {
  return [=] { out = at::_softmax_backward_data(grad, result, dim, result.scalar_type()); };
}
ACLNN(LogSoftmaxBackward, Tensor grad, Tensor result, int64_t dim, Out out) {
  return [=] { out = at::_log_softmax_backward_data(grad, result, dim, result.scalar_type()); };
}

// ---- order -----------------------------------------------------------------------------------------------------------------------------

static Work topk(Tensor self, int64_t k, int64_t dim, bool largest, bool sorted, Out values, Out indices) {
  require(self.dim() == 0 || (k >= 0 && k <= self.size(dim)), "k = ", k, " of self = ", describe(self), " along ", dim);
  return [=] {
    auto [v, i] = at::topk(self, k, dim, largest, sorted);
    values = v;
    indices = i;
  };
}
ACLNN(Topk, Tensor self, int64_t k, int64_t dim, bool largest, bool sorted, Out values, Out indices) { return topk(self, k, dim, largest, sorted, values, indices); }
// sort_policy chooses how the device sorts: 0 its default, 1 bitonic.
ACLNN(TopkV2, Tensor self, int64_t k, int64_t dim, bool largest, bool sorted, int64_t sort_policy, Out values, Out indices) {
  require(sort_policy == 0 || sort_policy == 1, "sort_policy ", sort_policy, "; expected 0 or 1");
  return topk(self, k, dim, largest, sorted, values, indices);
}
ACLNN(Sort, Tensor self, bool stable, int64_t dim, bool descending, Out values, Out indices) {
  return [=] {
    auto [v, i] = at::sort(self, std::optional<bool>(stable), dim, descending);
    values = v;
    indices = i;
  };
}

ACLNN(Cumsum, Tensor self, int64_t dim, DType dtype, Out out) { return [=] { out = at::cumsum(self, dim, dtype.type); }; }
ACLNN(Cumprod, Tensor self, Scalar dim, DType dtype, Out out) { return [=] { out = at::cumprod(self, dim.toLong(), dtype.type); }; }
ACLNN(Cummax, Tensor self, int64_t dim, Out values, Out indices) {
  return [=] {
    auto [v, i] = at::cummax(self, dim);
    values = v;
    indices = i;
  };
}
ACLNN(Cummin, Tensor self, int64_t dim, Out values, Out indices) {
  return [=] {
    auto [v, i] = at::cummin(self, dim);
    values = v;
    indices = i;
  };
}

}  // namespace emulator
