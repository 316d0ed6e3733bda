"""Patching: put an activation of one run into another, and see what it brings along.

Two prompts differ in what matters, and the model answers each rightly: "When Ann and Bob went to
the park, Ann gave a kite to" (clean), and the same with "Bob gave" (corrupted). Run one of them,
and on the way replace one activation, the *cell*, by its value in the other run, the *source*; what
comes after is computed anew. If the answer moves, the cell carried it.

    denoising   clean activations into the corrupted run: is the cell enough to restore the answer?
    noising     corrupted activations into the clean run: is the cell needed for the answer?

These differ: of two heads either of which would do, denoising finds both and noising neither.

    _, clean_cache = model.run_with_cache(clean_tokens)
    metric = Metric.logit_diff(correct, wrong)                    # at the last position
    result = get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)
    result.normalized()                     # [layer, pos]: 0 as corrupted, 1 as clean

A sweep asks this of every cell of a grid; rerun.py makes it fast. *Path patching* asks by which way
the effect comes: only the chosen receivers see the sender's value from the other run.

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
    """By how much patching each cell of a sweep moves the metric: an Effects.

    values: [*axes, batch], the effects, patched - baseline; `.mean`, `.ci()` and `.normalized()`
    are theirs. patched: [*axes, batch], the metric of the patched runs itself. baseline: [batch],
    of the run as it is. target: [batch], of the run that the source is from; None where its cache
    lacks the last stream. axes: the names of the cells' axes. direction: "denoising" (clean
    activations into the corrupted run) or "noising" (corrupted ones into the clean run).
    """

    patched: torch.Tensor = None
    direction: str = "denoising"

    @classmethod
    def from_metric(cls, patched, axes, *, baseline, target, direction):
        """The result of patched runs whose metric is `patched`, [*axes, batch]."""
        return cls(patched - baseline, axes, baseline, target, patched, direction)


@torch.no_grad()
def activation_patch(model, tokens, source_cache, metric, act_name, axes, *,
                     direction="denoising", batch_cells=None, key_mask=None):
    """The effect of patching one cell from `source_cache` into the run of `tokens`, for every cell.

    tokens: [batch, pos], of the run that is patched: the corrupted one when denoising, the clean
    one when noising. source_cache: an ActivationCache of the other run, of the same shapes.
    metric: a Metric, or a function of logits [batch, pos, d_vocab] -> [batch].
    act_name: a short name ("resid_pre", "z", "post", …) of all layers if "layer" is an axis, else a
    full one. axes: of the cells, "layer" first, then any that the hook point has, such as "pos" or
    "head"; what is not among them is patched whole. direction: a label; only you know which run is
    which. batch_cells: how many at once (None: what 1 GB holds). key_mask: [batch, pos], True for
    real tokens, where both runs' prompts are padded on the left in the same places.
    Returns a PatchResult. Raises UserError for what does not fit, while hooks are open (a sweep
    would run past them), and in training with dropout.
    """
    check_choice("direction", direction, DIRECTIONS)
    axes = (axes,) if isinstance(axes, str) else tuple(as_list("axes", axes, "a list of names"))
    by_layer = "layer" in axes
    check_axes(model, act_name, axes, batch_cells)
    layers = range(model.cfg.n_layers) if by_layer else [None]
    names = [get_act_name(act_name, layer) for layer in layers]

    # the run keeps what the source kept, so that both take the same kernel and round alike
    rerun = Rerun(model, tokens, metric, [*source_cache, *names], key_mask)

    # the grid of cells, of one layer
    shape = rerun.cache[names[0]].shape
    dims = rerun.cache.axes[names[0]].split()
    alias = {} if "pos" in dims else {"pos": "query_pos"}
    axes_in_layer = axes[1:] if by_layer else axes
    inner = [alias.get(axis, axis) for axis in axes_in_layer]
    check_cells(rerun.cache, source_cache, names, inner)
    sizes = [shape[dims.index(axis)] for axis in inner]
    at_once = batch_cells or rerun.cells_at_once(len(names))

    # some cells at a time, of all layers together
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
    """Raises UserError for axes that are no grid, and for no cells."""
    check_name(act_name)
    if "layer" in axes[1:] or len(set(axes)) < len(axes):
        raise UserError(f"axes={axes}: name each once, and 'layer' first")
    if "layer" in axes and (not model.cfg.n_layers or "hook_" in act_name):
        raise UserError(f"{act_name} is in one place, or this model has no layers; leave the axis "
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
    """A mask for each cell, True on the part of the activation that it is.

    Returns [cell, *shape], of size 1 along axes that a cell takes whole.

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


# The family, by TransformerLens's names


