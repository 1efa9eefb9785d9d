"""Early stopping, loggers, accumulation, precision, streams and several devices."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from numpyro_score import MLP, ScoreMatching
from numpyro_score.data.rows import Batch
from numpyro_score.train.fit import FitOptions, _record_block, run_block
from numpyro_score.train.optimizer import TrainStep
from tests.pages import fences

ROOT = Path(__file__).resolve().parents[2]
NET = MLP(2, width=8, depth=1)
KEY = jax.random.key(0)
DATA = jax.random.normal(KEY, (256, 2))


def train(trainer=ScoreMatching(NET), num_steps=40, data=DATA, batch_size=32, **kwargs):
    return trainer.run(
        jax.random.key(1),
        num_steps,
        data,
        batch_size=batch_size,
        progress_bar=False,
        **kwargs,
    )


@dataclass(frozen=True)
class Scripted:
    """A problem whose loss is the weight itself, plus noise of the key and the row."""

    noise: float = 0.0

    def loss(self, params, fixed, key, batch):
        return params * (1 + self.noise * (batch.x.mean() + jax.random.normal(key)))


def scripted_state(problem, ema_params, params):
    """A state of averaged weights whose loss is ``ema_params``."""
    state = TrainStep(problem).init(jnp.float32(params), None, KEY)
    return state._replace(ema_params=jnp.float32(ema_params))


# Early stopping and loggers


def test_early_stopping_counts_blocks_since_the_best_average():
    problem, rows = Scripted(), Batch(DATA[:4])
    options = FitOptions(20, validation=rows, patience=2, block=1)
    run = options.init(scripted_state(problem, 9.0, 9.0))
    # the last weights fall where their average rises
    curve, waited, going = [5.0, 6.0, 3.0, 4.0, 4.0], [], []
    for k, loss in enumerate(curve):
        state = scripted_state(problem, loss, 20.0 - k)
        run = _record_block(problem, run, options, state, np.float32([k]))
        waited.append(int(run.blocks_since_best))
        going.append(options.should_continue(run))
    assert waited == [0, 1, 0, 1, 2]
    assert going == [True] * 4 + [False]
    assert run.validation_losses[:5].tolist() == curve
    assert run.losses[:5].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert float(run.best_loss) == float(options.result_params(run)) == 3.0
    last = FitOptions(20, validation=rows, block=1)
    assert float(last.result_params(run)) == 4.0  # without patience


@pytest.mark.slow
def test_training_that_only_does_harm_keeps_the_start():
    """A fresh net is the denoiser of a Gaussian; huge steps cannot improve on it."""
    trainer = ScoreMatching(NET, optim=optax.sgd(1e3))
    gaussian = jax.random.normal(jax.random.key(3), DATA.shape)
    start = trainer.init(KEY, gaussian)
    result = trainer.run(
        KEY,
        40,
        gaussian,
        validation=gaussian[:64],
        patience=1,
        init_state=start,
        progress_bar=False,
    )
    kept, begun = result.score.denoiser.params, start.ema_params
    jax.tree.map(np.testing.assert_array_equal, kept, begun)


def test_patience_needs_validation():
    with pytest.raises(ValueError, match=r"`patience` needs `validation`"):
        train(patience=3)


def test_patience_must_be_positive():
    with pytest.raises(ValueError, match="`patience` must be an integer of at least 1"):
        train(patience=0, validation=DATA)


def test_callbacks_see_every_block():
    seen = []
    result = train(validation=DATA[:8], callbacks=[seen.append])
    assert [p.step for p in seen] == list(range(2, 41, 2))
    np.testing.assert_allclose(
        [p.loss for p in seen], result.losses.reshape(20, 2).mean(1), rtol=1e-5
    )
    np.testing.assert_array_equal(
        np.float32([p.validation_loss for p in seen]), result.validation_losses
    )
    assert int(seen[3].state.step) == 8


# Accumulation and precision


def test_accumulated_loss_and_gradient_are_means_over_parts():
    problem, batch = Scripted(noise=1.0), Batch(DATA[:8])
    step = TrainStep(problem, accumulate=4)
    state = step.init(jnp.float32(2.0), None, KEY)
    loss, gradient = step.loss_and_gradient(state, KEY, batch)
    noise = jax.vmap(jax.random.normal)(jax.random.split(KEY, 4))
    exact = 1 + batch.x.mean() + noise.mean()  # a key and two rows for each part
    np.testing.assert_allclose(gradient, exact, rtol=1e-5)
    np.testing.assert_allclose(loss, 2 * exact, rtol=1e-5)
    other = step.batch_loss(jnp.float32(3.0), state, KEY, batch)  # of a line search
    np.testing.assert_allclose(other, 3 * exact, rtol=1e-5)


def test_parts_must_be_equal():
    trainer = ScoreMatching(NET, accumulate=3)
    with pytest.raises(ValueError, match=r"`accumulate` must divide the batch size"):
        train(trainer)
    with pytest.raises(
        ValueError, match=r"`accumulate` must be an integer of at least 1"
    ):
        ScoreMatching(NET, accumulate=0)


@pytest.mark.slow
def test_half_precision_computes_in_half_and_keeps_weights_whole():
    trainer = ScoreMatching(NET, compute_dtype=jnp.bfloat16)
    state = trainer.init(jax.random.key(1), DATA)
    program = str(jax.make_jaxpr(trainer.update)(state, Batch(DATA[:32])))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    assert all("bf16" in line.split("=")[0] for line in products)
    whole, half = train(), train(trainer)
    assert {p.dtype for p in jax.tree.leaves(half.state.params)} == {np.dtype("f4")}
    np.testing.assert_allclose(whole.losses, half.losses, rtol=0.05)
    assert not np.array_equal(whole.losses, half.losses)
    assert half.score.score(DATA[0]).dtype == jnp.float32


# Streams


def batches(count, size=32):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.normal(size=(size, 2)).astype(np.float32)


@pytest.mark.slow
def test_stream_trains_on_its_batches_in_order():
    result = train(data=batches(40))
    trainer = ScoreMatching(NET)
    first = np.concatenate(list(batches(2)))
    state = trainer.init(jax.random.key(1), first, 40)
    update = jax.jit(trainer.update)
    for batch, loss in zip(batches(4), result.losses, strict=False):
        rng_key, _ = jax.random.split(state.rng_key)  # the loop draws rows by the other
        state, want = update(state._replace(rng_key=rng_key), batch)
        np.testing.assert_allclose(loss, want, rtol=1e-4)


def test_stream_that_ends_keeps_what_was_learned():
    with pytest.warns(UserWarning, match=r"ended after 7 of 40 steps"):
        result = train(data=batches(7))
    assert len(result.losses) == 7
    assert int(result.state.step) == 7


def test_interrupted_run_keeps_what_was_learned():
    def until_interrupted():
        yield from batches(9)
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match=r"Interrupted after step 8"):
        result = train(data=until_interrupted())
    assert len(result.losses) == 8


def test_interrupt_at_once_is_not_swallowed():
    def at_once():
        yield from batches(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(data=at_once(), num_steps=200)


def test_interrupt_of_the_first_block_says_what_is_kept(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("numpyro_score.train.fit.run_block", interrupted)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        train()
    assert "no result yet" in interrupt.value.__notes__[0]


@pytest.mark.slow
def test_stream_may_carry_contexts():
    trainer = ScoreMatching(MLP(2, width=8, depth=1, context_size=2))
    rows = (Batch(batch, 2.0 + batch) for batch in batches(10))
    result = train(trainer, 10, rows)
    assert jnp.isfinite(result.losses).all()
    assert jnp.abs(result.state.fixed.standardize_context.loc - 2.0).max() < 1.0


def test_streams_are_checked():
    with pytest.raises(ValueError, match=r"must yield at least one batch"):
        train(data=iter([]))
    uneven = iter([np.zeros((4, 2)), np.zeros((3, 2))])
    with pytest.raises(ValueError, match=r"must yield batches of equal shapes"):
        train(data=uneven)
    with pytest.raises(ValueError, match=r"`batch` must be finite"):
        train(data=iter([np.full((4, 2), np.nan)]))
    with pytest.raises(ValueError, match=r"`known` must come with their batch"):
        train(data=batches(3), context=DATA)
    with pytest.raises(ValueError, match=r"`data` must be an array of real numbers"):
        train(data=["rows"])


# Compilation


def test_second_run_compiles_nothing():
    train()
    size = run_block._cache_size()
    train(ScoreMatching(MLP(2, width=8, depth=1)))
    assert run_block._cache_size() == size


# Several devices and processes

ON_DEVICES = """
import jax, numpy as np
from numpyro_score import MLP, ScoreMatching

