"""Checks of a score: Fisher divergence, Stein identities, calibration, asymmetry."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from numpyro_score import VE, VP, ScoreModel
from numpyro_score.data.standardize import Affine
from numpyro_score.diagnostics import (
    asymmetry,
    denoising_calibration,
    denoising_loss,
    fisher_divergence,
    fisher_lower_bound,
    kernel_stein_discrepancy,
    memorization,
    stein_identities,
)
from numpyro_score.diagnostics.noised_data import mean_and_error, ratio_and_error
from numpyro_score.diagnostics.stein_identities import _outer
from tests.targets import GAUSSIAN, MIXTURE, unchecked

KEY = jax.random.key(0)
SDE = VE()


@dataclass(frozen=True)
class Bent:
    """The exact score of the mixture, scaled, shifted and turned."""

    scale: float = 1.0
    shift: float = 0.0
    turn: float = 0.0
    sde: Any = SDE

    def __call__(self, x, t):
        s = MIXTURE.score(x, *self.sde.marginal(t))
        matrix = jnp.array([[self.scale, -self.turn], [self.turn, self.scale]])
        return matrix @ s + self.shift / self.sde.sigma(t)


def model(sde=SDE, **bent):
    return ScoreModel.from_fn(Bent(sde=sde, **bent), sde, (2,))


@pytest.fixture(scope="module")
def data():
    return MIXTURE.sample(KEY, (2000,))


@pytest.fixture(scope="module")
def ts():
    return SDE.time(jnp.array([5.0, 0.5, 0.05]))


def exact(x, t):
    return MIXTURE.score(x, *SDE.marginal(t))


def test_fisher_divergence_is_that_of_a_known_error(data, ts):
    found = fisher_divergence(KEY, model(scale=1.2), exact, data, ts)
    np.testing.assert_allclose(found.value, 0.04, rtol=1e-3)
    np.testing.assert_allclose(found.levels, [5.0, 0.5, 0.05], rtol=1e-4)


@pytest.mark.slow
def test_fisher_divergence_is_zero_for_the_truth_in_other_units():
    """A standardized model and its physical score: units are handled."""
    shift, scale = jnp.array([3.0, -2.0]), jnp.array([10.0, 0.1])

    def physical(x, t):
        return exact((x - shift) / scale, t) / scale

    inner = MIXTURE.score_model(SDE)
    there = ScoreModel(inner.denoiser, Affine(shift, scale), SDE, (2,))
    data = shift + scale * MIXTURE.sample(KEY, (200,))
    found = fisher_divergence(KEY, there, physical, data, SDE.time(jnp.array([1.0])))
    assert found.value[0] < 1e-8


@pytest.mark.slow
def test_lower_bound_finds_scale_and_shift_and_nothing_in_the_truth(data, ts):
    right = fisher_lower_bound(KEY, model(), data, ts)
    assert np.all(np.abs(right.value) < 4 * right.standard_error + 1e-6)
    scaled = fisher_lower_bound(KEY, model(scale=1.25), data, ts)
    # over the score's own square: (1 - 1/1.25)^2
    assert np.all(np.abs(scaled.value - 0.04) < 4 * scaled.standard_error + 1e-3)
    assert np.all(scaled.value[:2] > 4 * scaled.standard_error[:2])


@pytest.mark.slow
def test_lower_bound_is_below_the_divergence():
    data = MIXTURE.sample(KEY, (20_000,))
    for bent in ({"shift": 0.3}, {"turn": 0.3}, {"scale": 0.8, "shift": -0.1}):
        score = model(**bent)
        bound = fisher_lower_bound(KEY, score, data)
        truth = fisher_divergence(KEY, score, exact, data)
        own = fisher_divergence(
            KEY, ScoreModel.from_fn(exact, SDE, (2,)), score.score, data
        )
        slack = 4 * (bound.standard_error + own.standard_error)
        assert np.all(bound.value < own.value + slack)
        assert np.all(truth.value > 0)


@pytest.mark.slow
def test_excess_loss_is_the_fisher_divergence(data, ts):
    """Vincent 2011: in units of the noise, per number."""
    wrong = model(scale=1.2)
    found = denoising_loss(KEY, wrong, data, ts, reference=model())
    excess = fisher_divergence(KEY, wrong, exact, data, ts).value
    for j, t in enumerate(ts):
        sigma = SDE.sigma(t)
        x = data + sigma * jax.random.normal(jax.random.key(5), data.shape)
        s = jax.vmap(lambda x: exact(x, t))(x)  # noqa: B023
        norm = sigma**2 * jnp.square(s).mean()
        gap = abs(found.value[j] - excess[j] * norm)
        assert gap < 4 * found.standard_error[j] + 1e-6


@pytest.mark.slow
def test_denoising_loss_of_a_gaussian_is_known():
    """The noise is known up to its posterior variance v / (v + sigma^2)."""
    score = GAUSSIAN.score_model(VP())
    data = GAUSSIAN.sample(KEY, (4000,))
    ts = VP().time(jnp.array([2.0, 0.3]))
    found = denoising_loss(KEY, score, data, ts)
    for j, level in enumerate((2.0, 0.3)):
        v = np.square(GAUSSIAN.sd)
        expected = np.mean(v / (v + level**2))
        assert abs(found.value[j] - expected) < 4 * found.standard_error[j]


@pytest.mark.slow
def test_identities_hold_for_the_truth_and_find_mutants(data, ts):
    right = stein_identities(KEY, model(), data, ts)
    assert right.p_value.min() > 1e-3
    assert right.product.shape == right.product_error.shape == (3, 2, 2)
    scaled = stein_identities(KEY, model(scale=1.2), data, ts)
    assert scaled.p_value.max() < 1e-3
    np.testing.assert_allclose(
        scaled.product, -0.2 * np.eye(2)[None].repeat(3, 0), atol=0.1
    )
    shifted = stein_identities(KEY, model(shift=0.2), data, ts)
    assert shifted.p_value.max() < 1e-3


def test_errors_of_products_are_those_of_pairs():
    """Against the products of every row, one by one."""
    a, b = jax.random.normal(KEY, (2, 40, 3))
    mean, error = _outer(a, b)
    pairs = (a[:, :, None] * b[:, None]).reshape(2, 20, 3, 3).mean(0)
    np.testing.assert_allclose(mean, pairs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(error, pairs.std(0) / np.sqrt(20), rtol=1e-4)


def test_errors_are_those_of_pairs_of_opposite_noise():
    rows = jnp.array([1.0, 2.0, 3.0, 5.0, 3.0, 4.0, 1.0, 1.0])  # of means 2, 3, 2, 3
    mean, error = mean_and_error(rows)
    assert float(mean) == pytest.approx(2.5)
    assert float(error) == pytest.approx((1 / 3) ** 0.5 / 2)
    ratio, error = ratio_and_error(3 * rows, rows)  # known, however rows vary
    assert float(ratio) == pytest.approx(3.0)
    assert float(error) == pytest.approx(0.0, abs=1e-6)
    ratio, error = ratio_and_error(rows, jnp.full(8, 2.0))
    assert float(ratio) == pytest.approx(1.25)
    assert float(error) == pytest.approx((1 / 3) ** 0.5 / 4)


def test_identities_have_two_sided_p_values_of_all_entries():
    wide = ScoreModel.from_fn(
        lambda x, t: -0.8 * x / (1 + SDE.sigma(t) ** 2), SDE, (2,)
    )
    rows, level = jax.random.normal(KEY, (60, 2)), SDE.time(jnp.array([0.5]))
    found = stein_identities(KEY, wide, rows, level)
    means = found.mean / found.mean_error
    products = found.product / found.product_error
    largest = max(float(jnp.abs(means).max()), float(jnp.abs(products).max()))
    expected = min(1.0, 6 * float(stats.norm.sf(largest) + stats.norm.cdf(-largest)))
    assert 1e-6 < expected < 1  # or nothing is compared
    assert float(found.p_value[0]) == pytest.approx(expected, rel=1e-3)


def test_asymmetry_of_a_linear_field_is_exact():
    """Of -x + R x / 2 with the quarter turn R: 1/4 of 1 + 1/4, for any direction."""
    turn = jnp.array([[0.0, -0.5], [0.5, 0.0]])
    score = ScoreModel.from_fn(lambda x, t: -x + turn @ x, SDE, (2,))
    found = asymmetry(KEY, score, np.eye(4, 2), SDE.time(jnp.array([0.5])))
    assert float(found.value[0]) == pytest.approx(0.2, rel=1e-4)
    assert float(found.standard_error[0]) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.slow
def test_asymmetry_is_the_share_of_rotation(data, ts):
    gradient = asymmetry(KEY, model(), data[:100], ts)
    assert gradient.value.max() < 1e-8
    # J = (1 + turn R) H with R the quarter turn: checked against the exact Jacobian
    turned = asymmetry(KEY, model(turn=0.5), data[:100], ts, num_probes=50)
    x = data[:100] + SDE.sigma(ts[0]) * jax.random.normal(KEY, (100, 2))
    jacobian = jax.vmap(lambda x: jax.jacobian(model(turn=0.5).score)(x, ts[0]))(x)
    skew = jnp.square(jacobian - jacobian.mT).sum() / 4
    share = skew / jnp.square(jacobian).sum()
    assert turned.value[0] == pytest.approx(float(share), abs=0.02)


@pytest.mark.slow
def test_contexts_go_with_their_rows():
    """A score of Normal(context, 1): right with its contexts, wrong with others."""

    @jax.tree_util.register_dataclass
    @dataclass(frozen=True)
    class Denoiser:
        def __call__(self, x, level, context=None):
            return (x + level**2 * context) / (1 + level**2)

    score = ScoreModel(Denoiser(), Affine.identity((1,)), SDE, (1,))
    contexts = 2 * jax.random.normal(KEY, (2000, 1))
    data = contexts + jax.random.normal(jax.random.key(1), (2000, 1))
    ts = SDE.time(jnp.array([1.0]))
    right, wrong = (
        denoising_loss(KEY, score, data, ts, context=c).value[0]
        for c in (contexts, contexts[::-1])
    )
    assert right == pytest.approx(0.5, abs=0.05)
    assert wrong > 2 * right
    bound = fisher_lower_bound(KEY, score, data, ts, context=contexts)
    assert abs(bound.value[0]) < 4 * bound.standard_error[0] + 1e-6


# --- kernel Stein discrepancy -----------------------------------------------------


@pytest.mark.slow
def test_stein_discrepancy_matches_derivatives_of_the_kernel():
    x = jax.random.normal(KEY, (12, 2))
    x = (x - x.mean(0)) / x.std(0)
    s = -x + 0.3

    def kernel(a, b):
        return (1 + jnp.square(a - b).sum()) ** -0.5

    def stein(a, b, s_a, s_b):
        left, right = jax.grad(kernel, (0, 1))(a, b)
        mixed = jnp.trace(jax.jacobian(jax.grad(kernel), 1)(a, b))
        return s_a @ s_b * kernel(a, b) + s_a @ right + s_b @ left + mixed

    over = jax.vmap(jax.vmap(stein, (None, 0, None, 0)), (0, None, 0, None))
    values = over(x, x, s, s)
    off = values.sum() - jnp.trace(values)
    found = kernel_stein_discrepancy(KEY, x, s, num_bootstrap=10)
    assert found.statistic == pytest.approx(float(off) / (12 * 11), rel=1e-4)
    assert found.discrepancy == pytest.approx(float(jnp.sqrt(values.mean())), rel=1e-4)


def test_stein_statistic_leaves_out_the_pairs_of_a_draw_with_itself():
    """At x = x' the kernel is 1 and Stein's |s|^2 + d; without these it has no bias."""
    x = np.random.default_rng(0).normal(size=(12, 2))
    x = (x - x.mean(0)) / x.std(0)
    s = -x + 0.3
    found = kernel_stein_discrepancy(KEY, x, s, num_bootstrap=10)
    itself = (np.square(s).sum(1) + 2).sum()
    statistic = (found.discrepancy**2 * 12**2 - itself) / (12 * 11)
    assert found.statistic == pytest.approx(statistic, rel=1e-3)


@pytest.fixture(scope="module")
def draws():
    return MIXTURE.sample(jax.random.key(3), (400,))


def scores_at(x):
    return jax.vmap(MIXTURE.score)(x)


WRONG = {"shift": (1.0, 0.25), "narrow": (0.8, 0.0), "wide": (1.25, 0.0)}


@pytest.mark.parametrize("name", WRONG)
def test_stein_discrepancy_finds_wrong_draws(name, draws):
    scale, shift = WRONG[name]
    wrong = scale * draws + shift
    found = kernel_stein_discrepancy(KEY, wrong, scores_at(wrong))
    assert found.p_value == pytest.approx(1 / 1001)


@pytest.mark.slow
def test_stein_discrepancy_passes_draws_in_any_units(draws):
    here = kernel_stein_discrepancy(KEY, draws, scores_at(draws))
    assert here.p_value > 0.01
    unit = jnp.array([100.0, 0.01])
    there = kernel_stein_discrepancy(KEY, unit * draws + 7, scores_at(draws) / unit)
    assert there.statistic == pytest.approx(here.statistic, rel=0.02, abs=1e-4)


@pytest.mark.slow
def test_stein_test_is_as_wrong_as_it_says():
    """A hundred samples of the law: small p-values are as rare as they should be."""
    p_values = []
    for key in jax.random.split(KEY, 100):
        key_draws, key_test = jax.random.split(key)
        x = MIXTURE.sample(key_draws, (400,))
        p_values.append(kernel_stein_discrepancy(key_test, x, scores_at(x)).p_value)
    assert np.mean(np.array(p_values) < 0.1) < 0.1 + 4 * np.sqrt(0.09 / 100)


@pytest.mark.slow
def test_stein_test_does_not_see_the_shares_of_distant_modes():
    """What its page says it cannot do; the same shares close by are seen."""

    def test_shares(gap):
        def log_density(x):
            ends = jnp.array([-gap, gap])
            return jax.nn.logsumexp(-0.5 * jnp.square(x[0] - ends))

        side = jnp.where(jax.random.uniform(KEY, (1000, 1)) < 0.8, gap, -gap)
        x = side + jax.random.normal(jax.random.key(1), (1000, 1))
        scores = jax.vmap(jax.grad(log_density))(x)
        return kernel_stein_discrepancy(KEY, x, scores).p_value

    assert test_shares(10.0) > 0.01
    assert test_shares(1.5) < 0.01


# --- memorization -----------------------------------------------------------------


def test_copies_are_found_and_new_draws_are_not():
    training, held_out, fresh = MIXTURE.sample(KEY, (3, 300))
    clean = memorization(fresh, training, held_out)
    assert clean.p_value > 0.01
    assert clean.distance_ratio == pytest.approx(1.0, abs=0.25)
    assert clean.copied == pytest.approx(clean.held_out_copied, abs=0.12)
    noise = 0.003 * jax.random.normal(KEY, training.shape)
    copied = memorization(training + noise, training, held_out)
    assert copied.p_value < 1e-6
    assert copied.copied > 0.9
    assert copied.distance_ratio < 0.3


def test_distances_are_those_of_the_nearest_rows():
    training = np.array([[0.0], [2.0], [6.0]])
    found = memorization(np.array([[1.5]]), training, np.array([[3.0]]))
    scale = training.std()
    np.testing.assert_allclose(found.distances, 0.5 / scale, rtol=1e-5)
    np.testing.assert_allclose(found.held_out_distances, 1 / scale, rtol=1e-5)
    assert found.copied == 0.0  # 0.5 is not below a third of 1.5
    assert memorization(np.array([[1.6]]), training, np.array([[3.0]])).copied == 1.0


# --- bad input --------------------------------------------------------------------

BAD_DATA = {
    "one point of the score per row": np.zeros((9, 3)),
    "at least 4 rows": np.zeros((3, 2)),
    "`data` must be finite": np.full((9, 2), np.inf),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_bad_data_are_named(message):
    with unchecked(), pytest.raises(ValueError, match=message):
        stein_identities(KEY, model(), BAD_DATA[message])


def test_bad_options_are_named(data):
    with unchecked():
        check_bad_options(data[:10])


def check_bad_options(few):
    with pytest.raises(ValueError, match="`context` must have one for each row"):
        denoising_loss(KEY, model(), few, context=jnp.zeros(3))
    with pytest.raises(ValueError, match="`ts` must lie between"):
        denoising_loss(KEY, model(), few, jnp.array([-0.5]))
    with pytest.raises(
        ValueError, match="`num_probes` must be an integer of at least 1"
    ):
        asymmetry(KEY, model(), few, num_probes=0)
    with pytest.raises(ValueError, match="`num_bootstrap` must be an integer"):
        kernel_stein_discrepancy(KEY, few, few, num_bootstrap=0)
    with pytest.raises(ValueError, match=r"`scores` must have the shape of `draws`"):
        kernel_stein_discrepancy(KEY, few, few[:9])
    with pytest.raises(ValueError, match="at least 10 rows"):
        kernel_stein_discrepancy(KEY, few[:9], few[:9])
    with pytest.raises(ValueError, match="`scores` must be finite"):
        kernel_stein_discrepancy(KEY, few, few * jnp.nan)
    with pytest.raises(ValueError, match="`draws` must vary"):
        kernel_stein_discrepancy(KEY, jnp.ones((10, 2)), few)
    with pytest.raises(ValueError, match="must have one event shape"):
        memorization(few, few[:, :1], few)
    with pytest.raises(ValueError, match="`training` must have at least 2 rows"):
        memorization(few, few[:1], few)
    with pytest.raises(ValueError, match="`validation` must be finite"):
        memorization(few, few, few * jnp.nan)


@pytest.mark.parametrize("sde", [SDE, VP()])
def test_exact_scores_state_their_denoising_error(data, sde):
    ts = sde.time(jnp.array([5.0, 0.5, 0.05]))
    found = denoising_calibration(KEY, model(sde), data, ts)
    np.testing.assert_allclose(found.levels, [5.0, 0.5, 0.05], rtol=1e-4)
    assert (jnp.abs(found.ratio - 1) < 4 * found.ratio_error).all()
    assert (found.ratio_error < 0.05).all()


def test_the_score_of_few_rows_is_sure_of_too_much(data, ts):
    """The law of 50 rows and noise fits these rows, and no others."""
    rows = data[:50]

    def score(x, t):
        sigma = SDE.sigma(t)
        weights = jax.nn.softmax(-jnp.sum((x - rows) ** 2, 1) / (2 * sigma**2))
        return (weights @ rows - x) / sigma**2

    memorized = ScoreModel.from_fn(score, SDE, (2,))
    seen, ts = jnp.tile(rows, (40, 1)), ts[1:]
    found = [denoising_calibration(KEY, memorized, x, ts) for x in (seen, data)]
    assert (jnp.abs(found[0].ratio - 1) < 4 * found[0].ratio_error).all()
    assert (found[1].ratio - 1 > 3 * found[1].ratio_error).all()
    assert found[1].ratio[1] > 5


def test_calibration_of_denoising_is_that_of_any_units(data):
    """Noise is added in standardized units; the derivative is taken in these."""
    shift, scale = jnp.array([3.0, -2.0]), jnp.array([10.0, 0.1])
    inner = MIXTURE.score_model(SDE)
    there = ScoreModel(inner.denoiser, Affine(shift, scale), SDE, (2,))
    ts = SDE.time(jnp.array([0.5]))
    found = denoising_calibration(KEY, there, shift + scale * data, ts)
    same = denoising_calibration(KEY, inner, data, ts)
    np.testing.assert_allclose(found.ratio, same.ratio, rtol=1e-3)
