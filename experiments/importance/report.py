"""What experiments/head_importance.py claims of what it measured, and its figures.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Read before: experiments/head_importance.py
Source: Michel et al. 2019 (pruning curves)
"""

import math
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.common import over_seeds
from metrics import permutation_pvalue
from plotting import COLOURS, bare_axes

ABLATIONS = ("zero", "mean", "resample")
METHODS = (*ABLATIONS, "gradient")
LEFT = 0.1  # the most of the whole that what lies outside of a circuit, or a slope, may say


def claims_of(models, tested=True, own=True):
    """[Claim] of the facts of each model: of text first, then of those whose circuit is known.

    tested: whether a claim can fail; own: the same of the models of text, which are claimed of
    those that are trained here, and only reported of others."""
    texts = [one for one in models if "truth" not in one]
    known = [one for one in models if "truth" in one]
    return [*of_texts(texts, tested and own), *of_circuits(known, texts, tested)]


def verdict(tested, holds):
    """holds, as a bool, or None where nothing is tested."""
    return bool(holds) if tested else None


# A model of text


def of_texts(models, tested):
    """The claims on models of which nobody knows which heads matter."""
    what, ranks = what_text(models), [one["agreement"] for one in models]
    null = max(rank["null_high"] for rank in ranks)
    zero_gradient = [rank["pairs"]["zero, gradient"] for rank in ranks]
    ablations = against_chance(models, ABLATIONS)
    gradient = against_chance(models, ("gradient",))
    shares = [sum(one["alone"]) / one["pruning"]["curves"]["mean"][-1] for one in models]
    repair = [one["repair"] for one in models]
    return [
        over_seeds(f"{what}: Spearman of two methods, mean of the {len(ranks[0]['pairs'])} pairs",
                   [rank["mean"] for rank in ranks],
                   verdict(tested, max(rank["p"] for rank in ranks) < 0.05),
                   control=f"95 % of shuffled heads: below {null:.2f}", mark=null),
        over_seeds("… of zero ablation and the gradient alone", [rho for rho, *_ in zero_gradient],
                   control="over texts "
                   f"{min(low for _, low, _ in zero_gradient):.2f} to "
                   f"{max(high for *_, high in zero_gradient):.2f}"),
        over_seeds("… pruned up to half by the worst ablation, over random orders' mean cost",
                   ablations["worst"], verdict(tested, ablations["p"] < 0.05),
                   mark=ablations["chance"], control=random_orders(ablations)),
        over_seeds("… pruned up to half by the gradient, over the same", gradient["worst"],
                   control=random_orders(gradient)),
        over_seeds("… the heads' single costs, summed, over what all cost together", shares,
                   control="1, were they independent"),
        *of_pairs(models),
        over_seeds("… a head's own words, over what its removal costs (direct / total)",
                   [sum(one["direct"]) / sum(one["total"]) for one in repair],
                   control=f"less than their own words cost: {repaired(repair)}"),
    ]


def what_text(models):
    """The name of the text, or of the run."""
    return models[0]["name"].split(", seed")[0]


def against_chance(models, methods):
    """A dict: worst, for each model the largest area under a method's pruning curve, over the mean
    of random orders; p, of the worst method, how often a random order in each model does as well on
    average; chance, what 95 % of those are above; single, in how many cases p is below 0.05."""
    over_mean = [(torch.tensor([one["pruning"]["areas"][method] for method in methods]) / mean,
                  null / mean) for one in models
                 for null in [torch.tensor(one["pruning"]["random_areas"])]
                 for mean in [null.mean()]]
    own, null = (torch.stack(parts) for parts in zip(*over_mean, strict=True))  # [model, ...]
    single = [one["pruning"]["p"][method] < 0.05 for one in models for method in methods]
    return {"worst": own.max(1).values.tolist(),
            "p": max(permutation_pvalue(-area, -null.mean(0)).item() for area in own.mean(0)),
            "chance": null.mean(0).quantile(0.05).item(),
            "single": f"{sum(single)} of {len(single)}"}


def random_orders(found):
    """What chance does, of what `against_chance` found."""
    return (f"random orders: 95 % above {found['chance']:.2f} (p = {found['p']:.2g}; < .05 in "
            f"{found['single']})")


def by_layer(one):
    """The mean of what two heads do beyond the two, over the mean of one alone: (of pairs in a
    layer, of pairs in two layers); None for a kind of which there is no pair."""
    layers = np.array([layer for layer, _ in one["heads"]])
    pairs, n = np.array(one["pairs"]), len(layers)
    same = (layers[:, None] == layers) & ~np.eye(n, dtype=bool)
    other = layers[:, None] != layers
    alone = fmean(one["alone"])
    return tuple(float(pairs[where].mean() / alone) if where.any() else None
                 for where in (same, other))


