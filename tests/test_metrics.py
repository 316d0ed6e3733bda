"""The scores of heads on patterns whose score is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from metrics import induction_score, prev_token_score
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


def repeats(batch=3, period=5, times=3):
    """[batch, period * times] of tokens that come once in each period."""
    generator = seeded_generator(0)
    rows = torch.stack([torch.randperm(11, generator=generator)[:period] for _ in range(batch)])
    return rows.repeat(1, times)


def test_a_perfect_induction_head_scores_one_and_one_that_is_shifted_by_one_scores_nothing():
    tokens, pos = repeats(), torch.arange(15)
    for shift, expected in ((1, 1.0), (0, 0.0), (2, 0.0)):
        keys = (pos - 5 + shift).clamp(min=0)
        pattern = F.one_hot(keys, 15).float().expand(3, 2, 15, 15)
        torch.testing.assert_close(induction_score(pattern, tokens), torch.full((3, 2), expected))


def test_attention_spread_evenly_scores_the_share_of_keys_that_follow_an_earlier_occurrence():
    uniform = torch.ones(15, 15).tril()
    uniform = (uniform / uniform.sum(-1, keepdim=True)).expand(3, 1, 15, 15)
    expected = sum((1 if query < 10 else 2) / (query + 1) for query in range(5, 15)) / 10
    torch.testing.assert_close(induction_score(uniform, repeats()), torch.full((3, 1), expected))


def test_the_induction_score_equals_the_naive_loop():
    generator = seeded_generator(3)
    tokens = torch.randint(4, (2, 9), generator=generator)
    pattern = torch.randn(6, 2, 3, 9, 9, generator=generator)
    pattern = pattern.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1)
    for row in range(2):
        paid = []
        for query in range(9):
            earlier = [k for k in range(query) if tokens[row, k] == tokens[row, query]]
            if earlier:
                paid.append(sum(pattern[:, row, :, query, k + 1] for k in earlier))
        expected = torch.stack(paid).mean(0)
        torch.testing.assert_close(induction_score(pattern, tokens)[:, row], expected)


def test_where_no_token_comes_twice_there_is_no_induction_score():
    pattern = torch.eye(4).expand(1, 1, 4, 4)
    assert induction_score(pattern, torch.arange(4)[None]).isnan().all()
