"""Activation patching: copy an activation from one run into another, and measure what changes.

Two prompts differ only in what matters, and the model answers both correctly: "When Ann and Bob
went to the park, Ann gave a kite to" (clean), and the same with "Bob gave" (corrupted). Run one of
them, replace one activation (the *cell*) by its value from the other run (the *source*), and
compute the rest again. If the answer changes, the cell carried the difference.

    denoising   clean activations into the corrupted run: can the cell alone restore the answer?
    noising     corrupted activations into the clean run: does the answer need the cell?

The two can disagree. If either of two heads is enough, denoising finds both and noising neither.

    _, clean_cache = model.run_with_cache(clean_tokens)
    metric = Metric.logit_diff(correct, wrong)                    # at the last position
    result = get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)
    result.normalized()                     # [layer, pos]: 0 as corrupted, 1 as clean

A sweep patches every cell of a grid, one after another; rerun.py makes it fast. *Path patching*
asks which route an effect takes: only the chosen receivers see the sender's value from the other
run.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: metrics.py, rerun.py
Next: head_ablation.py
Source: Vig et al. 2020; Meng et al. 2022; Wang et al. 2022 (path patching); Heimersheim & Nanda
2024 (denoising, noising); the sweeps have the names of TransformerLens (Nanda & Bloom 2022)
"""

import math
from dataclasses import dataclass

import torch

from activation_cache import (
    check_name,
    check_same_mask,
    check_same_model,
    check_same_shape,
    get_act_name,
)
from metrics import EffectsOfTwoRuns
from rerun import IN_BLOCK, Rerun
from utils import (
    UserError,
    as_list,
    check_choice,
    check_count,
    check_tensor,
    suggest_closest,
)

DIRECTIONS = ("denoising", "noising")
FROZEN = {"heads": ("hook_z",), "all": ("hook_z", "hook_mlp_out"), None: ()}
ORDER = ("q_input", "k_input", "v_input", "z", "attn_out", "mlp_in", "mlp_out")


@dataclass(frozen=True, eq=False)
class PatchResult(EffectsOfTwoRuns):
    """How much patching each cell of a sweep changes the metric: an Effects.

    values: [*axes, batch], the effects, patched - baseline; `.mean`, `.ci()` and `.normalized()`
    are computed from them. patched: [*axes, batch], the metric of the patched runs. baseline:
    [batch], the metric of the unpatched run. target: [batch], that of the source's run; None if its
    cache lacks the last stream. axes: the names of the cells' axes. direction: "denoising" (clean
    activations into the corrupted run) or "noising" (corrupted ones into the clean run).
    """

    patched: torch.Tensor = None
    direction: str = "denoising"

    @classmethod
    def from_metric(cls, patched, axes, *, baseline, target, direction):
        """The result for patched runs with the metric `patched`, [*axes, batch]."""
        return cls(patched - baseline, axes, baseline, target, patched, direction)


