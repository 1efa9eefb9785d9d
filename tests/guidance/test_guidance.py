"""A conditioned score is again a score: guidance against laws known in closed form."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

from numpyro_score import MLP, VE, VP, ScoreMatching, ScoreModel
from numpyro_score.data.support import Support
from numpyro_score.diagnostics import sliced_wasserstein
from numpyro_score.guidance import (
    classifier_free_guidance,
    classifier_guidance,
    discriminator_guidance,
    inpaint,
    train_discriminator,
)
from numpyro_score.guidance.discriminator import DiscriminatorResult
from numpyro_score.guidance.inpainting import _Repaint
from numpyro_score.solver import DPMSolverPP, solve
from tests.targets import MIXTURE, Gaussian, assert_law, unchecked, z_scores

KEY = jax.random.key(0)
NUM_DRAWS = 2000
COMPONENTS = tuple(
    Gaussian(loc, (scale, scale))
    for loc, scale in zip(MIXTURE.locs, MIXTURE.scales, strict=True)
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Labelled:
    """The exact denoiser of one component of the mixture, chosen by the context."""

    def __call__(self, x, level, context=None):
        if context is None:
            return MIXTURE.denoised(x, 1.0, level)
        both = jnp.stack([c.denoised(x, 1.0, level) for c in COMPONENTS])
        return both[jnp.asarray(context, int)]


@pytest.fixture(scope="module", params=[VE(), VP()], ids=["VE", "VP"])
def score(request):
    return MIXTURE.score_model(request.param)


def labelled():
    exact = MIXTURE.score_model(VE())
    return ScoreModel(Labelled(), exact.standardize, exact.sde, exact.event_shape)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weights_0_and_1_are_exact(weight):
    guided = classifier_free_guidance(labelled(), weight)
    draws = guided.sample(KEY, (NUM_DRAWS,), context=jnp.array(0.0))
    law = MIXTURE if weight == 0 else COMPONENTS[0]
    assert_law(draws, law, sigma=0.01, slack=0.03)


@pytest.mark.slow
def test_large_weights_overshoot_the_component():
    guided = classifier_free_guidance(labelled(), 3.0)
    draws = guided.sample(KEY, (NUM_DRAWS,), context=jnp.array(0.0))
    assert float(draws[:, 0].mean()) < MIXTURE.locs[0][0]  # away from the other one


def test_two_scores_must_fit_together():
    with pytest.raises(ValueError, match="`unconditional` must share the process"):
        classifier_free_guidance(
            labelled(), 1.0, unconditional=MIXTURE.score_model(VP())
        )


@dataclass(frozen=True)
class ExactClassifier:
    """log p(component | x_t) of the mixture."""

    sde: object
    component: int

    def __call__(self, x, t):
        joint = MIXTURE._log_joint(x, *self.sde.marginal(t))
        return jax.nn.log_softmax(joint)[self.component]


@pytest.mark.parametrize("component", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exact_classifier_gives_the_conditional_law(score, component):
    guided = classifier_guidance(score, ExactClassifier(score.sde, component))
    draws = guided.sample(KEY, (NUM_DRAWS,))
    assert_law(draws, COMPONENTS[component], sigma=0.01, slack=0.03)


@dataclass(frozen=True)
class CleanClassifier:
    """A mutant: the classifier of clean data at every noise level."""

    sde: object

    def __call__(self, x, t):
        return jax.nn.log_softmax(MIXTURE._log_joint(x, 1.0, 0.0))[0]


@pytest.mark.slow
def test_a_classifier_must_see_the_noise():
    score = MIXTURE.score_model(VE())
    guided = classifier_guidance(score, CleanClassifier(VE()))
    draws = solve(KEY, guided, (NUM_DRAWS,), solver=DPMSolverPP()).draws
    finite = bool(jnp.isfinite(draws).all())
    assert not finite or (z_scores(draws, COMPONENTS[0].mean) > 5).any()


@pytest.mark.slow
def test_guidance_works_in_physical_units():
    exact = Gaussian((3.0,), (2.0,))
    score = exact.score_model(VE(0.01, 100.0))
    # p(y | x_t) for y = x_0 + n: y given x_t is Gaussian too
    y, noise = 5.0, 1.0

    def log_likelihood(x, t):
        sigma = score.sde.sigma(t)
        variance = 1 / (1 / 2.0**2 + 1 / sigma**2) + noise**2
        mean = exact.denoised(x, 1.0, sigma)[0]
        return -0.5 * jnp.square(y - mean) / variance

    draws = classifier_guidance(score, log_likelihood).sample(KEY, (NUM_DRAWS,))
    precision = 1 / 4 + 1 / noise**2
    posterior = Gaussian(((3.0 / 4 + y) / precision,), (precision**-0.5,))
    assert_law(draws, posterior, slack=0.03)


# Inpainting


def conditional_weights(x1):
    joint = [
        w * np.exp(-0.5 * ((x1 - loc[0]) / s) ** 2) / s
        for w, loc, s in zip(MIXTURE.weights, MIXTURE.locs, MIXTURE.scales, strict=True)
    ]
    return np.array(joint) / sum(joint)


@pytest.fixture(scope="module")
def inpainted():
    score = MIXTURE.score_model(VE())
    known, mask = jnp.array([-0.45, 0.0]), jnp.array([True, False])

    def draw(num_resamples):
        return np.asarray(
            inpaint(KEY, score, known, mask, (NUM_DRAWS,), num_resamples=num_resamples)
        )

    return draw(1), draw(20)


def test_inpainting_keeps_what_is_known(inpainted):
    for draws in inpainted:
        assert (draws[:, 0] == np.float32(-0.45)).all()


def test_resampling_brings_inpainting_near_the_conditional_law(inpainted):
    weights = conditional_weights(-0.45)
    mean = weights @ np.array([loc[1] for loc in MIXTURE.locs])
    plain, resampled = (abs(draws[:, 1].mean() - mean) for draws in inpainted)
    assert resampled < 0.1
    assert resampled < plain


def test_inpainting_says_what_it_needs():
    score = MIXTURE.score_model(VE())
    with pytest.raises(ValueError, match="`known` and `mask` must have the score's"):
        inpaint(KEY, score, jnp.zeros(3), jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="`num_resamples` must be an integer"):
        inpaint(KEY, score, jnp.zeros(2), jnp.zeros(2, bool), num_resamples=0)


# Discriminator


@pytest.mark.slow
def test_discriminator_repairs_a_wrong_score():
    truth, wrong = Gaussian((0.5, 0.0), (1.0, 1.0)), Gaussian((0.0, 0.0), (1.0, 1.0))
    score = wrong.score_model(VE())
    data = truth.sample(jax.random.key(1), (5000,))
    result = train_discriminator(KEY, score, data, 600)
    assert float(result.advantage) > 4 * float(result.standard_error)
    guided = discriminator_guidance(score, result)
    before = score.sample(KEY, (NUM_DRAWS,)).mean(0)
    after = guided.sample(KEY, (NUM_DRAWS,)).mean(0)
    error = jnp.abs(jnp.stack([before, after]) - jnp.array([0.5, 0.0])).max(1)
    assert float(error[0]) > 0.4
    assert float(error[1]) < 0.2


def test_a_right_score_is_left_alone():
    law = Gaussian((0.0, 0.0), (1.0, 1.0))
    data = law.sample(jax.random.key(1), (2000,))
    result = train_discriminator(KEY, law.score_model(VE()), data, 100)
    score = law.score_model(VE())
    assert discriminator_guidance(score, result) is score


@pytest.mark.slow
@pytest.mark.long
def test_discriminator_repairs_an_under_trained_score():
    data = MIXTURE.sample(jax.random.key(1), (20_000,))
    trainer = ScoreMatching(MLP(2, width=32, depth=1))
    score = trainer.run(KEY, 150, data, progress_bar=False).score
    result = train_discriminator(jax.random.key(2), score, data, 3000)
    guided = discriminator_guidance(score, result)
    fresh = MIXTURE.sample(jax.random.key(3), (10_000,))

    def error(model):
        draws = model.sample(jax.random.key(4), (10_000,), solver=DPMSolverPP())
        return float(sliced_wasserstein(KEY, draws, fresh))

    before, after = error(score), error(guided)
    assert after < 0.8 * before


# data with a support


def normal_pair():
    """Return a standard normal score, and the same for its exponential."""
    score = ScoreModel.from_fn(lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), (2,))
    return score, replace(score, support=Support.of(constraints.positive, (2,)))


def test_discriminator_learns_in_unconstrained_space():
    normal, positive = normal_pair()
    data = 0.5 * jax.random.normal(KEY, (200, 2))
    net = MLP(2, width=8, depth=1)
    options = {"net": net, "batch_size": 32}
    first = train_discriminator(KEY, normal, data, 20, **options)
    second = train_discriminator(KEY, positive, jnp.exp(data), 20, **options)
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-4)


def test_inpainting_takes_and_returns_data():
    normal, positive = normal_pair()
    known, mask = jnp.array([0.7, -5.0]), jnp.array([True, False])
    z = inpaint(KEY, normal, jnp.array([jnp.log(0.7), 0.0]), mask, (4,))
    x = inpaint(KEY, positive, known, mask, (4,))
    np.testing.assert_allclose(x, jnp.exp(z), rtol=1e-4)
    with pytest.raises(ValueError, match="`known` must lie inside the support"):
        inpaint(KEY, positive, -known, mask)
    shares = replace(normal, support=Support.of(constraints.simplex, (3,)))
    with pytest.raises(TypeError, match="must have a support of single numbers"):
        inpaint(KEY, shares, known, mask)


@pytest.mark.parametrize("weight", [jnp.nan, jnp.inf, "1"])
def test_weight_of_a_discriminator_is_a_number(weight):
    normal, _ = normal_pair()
    result = DiscriminatorResult(None, 1.0, 0.1, None)
    with unchecked(), pytest.raises(ValueError, match="`weight` must be a finite"):
        discriminator_guidance(normal, result, weight=weight)


def test_no_advantage_leaves_the_score():
    normal, _ = normal_pair()
    result = DiscriminatorResult(None, jnp.nan, jnp.nan, None)
    with unchecked():
        assert discriminator_guidance(normal, result) is normal


@pytest.mark.parametrize(("advantage", "is_found"), [(1.9, False), (2.1, True)])
def test_an_advantage_is_two_standard_errors_at_least(advantage, is_found):
    result = DiscriminatorResult(None, jnp.array(advantage), jnp.array(1.0), None)
    assert result.is_significant == is_found


def test_resampling_climbs_to_the_level_before():
    """Steps of a normal law are linear, so that its variance is known after each."""
    level, lower = jnp.array(2.0), jnp.array(1.0)
    solver = _Repaint(jnp.zeros(1), jnp.zeros(1, bool), num_resamples=3)

    def draw(key):
        key_start, key_step = jax.random.split(key)
        x = jnp.sqrt(1 + level**2) * jax.random.normal(key_start, (1,))
        return solver.step(key_step, x, level, lower, lambda x, r: x / (1 + r**2), ())[
            0
        ]

    x = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000))
    kept = lower**2 / level**2
    share = kept + (1 - kept) / (1 + level**2)  # of x in the mean of the step
    variance = 1 + level**2 - (level**2 - lower**2)
    for _ in range(3):
        climbed = variance + level**2 - lower**2
        variance = share**2 * climbed + lower**2 * (1 - kept)
    assert float(x.var()) == pytest.approx(float(variance), rel=5 * (2 / 4000) ** 0.5)


def test_few_rows_teach_no_discriminator():
    normal, _ = normal_pair()
    with pytest.raises(ValueError, match="a fifth is held out"):
        train_discriminator(KEY, normal, jnp.ones((4, 2)), 20)
    with pytest.raises(ValueError, match="`data`"):
        train_discriminator(KEY, normal, jnp.ones((40, 3)), 20)
