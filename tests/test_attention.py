"""Attention against a triple loop, torch's own, and edits with a known effect; then its pasts."""

import math

import pytest
import torch
from helpers import tiny_model, tiny_tokens
from torch import nn

from attention import GrowingPast, causal_mask
from utils import UserError, seeded_generator

POINTS = ("q", "k", "v", "attn_scores", "pattern", "z", "result")


def noise(*shape, seed=3):
    return torch.randn(*shape, generator=seeded_generator(seed), dtype=torch.float64)


def tiny_attention(**changes):
    return tiny_model(dtype=torch.float64, **changes).blocks[0].attn


def run(attn, resid, **edits):
    """Its output and all that its hooks saw; edits: point=fn(tensor) put in place."""
    seen = {}
    removers = []
    for point in POINTS:
        hook = getattr(attn, f"hook_{point}")
        if point in edits:
            removers.append(hook.add(lambda tensor, hook, fn=edits[point]: fn(tensor)))
        removers.append(hook.add(lambda tensor, hook, point=point: seen.update({point: tensor})))
    try:
        with torch.no_grad():
            return attn(resid, resid, resid), seen
    finally:
        for remove in removers:
            remove()


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# What it computes


def test_attention_is_a_triple_loop_over_heads_queries_and_keys():
    attn, resid = tiny_attention(), noise(1, 5, 12)
    expected = attn.b_O.expand(5, 12).clone()
    for head in range(3):
        q, k, v = (resid[0] @ W[head] + b[head] for W, b in
                   ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V)))
        for query in range(5):
            match = [(q[query] @ k[key] / math.sqrt(4)).exp() for key in range(query + 1)]
            for key, weight in enumerate(match):
                expected[query] += weight / sum(match) * (v[key] @ attn.W_O[head])
    assert_same(attn(resid, resid, resid)[0], expected)
    assert_same(run(attn, resid)[0][0], expected)


def test_attention_is_torchs_multi_head_attention():
    attn, resid = tiny_attention(), noise(2, 7, 12)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({
        "in_proj_weight": attn.W_QKV.T, "in_proj_bias": attn.b_QKV,
        "out_proj.weight": attn.W_heads_out.T, "out_proj.bias": attn.b_heads_out,
    })
    future = torch.ones(7, 7).triu(1).bool()
    expected, pattern = theirs(resid, resid, resid, attn_mask=future, average_attn_weights=False)
    out, seen = run(attn, resid)
    assert_same(out, expected)
    assert_same(seen["pattern"], pattern)


def test_the_explicit_lines_and_the_fused_kernel_give_the_same_numbers():
    attn, resid = tiny_attention(), noise(2, 7, 12)
    assert_same(run(attn, resid)[0], attn(resid, resid, resid))


def test_the_rows_of_a_pattern_sum_to_one_and_nothing_looks_ahead():
    _, seen = run(tiny_attention(), noise(2, 7, 12))
    future = torch.ones(7, 7).triu(1).bool()
    assert_same(seen["pattern"].sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))
    assert (seen["attn_scores"][..., future] == -math.inf).all()
    assert seen["attn_scores"][..., ~future].isfinite().all()
    assert not seen["pattern"][..., future].any()


def test_the_heads_results_and_b_O_sum_to_the_output():
    for attn_bias in (True, False):
        attn, resid = tiny_attention(attn_bias=attn_bias), noise(2, 7, 12)
        out, seen = run(attn, resid)
        assert_same(out, attn(resid, resid, resid))
        assert_same(sum(seen["result"][:, :, head] for head in range(3)) + attn.b_O, out)
        for head in range(3):
            assert_same(seen["result"][:, :, head], seen["z"][:, :, head] @ attn.W_O[head])


def test_a_head_wired_to_the_previous_position_looks_there_and_nowhere_else():
    """The stream holds each position's one-hot code; W_Q turns code p into code p - 1."""
    attn = tiny_attention(n_heads=1)
    codes = torch.eye(12, dtype=torch.float64)[None, :9]
    with torch.no_grad():
        attn.b_QKV.zero_()
        attn.W_K[0] = torch.eye(12)
        attn.W_Q[0] = 100 * torch.eye(12).roll(-1, 1)
    pattern = run(attn, codes)[1]["pattern"][0, 0]
    assert_same(pattern.diagonal(-1), torch.ones(8, dtype=torch.float64))


def test_each_head_reads_with_its_own_weights_and_biases():
    attn, resid = tiny_attention(), noise(2, 7, 12)
    _, seen = run(attn, resid)
    for name, W, b in (("q", attn.W_Q, attn.b_Q), ("k", attn.W_K, attn.b_K),
                       ("v", attn.W_V, attn.b_V)):
        for head in range(3):
            assert_same(seen[name][:, :, head], resid @ W[head] + b[head])


