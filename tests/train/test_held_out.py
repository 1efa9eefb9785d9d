"""Rows that a run holds out by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_score import MLP, ScoreMatching
from numpyro_score.data.rows import ArrayDataset, Batch, IterableDataset
from numpyro_score.train.fit import FitOptions
from numpyro_score.train.held_out import hold_out_rows, repeat_rows

KEY = jax.random.key(0)
ROWS = jax.random.normal(KEY, (200, 4))
TRAINER = ScoreMatching(MLP(4, width=16, depth=1))


def source_of(num_rows, size=50):
    x = jnp.arange(num_rows * 2.0).reshape(num_rows, 2)
    return ArrayDataset(Batch(x, context=-x), size)


@pytest.mark.parametrize("share", [None, 0.3])
def test_each_row_is_held_out_or_trained_on(share):
    options = FitOptions(800, validation_share=share)
    options, source = hold_out_rows(options, source_of(200))
    held_out, train = np.unique(options.validation.x[:, 0]), source.rows.x[:, 0]
    assert len(held_out) == (20 if share is None else 60)
    both = np.concatenate([held_out, train])
    np.testing.assert_array_equal(np.sort(both), 2 * np.arange(200))
    np.testing.assert_array_equal(source.rows.context, -source.rows.x)
    np.testing.assert_array_equal(options.validation.context, -options.validation.x)
    assert (options.patience, options.validation_share) == (10, 0.0)


def test_equal_rows_are_held_out_together():
    """As in a bootstrap sample, where a net could know held-out rows by heart."""
    x = jnp.tile(jnp.arange(100.0)[:, None], (5, 2))
    options = FitOptions(2000, validation_share=0.1)
    options, source = hold_out_rows(options, ArrayDataset(Batch(x), 50))
    held_out, train = (np.unique(rows.x) for rows in (options.validation, source.rows))
    assert len(held_out) == 10
    assert not set(held_out) & set(train)
    assert len(source.rows.x) == 450


def test_rows_of_one_value_are_not_held_out():
    source = ArrayDataset(Batch(jnp.ones((200, 2))), 50)
    options = FitOptions(2000, validation_share=0.1)
    assert hold_out_rows(options, source) == (options, source)


@pytest.mark.parametrize(
    ("num_steps", "num_rows", "share", "held_out"),
    [
        (800, 200, None, True),
        (799, 200, None, False),  # 200 times 200 rows are 800 steps of 50
        (10_000, 94, None, False),  # nine rows tell nothing
        (800, 200, 0.0, False),
        (1, 200, 0.1, True),
    ],
)
def test_when_rows_are_held_out(num_steps, num_rows, share, held_out):
    options = FitOptions(num_steps, validation_share=share)
    found, source = hold_out_rows(options, source_of(num_rows))
    assert (found.validation is not None) == held_out
    assert (len(source.rows.x) < num_rows) == held_out


def test_a_batch_of_all_rows_is_one_of_those_that_are_left():
    _, source = hold_out_rows(
        FitOptions(800, validation_share=None), source_of(100, 100)
    )
    assert source.batch_size == 90


def test_batches_still_split_into_equal_parts():
    trainer = ScoreMatching(MLP(4, width=8, depth=1), accumulate=8)
    result = trainer.run(KEY, 200, ROWS, progress_bar=False)
    assert result.validation_losses is not None
    options = FitOptions(800, validation_share=None, accumulate=100)
    assert hold_out_rows(options, source_of(100, 100))[0] is options


def test_shares_of_less_than_one_row():
    options = FitOptions(8, validation_share=0.001)
    assert hold_out_rows(options, source_of(200))[0] is options
    with pytest.raises(ValueError, match="must leave rows to train on"):
        hold_out_rows(FitOptions(8, validation_share=0.999), source_of(200))


def test_given_rows_and_iterators_are_left_alone():
    given = FitOptions(800, validation=Batch(ROWS), validation_share=None)
    assert hold_out_rows(given, source_of(200))[0] is given
    stream = IterableDataset([np.ones((4, 2))])
    options = FitOptions(800, validation_share=None)
    assert hold_out_rows(options, stream) == (options, stream)
    with pytest.raises(ValueError, match="`validation_share` needs data in an array"):
        hold_out_rows(FitOptions(800, validation_share=0.1), stream)


def test_repeated_rows_have_no_remainder():
    x = np.arange(30.0).reshape(10, 3)
    repeated = repeat_rows(Batch(x, context=x)).context
    assert (np.unique(repeated[:, 0], return_counts=True)[1] == 1000).all()


@pytest.mark.parametrize("share", [-0.1, 1.0, np.nan, True])
def test_wrong_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"`validation_share` must lie in \[0, 1\)"):
        TRAINER.run(KEY, 2, ROWS, validation_share=share, progress_bar=False)


def test_a_share_beside_validation_is_refused():
    with pytest.raises(ValueError, match="give it or `validation`, not both"):
        TRAINER.run(KEY, 2, ROWS, validation=ROWS, validation_share=0.1)


def test_few_rows_are_not_overfitted():
    """The loss of other rows is lower than with all rows and steps."""
    trainer = ScoreMatching(MLP(4))
    rows, fresh = ROWS[:100], jax.random.normal(jax.random.key(1), (4000, 4))
    losses = []
    for share in (None, 0.0):
        result = trainer.run(
            KEY, 1500, rows, validation_share=share, progress_bar=False
        )
        assert (result.validation_losses is None) == (share == 0.0)
        params = result.score.denoiser.params
        state = result.state._replace(ema_params=params)
        losses.append(float(trainer.evaluate(state, fresh)))
    assert losses[0] < 0.97 * losses[1]
