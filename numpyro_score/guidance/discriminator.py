r"""Discriminator guidance: repair a score by what tells its draws from data.

A discriminator of noised data (label 1) against noised draws (label 0) that is optimal
at every noise level has the logit :math:`\log p_{data} / p_{model}`, so its gradient is
what the score lacks (Kim et al. 2023, eq. 8):

.. math:: s + \nabla \log \frac{d}{1 - d} = s + \nabla\, \mathrm{logit} .
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from numpyro_score.guidance.classifier import GradientDenoiser
from numpyro_score.loss.noise_levels import LogUniform
from numpyro_score.nn import MLP
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE
from numpyro_score.typing import Position, PRNGKey, Scalar

DECAY = 1e-3  # weight decay: the gradient of an over-trained logit is noise


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Discriminator:
    """A net whose first output is the logit of data against draws, at a noise level."""

    params: Any
    graphdef: nnx.GraphDef = field(metadata={"static": True})

    def __call__(self, x: Position, level: Scalar) -> Scalar:
        """Return the logit at a standardized point x_0 + level n."""
        net = nnx.merge(self.graphdef, self.params)
        scaled = x / jnp.sqrt(1 + jnp.square(level))
        return jnp.ravel(net(scaled, jnp.log(level) / 4, None))[0]


class DiscriminatorResult(NamedTuple):
    """What :func:`train_discriminator` returns.

    - **discriminator**: the net with the lowest held-out loss of the run.
    - **advantage**: log 2 minus its held-out loss, in nats; 0 for a coin.
    - **standard_error**: of the advantage.
    - **losses**: training losses.
    """

    discriminator: Discriminator
    advantage: Float[Array, ""]
    standard_error: Float[Array, ""]
    losses: Float[Array, " steps"]


def train_discriminator(
    key: PRNGKey,
    score: ScoreModel,
    data: Float[Array, "rows *event"],
    num_steps: int = 2000,
    *,
    net: Callable | None = None,
    draws: Float[Array, "draws *event"] | None = None,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
) -> DiscriminatorResult:
    """Train a net to tell noised data from noised draws of a score.

    A fifth of the rows and draws is held out; every twentieth of the run the held-out
    loss is taken and the best net kept, since an over-trained discriminator harms.

    Args:
        key: random key.
        score: the score to repair.
        data: rows of the law, in physical units; not more trustworthy than these.
        num_steps: number of steps.
        net: a configuration such as :class:`~numpyro_score.nn.MLP`; None for a small
            MLP.
        draws: as many draws of the score as data; None to draw them here.
        batch_size: rows of data, and of draws, per step.
        learning_rate: rate of AdamW.

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
    key_draws, key_net, key_order, key_run = jax.random.split(key, 4)
    if draws is None:
        draws = score.sample(key_draws, (len(data),))
    size = min(len(data), len(draws))
    forward = jax.vmap(score.standardize.forward)
    rows = jnp.stack([forward(jnp.asarray(data)[:size]), forward(draws[:size])], axis=1)
    rows = jax.random.permutation(key_order, rows)
    held_out, rows = rows[: size // 5], rows[size // 5 :]
    net = MLP(prod(score.event_shape), width=64, depth=2) if net is None else net
    graphdef, params = nnx.split(net(rngs=nnx.Rngs(key_net)))
    best, losses, held = _train(
        key_run,
        Discriminator(params, graphdef),
        rows,
        held_out,
        learning_rate,
        sde=score.sde,
        num_steps=num_steps,
        batch_size=min(batch_size, len(rows)),
    )
    advantage = jnp.log(2.0) - held.mean()
    error = held.std() / jnp.sqrt(len(held))
    return DiscriminatorResult(best, advantage, error, losses)


def discriminator_guidance(
    score: ScoreModel, result: DiscriminatorResult, *, weight: Scalar = 1.0
) -> ScoreModel:
    """Return the score plus the gradient of the discriminator's logit.

    Helps a score that is under-trained, and can harm one that is not: if the
    discriminator does no better than a coin on held-out rows, by two standard errors,
    the score is returned as it is. Check the guided draws all the same.

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
    if float(result.advantage) < 2 * float(result.standard_error):
        return score
    denoiser = GradientDenoiser(score.denoiser, result.discriminator, weight)
    return replace(score, denoiser=denoiser)


def _losses(discriminator: Discriminator, key: PRNGKey, rows: Array, sde: SDE) -> Array:
    """Return the logistic loss of each pair of a data row and a draw."""
    key_level, key_noise = jax.random.split(key)
    levels = LogUniform().sample(key_level, len(rows), sde.sigma_min, sde.sigma_max)
    noise = jax.random.normal(key_noise, rows.shape, rows.dtype)
    x = rows + levels.reshape(-1, *([1] * (rows.ndim - 1))) * noise
    logits = jax.vmap(jax.vmap(discriminator, (0, None)))(x, levels)
    signs = jnp.array([1.0, -1.0])
    return jax.nn.softplus(-signs * logits).mean(1)


@partial(jax.jit, static_argnames=("sde", "num_steps", "batch_size"))
def _train(
    key: PRNGKey,
    start: Discriminator,
    rows: Array,
    held_out: Array,
    learning_rate: Scalar,
    *,
    sde: SDE,
    num_steps: int,
    batch_size: int,
) -> tuple[Discriminator, Array, Array]:
    """Take all steps; return the best net, its training losses and held-out losses."""
    optimizer = optax.adamw(learning_rate, weight_decay=DECAY)
    every = max(num_steps // 20, 1)
    key, key_held = jax.random.split(key)

    def update(carry: tuple, key: PRNGKey) -> tuple[tuple, Array]:
        now, state = carry
        key_rows, key_loss = jax.random.split(key)
        batch = rows[jax.random.randint(key_rows, (batch_size,), 0, len(rows))]
        loss_fn = lambda d: _losses(d, key_loss, batch, sde).mean()  # noqa: E731
        loss, grads = jax.value_and_grad(loss_fn)(now)
        updates, state = optimizer.update(grads, state, now)
        return (optax.apply_updates(now, updates), state), loss

    def block(carry: tuple, key: PRNGKey) -> tuple[tuple, Array]:
        (now, state), best, best_held = carry
        (now, state), losses = jax.lax.scan(
            update, (now, state), jax.random.split(key, every)
        )
        held = _losses(now, key_held, held_out, sde)
        better = held.mean() < best_held.mean()
        best = jax.tree.map(partial(jnp.where, better), now, best)
        return ((now, state), best, jnp.where(better, held, best_held)), losses

    held = _losses(start, key_held, held_out, sde)
    carry = ((start, optimizer.init(start)), start, held)
    keys = jax.random.split(key, max(num_steps // every, 1))
    (_, best, held), losses = jax.lax.scan(block, carry, keys)
    return best, losses.ravel(), held
