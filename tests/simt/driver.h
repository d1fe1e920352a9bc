// The CUDA launchers of csrc/launchers.h, executed on the host.
#pragma once

#include "../../csrc/launchers.h"
#include "simt.h"

namespace dpo_kernels::simt_driver {

// the "device": as many multiprocessors as launch.blocks; its threads are a block's
int64_t workspace_bytes(const TokenBatch& batch);
void forward(const TokenBatch& batch, const PairLoss* pair, const ForwardOutputs& out,
             void* workspace, const simt::Launch& launch);
void backward(const TokenBatch& batch, const Backward& bwd, const simt::Launch& launch);

}  // namespace dpo_kernels::simt_driver
