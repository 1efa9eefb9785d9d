"""ScoreSDE as users meet it: results, summaries, refusals, failures, devices."""

import re
import subprocess
import sys

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_score import (
    VE,
    VP,
    ParticleMetropolis,
    ScoreDistribution,
    ScoreModel,
    to_datatree,
)
from numpyro_score.diagnostics import verdict
from numpyro_score.infer import ScoreSDE
from numpyro_score.infer.twisted import sampler as sampler_module
from numpyro_score.infer.twisted.arviz_adapter import ScoreSDEAdapter
from numpyro_score.infer.twisted.failures import (
    MESSAGES,
    Failure,
    count_failures,
    dead_run_message,
)
from numpyro_score.infer.twisted.guidance import DPS
from numpyro_score.infer.twisted.replicates import check_result, find_degeneracies
from numpyro_score.infer.twisted.run import run_chains
from numpyro_score.infer.twisted.twist import Twist, TwistRegularization
from tests.infer.twisted.problems import (
    EVIDENCE,
    NORMAL,
    NUM_DRAWS,
    PROCESS,
    Y,
    conjugate,
    counts,
    learned,
    scalar,
)
from tests.targets import STANDARD_NORMAL, z_scores


@pytest.fixture(scope="module")
def finished():
    return scalar(conjugate, Y)


def test_conjugate_posterior(finished):
    draws = finished.get_samples()
    assert np.all(z_scores(draws["x"], 1.0) < 4)
    assert np.all(z_scores((draws["x"] - 1.0) ** 2, 0.5) < 4)
    assert np.allclose(draws["twice"], 2 * draws["x"])


def test_conjugate_evidence(finished):
    assert (
        abs(finished.log_evidence - EVIDENCE) < 0.01 + 4 * finished.log_evidence_error
    )
    assert finished.log_evidence_error < 0.02


def test_result_has_shapes_of_mcmc(finished):
    assert finished.get_samples(group_by_chain=True)["x"].shape == (1, NUM_DRAWS)
    fields = finished.get_extra_fields()
    assert fields["ancestor"].shape == (NUM_DRAWS,)
    assert np.all(np.diff(fields["ancestor"]) >= 0)  # those of one are neighbors
    assert fields["ess"].shape == (1, 51)
    assert np.allclose(fields["weights"].sum(-1), 1.0, atol=1e-5)
    assert fields["num_ancestors"][0] > 0.9 * NUM_DRAWS
    assert fields["ess"].min() > 0.9 * NUM_DRAWS  # the twist is exact here
    assert set(finished.get_extra_fields(group_by_chain=True)) == set(fields)


def test_second_run_reuses_the_program_and_seeds_reproduce(finished):
    programs = run_chains._cache_size()
    other = scalar(conjugate, jnp.array(-1.0)).get_samples()["x"]
    again = ScoreSDE(
        conjugate,
        num_samples=NUM_DRAWS,
        num_particles=NUM_DRAWS,
        levels=50,
        progress_bar=False,
    )
    again.run(jax.random.PRNGKey(0), Y)  # a legacy key is the same key
    first = finished.get_samples()["x"]
    assert run_chains._cache_size() == programs > 0  # by another instance either
    assert np.array_equal(again.get_samples()["x"], first)
    assert not np.array_equal(other, first)


def test_what_a_model_reads_besides_its_arguments_may_change():
    shift = [0.0]

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(NORMAL))
        numpyro.deterministic("moved", x + shift[0])
        numpyro.sample("y", dist.Normal(x + shift[0], 0.1), obs=y)

    inference = ScoreSDE(
        model,
        num_samples=1000,
        num_particles=1000,
        levels=20,
        num_moves=0,
        progress_bar=False,
    )
    means = []
    for shift[0] in (0.0, 3.0, 0.0):
        inference.run(jax.random.key(0), jnp.array(1.0))
        samples = inference.get_samples()
        np.testing.assert_allclose(samples["moved"], samples["x"] + shift[0], rtol=1e-6)
        means.append(float(samples["x"].mean()))
    np.testing.assert_allclose(means, [0.99, -1.98, 0.99], atol=0.03)
    assert means[0] == means[2]


def test_summary_says_what_to_believe(finished, capsys):
    finished.print_summary()
    printed = capsys.readouterr().out
    assert "Log evidence: -2.2" in printed
    assert "Smallest effective sample size" in printed


def test_arviz_takes_the_result(finished):
    tree = arviz.from_numpyro(ScoreSDEAdapter(finished), log_likelihood=True)
    assert tree.posterior["x"].shape == (1, NUM_DRAWS)
    assert tree.log_likelihood["y"].shape == (1, NUM_DRAWS)
    assert tree.sample_stats["ancestor"].shape == (1, NUM_DRAWS)
    assert tree.observed_data["y"] == 2.0


# errors
def no_learned(y):
    numpyro.sample("x", dist.Normal(0, 1))


def discrete(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x + k, 1.0), obs=y)


def improper(y):
    flat = dist.ImproperUniform(dist.constraints.real, (), ())
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x + numpyro.sample("b", flat), 1.0), obs=y)


