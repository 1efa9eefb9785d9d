"""ArviZ's tree of each backend: groups, dimensions, attributes, and ArviZ reads it."""

from dataclasses import replace

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS

from numpyro_score import (
    NPSE,
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ScoreDistribution,
    ScoreLangevin,
    ScoreSDE,
    to_datatree,
)
from tests.npse_models import (
    NOISE_SD,
    PRIOR_MEAN,
    PRIOR_SD,
    A,
    exact_gaussian,
    gaussian_posterior,
)
from tests.targets import STANDARD_NORMAL

NORMAL = STANDARD_NORMAL.score_model(VE(0.01, 20.0))
Y = jnp.array([1.0, 2.0, 3.0])
# runs are too short for their own verdict and for ArviZ's
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s).*(may not be trusted|restarts|Pareto|too short|point-wise LOO)"
)
GROUPS = {
    "posterior",
    "sample_stats",
    "observed_data",
    "log_likelihood",
    "posterior_predictive",
    "prior",
    "prior_predictive",
}


def ordinary(y):
    x = numpyro.sample("x", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


def learned(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with numpyro.plate("rows", 3):
        numpyro.sample("y", dist.Normal(x, scale), obs=y)


def log_joint(x, scale):
    """Density of x and log scale, as all samplers see it."""
    rows = dist.Normal(x[..., None], scale[..., None]).log_prob(Y).sum(-1)
    return (
        dist.Normal(0, 1).log_prob(x)
        + dist.Normal(0, 0.1).log_prob(jnp.log(scale))
        + rows
    )


def mcmc_of(kernel, num_chains=2, num_warmup=100):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=100,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), Y)
    return mcmc


def check_tree(tree, num_chains, num_draws, rtol=1e-4):
    """Check what every backend gives for the model of this file."""
    assert set(tree.children) >= GROUPS
    shape = (num_chains, num_draws)
    assert tree.posterior["x"].shape == shape
    for group in ("log_likelihood", "posterior_predictive"):
        assert tree[group]["y"].shape == (*shape, 3)
        assert tree[group]["y"].dims == ("chain", "draw", "rows")
    assert tree.observed_data["y"].dims == ("rows",)
    assert tree.prior["x"].shape == (1, 500)
    assert tree.prior_predictive["y"].dims == ("chain", "draw", "rows")
    exact = log_joint(*(tree.posterior[name].values for name in ("x", "scale")))
    assert np.allclose(tree.sample_stats["lp"], exact, rtol=rtol, atol=1e-2)
    kinetic = (tree.sample_stats["energy"] + tree.sample_stats["lp"]).values
    assert (kinetic > -1e-4).all()
    assert abs(kinetic.mean() - 1.0) < 5 / np.sqrt(kinetic.size)  # two latents
    check_arviz(tree)


def check_arviz(tree):
    """Check that ArviZ's functions take the tree."""
    assert np.isfinite(arviz.summary(tree)["mean"].astype(float)).all()
    assert np.isfinite(arviz.loo(tree).elpd)
    for plot in (arviz.plot_trace, arviz.plot_energy):
        plot(tree, backend="none")


