"""Report the attention experiment: its claims, its summary and its figures.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Prerequisites: experiments/attention_page/measure.py, experiments/attention_page/page.py
Next: experiments/attention_visualization.py
Source: Jain & Wallace 2019 (attention is not explanation)
"""

import numpy as np
import torch
from matplotlib.figure import Figure

import plotting
from activation_cache import head_label
from experiments.attention_page.measure import (
    RANKERS,
    measure_wired_decoys,
    rank_correlation,
    score_wired_heads,
    sharper_head_share,
    uniform_pattern,
)
from experiments.attention_page.page import unpack_patterns, written_shares
from experiments.common import claim
from metrics import auroc, prev_token_score

NO_EFFECT = 1e-4  # nats: what an unread head writes still changes LayerNorm's scale a little
MARKERS = "os^Dv<>p*hXd"  # one for each layer

# Claims


def all_claims(views, ranking, judged=True):
    """[Claim] about some SubjectViews and their HeadRanking, which may be None.

    judged: False leaves open the claims that depend on training.
    """
    # Not judged: as the smallest of several heads, it is small in most untrained models too.
    sharper = claim(
        "smallest effect of a head sharper than the most needed one / that one's effect",
        [sharper_head_share(view) for view in views], control="1 if sharp heads were needed")
    return [*watcher_claims(views, judged), *ranking_claims(ranking, judged), sharper,
            *silenced_claims(views), *wired_claims()]


def watcher_claims(views, judged):
    """[Claim]: a previous-token head forms. Its own effect is only reported, because several heads
    share the work."""
    best = [view.of_heads("previous token").max().item() for view in views]
    even = prev_token_score(uniform_pattern(views[0].subject.held_out.shape[1])).item()
    fresh = max(view.untrained for view in views)

    needed = [view.effects.mean[view.watcher].item() for view in views]
    typical = np.mean([view.of_heads("effect").median().item() for view in views])
    if len(views) > 1:
        interval = min(needed), max(needed)
    else:
        low, high = views[0].effects.ci()
        interval = low[views[0].watcher].item(), high[views[0].watcher].item()

    return [
        claim("the best previous-token head: its score on held-out texts", best,
              above=2 * max(even, fresh), judged=judged,
              control=f"even attention {even:.3f}; best head of an untrained model {fresh:.3f}"),
        claim("rise of the loss without this head (nats per token)", float(np.mean(needed)),
              interval=interval, control=f"the median head {typical:.3f}"),
    ]


def ranking_claims(ranking, judged):
    """[Claim] about scores as a guide to effects. ranking: a HeadRanking, or None.

    The previous-token score predicts effects better than chance; sharpness ranks heads worse than
    ablation on other texts does. Whether what is written ranks them better is only reported.
    """
    if ranking is None:
        return []
    claims = [looking_back_claim(ranking, judged)]

    known, least, _ = ranking.between_halves
    for name, what in RANKERS.items():
        value, low, high = ranking.by_score[name]
        claims.append(claim(
            f"rank correlation with the effect, over heads: {what}", value, interval=(low, high),
            holds=high < least if name == "sharpness" else None, judged=judged,
            control=f"effects on two halves of the texts: {known:.2f}"))

    value, *interval = ranking.written_over_sharpness
    claims.append(claim("rank correlation of what is written minus that of sharpness", value,
                        interval=interval, control="0: no better"))
    return claims


def looking_back_claim(ranking, judged):
    """The Claim that heads with a higher previous-token score have a larger effect."""
    return claim("correlation with the effect, over heads: the previous-token score",
                 ranking.looking_back, p=ranking.p, judged=judged,
                 control=f"95 % of shuffled heads: below {ranking.by_chance:.2f} "
                         f"(p = {ranking.p:.2g})")


def silenced_claims(views):
    """[Claim]: a head whose W_O is set to 0 keeps its pattern and has no effect."""
    changed, written, effect = (max(column) for column in
                                zip(*(view.silenced for view in views), strict=True))
    before = np.mean([view.effects.mean[view.watcher].item() for view in views])
    return [
        claim("its W_O set to 0: largest change of its pattern", changed,
              control="a pattern needs no W_O"),
        claim("its W_O set to 0: largest ‖v W_O‖", written, control="it writes nothing"),
        claim("its W_O set to 0: its effect", effect, between=(0, 0),
              control=f"with its own W_O {before:.3f}"),
    ]


