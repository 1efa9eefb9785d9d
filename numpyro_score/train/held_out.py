"""Rows that a run of training holds out, to end where their loss is lowest."""

from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Int

from numpyro_score.data.rows import ArrayDataset, Batch, IterableDataset
from numpyro_score.train.fit import FitOptions

SHARE = 0.1  # scikit-learn's `validation_fraction`
MIN_ROWS = 10  # held out; the loss of ten is known within (2 / 10)^1/2 = 45 %
# passes over the rows; `python -m tests.benchmarks.learned_prior --losses` shows a gain
# from about 500, none at 256 and a loss at 128
MIN_EPOCHS = 200
PATIENCE = 10  # of 20 blocks without a lower loss: half of the cosine schedule
VALIDATION_ROWS = 10_000  # with repetitions: relative error of the loss about 1 %
VALIDATION_NUMBERS = 1_000_000  # of all rows; bounds memory to 4 MB


def hold_out_rows(
    options: FitOptions, source: ArrayDataset | IterableDataset
) -> tuple[FitOptions, ArrayDataset | IterableDataset]:
    """Return options with held-out rows, and the source without them.

    Both are returned as they are if nothing is to be held out.

    Args:
        options: of the run; its ``validation_share`` says how much is held out. None is
            a tenth of at least 100 rows, if each would be seen 200 times or more.
        source: where batches come from.

    Raises:
        ValueError: for a share of an iterator, and one that leaves no row.
    """
    share = options.validation_share
    if options.validation is not None or share == 0:
        return options, source
    if not isinstance(source, ArrayDataset):
        if share is None:
            return options, source
        raise ValueError(
            "`validation_share` needs data in an array: the rows of an iterator cannot "
            f"be held out. Give `validation`. Got validation_share={share}."
        )
    rows, size = source.rows, source.batch_size
    num_rows = len(rows.x)
    count = round((SHARE if share is None else share) * num_rows)
    if share is None:
        seen = options.num_steps * size / num_rows
        devices = 1 if options.mesh is None else options.mesh.devices.shape[0]
        parts = options.accumulate * devices  # of equal size, of each batch
        size = min(size, (num_rows - count) // parts * parts)
        if seen < MIN_EPOCHS or count < MIN_ROWS or size == 0:
            return options, source
    if count == 0:
        return options, source
    if count == num_rows:
        raise ValueError(
            "`validation_share` must leave rows to train on. Got "
            f"validation_share={share} of {num_rows} rows."
        )
    # equal in every run on these rows: none is trained on where a run is continued
    groups = equal_rows(*(np.asarray(part) for part in jax.tree.leaves(rows)))
    order = np.random.default_rng(0).permutation(groups.max() + 1)
    held_out, train = map(np.sort, split_groups(groups, order, count))
    if not len(train):
        return options, source
    options = replace(
        options,
        validation=repeat_rows(rows.take(held_out)),
        patience=options.patience or PATIENCE,
        validation_share=0.0,
    )
    return options, ArrayDataset(rows.take(train), size)


def equal_rows(*parts: np.ndarray) -> Int[np.ndarray, " rows"]:
    """Return for each row the number of its value, in the order in which they appear.

    Args:
        *parts: arrays of one length, whose rows belong together.

    Example:
        >>> equal_rows(np.array([0.5, 0.1, 0.5, 0.2])).tolist()
        [0, 1, 0, 2]
    """
    numbers: dict[bytes, int] = {}
    keys = (
        b"".join(row.tobytes() for row in rows) for rows in zip(*parts, strict=True)
    )
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], int)


def split_groups(
    groups: Int[np.ndarray, " rows"], order: Int[np.ndarray, " groups"], count: int
) -> tuple[Int[np.ndarray, " held_out"], Int[np.ndarray, " train"]]:
    """Return rows to hold out, ``count`` of them or a few more, and the other rows.

    Groups are never cut: a row that is trained on says nothing of another like it.

    Args:
        groups: the number of each row's group.
        order: the groups in the order in which they are held out.
        count: how many rows to hold out.

    Example:
        >>> groups, order = np.array([0, 1, 0, 2]), np.array([1, 0, 2])
        >>> [rows.tolist() for rows in split_groups(groups, order, 2)]
        [[1, 0, 2], [3]]
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    rows = np.argsort(place[groups], kind="stable")
    ends = np.flatnonzero(np.diff(place[groups[rows]])) + 1  # of the groups
    later = ends[ends >= count]
    cut = int(later[0]) if later.size else len(rows)
    return rows[:cut], rows[cut:]


def repeat_rows(rows: Batch) -> Batch:
    """Return held-out rows, repeated up to about ``VALIDATION_ROWS``.

    Each repetition gets noise of its own, which reduces the variance of the held-out
    loss and of the step at which training stops.

    Example:
        >>> repeat_rows(Batch(np.zeros((300, 1)))).x.shape
        (10200, 1)
    """
    numbers = max(np.size(part[0]) for part in jax.tree.leaves(rows))
    count = min(VALIDATION_ROWS, VALIDATION_NUMBERS // numbers)
    times = max(1, -(-count // len(rows.x)))
    return jax.tree.map(lambda part: np.concatenate([part] * times), rows)
