"""Sampling: the distribution and the draws from it; a cache, padding, stops and hooks, which must
give the same as a loop over the whole text; the program."""

import itertools
import json

import pytest
import torch
from helpers import TINY, WIDE, tiny_model, tiny_tokens
from test_checkpoint import TOKENIZER, save_run

from config import GenerateConfig, SamplingConfig
from generate import (
    choose_token,
    generate,
    generate_text,
    main,
    n_new_tokens,
    pad_left,
    penalise_repetition,
    steering_vector,
    token_probs,
)
from tokenizer import BPETokenizer, WordTokenizer
from utils import UserError, seeded_generator

N_CTX = TINY["n_ctx"]
KINDS = [{}, {"n_layers": 0}, {"n_layers": 1}, {"attn_bias": False}, {"attn_only": True},
         {"positions": "none"}, {"positions": "sinusoidal"},
         {"tie_embeddings": True, "unembed_bias": True}, WIDE]


def some_logits(batch=20, d_vocab=11, seed=3):
    return 2 * torch.randn(batch, d_vocab, generator=seeded_generator(seed))


def drawn(model, prompts, n, *, stop_ids=(), cached=None, chunks=False, n_ids=None, **how):
    """The n tokens that are added to each row, [batch, n], sliding where they do not fit."""
    cfg = SamplingConfig(**{"max_new_tokens": n, "temperature": 1.0, "sliding": True} | how)
    return torch.cat(list(generate(model, prompts, cfg, stop_ids=stop_ids, cached=cached,
                                   hooks_see_chunks=chunks, n_ids=n_ids)), 1)


def steps(model, prompts, n, **how):
    """(the tokens that are added [batch, n], the logits they are drawn by [batch, n, d_vocab])."""
    logits = []

    def watched(of_step, *rest):
        logits.append(of_step)
        return choose_token(of_step, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("generate.choose_token", watched)
        tokens = drawn(model, prompts, n, **how)
    return tokens, torch.stack(logits, 1)


def assert_close(got, wanted, of=""):
    off = (got - wanted).abs().max().item()
    assert torch.allclose(got, wanted, atol=1e-5, rtol=1e-5), f"{of} logits are off by {off}"


def assert_refused(row, call, told):
    """Check that call() raises a UserError with the text `told`. row: names the case."""
    try:
        call()
    except UserError as error:
        assert told in str(error), f"{row} is refused with: {error}"
    else:
        pytest.fail(f"{row} is not refused")


# The distribution


def assert_probs(logits_of, wanted, **how):
    """token_probs of log(logits_of) are `wanted`, hand-computed."""
    probs = token_probs(torch.tensor([logits_of]).log(), **how)
    torch.testing.assert_close(probs.float(), torch.tensor([wanted]).float())


def test_probabilities_by_hand():
    p = [0.2, 0.4, 0.1, 0.3]
    assert_probs(p, p)
    assert_probs(p, [4 / 30, 16 / 30, 1 / 30, 9 / 30], temperature=0.5)  # squares
    assert_probs(p, [0, 4 / 7, 0, 3 / 7], top_k=2)
    assert_probs(p, [2 / 9, 4 / 9, 0, 3 / 9], top_p=0.8)  # 0.4 + 0.3 is not enough
    assert_probs(p, [0, 1, 0, 0], top_p=0.01)
    assert_probs(p, [0, 16 / 25, 0, 9 / 25], temperature=0.5, top_k=2)
    assert_probs(p, [0, 4 / 7, 0, 3 / 7], top_k=3, top_p=0.7)  # of 4/9 + 3/9, not of 0.4 + 0.3


def test_the_temperature_divides_the_logits():
    logits = some_logits()
    for temperature in (0.1, 1.0, 7.0):
        probs = token_probs(logits, temperature)
        torch.testing.assert_close(probs, (logits.double() / temperature).softmax(-1))


def test_top_k_keeps_the_k_likeliest_in_proportion():
    logits = some_logits()
    for k in range(1, 13):
        for row, probs in zip(logits.softmax(-1), token_probs(logits, top_k=k), strict=True):
            keep = sorted(range(11), key=lambda i, row=row: -row[i])[:k]
            wanted = torch.zeros(11)
            wanted[keep] = row[keep] / row[keep].sum()
            assert torch.allclose(probs.float(), wanted), f"top_k={k} leaves {probs}, not {wanted}"


def test_of_equal_tokens_the_first_is_kept():
    probs = token_probs(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), top_k=2)[0]
    assert (probs > 0).tolist() == [True, True, False, False]
    assert token_probs(torch.zeros(1, 10), top_k=1).tolist() == [[1.0] + [0.0] * 9]


def test_a_temperature_near_zero_is_greedy_and_not_nan():
    assert token_probs(torch.tensor([[1.0, 3.0, 2.0]]), 1e-50).tolist() == [[0.0, 1.0, 0.0]]


def test_top_p_keeps_the_fewest_tokens_whose_sum_reaches_p():
    logits = some_logits()
    for p in (0.001, 0.2, 0.5, 0.77, 0.95, 0.999):
        for row, probs in zip(logits.softmax(-1), token_probs(logits, top_p=p), strict=True):
            keep = []
            total = 0.0
            for i in sorted(range(11), key=lambda i, row=row: -row[i]):
                if total < p:
                    keep.append(i)
                    total += row[i].item()
            wanted = torch.zeros(11)
            wanted[keep] = row[keep] / total
            assert torch.allclose(probs.float(), wanted), f"top_p={p} leaves {probs}, not {wanted}"


