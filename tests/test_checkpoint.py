"""Runs that are killed go on where they were, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpyro.distributions import constraints

from numpyro_score import MLP, VE, VP, ScoreMatching
from numpyro_score.data.standardize import Affine
from numpyro_score.loss import DenoisingScoreMatching
from numpyro_score.loss.weighting import SigmaSquaredWeight
from numpyro_score.score.preconditioning import EDM
from numpyro_score.train import Checkpoints

DATA = np.asarray(jax.random.normal(jax.random.key(0), (256, 2)))
TRAINER = ScoreMatching(MLP(2, width=8, depth=1))
NUM_STEPS = 50


class KilledError(Exception):
    """Stands for a process that ends."""


def train(trainer=TRAINER, data=DATA, num_steps=NUM_STEPS, key=1, **kwargs):
    kwargs = {"validation": DATA[:32]} | kwargs
    return trainer.run(
        jax.random.key(key),
        num_steps,
        data,
        batch_size=32,
        progress_bar=False,
        **kwargs,
    )


def kill_at(step):
    def callback(progress):
        if progress.step >= step:
            raise KilledError

    return callback


def numbers(result):
    state = result.state._replace(rng_key=jax.random.key_data(result.state.rng_key))
    return jax.tree.leaves((state, result.losses, result.validation_losses))


@pytest.fixture(scope="module")
def uninterrupted():
    return train()


@pytest.mark.parametrize(("killed", "every"), [(21, 1), (21, 4), (1, 4)])
def test_resumed_run_equals_the_uninterrupted(uninterrupted, tmp_path, killed, every):
    checkpoint = Checkpoints(tmp_path / "run", every=every)
    with pytest.raises(KilledError):
        train(checkpoint=checkpoint, callbacks=[kill_at(killed)])
    steps = []
    resumed = train(checkpoint=checkpoint, callbacks=[lambda p: steps.append(p.step)])
    assert all(map(np.array_equal, numbers(resumed), numbers(uninterrupted)))
    saved = killed // (3 * every) * 3 * every  # blocks of 3 steps
    assert steps[0] == saved + 3


def test_finished_run_is_read_back(uninterrupted, tmp_path):
    train(checkpoint=tmp_path / "run")
    steps = []
    again = train(checkpoint=tmp_path / "run", callbacks=[steps.append])
    assert steps == []
    assert all(map(np.array_equal, numbers(again), numbers(uninterrupted)))


def test_stream_goes_on_after_the_batches_it_gave(tmp_path):
    def batches():
        rng = np.random.default_rng(0)
        while True:
            yield rng.normal(size=(16, 2))

    def run(**kwargs):
        return TRAINER.run(
            jax.random.key(1), 30, batches(), progress_bar=False, **kwargs
        )

    whole = run()
    with pytest.raises(KilledError):
        run(checkpoint=tmp_path / "run", callbacks=[kill_at(11)])
    resumed = run(checkpoint=tmp_path / "run")
    assert np.array_equal(resumed.losses, whole.losses)


def trainer_of(**options):
    return {"trainer": replace(TRAINER, **options)}


def pinned(x):
    return replace(Affine.per_dimension(x), loc=jnp.zeros(2))


CONTEXT_NET = MLP(2, width=8, depth=1, context_size=1, optional_context=True)
STEP = "program of a training step"
OTHERS = [
    ({"key": 2}, "key, data and initial weights"),
    ({"num_steps": 60}, "num_steps"),
    ({"data": DATA[:, ::-1]}, "standardization, data and initial weights"),
    ({"validation": DATA[32:64]}, "validation"),
    ({"patience": 3}, "patience"),
    (trainer_of(net=MLP(2, width=4, depth=1)), "net, optimizer, data and initial wei"),
    (trainer_of(sde=VP()), "process"),
    (trainer_of(sde=VE(0.02)), "process"),
    (trainer_of(parametrization=EDM()), "parametrization"),
    (trainer_of(loss=DenoisingScoreMatching(weighting=SigmaSquaredWeight())), "loss"),
    (trainer_of(optim=optax.sgd(0.1)), "optimizer"),
    (trainer_of(standardize=pinned), "standardization"),
    (trainer_of(support=constraints.interval(-9.0, 9.0)), "support"),
    (trainer_of(accumulate=2), "accumulate"),
    (trainer_of(compute_dtype=jnp.bfloat16), "compute_dtype"),
    (trainer_of(net=CONTEXT_NET, drop_context=0.5), "net, drop_context"),
]


@pytest.fixture(scope="module")
def first_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    with pytest.raises(KilledError):
        train(checkpoint=folder, callbacks=[kill_at(1)])
    return folder


@pytest.mark.parametrize(("other", "named"), OTHERS)
def test_checkpoints_of_another_run_are_refused(first_folder, other, named):
    with pytest.raises(
        ValueError, match=rf"`checkpoint` must be.* differs in (.*, )?{named}"
    ):
        train(checkpoint=first_folder, **other)


def test_optimizers_of_other_rates_are_told_apart(tmp_path):
    def run(rate):
        trainer = replace(TRAINER, optim=optax.sgd(rate))
        train(trainer, checkpoint=tmp_path, callbacks=[kill_at(1)])

    with pytest.raises(KilledError):
        run(1e-3)
    with pytest.raises(ValueError, match=rf"differs in {STEP}\."):
        run(2e-3)


def test_damaged_checkpoint_falls_back_on_the_one_before(uninterrupted, tmp_path):
    train(checkpoint=tmp_path)
    (tmp_path / "50" / "default" / "_METADATA").write_bytes(b"{}")
    steps = []
    with pytest.warns(UserWarning, match=r"/50 is damaged .*_METADATA was altered"):
        again = train(checkpoint=tmp_path, callbacks=[lambda p: steps.append(p.step)])
    assert steps == [50]
    assert all(map(np.array_equal, numbers(again), numbers(uninterrupted)))


def test_damaged_run_file_is_named(first_folder, tmp_path):
    shutil.copytree(first_folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(b"{")
    with pytest.raises(ValueError, match=r"run\.json is damaged.*Delete this file"):
        train(checkpoint=tmp_path / "run")


def test_only_the_latest_are_kept(tmp_path):
    train(checkpoint=Checkpoints(tmp_path / "run", keep=3))
    steps = sorted(int(p.name) for p in (tmp_path / "run").iterdir() if p.is_dir())
    assert steps == [45, 48, 50]


def test_counts_are_checked():
    with pytest.raises(ValueError, match=r"`keep` must be an integer of at least 1"):
        Checkpoints("run", keep=0)


SCRIPT = """
import os, signal, sys, threading
import jax, numpy as np
import orbax.checkpoint as ocp
from numpyro_score import MLP, ScoreMatching

