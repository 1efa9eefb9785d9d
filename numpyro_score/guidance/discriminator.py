r"""Discriminator guidance: correction of a score by a classifier of data and draws.

The optimal discriminator of noised data (label 1) and noised draws (label 0) has at
every noise level the logit :math:`\log p_{data} / p_{model}`, whose gradient is the
error of the score (Kim et al. 2023, eq. 8):

.. math:: s + \nabla \log \frac{d}{1 - d} = s + \nabla\, \mathrm{logit} .
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.checks import (
    as_finite_points,
    check_count,
    check_key,
    check_kind,
    check_positive,
    check_weight,
)
from numpyro_score.data.rows import Batch
from numpyro_score.guidance.classifier import GradientDenoiser
from numpyro_score.loss.noise_levels import LogUniform, add_noise
from numpyro_score.nn import MLP
from numpyro_score.renamed_arguments import renamed
from numpyro_score.reprs import repr_lines, short_number
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE
from numpyro_score.train.fit import NUM_BLOCKS, FitOptions, fit_params
from numpyro_score.train.optimizer import build
from numpyro_score.train.state import loss_trend
from numpyro_score.typing import Params, Position, PRNGKey, Scalar

WEIGHT_DECAY = 1e-3  # chosen, not tuned: overfitting adds noise to the gradient


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Discriminator:
    """Net whose first output is the logit of data against draws at a noise level."""

    params: Any
    graphdef: nnx.GraphDef = field(metadata={"static": True})

    def __call__(self, x: Position, level: Scalar) -> Scalar:
        """Return the logit at one standardized point x_0 + level n."""
        net = nnx.merge(self.graphdef, self.params)
        scaled = x / jnp.sqrt(1 + jnp.square(level))
        return jnp.ravel(net(scaled, jnp.log(level) / 4, None))[0]


class DiscriminatorResult(NamedTuple):
    """Result of :func:`train_discriminator`.

    - **discriminator**: the net with the lowest held-out loss of the run.
    - **advantage**: log 2 minus its held-out loss, in nats; 0 for a random guess.
    - **standard_error**: standard error of the advantage.
    - **losses**: training loss of every step.
    """

    discriminator: Discriminator
    advantage: Float[Array, ""]
    standard_error: Float[Array, ""]
    losses: Float[Array, " steps"]

    def __repr__(self) -> str:
        value, error = short_number(self.advantage), short_number(self.standard_error)
        rows = {
            "advantage": f"{value} +- {error} nats on held-out rows",
            "losses": loss_trend(self.losses),
        }
        return repr_lines(type(self).__name__, rows)

    def print_summary(self) -> None:
        """Print advantage and losses, and whether the score will be corrected."""
        print(repr(self))
        print(
            "The score will be corrected."
            if self.is_significant
            else "No advantage beyond two standard errors: the score stays as it is."
        )

    @property
    def is_significant(self) -> bool:
        """True if the advantage is two standard errors or more."""
        # NaN is no advantage
        return bool(self.advantage >= 2 * self.standard_error)


@renamed(key="rng_key")
def train_discriminator(
    rng_key: PRNGKey,
    score: ScoreModel,
    data: Float[Array, "rows *event"],
    num_steps: int = 2000,
    *,
    net: Callable | None = None,
    draws: Float[Array, "draws *event"] | None = None,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    progress_bar: bool = True,
) -> DiscriminatorResult:
    """Return a classifier of noised data against noised draws of a score.

    A fifth of the rows and draws is held out. The result is the net of lowest held-out
    loss, which is measured after every twentieth of the run: the gradient of an
    overfitted discriminator would make the score worse.

    Args:
        rng_key: random key.
        score: the score to correct.
        data: rows of the law, in physical units.
        num_steps: number of steps.
        net: a configuration such as :class:`~numpyro_score.nn.MLP`; None for a small
            MLP.
        draws: as many draws of the score as rows of data; None to draw them.
        batch_size: rows of data, and of draws, per step, at most all.
        learning_rate: rate of AdamW.
        progress_bar: whether to show steps, loss and held-out loss.

    Raises:
        FloatingPointError: if the loss is not finite in the first block.
        ValueError: for fewer than one step, fewer than five rows, or rows of another
            shape.

    Example:
        >>> from numpyro_score import MLP, VE, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> net = MLP(1, width=8, depth=1)
        >>> data = 0.5 * jax.random.normal(jax.random.key(1), (40, 1))  # another law
        >>> result = train_discriminator(
        ...     jax.random.key(0), score, data, 20, net=net, batch_size=8
        ... )
        >>> guided = discriminator_guidance(score, result)
        >>> guided.event_shape
        (1,)
    """
    check_key("rng_key", rng_key)
    key_draws, key_net, key_order, key_run, key_held = jax.random.split(rng_key, 5)
    check_kind("score", score, ScoreModel, "a ScoreModel")
    optimizer = _adamw(learning_rate)
    data = as_finite_points("data", data, score.data_shape)
    drawn = score.sample(key_draws, (len(data),)) if draws is None else draws
    draws = as_finite_points("draws", drawn, score.data_shape)
    size = min(len(data), len(draws))
    check_count("rows of `data` and `draws`", size, "a fifth is held out", least=5)

    def standardized(x: Array) -> Array:
        return jax.vmap(score.standardize.forward)(score.unconstrain(x[:size]))

    rows = jnp.stack([standardized(data), standardized(draws)], axis=1)
    rows = jax.random.permutation(key_order, rows)
    held_out, rows = rows[: size // 5], rows[size // 5 :]
    net = MLP(prod(score.event_shape), width=64, depth=2) if net is None else net
    params, graphdef = build(net, key_net)
    untrained = Discriminator(None, graphdef)
    options = FitOptions(
        num_steps,
        optimizer,
        ema=False,
        validation=Batch(held_out),
        patience=NUM_BLOCKS,  # takes all steps and returns the best weights
        progress_bar=progress_bar,
    )
    problem, batch = _DiscriminatorProblem(score.sde), Batch(rows)
    params, losses = fit_params(
        key_run, problem, params, untrained, batch, options, batch_size=batch_size
    )
    best = replace(untrained, params=params)
    held_out_losses = _losses(best, key_held, held_out, score.sde)
    error = held_out_losses.std() / jnp.sqrt(len(held_out))
    advantage = jnp.log(2.0) - held_out_losses.mean()
    return DiscriminatorResult(best, advantage, error, losses)


def discriminator_guidance(
    score: ScoreModel, result: DiscriminatorResult, *, weight: Scalar = 1.0
) -> ScoreModel:
    """Return the score plus ``weight`` times the gradient of the discriminator's logit.

    Improves scores that were trained too little. If the advantage on held-out rows is
    below two standard errors, the score is returned unchanged, since the gradient would
    add noise. Compare the guided draws with data before use.

    Args:
        score: the score that the discriminator was trained on.
        result: from :func:`train_discriminator`.
        weight: factor of the gradient.

    Example:
        >>> from numpyro_score import MLP, VE, ScoreModel
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> net = MLP(1, width=8, depth=1)
        >>> data = 3 + jax.random.normal(jax.random.key(1), (200, 1))
        >>> key = jax.random.key(0)
        >>> result = train_discriminator(key, score, data, 200, net=net)
        >>> guided = discriminator_guidance(score, result)
        >>> x, t = jax.numpy.ones(1), 0.5
        >>> bool(guided.score(x, t) > score.score(x, t))  # towards the data
        True
    """
    check_kind("score", score, ScoreModel, "a ScoreModel")
    what = "a result of train_discriminator"
    check_kind("result", result, DiscriminatorResult, what)
    check_weight(weight)
    if not result.is_significant:
        return score
    denoiser = GradientDenoiser(score.denoiser, result.discriminator, weight)
    return replace(score, denoiser=denoiser)


@dataclass(frozen=True)
class _DiscriminatorProblem:
    """Mean logistic loss of noised data against noised draws."""

    sde: SDE

    def loss(
        self, params: Params, fixed: Discriminator, key: PRNGKey, batch: Batch
    ) -> Scalar:
        """Return the loss of a batch of pairs."""
        return _losses(replace(fixed, params=params), key, batch.x, self.sde).mean()


@cache  # one object per rate, so that training compiles once
def _adamw(learning_rate: float) -> optax.GradientTransformation:
    check_positive("learning_rate", learning_rate, "the rate of AdamW")
    return optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY)


@partial(jax.jit, static_argnames="sde")
def _losses(discriminator: Discriminator, key: PRNGKey, rows: Array, sde: SDE) -> Array:
    """Return the logistic loss of each pair of a data row and a draw."""
    key_level, key_noise = jax.random.split(key)
    levels = LogUniform().sample(key_level, len(rows), sde.sigma_min, sde.sigma_max)
    noise = jax.random.normal(key_noise, rows.shape, rows.dtype)
    x = add_noise(rows, levels, noise)
    logits = jax.vmap(jax.vmap(discriminator, (0, None)))(x, levels)
    signs = jnp.array([1.0, -1.0])
    return jax.nn.softplus(-signs * logits).mean(1)
