# %% [markdown]
# # Missing cells of a table
#
# Fisher's irises: length and width of sepals and petals of 150 flowers. Some cells of
# the table are missing, others are hidden to see how well they are filled in. The joint
# law of the four columns is learned once, from rows with missing cells; it answers for
# every pattern of missing cells, and one compiled program serves all rows.
#
# The three species are not told, so petals have two separate modes given short sepals.
# A normal law, the usual choice, knows one mean and one covariance.
#
# Run it with `python examples/07_missing_cells.py --help` for its settings.

# %%
import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_iris

from numpyro_score.data.normal_em import conditional, fit_normal, patterns
from numpyro_score.infer import learn_table

MISSING, HIDDEN = 0.1, 0.4  # shares of the cells: when learning, when testing
SHARES = np.arange(0.1, 1.0, 0.1)  # of draws, in central intervals
PETAL_LENGTH = 2  # the column in the figure

# %% [markdown]
# ## The table
#
# Two thirds of the flowers are learned from. The others are tested, each with several
# patterns of hidden cells, and once with both columns of petals hidden.


# %%
class Tables(NamedTuple):
    """Rows to learn from, true rows, the same with holes, and without petals."""

    learned: pd.DataFrame
    truth: pd.DataFrame
    holes: pd.DataFrame
    sepals: pd.DataFrame


def split(args: argparse.Namespace) -> Tables:
    rng = np.random.default_rng(args.seed)
    frame = load_iris(as_frame=True).data
    frame = frame.iloc[rng.permutation(len(frame))]
    learned, test = frame[:100], frame[100:]
    truth = pd.concat([test] * args.num_patterns)
    return Tables(
        learned.mask(rng.uniform(size=learned.shape) < MISSING),
        truth,
        truth.mask(rng.uniform(size=truth.shape) < HIDDEN),
        test.assign(**dict.fromkeys(test.columns[PETAL_LENGTH:], np.nan)),
    )


# %% [markdown]
# ## Two ways to fill cells in


# %%
def by_score(tables: Tables, args: argparse.Namespace) -> list[np.ndarray]:
    """Return draws of both tables with holes, of shape (draws, rows, columns)."""
    key_learn, *keys = jax.random.split(jax.random.key(args.seed), 3)
    start = time.perf_counter()
    table = learn_table(
        key_learn,
        tables.learned,
        num_steps=args.train_steps,
        progress_bar=False,
    )
    print(f"Learned in {time.perf_counter() - start:.0f} s")
    return [
        table.impute_array(key, holes, args.num_draws)
        for key, holes in zip(keys, (tables.holes, tables.sepals), strict=True)
    ]


def by_normal(tables: Tables, args: argparse.Namespace) -> list[np.ndarray]:
    """Draw from the likeliest normal law, which EM fits to rows with missing cells."""
    rng = np.random.default_rng(args.seed + 1)
    mean, covariance = fit_normal(tables.learned.to_numpy())
    filled = []
    for holes in (tables.holes.to_numpy(), tables.sepals.to_numpy()):
        draws = np.tile(holes, (args.num_draws, 1, 1))
        for members, missing in patterns(holes):
            if missing.any():
                center, spread = conditional(holes[members], missing, mean, covariance)
                rows = np.tile(center, (args.num_draws, 1, 1))
                zero = np.zeros(missing.sum())
                rows[..., missing] += rng.multivariate_normal(
                    zero, spread, rows.shape[:2]
                )
                draws[:, members] = rows
        filled.append(draws)
    return filled


# %% [markdown]
# ## How well
#
# Coverage of central intervals, and the continuous ranked probability score
# $E|X - x| - \frac12 E|X - X'|$ of draws $X$ and a truth $x$ (Gneiting and Raftery
# 2007), which is low for draws that are near the truth and no wider than need be.


# %%
class Quality(NamedTuple):
    """Coverage by share, their standard errors, CRPS in sd, and its error."""

    coverage: np.ndarray
    error: np.ndarray
    crps: float
    crps_error: float