folder, out = sys.argv[1:3]
when, delay = int(sys.argv[3]), float(sys.argv[4])
save = ocp.CheckpointManager.save

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly_save(self, step, *args, **kwargs):
    if 0 <= when <= step:
        threading.Timer(delay, kill).start()
    return save(self, step, *args, **kwargs)

ocp.CheckpointManager.save = deadly_save
data = np.asarray(jax.random.normal(jax.random.key(0), (256, 2)))
result = ScoreMatching(MLP(2, width=32, depth=2)).run(
    jax.random.key(1), 200, data, batch_size=64, progress_bar=False,
    checkpoint=None if folder == "none" else folder,
)
leaves = jax.tree.leaves((result.state.params, result.state.ema_params, result.losses))
np.savez(out, *leaves)
"""


def run_script(folder, out, when=-1, delay=0.0):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", SCRIPT, folder, out, when, delay]
    return subprocess.run(
        list(map(str, arguments)),
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_killed_process_loses_nothing(tmp_path):
    """SIGKILL before, in the middle of and after saves; then once to the end."""
    done = run_script("none", tmp_path / "whole.npz")
    assert done.returncode == 0, done.stderr
    for when, delay in [(10, 0.0), (60, 0.01), (120, 0.05)]:
        killed = run_script(tmp_path / "run", tmp_path / "no.npz", when, delay)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run_script(tmp_path / "run", tmp_path / "resumed.npz")
    assert done.returncode == 0, done.stderr
    whole, resumed = (np.load(tmp_path / f"{n}.npz") for n in ("whole", "resumed"))
    assert whole.files == resumed.files
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole.files)
