"""Re-parameterisations: no prediction moves, the input stays as it was, and the new weights have
what was promised of them."""

import dataclasses
import itertools

import pytest
import torch
from helpers import TINY, tiny_model, tiny_tokens
from torch.testing import assert_close

from config import ModelConfig
from model import GPT
from tokenizer import CharTokenizer
from utils import UserError, seeded_generator
from weight_circuits import (
    Drift,
    FactoredMatrix,
    centre_unembed,
    centre_writing_weights,
    composition_scores,
    drift,
    fold_layer_norm,
    fold_value_biases,
    ov_circuit,
    ov_eigenvalue_score,
    qk_circuit,
    read_through,
    svd_vocab,
)

ALL = [fold_layer_norm, centre_writing_weights, centre_unembed, fold_value_biases]
KINDS = [
    {}, {"tie_embeddings": True}, {"attn_bias": False}, {"attn_only": True}, {"n_layers": 0},
    {"positions": "sinusoidal", "unembed_bias": True}, {"positions": "none", "n_layers": 1},
    {"tie_embeddings": True, "unembed_bias": True, "attn_bias": False, "activation": "relu"},
    {"attn_only": True, "attn_bias": False, "positions": "none", "tie_embeddings": True},
]
each_way = pytest.mark.parametrize("change", ALL, ids=lambda change: change.__name__)
each_kind = pytest.mark.parametrize("changes", KINDS, ids=str)
each_precision = pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5),
                                                         (torch.float64, 1e-12)])


@torch.no_grad()
def log_probs(model, tokens):
    return model(tokens).log_softmax(-1)


def same_predictions(one, other, most):
    """Whether two models predict alike on texts that no module has seen."""
    tokens = tiny_tokens(batch=8, pos=TINY["n_ctx"], seed=77)
    return (log_probs(one, tokens) - log_probs(other, tokens)).abs().max().item() <= most


def assert_zero(tensor, most=1e-12):
    assert tensor.abs().max().item() <= most


# What holds for each


@each_precision
@each_kind
@each_way
def test_no_prediction_moves(change, changes, dtype, most):
    model = tiny_model(dtype=dtype, **changes)
    new, found = change(model)
    assert same_predictions(model, new, most)
    assert 0 <= found.log_probs <= most
    assert new.W_E.dtype == dtype and new is not model


@each_kind
@each_way
def test_the_input_stays_as_it_was_bit_for_bit_and_shares_nothing_with_the_output(change, changes):
    model = tiny_model(**changes)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits, cfg = model(tiny_tokens()), model.cfg
    new, _ = change(model)
    with torch.no_grad():
        for weight in new.parameters():
            weight.fill_(7.0)
    assert before.keys() == model.state_dict().keys() and model.cfg is cfg
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(model(tiny_tokens()), logits)
    assert not any(weight.grad is not None for weight in model.parameters())


@each_way
@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_in_the_mode_of_the_input_and_can_learn(change, training):
    model = tiny_model(dropout=0.0).train(training)
    new, _ = change(model)
    assert new.training is training is model.training
    new(tiny_tokens()).sum().backward()
    assert all(weight.requires_grad for weight in new.parameters())


@each_kind
def test_all_four_in_a_row_keep_the_predictions_and_each_other_s_promises(changes):
    new = model = tiny_model(dtype=torch.float64, **changes)
    for change in ALL:
        new, _ = change(new)
    assert same_predictions(model, new, 1e-12)
    again = tiny_model(dtype=torch.float64, **changes)
    for change in (fold_layer_norm, fold_value_biases, centre_unembed, centre_writing_weights):
        again, _ = change(again)
    assert same_predictions(model, again, 1e-12)
    assert_folded(again)
    assert_zero(again.W_U.mean(-1))
    assert_zero(again.b_V if len(again.blocks) else torch.zeros(1))
    assert_nothing_constant_is_written(again)


@each_way
def test_a_second_time_changes_nothing(change):
    once, _ = change(tiny_model(dtype=torch.float64))
    twice, _ = change(once)
    assert once.cfg == twice.cfg
    for weight, other in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-12, rtol=0)


# The drift


def drift_by_hand(model, new):
    """Position by position: the largest changes of log-probabilities and of logits."""
    log_probs_moved, logits_moved = [], []
    for text in torch.randint(11, (2, 9), generator=seeded_generator(0)):
        before, after = model(text[None])[0].detach(), new(text[None])[0].detach()
        for one, other in zip(before, after, strict=True):
            shift = one.exp().sum().log() - other.exp().sum().log()
            log_probs_moved.append((one - other - shift).abs().max().item())
            logits_moved.append((one - other).abs().max().item())
    return max(log_probs_moved), max(logits_moved)


