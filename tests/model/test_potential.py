"""A model with learned sites has the potential of the model with the true laws.

Each model is written once and takes its law as an argument: the learned law gives what
is tested, the true distribution the full potential, and a flat one the known part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer.reparam import TransformReparam
from numpyro.infer.util import initialize_model

from numpyro_score import MLP, VE, ScoreDistribution, ScoreMatching, ScoreModel
from numpyro_score.model.potential import ModelPotential, model_potential
from numpyro_score.nn import Energy

SDE = VE(sigma_min=0.1)
LOC, SCALE = 0.5, 1.5
Law = Callable[[tuple[int, ...]], dist.Distribution]


def learned_normal(event_shape: tuple[int, ...] = ()) -> ScoreDistribution:
    """Know Normal(LOC, SCALE) by its score alone, at the lowest noise level."""

    def score_fn(x, t):
        noise = SDE.sigma(t) ** 2 - SDE.sigma(SDE.t_min) ** 2
        return -(x - LOC) / (SCALE**2 + noise)

    return ScoreDistribution(ScoreModel.from_fn(score_fn, SDE, event_shape))


def true_normal(event_shape: tuple[int, ...] = ()) -> dist.Distribution:
    normal = dist.Normal(LOC, SCALE)
    return normal.expand(event_shape).to_event(len(event_shape))


def flat(event_shape: tuple[int, ...] = ()) -> dist.Distribution:
    return true_normal(event_shape).mask(False)


# models


def beside_ordinary_sites(law: Law) -> None:
    x = numpyro.sample("x", law((3,)))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(x.sum(), s), obs=1.0)


def subsampled(law: Law) -> None:
    with numpyro.plate("rows", 10, subsample_size=4):
        x = numpyro.sample("x", law(()))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=2.0)


def in_a_plate_with_chosen_rows(law: Law) -> None:
    handlers.substitute(subsampled, data={"rows": jnp.array([1, 3, 5, 7])})(law)


def in_nested_plates(law: Law) -> None:
    with numpyro.plate("columns", 2), numpyro.plate("rows", 3):
        x = numpyro.sample("x", law((2,)))
        numpyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=2.0)


def masked(law: Law) -> None:
    mask = jnp.array([True, False, True])
    x = numpyro.sample("x", law(()).expand([3]).mask(mask))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.ones(3))


def under_handlers_of_mask_and_scale(law: Law) -> None:
    with handlers.mask(mask=jnp.array([True, False])), handlers.scale(scale=0.3):
        x = numpyro.sample("x", law(()).expand([2]))
    numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=1.0)


def hidden_by_a_mask_of_false(law: Law) -> None:
    a = numpyro.sample("a", law((2,)))
    with numpyro.plate("rows", 2), handlers.mask(mask=False):
        b = numpyro.sample("b", law(()))
    numpyro.sample("y", dist.Normal(a.sum() * b, 1.0).to_event(1), obs=jnp.ones(2))


def expanded_to_event(law: Law) -> None:
    x = numpyro.sample("x", law((2,)).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(jnp.sum(x**2), 1.0), obs=1.0)


def transformed(law: Law) -> None:
    positive = dist.TransformedDistribution(law(()), dist.transforms.ExpTransform())
    x = numpyro.sample("x", positive)
    numpyro.sample("y", dist.Poisson(x), obs=3)


def transformed_by_another_site(law: Law) -> None:
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    affine = dist.transforms.AffineTransform(loc, scale)
    x = numpyro.sample("x", dist.TransformedDistribution(law((2,)), affine))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.ones(2))


def reparameterized(law: Law) -> None:
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    affine = dist.transforms.AffineTransform(loc, 2.0)
    with handlers.reparam(config={"x": TransformReparam()}):
        x = numpyro.sample("x", dist.TransformedDistribution(law(()), affine))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=1.0)


def two_learned_sites(law: Law) -> None:
    a = numpyro.sample("a", law((2,)))
    with handlers.scale(scale=2.0):
        b = numpyro.sample("b", law(()))
    numpyro.sample("y", dist.Normal(a.sum() * b, 1.0), obs=1.0)


def beside_constrained_supports(law: Law) -> None:
    x = numpyro.sample("x", law(()))
    numpyro.sample("simplex", dist.Dirichlet(jnp.ones(3)))
    ordered = dist.TransformedDistribution(
        dist.Normal(0, 1).expand([3]).to_event(1),
        dist.transforms.OrderedTransform(),
    )
    numpyro.sample("ordered", ordered)
    numpyro.sample("cholesky", dist.LKJCholesky(3, 2.0))
    upper = numpyro.sample("upper", dist.Uniform(1.0, 2.0))
    numpyro.sample("interval", dist.Uniform(0.0, upper))
    numpyro.sample("y", dist.Normal(x, upper), obs=1.0)


def with_factor_and_parameter(law: Law) -> None:
    x = numpyro.sample("x", law(()))
    p = numpyro.param("p", 3.0, constraint=constraints.positive)
    numpyro.deterministic("twice", 2 * x)
    numpyro.factor("factor", -p * x**4)


def beside_an_enumerated_site(law: Law) -> None:
    x = numpyro.sample("x", law((2,)))
    with numpyro.plate("rows", 3):
        k = numpyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        y = jnp.array([0.0, 1.0, 2.0])
        numpyro.sample("y", dist.Normal(jnp.where(k, x[0], x[1]), 1.0), obs=y)


MODELS = [
    beside_ordinary_sites,
    in_a_plate_with_chosen_rows,
    in_nested_plates,
    masked,
    under_handlers_of_mask_and_scale,
    hidden_by_a_mask_of_false,
    expanded_to_event,
    transformed,
    transformed_by_another_site,
    reparameterized,
    two_learned_sites,
    beside_constrained_supports,
    with_factor_and_parameter,
    beside_an_enumerated_site,
]


class Case(NamedTuple):
    potential: ModelPotential
    full: Callable[[Any], Any]
    known: Callable[[Any], Any]
    points: tuple[Any, Any]


def numpyro_potential(model: Callable, law: Law) -> Callable:
    return initialize_model(
        jax.random.key(1), model, model_args=(law,), validate_grad=False
    ).potential_fn


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: model.__name__)
def case(request) -> Case:
    model = request.param
    potential = model_potential(model, (learned_normal,), {})
    keys = jax.random.split(jax.random.key(0), 2)
    leaves, structure = jax.tree.flatten(potential.prototype)
    points = tuple(
        structure.unflatten([jax.random.normal(key, x.shape) for x in leaves])
        for key in keys
    )
    full, known = (numpyro_potential(model, law) for law in (true_normal, flat))
    return Case(potential, full, known, points)


def assert_close(got: Any, expected: Any) -> None:
    """Compare up to the rounding of a score that passes through its denoiser."""
    close = jax.tree.map(
        lambda a, b: bool(jnp.allclose(a, b, rtol=1e-4, atol=1e-3)), got, expected
    )
    assert all(jax.tree.leaves(close)), (got, expected)


def test_potential_of_a_model_with_learned_sites(case):
    """Gradient, known value and learned change, in one program to compile it once."""
    potential, full, known = case.potential, case.full, case.known

    @jax.jit
    def compare(first, second):
        start, end = potential.evaluate(first), potential.evaluate(second)
        change = full(second) - known(second) - full(first) + known(first)
        between = potential.learned_difference_with_error
        there, _ = between(start.learned, end.learned)
        back, _ = between(end.learned, start.learned)
        got = (start.grad, start.value, there, back)
        return got, (jax.grad(full)(first), known(first), change, -change)

    got, expected = compare(*case.points)
    assert_close(got, expected)
    assert abs(expected[2]) > 1e-2


def test_forgotten_prior_is_caught():
    """The comparison above is sharp enough to see a gradient without the prior."""
    known = numpyro_potential(beside_ordinary_sites, flat)
    full = numpyro_potential(beside_ordinary_sites, true_normal)
    z = {"x": jnp.array([0.1, -0.4, 2.0]), "s": jnp.array(0.3)}
    with pytest.raises(AssertionError):
        assert_close(jax.grad(known)(z), jax.grad(full)(z))


def test_weights_are_those_of_plates_and_masks():
    potential = model_potential(in_a_plate_with_chosen_rows, (learned_normal,), {})
    learned = potential.evaluate(potential.prototype).learned["x"]
    assert learned.weight.tolist() == pytest.approx([2.5] * 4)
    potential = model_potential(masked, (learned_normal,), {})
    learned = potential.evaluate(potential.prototype).learned["x"]
    assert learned.weight.tolist() == [1.0, 0.0, 1.0]


# the line integral


def logistic() -> ScoreDistribution:
    def score_fn(x, t):
        return -jnp.tanh(x / 2)

    return ScoreDistribution(ScoreModel.from_fn(score_fn, SDE, (2,)))


def swirl() -> ScoreDistribution:
    """A field that is no gradient."""

    def score_fn(x, t):
        return -x + 0.5 * jnp.stack([-x[1], x[0] ** 3])

    return ScoreDistribution(ScoreModel.from_fn(score_fn, SDE, (2,)))


def change_of(law: dist.Distribution, num_nodes: int, start: Any, end: Any) -> float:
    def model():
        numpyro.sample("x", law)

    potential = model_potential(model, (), {}, num_nodes=num_nodes)
    ends = (potential.evaluate({"x": jnp.array(x)}).learned for x in (start, end))
    return float(potential.learned_difference_with_error(*ends)[0])


def test_line_integral_of_a_gradient_converges_with_its_nodes():
    start, end = [-1.0, 0.3], [2.5, -0.5]
    law = dist.Logistic(0, 1)
    true = float(
        law.log_prob(jnp.array(start)).sum() - law.log_prob(jnp.array(end)).sum()
    )
    errors = [
        abs(change_of(logistic(), num_nodes, start, end) - true)
        for num_nodes in (2, 3, 4, 5)
    ]
    assert errors[0] > 0.1
    assert errors[1] < 0.05
    assert errors[2] < 0.005
    assert errors[3] < 5e-4


def test_error_of_the_line_integral_is_symmetric_and_large_enough():
    """A refusal by the estimated error is as likely on the way back."""

    def model():
        numpyro.sample("x", logistic())

    potential = model_potential(model, (), {}, num_nodes=3)
    ends = [{"x": jnp.array(x)} for x in ([-1.0, 0.3], [2.5, -0.5])]
    start, end = (potential.evaluate(z).learned for z in ends)
    change, error = potential.learned_difference_with_error(start, end)
    assert float(
        potential.learned_difference_with_error(end, start)[1]
    ) == pytest.approx(float(error))
    laws = [dist.Logistic(0, 1).log_prob(z["x"]).sum() for z in ends]
    assert abs(float(change - (laws[0] - laws[1]))) < float(error)


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 5])
def test_line_integral_of_any_field_is_antisymmetric(num_nodes):
    """Detailed balance needs this, whether or not the field is a gradient."""
    start, end = [-1.0, 0.3], [1.5, 2.0]
    there = change_of(swirl(), num_nodes, start, end)
    back = change_of(swirl(), num_nodes, end, start)
    assert there == pytest.approx(-back, abs=1e-4)
    assert abs(there) > 0.1


# what is not a learned latent site


def test_observed_learned_site_has_its_real_density():
    def model(law):
        loc = numpyro.sample("loc", dist.Normal(0, 1))
        affine = dist.transforms.AffineTransform(loc, 1.0)
        shifted = dist.TransformedDistribution(law(()), affine)
        numpyro.sample("y", shifted, obs=jnp.array(2.0))

    def standard_normal(event_shape):
        sde = VE()
        score = ScoreModel.from_fn(
            lambda x, t: -x / (1 + sde.sigma(t) ** 2), sde, event_shape
        )
        return ScoreDistribution(score)

    potential = model_potential(model, (standard_normal,), {})
    assert potential.learned == {}
    z = {"loc": jnp.array(0.7)}
    evaluation = potential.evaluate(z)
    full = numpyro_potential(model, lambda event_shape: dist.Normal(0, 1))
    assert evaluation.learned == {}
    assert float(evaluation.value) == pytest.approx(float(full(z)), abs=2e-3)
    assert_close(evaluation.grad, jax.grad(full)(z))


def test_model_without_learned_sites_is_the_model_of_numpyro():
    potential = model_potential(beside_ordinary_sites, (true_normal,), {})
    full = numpyro_potential(beside_ordinary_sites, true_normal)
    value, grad, learned = potential.evaluate(potential.prototype)
    expected = jax.value_and_grad(full)(potential.prototype)
    assert_close((value, grad), expected)
    assert learned == {}
    assert float(potential.learned_difference_with_error({}, {})[0]) == 0.0


# refusals


def test_random_rows_are_refused_as_by_hmc():
    with pytest.raises(
        ValueError, match=r"do not support subsampling.*'rows'.*4 of 10"
    ):
        model_potential(subsampled, (learned_normal,), {})


def test_mixture_of_learned_components_is_refused():
    def model():
        weights = dist.Categorical(jnp.array([0.5, 0.5]))
        components = learned_normal().expand([2])
        numpyro.sample("two", dist.MixtureSameFamily(weights, components))

    with pytest.raises(TypeError, match="Site 'two' holds a ScoreDistribution inside"):
        model_potential(model, (), {})


def test_general_mixture_of_learned_components_is_refused():
    def model():
        weights = dist.Categorical(jnp.array([0.5, 0.5]))
        components = [learned_normal(), learned_normal()]
        numpyro.sample("two", dist.MixtureGeneral(weights, components))

    with pytest.raises(TypeError, match=r"Site 'two' holds .* one site per component"):
        model_potential(model, (), {})


def test_delta_is_refused():
    def model():
        numpyro.sample("fixed", dist.Delta(1.0))

    with pytest.raises(ValueError, match="Site 'fixed' has a Delta distribution"):
        model_potential(model, (), {})


def test_force_beside_learned_sites_is_refused():
    potential = model_potential(beside_ordinary_sites, (learned_normal,), {})
    with pytest.raises(ValueError, match=r"`score_fn` replaces .* \['x'\]"):
        potential.with_force(lambda z: z)


def test_energy_net_gives_the_change_without_quadrature():
    """The value of an energy net, and the integral of its score, are one change."""
    data = jax.random.normal(jax.random.key(0), (64, 2))
    trainer = ScoreMatching(Energy(MLP(2, width=8, depth=1)))
    result = trainer.run(jax.random.key(1), 20, data, batch_size=64, progress_bar=False)
    score = result.score
    law = ScoreDistribution(score, t=score.sde.time(0.5))

    def model():
        with numpyro.plate("rows", 2), handlers.scale(scale=3.0):
            numpyro.sample("x", law)

    start, end = jax.random.normal(jax.random.key(2), (2, 2, 2))
    potential = model_potential(model, (), {}, num_nodes=2)
    points = [potential.evaluate({"x": x}).learned for x in (start, end)]
    change, error = potential.learned_difference_with_error(*points)
    exact = 3.0 * (score.energy(end, law.t) - score.energy(start, law.t)).sum()
    assert float(change) == pytest.approx(float(exact), rel=1e-4)
    assert float(error) == 0.0

    def along(u):
        return (score.score(start + u * (end - start), law.t) * (end - start)).sum()

    nodes = jnp.linspace(0, 1, 201)
    integral = jnp.trapezoid(jax.vmap(along)(nodes), nodes)
    assert float(change) == pytest.approx(-3.0 * float(integral), rel=1e-2)
