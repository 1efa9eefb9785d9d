"""Random numbers that a model draws by NumPy or Python, which a compiled chain freezes.

A model is compiled once. What ``numpy.random`` or ``random`` give it then, such as a
random choice of rows, is the same in all transitions, and the posterior is that of this
choice. A state of a generator that a run of the model has moved tells.
"""

import functools
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from numpyro.primitives import Messenger

GENERATORS = np.random.Generator, np.random.RandomState, random.Random
MODULES = {np.random: np.random.random, random: random.random}
MAX_DEPTH = 3  # functions that a model calls, those that they call, and so on
MAX_NESTING = 4  # containers and objects around a generator
MAX_MEMBERS = 100  # of one container that are searched: data may be long lists


@contextmanager
def refuse_host_randomness(
    model: Callable, args: tuple, kwargs: dict
) -> Iterator[None]:
    """Raise at the end if the model has drawn numbers by NumPy or Python in between.

    Seen are generators, with those of both modules, to which the model refers by its
    variables, arguments, defaults or attributes, or functions that it calls by theirs,
    also within containers and objects.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        ValueError: for such a model.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> def model():
        ...     return rng.choice(3)
        >>> with refuse_host_randomness(model, (), {}):
        ...     _ = model()
        Traceback (most recent call last):
            ...
        ValueError: The model must be a function of its latents, but draws random ...
    """
    found: list[Any] = [args, kwargs, *_referred(model, MAX_DEPTH)]
    own = {id(rng): rng for value in found for rng in _generators(value, MAX_NESTING)}
    generators = list(own.values())
    before = [_state(rng) for rng in generators]
    yield
    if [_state(rng) for rng in generators] != before:
        raise ValueError(
            "The model must be a function of its latents, but draws random numbers by "
            "numpy.random or random: it is compiled once, so that a chain would freeze "
            "one draw of them, such as one choice of rows. Draw them before, or take "
            "rows by numpyro.plate with all of them."
        )


def _generators(value: Any, depth: int) -> Iterator[Any]:
    """Yield the generators that a value is, has, is a method of, or is a module of."""
    if isinstance(value, ModuleType):
        value = MODULES.get(value)
    owner = getattr(value, "__self__", value)
    if isinstance(owner, GENERATORS):
        yield owner
    elif depth:
        for member in islice(_members(value), MAX_MEMBERS):
            yield from _generators(member, depth - 1)


def _members(value: Any) -> Iterable[Any]:
    """Return the values in a container, or the attributes of an object."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, type | ModuleType | FunctionType | MethodType):
        return ()
    return list(getattr(value, "__dict__", {}).values())


def _state(generator: Any) -> Any:
    """Return what changes of a generator when it draws."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return str(generator.bit_generator.state)
    _, key, position, *rest = generator.get_state()
    return key.tobytes(), position, rest


def _referred(fn: Any, depth: int) -> Iterator[Any]:
    """Yield the values that a function, and those it calls, refer to by name."""
    while isinstance(fn, functools.partial | Messenger):
        if isinstance(fn, functools.partial):
            yield from (fn.args, fn.keywords)
            fn = fn.func
        else:
            fn = fn.fn
    fn = inspect.unwrap(fn)
    if not isinstance(fn, FunctionType | MethodType):  # an object with a method
        fn = fn.__call__
    if isinstance(fn, MethodType):
        yield fn.__self__
        fn = fn.__func__
    if not isinstance(fn, FunctionType):
        return
    yield from (fn.__defaults__, fn.__kwdefaults__)
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    names = set(_names(fn.__code__))
    for name in names:
        if name in cells:
            try:
                value = cells[name].cell_contents
            except ValueError:  # not assigned yet
                continue
        elif name in fn.__globals__:
            value = fn.__globals__[name]
        else:
            continue
        yield np.random if value is np and "random" in names else value
        if depth and isinstance(value, FunctionType):
            yield from _referred(value, depth - 1)


def _names(code: CodeType) -> Iterator[str]:
    """Yield names of outer variables in a function and in those within it."""
    yield from (*code.co_freevars, *code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
