// Products of groups of rows with a matrix each. Bodies in float32, rounded once to the output's dtype.
//
// group_type -1: lists of separate products; 0: rows of x are split (forward, gradient of x); 2: the inner dimension is split
// (gradient of the weights). group_list_type 0: ends of the groups, 1: their sizes.
#include <ATen/core/Formatting.h>

#include <cmath>

#include "opapi/operator.h"

namespace emulator {

namespace {

struct Groups {
  Tensors x, weight, bias;
  Tensor list;
  int64_t split_item, type, list_type;
  Outs out;
};

std::vector<int64_t> ends_of(const Tensor& list, int64_t list_type, int64_t rows) {
  Tensor whole = list.to(at::kLong).contiguous();
  std::vector<int64_t> ends;
  int64_t end = 0;
  for (int64_t i = 0; i < whole.numel(); i++) {
    int64_t value = whole.const_data_ptr<int64_t>()[i];
    int64_t next = list_type == 0 ? value : end + value;
    TORCH_CHECK(next >= end && next <= rows, "group_list ", list.flatten(), " does not split ", rows, " rows");
    ends.push_back(end = next);
  }
  return ends;
}

Tensor wide(const Tensor& t) { return t.to(at::kFloat); }

void require_groups(const Groups& g) {
  require(g.type == -1 || g.type == 0 || g.type == 2, "group_type ", g.type, "; expected -1, 0 or 2");
  require(g.list_type == 0 || g.list_type == 1, "group_list_type ", g.list_type, " has no emulation; 0 (ends) and 1 (sizes) have");
  require(!g.x.empty() && !g.weight.empty() && !g.out.empty(), "empty lists");
  for (const Tensor& x : g.x) {
    require_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16});
    for (const Tensor& w : g.weight) require_same_dtype(x, "x", w, "weight");
  }
  if (g.type == -1) {
    require(g.x.size() == g.weight.size() && g.x.size() == g.out.size(), g.x.size(), " x, ", g.weight.size(), " weights, ", g.out.size(), " outputs");
    require(!g.list.defined() || g.list.numel() == 0, "group_list has no meaning for separate products (group_type -1)");
    for (size_t i = 0; i < g.x.size(); i++) require(g.x[i].size(-1) == g.weight[i].size(-2), "x = ", describe(g.x[i]), " and weight = ", describe(g.weight[i]), " do not chain");
    return;
  }
  require(g.x.size() == 1 && g.x[0].dim() == 2, "x must be one matrix for group_type ", g.type);
  require(g.list.defined() && g.list.dim() == 1, "group_list is missing");
  require_dtype(g.list, "group_list", {at::kLong, at::kInt});
  require(g.split_item == 2 || g.split_item == 3, "split_item ", g.split_item, "; one output needs 2 or 3");
  require(g.weight.size() == 1, "several weights with group_type ", g.type, " have no emulation; pass one tensor [E, K, N]");
  const Tensor &x = g.x[0], &w = g.weight[0];
  if (g.type == 0) {
    require(w.dim() == 3 && w.size(0) == g.list.numel(), "weight = ", describe(w), " for ", g.list.numel(), " groups");
    require(x.size(1) == w.size(1), "x = ", describe(x), " and weight = ", describe(w), " do not chain");
    return;
  }
  require(w.dim() == 2 && x.size(1) == w.size(0), "x = ", describe(x), " and weight = ", describe(w), " do not share the dimension that is split");
  require(g.bias.empty() || !g.bias[0].defined() || g.bias[0].numel() == 0, "bias has no meaning for group_type 2");
}

Work grouped(Groups g) {
  require_groups(g);
  auto bias_of = [](const Groups& g, size_t i) { return g.bias.size() > i && g.bias[i].defined() && g.bias[i].numel() ? g.bias[i] : Tensor(); };
  if (g.type == -1)
    return [=] {
      for (size_t i = 0; i < g.x.size(); i++) {
        Tensor y = at::matmul(wide(g.x[i]), wide(g.weight[i])), b = bias_of(g, i);
        g.out[i] = b.defined() ? y + wide(b) : y;
      }
    };
  return [=] {
    const Tensor &x = g.x[0], &w = g.weight[0], &y = *g.out[0];
    auto ends = ends_of(g.list, g.list_type, x.size(g.type == 0 ? 0 : 1));
    int64_t start = 0;
    for (size_t e = 0; e < ends.size(); e++) {
      int64_t i = static_cast<int64_t>(e);
      if (g.type == 0) {
        Tensor part = at::matmul(wide(x.slice(0, start, ends[e])), wide(w[i])), b = bias_of(g, 0);
        y.slice(0, start, ends[e]).copy_(b.defined() ? part + wide(b[i]) : part);
      } else {
        y[i].copy_(at::matmul(wide(x.slice(1, start, ends[e])), wide(w.slice(0, start, ends[e]))));
      }
      start = ends[e];
    }
    // What the kernel leaves in rows of no group is not defined.
    if (g.type == 0 && start < y.size(0)) y.slice(0, start).fill_(NAN);
  };
}

