// Rows and indices: embedding, gather, scatter, index, concatenation, repetition, padding, ranges. Indices are checked when the work runs;
// a chip does not check them.
#include "opapi/operator.h"

namespace emulator {

static Tensor whole_numbers(const Tensor& index) { return index.to(at::kLong); }

ACLNN(Embedding, Tensor weight, Tensor indices, Out out) { return [=] { out = at::embedding(weight, whole_numbers(indices)); }; }
ACLNN(EmbeddingDenseBackward, Tensor grad, Tensor indices, uint64_t rows, int64_t padding, bool by_frequency, Out out) {
  return [=] { out = at::embedding_dense_backward(grad, whole_numbers(indices), static_cast<int64_t>(rows), padding, by_frequency); };
}

ACLNN(Gather, Tensor self, int64_t dim, Tensor index, Out out) { return [=] { out = at::gather(self, dim, whole_numbers(index)); }; }
ACLNN(IndexSelect, Tensor self, int64_t dim, Tensor index, Out out) { return [=] { out = at::index_select(self, dim, whole_numbers(index)); }; }
ACLNN(Take, Tensor self, Tensor index, Out out) { return [=] { out = at::take(self, whole_numbers(index)); }; }
ACLNN(IndexAdd, Tensor self, int64_t dim, Tensor index, Tensor source, Scalar alpha, Out out) {
  return [=] { out = at::index_add(self, dim, whole_numbers(index), source, alpha); };
}
ACLNN(IndexAddV2, Tensor self, int64_t dim, Tensor index, Tensor source, Scalar alpha, int64_t mode, Out out) {
  return [=] { out = at::index_add(self, dim, whole_numbers(index), source, alpha); };
}
ACLNN(IndexCopy, Tensor self, int64_t dim, Tensor index, Tensor source, Out out) { return [=] { out = at::index_copy(self, dim, whole_numbers(index), source); }; }
ACLNN(InplaceIndexCopy, Tensor self, int64_t dim, Tensor index, Tensor source) { return [=] { self.index_copy_(dim, whole_numbers(index), source); }; }
ACLNN(IndexFillTensor, Tensor self, int64_t dim, Ints index, Scalar value, Out out) {
  return [=] { out = at::index_fill(self, dim, at::tensor(at::IntArrayRef(index), at::kLong), value); };
}
ACLNN(InplaceIndexFillTensor, Tensor self, int64_t dim, Ints index, Scalar value) {
  return [=] { self.index_fill_(dim, at::tensor(at::IntArrayRef(index), at::kLong), value); };
}
ACLNN(InplaceIndexFill, Tensor self, int64_t dim, Tensor index, Scalar value) { return [=] { self.index_fill_(dim, whole_numbers(index), value); }; }

// ---- scatter ---------------------------------------------------------------------------------------------------------------------------

// reduction 0: replace, 1: add, 2: multiply
static void scatter(const Tensor& target, int64_t dim, const Tensor& index, const Tensor& source, int64_t reduction) {
  Tensor i = whole_numbers(index);
  if (reduction == 0)
    target.scatter_(dim, i, source);
  else
    target.scatter_(dim, i, source, reduction == 1 ? "add" : "multiply");
}
static int64_t require_reduction(int64_t reduction) {
  require(reduction >= 0 && reduction <= 2, "reduction ", reduction, "; expected 0 (replace), 1 (add) or 2 (multiply)");
  return reduction;
}
static Tensor spread(const Scalar& value, const Tensor& self, const Tensor& index) { return at::full(index.sizes(), value, self.options()); }

ACLNN(Scatter, Tensor self, int64_t dim, Tensor index, Tensor source, int64_t reduction, Out out) {
  require_reduction(reduction);
  return [=] {
    Tensor result = self.clone();
    scatter(result, dim, index, source, reduction);
    out = result;
  };
}
ACLNN(InplaceScatter, Tensor self, int64_t dim, Tensor index, Tensor source, int64_t reduction) {
  require_reduction(reduction);
  return [=] { scatter(self, dim, index, source, reduction); };
}
ACLNN(ScatterValue, Tensor self, int64_t dim, Tensor index, Scalar value, int64_t reduction, Out out) {
  require_reduction(reduction);
  return [=] {
    Tensor result = self.clone();
    scatter(result, dim, index, spread(value, self, index), reduction);
    out = result;
  };
}
ACLNN(InplaceScatterValue, Tensor self, int64_t dim, Tensor index, Scalar value, int64_t reduction) {
  require_reduction(reduction);
  return [=] { scatter(self, dim, index, spread(value, self, index), reduction); };
}
ACLNN(ScatterAdd, Tensor self, int64_t dim, Tensor index, Tensor source, Out out) { return [=] { out = at::scatter_add(self, dim, whole_numbers(index), source); }; }

// ---- index with a list of tensors, holes standing for whole dimensions -----------------------------------------------------------------

// torch_npu writes a hole as an empty vector of the dtype of `self`.
static c10::List<std::optional<Tensor>> index_list(const Tensor& self, const Tensors& indices) {
  c10::List<std::optional<Tensor>> list;
  for (const Tensor& t : indices) {
    bool hole = !t.defined() || (t.dim() == 1 && t.size(0) == 0 && t.scalar_type() == self.scalar_type());
    list.push_back(hole ? std::nullopt : std::optional<Tensor>(t.scalar_type() == at::kInt ? whole_numbers(t) : t));
  }
  return list;
}
ACLNN(Index, Tensor self, Tensors indices, Out out) { return [=] { out = at::index(self, index_list(self, indices)); }; }
ACLNN(IndexPutImpl, Tensor self, Tensors indices, Tensor values, bool accumulate, bool unsafe) {
  return [=] { self.index_put_(index_list(self, indices), values, accumulate); };
}

ACLNN(InplaceMaskedScatter, Tensor self, Tensor mask, Tensor source) { return [=] { self.masked_scatter_(mask, source); }; }
ACLNN(MaskedSelect, Tensor self, Tensor mask, Out out) {
  require(settings().execute, "the size of the result depends on data, which --no-execute does not have");
  return [=] { out.fit(at::masked_select(self, mask)); };
}
ACLNN(Nonzero, Tensor self, Out out) {
  require(settings().execute, "the size of the result depends on data, which --no-execute does not have");
  return [=] { out.fit(at::nonzero(self)); };
}
ACLNN(NonzeroV2, Tensor self, Out out) {
  require(settings().execute, "the size of the result depends on data, which --no-execute does not have");
  return [=] { out.fit(at::nonzero(self).t().contiguous()); };
}

// dim 1000 stands for none: the flattened tensor.
ACLNN(UniqueConsecutive, Tensor self, bool return_inverse, bool return_counts, int64_t dim, Out values, Out inverse, Out counts) {
  require(settings().execute, "the size of the result depends on data, which --no-execute does not have");
  return [=] {
    auto [v, i, n] = at::unique_consecutive(self, return_inverse, return_counts, dim == 1000 ? std::nullopt : std::optional<int64_t>(dim));
    values.fit(v);
    if (return_inverse) inverse = i;
    if (return_counts) counts.fit(n);
  };
}

// ---- shapes ----------------------------------------------------------------------------------------------------------------------------

// An empty vector takes no part, whatever the rank of the others.
ACLNN(Cat, Tensors tensors, int64_t dim, Out out) {
  return [=] { out = at::cat(tensors, dim); };
}
ACLNN(Stack, Tensors tensors, int64_t dim, Out out) { return [=] { out = at::stack(tensors, dim); }; }
// What FSDP2 packs gradients with: each tensor is cut into chunks along dim (the last one filled up with zeros), and the chunks of the
// same number are concatenated. The output may be of a wider dtype (reduction in float32).
ACLNN(ChunkCat, Tensors tensors, int64_t dim, int64_t chunks, Out out) {
  require(dim == 0, "dim ", dim, "; expected 0");
  for (const Tensor& t : tensors) {
    require_dtype(t, "tensors", {at::kFloat, at::kHalf, at::kBFloat16});
    require(t.scalar_type() == tensors[0].scalar_type(), "tensors are of several dtypes");
  }
  return [=] { out = at::_chunk_cat(tensors, dim, chunks); };
}
ACLNN(SplitWithSize, Tensor self, Ints sizes, int64_t dim, Outs out) {
  return [=] {
    auto parts = at::split_with_sizes(self, sizes, dim);
    for (size_t i = 0; i < out.size(); i++) out[i] = parts[i];
  };
}
ACLNN(Repeat, Tensor self, Ints repeats, Out out) { return [=] { out = self.repeat(repeats); }; }
ACLNN(RepeatInterleave, Tensor self, Tensor repeats, int64_t size, Out out) { return [=] { out = at::repeat_interleave(self.flatten(), whole_numbers(repeats)); }; }
ACLNN(RepeatInterleaveWithDim, Tensor self, Tensor repeats, int64_t dim, int64_t size, Out out) {
  return [=] { out = at::repeat_interleave(self, whole_numbers(repeats), dim); };
}
ACLNN(RepeatInterleaveInt, Tensor self, int64_t repeats, int64_t size, Out out) { return [=] { out = at::repeat_interleave(self.flatten(), repeats); }; }
ACLNN(RepeatInterleaveIntWithDim, Tensor self, int64_t repeats, int64_t dim, int64_t size, Out out) { return [=] { out = at::repeat_interleave(self, repeats, dim); }; }
ACLNN(Flip, Tensor self, Ints dims, Out out) { return [=] { out = at::flip(self, dims); }; }
ACLNN(Roll, Tensor self, Ints shifts, Ints dims, Out out) { return [=] { out = at::roll(self, shifts, dims); }; }
ACLNN(ConstantPadNd, Tensor self, Ints pad, Scalar value, Out out) { return [=] { out = at::constant_pad_nd(self, pad, value); }; }
ACLNN(OneHot, Tensor self, int64_t classes, Tensor on, Tensor off, int64_t axis, Out out) {
  return [=] { out = at::where(at::one_hot(whole_numbers(self), classes).to(at::kBool), on.reshape({}), off.reshape({})); };
}

ACLNN(Arange, Scalar start, Scalar end, Scalar step, Out out) { return [=] { out = at::arange(start, end, step, out->options()); }; }
ACLNN(Range, Scalar start, Scalar end, Scalar step, Out out) { return [=] { out = at::range(start, end, step, out->options()); }; }
ACLNN(Linspace, Scalar start, Scalar end, int64_t steps, Out out) { return [=] { out = at::linspace(start, end, steps, out->options()); }; }
ACLNN(Eye, int64_t rows, int64_t columns, Out out) { return [=] { out = at::eye(rows, columns, out->options()); }; }
ACLNN(Bincount, Tensor self, Tensor weights, int64_t least, Out out) {
  return [=] { out = at::bincount(self, weights.defined() ? std::optional<Tensor>(weights) : std::nullopt, least); };
}
ACLNN(SearchSorted, Tensor sorted, Tensor self, bool narrow, bool right, Tensor sorter, Out out) {
  require_absent(sorter, "sorter");
  return [=] { out = at::searchsorted(sorted, self, narrow, right); };
}

}  // namespace emulator
