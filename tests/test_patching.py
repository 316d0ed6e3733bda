"""Every sweep against the plain loop over hooks; paths against their definition by hooks."""

import itertools

import numpy as np
import pytest
import torch
from helpers import WIDE, tiny_model, tiny_tokens
from torch.testing import assert_close

import patching
import rerun
from activation_cache import UnknownName, get_act_name
from losses import next_token_loss
from metrics import Metric, as_metric, logit_diff
from patching import PatchResult, activation_patch, path_patch, path_patch_matrix
from rerun import Rerun
from utils import UserError

CLEAN, CORRUPT = tiny_tokens(3, 5, seed=3), tiny_tokens(3, 5, seed=4)
CORRUPT[:, :2] = CLEAN[:, :2]  # prompts that begin alike
DIFFERENCE = Metric.logit_diff([1, 2, 3], [4, 5, 6])
METRICS = {
    "at the end": DIFFERENCE,
    "at two places": Metric(lambda chosen: chosen[..., 0, 0] - chosen[..., 1, 1], [1, -2], [3, 9]),
    "a plain function": lambda logits: next_token_loss(logits, CORRUPT, reduction="none"),
}
HEAD_PARTS = ("z", "q", "k", "v", "pattern")
SWEEPS = [
    ("resid_pre", ("layer", "pos")), ("resid_mid", ("layer", "pos")),
    ("attn_out", ("layer", "pos")), ("mlp_out", ("layer", "pos")), ("resid_post", ("layer", "pos")),
    *((name, ("layer", "head")) for name in HEAD_PARTS),
    *((name, ("layer", "pos", "head")) for name in HEAD_PARTS),
    ("pattern", ("layer", "head", "query_pos", "key_pos")), ("z", ("layer",)),
    ("blocks.1.attn.hook_z", ("head", "pos")),  # from here on without a short cut
    ("attn_scores", ("layer", "head")), ("q_input", ("layer", "head")),
    ("result", ("layer", "pos")), ("pre", ("layer", "pos")), ("post", ("layer", "d_mlp")),
    ("mlp_in", ("layer", "pos")),
    ("embed", ("pos",)), ("blocks.1.ln1.hook_scale", ("pos",)), ("ln_final.hook_normalized", ()),
]
# Other shapes: one sweep for each way into the model that the shape changes
SHAPES = [({"attn_only": True}, ["resid_pre", "attn_out", "pattern", "result"]),
          ({"norm": "none"}, ["resid_mid", "mlp_out", "k", "mlp_in"]),
          ({"tie_embeddings": True, "unembed_bias": True}, ["resid_post", "v", "pre", "embed"]),
          (WIDE, ["resid_mid", "z", "q", "result", "pattern", "pre"]),
          ({"n_layers": 3, "positions": "none", "attn_bias": False},
           ["resid_pre", "mlp_out", "z", "q", "v", "mlp_in"])]


def cache_of(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens, lambda name: True)[1]


def doubled(**changes):
    return tiny_model(dtype=torch.float64, **changes)


@torch.no_grad()
def logits_by_the_loop(model, tokens, source, sweep):
    """The logits of every cell, [*cells, batch, pos, d_vocab]: a whole run for each."""
    act_name, axes = sweep
    layers = range(model.cfg.n_layers) if "layer" in axes else [None]
    rows = []
    for name in [get_act_name(act_name, layer) for layer in layers]:
        dims = model.hook_points()[name].axes.replace("query_pos", "pos").split()
        inner = [axis.replace("query_pos", "pos") for axis in axes if axis != "layer"]
        sizes = [source[name].shape[dims.index(axis)] for axis in inner]
        runs = []
        for cell in itertools.product(*map(range, sizes)):
            where = [slice(None)] * len(dims)
            for axis, index in zip(inner, cell, strict=True):
                where[dims.index(axis)] = index

            def put(own, hook, where=tuple(where)):
                own = own.clone()
                own[where] = source[hook.name][where]
                return own

            runs.append(model.run_with_hooks(tokens, [(name, put)]))
        rows.append(torch.stack(runs).unflatten(0, sizes or [1]))
    logits = torch.stack(rows) if "layer" in axes else rows[0]
    return logits.view(*logits.shape[: len(axes)], *logits.shape[-3:])


