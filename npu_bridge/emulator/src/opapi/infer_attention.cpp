// Fused attention for inference, as npu_fused_infer_attention_score (V3) and its v2 (V4) call it, in float32 from the formula:
//
//   p = softmax(scale * q k^T + pse, where the mask allows),  out = p v,  lse = log(sum(exp(logits)))
//
// B rows, S positions (TND: T positions of all sequences one after another), N query heads, K key heads, D head dim. Keys and values may lie
// in blocks that a table names (paged attention). The rules are those of the operator's document for the Atlas A2, without its
// quantised forms, split rotary parts, shared prefixes, padding on the left and lists of several key tensors: these are refused.
#include <cmath>

#include "opapi/attention.h"

namespace emulator {

namespace {

struct Inference {
  Tensor q, k, v, pse, mask, table;
  Ints q_lengths, k_lengths;
  int64_t heads, kv_heads, pre, next, mode, inner_precise, block_size;
  double scale;
  Text layout;
  bool want_lse;

  bool joined() const { return layout == "TND" || layout == "NTD_TND"; }  // sequences one after another
  bool paged() const { return table.defined() && table.numel() > 0; }
  Text in_layout() const { return layout == "BNSD_BSND" ? "BNSD" : layout; }
};

// ---- layouts ---------------------------------------------------------------------------------------------------------------------------

// (B, N, S, D); the joined layouts as one row.
Tensor rows_of(const Inference& in, const Tensor& x, int64_t heads) { return in.layout == "NTD_TND" ? x.unsqueeze(0) : to_bnsd(x, in.in_layout(), heads); }

// Keys or values of one row from their blocks, (K, S, D): blocks are (positions, K * D) or (K, positions, D).
Tensor from_blocks(const Inference& in, const Tensor& blocks, int64_t row, int64_t places) {
  int64_t count = (places + in.block_size - 1) / in.block_size;
  Tensor numbers = in.table[row].slice(0, 0, count).to(at::kLong);
  if (count) {
    Tensor low = numbers.min(), high = numbers.max();
    TORCH_CHECK(low.item<int64_t>() >= 0 && high.item<int64_t>() < blocks.size(0), "block_table names block ", low.item<int64_t>(), " or ", high.item<int64_t>(), " of ", blocks.size(0));
  }
  Tensor chosen = blocks.index_select(0, numbers);
  if (blocks.dim() == 3) return chosen.flatten(0, 1).slice(0, 0, places).unflatten(1, {in.kv_heads, -1}).transpose(0, 1);
  return chosen.transpose(0, 1).flatten(1, 2).slice(1, 0, places);
}

// ---- rules -----------------------------------------------------------------------------------------------------------------------------

void require_ends(const Ints& ends, const char* name, int64_t places) {
  int64_t before = 0;
  for (int64_t end : ends) {
    require(end >= before, name, " = ", at::IntArrayRef(ends), " are ends of sequences: they must not fall");
    before = end;
  }
  require(before <= places, name, " ends at ", before, ", the tensor has ", places, " places");
}

// One number for all rows, or one a row; more than rows are allowed and not read.
void require_each(const Ints& lengths, const char* name, int64_t rows, int64_t most) {
  if (!lengths.given || lengths.empty()) return;
  require(lengths.size() == 1 || static_cast<int64_t>(lengths.size()) >= rows, name, " has ", lengths.size(), " numbers for ", rows, " rows; expected 1 or one a row");
  for (int64_t n : lengths) require(n >= 0 && n <= most, name, " = ", at::IntArrayRef(lengths), "; expected 0 to ", most);
}
int64_t length_of(const Ints& lengths, int64_t row, int64_t whole) {
  if (!lengths.given || lengths.empty()) return whole;
  return lengths.size() == 1 ? lengths[0] : lengths[row];
}

void require_blocks(const Inference& in, int64_t rows) {
  require(in.layout != "NTD_TND", "block_table in layout NTD_TND");
  require_dtype(in.table, "block_table", {at::kInt});
  require(in.table.dim() == 2 && in.table.size(0) == rows, "block_table = ", describe(in.table), "; expected [B, blocks of the longest row] for ", rows, " rows");
  require_shape(in.v, "value", in.k.sizes());
  bool by_head = in.in_layout() == "BNSD" || in.joined();
  require(in.k.dim() == 3 || (in.k.dim() == 4 && by_head), "key = ", describe(in.k), " with block_table in layout ", in.layout, "; expected [blocks, block_size, K * D]",
          by_head ? " or [blocks, K, block_size, D]" : "");
  // Joined sequences: at most 128, in steps of 16; single queries likewise up to 512; several queries a row: multiples of 128.
  bool single = !in.joined() && rows_of(in, in.q, in.heads).size(2) == 1;
  int64_t step = in.joined() || single ? 16 : 128, most = in.joined() ? 128 : 512;
  require(in.block_size >= step && in.block_size <= most && in.block_size % step == 0, "block_size ", in.block_size, "; expected a multiple of ", step, " up to ", most);
  require(in.k.size(-2) == in.block_size, "key = ", describe(in.k), " has blocks of ", in.k.size(-2), " places, block_size is ", in.block_size);
  require(in.k.dim() == 4 ? in.k.size(1) == in.kv_heads : in.k.size(2) % in.kv_heads == 0, "key = ", describe(in.k), " for ", in.kv_heads, " key heads");
  require(in.k.dim() == 4 || in.k.size(2) <= 65535, "key = ", describe(in.k), ": K * D above 65535; use [blocks, K, block_size, D]");
  require(in.k_lengths.given && static_cast<int64_t>(in.k_lengths.size()) >= (in.joined() ? rows : 1), "block_table without the lengths of the keys");
  for (int64_t n : in.k_lengths)
    require(n >= 0 && n <= in.table.size(1) * in.block_size, "a row of ", n, " keys needs more than the ", in.table.size(1), " blocks of ", in.block_size, " in block_table");
}

// Rows `rows`, `queries` and `keys` positions; in joined layouts a mask is the compressed triangle or none.
void require_mask(const Inference& in, int64_t rows, int64_t queries, int64_t keys) {
  require(in.mode >= 0 && in.mode <= 4, "sparse_mode ", in.mode, "; fused inference attention knows 0 to 4");
  require(in.inner_precise >= 0 && in.inner_precise <= 3, "inner_precise ", in.inner_precise, "; expected 0 to 3");
  require_dtype(in.mask, "atten_mask", {at::kBool, at::kByte, at::kChar});
  bool given = in.mask.defined() && in.mask.numel();
  if (in.joined()) {
    require((in.mode == 0 && !given) || ((in.mode == 3 || in.mode == 4) && given), "sparse_mode ", in.mode, given ? " with" : " without", " atten_mask in layout ", in.layout,
            "; expected 0 without, or 3 or 4 with the compressed triangle");
  } else if (queries == 1) {  // the mode means nothing then
    if (!given) return;
    auto s = in.mask.sizes();
    bool fits = s.size() >= 2 && s.size() <= 4 && s[0] == rows && in.mask.numel() == rows * s.back() && (in.paged() ? s.back() >= keys : s.back() == keys);
    require(fits, "atten_mask = ", describe(in.mask), " for ", rows, " rows of one query and ", keys, " keys; expected [B, Skv], [B, 1, Skv] or [B, 1, 1, Skv]");
    return;
  } else {
    require(in.mode == 0 || given, "sparse_mode ", in.mode, " without atten_mask");
  }
  if (!given) return;
  auto s = in.mask.sizes();
  if (in.mode >= 2) {
    bool square = s.size() >= 2 && s.size() <= 4 && s.end()[-1] == kCompressed && s.end()[-2] == kCompressed && in.mask.numel() == kCompressed * kCompressed;
    require(square, "atten_mask = ", describe(in.mask), " in sparse_mode ", in.mode, "; expected the compressed triangle [2048, 2048]");
  } else {
    bool places = s.size() >= 2 && s.size() <= 4 && s.end()[-2] == queries && (in.paged() ? s.end()[-1] >= keys : s.end()[-1] == keys);
    bool fits = places && (s.size() == 2 || s[0] == 1 || s[0] == rows) && (s.size() < 4 || s[1] == 1);
    require(fits, "atten_mask = ", describe(in.mask), " for ", rows, " rows, ", queries, " queries and ", keys,
            " keys; expected [Sq, Skv], [1 or B, Sq, Skv] or [1 or B, 1, Sq, Skv]");
  }
  if (in.mode == 0 || in.mode == 4) require(in.pre + in.next >= 0, "pre_tokens ", in.pre, " and next_tokens ", in.next, " leave no band");
}

void require_dims(const Inference& in, int64_t queries, int64_t dq, int64_t dk, int64_t dv) {
  require(dq == dk, "head dims ", dq, " of query and ", dk, " of key");
  if (in.layout == "NTD_TND") {
    require_dtype(in.q, "query", {at::kBFloat16});
    require((dk == 128 || dk == 192) && dv == 128, "head dims ", dk, " of key and ", dv, " of value in layout NTD_TND; expected 128 or 192, and 128");
  } else if (in.joined()) {
    require((dk == dv && dk <= 256) || (dk == 192 && dv == 128), "head dims ", dk, " of key and ", dv, " of value in layout TND; expected the same up to 256, or 192 and 128 or 192");
    bool fast = in.inner_precise == 1 && in.q.scalar_type() == at::kHalf && in.heads == in.kv_heads;
    require(in.inner_precise == 0 || fast, "inner_precise ", in.inner_precise, " in layout TND; expected 0 (or 1 for float16 with as many key heads as query heads)");
  } else {
    require(dk == dv, "head dims ", dk, " of key and ", dv, " of value must be the same");
  }
  require(dk <= 512 && (queries == 1 || dk % 16 == 0), "head dim ", dk, "; expected at most 512", queries == 1 ? "" : " and a multiple of 16");
}

void require_all(Inference& in) {
  require_dtype(in.q, "query", {at::kHalf, at::kBFloat16});
  require_same_dtype(in.q, "query", in.k, "key");
  require_same_dtype(in.q, "query", in.v, "value");
  require_same_dtype(in.q, "query", in.pse, "pse_shift");
  bool known = in.layout == "BSH" || in.layout == "BSND" || in.layout == "BNSD" || in.layout == "BNSD_BSND" || in.joined();
  require(known, "input_layout \"", in.layout, "\" has no emulation; BSH, BSND, BNSD, BNSD_BSND, TND and NTD_TND have");
  int64_t rank = in.joined() || in.layout == "BSH" ? 3 : 4;
  require(in.q.dim() == rank && (in.paged() || (in.k.dim() == rank && in.v.dim() == rank)), "layout ", in.layout, " has ", rank, " dimensions");
  if (in.kv_heads == 0) in.kv_heads = in.heads;
  require(in.heads >= 1 && in.heads <= 256 && in.kv_heads >= 1 && in.heads % in.kv_heads == 0, in.heads, " query heads and ", in.kv_heads,
          " key heads; expected at most 256, the first a multiple of the second");
  require(in.layout != "BSH" || (in.q.size(2) % in.heads == 0 && (in.paged() || (in.k.size(2) % in.kv_heads == 0 && in.v.size(2) % in.kv_heads == 0))),
          "widths of query, key and value do not split into ", in.heads, " and ", in.kv_heads, " heads");
  Tensor q = rows_of(in, in.q, in.heads);
  require(in.layout != "BNSD_BSND" || q.size(2) > 1, "layout BNSD_BSND is for more than one query");
  require(q.size(1) == in.heads, "num_heads ", in.heads, ", but query has ", q.size(1), " heads");
  int64_t rows = in.joined() ? in.q_lengths.size() : q.size(0), queries = q.size(2);
  require(rows <= 65536, rows, " rows; at most 65536");
  if (in.joined()) {
    require(!in.q_lengths.empty() && !in.k_lengths.empty() && in.q_lengths.size() == in.k_lengths.size(), "lengths of ", in.q_lengths.size(), " query and ", in.k_lengths.size(),
            " key sequences in layout ", in.layout, "; both are wanted");
    require(rows <= 4096, rows, " sequences; at most 4096");
    require_ends(in.q_lengths, "actual_seq_lengths", queries);
    require(!in.pse.defined() || in.pse.numel() == 0, "pse_shift in layout ", in.layout);
  } else if (queries > 1) {
    require_each(in.q_lengths, "actual_seq_lengths", rows, queries);
  }
  int64_t keys;
  if (in.paged()) {
    require_blocks(in, rows);
    keys = in.table.size(1) * in.block_size;  // a mask covers all positions that a row of the table may name
    int64_t dim = in.k.dim() == 4 ? in.k.size(3) : in.k.size(2) / in.kv_heads;
    require_dims(in, queries, q.size(3), dim, dim);
    if (!in.joined()) require_each(in.k_lengths, "actual_seq_lengths_kv", rows, in.table.size(1) * in.block_size);
  } else {
    Tensor k = rows_of(in, in.k, in.kv_heads), v = rows_of(in, in.v, in.kv_heads);
    require(k.size(1) == in.kv_heads && v.size(1) == in.kv_heads, "num_key_value_heads ", in.kv_heads, ", but key has ", k.size(1), " heads and value ", v.size(1));
    require(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(2) == v.size(2), "query = ", describe(in.q), ", key = ", describe(in.k), " and value = ", describe(in.v));
    keys = k.size(2);
    require_dims(in, queries, q.size(3), k.size(3), v.size(3));
    if (in.joined())
      require_ends(in.k_lengths, "actual_seq_lengths_kv", keys);
    else
      require_each(in.k_lengths, "actual_seq_lengths_kv", rows, keys);
  }
  require_mask(in, rows, queries, keys);
  if (in.pse.defined() && in.pse.numel())
    require(in.pse.dim() == 4 && (in.pse.size(0) == 1 || in.pse.size(0) == rows) && in.pse.size(1) == in.heads && in.pse.size(2) >= queries && in.pse.size(3) >= keys, "pse_shift = ",
            describe(in.pse), "; expected [1 or B, N, Sq or more, Skv or more]");
}

// ---- one row ---------------------------------------------------------------------------------------------------------------------------

// Where nothing is attended, (S, keys), or undefined when all is. Modes 3 and 4 count from the lower right corner of what is there.
Tensor forbidden(const Inference& in, int64_t row, int64_t whole_queries, int64_t queries, int64_t keys) {
  if (!in.mask.defined() || in.mask.numel() == 0) return {};
  if (!in.joined() && whole_queries == 1) return in.mask.reshape({in.mask.size(0), -1})[row].slice(0, 0, keys).unsqueeze(0).to(at::kBool);
  Tensor ahead = at::arange(keys).unsqueeze(0) - at::arange(queries).unsqueeze(1);  // key position - query position
  int64_t corner = keys - queries;
  if (in.mode >= 2) check_compressed(in.mask, in.mode);
  if (in.mode == 2) return ahead > 0;
  if (in.mode == 3) return ahead > corner;
  if (in.mode == 4) return (ahead > in.next + corner).logical_or(ahead < corner - in.pre);
  Tensor mask = in.mask;
  while (mask.dim() > 2) mask = mask[mask.size(0) == 1 ? 0 : row];
  mask = mask.slice(0, 0, queries).slice(1, 0, keys).to(at::kBool);
  return in.mode == 1 ? mask : mask.logical_or((ahead > in.next).logical_or(ahead < -in.pre));
}

struct Result {
  Tensor out, lse;  // (N, S, D) and (N, S, 1)
};

// A query that attends nothing: zeros where the document says that the kernel corrects it (inner_precise 2 and 3, mode 3 with more queries
// than keys, no keys at all), NaN where it does not say.
Result attend(const Inference& in, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pse, const Tensor& banned) {
  Tensor wide = q.to(at::kFloat), keys = repeat_heads(k.to(at::kFloat).unsqueeze(0), in.heads)[0], values = repeat_heads(v.to(at::kFloat).unsqueeze(0), in.heads)[0];
  if (k.size(1) == 0) return {at::zeros({q.size(0), q.size(1), v.size(2)}), at::full({q.size(0), q.size(1), 1}, NAN)};
  Tensor logits = at::matmul(wide, keys.transpose(-1, -2)) * in.scale;
  if (pse.defined()) logits = logits + pse.to(at::kFloat);
  if (banned.defined()) logits = logits.masked_fill(banned, -INFINITY);
  Tensor peak = logits.amax(-1, true), empty = peak == -INFINITY;
  Tensor weights = at::exp(logits - peak), total = weights.sum(-1, true);
  Tensor out = at::matmul(weights / total, values);
  bool mended = (in.inner_precise & 2) || (in.mode == 3 && q.size(1) > k.size(1));
  return {mended ? out.masked_fill(empty, 0) : out, at::log(total) + peak};
}

Work infer_attention(Inference in, Out out, Out lse) {
  require_all(in);
  require(!in.want_lse || lse, "softmax_lse is wanted and has no room");
  return [=] {
    Tensor q = rows_of(in, in.q, in.heads);
    Tensor k = in.paged() ? Tensor() : rows_of(in, in.k, in.kv_heads), v = in.paged() ? Tensor() : rows_of(in, in.v, in.kv_heads);
    int64_t rows = in.joined() ? in.q_lengths.size() : q.size(0), whole = q.size(2), width = in.paged() ? q.size(3) : v.size(3);
    // Positions past a row's length are undefined.
    Tensor all = at::full({q.size(0), in.heads, whole, width}, NAN), all_lse = at::full({q.size(0), in.heads, whole, 1}, NAN);
    for (int64_t row = 0; row < rows; row++) {
      int64_t at_row = in.joined() ? 0 : row, q0 = 0, q1 = whole, k0 = 0, k1;
      if (in.joined()) {
        q0 = row ? in.q_lengths[row - 1] : 0;
        q1 = in.q_lengths[row];
      } else if (whole > 1) {  // for single queries their lengths mean nothing
        q1 = length_of(in.q_lengths, row, whole);
      }
      if (in.joined() && !in.paged()) {
        k0 = row ? in.k_lengths[row - 1] : 0;
        k1 = in.k_lengths[row];
      } else {
        k1 = in.paged() && in.joined() ? in.k_lengths[row] : length_of(in.k_lengths, row, in.paged() ? 0 : k.size(2));
      }
      if (q1 <= q0) continue;
      TORCH_CHECK(!in.joined() || in.mode != 3 || q1 - q0 <= k1 - k0, "sequence ", row, " has ", q1 - q0, " queries and ", k1 - k0, " keys; sparse_mode 3 in layout ", in.layout,
                  " wants no more queries than keys");
      Tensor keys = in.paged() ? from_blocks(in, in.k, row, k1) : k[at_row].slice(1, k0, k1);
      Tensor values = in.paged() ? from_blocks(in, in.v, row, k1) : v[at_row].slice(1, k0, k1);
      Tensor pse = in.pse.defined() && in.pse.numel() ? in.pse[in.pse.size(0) == 1 ? 0 : row].slice(1, q0, q1).slice(2, 0, k1) : Tensor();
      Result r = attend(in, q[at_row].slice(1, q0, q1), keys, values, pse, forbidden(in, row, whole, q1 - q0, k1 - k0));
      all[at_row].slice(1, q0, q1).copy_(r.out);
      all_lse[at_row].slice(1, q0, q1).copy_(r.lse);
    }
    if (in.joined()) {
      out = all[0].transpose(0, 1);
      if (in.want_lse) lse = all_lse[0].transpose(0, 1);
    } else {
      write_from_bnsd(out, all, in.layout == "BNSD_BSND" ? "BSND" : in.layout);
      if (in.want_lse) lse = all_lse;
    }
  };
}

// A list of one tensor; several are rows of their own lengths.
Tensor only(const Tensors& all, const char* name) {
  require(all.size() == 1 && all[0].defined(), name, " is a list of ", all.size(), " tensors; one has emulation");
  return all[0];
}

void require_plain(std::initializer_list<std::pair<const Tensor*, const char*>> extras, std::initializer_list<int64_t> modes) {
  for (auto& [tensor, name] : extras) require_absent(*tensor, name);
  for (int64_t mode : modes) require(mode == 0, "a quantisation mode of ", mode, " has no emulation");
}

}  // namespace

ACLNN(FusedInferAttentionScoreV3, Tensor query, Tensors key, Tensors value, Tensor pse_shift, Tensor atten_mask, Ints actual_seq_lengths, Ints actual_seq_lengths_kv,
      Tensor dequant_scale1, Tensor quant_scale1, Tensor dequant_scale2, Tensor quant_scale2, Tensor quant_offset2, Tensor antiquant_scale, Tensor antiquant_offset,
      Tensor block_table, Tensor query_padding_size, Tensor kv_padding_size, Tensor key_antiquant_scale, Tensor key_antiquant_offset, Tensor value_antiquant_scale,
      Tensor value_antiquant_offset, Tensor key_shared_prefix, Tensor value_shared_prefix, Ints actual_shared_prefix_len, Tensor query_rope, Tensor key_rope,
      Tensor key_rope_antiquant_scale, int64_t num_heads, double scale, int64_t pre_tokens, int64_t next_tokens, Text input_layout, int64_t num_key_value_heads,
      int64_t sparse_mode, int64_t inner_precise, int64_t block_size, int64_t antiquant_mode, bool softmax_lse_flag, int64_t key_antiquant_mode,
      int64_t value_antiquant_mode, Out attention_out, Out softmax_lse) {
  require_plain({{&dequant_scale1, "dequant_scale1"}, {&quant_scale1, "quant_scale1"}, {&dequant_scale2, "dequant_scale2"}, {&quant_scale2, "quant_scale2"},
                 {&quant_offset2, "quant_offset2"}, {&antiquant_scale, "antiquant_scale"}, {&antiquant_offset, "antiquant_offset"},
                 {&query_padding_size, "query_padding_size"}, {&kv_padding_size, "kv_padding_size"}, {&key_antiquant_scale, "key_antiquant_scale"},
                 {&key_antiquant_offset, "key_antiquant_offset"}, {&value_antiquant_scale, "value_antiquant_scale"}, {&value_antiquant_offset, "value_antiquant_offset"},
                 {&key_shared_prefix, "key_shared_prefix"}, {&value_shared_prefix, "value_shared_prefix"}, {&query_rope, "query_rope"}, {&key_rope, "key_rope"},
                 {&key_rope_antiquant_scale, "key_rope_antiquant_scale"}},
                {antiquant_mode, key_antiquant_mode, value_antiquant_mode});
  return infer_attention({query, only(key, "key"), only(value, "value"), pse_shift, atten_mask, block_table, actual_seq_lengths, actual_seq_lengths_kv, num_heads,
                          num_key_value_heads, pre_tokens, next_tokens, sparse_mode, inner_precise, block_size, scale, input_layout, softmax_lse_flag},
                         attention_out, softmax_lse);
}
ACLNN(FusedInferAttentionScoreV4, Tensor query, Tensors key, Tensors value, Tensor pse_shift, Tensor atten_mask, Ints actual_seq_qlen, Ints actual_seq_kvlen,
      Tensor dequant_scale1, Tensor quant_scale1, Tensor dequant_scale2, Tensor quant_scale_out, Tensor quant_offset_out, Tensor antiquant_scale,
      Tensor antiquant_offset, Tensor block_table, Tensor query_padding_size, Tensor kv_padding_size, Tensor dequant_scale_key, Tensor dequant_offset_key,
      Tensor dequant_scale_value, Tensor dequant_offset_value, Tensor key_shared_prefix, Tensor value_shared_prefix, Ints actual_shared_prefix_len, Tensor query_rope,
      Tensor key_rope, Tensor dequant_scale_key_rope, Tensor dequant_scale_query, Tensor learnable_sink, int64_t num_query_heads, double softmax_scale,
      int64_t pre_tokens, int64_t next_tokens, Text input_layout, int64_t num_key_value_heads, int64_t sparse_mode, int64_t inner_precise, int64_t block_size,
      int64_t antiquant_mode, bool return_softmax_lse, int64_t key_quant_mode, int64_t value_quant_mode, int64_t query_quant_mode, Out attention_out, Out softmax_lse) {
  require_plain({{&dequant_scale1, "dequant_scale1"}, {&quant_scale1, "quant_scale1"}, {&dequant_scale2, "dequant_scale2"}, {&quant_scale_out, "quant_scale_out"},
                 {&quant_offset_out, "quant_offset_out"}, {&antiquant_scale, "antiquant_scale"}, {&antiquant_offset, "antiquant_offset"},
                 {&query_padding_size, "query_padding_size"}, {&kv_padding_size, "kv_padding_size"}, {&dequant_scale_key, "dequant_scale_key"},
                 {&dequant_offset_key, "dequant_offset_key"}, {&dequant_scale_value, "dequant_scale_value"}, {&dequant_offset_value, "dequant_offset_value"},
                 {&key_shared_prefix, "key_shared_prefix"}, {&value_shared_prefix, "value_shared_prefix"}, {&query_rope, "query_rope"}, {&key_rope, "key_rope"},
                 {&dequant_scale_key_rope, "dequant_scale_key_rope"}, {&dequant_scale_query, "dequant_scale_query"}, {&learnable_sink, "learnable_sink"}},
                {antiquant_mode, key_quant_mode, value_quant_mode, query_quant_mode});
  return infer_attention({query, only(key, "key"), only(value, "value"), pse_shift, atten_mask, block_table, actual_seq_qlen, actual_seq_kvlen, num_query_heads,
                          num_key_value_heads, pre_tokens, next_tokens, sparse_mode, inner_precise, block_size, softmax_scale, input_layout, return_softmax_lse},
                         attention_out, softmax_lse);
}

}  // namespace emulator
