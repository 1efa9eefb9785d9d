# %% [markdown]
# # Two modes, and the share of each
#
# Cells are given mRNA, which they translate into a protein that glows. Both decay, at
# rates that the light alone tells apart only as "the fast one" and "the slow one":
# exchanged, they give the same curve (Leonhardt et al. 2014; Ballnus et al. 2017). So
# the posterior has two modes of equal likelihood, and only the prior knows that mRNA is
# usually the faster. How much it knows is a number: the share of each mode.
#
# Three samplers look for it: NUTS, `AnnealedLangevin` and `ParallelTempering`. The
# model is a plain NumPyro model, nothing in it is learned. The true share comes from a
# fourth, which sees rates in order, where there is one mode.
#
# Run it with `python examples/06_two_modes.py --help` for its settings.

# %%
import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

from numpyro_score import AnnealedLangevin, ParallelTempering
from numpyro_score.kernel import print_tempering_summary

HOURS = np.arange(1.0, 25.0, 0.5)
MRNA = dist.LogNormal(np.log(0.3), 1.0)  # its rate of decay, per hour
PROTEIN = dist.LogNormal(np.log(0.1), 1.0)

# %% [markdown]
# ## Model
#
# With decay rates $\delta$ of mRNA and $\beta$ of the protein the light, a time $\tau$
# after the start, is $k\,(e^{-\beta\tau} - e^{-\delta\tau}) / (\delta - \beta)$. It is
# computed by the slow rate and the difference, which no rate makes overflow.


# %%
def light(start, gain, slow, fast):
    """Return the light at all hours; the order of the rates does not matter."""
    slow, fast = jnp.minimum(slow, fast), jnp.maximum(slow, fast)
    after = jnp.maximum(HOURS - start, 0.0)
    x = jnp.maximum((fast - slow) * after, 1e-4)  # below, float32 sees no difference
    return gain * after * jnp.exp(-slow * after) * -jnp.expm1(-x) / x


def others(rates, seen):
    """Sample what both versions of the model share."""
    start = numpyro.sample("start", dist.HalfNormal(3.0))
    gain = numpyro.sample("gain", dist.LogNormal(2.0, 1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(5.0))
    mean = light(start, gain, *rates)
    numpyro.sample("seen", dist.Normal(mean, noise).to_event(1), obs=seen)


def model(seen=None):
    mrna, protein = numpyro.sample("mrna", MRNA), numpyro.sample("protein", PROTEIN)
    others((protein, mrna), seen)


# %% [markdown]
# ## The true share
#
# Rates in order, slow before fast, have the density of both assignments together. That
# posterior has one mode, so NUTS is right there. At each of its draws the odds of the
# two assignments are a ratio of priors.


# %%
def log_prior(rates):
    """Return the log prior of (slow, fast) as protein and mRNA, and the reverse."""
    slow, fast = rates
    return jnp.stack(
        [
            PROTEIN.log_prob(slow) + MRNA.log_prob(fast),
            PROTEIN.log_prob(fast) + MRNA.log_prob(slow),
        ]
    )


def in_order(seen):
    ordered = dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,))
    rates = numpyro.sample("rates", ordered)
    numpyro.factor("prior", jax.nn.logsumexp(log_prior(rates)))
    others(tuple(rates), seen)


# %% [markdown]
# ## Samplers


# %%
class Result(NamedTuple):
    """Draws of both rates by chain, gradients, seconds, and log evidence with error."""

    mrna: np.ndarray
    protein: np.ndarray
    gradients: float
    seconds: float
    log_evidence: float = np.nan
    error: float = np.nan

    @property
    def faster(self) -> np.ndarray:
        """Whether mRNA is the faster, of every draw of every chain."""
        return self.mrna > self.protein


def run(kernel, seen, args: argparse.Namespace, **options) -> tuple[MCMC, Result]:
    """Run chains; gradients are those of the draws, warm-up comes on top."""
    defaults = {
        "num_warmup": args.num_warmup,
        "num_samples": args.num_samples,
        "num_chains": args.num_chains,
    }
    mcmc = MCMC(
        kernel,
        **(defaults | options),
        chain_method="vectorized",
        progress_bar=False,
    )
    start = time.perf_counter()
    mcmc.run(jax.random.key(args.seed), seen, extra_fields=("num_steps",))
    draws = jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain=True))
    gradients = float(mcmc.get_extra_fields()["num_steps"].sum())
    seconds = time.perf_counter() - start
    return mcmc, Result(draws["mrna"], draws["protein"], gradients, seconds)


