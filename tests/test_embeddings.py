"""Tokens and positions in, logits out: linear maps from one-hot vectors."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import refusal, tiny_model, tiny_tokens

from embeddings import check_tokens, sinusoidal_positions
from losses import next_token_loss
from utils import seeded_generator


def test_the_embedding_is_a_product_with_one_hot_vectors():
    model, tokens = tiny_model(), tiny_tokens()
    one_hot = F.one_hot(tokens, 11).float()
    _, cache = model.run_with_cache(tokens)
    assert torch.equal(cache["embed"], one_hot @ model.W_E)
    assert torch.equal(cache["pos_embed"], torch.eye(9)[:7].expand(2, 7, 9) @ model.W_pos)
    assert torch.equal(cache["resid_pre", 0], cache["embed"] + cache["pos_embed"])


def test_the_readout_is_a_dot_product_with_each_column_of_W_U():
    model = tiny_model(unembed_bias=True)
    resid = torch.randn(2, 3, 12, generator=seeded_generator(3))
    logits = model.unembedding(resid, model.W_E)
    for token in range(11):
        expected = (resid * model.W_U[:, token]).sum(-1) + model.b_U[token]
        torch.testing.assert_close(logits[..., token], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_large_vocabulary_in_parts_gives_the_logits_of_one_product(bias):
    model = tiny_model(d_vocab=2500, unembed_bias=bias)
    resid = torch.randn(2, 3, 12, generator=seeded_generator(3))
    parts = model.unembedding(resid, model.W_E)
    for token in (0, 1023, 1024, 2499):
        expected = (resid * model.W_U[:, token]).sum(-1) + model.b_U[token]
        torch.testing.assert_close(parts[..., token], expected, rtol=0, atol=1e-5)


def test_a_tied_table_gets_the_gradients_of_both_its_uses():
    tied, untied, tokens = tiny_model(tie_embeddings=True), tiny_model(), tiny_tokens()
    untied.load_state_dict(tied.state_dict() | {"unembedding.W_U": tied.W_U.detach()})
    for model in (tied, untied):
        next_token_loss(model(tokens), tokens).backward()
    both = untied.W_E.grad + untied.W_U.grad.T
    torch.testing.assert_close(tied.W_E.grad, both, rtol=0, atol=1e-6)


def test_an_edit_of_the_position_embedding_of_one_row_stays_in_that_row():
    model, tokens = tiny_model(), tiny_tokens()

    def edit(pos_embed, hook):
        return pos_embed + torch.tensor([0.0, 1.0])[:, None, None] * torch.arange(12)

    before = model(tokens)
    after = model.run_with_hooks(tokens, fwd_hooks=[("hook_pos_embed", edit)])
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1])


def test_without_positions_there_is_no_position_hook_and_the_stream_starts_as_the_tokens():
    model, tokens = tiny_model(positions="none"), tiny_tokens()
    assert "hook_pos_embed" not in model.hook_points()
    assert torch.equal(model.embed(tokens), model.W_E[tokens])


def test_sinusoidal_positions_follow_the_formula_of_the_paper():
    for d_model in (6, 7):
        table = sinusoidal_positions(20, d_model)
        for position in range(20):
            for i in range(d_model):
                angle = position / 10_000 ** ((i - i % 2) / d_model)
                expected = math.cos(angle) if i % 2 else math.sin(angle)
                assert table[position, i].item() == pytest.approx(expected, abs=1e-5)


def test_a_shift_of_sinusoidal_positions_is_one_rotation_everywhere():
    pairs = sinusoidal_positions(30, 8).unflatten(1, (4, 2))  # [pos, pair, (sin, cos)]
    turn = pairs[5]  # sin and cos of five steps at each wavelength
    sin, cos = pairs[:-5].unbind(-1)
    turned = torch.stack([sin * turn[:, 1] + cos * turn[:, 0],
                          cos * turn[:, 1] - sin * turn[:, 0]], -1)
    torch.testing.assert_close(pairs[5:], turned, rtol=0, atol=1e-5)


def test_the_sinusoidal_table_is_as_large_as_a_learned_one_starts_and_is_not_learned():
    model = tiny_model(positions="sinusoidal", init_scale=0.3)
    assert model.W_pos.square().mean().sqrt().item() == pytest.approx(0.3, rel=1e-5)
    direction = model.W_pos / sinusoidal_positions(9, 12)
    torch.testing.assert_close(direction[1:], torch.full((8, 12), 0.3 * math.sqrt(2)))
    assert not any("W_pos" in name for name in model.state_dict())
    assert all(weight is not model.W_pos for weight in model.parameters())


def test_every_id_of_the_vocabulary_passes_and_the_next_one_does_not():
    check_tokens(torch.arange(11)[None], 11)
    message = refusal(lambda: check_tokens(torch.arange(12)[None], 11), "id 11 of 11")
    assert "0 to 11" in message and "0 to 10" in message
