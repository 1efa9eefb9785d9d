"""ScoreSDE with one covariance for each level, and with one for each particle.

A net learns the 8 x 8 digits; the upper half of held-out digits is observed with noise.
For each way and number of particles: the sd of the log evidence over keys, its mean,
and the seconds of a run after compilation. Then the same for the exact score of a
Gaussian law in 64 dimensions, whose evidence is known.

    python -m tests.benchmarks.twist
    python -m tests.benchmarks.twist --particles 128 512 --keys 8
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from sklearn.datasets import load_digits

from numpyro_score import MLP, VE, ScoreDistribution, ScoreMatching, ScoreModel
from numpyro_score.infer import ScoreSDE

NOISE = 1.0  # sd of the observation, in gray values of 0..16
LEVEL = 0.3  # noise level of the prior, in sd of the data


class Row(NamedTuple):
    """Of runs that differ in their keys."""

    mean: float
    sd: float
    seconds: float


def learn_digits(num_steps: int) -> tuple[ScoreModel, np.ndarray]:
    """Return the score of four fifths of the digits, and the others."""
    images = load_digits().images.reshape(-1, 64).astype(np.float32)
    rows = np.random.default_rng(0).permutation(len(images))
    test, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    # pixels at the edge hardly vary: all share one scale, as in images
    trainer = ScoreMatching(MLP(64, width=256, depth=3))
    images_of = images.reshape(-1, 8, 8)
    result = trainer.run(
        jax.random.key(0),
        num_steps,
        images_of[train],
        validation_share=0.0,
        progress_bar=False,
    )
    return result.score, images_of[test]


def digits_model(score: ScoreModel) -> Callable:
    t = score.sde.time(LEVEL)

    def model(y: Any) -> None:
        x = numpyro.sample("x", ScoreDistribution(score, t=t))
        numpyro.sample("y", dist.Normal(x.ravel()[:32], NOISE).to_event(1), obs=y)

    return model


def gaussian_problem() -> tuple[Callable, Any, float]:
    """Return a model with 32 of 64 correlated numbers observed, y, and log Z."""
    process, rng = VE(0.01, 20.0), np.random.default_rng(0)
    place = np.arange(64) / 8
    prior = np.exp(-0.5 * (place[:, None] - place) ** 2) + 0.01 * np.eye(64)
    variance, axes = np.linalg.eigh(prior)

    def score(x: Any, t: Any) -> Any:
        basis = jnp.asarray(axes, float)
        return -basis @ (basis.T @ x / (jnp.asarray(variance) + process.sigma(t) ** 2))

    law = ScoreModel.from_fn(score, process, (64,))
    seen = prior[:32, :32] + (0.3**2 + process.sigma_min**2) * np.eye(32)
    y = np.linalg.cholesky(seen) @ rng.normal(size=32)
    log_evidence = -0.5 * y @ np.linalg.solve(seen, y)
    log_evidence -= 0.5 * np.linalg.slogdet(2 * np.pi * seen)[1]

    def model(y: Any) -> None:
        x = numpyro.sample("x", ScoreDistribution(law))
        numpyro.sample("y", dist.Normal(x[:32], 0.3).to_event(1), obs=y)

    return model, jnp.asarray(y, float), float(log_evidence)


def measure(
    model: Callable, y: Any, covariance: str, size: int, args: argparse.Namespace
) -> Row:
    """Run all keys; the first, which compiles, is not timed."""
    inference = ScoreSDE(
        model,
        num_samples=1,
        num_particles=size,
        levels=args.levels,
        covariance=covariance,
        num_moves=0,
        progress_bar=False,
    )
    values, seconds = [], []
    for key in range(args.keys + 1):
        start = time.perf_counter()
        inference.run(jax.random.key(key), y)
        values.append(inference.log_evidence)
        seconds.append(time.perf_counter() - start)
    spread = float(np.std(values[1:], ddof=1))
    return Row(float(np.mean(values[1:])), spread, float(np.median(seconds[1:])))


def main(argv: Sequence[str] | None = None) -> dict[tuple, Row]:
    """Print one table; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, nargs="+", default=[128])
    parser.add_argument("--levels", type=int, default=64)
    parser.add_argument("--keys", type=int, default=6)
    parser.add_argument("--digits", type=int, default=2)
    parser.add_argument("--num-steps", type=int, default=4000, help="of training")
    args = parser.parse_args(argv)
    problems = {}
    if args.digits:
        score, images = learn_digits(args.num_steps)
        rng = np.random.default_rng(1)
        for j in range(args.digits):
            noise = LEVEL * float(score.standardize.scale.mean())
            truth = images[j].ravel() + noise * rng.normal(size=64)
            y = truth[:32] + NOISE * rng.normal(size=32)
            problems[f"digit {j}"] = digits_model(score), jnp.asarray(y, float), np.nan
    problems["Gaussian"] = gaussian_problem()
    print("| problem | particles | covariance | log Z | exact | sd | seconds |")
    print("|---" * 7 + "|")
    rows = {}
    for name, (model, y, exact) in problems.items():
        for size in args.particles:
            for covariance in ("fixed", "jacobian"):
                row = measure(model, y, covariance, size, args)
                print(
                    f"| {name} | {size} | {covariance} | {row.mean:.2f} | {exact:.2f} "
                    f"| {row.sd:.2f} | {row.seconds:.2f} |",
                    flush=True,
                )
                rows[name, size, covariance] = row
    return rows


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
