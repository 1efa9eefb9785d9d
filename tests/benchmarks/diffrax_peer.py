"""Time of fixed-step Euler: ours, diffrax's, and a loop written by hand.

Called by ``python -m tests.benchmarks.solvers --diffrax``.
"""

import time

import diffrax
import jax
import jax.numpy as jnp
import lineax

from numpyro_score.solver import Euler, EulerMaruyama, Geometric, decode, solve

NUM_STEPS = 64


def report(name: str, score, num_draws: int) -> None:
    """Print CPU times over those of diffrax, for the flow and for the SDE."""
    levels = score.sde.sigma(Geometric()(score.sde, NUM_STEPS))
    key = jax.random.key(0)
    x = levels[0] * jax.random.normal(key, (num_draws, *score.event_shape))
    flow, sde = flow_loops(score, levels, x), sde_loops(score, levels, x, key)
    cells = ", ".join(
        f"{label} {ratio:.2f}" for label, ratio in {**flow, **sde}.items()
    )
    print(f"{name}, {num_draws} draws: {cells}", flush=True)


def flow_loops(score, levels, x) -> dict[str, float]:
    """Return times over diffrax's for the probability flow in log sigma."""
    logs = jnp.log(levels)

    def field(log_level, x, _):
        return x - score.denoise_level(x, jnp.exp(log_level), None)

    @jax.jit
    @jax.vmap
    def peer(x):
        return solved(diffrax.ODETerm(field), logs[0], logs[-1], x)

    @jax.jit
    def by_hand(x):
        def one(x, level, level_next):
            denoised = score.denoise_level(x, level, None)
            return denoised + level_next / level * (x - denoised)

        def step(x, pair):
            return jax.vmap(one, in_axes=(0, None, None))(x, *pair), None

        return jax.lax.scan(step, x, (levels[:-1], levels[1:]))[0]

    ts = score.sde.time(levels)
    ours = cpu_time(lambda: decode(score, x, solver=Euler(), ts=ts))
    base = cpu_time(lambda: peer(x))
    hand = cpu_time(lambda: by_hand(x))
    return {"flow": ours / base, "flow by hand": hand / base}


def sde_loops(score, levels, x, key) -> dict[str, float]:
    """Return times over diffrax's for the reverse SDE, by its kinds of noise."""
    top = jnp.log(levels[0])
    length = float(top - jnp.log(levels[-1]))

    def drift(s, x, _):
        return -2 * (x - score.denoise_level(x, jnp.exp(top - s), None))

    def diffusion(s, x, _):
        return lineax.DiagonalLinearOperator(
            jnp.full(x.shape, 2**0.5) * jnp.exp(top - s)
        )

    def peer(noise):
        @jax.jit
        @jax.vmap
        def one(x, key):
            path = diffrax.ControlTerm(diffusion, noise(key, x.shape))
            term = diffrax.MultiTerm(diffrax.ODETerm(drift), path)
            return solved(term, 0.0, length, x)

        keys = jax.random.split(key, len(x))
        return lambda: one(x, keys)

    def tree(key, shape):
        tol = length / NUM_STEPS / 2
        return diffrax.VirtualBrownianTree(0.0, length, tol=tol, shape=shape, key=key)

    def increments(key, shape):
        return diffrax.UnsafeBrownianPath(shape=shape, key=key)

    ts, solver = score.sde.time(levels), EulerMaruyama()
    ours = cpu_time(lambda: solve(key, score, (len(x),), solver=solver, ts=ts).draws)
    peers = {"SDE, VirtualBrownianTree": tree, "SDE, UnsafeBrownianPath": increments}
    return {label: ours / cpu_time(peer(noise)) for label, noise in peers.items()}


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


def cpu_time(run, repeats: int = 7) -> float:
    """Return the least CPU time of a call, in seconds, after compilation."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(run())
        times.append(time.process_time() - start)
    return min(times)