@torch.no_grad()
def activation_patch(model, tokens, source_cache, metric, act_name, axes, *,
                     direction="denoising", batch_cells=None, key_mask=None):
    """Patches each cell from `source_cache` into the run of `tokens`, one at a time: a PatchResult.

    tokens: [batch, pos], of the run that is patched: the corrupted one when denoising, the clean
    one when noising. source_cache: an ActivationCache of the other run, of the same shapes.
    metric: a Metric, or a function of logits [batch, pos, d_vocab] -> [batch].
    act_name: a short name ("resid_pre", "z", "post", …), for all layers, if "layer" is an axis;
    otherwise a full one. axes: those of the cells, "layer" first, then any axes of the hook point,
    such as "pos" or "head"; along all other axes a cell includes everything. direction: a label;
    only you know which run is which. batch_cells: the number of cells per run (None: as many as fit
    into 1 GB). key_mask: [batch, pos], True for real tokens, if both runs' prompts are padded on
    the left at the same positions.
    Raises UserError for arguments that do not fit together, for open hooks (a sweep would bypass
    them), and in training mode with dropout.
    """
    check_choice("direction", direction, DIRECTIONS)
    axes = (axes,) if isinstance(axes, str) else tuple(as_list("axes", axes, "a list of names"))
    by_layer = "layer" in axes
    check_axes(model, act_name, axes, batch_cells)
    layers = range(model.cfg.n_layers) if by_layer else [None]
    names = [get_act_name(act_name, layer) for layer in layers]

    # keep the activations that the source has, so that both runs use the same kernel and rounding
    rerun = Rerun(model, tokens, metric, [*source_cache, *names], key_mask)

    # the grid of cells in one layer
    shape = rerun.cache[names[0]].shape
    dims = rerun.cache.axes[names[0]].split()
    alias = {} if "pos" in dims else {"pos": "query_pos"}
    axes_in_layer = axes[1:] if by_layer else axes
    inner = [alias.get(axis, axis) for axis in axes_in_layer]
    check_cells(rerun.cache, source_cache, names, inner)
    sizes = [shape[dims.index(axis)] for axis in inner]
    at_once = batch_cells or rerun.cells_at_once(len(names))

    # some cells at a time, in all layers
    parts = []
    for cells in torch.arange(math.prod(sizes)).split(at_once):
        chosen = cells_of(shape, dims, inner, cells).to(tokens.device)
        edits = ((name, torch.where(chosen, source_cache[name], rerun.cache[name]))
                 for name in names)
        parts.append(torch.stack(rerun.patched(edits)))

    patched = torch.cat(parts, 1).view(len(names), *sizes, -1)
    return PatchResult.from_metric(
        patched if by_layer else patched[0], axes, baseline=rerun.baseline,
        target=rerun.metric_of(source_cache), direction=direction)


def check_axes(model, act_name, axes, batch_cells):
    """Raises UserError for axes that form no grid, and for a batch of no cells."""
    check_name(act_name)
    if "layer" in axes[1:] or len(set(axes)) < len(axes):
        raise UserError(f"axes={axes}: name each once, and 'layer' first")
    if "layer" in axes and (not model.cfg.n_layers or "hook_" in act_name):
        raise UserError(f"{act_name} exists only once, or this model has no layers; leave the axis "
                        "'layer' out")
    if batch_cells is not None:
        check_count("batch_cells", batch_cells, most=(1 << 31) - 1)


def check_cells(own, source, names, axes):
    """Raises UserError for a source of another shape, and for axes that the activation lacks."""
    check_same_model(own, source)
    for name in names:
        check_same_shape(name, own[name], source[name])
        if own[name].dtype != source[name].dtype:
            raise UserError(f"{name} is {source[name].dtype} in the source, {own[name].dtype} in "
                            "the run; cache both from one model")
    check_same_mask(own, source)
    dims = own.axes[names[0]].split()[1:]
    for axis in axes:
        if axis not in dims:
            raise UserError(f"{names[0]} has no axis {axis!r}; choose from: {', '.join(dims)}")


def cells_of(shape, dims, axes, cells):
    """A mask for each cell, True at the part of the activation that belongs to it.

    Returns [cell, *shape], with size 1 along axes where a cell includes everything.

    shape, dims: of the activation, batch first. axes: of the cells; cells: their numbers, [cell].
    """
    sizes = [shape[dims.index(axis)] for axis in axes]
    chosen = torch.ones(len(cells), *[1] * len(shape), dtype=torch.bool)
    for axis, index in zip(axes, torch.unravel_index(cells, sizes), strict=True):
        dim = dims.index(axis)
        here = index[:, None] == torch.arange(shape[dim])  # [cell, axis]
        view = [1] * len(shape)
        view[dim] = shape[dim]
        chosen = chosen & here.view(len(cells), *view)
    return chosen


# The sweeps under TransformerLens's names


def sweep_of(act_name, *axes):
    """A function that patches one activation in a sweep over these axes."""
    def swept(model, corrupted_tokens, clean_cache, metric, **more):
        return activation_patch(model, corrupted_tokens, clean_cache, metric, act_name, axes,
                                **more)

    swept.__doc__ = (f"Denoising: patches each {act_name} of the clean run into the corrupted one; "
                     f"a PatchResult with the cells [{', '.join(axes)}]. As `activation_patch`.")
    return swept


