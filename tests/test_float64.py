"""Where float64 is JAX's default, results are float64 from key to tree of draws."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_score import (
    MLP,
    NPSE,
    VE,
    VP,
    AnnealedLangevin,
    ParallelTempering,
    RectifiedFlow,
    ScoreDistribution,
    ScoreLangevin,
    ScoreMatching,
    ScoreModel,
    ScoreSDE,
    SubVP,
    solver,
    to_datatree,
)
from numpyro_score.infer import ParticleMetropolis

KEY, SDE = jax.random.key(0), VE()
NORMAL = ScoreModel.from_fn(lambda x, t: -x / (1 + SDE.sigma(t) ** 2), SDE, ())
SOLVERS = (
    solver.Heun(),
    solver.Ancestral(),
    solver.AdamsBashforth(),
    solver.UniPC(),
    solver.DPMSolverSDE(),
    solver.PredictorCorrector(),
    solver.Adaptive(),
)
SLOW = pytest.mark.slow
KERNELS = (
    ScoreLangevin,
    pytest.param(partial(AnnealedLangevin, levels=3), marks=SLOW),
    pytest.param(partial(ParallelTempering, num_rungs=3), marks=SLOW),
    pytest.param(partial(ParticleMetropolis, num_particles=4, levels=5), marks=SLOW),
)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Make float64 the default of arrays."""
    with jax.enable_x64(True):
        yield


def learned(y: Any = None) -> None:
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def pair(y: Any = None) -> None:
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0).expand([2]).to_event(1), obs=y)


def narrow(tree: Any) -> list[str]:
    """Return the names of floating-point leaves that are not float64."""
    return [
        f"{jax.tree_util.keystr(path)}: {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(getattr(leaf, "dtype", int), jnp.floating)
        and leaf.dtype != jnp.float64
    ]


def test_narrow_leaves_are_found():
    assert narrow({"a": np.zeros(1), "b": np.zeros(1, "f4")}) == ["['b']: float32"]


@pytest.mark.parametrize("sde", [VE(), VP(), SubVP(), RectifiedFlow()], ids=repr)
def test_score_density_and_draws(sde):
    score = ScoreModel.from_denoiser(lambda x, t: 0.5 * x, sde, (2,))
    x = jnp.zeros(2)
    found = score.score(x, 0.5), score.denoise(x, 0.5), score.sample(KEY, (2,))
    assert narrow((*found, score.log_prob(x))) == []


@pytest.mark.parametrize("method", SOLVERS, ids=lambda s: type(s).__name__)
def test_solvers(method):
    assert narrow(solver.solve(KEY, NORMAL, (3,), solver=method)) == []


def test_training_keeps_float32_weights_and_float64_data():
    data = np.random.default_rng(0).normal(1e9, 1.0, size=(64, 2))
    trainer = ScoreMatching(MLP(2, width=4, depth=1))
    run = trainer.run(KEY, 20, data, validation=data[:8], progress_bar=False)
    score = run.score
    assert narrow((score.standardize, score.rows)) == []
    assert abs(float(score.standardize.loc[0]) - data[:, 0].mean()) < 1e-6
    draws = score.sample(KEY, (3,))
    assert narrow((draws, score.score(draws), score.log_prob(draws))) == []
    weights = [leaf for leaf in jax.tree.leaves(run.state.ema_params) if leaf.size]
    assert {leaf.dtype for leaf in weights} == {jnp.dtype("float32")}


@pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")  # one chain
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels(kernel):
    mcmc = MCMC(kernel(learned), num_warmup=100, num_samples=20, progress_bar=False)
    mcmc.run(KEY, jnp.array(1.0))
    assert narrow((mcmc.get_samples(), mcmc.last_state, mcmc.get_extra_fields())) == []
    tree = to_datatree(mcmc)
    values = {f"{n}/{k}": v.values for n in tree.children for k, v in tree[n].items()}
    assert narrow(values) == []


@pytest.mark.filterwarnings("ignore:ScoreSDE. evidence")  # eight particles
def test_guided_particles():
    sizes = {"num_samples": 8, "num_particles": 8, "levels": 5, "num_moves": 1}
    guided = ScoreSDE(learned, progress_bar=False, **sizes)
    guided.run(KEY, jnp.array(1.0))
    assert narrow((guided.get_samples(), guided.get_extra_fields())) == []
    assert narrow(jnp.asarray(guided.log_evidence)) == []


def test_amortized_posterior():
    npse = NPSE(pair, "y")
    simulations = npse.simulator().simulate(KEY, 200)
    fit = npse.fit(KEY, 200, num_steps=20, check=False, progress_bar=False)
    y = np.zeros(2)
    log_prob = fit.log_prob({"x": jnp.zeros(())}, y)
    assert narrow((simulations, fit.sample(KEY, y, 5), log_prob)) == []
