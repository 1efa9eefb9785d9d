"""Constants that have no derivation: what changes over values of each.

    python -m tests.benchmarks.constants                    all
    python -m tests.benchmarks.constants --only transitions one

The value in use is marked by a star. A table takes up to four minutes.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ScoreDistribution,
    ScoreLangevin,
)
from numpyro_score.infer import NPSE, ScoreSDE
from numpyro_score.infer.amortized import mcmc_check, objective
from numpyro_score.infer.twisted import linear_solve, sampler, twist
from numpyro_score.kernel import (
    adaptation,
    annealed_smc,
    parallel_tempering,
    tempering_adaptation,
)
from tests.benchmarks.tempering import make_model, two_gaussians
from tests.benchmarks.twist import gaussian_problem
from tests.targets import MIXTURE


@contextmanager
def set_constant(module: ModuleType, name: str, value: float) -> Iterator[None]:
    """Give a constant another value, and forget programs compiled with the old one."""
    before = getattr(module, name)
    setattr(module, name, value)
    jax.clear_caches()
    try:
        yield
    finally:
        setattr(module, name, before)
        jax.clear_caches()


class Runs(NamedTuple):
    """Last states, draws of shape (runs, draws, chains, d), and gradients of runs."""

    state: Any
    x: np.ndarray
    num_steps: np.ndarray


def krylov() -> tuple[float, ...]:
    """Return relative errors of J^T s and of log det(I + B), 100 residuals.

    Half of 200 numbers of a smooth law are observed with a tenth of its sd as noise.
    """
    place = np.arange(200) / 20
    covariance = np.exp(-0.5 * (place[:, None] - place) ** 2)
    operator, noise = np.eye(200)[:100], 0.1
    y = np.linalg.cholesky(covariance + 1e-6 * np.eye(200))[:100] @ np.cos(range(200))
    root, law = jnp.asarray(operator / noise, float), jnp.asarray(covariance, float)
    uncertainty = linear_solve.ResidualCovariance(
        lambda u: root @ u["x"],
        lambda v: {"x": root.T @ v},
        lambda u: {"x": law @ u["x"]},
        jnp.zeros((0, 100)),
    )
    residual = jnp.asarray(y / noise, float)
    found = linear_solve.solve_and_log_det(residual, {"x": jnp.zeros(200)}, uncertainty)
    whole = np.eye(100) + operator @ covariance @ operator.T / noise**2
    exact = np.linalg.solve(whole, y / noise)
    log_det = np.linalg.slogdet(whole)[1]
    error = np.linalg.norm(np.asarray(found.solution) - exact) / np.linalg.norm(exact)
    return error, abs(float(found.log_det) / log_det - 1)


def barker() -> tuple[float, ...]:
    """Return what steps see of draws that are 1 sd off, and of a log ratio of log 2.

    For normal laws of 1 and of 10 dimensions; all of it would be 1 and .69.
    """
    seen = []
    for size in (1, 10):
        x = np.random.default_rng(0).normal(size=(2000, size)).astype(np.float32)
        for part, draws in enumerate((x + 1, 2 * x)):
            after = mcmc_check.barker_moves(
                lambda u: -0.5 * u @ u,
                jax.random.key(0),
                jnp.asarray(draws),
                jnp.asarray(mcmc_check.scale_root(draws), jnp.float32),
            )
            found = mcmc_check.differences(draws, np.asarray(after))
            seen.append(float(found[part].mean()))
    return tuple(seen)


def sample(kernel: Any, shape: tuple[int, int], lengths: tuple[int, int]) -> Runs:
    """Return runs of a kernel by one program.

    Args:
        kernel: for vectorized chains.
        shape: runs, and chains of each.
        lengths: transitions of warm-up, and draws.
    """
    num_warmup, num_samples = lengths

    def step(state: Any, _: Any) -> tuple[Any, tuple[Any, Any]]:
        state = kernel.sample(state, (), {})
        return state, (state.z["x"], state.num_steps)

    def run(keys: Any) -> tuple[Any, tuple[Any, Any]]:
        state = kernel.init(keys, num_warmup, None, (), {})
        state, _ = jax.lax.scan(step, state, None, num_warmup)
        return jax.lax.scan(step, state, None, num_samples)

    keys = jax.random.split(jax.random.key(0), shape)
    state, (x, num_steps) = jax.jit(partial(jax.lax.map, run))(keys)
    return Runs(state, np.asarray(x), np.asarray(num_steps).sum((1, 2)))


def langevin() -> tuple[float, ...]:
    """Return the least ESS per 1000 gradients of a correlated Gaussian, by warm-up.

    Of 30 numbers of scales from .1 to 10; means over four runs.
    """
    size = 30
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    factor = jnp.asarray(axes * np.geomspace(0.1, 10, size), float)

    def model() -> None:
        numpyro.sample("x", dist.MultivariateNormal(jnp.zeros(size), factor @ factor.T))

    found = []
    for num_warmup in (60, 150):
        runs = sample(ScoreLangevin(model), (4, 4), (num_warmup, 300))
        sizes = [effective_sample_size(x.swapaxes(0, 1)).min() for x in runs.x]
        found.append(float(np.mean(1000 * np.array(sizes) / runs.num_steps)))
    return tuple(found)


def tempered() -> tuple[float, ...]:
    """Return restarts per million gradients, and rungs, of two Gaussians in 10-d."""
    kernel = ParallelTempering(make_model(two_gaussians()))
    runs = sample(kernel, (4, 4), (300, 300))
    restarts = np.sum(runs.state.stepping_stones.restarts, axis=1)
    rates = 1e6 * restarts / runs.num_steps
    rungs = np.mean(runs.state.adapt_state.num_rungs)
    return float(rates.mean()), float(rates.std(ddof=1) / 2), float(rungs)


def annealed() -> tuple[float, ...]:
    """Return the sd of log evidence and of a mode's share: two Gaussians in 10-d."""
    target = two_gaussians()
    runs = sample(AnnealedLangevin(make_model(target)), (64, 256), (100, 1))
    shares = [target.mode(x[-1]).mean() for x in runs.x]
    return float(np.std(runs.state.log_evidence)), float(np.std(shares))


