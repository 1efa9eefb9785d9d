"""Posteriors on which kernels are judged, with data that are drawn here.

Each is of a kind that appears in practice and goes wrong in its own way: correlations
near one, scales of many sizes, curvature, tails, an ODE that fails far out, modes. The
seven of posteriordb, with reference draws, are in ``tests/kernel/test_posteriordb.py``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from tests.kernel.test_posteriordb import POSTERIORS, load


class Posterior(NamedTuple):
    """A model with its data; ``reference`` holds draws, chains by draws, or is None."""

    model: Callable
    data: dict[str, Any]
    reference: dict[str, np.ndarray] | None = None


# regressions


def trend(year: Any, y: Any) -> None:
    """A straight line over years that are not centred: correlation -.99996."""
    intercept = numpyro.sample("intercept", dist.Normal(0, 1000))
    slope = numpyro.sample("slope", dist.Normal(0, 10))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    numpyro.sample("y", dist.Normal(intercept + slope * year, sigma), obs=y)


def trend_data() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    year = np.arange(1952.0, 2014.0)
    y = 9.0 + 0.03 * (year - 1982) + 1.1 * rng.normal(size=62)
    return {"year": jnp.asarray(year), "y": jnp.asarray(y)}


def logistic(x: Any, y: Any) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[-1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def logistic_data(rows: int, columns: int) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    scales = np.geomspace(0.3, 3.0, columns)
    common = rng.normal(size=(rows, 1))
    x = (rng.normal(size=(rows, columns)) + 0.7 * common) * scales
    beta = rng.normal(size=columns) / np.sqrt(columns)
    y = rng.uniform(size=rows) < 1 / (1 + np.exp(-x @ beta))
    return {"x": jnp.asarray(x), "y": jnp.asarray(y, int)}


# Gaussian process


def poisson_gp(x: Any, counts: Any) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25, 4))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2))
    standard = numpyro.sample("standard", dist.Normal(0, 1).expand([len(x)]))
    square = jnp.square(x[:, None] - x[None, :])
    covariance = alpha**2 * jnp.exp(-0.5 * square / rho**2)
    factor = jnp.linalg.cholesky(covariance + 1e-5 * jnp.eye(len(x)))
    numpyro.sample("counts", dist.Poisson(jnp.exp(factor @ standard)), obs=counts)


def poisson_gp_data() -> dict[str, Any]:
    x = np.linspace(-10.0, 10.0, 11)
    rate = np.exp(3.0 + 1.2 * np.sin(x / 3) - 0.1 * x)
    counts = np.random.default_rng(3).poisson(rate)
    return {"x": jnp.asarray(x), "counts": jnp.asarray(counts)}


# a differential equation


def rk4(field: Callable, start: Any, times: Any, substeps: int = 40) -> Any:
    """Return the solution at times, by fixed steps."""

    def interval(state: Any, span: Any) -> tuple[Any, Any]:
        h = (span[1] - span[0]) / substeps

        def step(state: Any, _: Any) -> tuple[Any, None]:
            k1 = field(state)
            k2 = field(state + 0.5 * h * k1)
            k3 = field(state + 0.5 * h * k2)
            k4 = field(state + h * k3)
            return state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        state = jax.lax.scan(step, state, None, length=substeps)[0]
        return state, state

    return jax.lax.scan(interval, start, jnp.stack([times[:-1], times[1:]], 1))[1]


def predator_prey(times: Any, y: Any) -> None:
    """Lotka and Volterra, log-normal errors; far out the solver overflows."""
    theta = numpyro.sample(
        "theta",
        dist.TruncatedNormal(
            jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]), low=0
        ),
    )
    start = numpyro.sample("start", dist.LogNormal(jnp.log(10.0), 1).expand([2]))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1, 1).expand([2]))

    def field(state: Any) -> Any:
        prey, predators = state
        return jnp.stack(
            [
                (theta[0] - theta[1] * predators) * prey,
                (-theta[2] + theta[3] * prey) * predators,
            ]
        )

    path = jnp.concatenate([start[None], rk4(field, start, times)])
    numpyro.sample("y", dist.LogNormal(jnp.log(path), sigma), obs=y)


def predator_prey_data() -> dict[str, Any]:
    times = jnp.arange(20.0)
    theta, start = np.array([0.55, 0.028, 0.8, 0.024]), jnp.array([33.0, 6.0])

    def field(state: Any) -> Any:
        prey, predators = state
        return jnp.stack(
            [
                (theta[0] - theta[1] * predators) * prey,
                (-theta[2] + theta[3] * prey) * predators,
            ]
        )

    path = np.concatenate([start[None], rk4(field, start, times)])
    noise = np.random.default_rng(4).normal(size=path.shape)
    return {"times": times, "y": jnp.asarray(path * np.exp(0.25 * noise))}


# time series


def hidden_markov(y: Any) -> None:
    """Two states with ordered means, the states summed out."""
    rows = numpyro.sample("rows", dist.Dirichlet(jnp.ones(2)).expand([2]).to_event(1))
    low = numpyro.sample("low", dist.Normal(3, 1))
    gap = numpyro.sample("gap", dist.HalfNormal(5))
    means = jnp.stack([low, low + gap])

    def step(log_alpha: Any, value: Any) -> tuple[Any, None]:
        prior = jax.nn.logsumexp(log_alpha[:, None] + jnp.log(rows), axis=0)
        return prior + dist.Normal(means, 1).log_prob(value), None

    first = -jnp.log(2.0) + dist.Normal(means, 1).log_prob(y[0])
    last, _ = jax.lax.scan(step, first, y[1:])
    numpyro.factor("y", jax.nn.logsumexp(last))


def hidden_markov_data() -> dict[str, Any]:
    rng = np.random.default_rng(5)
    state, states = 0, []
    for _ in range(100):
        state = int(rng.uniform() < (0.3, 0.9)[state])
        states.append(state)
    means = np.array([3.0, 9.0])
    return {"y": jnp.asarray(means[states] + rng.normal(size=100))}


def arma(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    phi = numpyro.sample("phi", dist.Normal(0, 2))
    theta = numpyro.sample("theta", dist.Normal(0, 2))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))

    def step(carry: Any, value: Any) -> tuple[Any, Any]:
        previous, error = carry
        error = value - (mu + phi * previous + theta * error)
        return (value, error), error

    first = y[0] - (mu + phi * mu)
    errors = jax.lax.scan(step, (y[0], first), y[1:])[1]
    errors = jnp.concatenate([first[None], errors])
    numpyro.sample("errors", dist.Normal(0, sigma), obs=errors)


def arma_data() -> dict[str, Any]:
    rng = np.random.default_rng(6)
    noise, y = 0.15 * rng.normal(size=201), [0.0]
    for k in range(1, 201):
        y.append(0.1 + 0.9 * y[-1] + noise[k] + 0.4 * noise[k - 1])
    return {"y": jnp.asarray(y[1:])}


def garch(y: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 10))
    alpha0 = numpyro.sample("alpha0", dist.HalfNormal(5))
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0, 1))
    beta1 = numpyro.sample("beta1", dist.Uniform(0, 1 - alpha1))

    def step(sd: Any, value: Any) -> tuple[Any, Any]:
        square = alpha0 + alpha1 * jnp.square(value - mu) + beta1 * jnp.square(sd)
        return jnp.sqrt(square), jnp.sqrt(square)

    first = jnp.asarray(1.0, y.dtype)
    sds = jax.lax.scan(step, first, y[:-1])[1]
    numpyro.sample("y", dist.Normal(mu, jnp.concatenate([first[None], sds])), obs=y)


def garch_data() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    sd, y = 1.0, []
    for _ in range(200):
        y.append(5.0 + sd * rng.normal())
        sd = np.sqrt(1.0 + 0.4 * (y[-1] - 5.0) ** 2 + 0.4 * sd**2)
    return {"y": jnp.asarray(y)}


# hierarchies


SCHOOLS = {
    "y": jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
    "sigma": jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
}


def centered_schools(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    theta = numpyro.sample("theta", dist.Normal(mu, tau).expand([len(y)]))
    numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def noncentered_schools(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    standard = numpyro.sample("standard", dist.Normal(0, 1).expand([len(y)]))
    numpyro.sample("y", dist.Normal(mu + tau * standard, sigma), obs=y)


# laws that are known


def rotated(scale_tril: Any) -> None:
    law = dist.MultivariateNormal(jnp.zeros(100), scale_tril=scale_tril)
    numpyro.sample("x", law)


def rotated_data() -> dict[str, Any]:
    """Condition number 10^4 in directions that no coordinate shows."""
    rotation = np.linalg.qr(np.random.default_rng(8).normal(size=(100, 100)))[0]
    covariance = rotation @ np.diag(np.geomspace(1e-2, 1e2, 100)) @ rotation.T
    return {"scale_tril": jnp.asarray(np.linalg.cholesky(covariance))}


def student_t() -> None:
    numpyro.sample("x", dist.StudentT(5.0, 0.0, jnp.geomspace(0.1, 10, 10)).to_event(1))


def funnel() -> None:
    scale = numpyro.sample("scale", dist.Normal(0, 3))
    law = dist.Normal(0, jnp.exp(scale / 2)).expand([9]).to_event(1)
    numpyro.sample("x", law)


def two_modes() -> None:
    """Means 6.3 sd apart in ten dimensions."""
    locs = jnp.stack([-jnp.ones(10), jnp.ones(10)])
    weights = dist.Categorical(jnp.array([0.3, 0.7]))
    components = dist.Normal(locs, 1.0).to_event(1)
    numpyro.sample("x", dist.MixtureSameFamily(weights, components))


KNOWN_LAWS = ("rotated_100", "student_t", "funnel", "two_modes")  # without data


def posteriordb() -> dict[str, Posterior]:
    """Return the seven posteriors of posteriordb."""
    found = {}
    for name, model, _ in POSTERIORS:
        data, reference = load(name)
        found[name.split("-")[0]] = Posterior(model, data, reference)
    return found


def own() -> dict[str, Posterior]:
    """Return the posteriors of this file."""
    return {
        "trend": Posterior(trend, trend_data()),
        "poisson_gp": Posterior(poisson_gp, poisson_gp_data()),
        "predator_prey": Posterior(predator_prey, predator_prey_data()),
        "hidden_markov": Posterior(hidden_markov, hidden_markov_data()),
        "arma": Posterior(arma, arma_data()),
        "garch": Posterior(garch, garch_data()),
        "schools_centered": Posterior(centered_schools, SCHOOLS),
        "schools": Posterior(noncentered_schools, SCHOOLS),
        "rotated_100": Posterior(rotated, rotated_data()),
        "logistic_25": Posterior(logistic, logistic_data(1000, 25)),
        "logistic_250": Posterior(logistic, logistic_data(1000, 250)),
        "student_t": Posterior(student_t, {}),
        "funnel": Posterior(funnel, {}),
        "two_modes": Posterior(two_modes, {}),
    }


def all_posteriors() -> dict[str, Posterior]:
    """Return all, those of posteriordb first."""
    return posteriordb() | own()
