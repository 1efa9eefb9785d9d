"""Many runs in one process: at once in threads, and one after the other."""

import gc
import logging
import re
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

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
    ParallelTempering,
    ParticleMetropolis,
    ScoreDistribution,
    ScoreLangevin,
    ScoreMatching,
    ScoreModel,
    ScoreSDE,
)
from numpyro_score.infer import AmortizedPosterior

KEY = jax.random.key(0)
DATA = np.asarray(jax.random.normal(KEY, (64, 2)))
NORMAL = ScoreModel.from_fn(lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), ())
LOOP = "jit(_fori_collect_loop)"  # NumPyro compiles its loop at every run


def ordinary(y: Any = None) -> None:
    x = numpyro.sample("x", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def learned(y: Any) -> None:
    x = numpyro.sample("x", ScoreDistribution(NORMAL))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def sampler(kernel: Any, num_warmup: int = 20) -> MCMC:
    return MCMC(kernel, num_warmup=num_warmup, num_samples=20, progress_bar=False)


# NumPyro has one stack of handlers for all threads: models are traced one at a time
TRACING = threading.Lock()


def chain(y: float) -> Callable[[], Any]:
    """Return a run of a new sampler; its draws differ with the data."""

    def run() -> Any:
        mcmc = sampler(ScoreLangevin(ordinary))
        with TRACING:
            mcmc.run(KEY, y)
        return np.asarray(mcmc.get_samples()["x"])

    return run


def train() -> Any:
    trainer = ScoreMatching(MLP(2, width=4, depth=1))
    result = trainer.run(KEY, 20, DATA, batch_size=8, progress_bar=False)
    return np.asarray(result.losses)


def at_once(*runs: Callable[[], Any]) -> list[Any]:
    """Return the results of functions that run in a thread each."""
    results: list[Any] = [None] * len(runs)
    start = threading.Barrier(len(runs))

    def one(i: int) -> None:
        start.wait()
        results[i] = runs[i]()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    "runs", [(chain(1.0), chain(3.0)), (train, chain(1.0))], ids=["chains", "training"]
)
def test_threads_change_no_draw(runs):
    together, apart = at_once(*runs), [run() for run in runs]
    for got, expected in zip(together, apart, strict=True):
        assert expected.std() > 0
        np.testing.assert_array_equal(got, expected)


# one after the other


def repeat_chain() -> Callable[[], None]:
    mcmc = sampler(ScoreLangevin(ordinary))
    return lambda: mcmc.run(KEY, 1.0)


def repeat_tempering() -> Callable[[], None]:
    mcmc = sampler(ParallelTempering(ordinary, num_rungs=3))
    return lambda: mcmc.run(KEY, 1.0)


def repeat_metropolis() -> Callable[[], None]:
    kernel = ParticleMetropolis(learned, num_particles=4, levels=5)
    mcmc = sampler(kernel, num_warmup=0)
    return lambda: mcmc.run(KEY, 1.0)


def repeat_training() -> Callable[[], None]:
    trainer = ScoreMatching(MLP(2, width=4, depth=1))
    options: dict[str, Any] = {"batch_size": 8, "progress_bar": False}
    return lambda: trainer.run(KEY, 20, DATA, **options) and None


def repeat_particles() -> Callable[[], None]:
    inference = ScoreSDE(
        learned, num_samples=8, num_particles=8, levels=5, num_moves=1, **QUIET
    )
    return lambda: inference.run(KEY, 1.0)


def repeat_amortized() -> Callable[[], None]:
    simulator = NPSE(ordinary, "y").simulator()
    trainer = ScoreMatching(MLP(1, width=4, depth=1, context_size=1))
    rows = DATA[:, :1]
    score = trainer.get_score(trainer.init(KEY, rows, context=rows[:, 0]))
    posterior = AmortizedPosterior(score, simulator, num_steps=4)
    return lambda: posterior.sample(KEY, 0.5, 10) and None


QUIET: dict[str, Any] = {"progress_bar": False}
REPEATED: dict[str, tuple[Callable, list[str]]] = {
    "training": (repeat_training, []),
    "amortized": (repeat_amortized, []),
    "ScoreLangevin": (repeat_chain, [LOOP]),
    "ScoreSDE": (repeat_particles, []),
    "ParallelTempering": (repeat_tempering, [LOOP]),
    "ParticleMetropolis": (repeat_metropolis, [LOOP]),
}
SLOW = ("ScoreSDE", "ParallelTempering", "ParticleMetropolis")
CASES = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name in REPEATED
]
# bytes of Python a run: NumPyro keeps the loop that it compiles, of NUTS 165 kB, of
# ScoreLangevin 220 kB and of ParallelTempering 334 kB
MAX_GROWTH, MAX_GROWTH_OF_LOOPS = 100_000, 500_000


def size() -> tuple[int, int]:
    """Return how many arrays live on devices, and the bytes that Python holds."""
    gc.collect()
    return len(jax.live_arrays()), tracemalloc.get_traced_memory()[0]


def compiled(caplog: Any, run: Callable[[], None]) -> list[str]:
    """Return the names of the programs that a run compiles."""
    caplog.clear()
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, logger="jax"):
        run()
    messages = (record.getMessage() for record in caplog.records)
    found = (re.match(r"Compiling (\S+) with", message) for message in messages)
    return [match.group(1) for match in found if match]


@pytest.mark.filterwarnings("ignore:ScoreSDE. evidence")  # eight particles
@pytest.mark.parametrize("name", CASES)
def test_runs_keep_no_memory_and_compile_nothing_anew(name, caplog):
    make, expected = REPEATED[name]
    run = make()
    run()
    assert compiled(caplog, run) == expected
    tracemalloc.start()
    try:
        run()
        arrays, before = size()
        for _ in range(3):
            run()
        after = size()
    finally:
        tracemalloc.stop()
    assert after[0] == arrays
    allowed = MAX_GROWTH_OF_LOOPS if expected else MAX_GROWTH
    assert (after[1] - before) / 3 < allowed


def test_kept_results_are_seen():
    """What a run would keep, this test would find."""
    arrays, _ = size()
    kept = [jnp.zeros(3) + i for i in range(3)]
    assert size()[0] == arrays + len(kept)
