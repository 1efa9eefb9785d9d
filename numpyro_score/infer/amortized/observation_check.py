"""Warnings of observations that the simulations of an amortized posterior do not cover.

A net extrapolates without a sign of it. An observed number is reported if it is
outside of the support that its site has in the model, or outside of the range of the
simulations (:class:`~numpyro_score.data.context_scale.ContextScale`). The range of a
number that is the same in all simulations is that number. An observation of which every
number is within its range may still be far from all simulations, as two measurements of
one quantity that differ by more than their noise.
"""

from typing import Any

import numpy as np
from jaxtyping import Array

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import is_traced
from numpyro_score.data.context_scale import ContextMap, ContextScale
from numpyro_score.infer.amortized.layout import ObservationLayout, ObservedSite

MAX_NAMED = 5  # numbers of a site in one warning


def warn_of_far_observations(
    observed: ObservationLayout,
    context: Array,
    context_map: ContextMap | None,
    *,
    batch_ndims: int = 0,
) -> None:
    """Warn of observed numbers that the simulations do not cover; not while traced.

    Args:
        observed: layout of the observed sites.
        context: checked observation, from ``observed.parse``.
        context_map: map of contexts of the learned score; one without a range, as in
            files of version 0.1.0, leaves only the supports to be checked.
        batch_ndims: number of batch dimensions of ``context``.
    """
    if is_traced(context):
        return
    values = observed.split(context, batch_ndims)
    for site in observed.sites:
        _warn_of_support(site, values[site.name])
    if not isinstance(context_map, ContextScale):
        return
    far = observed.split(context_map.is_far(context), batch_ndims)
    low, high = (observed.split(end) for end in (context_map.low, context_map.high))
    for name, flags in far.items():
        if flags.any():
            _warn_of_range(name, flags, values[name], low[name], high[name])
    if batch_ndims == 0 and not any(flags.any() for flags in far.values()):
        _warn_of_remoteness(observed, context, context_map)


def _warn_of_support(site: ObservedSite, value: np.ndarray) -> None:
    if site.support is None or site.unconstrain is not None:
        return  # unconstrained values are in no support
    inside = np.asarray(site.support(value))
    if not inside.all():
        # constraints of vectors have one flag for each vector
        lead = inside.reshape(inside.shape + (1,) * (value.ndim - inside.ndim))
        bad = np.broadcast_to(~lead, value.shape)
        warn_caller(
            f"`observation` of site '{site.name}' is impossible: outside of the site's "
            f"support in the model, {site.support}. The draws mean nothing. "
            f"Got {_numbers(bad, value)}."
        )


def _warn_of_range(
    name: str, far: np.ndarray, value: np.ndarray, low: np.ndarray, high: np.ndarray
) -> None:
    """Warn of numbers outside of the range of the simulations."""
    index = np.argwhere(far)[:MAX_NAMED]
    event = [tuple(i[i.size - low.ndim :]) for i in index]
    ends = [(float(low[e]), float(high[e])) for e in event]
    ranges = [f"always {a:.6g}" if a == b else f"{a:.6g} to {b:.6g}" for a, b in ends]
    warn_caller(
        f"`observation` of site '{name}' is far from all simulations, on which the "
        "posterior was learned: its draws mean nothing. Compare the observation with "
        "draws of the prior predictive, and mend the model or its prior. "
        f"Got {_numbers(far, value)}; simulated: {', '.join(ranges)}."
    )


def _warn_of_remoteness(
    observed: ObservationLayout, context: Array, scale: ContextScale
) -> None:
    """Warn of an observation whose numbers are together far from the simulations."""
    found = scale.remoteness(context)
    if found is not None and found.words:
        names = ", ".join(f"'{site.name}'" for site in observed.sites)
        warn_caller(
            f"`observation` of {names} is far from all simulations, though each of its "
            "numbers alone is not: the draws may mean nothing. Compare the observation "
            "with draws of the prior predictive, and mend the model or its prior. "
            f"Got {found.words}."
        )


def _numbers(bad: np.ndarray, value: np.ndarray) -> str:
    """Return the flagged numbers with their places, at most ``MAX_NAMED``."""
    places = np.argwhere(bad)
    named = [
        f"{value[tuple(i)]:.6g}"
        + (f" at {list(map(int, i))}" if value.ndim > 0 else "")
        for i in places[:MAX_NAMED]
    ]
    rest = len(places) - len(named)
    return ", ".join(named) + (f" and {rest} more" if rest else "")


def context_map_of(learned: Any) -> ContextMap | None:
    """Return the map of contexts of a score or consistency model, if it has one."""
    net = getattr(learned, "denoiser", learned)
    return getattr(net, "standardize_context", None)
