"""Checks of parallel tempering before it starts, and warnings while it runs."""

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import call_when_known
from numpyro_score.kernel.tempered_potential import TemperedPoint
from numpyro_score.run_verdict import call_when_due
from numpyro_score.smc.evidence import MIN_ANCESTORS

MIN_RESTARTS = MIN_ANCESTORS  # each brings a state from another draw of the prior
DRAWS_PER_RESTART = 1000 // MIN_RESTARTS  # a run of 1000 draws may have the fewest
MIN_ROUND = 50  # iterations of a round: a rate is then within .5 / 50^1/2 = .07
# draws: where all restarts are asked for, early, and in long runs
MOMENTS = (250, 1000, 10000)
# nats; a smaller log Bayes factor is hardly worth a mention (Kass and Raftery 1995)
MAX_GAP = 1.0


def warn_of_no_likelihood() -> None:
    """Warn that all temperatures have the same law."""
    warn_caller(
        "ParallelTempering: the model has no observed site and no factor, so the "
        "inverse temperature does nothing and the draws are those of the prior. Pass "
        "the data as `obs`, or draw with Predictive."
    )


def check_prior_draws(
    z: Any, point: TemperedPoint, learned: Any, find_sites: Callable[[], str]
) -> None:
    """Raise if draws of the prior, or their likelihoods, are of no use.

    Where values are traced, as with parallel chains, the program raises when it runs.

    Args:
        z: draws by chain.
        point: prior and likelihood at these.
        learned: the learned sites, by name.
        find_sites: returns a sentence on sites without a density, for the error.

    Raises:
        ValueError: naming sites, or saying how the likelihood fails.
    """
    finite = {
        name: jnp.isfinite(values).reshape(*values.shape[:2], -1).all(-1).mean()
        for name, values in z.items()
    }
    values = point.log_likelihood
    shares = jnp.isnan(values).mean(), (values == -jnp.inf).mean()

    def check(finite: dict[str, Any], shares: tuple, size: Any) -> None:
        _check_sites(finite, set(learned))
        nan, zero = shares
        _check_likelihood(float(nan), float(zero), int(size), find_sites)

    call_when_known(check, finite, shares, values.size)


def _check_sites(finite: dict[str, Any], learned: set[str]) -> None:
    """Raise for sites whose draws are mostly NaN or infinite."""
    bad = {name: float(share) for name, share in finite.items() if share < 0.5}
    for name, share in bad.items():
        cause = (
            "its score returns NaN or inf: check the score on draws of its data"
            if name in learned
            else "its distribution draws them: check its parameters"
        )
        raise ValueError(
            f"Most draws of the prior at site '{name}' are not finite in unconstrained "
            f"space; {cause}. Got {100 * (1 - share):.0f} % that are NaN or infinite."
        )


def _check_likelihood(
    nan: float, zero: float, size: int, find_sites: Callable[[], str]
) -> None:
    """Raise for a likelihood that is undefined or zero, warn where it often is."""
    if nan > 0.5:
        raise ValueError(
            "The log likelihood is NaN at most draws of the prior, from which parallel "
            "tempering starts. Check the model where its latents are far from the "
            "posterior, and the data for NaN. "
            f"Got NaN at {nan * size:.0f} of {size} draws. {find_sites()}".rstrip()
        )
    if nan + zero == 1:
        raise ValueError(
            "The likelihood is zero at all draws of the prior, from which parallel "
            "tempering starts: no state can come from the prior to the posterior. Use "
            "a prior nearer to the data, or a likelihood without hard limits. "
            f"Got {zero * size:.0f} of {size} draws of zero likelihood and "
            f"{nan * size:.0f} of NaN. {find_sites()}".rstrip()
        )
    if nan + zero > 0.5:
        warn_caller(
            "ParallelTempering: the likelihood is zero or NaN at "
            f"{100 * (nan + zero):.0f} % of the draws of the prior ({zero * size:.0f} "
            f"zero and {nan * size:.0f} NaN of {size}), so that few of them start "
            "chains across. Use a prior nearer to the data, or a likelihood without "
            "hard limits."
        )


def warn_of_few_crossings(state: Any, is_judged: bool = False) -> None:
    """Warn, when the program runs, of chains that hardly cross the temperatures.

    At the end of warm-up by the rates of its last round, and where no verdict comes at
    the end of a run by the restarts counted after 250, 1000 and 10,000 draws.

    Args:
        state: of a batch of chains, after an iteration.
        is_judged: whether a verdict counts restarts at the end.
    """
    last_round = state.plan.num_warmup - state.plan.round_ends[-2]
    judged = (state.i == state.plan.num_warmup) & (last_round >= MIN_ROUND)
    drawn = jnp.max(state.stepping_stones.num_draws)  # anew for other arguments
    counted = (drawn == jnp.asarray(MOMENTS)).any() & (not is_judged)
    rates = (
        state.warmup_barrier,
        state.adapt_state.num_rungs,
        state.warmup_restart_rate,
        state.stepping_stones.restarts,
    )
    _warn_when_due(judged | counted, (judged, counted, drawn, *rates))


def _warn(facts: tuple[Any, ...]) -> None:
    judged, counted, drawn = map(np.max, facts[:3])
    barrier, num_rungs, rate, restarts = map(np.asarray, facts[3:])
    wide = judged & (barrier > num_rungs)
    slow = judged & (rate * DRAWS_PER_RESTART < 1) & ~wide
    few = counted & (restarts < min(MIN_RESTARTS, drawn // DRAWS_PER_RESTART))
    if np.any(wide):
        warnings.warn(
            f"ParallelTempering: the communication barrier, about {np.max(barrier):.0f}"
            f", is above the number of rungs, {np.min(num_rungs)}: swaps are mostly "
            "refused. Raise `num_rungs` to twice the barrier, or `num_warmup` if the "
            "rungs have not settled.",
            stacklevel=2,
        )
    if np.any(slow):
        warnings.warn(
            "ParallelTempering: a state comes from the prior to the posterior about "
            f"once in {1 / np.min(rate):.0f} draws, so shares of modes and evidence "
            "need very many draws. Raise `num_rungs` or `num_warmup`.",
            stacklevel=2,
        )
    if np.any(few):
        warn_of_few_restarts(np.min(restarts), int(np.max(drawn)))


_warn_when_due = call_when_due(_warn)


def warn_of_few_restarts(restarts: Any, drawn: int) -> None:
    """Warn that hardly any state has come from the prior to the posterior."""
    warn_caller(
        f"ParallelTempering: a chain has seen {int(restarts)} restarts from the prior "
        f"in {drawn} draws, fewer than {MIN_RESTARTS}: shares of modes and evidence "
        "are not to be trusted. Raise `num_samples`, `num_warmup` or `num_rungs`."
    )


def warn_of_gap(gap: float) -> None:
    """Warn that both directions of the evidence disagree."""
    warn_caller(
        "ParallelTempering: the log evidence from the prior up and from the posterior "
        f"down differ by {gap:.1f} nats, more than {MAX_GAP:g}: neither is to be "
        "trusted. Raise `num_samples` or `num_rungs`."
    )
