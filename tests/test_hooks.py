"""Hook points: listeners, edits, refusals, and gradients at every point."""

import copy

import pytest
import torch
from helpers import WIDE, refusal, tiny_model, tiny_tokens
from torch import nn

from activation_cache import UnknownName
from hooks import HookPoint, hook_table
from metrics import Metric, as_metric
from utils import UserError, seeded_generator

Z = "blocks.0.attn.hook_z"
POINTS_OF_A_BLOCK = """
    hook_resid_pre hook_q_input hook_k_input hook_v_input hook_attn_out hook_resid_mid hook_mlp_in
    hook_mlp_out hook_resid_post ln1.hook_scale ln1.hook_normalized ln2.hook_scale
    ln2.hook_normalized attn.hook_q attn.hook_k attn.hook_v attn.hook_attn_scores attn.hook_pattern
    attn.hook_z attn.hook_result mlp.hook_pre mlp.hook_post""".split()
LARGE = ["hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result"]


def everything(name):
    return True


def inert(tensor, hook):
    return None


def double(tensor, hook):
    return 2 * tensor


def n_listeners(model):
    return sum(len(point.listeners) for point in model.hook_points().values())


# Which points there are


def test_the_points_are_those_of_transformer_lens():
    names = ["hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized"]
    names += [f"blocks.{layer}.{point}" for layer in range(2) for point in POINTS_OF_A_BLOCK]
    assert sorted(tiny_model().hook_points()) == sorted(names)


def test_each_activation_has_the_axes_that_its_point_names():
    model = tiny_model(d_mlp=5)
    sizes = {"batch": 2, "pos": 7, "query_pos": 7, "key_pos": 7, "head": 3, "d_head": 4,
             "d_model": 12, "d_mlp": 5, "1": 1}
    _, cache = model.run_with_cache(tiny_tokens(), names_filter=everything)
    for name, point in model.hook_points().items():
        assert list(cache[name].shape) == [sizes[axis] for axis in point.axes.split()], name


def test_points_are_no_modules_and_leave_no_trace_in_a_checkpoint():
    model = tiny_model()
    assert not any(isinstance(point, nn.Module) for point in model.hook_points().values())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_the_table_lists_each_point_of_the_first_block_once():
    lines = hook_table(tiny_model()).splitlines()
    names = [line.split()[0] for line in lines]
    assert sorted(names) == sorted(
        ["hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized",
         *(f"blocks.0.{point}" for point in POINTS_OF_A_BLOCK)])
    by_name = dict(zip(names, lines, strict=True))
    assert "[batch, head, query_pos, key_pos]" in by_name["blocks.0.attn.hook_pattern"]
    noted = {name for name, line in by_name.items() if "only when named" in line}
    assert noted == {f"blocks.0.{point}" for point in LARGE}


# Who is told, and when


def test_every_hook_point_fires_once_a_forward_under_its_own_name():
    model = tiny_model()
    told = []
    tell = [(everything, lambda t, hook: told.append(hook.name))]
    model.run_with_hooks(tiny_tokens(), fwd_hooks=tell)
    assert sorted(told) == sorted(model.hook_points())


def test_hooks_act_in_the_order_in_which_they_were_added():
    model = tiny_model()
    seen = []
    steps = [(Z, lambda z, hook: torch.ones_like(z)), ([Z], lambda z, hook: z + 2),
             (Z, lambda z, hook: z * 5), (Z, lambda z, hook: seen.append(z))]
    model.run_with_hooks(tiny_tokens(), fwd_hooks=steps)
    assert torch.equal(seen[0], torch.full((2, 7, 3, 4), 15.0))


def test_a_cache_keeps_its_activation_and_not_the_edits_of_later_hooks():
    model, tokens = tiny_model(), tiny_tokens()
    plain = model.run_with_cache(tokens, names_filter=Z)[1][Z]
    with model.hooks([(Z, double)]), model.caching(Z) as after:
        model(tokens)
    with model.caching(Z) as before, model.hooks([(Z, double)]):
        model(tokens)
    assert torch.equal(before[Z], plain) and torch.equal(after[Z], 2 * plain)


def test_an_edit_acts_on_everything_after_it_and_on_nothing_before():
    model, tokens = tiny_model(), tiny_tokens()
    _, plain = model.run_with_cache(tokens)
    with model.hooks([("blocks.1.hook_resid_pre", double)]):
        _, edited = model.run_with_cache(tokens)
    same = {name for name in plain if torch.equal(plain[name], edited[name])}
    assert same == {name for name in plain if name.startswith(("blocks.0.", "hook_"))}


