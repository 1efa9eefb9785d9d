r"""Check of draws of a hierarchical posterior, by the exact density of the model.

For groups that are independent given the shared latents :math:`\phi` the density is a
product over single groups,

.. math:: \log p(\phi, z, y) = (1 - J) \log p(\phi) + \sum_j \log p(\phi, z_j, y_j) .

Stein's identities and exact MCMC steps, the checks of
:mod:`~numpyro_score.infer.amortized.draw_check`, hold for :math:`\phi` given the
:math:`z_j`, and for every :math:`z_j` given :math:`\phi`. If draws of z given
:math:`\phi` are right, those for :math:`\phi` test its own law, whatever the number
of groups; those for :math:`z_j` test its law given :math:`\phi`, and come first.

Steps of :math:`\phi` at fixed :math:`z_j` see a share 1 - B of an error of
:math:`\phi`, with B the share of the information on :math:`\phi` that is missing
without the :math:`z_j` (the rate of Gibbs sampling and of EM: Sahu and Roberts 1999).
Of groups that say little of their :math:`z_j` that is a small part. Therefore the
:math:`z_j` are moved between, as often as B asks for, in an order that is the same
backwards, which leaves the whole reversible.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from math import ceil, log
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.linalg import eigh

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.data.rows import evenly_spaced
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
from numpyro_score.infer.amortized.mcmc_check import (
    barker_moves,
    is_collapsed,
    scale_root,
)
from numpyro_score.infer.amortized.simulator import Simulator, finite_rows
from numpyro_score.model.latents import LatentLayout
from numpyro_score.typing import PRNGKey, Scalar

MAX_SCORES = 1_000_000  # of one draw and one group; more: finer, slower; not tuned
# of these in one MCMC step of the shared latents, but 256 draws at least, whose sd is
# within 1 / 512^1/2 = 4 %
MAX_STEP_SCORES, MIN_MOVED = 100_000, 256
# judged, evenly spaced: if 3 % are wrong, one is among them by 1 - .97^100 = 95 %
MAX_GROUPS = 100
NAMED = 3  # groups in one warning
# of an error that is left unseen by steps of the shared latents; lower: slower
MAX_UNSEEN = 0.1
MAX_SWEEPS = 8  # for this, which cost as many steps of all groups; not tuned

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

    @cached_property
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
        moved, local = jnp.asarray(z), jnp.asarray(self.z_local[:, : len(z)])
        sweeps = self._num_sweeps(len(z))
        roots: Any = sweeps > 1 and np.stack([*map(scale_root, self.z_local)])
        keys = jax.random.split(jax.random.key(0), (sweeps, 2))
        for sweep, (key, key_local) in enumerate(keys):
            if sweep:
                local = _moved_groups(
                    self.group, key_local, local, roots, moved, self.contexts
                )
            moved = _moved_shared(
                self.shared, self.group, key, moved, root, local, self.contexts
            )
        return moved

    def _num_sweeps(self, count: int) -> int:
        """Return how often ``count`` draws are moved, so that errors are seen."""
        has_local = self.z_local.shape[2] > 0
        if not has_local or len(self.z_local) * count > MAX_STEP_SCORES:
            return 1
        if any(map(is_collapsed, self.z_local)):
            return 1
        score = self.shared_density.scores
        good = finite_rows(self.z, score)
        missing = missing_share(self.z[good], score[good])
        return num_sweeps(missing)

    def _move_local(self, j: int, z: Draws, root: np.ndarray) -> Array:
        shared = self.z[: len(z)]
        key = jax.random.key(0)  # the same draws are judged alike
        return _moved_local(self.group, key, z, root, shared, self.contexts[j])


def num_sweeps(missing: float) -> int:
    """Return after how many sweeps at most a tenth of an error is unseen, at most 8.

    Args:
        missing: share of the error that one sweep leaves.

    Example:
        >>> [num_sweeps(share) for share in (0.0, 0.1, 0.5, 0.99)]
        [1, 1, 4, 8]
    """
    if missing >= MAX_UNSEEN ** (1 / MAX_SWEEPS):
        return MAX_SWEEPS
    return max(1, ceil(log(MAX_UNSEEN) / log(max(missing, MAX_UNSEEN))))


def missing_share(z: Draws, score: Draws) -> float:
    """Return the share of information on shared latents that is missing, at worst.

    The score given all latents is that of the marginal law, linear in z if this is
    normal, and noise, whose variance is the missing information.

    Args:
        z: draws of the shared latents.
        score: gradient of the joint log density in z, for draws of the local ones.

    Example:
        >>> z, noise = np.random.default_rng(0).normal(size=(2, 9999, 1))
        >>> round(missing_share(z, 2 * noise - z), 1)
        0.8
    """
    root = scale_root(z)
    u = np.linalg.solve(root, (z - z.mean(0)).T).T
    s = (score - score.mean(0)) @ root
    slope = np.linalg.lstsq(u, s, rcond=None)[0]
    rest = s - u @ slope
    missing, known = rest.T @ rest / len(z), -(slope + slope.T) / 2
    if np.linalg.eigvalsh(known)[0] <= 0:  # no peak
        return 1.0
    return float(eigh(missing, missing + known, eigvals_only=True)[-1])


def _wrong_groups(local: Simulator, draws: _JudgedDraws) -> list[str]:
    """Return in words which local draws are wrong given the shared ones."""
    names = coordinate_names(local.latents)
    if len(names) == len(local.latents.sites):  # one number each: leave out its index
        names = local.latents.names
    texts, num_groups = [], len(draws.z_local)
    for j in evenly_spaced(num_groups, MAX_GROUPS).tolist():
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
    rng_key: PRNGKey,
    z: Array,
    root: Array,
    z_local: Float[Array, "groups draws local"],
    contexts: Array,
) -> Float[Array, "draws size"]:
    """Return where MCMC steps take the shared latents of every draw."""

    def log_density(z: Array, local: Array) -> Scalar:
        def one(local: Array, context: Array) -> Scalar:
            return group.log_joint(jnp.concatenate([z, local]), context)

        rest = (len(contexts) - 1) * shared.log_prior(z)
        return jnp.sum(jax.vmap(one)(local, contexts)) - rest

    local = jnp.swapaxes(z_local, 0, 1)
    return barker_moves(log_density, rng_key, z, root, local)


@partial(jax.jit, static_argnums=0)
def _moved_groups(
    group: Simulator,
    rng_key: PRNGKey,
    z_local: Float[Array, "groups draws local"],
    roots: Float[Array, "groups local local"],
    shared: Array,
    contexts: Array,
) -> Float[Array, "groups draws local"]:
    """Return where MCMC steps take the latents of every group of every draw."""

    def one(row: tuple[PRNGKey, Array, Array, Array]) -> Array:
        key, z, root, context = row
        return _moved_local(group, key, z, root, shared, context)

    keys = jax.random.split(rng_key, len(contexts))
    return jax.lax.map(one, (keys, z_local, roots, contexts))


@partial(jax.jit, static_argnums=0)
def _moved_local(
    group: Simulator,
    rng_key: PRNGKey,
    z: Array,
    root: Array,
    shared: Array,
    context: Array,
) -> Float[Array, "draws local"]:
    """Return where MCMC steps take the latents of one group of every draw."""

    def log_density(z: Array, shared: Array) -> Scalar:
        return group.log_joint(jnp.concatenate([shared, z]), context)

    return barker_moves(log_density, rng_key, jnp.asarray(z), root, shared)
