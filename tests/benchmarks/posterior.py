"""Posteriors of a 25-component mixture seen through random linear operators.

For each dimension and number of observations: the sliced Wasserstein-1 distance (1000
projections, 1000 draws, mean over instances) of draws to exact posterior draws, for
exact draws (the floor), ScoreSDE, its guidance-only modes, AnnealedLangevin,
ParallelTempering and ParticleMetropolis, all with the exact score and the same NumPyro
model; and the mean absolute errors of log evidences. The laws are those of Cardoso et
al. 2024 (MCGDiff). Of chains that run longer than 1000 draws these are every k-th.

    python -m tests.benchmarks.posterior --dimensions 8 80 --instances 10

With ``--trained`` a net learns one prior from its draws, and ScoreSDE is run on the
same problems with the net's score and with the exact one:

    python -m tests.benchmarks.posterior --trained --instances 10
"""

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from numpyro_score import (
    MLP,
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ParticleMetropolis,
    ScoreDistribution,
    ScoreMatching,
    ScoreModel,
    loss,
)
from numpyro_score.infer import ScoreSDE
from numpyro_score.infer.twisted.guidance import (
    DPS,
    MomentMatching,
    PseudoinverseGuidance,
)
from numpyro_score.loss.noise_levels import LogNormal
from tests.targets import LinearProblem, grid_locs, sliced_wasserstein

SIGMA_MIN = 0.02  # of standard deviations of 1
NUM_DRAWS = 1000
GUIDED = ("DPS", "PiGDM", "moment matching")  # without evidence


def mixture_score(sde: VE, weights: Any, locs: Any) -> ScoreModel:
    """The exact score of a mixture of unit Gaussians."""

    def score(x: Any, t: Any) -> Any:
        variance = 1 + sde.sigma(t) ** 2
        square = jnp.sum((x - locs) ** 2, 1)
        shares = jax.nn.softmax(jnp.log(weights) - 0.5 * square / variance)
        return (shares @ locs - x) / variance

    return ScoreModel.from_fn(score, sde, (locs.shape[1],))


def mixture_model(sde: VE, weights: Any, operator: Any, sd: Any, y: Any) -> None:
    locs = jnp.asarray(grid_locs(operator.shape[1]), float)
    linear_model(mixture_score(sde, weights, locs), operator, sd, y)


def linear_model(score: ScoreModel, operator: Any, sd: Any, y: Any) -> None:
    x = numpyro.sample("x", ScoreDistribution(score, t=score.sde.t_min))
    numpyro.sample("y", dist.Normal(operator @ x, sd).to_event(1), obs=y)


def arguments(problem: LinearProblem) -> tuple:
    """Return the arguments of the model, as arrays that do not recompile it."""
    values = problem.weights, problem.operator, problem.sd, problem.y
    return tuple(jnp.asarray(value, float) for value in values)


class Method(NamedTuple):
    """Draws for a key and arguments, and the log evidence or NaN."""

    draw: Callable[[Any, tuple], tuple[Any, float]]


def sde_inference(
    model: Callable, args: argparse.Namespace, guidance: Any = None
) -> ScoreSDE:
    return ScoreSDE(
        model,
        num_samples=NUM_DRAWS,
        num_particles=args.particles,
        levels=args.levels,
        guidance=guidance,
        progress_bar=False,
    )


def known_model(args: argparse.Namespace) -> Callable:
    """Return the model with the exact score, which takes the arguments of a problem."""
    return partial(mixture_model, VE(SIGMA_MIN, args.sigma_max))


def score_sde(args: argparse.Namespace, guidance: Any = None) -> Method:
    inference = sde_inference(known_model(args), args, guidance)

    def draw(key: Any, values: tuple) -> tuple[Any, float]:
        inference.run(key, *values)
        evidence = np.nan if guidance else inference.log_evidence
        return inference.get_samples()["x"], evidence

    return Method(draw)


