r"""The joint law of latents and observed sites of a model, and any conditional of it.

Simulations of the model are draws of p(z, y). One score of that law, with one noise
level per coordinate (:mod:`numpyro_score.score.conditioning`), gives the posterior
p(z | y), the likelihood p(y | z), p(missing y | other y) and every other conditional
law (Gloeckler et al. 2024). No likelihood is required.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from numpyro.diagnostics import print_summary

from numpyro_score.checks import (
    check_callable,
    check_count,
    check_flags,
    check_key,
    check_keywords,
    check_known,
    check_summary,
)
from numpyro_score.data.columns import Column, unconstrain_rows
from numpyro_score.data.context_scale import ContextScale
from numpyro_score.data.rows import BATCH_SIZE, Batch
from numpyro_score.infer.amortized.fit_verdict import (
    FitVerdict,
    coordinate_names,
    num_rows,
    warn_if_poor,
)
from numpyro_score.infer.amortized.model_sites import same_value
from numpyro_score.infer.amortized.npse import (
    check_names,
    default_num_steps,
)
from numpyro_score.infer.amortized.simulation_check import (
    check_digits,
    warn_of_angles,
    warn_of_drawn_angles,
)
from numpyro_score.infer.amortized.simulator import (
    Simulations,
    Simulator,
    drop_nonfinite,
)
from numpyro_score.infer.joint.conditionals import (
    conditional_trainer,
    draw_rows,
)
from numpyro_score.infer.joint.draw_check import warn_of_wrong_conditional
from numpyro_score.infer.joint.layout import (
    JointLayout,
    check_densities,
    observed_columns,
)
from numpyro_score.infer.joint.storage import JointParts, describe_joint, read_joint
from numpyro_score.infer.joint.verdict import judge_joint
from numpyro_score.io.models import load_with_sites, save_with_sites
from numpyro_score.nn import MLP
from numpyro_score.reprs import repr_lines
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver.grid import DEFAULT_NUM_STEPS
from numpyro_score.train import ScoreMatching
from numpyro_score.train.held_out import PATIENCE, repeat_rows
from numpyro_score.typing import PRNGKey

# of the simulations, to end training; scikit-learn's `validation_fraction`
HELD_OUT = 0.1
MIN_SIMULATIONS = 100  # leaves 10 held-out rows
NUM_RUNS = 4  # that show whether a site is random: a fair coin is equal in all by 2^-3
SOFTNESS = 0.01  # of the maps of intervals, as NPSE's


@dataclass(frozen=True, eq=False)
class LearnedJoint:
    """Joint law of sites of a model; made by :func:`learn_joint`.

    - **score**: score of standardized vectors of all sites.
    - **layout**: the sites, and their map to these vectors.
    - **verdict**: on held-out simulations, at the end of training; None for none.
    - **simulator**: the model, by whose score draws are judged; None not to judge them.
      It is not saved.
    """

    score: ScoreModel
    layout: JointLayout
    verdict: FitVerdict | None = None
    simulator: Simulator | None = None

    def sample(
        self,
        rng_key: PRNGKey,
        num_samples: int = 1000,
        given: Mapping[str, Any] | None = None,
    ) -> dict[str, Array]:
        """Return independent draws of all sites given values of some of them.

        Compiled once per number of draws, whatever is given.

        Args:
            rng_key: random key.
            num_samples: number of draws.
            given: values by site, of the shape of the site, NaN where they are unknown.
                None gives draws of the prior predictive. If all are given, all draws
                are equal to them.

        Returns:
            Draws of every site in its support; given values come out as they are.

        Raises:
            FloatingPointError: if a draw is not finite.
            TypeError: for values that are no real numbers.
            ValueError: for unknown sites, other shapes, and values that are infinite or
                outside of the support of their site.

        Warns:
            UserWarning: for values far from all simulations, each or together. For 64
                draws or more that the exact score of the model shows to be wrong, see
                :mod:`~numpyro_score.infer.joint.draw_check`.
        """
        check_key("rng_key", rng_key)
        check_count("num_samples", num_samples, "the number of draws")
        check_known("sample", rng_key=rng_key)
        values = self.layout.parse({} if given is None else given)
        u = self.layout.standardize(values)
        self.layout.warn_of_far(u, self.score.rows)
        rows = draw_rows(rng_key, self.score, u[None], num_samples)[:, 0]
        draws = self.layout.constrain(rows, values)
        if self.simulator is not None:
            known = ~np.isnan(u)
            warn_of_wrong_conditional(self.simulator, self.layout, draws, known)
        return draws

    def print_summary(
        self,
        rng_key: PRNGKey,
        given: Mapping[str, Any] | None = None,
        num_samples: int = 1000,
        prob: float = 0.9,
    ) -> None:
        """Print a summary of draws given values of some sites.

        Args:
            rng_key: random key.
            given: as in :meth:`sample`.
            num_samples: number of draws.
            prob: probability mass of the intervals.
        """
        check_summary(num_samples, prob)
        draws = self.sample(rng_key, num_samples, given)
        print_summary(draws, prob=prob, group_by_chain=False)
        names = ", ".join(given) if given else "nothing"
        print(
            f"Given {names}: {num_samples} independent draws, approximate by the error "
            "of the net."
        )

    def save(self, path: str | os.PathLike) -> None:
        """Save score, sites and verdict in a new folder, without the model's code.

        Args:
            path: path of the new folder.

        Raises:
            FileExistsError: if ``path`` exists.
            TypeError: for a score that is a function.
        """
        parts = JointParts(self.layout, self.verdict)
        save_with_sites(self.score, *describe_joint(parts), path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, net: Callable | nnx.Module | None = None
    ) -> "LearnedJoint":
        """Return a joint law that was saved; the model is not needed.

        Args:
            path: the folder.
            net: the ``net`` of the trainer, if it is not a configuration of the
                package.

        Raises:
            FileNotFoundError: if the folder or one of its files is not there.
            ValueError: if a file was altered, or parts belong to different laws.
        """
        score, parts = load_with_sites(
            path, read_joint, lambda parts: parts.layout.size, net=net
        )
        return cls(score, *parts)

    def __repr__(self) -> str:
        sites = self.layout.latents.sites, self.layout.observed.sites
        latents, observed = (", ".join(f"{s.name} {s.shape}" for s in p) for p in sites)
        rows = {"latent sites": latents, "observed": observed}
        judged = {} if self.verdict is None else {"verdict": self.verdict.headline}
        return repr_lines(type(self).__name__, rows | self.score.summary() | judged)


def learn_joint(
    rng_key: PRNGKey,
    model: Callable,
    num_simulations: int,
    *model_args: Any,
    observed: str | Sequence[str],
    latents: str | Sequence[str] | None = None,
    num_steps: int | None = None,
    trainer: ScoreMatching | None = None,
    check: bool = True,
    progress_bar: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LearnedJoint:
    """Return the joint law of a model's sites, with any conditional law.

    Args:
        rng_key: random key.
        model: a NumPyro model. Its observed sites are drawn; values that its arguments
            give for them are ignored.
        num_simulations: number of simulations; some thousands.
        *model_args: arguments of the model.
        observed: names of the sites that can be observed. Deterministic sites may be
            among them if they are random given all others, as the output of a
            simulator; others are left out.
        latents: names of the latent sites to learn; None for all. The others are
            integrated out by simulation.
        num_steps: largest number of training steps; None for
            :func:`~numpyro_score.infer.amortized.npse.default_num_steps`. A tenth of
            the simulations is held out and ends training.
        trainer: a trainer of points of shape ``(numbers,)``, of all sites in
            unconstrained space, with ``PerCoordinate`` noise; None for an MLP.
        check: whether to judge the result on held-out simulations, see
            :mod:`~numpyro_score.infer.joint.verdict`, and its draws by the score of
            the model, see :mod:`~numpyro_score.infer.joint.draw_check`.
        progress_bar: whether to show progress.
        model_kwargs: keyword arguments of the model.

    Raises:
        TypeError: for observed sites whose numbers have no supports of their own.
        ValueError: for a model without these sites, discrete latents, sites without a
            density, sites whose support changes, a model that is not a function of its
            key, fewer than 100 simulations, simulated numbers that are rounded to a few
            digits, or a trainer without levels per coordinate.

    Warns:
        UserWarning: for simulations that are dropped, because they are not finite, and
            if the result fails on held-out simulations.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> def model(y=None):
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     with numpyro.plate("rows", 3):
        ...         numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> joint = learn_joint(
        ...     jax.random.key(0), model, 500, observed="y", num_steps=20,
        ...     check=False, progress_bar=False,
        ... )
        >>> y = np.array([0.5, np.nan, 1.0])
        >>> draws = joint.sample(jax.random.key(1), 100, given={"y": y})
        >>> draws["x"].shape, draws["y"][0, 2].item()
        ((100,), 1.0)
    """
    check_key("rng_key", rng_key)
    check_flags(check=check)
    check_count(
        "num_simulations", num_simulations, "what is learned", least=MIN_SIMULATIONS
    )
    key_simulate, key_noise, key_train, key_check = jax.random.split(rng_key, 4)
    simulator = _simulator(model, observed, latents, model_args, model_kwargs)
    columns = observed_columns(simulator.observed)
    net = MLP(simulator.latents.size + len(columns), norm=False)  # as NPSE's
    trainer = conditional_trainer(trainer, net)
    simulations = simulator.simulate(
        key_simulate, num_simulations, progress_bar=progress_bar
    )
    check_digits(simulator, simulations)
    if check:
        warn_of_angles(simulator)
        warn_of_drawn_angles(simulator, simulations)
    simulations, x = unconstrained(key_noise, simulations, columns)
    layout, u = _fit_layout(simulator, columns, simulations)
    count = int(HELD_OUT * len(u))
    held_out, train = u[:count], u[count:]
    steps = default_num_steps(len(train)) if num_steps is None else num_steps
    score = trainer.run(
        key_train,
        steps,
        train,
        validation=repeat_rows(Batch(held_out)),
        patience=PATIENCE,
        progress_bar=progress_bar,
    ).score
    if not check:
        return LearnedJoint(score, layout)
    rows = num_rows(count, steps * BATCH_SIZE, DEFAULT_NUM_STEPS)
    verdict = judge_joint(
        key_check, score, layout, simulator, train, held_out[:rows], x[:rows]
    )
    warn_if_poor(verdict, "The learned joint law fails on held-out simulations")
    return LearnedJoint(score, layout, verdict, simulator)


def _simulator(
    model: Callable,
    observed: str | Sequence[str],
    latents: str | Sequence[str] | None,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
) -> Simulator:
    """Return the simulator of a model whose sites can be learned together."""
    check_callable("model", model, "the simulator of all sites")
    check_names("observed", observed)
    check_names("latents", latents)
    check_keywords("model_kwargs", kwargs)
    kwargs = dict(kwargs or {})
    simulator = Simulator.of(model, observed, latents, args, kwargs, softness=SOFTNESS)
    check_observed(simulator)
    return simulator


def unconstrained(
    rng_key: PRNGKey, simulations: Simulations, columns: tuple[Column, ...]
) -> tuple[Simulations, Float[np.ndarray, "rows _"]]:
    """Return finite simulations in unconstrained space, and what they observe.

    Args:
        rng_key: random key; dequantizes integers.
        simulations: simulations as they are.
        columns: supports of the observed numbers.
    """
    rng = np.random.default_rng(int(jax.random.bits(rng_key)))
    x = simulations.context.reshape(len(simulations.z), -1).astype(np.float64)
    both = np.concatenate([unconstrain_rows(rng, columns, x), x], axis=1)
    kept = drop_nonfinite(simulations.z, both)
    z, x = np.split(kept.context, 2, axis=1)
    return kept._replace(context=z), x


def _fit_layout(
    simulator: Simulator, columns: tuple[Column, ...], simulations: Simulations
) -> tuple[JointLayout, Float[np.ndarray, "rows size"]]:
    """Return the map to standardized vectors, and those of the simulations.

    Args:
        simulator: the model.
        columns: supports of observed numbers.
        simulations: unconstrained values of all sites.

    Raises:
        ValueError: for too few simulations, or numbers without a density.
    """
    z = np.concatenate([simulations.z, simulations.context], axis=1)
    names = (*coordinate_names(simulator.latents), *(c.name for c in columns))
    if len(z) < MIN_SIMULATIONS:
        raise ValueError(
            f"`num_simulations` must leave at least {MIN_SIMULATIONS} simulations that "
            f"are finite. Got {len(z)} of them."
        )
    check_densities(names, z)
    rows = jnp.asarray(z, float)
    scale = replace(ContextScale.fit(rows), rows=None)  # the score keeps them
    scale.check("simulations")
    layout = JointLayout(simulator.latents, simulator.observed, columns, scale)
    return layout, np.asarray(jax.vmap(scale.forward)(rows))


def check_observed(simulator: Simulator) -> None:
    """Raise unless observed sites have fixed supports and are random given all others.

    Raises:
        ValueError: naming the sites that are not.
    """
    observed = simulator.observed
    keys = jax.random.split(jax.random.key(0), (NUM_RUNS, 2))
    sites = simulator.trace(keys[0, 0], {})
    moving = [
        s.name
        for s in observed.sites
        if sites[s.name]["type"] == "sample" and s.support is None
    ]
    if moving:
        raise ValueError(
            "The sites in `observed` must have the same support in every run: they are "
            "learned in unconstrained space. Observe a site of fixed support instead. "
            f"Got {moving}."
        )
    functions = [k for k in observed.names if sites[k]["type"] != "sample"]
    for key, other in keys if functions else ():
        sites = simulator.trace(key, {})
        drawn = {*simulator.latents.names, *observed.names} - set(functions)
        again = simulator.trace(other, {k: sites[k]["value"] for k in drawn})
        functions = [k for k in functions if same_value(sites[k], again[k])]
    if functions:
        raise ValueError(
            "The sites in `observed` must be random given all other sites: functions "
            "of them have no density beside them. Leave these out of `observed`, or "
            "leave what they are functions of out of `latents` and `observed`. "
            f"Got {functions}."
        )