def compare_with_the_loop(model, sweep, metrics=METRICS, atol=1e-9):
    source = cache_of(model, CLEAN)
    logits = logits_by_the_loop(model, CORRUPT, source, sweep)
    found, expected = {}, {}
    for how, metric in metrics.items():
        key = f"{' '.join((sweep[0], *sweep[1]))}, {how}"
        found[key] = activation_patch(model, CORRUPT, source, metric, *sweep).patched
        expected[key] = as_metric(metric)(logits)
    assert_close(found, expected, rtol=0, atol=atol)


# Sweeps


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: " ".join((sweep[0], *sweep[1])))
def test_a_sweep_is_the_loop_over_all_cells(sweep):
    compare_with_the_loop(doubled(), sweep)


@pytest.mark.parametrize("changes, names", SHAPES, ids=str)
def test_a_sweep_is_the_loop_over_all_cells_in_models_of_other_shapes(changes, names):
    model, axes_of = doubled(**changes), dict(reversed(SWEEPS))
    for name in names:
        compare_with_the_loop(model, (name, axes_of[name]))


def test_in_float32_a_sweep_is_the_loop_except_for_rounding():
    model = tiny_model()
    just_one = {"at the end": DIFFERENCE}
    for sweep in (("resid_pre", ("layer", "pos")), ("mlp_out", ("layer", "pos")),
                  *((name, ("layer", "head")) for name in HEAD_PARTS)):
        compare_with_the_loop(model, sweep, just_one, atol=1e-5)


def test_how_many_cells_run_at_once_changes_nothing(monkeypatch):
    model, sweep = doubled(), ("z", ("layer", "pos", "head"))
    source = cache_of(model, CLEAN)
    together = activation_patch(model, CORRUPT, source, DIFFERENCE, *sweep).patched
    some = {n: activation_patch(model, CORRUPT, source, DIFFERENCE, *sweep, batch_cells=n).patched
            for n in (1, 2, 7, 1000)}
    monkeypatch.setattr(rerun, "MEMORY", 1)  # where one cell is too much, it runs alone
    some["no memory"] = activation_patch(model, CORRUPT, source, DIFFERENCE, *sweep).patched
    assert_close(some, dict.fromkeys(some, together))


def test_a_run_patched_with_itself_has_no_effect_at_all():
    model = tiny_model()
    for sweep in SWEEPS[:17]:
        result = activation_patch(model, CLEAN, cache_of(model, CLEAN), DIFFERENCE, *sweep)
        assert (result.mean == 0).all(), sweep


def test_prompts_that_begin_alike_have_no_effect_there():
    result = patching.get_act_patch_resid_pre(
        tiny_model(), CORRUPT, cache_of(tiny_model(), CLEAN), DIFFERENCE)
    assert (result.mean[:, :2] == 0).all() and (result.mean[:, 2:] != 0).all()


def test_the_whole_stream_of_any_layer_gives_the_source_s_metric():
    model = doubled(n_layers=3)
    result = activation_patch(model, CORRUPT, cache_of(model, CLEAN), DIFFERENCE, "resid_pre",
                              ("layer",))
    assert_close(result.patched, DIFFERENCE(model(CLEAN)).expand(3, -1))
    assert_close(result.normalized(), torch.ones(3, dtype=torch.float64))
    assert_close(result.target, DIFFERENCE(model(CLEAN)))
    assert_close(result.baseline, DIFFERENCE(model(CORRUPT)))


def test_patching_the_z_of_all_heads_patches_attn_out():
    model = doubled()
    source = cache_of(model, CLEAN)
    for layer in range(2):
        z, attn_out = (activation_patch(model, CORRUPT, source, DIFFERENCE,
                                        get_act_name(name, layer), ()).patched
                       for name in ("z", "attn_out"))
        assert_close({f"layer {layer}": z}, {f"layer {layer}": attn_out})


@torch.no_grad()
def test_queries_and_keys_of_all_heads_are_the_pattern_and_with_the_values_z():
    model = doubled()
    source = cache_of(model, CLEAN)

    def with_these(*names):
        edits = [(get_act_name(name, 1), lambda own, hook: source[hook.name]) for name in names]
        return DIFFERENCE(model.run_with_hooks(CORRUPT, edits))

    def swept(name):
        full = get_act_name(name, 1)
        return activation_patch(model, CORRUPT, source, DIFFERENCE, full, ()).patched

    assert_close(with_these("q", "k"), swept("pattern"))
    assert_close(with_these("pattern", "v"), swept("z"))


