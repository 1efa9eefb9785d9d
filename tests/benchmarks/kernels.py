"""Effective draws per gradient and per CPU second of Langevin kernels and their peers.

For each target and number of chains: warm-up, one run that compiles, one run that is
timed. Reported are the smallest bulk ESS over all quantities, per gradient evaluation
and per second of CPU time of all threads, the largest R-hat, and the seconds that
warm-up took with compilation. The last two columns set ESS per CPU second beside that
of NUTS in the same run: of the quantities, and of their distances from the median
(folded), which show chains that jump from side to side and keep their distance.

    python -m tests.benchmarks.kernels --targets schools logistic --chains 4 64

BlackJAX is an optional peer: its MALA and adjusted MCLMC run where it is installed.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, BarkerMH

from numpyro_score import ScoreLangevin
from tests.benchmarks.blackjax_peers import MISSING, BlackjaxMALA, BlackjaxMCLMC
from tests.benchmarks.transition import targets as regression_targets


def gaussian_diagonal() -> None:
    numpyro.sample("x", dist.Normal(0, jnp.geomspace(0.1, 10, 100)).to_event(1))


def gaussian_dense() -> None:
    """Condition number 10^4 in directions that no coordinate shows."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(100, 100)))[0]
    covariance = rotation @ np.diag(np.geomspace(0.01, 100, 100)) @ rotation.T
    law = dist.MultivariateNormal(jnp.zeros(100), jnp.asarray(covariance))
    numpyro.sample("x", law)


def funnel() -> None:
    """Neal's funnel in its non-centred form."""
    scale = numpyro.sample("scale", dist.Normal(0, 3))
    x = numpyro.sample("x", dist.Normal(0, 1).expand([9]).to_event(1))
    numpyro.deterministic("y", jnp.exp(scale / 2) * x)


def mixture() -> None:
    """Two components that overlap, in ten dimensions."""
    locs = jnp.stack([-jnp.ones(10), jnp.ones(10)])
    weights = dist.Categorical(jnp.array([0.3, 0.7]))
    components = dist.Normal(locs, 1.0).to_event(1)
    numpyro.sample("x", dist.MixtureSameFamily(weights, components))


def targets() -> dict[str, tuple[Callable, tuple]]:
    regressions = regression_targets()
    return {
        "schools": regressions["eight schools"],
        "logistic": regressions["logistic regression"],
        "diagonal": (gaussian_diagonal, ()),
        "dense": (gaussian_dense, ()),
        "funnel": (funnel, ()),
        "mixture": (mixture, ()),
    }


def kernels(model: Callable) -> dict[str, Any]:
    """The members of the family, and NumPyro's kernels beside them."""
    unadjusted = {"adjusted": False, "num_steps": 1, "friction": 1.0}
    welford = {"metric": "welford", "num_steps": 8, "share_adaptation": False}
    own = partial(ScoreLangevin, model, **welford)
    mala = partial(own, num_steps=1, friction=None)
    pooled = partial(own, share_adaptation=True)
    return {
        "NUTS": NUTS(model),
        "NUTS dense": NUTS(model, dense_mass=True),
        "BarkerMH": BarkerMH(model),
        "BlackJAX MALA": BlackjaxMALA(model),
        "BlackJAX MCLMC": BlackjaxMCLMC(model),
        "MALA": mala(),
        "MALA pooled": mala(share_adaptation=True),
        "MALA dense pooled": mala(dense_mass=True, share_adaptation=True),
        "MALT 2 dense pooled": pooled(dense_mass=True, num_steps=2, friction=1.0),
        "MALT 4 pooled": pooled(num_steps=4),
        "MALT 4 dense pooled": pooled(dense_mass=True, num_steps=4, friction=0.3),
        "MALT 8": own(),
        "MALT 8 pooled": pooled(),
        "kinetic pooled": pooled(**unadjusted),
        "default": ScoreLangevin(model),
    }


class Report(NamedTuple):
    """What one kernel reached on one target."""

    ess_per_gradient: float
    ess_per_second: float
    folded_per_second: float
    r_hat: float
    warmup_seconds: float


def measure_blackjax(
    kernel: BlackjaxMALA | BlackjaxMCLMC,
    args: tuple,
    num_chains: int,
    num_warmup: int,
    num_samples: int,
) -> Report:
    """Do the same for a kernel of BlackJAX, whose chains are mapped as a whole."""
    start = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), num_chains)
    warm = jax.vmap(partial(kernel.warmup, args, num_warmup))(keys)
    jax.block_until_ready(warm)
    warmup_seconds = time.perf_counter() - start
    draw = jax.jit(jax.vmap(partial(kernel.draw, args, num_samples)))
    keys = jax.random.split(jax.random.key(1), 2 * num_chains).reshape(2, num_chains)
    jax.block_until_ready(draw(keys[0], warm))
    cpu = time.process_time()
    draws, gradients = jax.block_until_ready(draw(keys[1], warm))
    cpu = time.process_time() - cpu
    return report(draws, int(gradients.sum()), cpu, warmup_seconds)


