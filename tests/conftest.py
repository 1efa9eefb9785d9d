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

from tests.tiers import marks_of, read_tiers

ROOT = Path(__file__).resolve().parents[1]
# Compiled programs are kept on disk: equal ones are compiled once, for both workers,
# for tests that start an interpreter of their own, and for the next run.
CACHE = {
    "jax_compilation_cache_dir": str(ROOT / ".jax_cache"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    for option, value in CACHE.items():
        jax.config.update(option, value)
        os.environ[option.upper()] = str(value)

# Most of a test's time is compilation, and most programs run once. `make slow` asks for
# level 1, with which training runs faster.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
os.environ["XLA_FLAGS"] = f"{FAST_COMPILATION} {os.environ.get('XLA_FLAGS', '')}"
numpyro.set_host_device_count(2)  # parallel chains need a device each
os.environ.setdefault("MPLBACKEND", "agg")  # figures of examples open no windows

# JAX keeps many objects that refer to each other, and looking through all of them as
# often as Python does by default takes an eighth of the time. With far higher
# thresholds a program was once traced anew for its second run.
gc.set_threshold(20_000, 10, 10)

MAPS = Path("/proc/self/maps")  # of the process's memory, on Linux
# parts of the names of tests that run a broken kernel or model, or far too few draws,
# on purpose: the verdict on their draws is no news
POOR_RUNS = (
    "test_kernel_errors.py",
    "mutant",
    "is_caught",
    "calibrated",  # hundreds of short runs at once, some of which are poor
    "test_gibbs_blocks",  # one chain, whose target moves with the other block
    "test_score_langevin.py",  # lone steps in steep tails, against exact laws
    "benchmarks/test_kernels.py",  # a few draws
    "test_two_modes_run",
    "test_step_size_bias.py",  # 100 draws of unadjusted chains
)
POOR = {  # by the beginning of the warning
    "The draws of this run": POOR_RUNS,
    "The learned posterior fails": ("test_examples_inference.py",),  # hardly trained
    "The highest noise level of this score": (
        "test_wrong_score_is_caught",
        "test_float64.py",
        "test_learned_sites_start_at_a_draw_of_their_law",
    ),
}
MAX_MAPS = 30_000  # Linux allows 65 530; beyond, compilation ends in a crash


@pytest.fixture(scope="session")
def root() -> Path:
    """The directory that holds pyproject.toml."""
    return ROOT


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests; let those of poor runs and of short training warn."""
    tiers = read_tiers()
    for item in items:
        for mark in marks_of(item.nodeid, tiers):
            item.add_marker(mark)
    for warning, parts in POOR.items():
        allowed = pytest.mark.filterwarnings(f"ignore:{warning}:UserWarning")
        for item in items:
            if any(part in item.nodeid for part in parts):
                item.add_marker(allowed)


@pytest.fixture(autouse=True)
def forget_programs_in_time() -> Iterator[None]:
    """Drop compiled programs, of which each keeps maps of memory, before too many."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAX_MAPS:
        jax.clear_caches()
        gc.collect()
