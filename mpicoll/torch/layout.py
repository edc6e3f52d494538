"""Tensors that do not lie in one piece of memory, row by row: a copy goes in their place.

What is plain already goes as it is.  What mpicoll can't take in any layout, such as a sparse
tensor, or what a result can't be copied back to, goes as it is too: it is refused there, so that
the peers hear of it in the same call.

mpicoll guards the memory of a call under way, and that is the copy's.  So a call that is given a
tensor to which a result is still to be copied waits for that first.
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
        if not _needs_copy(tensor) or _shares_elements(tensor):
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

    def meets(self, tensor: Tensor) -> bool:
        """Return whether a result is to be copied to where this tensor lies."""
        start, stop = _span(tensor)
        return any(a < stop and start < b for a, b in (_span(to) for to, _ in self._pairs))


NOTHING = Written()
"""Of a call that writes no copies."""

_under_way: dict[Written, Callable[[], bool]] = {}


def await_copies(written: Written, over: Callable[[], bool]) -> None:
    """Have calls that meet these results wait until `over`, which progresses and copies back."""
    _under_way[written] = over


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
    if _under_way:
        _let_come(tensor)
    return not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg()


def _let_come(tensor: Tensor) -> None:
    """Wait until no result is still to be copied to where a tensor lies."""
    for written, over in list(_under_way.items()):
        while not (done := over()) and written.meets(tensor):
            pass
        if done:
            _under_way.pop(written, None)


def _shares_elements(tensor: Tensor) -> bool:
    """Return whether several elements lie in one place, as an expanded tensor's do."""
    return any(step == 0 and n > 1 for step, n in zip(tensor.stride(), tensor.shape, strict=True))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return where the elements of a tensor begin, and where they have ended."""
    start, size = tensor.data_ptr(), tensor.element_size()
    if tensor.numel() == 0:
        return start, start
    steps = (step * (n - 1) for step, n in zip(tensor.stride(), tensor.shape, strict=True))
    return start, start + (sum(steps) + 1) * size
