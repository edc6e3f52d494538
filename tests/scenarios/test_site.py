"""The site: it builds without a warning, and every public name can be linked to."""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path

import pytest

import mpicoll as mc
from mpicoll import torch as door
from tests.harness import environment, run_bounded

for needed in ("sphinx", "myst_parser", "furo"):
    pytest.importorskip(needed, reason="the site needs Sphinx, MyST and furo (extra: docs)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    argv = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "--keep-going", "docs", str(folder)]
    ended = run_bounded(argv, 120, environment())
    assert ended.code == 0 and not ended.output, ended.output
    return folder


def linkable(site: Path) -> set[str]:
    """The names of Python objects in the site's inventory: four lines, then a compressed list."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(packed).decode().splitlines()
    return {line.split()[0] for line in lines if line.split()[1].startswith("py:")}


def test_every_public_name_can_be_linked_to(site: Path) -> None:
    public = {f"mpicoll.{name}" for name in mc.__all__}
    public |= {f"mpicoll.torch.{name}" for name in door.__all__}
    for kind in (mc.ProcessGroup, mc.Work, mc.Future):
        members = (name for name in vars(kind) if not name.startswith("_"))
        public |= {f"mpicoll.{kind.__name__}.{name}" for name in members}
    missing = public - linkable(site)
    assert not missing, sorted(missing)


def test_what_is_raised_is_an_error(site: Path) -> None:
    """A sentence under "Raises:" would be shown as the name of an exception."""
    named = []
    for page in (site / "api").glob("*.html"):
        for entry in re.findall(r">Raises<.*?</dd>", page.read_text(), re.S):
            named += re.findall(
                r"<p>(.*?) – ", re.sub(r"</?(a|strong|code|span)\b[^>]*>", "", entry)
            )
    assert len(named) > 20
    assert not [name for name in named if not name.endswith("Error")]
