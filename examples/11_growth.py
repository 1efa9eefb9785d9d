# %% [markdown]
# # A hierarchical regression against NUTS
#
# Thirty young rats were weighed on five days (Gelfand et al. 1990). Each grows along a
# line of its own, and the lines are alike: 65 unknown numbers. `ScoreLangevin` is a
# kernel of MCMC as NUTS is, and needs no learned score; both are exact. Here they
# sample the same model, with groups in non-centered form.
#
# How much work is a draw worth? Seconds of a first run are mostly compilation, those of
# a second, with another key, sampling alone. Gradients do not depend on the machine.
#
# Run it with `python examples/11_growth.py --help` for its settings.

# %%
import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from numpyro_score import ScoreLangevin

DAYS = np.array([8.0, 15.0, 22.0, 29.0, 36.0])
# fmt: off
WEIGHTS = np.array([
    [151, 199, 246, 283, 320], [145, 199, 249, 293, 354], [147, 214, 263, 312, 328],
    [155, 200, 237, 272, 297], [135, 188, 230, 280, 323], [159, 210, 252, 298, 331],
    [141, 189, 231, 275, 305], [159, 201, 248, 297, 338], [177, 236, 285, 350, 376],
    [134, 182, 220, 260, 296], [160, 208, 261, 313, 352], [143, 188, 220, 273, 314],
    [154, 200, 244, 289, 325], [171, 221, 270, 326, 358], [163, 216, 242, 281, 312],
    [160, 207, 248, 288, 324], [142, 187, 234, 280, 316], [156, 203, 243, 283, 317],
    [157, 212, 259, 307, 336], [152, 203, 246, 286, 321], [154, 205, 253, 298, 334],
    [139, 190, 225, 267, 302], [146, 191, 229, 272, 302], [157, 211, 250, 285, 323],
    [132, 185, 237, 286, 331], [160, 207, 257, 303, 345], [169, 216, 261, 295, 333],
    [157, 205, 248, 289, 316], [137, 180, 219, 258, 291], [153, 200, 244, 286, 324],
], float)  # g, by day
# fmt: on
SHARED = ("weight_mean", "growth_mean", "weight_sd", "growth_sd", "noise")

# %% [markdown]
# ## The model
#
# Weights at the middle day and growth per day, non-centered: each rat's deviations are
# in units of the population's sd.


# %%
def growth(num_rats=1, weight=None):
    weight_mean = numpyro.sample("weight_mean", dist.Normal(240.0, 30.0))  # g
    growth_mean = numpyro.sample("growth_mean", dist.Normal(6.0, 2.0))  # g per day
    weight_sd = numpyro.sample("weight_sd", dist.LogNormal(2.5, 0.5))
    growth_sd = numpyro.sample("growth_sd", dist.LogNormal(-0.5, 0.5))
    noise = numpyro.sample("noise", dist.LogNormal(2.0, 0.5))
    with numpyro.plate("rat", num_rats):
        heavier = numpyro.sample("heavier", dist.Normal(0.0, 1.0))
        faster = numpyro.sample("faster", dist.Normal(0.0, 1.0))
        middle = weight_mean + weight_sd * heavier
        slope = growth_mean + growth_sd * faster
        line = middle[..., None] + slope[..., None] * (DAYS - DAYS.mean())
        numpyro.sample("weight", dist.Normal(line, noise).to_event(1), obs=weight)


class Run(NamedTuple):
    """Draws by chain, and what they cost."""

    draws: dict[str, np.ndarray]
    gradients: int
    seconds: tuple[float, float]  # of a first run and of a second


