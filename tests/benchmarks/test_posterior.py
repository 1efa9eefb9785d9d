"""Posteriors of a mixture with the exact score, and with a trained net beside it."""

import pytest

from tests.benchmarks.posterior import main


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:ScoreSDE")  # of few effective particles
def test_exact_score_draws_posteriors_and_evidence():
    rows = main(["--instances", "10", "--methods", "ScoreSDE"])
    for observed, bound in ((4, 0.10), (2, 0.17), (1, 0.40)):
        row = rows[8, observed]
        assert row.distance["ScoreSDE"] < min(bound, 1.8 * row.distance["floor"])
        assert row.evidence["ScoreSDE"] < 0.1


@pytest.mark.slow
@pytest.mark.long
def test_dimension_800_is_right_although_noise_does_not_hide_the_data():
    """The principal axes have twenty times the sd of a coordinate, as the noise has."""
    options = "--dimensions 800 --instances 1 --observed 1 --methods ScoreSDE"
    row = main(options.split())[800, 1]
    assert row.distance["ScoreSDE"] < 1.5 * row.distance["floor"]
    assert row.evidence["ScoreSDE"] < 0.1


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:ScoreSDE")  # of few effective particles
def test_net_draws_posteriors_nearly_as_well_as_the_exact_score():
    options = "--trained --known-score --num-steps 7000 --instances 5 --observed 4"
    row = main(options.split())[8, 4]
    assert row.net < 2 * row.exact
    assert row.exact < 2 * row.floor
