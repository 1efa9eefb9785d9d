"""Error against score evaluations for every solver, on laws whose scores are exact.

Run ``python -m tests.benchmarks.solvers``. Prints for each law, solver, grid and number
of evaluations the error over the floor: the distance of the draws to the exact law
(sliced Wasserstein, mode weights, energy) over that of exact draws. 1.0 is the floor;
``*`` marks where sliced Wasserstein and mode weights are both within 25 % of it
(four sets of draws leave about that much Monte Carlo error).
"""

import argparse
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from numpyro_score import MLP, VE, VP, RectifiedFlow, ScoreMatching
from numpyro_score.consistency import distill
from numpyro_score.diagnostics import (
    energy_distance,
    plot_work_precision,
    sliced_wasserstein,
    work_precision,
)
from numpyro_score.solver import (
    RK4,
    AdamsBashforth,
    Adaptive,
    Ancestral,
    Cosine,
    DPMSolverPP,
    DPMSolverSDE,
    Euler,
    EulerMaruyama,
    Geometric,
    Heun,
    Karras,
    PredictorCorrector,
    StochasticHeun,
    Uniform,
    UniPC,
    expectation,
    pilot_times,
    solve,
)
from tests.benchmarks.diffrax_peer import NUM_STEPS, report
from tests.targets import Gaussian, Mixture

BUDGETS = (8, 16, 20, 32, 40, 64)
ODE = [
    (Euler(), Geometric()),
    (Heun(), Karras()),
    (RK4(), Geometric()),
    (AdamsBashforth(3), Geometric()),
    (AdamsBashforth(4), Karras()),
    (DPMSolverPP(2), Geometric()),
    (DPMSolverPP(2), Karras()),
    (DPMSolverPP(3), Geometric()),
    (UniPC(2), Geometric()),
    (UniPC(2), Karras()),
    (UniPC(3), Geometric()),
    (UniPC(3), Cosine()),
]
SDE = [
    (Ancestral(), Geometric()),
    (EulerMaruyama(), Geometric()),
    (PredictorCorrector(), Geometric()),
    (StochasticHeun(), Karras()),
    (DPMSolverSDE(2), Geometric()),
    (DPMSolverSDE(3), Geometric()),
    (DPMSolverSDE(3), Karras()),
    (DPMSolverSDE(3, 0.5), Geometric()),
]
ADAPTIVE = [
    Adaptive(rtol=1e-2, atol=1e-2),
    Adaptive(rtol=1e-3, atol=1e-3),
    Adaptive(diffrax.Dopri5(), rtol=1e-2, atol=1e-2),
]
NOISE = VE(0.02, 20.0)


def mixture_2d() -> Mixture:
    """Six modes of unequal weights and scales, of unit variance."""
    angles = 2 * np.pi * np.arange(6) / 6
    locs = 1.25 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    weights = np.array([1, 2, 3, 1, 2, 3]) / 12
    return standardized(weights, locs, np.array([0.1, 0.2, 0.3, 0.3, 0.2, 0.1]))


def mixture_16d() -> Mixture:
    """Eight modes at random places in 16 dimensions."""
    rng = np.random.default_rng(0)
    locs = rng.normal(size=(8, 16))
    weights = np.arange(1, 9) / 36
    return standardized(weights, locs, np.linspace(0.2, 0.5, 8))


def standardized(weights, locs, scales) -> Mixture:
    locs = locs - weights @ locs
    variance = (weights @ (locs**2 + scales[:, None] ** 2)).mean()
    locs, scales = locs / variance**0.5, scales / variance**0.5
    return Mixture(
        tuple(weights.tolist()),
        tuple(tuple(row) for row in locs.tolist()),
        tuple(scales.tolist()),
    )


class Judge:
    """Distances of draws to a law, over those of exact draws."""

    def __init__(self, law: Mixture, num_draws: int, num_repeats: int, sde=NOISE):
        self.law, self.num_draws = law, num_draws
        self.marginal = sde.marginal(sde.t_min)
        self.keys = jax.random.split(jax.random.key(1), num_repeats)
        self.weigh = jax.jit(
            jax.vmap(lambda x: law.responsibilities(x, *self.marginal))
        )
        self.references = [self.exact(jax.random.fold_in(k, 7)) for k in self.keys]
        self.floor = self.distances([self.exact(k) for k in self.keys])

    def exact(self, key):
        key, key_noise = jax.random.split(key)
        alpha, sigma = self.marginal
        x = alpha * self.law.sample(key, (self.num_draws,))
        return x + sigma * jax.random.normal(key_noise, x.shape)

    def distances(self, sets):
        key = jax.random.key(2)
        errors = []
        for draws, reference in zip(sets, self.references, strict=True):
            weights = self.weigh(draws).mean(0)
            errors.append(
                (
                    sliced_wasserstein(key, draws, reference),
                    jnp.abs(weights - jnp.array(self.law.weights)).sum(),
                    energy_distance(draws, reference),
                )
            )
        return np.mean(errors, axis=0)

    def judge(self, score, solver, ts):
        """Return the number of evaluations and the errors over the floor."""
        shape = (self.num_draws,)
        runs = [solve(k, score, shape, solver=solver, ts=ts) for k in self.keys]
        counts = np.mean([np.mean(run.num_evaluations) for run in runs])
        sliced, modes, energy = self.distances([run.draws for run in runs])
        return counts, sliced / self.floor[0], modes / self.floor[1], energy