def test_a_filter_is_a_name_a_list_or_a_callable():
    model = tiny_model()
    filters = {
        "a name": (Z, {Z}),
        "a list": ([Z, "hook_embed"], {Z, "hook_embed"}),
        "a name twice": ((Z, Z), {Z}),
        "a callable": (lambda name: name.endswith("attn.hook_z"), {Z, "blocks.1.attn.hook_z"}),
        "a large point": ("blocks.1.attn.hook_result", {"blocks.1.attn.hook_result"}),
    }
    for kind, (names_filter, names) in filters.items():
        told = []
        tell = [(names_filter, lambda t, hook, told=told: told.append(hook.name))]
        model.run_with_hooks(tiny_tokens(), fwd_hooks=tell)
        assert sorted(told) == sorted(names), f"{kind} is told at {told}"
        _, cache = model.run_with_cache(tiny_tokens(), names_filter=names_filter)
        assert set(cache) == names, f"{kind} keeps {list(cache)}"


def test_without_a_filter_all_but_the_four_large_points_are_kept():
    model = tiny_model()
    _, cache = model.run_with_cache(tiny_tokens())
    large = {f"blocks.{layer}.{point}" for layer in range(2) for point in LARGE}
    assert set(cache) == set(model.hook_points()) - large


def test_caching_keeps_the_blocks_that_run_and_the_last_run_counts():
    model, tokens = tiny_model(), tiny_tokens()
    with model.caching() as cache:
        model.embed(tokens)
        assert set(cache) == {"hook_embed", "hook_pos_embed"}
        resid = model.run_blocks(model.embed(tokens.flip(0)), stop=1)
    assert torch.equal(cache["resid_post", 0], resid)
    assert torch.equal(cache["embed"], model.W_E[tokens.flip(0)])
    assert "blocks.1.hook_resid_pre" not in cache


def test_run_with_hooks_is_the_forward_inside_the_context():
    model, tokens = tiny_model(), tiny_tokens()
    with model.hooks([(Z, double)]) as same:
        inside = model(tokens)
    assert same is model
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(Z, double)]), inside)
    assert not torch.allclose(inside, model(tokens))


# Looking changes nothing


def test_inert_hooks_leave_the_logits_bit_for_bit():
    model, tokens = tiny_model(), tiny_tokens()
    listened, _ = model.run_with_cache(tokens, names_filter=everything)
    torch.testing.assert_close(listened, model(tokens), rtol=0, atol=1e-5)
    returns = {"None": inert, "its tensor": lambda t, hook: t, "a copy": lambda t, hook: t.clone()}
    for what, fn in returns.items():
        logits = model.run_with_hooks(tokens, fwd_hooks=[(everything, fn)])
        assert torch.equal(logits, listened), f"a hook that returns {what} moves the logits"


def test_listening_at_one_point_does_not_change_the_logits():
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    plain = model(tokens)
    for point in POINTS_OF_A_BLOCK:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.0.{point}", inert)])
        moved = (logits - plain).abs().max().item()
        assert moved < 1e-12, f"listening at {point} moves the logits by {moved}"


# How hooks end


def test_no_hook_is_left_after_a_context_closes_or_breaks():
    model, tokens = tiny_model(), tiny_tokens()
    before = model(tokens)
    with model.hooks([(everything, double)]):
        assert n_listeners(model) == len(model.hook_points())
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(tokens, fwd_hooks=[(everything, inert), (Z, lambda t, hook: 1 / 0)])
    with pytest.raises(UnknownName), model.hooks([(Z, double), ("nowhere", double)]):
        pass
    with pytest.raises(UserError), model.caching(Z):
        model(tokens - 100)
    assert n_listeners(model) == 0 and torch.equal(model(tokens), before)


def test_nested_contexts_keep_their_own_hooks():
    model, tokens = tiny_model(), tiny_tokens()
    only_outer = model.run_with_hooks(tokens, fwd_hooks=[(Z, double)])
    with model.hooks([(Z, double)]):
        with pytest.raises(ZeroDivisionError), model.hooks([(Z, double)]):
            raise ZeroDivisionError
        assert torch.equal(model(tokens), only_outer)
        with model.hooks([(Z, double)]):
            both = model(tokens)
    four_times = model.run_with_hooks(tokens, fwd_hooks=[(Z, lambda z, hook: 4 * z)])
    assert torch.equal(both, four_times) and not torch.equal(both, only_outer)


