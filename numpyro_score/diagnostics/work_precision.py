r"""Work-precision diagrams of solvers: distance to a law against evaluations.

The distance between two finite samples of one law is positive. This *floor* is the
smallest error that a comparison of samples can detect.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_score.checks import check_count, check_key, check_kind, check_rows_finite
from numpyro_score.renamed_arguments import renamed
from numpyro_score.solver.base import Solver
from numpyro_score.solver.grid import Grid
from numpyro_score.solver.integrate import DenoisingModel
from numpyro_score.solver.sample import solve
from numpyro_score.typing import PRNGKey


@renamed(key="rng_key")
def sliced_wasserstein(
    rng_key: PRNGKey,
    x: Float[Array, "draws *event"],
    y: Float[Array, "draws *event"],
    num_projections: int = 200,
) -> float:
    """Return the sliced Wasserstein-1 distance of two samples of equal size.

    The mean, over random directions, of the Wasserstein-1 distance of the projections
    (Bonneel et al. 2015).

    Args:
        rng_key: random key of the directions.
        x: draws.
        y: as many draws.
        num_projections: number of directions.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> round(sliced_wasserstein(jax.random.key(1), x, x + 0.5), 3)
        0.5
    """
    check_key("rng_key", rng_key)
    check_count("num_projections", num_projections, "a number of directions")
    x, y = _check_rows(x, y)
    if len(x) != len(y):
        raise ValueError(
            "`x` and `y` must have as many rows: sorted projections are compared in "
            f"pairs. Got {len(x)} and {len(y)}."
        )
    directions = jax.random.normal(rng_key, (x.shape[1], num_projections))
    directions = directions / jnp.linalg.norm(directions, axis=0)
    # sorted by NumPy: XLA's sort on CPUs is many times slower
    first, second = (np.sort(np.asarray((a @ directions).T), axis=1) for a in (x, y))
    return float(np.abs(first - second).mean())


def _check_rows(*samples: Any) -> tuple[Array, ...]:
    """Return samples as matrices, after checking that they can be compared."""
    for name, rows in zip("xy", samples, strict=True):
        check_rows_finite(name, rows)
    arrays = map(jnp.asarray, samples)
    flat = tuple(jnp.reshape(rows, (len(rows), -1)) for rows in arrays)
    if flat[0].shape[1] != flat[1].shape[1]:
        raise ValueError(
            "`x` and `y` must have as many numbers per row: they are draws in one "
            f"space. Got {flat[0].shape[1]} and {flat[1].shape[1]}."
        )
    return flat


def energy_distance(
    x: Float[Array, "draws *event"],
    y: Float[Array, "others *event"],
    num_rows: int = 2000,
) -> Float[Array, ""]:
    r"""Return the energy distance of two samples, from their first ``num_rows`` rows.

    :math:`2 E|X - Y| - E|X - X'| - E|Y - Y'|` (Szekely and Rizzo 2013). Unbiased, from
    pairs of different rows, and therefore sometimes negative.

    Args:
        x: draws.
        y: draws of the other law.
        num_rows: number of rows used of each; the cost is quadratic in it.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (500, 2))
        >>> bool(energy_distance(x, x + 3.0) > 1.0)
        True
    """
    check_count("num_rows", num_rows, "a number of rows", least=2)
    x, y = _check_rows(x, y)
    for name, rows in {"x": x, "y": y}.items():
        check_count(f"len({name})", len(rows), "compared in pairs", least=2)
    return _energy_distance(x[:num_rows], y[:num_rows])


@jax.jit
def _energy_distance(x: Array, y: Array) -> Float[Array, ""]:
    def mean_distance(a: Array, b: Array, num_pairs: int) -> Array:
        squares = jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1)[None]
        gaps = jnp.maximum(squares - 2 * a @ b.T, 0.0)
        same = a is b
        gaps = jnp.where(jnp.eye(len(a), dtype=bool), 0.0, gaps) if same else gaps
        return jnp.sqrt(gaps).sum() / num_pairs

    n, m = len(x), len(y)
    center = x.mean(0)  # squares of far points would be rounded
    x, y = x - center, y - center
    between = mean_distance(x, y, n * m)
    return (
        2 * between
        - mean_distance(x, x, n * (n - 1))
        - mean_distance(y, y, m * (m - 1))
    )


class WorkPrecisionPoint(NamedTuple):
    """Errors of one solver on one grid with one number of evaluations.

    - **solver**, **grid**: the solver and its grid.
    - **num_evaluations**: denoiser evaluations per draw.
    - **sliced_wasserstein**: mean distance to the reference.
    - **energy_distance**: mean distance to the reference.
    """

    solver: Solver
    grid: Grid
    num_evaluations: int
    sliced_wasserstein: float
    energy_distance: float


class WorkPrecision(NamedTuple):
    """Result of :func:`work_precision`.

    - **points**: one per solver and number of evaluations.
    - **floor**: sliced Wasserstein distance of two halves of the reference.
    """

    points: list[WorkPrecisionPoint]
    floor: float


@renamed(key="rng_key")
def work_precision(
    rng_key: PRNGKey,
    score: DenoisingModel,
    reference: Float[Array, "rows *event"],
    choices: Sequence[tuple[Solver, Grid]],
    budgets: Sequence[int] = (8, 16, 32, 64),
    *,
    num_repeats: int = 4,
    context: Array | None = None,
) -> WorkPrecision:
    """Return distances of solvers' draws to a reference, by number of evaluations.

    Data with a support are compared in unconstrained space.

    Args:
        rng_key: random key.
        score: a score model.
        reference: draws of the law, for example held-out data. The first half is
            compared with as many draws; the distance of the two halves is the floor.
        choices: solvers with their grids, not adaptive ones, whose number of
            evaluations is not an input.
        budgets: denoiser evaluations per draw.
        num_repeats: number of sets of draws to average over.
        context: what the score is conditioned on.

    Raises:
        ValueError: if no budget suffices for one step of a solver.

    Example:
        >>> from numpyro_score import VE, DPMSolverPP, ScoreModel
        >>> from numpyro_score.solver import Geometric
        >>> score = ScoreModel.from_fn(
        ...     lambda x, t: -x / (1 + VE().sigma(t) ** 2), VE(), event_shape=(1,)
        ... )
        >>> data = jax.random.normal(jax.random.key(0), (400, 1))
        >>> curve = work_precision(
        ...     jax.random.key(1), score, data, [(DPMSolverPP(), Geometric())], [8, 16]
        ... )
        >>> [point.num_evaluations for point in curve.points]
        [8, 16]
    """
    check_key("rng_key", rng_key)
    check_count("num_repeats", num_repeats, "a number of sets of draws")
    for budget in budgets:
        check_count("budgets", budget, "a number of evaluations", least=0)
    check_rows_finite("reference", reference)
    if (unconstrain := getattr(score, "unconstrain", None)) is not None:
        reference = unconstrain(reference)
    half = len(reference) // 2
    first, second = reference[:half], reference[half : 2 * half]
    key_slices, key_draws = jax.random.split(rng_key)
    keys = jax.random.split(key_draws, num_repeats)
    points = []
    for solver, grid in choices:
        per_step = int(solver.num_evaluations(1, None))
        for budget in budgets:
            if budget < per_step:
                continue
            options: dict[str, Any] = {"solver": solver, "context": context}
            ts = grid(score.sde, budget // per_step)
            errors = []
            for k in keys:
                draws = solve(k, score, (half,), ts=ts, **options).draws
                errors.append(
                    (
                        sliced_wasserstein(key_slices, draws, first),
                        float(energy_distance(draws, first)),
                    )
                )
            sliced, energy = np.mean(errors, axis=0)
            count = budget // per_step * per_step
            points.append(
                WorkPrecisionPoint(solver, grid, count, float(sliced), float(energy))
            )
    if not points:
        raise ValueError(
            "`budgets` must hold a number that pays for one step of a solver in "
            f"`choices`. Got {list(budgets)}."
        )
    return WorkPrecision(points, sliced_wasserstein(key_slices, first, second))


def plot_work_precision(curve: WorkPrecision, ax: Any = None) -> Any:
    """Plot the sliced Wasserstein distance against evaluations, with the floor.

    Args:
        curve: from :func:`work_precision`.
        ax: matplotlib axes; None for new ones.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.

    Example:
        >>> from numpyro_score.solver import Euler, Geometric
        >>> point = WorkPrecisionPoint(Euler(), Geometric(), 8, 0.2, 0.1)
        >>> plot_work_precision(WorkPrecision([point], 0.05)).get_xlabel()
        'evaluations per draw'
    """
    check_kind("curve", curve, WorkPrecision, "a result of work_precision")
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib: pip install 'numpyro_score[plot]'."
        ) from error
    ax = plt.figure().subplots() if ax is None else ax
    lines: dict[str, list[WorkPrecisionPoint]] = {}
    for point in curve.points:
        lines.setdefault(f"{point.solver}, {point.grid}", []).append(point)
    for label, points in lines.items():
        counts = [point.num_evaluations for point in points]
        ax.loglog(counts, [p.sliced_wasserstein for p in points], ".-", label=label)
    ax.axhline(curve.floor, color="gray", linestyle=":", label="floor")
    ax.set(xlabel="evaluations per draw", ylabel="sliced Wasserstein distance")
    ax.legend(fontsize="x-small")
    return ax
