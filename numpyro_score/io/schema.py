"""Checks of a header against its arrays, before anything is built from it.

A header with right hashes may have been written by another program. Every entry has a
type and bounds: a class of the package in its place, finite numbers, sizes at most
those of the arrays. Time and memory to build from a header that passes are bounded by
the size of the files.
"""

import dataclasses
import reprlib
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpyro.distributions import constraints

from numpyro_score import nn, sde
from numpyro_score.score import preconditioning

MAX_NESTING = 8  # of configurations and constraints; those of the package need three
MAX_TABLE = 100_000  # betas; published tables have 1000 or 4000
REMEDY = (
    "The file was altered or written by another program: copy the folder again, or "
    "save anew."
)
Classes = Mapping[str, type]


def frozen_classes(module: Any) -> dict[str, type]:
    """Return a module's dataclasses by name.

    Example:
        >>> "MLP" in frozen_classes(nn)
        True
    """
    return {
        name: cls
        for name, cls in vars(module).items()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls)
    }


EMBEDDINGS = {c.__name__: c for c in (nn.SetEmbedding, nn.ConvEmbedding)}
NETS = {n: c for n, c in frozen_classes(nn).items() if n not in EMBEDDINGS}
PROCESSES = {n: c for n, c in frozen_classes(sde).items() if issubclass(c, sde.SDE)}
PARAMETRIZATIONS = frozen_classes(preconditioning)
SOFTNESS = "edge"  # the softness of a support, named as version 0.1.0 wrote it
RENAMED = {  # classes of files saved by version 0.1.0
    "Bounded": "BoundedScore",
    "Clean": "DataPrediction",
    "Flow": "VelocityPrediction",
    "Noise": "NoisePrediction",
    "Score": "ScorePrediction",
    "V": "VPrediction",
}