def test_the_same_function_added_twice_acts_twice_and_is_removed_exactly():
    point, one = HookPoint("pos"), torch.ones(3)
    remove_first, remove_second = point.add(double), point.add(double)
    assert point(one).tolist() == [4, 4, 4]
    remove_first()
    remove_first()  # a second time removes nothing more
    assert point(one).tolist() == [2, 2, 2]
    remove_second()
    assert point(one) is one


def test_a_hook_that_removes_another_one_does_not_disturb_the_forward():
    point = HookPoint("pos")
    told = []
    removers = [point.add(lambda t, hook: removers[1]()), point.add(lambda t, hook: told.append(t))]
    point(torch.ones(3))
    point(torch.ones(3))
    assert len(told) == 1


def test_a_copy_of_a_model_has_no_listeners_and_points_of_its_own():
    model, tokens = tiny_model(), tiny_tokens()
    before = model(tokens)
    with model.hooks([(everything, double)]):
        twin = copy.deepcopy(model)
    assert n_listeners(twin) == 0 and torch.equal(twin(tokens), before)
    with twin.hooks([(Z, double)]):
        assert n_listeners(model) == 0


@pytest.mark.slow
def test_a_hook_added_to_a_compiled_model_acts_and_its_removal_too():
    model, tokens = tiny_model(n_layers=1, attn_only=True), tiny_tokens()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(tokens)
        with model.hooks([(Z, double)]):
            edited, expected = compiled(tokens), model(tokens)
        torch.testing.assert_close(edited, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(edited, before)
        assert torch.equal(compiled(tokens), before)


# What is refused


def test_an_unknown_name_raises_and_names_the_closest():
    model, tokens = tiny_model(), tiny_tokens()
    for name, closest in (("blocks.0.attn.hook_patern", "blocks.0.attn.hook_pattern"),
                          ("hook_embd", "hook_embed"), ("ln_final.scale", "ln_final.hook_scale")):
        for use in (lambda name=name: model.run_with_hooks(tokens, fwd_hooks=[(name, inert)]),
                    lambda name=name: model.run_with_cache(tokens, names_filter=[Z, name]),
                    lambda name=name: model.gradient_cache(tokens, torch.sum, name)):
            with pytest.raises(UnknownName, match=f"{name} .*{closest}"):
                use()


def test_a_metric_of_the_stream_has_the_gradients_of_the_same_metric_of_all_logits():
    model, tokens = tiny_model(unembed_bias=True), tiny_tokens()
    metric = Metric.logit_diff([3, 5], [7, 2], pos=4)
    rows = torch.arange(2)

    def of_all(logits):
        return logits[rows, 4, torch.tensor([3, 5])] - logits[rows, 4, torch.tensor([7, 2])]

    value, acts, grads = model.gradient_cache(tokens, metric)
    all_value, all_acts, all_grads = model.gradient_cache(tokens, of_all)
    torch.testing.assert_close(value, all_value)
    assert list(grads) == list(all_grads) and "ln_final.hook_normalized" in grads
    for name in grads:
        torch.testing.assert_close(acts[name], all_acts[name])
        torch.testing.assert_close(grads[name], all_grads[name])


def test_other_runs_inside_a_metric_are_not_captured():
    model, tokens = tiny_model(), tiny_tokens()

    def against_another_run(logits):
        return (logits - model(tokens.flip(0)).detach())[:, -1, 3]

    _, acts, grads = model.gradient_cache(tokens, as_metric(against_another_run))
    _, own_acts, own_grads = model.gradient_cache(tokens, lambda logits: logits[:, -1, 3])
    for name in own_grads:
        torch.testing.assert_close(acts[name], own_acts[name])
        torch.testing.assert_close(grads[name], own_grads[name])


def test_a_filter_that_matches_nothing_raises():
    model, tokens = tiny_model(), tiny_tokens()
    n_points = str(len(model.hook_points()))
    for case, none in (("an empty list", []), ("a callable", lambda name: False)):
        assert n_points in refusal(lambda none=none: model.run_with_cache(tokens, none), case)
        assert n_points in refusal(lambda none=none: model.run_with_hooks(tokens, [(none, inert)]),
                                   case)


def test_a_hook_that_returns_something_else_raises():
    model, tokens = tiny_model(), tiny_tokens()
    kept = "[2, 7, 3, 4] torch.float32"
    for case, fn, told in (
        ("fewer positions", lambda t, hook: t[:, :3], ("[2, 3, 3, 4]", kept)),
        ("what would broadcast", lambda t, hook: t.mean(0, keepdim=True), ("[1, 7, 3, 4]", kept)),
        ("another dtype", lambda t, hook: t.double(), ("float64", kept)),
        ("a number", lambda t, hook: 3.0, ("float",)),
        ("a tuple", lambda t, hook: (t,), ("tuple",)),
    ):
        message = refusal(lambda fn=fn: model.run_with_hooks(tokens, fwd_hooks=[(Z, fn)]), case)
        for part in (Z, *told):
            assert part in message, f"{case} is refused without naming {part}: {message}"


@torch.no_grad()
def test_an_edit_in_place_raises_with_the_remedy_at_any_point():
    model, tokens = tiny_model(), tiny_tokens()
    edits = {
        "the tensor": lambda t, hook: t.mul_(2),
        "an item": lambda t, hook: t.__setitem__((0, 0), 0.0),
        "a view": lambda t, hook: t[:, 0].zero_(),
        "a view of a view": lambda t, hook: t.transpose(0, 1)[1][0].zero_(),
        "what is detached": lambda t, hook: t.detach().add_(1),
    }
    for name in ("hook_embed", "hook_pos_embed", Z, "blocks.0.attn.hook_pattern",
                 "blocks.1.hook_q_input"):
        for what, edit in edits.items():
            case = f"an edit of {what} at {name}"
            message = refusal(lambda hook=(name, edit): model.run_with_hooks(tokens, [hook]), case)
            assert name in message and "t.clone()" in message, f"{case}: {message}"


def test_the_remedy_in_the_message_on_an_edit_in_place_works():
    def mended(t, hook):
        t = t.clone()
        t[:, :, 1] = 0
        return t

    model, tokens = tiny_model(), tiny_tokens()
    edited = model.run_with_hooks(tokens, fwd_hooks=[(Z, mended)])
    with torch.no_grad():
        model.blocks[0].attn.W_O[1] = 0
    torch.testing.assert_close(edited, model(tokens), rtol=0, atol=1e-5)


def test_inference_mode_is_refused_if_there_are_listeners():
    model, tokens = tiny_model(), tiny_tokens()
    with torch.inference_mode():
        assert "torch.no_grad()" in refusal(lambda: model.run_with_cache(tokens), "inference mode")
        assert model(tokens).isfinite().all()


# Gradients at every point


def metric(logits):
    """A curved number for each row, [batch]."""
    weights = torch.randn(logits.shape[1:], generator=seeded_generator(5), dtype=logits.dtype)
    return (logits.log_softmax(-1) * weights).sum((-1, -2)) / 10


MODELS = [
    {},
    {"attn_only": True, "norm": "none"},
    {"positions": "none", "tie_embeddings": True, "n_layers": 1},
    {**WIDE, "d_vocab_out": 13},
]


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_the_gradient_at_every_point_is_the_slope_of_central_differences(changes):
    """Along a random direction at each point; scores of -inf stay where they are."""
    model, tokens = tiny_model(dtype=torch.float64, **changes), tiny_tokens()
    _, acts, grads = model.gradient_cache(tokens, metric, everything)
    assert set(grads) == set(acts) == set(model.hook_points())
    for name, act in acts.items():
        direction = torch.randn(act.shape, generator=seeded_generator(6), dtype=act.dtype)

        def moved(step, name=name, direction=direction):
            with torch.no_grad():
                return metric(model.run_with_hooks(
                    tokens, fwd_hooks=[(name, lambda t, hook: t + step * direction)])).sum()

        slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
        gradient = (grads[name] * direction)[act.isfinite()].sum()
        assert gradient.item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-8), name
        assert slope.abs() > 1e-4, name  # so that the comparison says something


