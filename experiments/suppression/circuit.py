"""Find the circuit that suppresses seen tokens, and test it.

Texts come in pairs that end alike: a token that is predicted at the end was seen in one of them
(clean) and not in the other (corrupted). The metric is the logit of an equally likely token, seen
in neither, minus the logit of this one: how far a token is suppressed because it was seen. The
graph of two layers of two heads has 29 edges, few enough to cut each one by itself. The circuit
consists of the best edges by this test, as many as are needed on some pairs of texts; it is judged
on other pairs.

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
Prerequisites: circuit_evaluation.py, experiments/suppression/measure.py
Next: experiments/indirect_object/model.py
Source: McDougall et al. 2023 (the head); Mueller et al. 2025 and Shi et al. 2024 (the tests)
"""

import torch

from circuit_evaluation import (
    evaluate_circuit,
    faithfulness_curve,
    jaccard,
    random_ranking,
    ranked_edges,
)
from circuits import CircuitRun, eap, exact_edge_scores
from experiments.suppression.model import suppression_pairs
from utils import seeded_generator

CHOSEN_ON, JUDGED_ON = 1000, 999  # seeds of pairs; no model is trained on either
N_PAIRS = 128
LEAST = 1.0  # nats of suppression; for a model with less, no circuit is searched
KEEPS = 0.9  # the share of them that the circuit keeps, on the pairs that it is chosen on
SIZES = tuple(tenth / 10 for tenth in range(11))  # of the curves, shares of all edges
STEPS = 5  # of integrated gradients


def judged_pairs(walks, n_pairs=N_PAIRS):
    """The Pairs on which a circuit is judged."""
    return suppression_pairs(walks, n_pairs, seeded_generator(JUDGED_ON))


@torch.no_grad()
def taken_off(model, pairs):
    """[batch]: how far a token is suppressed because it was seen, in nats, compared with an equally
    likely one. pairs: from `suppression_pairs`."""
    clean, corrupted = (pairs.metric(model(tokens))
                        for tokens in (pairs.clean_tokens, pairs.corrupted_tokens))
    return clean - corrupted


def smallest_circuit(run, scores):
    """The smallest Circuit of best edges that keeps KEEPS or more of the metric."""
    curve = faithfulness_curve(run, ranked_edges(scores), sizes="all")
    n_edges = int((curve.mean >= KEEPS).nonzero()[0])  # all edges keep 1
    return scores.circuit(n_edges)


def measure_circuit(model, walks, *, n_pairs=N_PAIRS, n_random=100):
    """Find the circuit of a model that suppresses, and judge it on other pairs.

    Returns a dict of plain values, or None for a model that suppresses by less than LEAST.

    walks: the Walks that the model was trained on. n_pairs: the number of pairs to choose on, and
    to judge on. n_random: the number of random circuits; half as many random rankings are drawn.

    cpr, cmd: of the ranking by exact edges, over SIZES; eap cpr: of the ranking by EAP-IG. shared
    with eap: the Jaccard index with EAP-IG's circuit of as many edges. random, random cpr: the
    highest of random circuits and of random rankings. lines: all results as text.
    """
    chosen_on = suppression_pairs(walks, n_pairs, seeded_generator(CHOSEN_ON))
    pairs = judged_pairs(walks, n_pairs)
    if not taken_off(model, pairs).mean() >= LEAST:  # this is also true for a NaN
        return None
    first, run = (CircuitRun(model, each.clean_tokens, each.corrupted_tokens, each.metric)
                  for each in (chosen_on, pairs))

    # chosen on one set of pairs, by exact edges and by their estimates
    scores = exact_edge_scores(first)
    circuit = smallest_circuit(first, scores)
    with torch.enable_grad():
        estimate = eap(model, chosen_on.clean_tokens, chosen_on.corrupted_tokens,
                       chosen_on.metric, ig_steps=STEPS)

    # judged on the other set
    report = evaluate_circuit(run, circuit, scores=scores, n_random=n_random, n_draws=n_random)
    curve, rival = (faithfulness_curve(run, ranked_edges(each), sizes=SIZES)
                    for each in (scores, estimate))
    generator = seeded_generator(0)
    most = max(faithfulness_curve(run, random_ranking(run.full, generator), sizes=SIZES).cpr
               for _ in range(n_random // 2))
    shared = jaccard(circuit, estimate.circuit(len(circuit)))

    edges = ", ".join(f"{writer} to {reader}" for writer, reader in circuit.edges())
    lines = [edges, *report.lines(),
             f"CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}; CPR of EAP-IG's ranking {rival.cpr:.2f}, "
             f"of {n_random // 2} random rankings at most {most:.2f}",
             f"EAP-IG's circuit of the same size: Jaccard {shared:.2f} with this one"]
    return {"edges": [list(edge) for edge in circuit.edges()], "n_edges": len(circuit),
            "faithfulness": report.faithfulness.mean.item(),
            "random": report.random.mean.max().item(),
            "cpr": curve.cpr, "cmd": curve.cmd, "random cpr": most, "eap cpr": rival.cpr,
            "shared with eap": shared,
            "tests": {name: {"holds": test.holds, "statistic": test.statistic, "p": test.p_value}
                      for name, test in report.tests.items()},
            "stability": report.stability.mean, "by chance": report.stability.chance,
            "lines": lines}