def test_top_p_of_equal_tokens_keeps_just_enough_of_them():
    assert token_probs(torch.zeros(1, 8), top_p=0.5)[0].tolist() == [0.25] * 4 + [0] * 4
    kept = token_probs(torch.zeros(1, 10), top_p=0.6)[0] > 0  # ten tenths are not exactly one
    assert kept.sum() == 6


def test_limits_that_leave_everything_change_nothing():
    for logits in (some_logits(), some_logits(batch=1, d_vocab=50_257)):
        wanted = logits.double().softmax(-1)
        for how in ({"top_p": 1.0}, {"top_k": 60_000, "top_p": 1.0}):
            torch.testing.assert_close(token_probs(logits, **how), wanted)


def test_the_probabilities_of_each_row_sum_to_one():
    for how in ({}, {"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.9},
                {"temperature": 1e-3}, {"temperature": 1e3, "top_p": 1e-6}):
        sums = token_probs(some_logits(), **how).sum(-1)
        assert torch.allclose(sums, torch.ones(20).double()), f"{how}: rows sum to {sums}"


# The draws


def test_tokens_come_as_often_as_they_are_likely():
    model = tiny_model(n_layers=1)
    tokens = tiny_tokens(batch=1, pos=2)
    n = 10_000
    for how in ({}, {"temperature": 0.5}, {"top_k": 4}, {"temperature": 3.0, "top_p": 0.7}):
        probs = token_probs(model(tokens)[:, -1], **how)[0].double()
        counts = drawn(model, tokens.expand(n, -1), 1, **how).flatten().bincount(minlength=11)
        sigma = (n * probs * (1 - probs)).sqrt()
        off = (counts - n * probs).abs()
        assert (off <= 5 * sigma).all(), f"{how}: counts {counts}, expected {n * probs}"
        assert (sigma > 0).sum() >= 2


def test_generating_equals_the_naive_loop():
    model = tiny_model()
    tokens = tiny_tokens(batch=3, pos=4)
    generator = seeded_generator(5)
    rows = tokens
    for _ in range(2 * N_CTX):  # far beyond the context
        probs = (model(rows[:, -N_CTX:])[:, -1].double() / 0.9).softmax(-1)
        rows = torch.cat([rows, torch.multinomial(probs, 1, generator=generator)], 1)
    assert torch.equal(drawn(model, tokens, 2 * N_CTX, seed=5, temperature=0.9), rows[:, 4:])


def test_greedy_takes_the_likeliest_token_always():
    model = tiny_model()
    tokens = tiny_tokens()
    greedy = drawn(model, tokens, 12, greedy=True)
    assert torch.equal(greedy, drawn(model, tokens, 12, seed=9, top_k=1, temperature=5.0))
    rows = torch.cat([tokens, greedy], 1)
    for end in range(tokens.shape[1], rows.shape[1]):
        logits = model(rows[:, max(0, end - N_CTX) : end])
        assert torch.equal(rows[:, end], logits[:, -1].argmax(-1))


def test_the_rows_of_a_batch_continue_independently():
    model = tiny_model()
    tokens = tiny_tokens(batch=4)
    together = drawn(model, tokens, 12, top_k=1)
    alone = [drawn(model, row[None], 12, top_k=1) for row in tokens]
    assert torch.equal(together, torch.cat(alone))
    assert len(set(map(tuple, together.tolist()))) > 1


def test_tokens_before_the_context_have_no_effect():
    model = tiny_model()
    tokens = tiny_tokens(pos=3 * N_CTX)
    assert torch.equal(drawn(model, tokens, 12), drawn(model, tokens[:, -N_CTX:], 12))
    assert not torch.equal(drawn(model, tokens, 12), drawn(model, tokens[:, -2:], 12))


def test_generating_builds_no_graph_and_leaves_the_caller_s_mode_and_prompt_alone():
    model = tiny_model()
    tokens = tiny_tokens()
    graphs = []
    before = tokens.clone()
    with model.hooks([("hook_embed", lambda resid, hook: graphs.append(resid.requires_grad))]):
        for _ in generate(model, tokens, SamplingConfig(max_new_tokens=3, sliding=True)):
            assert torch.is_grad_enabled()
    assert graphs == [False] * 3
    assert torch.equal(tokens, before)


def test_zero_new_tokens_give_none():
    assert not list(generate(tiny_model(), tiny_tokens(), SamplingConfig(max_new_tokens=0)))


# The cache, padding, the penalty


def test_the_logits_of_each_step_are_those_of_the_whole_text():
    for changes in KINDS:
        model = tiny_model(**changes)
        tokens = tiny_tokens(batch=3, pos=4)
        new, logits = steps(model, tokens, 2 * N_CTX)  # far beyond the context
        rows = torch.cat([tokens, new], 1)
        for i in range(2 * N_CTX):
            whole = model(rows[:, : 4 + i][:, -N_CTX:])
            assert_close(logits[:, i], whole[:, -1].detach(), f"{changes}, step {i}:")


def test_keeping_keys_and_values_changes_neither_logits_nor_tokens():
    for changes in KINDS:
        model = tiny_model(**changes)
        tokens = tiny_tokens(batch=3, pos=4)
        cached, logits = steps(model, tokens, N_CTX)
        uncached, all_logits = steps(model, tokens, N_CTX, cached=False)
        assert torch.equal(cached, uncached), f"a model with {changes} writes something else"
        assert_close(logits, all_logits, f"{changes}:")


def test_the_seed_and_not_the_cache_decides_the_tokens():
    model = tiny_model()
    tokens = tiny_tokens(batch=1, pos=2)
    how = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3}
    texts = [drawn(model, tokens, 14, seed=seed, **how) for seed in range(4)]
    assert len({tuple(text[0].tolist()) for text in texts}) == 4
    assert torch.equal(texts[1], drawn(model, tokens, 14, seed=1, **how))
    assert torch.equal(texts[1], drawn(model, tokens, 14, seed=1, cached=False, **how))


