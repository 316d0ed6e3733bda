"""The scores of heads on patterns whose score is known."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from losses import next_token_loss
from metrics import (
    Effects,
    EffectsOfTwoRuns,
    Metric,
    as_metric,
    attention_entropy,
    auroc,
    bootstrap_ci,
    copying_score,
    duplicate_token_score,
    holm,
    induction_score,
    kl_divergence,
    logit_diff,
    mean_ranks,
    pearson,
    permutation_pvalue,
    prev_token_score,
    shuffled_orders,
    sink_score,
    spearman,
    target_rank,
    token_ids,
)
from utils import UserError, seeded_generator


def refusal(call):
    """The message of the UserError for an impossible argument."""
    with pytest.raises(UserError) as found:
        call()
    return str(found.value)


def attends_back_by(offset, n):
    """The pattern whose every position attends to the one `offset` before (or to the first)."""
    return torch.eye(n)[(torch.arange(n) - offset).clamp(min=0)]


def uniform_attention(n):
    """The pattern whose every position attends evenly to all that it sees."""
    return torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]


# Scores of patterns


def test_a_perfect_previous_token_head_scores_one_and_a_uniform_one_the_mean_of_1_2_to_1_n():
    for n in (2, 3, 8):
        assert prev_token_score(attends_back_by(1, n)).item() == 1, f"{n} positions"
        wanted = sum(1 / k for k in range(2, n + 1)) / (n - 1)
        assert prev_token_score(uniform_attention(n)).item() == pytest.approx(wanted), n


def test_attention_to_oneself_or_to_the_next_scores_zero():
    assert prev_token_score(torch.eye(6)).item() == 0
    forwards = torch.eye(6)[(torch.arange(6) + 1).clamp(max=5)]
    assert prev_token_score(forwards).item() == 0


def test_attention_two_back_scores_only_at_the_second_position():
    assert_close(prev_token_score(attends_back_by(2, 6)).item(), 1 / 5)  # position 1 looks at 0


def test_leading_axes_are_kept_and_each_pattern_is_scored_by_itself():
    patterns = torch.randn(2, 3, 5, 5, generator=seeded_generator(0)).softmax(-1)
    scores = prev_token_score(patterns)
    assert scores.shape == (2, 3)
    for b in range(2):
        for head in range(3):
            wanted = sum(patterns[b, head, i, i - 1] for i in range(1, 5)) / 4
            assert_close(scores[b, head], wanted)


def test_a_part_of_a_pattern_is_refused_with_its_shape():
    of_all_keys = [(prev_token_score, shape) for shape in [(1, 1), (2, 3, 1, 1), (3, 4), (4, 3)]]
    of_all_keys += [(sink_score, shape) for shape in [(3, 1, 4), (1, 1), (4,)]]
    of_all_keys += [(attention_entropy, shape) for shape in [(2, 3, 1, 4), (4,)]]
    for score, shape in of_all_keys:
        assert str(list(shape)) in refusal(lambda s=score, n=shape: s(torch.ones(n))), score


def test_a_pattern_of_other_tokens_is_refused_with_both_shapes():
    tokens = torch.zeros(2, 7, dtype=torch.long)
    for score in (induction_score, duplicate_token_score):
        assert score(torch.ones(5, 2, 3, 7, 7) / 7, tokens).shape == (5, 2, 3)
        for shape in [(7, 7), (2, 7, 7), (1, 3, 7, 7), (2, 3, 6, 6), (2, 3, 1, 7), (2, 3, 7, 6),
                      (2, 3, 4, 7, 7)]:
            told = refusal(lambda s=score, n=shape: s(torch.ones(n), tokens))
            assert str(list(shape)) in told and "2, head, 7, 7" in told


def test_a_pattern_whose_rows_do_not_sum_to_one_is_refused():
    for pattern in (torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.full((4, 4), math.nan)):
        for score in (prev_token_score, sink_score, attention_entropy):
            assert f"sums to {4 * pattern.max():g}" in refusal(partial(score, pattern))


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
        assert_close(induction_score(pattern, tokens), torch.full((3, 2), expected))


def test_attention_spread_evenly_scores_the_share_of_keys_that_follow_an_earlier_occurrence():
    uniform = uniform_attention(15).expand(3, 1, 15, 15)
    expected = sum((1 if query < 10 else 2) / (query + 1) for query in range(5, 15)) / 10
    assert_close(induction_score(uniform, repeats()), torch.full((3, 1), expected))


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
        assert_close(induction_score(pattern, tokens)[:, row], expected)


def test_without_repeated_tokens_there_is_no_induction_score():
    pattern = torch.eye(4).expand(1, 1, 4, 4)
    assert induction_score(pattern, torch.arange(4)[None]).isnan().all()


def test_the_duplicate_score_counts_the_earlier_occurrences():
    tokens, pos = repeats(), torch.arange(15)
    pattern = F.one_hot((pos - 5).clamp(min=0), 15).float().expand(3, 2, 15, 15)
    assert_close(duplicate_token_score(pattern, tokens), torch.ones(3, 2))
    shifted = F.one_hot((pos - 4).clamp(min=0), 15).float().expand(3, 2, 15, 15)
    assert_close(duplicate_token_score(shifted, tokens), torch.zeros(3, 2))


def test_the_sink_score_counts_the_first_position_for_all_that_have_another_choice():
    assert sink_score(attends_back_by(15, 15)) == 1
    assert_close(sink_score(uniform_attention(15)), (1 / torch.arange(2, 16)).mean())


def test_the_entropy_of_attention_is_zero_for_one_key_and_ln_n_for_n_keys():
    assert attention_entropy(torch.eye(6)).item() == 0
    assert_close(attention_entropy(uniform_attention(6)), torch.arange(1, 7).log().mean())


# Positions, tokens and logits


def test_unknown_tokens_are_refused_with_their_value():
    assert token_ids(10, 2, 11).tolist() == [10, 10] and token_ids([0, 3], 2, 11).tolist() == [0, 3]
    for tokens, told in ((11, "token id 11"), ([3, -1], "token id -1"), ([1, 2, 3], "the 2 rows"),
                         (1.5, "token ids=1.5"), ("d", "'d'"), (["d", "e"], "'d', 'e'")):
        assert told in refusal(lambda tokens=tokens: token_ids(tokens, 2, 11)), tokens
    within = Metric(lambda chosen: chosen[..., 0, 0], tokens=[4, 11])
    assert "4 to 11" in refusal(lambda: within(torch.zeros(2, 5, 11)))


CORRECT, WRONG = torch.tensor([1, 4, 0]), torch.tensor([2, 2, 5])


def cells(seed=0):
    """[cell, cell, batch, pos, d_vocab]."""
    return torch.randn(2, 5, 3, 4, 6, generator=seeded_generator(seed)).double()


def test_metrics_keep_the_cells_of_a_sweep_and_the_mean_is_over_the_batch():
    logits, clean = cells(), cells(1)[0, 0]
    tokens = torch.randint(6, (3, 4), generator=seeded_generator(2))
    for metric in (lambda logits, how: logit_diff(logits, CORRECT, WRONG, reduction=how),
                   lambda logits, how: target_rank(logits, CORRECT, reduction=how).double(),
                   lambda logits, how: kl_divergence(clean, logits, pos=-1, reduction=how),
                   lambda logits, how: next_token_loss(logits, tokens, reduction=how)):
        values = metric(logits, "none")
        assert values.shape == (2, 5, 3)
        assert_close(values[1, 3], metric(logits[1, 3], "none"))
        mean = metric(logits, "mean")
        expected = values.mean(-1) if mean.ndim else values.mean()
        assert_close(mean, expected, check_dtype=False, atol=1e-6, rtol=0)


def test_a_logit_difference_is_a_metric_as_it_is():
    logits = cells()[0, 0]
    assert logit_diff(logits, CORRECT, WRONG).shape == (3,)
    whole = as_metric(lambda logits: logit_diff(logits, CORRECT, WRONG))
    assert_close(whole(logits), Metric.logit_diff(CORRECT, WRONG)(logits))


def test_the_logit_difference_is_antisymmetric_and_ignores_a_shift():
    logits = cells()
    one = logit_diff(logits, CORRECT, WRONG, reduction="none")
    assert_close(one, -logit_diff(logits, WRONG, CORRECT, reduction="none"))
    assert_close(one, logit_diff(logits + 3, CORRECT, WRONG, reduction="none"))
    assert_close(one[1, 2], logits[1, 2, torch.arange(3), -1, CORRECT]
                 - logits[1, 2, torch.arange(3), -1, WRONG])
    log_probs = logits[0, 0].log_softmax(-1)
    assert_close(logit_diff(logits[0, 0], 3, 1, pos=2, reduction="none"),
                 log_probs[:, 2, 3] - log_probs[:, 2, 1])


def test_the_rank_is_that_in_the_sorted_logits():
    logits = cells()[0, 0]
    order = logits[:, -1].argsort(-1, descending=True)
    expected = (order == CORRECT[:, None]).int().argmax(-1)
    assert torch.equal(target_rank(logits, CORRECT), expected)


def test_a_logit_that_is_nan_is_never_the_likeliest():
    logits = cells()[0, 0]
    logits[0, -1], logits[1, -1, CORRECT[1]], logits[2, -1, 3] = math.nan, math.nan, math.nan
    finite = (cells()[0, 0, 2, -1] > logits[2, -1, CORRECT[2]])[[0, 1, 2, 4, 5]].sum().item()
    assert target_rank(logits, CORRECT).tolist() == [6, 6, finite + 1]


def test_kl_is_one_function_whose_first_argument_is_p_wherever_it_is_imported_from():
    import losses
    import metrics
    assert metrics.kl_divergence is losses.kl_divergence
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p, q = sure.softmax(-1), unsure.softmax(-1)
    assert_close(losses.kl_divergence(sure, unsure), (p * (p / q).log()).sum(-1))


# Results


def test_effects_convert_to_their_means():
    values = torch.randn(2, 3, 8, generator=seeded_generator(0))
    effects = Effects(values, ("layer", "head"))
    assert_close(effects.mean, values.mean(-1))
    assert_close(effects[1, 2], values[1, 2].mean())
    assert_close(effects[:, 0], values[:, 0].mean(-1))
    assert np.array_equal(np.asarray(effects), values.mean(-1).numpy())
    assert np.asarray(effects, dtype=np.float64).dtype == np.float64
    assert [row.tolist() for row in effects] == values.mean(-1).tolist() and len(effects) == 2


def test_an_interval_of_effects_encloses_their_mean():
    effects = Effects(torch.randn(4, 40, generator=seeded_generator(1)) + 3, ("head",))
    low, high = effects.ci()
    assert (low < effects.mean).all() and (effects.mean < high).all()
    assert_close(effects.ci(level=0.5, seed=4), bootstrap_ci(effects.values.T, level=0.5, seed=4))


def test_effects_are_normalised_by_the_mean_gap_between_two_runs():
    values, baseline = torch.tensor([[0.0, 1.0], [1.0, 6.0]]), torch.tensor([1.0, 2.0])
    even = EffectsOfTwoRuns(values, ("pos",), baseline, torch.tensor([5.0, 6.0]))
    assert even.normalized().tolist() == [0.125, 0.875]
    uneven = EffectsOfTwoRuns(values, ("pos",), baseline, torch.tensor([6.0, 3.0]))
    assert_close(uneven.normalized(), torch.tensor([0.5 / 3, 3.5 / 3]))  # not a mean of ratios


def test_effects_without_a_target_or_a_gap_have_no_share():
    values, baseline = torch.zeros(1, 2), torch.tensor([1.0, 2.0])
    assert "unknown" in refusal(EffectsOfTwoRuns(values, ("pos",), baseline).normalized)
    same = EffectsOfTwoRuns(values, ("pos",), baseline, baseline.flip(0))
    assert "metric 1.5" in refusal(same.normalized)


def test_an_unknown_reduction_is_refused():
    assert "'sum'" in refusal(lambda: logit_diff(cells(), 1, 2, reduction="sum"))


# Rankings and how sure one is


def test_mean_ranks_count_smaller_values_and_half_of_the_equal_ones():
    generator = seeded_generator(0)
    for values in (torch.randn(6, 50, generator=generator).round(decimals=1), torch.zeros(2, 9),
                   torch.arange(5.0)[None], torch.ones(3, 1), torch.ones(2, 0),
                   torch.randn(2, 3, 7, generator=generator).double()):
        below = (values[..., None, :] < values[..., None]).sum(-1)
        equal = (values[..., None, :] == values[..., None]).sum(-1)
        assert torch.equal(mean_ranks(values), (below + (equal - 1) / 2).to(values))

    ranks = mean_ranks(torch.tensor([3.0, torch.nan, 1.0, 3.0, torch.nan]))
    assert torch.equal(ranks.nan_to_num(-1), torch.tensor([1.5, -1.0, 0.0, 1.5, -1.0]))


def test_rank_correlation_is_that_of_the_ranks_with_ties_shared():
    one = torch.tensor([10.0, 20.0, 20.0, 5.0])  # ranks 1, 2.5, 2.5, 0
    other = torch.tensor([1.0, 3.0, 2.0, 0.0])  # ranks 1, 3, 2, 0
    ranks = torch.tensor([[1, 2.5, 2.5, 0], [1, 3, 2, 0]], dtype=torch.float64)
    assert_close(spearman(one, other), torch.corrcoef(ranks)[0, 1])
    assert_close(spearman(one, one.exp()).item(), 1.0)
    assert_close(spearman(one, -one).item(), -1.0)
    assert_close(pearson(one, other), torch.corrcoef(torch.stack([one, other]).double())[0, 1])


def test_constant_or_missing_values_have_no_correlation():
    one, other = torch.tensor([10.0, 20.0, 20.0, 5.0]), torch.tensor([1.0, 3.0, 2.0, 0.0])
    assert spearman(one, torch.ones(4)).isnan() and pearson(one, torch.ones(4)).isnan()
    holes = torch.tensor([[1.0, math.nan, 2.0, 0.0], [1.0, 3.0, 2.0, 0.0]])
    by_row = spearman(one.expand(2, 4), holes)
    assert by_row[0].isnan() and spearman(holes[0], one).isnan()
    assert_close(by_row[1], spearman(one, other))


def test_a_constant_whose_mean_is_rounded_is_a_constant():
    tenths = torch.full((3,), 0.1, dtype=torch.float64)
    assert (tenths - tenths.mean()).abs().max() > 0, "no rounding to be seen"
    for other in (tenths, torch.arange(3.0)):
        assert pearson(tenths, other).isnan() and pearson(other, tenths).isnan()


def test_an_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = seeded_generator(0)
    for n, least, most in ((40, 0.89, 0.98), (5, 0.79, 0.88)):  # 0.95 less what few values lose
        samples = torch.randn(n, 1000, generator=generator) + 2
        low, high = bootstrap_ci(samples, n_draws=500)
        assert low.shape == high.shape == (1000,)
        share = ((low <= 2) & (2 <= high)).double().mean()
        assert least <= share <= most, f"{share:.3f} of the intervals of {n} values cover the mean"
    assert all(map(torch.equal, bootstrap_ci(samples[:, 0]), bootstrap_ci(samples[:, 0])))


def test_an_interval_draws_as_many_values_as_there_are():
    low, high = bootstrap_ci([0.0, 1.0], level=0.4)  # of two: 0, 1/2, 1/2, 1
    assert low == high == 0.5


def test_a_pvalue_counts_the_draws_that_do_as_well_and_corrects_for_many_heads():
    null = torch.arange(99.0)
    assert_close(permutation_pvalue(95.0, null).item(), 5 / 100)
    assert_close(permutation_pvalue(1000.0, null).item(), 1 / 100)
    by_head = torch.stack([null, null.flip(0), torch.full((99,), 90.0)], 1)
    expected = (1 + sum(max(i, 98 - i, 90) >= 95 for i in range(99))) / 100
    observed = torch.tensor([95.0, 10.0, 99.0])
    assert_close(permutation_pvalue(observed, by_head).tolist(), [expected, 1.0, 0.01])


def test_a_draw_that_differs_only_by_rounding_does_as_well():
    # The mean of three of six numbers: of the 20 choices, the given one alone is the largest.
    values = [0.1, 0.2, 0.3, 0.7, 0.8, 0.9]
    for dtype in (torch.float32, torch.float64):
        numbers = torch.tensor(values, dtype=dtype)
        null = torch.stack([numbers[list(order[:3])].sum() - numbers[list(order[3:])].sum()
                            for order in itertools.permutations(range(6))])
        observed = numbers[3:].sum() - numbers[:3].sum()
        assert len(set(null[null > 1.7].tolist())) > 1, "no rounding to be seen"
        assert permutation_pvalue(observed, null).item() == (1 + 720 / 20) / 721, dtype


def test_tiny_differences_are_not_rounding():
    null = 1e-9 * torch.arange(99.0)  # as small as they are, they differ
    assert_close(permutation_pvalue(95e-9, null).item(), 5 / 100)
    with_outlier = torch.cat([torch.arange(98.0), torch.tensor([1e9])])
    assert_close(permutation_pvalue(95.0, with_outlier).item(), 5 / 100)


def test_half_precision_does_not_make_a_smaller_draw_a_tie():
    for dtype in (torch.float16, torch.bfloat16):
        null = torch.full((99,), 0.95, dtype=dtype)
        assert permutation_pvalue(torch.tensor(1.0, dtype=dtype), null).item() == 1 / 100, dtype
        assert permutation_pvalue(null[0], null).item() == 1, dtype


def test_infinite_values_are_reached_by_infinite_draws_only():
    inf = math.inf
    for observed, null, reached in ((inf, [inf, 0.0, -inf], 1), (inf, [0.0, 1.0, 2.0], 0),
                                    (1.0, [-inf, -inf, -inf], 0), (-inf, [-inf, 0.0, inf], 3),
                                    (1.0, [inf, inf, 0.0], 2)):
        assert permutation_pvalue(observed, null).item() == (1 + reached) / 4, (observed, null)


def test_few_orders_are_all_used_and_give_the_exact_pvalue():
    orders = shuffled_orders(4)
    assert sorted(map(tuple, orders.tolist())) == sorted(itertools.permutations(range(4)))[1:]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    p = permutation_pvalue(pearson(values, values), pearson(values[orders], values))
    assert p.item() == 1 / 24

    many = shuffled_orders(7, n_draws=50, seed=1)
    assert many.shape == (50, 7) and (many.sort(-1).values == torch.arange(7)).all()
    assert torch.equal(many, shuffled_orders(7, n_draws=50, seed=1))
    assert not torch.equal(many, shuffled_orders(7, n_draws=50, seed=2))
    assert "n=1" in refusal(lambda: shuffled_orders(1))


def test_holm_gives_hand_computed_values_in_the_given_order():
    assert_close(holm([0.01, 0.04, 0.03, 0.005]).tolist(), [0.03, 0.06, 0.06, 0.02])
    assert_close(holm([0.5, 0.9]).tolist(), [1.0, 1.0])
    assert_close(holm([0.2]).tolist(), [0.2])
    assert holm([]).tolist() == []
    assert holm([0.01] * 5).tolist() == [0.05] * 5  # to the last digit: this is not below 0.05
    for wrong in ([1.5], [-0.1], [math.nan], [[0.1]]):
        assert "0 to 1" in refusal(lambda wrong=wrong: holm(wrong)), wrong


def test_holm_rarely_finds_anything_where_there_is_nothing():
    p_values = torch.rand(2000, 8, generator=seeded_generator(0), dtype=torch.float64)
    p_values[:, 1] = p_values[:, 0]  # two that depend on each other
    found = torch.stack([(holm(each) < 0.05).any() for each in p_values])
    assert 0.03 < found.double().mean() < 0.05


def test_under_the_null_small_pvalues_are_rare():
    draws = torch.randn(400, 100, 8, generator=seeded_generator(0))
    least = torch.stack([permutation_pvalue(each[0], each[1:]).min() for each in draws])
    assert (least <= 0.05).float().mean() < 0.09


def test_a_copying_head_scores_one_and_a_suppressing_one_minus_one():
    assert copying_score(torch.tensor([1.0, 2.0, 3.0])).item() == 1
    assert copying_score(torch.tensor([-1.0, -2.0])).item() == -1
    assert_close(copying_score(torch.tensor([3 + 4j, 3 - 4j])).item(), 0.6)


def test_one_value_has_no_interval_and_no_draws_no_pvalue():
    for values, more, told in (([1.0], {}, "1 values"), ([1.0, 2.0], {"n_draws": 0}, "n_draws=0"),
                               ([1.0, 2.0], {"level": 2.0}, "level=2.0")):
        assert told in refusal(lambda values=values, more=more: bootstrap_ci(values, **more))
    for observed, null in ((1.0, []), (torch.zeros(0), torch.zeros(5, 0))):
        told = refusal(lambda one=observed, null=null: permutation_pvalue(one, null))
        assert "0 draws" in told, null


def test_missing_values_have_no_pvalue():
    for observed, null in ((math.nan, [1.0, 2.0]), ([1.0, math.nan], [1.0, 2.0]),
                           (1.0, [1.0, math.nan]), ([1.0, 2.0], [[1.0, 2.0], [math.nan, 0.0]])):
        told = refusal(lambda one=observed, null=null: permutation_pvalue(one, null))
        assert "1 values are NaN" in told, (observed, null)


def test_a_null_must_have_the_heads_of_the_scores():
    told = refusal(lambda: permutation_pvalue([1.0, 2.0], torch.zeros(4, 3)))
    assert "[4, 3]" in told and "[2]" in told


# A metric that names the logits it reads


def test_a_metric_gets_the_positions_and_tokens_that_it_names_with_all_axes_kept():
    logits = torch.randn(4, 2, 5, 7, generator=seeded_generator(0))
    seen = Metric(lambda chosen: chosen.sum((-2, -1)), pos=[1, -1], tokens=[3, 0, 6])
    by_hand = logits[:, :, [1, 4]][..., [3, 0, 6]].sum((-2, -1))
    torch.testing.assert_close(seen(logits), by_hand)


def test_a_metric_s_tokens_can_differ_from_row_to_row():
    logits = torch.randn(3, 2, 5, 7, generator=seeded_generator(0))
    right, wrong = torch.tensor([1, 4]), torch.tensor([0, 6])
    assert torch.equal(Metric.logit_diff(right, wrong)(logits),
                       logit_diff(logits, right, wrong, reduction="none"))


def test_a_plain_function_gets_the_shape_that_it_was_written_for_whatever_the_sweep():
    logits = torch.randn(6, 6, 6, 7, generator=seeded_generator(0))  # as many cells as prompts
    ids = torch.arange(6)
    plain = as_metric(lambda logits: logits[range(6), [5] * 6, ids])  # as in a notebook
    assert torch.equal(plain(logits), logits[:, range(6), [5] * 6, ids])
    shapes = []
    as_metric(lambda logits: shapes.append(logits.shape) or logits[:, -1, 0])(logits)
    assert set(shapes) == {(6, 6, 7)}


def test_a_metric_that_writes_into_the_logits_changes_no_other_cell():
    logits = torch.randn(4, 2, 5, 7, generator=seeded_generator(0))
    before = logits.clone()
    doubled = as_metric(lambda logits: logits.mul_(2)[:, -1, 0])(logits)
    assert torch.equal(doubled, 2 * before[..., -1, 0]) and torch.equal(logits, before)
    same = before[:1].expand(3, -1, -1, -1)  # cells that share their memory
    doubled = as_metric(lambda logits: logits.mul_(2)[:, -1, 0]).of_needed(same)
    assert torch.equal(doubled, 2 * same[..., -1, 0]) and torch.equal(logits, before)
    assert "copy" in refusal(lambda: Metric(lambda logits: logits.mul_(2)[..., -1, 0])(logits))


def test_a_plain_function_as_a_metric_gets_all_logits():
    logits = torch.randn(2, 5, 7, generator=seeded_generator(0))
    assert torch.equal(as_metric(lambda all_of_them: all_of_them.sum((-2, -1)))(logits),
                       logits.sum((-2, -1)))


def test_a_metric_without_one_number_for_each_row_is_refused():
    for fn in (lambda logits: logits.mean(), lambda logits: logits, lambda logits: 1.0):
        assert "[2, 5, 7]" in refusal(lambda fn=fn: as_metric(fn)(torch.zeros(2, 5, 7)))


# Detectors


def test_auroc_is_the_share_of_pairs_in_order():
    generator = seeded_generator(0)
    for _ in range(20):
        scores = torch.randint(6, (12,), generator=generator).float()
        truth = torch.rand(12, generator=generator) < 0.4
        truth[:2] = torch.tensor([True, False])
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0
                 for a in scores[truth] for b in scores[~truth]]
        assert auroc(scores, truth) == pytest.approx(sum(pairs) / len(pairs))


def test_auroc_takes_ones_and_zeros_for_labels_and_no_others():
    scores = torch.tensor([3.0, 1, 2, 0])
    for kind in (torch.bool, torch.int64, torch.uint8, torch.float32):
        assert auroc(scores, torch.tensor([1, 0, 1, 0]).to(kind)) == 1, kind
    for truth in (torch.tensor([0, 1, 2, 0]), torch.tensor([1, 0])):
        assert str(list(truth.shape)) in refusal(lambda truth=truth: auroc(scores, truth))


def test_auroc_of_perfect_inverted_tied_and_undefined_rankings():
    truth = torch.tensor([True, True, False, False, False])
    assert auroc(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), truth) == 1.0
    assert auroc(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), truth) == 0.0
    assert auroc(torch.zeros(5), truth) == 0.5
    assert auroc(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), truth) == 0.75
    assert math.isnan(auroc(torch.zeros(5), torch.ones(5).bool()))
    assert math.isnan(auroc(torch.tensor([4.0, 3, 2, 1, math.nan]), truth))
    assert "[1, 5]" in refusal(lambda: auroc(torch.zeros(1, 5), truth[None]))
