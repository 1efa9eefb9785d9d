r"""Tables: learn the joint law of columns, impute missing values by draws, score rows.

Columns are mapped to unconstrained space and standardized; their joint law is learned
with one noise level per coordinate, so that every conditional law of some columns given
others follows (:mod:`numpyro_score.score.conditioning`). Rows with missing values are
learned from by Monte Carlo EM (Wei and Tanner 1990): a round trains the score on the
table with missing values drawn given the others by the score of the round before. The
first round hides missing values by the highest noise level, and learns from the others
alone.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from numpyro.diagnostics import print_summary

from numpyro_score.caller_warnings import warn_caller
from numpyro_score.checks import check_count, check_flags, check_key, check_summary
from numpyro_score.data.columns import (
    Column,
    atom_of,
    cell_points,
    integers_of,
    pandas_column,
    read_columns,
    read_values,
    unconstrain_columns,
    unconstrain_rows,
)
from numpyro_score.data.far_points import MAX_DISTANCE, remoteness
from numpyro_score.data.inputs import warn_without_density, without_density_warnings
from numpyro_score.data.normal_em import draw_missing
from numpyro_score.data.rows import Batch, evenly_spaced
from numpyro_score.data.standardize import heavy_tails
from numpyro_score.infer.amortized.fit_verdict import MAX_ROWS, FitVerdict, warn_if_poor
from numpyro_score.infer.amortized.fit_verdict import MIN_ROWS as NUM_JUDGED
from numpyro_score.infer.joint.conditionals import (
    conditional_trainer,
    draw_rows,
    judge_conditionals,
)
from numpyro_score.infer.joint.table_storage import (
    ARRAYS,
    TableParts,
    describe_table,
    read_table,
)
from numpyro_score.io.models import load_with_sites, save_with_sites
from numpyro_score.loss.denoising import BatchDenoiseFn
from numpyro_score.nn import MLP
from numpyro_score.renamed_arguments import renamed
from numpyro_score.reprs import repr_lines
from numpyro_score.score.model import ScoreModel
from numpyro_score.sde import SDE
from numpyro_score.train import ScoreMatching
from numpyro_score.train.fit import FitOptions
from numpyro_score.train.held_out import equal_rows, split_groups
from numpyro_score.typing import PRNGKey

# of Monte Carlo EM, each a training, the first from a normal law; not tuned
NUM_ROUNDS = 3
HELD_OUT, MIN_ROWS = 0.1, 20  # scikit-learn's `validation_fraction`; leaves two rows
# of a table with fewer than 400 rows, as many as a verdict needs; more: worse draws
MAX_HELD_OUT = 0.2
# rows that have both of two columns: the sd of their correlation is 10^-1/2 = .3
MIN_TOGETHER = 10
MAX_NAMED = 5  # pairs of columns in one warning
# strata of cells of integers: exact for a density linear in one; more: slower
NUM_POINTS = 16
MAX_BEYOND = 1.0  # sd beyond all rows; lower: warns of many new rows; not tuned
MAX_COMPARED = 1000  # rows to impute, with all others; bounds time to seconds
# twentieths of the steps without a lower held-out loss; more: later; not tuned
PATIENCE = 4


@dataclass(frozen=True, eq=False)
class LearnedTable:
    """Joint law of the columns of a table; made by :func:`learn_table`.

    - **score**: score of standardized, unconstrained rows.
    - **columns**: names and supports.
    - **loc**, **scale**: mean and sd of unconstrained columns.
    - **low**, **high**: ends of the standardized values that were learned from.
    - **verdict**: on held-out rows, at the end of training; None for none.
    """

    score: ScoreModel
    columns: tuple[Column, ...]
    loc: Float[np.ndarray, " columns"]
    scale: Float[np.ndarray, " columns"]
    low: Float[np.ndarray, " columns"]
    high: Float[np.ndarray, " columns"]
    verdict: FitVerdict | None = None

    @renamed(key="rng_key", num_draws="num_samples")
    def impute(
        self, rng_key: PRNGKey, frame: Any, num_samples: int = 1
    ) -> tuple[Any, ...]:
        """Return completed copies of a frame, for multiple imputation.

        Missing values are independent draws given the values of their row, each copy
        with draws of its own. Analyse each copy and pool the results by Rubin's rules.

        Args:
            rng_key: random key.
            frame: a frame with the columns that were learned; rows may lack any values.
            num_samples: number of copies.

        Raises:
            ValueError: for other columns, or values outside of their supports.

        Warns:
            UserWarning: for values far from all that were learned from, each or
                together, given which draws mean nothing.
        """
        draws = self.impute_array(rng_key, frame, num_samples)
        by_name = {str(name): name for name in frame.columns}
        copies = tuple(frame.copy() for _ in range(num_samples))
        for i, column in enumerate(self.columns):
            name = by_name[column.name]
            missing = frame[name].isna().to_numpy()
            if not missing.any():
                continue
            for copy, values in zip(copies, draws[:, :, i], strict=True):
                known = copy[name].to_numpy(float, na_value=np.nan)
                filled = np.where(missing, values, known)
                copy[name] = pandas_column(filled, frame[name].dtype)
        return copies

    @renamed(key="rng_key", num_draws="num_samples")
    def impute_array(
        self, rng_key: PRNGKey, frame: Any, num_samples: int = 1
    ) -> Float[np.ndarray, "draws rows columns"]:
        """Return completed tables as one array, in the order of the learned columns.

        Args:
            rng_key: random key.
            frame: as in :meth:`impute`.
            num_samples: number of draws.
        """
        check_key("rng_key", rng_key)
        check_count("num_samples", num_samples, "a number of completed tables")
        x = read_values(frame, self.columns)
        u = self._standardize(x)
        if not self._warn_of_far(u, x):
            _warn_of_remote(self.score, u)
        draws = self._physical(draw_rows(rng_key, self.score, u, num_samples))
        return np.where(np.isnan(x), draws, x)

    def log_prob(self, frame: Any) -> Float[np.ndarray, " rows"]:
        """Return the log density of each row, in nats, by the probability flow.

        The density of integers is their probability: the mean over their cells, by 16
        points, where these are wide on the scale of their column, else that in the
        middle. Low values are rows that fit the others badly.

        Args:
            frame: a frame with the columns that were learned and no missing values.

        Raises:
            ValueError: for missing values.
        """
        x = read_values(frame, self.columns)
        if np.isnan(x).any():
            bad = np.isnan(x).any(1).sum()
            raise ValueError(
                "`frame` must have no missing values: the density is that of whole "
                f"rows. Impute them first, or drop these rows. Got {bad} of {len(x)}."
            )
        self._warn_of_far(self._standardize(x), x)
        is_coarse = any(column.is_coarse for column in self.columns)
        points = cell_points(self.columns, NUM_POINTS if is_coarse else 1)
        values = [self._log_density(x, point) for point in points]
        return np.logaddexp.reduce(values) - np.log(len(points))

    @renamed(key="rng_key", num_rows="num_samples")
    def sample(self, rng_key: PRNGKey, num_samples: int) -> dict[str, np.ndarray]:
        """Return draws of whole rows, by name of the column.

        Args:
            rng_key: random key.
            num_samples: number of rows.

        Raises:
            ValueError: for fewer than one row.
        """
        check_key("rng_key", rng_key)
        check_count("num_samples", num_samples, "a number of rows")
        u = np.asarray(self.score.sample(rng_key, (num_samples,)), np.float64)
        x = self._physical(u)
        return {column.name: x[:, i] for i, column in enumerate(self.columns)}

    @renamed(num_rows="num_samples")
    def print_summary(
        self, rng_key: PRNGKey, num_samples: int = 1000, prob: float = 0.9
    ) -> None:
        """Print a summary of drawn rows, and of the verdict on held-out rows.

        Args:
            rng_key: random key.
            num_samples: number of rows that are drawn.
            prob: probability mass of the intervals.
        """
        check_summary(num_samples, prob)
        draws = self.sample(rng_key, num_samples)
        print_summary(draws, prob=prob, group_by_chain=False)
        print(f"{num_samples} independent rows, approximate by the error of the net.")
        if self.verdict is not None:
            print(self.verdict)

    def save(self, path: str | os.PathLike) -> None:
        """Save score, columns and verdict in a new folder.

        Args:
            path: path of the new folder.

        Raises:
            FileExistsError: if ``path`` exists.
            TypeError: for a score that is a function.
        """
        arrays = {name: getattr(self, name) for name in ARRAYS}
        parts = TableParts(self.columns, arrays, self.verdict)
        save_with_sites(self.score, *describe_table(parts), path)

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, net: Callable | nnx.Module | None = None
    ) -> "LearnedTable":
        """Return a table that was saved.

        Args:
            path: the folder.
            net: the ``net`` of the trainer, if it is not a configuration of the
                package.

        Raises:
            FileNotFoundError: if the folder or one of its files is not there.
            ValueError: if a file was altered, or parts belong to different tables.
        """
        score, (columns, arrays, verdict) = load_with_sites(
            path, read_table, lambda parts: len(parts.columns), net=net
        )
        return cls(score, columns, **arrays, verdict=verdict)

    def _standardize(
        self, x: np.ndarray, point: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Return standardized unconstrained rows, integers at one point of cells."""
        noise = np.broadcast_to(point, x.shape)
        return (unconstrain_columns(self.columns, x, noise) - self.loc) / self.scale

    def _log_density(self, x: np.ndarray, point: np.ndarray) -> np.ndarray:
        """Return the log density of rows, integers at one point of cells."""
        u = jnp.asarray(self._standardize(x, point), float)
        slopes = [
            column.log_derivative(x[:, i] + point[i])
            for i, column in enumerate(self.columns)
        ]
        jacobian = np.sum(slopes, axis=0) - np.log(self.scale).sum()
        return np.asarray(self.score.log_prob(u)) + jacobian

    def _warn_of_far(self, u: np.ndarray, x: np.ndarray) -> bool:
        """Warn of values beyond all that were learned from, by more than an sd.

        Returns:
            Whether there are any.
        """
        far = (u < self.low - MAX_BEYOND) | (u > self.high + MAX_BEYOND)
        if far.any():
            column = int(np.argmax(far.sum(0)))
            worst = x[far[:, column], column]
            warn_caller(
                f"{far.any(1).sum()} of {len(x)} rows hold values that lie more than "
                "one sd beyond all that the table was learned from: draws given them, "
                "and their densities, mean nothing. Leave these rows out, or learn "
                f"from rows like them. Most are in column '{self.columns[column].name}'"
                f", such as {worst[:3].tolist()}."
            )
        return bool(far.any())

    def __repr__(self) -> str:
        rows = {"columns": ", ".join(column.name for column in self.columns)}
        if self.verdict is not None:
            rows["verdict"] = self.verdict.headline
        return repr_lines(type(self).__name__, rows)

    def _physical(self, u: np.ndarray) -> np.ndarray:
        z = self.loc + self.scale * u
        parts = [c.constrain(z[..., i]) for i, c in enumerate(self.columns)]
        return np.stack(parts, axis=-1)


