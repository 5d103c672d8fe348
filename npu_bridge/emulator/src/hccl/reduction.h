// Sums of what all ranks offer. Floats are accumulated in double and rounded once; integers stay integers.
#pragma once

#include <hccl/hccl_types.h>

#include <cstdint>

namespace emulator {

uint64_t size_of(HcclDataType type);
const char* name_of(HcclDataType type);
const char* name_of(HcclReduceOp op);

// Collects the elements [first, last) of arrays that arrive piece by piece, rank by rank.
class Reduction {
 public:
  Reduction(HcclDataType type, HcclReduceOp op, uint64_t first, uint64_t last, void* result);
  // A piece of `bytes` bytes at byte `offset` of the array of rank q; `ranks` ranks take part.
  void see(uint32_t q, uint32_t ranks, uint64_t offset, const char* piece, uint64_t bytes);

 private:
  HcclDataType type_;
  HcclReduceOp op_;
  uint64_t first_, last_;
  char* result_;
};

}  // namespace emulator
