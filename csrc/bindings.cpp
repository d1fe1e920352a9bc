// The only file that knows Python. The structs of launchers.h are made from integers that are
// addresses (dpo_kernels/backends/native.py), the GIL is released around every launch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "checks.h"

namespace py = pybind11;

namespace dpo_kernels {
namespace {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// address, stride from sequence to sequence, stride from row to row; in elements
using Strided = std::tuple<Address, int64_t, int64_t>;

// row `index` of a stacked tensor of rows of `size` acc elements, nullptr if there is no tensor
void* stacked(Address address, int64_t index, int64_t size, DType dtype) {
  const int64_t bytes = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return address == 0 ? nullptr : pointer(address + index * size * bytes);
}

TokenBatch make_batch(const Strided& logits, int dtype, const Strided& labels, Address cu_seqlens,
                      std::tuple<int64_t, int64_t, int64_t> shape,
                      std::tuple<int64_t, bool> scoring,
                      std::tuple<double, double, double> transform,
                      std::tuple<int64_t, int64_t> shard) {
  TokenBatch batch;
  Address logits_at, labels_at;
  std::tie(logits_at, batch.seq_stride, batch.row_stride) = logits;
  std::tie(labels_at, batch.label_seq_stride, batch.label_row_stride) = labels;
  batch.logits = pointer(logits_at);
  batch.dtype = static_cast<DType>(dtype);
  batch.labels = pointer<const int64_t>(labels_at);
  batch.cu_seqlens = pointer<const int64_t>(cu_seqlens);
  std::tie(batch.num_seqs, batch.seq_len, batch.vocab) = shape;
  std::tie(batch.ignore_index, batch.shift) = scoring;
  auto& [scale, softcap, inv_temperature] = transform;
  batch.transform = {scale, softcap, inv_temperature};
  std::tie(batch.vocab_start, batch.vocab_total) = shard;
  check(batch);
  return batch;
}

PairLoss make_pair_loss(Address reference_logps, double beta, double label_smoothing,
                        double weight) {
  return {pointer(reference_logps), beta, label_smoothing, weight};
}

ForwardOutputs make_outputs(const TokenBatch& batch, Address tokens,
                            std::tuple<Address, Address> stats, std::tuple<Address, Address> seqs,
                            std::tuple<Address, Address> losses, bool average) {
  const int64_t n = num_tokens(batch), s = batch.num_seqs;
  const DType dtype = batch.dtype;
  auto& [stats_at, is_top1] = stats;
  auto& [seqs_at, counts] = seqs;
  auto& [losses_at, loss] = losses;
  ForwardOutputs out;
  out.logps = stacked(tokens, 0, n, dtype);
  out.row_max = stacked(tokens, 1, n, dtype);
  out.log_sum = stacked(tokens, 2, n, dtype);
  out.entropy = stacked(stats_at, 0, n, dtype);
  out.mean_logits = stacked(stats_at, 1, n, dtype);
  out.log_sum_sq_probs = stacked(stats_at, 2, n, dtype);
  out.is_top1 = pointer<uint8_t>(is_top1);
  out.seq_logps = stacked(seqs_at, 0, s, dtype);
  out.seq_scale = stacked(seqs_at, 1, s, dtype);
  out.seq_counts = pointer<int64_t>(counts);
  out.rewards = losses_at == 0 ? nullptr : stacked(seqs_at, 2, s, dtype);
  out.losses = pointer(losses_at);
  out.loss = pointer(loss);
  out.average = average;
  return out;
}

Backward make_backward(const TokenBatch& batch, Address tokens, Address seq_scale,
                       std::tuple<Address, int, int64_t> grad, const Strided& grad_logits,
                       int grad_dtype, bool zero_unscored) {
  const int64_t n = num_tokens(batch);
  auto& [grad_at, grad_index, grad_stride] = grad;
  auto& [grad_logits_at, grad_seq_stride, grad_row_stride] = grad_logits;
  Backward bwd;
  bwd.logps = stacked(tokens, 0, n, batch.dtype);
  bwd.row_max = stacked(tokens, 1, n, batch.dtype);
  bwd.log_sum = stacked(tokens, 2, n, batch.dtype);
  bwd.seq_scale = pointer(seq_scale);
  bwd.grad = pointer(grad_at);
  bwd.grad_index = static_cast<GradIndex>(grad_index);
  bwd.grad_stride = grad_stride;
  bwd.grad_logits = pointer(grad_logits_at);
  bwd.grad_dtype = static_cast<DType>(grad_dtype);
  bwd.grad_seq_stride = grad_seq_stride;
  bwd.grad_row_stride = grad_row_stride;
  bwd.zero_unscored = zero_unscored;
  return bwd;
}

}  // namespace
}  // namespace dpo_kernels

PYBIND11_MODULE(_C, module) {
  using namespace dpo_kernels;
  using namespace py::literals;
  using release_gil = py::call_guard<py::gil_scoped_release>;

  py::class_<TokenBatch>(module, "TokenBatch")
      .def(py::init(&make_batch), "logits"_a, "dtype"_a, "labels"_a, "cu_seqlens"_a, "shape"_a,
           "scoring"_a, "transform"_a, "shard"_a);
  py::class_<PairLoss>(module, "PairLoss")
      .def(py::init(&make_pair_loss), "reference_logps"_a, "beta"_a, "label_smoothing"_a,
           "weight"_a);
  py::class_<ForwardOutputs>(module, "ForwardOutputs")
      .def(py::init(&make_outputs), "batch"_a, "tokens"_a, "stats"_a, "seqs"_a, "losses"_a,
           "average"_a);
  py::class_<Backward>(module, "Backward")
      .def(py::init(&make_backward), "batch"_a, "tokens"_a, "seq_scale"_a, "grad"_a,
           "grad_logits"_a, "grad_dtype"_a, "zero_unscored"_a);

  module.def("cpu_forward", &cpu_forward, "batch"_a, "pair"_a, "out"_a, "threads"_a, release_gil());
  module.def("cpu_backward", &cpu_backward, "batch"_a, "bwd"_a, "threads"_a, release_gil());
  module.def("cpu_isa", &cpu_isa);
  module.def("cpu_set_isa", &cpu_set_isa, "name"_a);
  module.def(
      "cpu_share_openmp", [](Address parallel) { cpu_share_openmp(pointer(parallel)); },
      "gomp_parallel"_a);

#ifdef DPO_KERNELS_WITH_CUDA
  module.attr("cuda_archs") = DPO_KERNELS_CUDA_ARCHS;
  module.def("cuda_device_problem", &cuda_device_problem, "device"_a);
  module.def("cuda_workspace_bytes", &cuda_workspace_bytes, "batch"_a);
  module.def(
      "cuda_forward",
      [](const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
         Address workspace, int device, Address stream) {
        cuda_forward(batch, pair, out, pointer(workspace), device, pointer(stream));
      },
      "batch"_a, "pair"_a, "out"_a, "workspace"_a, "device"_a, "stream"_a, release_gil());
  module.def(
      "cuda_backward",
      [](const TokenBatch& batch, const Backward& bwd, int device, Address stream) {
        cuda_backward(batch, bwd, device, pointer(stream));
      },
      "batch"_a, "bwd"_a, "device"_a, "stream"_a, release_gil());
#else
  module.attr("cuda_archs") = "";
#endif
}
