# %% [markdown]
# # Draw from two moons with few evaluations
#
# A score is learned from the two moons. Then the solvers are compared by what a draw
# costs, the score is distilled into a map that draws in one evaluation, and the score
# is guided: to one half of the plane by a classifier, and to a given first coordinate
# by inpainting.
#
# Run it with `python examples/02_two_moons.py --help` for its settings.

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from sklearn.datasets import make_moons

from numpyro_score import MLP, ScoreMatching, ScoreModel
from numpyro_score.consistency import distill
from numpyro_score.diagnostics import (
    plot_work_precision,
    sliced_wasserstein,
    work_precision,
)
from numpyro_score.diagnostics.work_precision import WorkPrecision
from numpyro_score.guidance import classifier_guidance, inpaint
from numpyro_score.solver import (
    DPMSolverPP,
    DPMSolverSDE,
    Euler,
    Geometric,
    Goal,
    UniPC,
    choose,
)

# %% [markdown]
# ## Learn the score


# %%
def moons(num: int, seed: int) -> jax.Array:
    return jnp.asarray(make_moons(num, noise=0.08, random_state=seed)[0], float)


def learn(args: argparse.Namespace) -> ScoreModel:
    trainer = ScoreMatching(MLP(2, width=args.width))
    key = jax.random.key(args.seed)
    data = moons(args.num_rows, args.seed)
    return trainer.run(key, args.train_steps, data, progress_bar=False).score


# %% [markdown]
# ## What a solver costs
#
# The distance to held-out rows cannot fall below the floor, the distance of two sets of
# rows. What remains above it at many evaluations is the error of the learned score.


# %%
def compare(args: argparse.Namespace, score: ScoreModel) -> WorkPrecision:
    choices = [
        (Euler(), Geometric()),
        (DPMSolverPP(), Geometric()),
        (UniPC(), Geometric()),
        (DPMSolverSDE(), Geometric()),
    ]
    rows = moons(2 * args.num_draws, args.seed + 1)
    key = jax.random.key(args.seed + 1)
    curve = work_precision(key, score, rows, choices, args.budgets, num_repeats=2)
    print(f"Sliced Wasserstein distance to held-out rows, floor {curve.floor:.4f}")
    for point in curve.points:
        name = type(point.solver).__name__
        print(f"{name:14s}{point.num_evaluations:4d}{point.sliced_wasserstein:9.4f}")
    return curve


# %% [markdown]
# ## One evaluation per draw


# %%
def one_step(args: argparse.Namespace, score: ScoreModel) -> jax.Array:
    net = MLP(2, width=args.width)
    key = jax.random.key(args.seed + 2)
    model = distill(
        key, score, args.train_steps, net=net, num_paths=args.num_rows
    ).model
    draws = model.sample(jax.random.key(args.seed + 3), (args.num_draws,))
    rows = moons(args.num_draws, args.seed + 4)
    distance = sliced_wasserstein(key, draws, rows)
    print(f"Distilled, one evaluation: {distance:.4f}")
    return draws


# %% [markdown]
# ## Guidance
#
# The classifier must know the noise: the first coordinate of $x_0$ given $x_t$ is taken
# to be normal around its denoised value, with the variance that noise leaves.


# %%
def guided(args: argparse.Namespace, score: ScoreModel) -> dict[str, jax.Array]:
    scale = score.standardize.scale[0]

    def log_right(x: jax.Array, t: jax.Array) -> jax.Array:
        level = score.sde.noise_level(t)
        left_over = scale * level / jnp.sqrt(1 + level**2)
        center = score.denoise(x, t)[0]
        return jax.scipy.stats.norm.logcdf((center - 0.5) / left_over)

    key_right, key_given = jax.random.split(jax.random.key(args.seed + 5))
    solver, ts = choose(Goal.DETERMINISTIC, score.sde)
    right = classifier_guidance(score, log_right).sample(
        key_right, (args.num_draws,), solver=solver, ts=ts
    )
    known, mask = jnp.array([0.5, 0.0]), jnp.array([True, False])
    given = inpaint(key_given, score, known, mask, (args.num_draws,))
    print(f"Share right of 0.5: {float((right[:, 0] > 0.5).mean()):.3f}")
    print(f"Second coordinate given 0.5 for the first: {float(given[:, 1].mean()):.2f}")
    return {"right of 0.5": right, "first coordinate 0.5": given}


# %%
def draw_figures(curve: WorkPrecision, panels: dict, folder: Path) -> None:
    ax = plot_work_precision(curve)
    ax.figure.savefig(folder / "quality.png")
    figure, axes = plt.subplots(1, len(panels), sharex=True, sharey=True)
    for ax, (name, draws) in zip(axes, panels.items(), strict=True):
        ax.plot(draws[:, 0], draws[:, 1], ".", markersize=1)
        ax.set_title(name, fontsize="small")
    figure.savefig(folder / "draws.png")
    plt.close("all")


def main(args: argparse.Namespace) -> WorkPrecision:
    """Run everything; return the curve."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    score = learn(args)
    curve = compare(args, score)
    panels = {"one evaluation": one_step(args, score), **guided(args, score)}
    draw_figures(curve, panels, folder)
    print(f"Figures: {folder.resolve()}")
    return curve


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw from two moons with few evaluations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train-steps", type=int, default=3000, help="steps of every training")
    add("--width", type=int, default=128, help="hidden units of the nets")
    add("--num-rows", type=int, default=10_000, help="rows to learn from")
    add("--num-draws", type=int, default=4000, help="draws to compare")
    budgets = "evaluations per draw"
    add("--budgets", type=int, nargs="+", default=[8, 16, 32], help=budgets)
    add("--seed", type=int, default=0, help="seed of everything")
    add("--output", default="examples/output/02_two_moons", help="folder for figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