KERNELS = {
    "ScoreLangevin": (lambda: ScoreLangevin(ordinary), 2, "exact"),
    "learned": (
        lambda: ScoreLangevin(learned),
        2,
        "exact for the learned law up to quadrature",
    ),
    "AnnealedLangevin": (lambda: AnnealedLangevin(ordinary, levels=5), 40, "exact"),
    "ParallelTempering": (lambda: ParallelTempering(ordinary, num_rungs=3), 2, "exact"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_tree_of_a_kernel(name):
    make, num_chains, exactness = KERNELS[name]
    tree = to_datatree(mcmc_of(make(), num_chains))
    check_tree(tree, num_chains, 100)
    assert tree.attrs["exactness"] == exactness
    assert tree.attrs.items() <= tree.posterior.attrs.items()
    assert tree.attrs["verdict"]
    assert tree.sample_stats["diverging"].shape == (num_chains, 100)
    weighted = name in ("AnnealedLangevin", "ParallelTempering")
    assert ("log_evidence" in tree.attrs) == weighted
    assert ("log_evidence_error" in tree.attrs) == weighted


@pytest.mark.slow
def test_tree_of_score_sde():
    inference = ScoreSDE(
        learned,
        num_samples=200,
        num_particles=200,
        num_chains=2,
        levels=20,
        progress_bar=False,
    )
    with pytest.raises(RuntimeError, match="`run` must be called first"):
        to_datatree(inference)
    inference.run(jax.random.key(0), Y)
    tree = to_datatree(inference)
    check_tree(tree, 2, 200)
    assert tree.attrs["exactness"].startswith("exact for the learned law")
    assert tree.attrs["log_evidence"] == inference.log_evidence
    assert tree.attrs["log_evidence_error"] == inference.log_evidence_error
    assert tree.attrs["verdict"] == "ok"
    inference.print_summary()


@pytest.mark.parametrize("importance", [False, True])
def test_tree_of_an_amortized_posterior(importance):
    posterior, y = exact_gaussian(), np.array([1.0, -1.0, -2.0])
    with pytest.raises(ValueError, match="`observation` must be given"):
        to_datatree(posterior)
    tree = to_datatree(posterior, observation=y, num_samples=200, importance=importance)
    assert set(tree.children) >= GROUPS
    assert np.allclose(tree.observed_data["y"], y)
    assert tree.posterior_predictive["y"].shape == (1, 200, 3)
    check_arviz(tree)
    assert ("khat" in tree.attrs) == importance
    assert ("log_evidence" in tree.attrs) == importance
    assert tree.attrs["exactness"].startswith("exact" if importance else "approximate")
    lp = tree.sample_stats["lp"].values
    z = jnp.asarray(tree.posterior["x"].values)[0]
    joint = jax.vmap(posterior.simulator.log_joint, (0, None))(z, jnp.asarray(y))
    assert np.allclose(lp[0], joint, rtol=1e-4)


def simulator():
    """The Gaussian model, as a simulator whose observation has no density."""
    x = numpyro.sample("x", dist.Normal(PRIOR_MEAN, PRIOR_SD).to_event(1))
    with numpyro.plate("rows", 3):
        noise = numpyro.sample("noise", dist.Normal(0, NOISE_SD))
        numpyro.deterministic("y", A @ x + noise)


def test_tree_of_a_simulator_without_likelihood():
    trainer = NPSE(simulator, "y", latents="x")
    posterior = replace(exact_gaussian(), simulator=trainer.simulator())
    tree = to_datatree(posterior, observation=np.ones(3), num_samples=200)
    assert "log_likelihood" not in tree.children
    assert tree.observed_data["y"].dims == ("rows",)
    assert tree.posterior_predictive["y"].dims == ("chain", "draw", "rows")
    noise = tree.posterior_predictive["y"].values - tree.posterior["x"].values @ A.T
    assert abs(noise.std() - NOISE_SD) < 0.1  # drawn anew, not observed
    mean, covariance = gaussian_posterior(np.ones(3))
    law = dist.MultivariateNormal(mean, covariance)
    exact = law.log_prob(tree.posterior["x"].values)
    assert np.allclose(tree.sample_stats["lp"], exact, rtol=1e-3, atol=1e-2)


def test_energy_of_langevin_chains_is_that_of_their_trajectory():
    mcmc = mcmc_of(ScoreLangevin(ordinary))
    fields = mcmc.get_extra_fields(group_by_chain=True)
    tree = to_datatree(mcmc, num_prior_samples=0)
    assert "prior" not in tree.children
    assert np.allclose(tree.sample_stats["energy"], fields["energy"])
    assert np.allclose(tree.sample_stats["lp"], -fields["potential_energy"])


def test_marginalized_sites_leave_their_groups_out():
    def mixture(y):
        x = numpyro.sample("x", dist.Normal(0, 1))
        side = numpyro.sample(
            "side", dist.Bernoulli(0.5), infer={"enumerate": "parallel"}
        )
        numpyro.sample("y", dist.Normal(x + side, 1), obs=y)

    mcmc = MCMC(
        ScoreLangevin(mixture), num_warmup=20, num_samples=20, progress_bar=False
    )
    mcmc.run(jax.random.key(0), 1.0)
    tree = to_datatree(mcmc)
    assert not set(tree.children) & {"log_likelihood", "posterior_predictive"}
    assert tree.attrs["verdict"] == "not judged"
    assert "prior" in tree.children


def test_names_of_dimensions_and_coordinates():
    def model():
        numpyro.sample("x", dist.Normal(jnp.zeros(2), 1).to_event(1))

    mcmc = MCMC(ScoreLangevin(model), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0))
    tree = to_datatree(mcmc, dims={"x": ["side"]}, coords={"side": ["left", "right"]})
    assert tree.posterior["x"].sel(side="left").shape == (1, 5)
    assert set(tree.children) == {"posterior", "sample_stats"}


def test_potential_function_has_draws_and_energies():
    kernel = ScoreLangevin(potential_fn=lambda z: (z**2).sum() / 2)
    mcmc = MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0), init_params=jnp.zeros(2))
    tree = to_datatree(mcmc)
    x = tree.posterior["Param:0"]
    assert np.allclose(tree.sample_stats["lp"], -(x**2).sum(x.dims[2]) / 2, atol=1e-5)


def test_nuts_has_energies_too():
    mcmc = mcmc_of(NUTS(ordinary))
    tree = to_datatree(mcmc)
    check_tree(tree, 2, 100)
    assert "exactness" not in tree.attrs


def test_learned_density_can_be_left_out():
    mcmc = mcmc_of(ScoreLangevin(learned))
    stats = to_datatree(mcmc, learned_density=False, num_prior_samples=0).sample_stats
    assert not {"lp", "energy"} & set(stats.data_vars)
    assert "acceptance_rate" in stats


def test_scaled_and_masked_learned_sites_count_as_in_the_model():
    def model():
        with handlers.scale(scale=3.0), numpyro.plate("rows", 3):
            law = ScoreDistribution(NORMAL).mask(jnp.array([True, True, False]))
            numpyro.sample("x", law)

    mcmc = MCMC(ScoreLangevin(model), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0))
    tree = to_datatree(mcmc, num_prior_samples=0)
    x = tree.posterior["x"].values
    exact = 3 * np.asarray(dist.Normal(0, 1).log_prob(x))[..., :2].sum(-1)
    assert np.allclose(tree.sample_stats["lp"], exact, rtol=1e-2, atol=1e-2)


def test_results_of_other_kinds_are_refused():
    mcmc = MCMC(ScoreLangevin(ordinary), num_warmup=1, num_samples=1)
    with pytest.raises(RuntimeError, match="call `run` first"):
        to_datatree(mcmc)
    with pytest.raises(ValueError, match="`num_prior_samples` must not be negative"):
        to_datatree(mcmc, num_prior_samples=-1)
    with pytest.raises(TypeError, match="`result` must be an MCMC or a ScoreSDE"):
        to_datatree(NPSE(simulator, "y"))


def test_summary_of_an_amortized_posterior(capsys):
    exact_gaussian().print_summary(jax.random.key(0), np.ones(3), 200)
    printed = capsys.readouterr().out
    assert "x[1]" in printed
    assert "Given y of shape (3,): 200 independent draws" in printed