get_act_patch_resid_pre = sweep_of("resid_pre", "layer", "pos")
get_act_patch_resid_mid = sweep_of("resid_mid", "layer", "pos")
get_act_patch_attn_out = sweep_of("attn_out", "layer", "pos")
get_act_patch_mlp_out = sweep_of("mlp_out", "layer", "pos")
get_act_patch_attn_head_out_all_pos = sweep_of("z", "layer", "head")
get_act_patch_attn_head_q_all_pos = sweep_of("q", "layer", "head")
get_act_patch_attn_head_k_all_pos = sweep_of("k", "layer", "head")
get_act_patch_attn_head_v_all_pos = sweep_of("v", "layer", "head")
get_act_patch_attn_head_pattern_all_pos = sweep_of("pattern", "layer", "head")
get_act_patch_attn_head_out_by_pos = sweep_of("z", "layer", "pos", "head")
get_act_patch_attn_head_q_by_pos = sweep_of("q", "layer", "pos", "head")
get_act_patch_attn_head_k_by_pos = sweep_of("k", "layer", "pos", "head")
get_act_patch_attn_head_v_by_pos = sweep_of("v", "layer", "pos", "head")
get_act_patch_attn_head_pattern_by_pos = sweep_of("pattern", "layer", "pos", "head")
get_act_patch_attn_head_pattern_dest_src_pos = sweep_of(
    "pattern", "layer", "head", "query_pos", "key_pos")


def stack_sweeps(sweeps):
    """A function that runs several sweeps over the same cells and stacks their results.

    sweeps: {name of the activation: its sweep}, in the order of the rows.
    """

    def run_all(model, corrupted_tokens, clean_cache, metric, **more):
        results = [sweep(model, corrupted_tokens, clean_cache, metric, **more)
                   for sweep in sweeps.values()]
        one = results[0]
        return PatchResult.from_metric(
            torch.stack([result.patched for result in results]), ("activation", *one.axes),
            baseline=one.baseline, target=one.target, direction=one.direction)

    run_all.__doc__ = ("Denoising: several sweeps of the same cells; a PatchResult whose first "
                       f"axis, \"activation\", has the rows {', '.join(sweeps)}.")
    return run_all


get_act_patch_block_every = stack_sweeps({
    "resid_pre": get_act_patch_resid_pre,
    "attn_out": get_act_patch_attn_out,
    "mlp_out": get_act_patch_mlp_out,
})
get_act_patch_attn_head_all_pos_every = stack_sweeps({
    "z": get_act_patch_attn_head_out_all_pos,
    "q": get_act_patch_attn_head_q_all_pos,
    "k": get_act_patch_attn_head_k_all_pos,
    "v": get_act_patch_attn_head_v_all_pos,
    "pattern": get_act_patch_attn_head_pattern_all_pos,
})
get_act_patch_attn_head_by_pos_every = stack_sweeps({
    "z": get_act_patch_attn_head_out_by_pos,
    "q": get_act_patch_attn_head_q_by_pos,
    "k": get_act_patch_attn_head_k_by_pos,
    "v": get_act_patch_attn_head_v_by_pos,
    "pattern": get_act_patch_attn_head_pattern_by_pos,
})


# Paths


