"""What one accelerator is worth: correctness, training, draws, kernels and a demo.

Five parts, each a few rows that name what was timed. Times are of the wall clock, after
a first run that compiles unless a row says otherwise.

    python -m tests.benchmarks.gpu            # on whatever device JAX finds
    python -m tests.benchmarks.gpu --small    # the same rows in seconds, to try it
"""

import argparse
import contextlib
import io
import runpy
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from numpyro_score import MLP, NPSE, VE, ScoreDistribution, ScoreLangevin, ScoreModel
from tests.benchmarks import training
from tests.benchmarks.transition import targets

KEY = jax.random.key(0)
DEMO = Path(__file__).resolve().parents[2] / "examples" / "01_digits.py"


def seconds(run):
    """Return the wall-clock seconds of a call, and what it returned."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def conjugate(learned):
    """y = 2 under N(x, 1) and x ~ N(0, 1): the posterior is N(1, 1/2)."""
    prior = ScoreModel.from_fn(
        lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=()
    )
    x = numpyro.sample("x", ScoreDistribution(prior) if learned else dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=2.0)


def run_chains(kernel, args, num_chains, num_warmup, num_samples):
    """Return the seconds of both runs and the draws of the second one."""
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )

    def run():
        mcmc.run(KEY, *args)
        return mcmc.get_samples(group_by_chain=True)

    first, _ = seconds(run)
    mcmc.post_warmup_state = mcmc.last_state
    again, draws = seconds(run)
    return first, again, draws


def check_conjugate(sizes):
    """Print mean and variance of the conjugate posterior in single precision."""
    print("\n## Conjugate posterior, float32 (exact: mean 1, variance .5)")
    for learned in (False, True):
        kernel = ScoreLangevin(partial(conjugate, learned))
        _, _, draws = run_chains(kernel, (), sizes.chains[-1], 300, 100)
        x = np.asarray(draws["x"], float)
        error = x.mean(1).std(ddof=1) / len(x) ** 0.5
        prior = "learned" if learned else "ordinary"
        print(f"{prior:10s} mean {x.mean():.4f} +- {error:.4f}, variance {x.var():.4f}")


def compare_kernels(sizes):
    """Print effective draws per second of vectorized chains, beside NUTS."""
    print("\n## Effective draws per second after warm-up (with first run in brackets)")
    print(
        f"{'target':22s}{'chains':>7s}{'ScoreLangevin':>22s}{'NUTS':>22s}{'ratio':>8s}"
    )
    for name, (model, args) in targets().items():
        for chains in sizes.chains:
            cells, rates = [], []
            for kernel in (ScoreLangevin(model), NUTS(model)):
                first, again, draws = run_chains(
                    kernel, args, chains, sizes.warmup, sizes.draws
                )
                leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(draws)]
                ess = min(effective_sample_size(leaf).min() for leaf in leaves)
                r_hat = max(np.max(split_gelman_rubin(leaf)) for leaf in leaves)
                rates.append(ess / again)
                mark = "" if r_hat < 1.05 else "*"
                cells.append(f"{ess / again:.3g}{mark} ({ess / (first + again):.3g})")
            ratio = rates[0] / rates[1]
            print(
                f"{name:22s}{chains:7d}{cells[0]:>22s}{cells[1]:>22s}{ratio:8.2f}",
                flush=True,
            )
    print("* R-hat above 1.05")


def train(sizes):
    """Print training steps per second beside a scan written out."""
    print("\n## Training, beside a hand-written scan")
    flags = [f"--num-steps={sizes.steps}", f"--batch-size={sizes.batch}", "--repeats=3"]
    training.main(training.parse_args(flags))


def gaussian_model():
    x = numpyro.sample("x", dist.Normal(0, 1).expand([5]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1))


def draw_amortized(sizes):
    """Print the seconds of amortized draws, and their largest error."""
    print(f"\n## {sizes.amortized} amortized draws of a Gaussian model in 5 dimensions")
    net = MLP(5, width=64, depth=2, context_size=5)
    npse = NPSE(gaussian_model, "y", net=net)
    fit, posterior = seconds(
        lambda: npse.fit(
            KEY, sizes.simulations, num_steps=sizes.steps, progress_bar=False
        )
    )
    observation = jnp.linspace(-1.0, 1.0, 5)
    sample = partial(posterior.sample, KEY, observation, sizes.amortized)
    first, _ = seconds(sample)
    again, draws = seconds(sample)
    x = np.asarray(draws["x"], float)
    mean, sd = np.asarray(observation) / 1.25, 0.2**0.5
    off = np.abs(x.mean(0) - mean).max() / sd
    print(f"fit {fit:.1f} s, first call {first:.2f} s, second call {again:.3f} s")
    print(f"largest error of a mean {off:.3f} sd, sd ratios {x.std(0) / sd}")


def restore_digits(sizes):
    """Print the table of the demo, with a prior learned from digits."""
    print("\n## Digits restored with a learned prior: examples/01_digits.py")
    demo = runpy.run_path(str(DEMO))
    flags = [*sizes.demo.split(), "--no-progress-bar", "--device"]
    with tempfile.TemporaryDirectory() as folder:
        flags += [jax.default_backend(), "--output", folder]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            demo["main"](demo["parse"](flags))
    table = printed.getvalue().split("Coverage")[1].split("Figures")[0]
    print(f"Coverage{table}".rstrip())


class Sizes:
    """Sizes of all parts."""

    chains, warmup, draws = (4, 256, 4096), 300, 200
    steps, batch = 3000, 1024
    simulations, amortized = 10_000, 10_000
    demo = "--num-digits 2 --num-samples 1000"


class Small(Sizes):
    chains, warmup, draws = (4,), 100, 50
    steps, batch = 20, 32
    simulations, amortized = 200, 100
    demo = (
        "--train-steps 20 --width 8 --level 0.5 --num-warmup 8 --num-samples 10 "
        "--num-chains 2 --num-digits 2"
    )


def main(args):
    """Print all parts."""
    device = jax.devices()[0]
    print(f"device: {device.device_kind} ({device.platform}), JAX {jax.__version__}")
    sizes = Small if args.small else Sizes
    parts = check_conjugate, train, draw_amortized, compare_kernels, restore_digits
    for part in parts:
        took, _ = seconds(lambda part=part: part(sizes))
        print(f"({took:.0f} s)", flush=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a trial in seconds")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