def test_split_inputs_give_q_k_and_v_an_input_each():
    attn, reads = tiny_attention(), [noise(2, 7, 12, seed=seed) for seed in range(3)]
    per_head = [read.unsqueeze(2).expand(-1, -1, 3, -1) for read in reads]
    q, k, v = attn.project(*reads)
    for got, read, W, b in ((q, reads[0], attn.W_Q, attn.b_Q), (k, reads[1], attn.W_K, attn.b_K),
                            (v, reads[2], attn.W_V, attn.b_V)):
        for head in range(3):
            assert_same(got[:, :, head], read @ W[head] + b[head])
    assert_same(attn(*per_head), attn(*reads))


def test_dropout_acts_on_the_pattern_after_its_hook_and_only_in_training():
    attn, resid = tiny_attention(dropout=0.5), noise(1, 7, 12).expand(2000, -1, -1)
    expected = tiny_attention()(resid[:1], resid[:1], resid[:1])
    assert_same(attn(resid[:1], resid[:1], resid[:1]), expected)
    assert_same(run(attn, resid[:1])[0], expected)

    attn.train()
    torch.manual_seed(0)
    explicit, seen = run(attn, resid)
    for out in (attn(resid, resid, resid), explicit):
        assert out.std(0).max() > 0.1
        torch.testing.assert_close(out.mean(0), expected[0], rtol=0, atol=0.2)
    assert_same(seen["pattern"].sum(-1), torch.ones(2000, 3, 7, dtype=torch.float64))


# Edits whose effect is known


def only_head(head, fn):
    """Applies fn to one head of [batch, pos, head, ...]."""
    def edit(tensor):
        tensor = tensor.clone()
        tensor[:, :, head] = fn(tensor[:, :, head])
        return tensor
    return edit


def test_zeroing_what_a_head_moves_is_zeroing_its_W_O():
    attn, resid = tiny_attention(), noise(2, 7, 12)
    edited = [run(attn, resid, **{point: only_head(1, torch.zeros_like)})[0]
              for point in ("z", "result", "v")]
    with torch.no_grad():
        attn.W_O[1] = 0
    for out in edited:
        assert_same(out, attn(resid, resid, resid))


def test_with_all_heads_zeroed_only_b_O_is_left():
    attn, resid = tiny_attention(), noise(2, 7, 12)
    for point in ("z", "result", "v", "pattern"):
        assert_same(run(attn, resid, **{point: torch.zeros_like})[0], attn.b_O.expand(2, 7, 12))


def test_an_edit_of_z_acts_without_listeners_at_the_scores():
    attn, resid = tiny_attention(), noise(2, 7, 12)
    remove = attn.hook_z.add(lambda z, hook: torch.zeros_like(z))
    assert_same(attn(resid, resid, resid), attn.b_O.expand(2, 7, 12))
    remove()


def test_a_uniform_pattern_takes_the_mean_of_the_values():
    _, seen = run(tiny_attention(), noise(2, 7, 12), pattern=lambda t: torch.full_like(t, 1 / 7))
    assert_same(seen["z"], seen["v"].mean(1, keepdim=True).expand(-1, 7, -1, -1))


def test_equal_scores_take_the_mean_of_the_values_so_far():
    _, seen = run(tiny_attention(), noise(2, 7, 12),
                  attn_scores=lambda t: torch.where(t.isinf(), t, 0))
    for query in range(7):
        assert_same(seen["z"][:, query], seen["v"][:, : query + 1].mean(1))


def test_a_constant_added_to_a_row_of_scores_changes_nothing():
    attn, resid = tiny_attention(), noise(2, 7, 12)
    out, seen = run(attn, resid, attn_scores=lambda t: t + noise(2, 3, 7, 1))
    assert_same(out, attn(resid, resid, resid))
    assert (seen["attn_scores"] - run(attn, resid)[1]["attn_scores"])[..., 0].abs().min() > 0


def test_edited_queries_and_keys_give_the_edited_scores():
    attn, resid, visible = tiny_attention(), noise(2, 7, 12), torch.ones(7, 7).tril().bool()
    q, k = noise(2, 7, 3, 4, seed=4), noise(2, 7, 3, 4, seed=5)
    _, seen = run(attn, resid, q=lambda t: q, k=lambda t: k)
    expected = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    assert_same(seen["attn_scores"][..., visible], expected[..., visible])
    assert_same(seen["v"], run(attn, resid)[1]["v"])


def test_doubled_values_double_what_is_moved():
    attn, resid = tiny_attention(), noise(2, 7, 12)
    out, seen = run(attn, resid, v=lambda t: 2 * t)
    plain, before = run(attn, resid)
    assert_same(seen["z"], 2 * before["z"])
    assert_same(out - attn.b_O, 2 * (plain - attn.b_O))


# Pasts


def test_the_queries_are_the_last_positions_and_a_hidden_key_is_seen_by_itself_alone():
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    hidden = causal_mask(3, 3, torch.tensor([[False, True, True], [True, False, True]]))
    assert hidden.int().tolist() == [[[[1, 0, 0], [0, 1, 0], [0, 1, 1]]],
                                     [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]]


