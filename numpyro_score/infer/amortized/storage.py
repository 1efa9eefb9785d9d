"""Saved amortized posteriors: a net and the layout of the model's sites.

A saved posterior is a folder with ``layout.json``, the folder ``score``, or, for a
consistency model, ``student``, of :func:`numpyro_score.io.save`, and ``SHA256SUMS``
with the hashes of the layout and of the inner folder's sums. The model's code is not
saved: loading compares the layout with a trace of the given model.
"""

import json
import os
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np

from numpyro_score import io
from numpyro_score.consistency import ConsistencyModel
from numpyro_score.infer.amortized.fit_verdict import FitVerdict
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.io.config import sites_to_config
from numpyro_score.io.folder import SUMS, as_path, check_new, new_folder, sums
from numpyro_score.io.schema import REMEDY
from numpyro_score.score.model import ScoreModel

LAYOUT, SCORE, CONSISTENCY_MODEL = "layout.json", "score", "student"
VERDICT = "verdict"  # in the layout; missing or null for none
FORMAT = 2  # of the layout; 1, of version 0.1.0, had neither this entry nor hashes


def save_posterior(
    learned: ScoreModel | ConsistencyModel,
    simulator: Simulator,
    path: str | os.PathLike,
    verdict: FitVerdict | None = None,
) -> None:
    """Save a posterior's net and layout in a new folder, atomically.

    Args:
        learned: the score or the consistency model.
        simulator: its model.
        path: path of the new folder.
        verdict: on its training, if there is one.

    Raises:
        FileExistsError: if ``path`` exists.
    """
    path = check_new(path, "posterior")
    name = SCORE if isinstance(learned, ScoreModel) else CONSISTENCY_MODEL
    judged = None if verdict is None else verdict.to_config()
    layout = {"format": FORMAT, VERDICT: judged, **_layout_config(simulator)}
    with new_folder(path) as partial:
        io.save(learned, partial / name)
        (partial / LAYOUT).write_text(json.dumps(layout))
        (partial / SUMS).write_text(sums(partial, (LAYOUT, f"{name}/{SUMS}")))


def _layout_config(simulator: Simulator) -> dict[str, Any]:
    """Return the layout of a model's sites in the types of JSON."""
    layout = {
        "latents": sites_to_config(simulator.latents),
        "observed": simulator.observed.to_config(),
    }
    return json.loads(json.dumps(layout))


def check_layout(path: str | os.PathLike, simulator: Simulator, name: str) -> Path:
    """Return the folder of the saved net, after comparing the layout with the model's.

    Args:
        path: folder of the posterior.
        simulator: the model.
        name: ``SCORE`` or ``CONSISTENCY_MODEL``.

    Raises:
        FileNotFoundError: if ``path`` is not a saved posterior of this kind.
        ValueError: if the model has other sites, supports or shapes than when saved.
    """
    path = as_path(path)
    if not (path / LAYOUT).is_file():
        raise FileNotFoundError(
            "`path` must be a folder made by AmortizedPosterior.save. Got "
            f"{path}, which has no {LAYOUT}."
        )
    if not (path / name).is_dir():
        raise FileNotFoundError(
            "`path` must hold what is loaded: a posterior is loaded by NPSE.load, its "
            "consistency model by OneStepPosterior.load. "
            f"Got {path}, which has no {name}."
        )
    saved, own = _read_layout(path, name), _layout_config(simulator)
    saved.pop(VERDICT, None)
    if not _agree(saved, own):
        odd = [part for part in own if not _agree(saved.get(part), own[part])]
        raise ValueError(
            "`path` must hold a posterior of this model with these arguments: the "
            "same sites with the same supports and shapes. Differences in "
            f"{', '.join(odd) or LAYOUT}: got {[saved.get(part) for part in odd]}, "
            f"expected {[own[part] for part in odd]}, in {path}."
        )
    return path / name


def _agree(saved: Any, own: Any) -> bool:
    """Return whether descriptions differ by no more than the precision of numbers.

    Example:
        >>> one, double = ({"dtype": name} for name in ("float32", "float64"))
        >>> _agree(one, double), _agree(one, {"dtype": "int32"})
        (True, False)
    """
    if isinstance(saved, dict) and isinstance(own, dict):
        kinds = {_kind(part.get("dtype")) for part in (saved, own)}
        names = saved.keys() - {"dtype"}
        return (
            saved.keys() == own.keys()
            and len(kinds) == 1
            and all(_agree(saved[name], own[name]) for name in names)
        )
    if isinstance(saved, list) and isinstance(own, list):
        return len(saved) == len(own) and all(map(_agree, saved, own))
    if isinstance(saved, float) and isinstance(own, float) and saved != own:
        return isclose(saved, own, rel_tol=float(np.finfo(np.float32).eps))
    return saved == own


def _kind(dtype: Any) -> str:
    """Return whether a dtype is of floating-point numbers, integers or booleans."""
    try:
        return "" if dtype is None else np.dtype(dtype).kind
    except TypeError:  # of an altered file
        return str(dtype)


def read_verdict(path: str | os.PathLike, name: str) -> FitVerdict | None:
    """Return the verdict on a saved posterior; None if it was saved without one.

    Raises:
        ValueError: if the file was altered.
    """
    config = _read_layout(Path(path), name).get(VERDICT)
    try:
        return None if config is None else FitVerdict.from_config(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(path) / LAYOUT}, entry `{VERDICT}`: not a verdict ({error}). "
            f"{REMEDY}"
        ) from error


def check_shapes(
    path: Path, learned: ScoreModel | ConsistencyModel, simulator: Simulator
) -> None:
    """Raise unless what was loaded has the shapes of the model's sites.

    Raises:
        ValueError: for a score or student of another posterior.
    """
    net = learned.denoiser if isinstance(learned, ScoreModel) else learned
    given = getattr(net, "standardize_context", None)
    want = (simulator.latents.size,), simulator.observed.shape
    # nets that were given contexts as they are keep no shape of them
    got = learned.event_shape, want[1] if given is None else given.loc.shape
    if got != want:
        raise ValueError(
            f"{path} must hold what was learned with the layout beside it: it was put "
            "there from another posterior. Copy the folder again. Got event and "
            f"context of shapes {got}, expected {want}."
        )


def _read_layout(path: Path, name: str) -> dict[str, Any]:
    """Return the layout after comparing the hashes, which 0.1.0 did not write."""
    try:
        saved = json.loads((path / LAYOUT).read_bytes())
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"{path / LAYOUT} must be an object of JSON. {REMEDY}")
    written = saved.pop("format", None)
    if written is None and not (path / SUMS).exists():
        return saved
    for file in (SUMS, f"{name}/{SUMS}"):
        if not (path / file).is_file():
            raise FileNotFoundError(
                "`path` must be a folder made by AmortizedPosterior.save. Got "
                f"{path}, which has no {file}."
            )
    if (path / SUMS).read_bytes() != sums(path, (LAYOUT, f"{name}/{SUMS}")).encode():
        raise ValueError(
            "`path` must hold files as they were saved: a hash does not match, so a "
            "file was altered or cut off. Copy the folder again. "
            f"Got {path}, altered: {LAYOUT}, {name}/{SUMS} or {SUMS}."
        )
    if written != FORMAT:
        raise ValueError(
            f"{path / LAYOUT} must have the format {FORMAT}, which this version of "
            f"numpyro_score reads. {REMEDY} Got {str(written)[:60]}."
        )
    return saved