def scaled(y):
    with numpyro.handlers.scale(scale=2.0):
        numpyro.sample("x", ScoreDistribution(NORMAL))


def two_processes(y):
    numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("z", ScoreDistribution(STANDARD_NORMAL.score_model(VP())))


def with_ordinary(y):
    sd = numpyro.sample("sd", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(numpyro.sample("x", learned()), sd), obs=y)


@pytest.mark.parametrize(
    ("model", "options", "match"),
    [
        (no_learned, {}, "must have a latent site with a ScoreDistribution"),
        (discrete, {}, "Site 'k' is a discrete latent site"),
        (improper, {}, "Site 'b' has an improper prior"),
        (scaled, {}, "Learned site 'x' is scaled or masked"),
        (two_processes, {}, "must share one noise process"),
        (with_ordinary, {"guidance": DPS()}, "moves learned sites only"),
        (counts, {"guidance": DPS()}, "needs observed Normal sites"),
        (conjugate, {"levels": [1.0, 2.0]}, "`levels` must decrease"),
    ],
)
def test_models_that_do_not_fit_are_refused(model, options, match):
    with pytest.raises(ValueError, match=match):
        scalar(model, Y, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_samples": 0}, "`num_samples` must be an integer"),
        ({"num_particles": 1}, "`num_particles` must be .* at least 2"),
        ({"num_chains": 0}, "`num_chains` must be an integer"),
        ({"levels": 0}, "`levels` must be an integer"),
        ({"num_moves": -1}, "`num_moves` must be an integer of at least 0"),
    ],
)
def test_bad_numbers_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        ScoreSDE(conjugate, **{"num_samples": 10, **options})


def test_results_before_a_run_are_refused():
    with pytest.raises(RuntimeError, match="`run` must be called first"):
        ScoreSDE(conjugate, num_samples=10).get_samples()


def test_keys_of_another_number_are_refused():
    inference = ScoreSDE(conjugate, num_samples=10, num_chains=2)
    with pytest.raises(ValueError, match="`rng_key` must be one key"):
        inference.run(jax.random.split(jax.random.key(0), 3), Y)


def far_root(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(jnp.log(x - 50), 1.0, validate_args=False), obs=y)


def test_likelihood_that_is_nan_everywhere_is_an_error(finished):
    with pytest.raises(ValueError, match="Site 'y' has NaN in its observed values"):
        finished.run(jax.random.key(0), jnp.array(jnp.nan))
    with pytest.raises(ValueError, match=r"log likelihood is NaN.* 1000 likelihood"):
        scalar(far_root, Y)


FAILING = {  # law of y given x, y, and a shift of the score
    Failure.SCORE: (lambda x: dist.Normal(x, 1.0), 2.0, jnp.nan),
    Failure.LIKELIHOOD: (
        lambda x: dist.Normal(jnp.log(x - 9), 1.0, validate_args=False),
        2.0,
        0.0,
    ),
    Failure.ZERO_LIKELIHOOD: (lambda x: dist.Uniform(x + 9, x + 10), 2.0, 0.0),
    Failure.TWIST: (lambda x: dist.Normal(x, 1e-25), 2.0, 0.0),
    Failure.GRADIENT: (lambda x: dist.Normal(jnp.sqrt(0 * x), 1.0), 2.0, 0.0),
}


@pytest.mark.parametrize("kind", FAILING, ids=lambda kind: kind.name)
def test_causes_of_a_lost_particle_are_told_apart(kind):
    """A score, a likelihood, a solve and a derivative that fail, and a zero."""
    likelihood, value, offset = FAILING[kind]
    score = ScoreModel.from_fn(
        lambda x, t: offset - x / (1 + PROCESS.sigma(t) ** 2), PROCESS, ()
    )

    def model(y):
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", likelihood(x), obs=y)

    twist = Twist.of(model, (jnp.array(value),), {})
    regularization = TwistRegularization(jnp.ones(()), jnp.zeros(()))
    point, t = {"x": jnp.array(0.5)}, PROCESS.time(1.0)
    evaluation = jax.jit(lambda z: twist.evaluate(z, t, regularization))(point)
    assert Failure(int(evaluation.failure)) == kind
    assert not np.isfinite(evaluation.log_target(1.0))
    counts = np.asarray(count_failures(evaluation.failure[None], jnp.array([True])))
    message = dead_run_message(counts, "0 of 51", 1, 2)
    assert MESSAGES[kind][0] in message
    assert (
        f"1 of 2 runs, the first at level 0 of 51; its particles there by cause: 1 "
        f"{kind.name.lower()}." in message
    )


