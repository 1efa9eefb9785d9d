# %% [markdown]
# # Blind deblurring with unknown noise
#
# An image of a digit was blurred, three pixels of four were dropped, and noise was
# added. Neither the width of the blur nor the sd of the noise is known. The prior of
# images is learned; width and noise are ordinary sites of the same NumPyro model.
# `ScoreSDE` draws images, widths and sds together, by particles that the data guide
# from noise to digits. Unlike a chain it need not walk from one shape to another.
#
# Run it with `python examples/05_blind_deblurring.py --help` for its settings.

# %%
import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from sklearn.datasets import load_digits

from numpyro_score import MLP, VE, ScoreDistribution, ScoreMatching, ScoreModel
from numpyro_score.infer import ScoreSDE

SIZE = 8  # pixels per side, gray values 0..16
SMOOTH = (
    0.1  # noise level of the prior, of the data's sd: pixel noise of 0.6 gray values
)
WIDTHS, NOISES = (0.5, 0.8, 1.1), (0.3, 0.6, 1.2)  # truths, one after the other

# %% [markdown]
# ## The learned prior


# %%
def learn(args: argparse.Namespace) -> tuple[ScoreModel, np.ndarray]:
    """Return the score of four fifths of the digits, and the others."""
    images = load_digits().images.astype(np.float32)
    images = images[np.random.default_rng(args.seed).permutation(len(images))]
    test, train = np.split(images, [len(images) // 5])
    net = MLP(SIZE**2, width=args.width, depth=3)
    trainer = ScoreMatching(net, VE(SMOOTH, 20.0))
    key = jax.random.key(args.seed)
    result = trainer.run(
        key, args.train_steps, train, validation_share=0.0, progress_bar=False
    )
    return result.score, test


# %% [markdown]
# ## The model
#
# Rows and columns are blurred by a Gaussian of the same width, in pixels.


# %%
def blurred(image: jax.Array, width: jax.Array) -> jax.Array:
    place = jnp.arange(SIZE)
    weights = jnp.exp(-0.5 * jnp.square((place[:, None] - place) / width))
    weights = weights / weights.sum(1, keepdims=True)
    return (weights @ image @ weights.T)[::2, ::2]


def make_model(score: ScoreModel):
    def model(y=None):
        image = numpyro.sample("image", ScoreDistribution(score))
        width = numpyro.sample("width", dist.LogNormal(-0.2, 0.4))
        noise = numpyro.sample("noise", dist.LogNormal(-0.5, 0.6))
        mean = blurred(image, width)
        numpyro.sample("y", dist.Normal(mean, noise).to_event(2), obs=y)

    return model


# %% [markdown]
# ## Draw


# %%
class Fit(NamedTuple):
    """A truth, what was seen of it, and posterior draws."""

    truth: dict[str, np.ndarray]
    y: np.ndarray
    draws: dict[str, np.ndarray]


def truths(score: ScoreModel, test: np.ndarray, args) -> list[tuple]:
    """Return images of the prior's law (digit + pixel noise) and what is seen."""
    rng = np.random.default_rng(args.seed + 1)
    pixel_noise = score.sde.sigma_min * np.asarray(score.standardize.scale)
    cases = []
    for k in range(args.num_images):
        image = test[k] + pixel_noise * rng.standard_normal(test[k].shape)
        width, noise = WIDTHS[k % 3], NOISES[k % 3]
        y = blurred(image, width) + noise * rng.standard_normal((SIZE // 2,) * 2)
        cases.append(({"image": image, "width": width, "noise": noise}, np.array(y)))
    return cases


def restore(score: ScoreModel, test: np.ndarray, args) -> list[Fit]:
    inference = ScoreSDE(
        make_model(score),
        num_samples=args.num_particles,
        num_particles=args.num_particles,
        num_chains=args.num_chains,
        levels=args.levels,
        progress_bar=False,
    )
    fits = []
    for k, (truth, y) in enumerate(truths(score, test, args)):
        inference.run(jax.random.key(args.seed + 2 + k), jnp.asarray(y, float))
        draws = jax.tree.map(np.asarray, inference.get_samples())
        fits.append(Fit(truth, y, draws))
        report(k, fits[-1], inference)
    return fits


def report(k: int, fit: Fit, inference: ScoreSDE) -> None:
    cells = []
    for name in ("width", "noise"):
        values = fit.draws[name]
        cells.append(
            f"{name} {fit.truth[name]:.1f}, seen as {values.mean():.2f} "
            f"({values.std():.2f})"
        )
    error = fit.draws["image"].mean(0) - fit.truth["image"]
    low, high = np.quantile(fit.draws["image"], [0.05, 0.95], axis=0)
    inside = np.mean((low <= fit.truth["image"]) & (fit.truth["image"] <= high))
    cells.append(f"pixels: RMSE {np.sqrt(np.mean(error**2)):.2f}")
    cells.append(f"{inside:.0%} in 90 % intervals")
    evidence = f"{inference.log_evidence:.1f} +- {inference.log_evidence_error:.1f}"
    print(f"Image {k}: {'; '.join(cells)}; log evidence {evidence}", flush=True)


# %%
def draw_figure(fits: list[Fit], path: Path) -> None:
    titles = ["truth", "data", "mean", "sd", "draw", "draw", "draw"]
    figure, axes = plt.subplots(
        len(fits), len(titles), squeeze=False, figsize=(7, len(fits))
    )
    for row, fit in zip(axes, fits, strict=True):
        images = fit.draws["image"]
        picked = images[:: max(1, len(images) // 3)][:3]
        panels = [fit.truth["image"], fit.y, images.mean(0), images.std(0), *picked]
        for ax, panel, title in zip(row, panels, titles, strict=False):
            top = 5 if title == "sd" else 16
            ax.imshow(panel, cmap="gray", vmin=0, vmax=top)
            ax.set_axis_off()
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize="small")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def main(args: argparse.Namespace) -> list[Fit]:
    """Run everything; return truths, data and draws."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    score, test = learn(args)
    fits = restore(score, test, args)
    draw_figure(fits, folder / "restored.png")
    print(f"Figure: {(folder / 'restored.png').resolve()}")
    return fits


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Deblur digits without knowing blur or noise.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train-steps", type=int, default=4000, help="steps of training the score")
    add("--width", type=int, default=128, help="hidden units of the net")
    add("--num-images", type=int, default=6, help="held-out images to restore")
    add("--num-particles", type=int, default=400, help="particles and draws per chain")
    add("--num-chains", type=int, default=2, help="independent replicates")
    add("--levels", type=int, default=100, help="noise levels")
    add("--seed", type=int, default=0, help="seed of everything")
    folder = "examples/output/05_blind_deblurring"
    add("--output", default=folder, help="folder for the figure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
