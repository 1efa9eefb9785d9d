"""Ctrl-C and SIGTERM: what has ended is kept, and the error says how to go on."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

from numpyro_score import (
    MLP,
    NPSE,
    VE,
    ScoreDistribution,
    ScoreLangevin,
    ScoreMatching,
    ScoreModel,
)
from numpyro_score.diagnostics import replicate
from numpyro_score.infer import ScoreSDE
from numpyro_score.infer.amortized import simulator as simulator_module
from numpyro_score.infer.twisted import score_sde
from numpyro_score.infer.twisted.replicates import ChainResult
from numpyro_score.infer.twisted.run import RunSettings
from numpyro_score.kernel import resumable_run, run_in_blocks
from numpyro_score.train import fit as fit_module

KEY, SDE = jax.random.key(0), VE()
NORMAL = ScoreModel.from_fn(lambda x, t: -x / (1 + SDE.sigma(t) ** 2), SDE, ())


def interrupt_at(function, number):
    """Return a function whose call of this number, from 0, is interrupted."""
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) > number:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return interrupted


def learned(y):
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def ordinary(y=None):
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def chains(keys, *_):
    """Stand for the compiled program: results that tell chains apart."""
    number = jax.random.key_data(keys)[:, -1]
    fields = dict.fromkeys(ChainResult._fields, number)
    return ChainResult(**fields | {"samples": {"x": number}})


def test_chains_that_have_ended_are_kept(monkeypatch):
    inference = ScoreSDE(learned, num_samples=16, num_chains=4)
    arguments = (
        jax.random.split(KEY, 4),
        jnp.ones(2),
        [],
        RunSettings(*[None] * 4),
        None,
    )
    monkeypatch.setattr(score_sde, "count_devices", lambda _: 1)
    monkeypatch.setattr(score_sde, "run_chains", chains)
    whole = inference._run_chains(*arguments).samples["x"]
    monkeypatch.setattr(score_sde, "run_chains", interrupt_at(chains, 2))
    with pytest.warns(UserWarning, match="interrupted after 2 of 4 chains"):
        kept = inference._run_chains(*arguments).samples["x"]
    assert len(whole) == 4
    np.testing.assert_array_equal(kept, whole[:2])
    with pytest.raises(KeyboardInterrupt) as interrupt:  # no chain has ended
        inference._run_chains(*arguments)
    assert "Chains that have ended are kept" in interrupt.value.__notes__[0]


def test_simulations_can_be_kept_in_parts(monkeypatch):
    npse = NPSE(ordinary, "y")
    monkeypatch.setattr(simulator_module, "_run", interrupt_at(None, 0))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        npse.fit(KEY, 1000, progress_bar=False)
    assert "`npse.train`" in interrupt.value.__notes__[0]


def test_blocks_that_have_ended_are_kept(monkeypatch, tmp_path, capsys):
    mcmc = MCMC(ScoreLangevin(ordinary), num_warmup=0, num_samples=20)
    mcmc.progress_bar = True  # NumPyro draws none for workers of tests
    monkeypatch.setattr(
        resumable_run, "_program", interrupt_at(resumable_run._program, 1)
    )
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run_in_blocks(mcmc, KEY, 1.0, path=tmp_path, num_blocks=2)
    assert "10 of 20 transitions" in interrupt.value.__notes__[0]
    assert "sample:  50%" in capsys.readouterr().err
    assert mcmc.get_samples()["x"].shape == (10,)


def test_progress_counts_the_transitions_that_were_saved(capsys):
    mcmc = MCMC(ScoreLangevin(ordinary), num_warmup=10, num_samples=20)
    mcmc.progress_bar = True  # NumPyro draws none for workers of tests
    run = resumable_run.BlockRun(mcmc, mcmc.sampler, KEY, (), {}, (), None)
    plan = resumable_run.plan_blocks(10, 20, 1, 3)
    for num_saved, printed in ((0, "0/30"), (2, "20/30")):
        resumable_run._progress(run, plan, num_saved).close()
        assert printed in capsys.readouterr().err


def test_simulations_that_have_ended_are_kept():
    def simulate(key):
        truth = jax.random.normal(key)
        return truth, truth

    def run(posterior, **options):
        options = {"compiled": False, "progress_bar": False} | options
        return replicate(KEY, simulate, posterior, 5, **options)

    def posterior(key, observation):
        return observation + jax.random.normal(key, (3,))

    whole = run(posterior)
    with pytest.warns(UserWarning, match="interrupted after 2 of 5 simulations"):
        kept = run(interrupt_at(posterior, 2))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:2], y), whole, kept)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        run(interrupt_at(posterior, 0), compiled=True)
    assert "a smaller `batch_size`" in interrupt.value.__notes__[0]


@pytest.fixture
def sigterm_as_ctrl_c():
    """What a job on a cluster does that wants to keep its blocks at SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)


TRAINER = ScoreMatching(MLP(1, width=4, depth=1, context_size=1))
ROWS = np.asarray(jax.random.normal(KEY, (64, 1)))


def train(**options):
    return TRAINER.run(
        KEY,
        20,
        ROWS,
        context=ROWS,
        validation=ROWS,
        validation_context=ROWS,
        batch_size=8,
        progress_bar=False,
        **options,
    )


