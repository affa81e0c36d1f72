// A second device for tests, torch's PrivateUse1: it computes on the CPU, and like a GPU it refuses tensors of the CPU beside its
// own. Loading this library registers it. `tests/other_device.py` builds it.
#include <torch/library.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

namespace {

constexpr auto KIND = c10::DeviceType::PrivateUse1;

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &c10::free_cpu, c10::Device(KIND, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return {KIND, 0}; }
  c10::Device getDevice() const override { return {KIND, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device d) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream getNewStream(c10::Device d, int) const override { return c10::Stream(c10::Stream::DEFAULT, d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
};

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
at::Tensor seen(const at::Tensor& t) {
  if (!t.is_privateuseone()) return t;
  auto* data = t.storage().data_ptr() ? static_cast<char*>(t.storage().mutable_data()) + t.storage_offset() * t.element_size() : nullptr;
  return at::from_blob(data, t.sizes(), t.strides(), t.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  seen(to).copy_(seen(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_output(to, from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(t.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt);
  return t;
}

at::Scalar item(const at::Tensor& t) { return seen(t).item(); }

at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& from) { return at::native::set_tensor_(t, from); }
at::Tensor& set_all(at::Tensor& t, at::Storage s, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(t, std::move(s), offset, size, stride);
}
at::Tensor& set_storage(at::Tensor& t, at::Storage s) {
  const int64_t n = static_cast<int64_t>(s.nbytes() / t.element_size());
  return at::native::set_storage_cpu_(t, std::move(s), 0, {n}, {});
}

at::Tensor mine(const at::Tensor& t) { return t.to(c10::Device(KIND, 0)); }

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::IntArrayRef stride,
                       c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef out, int64_t groups) {
  TORCH_CHECK(x.is_privateuseone() && weight.is_privateuseone(), "a convolution of tensors on two devices");
  std::optional<at::Tensor> b;
  if (bias && bias->defined()) b = seen(*bias);
  return mine(at::convolution(seen(x), seen(weight), b, stride, padding, dilation, transposed, out, groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, c10::IntArrayRef stride, c10::IntArrayRef padding,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef out, int64_t groups, std::array<bool, 3> wanted) {
  auto [a, b, c] = at::convolution_backward(seen(grad), seen(x), seen(weight), c10::OptionalArrayRef<int64_t>({weight.size(0)}), stride,
                                            padding, dilation, transposed, out, groups, wanted);
  auto given = [](const at::Tensor& t) { return t.defined() ? mine(t) : t; };
  return {given(a), given(b), given(c)};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& h,
                                            const std::optional<at::Tensor>& b_in, const std::optional<at::Tensor>& b_hidden) {
  auto i = (b_in && b_in->defined() ? input + *b_in : input).chunk(3, 1);
  auto k = (b_hidden && b_hidden->defined() ? hidden + *b_hidden : hidden).chunk(3, 1);
  auto reset = (i[0] + k[0]).sigmoid(), update = (i[1] + k[1]).sigmoid(), fresh = (i[2] + reset * k[2]).tanh();
  return {fresh + update * (h - fresh), at::cat({reset, update, fresh, h, k[2]}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gru_cell_backward(const at::Tensor& grad, const at::Tensor& kept,
                                                                                         bool bias) {
  auto parts = kept.chunk(5, 1);
  auto reset = parts[0], update = parts[1], fresh = parts[2], h = parts[3], hidden = parts[4];
  auto at_fresh = grad * (1 - update) * (1 - fresh * fresh), at_update = grad * (h - fresh) * update * (1 - update);
  auto at_reset = at_fresh * hidden * reset * (1 - reset);
  auto input = at::cat({at_reset, at_update, at_fresh}, 1), before = at::cat({at_reset, at_update, at_fresh * reset}, 1);
  auto sum = [bias](const at::Tensor& t) { return bias ? t.sum(0) : at::Tensor(); };
  return {input, before, grad * update, sum(input), sum(before)};
}

// As the GPU's, of as many queries as keys where it is causal.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor, at::Tensor, at::Tensor> attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double, bool causal, bool, std::optional<double> scale) {
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf, "flash attention takes halves");
  auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(seen(q), seen(k), seen(v), 0.0, causal, std::nullopt, scale);
  auto none = at::empty({0}, q.options());
  return {mine(out), mine(lse), none, none, q.size(2), k.size(2), none, none, none};
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size()))
    if (value.isTensorList()) {
      const auto list = value.toTensorVector();
      for (const auto& t : list) TORCH_CHECK(t.device() == list[0].device(), "expected all tensors of ", op.schema().name(), " on the same device");
    }
  at::native::cpu_fallback(op, stack, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("view", &at::native::view);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_all);
  m.impl("_local_scalar_dense", &item);
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&fallback>());
  m.impl("_thnn_fused_gru_cell", &gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", &gru_cell_backward);
  m.impl("_scaled_dot_product_flash_attention", &attention);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

namespace {
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);
}  // namespace
