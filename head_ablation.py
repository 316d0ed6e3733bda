"""Ablation: take a part away, and see what the model loses.

A part can't be taken out of a sum without putting something in its place, and what one puts there
is the question that one asks:

    zero      nothing: as if it never wrote, which no later part has ever met
    mean      its mean over texts and positions: it writes, but always the same
    mean_pos  its mean over texts at each position: it may still know where it is (where prompts are
              padded, a position is a column, counted from the prompts' common end)
    resample  its value in another text: something likely that is not about this one

    with ablate_heads(model, [(0, 1), (1, 2)], "mean", reference=cache):
        logits = model(tokens)                               # both heads gone, in every forward
    head_importance(model, tokens).mean                      # [layer, head]

Every effect is the rise of a metric, ablated - intact: of a loss, above 0 where the part is needed.
A small one doesn't say that the part does nothing. Others may do the same (`pairwise_interaction`),
or make up for it once it is gone (`self_repair`).

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: metrics.py, patching.py
Next: experiments/wired_circuits.py
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
    """A random order of n rows in which none keeps its place, each such order equally likely.

    Returns [n], the row that each one takes from. Raises UserError for fewer than two rows.
    """
    n = check_count("n", n, least=2)  # a single row has no other to take from
    if not isinstance(generator, torch.Generator):
        raise UserError(f"generator is a {type(generator).__name__}; pass one, such as "
                        "utils.seeded_generator(0)")
    while True:  # e = 2.7 tries on average
        order = torch.randperm(n, generator=generator)
        if (order != torch.arange(n)).all():
            return order


@dataclass(frozen=True)
class Replacement:
    """What stands in the place of what is removed; the fields are arguments of `ablate_heads`."""

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
            raise UserError("mode='resample' needs source, a row of the reference for each row; "
                            "where they are the same texts, pass derangement(n, generator)")

    def value(self, name):
        """What replaces the activation `name`: 0, or a tensor that broadcasts to it."""
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

        chosen: [unit], True for what goes. z has one unit a head, post one a neuron; attn_out and
        mlp_out count as one unit, whose mask covers d_model.
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
        """Raises UserError where the value has other rows, positions or units than the run."""
        n_rows, n_pos, *unit = shape
        fitting = {"mean": [1, 1, *unit], "mean_pos": [1, n_pos, *unit],
                   "resample": [n_rows, n_pos, *unit]}
        if self.mode != "zero" and list(value.shape) != fitting[self.mode]:
            raise UserError(f"mode={self.mode!r} has {list(value.shape)} from the reference for "
                            f"{fitting[self.mode]}; take it from this model, with as many "
                            "positions, and a source row for each row")


def mean_of_real(activation, key_mask, axes):
    """The mean over some axes of an activation [row, pos, …], padding left out; the axes stay.

    key_mask: [row, pos], True for real tokens, or None where all are. Taken in float32 at least.
    """
    exact = torch.promote_types(activation.dtype, torch.float32)
    if key_mask is None:
        return activation.mean(axes, keepdim=True, dtype=exact).to(activation.dtype)
    is_real = key_mask.view(*key_mask.shape, *[1] * (activation.ndim - 2)).to(activation.device)
    total = (activation * is_real).sum(axes, keepdim=True, dtype=exact)
    return (total / is_real.sum(axes, keepdim=True).clamp(min=1)).to(activation.dtype)


# Removing


def ablate_heads(model, heads, mode="zero", *, reference=None, source=None, pos=None):
    """A context manager: while it is open, every forward runs without what these heads write.

    Their z is replaced, so the write z W_O goes; b_O, which is no head's, stays.
    heads: (layer, head) pairs; an empty list changes nothing. mode: what takes z's place (see the
    module's docstring).
    reference: an ActivationCache of this model that holds "z", for all modes but "zero".
    source: [batch], under "resample" the row of the reference that each row takes its value from.
    If the reference is of the same texts, take derangement(n, generator), since a row's own value
    changes nothing; if it is of other texts, one for each row, range(n).
    pos: an int, a slice or a list, or a tensor [batch] with each row's own; None for all positions.
    Raises UserError for heads that are not there, a mode without what it needs, and (in the
    forward) a reference of other positions or rows.
    """
    chosen = chosen_units(heads, model.cfg.n_layers, model.cfg.n_heads, "head")
    return ablating(model, "z", chosen, Replacement(mode, reference, source, pos))


def ablate_neurons(model, neurons, mode="zero", **how):
    """A context manager: while it is open, every forward runs without these neurons; what comes out
    of their nonlinearity is replaced.

    neurons: (layer, neuron) pairs. how: reference (which holds "post"), source and pos, as in
    `ablate_heads`. Raises UserError as it does, and for a model without MLPs.
    """
    if model.cfg.attn_only:
        raise UserError("attn_only=True: this model has no neurons; use ablate_heads")
    chosen = chosen_units(neurons, model.cfg.n_layers, model.cfg.d_mlp, "neuron")
    return ablating(model, "post", chosen, Replacement(mode, **how))


def ablate_layers(model, layers, part="attn", mode="zero", **how):
    """A context manager: while it is open, every forward runs without all that the attention or the
    MLP of these layers writes, biases included.

    part: "attn" or "mlp". how: reference (which holds "attn_out" or "mlp_out"), source and pos, as
    in `ablate_heads`. Raises UserError as it does, and for a part that is not there.
    """
    there = ("attn",) if model.cfg.attn_only else ("attn", "mlp")
    if part not in there:
        raise UserError(f"part={part!r} is not in this model; choose 'attn', or 'mlp' where there "
                        "is one")
    layers = as_list("layers", layers, "a list of numbers of layers")
    chosen = chosen_units([(layer, 0) for layer in layers], model.cfg.n_layers, 1, part)
    return ablating(model, f"{part}_out", chosen, Replacement(mode, **how))


def chosen_units(units, n_layers, n_units, what):
    """(layer, unit) pairs as [layer, unit], True for each that is among them."""
    units = as_list(f"{what}s", units, f"a list of pairs, [(layer, {what})]")
    if not units:
        return torch.zeros(n_layers, n_units, dtype=torch.bool)
    pairs = as_integers(units, f"(layer, {what}) pairs")
    if pairs.shape[1:] != (2,):
        raise UserError(f"{units} are no pairs (layer, {what}); pass [(0, 1), (0, 2)]")
    chosen = torch.zeros(n_layers, n_units, dtype=torch.bool)
    for layer, unit in pairs.tolist():
        if not (0 <= layer < n_layers and 0 <= unit < n_units):
            raise UserError(f"{what} ({layer}, {unit}) is not there; this model has {n_layers} "
                            f"layers with {n_units} each, counted from 0")
        chosen[layer, unit] = True
    return chosen


def ablating(model, name, chosen, replacement):
    """A context manager: while it is open, the chosen units, [layer, unit], of the activation
    `name` (short) are replaced."""
    names = {get_act_name(name, layer): units for layer, units in enumerate(chosen) if units.any()}
    if replacement.reference is not None:
        points = model.hook_points()
        check_same_model({name: point.axes for name, point in points.items()},
                         replacement.reference)
    return model.hooks([(full, replacement.hook(full, units)) for full, units in names.items()])


# Measuring


@torch.no_grad()
def ablation_effects(model, tokens, sets, metric=None, *, mode="zero", progress=None,
                     key_mask=None, **how):
    """The rise of a metric when each of several sets of heads is removed: Effects [set, batch].

    tokens: [batch, pos]. sets: a list of lists of (layer, head) pairs. metric: a Metric, or a
    function of logits [batch, pos, d_vocab] -> [batch]; each row's loss in nats a token unless
    given. mode and how (reference, source, pos): as in `ablate_heads`. progress: is called
    after each set. key_mask: [batch, pos], True for real tokens, where prompts are padded on the
    left.
    Each set's run starts at the first layer that it changes. Hooks that are open act in both runs.
    Raises UserError as `ablate_heads`, for no sets, and in training with dropout.
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

    # each set's run, from its first layer on
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
    """The rise of a metric when one head is removed, for each head: Effects [layer, head, batch].

    Arguments and errors as in `ablation_effects`.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    sets = [[(layer, head)] for layer in range(n_layers) for head in range(n_heads)]
    effects = ablation_effects(model, tokens, sets, metric, mode=mode, **how)
    return Effects(effects.values.unflatten(0, (n_layers, n_heads)), ("layer", "head"))


def head_slopes(model, tokens, metric=None, *, key_mask=None):
    """The slope of each row's metric when a head's z shrinks towards zero: Effects [layer, head,
    batch], in the metric's unit. Minus the sum over positions and d_head of z dM/dz: what removing
    the head would raise the metric by if all were straight. Errors as in `ablation_effects`.
    """
    metric = metric_or_loss(model, tokens, metric, key_mask)
    names = [get_act_name("z", layer) for layer in range(model.cfg.n_layers)]
    _, acts, grads = model.gradient_cache(tokens, differentiable_metric(metric), names,
                                          key_mask=key_mask)

    z, slope = acts.stack("z"), grads.stack("z")  # [layer, batch, pos, head, d_head]
    return Effects(-(z * slope).sum((2, 4)).transpose(1, 2), ("layer", "head"))


def head_importance_gradient(model, tokens, metric=None, *, normalised=False, key_mask=None):
    """What one backward pass says of each head's importance, [layer, head], in the metric's unit.

    The mean over rows of the size of `head_slopes`: the absolute value is each row's, so a head
    that helps here and harms there counts; it has no sign. normalised: each layer to length 1, as
    in Michel et al. 2019. Other arguments and errors as in `ablation_effects`.
    """
    importance = head_slopes(model, tokens, metric, key_mask=key_mask).values.abs().mean(-1)
    return F.normalize(importance, dim=-1) if normalised else importance


def pairwise_interaction(model, tokens, heads, metric=None, *, mode="zero", **how):
    """What removing two heads does beyond removing each: effect(i and j) - effect(i) - effect(j).

    Effects [n, n, batch], rises of the metric in the order of `heads`, symmetric. Of a loss: above
    0 where either can do the other's work, below 0 where one is of no use without the other. On the
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

    alone = joint.diagonal().T  # [n, batch]: a head that is removed twice is removed once
    return Effects(joint - alone[:, None] - alone, ("head", "other head"))


