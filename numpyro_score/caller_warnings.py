"""Warnings that name the line of the user's code."""

import warnings
from pathlib import Path

PACKAGE = str(Path(__file__).resolve().parent)


def warn_caller(message: str) -> None:
    """Warn with the place of the first line outside of the package.

    Args:
        message: what a user should know.

    Example:
        >>> with warnings.catch_warnings(record=True, action="always") as caught:
        ...     warn_caller("few rows")
        >>> str(caught[0].message)
        'few rows'
    """
    warnings.warn(message, skip_file_prefixes=(PACKAGE,))