assert jax.device_count() == 4
data = np.asarray(jax.random.normal(jax.random.key(0), (256, 2)))
trainer = ScoreMatching(MLP(2, width=16, depth=1))
def run(mesh, data=data):
    return trainer.run(
        jax.random.key(1), 100, data, batch_size=64, progress_bar=False, mesh=mesh
    )
mesh = jax.make_mesh((4,), ("rows",))
one, four = run(None), run(mesh)
np.testing.assert_allclose(one.losses, four.losses, rtol=2e-3)
for a, b in zip(*(jax.tree.leaves(r.state.params) for r in (one, four))):
    np.testing.assert_allclose(a, b, atol=2e-3)
from numpyro_score.train.fit import FitOptions, run_block, shard
from numpyro_score.train.sharding import with_auto_axes
from numpyro_score.data.rows import ArrayDataset, Batch
mesh = with_auto_axes(mesh)  # as the options of a run hold it
state = shard(trainer.init(jax.random.key(1), data, 100), mesh)
table = shard(ArrayDataset(Batch(data), 64), mesh)
step = FitOptions(100).step(trainer._problem)
program = run_block.lower(step, state, table, 5, block=5, mesh=mesh).compile()
text = program.as_text()
assert "all-reduce" in text, "gradients are summed over devices"
assert "f32[16,16]" in text, "each device works on 64 / 4 rows of width 16"
batches = (data[i * 64 % 256:][:64] for i in range(1000))
assert np.isfinite(run(mesh, batches).losses).all()
print(four.score.score(jax.numpy.ones(2)))
print("ok")
"""

ON_PROCESSES = """
import os, sys
import jax, numpy as np
process, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
folder, last_step = sys.argv[4] or None, int(sys.argv[5])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
from numpyro_score import MLP, ScoreMatching

