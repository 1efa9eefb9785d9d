"""Reflow: a flow with straighter paths, learned from pairs of noise and draws."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import check_key
from numpyro_score.consistency.distillation import NUM_LEVELS, sample_levels
from numpyro_score.consistency.model import default_net
from numpyro_score.data.rows import Batch
from numpyro_score.loss.noise_levels import add_noise
from numpyro_score.renamed_arguments import renamed
from numpyro_score.schedule import geometric
from numpyro_score.score.denoiser import NetDenoiser
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE
from numpyro_score.solver import DPMSolverPP, Solver, encode
from numpyro_score.solver.grid import default_times
from numpyro_score.train.fit import FitOptions, fit_params
from numpyro_score.train.optimizer import build
from numpyro_score.typing import Params, PRNGKey, Scalar


@renamed(key="rng_key")
def reflow(
    rng_key: PRNGKey,
    score: ScoreModel,
    num_steps: int,
    *,
    net: Callable | None = None,
    num_pairs: int = 20_000,
    solver: Solver = DPMSolverPP(),
    batch_size: int = 512,
    progress_bar: bool = True,
) -> tuple[ScoreModel, Float[Array, " steps"]]:
    r"""Return a model of a straighter flow with the same draws, and the losses.

    Liu et al. 2023: for pairs (x_0, n) at the two ends of paths of the old flow, the
    flow of :math:`E[x_0 | x_0 + \sigma n]` has nearly straight paths, for which few
    steps of :class:`~numpyro_score.solver.Euler` suffice. The result is *not* a score:
    use it with solvers of the flow only, not for densities, Langevin steps and SDE
    solvers.

    Args:
        rng_key: random key.
        score: the model whose flow gives the pairs.
        num_steps: training steps.
        net: as in :func:`distill`.
        num_pairs: number of pairs.
        solver: solver of the probability flow.
        batch_size: pairs per step, at most all.
        progress_bar: whether to show steps and loss.

    Returns:
        The model and the training loss of every step.

    Raises:
        FloatingPointError: if the loss is not finite in the first block.
        ValueError: for fewer than one step.

    Example:
        >>> from numpyro_score import MLP, VE, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> net = MLP(1, width=8, depth=1)
        >>> straight, losses = reflow(
        ...     jax.random.key(0), score, 2, net=net, num_pairs=16, batch_size=8
        ... )
        >>> straight.event_shape, losses.shape
        ((1,), (2,))
    """
    check_key("rng_key", rng_key)
    key_pairs, key_net, key_fit = jax.random.split(rng_key, 3)
    ts = default_times(score.sde, NUM_LEVELS)
    draws = score.sample(key_pairs, (num_pairs,), solver=solver, ts=ts)
    forward = jax.vmap(score.standardize.forward)
    top = encode(score, draws, solver=solver, ts=ts)
    alpha, sigma = score.sde.marginal(score.sde.t_max)
    center = score.start_center(sigma / alpha)
    noise = (forward(top) - alpha * center) / jnp.hypot(alpha, sigma)
    pairs = jnp.stack([forward(draws) - center, noise], axis=1)
    params, graphdef = build(default_net(net, score.event_shape), key_net)
    denoiser = NetDenoiser(None, graphdef)
    params, losses = fit_params(
        key_fit,
        _ReflowProblem(score.sde),
        params,
        denoiser,
        Batch(pairs),
        FitOptions(num_steps, progress_bar=progress_bar),
        batch_size=batch_size,
    )
    score = replace(
        score,
        denoiser=replace(denoiser, params=params),
        standardize=score.standardize.recentered(center),
    )
    return score, losses


@dataclass(frozen=True)
class _ReflowProblem:
    """Mean of (D(x_0 + level n, level) - x_0)^2 over pairs (x_0, n)."""

    sde: SDE

    def loss(
        self, params: Params, fixed: NetDenoiser, key: PRNGKey, batch: Batch
    ) -> Scalar:
        """Return the loss of a batch of pairs."""
        denoiser, pairs = replace(fixed, params=params), batch.x
        levels = geometric(self.sde.sigma_min, self.sde.sigma_max, NUM_LEVELS)
        level = levels[sample_levels(key, len(pairs), NUM_LEVELS)]
        noisy = add_noise(pairs[:, 0], level, pairs[:, 1])
        denoised = jax.vmap(denoiser)(noisy, level)
        return jnp.square(denoised - pairs[:, 0]).mean()
