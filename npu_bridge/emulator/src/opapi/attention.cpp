// Flash attention for training, forward and gradient, as npu_fusion_attention (v1, v2, v3) calls it, in float32 from the formula:
//
//   p = softmax(scale * q k^T + pse, where the mask allows),  out = dropout(p) v
//
// B rows, S positions (TND: T positions of all sequences one after another), N query heads, K key heads, G = N / K, D head dim.
// The rules of sparse modes and shapes are those of the operator's document.
#include <cmath>

#include "opapi/attention.h"

namespace emulator {

// ---- shared with attention for inference (attention.h) -------------------------------------------------------------------------------

// (B, N, S, D), from the layout given. `heads` splits the joined dimension of BSH and SBH.
Tensor to_bnsd(const Tensor& x, const Text& layout, int64_t heads) {
  if (layout == "BNSD") return x;
  if (layout == "BSND") return x.transpose(1, 2);
  if (layout == "BSH") return x.unflatten(2, {heads, -1}).transpose(1, 2);
  if (layout == "SBH") return x.unflatten(2, {heads, -1}).permute({1, 2, 0, 3});
  return x.transpose(0, 1).unsqueeze(0);  // one sequence of TND
}
void write_from_bnsd(const Out& out, const Tensor& x, const Text& layout) {
  if (!out) return;
  if (layout == "BNSD") out = x;
  if (layout == "BSND") out = x.transpose(1, 2);
  if (layout == "BSH") out = x.transpose(1, 2).flatten(2);
  if (layout == "SBH") out = x.permute({2, 0, 1, 3}).flatten(2);
}
Tensor repeat_heads(const Tensor& x, int64_t heads) { return x.size(1) == heads ? x : x.repeat_interleave(heads / x.size(1), 1); }

// What the kernel reads of a compressed mask: a wrong one must not pass.
void check_compressed(const Tensor& mask, int64_t mode) {
  Tensor triangle = mask.reshape({-1, kCompressed}).to(at::kBool);
  for (int64_t row : {int64_t{0}, int64_t{1023}, kCompressed - 1})
    TORCH_CHECK(triangle[row].equal(at::arange(kCompressed) > row), "atten_mask is not the upper triangle (true above the diagonal) that sparse_mode ", mode, " wants");
  if (mode != kCompressedPrefix) return;
  for (int64_t row : {kCompressed, kCompressed + kCompressed / 2 - 1})
    TORCH_CHECK(triangle[row].equal(at::arange(kCompressed) >= kCompressed / 2), "the lower 1024 rows of atten_mask in sparse_mode 6 must be false in their left half and true in the right");
}

namespace {

struct Options {
  double scale, keep;
  int64_t pre, next, heads, inner_precise, mode;
  Text layout;
  Ints prefix, ends_q, ends_k;
  bool stats_as_input = false;  // TND only: statistics (T, N, 8) in the order of the input instead of (N, S, 8) a sequence
};
struct Inputs {
  Tensor q, k, v, pse, drop, mask, sink;
};

bool is_tnd(const Options& o) { return o.layout == "TND"; }

int64_t key_heads(const Inputs& in, const Options& o) {
  if (o.layout == "BNSD") return in.k.size(1);
  if (o.layout == "BSND") return in.k.size(2);
  if (is_tnd(o)) return in.k.size(1);
  return in.k.size(2) / (in.q.size(2) / o.heads);
}

// ---- rules ---------------------------------------------------------------------------------------------------------------------------

void require_lengths(const Ints& ends, const char* name, int64_t places) {
  int64_t before = 0;
  bool over = false;  // zeros at the end: rows that take no part
  for (int64_t end : ends) {
    over = over || (end == 0 && before > 0);
    require(over ? end == 0 : end >= before, name, " = ", at::IntArrayRef(ends), " are ends of sequences: they must not fall");
    if (!over) before = end;
  }
  require(before <= places, name, " ends at ", before, ", the tensor has ", places, " places");
}

// Calls body(number, query positions, key positions) for each sequence of TND; those without query positions take no part.
template <class Body>
void each_length(const Options& o, Body body) {
  int64_t q = 0, k = 0;
  for (size_t i = 0; i < o.ends_q.size(); i++) {
    if (o.ends_q[i] > q) body(i, o.ends_q[i] - q, o.ends_k[i] - k);
    q = std::max(q, o.ends_q[i]);
    k = std::max(k, o.ends_k[i]);
  }
}

// The sequence that was cut: the last one in mode 7, the first one in mode 8. It is a band, the others are triangles.
size_t cut_sequence(const Options& o) {
  size_t found = o.ends_q.size();
  each_length(o, [&](size_t i, int64_t, int64_t) {
    if (o.mode == kLastIsBand || found == o.ends_q.size()) found = i;
  });
  return found;
}

// Modes 5 and 6: keys before prefix[row] are seen by every query, the others as in mode 3.
void require_prefix(const Options& o, int64_t rows, int64_t queries, int64_t keys) {
  require(o.prefix.given && static_cast<int64_t>(o.prefix.size()) == rows, "sparse_mode ", o.mode, " with ", o.prefix.size(), " numbers in prefix; expected one for each of ", rows, " rows");
  auto fits = [&](size_t i, int64_t q, int64_t k) {
    int64_t low = std::max<int64_t>(0, k - q);
    require(o.prefix[i] >= low && o.prefix[i] <= k, "prefix[", i, "] = ", o.prefix[i], " for ", q, " queries and ", k, " keys; expected ", low, " to ", k);
  };
  if (is_tnd(o)) return each_length(o, fits);
  for (int64_t i = 0; i < rows; i++) fits(i, queries, keys);
}

// Modes 7 and 8: a batch of sequences, one of which was cut for other devices. Band limits count from the lower right corner.
void require_cut(const Inputs& in, const Options& o) {
  require(is_tnd(o), "sparse_mode ", o.mode, " is for layout TND, the layout is ", o.layout);
  require(o.pre + o.next >= 0, "pre_tokens ", o.pre, " and next_tokens ", o.next, " leave no band");
  size_t cut = cut_sequence(o), others = 0;
  each_length(o, [&](size_t i, int64_t, int64_t) { others += i != cut; });
  each_length(o, [&](size_t i, int64_t q, int64_t k) {
    if (i != cut) return require(o.mode == kFirstIsBand || q <= k, "sequence ", i, " has ", q, " queries and ", k, " keys; in sparse_mode 7 all but the last have as many keys or more");
    if (!others) return;  // a band alone: any limits that overlap
    require(o.pre >= k, "pre_tokens ", o.pre, " in sparse_mode ", o.mode, "; expected at least the ", k, " keys of the sequence that was cut");
    require(o.next >= q - k && (o.mode == kFirstIsBand || o.next <= 0), "next_tokens ", o.next, " in sparse_mode ", o.mode, "; expected ", q - k,
            o.mode == kLastIsBand ? " to 0" : " or more", " for a cut sequence of ", q, " queries and ", k, " keys");
  });
}

void require_mask(const Inputs& in, const Options& o, int64_t rows, int64_t queries, int64_t keys) {
  require(o.mode >= 0 && o.mode <= 8, "sparse_mode ", o.mode, "; expected 0 to 8");
  if (!in.mask.defined()) {
    require(o.mode == 0, "sparse_mode ", o.mode, " without atten_mask: the kernel would compute full attention without a word; pass the mask");
    return;
  }
  require_dtype(in.mask, "atten_mask", {at::kBool, at::kByte});
  auto shape = in.mask.sizes();
  if (o.mode == kPrefix) {
    require(!is_tnd(o), "sparse_mode 5 with sequences of their own lengths (TND); the compressed prefix, sparse_mode 6, is for them");
    require_prefix(o, rows, queries, keys);
    require(in.mask.dim() == 4 && shape[0] == rows && (shape[1] == 1 || shape[1] == o.heads) && shape[2] == queries && shape[3] == keys, "atten_mask = ", describe(in.mask),
            " in sparse_mode 5; expected [B, 1, Sq, Skv] or [B, N, Sq, Skv]");
    return;
  }
  if (o.mode >= 2) {
    int64_t height = o.mode == kCompressedPrefix ? kCompressed + kCompressed / 2 : kCompressed;
    bool fits = in.mask.dim() >= 2 && shape.end()[-1] == kCompressed && shape.end()[-2] == height && in.mask.numel() == height * kCompressed;
    require(fits, "atten_mask = ", describe(in.mask), " in sparse_mode ", o.mode, "; expected the compressed triangle [", height, ", 2048]");
    if (o.mode == kCompressedPrefix) require_prefix(o, rows, queries, keys);
    if (o.mode >= kLastIsBand) require_cut(in, o);
    return;
  }
  bool fits;
  if (is_tnd(o)) {
    fits = in.mask.dim() == 2 && shape[0] >= queries && shape[1] >= keys;  // longest query and key sequence
  } else if (in.mask.dim() == 2) {
    fits = shape[0] == queries && shape[1] == keys;
  } else {
    fits = in.mask.dim() == 4 && (shape[0] == 1 || shape[0] == rows) && (shape[1] == 1 || (shape[1] == o.heads && shape[0] == rows)) && shape[2] == queries && shape[3] == keys;
  }
  require(fits, "atten_mask = ", describe(in.mask), " for ", rows, " rows, ", o.heads, " heads, ", queries, " queries and ", keys,
          " keys; expected [Sq, Skv], [1, 1, Sq, Skv], [B, 1, Sq, Skv] or [B, N, Sq, Skv]");
}

int64_t longest(const Ints& ends) {
  int64_t before = 0, most = 0;
  for (int64_t end : ends) {
    most = std::max(most, end - before);
    before = std::max(before, end);
  }
  return most;
}

void require_all(const Inputs& in, Options& o) {
  const auto any_float = {at::kFloat, at::kHalf, at::kBFloat16};
  require_dtype(in.q, "query", any_float);
  require_same_dtype(in.q, "query", in.k, "key");
  require_same_dtype(in.q, "query", in.v, "value");
  require_same_dtype(in.q, "query", in.pse, "pse");
  require_dtype(in.sink, "sink", {at::kFloat});
  require(o.layout == "BNSD" || o.layout == "BSND" || o.layout == "BSH" || o.layout == "SBH" || is_tnd(o), "input_layout \"", o.layout, "\"");
  int64_t rank = o.layout == "BNSD" || o.layout == "BSND" ? 4 : 3;
  require(in.q.dim() == rank && in.k.dim() == rank && in.v.dim() == rank, "layout ", o.layout, " has ", rank, " dimensions");
  require(o.heads >= 1 && o.heads <= 256, "head_num ", o.heads, "; expected 1 to 256");
  int64_t given = o.layout == "BNSD" || is_tnd(o) ? in.q.size(1) : o.layout == "BSND" ? in.q.size(2) : o.heads;
  require(given == o.heads, "head_num ", o.heads, ", but query has ", given, " heads");
  if (rank == 3 && !is_tnd(o))
    require(in.q.size(2) % o.heads == 0 && in.k.size(2) % (in.q.size(2) / o.heads) == 0, "widths of query and key do not split into ", o.heads, " heads");
  int64_t kv = key_heads(in, o);
  require(kv > 0 && o.heads % kv == 0, o.heads, " query heads are not a multiple of ", kv, " key heads");
  require(o.keep > 0 && o.keep <= 1, "keep_prob ", o.keep, "; expected above 0, at most 1");
  require(o.keep == 1 || in.drop.defined(), "keep_prob ", o.keep, " without a dropout mask");
  require(!in.sink.defined() || in.sink.numel() == o.heads, "sink = ", describe(in.sink), "; expected one number a head");
  if (is_tnd(o)) {
    require(o.ends_q.size() == o.ends_k.size() && !o.ends_q.empty(), "lengths of ", o.ends_q.size(), " query and ", o.ends_k.size(), " key sequences");
    require(o.ends_q.size() <= 1024, o.ends_q.size(), " sequences; at most 1024");
    require_lengths(o.ends_q, "actual_seq_qlen", in.q.size(0));
    require_lengths(o.ends_k, "actual_seq_kvlen", in.k.size(0));
    require(in.k.size(2) == in.q.size(2) && in.v.size(2) <= in.k.size(2) && in.k.size(2) <= 768, "head dims of query, key and value");
    require(in.v.size(0) == in.k.size(0) && in.v.size(1) == kv, "key = ", describe(in.k), " and value = ", describe(in.v));
    require_mask(in, o, o.ends_q.size(), longest(o.ends_q), longest(o.ends_k));
    return;
  }
  Tensor q = to_bnsd(in.q, o.layout, o.heads), k = to_bnsd(in.k, o.layout, kv), v = to_bnsd(in.v, o.layout, kv);
  require(q.size(3) == k.size(3) && v.size(3) <= k.size(3) && k.size(3) <= 768, "head dims ", q.size(3), ", ", k.size(3), ", ", v.size(3),
          " of query, key, value; those of query and key are equal, at most 768, that of value is not larger");
  require(q.size(0) == k.size(0) && k.size(0) == v.size(0), "batches ", q.size(0), ", ", k.size(0), ", ", v.size(0));
  require(k.size(2) == v.size(2), "lengths ", k.size(2), " of key and ", v.size(2), " of value");
  if (in.pse.defined() && in.pse.numel())
    require(in.pse.dim() == 4 && (in.pse.size(0) == 1 || in.pse.size(0) == q.size(0)) && in.pse.size(1) == o.heads && (in.pse.size(2) == 1 || in.pse.size(2) == q.size(2)) &&
                in.pse.size(3) == k.size(2),
            "pse = ", describe(in.pse), "; expected [B or 1, N, Sq or 1, Skv] (the compressed form has no emulation)");
  require_mask(in, o, q.size(0), q.size(2), k.size(2));
}

// ---- one batch of equally long sequences, (B, N, S, D) in float32 ------------------------------------------------------------------------

// Where nothing is attended, or an undefined tensor when all is. Modes 3 to 6 count from the lower right corner.
Tensor forbidden(const Inputs& in, const Options& o, int64_t queries, int64_t keys) {
  if (!in.mask.defined()) return {};
  Tensor ahead = at::arange(keys).unsqueeze(0) - at::arange(queries).unsqueeze(1);  // key position - query position
  int64_t corner = keys - queries;
  if (o.mode >= 2 && o.mode != kPrefix) check_compressed(in.mask, o.mode);
  if (o.mode == kPrefix || o.mode == kCompressedPrefix) {
    Tensor before = at::tensor(at::ArrayRef<int64_t>(o.prefix)).view({-1, 1, 1, 1});  // (B, 1, 1, 1)
    Tensor banned = (ahead > corner).logical_and(at::arange(keys) >= before);
    if (o.mode == kPrefix)
      TORCH_CHECK(in.mask.to(at::kBool).equal(banned.expand(in.mask.sizes())), "atten_mask in sparse_mode 5 is not the triangle from the lower right corner with prefix columns open");
    return banned;
  }
  switch (o.mode) {
    case 2: return ahead > 0;
    case 3: return ahead > corner;
    case 4: return (ahead > o.next + corner).logical_or_(ahead < corner - o.pre);
  }
  Tensor mask = in.mask.to(at::kBool);
  if (is_tnd(o)) mask = mask.slice(0, 0, queries).slice(1, 0, keys);
  return o.mode == 1 ? mask : mask.logical_or((ahead > o.next).logical_or_(ahead < -o.pre));
}

struct Piece {
  Tensor q, k, v;         // float32, key and value with as many heads as the query
  Tensor logits, banned;  // after scale, pse and mask
  Tensor kept;            // dropout factor, or undefined
};

Tensor add_groups(const Tensor& x, int64_t key_heads) { return x.unflatten(1, {key_heads, x.size(1) / key_heads}).sum(2); }

// Bits of the dropout mask, lowest first.
Tensor dropout_factor(const Tensor& bits, int64_t offset, at::IntArrayRef shape, double keep) {
  int64_t count = c10::multiply_integers(shape);
  Tensor bytes = bits.flatten().slice(0, offset / 8, (offset + count + 7) / 8).to(at::kInt);
  Tensor all = at::bitwise_right_shift(bytes.unsqueeze(1), at::arange(8, at::kInt)).bitwise_and(1).flatten();
  return all.slice(0, offset % 8, offset % 8 + count).to(at::kFloat).div_(keep).reshape(shape);
}

Piece prepare(const Inputs& in, const Options& o, const Tensor& q, const Tensor& k, const Tensor& v, int64_t dropped_before) {
  Piece p;
  p.q = q.to(at::kFloat);
  p.k = repeat_heads(k.to(at::kFloat), q.size(1));
  p.v = repeat_heads(v.to(at::kFloat), q.size(1));
  p.logits = at::matmul(p.q, p.k.transpose(-1, -2)).mul_(o.scale);
  if (in.pse.defined() && in.pse.numel()) p.logits.add_(in.pse.to(at::kFloat));
  p.banned = forbidden(in, o, q.size(2), k.size(2));
  if (p.banned.defined()) p.logits = p.logits.masked_fill(p.banned, -INFINITY);
  if (o.keep < 1) p.kept = dropout_factor(in.drop, dropped_before, p.logits.sizes(), o.keep);
  return p;
}

struct Result {
  Tensor out, peak, total;
};

// A row that attends nothing has no softmax. The kernel gives zeros where it knows of such rows (mode 3 with more queries than keys, or
// inner_precise 2); elsewhere its result is undefined, and NaN here.
Result forward(const Piece& p, const Inputs& in, const Options& o) {
  if (!p.k.size(2)) {  // queries of a sequence without keys (equal ends in actual_seq_kvlen) attend nothing either
    Tensor undefined = p.q.new_full({p.q.size(0), p.q.size(1), p.q.size(2), 1}, NAN);
    return {undefined.expand({-1, -1, -1, p.v.size(3)}), undefined, undefined};
  }
  Tensor peak = p.logits.amax(-1, true);
  Tensor sink = in.sink.defined() ? in.sink.reshape({1, -1, 1, 1}) : Tensor();
  if (sink.defined()) peak = at::maximum(peak, sink);
  bool zero_rows = o.inner_precise == 2 || (o.mode == 3 && p.q.size(2) > p.k.size(2));
  Tensor empty = peak == -INFINITY;
  Tensor weights = at::exp(p.logits - (zero_rows ? peak.masked_fill(empty, 0) : peak));
  Tensor total = weights.sum(-1, true);
  if (sink.defined()) total = total + at::exp(sink - peak);
  Tensor probabilities = weights / (zero_rows ? total.masked_fill(empty, 1) : total);
  if (p.kept.defined()) probabilities = probabilities * p.kept;
  return {at::matmul(probabilities, p.v), peak, total};
}

struct Gradients {
  Tensor q, k, v, logits, sink;
};

// From the statistics of the forward pass, like the kernel: exp(logits - peak) / total.
Gradients backward(const Piece& p, const Inputs& in, const Options& o, const Tensor& out, const Tensor& grad, const Tensor& peak, const Tensor& total, int64_t kv) {
  Tensor g = grad.to(at::kFloat);
  Tensor probabilities = at::exp(p.logits - peak) / total;
  if (p.banned.defined()) probabilities = probabilities.masked_fill(p.banned, 0);
  Tensor delta = (g * out.to(at::kFloat)).sum(-1, true);
  Tensor dp = at::matmul(g, p.v.transpose(-1, -2));
  Tensor used = probabilities;
  if (p.kept.defined()) {
    dp = dp * p.kept;
    used = probabilities * p.kept;
  }
  Tensor ds = probabilities * (dp - delta);
  Gradients result;
  result.logits = ds;
  if (in.sink.defined()) result.sink = -(at::exp(in.sink.reshape({1, -1, 1, 1}) - peak) / total * delta).sum({0, 2, 3});
  ds = ds * o.scale;
  result.q = at::matmul(ds, p.k);
  result.k = add_groups(at::matmul(ds.transpose(-1, -2), p.q), kv);
  result.v = add_groups(at::matmul(used.transpose(-1, -2), g), kv);
  return result;
}

// ---- all sequences -----------------------------------------------------------------------------------------------------------------------

// Calls body(options of this one, start and end of the query positions, start and end of the key positions, elements of the dropout mask
// before) for each.
template <class Body>
void each_sequence(const Options& all, Body body) {
  Options o = all;
  size_t cut = all.mode >= kLastIsBand ? cut_sequence(all) : 0;
  int64_t q = 0, k = 0, dropped = 0;
  for (size_t i = 0; i < o.ends_q.size(); i++) {
    if (i > 0 && o.ends_q[i] == 0) break;
    if (all.mode == kCompressedPrefix) o.prefix.assign(1, all.prefix[i]);
    if (all.mode >= kLastIsBand) o.mode = i == cut ? 4 : all.mode == kLastIsBand ? 3 : 2;
    if (o.ends_q[i] > q) body(o, q, o.ends_q[i], k, o.ends_k[i], dropped);
    dropped += o.heads * (o.ends_q[i] - q) * (o.ends_k[i] - k);
    q = o.ends_q[i];
    k = o.ends_k[i];
  }
}

// The statistics of one sequence of TND, (1, N, S, 8), as a view of what the caller holds.
Tensor statistics(const Tensor& all, const Options& o, int64_t start, int64_t end) {
  if (o.stats_as_input) return all.slice(0, start, end).transpose(0, 1).unsqueeze(0);
  int64_t width = all.size(-1);
  return all.view({-1, width}).slice(0, start * o.heads, end * o.heads).view({1, o.heads, end - start, width});
}

Work attention(Inputs in, Options o, Out peak, Out total, Out out) {
  require_all(in, o);
  if (!is_tnd(o))
    return [=] {
      int64_t kv = key_heads(in, o);
      Result r = forward(prepare(in, o, to_bnsd(in.q, o.layout, o.heads), to_bnsd(in.k, o.layout, kv), to_bnsd(in.v, o.layout, kv), 0), in, o);
      write_from_bnsd(out, r.out, o.layout);
      peak = r.peak.expand(peak->sizes());
      total = r.total.expand(total->sizes());
    };
  return [=] {
    each_sequence(o, [&](const Options& o, int64_t q0, int64_t q1, int64_t k0, int64_t k1, int64_t dropped) {
      auto part = [&](const Tensor& x, int64_t a, int64_t b) { return to_bnsd(x.slice(0, a, b), o.layout, 0); };
      Result r = forward(prepare(in, o, part(in.q, q0, q1), part(in.k, k0, k1), part(in.v, k0, k1), dropped), in, o);
      out->slice(0, q0, q1).copy_(r.out[0].transpose(0, 1));
      Tensor p = statistics(*peak, o, q0, q1), t = statistics(*total, o, q0, q1);
      p.copy_(r.peak.expand(p.sizes()));
      t.copy_(r.total.expand(t.sizes()));
    });
  };
}

Work attention_gradient(Inputs in, Options o, Tensor grad, Tensor peak, Tensor total, Tensor out, Out dq, Out dk, Out dv, Out dpse, Out dsink) {
  require_all(in, o);
  require_shape(grad, "dy", out.sizes());
  require_dtype(peak, "softmax_max", {at::kFloat});
  require_dtype(total, "softmax_sum", {at::kFloat});
  require(out.defined(), "attention_in is missing");
  require(peak.numel() == total.numel() && peak.numel() && peak.size(-1) == 8, "softmax_max = ", describe(peak), " and softmax_sum = ", describe(total),
          "; expected eight copies of each statistic");
  if (!is_tnd(o))
    return [=] {
      int64_t kv = key_heads(in, o);
      auto lay = [&](const Tensor& x, int64_t heads) { return to_bnsd(x, o.layout, heads); };
      Piece p = prepare(in, o, lay(in.q, o.heads), lay(in.k, kv), lay(in.v, kv), 0);
      Gradients g = backward(p, in, o, lay(out, o.heads), lay(grad, o.heads), peak.slice(-1, 0, 1), total.slice(-1, 0, 1), kv);
      write_from_bnsd(dq, g.q, o.layout);
      write_from_bnsd(dk, g.k, o.layout);
      write_from_bnsd(dv, g.v, o.layout);
      if (dpse && dpse->numel()) dpse = g.logits.sum_to_size(dpse->sizes());
      if (dsink && dsink->numel()) dsink = g.sink.reshape(dsink->sizes());
    };
  return [=] {
    for (const Out& d : {dq, dk, dv}) d->zero_();  // positions in no sequence
    if (dsink && dsink->numel()) dsink->zero_();
    each_sequence(o, [&](const Options& o, int64_t q0, int64_t q1, int64_t k0, int64_t k1, int64_t dropped) {
      auto part = [&](const Tensor& x, int64_t a, int64_t b) { return to_bnsd(x.slice(0, a, b), o.layout, 0); };
      Piece p = prepare(in, o, part(in.q, q0, q1), part(in.k, k0, k1), part(in.v, k0, k1), dropped);
      Tensor m = statistics(peak, o, q0, q1).slice(-1, 0, 1), t = statistics(total, o, q0, q1).slice(-1, 0, 1);
      Gradients g = backward(p, in, o, part(out, q0, q1), part(grad, q0, q1), m, t, in.k.size(1));
      dq->slice(0, q0, q1).copy_(g.q[0].transpose(0, 1));
      dk->slice(0, k0, k1).copy_(g.k[0].transpose(0, 1));
      dv->slice(0, k0, k1).copy_(g.v[0].transpose(0, 1));
      if (dsink && dsink->numel()) dsink->add_(g.sink);
    });
  };
}

void require_no_extras(const Tensor& rope_q, const Tensor& rope_k, int64_t pse_type, const Tensor& pse) {
  require_absent(rope_q, "query_rope");
  require_absent(rope_k, "key_rope");
  require(pse_type == 1 || !pse.defined() || pse.numel() == 0, "pse_type ", pse_type, " has no emulation; 1 (scaled product plus pse) has");
}

}  // namespace

// ---- forward ---------------------------------------------------------------------------------------------------------------------------

ACLNN(FlashAttentionScore, Tensor query, Tensor key, Tensor value, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask, Ints prefix, double scale,
      double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout, int64_t inner_precise, int64_t sparse_mode, Out softmax_max,
      Out softmax_sum, Out softmax_out, Out out) {
  require_absent(padding_mask, "padding_mask");
  return attention({query, key, value, pse, drop_mask, atten_mask, {}},
                   {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, {}, {}}, softmax_max, softmax_sum, out);
}
ACLNN(FlashAttentionScoreV2, Tensor query, Tensor key, Tensor value, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask, Ints prefix,
      Ints q_start, Ints kv_start, double scale, double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout,
      int64_t inner_precise, int64_t sparse_mode, int64_t pse_type, Out softmax_max, Out softmax_sum, Out softmax_out, Out out) {
  require_absent(padding_mask, "padding_mask");
  require_no_extras({}, {}, pse_type, pse);
  return attention({query, key, value, pse, drop_mask, atten_mask, {}},
                   {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, {}, {}}, softmax_max, softmax_sum, out);
}
ACLNN(FlashAttentionScoreV3, Tensor query, Tensor key, Tensor value, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask, Tensor sink, Ints prefix,
      Ints q_start, Ints kv_start, double scale, double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout,
      int64_t inner_precise, int64_t sparse_mode, int64_t pse_type, Out softmax_max, Out softmax_sum, Out softmax_out, Out out) {
  require_absent(padding_mask, "padding_mask");
  require_no_extras({}, {}, pse_type, pse);
  return attention({query, key, value, pse, drop_mask, atten_mask, sink},
                   {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, {}, {}}, softmax_max, softmax_sum, out);
}
ACLNN(FlashAttentionVarLenScore, Tensor query, Tensor key, Tensor value, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask, Ints prefix,
      Ints seq_qlen, Ints seq_kvlen, double scale, double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout,
      int64_t inner_precise, int64_t sparse_mode, Out softmax_max, Out softmax_sum, Out softmax_out, Out out) {
  require_absent(padding_mask, "padding_mask");
  require_absent(pse, "pse");
  return attention({query, key, value, {}, drop_mask, atten_mask, {}},
                   {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, seq_qlen, seq_kvlen}, softmax_max,
                   softmax_sum, out);
}
ACLNN(FlashAttentionVarLenScoreV2, Tensor query, Tensor key, Tensor value, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask, Ints prefix,
      Ints seq_qlen, Ints seq_kvlen, Ints q_start, Ints kv_start, double scale, double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num,
      Text input_layout, int64_t inner_precise, int64_t sparse_mode, int64_t pse_type, Out softmax_max, Out softmax_sum, Out softmax_out, Out out) {
  require_absent(padding_mask, "padding_mask");
  require_absent(pse, "pse");
  return attention({query, key, value, {}, drop_mask, atten_mask, {}},
                   {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, seq_qlen, seq_kvlen}, softmax_max,
                   softmax_sum, out);
}
ACLNN(FlashAttentionVarLenScoreV4, Tensor query, Tensor key, Tensor value, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask, Ints prefix,
      Ints seq_qlen, Ints seq_kvlen, double scale, double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout,
      int64_t inner_precise, int64_t sparse_mode, Text softmax_layout, Out softmax_max, Out softmax_sum, Out softmax_out, Out out) {
  require_absent(padding_mask, "padding_mask");
  require_absent(pse, "pse");
  return attention({query, key, value, {}, drop_mask, atten_mask, {}},
                   {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, seq_qlen, seq_kvlen,
                    softmax_layout == "same_as_input"},
                   softmax_max, softmax_sum, out);
}
ACLNN(FlashAttentionVarLenScoreV5, Tensor query, Tensor query_rope, Tensor key, Tensor key_rope, Tensor value, Tensor pse, Tensor drop_mask, Tensor padding_mask,
      Tensor atten_mask, Tensor sink, Ints prefix, Ints seq_qlen, Ints seq_kvlen, Ints q_start, Ints kv_start, double scale, double keep_prob, int64_t pre_tokens,
      int64_t next_tokens, int64_t head_num, Text input_layout, int64_t inner_precise, int64_t sparse_mode, int64_t pse_type, Text softmax_layout, Out softmax_max,
      Out softmax_sum, Out softmax_out, Out out) {
  require_absent(padding_mask, "padding_mask");
  require_absent(pse, "pse");
  require_no_extras(query_rope, key_rope, pse_type, pse);
  return attention({query, key, value, {}, drop_mask, atten_mask, sink},
                   {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, seq_qlen, seq_kvlen,
                    softmax_layout == "same_as_input"},
                   softmax_max, softmax_sum, out);
}

// ---- gradient --------------------------------------------------------------------------------------------------------------------------

ACLNN(FlashAttentionScoreGrad, Tensor query, Tensor key, Tensor value, Tensor dy, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask,
      Tensor softmax_max, Tensor softmax_sum, Tensor softmax_in, Tensor attention_in, Ints prefix, double scale, double keep_prob, int64_t pre_tokens,
      int64_t next_tokens, int64_t head_num, Text input_layout, int64_t inner_precise, int64_t sparse_mode, Out dq, Out dk, Out dv, Out dpse) {
  require_absent(padding_mask, "padding_mask");
  return attention_gradient({query, key, value, pse, drop_mask, atten_mask, {}},
                            {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, {}, {}}, dy, softmax_max,
                            softmax_sum, attention_in, dq, dk, dv, dpse, Out(nullptr));
}
ACLNN(FlashAttentionScoreGradV2, Tensor query, Tensor key, Tensor value, Tensor dy, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask,
      Tensor softmax_max, Tensor softmax_sum, Tensor softmax_in, Tensor attention_in, Ints prefix, Ints q_start, Ints kv_start, double scale, double keep_prob,
      int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout, int64_t inner_precise, int64_t sparse_mode, int64_t pse_type, Out dq, Out dk,
      Out dv, Out dpse) {
  require_absent(padding_mask, "padding_mask");
  require_no_extras({}, {}, pse_type, pse);
  return attention_gradient({query, key, value, pse, drop_mask, atten_mask, {}},
                            {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, {}, {}}, dy, softmax_max,
                            softmax_sum, attention_in, dq, dk, dv, dpse, Out(nullptr));
}
ACLNN(FlashAttentionScoreGradV3, Tensor query, Tensor key, Tensor value, Tensor dy, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask,
      Tensor softmax_max, Tensor softmax_sum, Tensor softmax_in, Tensor attention_in, Tensor sink, Ints prefix, Ints q_start, Ints kv_start, double scale,
      double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout, int64_t inner_precise, int64_t sparse_mode,
      int64_t pse_type, Out dq, Out dk, Out dv, Out dpse, Out dsink) {
  require_absent(padding_mask, "padding_mask");
  require_no_extras({}, {}, pse_type, pse);
  return attention_gradient({query, key, value, pse, drop_mask, atten_mask, sink},
                            {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, {}, {}}, dy, softmax_max,
                            softmax_sum, attention_in, dq, dk, dv, dpse, dsink);
}
ACLNN(FlashAttentionUnpaddingScoreGrad, Tensor query, Tensor key, Tensor value, Tensor dy, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask,
      Tensor softmax_max, Tensor softmax_sum, Tensor softmax_in, Tensor attention_in, Ints prefix, Ints seq_qlen, Ints seq_kvlen, double scale, double keep_prob,
      int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout, int64_t inner_precise, int64_t sparse_mode, Out dq, Out dk, Out dv,
      Out dpse) {
  require_absent(padding_mask, "padding_mask");
  require_absent(pse, "pse");
  return attention_gradient({query, key, value, {}, drop_mask, atten_mask, {}},
                            {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, seq_qlen, seq_kvlen}, dy,
                            softmax_max, softmax_sum, attention_in, dq, dk, dv, dpse, Out(nullptr));
}
ACLNN(FlashAttentionUnpaddingScoreGradV2, Tensor query, Tensor key, Tensor value, Tensor dy, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask,
      Tensor softmax_max, Tensor softmax_sum, Tensor softmax_in, Tensor attention_in, Ints prefix, Ints seq_qlen, Ints seq_kvlen, Ints q_start, Ints kv_start,
      double scale, double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout, int64_t inner_precise, int64_t sparse_mode,
      int64_t pse_type, Out dq, Out dk, Out dv, Out dpse) {
  require_absent(padding_mask, "padding_mask");
  require_absent(pse, "pse");
  return attention_gradient({query, key, value, {}, drop_mask, atten_mask, {}},
                            {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, seq_qlen, seq_kvlen}, dy,
                            softmax_max, softmax_sum, attention_in, dq, dk, dv, dpse, Out(nullptr));
}
ACLNN(FlashAttentionUnpaddingScoreGradV4, Tensor query, Tensor key, Tensor value, Tensor dy, Tensor pse, Tensor drop_mask, Tensor padding_mask, Tensor atten_mask,
      Tensor softmax_max, Tensor softmax_sum, Tensor softmax_in, Tensor attention_in, Ints prefix, Ints seq_qlen, Ints seq_kvlen, double scale, double keep_prob,
      int64_t pre_tokens, int64_t next_tokens, int64_t head_num, Text input_layout, int64_t inner_precise, int64_t sparse_mode, Out dq, Out dk, Out dv, Out dpse,
      Text softmax_layout) {
  require_absent(padding_mask, "padding_mask");
  require_absent(pse, "pse");
  return attention_gradient({query, key, value, {}, drop_mask, atten_mask, {}},
                            {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, seq_qlen, seq_kvlen,
                             softmax_layout == "same_as_input"},
                            dy, softmax_max, softmax_sum, attention_in, dq, dk, dv, dpse, Out(nullptr));
}
ACLNN(FlashAttentionUnpaddingScoreGradV5, Tensor query, Tensor query_rope, Tensor key, Tensor key_rope, Tensor value, Tensor dy, Tensor pse, Tensor drop_mask,
      Tensor padding_mask, Tensor atten_mask, Tensor softmax_max, Tensor softmax_sum, Tensor softmax_in, Tensor attention_in, Tensor sink, Ints prefix,
      Ints seq_qlen, Ints seq_kvlen, Ints q_start, Ints kv_start, double scale, double keep_prob, int64_t pre_tokens, int64_t next_tokens, int64_t head_num,
      Text input_layout, int64_t inner_precise, int64_t sparse_mode, int64_t pse_type, Text softmax_layout, Out dq, Out dq_rope, Out dk, Out dk_rope, Out dv,
      Out dpse, Out dsink) {
  require_absent(padding_mask, "padding_mask");
  require_absent(pse, "pse");
  require_no_extras(query_rope, key_rope, pse_type, pse);
  return attention_gradient({query, key, value, {}, drop_mask, atten_mask, sink},
                            {scale, keep_prob, pre_tokens, next_tokens, head_num, inner_precise, sparse_mode, input_layout, prefix, seq_qlen, seq_kvlen,
                             softmax_layout == "same_as_input"},
                            dy, softmax_max, softmax_sum, attention_in, dq, dk, dv, dpse, dsink);
}

// ---- in a captured graph -----------------------------------------------------------------------------------------------------------------

// The largest workspace that any lengths may ask for: what a captured call holds on to, because its lengths change between replays. The
// arguments are those of the first phase; no operator of the emulation needs a workspace.
#define LARGEST_WORKSPACE(NAME)                                                           \
  extern "C" __attribute__((ifunc("npu_emulator_resolve_" #NAME), visibility("default"))) \
      ::emulator::FirstPhase<NAME##_body>::Function aclnn##NAME##GetMaxWorkspaceSize;
LARGEST_WORKSPACE(FlashAttentionVarLenScoreV5)
LARGEST_WORKSPACE(FlashAttentionUnpaddingScoreGradV5)

}  // namespace emulator
