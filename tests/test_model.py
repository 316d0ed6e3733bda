"""The whole model against a forward pass written by hand from its weights, and its contract."""

import math

import pytest
import torch
from helpers import WIDE, refusal, tiny_model, tiny_tokens

from attention import GrowingPast
from config import ModelConfig
from losses import next_token_loss
from model import GPT
from utils import UserError, seeded_generator

SHAPES = [
    {},
    {"tie_embeddings": True},
    {"attn_only": True},
    {"norm": "none", "n_layers": 1},
    {"positions": "sinusoidal"},
    {"positions": "none"},
    {"attn_bias": False},
    {"unembed_bias": True},
    {"activation": "relu", "d_mlp": 5},
    {"n_layers": 0},
    {"n_layers": 0, "attn_only": True, "norm": "none"},
    {"n_heads": 1, "n_layers": 3},
    {**WIDE, "d_vocab_out": 13, "unembed_bias": True},
    {"d_head": 2, "d_vocab_out": 4, "n_heads": 5, "norm_epsilon": 0.0},
]
ATTENTION_WEIGHTS = ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"]
MLP_WEIGHTS = ["W_in", "b_in", "W_out", "b_out"]


def by_hand(model, tokens, positions=None):
    """The logits from the stacked weights alone, one head at a time."""
    cfg = model.cfg
    resid = model.W_E[tokens]
    if cfg.positions != "none":
        where = torch.arange(tokens.shape[1]) if positions is None else positions
        resid = resid + model.W_pos[where]
    for layer in range(cfg.n_layers):
        block = model.blocks[layer]
        resid = resid + attention_by_hand(model, layer, norm_by_hand(resid, block.ln1, cfg))
        if not cfg.attn_only:
            resid = resid + mlp_by_hand(model, layer, norm_by_hand(resid, block.ln2, cfg))
    return norm_by_hand(resid, model.ln_final, cfg) @ model.W_U + model.b_U


def norm_by_hand(resid, norm, cfg):
    if cfg.norm == "none":
        return resid
    centred = resid - resid.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + cfg.norm_epsilon).sqrt() * norm.w + norm.b


def attention_by_hand(model, layer, resid):
    out = model.b_O[layer]
    future = torch.ones(resid.shape[1], resid.shape[1]).triu(1).bool()
    for head in range(model.cfg.n_heads):
        q = resid @ model.W_Q[layer, head] + model.b_Q[layer, head]
        k = resid @ model.W_K[layer, head] + model.b_K[layer, head]
        v = resid @ model.W_V[layer, head] + model.b_V[layer, head]
        scores = (q @ k.mT / math.sqrt(model.cfg.d_head)).masked_fill(future, -math.inf)
        out = out + scores.softmax(-1) @ v @ model.W_O[layer, head]
    return out


def mlp_by_hand(model, layer, resid):
    pre = resid @ model.W_in[layer] + model.b_in[layer]
    if model.cfg.activation == "relu":
        post = pre.clamp(min=0)
    elif model.cfg.activation == "gelu_exact":
        post = pre * torch.special.ndtr(pre)
    else:
        post = pre / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)))
    return post @ model.W_out[layer] + model.b_out[layer]


def everything(name):
    return True


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_logits_equal_a_forward_pass_written_by_hand(changes):
    model, tokens = tiny_model(dtype=torch.float64, **changes), tiny_tokens()
    expected = by_hand(model, tokens)
    explicit, _ = model.run_with_cache(tokens, names_filter=everything)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(explicit, expected, rtol=0, atol=1e-10)


def test_float32_logits_equal_the_float64_ones_to_rounding():
    tokens = tiny_tokens()
    exact = tiny_model(dtype=torch.float64)(tokens).float()
    torch.testing.assert_close(tiny_model()(tokens), exact, rtol=0, atol=1e-5)


