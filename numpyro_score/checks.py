"""Checks of arguments, before any work starts."""

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from numpyro.infer import MCMC

Points = Float[Array, "_ *event"] | Float[np.ndarray, "_ *event"]


def is_traced(*trees: Any) -> bool:
    """Return whether a leaf of these trees has no value yet, as inside of ``jax.jit``.

    Example:
        >>> is_traced({"x": jnp.ones(2)}, None), bool(jax.jit(is_traced)(1.0))
        (False, True)
    """
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def call_when_known(fn: Callable[..., None], *values: Any) -> None:
    """Call a function of values now; in a host callback if some of them are traced.

    Args:
        fn: a function that raises or warns.
        *values: its arguments, trees of arrays.

    Example:
        >>> call_when_known(print, 1, 2)
        1 2
    """
    if is_traced(values):
        jax.debug.callback(fn, *values)
    else:
        fn(*values)


def check_target(model: Callable | None, potential_fn: Callable | None) -> None:
    """Raise unless exactly one of ``model`` and ``potential_fn`` is given."""
    if (model is None) == (potential_fn is None):
        raise ValueError(
            "Exactly one of `model` and `potential_fn` must be given: it is the "
            "target. A law known by its score alone becomes a model through "
            "ScoreModel.from_fn and ScoreDistribution. "
            f"Got model={model!r}, potential_fn={potential_fn!r}."
        )
    for name, given in {"model": model, "potential_fn": potential_fn}.items():
        check_optional_callable(name, given, "the target")


def check_callable(name: str, value: Any, what: str) -> None:
    """Raise unless a value can be called."""
    if not callable(value):
        raise TypeError(
            f"`{name}` must be callable: it is {what}. Got {_shown(value)}."
        )


def check_optional_callable(name: str, value: Any, what: str) -> None:
    """Raise unless a value is None or can be called."""
    if value is not None:
        check_callable(name, value, what)


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raise unless a value is an instance of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be {what}. Got {_shown(value)}.")


def check_keywords(name: str, value: Any) -> None:
    """Raise unless a value is None or a mapping of keyword arguments."""
    names_them = isinstance(value, Mapping) and all(isinstance(k, str) for k in value)
    if value is not None and not names_them:
        raise TypeError(
            f"`{name}` must be a dict of keyword arguments by name, or None for none. "
            f"Got {_shown(value)}."
        )


def check_flags(**flags: Any) -> None:
    """Raise unless every value is True or False: others would be taken for one."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"`{name}` must be True or False: it is a choice of two. "
                f"Got {_shown(value)}."
            )


def check_positive(name: str, value: Any, why: str) -> None:
    """Raise unless a number is positive and finite."""
    if not is_real(value) or not (value > 0 and value < float("inf")):
        raise ValueError(
            f"`{name}` must be positive and finite: it is {why}. Got {value!r}."
        )


def check_integer(name: str, value: Any, why: str) -> None:
    """Raise unless a value is an integer, of Python or NumPy."""
    if not is_integer(value):
        raise ValueError(f"`{name}` must be an integer: it is {why}. Got {value!r}.")


def check_count(name: str, value: Any, why: str, *, least: int = 1) -> None:
    """Raise unless a value is an integer of at least 1, or another least value."""
    if not is_integer(value) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least} in 32 bits: it is {why}. "
            f"Got {_shown(value)}."
        )


def item_or_known_fields(state: Any, index: Any) -> Any:
    """Return an item of a named tuple; raise for a name that is no field of it.

    NumPyro looks `extra_fields` up in this way where a state has no such attribute.

    Raises:
        ValueError: for a name, with the names that there are.

    Example:
        >>> from collections import namedtuple
        >>> item_or_known_fields(namedtuple("State", "z i")(0.5, 1), 0)
        0.5
    """
    if not isinstance(index, str):
        return tuple.__getitem__(state, index)
    kind = type(state)
    names = [name for name in dir(kind) if isinstance(getattr(kind, name), property)]
    raise ValueError(
        f"`extra_fields` must name fields of {kind.__name__}: "
        f"{', '.join(sorted({*kind._fields, *names}))}. Got '{index}'."
    )


def check_weight(weight: Any) -> None:
    """Raise unless the weight of a guidance is one finite number; traced ones pass."""
    traced = is_traced(weight)
    if not is_real(weight) or not (traced or abs(weight) < float("inf")):
        raise ValueError(
            "`weight` must be a finite number: the guidance is multiplied by it. "
            f"Got {_shown(weight)}."
        )


def check_key(name: str, key: Any) -> None:
    """Raise unless a value is one JAX key, typed or legacy.

    Raises:
        TypeError: for an integer, a batch of keys, or anything else.
    """
    if _key_axes(key) == 0:
        return
    raise TypeError(
        f"`{name}` must be one random key, such as jax.random.key(0): all randomness "
        f"comes from it. Got {_shown(key)}."
    )


def check_keys(name: str, keys: Any) -> None:
    """Raise unless a value is one JAX key, or one per chain.

    Raises:
        TypeError: for anything else.
        ValueError: inside of ``MCMC.run``, for another number than ``num_chains``.
    """
    axes = _key_axes(keys)
    if axes not in (0, 1):
        raise TypeError(
            f"`{name}` must be one random key, such as jax.random.key(0), or one per "
            f"chain: all randomness comes from it. Got {_shown(keys)}."
        )
    mcmc = enclosing_mcmc()
    if axes == 1 and mcmc is not None and len(keys) != mcmc.num_chains:
        raise ValueError(
            f"`{name}` must be one random key, or one per chain: summaries count "
            f"`num_chains`. Got {len(keys)} keys, num_chains={mcmc.num_chains}."
        )


def enclosing_mcmc() -> MCMC | None:
    """Return the ``MCMC`` object whose method is being called, or None.

    NumPyro tells a kernel the length of warm-up, but neither that of the run nor how
    many chains there are. So they are read off the call stack.

    Example:
        >>> enclosing_mcmc() is None
        True
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        host = frame.f_locals.get("self")
        if isinstance(host, MCMC):
            return host
        frame = frame.f_back
    return None


