"""Report the head importance experiment: its claims, its summary and its figures.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: experiments/importance/measure.py
Next: experiments/head_importance.py
Source: Michel et al. 2019 (pruning curves)
"""

import math
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure

from activation_cache import head_label
from experiments.common import add_control, claim
from experiments.importance.measure import ABLATIONS, METHODS
from metrics import permutation_pvalue
from plotting import COLOURS, bare_axes

LEAST_LEAD = 1.0  # nats, of the 4.6 of a uniform guess; decided before it was measured
LEFT = 0.1  # the largest share of the whole that counts as nearly nothing


def importance_claims(models, judged=True, own=True):
    """[Claim] about the models of text, then about those with a known circuit.

    models: what `measure_subject` returned for each. judged: False leaves open every claim that
    depends on how well a model was trained. own: whether the models of text were trained here; for
    other models the numbers are reported without a verdict.
    """
    texts, known = split_by_truth(models)
    return [*text_claims(texts, judged and own), *circuit_claims(known, texts, judged)]


def split_by_truth(models):
    """(models of text, models whose circuit is known)."""
    return ([one for one in models if "truth" not in one],
            [one for one in models if "truth" in one])


# A model of text


def text_claims(models, judged):
    """The claims about models of text, whose circuit is not known."""
    agreements = [one["agreement"] for one in models]
    null = max(agreement["null_high"] for agreement in agreements)
    zero_gradient = [agreement["pairs"]["zero, gradient"] for agreement in agreements]
    lowest = min(low for _, low, _ in zero_gradient)
    highest = max(high for _, _, high in zero_gradient)

    ablations = compare_with_chance(models, ABLATIONS)
    gradient = compare_with_chance(models, ("gradient",))
    summed = [sum(one["alone"]) / one["pruning"]["curves"]["mean"][-1] for one in models]
    repair = [one["repair"] for one in models]
    return [
        claim(f"{name_of_text(models)}: Spearman of two methods, mean over the "
              f"{len(agreements[0]['pairs'])} pairs",
              [agreement["mean"] for agreement in agreements],
              p=max(agreement["p"] for agreement in agreements), judged=judged, mark=null,
              control=f"95 % of shuffled heads: below {null:.2f}"),
        claim("… of zero ablation and the gradient", [rho for rho, _, _ in zero_gradient],
              control=f"95 % CI over texts: {lowest:.2f} to {highest:.2f}"),
        claim("… cost of pruning up to half by the worst ablation / by a random order, on average",
              ablations["worst"], p=ablations["p"], judged=judged,
              mark=ablations["chance"], control=describe_chance(ablations)),
        claim("… the same, pruned up to half by the gradient", gradient["worst"],
              control=describe_chance(gradient)),
        claim("… sum of the costs of single heads / cost of all heads together", summed,
              control="1 for independent heads"),
        *pair_claims(models),
        claim("… direct effect of a head / total effect of its removal",
              [sum(one["direct"]) / sum(one["total"]) for one in repair],
              control=f"heads whose total effect is the smaller: {count_repaired(repair)}"),
    ]


def name_of_text(models):
    """The name of the text that models were trained on, or of the run."""
    return models[0]["name"].split(", seed")[0]


def compare_with_chance(models, methods):
    """The areas under the methods' pruning curves, compared with those of random orders: a dict.

    worst: the largest area of any method, divided by the mean of random orders, for each model.
    chance: what 95 % of random orders lie above, in the same unit; both are NaN where random orders
    cost nothing on average, which has no multiples. p: how often random orders, one per model, cost
    as little as the worst method, by the mean over models of the difference to the random mean (a
    difference keeps its meaning where the random mean is negative). single: in how many cases the
    p of one model and method is below 0.05.
    """
    own = torch.tensor([[one["pruning"]["areas"][method] for method in methods]
                        for one in models])  # [model, method]
    null = torch.tensor([one["pruning"]["random_areas"] for one in models])  # [model, order]
    chance = null.mean(1, keepdim=True)  # [model, 1]

    saved = (chance - own).mean(0)  # [method], nats
    saved_by_order = (chance - null).mean(0)  # [order]
    unit = torch.where(chance > 0, chance, math.nan)
    single = [one["pruning"]["p"][method] < 0.05 for one in models for method in methods]
    return {"worst": (own / unit).max(1).values.tolist(),
            "p": permutation_pvalue(saved.min(), saved_by_order).item(),
            "chance": (null / unit).mean(0).quantile(0.05).item(),
            "single": f"{sum(single)} of {len(single)}"}


