"""Cost of one adjusted transition over the value-and-gradients that it takes.

Both run in compiled loops: transitions of ``ScoreLangevin`` with a fixed step and
metric, of one step or more, and gradient evaluations chained by a tiny step each, so
that none can be left out. Repeats are interleaved, and the ratio of the medians is
printed, per gradient.

    python -m tests.benchmarks.transition
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from numpyro_score import ScoreLangevin
from numpyro_score.model.potential import model_potential
from tests.benchmarks.timing import take_times


def eight_schools(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    standard = numpyro.sample("standard", dist.Normal(0, 1).expand([8]))
    numpyro.sample("y", dist.Normal(mu + tau * standard, sigma), obs=y)


def logistic_regression(x: Any, y: Any) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 1).expand([x.shape[-1]]))
    numpyro.sample("y", dist.Bernoulli(logits=x @ beta), obs=y)


def targets() -> dict[str, tuple[Callable, tuple]]:
    y = jnp.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = jnp.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    key_x, key_beta, key_y = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key_x, (1000, 25))
    logits = x @ jax.random.normal(key_beta, (25,))
    labels = jax.random.bernoulli(key_y, jax.nn.sigmoid(logits)).astype(float)
    return {
        "eight schools": (eight_schools, (y, sigma)),
        "logistic regression": (logistic_regression, (x, labels)),
    }


def chain_of_transitions(
    model: Callable,
    args: tuple,
    num_chains: int,
    length: int,
    num_steps: int,
    dense_mass: bool | None,
) -> Callable[[], Any]:
    kernel = ScoreLangevin(
        model,
        step_size=0.01,
        num_steps=num_steps,
        adapt_step_size=False,
        adapt_mass_matrix=False,
        share_adaptation=True,
        dense_mass=dense_mass,
    )
    key = jax.random.key(1)
    keys = key if num_chains == 1 else jax.random.split(key, num_chains)
    state = kernel.init(keys, 0, model_args=args)

    @jax.jit
    def loop(state):
        def step(_, state):
            return kernel.sample(state, args, {})

        return jax.lax.fori_loop(0, length, step, state).z

    return lambda: loop(state)


def chain_of_gradients(
    model: Callable, args: tuple, num_chains: int, length: int
) -> Callable[[], Any]:
    potential = model_potential(model, args, {})
    z = potential.prototype
    value_and_grad = jax.value_and_grad(potential.potential_fn)
    if num_chains > 1:
        value_and_grad = jax.vmap(value_and_grad)
        z = jax.tree.map(lambda x: jnp.stack([x] * num_chains), z)

    def step(_, carry):
        z, total = carry
        value, grad = value_and_grad(z)
        return jax.tree.map(lambda z, g: z - 1e-6 * g, z, grad), total + value

    @jax.jit
    def loop(carry):
        return jax.lax.fori_loop(0, length, step, carry)

    total = jnp.zeros(() if num_chains == 1 else num_chains)
    return lambda: loop((z, total))


def main(args: Sequence[str] | None = None) -> dict[tuple[str, int, int], float]:
    """Print a table; return the ratio by target, number of chains and of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--targets", nargs="+", default=list(targets()))
    parser.add_argument("--chains", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8])
    dense = "a dense metric, not one that keeps correlations only where it finds them"
    parser.add_argument("--dense-mass", action="store_true", help=dense)
    options = parser.parse_args(args)
    ratios = {}
    print("target                chains  steps  transition   gradient  ratio")
    for name in options.targets:
        model, data = targets()[name]
        for num_chains in options.chains:
            size = (model, data, num_chains, options.length)
            dense_mass = options.dense_mass or None
            runs = [chain_of_transitions(*size, k, dense_mass) for k in options.steps]
            runs.append(chain_of_gradients(*size))
            *moved, evaluated = np.median(take_times(runs, options.repeats), axis=0)
            for steps, seconds in zip(options.steps, moved, strict=True):
                ratio = seconds / (steps * evaluated)
                ratios[name, num_chains, steps] = ratio
                first, second = (1e6 * t / options.length for t in (seconds, evaluated))
                print(
                    f"{name:20s}  {num_chains:6d}  {steps:5d}  {first:7.2f} us"
                    f"  {second:6.2f} us  {ratio:5.2f}"
                )
    return ratios


if __name__ == "__main__":
    main()
