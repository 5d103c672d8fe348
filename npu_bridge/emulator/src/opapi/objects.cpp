#include "opapi/objects.h"

#include <ATen/core/Formatting.h>

#include <set>
#include <sstream>

#include "opapi/operator.h"

namespace emulator {

at::ScalarType scalar_type(aclDataType type) {
  switch (type) {
    case ACL_FLOAT: return at::kFloat;
    case ACL_FLOAT16: return at::kHalf;
    case ACL_BF16: return at::kBFloat16;
    case ACL_DOUBLE: return at::kDouble;
    case ACL_INT8: return at::kChar;
    case ACL_INT16: return at::kShort;
    case ACL_INT32: return at::kInt;
    case ACL_INT64: return at::kLong;
    case ACL_UINT8: return at::kByte;
    case ACL_UINT16: return at::kUInt16;
    case ACL_UINT32: return at::kUInt32;
    case ACL_UINT64: return at::kUInt64;
    case ACL_BOOL: return at::kBool;
    case ACL_COMPLEX64: return at::kComplexFloat;
    case ACL_COMPLEX128: return at::kComplexDouble;
    case ACL_FLOAT8_E5M2: return at::kFloat8_e5m2;
    case ACL_FLOAT8_E4M3FN: return at::kFloat8_e4m3fn;
    default: refuse("acl dtype ", static_cast<int>(type), " has no emulation");
  }
}

static bool is_plain(aclFormat format) {
  return format == ACL_FORMAT_ND || format == ACL_FORMAT_NCHW || format == ACL_FORMAT_NHWC || format == ACL_FORMAT_NCDHW || format == ACL_FORMAT_NCL;
}

Tensor view_of(const aclTensor* t) {
  if (!is_plain(t->format))
    refuse("a tensor in the private format ", static_cast<int>(t->format), " (NZ, FRACTAL_Z, ...); only plain layouts are emulated, keep allow_internal_format off");
  at::ScalarType type = scalar_type(t->type);
  return at::from_blob(t->data + t->offset * static_cast<int64_t>(c10::elementSize(type)), t->dims, t->strides, at::TensorOptions().dtype(type));
}

static const char* short_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return "float32";
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kDouble: return "float64";
    case at::kChar: return "int8";
    case at::kShort: return "int16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    case at::kByte: return "uint8";
    case at::kBool: return "bool";
    default: return c10::toString(type);
  }
}

std::string describe(const Tensor& t) {
  if (!t.defined()) return "none";
  std::ostringstream out;
  out << short_name(t.scalar_type()) << t.sizes();
  if (!t.is_contiguous()) out << " strides " << t.strides();
  return out.str();
}

// Handles of tensors that exist, so that an operator without emulation can name its shapes.
static std::mutex handles_mutex;
static std::set<const void*>& handles() {
  static auto* all = new std::set<const void*>;
  return *all;
}

std::string describe_handle(const void* handle) {
  std::lock_guard<std::mutex> lock(handles_mutex);
  if (!handles().count(handle)) return "";
  try {
    return describe(view_of(static_cast<const aclTensor*>(handle)));
  } catch (const std::exception& error) {
    return error.what();
  }
}

static std::vector<int64_t> dense_strides(at::IntArrayRef dims) {
  std::vector<int64_t> strides(dims.size(), 1);
  for (int64_t i = static_cast<int64_t>(dims.size()) - 2; i >= 0; i--) strides[i] = strides[i + 1] * dims[i + 1];
  return strides;
}

const Out& Out::operator=(const Tensor& value) const {
  if (!view_.defined()) return *this;
  TORCH_CHECK(view_.sizes() == value.sizes(), "the caller made room for ", view_.sizes(), ", the result is ", value.sizes());
  view_.copy_(value);
  return *this;
}

void Out::fit(const Tensor& value) const {
  TORCH_CHECK(value.numel() <= view_.numel(), "the caller made room for ", view_.numel(), " elements, the result has ", value.numel());
  handle_->dims = value.sizes().vec();
  handle_->strides = dense_strides(value.sizes());
  view_of(handle_).copy_(value);
}

// ---- conversions and texts ---------------------------------------------------------------------------------------------------------

Tensor Argument<Tensor>::take(C value) { return value ? view_of(value) : Tensor(); }
void Argument<Tensor>::describe(std::ostream& out, const Tensor& value) { out << emulator::describe(value); }

