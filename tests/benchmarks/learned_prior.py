"""Priors learned from draws of laws with exact densities, used with new data.

For each law and number of draws: the error of the posterior mean in posterior standard
deviations and the ratio of the standard deviation, both of the worst coordinate, and
the share of draws off the data. The likelihood is normal, of half the standard
deviation of the coordinate, centered 0, 2 and 4 standard deviations from its mean.
Columns are ScoreLangevin at the level in use and at the lowest level, ScoreSDE at the
level in use, and a Gaussian fit with its exact posterior. "!" marks a run that warned.
Curves on a grid have a benchmark of their own, ``tests.benchmarks.curves``.

    python -m tests.benchmarks.learned_prior --laws banana modes --sizes 4000

With ``--losses`` the loss of fresh rows, without and with held-out rows; with
``--chains`` where chains that know the score alone go, at several noise levels.

The truth is that of a million draws, weighted by the likelihood; of 200,000 by NUTS for
the posterior of a regression.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import unconstrain_fn

from numpyro_score import MLP, ScoreDistribution, ScoreLangevin, ScoreMatching
from numpyro_score.data.rows import BATCH_SIZE
from numpyro_score.diagnostics import verdict
from numpyro_score.infer import ScoreSDE
from numpyro_score.score import level as levels

NUM_EXACT = 1_000_000
WIDTH = 0.5  # of the likelihood, in standard deviations of its coordinate
SHIFTS = (0, 2, 4)


def correlated(rng: np.random.Generator, count: int) -> np.ndarray:
    """Normal, 6 numbers, correlations up to .99."""
    factor = np.random.default_rng(1).normal(size=(6, 6))
    return rng.normal(size=(count, 6)) @ factor.T


def skewed(rng: np.random.Generator, count: int) -> np.ndarray:
    """Unconstrained posterior of 6 numbers: a rate, a share, and curved effects."""
    factor = np.tril(0.6 * np.random.default_rng(1).normal(size=(6, 6)))
    z = rng.normal(size=(count, 6)) @ (factor + 0.5 * np.eye(6)).T
    z[:, 0] = np.log(rng.gamma(2.0, 1.0, count) + 0.01 * np.exp(z[:, 0]))
    z[:, 1] = -np.log1p(np.exp(-2 * z[:, 1]))
    z[:, 2] += 0.3 * z[:, 3] ** 2
    return z


def banana(rng: np.random.Generator, count: int) -> np.ndarray:
    """A parabola of two numbers."""
    z = rng.normal(size=(count, 2))
    z[:, 1] = 0.5 * z[:, 1] + z[:, 0] ** 2
    return z


def modes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Two modes in the first of three numbers, 12 of their widths apart."""
    z = rng.normal(size=(count, 3))
    z[:, 0] = 3 * np.sign(rng.normal(size=count)) + 0.5 * z[:, 0]
    return z


def tails(rng: np.random.Generator, count: int) -> np.ndarray:
    """Student's t of 5 degrees of freedom, three numbers."""
    return rng.standard_t(5, size=(count, 3))


def bounded(rng: np.random.Generator, count: int) -> np.ndarray:
    """Uniform on a cube, with hard edges that the learner is not told of."""
    return rng.uniform(size=(count, 3))


def mixing(x: np.ndarray, y: np.ndarray) -> None:
    """A regression with a simplex, a positive number and a share."""
    weights = numpyro.sample("weights", dist.Dirichlet(np.full(3, 2.0)))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    share = numpyro.sample("share", dist.Beta(2.0, 2.0))
    mean = x[:, :3] @ weights + share * x[:, 3]
    numpyro.sample("y", dist.StudentT(4.0, mean, scale), obs=y)


