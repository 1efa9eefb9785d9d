"""Compiled programs from random keys to draws of all latent sites."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool
from numpyro.diagnostics import print_summary

from numpyro_score.checks import check_summary, is_traced
from numpyro_score.model.latents import LatentLayout
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import Geometric, Solver
from numpyro_score.solver import sample as run_solver
from numpyro_score.typing import PRNGKey

DRAW_BATCH_SIZE = 4096  # draws vmapped at a time given many observations; bounds memory


@dataclass(frozen=True)
class SamplingSettings:
    """Static settings of all draws of a posterior.

    Args:
        latents: layout of the latent sites.
        solver: solver of all draws.
        num_steps: steps of the solver, geometric in the noise level.
    """

    latents: LatentLayout
    solver: Solver
    num_steps: int


class PosteriorGivenData:
    """Methods that posteriors given an observation have in common."""

    measured = ""  # what measures the error of the net, for the summary

    def print_summary(
        self: Any,
        rng_key: PRNGKey,
        observation: Any,
        num_samples: int = 1000,
        prob: float = 0.9,
    ) -> None:
        """Print a summary of draws given one observation.

        Args:
            rng_key: random key.
            observation: observed value, as in ``sample``.
            num_samples: number of draws.
            prob: probability mass of the intervals.

        Raises:
            ValueError: for fewer than four draws, and as ``sample``.
        """
        check_summary(num_samples, prob)
        draws = self.sample(rng_key, observation, num_samples)
        print_summary(draws, prob=prob, group_by_chain=False)
        _, given = self.model_of(observation)
        observed = ", ".join(
            f"{name} of shape {jnp.shape(value)}" for name, value in given.items()
        )
        print(
            f"Given {observed}: {num_samples} independent draws, approximate by the "
            f"error of the net{self.measured}."
        )

    def model_of(self: Any, observation: Any) -> tuple[Callable, dict[str, Array]]:
        """Return the model, and observed values by site.

        Args:
            observation: observed value, as in ``sample``.

        Raises:
            ValueError: as ``sample``.
        """
        observed = self.simulator.observed
        return self.simulator.model, observed.unflatten(observed.parse(observation))


@partial(jax.jit, static_argnames=("settings", "num_samples"))
def draw(
    score: ScoreModel,
    key: PRNGKey,
    context: Array | None,
    *,
    settings: SamplingSettings,
    num_samples: int,
) -> tuple[dict[str, Array], Bool[Array, ""]]:
    """Return draws of all sites given one context, and whether they are finite."""
    ts = Geometric()(score.sde, settings.num_steps)
    solver, shape = settings.solver, (num_samples,)
    z = run_solver(key, score, shape, solver=solver, ts=ts, context=context)
    return settings.latents.unflatten(z), jnp.isfinite(z).all()


@partial(jax.jit, static_argnames=("settings", "num_samples"))
def draw_each(
    score: ScoreModel,
    keys: PRNGKey,
    contexts: Array,
    *,
    settings: SamplingSettings,
    num_samples: int,
) -> tuple[dict[str, Array], Bool[Array, ""]]:
    """Return draws for each row of contexts, in batches of rows."""

    def one(row: tuple[PRNGKey, Array]) -> tuple[dict[str, Array], Array]:
        return draw(score, *row, settings=settings, num_samples=num_samples)

    rows_at_once = max(1, DRAW_BATCH_SIZE // num_samples)
    draws, finite = jax.lax.map(one, (keys, contexts), batch_size=rows_at_once)
    return draws, finite.all()


def map_in_batches(fn: Callable, rows: Any, batch_size: int) -> Any:
    """Return ``fn`` of every row, vmapped over batches; memory is that of one batch.

    The last batch is filled up with copies of the last row, so that the function is
    compiled once, unlike by ``jax.lax.map``.

    Example:
        >>> map_in_batches(jnp.square, jnp.arange(5), 2).tolist()
        [0, 1, 4, 9, 16]
    """
    count = len(jax.tree.leaves(rows)[0])
    if count <= batch_size:
        return jax.vmap(fn)(rows)
    num_batches = -(-count // batch_size)
    index = jnp.minimum(jnp.arange(num_batches * batch_size), count - 1)
    index = index.reshape(num_batches, batch_size)

    def batch(index: Array) -> Any:
        return jax.vmap(fn)(jax.tree.map(lambda part: part[index], rows))

    out = jax.lax.map(batch, index)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[:count], out)


def check_finite(finite: Array) -> None:
    """Raise unless draws are finite; do nothing for traced values.

    Raises:
        FloatingPointError: if ``finite`` is False.
    """
    if not is_traced(finite) and not finite:
        raise FloatingPointError(
            "The draws are not finite: the score returned NaN or inf. The observation "
            "may be far from every simulation; compare it with draws of the prior "
            "predictive."
        )
