r"""Tasks of sbibm (Lueckmann et al. 2021) as NumPyro models, and its reference files.

Every model has one latent site "theta" and one observed site "x". Observations and
reference draws are read from sbibm's own files (MIT license): the argument ``files`` is
the wheel that ``pip download --no-deps sbibm`` leaves, or a folder it was unpacked to.
"""

import bz2
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints


class Task(NamedTuple):
    """A model of "theta" and "x", and the size of both."""

    model: Callable
    size: int
    data_size: int


def _uniform(bound, size):
    return dist.Uniform(-bound, bound).expand([size]).to_event(1)


class Crescent(dist.Distribution):
    """center + r (cos a, sin a), a uniform in (-pi/2, pi/2), r ~ Normal(0.1, 0.01)."""

    arg_constraints = {"center": constraints.real_vector}
    support = constraints.real_vector
    reparametrized_params = ["center"]

    def __init__(self, center, *, validate_args=None):
        self.center = center
        shape = jnp.shape(center)
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        key_angle, key_radius = jax.random.split(key)
        shape = sample_shape + self.batch_shape
        angle = jax.random.uniform(key_angle, shape, minval=-0.5, maxval=0.5) * jnp.pi
        radius = 0.1 + 0.01 * jax.random.normal(key_radius, shape)
        arc = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], -1)
        return self.center + arc

    def log_prob(self, value):
        """Return the density of the right half; r < 0 (ten sd away) is left out."""
        u, v = jnp.moveaxis(value - self.center, -1, 0)
        square = u**2 + v**2
        radius = jnp.sqrt(jnp.maximum(square, 1e-12))
        log_density = dist.Normal(0.1, 0.01).log_prob(radius)
        log_density = log_density - jnp.log(jnp.pi * radius)
        return jnp.where(u > 0, log_density, -jnp.inf)


def two_moons():
    theta = numpyro.sample("theta", _uniform(1.0, 2))
    z = jnp.array([-jnp.abs(theta[0] + theta[1]), theta[1] - theta[0]]) / jnp.sqrt(2.0)
    numpyro.sample("x", Crescent(z + jnp.array([0.25, 0.0])))


def gaussian_linear():
    """Variances .1 (not scales), as in sbibm."""
    theta = numpyro.sample("theta", dist.Normal(0, jnp.full(10, 0.1**0.5)).to_event(1))
    numpyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))


def gaussian_linear_uniform():
    theta = numpyro.sample("theta", _uniform(1.0, 10))
    numpyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))


def gaussian_mixture():
    theta = numpyro.sample("theta", _uniform(10.0, 2))
    scale = jnp.array([1.0, 0.1])[:, None]
    parts = dist.Normal(theta, scale * jnp.ones((2, 2))).to_event(1)
    numpyro.sample(
        "x", dist.MixtureSameFamily(dist.Categorical(jnp.ones(2) / 2), parts)
    )


def slcp():
    """Four draws of a two-dimensional Gaussian; the posterior has four modes."""
    theta = numpyro.sample("theta", _uniform(3.0, 5))
    s1, s2, rho = theta[2] ** 2, theta[3] ** 2, jnp.tanh(theta[4])
    cross = rho * s1 * s2
    covariance = jnp.array([[s1**2 + 1e-6, cross], [cross, s2**2 + 1e-6]])
    law = dist.MultivariateNormal(theta[:2], covariance).expand([4]).to_event(1)
    shape = dist.transforms.ReshapeTransform((8,), (4, 2))
    numpyro.sample("x", dist.TransformedDistribution(law, shape))


def _stimulus():
    """sbibm's frozen input current and the design matrix of its last nine values."""
    current = np.random.RandomState(42).randn(100).astype(np.float32)
    lags = [np.concatenate([np.zeros(k), current[: 100 - k]]) for k in range(9)]
    return jnp.asarray(np.stack([np.ones(100), *lags], 1), jnp.float32)


class SufficientSpikes(dist.Distribution):
    """X'y of spikes y ~ Bernoulli(logits X theta); density up to counting measure."""

    arg_constraints = {"theta": constraints.real_vector}
    support = constraints.real_vector
    reparametrized_params = []

    def __init__(self, theta, *, validate_args=None):
        self.theta, self.design = theta, _stimulus()
        shape = jnp.shape(theta)
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        logits = self.theta @ self.design.T
        spikes = dist.Bernoulli(logits=logits).sample(key, sample_shape)
        return spikes.astype(logits.dtype) @ self.design

    def log_prob(self, value):
        normalizer = jax.nn.softplus(self.theta @ self.design.T).sum(-1)
        return (value * self.theta).sum(-1) - normalizer