def _warn_of_remote(score: ScoreModel, u: np.ndarray) -> None:
    """Warn of rows whose known values are together far from all rows.

    Args:
        score: the score of rows, with some of those that it was learned from.
        u: standardized rows, NaN where a value is missing.
    """
    candidates = np.flatnonzero((~np.isnan(u)).sum(1) > 1)
    if score.rows is None or not len(candidates):
        return
    rows = np.asarray(jax.vmap(score.standardize.inverse)(score.rows), np.float64)
    compared, far = candidates[evenly_spaced(len(candidates), MAX_COMPARED)], {}
    for index in compared.tolist():
        known = ~np.isnan(u[index])
        if words := remoteness(u[index, known], rows[:, known]).words:
            far[index] = words
    expected = len(compared) * len(rows) ** -MAX_DISTANCE  # by chance
    if len(far) > expected + 4 * expected**0.5:  # four standard errors of a count
        index, words = next(iter(far.items()))
        warn_caller(
            f"{len(far)} of {len(compared)} rows hold values that are together far "
            "from all rows that the table was learned from, though each alone is not: "
            "draws given them mean little. See whether they contradict each other. "
            f"The first is row {index}, with {words}."
        )


def learn_table(
    rng_key: PRNGKey,
    frame: Any,
    *,
    supports: Mapping[str, Any] | None = None,
    num_steps: int = 8000,
    trainer: ScoreMatching | None = None,
    check: bool = True,
    progress_bar: bool = True,
) -> LearnedTable:
    """Return the joint law of a table's columns, with any conditional law.

    Missing values may stand anywhere, as long as that they are missing does not depend
    on what they are, given the rest of their row (missing at random).

    Args:
        rng_key: random key.
        frame: a DataFrame of pandas with numbers.
        supports: constraints of NumPyro by column, such as
            ``{"income": constraints.positive}``. Without one, floats are real,
            integers are dequantized and reach no further than their lowest and highest
            where a twentieth of the rows has these or counts do not thin out towards
            them, unsigned ones are at least 0, booleans 0 and 1. Floats that are all
            integers, with one value in a tenth of the rows or more, are taken for
            integers, as pandas writes integers with missing values.
        num_steps: largest number of training steps, for a table with missing values of
            each of three rounds; a tenth of the rows is held out and ends training, 40
            of a table with 200 to 400 rows.
        trainer: a trainer of points of shape ``(columns,)`` with ``PerCoordinate``
            noise; None for a small MLP.
        check: whether to judge the result on held-out rows, of 200 rows or more: each
            column given what is known of the others and, where no value is missing,
            half of the columns given the others, and these given those
            (:mod:`~numpyro_score.infer.amortized.fit_verdict`).
        progress_bar: whether to show progress.

    Raises:
        TypeError: for a table or columns of another kind.
        ValueError: for values outside of their supports, constant or empty columns,
            columns of real numbers with one value in many rows, fewer than 20 rows, or
            a trainer without levels per coordinate.

    Warns:
        UserWarning: if the result fails on held-out rows, for columns with heavy tails,
            for pairs of columns that hardly any row has both of, and for fewer rows
            than columns.

    Example:
        >>> import pandas
        >>> rng = np.random.default_rng(0)
        >>> a = rng.normal(size=200)
        >>> frame = pandas.DataFrame({"a": a, "b": a + rng.normal(size=200)})
        >>> frame.loc[0, "b"] = np.nan
        >>> table = learn_table(
        ...     jax.random.key(0), frame, num_steps=20, progress_bar=False
        ... )
        >>> [draw.isna().any().any() for draw in table.impute(jax.random.key(1), frame)]
        [np.False_]
    """
    check_key("rng_key", rng_key)
    check_flags(check=check)
    columns = read_columns(frame, {} if supports is None else supports)
    x = read_values(frame, columns)
    _check_table(x, columns)
    _warn_of_columns_apart(x, columns)
    _warn_of_few_rows(x)
    trainer = conditional_trainer(trainer, MLP(len(columns), width=64))
    key_rows, rng_key = jax.random.split(rng_key)
    rng = np.random.default_rng(int(jax.random.bits(key_rows)))
    z = unconstrain_rows(rng, columns, x)
    largest = np.nanmax(np.abs(z), 0)  # squares of others may leave double precision
    _warn_of_heavy_tails(z / largest, columns)
    loc, scale = (f(z / largest, 0) * largest for f in (np.nanmean, np.nanstd))
    order, held_out = _order(rng, x, columns)
    u = ((z - loc) / scale)[order]
    low, high = np.nanmin(u, 0), np.nanmax(u, 0)
    names = [column.name for column in columns]
    warn_without_density(u.astype(np.float32), names, "frame")
    with without_density_warnings():
        score = _train(rng_key, rng, u, held_out, trainer, num_steps, progress_bar)
    table = LearnedTable(score, columns, loc, scale, low, high)
    if check:
        key_check = jax.random.fold_in(rng_key, NUM_ROUNDS)  # rounds have those below
        verdict = _judge(key_check, table, u[held_out:], u[:held_out])
        warn_if_poor(verdict, "The learned law of the table fails on held-out rows")
        table = replace(table, verdict=verdict)
    return table


