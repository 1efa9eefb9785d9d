"""Runs in blocks: the draws of one run, also after a kill at any moment."""

import os
import signal
import subprocess
import sys
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import orbax.checkpoint as ocp
import pytest
from numpyro.infer import MCMC, NUTS, init_to_value

from numpyro_score import (
    VE,
    AnnealedLangevin,
    ParallelTempering,
    ScoreDistribution,
    ScoreLangevin,
    ScoreModel,
)
from numpyro_score.kernel import run_in_blocks
from numpyro_score.kernel.resumable_run import plan_blocks
from numpyro_score.score import HostFunction

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")

DATA = jnp.array([0.5, -1.0, 2.0])


def model(y):
    loc = numpyro.sample("loc", dist.Normal(0, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(loc, scale), obs=y)


def sampler(kernel=None, **options):
    kernel = ScoreLangevin(model, num_steps=2) if kernel is None else kernel
    defaults = {"num_warmup": 12, "num_samples": 20, "progress_bar": False}
    return MCMC(kernel, **(defaults | options))


def assert_same_draws(one, other):
    one, other = (mcmc.get_samples(group_by_chain=True) for mcmc in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name


def run(mcmc, path, key=0, num_blocks=5, data=DATA, **options):
    run_in_blocks(
        mcmc, jax.random.key(key), data, path=path, num_blocks=num_blocks, **options
    )


SETUPS = {
    "one chain": {},
    "vectorized": {"num_chains": 2, "chain_method": "vectorized"},
    "thinned": {"thinning": 3},
    "parallel": {"num_chains": 2, "chain_method": "parallel"},
}
KERNELS = {
    "ScoreLangevin": lambda: ScoreLangevin(model, num_steps=2),
    "pooled": lambda: ScoreLangevin(model, num_steps=2, share_adaptation=True),
    "AnnealedLangevin": lambda: AnnealedLangevin(model, levels=2),
    "NUTS": lambda: NUTS(model),
}


# every kernel with vectorized chains, and one kernel with every setup
QUICKER = [(kernel, "vectorized") for kernel in KERNELS] + [
    ("ScoreLangevin", setup) for setup in SETUPS if setup != "vectorized"
]
CASES = [
    pytest.param(*case, marks=[pytest.mark.long] * (case not in QUICKER))
    for case in product(KERNELS, SETUPS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "setup"), CASES)
def test_blocks_are_one_run(tmp_path, kernel, setup):
    whole = sampler(KERNELS[kernel](), **SETUPS[setup])
    whole.run(jax.random.key(0), DATA)
    blocks = sampler(KERNELS[kernel](), **SETUPS[setup])
    run(blocks, tmp_path)
    # another program than NumPyro's own loop, so equal up to rounding
    close = partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-3)
    jax.tree.map(close, blocks.get_samples(True), whole.get_samples(True))
    fields = blocks.get_extra_fields(group_by_chain=True)
    assert jax.tree.map(np.shape, fields) == jax.tree.map(
        np.shape, whole.get_extra_fields(group_by_chain=True)
    )
    close(blocks.last_state.z["loc"], whole.last_state.z["loc"])
    again = sampler(KERNELS[kernel](), **SETUPS[setup])
    run(again, tmp_path)
    assert_same_draws(again, blocks)


class StoppedError(Exception):
    """Stands for Ctrl-C."""


def test_stopped_run_keeps_its_draws_and_goes_on(tmp_path, monkeypatch):
    whole = sampler()
    run(whole, tmp_path / "whole")
    save, saved = ocp.CheckpointManager.save, []

    def stop_at_third(self, step, *args, **kwargs):
        if len(saved) == 3:
            raise StoppedError
        saved.append(step)
        return save(self, step, *args, **kwargs)

    stopped = sampler()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", stop_at_third)
        with pytest.raises(StoppedError):
            run(stopped, tmp_path / "run")
    assert saved == [7, 12, 19]  # 12 transitions of warm-up, blocks of seven
    so_far = stopped.get_samples()["loc"]
    assert np.array_equal(so_far, whole.get_samples()["loc"][:7])
    resumed = sampler()
    run(resumed, tmp_path / "run")
    assert_same_draws(resumed, whole)


def other_prior(y):
    loc = numpyro.sample("loc", dist.Normal(100, 1))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(loc, scale), obs=y)


