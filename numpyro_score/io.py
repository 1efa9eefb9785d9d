"""Save and load learned scores: weights, a readable header, and hashes of both.

A saved score is a folder of three files. ``weights.safetensors`` holds arrays,
``header.json`` says what they belong to, and ``SHA256SUMS`` holds the hashes of the two
in the format of ``sha256sum --check``. Nothing is pickled and loading runs no code
from the folder: the header can only name the package's own classes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from numpyro_score.describe import build_object, describe
from numpyro_score.estimator import NetDenoiser
from numpyro_score.score import ScoreModel
from numpyro_score.standardize import Affine

FORMAT = 1  # of the folder; raised when an older reader could not understand it
WEIGHTS, HEADER, SUMS = "weights.safetensors", "header.json", "SHA256SUMS"
LIBRARIES = ("numpyro_score", "jax", "flax", "numpyro", "safetensors")


def save(score: ScoreModel, path: str | os.PathLike) -> None:
    """Save a learned score in a new folder.

    The folder appears under its name only when it is complete.

    Args:
        score: what ``ScoreMatching.run`` returned as ``result.score``.
        path: where the folder will be; it must not exist.

    Raises:
        FileExistsError: if there is something at ``path``.
        TypeError: for a score that is a function, whose code cannot be saved, or a net
            with states that are not floating-point numbers.

    Example:
        >>> import tempfile
        >>> from numpyro_score import MLP, ScoreMatching
        >>> trainer = ScoreMatching(MLP(2, width=8, depth=1))
        >>> state = trainer.init(jax.random.key(0), jnp.eye(2))
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
    if not isinstance(score.denoiser, NetDenoiser):
        raise TypeError(
            "`score` must come from ScoreMatching: of a function only the code could "
            "be saved, and code is never loaded. Save the function's own parameters "
            f"and call ScoreModel.from_fn again. Got {type(score.denoiser).__name__}."
        )
    contents = {
        WEIGHTS: safetensors.numpy.save(_arrays(score, score.denoiser)),
        HEADER: json.dumps(_header(score, score.denoiser), indent=2).encode(),
    }
    sums = [f"{_hash(data)}  {name}\n" for name, data in contents.items()]
    contents[SUMS] = "".join(sums).encode()
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in contents.items():
        (partial / name).write_bytes(data)
    partial.rename(path)


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
        ValueError: if a file was altered or cut off, is of another format, or does not
            fit the net.
    """
    contents = _read(Path(path))
    header = _parse(contents[HEADER], Path(path))
    net = _configuration(header["net"]) if net is None else net
    module = net
    if not isinstance(net, nnx.Module):
        module = nnx.eval_shape(lambda: net(rngs=nnx.Rngs(0)))
    graphdef, fresh = nnx.split(module)
    arrays = safetensors.numpy.load(contents[WEIGHTS])
    denoiser = NetDenoiser(
        _restore(arrays, fresh),
        graphdef,
        _affine(arrays, "context"),
        None if isinstance(net, nnx.Module) else net,
        build_object(header["parametrization"]),
        center=jnp.asarray(arrays["center"]) if "center" in arrays else None,
    )
    standardize = _affine(arrays, "standardize")
    assert standardize is not None
    return ScoreModel(
        denoiser,
        standardize,
        build_object(header["sde"]),
        tuple(header["event_shape"]),
        build_object(header["support"]),
        header["velocity_only"],
    )


def _header(score: ScoreModel, denoiser: NetDenoiser) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in LIBRARIES},
        "net": describe(denoiser.config, else_name=True),
        "parametrization": describe(denoiser.parametrization),
        "sde": describe(score.sde),
        "event_shape": list(score.event_shape),
        "support": describe(score.support),
        "velocity_only": score.velocity_only,
    }


def _arrays(score: ScoreModel, denoiser: NetDenoiser) -> dict[str, np.ndarray]:
    """Return all arrays by name."""
    arrays = {f"net{name}": leaf for name, leaf in _named(denoiser.params)}
    affines = {
        "standardize": score.standardize,
        "context": denoiser.standardize_context,
    }
    for name, affine in affines.items():
        if affine is not None:
            arrays[f"{name}.loc"], arrays[f"{name}.scale"] = affine.loc, affine.scale
    if denoiser.center is not None:
        arrays["center"] = denoiser.center
    for name, leaf in arrays.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                "`score` must have a net whose states are floating-point numbers: "
                f"random keys and counters have no place in a density. Got {name} of "
                f"dtype {leaf.dtype}."
            )
    return {name: np.asarray(leaf) for name, leaf in arrays.items()}


def _named(params: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _restore(arrays: dict[str, np.ndarray], fresh: Any) -> Any:
    """Return the weights in the structure of a fresh net's."""
    want = {f"net{name}": leaf.shape for name, leaf in _named(fresh)}
    got = {k: v.shape for k, v in arrays.items() if k.startswith("net")}
    if want != got:
        odd = sorted(set(want.items()) ^ set(got.items()))[:4]
        raise ValueError(
            "`net` must have the weights that were saved: the same names and shapes. "
            f"Differences begin with {odd}."
        )
    leaves = [jnp.asarray(arrays[name]) for name in want]
    return jax.tree.unflatten(jax.tree.structure(fresh), leaves)


def _affine(arrays: dict[str, np.ndarray], name: str) -> Affine | None:
    if f"{name}.loc" not in arrays:
        return None
    loc, scale = arrays[f"{name}.loc"], arrays[f"{name}.scale"]
    return Affine(jnp.asarray(loc), jnp.asarray(scale))


def _configuration(described: dict[str, Any]) -> Any:
    if "class" not in described:
        raise ValueError(
            "`net` must be given: the saved score was trained with a net that is not "
            "the package's, and code is never loaded from files. "
            f"It was {described['name']}."
        )
    return build_object(described)


def _read(path: Path) -> dict[str, bytes]:
    """Return the files' bytes, or raise if they are not what was saved."""
    missing = [name for name in (SUMS, HEADER, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`path` must be a folder made by numpyro_score.io.save. Got {path}, which "
            f"{'lacks ' + ', '.join(missing) if path.exists() else 'does not exist'}."
        )
    contents = {name: (path / name).read_bytes() for name in (WEIGHTS, HEADER)}
    want = "".join(f"{_hash(data)}  {name}\n" for name, data in contents.items())
    sums = (path / SUMS).read_bytes()
    if sums != want.encode():
        altered = [
            n for n, data in contents.items() if _hash(data).encode() not in sums
        ]
        raise ValueError(
            "`path` must hold files as they were saved: a hash does not match, so a "
            "file was altered or cut off. Copy the folder again. "
            f"Got {path}, altered: {', '.join(altered) or SUMS}."
        )
    return contents


def _parse(header: bytes, path: Path) -> dict[str, Any]:
    """Return the header, or raise if it is of another format."""
    parsed = json.loads(header)
    if parsed.get("format") != FORMAT:
        raise ValueError(
            f"`path` must hold a score of format {FORMAT}, which this version of "
            "numpyro_score reads. Load it with the version that saved it. Got format "
            f"{parsed.get('format')}, saved by {parsed.get('versions')}, in {path}."
        )
    return parsed


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
