"""What people see of a fit at the prompt: short, and never arrays."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import numpyro_score.solver
from numpyro_score import (
    MLP,
    VE,
    VP,
    ParticleMetropolis,
    ScoreMatching,
    ScoreModel,
    ScoreSDE,
)
from numpyro_score.consistency.distillation import ConsistencyResult
from numpyro_score.consistency.model import init_model
from numpyro_score.data.standardize import Affine
from numpyro_score.guidance.discriminator import Discriminator, DiscriminatorResult
from numpyro_score.infer import NPSE, OneStepPosterior
from numpyro_score.infer.amortized.posterior import AmortizedPosterior
from numpyro_score.reprs import WIDTH, repr_lines, short_number, short_repr
from numpyro_score.score.denoiser import NetDenoiser
from numpyro_score.train.state import ScoreMatchingRunResult

NET = MLP(1, width=8, depth=1, context_size=3)
SHOWN = ("event shape", "(1,)", "process", "VE(sigma_max=10.0)", "0.01 to 10", "net")


def assert_short(text: str) -> None:
    assert len(text.splitlines()) <= 10
    for word in ("Array", "array", "dtype", "Param", "object at", "<function"):
        assert word not in text


def model():
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(0, scale).expand([3]).to_event(1))


def trained(num_steps=0, validation=None, **options):
    """A result as of a run, without training."""
    data = 1.0 + jax.random.uniform(jax.random.key(0), (40, 1))
    trainer = ScoreMatching(NET, sde=VE(sigma_max=10.0), **options)
    contexts = jnp.zeros((40, 3))
    state = trainer.init(jax.random.key(1), data, context=contexts)
    losses = jnp.linspace(2.0, 1.0, num_steps)
    score = trainer.get_score(state)
    return ScoreMatchingRunResult(score, losses, validation, state)


@pytest.fixture(scope="module")
def result():
    return trained(101, jnp.array([1.5, 0.25, 0.5]))


def test_training_result_says_what_was_learned_and_how_far(result):
    text = repr(result)
    assert_short(text)
    weights = sum(leaf.size for leaf in jax.tree.leaves(result.state.params))
    losses = "1.98 at first, 1.02 at the end of 101 steps"  # means of five steps
    assert all(word in text for word in (*SHOWN, f"{weights:,} weights", losses))
    assert "0.5 at the end, 0.25 at best" in text


def summary_of(result, capsys):
    result.print_summary()
    return capsys.readouterr().out


def test_summary_of_training_says_what_was_found(result, capsys):
    ended = result.state._replace(step=jnp.array(5), num_steps=jnp.array(5.0))
    good = result._replace(state=ended, validation_losses=jnp.array([3.0, 2.0, 1.0]))
    text = summary_of(good, capsys)
    assert text.startswith(repr(good))
    assert "Level in use: 0.01 standard deviations of the data, the lowest" in text
    assert text.endswith("No finding.\n")
    early = good._replace(state=ended._replace(num_steps=jnp.array(20.0)))
    assert "- early: the run ended at step 5 of 20." in summary_of(early, capsys)
    for losses, found in [
        ([1.0, 2.0, 3.0], "- overfit: the validation loss was lowest in block 1 of 3"),
        ([1.0, jnp.nan], "- validation: a loss is not finite"),
    ]:
        poor = good._replace(validation_losses=jnp.array(losses))
        text = summary_of(poor, capsys)
        assert found in text
        assert "No finding" not in text


def test_summary_of_training_tells_a_raised_level(result, capsys, monkeypatch):
    monkeypatch.setattr("numpyro_score.score.model.measure_level", lambda score: 0.1)
    text = summary_of(result, capsys)
    assert "Level in use: 0.1 standard deviations of the data, above the lowest" in text
    assert "- level: below 0.1 the score is no gradient" in text


def test_results_of_other_trainings(capsys):
    unit, losses = Affine.identity((1,)), jnp.array([2.0, 1.0])
    student = init_model(jax.random.key(0), NET, VE(sigma_max=10.0), unit, (1,))
    text = summary_of(ConsistencyResult(student, losses), capsys)
    assert_short(text)
    assert "2 at first, 1 at the end of 2 steps" in text
    net = Discriminator(None, student.graphdef)
    for advantage, found in [(0.3, "will be corrected"), (0.1, "stays as it is")]:
        parts = jnp.array(advantage), jnp.array(0.1), losses
        text = summary_of(DiscriminatorResult(net, *parts), capsys)
        assert_short(text)
        assert f"{advantage} +- 0.1 nats" in text
        assert found in text


def test_particle_metropolis_is_short():
    text = repr(ParticleMetropolis(model, num_particles=4, levels=(3.0, 1.0)))
    assert_short(text)
    assert text == "ParticleMetropolis(model=model, num_particles=4, levels=(3.0, 1.0))"


def test_result_without_steps_has_a_repr():
    text = repr(trained())
    assert "no steps" in text
    assert "validation" not in text


def test_support_is_named():
    score = trained(support=constraints.interval(0.0, 5.0)).score
    assert_short(repr(score))
    assert "unconstrained; Interval of data" in repr(score)


def test_score_model_and_posteriors(result):
    simulator = NPSE(model, "y").simulator()
    posterior = AmortizedPosterior(result.score, simulator)
    unit = Affine.identity((1,))
    student = init_model(jax.random.key(0), NET, VE(sigma_max=10.0), unit, (1,))
    one_step = OneStepPosterior(student, simulator)
    for thing in (result.score, posterior, student, one_step):
        assert_short(repr(thing))
        assert max(map(len, repr(thing).splitlines())) <= WIDTH
        assert repr(thing).startswith(type(thing).__name__)
        assert all(word in repr(thing) for word in (*SHOWN, "weights"))
    for thing in (posterior, one_step):
        assert "scale ()" in repr(thing)
        assert "y (3,)" in repr(thing)
    assert f"DPMSolverPP(), {posterior.num_steps} steps" in repr(posterior)


def test_score_function_is_named():
    def my_score(x, t):
        return -x / (1 + VP().sigma(t) ** 2)

    text = repr(ScoreModel.from_fn(my_score, VP(), event_shape=(2, 2)))
    assert_short(text)
    assert "my_score" in text
    assert "(2, 2)" in text


def test_net_that_is_no_configuration_has_a_repr(result):
    denoiser = dataclasses.replace(result.score.denoiser, config=None)
    assert isinstance(denoiser, NetDenoiser)
    assert "weights in a net" in repr(
        dataclasses.replace(result.score, denoiser=denoiser)
    )


def test_repr_of_traced_values_says_so(result):
    texts = []

    def program(result):
        texts.append(repr(result))
        return result.losses

    jax.jit(program)(result._replace(state=None))
    assert "traced at first" in texts[0]


def solvers() -> list:
    everything = map(vars(numpyro_score.solver).get, numpyro_score.solver.__all__)
    lazy = [numpyro_score.solver.Adaptive, numpyro_score.solver.AdaptiveSDE]
    base = numpyro_score.solver.Solver
    found = [c for c in everything if inspect.isclass(c) and issubclass(c, base)]
    return [c for c in {*found, *lazy} if not inspect.isabstract(c)]


@pytest.mark.parametrize("solver", sorted(solvers(), key=lambda c: c.__name__))
def test_solver_is_one_line(solver):
    text = repr(solver())
    assert_short(text)
    assert text.startswith(f"{solver.__name__}(")
    assert "\n" not in text


def test_guided_sampler_says_what_it_will_do():
    text = repr(
        ScoreSDE(model, num_samples=7, num_particles=50, levels=(3.0, 1.0, 0.1))
    )
    assert_short(text)
    for word in ("model", "7 per chain", "50", "levels  3\n", "run           no"):
        assert word in text


def test_long_lines_are_cut():
    [_, line] = repr_lines("A", {"b": "x" * 200}).splitlines()
    assert len(line) == WIDTH
    assert line.endswith("...")


def test_short_repr_hides_arrays_and_defaults():
    @dataclasses.dataclass
    class Options:
        a: int = 1
        b: object = None
        c: tuple = ()

    assert short_repr(Options()) == "Options()"
    assert short_repr(Options(a=2, b=np.zeros((2, 3)))) == "Options(a=2, b=array(2, 3))"
    assert short_repr(Options(c=(jnp.zeros(2),))) == "Options(c=(array(2,),))"
    assert short_number(jnp.pi) == "3.142"
