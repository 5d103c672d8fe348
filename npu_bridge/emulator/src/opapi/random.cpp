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

// ---- dropout: a mask of bits, lowest first, one for kept -------------------------------------------------------------------------------

static void write_mask(const Ints& shape, double probability, uint64_t seed, uint64_t offset, const Out& mask) {
  int64_t count = c10::multiply_integers(at::IntArrayRef(shape)), bytes = (count + 7) / 8;
  TORCH_CHECK(mask->numel() >= bytes, "a mask of ", mask->numel(), " bytes for ", count, " elements");
  Tensor kept = at::zeros({bytes * 8}, at::kInt);
  kept.slice(0, 0, count).bernoulli_(1 - probability, generator(seed, offset));
  Tensor weights = at::bitwise_left_shift(at::ones({8}, at::kInt), at::arange(8, at::kInt));
  mask->flatten().slice(0, 0, bytes).copy_((kept.view({bytes, 8}) * weights).sum(1));
}
static void require_probability(double p) { require(p >= 0 && p <= 1, "dropout probability ", p, "; expected 0 to 1"); }

ACLNN(DropoutGenMask, Ints shape, double probability, int64_t seed, int64_t offset, Out mask) {
  require_probability(probability);
  return [=] { write_mask(shape, probability, seed, offset, mask); };
}
ACLNN(DropoutGenMaskV2, Ints shape, double probability, int64_t seed, int64_t offset, DType dtype, Out mask) {
  require_probability(probability);
  return [=] { write_mask(shape, probability, seed, offset, mask); };
}
ACLNN(DropoutDoMask, Tensor self, Tensor mask, double probability, Out out) {
  require_probability(probability);
  require_dtype(mask, "mask", {at::kByte});
  return [=] {
    int64_t count = self.numel();
    Tensor bytes = mask.flatten().slice(0, 0, (count + 7) / 8).to(at::kInt);
    Tensor kept = at::bitwise_right_shift(bytes.unsqueeze(1), at::arange(8, at::kInt)).bitwise_and(1).flatten().slice(0, 0, count);
    double scale = probability < 1 ? 1 / (1 - probability) : 0;
    out = self * (kept.to(at::kFloat) * scale).to(self.scalar_type()).reshape(self.sizes());
  };
}

}  // namespace emulator