def path_patch(model, clean_tokens, corrupted_tokens, senders, receivers, metric, freeze="heads",
               *, key_mask=None):
    """Path patching, by noising: the effect on the clean run if only the receivers see the senders'
    values from the corrupted run; a PatchResult without axes.

    clean_tokens, corrupted_tokens: [batch, pos] of one shape; the clean run is patched. senders:
    hook names of writers: `hook_embed`, `hook_pos_embed`, or a block's `attn.hook_z`,
    `hook_attn_out`, `hook_mlp_out`. receivers: hook names of readers: a block's `hook_q_input`,
    `hook_k_input`, `hook_v_input`, `hook_mlp_in`, or "logits". For hooks with a head axis,
    (name, head) selects one head.
    It takes two runs of the clean tokens. In the first, the senders have their corrupted values,
    and the receivers' inputs are recorded. In the second, the receivers get these inputs. So a
    later receiver does not see the changed output of an earlier one; if "logits" is a receiver, no
    other one matters; and without receivers the effect is 0.
    freeze: what else keeps its clean value in the first run: "heads" (only MLPs and LayerNorms pass
    the change on), "all" (MLPs too: the direct path), or None. key_mask: [batch, pos], as in
    `activation_patch`.
    Raises UserError for names that are not senders or receivers, for a sender above every receiver,
    and for a receiver below every sender.
    """
    to_send = heads_by_name(model, senders)
    to_receive = heads_by_name(model, receivers)
    check_order(model, to_send, to_receive)
    check_path_prompts(clean_tokens, corrupted_tokens, freeze)
    clean = Rerun(model, clean_tokens, metric, key_mask=key_mask)
    corrupted = Rerun(model, corrupted_tokens, metric, list(to_send), key_mask)

    patched = clean.baseline
    if to_receive:
        # first run: the receivers' inputs when the senders are corrupted
        edits = [(name, replace_with(own)) for name, own in clean.cache.items()
                 if name.endswith(FROZEN[freeze])]
        edits += [(name, replace_with(corrupted.cache[name], heads))
                  for name, heads in to_send.items()]
        with torch.no_grad(), model.hooks(edits), model.caching(list(to_receive)) as seen:
            model(clean_tokens, key_mask)

        # second run: the receivers get these inputs
        received = [(name, replace_with(seen[name], heads)) for name, heads in to_receive.items()]
        with torch.no_grad():
            patched = clean.metric(
                model.run_with_hooks(clean_tokens, received, key_mask=key_mask))

    return PatchResult.from_metric(patched, (), baseline=clean.baseline,
                                   target=corrupted.baseline, direction="noising")


def replace_with(value, heads=None):
    """A hook that replaces the activation, or some of its heads, by `value`."""

    def replace(own, hook):
        if heads is None:
            return value
        return own.index_copy(2, torch.tensor(heads, device=own.device), value[:, :, heads])

    return replace


def heads_by_name(model, places):
    """{hook name: list of heads, or None for all}, from names and (name, head) pairs."""
    points = model.hook_points()
    if not model.cfg.n_layers:
        raise UserError("n_layers=0: there are no paths; take a model with layers")
    wanted = "names, and (name, head) pairs"
    is_pair = isinstance(places, tuple) and len(places) == 2 and not isinstance(places[1], str)
    is_one = isinstance(places, str) or (is_pair and not isinstance(places[1], tuple))

    # (name, head), with None for all heads
    pairs = []
    for place in [places] if is_one else as_list("places", places, wanted):
        name = place
        head = None
        if not isinstance(place, str):
            if not isinstance(place, (tuple, list)) or len(place) != 2:
                raise UserError(f"{place!r} is not a place on a path; pass {wanted}")
            name, head = place
            check_name(name)
            head = check_count(f"{name}: head", head, 0, model.cfg.n_heads - 1)
        if name == "logits":
            name = last_stream_name(model)
        if name not in points:
            raise UserError(f"{name} is not a hook of this model{suggest_closest(name, points)}")
        if head is not None and "head" not in points[name].axes.split():
            raise UserError(f"{name} has no head {head}; this model has {model.cfg.n_heads} heads "
                            "in q_input, k_input, v_input and z")
        pairs.append((name, head))

    # grouped by name; "all heads" includes any single one
    heads_of = {}
    for name, head in pairs:
        if head is None or heads_of.get(name, []) is None:
            heads_of[name] = None
        else:
            heads_of.setdefault(name, []).append(head)
    return heads_of


def last_stream_name(model):
    """The hook name of the unembedding's input, in a model with layers."""
    return get_act_name("resid_post", model.cfg.n_layers - 1)


def depth(name, last):
    """A hook's place in the order of computation, as a number; the hook `last` is at infinity."""
    if name == last:
        return math.inf
    found = IN_BLOCK.fullmatch(name)
    return int(found[1]) * len(ORDER) + ORDER.index(found[2]) if found else -1