def twisted() -> tuple[float, ...]:
    """Return the sd of log evidence, of 32 numbers of 64 that are observed."""
    model, y, _ = gaussian_problem()
    inference = ScoreSDE(
        model,
        num_samples=1,
        num_particles=128,
        levels=32,
        num_moves=0,
        progress_bar=False,
    )
    values = []
    for seed in range(16):
        inference.run(jax.random.key(seed), y)
        values.append(inference.log_evidence)
    return (float(np.std(values)),)


def curved() -> tuple[float, ...]:
    """Return sds of log evidence and of a share, of observed |x|^2 and x_0 x_1."""
    score = MIXTURE.score_model(VE(0.01, 20.0))

    def model(y: Any) -> None:
        x = numpyro.sample("x", ScoreDistribution(score))
        locs = jnp.stack([jnp.sum(x**2), x[0] * x[1]])
        numpyro.sample("y", dist.Normal(locs, 0.2).to_event(1), obs=y)

    options = {"num_samples": 1000, "num_particles": 1000, "levels": 50}
    inference = ScoreSDE(model, progress_bar=False, **options)
    values = []
    for seed in range(16):
        inference.run(jax.random.key(seed), jnp.array([2.0, 0.9]))
        share = (inference.get_samples()["x"][:, 0] > -0.3).mean()
        values.append((inference.log_evidence, float(share)))
    return tuple(np.std(values, axis=0).tolist())