@cache
def regression_draws() -> np.ndarray:
    """Return draws of the posterior of 12 rows, in unconstrained space."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(12, 4))
    y = x @ np.array([0.6, 0.3, 0.1, 0.9]) + 0.4 * rng.normal(size=12)
    mcmc = MCMC(
        NUTS(mixing, target_accept_prob=0.95),
        num_warmup=1000,
        num_samples=50_000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), x, y)
    to_unconstrained = partial(unconstrain_fn, mixing, (x, y), {})
    z = jax.vmap(to_unconstrained)(mcmc.get_samples())
    draws = np.concatenate([z[k].reshape(4 * 50_000, -1) for k in sorted(z)], axis=1)
    return np.random.default_rng(0).permutation(draws)


def regression(rng: np.random.Generator, count: int) -> np.ndarray:
    """Posterior of a simplex, a positive number and a share, in unconstrained space."""
    draws = regression_draws()
    chosen = rng.choice(len(draws), min(count, len(draws)), replace=False)
    return draws[chosen].astype(float)


LAWS = {
    law.__name__: law
    for law in (correlated, skewed, bounded, tails, banana, modes, regression)
}


class Likelihood(NamedTuple):
    """A normal likelihood of one coordinate."""

    index: int
    center: float
    width: float


class Moments(NamedTuple):
    """Mean and standard deviation of every coordinate."""

    mean: np.ndarray
    sd: np.ndarray


def model(score: Any, t: Any, seen: Likelihood) -> None:
    """A learned prior and the likelihood of one of its numbers."""
    z = numpyro.sample("z", ScoreDistribution(score, t=t))
    numpyro.sample("y", dist.Normal(z[seen.index], seen.width), obs=seen.center)


def weighted(draws: np.ndarray, seen: Likelihood) -> Moments:
    """Return moments of draws weighted by the likelihood."""
    log_weight = -0.5 * ((draws[:, seen.index] - seen.center) / seen.width) ** 2
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean = weight @ draws
    return Moments(mean, np.sqrt(weight @ np.square(draws - mean)))


def gaussian(rows: np.ndarray, seen: Likelihood) -> Moments:
    """Return moments of the posterior under a Gaussian fit to rows."""
    mean, covariance = rows.mean(0), np.cov(rows.T)
    gain = covariance[:, seen.index]
    gain = gain / (covariance[seen.index, seen.index] + seen.width**2)
    mean = mean + gain * (seen.center - mean[seen.index])
    return Moments(mean, np.sqrt(np.diag(covariance) - gain * covariance[seen.index]))


def langevin() -> MCMC:
    """Return the chains of all runs of one score: their program is compiled once."""
    return MCMC(
        ScoreLangevin(model),
        num_warmup=500,
        num_samples=500,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
        jit_model_args=True,
    )


def by_langevin(
    mcmc: MCMC, score: Any, t: Any, seen: Likelihood
) -> tuple[Moments, str]:
    """Return moments of a chain's draws, and what the verdict says."""
    mcmc.run(jax.random.key(3), score, t, seen)
    z, found = np.asarray(mcmc.get_samples()["z"]), verdict(mcmc)
    off = next((f.number for f in found.findings if f.name == "off_data"), 0.0)
    return Moments(z.mean(0), z.std(0)), f"{off:4.0%}{' ' if found.ok else '!'}"


