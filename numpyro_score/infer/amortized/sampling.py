"""From keys to draws of all sites, in one compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from numpyro_score.infer.amortized.layout import LatentLayout
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import Geometric, Solver
from numpyro_score.solver import sample as run_solver
from numpyro_score.typing import PRNGKey

DRAW_BATCH_SIZE = (
    4096  # for many observations: about as many draws are made side by side
)


@partial(jax.jit, static_argnames=("latents", "solver", "num_steps", "num_samples"))
def draw(
    score: ScoreModel,
    key: PRNGKey,
    context: Array | None,
    *,
    latents: LatentLayout,
    solver: Solver,
    num_steps: int,
    num_samples: int,
) -> tuple[dict[str, Array], Bool[Array, ""]]:
    """Go from keys to values of all sites, and say whether they are finite."""
    ts = Geometric()(score.sde, num_steps)
    z = run_solver(key, score, (num_samples,), solver=solver, ts=ts, context=context)
    return latents.unflatten(z), jnp.isfinite(z).all()


@partial(jax.jit, static_argnames=("latents", "solver", "num_steps", "num_samples"))
def draw_each(
    score: ScoreModel,
    keys: PRNGKey,
    contexts: Array,
    *,
    latents: LatentLayout,
    solver: Solver,
    num_steps: int,
    num_samples: int,
) -> tuple[dict[str, Array], Bool[Array, ""]]:
    """The same for each row of contexts, a few rows at a time."""

    def one(row: tuple[PRNGKey, Array]) -> tuple[dict[str, Array], Array]:
        return draw(
            score,
            *row,
            latents=latents,
            solver=solver,
            num_steps=num_steps,
            num_samples=num_samples,
        )

    rows_at_once = max(1, DRAW_BATCH_SIZE // num_samples)
    draws, finite = jax.lax.map(one, (keys, contexts), batch_size=rows_at_once)
    return draws, finite.all()


def check_finite(finite: Array) -> None:
    """Raise unless draws are finite.

    Raises:
        FloatingPointError: if they are not.
    """
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise FloatingPointError(
            "The draws are not finite: the score returned NaN or inf. The observation "
            "may be far from every simulation; compare it with draws of the prior "
            "predictive."
        )
