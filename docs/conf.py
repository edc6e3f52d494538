"""Build with `sphinx-build -W docs docs/_build/html`, where `mpicoll[docs]` is installed.

The snippets marked `python` are executed by tests/scenarios/test_docs.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mpicoll

project = "mpicoll"
author = "The mpicoll authors"
copyright = "The mpicoll authors. BSD 3-Clause License"
version = release = mpicoll.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"mpicoll {release}"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