def test_patching_a_position_changes_no_bit_of_the_logits_before_it():
    model = tiny_model()
    seen = []

    def keep(logits):
        seen.append(logits)
        return logits[..., -1, 0]

    source = cache_of(model, CLEAN)
    for sweep in (("resid_pre", ("layer", "pos")), ("z", ("layer", "pos"))):
        seen.clear()
        activation_patch(model, CORRUPT, source, Metric(keep), *sweep)
        base, swept = seen[0], seen[1].unflatten(0, (2, 5))  # [layer, pos, batch, …]
        for pos in range(5):
            assert torch.equal(swept[:, pos, :, :pos], base[:, :pos].expand(2, -1, -1, -1))


def test_a_metric_gets_only_the_logits_that_it_names():
    shapes = []

    def keep(chosen):
        shapes.append(chosen.shape[-3:])
        return chosen.sum((-2, -1))

    source = cache_of(tiny_model(), CLEAN)
    patching.get_act_patch_mlp_out(tiny_model(), CORRUPT, source, Metric(keep, [0, -1], [3, 4, 5]))
    assert set(shapes) == {(3, 2, 3)}


# What each of the family sweeps: an activation and its cells
FAMILY = {
    **{name: (name, ("layer", "pos")) for name in
       ("resid_pre", "resid_mid", "attn_out", "mlp_out")},
    **{f"attn_head_{name}_all_pos".replace("_z_", "_out_"): (name, ("layer", "head"))
       for name in HEAD_PARTS},
    **{f"attn_head_{name}_by_pos".replace("_z_", "_out_"): (name, ("layer", "pos", "head"))
       for name in HEAD_PARTS},
    "attn_head_pattern_dest_src_pos": ("pattern", ("layer", "head", "query_pos", "key_pos")),
}


def test_each_sweep_function_patches_the_activation_in_its_name():
    model = tiny_model()
    source = cache_of(model, CLEAN)
    for name, sweep in FAMILY.items():
        found = getattr(patching, f"get_act_patch_{name}")(model, CORRUPT, source, DIFFERENCE)
        expected = activation_patch(model, CORRUPT, source, DIFFERENCE, *sweep)
        assert torch.equal(found.patched, expected.patched), name
        assert (found.axes, found.direction) == (sweep[1], "denoising"), name


def test_sweeps_of_every_kind_are_stacked_in_a_fixed_order():
    model = tiny_model()
    source = cache_of(model, CLEAN)
    for name, kinds in (("block_every", ["resid_pre", "attn_out", "mlp_out"]),
                        ("attn_head_all_pos_every", [name for name in FAMILY if "all_pos" in name]),
                        ("attn_head_by_pos_every", [name for name in FAMILY if "by_pos" in name])):
        together = getattr(patching, f"get_act_patch_{name}")(model, CORRUPT, source, DIFFERENCE)
        apart = [activation_patch(model, CORRUPT, source, DIFFERENCE, *FAMILY[kind]).patched
                 for kind in kinds]
        assert torch.equal(together.patched, torch.stack(apart)), name
        assert together.axes == ("activation", *FAMILY[kinds[0]][1])


def test_noising_is_the_same_sweep_the_other_way_round():
    model = tiny_model()
    result = patching.get_act_patch_resid_pre(model, CLEAN, cache_of(model, CORRUPT), DIFFERENCE,
                                              direction="noising")
    assert result.direction == "noising"
    assert_close(result.baseline, DIFFERENCE(model(CLEAN)))


# The result


def test_the_mean_of_a_result_is_the_effect_and_its_interval_encloses_it():
    patched, baseline = torch.tensor([[11.0, 13.0], [12.0, 18.0]]), torch.tensor([11.0, 12.0])
    result = PatchResult.from_metric(patched, ("pos",), baseline=baseline,
                                     target=torch.tensor([15.0, 16.0]), direction="denoising")
    assert result.patched is patched and result.values.tolist() == [[0, 1], [1, 6]]
    assert result.mean.tolist() == [0.5, 3.5] and result.normalized().tolist() == [0.125, 0.875]
    low, high = result.ci()
    assert low.tolist() == [0, 1] and high.tolist() == [1, 6]


