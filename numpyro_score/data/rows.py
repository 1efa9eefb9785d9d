"""Sources of training batches: an array on the device, or an iterator."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from numpyro_score.checks import check_count, check_integer
from numpyro_score.data.inputs import (
    check_resolution,
    column_names,
    is_table,
    read_rows,
    warn_without_density,
)
from numpyro_score.typing import PRNGKey

# rows per step, or all if fewer; more: less noise, fewer steps; not tuned
BATCH_SIZE = 256
BLOCK_BYTES = 2**26  # 64 MiB: bound on the batches of an iterator on the device


class Batch(NamedTuple):
    """Rows of data, with the context and the data score of each row.

    - **x**: data of shape ``(rows, *event_shape)``, in physical units.
    - **context**: values that each row is conditioned on, or None.
    - **data_score**: gradient of the log density of the data at each row, in inverse
      physical units, or None.
    - **known**: True where a number of ``x`` is known, of the shape of ``x``, and False
      where it was drawn given the others; None for all. For denoising score matching
      with one noise level per coordinate.

    Example:
        >>> Batch(np.zeros((4, 2)), context=np.ones((4, 1))).context.shape
        (4, 1)
    """

    x: Any
    context: Any = None
    data_score: Any = None
    known: Any = None

    def take(self, index: Any) -> "Batch":
        """Return some of the rows.

        Args:
            index: their numbers, or a slice.
        """
        return jax.tree.map(lambda part: part[index], self)


def evenly_spaced(count: int, most: int) -> Int[np.ndarray, " chosen"]:
    """Return the indices of so many rows, both ends among them, or of all if fewer.

    Args:
        count: number of rows.
        most: number of indices at most.

    Example:
        >>> evenly_spaced(9, 3).tolist(), evenly_spaced(2, 3).tolist()
        ([0, 4, 8], [0, 1])
    """
    return np.linspace(0, count - 1, min(count, most)).astype(int)


def check_batch(
    rows: Batch, name: str = "data", event_shape: tuple[int, ...] | None = None
) -> Batch:
    """Return the batch as floating-point arrays with the same number of rows.

    Args:
        rows: the batch.
        name: name of the data in error messages.
        event_shape: shape that each row of ``x`` must have; None for any.

    Raises:
        TypeError: if ``known`` holds anything but truth values.
        ValueError: as :func:`check_data`, and for parts of other lengths or shapes.
    """
    x = check_data(rows.x, name, event_shape)
    context, data_score = rows.context, rows.data_score
    if context is not None:
        context = check_data(context, f"{name}'s context")
    if data_score is not None:
        data_score = check_data(data_score, f"{name}'s data_score", x.shape[1:])
    for part, values in (("context", context), ("data_score", data_score)):
        if values is not None and len(values) != len(x):
            raise ValueError(
                f"`{part}` must have one row per row of `{name}`: row i belongs to "
                f"row i. Got {len(values)} rows for {len(x)}."
            )
    return Batch(x, context, data_score, _check_known(rows.known, x))


def _check_known(known: Any, x: Array) -> Array | None:
    """Return which numbers are known as an array, or None for all."""
    if known is None:
        return None
    known = jnp.asarray(known)
    if known.dtype != bool:
        raise TypeError(
            "`known` must hold truth values: whether each number of the data is "
            f"known. Got dtype {known.dtype}."
        )
    if known.shape != x.shape:
        raise ValueError(
            "`known` must have the shape of the data: one truth value for each "
            f"number. Got {known.shape}, data {x.shape}."
        )
    return known


def check_data(
    data: Any, name: str = "data", event_shape: tuple[int, ...] | None = None
) -> Array:
    """Return data as a floating-point array with one datum per row.

    Args:
        data: the data.
        name: name of the data in error messages.
        event_shape: shape that each row must have; None for any.

    Raises:
        ValueError: as :func:`~numpyro_score.data.inputs.read_rows`, and for no rows,
            another event shape, or numbers that are not finite.
    """
    data = read_rows(name, data)
    if event_shape is not None and data.shape[1:] != event_shape:
        raise ValueError(
            f"`{name}` must have rows of the shape that the net was trained for. "
            f"Got {data.shape[1:]}, expected {event_shape}."
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf
        data = data.astype(jnp.result_type(float))
    bad = np.flatnonzero(~np.isfinite(data).reshape(len(data), -1).all(1))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite: a score cannot be learned from NaN or inf. "
            f"Drop or fill these rows first. Got {len(bad)} bad rows of {len(data)}, "
            f"the first at {bad[:5].tolist()}."
        )
    return jnp.asarray(data)


def check_training_data(
    rows: Batch, event_shape: tuple[int, ...] | None = None
) -> Batch:
    """Return rows to train on as :func:`check_batch` does, after a look at columns.

    Args:
        rows: the data, with all rows that the scales are computed from.
        event_shape: shape that each row must have; None for any.

    Raises:
        ValueError: as :func:`check_batch`, and for columns that float32 does not
            resolve.
    """
    checked = check_batch(rows, event_shape=event_shape)
    for name, part in (("data", rows.x), ("context", rows.context)):
        if part is not None:
            values = read_rows(name, part)
            names = column_names(part, values)
            check_resolution(name, values, names)
            if name == "data":
                warn_without_density(values, names)
    return checked


def check_counts(num_steps: int, batch_size: int, num_rows: int) -> None:
    """Raise unless ``num_steps`` >= 1 and 1 <= ``batch_size`` <= ``num_rows``.

    Raises:
        ValueError: for numbers that are not integers, or out of range.
    """
    check_count("num_steps", num_steps, "the length of the run")
    check_integer("batch_size", batch_size, "the number of rows of a batch")
    if not 1 <= batch_size <= num_rows:
        raise ValueError(
            "`batch_size` must lie between 1 and the number of rows: a batch is drawn "
            f"from the data. Got batch_size={batch_size}, {num_rows} rows."
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ArrayDataset:
    """Rows on the device, from which batches are drawn with replacement."""

    rows: Batch
    batch_size: int = field(metadata={"static": True})

    def batch(self, i: Array, key: PRNGKey) -> Batch:
        """Return a random batch; the step ``i`` has no influence."""
        chosen = jax.random.randint(key, (self.batch_size,), 0, len(self.rows.x))
        return self.rows.take(chosen)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StackedBatches:
    """Batches of one block, stacked along a leading axis."""

    batches: Batch

    def batch(self, i: Array, key: PRNGKey) -> Batch:
        """Return batch i of the block."""
        return self.batches.take(i)


class IterableDataset:
    """Batches from an iterable, checked and stacked block by block.

    An item is an array of rows, or a :class:`Batch` of arrays; all items must have
    equal shapes. For data that do not fit into memory.

    Args:
        batches: the iterable; it should not end before training does.

    Example:
        >>> stream = IterableDataset(iter([np.zeros((4, 2))] * 3))
        >>> stream.take(2).x.shape
        (2, 4, 2)
    """

    def __init__(self, batches: Iterable) -> None:
        self.iterator: Iterator = iter(batches)
        self._buffer: list[Batch] = []
        self.shapes: Any = None

    def peek(self, count: int = 1) -> Batch:
        """Return the rows of the next ``count`` batches without consuming them.

        Raises:
            ValueError: if there is none.
        """
        self._buffer += self._next(count - len(self._buffer))
        if not self._buffer:
            raise ValueError(
                "`data` must yield at least one batch: an iterator that has ended "
                "cannot be trained on. Got none."
            )
        return jax.tree.map(lambda *parts: np.concatenate(parts), *self._buffer)

    def skip(self, count: int) -> None:
        """Consume ``count`` batches unchecked, to continue where a run stopped."""
        dropped = min(count, len(self._buffer))
        del self._buffer[:dropped]
        next(itertools.islice(self.iterator, count - dropped, count - dropped), None)

    def take(self, count: int) -> Batch:
        """Return the next ``count`` batches stacked; fewer if the iterator ends."""
        batches = self._buffer + self._next(count - len(self._buffer))
        self._buffer = []
        if not batches:
            return Batch(np.zeros(0))
        return jax.tree.map(lambda *parts: np.stack(parts), *batches)

    def block(self, longest: int) -> int:
        """Return the number of batches per block: at most ``longest``, in 64 MiB."""
        size = sum(part.nbytes for part in jax.tree.leaves(self.peek()))
        return max(1, min(longest, BLOCK_BYTES // size))

    def _next(self, count: int) -> list[Batch]:
        items = itertools.islice(self.iterator, max(0, count))
        return [self._check(item) for item in items]

    def _check(self, item: Any) -> Batch:
        rows = check_batch(item if isinstance(item, Batch) else Batch(item), "batch")
        shapes = jax.tree.map(jnp.shape, rows)
        self.shapes = shapes if self.shapes is None else self.shapes
        if shapes != self.shapes:
            raise ValueError(
                "`data` must yield batches of equal shapes: one program runs them all. "
                f"Drop the last, smaller batch. Got {tuple(shapes)}, expected "
                f"{tuple(self.shapes)}."
            )
        return jax.tree.map(np.asarray, rows)


def make_dataset(
    data: Any,
    context: ArrayLike | None,
    data_score: ArrayLike | None,
    known: ArrayLike | None = None,
    *,
    num_steps: int,
    batch_size: int | None,
    longest_block: int,
    event_shape: tuple[int, ...] | None = None,
) -> tuple[ArrayDataset | IterableDataset, Batch, int]:
    """Return the source of batches, the rows to standardize by, and steps per block.

    Args:
        data: rows, or an iterable of batches.
        context: context of the rows; None for an iterable.
        data_score: data score of the rows; None for an iterable.
        known: which numbers of the rows are known; None for all and for an iterable.
        num_steps: number of steps of the run.
        batch_size: rows per step; None for 256, or all if there are fewer. An iterable
            brings its own.
        longest_block: largest number of steps per block.
        event_shape: shape that each row must have; None for any.

    Raises:
        ValueError: for bad rows or counts, and for ``context``, ``data_score`` or
            ``known`` beside an iterable.
    """
    if is_table(data) or isinstance(data, list | tuple) or hasattr(data, "__array__"):
        rows = check_training_data(Batch(data, context, data_score, known), event_shape)
        if batch_size is None:
            batch_size = min(BATCH_SIZE, len(rows.x))
        check_counts(num_steps, batch_size, len(rows.x))
        return ArrayDataset(rows, batch_size), rows, longest_block
    if not isinstance(data, Iterable):
        check_data(data)  # raises: neither rows nor batches
    if any(part is not None for part in (context, data_score, known)):
        raise ValueError(
            "`context`, `data_score` and `known` must come with their batch if `data` "
            "is an iterator: let it yield numpyro_score.data.Batch(x, context)."
        )
    stream = IterableDataset(data)
    block = stream.block(longest_block)
    first = check_training_data(stream.peek(block), event_shape)
    check_counts(num_steps, 1, len(first.x))
    return stream, first, block
