"""Amortized posteriors: draws and densities given any observation."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_score.checks import (
    check_count,
    check_key,
    check_kind,
    check_known,
    is_traced,
)
from numpyro_score.infer.amortized.calibration import Calibration, calibrate
from numpyro_score.infer.amortized.composition import (
    NUM_DRAWS,
    Composition,
    GaussianComposition,
    compose,
)
from numpyro_score.infer.amortized.draw_check import (
    REMEDY,
    warn_of_wrong_draws,
    warn_of_wrong_rows,
)
from numpyro_score.infer.amortized.fit_verdict import FitVerdict
from numpyro_score.infer.amortized.importance import (
    FEW_DRAWS,
    MIN_DRAWS,
    ImportanceResult,
    log_ratios,
    psis,
)
from numpyro_score.infer.amortized.observation_check import (
    context_map_of,
    warn_of_far_observations,
)
from numpyro_score.infer.amortized.prior_denoiser import factorized_prior_denoiser
from numpyro_score.infer.amortized.sampling import (
    PosteriorGivenData,
    SamplingSettings,
    check_finite,
    draw,
    draw_each,
)
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.infer.amortized.storage import save_posterior
from numpyro_score.model.latents import LatentLayout, Values, as_values
from numpyro_score.renamed_arguments import renamed
from numpyro_score.reprs import repr_lines, short_repr
from numpyro_score.score.model import ScoreModel
from numpyro_score.solver import DPMSolverPP, Solver
from numpyro_score.typing import PRNGKey

# of DPMSolverPP(2) per draw: on VE(0.002, 300) 0.19 of log sigma per step, below the
# 0.24 at which it is at the floor (32 steps on VE(0.01, 20),
# docs/choosing-a-sampler.md)
NUM_STEPS = 64
PLATE_REMEDY = (
    "The net's errors add up over observations: pass fewer, train on more simulations, "
    "use NPSE with `plate`, or MCMC. `fit(check=False)` silences this."
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AmortizedPosterior(PosteriorGivenData):
    """The posterior of a NumPyro model as a function of the observation; a pytree.

    From :meth:`NPSE.fit <numpyro_score.infer.amortized.npse.NPSE.fit>` or
    :meth:`NPSE.load <numpyro_score.infer.amortized.npse.NPSE.load>`.

    Args:
        score: score of the latents in unconstrained space, given the observation.
        simulator: the model, its arguments and the layout of its sites.
        solver: solver of all draws.
        num_steps: steps of the solver, geometric in the noise level.
        verdict: on held-out simulations, at the end of training; None for none.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_score import MLP, NPSE
        >>> def model():
        ...     x = numpyro.sample("x", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(x, 1))
        >>> npse = NPSE(model, "y", net=MLP(1, width=8, depth=1, context_size=1))
        >>> key = jax.random.key(0)
        >>> posterior = npse.fit(key, 100, num_steps=2, progress_bar=False)  # too short
        >>> posterior.sample(jax.random.key(1), 0.5, 10)["x"].shape
        (10,)
    """

    score: ScoreModel
    simulator: Simulator = field(metadata={"static": True})
    solver: Solver = field(default=DPMSolverPP(), metadata={"static": True})
    num_steps: int = field(default=NUM_STEPS, metadata={"static": True})
    verdict: FitVerdict | None = field(default=None, metadata={"static": True})

    measured = "; `calibration` and `importance` measure it"

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "a solver, such as DPMSolverPP()")
        check_count("num_steps", self.num_steps, "a number of steps of the solver")

    def __repr__(self) -> str:
        return repr_lines(type(self).__name__, self.summary())

    def summary(self) -> dict[str, str]:
        """Return what the repr says, by name: no arrays."""
        solver = f"{short_repr(self.solver)}, {self.num_steps} steps"
        judged = {} if self.verdict is None else {"verdict": self.verdict.headline}
        if self.simulator.intractable:
            judged["draws"] = f"not judged: {self.simulator.intractable}"
        rows = self.simulator.summary() | self.score.summary()
        return rows | {"solver": solver} | judged

    @property
    def latents(self) -> LatentLayout:
        """The map from latent sites to z."""
        return self.simulator.latents

    def sample(
        self, rng_key: PRNGKey, observation: Any, num_samples: int = 1000
    ) -> dict[str, Array]:
        """Return independent posterior draws given one observation.

        Compiled once per number of draws; other observations, or the weights of another
        training, run the same program.

        Args:
            rng_key: random key.
            observation: observed value, an array of the observed site's shape, or a
                dict of arrays by site.
            num_samples: number of draws.

        Returns:
            Draws of every latent site, in its support.

        Raises:
            FloatingPointError: if a draw is not finite.
            ValueError: for observations of another shape or with NaN.

        Warns:
            UserWarning: for observations outside of the support of their site, or far
                from all simulations. For 64 draws or more that the exact score of the
                model shows to be wrong, unless the posterior was fitted with
                ``check=False``: see :mod:`~numpyro_score.infer.amortized.draw_check`.
        """
        context = self._context(observation)
        draws = self._run(rng_key, context, num_samples)
        return self._judged(draws, context[None], REMEDY)

    def sample_each(
        self, rng_key: PRNGKey, observations: Any, num_samples: int = 1000
    ) -> dict[str, Array]:
        """Return ``num_samples`` draws given each of many observations.

        Args:
            rng_key: random key.
            observations: one observation per row, as in :meth:`sample`.
            num_samples: number of draws per observation.

        Returns:
            Draws of every latent site, of shape (rows, ``num_samples``, ...).

        Warns:
            UserWarning: as :meth:`sample`; draws of at most 100 rows are judged.
        """
        contexts = self._context(observations, batch_ndims=1)
        draws = self._run_each(rng_key, contexts, num_samples)
        if self.verdict is not None and not is_traced(draws):
            warn_of_wrong_rows(self.simulator, self.latents.flatten(draws), contexts)
        return draws

    def log_prob(
        self, samples: Values, observation: Any, *, rtol: float = 1e-4
    ) -> Float[Array, "*batch"]:
        """Return the log posterior density at values of the latent sites, in nats.

        The density of the probability flow in z less the log Jacobian of the sites in
        z; -inf outside the supports.

        Args:
            samples: values of every latent site, with equal batch shapes.
            observation: observed value, as in :meth:`sample`.
            rtol: relative and absolute tolerance of the flow's integration.

        Raises:
            ValueError: for other sites or shapes than the model's.
        """
        context = self._context(observation)
        values = as_values("samples", samples)
        z = self.latents.flatten(values)
        inside = self.latents.in_support(values) & jnp.isfinite(z).all(-1)
        z = jnp.where(inside[..., None], z, 0.0)
        value = self.score.log_prob(z, context=context, rtol=rtol, atol=rtol)
        return jnp.where(inside, value - self.latents.log_abs_det_jacobian(z), -jnp.inf)

    @renamed(num_draws="num_samples")
    def calibration(
        self,
        rng_key: PRNGKey,
        num_simulations: int = 300,
        *,
        num_samples: int = 99,
        observation: Any = None,
        num_null: int = 100,
        classifier: Any = None,
        progress_bar: bool = True,
    ) -> Calibration:
        """Return checks of calibration on new simulations of the model.

        Args:
            rng_key: random key.
            num_simulations: number of simulations; a few hundred.
            num_samples: posterior draws per simulation.
            observation: observation of a local test in the latent space of the flow;
                None for no local test. Requires scikit-learn.
            num_null: classifiers for the null distribution of the local test.
            classifier: classifier of the local test; None for a multilayer perceptron.
            progress_bar: whether to show simulations, then phases.

        Returns:
            Ranks (SBC), expected coverage (TARP) and, if requested, the local test
            (l-C2ST).
        """
        return calibrate(
            self,
            rng_key,
            num_simulations,
            num_samples,
            observation,
            num_null=num_null,
            classifier=classifier,
            progress_bar=progress_bar,
        )

    def warm_start(
        self, rng_key: PRNGKey, observation: Any, num_chains: int = 1
    ) -> dict[str, Array]:
        """Return initial values for MCMC on the model: unconstrained posterior draws.

        For ``MCMC(kernel, ...).run(key, ..., init_params=starts)``. Latent sites that
        were not learned are drawn from their prior given the others.

        Args:
            rng_key: random key.
            observation: observed value, as in :meth:`sample`.
            num_chains: number of chains; if above 1, values have it as leading axis.
        """
        check_key("rng_key", rng_key)
        key_draw, key_rest = jax.random.split(rng_key)
        draws = self.sample(key_draw, observation, num_chains)
        keys = jax.random.split(key_rest, num_chains)
        z = self.latents.flatten(draws)
        draws |= jax.vmap(self.simulator.draw_nuisance)(keys, z)
        starts = jax.vmap(self.simulator.to_numpyro)(draws)
        return starts if num_chains > 1 else {k: v[0] for k, v in starts.items()}

    def with_solver(self, solver: Solver, num_steps: int) -> "AmortizedPosterior":
        """Return the posterior with another solver for draws."""
        return replace(self, solver=solver, num_steps=num_steps)

    def save(self, path: str | os.PathLike) -> None:
        """Save weights, layout and settings in a new folder, without the model's code.

        Args:
            path: path of the new folder.

        Raises:
            FileExistsError: if ``path`` exists.
        """
        save_posterior(self.score, self.simulator, path, self.verdict)

    def importance(
        self, rng_key: PRNGKey, observation: Any, num_samples: int = 1000
    ) -> ImportanceResult:
        """Return draws with importance weights for the exact posterior.

        Pareto-smoothed importance sampling with the joint density of the model, see
        :mod:`~numpyro_score.infer.amortized.importance`.

        Args:
            rng_key: random key.
            observation: observed value, as in :meth:`sample`.
            num_samples: number of draws.

        Returns:
            Weighted draws with k-hat and evidence; ``resample`` returns corrected
            draws.

        Raises:
            ValueError: if the likelihood is not tractable: a deterministic observed
                site, or latent sites that were not learned.
        """
        check_known("importance", rng_key=rng_key, observation=observation)
        self.simulator.check_tractable()
        check_count("num_samples", num_samples, FEW_DRAWS, least=MIN_DRAWS)
        context = self._context(observation)
        samples = self._run(rng_key, context, num_samples)
        z = self.latents.flatten(samples)
        return psis(samples, log_ratios(self.score, self.simulator, z, context))

    def sample_plate(
        self,
        rng_key: PRNGKey,
        observations: Any,
        num_samples: int = 1000,
        *,
        composition: Composition = GaussianComposition(),
        learned_prior: bool = False,
    ) -> dict[str, Array]:
        """Return draws given several observations, independent given the latents.

        The denoiser given all observations is composed from those given one, see
        :mod:`~numpyro_score.infer.amortized.composition`. The net's errors accumulate
        over the observations. Compiled once per number of rows.

        Args:
            rng_key: random key.
            observations: one observation per row.
            num_samples: number of draws.
            composition: rule for the precisions of the factors.
            learned_prior: whether the net also learned the prior's score, by training
                with ``drop_context``. If False the prior must be a product over the
                coordinates of z, and its score is computed.

        Raises:
            ValueError: if ``learned_prior`` is False and the prior is not a product.

        Warns:
            UserWarning: as :meth:`sample`.
        """
        check_key("rng_key", rng_key)
        check_known("sample_plate", rng_key=rng_key, observations=observations)
        key_each, key_prior, key_draw = jax.random.split(rng_key, 3)
        contexts = self._context(observations, batch_ndims=1)
        each = self._run_each(key_each, contexts, NUM_DRAWS)
        prior: Callable = self.score.denoiser
        keys = jax.random.split(key_prior, 4 * NUM_DRAWS)
        prior_draws = self.simulator.draw_latents(keys)
        if not learned_prior:
            prior = factorized_prior_denoiser(
                self.simulator, self.score.standardize, prior_draws
            )
        score = compose(
            self.score,
            prior,
            contexts,
            self.latents.flatten(each),
            prior_draws,
            composition,
        )
        draws = replace(self, score=score)._run(key_draw, None, num_samples)
        return self._judged(draws, contexts, PLATE_REMEDY)

    def _judged(
        self, draws: dict[str, Array], contexts: Array, remedy: str
    ) -> dict[str, Array]:
        """Return draws; warn if the exact score of the model shows them to be wrong."""
        if self.verdict is not None and not is_traced(draws):
            z = self.latents.flatten(draws)
            warn_of_wrong_draws(self.simulator, z, contexts, remedy)
        return draws

    def _context(self, observation: Any, *, batch_ndims: int = 0) -> Array:
        """Return the context of an observation; warn if it is far from simulations.

        Values of one that is traced are not checked.
        """
        observed, scale = self.simulator.observed, context_map_of(self.score)
        if is_traced(observation):
            return observed.parse(observation, batch_ndims=batch_ndims)
        with jax.ensure_compile_time_eval():  # known values, also inside of `jax.jit`
            context = observed.parse(observation, batch_ndims=batch_ndims)
            warn_of_far_observations(observed, context, scale, batch_ndims=batch_ndims)
        return context

    def _run(
        self, rng_key: PRNGKey, context: Array | None, num_samples: int
    ) -> dict[str, Array]:
        _check_draws(rng_key, num_samples)
        return self._checked(draw, rng_key, context, num_samples)

    def _run_each(
        self, rng_key: PRNGKey, contexts: Array, num_samples: int
    ) -> dict[str, Array]:
        _check_draws(rng_key, num_samples)
        keys = jax.random.split(rng_key, len(contexts))
        return self._checked(draw_each, keys, contexts, num_samples)

    def _checked(
        self,
        program: Callable,
        keys: PRNGKey,
        contexts: Array | None,
        num_samples: int,
    ) -> dict[str, Array]:
        """Return draws by ``draw`` or ``draw_each``; raise if one is not finite."""
        settings = SamplingSettings(self.latents, self.solver, self.num_steps)
        draws, finite = program(
            self.score, keys, contexts, settings=settings, num_samples=num_samples
        )
        check_finite(finite)
        return draws


def _check_draws(rng_key: PRNGKey, num_samples: int) -> None:
    check_key("rng_key", rng_key)
    check_count("num_samples", num_samples, "the number of draws")
