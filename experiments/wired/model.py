"""Wire ten small GPTs by hand, so that the role of each head is known.

Each comes with pairs of prompts, the answer to any text, and the results that every tool must give.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: metrics.py, experiments/wired/board.py
Next: experiments/wired_circuits.py
Source: Elhage et al. 2021; Olsson et al. 2022 (induction); McDougall et al. 2023 (copy suppression)
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from activation_cache import head_label
from experiments.wired.board import (
    BOS,
    CONTENT,
    N_CTX,
    NO,
    SHARP,
    SOFT,
    YES,
    Board,
    rotate_stream,
    shuffled,
)
from metrics import Metric
from model import GPT

# The truth about a circuit


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted texts, [batch, pos], that differ in what the circuit reads. The metric is
    the logit of `right` minus that of `wrong`, [batch] each, at the last position."""

    clean_tokens: torch.Tensor
    corrupted_tokens: torch.Tensor
    right: torch.Tensor
    wrong: torch.Tensor

    @property
    def metric(self):
        """The logit difference, a Metric."""
        return Metric.logit_diff(self.right, self.wrong)


@dataclass(frozen=True)
class Truth:
    """What each tool must find: {(layer, head): size}. Heads that are not named have size 0.

    restores: the share of the effect that returns when the clean head is patched into the corrupted
    run (denoising); slope: the same by the gradient there (None: the size is not exact). breaks:
    the share that is lost when the corrupted head is patched into the clean run (noising). removed,
    direct: in units of GAIN, the fall of the clean metric when the head writes zero, and its direct
    effect.
    edges: {(writer, reader): share}, the connections that carry the effect, and the share that a
    head's clean output restores through this edge alone (None: not measured). flat: the edges
    through which no gradient passes, because their reader is saturated.
    looks: {pattern: heads that matter and have it}. decoys: whether dead heads have the pattern
    more sharply. copies: 1 for a head that raises what it looks at, -1 for one that lowers it.
    composes: pairs ("Q" or "K", layer, head, later layer, later head) in which the later head reads
    what the earlier one writes.
    """

    restores: dict = field(default_factory=dict)
    breaks: dict = field(default_factory=dict)
    slope: dict = field(default_factory=dict)
    removed: dict = field(default_factory=dict)
    direct: dict = field(default_factory=dict)
    edges: dict = field(default_factory=dict)
    flat: frozenset = frozenset()
    looks: dict = field(default_factory=dict)
    decoys: bool = False
    copies: dict = field(default_factory=dict)
    composes: frozenset = frozenset()

    @property
    def heads(self):
        """The heads that matter, to any tool."""
        return set(self.restores) | set(self.breaks)


@dataclass(frozen=True)
class WiredCircuit:
    """A model with a known circuit.

    answer: a function of a text (a list of ids) that returns the id that the model predicts next,
    or None if the wiring does not determine it. make_pair: generator -> (clean, corrupted, right,
    wrong), lists and ids. bits: {name: text -> bool}, which can be decoded from the last position.
    """

    name: str
    model: GPT
    answer: Callable
    make_pair: Callable
    truth: Truth
    bits: dict = field(default_factory=dict)

    def draw_pairs(self, n, generator):
        """Pairs of n texts, drawn from a generator."""
        drawn = [self.make_pair(generator) for _ in range(n)]
        clean, corrupted, right, wrong = zip(*drawn, strict=True)
        return Pairs(torch.tensor(clean), torch.tensor(corrupted), torch.tensor(right),
                     torch.tensor(wrong))

    def rotated(self, seed):
        """The same circuit in another basis of the stream."""
        return dataclasses.replace(self, model=rotate_stream(self.model, seed))


def node_name(head, letter=""):
    """The name of a head (layer, head) in `circuits`; with a letter, of one of its inputs."""
    label = head_label(*head)
    return f"{label}.{letter}" if letter else label


def mlp_name(layer):
    """The name of a layer's MLP in `circuits`."""
    return f"L{layer}.mlp"


def truth_of_one_head(head, reads="v", **more):
    """The Truth of a single head that does the whole task; `reads`: the input that differs between
    clean and corrupted."""
    whole = {head: 1.0}
    edges = {("embed", node_name(head, reads)): None, (node_name(head), "logits"): 1.0}
    return Truth(restores=whole, breaks=whole, slope=whole, removed=whole, direct=whole,
                 edges=edges, **more)


def draw_one(items, generator):
    """A random one of the items."""
    items = list(items)
    return items[int(torch.randint(len(items), (), generator=generator))]