@dataclass(frozen=True)
class HeaderCheck:
    """Checks of one header beside its arrays; each raises ``ValueError``.

    Args:
        file: the header, for messages.
        num_arrays: number of arrays, which bounds the number of layers.
        num_numbers: number of numbers in them, which bounds all sizes.
    """

    file: Path
    num_arrays: int
    num_numbers: int

    def refuse(self, entry: str, rule: str, got: Any) -> NoReturn:
        """Raise with file, entry, rule and remedy."""
        raise ValueError(
            f"`{entry}` in {self.file} must be {rule}. {REMEDY} "
            f"Got {reprlib.repr(got)}."
        )

    def _refuse_name(
        self, entry: str, kind: str, got: Any, known: list[str]
    ) -> NoReturn:
        raise ValueError(
            f"`{entry}` in {self.file} names a {kind} that has no place there, or that "
            f"the installed version does not have. {REMEDY} Got {str(got)[:60]}; known "
            f"are {', '.join(known)}."
        )

    def keys(self, entry: str, got: Any, names: Mapping[str, bool]) -> None:
        """Check that an object has all required entries and no unknown ones.

        Args:
            entry: name of the object.
            got: the object.
            names: names of entries, and whether they are required.
        """
        if not isinstance(got, dict):
            self.refuse(entry, "an object of JSON", got)
        needed = {name for name, is_needed in names.items() if is_needed}
        if not needed <= set(got) <= set(names):
            rule = f"an object with {sorted(needed)} and nothing but {sorted(names)}"
            self.refuse(entry, rule, sorted(got))

    def flag(self, entry: str, got: Any) -> None:
        """Check that an entry is true or false."""
        if not isinstance(got, bool):
            self.refuse(entry, "true or false", got)

    def text(self, entry: str, got: Any) -> None:
        """Check that an entry is text."""
        if not isinstance(got, str):
            self.refuse(entry, "text", got)

    def number(self, entry: str, got: Any) -> None:
        """Check that an entry is a finite number."""
        if isinstance(got, bool) or not isinstance(got, int | float):
            self.refuse(entry, "a number", got)
        if not abs(got) <= sys.float_info.max:
            self.refuse(entry, "finite", got)

    def count(self, entry: str, got: Any) -> None:
        """Check that an entry is a count within the bounds of the arrays."""
        most = self.num_arrays if entry.endswith(".depth") else self.num_numbers
        if isinstance(got, bool) or not isinstance(got, int) or not 0 <= got <= most:
            rule = f"an integer from 0 to {most}, which is what the arrays hold"
            self.refuse(entry, rule, got)

    def counts(self, entry: str, got: Any) -> None:
        """Check that an entry is a list of counts within the bounds of the arrays."""
        most = self.num_arrays if entry.endswith(".channels") else self.num_numbers
        if not isinstance(got, list) or len(got) > most:
            self.refuse(entry, f"a list of at most {most} integers", got)
        for i, item in enumerate(got):
            self.count(f"{entry}[{i}]", item)

    def numbers(self, entry: str, got: Any) -> None:
        """Check that an entry is a list of finite numbers, of bounded length."""
        if not isinstance(got, list) or len(got) > MAX_TABLE:
            self.refuse(entry, f"a list of at most {MAX_TABLE} numbers", got)
        for i, item in enumerate(got):
            self.number(f"{entry}[{i}]", item)

    def config(self, entry: str, got: Any, classes: Classes, depth: int = 0) -> None:
        """Check that an entry describes one of the classes, with valid fields."""
        self.keys(entry, got, {"class": True, "fields": True})
        name, fields = got["class"], got["fields"]
        cls = classes.get(RENAMED.get(name, name)) if isinstance(name, str) else None
        if cls is None or depth > MAX_NESTING:
            self._refuse_name(f"{entry}.class", "class", name, sorted(classes))
        known = {
            field.name: field.default is field.default_factory is dataclasses.MISSING
            for field in dataclasses.fields(cls)
        }
        self.keys(f"{entry}.fields", fields, known)
        for name, hint in typing.get_type_hints(cls).items():
            if name in fields:
                self._field(f"{entry}.{name}", fields[name], hint, depth)

    def _field(self, entry: str, got: Any, hint: Any, depth: int) -> None:
        """Check a field of a configuration by its annotation."""
        checks = {int: self.count, float: self.number, bool: self.flag}
        if hint in checks:
            checks[hint](entry, got)
        elif hint == tuple[int, ...] | None and got is None:
            return
        elif hint in (tuple[int, ...], tuple[int, ...] | None):
            self.counts(entry, got)
        elif hint == tuple[float, ...]:
            self.numbers(entry, got)
        else:  # the other callables of our nets are nets
            is_embedding = entry.endswith(".embedding")
            classes = EMBEDDINGS if is_embedding else NETS
            self.config(entry, got, classes, depth + 1)

    def net(self, entry: str, got: Any) -> None:
        """Check that an entry describes a net of the package, or names another."""
        if isinstance(got, dict) and "class" not in got:
            self.keys(entry, got, {"name": True})
            self.text(f"{entry}.name", got["name"])
        else:
            self.config(entry, got, NETS)

    def support(self, entry: str, got: Any) -> None:
        """Check that an entry describes a support, or is null."""
        if got is None:
            return
        self.keys(entry, got, {"support": True, SOFTNESS: False})
        if got.get(SOFTNESS) is not None:
            self.number(f"{entry}.{SOFTNESS}", got[SOFTNESS])
        self.constraint(f"{entry}.support", got["support"])

    def constraint(self, entry: str, got: Any, depth: int = 0) -> None:
        """Check that an entry describes a constraint of NumPyro."""
        names = {"constraint": True, "parts": True}
        self.keys(entry, got, names | {"options": False})
        name, parts, options = got["constraint"], got["parts"], got.get("options")
        cls = vars(constraints).get(name) if isinstance(name, str) else None
        is_constraint = isinstance(cls, type) and issubclass(
            cls, constraints.Constraint
        )
        if not is_constraint or depth > MAX_NESTING:
            self._refuse_name(f"{entry}.constraint", "constraint", name, ["NumPyro's"])
        if not isinstance(parts, dict) or not isinstance(options, dict):
            self.refuse(entry, "a constraint with objects as parts and options", got)
        given = sorted([*parts, *(k.removeprefix("_") for k in options)])
        if given != sorted(_arguments(cls)):
            self.refuse(entry, f"a constraint with {_arguments(cls)}", given)
        self._constraint_parts(entry, parts, options, depth)

    def _constraint_parts(
        self, entry: str, parts: dict[str, Any], options: dict[str, Any], depth: int
    ) -> None:
        for name, option in options.items():
            self.count(f"{entry}.{name}", option)
        for name, part in parts.items():
            if name == "base_constraint":
                self.constraint(f"{entry}.{name}", part, depth + 1)
            else:
                self.array(f"{entry}.{name}", part)
        if {"lower_bound", "upper_bound"} <= set(parts):
            ends = parts["lower_bound"], parts["upper_bound"]
            if not _is_ordered(*ends):
                self.refuse(entry, "an interval with lower < upper", ends)

    def array(self, entry: str, got: Any) -> None:
        """Check that an entry is a number or a rectangular nested list of numbers."""
        try:
            values = np.asarray(got)
        except (ValueError, RecursionError):
            self.refuse(entry, "an array of numbers", got)
        if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            self.refuse(entry, "an array of finite numbers", got)


# of classes, of NumPyro's constraints, and of JAX for numbers that no array holds
REFUSALS = (
    TypeError,
    ValueError,
    AttributeError,
    NotImplementedError,
    IndexError,
    ArithmeticError,
)


def build(check: HeaderCheck, entry: str, got: Any, build: Callable[[Any], Any]) -> Any:
    """Return the object that a checked entry describes.

    Raises:
        ValueError: with the name of the entry, for fields that its class refuses.
    """
    try:
        return build(got)
    except REFUSALS as error:
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"`{entry}` in {check.file} cannot be built. {REMEDY} Cause: {reason}"
        ) from error


def _is_ordered(lower: Any, upper: Any) -> bool:
    try:
        return bool(np.less(lower, upper).all())
    except ValueError:  # shapes that do not go together
        return False


def _arguments(cls: Any) -> list[str]:
    if cls.__init__ is object.__init__:
        return []
    return [name for name in signature(cls.__init__).parameters if name != "self"]