def ragged(*lengths):
    rows = tiny_tokens(batch=len(lengths), pos=max(lengths))
    return [row[:n].tolist() for row, n in zip(rows, lengths, strict=True)]


def test_each_prompt_of_a_batch_goes_on_as_it_would_alone():
    prompts = ragged(2, 7, 1)
    for changes, cached in itertools.product(KINDS, (True, False)):
        model = tiny_model(**changes)
        how = {"greedy": True, "repetition_penalty": 1.5, "cached": cached}
        together, logits = steps(model, prompts, N_CTX, **how)
        for row, prompt in enumerate(prompts):
            alone, its_logits = steps(model, [prompt], N_CTX, **how)
            assert torch.equal(together[row], alone[0]), f"{changes}, cached={cached}, row {row}"
            assert_close(logits[row], its_logits[0], f"{changes}, cached={cached}, row {row}:")
        assert len(set(map(tuple, together.tolist()))) > 1


def test_a_prompt_beside_one_longer_than_the_context_goes_on_as_it_would_alone():
    model = tiny_model()
    prompts = ragged(3, N_CTX + 4, N_CTX)
    together, logits = steps(model, prompts, 12, greedy=True)
    for row, prompt in enumerate(prompts):
        alone, its_logits = steps(model, [prompt], 12, greedy=True)
        assert torch.equal(together[row], alone[0])
        assert_close(logits[row], its_logits[0])


def test_prompts_are_padded_on_the_left_and_a_tensor_not_at_all():
    tokens, known = pad_left([[5], [1, 2, 3]])
    assert known.tolist() == [[False, False, True], [True] * 3]
    assert tokens[known].tolist() == [5, 1, 2, 3]
    tokens = tiny_tokens()
    assert pad_left(tokens)[0] is tokens and pad_left(tokens)[1].all()


def test_the_ids_in_the_padding_have_no_effect(monkeypatch):
    model = tiny_model()
    prompts = ragged(2, 7, 5)
    how = {"greedy": True, "repetition_penalty": 3.0}
    usual, logits = steps(model, prompts, 2 * N_CTX, **how)

    def pad_with_anything(prompts, device=None):
        tokens, known = pad_left(prompts, device)
        return torch.where(known, tokens, tiny_tokens(*tokens.shape, seed=8)), known

    monkeypatch.setattr("generate.pad_left", pad_with_anything)
    others, other_logits = steps(model, prompts, 2 * N_CTX, **how)
    assert torch.equal(usual, others)
    assert_close(logits, other_logits)


def test_the_repetition_penalty_by_hand():
    """Tokens 0, 1 (twice) and 3 were there; 2 and 4 are padding, 5 is new."""
    tokens, known = torch.tensor([[2, 4, 0, 1, 1, 3]]), torch.tensor([[False] * 2 + [True] * 4])
    logits = torch.tensor([[4.0, -4.0, 3.0, 0.0, -3.0, 1.0]])
    assert penalise_repetition(logits, tokens, known, 2.0).tolist() == [[2, -8, 3, 0, -3, 1]]
    assert penalise_repetition(logits, tokens, known, 0.5).tolist() == [[8, -2, 3, 0, -3, 1]]
    assert torch.equal(penalise_repetition(logits, tokens, known, 1), logits)


def test_each_row_is_punished_for_its_own_tokens():
    tokens = torch.tensor([[0, 0], [1, 2]])
    punished = penalise_repetition(torch.full((2, 4), 6.0), tokens, tokens >= 0, 3.0)
    assert punished.tolist() == [[2, 6, 6, 6], [6, 2, 2, 6]]


def test_the_penalty_is_for_all_earlier_tokens_even_before_the_context():
    model = tiny_model()
    tokens = tiny_tokens(batch=2, pos=3)
    new, logits = steps(model, tokens, 2 * N_CTX, repetition_penalty=1.7)
    rows = torch.cat([tokens, new], 1)
    for row in range(2):
        for i in range(2 * N_CTX):
            before = rows[row, : 3 + i]
            wanted = model(before[None, -N_CTX:])[0, -1].detach()
            for token in set(before.tolist()):
                wanted[token] *= 1 / 1.7 if wanted[token] > 0 else 1.7
            assert_close(logits[row, i], wanted)


def test_under_a_huge_penalty_no_token_repeats():
    positive = tiny_model(unembed_bias=True)
    with torch.no_grad():
        positive.unembedding.b_U += 50  # all logits are positive
    tokens = drawn(positive, [[4]], 10, repetition_penalty=1e9, greedy=True)
    assert sorted([4, *tokens[0].tolist()]) == list(range(11))


