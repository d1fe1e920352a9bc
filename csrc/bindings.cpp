// The only file that knows Python. The structs of launchers.h are made from integers that are
// addresses (dpo_kernels/backends/native.py), the GIL is released around every launch.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "launchers.h"

namespace py = pybind11;

namespace dpo_kernels {
namespace {

using Address = std::uintptr_t;

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// row `index` of a stacked tensor of rows of `size` acc elements, nullptr if there is no tensor
void* stacked(Address address, int64_t index, int64_t size, DType dtype) {
  const int64_t bytes = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return address == 0 ? nullptr : pointer(address + index * size * bytes);
}

TokenBatch make_batch(Address logits, int dtype, int64_t vocab, int64_t seq_stride,
                      int64_t row_stride, Address labels, int64_t label_seq_stride,
                      int64_t label_row_stride, Address cu_seqlens, int64_t num_seqs,
                      int64_t seq_len, int64_t ignore_index, bool shift, double scale,
                      double softcap, double inv_temperature) {
  return {pointer(logits),
          static_cast<DType>(dtype),
          vocab,
          seq_stride,
          row_stride,
          pointer<const int64_t>(labels),
          label_seq_stride,
          label_row_stride,
          pointer<const int64_t>(cu_seqlens),
          num_seqs,
          seq_len,
          ignore_index,
          shift,
          {scale, softcap, inv_temperature}};
}

PairLoss make_pair_loss(Address reference_logps, double beta, double label_smoothing,
                        double weight) {
  return {pointer(reference_logps), beta, label_smoothing, weight};
}

ForwardOutputs make_outputs(const TokenBatch& batch, Address tokens, Address stats, Address is_top1,
                            Address seqs, Address counts, Address losses, Address loss,
                            bool average) {
  const int64_t n = num_tokens(batch), s = batch.num_seqs;
  const DType dtype = batch.dtype;
  ForwardOutputs out;
  out.logps = stacked(tokens, 0, n, dtype);
  out.row_max = stacked(tokens, 1, n, dtype);
  out.log_sum = stacked(tokens, 2, n, dtype);
  out.entropy = stacked(stats, 0, n, dtype);
  out.mean_logits = stacked(stats, 1, n, dtype);
  out.log_sum_sq_probs = stacked(stats, 2, n, dtype);
  out.is_top1 = pointer<uint8_t>(is_top1);
  out.seq_logps = stacked(seqs, 0, s, dtype);
  out.seq_scale = stacked(seqs, 1, s, dtype);
  out.seq_counts = pointer<int64_t>(counts);
  out.rewards = losses == 0 ? nullptr : stacked(seqs, 2, s, dtype);
  out.losses = pointer(losses);
  out.loss = pointer(loss);
  out.average = average;
  return out;
}

Backward make_backward(const TokenBatch& batch, Address tokens, Address seq_scale, Address grad,
                       int grad_index, int64_t grad_stride, Address grad_logits,
                       int64_t grad_seq_stride, int64_t grad_row_stride, bool zero_unscored) {
  const int64_t n = num_tokens(batch);
  return {stacked(tokens, 0, n, batch.dtype),
          stacked(tokens, 1, n, batch.dtype),
          stacked(tokens, 2, n, batch.dtype),
          pointer(seq_scale),
          pointer(grad),
          static_cast<GradIndex>(grad_index),
          grad_stride,
          pointer(grad_logits),
          grad_seq_stride,
          grad_row_stride,
          zero_unscored};
}

}  // namespace
}  // namespace dpo_kernels

PYBIND11_MODULE(_C, module) {
  using namespace dpo_kernels;
  using release_gil = py::call_guard<py::gil_scoped_release>;

  py::class_<TokenBatch>(module, "TokenBatch").def(py::init(&make_batch));
  py::class_<PairLoss>(module, "PairLoss").def(py::init(&make_pair_loss));
  py::class_<ForwardOutputs>(module, "ForwardOutputs").def(py::init(&make_outputs));
  py::class_<Backward>(module, "Backward").def(py::init(&make_backward));

  module.def("cpu_forward", &cpu_forward, release_gil());
  module.def("cpu_backward", &cpu_backward, release_gil());
  module.def("cpu_isa", &cpu_isa);
  module.def("cpu_set_isa", &cpu_set_isa);
  module.def("cpu_share_openmp", [](Address parallel) { cpu_share_openmp(pointer(parallel)); });

#ifdef DPO_KERNELS_WITH_CUDA
  module.attr("cuda_archs") = DPO_KERNELS_CUDA_ARCHS;
  module.def("cuda_workspace_bytes", &cuda_workspace_bytes);
  module.def(
      "cuda_forward",
      [](const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
         Address workspace, int device, Address stream) {
        cuda_forward(batch, pair, out, pointer(workspace), device, pointer(stream));
      },
      release_gil());
  module.def(
      "cuda_backward",
      [](const TokenBatch& batch, const Backward& bwd, int device, Address stream) {
        cuda_backward(batch, bwd, device, pointer(stream));
      },
      release_gil());
#else
  module.attr("cuda_archs") = "";
#endif
}
