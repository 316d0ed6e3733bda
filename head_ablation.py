"""Ablation: remove a part of the model and measure what gets worse.

A part of a sum can only be removed by putting something in its place. The choice decides which
question is asked:

    zero      nothing: as if the part never wrote, which no later part has ever seen
    mean      its mean over texts and positions: it still writes, but always the same
    mean_pos  its mean over texts at each position: it may still say where it is (if prompts are
              padded, a position is a column, counted from the prompts' common end)
    resample  its value in another text: a plausible value that is not about this text

    with ablate_heads(model, [(0, 1), (1, 2)], "mean", reference=cache):
        logits = model(tokens)                               # without the two heads
    head_importance(model, tokens).mean                      # [layer, head]

Every effect is the rise of a metric, ablated - intact. For a loss, it is above 0 if the part is
needed. A small effect does not prove that the part does nothing. Other parts may do the same
(`pairwise_interaction`), or compensate once it is gone (`self_repair`).

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: metrics.py, patching.py
Next: experiments/wired/board.py
Source: Michel et al. 2019 (importance); Wang et al. 2022 (mean ablation, backups); Chan et al. 2022
(resampling); McDougall et al. 2023 and Rushing & Nanda 2024 (self-repair)
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from activation_cache import (
    ActivationCache,
    check_same_model,
    get_act_name,
    have_same_padding,
)
from losses import next_token_loss
from metrics import (
    Effects,
    Metric,
    as_metric,
    differentiable_metric,
)
from positions import as_integers, check_key_mask, choose_numbers, choose_positions
from utils import UserError, as_list, check_choice, check_count, check_tensor

MODES = ("zero", "mean", "mean_pos", "resample")


def derangement(n, generator):
    """A derangement: a random permutation of n rows in which no row keeps its place.

    All derangements are equally likely. Returns [n], the row that each one takes its value from.
    Raises UserError for fewer than two rows.
    """
    n = check_count("n", n, least=2)  # a single row has no other row to take from
    if not isinstance(generator, torch.Generator):
        raise UserError(f"generator is a {type(generator).__name__}; pass one, such as "
                        "utils.seeded_generator(0)")
    while True:  # e = 2.7 tries on average
        order = torch.randperm(n, generator=generator)
        if (order != torch.arange(n)).all():
            return order


@dataclass(frozen=True)
class Replacement:
    """What replaces an ablated activation; the fields are arguments of `ablate_heads`."""

    mode: str = "zero"
    reference: ActivationCache | None = None
    source: torch.Tensor | list | None = None
    pos: int | slice | list | torch.Tensor | None = None

    def __post_init__(self):
        check_choice("mode", self.mode, MODES)
        if self.mode != "zero" and self.reference is None:
            raise UserError(f"mode={self.mode!r} needs a reference; pass "
                            "reference=model.run_with_cache(tokens)[1]")
        if self.mode == "resample" and self.source is None:
            raise UserError("mode='resample' needs source, a row of the reference for each row; if "
                            "they are the same texts, pass derangement(n, generator)")

    def value(self, name):
        """The replacement for the activation `name`: 0, or a tensor that broadcasts to it."""
        if self.mode == "zero":
            return 0.0
        kept = self.reference[name]  # [row, pos, head, d_head], or [row, pos, d_mlp or d_model]
        if self.mode == "mean":
            return mean_of_real(kept, self.reference.key_mask, (0, 1))
        if self.mode == "mean_pos":
            return mean_of_real(kept, self.reference.key_mask, (0,))

        rows = as_integers(self.source, "source").to(kept.device)
        if rows.min() < 0 or rows.max() >= len(kept):
            raise UserError(f"source runs from {int(rows.min())} to {int(rows.max())}; the "
                            f"reference has rows 0 to {len(kept) - 1}")
        return kept[rows]

    def hook(self, name, chosen):
        """A hook that replaces the chosen units of the activation `name`.

        chosen: [unit], True for the units to replace. z has one unit for each head, post one for
        each neuron; attn_out and mlp_out are one unit, whose mask covers d_model.
        """
        value = self.value(name)

        def replace(tensor, hook):
            self.check_value(value, tensor.shape)
            n_rows, n_pos = tensor.shape[:2]
            positions = choose_positions(self.pos, n_pos, n_rows).expand(n_rows, -1)
            here = tensor.new_zeros(n_rows, n_pos, dtype=torch.bool)
            here.scatter_(1, positions.to(here.device), True)
            gone = here[..., None] & chosen.to(here.device)  # [batch, pos, unit]
            if tensor.ndim == 4:
                gone = gone[..., None]  # z: [batch, pos, head, 1], all of d_head
            return torch.where(gone, value, tensor)

        return replace

    def check_value(self, value, shape):
        """Raises UserError if the value has other rows, positions or units than the run."""
        n_rows, n_pos, *unit = shape
        fitting = {"mean": [1, 1, *unit], "mean_pos": [1, n_pos, *unit],
                   "resample": [n_rows, n_pos, *unit]}
        if self.mode != "zero" and list(value.shape) != fitting[self.mode]:
            raise UserError(f"mode={self.mode!r} has {list(value.shape)} from the reference for "
                            f"{fitting[self.mode]}; take it from this model, with the same number "
                            "of positions, and a source row for each row")


def mean_of_real(activation, key_mask, axes):
    """The mean over some axes of an activation [row, pos, …], without padding; the axes stay.

    key_mask: [row, pos], True for real tokens, or None if all are. Computed in float32 at least.
    """
    exact = torch.promote_types(activation.dtype, torch.float32)
    if key_mask is None:
        return activation.mean(axes, keepdim=True, dtype=exact).to(activation.dtype)
    is_real = key_mask.view(*key_mask.shape, *[1] * (activation.ndim - 2)).to(activation.device)
    total = (activation * is_real).sum(axes, keepdim=True, dtype=exact)
    return (total / is_real.sum(axes, keepdim=True).clamp(min=1)).to(activation.dtype)


# Removing parts


def ablate_heads(model, heads, mode="zero", *, reference=None, source=None, pos=None):
    """A context in which every forward pass runs without the output of these heads.

    Their z is replaced, and with it their write z W_O. b_O belongs to no head, and stays.
    heads: (layer, head) pairs; an empty list changes nothing. mode: what replaces z (see the
    module's docstring).
    reference: an ActivationCache of this model that holds "z", for all modes but "zero".
    source: [batch], for "resample": the row of the reference from which each row takes its value.
    If the reference holds the same texts, use derangement(n, generator), because a row's own value
    changes nothing; if it holds other texts, one for each row, use range(n).
    pos: an int, a slice or a list, or a tensor [batch] with one for each row; None for all.
    Raises UserError for unknown heads, for a mode without its arguments, and (in the forward pass)
    for a reference with other positions or rows.
    """
    chosen = chosen_units(heads, model.cfg.n_layers, model.cfg.n_heads, "head")
    return ablating(model, "z", chosen, Replacement(mode, reference, source, pos))


def ablate_neurons(model, neurons, mode="zero", **how):
    """A context in which every forward pass runs without these MLP neurons: their activations,
    after the nonlinearity, are replaced.

    neurons: (layer, neuron) pairs. how: reference (which holds "post"), source and pos, as in
    `ablate_heads`. Raises UserError as it does, and for a model without MLPs.
    """
    if model.cfg.attn_only:
        raise UserError("attn_only=True: this model has no neurons; use ablate_heads")
    chosen = chosen_units(neurons, model.cfg.n_layers, model.cfg.d_mlp, "neuron")
    return ablating(model, "post", chosen, Replacement(mode, **how))


def ablate_layers(model, layers, part="attn", mode="zero", **how):
    """A context in which every forward pass runs without the output of the attention or the MLP of
    these layers, biases included.

    part: "attn" or "mlp". how: reference (which holds "attn_out" or "mlp_out"), source and pos, as
    in `ablate_heads`. Raises UserError as it does, and for a part that the model lacks.
    """
    there = ("attn",) if model.cfg.attn_only else ("attn", "mlp")
    if part not in there:
        raise UserError(f"part={part!r} is not in this model; choose 'attn', or 'mlp' if the model "
                        "has MLPs")
    layers = as_list("layers", layers, "a list of layer numbers")
    chosen = chosen_units([(layer, 0) for layer in layers], model.cfg.n_layers, 1, part)
    return ablating(model, f"{part}_out", chosen, Replacement(mode, **how))


def chosen_units(units, n_layers, n_units, what):
    """(layer, unit) pairs as a mask [layer, unit], True for each pair."""
    units = as_list(f"{what}s", units, f"a list of pairs, [(layer, {what})]")
    if not units:
        return torch.zeros(n_layers, n_units, dtype=torch.bool)
    pairs = as_integers(units, f"(layer, {what}) pairs")
    if pairs.shape[1:] != (2,):
        raise UserError(f"{units} are not pairs (layer, {what}); pass [(0, 1), (0, 2)]")
    chosen = torch.zeros(n_layers, n_units, dtype=torch.bool)
    for layer, unit in pairs.tolist():
        if not (0 <= layer < n_layers and 0 <= unit < n_units):
            raise UserError(f"{what} ({layer}, {unit}) does not exist; this model has {n_layers} "
                            f"layers with {n_units} each, counted from 0")
        chosen[layer, unit] = True
    return chosen


def ablating(model, name, chosen, replacement):
    """A context in which the chosen units, [layer, unit], of the activation `name` (short) are
    replaced."""
    names = {get_act_name(name, layer): units for layer, units in enumerate(chosen) if units.any()}
    if replacement.reference is not None:
        points = model.hook_points()
        check_same_model({name: point.axes for name, point in points.items()},
                         replacement.reference)
    return model.hooks([(full, replacement.hook(full, units)) for full, units in names.items()])


# Measuring effects


@torch.no_grad()
def ablation_effects(model, tokens, sets, metric=None, *, mode="zero", progress=None,
                     key_mask=None, **how):
    """The rise of a metric when each of several sets of heads is removed: Effects [set, batch].

    tokens: [batch, pos]. sets: a list of lists of (layer, head) pairs. metric: a Metric, or a
    function of logits [batch, pos, d_vocab] -> [batch]; by default each row's loss in nats per
    token. mode and how (reference, source, pos): as in `ablate_heads`. progress: a function called
    after each set. key_mask: [batch, pos], True for real tokens, if prompts are padded on the left.
    Each set's run starts at the first layer that it changes. Open hooks act in both runs.
    Raises UserError as `ablate_heads`, for no sets, and in training mode with dropout.
    """
    metric = metric_or_loss(model, tokens, metric, key_mask)
    check_reference_mask(key_mask, mode, **how)
    n_layers = model.cfg.n_layers
    wanted = "a list of lists of (layer, head) pairs"
    sets = [as_list("a set", heads, wanted) for heads in as_list("sets", sets, wanted)]
    if not sets:
        raise UserError("there are no heads to measure; give some")

    # the intact run, and the stream before each block
    streams = [model.embed_prompts(tokens, key_mask)]
    for layer in range(n_layers):
        streams.append(model.run_blocks(streams[-1], layer, layer + 1, key_mask=key_mask))
    intact = metric.of_stream(model, streams[-1])

    # each set's run, from the first layer that it changes
    rises = []
    for heads in sets:
        with ablate_heads(model, heads, mode, **how):
            first = min((int(layer) for layer, _ in heads), default=n_layers)
            last = model.run_blocks(streams[first], start=first, key_mask=key_mask)
        rises.append(metric.of_stream(model, last) - intact)
        if progress:
            progress()
    return Effects(torch.stack(rises), ("set",))


def head_importance(model, tokens, metric=None, *, mode="zero", **how):
    """Head importance: a metric's rise when each head is removed; Effects [layer, head, batch].

    Arguments and errors as in `ablation_effects`.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    sets = [[(layer, head)] for layer in range(n_layers) for head in range(n_heads)]
    effects = ablation_effects(model, tokens, sets, metric, mode=mode, **how)
    return Effects(effects.values.unflatten(0, (n_layers, n_heads)), ("layer", "head"))


def head_slopes(model, tokens, metric=None, *, key_mask=None):
    """First-order head importance: each row's metric slope as a head's z shrinks towards zero.

    Effects [layer, head, batch], in the metric's unit: minus the sum over positions and d_head of
    z dM/dz. This is how much removing the head would raise the metric if the model were linear.
    Errors as in `ablation_effects`.
    """
    metric = metric_or_loss(model, tokens, metric, key_mask)
    names = [get_act_name("z", layer) for layer in range(model.cfg.n_layers)]
    _, acts, grads = model.gradient_cache(tokens, differentiable_metric(metric), names,
                                          key_mask=key_mask)

    z, slope = acts.stack("z"), grads.stack("z")  # [layer, batch, pos, head, d_head]
    return Effects(-(z * slope).sum((2, 4)).transpose(1, 2), ("layer", "head"))


def head_importance_gradient(model, tokens, metric=None, *, normalised=False, key_mask=None):
    """Head importance estimated by one backward pass, [layer, head], in the metric's unit.

    The mean over rows of the absolute value of `head_slopes`, so it has no sign: a head that helps
    on one row and hurts on another counts on both. normalised: scale each layer to length 1, as in
    Michel et al. 2019. Other arguments and errors as in `ablation_effects`.
    """
    importance = head_slopes(model, tokens, metric, key_mask=key_mask).values.abs().mean(-1)
    return F.normalize(importance, dim=-1) if normalised else importance


def pairwise_interaction(model, tokens, heads, metric=None, *, mode="zero", **how):
    """The interaction of two heads: effect(i and j) - effect(i) - effect(j) of removing them.

    Effects [n, n, batch], rises of the metric in the order of `heads`, symmetric. For a loss, it is
    above 0 if each can do the other's work, and below 0 if one is useless without the other. On the
    diagonal the formula gives -effect(i). Arguments and errors as in `ablation_effects`.
    """
    heads = as_list("heads", heads, "a list of (layer, head) pairs")
    pairs = [[one, other] for i, one in enumerate(heads) for other in heads[i:]]
    effects = ablation_effects(model, tokens, pairs, metric, mode=mode, **how).values

    # the pairs as a symmetric matrix
    i, j = torch.triu_indices(len(heads), len(heads))  # in the order of `pairs`
    joint = effects.new_zeros(len(heads), len(heads), effects.shape[-1])
    joint[i, j] = effects
    joint[j, i] = effects

    alone = joint.diagonal().T  # [n, batch]: removing a head twice is removing it once
    return Effects(joint - alone[:, None] - alone, ("head", "other head"))


@dataclass(frozen=True)
class SelfRepair:
    """The rise of a metric when a head is removed, split by its causes: [batch] each.

    total = direct + by_rest + by_patterns + by_scale. direct: the head's own write is missing,
    while all later parts write what they did before. by_rest: MLPs react, and later heads read
    changed values. by_patterns: later heads look elsewhere. by_scale: the final LayerNorm divides
    by another scale.
    """

    total: torch.Tensor
    direct: torch.Tensor
    by_rest: torch.Tensor
    by_patterns: torch.Tensor
    by_scale: torch.Tensor

    @property
    def repair(self):
        """How the other parts react, total - direct: the sum of the other three."""
        return self.total - self.direct


@torch.no_grad()
def self_repair(model, tokens, head, metric, *, mode="zero", key_mask=None, **how):
    """Self-repair: do other parts compensate for a head that is removed? A SelfRepair.

    All values are rises, ablated - intact. If the metric is a logit difference that the head helps,
    direct is below 0, and repair is above 0 if the others compensate.
    Three things are frozen at their values in the intact run, one after another: the final
    LayerNorm's scale; then later patterns too; then all later writes too. The effects that
    disappear are, in this order, by_scale, by_patterns and by_rest; what remains is direct.
    head: (layer, head). metric: as in `ablation_effects`, best Metric.logit_diff(correct, wrong).
    Other arguments and errors as there.
    """
    metric = metric_or_loss(model, tokens, metric, key_mask)
    check_reference_mask(key_mask, mode, **how)
    removed = ablate_heads(model, [head], mode, **how)
    layer = head[0]
    attn_out = get_act_name("attn_out", layer)
    later_patterns = [get_act_name("pattern", later)
                      for later in range(layer + 1, model.cfg.n_layers)]

    # the intact run, from the head's layer on
    start = model.run_blocks(model.embed_prompts(tokens, key_mask), stop=layer, key_mask=key_mask)
    with model.caching([attn_out, *later_patterns]) as intact:
        last = model.run_blocks(start, start=layer, key_mask=key_mask)

    # without the head: all later parts free, then with their patterns frozen
    with removed:
        with model.caching(attn_out) as ablated:
            free = model.run_blocks(start, start=layer, key_mask=key_mask)
        held = [(name, lambda pattern, hook: intact[hook.name]) for name in later_patterns]
        with model.hooks(held):
            patterns_held = model.run_blocks(start, start=layer, key_mask=key_mask)

    # and with all later writes frozen: only the head's own write is missing
    all_held = last + (ablated[attn_out] - intact[attn_out])

    before = metric.of_stream(model, last)
    total = metric.of_stream(model, free) - before
    scale_held = metric_at_scale_of(model, free, last, metric) - before
    patterns_held_too = metric_at_scale_of(model, patterns_held, last, metric) - before
    direct = metric_at_scale_of(model, all_held, last, metric) - before
    return SelfRepair(
        total=total,
        direct=direct,
        by_rest=patterns_held_too - direct,
        by_patterns=scale_held - patterns_held_too,
        by_scale=total - scale_held,
    )


def metric_or_loss(model, tokens, metric, key_mask=None):
    """The metric, by default each row's loss in nats per token. Raises UserError for a model
    without heads, for dropout, whose noise would swamp effects, and where there is no loss."""
    if not model.cfg.n_layers:
        raise UserError("n_layers=0: this model has no heads to measure; take one with layers")
    model.check_no_dropout()
    check_tensor("tokens", tokens, "batch pos")
    if metric is not None:
        return as_metric(metric)
    model.check_predicts_tokens("pass a metric, since there is no loss on the text")
    check_key_mask(key_mask, tokens)
    if tokens.shape[1] < 2 or (key_mask is not None and not key_mask[:, -2:].all()):
        raise UserError("a text of one token predicts nothing; pass longer ones, or a metric")
    return Metric(lambda logits: next_token_loss(logits, tokens, key_mask=key_mask,
                                                 reduction="none"))


def check_reference_mask(key_mask, mode, reference=None, source=None, **how):
    """Raises UserError if, under resample, a row and its source row are padded at different
    positions: padding would then replace real tokens."""
    if mode != "resample" or reference is None or source is None:
        return
    taken = getattr(reference, "key_mask", None)
    if taken is not None:
        taken = taken[choose_numbers("source", source, len(taken))]
    if not have_same_padding(key_mask, taken):
        raise UserError("source takes from rows that are padded at different positions; let each "
                        "row take from one of its own length, and pass both their key_mask")


def metric_at_scale_of(model, resid, last, metric):
    """The metric of a final stream `resid`, [batch], with the final LayerNorm's scale taken from
    another stream, `last`; both [batch, pos, d_model]."""
    if model.cfg.norm == "none":
        return metric.of_stream(model, resid)
    with model.caching("ln_final.hook_scale") as cache:
        model.ln_final(last)
    with model.hooks([("ln_final.hook_scale", lambda scale, hook: cache[hook.name])]):
        return metric.of_stream(model, resid)