# Where it ends


def test_a_row_that_stops_repeats_its_stop_and_the_others_go_on():
    model = tiny_model()
    tokens = tiny_tokens(batch=5, pos=4)
    stop_ids = [2, 7]
    how = {"seed": 3, "temperature": 2.0}
    free = drawn(model, tokens, 40, **how)
    stopped = drawn(model, tokens, 40, stop_ids=stop_ids, **how)
    ends = [next(i for i, token in enumerate(row) if token in stop_ids) for row in free.tolist()]
    for row, its_free, end in zip(stopped.tolist(), free.tolist(), ends, strict=True):
        assert row == its_free[: end + 1] + [its_free[end]] * (max(ends) - end)
    assert len(set(ends)) > 2 and max(ends) < 39
    assert {stopped[row, -1].item() for row in range(5)} == {2, 7}


def test_rows_that_stop_at_different_times_give_what_each_gives_alone():
    model = tiny_model()
    prompts = ragged(2, 7, 4, 1)
    how = {"greedy": True, "repetition_penalty": 2.0, "stop_ids": [3, 8]}
    together = drawn(model, prompts, 30, **how)
    alone = [drawn(model, [prompt], 30, **how)[0].tolist() for prompt in prompts]
    assert len({len(row) for row in alone}) > 1
    for row, its in zip(together.tolist(), alone, strict=True):
        assert row == its + its[-1:] * (together.shape[1] - len(its))


def test_a_stop_in_the_prompt_does_not_stop():
    model = tiny_model()
    free = drawn(model, [[2, 2]], 30, temperature=2.0)[0].tolist()
    stopped = drawn(model, [[2, 2]], 30, temperature=2.0, stop_ids=[2])[0].tolist()
    assert stopped == free[: free.index(2) + 1] and len(stopped) > 1


def test_a_stop_that_is_not_an_id_is_refused():
    model = tiny_model()
    for stop_ids in ([1.9], ["a"], [True], [[1]], [11], [-1]):
        assert_refused(f"stop_ids={stop_ids}",
                       lambda stop_ids=stop_ids: drawn(model, [[1]], 2, stop_ids=stop_ids),
                       str(stop_ids[0]).strip("[]"))


def test_ids_beyond_the_tokenizer_s_are_never_proposed():
    model = tiny_model()
    with torch.no_grad():
        model.unembedding.W_U[:, 7:] *= 20  # the likeliest, if they counted
    for how in ({"greedy": True}, {"temperature": 3.0}, {"top_k": 9}, {"top_p": 0.9},
                {"repetition_penalty": 2.0}):
        free = drawn(model, [[1], [9]], 30, **how)
        assert free.max() >= 7, f"{how}: nothing is left out"
        assert drawn(model, [[1], [9]], 30, n_ids=7, **how).max() < 7, how


def test_weights_that_are_not_finite_are_refused():
    for broken in (float("nan"), float("inf")):
        model = tiny_model()
        with torch.no_grad():
            model.unembedding.W_U[3, 5] = broken
        for how in ({"greedy": True}, {}, {"top_k": 2}, {"top_p": 0.5}):
            assert_refused(f"{broken}, {how}", lambda how=how, model=model:
                           drawn(model, [[1]], 3, **how), "NaN or infinite")


def test_an_infinite_penalty_does_not_count_as_a_broken_model():
    model = tiny_model(unembed_bias=True)
    with torch.no_grad():
        model.unembedding.b_U -= 99  # so that all logits are negative
    for how in ({"greedy": True}, {}, {"top_k": 3}):
        assert drawn(model, [[1]], 60, repetition_penalty=1e300, **how).shape == (1, 60), how


def test_by_default_it_adds_as_many_tokens_as_fit_or_500():
    for n_prompt, n_ctx, sliding, n_new in (
            (4, N_CTX, False, N_CTX - 4), (N_CTX, N_CTX, False, 0), (4, 700, False, 500),
            (200, 700, False, 500), (300, 700, False, 400), (4, N_CTX, True, 500)):
        found = n_new_tokens(SamplingConfig(sliding=sliding), n_prompt, n_ctx)
        assert found == n_new, f"to {n_prompt} of {n_ctx} tokens come {found}, not {n_new}"
    assert len(list(generate(tiny_model(), ragged(2, 6), SamplingConfig()))) == N_CTX - 6


def test_a_text_that_does_not_fit_is_refused_before_anything_is_computed():
    model = tiny_model()
    computed = []
    with model.hooks([("hook_embed", lambda resid, hook: computed.append(resid))]):
        with pytest.raises(UserError, match=r"4 .* 6 .*n_ctx=9.* 5,.*--sliding"):
            next(generate(model, tiny_tokens(pos=4), SamplingConfig(max_new_tokens=6)))
        with pytest.raises(UserError, match=r"12 .*n_ctx=9.*--sliding"):
            next(generate(model, tiny_tokens(1, 12), SamplingConfig(max_new_tokens=1)))
        with pytest.raises(UserError, match="12 tokens"):
            next(generate(model, tiny_tokens(1, 12), SamplingConfig()))
        assert not computed
        fits = list(generate(model, tiny_tokens(pos=4), SamplingConfig(max_new_tokens=5)))
    assert len(fits) == 5 == len(computed)