def _order(
    rng: np.random.Generator, x: np.ndarray, columns: tuple[Column, ...]
) -> tuple[np.ndarray, int]:
    """Return rows at random, and how many of them, the first, are held out.

    Equal rows of real numbers stay together: none is held out that another one is
    trained on. Those of integers are equal by chance.
    """
    is_real = not any(column.is_integer for column in columns)
    groups = equal_rows(x) if is_real else np.arange(len(x))
    order = rng.permutation(int(groups.max()) + 1)
    held_out, train = split_groups(groups, order, _num_held_out(len(x)))
    return np.concatenate([held_out, train]), len(held_out)


def _num_held_out(num_rows: int) -> int:
    """Return how many rows are held out: a tenth, or 40 if these are a fifth at most.

    Example:
        >>> [_num_held_out(num_rows) for num_rows in (20, 199, 200, 300, 1000)]
        [2, 19, 40, 40, 100]
    """
    least = NUM_JUDGED if MAX_HELD_OUT * num_rows >= NUM_JUDGED else 1
    return max(int(HELD_OUT * num_rows), least)


def _warn_of_columns_apart(x: np.ndarray, columns: tuple[Column, ...]) -> None:
    """Warn of pairs of columns of which too few rows have both, by name."""
    known = (~np.isnan(x)).astype(int)
    together = known.T @ known
    pairs = [
        (columns[i].name, columns[j].name, int(together[i, j]))
        for i, j in np.argwhere(np.triu(together < MIN_TOGETHER, 1))
    ]
    if pairs:
        warn_caller(
            f"Fewer than {MIN_TOGETHER} rows have values in both of two columns: how "
            "they depend on each other, given the others, is not in the table, and "
            "draws of one given the other are guesses. Add rows that have both. Got "
            f"(column, column, rows) {pairs[:MAX_NAMED]}, in all {len(pairs)} pairs."
        )


