"""Calibration of an amortized posterior on simulations of its model.

Ranks of the true parameters (SBC, Talts et al. 2018), coverage of random credible
regions (TARP, Lemos et al. 2023) and, for one observation, a local classifier
two-sample test (l-C2ST, Linhart et al. 2023), over some hundreds of simulations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm.auto import tqdm

from numpyro_score.checks import check_count, check_flags, check_key
from numpyro_score.diagnostics.lc2st import LC2STResult, lc2st_latent
from numpyro_score.diagnostics.sbc import SBCResult, sbc_ranks
from numpyro_score.diagnostics.tarp import TARPResult, tarp
from numpyro_score.diagnostics.uniformity import plot_pit
from numpyro_score.infer.amortized.fit_verdict import (
    JOINT_DRAWS,
    MIN_ROWS,
    FitVerdict,
    coordinate_names,
    joint_densities,
    judge_fit,
)
from numpyro_score.infer.amortized.rank_regression import predict_scores
from numpyro_score.infer.amortized.sampling import DRAW_BATCH_SIZE
from numpyro_score.infer.amortized.simulator import Simulations
from numpyro_score.model.latents import LatentLayout
from numpyro_score.reprs import repr_lines
from numpyro_score.solver import Geometric, encode
from numpyro_score.typing import PRNGKey


class Calibration(NamedTuple):
    """Result of :meth:`AmortizedPosterior.calibration`.

    - **sbc**: ranks of the true parameters among the draws, by site, and of the joint
      log density, "log_joint", if the likelihood is tractable.
    - **tarp**: expected coverage of the joint posterior in unconstrained space.
    - **lc2st**: local test at one observation, or None.
    - **fit**: verdict with direction and size of errors by coordinate.

    Its text holds the p-values and, in words, direction and size.
    """

    sbc: SBCResult
    tarp: TARPResult
    lc2st: LC2STResult | None
    fit: FitVerdict

    def __repr__(self) -> str:
        local = (
            {} if self.lc2st is None else {"l-C2ST": f"p = {self.lc2st.p_value:.2g}"}
        )
        rows = {
            "SBC": f"p = {self.sbc.test.p_value:.2g}",
            "TARP": f"area {self.tarp.area_z:+.1f} standard errors",
        }
        return repr_lines(type(self).__name__, rows | local | self.fit.describe())

    def plot(self) -> Any:
        """Return ArviZ's plot of the ECDFs of ranks and coverage with their bands."""
        return plot_pit({**self.sbc.pit, **self.tarp.pit})


def calibrate(
    posterior: Any,
    rng_key: PRNGKey,
    num_simulations: int,
    num_draws: int,
    observation: Any = None,
    *,
    num_null: int = 100,
    classifier: Any = None,
    progress_bar: bool = True,
) -> Calibration:
    """Return SBC, TARP and the local test of a posterior.

    Args:
        posterior: an :class:`~numpyro_score.infer.AmortizedPosterior`.
        rng_key: random key.
        num_simulations: number of simulations.
        num_draws: posterior draws per simulation.
        observation: observation of the local test; None for no local test.
        num_null: classifiers for the null distribution of the local test.
        classifier: classifier of the local test; None for a multilayer perceptron.
        progress_bar: whether to show simulations, then phases.
    """
    check_key("rng_key", rng_key)
    check_flags(progress_bar=progress_bar)
    why = "the number of simulations, whose ranks are compared"
    check_count("num_simulations", num_simulations, why, least=2)
    check_count("num_samples", num_draws, "the number of draws, which give ranks")
    keys = jax.random.split(rng_key, 5)
    simulations = posterior.simulator.simulate(
        keys[0], num_simulations, progress_bar=progress_bar
    )
    options = {"num_null": num_null, "classifier": classifier}
    num_phases = 4 if observation is None else 5
    with tqdm(total=num_phases, disable=not progress_bar, unit="phase") as bar:
        return _judge(
            posterior, keys, simulations, num_draws, observation, options, bar
        )


def _judge(
    posterior: Any,
    keys: PRNGKey,
    simulations: Simulations,
    num_draws: int,
    observation: Any,
    options: dict[str, Any],
    bar: tqdm,
) -> Calibration:
    """Return the checks on given simulations, and show each phase as it begins."""
    simulator, latents = posterior.simulator, posterior.latents
    bar.set_description("draws")
    contexts = jnp.asarray(simulations.context)
    draws = posterior._run_each(keys[1], contexts, num_draws)
    _advance(bar, "densities")
    truths = latents.unflatten(jnp.asarray(simulations.z))
    z = np.asarray(latents.flatten(draws))
    joint = joint_densities(simulator, simulations.z, z, simulations.context)
    if joint is not None:
        truths |= {"log_joint": joint[:, 0]}
        draws |= {"log_joint": joint[:, 1:]}
        joint = joint[:, : 1 + JOINT_DRAWS]
    _advance(bar, "ranks")
    ranks = sbc_ranks(keys[2], truths, draws)
    local = None
    if observation is not None:
        _advance(bar, "local test")
        local = lc2st_latent(
            keys[3],
            _encode_each(posterior, simulations.z, simulations.context),
            simulations.context,
            np.asarray(simulator.observed.parse(observation)),
            **options,
        )
    _advance(bar, "verdict")
    coverage = tarp(keys[4], simulations.z, z)
    fit = cross_verdict(latents, simulations, z, joint)
    bar.update()
    return Calibration(ranks, coverage, local, fit)


def _advance(bar: tqdm, phase: str) -> None:
    """Count a phase, and name the next one."""
    bar.update()
    bar.set_description(phase)


def cross_verdict(
    latents: LatentLayout,
    simulations: Simulations,
    draws: np.ndarray,
    log_joint: np.ndarray | None = None,
) -> FitVerdict:
    """Return the verdict on draws, with regressions fitted on the other half each.

    Args:
        latents: layout of the latents.
        simulations: of the model.
        draws: of the posterior given each of their observations.
        log_joint: of z and of draws; None if it is not tractable.
    """
    z, contexts, _ = simulations
    if len(z) < MIN_ROWS:
        return FitVerdict((), len(z))
    half = len(z) // 2
    first = predict_scores(z[half:], contexts[half:], contexts[:half])
    second = predict_scores(z[:half], contexts[:half], contexts[half:])
    return judge_fit(
        np.random.default_rng(0),  # splits ranks only
        coordinate_names(latents),
        z,
        draws,
        z,
        np.concatenate([first, second]),
        log_joint,
    )


def _encode_each(posterior: Any, z: Any, contexts: Any) -> np.ndarray:
    """Return the noise of each z under the flow given its own observation.

    Standard normal and independent of the observation if the posterior is exact.
    """
    score, sde = posterior.score, posterior.score.sde
    ts = Geometric()(sde, posterior.num_steps)

    @jax.jit
    def encode_all(z: Array, contexts: Array) -> Array:
        def one(row: tuple[Array, Array]) -> Array:
            point, context = row
            top = encode(score, point, solver=posterior.solver, ts=ts, context=context)
            return score.standardize.forward(top) / sde.prior_scale()

        return jax.lax.map(one, (z, contexts), batch_size=DRAW_BATCH_SIZE)

    return np.asarray(encode_all(jnp.asarray(z), jnp.asarray(contexts)))
