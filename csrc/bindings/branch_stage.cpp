#include "pyeff/branch_stage.h"

#include <pybind11/stl.h>

#include "bindings/branch_arg.h"
#include "bindings/gpu_arg.h"

namespace pyeff::bindings {
namespace {

constexpr const char* kOp = "branch_stage";

void require_packed(const StageProgram& program, const TensorView& packed) {
  require_shape(kOp, packed, {cpu::branch_stage_packed_elements(program)});
  require_contiguous(kOp, packed);
  require_on_cpu(kOp, packed);
  if (packed.dtype != Dtype::kFloat32 && packed.dtype != Dtype::kFloat64) {
    fail(kOp, "packed must be float32 or float64");
  }
}

// The parameters of a step have the shapes that the packing reads.
void check_parameters(const StageProgram& program, const StageStep& step,
                      const std::vector<TensorView>& tensors) {
  if (step.tensors[0] < 0) return;
  const TensorView& first = tensors[step.tensors[0]];
  if (step.kind == StageKind::kConv2d) {
    require_shape(kOp, first,
                  {program.branches, step.out, step.rows_in, step.kernel_h, step.kernel_w});
  } else if (step.kind == StageKind::kLinear) {
    require_shape(kOp, first, {program.branches, step.out, step.rows_in});
  } else {
    require_shape(kOp, first, {program.branches, step.out});
  }
  if (step.tensors[1] >= 0) {
    require_shape(kOp, tensors[step.tensors[1]], {program.branches, step.out});
  }
}

void pack(const StageProgram& program, const py::list& list, py::handle packed_,
          std::int64_t threads_) {
  const TensorArg packed(packed_, "packed");
  const int threads = read_threads(kOp, threads_);
  if (program.tensor_count > static_cast<int>(list.size())) {
    fail(kOp, "tensors must be those of the program");
  }
  std::vector<TensorView> tensors;
  for (const py::handle tensor : list) tensors.push_back(*TensorArg(tensor, "tensors"));
  for (const TensorView& t : tensors) {
    require_on_cpu(kOp, t);
    require_like(kOp, t, tensors.front());
    if (!is_floating_point(t.dtype)) fail(kOp, "tensors must be floating-point tensors");
  }
  for (const StageStep& step : program.steps) check_parameters(program, step, tensors);
  require_packed(program, packed);
  if (!tensors.empty() &&
      (packed->dtype == Dtype::kFloat64) != (tensors.front().dtype == Dtype::kFloat64)) {
    fail(kOp, "packed must be float32, or float64 for float64 tensors");
  }
  const py::gil_scoped_release no_gil;
  cpu::branch_stage_pack(program, tensors, packed, threads);
}

// [N, k] of branch numbers, for x [N, ...] or [N, k, ...].
void check_index(const StageProgram& program, const TensorView& index, const TensorView& x) {
  const bool per_pair = x.ndim == (program.vector ? 3 : 5);
  require_shape(kOp, index, {x.shape[0], per_pair ? x.shape[1] : index.shape[1]});
}

void check_input(const StageProgram& program, const TensorView& x) {
  const int rank = program.vector ? 2 : 4, channel = program.vector ? x.ndim - 1 : x.ndim - 3;
  if (x.ndim != rank && x.ndim != rank + 1) fail(kOp, "x must have the rank of the program");
  if (x.shape[channel] != program.in_channels) {
    fail(kOp, "x must have the channels of the program");
  }
  if (x.shape[channel] > 1 && x.stride[channel] != 1) {
    fail(kOp, "x must have its channels side by side");
  }
  if (!is_floating_point(x.dtype)) fail(kOp, "x must be a floating-point tensor");
}

// Pairs follow each other; within one, channels are innermost.
void check_output(const StageProgram& program, const TensorView& x, const TensorView& index,
                  const TensorView& y) {
  const bool map = !program.vector;
  const std::vector<StageShape> shapes =
      stage_shapes(program, map ? x.shape[x.ndim - 2] : 1, map ? x.shape[x.ndim - 1] : 1);
  const StageShape& s = shapes[program.output];
  const std::int64_t n = index.shape[0], k = index.shape[1];
  require_like(kOp, y, x);
  if (s.vector) {
    require_shape(kOp, y, {n, k, s.channels});
    require_contiguous(kOp, y);
    return;
  }
  require_shape(kOp, y, {n, k, s.channels, s.rows, s.cols});
  TensorView innermost = y;  // [n, k, rows, cols, channels]
  innermost.shape = {n, k, s.rows, s.cols, s.channels};
  innermost.stride = {y.stride[0], y.stride[1], y.stride[3], y.stride[4], y.stride[2]};
  require_contiguous(kOp, innermost);
}

void forward(const StageProgram& program, py::handle x_, py::handle index_, py::handle packed_,
             py::handle y_, std::int64_t threads_) {
  const TensorArg x(x_, "x"), index(index_, "routes.index"), packed(packed_, "packed"), y(y_, "y");
  const int threads = read_threads(kOp, threads_);
  require_index(kOp, index);
  require_on_cpu(kOp, x);
  check_input(program, x);
  check_index(program, index, x);
  require_branches(kOp, index, program.branches);
  check_output(program, x, index, y);
  require_packed(program, packed);
  if ((packed->dtype == Dtype::kFloat64) != (x->dtype == Dtype::kFloat64)) {
    fail(kOp, "packed must be float32, or float64 for a float64 x");
  }
  const py::gil_scoped_release no_gil;
  cpu::branch_stage_forward(program, x, index, packed, y, threads);
}

// --- CUDA ----------------------------------------------------------------------------------------

Dtype vector_dtype(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

void require_parameters(const TensorView& t, Dtype dtype, std::int64_t branches,
                        std::int64_t elements) {
  constexpr std::uintptr_t kAlignment = 8;  // of what a lane reads at once
  require_shape(kOp, t, {branches, elements});
  require_contiguous(kOp, t);
  if (t.dtype != dtype) fail(kOp, std::string(t.name) + " must have the dtype of the kernel's");
  if (reinterpret_cast<std::uintptr_t>(t.data) % kAlignment != 0) {
    fail(kOp, std::string(t.name) + " must be aligned to 8 bytes");
  }
}

// What a block of the device cannot hold is refused.
void require_room(const StageProgram& program, const TensorView& x) {
  const bool map = !program.vector;
  if constexpr (kWithCuda) {
    const std::int64_t bytes = cuda::branch_stage_shared_bytes(
        program, map ? x.shape[x.ndim - 2] : 1, map ? x.shape[x.ndim - 1] : 1, x.dtype);
    const std::int64_t most = cuda::branch_stage_most_shared_bytes(x.device_index);
    if (bytes >= 0 && bytes <= most) return;
    fail_not_implemented(kOp, bytes < 0 ? "plan has too many steps or too large maps"
                                        : "the maps of a branch need " + std::to_string(bytes) +
                                              " bytes of shared memory, a block has " +
                                              std::to_string(most));
  }
}

void forward_cuda(const StageProgram& program, py::handle x_, py::handle index_,
                  py::handle weights_, py::handle vectors_, py::handle y_) {
  const TensorArg x(x_, "x"), index(index_, "routes.index"), y(y_, "y");
  const TensorArg weights(weights_, "weights"), vectors(vectors_, "vectors");
  require_routes(kOp, index);
  check_input(program, x);
  check_index(program, index, x);
  check_output(program, x, index, y);
  require_countable(kOp, "pairs", index->shape[0] * index->shape[1]);
  require_on_gpu(kOp, {&*x, &*index, &*weights, &*vectors});
  if constexpr (kWithCuda) {
    const cuda::StageParameterSizes sizes = cuda::branch_stage_parameter_sizes(program, x->dtype);
    require_parameters(weights, x->dtype, program.branches, sizes.weights);
    require_parameters(vectors, vector_dtype(x->dtype), program.branches, sizes.vectors);
    require_room(program, x);
    void* stream = x.current_stream();
    const py::gil_scoped_release no_gil;
    cuda::branch_stage_forward(program, x, index, weights, vectors, y, stream);
  }
}

}  // namespace

void bind_branch_stage(py::module_& m) {
  py::class_<StageProgram>(m, "BranchStageProgram", py::module_local(),
                           "The steps of a branch; see BranchPlan.")
      .def(py::init(&parse_stage_program), py::arg("integers"))
      .def_property_readonly(
          "packed_elements",
          [](const StageProgram& p) { return cpu::branch_stage_packed_elements(p); },
          "How many elements the packed parameters of all branches have.");
  m.def("branch_stage_pack", &pack, py::arg("program"), py::arg("tensors"), py::arg("packed"),
        py::arg("threads"), "Writes the packed form of the parameters.");
  m.def("branch_stage_forward", &forward, py::arg("program"), py::arg("x"), py::arg("index"),
        py::arg("packed"), py::arg("y"), py::arg("threads"),
        "Writes y. See pyeff.ops.branch_stage.");
  m.def("branch_stage_forward_cuda", &forward_cuda, py::arg("program"), py::arg("x"),
        py::arg("index"), py::arg("weights"), py::arg("vectors"), py::arg("y"), "Writes y.");
}

}  // namespace pyeff::bindings
