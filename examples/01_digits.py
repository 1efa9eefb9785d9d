# %% [markdown]
# # Restore digits with a learned prior
#
# A score learned from 8 x 8 images of handwritten digits becomes the prior of a NumPyro
# model. The likelihood loses information, once by hiding the lower half of the image,
# once by blurring and dropping three pixels of four; the sd of the noise is unknown.
# `ParallelTempering` samples image and noise sd together and crosses between digits of
# different shape, ArviZ reads the chains, and digits that training never saw say how
# far the posterior can be trusted.
#
# Run it with `make demo`, or `python examples/01_digits.py --help` for its settings.

# %%
import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import arviz
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC
from scipy.special import ndtri
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from numpyro_score import (
    MLP,
    ParallelTempering,
    ScoreDistribution,
    ScoreMatching,
    to_datatree,
)
from numpyro_score.diagnostics import denoising_calibration

NOISE = 1.0  # true sd of the measurement noise, in gray values of 0..16
INTERVALS = (0.5, 0.9)
NUM_SHAPES = 5  # draws in a row of the figure
EXACT = """\
What is exact, and what is approximate
- Learned prior: approximate. It is a net trained on some 1400 images; the table below
  measures it on held-out digits. No sampler removes this error.
- Smoothing: the prior is the law of "digit + pixel noise of sd {noise:.2f}" (level
  {level} of the data's sd {scale:.2f}). The truths here carry such noise too: coverage
  is measured for the law that the model states.
- Accept step: the change of the log prior is a 3-point Gauss-Lobatto integral of the
  score; exact up to quadrature, and up to the net not being a gradient everywhere.
- Likelihood and noise sd: exact, accepted or rejected by their value.
- Hot end: draws of the learned prior by a solver with finitely many steps.
- Monte Carlo: chains are renewed by draws of the prior that travel to the posterior;
  the number of restarts, R-hat and ESS say how well they mixed.
- Gaussian baseline: closed form, and it is told the true noise sd."""


