"""Build with `sphinx-build -W -n docs docs/_build/html`, where `mpicoll[docs]` is installed.

The snippets marked `python` are executed by tests/scenarios/test_docs.py, and
tests/scenarios/test_site.py builds the site.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sphinx.util.inspect import TypeAliasForwardRef

import mpicoll

project = "mpicoll"
author = "The mpicoll authors"
copyright = "The mpicoll authors. BSD 3-Clause License"
version = release = mpicoll.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"mpicoll {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {  # shown by name
    name: f"mpicoll.typing.{name}" for name in ("Array", "Arrays", "Device", "Memory", "Op")
}
autodoc_class_signature = "mixed"
autosummary_generate = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
TypeAliasForwardRef.__repr__ = lambda alias: alias.name  # as it is shown in a union
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Types of other libraries, whose pages a build would have to fetch to link to them.
nitpick_ignore_regex = [
    ("py:.*", r"(array|asyncio|collections|concurrent|datetime|os|types|typing)\..*"),
    ("py:.*", r"(mpi4py|numpy|torch)\..*"),
    ("py:class", "timedelta"),  # as Sphinx finds it in the signature of a protocol
]
nitpick_ignore = [
    ("py:class", "mpicoll.runtime.world.Store"),  # a part of mpicoll.stores.Store
    ("py:class", "mpicoll.groups.group.Scalar"),  # variables of types
    ("py:class", "mpicoll.groups.group.T"),
    ("py:class", "mpicoll.testing.threads.T"),
]
