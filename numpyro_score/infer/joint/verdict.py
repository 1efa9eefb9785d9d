"""The verdict on a learned joint law, from held-out simulations.

Two conditional laws are judged as amortized posteriors are
(:mod:`numpyro_score.infer.amortized.fit_verdict`): latents given all observed numbers,
and observed numbers given all latents. Errors are those of standardized unconstrained
numbers. Other conditional laws are of the same net, but not judged.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from numpyro_score.infer.amortized.fit_verdict import (
    JOINT_DRAWS,
    FitVerdict,
    coordinate_names,
    joint_densities,
)
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.infer.joint.conditionals import judge_conditionals
from numpyro_score.infer.joint.layout import JointLayout
from numpyro_score.score.model import ScoreModel
from numpyro_score.typing import PRNGKey

Vectors = Float[np.ndarray, "rows size"]


def judge_joint(
    rng_key: PRNGKey,
    score: ScoreModel,
    layout: JointLayout,
    simulator: Simulator,
    simulations: Float[np.ndarray, "simulations size"],
    held_out: Vectors,
    observations: Float[np.ndarray, "rows _"],
) -> FitVerdict:
    """Return the verdict on a score of standardized vectors of all sites.

    Args:
        rng_key: random key.
        score: the score.
        layout: the sites.
        simulator: the model.
        simulations: vectors on which it was trained, for the regression on ranks.
        held_out: other vectors of the same law.
        observations: observed numbers of the latter, as simulated.
    """
    is_latent = np.arange(layout.size) < layout.latents.size
    names = (*coordinate_names(layout.latents), *(c.name for c in layout.columns))
    return judge_conditionals(
        rng_key,
        score,
        names,
        (is_latent, ~is_latent),
        simulations,
        held_out,
        layout.integers,
        lambda draws: _densities(simulator, layout, held_out, draws, observations),
    )


def _densities(
    simulator: Simulator,
    layout: JointLayout,
    held_out: Vectors,
    draws: Float[np.ndarray, "rows draws size"],
    observations: Float[np.ndarray, "rows _"],
) -> Float[np.ndarray, "rows points"] | None:
    """Return joint densities of latents and their draws; None if not tractable."""

    def latents(u: np.ndarray) -> np.ndarray:
        z = layout.scale.inverse(jnp.asarray(u))
        return np.asarray(z[..., : layout.latents.size])

    drawn = latents(draws[:, :JOINT_DRAWS])
    return joint_densities(simulator, latents(held_out), drawn, observations)
