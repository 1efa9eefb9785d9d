"""Every kernel of the package, or one of each family."""

from collections.abc import Callable, Iterator

import jax
import pytest

from tests.kernel.all_kernels import FAMILY, KERNELS, first_of


@pytest.fixture(params=first_of(KERNELS | FAMILY))
def make(request) -> Callable:
    """Make a kernel of a model, with options."""
    return (KERNELS | FAMILY)[request.param]


@pytest.fixture(params=first_of(KERNELS))
def make_one(request) -> Callable:
    """The same, where members of one family cannot differ."""
    return KERNELS[request.param]


@pytest.fixture(autouse=True, scope="module")
def _fast_compilation() -> Iterator[None]:
    """Compile without tuning: most of these programs run once, and shortly."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
