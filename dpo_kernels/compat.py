"""What depends on torch's version or internals, each with its reason."""

from __future__ import annotations

from contextlib import contextmanager

import torch

_KEY = torch._C.DispatchKey
_AUTOGRAD_KEYS = (_KEY.AutogradCPU, _KEY.AutogradCUDA, _KEY.AutogradOther, _KEY.ADInplaceOrView)


@contextmanager
def autograd_inside_op():
    """Lets the implementation of an op use autograd for itself.

    A compiled graph calls ops below the autograd keys, where enable_grad alone records nothing, and
    neither does it in inference mode.
    """
    with torch.inference_mode(False), _autograd_keys(), torch.enable_grad():
        yield


def _autograd_keys():
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded - torch._C.DispatchKeySet(key)
    included = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded)
