"""Attribute a metric: direct logit attribution, attribution patching, integrated gradients.

*Direct logit attribution.* The unembedding is linear, and so is the final LayerNorm if its scale is
held fixed. So the logit difference is a sum over everything that writes into the stream, plus what
the biases of LayerNorm and of the unembedding add:

    logits[correct] - logits[wrong] = sum_c <c, d> + <b_ln, W_U[:, correct] - W_U[:, wrong]>
                                      + b_U[correct] - b_U[wrong]

Here d is the direction from `before_layer_norm`. The sum is exact, and no weights have to be folded
first. It shows what each component writes directly, not what the answer needs: effects through
later layers are not included.

*Attribution patching.* Activation patching measures such effects, with one run for each node. One
gradient estimates them for all nodes at once, assuming that the model is linear between the runs:

    m(run with a from the source) - m(run)  =  <a_source - a, dm/da>  +  the nonlinear rest

The estimate fails at a saturated softmax, which is flat here and steep further on, and for paths
that cancel only at this run. AtP* corrects both. *Integrated gradients* average the gradient along
the whole way, and leave no rest.

Chapter: COURSE_ROADMAP.md, 8 (read) and 10 (approximate)
Prerequisites: metrics.py, residual_stream_analysis.py
Next: rerun.py
Source: Elhage et al. 2021; Wang et al. 2022 (direct effect on the logit difference); Nanda 2023
(attribution patching); Kramár et al. 2024 (AtP*); Sundararajan et al. 2017 (integrated gradients)
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from activation_cache import (
    OUTSIDE_BLOCKS,
    check_cache,
    check_name,
    check_same_mask,
    check_same_model,
    check_same_shape,
    get_act_name,
)
from hooks import select_names
from metrics import (
    EffectsOfTwoRuns,
    as_metric,
    check_one_position,
    differentiable_metric,
    token_ids,
)
from positions import choose_positions
from residual_stream_analysis import before_layer_norm, decomposition, last_stream
from utils import UserError, as_list, at_least_float32, check_choice, check_count

FIXES = ("qk", "grad_drop")  # the two together are AtP*
SOFTMAX = ("q", "k", "attn_scores", "pattern")


@torch.no_grad()
def direct_logit_attribution(model, cache, correct, wrong=None, *, unit="component", pos=-1,
                             tokenizer=None):
    """Direct logit attribution: what each component adds to logit(correct) - logit(wrong).

    cache: of `model`, unmodified, with the activations of `decomposition` and ln_final's scale.
    correct, wrong: one id or token for all rows, or one for each row, [batch]; tokens given as text
    need the tokenizer. unit: "component", "head", "neuron". pos: the position of the logits, an
    int, or a tensor [batch] with one for each row.
    Returns (attr, labels): attr [component, batch], in nats. Its last two rows are "ln_bias" and
    "b_U". The sum over components is the model's own logit difference (without `wrong`, its logit).
    Raises UserError for activations missing from the cache, and for unknown positions and tokens.
    """
    check_cache(cache)
    if tokenizer is not None:
        model.check_predicts_tokens("give ids, and no tokenizer")
    n_rows, n_pos = cache["embed"].shape[:2]
    d_vocab = model.cfg.d_vocab_out
    check_one_position(pos, choose_positions(pos, n_pos, n_rows).shape[-1])

    # the direction in the vocabulary
    W_U = at_least_float32(model.W_U.detach())
    b_U = at_least_float32(model.b_U.detach())
    correct_ids = token_ids(correct, n_rows, d_vocab, tokenizer=tokenizer).to(W_U.device)
    direction = W_U[:, correct_ids].T  # [batch, d_model]
    bias = b_U[correct_ids]  # [batch]
    if wrong is not None:
        wrong_ids = token_ids(wrong, n_rows, d_vocab, tokenizer=tokenizer).to(W_U.device)
        direction = direction - W_U[:, wrong_ids].T
        bias = bias - b_U[wrong_ids]

    # the same direction in the stream, before the final LayerNorm, and each write's part along it
    here = cache.slice(pos=pos)
    if here.key_mask is not None and not here.key_mask.all():
        raise UserError(f"pos={pos} is padding in some prompts; choose real tokens")
    in_stream = before_layer_norm(model, here, direction[:, None])
    attr, labels = decomposition(model, here, unit=unit, project_output_onto=in_stream)

    # the biases, which no component writes
    from_ln = torch.zeros_like(bias)
    if model.cfg.norm == "layernorm":
        from_ln = direction @ at_least_float32(model.ln_final.b.detach())
    return torch.cat([attr[..., 0], from_ln[None], bias[None]]), [*labels, "ln_bias", "b_U"]


@dataclass(frozen=True, eq=False)
class Attribution(EffectsOfTwoRuns):
    """How much patching each cell would change the metric, to first order: an Effects.

    values: [*axes, batch]; with "grad_drop", absolute values. axes: the names of the cells' axes.
    baseline, target: [batch], the metric of the unpatched run and of the source's run.
    direction: "denoising" or "noising".
    """

    direction: str = "denoising"


def attribution_patching(model, tokens, source_cache, metric, *, names=None,
                         axes=("layer", "head"), direction="denoising", fixes=(),
                         key_mask=None):
    """Attribution patching: estimates the effect of patching each cell, by one gradient.

    The estimate is the sum of (a_source - a) * dm/da over the cell. All cells together take one run
    and its gradient. Returns {name: Attribution}.

    tokens: [batch, pos], of the run that is patched: the corrupted one when denoising, the clean
    one when noising. source_cache: an ActivationCache of the other run, of the same shapes.
    metric: a Metric, or a function of logits [batch, pos, d_vocab] -> [batch].
    names: one or several, short ("resid_pre", "q", "pattern", …: in all layers) or full; None means
    "z" and "mlp_out". axes: those of the cells: "layer" (needed for short names) and any axes of
    the hook points, such as "pos", "head", "key_pos", "d_mlp"; the others are summed over. An axis
    that a named activation lacks is ignored for it; on a pattern, "pos" means the query. fixes:
    "qk" (treats q and k by `qk_effect`), "grad_drop" (one run for each part, see there), or both.
    key_mask: [batch, pos], True for real tokens, if both runs' prompts are padded on the left at
    the same positions.
    Raises UserError for names, axes, shapes and metrics that do not fit, for a source that equals
    the run, and in training mode with dropout.
    """
    check_choice("direction", direction, ("denoising", "noising"))
    fixes = [fixes] if isinstance(fixes, str) else as_list("fixes", fixes, "a list; [] for none")
    axes = [axes] if isinstance(axes, str) else as_list("axes", axes, "a list of names")
    if len(set(map(str, axes))) < len(axes):
        raise UserError(f"axes={axes}: name each once")
    for fix in fixes:
        check_choice("fix", fix, FIXES)
    nodes = find_nodes(model, names, axes)
    if "qk" in fixes and "d_head" in axes:
        raise UserError("the fix 'qk' needs a whole query or key; leave the axis 'd_head' out")
    places = [place for of_name, *_ in nodes.values() for place in of_name]
    fixed = [p for p in places if "qk" in fixes and p.endswith((".hook_q", ".hook_k"))]
    read_by_fix = [sibling_hook(place, part) for place in fixed for part in SOFTMAX]

    def estimate(dropped=None):
        """(the metric [batch], {name: effects}); dropped: a part whose own effect counts as 0."""
        value, acts, grads = metric_gradients(model, tokens, metric, [*places, *read_by_fix],
                                                key_mask)
        moves = source_differences(acts, source_cache, places)
        found = {}
        for place, move in moves.items():
            found[place] = move * grads[place]
            if place == dropped:
                found[place] = torch.zeros_like(move)
        for place in fixed:
            found[place] = qk_effect(place, acts, grads, source_cache, one_key="pos" in axes)

        # sum over all other axes
        effects = {}
        for name, (of_name, dims, kept) in nodes.items():
            stacked = torch.stack([found[place] for place in of_name])
            wanted = [dims.index(axis) for axis in (*kept, "batch")]
            effects[name] = torch.einsum(stacked, list(range(len(dims))), wanted)
        return value, effects

    baseline, values = estimate()
    if "grad_drop" in fixes:
        values = grad_drop(model, lambda part: estimate(part)[1])
    target = metric_of_cache(model, source_cache, metric)
    return {name: Attribution(values[name], nodes[name][2], baseline, target, direction)
            for name in nodes}


@torch.no_grad()
def metric_of_cache(model, cache, metric):
    """A run's metric from its cache, [batch]; None if the cache lacks the last stream."""
    resid = last_stream(model, cache)
    return None if resid is None else as_metric(metric).of_stream(model, resid)


