"""Placement of arrays on devices that share the rows of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array


def with_auto_axes(mesh: Mesh | None) -> Mesh | None:
    """Return a mesh whose axes the compiler places arrays along, or None.

    ``jax.make_mesh`` makes axes by default that belong to the types of arrays: a loss
    would have to name them.

    Example:
        >>> mesh = with_auto_axes(jax.make_mesh((1,), ("rows",)))
        >>> mesh.axis_types == (AxisType.Auto,)
        True
    """
    if mesh is None:
        return None
    types = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Return the sharding of an array along the mesh's first axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names[0]))


def shard(tree: Any, mesh: Mesh | None, axis: int | None = None) -> Any:
    """Return arrays on the devices of a mesh, replicated or split along an axis.

    Args:
        tree: arrays. To be split, they hold the rows of this process; to be replicated,
            they are equal on all processes.
        mesh: the devices; None to return ``tree``.
        axis: axis to split; None to replicate.
    """
    if mesh is None:
        return tree
    if axis is None:
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda part: _copy(part, whole), tree)
    sharding = batch_sharding(mesh, axis)
    return jax.tree.map(
        lambda part: jax.make_array_from_process_local_data(sharding, part), tree
    )


def _copy(part: Any, sharding: NamedSharding) -> Array:
    """Return an array replicated on all devices, also of other processes."""
    part = jnp.asarray(part)
    if jnp.issubdtype(part.dtype, jax.dtypes.prng_key):
        data = _copy(jax.random.key_data(part), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(part))
    values = np.asarray(part)
    return jax.make_array_from_callback(part.shape, sharding, lambda i: values[i])


def gather(tree: Any) -> Any:
    """Return replicated arrays as arrays on one device."""
    return jax.tree.map(
        lambda leaf: leaf.addressable_data(0) if isinstance(leaf, Array) else leaf, tree
    )
