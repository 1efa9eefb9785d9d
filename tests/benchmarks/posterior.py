"""Posteriors of a 25-component mixture seen through random linear operators.

For each dimension and number of observations: the sliced Wasserstein-1 distance (1000
projections, 1000 draws, mean over instances) of draws to exact posterior draws, for
exact draws (the floor), ScoreSDE, its guidance-only modes and AnnealedLangevin, all
with the exact score and the same NumPyro model; and the mean absolute error of
ScoreSDE's log evidence. The laws are those of Cardoso et al. 2024 (MCGDiff).

    python -m tests.benchmarks.posterior --dimensions 8 80 --instances 10
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
from numpyro.infer import MCMC

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ScoreDistribution,
    ScoreModel,
)
from numpyro_score.infer import ScoreSDE
from numpyro_score.infer.guidance import DPS, MomentMatching, PseudoinverseGuidance
from tests.targets import LinearProblem, grid_locs, sliced_wasserstein

SDE = VE(sigma_min=0.02, sigma_max=230.0)  # twenty standard deviations of the mixture
NUM_DRAWS = 1000


def mixture_score(weights: Any, locs: Any) -> ScoreModel:
    """The exact score of a mixture of unit Gaussians."""

    def score(x: Any, t: Any) -> Any:
        variance = 1 + SDE.sigma(t) ** 2
        square = jnp.sum((x - locs) ** 2, 1)
        shares = jax.nn.softmax(jnp.log(weights) - 0.5 * square / variance)
        return (shares @ locs - x) / variance

    return ScoreModel.from_fn(score, SDE, (locs.shape[1],))


def model(weights: Any, operator: Any, sd: Any, y: Any) -> None:
    locs = jnp.asarray(grid_locs(operator.shape[1]), float)
    x = numpyro.sample("x", ScoreDistribution(mixture_score(weights, locs)))
    numpyro.sample("y", dist.Normal(operator @ x, sd).to_event(1), obs=y)


def arguments(problem: LinearProblem) -> tuple:
    """Return the arguments of the model, as arrays that do not recompile it."""
    values = problem.weights, problem.operator, problem.sd, problem.y
    return tuple(jnp.asarray(value, float) for value in values)


class Method(NamedTuple):
    """Draws for a key and arguments, and the log evidence or NaN."""

    draw: Callable[[Any, tuple], tuple[Any, float]]


def score_sde(args: argparse.Namespace, guidance: Any = None) -> Method:
    inference = ScoreSDE(
        model,
        num_samples=NUM_DRAWS,
        num_particles=args.particles,
        levels=args.levels,
        guidance=guidance,
        progress_bar=False,
    )

    def draw(key: Any, values: tuple) -> tuple[Any, float]:
        inference.run(key, *values)
        evidence = np.nan if guidance else inference.log_evidence
        return inference.get_samples()["x"], evidence

    return Method(draw)


def annealed(args: argparse.Namespace) -> Method:
    """As many chains as draws, few enough levels for the budget of the others."""

    @jax.jit
    def run(key: Any, values: tuple) -> Any:
        mcmc = MCMC(
            AnnealedLangevin(
                model, levels=args.levels // 4, num_steps=1, friction=None
            ),
            num_warmup=args.levels,
            num_samples=1,
            num_chains=NUM_DRAWS,
            chain_method="vectorized",
            progress_bar=False,
        )
        mcmc.run(key, *values)
        return mcmc.get_samples()["x"], mcmc.last_state.cloud.log_evidence

    return Method(lambda key, values: run(key, values))


def methods(args: argparse.Namespace) -> dict[str, Method]:
    every = {
        "ScoreSDE": lambda: score_sde(args),
        "DPS": lambda: score_sde(args, DPS(scale=5.0)),  # the best of .05 to 5
        "PiGDM": lambda: score_sde(args, PseudoinverseGuidance()),
        "moment matching": lambda: score_sde(args, MomentMatching()),
        "annealed": lambda: annealed(args),
    }
    return {name: every[name]() for name in args.methods}


class Row(NamedTuple):
    """Mean distances by method, mean errors of log evidence, and seconds per run."""

    distance: dict[str, float]
    evidence: dict[str, float]
    seconds: dict[str, float]


def measure(dimension: int, observed: int, args: argparse.Namespace) -> Row:
    """Run every method on every instance."""
    rows: dict[str, list] = {"floor": []}
    errors: dict[str, list] = {}
    seconds: dict[str, list] = {}
    tools = methods(args)
    for seed in range(args.instances):
        problem = LinearProblem.draw(seed, dimension, observed)
        exact = problem.sample_posterior(1, NUM_DRAWS)
        again = problem.sample_posterior(2, NUM_DRAWS)
        rows["floor"].append(sliced_wasserstein(again, exact))
        for name, method in tools.items():
            start = time.perf_counter()
            draws, evidence = method.draw(jax.random.key(seed), arguments(problem))
            draws = np.asarray(draws, float)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            rows.setdefault(name, []).append(sliced_wasserstein(draws, exact))
            error = abs(float(evidence) - problem.log_evidence())
            errors.setdefault(name, []).append(error)
    return Row(
        {name: float(np.mean(values)) for name, values in rows.items()},
        {name: float(np.mean(values)) for name, values in errors.items()},
        {name: float(np.median(values)) for name, values in seconds.items()},
    )


def main(argv: Sequence[str] | None = None) -> dict[tuple[int, int], Row]:
    """Print one table; return its rows by dimension and number of observations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["ScoreSDE", "DPS", "PiGDM", "moment matching", "annealed"]
    parser.add_argument("--dimensions", type=int, nargs="+", default=[8])
    parser.add_argument("--observed", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--levels", type=int, default=200)
    parser.add_argument("--methods", nargs="*", default=names, choices=names)
    args = parser.parse_args(argv)
    columns = ["floor", *args.methods]
    print("| d, d_y | " + " | ".join(columns) + " | log Z error |")
    print("|---" * (len(columns) + 2) + "|")
    rows = {}
    for dimension in args.dimensions:
        for observed in args.observed:
            row = measure(dimension, observed, args)
            cells = " | ".join(f"{row.distance[name]:.3f}" for name in columns)
            error = row.evidence.get("ScoreSDE", np.nan)
            print(f"| {dimension}, {observed} | {cells} | {error:.3f} |", flush=True)
            rows[dimension, observed] = row
    return rows


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