def chains(kernel: MCMCKernel, evidence: Callable, **options: int) -> Method:
    """Return 1000 draws of a kernel by vectorized chains.

    Where the kernel allows, all is compiled once for all problems.

    Args:
        kernel: the kernel.
        evidence: the log evidence by the last state.
        options: numbers of chains, draws and warm-up iterations.
    """
    settings = {"chain_method": "vectorized", "progress_bar": False, **options}

    def run(key: Any, values: tuple) -> Any:
        mcmc = MCMC(kernel, **settings)
        mcmc.run(key, *values)
        draws = mcmc.get_samples()["x"]
        return draws[:: len(draws) // NUM_DRAWS], evidence(mcmc.last_state)

    # pilot runs of this one need to know the data
    return Method(run if isinstance(kernel, ParticleMetropolis) else jax.jit(run))


def annealed(args: argparse.Namespace) -> Method:
    """As many chains as draws, few enough levels for the budget of the others."""
    kernel = AnnealedLangevin(
        known_model(args), levels=args.levels // 4, num_steps=1, friction=None
    )
    lengths = {"num_warmup": args.levels, "num_samples": 1, "num_chains": NUM_DRAWS}
    return chains(kernel, lambda state: state.weights.log_evidence, **lengths)


def tempering(args: argparse.Namespace) -> Method:
    """Four chains, of which each tenth draw is one of 1000.

    Draws of the prior start at N(0, 1 + sigma_max^2), where ScoreSDE starts along the
    mixture's principal axes; its mean, a tenth of 230, would move the shares of modes.
    """
    process = VE(SIGMA_MIN, 10 * args.sigma_max)
    kernel = ParallelTempering(partial(mixture_model, process))
    lengths = {"num_warmup": 1000, "num_samples": 2500, "num_chains": 4}
    return chains(kernel, lambda state: state.log_evidence.mean(), **lengths)


def particle_metropolis(args: argparse.Namespace) -> Method:
    """Four chains of runs, as many particles in all as four of ScoreSDE per draw."""
    kernel = ParticleMetropolis(
        known_model(args), num_particles=args.run_particles, levels=args.run_levels
    )
    lengths = {"num_warmup": 50, "num_samples": NUM_DRAWS // 4, "num_chains": 4}
    return chains(kernel, lambda state: state.pooled.log_evidence, **lengths)


def methods(args: argparse.Namespace) -> dict[str, Method]:
    every = {
        "ScoreSDE": lambda: score_sde(args),
        "DPS": lambda: score_sde(args, DPS(scale=5.0)),  # the best of .05 to 5
        "PiGDM": lambda: score_sde(args, PseudoinverseGuidance()),
        "moment matching": lambda: score_sde(args, MomentMatching()),
        "annealed": lambda: annealed(args),
        "tempering": lambda: tempering(args),
        "metropolis": lambda: particle_metropolis(args),
    }
    return {name: every[name]() for name in args.methods}


class Row(NamedTuple):
    """Mean distances by method, mean errors of log evidence, and seconds per run."""

    distance: dict[str, float]
    evidence: dict[str, float]
    seconds: dict[str, float]


def measure(dimension: int, observed: int, args: argparse.Namespace) -> Row:
    """Run every method on every instance with every key."""
    rows: dict[str, list] = {"floor": []}
    errors: dict[str, list] = {}
    seconds: dict[str, list] = {}
    tools = methods(args)
    for seed, number in itertools.product(range(args.instances), range(args.keys)):
        problem = LinearProblem.draw(seed, dimension, observed)
        exact = problem.sample_posterior(1, NUM_DRAWS)
        again = problem.sample_posterior(2 + number, NUM_DRAWS)
        rows["floor"].append(sliced_wasserstein(again, exact))
        key = jax.random.key(seed + args.instances * number)
        for name, method in tools.items():
            start = time.perf_counter()
            draws, evidence = method.draw(key, arguments(problem))
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


def train_net(
    weights: np.ndarray, dimension: int, num_steps: int, known_score: bool
) -> ScoreModel:
    """Return the score of a net that has seen 100 000 draws of the prior.

    The components are a tenth of the data's standard deviation wide, and so the levels
    of training are lower than by default.

    Args:
        weights: of the prior.
        dimension: of the prior.
        num_steps: of training, with 512 rows each.
        known_score: whether the score of the draws is used (``TargetScore``).
    """
    rng, locs = np.random.default_rng(5), grid_locs(dimension)
    draws = locs[rng.choice(25, p=weights, size=100_000)]
    draws = jnp.asarray(draws + rng.normal(size=draws.shape), float)
    target, data_score = loss.DataTarget(), None
    if known_score:
        sde = VE(SIGMA_MIN, 230.0)  # the score at t=None is that of the lowest level
        arrays = jnp.asarray(weights, float), jnp.asarray(locs, float)
        exact = mixture_score(sde, *arrays)
        target, data_score = loss.TargetScore(), exact.score(draws)
    trainer = ScoreMatching(
        MLP(dimension),
        VE(0.005, 20.0),
        loss.DenoisingScoreMatching(LogNormal(-1.8, 1.2), target=target),
    )
    key = jax.random.key(1)
    options = {"data_score": data_score, "batch_size": 512, "progress_bar": False}
    return trainer.run(key, num_steps, draws, **options).score


class Trained(NamedTuple):
    """Mean distances of exact draws, of ScoreSDE with the exact score and a net."""

    floor: float
    exact: float
    net: float
    evidence: float


def compare_net(
    score: ScoreModel, weights: np.ndarray, observed: int, args: argparse.Namespace
) -> Trained:
    """Return distances with a net and with the exact score on the same problems."""
    rows, locs = [], jnp.asarray(grid_locs(score.size), float)
    sde = VE(SIGMA_MIN, args.sigma_max)
    exact = mixture_score(sde, jnp.asarray(weights, float), locs)
    tools = [sde_inference(partial(linear_model, law), args) for law in (exact, score)]
    for seed in range(args.instances):
        problem = LinearProblem.draw(seed, score.size, observed, weights)
        draws = problem.sample_posterior(1, NUM_DRAWS)
        row = [sliced_wasserstein(problem.sample_posterior(2, NUM_DRAWS), draws)]
        for inference in tools:
            inference.run(jax.random.key(seed), *arguments(problem)[1:])
            found = np.asarray(inference.get_samples()["x"], float)
            row.append(sliced_wasserstein(found, draws))
        row.append(abs(inference.log_evidence - problem.log_evidence()))
        rows.append(row)
    return Trained(*(float(mean) for mean in np.mean(rows, 0)))


def main_trained(args: argparse.Namespace) -> dict[tuple[int, int], Trained]:
    """Print one table for a net; return its rows by number of observations."""
    print("| d, d_y | floor | exact score | net | net / exact | net's log Z error |")
    print("|---" * 6 + "|")
    rows = {}
    for dimension in args.dimensions:
        weights = LinearProblem.draw(0, dimension, 1).weights
        score = train_net(weights, dimension, args.num_steps, args.known_score)
        for observed in args.observed:
            row = compare_net(score, weights, observed, args)
            print(
                f"| {dimension}, {observed} | {row.floor:.3f} | {row.exact:.3f} | "
                f"{row.net:.3f} | {row.net / row.exact:.2f} | {row.evidence:.3f} |",
                flush=True,
            )
            rows[dimension, observed] = row
    return rows


def main(argv: Sequence[str] | None = None) -> dict[tuple[int, int], Any]:
    """Print one table; return its rows by dimension and number of observations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [
        *("ScoreSDE", "DPS", "PiGDM", "moment matching"),
        *("annealed", "tempering", "metropolis"),
    ]
    parser.add_argument("--dimensions", type=int, nargs="+", default=[8])
    parser.add_argument("--observed", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--keys", type=int, default=1, help="for each instance")
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--levels", type=int, default=200)
    parser.add_argument("--run-particles", type=int, default=32, help="of metropolis")
    parser.add_argument("--run-levels", type=int, default=50, help="of metropolis")
    # twenty sd of a coordinate; principal axes have sqrt(d/2) times its sd
    parser.add_argument("--sigma-max", type=float, default=230.0)
    parser.add_argument("--methods", nargs="*", default=names, choices=names)
    parser.add_argument("--trained", action="store_true", help="a net beside the score")
    parser.add_argument("--num-steps", type=int, default=20_000, help="of training")
    parser.add_argument("--known-score", action="store_true", help="of the draws")
    args = parser.parse_args(argv)
    if args.trained:
        return main_trained(args)
    columns = ["floor", *args.methods]
    evidences = [name for name in args.methods if name not in GUIDED]
    heads = [*columns, *(f"log Z error, {name}" for name in evidences)]
    print("| d, d_y | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    rows = {}
    for dimension in args.dimensions:
        for observed in args.observed:
            row = measure(dimension, observed, args)
            cells = [row.distance[name] for name in columns]
            cells += [row.evidence[name] for name in evidences]
            line = " | ".join(f"{cell:.3f}" for cell in cells)
            print(f"| {dimension}, {observed} | {line} |", flush=True)
            rows[dimension, observed] = row
    return rows


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
