"""Re-parameterisations: no prediction changes, the input model is untouched, and the new weights
have the promised properties."""

import itertools

import pytest
import torch
from helpers import TINY, WIDE, refusal, tiny_model, tiny_tokens
from torch.testing import assert_close

from config import ModelConfig
from model import GPT
from tokenizer import CharTokenizer
from utils import seeded_generator
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
    {**WIDE, "d_vocab_out": 13},
]
each_way = pytest.mark.parametrize("change", ALL, ids=lambda change: change.__name__)


def models_of_each_kind(dtype=torch.float64, kinds=KINDS):
    """Pairs of what is special about a model, and the model."""
    return [(changes, tiny_model(dtype=dtype, **changes)) for changes in kinds]


@torch.no_grad()
def log_probs(model, tokens):
    return model(tokens).log_softmax(-1)


def assert_near(found, wanted, most, case):
    assert_close(found, wanted, atol=most, rtol=0, msg=lambda text: f"{case}: {text}")


def assert_zero(tensor, most=1e-12, case=""):
    largest = tensor.abs().max().item()
    assert largest <= most, f"{case} is {largest}, not 0"


def assert_same_predictions(one, other, most, case):
    """Two models give the same predictions on new texts."""
    tokens = tiny_tokens(batch=8, pos=TINY["n_ctx"], seed=77)
    assert_near(log_probs(one, tokens), log_probs(other, tokens), most, case)


# What holds for each


@each_way
def test_no_prediction_changes(change):
    exact = [(*pair, 1e-12) for pair in models_of_each_kind()]
    rounded = [(*pair, 1e-5) for pair in models_of_each_kind(torch.float32, KINDS[:2])]
    for changes, model, most in exact + rounded:
        new, found = change(model)
        assert_same_predictions(model, new, most, changes)
        assert 0 <= found.log_probs <= most, f"{changes}: a drift of {found.log_probs}"
        assert new.W_E.dtype == model.W_E.dtype and new is not model


@each_way
def test_the_input_is_unchanged_bit_for_bit_and_shares_no_memory_with_the_output(change):
    for changes, model in models_of_each_kind(kinds=(KINDS[0], KINDS[4], KINDS[5], KINDS[7])):
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        logits, cfg = model(tiny_tokens()), model.cfg
        new, _ = change(model)
        with torch.no_grad():
            for weight in new.parameters():
                weight.fill_(7.0)
        assert before.keys() == model.state_dict().keys() and model.cfg is cfg
        for name, weight in model.state_dict().items():
            assert torch.equal(before[name], weight), f"{name} of a model with {changes} changed"
        assert torch.equal(model(tiny_tokens()), logits)
        assert not any(weight.grad is not None for weight in model.parameters())


@each_way
def test_the_output_is_in_the_mode_of_the_input_and_can_learn(change):
    for training in (True, False):
        model = tiny_model(n_layers=1).train(training)
        new, _ = change(model)
        assert new.training is training is model.training
        new(tiny_tokens()).sum().backward()
        assert all(weight.requires_grad for weight in new.parameters())


def test_all_four_in_a_row_keep_the_predictions_and_each_other_s_promises():
    orders = (ALL, (fold_layer_norm, fold_value_biases, centre_unembed, centre_writing_weights))
    for changes, model in models_of_each_kind(kinds=(KINDS[0], KINDS[4], KINDS[5], KINDS[8])):
        for order in orders:
            new = model
            for change in order:
                new, _ = change(new)
            assert_same_predictions(model, new, 1e-12, changes)
        assert_folded(new)
        assert_zero(new.W_U.mean(-1), case="the mean of W_U along the vocabulary")
        assert not new.b_V.any()
        assert_nothing_constant_is_written(new)


@each_way
def test_a_second_time_changes_nothing(change):
    once, _ = change(tiny_model(dtype=torch.float64))
    twice, _ = change(once)
    assert once.cfg == twice.cfg
    for (name, weight), other in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert_near(weight, other, 1e-12, name)


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


def test_the_drift_is_the_largest_change_on_two_random_texts():
    model = tiny_model()
    others = [change(model) for change in ALL]
    another = tiny_model(2)
    others += [(another, drift(model, another)), (another, drift(another, model))]
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


def test_an_error_in_any_weight_shows_as_drift():
    for changes, model in models_of_each_kind(torch.float32, (KINDS[3], KINDS[5])):
        new, _ = fold_layer_norm(model)
        for name, weight in new.named_parameters():
            noise = 0.3 * torch.randn(weight.shape, generator=seeded_generator(5))
            with torch.no_grad():
                weight += noise
                assert drift(model, new).log_probs > 1e-3, f"{name} of a model with {changes}"
                weight -= noise
        assert drift(model, new).log_probs < 2e-5, changes


