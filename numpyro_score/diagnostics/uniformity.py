r"""Uniformity of probability integral transforms (PIT): test, ECDF bands and plot.

SBC and TARP ranks are mapped to values in [0, 1] that are uniform for a calibrated
posterior. The test, the simultaneous bands of the ECDF (Säilynoja et al. 2022) and the
plot are ArviZ's, which is imported in the functions because its import takes seconds.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from numpyro_score.checks import (
    check_count,
    check_kind,
    check_probability,
    check_rows_finite,
)

PIT = Float[np.ndarray, "simulations *event"] | Float[Array, "simulations *event"]


class UniformityTest(NamedTuple):
    """Result of :func:`uniformity_test`.

    - **p_values**: by name, an array of the quantity's shape.
    - **p_value**: of all together by Bonferroni's correction, the smallest times their
      number.
    """

    p_values: dict[str, np.ndarray]
    p_value: float


def uniformity_test(pit: dict[str, PIT], method: str = "pot_c") -> UniformityTest:
    """Return p-values of uniformity, for each quantity and for all together.

    ArviZ's ``uniformity_test``: pointwise tests combined by a truncated Cauchy rule.
    The p-values are valid where they are small; above 0.3 they are not uniform under
    the null hypothesis.

    Args:
        pit: values in [0, 1] by name, one row per simulation.
        method: "pot_c", "prit_c" or "piet_c", as in ArviZ.

    Raises:
        TypeError: for anything but a dict.
        ValueError: for values outside of [0, 1], or different numbers of rows.

    Example:
        >>> uniform = (np.arange(100) + 0.5) / 100
        >>> uniformity_test({"x": uniform}).p_value > 0.2
        True
        >>> uniformity_test({"x": uniform**2}).p_value < 1e-4
        True
    """
    from arviz_stats.base.array import array_stats

    _check_pit(pit)
    p_values = {}
    for name, values in pit.items():
        rows = np.moveaxis(np.asarray(values, float), 0, -1)
        p_values[name] = np.asarray(array_stats.uniformity_test(rows, method=method)[0])
    every = np.concatenate([p.ravel() for p in p_values.values()])
    return UniformityTest(p_values, float(min(1.0, every.min() * every.size)))


def _check_pit(pit: Any) -> None:
    """Raise unless there are values in [0, 1] by name, a row for each simulation.

    Raises:
        TypeError: for anything but a dict.
        ValueError: for no values, other values, or different numbers of rows.
    """
    check_kind("pit", pit, Mapping, "a dict of values in [0, 1] by name")
    for name, values in pit.items():
        check_rows_finite(f"pit['{name}']", values)
        rows = np.asarray(values)
        if rows.min() < 0 or rows.max() > 1:
            raise ValueError(
                f"`pit['{name}']` must lie in [0, 1]: it is compared with a uniform "
                f"law. Got {rows.min():.3g} to {rows.max():.3g}."
            )
    lengths = {len(values) for values in pit.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            "`pit` must have one row per simulation, as many for every name, and two "
            f"at least. Got {sorted(lengths)} rows."
        )


class ECDFBand(NamedTuple):
    """Result of :func:`ecdf_band`, arrays over ``levels``.

    - **levels**: arguments of the distribution function, in [0, 1].
    - **lower**, **upper**: simultaneous band of the ECDF of uniform values.
    """

    levels: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def ecdf_band(num_values: int, prob: float = 0.95) -> ECDFBand:
    """Return the simultaneous band of the ECDF of uniform values.

    By 1000 simulations with a fixed seed, in ArviZ (Säilynoja et al. 2022).

    Args:
        num_values: number of values.
        prob: probability that the ECDF is in the band at all levels.

    Raises:
        ValueError: for a probability outside (0, 1).

    Example:
        >>> band = ecdf_band(100)
        >>> bool(np.all(band.lower <= band.upper))
        True
    """
    from arviz_stats.ecdf_utils import ecdf_pit

    check_count("num_values", num_values, "the number of simulations", least=2)
    check_probability("prob", prob, "that of a uniform ECDF to stay in the band")
    levels, _, lower, upper = ecdf_pit(np.linspace(0, 1, num_values), prob, 1000)
    return ECDFBand(levels, lower, upper)


def pit_datatree(pit: dict[str, PIT]) -> Any:
    """Return a DataTree with the values in the group ``prior_sbc``, for ArviZ.

    Args:
        pit: values in [0, 1] by name, one row per simulation.

    Example:
        >>> pit_datatree({"x": np.full((7, 2), 0.5)})["prior_sbc"]["x"].shape
        (1, 7, 2)
    """
    from arviz_base import from_dict

    return from_dict({"prior_sbc": {k: np.asarray(v)[None] for k, v in pit.items()}})


def plot_pit(pit: dict[str, PIT], *, prob: float = 0.95, **options: Any) -> Any:
    r"""Plot the ECDF minus the diagonal by ArviZ's ``plot_ecdf_pit``, with its band.

    For a calibrated posterior the curve is in the band. Above it on the left and below
    it on the right, the truths are in the tails: the posterior is too narrow. Below on
    the left and above on the right: it is too wide. Above everywhere: it is biased
    upward; below everywhere: downward.

    Args:
        pit: values in [0, 1] by name, one row per simulation.
        prob: probability that the ECDF of uniform values is in the band at all levels.
        options: further arguments of ``plot_ecdf_pit``.

    Returns:
        ArviZ's PlotCollection.

    Example:
        >>> uniform = (np.arange(20) + 0.5) / 20
        >>> type(plot_pit({"x": uniform})).__name__
        'PlotCollection'
    """
    from arviz_plots import plot_ecdf_pit, visuals

    _check_pit(pit)
    options = {"envelope_prob": prob, "visuals": {"remove_axis": False}, **options}
    plot = plot_ecdf_pit(pit_datatree(pit), **options)
    band = ecdf_band(len(next(iter(pit.values()))), prob)
    plot.map(
        visuals.fill_between_y,
        "band",
        x=band.levels,
        y_bottom=band.lower - band.levels,
        y_top=band.upper - band.levels,
        color="gray",
        alpha=0.2,
    )
    return plot