def test_a_point_alone_has_the_gradient_that_it_has_among_all():
    model, tokens = tiny_model(dtype=torch.float64, n_layers=1), tiny_tokens()
    _, _, together = model.gradient_cache(tokens, metric, everything)
    for name in together:
        _, _, alone = model.gradient_cache(tokens, metric, name)
        assert set(alone) == {name}
        torch.testing.assert_close(alone[name], together[name], rtol=0, atol=1e-11)


def test_the_value_and_the_activations_are_those_of_the_same_run_without_gradients():
    model, tokens = tiny_model(), tiny_tokens()
    value, acts, grads = model.gradient_cache(tokens, metric)
    logits, cache = model.run_with_cache(tokens)
    assert torch.equal(value, metric(logits)) and value.shape == (2,)
    assert set(acts) == set(grads) == set(cache)
    assert all(torch.equal(acts[name], cache[name]) for name in cache)
    assert not any(t.requires_grad for t in (value, *acts.values(), *grads.values()))


def test_a_metric_a_row_is_differentiated_as_its_sum():
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    _, _, rows = model.gradient_cache(tokens, metric)
    _, _, total = model.gradient_cache(tokens, lambda logits: metric(logits).sum())
    _, _, first = model.gradient_cache(tokens[:1], metric)
    for name in rows:
        assert torch.equal(rows[name], total[name])
        torch.testing.assert_close(rows[name][:1], first[name], rtol=0, atol=1e-10)


