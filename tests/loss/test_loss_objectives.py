"""Every objective is minimal at the true score; mutants of them are not.

Along D = D* + a h, with the true denoiser D* of a mixture, every objective is quadratic
in a. Its derivative at a = 0 must be zero up to its standard error over many batches.
"""

from dataclasses import dataclass
from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints

from numpyro_score import MLP, VE, VP, RectifiedFlow, ScoreMatching, SubVP, loss
from numpyro_score.data.rows import Batch
from numpyro_score.loss.flow_matching import optimal_pairing
from numpyro_score.loss.noise_levels import LogNormal, LogUniform
from numpyro_score.score.preconditioning import (
    EDM,
    BoundedScore,
    DataPrediction,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
    VPrediction,
)
from numpyro_score.train.fit import FitOptions
from numpyro_score.train.objective import standardize_batch

ROWS, BATCHES = 256, 100
CENTERS = jnp.array([[-1.0, 0.5], [1.0, -0.3], [0.2, 1.0]])
SD = 0.4


def draw(key):
    key_which, key_noise = jax.random.split(key)
    which = jax.random.randint(key_which, (ROWS,), 0, len(CENTERS))
    return CENTERS[which] + SD * jax.random.normal(key_noise, (ROWS, 2))


def log_density(x, level):
    square = jnp.square(x - CENTERS).sum(-1)
    variance = SD**2 + level**2
    return jax.nn.logsumexp(-0.5 * square / variance)


score_at = jax.grad(log_density)


def denoise(a, x, levels, *, noisy=True):
    """The true denoiser, moved by ``a`` in a direction that is wrong everywhere."""
    seen = levels if noisy else jnp.zeros_like(levels)
    r2 = jnp.square(levels)[:, None]
    wrong = jnp.tanh(x + 0.3) * r2 / (1 + r2) * jnp.array([1.0, -0.5])
    return x + r2 * jax.vmap(score_at)(x, seen) + a * wrong


def derivatives(objective, sde, *, noisy=True, with_score=False):
    """First and second derivative in ``a`` at zero, one row per batch."""

    def one(key):
        key_data, key_loss = jax.random.split(key)
        x0 = draw(key_data)
        extra = {}
        if with_score:
            extra["data_score"] = jax.vmap(partial(score_at, level=0.0))(x0)

        def along(a):
            return objective(
                key_loss, partial(denoise, a, noisy=noisy), x0, sde, **extra
            )

        return jnp.stack(
            [jax.grad(along)(0.0), along(1.0) + along(-1.0) - 2 * along(0.0)]
        )

    keys = jax.random.split(jax.random.key(5), BATCHES)
    return np.asarray(jax.jit(partial(jax.lax.map, one, batch_size=10))(keys))


def z_score(values):
    return values.mean() / (values.std() / np.sqrt(len(values)))


VE_SDE = VE(sigma_min=0.3, sigma_max=10.0)
DSM = loss.DenoisingScoreMatching
OBJECTIVES = {
    "one level": (DSM(loss.SingleLevel(0.5)), VE_SDE),
    "ncsn": (DSM(loss.GeometricLevels(5), loss.SigmaSquaredWeight()), VE_SDE),
    "vp": (DSM(loss.UniformTime(VP()), loss.SigmaSquaredWeight()), VP(sigma_min=0.3)),
    "likelihood": (
        DSM(loss.UniformTime(SubVP()), loss.LikelihoodWeight()),
        SubVP(sigma_min=0.3),
    ),
    "flow": (loss.FlowMatching(), RectifiedFlow(sigma_min=0.3)),
    "implicit": (loss.ImplicitScoreMatching(LogUniform()), VE_SDE),
    "sliced": (loss.SlicedScoreMatching(LogUniform(), num_projections=3), VE_SDE),
    "sliced, gaussian": (
        loss.SlicedScoreMatching(LogUniform(), loss.Gaussian(), variance_reduced=False),
        VE_SDE,
    ),
    "sliced, sphere": (
        loss.SlicedScoreMatching(LogUniform(), loss.Sphere(), variance_reduced=False),
        VE_SDE,
    ),
    "difference": (loss.FiniteDifferenceScoreMatching(LogUniform(), 0.03), VE_SDE),
    "known score": (DSM(target=loss.TargetScore()), VE_SDE),
}
WITHOUT_NOISE = {
    "implicit": loss.ImplicitScoreMatching(),
    "sliced": loss.SlicedScoreMatching(),
    "difference": loss.FiniteDifferenceScoreMatching(step=0.03),
}


