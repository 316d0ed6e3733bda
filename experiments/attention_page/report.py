"""What is claimed of patterns and effects: the table's lines, and the figures.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Prerequisites: experiments/attention_page/measure.py, experiments/attention_page/page.py
Next: mlp.py
Source: Jain & Wallace 2019 (attention is not explanation)
"""

import numpy as np
import torch
from matplotlib.figure import Figure

import plotting
from experiments.attention_page.measure import (
    RANKERS,
    measure_wired_decoys,
    rank_correlation,
    score_wired_heads,
    sharper_head_share,
    uniform_pattern,
)
from experiments.attention_page.page import unpack_patterns
from experiments.common import claim
from metrics import auroc, prev_token_score

NO_EFFECT = 1e-4  # nats: LayerNorm sees, a little, what a head writes where nobody reads
MARKERS = "os^Dv<>p*hXd"  # one a layer

# Claims


def all_claims(views, ranking, judged=True):
    """[Claim] of some SubjectViews and their HeadRanking, which may be None. judged: whether those
    on what training makes are claimed, or only reported."""
    sharper = claim(
        "a head sharper than the most needed one: its effect, as a share of that one's",
        [sharper_head_share(view) for view in views], below=0.5, judged=judged,
        control="less than half")
    return [*watcher_claims(views, judged), *ranking_claims(ranking, judged), sharper,
            *silenced_claims(views), *wired_claims()]


def watcher_claims(views, judged):
    """[Claim]: the best previous-token head is one; what the loss needs of it alone is reported,
    since several share the work."""
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
              control=f"even attention {even:.3f}; untrained, the best {fresh:.3f}"),
        claim("what the loss rises by without it (nats a token)", float(np.mean(needed)),
              interval=interval, control=f"the median head {typical:.3f}"),
    ]


def ranking_claims(ranking, judged):
    """[Claim]: looking at the token before does better than chance, sharpness ranks heads worse
    than ablation on other texts does; and whether what is written ranks them better than sharpness.
    ranking: a HeadRanking, or None."""
    if ranking is None:
        return []
    claims = [looking_back_claim(ranking, judged)]

    known, least, _ = ranking.between_halves
    for name, what in RANKERS.items():
        value, low, high = ranking.by_score[name]
        claims.append(claim(
            f"rank correlation with the effect, over heads: {what}", value, interval=(low, high),
            holds=high < least if name == "sharpness" else None, judged=judged,
            control=f"effects on one half of the texts with those on the other: {known:.2f}"))

    value, *interval = ranking.written_over_sharpness
    claims.append(claim("what is written ranks them better than sharpness, by", value,
                        interval=interval, control="0: no better"))
    return claims


def looking_back_claim(ranking, judged):
    """The Claim that heads are needed the more, the more they look at the token before."""
    return claim("correlation with the effect, over heads: the previous-token score",
                 ranking.looking_back, holds=ranking.p < 0.05, judged=judged,
                 control=f"95 % of shuffled: below {ranking.by_chance:.2f} (p = {ranking.p:.2g})")


def silenced_claims(views):
    """[Claim]: a head that can't write keeps its pattern, and does nothing."""
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
    """[Claim] of models whose truth is known, because they were wired by hand."""
    decoyed = measure_wired_decoys()
    area = {name: [auroc(values[name], needed) for values, needed in decoyed]
            for name in ("effect", "written", "sharpness", "previous token")}
    idle = [values["effect"][~needed].abs().max().item() for values, needed in decoyed]
    live = np.mean([values["effect"][needed].item() for values, needed in decoyed])
    others = ", ".join(f"{name} {np.mean(area[name]):.2f}" for name in list(area)[1:])
    return [
        claim("wired by hand: previous-token score", score_wired_heads(), above=0.999,
              control="1 by wiring"),
        claim("wired, three idle heads with prettier patterns: AUROC of the effect",
              area["effect"], between=(1, 1), control=f"AUROC by {others}"),
        claim("the same: largest effect of an idle head (nats a token)", idle, below=NO_EFFECT,
              control=f"the needed one's {live:.2f}"),
    ]


def summarise(views, ranking, claims):
    """What was found, in a few sentences."""
    models = "one model" if len(views) == 1 else f"{len(views)} models"
    looks = np.mean([view.of_heads("previous token").max().item() for view in views])
    needed = np.mean([view.effects.mean[view.watcher].item() for view in views])
    sentences = [f"In {models}, the head that looks most at the token before gives it {looks:.2f} "
                 "of its attention, and without this head the loss rises by "
                 f"{needed:.2g} nats a token."]
    if ranking is not None:
        looking_back = ranking.looking_back.mean().item()
        sentences.append(
            "How much the loss rises without a head goes with how much the head looks back "
            f"(correlation {looking_back:.2f}) and with how sharp its pattern is (rank correlation "
            f"{ranking.by_score['sharpness'][0]:.2f}), where its effect on other texts would give "
            f"{ranking.between_halves[0]:.2f}.")
    n_failed = sum(each.holds is False for each in claims)
    sentences.append("No claim fails." if n_failed == 0
                     else f"{n_failed} of {len(claims)} claims fail.")
    return " ".join(sentences) + " The page shows each pattern beside its effect."


# Figures


LARGE = 5.5  # inches, the side of the pattern that is shown with its tokens
CLIPPED = 99  # percentile of what is written from which on cells are equally dark


def pattern_figure(page, weighed=False):
    """The pattern of the head that is needed most, large and with its tokens, beside all patterns,
    a layer a row; above each, what the loss rises by without the head. weighed: of what is written,
    as a share of the stream."""
    heads = page["heads"]
    patterns = unpack_patterns(page)
    unit = "attention"
    scale = {"cmap": "Blues", "vmin": 0, "vmax": 1}
    if weighed:
        written = np.array([head["written"] for head in heads])  # [head, key_pos]
        stream = np.array(page["stream"])[[head["layer"] for head in heads]]  # [head, query_pos]
        patterns = patterns * written[:, None] / stream[:, :, None]
        # a few cells are far larger than the others, which would all look white
        most = np.percentile(patterns[patterns > 0], CLIPPED) if patterns.any() else 1.0
        unit = f"{RANKERS['written']}; darkest from {most:.2g} on"
        scale = {"cmap": "Blues", "vmin": 0, "vmax": most}
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
    """A sentence: which head comes first by a score, and which by its effect."""
    first = max(heads, key=lambda head: head["scores"][score][1])
    needed = max(heads, key=lambda head: head["effect"])
    what = "has the sharpest pattern" if score == "sharpness" else "writes most"
    if first is needed:
        return f"Head {first['name']} {what} and is needed most: {first['effect']:.3f} nats a token"
    return (f"Head {first['name']} {what} and costs {first['effect']:.3f} nats a token; head "
            f"{needed['name']} is needed most: {needed['effect']:.3f}")


def importance_figure(models):
    """What the loss rises by without a head against two things that its pattern shows.

    models: {name: the heads of each, as `describe_heads` gives them}.
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
