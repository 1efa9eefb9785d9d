"""Sites, whitening and check of a learned prior as a folder beside its score."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.io import folder
from numpyro_score.io.arrays import check_factor
from numpyro_score.io.config import from_config, sites_to_config
from numpyro_score.io.schema import SOFTNESS, HeaderCheck, build
from numpyro_score.model.latents import LatentLayout, LatentSite
from numpyro_score.model.learned_prior import LearnedPrior, PriorFit

PRIOR = "learned prior"  # kind in the header
ENTRIES = ("format", "versions", "kind", "sites", "level", "fit")


def describe_sites(
    prior: LearnedPrior,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays and header of everything but the score of a learned prior."""
    arrays = {"loc": np.asarray(prior.loc), "factor": np.asarray(prior.factor)}
    header = {
        "kind": PRIOR,
        "sites": sites_to_config(prior.latents),
        "level": prior.level,
        "fit": prior.fit and [number for number in prior.fit if number is not None],
    }
    return arrays, header


def read_sites(path: Path) -> dict[str, Any]:
    """Return the fields of a learned prior but its score.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered, or is not that of a learned prior.
    """
    arrays, header, check = read_parts(path, PRIOR, ENTRIES)
    check.number("level", header["level"])
    if not header["level"] > 0:
        check.refuse("level", "positive", header["level"])
    latents = build_sites(check, header["sites"])
    size = latents.size
    shapes = {name: array.shape for name, array in sorted(arrays.items())}
    if shapes != {"factor": (size, size), "loc": (size,)}:
        check.refuse("sites", f"sites of the arrays' {size} numbers", shapes)
    check_factor(arrays["factor"], path / folder.WEIGHTS)
    return {
        "loc": jnp.asarray(arrays["loc"]),
        "factor": jnp.asarray(arrays["factor"]),
        "latents": latents,
        "level": float(header["level"]),
        "fit": _fit(check, header["fit"]),
    }


def read_parts(
    path: Path, kind: str, entries: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any], HeaderCheck]:
    """Return arrays, header and checks of what was saved beside a score.

    Args:
        path: the folder.
        kind: what the header must say that it is.
        entries: names of the header's entries.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered, or is of another kind.
    """
    arrays, header = folder.read(path)
    count = sum(array.size for array in arrays.values())
    check = HeaderCheck(path / folder.HEADER, len(arrays), count)
    check.keys("header", header, dict.fromkeys(entries, True))
    if header["kind"] != kind:
        check.refuse("kind", repr(kind), header["kind"])
    return arrays, header, check


def build_sites(check: HeaderCheck, sites: Any) -> LatentLayout:
    """Return the layout of sites that a header describes.

    Raises:
        ValueError: for entries that describe no sites.
    """
    return build(check, "sites", _checked_sites(check, sites), _layout)


def _checked_sites(check: HeaderCheck, sites: Any) -> list[dict[str, Any]]:
    """Return the description of sites after checking its entries."""
    if not isinstance(sites, list) or not sites:
        check.refuse("sites", "a list of sites", sites)
    for i, site in enumerate(sites):
        entry = f"sites[{i}]"
        names = {"name": True, "shape": True, "support": True, SOFTNESS: False}
        check.keys(entry, site, names)
        check.text(f"{entry}.name", site["name"])
        check.counts(f"{entry}.shape", site["shape"])
        check.support(entry, {k: site[k] for k in ("support", SOFTNESS) if k in site})
    found = [site["name"] for site in sites]
    if len(set(found)) < len(found):
        check.refuse("sites", "sites of different names", found)
    return sites


def _layout(sites: list[dict[str, Any]]) -> LatentLayout:
    layout = LatentLayout(
        tuple(
            LatentSite(site["name"], from_config(site), tuple(site["shape"]))
            for site in sites
        )
    )
    values = jax.eval_shape(layout.unflatten, jnp.zeros(layout.size))
    for site in layout:
        least = site.support.constraint.event_dim
        if least > len(site.shape):
            raise ValueError(
                f"Site '{site.name}' must have the dimensions of its support's events. "
                f"Got {len(site.shape)}, expected {least} or more."
            )
        if values[site.name].shape != site.shape:
            raise ValueError(
                f"Site '{site.name}' must have the shape of its support. Got "
                f"{site.shape}, expected {values[site.name].shape}."
            )
    return layout


def _fit(check: HeaderCheck, fit: Any) -> PriorFit | None:
    if fit is None:
        return None
    names, oldest = PriorFit._fields, len(PriorFit._fields) - 2
    if not isinstance(fit, list) or len(fit) not in (oldest, len(names)):
        check.refuse("fit", f"null, or {oldest} or {len(names)} numbers", fit)
    for name, value in zip(names, fit, strict=False):
        check.number(f"fit.{name}", value)
    distances = (float(value) for value in fit[oldest:])
    return PriorFit(float(fit[0]), float(fit[1]), int(fit[2]), *distances)