SLOW = {
    "one level",
    "sliced, sphere",
    "flow",
    "vp",
    "ncsn",
    "sliced, gaussian",
    "difference",
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in OBJECTIVES],
)
def test_objective_is_minimal_at_the_true_score(name):
    objective, sde = OBJECTIVES[name]
    slope, curvature = derivatives(objective, sde, with_score=name == "known score").T
    assert abs(z_score(slope)) < 4
    assert z_score(curvature) > 10
    assert abs(slope.mean()) < 0.1 * curvature.mean(), "a strong enough test"


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_NOISE)
def test_objective_without_noise_is_minimal_at_the_score_of_the_data(name):
    slope, curvature = derivatives(WITHOUT_NOISE[name], VE_SDE, noisy=False).T
    assert abs(z_score(slope)) < 4
    assert z_score(curvature) > 10


@pytest.mark.slow
def test_stable_targets_are_nearly_unbiased_and_vary_less():
    """At levels where rows are dense; the bias falls with the rows of a batch."""
    law = loss.SingleLevel(0.3)
    plain, _ = derivatives(DSM(law), VE_SDE).T
    stable, curvature = derivatives(DSM(law, target=loss.StableTargetField()), VE_SDE).T
    assert abs(stable.mean()) < 0.05 * curvature.mean()
    assert stable.var() < 0.5 * plain.var()


def test_known_scores_lower_the_variance_at_low_noise():
    """Measured at r = 0.1 sd of a component: the closed-form share is optimal there."""
    law, sde = loss.SingleLevel(0.04), VE(0.04, 10.0)
    plain, _ = derivatives(DSM(law), sde).T
    known, _ = derivatives(DSM(law, target=loss.TargetScore()), sde, with_score=True).T
    assert known.var() < 0.2 * plain.var()


@dataclass(frozen=True)
class SphereWithoutFactor(loss.Sphere):
    """The common mistake: unit directions, and no factor d."""

    def scale(self, size):
        return 1.0


@dataclass(frozen=True)
class GradientOfDot(loss.ImplicitScoreMatching):
    """The common mistake: the gradient of s.x in the place of the trace."""

    def __call__(self, key, denoise, x0, sde):
        levels = jnp.full(len(x0), 0.5)
        x = x0 + 0.5 * jax.random.normal(key, x0.shape)

        def score(x):
            return (denoise(x, levels) - x) / 0.25

        wrong = jax.grad(lambda x: (score(x) * jax.lax.stop_gradient(x)).sum())(x)
        return jnp.mean(wrong.sum(1) + 0.5 * jnp.square(score(x)).sum(1))


