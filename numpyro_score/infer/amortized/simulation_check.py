"""Checks of what is simulated: digits that are lost, and angles.

A number of single precision has seven digits. Of a time in seconds since 1970, such as
1.7e9 + x, two of them are those of x: steps of 128 are what is left. Simulations are
then rounded, or all equal, and so is what is observed: the posterior would be that of
another model, or the prior.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.data.inputs import MAX_SPACING
from numpyro_score.data.support import base_constraint, constraint_name
from numpyro_score.infer.amortized.layout import ObservedSite
from numpyro_score.infer.amortized.simulator import Simulations, Simulator
from numpyro_score.model.latents import site_index
from numpyro_score.reprs import join_first

MAX_NAMED = 5  # numbers in one warning
CIRCULAR = constraint_name(constraints.circular)
NEAR_ENDS = 0.75 * np.pi  # a quarter turn around the ends of an angle
MAX_NEAR_ENDS = 0.01  # of the values: fewer move a probability by .01 at most


def warn_of_angles(simulator: Simulator) -> None:
    """Warn of latent angles, whose ends are one point and far apart when learned.

    Args:
        simulator: the model.
    """
    latents = simulator.latents.sites
    angles = [site.name for site in latents if site.support.name == CIRCULAR]
    if angles:
        warn_caller(
            "Latent angles are learned as numbers from -pi to pi, whose ends are far "
            "apart: a posterior across them has two modes, of which the shares, and "
            "with them the mean direction, may be wrong, and no check of draws sees "
            "shares of modes. Draw two numbers, such as of a Normal law, and take "
            "their angle by `numpyro.deterministic`, or weigh draws by `importance`. "
            f"`check=False` silences this. Got {angles}."
        )


def warn_of_drawn_angles(simulator: Simulator, simulations: Simulations) -> None:
    """Warn of observed angles that are learned, with simulations around their ends.

    Args:
        simulator: the model.
        simulations: of it.
    """
    values = simulator.observed.split(simulations.context, 1)
    angles = [
        site.name
        for site in simulator.observed.sites
        if site.support is not None
        and constraint_name(base_constraint(site.support)) == CIRCULAR
    ]
    if found := near_ends({k: values[k] for k in angles}):
        warn_caller(
            "Observed angles are learned as numbers from -pi to pi, whose ends are far "
            "apart: draws of them, and draws given them, are less sharp around their "
            "ends. Observe another angle, turned so that few simulations are there. "
            "`check=False` silences this. Got simulations within a quarter turn around "
            f"the ends {found}."
        )


def near_ends(angles: Mapping[str, Any]) -> dict[str, str]:
    """Return the shares of values within a quarter turn around -pi and pi, in percent.

    Only those above 1 %, by name.

    Args:
        angles: values of each site, along the first axis.

    Example:
        >>> near_ends({"a": np.array([3.0, -3.0, 1.0, 0.0]), "b": np.zeros(4)})
        {'a': '50%'}
    """
    shares = {k: (np.abs(v) > NEAR_ENDS).mean(0).max() for k, v in angles.items()}
    return {k: f"{share:.0%}" for k, share in shares.items() if share > MAX_NEAR_ENDS}


def check_digits(simulator: Simulator, simulations: Simulations) -> None:
    """Raise for numbers whose rounding is more than a hundredth of their sd.

    Integers are left out.

    Args:
        simulator: the model.
        simulations: of it.

    Raises:
        ValueError: naming them.

    Warns:
        UserWarning: for observed numbers of a continuous law that are the same in all
            simulations, which then tell nothing.
    """
    found = list(_lost_numbers(simulator, simulations))
    lost = [
        f"{name}: steps of {step:.2g}, sd {sd:.2g}" for name, step, sd in found if sd
    ]
    equal = [f"{name}: steps of {step:.2g}" for name, step, sd in found if not sd]
    remedy = (
        "Subtract a constant, or use other units, in the model and in what is "
        'observed, or set jax.config.update("jax_enable_x64", True).'
    )
    if lost:
        raise ValueError(
            "Simulated numbers must keep digits of what varies: these are so far from "
            f"0 that {simulations.z.dtype} rounds them, and the posterior would be "
            f"that of rounded numbers. {remedy} Got {join_first(lost, MAX_NAMED)}."
        )
    if equal:
        warn_caller(
            "Observed numbers are the same in all simulations, though their law is "
            "continuous: they tell nothing of the latents. If they vary by less than "
            f"the steps to which {simulations.z.dtype} rounds them, the posterior is "
            f"wrong. {remedy} Got {join_first(equal, MAX_NAMED)}."
        )


def _lost_numbers(
    simulator: Simulator, simulations: Simulations
) -> Iterator[tuple[str, float, float]]:
    """Yield name, rounding and sd of numbers that have lost their digits."""
    for name, values, is_random in _numbers(simulator, simulations):
        step = np.spacing(np.median(np.abs(values), axis=0).astype(values.dtype))
        varies = np.ptp(values, axis=0) > 0
        sd = np.where(varies, values.std(axis=0, dtype=np.float64), 0.0)
        # zeros have lost nothing
        lost = (step > MAX_SPACING * sd) & (varies | is_random) & values.any(axis=0)
        for index in map(tuple, np.argwhere(lost).tolist()):
            yield site_index(name, index), float(step[index]), float(sd[index])


def _numbers(
    simulator: Simulator, simulations: Simulations
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Yield names and values of sites, and whether they have a continuous law."""
    unconstrained = simulator.latents.unconstrained(jnp.asarray(simulations.z))
    for name, values in unconstrained.items():
        yield name, np.asarray(values), False
    observed = simulator.observed.split(simulations.context, 1)
    for site in simulator.observed.sites:
        if jnp.issubdtype(site.dtype, jnp.floating):
            yield site.name, observed[site.name], _is_continuous(site)


def _is_continuous(site: ObservedSite) -> bool:
    support: Any = site.support
    return support is not None and not support.is_discrete
