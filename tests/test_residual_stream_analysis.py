"""The stream as a sum: every decomposition adds up to it, at every layer, for any weights."""

import math
from functools import partial

import pytest
import torch
from helpers import WIDE, refusal, tiny_model, tiny_tokens
from torch.testing import assert_close

from residual_stream_analysis import (
    UNITS,
    accumulated_resid,
    apply_ln_to_stack,
    before_layer_norm,
    cosine_by_layer,
    decompose_resid,
    decomposition,
    effective_rank,
    full_decomposition,
    norm_budget,
    participation_ratio,
    resid_norms,
    stack_head_results,
    stack_neuron_results,
)
from utils import seeded_generator
from weight_circuits import centre_writing_weights

SHAPES = [{}, {"tie_embeddings": True}, {"attn_only": True}, {"norm": "none"},
          {"positions": "none"}, {"attn_bias": False}, {"n_layers": 0},
          {**WIDE, "d_vocab_out": 13}]


def cached(**changes):
    model = tiny_model(dtype=torch.float64, **changes)
    with torch.no_grad():
        return model, model.run_with_cache(tiny_tokens())[1]


def stream(model, cache, layer, mlp_input=False):
    """The input of block `layer`, or of its MLP, directly from the cache."""
    if mlp_input:
        return cache["resid_mid", layer]
    if layer == 0:
        where = cache["pos_embed"] if model.cfg.positions != "none" else 0
        return cache["embed"] + where
    return cache["resid_post", layer - 1]


def places(model):
    """(layer, mlp_input) of every LayerNorm."""
    n_layers = model.cfg.n_layers
    inside = [] if model.cfg.attn_only else [(layer, True) for layer in range(n_layers)]
    return [(layer, False) for layer in range(n_layers + 1)] + inside


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_writes_sum_to_the_stream_at_every_layer(changes):
    model, cache = cached(**changes)
    for unit in UNITS:
        for layer, mlp_input in places(model):
            stack, labels = decomposition(model, cache, layer, unit=unit, mlp_input=mlp_input)
            assert len(stack) == len(labels) == len(set(labels)), f"the labels of each {unit}"
            wanted = stream(model, cache, layer, mlp_input)
            missed = (stack.sum(0) - wanted).abs().max().item()
            assert missed < 1e-10, f"each {unit} before layer {layer}: the sum misses by {missed}"


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_writes_read_through_a_layer_norm_sum_to_its_output(changes):
    model, cache = cached(**changes)
    for layer, mlp_input in places(model):
        stack, labels = decompose_resid(model, cache, layer, mlp_input, apply_ln=True)
        block = model.blocks[layer] if layer < model.cfg.n_layers else None
        norm = model.ln_final if block is None else block.ln2 if mlp_input else block.ln1
        assert_close(stack.sum(0), norm(stream(model, cache, layer, mlp_input)).detach())
        assert (labels[-1] == "ln_bias") is (model.cfg.norm == "layernorm")


def test_projecting_before_expanding_equals_expanding_before_projecting():
    for changes in SHAPES:
        model, cache = cached(**changes)
        for unit in UNITS:
            stack, labels = decomposition(model, cache, unit=unit)
            for shape in ((12,), (2, 7, 12)):
                direction = torch.randn(shape, generator=seeded_generator(4)).double()
                onto, same = decomposition(model, cache, unit=unit, project_output_onto=direction)
                assert_close(onto, (stack * direction).sum(-1))
                assert labels == same


def test_a_direction_before_layer_norm_reads_what_it_reads_after_it():
    model, cache = cached()
    direction = torch.randn(12, generator=seeded_generator(4)).double()
    for layer, mlp_input in places(model):
        stack, labels = decompose_resid(model, cache, layer, mlp_input)
        read, _ = apply_ln_to_stack(model, cache, stack, labels, layer=layer, mlp_input=mlp_input)
        before = before_layer_norm(model, cache, direction, layer, mlp_input=mlp_input)
        assert_close((stack * before).sum(-1), (read[:-1] * direction).sum(-1))


def test_without_the_affine_the_rows_sum_to_the_normalised_stream():
    model, cache = cached()
    stack, labels = decompose_resid(model, cache)
    read, same = apply_ln_to_stack(model, cache, stack, labels, affine=False)
    assert_close(read.sum(0), cache["normalized", None])
    assert same == labels


