"""`Future`: what `Work.get_future` returns.  Not imported before somebody asks for one."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any


class Future(concurrent.futures.Future[Any]):
    """A `concurrent.futures.Future` that also answers to torch.futures' names."""

    def wait(self) -> Any:
        """Block until done, and return the value."""
        return self.result()

    def value(self) -> Any:
        """Return the value of a future that is done."""
        return self.result(0)

    def then(self, callback: Callable[[Future], Any]) -> Future:
        """Return a future of what `callback` makes of this one, once it is done."""
        after = Future()

        def run(_: object) -> None:
            if not after.set_running_or_notify_cancel():
                return
            try:
                after.set_result(callback(self))
            except BaseException as error:
                after.set_exception(error)

        self.add_done_callback(run)
        return after
