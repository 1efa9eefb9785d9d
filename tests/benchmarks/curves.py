"""Posteriors of smooth curves under a prior learned from some of them.

Curves are draws of a Gaussian process on 64 points; six of the points are observed
with noise of a known standard deviation, so that the posterior is known. Printed are
the largest error of the posterior mean, in posterior standard deviations, the smallest
and largest ratio of the standard deviation, and the noise level of the prior. "!" marks
a run that warned of its draws.

    python -m tests.benchmarks.curves --sizes 500 --length-scales 0.2
"""

import argparse
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC

from numpyro_score import MLP, ScoreDistribution, ScoreLangevin, ScoreMatching

NUM_POINTS, NOISE = 64, 0.1
OBSERVED = np.array([3, 14, 25, 40, 52, 60])


class Row(NamedTuple):
    """What one learned prior gave."""

    error: float
    narrowest: float
    widest: float
    level: float
    warned: bool


def measure(
    length_scale: float, size: int, baseline: bool | None, num_steps: int
) -> Row:
    """Return the errors of the posterior under a prior learned from ``size`` curves."""
    rng, grid = np.random.default_rng(0), np.linspace(0, 1, NUM_POINTS)
    kernel = np.exp(-0.5 * np.square((grid[:, None] - grid) / length_scale))
    *rows, truth = rng.multivariate_normal(np.zeros(NUM_POINTS), kernel, size + 1)
    y = truth[OBSERVED] + NOISE * rng.normal(size=len(OBSERVED))
    noisy = kernel[np.ix_(OBSERVED, OBSERVED)] + NOISE**2 * np.eye(len(OBSERVED))
    gain = np.linalg.solve(noisy, kernel[OBSERVED]).T
    mean, variance = gain @ y, np.diag(kernel - gain @ kernel[OBSERVED])
    sd = np.sqrt(np.maximum(variance, 1e-8))

    trainer = ScoreMatching(MLP(NUM_POINTS, width=64), gaussian_baseline=baseline)
    key = jax.random.key(0)
    run = trainer.run(key, num_steps, np.float32(rows), progress_bar=False)

    def model(y: np.ndarray) -> None:
        x = numpyro.sample("x", ScoreDistribution(run.score))
        numpyro.sample("y", dist.Normal(x[OBSERVED], NOISE), obs=y)

    options = {"num_chains": 4, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(ScoreLangevin(model), num_warmup=600, num_samples=600, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mcmc.run(jax.random.key(1), np.float32(y))
    draws = np.asarray(mcmc.get_samples()["x"])
    ratio = draws.std(0) / sd
    error = float(np.abs((draws.mean(0) - mean) / sd).max())
    untrusted = any("not to be trusted" in str(each.message) for each in caught)
    level = float(run.score.level_in_use)
    return Row(error, float(ratio.min()), float(ratio.max()), level, untrusted)


def main(argv: Sequence[str] | None = None) -> dict[tuple[float, int, str], Row]:
    """Print the table of the options in ``argv``, and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length-scales", nargs="+", type=float, default=[0.2])
    parser.add_argument("--sizes", nargs="+", type=int, default=[500])
    parser.add_argument("--num-steps", type=int, default=2000)
    options = parser.parse_args(argv)
    print("length  curves  baseline   error  sd ratio       level")
    rows = {}
    for length_scale in options.length_scales:
        for size in options.sizes:
            for name, baseline in (("default", None), ("none", False)):
                row = measure(length_scale, size, baseline, options.num_steps)
                rows[length_scale, size, name] = row
                print(
                    f"{length_scale:<8}{size:<8}{name:<9}{row.error:7.2f}  "
                    f"{row.narrowest:.2f} to {row.widest:.2f}   {row.level:.2f}"
                    f"{' !' if row.warned else ''}",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    main()