def describe_chance(compared):
    """The control of a claim about pruning, from what `compare_with_chance` returned."""
    return (f"random orders: 95 % above {compared['chance']:.2f} (p = {compared['p']:.2g}; "
            f"below 0.05 in {compared['single']})")


def pair_costs_by_layer(one):
    """The mean extra cost of removing two heads together, divided by the mean cost of one head.

    Returns (for pairs in one layer, for pairs in two layers); None if there is no such pair. The
    extra cost is that of the pair minus those of its two heads.
    """
    layers = np.array([layer for layer, _ in one["heads"]])
    pairs = np.array(one["pairs"])
    in_one = (layers[:, None] == layers) & ~np.eye(len(layers), dtype=bool)
    in_two = layers[:, None] != layers
    alone = fmean(one["alone"])
    return tuple(float(pairs[chosen].mean() / alone) if chosen.any() else None
                 for chosen in (in_one, in_two))


def pair_claims(models):
    """A Claim, for information, on the extra cost of each kind of pair of heads."""
    in_one, in_two = zip(*map(pair_costs_by_layer, models), strict=True)
    claims = []
    for kind, costs in (("a layer", in_one), ("different layers", in_two)):
        if None not in costs:
            claims.append(claim(f"… extra cost of removing two heads of {kind} / cost of one",
                                costs))
    return claims


def count_repaired(repair):
    """How many heads have a total effect below their direct effect, such as "3 of 36"."""
    less = [total < direct for one in repair
            for total, direct in zip(one["total"], one["direct"], strict=True)]
    return f"{sum(less)} of {len(less)}"


# A model whose circuit is known


def circuit_claims(models, texts, judged):
    """The claims about models with an induction circuit. texts: models of text, for contrast."""
    untrained = fmean(min(one["auroc_untrained"][:3]) for one in models)
    luck = math.prod(1 / math.comb(sum(one["truth"]) + len(one["outside"]), sum(one["truth"]))
                     for one in models)

    all_costs = [one["pruning"]["curves"]["mean"][-1] for one in models]
    left = [one["outside_cost"] / cost for one, cost in zip(models, all_costs, strict=True)]
    others = [fmean(one["other_costs"]) / cost
              for one, cost in zip(models, all_costs, strict=True)]
    previous = fmean(mean_over_zero(one, one["previous"]) for one in models)
    fresh = fmean(min(one["lead_untrained"]) for one in models)
    return [
        add_control(
            claim("induction: cost of the cheaper part of the circuit (spares with it) minus that "
                  "of the costliest other head, by the worst ablation (nats)",
                  [min(one["lead"]) for one in models], above=LEAST_LEAD, judged=judged),
            f"untrained {fresh:.2g}"),
        claim("… AUROC of single heads by the worst ablation; a spare hides the induction head",
              [worst_auroc(one) for one in models],
              control=f"untrained {untrained:.2f}; chance of 1 in all models: {luck:.2g}"),
        *gradient_claims(models, texts, judged),
        claim("… a planted dead head: its largest score by any method, on any text (nats)",
              [one["dead"] for one in models], between=(0, 0), control="exactly 0"),
        add_control(
            claim("… cost of pruning all heads outside of circuit and spares / of all heads", left,
                  below=LEFT, holds=max(left) < min(others), judged=judged),
            f"as many other heads: {fmean(others):.2f} on average"),
        add_control(
            claim("… two heads in series: share of the smaller cost that removing both saves",
                  [series_share(one) for one in models], above=0.5, judged=judged),
            "0 for independent heads"),
        *parallel_claims(models, judged),
        *repair_claims(models, judged),
        claim("… cost of the induction head by mean ablation / by zero ablation",
              [mean_over_zero(one, one["induction"]) for one in models],
              control=f"previous-token head: {previous:.2f}"),
    ]


def worst_auroc(one):
    """The lowest AUROC of any ablation, in the model and in its copy with a planted dead head."""
    return min(one["auroc"][:3] + one["auroc_planted"][:3])