void require_plain(const Tensors& scale, const Tensors& offset, const Tensors& antiquant_scale, const Tensors& antiquant_offset, const Tensors& per_token,
                   const Tensors& activation, int64_t act) {
  require_absent(scale, "scale");
  require_absent(offset, "offset");
  require_absent(antiquant_scale, "antiquant_scale");
  require_absent(antiquant_offset, "antiquant_offset");
  require_absent(per_token, "per_token_scale");
  require_absent(activation, "activation_input");
  require(act == 0, "act_type ", act, " has no emulation");
}

}  // namespace

ACLNN(GroupedMatmulV4, Tensors x, Tensors weight, Tensors bias, Tensors scale, Tensors offset, Tensors antiquant_scale, Tensors antiquant_offset,
      Tensors per_token_scale, Tensor group_list, Tensors activation_input, Tensors activation_scale, Tensors activation_offset, int64_t split_item,
      int64_t group_type, int64_t group_list_type, int64_t act_type, Outs out, Outs activation_out, Outs dynamic_scale_out) {
  require_plain(scale, offset, antiquant_scale, antiquant_offset, per_token_scale, activation_input, act_type);
  return grouped({x, weight, bias, group_list, split_item, group_type, group_list_type, out});
}
ACLNN(GroupedMatmulV5, Tensors x, Tensors weight, Tensors bias, Tensors scale, Tensors offset, Tensors antiquant_scale, Tensors antiquant_offset,
      Tensors per_token_scale, Tensor group_list, Tensors activation_input, Tensors activation_scale, Tensors activation_offset, int64_t split_item,
      int64_t group_type, int64_t group_list_type, int64_t act_type, Ints tuning, Outs out, Outs activation_out, Outs dynamic_scale_out) {
  require_plain(scale, offset, antiquant_scale, antiquant_offset, per_token_scale, activation_input, act_type);
  return grouped({x, weight, bias, group_list, split_item, group_type, group_list_type, out});
}

// self (float32) += the gradient of the weights.
static Work grouped_add(Tensor x, Tensor weight, Tensor list, Tensor self, bool transpose_x, bool transpose_weight, int64_t type, int64_t list_type) {
  require(transpose_x && !transpose_weight && type == 2, "transpose_x ", transpose_x, ", transpose_weight ", transpose_weight, ", group_type ", type,
          "; the kernel takes true, false, 2");
  require_dtype(x, "x", {at::kHalf, at::kBFloat16, at::kFloat});
  require_same_dtype(x, "x", weight, "weight");
  require_dtype(self, "self", {at::kFloat});
  require(x.dim() == 2 && weight.dim() == 2 && x.size(0) == weight.size(0), "x = ", describe(x), " and weight = ", describe(weight), " have rows apart");
  return [=] {
    auto ends = ends_of(list, list_type, x.size(0));
    Tensor sums = self.view({static_cast<int64_t>(ends.size()), x.size(1), weight.size(1)});
    int64_t start = 0;
    for (size_t e = 0; e < ends.size(); e++) {
      sums[static_cast<int64_t>(e)].add_(at::matmul(wide(x.slice(0, start, ends[e])).t(), wide(weight.slice(0, start, ends[e]))));
      start = ends[e];
    }
  };
}
ACLNN(GroupedMatmulAdd, Tensor x, Tensor weight, Tensor group_list, Tensor self, bool transpose_x, bool transpose_weight, int64_t group_type) {
  return grouped_add(x, weight, group_list, self, transpose_x, transpose_weight, group_type, 0);
}
ACLNN(GroupedMatmulAddV2, Tensor x, Tensor weight, Tensor group_list, Tensor self, bool transpose_x, bool transpose_weight, int64_t group_type,
      int64_t group_list_type) {
  return grouped_add(x, weight, group_list, self, transpose_x, transpose_weight, group_type, group_list_type);
}

}  // namespace emulator
