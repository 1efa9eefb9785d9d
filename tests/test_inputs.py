"""A table of inputs, one row each: right, or an error of ours before work starts.

Silent wrong answers are the first part; obscure errors the second. Every message names
the argument in backticks.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.sharding import Mesh
from numpyro.infer import MCMC

from numpyro_score import (
    MLP,
    VE,
    VP,
    AnnealedLangevin,
    ParticleMetropolis,
    ScoreDistribution,
    ScoreLangevin,
    ScoreMatching,
    ScoreModel,
    UNet,
    learn_prior,
    loss,
    schedule,
    solver,
)
from numpyro_score.checks import check_positive
from numpyro_score.consistency import (
    consistency_distillation,
    consistency_training,
    distill,
)
from numpyro_score.data.standardize import Affine, moments
from numpyro_score.data.support import SoftClip
from numpyro_score.diagnostics import (
    BAOAB,
    ULA,
    ForestProtocol,
    asymmetry,
    c2st,
    denoising_calibration,
    denoising_loss,
    ecdf_band,
    energy_distance,
    kernel_stein_discrepancy,
    lc2st_latent,
    mark_exactness,
    memorization,
    plot_pit,
    plot_work_precision,
    replicate,
    simulation_based_calibration,
    sliced_wasserstein,
    step_size_bias,
    tarp,
    uniformity_test,
    work_precision,
)
from numpyro_score.guidance import (
    classifier_free_guidance,
    classifier_guidance,
    discriminator_guidance,
    inpaint,
    train_discriminator,
)
from numpyro_score.infer import NPSE, AmortizedPosterior, ScoreSDE
from numpyro_score.kernel import ParallelTempering, levels_from_data, run_in_blocks
from numpyro_score.nn import ConvEmbedding, Energy, SetEmbedding, SetTransformer
from numpyro_score.score import HostFunction, HutchinsonDivergence, bits_per_dimension
from numpyro_score.score.adapters import from_diffusers, from_edm
from numpyro_score.score.density import solver_log_prob
from numpyro_score.sde import DiscreteVP, RectifiedFlow, SubVP
from numpyro_score.sde.base import ReverseSDE
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


def learn(**options):
    def model():
        numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))

    return learn_prior(KEY, {"x": DATA}, model, progress_bar=False, **options)


def test_far_points_have_the_distance_of_near_ones():
    far = energy_distance(DATA + 3e4, DATA + 3e4 + 1.0)
    assert far == pytest.approx(float(energy_distance(DATA, DATA + 1.0)), rel=1e-2)


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
    "level below the process": (lambda: learn(level=1e-3), "`level` must lie between"),
    "level above the process": (lambda: learn(level=50.0), "`level` must lie between"),
    "negative level": (
        lambda: learn(level=-0.1),
        "`level` must be positive and finite",
    ),
    "level in words": (
        lambda: learn(level="low"),
        "`level` must be positive and finite",
    ),
    "weight between the reverse SDE and the flow": (
        lambda: ReverseSDE(VE(), lambda x, t: -x, 0.75),
        "`weight` must be 1",
    ),
    "truth for a number": (
        lambda: check_positive("rate", np.True_, "a rate"),
        "`rate` must be positive and finite",
    ),
    "no normal draws": (
        lambda: lc2st_latent(KEY, DATA, DATA, DATA[0], num_samples=0),
        "`num_samples` must be an integer",
    ),
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
    "rho": lambda v: solver.Karras(v),
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
    "num_prior_draws": lambda v: ParallelTempering(model, num_prior_draws=v),
    "order of a bias": lambda v: ULA(v),
    "refinement": lambda v: ULA(2, v),
    "num_values": lambda v: ecdf_band(v),
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
    "paired": lambda: loss.FlowMatching("yes"),
    "result": lambda: discriminator_guidance(EXACT, EXACT),
    "curve": lambda: plot_work_precision([1.0]),
    "pit": lambda: plot_pit(np.full(10, 0.5)),
}
NO_SCORES = {  # called with what is no score
    "classifier-free": lambda s: classifier_free_guidance(s, 2.0),
    "classifier": lambda s: classifier_guidance(s, lambda x, t: x.sum()),
    "discriminator": lambda s: discriminator_guidance(s, EXACT),
    "discriminator's training": lambda s: train_discriminator(KEY, s, DATA, 1),
    "inpainting": lambda s: inpaint(KEY, s, DATA[0], np.array([True, False])),
    "sample": lambda s: solver.sample(KEY, s, (2,), solver=solver.Heun()),
    "encode": lambda s: solver.encode(s, DATA, solver=solver.Heun()),
    "decode": lambda s: solver.decode(s, DATA, solver=solver.Heun()),
    "consistency": lambda s: consistency_distillation(KEY, s, DATA, 1),
    "distill": lambda s: distill(KEY, s, 1),
    "asymmetry": lambda s: asymmetry(KEY, s, DATA),
    "denoising loss": lambda s: denoising_loss(KEY, s, DATA),
}


@pytest.mark.parametrize("case", NO_SCORES)
def test_scores_are_scores(case):
    for score in ("score", None, DATA):
        with pytest.raises(TypeError, match="`score` must be"):
            NO_SCORES[case](score)


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


WITH_NAN = np.where(DATA > 1, NAN, DATA)
VALUES = {  # the argument that is wrong, and a call
    "data of consistency distillation": lambda: consistency_distillation(
        KEY, EXACT, WITH_NAN, 1
    ),
    "data of consistency training": lambda: consistency_training(
        KEY, WITH_NAN, VE(), 1
    ),
    "data that are no numbers": lambda: consistency_training(KEY, "a", VE(), 1),
    "data of other points": lambda: consistency_distillation(
        KEY, EXACT, DATA[:, :1], 1
    ),
    "data of a discriminator": lambda: train_discriminator(KEY, EXACT, WITH_NAN, 1),
    "learning_rate": lambda: train_discriminator(
        KEY, EXACT, DATA, 1, learning_rate=-1.0
    ),
    "batch_size": lambda: consistency_training(KEY, DATA, VE(), 1, batch_size="1"),
    "x": lambda: solver.encode(EXACT, WITH_NAN, solver=solver.Heun()),
    "context": lambda: solver.sample(
        KEY, EXACT, (2,), solver=solver.Heun(), context=DATA[0]
    ),
    "ts": lambda: solver.sample(KEY, EXACT, (2,), solver=solver.Heun(), ts="grid"),
    "ts of a diagnostic": lambda: denoising_loss(KEY, EXACT, DATA, jnp.zeros(0)),
    "data of too few rows": lambda: denoising_loss(KEY, EXACT, [[1.0, 2.0]]),
    "pit['x']": lambda: uniformity_test({"x": np.array([0.5, 1.5])}),
    "pit": lambda: uniformity_test({"x": np.zeros(3), "y": np.zeros(2)}),
    "tree": lambda: mark_exactness("tree"),
    "num_repeats": lambda: work_precision(KEY, EXACT, DATA, [], num_repeats=0),
    "budgets": lambda: work_precision(KEY, EXACT, DATA, [], ["8"]),
    "reference": lambda: work_precision(KEY, EXACT, None, []),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_are_checked_before_any_work(case):
    name = re.split(" of | that ", case)[0]
    with pytest.raises(ValueError, match=f"`{re.escape(name)}` must"):
        VALUES[case]()


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


# Scores: points, times and contexts

METHODS = ["score", "denoise", "velocity", "noise", "log_prob"]
NO_POINTS = {
    "complex": jnp.ones(2) + 1j,
    "text": "ab",
    "None": None,
    "booleans": [True, False],
    "masked": np.ma.masked_array([0.0, 1.0], mask=[True, False]),
    "one number more": jnp.zeros(3),
    "one number": 0.5,
}
NO_TIMES = ["a", "0.5", True, 1j, [None], -0.5, 1.5, NAN, INF, [0.5, -1.0]]


@pytest.mark.parametrize("kind", NO_POINTS)
def test_points_are_points(kind):
    x = NO_POINTS[kind]
    for name in METHODS:
        with pytest.raises(ValueError, match=r"`x` must (be real|not have|end with)"):
            getattr(EXACT, name)(x, 0.5)
    for map_points in (solver.encode, solver.decode, solver_log_prob):
        with pytest.raises(ValueError, match="`x` must"):
            map_points(EXACT, x, solver=solver.Heun())


@pytest.mark.parametrize("t", NO_TIMES, ids=str)
def test_times_are_those_of_the_process(t):
    x = jnp.zeros((2, 2))
    for name in METHODS:
        with pytest.raises(ValueError, match="`t` must"):
            getattr(EXACT, name)(x, t)
    with pytest.raises(ValueError, match="`t` must"):
        ScoreDistribution(EXACT, t=t)


def test_times_are_one_or_one_for_each_point():
    for times, points in [([0.1, 0.2], (2,)), ([0.1, 0.2], (3, 2))]:
        with pytest.raises(ValueError, match="`t` must be one time, or one per point"):
            EXACT.score(jnp.zeros(points), jnp.array(times))


def test_integer_and_half_precision_points_are_raised():
    """Times once took the type of the points: 0.5 was 0 for integers."""
    x = np.array([1, 2])
    expected = EXACT.score(x.astype(np.float32), 0.5)
    for dtype in (int, np.uint8, np.float16, jnp.bfloat16):
        np.testing.assert_array_equal(EXACT.score(x.astype(dtype), 0.5), expected)


@pytest.mark.parametrize("context", [np.zeros(3), 0.5, "a", 1j, NAN], ids=str)
def test_contexts_fit_the_score(posterior, context):
    """Once ignored by functions of x and t, and repeated to the shape of the net's."""
    with pytest.raises(ValueError, match="`context` must be None"):
        EXACT.score(jnp.zeros(2), 0.5, context)
    with pytest.raises(ValueError, match="`context` must"):
        posterior.score.score(jnp.zeros(1), 0.5, context)
    with pytest.raises((ValueError, TypeError), match=r"`context` must|abstract array"):
        posterior.score.sample(KEY, (2,), context=context)


