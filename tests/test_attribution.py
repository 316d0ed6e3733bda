"""Direct attribution: the rows sum to the logits of the unfolded model. Attribution patching is a
slope, exact if the model is linear; integrated gradients sum to the whole change."""

import itertools

import pytest
import torch
from helpers import WIDE, tiny_model, tiny_tokens
from torch.testing import assert_close

from attribution import FIXES, attribution_patching, direct_logit_attribution, integrated_gradients
from config import ModelConfig
from metrics import Metric, logit_diff, target_rank
from model import GPT
from patching import get_act_patch_attn_head_out_all_pos
from tokenizer import CharTokenizer
from utils import UserError

SHAPES = [{}, {"tie_embeddings": True}, {"attn_only": True}, {"unembed_bias": True},
          {"norm": "none", "unembed_bias": True}, {"positions": "none"}, {"n_layers": 0},
          {**WIDE, "d_vocab_out": 13}]
CORRECT, WRONG = torch.tensor([3, 4]), torch.tensor([5, 0])


def cached(**changes):
    model = tiny_model(dtype=torch.float64, **changes)
    with torch.no_grad():
        return model, *model.run_with_cache(tiny_tokens())


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_rows_sum_to_the_logit_difference(changes):
    model, logits, cache = cached(**changes)
    found, expected = {}, {}
    for unit, pos in itertools.product(["component", "head", "neuron"], [-1, 0, 3]):
        attr, labels = direct_logit_attribution(model, cache, CORRECT, WRONG, unit=unit, pos=pos)
        found[unit, pos] = attr.sum(0)
        expected[unit, pos] = logit_diff(logits, CORRECT, WRONG, pos=pos)
        assert labels[-2:] == ["ln_bias", "b_U"] and len(labels) == len(attr) == len(set(labels))
    assert_close(found, expected)


def test_without_a_wrong_token_the_rows_sum_to_the_logit():
    for changes in SHAPES:
        model, logits, cache = cached(**changes)
        attr, _ = direct_logit_attribution(model, cache, CORRECT)
        assert_close({str(changes): attr.sum(0)},
                     {str(changes): logits[torch.arange(2), -1, CORRECT]})


def test_a_row_is_the_loss_of_logits_without_the_write_at_a_frozen_scale():
    model, logits, cache = cached()
    attr, labels = direct_logit_attribution(model, cache, CORRECT, WRONG, unit="head")
    for layer in range(2):
        z = cache["z", layer]
        for head in range(3):
            write = z[:, -1, head] @ model.blocks[layer].attn.W_O[head].detach()
            less = cache["resid_post", 1][:, -1] - write
            centred = less - less.mean(-1, keepdim=True)
            normalised = centred / cache["scale", None][:, -1]
            read = normalised * model.ln_final.w.detach() + model.ln_final.b.detach()
            without = (read @ model.W_U.detach() + model.b_U.detach())[:, None]
            change = (logit_diff(logits, CORRECT, WRONG, reduction="none")
                      - logit_diff(without, CORRECT, WRONG, reduction="none"))
            assert_close(attr[labels.index(f"L{layer}H{head}")], change)


def test_finer_units_sum_to_coarser_ones():
    model, _, cache = cached()
    coarse, names = direct_logit_attribution(model, cache, 3, 5)
    fine, labels = direct_logit_attribution(model, cache, 3, 5, unit="neuron")
    d = model.W_U.detach()[:, 3] - model.W_U.detach()[:, 5]
    scale = cache["scale", None][:, -1]
    weighted = model.ln_final.w.detach() * d
    for layer in range(2):
        rows = [i for i, label in enumerate(labels) if label.startswith(f"L{layer}N")]
        bias = (model.blocks[layer].mlp.b_out.detach() @ (weighted - weighted.mean())) / scale
        assert_close(fine[rows].sum(0) + bias[:, 0], coarse[names.index(f"{layer}_mlp_out")])


def test_the_difference_is_antisymmetric():
    model, _, cache = cached()
    one, _ = direct_logit_attribution(model, cache, CORRECT, WRONG, unit="neuron")
    other, _ = direct_logit_attribution(model, cache, WRONG, CORRECT, unit="neuron")
    assert_close(one, -other)


