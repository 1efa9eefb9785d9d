"""The gradient of the joint density is a target only where the density is smooth."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from numpyro_score.infer.amortized.discontinuity import (
    has_discontinuities,
    is_discontinuous_along,
)
from numpyro_score.infer.amortized.objective import (
    choose_loss,
    is_heavy_tailed,
    satisfies_stein_identities,
    stein_residuals,
)
from numpyro_score.infer.amortized.simulator import Simulator
from numpyro_score.loss import TargetScore
from tests.benchmarks.sbibm_tasks import TASKS
from tests.npse_models import gaussian_model

KEY = jax.random.key(0)


def rounded():
    x = numpyro.sample("x", dist.Normal(0, 2))
    numpyro.sample("y", dist.Normal(jnp.round(x), 0.5))


def moved_support():
    x = numpyro.sample("x", dist.Normal(0, 2))
    numpyro.sample("y", dist.Uniform(x - 1, x + 1))


def without_gradient():
    x = numpyro.sample("x", dist.Normal(0, 2))
    numpyro.sample("y", dist.Normal(jax.lax.stop_gradient(x), 0.5))


def bent():
    """A kink of the density, not a jump; and an edge where the density vanishes."""
    x = numpyro.sample("x", dist.Uniform(-1, 1))
    y = numpyro.sample("y", dist.Laplace(jnp.abs(x), 0.3))
    numpyro.sample("z", dist.LogNormal(x + y, 0.3))


def chosen(model, observed):
    simulator = Simulator.of(model, observed, softness=0.01)
    simulations = simulator.simulate(KEY, 2000)
    loss, score = choose_loss(None, simulator, simulations)
    known = isinstance(loss.target, TargetScore)
    assert known == (score is not None)
    return known, simulator, simulations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "observed"),
    [(rounded, "y"), (moved_support, "y"), (TASKS["two_moons"].model, "x")],
)
def test_jumps_are_found(model, observed):
    known, simulator, simulations = chosen(model, observed)
    assert not known
    assert has_discontinuities(simulator, simulations)


@pytest.mark.slow
def test_wrong_gradients_are_found():
    known, simulator, simulations = chosen(without_gradient, "y")
    assert not known
    assert not has_discontinuities(simulator, simulations)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian_mixture", "slcp", "lotka_volterra"])
def test_smooth_tasks_have_no_jumps(name):
    assert chosen(TASKS[name].model, "x")[0]


@pytest.mark.parametrize(
    ("rate", "heavy"),
    [(lambda x: np.exp(3 * x), True), (lambda x: np.exp(2 * x), True), (np.exp, False)],
)
def test_heavy_tailed_scores_are_found(rate, heavy):
    """The score of x given y ~ Poisson(rate); huge where the counts are."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 1))
    y = rng.poisson(rate(x)).astype(float)
    slope = np.log(rate(np.ones(1)))
    score = -x + slope * (y - rate(x))
    assert satisfies_stein_identities(x, y, score)
    assert is_heavy_tailed(x, y, score + x) == heavy  # without the prior's part


def test_score_of_the_prior_is_left_out_of_the_likelihood():
    """In the space of an interval the prior's part grows towards its edges."""
    simulator = Simulator.of(bent, ("y", "z"), softness=0.01)
    z = jnp.linspace(-2.0, 2.0, 9)[:, None]
    context = jnp.ones((9, 2))

    def log_likelihood(z, context):
        x = simulator.latents.unflatten(z)["x"]
        y, seen = context
        part = dist.LogNormal(x + y, 0.3).log_prob(seen)
        return part + dist.Laplace(jnp.abs(x), 0.3).log_prob(y)

    joint = jax.vmap(jax.grad(simulator.log_joint))(z, context)
    exact = jax.vmap(jax.grad(log_likelihood))(z, context)
    found = joint - simulator.prior_score(z)
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-4)


def test_sharp_posteriors_are_not_heavy_tailed():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 2000, 1))
    y = x + 0.01 * noise
    assert not is_heavy_tailed(x, y, -x + noise / 0.01)
    assert not is_heavy_tailed(x, rng.standard_cauchy((2000, 1)), -x)


@pytest.mark.slow
def test_kinks_are_no_jumps():
    assert chosen(gaussian_model, "y")[0]
    assert chosen(bent, ("y", "z"))[0]


def test_jumps_on_a_line():
    """A jump counts if the density there is not negligible; steepness is no jump."""
    line = jnp.zeros(1), jnp.ones(1)

    def log_density(z, scale, jump):
        return -0.5 * (z[0] / scale) ** 2 + jnp.where(z[0] > 0.37, jump, 0.0)

    found = [
        bool(is_discontinuous_along(log_density, *line, scale, jump))
        for scale, jump in [(1.0, 0.0), (0.01, 0.0), (1.0, -0.7), (0.01, -0.7)]
    ]
    assert found == [False, False, True, False]


def test_residuals_of_identities_are_means_with_their_standard_errors():
    """E[s_i f] + E[df / dz_i] for f of 1, z and functions of the observation."""
    z = np.array([[-3.0], [-1.0], [1.0], [3.0]])
    functions = np.array([[2.0], [4.0], [4.0], [2.0]])  # even, of unit 1 about 3
    scale = z.std()
    mean, error = stein_residuals(z, -z / scale**2, functions)
    u = z[:, 0] / scale
    terms = np.stack([-u, 1 - u**2, -u * (functions[:, 0] - 3)])
    np.testing.assert_allclose(mean[0], [0.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(error[0], terms.std(1) / 2, rtol=1e-6)
