"""The previous-token score on patterns whose score is known."""

import pytest
import torch
from torch.testing import assert_close

from metrics import prev_token_score
from utils import UserError, seeded_generator


def attends_back_by(offset, n):
    """The pattern whose every position attends to the one `offset` before (or to the first)."""
    return torch.eye(n)[(torch.arange(n) - offset).clamp(min=0)]


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_perfect_previous_token_head_scores_one(n):
    assert prev_token_score(attends_back_by(1, n)).item() == 1


@pytest.mark.parametrize("n", [2, 3, 8])
def test_attention_spread_evenly_scores_the_mean_of_one_half_to_one_nth(n):
    uniform = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    wanted = sum(1 / k for k in range(2, n + 1)) / (n - 1)
    assert_close(prev_token_score(uniform).item(), wanted)


def test_attention_to_oneself_or_to_the_next_scores_zero():
    assert prev_token_score(torch.eye(6)).item() == 0
    assert prev_token_score(attends_back_by(1, 6).mT).item() == 0


def test_attention_to_the_one_before_the_previous_scores_only_where_there_is_none():
    assert_close(prev_token_score(attends_back_by(2, 6)).item(), 1 / 5)  # position 1 looks at 0


def test_leading_axes_are_kept_and_each_pattern_is_scored_by_itself():
    patterns = torch.randn(2, 3, 5, 5, generator=seeded_generator(0)).softmax(-1)
    scores = prev_token_score(patterns)
    assert scores.shape == (2, 3)
    for b in range(2):
        for head in range(3):
            wanted = sum(patterns[b, head, i, i - 1] for i in range(1, 5)) / 4
            assert_close(scores[b, head], wanted)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 1, 1), (3, 4), (4, 3)])
def test_patterns_that_have_no_previous_position_are_refused_with_their_shape(shape):
    with pytest.raises(UserError, match=str(list(shape)).replace("[", r"\[")):
        prev_token_score(torch.ones(shape))
