"""Errors of models that ask for the values of traced numbers.

JAX compiles a model once, for all values of its latent sites, so Python and NumPy
cannot look at them. JAX's own errors of it speak of tracers, and not of the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import FrameSummary, extract_tb

import jax
import numpy as np
import numpyro

UNKNOWN_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
PACKAGE = f"{Path(__file__).parents[1]}/"
LIBRARIES = tuple(f"{folder}/" for lib in (jax, np, numpyro) for folder in lib.__path__)
CHECKS = "<@"  # beartype's checks of types have names of this kind for files
WRAPPERS = "/contextlib.py", "/functools.py"


@contextmanager
def explain_tracing() -> Iterator[None]:
    """Raise an error that names the model's line where it needs an unknown value.

    Raises:
        TypeError: for `if`, `float`, functions of NumPy and the like in a model, of
            numbers whose values are not known while JAX traces it.

    Example:
        >>> with explain_tracing():
        ...     1.0 if jax.numpy.ones(()) > 0 else 0.0
        1.0
    """
    try:
        yield
    except UNKNOWN_VALUE as error:
        frame = _frame_of_model(extract_tb(error.__traceback__))
        if frame is None:
            raise
        raise TypeError(
            "The model must be a function that JAX can trace: its latent sites, and "
            "arrays that it is given inside of a compiled program, have no values "
            "then. Replace `if` and `while` that depend on them, and indices by a "
            "mask, by `jnp.where` or `jax.lax.cond`, and `float`, `int` and functions "
            "of NumPy by those of `jax.numpy`. "
            f"Got {type(error).__name__} in `{frame.name}`, line {frame.lineno} of "
            f"{Path(frame.filename).name}: {frame.line}"
        ) from error


def _frame_of_model(frames: list[FrameSummary]) -> FrameSummary | None:
    """Return the innermost frame outside of libraries; None if it is the package's."""
    for frame in reversed(frames):
        name = frame.filename
        if name.startswith((*LIBRARIES, CHECKS)) or name.endswith(WRAPPERS):
            continue
        return None if name.startswith(PACKAGE) else frame
    return None