class Data(NamedTuple):
    """Images for training, and held-out images, each with their labels."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    labels: np.ndarray


class Task(NamedTuple):
    """A measurement: y = operator x + noise, and the pixels that it does not show."""

    name: str
    operator: np.ndarray
    hidden: np.ndarray
    shape: tuple[int, int]


class Fit(NamedTuple):
    """A held-out image, what was measured of it, posterior draws and log evidence."""

    truth: np.ndarray
    y: np.ndarray
    draws: np.ndarray  # (chain, draw, pixel)
    noise: np.ndarray  # (chain, draw)
    log_evidence: np.ndarray  # (chain,)


# %% [markdown]
# ## Data and score


# %%
def split_digits(args: argparse.Namespace) -> Data:
    """Hold out a fifth of the digits; those shown first differ in their labels."""
    digits = load_digits()
    images = digits.images.astype(np.float32)
    rows = np.random.default_rng(args.seed).permutation(len(images))
    test, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    first = np.sort(np.unique(digits.target[test], return_index=True)[1])
    test = np.concatenate([test[first], np.delete(test, first)])
    labels = digits.target
    return Data(images[train], labels[train], images[test], labels[test])


def learn(args: argparse.Namespace, data: Data):
    """Train a residual MLP; the held-out loss shows whether it overfits."""
    start = time.perf_counter()
    net = MLP(64, width=args.width, depth=3)
    result = ScoreMatching(net).run(
        jax.random.key(args.seed),
        args.train_steps,
        data.train,
        validation=data.test,
        progress_bar=args.progress_bar,
    )
    losses = np.asarray(result.validation_losses)
    print(
        f"Score learned from {len(data.train)} digits in {args.train_steps} steps, "
        f"{time.perf_counter() - start:.0f} s.\nDenoising loss: training "
        f"{np.mean(result.losses[-len(result.losses) // 20 :]):.3f}, held out "
        f"{losses[-1]:.3f} (lowest {losses.min():.3f}; 1.0 predicts no noise)."
    )
    print_overconfidence(result.score, data.test, args.level)
    return result


def print_overconfidence(score, test: np.ndarray, lowest: float) -> None:
    """Print how far the errors of the score exceed those that it states, by level.

    A net that is too large for its data knows its training digits too well, and
    posteriors under it are too narrow.
    """
    levels = lowest * 2.0 ** np.arange(5)
    ts = score.sde.time(jnp.asarray(levels))
    ratios = denoising_calibration(jax.random.key(0), score, test, ts).ratio
    pairs = zip(levels, np.asarray(ratios), strict=True)
    cells = ", ".join(f"{ratio:.2f} at level {level:.1f}" for level, ratio in pairs)
    print(f"Denoising error of held-out digits over what the score states: {cells}.\n")


# %% [markdown]
# ## Model
#
# The learned prior stands beside an ordinary site. Its time `t` is an argument, so one
# model serves all smoothing levels.


# %%
def make_model(score, operator: np.ndarray) -> Callable:
    def model(y, t):
        x = numpyro.sample("x", ScoreDistribution(score, t=t))
        noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
        numpyro.deterministic("ink", x.mean())
        mean = jnp.asarray(operator) @ x.ravel()
        numpyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)

    return model


def inpainting() -> Task:
    """See the upper half only."""
    hidden = np.arange(64) >= 32
    return Task("inpainting", np.eye(64, dtype=np.float32)[:32], hidden, (4, 8))


def blurring() -> Task:
    """Blur with weights (1, 2, 1)/4 both ways and keep every second row and column."""
    blur = (2 * np.eye(8) + np.eye(8, k=1) + np.eye(8, k=-1)) / 4
    operator = np.kron(blur[::2], blur[::2]).astype(np.float32)
    return Task("deblurring", operator, np.ones(64, bool), (4, 4))


# %% [markdown]
# ## Posterior
#
# Langevin moves are local: at little noise they do not jump from one digit to another.
# Parallel tempering draws from the prior at its hot end, and lets the draws travel
# through tempered likelihoods to the posterior. Swaps need the likelihood alone, so a
# prior known by its score is enough. They are what changes the shape of a digit: few
# local moves are made between them.


# %%
def sampler_of(model: Callable, args: argparse.Namespace) -> MCMC:
    return MCMC(
        ParallelTempering(model, max_transitions=2),
        num_warmup=args.num_warmup,
        num_samples=args.num_samples,
        num_chains=args.num_chains,
        chain_method="vectorized",
        progress_bar=args.progress_bar,
        jit_model_args=True,  # one program for all digits of a task
    )


def measure(args: argparse.Namespace, task: Task, image, scale: float, index: int):
    """Return the truth, a digit with the prior's pixel noise, and its measurement."""
    rng = np.random.default_rng([args.seed, index])
    pixel_noise = args.level * scale * rng.normal(size=64)
    truth = image.ravel() + pixel_noise
    y = task.operator @ truth + NOISE * rng.normal(size=len(task.operator))
    return truth, y.astype(np.float32)


def show_chains(task: Task, mcmc: MCMC, folder: Path) -> None:
    """Print ArviZ's summary and the sampler's own, and draw the chains."""
    tree = to_datatree(mcmc, dims={"x": ["row", "column"]})
    pixels = {"row": [1, 5], "column": [2, 4]}
    print(arviz.summary(tree, var_names=["noise", "ink", "x"], coords=pixels))
    state = mcmc.last_state
    print(
        f"Log evidence of each chain: {np.round(state.log_evidence, 1)}\n"
        f"Barrier {float(state.barrier.mean()):.1f} between prior and posterior, "
        f"{int(state.adapt_state.num_rungs.max())} temperatures, "
        f"{int(state.restarts.min())} restarts or more in each chain"
    )
    for name, plot in (("trace", arviz.plot_trace), ("rank", arviz.plot_rank)):
        plot(tree, var_names=["noise", "ink"], backend="matplotlib").savefig(
            folder / f"{task.name}_{name}.png", dpi=100, bbox_inches="tight"
        )
        plt.close("all")


def fit_digits(args, task: Task, score, data: Data, folder: Path) -> list[Fit]:
    """Sample every digit; the first with ArviZ's report."""
    mcmc = sampler_of(make_model(score, task.operator), args)
    scale, t = float(score.standardize.scale.mean()), score.sde.time(args.level)
    fits = []
    for index in range(args.num_digits):
        truth, y = measure(args, task, data.test[index], scale, index)
        mcmc.run(jax.random.key(args.seed + index), y, t)  # compiled for the first
        if index == 0:
            show_chains(task, mcmc, folder)
        samples = mcmc.get_samples(True)
        draws = np.asarray(samples["x"]).reshape(*samples["x"].shape[:2], 64)
        evidence = np.asarray(mcmc.last_state.log_evidence)
        fits.append(Fit(truth, y, draws, np.asarray(samples["noise"]), evidence))
        print(f"{task.name} of digit {index + 1} of {args.num_digits} done", flush=True)
    return fits


