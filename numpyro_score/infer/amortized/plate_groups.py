r"""One group of a plate: the model with the plate at another size, and its checks.

A model with a plate of J groups describes every J if the groups are independent and
alike given the sites outside of the plate,

.. math:: p(\phi, z_{1:J}, y_{1:J}) = p(\phi) \prod_j p(z_j, y_j | \phi),

with the same :math:`p(\phi)` and :math:`p(z, y | \phi)` for all J and j. That is
checked on simulations: log densities of several groups against those of each group
alone, at the same values, and simulations with another value of the argument that sets
the size of the plate.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_score.checks import is_integer

NUM_RUNS = 4  # whose largest value is the size of a site
MAX_GROUPS = 8  # compared with each other, evenly spaced in the plate
# of a log density, relative and in nats; of a value, of the largest of its site;
# float32 rounding is 1e-6
TOLERANCE = 1e-4
CLASHES = (AssertionError, TypeError, ValueError)  # of arguments of unequal lengths

Site = dict[str, Any]
Sites = dict[str, Site]


class resize_plate(Messenger):  # noqa: N801
    """Handler that runs a model with some groups of a plate only, without scaling.

    Args:
        fn: the model.
        plate: name of the plate.
        groups: indices of the groups; the number of indices is the new size.
    """

    def __init__(self, fn: Callable, plate: str, groups: Sequence[int]) -> None:
        self.plate = plate
        self.groups = tuple(groups)
        self.size, self.subsample_size = 0, None
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Replace the indices of the plate, and take back its scale."""
        if msg["type"] == "plate" and msg["name"] == self.plate:
            self.size, self.subsample_size = msg["args"]
            msg["value"] = jnp.asarray(self.groups) % self.size
            msg["args"] = (self.size, len(self.groups))
        elif msg["type"] == "sample" and self.size:
            frames = [frame.name for frame in msg["cond_indep_stack"]]
            if self.plate in frames and msg["scale"] is not None:
                scale = msg["scale"] * len(self.groups) / self.size
                msg["scale"] = None if abs(scale - 1) < 1e-6 else scale