def targets() -> tuple[float, ...]:
    """Return how far posterior means are off, in sd, given an observation of 1000.

    The largest of 1000, of a count with the rate exp(2x) and of a normal number with
    the sd exp(2x), for standard normal x.
    """
    grid, rng = np.linspace(-6, 6, 4001), np.random.default_rng(0)
    rate = np.exp(2 * rng.normal(size=100_000))
    laws = (
        (lambda x: dist.Poisson(jnp.exp(2 * x)), rng.poisson(rate)),
        (lambda x: dist.Normal(0.0, jnp.exp(2 * x)), rate * rng.normal(size=100_000)),
    )
    offsets = []
    for law, observations in laws:
        y = float(np.quantile(observations, 0.999))

        def model(y: Any = None, law: Callable = law) -> None:
            numpyro.sample("y", law(numpyro.sample("x", dist.Normal(0, 1))), obs=y)

        npse = NPSE(model, observed="y")
        posterior = npse.fit(
            jax.random.key(0), 2000, num_steps=1500, check=False, progress_bar=False
        )
        x = np.asarray(posterior.sample(jax.random.key(1), round(y), 2000)["x"])
        log_weight = np.asarray(law(grid).log_prob(round(y)), float) - grid**2 / 2
        weight = np.exp(log_weight - log_weight.max())
        mean = weight @ grid / weight.sum()
        sd = (weight @ (grid - mean) ** 2 / weight.sum()) ** 0.5
        offsets.append(float(abs(x.mean() - mean) / sd))
    return tuple(offsets)


class Measure(NamedTuple):
    """A constant, what is measured, and the values to compare."""

    module: ModuleType
    name: str
    measure: Callable[[], tuple[float, ...]]
    columns: tuple[str, ...]
    values: tuple[float, ...]


RESTARTS = "restarts / 1e6 gradients", "standard error", "rungs"
SPREAD = "sd of log Z", "sd of a share"
WARMUP = "ESS / 1000 gradients after 60 iterations", "after 150"
MEASURES = {
    "krylov": Measure(
        linear_solve, "NUM_KRYLOV", krylov, ("error", "of log det"), (3, 6, 12, 24)
    ),
    "barker": Measure(
        mcmc_check,
        "NUM_STEPS",
        barker,
        ("offset, 1-d", "log ratio", "offset, 10-d", "log ratio"),
        (10, 25, 50, 100),
    ),
    "window": Measure(adaptation, "FIRST_WINDOW", langevin, WARMUP, (10, 20, 40)),
    "growth": Measure(adaptation, "GROWTH", langevin, WARMUP, (1.3, 1.6, 2.0)),
    "transitions": Measure(
        tempering_adaptation, "MAX_CORRELATION", tempered, RESTARTS, (0.25, 0.5, 0.75)
    ),
    "block": Measure(parallel_tempering, "BLOCK", tempered, RESTARTS, (2, 4, 8)),
    "annealed": Measure(
        annealed_smc, "RESAMPLE_ESS", annealed, SPREAD, (0.25, 0.5, 0.75, 1.0)
    ),
    "target": Measure(
        objective,
        "MIN_EFFECTIVE_SHARE",
        targets,
        ("offset, count", "offset, normal"),
        (0.0, 0.08),
    ),
    "curvature": Measure(twist, "NUM_PROBES", curved, SPREAD, (2, 4, 8, 16)),
    "resampling": Measure(
        sampler, "RESAMPLE_ESS", twisted, SPREAD[:1], (0.25, 0.5, 0.75, 1.0)
    ),
}


def main(arguments: Sequence[str] | None = None) -> dict[str, list[tuple]]:
    """Print the tables that are asked for; return their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(MEASURES), choices=MEASURES)
    tables = {}
    for name in parser.parse_args(arguments).only:
        module, constant, measure, columns, values = MEASURES[name]
        start, used = time.monotonic(), getattr(module, constant)
        print(f"{module.__name__}.{constant}: {', '.join(columns)}")
        rows = tables[name] = []
        for value in values:
            with set_constant(module, constant, value):
                rows.append((value, *measure()))
            star = "*" if value == used else " "
            numbers = "  ".join(f"{number:8.3g}" for number in rows[-1][1:])
            print(f"{value:8.3g}{star} {numbers}", flush=True)
        print(f"{time.monotonic() - start:.0f} s\n")
    return tables


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