def test_labels_name_the_writers_in_the_order_of_the_writing():
    model, cache = cached()
    assert decompose_resid(model, cache)[1] == [
        "embed", "pos_embed", "0_attn_out", "0_mlp_out", "1_attn_out", "1_mlp_out"]
    assert decompose_resid(model, cache, 0)[1] == ["embed", "pos_embed"]
    assert decompose_resid(model, cache, 1, True)[1][-1] == "1_attn_out"
    assert full_decomposition(model, cache, 1, expand_neurons=False)[1] == [
        "embed", "pos_embed", "L0H0", "L0H1", "L0H2", "0_mlp_out", "biases"]
    assert full_decomposition(model, cache, 1)[1][5:7] == ["L0N0", "L0N1"]


def test_heads_and_neurons_with_their_biases_sum_to_the_writes_of_their_parts():
    model, cache = cached()
    heads, labels = stack_head_results(model, cache)
    assert labels == [f"L{layer}H{head}" for layer in range(2) for head in range(3)]
    neurons, names = stack_neuron_results(model, cache)
    assert names == [f"L{layer}N{neuron}" for layer in range(2) for neuron in range(48)]
    for layer, block in enumerate(model.blocks):
        written = heads[3 * layer : 3 * layer + 3].sum(0) + block.attn.b_O.detach()
        assert_close(written, cache["attn_out", layer])
        written = neurons[48 * layer : 48 * layer + 48].sum(0) + block.mlp.b_out.detach()
        assert_close(written, cache["mlp_out", layer])
    result = model.run_with_cache(tiny_tokens(), "blocks.1.attn.hook_result")[1]["result", 1]
    assert_close(heads[3:], result.movedim(2, 0))


def test_accumulated_rows_are_the_streams_themselves():
    model, cache = cached()
    stack, labels = accumulated_resid(model, cache, incl_mid=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "final_post"]
    names = [("resid_pre", 0), ("resid_mid", 0), ("resid_pre", 1), ("resid_mid", 1),
             ("resid_post", 1)]
    assert all(torch.equal(row, cache[name]) for row, name in zip(stack, names, strict=True))
    assert accumulated_resid(model, cache, 1)[1] == ["0_pre", "1_pre"]
    assert torch.equal(accumulated_resid(model, cache, 1)[0][-1], cache["resid_post", 0])


def test_accumulated_rows_through_the_final_layer_norm_end_in_the_logits():
    model, cache = cached()
    stack, _ = accumulated_resid(model, cache, apply_ln=True)
    with torch.no_grad():
        assert_close(stack[-1] @ model.W_U + model.b_U, model(tiny_tokens()))
        for row, stream in zip(stack, accumulated_resid(model, cache)[0], strict=True):
            assert_close(row, model.ln_final(stream))  # each with a scale of its own


def test_the_norm_budget_sums_to_one():
    for changes in SHAPES:
        model, cache = cached(**changes)
        for layer in range(model.cfg.n_layers + 1):
            shares, labels = norm_budget(model, cache, layer)
            assert_close(shares.sum(0), torch.ones(2, 7).double())
            assert len(labels) == len(shares)


def test_norms_and_cosines_equal_the_naive_loop():
    model, cache = cached()
    norms, labels = resid_norms(model, cache)
    cosines, same = cosine_by_layer(model, cache)
    streams = [cache["resid_pre", 0], cache["resid_pre", 1], cache["resid_post", 1]]
    assert labels == same == ["0_pre", "1_pre", "final_post"]
    for i, one in enumerate(streams):
        assert_close(norms[i], one.pow(2).sum(-1).sqrt())
        for j, other in enumerate(streams):
            expected = torch.cosine_similarity(one, other, dim=-1).mean()
            assert_close(cosines[i, j], expected)


def test_a_projector_has_the_rank_it_projects_onto():
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=seeded_generator(0)).double())[0]
    for rank in (1, 3, 6):
        projector = rotation[:, :rank] @ rotation[:, :rank].T
        assert effective_rank(projector).item() == pytest.approx(rank)
        assert participation_ratio(projector).item() == pytest.approx(rank)


def test_ranks_of_a_known_spectrum():
    matrix = torch.diag(torch.tensor([2.0, 1.0, 1.0])).expand(4, 3, 3)
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert_close(effective_rank(matrix), torch.full((4,), math.exp(entropy)))
    assert_close(participation_ratio(matrix), torch.full((4,), 36 / 18))


def edited(model, at, only_pos=slice(None), **more):
    """A cache of a run with a hook that adds something at `at`."""
    def add(resid, hook):
        resid = resid.clone()
        resid[:, only_pos] += torch.linspace(-0.2, 0.3, resid.shape[-1]).to(resid)
        return resid

    with torch.no_grad(), model.hooks([(at, add)]):
        return model.run_with_cache(tiny_tokens(), **more)[1]


