"""Scores of functions trained elsewhere: exact for a mixture, usable as priors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from numpyro_score import (
    VE,
    VP,
    RectifiedFlow,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
    ScoreSDE,
)
from numpyro_score.data.standardize import Affine
from numpyro_score.score import HostFunction, from_diffusers, from_edm
from numpyro_score.score.prediction import check_predicted_noise
from numpyro_score.sde import DiscreteVP
from tests.targets import MIXTURE, Mixture, unchecked

LINEAR = DiscreteVP.linear()
X = jnp.array([[0.3, -0.5], [-1.4, -0.9], [1.0, 1.0]])


def exact_parts(sde, x, t, law=MIXTURE):
    """Return E[x_0 | x_t] and E[n | x_t] of a law."""
    alpha, sigma = sde.marginal(t)
    x0 = law.denoised(x, alpha, sigma)
    return x0, -sigma * law.score(x, alpha, sigma)


def predictions(sde, law=MIXTURE):
    """Return what nets of each kind would predict, as functions of x and t."""

    def v(x, t):
        x0, n = exact_parts(sde, x, t, law)
        alpha, sigma = sde.marginal(t)
        return alpha * n - sigma * x0

    return {
        "from_denoiser": lambda x, t: exact_parts(sde, x, t, law)[0],
        "from_noise_prediction": lambda x, t: exact_parts(sde, x, t, law)[1],
        "from_v_prediction": v,
    }


def by_step(sde, fn):
    """Return a function of integer steps only, as a net with a table of embeddings."""

    def of_step(x, step):
        assert jnp.issubdtype(step.dtype, jnp.integer)
        return fn(x, (step + 1) / sde.num_steps)

    return of_step


def assert_exact(score, ts, rtol=2e-3):
    for t in ts:
        alpha, sigma = score.sde.marginal(t)
        exact = jax.vmap(lambda x: MIXTURE.score(x, alpha, sigma))(X)  # noqa: B023
        np.testing.assert_allclose(score.score(X, t), exact, rtol=rtol, atol=rtol)
        denoised = jax.vmap(lambda x: MIXTURE.denoised(x, alpha, sigma))(X)  # noqa: B023
        np.testing.assert_allclose(score.denoise(X, t), denoised, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("kind", predictions(VP()))
@pytest.mark.parametrize("sde", [VP(), VE()], ids=lambda s: type(s).__name__)
def test_predictions_at_times_of_a_process_give_the_exact_score(kind, sde):
    score = getattr(ScoreModel, kind)(predictions(sde)[kind], sde, (2,))
    assert_exact(score, (0.2, 0.7))


@pytest.mark.parametrize("kind", predictions(VP()))
@pytest.mark.parametrize(
    "sde",
    [LINEAR, DiscreteVP.cosine(), DiscreteVP.scaled_linear()],
    ids=["linear", "cosine", "scaled_linear"],
)
def test_predictions_at_integer_steps_give_the_exact_score(kind, sde):
    fn = by_step(sde, predictions(sde)[kind])
    score = getattr(ScoreModel, kind)(fn, sde.betas, (2,))
    nodes = [(k + 1) / 1000 for k in (50, 300, 700)]
    assert_exact(score, nodes)
    assert_exact(score, [0.1507, 0.4004])  # between steps


def test_fractional_steps_are_handed_on():
    fn = predictions(LINEAR)["from_noise_prediction"]

    def of_step(x, step):
        assert jnp.issubdtype(step.dtype, jnp.floating)
        return fn(x, (step + 1) / 1000)

    score = ScoreModel.from_noise_prediction(of_step, LINEAR, (2,), integer_steps=False)
    assert_exact(score, [0.1507, 0.4])


@pytest.mark.parametrize("sde", [RectifiedFlow(), VP()], ids=lambda s: type(s).__name__)
def test_velocity_gives_the_exact_score(sde):
    velocity = MIXTURE.score_model(sde).velocity
    assert_exact(ScoreModel.from_velocity(velocity, (2,), sde), (0.3, 0.8))


def test_recipe_of_the_thousand_steps():
    """Step k is t = (k + 1)/1000, and the score -noise / sqrt(1 - alphas_cumprod)."""
    products = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    k, noise = 371, jnp.array([0.4, -1.1])
    score = ScoreModel.from_noise_prediction(lambda x, k: noise, LINEAR, (2,))
    expected = -noise / np.sqrt(1 - products[k])
    np.testing.assert_allclose(score.score(X[0], (k + 1) / 1000), expected, rtol=1e-5)
    alphas = [LINEAR.alpha((k + 1) / 1000) for k in (0, 371, 999)]
    np.testing.assert_allclose(alphas, np.sqrt(products[[0, 371, 999]]), rtol=1e-5)
    again = DiscreteVP.from_alphas_cumprod(products)
    np.testing.assert_allclose(again.betas, LINEAR.betas, rtol=1e-9)


def test_lowest_level_is_one_step():
    assert VP().noise_level(0.0) == 0
    np.testing.assert_allclose(VE().noise_level(0.0), VE().sigma_min, rtol=1e-5)
    np.testing.assert_allclose(
        LINEAR.noise_level(LINEAR.t_min), np.sqrt(1e-4 / (1 - 1e-4)), rtol=1e-5
    )


def test_scale_of_the_data_is_recorded():
    sde = VP()
    fn = predictions(sde)["from_noise_prediction"]
    affine = Affine.from_range(0.0, 255.0, (2,))
    data = affine.inverse(MIXTURE.sample(jax.random.key(1), (512,)))
    score = ScoreModel.from_noise_prediction(
        fn, sde, (2,), standardize=affine, data=data
    )
    exact = jax.vmap(lambda x: MIXTURE.score(x, *sde.marginal(0.4)))(X)
    got = score.score(affine.inverse(X), 0.4) * 127.5
    np.testing.assert_allclose(got, exact, rtol=2e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"`standardize`.*worse than a linear map"):
        ScoreModel.from_noise_prediction(fn, sde, (2,), data=data)


def test_diffusers_configuration(tmp_path):
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
    }
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(config))
    sde = DiscreteVP.scaled_linear()
    one = by_step(sde, predictions(sde)["from_v_prediction"])
    for source in (config, path):
        score = from_diffusers(source, jax.vmap(one), (2,))
        assert score.sde == sde
    assert_exact(score, [0.3])
    reverse = {"trained_betas": list(LINEAR.betas[::-1])}
    with pytest.raises(ValueError, match="`betas` must not decrease"):
        from_diffusers(reverse, jax.vmap(one), (2,))
    cosine = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
    score = from_diffusers(cosine, lambda x, step: x, (2,), batched=False)
    assert score.sde == DiscreteVP.cosine()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trained_betas": [0.1, 0.2]}, r"one beta for each.*Got 2, expected 1000"),
        ({"beta_schedule": "sigmoid"}, r"`config\['beta_schedule'\]`.*Got 'sigmoid'"),
        ({"prediction_type": "flow"}, r"`config\['prediction_type'\]`.*Got 'flow'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "from_velocity"),
        ({"_class_name": "EDMEulerScheduler"}, r"from_edm.*Got EDMEulerScheduler"),
        ({"_class_name": "CogVideoXDDIMScheduler"}, "one table of betas"),
        ({"_class_name": None}, "Got None"),
        ({"timestep_type": "continuous"}, r"told log\(sigma\)/4.*Got 'continuous'"),
        ({"num_train_timesteps": "1000"}, r"`config\['num_train_timesteps'\]`.*'1000'"),
        ({"rescale_betas_zero_snr": True}, "from_alphas_cumprod of all steps but"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_min <= beta_max"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        from_diffusers(change, lambda x, step: x, (2,))


def test_edm_conditioning_with_and_without_preconditioning():
    sd = 0.5

    def denoise(x, sigma):
        return MIXTURE.denoised(x, 1.0, sigma)

    def raw(x, noise):
        sigma = jnp.exp(4 * noise)
        total = jnp.sqrt(sigma**2 + sd**2)
        out = denoise(total * x, sigma) - sd**2 / total * x
        return out * total / (sigma * sd)

    assert_exact(from_edm(denoise, (2,)), (0.4, 0.7))
    assert_exact(from_edm(raw, (2,), sigma_data=sd), (0.4, 0.7))
    batch = from_edm(jax.vmap(denoise), (2,), batched=True)
    assert_exact(batch, (0.4,))
    with pytest.raises(ValueError, match="`sigma_data` must be positive"):
        from_edm(raw, (2,), sigma_data=-1.0)


def test_weights_are_arguments_of_programs():
    def fn(weights, x, t):
        return weights * x

    bound = jax.tree_util.Partial(fn, jnp.array(2.0))
    score = ScoreModel.from_denoiser(bound, VE(), (2,))
    assert [leaf.shape for leaf in jax.tree.leaves(score.denoiser)] == [()]
    double = dataclasses.replace(
        score, denoiser=jax.tree.map(lambda leaf: 2 * leaf, score.denoiser)
    )
    np.testing.assert_allclose(double.denoise(X, 0.5), 2 * score.denoise(X, 0.5))


def test_context_is_handed_on():
    fn = lambda x, t, context=0.0: 0 * x + context  # noqa: E731
    score = ScoreModel.from_denoiser(fn, VE(), (2,))
    context = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(
        score.denoise(X, 0.5, context), jnp.tile(context, (3, 1))
    )


OVERLAPPING = Mixture((0.6, 0.4), ((-0.8,), (0.9,)), (0.5, 0.4))
Y, NOISE = 0.3, 0.6  # observed, and the sd of its noise


def numpy_denoiser(points, times):
    """Return E[x_0 | x_t] of OVERLAPPING under VE, by NumPy, for a batch."""
    square = (0.01 * (20.0 / 0.01) ** times[:, None, None]) ** 2
    x, loc = points[:, None], np.array(OVERLAPPING.locs)
    own = np.array(OVERLAPPING.scales)[:, None] ** 2
    log_share = -0.5 * (x - loc) ** 2 / (own + square) - 0.5 * np.log(own + square)
    log_share -= log_share.max(1, keepdims=True)
    share = np.array(OVERLAPPING.weights)[:, None] * np.exp(log_share)
    share /= share.sum(1, keepdims=True)
    return (share * (loc + own / (own + square) * (x - loc))).sum(1)


def as_prior(score):
    """Return draws of x given Y = x + noise, by chains of Langevin steps."""

    def model():
        x = numpyro.sample("x", ScoreDistribution(score, t=score.sde.t_min))
        numpyro.sample("y", dist.Normal(x, NOISE).to_event(1), obs=jnp.array([Y]))

    options = {"chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(
        ScoreLangevin(model),
        num_warmup=200,
        num_samples=250,
        num_chains=8,
        **options,
    )
    mcmc.run(jax.random.key(0))
    return mcmc.get_samples(group_by_chain=True)["x"][..., 0]


def posterior_moments():
    """Return mean and sd of x given Y: a mixture of the conjugate posteriors."""
    loc, own = np.array(OVERLAPPING.locs)[:, 0], np.array(OVERLAPPING.scales) ** 2
    evidence = np.exp(-0.5 * (Y - loc) ** 2 / (own + NOISE**2))
    share = np.array(OVERLAPPING.weights) * evidence / np.sqrt(own + NOISE**2)
    share /= share.sum()
    variance = 1 / (1 / own + 1 / NOISE**2)
    means = variance * (loc / own + Y / NOISE**2)
    mean = share @ means
    return mean, np.sqrt(share @ (variance + means**2) - mean**2)


def assert_posterior(draws):
    mean, sd = posterior_moments()
    size = min(effective_sample_size(np.asarray(x)) for x in (draws, draws**2))
    assert size > 150
    assert abs(float(draws.mean()) - mean) < 4 * sd / np.sqrt(size)
    # the kurtosis of this law is below 3, that of a normal one
    assert abs(float(draws.var()) / sd**2 - 1) < 4 * np.sqrt(2 / size)


def on_steps(kind, sde):
    """Return the score of a function of integer steps that knows OVERLAPPING."""
    fn = by_step(sde, predictions(sde, OVERLAPPING)[kind])
    return getattr(ScoreModel, kind)(fn, sde.betas, (1,))


def from_configuration():
    config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    config |= {"beta_start": 0.00085, "beta_end": 0.012}
    sde = DiscreteVP.scaled_linear()
    fn = by_step(sde, predictions(sde, OVERLAPPING)["from_v_prediction"])
    return from_diffusers(config, jax.vmap(fn), (1,))


PRIORS = {
    "denoiser": lambda: ScoreModel.from_denoiser(
        predictions(VP(), OVERLAPPING)["from_denoiser"], VP(), (1,)
    ),
    "noise": lambda: on_steps("from_noise_prediction", LINEAR),
    "v": lambda: on_steps("from_v_prediction", DiscreteVP.cosine()),
    "velocity": lambda: ScoreModel.from_velocity(
        OVERLAPPING.score_model(RectifiedFlow()).velocity, (1,)
    ),
    "diffusers": from_configuration,
    "edm": lambda: from_edm(
        lambda x, s: OVERLAPPING.denoised(x, 1.0, s), (1,), sigma_min=0.02
    ),
    "host": lambda: ScoreModel.from_denoiser(HostFunction(numpy_denoiser), VE(), (1,)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n not in "noise host"))
        for n in PRIORS
    ],
)
def test_as_prior_gives_the_posterior_of_the_mixture(name):
    assert_posterior(as_prior(PRIORS[name]()))


def test_host_function_samples_and_refuses_derivatives():
    score = ScoreModel.from_denoiser(HostFunction(numpy_denoiser), VE(), (1,))
    draws = score.sample(jax.random.key(0), (2000,))
    sd = float(OVERLAPPING.variances()[0]) ** 0.5
    mean = float(OVERLAPPING.means()[0])
    assert abs(float(draws.mean()) - mean) < 5 * sd / np.sqrt(2000)
    assert abs(float(draws.std()) / sd - 1) < 0.1

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Normal(x, 0.6).to_event(1), obs=y)

    guided = ScoreSDE(model, num_samples=10, num_particles=10, levels=4)
    with pytest.raises(TypeError, match="HostFunction has no derivative"):
        guided.run(jax.random.key(0), jnp.array([1.0]))
    with pytest.raises(TypeError, match="HostFunction has no derivative"):
        score.log_prob(jnp.zeros(1))


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (
            lambda x, t: x[:, :0],
            ValueError,
            r"shape of its points.*\(1, 0\)",
        ),
        (lambda x, t: x[0], ValueError, r"shape of its points.*Got \(1,\)"),
        (lambda x, t: None, TypeError, r"one array of real numbers.*Got a NoneType of"),
        (lambda x, t: x + 0j, TypeError, r"one array of real numbers.*complex"),
        (lambda x, t: np.nan * x, ValueError, "`fn` must be finite"),
        (lambda x, t: x @ np.ones((3, 3)), ValueError, "matmul"),  # its own error
    ],
)
def test_bad_host_functions(fn, error, message):
    with pytest.raises(error, match=message):
        ScoreModel.from_denoiser(HostFunction(fn), VE(), (1,))


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1], r"at least 2 finite numbers.*\(1,\)"),
        ([[0.1, 0.2]], r"shape \(1, 2\)"),
        ([0.1, np.nan], "1 not finite"),
        ([0.1, -0.2], r"`betas` must lie in \(0, 1\).*-0.2"),
        ([0.1, 1.0], r"`betas` must lie in \(0, 1\)"),
        (LINEAR.betas[::-1], r"`betas` must not decrease.*0.02, ..., 0.0001"),
        (np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), "from_alphas_cumprod"),
    ],
)
def test_bad_betas(betas, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        ScoreModel.from_noise_prediction(lambda x, k: x, betas, (2,))


@pytest.mark.parametrize("process", [None, "linear", VP, lambda t: t])
def test_bad_processes(process):
    for kind in ("from_denoiser", "from_noise_prediction", "from_v_prediction"):
        with (
            unchecked(),
            pytest.raises(TypeError, match="`process` must be a noise process, such"),
        ):
            getattr(ScoreModel, kind)(lambda x, k: x, process, (2,))


def test_decreasing_noise():
    with pytest.raises(ValueError, match=r"`values` must decrease.*1 steps up"):
        DiscreteVP.from_alphas_cumprod([0.1, 0.5])


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda x, t: x[:1], ValueError, r"`fn`.*shape.*\(1,\), expected \(2,\)"),
        (lambda x, t: x / (0 * x), ValueError, r"`fn` must be finite.*NaN"),
        (lambda x, t: x.astype(int), TypeError, "`fn`.*floating-point"),
        (lambda x, t: (x, t), TypeError, "`fn`.*tuple"),
        (lambda x, t: jnp.sqrt(x), ValueError, "finite.* at x_t = a normal draw"),
        (lambda x: x, TypeError, r"in JAX of one point, .*shapes \(2,\), \(\), "),
        (lambda x, t: np.sin(np.asarray(x)), TypeError, "HostFunction.*Called with"),
        (lambda x, t: x * t[:, None], ValueError, "batch_of_one.*raised IndexError"),
        (lambda x, t: x @ jnp.ones((3, 3)), TypeError, r"in JAX of one point.*raised"),
        (lambda x, t: x if t > 0.5 else 2 * x, TypeError, "raised TracerBool"),
    ],
)
def test_bad_functions(fn, error, message):
    with unchecked(), pytest.raises(error, match=message):
        ScoreModel.from_denoiser(fn, VE(), (2,))


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda x, t: {"sample": x}, ValueError, r"batch of points.*Got dict"),
        (lambda x, t: (x,), ValueError, r"\.sample`.*Got tuple, expected \(1, 2\)"),
        (lambda x, t: x[0], ValueError, r"Got \(2,\), expected \(1, 2\)"),
        (
            lambda x, t: x @ t,
            TypeError,
            r"Called with .* \(1, 2\), \(1,\)",
        ),
    ],
)
def test_bad_functions_of_batches(fn, error, message):
    with unchecked(), pytest.raises(error, match=message):
        from_edm(fn, (2,), batched=True)
    with unchecked(), pytest.raises(error, match=message):
        from_diffusers({}, fn, (2,))


def test_context_of_a_function_without_one():
    score = ScoreModel.from_denoiser(lambda x, t: x, VE(), (2,))
    with pytest.raises(TypeError, match=r"if there is one, its context.*positional"):
        score.denoise(X, 0.5, jnp.ones(3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.full((40, 2), np.nan), "`data` must be finite"),
        (np.zeros((40, 2)), "`data` must vary.*Got 40 equal rows"),
        (np.array([["a", "b"]] * 40), "`data` must be an array of real numbers"),
    ],
)
def test_bad_data(data, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        ScoreModel.from_denoiser(lambda x, t: x, VE(), (2,), data=data)


def test_function_that_is_not_finite_at_the_data():
    def fn(x, t):
        return jnp.where(x[0] > 100, jnp.nan, 0.0) + x

    rows = 1000 + np.random.default_rng(0).normal(size=(40, 2))
    with pytest.raises(ValueError, match=r"finite at `data` with noise.*40 of 40 rows"):
        ScoreModel.from_denoiser(fn, VE(), (2,), data=rows)


def test_bad_scales():
    with pytest.raises(ValueError, match=r"`standardize` must have the event shape"):
        ScoreModel.from_denoiser(
            lambda x, t: x, VE(), (2,), standardize=Affine.identity((3,))
        )
    with pytest.raises(ValueError, match=r"`low` and `high`"):
        Affine.from_range(1.0, 1.0, (2,))
    with pytest.raises(ValueError, match=r"`data` must have one datum.*\(2, 3\)"):
        ScoreModel.from_denoiser(lambda x, t: x, VE(), (2,), data=jnp.zeros((2, 3)))


ROWS = np.asarray(MIXTURE.sample(jax.random.key(0), (600,)))
V, EPS = (predictions(LINEAR)[f"from_{k}_prediction"] for k in ("v", "noise"))
CLEAN = predictions(VE())["from_denoiser"]


def exact_score(x, t):
    return MIXTURE.score(x, *VE().marginal(t))


def at_level(fn):
    """Return a denoiser of x and the noise level, from one of x and time."""
    return lambda x, level: fn(x, VE().time(level))


WRONG = {
    "v of another sign": lambda: ScoreModel.from_v_prediction(
        by_step(LINEAR, lambda x, t: -V(x, t)), LINEAR, (2,), data=ROWS
    ),
    "steps in reverse": lambda: ScoreModel.from_noise_prediction(
        by_step(LINEAR, lambda x, t: EPS(x, 1 - t)), LINEAR, (2,), data=ROWS
    ),
    "linear betas taken for cosine": lambda: ScoreModel.from_noise_prediction(
        by_step(LINEAR, EPS), DiscreteVP.cosine().betas, (2,), data=ROWS
    ),
    "linear betas taken for scaled": lambda: ScoreModel.from_noise_prediction(
        by_step(LINEAR, EPS), DiscreteVP.scaled_linear().betas, (2,), data=ROWS
    ),
    "a tenth of the betas": lambda: ScoreModel.from_noise_prediction(
        by_step(LINEAR, EPS), LINEAR.betas[::10], (2,), data=ROWS
    ),
    "level squared": lambda: from_edm(
        lambda x, level: at_level(CLEAN)(x, level**2), (2,), data=ROWS
    ),
    "half of the level": lambda: from_edm(
        lambda x, level: at_level(CLEAN)(x, level / 2), (2,), data=ROWS
    ),
    "score of another sign": lambda: ScoreModel.from_fn(
        lambda x, t: -exact_score(x, t), VE(), (2,), data=ROWS
    ),
    "score too large": lambda: ScoreModel.from_fn(
        lambda x, t: 1.5 * exact_score(x, t), VE(), (2,), data=ROWS
    ),
    "time in reverse": lambda: ScoreModel.from_fn(
        lambda x, t: exact_score(x, 1 - t), VE(), (2,), data=ROWS
    ),
    "noise for the score": lambda: ScoreModel.from_fn(
        lambda x, t: VE().sigma(t) * exact_score(x, t), VE(), (2,), data=ROWS
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_conventions_do_not_predict_the_noise_of_data(case):
    with pytest.raises(ValueError, match="must predict the noise in `data`"):
        WRONG[case]()


def test_the_right_convention_predicts_the_noise_of_data():
    ScoreModel.from_v_prediction(by_step(LINEAR, V), LINEAR, (2,), data=ROWS)
    ScoreModel.from_noise_prediction(by_step(LINEAR, EPS), LINEAR, (2,), data=ROWS)
    from_edm(at_level(CLEAN), (2,), data=ROWS)
    ScoreModel.from_fn(exact_score, VE(), (2,), data=ROWS)
    sorted_rows = ROWS[np.argsort(ROWS[:, 0])].repeat(4, axis=0)  # one mode first
    from_edm(at_level(CLEAN), (2,), data=sorted_rows)


@pytest.mark.parametrize("count", [2, 5, 10, 32])
def test_few_rows_of_the_right_law_pass(count):
    for seed in range(5):
        rows = np.random.default_rng(seed).normal(size=(count, 1))
        unit = Affine.identity((1,))
        check_predicted_noise(lambda x, r: x / (1 + r**2), VE(), unit, rows)
