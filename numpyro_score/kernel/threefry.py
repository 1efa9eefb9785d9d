r"""Random numbers of a transition: one counter-based hash, all in one compiled loop.

The hash is Threefry-2x32 with 20 rounds (Salmon et al. 2011), as in JAX, but written
without a loop, so that XLA fuses it with what uses the numbers: in small models the
numbers of ``jax.random`` cost more than all else.

A transition owns its key: the words of the key are hashed with the counters
(element, step), and the last step number is set aside for the next key and for the
accept step.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32
from numpyro.util import is_prng_key

from numpyro_score.typing import PRNGKey

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # Salmon et al. 2011, table 3
PARITY = np.uint32(0x1BD11BDA)  # of the key schedule, as in their Random123 library
RESERVED_COUNTER = np.uint32(0xFFFFFFFF)  # the step number of no step

Word = UInt32[Array, "*batch"]
Words = tuple[Word, Word]


def threefry2x32(words: Words, first: Any, second: Any) -> tuple[Array, Array]:
    """Return two random words for each pair of counters, which broadcast.

    Args:
        words: the key.
        first: counter, unsigned 32-bit integers.
        second: counter, unsigned 32-bit integers.

    Example:
        >>> zero = jnp.zeros((), jnp.uint32)
        >>> a, b = threefry2x32((zero, zero), zero, zero)
        >>> hex(a), hex(b)
        ('0x6b200159', '0x99ba4efe')
    """
    schedule = (*words, words[0] ^ words[1] ^ PARITY)
    a, b = first + schedule[0], second + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            a = a + b
            b = a ^ ((b << np.uint32(rotation)) | (b >> np.uint32(32 - rotation)))
        a = a + schedule[(group + 1) % 3]
        b = b + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return a, b


def next_key_and_words(rng_key: PRNGKey) -> tuple[PRNGKey, Words]:
    """Return the key of the next transition, and the words of this one's numbers.

    A batch of keys gives both for each.

    Example:
        >>> key, words = next_key_and_words(jax.random.key(0))
        >>> bool(key == jax.random.key(0))
        False
    """
    if str(jax.random.key_impl(rng_key)) != "threefry2x32":
        split = jax.random.split
        if not is_prng_key(rng_key):
            split = jax.vmap(split, out_axes=1)
        rng_key, key = split(rng_key)
        draw = partial(jax.random.bits, shape=(2,), dtype=jnp.uint32)
        bits = draw(key) if is_prng_key(key) else jax.vmap(draw)(key)
        return rng_key, (bits[..., 0], bits[..., 1])
    typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(rng_key) if typed else rng_key
    words = data[..., 0], data[..., 1]
    zero = jnp.zeros_like(words[0])
    following = jnp.stack(threefry2x32(words, zero, RESERVED_COUNTER), axis=-1)
    if typed:
        following = jax.random.wrap_key_data(following, impl="threefry2x32")
    return following, words


def uniform(words: Words) -> Float[Array, "*batch"]:
    """Return a number of U(0, 1), which is neither 0 nor, but for rounding, 1.

    Example:
        >>> bool(0 < uniform(next_key_and_words(jax.random.key(0))[1]) < 1)
        True
    """
    one = jnp.ones_like(words[0])
    return _fraction(
        *threefry2x32(words, one, RESERVED_COUNTER), dtype=jnp.zeros(()).dtype
    )


def standard_normal(
    words: Words, step: Any, size: int, dtype: Any
) -> Float[Array, "size *batch"]:
    r"""Return independent N(0, 1) noise by the transform of Box and Muller (1958).

    :math:`\sqrt{-2 \ln u_1}\, (\cos 2\pi u_2, \sin 2\pi u_2)` is a pair of them.

    Args:
        words: of the transition, or of a batch of them.
        step: number of the step, which no other noise of the transition shares.
        size: how many.
        dtype: of the noise, a floating one.

    Example:
        >>> _, words = next_key_and_words(jax.random.key(0))
        >>> noise = standard_normal(words, 0, 3001, float)
        >>> noise.shape, bool(abs(noise.std() - 1) < 0.05)
        ((3001,), True)
    """
    half = (size + 1) // 2
    index = jax.lax.iota(jnp.uint32, half).reshape(-1, *[1] * words[0].ndim)
    step = jnp.asarray(step, jnp.uint32)
    a, b = threefry2x32(words, index, step)
    # double precision takes another 32 bits for both
    more = (a, b)
    if dtype == jnp.float64:
        more = threefry2x32(words, index + np.uint32(half), step)
    radius = jnp.sqrt(-2 * jnp.log(_fraction(a, more[0], dtype)))
    cos, sin = _circle(_fraction(b, more[1], dtype) - 0.5)
    return jnp.concatenate([radius * cos, radius * sin])[:size].astype(dtype)


def _fraction(word: Array, more: Array, dtype: Any) -> Array:
    """Return (word + 1/2) / 2^32; in double precision ``more`` fills up the digits."""
    if dtype == jnp.float64:
        return (word + (more + 0.5) * 2.0**-32) * 2.0**-32
    return (word.astype(jnp.float32) + np.float32(0.5)) * np.float32(2.0**-32)


def _circle(turn: Float[Array, "..."]) -> tuple[Array, Array]:
    r"""Return cosine and sine of :math:`2\pi` turn, for a turn in [-1/2, 1/2].

    In single precision by Taylor polynomials on a quarter turn to each side, which XLA
    turns into vector instructions, unlike its own sine.
    """
    if turn.dtype == jnp.float64:
        return jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)
    half_turns = jnp.round(2 * turn)
    angle = 2 * jnp.pi * (turn - 0.5 * half_turns)
    sign = 1 - 2 * jnp.abs(half_turns)
    square = jnp.square(angle)
    cos = jnp.zeros_like(angle)
    sin = jnp.zeros_like(angle)
    # at a quarter turn the first terms left out are 7e-9 and 6e-8
    for k in range(6, -1, -1):
        cos = cos * square + (-1) ** k / math.factorial(2 * k)
    for k in range(5, -1, -1):
        sin = sin * square + (-1) ** k / math.factorial(2 * k + 1)
    return sign * cos, sign * angle * sin
