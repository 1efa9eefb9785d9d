"""Positive, bounded and simplex data: learned in unconstrained space."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import biject_to, constraints
from numpyro.infer.util import log_density

from numpyro_score import MLP, VE, ScoreDistribution, ScoreMatching, ScoreModel
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import SoftClip, Support
from numpyro_score.io.config import from_config, to_config
from numpyro_score.model.handlers import noise_level
from numpyro_score.model.potential import model_potential
from numpyro_score.score.density import solver_log_prob
from numpyro_score.solver import RK4, Geometric

SDE = VE()
LOC, SCALE = 0.3, 0.5


def log_normal(event_shape=()):
    """The exact score model of a log-normal law."""
    support = Support.of(constraints.positive, event_shape)

    def score_fn(u, t):
        return -u / (1 + SDE.sigma(t) ** 2)

    score = ScoreModel.from_fn(score_fn, SDE, event_shape)
    standardize = Affine(jnp.full(event_shape, LOC), jnp.full(event_shape, SCALE))
    return ScoreModel(score.denoiser, standardize, SDE, event_shape, support)


EXACT = dist.LogNormal(LOC, SCALE)


def test_density_has_the_jacobian():
    x = jnp.array([0.4, 1.0, 3.0])
    got = ScoreDistribution(log_normal()).log_prob(x)
    np.testing.assert_allclose(got, EXACT.log_prob(x), atol=2e-3)
    np.testing.assert_allclose(log_normal().log_prob(x), got)


def test_density_by_a_solver_has_the_jacobian():
    x, ts = jnp.array([0.4, 1.0, 3.0]), Geometric()(SDE, 64)
    got = solver_log_prob(log_normal(), x, solver=RK4(), ts=ts)
    np.testing.assert_allclose(got, EXACT.log_prob(x), atol=2e-3)


def test_gradient_of_the_density_is_the_score_in_data_space():
    learned = ScoreDistribution(log_normal())
    for x in (0.4, 3.0):
        got = jax.grad(learned.log_prob)(jnp.array(x))
        np.testing.assert_allclose(got, jax.grad(EXACT.log_prob)(x), rtol=2e-3)


def test_draws_lie_in_the_support_and_follow_the_law():
    learned = ScoreDistribution(log_normal((2,)), validate_args=True)
    x = learned.sample(jax.random.key(0), (2000,))
    assert x.shape == (2000, 2)
    assert learned.support(x).all()
    mean = jnp.log(x).mean(0)
    assert (jnp.abs(mean - LOC) < 5 * SCALE / np.sqrt(2000)).all()


def model(prior):
    x = numpyro.sample("x", prior)
    numpyro.sample("y", dist.Normal(x, 0.7), obs=2.0)


def test_potential_is_that_of_the_exact_prior():
    """Gradient of everything, and the Jacobian in the known part."""
    learned = model_potential(model, (ScoreDistribution(log_normal()),), {})
    exact = model_potential(model, (EXACT,), {})
    zs = [{"x": jnp.array(z)} for z in (-0.5, 0.8)]
    points = [learned.evaluate(z) for z in zs]
    for z, point in zip(zs, points, strict=True):
        want = exact.evaluate(z)
        np.testing.assert_allclose(point.grad["x"], want.grad["x"], rtol=2e-3)
        np.testing.assert_allclose(point.learned["x"].x, z["x"], atol=1e-6)
    change = points[1].value - points[0].value
    ends = (point.learned for point in points)
    change += learned.learned_difference_with_error(*ends)[0]
    want = exact.evaluate(zs[1]).value - exact.evaluate(zs[0]).value
    np.testing.assert_allclose(change, want, rtol=2e-3)


def test_noise_level_denoises_in_unconstrained_space():
    t = SDE.time(1.0)  # noise as wide as the law: halfway to its center
    noisy = noise_level(model, t)

    def y_at(x):
        conditioned = numpyro.handlers.substitute(noisy, {"x": x})
        seeded = numpyro.handlers.seed(conditioned, 0)
        return (
            numpyro.handlers.trace(seeded)
            .get_trace(ScoreDistribution(log_normal()))["y"]["fn"]
            .loc
        )

    x = jnp.exp(LOC + 1.0)
    np.testing.assert_allclose(y_at(x), jnp.exp(LOC + 0.5), rtol=1e-3)


SUPPORTS = {
    "positive": (constraints.positive, (2,)),
    "interval": (constraints.interval(-1.0, 3.0), (2,)),
    "simplex": (constraints.simplex, (3,)),
    "cholesky": (constraints.corr_cholesky, (2, 2)),
}


@pytest.mark.parametrize(
    "name",
    [
        "simplex",
        pytest.param("positive", marks=pytest.mark.slow),
        pytest.param("interval", marks=pytest.mark.slow),
        pytest.param("cholesky", marks=pytest.mark.slow),
    ],
)
def test_training_respects_the_support(name):
    constraint, shape = SUPPORTS[name]
    z_shape = biject_to(constraint).inverse_shape(shape)
    z = jax.random.normal(jax.random.key(0), (256, *z_shape))
    data = biject_to(constraint)(z)
    trainer = ScoreMatching(
        MLP(int(np.prod(z_shape)), width=8, depth=1), support=constraint
    )
    result = trainer.run(jax.random.key(1), 20, data, progress_bar=False)
    score = result.score
    learned = ScoreDistribution(score)
    assert (score.event_shape, score.data_shape) == (z_shape, shape)
    assert learned.event_shape == shape
    draws = learned.sample(jax.random.key(2), (50,))
    assert draws.shape == (50, *shape)
    assert learned.support(draws).all()
    value = learned.log_prob(draws[:3])
    assert value.shape == (3,)
    assert jnp.isfinite(value).all()

    def prior():
        numpyro.sample("x", learned)

    potential = model_potential(prior, (), {})
    point = {"x": z[0]}
    assert potential.evaluate(point).grad["x"].shape == z_shape
    want, _ = log_density(prior, (), {}, {"x": data[0]})
    jacobian = biject_to(constraint).log_abs_det_jacobian(z[0], data[0]).sum()
    base = ScoreModel(score.denoiser, score.standardize, score.sde, z_shape)
    np.testing.assert_allclose(want + jacobian, base.log_prob(z[0]), atol=1e-3)
    np.testing.assert_allclose(potential.evaluate(point).value, 0.0, atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, -1.0])
def test_data_outside_are_refused(bad):
    data = np.ones((8, 1))
    data[3] = bad
    with pytest.raises(ValueError, match=r"`data` must lie inside the support"):
        ScoreMatching(MLP(1), support=constraints.positive).init(
            jax.random.key(0), data
        )


def test_supports_without_a_bijection_are_refused():
    with pytest.raises(TypeError, match=r"`support` must be a NumPyro constraint"):
        ScoreMatching(MLP(1), support=constraints.positive_integer)
    with pytest.raises(TypeError, match=r"`support` must be a NumPyro constraint"):
        ScoreMatching(MLP(1), support="positive")
    with pytest.raises(TypeError, match=r"`support` must have a bijection"):
        ScoreMatching(
            MLP(1), support=constraints.dependent(is_discrete=False, event_dim=0)
        )


def test_support_of_larger_events_is_refused():
    with pytest.raises(ValueError, match=r"`support` must be a constraint on a datum"):
        Support.of(constraints.simplex, ())


def test_supports_compare_by_value():
    one, same = (Support.of(constraints.interval(0.0, 1.0), (2,)) for _ in range(2))
    other = Support.of(constraints.interval(0.0, 2.0), (2,))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other


@pytest.mark.parametrize("softness", [0.002, 0.01, 0.1, 1.0])
def test_soft_interval_is_a_bijection_with_its_jacobian(softness):
    soft = SoftClip(-3.0, 5.0, softness)
    x = jnp.linspace(-2.9, 4.9, 41)
    z = soft.inv(x)
    np.testing.assert_allclose(soft(z), x, atol=2e-5)
    slope = jnp.log(jax.vmap(jax.grad(soft))(z))
    np.testing.assert_allclose(soft.log_abs_det_jacobian(z, x), slope, atol=2e-3)


def test_soft_interval_leaves_the_inside_alone_and_never_leaves_the_interval():
    soft = SoftClip(-1.0, 1.0, 0.01)
    inside = jnp.linspace(-0.8, 0.8, 9)
    np.testing.assert_allclose(soft(inside), inside, atol=1e-5)
    far = soft(jnp.array([-1e4, -3.0, -1.1, 1.1, 3.0, 1e4]))
    assert jnp.all((far > -1) & (far < 1))
    assert jnp.isfinite(soft.inv(far)).all()


@pytest.mark.parametrize("ends", [(1e-6, 1e6), (0.0, 1.0), (-1e6, 0.0), (1e-3, 1e4)])
def test_soft_interval_keeps_the_digits_of_what_is_near_an_end(ends):
    """Log-uniform priors, and Beta laws of small shapes, have much of their mass there.

    At 1e-6 to 1e6 all values below 0.24 came out as 0.24.
    """
    soft = SoftClip(*ends, 0.01)
    middle = abs(sum(ends)) / 2
    size = jnp.geomspace(max(2 * min(map(abs, ends)), 1e-12 * middle), middle, 50)
    x = jnp.sign(sum(ends)) * size
    np.testing.assert_allclose(soft(soft.inv(x)), x, rtol=1e-5)


def test_soft_interval_of_wide_edges_is_the_logistic_map():
    """With tau much wider than the interval, x = l + (u - l) sigmoid(z / tau)."""
    soft = SoftClip(0.0, 1.0, 100.0)
    z = jnp.linspace(-300.0, 300.0, 7)
    np.testing.assert_allclose(soft(z), jax.nn.sigmoid(z / 100), atol=5e-3)


def test_soft_interval_is_refused_without_an_edge():
    with pytest.raises(ValueError, match=r"`softness` must be positive"):
        SoftClip(0.0, 1.0, 0.0)


def test_support_with_an_edge_is_compared_and_saved():
    soft = Support.of(constraints.interval(0.0, 2.0), (3,), softness=0.01)
    assert soft != Support.of(constraints.interval(0.0, 2.0), (3,))
    assert from_config(to_config(soft)) == soft
    z = soft.unconstrain(jnp.array([0.5, 1.0, 1.5]))
    np.testing.assert_allclose(z, [0.5, 1.0, 1.5], atol=1e-6)
    assert soft.log_abs_det_jacobian(z, soft.constrain(z)).shape == ()


def test_an_edge_means_nothing_to_other_supports():
    assert Support.of(constraints.positive, (), softness=0.01).softness is None