def _key_axes(key: Any) -> int | None:
    """Return the number of axes of an array of keys; None for anything else."""
    dtype, ndim = getattr(key, "dtype", None), getattr(key, "ndim", -1)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return ndim
    return ndim - 1 if dtype == jnp.uint32 and ndim > 0 else None


def check_devices(devices: Any) -> None:
    """Raise unless a value is None, or lists different devices of JAX.

    Raises:
        TypeError: for anything but a sequence of devices.
        ValueError: for none, or the same one twice.
    """
    if devices is None:
        return
    listed = isinstance(devices, list | tuple | np.ndarray)
    found = list(np.ravel(np.asarray(devices, object))) if listed else []
    if not listed or not all(isinstance(device, jax.Device) for device in found):
        raise TypeError(
            "`devices` must be a list of devices, such as jax.devices(): they share "
            f"the work. Got {_shown(devices)}."
        )
    if not found or len(set(found)) < len(found):
        raise ValueError(
            "`devices` must have one device or more, each once: they share the work; "
            f"None is the default device. Got {_shown(devices)}."
        )


def check_mesh(mesh: Any) -> None:
    """Raise unless a value is None or a mesh of devices of JAX."""
    if mesh is None:
        return
    check_kind("mesh", mesh, Mesh, "a jax.sharding.Mesh of devices, or None")
    if mesh.size < 1:
        raise ValueError(
            "`mesh` must have one device or more: they share the rows of a batch; None "
            f"is the default device. Got {mesh!r}."
        )


def check_callbacks(callbacks: Any) -> None:
    """Raise unless a value is a list or tuple of functions: others are used up."""
    kinds = "a list of functions of the progress"
    check_kind("callbacks", callbacks, (list, tuple), kinds)
    for callback in callbacks:
        check_callable("callbacks", callback, "a list of functions of the progress")


def check_unmasked(name: str, values: Any) -> None:
    """Raise if an array of NumPy hides some of its values behind a mask.

    The mask would be lost on the device, and the values behind it be used.
    """
    for item in values if isinstance(values, list | tuple) else ():
        check_unmasked(name, item)
    if np.ma.is_masked(values):
        raise ValueError(
            f"`{name}` must not have masked values: the mask cannot be kept, and what "
            "it hides would be used. Drop these rows, or fill the values and let the "
            f"model say what is missing. Got {int(np.ma.getmaskarray(values).sum())} "
            f"masked values of {np.size(values)}."
        )


def _shape_and_type(rows: Any) -> tuple[tuple[int, ...], Any]:
    """Return shape and dtype of an array, or of what NumPy makes of a value."""
    if not hasattr(rows, "dtype"):
        try:
            rows = np.asarray(rows)
        except ValueError:  # rows of several lengths
            rows = np.asarray(rows, object)
    return np.shape(rows), rows.dtype


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """Return a shape as a tuple of positive integers.

    Raises:
        ValueError: for anything else.

    Example:
        >>> check_shape("shape", [2, 3])
        (2, 3)
    """
    sizes = tuple(shape) if isinstance(shape, tuple | list) else None
    if sizes is None or not all(is_integer(size) and size > 0 for size in sizes):
        raise ValueError(
            f"`{name}` must be a tuple of positive integers: it is the shape of an "
            f"array. Got {shape!r}."
        )
    return tuple(map(int, sizes))


