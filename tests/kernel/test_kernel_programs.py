"""Compilation, jit, vmap, pickling and devices, for every kernel of the package."""

import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import NUTS

from tests.kernel.all_kernels import (
    DATA,
    KERNELS,
    assert_close,
    assert_same,
    donates,
    draws_of,
    learned,
    ordinary,
    sampler,
)

pytestmark = pytest.mark.filterwarnings("ignore:AnnealedLangevin anneals")


def compiled(caplog, run: Callable) -> list[str]:
    """Return the names of the programs that a run compiles."""
    caplog.clear()
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, logger="jax"):
        run()
    messages = (record.getMessage() for record in caplog.records)
    found = (re.match(r"Compiling (\S+) with", message) for message in messages)
    return [match.group(1) for match in found if match]


LOOP = "jit(_fori_collect_loop)"


@pytest.mark.slow
@pytest.mark.parametrize("make", [NUTS, *KERNELS.values()])
def test_second_run_compiles_nothing_of_its_own(make, caplog):
    """NumPyro compiles its loop at every run; a kernel may add nothing to that."""
    mcmc = sampler(make(ordinary))
    keys = jax.random.split(jax.random.key(0), 3)
    first, second, third = keys[0], keys[1], keys[2]
    mcmc.run(first, DATA)
    assert compiled(caplog, lambda: mcmc.run(second, DATA)) == [LOOP]
    mcmc.post_warmup_state = mcmc.last_state
    assert compiled(caplog, lambda: mcmc.run(third, DATA)) == [LOOP]


class Counted:
    """A model that counts how often it is traced."""

    def __init__(self, model: Callable) -> None:
        self.model, self.traces = model, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.traces += 1
        return self.model(*args, **kwargs)


def test_number_of_traces_does_not_grow_with_draws(make):
    traces = []
    for num_samples in (8, 50):
        model = Counted(learned)
        mcmc = sampler(make(model), num_samples=num_samples)
        mcmc.run(jax.random.key(0), DATA)
        traces.append(model.traces)
    assert traces[0] == traces[1]


def test_run_inside_jit(make):
    @jax.jit
    def run(key, y):
        mcmc = sampler(make(learned))
        mcmc.run(key, y)
        return mcmc.get_samples()

    expected = sampler(make(learned))
    expected.run(jax.random.key(0), DATA)
    assert_close(run(jax.random.key(0), DATA), expected.get_samples())


@donates
@pytest.mark.slow
def test_run_inside_vmap(make_one):
    def run(key, y):
        mcmc = sampler(make_one(learned))
        mcmc.run(key, y)
        return mcmc.get_samples()["x"]

    keys = jax.random.split(jax.random.key(0), 2)
    assert jax.vmap(run, (0, None))(keys, DATA).shape == (2, 8, 2)


# pickling
def test_pickled_run_goes_on(make):
    mcmc = sampler(make(learned))
    mcmc.run(jax.random.key(0), DATA)
    copy = pickle.loads(pickle.dumps(mcmc))
    assert_same(draws_of(copy), draws_of(mcmc))
    for each in (mcmc, copy):
        each.post_warmup_state = each.last_state
        each.run(each.post_warmup_state.rng_key, DATA)
    assert_same(draws_of(copy), draws_of(mcmc))


@pytest.mark.slow
def test_pickled_kernel_runs(make):
    draws = []
    for each in (make(learned), pickle.loads(pickle.dumps(make(learned)))):
        mcmc = sampler(each)
        mcmc.run(jax.random.key(0), DATA)
        draws.append(draws_of(mcmc))
    assert_same(*draws)


# clouds of many weighted chains
@pytest.mark.long
@pytest.mark.slow
def test_cloud_is_pickled_resumed_and_compiled():
    """What holds for a few chains holds for a cloud with its weights."""
    options = {"num_chains": 40, "chain_method": "vectorized", "num_samples": 4}
    make = KERNELS["AnnealedLangevin"]
    long = sampler(make(learned), **(options | {"num_samples": 8}))
    long.run(jax.random.key(0), DATA)
    first = sampler(make(learned), **options)
    first.run(jax.random.key(0), DATA)
    second = pickle.loads(pickle.dumps(first))
    second.post_warmup_state = second.last_state
    second.run(second.last_state.rng_key, DATA)
    joined = [draws_of(first), draws_of(second)]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *joined)
    assert_same(joined, draws_of(long))
    assert_same(second.last_state.weights, first.last_state.weights)

    @jax.jit
    def run(key, y):
        mcmc = sampler(make(learned), **options)
        mcmc.run(key, y)
        return mcmc.get_samples(), mcmc.last_state.weights.log_evidence

    draws, log_evidence = run(jax.random.key(0), DATA)
    assert_close(draws, first.get_samples())
    assert_close(log_evidence, first.last_state.weights.log_evidence)


# chains spread over devices
SHARDED = """
import sys, warnings
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tests.kernel.all_kernels import DATA, KERNELS, draws_of, learned, sampler

warnings.simplefilter("ignore")
name, out = sys.argv[1:]
start = {"x": np.linspace(-1, 1, 16).reshape(8, 2), "scale": np.linspace(-1, 1, 8)}
start = jax.tree.map(lambda x: x.astype(np.float32), start)
assert len(jax.devices()) == 4
mesh = Mesh(np.array(jax.devices()), ("chains",))
spread = NamedSharding(mesh, PartitionSpec("chains"))
placed = {"one": jax.devices()[0], "four": spread}
draws = {}
for where, place in placed.items():
    kernel = KERNELS[name](learned)
    mcmc = sampler(kernel, num_chains=8, chain_method="vectorized")
    mcmc.run(jax.random.key(0), DATA, init_params=jax.device_put(start, place))
    draws |= {f"{where}_{k}": v for k, v in draws_of(mcmc).items()}
    draws[f"{where}_devices"] = len(mcmc.last_state.z["x"].sharding.device_set)
np.savez(out, **draws)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_chains_spread_over_devices_are_the_same(name, tmp_path, root):
    """Up to rounding: XLA compiles another program for four devices."""
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, name, str(tmp_path / "draws.npz")],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "draws.npz") as draws:
        assert (int(draws["one_devices"]), int(draws["four_devices"])) == (1, 4)
        for site in ("x", "scale", "total"):
            assert_close(draws[f"one_{site}"], draws[f"four_{site}"])
