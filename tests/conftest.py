"""What every test shares.

Warnings are errors, doctests run, and the package's annotations are checked at run
time by jaxtyping and beartype: see ``[tool.pytest.ini_options]`` in pyproject.toml.
"""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpyro
import pytest

numpyro.set_host_device_count(2)  # parallel chains need a device each
os.environ.setdefault("MPLBACKEND", "agg")  # figures of examples open no windows

ROOT = Path(__file__).resolve().parents[1]
MAPS = Path("/proc/self/maps")  # of the process's memory, on Linux
MAX_MAPS = 30_000  # Linux allows 65 530; beyond, compilation ends in a crash


@pytest.fixture(scope="session")
def root() -> Path:
    """The directory that holds pyproject.toml."""
    return ROOT


@pytest.fixture(autouse=True)
def forget_programs_in_time() -> Iterator[None]:
    """Drop compiled programs, of which each keeps maps of memory, before too many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.collect()
