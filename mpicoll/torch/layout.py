"""Tensors that do not lie in one piece of memory, row by row: a copy goes in their place.

What is plain already goes as it is.  What mpicoll can't take in any layout, such as a sparse
tensor, goes as it is too: it is refused there, so that the peers hear of it in the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Written:
    """The copies that a call writes, and what is to be done with them when it is over."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def plain(self, tensor: Tensor, *, read: bool) -> Tensor:
        """Return a tensor to write in the place of this one; with its values, if it is `read`."""
        if not _needs_copy(tensor):
            return tensor
        made = plain(tensor) if read else torch.empty_like(tensor, memory_format=_ROWS)
        self._pairs.append((tensor.detach(), made))
        return made

    def all_plain(self, tensors: Sequence[Tensor], *, read: bool) -> list[Tensor]:
        """Do so for each tensor of a list."""
        return [self.plain(tensor, read=read) for tensor in tensors]

    @property
    def back(self) -> Callable[[], None] | None:
        """What copies the results back; None where there is nothing to copy."""
        return self._copy_back if self._pairs else None

    def _copy_back(self) -> None:
        with torch.no_grad():
            for tensor, made in self._pairs:
                tensor.copy_(made)


_ROWS = torch.contiguous_format


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor can be given to mpicoll as it is."""
    return tensor.layout is torch.strided and not _needs_copy(tensor)


def is_sparse(tensor: Tensor) -> bool:
    """Return whether it is a sparse tensor that has its indices as coordinates."""
    return tensor.layout is torch.sparse_coo


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values that can be given to mpicoll; a copy if it must be."""
    if not _needs_copy(tensor):
        return tensor
    return tensor.detach().resolve_conj().resolve_neg().contiguous()


def all_plain(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Do so for each tensor of a list."""
    return [plain(tensor) for tensor in tensors]


def _needs_copy(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg()
