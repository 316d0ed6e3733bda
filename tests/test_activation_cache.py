"""The activation cache: reading it, wrong keys, and contents that never change."""

import pytest
import torch
from helpers import refusal, tiny_model, tiny_tokens

from activation_cache import ActivationCache, UnknownName, get_act_name, slice_axes
from attention import GrowingPast
from utils import UserError


def everything(name):
    return True


def tiny_cache(names_filter=everything, pos_slice=None, **changes):
    model = tiny_model(**changes).requires_grad_(False)
    with model.caching(names_filter, pos_slice) as cache:
        model(tiny_tokens())
    return cache


# Names


def test_a_full_name_is_its_own_name():
    assert get_act_name("blocks.0.attn.hook_z") == "blocks.0.attn.hook_z"


def test_every_point_has_a_short_name():
    points = tiny_model().hook_points()
    for name in points:
        *parts, leaf = name.split(".")
        layer, module = (int(parts[1]), parts[2:]) if parts[:1] == ["blocks"] else (None, [])
        short = leaf.removeprefix("hook_")
        module = [] if short not in ("scale", "normalized") else module
        assert get_act_name(short, layer, *module) == name


def test_a_name_with_a_part_too_few_or_too_many_raises():
    assert "('z', 0)" in refusal(lambda: get_act_name("z"), "no layer")
    assert "('scale', 1, 'ln1')" in refusal(lambda: get_act_name("scale", 1), "no LayerNorm")
    for name, layer in (("blocks.0.attn.hook_z", 1), ("hook_embed", 0), ("embed", 0)):
        for use in (lambda name=name, layer=layer: tiny_cache()[name, layer],
                    lambda name=name: tiny_cache().stack(name)):
            assert name in refusal(use, f"a layer of {name}, which is one place")


# Reading


def test_each_form_of_key_reads_the_same_tensor():
    cache = tiny_cache(n_layers=3)
    assert cache["z", 2] is cache["blocks.2.attn.hook_z"] is cache["z", -1]
    assert cache["resid_post", -3] is cache["blocks.0.hook_resid_post"]
    assert cache["scale", 0, "ln1"] is cache["blocks.0.ln1.hook_scale"]
    assert cache["scale"] is cache["scale", None] is cache["ln_final.hook_scale"]
    assert cache["embed"] is cache["hook_embed"]


def test_a_cache_is_a_mapping_over_what_was_kept():
    names = ["blocks.0.attn.hook_z", "hook_embed"]
    cache = tiny_cache(names)
    assert sorted(cache) == names and len(cache) == 2
    assert ("z", 0) in cache and "embed" in cache
    assert ("z", 1) not in cache and "hook_nothing" not in cache and ("z", 7) not in cache


def test_the_message_on_a_missing_key_gives_the_reason():
    cache = tiny_cache(["blocks.0.attn.hook_z"])
    for key, said in (
        (("v", 0), r"blocks\.0\.attn\.hook_v was not cached.*names_filter"),
        (("patern", 0), r"blocks\.0\.hook_patern .*blocks\.0\.attn\.hook_pattern"),
        ("hook_embd", r"hook_embd .*hook_embed"),
        (("z", 2), "layer 2 .*2 layers"),
        (("z", -3), "layer -3 .*2 layers"),
    ):
        with pytest.raises(UnknownName, match=f"^{said}") as raised:  # no quotes around it
            cache[key]
        assert isinstance(raised.value, KeyError) and isinstance(raised.value, UserError), key


def test_a_stack_holds_every_layer_in_order():
    cache = tiny_cache()
    for name, module in (("pattern", None), ("resid_post", None), ("scale", "ln2")):
        stacked = cache.stack(name, module)
        assert len(stacked) == 2
        for layer in range(2):
            assert torch.equal(stacked[layer], cache[name, layer, module])


def test_a_stack_with_a_layer_that_was_not_kept_or_of_no_layers_raises():
    with pytest.raises(UnknownName, match=r"blocks\.1"):
        tiny_cache("blocks.0.attn.hook_z").stack("z")
    with pytest.raises(UnknownName, match="no layers"):
        tiny_cache(n_layers=0).stack("resid_post")


def test_to_moves_every_activation_to_the_device():
    cache = tiny_cache()
    elsewhere = cache.to("meta")
    assert set(elsewhere) == set(cache) and elsewhere["z", 0].device.type == "meta"
    assert cache["z", 0].device.type == "cpu"
    assert all(torch.equal(t, cache[name]) for name, t in cache.to("cpu").items())