Out Argument<Out>::take(C value) { return Out(value); }
void Argument<Out>::describe(std::ostream& out, const Out& value) { out << emulator::describe(*value); }

Tensors Argument<Tensors>::take(C value) {
  Tensors all;
  if (value)
    for (const aclTensor* t : value->values) all.push_back(t ? view_of(t) : Tensor());
  return all;
}
void Argument<Tensors>::describe(std::ostream& out, const Tensors& value) {
  out << "[";
  for (size_t i = 0; i < value.size(); i++) out << (i ? ", " : "") << emulator::describe(value[i]);
  out << "]";
}

Outs Argument<Outs>::take(C value) {
  Outs all;
  if (value)
    for (const aclTensor* t : value->values) all.push_back(Out(t));
  return all;
}
void Argument<Outs>::describe(std::ostream& out, const Outs& value) {
  out << "[";
  for (size_t i = 0; i < value.size(); i++) out << (i ? ", " : "") << emulator::describe(*value[i]);
  out << "]";
}

Scalar Argument<Scalar>::take(C value) {
  if (!value) refuse("a scalar argument is missing");
  return value->value;
}
void Argument<Scalar>::describe(std::ostream& out, const Scalar& value) { out << value; }

MaybeScalar Argument<MaybeScalar>::take(C value) { return value ? MaybeScalar(value->value) : std::nullopt; }
void Argument<MaybeScalar>::describe(std::ostream& out, const MaybeScalar& value) {
  if (value)
    out << *value;
  else
    out << "none";
}

Scalars Argument<Scalars>::take(C value) {
  Scalars all;
  if (value)
    for (const aclScalar* s : value->values) all.push_back(s->value);
  return all;
}
void Argument<Scalars>::describe(std::ostream& out, const Scalars& value) { out << value.size() << " scalars"; }

Ints Argument<Ints>::take(C value) {
  Ints all;
  if (value) {
    all.assign(value->values.begin(), value->values.end());
    all.given = true;
  }
  return all;
}
void Argument<Ints>::describe(std::ostream& out, const Ints& value) {
  if (value.given)
    out << at::IntArrayRef(value);
  else
    out << "none";
}

Bools Argument<Bools>::take(C value) {
  Bools all;
  if (value) {
    all.assign(value->values.begin(), value->values.end());
    all.given = true;
  }
  return all;
}
void Argument<Bools>::describe(std::ostream& out, const Bools& value) {
  for (bool b : value) out << (b ? '1' : '0');
}

DType Argument<DType>::take(C value) { return {scalar_type(value)}; }
void Argument<DType>::describe(std::ostream& out, const DType& value) { out << short_name(value.type); }

Text Argument<Text>::take(C value) { return value ? value : ""; }
void Argument<Text>::describe(std::ostream& out, const Text& value) { out << '"' << value << '"'; }

// ---- checks ------------------------------------------------------------------------------------------------------------------------

void require_dtype(const Tensor& t, const char* name, std::initializer_list<at::ScalarType> allowed) {
  if (!t.defined()) return;
  for (at::ScalarType type : allowed)
    if (t.scalar_type() == type) return;
  std::string list;
  for (at::ScalarType type : allowed) list += (list.empty() ? "" : ", ") + std::string(short_name(type));
  refuse(name, " is ", describe(t), "; the operator takes ", list);
}

void require_same_dtype(const Tensor& a, const char* name_a, const Tensor& b, const char* name_b) {
  if (a.defined() && b.defined() && a.scalar_type() != b.scalar_type())
    refuse(name_a, " is ", describe(a), ", ", name_b, " is ", describe(b), "; they must have one dtype");
}

void require_shape(const Tensor& t, const char* name, at::IntArrayRef shape) {
  if (t.defined() && t.sizes() != shape) refuse(name, " is ", describe(t), "; its shape must be ", shape);
}

void require_absent(const Tensor& t, const char* name) {
  if (t.defined() && t.numel()) refuse(name, " = ", describe(t), " has no emulation");
}

void require_absent(const Tensors& all, const char* name) {
  for (const Tensor& t : all) require_absent(t, name);
}

// ---- calls -------------------------------------------------------------------------------------------------------------------------

NPU_EMULATOR_TAKES(template)