def test_two_points_that_hold_one_tensor_have_one_gradient():
    model = tiny_model(positions="none")
    _, _, grads = model.gradient_cache(tiny_tokens(), metric)
    assert torch.equal(grads["hook_embed"], grads["resid_pre", 0])
    assert torch.equal(grads["resid_post", 0], grads["resid_pre", 1])


def test_points_that_the_metric_does_not_reach_have_zero_gradients():
    model = tiny_model()
    other = torch.randn(2, 7, 12, generator=seeded_generator(3))
    with model.hooks([("blocks.1.hook_resid_mid", lambda t, hook: other)]):
        _, acts, grads = model.gradient_cache(tiny_tokens(), metric, everything)
    after = {"blocks.1.hook_resid_mid", "blocks.1.hook_mlp_in", "blocks.1.hook_resid_post"}
    for name in grads:
        reached = name in after or name.startswith(("blocks.1.mlp", "blocks.1.hook_mlp_out",
                                                    "blocks.1.ln2", "ln_final"))
        assert bool(grads[name].any()) == reached, name
        assert grads[name].shape == acts[name].shape and not grads[name].isnan().any()


def test_a_metric_of_the_first_position_has_no_gradient_at_later_ones():
    _, _, grads = tiny_model().gradient_cache(tiny_tokens(), lambda logits: logits[:, 0, 3])
    assert grads["resid_post", 0][:, 0].any() and not grads["resid_post", 0][:, 1:].any()


def test_no_weights_grad_is_touched():
    model, tokens = tiny_model(), tiny_tokens()
    model.gradient_cache(tokens, metric)
    assert all(weight.grad is None for weight in model.parameters())
    metric(model(tokens)).sum().backward()
    before = [weight.grad.clone() for weight in model.parameters()]
    model.gradient_cache(tokens, metric)
    after = [weight.grad for weight in model.parameters()]
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


def test_frozen_weights_and_no_grad_change_no_gradient():
    tokens = tiny_tokens()
    for names_filter in (None, everything, "blocks.1.attn.hook_result"):
        model = tiny_model(dtype=torch.float64)
        _, _, expected = model.gradient_cache(tokens, metric, names_filter)
        with torch.no_grad():
            _, _, without = model.gradient_cache(tokens, metric, names_filter)
        _, _, frozen = model.requires_grad_(False).gradient_cache(tokens, metric, names_filter)
        assert not any(weight.requires_grad for weight in model.parameters())
        for name in expected:
            assert torch.equal(without[name], expected[name]), f"{name} under no_grad"
            torch.testing.assert_close(frozen[name], expected[name], rtol=0, atol=1e-12)


def test_an_edit_made_outside_is_part_of_what_is_differentiated():
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    with model.hooks([(Z, double)]):
        _, acts, grads = model.gradient_cache(tokens, metric, [Z, "blocks.0.attn.hook_v"])
    assert torch.equal(acts[Z], 2 * model.run_with_cache(tokens, names_filter=Z)[1][Z])
    by_hand = model.run_with_cache(tokens)[1]["pattern", 0].mT @ (2 * grads[Z]).transpose(1, 2)
    torch.testing.assert_close(grads["v", 0], by_hand.transpose(1, 2), rtol=0, atol=1e-12)


def test_other_runs_inside_the_metric_are_not_captured():
    model, tokens = tiny_model(), tiny_tokens()
    clean = model(tiny_tokens(seed=3)).detach()

    def distance(baseline):
        return lambda logits: (logits - baseline()).pow(2).sum((1, 2))

    here = model.gradient_cache(tokens, distance(lambda: clean), everything)
    inside = model.gradient_cache(
        tokens, distance(lambda: model(tiny_tokens(seed=3)).detach()), everything)
    for one, other in zip(here[1:], inside[1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_metric_that_reaches_nothing_has_zero_gradients_everywhere():
    model, tokens = tiny_model(), tiny_tokens()
    value, _, grads = model.gradient_cache(tokens, lambda logits: torch.tensor(3.0), everything)
    assert value == 3 and not any(gradient.any() for gradient in grads.values())