# The circuits


def all_circuits(seed):
    """All ten circuits, [WiredCircuit]; the seed decides which vectors, heads, positions and tokens
    are used."""
    return [
        previous_token(seed), duplicate_token(seed), induction(seed), copying(seed),
        copy_suppression(seed), logic_gate(seed, "OR", 0.25, 0.75),
        logic_gate(seed, "AND", 1.25, 1.75), unused_bit(seed), previous_token(seed, decoys=True),
        saturated_softmax(seed),
    ]


def previous_token(seed, decoys=False):
    """One head looks one position back and predicts the token there. With decoys, its pattern is
    slightly blurred, and dead heads look one position back sharply, without any effect."""
    board = Board(seed)
    head = board.wire_head(0, looks=board.previous_position(), moves=board.token_to_said(),
                           sharp=SOFT if decoys else SHARP)
    if decoys:
        board.wire_dead_heads(board.previous_position())
    else:
        board.wire_dead_heads(board.own_position(), board.fixed_position(0))

    def answer(text):
        return text[-2] if len(text) > 2 else None

    def make_pair(generator):
        right, wrong, *text = shuffled(CONTENT, generator)
        return [BOS, *text[1:], right, text[0]], [BOS, *text[1:], wrong, text[0]], right, wrong

    truth = truth_of_one_head(head, copies={head: 1}, looks={"previous-token": {head}},
                              decoys=decoys)
    name = "dead heads" if decoys else "previous token"
    return WiredCircuit(name, board.finish(), answer, make_pair, truth)


def duplicate_token(seed):
    """One head looks at earlier occurrences of its token and writes YES; without one it looks at
    BOS and writes NO.

    To keep it from finding itself, a second product, of positions, is subtracted.
    """
    board = Board(seed)
    token = board.slot_rows("token")
    place = board.slots["position"]
    value = torch.stack([token.sum(0), board.slots["token"][BOS]])
    head = board.wire_head(0, looks=(torch.cat([token, -place]), torch.cat([token, place]), 0.5),
                           moves=(value, board.slot_rows("said", [YES, NO])))
    board.wire_dead_heads()

    def answer(text):
        if len(text) == 1:
            return None
        return YES if text[-1] in text[:-1] else NO

    def make_pair(generator):
        last, *others = shuffled(CONTENT, generator)
        corrupted = [BOS, *others[:N_CTX - 2], last]
        clean = list(corrupted)
        clean[draw_one(range(1, N_CTX - 1), generator)] = last
        return clean, corrupted, YES, NO

    truth = truth_of_one_head(head, reads="k", looks={"duplicate-token": {head}},
                              flat=frozenset({("embed", node_name(head, "k"))}))
    return WiredCircuit("duplicate token", board.finish(), answer, make_pair, truth)


def induction(seed):
    """A previous-token head writes to each position the token before it. The induction head
    searches these for its own token (K-composition) and predicts what it finds. Its softmax is not
    saturated."""
    board = Board(seed, n_layers=2)
    early = board.wire_head(0, looks=board.previous_position(),
                            moves=(board.slot_rows("token"), board.slot_rows("before")))
    late = board.wire_head(1, looks=(board.slot_rows("token"), board.slot_rows("before"), 0.5),
                           moves=board.token_to_said(), sharp=SOFT)
    board.wire_dead_heads(board.own_position(), board.fixed_position(0))

    def make_pair(generator):
        text = [BOS, *shuffled(CONTENT, generator)[:N_CTX - 2]]
        i = draw_one(range(1, N_CTX - 2), generator)
        j = draw_one([k for k in range(1, N_CTX - 2) if abs(k - i) > 1], generator)
        swapped = list(text)
        swapped[i], swapped[j] = text[j], text[i]
        return [*text, text[i]], [*swapped, text[i]], text[i + 1], text[j + 1]

    both = {early: 1.0, late: 1.0}
    attended = 1 / (1 + math.exp(-SOFT / 2) + 8 * math.exp(-SOFT))  # by the late head, to its find
    truth = Truth(
        restores=both, breaks=both, slope={early: None, late: 1.0},
        removed={early: attended, late: attended}, direct={late: attended},
        edges={("embed", node_name(early, "v")): None,
               (node_name(early), node_name(late, "k")): 1.0,
               (node_name(late), "logits"): 1.0},
        looks={"previous-token": {early}, "induction": {late}}, copies={late: 1},
        composes=frozenset({("K", *early, *late)}))
    return WiredCircuit("induction", board.finish(), follower_of_last, make_pair, truth)