def check_order(model, senders, receivers):
    """Raises UserError for names that are not senders or receivers, for a sender above every
    receiver, and for a receiver below every sender."""
    last = last_stream_name(model)
    for name in senders:
        if not name.endswith(("embed", "attn.hook_z", "hook_attn_out", "hook_mlp_out")):
            raise UserError(f"{name} does not write to the stream; send from attn.hook_z, "
                            "hook_attn_out, hook_mlp_out, hook_embed or hook_pos_embed")
    for name in receivers:
        if name != last and not name.endswith(("_input", "hook_mlp_in")):
            raise UserError(f"{name} does not read the stream; receive at hook_q_input, "
                            'hook_k_input, hook_v_input, hook_mlp_in or "logits"')

    # each sender must be below the highest receiver, each receiver above the lowest sender
    at = {name: depth(name, last) for name in [*senders, *receivers]}
    lowest = min(senders, key=at.get, default=None)
    highest = max(receivers, key=at.get, default=None)
    pairs = [(name, highest) for name in senders] + [(lowest, name) for name in receivers]
    for sender, receiver in pairs:
        if sender and receiver and at[sender] >= at[receiver]:
            raise UserError(f"{sender} lies above {receiver}, which cannot see it; choose a later "
                            "receiver")


@torch.no_grad()
def path_patch_matrix(model, clean_tokens, corrupted_tokens, metric, *, receiver="v",
                      freeze="heads", key_mask=None):
    """Path patching from every head to every later head's queries, keys or values, by noising.

    As `path_patch` for each pair. receiver: "q", "k" or "v". key_mask: as there. Returns a
    PatchResult with the cells [layer, head, later layer, later head]; the effect is 0 if the second
    layer is not later.
    """
    check_choice("receiver", receiver, ("q", "k", "v"))
    check_path_prompts(clean_tokens, corrupted_tokens, freeze)
    clean = Rerun(model, clean_tokens, metric, key_mask=key_mask)
    corrupted = Rerun(model, corrupted_tokens, metric, key_mask=key_mask)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    patched = clean.baseline.repeat(n_layers, n_heads, n_layers, n_heads, 1)

    # all heads of a layer send at once, each in its own copy of the batch:
    # [head, batch, pos, head, …]
    own_head = torch.eye(n_heads, dtype=torch.bool, device=clean_tokens.device)
    own_head = own_head[:, None, None, :, None]
    frozen = [(name, replace_with(torch.cat([own] * n_heads)))
              for name, own in clean.cache.items() if name.endswith(FROZEN[freeze])]
    mask_of_copies = None if key_mask is None else key_mask.repeat(n_heads, 1)

    for layer in range(n_layers - 1):
        sent = torch.where(own_head, corrupted.cache["z", layer], clean.cache["z", layer])
        edits = [*frozen, (get_act_name("z", layer), replace_with(sent.flatten(0, 1)))]
        start = clean.cache["resid_pre", layer].repeat(n_heads, 1, 1)
        with model.hooks(edits), model.caching(lambda name: "resid_pre" in name) as seen:
            model.run_blocks(start, layer, key_mask=mask_of_copies)

        for later in range(layer + 1, n_layers):
            block = model.blocks[later]
            reads = block.attn.project(*block.attention_inputs(seen["resid_pre", later]))
            read = reads["qkv".index(receiver)].unflatten(0, (n_heads, -1))
            z = clean.z_of(later, receiver, read)
            for head in range(n_heads):
                edited = torch.where(own_head, z[head], clean.cache["z", later])
                [values] = clean.patched([(get_act_name("z", later), edited)])
                patched[layer, head, later] = values

    axes = ("layer", "head", "later layer", "later head")
    return PatchResult.from_metric(patched, axes, baseline=clean.baseline,
                                   target=corrupted.baseline, direction="noising")


def check_path_prompts(clean_tokens, corrupted_tokens, freeze):
    """Raises UserError for prompts of different shapes, and for an unknown `freeze`."""
    check_tensor("clean_tokens", clean_tokens, "batch pos")
    check_tensor("corrupted_tokens", corrupted_tokens, "batch pos")
    if clean_tokens.shape != corrupted_tokens.shape:
        raise UserError(f"clean_tokens is {list(clean_tokens.shape)} and corrupted_tokens "
                        f"{list(corrupted_tokens.shape)}; use the same number of prompts, all of "
                        "one length")
    check_choice("freeze", freeze, tuple(FROZEN))
