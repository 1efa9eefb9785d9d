# %% [markdown]
# # A net trained elsewhere, as a prior
#
# Most diffusion models were trained by other libraries. Here one is trained as in the
# paper of Ho et al. (2020), in plain JAX and Optax: a table of 1000 betas, integer
# steps, data scaled to [-1, 1], a net that predicts the noise. Nothing of it knows
# numpyro_score. One constructor turns the function into a prior of any NumPyro model.
#
# The data are the 8 x 8 digits that ship with scikit-learn. A camera saw digits at
# a quarter of their resolution, with noise of unknown sd: which digits were they?
#
# Run it with `python examples/10_foreign_score.py --help` for its settings.

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from sklearn.datasets import load_digits

from numpyro_score import ScoreDistribution, ScoreModel
from numpyro_score.data.standardize import Affine
from numpyro_score.infer import ScoreSDE
from numpyro_score.sde import DiscreteVP

SIZE = 64
NUM_STEPS = 1000  # of the table
NOISE = 1.0  # true sd of the camera's noise, in gray values from 0 to 16

# %% [markdown]
# ## Elsewhere: a DDPM in plain JAX

# %%
BETAS = np.linspace(1e-4, 0.02, NUM_STEPS)
ALPHAS_BAR = jnp.asarray(np.cumprod(1 - BETAS), jnp.float32)


def predict_noise(weights, x, step):
    """Return the noise in one image of 64 numbers in [-1, 1] at an integer step."""
    angle = (step + 1) / NUM_STEPS * 2.0 ** jnp.arange(8)
    time = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)])
    hidden = jnp.concatenate([x, time]) @ weights["in"] + weights["bias"]
    for layer in weights["blocks"]:
        hidden = hidden + jax.nn.silu(hidden) @ layer["up"] + time @ layer["time"]
    return jax.nn.silu(hidden) @ weights["out"]


def initial_weights(key, width: int) -> dict:
    keys = iter(jax.random.split(key, 12))

    def normal(rows, columns, gain=1.0):
        draw = jax.random.normal(next(keys), (rows, columns))
        return gain * draw / jnp.sqrt(rows)

    blocks = [{"up": normal(width, width), "time": normal(16, width)} for _ in range(4)]
    return {
        "in": normal(SIZE + 16, width),
        "bias": jnp.zeros(width),
        "blocks": blocks,
        "out": normal(width, SIZE, 0.1),
    }


def train_ddpm(key, images, num_steps: int, width: int) -> dict:
    """Return exponentially averaged weights after algorithm 1 of the paper."""
    key, key_start = jax.random.split(key)
    weights = initial_weights(key_start, width)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

    def loss(weights, key):
        key_row, key_step, key_noise = jax.random.split(key, 3)
        x = images[jax.random.randint(key_row, (256,), 0, len(images))]
        step = jax.random.randint(key_step, (256,), 0, NUM_STEPS)
        noise = jax.random.normal(key_noise, x.shape)
        signal = ALPHAS_BAR[step][:, None]
        noisy = jnp.sqrt(signal) * x + jnp.sqrt(1 - signal) * noise
        predicted = jax.vmap(predict_noise, (None, 0, 0))(weights, noisy, step)
        return jnp.mean(jnp.square(predicted - noise))

    @jax.jit
    def run(weights, keys):
        def body(carry, key):
            weights, average, state = carry
            gradient = jax.grad(loss)(weights, key)
            updates, state = optimizer.update(gradient, state)
            weights = optax.apply_updates(weights, updates)
            average = optax.incremental_update(weights, average, 0.002)
            return (weights, average, state), None

        start = weights, weights, optimizer.init(weights)
        return jax.lax.scan(body, start, keys)[0][1]

    return run(weights, jax.random.split(key, num_steps))


# %% [markdown]
# ## Here: one constructor
#
# It is told what the net predicts (noise), its table of betas, and the scale of its
# data. Shown some images, it checks that the net knows them on that scale: a net that
# is fed another scale than its own is worse than a linear map, and that is an error.


# %%
def as_score(weights, images) -> ScoreModel:
    return ScoreModel.from_noise_prediction(
        jax.tree_util.Partial(predict_noise, weights),
        DiscreteVP.linear(NUM_STEPS),
        (SIZE,),
        standardize=Affine.from_range(0.0, 16.0, (SIZE,)),
        data=images[:500],
    )