@pytest.mark.parametrize("value", ["a", NAN, -1.0, 0, 1j, None], ids=str)
def test_tolerances_are_positive(value):
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match=f"`{name}` must be positive"):
            EXACT.log_prob(jnp.zeros(2), **{name: value})
    with pytest.raises(TypeError, match="`divergence` must be a rule"):
        EXACT.log_prob(jnp.zeros(2), divergence=value or 3)


# Maps and processes

ONES = jnp.ones(2)
NO_SCALES = {
    "zero": 0 * ONES,
    "negative": -ONES,
    "NaN": ONES * NAN,
    "infinite": ONES * INF,
    "integers": np.ones(2, int),
    "booleans": np.ones(2, bool),
    "complex": ONES * 1j,
    "number": 2.0,
    "list": [1.0, 1.0],
    "text": "a",
    "None": None,
    "one number more": jnp.ones(3),
}


def linear(x, t):
    return 0.5 * x


def denoise_coordinates(x, levels):
    return x / (1 + levels**2)


@pytest.mark.parametrize("kind", NO_SCALES)
def test_maps_to_the_unit_scale_are_positive(kind):
    unit = Affine(0 * ONES, NO_SCALES[kind])
    with pytest.raises(ValueError, match="`data` must have"):
        replace(TRAINER, standardize=lambda x: unit).init(KEY, DATA)
    with pytest.raises(ValueError, match="`standardize` must have"):
        ScoreModel.from_denoiser(linear, VE(), (2,), standardize=unit)
    with pytest.raises(ValueError, match="`standardize` must have"):
        ScoreModel.from_coordinate_denoiser(denoise_coordinates, (2,), standardize=unit)