void collect_addresses(const Tensor& t, std::vector<const void*>& to) {
  if (t.defined() && t.numel()) to.push_back(t.const_data_ptr());
}
void collect_addresses(const Out& o, std::vector<const void*>& to) { collect_addresses(*o, to); }
void collect_addresses(const Tensors& all, std::vector<const void*>& to) {
  for (const Tensor& t : all) collect_addresses(t, to);
}
void collect_addresses(const Outs& all, std::vector<const void*>& to) {
  for (const Out& o : all) collect_addresses(o, to);
}

std::string Arguments::describe(const std::string& symbol, const std::string& parameters) const {
  std::ostringstream out;
  out << symbol << "(";
  size_t at = 0;
  for (size_t i = 0; i < held_.size(); i++) {
    size_t comma = std::min(parameters.find(',', at), parameters.size());
    std::string declaration = parameters.substr(at, comma - at);
    at = std::min(comma + 1, parameters.size());
    size_t space = declaration.find_last_of(" *&");
    out << (i ? ", " : "") << (space == std::string::npos ? declaration : declaration.substr(space + 1)) << "=";
    held_[i]->describe(out);
  }
  return out.str() + ")";
}

std::vector<const void*> Arguments::addresses() const {
  std::vector<const void*> all;
  for (auto& held : held_) held->addresses(all);
  return all;
}