def test_gpt2_small_has_its_124_439_808_parameters_and_untied_one_table_more():
    gpt2 = {"n_layers": 12, "n_heads": 12, "d_model": 768, "n_ctx": 1024, "d_vocab": 50257}
    with torch.device("meta"):
        tied = GPT(ModelConfig(**gpt2, tie_embeddings=True), seed=None)
        untied = GPT(ModelConfig(**gpt2), seed=None)
    assert tied.n_parameters == 124_439_808
    assert untied.n_parameters == 124_439_808 + 50257 * 768


def test_an_untrained_model_is_about_as_surprised_as_a_uniform_guess():
    tokens = tiny_tokens(batch=16, pos=64, d_vocab=65)
    loss = next_token_loss(GPT(ModelConfig(d_vocab=65))(tokens), tokens)
    assert loss.item() == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize("listened", [False, True], ids=["fused", "explicit"])
def test_future_tokens_cannot_change_past_logits(listened):
    model, tokens = tiny_model(), tiny_tokens()
    inert = [(everything, lambda tensor, hook: None)] if listened else []
    before = model.run_with_hooks(tokens, fwd_hooks=inert)
    for position in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        after = model.run_with_hooks(changed, fwd_hooks=inert)
        assert torch.equal(after[:, :position], before[:, :position])
        assert (after[:, position:] != before[:, position:]).any(-1).all()  # but do change these


def test_rows_of_a_batch_do_not_see_each_other():
    model, tokens = tiny_model(), tiny_tokens(batch=3)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, rtol=0, atol=1e-5)


# The weights by name


def test_stacked_weights_are_differentiable_copies():
    for name in ATTENTION_WEIGHTS + MLP_WEIGHTS:
        model, tokens = tiny_model(), tiny_tokens()
        logits, stacked = model(tokens), getattr(model, name)
        stacked.square().sum().backward()
        part = "attn" if name in ATTENTION_WEIGHTS else "mlp"
        reached = sum(w.grad.square().sum() for w in model.parameters() if w.grad is not None)
        torch.testing.assert_close(reached, 4 * stacked.square().sum())  # d(w²)/dw = 2w, once each
        for layer, weight in enumerate(stacked):
            own = getattr(getattr(model.blocks[layer], part), name)
            assert torch.equal(weight, own), f"{name} of layer {layer} is another"
        with torch.no_grad():
            stacked.zero_()
        assert torch.equal(model(tokens), logits), f"the stacked {name} is not a copy"


def test_writing_into_a_weight_of_a_block_changes_the_model():
    for name in ATTENTION_WEIGHTS + MLP_WEIGHTS:
        model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
        before = model(tokens)
        part = model.blocks[1].attn if name in ATTENTION_WEIGHTS else model.blocks[1].mlp
        weight = getattr(part, name)
        with torch.no_grad():
            weight[1] = torch.randn(weight[1].shape, generator=seeded_generator(3))
        after = model(tokens)
        torch.testing.assert_close(after, by_hand(model, tokens), rtol=0, atol=1e-10)
        if name != "b_K":  # moves all scores of a query alike, which the softmax cannot see
            assert (after - before).abs().max() > 1e-3, f"a write into {name} is lost"


def test_the_queries_of_one_head_are_its_own_columns():
    model = tiny_model()
    others = torch.stack([model.W_Q, model.W_K, model.W_V])
    with torch.no_grad():
        model.blocks[0].attn.W_K[2] = 7
    others[1, 0, 2] = 7
    assert torch.equal(torch.stack([model.W_Q, model.W_K, model.W_V]), others)


def test_zero_layers_give_empty_stacks_of_the_right_shape():
    model, one = tiny_model(n_layers=0), tiny_model(n_layers=1)
    for name in ATTENTION_WEIGHTS + MLP_WEIGHTS:
        assert getattr(model, name).shape == (0, *getattr(one, name).shape[1:])


def test_a_tied_readout_is_the_embedding_itself_transposed():
    model = tiny_model(tie_embeddings=True)
    with torch.no_grad():
        model.W_E[3, 5] = 42
    assert model.W_U[5, 3] == 42 and "unembedding.W_U" not in model.state_dict()


