# %% [markdown]
# # A prior over curves
#
# Heights along a path, from a map of elevations in Tennessee that ships with
# Matplotlib. A score learns the law of profiles of 48 points from the north of the map.
# In the south a dozen heights are measured at irregular places, between the points too,
# with an error whose sd is not known: what was the profile?
#
# The profile is one learned site of a NumPyro model, the sd an ordinary one; `ScoreSDE`
# draws both together. A Gaussian process with a fitted length scale, the usual prior
# over curves, gets the same data.
#
# Run it with `python examples/08_profiles.py --help` for its settings.

# %%
import argparse
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from matplotlib.cbook import get_sample_data
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from numpyro_score import MLP, VE, ScoreDistribution, ScoreMatching, ScoreModel
from numpyro_score.infer import ScoreSDE

LENGTH = 48  # points of a profile, about 75 m apart
SMOOTH = 0.05  # noise level of the prior, of the data's sd
NOISE = 15.0  # true sd of a measurement, in m
GRID = np.arange(LENGTH)

# %% [markdown]
# ## Profiles, and the prior
#
# Windows of the map's rows, relative to their mean height. Rows 0 to 239 are learned
# from; those from 260 on are tested. Profiles are also learned from mirrored.


# %%
def profiles(first: int, last: int, step: int) -> np.ndarray:
    """Return windows of every ``step``-th row, relative to their mean, in m."""
    with get_sample_data("jacksboro_fault_dem.npz") as file:
        rows = file["elevation"][first:last:step].astype(np.float32)
    starts = range(0, rows.shape[1] - LENGTH + 1, 5)
    windows = np.concatenate([rows[:, s : s + LENGTH] for s in starts])
    return windows - windows.mean(1, keepdims=True)


def learn(args: argparse.Namespace) -> ScoreModel:
    data = profiles(0, 240, 1)
    data = np.concatenate([data, data[:, ::-1]])
    trainer = ScoreMatching(MLP(LENGTH, width=args.width, depth=3), VE(SMOOTH, 20.0))
    key = jax.random.key(args.seed)
    return trainer.run(key, args.train_steps, data, progress_bar=False).score


# %% [markdown]
# ## The model


# %%
def make_model(score: ScoreModel):
    def model(places, y=None):
        prior = ScoreDistribution(score, t=score.sde.time(SMOOTH))
        profile = numpyro.sample("profile", prior)
        noise = numpyro.sample("noise", dist.LogNormal(np.log(20.0), 0.7))
        height = jnp.interp(places, GRID, profile)
        numpyro.sample("y", dist.Normal(height, noise).to_event(1), obs=y)

    return model


class Fit(NamedTuple):
    """A true profile, where it was measured, what was read, and draws by method."""

    truth: np.ndarray
    places: np.ndarray
    y: np.ndarray
    draws: dict[str, np.ndarray]
    noise: np.ndarray


def by_score(inference: ScoreSDE, key: jax.Array, places, y) -> tuple:
    inference.run(key, jnp.asarray(places), jnp.asarray(y))
    draws = jax.tree.map(np.asarray, inference.get_samples())
    return draws["profile"], draws["noise"]


