"""The table of kinds: codes that never change, and one place that knows the names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mpicoll
from mpicoll.engine import kinds
from mpicoll.engine.kinds import KINDS, Kind
from mpicoll.transports.base import Transport

PACKAGE = Path(mpicoll.__file__).parent
CODES = (  # they are in records of arrival: new kinds come last
    *("allreduce", "broadcast", "reduce", "barrier", "allgather", "all_gather_single"),
    *("gather", "scatter", "reduce_scatter", "reduce_scatter_single", "alltoall"),
    *("all_to_all_single", "allreduce_coalesced", "allgather_coalesced"),
    *("all_gather_single_coalesced", "reduce_scatter_single_coalesced", "scan", "exscan"),
    *("monitored_barrier", "broadcast_object", "allgather_object", "gather_object"),
    *("scatter_object", "split_group", "split", "local_group", "cross_node_group"),
    *("merge_remote_group", "new_group", "shutdown", "send", "recv", "empty", "shrink_group"),
    *("spawn", "parent_group", "subgroup"),
)


def test_a_code_never_changes():
    assert tuple(row.name for row in KINDS) == CODES
    assert [row.code for row in KINDS] == list(range(len(CODES)))


def test_each_row_is_known_by_its_name():
    for row in KINDS:
        assert getattr(kinds, row.name.upper()) is row is kinds.named(row.name)
    later = kinds.named("of a version to come")
    assert (str(later), later.queued, later.receives) == ("of a version to come", True, False)


MOVING = [*(row for row in KINDS if row.inline), kinds.SEND, kinds.RECV]


@pytest.mark.parametrize("row", MOVING, ids=str)
def test_a_kind_that_moves_data_has_steps_of_its_name(row: Kind):
    assert callable(getattr(Transport, row.name))


def test_only_the_table_of_kinds_knows_what_a_name_means():
    """No comparison with the name of a kind stands elsewhere, nor a set of such names."""
    names = {row.name for row in KINDS} - {"empty", "split", "spawn"}  # these are words, too
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            inside = []
            if isinstance(node, ast.Compare):
                inside = [node.left, *node.comparators]
            elif isinstance(node, ast.Set):
                inside = [node]
            for part in inside:
                for leaf in ast.walk(part):
                    if isinstance(leaf, ast.Constant) and leaf.value in names:
                        found.append(f"{path.name}:{leaf.lineno} {leaf.value}")
    assert not found
