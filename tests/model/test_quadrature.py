"""The Gauss-Lobatto rules integrate what they promise, and no more."""

import pytest

from numpyro_score.model.quadrature import embedded_lobatto, lobatto

RULES = [2, 3, 4, 5]


def exact_degree(nodes: tuple[float, ...], weights: tuple[float, ...]) -> int:
    """Return the highest degree up to which all monomials are integrated."""
    degree = 0
    while True:
        terms = zip(nodes, weights, strict=True)
        integral = sum(weight * node**degree for node, weight in terms)
        if abs(integral - 1 / (degree + 1)) > 1e-12:
            return degree - 1
        degree += 1


@pytest.mark.parametrize("num_nodes", RULES)
def test_rule_is_exact_to_its_degree(num_nodes):
    assert exact_degree(*lobatto(num_nodes)) == 2 * num_nodes - 3


@pytest.mark.parametrize("num_nodes", RULES)
def test_rule_is_symmetric_with_the_ends_as_nodes(num_nodes):
    nodes, weights = lobatto(num_nodes)
    assert (nodes[0], nodes[-1]) == (0.0, 1.0)
    assert [1 - node for node in nodes] == pytest.approx(nodes[::-1], abs=1e-15)
    assert weights == pytest.approx(weights[::-1], abs=1e-15)


@pytest.mark.parametrize(("num_nodes", "degree"), [(2, 1), (3, 1), (4, 1), (5, 3)])
def test_coarse_rule_shares_the_nodes(num_nodes, degree):
    nodes, fine, coarse = embedded_lobatto(num_nodes)
    assert (nodes, fine) == lobatto(num_nodes)
    assert exact_degree(nodes, coarse) == degree


def test_mutant_with_equal_weights_is_caught():
    nodes, _ = lobatto(4)
    assert exact_degree(nodes, (0.25,) * 4) < 5


def test_mutant_with_equidistant_nodes_is_caught():
    _, weights = lobatto(4)
    assert exact_degree((0.0, 1 / 3, 2 / 3, 1.0), weights) < 5


@pytest.mark.parametrize("num_nodes", [0, 1, 6])
def test_unknown_rules_are_refused(num_nodes):
    with pytest.raises(ValueError, match=f"`num_nodes` must be .* Got {num_nodes}"):
        lobatto(num_nodes)