def sibling_hook(place, part):
    """The hook name of another activation in the attention whose hook_q or hook_k is `place`."""
    return place[:-1] + part  # without its last letter, q or k


def qk_effect(place, acts, grads, source, *, one_key=True):
    """The effect of patching each query or key through its attention pattern p, exact in p.

    Queries and keys reach the metric only through p. The softmax can be flat at this run while
    patching moves p from one key to another. So only what comes after p is linearised: the effect
    is (p' - p) . g, with g = dm/dp and p' the softmax with the source's query or key. A query has
    its own row of p. A single key t, with score s_t, moves attention between t and the other keys,
    whose shares among themselves stay the same:

        p'_t = sigmoid(s'_t - logsumexp of the other scores)
        (p' - p) . g = (p'_t - p_t) (g_t - mean of g over the other keys, weighted by p)

    place: the hook name of q or k. acts, grads: {hook name: the activation} and {hook name: the
    metric's gradient there} of the run, with q, k, attn_scores and pattern of this attention.
    source: the same activations of the source's run; only the one at `place` is read. one_key: each
    key separately; otherwise all keys of a head together, with the effect at the queries that see
    them. Returns [batch, pos, head, 1].
    """
    q, k, scores, pattern = (acts[sibling_hook(place, part)] for part in SOFTMAX)
    slope = grads[sibling_hook(place, "pattern")]  # [batch, head, query_pos, key_pos]
    is_query = place.endswith("q")

    # the scores with the source's query or key
    if is_query:
        q = source[place]
    else:
        k = source[place]
    new = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    new = new.masked_fill(scores == -math.inf, -math.inf)

    # the effect through the new pattern
    if is_query or not one_key:
        effect = ((new.softmax(-1) - pattern) * slope).sum(-1)  # [batch, head, query_pos]
    else:
        # Sums that leave out one key, not 1 - p_t, which is only rounding if p_t is almost 1.
        others = 1 - torch.eye(pattern.shape[-1]).to(pattern)
        rest = pattern @ others  # 0 in the first row, where there is no other key
        mean = (pattern * slope) @ others / rest.clamp_min(torch.finfo(rest.dtype).tiny)
        log_others = scores.logsumexp(-1, keepdim=True) + rest.log()
        moved = (new - log_others).sigmoid() - pattern
        effect = (moved * (slope - mean)).sum(-2)  # [batch, head, key_pos]
    return effect.transpose(1, 2).unsqueeze(-1)


