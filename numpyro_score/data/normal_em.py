r"""Mean, covariance and draws of a normal law from rows with missing numbers."""

import numpy as np
from jaxtyping import Bool, Float

Table = Float[np.ndarray, "rows columns"]
# EM converges at the rate of the share that is missing: of .9, .9^50 = .5 % is left
NUM_ITERATIONS = 50
RIDGE = 1e-3  # of the variances: 1 / rows of a table of 1000


def fit_normal(
    rows: Table,
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, "columns columns"]]:
    """Return mean and covariance of the likeliest normal law of rows with NaN.

    The EM algorithm (Dempster, Laird and Rubin 1977; Little and Rubin 2019, section
    11.2). Variances are multiplied by 1.001, for dependent columns.

    Args:
        rows: standardized data, NaN where a number is missing.

    Example:
        >>> mean, cov = fit_normal(np.array([[1.0, 2.0], [-1.0, -2.0], [3.0, np.nan]]))
        >>> mean.round(1).tolist()  # a straight line
        [1.0, 2.0]
    """
    mean, covariance = np.nanmean(rows, 0), np.diag(np.nanvar(rows, 0) + RIDGE)
    for _ in range(NUM_ITERATIONS):
        filled, extra = np.empty_like(rows), np.zeros_like(covariance)
        for members, missing in patterns(rows):
            part, spread = conditional(rows[members], missing, mean, covariance)
            filled[members] = part
            extra[np.ix_(missing, missing)] += len(part) * spread
        mean = filled.mean(0)
        centered = filled - mean
        covariance = (centered.T @ centered + extra) / len(rows)
        covariance += RIDGE * np.diag(np.diag(covariance))
    return mean, covariance


def draw_missing(rng: np.random.Generator, rows: Table) -> Table:
    """Return rows with missing numbers drawn given the others, under a normal law.

    Args:
        rng: random numbers.
        rows: standardized data, NaN where a number is missing.
    """
    mean, covariance = fit_normal(rows)
    filled = np.array(rows)
    for members, missing in patterns(rows):
        part, spread = conditional(rows[members], missing, mean, covariance)
        noise = rng.standard_normal((len(part), missing.sum()))
        values, vectors = np.linalg.eigh(spread)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        part[:, missing] += noise @ root.T
        filled[members] = part
    return filled


def patterns(
    rows: Table,
) -> list[tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " columns"]]]:
    """Return for each pattern of missing numbers its rows and its columns."""
    found, index = np.unique(np.isnan(rows), axis=0, return_inverse=True)
    index = index.ravel()
    return [(index == i, missing) for i, missing in enumerate(found)]


def conditional(
    rows: Table,
    missing: Bool[np.ndarray, " columns"],
    mean: Float[np.ndarray, " columns"],
    covariance: Float[np.ndarray, "columns columns"],
) -> tuple[Table, Float[np.ndarray, "missing missing"]]:
    """Return rows with conditional means in place, and the conditional covariance."""
    known = ~missing
    cross = covariance[np.ix_(missing, known)]
    gain = np.linalg.solve(covariance[np.ix_(known, known)], cross.T).T
    filled = np.array(rows)
    filled[:, missing] = mean[missing] + (rows[:, known] - mean[known]) @ gain.T
    return filled, covariance[np.ix_(missing, missing)] - gain @ cross.T
