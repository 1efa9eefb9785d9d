"""ParallelTempering on densities whose evidence and shares of modes are known.

Run ``python -m tests.benchmarks.tempering`` for a table, ``--only NAME`` for a row.
Every density is the likelihood of a wide normal prior, divided by that prior, so that
the posterior is the density itself and the evidence is its integral.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.diagnostics import split_gelman_rubin
from numpyro.infer import MCMC, NUTS

from numpyro_score import ParallelTempering, ScoreLangevin
from numpyro_score.kernel import replica_exchange
from numpyro_score.kernel.stepping_stone import average_log_evidence

WELL_STEPS = 20_001  # of the quadrature of one well, from -4 to 4


class Target(NamedTuple):
    """A density in d dimensions.

    - **log_density**: of a point; its integral is ``exp(log_evidence)``.
    - **size**: d.
    - **prior_sd**: sd of the normal prior that chains start from.
    - **log_evidence**: exact, in nats.
    - **shares**: exact shares of the modes.
    - **mode**: the mode of each draw, by number.
    """

    log_density: Callable
    size: int
    prior_sd: float
    log_evidence: float
    shares: np.ndarray
    mode: Callable


def mixture(centers: np.ndarray, weights: np.ndarray, prior_sd: float) -> Target:
    """Return a mixture of Gaussians of sd 1."""
    size = centers.shape[1]

    def log_density(x):
        square = jnp.square(x - centers).sum(-1)
        norm = 0.5 * size * np.log(2 * np.pi)
        return logsumexp(jnp.log(weights) - 0.5 * square) - norm

    def mode(x):
        return np.argmin([np.square(x - c).sum(-1) for c in centers], 0)

    return Target(log_density, size, prior_sd, 0.0, weights, mode)


def two_gaussians(size: int = 10) -> Target:
    """Return two Gaussians whose means are 6.3 sd apart, with shares .3 and .7."""
    step = 6.3 / size**0.5 / 2
    centers = np.stack([np.full(size, -step), np.full(size, step)])
    return mixture(centers, np.array([0.3, 0.7]), 3.0)


def forty_gaussians(size: int) -> Target:
    """Return 40 Gaussians with centers uniform in a box of side 20."""
    centers = np.random.default_rng(0).uniform(-10, 10, (40, size))
    return mixture(centers, np.full(40, 1 / 40), 8.0)


def mirrored(size: int = 4) -> Target:
    """Return two Gaussians of shares .9 and .1, each narrow where the other is wide."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))[0]
    scales = np.geomspace(1, 1e-2, size)
    whiten = jnp.array([basis / scales, basis / scales[::-1]])
    centers = np.stack([np.full(size, -2.0), np.full(size, 2.0)])
    weights = np.array([0.9, 0.1])

    def log_densities(x):
        white = jnp.einsum("...mi,mij->...mj", x[..., None, :] - centers, whiten)
        norm = 0.5 * size * np.log(2 * np.pi) + np.log(scales).sum()
        return jnp.log(weights) - 0.5 * jnp.square(white).sum(-1) - norm

    return Target(
        lambda x: logsumexp(log_densities(x)),
        size,
        4.0,
        0.0,
        weights,
        lambda x: np.argmax(log_densities(jnp.asarray(x)), -1),
    )


def many_well(size: int = 32) -> Target:
    """Return the many-well density (Noe et al. 2019): log p = -x^4 + 6 x^2 + x / 2.

    Every second coordinate has this law, the others are standard normal. Modes are
    counted in the first well.
    """

    def log_density(x):
        well, normal = x[::2], x[1::2]
        log_well = -(well**4) + 6 * well**2 + well / 2
        return log_well.sum() - 0.5 * jnp.square(normal).sum()

    grid = np.linspace(-4, 4, WELL_STEPS)
    values = np.exp(-(grid**4) + 6 * grid**2 + grid / 2)
    total, left = np.trapezoid(values, grid), grid < 0
    share = np.trapezoid(values[left], grid[left]) / total
    log_evidence = size / 2 * (np.log(total) + 0.5 * np.log(2 * np.pi))
    shares = np.array([share, 1 - share])
    return Target(
        log_density,
        size,
        2.0,
        log_evidence,
        shares,
        lambda x: (x[:, 0] > 0).astype(int),
    )


