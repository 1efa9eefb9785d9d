r"""Posteriors of models with a plate of groups, for any number of groups.

For :math:`p(\phi) \prod_j p(z_j | \phi) p(y_j | z_j, \phi)` two scores are learned from
simulations of *one* group: that of the shared latents :math:`\phi` given one
observation, with z integrated out, and that of the local latents z given
:math:`\phi` and the observation. Given J groups, the scores of :math:`\phi` are
composed (:mod:`~numpyro_score.infer.amortized.group_composition`), and then every
:math:`z_j` is drawn given :math:`\phi` and :math:`y_j`: the groups are independent
given :math:`\phi`.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_score.checks import check_count, check_key, check_known, is_traced
from numpyro_score.data.context_scale import FAR_PROBABILITY, ContextScale
from numpyro_score.data.inputs import is_number_dtype
from numpyro_score.infer.amortized.composition import inverse_covariance
from numpyro_score.infer.amortized.draw_check import DRAWS_PER_DIMENSION
from numpyro_score.infer.amortized.group_composition import (
    GroupSettings,
    draw_shared,
)
from numpyro_score.infer.amortized.group_draw_check import (
    MAX_SCORES,
    MAX_STEP_SCORES,
    MIN_MOVED,
    group_simulator_of,
    num_judged_groups,
    warn_of_wrong_groups,
)
from numpyro_score.infer.amortized.layout import ObservationLayout, ObservedSite
from numpyro_score.infer.amortized.observation_check import (
    context_map_of,
    warn_of_far_observations,
)
from numpyro_score.infer.amortized.plate_groups import (
    GroupModel,
    PlateSites,
    check_groups,
    plate_sites,
    plate_size,
)
from numpyro_score.infer.amortized.posterior import AmortizedPosterior
from numpyro_score.infer.amortized.prior_denoiser import factorized_prior_denoiser
from numpyro_score.infer.amortized.sampling import (
    DRAW_BATCH_SIZE,
    PosteriorGivenData,
    SamplingSettings,
    check_finite,
    map_in_batches,
)
from numpyro_score.infer.amortized.simulator import Simulator, resample_observed
from numpyro_score.infer.amortized.storage import save_posterior
from numpyro_score.io.folder import (
    SUMS,
    check_new,
    check_together,
    new_folder,
    sums,
)
from numpyro_score.model.latents import LatentLayout, Values, as_values
from numpyro_score.reprs import repr_lines
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import Geometric, Solver
from numpyro_score.solver import sample as run_solver
from numpyro_score.typing import PRNGKey

SHARED, LOCAL = "shared", "local"  # names of the folders of a saved posterior
PRIOR_DRAWS = 2000  # the prior's sd is within 1 / 4000^1/2 = 1.6 %
# groups together; fewer: faster, more noise (MAX_NOISE warns); not tuned
BATCH_SIZE = 64
# by (J / 4K)^(1/2) the mean is .05 sd off for 100 groups; from 1,600 on a warning
NUM_SIMULATIONS = 10_000
MAX_NAMED = 5  # groups named in an error


def check_parts(folder: Path, has_local: bool) -> None:
    """Raise if the parts of a saved posterior are those of two.

    Raises:
        ValueError: in this case.
    """
    if (folder / SUMS).is_file():  # the first versions wrote none
        check_together(folder, _sums_of(SHARED, *[LOCAL] * has_local))


def _sums_of(*parts: str) -> tuple[str, ...]:
    return tuple(f"{part}/{SUMS}" for part in parts)


def group_simulator(
    model: Callable,
    plate: str,
    observed: str | tuple[str, ...],
    latents: str | tuple[str, ...] | None,
    args: tuple,
    kwargs: dict[str, Any],
    softness: float | None,
) -> Simulator:
    """Return the simulator of one group, shared latents first.

    Args:
        model: the model of all groups.
        plate: name of the plate.
        observed: names of the observed sites, in the plate.
        latents: names of the sites to learn; None for all latent sites.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        softness: as in :meth:`Simulator.of`.

    Raises:
        ValueError: as :meth:`Simulator.of` and
            :func:`~numpyro_score.infer.amortized.plate_groups.check_groups`, or if a
            shared latent is not to be learned.
    """
    observed = (observed,) if isinstance(observed, str) else tuple(observed)
    latents = (latents,) if isinstance(latents, str) else latents
    drawn = resample_observed(model, observed)
    plate_size(drawn, plate, args, kwargs)
    group = GroupModel(model, plate)
    of = partial(Simulator.of, group, observed, args=args, kwargs=kwargs)
    first = of(latents=latents, softness=softness)
    sites = plate_sites(drawn, plate, observed, args, kwargs)
    check_groups(drawn, plate, sites.axes, args, kwargs)
    left_out = [name for name in sites.shared if name not in first.latents.names]
    if left_out:
        raise ValueError(
            f"`latents` must name all latent sites outside of `plate` '{plate}': given "
            "some of them only, groups are not independent, and cannot be composed. "
            f"Left out: {left_out}."
        )
    local = [name for name in first.latents.names if name not in sites.shared]
    return of(latents=(*sites.shared, *local), softness=softness)


def group_sites(simulator: Simulator) -> PlateSites:
    """Return the sites of the simulator of one group by their place."""
    group: Any = simulator.model
    observed = simulator.observed.names
    drawn = resample_observed(group.model, observed)
    return plate_sites(drawn, group.plate, observed, simulator.args, simulator.kwargs)


def shared_simulator(simulator: Simulator, sites: PlateSites) -> Simulator:
    """Return the simulator of the shared latents, from that of one group."""
    shared = tuple(s for s in simulator.latents.sites if s.name in sites.shared)
    local = tuple(s.name for s in simulator.latents.sites if s.name not in sites.shared)
    nuisance = local + simulator.nuisance
    why = simulator.intractable
    if local and not why:
        why = f"{list(local)} are latent too and would have to be integrated out"
    return replace(
        simulator, latents=LatentLayout(shared), nuisance=nuisance, intractable=why
    )


def local_simulator(simulator: Simulator, sites: PlateSites) -> Simulator | None:
    """Return the simulator of local latents given the shared ones; None without any.

    Its context is that of the observation, flat, followed by z of the shared latents.
    """
    shared = tuple(s for s in simulator.latents.sites if s.name in sites.shared)
    local = tuple(s for s in simulator.latents.sites if s.name not in sites.shared)
    if not local:
        return None
    dtype = str(jnp.result_type(float))
    given = [
        ObservedSite(s.name, s.shape, dtype, unconstrain=s.support) for s in shared
    ]
    observed = ObservationLayout((*simulator.observed.sites, *given))
    return replace(simulator, latents=LatentLayout(local), observed=observed)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HierarchicalPosterior(PosteriorGivenData):
    """The posterior of a model with a plate, for any number of groups; a pytree.

    From :meth:`NPSE.fit <numpyro_score.infer.NPSE.fit>` or
    :meth:`NPSE.load <numpyro_score.infer.NPSE.load>` with ``plate``.

    Args:
        shared: posterior of the sites outside of the plate given one group.
        local: posterior of the sites in the plate given one group and the shared sites;
            None if there are none.
        prior: denoiser of the prior of the shared sites, for standardized z.
        prior_precision: inverse covariance of their standardized prior draws.
        box: lowest and highest of these.
        axes: axis of the groups in every site of the plate, from the right.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_score import MLP, NPSE
        >>> def model(num_groups=2):
        ...     mu = numpyro.sample("mu", dist.Normal(0, 1))
        ...     with numpyro.plate("groups", num_groups):
        ...         z = numpyro.sample("z", dist.Normal(mu, 1))
        ...         numpyro.sample("y", dist.Normal(z, 1))
        >>> net = MLP(1, width=8, depth=1, context_size=1)
        >>> local = MLP(1, width=8, depth=1, context_size=2)
        >>> npse = NPSE(model, "y", net=(net, local), plate="groups")
        >>> options = {"check": False, "progress_bar": False}
        >>> posterior = npse.fit(jax.random.key(0), 100, num_steps=2, **options)
        >>> posterior.local.latents.names  # posterior.sample(key, y) takes any groups
        ('z',)
    """

    shared: AmortizedPosterior
    local: AmortizedPosterior | None
    prior: Callable
    prior_precision: Float[Array, "size size"]
    box: Float[Array, "2 size"]
    axes: tuple[tuple[str, int], ...] = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        shared: AmortizedPosterior,
        local: AmortizedPosterior | None,
        axes: Mapping[str, int],
    ) -> "HierarchicalPosterior":
        """Return the posterior from its two parts.

        Args:
            shared: posterior of the shared sites given one group.
            local: posterior of the local sites given one group and the shared sites.
            axes: axis of the groups in every site of the plate, from the right.
        """
        standardize = shared.score.standardize
        keys = jax.random.split(jax.random.key(0), PRIOR_DRAWS)  # moments of the prior
        draws = shared.simulator.draw_latents(keys)
        denoiser: Callable
        try:
            denoiser = factorized_prior_denoiser(shared.simulator, standardize, draws)
        except ValueError:  # not a product over the numbers of z: the net has it
            denoiser = shared.score.denoiser
        u = jax.vmap(standardize.forward)(draws)
        axes_ = tuple(sorted(axes.items()))
        box = jnp.stack([u.min(0), u.max(0)])
        return cls(shared, local, denoiser, inverse_covariance(u), box, axes_)

    def __repr__(self) -> str:
        return repr_lines(type(self).__name__, self.summary())

    def summary(self) -> dict[str, str]:
        """Return what the repr says, by name: no arrays."""
        rows = {"plate": self.plate}
        for name, part in ((SHARED, self.shared), (LOCAL, self.local)):
            if part is not None:
                rows |= {f"{name}: {key}": row for key, row in part.summary().items()}
        return rows

    @property
    def plate(self) -> str:
        """The name of the plate."""
        group: Any = self.shared.simulator.model
        return group.plate

    def sample(
        self,
        rng_key: PRNGKey,
        observation: Any,
        num_samples: int = 1000,
        *,
        batch_size: int = BATCH_SIZE,
        num_simulations: int = NUM_SIMULATIONS,
    ) -> dict[str, Array]:
        """Return posterior draws of all sites given the groups of one data set.

        Compiled once per number of groups and draws. Memory is that of the draws and of
        ``batch_size`` groups.

        Args:
            rng_key: random key.
            observation: observed values of all groups: an array of the shape that the
                site has in the model with as many groups, or a dict of arrays by site.
            num_samples: number of draws.
            batch_size: number of groups that are evaluated together.
            num_simulations: number of groups that are simulated near the posterior,
                twice in each of five rounds, to correct the mean error of the net,
                which would add up over the groups; 100 for each group are enough. 0
                for none.

        Returns:
            Draws of every latent site, in its support, as from MCMC on the model: sites
            in the plate have one value per group at the place of the plate.

        Raises:
            FloatingPointError: if a draw is not finite.
            ValueError: for no groups at all, groups of another shape, or NaN; for no
                groups draw the prior by ``numpyro.infer.Predictive``.

        Warns:
            UserWarning: for groups far from all simulations, if more than by chance, or
                if the shared draws have not converged. For draws that the exact score
                of the model shows to be wrong, unless the posterior was fitted with
                ``check=False``: see
                :mod:`~numpyro_score.infer.amortized.group_draw_check`.
        """
        check_key("rng_key", rng_key)
        check_known("sample", rng_key=rng_key, observation=observation)
        key_shared, key_local = jax.random.split(rng_key)
        options = (num_samples, batch_size, num_simulations)
        draws = shared = self._sample_shared(key_shared, observation, *options)
        if self.local is not None:
            draws = shared | self.sample_local(key_local, observation, shared)
        if self._is_judged(observation, num_samples):
            self._judge(draws, observation)
        return draws

    def sample_shared(
        self,
        rng_key: PRNGKey,
        observation: Any,
        num_samples: int = 1000,
        *,
        batch_size: int = BATCH_SIZE,
        num_simulations: int = NUM_SIMULATIONS,
    ) -> dict[str, Array]:
        """Return draws of the sites outside of the plate; arguments of :meth:`sample`.

        For many groups this is much faster than :meth:`sample`, which draws local sites
        of every group for every draw. To judge the draws, local sites are drawn for
        some of them: 100,000 pairs of a draw and a group, or 256 draws.
        """
        check_key("rng_key", rng_key)
        check_known("sample_shared", rng_key=rng_key, observation=observation)
        options = (num_samples, batch_size, num_simulations)
        draws = self._sample_shared(rng_key, observation, *options)
        count = self._is_judged(observation, num_samples)
        if count:
            count = min(count, self._num_drawn(len(self._contexts(observation))))
            some = {name: value[:count] for name, value in draws.items()}
            if self.local is not None:
                key = jax.random.fold_in(rng_key, 1)  # the draws have used the key
                some |= self.sample_local(key, observation, some)
            self._judge(some, observation)
        return draws

    def _sample_shared(
        self,
        rng_key: PRNGKey,
        observation: Any,
        num_samples: int,
        batch_size: int,
        num_simulations: int,
    ) -> dict[str, Array]:
        """Return draws of the sites outside of the plate, not judged."""
        check_count("num_samples", num_samples, "the number of draws")
        check_count("batch_size", batch_size, "the number of groups of one batch")
        why = "the number of simulated groups"
        check_count("num_simulations", num_simulations, why, least=0)
        contexts = self._contexts(observation, warn=True)
        settings = GroupSettings(
            _settings(self.shared), num_samples, batch_size, num_simulations
        )
        z, convergence = draw_shared(
            self.shared.score,
            self.prior,
            contexts,
            self.prior_precision,
            self.box,
            rng_key,
            simulator=self.shared.simulator,
            settings=settings,
        )
        check_finite(jnp.isfinite(z).all())
        convergence.warn(batch_size, num_simulations)
        return self.shared.latents.unflatten(z)

    def sample_local(
        self, rng_key: PRNGKey, observation: Any, shared: Values
    ) -> dict[str, Array]:
        """Return a draw of the local sites of every group for each draw of the others.

        Args:
            rng_key: random key.
            observation: observed values of all groups, as in :meth:`sample`.
            shared: draws of the sites outside of the plate, from :meth:`sample_shared`
                or from elsewhere.

        Raises:
            ValueError: if the model has no local latent sites that were learned.
        """
        check_key("rng_key", rng_key)
        check_known("sample_local", rng_key=rng_key, observation=observation)
        if self.local is None:
            raise ValueError(
                f"`sample_local` needs latent sites in `plate` '{self.plate}' that "
                f"were learned. Got {list(self.shared.latents.names)}, all outside."
            )
        contexts = self._contexts(observation)
        z = self.shared.latents.flatten(as_values("shared", shared))
        if z.ndim != 2:
            raise ValueError(
                "`shared` must have one draw per row in every site, as from "
                f"`sample_shared`. Got draws of shape {z.shape[:-1]}."
            )
        settings = _settings(self.local)
        flat = contexts.reshape(len(contexts), -1)
        draws, finite = _draw_local(
            self.local.score, rng_key, flat, z, settings=settings
        )
        check_finite(finite)
        axes = dict(self.axes)
        return {  # of (groups, draws, ...), with the groups at the place of the plate
            k: jnp.moveaxis(jnp.squeeze(v, axes[k]), 0, axes[k])
            for k, v in draws.items()
        }

    def model_of(self, observation: Any) -> tuple[Callable, dict[str, Array]]:
        """Return the model with as many groups as are observed, and observed values.

        Args:
            observation: observed values of all groups, as in :meth:`sample`.

        Raises:
            ValueError: as :meth:`sample`.
        """
        simulator, num_groups = self.shared.simulator, len(self._contexts(observation))
        if not isinstance(observation, Mapping):
            observation = {simulator.observed.names[0]: observation}
        group: Any = simulator.model
        model = GroupModel(group.model, group.plate, tuple(range(num_groups)))
        return model, {k: jnp.asarray(value) for k, value in observation.items()}

    def with_solver(self, solver: Solver, num_steps: int) -> "HierarchicalPosterior":
        """Return the posterior with another solver for draws."""
        local = self.local
        return replace(
            self,
            shared=self.shared.with_solver(solver, num_steps),
            local=None if local is None else local.with_solver(solver, num_steps),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Save both parts in a new folder, without the model's code.

        Args:
            path: path of the new folder.

        Raises:
            FileExistsError: if ``path`` exists.
        """
        found = {SHARED: self.shared, LOCAL: self.local}
        parts = {name: part for name, part in found.items() if part is not None}
        with new_folder(check_new(path, "posterior")) as partial_:
            for name, part in parts.items():
                save_posterior(
                    part.score, part.simulator, partial_ / name, part.verdict
                )
            (partial_ / SUMS).write_text(sums(partial_, _sums_of(*parts)))

    def _is_judged(self, observation: Any, num_samples: int) -> int:
        """Return how many draws are judged by the exact score of the model."""
        if self.shared.verdict is None:
            return 0
        local = None if self.local is None else self.local.simulator
        group = group_simulator_of(self.shared.simulator, local)
        num_groups = len(self._contexts(observation))
        return num_judged_groups(group, num_samples, num_groups)

    def _num_drawn(self, num_groups: int) -> int:
        """Return for how many draws local sites are drawn, only to judge the others."""
        if self.local is None:
            return MAX_SCORES
        size = self.shared.latents.size + self.local.latents.size
        least = max(MIN_MOVED, DRAWS_PER_DIMENSION * size)
        return max(least, MAX_STEP_SCORES // num_groups)

    def _judge(self, draws: dict[str, Array], observation: Any) -> None:
        """Warn of draws that the exact score of the model shows to be wrong."""
        contexts, shared, local = self._contexts(observation), self.shared, self.local
        z = shared.latents.flatten({name: draws[name] for name in shared.latents.names})
        z_local, axes = jnp.zeros((len(contexts), len(z), 0)), dict(self.axes)
        if local is not None:
            names = local.latents.names
            groups = {  # as (groups, draws, ...)
                k: jnp.expand_dims(jnp.moveaxis(draws[k], axes[k], 0), axes[k])
                for k in names
            }
            z_local = local.latents.flatten(groups)
        warn_of_wrong_groups(
            shared.simulator,
            None if local is None else local.simulator,
            np.asarray(z),
            np.asarray(z_local),
            contexts,
        )

    def _contexts(self, observation: Any, *, warn: bool = False) -> Array:
        """Return one context per group, after checking the observation."""
        observed, axes = self.shared.simulator.observed, dict(self.axes)
        rows = _group_rows(observed, axes, self.plate, observation)
        contexts = observed.parse(rows, batch_ndims=1)
        if warn:
            _warn_of_far_groups(observed, contexts, self.shared.score)
        return contexts


def _group_rows(
    observed: ObservationLayout, axes: Mapping[str, int], plate: str, observation: Any
) -> dict[str, Any]:
    """Return the observed values with one group per row, after checking them.

    Each row has the shape of the site in the model of one group.

    Raises:
        ValueError: for unknown or missing sites, other shapes, unequal numbers of
            groups, none, or NaN.
    """
    if not isinstance(observation, Mapping):
        observed.check_single_site()
        observation = {observed.names[0]: observation}
    rows = {}
    for site in observed.sites:
        if site.name in observation:
            value = _as_array(site.name, observation[site.name])
            rows[site.name] = _site_rows(site, axes[site.name], plate, value)
    counts = {name: len(value) for name, value in rows.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"`observation` must have equally many groups of `plate` '{plate}' in "
            f"every site. Got {counts}."
        )
    unknown = {name: v for name, v in observation.items() if name not in observed.names}
    return rows | unknown  # which `parse` names


def _as_array(name: str, value: Any) -> Any:
    if hasattr(value, "shape"):
        return value
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(
            f"`observation` of site '{name}' must be an array of groups of one shape: "
            "the posterior is learned for the shape that the model simulates. For "
            "groups of other sizes, observe summaries of fixed shape together with "
            f"the size. Got {error}"
        ) from error


def _site_rows(site: ObservedSite, axis: int, plate: str, value: Any) -> Any:
    """Return a site's groups as rows, each of the shape of one group."""
    shape = value.shape
    place = len(site.shape) + axis
    wanted = list(map(str, site.shape))
    wanted[place] = "groups"
    same = (*shape[:place], 1, *shape[place + 1 :]) == site.shape
    if len(shape) != len(site.shape) or not same:
        raise ValueError(
            f"`observation` of site '{site.name}' must have the shape that the model "
            f"simulates, with the groups of `plate` '{plate}' at its place. Got "
            f"{shape}, expected ({', '.join(wanted)})."
        )
    if shape[place] == 0:
        raise ValueError(
            "`observation` must have at least one group: without groups the posterior "
            "is the prior, of which numpyro.infer.Predictive draws. "
            f"Got {shape} for site '{site.name}'."
        )
    rows = jnp.moveaxis(jnp.asarray(value), place, 0) if _is_plain(value) else value
    if rows is value:
        return value  # masked or no numbers: `parse` says so
    if jnp.issubdtype(rows.dtype, jnp.floating):
        bad = np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))
        if len(bad):
            raise ValueError(
                f"`observation` of site '{site.name}' must be finite in every group: "
                "the posterior was learned from simulations without NaN or inf. Leave "
                "out groups without data; groups with part of them need a model that "
                f"simulates such. Got NaN or inf in {len(bad)} of {len(rows)} groups, "
                f"the first of them {bad[:MAX_NAMED].tolist()}."
            )
    return jnp.expand_dims(rows, place + 1)


