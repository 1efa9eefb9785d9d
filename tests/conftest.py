"""What every test shares.

Warnings are errors, doctests run, and the package's annotations are checked at run
time by jaxtyping and beartype: see ``[tool.pytest.ini_options]`` in pyproject.toml.
"""

import os
from pathlib import Path

import numpyro
import pytest

numpyro.set_host_device_count(2)  # parallel chains need a device each
os.environ.setdefault("MPLBACKEND", "agg")  # figures of examples open no windows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The directory that holds pyproject.toml."""
    return ROOT