ONTO = torch.linspace(1, -2, 12, dtype=torch.float64)


@pytest.mark.parametrize("only_pos", [slice(None), slice(4, 5)], ids=["everywhere", "at 4"])
def test_writes_that_miss_an_edited_stream_are_refused_and_before_the_edit_they_sum(only_pos):
    model = tiny_model(dtype=torch.float64)
    cache = edited(model, "blocks.1.hook_resid_mid", only_pos)
    for unit, onto in (("component", None), ("head", None), ("component", ONTO), ("head", ONTO),
                       ("neuron", ONTO)):
        more = {"unit": unit, "project_output_onto": onto}
        for layer, mlp_input in ((-1, False), (1, True)):
            call = partial(decomposition, model, cache, layer, mlp_input=mlp_input, **more)
            case = f"each {unit} onto {onto} before layer {layer}"
            assert "miss the cached stream" in refusal(call, case)
        for layer, mlp_input in ((0, False), (0, True), (1, False)):
            decomposition(model, cache, layer, mlp_input=mlp_input, **more)
    norm_budget(model, cache, 1)
    assert "miss the cached stream" in refusal(lambda: norm_budget(model, cache), "the budget")


def test_an_edit_of_a_write_is_part_of_the_sum():
    model = tiny_model()
    # heads apart can't know of an edit after them: not of one at attn_out
    for at, units in (("blocks.1.hook_attn_out", ["component"]), ("hook_embed", UNITS[:2]),
                      ("blocks.0.attn.hook_z", UNITS[:2]), ("blocks.0.mlp.hook_post", UNITS[:2])):
        cache = edited(model, at)
        for unit in units:
            stack, _ = decomposition(model, cache, unit=unit)
            assert_close(stack.sum(0), cache["resid_post", -1], rtol=1e-4, atol=1e-4)


def test_a_dropped_embedding_and_heads_of_another_model_are_refused():
    model = tiny_model(dropout=0.5).train()
    with torch.no_grad():
        cache = model.run_with_cache(tiny_tokens())[1]
    assert "eval()" in refusal(lambda: decompose_resid(model, cache), "under dropout")
    other, (_, cache) = tiny_model(seed=2).double(), cached()
    assert "another model" in refusal(lambda: stack_head_results(other, cache), "another model")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_does_not_count_as_an_edit_and_slices_of_positions_sum_too(dtype):
    model = centre_writing_weights(tiny_model(n_layers=6))[0].to(dtype)
    direction = torch.ones(12, dtype=dtype)  # a centred stream has rounding along it, no more
    for pos_slice in (None, slice(2, 5)):
        cache = model.run_with_cache(tiny_tokens(), pos_slice=pos_slice)[1]
        for layer in range(7):
            for unit in ("component", "head"):
                decomposition(model, cache, layer, unit=unit)
                decomposition(model, cache, layer, unit=unit, project_output_onto=direction)


def test_without_the_stream_in_the_cache_nothing_is_compared():
    model = tiny_model()
    cache = edited(model, "blocks.1.hook_resid_post",
                   names_filter=lambda name: "resid" not in name)
    assert len(decompose_resid(model, cache)[0]) == 6


def test_missing_activations_are_named():
    model, cache = cached()
    no_mlps = cached(attn_only=True)
    _, lacking = model.run_with_cache(tiny_tokens(), lambda name: "mlp_out" not in name)
    for told, call in (
        ("layer=3", lambda: decompose_resid(model, cache, 3)),
        ("layer=-2", lambda: decompose_resid(model, cache, -2)),
        ("mlp_input=True", lambda: decompose_resid(model, cache, 2, True)),
        ("mlp_input=True", lambda: decompose_resid(*no_mlps, 0, True)),
        ("attn_only=True", lambda: stack_neuron_results(*no_mlps)),
        ("nueron", lambda: decomposition(model, cache, unit="nueron")),
        ("2 layers", lambda: decompose_resid(tiny_model(n_layers=3), cache)),
        ("12 with 3 heads", lambda: decompose_resid(tiny_model(d_model=24), cache)),
        ("12 with 4", lambda: decompose_resid(tiny_model(n_heads=4), cache)),
        ("blocks.0.hook_mlp_out", lambda: decompose_resid(model, lacking)),
    ):
        message = refusal(call, told)
        assert told in message, f"the refusal does not name {told}: {message}"