def by_particles(score: Any, t: Any, seen: Likelihood) -> tuple[Moments, str]:
    """Return moments of the draws of ScoreSDE, and whether it warned."""
    inference = ScoreSDE(
        model, num_samples=2000, num_particles=1000, levels=60, progress_bar=False
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inference.run(jax.random.key(4), score, t, seen)
    z = np.asarray(inference.get_samples()["z"])
    return Moments(z.mean(0), z.std(0)), "!" if caught else " "


def compare(found: Moments, exact: Moments) -> str:
    """Return error of the mean in sd, and the ratio of sd, of the worst coordinate."""
    error = np.abs(found.mean - exact.mean) / exact.sd
    ratio = found.sd / exact.sd
    return f"{error.max():5.2f} {ratio[np.abs(np.log(ratio)).argmax()]:5.2f}"


def trainer_of(rows: np.ndarray) -> ScoreMatching:
    """Return the trainer of all runs."""
    return ScoreMatching(MLP(rows.shape[1]), gaussian_baseline=True)


def compare_losses(name: str, law: Callable, size: int, steps: int) -> None:
    """Print the loss of fresh rows of nets trained on all rows, and on nine tenths."""
    rows = law(np.random.default_rng(0), size).astype(np.float32)
    fresh = law(np.random.default_rng(5), 20_000).astype(np.float32)
    trainer = trainer_of(rows)
    losses = []
    for share in (0.0, 0.1):
        result = trainer.run(
            jax.random.key(0), steps, rows, validation_share=share, progress_bar=False
        )
        state = result.state._replace(ema_params=result.score.denoiser.params)
        losses.append(float(trainer.evaluate(state, fresh)))
    passes = steps * min(size, BATCH_SIZE) / size
    print(f"{name}, {size} rows, {passes:.0f} passes | {losses[0]:.4f} {losses[1]:.4f}")


def compare_chains(name: str, law: Callable, size: int, steps: int) -> None:
    """Print what chains that know the score alone show at levels, and if that is right.

    The share of their draws off the data, and the largest ratio of a width to that of
    the data, for the levels that :mod:`~numpyro_score.score.level` tries.
    """
    rows = law(np.random.default_rng(0), size).astype(np.float32)
    score = (
        trainer_of(rows).run(jax.random.key(0), steps, rows, progress_bar=False).score
    )
    print(f"{name}, {size} draws: level {score.level_in_use:.2g}")
    unit, kept = levels._unit(score), jax.numpy.asarray(score.rows)
    for noise in (*levels.LEVELS, score.sde.sigma_min):
        draws = levels.run_chains(unit, kept, noise)
        limits = levels.data_range(score, noise)
        off = float(levels.is_off_data(unit, limits, draws).mean())
        sd = np.sqrt(np.var(kept, 0) + noise**2)
        width = float((np.std(draws, 0) / sd).max())
        print(f"{noise:6.2g} | {off:.3f} | {width:.2f}", flush=True)


def run(name: str, law: Callable, size: int, steps: int) -> None:
    """Print a line for each likelihood."""
    exact_draws = law(np.random.default_rng(7), NUM_EXACT)
    rows = law(np.random.default_rng(0), size).astype(np.float32)
    start = time.perf_counter()
    score = (
        trainer_of(rows).run(jax.random.key(0), steps, rows, progress_bar=False).score
    )
    trained = time.perf_counter() - start
    level = score.level_in_use
    measured = time.perf_counter() - start - trained
    print(
        f"{name}, {size} draws: level {level:.2g}, trained in {trained:.0f} s, "
        f"measured in {measured:.0f} s"
    )
    times, mcmc = (float(score.sde.time(level)), score.sde.t_min), langevin()
    for shift in SHIFTS:
        sd = float(rows[:, 0].std())
        center = float(rows[:, 0].mean()) + shift * sd
        seen = Likelihood(0, center, WIDTH * sd)
        exact = weighted(exact_draws, seen)
        cells = [f"{shift} sd"]
        for t in times:
            moments, share = by_langevin(mcmc, score, t, seen)
            cells.append(f"{compare(moments, exact)} {share}")
        moments, mark = by_particles(score, times[0], seen)
        cells.append(f"{compare(moments, exact)}{mark}")
        cells.append(compare(gaussian(rows, seen), exact))
        print(" | ".join(cells), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=LAWS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[500, 2000, 20_000])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--losses", action="store_true")
    parser.add_argument("--chains", action="store_true")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    work, columns = (
        run,
        (
            "shift | level in use: error, ratio, off data | lowest level | ScoreSDE | "
            "Gaussian fit"
        ),
    )
    if options.losses:
        work, columns = compare_losses, "rows held out: none, a tenth"
    elif options.chains:
        work, columns = compare_chains, "level | off the data | width"
    print(columns)
    for name in options.laws:
        for size in options.sizes:
            work(name, LAWS[name], size, options.steps)


if __name__ == "__main__":
    main()