def test_an_empty_prompt_is_refused():
    model = tiny_model()
    for prompts in ([], [[]], [[1], []], torch.zeros(1, 0, dtype=torch.long)):
        pieces = generate(model, prompts, SamplingConfig())
        assert_refused(f"{prompts}", lambda pieces=pieces: next(pieces), "empty")


# Hooks and steering


def push_by(vector):
    return lambda resid, hook: resid + vector


def listeners(model):
    return [name for name, point in model.hook_points().items() if point.listeners]


def test_a_hook_that_is_open_acts_at_every_step():
    model = tiny_model()
    tokens = tiny_tokens(batch=2, pos=4)
    plain = drawn(model, tokens, N_CTX)
    push = push_by(2 * torch.randn(12, generator=seeded_generator(6)))
    points = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "hook_embed"]
    ways = [{}, {"cached": False}, {"cached": True, "chunks": True}, {"chunks": True}]
    for at, way in itertools.product(points, ways):
        hooks = [(at, push)]
        with model.hooks(hooks):
            new, logits = steps(model, tokens, N_CTX, **way)
        rows = torch.cat([tokens, new], 1)
        for i in range(N_CTX):
            window = rows[:, : 4 + i][:, -N_CTX:]
            wanted = model.run_with_hooks(window, hooks)[:, -1].detach()
            assert_close(logits[:, i], wanted, f"{at}, {way}, step {i}:")
        assert not torch.equal(new, plain), f"{at}, {way}: the hook does nothing"


def by_position(resid, hook):
    """Pushes the stream at position 2, of whatever text."""
    resid = resid.clone()
    if resid.shape[1] > 2:
        resid[:, 2] += 9 * torch.randn(12, generator=seeded_generator(8))
    return resid


def test_hooks_at_a_position_act_there_while_generating_or_are_refused():
    model = tiny_model()
    tokens = tiny_tokens(batch=8, pos=2)
    hooks = [("blocks.0.hook_resid_pre", by_position)]
    how = {"greedy": True}
    with model.hooks(hooks):
        found = drawn(model, tokens, 6, **how)
        assert torch.equal(found, drawn(model, tokens, 6, cached=False, **how))
        assert_refused("cached=True", lambda: drawn(model, tokens, 6, cached=True), "cached=False")
    rows = tokens
    for _ in range(6):
        logits = model.run_with_hooks(rows, hooks)[:, -1]
        rows = torch.cat([rows, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, rows[:, 2:])
    assert not torch.equal(found, drawn(model, tokens, 6, **how)), "the hook does nothing"


def test_the_effect_of_a_hook_ends_when_it_is_closed_between_two_steps():
    model = tiny_model()
    cfg = SamplingConfig(max_new_tokens=6, greedy=True)
    rows = tiny_tokens(batch=3, pos=3)
    going_on = generate(model, rows, cfg)
    for n_open in range(6):
        hooks = [("hook_embed", by_position)] if n_open in (1, 2, 4) else []
        with model.hooks(hooks):
            new = next(going_on)
        wanted = model.run_with_hooks(rows, hooks)[:, -1].argmax(-1, keepdim=True)
        assert torch.equal(new, wanted), f"step {n_open}"
        rows = torch.cat([rows, new], 1)


def test_with_a_cache_hooks_see_the_new_position_alone_and_patterns_all_keys():
    model = tiny_model()
    points = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_k", "blocks.1.attn.hook_pattern",
              "ln_final.hook_normalized"]
    for cached in (True, False):
        seen = {name: [] for name in points}
        with model.hooks([(points, lambda t, hook, seen=seen: seen[hook.name].append(t.shape))]):
            drawn(model, tiny_tokens(batch=2, pos=6), 5, cached=cached, chunks=cached)
        keys = [6, 7, 8, 9, 9]  # at the last the window slides, and all positions move
        new = [6, 1, 1, 1, 9] if cached else keys
        resid, k, pattern, normalized = (seen[name] for name in points)
        assert resid == [(2, n, 12) for n in new], f"cached={cached}"
        assert k == [(2, n, 3, 4) for n in new], f"cached={cached}"
        assert pattern == [(2, 3, n, n_keys) for n, n_keys in zip(new, keys, strict=True)]
        assert normalized == [(2, 1, 12)] * 5  # read out at the last position only


LETTERS = {"max_new_tokens": 20, "prompt": "bad cab", "sliding": True}
LEANING = {"steer": "bad", "steer_away": "ice", "steer_at": "blocks.0.hook_resid_mid"}


def config(**changes):
    return GenerateConfig(**LETTERS | changes)


def written(model, cfg):
    return "".join(generate_text(model, TOKENIZER, cfg))


def test_a_steering_vector_is_the_difference_of_the_streams_at_the_last_tokens():
    model = tiny_model()
    _, cache = model.run_with_cache(torch.tensor([TOKENIZER.encode("bad egg")]))
    _, away_cache = model.run_with_cache(torch.tensor([TOKENIZER.encode("ice")]))
    for at in ("hook_embed", "blocks.0.hook_resid_mid", "blocks.1.hook_mlp_out"):
        vector = steering_vector(model, TOKENIZER, "bad egg", "ice", at=at)
        assert vector.shape == (12,) and not vector.requires_grad
        assert_close(vector, (cache[at] - away_cache[at][:, -1:])[0, -1].detach(), at)
        back = steering_vector(model, TOKENIZER, "ice", "bad egg", at=at)
        assert torch.equal(back, -vector), at
    assert not listeners(model)