def run(kernel, args: argparse.Namespace) -> Run:
    mcmc = MCMC(
        kernel,
        num_warmup=args.num_warmup,
        num_samples=args.num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    seconds = []
    for seed in (args.seed, args.seed + 1):
        start = time.time()
        mcmc.run(
            jax.random.key(seed), len(WEIGHTS), WEIGHTS, extra_fields=("num_steps",)
        )
        draws = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
        seconds.append(time.time() - start)
    gradients = int(np.sum(mcmc.get_extra_fields()["num_steps"]))
    return Run(jax.tree.map(np.asarray, draws), gradients, (seconds[0], seconds[1]))


def main(args: argparse.Namespace) -> dict[str, Run]:
    """Run everything; return draws and costs by method."""
    runs = {
        "NUTS": run(NUTS(growth), args),
        "ScoreLangevin": run(ScoreLangevin(growth), args),
    }
    table(runs)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    draw_figure(runs, folder / "growth.png")
    print(f"Figure: {(folder / 'growth.png').resolve()}")
    return runs


# %% [markdown]
# ## The same posterior, at what cost


# %%
def table(runs: dict[str, Run]) -> None:
    print(f"{'mean (sd)':14s}" + "".join(f"{method:>20s}" for method in runs))
    for name in SHARED:
        parts = [r.draws[name] for r in runs.values()]
        cells = [f"{np.mean(x):11.2f} ({np.std(x):6.2f})" for x in parts]
        print(f"{name:14s}" + "".join(cells))
    exact = runs["NUTS"].draws
    for name in ("heavier", "faster"):
        mean, sd = exact[name].mean((0, 1)), exact[name].std((0, 1))
        other = runs["ScoreLangevin"].draws[name]
        offset = np.abs(other.mean((0, 1)) - mean).max() / sd.min()
        print(f"{name}: means of all 30 rats within {offset:.2f} sd of each other")
    rows = {
        "R-hat, largest": [
            max(map(np.max, each(r, split_gelman_rubin))) for r in runs.values()
        ],
        "ESS, smallest": [
            min(map(np.min, each(r, effective_sample_size))) for r in runs.values()
        ],
    }
    for title, values in rows.items():
        print(f"{title:22s}" + "".join(f"{value:16.3f}" for value in values))
    ess = np.array(rows["ESS, smallest"])
    per_gradient = ess / np.array([r.gradients for r in runs.values()])
    print(
        f"{'gradients per ESS':22s}" + "".join(f"{1 / x:16.0f}" for x in per_gradient)
    )
    for number, title in enumerate(("ESS/s, first run", "ESS/s, second run")):
        rate = ess / np.array([r.seconds[number] for r in runs.values()])
        print(f"{title:22s}" + "".join(f"{value:16.0f}" for value in rate))


def each(result: Run, statistic) -> list[np.ndarray]:
    """Return a statistic of every number of every site."""
    return [np.asarray(statistic(values)) for values in result.draws.values()]


def draw_figure(runs: dict[str, Run], path: Path) -> None:
    """Draw the population, and the line of the lightest and of the heaviest rat."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for style, (method, r) in zip(("k", "C3"), runs.items(), strict=True):
        for ax, name in zip(axes, ("growth_mean", "growth_sd"), strict=False):
            ax.hist(
                r.draws[name].ravel(), 60, histtype="step", density=True, color=style,
                label=method,
            )  # fmt: skip
            ax.set(title=f"{name}, g per day", yticks=[])
    axes[0].legend(fontsize="x-small")
    draws = runs["ScoreLangevin"].draws
    middle = draws["weight_mean"] + draws["weight_sd"] * draws["heavier"].T.swapaxes(
        1, 2
    )
    slope = draws["growth_mean"] + draws["growth_sd"] * draws["faster"].T.swapaxes(1, 2)
    for color, rat in (("C0", 3), ("C1", 8)):
        line = middle[rat][..., None] + slope[rat][..., None] * (DAYS - DAYS.mean())
        low, high = np.quantile(line.reshape(-1, len(DAYS)), [0.05, 0.95], axis=0)
        axes[2].fill_between(DAYS, low, high, color=color, alpha=0.3)
        axes[2].plot(DAYS, WEIGHTS[rat], "o", color=color)
    axes[2].set(title="two rats, 90 % of their lines", xlabel="day", ylabel="weight, g")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A hierarchical regression by NUTS and by ScoreLangevin.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num-warmup", type=int, default=1000, help="transitions of warm-up")
    add("--num-samples", type=int, default=2000, help="draws of each of four chains")
    add("--seed", type=int, default=0, help="seed of everything")
    add("--output", default="examples/output/11_growth", help="folder for the figure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
