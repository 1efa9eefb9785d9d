r"""Simulation-based calibration (SBC, Talts et al. 2018).

For parameters drawn from the prior, an observation simulated from them, and L draws of
the exact posterior, the rank of the parameter among the draws is uniform on 0..L. The
same holds for every function of parameters and observation. Functions of both, such as
the log likelihood, also detect a sampler that ignores the observation and returns the
prior, which ranks of parameters do not (Modrák et al. 2023).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score.checks import check_key
from numpyro_score.diagnostics.replicate import as_dict, check_draws, replicate
from numpyro_score.diagnostics.uniformity import UniformityTest, uniformity_test
from numpyro_score.renamed_arguments import renamed
from numpyro_score.typing import PRNGKey

Quantities = Callable[[Any, Any], Any]
"""(parameters, observation) -> a scalar, or a dict of arrays."""


class SBCResult(NamedTuple):
    """Result of :func:`sbc_ranks`.

    - **ranks**: rank of each parameter among its draws, 0 to ``num_draws``, ties in
      random order; arrays by name, simulation on axis 0.
    - **pit**: (rank + u) / (num_draws + 1) with uniform u, uniform on [0, 1] if
      calibrated; for :func:`~numpyro_score.diagnostics.plot_pit`.
    - **num_draws**: posterior draws per simulation.
    - **test**: p-values of uniformity.
    """

    ranks: dict[str, np.ndarray]
    pit: dict[str, np.ndarray]
    num_draws: int
    test: UniformityTest


@renamed(key="rng_key")
def sbc_ranks(
    rng_key: PRNGKey,
    truths: Any,
    draws: Any,
    *,
    observations: Any = None,
    quantities: Quantities | None = None,
) -> SBCResult:
    """Return ranks of true parameters among posterior draws, with a uniformity test.

    The draws of one simulation must be nearly independent: thin those of MCMC until
    their effective sample size is their number. Autocorrelated draws give too many
    extreme ranks.

    Args:
        rng_key: random key; breaks ties.
        truths: parameters, simulation on axis 0; an array or a dict of arrays.
        draws: posterior draws, simulation on axis 0, draw on axis 1.
        observations: second argument of ``quantities``, simulation on axis 0.
        quantities: (parameters, observation) -> a scalar or a dict of arrays to rank
            too, for example the log likelihood; traced by JAX.

    Raises:
        ValueError: for shapes that differ, values that are not finite, or
            ``quantities`` without ``observations``.

    Example:
        >>> truths = np.random.default_rng(0).normal(size=200)
        >>> draws = np.random.default_rng(1).normal(size=(200, 99))
        >>> sbc_ranks(jax.random.key(0), truths, draws).test.p_value > 0.05
        True
        >>> sbc_ranks(jax.random.key(0), truths, 0.5 * draws).test.p_value < 1e-4
        True
    """
    check_key("rng_key", rng_key)
    first, second = check_draws(truths, draws)
    if quantities is not None:
        more = _evaluate(quantities, observations, truths, draws)
        extra = check_draws(*more)
        first, second = {**first, **extra[0]}, {**second, **extra[1]}
    num_draws = next(iter(second.values())).shape[1]
    ranks, pit = {}, {}
    for j, (name, truth) in enumerate(first.items()):
        key_tie, key_jitter = jax.random.split(jax.random.fold_in(rng_key, j))
        below = (second[name] < truth[:, None]).sum(axis=1)
        ties = (second[name] == truth[:, None]).sum(axis=1)
        share = np.asarray(jax.random.uniform(key_tie, truth.shape))
        ranks[name] = below + np.floor(share * (ties + 1)).astype(int)
        jitter = np.asarray(jax.random.uniform(key_jitter, truth.shape), float)
        pit[name] = (ranks[name] + jitter) / (num_draws + 1)
    return SBCResult(ranks, pit, num_draws, uniformity_test(pit))


@renamed(key="rng_key")
def simulation_based_calibration(
    rng_key: PRNGKey,
    simulate: Callable[[PRNGKey], tuple[Any, Any]],
    sample_posterior: Callable[[PRNGKey, Any], Any],
    num_simulations: int,
    *,
    quantities: Quantities | None = None,
    batch_size: int = 100,
    compiled: bool = True,
    progress_bar: bool = True,
) -> SBCResult:
    """Return the ranks of :func:`sbc_ranks` for simulations of :func:`replicate`.

    Args:
        rng_key: random key.
        simulate: key -> (parameters, observation); parameters are an array or a dict.
        sample_posterior: (key, observation) -> posterior draws, draw on axis 0.
        num_simulations: number of simulations; a few hundred.
        quantities: further quantities to rank, see :func:`sbc_ranks`.
        batch_size: simulations in one compiled call.
        compiled: whether both functions can be traced by JAX, see :func:`replicate`.
        progress_bar: whether to show progress.

    Raises:
        ValueError: as :func:`replicate` and :func:`sbc_ranks`.

    Example:
        >>> def simulate(key):  # a unit normal seen through unit noise
        ...     x, noise = jax.random.normal(key, (2,))
        ...     return x, x + noise
        >>> def sample_posterior(key, y):
        ...     return y / 2 + jnp.sqrt(0.5) * jax.random.normal(key, (63,))
        >>> result = simulation_based_calibration(
        ...     jax.random.key(0), simulate, sample_posterior, 200, progress_bar=False
        ... )
        >>> result.test.p_value > 0.05
        True
    """
    check_key("rng_key", rng_key)
    key_replicate, key_ranks = jax.random.split(rng_key)
    truths, observations, draws = replicate(
        key_replicate,
        simulate,
        sample_posterior,
        num_simulations,
        batch_size=batch_size,
        compiled=compiled,
        progress_bar=progress_bar,
    )
    return sbc_ranks(
        key_ranks, truths, draws, observations=observations, quantities=quantities
    )


def _evaluate(
    quantities: Quantities, observations: Any, truths: Any, draws: Any
) -> tuple[dict, dict]:
    """Return the quantities at the truths and at the draws, by name."""
    if observations is None:
        raise ValueError(
            "`quantities` needs `observations`: it is a function of parameters and the "
            "observation. Got None."
        )

    def one(observation: Any, truth: Any, draws: Any) -> tuple[Any, Any]:
        at = lambda x: quantities(x, observation)  # noqa: E731
        return at(truth), jax.vmap(at)(draws)

    inputs = jax.tree.map(jnp.asarray, (observations, truths, draws))
    values = jax.jit(lambda args: jax.lax.map(lambda a: one(*a), args))(inputs)
    first, second = (v if isinstance(v, dict) else {"quantity": v} for v in values)
    return as_dict(first, "truths"), as_dict(second, "draws")
