"""Seconds of imputing rows with holes: all rows in one program, and row by row.

    python -m tests.benchmarks.imputation

The iris table that ships with scikit-learn: 100 rows are learned from, in the other 50
about 30 % of the cells are hidden, and each row is imputed 200 times. Printed are
seconds of the processor for a first call, which compiles, and for a second one with
another mask, and the share of hidden cells in the central 90 % of their draws. The last
way calls ``condition`` and ``sample`` outside of a compiled function, for 5 rows.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_iris

from numpyro_score import MLP, ScoreMatching
from numpyro_score.loss import DenoisingScoreMatching, PerCoordinate

NUM_DRAWS = 200
ERROR = 0.05  # sd of a known cell, in cm


def ways(score):
    """Return functions of (key, values, mask), and their numbers of rows, by name."""

    def one(key, row, is_known):
        row = jnp.where(is_known, row, jnp.nan)
        return score.condition(row, sd=ERROR).sample(key, (NUM_DRAWS,))

    at_once, alone = jax.jit(jax.vmap(one)), jax.jit(one)

    def by_row(impute):
        def rows(keys, values, mask):
            cells = zip(keys, values, mask, strict=True)
            return np.stack([np.asarray(impute(*row)) for row in cells])

        return rows

    return {
        "one program for all rows": (at_once, 50),
        "one program, row by row": (by_row(alone), 50),
        "not compiled, row by row": (by_row(one), 5),
    }


def main():
    jax.config.update("jax_enable_compilation_cache", False)  # compile, and count it
    rng = np.random.default_rng(0)
    iris = rng.permutation(load_iris().data).astype("f4")
    loss = DenoisingScoreMatching(noise=PerCoordinate())
    trainer = ScoreMatching(MLP(4, width=32), loss=loss)
    score = trainer.run(jax.random.key(0), 1000, iris[:100], progress_bar=False).score
    for name, (impute, num_rows) in ways(score).items():
        values = iris[100 : 100 + num_rows]
        keys = jax.random.split(jax.random.key(1), num_rows)
        for call in ("first", "second"):
            mask = rng.uniform(size=values.shape) > 0.3
            start = time.process_time()
            draws = np.asarray(impute(keys, np.where(mask, values, 0.0), mask))
            seconds = time.process_time() - start
            low, high = np.quantile(draws, [0.05, 0.95], axis=1)
            inside = ((low <= values) & (values <= high))[~mask].mean()
            cells = f"{num_rows:4d} rows{seconds:8.2f} s{inside:7.2f} inside"
            print(f"{name:26s}{call:8s}{cells}", flush=True)


if __name__ == "__main__":
    main()
