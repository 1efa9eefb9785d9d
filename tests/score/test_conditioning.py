"""Conditional laws from one noise level per coordinate, against exact conditionals."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import MCMC
from scipy.stats import multivariate_normal

from numpyro_score import (
    MLP,
    VE,
    VP,
    ScoreDistribution,
    ScoreMatching,
    ScoreModel,
    UNet,
    io,
)
from numpyro_score.data.standardize import Affine
from numpyro_score.data.support import Support
from numpyro_score.kernel import ScoreLangevin
from numpyro_score.loss import DenoisingScoreMatching, PerCoordinate, TargetScore
from numpyro_score.loss.noise_levels import LogNormal
from numpyro_score.nn import EmbedContext, Energy, SetEmbedding, SetTransformer
from numpyro_score.score.preconditioning import DataPrediction
from tests.targets import unchecked

MEAN = np.array([1.0, -2.0, 0.5])
COV = np.array([[4.0, 1.5, -0.6], [1.5, 1.0, 0.2], [-0.6, 0.2, 2.0]])
SCALE = np.sqrt(np.diag(COV))
UNIT = jnp.asarray(COV / np.outer(SCALE, SCALE), float)  # correlations
CENTERS = jnp.array([[-1.0, -0.8, 0.5], [0.9, 1.0, 0.3]])
WIDTH = 0.3
NAN = np.nan
traces = []


def denoise_normal(x, levels):
    traces.append(levels)
    return UNIT @ jnp.linalg.solve(UNIT + jnp.diag(levels**2), x)


def denoise_mixture(x, levels):
    """Denoise two balls of equal weight at CENTERS, of sd WIDTH."""
    variance = WIDTH**2 + levels**2
    logits = -0.5 * (jnp.square(x - CENTERS) / variance).sum(-1)
    means = CENTERS + WIDTH**2 / variance * (x - CENTERS)
    return jax.nn.softmax(logits) @ means


def normal_score(sde=VE()):
    standardize = Affine(jnp.asarray(MEAN, float), jnp.asarray(SCALE, float))
    return ScoreModel.from_coordinate_denoiser(
        denoise_normal, (3,), sde, standardize=standardize
    )


def conditional(values, sd):
    """Return mean and covariance of the normal law given observations."""
    values, sd = np.asarray(values), np.broadcast_to(sd, 3)
    seen = ~np.isnan(values)
    cross, noise = COV[:, seen], np.diag(np.asarray(sd)[seen] ** 2)
    gain = cross @ np.linalg.inv(COV[np.ix_(seen, seen)] + noise)
    return MEAN + gain @ (values[seen] - MEAN[seen]), COV - gain @ cross.T


OBSERVED = [  # values, sd
    ([3.0, NAN, NAN], 0.0),
    ([NAN, -1.0, 2.5], [9.0, 0.0, 0.7]),
    ([2.0, -2.5, 0.0], [0.3, 0.01, 2.0]),
    ([NAN, NAN, NAN], 0.0),
    ([0.0, 1.0, 2.0], 0.0),
]
each_observed = pytest.mark.parametrize(("values", "sd"), OBSERVED)


@each_observed
@pytest.mark.parametrize("sde", [VE(), VP()])
def test_score_is_that_of_the_exact_conditional(values, sd, sde):
    given = normal_score(sde).condition(values, sd)
    mean, cov = conditional(values, sd)
    x = jnp.array([0.5, -1.0, 3.0])
    for t in (0.2, 0.6, 1.0):
        alpha, sigma = sde.marginal(t)
        loc = np.asarray(given.standardize.loc)
        noisy = alpha**2 * cov + np.diag((sigma * SCALE) ** 2)
        exact = np.linalg.solve(noisy, loc + alpha * (mean - loc) - x)
        np.testing.assert_allclose(given.score(x, t), exact, rtol=2e-3, atol=1e-3)


@each_observed
def test_draws_have_the_exact_moments(values, sd):
    given = normal_score().condition(values, sd)
    mean, cov = conditional(values, sd)
    draws = np.asarray(given.sample(jax.random.key(0), (4000,)))
    width = np.sqrt(np.diag(cov).clip(0))
    # sd of a mean of 4000 draws .016, of their sd .011; the solver's error is below
    assert (np.abs(draws.mean(0) - mean) <= 0.07 * width + 1e-5).all()
    np.testing.assert_allclose(draws.std(0), width, rtol=0.045, atol=1e-5)
    fixed = ~np.isnan(values) & (np.broadcast_to(sd, 3) == 0)
    np.testing.assert_allclose(draws[0][fixed], np.array(values)[fixed], rtol=1e-6)


def test_an_observation_far_from_the_mean_does_not_shift_the_others():
    given = normal_score().condition([17.0, NAN, NAN])  # 8 sd away
    mean, cov = conditional([17.0, NAN, NAN], 0.0)
    draws = np.asarray(given.sample(jax.random.key(0), (4000,)))
    shift = (draws.mean(0) - mean)[1:] / np.sqrt(np.diag(cov))[1:]
    assert (np.abs(shift) < 0.07).all()


@pytest.mark.parametrize("y", [-0.1, 0.0, 0.1])
def test_weights_of_modes_given_one_coordinate(y):
    score = ScoreModel.from_coordinate_denoiser(denoise_mixture, (3,))
    draws = score.condition([y, NAN, NAN]).sample(jax.random.key(1), (4000,))
    logits = -0.5 * np.square((y - np.asarray(CENTERS)[:, 0]) / WIDTH)
    weight = 1 / (1 + np.exp(logits[0] - logits[1]))
    assert abs(float((draws[:, 1] > 0.1).mean()) - weight) < 0.03  # 4 sd of a share
    upper = draws[draws[:, 1] > 0.1]
    assert abs(float(upper[:, 1].mean()) - 1.0) < 0.05
    assert abs(float(upper[:, 2].std()) - WIDTH) < 0.03


@pytest.mark.parametrize("sd", [1.0, [0.3, 0.05, 0.01]])  # the last below the noise
def test_density_is_exact_also_below_the_lowest_noise_level(sd):
    values = [2.0, -2.5, NAN]
    given = normal_score().condition(values, sd)
    mean, cov = conditional(values, sd)
    law = multivariate_normal(mean, cov)
    points = mean + np.array([[0.0, 0.0, 0.0], [1.0, 0.5, -1.0]]) * np.sqrt(
        np.diag(cov)
    )
    got = given.log_prob(jnp.asarray(points, float))
    np.testing.assert_allclose(got, law.logpdf(points), atol=0.02)


def test_density_of_noisy_observations_far_below_the_noise():
    values, sd = [2.0, -2.5, NAN], 0.004  # a fifth and four tenths of the noise
    mean, cov = conditional(values, sd)
    point = mean + 1.5 * np.sqrt(np.diag(cov)) * np.array([1.0, -1.0, 1.0])
    got = normal_score().condition(values, sd).log_prob(jnp.asarray(point, float))
    assert abs(float(got) - multivariate_normal(mean, cov).logpdf(point)) < 0.05


def test_fixed_values_have_a_density_with_noise_only():
    given = normal_score().condition([3.0, NAN, NAN])
    with pytest.raises(ValueError, match="`log_prob` of x_0 is not defined"):
        given.log_prob(jnp.zeros(3))
    t, x = 0.7, jnp.array([2.5, -1.0, 0.0])
    mean, cov = conditional([3.0, NAN, NAN], 0.0)
    noise = VE().sigma(t) * SCALE
    exact = multivariate_normal(mean, cov + np.diag(noise**2)).logpdf(np.asarray(x))
    assert abs(float(given.log_prob(x, t)) - exact) < 0.02


def test_nothing_observed_changes_nothing():
    score = normal_score()
    free = score.condition([NAN] * 3)
    x = jnp.array([0.5, -1.0, 3.0])
    np.testing.assert_allclose(free.score(x, 0.5), score.score(x, 0.5), rtol=1e-4)
    key = jax.random.key(3)
    np.testing.assert_allclose(free.sample(key), score.sample(key), atol=1e-3)
    assert abs(float(free.log_prob(x) - score.log_prob(x))) < 1e-2


def test_one_compilation_for_all_patterns():
    score = normal_score()
    score.condition([1.0, NAN, NAN]).sample(jax.random.key(0), (7,))
    before = len(traces)
    for values, sd in OBSERVED:
        score.condition(values, sd).sample(jax.random.key(1), (7,))
    assert len(traces) == before


def test_rows_of_different_patterns_under_vmap():
    rows = jnp.array([[3.0, NAN, NAN], [NAN, -1.0, 2.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    score = normal_score()

    @jax.jit
    @jax.vmap
    def draw(row, key):
        return score.condition(row).sample(key, (500,))

    draws = draw(rows, keys)
    for row, some in zip(rows, draws, strict=True):
        mean, cov = conditional(np.asarray(row), 0.0)
        error = np.abs(np.asarray(some.mean(0)) - mean)
        assert (error <= 0.2 * np.sqrt(np.diag(cov).clip(0)) + 1e-4).all()


def test_draws_with_noise_keep_it():
    """Draws of x_t at a higher time are not replaced by draws of x_0."""
    given = normal_score().condition([3.0, NAN, NAN])
    t = VE().time(0.5)
    draws = given.sample(jax.random.key(0), (2000,), ts=jnp.array([1.0, 0.9, 0.8, t]))
    assert abs(float(draws[:, 0].std()) / (0.5 * SCALE[0]) - 1) < 0.1


def test_distribution_draws_and_density_are_those_of_x_t():
    law = ScoreDistribution(normal_score().condition([3.0, NAN, NAN], 0.0))
    draws = law.sample(jax.random.key(0), (2000,))
    assert abs(float(draws[:, 0].std()) / (0.01 * SCALE[0]) - 1) < 0.07
    x = jnp.array([3.0, -1.0, 0.0])
    gradient = jax.grad(law.log_prob)(x)
    np.testing.assert_allclose(gradient, law.score.score(x), rtol=1e-5)


def test_conditional_law_as_prior():
    law = ScoreDistribution(normal_score().condition([3.0, NAN, NAN], 0.5))

    def model():
        x = numpyro.sample("x", law)
        numpyro.sample("y", dist.Normal(x[2], 0.5), obs=1.0)

    mcmc = MCMC(
        ScoreLangevin(model),
        num_warmup=300,
        num_samples=700,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0))
    draws = np.asarray(mcmc.get_samples()["x"])
    mean, cov = conditional([3.0, NAN, 1.0], 0.5)
    width = np.sqrt(np.diag(cov))
    assert (np.abs(draws.mean(0) - mean) < 0.15 * width).all()
    np.testing.assert_allclose(draws.std(0), width, rtol=0.15)


def test_positive_data_are_fixed_in_their_own_units():
    def denoise(x, levels):
        return UNIT @ jnp.linalg.solve(UNIT + jnp.diag(levels**2), x)

    score = ScoreModel.from_coordinate_denoiser(denoise, (3,))
    support = Support.of(constraints.positive, (3,))
    score = ScoreModel(
        score.denoiser, score.standardize, score.sde, (3,), support=support
    )
    draws = score.condition([7.0, NAN, NAN]).sample(jax.random.key(0), (2000,))
    np.testing.assert_allclose(draws[:, 0], 7.0, rtol=1e-5)
    mean = float(UNIT[0, 1]) * np.log(7.0)
    assert abs(float(jnp.log(draws[:, 1]).mean()) - mean) < 0.06
    with pytest.raises(ValueError, match="inside the support"):
        score.condition([-7.0, NAN, NAN])
    with pytest.raises(ValueError, match="inside the support"):
        score.condition([0.0, NAN, NAN])
    with pytest.raises(TypeError, match="`sd` must be 0 for data with a support"):
        score.condition([7.0, NAN, NAN], 0.1)


def test_a_simplex_cannot_be_conditioned():
    def denoise(x, levels):
        return x / (1 + levels**2)

    score = ScoreModel.from_coordinate_denoiser(denoise, (2,))
    support = Support.of(constraints.simplex, (3,))
    score = ScoreModel(
        score.denoiser, score.standardize, score.sde, (2,), support=support
    )
    with pytest.raises(TypeError, match="mixtures of several"):
        score.condition([0.2, NAN])


@pytest.mark.parametrize(
    ("values", "sd", "error", "message"),
    [
        ([1.0, NAN], 0.0, ValueError, "`values` must have the score's event shape"),
        ([1.0, NAN, NAN], [0.1, 0.1], ValueError, "one number or one per coordinate"),
        ([1.0, np.inf, NAN], 0.0, ValueError, "`values` must be finite"),
        ([1.0, NAN, NAN], -0.1, ValueError, "`sd` must be finite and at least 0"),
        ([1.0, NAN, NAN], np.inf, ValueError, "`sd` must be finite and at least 0"),
        ([1.0, NAN, NAN], NAN, ValueError, "`sd` must be finite and at least 0"),
        (["a", NAN, NAN], 0.0, TypeError, "`values` must be numbers"),
        ([1.0, NAN, NAN], ["a", 0, 0], TypeError, "`sd` must be numbers"),
    ],
)
def test_wrong_observations_are_refused(values, sd, error, message):
    with pytest.raises(error, match=message):
        normal_score().condition(values, sd)


def test_sd_counts_only_where_something_is_observed():
    values, sd = [1.0, NAN, NAN], [0.5, -1.0, np.inf]
    x = jnp.zeros(3)
    got = normal_score().condition(values, sd).score(x, 0.5)
    expected = normal_score().condition(values, 0.5).score(x, 0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def near_data(values, sd):
    """Condition a score that knows 1000 of the rows that it was learned from."""
    rows = np.random.default_rng(0).multivariate_normal(np.zeros(3), UNIT, 1000)
    score = replace(normal_score(), rows=jnp.asarray(rows, float))
    units = np.asarray(values) * SCALE
    return score.condition(MEAN + units, np.asarray(sd) * SCALE)


FAR = [  # values and sd, in sd of the data
    ([8.0, NAN, NAN], 0.0),
    ([NAN, -8.0, NAN], [0.0, 0.5, 0.0]),
    ([2.5, -2.5, NAN], 0.1),  # each alone is near
]
NEAR = [
    ([4.0, NAN, NAN], 0.0),
    ([2.0, 2.0, 0.0], 0.1),
    ([8.0, NAN, NAN], 5.0),
    ([NAN, NAN, NAN], 0.0),
]


@pytest.mark.parametrize(("values", "sd"), FAR)
def test_observations_far_from_all_data_warn(values, sd):
    with pytest.warns(UserWarning, match="far from all data.*farthest of 1000 rows"):
        near_data(values, sd)


@pytest.mark.parametrize("values", [[0.0, 0.0], [0.1, -0.2]])
def test_observations_in_a_hole_of_the_data_warn(values):
    angles = jnp.linspace(0.0, 6.28, 500)
    rows = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    score = ScoreModel.from_coordinate_denoiser(lambda x, r: x, (2,))
    score = replace(score, rows=rows)
    with pytest.warns(UserWarning, match="far from all data.*nearest of 500 rows"):
        score.condition(values)
    score.condition([0.0, NAN])
    score.condition([0.6, 0.8])


@pytest.mark.parametrize(("values", "sd"), NEAR)
def test_observations_near_data_do_not_warn(values, sd):
    near_data(values, sd)


def test_masked_values_are_not_observed():
    values = np.ma.masked_array([1.0, 5.0, 6.0], mask=[False, True, True])
    given = normal_score().condition(values)
    np.testing.assert_array_equal(np.isfinite(given.denoiser.sd), [True, False, False])


def test_other_scores_are_refused():
    score = ScoreModel.from_fn(lambda x, t: -x, VE(), (3,))
    with pytest.raises(TypeError, match="one noise level per coordinate"):
        score.condition([1.0, NAN, NAN])
    with pytest.raises(TypeError, match="conditioned already"):
        normal_score().condition([1.0, NAN, NAN]).condition([1.0, NAN, NAN])


def test_functions_that_fail_at_level_zero_are_refused():
    with pytest.raises(ValueError, match="`fn` must be finite"):
        ScoreModel.from_coordinate_denoiser(lambda x, r: x + r / r, (2,))
    with pytest.raises(ValueError, match="`fn` must return the shape"), unchecked():
        ScoreModel.from_coordinate_denoiser(lambda x, r: x[:1], (2,))


# training


def test_levels_are_those_of_conditional_laws():
    rows = jnp.full(4000, 2.0)
    draw = PerCoordinate().sample
    levels = np.asarray(draw(jax.random.key(0), rows, (4,), 0.01, 20.0))
    assert levels.max() == 2.0
    equal = (levels == 2.0).all(1).mean()
    exact = ((levels == 0) | (levels == 2.0)).all(1).mean()
    # blocks and masks with nothing observed: 1/5 of masks of 4 coordinates; blocks
    # outside of [0, 3]: 2/16 of pairs of ends, half of the time
    nothing = 0.25 * 0.5 * 2 / 16 + 0.5 / 5
    assert abs(equal - (0.25 + nothing)) < 0.03
    assert abs(exact - (0.25 + nothing + 0.5 * (0.75 - nothing))) < 0.03
    noisy = levels[(levels > 0) & (levels < 2.0)]
    sd = 1 / np.sqrt(1 / noisy**2 - 1 / 2.0**2)
    quantiles = np.quantile(np.log(sd), [0.1, 0.5, 0.9])
    expected = np.log(0.01) + np.array([0.1, 0.5, 0.9]) * np.log(2000)
    np.testing.assert_allclose(quantiles, expected, atol=0.4)


def test_blocks_are_intervals_and_rectangles():
    rows, draw = jnp.ones(300), PerCoordinate(equal=0, blocks=1, exact=1).sample
    line = np.asarray(draw(jax.random.key(0), rows, (6,), 0.01, 20.0)) == 0
    changes = np.abs(np.diff(line.astype(int), axis=1)).sum(1)
    assert changes.max() == 2
    assert line.any(1).mean() > 0.9
    images = np.asarray(draw(jax.random.key(1), rows, (5, 4, 2), 0.01, 20.0)) == 0
    assert (images[..., 0] == images[..., 1]).all()
    inside = np.where(images[:, :1, :1, :1].all((1, 2, 3))[:, None, None], 0, 1)
    image = images[..., 0] ^ (inside == 0)
    outer = image.any(2)[:, :, None] & image.any(1)[:, None, :]
    # a block that reaches the corner cannot be told from the outside of another
    is_rectangle = (image == outer).all((1, 2))
    complement = ~image
    outer = complement.any(2)[:, :, None] & complement.any(1)[:, None, :]
    assert (is_rectangle | (complement == outer).all((1, 2))).all()


def test_equal_levels_only_are_those_of_rows():
    rows = jnp.array([0.5, 3.0])
    levels = PerCoordinate(equal=1, blocks=0).sample(
        jax.random.key(0), rows, (2,), 0.01, 20.0
    )
    np.testing.assert_allclose(levels, [[0.5, 0.5], [3.0, 3.0]], rtol=1e-6)


@pytest.mark.parametrize(
    "shares", [(-0.1, 0, 0), (0.6, 0.6, 0), (0, 0, 2), ("a", 0, 0)]
)
def test_wrong_shares_are_refused(shares):
    with pytest.raises(ValueError, match="are shares of the rows"), unchecked():
        PerCoordinate(*shares)


def test_wrong_noise_is_refused():
    with pytest.raises(TypeError, match="`noise` must be PerCoordinate"), unchecked():
        DenoisingScoreMatching(noise=0.1)
    with pytest.raises(ValueError, match="`target` must be DataTarget"):
        DenoisingScoreMatching(noise=PerCoordinate(), target=TargetScore())


def derivative(wrong):
    """Return derivative at a = 0 of the loss of D + a wrong, and its error."""
    objective = DenoisingScoreMatching(LogNormal(0, 1), noise=PerCoordinate())
    root = jnp.linalg.cholesky(UNIT)

    @jax.jit
    @jax.vmap
    def one(key):
        key_data, key_loss = jax.random.split(key)
        x0 = jax.random.normal(key_data, (256, 3)) @ root.T

        def loss(a):
            def denoise(x, levels):
                return jax.vmap(lambda x, r: denoise_normal(x, r) + a * wrong(x, r))(
                    x, levels
                )

            return objective(key_loss, denoise, x0, VE())

        return jax.grad(loss)(0.0)

    each = np.asarray(one(jax.random.split(jax.random.key(0), 100)))
    return each.mean(), each.std() / 10


def test_objective_is_minimal_at_the_true_denoiser():
    slope, error = derivative(lambda x, r: jnp.tanh(x[::-1]) * r / (1 + r))
    assert abs(slope) < 3.5 * error
    assert error < 0.02


def test_objective_weighs_levels_of_the_coordinate_itself():
    """Exact values: the minimum over all levels of the denoiser that ignores others."""
    objective = DenoisingScoreMatching(
        LogNormal(0, 1e-3), noise=PerCoordinate(equal=0, blocks=0, exact=1)
    )
    x0 = jax.random.normal(jax.random.key(0), (20_000, 1))
    loss = objective(
        jax.random.key(1), lambda x, r: x / (1 + r**2), x0, VE()
    )  # 1 where noisy (half of the rows), 0 where known
    assert abs(float(loss) - 0.5) < 0.02


NETS = [
    MLP(6, width=8, depth=1),
    SetTransformer((6,), width=8, depth=1, num_heads=2),
    SetTransformer((3, 2), width=8, depth=1, num_heads=2),
    UNet((3, 2), channels=(4,), embedding_width=8),
    EmbedContext(MLP(6, width=8, depth=1, context_size=3), SetEmbedding(2, 3, 8)),
]


def fresh_score(net, **options):
    """Return a score with weights off their start, and a context or None."""
    data = jax.random.normal(jax.random.key(0), (8, *getattr(net, "event_shape", (6,))))
    context = None
    if isinstance(net, EmbedContext):
        context = jax.random.normal(jax.random.key(1), (8, 5, 2))
    objective = DenoisingScoreMatching(noise=PerCoordinate())
    trainer = ScoreMatching(net, loss=objective, **options)
    state = trainer.init(jax.random.key(2), data, context=context)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape, "f4"),
        state.ema_params,
    )
    score = trainer.get_score(state._replace(ema_params=moved))
    return score, None if context is None else context[0]


@pytest.mark.parametrize("net", NETS, ids=lambda net: type(net).__name__)
def test_nets_take_levels_and_known_coordinates_stay(net, tmp_path):
    score, context = fresh_score(net)
    first = (0,) * len(score.event_shape)
    x = jnp.arange(6.0).reshape(score.event_shape)
    levels = jnp.full(x.shape, 0.7)
    some = levels.at[first].set(0.0)
    denoise = jax.jit(lambda denoiser, levels: denoiser(x, levels, context))
    at_equal, at_some = denoise(score.denoiser, levels), denoise(score.denoiser, some)
    np.testing.assert_allclose(at_equal, denoise(score.denoiser, 0.7), rtol=1e-5)
    assert at_some[first] == x[first]
    assert (jnp.abs(at_some - at_equal) > 1e-6).sum() >= 5  # the others differ too
    io.save(score, tmp_path / "score")
    loaded = io.load(tmp_path / "score")
    np.testing.assert_array_equal(denoise(loaded.denoiser, some), at_some)


def test_trained_and_loaded_scores_are_conditioned(tmp_path):
    trainer = ScoreMatching(NETS[0], loss=DenoisingScoreMatching(noise=PerCoordinate()))
    data = jax.random.normal(jax.random.key(0), (64, 6))
    result = trainer.run(jax.random.key(2), 3, data, batch_size=8, progress_bar=False)
    assert np.isfinite(result.losses).all()
    io.save(result.score, tmp_path / "score")
    given = io.load(tmp_path / "score").condition([0.5, *[NAN] * 5])
    draw = given.sample(jax.random.key(0))
    np.testing.assert_allclose(draw[0], 0.5, rtol=1e-5)
    assert "1 of 6 coordinates, 1 of them exactly" in repr(given)
    assert result.score.rows is not None
    assert given.rows is None  # they are not draws of the conditional law
    with pytest.raises(TypeError, match="must not be conditioned"):
        io.save(given, tmp_path / "given")


def test_before_training_conditionals_are_those_of_the_normal_law(tmp_path):
    """With rows of exact covariance; the shrinkage is of order 1/rows."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5000, 3))
    rows = (rows - rows.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T)).T)
    data = MEAN + rows @ np.linalg.cholesky(COV).T
    objective = DenoisingScoreMatching(noise=PerCoordinate())
    trainer = ScoreMatching(MLP(3, width=8, depth=1), loss=objective)
    score = trainer.get_score(trainer.init(jax.random.key(0), data.astype("f4")))
    io.save(score, tmp_path / "score")
    values = [3.0, NAN, 1.0]
    mean, cov = conditional(values, 0.5)
    x = jnp.array([0.5, -1.0, 3.0])
    noisy = cov + np.diag((float(VE().sigma(0.5)) * SCALE) ** 2)
    for some in (score, io.load(tmp_path / "score")):
        got = some.condition(values, 0.5).score(x, 0.5)
        exact = np.linalg.solve(noisy, mean - x)
        np.testing.assert_allclose(got, exact, rtol=0.02, atol=0.02)