def check_floating(name: str, dtype: Any, why: str) -> None:
    """Raise unless a value names a floating-point type."""
    try:
        is_floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise ValueError(
            f"`{name}` must be a floating-point type: it is {why}. Got {dtype!r}."
        )


def check_levels_or_number(levels: Any) -> None:
    """Raise unless there is a number of noise levels, or one sequence of them."""
    if not hasattr(levels, "__len__") or isinstance(levels, str):
        check_count("levels", levels, "the number of noise levels")
        return
    check_rows_finite("levels", levels)
    if np.ndim(levels) != 1 or not (np.asarray(levels) > 0).all():
        raise ValueError(
            "`levels` must be an integer, or one sequence of positive numbers: they "
            f"are noise levels. Got {_shown(levels)}."
        )


def count_levels(levels: Any) -> int:
    """Return how many noise levels there are, of their number or a sequence of them.

    Example:
        >>> count_levels(np.int64(3)), count_levels((2.0, 1.0))
        (3, 2)
    """
    return int(levels) if is_integer(levels) else len(levels)


def check_metric(name: str, metric: Any) -> None:
    """Raise unless vectors are positive and matrices positive definite.

    Args:
        name: the argument.
        metric: None, a vector, a matrix, or a dict of these.
    """
    parts = metric.values() if isinstance(metric, Mapping) else [metric]
    for part in parts:
        if part is None or is_traced(part):
            continue
        values = np.asarray(part)
        if values.dtype.kind not in "iuf" or not _is_positive_definite(values):
            raise ValueError(
                f"`{name}` must be a vector of positive numbers or a symmetric, "
                "positive definite matrix: it is the covariance that a chain moves "
                f"with. Got {_shown(metric)}."
            )


