"""Write the page of all verified claims.

Chapter: COURSE_ROADMAP.md, 16 (independent research)
Prerequisites: experiments/verification/measure.py
Next: nothing
Source: none
"""

from collections import Counter

from experiments.common import threshold_source

INTRO = """# Every claim, verified

`make verify` wrote this page. It ran each experiment as a program, and judged each of its claims
anew. The seeds are not those on which thresholds were chosen. **PASS**: the claim held for every
seed or, where the line says so, for their median. **FAIL**: it did not; such lines stay here, and
stand first. **SKIP**: it could not be judged, which is not a pass. Lines without a verdict are for
information, and are left out here; the experiments print them.
"""
COLUMNS = ("claim", "measured", "range or 95 % CI", "control", "threshold from", "published", "")


def outcome_rows(outcome):
    """[(verdict, cells)] of an Outcome's judged claims; one row if it was skipped or broke off."""
    blank = [""] * (len(COLUMNS) - 2)
    if outcome.skipped:
        return [("SKIP", [outcome.skipped, *blank, "SKIP"])]
    if outcome.error:
        return [("FAIL", [f"the program did not finish: {outcome.error}", *blank, "FAIL"])]
    rows = []
    for line in outcome.claims:
        if line.holds is not None:
            claim, reported, measured, spread, control, verdict = line.cells()
            rows.append((verdict, [claim, measured, spread, control,
                                   threshold_source(line, outcome.thresholds), reported, verdict]))
    return rows


def table(rows):
    """Rows of cells as lines of a Markdown table; each cell is one line."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return lines + ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells)
                    + " |" for cells in rows]


def count_verdicts(outcomes):
    """A Counter of PASS, FAIL and SKIP."""
    return Counter(verdict for outcome in outcomes for verdict, _ in outcome_rows(outcome))


def count_outcomes(outcomes):
    """A sentence such as "203 claims hold, 1 fails, 3 experiments were skipped"."""
    count = count_verdicts(outcomes)
    failing = "1 fails" if count["FAIL"] == 1 else f"{count['FAIL'] or 'none'} fail"
    skipped = f"{count['SKIP'] or 'none'} skipped"
    return f"{count['PASS']} claims hold, {failing}, {skipped}"


def verification_page(outcomes, ran_on):
    """The page as a text in Markdown. outcomes: [Outcome]; ran_on: {word: text}."""
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    lines = [INTRO, f"**{count_outcomes(outcomes)}**, in {minutes:.0f} minutes. "
             + "; ".join(f"{word}: {text}" for word, text in ran_on.items()) + ".", ""]

    failed = [(outcome, cells) for outcome in outcomes for verdict, cells in outcome_rows(outcome)
              if verdict == "FAIL"]
    if failed:
        lines += ["## What fails", "", *table([[f"{outcome.command.label}: {cells[0]}", *cells[1:]]
                                               for outcome, cells in failed]), ""]

    for outcome in outcomes:
        rows = outcome_rows(outcome)
        lines += [f"## {outcome.command.label}", ""]
        if not outcome.skipped:
            lines += [f"`{outcome.command.text}` ({outcome.seconds:.0f} s)", ""]
        lines += table([cells for _, cells in rows]) if rows else ["No claim was judged."]
        lines.append("")
    return "\n".join(lines)
