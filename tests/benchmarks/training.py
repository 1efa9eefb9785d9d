"""Training steps per second: ScoreMatching.run against a hand-written scan.

Both take the same steps on the same net, loss, optimizer and batches: draw rows, draw
noise, differentiate, clip, Adam with a cosine schedule, average the weights. Repeats
of the two alternate, so that a busy machine slows both. Compilation is not timed.

    python -m tests.benchmarks.training --num-steps 2000
    python -m tests.benchmarks.training --torch    # PyTorch beside them, if installed
    python -m tests.benchmarks.training --unet     # convolutions on this device
"""

import argparse
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from numpyro_score import MLP, VE, ScoreMatching, UNet
from numpyro_score.loss.noise_levels import LogNormal
from numpyro_score.loss.weighting import EDMWeight
from numpyro_score.score.preconditioning import precondition
from tests.benchmarks.timing import take_times
from tests.benchmarks.training_torch import by_torch

SDE = VE()
PEAK_RATE, EMA_EXPONENT = 2e-3, 6.94


def make_data(num_rows):
    key_mode, key_noise = jax.random.split(jax.random.key(0))
    modes = jnp.where(jax.random.bernoulli(key_mode, 0.3, (num_rows, 1)), -2.0, 1.0)
    return modes + 0.5 * jax.random.normal(key_noise, (num_rows, 2))


def by_package(config, data, num_steps, batch_size):
    """Return a function of a key that trains by the package; compiled."""
    trainer = ScoreMatching(config, sde=SDE)
    state = trainer.init(jax.random.key(1), data, num_steps)

    def train(key):
        result = trainer.run(
            key,
            num_steps,
            data,
            batch_size=batch_size,
            progress_bar=False,
            init_state=state,
        )
        return jax.block_until_ready(result.losses)

    return train


def by_hand(config, data, num_steps, batch_size):
    """Return a function of a key that trains in one scan, written out; compiled."""
    graphdef, params = nnx.split(config(rngs=nnx.Rngs(jax.random.key(1))))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(PEAK_RATE, num_steps)),
    )
    rows = (data - data.mean(0)) / data.std(0)

    def loss_fn(params, key, x0):
        key_level, key_noise = jax.random.split(key)
        levels = LogNormal().sample(key_level, batch_size, SDE.sigma_min, SDE.sigma_max)
        x = x0 + levels[:, None] * jax.random.normal(key_noise, x0.shape)
        net = nnx.merge(graphdef, params)
        denoised = jax.vmap(partial(precondition, net))(x, levels)
        return jnp.mean(EDMWeight()(levels, SDE)[:, None] * (denoised - x0) ** 2)

    def step(carry, inputs):
        params, average, opt_state = carry
        key, k = inputs
        key_rows, key_loss = jax.random.split(key)
        x0 = rows[jax.random.randint(key_rows, (batch_size,), 0, len(rows))]
        loss, grads = jax.value_and_grad(loss_fn)(params, key_loss, x0)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        share = 1 - (1 - 1 / k) ** (EMA_EXPONENT + 1)
        average = optax.incremental_update(params, average, share)
        return (params, average, opt_state), loss

    @jax.jit
    def scan(key, params):
        inputs = jax.random.split(key, num_steps), 1 + jnp.arange(num_steps)
        return jax.lax.scan(step, (params, params, optimizer.init(params)), inputs)

    def train(key):
        return jax.block_until_ready(scan(key, params)[1])

    return train


class WithXLAConvolutions:
    """A net configuration whose convolutions are XLA's own on every device."""

    def __init__(self, config):
        self.config = config

    def __call__(self, *, rngs):
        module = self.config(rngs=rngs)
        for _, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Conv):
                node.conv_general_dilated = jax.lax.conv_general_dilated
        return module


def main(args):
    """Print steps per second of both and their ratio; return the ratio."""
    config = MLP(2, width=args.width, depth=args.depth)
    data = make_data(args.num_rows)
    if args.unet:
        config = UNet((8, 8))
        data = jax.random.normal(jax.random.key(0), (args.num_rows, 8, 8))
    sizes = data, args.num_steps, args.batch_size
    trains = {"ScoreMatching.run": by_package(config, *sizes)}
    if args.unet:
        trains["XLA's convolutions"] = by_package(WithXLAConvolutions(config), *sizes)
    else:
        trains["hand-written scan"] = by_hand(config, *sizes)
    if args.torch:
        trains["PyTorch"] = by_torch(config, *sizes)
    clock = time.process_time if args.cpu else time.perf_counter
    runs = [partial(train, jax.random.key(2)) for train in trains.values()]
    times = take_times(runs, args.repeats, clock)
    print(f"net: {config}, batch {args.batch_size}, {args.num_steps} steps")
    ratios = [statistics.median(other / times[:, 0]) for other in times.T]
    for name, speed, ratio in zip(
        trains, args.num_steps / np.median(times, axis=0), ratios, strict=True
    ):
        print(f"{name:20s}{speed:10.1f} steps per second; ratio to it {ratio:.2f}")
    print(f"Ratios of speeds are medians of {args.repeats} repeats.")
    return ratios[1]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="CPU time: busy machines")
    parser.add_argument("--torch", action="store_true", help="PyTorch's MLP as well")
    parser.add_argument("--unet", action="store_true", help="a U-Net for 8 x 8 images")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
