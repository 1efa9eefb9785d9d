"""Agreement with references, and effective draws by cost, over many posteriors.

The seven posteriors of posteriordb, whose reference draws lie in ``tests/posteriordb``,
and those of ``tests/posteriors.py``. The reference of a known law are independent
draws of it, that of the others long chains of NUTS with a dense metric that start at
the median. Every kernel runs with its defaults and starts, in double precision unless
``--single`` asks for single precision, in which the reference still is not:

    python -m tests.benchmarks.posteriordb --only trend schools

Columns, over all quantities: the largest distance of a mean from the reference in
standard errors, the largest log ratio of the sds, R-hat, the smallest bulk and tail
ESS, bulk ESS per gradient, per CPU second after compilation and per second of warm-up
and draws with compilation, gradients of warm-up in thousands, and ESS per gradient
over that of the better of NUTS with a diagonal and with a dense metric.

BlackJAX is an optional peer: its adjusted MCLMC runs where it is installed.
"""

import argparse
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import arviz
import jax
import numpy as np
from numpyro.infer import MCMC, NUTS, Predictive, init_to_median

from numpyro_score import ScoreLangevin
from tests.benchmarks.blackjax_peers import BlackjaxMCLMC
from tests.kernel.test_posteriordb import mean_error
from tests.posteriors import KNOWN_LAWS, Posterior, all_posteriors

NUM_CHAINS = 4
NUM_TRIES = 4  # of a reference, until it has converged
PEERS = ("NUTS", "NUTS dense")
HEADER = (
    "posterior         kernel            |z|  log sd  R-hat    ESS   tail  ESS/grad  "
    "ESS/CPU s   ESS/s  warm-up  x NUTS"
)


class Row(NamedTuple):
    """What one kernel reached on one posterior; the columns of the table."""

    z: float
    log_sd_ratio: float
    r_hat: float
    bulk: float
    tail: float
    per_gradient: float
    per_cpu_second: float
    per_second_compiling: float
    warmup_gradients: int

    def passes(self) -> bool:
        """Whether the draws agree with the reference and are enough."""
        right = self.z < 5 and self.log_sd_ratio < 0.10
        return right and self.r_hat < 1.01 and self.bulk >= 400


class Run(NamedTuple):
    """Draws of one kernel, chains by draws, and what they cost."""

    draws: dict[str, np.ndarray]
    gradients: int
    warmup_gradients: int
    cpu_seconds: float
    seconds: float


def kernel(name: str, posterior: Posterior, options: dict[str, Any]) -> Any:
    """Return the kernel of a name."""
    if name.startswith("NUTS"):
        return NUTS(posterior.model, dense_mass=name == "NUTS dense")
    return ScoreLangevin(posterior.model, **options)


def entries(samples: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return every number of every site, chains by draws."""
    found = {}
    for name, values in samples.items():
        values = np.asarray(values, float)
        flat = values.reshape(*values.shape[:2], -1)
        for j in range(flat.shape[-1]):
            found[f"{name}[{j + 1}]" if values.ndim > 2 else name] = flat[..., j]
    return found


def run(
    kernel: Any,
    data: dict[str, Any],
    num_warmup: int,
    num_samples: int,
    seed: int = 0,
) -> Run:
    """Return draws of vectorized chains; the second of two equal runs is timed."""
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    begin = time.perf_counter()
    mcmc.warmup(
        jax.random.key(seed), **data, extra_fields=("num_steps",), collect_warmup=True
    )
    warmup = np.asarray(mcmc.get_extra_fields()["num_steps"]).sum()
    state = mcmc.post_warmup_state

    @jax.jit  # `run` alone compiles its loop anew at every call
    def draw(key: Any, state: Any) -> tuple[Any, Any]:
        mcmc.post_warmup_state = state
        mcmc.run(key, **data, extra_fields=("num_steps",))
        return mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields()

    jax.block_until_ready(draw(jax.random.key(1), state))
    seconds = time.perf_counter() - begin
    cpu = time.process_time()
    samples, extra = jax.block_until_ready(draw(jax.random.key(2), state))
    cpu = time.process_time() - cpu
    gradients = int(np.asarray(extra["num_steps"]).sum())
    return Run(entries(samples), gradients, int(warmup), cpu, seconds)


def run_blackjax(posterior: Posterior, num_warmup: int, num_samples: int) -> Run:
    """Do the same with BlackJAX's adjusted MCLMC, whose warm-up counts no gradients."""
    # BlackJAX's peers take positional arguments of the model
    peer = BlackjaxMCLMC(lambda: posterior.model(**posterior.data))
    begin = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), NUM_CHAINS)
    warm = jax.vmap(lambda key: peer.warmup((), num_warmup, key))(keys)
    draw = jax.jit(jax.vmap(lambda key, warm: peer.draw((), num_samples, key, warm)))
    jax.block_until_ready(draw(keys, warm))
    seconds = time.perf_counter() - begin
    cpu = time.process_time()
    keys = jax.random.split(jax.random.key(2), NUM_CHAINS)
    samples, gradients = jax.block_until_ready(draw(keys, warm))
    cpu = time.process_time() - cpu
    return Run(entries(samples), int(gradients.sum()), 0, cpu, seconds)


