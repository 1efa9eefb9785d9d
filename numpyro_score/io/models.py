"""Saved scores and consistency models.

A saved score is a folder of three files: ``weights.safetensors`` with all arrays,
``header.json`` with the configuration, and ``SHA256SUMS`` with the hashes of the two
in the format of ``sha256sum --check``. Nothing is pickled and loading runs no code
from the folder: the header can only name classes of the package. Consistency models
and learned priors are saved in the same way.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from numpyro_score.consistency import ConsistencyModel
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support, check_constraint
from numpyro_score.io import folder
from numpyro_score.io.arrays import (
    COVARIANCE,
    LINEAR_BASELINE,
    ROWS,
    affine,
    check_arrays,
    context_map,
    gaussian_baseline,
    net_config,
    optional_array,
    restore,
    to_arrays,
)
from numpyro_score.io.config import from_config, to_config
from numpyro_score.io.prior import describe_sites, read_sites
from numpyro_score.io.schema import (
    PARAMETRIZATIONS,
    PROCESSES,
    REMEDY,
    HeaderCheck,
    build,
)
from numpyro_score.model.learned_prior import LearnedPrior
from numpyro_score.nn import EmbedContext
from numpyro_score.nn.coordinate_levels import with_coordinate_levels
from numpyro_score.score.conditioning import ConditionedDenoiser
from numpyro_score.score.denoiser import NetDenoiser, check_output
from numpyro_score.score.level import known_level
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE

SCORE, CONSISTENCY = "score", "consistency model"  # kinds in headers
SITES = "sites"  # folder of what is learned of sites, beside that of its score
PARTS = f"{SITES}/{folder.SUMS}", f"{SCORE}/{folder.SUMS}"
PER_COORDINATE = "per_coordinate"  # entry of headers of nets with a level for each
LEVEL = "level_in_use"  # entry of headers of scores of which it was measured
# of ScoreModel, not of its net
MODEL_FIELDS = ("standardize", "sde", "event_shape", "rows")


def save(
    score: ScoreModel | ConsistencyModel | LearnedPrior, path: str | os.PathLike
) -> None:
    """Save a learned score, or a consistency model, in a new folder.

    The folder appears under its name only when it is complete.

    Args:
        score: the ``score`` of a result of ``ScoreMatching.run``, a consistency
            model, or a prior of :func:`numpyro_score.learn_prior`.
        path: the new folder; it must not exist.

    Raises:
        FileExistsError: if there is something at ``path``.
        TypeError: for anything else, for a score that is a function, whose code cannot
            be saved, or that is conditioned, and for a net with states that are not
            floating-point numbers.

    Example:
        >>> import jax
        >>> import tempfile
        >>> from numpyro_score import MLP, ScoreMatching
        >>> trainer = ScoreMatching(MLP(2, width=8, depth=1))
        >>> state = trainer.init(jax.random.key(0), jax.numpy.eye(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(trainer.get_score(state), f"{folder}/score")
        ...     load(f"{folder}/score").event_shape
        (2,)
    """
    path = folder.check_new(path, "score")
    if isinstance(score, LearnedPrior):
        return save_with_sites(score.score, *describe_sites(score), path)
    net: NetDenoiser | ConsistencyModel
    header: dict[str, Any]
    _check_kind(score)
    if isinstance(score, ConsistencyModel):
        net, header = score, {"kind": CONSISTENCY}
    elif isinstance(score.denoiser, NetDenoiser):
        net, header = score.denoiser, _header_of_score(score, score.denoiser)
    elif isinstance(score.denoiser, ConditionedDenoiser):
        raise TypeError(
            "`score` must not be conditioned: save the score that `condition` was "
            "called on, and condition it again after loading."
        )
    else:
        raise TypeError(
            "`score` must come from ScoreMatching: of a function only the code could "
            "be saved, and code is never loaded. Save the function's own parameters "
            f"and call ScoreModel.from_fn again. Got {type(score.denoiser).__name__}."
        )
    affines = {
        "standardize": score.standardize,
        "context": net.standardize_context,
        "gaussian": getattr(net, "gaussian_baseline", None),
    }
    header |= {
        "net": to_config(net.config, else_name=True),
        "sde": to_config(score.sde),
        "event_shape": list(score.event_shape),
    }
    rows = getattr(score, "rows", None)
    covariance = getattr(net, "covariance", None)
    arrays = to_arrays(net.params, affines, net.linear_baseline, rows, covariance)
    folder.write(path, arrays, header)


def _check_kind(score: Any) -> None:
    """Raise for anything but a score or a consistency model.

    Raises:
        TypeError: in this case.
    """
    if not isinstance(score, ScoreModel | ConsistencyModel):
        own = " It has a method of its own: call its `save`." * hasattr(score, "save")
        raise TypeError(
            "`score` must be a ScoreModel, a ConsistencyModel or a LearnedPrior. Got "
            f"{type(score).__name__}.{own}"
        )


def load(
    path: str | os.PathLike, *, net: Callable | nnx.Module | None = None
) -> ScoreModel:
    """Return a score that was saved by :func:`save`.

    Args:
        path: the folder.
        net: the ``net`` of ``ScoreMatching``, if it is not a configuration of the
            package.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered or cut off, is of another format, holds a
            consistency model, or does not fit the net.

    Example:
        >>> import jax
        >>> import tempfile
        >>> from numpyro_score import VE, MLP, ScoreMatching
        >>> trainer = ScoreMatching(MLP(2, width=8, depth=1), sde=VE(sigma_max=10.0))
        >>> state = trainer.init(jax.random.key(0), jax.numpy.eye(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(trainer.get_score(state), f"{folder}/score")
        ...     load(f"{folder}/score").sde
        VE(sigma_min=0.01, sigma_max=10.0)
    """
    config, parts, header, check = _load(path, net, SCORE)
    standardize, sde, event_shape, rows = (parts.pop(name) for name in MODEL_FIELDS)
    denoiser = NetDenoiser(
        **parts,
        config=None if isinstance(config, nnx.Module) else config,
        parametrization=from_config(header["parametrization"]),
        min_level=sde.sigma_min if header.get(PER_COORDINATE) else None,
        measured_level=_level(check, header.get(LEVEL), sde, rows),
    )
    _check_net(check, denoiser, standardize)
    support = _build_support(check, header["support"], event_shape)
    velocity_only = header["velocity_only"]
    return ScoreModel(
        denoiser, standardize, sde, event_shape, support, velocity_only, rows
    )


def load_consistency(
    path: str | os.PathLike, *, net: Callable | None = None
) -> ConsistencyModel:
    """Return a consistency model that was saved by :func:`save`.

    Args:
        path: the folder.
        net: the configuration of the net, if it is not one of the package.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered or cut off, is of another format, holds a
            score, or does not fit the net.

    Example:
        >>> import jax
        >>> import tempfile
        >>> from numpyro_score import MLP, VE
        >>> from numpyro_score.consistency.model import init_model
        >>> from numpyro_score.data.standardize import Affine
        >>> unit, net = Affine.identity((2,)), MLP(2, width=8, depth=1)
        >>> model = init_model(jax.random.key(0), net, VE(), unit, (2,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/model")
        ...     load_consistency(f"{folder}/model").sample(jax.random.key(1)).shape
        (2,)
    """
    config, parts, _, check = _load(path, net, CONSISTENCY)
    for name in ("rows", "gaussian_baseline", "covariance"):  # of scores
        del parts[name]
    model = ConsistencyModel(**parts, config=config)
    denoiser = NetDenoiser(
        model.params, model.graphdef, model.standardize_context, config=config
    )
    _check_net(check, denoiser, model.standardize)
    return model


def load_prior(
    path: str | os.PathLike, *, net: Callable | nnx.Module | None = None
) -> LearnedPrior:
    """Return a prior of :func:`numpyro_score.learn_prior` that was saved.

    Args:
        path: the folder.
        net: the ``net`` of ``ScoreMatching``, if it is not a configuration of the
            package.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered, or parts belong to different priors.

    Example:
        >>> import jax, numpyro, tempfile
        >>> from numpyro_score import learn_prior
        >>> def model():
        ...     numpyro.sample("x", numpyro.distributions.Normal(0, 1))
        >>> draws = {"x": jax.random.normal(jax.random.key(0), (400,))}
        >>> prior = learn_prior(
        ...     jax.random.key(1), draws, model, num_steps=20, progress_bar=False
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(prior, f"{folder}/prior")
        ...     load_prior(f"{folder}/prior").names
        ('x',)
    """
    score, parts = load_with_sites(
        path, read_sites, lambda parts: parts["latents"].size, net=net
    )
    low, high = score.sde.sigma_min, score.sde.sigma_max
    if not low <= parts["level"] <= high:
        raise ValueError(
            "`path` must hold a prior at a level that its score has learned, from "
            f"{low} to {high}. {REMEDY} Got level {parts['level']}, in {path}."
        )
    return LearnedPrior(score, **parts)


def save_with_sites(
    score: ScoreModel,
    arrays: dict[str, np.ndarray],
    header: dict[str, Any],
    path: str | os.PathLike,
) -> None:
    """Save a score in a new folder, beside what says which sites it is of.

    Args:
        score: the score.
        arrays: what else has been learned, by name.
        header: the sites, in the types of JSON.
        path: the new folder.

    Raises:
        FileExistsError: if there is something at ``path``.
        TypeError: as :func:`save`.
    """
    path = folder.check_new(path, "score")
    with folder.new_folder(path) as partial:
        save(score, partial / SCORE)
        folder.write(partial / SITES, arrays, header)
        (partial / folder.SUMS).write_text(folder.sums(partial, PARTS))


def load_with_sites[Parts](
    path: str | os.PathLike,
    read: Callable[[Path], Parts],
    size_of: Callable[[Parts], int],
    *,
    net: Callable | nnx.Module | None = None,
) -> tuple[ScoreModel, Parts]:
    """Return a score and what was saved beside it.

    Args:
        path: the folder.
        read: function of the folder of the sites that returns what belongs to them.
        size_of: function of that which returns the number of numbers of the sites.
        net: the net of the score, if it is not a configuration of the package.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered, or parts were not saved together.
    """
    path = folder.as_path(path)
    parts = read(path / SITES)
    score = load(path / SCORE, net=net)
    folder.check_together(path, PARTS)
    if score.event_shape != (size_of(parts),):
        raise ValueError(
            "`path` must hold a score of all sites beside it. Got event shape "
            f"{score.event_shape}, sites of {size_of(parts)} numbers, in {path}."
        )
    return score, parts


def _header_of_score(score: ScoreModel, denoiser: NetDenoiser) -> dict[str, Any]:
    level = known_level(score)
    return {
        "kind": SCORE,
        "parametrization": to_config(denoiser.parametrization),
        "support": to_config(score.support),
        "velocity_only": score.velocity_only,
        **({PER_COORDINATE: True} if denoiser.per_coordinate else {}),
        **({} if level is None else {LEVEL: level}),
    }


def _load(
    path: str | os.PathLike, net: Any, kind: str
) -> tuple[Any, dict[str, Any], dict[str, Any], HeaderCheck]:
    """Return configuration of the net, fields of the model, header and its checks."""
    path = folder.as_path(path)
    arrays, header = folder.read(path)
    found = header.get("kind", SCORE)
    if found != kind:
        raise ValueError(
            f"`path` must hold a {kind}; `load` loads scores and `load_consistency` "
            f"consistency models. Got {path}, which holds a {str(found)[:60]}."
        )
    check_arrays(arrays, path / folder.WEIGHTS)
    numbers = sum(array.size for array in arrays.values())
    check = HeaderCheck(path / folder.HEADER, len(arrays), numbers)
    shape = arrays["standardize.loc"].shape
    _check_header(check, header, kind, shape)
    if net is None:
        net = build(check, "net", header["net"], net_config)
    elif header.get(PER_COORDINATE):
        net = with_coordinate_levels(net)
    params, graphdef = build(check, "net", net, partial(restore, arrays))
    parts = {
        "params": params,
        "graphdef": graphdef,
        "standardize": affine(arrays, "standardize"),
        "standardize_context": context_map(arrays),
        "linear_baseline": optional_array(arrays, LINEAR_BASELINE),
        "sde": build(check, "sde", header["sde"], from_config),
        "event_shape": shape,
        "gaussian_baseline": gaussian_baseline(arrays),
        "covariance": optional_array(arrays, COVARIANCE),
        "rows": optional_array(arrays, ROWS),
    }
    return net, parts, header, check


def _check_header(
    check: HeaderCheck, header: dict[str, Any], kind: str, shape: tuple[int, ...]
) -> None:
    """Raise unless the header has the entries that :func:`save` writes."""
    own = ("parametrization", "support", "velocity_only") if kind == SCORE else ()
    names = ("format", "versions", "net", "sde", "event_shape", *own)
    optional = ("kind", PER_COORDINATE, LEVEL) if kind == SCORE else ("kind",)
    known = dict.fromkeys(names, True) | dict.fromkeys(optional, False)
    check.keys("header", header, known)
    check.net("net", header["net"])
    check.config("sde", header["sde"], PROCESSES)
    if header["event_shape"] != list(shape):
        rule = f"{list(shape)}, the shape of the array `standardize.loc`"
        check.refuse("event_shape", rule, header["event_shape"])
    if kind == SCORE:
        check.config("parametrization", header["parametrization"], PARAMETRIZATIONS)
        check.support("support", header["support"])
        check.flag("velocity_only", header["velocity_only"])
        _check_per_coordinate(check, header)


def _check_per_coordinate(check: HeaderCheck, header: dict[str, Any]) -> None:
    """Raise unless the net of the header takes as many levels as the header says."""
    flag = header.get(PER_COORDINATE, False)
    check.flag(PER_COORDINATE, flag)
    net = header["net"]
    while isinstance(net, dict) and "net" in net.get("fields", {}):
        net = net["fields"]["net"]  # of a net inside of another
    if "class" in net and net["fields"].get(PER_COORDINATE, False) != flag:
        check.refuse(PER_COORDINATE, f"{not flag}, as its net", flag)


def _level(check: HeaderCheck, level: Any, sde: SDE, rows: Any) -> float | None:
    """Return the level in use, one of those of the process of a score with rows."""
    if level is None:
        return None
    check.number(LEVEL, level)
    low, high = float(sde.sigma_min), float(sde.sigma_max)
    if rows is None or not low <= level <= high:
        check.refuse(LEVEL, f"from {low} to {high}, of a score with rows", level)
    return float(level)


def _check_net(check: HeaderCheck, denoiser: NetDenoiser, standardize: Affine) -> None:
    """Raise unless the net maps a point and its context to a point."""
    affine_context = denoiser.standardize_context
    if affine_context is None and isinstance(denoiser.config, EmbedContext):
        return  # the shape of its contexts is not in the files
    if affine_context is None:
        size = getattr(denoiser.config, "context_size", 0)
        context = jnp.zeros(size) if size else None
    else:
        context = affine_context.loc

    def run(described: Any) -> None:
        denoiser.check(standardize.loc, context)

    build(check, "net", denoiser, run)


def _build_support(
    check: HeaderCheck, described: Any, shape: tuple[int, ...]
) -> Support | None:
    """Return the support of unconstrained points of a shape."""

    def run(described: Any) -> Support | None:
        support = from_config(described)
        if support is not None:
            _check_support(support, shape)
        return support

    return build(check, "support", described, run)


def _check_support(support: Support, shape: tuple[int, ...]) -> None:
    """Raise unless the support maps points of this shape to whole data and back."""
    check_constraint(support.constraint)
    data_shape, kind = support.data_shape(shape), jnp.result_type(float)
    x = jax.eval_shape(support.constrain, jax.ShapeDtypeStruct(shape, kind))
    check_output(x, data_shape, "support")
    check_output(jax.eval_shape(support.unconstrain, x), shape, "support")
    if support.constraint.event_dim != len(data_shape):
        raise ValueError(
            "`support` must be a constraint on a whole datum. Got events of "
            f"{support.constraint.event_dim} dimensions, data of shape {data_shape}."
        )
