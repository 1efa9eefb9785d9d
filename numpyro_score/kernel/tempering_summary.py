"""Summary of a run of parallel tempering: evidence, barrier and restarts."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro.infer import MCMC

from numpyro_score.kernel.stepping_stone import average_log_evidence
from numpyro_score.kernel.tempering_checks import (
    MAX_GAP,
    MIN_RESTARTS,
    warn_of_few_restarts,
    warn_of_gap,
)
from numpyro_score.kernel.tempering_state import ParallelTemperingState


class TemperingSummary(NamedTuple):
    """Evidence and mixing of all chains of a run together.

    - **log_evidence**: estimate of the log evidence.
    - **log_evidence_error**: its standard error; infinite where it is unknown.
    - **log_evidence_gap**: largest difference, of a chain, of both directions.
    - **barrier**: communication barrier, mean over chains.
    - **restarts**: states that came from the prior to the posterior, of all chains.
    - **fewest_restarts**: of one chain.
    - **num_draws**: of one chain.
    - **num_rungs**: by chain.
    """

    log_evidence: Float[Array, ""]
    log_evidence_error: Float[Array, ""]
    log_evidence_gap: Float[Array, ""]
    barrier: Float[Array, ""]
    restarts: Int[Array, ""]
    fewest_restarts: Int[Array, ""]
    num_draws: Int[Array, ""]
    num_rungs: Int[Array, " chains"]


def summarize_tempering(state: ParallelTemperingState) -> TemperingSummary:
    """Return evidence, barrier and restarts of all chains of a run together.

    Args:
        state: ``mcmc.last_state`` of a run of ``ParallelTempering``.

    Example:
        >>> import jax
        >>> import numpyro.distributions as dist
        >>> from numpyro import sample
        >>> from numpyro_score.kernel import ParallelTempering
        >>> def model():
        ...     sample("y", dist.Normal(sample("x", dist.Normal(0, 1)), 1), obs=2.0)
        >>> mcmc = MCMC(
        ...     ParallelTempering(model, num_rungs=4), num_warmup=100, num_samples=200,
        ...     progress_bar=False,
        ... )
        >>> mcmc.run(jax.random.key(0))
        >>> summary = summarize_tempering(mcmc.last_state)
        >>> bool(abs(summary.log_evidence - dist.Normal(0, 2**0.5).log_prob(2)) < 0.3)
        True
    """
    evidence = average_log_evidence(state.evidence)
    restarts = jnp.atleast_1d(state.restarts)
    return TemperingSummary(
        evidence.log_evidence,
        evidence.error,
        evidence.gap,
        jnp.mean(state.barrier),
        restarts.sum(),
        restarts.min(),
        jnp.max(state.stepping_stones.num_draws),
        jnp.atleast_1d(state.adapt_state.num_rungs),
    )


def print_tempering_summary(
    mcmc: MCMC, prob: float = 0.9, exclude_deterministic: bool = True
) -> None:
    """Print NumPyro's summary of the draws, then evidence, barrier and restarts.

    Warns of fewer than ten restarts in a chain, and of a gap above one nat between
    both directions of the evidence.

    Args:
        mcmc: after a run of ``ParallelTempering``.
        prob: probability of the intervals, as in ``mcmc.print_summary``.
        exclude_deterministic: as in ``mcmc.print_summary``.

    Example:
        >>> callable(print_tempering_summary)
        True
    """
    mcmc.print_summary(prob, exclude_deterministic)
    summary = summarize_tempering(mcmc.last_state)
    print(
        f"Log evidence: {summary.log_evidence:.2f} +- {summary.log_evidence_error:.2f} "
        f"(gap of both directions {summary.log_evidence_gap:.2f})\n"
        f"Communication barrier: {summary.barrier:.1f} with "
        f"{', '.join(map(str, summary.num_rungs.tolist()))} rungs\n"
        f"Restarts from the prior: {summary.restarts} in all chains, at least "
        f"{summary.fewest_restarts} in each"
    )
    if summary.fewest_restarts < MIN_RESTARTS:
        warn_of_few_restarts(summary.fewest_restarts, int(summary.num_draws))
    if not summary.log_evidence_gap <= MAX_GAP:
        warn_of_gap(float(summary.log_evidence_gap))