# %% [markdown]
# ## Calibration
#
# How often do central intervals hold the hidden truth, and how far is the posterior
# mean? A Gaussian prior with the mean and covariance of the training digits does the
# same by a formula.


# %%
class Result(NamedTuple):
    """Coverage (one number per interval), squared error and variance of one digit."""

    coverage: tuple[float, ...]
    error: float
    variance: float


def judge(truth, mean, variance, quantiles: Callable, hidden) -> Result:
    coverage = []
    for mass in INTERVALS:
        low, high = quantiles((1 - mass) / 2), quantiles((1 + mass) / 2)
        inside = (truth > low) & (truth < high)
        coverage.append(float(inside[hidden].mean()))
    error = np.mean(np.square(mean - truth)[hidden])
    return Result(tuple(coverage), float(error), float(variance[hidden].mean()))


def judge_draws(fit: Fit, hidden) -> Result:
    flat = fit.draws.reshape(-1, 64)
    mean, variance = flat.mean(0), flat.var(0)
    return judge(fit.truth, mean, variance, lambda p: np.quantile(flat, p, 0), hidden)


def judge_gaussian(task: Task, fit: Fit, train, level_sd: float) -> Result:
    """Condition N(mean, covariance) of the training digits on y, in closed form."""
    rows = train.reshape(-1, 64).astype(float)
    mean = rows.mean(0)
    cov = np.cov(rows.T) + level_sd**2 * np.eye(64)
    A = task.operator
    gain = np.linalg.solve(A @ cov @ A.T + NOISE**2 * np.eye(len(A)), A @ cov).T
    mean = mean + gain @ (fit.y - A @ mean)
    variance = np.diag(cov - gain @ A @ cov)

    def quantiles(p: float) -> np.ndarray:
        return mean + np.sqrt(variance) * ndtri(p)

    return judge(fit.truth, mean, variance, quantiles, task.hidden)


def table_row(task: Task, prior: str, results: list[Result]) -> list[str]:
    coverage = np.array([r.coverage for r in results])
    error = coverage.std(0, ddof=1) / np.sqrt(len(results))
    cells = [f"{m:.2f} ± {e:.2f}" for m, e in zip(coverage.mean(0), error, strict=True)]
    rmse = np.sqrt(np.mean([r.error for r in results]))
    sd = np.sqrt(np.mean([r.variance for r in results]))
    return [task.name, prior, *cells, f"{rmse:.2f}", f"{sd:.2f}"]


def print_table(rows: list[list[str]]) -> None:
    header = ["task", "prior", *(f"{m:.0%} interval" for m in INTERVALS), "RMSE", "sd"]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(13) for cell in row).rstrip())


def print_mixing(task: Task, fits: list[Fit]) -> None:
    """Print how well chains mixed, over all digits and pixels."""

    def worst(measure: Callable, choose: Callable) -> tuple[float, float]:
        return (
            choose([choose(measure(fit.draws)) for fit in fits]),
            choose([choose(measure(fit.noise)) for fit in fits]),
        )

    r_hat, ess = worst(split_gelman_rubin, np.max), worst(effective_sample_size, np.min)
    print(
        f"{task.name.capitalize()}, {len(fits)} digits: R-hat at most {r_hat[0]:.3f} "
        f"of pixels and {r_hat[1]:.3f} of the noise sd; ESS at least {ess[0]:.0f} and "
        f"{ess[1]:.0f}."
    )
    if max(r_hat) > 1.05:
        print("Chains disagree. Try more --num-warmup and --num-samples.")


# %% [markdown]
# ## Figures