def grad_drop(model, effects_without):
    """The mean absolute effect over gradients that each leave out one part of the model (GradDrop).

    A node's direct path and its paths through later parts may cancel at this run. Its gradient is
    then 0, although the paths need not cancel over the whole change. Dropping the gradient through
    one of these parts shows what it hid. A part is an attention or an MLP, not a block, because an
    MLP reads what its block's attention writes. A node's own part is left out of its mean, because
    without that part's gradient the node has no effect left.

    effects_without(part) -> {name: effects} from a new gradient, with 0 for the part's own output.
    Raises UserError for a model of fewer than two parts.
    """
    kinds = ("attn",) if model.cfg.attn_only else ("attn", "mlp")
    parts = [f"blocks.{layer}.hook_{kind}_out"
             for layer in range(model.cfg.n_layers) for kind in kinds]
    if len(parts) < 2:
        raise UserError(f"grad_drop needs two parts, and this model has {len(parts)}; leave it out")

    sizes = {}
    for part in parts:
        with model.hooks([(part, lambda write, hook: write.detach())]):
            for name, effect in effects_without(part).items():
                in_a_part = not any(word in name for word in ("resid", "embed", "ln_final"))
                n_counted = len(parts) - 1 if in_a_part else len(parts)
                size = effect.abs() / n_counted
                sizes[name] = sizes.get(name, 0) + size
    return sizes