def test_tokens_may_be_text_if_a_tokenizer_is_given():
    model, _, cache = cached()
    tokenizer = CharTokenizer().fit("abcdefghijk")
    by_text, _ = direct_logit_attribution(model, cache, "d", ["f", "a"], tokenizer=tokenizer)
    by_id, _ = direct_logit_attribution(model, cache, 3, WRONG)
    assert torch.equal(by_text, by_id)


def refusal(call, *given, **how):
    """The message of the UserError for an impossible request."""
    with pytest.raises(UserError) as found:
        call(*given, **how)
    return str(found.value)


def test_missing_tokens_and_positions_are_refused_with_their_value():
    model, _, cache = cached()
    for arguments, how, told in (
            (("d",), {}, "'d'"), ((11,), {}, "token id 11"), ((1, -1), {}, "token id -1"),
            (([1, 2, 3],), {}, "the 2 rows"), ((1.5,), {}, "token ids"),
            ((1,), {"pos": 7}, "pos=7"), ((1,), {"pos": -8}, "pos=-8"),
            ((1,), {"pos": [0, 1]}, "pos=[0, 1]")):
        assert told in refusal(direct_logit_attribution, model, cache, *arguments, **how)


# Attribution patching

DIFFERENCE = Metric.logit_diff(CORRECT, WRONG)


def surprise(logits):
    """A metric that bends: the log-probability of one token at each position, in the middle."""
    return logits[..., 2, :].log_softmax(-1)[..., 4] + 0.3 * logits[..., -1, :].pow(2).mean(-1)


def pair(dtype=torch.float64, pos=5, **changes):
    """A model, the tokens that are patched, and the cache of the others."""
    model = tiny_model(dtype=dtype, **changes)
    with torch.no_grad():
        _, source = model.run_with_cache(tiny_tokens(pos=pos, seed=3), lambda name: True)
    return model, tiny_tokens(pos=pos), source


def moved_metric(model, tokens, name, edit, metric):
    """The metric with one activation edited, by a hook: edit(own) -> new."""
    with torch.no_grad():
        return metric(model.run_with_hooks(tokens, [(name, lambda own, hook: edit(own))]))


def each_cell(values, axes, name, source):
    """(effects [batch], True where the cell is) of every cell of one hook point."""
    dims = source.axes[name].split()
    for index in itertools.product(*map(range, values.shape[:-1])):
        mask = torch.ones(1, dtype=torch.bool)
        for axis, place in zip(axes, index, strict=True):
            dim = dims.index(axis)
            here = torch.arange(source[name].shape[dim]) == place
            mask = mask & here.view(-1, *[1] * (len(dims) - dim - 1))
        yield values[index], mask.expand_as(source[name])


KINDS = [("hook_embed", ("pos",)), ("blocks.1.hook_mlp_in", ("pos",)),
         ("blocks.0.hook_resid_pre", ("pos",)), ("blocks.1.hook_resid_mid", ("pos",)),
         ("blocks.0.hook_attn_out", ("pos",)), ("blocks.0.hook_mlp_out", ("pos",)),
         ("blocks.0.attn.hook_q", ("pos", "head")), ("blocks.0.attn.hook_k", ("pos", "head")),
         ("blocks.0.attn.hook_v", ("head", "pos")), ("blocks.0.attn.hook_z", ("head",)),
         ("blocks.0.attn.hook_result", ("head",)), ("blocks.1.hook_q_input", ("head",)),
         ("blocks.0.attn.hook_pattern", ("head", "query_pos")), ("blocks.0.ln2.hook_scale", ()),
         ("blocks.1.attn.hook_pattern", ("query_pos", "key_pos")),
         ("blocks.1.mlp.hook_post", ("d_mlp",)), ("ln_final.hook_normalized", ("pos",))]


@pytest.mark.parametrize("name, axes", KINDS, ids=str)
def test_an_attribution_is_the_slope_of_the_path_to_the_source(name, axes):
    model, tokens, source = pair()
    found = attribution_patching(model, tokens, source, surprise, names=name, axes=axes)[name]
    assert found.axes == axes
    for effect, mask in each_cell(found.values, axes, name, source):
        up, down = (moved_metric(
            model, tokens, name, lambda own, h=h, mask=mask: own + h * mask * (source[name] - own),
            surprise) for h in (1e-5, -1e-5))
        assert_close(effect, (up - down) / 2e-5, atol=1e-6, rtol=1e-6)


