"""Old names of arguments, which work for one version."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of functions that take arguments under old names, too.

    An old name warns with the new one.

    Args:
        names: new names by old ones.

    Example:
        >>> @renamed(key="rng_key")
        ... def draw(rng_key):
        ...     return rng_key
        >>> draw(rng_key=3)
        3
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs:
                    _rename(function.__qualname__, old, new, kwargs)
            return function(*args, **kwargs)

        return call

    return decorate


def _rename(function: str, old: str, new: str, kwargs: dict) -> None:
    """Move an argument to its new name.

    Raises:
        TypeError: if both are given.
    """
    if new in kwargs:
        raise TypeError(
            f"`{old}` of {function} is the old name of `{new}`: give one of them. "
            "Got both."
        )
    warnings.warn(
        f"`{old}` of {function} is now called `{new}`; the old name will be removed in "
        "the next version.",
        FutureWarning,
        stacklevel=3,
    )
    kwargs[new] = kwargs.pop(old)