def integrated_gradients(model, tokens, source_cache, metric, *, act_name="embed", steps=32,
                         rule="gauss", key_mask=None):
    """Integrated gradients: splits a metric's whole change over an activation's entries.

    The attribution is (a_source - a) * the mean of dm/da along the straight line from the run's
    activation to the source's; everything before the activation stays as in the run. It sums to m
    at the end of the line minus m of the run. A mean over a few points misses this sum by a little:
    the completeness gap is the size of that error.

    act_name: a key of the cache: "embed" (the line ends in the source's run), ("z", 0), a full
    name. steps: the number of points; "trapezoid" takes one more. rule: "gauss" (Gauss-Legendre),
    "left" or "right" (the ends of equal pieces), "trapezoid". The rest is as in
    `attribution_patching`.
    Returns (attribution, gap): [batch, ...], of the activation's shape, and [batch], in the
    metric's unit.
    Raises UserError where `attribution_patching` does, for an unknown rule, and for fewer than one
    step.
    """
    points, weights = quadrature(rule, steps)
    check_cache(source_cache)
    name = source_cache.full_name(act_name)
    start, own, _ = metric_gradients(model, tokens, metric, [name], key_mask)
    move = source_differences(own, source_cache, [name])[name]

    def at(share):
        with model.hooks([(name, lambda _, hook: own[name] + share * move)]):
            value, _, slope = metric_gradients(model, tokens, metric, [name], key_mask)
        return value, slope[name]

    slope = sum(weight * at(point)[1] for point, weight in zip(points, weights, strict=True))
    gap = (move * slope).flatten(1).sum(1) - (at(1.0)[0] - start)
    return move * slope, gap.abs()


def quadrature(rule, steps):
    """Points and weights for a mean over [0, 1] (numerical integration).

    Raises UserError for an unknown rule, and for fewer than one step.
    """
    check_choice("rule", rule, ("gauss", "left", "right", "trapezoid"))
    steps = check_count("steps", steps)
    if rule == "gauss":
        points, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
        return ((1 + points) / 2).tolist(), (weights / 2).tolist()

    points = [k / steps for k in range(steps + 1)]
    if rule == "left":
        return points[:-1], [1 / steps] * steps
    if rule == "right":
        return points[1:], [1 / steps] * steps
    return points, [0.5 / steps, *[1 / steps] * (steps - 1), 0.5 / steps]


def find_nodes(model, names, axes):
    """{name: (hook names, their axes with the layer axis first, the axes kept)}; raises UserError
    for unknown names and axes."""
    if names is None:
        names = ("z",) if model.cfg.attn_only else ("z", "mlp_out")
    points = model.hook_points()

    nodes = {}
    for name in [names] if isinstance(names, str) else as_list("names", names, "a list of names"):
        check_name(name)
        in_full = "hook_" in name or name in OUTSIDE_BLOCKS
        if not in_full and "layer" not in axes:
            raise UserError(f"{name!r} is in every block; add the axis 'layer' or name one hook")

        layers = [None] if in_full else range(model.cfg.n_layers)
        places = select_names(points, [get_act_name(name, layer) for layer in layers])
        alias = "query_pos" if "query_pos" in axes else "pos"
        own = points[places[0]].axes.replace("query_pos", alias).split()
        dims = ["" if in_full else "layer", *own]
        kept = tuple(axis for axis in dict.fromkeys(axes) if axis in dims)
        nodes[name] = places, dims, kept

    there = {axis: None for _, dims, _ in nodes.values() for axis in dims[:1] + dims[2:]}
    for axis in axes:
        if axis not in (*there, "layer"):
            raise UserError(f"{', '.join(nodes)} has no axis {axis!r} for cells; choose from: "
                            f"{', '.join(filter(None, there))}")
    return nodes


def metric_gradients(model, tokens, metric, names, key_mask=None):
    """`gradient_cache` for a metric that must have a gradient, with dropout off."""
    model.check_no_dropout()
    return model.gradient_cache(tokens, differentiable_metric(metric), names, key_mask=key_mask)


def source_differences(acts, source_cache, names):
    """{name: a_source - a}.

    Raises UserError for different shapes, and if the source equals the run in all of them. They
    count as equal if half of their digits agree, because a run can be computed in two ways.
    """
    check_same_model(acts, source_cache)
    check_same_mask(acts, source_cache)
    moves = {}
    for name in names:
        own = acts[name]
        source = source_cache[name]
        check_same_shape(name, own, source)
        moves[name] = (source - own).masked_fill(source == own, 0)  # -inf - -inf would be NaN

    half_of_the_digits = min(1e-3, torch.finfo(own.dtype).eps ** 0.5)
    if all(move.norm() <= half_of_the_digits * acts[name].nan_to_num(neginf=0).norm()
           for name, move in moves.items()):
        raise UserError(f"in {', '.join(list(names)[:3])} the source equals the run, so effects "
                        "are undefined; take the cache from the other prompts")
    return moves
