"""Save and load what was learned: weights, a readable header, and hashes of both.

A saved score is a folder of three files. ``weights.safetensors`` holds arrays,
``header.json`` says what they belong to, and ``SHA256SUMS`` holds the hashes of the two
in the format of ``sha256sum --check``. Nothing is pickled and loading runs no code
from the folder: the header can only name the package's own classes. Consistency models
are saved in the same way.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from numpyro_score.consistency import ConsistencyModel
from numpyro_score.io import folder
from numpyro_score.io.arrays import affine, center, net_config, restore, to_arrays
from numpyro_score.io.config import from_config, to_config
from numpyro_score.score.denoiser import NetDenoiser
from numpyro_score.score.model import ScoreModel

SCORE, CONSISTENCY = "score", "consistency model"  # kinds, as in the header


def save(score: ScoreModel | ConsistencyModel, path: str | os.PathLike) -> None:
    """Save a learned score, or a consistency model, in a new folder.

    The folder appears under its name only when it is complete.

    Args:
        score: what ``ScoreMatching.run`` returned as ``result.score``, or what
            :func:`~numpyro_score.consistency.distill` returned.
        path: where the folder will be; it must not exist.

    Raises:
        FileExistsError: if there is something at ``path``.
        TypeError: for a score that is a function, whose code cannot be saved, or a net
            with states that are not floating-point numbers.

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
    path = Path(path)
    if path.exists():
        raise FileExistsError(
            "`path` must not exist: a saved score is never overwritten. Remove it or "
            f"choose another name. Got {path}."
        )
    net: NetDenoiser | ConsistencyModel
    if isinstance(score, ConsistencyModel):
        net, own = score, {"kind": CONSISTENCY}
    elif isinstance(score.denoiser, NetDenoiser):
        net, own = score.denoiser, _header_of_score(score, score.denoiser)
    else:
        raise TypeError(
            "`score` must come from ScoreMatching: of a function only the code could "
            "be saved, and code is never loaded. Save the function's own parameters "
            f"and call ScoreModel.from_fn again. Got {type(score.denoiser).__name__}."
        )
    affines = {"standardize": score.standardize, "context": net.standardize_context}
    header = own | {
        "net": to_config(net.config, else_name=True),
        "sde": to_config(score.sde),
        "event_shape": list(score.event_shape),
    }
    folder.write(path, to_arrays(net.params, affines, net.center), header)


def load(
    path: str | os.PathLike, *, net: Callable | nnx.Module | None = None
) -> ScoreModel:
    """Load a score that :func:`save` saved.

    Args:
        path: the folder.
        net: what was passed to ``ScoreMatching`` as ``net``, if it is not one of the
            package's configurations.

    Returns:
        The :class:`~numpyro_score.score.ScoreModel`.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered or cut off, is of another format, holds a
            consistency model, or does not fit the net.
    """
    net, parts, header = _load(path, net, SCORE)
    standardize = parts.pop("standardize")
    denoiser = NetDenoiser(
        **parts,
        config=None if isinstance(net, nnx.Module) else net,
        parametrization=from_config(header["parametrization"]),
    )
    return ScoreModel(
        denoiser,
        standardize,
        from_config(header["sde"]),
        tuple(header["event_shape"]),
        from_config(header["support"]),
        header["velocity_only"],
    )


def load_consistency(
    path: str | os.PathLike, *, net: Callable | None = None
) -> ConsistencyModel:
    """Load a consistency model that :func:`save` saved.

    Args:
        path: the folder.
        net: the configuration of the model's net, if it is not one of the package's.

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
        ...     save(model, f"{folder}/student")
        ...     load_consistency(f"{folder}/student").sample(jax.random.key(1)).shape
        (2,)
    """
    net, parts, header = _load(path, net, CONSISTENCY)
    return ConsistencyModel(
        **parts,
        sde=from_config(header["sde"]),
        event_shape=tuple(header["event_shape"]),
        config=net,
    )


def _header_of_score(score: ScoreModel, denoiser: NetDenoiser) -> dict[str, Any]:
    return {
        "kind": SCORE,
        "parametrization": to_config(denoiser.parametrization),
        "support": to_config(score.support),
        "velocity_only": score.velocity_only,
    }


def _load(
    path: str | os.PathLike, net: Any, kind: str
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the net's configuration, all that holds arrays, and the header."""
    arrays, header = folder.read(Path(path))
    found = header.get("kind", SCORE)
    if found != kind:
        raise ValueError(
            f"`path` must hold a {kind}; `load` loads scores and `load_consistency` "
            f"consistency models. Got {path}, which holds a {found}."
        )
    net = net_config(header["net"]) if net is None else net
    params, graphdef = restore(arrays, net)
    standardize = affine(arrays, "standardize")
    assert standardize is not None
    parts = {
        "params": params,
        "graphdef": graphdef,
        "standardize": standardize,
        "standardize_context": affine(arrays, "context"),
        "center": center(arrays),
    }
    return net, parts, header