def by_gaussian_process(places, y, num_draws: int, seed: int) -> np.ndarray:
    """Fit scale, length and noise by maximum likelihood; draw the curve."""
    kernel = ConstantKernel(80.0**2, (10.0**2, 500.0**2)) * RBF(5.0, (1.0, 50.0))
    kernel = kernel + WhiteKernel(20.0**2, (1.0, 100.0**2))
    process = GaussianProcessRegressor(kernel, n_restarts_optimizer=3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters at their bounds
        process.fit(places[:, None], y)
    mean, cov = process.predict(GRID[:, None], return_cov=True)
    cov = cov - process.kernel_.k2.noise_level * np.eye(LENGTH)  # the curve's alone
    return np.random.default_rng(seed).multivariate_normal(mean, cov, num_draws)


def infer(score: ScoreModel, args: argparse.Namespace) -> list[Fit]:
    rng = np.random.default_rng(args.seed + 1)
    test = rng.permutation(profiles(260, 344, 4))[: args.num_curves]
    inference = ScoreSDE(
        make_model(score),
        num_samples=args.num_particles,
        num_particles=args.num_particles,
        levels=args.levels,
        progress_bar=False,
    )
    fits = []
    for k, truth in enumerate(test):
        places = np.sort(rng.uniform(0, LENGTH - 1, args.num_places)).astype("f4")
        y = np.interp(places, GRID, truth) + NOISE * rng.normal(size=len(places))
        y = y.astype("f4")
        learned, noise = by_score(inference, jax.random.key(args.seed + k), places, y)
        process = by_gaussian_process(places, y, args.num_particles, args.seed)
        draws = {"learned prior": learned, "Gaussian process": process}
        fits.append(Fit(truth, places, y, draws, noise))
    return fits


# %% [markdown]
# ## How well


# %%
def print_table(fits: list[Fit]) -> None:
    print(f"{'':18s}{'50% interval':>15s}{'90% interval':>15s}{'RMSE, m':>15s}")
    for method in fits[0].draws:
        rows = []
        for fit in fits:
            low, high = np.quantile(fit.draws[method], [[0.25, 0.05], [0.75, 0.95]], 0)
            inside = ((low <= fit.truth) & (fit.truth <= high)).mean(1)
            error = fit.draws[method].mean(0) - fit.truth
            rows.append([*inside, np.sqrt(np.mean(error**2))])
        mean = np.mean(rows, axis=0)
        error = np.std(rows, axis=0) / np.sqrt(len(rows))
        cells = [
            f"{m:8.2f} ± {e:.2f}" for m, e in zip(mean[:2], error[:2], strict=True)
        ]
        print(f"{method:18s}" + "".join(cells) + f"{mean[2]:9.1f} ± {error[2]:.1f}")
    noise = np.array([[fit.noise.mean(), fit.noise.std()] for fit in fits])
    print(
        f"sd of a measurement: {NOISE:.0f} m; posterior means {noise[:, 0].mean():.1f}"
    )


def draw_figure(fits: list[Fit], path: Path) -> None:
    fits = fits[:4]
    methods = list(fits[0].draws)
    figure, axes = plt.subplots(
        len(methods), len(fits), squeeze=False, sharex=True, sharey="col",
        figsize=(11, 4.6), layout="constrained",
    )  # fmt: skip
    for row, method in zip(axes, methods, strict=True):
        for k, (ax, fit) in enumerate(zip(row, fits, strict=True)):
            low, high = np.quantile(fit.draws[method], [0.05, 0.95], axis=0)
            ax.fill_between(GRID, low, high, color=f"C{k}", alpha=0.25, lw=0)
            step = max(1, len(fit.draws[method]) // 5)
            ax.plot(GRID, fit.draws[method][::step].T, color=f"C{k}", lw=0.7)
            ax.plot(GRID, fit.truth, "k", lw=1.5)
            ax.plot(fit.places, fit.y, "ko", markersize=3)
        row[0].set(ylabel=f"{method}\nheight, m")
    for ax in axes[-1]:
        ax.set(xlabel="place")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args: argparse.Namespace) -> list[Fit]:
    """Run everything; return truths, data and draws."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    fits = infer(learn(args), args)
    print(f"{len(fits)} profiles, each measured at {args.num_places} places")
    print_table(fits)
    draw_figure(fits, folder / "profiles.png")
    print(f"Figure: {(folder / 'profiles.png').resolve()}")
    return fits


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learn a prior over curves, and infer curves from noisy points.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train-steps", type=int, default=3000, help="steps of training the score")
    add("--width", type=int, default=128, help="hidden units of the net")
    add("--num-curves", type=int, default=12, help="profiles to infer")
    add("--num-places", type=int, default=12, help="measurements of each")
    add("--num-particles", type=int, default=400, help="particles and draws")
    add("--levels", type=int, default=60, help="noise levels")
    add("--seed", type=int, default=0, help="seed of everything")
    add("--output", default="examples/output/08_profiles", help="folder for the figure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
