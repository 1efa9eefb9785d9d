r"""ScoreSDE: posteriors of models with learned sites, by a guided reverse SDE.

Particles go from noise to data along the reverse SDE of the learned laws, guided by the
likelihood and weighted so that guidance is only a proposal (twisted sequential Monte
Carlo, Wu et al. 2023). See :mod:`numpyro_score.infer.twisted.sampler` for the
algorithm.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.diagnostics import print_summary
from numpyro.util import is_prng_key
from tqdm.auto import tqdm

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import (
    check_count,
    check_flags,
    check_keys,
    check_kind,
    check_levels_or_number,
    check_probability,
    count_levels,
    is_integer,
)
from numpyro_score.infer.twisted.coordinate_observations import Conditioning
from numpyro_score.infer.twisted.guidance import Guidance
from numpyro_score.infer.twisted.replicates import (
    MIN_EVIDENCE_ESS,
    ChainResult,
    SamplerSizes,
    check_result,
    find_degeneracies,
    pooled_evidence,
)
from numpyro_score.infer.twisted.run import (
    RunSettings,
    StaticArguments,
    check_covariance,
    check_num_particles,
    choose_covariance,
    count_devices,
    find_draws_off_data,
    learned_covariances,
    learned_times,
    model_arguments,
    run_chains,
)
from numpyro_score.model.noise_levels import level_times
from numpyro_score.model.reparam import separate_transforms
from numpyro_score.model.trace_checks import check_observations
from numpyro_score.reprs import repr_lines, short_repr
from numpyro_score.run_verdict import Verdict
from numpyro_score.typing import PRNGKey

PER_DRAW = ("ancestor",)  # extra fields with one value per draw


class ScoreSDE:
    r"""Posterior draws of a model with learned sites, with evidence.

    The model is any NumPyro model with at least one latent
    :class:`~numpyro_score.ScoreDistribution`, a differentiable likelihood, and ordinary
    continuous sites beside it. The object is used like ``numpyro.infer.MCMC``.

    *Exact or approximate.* Weights correct for everything that guidance leaves out, so
    draws and evidence are those of the learned prior, with its reverse SDE divided into
    ``levels`` steps, as ``num_particles`` grows. Draws of one SMC run share
    ancestors, and the shares of separate modes carry the error of few independent
    particles: chains repeat everything, and :meth:`print_summary` shows how far they
    agree.

    Each chain is an independent replicate, made of as many SMC runs as ``num_samples``
    needs particles; they are weighted by their evidence.

    Args:
        model: a NumPyro model.
        num_samples: draws per chain.
        num_particles: particles per SMC run.
        num_chains: independent replicates; devices share them.
        levels: number of noise levels, or decreasing levels in units of the data's sd.
        guidance: None for the weighted sampler. With
            :class:`~numpyro_score.infer.DPS`,
            :class:`~numpyro_score.infer.PseudoinverseGuidance` or
            :class:`~numpyro_score.infer.MomentMatching` particles are
            guided and neither weighted nor moved: fast and *approximate*, without
            evidence.
        covariance: of x_0 given x_t, which widens the likelihood of a noisy point.
            "jacobian" takes it at each particle from derivatives of the score,
            one for each observed Normal number; "fixed" measures one for each noise
            level, once for a score, from draws of it (see
            :mod:`numpyro_score.model.level_covariance`). Weights correct for either.
            None takes "fixed" where "jacobian" needs more than 8 derivatives; and where
            a learned site's score takes one noise level per coordinate, observed sites
            that are Normal around single coordinates condition the score and are not
            weighted (:mod:`~numpyro_score.infer.twisted.coordinate_observations`).
        num_moves: Langevin moves of each draw at the end, which split draws that share
            an ancestor.
        progress_bar: whether to show progress.

    Raises:
        ValueError: for numbers out of range, and at :meth:`run` for a model without
            learned sites, with discrete latent ones, with improper priors, or with a
            likelihood or score that is zero or NaN at all particles; the message says
            which.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_score import ScoreDistribution, ScoreModel, VE
        >>> normal = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=()
        ... )
        >>> def model(y):
        ...     x = numpyro.sample("x", ScoreDistribution(normal))
        ...     numpyro.sample("y", dist.Normal(x, 1), obs=y)
        >>> inference = ScoreSDE(
        ...     model, num_samples=500, num_particles=500, levels=50,
        ...     progress_bar=False,
        ... )
        >>> inference.run(jax.random.key(0), jnp.array(2.0))
        >>> bool(abs(inference.get_samples()["x"].mean() - 1.0) < 0.15)
        True
        >>> evidence = dist.Normal(0, 2**0.5).log_prob(2.0)
        >>> bool(abs(inference.log_evidence - evidence) < 0.1)
        True
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_samples: int,
        num_particles: int = 1000,
        num_chains: int = 1,
        levels: int | Sequence[float] = 200,
        guidance: Guidance | None = None,
        covariance: str | None = None,
        num_moves: int = 20,
        progress_bar: bool = True,
    ) -> None:
        check_count("num_samples", num_samples, "the number of draws per chain")
        check_count("num_chains", num_chains, "the number of replicates")
        if not callable(model):
            raise TypeError(f"`model` must be a NumPyro model. Got {model!r}.")
        check_levels_or_number(levels)
        check_flags(progress_bar=progress_bar)
        check_count("num_moves", num_moves, "a number of moves", least=0)
        what = "None or an object such as DPS(): it moves the particles"
        check_kind("guidance", guidance, (Guidance, type(None)), what)
        _check_covariance(covariance, guidance)
        check_num_particles(num_particles)
        self.model: Callable = separate_transforms(model)
        self.num_samples = num_samples
        self.num_particles = num_particles
        self.num_chains = num_chains
        given: Any = levels
        self.levels = int(given) if is_integer(given) else tuple(given)
        self.guidance = guidance
        self.covariance = covariance
        self.num_moves = num_moves
        self.progress_bar = progress_bar
        self._args: tuple = ()
        self._kwargs: dict = {}
        self._result: ChainResult | None = None
        self._verdict = Verdict(())
        self.covariance_used: str | None = covariance
        self._given: str | None = None  # what is observed without weights
        self._bar: Any = None

    def __repr__(self) -> str:
        guidance = "none" if self.guidance is None else short_repr(self.guidance)
        rows = {
            "model": short_repr(self.model),
            "draws": f"{self.num_samples} per chain, {self.num_chains} chains",
            "particles": str(self.num_particles),
            "noise levels": str(count_levels(self.levels)),
            "guidance": guidance,
            "covariance": self.covariance_used or "by the number of observations",
            "run": "no" if self._result is None else "yes",
        }
        if self._given is not None:
            rows["exactly observed"] = self._given
        return repr_lines(type(self).__name__, rows)

    @property
    def num_smc_runs(self) -> int:
        """SMC runs per chain: as many as its draws need particles."""
        return -(-self.num_samples // self.num_particles)

    def run(self, rng_key: PRNGKey, *args: Any, **kwargs: Any) -> None:
        """Draw from the posterior given the model's arguments.

        A second run with arguments of the same shapes uses the compiled program again.

        Args:
            rng_key: random key, or one per chain.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.

        Raises:
            ValueError: see the class.
        """
        keys = self._keys(rng_key)
        check_observations(self.model, args, kwargs)
        static, arrays = whole = model_arguments(self.model, args, kwargs)
        sizes = SamplerSizes(
            self.num_samples,
            self.num_smc_runs,
            self.num_particles,
            self.num_moves,
            self.guidance,
        )
        report = self._advance if self.progress_bar else None
        model, given = self.model, None
        if self.guidance is None and self.covariance is None:
            given = Conditioning.of(model, static, arrays)
        if given is not None:
            model, static, arrays = given.model, given.static, given.arrays
        settings = RunSettings(model, static, sizes, report)
        learned = learned_times(arrays, model, static)
        ts = jnp.asarray(level_times(self.levels, learned))
        with self._progress():
            covariances = self._covariances(arrays, settings)
            result = self._run_chains(keys, ts, arrays, settings, covariances)
        check_result(result)
        self._given = None if given is None else given.describe()
        if given is not None:
            result = given.with_evidence(result)
        self._args, self._kwargs, self._result = args, kwargs, result
        self._verdict = Verdict(())
        if self.guidance is None:
            self._verdict = self._judge(*whole)
        for finding in self._verdict.findings:
            warn_caller(f"ScoreSDE: {finding}")

    def _judge(self, static: StaticArguments, arrays: list[Array]) -> Verdict:
        """Return what is wrong with the draws."""
        result = self._finished
        off = find_draws_off_data(result.samples, self.model, static, arrays)
        return Verdict((*find_degeneracies(result), *off))

    @property
    def verdict(self) -> Verdict:
        """The findings on the draws of the last run.

        Raises:
            RuntimeError: before a run.
            ValueError: after a run by guidance, which is approximate and not judged.
        """
        _ = self._finished
        if self.guidance is not None:
            name = type(self.guidance).__name__
            raise ValueError(
                "`guidance` must be None for a verdict on the draws: guided ones are "
                f"approximate however well they were drawn. Got {name}."
            )
        return self._verdict

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Array]:
        """Return equally weighted draws of all sites, deterministic ones included.

        Args:
            group_by_chain: whether to keep the axis of chains.
        """
        samples = self._finished.samples
        return samples if group_by_chain else _flatten(samples)

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Array]:
        """Return what is known of SMC runs and draws.

        ``ancestor`` has one number per draw: draws with equal ones share a particle of
        the first level. ``weights`` (of the particles at the lowest level), ``ess``
        (after each level), ``log_evidence``, ``log_evidence_variance``,
        ``num_ancestors``, ``effective_num_ancestors`` (how many of equal weight tell as
        much), ``ordinary_accept_prob``, ``initial_ess`` (of the first level),
        ``signal_to_noise`` (the sd of the data along their longest axis over the sd of
        the noise of the first level) and ``failures`` (how many particles lost their
        weight, by level and kind of
        :class:`~numpyro_score.infer.twisted.failures.Failure`) have one row per SMC
        run, ``accept_prob`` one number per chain.

        Args:
            group_by_chain: whether to keep the axis of chains.
        """
        fields = self._finished._asdict()
        del fields["samples"]
        if group_by_chain:
            return fields
        per_chain = {"accept_prob": fields.pop("accept_prob")}
        return {**_flatten(fields), **per_chain}

    @property
    def log_evidence(self) -> float:
        """The log evidence, in nats: log of the mean over all SMC runs."""
        return self._evidence[0]

    @property
    def log_evidence_error(self) -> float:
        """The standard error of the log evidence, in nats.

        From shared ancestors, or from the differences of SMC runs where larger.
        It is understated where few particles carried a run, unless several runs
        show it.
        """
        return self._evidence[1]

    def print_summary(self, prob: float = 0.9) -> None:
        """Print a summary of the draws, of the evidence and of warnings.

        Draws that share ancestors are neighbors, so that effective sample sizes count
        them; R-hat compares chains.

        Args:
            prob: probability mass of the intervals.
        """
        result = self._finished
        check_probability("prob", prob, "the probability mass of the intervals")
        print_summary(result.samples, prob=prob)
        if self.guidance is not None:
            name = type(self.guidance).__name__
            print(f"Approximate by {name}: {self.guidance.approximation}.")
            return
        share = float(np.min(result.ess)) / self.num_particles
        remark = " (or more: few particles carried a level)"
        if self._given is not None:
            print(f"Exactly observed: {self._given}")
        print(
            f"Covariance of x_0 given x_t: {self.covariance_used}\n"
            f"Log evidence: {self.log_evidence:.2f} +- {self.log_evidence_error:.2f}"
            f"{remark if share < MIN_EVIDENCE_ESS else ''}\n"
            f"Smallest effective sample size: {100 * share:.0f} % of the particles\n"
            f"Particles of the first level with descendants: "
            f"{int(np.min(result.num_ancestors))} of {self.num_particles}",
            *self._verdict.findings,
            sep="\n",
        )

    @property
    def _finished(self) -> ChainResult:
        if self._result is None:
            raise RuntimeError("`run` must be called first: there are no draws yet.")
        return self._result

    @property
    def _evidence(self) -> tuple[float, float]:
        result = self._finished
        if self.guidance is not None:
            raise RuntimeError(
                "The evidence needs weights, which guidance alone does not have. Use "
                f"`guidance=None`. Got {self.guidance}."
            )
        value, error = pooled_evidence(result)
        return float(value), float(error)

    def _keys(self, rng_key: PRNGKey) -> PRNGKey:
        """Return one typed key per chain."""
        check_keys("rng_key", rng_key)
        if not jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key):
            rng_key = jax.random.wrap_key_data(rng_key)
        if is_prng_key(rng_key):
            return jax.random.split(rng_key, self.num_chains)
        if rng_key.shape != (self.num_chains,):
            raise ValueError(
                "`rng_key` must be one key, or one per chain. "
                f"Got {rng_key.shape}, num_chains={self.num_chains}."
            )
        return rng_key

    def _covariances(self, arrays: list[Array], settings: RunSettings) -> Any:
        """Return the covariances of all levels, or None for those of each point."""
        used = self.covariance or "jacobian"
        if self.covariance is None and self.guidance is None:
            used = choose_covariance(arrays, settings.model, settings.static)
        self.covariance_used = used
        if used == "jacobian":
            return None
        return learned_covariances(arrays, settings.model, settings.static)

    def _run_chains(
        self,
        keys: PRNGKey,
        ts: Array,
        arrays: list[Array],
        settings: RunSettings,
        covariances: Any,
    ) -> ChainResult:
        """Return the results of all chains, after Ctrl-C of those that have ended."""
        size = count_devices(self.num_chains)
        done: list[ChainResult] = []
        try:
            for start in range(0, self.num_chains, size):
                some = keys[start : start + size]
                result = run_chains(some, ts, arrays, settings, size, covariances)
                done.append(jax.block_until_ready(result))
        except KeyboardInterrupt as interrupt:
            if not done:
                interrupt.add_note(
                    "ScoreSDE: interrupted before a chain had ended, so there are no "
                    "draws. Chains that have ended are kept: run several shorter ones "
                    "by `num_chains`."
                )
                raise
            warn_caller(
                f"ScoreSDE: interrupted after {len(done) * size} of {self.num_chains} "
                "chains. Draws and evidence are those of these chains."
            )
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *done)

    def _progress(self) -> Any:
        total = (count_levels(self.levels) + 1) * self.num_smc_runs * self.num_chains
        self._bar = tqdm(total=total, disable=not self.progress_bar, unit="level")
        return self._bar

    def _advance(self, num_levels: Any) -> None:
        self._bar.update(int(num_levels))


def _check_covariance(covariance: Any, guidance: Guidance | None) -> None:
    """Raise for a name that is none, and for guidance, which brings its own."""
    check_covariance(covariance)
    if covariance == "fixed" and guidance is not None:
        raise ValueError(
            '`covariance="fixed"` is of the weighted sampler: guidance alone brings '
            f"its own covariance. Got guidance={short_repr(guidance)}."
        )


def _flatten(tree: dict[str, Array]) -> dict[str, Array]:
    """Return chains and what follows along one axis."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
