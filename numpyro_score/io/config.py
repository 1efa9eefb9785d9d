"""Conversion of configurations and constraints to JSON and back.

Only classes of the package and constraints of NumPyro are built, by name: JSON holds
numbers and names, and no code.
"""

import dataclasses
from typing import Any

import numpy as np
from numpyro.distributions import constraints

from numpyro_score.data.support import Support
from numpyro_score.io.schema import (
    EMBEDDINGS,
    NETS,
    PARAMETRIZATIONS,
    PROCESSES,
    RENAMED,
    SOFTNESS,
)
from numpyro_score.model.latents import LatentLayout

SERIALIZABLE: dict[str, Any] = NETS | EMBEDDINGS | PROCESSES | PARAMETRIZATIONS


def to_config(value: Any, *, else_name: bool = False) -> Any:
    """Return a configuration as JSON.

    Args:
        value: a configuration of the package, a :class:`Support`, a number, a string,
            a tuple or None.
        else_name: return the name of any other value, instead of raising.

    Raises:
        TypeError: for any other value, unless ``else_name``.

    Example:
        >>> from numpyro_score.sde import VE
        >>> to_config(VE(0.1, 10.0))
        {'class': 'VE', 'fields': {'sigma_min': 0.1, 'sigma_max': 10.0}}
    """
    if value is None or isinstance(value, bool | int | float | str):
        return {"name": "None"} if value is None and else_name else value
    if isinstance(value, tuple):
        return [to_config(item) for item in value]
    if isinstance(value, Support):
        described = {"support": _describe_constraint(value.constraint)}
        if value.softness is not None:
            described[SOFTNESS] = value.softness
        return described
    name = type(value).__name__
    if SERIALIZABLE.get(name) is type(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": name, "fields": {k: to_config(v) for k, v in fields.items()}}
    if else_name:
        return {"name": getattr(value, "__qualname__", name)}
    raise TypeError(
        "Only configurations of the package can be saved: of other classes the code "
        f"would be needed too. Got {name}; known are {', '.join(sorted(SERIALIZABLE))}."
    )


def sites_to_config(layout: LatentLayout) -> list[dict[str, Any]]:
    """Return names, shapes and supports of the sites of a layout as JSON."""
    return [
        {"name": site.name, "shape": list(site.shape), **to_config(site.support)}
        for site in layout
    ]


def from_config(described: Any) -> Any:
    """Return the configuration of the JSON of :func:`to_config`.

    Raises:
        ValueError: for a class that is not known.

    Example:
        >>> from_config({"class": "VE", "fields": {"sigma_min": 0.1}})
        VE(sigma_min=0.1, sigma_max=20.0)
    """
    if isinstance(described, list):
        return tuple(from_config(item) for item in described)
    if not isinstance(described, dict):
        return described
    if "support" in described:
        constraint = _build_constraint(described["support"])
        return Support(constraint, described.get(SOFTNESS))
    name = str(described.get("class"))
    name = RENAMED.get(name, name)
    if name not in SERIALIZABLE:
        raise ValueError(
            "The header names a class that this version of numpyro_score does not "
            f"have. Got {described.get('class')}; known are "
            f"{', '.join(sorted(SERIALIZABLE))}."
        )
    fields = {k: from_config(v) for k, v in described["fields"].items()}
    return SERIALIZABLE[name](**fields)


def _describe_constraint(constraint: Any) -> Any:
    if not isinstance(constraint, constraints.Constraint):
        return np.asarray(constraint).tolist()
    parts, (names, options) = constraint.tree_flatten()
    described = [_describe_constraint(part) for part in parts]
    return {
        "constraint": type(constraint).__name__,
        "parts": dict(zip(names, described, strict=True)),
        "options": options,
    }


def _build_constraint(described: Any) -> Any:
    if not isinstance(described, dict):
        return np.asarray(described) if isinstance(described, list) else described
    cls: Any = vars(constraints).get(described["constraint"])
    is_class = isinstance(cls, type)
    if not is_class or not issubclass(cls, constraints.Constraint):
        raise ValueError(
            "The header names a constraint that the installed NumPyro does not have. "
            f"Got {described['constraint']}."
        )
    names = tuple(described["parts"])
    parts = [_build_constraint(part) for part in described["parts"].values()]
    return cls.tree_unflatten((names, described["options"]), parts)
