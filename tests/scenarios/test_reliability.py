"""scripts/reliability: it runs, it tells right from wrong, and its tables find their page."""

from __future__ import annotations

import json

import pytest

from scripts.failures.__main__ import measure, write
from tests.harness import ROOT


def test_what_will_not_change(capsys, tmp_path):
    measure("another op,all is well,int32[4] received")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    classes = {(row["scenario"], row["contender"]): row["class"] for row in found}
    assert len(found) >= 6 and not any(row["left"]["processes"] for row in found), found
    for mismatch in ("allreduce with another op", "float32[4] sent, int32[4] received"):
        assert classes[mismatch, "ours"] == "error on every rank", found
        assert classes[mismatch, "mpi"] == "wrong data in silence", found
    well = {kind for (name, _), kind in classes.items() if "all is well" in name}
    assert well == {"right answer"}, found

    page = tmp_path / "reliability.md"
    page.write_text((ROOT / "docs" / "reliability.md").read_text())
    write(page, found)
    written = page.read_text()
    assert "| allreduce with another op | `CollectiveMismatchError` on every rank" in written
    write(page, found)
    assert page.read_text() == written, "a second time changes nothing"


def test_unknown_phrases_are_refused():
    with pytest.raises(SystemExit, match="no scenario"):
        measure("nonsense")
