"""Configuration of Sphinx; `make docs` builds with warnings as errors."""

import inspect
from importlib.metadata import version as installed_version
from typing import Any

from sphinx.application import Sphinx

project = "numpyro_score"
author = "The numpyro_score developers"
version = release = installed_version("numpyro_score")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
python_use_unqualified_type_names = True
smartquotes = False  # types hold quotes that are code

html_theme = "furo"
html_title = "numpyro_score"


def skip_generated(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out what Python wrote itself: the fields of a named tuple."""
    generated = (inspect.getdoc(obj) or "").startswith("Alias for field number")
    return True if generated else None


def setup(app: Sphinx) -> None:
    """Connect what this file adds to Sphinx."""
    app.connect("autodoc-skip-member", skip_generated)
