"""Bad input ends in an error that says what to do; bad steps are never kept."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, init_to_value

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score.kernel.monitoring import _is_away, warn_on_failure

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")

SDE = VE(sigma_min=0.1)


def learned(score_fn, event_shape=()) -> ScoreDistribution:
    return ScoreDistribution(ScoreModel.from_fn(score_fn, SDE, event_shape))


def model() -> None:
    numpyro.sample("x", dist.Normal(0, 1).expand([2]))
    numpyro.sample("s", dist.HalfNormal(1.0))


def square(z):
    return 0.5 * jnp.sum(z**2)


def sampler(kernel, **options) -> MCMC:
    defaults = {"num_warmup": 20, "num_samples": 50, "progress_bar": False}
    return MCMC(kernel, **(defaults | options))


# options

OPTIONS = [
    ({"step_size": 0.0}, r"`step_size` must be positive and finite.* Got 0\.0"),
    ({"step_size": -1.0}, r"`step_size` must be positive and finite.* Got -1\.0"),
    ({"step_size": float("nan")}, "`step_size` must be positive and finite.* Got nan"),
    ({"step_size": float("inf")}, "`step_size` must be positive and finite.* Got inf"),
    ({"num_steps": 0}, "`num_steps` must be an integer of at least 1.* Got 0"),
    ({"num_steps": -2}, "`num_steps` must be an integer of at least 1.* Got -2"),
    ({"num_steps": True}, "`num_steps` must be an integer of at least 1.* Got True"),
    ({"friction": 0.0}, r"`friction` must be positive and finite.* Got 0\.0"),
    ({"energy_variance": -1.0}, r"`energy_variance` must be positive.* Got -1\.0"),
    ({"target_accept_prob": 1.0}, r"`target_accept_prob` must lie in .* Got 1\.0"),
    ({"target_accept_prob": 0.0}, r"`target_accept_prob` must lie in .* Got 0\.0"),
    ({"num_nodes": 9}, "`num_nodes` must be 2, 3, 4 or 5.* Got 9"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ScoreLangevin(model, **options)


def test_neither_model_nor_potential():
    with pytest.raises(ValueError, match="Exactly one of `model` and `potential_fn`"):
        ScoreLangevin()


def test_both_model_and_potential():
    with pytest.raises(ValueError, match="Exactly one of `model` and `potential_fn`"):
        ScoreLangevin(model, potential_fn=square)


def test_wrapping_a_potential_function():
    with pytest.raises(ValueError, match="`wrap_model` needs a kernel with a `model`"):
        ScoreLangevin(potential_fn=square).wrap_model(lambda model: model)


# scores as forces

FORCES = [
    (lambda z: z[:1], ValueError, r"`score_fn` must .* Got \(1,\), expected \(2,\)"),
    (lambda z: {"x": z}, ValueError, "`score_fn` must return the structure and shapes"),
    (
        lambda z: z.astype(jnp.float16),
        TypeError,
        "`score_fn` must return the dtype .* Got float16, expected float32",
    ),
    (lambda z: z.astype(int), TypeError, "`score_fn` .* Got int32, expected float32"),
]


@pytest.mark.parametrize(("score_fn", "error", "message"), FORCES)
def test_force_of_another_kind(score_fn, error, message):
    kernel = ScoreLangevin(potential_fn=square, score_fn=score_fn)
    with pytest.raises(error, match=message):
        kernel.init(jax.random.key(0), 0, init_params=jnp.zeros(2))


def test_force_for_a_model_with_learned_sites():
    def with_learned():
        numpyro.sample("x", learned(lambda x, t: -x))

    kernel = ScoreLangevin(with_learned, score_fn=lambda z: z)
    with pytest.raises(ValueError, match="`score_fn` replaces the force of a known"):
        kernel.init(jax.random.key(0), 0)


# initial values

GOOD = {"x": jnp.zeros(2), "s": jnp.zeros(())}
SHAPES = {
    "another shape": GOOD | {"x": jnp.zeros(3)},
    "a missing site": {"x": jnp.zeros(2)},
    "an unknown site": GOOD | {"z": jnp.zeros(())},
    "no dict": jnp.zeros(3),
}
NUMBERS = {
    "nan": GOOD | {"x": jnp.array([0.0, jnp.nan])},
    "inf": GOOD | {"s": jnp.array(jnp.inf)},
}
METHODS = ["sequential", "vectorized", "parallel"]


def repeated(init_params):
    """Give every leaf a leading axis of two chains."""
    return jax.tree.map(lambda x: jnp.stack([x, x]), init_params)


@pytest.mark.parametrize("case", SHAPES)
def test_initial_values_of_another_shape(case):
    with pytest.raises(ValueError, match="`init_params` must hold one unconstrained"):
        sampler(ScoreLangevin(model)).run(jax.random.key(0), init_params=SHAPES[case])


@pytest.mark.parametrize("method", METHODS)
def test_initial_values_of_another_shape_for_chains(method):
    mcmc = sampler(ScoreLangevin(model), num_chains=2, chain_method=method)
    start = repeated(SHAPES["another shape"])
    with pytest.raises(ValueError, match="`init_params` must hold one unconstrained"):
        mcmc.run(jax.random.key(0), init_params=start)


@pytest.mark.parametrize("case", NUMBERS)
def test_initial_values_that_are_not_finite(case):
    with pytest.raises(ValueError, match=r"`init_params` must be finite.*\['[xs]'\]"):
        sampler(ScoreLangevin(model)).run(jax.random.key(0), init_params=NUMBERS[case])


@pytest.mark.parametrize("method", ["sequential", "vectorized"])
def test_one_chain_that_starts_at_infinity(method):
    mcmc = sampler(ScoreLangevin(model), num_chains=2, chain_method=method)
    start = jax.tree.map(lambda a, b: jnp.stack([a, b]), GOOD, NUMBERS["inf"])
    with pytest.raises(ValueError, match=r"must be finite.* Got 1 numbers"):
        mcmc.run(jax.random.key(0), init_params=start)


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's
@pytest.mark.parametrize("method", ["parallel", jax.vmap])
def test_infinite_start_inside_a_program_is_not_silent(method, case):
    """Values are traced there, so the program itself raises."""
    mcmc = sampler(ScoreLangevin(model), num_chains=2, chain_method=method)
    start = jax.tree.map(lambda a, b: jnp.stack([a, b]), GOOD, NUMBERS[case])
    errors = (ValueError, jax.errors.JaxRuntimeError)

    def run():
        mcmc.run(jax.random.key(0), init_params=start)
        jax.block_until_ready(mcmc.get_samples())

    with pytest.raises(errors, match="The potential is not finite at the initial"):
        run()
    # the other chain's program raises too; leave nothing behind for other tests
    with contextlib.suppress(*errors):
        jax.effects_barrier()


ANNEALED = AnnealedLangevin(model, levels=2)


def test_annealing_checks_its_initial_values():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="`init_params` must hold one unconstrained"):
        ANNEALED.init(key, 10, SHAPES["another shape"])
    start = jax.tree.map(lambda a, b: jnp.stack([a, b]), GOOD, NUMBERS["inf"])
    with pytest.raises(ValueError, match=r"must be finite.* Got 1 numbers"):
        ANNEALED.init(jax.random.split(key, 2), 10, start)


def test_annealing_needs_a_finite_prior():
    def impossible():
        numpyro.sample("x", dist.Normal(0, 1).mask(True))
        with numpyro.handlers.scale(scale=jnp.inf):
            numpyro.sample("y", dist.Normal(0, 1))

    with pytest.raises(ValueError, match="The potential is not finite at the initial"):
        AnnealedLangevin(impossible, levels=2).init(jax.random.key(0), 10)


def test_annealing_leaves_where_the_likelihood_is_zero():
    """A draw of the prior without likelihood is a start, not an error."""

    def bounded():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("wall", jnp.where(x > 0.5, 0.0, -jnp.inf))

    mcmc = MCMC(
        AnnealedLangevin(bounded, levels=10),
        num_warmup=100,
        num_samples=1,
        num_chains=400,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0))
    assert (mcmc.get_samples()["x"] > 0.5).all()
    cloud, truth = mcmc.last_state.weights, np.log(1 - dist.Normal(0, 1).cdf(0.5))
    assert abs(cloud.log_evidence - truth) < 4 * cloud.log_evidence_variance**0.5 + 0.01


def test_potential_function_without_initial_values():
    mcmc = sampler(ScoreLangevin(potential_fn=square))
    with pytest.raises(ValueError, match="`init_params` must be given"):
        mcmc.run(jax.random.key(0))


# starts where something is not finite


def test_potential_that_is_not_finite_at_the_start():
    kernel = ScoreLangevin(potential_fn=lambda z: jnp.log(z).sum())
    with pytest.raises(ValueError, match=r"The potential is not finite .* Got nan"):
        sampler(kernel).run(jax.random.key(0), init_params=jnp.array([-1.0]))


def test_gradient_that_is_not_finite_at_the_start():
    kernel = ScoreLangevin(potential_fn=lambda z: jnp.sqrt(z["x"]).sum())
    with pytest.raises(ValueError, match=r"The gradient is not finite .* \['x'\]"):
        sampler(kernel).run(jax.random.key(0), init_params={"x": jnp.zeros(1)})


def test_score_that_is_never_finite():
    def broken():
        numpyro.sample("x", learned(lambda x, t: x * jnp.nan))

    kernel = ScoreLangevin(broken, init_strategy=init_to_value(values={"x": 0.5}))
    with pytest.raises(ValueError, match=r"The gradient is not finite .* \['x'\]"):
        sampler(kernel).run(jax.random.key(0))


def test_model_without_a_finite_start():
    def impossible():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.factor("never", jnp.where(x > -1e9, -jnp.inf, 0.0))

    with pytest.raises(
        RuntimeError, match=r"Cannot find valid initial parameters.*'never' \(observed"
    ):
        sampler(ScoreLangevin(impossible)).run(jax.random.key(0))


@pytest.mark.filterwarnings("ignore:.*Out-of-support values:UserWarning")
def test_observations_without_density_are_named():
    def counts(y, z):
        rate = numpyro.sample("rate", dist.LogNormal(0, 1))
        numpyro.sample("y", dist.Poisson(rate), obs=y)
        numpyro.sample("z", dist.Normal(rate, 1), obs=z)

    data = jnp.array([2, 0, -1]), jnp.array([0.5, 1.0])
    message = "'y' must be observed .* Got 1 of 3 values, such as -1, outside of"
    with pytest.raises(ValueError, match=message):
        sampler(ScoreLangevin(counts)).run(jax.random.key(0), *data)


@pytest.mark.filterwarnings("ignore:.*Out-of-support values:UserWarning")
@pytest.mark.parametrize(
    ("law", "y", "text"),
    [
        (dist.Bernoulli, [1.0, 2.0, 0.5], "2 of 3 values, such as 2.0"),
        (dist.Geometric, [3.0, -1.0], "1 of 2 values, such as -1.0"),
        (partial(dist.Beta, 2.0), [0.5, 0.2, 1.5, -0.5], "2 of 4 values, such as 1.5"),
    ],
)
def test_observations_outside_of_a_support_with_a_finite_formula_are_named(
    law, y, text
):
    def outside(y):
        p = numpyro.sample("p", dist.Beta(2, 2))
        numpyro.sample("y", law(p), obs=y)

    with pytest.raises(ValueError, match=f"'y' must be .* Got {text}, outside"):
        sampler(ScoreLangevin(outside)).run(jax.random.key(0), jnp.array(y))


# steps that go wrong are flagged and reverted


def cliff(x, t):
    """The score of N(0, 1), broken beyond 1.5."""
    return jnp.where(jnp.abs(x) > 1.5, jnp.nan, -x)


def beyond_cliff() -> None:
    numpyro.sample("x", learned(cliff))


@pytest.mark.parametrize("adjusted", [True, False])
def test_score_that_turns_nan_is_flagged_and_reverted(adjusted):
    kernel = ScoreLangevin(
        beyond_cliff,
        step_size=1.0,
        adapt_step_size=False,
        adjusted=adjusted,
        init_strategy=init_to_value(values={"x": 0.1}),
    )
    mcmc = sampler(kernel, num_samples=500)
    mcmc.run(jax.random.key(0), extra_fields=("energy_error",))
    draws, extra = mcmc.get_samples()["x"], mcmc.get_extra_fields()
    diverging = np.asarray(extra["diverging"])
    assert 10 < diverging.sum() < 400
    assert np.isfinite(draws).all()
    assert (np.abs(draws) <= 1.5).all()
    assert np.isnan(extra["energy_error"][diverging]).all()
    stayed = np.diff(draws, prepend=draws[:1]) == 0
    assert stayed[1:][diverging[1:]].all()
    assert np.isfinite(mcmc.last_state.momentum).all()


def test_adaptation_survives_nan():
    kernel = ScoreLangevin(beyond_cliff, init_strategy=init_to_value(values={"x": 0.1}))
    mcmc = sampler(kernel, num_warmup=200)
    mcmc.run(jax.random.key(0))
    assert np.isfinite(mcmc.last_state.adapt_state.step_size)
    assert np.isfinite(mcmc.last_state.adapt_state.inverse_mass_matrix).all()
    assert np.std(mcmc.get_samples()["x"]) > 0.1


def test_step_of_infinite_energy_is_flagged():
    def wall(z):
        return jnp.where(jnp.abs(z).max() > 1, jnp.inf, 0.5 * jnp.sum(z**2))

    kernel = ScoreLangevin(
        potential_fn=wall, step_size=1.0, num_steps=2, adapt_step_size=False
    )
    mcmc = sampler(kernel, num_samples=200)
    mcmc.run(jax.random.key(0), init_params=jnp.zeros(2))
    assert (np.abs(mcmc.get_samples()) <= 1).all()
    assert 0 < mcmc.get_extra_fields()["diverging"].sum() < 200


# warnings of chains that do not move or drift to infinity, when the program runs


def run_and_wait(mcmc, **start) -> None:
    mcmc.run(jax.random.key(0), **start)
    jax.block_until_ready(mcmc.get_samples())
    jax.effects_barrier()


def needle(z):
    """Finite at the origin alone."""
    return jnp.where(jnp.abs(z).max() > 1e-6, jnp.inf, 0.0)


@pytest.mark.parametrize("adjusted", [True, False])
def test_stuck_chains_are_spoken_of(adjusted):
    kernel = ScoreLangevin(
        potential_fn=needle, adapt_step_size=False, adjusted=adjusted, num_steps=1
    )
    options = {"num_warmup": 0, "num_samples": 101, "num_chains": 3}
    mcmc = sampler(kernel, chain_method="vectorized", **options)
    start = {"init_params": jnp.zeros((3, 2))}
    with pytest.warns(UserWarning, match=r"3 of 3 chain\(s\) accepted next to no"):
        run_and_wait(mcmc, **start)
    assert mcmc.get_extra_fields()["diverging"].all()


@pytest.mark.slow
@pytest.mark.parametrize(("offset", "warns"), [(1e7, True), (1e5, False)])
def test_potential_beyond_its_precision_is_spoken_of(offset, warns, recwarn):
    kernel = ScoreLangevin(potential_fn=lambda z: offset + 0.5 * jnp.sum(z**2))
    run_and_wait(sampler(kernel, num_warmup=100), init_params=jnp.ones(2))
    messages = [str(w.message) for w in recwarn]
    assert any("resolves 1 nats only" in message for message in messages) == warns
    with jax.enable_x64(True):
        recwarn.clear()
        run_and_wait(sampler(kernel, num_warmup=100), init_params=jnp.ones(2))
        assert not recwarn.list


@pytest.mark.filterwarnings("ignore:Some donated buffers:UserWarning")  # NumPyro's
@pytest.mark.slow
def test_one_stuck_chain_among_many_and_under_vmap():
    def nearly(z):
        """Beyond 40 only one point is not of infinite energy."""
        wall = jnp.where(z.max() == 50, 0.0, jnp.inf)
        return jnp.where(z.max() > 40, wall, 0.5 * jnp.sum(z**2))

    kernel = ScoreLangevin(
        potential_fn=nearly, adapt_step_size=False, step_size=0.1, num_steps=1
    )
    start = jnp.array([[0.0], [50.0], [1.0]])
    for method in ("vectorized", jax.vmap):
        mcmc = sampler(
            kernel, num_chains=3, num_samples=101, num_warmup=0, chain_method=method
        )
        with pytest.warns(UserWarning, match="stand still") as warned:
            run_and_wait(mcmc, init_params=start)
        messages = [str(w.message) for w in warned if "stand still" in str(w.message)]
        assert len(messages) == 1
        assert messages[0].startswith("1 of 3 chain(s)")


@pytest.mark.parametrize(("num_stuck", "warns"), [(2, False), (4, True)])
def test_few_of_many_particles_may_stand_still(num_stuck, warns, recwarn):
    kernel = ScoreLangevin(potential_fn=square, adapt_step_size=False)
    keys = jax.random.split(jax.random.key(0), 64)
    state = kernel.init(keys, 0, jnp.ones((64, 2)), (), {})
    stuck = jnp.where(jnp.arange(64) < num_stuck, 0.0, 0.5)
    state = state._replace(i=state.i + 100, mean_accept_prob=stuck)
    warn_on_failure(state, may_stay=0.05)
    jax.effects_barrier()
    messages = " ".join(str(w.message) for w in recwarn)
    assert (f"{num_stuck} of 64 chain(s)" in messages) == warns


def flat_real() -> None:
    numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), (2,)))


def flat_positive() -> None:
    numpyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))


FLAT = [flat_real, pytest.param(flat_positive, marks=pytest.mark.slow)]


@pytest.mark.parametrize("flat", FLAT)
@pytest.mark.parametrize(
    "adjusted", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_flat_posterior_is_spoken_of(flat, adjusted):
    kernel = ScoreLangevin(flat, adjusted=adjusted, num_steps=1, friction=None)
    mcmc = sampler(kernel, num_warmup=200, num_chains=2, chain_method="vectorized")
    with pytest.warns(UserWarning, match=r"2 of 2 chain\(s\) are beyond"):
        run_and_wait(mcmc)
    assert np.isfinite(mcmc.last_state.z["x"]).all()


def test_latents_of_large_scale_are_not_spoken_of():
    """Far out is where nothing holds a chain, in whatever units."""
    z = jnp.array([[2.5e9, 1.0], [3.5e9, 1.0], [2.5e9, 1.0], [-3e9, 1.0]])
    force = (z - jnp.array([3e9, 0.0])) / jnp.array([1e18, 1.0])
    force = force.at[2:].set(jnp.array([[0.0, 1.0], [1.0, 1.0]]))
    assert _is_away({"x": z}, {"x": force}, (4,)).tolist() == [False, False, True, True]


@pytest.mark.slow
def test_improper_prior_with_data_is_not_spoken_of():
    def fine():
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(x, 1e3), obs=5e3)

    run_and_wait(sampler(ScoreLangevin(fine), num_warmup=300, num_samples=200))


@pytest.mark.parametrize(
    "kernel",
    [ScoreLangevin, partial(AnnealedLangevin, levels=3), ParallelTempering],
    ids=["ScoreLangevin", "AnnealedLangevin", "ParallelTempering"],
)
def test_unknown_extra_fields_are_named(kernel):
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(x, 1), obs=0.5)

    options = {"num_chains": 40, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel(model), num_warmup=60, num_samples=5, **options)
    message = r"`extra_fields` must name fields of .*potential_energy.*Got 'energies'"
    with pytest.raises(ValueError, match=message):
        mcmc.run(jax.random.key(0), extra_fields=("energies",))