def follower_of_last(text):
    """The token that followed the earlier occurrences of the last token, if it is always one."""
    found = {after for token, after in itertools.pairwise(text) if token == text[-1] != BOS}
    return found.pop() if len(found) == 1 else None


def copying(seed):
    """One head raises the token at one position; another lowers that at another, half as much."""
    board = Board(seed)
    i, j = shuffled(range(1, N_CTX - 1), board.generator)[:2]
    says = board.wire_head(0, looks=board.fixed_position(i), moves=board.token_to_said())
    unsays = board.wire_head(0, looks=board.fixed_position(j), moves=board.token_to_said(-0.5))
    board.wire_dead_heads()

    def answer(text):
        return text[i] if len(text) > i else None

    def make_pair(generator):
        clean = [BOS, *shuffled(CONTENT, generator)[:N_CTX - 1]]
        corrupted = list(clean)
        corrupted[i], corrupted[j] = clean[j], clean[i]
        return clean, corrupted, clean[i], clean[j]

    shares = {says: 2 / 3, unsays: 1 / 3}
    units = {says: 1.0, unsays: 0.5}
    edges = {}
    for head, share in shares.items():
        edges["embed", node_name(head, "v")] = None
        edges[node_name(head), "logits"] = share
    truth = Truth(restores=shares, breaks=shares, slope=shares, removed=units, direct=units,
                  edges=edges, copies={says: 1, unsays: -1})
    return WiredCircuit("copying", board.finish(), answer, make_pair, truth)


def copy_suppression(seed):
    """A head predicts two tokens, the second half as much. A later head searches the text for the
    first one, with a query that reads the prediction (Q-composition), and lowers it if it is there.
    So the first head supports the wrong answer, and the second one corrects it."""
    board = Board(seed, n_layers=2)
    order = shuffled(CONTENT, board.generator)
    first = {token: order[(k + 1) % len(order)] for k, token in enumerate(order)}
    second = {token: first[first[token]] for token in order}
    predictions = (board.slot_rows("said", map(first.get, CONTENT))
                   + 0.5 * board.slot_rows("said", map(second.get, CONTENT)))
    early = board.wire_head(0, looks=board.own_position(),
                            moves=(board.slot_rows("token"), predictions))
    late = board.wire_head(1, looks=(board.slot_rows("said"), board.slot_rows("token"), 0.75),
                           moves=board.token_to_said(-1.0))
    board.wire_dead_heads()

    def answer(text):
        if first.get(text[-1]) in text:
            return second.get(text[-1])
        return first.get(text[-1])

    def make_pair(generator):
        k = draw_one(range(len(order)), generator)
        last = order[k]
        other = order[(k + draw_one(range(2, 9), generator)) % len(order)]
        said = {predicted[token] for predicted in (first, second) for token in (last, other)}
        unsaid = [token for token in CONTENT if token not in said]
        text = [BOS, *(draw_one(unsaid, generator) for _ in range(N_CTX - 2))]
        text[draw_one(range(1, N_CTX - 1), generator)] = first[last]
        return [*text, last], [*text, other], second[last], first[last]

    through_query = (node_name(early), node_name(late, "q"))
    shares = {early: 1.0, late: 2.0}
    truth = Truth(
        restores=shares, breaks=shares, slope={early: -1.0, late: 2.0},
        removed={early: 0.5, late: 1.0}, direct={early: -0.5, late: 1.0},
        edges={("embed", node_name(early, "v")): None, through_query: 2.0,
               (node_name(early), "logits"): -1.0, (node_name(late), "logits"): 2.0},
        flat=frozenset({through_query}), copies={late: -1},
        composes=frozenset({("Q", *early, *late)}))
    return WiredCircuit("copy suppression", board.finish(), answer, make_pair, truth)


