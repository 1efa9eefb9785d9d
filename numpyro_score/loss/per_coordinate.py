r"""Vectors of noise levels for training: one level per coordinate.

Noise of level r on all coordinates and a Gaussian observation of coordinate i, of sd s,
are together one observation, of level :math:`r s / \sqrt{r^2 + s^2}`. The levels of a
conditional law are therefore r where nothing is observed, and this where something is;
they are what :class:`PerCoordinate` draws.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_score.checks import is_real
from numpyro_score.score.conditioning import joint_level
from numpyro_score.typing import PRNGKey


@dataclass(frozen=True)
class PerCoordinate:
    r"""One noise level per coordinate, so that one net gives every conditional law.

    For ``DenoisingScoreMatching(noise=PerCoordinate())``, after which
    :meth:`ScoreModel.condition <numpyro_score.score.ScoreModel.condition>` conditions
    on any coordinates, exactly or with Gaussian noise (masks as in Gloeckler et al.
    2024, section 3.2). Each row has a level r, of which ``noise_levels`` of the
    objective is the distribution, and belongs to one of three kinds:

    - a share ``equal`` has level r at every coordinate, as without this option;
    - a share ``blocks`` is observed inside or outside of a random interval of
      coordinates; for images of a rectangle, in all channels;
    - in all others each coordinate is observed with a probability that is itself
      uniform on [0, 1].

    A share ``exact`` of the rows is observed without noise, at level 0; the others with
    an sd s that is log-uniform over the levels of the process, for half of them the
    same at all coordinates.

    Args:
        equal: share of rows with equal levels.
        blocks: share of rows with block masks.
        exact: share of observed rows that are observed without noise.

    Raises:
        ValueError: unless the shares lie in [0, 1] and ``equal + blocks`` as well.

    Example:
        >>> levels = PerCoordinate().sample(
        ...     jax.random.key(0), jnp.full(100, 2.0), (3,), 0.01, 20.0
        ... )
        >>> levels.shape, bool((levels <= 2.0).all()), bool((levels == 0.0).any())
        ((100, 3), True, True)
    """

    equal: float = 0.25
    blocks: float = 0.25
    exact: float = 0.5

    def __post_init__(self) -> None:
        shares = self.equal, self.blocks, self.exact
        are_shares = all(is_real(share) and 0 <= share <= 1 for share in shares)
        if not are_shares or self.equal + self.blocks > 1:
            raise ValueError(
                "`equal`, `blocks` and `exact` must lie in [0, 1], and `equal + "
                "blocks` too: they are shares of the rows. "
                f"Got {self.equal}, {self.blocks} and {self.exact}."
            )

    def sample(
        self,
        key: PRNGKey,
        levels: Float[Array, " rows"],
        event_shape: tuple[int, ...],
        sigma_min: float,
        sigma_max: float,
    ) -> Float[Array, "rows *event"]:
        """Return levels per coordinate, at most those of the rows.

        Args:
            key: random key.
            levels: level r of each row.
            event_shape: shape of one row.
            sigma_min: lowest sd of a noisy observation.
            sigma_max: highest sd of an observation.
        """

        def one(key: PRNGKey, level: Array) -> Array:
            key_mask, key_sd = jax.random.split(key)
            observed = self._mask(key_mask, event_shape)
            sd = self._observation_sd(key_sd, event_shape, sigma_min, sigma_max)
            return joint_level(level, jnp.where(observed, sd, jnp.inf))

        return jax.vmap(one)(jax.random.split(key, len(levels)), levels)

    def _mask(
        self, key: PRNGKey, event_shape: tuple[int, ...]
    ) -> Bool[Array, "*event"]:
        """Return where one row is observed, nowhere in rows of equal levels."""
        key_kind, key_share, key_mask, key_block = jax.random.split(key, 4)
        kind = jax.random.uniform(key_kind)
        share = jax.random.uniform(key_share)
        scattered = jax.random.uniform(key_mask, event_shape) < share
        block = _block(key_block, event_shape)
        observed = jnp.where(kind < self.equal + self.blocks, block, scattered)
        return observed & (kind >= self.equal)

    def _observation_sd(
        self,
        key: PRNGKey,
        event_shape: tuple[int, ...],
        sigma_min: float,
        sigma_max: float,
    ) -> Float[Array, "*event"]:
        """Return the sd of the observations of a row: zero, equal, or all different."""
        key_exact, key_same, key_row, key_each = jax.random.split(key, 4)
        is_same = jax.random.bernoulli(key_same)
        u_row, u_each = (
            jax.random.uniform(key_row),
            jax.random.uniform(key_each, event_shape),
        )
        u = jnp.where(is_same, u_row, u_each)
        sd = sigma_min * (sigma_max / sigma_min) ** u
        return jnp.where(jax.random.uniform(key_exact) < self.exact, 0.0, sd)


def _block(key: PRNGKey, event_shape: tuple[int, ...]) -> Bool[Array, "*event"]:
    """Return True inside a random interval or rectangle, or outside of it.

    Axes after the second, such as the channels of an image, belong to a block whole.
    """
    key_side, key_axes = jax.random.split(key)
    inside = jnp.ones(event_shape, bool)
    keys = jax.random.split(key_axes, 2)
    for axis, (key_axis, length) in enumerate(zip(keys, event_shape, strict=False)):
        ends = jnp.sort(jax.random.randint(key_axis, (2,), 0, length))
        index = jnp.arange(length).reshape(-1, *[1] * (len(event_shape) - axis - 1))
        inside &= (index >= ends[0]) & (index <= ends[1])
    return inside ^ jax.random.bernoulli(key_side)
