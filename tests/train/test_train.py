"""Training: what is learned, and everything that can go wrong on the way."""

import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from numpyro_score import MLP, VE, ScoreMatching
from numpyro_score.data.standardize import Affine
from numpyro_score.loss import DenoisingScoreMatching
from numpyro_score.train.optimizer import TrainStep, apply_gradients
from tests.targets import MIXTURE, z_scores

DATA = MIXTURE.sample(jax.random.key(0), (20_000,))
LEVELS = (0.1, 0.3, 1.0, 5.0)  # in standard deviations of the data
SMALL = MLP(2, width=8, depth=1)
FEW = DATA[:300]


def arrays(tree):
    """Return the leaves, keys as the numbers that they hold."""
    return [
        jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else leaf
        for leaf in jax.tree.leaves(tree)
    ]


def leaves_equal(one, other):
    return all(map(np.array_equal, arrays(one), arrays(other)))


# What is learned


@pytest.fixture(scope="module")
def learned():
    trainer = ScoreMatching(MLP(2, width=64, depth=2))
    return trainer.run(jax.random.key(1), 1200, DATA, progress_bar=False)


def relative_fisher_divergence(score, level):
    """Return E |s - s*|^2 / E |s*|^2 over the noisy law at a level."""
    sigma = level * score.standardize.scale  # one per coordinate, in physical units
    x0 = MIXTURE.sample(jax.random.key(2), (4000,))
    x = x0 + sigma * jax.random.normal(jax.random.key(3), x0.shape)
    exact = jax.vmap(lambda x: MIXTURE.score(x, 1.0, sigma))(x)
    error = (score.score(x, score.sde.time(level)) - exact) * sigma
    return float(jnp.mean(error**2) / jnp.mean((exact * sigma) ** 2))


def assert_learned(score, bound):
    for level in LEVELS:
        assert relative_fisher_divergence(score, level) < bound, level


def assert_draws(score, slack):
    """Check mode weights and moments of draws, up to the error of learning."""
    draws = score.sample(jax.random.key(4), (4000,))
    sigma = score.sde.sigma_min * score.standardize.scale
    weights = jax.vmap(lambda x: MIXTURE.responsibilities(x, 1.0, sigma))(draws)
    assert np.all(z_scores(weights, MIXTURE.weights, slack) < 5)
    assert np.all(z_scores(draws, MIXTURE.means(), slack) < 5)
    variances = MIXTURE.variances(1.0, sigma)
    assert np.all(z_scores((draws - MIXTURE.means()) ** 2, variances, 3 * slack) < 5)


def test_learned_score_is_near_the_exact_one(learned):
    assert_learned(learned.score, 0.05)
    # the loss of the best denoiser is not zero, but that of the silent net is higher
    assert learned.losses[-200:].mean() < 0.95 * learned.losses[:20].mean()


def test_draws_have_the_right_mode_weights_and_moments(learned):
    assert_draws(learned.score, slack=0.03)


@pytest.mark.slow
@pytest.mark.long
def test_longer_training_of_the_default_net_is_better():
    result = ScoreMatching(MLP(2)).run(
        jax.random.key(5), 4000, DATA, progress_bar=False
    )
    assert_learned(result.score, 0.015)
    assert_draws(result.score, slack=0.02)


@dataclass(frozen=True)
class UphillLoss:
    """A mutant that learns to be wrong: the score's sign is flipped."""

    def __call__(self, key, denoise, x0, sde):
        def flipped(x, level):
            return 2 * x - denoise(x, level)

        return DenoisingScoreMatching()(key, flipped, x0, sde)


def test_wrong_objective_is_caught():
    trainer = ScoreMatching(SMALL, loss=UphillLoss())
    result = trainer.run(jax.random.key(6), 200, FEW, progress_bar=False)
    with pytest.raises(AssertionError):
        assert_learned(result.score, 0.5)


def test_training_does_not_depend_on_units():
    """Data in other units give the same score in those units, by the same program."""
    trainer = ScoreMatching(SMALL)
    scale, shift = jnp.array([100.0, 0.01]), jnp.array([7.0, -3.0])
    run = [jax.random.key(7), 40]
    one = trainer.run(*run, FEW, progress_bar=False)
    other = trainer.run(*run, shift + scale * FEW, progress_bar=False)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-3)
    x, t = FEW[:5], trainer.sde.time(0.5)
    expected = one.score.score(x, t) / scale
    moved = other.score.score(shift + scale * x, t)
    np.testing.assert_allclose(moved * scale, expected * scale, rtol=2e-2, atol=1e-2)


# How it runs


class CountingLoss:
    """Denoising score matching that counts how often it is traced."""

    def __init__(self):
        self.traces = 0

    def __call__(self, key, denoise, x0, sde):
        self.traces += 1
        return DenoisingScoreMatching()(key, denoise, x0, sde)


@pytest.fixture(scope="module")
def trainer():
    return ScoreMatching(SMALL, loss=CountingLoss())


def run(trainer, seed=0, num_steps=45, data=FEW, **options):
    options = {"batch_size": 32, "progress_bar": False, **options}
    return trainer.run(jax.random.key(seed), num_steps, data, **options)