# %%
def panels(task: Task, fit: Fit, classify: Callable) -> list[tuple]:
    """Return title, image and color map of one row: data, and a draw of each shape.

    Shapes are told apart by a classifier, and ordered by their share of the draws.
    """
    flat = fit.draws.reshape(-1, 64)
    data = fit.y.reshape(task.shape)
    if task.name == "inpainting":
        data = np.concatenate([data, np.full((4, 8), np.nan)])
    row = [
        ("truth", fit.truth, "gray"),
        ("data", data, "gray"),
        ("mean", flat.mean(0), "gray"),
        ("sd", flat.std(0), "magma"),
    ]
    labels = classify(flat)
    shares = np.bincount(labels, minlength=10) / len(labels)
    for label in np.argsort(-shares, kind="stable")[:NUM_SHAPES]:
        if shares[label] > 0:
            draw = flat[np.flatnonzero(labels == label)[0]]
            row.append((f"{label}: {shares[label]:.1%}", draw, "gray"))
    return [(t, x.reshape(8, 8) if x.size == 64 else x, c) for t, x, c in row]


def draw_posteriors(tasks: list, classify: Callable, num_rows: int, path: Path) -> None:
    """Draw truth, data, mean, sd and shapes: one block of rows per task."""
    rows = [(task, fit) for task, fits in tasks for fit in fits[:num_rows]]
    figure, axes = plt.subplots(
        len(rows), 4 + NUM_SHAPES, figsize=(9, 1.25 * len(rows) + 0.3), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for i, (task, fit) in enumerate(rows):
        for axis in axes[i]:
            axis.axis("off")
        for axis, (title, image, colors) in zip(
            axes[i], panels(task, fit, classify), strict=False
        ):
            top = 5 if title == "sd" else 16
            axis.axis("on")
            axis.set_facecolor("steelblue")  # shows where nothing was observed
            axis.imshow(image, cmap=colors, vmin=0, vmax=top)
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, fontsize=9)
        axes[i, 0].set_ylabel(f"log Z {fit.log_evidence.mean():.1f}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_losses(result, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    num, blocks = len(result.losses), len(result.validation_losses)
    steps = np.linspace(num / blocks, num, blocks)
    means = [b.mean() for b in np.array_split(np.asarray(result.losses), blocks)]
    axis.plot(steps, means, label="training (current weights)")
    axis.plot(steps, result.validation_losses, label="held out (averaged weights)")
    axis.set(xlabel="step", ylabel="denoising loss", title="Learning the score")
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# %% [markdown]
# ## All together


# %%
def main(args: argparse.Namespace) -> list[list[str]]:
    """Run everything; return the rows of the calibration table."""
    numpyro.set_platform(args.device)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = split_digits(args)
    result = learn(args, data)
    score = result.score
    scale = float(score.standardize.scale.mean())
    level_sd = args.level * scale
    draw_losses(result, folder / "losses.png")
    rows, fitted = [], []
    for task in (inpainting(), blurring()):
        start = time.perf_counter()
        print(f"{task.name.capitalize()} of a {data.labels[0]}, true noise sd {NOISE}")
        fits = fit_digits(args, task, score, data, folder)
        learned = [judge_draws(fit, task.hidden) for fit in fits]
        baseline = [judge_gaussian(task, fit, data.train, level_sd) for fit in fits]
        rows.append(table_row(task, "learned", learned))
        rows.append(table_row(task, "Gaussian", baseline))
        fitted.append((task, fits))
        print_mixing(task, fits)
        print(f"{len(fits)} digits in {time.perf_counter() - start:.0f} s.\n")
    classifier = KNeighborsClassifier(3)
    classifier.fit(data.train.reshape(-1, 64), data.train_labels)
    path = folder / "posteriors.png"
    draw_posteriors(fitted, classifier.predict, min(3, args.num_digits), path)
    print(EXACT.format(noise=level_sd, level=args.level, scale=scale))
    print("\nCoverage (± standard error over digits) and error at unseen pixels")
    print_table(rows)
    print(f"\nFigures: {folder.resolve()}")
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Restore digits with a learned prior.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train-steps", type=int, default=3000, help="steps of score matching")
    add("--width", type=int, default=128, help="hidden units of the net")
    level = "noise level of the prior, in sds of the data"
    add("--level", type=float, default=0.1, help=level)
    add("--num-warmup", type=int, default=500, help="warm-up of each chain")
    add("--num-samples", type=int, default=2000, help="draws of each chain")
    add("--num-chains", type=int, default=4, help="vectorized chains")
    add("--num-digits", type=int, default=2, help="held-out digits per task")
    add("--seed", type=int, default=0, help="seed of the split and of all noise")
    add("--device", default="cpu", choices=["cpu", "gpu", "tpu"], help="JAX platform")
    add("--output", default="examples/output/01_digits", help="folder for the figures")
    add("--progress-bar", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