@each_kind
def test_the_drift_is_the_largest_change_on_two_random_texts(changes):
    model = tiny_model(**changes)
    others = [change(model) for change in ALL]
    another = tiny_model(2, **changes)
    others.append((another, drift(model, another)))
    for new, found in others:
        wanted = drift_by_hand(model, new)
        assert (found.log_probs, found.logits) == pytest.approx(wanted, rel=1e-5, abs=3e-6)


def test_a_constant_on_all_logits_is_a_drift_of_logits_alone():
    model = tiny_model(dtype=torch.float64, unembed_bias=True)
    moved = tiny_model(dtype=torch.float64, unembed_bias=True)
    with torch.no_grad():
        moved.unembedding.b_U += 3.0
    found = drift(model, moved)
    assert found.logits == pytest.approx(3) and found.log_probs < 1e-12
    assert drift(model, model) == Drift(0.0, 0.0)
    assert drift(moved, model) == found


def test_a_longer_context_is_read_up_to_64_tokens():
    lengths = []
    model = tiny_model(n_ctx=100)
    with model.hooks([("hook_embed", lambda resid, hook: lengths.append(resid.shape))]):
        drift(model, model)
    assert lengths == [(2, 64, 12)] * 2


@pytest.mark.parametrize("changes", [KINDS[0], KINDS[3], KINDS[5]], ids=str)
@each_way
def test_an_error_in_any_weight_shows_as_drift(change, changes):
    model = tiny_model(**changes)
    new, _ = change(model)
    for name, weight in new.named_parameters():
        noise = 0.3 * torch.randn(weight.shape, generator=seeded_generator(5))
        with torch.no_grad():
            weight += noise
            assert drift(model, new).log_probs > 1e-3, name
            weight -= noise
    assert drift(model, new).log_probs < 2e-5


def test_a_report_cannot_be_edited():
    with pytest.raises(dataclasses.FrozenInstanceError):
        drift(tiny_model(), tiny_model()).logits = 0.0


# Folding LayerNorm


def layer_norms(model):
    return [norm for block in model.blocks for norm in
            ([block.ln1] if model.cfg.attn_only else [block.ln1, block.ln2])] + [model.ln_final]


def assert_folded(model):
    for norm in layer_norms(model):
        assert (norm.w == 1).all() and not norm.b.any()
    readers = [model.W_U] + [block.attn.W_QKV for block in model.blocks]
    readers += [] if model.cfg.attn_only else [block.mlp.W_in for block in model.blocks]
    for reader in readers:
        assert_zero(reader.sum(0), 1e-5 if reader.dtype == torch.float32 else 1e-12)


@each_kind
def test_folding_leaves_every_layer_norm_plain_and_every_reader_centred(changes):
    new, _ = fold_layer_norm(tiny_model(**changes))
    assert_folded(new)
    assert not new.cfg.tie_embeddings and new.cfg.attn_bias and new.cfg.unembed_bias


@pytest.mark.parametrize("attn_bias", [True, False])
def test_folded_weights_by_their_formula_head_by_head(attn_bias):
    model = tiny_model(dtype=torch.float64, attn_bias=attn_bias)
    new, _ = fold_layer_norm(model)
    for block, folded in zip(model.blocks, new.blocks, strict=True):
        for which in "QKV":
            W, b = (getattr(block.attn, f"{kind}_{which}") for kind in "Wb")
            for head in range(3):
                scaled = torch.diag(block.ln1.w) @ W[head]
                torch.testing.assert_close(getattr(folded.attn, f"W_{which}")[head],
                                           scaled - scaled.mean(0))
                torch.testing.assert_close(getattr(folded.attn, f"b_{which}")[head],
                                           b[head] + block.ln1.b @ W[head])
    torch.testing.assert_close(new.b_U, model.ln_final.b @ model.W_U)


@each_kind
def test_what_a_folded_model_reads_is_what_the_model_read_before_its_gains(changes):
    """Nothing but the weights moved: streams, patterns, neurons and normalised streams stay."""
    model, tokens = tiny_model(dtype=torch.float64, **changes), tiny_tokens()
    _, before = model.run_with_cache(tokens)
    _, after = fold_layer_norm(model)[0].run_with_cache(tokens)
    assert before.keys() == after.keys()
    assert "ln_final.hook_normalized" in before
    for name in before:
        torch.testing.assert_close(before[name], after[name], atol=1e-10, rtol=0)


# Centring what is written