def make_model(score: ScoreModel, level: float):
    def model(coarse=None):
        prior = ScoreDistribution(score, t=score.sde.time(level))
        image = numpyro.sample("image", prior)
        noise = numpyro.sample("noise", dist.HalfNormal(2.0))
        blocks = image.reshape(4, 2, 4, 2).mean((1, 3)).reshape(-1)
        numpyro.sample("coarse", dist.Normal(blocks, noise).to_event(1), obs=coarse)

    return model


def main(args: argparse.Namespace) -> list[dict]:
    """Run everything; return the draws of each digit."""
    key_train, key_draw = jax.random.split(jax.random.key(args.seed))
    images = load_digits().data.astype(np.float32)
    labels = load_digits().target
    test = [int(np.flatnonzero(labels[1500:] == k)[0]) + 1500 for k in range(10)]
    test = test[: args.num_digits]
    scaled = jnp.asarray(images[:1500] / 8 - 1)
    weights = train_ddpm(key_train, scaled, args.train_steps, args.width)
    score = as_score(weights, images[:1500])
    print(score)
    inference = ScoreSDE(
        make_model(score, args.level),
        num_samples=args.num_particles,
        num_particles=args.num_particles,
        levels=args.levels,
        progress_bar=False,
    )
    rng, fits = np.random.default_rng(args.seed + 1), []
    for k, truth in enumerate(images[test]):
        coarse = truth.reshape(4, 2, 4, 2).mean((1, 3)).reshape(-1)
        coarse = coarse + NOISE * rng.normal(size=16)
        inference.run(jax.random.fold_in(key_draw, k), coarse.astype(np.float32))
        draws = jax.tree.map(np.asarray, inference.get_samples())
        fits.append({"truth": truth, "coarse": coarse, **draws})
    report(fits, args)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    draw_figure(fits, folder / "foreign_score.png")
    print(f"Figure: {(folder / 'foreign_score.png').resolve()}")
    return fits


# %% [markdown]
# ## How well
#
# The prior is the law of "digit + noise of the level in use", for which intervals are
# judged.


# %%
def report(fits: list[dict], args: argparse.Namespace) -> None:
    rng, rows = np.random.default_rng(args.seed + 2), []
    for fit in fits:
        low, high = np.quantile(fit["image"], [[0.25, 0.05], [0.75, 0.95]], 0)
        truth = fit["truth"] + 8 * args.level * rng.normal(size=SIZE)
        enlarged = np.kron(fit["coarse"].reshape(4, 4), np.ones((2, 2))).reshape(-1)
        rmse = [
            np.sqrt(np.mean((image - fit["truth"]) ** 2))
            for image in (fit["image"].mean(0), enlarged)
        ]
        rows.append([*((low <= truth) & (truth <= high)).mean(1), *rmse])
    mean, error = np.mean(rows, 0), np.std(rows, 0) / np.sqrt(len(rows))
    titles = "50% interval", "90% interval", "RMSE of the mean", "RMSE enlarged"
    for title, m, e in zip(titles, mean, error, strict=True):
        print(f"{title:18s}{m:6.2f} ± {e:.2f}")


def draw_figure(fits: list[dict], path: Path) -> None:
    titles = "seen", "truth", "mean", "draws"
    figure, axes = plt.subplots(
        len(fits), 7, figsize=(7, len(fits)), squeeze=False, layout="constrained"
    )
    for row, fit in zip(axes, fits, strict=True):
        draws = fit["image"]
        pick = np.linspace(0, len(draws) - 1, 4).astype(int)
        shown = [fit["coarse"], fit["truth"], draws.mean(0), *draws[pick]]
        for ax, image in zip(row, shown, strict=True):
            side = int(np.sqrt(image.size))
            ax.imshow(image.reshape(side, side), vmin=0, vmax=16, cmap="gray_r")
            ax.set(xticks=[], yticks=[])
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Use a diffusion model that was trained elsewhere as a prior.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--train-steps", type=int, default=10_000, help="steps of the foreign training")
    add("--width", type=int, default=256, help="hidden units of the foreign net")
    add("--level", type=float, default=0.2, help="noise level of the prior, of [-1, 1]")
    add("--num-digits", type=int, default=10, help="digits to infer")
    add("--num-particles", type=int, default=500, help="particles and draws")
    add("--levels", type=int, default=60, help="noise levels of the sampler")
    add("--seed", type=int, default=0, help="seed of everything")
    add("--output", default="examples/output/10_foreign_score", help="figure's folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