def _warn_of_few_rows(x: np.ndarray) -> None:
    """Warn of a table with fewer rows than columns."""
    if len(x) < x.shape[1]:
        warn_caller(
            "The table has fewer rows than columns: how one column depends on all "
            "others is not in it, and draws of one given the others follow a smoother "
            "law, with intervals that are too narrow. Add rows, or leave columns out. "
            f"Got {len(x)} rows, {x.shape[1]} columns."
        )


def _warn_of_heavy_tails(z: np.ndarray, columns: tuple[Column, ...]) -> None:
    """Warn of columns whose sd measures a few extreme rows, by name."""
    _, _, heavy = heavy_tails(z, np.nanstd(z, 0))
    if heavy.any():
        names = [columns[place].name for place in np.flatnonzero(heavy)]
        warn_caller(
            "Columns have heavy tails, so that their sd measures a few extreme rows, "
            "and the lowest noise level is wide for the others: draws of them spread "
            "too far. Give a logarithm or arcsinh of these columns in their place. "
            f"Got columns {names}."
        )


def _judge(
    rng_key: PRNGKey, table: LearnedTable, train: np.ndarray, held_out: np.ndarray
) -> FitVerdict:
    """Return the verdict on held-out rows: of one column at a time, and of halves."""
    columns = table.columns
    names = tuple(column.name for column in columns)
    masks = list(np.eye(len(columns), dtype=bool))
    if not (np.isnan(train).any() or np.isnan(held_out).any()) and len(columns) > 2:
        is_even = np.arange(len(columns)) % 2 == 0
        masks += [is_even, ~is_even]

    def integers(u: np.ndarray) -> np.ndarray:
        return integers_of(columns, table.loc + table.scale * u)

    rows = held_out[:MAX_ROWS]
    return judge_conditionals(
        rng_key, table.score, names, tuple(masks), train, rows, integers
    )


