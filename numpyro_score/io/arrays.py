"""Conversion of weights and standardization to named arrays and back."""

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from numpyro_score.data.context_scale import ContextMap, ContextScale
from numpyro_score.data.standardize import Affine
from numpyro_score.io.config import from_config
from numpyro_score.io.schema import REMEDY
from numpyro_score.score.gaussian_baseline import GaussianBaseline

LINEAR_BASELINE = "center"  # name of the coefficients in files since version 0.1.0
COVARIANCE = "covariance"  # of standardized data, for nets with a normal baseline
GAUSSIAN = {f"gaussian.{f.name}" for f in fields(GaussianBaseline)}
ROWS = "rows"  # name of the standardized rows that a score keeps
CONTEXT_ROWS = "context.rows"  # the same of contexts; not in files of earlier versions
CONTEXT_SCALE = {f"context.{f.name}" for f in fields(ContextScale)} - {CONTEXT_ROWS}


def to_arrays(
    params: Any,
    affines: dict[str, ContextMap | GaussianBaseline | None],
    linear_baseline: Array | None,
    rows: Array | None = None,
    covariance: Array | None = None,
) -> dict[str, np.ndarray]:
    """Return all arrays by name.

    Args:
        params: weights of the net.
        affines: maps to the unit scale and Gaussian baseline, by name.
        linear_baseline: coefficients that predict the data from the context, or None.
        rows: standardized rows of the data, or None.
        covariance: of the standardized data, for a net per coordinate, or None.

    Raises:
        TypeError: for states that are not floating-point numbers.
    """
    arrays = {f"net{name}": leaf for name, leaf in _named(params)}
    for name, affine in affines.items():
        if affine is not None:
            parts = vars(affine).items()
            arrays |= {
                f"{name}.{part}": leaf for part, leaf in parts if leaf is not None
            }
    others = {LINEAR_BASELINE: linear_baseline, ROWS: rows, COVARIANCE: covariance}
    arrays |= {name: leaf for name, leaf in others.items() if leaf is not None}
    for name, leaf in arrays.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                "`score` must have a net whose states are floating-point numbers: "
                f"random keys and counters have no place in a density. Got {name} of "
                f"dtype {leaf.dtype}."
            )
    return {name: np.asarray(leaf) for name, leaf in arrays.items()}


def net_config(described: dict[str, Any]) -> Any:
    """Return the described configuration of a net of the package.

    Raises:
        ValueError: for a net of other code.
    """
    if "class" not in described:
        raise ValueError(
            "`net` must be given: the saved score was trained with a net that is not "
            "the package's, and code is never loaded from files. "
            f"It was {described['name']}."
        )
    return from_config(described)


def restore(arrays: dict[str, np.ndarray], net: Any) -> tuple[Any, nnx.GraphDef]:
    """Return weights and structure of a net.

    Args:
        arrays: the saved arrays.
        net: configuration of the net, or a module.

    Raises:
        ValueError: if the weights do not fit the net.
    """
    module = net
    if not isinstance(net, nnx.Module):
        module = nnx.eval_shape(lambda: net(rngs=nnx.Rngs(0)))
    graphdef, fresh = nnx.split(module)
    want = {f"net{name}": leaf.shape for name, leaf in _named(fresh)}
    got = {k: v.shape for k, v in arrays.items() if k.startswith("net")}
    if want != got:
        odd = sorted(set(want.items()) ^ set(got.items()))[:4]
        raise ValueError(
            "`net` must have the weights that were saved: the same names and shapes. "
            f"Differences begin with {odd}."
        )
    leaves = [jnp.asarray(arrays[name]) for name in want]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves), graphdef


def affine(arrays: dict[str, np.ndarray], name: str) -> Affine | None:
    """Return the map to the unit scale of this name, or None."""
    if f"{name}.loc" not in arrays:
        return None
    loc, scale = arrays[f"{name}.loc"], arrays[f"{name}.scale"]
    return Affine(jnp.asarray(loc), jnp.asarray(scale))


def context_map(arrays: dict[str, np.ndarray]) -> ContextMap | None:
    """Return the map of contexts to the unit scale, if there was one.

    Version 0.1.0 wrote that of an Affine.
    """
    if not set(arrays) >= CONTEXT_SCALE:
        return affine(arrays, "context")
    parts = {f.name: f"context.{f.name}" for f in fields(ContextScale)}
    found = {p: jnp.asarray(arrays[n]) for p, n in parts.items() if n in arrays}
    return ContextScale(**found)


def optional_array(arrays: dict[str, np.ndarray], name: str) -> Array | None:
    """Return the array of a name, or None."""
    found = arrays.get(name)
    return None if found is None else jnp.asarray(found)


def gaussian_baseline(arrays: dict[str, np.ndarray]) -> GaussianBaseline | None:
    """Return the normal law that the net adds to, or None."""
    if not set(arrays) >= GAUSSIAN:
        return None
    parts = {f.name: f"gaussian.{f.name}" for f in fields(GaussianBaseline)}
    found = {part: jnp.asarray(arrays[name]) for part, name in parts.items()}
    return GaussianBaseline(**found)


