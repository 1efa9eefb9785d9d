"""Halved steps: reversible, volume preserving, and right where equal steps are not."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_score import VE, ScoreDistribution, ScoreLangevin, ScoreModel
from numpyro_score.kernel import step_halving
from numpyro_score.kernel.step_halving import MAX_VARIATION, HalvingRecord, halved_step
from numpyro_score.langevin import IntegratorState, IntegratorTarget, PointState

FIXED = {"adapt_step_size": False, "adapt_mass_matrix": False}
STEP, MOST = 0.8, 3


def funnel(y):
    """Neal's funnel in two dimensions: sds from e^-3 to e^3."""
    return 0.5 * (jnp.square(y[0] / 2) + jnp.square(y[1]) * jnp.exp(-y[0]) + y[0])


def visit(y):
    value, gradient = jax.vmap(jax.value_and_grad(funnel), -1, -1)(y)
    return PointState(y, gradient, value)


TARGET = IntegratorTarget(visit, lambda a, b: b.aux - a.aux)


def phases(number):
    rng = np.random.default_rng(0)
    v = 2 * rng.normal(size=number)
    x = np.exp(v / 2) * rng.normal(size=number)
    return jnp.asarray(np.stack([v, x])), jnp.asarray(rng.normal(size=(2, number)))


@jax.jit
def step(y, momentum):
    phase = IntegratorState(visit(y), momentum)
    active, size = jnp.ones(y.shape[1:], bool), jnp.full(y.shape[1:], STEP)
    end, error, record = halved_step(phase, size, TARGET, MOST, active)
    return end.place.position, end.momentum, error, record


# against the algorithm in words, one chain at a time


class Attempt(NamedTuple):
    y: Any
    momentum: Any
    energies: list

    def keeps_energy(self):
        return max(self.energies) - min(self.energies) <= MAX_VARIATION


def attempt(y, momentum, level):
    """Return 2^level leapfrogs; they end where the energy is lost."""
    h, (v, x) = STEP / 2**level, y
    v, x, p, q = float(v), float(x), *map(float, momentum)

    def force(v, x):
        inverse = np.exp(-v)
        return -(v / 4 - 0.5 * x * x * inverse + 0.5), -x * inverse

    def energy():
        value = 0.5 * (v * v / 4 + x * x * np.exp(-v) + v)
        return value + 0.5 * (p * p + q * q)

    found = Attempt(y, momentum, [energy()])
    for _ in range(2**level):
        if not found.keeps_energy():
            break
        f, g = force(v, x)
        p, q = p + h / 2 * f, q + h / 2 * g
        v, x = v + h * p, x + h * q
        f, g = force(v, x)
        p, q = p + h / 2 * f, q + h / 2 * g
        found = Attempt((v, x), (p, q), [*found.energies, energy()])
    return found


def expected_step(y, momentum):
    """Return the end, the level, gradients, and whether the way back is another."""
    count = 0
    for level in range(MOST + 1):
        forth = attempt(y, momentum, level)
        count += len(forth.energies) - 1
        if forth.keeps_energy():
            break
    else:
        return None, MOST, count, False
    turned = tuple(-p for p in forth.momentum)
    for coarser in range(level):
        back = attempt(forth.y, turned, coarser)
        count += len(back.energies) - 1
        if back.keeps_energy():
            return forth, level, count, True
    return forth, level, count, False


def test_steps_are_those_of_the_algorithm():
    with jax.enable_x64(True):
        y, momentum = phases(300)
        end, turned, error, record = jax.tree.map(np.asarray, step(y, momentum))
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)
    seen = set()
    for i in range(300):
        forth, level, count, irreversible = expected_step(y[:, i], momentum[:, i])
        assert record.max_halvings[i] == level
        assert record.num_gradients[i] == count
        assert record.insufficient[i] == (forth is None)
        assert record.irreversible[i] == irreversible
        seen.add((level, forth is None, irreversible))
        if forth is not None and not irreversible:
            close(end[:, i], forth.y)
            close(turned[:, i], forth.momentum)
            close(error[i], forth.energies[-1] - forth.energies[0])
        else:
            assert error[i] == np.inf
    assert {level for level, *_ in seen} == set(range(MOST + 1))
    assert {(True, False), (False, True), (False, False)} == {case[1:] for case in seen}


def test_steps_lead_back_with_the_opposite_energy_error():
    with jax.enable_x64(True):
        y, momentum = phases(2000)
        end, turned, error, record = step(y, momentum)
        back, returned, error_back, record_back = step(end, -turned)
    kept = ~np.asarray(record.failed)
    assert 0.1 < (np.asarray(record.max_halvings)[kept] > 0).mean() < 0.9
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8)
    close(back[:, kept], y[:, kept])
    close(-returned[:, kept], momentum[:, kept])
    close(error_back[kept], -error[kept])
    assert not np.asarray(record_back.failed)[kept].any()
    np.testing.assert_array_equal(
        record_back.max_halvings[kept], record.max_halvings[kept]
    )


def test_steps_preserve_volume():
    with jax.enable_x64(True):
        y, momentum = phases(200)

        def flow(phase):
            end, turned, _, record = step(phase[:2, None], phase[2:, None])
            return jnp.concatenate([end[:, 0], turned[:, 0]]), record

        jacobian, record = jax.jit(jax.vmap(jax.jacfwd(flow, has_aux=True), 1))(
            jnp.concatenate([y, momentum])
        )
        kept = ~np.asarray(record.failed)[:, 0]
        volumes = np.abs(np.linalg.det(np.asarray(jacobian)[kept]))
    np.testing.assert_allclose(volumes, 1.0, rtol=1e-8)


# chains that start at draws of their target