def test_the_drift_is_measured_without_dropout_and_the_mode_stays():
    model = tiny_model(dropout=0.5).train()
    new, found = fold_value_biases(model)
    assert found.log_probs < 1e-5 and model.training and new.training


# Folding LayerNorm


def layer_norms(model):
    return [norm for block in model.blocks for norm in
            ([block.ln1] if model.cfg.attn_only else [block.ln1, block.ln2])] + [model.ln_final]


def assert_folded(model):
    for norm in layer_norms(model):
        assert (norm.w == 1).all() and not norm.b.any()
    readers = {"W_U": model.W_U}
    for layer, block in enumerate(model.blocks):
        readers[f"W_QKV of layer {layer}"] = block.attn.W_QKV
        if not model.cfg.attn_only:
            readers[f"W_in of layer {layer}"] = block.mlp.W_in
    for name, reader in readers.items():
        assert_zero(reader.sum(0), case=f"the sum of {name} along d_model")


def test_folding_leaves_every_layer_norm_plain_and_every_reader_centred():
    for _, model in models_of_each_kind():
        new, _ = fold_layer_norm(model)
        assert_folded(new)
        assert not new.cfg.tie_embeddings and new.cfg.attn_bias and new.cfg.unembed_bias


def test_folded_weights_by_their_formula_head_by_head():
    for changes, model in models_of_each_kind(kinds=({}, {"attn_bias": False})):
        new, _ = fold_layer_norm(model)
        for block, folded in zip(model.blocks, new.blocks, strict=True):
            for which, head in itertools.product("QKV", range(3)):
                W, b = (getattr(block.attn, f"{kind}_{which}")[head] for kind in "Wb")
                scaled = torch.diag(block.ln1.w) @ W
                case = f"{which} of head {head} with {changes}"
                assert_near(getattr(folded.attn, f"W_{which}")[head], scaled - scaled.mean(0),
                            1e-10, case)
                assert_near(getattr(folded.attn, f"b_{which}")[head], b + block.ln1.b @ W,
                            1e-10, case)
        assert_near(new.b_U, model.ln_final.b @ model.W_U, 1e-10, "b_U")


def test_a_folded_model_reads_the_stream_that_the_model_read_before_its_gains():
    """Nothing but the weights moved: streams, patterns, neurons and normalised streams stay."""
    for changes, model in models_of_each_kind(kinds=(KINDS[3], KINDS[5], KINDS[7])):
        _, before = model.run_with_cache(tiny_tokens())
        _, after = fold_layer_norm(model)[0].run_with_cache(tiny_tokens())
        assert before.keys() == after.keys()
        assert "ln_final.hook_normalized" in before
        for name in before:
            assert_near(after[name], before[name], 1e-10, f"{name} with {changes}")


# Centring what is written


WRITES = ("embed", "_out", "resid_pre", "resid_mid", "resid_post")


def assert_nothing_constant_is_written(model):
    _, cache = model.run_with_cache(tiny_tokens())
    for name, tensor in cache.items():
        if name.endswith(WRITES):
            assert_zero(tensor.mean(-1), case=f"the mean of {name}")
    writers = {"W_E": model.W_E}
    if model.cfg.positions != "none":
        writers["W_pos"] = model.W_pos
    if len(model.blocks):
        writers |= {"W_O": model.W_O, "b_O": model.b_O}
        if not model.cfg.attn_only:
            writers |= {"W_out": model.W_out, "b_out": model.b_out}
    for name, weight in writers.items():
        assert_zero(weight.sum(-1), 1.2e-11, f"the sum of {name} along d_model")


def test_centring_takes_the_mean_from_the_stream_and_nothing_else():
    for changes, model in models_of_each_kind():
        new, _ = centre_writing_weights(model)
        assert_nothing_constant_is_written(new)
        _, before = model.run_with_cache(tiny_tokens())
        _, after = new.run_with_cache(tiny_tokens())
        for name in before:
            wanted = before[name]
            if name.endswith((*WRITES, "mlp_in")):
                wanted = wanted - wanted.mean(-1, keepdim=True)
            assert_near(after[name], wanted, 1e-10, f"{name} with {changes}")


def test_centring_makes_fixed_positions_a_table_and_keeps_none_none():
    for positions, becomes in (("sinusoidal", "learned"), ("learned", "learned"), ("none", "none")):
        new, _ = centre_writing_weights(tiny_model(positions=positions))
        assert new.cfg.positions == becomes
        assert ("position_embedding.W_pos" in dict(new.named_parameters())) == (becomes != "none")


def test_a_constant_along_the_stream_is_invisible_to_every_layer_norm():
    resid = torch.randn(2, 5, 12, generator=seeded_generator(4), dtype=torch.float64)
    moved = resid + torch.randn(2, 5, 1, generator=seeded_generator(5), dtype=torch.float64)
    for changes, model in models_of_each_kind():
        for norm in layer_norms(model):
            assert_near(norm(moved), norm(resid), 1e-10, changes)
        one, other = (model.unembed(model.run_blocks(stream)) for stream in (resid, moved))
        assert_near(one, other, 1e-10, changes)