def test_a_damaged_covariance_is_refused(tmp_path):
    score, _ = fresh_score(NETS[0])
    wrong = replace(score.denoiser, covariance=-score.denoiser.covariance)
    io.save(replace(score, denoiser=wrong), tmp_path / "score")
    with pytest.raises(ValueError, match="`covariance` that is positive definite"):
        io.load(tmp_path / "score")


def test_a_header_must_fit_its_net(tmp_path):
    score, _ = fresh_score(NETS[0])
    plain = replace(score, denoiser=replace(score.denoiser, min_level=None))
    io.save(plain, tmp_path / "score")
    with pytest.raises(ValueError, match="`per_coordinate` in"):
        io.load(tmp_path / "score")


def test_every_parametrization_keeps_known_coordinates():
    score, _ = fresh_score(NETS[0], parametrization=DataPrediction())
    levels = jnp.full(6, 0.5).at[2].set(0.0)
    assert score.denoiser(jnp.full(6, 3.0), levels)[2] == 3.0


def test_set_transformers_stay_equivariant_with_levels():
    score, _ = fresh_score(NETS[1])
    x, levels = jnp.arange(6.0), jnp.geomspace(0.1, 2.0, 6)
    order = jnp.array([3, 1, 0, 5, 4, 2])
    np.testing.assert_allclose(
        score.denoiser(x[order], levels[order]),
        score.denoiser(x, levels)[order],
        rtol=1e-4,
        atol=1e-6,
    )