def assert_nothing_constant_is_written(model, most=1e-12):
    _, cache = model.run_with_cache(tiny_tokens())
    for name, tensor in cache.items():
        if name.endswith(("embed", "_out", "resid_pre", "resid_mid", "resid_post")):
            assert_zero(tensor.mean(-1), most)
    writers = [model.W_E] + ([] if model.cfg.positions == "none" else [model.W_pos])
    if len(model.blocks):
        writers += [model.W_O, model.b_O]
        writers += [] if model.cfg.attn_only else [model.W_out, model.b_out]
    for weight in writers:
        assert_zero(weight.sum(-1), 12 * most)


@each_kind
def test_centred_weights_write_nothing_that_is_constant_along_the_stream(changes):
    new, _ = centre_writing_weights(tiny_model(dtype=torch.float64, **changes))
    assert_nothing_constant_is_written(new)


@each_kind
def test_centring_takes_the_mean_from_the_stream_and_nothing_else(changes):
    model, tokens = tiny_model(dtype=torch.float64, **changes), tiny_tokens()
    _, before = model.run_with_cache(tokens)
    _, after = centre_writing_weights(model)[0].run_with_cache(tokens)
    for name in before:
        wanted = before[name]
        if name.endswith(("embed", "_out", "resid_pre", "resid_mid", "resid_post", "mlp_in")):
            wanted = wanted - wanted.mean(-1, keepdim=True)
        torch.testing.assert_close(after[name], wanted, atol=1e-10, rtol=0)


def test_centring_makes_fixed_positions_a_table_and_keeps_none_none():
    for positions, becomes in (("sinusoidal", "learned"), ("learned", "learned"), ("none", "none")):
        new, _ = centre_writing_weights(tiny_model(positions=positions))
        assert new.cfg.positions == becomes
        assert ("position_embedding.W_pos" in dict(new.named_parameters())) == (becomes != "none")


@each_kind
def test_what_is_constant_along_the_stream_is_invisible_to_every_layer_norm(changes):
    model = tiny_model(dtype=torch.float64, **changes)
    resid = torch.randn(2, 5, 12, generator=seeded_generator(4), dtype=torch.float64)
    constant = torch.randn(2, 5, 1, generator=seeded_generator(5), dtype=torch.float64)
    for norm in layer_norms(model):
        torch.testing.assert_close(norm(resid + constant), norm(resid), atol=1e-10, rtol=0)
    one, other = (model.unembed(model.run_blocks(r)) for r in (resid, resid + constant))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


# The unembedding and the values


@each_kind
def test_centred_logits_sum_to_zero_and_differ_as_before(changes):
    model, tokens = tiny_model(dtype=torch.float64, **changes), tiny_tokens()
    new, found = centre_unembed(model)
    assert_zero(new.W_U.sum(-1), 1e-11)
    assert_zero(new.b_U.sum(), 1e-11)
    before, after = model(tokens), new(tokens)
    assert_zero(after.sum(-1), 1e-10)
    torch.testing.assert_close(after, before - before.mean(-1, keepdim=True), atol=1e-10, rtol=0)
    assert found.logits > 0.01 and found.log_probs < 1e-12
    assert new.cfg.unembed_bias == model.cfg.unembed_bias and not new.cfg.tie_embeddings


@each_kind
def test_values_without_their_bias_are_what_the_embedding_alone_moves(changes):
    model, tokens = tiny_model(dtype=torch.float64, **changes), tiny_tokens()
    new, found = fold_value_biases(model)
    _, before = model.run_with_cache(tokens)
    _, after = new.run_with_cache(tokens)
    for layer in range(model.cfg.n_layers):
        assert not new.b_V[layer].any()
        moved = sum(model.b_V[layer, head] @ model.W_O[layer, head] for head in range(3))
        torch.testing.assert_close(new.b_O[layer], model.b_O[layer] + moved)
        for name in ("v", "z"):
            wanted = before[name, layer] - model.b_V[layer]
            torch.testing.assert_close(after[name, layer], wanted, atol=1e-10, rtol=0)
        for name in ("q", "k", "pattern", "attn_out", "resid_post"):
            torch.testing.assert_close(after[name, layer], before[name, layer], atol=1e-10, rtol=0)
    assert found.logits < 1e-12 and new.cfg == model.cfg


@pytest.mark.parametrize("change", [centre_unembed, fold_value_biases])
def test_a_model_without_norms_has_its_logits_and_values_re_parameterised(change):
    model = tiny_model(dtype=torch.float64, norm="none", n_layers=1)
    new, _ = change(model)
    tokens = tiny_tokens()
    torch.testing.assert_close(log_probs(model, tokens), log_probs(new, tokens))


