r"""Check of draws of a hierarchical posterior, by the exact density of the model.

For groups that are independent given the shared latents :math:`\phi` the density is a
product over single groups,

.. math:: \log p(\phi, z, y) = (1 - J) \log p(\phi) + \sum_j \log p(\phi, z_j, y_j) .

Stein's identities and exact MCMC steps, the checks of
:mod:`~numpyro_score.infer.amortized.draw_check`, hold for :math:`\phi` given the
:math:`z_j`, and for every :math:`z_j` given :math:`\phi`. If draws of z given
:math:`\phi` are right, those for :math:`\phi` test its own law, whatever the number
of groups; those for :math:`z_j` test its law given :math:`\phi`, and come first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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
from numpyro_score.model.latents import LatentLayout
from numpyro_score.typing import Scalar

MAX_SCORES = 1_000_000  # of one draw and one group; more: finer, slower; not tuned
# of these in one MCMC step of the shared latents, but 256 draws at least, whose sd is
# within 1 / 512^1/2 = 4 %
MAX_STEP_SCORES, MIN_MOVED = 100_000, 256
# judged, evenly spaced: if 3 % are wrong, one is among them by 1 - .97^100 = 95 %
MAX_GROUPS = 100
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
    """Warn of draws that the density of the model shows to be wrong.

    Models without a tractable density are not judged; nor are fewer than 64 draws, nor
    more than 15,000 groups.

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
    draws = _JudgedDraws(shared, group, z[:count], z_local[:, :count], contexts)
    # wrong local draws would show as an error of the shared ones
    texts = [] if local is None else _wrong_groups(local, draws)
    if not texts:
        names = coordinate_names(shared.latents)
        found = find_errors(names, draws.z, draws.shared_density)
        texts = [found] * bool(found)
    if texts:
        warn_caller(
            "Given these groups the draws are not those of the posterior, by the exact "
            "density of the model at them (in unconstrained space, in posterior sd): "
            f"{'; '.join(texts)}. Simulate more, train for longer or give a larger "
            "`net`, or compare with MCMC from such draws. `fit(check=False)` silences "
            "this."
        )


@dataclass(frozen=True)
class _JudgedDraws:
    """Draws of all latents, and the density of the posterior at them."""

    shared: Simulator
    group: Simulator
    z: Draws
    z_local: GroupDraws
    contexts: Float[Array, "groups ..."]

    @cached_property
    def of_groups(self) -> tuple[np.ndarray, np.ndarray]:
        """Log p(phi, z_j, y_j) and its gradient, for every group and draw."""
        values, scores = _group_densities(
            self.group, self.z, self.z_local, self.contexts
        )
        return np.asarray(values, float), np.asarray(scores, float)

    @property
    def shared_density(self) -> ExactDensity:
        """Density of the shared latents given the local ones."""
        values, scores = self.of_groups
        prior, prior_score = self.shared.prior_density(self.z)
        rest = len(values) - 1
        score = scores[..., : self.z.shape[1]].sum(0) - rest * prior_score
        value = values.sum(0) - rest * prior
        size = self.z.shape[1] + len(values) * self.z_local.shape[2]
        num_moved = max(MIN_MOVED, MAX_STEP_SCORES // len(values))
        density = self._density(value, score, self._move_shared, size)
        return density._replace(num_moved=min(density.num_moved, num_moved))

    def local_density(self, j: int) -> ExactDensity:
        """Density of the latents of group j given the shared ones."""
        values, scores = self.of_groups
        size = self.z.shape[1]
        move = partial(self._move_local, j)
        return self._density(values[j], scores[j, :, size:], move, scores.shape[2])

    def _density(
        self, values: np.ndarray, score: np.ndarray, move: Callable, size: int
    ) -> ExactDensity:
        return ExactDensity(
            values,
            score,
            is_discontinuous(self.group),
            lambda: self._is_discontinuous_near,
            move,
            size,
        )

    @cached_property
    def _is_discontinuous_near(self) -> bool:
        """True where the density of one group is discontinuous near the draws."""
        place = np.arange(len(self.z)) % len(self.contexts)
        local = self.z_local[place, np.arange(len(self.z))]
        rows = np.concatenate([self.z, local], axis=1)
        return is_discontinuous_near(self.group, rows, np.asarray(self.contexts)[place])

    def _move_shared(self, z: Draws, root: np.ndarray) -> Array:
        local = jnp.swapaxes(self.z_local[:, : len(z)], 0, 1)
        return _moved_shared(self.shared, self.group, z, root, local, self.contexts)

    def _move_local(self, j: int, z: Draws, root: np.ndarray) -> Array:
        shared = self.z[: len(z)]
        return _moved_local(self.group, z, root, shared, self.contexts[j])


def _wrong_groups(local: Simulator, draws: _JudgedDraws) -> list[str]:
    """Return in words which local draws are wrong given the shared ones."""
    names = coordinate_names(local.latents)
    if len(names) == len(local.latents.sites):  # one number each: leave out its index
        names = local.latents.names
    texts, num_groups = [], len(draws.z_local)
    judged = np.linspace(0, num_groups - 1, min(num_groups, MAX_GROUPS)).astype(int)
    for j in judged.tolist():
        if found := find_errors(names, draws.z_local[j], draws.local_density(j)):
            texts.append(f"in group {j}, given the shared sites, {found}")
    rest = len(texts) - NAMED
    return texts[:NAMED] + [f"and in {rest} more groups"] * (rest > 0)


@partial(jax.jit, static_argnums=0)
def _group_densities(
    group: Simulator, z: Array, z_local: Array, contexts: Array
) -> tuple[Float[Array, "groups draws"], Float[Array, "groups draws size"]]:
    """Return log p(phi, z_j, y_j) and its gradient for every group and draw."""

    def one(row: tuple[Array, Array]) -> tuple[Array, Array]:
        context, local = row
        both = jnp.concatenate([z, local], axis=1)
        return jax.vmap(lambda z: jax.value_and_grad(group.log_joint)(z, context))(both)

    return jax.lax.map(one, (contexts, z_local))


@partial(jax.jit, static_argnums=(0, 1))
def _moved_shared(
    shared: Simulator,
    group: Simulator,
    z: Array,
    root: Array,
    z_local: Float[Array, "draws groups local"],
    contexts: Array,
) -> Float[Array, "draws size"]:
    """Return where MCMC steps take the shared latents of every draw."""

    def log_density(z: Array, local: Array) -> Scalar:
        def one(local: Array, context: Array) -> Scalar:
            return group.log_joint(jnp.concatenate([z, local]), context)

        rest = (len(contexts) - 1) * shared.log_prior(z)
        return jnp.sum(jax.vmap(one)(local, contexts)) - rest

    return barker_moves(log_density, jax.random.key(0), jnp.asarray(z), root, z_local)


@partial(jax.jit, static_argnums=0)
def _moved_local(
    group: Simulator, z: Array, root: Array, shared: Array, context: Array
) -> Float[Array, "draws local"]:
    """Return where MCMC steps take the latents of one group of every draw."""

    def log_density(z: Array, shared: Array) -> Scalar:
        return group.log_joint(jnp.concatenate([shared, z]), context)

    return barker_moves(log_density, jax.random.key(0), jnp.asarray(z), root, shared)
