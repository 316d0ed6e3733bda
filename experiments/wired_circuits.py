"""Transformers wired by hand, whose circuits are known: does each tool find what is there?

    python experiments/wired_circuits.py             # half a minute, one thread
    python experiments/wired_circuits.py --quick     # seconds: one wiring, few texts

Claim: on ten circuits that are known by construction, each tool of the library ranks the heads (or
edges) that matter above all others (AUROC 1), with the signs and sizes that follow from the wiring;
and each fails where it must, by as much as it must: in an OR, in an AND, behind a saturated
softmax, before a bit that is not used, and where a dead head has a pretty pattern.
Expected: every line passes and the exit code is 0, for all wirings, in two bases of the stream.

Every model is a GPT of the library, with LayerNorms, MLPs and biases that hold random values where
the circuit leaves them open, in float64, so that what must be 0 is seen to be.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Read before: experiments/wired_board.py; after: experiments/wired_scoring.py
Source: Elhage et al. 2021; Olsson et al. 2022 (induction); McDougall et al. 2023 (copy suppression)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataclasses
import itertools
import math
from dataclasses import dataclass

import torch

from config import check_field, option
from experiments.common import check_seeds, perform
from experiments.wired_board import (
    BOS,
    CONTENT,
    N_CTX,
    NO,
    SHARP,
    SOFT,
    YES,
    Board,
    Truth,
    Wired,
    alone,
    draw,
    named,
    rotated,
    shuffled,
)
from experiments.wired_facts import claims_of, facts, figure
from experiments.wired_scoring import TOOLS, Case, Row, judged
from utils import Progress, run_program, seeded_generator

# The circuits


def previous_token(seed, decoys=False):
    """One head looks one position back and says what it finds there. With decoys it is a little
    smeared, and the dead heads look one back too, sharply, and in vain."""
    board = Board(seed)
    head = board.put(0, looks=board.previous(), moves=board.saying(),
                     sharp=SOFT if decoys else SHARP)
    board.fill(*[board.previous()] if decoys else [board.itself(), board.at(0)])

    def make_pair(generator):
        right, wrong, *text = shuffled(CONTENT, generator)
        return [BOS, *text[1:], right, text[0]], [BOS, *text[1:], wrong, text[0]], right, wrong

    truth = alone(head, copies={head: 1}, looks={"previous-token": {head}}, decoys=decoys)
    return Wired("dead heads" if decoys else "previous token", board.finish(),
                 lambda text: text[-2] if len(text) > 2 else None, make_pair, truth)


def duplicate_token(seed):
    """One head looks at earlier occurrences of its token and says YES; it rests on BOS and says NO.

    That it does not find itself takes a second product, of positions, which is subtracted.
    """
    board = Board(seed)
    token, place = board.some("token"), board.slots["position"]
    value = torch.stack([token.sum(0), board.slots["token"][BOS]])
    head = board.put(0, looks=(torch.cat([token, -place]), torch.cat([token, place]), 0.5),
                     moves=(value, board.some("said", [YES, NO])))
    board.fill()

    def make_pair(generator):
        last, *others = shuffled(CONTENT, generator)
        corrupt = [BOS, *others[:N_CTX - 2], last]
        clean = list(corrupt)
        clean[draw(range(1, N_CTX - 1), generator)] = last
        return clean, corrupt, YES, NO

    return Wired("duplicate token", board.finish(),
                 lambda text: (YES if text[-1] in text[:-1] else NO) if len(text) > 1 else None,
                 make_pair, alone(head, "k", looks={"duplicate-token": {head}},
                                  flat=frozenset({("embed", named(head, "k"))})))


def induction(seed):
    """A previous-token head tells each position what came before it; the induction head looks there
    for its own token (K-composition) and says what it finds. Its softmax is not saturated."""
    board = Board(seed, n_layers=2)
    early = board.put(0, looks=board.previous(),
                      moves=(board.some("token"), board.some("before")))
    late = board.put(1, looks=(board.some("token"), board.some("before"), 0.5),
                     moves=board.saying(), sharp=SOFT)
    board.fill(board.itself(), board.at(0))

    def make_pair(generator):
        text = [BOS, *shuffled(CONTENT, generator)[:N_CTX - 2]]
        i = draw(range(1, N_CTX - 2), generator)
        j = draw([k for k in range(1, N_CTX - 2) if abs(k - i) > 1], generator)
        swapped = list(text)
        swapped[i], swapped[j] = text[j], text[i]
        return [*text, text[i]], [*swapped, text[i]], text[i + 1], text[j + 1]

    both, paid = {early: 1.0, late: 1.0}, 1 / (1 + math.exp(-SOFT / 2) + 8 * math.exp(-SOFT))
    truth = Truth(
        both, both, {early: None, late: 1.0}, {early: paid, late: paid}, {late: paid},
        edges={("embed", named(early, "v")): None, (named(early), named(late, "k")): 1.0,
               (named(late), "logits"): 1.0},
        looks={"previous-token": {early}, "induction": {late}}, copies={late: 1},
        composes=frozenset({("K", *early, *late)}))
    return Wired("induction", board.finish(), said_after, make_pair, truth)


def said_after(text):
    """What followed the earlier occurrences of the last token, where that is one token."""
    found = {after for token, after in itertools.pairwise(text) if token == text[-1] != BOS}
    return found.pop() if len(found) == 1 else None


def copying(seed):
    """One head says the token at one position, another, half as loudly, unsays that at another."""
    board = Board(seed)
    i, j = shuffled(range(1, N_CTX - 1), board.generator)[:2]
    says = board.put(0, looks=board.at(i), moves=board.saying())
    unsays = board.put(0, looks=board.at(j), moves=board.saying(-0.5))
    board.fill()

    def make_pair(generator):
        clean = [BOS, *shuffled(CONTENT, generator)[:N_CTX - 1]]
        corrupt = list(clean)
        corrupt[i], corrupt[j] = clean[j], clean[i]
        return clean, corrupt, clean[i], clean[j]

    shares, units = {says: 2 / 3, unsays: 1 / 3}, {says: 1.0, unsays: 0.5}
    edges = {edge: share for head, share in shares.items() for edge, share in (
        (("embed", named(head, "v")), None), ((named(head), "logits"), share))}
    truth = Truth(shares, shares, shares, units, units, edges, copies={says: 1, unsays: -1})
    return Wired("copying", board.finish(), lambda text: text[i] if len(text) > i else None,
                 make_pair, truth)


def copy_suppression(seed):
    """A head predicts two tokens, the second half as loudly; a later one looks for the first in the
    text, with a query that reads what is predicted (Q-composition), and takes it back where it is.
    So the first head speaks for the wrong answer, and lets the second one make it right."""
    board = Board(seed, n_layers=2)
    order = shuffled(CONTENT, board.generator)
    first = {token: order[(k + 1) % len(order)] for k, token in enumerate(order)}
    second = {token: first[first[token]] for token in order}
    predictions = (board.some("said", map(first.get, CONTENT))
                   + 0.5 * board.some("said", map(second.get, CONTENT)))
    early = board.put(0, looks=board.itself(), moves=(board.some("token"), predictions))
    late = board.put(1, looks=(board.some("said"), board.some("token"), 0.75),
                     moves=board.saying(-1.0))
    board.fill()

    def make_pair(generator):
        k = draw(range(len(order)), generator)
        last, other = order[k], order[(k + draw(range(2, 9), generator)) % len(order)]
        said = {each[token] for each in (first, second) for token in (last, other)}
        text = [BOS, *(draw([t for t in CONTENT if t not in said], generator)
                       for _ in range(N_CTX - 2))]
        text[draw(range(1, N_CTX - 1), generator)] = first[last]
        return [*text, last], [*text, other], second[last], first[last]

    def answer(text):
        return (second if first.get(text[-1]) in text else first).get(text[-1])

    through_query, shares = (named(early), named(late, "q")), {early: 1.0, late: 2.0}
    truth = Truth(
        shares, shares, slope={early: -1.0, late: 2.0}, removed={early: 0.5, late: 1.0},
        direct={early: -0.5, late: 1.0},
        edges={("embed", named(early, "v")): None, through_query: 2.0,
               (named(early), "logits"): -1.0, (named(late), "logits"): 2.0},
        flat=frozenset({through_query}), copies={late: -1},
        composes=frozenset({("Q", *early, *late)}))
    return Wired("copy suppression", board.finish(), answer, make_pair, truth)


def gate(seed, name, low, high):
    """Two heads each read whether the token at a position is one of a set, into one flag; the MLP
    says YES where the flag is above `high`, NO where it is below `low`."""
    board = Board(seed)
    i, j = shuffled(range(1, N_CTX - 1), board.generator)[:2]
    on = shuffled(CONTENT, board.generator)[:5]
    off = [token for token in CONTENT if token not in on]
    read = board.some("token", on).sum(0, keepdim=True), board.slots["flag"]
    heads = [board.put(0, looks=board.at(position), moves=read) for position in (i, j)]
    board.put_step(low, high)
    board.fill()

    def make_pair(generator):
        clean = [BOS, *(draw(CONTENT, generator) for _ in range(N_CTX - 1))]
        corrupt = list(clean)
        for position in (i, j):
            clean[position], corrupt[position] = draw(on, generator), draw(off, generator)
        return clean, corrupt, YES, NO

    def answer(text):
        n_on = sum(position < len(text) and text[position] in on for position in (i, j))
        return YES if n_on > (low + high) / 2 else NO

    both_needed, each, none = high > 1, dict.fromkeys(heads, 1.0), {}
    edges = {edge: share for head in heads for edge, share in (
        (("embed", named(head, "v")), None), ((named(head), "0.mlp"), 1.0 - both_needed))}
    truth = Truth(
        restores=none if both_needed else each, breaks=each if both_needed else none,
        removed=dict.fromkeys(heads, 2.0) if both_needed else none,
        edges=edges | {("0.mlp", "logits"): None}, flat=frozenset(edges))
    return Wired(name, board.finish(), answer, make_pair, truth)


def unused_bit(seed):
    """Two heads each read a bit of a token: one says it, one writes it to where nothing reads."""
    board = Board(seed)
    i, j = shuffled(range(1, N_CTX - 1), board.generator)[:2]
    on = shuffled(CONTENT, board.generator)[:5]
    sign = torch.tensor([[1.0 if token in on else -1.0] for token in CONTENT]).double()
    bit = (sign * board.some("token")).sum(0, keepdim=True)
    verdict = board.some("said", [YES]) - board.some("said", [NO])
    head = board.put(0, looks=board.at(i), moves=(bit, verdict / 2))
    board.put(0, looks=board.at(j), moves=(bit, board.slots["flag"]))
    board.fill()

    def make_pair(generator):
        clean = [BOS, *(draw(CONTENT, generator) for _ in range(N_CTX - 1))]
        corrupt = list(clean)
        for position in (i, j):
            corrupt[position] = draw([t for t in CONTENT if (t in on) != (clean[position] in on)],
                                     generator)
        return clean, corrupt, *((YES, NO) if clean[i] in on else (NO, YES))

    def answer(text):
        return None if len(text) <= i else YES if text[i] in on else NO

    return Wired("unused bit", board.finish(), answer, make_pair, alone(head),
                 bits={"used": lambda text: text[i] in on, "unused": lambda text: text[j] in on})


def saturated_softmax(seed):
    """The first token names a position; one head says which, to a second, which looks there
    (Q-composition) and says what it finds. e^-20 is left for all else: no gradient passes."""
    board = Board(seed, n_layers=2)
    goals = dict(zip(shuffled(CONTENT, board.generator), itertools.cycle(range(2, N_CTX))))
    early = board.put(0, looks=board.at(1),
                      moves=(board.some("token"), board.some("goal", map(goals.get, CONTENT))))
    late = board.put(1, looks=(board.slots["goal"], board.slots["position"], 0.5),
                     moves=board.saying())
    board.fill()

    def make_pair(generator):
        text = shuffled(CONTENT, generator)[:N_CTX - 2]
        name = draw(CONTENT, generator)
        other = draw([token for token in CONTENT if goals[token] != goals[name]], generator)
        clean, corrupt = [BOS, name, *text], [BOS, other, *text]
        return clean, corrupt, clean[goals[name]], clean[goals[other]]

    def answer(text):
        return text[goals[text[1]]] if len(text) > 2 and goals[text[1]] < len(text) else None

    both = {early: 1.0, late: 1.0}
    through_query = {("embed", named(early, "v")): None, (named(early), named(late, "q")): 1.0}
    truth = Truth(
        both, both, slope={late: 1.0}, removed=both, direct={late: 1.0},
        edges=through_query | {(named(late), "logits"): 1.0}, flat=frozenset(through_query),
        copies={late: 1}, composes=frozenset({("Q", *early, *late)}))
    return Wired("saturated softmax", board.finish(), answer, make_pair, truth)


def zoo(seed):
    """All of them, [Wired]; the seed says which vectors, heads, positions and tokens are used."""
    return [
        previous_token(seed), duplicate_token(seed), induction(seed), copying(seed),
        copy_suppression(seed), gate(seed, "OR", 0.25, 0.75), gate(seed, "AND", 1.25, 1.75),
        unused_bit(seed), previous_token(seed, decoys=True), saturated_softmax(seed),
    ]


# The program


@dataclass(frozen=True)
class WiredConfig:
    """How many wirings are judged, and on how many prompts."""

    seeds: tuple[int, ...] = option((0, 1, 2), "a wiring of each circuit with each")
    prompts: int = option(8, "pairs of a clean and a corrupt text for each")
    threads: int = option(1, "CPU threads")
    quick: bool = option(False, "one wiring, in one basis, two pairs")
    out_dir: str = option("outputs", "the folder that wired_circuits/ is written to")

    def __post_init__(self):
        check_seeds(self)
        for name in ("prompts", "threads"):
            check_field(self, name, lambda n: n >= 1, "1 or more")


def run(cfg, folder):
    """{"claims": [Claim], "rows": a dict for each tool on each wiring}. cfg: a WiredConfig."""
    seeds = cfg.seeds[:1] if cfg.quick else cfg.seeds
    wirings = [(seed, one) for seed in seeds for wired in zoo(seed)
               for one in ([wired] if cfg.quick else [wired, rotated(wired, seed)])]
    rows, found, progress = [], [], Progress(len(wirings), " wirings")
    for done, (seed, wired) in enumerate(wirings, 1):
        n_prompts = 2 if cfg.quick else cfg.prompts
        case = Case.of(wired, wired.pairs(n_prompts, seeded_generator(seed)))
        rows += filter(None, (judged(tool, case) for tool in TOOLS))
        found.append(facts(case))
        progress.show(done, wired.name)
    return {"claims": claims_of(rows, found), "rows": [dataclasses.asdict(row) for row in rows]}


def figures(result):
    """The Figure of `run`'s rows."""
    return {"wired_circuits": figure([Row(**row) for row in result["rows"]])}


def main(argv=None):
    """The program: judges, prints the table, writes outputs/wired_circuits; a miss exits with 1."""
    perform(WiredConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