def other_site(y):
    model(y)
    numpyro.deterministic("twice", y * 2)


def renamed(y):
    with numpyro.handlers.scope(prefix="new"):
        model(y)


def scaled(number):
    return lambda z: {"loc": z["loc"] * number}


def started(number):
    def start(site=None):
        return init_to_value(site, {"loc": number, "scale": 1.0})

    return start


def with_host_net(weight):
    """A model with a law whose score another library would compute."""

    class Net:
        def __init__(self):
            self.weight = weight

        def __call__(self, x, t):
            return -self.weight * x / (1 + t[:, None] ** 2)

    score = ScoreModel.from_fn(HostFunction(Net()), VE(), (1,))

    def learned(y):
        x = numpyro.sample("x", ScoreDistribution(score))
        numpyro.sample("y", dist.Normal(x[0], 1.0), obs=y)

    return learned


def langevin(model=model, **options):
    return {"kernel": ScoreLangevin(model, num_steps=2, **options)}


METRIC = jnp.array([1.0, 2.0])
OPTIONS = "kernel's options"
DATA_DIFFER = "data and initial values, model at these data"
OTHERS = [
    ({"key": 1}, {}, "key"),
    ({"num_blocks": 4}, {}, "num_blocks"),
    ({"data": DATA + 1}, {}, DATA_DIFFER),
    ({"data": np.asarray(DATA, np.float16)}, {}, DATA_DIFFER),
    ({}, {"num_samples": 21}, "num_samples"),
    ({}, {"thinning": 2}, "thinning"),
    ({}, {"kernel": ScoreLangevin(model, num_steps=3)}, OPTIONS),
    ({}, langevin(friction=None), OPTIONS),
    ({}, langevin(inverse_mass_matrix=METRIC), OPTIONS),
    ({}, langevin(other_prior), "model at these data"),
    ({}, langevin(other_site), "model at these data"),
    ({}, langevin(renamed), "model at these data"),
    ({}, langevin(init_strategy=started(1.0)), OPTIONS),
    ({}, {"postprocess_fn": scaled(2.0)}, "postprocess_fn"),
]
ALIKE_BUT = [  # two runs that differ in one thing, and what the error says
    ({"postprocess_fn": scaled(1.0)}, {"postprocess_fn": scaled(2.0)}, "postproc"),
    (
        langevin(init_strategy=started(1.0)),
        langevin(init_strategy=started(2.0)),
        OPTIONS,
    ),
    (langevin(with_host_net(1.0)), langevin(with_host_net(2.0)), "model at these data"),
    (
        {"kernel": ParallelTempering(model, local=lambda m: ScoreLangevin(m))},
        {
            "kernel": ParallelTempering(
                model, local=lambda m: ScoreLangevin(m, step_size=2.0)
            )
        },
        OPTIONS,
    ),
    (
        {"num_chains": 2, "chain_method": "vectorized"},
        {"num_chains": 2, "chain_method": "sequential"},
        "vectorized chains",
    ),
]


def test_blocks_of_another_run_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("numpyro_score.kernel.resumable_run._run", lambda *_: None)
    run(sampler(), tmp_path)
    for inputs, options, named in OTHERS:
        with pytest.raises(ValueError, match=rf"`path` must be .* in {named}\."):
            run(sampler(**options), tmp_path, **inputs)
    run(sampler(), tmp_path)


@pytest.mark.parametrize("case", range(len(ALIKE_BUT)))
def test_functions_and_chains_tell_runs_apart(tmp_path, monkeypatch, case):
    monkeypatch.setattr("numpyro_score.kernel.resumable_run._run", lambda *_: None)
    one, other, named = ALIKE_BUT[case]
    run(sampler(**one), tmp_path)
    run(sampler(**one), tmp_path)
    with pytest.raises(ValueError, match=rf"differs in {named}"):
        run(sampler(**other), tmp_path)


def test_precision_tells_runs_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("numpyro_score.kernel.resumable_run._run", lambda *_: None)
    mcmc = sampler(ScoreLangevin(potential_fn=lambda z: z @ z))
    options = {"path": tmp_path, "init_params": np.ones(2, "float32")}
    run_in_blocks(mcmc, jax.random.key(0), **options)
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="differs in floating-point type"),
    ):
        run_in_blocks(mcmc, jax.random.key(0), **options)