def test_cached_tensors_are_detached():
    model = tiny_model()
    _, cache = model.run_with_cache(tiny_tokens(), names_filter=everything)
    assert not any(tensor.requires_grad for tensor in cache.values())


# Parts


CHOICES = [(0, [0]), (2, [2]), (-1, [6]), (-7, [0]), (slice(1, 4), [1, 2, 3]),
           (slice(-2, None), [5, 6]), ([5, 0], [5, 0]), ([-1], [6])]


def test_a_pos_slice_keeps_those_positions_and_the_axis_while_caching_and_afterwards():
    whole = tiny_cache(n_layers=1)
    for choice, positions in CHOICES:
        for part in (tiny_cache(pos_slice=choice, n_layers=1), whole.slice(pos=choice)):
            assert set(part) == set(whole)
            for name, tensor in part.items():
                axis = 2 if name.endswith(("pattern", "attn_scores")) else 1  # there the queries'
                wanted = whole[name].index_select(axis, torch.tensor(positions))
                assert torch.equal(tensor, wanted), f"{name} at {choice}"


def test_a_slice_chooses_along_batch_and_head_and_leaves_other_activations_whole():
    cache = tiny_cache()
    part = cache.slice(batch=[1], head=-1)
    assert torch.equal(part["z", 0], cache["z", 0][1:, :, 2:])
    assert torch.equal(part["pattern", 0], cache["pattern", 0][1:, 2:])
    assert torch.equal(part["resid_pre", 1], cache["resid_pre", 1][1:])


def test_slices_are_copies_that_keep_no_larger_tensor_alive():
    whole = tiny_cache()
    for part in (tiny_cache(pos_slice=-1), whole.slice(pos=-1), whole.slice()):
        assert part.nbytes == sum(tensor.numel() * 4 for tensor in part.values())
    part = whole.slice(pos=slice(None))
    part["z", 0].zero_()
    assert whole["z", 0].any()


def test_a_position_outside_raises():
    for pos in (7, -8, [7]):
        for use in (lambda pos=pos: tiny_cache(pos_slice=pos),
                    lambda pos=pos: tiny_cache().slice(pos=pos)):
            with pytest.raises((UserError, IndexError), match=r"7|8"):
                use()


def test_axes_are_sliced_by_name():
    tensor = torch.arange(24).view(2, 3, 4)
    part = slice_axes(tensor, "batch head pos", head=-1, pos=[0, 2])
    assert torch.equal(part, tensor[:, 2:, [0, 2]])
    assert "head=3" in refusal(lambda: slice_axes(tensor, "batch head pos", head=3), "head 3 of 3")


def test_nbytes_counts_each_storage_once():
    base = torch.zeros(10)
    cache = ActivationCache({"a": base[:4], "b": base[4:], "c": torch.zeros(5)}, {})
    assert cache.nbytes == 4 * (10 + 5)
    both = tiny_cache(["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
    assert both.nbytes == 4 * 2 * 7 * 12  # one tensor, told at two points


# What is kept stays as it was


def later_forward(model, tokens):
    model(tokens.flip(0))


def later_edit(model, tokens):
    model.run_with_hooks(tokens, fwd_hooks=[(everything, lambda t, hook: 2 * t)])


def step_of_the_optimiser(model, tokens):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(tokens).logsumexp(-1).sum().backward()
    optimizer.step()


def new_weights(model, tokens):
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            weight.zero_()


@pytest.mark.parametrize("event", [later_forward, later_edit, step_of_the_optimiser, new_weights])
def test_nothing_that_happens_later_changes_what_was_cached(event):
    for changes in ({}, {"positions": "sinusoidal", "norm": "none"},
                    {"n_layers": 0, "positions": "none"}):
        model, tokens = tiny_model(**changes), tiny_tokens(batch=1)
        _, cache = model.run_with_cache(tokens, names_filter=everything)
        before = {name: tensor.clone() for name, tensor in cache.items()}
        event(model, tokens)
        for name, tensor in before.items():
            assert torch.equal(cache[name], tensor), f"{name} with {changes} has changed"


@torch.no_grad()
def test_decoding_further_changes_nothing_that_was_cached():
    model, tokens = tiny_model(), tiny_tokens()
    past = [GrowingPast(9) for _ in model.blocks]
    with model.caching(everything) as cache:
        model.run_blocks(model.embed(tokens[:, :6]), past=past)
    before = {name: tensor.clone() for name, tensor in cache.items()}
    for one in past:
        one.k.mul_(2)  # even where the past itself is edited
    model.run_blocks(model.embed(tokens[:, 6:], torch.tensor([6])), past=past)
    assert all(torch.equal(cache[name], tensor) for name, tensor in before.items())
