"""What a trained net makes of posteriors, beside the exact score."""

import pytest

from tests.benchmarks.posterior import main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ScoreSDE")  # of few effective particles
def test_net_draws_posteriors_nearly_as_well_as_the_exact_score():
    options = "--trained --known-score --num-steps 20000 --instances 5 --observed 4"
    row = main(options.split())[8, 4]
    assert row.net < 2 * row.exact
    assert row.exact < 2 * row.floor
