"""What core.py and transport.py see of the compiled core."""

from collections.abc import Callable, Sequence
from typing import Any

from ...arrays.dtypes import Array
from ...engine.call import Call, Pieces
from ...engine.kinds import Kind
from ...engine.recorder import Entry
from ...engine.tasks import GroupState
from ...runtime.library import Steps

def cease() -> None: ...
def direct(group_class: type) -> None: ...
def configure(**shared: Any) -> None: ...
def configure_messages(**shared: Any) -> None: ...

class Node:
    def __init__(
        self, memory: object, layout: Sequence[int], crowded: bool, *more: Any
    ) -> None: ...
    def close(self) -> None: ...

class Chunks(Node):
    def knows(self, array: Array, dtype: int, op: int) -> bool: ...
    def fold(self, flag: int, array: Array, dtype: int, op: int, upto: int, c: int) -> int: ...
    def share(self, flag: int, array: Array, dtype: int, op: int, half: int) -> int: ...
    def reduce(self, flag: int, array: Array, dtype: int, op: int, root: int, c: int) -> int: ...
    def scatter(
        self, flag: int, array: Array, dtype: int, op: int, output: Array, c: int
    ) -> int: ...

class Moves(Node):
    def begin(
        self,
        flag: int,
        gives: Sequence[Array],
        takes: Sequence[Array | None],
        parted: bool,
        only: int,
        even: bool,
        nbytes: int,
    ) -> None: ...
    def goes_on(self) -> bool: ...
    def advance(self) -> int: ...

class Core(Node):
    moves: Moves | None
    owed: int
    finished: tuple[Kind, int] | None
    def __init__(
        self, memory: object, layout: Sequence[int], crowded: bool, *, most: int, **known: Any
    ) -> None: ...
    def checked(self, kind: int, arguments: tuple[Any, ...]) -> Call: ...
    def take_over(self, kind: Kind) -> int: ...
    def objects(
        self, kind: int, obj: object, root: object, timeout: object
    ) -> list[bytes] | Pieces | None: ...

class Posted:
    rings: Rings
    kind: int
    peer: int
    tag: int
    source: int
    called: float
    timeout: float
    given: object
    entry: Entry
    filled: bool
    begun: bool
    wrong: tuple[int, int, bytes] | None
    apart: tuple[int, int] | None
    failed: int
    def advance(self) -> bool: ...
    def cancel(self) -> bool: ...
    def abandon(self) -> None: ...
    def complete(self) -> None: ...
    def adopt(self) -> bool: ...
    def wait(self) -> bool: ...
    def look(self) -> bool: ...

class Rings(Node):
    group_state: GroupState
    append: Callable[[Entry], None]
    steps: Callable[[Call, Posted], Steps]
    limit: float
    sent: list[int]
    received: list[int]
    def __init__(
        self, memory: object, layout: Sequence[int], crowded: bool, **sizes: Any
    ) -> None: ...
    def message(
        self,
        kind: int,
        array: Array,
        dtype: int,
        count: int,
        text: bytes,
        peer: int,
        tag: int,
        apart: int,
    ) -> Posted: ...
    def advance(self) -> None: ...
    def probe(self, peer: int, tag: int) -> tuple[int, int, int, bytes] | None: ...
    def drop(self) -> tuple[int, int, int, int, int, int] | None: ...