def check_arrays(arrays: dict[str, np.ndarray], file: Path) -> None:
    """Raise unless the arrays other than weights are those of a saved score.

    Args:
        arrays: the saved arrays.
        file: their file, for messages.

    Raises:
        ValueError: for missing or unknown names, inconsistent shapes, or scales that
            are not positive.
    """
    names = {name for name in arrays if not name.startswith("net")}
    known = {"standardize.loc", "standardize.scale"} | names & {ROWS, COVARIANCE}
    if "context.loc" in names or "context.scale" in names:
        known |= {"context.loc", "context.scale"}
        known |= names & {LINEAR_BASELINE}
        if not names & CONTEXT_SCALE <= {"context.loc", "context.scale"}:
            known |= CONTEXT_SCALE | names & {CONTEXT_ROWS}
    if names & GAUSSIAN:
        known |= GAUSSIAN
    if names != known:
        _refuse(file, f"{sorted(known)} beside the net's arrays", sorted(names))
    maps = known - {LINEAR_BASELINE, ROWS, COVARIANCE} - GAUSSIAN
    for part in sorted({name.split(".")[0] for name in maps}):
        loc, scale = arrays[f"{part}.loc"], arrays[f"{part}.scale"]
        is_positive = scale.size > 0 and (scale > 0).all()
        if loc.shape != scale.shape or not is_positive:
            rule = f"a positive `{part}.scale` of the shape of `{part}.loc`"
            _refuse(file, rule, (loc.shape, scale.shape))
    if known >= CONTEXT_SCALE:
        check_scale({n: arrays[n] for n in CONTEXT_SCALE}, file, "context.")
    for rows, part in ((ROWS, "standardize"), (CONTEXT_ROWS, "context")):
        if rows in names and arrays[rows].shape[1:] != arrays[f"{part}.loc"].shape:
            shape = arrays[f"{part}.loc"].shape
            _refuse(file, f"`{rows}` of shape {shape} each", arrays[rows].shape)
    if names & GAUSSIAN:
        _check_gaussian(arrays, file)
    if COVARIANCE in names:
        _check_covariance(arrays, file)
    if LINEAR_BASELINE in names:
        shape = arrays["context.loc"].size, arrays["standardize.loc"].size
        found = arrays[LINEAR_BASELINE].shape
        if found != shape:
            _refuse(file, f"a `{LINEAR_BASELINE}` of shape {shape}", found)


def _check_gaussian(arrays: dict[str, np.ndarray], file: Path) -> None:
    """Raise unless the arrays of a Gaussian baseline go together."""
    size = arrays["standardize.loc"].size
    want = {"vectors": (size, size), "scale": (size,), "max_square": ()}
    got = {name: arrays[f"gaussian.{name}"].shape for name in want}
    if want != got:
        _refuse(file, f"a Gaussian baseline of shapes {want}", got)
    positive = "scale", "max_square"
    if not all((arrays[f"gaussian.{name}"] > 0).all() for name in positive):
        _refuse(file, "a positive `gaussian.scale` and `gaussian.max_square`", got)


def check_scale(arrays: Mapping[str, np.ndarray], file: Path, prefix: str = "") -> None:
    """Raise unless the arrays of a ContextScale go together.

    Args:
        arrays: the arrays, by name.
        file: their file, for messages.
        prefix: what their names begin with.

    Raises:
        ValueError: for other shapes, or values that are no scale.
    """
    shapes = {name: array.shape for name, array in sorted(arrays.items())}
    if len(set(shapes.values())) > 1:
        _refuse(file, f"parts of `{prefix}scale` of one shape", shapes)
    scale, width, low, high = (
        arrays[f"{prefix}{name}"] for name in ("scale", "width", "low", "high")
    )
    if not (scale > 0).all():
        _refuse(file, f"a positive `{prefix}scale`", scale)
    if not (width >= 0).all():
        _refuse(file, f"a `{prefix}width` of at least 0", width)
    if not (low <= high).all():
        _refuse(file, f"a `{prefix}low` of at most `{prefix}high`", (low, high))


def _check_covariance(arrays: dict[str, np.ndarray], file: Path) -> None:
    """Raise unless it is symmetric, positive definite and of a point's size."""
    found, size = arrays[COVARIANCE], arrays["standardize.loc"].size
    is_right = found.shape == (size, size) and np.allclose(found, found.T, atol=1e-6)
    if not is_right or not (np.linalg.eigvalsh(found) > 0).all():
        rule = f"a `{COVARIANCE}` that is positive definite, of shape {(size, size)}"
        _refuse(file, rule, found.shape)


def check_factor(factor: np.ndarray, file: Path) -> None:
    """Raise unless the square root of a covariance can be inverted.

    Raises:
        ValueError: in this case.
    """
    # no rank: units of sites may differ by more than single precision resolves
    if not np.isfinite(np.linalg.slogdet(factor.astype(np.float64)).logabsdet):
        _refuse(file, "a `factor` that can be inverted", factor)


def _refuse(file: Path, rule: str, got: Any) -> NoReturn:
    raise ValueError(f"{file} must hold {rule}. {REMEDY} Got {reprlib.repr(got)}.")


def _named(params: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
