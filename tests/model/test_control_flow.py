"""Learned sites beside a scan are sampled; inside of one they are refused by name."""

import re

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import MCMC

from numpyro_score import VE, AnnealedLangevin, ScoreDistribution, ScoreLangevin
from numpyro_score.infer import ScoreSDE
from numpyro_score.model.potential import model_potential
from tests.targets import STANDARD_NORMAL

LAW = ScoreDistribution(STANDARD_NORMAL.score_model(VE()))
Y = jnp.array([1.0, 2.0, 3.0])
REFUSAL = (
    "Learned site 'x' must not be inside `scan` or `cond` of "
    "`numpyro.contrib.control_flow`, which hide its score from the sampler. Sample it "
    "outside, all steps at once in a `numpyro.plate`, and hand the values to `scan` as "
    "`xs`."
)


def inside(y, law=LAW):
    def step(total, y):
        x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(total + x, 1.0), obs=y)
        return total + x, None

    scan(step, 0.0, y)


def outside(y):
    def step(total, inputs):
        x, y = inputs
        numpyro.sample("y", dist.Normal(total + x, 1.0), obs=y)
        return total + x, None

    with numpyro.plate("steps", len(y)):
        x = numpyro.sample("x", LAW)
    scan(step, 0.0, (x, y))


def in_a_branch(y):
    law = LAW.expand([3])
    cond(
        y[0] > 0,
        lambda _: numpyro.sample("x", law),
        lambda _: 2.0 * numpyro.sample("x", law),
        None,
    )


def test_every_sampler_refuses_a_learned_site_in_scan():
    samplers = [
        MCMC(kernel(inside), num_warmup=10, num_samples=10, progress_bar=False)
        for kernel in (ScoreLangevin, AnnealedLangevin)
    ]
    samplers.append(
        ScoreSDE(inside, num_samples=10, num_particles=10, progress_bar=False)
    )
    for sampler in samplers:
        with pytest.raises(ValueError, match=f"^{re.escape(REFUSAL)}"):
            sampler.run(jax.random.key(0), Y)


def test_learned_site_in_a_branch_is_refused():
    with pytest.raises(ValueError, match=f"^{re.escape(REFUSAL)}$"):
        model_potential(in_a_branch, (Y,), {})


def test_learned_site_handed_to_scan_has_the_potential_of_its_law():
    potential = model_potential(outside, (Y,), {})
    full = model_potential(inside, (Y, dist.Normal(0, 1)), {})
    z = {"x": jnp.array([0.3, -1.0, 2.0])}
    expected = full.evaluate(z).grad["x"]
    assert jnp.allclose(potential.evaluate(z).grad["x"], expected, atol=1e-3)