assert (jax.process_count(), jax.device_count()) == (2, 2)
with jax.default_device(jax.local_devices()[0]):
    data = np.asarray(jax.random.normal(jax.random.key(0), (256, 2)))
mesh = jax.make_mesh((2,), ("rows",))
def stop(progress):
    if progress.step == last_step:
        os._exit(9)  # nothing is cleaned up, as after a kill
result = ScoreMatching(MLP(2, width=16, depth=1)).run(
    jax.random.key(1),
    100,
    data,
    batch_size=64,
    progress_bar=False,
    mesh=mesh,
    checkpoint=folder,
    callbacks=[stop],
)
np.savez(out, *jax.tree.leaves(result.state.params), result.losses)
"""


def start(script, *arguments, devices=1):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.slow
def test_four_devices_learn_what_one_learns():
    process = start(ON_DEVICES, devices=4)
    out, err = process.communicate(timeout=300)
    assert out.endswith("ok\n"), err


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run_two(out, folder="", last_step=0):
    """Train in two processes; return their exit codes and what they learned."""
    port = free_port()
    files = [out / f"{i}.npz" for i in range(2)]
    processes = [
        start(ON_PROCESSES, i, port, files[i], folder, last_step) for i in range(2)
    ]
    outputs = [p.communicate(timeout=300) for p in processes]
    codes = [p.returncode for p in processes]
    assert codes == [9 if last_step else 0] * 2, outputs
    return [] if last_step else [list(np.load(f).values()) for f in files]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_also_when_killed(tmp_path):
    first, second = run_two(tmp_path)
    assert all(map(np.array_equal, first, second)), "identical weights on both"
    alone = ScoreMatching(MLP(2, width=16, depth=1)).run(
        jax.random.key(1), 100, DATA, batch_size=64, progress_bar=False
    )
    want = [*jax.tree.leaves(alone.state.params), alone.losses]
    for got, expected in zip(first, want, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-3, rtol=2e-3)
    folder = tmp_path / "checkpoints"
    run_two(tmp_path, folder, last_step=60)
    assert (folder / "60").exists()
    assert not (folder / "100").exists()
    for resumed in run_two(tmp_path, folder):
        assert all(map(np.array_equal, first, resumed)), "bit for bit"


@pytest.mark.slow
def test_page_of_several_hosts_runs_in_two_processes(tmp_path):
    page = (ROOT / "docs" / "accelerators.md").read_text(encoding="utf-8")
    section = page.split("## Several hosts")[1].splitlines()
    blocks = {fence.info: fence.text for fence in fences(section)}
    (tmp_path / "train.py").write_text(blocks["python"], encoding="utf-8")
    command = blocks["sh"].replace("12345", str(free_port()))
    done = subprocess.run(
        ["bash", "-c", f"{command.replace('python', sys.executable)}\nwait"],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert blocks["text"] in done.stdout.splitlines(), done.stderr
    assert (tmp_path / "run" / "100").exists()