MUTANTS = {
    "no factor d": loss.SlicedScoreMatching(LogUniform(), SphereWithoutFactor()),
    "gradient of a product": GradientOfDot(),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    slope, _ = derivatives(MUTANTS[name], VE_SDE).T
    assert abs(z_score(slope)) > 8


@pytest.mark.slow
@pytest.mark.slow
def test_exact_trace_is_the_mean_of_its_projections():
    """One batch, many projections: sliced tends to implicit."""
    x0, key = draw(jax.random.key(0)), jax.random.key(1)
    d = partial(denoise, 0.5)
    exact = loss.ImplicitScoreMatching(loss.SingleLevel(0.5))(key, d, x0, VE_SDE)
    key_noise = jax.random.split(key)[0]
    same_noise = loss.ImplicitScoreMatching(loss.SingleLevel(0.5))(
        key_noise, d, x0, VE_SDE
    )
    for projection in (loss.Rademacher(), loss.Gaussian(), loss.Sphere()):
        sliced = loss.SlicedScoreMatching(loss.SingleLevel(0.5), projection, 400)
        np.testing.assert_allclose(sliced(key, d, x0, VE_SDE), same_noise, atol=0.01)
    assert exact != same_noise


@pytest.mark.parametrize(
    "objective",
    [
        loss.ImplicitScoreMatching(),
        loss.SlicedScoreMatching(),
        loss.SlicedScoreMatching(None, loss.Sphere(), variance_reduced=False),
        loss.SlicedScoreMatching(None, loss.Gaussian(), variance_reduced=False),
        loss.FiniteDifferenceScoreMatching(),
    ],
    ids=lambda o: type(o).__name__,
)
def test_objective_without_noise_has_its_value_at_one_point(objective):
    """s = -a x: the trace is -2 a, and |s|^2 is 5 a^2 at every row."""
    x0 = jnp.tile(jnp.array([1.0, 2.0]), (4000, 1))

    def best(x, level):
        return x / (1 + level[:, None] ** 2)

    value, a = objective(jax.random.key(0), best, x0, VE(0.1, 10.0)), 1 / 1.01
    # 4 standard errors of 4000 Gaussian slices, the widest ones
    assert float(value) == pytest.approx((-2 * a + 2.5 * a**2) / 2, abs=0.12)


def test_stable_targets_are_means_weighted_by_the_density_of_the_noise():
    x0, noise, level = jnp.array([[0.0], [1.0]]), jnp.array([[1.0], [-2.0]]), 0.5
    got = loss.StableTargetField()(x0, noise, jnp.full(2, level), None)
    x = np.array([0.5, 0.0])  # of both rows
    one, zero = np.exp(-0.5 * ((x - 1) / level) ** 2), np.exp(-0.5 * (x / level) ** 2)
    np.testing.assert_allclose(got[:, 0], one / (one + zero), rtol=1e-5)


def test_flow_matching_is_the_error_of_the_velocity_at_times_spread_over_the_path():
    seen = []

    def denoise(x, levels):
        seen.append(levels)
        return jnp.zeros_like(x)

    x0 = jnp.full((50, 1), 3.0)
    sde = RectifiedFlow()
    value = loss.FlowMatching()(jax.random.key(0), denoise, x0, sde)
    (levels,) = seen
    t = np.asarray(levels / (1 + levels), float)
    shares = (np.sort(t) - sde.t_min) / (sde.t_max - sde.t_min)
    assert (np.floor(50 * shares) == np.arange(50)).all()
    # u = (x_t - D) / t is n where D = 0, so that u - (n - x0) = x0
    np.testing.assert_allclose(value, np.mean(np.square(3.0 / t)), rtol=1e-4)


def test_pairing_is_optimal():
    a, b = (jax.random.normal(jax.random.key(i), (5, 2)) for i in range(2))
    orders = map(jnp.array, permutations(range(5)))
    best = min(float(jnp.square(a - b[order]).sum()) for order in orders)
    np.testing.assert_allclose(
        jnp.square(a - optimal_pairing(a, b)).sum(), best, rtol=1e-5
    )
    assert sorted(optimal_pairing(a, b)[:, 0].tolist()) == sorted(b[:, 0].tolist())


PARAMETRIZATIONS = [
    BoundedScore(),
    EDM(),
    VPrediction(),
    NoisePrediction(),
    ScorePrediction(),
    DataPrediction(),
    VelocityPrediction(),
]


@pytest.mark.parametrize(
    "parametrization", PARAMETRIZATIONS, ids=lambda p: type(p).__name__
)
def test_what_the_net_must_return_is_what_the_name_says(parametrization):
    """Invert D = x_0 exactly: the net's output is noise, velocity, ... of this x_t."""
    x0, noise, r = jnp.array(0.7), jnp.array(-1.2), jnp.array(0.8)
    x = x0 + r * noise
    c = parametrization(r)
    output = (x0 - c.skip * x) / c.out
    alpha, sigma = 1 / jnp.sqrt(1 + r**2), r / jnp.sqrt(1 + r**2)
    want = {
        "NoisePrediction": noise,
        "ScorePrediction": -noise / r,
        "DataPrediction": x0,
        "VelocityPrediction": noise - x0,
        "VPrediction": alpha * noise - sigma * x0,
        "EDM": -(alpha * noise - sigma * x0),
        "BoundedScore": -(alpha * noise - sigma * x0) * jnp.sqrt(r**2 + 0.01) / r,
    }[type(parametrization).__name__]
    np.testing.assert_allclose(output, want, rtol=1e-5)
    np.testing.assert_allclose(c.input, alpha, rtol=1e-6)


DATA = np.asarray(draw(jax.random.key(9)))
NET = MLP(2, width=8, depth=1)


def run(trainer, **kwargs):
    return trainer.run(
        jax.random.key(0), 3, DATA, batch_size=16, progress_bar=False, **kwargs
    )


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(loss.SlicedScoreMatching(), marks=pytest.mark.slow),
        loss.FlowMatching(paired=True),
        pytest.param(loss.ImplicitScoreMatching(LogNormal()), marks=pytest.mark.slow),
        pytest.param(loss.FiniteDifferenceScoreMatching(), marks=pytest.mark.slow),
        pytest.param(loss.FlowMatching(), marks=pytest.mark.slow),
    ],
    ids=lambda o: type(o).__name__,
)
def test_trainer_takes_any_objective(objective):
    result = run(ScoreMatching(NET, RectifiedFlow(), objective))
    assert jnp.isfinite(result.losses).all()
    x = jnp.ones(2)
    assert jnp.isfinite(result.score.velocity(x, 0.5)).all()
    if getattr(objective, "paired", False):
        with pytest.raises(ValueError, match=r"`score` is not known to a model"):
            result.score.score(x)


