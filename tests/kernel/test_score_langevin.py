"""ScoreLangevin recovers laws that are known in closed form; mutants do not."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score.kernel import AcceptRule
from numpyro_score.kernel import transition as transition_module
from numpyro_score.model import potential as potential_module
from numpyro_score.model.potential import LearnedPoint, ModelPotential

SDE = VE()


class Moments(NamedTuple):
    """What is known of a law: mean, variance and one quantile."""

    mean: float
    variance: float
    median: float


def draw(kernel: Any, seed: int = 0, **run: Any) -> MCMC:
    """Run 64 vectorized chains."""
    mcmc = MCMC(
        kernel,
        num_warmup=500,
        num_samples=1000,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), **run)
    return mcmc


def check(draws: Any, true: Moments, precision: float = 0.02) -> None:
    """Compare with the truth within 4.5 standard errors between chains.

    The standard errors must be below ``precision`` standard deviations, so that a law
    that is off by more cannot pass.
    """
    draws = np.asarray(draws, np.float64)
    assert draws.ndim == 2
    statistics = {
        "mean": ((draws - true.mean), true.variance**0.5),
        "variance": ((draws - true.mean) ** 2 - true.variance, 2 * true.variance),
        "median": ((draws < true.median) - 0.5, 0.5),
    }
    for name, (statistic, unit) in statistics.items():
        by_chain = statistic.mean(1)
        error = by_chain.std(ddof=1) / np.sqrt(len(draws))
        assert error < precision * unit, f"{name} is too uncertain"
        assert abs(by_chain.mean()) < 4.5 * error, name


# the conjugate check: a prior N(0, 1) known only by its score, y = 2, sigma = 1


def learned_standard_normal() -> ScoreDistribution:
    def score_fn(x, t):
        return -x / (1 - SDE.sigma_min**2 + SDE.sigma(t) ** 2)

    return ScoreDistribution(ScoreModel.from_fn(score_fn, SDE, ()))


def conjugate_model() -> None:
    x = numpyro.sample("x", learned_standard_normal())
    numpyro.sample("y", dist.Normal(x, 1.0), obs=2.0)


def check_conjugate(draws: Any) -> None:
    assert abs(np.mean(draws) - 1.0) < 0.02
    assert abs(np.var(draws) - 0.5) < 0.02


MALA = {"num_steps": 1, "friction": None}
MEMBERS = {
    "MALT": {},
    "MALA": MALA,
    "GHMC": {"num_steps": 1, "friction": 1.0, "target_accept_prob": 0.9},
    # BAOAB has no bias in a Gaussian, which the posterior is
    "Leimkuhler-Matthews": {"adjusted": False, "num_steps": 1, "friction": None},
    "kinetic": {"adjusted": False, "num_steps": 1, "friction": 1.0},
}


def first_of(names: Any) -> list[Any]:
    """Return the names; those after the first are slow."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


ADJUSTED = ["MALT", "MALA", "GHMC"]


@pytest.mark.parametrize("member", first_of(MEMBERS))
def test_learned_prior_in_a_conjugate_model(member):
    mcmc = draw(ScoreLangevin(conjugate_model, **MEMBERS[member]))
    check_conjugate(mcmc.get_samples()["x"])
    assert not mcmc.get_extra_fields()["diverging"].any()


def no_score(self: ModelPotential, name: str, x: Any) -> Any:
    """A mutant that ignores the prior altogether."""
    return jnp.zeros_like(x)


def no_work(self: ModelPotential, start: Any, end: Any) -> Any:
    """A mutant whose force has the prior while its accept step has not."""
    return jnp.zeros(()), jnp.zeros(())


@pytest.mark.parametrize("member", first_of(["MALA", "MALT", "kinetic"]))
def test_mutant_without_prior_is_caught(monkeypatch, member):
    monkeypatch.setattr(ModelPotential, "_score", no_score)
    mcmc = draw(ScoreLangevin(conjugate_model, **MEMBERS[member]))
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    check(draws, Moments(2.0, 1.0, 2.0), 0.04)  # the law without the prior
    with pytest.raises(AssertionError):
        check_conjugate(draws)