@dataclass(frozen=True)
class GroupModel:
    """A model with some groups of a plate, called like the model; one by default."""

    model: Callable
    plate: str
    groups: tuple[int, ...] = (0,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with these groups."""
        return resize_plate(self.model, self.plate, self.groups)(*args, **kwargs)


class PlateSites(NamedTuple):
    """Sites of a model by whether they are in the plate.

    - **shared**: names of the sample sites outside of the plate.
    - **local**: names of the sample sites in the plate that are not observed.
    - **axes**: axis of the groups, counted from the right, by name, of all sites that
      have one, in the plate or computed from such.
    """

    shared: tuple[str, ...]
    local: tuple[str, ...]
    axes: dict[str, int]


def plate_sites(
    model: Callable,
    plate: str,
    observed: Sequence[str],
    args: tuple,
    kwargs: dict[str, Any],
) -> PlateSites:
    """Return the sites of a model by their place, from two runs.

    Args:
        model: the model, whose observed sites are drawn.
        plate: name of the plate.
        observed: names of the observed sites.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: for sites that do not follow the size of the plate, an observed site
            outside of it, or no latent site outside.
    """
    one = _run(model, plate, [0], args, kwargs, key=0)
    for name, site in one.items():
        if (axis := _plate_axis(plate, site)) is not None:
            shape = jnp.shape(site["value"])
            if shape[axis] != 1:
                raise ValueError(_more_than_one(plate, name, shape))
    many = _run(model, plate, [0, 1], args, kwargs, key=0)
    axes = _group_axes(plate, one, many, 2)
    _check_observed(plate, observed, axes, one)
    sampled = [n for n, s in one.items() if s["type"] == "sample" and n not in observed]
    shared = tuple(name for name in sampled if name not in axes)
    if not shared:
        raise ValueError(
            f"The model must have a latent site outside of `plate` '{plate}', shared "
            "by its groups; without one each group has a posterior of its own: use "
            f"NPSE without `plate`. Got the sites {sorted(one)}."
        )
    return PlateSites(shared, tuple(n for n in sampled if n in axes), axes)


def check_groups(
    model: Callable, plate: str, axes: dict[str, int], args: tuple, kwargs: dict
) -> None:
    """Raise unless groups are independent and alike given the sites outside.

    Args:
        model: the model, whose observed sites are drawn.
        plate: name of the plate.
        axes: axes of the groups, of :func:`plate_sites`.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: for groups that depend on each other or differ, and for a model in
            which the size of the plate or the sites in it enter outside.
    """
    size = plate_size(model, plate, args, kwargs)
    count = min(max(size, 2), MAX_GROUPS)
    groups = [int(j) for j in np.linspace(0, max(size - 1, 1), count)]

    def run(groups: Sequence[int], key: int, values: dict | None = None) -> Sites:
        return _run(model, plate, groups, args, kwargs, key, values)

    for key in (1, 2):
        _check_factorization(plate, groups, run(groups, key), axes, run)
    _check_size(model, plate, args, kwargs)


def _run(
    model: Callable,
    plate: str,
    groups: Sequence[int],
    args: tuple,
    kwargs: dict[str, Any],
    key: int,
    values: dict | None = None,
) -> Sites:
    """Return the trace with some groups, with values of sample sites as given."""
    some: Any = GroupModel(model, plate, tuple(groups))
    if values is not None:
        some = substitute(some, data=values)
    return trace(seed(some, jax.random.key(key))).get_trace(*args, **kwargs)


def plate_size(model: Callable, plate: str, args: tuple, kwargs: dict[str, Any]) -> int:
    """Return the size of the plate in the model.

    Raises:
        ValueError: for an unknown or subsampled plate, or a model that fails with one
            group.
    """
    handler = resize_plate(model, plate, (0,))
    try:
        sites = trace(seed(handler, jax.random.key(0))).get_trace(*args, **kwargs)
    except CLASHES as error:
        if not handler.size:
            raise
        raise ValueError(
            f"`model` must run with one group of `plate` '{plate}': that is what is "
            "simulated. Numbers that belong to groups must be sites in the plate, not "
            f"arrays over all groups. Got {type(error).__name__}: {error}"
        ) from error
    if not handler.size:
        plates = sorted(name for name, s in sites.items() if s["type"] == "plate")
        raise ValueError(
            "`plate` must name a plate of the model: the one whose groups are "
            f"composed. Got '{plate}'; the model has {plates}."
        )
    if handler.subsample_size not in (None, handler.size):
        raise ValueError(
            f"`plate` '{plate}' must not be subsampled: every group is composed, in "
            "batches that `sample` chooses. Leave out `subsample_size`. "
            f"Got subsample_size={handler.subsample_size} of {handler.size}."
        )
    return handler.size


def _group_axes(plate: str, one: Sites, many: Sites, count: int) -> dict[str, int]:
    """Return the axis of the groups of every site that has one, from the right."""
    if one.keys() != many.keys():
        odd = sorted(one.keys() ^ many.keys())
        raise ValueError(
            f"`plate` '{plate}' must not decide which sites the model has. Got {odd} "
            f"only with one group or only with {count}."
        )
    axes = {}
    for name, site in one.items():
        if site["type"] not in ("sample", "deterministic"):
            continue
        shapes = jnp.shape(site["value"]), jnp.shape(many[name]["value"])
        axis = _resized_axis(*shapes, count)
        unequal = shapes[0] != shapes[1] and axis is None
        is_sample = site["type"] == "sample"
        if unequal or (is_sample and axis != _plate_axis(plate, site)):
            raise ValueError(_more_than_one(plate, name, shapes[1]))
        if axis is not None:
            axes[name] = axis
    return axes


def _plate_axis(plate: str, site: Site) -> int | None:
    """Return the axis of the plate in a sample site, from the right; None outside."""
    if site["type"] != "sample":
        return None
    dims = [frame.dim for frame in site["cond_indep_stack"] if frame.name == plate]
    return dims[0] - site["fn"].event_dim if dims else None


def _more_than_one(plate: str, name: str, shape: tuple[int, ...]) -> str:
    return (
        f"Site '{name}' must have one group per index of `plate` '{plate}', and sites "
        "outside of it none. What is known of each group (covariates, standard errors) "
        "must be a site in the plate too, not an array over the groups: a sample site "
        "with a law of its own, named in `observed`. Got the shape "
        f"{shape} with one or two groups."
    )


def _resized_axis(
    one: tuple[int, ...], many: tuple[int, ...], count: int
) -> int | None:
    """Return the only axis at which shapes have 1 and ``count``, from the right."""
    if len(one) != len(many):
        return None
    odd = [
        i for i, sizes in enumerate(zip(one, many, strict=True)) if len({*sizes}) > 1
    ]
    if len(odd) != 1 or (one[odd[0]], many[odd[0]]) != (1, count):
        return None
    return odd[0] - len(one)


def _check_observed(
    plate: str, observed: Sequence[str], axes: dict[str, int], sites: Sites
) -> None:
    outside = [name for name in observed if name in sites and name not in axes]
    if outside:
        raise ValueError(
            f"`observed` sites must be in `plate` '{plate}': the posterior is composed "
            "from those given one group, and an observation outside belongs to no "
            "group. Put it into a group, or use NPSE without `plate`. "
            f"Got {outside} outside of the plate."
        )


def _check_factorization(
    plate: str, groups: Sequence[int], drawn: Sites, axes: dict[str, int], run: Callable
) -> None:
    """Raise unless the density of groups is the product of those of each alone."""
    values = {n: s["value"] for n, s in drawn.items() if s["type"] == "sample"}
    many, again = (run(groups, key, values) for key in (3, 4))
    for j in range(len(groups)):
        alone = {
            name: jnp.take(value, jnp.array([j]), axes[name]) if name in axes else value
            for name, value in values.items()
        }
        for name, site in run([0], 3, alone).items():
            found = _numbers_to_compare(plate, name, site, many, again, axes, j)
            if found is not None and not _same(*found):
                raise ValueError(_what_differs(plate, name, name in axes))


def _numbers_to_compare(
    plate: str,
    name: str,
    site: Site,
    many: Sites,
    again: Sites,
    axes: dict[str, int],
    j: int,
) -> tuple[Array, Array, float] | None:
    """Return numbers of group j alone and among others, and their unit.

    That is log densities, in nats, or computed values.
    """
    if site["type"] == "deterministic":
        unit = _unit([many[name]["value"]])
        repeatable = _same(many[name]["value"], again[name]["value"], unit)
        if name not in axes or not repeatable:
            return None  # a summary of groups; noise of its own
        among = jnp.take(many[name]["value"], jnp.array([j]), axes[name])
        return site["value"], among, unit
    if site["type"] != "sample":
        return None
    try:
        alone, all_ = (s["fn"].log_prob(s["value"]) for s in (site, many[name]))
    except NotImplementedError:  # a simulator as a distribution
        return None
    if name in axes:
        [dim] = [f.dim for f in site["cond_indep_stack"] if f.name == plate]
        all_ = jnp.take(all_, jnp.array([j]), dim)
    return alone, all_, 1.0


def _same(a: Any, b: Any, unit: float = 1.0) -> bool:
    """Return whether numbers are equal up to rounding, in a unit of their size."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return False
    return np.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * unit, equal_nan=True)