STRAIGHT = [({"norm": "none"}, "blocks.1.hook_resid_post", ("pos",)),
            ({"norm": "none"}, "blocks.1.hook_mlp_out", ("pos",)),
            ({"norm": "none", "attn_only": True}, "blocks.1.attn.hook_z", ("pos", "head")),
            ({"norm": "none", "attn_only": True}, "blocks.1.attn.hook_v", ("head", "pos")),
            ({"norm": "none", "attn_only": True}, "blocks.1.attn.hook_pattern",
             ("head", "query_pos", "key_pos")),
            ({}, "ln_final.hook_normalized", ())]


@pytest.mark.parametrize("changes, name, axes", STRAIGHT, ids=str)
def test_it_equals_patching_if_the_rest_is_linear(changes, name, axes):
    model, tokens, source = pair(**changes)
    compare_with_patching(model, tokens, source, name, axes)


def compare_with_patching(model, tokens, source, name, axes, **how):
    found = attribution_patching(model, tokens, source, DIFFERENCE, names=name, axes=axes, **how)
    with torch.no_grad():
        before = DIFFERENCE(model(tokens))
    for effect, mask in each_cell(found[name].values, axes, name, source):
        after = moved_metric(
            model, tokens, name, lambda own, mask=mask: torch.where(mask, source[name], own),
            DIFFERENCE)
        assert_close(effect, after - before)


def test_the_heads_of_a_layer_sum_to_its_attention():
    model, tokens, source = pair()
    found = attribution_patching(model, tokens, source, surprise, axes=("layer", "pos", "head"),
                                 names=("z", "attn_out", "result"))
    assert found["attn_out"].axes == ("layer", "pos")
    assert_close(found["z"].values.sum(2), found["attn_out"].values)
    assert_close(found["result"].values, found["z"].values)


def test_fewer_axes_sum_over_the_others_and_their_order_is_kept():
    model, tokens, source = pair()
    last = "blocks.1.attn.hook_z"

    def values(name, axes):
        found = attribution_patching(model, tokens, source, surprise, names=name, axes=axes)[name]
        assert found.axes == tuple(axis for axis in axes if name == "z" or axis != "layer")
        return found.values

    fine = values("z", ("layer", "pos", "head"))
    assert fine.shape == (2, 5, 3, 2)
    assert_close(values("z", ("layer", "head")), fine.sum(1))
    assert_close(values("z", ("head", "layer")), fine.sum(1).transpose(0, 1))
    assert_close(values("z", ("layer",)), fine.sum((1, 2)))
    assert_close(values(last, ("layer", "head")), fine.sum(1)[1])
    assert_close(values(last, ()), fine[1].sum((0, 1)))


def test_pos_means_the_query_on_patterns_and_axes_that_a_name_lacks_are_left_out():
    model, tokens, source = pair()
    names = ("z", "pattern", "embed", "attn_scores")
    found = attribution_patching(model, tokens, source, surprise, names=names,
                                 axes=("layer", "pos", "head"))
    assert {name: found[name].axes for name in names} == {
        "z": ("layer", "pos", "head"), "pattern": ("layer", "pos", "head"),
        "embed": ("pos",), "attn_scores": ("layer", "pos", "head")}
    assert all(each.values.isfinite().all() for each in found.values())
    by_query = attribution_patching(model, tokens, source, surprise, names="pattern",
                                    axes=("layer", "query_pos", "head"))
    assert torch.equal(by_query["pattern"].values, found["pattern"].values)


def test_scores_that_are_minus_infinity_add_nothing():
    model, tokens, source = pair()
    found = attribution_patching(model, tokens, source, surprise, names="attn_scores",
                                 axes=("layer", "head", "query_pos", "key_pos"))["attn_scores"]
    assert found.values.isfinite().all() and found.values.abs().sum() > 0
    future = torch.ones(5, 5).triu(1).bool()
    assert not found.values[:, :, future].any()


