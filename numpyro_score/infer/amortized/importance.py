r"""Pareto-smoothed importance sampling (PSIS) of amortized draws.

For draws :math:`z_s` of the learned posterior q and weights
:math:`w_s = p(z_s, y) / q(z_s | y)`, weighted means estimate expectations under the
exact posterior, and the mean weight is an unbiased estimate of the evidence p(y). The
largest weights are smoothed by a generalized Pareto distribution; its shape k-hat below
0.7 indicates reliable estimates (Vehtari et al. 2024; smoothing and shape by ArviZ).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import check_key
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.score.density import solver_log_prob
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import RK4, Geometric
from numpyro_score.typing import PRNGKey

# of RK4 for log q: rmse 0.002 nats for a 2-d mixture
# (test_steps_of_the_density_suffice)
NUM_STEPS = 64
# a fifth of them is the tail, to which a Pareto law is fitted, for which ArviZ asks 5
MIN_DRAWS = 25
FEW_DRAWS = "the number of draws, of which a fifth gives the tail of the weights"
MAX_KHAT = 0.7  # Vehtari et al. 2024, section 3: above, no practical sample size helps
UNIFORM_ESS_SHARE = 0.95  # of ESS = N / (1 + cv^2): weights with cv below 0.23


class ImportanceResult(NamedTuple):
    """Weighted draws of a learned posterior.

    - **samples**: draws of the learned posterior, by site.
    - **log_weights**: log of the smoothed, normalized weights.
    - **khat**: shape of the tail of the weights; reliable below 0.7.
    - **ess**: effective sample size, 1 / sum of squared weights.
    - **log_evidence**: estimate of log p(y), in nats.
    - **log_evidence_error**: its standard error, by the delta method.
    """

    samples: dict[str, Array]
    log_weights: Float[np.ndarray, " draws"]
    khat: float
    ess: float
    log_evidence: float
    log_evidence_error: float

    @property
    def is_reliable(self) -> bool:
        """True if k-hat is below 0.7, or weights so equal that their k-hat is noise."""
        even = self.ess >= UNIFORM_ESS_SHARE * len(self.log_weights)
        return even or self.khat < MAX_KHAT

    def resample(
        self, rng_key: PRNGKey, num_samples: int | None = None, *, replace: bool = True
    ) -> dict[str, Array]:
        """Return samples drawn with probabilities proportional to their weights.

        With replacement they follow the exact posterior, in the limit of many samples.

        Args:
            rng_key: random key.
            num_samples: number of draws; None for the number of samples. Beyond ``ess``
                most draws are repetitions.
            replace: whether to draw with replacement. Without replacement the draws
                follow the exact posterior only if they are a small fraction of the
                samples; with all of them they follow the learned posterior.

        Raises:
            ValueError: for more draws than samples, without replacement.
        """
        check_key("rng_key", rng_key)
        size = len(self.log_weights)
        count = size if num_samples is None else num_samples
        if not replace and count > size:
            raise ValueError(
                "`num_samples` must be at most the number of samples if none may come "
                f"twice. Got {count} of {size}."
            )
        weights = jnp.exp(self.log_weights)
        index = jax.random.choice(rng_key, size, (count,), replace=replace, p=weights)
        return {name: value[index] for name, value in self.samples.items()}


def log_ratios(
    score: ScoreModel,
    simulator: Simulator,
    z: Float[Array, "draws size"],
    context: Array,
) -> Float[Array, " draws"]:
    """Return log p(z, y) - log q(z | y) for draws z in unconstrained space, in nats.

    Raises:
        ValueError: if the model's joint density is not tractable.
    """
    simulator.check_tractable()
    ts = Geometric()(score.sde, NUM_STEPS)
    log_q = solver_log_prob(score, z, solver=RK4(), ts=ts, context=context)
    log_p = jax.jit(jax.vmap(simulator.log_joint, (0, None)))(z, context)
    return log_p - log_q


def psis(samples: dict[str, Array], ratios: Any) -> ImportanceResult:
    """Return Pareto-smoothed weights of draws; warn if k-hat is not below 0.7.

    Args:
        samples: draws by site.
        ratios: log p - log q of every draw; values that are not finite count as -inf.

    Raises:
        ValueError: if no value is finite.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=1000)  # p = q, evidence e
        >>> result = psis({"x": jnp.asarray(x)}, np.full(1000, 1.0) + 1e-3 * x)
        >>> round(result.log_evidence, 2), round(result.ess)
        (1.0, 1000)
    """
    from arviz_stats.base.array import array_stats

    ratios = np.asarray(ratios, float)
    if not np.isfinite(ratios).any():
        raise ValueError(
            "The model gives no draw of the posterior a positive density together with "
            "this observation: it is impossible under the model, or the learned "
            "posterior is far from the exact one. Check the observation against the "
            f"support of its site. Got {len(ratios)} draws without density."
        )
    lowest = ratios[np.isfinite(ratios)].min(initial=0.0) - 100.0  # weight e^-100
    ratios = np.where(np.isfinite(ratios), ratios, lowest)
    log_weights, khat = array_stats.psislw(-ratios)  # takes log q - log p, as for LOO
    top = ratios.max()
    weights = np.exp(ratios - top)
    error = weights.std() / weights.mean() / np.sqrt(len(weights))
    result = ImportanceResult(
        samples,
        np.asarray(log_weights),
        float(khat),
        float(1 / np.exp(2 * log_weights).sum()),
        float(top + np.log(weights.mean())),
        float(error),
    )
    if not result.is_reliable:
        warn_caller(
            f"Pareto k-hat is {khat:.2f}, above {MAX_KHAT}: the learned posterior is "
            "too far from the exact one for weights to correct it. Train on more "
            "simulations or rounds, or start MCMC from `warm_start`."
        )
    return result