def test_a_share_of_a_gap_of_zero_is_refused():
    model = tiny_model()
    result = patching.get_act_patch_resid_pre(model, CLEAN, cache_of(model, CLEAN), DIFFERENCE)
    with pytest.raises(UserError, match="undefined"):
        result.normalized()
    of_nan = patching.get_act_patch_resid_pre(model, CORRUPT, cache_of(model, CLEAN),
                                              lambda logits: logits[:, -1, 0] * torch.nan)
    with pytest.raises(UserError, match="undefined"):
        of_nan.normalized()


def test_without_the_last_stream_there_is_no_target():
    model = tiny_model()
    _, source = model.run_with_cache(CLEAN, lambda name: "resid_pre" in name)
    result = patching.get_act_patch_resid_pre(model, CORRUPT, source, DIFFERENCE)
    assert result.target is None
    with pytest.raises(UserError, match="without a filter"):
        result.normalized()


# What can't be


def refusal(model, call, **given):
    """The message of the UserError for an impossible request; checks that no hook is open after it.
    """
    with pytest.raises(UserError) as found:
        call(model, **given)
    assert not [point for point in model.hook_points().values() if point.listeners]
    return str(found.value)


def test_a_source_that_does_not_fit_is_refused():
    model = tiny_model()
    fitting = {"tokens": CORRUPT, "metric": DIFFERENCE, "act_name": "resid_pre",
               "axes": ("layer", "pos"), "source_cache": cache_of(model, CLEAN)}
    for change, told in (
            ({"act_name": "residd"}, "residd"), ({"axes": ("layer", "head")}, "'head'"),
            ({"axes": ("pos", "layer")}, "('pos', 'layer')"),
            ({"axes": ("layer", "pos", "pos")}, "'pos', 'pos'"),
            ({"act_name": "blocks.0.hook_resid_pre"}, "'layer'"),
            ({"direction": "forwards"}, "'forwards'"), ({"batch_cells": 0}, "batch_cells=0"),
            ({"metric": lambda logits: logits.mean()}, "[3, 5, 11]"),
            ({"metric": Metric(lambda chosen: chosen[..., 0, 0], pos=9)}, "pos=9"),
            ({"metric": Metric.logit_diff(1, 11)}, "1 to 11"),
            ({"tokens": CORRUPT[:, :4]}, "[3, 4, 12]"), ({"tokens": CORRUPT[:2]}, "2 rows"),
            ({"tokens": CORRUPT[:2], "metric": METRICS["at two places"]}, "[2, 5, 12]")):
        assert told in refusal(model, activation_patch, **fitting | change), change


def test_a_source_in_another_precision_is_refused():
    told = refusal(tiny_model(), patching.get_act_patch_mlp_out, corrupted_tokens=CORRUPT,
                   clean_cache=cache_of(doubled(), CLEAN), metric=DIFFERENCE)
    assert "float64 in the source" in told and "float32 in the run" in told


def test_a_model_without_layers_has_no_blocks_to_sweep_and_no_paths():
    model = tiny_model(n_layers=0)
    with pytest.raises(UserError, match="no layers"):
        patching.get_act_patch_mlp_out(model, CORRUPT, cache_of(model, CLEAN), DIFFERENCE)
    with pytest.raises(UserError, match="no paths"):
        path_patch(model, CLEAN, CORRUPT, ["hook_embed"], ["logits"], DIFFERENCE)
    swept = activation_patch(model, CORRUPT, cache_of(model, CLEAN), DIFFERENCE, "embed", ())
    assert_close(swept.patched, DIFFERENCE(model(CLEAN)))


