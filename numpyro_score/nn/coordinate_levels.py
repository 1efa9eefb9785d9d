"""Nets that take one noise level per coordinate."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from flax import nnx

from numpyro_score.nn.embed_context import EmbedContext


def with_coordinate_levels(net: Callable | nnx.Module) -> Any:
    """Return a configuration whose net takes one level per coordinate.

    Modules, and configurations without such an option, come back as they are.

    Example:
        >>> from numpyro_score.nn import MLP
        >>> with_coordinate_levels(MLP(2)).per_coordinate
        True
    """
    if isinstance(net, EmbedContext):
        return replace(net, net=with_coordinate_levels(net.net))
    config: Any = net
    if isinstance(net, type) or not is_dataclass(net):
        return net
    names = {field.name for field in fields(config)}
    return replace(config, per_coordinate=True) if "per_coordinate" in names else net


def check_coordinate_levels(module: nnx.Module, net: Any) -> None:
    """Raise unless a module says that it takes one noise level per coordinate.

    Args:
        module: the module.
        net: what it was built from, for the message.

    Raises:
        TypeError: if it does not.
    """
    if not getattr(module, "per_coordinate", False):
        raise TypeError(
            "`net` must take one noise level per coordinate, for "
            "`noise=PerCoordinate()`. MLP, SetTransformer and UNet do; a module built "
            "from them beforehand needs per_coordinate=True. A module with code that "
            "takes `noise` of the shape of x says so by an attribute "
            f"`per_coordinate = True`. Got {type(net).__name__}."
        )