@pytest.mark.parametrize("change, what", [(fold_layer_norm, "fold"),
                                          (centre_writing_weights, "centre")])
def test_a_model_without_norms_cannot_be_folded_or_centred(change, what):
    with pytest.raises(UserError, match=rf"norm='none': there is no LayerNorm to {what} for"):
        change(tiny_model(norm="none"))


def test_the_drift_is_measured_without_dropout_and_the_mode_stays():
    model = tiny_model(dropout=0.5).train()
    new, found = fold_value_biases(model)
    assert found.log_probs < 1e-5 and model.training and new.training


# Circuits


def factored(seed=0, rank=3, batch=()):
    generator = seeded_generator(seed)
    A, B = (torch.randn(*batch, *shape, generator=generator).double()
            for shape in ((6, rank), (rank, 6)))
    return FactoredMatrix(A, B), A @ B


@pytest.mark.parametrize("batch", [(), (4,)])
def test_a_factored_matrix_is_its_product(batch):
    (one, dense), (other, dense_other) = factored(0, 3, batch), factored(1, 2, batch)
    vector = torch.randn(5, 6, generator=seeded_generator(2)).double()
    assert_close(one.AB, dense)
    assert one.shape == dense.shape and other.T.shape == dense.shape
    assert_close(one.T.AB, dense.mT)
    assert_close((one @ other).AB, dense @ dense_other)
    assert_close((one @ vector.T).AB, dense @ vector.T)
    assert_close((vector @ one).AB, vector @ dense)
    assert_close(one.norm(), dense.norm(dim=(-2, -1)))
    U, S, V = one.svd()
    assert_close(U @ torch.diag_embed(S) @ V.mT, dense)
    assert_close(S, torch.linalg.svdvals(dense)[..., :3])
    assert_close(U.mT @ U, torch.eye(3).double().expand(*batch, 3, 3))


def test_factored_eigenvalues_are_the_dense_ones_that_are_not_zero():
    one, dense = factored()
    expected = sorted(torch.linalg.eigvals(dense).tolist(), key=abs)[-3:]
    found = sorted(one.eigenvalues().tolist(), key=abs)
    for a, b in zip(sorted(found, key=str), sorted(expected, key=str), strict=True):
        assert abs(abs(a) - abs(b)) < 1e-9
    assert_close(sum(found), sum(expected))


def test_the_qk_circuit_gives_the_scores_and_the_ov_circuit_what_is_moved():
    model = tiny_model(dtype=torch.float64, attn_bias=False)
    for block in model.blocks:
        block.ln1.b.data.zero_()
    names = ["blocks.1.ln1.hook_normalized", "blocks.1.attn.hook_attn_scores",
             "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_result"]
    with torch.no_grad():
        cache = model.run_with_cache(tiny_tokens(), names)[1]
    normalized = cache["normalized", 1, "ln1"]
    for head in range(3):
        scores = normalized @ qk_circuit(model, 1, head).AB @ normalized.mT / 2
        visible = torch.ones(7, 7).tril().bool()
        assert_close(scores[:, visible], cache["attn_scores", 1][:, head, visible])
        moved = cache["pattern", 1][:, head] @ normalized @ ov_circuit(model, 1, head).AB
        assert_close(moved, cache["result", 1][:, :, head])


@torch.no_grad()
@pytest.mark.parametrize("norm", ["layernorm", "none"])
def test_composition_is_that_of_the_dense_products_and_nothing_without_a_later_layer(norm):
    model = tiny_model(dtype=torch.float64, n_layers=3, norm=norm)

    def ov_of(layer, head):
        ov = ov_circuit(model, layer, head).AB
        return ov if norm == "none" else ov - ov.mean(-1, keepdim=True)

    for kind in "QKV":
        scores = composition_scores(model, kind, n_draws=20).scores
        for l1, h1, l2, h2 in itertools.product(range(3), range(3), range(3), range(3)):
            ov, qk = ov_of(l1, h1), qk_circuit(model, l2, h2).AB
            reads = {"Q": qk, "K": qk.T, "V": ov_of(l2, h2)}[kind]
            expected = (ov @ reads).norm() / ov.norm() / reads.norm() if l1 < l2 else 0.0
            assert scores[l1, h1, l2, h2].item() == pytest.approx(float(expected))


