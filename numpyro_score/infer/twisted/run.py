"""One compiled program from keys to draws, over chains that devices share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from numpyro_score.infer.twisted.replicates import ChainResult, SamplerSizes, run_chain
from numpyro_score.infer.twisted.site_checks import check_latents
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.noise_levels import SiteTime
from numpyro_score.typing import PRNGKey


class _Slot:
    """Stands where an array was."""


_SLOT = _Slot()


class StaticArguments(NamedTuple):
    """Arguments with their arrays taken out; hashable where the rest is."""

    structure: Any
    leaves: tuple

    def combine(self, arrays: list[Array]) -> tuple[tuple, dict]:
        """Return the arguments with arrays put in."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is _SLOT else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, leaves)


def partition_arguments(
    args: tuple, kwargs: dict
) -> tuple[StaticArguments, list[Array]]:
    """Return the static of a model's arguments, and the arrays that fill it.

    Python numbers, strings and None stay in the static: models branch on them.

    Example:
        >>> static, arrays = partition_arguments((3, np.ones(2)), {"y": None})
        >>> static.combine(arrays)
        ((3, Array([1., 1.], dtype=float32)), {'y': None})
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = [
        jnp.asarray(leaf) for leaf, array in zip(leaves, is_array, strict=True) if array
    ]
    rest = [
        _SLOT if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
    ]
    return StaticArguments(structure, tuple(rest)), arrays


class RunSettings(NamedTuple):
    """What a program is compiled for."""

    model: Callable
    static: StaticArguments
    sizes: SamplerSizes
    report: Callable[[Any], None] | None


@partial(jax.jit, static_argnames=("model", "static"))
def learned_times(
    arrays: list[Array], model: Callable, static: StaticArguments
) -> dict[str, SiteTime]:
    """Return the times of the learned sites, which may be computed from arguments.

    Raises:
        ValueError: for discrete latent sites and for a model without learned ones.
    """
    args, kwargs = static.combine(arrays)
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
        args, kwargs = plan.static.combine(arrays)
        twist = Twist.of(plan.model, args, kwargs)
        return run_chain(key, twist, ts, plan.sizes, plan.report)

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