@pytest.mark.parametrize("value", [3, "a", len, (0 * ONES, ONES)], ids=str)
def test_maps_to_the_unit_scale_are_maps(value):
    make = ScoreModel.from_coordinate_denoiser
    with pytest.raises(TypeError, match="`standardize` must be an Affine"):
        make(denoise_coordinates, (2,), standardize=value)
    with pytest.raises(TypeError, match="`standardize` must be a function that re"):
        replace(TRAINER, standardize=lambda x: value).init(KEY, DATA)
    with pytest.raises(TypeError, match="`process` must be a noise process"):
        make(denoise_coordinates, (2,), value)
    with pytest.raises(TypeError, match="`process` must be a noise process"):
        ScoreModel.from_velocity(linear, (2,), value)


ENDS = [
    (0.0, 0.0),
    (1.0, 0.0),
    (NAN, 1.0),
    (0.0, NAN),
    (0.0, INF),
    (-INF, 1.0),
    ("a", 1.0),
    (None, 1.0),
    (1j, 2.0),
    (False, True),
    (np.zeros(2), np.array([1.0, -1.0])),
]


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_ends_of_an_interval_are_in_order(ends):
    with pytest.raises(ValueError, match=r"`(lower|upper)`.* must"):
        SoftClip(*ends)


TABLES = [
    [],
    [0.1],
    0.1,
    None,
    "ab",
    ["a", "b"],
    [0.1, -0.1],
    [0.1, 1.5],
    [0.1, 0.0],
    [0.1, NAN],
    [0.1, INF],
    [1j, 0.2],
    [[0.1, 0.2]],
    {0.1, 0.2},
    [0.5] * 200,
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table)[:20])
def test_tables_of_betas_are_shares_of_variance(table):
    with pytest.raises(ValueError, match="`betas` must"):
        DiscreteVP(table)
    with pytest.raises(ValueError, match="`values` must"):
        DiscreteVP.from_alphas_cumprod(table)
    with pytest.raises((TypeError, ValueError), match=r"`(betas|process)` must"):
        ScoreModel.from_noise_prediction(linear, table, (2,))


