// What attention for training and attention for inference share. B rows, S positions, N heads, D head dim.
#pragma once

#include "opapi/operator.h"

namespace emulator {

constexpr int64_t kCompressed = 2048;  // side of the triangle that stands for a mask of any size in modes 2, 3, 4, 7, 8 (mode 6: and 1024 rows more)
constexpr int64_t kPrefix = 5, kCompressedPrefix = 6, kLastIsBand = 7, kFirstIsBand = 8;

// (B, N, S, D), from the layout given: BNSD, BSND, BSH, SBH, or TND of one sequence. `heads` splits the joined dimension of BSH and SBH.
Tensor to_bnsd(const Tensor& x, const Text& layout, int64_t heads);
// The way back, for all of them but TND.
void write_from_bnsd(const Out& out, const Tensor& x, const Text& layout);
// Each key head as often as query heads share it.
Tensor repeat_heads(const Tensor& x, int64_t heads);
// What a kernel reads of a compressed mask: throws on a wrong one.
void check_compressed(const Tensor& mask, int64_t mode);

}  // namespace emulator