def wired_claims():
    """[Claim] about models that were wired by hand, so that the truth is known."""
    decoyed = measure_wired_decoys()
    area = {name: [auroc(values[name], needed) for values, needed in decoyed]
            for name in ("effect", "written", "sharpness", "previous token")}
    idle = [values["effect"][~needed].abs().max().item() for values, needed in decoyed]
    live = np.mean([values["effect"][needed].item() for values, needed in decoyed])
    others = ", ".join(f"{name} {np.mean(area[name]):.2f}" for name in list(area)[1:])
    return [
        claim("wired by hand: previous-token score", score_wired_heads(), above=0.999,
              control="1 by wiring"),
        claim("wired, three idle heads with sharper patterns: AUROC of the effect",
              area["effect"], between=(1, 1), control=f"AUROC by {others}"),
        claim("… largest effect of an idle head (nats per token)", idle, below=NO_EFFECT,
              control=f"the needed head {live:.2f}"),
    ]


def summarise(views, ranking, claims):
    """A few sentences that say what was found."""
    models = "one model" if len(views) == 1 else f"{len(views)} models"
    looks = np.mean([view.of_heads("previous token").max().item() for view in views])
    needed = np.mean([view.effects.mean[view.watcher].item() for view in views])
    watchers = label_heads(views, [view.watcher for view in views])
    most_needed = label_heads(views, [
        divmod(view.of_heads("effect").argmax().item(), view.subject.model.cfg.n_heads)
        for view in views])
    sentences = [f"The best previous-token head is {watchers}. In {models}, it pays {looks:.2f} of "
                 "its attention to the token before, and removing it raises the loss by "
                 f"{needed:.2g} nats per token; the loss needs {most_needed} most."]
    if ranking is not None:
        looking_back = ranking.looking_back.mean().item()
        value, low, high = ranking.by_score["sharpness"]
        sentences.append(
            "Over all heads, sharpness and effect have a rank correlation of "
            f"{value:.2f} ({low:.2f} to {high:.2f}), and effects on two halves of the texts one of "
            f"{ranking.between_halves[0]:.2f}; the correlation of the previous-token score with "
            f"the effect is {looking_back:.2f}.")
    n_failed = sum(each.holds is False for each in claims)
    sentences.append("No claim fails." if n_failed == 0
                     else f"{n_failed} of {len(claims)} claims fail.")

    return " ".join(sentences)


def label_heads(views, heads):
    """The labels of one head (layer, head) of each model, such as "L0H1 with seed 0, L0H2 with
    seed 1"; without the model's name if there is only one."""
    labels = [head_label(*head) for head in heads]
    if len(views) == 1:
        return labels[0]
    return ", ".join(f"{label} with {view.subject.name}"
                     for view, label in zip(views, labels, strict=True))


# Figures


LARGE = 5.5  # inches, the side of the pattern that is shown with its tokens


