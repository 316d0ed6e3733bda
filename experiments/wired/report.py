"""Report how the tools do on the wired circuits: the claims, the summary and the figure.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: plotting.py, experiments/wired/measure.py
Next: experiments/wired_circuits.py
Source: the form of a claim is that of chapter 0
"""

import statistics

import plotting
from experiments.common import claim
from experiments.wired.measure import TOOLS

SAME = 1e-9  # two AUROCs that differ by less are equal

# Claims


def all_claims(rows, facts):
    """[Claim] from the Rows of all circuits and a list of each circuit's {name: Fact}."""
    claims = []
    for what in dict.fromkeys(what for each in facts for what in each):
        claims.append(fact_claim(what, [each[what] for each in facts if what in each]))

    for tool in TOOLS:
        own = [row for row in rows if row.tool == tool.name]
        if not own:
            continue
        seen = [row for row in own if row.wired == 1.0]
        missed = [row for row in own if row.wired != 1.0]
        if seen:
            n_circuits = len({row.circuit for row in seen})
            where = f"{n_circuits} circuits" if n_circuits > 1 else seen[0].circuit
            claims.append(ranking_claim(f"{tool.name}: AUROC, {where}", seen))
        if missed:
            names = ", ".join(dict.fromkeys(row.circuit for row in missed))
            claims.append(ranking_claim(f"{tool.name}: AUROC, must miss a part of: {names}",
                                        missed))
        if tool.within:
            claims.append(size_claim(tool, own))
    return claims


def fact_claim(what, facts):
    """The Claim that a Fact holds on every wiring."""
    wired = facts[0].wired
    return claim(what, [fact.measured for fact in facts], holds=all(fact.holds for fact in facts),
                 control=f"wired: {wired:g}", mark=wired)


def ranking_claim(text, rows):
    """The Claim that a tool has the AUROC that follows from the wiring on each of these Rows."""
    lowest = f"{min(row.wired for row in rows):.2g}"
    highest = f"{max(row.wired for row in rows):.2g}"
    span = lowest if lowest == highest else f"{lowest} to {highest}"
    return claim(text, [row.auroc for row in rows], holds=all(is_as_wired(row) for row in rows),
                 control=f"wired: {span}")


def size_claim(tool, rows):
    """The Claim that each size that a tool gives is close enough to the wired one."""
    errors = [row.error for row in rows]
    return claim(f"{tool.name}: largest error of a size", max(errors),
                 interval=(min(errors), max(errors)), between=(0.0, tool.within),
                 control=f"at most {tool.within}")


def is_as_wired(row):
    """Whether a Row's AUROC is the one that follows from the wiring."""
    return abs(row.auroc - row.wired) < SAME


def summarise(rows, claims):
    """Three sentences that say what was found."""
    cells = {}
    for row in rows:
        cells.setdefault((row.tool, row.circuit), []).append(row)
    must_miss = [own for own in cells.values() if own[0].wired < 1.0]
    n_as_wired = sum(all(map(is_as_wired, own)) for own in cells.values())
    n_missed_so = sum(all(map(is_as_wired, own)) for own in must_miss)
    n_tools = len({tool for tool, _ in cells})
    n_circuits = len({circuit for _, circuit in cells})
    n_failed = sum(each.holds is False for each in claims)
    verdict = "No claim fails." if n_failed == 0 else f"{n_failed} of {len(claims)} claims fail."
    return (f"{n_tools} tools were asked about {n_circuits} circuits that were wired by hand, and "
            f"{n_as_wired} of the {len(cells)} answers follow exactly from the wiring, in every "
            f"wiring. In {len(must_miss)} of them the tool must miss a part of the circuit, "
            "because this part is redundant, saturated, indirect, or hidden among dead heads with "
            f"sharper patterns; in {n_missed_so} it misses exactly that part. {verdict}")


# The figure


def verdict_figure(rows):
    """The Figure of each tool's AUROC on each circuit, with a frame where it must fail."""
    measured, wired = mean_aurocs(rows)
    names = list(dict.fromkeys(row.circuit for row in rows))
    tools = [tool.name for tool in TOOLS if any(tool.name == row.tool for row in rows)]
    cells = [[(tool, name) for name in names] for tool in tools]
    values = [[measured.get(cell, float("nan")) for cell in row] for row in cells]

    n_as_wired = sum(abs(measured[cell] - wired[cell]) < SAME for cell in wired)
    n_missed = sum(auroc < 1 for auroc in wired.values())
    figure = plotting.heatmap(
        values, row_labels=tools, column_labels=names, ylabel="",
        xlabel="circuit, wired by hand (blank: the tool is about something else)",
        title=f"{n_as_wired} of {len(wired)} verdicts are as wired: a tool finds what it can see\n"
              f"and misses, in {n_missed} cells (framed), what is redundant, saturated, indirect, "
              "or pretty but dead")
    figure.set_size_inches(10.5, 7)
    axes, bar = figure.axes

    masked, scale = plotting.colour_scale(values)
    texts = [["" if value != value else f"{value:.2f}".rstrip("0").rstrip(".") for value in row]
             for row in values]  # NaN is not itself
    plotting.write_cells(axes, masked, texts, scale)

    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if wired.get(cell, 1.0) < 1.0:
                axes.plot([x - 0.45, x + 0.45, x + 0.45, x - 0.45, x - 0.45],
                          [y - 0.45, y - 0.45, y + 0.45, y + 0.45, y - 0.45],
                          color=plotting.COLOURS[1])

    axes.set_aspect("auto")
    for label in axes.get_xticklabels():
        label.set(rotation=30, ha="right", rotation_mode="anchor")
    bar.set_ylabel("AUROC: what matters ranks above what does not (0.5: chance)", fontsize=9)
    return figure


def mean_aurocs(rows):
    """(measured, wired), each {(tool, circuit): AUROC}, the mean over seeds and bases."""
    measured = {}
    wired = {}
    for cell in dict.fromkeys((row.tool, row.circuit) for row in rows):
        own = [row for row in rows if (row.tool, row.circuit) == cell]
        measured[cell] = statistics.mean(row.auroc for row in own)
        wired[cell] = own[0].wired
    return measured, wired
