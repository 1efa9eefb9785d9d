"""NumPyro models with known posteriors, and the exact scores of these."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from numpyro_score import VE, ScoreModel
from numpyro_score.data.standardize import Affine
from numpyro_score.infer import NPSE, AmortizedPosterior

PRIOR_MEAN = np.array([1.0, -2.0])
PRIOR_SD = np.array([1.0, 2.0])
A = np.array([[1.0, 0.0], [0.5, 1.0], [0.0, 1.0]])
NOISE_SD = 0.5


def gaussian_model():
    x = numpyro.sample("x", dist.Normal(PRIOR_MEAN, PRIOR_SD).to_event(1))
    numpyro.sample("y", dist.Normal(A @ x, NOISE_SD).to_event(1))


def gaussian_posterior(ys):
    """Return mean and covariance of x given rows of independent observations."""
    ys = np.atleast_2d(ys)
    precision = np.diag(PRIOR_SD**-2) + len(ys) * A.T @ A / NOISE_SD**2
    covariance = np.linalg.inv(precision)
    pull = PRIOR_MEAN / PRIOR_SD**2 + A.T @ ys.sum(0) / NOISE_SD**2
    return covariance @ pull, covariance


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExactDenoiser:
    """E[x_0 | x_0 + level n, y] of the Gaussian model; without y that of the prior."""

    def __call__(self, x, level, context=None):
        precision, pull = jnp.diag(PRIOR_SD**-2.0), PRIOR_MEAN / PRIOR_SD**2
        if context is not None:
            precision = precision + A.T @ A / NOISE_SD**2
            pull = pull + A.T @ context / NOISE_SD**2
        precision = precision + jnp.eye(2) / level**2
        return jnp.linalg.solve(precision, pull + x / level**2)


def exact_gaussian(sde=VE(0.01, 1000.0)):
    """The amortized posterior of the Gaussian model, without any training error."""
    score = ScoreModel(ExactDenoiser(), Affine.identity((2,)), sde, (2,))
    return AmortizedPosterior(score, NPSE(gaussian_model, "y").simulator())


def two_supports_model():
    """Latents of two supports, one of them in a plate."""
    numpyro.sample("unit", dist.Uniform(-1.0, jnp.array([2.0, 5.0])).to_event(1))
    with numpyro.plate("groups", 2):
        numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("y", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def supports_model():
    """Latents of many supports and shapes, in and out of plates."""
    numpyro.sample("real", dist.Normal(0, 1))
    numpyro.sample("positive", dist.Gamma(2.0, 1.0).expand([2]).to_event(1))
    numpyro.sample("unit", dist.Uniform(-1.0, jnp.array([2.0, 5.0])).to_event(1))
    numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("corr", dist.LKJCholesky(3, 1.0))
    with numpyro.plate("groups", 2):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("ordered", dist.Dirichlet(jnp.ones(2)))
    numpyro.sample("y", dist.Normal(0.0, scale).to_event(1))
