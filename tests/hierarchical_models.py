"""Models with a plate of groups, and the exact scores of one of them."""

from dataclasses import dataclass, field

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

from numpyro_score import VE, ScoreModel
from numpyro_score.data.standardize import Affine
from numpyro_score.infer import NPSE, AmortizedPosterior
from numpyro_score.infer.amortized.hierarchical import (
    HierarchicalPosterior,
    group_sites,
    local_simulator,
    shared_simulator,
)

LOCAL_SD, NOISE_SD = 1.0, 0.7
VARIANCE = LOCAL_SD**2 + NOISE_SD**2  # of y given mu
SDE = VE(0.002, 300.0)


def normal_groups(num_groups=3, y=None):
    """mu ~ N(0, 1), z_j ~ N(mu, LOCAL_SD), y_j ~ N(z_j, NOISE_SD)."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("groups", num_groups):
        z = numpyro.sample("z", dist.Normal(mu, LOCAL_SD))
        numpyro.sample("y", dist.Normal(z, NOISE_SD), obs=y)


def observe(num_groups, mu=1.3):
    noise = np.random.default_rng(num_groups).normal(size=num_groups)
    return mu + np.sqrt(VARIANCE) * noise


def shared_posterior(y):
    """Return mean and sd of mu given all groups."""
    precision = 1 + len(y) / VARIANCE
    return y.sum() / VARIANCE / precision, precision**-0.5


def local_posterior(y):
    """Return means and sd of the z_j given all groups."""
    mean, sd = shared_posterior(y)
    precision = LOCAL_SD**-2 + NOISE_SD**-2
    means = (mean / LOCAL_SD**2 + y / NOISE_SD**2) / precision
    return means, np.sqrt(1 / precision + (sd / LOCAL_SD**2 / precision) ** 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedDenoiser:
    """E[mu | mu + level n, y_j]; given y_j its score has a constant error ``bias``.

    Without y_j that of the prior, or without any if ``forget_prior``.
    """

    bias: float = 0.0
    forget_prior: bool = field(default=False, metadata={"static": True})

    def __call__(self, x, level, context=None):
        if context is None:
            return x if self.forget_prior else x - x / (1 + 1 / level**2)
        known = 1 + 1 / VARIANCE  # D - x, as a rounded precision would shift all draws
        pull = context.reshape(1) / VARIANCE + self.bias - known * x
        return x + pull / (known + 1 / level**2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalDenoiser:
    """E[z_j | z_j + level n, y_j, mu]; the context is y_j and mu."""

    def __call__(self, x, level, context=None):
        y, mu = context
        precision = LOCAL_SD**-2 + NOISE_SD**-2 + 1 / level**2
        pull = mu / LOCAL_SD**2 + y / NOISE_SD**2 + x / level**2
        return pull / precision


def exact_score(denoiser):
    return ScoreModel(denoiser, Affine.identity((1,)), SDE, (1,))


def exact_hierarchy(bias=0.0):
    """The posterior of ``normal_groups`` without training; ``bias`` as of a net."""
    simulator = NPSE(normal_groups, "y", plate="groups").simulator()
    sites = group_sites(simulator)
    shared = AmortizedPosterior(
        exact_score(SharedDenoiser(bias)), shared_simulator(simulator, sites)
    )
    local = AmortizedPosterior(
        exact_score(LocalDenoiser()), local_simulator(simulator, sites)
    )
    return HierarchicalPosterior.of(shared, local, sites.axes)


# Eight schools (Rubin 1981): effects of coaching and their standard errors
EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(num_schools=8, y=None, sigma=None):
    """Non-centered; the standard errors are sites, whose law covers those observed."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfNormal(10.0))
    with numpyro.plate("schools", num_schools):
        sigma = numpyro.sample("sigma", dist.LogNormal(2.5, 0.4), obs=sigma)
        unit = numpyro.sample("unit", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * unit, sigma), obs=y)
