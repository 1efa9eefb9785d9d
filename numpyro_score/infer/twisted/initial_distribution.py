r"""The law of a learned site at the highest level, where particles start.

There :math:`x/\alpha` is data plus noise of level s. Where s is many times the data's
standard deviation along all axes, this is the noise; where a principal axis of the data
is as long as s, it is not, and a start as noise would be wrong in silence. The Jacobian
of the denoiser has the eigenvalues :math:`k = l / (l + s^2)` for variances l along the
principal axes of the data (second Tweedie formula), so that

.. math:: q = N(m, s^2 (I - J)^{-1}), \qquad m = (I - J)^{-1} D(0),

is exact for Gaussian data. The leading axes come from subspace iteration, with J
averaged over points. For other data q is a proposal: the start has the log weight

.. math:: \log \frac{p(x)}{q(x)} = \int_0^1 (s_p - s_q)(m + u (x - m)) \cdot (x - m)\,
    du + \text{const}

with the learned score :math:`s_p = (D(x) - x) / s^2`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.handlers import seed, substitute
from numpyro.infer import init_to_sample

from numpyro_score.data.covariance import subspace_iteration
from numpyro_score.infer.twisted.twist import Twist
from numpyro_score.model.denoising import LearnedSites
from numpyro_score.model.distribution import ScoreDistribution
from numpyro_score.model.potential import trace_latents
from numpyro_score.model.trace_checks import without_own_keys
from numpyro_score.solver.base import draw_start
from numpyro_score.typing import PRNGKey, SiteValues, Time

# of the initial law, each NUM_POINTS NUM_ROUNDS derivatives; others have the variance
# of the noise; not tuned
NUM_AXES = 8
# of the subspace iteration, the last for eigenvalues; leaves (k_9 / k_8)^4
NUM_ROUNDS = 5
NUM_POINTS = 8  # over which the Jacobian is averaged: its noise falls by 8^1/2 = 2.8
MAX_SHRINKAGE = 0.95  # of k, for axes of up to (.95 / .05)^1/2 = 4.4 times the noise
# exact for polynomials of degree 15, and so for normal data
NODES, LENGTHS = np.polynomial.legendre.leggauss(8)

Point = Float[Array, " size"]


class InitialGaussian(NamedTuple):
    """The Gaussian q of one site, in standardized units of x/alpha.

    - **level**: the highest noise level s.
    - **mean**: m.
    - **axes**: leading principal axes, as columns.
    - **shrinkage**: their k; all other axes have unit variance.
    """

    level: Float[Array, ""]
    mean: Point
    axes: Float[Array, "size axes"]
    shrinkage: Float[Array, " axes"]

    @classmethod
    def of(cls, law: ScoreDistribution, t: Time) -> "InitialGaussian":
        """Find mean and leading axes of a learned law at a time."""
        level, denoise = law.score.sde.noise_level(t), _denoiser(law, t)
        size = law.score.size
        # fixed: the initial law is one function of the model, in all replicates
        key_points, key_axes = jax.random.split(jax.random.key(0))
        points = draw_start(key_points, (NUM_POINTS, size), level)
        axes = jax.random.normal(key_axes, (size, min(NUM_AXES, size)))

        def mean_jacobian_times(v: Point) -> Point:
            return jax.vmap(lambda x: jax.jvp(denoise, (x,), (v,))[1])(points).mean(0)

        def apply(axes: Array) -> Array:
            return jax.lax.map(mean_jacobian_times, axes.T).T

        axes = subspace_iteration(apply, jnp.linalg.qr(axes)[0], NUM_ROUNDS - 1)
        inner = axes.T @ apply(axes)
        share, vectors = jnp.linalg.eigh(0.5 * (inner + inner.T))
        share, axes = jnp.clip(share, 0.0, MAX_SHRINKAGE), axes @ vectors
        center = denoise(jnp.zeros(size))
        mean = center + axes @ (share / (1 - share) * (center @ axes))
        return cls(level, mean, axes, share)

    @property
    def signal_to_noise(self) -> Float[Array, ""]:
        """The sd of the data along their longest axis, in units of the noise."""
        longest = self.shrinkage.max()
        return jnp.sqrt(longest / (1 - longest))

    def draw(self, key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Draw points of q along the last axis of a shape."""
        noise = jax.random.normal(key, shape)
        rest = jnp.sqrt(1 + self.level**2)
        along = self.level * jax.lax.rsqrt(1 - self.shrinkage) - rest
        return self.mean + rest * noise + (noise @ self.axes * along) @ self.axes.T

    def log_weight(self, law: ScoreDistribution, t: Time, x: Point) -> Array:
        """Return log p - log q at a point, up to a constant."""
        denoise, change = _denoiser(law, t), x - self.mean
        rest = 1 / (1 + self.level**2)
        shares = (self.shrinkage - rest) * (change @ self.axes)
        slope = rest * change + self.axes @ shares

        def integrand(u: Array) -> Array:
            gap = denoise(self.mean + u * change) - self.mean - u * slope
            return gap @ change / self.level**2

        values = jax.lax.map(integrand, jnp.asarray(0.5 + 0.5 * NODES, x.dtype))
        return jnp.asarray(0.5 * LENGTHS, x.dtype) @ values


def _denoiser(law: ScoreDistribution, t: Time) -> Callable[[Point], Point]:
    """Return D of one flat point, in standardized units of x/alpha."""
    score, level = law.score, law.score.sde.noise_level(t)
    return lambda u: score.denoise_standardized(
        u.reshape(score.event_shape), level
    ).reshape(-1)


Starts = dict[str, InitialGaussian]


def initial_gaussians(learned: LearnedSites, t: Time) -> Starts:
    """Return the Gaussian that draws each learned site at the highest level."""
    return {name: InitialGaussian.of(law, t) for name, law in learned.items()}


def max_signal_to_noise(starts: Starts) -> Float[Array, ""]:
    """Return the longest axis of the data, in units of the noise that is to hide it."""
    return jnp.stack([start.signal_to_noise for start in starts.values()]).max()


def sample_initial(key: PRNGKey, twist: Twist, t: Time, starts: Starts) -> SiteValues:
    """Draw u of learned sites at the highest level, and ordinary sites given them."""
    key_learned, key_ordinary = jax.random.split(key)
    u = {}
    for j, (name, law) in enumerate(twist.learned.items()):
        shape = twist.potential.prototype[name].shape
        rows = (*shape[: len(shape) - law.score.event_dim], law.score.size)
        draw = starts[name].draw(jax.random.fold_in(key_learned, j), rows)
        u[name] = draw.reshape(shape)
    if not twist.ordinary:
        return u
    center = twist.denoised_values(u, t)

    def value(site: dict | None) -> Any:
        if site is None or site["name"] not in center:
            return init_to_sample(site)
        return twist.learned[site["name"]].score.constrain(center[site["name"]])

    drawn = seed(without_own_keys(twist.model), key_ordinary)
    model = substitute(drawn, substitute_fn=value)
    z = trace_latents(model, twist.model_args, twist.model_kwargs)
    return {**z, **u}


def initial_log_weight(
    z: SiteValues, learned: LearnedSites, t: Time, starts: Starts
) -> Float[Array, ""]:
    """Return the log density of learned sites under their laws over their start."""
    total = jnp.zeros(())
    for name, law in learned.items():
        start, rows = starts[name], z[name].reshape(-1, law.score.size)
        weights = jax.vmap(lambda x, s=start, a=law: s.log_weight(a, t, x))(rows)
        total = total + weights.sum()
    return total