@dataclass(frozen=True)
class _KnownAlone:
    """Objective with one level per coordinate, for the first round of a table.

    The highest noise level hides what is not known from the net; it has no error.
    """

    loss: Any
    per_coordinate = True

    def __call__(
        self,
        key: PRNGKey,
        denoise: BatchDenoiseFn,
        x0: Array,
        sde: SDE,
        known: Array,
    ) -> Array:
        """Return the loss of one batch of standardized rows."""
        noise = jax.random.normal(jax.random.fold_in(key, 2), x0.shape, x0.dtype)

        def denoise_known(x: Array, levels: Array) -> Array:
            x = jnp.where(known, x, sde.sigma_max * noise)
            levels = jnp.where(known, levels, sde.sigma_max)
            return jnp.where(known, denoise(x, levels), x0)

        value: Array = self.loss(key, denoise_known, x0, sde, known=known)
        return value


def _train(
    key: PRNGKey,
    rng: np.random.Generator,
    u: np.ndarray,
    held_out: int,
    trainer: ScoreMatching,
    num_steps: int,
    progress_bar: bool,
) -> ScoreModel:
    """Return the score of standardized rows, by Monte Carlo EM if some are missing.

    The first ``held_out`` rows end training.
    """
    is_known = ~np.isnan(u)
    is_whole = bool(is_known.all())
    # the normal law's draws stand in the covariance alone: the first round hides them
    filled = u if is_whole else draw_missing(rng, u)
    score: Any = None
    for index in range(1 if is_whole else NUM_ROUNDS):
        key_fill, key_train = jax.random.split(jax.random.fold_in(key, index))
        if score is not None:
            filled = draw_rows(key_fill, score, u, 1)[0]
        rows = Batch(jnp.asarray(filled, float), known=None if is_whole else is_known)
        options = FitOptions(
            num_steps,
            validation=rows.take(slice(held_out)),
            patience=PATIENCE,
            progress_bar=progress_bar,
        )
        train = rows.take(slice(held_out, None))
        loss = trainer.loss if is_whole or index else _KnownAlone(trainer.loss)
        score = replace(trainer, loss=loss).fit(key_train, train, options).score
    return score


def _check_table(x: np.ndarray, columns: tuple[Column, ...]) -> None:
    """Raise unless a table has enough rows, and columns that vary.

    Raises:
        ValueError: in these cases.
    """
    if len(x) < MIN_ROWS:
        raise ValueError(
            f"`frame` must have at least {MIN_ROWS} rows: some are held out to end "
            f"training. Got {len(x)}."
        )
    counts = [len(np.unique(v[~np.isnan(v)])) for v in x.T]
    flat = [c.name for c, n in zip(columns, counts, strict=True) if n < 2]
    if flat:
        raise ValueError(
            "`frame` must have two different values or more in every column: a "
            f"constant has no law to learn. Leave these columns out. Got {flat}."
        )
    atoms = {
        column.name: value
        for column, values in zip(columns, x.T, strict=True)
        if not column.is_integer and (value := atom_of(values)) is not None
    }
    if atoms:
        raise ValueError(
            "`frame` must have a density in its columns of real numbers, but these "
            "have one value in many rows, as sums with zeros or cut off measurements "
            "do. Replace such a column by one of booleans, whether it has this value, "
            f"and one of the other values, missing elsewhere. Got {atoms}."
        )