@pytest.mark.parametrize("value", [0, 1, -1, 2.5, "a", None, True, NAN], ids=str)
def test_tables_have_two_steps_or_more(value):
    for make in (DiscreteVP.linear, DiscreteVP.scaled_linear, DiscreteVP.cosine):
        with pytest.raises(ValueError, match="`num_steps` must be an integer of at"):
            make(value)


@pytest.mark.parametrize(
    "ends",
    [(NAN, 0.1), (0.2, 0.1), (0.0, 0.1), (0.1, 1.0), ("a", 0.1), (None, 0.1), (1j, 1)],
    ids=str,
)
def test_ends_of_betas_are_in_order(ends):
    for make in (DiscreteVP.linear, DiscreteVP.scaled_linear):
        with pytest.raises(ValueError, match="`beta_min` and `beta_max` must"):
            make(10, *ends)
    config = {"num_train_timesteps": 10, "beta_start": ends[0], "beta_end": ends[1]}
    with pytest.raises(ValueError, match=r"(beta_start|beta_min).* must"):
        from_diffusers(config, linear, (2,))


CONFIGS = [
    ({"prediction_type": "eps"}, "prediction_type"),
    ({"prediction_type": None}, "prediction_type"),
    ({"prediction_type": ["epsilon"]}, "prediction_type"),
    ({"beta_schedule": "cosine"}, "beta_schedule"),
    ({"beta_schedule": None}, "beta_schedule"),
    ({"beta_schedule": ["linear"]}, "beta_schedule"),
    ({"num_train_timesteps": "10"}, "num_train_timesteps"),
    ({"num_train_timesteps": 1}, "num_train_timesteps"),
    ({"trained_betas": 0.1}, "trained_betas"),
    ({"trained_betas": "0.1"}, "trained_betas"),
    ({"trained_betas": [0.1] * 3}, "trained_betas"),
    ({"rescale_betas_zero_snr": True}, "config"),
]


