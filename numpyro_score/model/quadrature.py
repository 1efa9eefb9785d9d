"""Gauss-Lobatto quadrature on the unit interval."""


def lobatto(num_nodes: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return nodes and weights of Gauss-Lobatto quadrature on [0, 1].

    The rule with n nodes is exact for polynomials of degree 2n - 3 (Abramowitz and
    Stegun 1964, eq. 25.4.32). Its nodes are symmetric, so the integral of a function
    along a segment changes only its sign when the ends are exchanged.

    Raises:
        ValueError: unless there are 2 to 5 nodes.

    Example:
        >>> lobatto(3)[0]
        (0.0, 0.5, 1.0)
    """
    if num_nodes not in _LOBATTO:
        raise ValueError(
            "`num_nodes` must be 2, 3, 4 or 5: the Gauss-Lobatto rules for the "
            f"line integral of a score. Got {num_nodes}."
        )
    nodes, weights = _LOBATTO[num_nodes]
    return tuple(0.5 * (1 + x) for x in nodes), tuple(0.5 * w for w in weights)


def embedded_lobatto(
    num_nodes: int,
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Return nodes, weights, and the weights of a coarser rule on the same nodes.

    The coarser rule is the trapezoidal rule for 3 and 4 nodes and Simpson's rule for 5;
    its weights at other nodes are 0. For 2 nodes it is the rule itself. The difference
    of the two integrals estimates the quadrature error.

    Example:
        >>> embedded_lobatto(3)[2]
        (0.5, 0.0, 0.5)
    """
    nodes, fine = lobatto(num_nodes)
    coarse = [0.0] * num_nodes
    inner = lobatto(3 if num_nodes == 5 else 2)[1]
    stride = (num_nodes - 1) // (len(inner) - 1)
    coarse[::stride] = inner
    return nodes, fine, tuple(coarse)


# inner nodes are the roots of the derivative of the Legendre polynomial of degree n - 1
_SQRT_FIFTH, _SQRT_THREE_SEVENTHS = 0.2**0.5, (3 / 7) ** 0.5
_LOBATTO = {
    2: ((-1.0, 1.0), (1.0, 1.0)),
    3: ((-1.0, 0.0, 1.0), (1 / 3, 4 / 3, 1 / 3)),
    4: ((-1.0, -_SQRT_FIFTH, _SQRT_FIFTH, 1.0), (1 / 6, 5 / 6, 5 / 6, 1 / 6)),
    5: (
        (-1.0, -_SQRT_THREE_SEVENTHS, 0.0, _SQRT_THREE_SEVENTHS, 1.0),
        (0.1, 49 / 90, 32 / 45, 49 / 90, 0.1),
    ),
}
