// Losses that torch itself composes. The fused cross entropy has a file of its own.
#include "opapi/operator.h"

namespace emulator {

// reduction 0: none, 1: mean, 2: sum
ACLNN(NLLLoss, Tensor self, Tensor target, Tensor weight, int64_t reduction, int64_t ignore, Out out, Out total_weight) {
  return [=] {
    auto [loss, total] = at::nll_loss_forward(self, target.to(at::kLong), weight, reduction, ignore);
    out = loss.reshape(out->sizes());
    total_weight = total.reshape(total_weight->sizes());
  };
}
ACLNN(NLLLossBackward, Tensor grad, Tensor self, Tensor target, Tensor weight, int64_t reduction, int64_t ignore, Tensor total_weight, Out out) {
  return [=] {
    Tensor g = reduction ? grad.reshape({}) : grad;
    out = at::nll_loss_backward(g, self, target.to(at::kLong), weight, reduction, ignore, total_weight.reshape({}));
  };
}
ACLNN(MseLoss, Tensor self, Tensor target, int64_t reduction, Out out) { return [=] { out = at::mse_loss(self, target, reduction); }; }
ACLNN(MseLossBackward, Tensor grad, Tensor self, Tensor target, int64_t reduction, Out out) {
  return [=] { out = at::mse_loss_backward(grad, self, target, reduction); };
}
ACLNN(L1Loss, Tensor self, Tensor target, int64_t reduction, Out out) { return [=] { out = at::l1_loss(self, target, reduction); }; }
ACLNN(SmoothL1Loss, Tensor self, Tensor target, int64_t reduction, float beta, Out out) { return [=] { out = at::smooth_l1_loss(self, target, reduction, beta); }; }
ACLNN(BinaryCrossEntropyWithLogits, Tensor self, Tensor target, Tensor weight, Tensor pos_weight, int64_t reduction, Out out) {
  return [=] { out = at::binary_cross_entropy_with_logits(self, target, weight, pos_weight, reduction); };
}

}  // namespace emulator
