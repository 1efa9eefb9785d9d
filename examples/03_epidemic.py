# %% [markdown]
# # An epidemic without a likelihood
#
# In 1978 influenza went through a boarding school of 763 boys. For 14 days the number
# of boys in bed was counted (British Medical Journal, 4 March 1978). Two models of it:
#
# - the **differential equations** of susceptible, infected and recovered boys, with a
#   negative-binomial count every day. It has a likelihood, so NUTS can check NPSE;
# - a **stochastic** epidemic, in which every boy is infected or recovers by chance. Its
#   likelihood is a sum over all histories, which nobody computes. NPSE needs none.
#
# Run it with `python examples/03_epidemic.py --help` for its settings.

# %%
import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

from numpyro_score.infer import NPSE, AmortizedPosterior

NUM_BOYS = 763
IN_BED = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4])
NUM_DAYS = len(IN_BED)
STEPS_PER_DAY = 10

# %% [markdown]
# ## What both models share
#
# The priors: `beta` is how many boys an infected boy infects in a day at the start,
# `gamma` the rate at which he recovers. The school starts with one infected boy. Counts
# are seen by NPSE through a square root, which gives them about equal noise.


# %%
def rates():
    beta = numpyro.sample("beta", dist.LogNormal(0.5, 0.5))
    gamma = numpyro.sample("gamma", dist.LogNormal(-0.7, 0.5))
    numpyro.deterministic("R0", beta / gamma)
    return beta, gamma


def days(step, start, inputs=None):
    """Return the infected boys at the end of every day."""
    infected = jax.lax.scan(step, start, inputs, NUM_DAYS * STEPS_PER_DAY)[1]
    return infected[STEPS_PER_DAY - 1 :: STEPS_PER_DAY]


# %% [markdown]
# ## Differential equations: NPSE against NUTS


# %%
def differential(in_bed=None):
    beta, gamma = rates()
    spread = numpyro.sample("spread", dist.Exponential(5.0))

    def step(state, _):
        susceptible, infected = state
        new = beta * susceptible * infected / NUM_BOYS / STEPS_PER_DAY
        recovered = gamma * infected / STEPS_PER_DAY
        state = susceptible - new, infected + new - recovered
        return state, state[1]

    mean = jnp.maximum(days(step, (NUM_BOYS - 1.0, 1.0)), 1e-3)
    counts = dist.NegativeBinomial2(mean, 1 / spread)
    counts = numpyro.sample("in_bed", counts.to_event(1), obs=in_bed)
    numpyro.deterministic("seen", jnp.sqrt(counts.astype(float)))


# %% [markdown]
# ## Chance: every boy for himself
#
# In a tenth of a day a susceptible boy is infected with probability
# $1 - e^{-\beta I / 7630}$ and an infected one recovers with probability
# $1 - e^{-\gamma / 10}$. Not all infected boys were in bed: `share` were.


# %%
def stochastic():
    beta, gamma = rates()
    share = numpyro.sample("share", dist.Beta(20.0, 2.0))
    key_epidemic, key_bed = jax.random.split(numpyro.prng_key())

    def step(state, key):
        susceptible, infected = state
        key_new, key_recovered = jax.random.split(key)
        risk = -jnp.expm1(-beta * infected / NUM_BOYS / STEPS_PER_DAY)
        new = jax.random.binomial(key_new, susceptible, risk)
        chance = -jnp.expm1(-gamma / STEPS_PER_DAY)
        recovered = jax.random.binomial(key_recovered, infected, chance)
        state = susceptible - new, infected + new - recovered
        return state, state[1]

    keys = jax.random.split(key_epidemic, NUM_DAYS * STEPS_PER_DAY)
    infected = days(step, (NUM_BOYS - 1.0, 1.0), keys)
    in_bed = jax.random.binomial(key_bed, infected, share)
    numpyro.deterministic("seen", jnp.sqrt(in_bed))


# %% [markdown]
# ## Fit, check and look
#
# NUTS can check one of the two posteriors, for one data set. Calibration checks both,
# for all data sets: parameters of new simulations must rank evenly among the draws.


# %%
def amortize(model, args: argparse.Namespace) -> AmortizedPosterior:
    key = jax.random.key(args.seed)
    return NPSE(model, "seen", ("beta", "gamma", *extra(model))).fit(
        key, args.num_simulations, num_steps=args.train_steps, progress_bar=False
    )


