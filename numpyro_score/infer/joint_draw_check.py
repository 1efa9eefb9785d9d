r"""Check of draws of a conditional law, by the exact score of the model at them.

The draws of unknown numbers u given known ones k have the score
:math:`\nabla_u \log p(u, k)`, a part of the gradient of the model's joint density. They
are judged as those of a posterior are
(:mod:`~numpyro_score.infer.amortized.draw_check`). Judged are latents, and observed
numbers whose support are the real numbers, given the others as they were drawn.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.infer.amortized.draw_check import (
    describe_errors,
    jumps_near,
    num_judged,
)
from numpyro_score.infer.amortized.fit_verdict import coordinate_names
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.infer.joint_layout import JointLayout


def warn_of_wrong_conditional(
    simulator: Simulator,
    layout: JointLayout,
    draws: dict[str, Array],
    known: Bool[np.ndarray, " size"],
) -> None:
    """Warn of draws of a conditional law that the score of the model shows to be wrong.

    Models without a tractable joint density, or with one that jumps, are not judged;
    nor are fewer than 64 draws.

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
    context = jax.vmap(layout.observed.flatten)(draws)
    rows = np.concatenate([z, np.reshape(context, (count, -1))], axis=1)
    scores = np.asarray(_joint_scores(simulator, z, context))
    names = (*coordinate_names(layout.latents), *(c.name for c in layout.columns))
    chosen = [name for name, flag in zip(names, judged, strict=True) if flag]
    found = describe_errors(chosen, rows[:, judged], scores[:, judged])
    if found and not jumps_near(simulator, np.asarray(z), np.asarray(context)):
        warn_caller(
            "Given these values the draws are not those of the conditional law, by the "
            "exact score of the model at them (in unconstrained space, in sd of that "
            f"law): {found}. Learn from more simulations or with a larger net, or use "
            "MCMC on the model. `learn_joint(check=False)` silences this."
        )


@partial(jax.jit, static_argnums=0)
def _joint_scores(
    simulator: Simulator,
    z: Float[Array, "rows latent"],
    context: Float[Array, "rows ..."],
) -> Float[Array, "rows size"]:
    """Return the gradient of log p(z, y) in both at every row."""

    def one(z: Array, context: Array) -> Array:
        parts = jax.grad(simulator.log_joint, argnums=(0, 1))(z, context)
        return jnp.concatenate([jnp.ravel(part) for part in parts])

    return jax.vmap(one)(z, context)
