"""`help` of what is public: who must call, what comes back, examples that run; and `dir`."""

from __future__ import annotations

import inspect
import re
import tempfile
import textwrap

import numpy as np
import pytest

import mpicoll as mc

pytestmark = pytest.mark.mpi

CLASSES = {mc.ProcessGroup: "pg.", mc.Work: "work."}
FUNCTIONS = ["new_group", "parent_group", "process_group", "wait_all", "join_world"]
DOCS = {name: inspect.getdoc(getattr(mc, name)) or "" for name in FUNCTIONS} | {
    prefix + name: inspect.getdoc(member) or ""
    for cls, prefix in CLASSES.items()
    for name, member in vars(cls).items()
    if not name.startswith("_")
}
ELSEWHERE = {"pg.spawn", "parent_group", "join_world"}  # they take programs of their own
FACTS = ("is_broken", "is_closed", "rank", "size", "name", "group_name", "group_desc", "timeout")
TRIVIAL = {"work.is_success", "work.exception", "work.synchronize"} | {
    f"pg.{name}" for name in (*FACTS, "device", "ranks")
}
NAMES = ("group_name", "group_desc")
WHO = r"[Ee]very (rank|one)|Local\b|must call it|no other need|no part in it"


def example(doc: str) -> str:
    _, found, rest = doc.partition("\nExample::\n")
    return textwrap.dedent(re.split(r"\n(?=\S)", rest)[0]) if found else ""


def test_the_examples_run(fresh):
    for name, doc in DOCS.items():
        source = example(doc)
        assert bool(source) == (name not in ELSEWHERE | TRIVIAL), name
        pg = fresh.split(0)
        names = {"mc": mc, "np": np, "pg": pg, "rank": pg.rank(), "size": pg.size()}
        exec(compile(source, f"help({name})", "exec"), names | {"tempfile": tempfile})
        if not (pg.is_closed or pg.is_broken):
            pg.shutdown()


def test_help_says_who_must_call_and_speaks_of_every_argument():
    for name, doc in DOCS.items():
        owner, _, method = name.rpartition(".")
        member = getattr({"pg": mc.ProcessGroup, "work": mc.Work, "": mc}[owner], method)
        if name in TRIVIAL or name == "pg.recv_anysource":  # which says that it is recv
            continue
        if owner != "work":  # whose class says that all of it is local
            assert re.search(WHO, doc), name
        for argument in {*inspect.signature(member).parameters} - {"self", "pg", *NAMES}:
            assert re.search(rf"\b{argument}\b.*: ", doc), (name, argument)


def test_dir_shows_what_is_public(fresh):
    def public(of):
        return {name for name in dir(of) if not name.startswith("__")}

    work = fresh.barrier()
    assert public(work) == {name[5:] for name in DOCS if name.startswith("work.")}
    work.wait()
    messages = [fresh.send(np.ones(1), fresh.rank()), fresh.recv(np.ones(1), fresh.rank())]
    assert public(messages[1]) == public(work)
    mc.wait_all(messages)
    assert public(fresh) == {"comm", *(name[3:] for name in DOCS if name.startswith("pg."))}
    assert public(mc) == set(mc.__all__) - {"__version__"}
    assert {"__class__", "__doc__"} <= set(dir(work)) & set(dir(mc.ReduceOp.SUM)) & set(dir(fresh))
