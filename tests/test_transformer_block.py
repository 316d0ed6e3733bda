"""LayerNorm, the sum in a block, and split inputs of heads."""

import pytest
import torch
from helpers import tiny_model, tiny_tokens
from torch import nn

from config import ModelConfig
from transformer_block import make_norm
from utils import seeded_generator

READERS = ["q", "k", "v"]


def noise(*shape, seed=3):
    return torch.randn(*shape, generator=seeded_generator(seed), dtype=torch.float64)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def everything(name):
    return True


def cached(model, tokens, *fwd_hooks):
    """All activations of a run in which those hooks edit."""
    with torch.no_grad(), model.hooks(fwd_hooks):
        return model.run_with_cache(tokens, names_filter=everything)[1]


def double_model(**changes):
    return tiny_model(dtype=torch.float64, **changes)


# LayerNorm


def tiny_norm(**changes):
    norm = make_norm(ModelConfig(d_model=12, **changes)).double()
    nn.init.normal_(norm.w, 1, 0.5, generator=seeded_generator(4))
    nn.init.normal_(norm.b, generator=seeded_generator(5))
    return norm.requires_grad_(False)


def inert(tensor, hook):
    return None


@pytest.mark.parametrize("changes", [{}, {"norm_epsilon": 0.1}], ids=str)
@pytest.mark.parametrize("point", ["none", "hook_scale", "hook_normalized"])
def test_layernorm_equals_torchs_with_and_without_listeners(point, changes):
    norm = tiny_norm(**changes)
    how = {"eps": changes["norm_epsilon"]} if changes else {}  # torch's own is GPT-2's
    theirs = nn.LayerNorm(12, **how).double()
    theirs.load_state_dict({"weight": norm.w, "bias": norm.b})
    if point != "none":
        getattr(norm, point).add(inert)
    for size in (1e-3, 1, 1e3):  # the small one shows where epsilon stands
        resid = size * (noise(2, 7, 12) + 1)
        assert_same(norm(resid), theirs(resid))
        assert_same(norm.fused(resid), theirs(resid))


def test_the_hooks_of_layernorm_see_the_scale_and_the_vector_before_gain_and_shift():
    norm = tiny_norm()
    resid = noise(2, 7, 12)
    seen = {}
    norm.hook_scale.add(lambda tensor, hook: seen.update(scale=tensor))
    norm.hook_normalized.add(lambda tensor, hook: seen.update(normalized=tensor))
    out = norm(resid)
    assert_same(seen["scale"], (resid.var(-1, correction=0, keepdim=True) + 1e-5).sqrt())
    assert_same(seen["normalized"] * seen["scale"], resid - resid.mean(-1, keepdim=True))
    assert_same(seen["normalized"] * norm.w + norm.b, out)


def test_twice_the_scale_halves_the_normalised_vector():
    norm, resid = tiny_norm(), noise(2, 7, 12)
    plain = norm(resid)
    norm.hook_scale.add(lambda scale, hook: 2 * scale)
    assert_same(norm(resid) - norm.b, (plain - norm.b) / 2)


def test_without_a_norm_the_parts_read_the_stream_itself():
    model = double_model(norm="none")
    cache = cached(model, tiny_tokens())
    assert not any("ln" in name for name in cache)
    pre = cache["resid_mid", 1] @ model.W_in[1] + model.b_in[1]
    assert_same(cache["pre", 1], pre.detach())


# The sum


def test_the_stream_is_the_sum_of_all_writes():
    cache = cached(double_model(), tiny_tokens())
    for layer in range(2):
        assert_same(cache["resid_pre", layer] + cache["attn_out", layer], cache["resid_mid", layer])
        assert_same(cache["resid_mid", layer] + cache["mlp_out", layer], cache["resid_post", layer])
        assert torch.equal(cache["mlp_in", layer], cache["resid_mid", layer])


def test_a_block_of_attention_alone_has_no_middle_and_adds_attention_only():
    model = double_model(attn_only=True)
    cache = cached(model, tiny_tokens())
    assert not any(part in name for name in model.hook_points() for part in ("mid", "mlp", "ln2"))
    assert not any("mlp" in name or "ln2" in name for name in model.state_dict())
    assert_same(cache["resid_pre", 1] + cache["attn_out", 1], cache["resid_post", 1])


def test_each_part_reads_its_own_normalised_stream():
    model = double_model()
    cache = cached(model, tiny_tokens())
    for layer, block in enumerate(model.blocks):
        with torch.no_grad():
            read = block.ln1.fused(cache["resid_pre", layer])
            assert_same(cache["attn_out", layer], block.attn(read, read, read))
            assert_same(cache["mlp_out", layer], block.mlp(block.ln2.fused(cache["mlp_in", layer])))


def test_an_edit_of_mlp_in_is_read_by_the_mlp_only():
    model, tokens, moved = double_model(), tiny_tokens(), noise(2, 7, 12)
    before = cached(model, tokens)
    after = cached(model, tokens, ("blocks.1.hook_mlp_in", lambda t, hook: t + moved))
    with torch.no_grad():
        block = model.blocks[1]
        expected = block.mlp(block.ln2.fused(before["resid_mid", 1] + moved))
    assert torch.equal(after["resid_mid", 1], before["resid_mid", 1])
    assert_same(after["mlp_out", 1], expected)
    assert_same(after["resid_post", 1], before["resid_mid", 1] + expected)


