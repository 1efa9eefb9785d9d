"""Learned joint laws in a folder: the score, and beside it the sites and their maps.

As for learned priors (:mod:`numpyro_score.io.prior`): no code is saved or run.
"""

from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.data.context_scale import ContextScale
from numpyro_score.data.support import Support
from numpyro_score.infer.amortized.fit_verdict import FitVerdict
from numpyro_score.infer.amortized.layout import ObservationLayout, ObservedSite
from numpyro_score.infer.joint.layout import JointLayout, observed_columns
from numpyro_score.io.arrays import check_scale
from numpyro_score.io.config import from_config, sites_to_config, to_config
from numpyro_score.io.folder import WEIGHTS
from numpyro_score.io.prior import build_sites, read_parts
from numpyro_score.io.schema import HeaderCheck, build

JOINT = "learned joint law"  # kind in the header
ENTRIES = ("format", "versions", "kind", "sites", "observed", "verdict")
# names of the arrays; rows are those of the score
SCALE = tuple(field.name for field in fields(ContextScale) if field.name != "rows")


class JointParts(NamedTuple):
    """Parts of a learned joint law besides its score."""

    layout: JointLayout
    verdict: FitVerdict | None


def describe_joint(parts: JointParts) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return arrays and header of a learned joint law but its score."""
    layout, verdict = parts
    arrays = {name: np.asarray(getattr(layout.scale, name)) for name in SCALE}
    observed = [
        {
            "name": site.name,
            "shape": list(site.shape),
            "dtype": site.dtype,
            "support": site.support and to_config(Support(site.support)),
        }
        for site in layout.observed.sites
    ]
    header = {
        "kind": JOINT,
        "sites": sites_to_config(layout.latents),
        "observed": observed,
        "verdict": None if verdict is None else verdict.to_config(),
    }
    return arrays, header


def read_joint(path: Path) -> JointParts:
    """Return what was saved of a learned joint law but its score.

    Raises:
        FileNotFoundError: if the folder or one of its files is not there.
        ValueError: if a file was altered, or is not that of a learned joint law.
    """
    arrays, header, check = read_parts(path, JOINT, ENTRIES)
    latents = build_sites(check, header["sites"])
    observed = build(check, "observed", _checked(check, header["observed"]), _observed)
    size = latents.size + sum(prod(site.shape) for site in observed.sites)
    shapes = {name: array.shape for name, array in sorted(arrays.items())}
    if shapes != dict.fromkeys(sorted(SCALE), (size,)):
        check.refuse("sites", f"sites of the arrays' {size} numbers", shapes)
    check_scale(arrays, path / WEIGHTS)
    columns = build(check, "observed", observed, observed_columns)
    scale = ContextScale(**{name: jnp.asarray(arrays[name]) for name in SCALE})
    return JointParts(
        JointLayout(latents, observed, columns, scale),
        read_verdict(check, header["verdict"]),
    )


def read_verdict(check: HeaderCheck, verdict: Any) -> FitVerdict | None:
    """Return the verdict that a header describes; None for none."""
    return build(check, "verdict", verdict, _verdict)


def _checked(check: HeaderCheck, sites: Any) -> list[dict[str, Any]]:
    """Return the description of observed sites after checking its entries."""
    if not isinstance(sites, list) or not sites:
        check.refuse("observed", "a list of sites", sites)
    for i, site in enumerate(sites):
        entry = f"observed[{i}]"
        names = ("name", "shape", "dtype", "support")
        check.keys(entry, site, dict.fromkeys(names, True))
        check.text(f"{entry}.name", site["name"])
        check.text(f"{entry}.dtype", site["dtype"])
        check.counts(f"{entry}.shape", site["shape"])
        check.support(f"{entry}.support", site["support"])
    return sites


def _observed(sites: list[dict[str, Any]]) -> ObservationLayout:
    return ObservationLayout(
        tuple(
            ObservedSite(
                site["name"],
                tuple(site["shape"]),
                _in_this_precision(site["dtype"]),
                None
                if site["support"] is None
                else from_config(site["support"]).constraint,
            )
            for site in sites
        )
    )


def _in_this_precision(dtype: str) -> str:
    """Return a type of a file, in the default precision if it was of a default one.

    Example:
        >>> _in_this_precision("float64"), _in_this_precision("int8")
        ('float32', 'int8')
    """
    kind = jnp.dtype(dtype)
    if kind.itemsize in (4, 8):  # the default of single and of double precision
        kind = jnp.dtype(f"{kind.name.rstrip('0123456789')}64")
    return str(jax.dtypes.canonicalize_dtype(kind))


def _verdict(config: Any) -> FitVerdict | None:
    try:
        return None if config is None else FitVerdict.from_config(config)
    except KeyError as error:
        raise ValueError(f"no {error} in a verdict") from error