def test_steering_is_a_hook_that_adds_the_vector_to_every_position():
    rows = [("blocks.0.hook_resid_mid", 2, "blocks.0.hook_resid_mid"),
            ("hook_embed", 0, "hook_embed"), (None, 3, "blocks.1.hook_resid_post"),
            (None, 1, "blocks.0.hook_resid_post")]
    for at, n_layers, where in rows:
        model = tiny_model(n_layers=n_layers)
        cfg = config(greedy=True, steer_scale=-2.5, **LEANING | {"steer_at": at})
        push = -2.5 * steering_vector(model, TOKENIZER, "bad", "ice", at=where)
        tokens = torch.tensor([TOKENIZER.encode("bad cab")])
        for _ in range(20):
            logits = model.run_with_hooks(tokens[:, -N_CTX:], [(where, push_by(push))])
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        wanted = TOKENIZER.decode(tokens[0, 7:])
        assert written(model, cfg) == wanted, f"steered at {at} of {n_layers} layers"


def test_the_strength_is_in_multiples_of_the_difference_four_by_default():
    model = tiny_model()
    plain = written(model, config())
    asked = written(model, config(steer_scale=4.0, **LEANING))
    assert written(model, config(steer_scale=0.0, **LEANING)) == plain
    assert written(model, config(**LEANING)) == asked
    assert asked != plain


def test_steering_ends_with_the_text_in_every_case():
    model = tiny_model()
    before = model(tiny_tokens())
    cfg = config(**LEANING)
    pieces = generate_text(model, TOKENIZER, cfg)
    assert not listeners(model)  # nothing has begun
    next(pieces)
    pieces.close()
    assert not listeners(model)
    list(generate_text(model, TOKENIZER, cfg))
    assert not listeners(model)
    with pytest.raises(UserError, match="do not fit"):
        list(generate_text(model, TOKENIZER, config(sliding=False, **LEANING)))
    assert not listeners(model)
    assert torch.equal(model(tiny_tokens()), before)


def test_steering_removes_no_other_hooks():
    model = tiny_model()
    seen = []
    with model.hooks([("hook_embed", lambda resid, hook: seen.append(1))]):
        list(generate_text(model, TOKENIZER, config(**LEANING)))
        assert listeners(model) == ["hook_embed"]
    assert len(seen) == 20 + 2  # the two texts are read once each


def test_impossible_steering_is_refused():
    model = tiny_model()
    rows = [
        ({"steer_away": None}, "steer_away"), ({"steer": None}, "steer"),
        ({"steer": None, "steer_away": None}, "steer_at"),
        ({"steer_at": "blocks.0.attn.hook_z"}, "hook_z holds [batch, pos, head, d_head]"),
        ({"steer_at": "blocks.0.attn.hook_result"}, "[batch, pos, head, d_model]"),
        ({"steer_at": "blocks.0.attn.hook_pattern"}, "[batch, head, query_pos, key_pos]"),
        ({"steer_at": "ln_final.hook_scale"}, "ln_final.hook_scale"),
        ({"steer_at": "blocks.0.hook_resid_pots"}, "blocks.0.hook_resid_post"),
        ({"steer_at": "blocks.2.hook_resid_post"}, "blocks.2.hook_resid_post"),
        ({"steer": "bad cab bad"}, "n_ctx=9"), ({"steer": "xyz"}, "'x' 'y' 'z'"),
    ]
    for changes, told in rows:
        pieces = generate_text(model, TOKENIZER, config(**LEANING | changes))
        assert_refused(f"{changes}", lambda pieces=pieces: next(pieces), told)


def test_a_model_without_blocks_cannot_be_steered_without_steer_at():
    model = tiny_model(n_layers=0)
    pieces = generate_text(model, TOKENIZER, config(steer="bad", steer_away="ice"))
    assert_refused("no block", lambda: next(pieces), "--steer_at")


# Text


BYTES = BPETokenizer().train("", 256)  # a token a byte


def pieces_of(monkeypatch, text_bytes, **how):
    """The pieces that generate_text yields if the model predicts these bytes."""
    ids = [BYTES.ids[bytes([byte])] for byte in text_bytes]
    said = (torch.tensor([[i]]) for i in ids)
    monkeypatch.setattr("generate.generate", lambda *args, **kwargs: said)
    return list(generate_text(tiny_model(d_vocab=256), BYTES, GenerateConfig(prompt="é", **how)))


def test_a_character_of_several_tokens_is_printed_when_it_is_complete(monkeypatch):
    pieces = pieces_of(monkeypatch, "aé😀b".encode())
    assert pieces == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_bytes_that_are_no_character_become_the_replacement_character(monkeypatch):
    rows = [(b"a\xc3b", "a\ufffdb"), (b"\xff", "\ufffd"), (b"a\xf0\x9f\x98", "a\ufffd"),
            (b"\x80\xc3\xa9", "\ufffdé")]
    for broken, text in rows:
        found = "".join(pieces_of(monkeypatch, broken))
        assert found == text, f"{broken} becomes {found!r}"


