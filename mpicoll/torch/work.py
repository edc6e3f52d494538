"""What `torch.distributed` holds of one call: PyTorch's `Work` over mpicoll's.

PyTorch's programs expect a call to go on though nobody waits for it, and its C++ code, such as
DistributedDataParallel's, waits for futures without the interpreter.  So a thread of mpicoll's
progresses what has a future, from when that is asked for, and what nobody has waited for in a
moment: most calls are waited for at once, and a second thread would only be in the way.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from .. import MpicollError, Work
from .errors import torchs

_NO_TIMEOUT = timedelta(0)  # as C++ has it


class _Abandoned:
    """The calls that may have been left alone; a thread looks at them after a moment."""

    MOMENT = 5e-4  # seconds

    def __init__(self) -> None:
        self._works: deque[TorchWork] = deque()
        self._news: SimpleQueue[None] = SimpleQueue()
        self._awake = False
        self._thread: threading.Thread | None = None

    def add(self, work: TorchWork) -> None:
        """Have a call looked at."""
        self._works.append(work)
        if not self._awake:
            self._awake = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, daemon=True)
                self._thread.start()
            self._news.put(None)

    def _look(self) -> None:
        while True:
            self._news.get()
            while self._awake:
                time.sleep(self.MOMENT)
                if not self._have_gone_on():
                    self._awake = False
                    self._awake = bool(self._works)  # one may have come just now

    def _have_gone_on(self) -> bool:
        """Have all that are there go on; return whether there were any."""
        found = bool(self._works)
        while self._works:
            with contextlib.suppress(MpicollError):  # whoever waits for it hears of it
                self._works.popleft().go_on()
        return found


_abandoned = _Abandoned()


class TorchWork(dist.Work):
    """One call.

    Args:
        works: mpicoll's: one, or all that were coalesced.
        outputs: the tensors that hold the results.
        back: copies the results to where the user wants them, once the call is over.
    """

    def __init__(
        self,
        works: Sequence[Work],
        outputs: Sequence[Tensor],
        back: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self._works = works
        self._outputs = list(outputs)
        self._back = back
        self._lock = threading.Lock()
        self._future: Future[Any] | None = None
        self._attended = self.is_completed()  # nothing has to be done for it to go on
        if not self._attended:
            _abandoned.add(self)

    def go_on(self) -> None:
        """Have a thread progress it, unless somebody waits for it."""
        if not self._attended:
            self._attended = True
            for work in self._works:
                future = work.get_future()
                if self._back is not None:
                    future.add_done_callback(lambda _: self.is_completed())

    @classmethod
    def all_of(cls, begun: Sequence[TorchWork]) -> TorchWork:
        """Return one for several calls."""

        def back() -> None:
            for work in begun:
                work._finish()

        works = [one for work in begun for one in work._works]
        return cls(works, [tensor for work in begun for tensor in work._outputs], back)

    def _is_over(self) -> bool:
        return all(work.is_completed() for work in self._works)

    def _finish(self) -> None:
        """Copy the results back, once; whoever finds that done finds them there."""
        if self._back is not None:
            with self._lock:
                if self._back is not None:
                    self._back()
                    self._back = None

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Wait until the call is done, and return True; raise what became of it otherwise."""
        self._attended = True
        limit = timeout if timeout > _NO_TIMEOUT else None
        try:
            for work in self._works:
                work.wait(limit)
        except MpicollError as error:
            raise torchs(error) from error.__cause__
        self._finish()
        return True

    def synchronize(self) -> None:
        """Do as `wait` does."""
        self.wait()

    def is_completed(self) -> bool:
        """Return whether the call is over, well or not; its results are there then."""
        over = self._is_over()
        if over and self._back is not None:
            self.is_success()
        return over

    def is_success(self) -> bool:
        """Return whether the call is over and went well."""
        done = all(work.is_success() for work in self._works)
        if done:
            self._finish()
        return done

    def exception(self) -> BaseException | None:
        """Return the call's error, if it is over and failed."""
        error = next(filter(None, (work.exception() for work in self._works)), None)
        return None if error is None else torchs(error)

    def result(self) -> list[Tensor]:
        """Return the tensors that hold the results."""
        self.wait()
        return self._outputs

    def source_rank(self) -> int:
        """Return the rank in the group that a finished receive took its message from."""
        return int(self._works[0].source_rank())  # type: ignore[arg-type]

    _source_rank = source_rank

    def get_future(self) -> Future[Any]:
        """Return a future of `result()`, for Python and for C++."""
        if self._future is None:
            self._future = self._make_future()
        return self._future

    def _make_future(self) -> Future[Any]:
        made: Future[Any] = Future()
        left = [len(self._works)]

        def settle(_: object) -> None:
            with self._lock:
                left[0] -= 1
                if left[0]:
                    return
            error = self.exception()
            if error is not None:
                made.set_exception(error)
                return
            self._finish()
            made.set_result(self._outputs)

        if self._is_over() and self.exception() is None:
            self._finish()
            made.set_result(self._outputs)
            return made
        for work in self._works:
            work.get_future().add_done_callback(settle)
        return made.then(_value)  # C++ does not see the exception in `made` itself


def _value(future: Future[Any]) -> Any:
    return future.value()


def future_of(work: Work) -> Future[Any]:
    """Return PyTorch's future of a call of a group's own; see the package's."""
    made: Future[Any] = Future()

    def settle(_: object) -> None:
        error = work.exception()
        if error is not None:
            made.set_exception(torchs(error))
        else:
            made.set_result(work.result())

    work.get_future().add_done_callback(settle)
    return made.then(_value)


class FinishedWork(dist.Work):
    """What a synchronous call returns: it is over, and has raised if it failed."""

    def wait(self, timeout: timedelta = _NO_TIMEOUT) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Do nothing."""

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def is_success(self) -> bool:
        """Return True."""
        return True

    def get_future(self) -> Future[Any]:
        """Return a future that is done."""
        made: Future[Any] = torch.futures.Future()
        made.set_result([])
        return made


FINISHED = FinishedWork()
