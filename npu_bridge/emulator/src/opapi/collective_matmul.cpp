// Matrix products joined with an exchange between the devices of a communicator: the product of every rank is summed over all of them,
// summed and split by rows, or made of the rows of all. M rows of a rank, K contracted, N columns, W ranks.
#include <algorithm>

#include "hccl/communicator.h"
#include "opapi/operator.h"

namespace emulator {

namespace {

// What the documents say of the Atlas A2: float16 and bfloat16 alone, the left matrix as it lies in memory, the right one also transposed.
void require_product(const Tensor& x1, const Tensor& x2, const Tensor& bias, const Out& out, int64_t most_dims) {
  require_dtype(x1, "x1", {at::kHalf, at::kBFloat16});
  require_same_dtype(x1, "x1", x2, "x2");
  require_same_dtype(x1, "x1", bias, "bias");
  require_same_dtype(x1, "x1", *out, "output");
  require(x1.dim() >= 2 && x1.dim() <= most_dims && x2.dim() == 2, "x1 = ", describe(x1), " and x2 = ", describe(x2), "; expected 2 dimensions", most_dims == 3 ? " (x1: 2 or 3)" : "");
  require(x1.size(-1) == x2.size(0), "x1 = ", describe(x1), " and x2 = ", describe(x2), " share no contracted dimension");
  require(x1.is_contiguous(), "x1 = ", describe(x1), " is transposed or has gaps; it must be contiguous");
  require(x2.is_contiguous() || x2.t().is_contiguous(), "x2 = ", describe(x2), " has gaps; it may be transposed and nothing else");
  if (bias.defined()) require_shape(bias, "bias", {x2.size(1)});
}

// Gathered and scattered products: a limit of the contracted dimension, and no bias (its document allows none that is not zero).
void require_split(const Tensor& x1, const Tensor& bias) {
  require(x1.size(1) >= 256 && x1.size(1) < 65535, "x1 = ", describe(x1), " contracts ", x1.size(1), " elements; expected 256 to 65534");
  require(!bias.defined() || bias.numel() == 0, "bias = ", describe(bias), "; the kernel takes none");
}

void require_modes(const Text& reduce_op, int64_t comm_turn, int64_t stream_mode) {
  require(reduce_op == "sum", "reduce_op \"", reduce_op, "\"; expected \"sum\"");
  require(comm_turn == 0, "comm_turn ", comm_turn, "; expected 0");
  require(stream_mode == 1, "stream_mode ", stream_mode, "; expected 1");
}

Communicator& require_group(const Text& name, std::initializer_list<uint32_t> sizes) {
  Communicator& c = communicator(name);
  require(std::count(sizes.begin(), sizes.end(), c.size()) > 0, "a communicator of ", c.size(), " ranks; the kernel works between ", *sizes.begin(), ", ... ", *(sizes.end() - 1),
          " (powers of two)");
  return c;
}

HcclDataType wire_type(const Tensor& x) { return x.scalar_type() == at::kHalf ? HCCL_DATA_TYPE_FP16 : HCCL_DATA_TYPE_BFP16; }

// In float32, rounded to the dtype that goes over the wire.
Tensor product(const Tensor& x1, const Tensor& x2, const Tensor& bias = {}, const Tensor& x3 = {}) {
  Tensor sum = at::matmul(x1.to(at::kFloat), x2.to(at::kFloat));
  if (bias.defined()) sum = sum + bias.to(at::kFloat);
  if (x3.defined()) sum = sum + x3.to(at::kFloat);
  return sum.to(x1.scalar_type()).contiguous();
}

template <class Body>
Work exchange(Communicator& communicator, Body body) {
  Communicator* c = &communicator;
  uint64_t number = ++c->calls;
  return exchanging([=] {
    try {
      body(*c);
    } catch (const Refusal& refusal) {
      c->failed = true;
      throw Refusal(refusal.code, "call number " + std::to_string(number) + " on communicator " + c->name + ", rank " + std::to_string(c->rank()) + " of " +
                                      std::to_string(c->size()) + ": " + refusal.what());
    }
  });
}

// sum over ranks of x1 x2 + bias + x3: a bias that every rank brings is counted W times, as the formula of the document says.
Work matmul_all_reduce(Tensor x1, Tensor x2, Tensor bias, Tensor x3, Text group, Text reduce_op, int64_t comm_turn, int64_t stream_mode, Out output) {
  require_product(x1, x2, bias, output, 3);
  require_modes(reduce_op, comm_turn, stream_mode);
  auto shape = x1.sizes().vec();
  shape.back() = x2.size(1);
  require_shape(*output, "output", shape);
  if (x3.defined()) {
    require_same_dtype(x1, "x1", x3, "x3");
    require_shape(x3, "x3", shape);
  }
  return exchange(require_group(group, {1, 2, 4, 8}), [=](Communicator& c) {
    Tensor part = product(x1, x2, bias, x3), sum = at::empty_like(part);
    if (part.numel()) all_reduce(c, part.const_data_ptr(), sum.mutable_data_ptr(), part.numel(), wire_type(part), HCCL_REDUCE_SUM);
    output = sum;
  });
}

}  // namespace

ACLNN(MatmulAllReduce, Tensor x1, Tensor x2, Tensor bias, Text group, Text reduce_op, int64_t comm_turn, int64_t stream_mode, Out output) {
  return matmul_all_reduce(x1, x2, bias, {}, group, reduce_op, comm_turn, stream_mode, output);
}
ACLNN(MatmulAllReduceV2, Tensor x1, Tensor x2, Tensor bias, Tensor x3, Text group, Text reduce_op, int64_t comm_turn, int64_t stream_mode, Out output) {
  return matmul_all_reduce(x1, x2, bias, x3, group, reduce_op, comm_turn, stream_mode, output);
}

// The sum over ranks of x1 x2, of which this rank keeps its W-th part of the rows.
ACLNN(MatmulReduceScatter, Tensor x1, Tensor x2, Tensor bias, Text group, Text reduce_op, int64_t comm_turn, int64_t stream_mode, Out output) {
  require_product(x1, x2, bias, output, 2);
  require_split(x1, bias);
  require_modes(reduce_op, comm_turn, stream_mode);
  Communicator& of_group = require_group(group, {2, 4, 8});
  require(x1.size(0) % of_group.size() == 0, "the ", x1.size(0), " rows of x1 do not split over ", of_group.size(), " ranks");
  require_shape(*output, "output", {x1.size(0) / of_group.size(), x2.size(1)});
  return exchange(of_group, [=](Communicator& c) {
    Tensor part = product(x1, x2), mine = at::empty_like(part.slice(0, 0, part.size(0) / c.size()), at::MemoryFormat::Contiguous);
    if (part.numel()) reduce_scatter(c, part.const_data_ptr(), mine.mutable_data_ptr(), mine.numel(), wire_type(part), HCCL_REDUCE_SUM);
    output = mine;
  });
}

// The rows of all ranks, one rank after another, times x2; the rows themselves too where the caller made room for them.
ACLNN(AllGatherMatmul, Tensor x1, Tensor x2, Tensor bias, Text group, int64_t gather_index, int64_t comm_turn, int64_t stream_mode, Out output, Out gather_out) {
  require_product(x1, x2, bias, output, 2);
  require_split(x1, bias);
  require(gather_index == 0, "gather_index ", gather_index, "; expected 0, the left matrix is gathered");
  require_modes("sum", comm_turn, stream_mode);
  Communicator& of_group = require_group(group, {2, 4, 8});
  int64_t rows = x1.size(0) * of_group.size();
  require_shape(*output, "output", {rows, x2.size(1)});
  bool kept = gather_out && gather_out->numel();
  if (kept) {
    require_same_dtype(x1, "x1", *gather_out, "gather_out");
    require_shape(*gather_out, "gather_out", {rows, x1.size(1)});
  }
  return exchange(of_group, [=](Communicator& c) {
    Tensor all = at::empty({rows, x1.size(1)}, x1.scalar_type());
    if (x1.numel()) all_gather(c, x1.const_data_ptr(), all.mutable_data_ptr(), x1.numel(), wire_type(x1));
    output = product(all, x2);
    if (kept) gather_out = all;
  });
}

}  // namespace emulator