def _is_plain(value: Any) -> bool:
    is_masked = isinstance(value, np.ma.MaskedArray)
    return is_number_dtype(value.dtype) and not is_masked


@partial(jax.jit, static_argnames="settings")
def _draw_local(
    score: ScoreModel,
    rng_key: PRNGKey,
    contexts: Float[Array, "groups numbers"],
    shared: Float[Array, "draws size"],
    *,
    settings: SamplingSettings,
) -> tuple[dict[str, Array], Bool[Array, ""]]:
    """Return one draw of local sites for each group and each draw of shared latents.

    Args:
        score: score of the local latents given one group and the shared latents.
        rng_key: random key.
        contexts: flat observations, one group per row.
        shared: z of the shared latents.
        settings: of the solver.

    Returns:
        Draws of shape (groups, draws, ...), in batches of groups, and whether all are
        finite.
    """
    ts = Geometric()(score.sde, settings.num_steps)

    def one(key: PRNGKey, context: Array) -> Array:
        return run_solver(
            key, score, (), solver=settings.solver, ts=ts, context=context
        )

    def group(row: tuple[Array, Array]) -> tuple[dict[str, Array], Array]:
        index, observed = row
        keys = jax.random.split(jax.random.fold_in(rng_key, index), len(shared))
        each = jnp.broadcast_to(observed, (len(shared), len(observed)))
        z = jax.vmap(one)(keys, jnp.concatenate([each, shared], axis=1))
        return settings.latents.unflatten(z), jnp.isfinite(z).all()

    groups_at_once = max(1, DRAW_BATCH_SIZE // len(shared))
    rows = jnp.arange(len(contexts)), contexts
    draws, finite = map_in_batches(group, rows, groups_at_once)
    return draws, finite.all()


def _settings(posterior: AmortizedPosterior) -> SamplingSettings:
    return SamplingSettings(posterior.latents, posterior.solver, posterior.num_steps)


def _warn_of_far_groups(
    observed: ObservationLayout, contexts: Array, score: ScoreModel
) -> None:
    """Warn of impossible groups, and of groups that simulations do not cover.

    Of J simulated groups about ``FAR_PROBABILITY`` J are beyond the range; only more of
    them are reported, or one that is beyond twice the range.
    """
    if is_traced(contexts):
        return
    scale = context_map_of(score)
    if isinstance(scale, ContextScale):
        margin = 0.5 * (scale.high - scale.low)
        wide = replace(scale, low=scale.low - margin, high=scale.high + margin)
        far = np.asarray(scale.is_far(contexts)).reshape(len(contexts), -1).any(1)
        expected = FAR_PROBABILITY * len(contexts)
        # 4 standard errors of a count; none of 100, as one is far by a chance of 1 %
        usual = expected + 4 * sqrt(expected) + (expected > 0.01)
        if far.sum() <= usual and not wide.is_far(contexts).any():
            scale = None
    warn_of_far_observations(observed, contexts, scale, batch_ndims=1)
