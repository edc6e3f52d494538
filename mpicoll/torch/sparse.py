"""The sum of sparse tensors over all ranks: their indices and values are gathered, and added up."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import Tensor

import mpicoll as mc


def allreduce(group: mc.ProcessGroup, tensor: Tensor, limit: timedelta | None) -> None:
    """Sum a COO tensor over all ranks, in place.  It waits; each rank may have its own indices."""
    own = tensor.coalesce()
    mine = torch.tensor([own._nnz(), *tensor.shape])
    said = torch.empty(group.size(), len(mine), dtype=torch.int64)
    group.all_gather_single(said, mine, limit).wait()
    if (said[:, 1:] != mine[1:]).any():  # every rank finds that
        raise mc.CollectiveMismatchError(
            f"allreduce of sparse tensors: their shapes differ between the ranks, which gave "
            f"{said[:, 1:].tolist()}. No data was moved; the group is still usable"
        )
    counts = said[:, 0].tolist()
    indices = [own.indices().new_empty((tensor.sparse_dim(), n)) for n in counts]
    values = [own.values().new_empty((n, *own.values().shape[1:])) for n in counts]
    group.allgather(indices, own.indices().contiguous(), limit).wait()
    group.allgather(values, own.values().contiguous(), limit).wait()
    summands = torch.cat(indices, 1), torch.cat(values)
    total = torch.sparse_coo_tensor(*summands, tensor.shape, check_invariants=True)
    with torch.no_grad():
        tensor.copy_(total.coalesce())