def logic_gate(seed, name, low, high):
    """Two heads each read whether the token at a position belongs to a set, and add it to a flag.
    The MLP writes YES if the flag is above `high`, and NO if it is below `low`."""
    board = Board(seed)
    i, j = shuffled(range(1, N_CTX - 1), board.generator)[:2]
    on = shuffled(CONTENT, board.generator)[:5]
    off = [token for token in CONTENT if token not in on]
    moves = (board.slot_rows("token", on).sum(0, keepdim=True), board.slots["flag"])
    heads = [board.wire_head(0, looks=board.fixed_position(position), moves=moves)
             for position in (i, j)]
    board.wire_step_mlp(low, high)
    board.wire_dead_heads()

    def answer(text):
        n_on = sum(position < len(text) and text[position] in on for position in (i, j))
        return YES if n_on > (low + high) / 2 else NO

    def make_pair(generator):
        clean = [BOS, *(draw_one(CONTENT, generator) for _ in range(N_CTX - 1))]
        corrupted = list(clean)
        for position in (i, j):
            clean[position] = draw_one(on, generator)
            corrupted[position] = draw_one(off, generator)
        return clean, corrupted, YES, NO

    # In an AND one clean head restores nothing; in an OR one corrupted head breaks nothing.
    both_needed = high > 1
    edges = {}
    for head in heads:
        edges["embed", node_name(head, "v")] = None
        edges[node_name(head), mlp_name(0)] = 0.0 if both_needed else 1.0
    flat = frozenset(edges)
    edges[mlp_name(0), "logits"] = None
    truth = Truth(restores={} if both_needed else dict.fromkeys(heads, 1.0),
                  breaks=dict.fromkeys(heads, 1.0) if both_needed else {},
                  removed=dict.fromkeys(heads, 2.0) if both_needed else {},
                  edges=edges, flat=flat)
    return WiredCircuit(name, board.finish(), answer, make_pair, truth)


def unused_bit(seed):
    """Two heads each read a bit of a token: one writes it to the answer, the other to an unread
    slot."""
    board = Board(seed)
    i, j = shuffled(range(1, N_CTX - 1), board.generator)[:2]
    on = shuffled(CONTENT, board.generator)[:5]
    sign = torch.tensor([[1.0 if token in on else -1.0] for token in CONTENT]).double()
    bit = (sign * board.slot_rows("token")).sum(0, keepdim=True)
    verdict = board.slot_rows("said", [YES]) - board.slot_rows("said", [NO])
    head = board.wire_head(0, looks=board.fixed_position(i), moves=(bit, verdict / 2))
    board.wire_head(0, looks=board.fixed_position(j), moves=(bit, board.slots["flag"]))
    board.wire_dead_heads()

    def answer(text):
        if len(text) <= i:
            return None
        return YES if text[i] in on else NO

    def make_pair(generator):
        clean = [BOS, *(draw_one(CONTENT, generator) for _ in range(N_CTX - 1))]
        corrupted = list(clean)
        for position in (i, j):
            was_on = clean[position] in on
            others = [token for token in CONTENT if (token in on) != was_on]
            corrupted[position] = draw_one(others, generator)
        right, wrong = (YES, NO) if clean[i] in on else (NO, YES)
        return clean, corrupted, right, wrong

    bits = {"used": lambda text: text[i] in on, "unused": lambda text: text[j] in on}
    return WiredCircuit("unused bit", board.finish(), answer, make_pair, truth_of_one_head(head),
                        bits)


def saturated_softmax(seed):
    """The first token names a position. One head passes it to the query of a second head
    (Q-composition), which looks there and predicts what it finds. All other keys get e^-20 of its
    attention, so no gradient passes."""
    board = Board(seed, n_layers=2)
    goals = dict(zip(shuffled(CONTENT, board.generator), itertools.cycle(range(2, N_CTX))))
    early = board.wire_head(0, looks=board.fixed_position(1),
                            moves=(board.slot_rows("token"),
                                   board.slot_rows("goal", map(goals.get, CONTENT))))
    late = board.wire_head(1, looks=(board.slots["goal"], board.slots["position"], 0.5),
                           moves=board.token_to_said())
    board.wire_dead_heads()

    def answer(text):
        return text[goals[text[1]]] if len(text) > 2 and goals[text[1]] < len(text) else None

    def make_pair(generator):
        text = shuffled(CONTENT, generator)[:N_CTX - 2]
        name = draw_one(CONTENT, generator)
        elsewhere = [token for token in CONTENT if goals[token] != goals[name]]
        other = draw_one(elsewhere, generator)
        clean = [BOS, name, *text]
        corrupted = [BOS, other, *text]
        return clean, corrupted, clean[goals[name]], clean[goals[other]]

    both = {early: 1.0, late: 1.0}
    through_query = {("embed", node_name(early, "v")): None,
                     (node_name(early), node_name(late, "q")): 1.0}
    truth = Truth(
        restores=both, breaks=both, slope={late: 1.0}, removed=both, direct={late: 1.0},
        edges=through_query | {(node_name(late), "logits"): 1.0}, flat=frozenset(through_query),
        copies={late: 1}, composes=frozenset({("Q", *early, *late)}))
    return WiredCircuit("saturated softmax", board.finish(), answer, make_pair, truth)