def _unit(values: Iterable[Any]) -> float:
    """Return the largest finite absolute value."""
    flat = np.concatenate([np.ravel(value).astype(float) for value in values])
    return float(np.max(np.abs(flat[np.isfinite(flat)]), initial=0.0))


def _what_differs(plate: str, name: str, inside: bool) -> str:
    if inside:
        return (
            f"Groups of `plate` '{plate}' must be independent and alike given the "
            f"sites outside: the law of site '{name}' in one group depends on its "
            "index, on the number of groups or on other groups. Make what differs "
            "between groups (covariates, standard errors) a sample site in the plate "
            "with a law of its own, and name it in `observed`."
        )
    return (
        f"Site '{name}' must not depend on `plate` '{plate}': its law changes with the "
        "groups, so that the posterior given one group says nothing of that given "
        "several. Let it depend on sites outside of the plate only."
    )


def _check_size(
    model: Callable, plate: str, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Raise if an argument that sets the size of the plate changes anything else."""
    size = plate_size(model, plate, args, kwargs)
    runs = [_run(model, plate, [0], args, kwargs, key) for key in range(NUM_RUNS)]
    first, kinds = runs[0], ("sample", "deterministic")
    values = {n: site["value"] for n, site in first.items() if site["type"] in kinds}
    units = {name: _unit(run[name]["value"] for run in runs) for name in values}
    kwargs = _with_defaults(model, args, kwargs)
    for label, (new_args, new_kwargs) in _with_one_more(size, args, kwargs):
        try:
            changed = plate_size(model, plate, new_args, new_kwargs) != size
            second = _run(model, plate, [0], new_args, new_kwargs, 0)
        except CLASHES:
            continue
        odd = [
            name
            for name, value in values.items()
            if not _same(value, second[name]["value"], units[name])
        ]
        if changed and odd:
            raise ValueError(
                f"Argument {label} must set nothing but the size of `plate` '{plate}': "
                "the posterior is that of any number of groups. With one group more "
                f"the sites {odd} of one group are drawn from another law or have "
                "another shape. Make the law a function of shared sites only."
            )


def _with_defaults(
    model: Callable, args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return keyword arguments, with defaults of the model where none are given."""
    fn: Any = model
    while hasattr(fn, "fn"):  # a handler of NumPyro
        fn = fn.fn
    try:
        signature = inspect.signature(fn)
        given = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return kwargs
    positional = inspect.Parameter.POSITIONAL_ONLY
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.kind is not positional
    }
    known = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}
    return {**known, **kwargs}


def _with_one_more(
    size: int, args: tuple, kwargs: dict[str, Any]
) -> Iterator[tuple[str, tuple[tuple, dict[str, Any]]]]:
    """Yield arguments with one that may set the size of the plate enlarged by one."""
    for i, value in enumerate(args):
        for more in _one_more(size, value):
            yield f"{i + 1} of the model", ((*args[:i], more, *args[i + 1 :]), kwargs)
    for name, value in kwargs.items():
        for more in _one_more(size, value):
            yield f"`{name}` of the model", (args, {**kwargs, name: more})


def _one_more(size: int, value: Any) -> Iterator[Any]:
    """Yield a number, or an array at each axis, of the plate's size with one more."""
    if is_integer(value) and np.ndim(value) == 0:
        if value == size:
            yield value + 1
    elif isinstance(value, np.ndarray | jax.Array):
        for axis in range(value.ndim):
            if value.shape[axis] == size:
                last = np.take(value, [-1], axis)
                yield np.concatenate([value, last], axis)
    elif type(value) in (list, tuple) and len(value) == size:
        yield type(value)([*value, value[-1]])
