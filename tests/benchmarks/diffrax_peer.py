"""Time of fixed-step Euler: ours, diffrax's, and a loop written by hand.

Called by ``python -m tests.benchmarks.solvers --diffrax``.
"""

from collections.abc import Callable
from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np

from numpyro_score.solver import Euler, EulerMaruyama, Geometric, decode, solve
from tests.benchmarks.timing import take_times

NUM_STEPS = 64


def report(name: str, score, num_draws: int, repeats: int = 7) -> None:
    """Print median CPU times over those of diffrax, for the flow and for the SDE."""
    levels = score.sde.sigma(Geometric()(score.sde, NUM_STEPS))
    key = jax.random.key(0)
    x = levels[0] * jax.random.normal(key, (num_draws, *score.event_shape))
    loops = [*flow_loops(score, levels, x), *sde_loops(score, levels, x, key)]
    ours, peer, by_hand, sde, tree, increments = np.median(
        take_times(loops, repeats), axis=0
    )
    print(
        f"{name}, {num_draws} draws: flow {ours / peer:.2f}, by hand "
        f"{by_hand / peer:.2f}; SDE, VirtualBrownianTree {sde / tree:.2f}, "
        f"UnsafeBrownianPath {sde / increments:.2f}",
        flush=True,
    )


def flow_loops(score, levels, x) -> tuple[Callable, Callable, Callable]:
    """Return the probability flow in log sigma: ours, diffrax's, and by hand."""
    logs, ts = jnp.log(levels), score.sde.time(levels)

    def field(log_level, x, _):
        return x - score.denoise_standardized(x, jnp.exp(log_level), None)

    @jax.jit
    @jax.vmap
    def peer(x):
        return solved(diffrax.ODETerm(field), logs[0], logs[-1], x)

    @jax.jit
    def by_hand(x):
        def one(x, level, level_next):
            denoised = score.denoise_standardized(x, level, None)
            return denoised + level_next / level * (x - denoised)

        def step(x, pair):
            return jax.vmap(one, in_axes=(0, None, None))(x, *pair), None

        return jax.lax.scan(step, x, (levels[:-1], levels[1:]))[0]

    ours = partial(decode, score, x, solver=Euler(), ts=ts)
    return ours, partial(peer, x), partial(by_hand, x)


def sde_loops(score, levels, x, key) -> tuple[Callable, Callable, Callable]:
    """Return the reverse SDE: ours, and diffrax's with two kinds of noise."""
    top, ts = jnp.log(levels[0]), score.sde.time(levels)
    length = float(top - jnp.log(levels[-1]))

    def drift(s, x, _):
        return -2 * (x - score.denoise_standardized(x, jnp.exp(top - s), None))

    def diffusion(s, x, _):
        scale = 2**0.5 * jnp.exp(top - s)
        return lineax.DiagonalLinearOperator(jnp.full(x.shape, scale))

    def peer(noise):
        @jax.jit
        @jax.vmap
        def one(x, key):
            path = diffrax.ControlTerm(diffusion, noise(key=key, shape=x.shape))
            term = diffrax.MultiTerm(diffrax.ODETerm(drift), path)
            return solved(term, 0.0, length, x)

        return partial(one, x, jax.random.split(key, len(x)))

    tolerance = length / NUM_STEPS / 2
    tree = partial(diffrax.VirtualBrownianTree, 0.0, length, tol=tolerance)
    ours = partial(solve, key, score, (len(x),), solver=EulerMaruyama(), ts=ts)
    return ours, peer(tree), peer(diffrax.UnsafeBrownianPath)


def solved(term, t0, t1, x):
    """Return diffrax's solution at t1 by fixed steps of Euler."""
    solution = diffrax.diffeqsolve(
        term,
        diffrax.Euler(),
        t0=t0,
        t1=t1,
        dt0=(t1 - t0) / NUM_STEPS,
        y0=x,
        adjoint=diffrax.ForwardMode(),  # the only one that takes every kind of noise
        saveat=diffrax.SaveAt(t1=True),
    )
    return solution.ys[0]