@pytest.mark.parametrize(("config", "name"), CONFIGS, ids=str)
def test_configurations_of_schedulers_are_known(config, name):
    with pytest.raises(ValueError, match=rf"`[\w\[']*{name}[\w\]']*` must"):
        from_diffusers({"num_train_timesteps": 10} | config, linear, (2,))


def test_files_of_schedulers_are_configurations(tmp_path):
    path = tmp_path / "scheduler_config.json"
    for text, kind in [("{", "JSON"), ("[1]", "one object of JSON")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=f"`config` must be a file .*{kind}"):
            from_diffusers(path, linear, (2,))
    for config in (3, [1], None):
        with pytest.raises(TypeError, match="`config` must be a scheduler's config"):
            from_diffusers(config, linear, (2,))


@pytest.mark.parametrize("flag", [None, 0, "no", np.ones(2)], ids=str)
def test_flags_of_foreign_nets_are_true_or_false(flag):
    config = {"num_train_timesteps": 10}
    for name in ("batched", "integer_steps"):
        with pytest.raises(TypeError, match=f"`{name}` must be True or False"):
            from_diffusers(config, linear, (2,), **{name: flag})
    with pytest.raises(TypeError, match="`batched` must be True or False"):
        from_edm(linear, (2,), batched=flag)
    with pytest.raises(TypeError, match="`integer_steps` must be True or False"):
        ScoreModel.from_denoiser(linear, VE(), (2,), integer_steps=flag)


@pytest.mark.parametrize("name", ["sigma_min", "sigma_max", "sigma_data"])
def test_levels_of_foreign_nets_are_positive(name):
    for value in [0, -1.0, NAN, INF, "a", 1j, ONES]:
        with pytest.raises(ValueError, match=f"`{name}`.* must"):
            from_edm(linear, (2,), **{name: value})


# Training: what is called, where it runs and what it goes on from

NO_CALLBACKS = [3, "a", [3], ["a"], [None], len, None, {"a": len}, iter([len])]


def fit(**options):
    options = {"num_steps": 2, "progress_bar": False, "check": False} | options
    return NPSE(pair, "y").fit(KEY, 100, **options)


@pytest.mark.parametrize(
    "callbacks", NO_CALLBACKS, ids=[str(j) for j in range(len(NO_CALLBACKS))]
)
def test_callbacks_are_functions(callbacks):
    for run in (train, fit):
        with pytest.raises(TypeError, match="`callbacks` must be"):
            run(callbacks=callbacks)


@pytest.mark.parametrize("mesh", [3, "a", [], jax.devices(), True], ids=str)
def test_meshes_are_meshes(mesh):
    for run in (train, fit):
        with pytest.raises(TypeError, match=r"`mesh` must be a jax\.sharding\.Mesh"):
            run(mesh=mesh)


def test_a_mesh_has_devices():
    with pytest.raises(ValueError, match="`mesh` must have one device or more"):
        train(mesh=Mesh(np.array([]), ("rows",)))


DEVICE = jax.devices()[0]


@pytest.mark.parametrize("devices", [3, "a", ["cpu"], [3], DEVICE, True], ids=str)
def test_devices_are_devices(devices):
    for call in (lambda v: fit(devices=v), lambda v: solve(devices=v)):
        with pytest.raises(TypeError, match="`devices` must be a list of devices"):
            call(devices)


@pytest.mark.parametrize("devices", [[], [DEVICE, DEVICE]], ids=str)
def test_devices_are_different(devices):
    for call in (lambda v: fit(devices=v), lambda v: solve(devices=v)):
        with pytest.raises(ValueError, match="`devices` must have one device or more"):
            call(devices)


FITS = {
    "num_steps": [0, -1, 2.5, "a", NAN],
    "batch_size": [0, 2.5, "a"],
    "patience": [0, -1, 2.5, "a", True],
    "validation_share": [-0.1, 1.0, "a", NAN, None, 1j],
    "checkpoint": [3, [1], True],
    "check": [None, 1, "yes"],
    "progress_bar": [None, 1, "yes"],
}


