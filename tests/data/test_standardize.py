"""The map to the unit scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score.data.standardize import Affine

ROWS = jax.random.normal(jax.random.key(0), (50, 3)) * jnp.array([1.0, 100.0, 1e-3]) + 5


def test_forward_and_inverse_undo_each_other():
    affine = Affine.per_dimension(ROWS)
    units = jax.vmap(affine.forward)(ROWS)
    np.testing.assert_allclose(units.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(units.std(0), 1.0, rtol=1e-3)
    np.testing.assert_allclose(jax.vmap(affine.inverse)(units), ROWS, rtol=1e-5)


def test_log_jacobian_is_that_of_forward():
    affine = Affine.per_dimension(ROWS)
    _, expected = jnp.linalg.slogdet(jax.jacobian(affine.forward)(ROWS[0]))
    np.testing.assert_allclose(affine.log_abs_det_jacobian(), expected, rtol=1e-5)


def test_shared_scale_keeps_the_ratios_of_images():
    affine = Affine.shared(ROWS)
    assert len(set(affine.scale.tolist())) == 1
    units = jax.vmap(affine.forward)(ROWS)
    np.testing.assert_allclose(jnp.mean(units**2), 1.0, rtol=1e-4)
    np.testing.assert_allclose(units.mean(0), 0.0, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
def test_constant_column_is_refused(value):
    """Also where rounding makes the computed standard deviation positive."""
    data = ROWS.at[:, 1].set(value)
    with pytest.raises(ValueError, match=r"vary in every column.*Constant.*\[1\]"):
        Affine.per_dimension(data)


def test_constant_pixel_is_refused_by_position():
    data = jax.random.normal(jax.random.key(1), (9, 2, 2)).at[:, 1, 0].set(0.3)
    with pytest.raises(ValueError, match=r"Constant positions: \[\[1, 0\]\]"):
        Affine.per_dimension(data)


def test_equal_rows_are_refused():
    with pytest.raises(ValueError, match=r"all rows are equal.*Got 7 equal rows"):
        Affine.shared(jnp.full((7, 2, 2), 0.1))


def test_identity_does_nothing():
    affine = Affine.identity((3,))
    np.testing.assert_array_equal(affine.forward(ROWS[0]), ROWS[0])
    assert float(affine.log_abs_det_jacobian()) == 0.0