def test_known_scores_pass_through_standardization():
    """The trainer turns scores of the data into scores of standardized data."""
    z = 0.5 + 2.0 * jax.random.normal(jax.random.key(0), (64, 1))
    trainer = ScoreMatching(
        MLP(1, width=8, depth=1),
        loss=DSM(target=loss.TargetScore()),
        support=constraints.positive,
    )
    x = jnp.exp(z)
    state = trainer.init(jax.random.key(1), x)
    log_normal = lambda x: (-0.5 * ((jnp.log(x) - 0.5) / 2) ** 2 - jnp.log(x)).sum()  # noqa: E731
    g = jax.vmap(jax.grad(log_normal))(x)
    u, score = standardize_batch(state.fixed, Batch(x, None, g))
    want = -state.fixed.standardize.scale * (z - 0.5) / 4
    np.testing.assert_allclose(score, want, atol=1e-4)
    np.testing.assert_allclose(state.fixed.standardize.inverse(u), z, atol=1e-5)


def test_weight_of_a_known_score_is_that_of_the_other_rows():
    """Unbiased: by |g|^2 = 4 of the other row, 1/5 of g and 4/5 of the noise."""
    zero, one = jnp.zeros((2, 1)), jnp.ones((2, 1))
    score = jnp.array([[1.0], [2.0]])
    targets = loss.TargetScore()(zero, one, jnp.ones(2), score)
    # y = a r (n + r g) with a = 1 / (1 + r^2 I), I = 4 and 1
    np.testing.assert_allclose(targets, [[2 / 5], [3 / 2]], rtol=1e-6)
    targets = loss.TargetScore()(zero, one, jnp.full(2, 0.5), score)
    np.testing.assert_allclose(targets, [[0.75 / 2], [1 / 1.25]], rtol=1e-6)


def test_known_score_is_needed():
    with pytest.raises(ValueError, match=r"`data_score` must be given"):
        run(ScoreMatching(NET, loss=DSM(target=loss.TargetScore())))


@pytest.mark.parametrize(
    "objective", [DSM(target=loss.StableTargetField()), loss.FlowMatching(paired=True)]
)
def test_pooled_rows_and_contexts_exclude_each_other(objective):
    net = MLP(2, width=8, depth=1, context_size=2)
    with pytest.raises(ValueError, match=r"`loss` uses the whole batch"):
        run(ScoreMatching(net, loss=objective), context=DATA)


def test_options_are_checked():
    with pytest.raises(
        ValueError, match=r"`num_projections` must be an integer of at least 1"
    ):
        loss.SlicedScoreMatching(num_projections=0)
    with pytest.raises(ValueError, match=r"`step` must be positive"):
        loss.FiniteDifferenceScoreMatching(step=0.0)
    with pytest.raises(ValueError, match=r"`level` must be positive"):
        loss.SingleLevel(-1.0)
    with pytest.raises(ValueError, match=r"`num_levels` must be .* at least 2"):
        loss.GeometricLevels(1)


def test_drawn_numbers_are_no_targets_given_all_that_is_known():
    """Of two numbers the second was drawn: its error counts if the first is noisy."""
    objective = loss.DenoisingScoreMatching(noise=loss.PerCoordinate())
    x0 = jnp.zeros((512, 2))
    known = jnp.ones_like(x0, bool).at[:, 1].set(False)
    seen = []

    def off(x, levels):
        seen.append(levels)
        return x0.at[:, 1].set(1.0)  # wrong in what was drawn alone

    key = jax.random.key(0)
    whole = objective(key, off, x0, VE())
    given = objective(key, off, x0, VE(), known=known)
    levels = seen[0]
    weight = (1 + levels[:, 1] ** 2) / levels[:, 1] ** 2
    noisy = jnp.where(levels[:, 1] > 0, weight, 0.0) / levels.size
    assert (levels[:, 0] == 0).any()
    np.testing.assert_allclose(whole, noisy.sum(), rtol=1e-5)
    np.testing.assert_allclose(given, noisy[levels[:, 0] > 0].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("known", "objective", "error", "message"),
    [
        (np.ones((8, 2)), loss.PerCoordinate(), TypeError, "must hold truth values"),
        (np.ones((8, 3), bool), loss.PerCoordinate(), ValueError, "shape of the data"),
        (np.ones((8, 2), bool), None, ValueError, "`known` needs one noise level per"),
    ],
)
def test_numbers_that_are_not_known_need_a_level_each(known, objective, error, message):
    trainer = ScoreMatching(
        MLP(2, width=8, depth=1), loss=loss.DenoisingScoreMatching(noise=objective)
    )
    x = np.random.default_rng(0).normal(size=(8, 2))
    with pytest.raises(error, match=message):
        trainer.fit(jax.random.key(0), Batch(x, known=known), FitOptions(2))
