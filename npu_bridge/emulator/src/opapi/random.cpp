// Random numbers by seed and offset. The stream is torch's CPU generator, not the Philox stream of a chip: distributions and
// repeatability hold, the very numbers do not.
#include <ATen/CPUGeneratorImpl.h>

#include "opapi/operator.h"

namespace emulator {

static at::Generator generator(uint64_t seed, uint64_t offset) {
  // Offsets are small and consecutive; a multiplication by an odd constant keeps pairs apart.
  return at::detail::createCPUGenerator(seed ^ (offset * 0x9E3779B97F4A7C15ull));
}

ACLNN(InplaceNormal, Tensor self, float mean, float deviation, int64_t seed, int64_t offset) {
  return [=] { self.normal_(mean, deviation, generator(seed, offset)); };
}
ACLNN(InplaceUniform, Tensor self, double low, double high, uint64_t seed, uint64_t offset) {
  return [=] { self.uniform_(low, high, generator(seed, offset)); };
}
ACLNN(InplaceRandom, Tensor self, int64_t low, int64_t high, int64_t seed, int64_t offset) {
  return [=] { self.random_(low, high, generator(seed, offset)); };
}
ACLNN(InplaceBernoulli, Tensor self, Scalar probability, int64_t seed, int64_t offset) {
  return [=] { self.bernoulli_(probability.toDouble(), generator(seed, offset)); };
}
ACLNN(InplaceBernoulliTensor, Tensor self, Tensor probability, int64_t seed, int64_t offset) {
  return [=] { self.bernoulli_(probability, generator(seed, offset)); };
}
ACLNN(Multinomial, Tensor self, int64_t samples, bool replacement, int64_t seed, int64_t offset, Out out) {
  return [=] { out = at::multinomial(self, samples, replacement, generator(seed, offset)); };
}
ACLNN(Randperm, int64_t n, int64_t seed, int64_t offset, Out out) {
  return [=] { out = at::randperm(n, generator(seed, offset), out->options()); };
}

}  // namespace emulator
