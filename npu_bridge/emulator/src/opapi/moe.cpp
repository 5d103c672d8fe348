// Routing of tokens to experts: gating, and carrying rows to their experts and back. T tokens, D width, E experts, k experts a token.
#include <cmath>

#include "opapi/operator.h"

namespace emulator {

// ---- gating ----------------------------------------------------------------------------------------------------------------------------

// Largest first, the lower expert among equals.
static std::pair<Tensor, Tensor> largest(const Tensor& scores, int64_t k) {
  auto [values, indices] = at::sort(scores, std::optional<bool>(true), -1, true);
  return {values.slice(-1, 0, k), indices.slice(-1, 0, k)};
}

// row_idx numbers the chosen slots column by column: slot (t, j) is j * T + t.
ACLNN(MoeGatingTopKSoftmax, Tensor x, Tensor finished, int64_t k, Out y, Out expert_idx, Out row_idx) {
  require_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16});
  require(x.dim() == 2 || x.dim() == 3, "x = ", describe(x), "; expected 2 or 3 dimensions");
  require(k >= 1 && k <= x.size(-1), "k = ", k, " of ", x.size(-1), " experts");
  require_absent(finished, "finished");
  return [=] {
    auto [values, indices] = largest(at::softmax(x.to(at::kFloat), -1), k);
    y = values;
    expert_idx = indices;
    int64_t tokens = row_idx->numel() / k;
    row_idx = at::arange(tokens * k).view({k, tokens}).t().reshape(row_idx->sizes());
  };
}

// norm_type 0: softmax, 1: sigmoid. Groups compete by their two best scores (select mode 1) or their best (0).
ACLNN(MoeGatingTopK, Tensor x, Tensor bias, int64_t k, int64_t k_group, int64_t group_count, int64_t group_select_mode, int64_t renorm, int64_t norm_type,
      bool out_flag, double routed_scaling_factor, double eps, Out y, Out expert_idx, Out out) {
  require_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16});
  require_same_dtype(x, "x", bias, "bias");
  require(x.dim() == 2, "x = ", describe(x), "; expected [T, E]");
  int64_t experts = x.size(1);
  require_shape(bias, "bias", {experts});
  require(group_count >= 1 && experts % group_count == 0, experts, " experts in ", group_count, " groups");
  require(k_group >= 1 && k_group <= group_count, "k_group ", k_group, " of ", group_count, " groups");
  require(k >= 1 && k <= experts / group_count * k_group, "k = ", k, " of ", experts / group_count * k_group, " experts in the chosen groups");
  require(group_select_mode == 0 || (group_select_mode == 1 && (group_count == 1 || experts / group_count > 2)), "group_select_mode ", group_select_mode,
          " with ", experts / group_count, " experts a group; mode 1 needs more than 2");
  require(renorm == 0 && (norm_type == 0 || norm_type == 1), "renorm ", renorm, " and norm_type ", norm_type, "; expected 0, and 0 (softmax) or 1 (sigmoid)");
  return [=] {
    Tensor scores = norm_type == 1 ? at::sigmoid(x.to(at::kFloat)) : at::softmax(x.to(at::kFloat), -1);
    Tensor choice = bias.defined() ? scores + bias.to(at::kFloat) : scores;
    if (group_count > 1) {
      Tensor grouped = choice.unflatten(1, {group_count, -1});
      Tensor strength = group_select_mode == 1 ? largest(grouped, 2).first.sum(-1) : grouped.amax(-1);
      Tensor kept = at::zeros_like(strength, at::kBool).scatter_(1, largest(strength, k_group).second, true);
      choice = grouped.masked_fill(kept.logical_not().unsqueeze(-1), -INFINITY).flatten(1);
    }
    Tensor indices = largest(choice, k).second, weights = scores.gather(1, indices);
    if (norm_type == 1) weights = weights / (weights.sum(-1, true) + eps);
    y = weights * routed_scaling_factor;
    expert_idx = indices;
    if (out_flag) out = scores;
  };
}

// ---- carrying rows ---------------------------------------------------------------------------------------------------------------------

static int64_t copies(const Tensor& indices) { return indices.dim() == 1 ? 1 : indices.size(1); }
static void require_unpadded(bool padded) { require(!padded, "padded_mode has no emulation"); }