@pytest.mark.slow
def test_mutant_accepting_without_prior_is_caught(monkeypatch):
    monkeypatch.setattr(ModelPotential, "learned_difference_with_error", no_work)
    draws = draw(ScoreLangevin(conjugate_model, **MALA)).get_samples()["x"]
    with pytest.raises(AssertionError):
        check_conjugate(draws)


@pytest.mark.slow
def test_nuts_sees_the_learned_prior():
    """The density of a ScoreDistribution is real, so other kernels are right too."""
    mcmc = MCMC(
        NUTS(conjugate_model),
        num_warmup=200,
        num_samples=1000,
        num_chains=32,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0))
    check_conjugate(mcmc.get_samples()["x"])


# skewed laws


def gamma_model() -> None:
    numpyro.sample("x", dist.Gamma(2.0, 1.0))


GAMMA = Moments(2.0, 2.0, 1.6783469900166605)


def learned_gumbel_model() -> None:
    def score_fn(x, t):
        return jnp.expm1(-x)

    score = ScoreModel.from_fn(score_fn, VE(sigma_min=0.1), ())
    numpyro.sample("x", ScoreDistribution(score))


GUMBEL = Moments(np.euler_gamma, np.pi**2 / 6, -np.log(np.log(2.0)))


@pytest.mark.parametrize("member", first_of(ADJUSTED))
def test_skewed_law_with_constrained_support(member):
    mcmc = draw(ScoreLangevin(gamma_model, **MEMBERS[member]))
    check(mcmc.get_samples(group_by_chain=True)["x"], GAMMA, 0.04)


def forget_jacobian(model, args, kwargs, z, enum=False):
    """A mutant: the potential of the constrained density at unconstrained z."""
    return potential_module.original(model, args, kwargs, z, enum=enum) + z["x"]


