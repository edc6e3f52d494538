"""One version: what the library says, its installation, and the newest in the changelog."""

import importlib.metadata
import re
from pathlib import Path

import mpicoll.cli

ROOT = Path(__file__).parents[2]


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest = next(version for version in versions if version != "Unreleased")
    assert newest == mpicoll.__version__


def test_there_is_a_command_of_the_same_name():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="mpicoll")
    assert {script.load() for script in scripts} == {mpicoll.cli.main}
