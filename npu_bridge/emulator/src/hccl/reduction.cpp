#include "hccl/reduction.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/runtime.h"

namespace emulator {

uint64_t size_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8:
    case HCCL_DATA_TYPE_UINT8:
    case HCCL_DATA_TYPE_HIF8:
    case HCCL_DATA_TYPE_FP8E4M3:
    case HCCL_DATA_TYPE_FP8E5M2:
    case HCCL_DATA_TYPE_FP8E8M0: return 1;
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64: return 8;
    case HCCL_DATA_TYPE_INT128: return 16;
    default: throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "HCCL data type " + std::to_string(type) + " is unknown");
  }
}

const char* name_of(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8: return "int8";
    case HCCL_DATA_TYPE_UINT8: return "uint8";
    case HCCL_DATA_TYPE_INT16: return "int16";
    case HCCL_DATA_TYPE_INT32: return "int32";
    case HCCL_DATA_TYPE_INT64: return "int64";
    case HCCL_DATA_TYPE_UINT64: return "uint64";
    case HCCL_DATA_TYPE_FP16: return "float16";
    case HCCL_DATA_TYPE_BFP16: return "bfloat16";
    case HCCL_DATA_TYPE_FP32: return "float32";
    case HCCL_DATA_TYPE_FP64: return "float64";
    default: return "other type";
  }
}

const char* name_of(HcclReduceOp op) {
  static const char* names[] = {"sum", "product", "max", "min"};
  return op >= HCCL_REDUCE_SUM && op <= HCCL_REDUCE_MIN ? names[op] : "unknown reduction";
}

namespace {

// Bits of a bfloat16, computed with as float.
struct BFloat16 {
  uint16_t bits;
  operator double() const {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  static BFloat16 round(double value) {
    float f = static_cast<float>(value);
    uint32_t wide;
    std::memcpy(&wide, &f, 4);
    if (f != f) return {static_cast<uint16_t>((wide >> 16) | 0x40)};
    return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
  }
};

template <class T, class Wide>
T rounded(Wide value) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return BFloat16::round(value);
  else
    return static_cast<T>(value);
}

template <class Wide>
Wide combine(Wide a, Wide b, HcclReduceOp op) {
  switch (op) {
    case HCCL_REDUCE_SUM: return a + b;
    case HCCL_REDUCE_PROD: return a * b;
    case HCCL_REDUCE_MAX: return a != a ? a : b != b ? b : std::max(a, b);  // NaN stays
    case HCCL_REDUCE_MIN: return a != a ? a : b != b ? b : std::min(a, b);
    default: throw Refusal(ACL_ERROR_RT_PARAM_INVALID, "HCCL reduction " + std::to_string(op) + " is unknown");
  }
}

thread_local std::vector<char> sums;  // of the piece in work

template <class T, class Wide>
void accumulate(uint32_t q, uint32_t ranks, const char* piece, uint64_t from, uint64_t to, char* result, HcclReduceOp op) {
  auto* values = reinterpret_cast<const T*>(piece);
  if (q == 0) sums.assign((to - from) * sizeof(Wide), 0);
  auto* wide = reinterpret_cast<Wide*>(sums.data());
  for (uint64_t i = from; i < to; i++) {
    Wide value = static_cast<Wide>(values[i]);
    wide[i - from] = q ? combine(wide[i - from], value, op) : value;
  }
  if (q == ranks - 1 && result)
    for (uint64_t i = 0; i < to - from; i++) reinterpret_cast<T*>(result)[i] = rounded<T>(wide[i]);
}

}  // namespace

Reduction::Reduction(HcclDataType type, HcclReduceOp op, uint64_t first, uint64_t last, void* result)
    : type_(type), op_(op), first_(first), last_(last), result_(static_cast<char*>(result)) {}

void Reduction::see(uint32_t q, uint32_t ranks, uint64_t offset, const char* piece, uint64_t bytes) {
  uint64_t element = size_of(type_), start = offset / element, end = start + bytes / element;
  uint64_t low = std::max(start, first_), high = std::min(end, last_);
  if (low >= high) return;
  uint64_t from = low - start, to = high - start;
  char* target = result_ ? result_ + (low - first_) * element : nullptr;
  switch (type_) {
    case HCCL_DATA_TYPE_INT8: return accumulate<int8_t, int64_t>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_UINT8: return accumulate<uint8_t, int64_t>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_INT16: return accumulate<int16_t, int64_t>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_INT32: return accumulate<int32_t, int64_t>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_INT64: return accumulate<int64_t, int64_t>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_UINT64: return accumulate<uint64_t, uint64_t>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_FP16: return accumulate<_Float16, double>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_BFP16: return accumulate<BFloat16, double>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_FP32: return accumulate<float, double>(q, ranks, piece, from, to, target, op_);
    case HCCL_DATA_TYPE_FP64: return accumulate<double, double>(q, ranks, piece, from, to, target, op_);
    default: throw Refusal(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "a reduction of HCCL data type " + std::to_string(type_) + " has no emulation");
  }
}

}  // namespace emulator
