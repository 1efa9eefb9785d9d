r"""Neural posterior score estimation (NPSE): amortized posteriors of NumPyro models.

Simulations :math:`(z_i, y_i)` of the model are draws of its joint law. Denoising score
matching on z with y as context learns :math:`\nabla \log p_t(z_t | y)` for all y
(Sharrock et al. 2022; Geffner et al. 2023). The NumPyro model is the simulator; no
likelihood is required.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from math import log10
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import (
    check_callable,
    check_callbacks,
    check_count,
    check_flags,
    check_integer,
    check_key,
    check_kind,
    check_mesh,
    check_positive,
    check_share,
)
from numpyro_score.data.context_scale import ContextScale
from numpyro_score.data.rows import BATCH_SIZE, Batch
from numpyro_score.infer.amortized.fit_verdict import with_verdict
from numpyro_score.infer.amortized.hierarchical import (
    LOCAL,
    SHARED,
    HierarchicalPosterior,
    check_parts,
    group_simulator,
    group_sites,
    local_simulator,
    shared_simulator,
)
from numpyro_score.infer.amortized.objective import choose_loss
from numpyro_score.infer.amortized.posterior import AmortizedPosterior
from numpyro_score.infer.amortized.simulation_check import check_digits, warn_of_angles
from numpyro_score.infer.amortized.simulator import (
    Simulations,
    Simulator,
    train_validation_split,
)
from numpyro_score.infer.amortized.storage import (
    SCORE,
    check_layout,
    check_shapes,
    read_verdict,
)
from numpyro_score.infer.amortized.truncation import (
    highest_density_region,
    merge_rounds,
    simulate_truncated,
)
from numpyro_score.infer.amortized.weight_decay import fit_with_weight_decay
from numpyro_score.io import load as load_score
from numpyro_score.io.folder import as_path
from numpyro_score.loss.denoising import Loss
from numpyro_score.nn import MLP
from numpyro_score.score.preconditioning import BoundedScore, Parametrization
from numpyro_score.sde import SDE, VE
from numpyro_score.train import Checkpoints, Progress, ScoreMatching
from numpyro_score.train.fit import FitOptions
from numpyro_score.train.held_out import PATIENCE, repeat_rows
from numpyro_score.typing import PRNGKey

# The defaults of net and training were set together: tests/benchmarks/amortized.py
# measures them.

# of batches, with `plate`; more: better prior, worse posterior; not tuned
GROUP_DROP_CONTEXT = 0.2
MIN_SIMULATIONS = 50  # leaves 5 held-out rows at the default share
MIN_TRAINED = 45  # the others


TRAINER_OPTIONS = (
    "sde",
    "optim",
    "drop_context",
    "parametrization",
    "linear_baseline",
    "standardize_context",
)


def default_net(size: int, shape: tuple[int, ...], optional_context: bool) -> MLP:
    """Return an MLP for latents of a size and observations of a shape.

    Example:
        >>> default_net(2, (3,), False).context_size
        3
    """
    return MLP(
        size,
        context_size=int(np.prod(shape)),
        optional_context=optional_context,
        norm=False,
    )


def default_num_steps(num_simulations: int) -> int:
    """Return the default number of training steps for n simulations.

    4n steps, at least 4,000, for n <= 10^4; above, 40,000 (n / 10^4)^log10(2), at most
    80,000: steps double when simulations grow tenfold.

    Example:
        >>> [default_num_steps(n) for n in (500, 5000, 10_000, 100_000)]
        [4000, 20000, 40000, 80000]
    """
    if num_simulations <= 10_000:
        return max(4 * num_simulations, 4000)
    return min(round(40_000 * (num_simulations / 10_000) ** log10(2)), 80_000)


def with_optional_context(net: Any) -> Any:
    """Return a net's configuration that may leave out the context, where it has that.

    Example:
        >>> with_optional_context(MLP(1, context_size=2)).optional_context
        True
    """
    if getattr(net, "optional_context", None) is False and is_dataclass(net):
        return replace(net, optional_context=True)  # type: ignore[type-var]
    return net


class NPSEProblem(NamedTuple):
    """Simulations, loss and gradients from which one score is learned.

    - **simulator**: of its latents and observations.
    - **train**: simulations to train on.
    - **held_out**: simulations that are held out; None for none.
    - **loss**: the objective.
    - **scores**: gradients of the joint density at both; None where not needed.
    """

    simulator: Simulator
    train: Simulations
    held_out: Simulations | None
    loss: Loss
    scores: tuple[np.ndarray | None, np.ndarray | None]

    def part(
        self, simulator: Simulator, columns: slice, given: slice | None
    ) -> "NPSEProblem":
        """Return the problem of some latents, with others appended to the context.

        The joint score of all latents serves: its mean given some of them and the
        observation is the score of their joint density.

        Args:
            simulator: of the part.
            columns: latents to learn.
            given: latents that are known; None for none.
        """

        def rows(simulations: Simulations | None) -> Simulations | None:
            if simulations is None:
                return None
            z, context, num_dropped = simulations
            if given is not None:
                context = np.hstack([context.reshape(len(z), -1), z[:, given]])
            return Simulations(z[:, columns], context, num_dropped)

        train = rows(self.train)
        assert train is not None
        first, second = (
            None if score is None else score[:, columns] for score in self.scores
        )
        return NPSEProblem(
            simulator, train, rows(self.held_out), self.loss, (first, second)
        )


class Training(NamedTuple):
    """Options of the training of a posterior, as in :meth:`NPSE.fit`."""

    num_steps: int | None = None
    batch_size: int | None = None
    validation_share: float = 0.1
    patience: int | None = PATIENCE
    checkpoint: str | os.PathLike | Checkpoints | None = None
    callbacks: Sequence[Callable[[Progress], None]] = ()
    mesh: Mesh | None = None
    check: bool = True
    progress_bar: bool = True

    def check_options(self) -> None:
        """Raise for options that are none, before the simulations."""
        for name in ("num_steps", "batch_size", "patience"):
            if (count := getattr(self, name)) is not None:
                check_count(name, count, "a number of steps, rows or blocks")
        check_share("validation_share", self.validation_share, "are held out")
        if self.checkpoint is not None:
            kinds, what = (str, os.PathLike, Checkpoints), "a folder's name, or"
            check_kind("checkpoint", self.checkpoint, kinds, f"{what} Checkpoints")
        check_callbacks(self.callbacks)
        check_mesh(self.mesh)
        check_flags(check=self.check, progress_bar=self.progress_bar)

    def part(self, name: str) -> "Training":
        """Return the options with a folder of its own for the checkpoints."""
        checkpoint = self.checkpoint
        if isinstance(checkpoint, Checkpoints):
            checkpoint = replace(checkpoint, path=Path(checkpoint.path) / name)
        elif checkpoint is not None:
            checkpoint = Path(checkpoint) / name
        return self._replace(checkpoint=checkpoint)


@dataclass(frozen=True)
class NPSE:
    """Trainer of amortized posteriors on simulations of a NumPyro model.

    Latents are learned in unconstrained space, so that all draws are in the support of
    the prior. Latent sites that are not named are marginalized by simulation.

    Args:
        model: a NumPyro model. Its observed sites are drawn; values that its arguments
            give for them are ignored.
        observed: names of the sites that will be observed, sample or deterministic.
        latents: names of the sites to learn; None for all latent sites.
        net: a net configuration for z with the observation as context, as in
            :class:`~numpyro_score.train.ScoreMatching`; None for an MLP.
        sde: the noise process. Its highest level must be large against the distance
            between posterior means, in units of the posterior standard deviation.
        loss: the objective; None for denoising score matching, with the gradient of the
            joint density in the target where it is valid, see
            :mod:`~numpyro_score.infer.amortized.objective`.
        optim: an Optax optimizer; None for that of ``ScoreMatching``.
        drop_context: fraction of each batch without context, which trains the score of
            the prior.
        parametrization: what the net predicts.
        linear_baseline: whether the net learns the residual of a linear regression of z
            on the observation.
        softness: share of an interval, such as the support of a uniform prior, over
            which its map to the real numbers is nonlinear (the softness of SoftClip);
            None for NumPyro's logistic map.
        standardize_context: function of the simulated observations that returns their
            map to the unit scale; by default asinh of numbers with heavy tails, see
            :mod:`~numpyro_score.data.context_scale`; ``Affine.context`` for none.
        plate: name of a plate of groups that are independent given the sites outside.
            One group is simulated, and ``fit`` returns the posterior for any number of
            groups, a
            :class:`~numpyro_score.infer.amortized.hierarchical.HierarchicalPosterior`:
            sites outside of the plate are composed over the groups, sites in it drawn
            for each group. What differs between groups must be a site in the plate,
            named in ``observed``. ``net`` is then a pair, of the sites outside and of
            those in the plate; the second has the flat observation followed by z of
            the sites outside as context. The first learns the prior too, with
            ``drop_context`` of 0.2 if it is 0. None for no groups.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> def model():
        ...     scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        ...     numpyro.sample("y", dist.Normal(0, scale).expand([3]).to_event(1))
        >>> npse = NPSE(model, "y")
        >>> npse.simulator().observed.shape  # npse.fit(key, 10_000) trains on draws
        (3,)
    """

    model: Callable
    observed: str | tuple[str, ...]
    latents: str | tuple[str, ...] | None = None
    net: Callable | nnx.Module | tuple | None = None
    sde: SDE = VE(0.002, 300.0)
    loss: Loss | None = None
    optim: optax.GradientTransformation | None = None
    drop_context: float = 0.0
    parametrization: Parametrization = BoundedScore()
    linear_baseline: bool = True
    softness: float | None = 0.01
    standardize_context: Callable = ContextScale.fit
    plate: str | None = None

    def __post_init__(self) -> None:
        check_callable("model", self.model, "the simulator of observations")
        for name in ("observed", "latents"):
            check_names(name, getattr(self, name))
        if self.softness is not None:
            check_positive("softness", self.softness, "the share of an interval")
        options = {name: getattr(self, name) for name in TRAINER_OPTIONS}
        if self.loss is not None:
            options["loss"] = self.loss
        for net in self._nets():
            given = default_net(1, (1,), False) if net is None else net
            ScoreMatching(given, **options)  # checks the options that they share

    def simulator(self, *args: Any, **kwargs: Any) -> Simulator:
        """Return the simulator of the model with these arguments.

        With ``plate``, that of one group, whose arguments may have any number of them.
        """
        if self.plate is not None:
            sites = self.plate, self.observed, self.latents
            return group_simulator(self.model, *sites, args, kwargs, self.softness)
        given = self.model, self.observed, self.latents, args, kwargs
        return Simulator.of(*given, softness=self.softness)

    def fit(
        self,
        rng_key: PRNGKey,
        num_simulations: int,
        *args: Any,
        num_steps: int | None = None,
        batch_size: int | None = None,
        validation_share: float = 0.1,
        patience: int | None = PATIENCE,
        checkpoint: str | os.PathLike | Checkpoints | None = None,
        callbacks: Sequence[Callable[[Progress], None]] = (),
        mesh: Mesh | None = None,
        devices: Sequence[jax.Device] | None = None,
        check: bool = True,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> AmortizedPosterior | HierarchicalPosterior:
        """Return the posterior trained on new simulations of the model.

        Args:
            rng_key: random key.
            num_simulations: number of simulations.
            args: positional arguments of the model.
            num_steps: training steps; None for :func:`default_num_steps`.
            batch_size: simulations per step; None for 256, or all if they are fewer.
            validation_share: fraction of the simulations to hold out; 0 for none.
            patience: number of blocks, twentieths of the run, without a new lowest
                held-out loss after which training stops; the result has the weights at
                the lowest. None for the last weights. Training that stops early is
                repeated with weight decay, see
                :mod:`~numpyro_score.infer.amortized.weight_decay`.
            checkpoint: as in :meth:`ScoreMatching.run
                <numpyro_score.train.ScoreMatching.run>`, like the next two.
            callbacks: functions called after every block.
            mesh: devices over which the rows of each batch are sharded.
            devices: devices over which the simulations are sharded.
            check: whether to judge the posterior on held-out simulations, see
                :mod:`~numpyro_score.infer.amortized.fit_verdict`.
            progress_bar: whether to show progress.
            kwargs: keyword arguments of the model.

        Raises:
            ValueError: for models without the named sites, too few simulations, or
                simulated numbers that are rounded to a few digits.

        Warns:
            UserWarning: if the posterior fails on held-out simulations.
        """
        check_key("rng_key", rng_key)
        key_simulate, key_train = jax.random.split(rng_key)
        simulator = self.simulator(*args, **kwargs)
        steps = num_steps, batch_size, validation_share, patience
        training = Training(*steps, checkpoint, callbacks, mesh, check, progress_bar)
        training.check_options()
        _check_count(num_simulations, validation_share)
        simulations = simulator.simulate(
            key_simulate, num_simulations, devices=devices, progress_bar=progress_bar
        )
        return self._train(key_train, simulator, simulations, training)

    def fit_rounds(
        self,
        rng_key: PRNGKey,
        observation: Any,
        num_simulations: int,
        *args: Any,
        num_rounds: int = 4,
        progress_bar: bool = True,
        training: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> AmortizedPosterior:
        """Return the posterior trained in rounds of simulations near one observation.

        Truncated sequential NPSE, see :mod:`~numpyro_score.infer.amortized.truncation`.
        The result is valid only near the observation. There is no verdict on it:
        simulations of rounds are resampled, so held-out ones are not independent.

        Args:
            rng_key: random key.
            observation: the observed value, as in :meth:`AmortizedPosterior.sample`.
            num_simulations: number of simulations of all rounds together.
            args: positional arguments of the model.
            num_rounds: number of rounds, of equal size.
            progress_bar: whether to show progress.
            training: options of :meth:`train`, the same in every round.
            kwargs: keyword arguments of the model.

        Raises:
            ValueError: as :meth:`fit`, or for fewer than one round.
        """
        if self.plate is not None:
            raise ValueError(
                "`fit_rounds` must be without `plate`: its rounds simulate near one "
                "observation, and the score of one group is needed for all of them. "
                f"Use `fit`. Got plate={self.plate!r}."
            )
        check_key("rng_key", rng_key)
        check_count("num_rounds", num_rounds, "the number of rounds")
        check_integer("num_simulations", num_simulations, "a number of simulations")
        simulator, size = self.simulator(*args, **kwargs), num_simulations // num_rounds
        simulator.observed.parse(observation)
        given = {"check": False, "progress_bar": progress_bar, **(training or {})}
        options = Training(**given)
        options.check_options()
        _check_count(size, options.validation_share)
        keys = jax.random.split(rng_key, (num_rounds, 4))
        simulations = simulator.simulate(keys[0, 0], size, progress_bar=progress_bar)
        posterior: Any = self._train(keys[0, 1], simulator, simulations, options)
        for key, key_train, key_region, key_pool in keys[1:]:
            region = highest_density_region(key_region, posterior, observation)
            new = simulate_truncated(
                key, simulator, region, size, progress_bar=progress_bar
            )
            simulations = merge_rounds(key_pool, region, simulations, new)
            posterior = self._train(key_train, simulator, simulations, options)
        return posterior

    def train(
        self,
        rng_key: PRNGKey,
        simulator: Simulator,
        simulations: Simulations,
        *,
        num_steps: int | None = None,
        batch_size: int | None = None,
        validation_share: float = 0.1,
        patience: int | None = PATIENCE,
        checkpoint: str | os.PathLike | Checkpoints | None = None,
        callbacks: Sequence[Callable[[Progress], None]] = (),
        mesh: Mesh | None = None,
        check: bool = True,
        progress_bar: bool = True,
    ) -> AmortizedPosterior | HierarchicalPosterior:
        """Return the posterior trained on given simulations; options as in :meth:`fit`.

        Raises:
            ValueError: for too few simulations.
        """
        check_key("rng_key", rng_key)
        steps = num_steps, batch_size, validation_share, patience
        training = Training(*steps, checkpoint, callbacks, mesh, check, progress_bar)
        training.check_options()
        return self._train(rng_key, simulator, simulations, training)

    def _train(
        self,
        rng_key: PRNGKey,
        simulator: Simulator,
        simulations: Simulations,
        training: Training,
    ) -> AmortizedPosterior | HierarchicalPosterior:
        """Return the posterior trained on given simulations."""
        validation_share = training.validation_share
        _check_count(len(simulations.z), validation_share, simulations.num_dropped)
        check_digits(simulator, simulations)
        if training.check:
            warn_of_angles(simulator)
        train, held_out = train_validation_split(simulations, validation_share)
        loss, score = choose_loss(self.loss, simulator, train)
        held_out_score = None
        if held_out is not None:
            _, held_out_score = choose_loss(loss, simulator, held_out)
        problem = NPSEProblem(simulator, train, held_out, loss, (score, held_out_score))
        if self.plate is not None:
            return self._learn_groups(rng_key, problem, training)
        return self._learn(rng_key, problem, self._nets()[0], training)

    def load(
        self, path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> AmortizedPosterior | HierarchicalPosterior:
        """Return a saved posterior of the same model and arguments.

        Raises:
            FileNotFoundError: if ``path`` is not a saved posterior.
            ValueError: if the model's sites have changed, or files were altered.
        """
        simulator = self.simulator(*args, **kwargs)
        if self.plate is None:
            return _load_part(path, simulator, *self._nets())
        folder, sites, local = as_path(path), group_sites(simulator), None
        shared_net, local_net = self._nets()
        shared = _load_part(
            folder / SHARED, shared_simulator(simulator, sites), shared_net
        )
        of_locals = local_simulator(simulator, sites)
        if of_locals is not None:
            local = _load_part(folder / LOCAL, of_locals, local_net)
        check_parts(folder, local is not None)
        return HierarchicalPosterior.of(shared, local, sites.axes)

    def _learn_groups(
        self, rng_key: PRNGKey, problem: NPSEProblem, training: Training
    ) -> HierarchicalPosterior:
        """Return the posterior of shared and of local latents, from one group."""
        key_shared, key_local = jax.random.split(rng_key)
        sites, local = group_sites(problem.simulator), None
        nets = self._nets()
        simulator = shared_simulator(problem.simulator, sites)
        size = simulator.latents.size
        learner = replace(self, drop_context=self.drop_context or GROUP_DROP_CONTEXT)
        shared = learner._learn(
            key_shared,
            problem.part(simulator, slice(0, size), None),
            nets[0],
            training.part(SHARED),
        )
        of_locals = local_simulator(problem.simulator, sites)
        if of_locals is not None:
            local = replace(self, drop_context=0.0)._learn(
                key_local,
                problem.part(of_locals, slice(size, None), slice(0, size)),
                nets[1],
                training.part(LOCAL),
            )
        if training.check and problem.simulator.intractable:
            warn_caller(
                "NPSE: this posterior was judged given single groups only. Given many, "
                "the errors of its nets add up, and without a likelihood its draws "
                "cannot be judged by the score of the model: "
                f"{problem.simulator.intractable}. Compare with known cases before "
                "relying on it. `check=False` silences this."
            )
        return HierarchicalPosterior.of(shared, local, sites.axes)

    def _learn(
        self, rng_key: PRNGKey, problem: NPSEProblem, net: Any, training: Training
    ) -> AmortizedPosterior:
        """Return the posterior of one problem."""
        simulator, train, held_out, loss, (score, held_out_score) = problem
        batch_size, num_steps = training.batch_size, training.num_steps
        options = FitOptions(
            default_num_steps(len(train.z)) if num_steps is None else num_steps,
            mesh=training.mesh,
            callbacks=training.callbacks,
            progress_bar=training.progress_bar,
        )
        if held_out is not None:
            rows = repeat_rows(Batch(held_out.z, held_out.context, held_out_score))
            options = replace(options, validation=rows, patience=training.patience)
        result = fit_with_weight_decay(
            self._trainer(simulator, loss, net),
            rng_key,
            Batch(train.z, train.context, score),
            options,
            batch_size=batch_size,
            checkpoint=training.checkpoint,
        )
        posterior = AmortizedPosterior(result.score, simulator)
        if not training.check:
            return posterior
        num_rows = options.num_steps * min(batch_size or BATCH_SIZE, len(train.z))
        key = jax.random.fold_in(rng_key, 1)  # training has used the key itself
        return with_verdict(key, posterior, train, held_out, num_rows)

    def _nets(self) -> tuple:
        """Return the given nets, one for each score; None for an MLP."""
        if self.plate is None:
            return (self.net,)
        if self.net is None:
            return (None, None)
        if not isinstance(self.net, tuple) or len(self.net) != 2:
            raise ValueError(
                "`net` must be a pair with `plate`: a net of the sites outside of the "
                "plate and one of those in it, or None for MLPs. "
                f"Got {self.net!r}."
            )
        return with_optional_context(self.net[0]), self.net[1]

    def _trainer(self, simulator: Simulator, loss: Loss, net: Any) -> ScoreMatching:
        size, shape = simulator.latents.size, simulator.observed.shape
        if net is None:
            net = default_net(size, shape, self.drop_context > 0)
        return ScoreMatching(
            net,
            self.sde,
            loss,
            optim=self.optim,
            drop_context=self.drop_context,
            parametrization=self.parametrization,
            linear_baseline=self.linear_baseline,
            standardize_context=self.standardize_context,
        )


def _load_part(
    path: str | os.PathLike, simulator: Simulator, net: Any
) -> AmortizedPosterior:
    """Return one saved posterior."""
    folder = check_layout(path, simulator, SCORE)
    score = load_score(folder, net=net)
    check_shapes(folder, score, simulator)
    return AmortizedPosterior(score, simulator, verdict=read_verdict(path, SCORE))


def check_names(name: str, sites: Any) -> None:
    """Raise unless sites are named by a string or a tuple, or all by None.

    Raises:
        ValueError: in these cases.
    """
    if sites is None and name == "latents":
        return
    names = [sites] if isinstance(sites, str) else sites
    listed = isinstance(names, list | tuple)
    if not listed or not all(isinstance(site, str) for site in names):
        raise ValueError(
            f"`{name}` must be the name of a site, or a tuple of names. Got {sites!r}."
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"`{name}` must name every site once: the values of two cannot stand in "
            f"one place. Got {sites!r}."
        )


def _check_count(count: int, validation_share: float, num_dropped: int = 0) -> None:
    check_integer("num_simulations", count, "a number of simulations")
    if count < MIN_SIMULATIONS:
        raise ValueError(
            f"`num_simulations` must leave at least {MIN_SIMULATIONS} simulations to "
            "learn from; a few thousand are the rule. "
            f"Got {count} usable ones, {num_dropped} dropped."
        )
    held_out = round(validation_share * count)
    if count - held_out < MIN_TRAINED:
        raise ValueError(
            f"`validation_share` must leave at least {MIN_TRAINED} simulations to "
            f"train on. Got {validation_share}: {held_out} of {count} are held out."
        )
