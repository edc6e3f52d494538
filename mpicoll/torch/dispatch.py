"""What PyTorch's C++ code calls by its dispatcher, past the methods of a group written in Python.

`torch.ops._c10d_functional.all_gather_into_tensor_out` ends in the operator `_allgather_base_`,
whose own kernel wants a C++ backend.  A kernel in its place calls the group's method, and for the
groups of other backends what the own kernel does.
"""

from __future__ import annotations

import functools
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions


@functools.cache
def mend(ours: type[Any]) -> Any:
    """Put the kernel in place, once; only where a group of this backend, `ours`, is made."""
    kernel = functools.partial(_allgather_base, ours)
    library = torch.library.Library("c10d", "IMPL")
    with warnings.catch_warnings():  # that a kernel is replaced
        warnings.simplefilter("ignore", UserWarning)
        for device in ("CPU", "CUDA"):
            library.impl("_allgather_base_", kernel, device, allow_override=True)
    return library  # its kernels live as long as it


def _allgather_base(
    ours: type[Any],
    output: Tensor,
    input: Tensor,
    boxed: Any,
    asyncs: bool = True,
    timeout: int = -1,
) -> tuple[Tensor, Any]:
    group = dist.ProcessGroup.unbox(boxed)
    opts = AllgatherOptions()
    opts.asyncOp = asyncs
    if timeout > 0:
        opts.timeout = timedelta(milliseconds=timeout)
    if isinstance(group, ours):
        # C++ alone would hold the Work, and not the Python object that knows how to wait.
        opts.asyncOp = False
        return output, group.all_gather_single(output, input, opts).boxed()
    work = group._get_backend(input.device)._allgather_base(output, input, opts)
    return output, work.boxed()