@pytest.fixture(scope="module")
def first(trainer):
    return run(trainer)


def test_result_has_a_loss_per_step(first):
    assert first.losses.shape == (45,)
    assert np.isfinite(first.losses).all()
    assert first.validation_losses is None
    assert int(first.state.step) == 45


def test_same_key_same_result(trainer, first):
    again = run(trainer)
    np.testing.assert_array_equal(again.losses, first.losses)
    assert leaves_equal(again.state.params, first.state.params)
    assert leaves_equal(again.score, first.score)


def test_other_key_other_result(trainer, first):
    other = run(trainer, seed=1)
    assert not np.array_equal(other.losses, first.losses)
    assert not leaves_equal(other.state.params, first.state.params)


def test_second_run_compiles_nothing(trainer, first):
    """45 steps end in a short block; new data and keys of the same shapes come too."""
    before = trainer.loss.traces
    assert before >= 1
    run(trainer, seed=2, data=FEW + 1.0)
    assert trainer.loss.traces == before
    run(trainer, data=FEW[:200])
    assert trainer.loss.traces > before


def test_progress_bar_changes_nothing(trainer, first, capsys):
    shown = run(trainer, progress_bar=True)
    np.testing.assert_array_equal(shown.losses, first.losses)
    assert leaves_equal(shown.score, first.score)
    assert "45/45" in capsys.readouterr().err
    run(trainer)
    assert capsys.readouterr().err == ""


def test_validation_losses_are_those_of_evaluate(trainer, first):
    result = run(trainer, validation=DATA[300:400])
    assert result.validation_losses.shape == (15,)  # blocks of 3 steps
    assert leaves_equal(result.score.denoiser, first.score.denoiser)
    last = trainer.evaluate(result.state, DATA[300:400])
    np.testing.assert_allclose(result.validation_losses[-1], last, rtol=1e-5)
    assert len(set(result.validation_losses.tolist())) > 1


def test_evaluate_is_deterministic(trainer, first):
    one, again = (trainer.evaluate(first.state, FEW) for _ in range(2))
    assert float(one) == float(again)
    assert float(trainer.evaluate(first.state, 3 * FEW)) != float(one)


def test_run_continues_where_a_state_left_off(trainer):
    """Two halves of one schedule are the whole, bit for bit."""
    start = trainer.init(jax.random.key(8), FEW, num_steps=60)
    whole = run(trainer, num_steps=60, init_state=start)
    half = run(trainer, num_steps=30, init_state=start)
    rest = run(trainer, num_steps=30, init_state=half.state)
    np.testing.assert_array_equal(
        np.concatenate([half.losses, rest.losses]), whole.losses
    )
    assert leaves_equal(rest.state, whole.state)


def test_continued_run_goes_on_learning(trainer, first):
    """The schedule is extended: at its old end the rate is zero."""
    more = run(trainer, init_state=first.state)
    assert int(more.state.step) == 90
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).max(), more.state.params, first.state.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_update_is_what_run_repeats(trainer):
    state = trainer.init(jax.random.key(9), FEW)
    next_state, loss = jax.jit(trainer.update)(state, FEW[:32])
    assert int(next_state.step) == 1
    assert np.isfinite(loss)
    assert not leaves_equal(next_state.params, state.params)
    assert leaves_equal(next_state.ema_params, next_state.params)  # of one step


def test_average_weighs_steps_by_their_power(trainer):
    """EMA weights are the mean of iterates k with weights k^gamma, in the limit."""
    gamma, num = 6.94, 2000  # a relative width of 10 % (Karras et al. 2024)
    steady = optax.sgd(1 / num)  # weights of k / num after k steps of gradient -1
    once = TrainStep(trainer._problem, steady)
    state = once.init(jnp.zeros(()), None, jax.random.key(0))

    def step(_, state):
        return apply_gradients(steady, state, 0.0, -jnp.ones(()), lambda p: -p)

    state = jax.jit(lambda s: jax.lax.fori_loop(0, num, step, s))(state)
    np.testing.assert_allclose(state.params, 1.0, rtol=1e-4)
    np.testing.assert_allclose(
        state.ema_params, (gamma + 1) / (gamma + 2), rtol=1e-3
    )  # with gamma or gamma + 2 for gamma + 1: 1.5 % less, 1.1 % more


def test_module_is_trained_as_it_is(trainer):
    module = SMALL(rngs=nnx.Rngs(3))
    state = ScoreMatching(module).init(jax.random.key(10), FEW)
    assert leaves_equal(state.params, nnx.split(module)[1])


def test_standardization_can_be_chosen():
    state = ScoreMatching(SMALL, standardize=Affine.shared).init(jax.random.key(0), FEW)
    assert float(state.fixed.standardize.scale[0]) == float(
        state.fixed.standardize.scale[1]
    )
    state = ScoreMatching(SMALL).init(jax.random.key(0), FEW)
    np.testing.assert_allclose(state.fixed.standardize.scale, FEW.std(0), rtol=1e-4)


# Faults