@pytest.mark.parametrize("name", FITS)
def test_options_of_a_fit_are_checked_before_it_simulates(name, monkeypatch):
    monkeypatch.setattr("numpyro_score.infer.amortized.simulator._run", None)
    for value in FITS[name]:
        with pytest.raises((ValueError, TypeError), match=f"`{name}` must"):
            fit(**{name: value})
        training = {name: value} if name != "progress_bar" else {"progress_bar": value}
        with pytest.raises((ValueError, TypeError), match=f"`{name}` must"):
            NPSE(pair, "y").fit_rounds(KEY, DATA[0], 400, training=training)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'"):
        NPSE(pair, "y").fit_rounds(KEY, DATA[0], 400, training={"epochs": 3})


def test_sites_are_named_once():
    names = ("y", "y")
    for name in ("observed", "latents"):
        with pytest.raises(ValueError, match=f"`{name}` must name every site once"):
            NPSE(pair, **({"observed": "y"} | {name: names}))


def test_observed_sites_are_those_of_the_model():
    for names in ("nope", ("y", "nope"), ("x", "y"), "", (), []):
        with pytest.raises(ValueError, match=r"`(observed|latents)`|site"):
            NPSE(pair, names).simulator()


def test_a_state_goes_on_with_its_own_optimizer_and_net():
    """Adam's averages were once carried along by other optimizers, without a word."""
    adam, sgd = (replace(TRAINER, optim=o(1e-3)) for o in (optax.adam, optax.sgd))
    state = adam.init(KEY, DATA)
    for trainer in (sgd, TRAINER, replace(TRAINER, optim=optax.rmsprop(1e-3))):
        with pytest.raises(ValueError, match="`init_state` must hold the state of `op"):
            trainer.run(KEY, 2, DATA, batch_size=8, init_state=state)
        with pytest.raises(ValueError, match="`state` must hold the state of `optim`"):
            trainer.update(state, DATA)
    wider = replace(adam, net=MLP(2, width=8, depth=1))
    with pytest.raises(ValueError, match="`init_state` must hold the weights of `net`"):
        wider.run(KEY, 2, DATA, batch_size=8, init_state=state)
    for value in (3, "a", state.params):
        with pytest.raises(TypeError, match="`init_state` must be a TrainState"):
            train(init_state=value)
    restarted = state._replace(opt_state=sgd.optim.init(state.params))  # the remedy
    sgd.run(KEY, 1, DATA, batch_size=8, init_state=restarted, progress_bar=False)


# Samplers


def learned(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


NORMAL = ScoreModel.from_fn(lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), ())


@pytest.mark.parametrize("number", [0, -1, 1, 2.5, "a", NAN, True, [3], ONES], ids=str)
def test_particles_of_metropolis_are_counted(number):
    with pytest.raises(ValueError, match="`num_particles` must be"):
        ParticleMetropolis(learned, num_particles=number)


NO_LEVELS = [0, -1, 2.5, "a", NAN, True, [], (NAN, 1.0), (1.0, -1.0), ("a",), None]


@pytest.mark.parametrize("levels", NO_LEVELS, ids=str)
def test_levels_of_metropolis_are_levels(levels):
    with pytest.raises(ValueError, match="`levels` must"):
        ParticleMetropolis(learned, levels=levels)


@pytest.mark.parametrize("levels", [(1.0, 2.0), (1.0, 1.0), (1e9, 1.0), (1e-9,)])
def test_levels_are_those_of_the_process(levels):
    """Levels beyond it were once left out, and all of them if units were wrong."""
    for kernel in (ParticleMetropolis, AnnealedLangevin):
        with pytest.raises(ValueError, match="`levels` must"):
            kernel(learned, levels=levels).init(KEY, 400, None, (0.3,))
    inference = ScoreSDE(learned, num_samples=2, levels=levels, progress_bar=False)
    with pytest.raises(ValueError, match="`levels` must"):
        inference.run(KEY, 0.3)