def of_pairs(models):
    """What two heads cost beyond the two: a Claim, for information, for each kind of pair."""
    kinds = zip(("a layer", "different layers"), zip(*map(by_layer, models), strict=True),
                strict=True)
    return [over_seeds(f"… two heads of {kind} cost beyond their own, over one's cost", values)
            for kind, values in kinds if None not in values]


def repaired(repair):
    """How many heads cost less than their own words, of how many."""
    less = [total < direct for one in repair
            for total, direct in zip(one["total"], one["direct"], strict=True)]
    return f"{sum(less)} of {len(less)}"


# A model whose circuit is known


def of_circuits(models, texts, tested):
    """The claims on models with an induction circuit; beside them, the facts of those of text."""
    worst = [min(one["auroc"][:3] + one["auroc_planted"][:3]) for one in models]
    untrained = fmean(min(one["auroc_untrained"][:3]) for one in models)
    luck = math.prod(1 / math.comb(sum(one["truth"]) + len(one["outside"]), sum(one["truth"]))
                     for one in models)
    dead, series = [one["dead"] for one in models], [series_share(one) for one in models]
    whole = [one["pruning"]["curves"]["mean"][-1] for one in models]
    left = [one["outside_cost"] / all_cost for one, all_cost in zip(models, whole, strict=True)]
    others = [fmean(one["other_costs"]) / all_cost
              for one, all_cost in zip(models, whole, strict=True)]
    return [
        over_seeds("induction: AUROC of the worst ablation, the circuit against what is outside",
                   worst, verdict(tested, min(worst) == 1), mark=1.0,
                   control=f"untrained {untrained:.2f}; all right by luck: {luck:.2g}"),
        *of_gradients(models, texts, tested),
        over_seeds("… a planted dead head: the most that a method says of it, on any text (nats)",
                   dead, verdict(True, max(dead) == 0), control="exactly 0", mark=0.0),
        over_seeds("… all pruned that is neither circuit nor spare: of what all heads cost", left,
                   verdict(tested, max(left) <= LEFT and max(left) < min(others)), mark=LEFT,
                   control=f"as many others: {fmean(others):.2f} on average"),
        over_seeds("… in series: of the smaller single cost, what both together do not cost",
                   series, verdict(tested, min(series) >= 0.5),
                   control="0, were they independent", mark=0.5),
        *in_parallel(models, tested), *of_repair(models, tested),
        over_seeds("… the induction head's cost by the mean, over its cost by zero",
                   [mean_over_zero(one, one["induction"]) for one in models],
                   control="the previous-token head's: "
                   f"{fmean(mean_over_zero(one, one['previous']) for one in models):.2f}"),
    ]


def of_gradients(models, texts, tested):
    """The claims on the gradient: at the model's own z, where it is flat, and along the way to
    0."""
    along = [one["auroc_along"] for one in models]
    flat = [one["slope"][one["previous"]] / one["importance"][0][one["previous"]]
            for one in models]
    on_text = fmean(sum(one["slope"]) / sum(one["importance"][0]) for one in texts)
    return [
        over_seeds("… of the gradient", [one["auroc"][3] for one in models],
                   control="luck where it is flat, as the next line says"),
        over_seeds("… the gradient's size for the previous-token head, over the cost by zero",
                   flat, verdict(tested, max(flat) < LEFT), mark=LEFT,
                   control=f"less than {LEFT:g}; all heads of the model of text: {on_text:.2f}"),
        over_seeds("… of the gradient along the way to z = 0", along,
                   control="no evidence of its own: a text's mean over the way is its cost by "
                   "zero"),
    ]


def of_repair(models, tested):
    """The claims on where the effects of the circuit's two heads come from."""
    def share(part, head):
        return [one["repair"][part][one[head]] / one["repair"]["total"][one[head]]
                for one in models]

    words = share("direct", "previous")
    return [
        over_seeds("… the previous-token head's own words (direct / total)", words,
                   verdict(tested, max(words) <= LEFT), mark=LEFT,
                   control=f"the induction head's: {fmean(share('direct', 'induction')):.2f}"),
        over_seeds("… what it costs because later heads look elsewhere (by_patterns / total)",
                   share("by_patterns", "previous"),
                   control="the induction head's, with none later: "
                   f"{max(map(abs, share('by_patterns', 'induction'))):.0f}"),
    ]


def mean_over_zero(one, head):
    """What a head costs by mean ablation over what it costs by zero ablation."""
    by = dict(zip(METHODS, one["importance"], strict=True))
    return by["mean"][head] / by["zero"][head]


