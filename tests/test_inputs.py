"""A table of inputs, one row each: right, or an error of ours before work starts.

Silent wrong answers are the first part; obscure errors the second. Every message names
the argument in backticks.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_score import (
    MLP,
    VE,
    VP,
    AnnealedLangevin,
    ScoreLangevin,
    ScoreMatching,
    ScoreModel,
    UNet,
    learn_prior,
    loss,
    schedule,
    solver,
)
from numpyro_score.data.standardize import Affine, moments
from numpyro_score.data.support import SoftClip
from numpyro_score.diagnostics import (
    BAOAB,
    ForestProtocol,
    c2st,
    denoising_loss,
    energy_distance,
    kernel_stein_discrepancy,
    memorization,
    replicate,
    sliced_wasserstein,
    step_size_bias,
    tarp,
)
from numpyro_score.guidance import (
    classifier_free_guidance,
    classifier_guidance,
    inpaint,
)
from numpyro_score.infer import NPSE, AmortizedPosterior, ScoreSDE
from numpyro_score.kernel import ParallelTempering, levels_from_data, run_in_blocks
from numpyro_score.nn import ConvEmbedding, Energy, SetEmbedding, SetTransformer
from numpyro_score.score import HostFunction, HutchinsonDivergence, bits_per_dimension
from numpyro_score.sde import RectifiedFlow, SubVP
from numpyro_score.train import Checkpoints

KEY = jax.random.key(0)
DATA = np.asarray(jax.random.normal(KEY, (64, 2)))
MASKED = np.ma.masked_array(DATA, mask=DATA > 1)
TRAINER = ScoreMatching(MLP(2, width=4, depth=1))
ZEROS = {"x": jnp.zeros(2), "s": jnp.zeros(())}
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True, scope="module")
def without_type_checker():
    """Let our own checks see what users pass, who run without beartype."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def model(y=None):
    numpyro.sample("x", dist.Normal(0, 1).expand([2]))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(s, 1), obs=y)


def pair():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1).expand([2]).to_event(1))


def train(data=DATA, key=KEY, num_steps=2, **options):
    return TRAINER.run(
        key, num_steps, data, **({"batch_size": 8, "progress_bar": False} | options)
    )


def start(init_params=None, **options):
    return ScoreLangevin(model, **options).init(KEY, 4, init_params, (0.3,))


@pytest.fixture(scope="module")
def posterior():
    simulator = NPSE(pair, "y").simulator()
    trainer = ScoreMatching(MLP(1, width=4, depth=1, context_size=2))
    state = trainer.init(KEY, DATA[:, :1], context=DATA)
    return AmortizedPosterior(trainer.get_score(state), simulator)


def sampler(**options):
    return MCMC(
        ScoreLangevin(model), num_warmup=2, num_samples=2, progress_bar=False, **options
    )


# Silent once


@pytest.mark.parametrize("size", [1e30, 1e-30, 1e18])
def test_units_do_not_matter(size):
    result = train(DATA * np.float32(size))
    scale = result.score.standardize.scale
    np.testing.assert_allclose(scale / size, DATA.std(0), rtol=1e-5)
    np.testing.assert_allclose(result.losses, train().losses, rtol=1e-3)
    shared = Affine.shared(jnp.asarray(DATA * np.float32(size))).scale
    np.testing.assert_allclose(shared / size, Affine.shared(DATA).scale, rtol=1e-5)


def test_moments_are_those_of_double_precision():
    x, y = DATA.astype(np.float64).T
    rows = np.stack([x * 1e20, y, 0 * x + 3], 1)
    mean, sd = moments(jnp.asarray(rows, jnp.float32))
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(sd, rows.std(0), rtol=1e-5)


def test_half_precision_starts_are_raised():
    half = jax.tree.map(lambda x: x.astype(jnp.float16), ZEROS)
    state = start(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.z)} == {jnp.dtype("float32")}
    kernel = ScoreLangevin(potential_fn=lambda z: z @ z)
    for dtype in ("float16", "bfloat16", "int32"):
        assert kernel.init(KEY, 0, jnp.zeros(2, dtype)).z.dtype == jnp.float32