def test_an_edit_of_resid_mid_is_read_by_the_mlp_and_stays_in_the_stream():
    model, tokens, moved = double_model(), tiny_tokens(), noise(2, 7, 12)
    mid = cached(model, tokens)["resid_mid", 1] + moved
    after = cached(model, tokens, ("blocks.1.hook_resid_mid", lambda t, hook: t + moved))
    with torch.no_grad():
        expected = mid + model.blocks[1].mlp(model.blocks[1].ln2.fused(mid))
    assert_same(after["resid_post", 1], expected)


def test_an_edit_of_a_write_changes_the_stream_by_as_much():
    tokens, moved = tiny_tokens(), noise(2, 7, 12)
    for part in ("attn_out", "mlp_out", "resid_post"):
        model = double_model(attn_only=part == "attn_out")
        after = cached(model, tokens, (f"blocks.1.hook_{part}", lambda t, hook: t + moved))
        assert_same(after["resid_post", 1], cached(model, tokens)["resid_post", 1] + moved)


# Inputs that heads read apart


def test_listening_to_split_inputs_does_not_change_the_logits():
    tokens = tiny_tokens()
    for norm in ("layernorm", "none"):
        model = tiny_model(norm=norm, n_layers=1)
        for letters in ("q", "k", "v", "qkv"):
            hooks = [([f"blocks.0.hook_{letter}_input" for letter in letters], inert)]
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
            moved = (logits - model(tokens)).abs().max().item()
            assert moved < 1e-5, f"listening to what {letters} read moves the logits by {moved}"


def read_by_hand(model, letter, inputs):
    """q, k or v of block 1 from [batch, pos, head, d_model], a head at a time."""
    attn = model.blocks[1].attn
    W, b = getattr(attn, f"W_{letter.upper()}"), getattr(attn, f"b_{letter.upper()}")
    return torch.stack([inputs[:, :, head] @ W[head] + b[head] for head in range(3)], 2)


@pytest.mark.parametrize("norm", ["layernorm", "none"])
def test_an_edited_split_input_is_normalised_and_read_by_its_reader_alone(norm):
    model, tokens, moved = double_model(norm=norm), tiny_tokens(), noise(2, 7, 3, 12)
    before = cached(model, tokens)
    for letter in READERS:
        point = f"blocks.1.hook_{letter}_input"
        after = cached(model, tokens, (point, lambda t, hook: t + moved))
        with torch.no_grad():
            reads = model.blocks[1].ln1.fused(before["resid_pre", 1].unsqueeze(2) + moved)
            assert_same(after[letter, 1], read_by_hand(model, letter, reads))
        for other in {"q", "k", "v", "resid_pre"} - {letter}:
            assert torch.equal(after[other, 1], before[other, 1]), f"{point} moves {other}"
        assert not torch.allclose(after["attn_out", 1], before["attn_out", 1]), point


def test_an_edit_of_one_heads_copy_reaches_that_head_only():
    model, tokens, moved = double_model(), tiny_tokens(), noise(2, 7, 3, 12)
    moved[:, :, [0, 2]] = 0
    before = cached(model, tokens)
    for letter in READERS:
        after = cached(model, tokens, (f"blocks.1.hook_{letter}_input", lambda t, hook: t + moved))
        changed = (after[letter, 1] - before[letter, 1]).abs().amax((0, 1, 3))
        assert changed[1] > 0.1 and changed[0] == changed[2] == 0, f"{letter} moves by {changed}"
        assert torch.equal(after["result", 1][:, :, [0, 2]], before["result", 1][:, :, [0, 2]])


def test_an_edit_of_all_copies_alike_is_an_edit_of_what_attention_reads():
    model, tokens, moved = double_model(), tiny_tokens(), noise(2, 7, 12)
    points = [f"blocks.1.hook_{letter}_input" for letter in READERS]
    after = cached(model, tokens, (points, lambda t, hook: t + moved.unsqueeze(2)))
    stream = cached(model, tokens, ("blocks.1.hook_resid_pre", lambda t, hook: t + moved))
    assert_same(after["attn_out", 1], stream["attn_out", 1])


def test_the_split_inputs_are_the_stream_before_ln1_once_a_head():
    cache = cached(double_model(), tiny_tokens())
    for letter in READERS:
        for head in range(3):
            assert torch.equal(cache[f"{letter}_input", 1][:, :, head], cache["resid_pre", 1])


def test_edits_at_ln1_and_at_a_split_input_add_up():
    """q reads ln1's edited output plus the change that the edited copy makes in ln1's true one."""
    model, tokens = double_model(), tiny_tokens()
    at_input, at_ln1 = noise(2, 7, 3, 12), noise(2, 7, 12, seed=4)
    before = cached(model, tokens)
    after = cached(
        model, tokens,
        ("blocks.1.ln1.hook_normalized", lambda t, hook: t + at_ln1),
        ("blocks.1.hook_q_input", lambda t, hook: t + at_input),
    )
    with torch.no_grad():
        ln1, resid = model.blocks[1].ln1, before["resid_pre", 1].unsqueeze(2)
        shared = (before["normalized", 1, "ln1"] + at_ln1) * ln1.w + ln1.b
        reads = shared.unsqueeze(2) + ln1.fused(resid + at_input) - ln1.fused(resid)
        assert_same(after["q", 1], read_by_hand(model, "q", reads))
        assert_same(after["k", 1], read_by_hand(model, "k", shared.unsqueeze(2).expand_as(reads)))