def reference(name: str, posterior: Posterior, num_draws: int) -> dict[str, np.ndarray]:
    """Return reference draws: given ones, those of a known law, or NUTS's."""
    if posterior.reference is not None:
        return posterior.reference
    size = NUM_CHAINS * num_draws
    if name in KNOWN_LAWS:
        exact = Predictive(posterior.model, num_samples=size)(
            jax.random.key(9), **posterior.data
        )
        chains = {k: v.reshape(NUM_CHAINS, -1, *v.shape[1:]) for k, v in exact.items()}
        return entries(chains)
    peer = NUTS(
        posterior.model,
        dense_mass=True,
        target_accept_prob=0.9,
        init_strategy=init_to_median(num_samples=1000),
    )
    for seed in range(NUM_TRIES):  # warm-up may leave a chain of ARMA far away
        draws = run(peer, posterior.data, 2000, num_draws, seed).draws
        r_hat = max(float(arviz.rhat(values)) for values in draws.values())
        if r_hat <= 1.01:
            return draws
    print(f"{name:17s} has a reference of R-hat {r_hat:.3f}: no row is to be trusted")
    return draws


def row(found: Run, expected: dict[str, np.ndarray]) -> Row:
    """Return the figures of a run beside its reference."""
    # posteriordb's reference names some of the quantities only
    shared = [name for name in expected if name in found.draws]
    pairs = [(found.draws[name], expected[name]) for name in shared]
    errors = [np.hypot(mean_error(x), mean_error(y)) for x, y in pairs]
    gaps = [abs(x.mean() - y.mean()) for x, y in pairs]
    draws = [x for x, _ in pairs]
    bulk = min(float(arviz.ess(x)) for x in draws)
    return Row(
        z=float(np.max(np.divide(gaps, errors))),
        log_sd_ratio=max(abs(float(np.log(x.std() / y.std()))) for x, y in pairs),
        r_hat=max(float(arviz.rhat(x)) for x in draws),
        bulk=bulk,
        tail=min(float(arviz.ess(x, method="tail", prob=(0.05, 0.95))) for x in draws),
        per_gradient=bulk / found.gradients,
        per_cpu_second=bulk / found.cpu_seconds,
        per_second_compiling=bulk / found.seconds,
        warmup_gradients=found.warmup_gradients,
    )


def text(name: str, kernel_name: str, row: Row, best_nuts: float) -> str:
    """Return one line of the table."""
    ratio = row.per_gradient / best_nuts
    return (
        f"{name:17s} {kernel_name:14s} {row.z:6.1f}  {row.log_sd_ratio:6.3f}  "
        f"{row.r_hat:5.3f} {row.bulk:6.0f} {row.tail:6.0f}  {row.per_gradient:8.4f}  "
        f"{row.per_cpu_second:9.0f} {row.per_second_compiling:7.0f}  "
        f"{row.warmup_gradients / 1000:6.0f}k  {ratio:6.2f}  "
        f"{'right' if row.passes() else 'FAILS'}"
    )


def measure(name: str, posterior: Posterior, options: argparse.Namespace) -> dict:
    """Run all kernels on one posterior and print its rows."""
    with jax.enable_x64(True):
        expected = reference(name, posterior, options.reference_draws)
    with jax.enable_x64(not options.single):
        # numbers of JAX keep their precision, those of NumPy take the present one
        data = jax.tree.map(np.asarray, posterior.data)
        found = run_kernels(posterior._replace(data=data), options)
    rows = {kernel_name: row(run, expected) for kernel_name, run in found.items()}
    nuts = [rows[peer].per_gradient for peer in PEERS if peer in rows]
    for kernel_name, found_row in rows.items():
        line = text(name, kernel_name, found_row, max(nuts, default=np.nan))
        print(line, flush=True)
    return rows


def run_kernels(posterior: Posterior, options: argparse.Namespace) -> dict[str, Run]:
    """Return the draws of all kernels on one posterior."""
    lengths = options.num_warmup, options.num_samples
    runs: dict[str, Run] = {}
    for kernel_name in options.kernels:
        if kernel_name == "BlackJAX MCLMC":
            found = run_blackjax(posterior, *lengths)
        else:
            ours = {
                "num_steps": options.num_steps,
                "max_step_halvings": options.max_step_halvings,
            }
            found = run(kernel(kernel_name, posterior, ours), posterior.data, *lengths)
        runs[kernel_name] = found
    return runs


def main(args: Sequence[str] | None = None) -> dict[str, dict[str, Row]]:
    """Print one row per posterior and kernel; return the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    with jax.enable_x64(True):
        posteriors = all_posteriors()
    parser.add_argument("--only", nargs="+", choices=list(posteriors), metavar="NAME")
    names = ["ScoreLangevin", *PEERS]
    if find_spec("blackjax") is not None:
        names.append("BlackJAX MCLMC")
    parser.add_argument("--kernels", nargs="+", default=names)
    parser.add_argument("--num-warmup", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--reference-draws", type=int, default=20000)
    parser.add_argument("--num-steps", type=int, help="of ScoreLangevin, not adapted")
    parser.add_argument(
        "--single", action="store_true", help="precision of the kernels"
    )
    parser.add_argument("--max-step-halvings", type=int, default=0, metavar="J")
    options = parser.parse_args(args)
    print(HEADER)
    chosen = options.only or list(posteriors)
    return {name: measure(name, posteriors[name], options) for name in chosen}


if __name__ == "__main__":
    main()
