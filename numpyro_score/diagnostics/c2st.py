r"""Classifier two-sample test (Lopez-Paz and Oquab 2017).

The statistic is the held-out accuracy of a classifier trained on x (label 0) against y
(label 1): 0.5 in expectation for samples of one law, 1 for laws with disjoint supports.
It depends on the classifier as much as on the samples. The two protocols in common use
are therefore classes, and a result holds the protocol that produced it. Compare
accuracies only between equal protocols, numbers of draws and observations.
"""

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from numpyro_score.checks import Points, check_count, check_rows_finite


@runtime_checkable
class C2STProtocol(Protocol):
    """Classifier and cross-validation of a C2ST; a frozen dataclass."""

    num_folds: int
    seed: int

    def classifier(self, size: int) -> Any:
        """Return an untrained scikit-learn classifier of ``size`` features."""


@dataclass(frozen=True)
class MLPProtocol:
    """The protocol of the sbibm benchmark (Lueckmann et al. 2021).

    A multilayer perceptron with two hidden layers of ten times the dimension, ReLU,
    Adam and at most 10,000 epochs. Published tables use 10,000 draws of each sample.

    Args:
        num_folds: folds of the cross-validation; sbibm has 5.
        seed: seed of folds and classifier; sbibm has 1.

    Example:
        >>> MLPProtocol().classifier(2).hidden_layer_sizes
        (20, 20)
    """

    num_folds: int = 5
    seed: int = 1

    def __post_init__(self) -> None:
        check_count("num_folds", self.num_folds, "a number of folds", least=2)
        check_count("seed", self.seed, "a seed", least=0)

    def classifier(self, size: int) -> Any:
        """Return the classifier of ``size`` features."""
        return import_sklearn("neural_network").MLPClassifier(
            activation="relu",
            hidden_layer_sizes=(10 * size, 10 * size),
            max_iter=10_000,
            solver="adam",
            random_state=self.seed,
        )


@dataclass(frozen=True)
class ForestProtocol:
    """The protocol of the sbi toolbox: a random forest of 100 trees, otherwise equal.

    Cheaper than :class:`MLPProtocol` and usually of less power, so that its accuracies
    are nearer 0.5. Do not compare accuracies of the two protocols.

    Args:
        num_folds: folds of the cross-validation.
        seed: seed of folds and classifier.

    Example:
        >>> ForestProtocol().classifier(2).n_estimators
        100
    """

    num_folds: int = 5
    seed: int = 1

    def __post_init__(self) -> None:
        check_count("num_folds", self.num_folds, "a number of folds", least=2)
        check_count("seed", self.seed, "a seed", least=0)

    def classifier(self, size: int) -> Any:
        """Return the classifier; its form does not depend on ``size``."""
        forest = import_sklearn("ensemble").RandomForestClassifier
        return forest(n_estimators=100, random_state=self.seed)


class C2STResult(NamedTuple):
    """Result of :func:`c2st`.

    - **accuracy**: mean held-out accuracy, 0.5 in expectation for equal laws.
    - **folds**: held-out accuracy of each fold.
    - **num_rows**: number of rows of each sample.
    - **protocol**: classifier and cross-validation.
    """

    accuracy: float
    folds: tuple[float, ...]
    num_rows: int
    protocol: C2STProtocol


def c2st(x: Points, y: Points, protocol: C2STProtocol) -> C2STResult:
    """Return the cross-validated accuracy of a classifier of x against y.

    Both are standardized by the mean and standard deviation of x, the reference.

    Args:
        x: draws of the reference law.
        y: as many draws of the law under test.
        protocol: :class:`MLPProtocol` for sbibm's numbers, or :class:`ForestProtocol`.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: for samples of unequal shape, fewer rows than folds, or values that
            are not finite.

    Example:
        >>> import jax
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 200, 1))
        >>> c2st(x, y + 3.0, ForestProtocol()).accuracy > 0.8
        True
    """
    selection = import_sklearn("model_selection")
    first, second = _check_samples(x, y, least=protocol.num_folds)
    first, second = standardize(first, second)
    rows = np.concatenate([first, second])
    labels = np.repeat([0.0, 1.0], [len(first), len(second)])
    folds = selection.KFold(
        protocol.num_folds, shuffle=True, random_state=protocol.seed
    )
    classifier = protocol.classifier(rows.shape[1])
    scores = selection.cross_val_score(
        classifier, rows, labels, cv=folds, scoring="accuracy"
    )
    accuracies = tuple(float(score) for score in scores)
    return C2STResult(float(np.mean(scores)), accuracies, len(first), protocol)


def _check_samples(
    x: Points, y: Points, least: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Return both samples as matrices, one row per draw.

    Raises:
        ValueError: for shapes that differ, too few rows, or values that are not finite.
    """
    for name, rows in {"x": x, "y": y}.items():
        check_rows_finite(name, rows, ": a classifier would find the gaps, not the law")
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape:
        raise ValueError(
            "`x` and `y` must have one shape: with unequal numbers of rows a blind "
            "guess is better than 0.5, and with unequal columns nothing is compared. "
            f"Got {x.shape} and {y.shape}."
        )
    first, second = (rows.reshape(len(rows), -1) for rows in (x, y))
    if len(first) < least:
        raise ValueError(
            f"`x` and `y` must have at least {least} rows: one for each fold. "
            f"Got {len(first)}."
        )
    return first, second


def standardize(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both in float32, by the mean and sd of x (sd 0 counts as 1)."""
    loc, scale = x.mean(axis=0), x.std(axis=0, ddof=1)
    scale = np.where(scale > 0, scale, 1.0)
    first, second = ((rows - loc) / scale for rows in (x, y))
    return first.astype(np.float32), second.astype(np.float32)


def import_sklearn(module: str) -> Any:
    """Return a module of scikit-learn, an optional dependency.

    Raises:
        ImportError: if it is not installed, with the pip command.

    Example:
        >>> import_sklearn("ensemble").__name__
        'sklearn.ensemble'
    """
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "Classifier tests need scikit-learn: pip install 'numpyro_score[examples]'."
        ) from error
