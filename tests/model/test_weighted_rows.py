"""Rows of learned laws, weighted by the likelihood, beside the draws of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_score import VE, ScoreDistribution, ScoreLangevin, ScoreModel
from numpyro_score.diagnostics import verdict
from numpyro_score.model.potential import model_potential
from numpyro_score.model.weighted_rows import (
    ChainMoments,
    WeightedRows,
    WeightedSite,
    weigh_rows,
)

LEVEL = 0.1


@pytest.fixture(scope="module")
def normal_score():
    """Score of a standard normal law in two dimensions, with rows of it."""
    sde = VE()
    rows = jax.random.normal(jax.random.key(0), (2000, 2))
    return ScoreModel.from_fn(
        lambda x, t: -x / (1 + sde.sigma(t) ** 2), sde, event_shape=(2,), data=rows
    )


def site(score):
    return ScoreDistribution(score, t=score.sde.time(LEVEL))


def weighted(model, z, starts, num_chains=1):
    """Return weighted rows at latents of one chain."""
    rows = weigh_rows(
        model_potential(model, (), {}),
        starts,
        num_chains,
        jax.tree.map(lambda x: x[None], z),
    )
    return None if rows is None else jax.tree.map(lambda x: np.asarray(x[0]), rows)


@pytest.mark.parametrize("sd", [0.7, 2.0])
@pytest.mark.parametrize("y", [0.0, 1.5])
def test_weighted_rows_have_the_moments_of_the_posterior(normal_score, y, sd):
    def model():
        x = numpyro.sample("x", site(normal_score))
        numpyro.sample("y", dist.Normal(x[0], sd), obs=y)

    rows = weighted(model, {"x": jnp.zeros(2)}, {"x": 0})
    prior = 1 + LEVEL**2
    gain = prior / (prior + sd**2)
    points, ess = rows.points[0][0], float(rows.ess[0][0])
    error = 4 / ess**0.5
    assert ess > 100
    means = [gain * y, 0.0]
    np.testing.assert_allclose(points.mean(0), means, atol=error)
    np.testing.assert_allclose(points[:, 0].var(), gain * sd**2, rtol=1.5 * error)
    assert rows.sites == (WeightedSite("x", 0, 2, alone=True),)


def test_rows_are_weighted_where_the_other_latents_of_each_chain_are(normal_score):
    def model():
        center = numpyro.sample("center", dist.Normal(0, 10))
        x = numpyro.sample("x", site(normal_score))
        numpyro.sample("y", dist.Normal(x[0] + center, 1.0), obs=0.0)

    potential = model_potential(model, (), {})
    z = {"center": jnp.array([-1.5, 1.5]), "x": jnp.zeros((2, 2))}
    rows = weigh_rows(potential, {"x": 1}, 2, z)
    gain = (1 + LEVEL**2) / (2 + LEVEL**2)
    means = rows.points[0][:, 0, :, 0].mean(-1)
    np.testing.assert_allclose(means, [1.5 * gain, -1.5 * gain], atol=0.15)
    assert not rows.sites[0].alone


def test_each_point_of_a_plate_is_weighted_by_its_own_likelihood(normal_score):
    def model():
        with numpyro.plate("points", 2):
            x = numpyro.sample("x", site(normal_score))
            numpyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=jnp.array([-1.5, 1.5]))

    rows = weighted(model, {"x": jnp.zeros((2, 2))}, {"x": 0})
    gain = (1 + LEVEL**2) / (2 + LEVEL**2)
    means = rows.points[0][..., 0].mean(-1)
    np.testing.assert_allclose(means, [-1.5 * gain, 1.5 * gain], atol=0.15)


@pytest.mark.parametrize("kind", ["mask", "scale", "transform"])
def test_no_row_is_effective_where_its_weight_is_not_of_the_law_alone(
    normal_score, kind
):
    def model():
        law = site(normal_score)
        if kind == "mask":
            law = law.mask(False)
        if kind == "transform":
            law = dist.TransformedDistribution(
                law, dist.transforms.AffineTransform(3.0, 2.0)
            )
        with numpyro.handlers.scale(scale=2.0 if kind == "scale" else 1.0):
            x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(x[0], 1.0), obs=0.0)

    rows = weighted(model, {"x": jnp.zeros(2)}, {"x": 0})
    assert rows.ess[0].max() == 0
    assert not as_chains(rows).findings(moments())


def test_few_rows_and_many_chains_are_not_weighted(normal_score):
    def model():
        center = numpyro.sample("center", dist.Normal())
        numpyro.sample("x", site(normal_score))
        numpyro.sample("y", dist.Normal(center, 1.0), obs=0.0)

    z = {"center": jnp.zeros(()), "x": jnp.zeros(2)}
    assert weighted(model, z, {"x": 1}, num_chains=64) is None
    assert weighted(model, z, {"x": 1}, num_chains=4) is not None


def as_chains(rows):
    return jax.tree.map(lambda x: x[None], rows)


def moments(mean=(0.0, 0.0), sd=(1.0, 1.0), ess=1000.0):
    return ChainMoments(np.array(mean), np.array(sd), np.full(2, ess))


def normal_rows(ess=1000.0, alone=True, share_away=0.0, chains=4):
    points = np.random.default_rng(0).normal(size=(chains, 1, 1000, 2))
    points[:, :, : int(1000 * share_away)] += 8.0
    sites = (WeightedSite("x", 0, 2, alone),)
    return WeightedRows((points,), (np.full((chains, 1), ess),), sites)


def test_draws_like_the_rows_have_no_finding():
    assert not normal_rows().findings(moments())
    assert not normal_rows().findings(moments(mean=(0.15, 0.0), sd=(1.0, 0.9)))


@pytest.mark.parametrize(
    ("draws", "word"),
    [
        (moments(mean=(0.0, 0.4)), "mean"),
        (moments(sd=(1.4, 1.0)), "log sd"),
        (moments(sd=(1.0, 0.7)), "log sd"),
    ],
)
def test_means_and_sds_unlike_the_rows_are_found(draws, word):
    (finding,) = normal_rows().findings(draws)
    assert finding.name == "rows"
    assert f"difference in {word}" in finding.what
    assert finding.number > finding.threshold
    # other latents move the law of the rows from chain to chain
    assert not normal_rows(alone=False).findings(draws)
    # too few rows to tell
    assert not normal_rows(ess=40.0).findings(draws)
    # too few draws to tell
    assert not normal_rows().findings(draws._replace(ess=np.full(2, 10.0)))


@pytest.mark.parametrize("alone", [True, False])
def test_rows_far_from_all_draws_are_found_in_most_chains(alone):
    (finding,) = normal_rows(alone=alone, share_away=0.06).findings(moments())
    assert finding.name == "rows"
    assert "6 sd away" in finding.what
    assert finding.number == pytest.approx(0.06)
    few = normal_rows(alone=False, share_away=0.06, chains=4)
    few.points[0][:3] = 0.0  # one chain of four
    assert not few.findings(moments())
    assert not normal_rows(alone=False, share_away=0.005).findings(moments())


def test_a_mode_that_no_chain_has_visited_is_found():
    sde, modes = VE(), jnp.array([-2.0, 2.0])
    shares = jnp.array([0.1, 0.9])

    def score(x, t):
        def log_density(x):
            law = dist.Normal(modes, jnp.sqrt(0.25 + sde.sigma(t) ** 2))
            return jax.nn.logsumexp(jnp.log(shares) + law.log_prob(x[0]))

        return jax.grad(log_density)(x)

    rng = np.random.default_rng(1)
    rows = np.where(rng.random(2000) < 0.1, -2, 2) + 0.5 * rng.normal(size=2000)
    learned = ScoreModel.from_fn(score, sde, event_shape=(1,), data=rows[:, None])

    def model():
        x = numpyro.sample("x", ScoreDistribution(learned))
        numpyro.sample("y", dist.Normal(x, 4.0).to_event(1), obs=jnp.zeros(1))

    mcmc = MCMC(
        ScoreLangevin(model),
        num_warmup=300,
        num_samples=300,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    starts = jnp.full((4, 1), 2.0)
    with pytest.warns(UserWarning, match="rows: the share of rows"):
        mcmc.run(jax.random.key(0), init_params={"x": starts})
    assert float(mcmc.get_samples()["x"].min()) > -0.5
    assert verdict(mcmc).names == "rows"