@pytest.mark.parametrize("name", ["exact", 3, True, ["fixed"], ONES], ids=str)
def test_covariances_are_named(name):
    with pytest.raises(ValueError, match="`covariance` must be"):
        ParticleMetropolis(learned, covariance=name)
    with pytest.raises(ValueError, match="`covariance` must be"):
        ScoreSDE(learned, num_samples=2, covariance=name)


def test_metropolis_takes_its_options_and_models_alone():
    for name in ("num_chains", "guidance", "num_moves"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            ParticleMetropolis(learned, **{name: 3})
    with pytest.raises(ValueError, match="must have a latent site with a ScoreDist"):
        ParticleMetropolis(model).init(KEY, 0, None, (0.3,))


def test_integers_of_numpy_are_integers():
    """They were once taken for sequences, and one step for several."""
    two = np.int64(2)
    assert "noise levels  2" in repr(ScoreSDE(learned, num_samples=two, levels=two))
    with pytest.warns(UserWarning, match="without weights"):
        AnnealedLangevin(learned, levels=two).init(KEY, 40, None, (0.3,))
    one, also_one = (
        ScoreLangevin(model, num_steps=n, friction=1.0) for n in (1, np.int64(1))
    )
    state = one.init(KEY, 0, ZEROS, (0.3,))
    moved, also_moved = (k.sample(state, (0.3,), {}) for k in (one, also_one))
    np.testing.assert_array_equal(moved.z["x"], also_moved.z["x"])


KERNEL_OF = {
    "ScoreLangevin": ScoreLangevin,
    "AnnealedLangevin": AnnealedLangevin,
    "ParallelTempering": ParallelTempering,
    "ParticleMetropolis": lambda model: ParticleMetropolis(learned),
}


@pytest.mark.parametrize("name", KERNEL_OF)
def test_there_is_one_key_for_each_chain(name):
    """Summaries once took three chains for two."""
    mcmc = MCMC(
        KERNEL_OF[name](model),
        num_warmup=100,
        num_samples=2,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    with pytest.raises(ValueError, match=r"one per chain.*Got 3 keys, num_chains=2"):
        mcmc.run(jax.random.split(KEY, 3), 0.3)
    for number in (0, -1, 2.5, "2"):  # NumPyro's own error
        with pytest.raises(ValueError, match="num_samples must be a positive integer"):
            MCMC(KERNEL_OF[name](model), num_warmup=2, num_samples=number)


LEGACY = jax.random.PRNGKey(0)


def test_legacy_keys_are_keys():
    for key in (LEGACY, np.asarray(LEGACY)):
        np.testing.assert_array_equal(EXACT.sample(key, (2,)), EXACT.sample(KEY, (2,)))
        state = ScoreLangevin(model).init(key, 4, None, (0.3,))
        np.testing.assert_array_equal(state.z["x"], start().z["x"])


PURE = {
    "simulation_based_calibration": lambda key: simulation_based_calibration(
        key, len, len, 2
    ),
    "tarp": lambda key: tarp(key, DATA, np.stack([DATA, DATA], 1)),
    "denoising_calibration": lambda key: denoising_calibration(key, EXACT, DATA),
    "denoising_loss": lambda key: denoising_loss(key, EXACT, DATA),
    "step_size_bias": lambda key: step_size_bias(key, len, DATA, 0.1),
    "simulate": lambda key: NPSE(pair, "y").simulator().simulate(key, 100),
    "sliced_wasserstein": lambda key: sliced_wasserstein(key, DATA, DATA),
    "pilot_times": lambda key: solver.pilot_times(key, EXACT, 4),
}


@pytest.mark.parametrize("key", NO_KEYS)
@pytest.mark.parametrize("name", PURE)
def test_functions_take_one_key(name, key):
    with pytest.raises(TypeError, match="`rng_key` must be one random key"):
        PURE[name](NO_KEYS[key])
