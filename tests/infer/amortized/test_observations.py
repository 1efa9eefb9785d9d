"""NPSE and its observations: heavy tails, and values that no simulation covers."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import ndtri
from scipy.stats import probplot

from numpyro_score import MLP
from numpyro_score.data.context_scale import (
    FAR_PROBABILITY,
    ContextScale,
    _expected_range,
    _normal_scores,
)
from numpyro_score.data.standardize import Affine
from numpyro_score.infer import NPSE, learn_joint
from numpyro_score.infer.amortized.objective import is_heavy_tailed
from numpyro_score.infer.amortized.simulation_check import (
    check_digits,
    warn_of_angles,
    warn_of_drawn_angles,
)
from numpyro_score.infer.amortized.simulator import Simulator
from tests.npse_models import exact_gaussian
from tests.targets import unchecked

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=5000)
HEAVY = {
    "counts": RNG.poisson(np.exp(3 * NORMAL)),
    "counts with zeros": RNG.poisson(np.exp(2 + 2 * NORMAL)) * (RNG.random(5000) < 0.6),
    "log-normal": np.exp(3 * NORMAL),
    "negative": -np.exp(2 * NORMAL),
    "Cauchy": RNG.standard_cauchy(5000),
    "Student": RNG.standard_t(1.5, 5000),
}
LIGHT = {
    "normal": 1e6 + NORMAL,
    "uniform": RNG.random(5000),
    "exponential": RNG.exponential(size=5000),
    "binary": (RNG.random(5000) < 0.02).astype(float),
    "two modes": 0.1 * NORMAL + np.sign(RNG.normal(size=5000)),
    "constant": np.full(5000, 0.3),
}


def columns(values):
    return jnp.asarray(values, float)[:, None]


def fitted(values):
    return ContextScale.fit(columns(values))


def normality(values):
    """Return r^2 of values with normal quantiles; ties, as of counts, lower it."""
    return probplot(values.astype(float))[1][2] ** 2


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_tails_become_nearly_normal(name):
    u = np.asarray(fitted(HEAVY[name]).forward(columns(HEAVY[name])))[:, 0]
    assert np.abs(u).max() < 8 < np.abs(HEAVY[name] / HEAVY[name].std()).max()
    assert normality(u) > 0.8 > normality(HEAVY[name])
    assert abs(u.std() - 1) < 1e-3
    order = np.argsort(HEAVY[name])
    assert (np.diff(u[order]) >= 0).all()


@pytest.mark.parametrize("name", LIGHT)
def test_other_numbers_are_only_shifted_and_scaled(name):
    rows = columns(LIGHT[name])
    np.testing.assert_array_equal(
        fitted(LIGHT[name]).forward(rows), Affine.context(rows).forward(rows)
    )


def test_fresh_rows_are_hardly_ever_far():
    for law in (RNG.normal, RNG.exponential, RNG.random, RNG.standard_cauchy):
        far = [
            np.asarray(ContextScale.fit(rows[:500]).is_far(rows[500:]))
            for rows in (jnp.asarray(law(size=(1000, 10))) for _ in range(20))
        ]
        # any number of a row: 10,000 rows, one expected
        assert np.any(far, axis=-1).sum() <= 12 * FAR_PROBABILITY * 10_000


def test_ties_share_the_mean_of_their_normal_scores():
    first, second, third, fourth = ndtri((np.arange(4) + 0.625) / 4.25)
    scores = _normal_scores(np.array([3.0, 1.0, 2.0, 1.0]))
    tied = (first + second) / 2
    np.testing.assert_allclose(scores, [fourth, tied, third, tied], rtol=1e-5)
    assert abs(_normal_scores(HEAVY["counts"].astype(float)).mean()) < 1e-3


@pytest.mark.parametrize("numbers", [1, 20])
def test_a_new_row_is_far_by_about_the_stated_chance(numbers):
    """In any of its numbers, of exponential law, at both sides: of e^-high at each."""
    rng, none = np.random.default_rng(0), np.zeros(numbers)
    chances = []
    for _ in range(4000 // numbers):
        rows = rng.exponential(size=(500, numbers)) * rng.choice([-1, 1], numbers)
        low, high = _expected_range(rows, none, none)
        chances.append(np.exp(-np.where(rows[0] > 0, high, -low)).sum())
    # up to the bias of a tail of 20 values, about twice
    assert 1 / 3 < np.mean(chances) / (FAR_PROBABILITY / 2) < 3


@pytest.mark.parametrize("value", [-7.0, 7.0, 1e9])
def test_values_beyond_the_tail_are_far(value):
    assert fitted(NORMAL).is_far(jnp.full(1, value)).all()
    assert not fitted(NORMAL).is_far(jnp.full(1, np.sign(value) * 3.0)).any()


# Warnings


def several_sites_model():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("count", dist.Poisson(jnp.exp(x)))
    numpyro.sample("y", dist.Normal(x, jnp.ones(2)).to_event(1))
    numpyro.deterministic("flat", 0.1 + 0.2 * jnp.ones(2))


USUAL = {"count": 1, "y": np.array([0.5, -0.2]), "flat": np.array([0.3, 0.3])}


@pytest.fixture(scope="module")
def posterior():
    net = MLP(1, width=8, depth=1, context_size=5)
    npse = NPSE(several_sites_model, ("count", "y", "flat"), net=net)
    return npse.fit(KEY, 1000, num_steps=2, check=False, progress_bar=False)


def test_usual_observations_pass(posterior):
    posterior.sample(KEY, USUAL, 2)


@pytest.mark.parametrize(
    ("site", "value", "message"),
    [
        ("count", -1, r"'count' is impossible: .* Got -1\."),
        ("count", 2.5, r"'count' is impossible: .* Got 2\.5\."),
        ("count", 10**6, r"'count' is far from all simulations.* Got 1e\+06; sim"),
        ("y", [0.0, 40.0], r"'y' is far .* Got 40 at \[1\]; simulated: -[3-9]"),
        ("flat", [0.3, 0.4], r"'flat' is far.* Got 0\.4 at \[1\]; simulated: always 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is far from all simulations")
@pytest.mark.filterwarnings("ignore:.*is impossible")
def test_observations_without_simulations_are_named(posterior, site, value, message):
    observation = USUAL | {site: value}
    with pytest.warns(UserWarning, match=message):
        posterior.sample(KEY, observation, 2)


def two_measurements_model():
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 0.1 * jnp.ones(2)).to_event(1))


def test_numbers_that_are_far_together_are_told(tmp_path):
    net = MLP(1, width=8, depth=1, context_size=2)
    npse = NPSE(two_measurements_model, "y", net=net)
    posterior = npse.fit(KEY, 1000, num_steps=2, check=False, progress_bar=False)
    posterior.sample(KEY, jnp.array([1.5, 1.4]), 2)
    match = "'y' is far from all simulations, though each.* sd from their mean"
    with pytest.warns(UserWarning, match=match):
        posterior.sample(KEY, jnp.array([0.8, -0.8]), 2)
    posterior.save(tmp_path / "posterior")
    with pytest.warns(UserWarning, match=match):
        npse.load(tmp_path / "posterior").sample(KEY, jnp.array([0.8, -0.8]), 2)


def test_rows_of_observations_are_named(posterior):
    rows = {name: np.stack([value] * 3) for name, value in USUAL.items()}
    posterior.sample_each(KEY, rows, 2)
    rows["y"][2, 0] = -40.0
    with pytest.warns(UserWarning, match=r"'y' is far.* Got -40 at \[2, 0\]; sim"):
        posterior.sample_each(KEY, rows, 2)


def test_map_and_range_are_saved(posterior, tmp_path):
    posterior.save(tmp_path / "posterior")
    npse = NPSE(several_sites_model, ("count", "y", "flat"))
    loaded = npse.load(tmp_path / "posterior")
    first, second = (p.score.denoiser.standardize_context for p in (posterior, loaded))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.warns(UserWarning, match="'count' is far from all"):
        loaded.sample(KEY, USUAL | {"count": 10**6}, 2)


BAD = {
    "no rows": (
        lambda p: p.sample_each(KEY, np.zeros((0, 3))),
        "must have at least one row",
    ),
    "no rows of a plate": (
        lambda p: p.sample_plate(KEY, np.zeros((0, 3))),
        "must have at least one row",
    ),
    "ragged": (lambda p: p.sample(KEY, [[0.0], [1.0, 2.0]]), "must be one array"),
    "text": (
        lambda p: p.log_prob({"x": "a"}, np.zeros(3)),
        r"`samples\['x'\]` must be real numbers",
    ),
    "few weights": (
        lambda p: p.importance(KEY, np.zeros(3), 24),
        "`num_samples` must be an integer of at least 25",
    ),
    "one simulation": (
        lambda p: p.calibration(KEY, 1),
        "`num_simulations` must be an integer of at least 2",
    ),
    "no ranks": (
        lambda p: p.calibration(KEY, 10, num_samples=0),
        "`num_samples` must be an integer of at least 1",
    ),
    "few draws of a summary": (
        lambda p: p.print_summary(KEY, np.zeros(3), 3),
        "`num_samples` must be an integer of at least 4",
    ),
    "percent": (
        lambda p: p.print_summary(KEY, np.zeros(3), prob=90),
        r"`prob` must lie in \(0, 1\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with unchecked(), pytest.raises(ValueError, match=message):
        call(exact_gaussian())


def test_unequal_numbers_of_draws_are_named():
    def model():
        x = numpyro.sample("x", dist.Normal(0, 1))
        s = numpyro.sample("s", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(x, s))

    layout = NPSE(model, "y").simulator().latents
    with pytest.raises(ValueError, match="must have as many draws of every site"):
        layout.flatten({"x": np.zeros(3), "s": np.ones(4)})


def test_training_keeps_simulations():
    """Of 60 simulations 54 would be held out, and 6 left."""
    npse = NPSE(lambda: numpyro.sample("y", dist.Normal(latent(), 1)), "y")
    with pytest.raises(ValueError, match="54 of 60 are held out"):
        npse.fit(KEY, 60, validation_share=0.9)


def latent():
    return numpyro.sample("x", dist.Normal(0, 1))


def test_observations_without_information_have_no_heavy_tails():
    """Their likelihood has a gradient of 0, and shares of it are 0 / 0."""
    z = NORMAL[:, None]
    assert not is_heavy_tailed(z, HEAVY["Cauchy"][:, None], np.zeros_like(z))


def shifted(offset, scale=1.0, width=1.0):
    """Return a model of three measurements of a latent, all far from 0."""

    def model(y=None):
        x = numpyro.sample("x", dist.Normal(0.0, scale))
        with numpyro.plate("rows", 3):
            numpyro.sample("y", dist.Normal(offset + x, width * scale), obs=y)

    return model


def far_latent(y=None):
    x = numpyro.sample("x", dist.Uniform(1000.0, 1000.001))
    numpyro.sample("y", dist.Normal(x - 1000.0, 1e-4), obs=y)


def far_output():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.deterministic("y", 1e6 + x)


def large_counts():
    x = numpyro.sample("x", dist.Normal(0.0, 1.0))
    numpyro.deterministic("start", jnp.array(1.7e9))
    numpyro.sample("y", dist.Poisson(jnp.exp(15.0 + 1e-4 * x)))


def look_for_digits(model, observed="y"):
    simulator = NPSE(model, observed).simulator()
    check_digits(simulator, simulator.simulate(KEY, 500))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (shifted(1e6), r"Got y\[0\]: steps of 0.062, sd 1.\d; y\[1\]"),
        (shifted(3.0, 1e-6), r"y\[0\]: steps of 2.4e-07, sd 1.\de-06"),
        (far_output, r"Got y: steps of 0.062, sd 1"),
        pytest.param(
            far_latent,
            "Got x: steps of 6.1e-05",
            marks=pytest.mark.filterwarnings("ignore:.*for a latent at the edge"),
        ),
    ],
)
def test_numbers_that_have_lost_their_digits_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        look_for_digits(model)


def test_numbers_of_which_no_digit_is_left_warn():
    """The posterior was the prior, without a word."""
    with pytest.warns(UserWarning, match=r"Got y\[0\]: steps of 1.3e\+02; y\[1\]"):
        look_for_digits(shifted(1.7e9, 3.0))


@pytest.mark.parametrize(
    ("model", "observed"),
    [
        (shifted(1e4), "y"),
        (shifted(0.0, 1e-6), "y"),
        (large_counts, ("y", "start")),
    ],
)
def test_numbers_that_keep_their_digits_pass(model, observed):
    look_for_digits(model, observed)


LEARN = {
    "posterior": lambda model, **options: NPSE(model, "y").fit(KEY, 100, **options),
    "joint": lambda model, **options: learn_joint(
        KEY, model, 100, observed="y", **options
    ),
}


@pytest.mark.parametrize("name", LEARN)
def test_digits_are_looked_for_before_training(name):
    options = {"num_steps": 1, "check": False, "progress_bar": False}
    with pytest.raises(ValueError, match="must keep digits of what varies"):
        LEARN[name](shifted(2e5), **options)


def test_latent_angles_warn_by_name():
    """Posteriors across the ends of an angle were off by more than an sd."""

    def angles(y=None):
        numpyro.sample("x", dist.Normal(0, 1))
        bearing = numpyro.sample(
            "bearing", dist.VonMises(jnp.zeros(2), 1.0).to_event(1)
        )
        numpyro.sample("y", dist.VonMises(bearing[0], 4.0), obs=y)

    with pytest.warns(UserWarning, match=r"Latent angles .* Got \['bearing'\]"):
        warn_of_angles(Simulator.of(angles, "y", softness=0.01))

    def plain(y=None):
        x = numpyro.sample("x", dist.Uniform(-3, 3))
        numpyro.sample("y", dist.VonMises(x, 4.0), obs=y)

    warn_of_angles(Simulator.of(plain, "y"))


@pytest.mark.parametrize(
    ("center", "concentration"), [(3.0, 4.0), (-2.0, 1.0), (0.0, 9.0)]
)
def test_observed_angles_around_their_ends_warn_by_name(center, concentration):
    """Draws of them in a joint law had a variance that was a fifth too large."""

    def model():
        x = numpyro.sample("x", dist.Normal(0, 0.1))
        law = dist.VonMises(center + x, concentration).expand([2]).to_event(1)
        numpyro.sample("y", law)
        numpyro.sample("w", dist.Normal(x, 9.0))

    simulator = Simulator.of(model, ["y", "w"])
    simulations = simulator.simulate(jax.random.key(0), 300, progress_bar=False)
    near = center != 0.0
    expected = pytest.warns(UserWarning, match=r"Observed angles .* ends \{'y': '\d")
    with expected if near else nullcontext():
        warn_of_drawn_angles(simulator, simulations)