def true_share(seen, args: argparse.Namespace) -> float:
    mcmc = MCMC(
        NUTS(in_order),
        num_warmup=1000,
        num_samples=1000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(args.seed), seen)
    log_priors = jax.vmap(log_prior)(mcmc.get_samples()["rates"])
    return float(jax.nn.softmax(log_priors)[:, 0].mean())


def sample_all(seen, args: argparse.Namespace) -> dict[str, Result]:
    """Run the three samplers; print what ParallelTempering knows of itself."""
    results = {"NUTS": run(NUTS(model), seen, args)[1]}

    kernel = AnnealedLangevin(model, levels=40)
    particles = {"num_chains": args.num_particles, "num_samples": 1}
    mcmc, result = run(kernel, seen, args, num_warmup=400, **particles)
    state = mcmc.last_state
    results["AnnealedLangevin"] = result._replace(
        log_evidence=float(state.log_evidence),
        error=float(state.log_evidence_error),
    )

    mcmc, result = run(ParallelTempering(model), seen, args)
    print_tempering_summary(mcmc)
    state = mcmc.last_state
    results["ParallelTempering"] = result._replace(
        log_evidence=float(jnp.mean(state.log_evidence)),
        error=float(jnp.sqrt(jnp.sum(state.log_evidence_error**2)) / args.num_chains),
    )
    return results


# %% [markdown]
# ## Compare


# %%
def print_table(results: dict[str, Result], share: float) -> None:
    print(f"\nShare of draws in which mRNA decays faster; true share {share:.3f}")
    print(
        f"{'':19s}{'share':>7s}  {'by chain':24s}{'R-hat':>7s}{'ESS':>7s}"
        f"{'log evidence':>17s}{'gradients':>11s}{'seconds':>9s}"
    )
    for name, result in results.items():
        faster = result.faster.astype(float)
        chains, r_hat, ess = "", np.nan, np.nan
        if faster.shape[1] > 3:
            chains = " ".join(f"{p:.3f}" for p in faster.mean(1)[:4])
            r_hat = split_gelman_rubin(np.log(result.mrna))
            ess = effective_sample_size(np.log(result.mrna))
        print(
            f"{name:19s}{faster.mean():7.3f}  {chains:24s}{r_hat:7.3f}{ess:7.0f}"
            f"{result.log_evidence:10.2f} +-{result.error:5.2f}"
            f"{result.gradients:11.1e}{result.seconds:9.0f}"
        )


def draw_figure(seen, results: dict[str, Result], share: float, path: Path) -> None:
    """Draw the data, and rates by sampler with one color per chain."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    axes[0].plot(HOURS, seen, "k.")
    axes[0].set(title="light", xlabel="hours")
    for ax, (name, result) in zip(axes[1:], results.items(), strict=True):
        for mrna, protein in zip(result.mrna[:4], result.protein[:4], strict=True):
            if result.mrna.shape[1] > 1:
                ax.loglog(mrna[-500:], protein[-500:], ".", markersize=2)
        if result.mrna.shape[1] == 1:
            ax.loglog(result.mrna, result.protein, "k.", markersize=2)
        ax.axline((0.1, 0.1), (0.2, 0.2), color="0.8", zorder=0)
        found = result.faster.mean()
        ax.set(title=f"{name}: {found:.2f} (true {share:.2f})", xlabel="decay of mRNA")
        ax.set(xlim=(0.01, 1.5), ylim=(0.01, 1.5))
    axes[1].set(ylabel="decay of the protein")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def simulate(seed: int) -> np.ndarray:
    """Return the light of cells whose mRNA decays at .3 and protein at .06 per hour."""
    noise = 1.5 * np.random.default_rng(seed).normal(size=len(HOURS))
    return np.asarray(light(1.8, 12.0, 0.06, 0.3)) + noise


def main(args: argparse.Namespace) -> tuple[dict[str, Result], float]:
    """Run everything; return the results by sampler, and the true share."""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    seen = simulate(args.seed).astype(np.float32)
    share = true_share(seen, args)
    results = sample_all(seen, args)
    print_table(results, share)
    draw_figure(seen, results, share, folder / "two_modes.png")
    print(f"Figure: {(folder / 'two_modes.png').resolve()}")
    return results, share


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Find both modes of a posterior, and the share of each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num-warmup", type=int, default=1000, help="warm-up of each chain")
    add("--num-samples", type=int, default=4000, help="draws of each chain")
    add("--num-chains", type=int, default=4, help="chains of NUTS and tempering")
    add("--num-particles", type=int, default=1000, help="chains that are annealed")
    add("--seed", type=int, default=0, help="seed of the data and of all samplers")
    add(
        "--output", default="examples/output/06_two_modes", help="folder for the figure"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
