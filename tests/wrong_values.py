"""Tensors that no kernel can read, each made from a right one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh


def a_list(x: Tensor):
    return x.tolist()


def an_array(x: Tensor):
    return x.numpy()


def nothing(x: Tensor):
    return None


def integer(x: Tensor):
    return x.long()


def boolean(x: Tensor):
    return x.bool()


def complex64(x: Tensor):
    return x.to(torch.complex64)


def floating(x: Tensor):
    return x.float()


def float8(x: Tensor):
    return x.to(torch.float8_e4m3fn)


def sparse(x: Tensor):
    return x.to_sparse()


def csr(x: Tensor):
    return x.to_sparse_csr(dense_dim=x.dim() - 2)


def mkldnn(x: Tensor):
    return x.float().to_mkldnn()


def nested(x: Tensor):
    return torch.nested.nested_tensor([x.flatten(), x.flatten()[1:]])


def jagged(x: Tensor):
    return torch.nested.nested_tensor([x.flatten(), x.flatten()[1:]], layout=torch.jagged)


def quantised(x: Tensor):
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8)


def dtensor(x: Tensor):
    mesh = init_device_mesh("cpu", (1,))
    return DTensor.from_local(x, mesh, [Replicate()])


# of any number of dimensions; a CSR tensor has two at least
_ANY = (a_list, an_array, boolean, complex64, sparse, nested, jagged, quantised)
VECTORS = (*_ANY, integer, mkldnn)
FLOAT_TENSORS = (*VECTORS, nothing, csr, float8, dtensor)
INTEGER_TENSORS = (*_ANY, nothing, csr, floating, dtensor)