def test_the_pieces_of_any_bytes_are_the_text_of_all_of_them():
    model = tiny_model(d_vocab=256)
    cfg = GenerateConfig(prompt="é", max_new_tokens=60, sliding=True, temperature=5.0)
    tokens = drawn(model, [BYTES.encode("é")], 60, temperature=5.0)
    pieces = list(generate_text(model, BYTES, cfg))
    assert len(pieces) == 61 and "\ufffd" in "".join(pieces)
    assert "".join(pieces) == BYTES.decode(tokens[0])


def test_the_pieces_of_words_have_the_spaces_between_them(monkeypatch):
    text = "When Ola met Leo, Leo ran.\nWhere is Mia? (At... the lake!)\n\n. x"
    tokenizer = WordTokenizer().fit(text)
    model = tiny_model(d_vocab=99)
    ids = tokenizer.encode(text)
    for n_prompt in (1, 2, 5, 8):
        prompt = tokenizer.decode(ids[:n_prompt])
        said = (torch.tensor([[i]]) for i in ids[n_prompt:])
        monkeypatch.setattr("generate.generate", lambda *args, said=said, **kwargs: said)
        pieces = list(generate_text(model, tokenizer, GenerateConfig(prompt=prompt)))
        assert len(pieces) == len(ids) - n_prompt + 1
        assert prompt + "".join(pieces) == tokenizer.decode(ids), f"after {prompt!r}"
        assert " lake" in pieces and "\n" in pieces


def test_the_text_ends_before_its_stop():
    model = tiny_model()
    free = written(model, config(temperature=2.0, max_new_tokens=40))
    assert "e" in free
    cfg = config(temperature=2.0, max_new_tokens=40, stop="e")
    assert written(model, cfg) == free[: free.index("e")]


def test_a_stop_named_endoftext_is_that_token():
    state = BYTES.state_dict()
    state["tokens"].append("<|endoftext|>")
    tokenizer = BPETokenizer().load_state_dict(state)
    model = tiny_model(d_vocab=257)
    with torch.no_grad():
        model.W_E[:] = 0  # whatever was there, the same comes next
        model.unembedding.W_U[:, 256] = 50 * model.ln_final(model.W_pos)[3]
    how = {"prompt": "abc", "max_new_tokens": 30, "sliding": True, "greedy": True}
    free = list(generate_text(model, tokenizer, GenerateConfig(**how)))
    stopped = list(generate_text(model, tokenizer, GenerateConfig(stop="<|endoftext|>", **how)))
    assert "<|endoftext|>" in free
    assert "".join(stopped) == "".join(free[: free.index("<|endoftext|>")])


def test_a_prompt_and_a_direction_have_endoftext_as_one_token(monkeypatch):
    state = BYTES.state_dict()
    state["tokens"].append("<|endoftext|>")
    tokenizer = BPETokenizer().load_state_dict(state)
    prompts = []

    def said(model, given, *args, **kwargs):
        prompts.extend(given)
        return iter([])

    monkeypatch.setattr("generate.generate", said)
    for known in (tokenizer, BYTES):
        list(generate_text(tiny_model(d_vocab=257), known, GenerateConfig(prompt="a<|endoftext|>")))
    assert prompts == [[tokenizer.ids[b"a"], 256], BYTES.encode("a<|endoftext|>")]

    model = tiny_model(d_vocab=257)
    at = "blocks.0.hook_resid_mid"
    vector = steering_vector(model, tokenizer, "ab<|endoftext|>", "ab", at=at)
    end = torch.tensor([[*tokenizer.encode("ab"), 256]])
    stream = model.run_with_cache(end)[1][at][0].detach()
    assert_close(vector, stream[-1] - stream[-2])


def test_a_stop_text_may_be_several_tokens_or_a_part_of_one(monkeypatch):
    rows = [  # what the model says, the stop, what is written
        ("ababac.", "abac", "ab"), ("ababab", "abac", "ababab"), ("xaab.", "ab", "xa"),
        ("aaab", "aab", "a"), ("é. é.", ". é", "é"), ("abc", "abc", ""), ("ab", "abc", "ab"),
        ("no\n\nUser: yes", "\nUser:", "no\n"), ("a<|endoftext|>b", "<|endoftext|>", "a"),
        ("日本", "本", "日"),
    ]
    for said, stop, wanted in rows:
        pieces = pieces_of(monkeypatch, said.encode(), stop=stop)
        assert "".join(pieces) == wanted, f"{said!r} until {stop!r}"
    assert "".join(pieces_of(monkeypatch, b"a\xf0\x9f", stop="\ufffd")) == "a"

    # Stops that begin or end in the middle of a token
    tokenizer = BPETokenizer().train("the cat. the cat. the cat.", 300)
    ids = [*tokenizer.encode(" the cat"), *tokenizer.encode(". the cat")]
    for stop, wanted in (("e c", " th"), ("t. t", " the ca"), ("at", " the c"), (" the", "")):
        tokens = (torch.tensor([[i]]) for i in ids)
        monkeypatch.setattr("generate.generate", lambda *args, tokens=tokens, **more: tokens)
        cfg = GenerateConfig(prompt="the", stop=stop)
        pieces = generate_text(tiny_model(d_vocab=300), tokenizer, cfg)
        assert "".join(pieces) == wanted, f"until {stop!r}"