void on_plain_kernels(const std::function<void()>& body) {
  c10::impl::ExcludeDispatchKeyGuard guard(
      c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset |
      c10::DispatchKeySet({c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Functionalize,
                           c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
  at::NoGradGuard no_grad;
  body();
}

static std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

int first_phase(const Call& call, void (*take)(const void* values, Arguments&), const void* values, Work (*body)(Arguments&)) {
  Stopwatch watch(call.counter.host_nanoseconds);
  auto arguments = std::make_shared<Arguments>();
  bool taken = false;
  try {
    take(values, *arguments);
    taken = true;
    auto made = std::make_unique<aclOpExecutor>(aclOpExecutor{&call.counter, {}, arguments, call.parameters, {}, {}});
    on_plain_kernels([&] { made->work = body(*arguments); });
    made->addresses = arguments->addresses();
    *call.workspace = 0;
    *call.executor = made.release();
    return ACL_SUCCESS;
  } catch (const std::exception& error) {
    auto* refusal = dynamic_cast<const Refusal*>(&error);
    std::string words = taken ? arguments->describe(call.counter.name, call.parameters) : call.counter.name;
    set_recent_error(words + ": " + first_line(error.what()) + ", at " + python_line());
    return refusal ? refusal->code : 561103;  // CANN's code for an inner error
  }
}

int launch(aclOpExecutor* raw, aclrtStream handle) {
  std::shared_ptr<aclOpExecutor> executor(raw);
  Stream* stream = nullptr;
  int code = guarded(executor->counter->name.c_str(), [&] { stream = &stream_of(handle); });
  if (code) return code;
  bool later = settings().asynchronous || stream->capture || executor->work.waits_for_others;
  if (later) executor->line = python_line();
  auto run = [executor] {
    if (!settings().execute) return;
    Stopwatch watch(executor->counter->compute_nanoseconds);
    try {
      on_plain_kernels(executor->work);
    } catch (const std::exception& error) {
      throw Refusal(561103, executor->describe() + ": " + first_line(error.what()) + (executor->line.empty() ? "" : ", at " + executor->line));
    }
  };
  try {
    stream->submit({executor->counter, run, executor->work.waits_for_others, executor->addresses});
    return ACL_SUCCESS;
  } catch (const std::exception& error) {
    auto* refusal = dynamic_cast<const Refusal*>(&error);
    set_recent_error(std::string(error.what()) + ", at " + python_line());
    return refusal ? refusal->code : 561103;
  }
}

}  // namespace emulator

using namespace emulator;

// Called by the generated entries of operators nobody wrote (unknown.s of the build). Their argument lists are not known: the words
// of a call are looked through for tensors, those in registers and the first on the stack.
extern "C" int npu_emulator_refuse_unknown(const char* symbol, const void* const* registers, const void* const* stack) {
  std::string shapes;
  for (int i = 0; i < 24; i++) {
    std::string text = describe_handle(i < 6 ? registers[i] : stack[i - 6]);
    if (!text.empty()) shapes += (shapes.empty() ? "" : ", ") + text;
  }
  set_recent_error(std::string(symbol) + "(" + shapes + ") has no emulation, at " + python_line() +
                   ". docs/emulator.md lists what there is and how an operator is added");
  return 161001;
}

EMULATED aclTensor* aclCreateTensor(const int64_t* dims, uint64_t count, aclDataType type, const int64_t* strides, int64_t offset, aclFormat format,
                                    const int64_t*, uint64_t, void* data) {
  std::vector<int64_t> shape(dims, dims + count);
  auto* made = new aclTensor{shape, strides ? std::vector<int64_t>(strides, strides + count) : dense_strides(shape), offset, type, format, static_cast<char*>(data)};
  std::lock_guard<std::mutex> lock(handles_mutex);
  handles().insert(made);
  return made;
}

template <class T>
static Scalar read(const void* p) {
  return static_cast<T>(*static_cast<const T*>(p));
}

EMULATED aclScalar* aclCreateScalar(void* p, aclDataType type) {
  switch (type) {
    case ACL_FLOAT: return new aclScalar{*static_cast<float*>(p)};
    case ACL_DOUBLE: return new aclScalar{*static_cast<double*>(p)};
    case ACL_INT64: return new aclScalar{*static_cast<int64_t*>(p)};
    case ACL_INT32: return new aclScalar{*static_cast<int32_t*>(p)};
    case ACL_INT16: return new aclScalar{*static_cast<int16_t*>(p)};
    case ACL_INT8: return new aclScalar{*static_cast<int8_t*>(p)};
    case ACL_UINT8: return new aclScalar{*static_cast<uint8_t*>(p)};
    case ACL_BOOL: return new aclScalar{*static_cast<bool*>(p)};
    case ACL_FLOAT16: return new aclScalar{static_cast<float>(*static_cast<c10::Half*>(p))};
    case ACL_BF16: return new aclScalar{static_cast<float>(*static_cast<c10::BFloat16*>(p))};
    case ACL_COMPLEX64: return new aclScalar{*static_cast<c10::complex<float>*>(p)};
    case ACL_COMPLEX128: return new aclScalar{*static_cast<c10::complex<double>*>(p)};
    default: set_recent_error("aclCreateScalar: dtype " + std::to_string(type) + " has no emulation"); return nullptr;
  }
}

EMULATED aclIntArray* aclCreateIntArray(const int64_t* v, uint64_t n) { return new aclIntArray{{v, v + n}}; }
EMULATED aclFloatArray* aclCreateFloatArray(const float* v, uint64_t n) { return new aclFloatArray{{v, v + n}}; }
EMULATED aclBoolArray* aclCreateBoolArray(const bool* v, uint64_t n) { return new aclBoolArray{std::vector<bool>(v, v + n)}; }
EMULATED aclTensorList* aclCreateTensorList(const aclTensor* const* v, uint64_t n) { return new aclTensorList{{v, v + n}}; }
EMULATED aclScalarList* aclCreateScalarList(const aclScalar* const* v, uint64_t n) { return new aclScalarList{{v, v + n}}; }

EMULATED int aclDestroyTensor(const aclTensor* t) {
  {
    std::lock_guard<std::mutex> lock(handles_mutex);
    handles().erase(t);
  }
  delete t;
  return ACL_SUCCESS;
}
#define DESTROY(NAME)                                  \
  EMULATED int aclDestroy##NAME(const acl##NAME* p) { \
    delete p;                                          \
    return ACL_SUCCESS;                                \
  }
DESTROY(Scalar)
DESTROY(IntArray)
DESTROY(FloatArray)
DESTROY(BoolArray)
EMULATED int aclDestroyTensorList(const aclTensorList* list) {
  if (list)
    for (const aclTensor* t : list->values) aclDestroyTensor(t);
  delete list;
  return ACL_SUCCESS;
}
EMULATED int aclDestroyScalarList(const aclScalarList* list) {
  if (list)
    for (const aclScalar* s : list->values) delete s;
  delete list;
  return ACL_SUCCESS;
}
EMULATED int aclDestroyAclOpExecutor(aclOpExecutor* executor) {
  delete executor;
  return ACL_SUCCESS;
}

// Shape of an output that depended on data. The caller frees the array with delete[].
EMULATED int aclGetViewShape(const aclTensor* t, int64_t** dims, uint64_t* count) {
  *count = t->dims.size();
  *dims = new int64_t[*count + 1];
  std::copy(t->dims.begin(), t->dims.end(), *dims);
  return ACL_SUCCESS;
}