def test_failures_of_some_particles_warn_by_cause(finished):
    failures = finished._result.failures
    assert failures.shape == (1, 1, 51, len(Failure))
    assert failures[..., 1:].sum() == 0
    assert np.all(failures[..., 0] == 1000)
    many = failures.at[0, 0, 7, int(Failure.SCORE)].set(11)
    with pytest.warns(UserWarning, match=r"score is NaN.* 11 of 1000 particles"):
        check_result(finished._result._replace(failures=many))
    few = failures.at[0, 0, 7, int(Failure.SCORE)].set(10)
    check_result(finished._result._replace(failures=few))
    zero = failures.at[0, 0, -1, int(Failure.ZERO_LIKELIHOOD)].set(500)
    check_result(finished._result._replace(failures=zero))
    early = failures.at[0, 0, 7, int(Failure.ZERO_LIKELIHOOD)].set(500)
    with pytest.warns(UserWarning, match=r"zero at 500 of 1000 .*evidence is too low"):
        check_result(finished._result._replace(failures=early))


def only(findings, name):
    (finding,) = findings
    assert finding.name == name
    return str(finding)


def test_collapse_is_found(finished):
    result = finished._result
    assert find_degeneracies(result) == []
    found = only(find_degeneracies(result._replace(ess=jnp.ones((1, 1, 51)))), "ess")
    assert "effective sample size of 1000 particles is 1 (threshold 20)" in found
    assert "error of the log evidence is understated" in found
    low = {
        "initial_ess": jnp.full((1, 1), 99),
        "signal_to_noise": jnp.full((1, 1), 2.8),
    }
    found = only(find_degeneracies(result._replace(**low)), "start")
    assert re.search("is 99 .* does not hide the data.*`sigma_max`.* 4.0", found)
    few = {"effective_num_ancestors": jnp.full((1, 1), 2.5)}
    found = only(find_degeneracies(result._replace(**few)), "ancestors")
    assert "descend from is 2.5 (threshold 10)" in found
    wide = result._replace(log_evidence_variance=jnp.full((1, 1), 0.25))
    found = only(find_degeneracies(wide), "evidence")
    assert "the log evidence, in nats, is 0.5 (threshold 0.3)" in found


KNOWN_DATA = ScoreModel.from_fn(
    lambda x, t: -x / (1 + VE().sigma(t) ** 2),
    VE(),
    event_shape=(2,),
    data=np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32),
)
NEAR, FAR = np.array([1.0, -1.0]), np.array([7.0, 0.0])  # in sd of the data


def with_known_data(y, score=KNOWN_DATA):
    x = numpyro.sample("x", ScoreDistribution(score))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("args", [(), (KNOWN_DATA,)])
def test_draws_off_the_data_of_their_score_are_found(args, capsys):
    inference = ScoreSDE(
        with_known_data,
        num_samples=200,
        num_particles=200,
        levels=30,
        progress_bar=False,
    )
    inference.run(jax.random.key(2), NEAR, *args)
    assert to_datatree(inference).attrs["verdict"] == "ok"
    match = r"off_data: .* site 'x', at noise level 0\.01"
    with pytest.warns(UserWarning, match=match):
        inference.run(jax.random.key(2), FAR, *args)
    assert to_datatree(inference).attrs["verdict"] == "off_data"
    assert verdict(inference).names == "off_data"
    inference.print_summary()
    assert "off the data that its score was learned from is" in capsys.readouterr().out


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_chains_off_the_data_of_their_score_are_found(chain_method):
    mcmc = MCMC(
        ParticleMetropolis(with_known_data, num_particles=50, levels=20),
        num_warmup=5,
        num_samples=100,
        num_chains=2,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(3), NEAR)
    assert verdict(mcmc).ok
    with pytest.warns(UserWarning, match="not to be trusted:\n- off_data: .* site 'x'"):
        mcmc.run(jax.random.key(3), FAR)
    assert [finding.name for finding in verdict(mcmc).findings] == ["off_data"]
    assert to_datatree(mcmc).attrs["verdict"] == "off_data"


PROPAGATE, EVALUATE = sampler_module._propagate, sampler_module._evaluate


SHARDED = """
import sys
import jax, numpy as np
from tests.infer.twisted.problems import Y, conjugate, scalar
inference = scalar(conjugate, Y, num_chains=2, levels=20, num_samples=50)
print(jax.device_count())
np.save(sys.argv[1], np.asarray(inference.get_samples(group_by_chain=True)["x"]))
"""


@pytest.mark.slow
def test_chains_are_the_same_on_one_device_and_on_two(root, tmp_path):
    draws = []
    for count in (1, 2):
        path = tmp_path / f"{count}.npy"
        flags = f"--xla_force_host_platform_device_count={count}"
        done = subprocess.run(
            [sys.executable, "-c", SHARDED, str(path)],
            cwd=root,
            env={
                "XLA_FLAGS": flags,
                "PATH": "/usr/bin:/bin",
                "JAX_PLATFORMS": "cpu",
                "JAX_ENABLE_X64": "1",
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [str(count)]
        draws.append(np.load(path))
    # XLA compiles another program for two devices, which rounds differently: in
    # float32 one rounding may change an ancestor, and with it all later draws
    np.testing.assert_allclose(*draws, rtol=1e-10, atol=1e-10)
    assert not np.allclose(draws[0][0], draws[0][1], rtol=1e-2)