def extra(model) -> tuple[str]:
    return ("spread",) if model is differential else ("share",)


def by_nuts(args: argparse.Namespace) -> dict[str, jax.Array]:
    kernel = NUTS(differential, init_strategy=numpyro.infer.init_to_median())
    mcmc = MCMC(
        kernel,
        num_warmup=args.num_draws // 4,
        num_samples=args.num_draws // 4,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(args.seed + 1), IN_BED)
    return mcmc.get_samples()


def table(posteriors: dict[str, dict]) -> None:
    print(f"{'':38s}{'mean':>8s}{'sd':>8s}{'5 %':>8s}{'95 %':>8s}")
    for title, draws in posteriors.items():
        draws = {**draws, "R0": draws["beta"] / draws["gamma"]}
        for name in sorted(draws.keys() - {"seen"}):
            values = np.asarray(draws[name])
            row = values.mean(), values.std(), *np.quantile(values, [0.05, 0.95])
            print(f"{title:30s}{name:8s}" + "".join(f"{v:8.3f}" for v in row))


def check(title: str, posterior: AmortizedPosterior, args: argparse.Namespace) -> None:
    """Print how true parameters of new simulations rank among posterior draws."""
    key = jax.random.key(args.seed + 4)
    calibration = posterior.calibration(key, args.num_checks)
    print(f"{title}, {args.num_checks} simulations that were not trained on:")
    print(calibration)


def predicted(draws: dict[str, jax.Array], seed: int) -> np.ndarray:
    """Return epidemics that the stochastic model predicts at the draws."""
    predictive = numpyro.infer.Predictive(stochastic, draws)
    return np.square(predictive(jax.random.key(seed))["seen"])


def draw_figure(posteriors: dict[str, dict], epidemics: np.ndarray, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for ax, name in zip(axes, ("beta", "gamma"), strict=False):
        for title, draws in posteriors.items():
            ax.hist(draws[name], 60, histtype="step", density=True, label=title)
        ax.set(title=f"{name}, per day", yticks=[])
    axes[0].legend(fontsize="x-small")
    low, middle, high = np.quantile(epidemics, [0.05, 0.5, 0.95], axis=0)
    day = np.arange(1, NUM_DAYS + 1)
    axes[2].fill_between(day, low, high, alpha=0.3, label="90 % of epidemics")
    axes[2].plot(day, middle, label="median")
    axes[2].plot(day, IN_BED, "k.", label="counted")
    axes[2].set(title="boys in bed, stochastic model", xlabel="day")
    axes[2].legend(fontsize="x-small")
    figure.savefig(path)
    plt.close(figure)


def main(args: argparse.Namespace) -> dict[str, dict]:
    """Run everything; return the draws by posterior."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    seen, key = np.sqrt(IN_BED), jax.random.key(args.seed + 2)
    posteriors = {"equations, NUTS": by_nuts(args)}
    for title, model in (("equations", differential), ("chance", stochastic)):
        posterior = amortize(model, args)
        posteriors[f"{title}, NPSE"] = posterior.sample(key, seen, args.num_draws)
        check(title, posterior, args)
    table(posteriors)
    epidemics = predicted(posteriors["chance, NPSE"], args.seed + 3)
    inside = np.mean(
        (np.quantile(epidemics, 0.05, axis=0) <= IN_BED)
        & (np.quantile(epidemics, 0.95, axis=0) >= IN_BED)
    )
    print(f"Days on which 90 % of the predicted epidemics hold the count: {inside:.0%}")
    draw_figure(posteriors, epidemics, folder / "epidemic.png")
    print(f"Figure: {(folder / 'epidemic.png').resolve()}")
    return posteriors


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Infer the rates of an epidemic without a likelihood.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num-simulations", type=int, default=20_000, help="simulations per model")
    add("--train-steps", type=int, default=None, help="training steps per model")
    add("--num-draws", type=int, default=4000, help="posterior draws")
    add("--num-checks", type=int, default=300, help="simulations to check with")
    add("--seed", type=int, default=0, help="seed of everything")
    add("--output", default="examples/output/03_epidemic", help="folder for the figure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