def _filter_precision():
    """Precision of the offset and of a filter whose second differences are small."""
    size = 9
    d = np.eye(size) - np.eye(size, k=-1)
    f = d @ d + np.diag(np.sqrt(np.arange(size) / size))
    precision = np.zeros((size + 1, size + 1))
    precision[0, 0], precision[1:, 1:] = 0.5, f.T @ f
    return jnp.asarray(precision, jnp.float32)


def bernoulli_glm():
    law = dist.MultivariateNormal(jnp.zeros(10), precision_matrix=_filter_precision())
    numpyro.sample("x", SufficientSpikes(numpyro.sample("theta", law)))


def bernoulli_glm_raw():
    """The same posterior from the spikes themselves."""
    law = dist.MultivariateNormal(jnp.zeros(10), precision_matrix=_filter_precision())
    logits = _stimulus() @ numpyro.sample("theta", law)
    numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1))


def _runge_kutta(rate, y, step, num_steps, num_saved):
    """Return y at times 0, num_steps step, 2 num_steps step, ... (classical RK4)."""

    def one(_, y):
        k1 = rate(y)
        k2 = rate(y + step / 2 * k1)
        k3 = rate(y + step / 2 * k2)
        k4 = rate(y + step * k3)
        return y + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    def body(y, _):
        return jax.lax.fori_loop(0, num_steps, one, y), y

    return jax.lax.scan(body, y, None, num_saved)[1]


def sir():
    """Infected of a million every 17 days, as 1000 people are tested."""
    loc, scale = jnp.log(jnp.array([0.4, 0.125])), jnp.array([0.5, 0.2])
    theta = numpyro.sample("theta", dist.LogNormal(loc, scale).to_event(1))

    def rate(y):
        susceptible, infected = y
        new = theta[0] * susceptible * infected / 1e6
        return jnp.stack([-new, new - theta[1] * infected])

    start = jnp.array([1e6 - 1, 1.0])
    infected = _runge_kutta(rate, start, 0.5, 34, 10)[:, 1]
    probs = jnp.clip(infected / 1e6, 0.0, 1.0)
    numpyro.sample("x", dist.Binomial(1000, probs).to_event(1))


def lotka_volterra():
    """Prey, then predators, every 2.1 time units; integrated in logarithms."""
    loc = jnp.array([-0.125, -3.0, -0.125, -3.0])
    theta = numpyro.sample("theta", dist.LogNormal(loc, 0.5).to_event(1))

    def rate(y):
        prey, predators = jnp.exp(y)
        grow = theta[0] - theta[1] * predators
        return jnp.stack([grow, -theta[2] + theta[3] * prey])

    start = jnp.log(jnp.array([30.0, 1.0]))
    log_count = _runge_kutta(rate, start, 0.02, 105, 10).T.ravel()
    log_count = jnp.clip(log_count, jnp.log(1e-10), jnp.log(1e4))
    numpyro.sample("x", dist.LogNormal(log_count, 0.1).to_event(1))


TASKS = {
    "two_moons": Task(two_moons, 2, 2),
    "gaussian_linear": Task(gaussian_linear, 10, 10),
    "gaussian_mixture": Task(gaussian_mixture, 2, 2),
    "gaussian_linear_uniform": Task(gaussian_linear_uniform, 10, 10),
    "slcp": Task(slcp, 5, 8),
    "bernoulli_glm": Task(bernoulli_glm, 10, 10),
    "bernoulli_glm_raw": Task(bernoulli_glm_raw, 10, 100),
    "sir": Task(sir, 2, 10),
    "lotka_volterra": Task(lotka_volterra, 4, 20),
}


class Reference(NamedTuple):
    """One observation, and draws of its posterior."""

    observation: np.ndarray
    draws: np.ndarray


def read_reference(files, task, number):
    """Return observation ``number`` (1 to 10) of a task with its reference draws."""
    name = f"{_folder(task, number)}/reference_posterior_samples.csv.bz2"
    draws = _csv(bz2.decompress(_read(files, name)))
    return Reference(read_observation(files, task, number), draws)


def read_observation(files, task, number):
    """Return observation ``number`` of a task."""
    raw = "_raw" if task.endswith("_raw") else ""
    return _csv(_read(files, f"{_folder(task, number)}/observation{raw}.csv"))[0]


def _folder(task, number):
    return f"sbibm/tasks/{task.removesuffix('_raw')}/files/num_observation_{number}"


def _read(files, name):
    """Return the bytes of a file of the wheel, or of the folder it was unpacked to."""
    files = Path(files)
    if files.is_dir():
        wheels = sorted(files.glob("sbibm-*.whl"))
        if not wheels:
            return (files / name).read_bytes()
        files = wheels[-1]
    with zipfile.ZipFile(files) as wheel:
        return wheel.read(name)


def _csv(content):
    table = np.loadtxt(io.BytesIO(content), delimiter=",", skiprows=1, ndmin=2)
    return table.astype(np.float32)