def pattern_figure(page, weighed=False):
    """The Figure of all patterns, one row for each layer, beside that of the head that is needed
    most, large and with its tokens. Above each, the rise of the loss without the head. weighed:
    show what is written, as a share of the stream, instead of attention."""
    heads = page["heads"]
    patterns = unpack_patterns(page)
    unit = "attention"
    scale = {"cmap": "Blues", "vmin": 0, "vmax": 1}
    if weighed:
        patterns = written_shares(page)
        full = page["written"]["full"]
        unit = f"{RANKERS['written']}; darkest from {full:.2g} on"
        scale = {"cmap": "Blues", "vmin": 0, "vmax": full}
    future = np.triu(np.ones(patterns.shape[1:], dtype=bool), 1)
    patterns = np.ma.masked_array(patterns, np.broadcast_to(future, patterns.shape))

    n_layers, n_heads = (1 + max(head[key] for head in heads) for key in ("layer", "head"))
    side = max(1.2, min(1.9, 15 / n_heads))  # inches a pattern
    figure = plotting.PlainFigure(figsize=(LARGE + 1.2 + side * n_heads, LARGE + 1.0),
                                  layout="constrained")
    if (side + 0.3) * n_layers > LARGE:
        figure.set_figheight(1.3 + (side + 0.3) * n_layers)
    large, small = figure.subfigures(1, 2, width_ratios=(LARGE, side * n_heads + 1.0))

    # one head, token by token
    needed = max(range(len(heads)), key=lambda number: heads[number]["effect"])
    axes = large.subplots()
    axes.imshow(patterns[needed], **scale)
    plotting.bare_axes(axes, f"{heads[needed]['name']}, the head that is needed most",
                       "key (the token that is looked at)", "query (the token that looks)")
    texts = [plotting.show_spaces(token) for token in page["tokens"]]
    axes.set_xticks(range(len(texts)), texts, fontsize=6, rotation=90)
    axes.set_yticks(range(len(texts)), texts, fontsize=6)

    # all of them
    largest = max(abs(head["effect"]) for head in heads) or 1.0
    grid = small.subplots(n_layers, n_heads, squeeze=False)
    for axes, head, cells in zip(grid.flat, heads, patterns, strict=True):
        image = axes.imshow(cells, **scale)
        axes.set(xticks=[], yticks=[])
        draw_effect(axes, head, largest)

    figure.suptitle(compare_first_heads(heads, "written" if weighed else "sharpness"), x=0.01,
                    ha="left", fontsize=11)
    small.supxlabel("number and bar above a pattern: how much the loss rises without the head "
                    "(nats a token)", fontsize=8)
    small.colorbar(image, ax=grid, shrink=0.5, label=unit)
    return figure


def draw_effect(axes, head, largest):
    """Names a head above its pattern, with its effect on the loss as a number and as a bar."""
    axes.set_title(f"{head['name']}   {head['effect']:+.3f}", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot([0, abs(head["effect"]) / largest], [1.02, 1.02], linewidth=4,
              clip_on=False, color=plotting.COLOURS[1 if head["effect"] > 0 else 3],
              transform=axes.transAxes, solid_capstyle="butt")


def compare_first_heads(heads, score):
    """A sentence that names the first head by a score and the first by its effect."""
    first = max(heads, key=lambda head: head["scores"][score][1])
    needed = max(heads, key=lambda head: head["effect"])
    what = "has the sharpest pattern" if score == "sharpness" else "writes most"
    if first is needed:
        return f"Head {first['name']} {what} and is needed most: {first['effect']:.3f} nats a token"
    return (f"Head {first['name']} {what} and costs {first['effect']:.3f} nats a token; head "
            f"{needed['name']} is needed most: {needed['effect']:.3f}")


def importance_figure(models):
    """The Figure of each head's effect over two scores that its pattern shows.

    models: {name: the heads of each, as `describe_heads` returns them}.
    """
    heads = [head for own in models.values() for head in own]
    effect = torch.tensor([[head["effect"] for head in own] for own in models.values()])
    figure = Figure(figsize=(9, 4), layout="constrained")

    for axes, name in zip(figure.subplots(1, 2, sharey=True), RANKERS, strict=True):
        score = torch.tensor([[head["scores"][name][1] for head in own]
                              for own in models.values()])
        title = f"rank correlation {rank_correlation(score, effect)[0]:.2f}"
        if len(models) > 1:
            title += f", the mean of {len(models)} models"
        plotting.bare_axes(axes, title, RANKERS[name], "")

        for layer in sorted({head["layer"] for head in heads}):
            own = [head for head in heads if head["layer"] == layer]
            x = [head["scores"][name][1] for head in own]
            y = [head["effect"] for head in own]
            below = [head["effect"] - head["low"] for head in own]
            above = [head["high"] - head["effect"] for head in own]
            axes.errorbar(x, y, yerr=[below, above], fmt=MARKERS[layer % 12], markersize=5,
                          linewidth=1, color=plotting.COLOURS[layer % 6], label=f"layer {layer}")
        axes.axhline(0, color="0.2", linewidth=0.8)

    figure.axes[0].set_ylabel("loss without it (nats a token)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"What is seen of {len(heads)} heads, and what the loss rises by without them",
                    x=0.01, ha="left", fontsize=11)
    return figure
