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
// Operators not written this way are refused by name with their shapes (unknown.s of the build).
#pragma once

#include <sstream>
#include <type_traits>
#include <utility>

#include "opapi/objects.h"

namespace emulator {

using at::Scalar;
using at::Tensor;
// What a call does. One that waits for other processes (see `exchanging`) never holds up the calling thread.
struct Work : std::function<void()> {
  using std::function<void()>::function;
  bool waits_for_others = false;
};
inline Work exchanging(Work work) {
  work.waits_for_others = true;
  return work;
}

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

// The arguments of one call, each behind its type: what has to be compiled for every operator is a line a parameter.
struct Held {
  virtual ~Held() = default;
  virtual void describe(std::ostream& out) const = 0;
  virtual void addresses(std::vector<const void*>&) const {}
};
template <class T>
struct HeldAs final : Held {
  explicit HeldAs(T given) : value(std::move(given)) {}
  void describe(std::ostream& out) const override { Argument<T>::describe(out, value); }
  void addresses(std::vector<const void*>& to) const override;
  T value;
};
void collect_addresses(const Tensor&, std::vector<const void*>&);
void collect_addresses(const Out&, std::vector<const void*>&);
void collect_addresses(const Tensors&, std::vector<const void*>&);
void collect_addresses(const Outs&, std::vector<const void*>&);
template <class T>
void collect_addresses(const T&, std::vector<const void*>&) {}
template <class T>
void HeldAs<T>::addresses(std::vector<const void*>& to) const {
  collect_addresses(value, to);
}

class Arguments {
 public:
  template <class T>
  void take(typename Argument<T>::C value) {
    held_.push_back(std::make_unique<HeldAs<T>>(Argument<T>::take(value)));
  }
  template <class T>
  T& get(size_t i) {
    return static_cast<HeldAs<T>&>(*held_[i]).value;
  }
  // "aclnnSwiGlu(x=float32[2, 6], dim=1, y=float32[2, 3])"; the names are those of the parameter list.
  std::string describe(const std::string& symbol, const std::string& parameters) const;
  std::vector<const void*> addresses() const;

 private:
  std::vector<std::unique_ptr<Held>> held_;
};

// Compiled once, in objects.cpp.
#define NPU_EMULATOR_TAKES(WORD)               \
  WORD void Arguments::take<Tensor>(const aclTensor*);       \
  WORD void Arguments::take<Out>(const aclTensor*);          \
  WORD void Arguments::take<Tensors>(const aclTensorList*);  \
  WORD void Arguments::take<Outs>(const aclTensorList*);     \
  WORD void Arguments::take<Scalar>(const aclScalar*);       \
  WORD void Arguments::take<MaybeScalar>(const aclScalar*);  \
  WORD void Arguments::take<Scalars>(const aclScalarList*);  \
  WORD void Arguments::take<Ints>(const aclIntArray*);       \
  WORD void Arguments::take<Bools>(const aclBoolArray*);     \
  WORD void Arguments::take<DType>(aclDataType);             \
  WORD void Arguments::take<Text>(const char*);              \
  WORD void Arguments::take<int64_t>(int64_t);               \
  WORD void Arguments::take<int8_t>(int8_t);                 \
  WORD void Arguments::take<double>(double);                 \
  WORD void Arguments::take<bool>(bool);
NPU_EMULATOR_TAKES(extern template)

// Runs work on torch's plain CPU kernels: no autograd, no autocast, no tracing, no Python modes of the calling thread.
void on_plain_kernels(const std::function<void()>& body);

}  // namespace emulator

struct aclOpExecutor {
  emulator::Counter* counter;
  emulator::Work work;
  std::shared_ptr<emulator::Arguments> arguments;
  const char* parameters;
  std::vector<const void*> addresses;
  std::string line;  // the Python line, kept where the work runs later

  std::string describe() const { return arguments->describe(counter->name, parameters); }
};

namespace emulator {

// Second phase of every operator.
int launch(aclOpExecutor* executor, aclrtStream stream);

// First phase of every operator: `take` turns the C values into arguments, `body` looks at them and returns the work.
struct Call {
  Counter& counter;
  const char* parameters;
  uint64_t* workspace;
  aclOpExecutor** executor;
};
int first_phase(const Call& call, void (*take)(const void* values, Arguments&), const void* values, Work (*body)(Arguments&));

// The C signature of an operator, derived from its body's, and the little that its types need.
template <auto Body>
struct FirstPhase;

template <class... T, Work (*Body)(T...)>
struct FirstPhase<Body> {
  using Function = int(typename Argument<T>::C..., uint64_t* workspace, aclOpExecutor** executor);

  static int run(Counter& counter, const char* parameters, typename Argument<T>::C... values, uint64_t* workspace, aclOpExecutor** executor) {
    auto take = [&](Arguments& all) { (all.take<std::decay_t<T>>(values), ...); };
    auto call = [](const void* f, Arguments& all) { (*static_cast<const decltype(take)*>(f))(all); };
    return first_phase({counter, parameters, workspace, executor}, call, &take, [](Arguments& all) { return body(all, std::index_sequence_for<T...>{}); });
  }

 private:
  template <size_t... I>
  static Work body(Arguments& all, std::index_sequence<I...>) {
    return Body(all.get<std::decay_t<T>>(I)...);
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