def test_mutant_that_forgets_the_jacobian_is_caught(monkeypatch):
    monkeypatch.setattr(
        potential_module, "original", potential_module.potential_energy, raising=False
    )
    monkeypatch.setattr(potential_module, "potential_energy", forget_jacobian)
    kernel = ScoreLangevin(gamma_model, **MALA)
    draws = draw(kernel).get_samples(group_by_chain=True)["x"]
    with pytest.raises(AssertionError, match="mean"):
        check(draws, GAMMA, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("member", ADJUSTED)
def test_skewed_learned_law(member):
    kernel = ScoreLangevin(
        learned_gumbel_model,
        num_nodes=5,
        init_strategy=numpyro.infer.init_to_value(values={"x": 0.5}),
        **MEMBERS[member],
    )
    check(draw(kernel).get_samples(group_by_chain=True)["x"], GUMBEL, 0.04)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*stand still:UserWarning")
def test_mutant_that_accepts_everything_is_caught(monkeypatch):
    # all but energy errors beyond 87
    def always(words: Any) -> Any:
        return jnp.full(words[0].shape, float(jnp.finfo(jnp.float32).tiny))

    monkeypatch.setattr(transition_module, "uniform", always)
    kernel = ScoreLangevin(gamma_model, **MALA)
    draws = draw(kernel).get_samples(group_by_chain=True)["x"]
    with pytest.raises(AssertionError):
        check(draws, GAMMA, 0.1)


# potential functions, and learned forces for known potentials


def gumbel_potential(z: Any) -> Any:
    x = z["x"]
    return jnp.sum(x + jnp.exp(-x))


def blurred_score(z: Any) -> Any:
    """A deliberately wrong force: too weak, shifted, and not even of this law."""
    return {"x": -0.7 * jnp.tanh(z["x"] - 0.8)}


@pytest.mark.parametrize("member", first_of(ADJUSTED))
@pytest.mark.parametrize("score_fn", [None, blurred_score], ids=["gradient", "learned"])
def test_potential_function_is_exact_with_any_force(score_fn, member):
    kernel = ScoreLangevin(
        potential_fn=gumbel_potential, score_fn=score_fn, **MEMBERS[member]
    )
    mcmc = draw(kernel, init_params={"x": jnp.full(64, 0.5)})
    check(mcmc.get_samples(group_by_chain=True)["x"], GUMBEL, 0.05)


@pytest.mark.slow
def test_learned_force_in_a_model_is_exact():
    def score_fn(z):
        # of the unconstrained Gamma(2, 1.3) in place of Gamma(2, 1)
        return {"x": 2.0 - 1.3 * jnp.exp(z["x"])}

    mcmc = draw(ScoreLangevin(gamma_model, score_fn=score_fn))
    check(mcmc.get_samples(group_by_chain=True)["x"], GAMMA, 0.06)


@pytest.mark.slow
def test_wrong_force_without_accept_step_is_caught():
    """Exactness with any force comes from the accept step alone."""
    kernel = ScoreLangevin(
        potential_fn=gumbel_potential, score_fn=blurred_score, adjusted=False, **MALA
    )
    mcmc = draw(kernel, init_params={"x": jnp.full(64, 0.5)})
    with pytest.raises(AssertionError):
        check(mcmc.get_samples(group_by_chain=True)["x"], GUMBEL, 0.1)


# metrics


@pytest.mark.slow
@pytest.mark.parametrize("dense_mass", [True, [("a", "b")]], ids=["dense", "block"])
def test_metric_is_learned_in_correlated_sites(dense_mass):
    def model():
        a = numpyro.sample("a", dist.Normal(0, 10.0))
        numpyro.sample("b", dist.Normal(a, 0.1))

    mcmc = draw(ScoreLangevin(model, dense_mass=dense_mass))
    draws = mcmc.get_samples(group_by_chain=True)
    check(draws["a"], Moments(0.0, 100.0, 0.0), 0.04)
    check(draws["b"] - draws["a"], Moments(0.0, 0.01, 0.0), 0.04)


@pytest.mark.slow
def test_weights_of_the_learned_prior_count_in_the_accept_step():
    """Two copies of the prior by `scale`: N(0, 1/2) times the likelihood."""

    def model():
        with numpyro.handlers.scale(scale=2.0):
            x = numpyro.sample("x", learned_standard_normal())
        numpyro.sample("y", dist.Normal(x, 1.0), obs=3.0)

    draws = draw(ScoreLangevin(model)).get_samples(group_by_chain=True)["x"]
    check(draws, Moments(1.0, 1 / 3, 1.0), 0.02)


@pytest.mark.slow
def test_learned_point_counts_no_masked_rows():
    """Where the mask is off, the site has no prior, only its likelihood."""

    def model():
        mask = jnp.array([True, False])
        prior = learned_standard_normal().expand([2]).mask(mask)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.array([2.0, 2.0]))

    mcmc = draw(ScoreLangevin(model))
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    check(draws[..., 0], Moments(1.0, 0.5, 1.0))
    check(draws[..., 1], Moments(2.0, 1.0, 2.0))
    assert isinstance(mcmc.last_state.learned["x"], LearnedPoint)


# which rule decides


def test_accept_rule_says_what_decides(monkeypatch):
    free = {"adjusted": False}
    assert ScoreLangevin(gamma_model).accept_rule() == AcceptRule.VALUE
    assert ScoreLangevin(potential_fn=gumbel_potential).accept_rule() == 0
    assert ScoreLangevin(conjugate_model).accept_rule() == AcceptRule.LINE_INTEGRAL
    assert AnnealedLangevin(conjugate_model).accept_rule() == AcceptRule.LINE_INTEGRAL
    assert ScoreLangevin(conjugate_model, **free).accept_rule() == AcceptRule.UNADJUSTED
    state = ScoreLangevin(conjugate_model).init(jax.random.key(0), 0)
    assert int(state.accept_rule) == AcceptRule.LINE_INTEGRAL
    monkeypatch.setattr(ScoreModel, "has_energy", True)
    assert ScoreLangevin(conjugate_model).accept_rule() == AcceptRule.ENERGY