# The unembedding and the values


def test_centred_logits_sum_to_zero_and_differ_as_before():
    tokens = tiny_tokens()
    for changes, model in models_of_each_kind():
        new, found = centre_unembed(model)
        assert_zero(new.W_U.sum(-1), 1e-11, f"the sum of W_U with {changes}")
        assert_zero(new.b_U.sum(), 1e-11, f"the sum of b_U with {changes}")
        before = model(tokens)
        assert_near(new(tokens), before - before.mean(-1, keepdim=True), 1e-10, changes)
        assert found.logits > 0.01 and found.log_probs < 1e-12
        assert new.cfg.unembed_bias == model.cfg.unembed_bias and not new.cfg.tie_embeddings
    single = tiny_model(d_vocab_out=1)  # nothing of its logit would be left
    assert "d_vocab_out=1" in refusal(lambda: centre_unembed(single))


def test_folded_value_biases_move_into_b_O_and_change_nothing_else():
    tokens = tiny_tokens()
    for changes, model in models_of_each_kind():
        new, found = fold_value_biases(model)
        _, before = model.run_with_cache(tokens)
        _, after = new.run_with_cache(tokens)
        for layer in range(model.cfg.n_layers):
            assert not new.b_V[layer].any()
            moved = sum(model.b_V[layer, head] @ model.W_O[layer, head] for head in range(3))
            assert_near(new.b_O[layer], model.b_O[layer] + moved, 1e-10, changes)
            for name in ("v", "z"):
                wanted = before[name, layer] - model.b_V[layer]
                assert_near(after[name, layer], wanted, 1e-10, f"{name} with {changes}")
            for name in ("q", "k", "pattern", "attn_out", "resid_post"):
                assert_near(after[name, layer], before[name, layer], 1e-10,
                            f"{name} with {changes}")
        assert found.logits < 1e-12 and new.cfg == model.cfg


def test_a_model_without_norms_has_its_logits_and_values_re_parameterised_and_the_rest_refused():
    model = tiny_model(dtype=torch.float64, norm="none", n_layers=1)
    for change in (centre_unembed, fold_value_biases):
        assert_same_predictions(model, change(model)[0], 1e-10, change.__name__)
    for change in (fold_layer_norm, centre_writing_weights):
        message = refusal(lambda change=change: change(model), change.__name__)
        assert "norm='none'" in message, f"{change.__name__} is refused as {message}"


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


def test_the_qk_circuit_gives_the_scores_and_the_ov_circuit_the_writes():
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


@pytest.mark.parametrize("norm", ["layernorm", "none"])
@torch.no_grad()
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
            score = scores[l1, h1, l2, h2].item()
            assert score == pytest.approx(float(expected)), f"{kind}: L{l1}H{h1} to L{l2}H{h2}"


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


def test_random_heads_lie_about_the_middle_of_the_null():
    is_later = torch.ones(8, 8).triu(1).bool()
    for norm in ("layernorm", "none"):
        cfg = ModelConfig(n_layers=8, n_heads=4, d_model=8, d_vocab=11, norm=norm)
        z = torch.stack([composition_scores(GPT(cfg, seed), "K", n_draws=3000).z
                         for seed in range(8)])
        middle = z.transpose(2, 3)[:, is_later].mean().item()
        assert abs(middle) < 0.1, f"norm={norm}: random heads have a z of {middle} on average"


def test_a_mean_that_no_layer_reads_is_no_composition():
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():
        model.blocks[0].attn.W_O[1] += 5.0  # along d_model: every LayerNorm takes it away
    centred, _ = centre_writing_weights(model)
    for kind in "QKV":
        before, after = (composition_scores(one, kind) for one in (model, centred))
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


@torch.no_grad()
def test_the_copying_score_is_that_of_the_dense_product_read_through_the_last_layer_norm():
    model = tiny_model(dtype=torch.float64)
    scores = ov_eigenvalue_score(model)
    W_U = model.ln_final.w[:, None] * model.W_U
    for layer, head in itertools.product(range(2), range(3)):
        dense = model.W_E @ ov_circuit(model, layer, head).AB @ (W_U - W_U.mean(0))
        eigenvalues = torch.linalg.eigvals(dense)
        wanted = eigenvalues.real.sum() / eigenvalues.abs().sum()
        assert_near(scores[layer, head], wanted, 1e-6, f"L{layer}H{head}")


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


def test_missing_circuits_are_named():
    model = tiny_model()
    for told, call in (("layer=2", lambda: qk_circuit(model, 2, 0)),
                       ("head=3", lambda: ov_circuit(model, 0, 3)),
                       ("'q'", lambda: composition_scores(model, "q"))):
        assert told in refusal(call, told)