def test_composition_does_not_depend_on_the_basis_inside_a_head():
    model = tiny_model(dtype=torch.float64)
    before = [composition_scores(model, kind) for kind in "QKV"]
    R = torch.randn(4, 4, generator=seeded_generator(0)).double() + 2 * torch.eye(4).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q[1] = block.attn.W_Q[1] @ R
            block.attn.W_K[1] = block.attn.W_K[1] @ torch.linalg.inv(R).T
            block.attn.W_V[2] = block.attn.W_V[2] @ R
            block.attn.W_O[2] = torch.linalg.inv(R) @ block.attn.W_O[2]
    for kind, old in zip("QKV", before, strict=True):
        assert_close(composition_scores(model, kind).scores, old.scores)


@pytest.mark.parametrize("norm", ["layernorm", "none"])
def test_random_heads_lie_about_the_middle_of_the_null(norm):
    cfg = ModelConfig(n_layers=2, n_heads=4, d_model=8, d_vocab=11, norm=norm)
    z = [composition_scores(GPT(cfg, seed), "K", n_draws=3000).z[0, :, 1] for seed in range(100)]
    assert torch.stack(z).mean().abs() < 0.1


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_a_mean_that_nobody_reads_is_no_composition(kind):
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        model.blocks[0].attn.W_O[1] += 5.0  # along d_model: every LayerNorm takes it away
    before, after = (composition_scores(one, kind)
                     for one in (model, centre_writing_weights(model)[0]))
    assert_close(after.scores, before.scores)
    assert_close(after.z, before.z)


@torch.no_grad()
def test_heads_that_share_a_few_directions_have_a_large_z_without_any_circuit():
    model = GPT(ModelConfig(n_layers=2, n_heads=8, d_model=64, d_vocab=11))
    favoured = torch.cat([torch.full((8,), 6.0), torch.ones(56)])
    for block in model.blocks:
        for name in ("W_Q", "W_K", "W_V"):
            getattr(block.attn, name).mul_(favoured[:, None])
        block.attn.W_O.mul_(favoured)
    assert composition_scores(model, "K").z[0, :, 1].min() > 5  # random heads, all of them


def test_without_layers_there_are_no_scores():
    model = tiny_model(n_layers=0)
    assert ov_eigenvalue_score(model).shape == (0, 3)
    found = composition_scores(model, "K")
    assert found.scores.shape == found.z.shape == (0, 3, 0, 3)


def test_random_heads_compose_like_random_matrices():
    cfg = ModelConfig(n_layers=2, n_heads=8, d_model=64, d_vocab=11)
    for kind in "QKV":
        found = composition_scores(GPT(cfg), kind)
        assert_close(found.scores[0, :, 1].pow(2).mean(), torch.tensor(1 / 64), rtol=0.05, atol=0)
        assert found.z[0, :, 1].abs().mean() < 1.5
        assert found.z[1].abs().max() == 0 and found.z[:, :, 0].abs().max() == 0


def test_a_head_that_copies_scores_one_and_one_that_suppresses_minus_one():
    model = tiny_model(dtype=torch.float64, n_heads=1, d_vocab=11, norm="none", n_layers=1)
    with torch.no_grad():
        W_E = model.W_E
        model.unembedding.W_U.copy_(W_E.T)
        attn = model.blocks[0].attn
        attn.W_V[0] = torch.eye(12)
        for sign in (1, -1):
            attn.W_O[0] = sign * torch.eye(12)
            assert ov_eigenvalue_score(model)[0, 0].item() == pytest.approx(sign)


def test_singular_directions_in_tokens_are_those_of_the_dense_circuit():
    model, tokenizer = tiny_model(dtype=torch.float64), CharTokenizer().fit("abcdefghijk")
    with torch.no_grad():
        U, S, V = torch.linalg.svd(ov_circuit(model, 1, 2).AB)
        logits = V @ read_through(model.ln_final, model.W_U)
    for i, (strength, read, written) in enumerate(svd_vocab(model, 1, 2, tokenizer, top_k=3)):
        sign = logits[i, logits[i].abs().argmax()].sign()
        assert strength == pytest.approx(S[i].item())
        assert written == [tokenizer.decode([t]) for t in (sign * logits[i]).topk(3).indices]
        wanted = (sign * model.W_E.detach() @ U[:, i]).topk(3).indices
        assert read == [tokenizer.decode([t]) for t in wanted]


@pytest.mark.parametrize("call, problem", [
    (lambda model: qk_circuit(model, 2, 0), "layer=2 is not there; this model has 2"),
    (lambda model: ov_circuit(model, 0, 3), "head=3 is not there; choose 0 to 2"),
    (lambda model: composition_scores(model, "q"), "choose from: Q, K, V"),
])
def test_circuits_that_are_not_there_are_named(call, problem):
    with pytest.raises(UserError, match=problem):
        call(tiny_model())
