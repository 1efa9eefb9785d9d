r"""Check of draws of a hierarchical posterior, by the exact score of the model at them.

For groups that are independent given the shared latents :math:`\phi` the score is a sum
of scores of single groups,

.. math:: \nabla_\phi \log p(\phi, z, y) = (1 - J) \nabla_\phi \log p(\phi)
          + \sum_j \nabla_\phi \log p(\phi, z_j, y_j) .

Stein's identities (:mod:`~numpyro_score.infer.amortized.draw_check`) hold for
:math:`\phi` and for every :math:`z_j` by themselves. If draws of z given
:math:`\phi` are right, those for :math:`\phi` test its own law, whatever the number
of groups; those for :math:`z_j` test its law given :math:`\phi`, and come first.
"""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.infer.amortized.discontinuity import is_discontinuous_near
from numpyro_score.infer.amortized.draw_check import (
    describe_errors,
    num_judged,
)
from numpyro_score.infer.amortized.fit_verdict import coordinate_names
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.model.latents import LatentLayout

MAX_SCORES = 1_000_000  # of one draw and one group
MAX_GROUPS = 100  # whose local draws are judged, evenly spaced
NAMED = 3  # groups in one warning

Draws = Float[np.ndarray, "draws size"]
GroupDraws = Float[np.ndarray, "groups draws local"]


@lru_cache(maxsize=32)  # programs are compiled for a simulator, not for equal ones
def group_simulator_of(shared: Simulator, local: Simulator | None) -> Simulator:
    """Return the simulator of all latents of one group, the shared ones first.

    Args:
        shared: simulator of the shared latents.
        local: simulator of the local latents given the others; None for none.
    """
    if local is None:
        return shared
    sites = (*shared.latents.sites, *local.latents.sites)
    names = {site.name for site in sites}
    return replace(
        shared,
        latents=LatentLayout(sites),
        nuisance=tuple(name for name in shared.nuisance if name not in names),
        intractable=local.intractable,
    )


def num_judged_groups(group: Simulator, num_draws: int, num_groups: int) -> int:
    """Return how many draws are judged; 0 for too few, or an intractable model.

    Args:
        group: simulator of all latents of one group.
        num_draws: number of draws.
        num_groups: number of groups.
    """
    if group.intractable:
        return 0
    return num_judged(min(num_draws, MAX_SCORES // num_groups), group.latents.size)


def warn_of_wrong_groups(
    shared: Simulator,
    local: Simulator | None,
    z: Draws,
    z_local: GroupDraws,
    contexts: Float[Array, "groups ..."],
) -> None:
    """Warn of draws that the score of the model shows to be wrong.

    Models without a tractable density, or with one that jumps, are not judged; nor are
    fewer than 64 draws, nor more than 15,000 groups.

    Args:
        shared: simulator of the shared latents.
        local: simulator of the local latents given the others; None for none.
        z: draws of the shared latents, in unconstrained space.
        z_local: those of the local ones.
        contexts: the observation, one group per row.
    """
    group = group_simulator_of(shared, local)
    count = num_judged_groups(group, len(z), len(contexts))
    if count == 0:
        return
    z, z_local = z[:count], z_local[:, :count]
    scores = np.asarray(_group_scores(group, z, z_local, contexts), float)
    size = z.shape[1]
    prior = np.asarray(shared.prior_score(z), float)
    total = scores[..., :size].sum(0) - (len(contexts) - 1) * prior
    # wrong local draws would show as an error of the shared ones
    texts = [] if local is None else _wrong_groups(local, z_local, scores[..., size:])
    if not texts:
        found = describe_errors(coordinate_names(shared.latents), z, total)
        texts = [found] * bool(found)
    if texts and not _jumps(group, z, z_local, contexts):
        warn_caller(
            "Given these groups the draws are not those of the posterior, by the exact "
            "score of the model at them (in unconstrained space, in posterior sd): "
            f"{'; '.join(texts)}. Simulate more, train for longer or give a larger "
            "`net`, or compare with MCMC from such draws. `fit(check=False)` silences "
            "this."
        )


def _wrong_groups(local: Simulator, z: GroupDraws, scores: GroupDraws) -> list[str]:
    """Return in words which local draws are wrong given the shared ones."""
    names = coordinate_names(local.latents)
    if len(names) == len(local.latents.sites):  # one number each: leave out its index
        names = local.latents.names
    texts = []
    for j in np.linspace(0, len(z) - 1, min(len(z), MAX_GROUPS)).astype(int):
        if found := describe_errors(names, z[j], scores[j]):
            texts.append(f"in group {j}, given the shared sites, {found}")
    rest = len(texts) - NAMED
    return texts[:NAMED] + [f"and in {rest} more groups"] * (rest > 0)


def _jumps(group: Simulator, z: Draws, z_local: GroupDraws, contexts: Array) -> bool:
    """Return whether the density of one group jumps near the draws."""
    place = np.arange(len(z)) % len(contexts)
    rows = np.concatenate([z, z_local[place, np.arange(len(z))]], axis=1)
    return is_discontinuous_near(group, rows, np.asarray(contexts)[place])


@partial(jax.jit, static_argnums=0)
def _group_scores(
    group: Simulator, z: Array, z_local: Array, contexts: Array
) -> Float[Array, "groups draws size"]:
    """Return the gradient of log p(phi, z_j, y_j) for every group and draw."""

    def one(row: tuple[Array, Array]) -> Array:
        context, local = row
        both = jnp.concatenate([z, local], axis=1)
        return jax.vmap(lambda z: jax.grad(group.log_joint)(z, context))(both)

    return jax.lax.map(one, (contexts, z_local))
