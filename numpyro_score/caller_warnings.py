"""Warnings that name the line of the user's code."""

import warnings
from pathlib import Path

import numpyro

# NumPyro calls kernels and models
SKIPPED = tuple(f"{Path(file).parent}/" for file in (__file__, numpyro.__file__))


def warn_caller(message: str) -> None:
    """Warn with the place of the first line outside of the package and of NumPyro.

    In a host callback, which no line of the user's code calls, it is a line of JAX.

    Args:
        message: what a user should know.

    Example:
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn_caller("few rows")
        >>> str(caught[0].message)
        'few rows'
    """
    warnings.warn(message, skip_file_prefixes=SKIPPED)
