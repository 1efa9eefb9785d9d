# %% [markdown]
# # A hierarchical model, amortized and corrected
#
# Eight schools: coaching effects with known standard errors, drawn from a population
# whose mean and sd are not known. NPSE learns the posterior of all ten numbers for
# every data set at once. The model has a likelihood, so
#
# - NUTS checks the draws,
# - importance weights correct them, and Pareto k-hat says how far to trust that,
# - simulation-based calibration checks the posterior for all data sets at once.
#
# Run it with `python examples/04_schools.py --help` for its settings.

# %%
import argparse
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS
from numpyro.infer.reparam import LocScaleReparam

from numpyro_score.infer import NPSE, AmortizedPosterior

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

# %% [markdown]
# ## The model
#
# In its centered form `tau` and `theta` make a funnel, which troubles chains and nets
# alike. NumPyro's own handler writes it non-centered: the latents that are sampled are
# nearly independent of `tau`, and `theta` follows from them.


# %%
def schools(effect=None):
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    tau = numpyro.sample("tau", dist.HalfNormal(10))
    with numpyro.plate("school", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("effect", dist.Normal(theta, ERROR), obs=effect)


noncentered = reparam(schools, config={"theta": LocScaleReparam(0)})


def with_theta(draws: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return draws with the site that the handler has made deterministic."""
    if "theta" in draws:
        return draws
    mu, tau = draws["mu"][:, None], draws["tau"][:, None]
    return {**draws, "theta": mu + tau * draws["theta_decentered"]}


def by_nuts(args: argparse.Namespace) -> dict[str, jax.Array]:
    mcmc = MCMC(
        NUTS(noncentered, target_accept_prob=0.9),
        num_warmup=args.num_draws // 4,
        num_samples=args.num_draws // 4,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(args.seed + 1), EFFECT)
    return mcmc.get_samples()


# %% [markdown]
# ## Train once, draw for any data


# %%
def main(args: argparse.Namespace) -> dict[str, dict]:
    """Run everything; return the draws by method."""
    key_fit, key_draw, key_weigh, key_again, key_check = jax.random.split(
        jax.random.key(args.seed), 5
    )
    model = schools if args.centered else noncentered
    posterior = NPSE(model, "effect").fit(
        key_fit,
        args.num_simulations,
        num_steps=args.train_steps,
        progress_bar=args.progress_bar,
    )
    weighed = posterior.importance(key_weigh, EFFECT, args.num_draws)
    draws = {
        "NUTS": by_nuts(args),
        "NPSE": with_theta(posterior.sample(key_draw, EFFECT, args.num_draws)),
        "NPSE, weighed": with_theta(weighed.resample(key_again)),
    }
    table(draws)
    print(
        f"Pareto k-hat {weighed.khat:.2f}, {weighed.ess:.0f} effective of "
        f"{args.num_draws} draws, log evidence {weighed.log_evidence:.2f} +- "
        f"{weighed.log_evidence_error:.2f}"
    )
    check(posterior, key_check, args)
    return draws


def table(draws: dict[str, dict]) -> None:
    print(f"{'mean (sd)':10s}" + "".join(f"{method:>18s}" for method in draws))
    rows = [("mu", ()), ("tau", ()), *(("theta", (k,)) for k in range(8))]
    for name, index in rows:
        cells = []
        for values in draws.values():
            values = np.asarray(values[name])[(..., *index)]
            cells.append(f"{values.mean():10.2f} ({values.std():5.2f})")
        print(f"{name + ''.join(str(k) for k in index):10s}" + "".join(cells))


# %% [markdown]
# ## For all data sets at once
#
# Effects are simulated from prior draws; the truths must rank evenly among the
# posterior draws, and the regions of TARP must hold as many truths as they say.


# %%
def check(posterior: AmortizedPosterior, key: jax.Array, args) -> None:
    calibration = posterior.calibration(key, args.num_checks)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Calibration: smallest p-value of ranks {calibration.sbc.test.p_value:.3f}")
    calibration.plot()
    plt.gcf().set_layout_engine("constrained")  # room for titles of two lines
    plt.savefig(folder / "calibration.png")
    plt.close("all")
    print(f"Figure: {(folder / 'calibration.png').resolve()}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A hierarchical model, amortized, corrected and checked.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num-simulations", type=int, default=20_000, help="simulations")
    add("--train-steps", type=int, default=None, help="training steps")
    add("--num-draws", type=int, default=4000, help="posterior draws")
    add("--num-checks", type=int, default=500, help="simulations to check with")
    add("--centered", action="store_true", help="learn the centered form")
    add("--progress-bar", action="store_true", help="show progress of the training")
    add("--seed", type=int, default=0, help="seed of everything")
    add("--output", default="examples/output/04_schools", help="folder for the figure")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
