"""Report a study: its claims, its figure, and the result that is written into its card.

Chapter: COURSE_ROADMAP.md, 15 (grokking)
Prerequisites: experiments/cards/model.py
Next: experiments/claim_card.py
Source: none
"""

from statistics import fmean

from matplotlib.figure import Figure

from experiments.cards.model import RESULT, holds, split_result
from experiments.common import add_control, claim
from plotting import COLOURS, bare_axes


def study_claims(card, found):
    """[Claim]: the card's, that its null does not pass, and what else was measured."""
    number, null = card.texts["Number"], found["null"]
    null_passes = all(holds(card.threshold, value) for value in null)
    lines = [
        add_control(claim(number, found["measured"], **card.threshold,
                          reported=f"predicted {card.predicted:g}"),
                    f"null {fmean(null):.3g}"),
        claim("the same for the null, which must not hold for every seed", null,
              holds=not null_passes, control=card.texts["Null"]),
    ]
    for words in found["more"][0] if found["more"] else ():
        lines.append(claim(words, [each[words] for each in found["more"]]))
    return lines


def verdict_of(card, found):
    """REFUTED; HOLDS; or UNDECIDED, if the null passes too, so that the number shows nothing."""
    if not all(holds(card.threshold, value) for value in found["measured"]):
        return "REFUTED"
    null_passes = all(holds(card.threshold, value) for value in found["null"])
    return "UNDECIDED" if null_passes else "HOLDS"


def describe_study(card, found):
    """Two sentences that say what came out."""
    measured, null = fmean(found["measured"]), fmean(found["null"])
    meaning = {
        "HOLDS": "The claim holds for every seed, and the null does not.",
        "REFUTED": "The claim does not hold for every seed.",
        "UNDECIDED": "The null passes too, so the number does not show what was claimed.",
    }[verdict_of(card, found)]
    return (f"Predicted {card.predicted:g}, measured {measured:.3g} "
            f"({min(found['measured']):.3g} to {max(found['measured']):.3g}), null {null:.3g}. "
            f"{meaning}")


def study_figure(card, found):
    """The Figure of all seeds, measured and null, with the threshold and the prediction."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = bare_axes(figure.subplots(), f"{card.name}: {verdict_of(card, found)}",
                     card.texts["Number"], "")
    for y, (name, colour) in enumerate((("measured", COLOURS[0]), ("null", COLOURS[1]))):
        axes.plot(found[name], [y] * len(found[name]), "o", color=colour, alpha=0.7)
    limits = [limit for given in card.threshold.values()
              for limit in (given if isinstance(given, tuple) else (given,))]
    for number, limit in enumerate(limits):
        axes.axvline(limit, color="0.4", linewidth=1, label=None if number else "threshold")
    axes.axvline(card.predicted, color="0.4", linewidth=1, linestyle=":", label="predicted")
    axes.set_yticks([0, 1], ["measured", "null"])
    axes.set_ylim(1.5, -0.5)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def fill_in(text, card, result, command):
    """The text of a card with its result, from a results.json of its study.

    What stood there before is replaced. command: the one that measured.
    """
    found = {name: result[name] for name in ("measured", "null")}
    seeds = result["settings"]["seeds"]
    lines = [f"**{verdict_of(card, found)}.** {describe_study(card, found)}", "",
             "| seed | measured | null |", "|---|---|---|"]
    lines += [f"| {seed} | {measured:.4g} | {null:.4g} |" for seed, measured, null
              in zip(seeds, found["measured"], found["null"], strict=True)]
    if result["more"]:
        lines += ["", "For information: " + "; ".join(
            f"{words} {fmean(each[words] for each in result['more']):.3g}"
            for words in result["more"][0]) + "."]
    lines += ["", f"`{command}`, torch {result['torch']}.", ""]
    before, _ = split_result(text)
    return f"{before.rstrip()}\n\n{RESULT}\n\n" + "\n".join(lines)