TARGETS = {
    "two Gaussians, 10-d": two_gaussians,
    "mirrored, 4-d": mirrored,
    "many well, 32-d": many_well,
    "40 Gaussians, 2-d": lambda: forty_gaussians(2),
    "40 Gaussians, 50-d": lambda: forty_gaussians(50),
}


def make_model(target: Target) -> Callable:
    """Return a model whose posterior is the density."""
    prior = dist.Normal(0, target.prior_sd).expand([target.size]).to_event(1)

    def model():
        x = numpyro.sample("x", prior)
        numpyro.factor("density", target.log_density(x) - prior.log_prob(x))

    return model


class Row(NamedTuple):
    """What is printed of a run."""

    log_evidence_error: float
    log_evidence_sd: float
    variation: float
    r_hat: float
    stays: float
    gradients: float
    seconds: float


def run(target: Target, kernel: str, args: argparse.Namespace) -> Row:
    """Return the errors of one run of a kernel."""
    model = make_model(target)
    local = partial(ScoreLangevin, num_steps=args.num_steps)
    tempering = ParallelTempering(model, local=local)
    start = time.perf_counter()
    mcmc = MCMC(
        tempering if kernel == "tempering" else NUTS(model),
        num_warmup=args.num_warmup,
        num_samples=args.num_samples,
        num_chains=args.num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(args.seed), extra_fields=("num_steps",))
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    found = np.bincount(
        target.mode(x.reshape(-1, target.size)), minlength=len(target.shares)
    )
    error, sd = np.nan, np.nan
    if kernel == "tempering":
        evidence = average_log_evidence(mcmc.last_state.evidence)
        error = abs(float(evidence.log_evidence) - target.log_evidence)
        sd = float(evidence.error)
    return Row(
        error,
        sd,
        float(np.abs(found / found.sum() - target.shares).sum() / 2),
        float(np.max(split_gelman_rubin(x))),
        share_that_stays(target, x),
        float(mcmc.get_extra_fields()["num_steps"].sum()),
        time.perf_counter() - start,
    )


def share_that_stays(target: Target, x: np.ndarray) -> float:
    """Return how often a draw of the smallest mode is the same as the one before."""
    mode = target.mode(x.reshape(-1, target.size)).reshape(x.shape[:2])
    small = mode == target.shares.argmin()
    pairs = small[:, 1:] & small[:, :-1]
    return (
        float((x[:, 1:] == x[:, :-1]).all(-1)[pairs].mean()) if pairs.any() else np.nan
    )


def print_table(args: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Run all targets that were asked for; print and return the rows."""
    rows = {}
    replica_exchange.SHORT_SHARE = args.short_share
    print(
        f"{'target':21s}{'kernel':11s}{'log Z error':>12s}{'its sd':>8s}"
        f"{'variation':>11s}{'R-hat':>8s}{'stays':>7s}{'gradients':>11s}{'seconds':>9s}"
    )
    for name, make in TARGETS.items():
        if args.only and args.only not in name:
            continue
        for kernel in ("NUTS", "tempering"):
            row = rows[name, kernel] = run(make(), kernel, args)
            print(
                f"{name:21s}{kernel:11s}{row.log_evidence_error:12.3f}"
                f"{row.log_evidence_sd:8.3f}{row.variation:11.3f}{row.r_hat:8.3f}"
                f"{row.stays:7.2f}{row.gradients:11.1e}{row.seconds:9.0f}",
                flush=True,
            )
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the settings."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--only", help="run targets whose name holds this")
    add("--num-warmup", type=int, default=1000, help="warm-up of each chain")
    add("--num-samples", type=int, default=2000, help="draws of each chain")
    add("--num-chains", type=int, default=4, help="vectorized chains")
    add(
        "--short-share",
        type=float,
        default=replica_exchange.SHORT_SHARE,
        help="share of the local transitions that take a short step",
    )
    add("--num-steps", type=int, help="of a local transition; the default of tempering")
    add("--seed", type=int, default=0, help="seed of the chains")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print_table(parse())
