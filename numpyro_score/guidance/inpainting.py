r"""Inpainting with resampling (Lugmayr et al. 2022, RePaint, algorithm 1).

At each step from :math:`\sigma` to :math:`\sigma'` the known numbers are drawn as
:math:`x_0 + \sigma' n` and the others by a reverse step; then noise is added up to
:math:`\sigma` and the step is repeated, which makes the two parts consistent.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.checks import (
    check_count,
    check_key,
    check_kind,
    check_shape,
    check_unmasked,
)
from numpyro_score.renamed_arguments import renamed
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import (
    Ancestral,
    Solver,
)
from numpyro_score.solver.base import draw_start, integrate_levels
from numpyro_score.solver.grid import check_times, default_times
from numpyro_score.typing import DenoiseFn, Position, PRNGKey, Real, Scalar


@dataclass(frozen=True)
class _Repaint(Solver):
    """Repeated ancestral steps in which known numbers are replaced."""

    known: Position
    mask: Bool[Array, "*event"]
    num_resamples: int

    def step(
        self,
        key: PRNGKey,
        x: Position,
        level: Scalar,
        level_next: Scalar,
        denoise: DenoiseFn,
        solver_state: tuple,
    ) -> tuple[Position, tuple]:
        def body(carry: tuple, key: PRNGKey) -> tuple[tuple, None]:
            x, _ = carry
            key_step, key_known, key_up = jax.random.split(key, 3)
            unknown, _ = Ancestral().step(key_step, x, level, level_next, denoise, ())
            noise = jax.random.normal(key_known, x.shape, x.dtype)
            x_next = jnp.where(self.mask, self.known + level_next * noise, unknown)
            noise = jax.random.normal(key_up, x.shape, x.dtype)
            x = x_next + jnp.sqrt(level**2 - level_next**2) * noise
            return (x, x_next), None

        keys = jax.random.split(key, self.num_resamples)
        (_, x_next), _ = jax.lax.scan(body, (x, x), keys)
        return x_next, solver_state


@renamed(key="rng_key")
def inpaint(
    rng_key: PRNGKey,
    score: ScoreModel,
    known: Real,
    mask: Bool[Array, "*event"],
    shape: tuple[int, ...] = (),
    *,
    ts: Float[Array, " ts"] | None = None,
    num_resamples: int = 10,
    context: Array | None = None,
) -> Real:
    """Return draws of points of which some numbers are known.

    For data with a support, ``known`` and the draws are data.

    Approximate: at high noise the known numbers influence the unknown ones only through
    resampling, and the weights of modes keep an error that falls with
    ``num_resamples``. For posterior draws with guarantees observe the known numbers in
    a NumPyro model. Takes ``num_resamples`` evaluations per step.

    Args:
        rng_key: random key.
        score: the law of whole points.
        known: one datum in physical units; numbers outside the mask are ignored.
        mask: True where a number is known.
        shape: batch shape of the draws.
        ts: decreasing times; None for 100 geometric steps.
        num_resamples: repetitions of each step; 1 is replacement without resampling.
        context: values that the score is conditioned on.

    Returns:
        Draws of shape ``shape + event_shape`` with the known numbers in place.

    Raises:
        TypeError: for a support that mixes the numbers of a datum, such as the simplex.
        ValueError: for shapes that are not the score's, known numbers outside of the
            support, or no resample.

    Example:
        >>> from numpyro_score import VE
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(2,)
        ... )
        >>> known, mask = jnp.array([1.5, 0.0]), jnp.array([True, False])
        >>> draws = inpaint(jax.random.key(0), score, known, mask, (4,))
        >>> draws[:, 0].tolist()
        [1.5, 1.5, 1.5, 1.5]
    """
    check_key("rng_key", rng_key)
    check_kind("score", score, ScoreModel, "a ScoreModel")
    if jnp.shape(known) != score.event_shape or jnp.shape(mask) != score.event_shape:
        raise ValueError(
            "`known` and `mask` must have the score's event shape: they tell which "
            f"numbers of one point are given. Got {jnp.shape(known)} and "
            f"{jnp.shape(mask)}, event shape {score.event_shape}."
        )
    check_unmasked("known", known)
    known, mask = jnp.asarray(known, float), jnp.asarray(mask)
    points = _unconstrain(score, known, mask)
    check_count("num_resamples", num_resamples, "how often each step is made")
    shape = check_shape("shape", shape)
    ts = default_times(score.sde, 100) if ts is None else jnp.asarray(ts)
    check_times(ts, score.sde)
    draws = _inpaint(
        jax.random.split(rng_key, prod(shape)),
        score,
        points,
        mask,
        ts,
        context,
        num_resamples=num_resamples,
    )
    draws = jnp.where(mask, known, score.constrain(draws))
    return draws.reshape(*shape, *score.event_shape)


def _unconstrain(score: ScoreModel, known: Array, mask: Array) -> Array:
    """Return the known numbers in unconstrained space.

    Raises:
        TypeError: for a support that mixes numbers.
        ValueError: for known numbers outside of the support.
    """
    if score.support is None:
        return known
    score.support.check_single_numbers("`score` must have")
    filled = jnp.where(mask, known, score.constrain(jnp.zeros(score.event_shape)))
    score.support.check(filled[None], "known")
    return score.unconstrain(filled)


@partial(jax.jit, static_argnames="num_resamples")
def _inpaint(
    keys: PRNGKey,
    score: ScoreModel,
    known: Array,
    mask: Array,
    ts: Array,
    context: Any,
    *,
    num_resamples: int,
) -> Array:
    """Return draws for all keys."""
    levels = score.sde.noise_level(ts)
    keys = jax.vmap(jax.random.split)(keys)
    noise = jax.vmap(lambda key: draw_start(key, score.event_shape, levels[0]))
    start = score.start_center(levels[0], context) + noise(keys[:, 0])
    solver = _Repaint(score.standardize.forward(known), mask, num_resamples)
    x = integrate_levels(
        keys[:, 1],
        lambda x, level: score.denoise_standardized(x, level, context),
        start,
        levels,
        solver,
    )
    return jax.vmap(score.standardize.inverse)(score.sde.alpha(ts[-1]) * x)