// sorted_indices[i]: where the i-th (token, choice) pair lies among the sorted rows. Rows past the output are dropped.
ACLNN(MoeTokenPermute, Tensor tokens, Tensor indices, int64_t num_out_tokens, bool padded_mode, Out permuted_tokens, Out sorted_indices) {
  require_unpadded(padded_mode);
  require_dtype(indices, "indices", {at::kInt, at::kLong});
  require(tokens.dim() == 2 && indices.size(0) == tokens.size(0), "indices = ", describe(indices), " for tokens = ", describe(tokens));
  require(copies(indices) <= 512, copies(indices), " experts a token; at most 512");
  return [=] {
    Tensor order = at::argsort(indices.reshape({-1}), true, 0, false);
    Tensor rows = at::floor_divide(order, copies(indices)).slice(0, 0, permuted_tokens->size(0));
    permuted_tokens = at::index_select(tokens, 0, rows);
    sorted_indices = at::empty_like(order).scatter_(0, order, at::arange(order.numel()));
  };
}

// The rows that pairs refer to, zeros for dropped ones.
static Tensor rows_of(const Tensor& rows, const Tensor& sorted_indices) {
  Tensor i = sorted_indices.to(at::kLong);
  Tensor kept = i < rows.size(0);
  if (rows.size(0) == 0) return at::zeros({i.numel(), rows.size(1)}, at::kFloat);
  return at::index_select(rows.to(at::kFloat), 0, i.clamp_max(rows.size(0) - 1)) * kept.unsqueeze(1);
}

ACLNN(MoeTokenPermuteGrad, Tensor grad, Tensor sorted_indices, int64_t top_k, bool padded_mode, Out grad_tokens) {
  require_unpadded(padded_mode);
  require(top_k >= 1 && sorted_indices.numel() % top_k == 0, "sorted_indices = ", describe(sorted_indices), " for ", top_k, " experts a token");
  return [=] { grad_tokens = rows_of(grad, sorted_indices).view({-1, top_k, grad.size(1)}).sum(1); };
}

static int64_t require_pairs(const Tensor& sorted_indices, const Tensor& probs) {
  int64_t k = probs.defined() ? probs.size(1) : 1;
  require(sorted_indices.dim() == 1 && sorted_indices.numel() % k == 0, "sorted_indices = ", describe(sorted_indices), " for ", k, " experts a token");
  require(!probs.defined() || probs.numel() == sorted_indices.numel(), "probs = ", describe(probs), " for sorted_indices = ", describe(sorted_indices));
  return k;
}

ACLNN(MoeTokenUnpermute, Tensor permuted_tokens, Tensor sorted_indices, Tensor probs, bool padded_mode, Ints restore_shape, Out out) {
  require_unpadded(padded_mode);
  require_dtype(sorted_indices, "sorted_indices", {at::kInt, at::kLong});
  require_pairs(sorted_indices, probs);
  return [=] {
    int64_t k = probs.defined() ? probs.size(1) : 1;
    Tensor rows = rows_of(permuted_tokens, sorted_indices).view({-1, k, permuted_tokens.size(1)});
    out = (probs.defined() ? rows * probs.to(at::kFloat).unsqueeze(2) : rows).sum(1);
  };
}
ACLNN(MoeTokenUnpermuteGrad, Tensor permuted_tokens, Tensor grad, Tensor sorted_indices, Tensor probs, bool padded_mode, Ints restore_shape, Out grad_permuted,
      Out grad_probs) {
  require_unpadded(padded_mode);
  require_pairs(sorted_indices, probs);
  return [=] {
    int64_t k = probs.defined() ? probs.size(1) : 1, width = grad.size(1);
    Tensor spread = grad.to(at::kFloat).unsqueeze(1).expand({grad.size(0), k, width});
    Tensor rows = probs.defined() ? spread * probs.to(at::kFloat).unsqueeze(2) : spread;
    Tensor i = sorted_indices.to(at::kLong), kept = i < grad_permuted->size(0);
    Tensor sums = at::zeros({grad_permuted->size(0), width}, at::kFloat);
    sums.index_add_(0, i.masked_select(kept), rows.reshape({-1, width}).index_select(0, kept.nonzero().flatten()));
    grad_permuted = sums;
    if (probs.defined()) grad_probs = (spread * rows_of(permuted_tokens, sorted_indices).view({-1, k, width})).sum(2);
  };
}

}  // namespace emulator
