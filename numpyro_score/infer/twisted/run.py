"""One compiled program from keys to draws, over chains that devices share."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from numpyro_score.infer.twisted.arguments import StaticArguments
from numpyro_score.infer.twisted.replicates import ChainResult, SamplerSizes, run_chain
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.noise_levels import level_times
from numpyro_score.typing import PRNGKey


class RunSettings(NamedTuple):
    """What a program is compiled for."""

    model: Callable
    frame: StaticArguments
    levels: int | Sequence[float]
    effort: SamplerSizes
    report: Callable[[Any], None] | None


@partial(jax.jit, static_argnames=("plan", "num_devices"))
def run_chains(
    keys: PRNGKey, arrays: list[Array], plan: RunSettings, num_devices: int
) -> ChainResult:
    """Return the results of independent chains, along their first axis.

    Chains run one after the other on each device, so that they are the same on any
    number of devices.

    Args:
        keys: one per chain.
        arrays: the arrays among the model's arguments.
        plan: model, its other arguments, levels and sizes.
        num_devices: how many devices share the chains; it divides their number.
    """

    def one(key: PRNGKey, arrays: list[Array]) -> ChainResult:
        args, kwargs = plan.frame.combine(arrays)
        twist = Twist.of(plan.model, args, kwargs)
        ts = jnp.asarray(level_times(plan.levels, twist.learned))
        return run_chain(key, twist, ts, plan.effort, plan.report)

    def several(keys: PRNGKey, arrays: list[Array]) -> ChainResult:
        return jax.lax.map(lambda key: one(key, arrays), keys)

    if num_devices == 1:
        return several(keys, arrays)
    mesh = Mesh(jax.devices()[:num_devices], ("chains",))
    chains, whole = PartitionSpec("chains"), PartitionSpec()
    return jax.shard_map(
        several, mesh=mesh, in_specs=(chains, whole), out_specs=chains, check_vma=False
    )(keys, arrays)


def count_devices(num_chains: int) -> int:
    """Return the largest number of devices that divides the number of chains."""
    available = jax.device_count()
    return max(n for n in range(1, available + 1) if num_chains % n == 0)
