#pragma once
// The part of DLPack 1.x that we use, declared from its specification so that neither torch nor
// any other package has to be there at build time. Layouts are fixed for all of major version 1;
// TensorArg checks the version at run time.

#include <cstddef>
#include <cstdint>

namespace pyeff::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : std::uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Device {
  std::int32_t type;
  std::int32_t index;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; never null since 1.2 unless ndim is 0
  std::uint64_t byte_offset;
};

// The function table that a tensor type offers as the capsule __dlpack_c_exchange_api__. The
// functions that we do not call are kept as opaque pointers for their place in the table.
struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;
  void (*allocate)();
  void (*managed_from_object)();
  void (*managed_to_object)();
  int (*tensor_from_object)(void* object, Tensor* out);  // 0, or -1 with a Python error set
  int (*current_stream)(std::int32_t device_type, std::int32_t device_index, void** out);
};

static_assert(sizeof(void*) == 8, "the layouts below are those of 64-bit systems");
static_assert(sizeof(DataType) == 4 && sizeof(Device) == 8 && sizeof(Tensor) == 48);
static_assert(offsetof(Tensor, device) == 8 && offsetof(Tensor, dtype) == 20);
static_assert(offsetof(Tensor, shape) == 24 && offsetof(Tensor, byte_offset) == 40);
static_assert(offsetof(ExchangeApi, previous) == 8 && offsetof(ExchangeApi, allocate) == 16);
static_assert(offsetof(ExchangeApi, tensor_from_object) == 40 && sizeof(ExchangeApi) == 56);

}  // namespace pyeff::dlpack
