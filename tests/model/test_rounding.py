"""Draws whose values are rounded to the end of their support are found."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import biject_to, constraints
from numpyro.infer import MCMC

from numpyro_score import ParallelTempering, ScoreLangevin
from numpyro_score.diagnostics import verdict
from numpyro_score.model.potential import model_potential
from numpyro_score.model.rounding import (
    RoundedCounts,
    RoundedSite,
    rounded_numbers,
)


@pytest.mark.parametrize(
    ("support", "lost", "kept"),
    [
        (constraints.unit_interval, [17.0, 30.0, -90.0], [13.0, -80.0, 0.0]),
        (constraints.interval(5.0, 7.0), [17.0, -17.0], [10.0, -10.0]),
        (constraints.positive, [-110.0, 90.0], [-80.0, 80.0]),
    ],
)
def test_latents_beyond_the_last_number_of_single_precision_are_lost(
    support, lost, kept
):
    transform = biject_to(support)
    z = jnp.asarray([*lost, *kept], jnp.float32)
    expected = [True] * len(lost) + [False] * len(kept)
    assert rounded_numbers(transform, z).tolist() == expected


def test_the_lost_part_of_a_simplex_is_found():
    transform = biject_to(constraints.simplex)
    z = jnp.asarray([0.5, 25.0, 0.0], jnp.float32)  # the rest of the stick is 1e-11
    assert rounded_numbers(transform, z)[1]
    assert not rounded_numbers(transform, jnp.array([0.5, -3.0, 4.0])).any()


def sites():
    numpyro.sample("free", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("p", dist.Beta(1, 1).expand([3]))
    numpyro.sample("scale", dist.HalfNormal(1))


def test_the_site_with_the_largest_share_is_named():
    potential = model_potential(sites, (), {})
    counts = RoundedCounts.zero(potential)
    assert {site.name: site.size for site in counts.sites} == {"p": 3, "scale": 1}
    z = {"free": jnp.full(2, 1e6), "p": jnp.zeros(3)}
    z["scale"] = jnp.zeros(())
    for p in (40.0, 40.0, 0.0, 0.0):
        z["p"] = z["p"].at[1].set(p)
        counts = counts.add(potential, z)
    (found,) = counts.findings(4)
    assert found.name == "rounded"
    assert found.number == 0.5
    assert "'p'" in str(found)
    assert counts.restart(jnp.array(True)).findings(4) == []


def test_sites_without_bounds_cost_nothing():
    def free():
        numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))

    assert RoundedCounts.zero(model_potential(free, (), {})) is None


def success(shape):
    p = numpyro.sample("p", dist.Beta(shape, shape))
    numpyro.sample("y", dist.Bernoulli(p), obs=1.0)


@pytest.mark.filterwarnings("ignore:The draws of this run")
@pytest.mark.parametrize("kernel", [ScoreLangevin, ParallelTempering])
@pytest.mark.parametrize(("shape", "sound"), [(0.02, False), (1.0, True)])
def test_a_density_that_is_cut_off_is_in_the_verdict(kernel, shape, sound):
    """The logit of Beta(1.02, .02) has a tail e^(-.02 z), of which 16 is little."""
    mcmc = MCMC(
        kernel(success),
        num_warmup=300,
        num_samples=400,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), shape)
    names = [finding.name for finding in verdict(mcmc).findings]
    assert ("rounded" not in names) == sound
    error = np.mean(mcmc.get_samples()["p"]) - (shape + 1) / (2 * shape + 1)
    assert (abs(error) < 0.03) == sound


def test_shares_are_those_of_each_number_of_each_site_over_all_chains():
    sites = RoundedSite("a", 3), RoundedSite("b", 1)
    counts = np.array([[10, 0, 20, 40], [30, 0, 0, 40]])  # of two chains of 40 draws
    three, one = RoundedCounts(counts, sites).shares(40)
    np.testing.assert_allclose(three, [0.5, 0.0, 0.25])
    np.testing.assert_allclose(one, [1.0])