def breaking_optimizer(step):
    """Return an optimizer whose update number ``step`` (from 0) is NaN."""
    rate = lambda count: jnp.where(count == step, jnp.nan, -1e-3)  # noqa: E731
    return optax.scale_by_schedule(rate)


@pytest.mark.parametrize(
    ("bad_update", "kept"),
    [(30, 30), (31, 30), (39, 38)],
    ids=["first step of a block", "last step of a block", "last step of the run"],
)
def test_broken_weights_stop_the_run_at_the_last_good_state(bad_update, kept):
    """Blocks have 2 steps. A NaN update after a finite loss counts as well."""
    trainer = ScoreMatching(SMALL, optim=breaking_optimizer(bad_update))
    with pytest.warns(UserWarning, match=f"not finite at step 3.*after step {kept}"):
        result = run(trainer, num_steps=40)
    assert result.losses.shape == (kept,)
    assert int(result.state.step) == kept
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.score))


def test_loss_that_breaks_at_once_raises():
    trainer = ScoreMatching(SMALL, optim=breaking_optimizer(0))
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        run(trainer, num_steps=40)


class DivergingLoss:
    """Turns NaN once the net has learned something."""

    def __call__(self, key, denoise, x0, sde):
        loss = DenoisingScoreMatching()(key, denoise, x0, sde)
        silent = jnp.allclose(
            denoise(jnp.ones((1, 2)), jnp.ones(1)), jnp.full((1, 2), 0.5), atol=1e-3
        )
        return jnp.where(silent, loss, jnp.nan)


def test_nan_loss_stops_the_run_at_the_last_good_state():
    trainer = ScoreMatching(SMALL, loss=DivergingLoss(), optim=optax.sgd(1e-5))
    with pytest.warns(UserWarning, match="Lower the learning rate"):
        result = run(trainer, num_steps=4000, validation=FEW)
    assert 0 < len(result.losses) < 4000
    assert np.isfinite(result.losses).all()
    assert len(result.validation_losses) * 200 == len(result.losses)
    assert int(result.state.step) == len(result.losses)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (FEW.at[7, 1].set(jnp.nan), {}, r"`data` must be finite.*1 bad rows.*\[7\]"),
        (FEW.at[3, 0].set(jnp.inf), {}, "`data` must be finite"),
        (np.full((300, 2), 1e300), {}, "`data` must be finite.*300 bad rows of 300"),
        (FEW.at[:, 0].set(0.1), {}, r"vary in every column.*columns: \[0\]"),
        (FEW[:, :1], {}, r"`x` must have as many numbers.*\(1,\), expected 2"),
        (FEW[:, 0], {}, r"`x` must have as many numbers.*\(\), expected 2"),
        (jnp.array(1.0), {}, r"one row per sample. Got shape \(\)"),
        (FEW[:0], {}, r"one row per sample. Got shape \(0, 2\)"),
        (np.array([["a", "b"]]), {}, "must be an array of real numbers"),
        (FEW, {"batch_size": 301}, "`batch_size` must lie.*=301, 300 rows"),
        (FEW, {"batch_size": 0}, "`batch_size` must lie"),
        (FEW, {"num_steps": 0}, "`num_steps` must be an integer of at least 1.*Got 0"),
        (FEW, {"validation": FEW[:, :1]}, r"`validation`.*\(1,\), expected \(2,\)"),
        (FEW, {"validation": FEW * jnp.nan}, "`validation` must be finite"),
    ],
)
def test_bad_data_are_refused_before_any_step(data, options, message):
    loss = CountingLoss()
    with pytest.raises(ValueError, match=message):
        run(ScoreMatching(SMALL, loss=loss), data=data, **options)
    assert loss.traces == 0


def test_data_must_fit_the_state_that_is_continued(trainer, first):
    with pytest.raises(ValueError, match=r"`data` must have rows.*\(1,\), expected"):
        run(trainer, data=FEW[:, :1], init_state=first.state)


@dataclass(frozen=True)
class BrokenNet:
    """A net whose raw output is passed through a mistake."""

    mistake: str

    def __call__(self, *, rngs):
        return BrokenModule(self.mistake, rngs=rngs)


class BrokenModule(nnx.Module):
    def __init__(self, mistake, *, rngs):
        self.mistake = mistake
        self.linear = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x, noise, context=None):
        output = self.linear(x)
        match self.mistake:
            case "shape":
                return output[:1]
            case "dtype":
                return output.astype(int)
            case "kind":
                return output, noise


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        ("shape", ValueError, r"`net` must return the shape.*\(1,\), expected \(2,\)"),
        ("dtype", TypeError, "`net` must return one floating-point array.*Got int"),
        ("kind", TypeError, "`net` must return one floating-point array.*Got tuple"),
    ],
)
def test_net_with_wrong_output_is_refused(mistake, error, message):
    with pytest.raises(error, match=message):
        run(ScoreMatching(BrokenNet(mistake)))


def test_levels_out_of_order_are_refused():
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        ScoreMatching(SMALL, sde=VE(sigma_min=2.0, sigma_max=1.0))


def test_a_good_run_warns_of_nothing(trainer, first):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(trainer)