def gradient_claims(models, texts, judged):
    """The claims about the gradient: at the model's own z, where it is flat, and on the path to
    z = 0."""
    flat = [one["slope"][one["previous"]] / one["importance"][0][one["previous"]]
            for one in models]
    on_text = fmean(sum(one["slope"]) / sum(one["importance"][0]) for one in texts)
    return [
        claim("… of the gradient", [one["auroc"][3] for one in models],
              control="luck, because the gradient is flat (next line)"),
        add_control(
            claim("… gradient of the previous-token head / its cost by zero ablation", flat,
                  below=LEFT, judged=judged),
            f"all heads of the models of text: {on_text:.2f}"),
        claim("… of the gradient along the path to z = 0", [one["auroc_along"] for one in models],
              control="no new evidence: its mean over the path is the cost by zero"),
    ]


def repair_claims(models, judged):
    """The claims about where the effects of the circuit's two heads come from."""
    def shares(part, head):
        return [one["repair"][part][one[head]] / one["repair"]["total"][one[head]]
                for one in models]

    none_later = max(map(abs, shares("by_patterns", "induction")))
    return [
        add_control(
            claim("… direct effect of the previous-token head / total effect",
                  shares("direct", "previous"), below=LEFT, judged=judged),
            f"induction head: {fmean(shares('direct', 'induction')):.2f}"),
        claim("… its effect through the patterns of later heads / total effect",
              shares("by_patterns", "previous"),
              control=f"induction head, with none later: {none_later:.0f}"),
    ]


def mean_over_zero(one, head):
    """The cost of a head by mean ablation divided by its cost by zero ablation."""
    by_method = dict(zip(METHODS, one["importance"], strict=True))
    return by_method["mean"][head] / by_method["zero"][head]


def series_share(one):
    """How much removing both circuit heads saves against removing them separately, as a share of
    the smaller cost. It is 1 if the second of two heads in series costs nothing more."""
    i, j = one["previous"], one["induction"]
    return -one["pairs"][i][j] / min(one["alone"][i], one["alone"][j])


def parallel_claims(models, judged):
    """The claim about the induction head and its first spare, if there is one."""
    with_spare = [one for one in models if one["spare"] is not None]
    if not with_spare:
        return []
    beyond = [one["pairs"][one["induction"]][one["spare"]] for one in with_spare]
    alone = fmean(one["alone"][one["spare"]] for one in with_spare)
    return [add_control(
        claim("… two induction heads in parallel: extra cost of removing both (nats)", beyond,
              above=0, judged=judged),
        f"the second alone costs {alone:.2f}")]


# The summary


def describe_findings(models):
    """Three sentences that say what was found. models: as in `importance_claims`."""
    texts, known = split_by_truth(models)
    rho = fmean(one["agreement"]["mean"] for one in texts)
    null = max(one["agreement"]["null_high"] for one in texts)
    ablation = fmean(compare_with_chance(texts, ABLATIONS)["worst"])
    gradient = fmean(compare_with_chance(texts, ("gradient",))["worst"])
    found = sum(worst_auroc(one) == 1 for one in known)
    by_gradient = sum(one["auroc"][3] == 1 for one in known)
    top = ", ".join(f"{most_important_head(one)} ({seed_of(one)})" for one in texts)
    circuits = ", ".join(" and ".join(circuit_heads(one)) for one in known)
    return (f"{name_of_text(texts)}: the head that matters most, by mean ablation, is {top}. The "
            f"rankings of two measures have a Spearman correlation of {rho:.2f} on average "
            f"(shuffled heads: below {null:.2f}), and pruning up to half of the heads by the worst "
            f"ablation costs {ablation:.2f} times as much as in a random order, by the gradient "
            f"{gradient:.2f} times. Where the circuit is known, every ablation ranks its "
            f"heads highest in {found} of {len(known)} models ({circuits}), and the gradient in "
            f"{by_gradient} (importance.png, pruning.png).")


def most_important_head(one):
    """The label of the head with the largest effect by mean ablation."""
    effects = one["importance"][METHODS.index("mean")]
    return head_label(*one["heads"][effects.index(max(effects))])


def circuit_heads(one):
    """The labels of the heads of a known circuit, a list."""
    return [head_label(*head) for head, is_true in zip(one["heads"], one["truth"], strict=True)
            if is_true]


def seed_of(one):
    """The last part of a model's name, such as "seed 0"; all of it for a run."""
    return one["name"].split(", ")[-1]


