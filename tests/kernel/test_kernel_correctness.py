"""Kernels leave their targets as they are; mutants of every kind do not.

Ratios of densities (Grosse and Duvenaud 2014), joint distributions of parameters and
data (Geweke 2004), starts at draws of the target, and simulation-based calibration
(Talts et al. 2018). Statistics are compared by their standard errors over independent
chains.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.infer import MCMC
from scipy import stats

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score import langevin as langevin_module
from numpyro_score.kernel import transition as transition_module
from numpyro_score.langevin import (
    IntegratorState,
    IntegratorTarget,
    PointState,
    obab,
    persistence,
)
from numpyro_score.model import potential as potential_module
from numpyro_score.model.potential import ModelPotential
from tests.kernel.test_posteriordb import eight_schools, kidiq, load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals"),
]

SDE = VE(sigma_min=0.1)
FIXED = {"adapt_step_size": False, "adapt_mass_matrix": False}
MALA = {"num_steps": 1, "friction": None}
MEMBERS = {
    "MALA": MALA,
    "MALT": {"num_steps": 4, "friction": 1.0},
    "GHMC": {"num_steps": 1, "friction": 0.3},
}


def learned_normal() -> ScoreDistribution:
    """N(0, 1), of which only the score is known."""

    def score_fn(x: Any, t: Any) -> Any:
        return -x / (1 - SDE.sigma_min**2 + SDE.sigma(t) ** 2)

    return ScoreDistribution(ScoreModel.from_fn(score_fn, SDE, ()))


def hierarchy(y: Any) -> None:
    """A learned location, an ordinary scale."""
    loc = numpyro.sample("loc", learned_normal())
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("y", dist.Normal(loc, scale).expand([3]), obs=y)


def log_joint(z: dict, y: Any) -> Any:
    """The same by hand, in unconstrained space: log scale is Normal(0, 1/2)."""
    log_prior = stats_normal(z["loc"], 0.0, 1.0) + stats_normal(z["scale"], 0.0, 0.5)
    return log_prior + stats_normal(y, z["loc"], jnp.exp(z["scale"])).sum()


def stats_normal(x: Any, mean: Any, sd: Any) -> Any:
    return -0.5 * ((x - mean) / sd) ** 2 - jnp.log(sd) - 0.5 * jnp.log(2 * jnp.pi)


def draw_joint(key: Any) -> tuple[dict, Any]:
    """Draw latents, in unconstrained space, and data."""
    key_loc, key_scale, key_y = jax.random.split(key, 3)
    z = {
        "loc": jax.random.normal(key_loc),
        "scale": 0.5 * jax.random.normal(key_scale),
    }
    return z, draw_data(key_y, z)


def draw_data(key: Any, z: dict) -> Any:
    return z["loc"] + jnp.exp(z["scale"]) * jax.random.normal(key, (3,))


# mutants


def forget_jacobian(monkeypatch: Any) -> None:
    right = potential_module.potential_energy

    def wrong(model, args, kwargs, z, enum=False):
        return right(model, args, kwargs, z, enum=enum) + z["scale"]

    monkeypatch.setattr(potential_module, "potential_energy", wrong)


def forget_prior(monkeypatch: Any) -> None:
    none = jnp.zeros(()), jnp.zeros(())
    monkeypatch.setattr(
        ModelPotential, "learned_difference_with_error", lambda self, a, b: none
    )


def change_sign(monkeypatch: Any) -> None:
    """Walk uphill in potential, without a word to the accept step."""

    def wrong(momentum, gradient, step_size):
        return momentum + 0.5 * step_size * gradient

    monkeypatch.setattr(langevin_module, "kick", wrong)


def change_noise(monkeypatch: Any) -> None:
    right = transition_module.standard_normal

    def wrong(*args, **options):
        return 1.2 * right(*args, **options)

    monkeypatch.setattr(transition_module, "standard_normal", wrong)


def keep_momentum(monkeypatch: Any) -> None:
    """Reject without turning round."""
    monkeypatch.setattr(transition_module, "flip_momentum", lambda momentum: momentum)


def flip_error(monkeypatch: Any) -> None:
    """Accept by the inverse of the ratio."""
    right = transition_module._adjusted

    def wrong(*args):
        start, end, error, halving = right(*args)
        return start, end, -error, halving

    monkeypatch.setattr(transition_module, "_adjusted", wrong)


def must_fail(check: Callable, *args: Any) -> None:
    with pytest.raises(AssertionError):
        check(*args)


# ratios of densities, in double precision


def check_ratio() -> None:
    """-error is log p(z') q(z|z') - log p(z) q(z'|z) for every proposal of MALA."""
    y = jnp.array([0.3, -0.8, 1.5])
    sd = np.array([0.5, 0.3])  # in the order of the sites: loc, scale
    h = 0.5
    kernel = ScoreLangevin(
        hierarchy,
        step_size=h,
        inverse_mass_matrix=jnp.array(sd**2),
        num_nodes=5,
        **(MALA | FIXED),
    )
    z = {"loc": jnp.array(0.4), "scale": jnp.array(-0.3)}
    state = kernel.init(jax.random.key(0), 0, z, (y,), {})
    keys = jax.random.split(jax.random.key(1), 300)

    @jax.jit
    @jax.vmap
    def move(key: Any) -> Any:
        return kernel.sample(state._replace(rng_key=key), (y,), {})

    after = move(keys)
    moved = np.asarray(after.z["loc"] != z["loc"])
    assert moved.mean() > 0.5
    gradient = jax.grad(log_joint)

    def log_proposal(start: dict, end: dict) -> Any:
        drift = {k: start[k] + h**2 / 2 * s**2 * g for (k, g), s in pairs(start)}
        return sum(
            stats_normal(end[k], drift[k], h * s)
            for k, s in zip(sorted(end), sd, strict=True)
        )

    def pairs(start: dict) -> Any:
        return zip(sorted(gradient(start, y).items()), sd, strict=True)

    def log_ratio(end: dict) -> Any:
        forth, back = log_proposal(z, end), log_proposal(end, z)
        return log_joint(end, y) + back - log_joint(z, y) - forth

    expected = jax.vmap(log_ratio)(after.z)
    gap = np.asarray(expected + after.energy_error)[moved]
    assert np.abs(gap).max() < 1e-9


def test_acceptance_is_a_ratio_of_densities():
    with jax.enable_x64(True):
        check_ratio()


# the noise is no part of the ratio; other tests see its scale
@pytest.mark.parametrize("mutant", [forget_jacobian, forget_prior, change_sign])
def test_wrong_ratios_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with jax.enable_x64(True):
        must_fail(check_ratio)


def check_path_ratio(error_sign: float = 1.0) -> None:
    """Several steps: the ratio of the densities of a path and its reverse."""
    h, friction, num_steps = 0.6, 0.8, 5
    energy = partial(jnp.sum, axis=-1)

    def potential(y: Any) -> Any:
        return energy(0.25 * y**4 + jnp.sin(y))

    def visit(y: Any) -> PointState:
        value, gradient = jax.value_and_grad(potential)(y)
        return PointState(y, gradient, value)

    target = IntegratorTarget(visit, lambda a, b: b.aux - a.aux)
    eta = float(persistence(h, friction))
    noise = jax.random.normal(jax.random.key(0), (num_steps, 2))
    phase = IntegratorState(visit(jnp.array([0.4, -1.0])), jnp.array([0.3, -0.2]))
    start, total, log_ratio = phase, 0.0, 0.0
    for n in noise:
        refreshed = eta * phase.momentum + np.sqrt(1 - eta**2) * n
        # O from p to p', and its reverse from -p' to -p
        forth = stats_normal(refreshed, eta * phase.momentum, np.sqrt(1 - eta**2))
        back = stats_normal(-phase.momentum, -eta * refreshed, np.sqrt(1 - eta**2))
        log_ratio += energy(back - forth)
        phase, error = obab(n, phase, h, friction, target)
        total += error_sign * error

    def log_density(phase: IntegratorState) -> Any:
        position = -potential(phase.place.position)
        return position + energy(stats_normal(phase.momentum, 0.0, 1.0))

    log_ratio += log_density(phase) - log_density(start)
    assert abs(float(log_ratio + total)) < 1e-12


def test_energy_errors_of_many_steps_are_a_ratio_of_densities(monkeypatch):
    with jax.enable_x64(True):
        check_path_ratio()
        must_fail(check_path_ratio, -1.0)


# chains that start at draws of their target


def check_unchanged(before: Any, after: Any, names: str = "") -> None:
    """Means of z and z^2 move by less than 4.5 standard errors of the difference."""
    before, after = (np.asarray(z, float) for z in (before, after))
    center, scale = before.mean(0), before.std(0)
    for power in (1, 2):
        moved = ((after - center) / scale) ** power - (
            (before - center) / scale
        ) ** power
        error = moved.std(0) / np.sqrt(len(moved))
        assert (np.abs(moved.mean(0)) < 4.5 * error).all(), (names, power)
        assert (error > 0).all()


def log_gamma(z: Any) -> Any:
    """The potential of log x for x ~ Gamma(2, 1)."""
    return jnp.sum(jnp.exp(z) - 2 * z)


def advance(kernel: Any, state: Any, num: int, args: tuple = ()) -> Any:
    @jax.jit
    def run(state: Any) -> Any:
        return jax.lax.fori_loop(
            0, num, lambda _, state: kernel.sample(state, args, {}), state
        )

    return run(state)


def check_invariance(member: dict, size: int = 100_000) -> None:
    kernel = ScoreLangevin(potential_fn=log_gamma, step_size=1.3, **member, **FIXED)
    start = np.log(np.random.default_rng(0).gamma(2.0, size=(size, 1)))
    start = jnp.asarray(start, jnp.float32)
    keys = jax.random.split(jax.random.key(1), size)
    state = kernel.init(keys, 0, start, (), {})
    state = advance(kernel, state, 6)
    check_unchanged(start, state.z)


@pytest.mark.parametrize("member", MEMBERS)
def test_exact_draws_stay_exact(member):
    check_invariance(MEMBERS[member])


MUTANTS = [
    ("MALA", change_noise),
    ("MALT", change_noise),
    ("GHMC", change_noise),
    ("MALA", flip_error),
    ("MALT", flip_error),
    ("GHMC", flip_error),
    ("GHMC", keep_momentum),
]


@pytest.mark.parametrize(("member", "mutant"), MUTANTS)
def test_mutants_move_exact_draws(member, mutant, monkeypatch):
    mutant(monkeypatch)
    must_fail(check_invariance, MEMBERS[member])


def check_gaussian_variance(friction: float | None, size: int = 100_000) -> None:
    """BAOAB and Leimkuhler-Matthews have no bias in a Gaussian, at any step."""

    def potential(z: Any) -> Any:
        return 0.5 * jnp.sum(z**2)

    kernel = ScoreLangevin(
        potential_fn=potential,
        step_size=1.0,
        num_steps=40,
        friction=friction,
        adjusted=False,
        **FIXED,
    )
    start = jax.random.normal(jax.random.key(0), (size, 1))
    keys = jax.random.split(jax.random.key(1), size)
    state = advance(kernel, kernel.init(keys, 0, start, (), {}), 1)
    assert not state.diverging.any()
    assert abs(float(state.z.var()) - 1) < 4.5 * np.sqrt(2 / size)


UNADJUSTED = {"Leimkuhler-Matthews": None, "kinetic": 1.0}


@pytest.mark.parametrize("member", UNADJUSTED)
def test_unadjusted_chains_keep_a_gaussian(member):
    check_gaussian_variance(UNADJUSTED[member])


def refresh_first(monkeypatch: Any) -> None:
    """Euler-Maruyama: fresh noise in every step, not averaged over two."""

    def wrong(noise, phase, step_size, friction, target):
        return obab(noise, phase, step_size, friction, target)

    monkeypatch.setattr(transition_module, "baoab", wrong)


@pytest.mark.parametrize("member", UNADJUSTED)
@pytest.mark.parametrize("mutant", [refresh_first, change_noise, change_sign])
def test_mutants_widen_a_gaussian(member, mutant, monkeypatch):
    mutant(monkeypatch)
    must_fail(check_gaussian_variance, UNADJUSTED[member])


def schools_start(reference: dict) -> dict:
    """Reference draws of mu, tau and theta in the unconstrained space of the model."""
    mu, tau = reference["mu"], reference["tau"]
    theta = np.stack([reference[f"theta[{j}]"] for j in range(1, 9)], -1)
    standard = (theta - mu[..., None]) / tau[..., None]
    return {"mu": mu, "standard": standard, "tau": np.log(tau)}


def kidiq_start(reference: dict) -> dict:
    beta = np.stack([reference[f"beta[{j}]"] for j in range(1, 5)], -1)
    return {"beta": beta, "sigma": np.log(reference["sigma"])}


REFERENCES = {
    "eight_schools-eight_schools_noncentered": (eight_schools, schools_start),
    "kidiq-kidscore_interaction": (kidiq, kidiq_start),
}


def check_reference(name: str, member: dict) -> None:
    model, start_of = REFERENCES[name]
    data, reference = load(name)
    start = jax.tree.map(np.concatenate, start_of(reference))
    size = len(jax.tree.leaves(start)[0])
    assert size >= 5000
    flat = jax.vmap(lambda z: ravel_pytree(z)[0])(start)
    covariance = np.cov(np.asarray(flat, np.float64).T)
    bound = partial(model, **data)
    kernel = ScoreLangevin(
        bound,
        step_size=0.6,
        dense_mass=True,
        inverse_mass_matrix=jnp.asarray(covariance),
        **member,
        **FIXED,
    )
    keys = jax.random.split(jax.random.key(0), size)
    start = jax.tree.map(lambda z: jnp.asarray(z, jnp.float32), start)
    state = advance(kernel, kernel.init(keys, 0, start, (), {}), 10)
    assert float(state.accept_prob.mean()) > 0.4
    end = jax.vmap(lambda z: ravel_pytree(z)[0])(state.z)
    check_unchanged(flat, end, name)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("name", REFERENCES)
def test_reference_draws_stay_reference_draws(name, member):
    check_reference(name, MEMBERS[member])


@pytest.mark.parametrize("mutant", [flip_error, change_noise])
def test_mutants_move_reference_draws(mutant, monkeypatch):
    mutant(monkeypatch)
    must_fail(check_reference, "kidiq-kidscore_interaction", MALA)


# the joint distribution of parameters and data


def start_at(kernel: Any) -> Callable:
    """Return what makes a state of a kernel at given latents, as after its warm-up."""
    annealed = isinstance(kernel, AnnealedLangevin)
    z, y = draw_joint(jax.random.key(0))
    first = kernel.init(jax.random.key(0), int(annealed), z, (y,), {})

    def start(key: Any, z: dict, momentum: Any) -> Any:
        if not annealed:
            return first._replace(rng_key=key, z=z, momentum=momentum)
        chain = first.chain._replace(z=z, momentum=momentum)
        state = first._replace(rng_key=key, chain=chain, beta=jnp.ones(()))
        return state._replace(i=first.i + first.plan.num_transitions)

    return start


def check_joint(kernel: Any, refresh: bool = True, sweeps: int = 10) -> None:
    """Alternate transitions given data and data given latents: the joint stays."""
    keys = jax.random.split(jax.random.key(2), 20_000)
    start = start_at(kernel)

    def one(key: Any) -> tuple[Any, Any]:
        key_joint, key_momentum, key_loop, key = jax.random.split(key, 4)
        z, y = draw_joint(key_joint)
        state = start(key, z, jax.random.normal(key_momentum, (2,)))
        state = kernel.refresh(state, (y,), {})

        def sweep(carry: tuple, key: Any) -> tuple:
            state, y = carry
            if refresh:
                state = kernel.refresh(state, (y,), {})
            state = kernel.sample(state, (y,), {})
            return (state, draw_data(key, state.z)), None

        loop_keys = jax.random.split(key_loop, sweeps)
        (state, y_end), _ = jax.lax.scan(sweep, (state, y), loop_keys)
        return gather(z, y), gather(state.z, y_end)

    def gather(z: dict, y: Any) -> Any:
        spread = jnp.log(jnp.std(y))
        product = z["loc"] * y.mean()
        return jnp.stack([z["loc"], z["scale"], y.mean(), spread, product])

    before, after = jax.jit(jax.vmap(one))(keys)
    check_unchanged(before, after)


JOINT = {
    "MALT": ScoreLangevin(
        hierarchy, step_size=0.5, num_nodes=5, **MEMBERS["MALT"], **FIXED
    ),
    "MALA": ScoreLangevin(hierarchy, step_size=0.5, num_nodes=5, **MALA, **FIXED),
    "AnnealedLangevin": AnnealedLangevin(
        hierarchy, levels=1, step_size=0.5, num_nodes=5, adapt_step_size=False
    ),
}


@pytest.mark.parametrize("kernel", JOINT)
def test_joint_distribution_of_parameters_and_data(kernel):
    check_joint(JOINT[kernel])


@pytest.mark.parametrize(
    "mutant", [forget_jacobian, forget_prior, change_noise, flip_error]
)
@pytest.mark.parametrize("kernel", ["MALA", "AnnealedLangevin"])
def test_mutants_change_the_joint_distribution(kernel, mutant, monkeypatch):
    mutant(monkeypatch)
    must_fail(check_joint, JOINT[kernel])


def test_stale_data_change_the_joint_distribution(monkeypatch):
    def keep(self: Any, state: Any, *arguments: Any) -> Any:
        return state

    monkeypatch.setattr(ScoreLangevin, "refresh_for_data", keep)
    must_fail(check_joint, JOINT["MALA"], False)


# simulation-based calibration


def check_ranks(ranks: Any, num_draws: int) -> None:
    """Ranks of the truth among draws of its posterior are uniform."""
    for name, rank in ranks.items():
        counts = np.bincount(np.asarray(rank), minlength=num_draws + 1)
        assert counts.sum() >= 20 * len(counts)
        assert stats.chisquare(counts).pvalue > 1e-3, name


def ranks_of(make: Callable, num_sets: int, num_draws: int, **options: Any) -> dict:
    """Return the ranks of true latents among draws, over simulated data sets."""
    step = options.pop("step")

    def one(key: Any) -> dict:
        key_joint, key_run = jax.random.split(key)
        z, y = draw_joint(key_joint)
        mcmc = MCMC(make(hierarchy), progress_bar=False, **options)
        mcmc.run(key_run, y)
        draws = mcmc.get_samples()
        truth = {"loc": z["loc"], "scale": jnp.exp(z["scale"])}
        return {k: (draws[k][::step][:num_draws] < truth[k]).sum() for k in truth}

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), num_sets))


def langevin_ranks() -> dict:
    make = partial(ScoreLangevin, num_steps=4, friction=1.0)
    return ranks_of(make, 400, 15, num_warmup=150, num_samples=240, step=16)


def annealed_ranks() -> dict:
    make = partial(AnnealedLangevin, levels=8)
    options = {"num_chains": 150, "chain_method": "vectorized"}
    return ranks_of(make, 320, 15, num_warmup=48, num_samples=1, step=10, **options)


def test_langevin_is_calibrated():
    check_ranks(langevin_ranks(), 15)


@pytest.mark.long
def test_langevin_without_jacobian_is_not_calibrated(monkeypatch):
    """Ranks of 400 data sets see no smaller faults; the checks above do."""
    forget_jacobian(monkeypatch)
    must_fail(check_ranks, langevin_ranks(), 15)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:AnnealedLangevin. the 150 particles:UserWarning")
def test_annealed_langevin_is_calibrated():
    check_ranks(annealed_ranks(), 15)