def report(draws: Any, gradients: int, cpu: float, warmup_seconds: float) -> Report:
    """Return the smallest ESS over all quantities by cost, and the largest R-hat."""
    draws = jax.tree.map(np.asarray, draws)
    ess, r_hat = ess_and_r_hat(draws)
    folded, _ = ess_and_r_hat(
        jax.tree.map(lambda x: abs(x - np.median(x, (0, 1))), draws)
    )
    return Report(ess / gradients, ess / cpu, folded / cpu, r_hat, warmup_seconds)


def ess_and_r_hat(draws: Any) -> tuple[float, float]:
    """Return the smallest bulk ESS and the largest R-hat over all quantities."""
    data = arviz.from_dict({"posterior": draws})
    ess = min(float(v.min()) for v in arviz.ess(data).data_vars.values())
    r_hat = max(float(v.max()) for v in arviz.rhat(data).data_vars.values())
    return ess, r_hat


def measure(
    kernel: Any, args: tuple, num_chains: int, num_warmup: int, num_samples: int
) -> Report:
    """Run a kernel and weigh its effective draws against their cost."""
    if isinstance(kernel, BlackjaxMALA | BlackjaxMCLMC):
        return measure_blackjax(kernel, args, num_chains, num_warmup, num_samples)
    # BarkerMH knows no vectorized chains; vmap of whole runs serves it
    vectorized = jax.vmap if isinstance(kernel, BarkerMH) else "vectorized"
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=vectorized,
        progress_bar=False,
    )
    fields = () if isinstance(kernel, BarkerMH) else ("num_steps",)
    start = time.perf_counter()
    mcmc.warmup(jax.random.key(0), *args, extra_fields=fields)
    jax.block_until_ready(mcmc.post_warmup_state.z)
    warmup_seconds = time.perf_counter() - start

    @jax.jit  # `run` alone compiles its loop anew at every call
    def draw(key: Any, state: Any) -> tuple[Any, Any]:
        mcmc.post_warmup_state = state
        mcmc.run(key, *args, extra_fields=fields)
        return mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields()

    state = mcmc.post_warmup_state
    jax.block_until_ready(draw(jax.random.key(1), state))
    cpu = time.process_time()
    draws, extra = jax.block_until_ready(draw(jax.random.key(2), state))
    cpu = time.process_time() - cpu
    gradients = num_chains * num_samples
    if fields:
        gradients = int(extra["num_steps"].sum())
    return report(draws, gradients, cpu, warmup_seconds)


def row(report: Report, base: Report) -> str:
    """Return the columns after the kernel's name, the last two beside the base."""
    ess = f"{report.ess_per_gradient:9.4f}  {report.ess_per_second:10.0f}"
    rest = f"{report.r_hat:5.3f}  {report.warmup_seconds:5.1f} s"
    ratio = report.ess_per_second / base.ess_per_second
    folded = report.folded_per_second / base.folded_per_second
    return f"{ess}  {rest}  {ratio:6.1f}  {folded:6.1f}"


def main(args: Sequence[str] | None = None) -> dict[tuple[str, int, str], Report]:
    """Print one row per target, number of chains and kernel; return the reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(targets()))
    parser.add_argument("--chains", type=int, nargs="+", default=[4, 64])
    names = list(kernels(funnel))
    if find_spec("blackjax") is None:
        names = [name for name in names if not name.startswith("BlackJAX")]
        print(MISSING)
    parser.add_argument("--kernels", nargs="+", default=names)
    parser.add_argument("--num-warmup", type=int, default=1000)
    parser.add_argument("--num-samples", type=int, default=2000)
    options = parser.parse_args(args)
    reports = {}
    print(
        "target    chains  kernel                "
        "ESS/grad   ESS/CPU s  R-hat  warm-up  x NUTS  folded"
    )
    for target in options.targets:
        model, data = targets()[target]
        for num_chains in options.chains:
            for name in options.kernels:
                report = measure(
                    kernels(model)[name],
                    data,
                    num_chains,
                    options.num_warmup,
                    options.num_samples,
                )
                reports[target, num_chains, name] = report
                base = reports.get((target, num_chains, "NUTS"), report)
                columns = row(report, base)
                print(f"{target:9s} {num_chains:6d}  {name:20s} {columns}", flush=True)
    return reports


if __name__ == "__main__":
    main()