# Figures


def importance_figure(text, known):
    """The Figure of every head by the four methods, each scaled to its own largest value.

    text, known: what `measure_subject` returned for a model of text, and for one with a circuit.
    """
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    upper, lower = figure.subplots(2)

    rho, null = text["agreement"]["mean"], text["agreement"]["null_high"]
    draw_importance(upper, text, f"{text['name']}: rankings of the heads by two measures have a "
                    f"Spearman of {rho:.2f} on average\n(95 % of shuffled ones stay below "
                    f"{null:.2f})")

    circuit = " and ".join(circuit_heads(known))
    outside = ", ".join(head_label(*head) for head in known["outside"])
    n_right = sum(score == 1 for score in known["auroc"])
    draw_importance(lower, known, f"{known['name']}: {n_right} of {len(METHODS)} measures put the "
                    f"circuit ({circuit}) above what is outside of it ({outside})")

    figure.legend(*lower.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=4,
                  loc="outside lower center")
    return figure


def draw_importance(axes, one, title):
    """Draw four dots for each head, with intervals over texts."""
    bare_axes(axes, title, "head", "importance, over the\nmethod's largest")
    axes.axhline(0, color="0.8", linewidth=0.8)
    for i, (method, colour) in enumerate(zip(METHODS, COLOURS, strict=False)):
        values, low, high = (np.array(one[key][i]) for key in ("importance", "low", "high"))
        largest = np.abs(values).max() or 1.0
        x = np.arange(len(values)) + 0.15 * (i - 1.5)
        axes.vlines(x, low / largest, high / largest, color=colour, linewidth=1.2)
        axes.plot(x, values / largest, "o", color=colour, markersize=5, label=method)
    axes.set_xticks(range(len(one["heads"])), [head_label(*head) for head in one["heads"]])


def pruning_figure(text, known):
    """The Figure of the rise of the loss over the number of heads removed: a row for each model,
    and in it a panel for each ranking, beside random orders.

    text, known: as in `importance_figure`.
    """
    figure = Figure(figsize=(10, 6), layout="constrained")
    upper, lower = figure.subfigures(2, 1)

    half = len(text["heads"]) // 2
    most = max(text["pruning"]["curves"][method][half] for method in METHODS)
    chance = float(np.median([row[half] for row in text["pruning"]["random"]]))
    draw_pruning(upper, text, f"{text['name']}: without the {half} least important heads of "
                 f"{len(text['heads'])} the loss rises by\nat most {most:.2f} nats, without {half} "
                 f"random ones by {chance:.2f}")

    all_cost = known["pruning"]["curves"]["mean"][-1]
    draw_pruning(lower, known, f"{known['name']}: without the heads outside of the circuit "
                 f"the loss rises by {known['outside_cost']:.2f} nats,\nwithout all heads by "
                 f"{all_cost:.1f}")
    figure.legend(*upper.axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3,
                  loc="outside lower center")
    return figure


def draw_pruning(part, one, title):
    """Draw a panel for each method: its line, and the band that holds nine in ten random orders.

    part: a subfigure.
    """
    part.suptitle(title, x=0.01, ha="left", fontsize=11)
    part.supxlabel("heads removed, least important first", fontsize=10)
    random = np.array(one["pruning"]["random"])
    low, median, high = np.quantile(random, [0.05, 0.5, 0.95], axis=0)
    n_removed = np.arange(random.shape[1])

    for axes, method in zip(part.subplots(1, len(METHODS), sharey=True), METHODS, strict=True):
        kind = "gradient" if method == "gradient" else f"{method} ablation"
        bare_axes(axes, f"ranked by {kind}", "", "")
        axes.fill_between(n_removed, low, high, color="0.88",
                          label=f"{len(random)} random orders, 5 to 95 %")
        axes.plot(n_removed, median, color="0.5", linewidth=1, linestyle="--",
                  label="their median")
        axes.plot(n_removed, one["pruning"]["curves"][method], color=COLOURS[0], marker="o",
                  markersize=4, linewidth=1.5, label="in the order of the ranking")
        axes.title.set_fontsize(10)
        axes.set_xticks(n_removed[::2] if len(n_removed) > 8 else n_removed)
    part.axes[0].set_ylabel("rise of the loss\n(nats/token)")