def sweep_of(act_name, *axes):
    """A function that sweeps one activation along these axes."""
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
    """A function that runs several sweeps of the same cells, and stacks them along a first axis.

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
    """Noising along chosen paths: the effect on the clean run where the receivers alone see what
    the senders are in the corrupted run; a PatchResult without axes.

    clean_tokens, corrupted_tokens: [batch, pos] of one shape; the clean run is disturbed. senders:
    hook names of what is written, `hook_embed`, `hook_pos_embed`, or a block's `attn.hook_z`,
    `hook_attn_out`, `hook_mlp_out`; receivers: of what reads, a block's `hook_q_input`,
    `hook_k_input`, `hook_v_input`, `hook_mlp_in`, or "logits". Those with a head axis may be
    (name, head).
    It takes two runs of the clean tokens. In the first the senders have their corrupted values, and
    what the receivers read is kept; in the second that is what they read. So a later receiver does
    not see what an earlier one makes of it; beside "logits" no other receiver counts; and without
    any receiver nothing happens.
    freeze: what else keeps its clean value in the first run: "heads" (so that only MLPs and
    LayerNorms pass the change on), "all" (MLPs too: the direct path), or None. key_mask: [batch,
    pos], as in `activation_patch`.
    Raises UserError for names that are no sender or receiver, for a sender that lies above every
    receiver, and for a receiver that lies below every sender.
    """
    to_send = heads_by_name(model, senders)
    to_receive = heads_by_name(model, receivers)
    check_order(model, to_send, to_receive)
    check_path_prompts(clean_tokens, corrupted_tokens, freeze)
    clean = Rerun(model, clean_tokens, metric, key_mask=key_mask)
    corrupted = Rerun(model, corrupted_tokens, metric, list(to_send), key_mask)

    patched = clean.baseline
    if to_receive:
        # first run: what the receivers read where the senders are corrupted
        edits = [(name, replace_with(own)) for name, own in clean.cache.items()
                 if name.endswith(FROZEN[freeze])]
        edits += [(name, replace_with(corrupted.cache[name], heads))
                  for name, heads in to_send.items()]
        with torch.no_grad(), model.hooks(edits), model.caching(list(to_receive)) as seen:
            model(clean_tokens, key_mask)

        # second run: they read that
        received = [(name, replace_with(seen[name], heads)) for name, heads in to_receive.items()]
        with torch.no_grad():
            patched = clean.metric(
                model.run_with_hooks(clean_tokens, received, key_mask=key_mask))

    return PatchResult.from_metric(patched, (), baseline=clean.baseline,
                                   target=corrupted.baseline, direction="noising")


def replace_with(value, heads=None):
    """A hook that puts `value` in place of the activation, or of some of its heads."""

    def replace(own, hook):
        if heads is None:
            return value
        return own.index_copy(2, torch.tensor(heads, device=own.device), value[:, :, heads])

    return replace


def heads_by_name(model, places):
    """{hook name: list of heads, or None for all} of names and (name, head) pairs."""
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
                raise UserError(f"{place!r} is no place on a path; pass {wanted}")
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

    # grouped by name, where all heads include each single one
    heads_of = {}
    for name, head in pairs:
        if head is None or heads_of.get(name, []) is None:
            heads_of[name] = None
        else:
            heads_of.setdefault(name, []).append(head)
    return heads_of


def last_stream_name(model):
    """The hook name of what the unembedding reads, in a model with layers."""
    return get_act_name("resid_post", model.cfg.n_layers - 1)


def depth(name, last):
    """Where on the way through the model a hook lies: a number that grows; `last` is the end."""
    if name == last:
        return math.inf
    found = IN_BLOCK.fullmatch(name)
    return int(found[1]) * len(ORDER) + ORDER.index(found[2]) if found else -1


def check_order(model, senders, receivers):
    """Raises UserError for names that are no sender or receiver, for a sender that lies above every
    receiver, and for a receiver that lies below every sender."""
    last = last_stream_name(model)
    for name in senders:
        if not name.endswith(("embed", "attn.hook_z", "hook_attn_out", "hook_mlp_out")):
            raise UserError(f"{name} does not write to the stream; send from attn.hook_z, "
                            "hook_attn_out, hook_mlp_out, hook_embed or hook_pos_embed")
    for name in receivers:
        if name != last and not name.endswith(("_input", "hook_mlp_in")):
            raise UserError(f"{name} does not read the stream; receive at hook_q_input, "
                            'hook_k_input, hook_v_input, hook_mlp_in or "logits"')

    # a sender must reach the highest receiver, a receiver be reached by the lowest sender
    at = {name: depth(name, last) for name in [*senders, *receivers]}
    lowest = min(senders, key=at.get, default=None)
    highest = max(receivers, key=at.get, default=None)
    pairs = [(name, highest) for name in senders] + [(lowest, name) for name in receivers]
    for sender, receiver in pairs:
        if sender and receiver and at[sender] >= at[receiver]:
            raise UserError(f"{sender} lies above {receiver}, which can't see it; look further on")


@torch.no_grad()
def path_patch_matrix(model, clean_tokens, corrupted_tokens, metric, *, receiver="v",
                      freeze="heads", key_mask=None):
    """Noising along every path from a head to a later head's queries, keys or values.

    As `path_patch` for each pair; receiver: "q", "k" or "v"; key_mask as there. Returns a
    PatchResult with the cells [layer, head, later layer, later head]; where the later one is not
    later, the effect is 0.
    """
    check_choice("receiver", receiver, ("q", "k", "v"))
    check_path_prompts(clean_tokens, corrupted_tokens, freeze)
    clean = Rerun(model, clean_tokens, metric, key_mask=key_mask)
    corrupted = Rerun(model, corrupted_tokens, metric, key_mask=key_mask)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    patched = clean.baseline.repeat(n_layers, n_heads, n_layers, n_heads, 1)

    # all heads of a layer send at once, each in a copy of the batch: [head, batch, pos, head, …]
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
    """Raises UserError for prompts of two shapes, and for what can't be frozen."""
    check_tensor("clean_tokens", clean_tokens, "batch pos")
    check_tensor("corrupted_tokens", corrupted_tokens, "batch pos")
    if clean_tokens.shape != corrupted_tokens.shape:
        raise UserError(f"clean_tokens is {list(clean_tokens.shape)} and corrupted_tokens "
                        f"{list(corrupted_tokens.shape)}; take as many prompts of one length")
    check_choice("freeze", freeze, tuple(FROZEN))