def series_share(one):
    """Of the smaller of two single costs, what is saved where both are removed: 1 where the second
    of two heads in series costs nothing more."""
    i, j = one["previous"], one["induction"]
    return -one["pairs"][i][j] / min(one["alone"][i], one["alone"][j])


def in_parallel(models, tested):
    """The claim on the two best induction heads, where there are two."""
    pairs = [(one["pairs"][one["induction"]][one["spare"]], one["alone"][one["spare"]])
             for one in models if one["spare"] is not None]  # its first spare
    if not pairs:
        return []
    beyond = [both for both, _ in pairs]
    return [over_seeds("… in parallel: two induction heads cost beyond their own (nats)", beyond,
                       verdict(tested, min(beyond) > 0), mark=0.0,
                       control=f"the second alone costs {fmean(alone for _, alone in pairs):.2f}")]


# Figures


def figures(result):
    """{name: Figure} of `run`'s result: of the first model of text, and the first circuit."""
    models = result["models"]
    first = [next(one for one in models if ("truth" in one) == known) for known in (False, True)]
    return {"importance": importance_figure(*first), "pruning": pruning_figure(*first)}


def importance_figure(text, known):
    """Every head by the four methods, each in units of its own largest value, with intervals."""
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    upper, lower = figure.subplots(2)
    rho = text["agreement"]["mean"]
    draw_importance(upper, text, f"{text['name']}: rankings of the heads by two measures have a "
                    f"Spearman of {rho:.2f} on average\n(95 % of shuffled ones stay below "
                    f"{text['agreement']['null_high']:.2f})")
    circuit = " and ".join(name_of(head) for head, true in
                           zip(known["heads"], known["truth"], strict=True) if true)
    right = sum(score == 1 for score in known["auroc"])
    outside = ", ".join(map(name_of, known["outside"]))
    draw_importance(lower, known, f"{known['name']}: {right} of {len(METHODS)} measures put the "
                    f"circuit ({circuit}) above what is outside of it ({outside})")
    figure.legend(*lower.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=4,
                  loc="outside lower center")
    return figure


def name_of(head):
    """A head as people write it: layer.head."""
    return ".".join(map(str, head))


def draw_importance(axes, one, title):
    """Dots with intervals over texts, four for each head."""
    bare_axes(axes, title, "head (layer.head)", "importance, over the\nmethod's largest")
    axes.axhline(0, color="0.8", linewidth=0.8)
    for i, (method, colour) in enumerate(zip(METHODS, COLOURS, strict=False)):
        values, low, high = (np.array(one[key][i]) for key in ("importance", "low", "high"))
        most, x = np.abs(values).max() or 1.0, np.arange(len(values)) + 0.15 * (i - 1.5)
        axes.vlines(x, low / most, high / most, color=colour, linewidth=1.2)
        axes.plot(x, values / most, "o", color=colour, markersize=5, label=method)
    axes.set_xticks(range(len(one["heads"])), [name_of(head) for head in one["heads"]])


def pruning_figure(text, known):
    """The loss's rise over heads removed, by each ranking, against the band of random orders."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    half = len(text["heads"]) // 2
    ours = max(text["pruning"]["curves"][method][half] for method in METHODS)
    chance = float(np.median([row[half] for row in text["pruning"]["random"]]))
    draw_pruning(left, text, f"{text['name']}: the {half} least heads of {2 * half}\ncost at most "
                 f"{ours:.2f} nats, {half} at random {chance:.2f}")
    whole = known["pruning"]["curves"]["mean"][-1]
    draw_pruning(right, known, f"{known['name']}: what is outside of the circuit\ncosts "
                 f"{known['outside_cost']:.2f} nats, all heads {whole:.1f}")
    left.legend(frameon=False, fontsize=9)
    return figure


def draw_pruning(axes, one, title):
    """One line a method, and where nine in ten random orders lie."""
    bare_axes(axes, title, "heads removed, least important first",
              "rise of the loss (nats/token)")
    random = np.array(one["pruning"]["random"])
    low, middle, high = np.quantile(random, [0.05, 0.5, 0.95], axis=0)
    n = np.arange(random.shape[1])
    axes.fill_between(n, low, high, color="0.88", label=f"{len(random)} random orders, 5 to 95 %")
    axes.plot(n, middle, color="0.5", linewidth=1, label="their median")
    styles = ("-", "--", "-.", ":")
    for method, colour, style in zip(METHODS, COLOURS, styles, strict=False):
        axes.plot(n, one["pruning"]["curves"][method], style, color=colour, marker="o",
                  markersize=4, linewidth=1.2, label=f"by {method}")
    axes.set_xticks(n)
