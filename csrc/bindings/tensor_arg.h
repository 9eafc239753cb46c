#pragma once
// A Python tensor as a TensorView, through the DLPack C exchange API.
// No torch header: any framework whose tensor type has __dlpack_c_exchange_api__ works.

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "bindings/dlpack.h"
#include "pyeff/config.h"
#include "pyeff/tensor_view.h"

namespace pyeff::bindings {

namespace py = pybind11;

// Borrows `tensor` for the length of one native call. Owns nothing, synchronises nothing.
class TensorArg {
 public:
  TensorArg(py::handle tensor, const char* name) : api_(exchange_api(tensor, name)) {
    dlpack::Tensor t;
    if (api_.tensor_from_object(tensor.ptr(), &t) != 0) throw py::error_already_set();
    view_ = to_view(t, name);
  }

  operator const TensorView&() const { return view_; }
  const TensorView& operator*() const { return view_; }
  const TensorView* operator->() const { return &view_; }

  // The stream on which the framework would run its next kernel for this tensor.
  void* current_stream() const {
    if constexpr (kEmulatedGpu) return reinterpret_cast<void*>(kEmulatedStream);
    void* stream = nullptr;
    if (api_.current_stream(dlpack::kCuda, view_.device_index, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }

 private:
  static const dlpack::ExchangeApi& exchange_api(py::handle tensor, const char* name) {
    // A capsule look-up per argument is half of the call's cost, and types rarely change.
    thread_local PyTypeObject* known_type = nullptr;
    thread_local const dlpack::ExchangeApi* known_api = nullptr;
    PyTypeObject* type = Py_TYPE(tensor.ptr());
    if (type == known_type) return *known_api;

    const py::object capsule =
        py::getattr(py::type::of(tensor), "__dlpack_c_exchange_api__", py::none());
    if (capsule.is_none()) throw py::type_error(std::string(name) + " must be a tensor");
    const auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->version.major != dlpack::kMajorVersion) {
      throw py::import_error("pyeff speaks DLPack 1, the tensor library speaks DLPack " +
                             std::to_string(api->version.major));
    }
    if (api->tensor_from_object == nullptr) {
      throw py::import_error("the tensor library offers no borrowed DLPack tensors");
    }
    // The type is kept alive, so that its address cannot come to name another one.
    Py_INCREF(type);
    Py_XDECREF(known_type);
    known_type = type;
    known_api = api;
    return *api;
  }

  static TensorView to_view(const dlpack::Tensor& t, const char* name) {
    if (t.ndim > TensorView::kMaxDims) {
      throw py::value_error(std::string(name) + " has too many dimensions");
    }
    TensorView view{};
    view.name = name;
    view.data = static_cast<char*>(t.data) + t.byte_offset;
    view.dtype = to_dtype(t.dtype, name);
    view.device = to_device(t.device, name);
    view.device_index = t.device.index;
    view.ndim = t.ndim;
    for (int d = 0; d < t.ndim; ++d) {
      view.shape[d] = t.shape[d];
      view.stride[d] = t.strides[d];
    }
    return view;
  }

  static Dtype to_dtype(dlpack::DataType t, const char* name) {
    if (t.code == dlpack::kFloat && t.bits == 16) return Dtype::kFloat16;
    if (t.code == dlpack::kBfloat && t.bits == 16) return Dtype::kBFloat16;
    if (t.code == dlpack::kFloat && t.bits == 32) return Dtype::kFloat32;
    if (t.code == dlpack::kFloat && t.bits == 64) return Dtype::kFloat64;
    if (t.code == dlpack::kInt && t.bits == 32) return Dtype::kInt32;
    if (t.code == dlpack::kInt && t.bits == 64) return Dtype::kInt64;
    throw py::type_error(std::string(name) +
                         " must be float16, bfloat16, float32, float64, int32 or int64");
  }

  static Device to_device(dlpack::Device d, const char* name) {
    if (d.type == dlpack::kCpu || d.type == dlpack::kCudaHost) {
      return kEmulatedGpu ? Device::kCuda : Device::kCpu;
    }
    if (d.type == dlpack::kCuda) return Device::kCuda;
    throw py::value_error(std::string(name) + " must be on a CPU or CUDA device");
  }

  const dlpack::ExchangeApi& api_;
  TensorView view_{};
};

// None becomes an empty optional.
inline std::optional<TensorArg> optional_tensor(py::handle tensor, const char* name) {
  if (tensor.is_none()) return std::nullopt;
  return std::make_optional<TensorArg>(tensor, name);
}

inline const TensorView* view_or_null(const std::optional<TensorArg>& tensor) {
  return tensor ? &**tensor : nullptr;
}

inline void require_on_cpu(const char* op, const TensorView& t) {
  if (t.device != Device::kCpu) fail(op, std::string(t.name) + " must be on the CPU");
}

// A packed copy of `elements`, in the accumulator's type of `weight`.
inline void require_packed(const char* op, const TensorView& packed, const TensorView& weight,
                           std::int64_t elements) {
  require_shape(op, packed, {elements});
  require_contiguous(op, packed);
  require_on_cpu(op, packed);
  const Dtype dtype = weight.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  if (packed.dtype != dtype) fail(op, "packed must be float32, or float64 for a float64 weight");
}

}  // namespace pyeff::bindings
