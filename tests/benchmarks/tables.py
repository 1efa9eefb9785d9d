"""Imputation of two real tables by draws: scores, chained equations, a normal copula.

    python -m tests.benchmarks.tables            both tables
    python -m tests.benchmarks.tables diabetes   one

The tables ship with scikit-learn: diabetes (442 rows; age, sex, and 8 measurements)
and wine (178 rows of 13 positive measurements). Of 5 splits, four fifths of the rows
are learned from, in which 10 % of the cells are missing; in the others 30 % of the
cells are hidden and drawn 50 times. Printed are means over hidden cells, with
standard errors over splits: the continuous ranked probability score in units of the
column's sd, the coverage of the central 90 % of draws, and the error of a regression
of the last column on the others, fitted to the completed rows pooled over draws and
tested on the true values of the rows that were learned from, in units of that
column's sd.
"""

import sys
import time
import warnings

import jax
import numpy as np
from numpyro.distributions import constraints
from scipy.stats import norm, rankdata
from sklearn.datasets import load_diabetes, load_wine
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from sklearn.linear_model import LinearRegression

from numpyro_score.data.normal_em import conditional, fit_normal, patterns
from numpyro_score.infer import learn_table

NUM_SPLITS, NUM_DRAWS = 5, 50
MISSING, HIDDEN = 0.1, 0.3


def tables():
    diabetes = load_diabetes(as_frame=True, scaled=False).data
    whole = ["age", "sex"]
    diabetes = diabetes.astype(dict.fromkeys(whole, int))
    positive = {c: constraints.positive for c in diabetes.columns if c not in whole}
    supports = positive | {
        "age": constraints.nonnegative_integer,
        "sex": constraints.integer_interval(1, 2),
    }
    wine = load_wine(as_frame=True).data
    return {
        "diabetes": (diabetes, supports),
        "wine": (wine, dict.fromkeys(wine.columns, constraints.positive)),
    }


def with_missing(rng, frame, share):
    """Return floats with cells removed at random."""
    holes = rng.uniform(size=frame.shape) < share
    return frame.astype(float).mask(holes)


def by_score(seed, learned, hidden, supports):
    table = learn_table(
        jax.random.key(seed),
        as_integers(learned, supports),
        supports=supports,
        progress_bar=False,
    )
    hidden = as_integers(hidden, supports)
    return table.impute_array(jax.random.key(100 + seed), hidden, NUM_DRAWS)


def as_integers(frame, supports):
    whole = [c for c, support in supports.items() if support.is_discrete]
    return frame.astype(dict.fromkeys(whole, "Int64"))


def by_chained_equations(seed, learned, hidden, supports):
    """Bayesian ridge regression of each column on the others, with posterior draws."""
    draws = []
    for index in range(NUM_DRAWS):
        imputer = IterativeImputer(
            sample_posterior=True, random_state=1000 * seed + index, max_iter=10
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            draws.append(imputer.fit(learned).transform(hidden))
    return np.stack(draws)


def by_normal_copula(seed, learned, hidden, supports):
    """Normal scores of each column, a normal law by EM, quantiles of the column."""
    rng = np.random.default_rng(seed)
    learned, hidden = learned.to_numpy(), hidden.to_numpy()
    known = [np.sort(c[~np.isnan(c)]) for c in learned.T]
    scores = np.full_like(learned, np.nan)
    z = np.full_like(hidden, np.nan)
    for i, column in enumerate(known):
        grid = norm.ppf((rankdata(column) - 0.5) / len(column))
        seen = ~np.isnan(learned[:, i])
        scores[seen, i] = np.interp(learned[seen, i], column, grid)
        seen = ~np.isnan(hidden[:, i])
        z[seen, i] = np.interp(hidden[seen, i], column, grid)
    mean, covariance = fit_normal(scores)
    draws = np.repeat(hidden[None], NUM_DRAWS, axis=0)
    for members, missing in patterns(z):
        if not missing.any():
            continue
        part, spread = conditional(z[members], missing, mean, covariance)
        noise = rng.multivariate_normal(
            np.zeros(missing.sum()), spread, (NUM_DRAWS, len(part)), method="eigh"
        )
        for j, i in enumerate(np.flatnonzero(missing)):
            share = norm.cdf(part[:, i] + noise[..., j])
            draws[:, members, i] = np.quantile(known[i], share)
    return draws


METHODS = {
    "score": by_score,
    "chained equations": by_chained_equations,
    "normal copula": by_normal_copula,
}


def crps(draws, truth):
    """Return the score of an ensemble, unbiased in its size (Ferro 2014)."""
    count = len(draws)
    ordered = np.sort(draws, axis=0)
    weights = 2 * np.arange(1, count + 1) - count - 1
    spread = np.tensordot(weights, ordered, 1) / (count * (count - 1))
    return np.abs(draws - truth).mean(0) - spread


def regression_error(draws, truth):
    """Return the error on other rows of a regression fitted to completed rows."""
    pooled = draws.reshape(-1, draws.shape[-1])
    fit = LinearRegression().fit(pooled[:, :-1], pooled[:, -1])
    error = fit.predict(truth[:, :-1]) - truth[:, -1]
    return np.sqrt(np.square(error).mean())


def judge(seed, frame, supports, method):
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(frame))
    first = 4 * len(frame) // 5
    learned = with_missing(rng, frame.iloc[order[:first]], MISSING)
    truth = frame.iloc[order[first:]].astype(float)
    hidden = with_missing(rng, truth, HIDDEN)
    start = time.monotonic()
    draws = method(seed, learned, hidden, supports)
    took = time.monotonic() - start
    cells = hidden.isna().to_numpy()
    scale = np.broadcast_to(learned.std().to_numpy(), truth.shape)[cells]
    values, drawn = truth.to_numpy()[cells], draws[:, cells]
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    covered = ((values >= low) & (values <= high)).mean()
    others = frame.iloc[order[:first]].to_numpy(float)
    error = regression_error(draws, others) / others[:, -1].std()
    return (crps(drawn, values) / scale).mean(), covered, error, took


def main():
    asked = sys.argv[1:] or list(tables())
    for name in asked:
        frame, supports = tables()[name]
        print(f"{name}: {frame.shape[0]} rows, {frame.shape[1]} columns")
        print(f"{'':18} {'CRPS':>13} {'coverage':>11} {'regression':>13} {'s':>5}")
        for label, method in METHODS.items():
            results = np.array(
                [judge(seed, frame, supports, method) for seed in range(NUM_SPLITS)]
            )
            mean, error = results.mean(0), results.std(0, ddof=1) / NUM_SPLITS**0.5
            print(
                f"{label:18} {mean[0]:.3f} ± {error[0]:.3f} {mean[1]:.2f} ± "
                f"{error[1]:.2f} {mean[2]:.3f} ± {error[2]:.3f} {mean[3]:5.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