def test_text_that_may_become_the_stop_is_held_back_and_the_rest_printed(monkeypatch):
    pieces = pieces_of(monkeypatch, b"xababay", stop="abac")
    assert pieces == ["x", "", "", "", "ab", "", "abay", ""]


def test_a_stop_that_the_tokenizer_cannot_write_is_refused():
    pieces = generate_text(tiny_model(), TOKENIZER, config(stop="x"))
    assert_refused("stop=x", lambda: next(pieces), "'x'")


def test_a_text_never_has_ids_that_the_tokenizer_lacks():
    tokenizer = BPETokenizer().train("the cat sat on the mat. " * 20, 270)
    model = tiny_model(d_vocab=320)  # padded to a multiple of 64
    cfg = GenerateConfig(prompt="the", max_new_tokens=60, sliding=True, temperature=5.0)
    assert len(list(generate_text(model, tokenizer, cfg))) == 61


def text_of(model, seed=0, n=20):
    cfg = GenerateConfig(prompt="bad cab", max_new_tokens=n, seed=seed, sliding=True)
    return "".join(generate_text(model, TOKENIZER, cfg))


def test_the_seed_decides_the_text():
    model = tiny_model()
    text = text_of(model)
    assert text == text_of(model) and len(text) == 20
    assert text != text_of(model, seed=1)
    assert text.startswith(text_of(model, n=7))


# The program


def test_the_program_prints_the_prompt_and_as_many_characters_as_asked(tmp_path, capsys):
    model, _ = save_run(tmp_path / "mine")
    save_run(tmp_path / "newer", seed=2)
    flags = ["--out_dir", str(tmp_path), "--prompt", "bad cab", "--max_new_tokens", "20",
             "--sliding"]
    main([*flags, "--run_name", "mine", "--temperature", "0.8", "--device", "cpu"])
    assert capsys.readouterr().out == "bad cab" + text_of(model) + "\n"
    main([*flags, "--run_name", str(tmp_path / "mine"), "--seed", "1"])
    assert capsys.readouterr().out == "bad cab" + text_of(model, seed=1) + "\n"
    main(flags)
    assert capsys.readouterr().out == "bad cab" + text_of(tiny_model(2)) + "\n"


def test_the_program_s_flags_act(tmp_path, capsys):
    model, _ = save_run(tmp_path / "mine")
    given = ["--out_dir", str(tmp_path), "--prompt", "bad cab", "--max_new_tokens", "20"]

    def printed(*flags):
        main([*given, *flags])
        return capsys.readouterr().out.removeprefix("bad cab").removesuffix("\n")

    greedy = printed("--sliding", "--greedy")
    assert greedy == written(model, config(greedy=True)) == printed("--sliding", "--top_k", "1")
    assert greedy == printed("--sliding", "--top_p", "1e-9", "--temperature", "3")
    text = printed("--sliding")
    assert printed("--sliding", "--stop", text[5]) == text[: text.index(text[5])]
    penalty = ["--sliding", "--greedy", "--repetition_penalty", "3"]
    assert printed(*penalty) == written(model, config(greedy=True, repetition_penalty=3.0))
    assert printed(*penalty) != greedy
    steer = [f"--{name}={value}" for name, value in LEANING.items()]
    pushed = written(model, config(steer_scale=9.0, **LEANING))
    assert printed("--sliding", *steer, "--steer_scale", "9") == pushed != text
    given = given[:-2]
    assert printed() == text[:2]  # what fits into n_ctx=9


def test_the_program_writes_with_a_folder_of_weights(tmp_path, capsys):
    model = tiny_model(n_layers=1, d_vocab=256, tie_embeddings=True)
    model.save_pretrained(tmp_path)
    state = BYTES.state_dict()
    vocab = {token: i for i, token in enumerate(state["tokens"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    main(["--model", str(tmp_path), "--prompt", "é", "--sliding", "--max_new_tokens", "30"])
    cfg = GenerateConfig(prompt="é", sliding=True, max_new_tokens=30)
    assert capsys.readouterr().out == "é" + "".join(generate_text(model, BYTES, cfg)) + "\n"


def test_the_program_looks_for_a_model_where_downloads_are_kept(monkeypatch, capsys):
    asked = []

    def pretrained(name, device, cache_dir=None):
        asked.append((name, device, cache_dir))
        return tiny_model(), TOKENIZER

    monkeypatch.setattr("generate.load_pretrained", pretrained)
    main(["--model", "gpt2", "--cache_dir", "there", "--prompt", "bad", "--max_new_tokens", "2"])
    assert asked == [("gpt2", torch.device("cpu"), "there")]
    assert capsys.readouterr().out.startswith("bad")


def test_a_stop_of_a_tokenizer_without_endoftext_is_that_token():
    cfg = GenerateConfig(prompt="a", max_new_tokens=5, stop="e")
    assert "e" not in "".join(generate_text(tiny_model(d_vocab=256), BYTES, cfg))


def test_two_texts_at_once_do_not_disturb_each_other():
    model = tiny_model()
    plain = config(greedy=True)
    pushed = config(greedy=True, steer_scale=20.0, **LEANING)
    alone = written(model, plain), written(model, pushed)
    both = zip(generate_text(model, TOKENIZER, plain), generate_text(model, TOKENIZER, pushed),
               strict=True)
    assert tuple(map("".join, zip(*both, strict=True))) == alone
