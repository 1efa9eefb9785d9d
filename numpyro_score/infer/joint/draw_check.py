r"""Check of draws of a conditional law, by the exact density of the model.

The draws of unknown numbers u given known ones k have the score
:math:`\nabla_u \log p(u, k)`, a part of the gradient of the model's joint density. They
are judged as those of a posterior are
(:mod:`~numpyro_score.infer.amortized.draw_check`). Judged are latents, and observed
numbers whose support are the real numbers, given the others as they were drawn.
"""

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.infer.amortized.discontinuity import (
    is_discontinuous,
    is_discontinuous_near,
)
from numpyro_score.infer.amortized.draw_check import (
    ExactDensity,
    find_errors,
    num_judged,
)
from numpyro_score.infer.amortized.fit_verdict import coordinate_names
from numpyro_score.infer.amortized.mcmc_check import barker_moves
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.infer.joint.layout import JointLayout
from numpyro_score.typing import Scalar


def warn_of_wrong_conditional(
    simulator: Simulator,
    layout: JointLayout,
    draws: dict[str, Array],
    known: Bool[np.ndarray, " size"],
) -> None:
    """Warn of draws of a conditional law that the model's density shows to be wrong.

    Models without a tractable joint density are not judged, nor fewer than 64 draws.

    Args:
        simulator: the model.
        layout: its sites.
        draws: values of every site.
        known: which of the numbers of the layout were given.
    """
    judged = ~known & np.array(
        [True] * layout.latents.size
        + [
            not c.is_integer and c.low == -np.inf and c.high == np.inf
            for c in layout.columns
        ]
    )
    count = num_judged(len(draws[layout.sites[0].name]), int(judged.sum()))
    if simulator.intractable or not judged.any() or count == 0:
        return
    draws = {name: value[:count] for name, value in draws.items()}
    z = layout.latents.flatten({name: draws[name] for name in layout.latents.names})
    context = np.asarray(jax.vmap(layout.observed.flatten)(draws))
    rows = np.concatenate([z, np.reshape(context, (count, -1))], axis=1)
    values, scores = map(np.asarray, _densities(simulator, context.shape[1:], rows))
    density = ExactDensity(
        values,
        scores[:, judged],
        is_discontinuous(simulator),
        partial(is_discontinuous_near, simulator, np.asarray(z), context),
        partial(_moved, simulator, context.shape[1:], np.flatnonzero(judged), rows),
        int(np.sum(judged)),
    )
    names = (*coordinate_names(layout.latents), *(c.name for c in layout.columns))
    chosen = [name for name, flag in zip(names, judged, strict=True) if flag]
    if found := find_errors(chosen, rows[:, judged], density):
        warn_caller(
            "Given these values the draws are not those of the conditional law, by the "
            "exact density of the model at them (in unconstrained space, in sd of that "
            f"law): {found}. Learn from more simulations or with a larger net, or use "
            "MCMC on the model. `learn_joint(check=False)` silences this."
        )


def _log_density(simulator: Simulator, shape: tuple[int, ...], row: Array) -> Scalar:
    """Return log p(z, y) for both in one row."""
    size = simulator.latents.size
    return simulator.log_joint(row[:size], row[size:].reshape(shape))


@partial(jax.jit, static_argnums=(0, 1))
def _densities(
    simulator: Simulator, shape: tuple[int, ...], rows: Float[Array, "rows size"]
) -> tuple[Float[Array, " rows"], Float[Array, "rows size"]]:
    """Return log p(z, y) and its gradient in both at every row."""
    return jax.vmap(jax.value_and_grad(partial(_log_density, simulator, shape)))(rows)


@partial(jax.jit, static_argnums=(0, 1))
def _moved(
    simulator: Simulator,
    shape: tuple[int, ...],
    judged: Int[Array, " judged"],
    rows: Float[Array, "rows size"],
    points: Float[Array, "points judged"],
    root: Float[Array, "judged judged"],
) -> Float[Array, "points judged"]:
    """Return where MCMC steps take the judged numbers of the first rows."""

    def log_density(point: Array, row: Array) -> Scalar:
        return _log_density(simulator, shape, row.at[judged].set(point))

    key = jax.random.key(0)  # fixed: one set of draws has one verdict
    return barker_moves(log_density, key, points, root, rows[: len(points)])
