r"""Draws of shared latents given any number of groups, from the score given one.

For groups :math:`y_1, \dots, y_J` that are independent given shared latents
:math:`\phi`, with their local latents integrated out,

.. math:: \nabla \log p(\phi | y_{1:J}) = (1 - J) \nabla \log p(\phi)
          + \sum_j \nabla \log p(\phi | y_j).

The sum of *noisy* scores is the score of no noisy law, and at high noise it grows with
J until the solver diverges. Geffner et al. 2023 and Arruda et al. 2025
(arXiv:2505.14429) multiply it by a damping factor d(t) and estimate it from batches of
groups. Here the damping is the matrix :math:`(I + r^2 \Lambda)^{-1}` of
:mod:`~numpyro_score.infer.amortized.composition`, with :math:`\Lambda` the precision
given all groups: it has no constants to tune, is right for each direction, and is exact
for Gaussian posteriors for every J.

1. The probability flow with the composed denoiser of at most ``batch_size`` groups,
   chosen at random, each of which stands for J / ``batch_size`` groups.
2. Langevin steps at a low noise level with all groups, in batches
   (:mod:`~numpyro_score.infer.amortized.group_langevin`), which remove what is
   approximate in step 1. If they do not converge, step 1 alone, with a warning.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.infer.amortized.composition import (
    ComposedDenoiser,
    GaussianComposition,
    PosteriorFactors,
    inverse_covariance,
)
from numpyro_score.infer.amortized.group_langevin import (
    ComposedScore,
    Convergence,
    Groups,
    Matrix,
    Particles,
    langevin,
)
from numpyro_score.infer.amortized.sampling import (
    DRAW_BATCH_SIZE,
    SamplingSettings,
    map_in_batches,
)
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import Geometric
from numpyro_score.solver import sample as run_solver
from numpyro_score.typing import PRNGKey

PRECISION_DRAWS = 200  # given one group; relative error of a variance 10 %
MIN_PARTICLES = 256  # from which the metric is estimated: an sd within 5 %


@dataclass(frozen=True)
class GroupSettings:
    """Static settings of draws given many groups.

    Args:
        sampling: of the solver.
        num_samples: number of draws.
        batch_size: number of groups that are evaluated together.
        num_simulations: number of simulated groups, in each round of Langevin steps,
            that correct the mean error of the net; 0 for none.
    """

    sampling: SamplingSettings
    num_samples: int
    batch_size: int
    num_simulations: int


@partial(jax.jit, static_argnames=("simulator", "settings"))
def draw_shared(
    score: ScoreModel,
    prior: Callable,
    contexts: Float[Array, "groups ..."],
    prior_precision: Matrix,
    box: Float[Array, "2 size"],
    rng_key: PRNGKey,
    *,
    simulator: Simulator,
    settings: GroupSettings,
) -> tuple[Float[Array, "draws size"], Convergence]:
    """Return draws of z of the shared latents given all groups.

    Args:
        score: the score given one group, and without context of the prior.
        prior: denoiser of the prior, for standardized z.
        contexts: observations, one group per row.
        prior_precision: inverse covariance of standardized prior draws.
        box: lowest and highest of them.
        rng_key: random key.
        simulator: of one group, whose latents are the shared ones.
        settings: of the draws.
    """
    key_choice, key_precision, key_flow, key_steps = jax.random.split(rng_key, 4)
    count, batch_size = len(contexts), settings.batch_size
    chosen = contexts
    if count > batch_size:
        rows = jax.random.choice(key_choice, count, (batch_size,), replace=False)
        chosen = contexts[rows]
    each = _group_precisions(key_precision, score, chosen, settings.sampling)
    net, weight = score.denoiser, count / len(chosen)
    factors = PosteriorFactors(net, prior, chosen, each, prior_precision, weight, net)
    composed = replace(score, denoiser=ComposedDenoiser(factors, GaussianComposition()))
    x = _flow_draws(
        key_flow, composed, settings.sampling, max(settings.num_samples, MIN_PARTICLES)
    )
    z = score.standardize.inverse
    slope = jax.grad(lambda x: jnp.asarray(simulator.log_prior(z(x))))
    target = ComposedScore(
        score,
        slope,
        lambda key, x: simulator.draw_context(key, z(x)),
        Groups(
            contexts,
            each if count <= batch_size else each.mean(0)[None],
            prior_precision,
        ),
        batch_size,
        settings.num_simulations if count > 1 else 0,
        box,
    )
    x = jnp.clip(x, *box)  # no prior draws beyond: nothing was learned there
    moved, convergence = langevin(key_steps, x, target)
    # where errors of the net repel the particles, the flow alone is nearer
    x = jnp.where(convergence.ok, moved, x)
    return jax.vmap(z)(x[: settings.num_samples]), convergence


def _group_precisions(
    rng_key: PRNGKey,
    score: ScoreModel,
    contexts: Float[Array, "groups ..."],
    settings: SamplingSettings,
) -> Float[Array, "groups size size"]:
    """Return inverse covariances of draws given each group, without their bias.

    The expected inverse of the covariance of n draws of d numbers is
    (n - 1) / (n - d - 2) times that of the law, if it is normal.
    """
    # four more for each number: the inverse has a finite mean in any dimension
    num_draws = PRECISION_DRAWS + 4 * score.size
    shrink = (num_draws - score.size - 2) / (num_draws - 1)

    def one(row: tuple[PRNGKey, Array]) -> Matrix:
        key, context = row
        u = _standardized_draws(key, score, settings, num_draws, context)
        return shrink * inverse_covariance(u)

    keys = jax.random.split(rng_key, len(contexts))
    at_once = max(1, DRAW_BATCH_SIZE // num_draws)
    return map_in_batches(one, (keys, contexts), at_once)


def _flow_draws(
    rng_key: PRNGKey, score: ScoreModel, settings: SamplingSettings, num_samples: int
) -> Particles:
    """Return standardized draws of the composed score, in batches."""
    batch = min(num_samples, MIN_PARTICLES)
    keys = jax.random.split(rng_key, -(-num_samples // batch))
    x = jax.lax.map(
        lambda key: _standardized_draws(key, score, settings, batch, None), keys
    )
    return x.reshape(-1, score.size)[:num_samples]


def _standardized_draws(
    key: PRNGKey,
    score: ScoreModel,
    settings: SamplingSettings,
    num_samples: int,
    context: Array | None,
) -> Particles:
    ts = Geometric()(score.sde, settings.num_steps)
    z = run_solver(
        key, score, (num_samples,), solver=settings.solver, ts=ts, context=context
    )
    return jax.vmap(score.standardize.forward)(z)
