r"""Whitened residuals whose covariance I is widened to I + B by the latents' own.

For m whitened residuals e with Jacobian J, and the covariance C of x_0 given x_t,
:math:`B = J C J^T`. The solution of :math:`(I + B) s = e`, the quadratic form
:math:`e^T s` and :math:`\log\det(I + B)` are found in an orthonormal basis Q of k
vectors outside of which B counts as zero:

- up to 64 residuals, all of their space;
- more residuals of up to 64 latent numbers, the range of J, which is exact too;
- else the Krylov space of e, of which conjugate gradients find the same solution
  (Rozet et al. 2024, section 3.3), and for the determinant that of a random vector
  (stochastic Lanczos quadrature, Ubaru et al. 2017).

*Rounding.* Where the observation noise is small beside C, B has eigenvalues of 1e10
and more, and s is the small rest of e. It is therefore formed as
:math:`Q^T V (1 + \Lambda)^{-1} V^T Q e`, never as e less a correction, which would
leave an error of machine epsilon times e. Eigenvalues below what rounding resolves,
k epsilon times the largest, are raised to it: a smaller one would claim that residuals
are known exactly in a direction where nothing is known of their covariance.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float

from numpyro_score.typing import SiteValues

# residuals or latents: so many products with J^T, where a Krylov space takes 2
# NUM_KRYLOV but estimates the determinant; not tuned
MAX_DENSE = 64
# products with B of a large system:
# `python -m tests.benchmarks.constants --only krylov`
NUM_KRYLOV = 12
# share of a vector: below 100 float32 roundings nothing is left of it
BREAKDOWN_TOL = 1e-5

Residual = Float[Array, " m"]


class ResidualCovariance(NamedTuple):
    """B as products with its parts; ``curvature`` are further rows of a root of it.

    - **jvp**: J times a change of the sites.
    - **vjp**: J^T times a vector.
    - **covariance**: C times a change of the sites.
    """

    jvp: Callable[[SiteValues], Residual]
    vjp: Callable[[Residual], SiteValues]
    covariance: Callable[[SiteValues], SiteValues]
    curvature: Float[Array, "rows m"]

    def project(
        self, basis: Float[Array, "k m"]
    ) -> tuple[Float[Array, "k k"], Bool[Array, ""]]:
        """Return Q B Q^T for a basis whose vectors are rows, and if Q J is finite."""
        rows = jax.vmap(self.vjp)(basis)
        covered = jax.vmap(self.covariance)(rows)
        curved = basis @ self.curvature.T
        inner = sum(gram(covered[name], rows[name]) for name in rows)
        finite = [jnp.isfinite(leaf).all() for leaf in rows.values()]
        return inner + curved @ curved.T, jnp.stack(finite).all()

    def matvec(self, v: Residual) -> Residual:
        """Return B v."""
        covered = self.covariance(self.vjp(v))
        return self.jvp(covered) + self.curvature.T @ (self.curvature @ v)


class LinearSolution(NamedTuple):
    """s in the range of J, the quadratic form e^T (I + B)^{-1} e, and log det(I + B).

    What of e lies outside of the range of J is left out of ``solution``: products with
    J^T, the only use of it, lose it anyway. ``differentiable`` says whether J is
    finite; if it is and the rest is not, the solve has failed.
    """

    solution: Residual
    quadratic_form: Float[Array, ""]
    log_det: Float[Array, ""]
    differentiable: Bool[Array, ""]


def solve_and_log_det(
    residual: Residual, center: SiteValues, uncertainty: ResidualCovariance
) -> LinearSolution:
    """Return (I + B)^{-1} e, e^T (I + B)^{-1} e and log det(I + B).

    B is symmetric for an exact score; of a net's, the symmetric part is taken, and its
    negative eigenvalues count as zero.

    Args:
        residual: e.
        center: the sites where e was taken, for their shapes.
        uncertainty: B.
    """
    size, (flat, unravel) = len(residual), ravel_pytree(center)
    if size <= MAX_DENSE:
        return _solve(residual, jnp.eye(size), uncertainty)
    if len(flat) <= MAX_DENSE:
        units = jax.vmap(unravel)(jnp.eye(len(flat)))
        columns = jax.vmap(uncertainty.jvp)(units)
        columns = jnp.concatenate([columns, uncertainty.curvature])
        return _solve(residual, jnp.linalg.qr(columns.T)[0].T, uncertainty)
    solved = _solve(residual, _lanczos_basis(residual, uncertainty.matvec), uncertainty)
    # fixed: the twist must be one function of x, which weights compare at two points
    probe = jax.random.rademacher(jax.random.key(0), (size,), residual.dtype)
    inner, _ = uncertainty.project(_lanczos_basis(probe, uncertainty.matvec))
    values, vectors = _eigen(inner)
    log_det = size * jnp.square(vectors[0]) @ jnp.log1p(values)
    return solved._replace(log_det=log_det)


def _lanczos_basis(
    start: Residual, product: Callable[[Residual], Residual]
) -> Float[Array, "k m"]:
    """Return an orthonormal basis of v, Bv, B^2 v, ...; zero where it ends early."""
    count = min(NUM_KRYLOV, len(start))

    def add(j: Array, basis: Array) -> Array:
        new = product(basis[j - 1])
        left = new
        for _ in range(2):  # once more, against rounding
            left = left - basis.T @ (basis @ left)
        norm, before = jnp.linalg.norm(left), jnp.linalg.norm(new)
        real = norm > BREAKDOWN_TOL * before
        return basis.at[j].set(jnp.where(real, left / jnp.where(real, norm, 1.0), 0.0))

    norm = jnp.linalg.norm(start)
    first = start / jnp.where(norm > 0, norm, 1.0)
    basis = jnp.zeros((count, len(start)), start.dtype).at[0].set(first)
    return jax.lax.fori_loop(1, count, add, basis)


def gram(a: Array, b: Array) -> Float[Array, "m m"]:
    """Return the inner products of two lists of arrays."""
    return a.reshape(len(a), -1) @ b.reshape(len(b), -1).T


def _solve(
    residual: Residual, basis: Float[Array, "k m"], uncertainty: ResidualCovariance
) -> LinearSolution:
    """Solve within a basis, outside of which B is zero."""
    inner, differentiable = uncertainty.project(basis)
    values, vectors = _eigen(inner)
    inside = basis @ residual
    part = vectors.T @ inside
    solved = part / (1 + values)
    outside = residual - basis.T @ inside
    return LinearSolution(
        basis.T @ (vectors @ solved),
        jnp.vdot(outside, outside) + jnp.vdot(part, solved),
        jnp.log1p(values).sum(),
        differentiable,
    )


def _eigen(matrix: Float[Array, "k k"]) -> tuple[Array, Array]:
    """Return eigenvalues, at least what rounding resolves of them, and eigenvectors."""
    values, vectors = jnp.linalg.eigh(0.5 * (matrix + matrix.T))
    resolution = len(matrix) * jnp.finfo(matrix.dtype).eps * values.max(initial=0.0)
    return jnp.maximum(values, resolution), vectors