@torch.no_grad()
def step(model, tokens, past, positions):
    """The logits of new tokens after a past."""
    return model.unembed(model.run_blocks(model.embed(tokens, positions), past=past))


def is_pattern(name):
    return name.endswith("hook_pattern")


def inert(tensor, hook):
    return None


# Listening to the pattern makes attention run its explicit lines instead of the fused kernel.
both_ways = pytest.mark.parametrize("fwd_hooks", [[], [(is_pattern, inert)]],
                                    ids=["fused", "explicit"])


@both_ways
def test_decoding_some_tokens_at_a_time_gives_the_logits_of_the_whole(fwd_hooks):
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens(pos=9)
    one_by_one = [range(p, p + 1) for p in range(9)]
    for spans in (one_by_one, [range(4), range(4, 5), range(5, 9)]):
        past = [GrowingPast(9) for _ in model.blocks]
        with model.hooks(fwd_hooks):
            steps = [step(model, tokens[:, list(span)], past, torch.tensor(span))
                     for span in spans]
        assert_same(torch.cat(steps, 1), model(tokens).detach())


@both_ways
def test_each_row_of_a_ragged_batch_gives_what_it_gives_alone(fwd_hooks):
    """Rows of 2, 5 and 7 tokens are padded on the left; then two more tokens are decoded."""
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens(batch=3, pos=9)
    padding = torch.tensor([5, 2, 0])[:, None]
    key_mask = torch.arange(9) >= padding
    positions = (torch.arange(9) - padding).clamp(min=0)
    past = [GrowingPast(9, key_mask) for _ in model.blocks]
    with model.hooks(fwd_hooks):
        logits = torch.cat([step(model, tokens[:, span], past, positions[:, span])
                            for span in (slice(0, 7), slice(7, 8), slice(8, 9))], 1)
    for row, pad in enumerate(padding.flatten()):
        assert_same(logits[row, pad:], model(tokens[row : row + 1, pad:])[0].detach())


def cached_prefix(model, tokens, n, key_mask=None):
    """The past of the first n positions, one object a layer."""
    _, cache = model.run_with_cache(tokens)
    past = [GrowingPast(9, key_mask) for _ in model.blocks]
    for layer, one in enumerate(past):
        one.extend(cache["k", layer][:, :n], cache["v", layer][:, :n])
    return past


@both_ways
def test_a_run_of_the_suffix_after_a_cached_prefix_equals_the_whole_run(fwd_hooks):
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    for n in (1, 4, 6):
        past = cached_prefix(model, tokens, n)
        with model.hooks(fwd_hooks):
            logits = step(model, tokens[:, n:], past, torch.arange(n, 7))
        assert_same(logits, model(tokens)[:, n:].detach())


@both_ways
def test_a_hidden_key_of_a_prefix_is_one_whose_score_is_minus_infinity(fwd_hooks):
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    key_mask = torch.arange(9)[None] != 1

    def hide(scores, hook):
        scores = scores.clone()
        scores[:, :, 4:, 1] = -math.inf
        return scores

    every_layer = [f"blocks.{layer}.attn.hook_attn_scores" for layer in range(2)]
    expected = model.run_with_hooks(tokens, fwd_hooks=[(every_layer, hide)])[:, 4:]
    past = cached_prefix(model, tokens, 4, key_mask)
    with model.hooks(fwd_hooks):
        assert_same(step(model, tokens[:, 4:], past, torch.arange(4, 7)), expected.detach())


def test_hooks_see_the_new_keys_and_values_only_and_patterns_over_all_of_them():
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    _, whole = model.run_with_cache(tokens)
    past = [GrowingPast(9) for _ in model.blocks]
    step(model, tokens[:, :4], past, torch.arange(4))
    with model.caching() as cache:
        step(model, tokens[:, 4:], past, torch.arange(4, 7))
    for layer in range(2):
        for name in ("q", "k", "v", "z", "resid_post"):
            assert_same(cache[name, layer], whole[name, layer][:, 4:])
        for name in ("attn_scores", "pattern"):
            assert_same(cache[name, layer], whole[name, layer][:, :, 4:])


def test_a_past_that_is_full_raises_and_keeps_what_it_held():
    k, v = noise(2, 3, 3, 4), noise(2, 3, 3, 4, seed=4)
    past = GrowingPast(5)
    past.extend(k, v)
    with pytest.raises(UserError, match=r"6 positions.*n_ctx=5"):
        past.extend(k, v)
    all_k, all_v, mask = past.extend(k[:, :2], v[:, :2])
    assert torch.equal(all_k, torch.cat([k, k[:, :2]], 1)) and mask is None
    assert torch.equal(all_v, torch.cat([v, v[:, :2]], 1))
