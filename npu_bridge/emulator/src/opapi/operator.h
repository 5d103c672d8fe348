// How an aclnn operator is written.
//
//   ACLNN(SwiGlu, Tensor x, int64_t dim, Out y) {
//     require(x.size(dim) % 2 == 0, "dimension ", dim, " of x must be even");
//     return [=] {
//       auto half = x.to(at::kFloat).chunk(2, dim);
//       y = at::silu(half[0]) * half[1];
//     };
//   }
//
// This defines the two functions of the aclnn interface. aclnnSwiGluGetWorkspaceSize(x, dim, y, &workspace, &executor) turns the C
// arguments into the C++ ones below, runs the body (which only looks at shapes, dtypes and host values, and refuses what the
// operator's document forbids) and keeps the work it returns. aclnnSwiGlu(workspace, size, executor, stream) gives that work to the
// stream: it may run at once, later on a thread, or at every replay of a graph.
//
// The parameter list is that of the operator's document, in its order; the names show in messages. The C types are derived from the
// C++ types:
//
//   Tensor                  aclTensor*      an input, or one written in place; undefined when null
//   Out                     aclTensor*      an output; `y = value` checks the shape, rounds to the dtype, ignores a null
//   Tensors, Outs           aclTensorList*
//   Scalar, MaybeScalar     aclScalar*
//   Scalars                 aclScalarList*
//   Ints, Bools             aclIntArray*, aclBoolArray*   (`given` is false for null)
//   DType                   aclDataType
//   Text                    char*           copied: the caller frees it after the first phase
//   int64_t, double, ...    by value
//
// Operators not written this way are refused by name with their shapes (unknown.cpp).
#pragma once

#include <sstream>
#include <tuple>
#include <type_traits>

#include "opapi/objects.h"

namespace emulator {

using at::Scalar;
using at::Tensor;
using Work = std::function<void()>;

// ---- argument types ------------------------------------------------------------------------------------------------------------------

class Out {
 public:
  explicit Out(const aclTensor* handle) : handle_(const_cast<aclTensor*>(handle)), view_(handle ? view_of(handle) : Tensor()) {}

  // Writes a value. Throws when the shape is not the one the caller made room for.
  const Out& operator=(const Tensor& value) const;
  // The same for an output whose size depends on data: the value fills a part, the caller asks for its shape (aclGetViewShape).
  void fit(const Tensor& value) const;

  explicit operator bool() const { return view_.defined(); }
  const Tensor& operator*() const { return view_; }
  const Tensor* operator->() const { return &view_; }
  at::ScalarType dtype() const { return view_.scalar_type(); }

 private:
  aclTensor* handle_;
  Tensor view_;
};

struct Tensors : std::vector<Tensor> {
  using std::vector<Tensor>::vector;
};
struct Outs : std::vector<Out> {
  using std::vector<Out>::vector;
};
struct Scalars : std::vector<Scalar> {
  using std::vector<Scalar>::vector;
};
struct Ints : std::vector<int64_t> {
  bool given = false;
  at::OptionalIntArrayRef optional() const { return given ? at::OptionalIntArrayRef(at::IntArrayRef(*this)) : std::nullopt; }
};
struct Bools : std::vector<bool> {
  bool given = false;
};
using Text = std::string;
using MaybeScalar = std::optional<Scalar>;
struct DType {
  at::ScalarType type;
  operator at::ScalarType() const { return type; }
};

// ---- from C to C++ -------------------------------------------------------------------------------------------------------------------

// For each C++ type: the type the C function takes, the conversion, and the text for messages.
template <class T>
struct Argument {
  static_assert(std::is_arithmetic_v<T>, "no rule for this parameter type");
  using C = T;
  static T take(C value) { return value; }
  static void describe(std::ostream& out, const T& value) { out << +value; }
};
template <>
struct Argument<bool> {
  using C = bool;
  static bool take(C value) { return value; }
  static void describe(std::ostream& out, bool value) { out << (value ? "true" : "false"); }
};

#define NPU_EMULATOR_ARGUMENT(TYPE, CTYPE)            \
  template <>                                         \
  struct Argument<TYPE> {                             \
    using C = CTYPE;                                  \
    static TYPE take(C value);                        \
    static void describe(std::ostream&, const TYPE&); \
  };
NPU_EMULATOR_ARGUMENT(Tensor, const aclTensor*)
NPU_EMULATOR_ARGUMENT(Out, const aclTensor*)
NPU_EMULATOR_ARGUMENT(Tensors, const aclTensorList*)
NPU_EMULATOR_ARGUMENT(Outs, const aclTensorList*)
NPU_EMULATOR_ARGUMENT(Scalar, const aclScalar*)
NPU_EMULATOR_ARGUMENT(MaybeScalar, const aclScalar*)
NPU_EMULATOR_ARGUMENT(Scalars, const aclScalarList*)
NPU_EMULATOR_ARGUMENT(Ints, const aclIntArray*)
NPU_EMULATOR_ARGUMENT(Bools, const aclBoolArray*)
NPU_EMULATOR_ARGUMENT(DType, aclDataType)
NPU_EMULATOR_ARGUMENT(Text, const char*)
#undef NPU_EMULATOR_ARGUMENT

// ---- checks --------------------------------------------------------------------------------------------------------------------------

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Refusal(161002, message.str());  // CANN's code for a parameter that is not valid
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) refuse(parts...);
}

