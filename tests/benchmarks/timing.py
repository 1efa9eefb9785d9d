"""Times of several programs that do the same, taken in turn."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


def take_times(
    runs: Sequence[Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,  # of all threads
) -> np.ndarray:
    """Return seconds of shape (repeats, runs), after a first run that compiles.

    The runs take turns in an order that alternates, so that a busy machine slows all.
    """
    for run in runs:
        jax.block_until_ready(run())
    times = np.empty((repeats, len(runs)))
    for k in range(repeats):
        order = range(len(runs))
        for i in order if k % 2 else reversed(order):
            start = clock()
            jax.block_until_ready(runs[i]())
            times[k, i] = clock() - start
    return times
