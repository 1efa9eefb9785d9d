"""Amortized posteriors in files: a score, and the layout of the sites it belongs to.

A saved posterior is a folder with ``layout.json`` and the folder ``score`` of
:func:`numpyro_score.io.save`. The model's code is not saved: loading compares the
layout with the trace of the model that is given.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from numpyro_score import io
from numpyro_score.infer.simulator import Simulator
from numpyro_score.score import ScoreModel

LAYOUT, SCORE = "layout.json", "score"


def save_score(
    score: ScoreModel, simulator: Simulator, path: str | os.PathLike
) -> None:
    """Save a posterior's score and layout in a new folder, complete or not at all.

    Raises:
        FileExistsError: if there is something at ``path``.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(
            "`path` must not exist: a saved posterior is never overwritten. Remove "
            f"it or choose another name. Got {path}."
        )
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    io.save(score, partial / SCORE)
    (partial / LAYOUT).write_text(json.dumps(layout_of(simulator)))
    partial.rename(path)


def layout_of(simulator: Simulator) -> dict[str, Any]:
    """Return the layout of a model's sites as JSON, to compare."""
    layout = {
        "latents": simulator.latents.describe(),
        "observed": simulator.observed.describe(),
    }
    return json.loads(json.dumps(layout))


def load_score(path: str | os.PathLike, simulator: Simulator, net: Any) -> ScoreModel:
    """Load a posterior's score after checking that it belongs to the model.

    Raises:
        FileNotFoundError: if ``path`` is no folder of a saved posterior.
        ValueError: if the model has other sites, supports or shapes than when saved.
    """
    path = Path(path)
    if not (path / LAYOUT).is_file():
        raise FileNotFoundError(
            "`path` must be a folder made by AmortizedPosterior.save. Got "
            f"{path}, which has no {LAYOUT}."
        )
    saved, own = json.loads((path / LAYOUT).read_text()), layout_of(simulator)
    if saved != own:
        odd = [part for part in own if saved.get(part) != own[part]]
        raise ValueError(
            "`path` must hold a posterior of this model with these arguments: the "
            "same sites with the same supports and shapes. Differences in "
            f"{', '.join(odd)}: got {[saved.get(part) for part in odd]}, expected "
            f"{[own[part] for part in odd]}."
        )
    return io.load(path / SCORE, net=net)