def test_biases_that_a_model_lacks_read_as_zeros():
    model = tiny_model(attn_bias=False)
    assert not any(getattr(model, name).any() for name in ("b_Q", "b_K", "b_V", "b_O", "b_U"))
    assert not any("b_QKV" in name or "b_heads_out" in name for name in model.state_dict())


def test_weights_that_a_model_lacks_raise():
    with pytest.raises(UserError, match=r"attn_only=True.*W_in"):
        tiny_model(attn_only=True).W_in  # noqa: B018
    with pytest.raises(UserError, match="positions='none'"):
        tiny_model(positions="none").W_pos  # noqa: B018


# A part of the way


@pytest.mark.parametrize("norm", ["layernorm", "none"])
def test_a_restart_from_any_cached_stream_gives_the_logits(norm):
    model, tokens = tiny_model(n_layers=3, norm=norm, dtype=torch.float64), tiny_tokens()
    logits, cache = model.run_with_cache(tokens)
    for layer in range(3):
        restarted = model.unembed(model.run_blocks(cache["resid_pre", layer], start=layer))
        torch.testing.assert_close(restarted, logits, rtol=0, atol=1e-10)
        with model.caching():  # with the same points listened to, to the bit
            again = model.unembed(model.run_blocks(cache["resid_pre", layer], start=layer))
        assert torch.equal(again, logits)


def test_the_blocks_may_be_run_in_two_parts():
    model, tokens = tiny_model(n_layers=3), tiny_tokens()
    for cut in range(4):
        half = model.run_blocks(model.embed(tokens), stop=cut)
        assert torch.equal(model.unembed(model.run_blocks(half, start=cut)), model(tokens))


def test_blocks_that_do_not_exist_raise():
    model = tiny_model()
    resid = model.embed(tiny_tokens())
    ways = (((-1, 2), "start=-1"), ((0, 3), "stop=3"), ((2, 1), "stop=1"), ((0, -1), "stop=-1"),
            ((3, None), "start=3"))
    for way, told in ways:
        assert told in refusal(lambda way=way: model.run_blocks(resid, *way), way)


def test_past_is_counted_by_absolute_layer():
    model, tokens = tiny_model(), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    past = [None, GrowingPast(9)]
    past[1].extend(cache["k", 1][:, :4], cache["v", 1][:, :4])
    resid = model.run_blocks(cache["resid_pre", 1][:, 4:], start=1, past=past)
    torch.testing.assert_close(resid, cache["resid_post", 1][:, 4:], rtol=0, atol=1e-5)


def test_positions_may_be_given_for_all_rows_or_for_each():
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens(pos=4)
    assert torch.equal(model.embed(tokens, torch.arange(4)), model.embed(tokens))
    for positions in (torch.tensor([5, 6, 7, 8]), torch.tensor([[0, 0, 1, 2], [3, 1, 4, 1]])):
        logits = model.unembed(model.run_blocks(model.embed(tokens, positions)))
        torch.testing.assert_close(logits, by_hand(model, tokens, positions), rtol=0, atol=1e-10)


def test_positions_outside_of_the_context_or_of_another_shape_raise():
    model, tokens = tiny_model(), tiny_tokens(pos=2)
    for positions, seen in (([-1, 0], "-1 to 0"), ([8, 9], "8 to 9"), ([0, 1, 2], "[3]"),
                            ([[0, 1]], "[1, 2]")):
        message = refusal(lambda p=positions: model.embed(tokens, torch.tensor(p)), positions)
        assert seen in message, f"{positions} is refused as {message}"


# The start


def test_initial_weights_are_gpt2s():
    model = GPT(ModelConfig(d_vocab=65, n_layers=3, init_scale=0.05))
    writers = ("W_heads_out", "W_out")
    for name, weight in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if weight.ndim == 2:
            expected = 0.05 / math.sqrt(2 * 3) if leaf in writers else 0.05
            assert weight.std().item() == pytest.approx(expected, rel=0.04), name
            assert abs(weight.mean().item()) < 0.04 * expected, name
        else:
            assert torch.equal(weight, torch.full_like(weight, leaf == "w")), name


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    cfg = ModelConfig(d_vocab=11)
    first, again, other = GPT(cfg, seed=3), GPT(cfg, seed=3), GPT(cfg, seed=4)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert weight.ndim == 1 or not torch.equal(weight, other.state_dict()[name])


