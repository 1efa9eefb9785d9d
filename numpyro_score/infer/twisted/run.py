"""One compiled program from keys to draws, over chains that devices share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from numpyro_score.infer.twisted.arguments import StaticArguments
from numpyro_score.infer.twisted.replicates import ChainResult, SamplerSizes, run_chain
from numpyro_score.infer.twisted.site_checks import check_latents
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.noise_levels import SiteTime
from numpyro_score.typing import PRNGKey


class RunSettings(NamedTuple):
    """What a program is compiled for."""

    model: Callable
    frame: StaticArguments
    effort: SamplerSizes
    report: Callable[[Any], None] | None


@partial(jax.jit, static_argnames=("model", "frame"))
def learned_times(
    arrays: list[Array], model: Callable, frame: StaticArguments
) -> dict[str, SiteTime]:
    """Return the times of the learned sites, which may be computed from arguments.

    Raises:
        ValueError: for discrete latent sites and for a model without learned ones.
    """
    args, kwargs = frame.combine(arrays)
    return SiteTime.of(check_latents(model, args, kwargs))


@partial(jax.jit, static_argnames=("plan", "num_devices"))
def run_chains(
    keys: PRNGKey,
    ts: Float[Array, " ts"],
    arrays: list[Array],
    plan: RunSettings,
    num_devices: int,
) -> ChainResult:
    """Return the results of independent chains, along their first axis.

    Chains run one after the other on each device, so that they are the same on any
    number of devices.

    Args:
        keys: one per chain.
        ts: decreasing times of the levels.
        arrays: the arrays among the model's arguments.
        plan: model, its other arguments and sizes.
        num_devices: how many devices share the chains; it divides their number.
    """

    def one(key: PRNGKey, ts: Array, arrays: list[Array]) -> ChainResult:
        args, kwargs = plan.frame.combine(arrays)
        twist = Twist.of(plan.model, args, kwargs)
        return run_chain(key, twist, ts, plan.effort, plan.report)

    def several(keys: PRNGKey, ts: Array, arrays: list[Array]) -> ChainResult:
        return jax.lax.map(lambda key: one(key, ts, arrays), keys)

    if num_devices == 1:
        return several(keys, ts, arrays)
    mesh = Mesh(jax.devices()[:num_devices], ("chains",))
    chains, whole = PartitionSpec("chains"), PartitionSpec()
    return jax.shard_map(
        several,
        mesh=mesh,
        in_specs=(chains, whole, whole),
        out_specs=chains,
        check_vma=False,
    )(keys, ts, arrays)


def count_devices(num_chains: int) -> int:
    """Return the largest number of devices that divides the number of chains."""
    available = jax.device_count()
    return max(n for n in range(1, available + 1) if num_chains % n == 0)