// Throws unless the dtype of the tensor is one of those named. Undefined tensors pass.
void require_dtype(const Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> allowed);
void require_same_dtype(const Tensor& a, const char* name_a, const Tensor& b, const char* name_b);
void require_shape(const Tensor& tensor, const char* name, at::IntArrayRef shape);
// Throws when an argument that has no emulation was given.
void require_absent(const Tensor& tensor, const char* name);
void require_absent(const Tensors& tensors, const char* name);

// ---- the two phases ------------------------------------------------------------------------------------------------------------------

// Runs work on torch's plain CPU kernels: no autograd, no autocast, no tracing, no Python modes of the calling thread.
void on_plain_kernels(const std::function<void()>& body);

}  // namespace emulator

struct aclOpExecutor {
  emulator::Counter* counter;
  emulator::Work work;
  std::function<std::string()> describe;  // "aclnnAdd(self=float32[2, 3], ...)"
  std::vector<const void*> addresses;
  std::string line;  // the Python line, kept where the work runs later
};

namespace emulator {

// Second phase of every operator.
int launch(aclOpExecutor* executor, aclrtStream stream);
// Reports a refusal of the first phase.
int first_phase_failed(const std::string& call, const std::exception& error);

// "Tensor x, int64_t dim, Out y" and the values -> "aclnnSwiGlu(x=float32[2, 6], dim=1, y=float32[2, 3])"
class CallText {
 public:
  CallText(const std::string& symbol, const char* parameters) : names_(parameters) { out_ << symbol << "("; }
  template <class T>
  void add(const T& value) {
    out_ << (count_++ ? ", " : "") << next_name() << "=";
    Argument<T>::describe(out_, value);
  }
  std::string finish() { return out_.str() + ")"; }

 private:
  std::string next_name();
  std::string names_;
  size_t at_ = 0;
  int count_ = 0;
  std::ostringstream out_;
};

template <class T>
void collect_addresses(const T&, std::vector<const void*>&) {}
inline void collect_addresses(const Tensor& t, std::vector<const void*>& to) {
  if (t.defined() && t.numel()) to.push_back(t.const_data_ptr());
}
inline void collect_addresses(const Out& o, std::vector<const void*>& to) { collect_addresses(*o, to); }
inline void collect_addresses(const Tensors& all, std::vector<const void*>& to) {
  for (const Tensor& t : all) collect_addresses(t, to);
}
inline void collect_addresses(const Outs& all, std::vector<const void*>& to) {
  for (const Out& o : all) collect_addresses(o, to);
}

// The first phase of one operator, with its C signature derived from the body's.
template <auto Body>
struct FirstPhase;

template <class... T, Work (*Body)(T...)>
struct FirstPhase<Body> {
  using Function = int(typename Argument<T>::C..., uint64_t* workspace, aclOpExecutor** executor);

  static int run(Counter& counter, const char* parameters, typename Argument<T>::C... values, uint64_t* workspace, aclOpExecutor** executor) {
    Stopwatch watch(counter.host_nanoseconds);
    using All = std::tuple<std::decay_t<T>...>;
    std::shared_ptr<All> all;
    auto describe = [&counter, parameters](const All& arguments) {
      CallText text(counter.name, parameters);
      std::apply([&](const auto&... argument) { (text.add(argument), ...); }, arguments);
      return text.finish();
    };
    try {
      all = std::make_shared<All>(Argument<std::decay_t<T>>::take(values)...);
      auto made = std::make_unique<aclOpExecutor>();
      made->counter = &counter;
      on_plain_kernels([&] { made->work = std::apply(Body, *all); });
      made->describe = [all, describe] { return describe(*all); };
      std::apply([&](const auto&... argument) { (collect_addresses(argument, made->addresses), ...); }, *all);
      *workspace = 0;
      *executor = made.release();
      return ACL_SUCCESS;
    } catch (const std::exception& error) {
      return first_phase_failed(all ? describe(*all) : counter.name, error);
    }
  }
};

}  // namespace emulator

// The exported symbol of the first phase is resolved to a function whose type no macro could write out (GNU indirect function).
#define ACLNN(NAME, ...)                                                                                                                 \
  static ::emulator::Work NAME##_body(__VA_ARGS__);                                                                                      \
  static ::emulator::Counter& NAME##_counter() {                                                                                         \
    static auto* counter = new ::emulator::Counter(::emulator::Kind::kernel, "aclnn" #NAME);                                             \
    return *counter;                                                                                                                     \
  }                                                                                                                                      \
  template <class F>                                                                                                                     \
  struct NAME##_entry;                                                                                                                   \
  template <class... C>                                                                                                                  \
  struct NAME##_entry<int(C...)> {                                                                                                       \
    static int call(C... arguments) { return ::emulator::FirstPhase<NAME##_body>::run(NAME##_counter(), #__VA_ARGS__, arguments...); }   \
  };                                                                                                                                     \
  extern "C" __attribute__((used)) void* npu_emulator_resolve_##NAME() {                                                                 \
    return reinterpret_cast<void*>(&NAME##_entry<::emulator::FirstPhase<NAME##_body>::Function>::call);                                  \
  }                                                                                                                                      \
  extern "C" __attribute__((ifunc("npu_emulator_resolve_" #NAME), visibility("default")))                                               \
      ::emulator::FirstPhase<NAME##_body>::Function aclnn##NAME##GetWorkspaceSize;                                                       \
  EMULATED int aclnn##NAME(void*, uint64_t, aclOpExecutor* executor, aclrtStream stream) { return ::emulator::launch(executor, stream); } \
  static ::emulator::Work NAME##_body(__VA_ARGS__)