@dataclass(frozen=True)
class SelfRepair:
    """The rise of a metric when a head is removed, and whose it is: [batch] each.

    total = direct + by_rest + by_patterns + by_scale. direct: its own write is missing, all later
    parts write what they did. by_rest: MLPs react, and later heads to what they find where they
    look. by_patterns: they look elsewhere. by_scale: the final LayerNorm divides by another length.
    """

    total: torch.Tensor
    direct: torch.Tensor
    by_rest: torch.Tensor
    by_patterns: torch.Tensor
    by_scale: torch.Tensor

    @property
    def repair(self):
        """What the others make of it, total - direct: the sum of the three."""
        return self.total - self.direct


@torch.no_grad()
def self_repair(model, tokens, head, metric, *, mode="zero", key_mask=None, **how):
    """Whether the others make up for a head that is removed: a SelfRepair.

    All are rises, ablated - intact. Where the metric is a logit difference that the head helps,
    direct is below 0, and repair above 0 if the others make up for it.
    Three things are held as in the intact run, one after another: the final LayerNorm's scale;
    later patterns too; all that later parts write too. What goes away with each hold is, in this
    order, by_scale, by_patterns and by_rest; what is left is direct.
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

    # the last stream as it is
    start = model.run_blocks(model.embed_prompts(tokens, key_mask), stop=layer, key_mask=key_mask)
    with model.caching([attn_out, *later_patterns]) as intact:
        last = model.run_blocks(start, start=layer, key_mask=key_mask)

    # without the head: all later parts free, then with their patterns held
    with removed:
        with model.caching(attn_out) as ablated:
            free = model.run_blocks(start, start=layer, key_mask=key_mask)
        held = [(name, lambda pattern, hook: intact[hook.name]) for name in later_patterns]
        with model.hooks(held):
            patterns_held = model.run_blocks(start, start=layer, key_mask=key_mask)

    # and with all that later parts write held: only the head's own write is missing
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
    """The metric, or else each row's loss in nats a token. Raises UserError where there are no
    heads, where dropout would drown what is measured, and for texts that have no loss."""
    if not model.cfg.n_layers:
        raise UserError("n_layers=0: this model has no heads to measure; take one with layers")
    model.check_no_dropout()
    check_tensor("tokens", tokens, "batch pos")
    if metric is not None:
        return as_metric(metric)
    check_key_mask(key_mask, tokens)
    if tokens.shape[1] < 2 or (key_mask is not None and not key_mask[:, -2:].all()):
        raise UserError("a text of one token predicts nothing; pass longer ones, or a metric")
    return Metric(lambda logits: next_token_loss(logits, tokens, key_mask=key_mask,
                                                 reduction="none"))


def check_reference_mask(key_mask, mode, reference=None, source=None, **how):
    """Raises UserError where, under resample, a row and the row that it takes from are padded at
    other places: padding would stand in for tokens."""
    if mode != "resample" or reference is None or source is None:
        return
    taken = getattr(reference, "key_mask", None)
    if taken is not None:
        taken = taken[choose_numbers("source", source, len(taken))]
    if not have_same_padding(key_mask, taken):
        raise UserError("source takes from rows that are padded at other places; let each row take "
                        "from one of its own length, and give both their key_mask")


def metric_at_scale_of(model, resid, last, metric):
    """The metric of a last stream `resid`, [batch], where the final LayerNorm divides by the scale
    of another, `last`; both [batch, pos, d_model]."""
    if model.cfg.norm == "none":
        return metric.of_stream(model, resid)
    with model.caching("ln_final.hook_scale") as cache:
        model.ln_final(last)
    with model.hooks([("ln_final.hook_scale", lambda scale, hook: cache[hook.name])]):
        return metric.of_stream(model, resid)
