// Fused optimizers: everything in float32 (or the state's dtype), written out.
#include <cmath>

#include "opapi/operator.h"

namespace emulator {

// torch's fused Adam with decoupled weight decay. `step` counts the updates before this one.
ACLNN(ApplyAdamWV2, Tensor var, Tensor m, Tensor v, Tensor max_grad_norm, Tensor grad, Tensor step, float lr, float beta1, float beta2, float weight_decay,
      float eps, bool amsgrad, bool maximize) {
  require_shape(m, "m", var.sizes());
  require_shape(v, "v", var.sizes());
  require_shape(grad, "grad", var.sizes());
  require(!amsgrad || max_grad_norm.defined(), "amsgrad without its tensor of maxima");
  require(step.numel() == 1, "step is ", describe(step), "; one number is expected");
  return [=] {
    double t = step.item().toDouble() + 1;
    Tensor g = (maximize ? -grad : grad).to(m.scalar_type());
    var.mul_(1 - static_cast<double>(lr) * weight_decay);
    m.mul_(static_cast<double>(beta1)).add_(g, 1 - static_cast<double>(beta1));
    v.mul_(static_cast<double>(beta2)).addcmul_(g, g, 1 - static_cast<double>(beta2));
    Tensor second = v;
    if (amsgrad) {
      max_grad_norm.copy_(at::maximum(max_grad_norm, v));
      second = max_grad_norm;
    }
    Tensor denominator = (second.sqrt() / std::sqrt(1 - std::pow(static_cast<double>(beta2), t))).add_(eps);
    var.addcdiv_(m, denominator, -static_cast<double>(lr) / (1 - std::pow(static_cast<double>(beta1), t)));
  };
}

}  // namespace emulator