def test_initial_weights_neither_need_nor_move_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = GPT(ModelConfig(d_vocab=11)).W_E
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(GPT(ModelConfig(d_vocab=11)).W_E, first)


def test_dropout_acts_in_training_only():
    model, plain, tokens = tiny_model(dropout=0.5), tiny_model(), tiny_tokens()
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(tokens), model(tokens))
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens))


def test_dropout_acts_on_the_embedding_and_on_the_output_of_each_part():
    model, tokens = tiny_model(dropout=0.5).train(), tiny_tokens(batch=50)
    torch.manual_seed(0)
    _, cache = model.run_with_cache(tokens)
    before = cache["embed"] + cache["pos_embed"]
    dropped = cache["resid_pre", 0] == 0
    assert torch.equal(cache["resid_pre", 0][~dropped], 2 * before[~dropped])
    for written in (cache["resid_pre", 0], cache["attn_out", 1], cache["mlp_out", 1]):
        assert (written == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


# What must not pass


def test_tokens_that_the_model_cannot_read_raise():
    model = tiny_model()
    for tokens, seen in (([[0, -1]], "-1 to 0"), ([[3, 11]], "3 to 11"), ([[0.0, 1.0]], "float32"),
                         ([[True, False]], "bool"), ([1, 2, 3], "[3]"), ([[[1]]], "[1, 1, 1]"),
                         ([[]], "[1, 0]"), ([[0] * 10], "n_ctx=9")):
        message = refusal(lambda tokens=tokens: model(torch.tensor(tokens)), tokens)
        assert seen in message, f"{tokens} is refused as {message}"


def test_the_longest_text_that_fits_is_read():
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens(pos=9)
    torch.testing.assert_close(model(tokens), by_hand(model, tokens), rtol=0, atol=1e-10)


def test_a_model_without_a_vocabulary_raises():
    with pytest.raises(UserError, match="d_vocab"):
        GPT(ModelConfig())


@pytest.mark.parametrize("d_vocab", [2049, 2050])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True},
                                     {"tie_embeddings": True, "unembed_bias": True}], ids=str)
def test_the_logits_of_a_large_vocabulary_are_products_with_W_U(changes, d_vocab):
    model = tiny_model(d_vocab=d_vocab, **changes)
    resid = torch.randn(2, 6, model.cfg.d_model, generator=seeded_generator(0))
    normalized = model.ln_final(resid).detach()
    for some in (normalized, normalized[:1, :1], normalized[:, :1], normalized[:1, :3],
                 normalized[:, :2].unsqueeze(0), normalized[0], normalized[:, :0]):
        read = some.clone().requires_grad_()
        logits = model.unembedding(read, model.W_E)
        wanted = some @ model.W_U + model.b_U
        torch.testing.assert_close(logits, wanted)
        logits.sin().sum().backward()
        torch.testing.assert_close(read.grad, wanted.cos() @ model.W_U.T, rtol=1e-4, atol=1e-4)


def test_a_part_of_the_logits_equals_that_of_all_logits():
    for changes in ({}, {"tie_embeddings": True}, {"unembed_bias": True}):
        model = tiny_model(**changes)
        resid = torch.randn(4, 2, 5, model.cfg.d_model, generator=seeded_generator(0))
        logits = model.unembed(resid)
        for tokens in ([3, 0, 3], [[1, 2], [10, 0]]):
            ids = torch.tensor(tokens)
            ids = (ids if ids.ndim == 1 else ids[:, None]).expand(4, 2, 5, -1)
            wanted = logits.gather(-1, ids)
            torch.testing.assert_close(model.unembed(resid, tokens), wanted)
            some = model.unembed(resid, tokens, positions=torch.tensor([4, 1]))
            torch.testing.assert_close(some, wanted[:, :, [4, 1]])
