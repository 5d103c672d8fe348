// Cross entropy in one kernel, with label smoothing off and on, and the log probabilities for the gradient.
#include "opapi/operator.h"

namespace emulator {

static void require_reduction(const Text& reduction) {
  require(reduction == "none" || reduction == "mean" || reduction == "sum", "reduction \"", reduction, "\"; expected none, mean or sum");
}
static Tensor counted(const Tensor& target, int64_t ignore) { return target.to(at::kLong).ne(ignore); }
static Tensor weights_of(const Tensor& weight, const Tensor& target, const Tensor& used) {
  Tensor w = used.to(at::kFloat);
  return weight.defined() ? w * weight.to(at::kFloat).index_select(0, target) : w;
}

ACLNN(CrossEntropyLoss, Tensor input, Tensor target, Tensor weight, Text reduction, int64_t ignore_index, double label_smoothing, double zloss_scale,
      bool return_zloss, Out loss, Out log_prob, Out zloss, Out lse) {
  require_dtype(input, "input", {at::kFloat, at::kHalf, at::kBFloat16});
  require(input.dim() == 2 && target.dim() == 1 && target.size(0) == input.size(0), "input = ", describe(input), " and target = ", describe(target));
  require_dtype(weight, "weight", {at::kFloat});
  require_reduction(reduction);
  require(label_smoothing == 0, "label_smoothing ", label_smoothing, " has no emulation (the device kernel takes 0 as well)");
  require(zloss_scale == 0 && !return_zloss, "zloss has no emulation");
  return [=] {
    Tensor logs = at::log_softmax(input.to(at::kFloat), 1);
    log_prob = logs;
    Tensor used = counted(target, ignore_index), safe = target.to(at::kLong).masked_fill(used.logical_not(), 0);
    Tensor w = weights_of(weight, safe, used);
    Tensor each = -logs.gather(1, safe.unsqueeze(1)).squeeze(1) * w;
    loss = reduction == "none" ? each : (reduction == "mean" ? each.sum() / w.sum() : each.sum()).reshape(loss->sizes());
  };
}
ACLNN(CrossEntropyLossGrad, Tensor grad_loss, Tensor log_prob, Tensor target, Tensor weight, Tensor grad_zloss, Tensor lse, Text reduction, int64_t ignore_index,
      double label_smoothing, double zloss_scale, Out out) {
  require_reduction(reduction);
  require(label_smoothing == 0 && zloss_scale == 0, "label_smoothing and zloss have no emulation");
  require(log_prob.dim() == 2 && target.size(0) == log_prob.size(0), "log_prob = ", describe(log_prob), " and target = ", describe(target));
  return [=] {
    Tensor used = counted(target, ignore_index), safe = target.to(at::kLong).masked_fill(used.logical_not(), 0);
    Tensor w = weights_of(weight, safe, used);
    Tensor d = log_prob.to(at::kFloat).exp();
    d.scatter_add_(1, safe.unsqueeze(1), at::full({d.size(0), 1}, -1.0));
    Tensor g = grad_loss.to(at::kFloat);
    g = reduction == "none" ? g : (reduction == "mean" ? g.reshape({1}) / w.sum() : g.reshape({1}));
    out = d * (w * g).unsqueeze(1);
  };
}

}  // namespace emulator