def steep(z):
    """The potential of log x for x ~ Gamma(2, 1), steep on one side."""
    return jnp.sum(jnp.exp(z) - 2 * z)


def move(kernel, start, num_transitions=4):
    """Return by how many standard errors means of z and z^2 move, and the record."""
    size = len(jax.tree.leaves(start)[0])
    state = kernel.init(jax.random.split(jax.random.key(1), size), 0, start)
    advance = jax.jit(
        lambda state: jax.lax.fori_loop(
            0, num_transitions, lambda _, state: kernel.sample(state, (), {}), state
        )
    )
    after = advance(state)
    before, z = (np.concatenate(jax.tree.leaves(x), -1) for x in (start, after.z))
    gaps = np.stack([z - before, z**2 - before**2])
    return np.abs(gaps.mean(1) / (gaps.std(1) / len(before) ** 0.5)).max(), after


def check_steep(size=20_000):
    kernel = ScoreLangevin(
        potential_fn=steep,
        step_size=2.2,
        num_steps=3,
        friction=1.0,
        max_step_halvings=3,
        **FIXED,
    )
    start = np.log(np.random.default_rng(0).gamma(2.0, size=(size, 1)))
    moved, state = move(kernel, jnp.asarray(start, float))
    assert float(state.halving.irreversible.mean()) > 0.05
    assert moved < 4.5


def test_exact_draws_stay_exact():
    check_steep()


def test_mutant_that_does_not_look_back_is_caught(monkeypatch):
    def never(end, step_size, target, halvings, active):
        start = step_halving._Search.begin(end)
        return start._replace(num_gradients=start.num_gradients + 1)

    monkeypatch.setattr(step_halving, "_coarser_way_back", never)
    with pytest.raises(AssertionError):
        check_steep()


def test_learned_sites_keep_their_law():
    """A step of 2.5 is unstable in a normal law, of which only the score is known."""
    sde = VE(sigma_min=0.1)

    def score_fn(x, t):
        return -x / (1 - sde.sigma_min**2 + sde.sigma(t) ** 2)

    def model():
        numpyro.sample("x", ScoreDistribution(ScoreModel.from_fn(score_fn, sde, (1,))))

    options = {"num_steps": 2, "friction": 1.0, "max_step_halvings": 3}
    kernel = ScoreLangevin(model, step_size=2.5, num_nodes=2, **options, **FIXED)
    start = {"x": jax.random.normal(jax.random.key(0), (20_000, 1))}
    moved, state = move(kernel, start)
    assert moved < 4.5
    assert float(state.accept_prob.mean()) > 0.3
    assert float(state.halving.max_halvings.mean()) > 0.9


# a run


def neal():
    v = numpyro.sample("v", dist.Normal(0, 3))
    numpyro.sample("x", dist.Normal(0, jnp.exp(v / 2)).expand([9]).to_event(1))


def draw_neal(max_step_halvings):
    """Return v of Neal's funnel, centred, from 64 chains that start at random."""
    kernel = ScoreLangevin(
        neal,
        step_size=0.3,
        num_steps=16,
        max_step_halvings=max_step_halvings,
        **FIXED,
    )
    mcmc = MCMC(
        kernel,
        num_warmup=500,
        num_samples=1000,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), extra_fields=("num_steps",))
    return np.asarray(mcmc.get_samples(group_by_chain=True)["v"]), mcmc


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("max_step_halvings", "right"), [(6, True), (0, False)])
def test_funnel_is_sampled_down_to_its_neck(max_step_halvings, right):
    v, _ = draw_neal(max_step_halvings)
    chains = v.mean(1)
    error = chains.std(ddof=1) / 8
    near = abs(v.mean()) < 4 * error and abs(v.std() / 3 - 1) < 0.1
    assert near == right
    assert (np.quantile(v, 0.01) < -5) == right


def test_state_counts_gradients_and_keeps_nothing_where_steps_are_equal():
    def easy(z):
        return 0.5 * jnp.square(z).sum()

    start = jnp.zeros((3, 2))
    for most in (0, 2):
        options = {"num_steps": 5, "step_size": 0.1, "max_step_halvings": most}
        kernel = ScoreLangevin(potential_fn=easy, **options, **FIXED)
        _, state = move(kernel, start, num_transitions=1)
        np.testing.assert_array_equal(state.num_steps, 5)
        assert (state.halving is None) == (most == 0)
        assert state.run_view.kind.halves == (most == 0)  # what a verdict advises
    np.testing.assert_array_equal(state.halving.max_halvings, 0)


def test_model_without_latent_sites():
    def model():
        numpyro.sample("y", dist.Normal(0, 1), obs=0.0)

    kernel = ScoreLangevin(model, max_step_halvings=2)
    state = kernel.sample(kernel.init(jax.random.key(0), 1), (), {})
    assert not bool(state.diverging)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_step_halvings": -1}, "`max_step_halvings` must be an integer"),
        ({"max_step_halvings": 11}, "at most 10"),
        ({"max_step_halvings": 3, "adjusted": False}, "needs `adjusted=True`"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        ScoreLangevin(neal, **options)


def test_a_trajectory_that_failed_once_has_failed():
    none = HalvingRecord.zero()
    yes, three = jnp.array(True), jnp.array(3)
    for failed in (none._replace(irreversible=yes), none._replace(insufficient=yes)):
        assert bool(failed.then(none).failed)
        assert bool(none.then(failed).failed)
    record = none._replace(max_halvings=three, num_gradients=three).then(
        none._replace(max_halvings=jnp.array(1), num_gradients=jnp.array(2))
    )
    assert not bool(record.failed)
    assert (int(record.max_halvings), int(record.num_gradients)) == (3, 5)