SLOW = [
    pytest.param(where, marks=pytest.mark.slow) for where in ("validation", "block")
]


@pytest.mark.parametrize("where", ["callback", *SLOW])
def test_training_keeps_its_blocks(where, monkeypatch, sigterm_as_ctrl_c, tmp_path):
    """Wherever the signal comes; once it was lost outside of a block of steps."""
    whole, options = train(), {}

    def stop(function, number):
        calls = []

        def stopped(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                terminate()
            return function(*args, **kwargs)

        return stopped

    with monkeypatch.context() as patch:
        if where == "callback":
            options["callbacks"] = [stop(lambda progress: None, 3)]
        else:
            name = {"validation": "evaluate", "block": "run_block"}[where]
            patch.setattr(fit_module, name, stop(getattr(fit_module, name), 4))
        with pytest.warns(UserWarning, match="Interrupted after step 3: the result is"):
            kept = train(checkpoint=tmp_path, **options)
    np.testing.assert_array_equal(kept.losses, whole.losses[:3])
    resumed = train(checkpoint=tmp_path)
    np.testing.assert_array_equal(resumed.losses, whole.losses)


def test_training_without_a_block_says_how_to_keep_them(monkeypatch):
    monkeypatch.setattr(fit_module, "run_block", interrupt_at(None, 0))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train()
    assert "with `checkpoint` they are also on disk" in interrupt.value.__notes__[0]


@pytest.mark.slow
def test_amortized_training_keeps_its_blocks(sigterm_as_ctrl_c, tmp_path):
    npse = NPSE(ordinary, "y", net=MLP(1, width=4, depth=1, context_size=1))

    def fit(**options):
        options = {"num_steps": 20, "progress_bar": False, "check": False} | options
        return npse.fit(KEY, 100, checkpoint=tmp_path, **options).score

    def stop(progress):
        if progress.step == 3:
            terminate()

    with pytest.warns(UserWarning, match="Interrupted after step 3: the result is"):
        stopped = fit(callbacks=[stop])
    assert np.isfinite(stopped.score(jnp.zeros(1), 0.5, jnp.zeros(()))).all()
    leaves = [jax.tree.leaves(score) for score in (stopped, fit())]
    assert not all(map(np.array_equal, *leaves))  # the same folder: it went on


def test_chains_are_kept_at_sigterm(monkeypatch, sigterm_as_ctrl_c):
    inference = ScoreSDE(learned, num_samples=16, num_chains=4)
    keys, settings = jax.random.split(KEY, 4), RunSettings(*[None] * 4)
    done = []

    def two_chains(*args):
        done.append(args)
        if len(done) == 3:
            terminate()
        return chains(*args)

    monkeypatch.setattr(score_sde, "count_devices", lambda _: 1)
    monkeypatch.setattr(score_sde, "run_chains", two_chains)
    with pytest.warns(UserWarning, match="interrupted after 2 of 4 chains"):
        kept = inference._run_chains(keys, jnp.ones(2), [], settings, None)
    assert len(kept.samples["x"]) == 2


SCRIPT = """
import os, signal, sys, threading
import jax, numpy as np
from numpyro.infer import MCMC
import orbax.checkpoint as ocp
from numpyro_score import ParallelTempering
from numpyro_score.kernel import run_in_blocks
from tests.test_interruption import ordinary

signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may ignore it
folder, number = sys.argv[1], int(sys.argv[2])
save = ocp.CheckpointManager.save

def then_stop(self, step, *args, **kwargs):
    saved = save(self, step, *args, **kwargs)
    if number and step >= 80:  # 20 of the 40 draws are in the sampler
        os.kill(os.getpid(), number)
    return saved

ocp.CheckpointManager.save = then_stop
mcmc = MCMC(
    ParallelTempering(ordinary, num_rungs=3), num_warmup=40, num_samples=40,
    progress_bar=False,
)
try:
    run_in_blocks(mcmc, jax.random.key(0), 1.0, path=folder, num_blocks=4)
finally:
    print("draws", *mcmc.get_samples()["x"].tolist())
"""


def run_script(root, folder, number):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(int(number))],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def draws_of(run):
    return [float(word) for word in run.stdout.split("draws")[-1].split()]


@pytest.mark.slow
def test_signals_keep_the_blocks_of_tempered_chains(tmp_path, root):
    interrupted = run_script(root, tmp_path, signal.SIGINT)
    assert "the same call goes on from there" in interrupted.stderr.replace("\n", " ")
    assert len(draws_of(interrupted)) == 20
    resumed = run_script(root, tmp_path, 0)
    assert resumed.returncode == 0, resumed.stderr
    so_far, whole = draws_of(interrupted), draws_of(resumed)
    assert len(whole) == 40
    assert whole[: len(so_far)] == so_far


@pytest.mark.slow
def test_terminated_process_goes_on(tmp_path, root):
    terminated = run_script(root, tmp_path, signal.SIGTERM)
    assert terminated.returncode == -signal.SIGTERM, terminated.stderr
    resumed = run_script(root, tmp_path, 0)
    assert resumed.returncode == 0, resumed.stderr
    assert len(draws_of(resumed)) == 40
