"""Report a study: its claims, its figure, and the result that is written into its card.

Chapter: COURSE_ROADMAP.md, 16 (independent research)
Prerequisites: experiments/cards/model.py
Next: experiments/verification/measure.py
Source: none
"""

import re
import textwrap
from statistics import fmean

from matplotlib.figure import Figure

from experiments.cards.model import (
    RESULT,
    claim_digest,
    holds,
    limits_of,
    read_card,
    result_in,
    results_path,
    split_result,
)
from experiments.common import add_control, claim
from plotting import COLOURS, bare_axes
from utils import read_json, read_text

MEANINGS = {
    "HOLDS": "The claim holds for {measured} seeds, the null for {null}.",
    "REFUTED": "The claim holds for {measured} seeds, the null for {null}.",
    "DEPENDS": "Whether the claim holds for every seed depends on how the number is measured.",
    "UNDECIDED": "The null passes too, so the number does not show what was claimed.",
}


def study_claims(card, found):
    """[Claim]: the card's, the same in other ways, that its null does not pass, and more numbers.

    found: {"measured", "null": [seed], "ways": {name: [seed]}, "more": [{words: number}]}.
    """
    null = found["null"]
    beside = f"predicted {card.predicted:g}; null {fmean(null):.3g}"
    lines = [add_control(claim(card.texts["Number"], found["measured"], **card.threshold), beside)]
    lines += [claim(f"the same, {name}", values, **card.threshold)
              for name, values in found["ways"].items()]

    null_passes = all(holds(card.threshold, value) for value in null)
    lines.append(claim("the same for the null, which must not hold for every seed", null,
                       holds=not null_passes))
    for words in found["more"][0] if found["more"] else ():
        lines.append(claim(words, [each[words] for each in found["more"]]))
    return lines


def verdict_of(card, found):
    """The verdict on a card's claim, one of four words.

    card: a Card. found: {"measured", "null": [seed], "ways": {name: [seed]}}, the number for each
    seed, measured as the card says and in other ways, and of the null. Such a list holds if every
    value in it is as card.threshold says.

        REFUTED     no way of measuring holds
        UNDECIDED   a way holds, but the null holds too, so the number shows nothing
        DEPENDS     a way holds and another one does not; nor does the null
        HOLDS       every way holds, and the null does not
    """
    def all_hold(values):
        return all(holds(card.threshold, value) for value in values)

    verdicts = {all_hold(values) for values in (found["measured"], *found["ways"].values())}
    if verdicts == {False}:
        return "REFUTED"
    if all_hold(found["null"]):
        return "UNDECIDED"
    return "DEPENDS" if len(verdicts) > 1 else "HOLDS"


def describe_study(card, found):
    """Two sentences that say what came out."""
    parts = [f"Predicted {card.predicted:g}", f"measured {mean_and_range(found['measured'])}"]
    parts += [f"{name} {mean_and_range(values)}" for name, values in found["ways"].items()]
    parts.append(f"null {fmean(found['null']):.3g}")

    def how_many(values):
        return f"{sum(holds(card.threshold, value) for value in values)} of {len(values)}"

    meaning = MEANINGS[verdict_of(card, found)].format(
        measured=how_many(found["measured"]), null=how_many(found["null"]))
    return f"{', '.join(parts)}. {meaning}"


def mean_and_range(values):
    """Numbers as a text such as "0.85 (0.8 to 0.9)"; one number, if all are the same."""
    mean, low, high = (f"{number:.3g}" for number in (fmean(values), min(values), max(values)))
    return mean if low == mean == high else f"{mean} ({low} to {high})"


def study_figure(card, found):
    """The Figure of all seeds: measured, in other ways, and the null, with the threshold and the
    prediction."""
    rows = {"measured": found["measured"], **found["ways"], "null": found["null"]}
    figure = Figure(figsize=(8, 2 + 0.3 * len(rows)), layout="constrained")
    axes = bare_axes(figure.subplots(), f"{card.name}: {verdict_of(card, found)}",
                     textwrap.fill(card.texts["Number"], 90), "")
    for y, (name, values) in enumerate(rows.items()):
        colour = COLOURS[1] if name == "null" else COLOURS[0]
        axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.7)
    for number, limit in enumerate(limits_of(card.threshold)):
        axes.axvline(limit, color="0.4", linewidth=1, label=None if number else "threshold")
    axes.axvline(card.predicted, color="0.4", linewidth=1, linestyle=":", label="predicted")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def filled_card(folder):
    """The text of the card in a folder, with the result that its study measured last."""
    return fill_in(read_text(folder / "card.md"), read_card(folder),
                   read_json(results_path(folder)), digest=claim_digest(folder),
                   command=f"python experiments/claim_card.py check {folder.name}")


def fill_in(text, card, result, *, command, digest):
    """The text of a card with its result, from a results.json of its study.

    What stood there before is replaced, but for a line about each earlier verdict; sections after
    the result stay. command: the one that measured. digest: of what was measured, as `claim_digest`
    returns it.
    """
    before, after = split_result(text)
    later = re.search(r"^## .*", after, re.MULTILINE | re.DOTALL)
    sections = [before + RESULT, result_text(card, result, command, digest),
                *earlier_verdicts(result_in(text), digest)]
    if later:
        sections.append(later[0].strip())
    return "\n\n".join(sections) + "\n"


def result_text(card, result, command, digest):
    """What stands below the heading of a result: the verdict, a table of seeds, further numbers,
    and how it was measured. Arguments as in `fill_in`."""
    found = {name: result[name] for name in ("measured", "null", "ways", "more")}
    lines = [fill_lines(f"**{verdict_of(card, found)}.** {describe_study(card, found)}"), ""]

    # A row for each seed, a column for each way of measuring
    columns = {"measured": found["measured"], **found["ways"], "null": found["null"]}
    lines += [f"| seed | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for seed, *values in zip(result["settings"]["seeds"], *columns.values(), strict=True):
        lines.append(f"| {seed} | {' | '.join(f'{value:.4g}' for value in values)} |")

    if found["more"]:
        said = (f"{words}: {mean_and_range([each[words] for each in found['more']])}"
                for words in found["more"][0])
        lines += ["", fill_lines(f"For information: {'; '.join(said)}.")]
    lines += ["", f"`{command}`, torch {result['torch']}, card and study {digest}."]
    return "\n".join(lines)


def earlier_verdicts(result, digest):
    """The lines about earlier verdicts, a list, that must stay when a result is replaced: its own
    such lines, and its own verdict if that was about another card or study than `digest` says."""
    lines = re.findall(r"^Before, .*$", result, re.MULTILINE)
    measured = re.search(r"card and study (\w+)\.$", result, re.MULTILINE)
    if measured and measured[1] != digest:
        seeds = " ".join(re.findall(r"^\| (\d+) \|", result, re.MULTILINE))
        lines.append(f"Before, card and study {measured[1]} gave {verdict_in(result)} with seeds "
                     f"{seeds}.")
    return lines


def verdict_in(result):
    """The verdict that a result's text begins with, such as "HOLDS"."""
    return re.match(r"\*\*([A-Z]+)\.\*\*", result)[1]


def fill_lines(text):
    """A text in lines as long as those of the other pages."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def describe_card(text, digest):
    """One line for the list of all cards. digest: what `claim_digest` returns now."""
    result = result_in(text)
    line = " ".join(result.split("\n\n")[0].split())
    if line.startswith("**") and f"card and study {digest}." not in result:
        line += " (The card or its study changed since: check it again.)"
    return line