def test_heads_and_mlps_are_the_nodes_by_default():
    for changes, there in (({}, {"z", "mlp_out"}), ({"attn_only": True}, {"z"})):
        model, tokens, source = pair(**changes)
        found = attribution_patching(model, tokens, source, surprise)
        assert found.keys() == there and found["z"].values.shape == (2, 3, 2)
        assert all(each.direction == "denoising" for each in found.values())


def test_the_result_gives_a_mean_and_an_interval_that_encloses_it():
    model, tokens, source = pair()
    found = attribution_patching(model, tokens, source, surprise, direction="noising")["z"]
    assert found.direction == "noising"
    assert torch.equal(found.mean, found.values.mean(-1))
    low, high = found.ci()
    assert (low <= found.mean).all() and (found.mean <= high).all()


def test_estimates_are_normalised_by_the_gap_between_the_two_runs():
    model, tokens, source = pair()
    found = attribution_patching(model, tokens, source, DIFFERENCE)["z"]
    swept = get_act_patch_attn_head_out_all_pos(model, tokens, source, DIFFERENCE)
    assert_close(found.baseline, swept.baseline)
    assert_close(found.target, swept.target)
    assert_close(found.normalized(), found.mean / (swept.target - swept.baseline).mean())
    part = model.run_with_cache(tokens, ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"])[1]
    unknown = attribution_patching(model, tiny_tokens(pos=5, seed=9), part, surprise, names="z")
    assert unknown["z"].target is None
    assert "metric is unknown" in refusal(unknown["z"].normalized)


def test_prompts_in_a_batch_give_what_each_gives_alone():
    model, tokens, source = pair()
    for fixes in ((), FIXES):
        how = {"names": ("q", "k", "mlp_out"), "axes": ("layer", "head", "pos"), "fixes": fixes}
        together = attribution_patching(model, tokens, source, surprise, **how)
        for row in range(2):
            alone = attribution_patching(model, tokens[row : row + 1], source.slice(batch=row),
                                         surprise, **how)
            assert_close({(*fixes, name): alone[name].values[..., 0] for name in alone},
                         {(*fixes, name): together[name].values[..., row] for name in alone})


def test_all_nodes_together_take_one_run():
    model, tokens, source = pair()
    runs = []
    with model.hooks([("hook_embed", lambda resid, hook: runs.append(1))]):
        attribution_patching(model, tokens, source, surprise, fixes=("qk",), names=(
            "z", "mlp_out", "resid_pre", "resid_mid", "attn_out", "q", "k", "v", "pattern"))
    assert len(runs) == 1


def test_nothing_is_left_behind_even_after_an_error():
    model, tokens, source = pair()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    integrated_gradients(model, tokens, source, surprise, steps=2)
    for fixes in ((), FIXES):
        attribution_patching(model, tokens, source, surprise, names=("q", "z"), fixes=fixes)
        for broken in (lambda logits: logits.mean(), lambda logits: 1 / 0):
            with pytest.raises((UserError, ZeroDivisionError)):
                attribution_patching(model, tokens, source, broken, fixes=fixes)
            with pytest.raises((UserError, ZeroDivisionError)):
                integrated_gradients(model, tokens, source, broken)
    assert not any(point.listeners for point in model.hook_points().values())
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_it_works_without_gradients_around_it_and_with_frozen_weights():
    model, tokens, source = pair()
    expected = attribution_patching(model, tokens, source, surprise, fixes=FIXES)["z"].values
    model.requires_grad_(False)
    first = "blocks.0.attn.hook_z"  # alone, nothing has a gradient once its own part is dropped
    with torch.no_grad():
        found = attribution_patching(model, tokens, source, surprise, fixes=FIXES)["z"].values
        alone = attribution_patching(model, tokens, source, surprise, names=first, fixes=FIXES)
    assert_close(found, expected)
    assert_close(alone[first].values, expected[0])
    assert not found.requires_grad


# The fixes


@pytest.mark.parametrize("sharpness", [1, 40])
@pytest.mark.parametrize("part", ["q", "k"])
def test_queries_and_keys_are_exact_up_to_the_pattern_with_the_softmax_recomputed(part, sharpness):
    model, tokens, _ = pair(norm="none", attn_only=True)
    with torch.no_grad():
        model.blocks[1].attn.W_Q.mul_(sharpness)
        _, source = model.run_with_cache(tiny_tokens(pos=5, seed=3))
    for axes in (("pos", "head"), ("head", "pos"), ("pos",), ("head",), ()):
        compare_with_patching(model, tokens, source, f"blocks.1.attn.hook_{part}", axes,
                              fixes=("qk",))


def test_the_softmax_fix_does_not_change_other_nodes():
    model, tokens, source = pair()
    names = ("z", "v", "pattern", "q_input")
    plain = attribution_patching(model, tokens, source, surprise, names=names)
    fixed = attribution_patching(model, tokens, source, surprise, names=(*names, "q"),
                                 fixes=("qk",))
    for name in names:
        assert_close(fixed[name].values, plain[name].values)


def test_the_softmax_fix_is_the_slope_itself_for_small_changes():
    model, tokens, source = pair()
    with torch.no_grad():
        _, own = model.run_with_cache(tokens, lambda name: name.endswith(("hook_q", "hook_k")))
    near = type(own)({name: own[name] + 1e-5 * (source[name] - own[name]) for name in own},
                     own.axes)
    for axes in (("layer", "pos", "head"), ("layer", "head")):
        plain, fixed = (attribution_patching(model, tokens, near, surprise, names=("q", "k"),
                                             axes=axes, fixes=fixes) for fixes in ((), ("qk",)))
        size = {part: plain[part].values.abs().max() for part in plain}
        assert_close({(part, axes): fixed[part].values / size[part] for part in plain},
                     {(part, axes): plain[part].values / size[part] for part in plain},
                     atol=1e-3, rtol=0)


def gate(gap, dtype):
    """One head, by hand: the last token opens it (1) or closes it (2) to the first (0: key, value
    1; 3: the opposite key, value 1), `gap` nats against looking at itself, where there is nothing.
    Logit 0 of the last position is what it pays to the first."""
    model = GPT(ModelConfig(n_layers=1, n_heads=1, d_model=4, d_vocab=4, n_ctx=2, norm="none",
                            attn_only=True, positions="none"), seed=None).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        attn = model.blocks[0].attn
        model.W_E.copy_(torch.eye(4))
        model.W_U[1, 0] = 1
        attn.W_Q[0, :, 0] = 2 * gap * torch.tensor([0.0, 1, -1, 0])
        attn.W_K[0, :, 0] = torch.tensor([1.0, 0, 0, -1])
        attn.W_V[0, :, 0] = torch.tensor([1.0, 0, 0, 1])
        attn.W_O[0, 0, 1] = 1
    return model


def paid(logits):
    """Logit 0 of the last position."""
    return logits[..., -1, 0]


def test_at_a_saturated_softmax_the_slope_is_zero_and_the_fix_is_not():
    open_ = torch.tensor([[0, 1]])
    for dtype in (torch.float32, torch.float64):
        model = gate(25.0, dtype)
        for part, pos, other in (("q", 1, [0, 2]), ("k", 0, [3, 1])):
            with torch.no_grad():
                _, source = model.run_with_cache(torch.tensor([other]))
            plain, fixed = (
                attribution_patching(model, open_, source, paid, names=part, axes=("layer", "pos"),
                                     fixes=fixes)[part].values for fixes in ((), ("qk",)))
            assert plain.abs().max() < 1e-8, (part, dtype)
            assert fixed[0, pos].item() == pytest.approx(-1), (part, dtype)
            assert fixed[0, 1 - pos].abs() < 1e-8, (part, dtype)


def cancelling():
    """One block, by hand: the head writes s, what the token says, and the MLP writes -relu(s) where
    the head did. The tokens 0, 1: s = 1, -3."""
    model = GPT(ModelConfig(n_layers=1, n_heads=1, d_model=2, d_vocab=2, n_ctx=1, d_mlp=1,
                            norm="none", positions="none", activation="relu"), seed=None).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        block = model.blocks[0]
        model.W_E[:, 0] = torch.tensor([1.0, -3.0])
        block.attn.W_V[0, 0, 0] = block.attn.W_O[0, 0, 1] = 1
        block.mlp.W_in[1, 0] = 1
        block.mlp.W_out[0, 1] = -1
        model.W_U[1, 0] = 1
    return model


def test_dropping_gradients_finds_effects_that_cancel():
    model, tokens = cancelling(), torch.tensor([[0]])
    with torch.no_grad():
        _, source = model.run_with_cache(torch.tensor([[1]]))
    assert moved_metric(model, tokens, "blocks.0.attn.hook_z", lambda own: source["z", 0],
                        lambda logits: logits[0, 0, 0]) == -3  # -3 - relu(-3), and before 1 - 1
    how = {"names": ("z", "attn_out", "mlp_out", "resid_pre"), "axes": ("layer",)}
    plain, dropped = (attribution_patching(model, tokens, source, lambda logits: logits[..., 0, 0],
                                           fixes=fixes, **how) for fixes in ((), ("grad_drop",)))
    # s moves by -4. The head's own part aside, the MLP's is left, and without it the slope is 1;
    # the stream before both loses its only way without the head, and has the mean of 0 and 4.
    assert {name: each.values.item() for name, each in plain.items()} == {
        "z": 0, "attn_out": 0, "mlp_out": 1, "resid_pre": 0}
    assert {name: each.values.item() for name, each in dropped.items()} == {
        "z": 4, "attn_out": 4, "mlp_out": 1, "resid_pre": 2}


@pytest.mark.parametrize("changes", [{}, {"attn_only": True}], ids=str)
def test_a_dropped_gradient_is_the_slope_with_that_part_held_constant(changes):
    model, tokens, source = pair(**changes)
    parts = [f"blocks.{layer}.hook_{part}_out" for layer in (0, 1) for part in ("attn", "mlp")
             if part == "attn" or not changes]
    names = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_pre", parts[-1], parts[0], "hook_embed"]
    found = attribution_patching(model, tokens, source, surprise, names=names, axes=("pos",),
                                 fixes=("grad_drop",))
    with torch.no_grad():
        _, own = model.run_with_cache(tokens)
    for name in names:
        inside = name not in ("blocks.1.hook_resid_pre", "hook_embed")
        for effect, mask in each_cell(found[name].values, ("pos",), name, source):
            sizes = torch.zeros(2, dtype=torch.float64)
            for part in parts:
                with model.hooks([(part, lambda write, hook: own[hook.name])]):
                    up, down = (moved_metric(
                        model, tokens, name,
                        lambda now, h=h, name=name, mask=mask:
                            now + h * mask * (source[name] - own[name]), surprise)
                        for h in (1e-5, -1e-5))
                    sizes += (up - down).abs() / 2e-5 * (part != name)
            assert_close(effect, sizes / (len(parts) - inside), atol=1e-6, rtol=1e-6)


def test_both_fixes_take_the_recomputed_softmax_through_the_dropped_gradients():
    model, tokens, source = pair(norm="none", attn_only=True)
    how = {"names": "blocks.1.attn.hook_q", "axes": ("pos", "head")}
    fixed = attribution_patching(model, tokens, source, DIFFERENCE, fixes=("qk",), **how)
    both = attribution_patching(model, tokens, source, DIFFERENCE, fixes=FIXES, **how)
    # No part comes after the last pattern: of two, its own is left out, the other changes nothing.
    assert_close(both[how["names"]].values, fixed[how["names"]].values.abs())


# Integrated gradients


def test_integrated_gradients_sum_to_the_change_of_the_metric():
    model, tokens, source = pair()
    with torch.no_grad():
        before = surprise(model(tokens))
    for act_name in ("embed", ("resid_pre", 0), ("z", 0), ("pattern", 1), ("attn_scores", 0),
                     "blocks.1.hook_mlp_out"):
        name = source.full_name(act_name)
        split, gap = integrated_gradients(model, tokens, source, surprise, act_name=act_name)
        assert split.shape == source[name].shape and gap.shape == (2,)
        assert gap.max() < 1e-4 and (gap >= 0).all(), name
        after = moved_metric(model, tokens, name, lambda own, name=name: source[name], surprise)
        assert_close({name: split.flatten(1).sum(1)}, {name: after - before}, atol=1e-4, rtol=0)


def test_the_path_of_the_embedding_ends_in_the_run_of_the_source():
    for changes in ({}, {"positions": "none"}, {"n_layers": 0}):
        model, tokens, source = pair(**changes)
        split, _ = integrated_gradients(model, tokens, source, surprise)
        with torch.no_grad():
            change = surprise(model(tiny_tokens(pos=5, seed=3))) - surprise(model(tokens))
        assert_close(split.sum((1, 2)), change, atol=1e-4, rtol=0)


def test_the_gap_is_the_error_of_the_sum_and_falls_with_the_steps_as_the_rule_promises():
    model, tokens, source = pair()
    with torch.no_grad():
        change = surprise(model(tiny_tokens(pos=5, seed=3))) - surprise(model(tokens))
    for rule, order in (("right", 1), ("trapezoid", 2)):
        wide, narrow = (integrated_gradients(model, tokens, source, surprise, steps=n, rule=rule)
                        for n in (48, 96))
        assert_close(wide[1], (wide[0].sum((1, 2)) - change).abs())
        assert_close({rule: wide[1] / narrow[1]},
                     {rule: torch.full_like(change, 2.0**order)}, rtol=0.1, atol=0)


def test_gauss_s_gap_falls_faster_than_any():
    model, tokens, source = pair()
    gaps = [integrated_gradients(model, tokens, source, surprise, steps=n)[1].max()
            for n in (4, 8, 16, 32)]
    assert all(narrow < wide / 3 for wide, narrow in itertools.pairwise(gaps))


def test_one_step_is_enough_if_the_metric_is_linear():
    model, tokens, source = pair(norm="none", attn_only=True)
    plain = attribution_patching(model, tokens, source, DIFFERENCE, names="z",
                                 axes=("layer", "pos", "head"))["z"].values[1]
    for rule in ("gauss", "right", "trapezoid"):
        split, gap = integrated_gradients(model, tokens, source, DIFFERENCE, act_name=("z", 1),
                                          steps=1, rule=rule)
        assert gap.max() < 1e-10, rule
        assert_close({rule: split.sum(-1).movedim(0, -1)}, {rule: plain})


def test_one_trapezoid_is_the_mean_of_the_slopes_at_both_ends():
    model, tokens, source = pair()
    split, _ = integrated_gradients(model, tokens, source, surprise, steps=1, rule="trapezoid")
    right, _ = integrated_gradients(model, tokens, source, surprise, steps=1, rule="right")
    left = model.gradient_cache(tokens, surprise, "hook_embed")[2]["embed"]
    left = left * (source["embed"] - model.W_E.detach()[tokens])
    assert_close(split, (left + right) / 2)


def test_integrated_gradients_see_past_a_saturated_softmax():
    model, closed = gate(12.0, torch.float64), torch.tensor([[0, 2]])
    with torch.no_grad():
        _, source = model.run_with_cache(torch.tensor([[0, 1]]))
    slope = attribution_patching(model, closed, source, paid, names="q", axes=("layer",))["q"]
    split, gap = integrated_gradients(model, closed, source, paid, act_name=("q", 0))
    assert slope.values.abs().max() < 1e-3
    assert_close(split.sum((1, 2, 3)), torch.ones(1).double(), atol=1e-4, rtol=0)
    assert gap.max() < 1e-5


def test_integrated_gradients_of_a_batch_are_those_of_each_prompt_alone():
    model, tokens, source = pair()
    together = integrated_gradients(model, tokens, source, surprise, steps=3)
    for row in range(2):
        alone = integrated_gradients(model, tokens[row : row + 1], source.slice(batch=row),
                                     surprise, steps=3)
        assert_close(alone[0][0], together[0][row])
        assert_close(alone[1][0], together[1][row])


# What can't be


def test_unknown_names_axes_and_settings_are_refused():
    model, tokens, source = pair()
    for how, told in (
            ({"direction": "forwards"}, ["'forwards'"]), ({"fixes": ("gradrop",)}, ["'gradrop'"]),
            ({"names": "zz"}, ["blocks.0.hook_zz"]),
            ({"names": "blocks.0.attn.hook_patern"}, ["hook_patern", "hook_pattern"]),
            ({"names": ("z", "blocks.2.attn.hook_z")}, ["blocks.2.attn.hook_z"]),
            ({"names": "z", "axes": ("head",)}, ["'z'", "'layer'"]),
            ({"names": "z", "axes": ("layer", "heads")}, ["'heads'", "layer, pos, head, d_head"]),
            ({"names": "hook_embed", "axes": ("layer", "head")}, ["'head'", "pos, d_model"]),
            ({"names": "mlp_out", "axes": ("layer", "head")}, ["mlp_out", "'head'"]),
            ({"names": "z", "axes": ("layer", "batch")}, ["'batch'"]),
            ({"names": "q", "axes": ("layer", "d_head"), "fixes": ("qk",)}, ["'d_head'"]),
            ({"names": (), "axes": ()}, ["matches none"])):
        found = refusal(attribution_patching, model, tokens, source, surprise, **how)
        assert all(part in found for part in told), found


def test_wrong_settings_of_integrated_gradients_are_refused():
    model, tokens, source = pair()
    for how, told in (({"steps": 0}, "steps=0"), ({"rule": "simpson"}, "'simpson'"),
                      ({"act_name": ("z", 2)}, "layer 2"), ({"act_name": "embedd"}, "embedd")):
        assert told in refusal(integrated_gradients, model, tokens, source, surprise, **how)


def assert_both_refuse(model, tokens, source, metric, told):
    for method in (attribution_patching, integrated_gradients):
        assert told in refusal(method, model, tokens, source, metric)


def test_a_source_that_is_the_run_itself_is_refused_however_it_was_computed():
    some = ["hook_embed", *(f"blocks.{layer}.{part}" for layer in range(2)
                            for part in ("attn.hook_z", "hook_mlp_out"))]
    for dtype in (torch.float32, torch.float64):
        model, tokens, _ = pair(dtype)
        for names_filter in (None, some):  # by the explicit arithmetic, and by the fused one
            with torch.no_grad():
                _, own = model.run_with_cache(tokens, names_filter)
            assert_both_refuse(model, tokens, own, surprise, "the source equals the run")
    own = model.run_with_cache(tokens)[1]
    told = refusal(attribution_patching, model, tokens, own, surprise, names="q")
    assert "blocks.0.attn.hook_q, blocks.1.attn.hook_q" in told


def test_scores_of_the_run_itself_are_refused_though_some_are_infinite():
    model, tokens, source = pair()
    own = model.run_with_cache(tokens)[1]
    assert "the source equals the run" in refusal(
        attribution_patching, model, tokens, own, surprise, names="attn_scores")
    attribution_patching(model, tokens, source, surprise, names="attn_scores")


def test_a_source_of_another_shape_or_without_the_activation_is_refused():
    model, tokens, source = pair()
    for shape in ({"pos": 4}, {"batch": 3}):
        with torch.no_grad():
            _, other = model.run_with_cache(tiny_tokens(**{"pos": 5} | shape, seed=3))
        assert_both_refuse(model, tokens, other, surprise, "in the source, [2, 5, ")
    assert_both_refuse(model, tokens, type(source)({}, source.axes), surprise, "was not cached")


def test_a_metric_without_one_number_a_row_or_without_gradient_is_refused():
    for metric, told in ((lambda logits: logits.mean(), "[] for logits [2, 5, 11]"),
                         (lambda logits: logits[..., -1, :], "[2, 11]"),
                         (lambda logits: 1.0, "float"),
                         (lambda logits: target_rank(logits, 3), "no gradient")):
        assert_both_refuse(*pair(), metric, told)


def test_dropout_is_refused():
    model, tokens, source = pair(dropout=0.1)
    assert_both_refuse(model.train(), tokens, source, surprise, "model.eval()")
    assert model.training


def test_a_model_of_one_part_has_nothing_to_drop_and_one_without_layers_has_no_heads():
    one = pair(n_layers=1, attn_only=True)
    assert "has 1;" in refusal(attribution_patching, *one, surprise, fixes=("grad_drop",))
    assert "none of the 4" in refusal(attribution_patching, *pair(n_layers=0), surprise)
