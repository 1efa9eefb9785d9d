"""Fingerprints: equal in another process, other for any other number or program."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import constraints
from numpyro.infer import init_to_value

from numpyro_score import VE, VP
from numpyro_score.fingerprint import (
    checksum,
    describe,
    describe_key,
    digest,
    digest_host_values,
    digest_program,
)

X = jnp.arange(3.0)
TABLE = np.arange(4.0)


@jax.custom_jvp
def gated(x):
    return jax.nn.relu(x)


gated.defjvp(lambda x, dx: (gated(x[0]), dx[0]))


def program(shift, x):
    branch = jax.lax.cond(x.sum() > 0, lambda x: x, lambda x: gated(x) + shift, x)
    total = jax.lax.fori_loop(0, 3, lambda i, c: c + jnp.asarray(TABLE)[i], 0.0)
    host = jax.pure_callback(lambda x: x, x, x)
    return jax.jit(lambda x: x + jnp.asarray(TABLE[:3]))(branch) * total + host


def value(table, x):
    return jax.jit(lambda x: x + jnp.asarray(table))(x)


def shifted(number):
    def shift(x):
        return shift(x[1:]) + number if len(x) > 4 else x + number

    return shift


def call_back(fn, x):
    return jax.pure_callback(lambda x: fn(x), x, x)


OTHER_PROGRAMS = {
    "literal": (lambda x: x + 1.0, lambda x: x + 2.0),
    "constant": (partial(value, np.ones(3)), partial(value, 2 * np.ones(3))),
    "primitive": (jnp.sin, jnp.cos),
    "order": (lambda x: x - x[0], lambda x: x[0] - x),
    "parameter": (lambda x: x**2, lambda x: x**3),
    "inside of a loop": (
        lambda x: jax.lax.fori_loop(0, 2, lambda i, x: x + 1, x),
        lambda x: jax.lax.fori_loop(0, 2, lambda i, x: x + 2, x),
    ),
    "callback": (
        lambda x: jax.pure_callback(lambda x: x + 1, x, x),
        lambda x: jax.pure_callback(lambda x: x + 2, x, x),
    ),
    "callback that closes over a function": (
        partial(call_back, shifted(1.0)),
        partial(call_back, shifted(2.0)),
    ),
    "result": (lambda x: (x, x + 1), lambda x: (x + 1, x)),
    "name of a result": (lambda x: {"a": x, "b": x}, lambda x: {"a": x, "c": x}),
}


@pytest.mark.parametrize("kind", OTHER_PROGRAMS)
def test_other_programs_have_other_digests(kind):
    one, other = OTHER_PROGRAMS[kind]
    assert digest_program(one, X) != digest_program(other, X)
    assert digest_program(one, X) == digest_program(one, X + 1)


def test_shapes_and_dtypes_count():
    assert (
        len({digest_program(jnp.sin, x) for x in (X, X[:2], X.astype("bfloat16"))}) == 3
    )
    trees = [{"a": X}, {"b": X}, {"a": X[None]}, {"a": X.astype(int)}, [X], [X, 1.0]]
    assert len(set(map(digest, trees))) == len(trees)


SETTINGS = [
    VE(),
    VE(0.02),
    VP(),
    constraints.interval(0.0, 1.0),
    constraints.interval(0.0, 2.0),
    init_to_value(values={"x": 1.0}),
    init_to_value(values={"x": 2.0}),
    [("a",), ("b",)],
    float("inf"),
    float("nan"),
    X,
    jax.random.key(0),
    {"a": None},
    shifted(1.0),
    shifted(2.0),
    partial(shifted(1.0)),
    lambda site=None: 1.0,
    lambda site=None: 2.0,
    lambda site=0: 1.0,
    lambda site=None: (lambda: 3.0)(),
    lambda site=None: (lambda: 4.0)(),
    lambda site=None: site in {"one", "other"},
]


def fingerprints():
    digests = [digest_program(partial(program, shift), X) for shift in (1.0, 2.0)]
    return [*digests, *map(str, map(describe, SETTINGS)), digest(SETTINGS[:8])]


def test_another_process_agrees(root):
    # under the name that this module has here: names are part of a fingerprint
    script = f"from {__name__} import *; print(*fingerprints(), sep='\\n')"
    path = os.pathsep.join(map(str, (root, root / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == fingerprints()
    assert len(set(fingerprints())) == len(fingerprints())


def test_values_from_the_host_count():
    """No program shows the numbers of an object that a callback uses."""

    class Net:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, x):
            return self.weight * x

    one, other = (partial(call_back, Net(weight)) for weight in (1.0, 2.0))
    assert digest_program(one, X) == digest_program(other, X)
    assert digest_host_values(one, X) != digest_host_values(other, X)
    near = partial(call_back, Net(1 + 1e-6))
    assert digest_host_values(one, X) == digest_host_values(near, X)
    assert digest_host_values(jnp.sin, X) is None


def test_keys_are_told_apart():
    keys = [jax.random.key(0, impl=impl) for impl in ("rbg", "unsafe_rbg")]
    assert describe_key(keys[0]) != describe_key(keys[1])
    legacy = jax.random.PRNGKey(0)
    assert describe_key(legacy) == describe_key(jax.random.key(0))


def test_functions_are_told_apart_by_all_that_they_are_bound_to():
    """Cells, defaults of both kinds, and the object of a method; not by their place."""

    def make(cell, default, keyword):
        def fn(x, y=default, *, z=keyword):
            return x + y + z + cell

        return fn

    known = describe(make(1.0, 2.0, 3.0))
    assert describe(make(1.0, 2.0, 3.0)) == known
    for other in ((1.5, 2.0, 3.0), (1.0, 2.5, 3.0), (1.0, 2.0, 3.5)):
        assert describe(make(*other)) != known

    @dataclass(frozen=True)
    class Scaled:
        scale: float

        def of(self, x):
            return self.scale * x

    assert describe(Scaled(1.0).of) == describe(Scaled(1.0).of)
    assert describe(Scaled(1.0).of) != describe(Scaled(2.0).of)


@pytest.mark.parametrize(
    "other",
    [
        np.arange(4.0)[::-1].copy(),
        np.array([0.0, 1.0, 2.0, np.nextafter(np.float32(3), np.float32(4))]),
        np.array([0.0, -1.0, 2.0, 3.0]),
        np.arange(5.0),
        np.array([np.nan, 1.0, 2.0, 3.0]),
    ],
)
def test_checksum_tells_arrays_apart_also_where_they_are_traced(other):
    known, traced = checksum(({"y": TABLE}, "text", None)), jax.jit(checksum)
    assert known == traced(({"y": TABLE},))
    assert known != checksum({"y": other}) == traced({"y": other})
    halves, flags = TABLE.astype(jnp.bfloat16), TABLE > 1
    assert len({int(checksum(x)) for x in (TABLE, halves[1:], flags, ~flags)}) == 4
    assert checksum((TABLE, flags)) != checksum((flags, TABLE))
