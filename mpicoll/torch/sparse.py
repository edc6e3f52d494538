"""The sum of sparse tensors over all ranks: their indices and values are gathered, and added up."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

import mpicoll as mc


def allreduce(group: mc.ProcessGroup, tensor: Tensor, limit: timedelta | None) -> None:
    """Sum a COO tensor over all ranks, in place.  It waits; each rank may have its own indices."""
    own = tensor.coalesce()
    size = group.size()
    counts = torch.empty(size, dtype=torch.int64)
    group.all_gather_single(counts, torch.tensor([own._nnz()]), limit).wait()
    indices = [own.indices().new_empty((tensor.sparse_dim(), n)) for n in counts.tolist()]
    values = [own.values().new_empty((n, *own.values().shape[1:])) for n in counts.tolist()]
    group.allgather(indices, own.indices().contiguous(), limit).wait()
    group.allgather(values, own.values().contiguous(), limit).wait()
    summands = torch.cat(indices, 1), torch.cat(values)
    total = torch.sparse_coo_tensor(*summands, tensor.shape, check_invariants=True)
    with torch.no_grad():
        tensor.copy_(total.coalesce())