def test_edits_with_and_without_a_shortcut_can_be_mixed():
    model = doubled()
    source, run = cache_of(model, CLEAN), Rerun(model, CORRUPT, DIFFERENCE)
    names = ("hook_embed", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post")
    for name, values in zip(names, run.patched((name, source[name][None]) for name in names),
                            strict=True):
        alone = activation_patch(model, CORRUPT, source, DIFFERENCE, name, ())
        assert_close(values[0], alone.patched)


def test_an_activation_that_was_not_kept_is_named():
    model = tiny_model()
    _, source = model.run_with_cache(CLEAN, "blocks.0.hook_resid_pre")
    with pytest.raises(UnknownName, match="was not cached"):
        patching.get_act_patch_mlp_out(model, CORRUPT, source, DIFFERENCE)


def test_a_sweep_refuses_to_run_with_open_hooks():
    model = tiny_model()
    source = cache_of(model, CLEAN)
    with model.hooks([("blocks.0.attn.hook_z", lambda z, hook: 0 * z)]):
        with pytest.raises(UserError, match=r"blocks\.0\.attn\.hook_z"):
            patching.get_act_patch_mlp_out(model, CORRUPT, source, DIFFERENCE)


def test_dropout_is_refused_and_evaluation_is_not():
    model = tiny_model(dropout=0.5)
    source = cache_of(model, CLEAN)
    patching.get_act_patch_mlp_out(model, CORRUPT, source, DIFFERENCE)
    with pytest.raises(UserError, match="eval"):
        patching.get_act_patch_mlp_out(model.train(), CORRUPT, source, DIFFERENCE)


def test_an_interrupted_sweep_leaves_nothing_behind():
    model = tiny_model()
    calls = []

    def interrupted(logits):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits[..., -1, 0]

    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for sweep in (("z", ("layer", "head")), ("pre", ("layer", "pos"))):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            activation_patch(model, CORRUPT, cache_of(model, CLEAN), interrupted, *sweep,
                             batch_cells=1)
        assert not [point for point in model.hook_points().values() if point.listeners]
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


# Paths


def everything_above(model, layer):
    """All that reads the stream after the attention of a layer."""
    reads = [f"blocks.{layer}.hook_mlp_in"]
    for later in range(layer + 1, model.cfg.n_layers):
        reads += [f"blocks.{later}.hook_{part}" for part in
                  ("q_input", "k_input", "v_input", "mlp_in")]
    return [*reads, "logits"]


@torch.no_grad()
def path_by_hooks(model, senders, receivers, freeze):
    """Path patching by its definition: two runs, hook by hook."""
    clean, corrupt = cache_of(model, CLEAN), cache_of(model, CORRUPT)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def heads_of(places, value):
        def put(own, hook):
            own = own.clone()
            for name, head in places:
                if name == hook.name:
                    own[:, :, head] = value[name][:, :, head]
            return own
        return put

    senders = [(name, slice(None)) if isinstance(name, str) else name for name in senders]
    receivers = [(place, slice(None)) if isinstance(place, str) else place for place in receivers]
    receivers = [(last if name == "logits" else name, head) for name, head in receivers]
    frozen = {"heads": ["hook_z"], "all": ["hook_z", "hook_mlp_out"], None: []}[freeze]
    freezing = [(name, lambda own, hook: clean[hook.name]) for name in clean
                if any(name.endswith(kind) for kind in frozen)]
    sending = [(name, heads_of(senders, corrupt)) for name in {name for name, _ in senders}]
    seen = {}
    keeping = [(name, lambda own, hook: seen.update({hook.name: own.clone()}))
               for name, _ in receivers]
    model.run_with_hooks(CLEAN, freezing + sending + keeping)
    receiving = [(name, heads_of(receivers, seen)) for name in {name for name, _ in receivers}]
    return DIFFERENCE(model.run_with_hooks(CLEAN, receiving))


@pytest.mark.parametrize("senders, receivers", [
    ([("blocks.0.attn.hook_z", 1)], [("blocks.2.hook_k_input", 0)]),
    ([("blocks.0.attn.hook_z", 1)], ["logits"]),
    ([("blocks.0.attn.hook_z", 0), ("blocks.0.attn.hook_z", 2), "blocks.1.hook_mlp_out"],
     [("blocks.1.hook_q_input", 2), ("blocks.2.hook_q_input", 1), "blocks.2.hook_mlp_in"]),
    (["blocks.1.hook_attn_out"], ["blocks.1.hook_mlp_in", ("blocks.2.hook_v_input", 0)]),
    (["hook_embed"], [("blocks.0.hook_v_input", 0), "logits"]),
], ids=str)
def test_path_patching_equals_its_definition_hook_by_hook(senders, receivers):
    model = doubled(n_layers=3)
    for freeze in ("heads", "all", None):
        result = path_patch(model, CLEAN, CORRUPT, senders, receivers, DIFFERENCE, freeze)
        assert_close({freeze: result.patched},
                     {freeze: path_by_hooks(model, senders, receivers, freeze)})
        assert_close(result.values, result.patched - DIFFERENCE(model(CLEAN)))
        assert_close(result.target, DIFFERENCE(model(CORRUPT)))
        assert result.direction == "noising"


def test_a_path_to_everything_with_nothing_frozen_is_activation_patching():
    model = doubled(n_layers=3)
    source = cache_of(model, CORRUPT)
    for layer in (0, 1):
        sender = f"blocks.{layer}.attn.hook_z"
        path = path_patch(model, CLEAN, CORRUPT, [(sender, 1)], everything_above(model, layer),
                          DIFFERENCE, freeze=None)
        whole = activation_patch(model, CLEAN, source, DIFFERENCE, sender, ("head",),
                                 direction="noising")
        assert_close({sender: path.patched}, {sender: whole.patched[1]})


def test_a_head_may_be_numbered_by_numpy():
    model, own = doubled(), ("blocks.0.attn.hook_z", 1)
    for sender in (own, (own[0], np.int64(1))):
        result = path_patch(model, CLEAN, CORRUPT, sender, ["logits"], DIFFERENCE)
        assert_close(result.values, path_patch(model, CLEAN, CORRUPT, [own], ["logits"],
                                               DIFFERENCE).values)


def test_without_receivers_nothing_happens():
    model = tiny_model()
    path = path_patch(model, CLEAN, CORRUPT, [("blocks.0.attn.hook_z", 1)], [], DIFFERENCE)
    assert torch.equal(path.patched, path.baseline)


@pytest.mark.parametrize("receiver, freeze", [("q", None), ("k", "all"), ("v", "heads")])
def test_the_matrix_is_path_patching_for_every_pair_of_heads(receiver, freeze):
    model = doubled(n_layers=3, n_heads=2)
    matrix = path_patch_matrix(model, CLEAN, CORRUPT, DIFFERENCE, receiver=receiver, freeze=freeze)
    assert matrix.patched.shape == (3, 2, 3, 2, 3)
    found, expected = {}, {}
    for pair in itertools.product(range(3), range(2), range(3), range(2)):
        layer, head, later, other = pair
        path = f"L{layer}H{head} to L{later}H{other}"
        found[path], expected[path] = matrix.patched[pair], matrix.baseline
        if later > layer:
            expected[path] = path_patch(
                model, CLEAN, CORRUPT, [(f"blocks.{layer}.attn.hook_z", head)],
                [(f"blocks.{later}.hook_{receiver}_input", other)], DIFFERENCE, freeze).patched
    assert_close(found, expected)


def test_impossible_paths_are_refused():
    model = tiny_model(n_layers=3)
    fitting = {"clean_tokens": CLEAN, "corrupted_tokens": CORRUPT, "metric": DIFFERENCE,
               "senders": [("blocks.0.attn.hook_z", 0)],
               "receivers": [("blocks.1.hook_k_input", 1)]}
    for change, told in (
            ({"senders": [("blocks.2.attn.hook_z", 0)]}, "blocks.2.attn.hook_z lies above"),
            ({"receivers": [("blocks.0.hook_k_input", 0)]}, "above blocks.0.hook_k_input"),
            ({"senders": ["blocks.0.hook_resid_pre"]}, "blocks.0.hook_resid_pre"),
            ({"receivers": ["blocks.1.attn.hook_z"]}, "blocks.1.attn.hook_z"),
            ({"receivers": ["blocks.0.hook_resid_post"]}, "blocks.0.hook_resid_post"),
            ({"senders": [("blocks.0.attn.hook_zz", 0)]}, "blocks.0.attn.hook_zz"),
            ({"senders": [("blocks.0.attn.hook_z", 3)]}, "head=3"),
            ({"senders": [("blocks.0.hook_mlp_out", 0)]}, "no head 0"),
            ({"freeze": "mlps"}, "freeze='mlps'"),
            ({"corrupted_tokens": CORRUPT[:, :4]}, "[3, 4]")):
        assert told in refusal(model, path_patch, **fitting | change), change


def test_a_metric_may_be_a_plain_function_here_too():
    model = doubled()
    plain = path_patch(model, CLEAN, CORRUPT, ["hook_embed"], ["logits"],
                       lambda logits: logit_diff(logits, [1, 2, 3], [4, 5, 6], reduction="none"))
    named = path_patch(model, CLEAN, CORRUPT, ["hook_embed"], ["logits"], DIFFERENCE)
    assert_close(plain.patched, named.patched)