def test_kernels_of_numpyro_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("numpyro_score.kernel.resumable_run._run", lambda *_: None)
    run(sampler(NUTS(model)), tmp_path / "model")
    for kernel, named in [
        (NUTS(other_prior), "model at these data"),
        (NUTS(model, step_size=0.5), OPTIONS),
        (NUTS(model, init_strategy=init_to_value(values={"loc": 1.0})), OPTIONS),
        (NUTS(model, dense_mass=[("loc",)]), OPTIONS),
    ]:
        with pytest.raises(ValueError, match=rf"differs in {named}\."):
            run(sampler(kernel), tmp_path / "model")

    def of_potential(scale):
        mcmc = sampler(NUTS(potential_fn=lambda z: scale * z**2))
        options = {"init_params": jnp.zeros(()), "num_blocks": 2}
        run_in_blocks(mcmc, jax.random.key(0), path=tmp_path / "function", **options)

    of_potential(1.0)
    of_potential(1.0)
    with pytest.raises(ValueError, match=r"differs in model at these data\."):
        of_potential(2.0)


def test_plan_of_blocks():
    for numbers in [(10, 20, 1, 4), (0, 7, 3, 2), (5, 100, 7, 50), (3, 1, 1, 1)]:
        num_warmup, num_samples, thinning, _ = numbers
        plan = plan_blocks(*numbers)
        assert sum(block.size for block in plan) == num_warmup + num_samples
        assert plan[-1].end == num_warmup + num_samples
        kept = [b.size // b.thinning for b in plan if not b.warm]
        assert sum(kept) == num_samples // thinning
        warm = [b.size for b in plan if b.warm]
        assert sum(warm) == num_warmup + num_samples % thinning
    with pytest.raises(ValueError, match="`num_samples` must be at least `thinning`"):
        plan_blocks(10, 2, 3, 4)
    with pytest.raises(ValueError, match="`num_blocks` must be an integer of at least"):
        run(sampler(), "nowhere", num_blocks=0)


SCRIPT = """
import os, signal, sys, threading, warnings
import jax, numpy as np
import orbax.checkpoint as ocp
from tests.kernel.test_resumable_run import DATA, KERNELS, run, sampler

warnings.simplefilter("ignore")
kernel, folder, out = sys.argv[1:4]
when, delay = int(sys.argv[4]), float(sys.argv[5])
save = ocp.CheckpointManager.save

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def deadly_save(self, step, *args, **kwargs):
    if 0 <= when <= step:
        threading.Timer(delay, kill).start() if delay else kill()
    return save(self, step, *args, **kwargs)

ocp.CheckpointManager.save = deadly_save
options = {"num_chains": 2, "chain_method": "vectorized"}
mcmc = sampler(KERNELS[kernel](), num_warmup=40, num_samples=60, **options)
if folder == "none":
    mcmc.run(jax.random.key(0), DATA)
else:
    run(mcmc, folder, num_blocks=10)
np.savez(out, **mcmc.get_samples(group_by_chain=True))
"""


def run_script(root, *arguments):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    ["ScoreLangevin", pytest.param("AnnealedLangevin", marks=pytest.mark.long)],
)
def test_killed_process_loses_nothing(kernel, tmp_path, root):
    """SIGKILL before, in the middle of and after saves at 20, 50 and 90 percent."""
    done = run_script(root, kernel, "none", tmp_path / "whole.npz", -1, 0)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    for when, delay in [(20, 0.0), (50, 0.01), (90, 0.05)]:
        killed = run_script(root, kernel, folder, tmp_path / "no.npz", when, delay)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run_script(root, kernel, folder, tmp_path / "resumed.npz", -1, 0)
    assert done.returncode == 0, done.stderr
    whole, resumed = (np.load(tmp_path / f"{n}.npz") for n in ("whole", "resumed"))
    assert whole.files == resumed.files
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole.files)


@pytest.mark.parametrize("damaged", [1, -1])
def test_damaged_block_is_run_again(tmp_path, damaged):
    whole = sampler()
    run(whole, tmp_path)
    step = sorted(int(p.name) for p in tmp_path.iterdir() if p.is_dir())[damaged]
    (tmp_path / str(step) / "default" / "_METADATA").write_bytes(b"{}")
    again = sampler()
    with pytest.warns(UserWarning, match=rf"/{step} is damaged .*_METADATA was alt"):
        run(again, tmp_path)
    assert_same_draws(again, whole)
