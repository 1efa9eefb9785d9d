# %% [markdown]
# # Yesterday's posterior is today's prior
#
# How a diabetes patient's disease progresses in a year, from ten measurements: the data
# of Efron et al. (2004) that ship with scikit-learn. The patients come in two batches.
# NUTS analyzes the first. `learn_prior` turns its draws into a prior, and
# `handlers.with_prior` puts that into the same model for the second batch, without the
# rows of the first. The yardstick is NUTS with both batches at once.
#
# Run it with `python examples/09_batches.py --help` for its settings.

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
from numpyro.infer import MCMC, NUTS
from sklearn.datasets import load_diabetes

import numpyro_score
from numpyro_score import ScoreLangevin, handlers

# %% [markdown]
# ## The model
#
# A regression that outliers do not pull. Its latents have several supports: the share
# of explained variance lies in (0, 1), the degrees of freedom are positive, effects are
# any numbers.


# %%
def progression(x, y=None):
    explained = numpyro.sample("explained", dist.Beta(2.0, 2.0))  # share of variance
    tails = numpyro.sample("tails", dist.Gamma(2.0, 0.1))  # degrees of freedom
    with numpyro.plate("measurement", x.shape[1]):
        effect = numpyro.sample("effect", dist.Normal(0.0, 0.3))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 0.5))
    noise = jnp.sqrt(1 - explained)
    law = dist.StudentT(tails, intercept + x @ effect, noise)
    numpyro.sample("y", law.to_event(1), obs=y)


class Batch(NamedTuple):
    """Measurements and progression of some patients, in units of their sd."""

    x: np.ndarray
    y: np.ndarray


def read(seed: int) -> tuple[list[Batch], list[str]]:
    """Return two halves of the patients in random order, and names of columns."""
    data = load_diabetes()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x = (data.data / data.data.std(0)).astype(np.float32)[order]
    y = ((data.target - data.target.mean()) / data.target.std()).astype(np.float32)
    y, half = y[order], len(y) // 2
    return [Batch(x[:half], y[:half]), Batch(x[half:], y[half:])], data.feature_names


# %% [markdown]
# ## First batch, prior, second batch


# %%
def run(kernel, args: argparse.Namespace, seed: int, batch: Batch) -> MCMC:
    mcmc = MCMC(
        kernel,
        num_warmup=args.num_warmup,
        num_samples=args.num_samples,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), batch.x, batch.y)
    return mcmc


def main(args: argparse.Namespace) -> dict[str, dict]:
    """Run everything; return the draws by analysis."""
    (first, second), names = read(args.seed)
    both = Batch(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))
    yesterday = run(NUTS(progression), args, args.seed + 1, first)
    prior = numpyro_score.learn_prior(
        jax.random.key(args.seed + 2),
        yesterday,
        progression,
        *first,
        num_steps=args.train_steps,
        progress_bar=False,
    )
    print(prior.fit)
    today = handlers.with_prior(progression, prior)
    draws = {
        "first batch, NUTS": yesterday.get_samples(),
        "second batch, NUTS": run(
            NUTS(progression), args, args.seed + 3, second
        ).get_samples(),
        "second, learned prior": run(
            ScoreLangevin(today), args, args.seed + 4, second
        ).get_samples(),
        "both batches, NUTS": run(
            NUTS(progression), args, args.seed + 5, both
        ).get_samples(),
    }
    table(draws, names)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    draw_figure(draws, names, folder / "batches.png")
    print(f"Figure: {(folder / 'batches.png').resolve()}")
    return draws


# %% [markdown]
# ## The same as all data at once?


# %%
def numbers(draws: dict, names: list[str]) -> dict[str, np.ndarray]:
    """Return the draws of every number by its name."""
    effects = {f"effect of {k}": draws["effect"][:, j] for j, k in enumerate(names)}
    values = {name: draws[name] for name in ("explained", "tails", "intercept")}
    return {name: np.asarray(value) for name, value in {**values, **effects}.items()}


def table(draws: dict[str, dict], names: list[str]) -> None:
    print(f"{'mean (sd)':15s}" + "".join(f"{title:>24s}" for title in draws))
    columns = {title: numbers(values, names) for title, values in draws.items()}
    for name in next(iter(columns.values())):
        cells = [
            f"{column[name].mean():15.3f} ({column[name].std():6.3f})"
            for column in columns.values()
        ]
        print(f"{name:15s}" + "".join(cells))
    exact, learned = columns["both batches, NUTS"], columns["second, learned prior"]
    offset = [abs(learned[k].mean() - exact[k].mean()) / exact[k].std() for k in exact]
    ratio = [learned[k].std() / exact[k].std() for k in exact]
    print(
        f"Learned prior against both batches: means within {max(offset):.2f} sd, sds "
        f"{min(ratio):.2f} to {max(ratio):.2f} times as large"
    )


def draw_figure(draws: dict[str, dict], names: list[str], path: Path) -> None:
    shown = "explained", "tails", "effect of bmi", "effect of s1"
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
    styles = dict(zip(draws, ("C7", "C0", "C3", "k"), strict=True))
    for ax, name in zip(axes, shown, strict=True):
        for title, values in draws.items():
            if title == "second batch, NUTS":
                continue
            values = numbers(values, names)[name]
            grid = np.linspace(*np.quantile(values, [0.001, 0.995]), 40)
            ax.hist(
                values, grid, histtype="step", density=True, label=title,
                color=styles[title], linewidth=1.5,
            )  # fmt: skip
        ax.set(title=name, yticks=[])
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Learn a prior from one batch, and use it for the next.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num-warmup", type=int, default=1000, help="transitions of warm-up")
    add("--num-samples", type=int, default=2000, help="draws of each of four chains")
    add("--train-steps", type=int, default=2000, help="steps of training the prior")
    add("--seed", type=int, default=0, help="seed of everything")
    add("--output", default="examples/output/09_batches", help="folder for the figure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