def test_bfloat16_rows_train():
    rows = jnp.asarray(DATA, jnp.bfloat16)
    losses = train(rows).losses
    np.testing.assert_array_equal(losses, train(rows.astype(float)).losses)


def test_arrays_without_masked_values_are_arrays(posterior):
    bare = np.ma.masked_array(DATA)
    np.testing.assert_array_equal(train(bare).losses, train().losses)
    draws = [posterior.sample(KEY, y, 3)["x"] for y in (bare[0], DATA[0])]
    np.testing.assert_array_equal(*draws)


MATRIX = jnp.array([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
METRIC = "`inverse_mass_matrix` must be a vector of positive numbers or a symm"
LEVELS = "`sigma_min` and `sigma_max` must satisfy 0 < sigma_min < sigma_max < inf"
RATES = "`beta_min` and `beta_max` must satisfy 0 < beta_min"
UNITS = r"`data` must have a mean and a positive scale that fit float32"
MASKS = r"must not have masked values.* masked values of 128"
TYPE = "`compute_dtype` must be a floating-point type"
SILENT = {
    "data beyond float32's differences": (lambda: train(DATA * 1e38), UNITS),
    "data below float32": (lambda: train(DATA * np.float32(1e-38) / 16), UNITS),
    "infinite scale": (
        lambda: replace(
            TRAINER, standardize=lambda x: Affine(x[0], jnp.full(2, INF))
        ).init(KEY, DATA),
        UNITS,
    ),
    "scale of zero": (
        lambda: replace(TRAINER, standardize=lambda x: Affine(x[0], 0 * x[0])).init(
            KEY, DATA
        ),
        UNITS,
    ),
    "context beyond float32": (
        lambda: train(context=DATA * 1e38),
        r"`context` must have a mean and a positive scale",
    ),
    "infinite level": (lambda: VE(0.01, INF), LEVELS),
    "infinite level of a flow": (lambda: RectifiedFlow(0.01, INF), LEVELS),
    "level that is no number": (lambda: VE(NAN, 1.0), LEVELS),
    "infinite level of a grid": (lambda: schedule.geometric(0.1, INF, 5), LEVELS),
    "infinite rate": (lambda: VP(0.1, INF), RATES),
    "infinite rate of SubVP": (lambda: SubVP(0.1, INF), RATES),
    "net in integers": (lambda: replace(TRAINER, compute_dtype=jnp.int32), TYPE),
    "net in booleans": (lambda: replace(TRAINER, compute_dtype=bool), TYPE),
    "net in complex numbers": (lambda: replace(TRAINER, compute_dtype=complex), TYPE),
    "net in no type": (lambda: replace(TRAINER, compute_dtype="half a float"), TYPE),
    "negative metric": (lambda: start(inverse_mass_matrix=-jnp.ones(3)), METRIC),
    "metric of zero": (lambda: start(inverse_mass_matrix=jnp.zeros(3)), METRIC),
    "metric of NaN": (lambda: start(inverse_mass_matrix=jnp.full(3, NAN)), METRIC),
    "infinite metric": (lambda: start(inverse_mass_matrix=jnp.full(3, INF)), METRIC),
    "indefinite metric": (lambda: start(inverse_mass_matrix=MATRIX), METRIC),
    "metric without symmetry": (
        lambda: start(inverse_mass_matrix=jnp.eye(3).at[0, 1].set(0.5)),
        METRIC,
    ),
    "negative block": (
        lambda: start(inverse_mass_matrix={("x",): -jnp.ones(2)}, dense_mass=[("x",)]),
        METRIC,
    ),
    "complex metric": (lambda: start(inverse_mass_matrix=1j * np.ones(3)), METRIC),
    "masked rows": (lambda: train(MASKED), rf"`data` {MASKS}"),
    "masked context": (lambda: train(context=MASKED), rf"`data's context` {MASKS}"),
    "masked validation": (lambda: train(validation=MASKED), rf"`validation` {MASKS}"),
    "masked batches": (lambda: train(iter([MASKED])), rf"`batch` {MASKS}"),
    "list of masked rows": (lambda: train([*MASKED]), r"`data` must not have masked"),
}


@pytest.mark.parametrize("case", SILENT)
def test_silent_inputs_are_refused(case):
    call, message = SILENT[case]
    with pytest.raises(ValueError, match=message):
        call()


OBSERVED = r"`observation\['y'\]` must"
OBSERVATIONS = {
    "masked": (np.ma.masked_array(DATA[0], mask=[True, False]), "not have masked"),
    "complex": (DATA[0] + 1j, "be real numbers.* Got complex"),
    "None": (None, "be real numbers.* Got object"),
    "text": (["a", "b"], "be real numbers"),
    "object": (np.array([None, 1.0], object), "be real numbers.* Got object"),
}


@pytest.mark.parametrize("case", OBSERVATIONS)
def test_observations_are_checked(posterior, case):
    observation, message = OBSERVATIONS[case]
    with pytest.raises(ValueError, match=rf"{OBSERVED} {message}"):
        posterior.sample(KEY, observation, 3)
    with pytest.raises(ValueError, match=rf"{OBSERVED} {message}"):
        posterior.log_prob({"x": jnp.zeros(())}, observation)


# Obscure once

STEPS = "`step_size` must be positive and finite"
REAL = "must be an array of real numbers"
START = "`init_params` must be real numbers"
SITES = "`dense_mass` and `inverse_mass_matrix` must name latent sites"


def count(name):
    return f"`{name}` (and `every` )?must (be an integer|be at least|lie|leave)"


COUNTS = {
    "steps of training": (lambda n: train(num_steps=n), "num_steps"),
    "rows of a batch": (
        lambda n: train(batch_size=0 if n is None else n),  # None is the default
        "batch_size",
    ),
    "parts of a batch": (lambda n: replace(TRAINER, accumulate=n), "accumulate"),
    "checkpoints": (lambda n: Checkpoints("run", keep=n), "keep"),
    "blocks between": (lambda n: Checkpoints("run", every=n), "(keep` and `)?every"),
    "steps of a transition": (lambda n: ScoreLangevin(model, num_steps=n), "num_steps"),
    "moves": (lambda n: AnnealedLangevin(model, steps_per_level=n), "steps_per_level"),
    "blocks": (
        lambda n: run_in_blocks(sampler(), KEY, path="run", num_blocks=n),
        "num_blocks",
    ),
    "draws": (lambda n: ScoreSDE(model, num_samples=n), "num_samples"),
    "particles": (
        lambda n: ScoreSDE(model, num_samples=1, num_particles=n),
        "num_particles",
    ),
    "simulations": (lambda n: NPSE(pair, "y").fit(KEY, n), "num_simulations"),
    "rounds": (
        lambda n: NPSE(pair, "y").fit_rounds(KEY, DATA[0], 1000, num_rounds=n),
        "num_rounds",
    ),
}
NO_COUNTS = [0, -1, 2.0, 2.5, NAN, True, "2", None, 1 + 0j]


@pytest.mark.parametrize("number", NO_COUNTS)
@pytest.mark.parametrize("case", COUNTS)
def test_counts_are_integers(case, number):
    call, name = COUNTS[case]
    if number is None and case in ("moves", "steps of a transition"):
        return  # None leaves it to a rule
    with pytest.raises(ValueError, match=count(name)):
        call(number)


NO_NUMBERS = ["1", None, 1j, NAN, INF, 0.0, -1.0, True, np.ones(2)]


@pytest.mark.parametrize("number", NO_NUMBERS, ids=str)
def test_step_sizes_are_numbers(number):
    with pytest.raises(ValueError, match=STEPS):
        ScoreLangevin(model, step_size=number)


NO_KEYS = {
    "integer": 0,
    "None": None,
    "text": "key",
    "number": 0.5,
    "array of integers": np.zeros(2, int),
    "several keys": jax.random.split(KEY),
}
KEYED = {
    "training": lambda key, _: train(key=key),
    "fresh state": lambda key, _: TRAINER.init(key, DATA),
    "simulations": lambda key, _: NPSE(pair, "y").fit(key, 1000),
    "rounds": lambda key, _: NPSE(pair, "y").fit_rounds(key, DATA[0], 1000),
    "draws": lambda key, posterior: posterior.sample(key, DATA[0], 2),
    "draws for rows": lambda key, posterior: posterior.sample_each(key, DATA, 2),
    "blocks": lambda key, _: run_in_blocks(sampler(), key, path="run"),
}


@pytest.mark.parametrize("key", NO_KEYS)
@pytest.mark.parametrize("case", KEYED)
def test_keys_are_keys(posterior, case, key):
    with pytest.raises(TypeError, match="`rng_key` must be one random key"):
        KEYED[case](NO_KEYS[key], posterior)


def test_guided_posteriors_take_keys_alone():
    inference = ScoreSDE(model, num_samples=2, progress_bar=False)
    with pytest.raises(TypeError, match="`rng_key` must be one random key"):
        inference.run(0, 0.3)


@pytest.mark.parametrize("number", [0, -1, 2.5, "2"])
def test_draws_are_counted(posterior, number):
    with pytest.raises(ValueError, match=count("num_samples")):
        posterior.sample(KEY, DATA[0], number)
    with pytest.raises(ValueError, match=count("num_samples")):
        posterior.sample_each(KEY, DATA, number)


OBSCURE = {
    "complex rows": (lambda: train(DATA + 1j), REAL),
    "rows of text": (lambda: train(np.array(["a", "b"])), REAL),
    "no rows": (lambda: train(None), REAL),
    "complex start": (lambda: start(ZEROS | {"s": jnp.zeros((), complex)}), START),
    "start of booleans": (lambda: start(ZEROS | {"s": jnp.array(True)}), START),
    "unknown dense site": (lambda: start(dense_mass=[("z",)]), rf"{SITES}.*\['z'\]"),
    "dense sites as text": (lambda: start(dense_mass=["z"]), rf"{SITES}.*\['z'\]"),
    "metric of an unknown site": (
        lambda: start(dense_mass=[("x",)], inverse_mass_matrix={("z",): jnp.ones(2)}),
        rf"{SITES}.*\['z'\]",
    ),
    "metric of another size": (
        lambda: start(inverse_mass_matrix=jnp.ones(2)),
        r"`inverse_mass_matrix` must have one row per number.* for 3 numbers",
    ),
    "metric of two dimensions too many": (
        lambda: start(inverse_mass_matrix=jnp.ones((2, 3, 3))),
        METRIC,
    ),
}


@pytest.mark.parametrize("case", OBSCURE)
def test_obscure_inputs_are_named(case):
    call, message = OBSCURE[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_right_metrics_pass():
    for options in (
        {"inverse_mass_matrix": jnp.array([1.0, 4.0, 0.25])},
        {"inverse_mass_matrix": jnp.eye(3) + 0.5, "dense_mass": True},
        {
            "inverse_mass_matrix": {("x",): jnp.eye(2) * 2},
            "dense_mass": [("x",)],
        },
        {"dense_mass": [("s", "x")]},
    ):
        state = start(ZEROS, **options)
        assert jnp.isfinite(state.evaluation.value)


# Constructors: refused where they are made

NOT_POSITIVE = [NAN, INF, -1.0, "1", None, 1j, np.ones(2)]
NOT_COUNTS = [0, 2.5, NAN, True, "2", np.ones(2), [3]]
NUMBERS = {
    "churn": lambda v: solver.StochasticHeun(v),
    "eta": lambda v: solver.Ancestral(v),
    "noise_rate": lambda v: solver.DPMSolverSDE(noise_rate=v),
    "signal_to_noise": lambda v: solver.PredictorCorrector(signal_to_noise=v),
    "rho": lambda v: solver.Karras(v)(VE(), 5),
    "sigma_min": lambda v: VE(v, 10.0),
    "sigma_max": lambda v: VE(0.1, v),
    "beta_min": lambda v: VP(v),
    "step": lambda v: loss.FiniteDifferenceScoreMatching(step=v),
    "level": lambda v: v is None or loss.SingleLevel(v),
    "softness": lambda v: v is None or SoftClip(0.0, 1.0, v),
    "drop_context": lambda v: replace(TRAINER, drop_context=v),
}
INTEGERS = {
    "order": lambda v: solver.AdamsBashforth(v),
    "order of 2M": lambda v: solver.DPMSolverPP(v),
    "order of the predictor": lambda v: solver.UniPC(v),
    "order with noise": lambda v: solver.DPMSolverSDE(v),
    "num_corrections": lambda v: solver.PredictorCorrector(num_corrections=v),
    "num_levels": lambda v: loss.GeometricLevels(v),
    "num_projections": lambda v: loss.SlicedScoreMatching(num_projections=v),
    "num_probes": lambda v: HutchinsonDivergence(v),
    "size": lambda v: MLP(v),
    "width": lambda v: MLP(2, width=v),
    "levels": lambda v: isinstance(v, list) or ScoreSDE(model, num_samples=2, levels=v),
    "num_chains": lambda v: ScoreSDE(model, num_samples=2, num_chains=v),
    "num_rungs": lambda v: ParallelTempering(model, num_rungs=v),
    "max_transitions": lambda v: ParallelTempering(model, max_transitions=v),
}


def refused(make, value, name, kind=ValueError):
    """Return whether a value is refused by an error of ours that names the argument."""
    try:
        made = make(value)
    except kind as error:
        return f"`{name}`" in str(error)
    return made is True  # allowed for this argument


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_constructors_are_checked(name):
    passed = [v for v in NOT_POSITIVE if not refused(NUMBERS[name], v, name)]
    assert passed == []


@pytest.mark.parametrize("case", INTEGERS)
def test_counts_of_constructors_are_checked(case):
    values = NOT_COUNTS
    if case == "levels":
        values = [v for v in NOT_COUNTS if not isinstance(v, np.ndarray)]  # levels
    passed = [v for v in values if not refused(INTEGERS[case], v, case.split()[0])]
    assert passed == []


OBJECTS = {
    "predictor": lambda: solver.PredictorCorrector("heun"),
    "model": lambda: ScoreSDE("model", num_samples=2),
    "guidance": lambda: ScoreSDE(model, num_samples=2, guidance="dps"),
    "sde": lambda: replace(TRAINER, sde="ve"),
    "loss": lambda: replace(TRAINER, loss="dsm"),
    "parametrization": lambda: replace(TRAINER, parametrization="edm"),
    "net": lambda: replace(TRAINER, net="mlp"),
    "score_fn": lambda: ScoreModel.from_fn(3, VE(), (2,)),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_of_their_kind(name):
    with pytest.raises(TypeError, match=f"`{name}`"):
        OBJECTS[name]()


EXACT = ScoreModel.from_fn(lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), (2,))


@pytest.mark.parametrize("shape", [3, (-1,), (2.5,), (0,), "ab", None, (True,)])
def test_shapes_are_shapes(shape):
    with pytest.raises(ValueError, match="`shape` must be a tuple of positive"):
        EXACT.sample(KEY, shape)
    with pytest.raises(ValueError, match="`event_shape` must be a tuple of positive"):
        ScoreModel.from_fn(lambda x, t: -x, VE(), shape)


@pytest.mark.parametrize("key", [0, None, "key", jax.random.split(KEY)], ids=str)
def test_solvers_take_keys_alone(key):
    with pytest.raises(TypeError, match="`rng_key` must be one random key"):
        EXACT.sample(key, (2,))


@pytest.mark.parametrize("ts", [[1.0, NAN, 0.1], [NAN, 0.1], [INF, 0.1]], ids=str)
def test_times_are_finite(ts):
    with pytest.raises(ValueError, match="`ts` must"):
        EXACT.sample(KEY, (2,), ts=jnp.array(ts))


# Every argument of a kind, through one table: (argument, call of one value)


def solve(score=None, **options):
    score = EXACT if score is None else score
    return solver.solve(KEY, score, (2,), solver=solver.Heun(), **options)


FLAGS = {
    "adjusted": lambda v: ScoreLangevin(model, adjusted=v),
    "adapt_step_size": lambda v: ScoreLangevin(model, adapt_step_size=v),
    "adapt_mass_matrix": lambda v: ScoreLangevin(model, adapt_mass_matrix=v),
    "share_adaptation": lambda v: v is None or ScoreLangevin(model, share_adaptation=v),
    "dense_mass": lambda v: v is None or ScoreLangevin(model, dense_mass=v),
    "dense_mass of particles": lambda v: AnnealedLangevin(model, dense_mass=v),
    "shared_steps": lambda v: solver.Adaptive(shared_steps=v),
    "antithetic": lambda v: solver.expectation(DATA, DATA, antithetic=v),
    "norm": lambda v: MLP(2, norm=v),
    "optional_context": lambda v: UNet((4, 4), optional_context=v),
    "linear_baseline": lambda v: replace(TRAINER, linear_baseline=v),
    "progress_bar": lambda v: ScoreSDE(model, num_samples=2, progress_bar=v),
    "compiled": lambda v: replicate(KEY, len, len, 2, compiled=v),
    "denoise_last": lambda v: solve(denoise_last=v),
    "trajectory": lambda v: solve(trajectory=v),
    "variance_reduced": lambda v: loss.SlicedScoreMatching(variance_reduced=v),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_are_true_or_false(case):
    values = [None, 0, 1.5, "yes", np.ones(2), NAN, object()]
    names = case.split()[0]
    passed = [v for v in values if not refused(FLAGS[case], v, names, TypeError)]
    assert passed == []


CALLABLES = {
    "model": lambda v: ScoreLangevin(v),
    "model of particles": lambda v: AnnealedLangevin(v),
    "model of tempering": lambda v: ParallelTempering(v),
    "model of simulations": lambda v: NPSE(v, "y"),
    "potential_fn": lambda v: ScoreLangevin(potential_fn=v),
    "score_fn": lambda v: ScoreLangevin(potential_fn=len, score_fn=v),
    "init_strategy": lambda v: ScoreLangevin(model, init_strategy=v),
    "init_strategy of tempering": lambda v: ParallelTempering(model, init_strategy=v),
    "local": lambda v: ParallelTempering(model, local=v),
    "reference": lambda v: ParallelTempering(model, reference=v),
    "standardize": lambda v: replace(TRAINER, standardize=v),
    "standardize_context": lambda v: replace(TRAINER, standardize_context=v),
    "optim": lambda v: replace(TRAINER, optim=v),
    "net": lambda v: Energy(v),
    "net of simulations": lambda v: NPSE(pair, "y", net=v),
    "sde": lambda v: NPSE(pair, "y", sde=v),
    "sde of levels": lambda v: loss.UniformTime(v),
    "sde of a step": lambda v: solver.EulerMaruyama(v),
    "sde of a grid": lambda v: solver.Uniform()(v, 4),
    "sde of a goal": lambda v: solver.choose(solver.Goal.SPEED, v),
    "noise_levels": lambda v: loss.DenoisingScoreMatching(v),
    "weighting": lambda v: loss.DenoisingScoreMatching(weighting=v),
    "target": lambda v: loss.DenoisingScoreMatching(target=v),
    "method": lambda v: solver.Adaptive(v),
    "log_prob_fn": lambda v: classifier_guidance(EXACT, v),
    "simulate": lambda v: replicate(KEY, v, len, 2),
    "path": lambda v: isinstance(v, str) or Checkpoints(v),
    "path of blocks": lambda v: (
        isinstance(v, str) or run_in_blocks(sampler(), KEY, path=v)
    ),
    "score": lambda v: solve(v),
    "fn": lambda v: ScoreModel.from_denoiser(v, VP(), (2,)),
    "fn on the host": lambda v: HostFunction(v),
    "noise_levels without noise": lambda v: loss.ImplicitScoreMatching(v),
    "projection": lambda v: loss.SlicedScoreMatching(projection=v),
    "model of draws": lambda v: learn_prior(KEY, {"x": DATA}, v),
    "mcmc": lambda v: run_in_blocks(v, KEY, path="run"),
}


@pytest.mark.parametrize("case", CALLABLES)
def test_parts_are_of_their_kind(case):
    values = [-1, 1.5, "adam", ["x"], np.ones(2), object()]
    name = case.split()[0]
    passed = [v for v in values if not refused(CALLABLES[case], v, name, TypeError)]
    assert passed == []


MORE_COUNTS = {
    "num_warmup": lambda v: ScoreLangevin(model).init(KEY, v, None, (0.3,)),
    "num_warmup of levels": lambda v: AnnealedLangevin(model).init(KEY, v),
    "num_warmup of tempering": lambda v: ParallelTempering(model).init(KEY, v),
    "num_steps": lambda v: solver.Geometric()(VE(), v),
    "num_steps of a uniform grid": lambda v: solver.Uniform()(VE(), v),
    "num_steps of a pilot": lambda v: solver.pilot_times(KEY, EXACT, v),
    "num_samples": lambda v: solver.pilot_times(KEY, EXACT, 4, num_samples=v),
    "max_steps": lambda v: solver.Adaptive(max_steps=v),
    "degree": lambda v: solver.expectation(DATA, DATA, degree=v),
    "num_features": lambda v: SetEmbedding(v),
    "size": lambda v: SetEmbedding(2, v),
    "size of a series": lambda v: ConvEmbedding((8,), size=v),
    "context_size": lambda v: UNet((4, 4), context_size=v),
    "embedding_width": lambda v: UNet((4, 4), embedding_width=v),
    "width": lambda v: SetTransformer((3,), width=v),
    "depth": lambda v: SetTransformer((3,), depth=v),
    "num_heads": lambda v: SetTransformer((3,), num_heads=v),
    "num_folds": lambda v: ForestProtocol(v),
    "num_projections": lambda v: sliced_wasserstein(KEY, DATA, DATA, v),
    "num_rows": lambda v: energy_distance(DATA, DATA, v),
    "num_simulations": lambda v: replicate(KEY, len, len, v),
    "batch_size": lambda v: replicate(KEY, len, len, 2, batch_size=v),
    "num_resamples": lambda v: inpaint(
        KEY, EXACT, DATA[0], np.array([True, False]), num_resamples=v
    ),
    "size of a point": lambda v: bits_per_dimension(jnp.zeros(3), v),
    "num_bootstrap": lambda v: kernel_stein_discrepancy(
        KEY, DATA, DATA, num_bootstrap=v
    ),
    "num_evaluations": lambda v: solver.choose(solver.Goal.SPEED, VE(), v),
}


@pytest.mark.parametrize("case", MORE_COUNTS)
def test_other_counts_are_checked(case):
    values = [-1, 2.5, NAN, INF, True, "2", [3], np.ones(2), 1j, 10**30]
    passed = [v for v in values if not refused(MORE_COUNTS[case], v, case.split()[0])]
    assert passed == []


MORE_NUMBERS = {
    "rtol": lambda v: solver.Adaptive(rtol=v),
    "atol": lambda v: solver.Adaptive(atol=v),
    "rtol with noise": lambda v: solver.AdaptiveSDE(rtol=v),
    "friction": lambda v: v is None or BAOAB(v),
    "lowest": lambda v: levels_from_data(DATA, v),
    "step_size": lambda v: step_size_bias(KEY, len, DATA, v),
}


@pytest.mark.parametrize("case", MORE_NUMBERS)
def test_other_numbers_are_checked(case):
    name = case.split()[0]
    passed = [v for v in NOT_POSITIVE if not refused(MORE_NUMBERS[case], v, name)]
    assert passed == []


BROKEN = np.where(np.arange(64)[:, None] == 3, NAN, DATA)
NO_ROWS = {
    "NaN": BROKEN,
    "infinity": np.where(np.isnan(BROKEN), INF, BROKEN),
    "complex": DATA + 1j,
    "text": DATA.astype(str),
    "None": None,
    "objects": [None] * 64,
    "one number": 3.0,
    "no rows": DATA[:0],
    "masked": MASKED,
    "rows of several lengths": [[1.0], [1.0, 2.0]],
}
ROWS = {
    "x": lambda v: sliced_wasserstein(KEY, v, DATA),
    "y": lambda v: sliced_wasserstein(KEY, DATA, v),
    "x of energies": lambda v: energy_distance(v, DATA),
    "x of a classifier": lambda v: c2st(v, DATA, ForestProtocol()),
    "draws": lambda v: memorization(v, DATA, DATA),
    "draws of a kernel": lambda v: kernel_stein_discrepancy(KEY, v, DATA),
    "draws of controls": lambda v: solver.expectation(DATA, v),
    "values": lambda v: solver.expectation(v, DATA),
    "data": lambda v: denoising_loss(KEY, EXACT, v),
    "data of levels": lambda v: levels_from_data(v, 0.1),
    "starts": lambda v: step_size_bias(KEY, len, v, 0.1),
    "truths": lambda v: tarp(KEY, v, np.stack([DATA, DATA], 1)),
}


@pytest.mark.parametrize("kind", NO_ROWS)
@pytest.mark.parametrize("case", ROWS)
def test_rows_are_finite_numbers(case, kind):
    with pytest.raises(ValueError, match=f"`{case.split()[0]}` must"):
        ROWS[case](NO_ROWS[kind])


def test_samples_are_compared_in_one_space():
    with pytest.raises(ValueError, match="`x` and `y` must have as many numbers"):
        energy_distance(DATA, DATA[:, :1])
    with pytest.raises(ValueError, match="`x` and `y` must have as many rows"):
        sliced_wasserstein(KEY, DATA, DATA[:9])
    with pytest.raises(ValueError, match="`values`, `draws` and `scores` must have"):
        solver.expectation(DATA, DATA, DATA[:9])


@pytest.mark.parametrize("key", [0, None, "key", 1.5, np.ones(2)], ids=str)
@pytest.mark.parametrize("kernel", [ScoreLangevin, AnnealedLangevin, ParallelTempering])
def test_kernels_take_keys(kernel, key):
    with pytest.raises(TypeError, match="`rng_key` must be one random key"):
        kernel(model).init(key, 100, None, (0.3,))


@pytest.mark.parametrize("names", [3, None, (3,), 1.5, b"y"], ids=str)
def test_sites_are_named(names):
    with pytest.raises(ValueError, match="`observed` must be the name of a site"):
        NPSE(pair, names)


@pytest.mark.parametrize(
    "levels", [[], [1.0, NAN], [1.0, -1.0], ["a"], np.ones((2, 2)), [1j]], ids=str
)
def test_levels_are_positive(levels):
    with pytest.raises(ValueError, match="`levels` must"):
        AnnealedLangevin(model, levels=levels)
    with pytest.raises(ValueError, match="`levels` must"):
        ScoreSDE(model, num_samples=2, levels=levels)


@pytest.mark.parametrize("weight", [NAN, INF, None, "1", 1j, np.ones(2)], ids=str)
def test_guidance_has_a_finite_weight(weight):
    with pytest.raises(ValueError, match="`weight` must be a finite number"):
        classifier_guidance(EXACT, lambda x, t: x[0], weight=weight)
    with pytest.raises(ValueError, match="`weight` must be a finite number"):
        classifier_free_guidance(EXACT, weight)