def test_other_nets_are_refused():
    for net in (Energy(MLP(6, width=8, depth=1)), built()):
        with pytest.raises(TypeError, match="`net` must take one noise level per"):
            fresh_score(net)


def built():
    from flax import nnx

    return MLP(6, width=8, depth=1)(rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_trained_net_gives_conditionals_of_a_mixture():
    key_which, key_noise, key_train = jax.random.split(jax.random.key(5), 3)
    which = jax.random.bernoulli(key_which, 0.5, (8000,)).astype(int)
    data = CENTERS[which] + WIDTH * jax.random.normal(key_noise, (8000, 3))
    trainer = ScoreMatching(
        MLP(3, width=64), loss=DenoisingScoreMatching(noise=PerCoordinate())
    )
    score = trainer.run(key_train, 2000, data, progress_bar=False).score
    for y, sd in ((-0.9, 0.0), (1.0, 0.0), (0.2, 0.6)):
        draws = score.condition([y, NAN, NAN], sd).sample(jax.random.key(1), (3000,))
        variance = WIDTH**2 + sd**2
        logits = -0.5 * np.square(y - np.asarray(CENTERS)[:, 0]) / variance
        weight = 1 / (1 + np.exp(logits[0] - logits[1]))
        assert abs(float((draws[:, 1] > 0.1).mean()) - weight) < 0.06
        mean = weight * 1.0 - (1 - weight) * 0.8
        assert abs(float(draws[:, 1].mean()) - mean) < 0.1