def judge(draws: np.ndarray, tables: Tables, num_flowers: int) -> Quality:
    """Average over hidden cells; errors are over flowers with their patterns."""
    truth, is_hidden = tables.truth.to_numpy(), tables.holes.isna().to_numpy()
    ordered = np.sort(draws, axis=0)
    num_draws = len(draws)
    weight = (2 * np.arange(1, num_draws + 1) - num_draws - 1) / num_draws**2
    crps = np.abs(draws - truth).mean(0) - np.tensordot(weight, ordered, 1)
    crps = crps / tables.learned.std().to_numpy()
    low = np.quantile(draws, 0.5 - SHARES / 2, axis=0)
    high = np.quantile(draws, 0.5 + SHARES / 2, axis=0)
    inside = (low <= truth) & (truth <= high)
    cells = np.concatenate([inside, crps[None]]) * is_hidden
    flowers = cells.reshape(len(cells), -1, num_flowers, 4).sum((1, 3))
    counts = is_hidden.reshape(-1, num_flowers, 4).sum((0, 2))
    mean = flowers.sum(1) / counts.sum()
    residuals = flowers - mean[:, None] * counts
    error = np.sqrt(np.square(residuals).sum(1)) / counts.sum()
    return Quality(mean[:-1], error[:-1], mean[-1], error[-1])


def print_table(qualities: dict[str, Quality]) -> None:
    print(f"{'':12s}{'50% interval':>16s}{'90% interval':>16s}{'CRPS, sd':>18s}")
    for name, quality in qualities.items():
        cells = [f"{quality.coverage[k]:9.2f} ± {quality.error[k]:.2f}" for k in (4, 8)]
        crps = f"{quality.crps:10.3f} ± {quality.crps_error:.3f}"
        print(f"{name:12s}" + "".join(cells) + crps)


# %%
def draw_figure(tables: Tables, filled: dict, qualities: dict, path: Path) -> None:
    """Draw petals of three flowers of which the sepals are known, and coverage."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    sepals, truth = tables.sepals.to_numpy(), tables.truth.to_numpy()
    order = np.argsort(filled["score"][1][:, :, PETAL_LENGTH].std(0))
    picked = order[[0, len(order) // 2, -1]]
    for ax, (name, draws) in zip(axes, filled.items(), strict=False):
        ax.plot(*tables.learned.to_numpy()[:, [0, PETAL_LENGTH]].T, ".", color="0.7")
        for color, row in enumerate(picked):
            jitter = np.random.default_rng(0).uniform(-0.05, 0.05, len(draws[1]))
            petals = draws[1][:, row, PETAL_LENGTH]
            ax.plot(sepals[row, 0] + jitter, petals, f"C{color}.", markersize=3)
            ax.plot(*truth[row, [0, PETAL_LENGTH]], "k+", markersize=12)
        ax.set(title=f"{name}: petals given sepals", xlabel="sepal length, cm")
        ax.set(ylabel="petal length, cm", ylim=(-1, 8))
    for name, quality in qualities.items():
        axes[2].errorbar(SHARES, quality.coverage, quality.error, label=name)
    axes[2].plot([0, 1], [0, 1], color="0.7")
    axes[2].set(title="hidden cells in central intervals", xlabel="share of draws")
    axes[2].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> dict[str, Quality]:
    """Run everything; return the quality by method."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    tables = split(args)
    filled = {"score": by_score(tables, args), "normal law": by_normal(tables, args)}
    qualities = {
        name: judge(draws[0], tables, len(tables.sepals))
        for name, draws in filled.items()
    }
    print(f"{int(tables.holes.isna().sum().sum())} hidden cells of 50 flowers")
    print_table(qualities)
    negative = {
        name: np.mean(draws[1][..., PETAL_LENGTH:] < 0)
        for name, draws in filled.items()
    }
    shares = ", ".join(f"{name} {share:.1%}" for name, share in negative.items())
    print(f"Petals drawn with a negative length or width: {shares}")
    draw_figure(tables, filled, qualities, folder / "missing_cells.png")
    print(f"Figure: {(folder / 'missing_cells.png').resolve()}")
    return qualities


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Fill in the missing cells of a table.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train-steps", type=int, default=2000, help="training steps of each round")
    add("--num-draws", type=int, default=200, help="draws of each cell")
    add("--num-patterns", type=int, default=10, help="patterns of holes per flower")
    add("--seed", type=int, default=0, help="seed of everything")
    folder = "examples/output/07_missing_cells"
    add("--output", default=folder, help="folder for the figure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