def at_floor(row) -> bool:
    return row[1] < 1.25 and row[2] < 1.25


def table(judge: Judge, score, choices, budgets) -> dict:
    """Print a row per solver and grid; return the evaluations at the floor."""
    print(f"{'solver, grid':58s}" + "".join(f"{n:>11d}" for n in budgets))
    reached = {}
    for solver, grid in choices:
        cells = []
        per_step = int(solver.num_evaluations(1, None))
        for budget in budgets:
            row = judge.judge(score, solver, grid(NOISE, budget // per_step))
            cells.append(f"{row[1]:5.2f}/{row[2]:4.2f}{'*' if at_floor(row) else ' '}")
            if at_floor(row) and (solver, grid) not in reached:
                reached[solver, grid] = int(row[0])
        name = f"{short(solver)}, {grid}"
        print(f"{name:58s}" + "".join(cells), flush=True)
    return reached


def short(solver) -> str:
    return repr(solver).replace("beta_min=0.1, beta_max=20.0, sigma_min=0.01", "")


def adaptive_rows(judge: Judge, score) -> None:
    for solver in ADAPTIVE:
        row = judge.judge(score, solver, None)
        print(f"{solver!r}: {row[0]:.0f} evaluations, {row[1]:.2f}/{row[2]:.2f}")


def learned_score(law: Mixture, num_steps: int):
    """Return a small net's score of 10 000 draws of a law."""
    data = law.sample(jax.random.key(5), (10_000,))
    trainer = ScoreMatching(MLP(2), sde=NOISE)
    key = jax.random.key(6)
    return trainer.run(key, num_steps, data, progress_bar=False).score


def pilot_rows(judge: Judge, score, budgets=(4, 6, 8, 12, 16)) -> None:
    """Print solvers on grids from a pilot run beside the geometric grid."""
    print("geometric grid -> grid from a pilot run")
    for solver, order in ((Euler(), 1), (DPMSolverPP(2), 2)):
        cells = []
        for n in budgets:
            grids = (
                Geometric()(NOISE, n),
                pilot_times(jax.random.key(3), score, n, order=order),
            )
            rows = [judge.judge(score, solver, ts) for ts in grids]
            cells.append(" -> ".join(f"{r[1]:.2f}/{r[2]:.2f}" for r in rows))
        print(
            f"{short(solver)}, {budgets} evaluations: " + "; ".join(cells), flush=True
        )


def process_rows(num_draws: int) -> None:
    """Print time grids of three processes, whose uniform times are different grids."""
    law = mixture_2d()
    for sde in (NOISE, VP(), RectifiedFlow()):
        score, judge = law.score_model(sde), Judge(law, num_draws, 2, sde)
        for grid in (Geometric(), Uniform(), Karras(), Cosine()):
            rows = [judge.judge(score, DPMSolverPP(2), grid(sde, n)) for n in (16, 32)]
            cells = ", ".join(f"{r[1]:.2f}/{r[2]:.2f}" for r in rows)
            print(f"{type(sde).__name__}, {grid}: {cells}", flush=True)


def consistency_rows(judge: Judge, score, num_steps: int) -> None:
    """Print a map distilled from the score, for one and two evaluations per draw."""
    model = distill(jax.random.key(7), score, num_steps).model
    for name, levels in (("one evaluation", ()), ("two evaluations", (0.8,))):
        shape = (judge.num_draws,)
        sets = [model.sample(k, shape, levels=levels) for k in judge.keys]
        sliced, modes, _ = judge.distances(sets)
        print(
            f"consistency distillation, {num_steps} training steps, {name}: "
            f"{sliced / judge.floor[0]:.2f}/{modes / judge.floor[1]:.2f}",
            flush=True,
        )


def variance_rows(law: Mixture, num_draws: int) -> None:
    """Print variances of plain means over those of better estimates, by coordinate."""
    print("median variance ratio: antithetic / controls of degree 1 / of degree 2")
    score, key = law.score_model(NOISE), jax.random.key(4)
    functions = {"mean": lambda x: x, "second moment": jnp.square}
    for solver in (DPMSolverPP(2), DPMSolverSDE(3)):
        pairs = solve(key, score, (num_draws,), solver=solver, antithetic=True).draws
        draws = solve(key, score, (num_draws,), solver=solver).draws
        for name, f in functions.items():
            anti = expectation(f(pairs), pairs, antithetic=True).variance_ratio
            scores = score.score(draws)
            controls = [
                expectation(f(draws), draws, scores, degree=degree).variance_ratio
                for degree in (1, 2)
            ]
            ratios = [f"{float(jnp.median(r)):.2f}" for r in (anti, *controls)]
            print(f"{short(solver)}, {name}: {' / '.join(ratios)}", flush=True)


def plot(law: Mixture, num_draws: int, path: Path) -> None:
    """Write the quality-versus-cost curve of some solvers."""
    choices = [
        (Euler(), Geometric()),
        (Heun(), Karras()),
        (DPMSolverPP(2), Geometric()),
        (UniPC(3), Geometric()),
        (Ancestral(), Geometric()),
        (DPMSolverSDE(3), Geometric()),
    ]
    rows = law.sample(jax.random.key(0), (2 * num_draws,))
    rows = rows + NOISE.sigma_min * jax.random.normal(jax.random.key(1), rows.shape)
    score = law.score_model(NOISE)
    budgets = (8, 12, 16, 24, 32, 64)
    curve = work_precision(jax.random.key(2), score, rows, choices, budgets)
    ax = plot_work_precision(curve)
    ax.figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def against_diffrax(num_draws: int) -> None:
    """Print times over diffrax's for two exact scores and a net's."""
    law = mixture_2d()
    scores = {
        "Gaussian": Gaussian((0.5, -1.0), (1.0, 0.3)).score_model(NOISE),
        "mixture": law.score_model(NOISE),
        "net": learned_score(law, 20),
    }
    print(f"CPU time over that of diffrax's fixed-step Euler, {NUM_STEPS} steps")
    for name, score in scores.items():
        report(name, score, num_draws)


def main(args: argparse.Namespace) -> None:
    if args.plot:
        plot(mixture_2d(), args.num_draws, args.plot)
        return
    laws = {"2-d": mixture_2d(), "16-d": mixture_16d()}
    if args.diffrax:
        against_diffrax(args.num_draws)
        return
    if args.extras:
        for name, law in laws.items():
            print(f"\n## {name} mixture, exact score: few steps, and expectations")
            score, judge = law.score_model(NOISE), Judge(law, args.num_draws, 2)
            pilot_rows(judge, score)
            variance_rows(law, args.num_draws)
            if args.train_steps:
                repeated = Judge(law, args.num_draws, 8)
                consistency_rows(repeated, score, args.train_steps)
        print("\n## 2-d mixture, DPMSolverPP(2) with 16 and 32 evaluations")
        process_rows(args.num_draws)
        return
    for name, law in ((name, laws[name]) for name in args.laws):
        print(f"\n## {name} mixture, exact score, {args.num_draws} draws")
        print("sliced Wasserstein / mode weights, over the floor; * at the floor")
        judge = Judge(law, args.num_draws, args.num_repeats)
        print("floor: sliced {:.4f}, modes {:.4f}, energy {:.5f}".format(*judge.floor))
        score = law.score_model(NOISE)
        for choices in (ODE, SDE):
            reached = table(judge, score, choices, args.budgets)
            best = sorted(
                (count, short(s), repr(g)) for (s, g), count in reached.items()
            )
            for count, solver, grid in best[:5]:
                print(f"  at the floor with {count}: {solver}, {grid}")
        adaptive_rows(judge, score)
    law = laws["2-d"]
    if args.train_steps:
        print("\n## 2-d mixture, learned score")
        score = learned_score(law, args.train_steps)
        judge = Judge(law, args.num_draws, args.num_repeats)
        choices = [(DPMSolverPP(2), Geometric()), (DPMSolverSDE(3), Geometric())]
        table(judge, score, choices, (8, 16, 32, 64))


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-draws", type=int, default=10_000)
    parser.add_argument("--num-repeats", type=int, default=4)
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--plot", type=Path, help="only write this figure (2-d)")
    parser.add_argument(
        "--extras",
        action="store_true",
        help="only grids from a pilot run, grids by process and expectations",
    )
    parser.add_argument(
        "--diffrax", action="store_true", help="only times beside diffrax's Euler"
    )
    parser.add_argument("--laws", nargs="+", default=["2-d", "16-d"])
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
