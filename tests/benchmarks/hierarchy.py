"""Posteriors of models with a plate, against closed forms and NUTS.

python -m tests.benchmarks.hierarchy [exact] [learned] [schools]

prints for each number of groups J how far the mean is from the exact one, in posterior
sd, and the ratio of the sd. Takes a few minutes on two cores.
"""

import sys
import time

import jax
import numpy as np
from numpyro.infer import MCMC, NUTS

from numpyro_score import MLP
from numpyro_score.infer import NPSE
from tests.hierarchical_models import (
    EFFECTS,
    STANDARD_ERRORS,
    eight_schools,
    exact_hierarchy,
    local_posterior,
    normal_groups,
    observe,
    shared_posterior,
)

KEY = jax.random.key(0)
NUM_SAMPLES = 2000


def nets(num_shared, num_local, num_observed, width=64, depth=2):
    """Return the pair of nets of shared and of local sites."""
    sizes = (num_shared, num_observed), (num_local, num_observed + num_shared)
    options = {"width": width, "depth": depth, "norm": False}
    return tuple(MLP(size, context_size=given, **options) for size, given in sizes)


def compare(draws, mean, sd):
    """Return offset of the mean in sd and ratio of the sd, the worst of all numbers."""
    draws = np.asarray(draws, float)
    ratio = draws.std(0) / sd
    worst = np.argmax(np.abs(np.log(ratio)).ravel())
    offset = (draws.mean(0) - mean) / sd
    return np.ravel(offset)[np.argmax(np.abs(offset))], ratio.ravel()[worst]


def report(name, num_groups, num_simulations, draws, exact, seconds):
    offset, ratio = compare(draws, *exact)
    print(
        f"{name:>14} J = {num_groups:<7} simulations {num_simulations:<7} offset "
        f"{offset:7.3f} sd   ratio of sd {ratio:6.3f}   {seconds:5.1f} s",
        flush=True,
    )


def timed_shared(posterior, y, num_simulations):
    start = time.time()
    options = {"num_simulations": num_simulations}
    draws = posterior.sample_shared(KEY, y, NUM_SAMPLES, **options)["mu"]
    draws.block_until_ready()
    return draws, time.time() - start


def exact_scores():
    """Composition and Langevin steps alone: no net."""
    posterior = exact_hierarchy()
    for num_groups in (1, 10, 1000, 100_000):
        y = observe(num_groups)
        draws, seconds = timed_shared(posterior, y, 0)
        report("exact, mu", num_groups, 0, draws, shared_posterior(y), seconds)


def learned_scores():
    npse = NPSE(normal_groups, "y", plate="groups", net=nets(1, 1, 1))
    start = time.time()
    posterior = npse.fit(KEY, 10_000, num_steps=4000, progress_bar=False)
    print(f"trained in {time.time() - start:.0f} s on 10000 simulations")
    for num_groups in (10, 100, 1000):
        y = observe(num_groups)
        for num_simulations in (0, max(10_000, 100 * num_groups)):
            draws, seconds = timed_shared(posterior, y, num_simulations)
            exact = shared_posterior(y)
            options = num_groups, num_simulations
            report("learned, mu", *options, draws, exact, seconds)
    y = observe(10)
    draws = posterior.sample(KEY, y, NUM_SAMPLES)["z"]
    report("learned, z", 10, 10_000, draws, local_posterior(y), 0.0)


def schools():
    mcmc = MCMC(
        NUTS(eight_schools, target_accept_prob=0.95),
        num_warmup=1000,
        num_samples=5000,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    data = {"y": EFFECTS, "sigma": STANDARD_ERRORS}
    mcmc.run(KEY, **data)
    reference = mcmc.get_samples()
    npse = NPSE(eight_schools, ("y", "sigma"), plate="schools", net=nets(2, 1, 2))
    posterior = npse.fit(KEY, 10_000, num_steps=4000, progress_bar=False)
    for num_simulations in (0, 10_000):
        start = time.time()
        options = {"num_simulations": num_simulations}
        draws = posterior.sample(KEY, data, NUM_SAMPLES, **options)
        seconds = time.time() - start
        for name, rows in reference.items():
            exact = np.mean(rows, 0), np.std(rows, 0)
            label = f"schools, {name}"
            report(label, 8, num_simulations, draws[name], exact, seconds)


PARTS = {"exact": exact_scores, "learned": learned_scores, "schools": schools}


def main():
    for name in sys.argv[1:] or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