def _is_positive_definite(values: np.ndarray) -> bool:
    if not np.isfinite(values).all():
        return False
    if values.ndim == 1:
        return bool((values > 0).all())
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        return False
    # symmetric up to rounding: the covariance of draws in single precision
    close = np.allclose(values, values.T, rtol=1e-4, atol=1e-6 * np.abs(values).max())
    return bool(close and (np.linalg.eigvalsh(values.astype(float)) > 0).all())


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy that fits 32 bits.

    Axes and counters of the device hold no larger ones.

    Example:
        >>> is_integer(2), is_integer(2.0), is_integer(True), is_integer(10**30)
        (True, False, False, False)
    """
    is_integral = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_integral and abs(int(value)) < 2**31


def check_share(name: str, share: Any, what: str) -> None:
    """Raise unless a share of rows lies in [0, 1)."""
    if not is_real(share) or not 0 <= share < 1:
        raise ValueError(
            f"`{name}` must lie in [0, 1): it is the share of the rows that {what}. "
            f"Got {share!r}."
        )


def is_real(value: Any) -> bool:
    """Return whether a value is one real number.

    Example:
        >>> is_real(2), is_real("2"), is_real(True), is_real([2.0])
        (True, False, False, False)
    """
    if isinstance(value, bool | str | bytes) or value is None:
        return False
    try:
        dtype = jnp.result_type(value)
    except TypeError:
        return False
    is_number = any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating))
    return is_number and jnp.ndim(value) == 0


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) < 200 else f"{text[:200]}..."


def check_probability(name: str, value: Any, why: str) -> None:
    """Raise unless a number lies strictly between 0 and 1."""
    if not is_real(value) or not 0 < value < 1:
        raise ValueError(f"`{name}` must lie in (0, 1): it is {why}. Got {value!r}.")


def check_known(what: str, **values: Any) -> None:
    """Raise if an argument is traced by JAX, so that its values are not known.

    Args:
        what: the function that needs them, for the error.
        **values: arguments by name.

    Raises:
        TypeError: in this case.

    Example:
        >>> check_known("sample", observation=[0.5, 1.0])
    """
    for name, value in values.items():
        if is_traced(value):
            raise TypeError(
                f"`{name}` must be known when `{what}` is called, which checks its "
                "draws and compiles its own programs: call it outside of jax.jit and "
                "jax.vmap. Got a traced value."
            )


def check_summary(num_samples: Any, prob: Any) -> None:
    """Raise unless draws can be summarized: R-hat compares halves of two or more."""
    why = "the number of draws, whose R-hat needs two in each half"
    check_count("num_samples", num_samples, why, least=4)
    check_probability("prob", prob, "the probability mass of the intervals")


def check_score_fn(score_fn: Callable | None, z: Any) -> None:
    """Raise unless ``score_fn`` maps z to the same structure, shapes and dtypes.

    Raises:
        ValueError: for another structure or another shape.
        TypeError: for another dtype.
    """
    if score_fn is None:
        return
    score = jax.eval_shape(score_fn, z)
    expected, got = (jax.tree.map(jnp.shape, tree) for tree in (z, score))
    if got != expected:
        raise ValueError(
            "`score_fn` must return the structure and shapes of its position: a score "
            f"has one number per coordinate. Got {got}, expected {expected}."
        )
    expected, got = (jax.tree.map(jnp.result_type, tree) for tree in (z, score))
    if got != expected:
        raise TypeError(
            "`score_fn` must return the dtype of its position: another would change "
            f"the state's dtype. Got {got}, expected {expected}."
        )


def check_numbers(name: str, value: Any, what: str) -> None:
    """Raise unless a value is a real number or an array of them; traced ones pass.

    Args:
        name: the argument's name, for the error.
        value: a number, or an array of any shape.
        what: what it is, for the error.

    Raises:
        ValueError: for text, complex numbers, objects, and values behind a mask.

    Example:
        >>> check_numbers("x", [0.5, 1], "points")
    """
    check_unmasked(name, value)
    if is_traced(value):
        value = jnp.asarray(value)
    _, dtype = _shape_and_type(value)
    if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise ValueError(
            f"`{name}` must be real numbers: they are {what}. "
            f"Got {dtype}, {_shown(value)}."
        )


def as_points(name: str, x: Any, event_shape: tuple[int, ...]) -> Array:
    """Return points as an array of at least single precision.

    Args:
        name: the argument's name, for the error.
        x: points of shape ``batch + event_shape``.
        event_shape: shape of one point.

    Raises:
        ValueError: for anything but real numbers, and for another shape.

    Example:
        >>> as_points("x", [1, 2], (2,))
        Array([1., 2.], dtype=float32)
    """
    check_numbers(name, x, "points")
    x = jnp.asarray(x)
    is_single = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    x = x if is_single else x.astype(float)
    rank = len(event_shape)
    if x.ndim < rank or x.shape[x.ndim - rank :] != event_shape:
        raise ValueError(
            f"`{name}` must end with the score's event shape: a score is a function of "
            f"whole points. Got {x.shape}, event shape {event_shape}."
        )
    return x


def as_finite_points(name: str, rows: Any, event_shape: tuple[int, ...]) -> Array:
    """Return rows of finite points as an array, see :func:`as_points`.

    Args:
        name: the argument's name, for the error.
        rows: one point per row.
        event_shape: shape of one point.

    Raises:
        ValueError: as :func:`check_rows_finite` and :func:`as_points`.

    Example:
        >>> as_finite_points("x", [[1, 2]], (2,))
        Array([[1., 2.]], dtype=float32)
    """
    check_rows_finite(name, rows)
    return as_points(name, rows, event_shape)


def check_rows_finite(name: str, rows: Any, why: str = "") -> None:
    """Raise unless a value is an array of finite numbers, one draw or datum per row.

    Args:
        name: the argument's name, for the error.
        rows: one draw or datum per row.
        why: what would go wrong, after a colon, for the error.

    Raises:
        ValueError: for another kind of value, values behind a mask, no rows, or rows
            that are not finite; the error counts them.

    Example:
        >>> check_rows_finite("draws", np.zeros((3, 2)))
    """
    check_unmasked(name, rows)
    if is_traced(rows):
        return
    shape, dtype = _shape_and_type(rows)
    kinds = jnp.integer, jnp.floating, jnp.bool_
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds):
        raise ValueError(
            f"`{name}` must be an array of real numbers, one row per draw. Got {dtype}."
        )
    if not shape or not shape[0]:
        raise ValueError(
            f"`{name}` must have rows, one per draw. Got an array of shape {shape}."
        )
    rows = np.asarray(rows)
    bad = int((~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)).sum())
    if bad:
        raise ValueError(
            f"`{name}` must be finite{why}. "
            f"Got {bad} rows of {len(rows)} with NaN or infinity."
        )
