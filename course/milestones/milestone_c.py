"""Milestone C: causal tracing on prompts that the learner wrote.

The file exercises/tracing.json names a model, heads that carry the answer, and two lists of pairs
of prompts. In `prompts`, clean and corrupted differ in what decides the answer; in `controls`, in
something that does not. Both lists are patched, and the heads must carry the answer of the first
and do nothing in the second.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from activation_cache import head_label
from checkpoint import load_model
from course.engine.expect import expect
from course.engine.milestones import Milestone, NotYet
from metrics import Metric
from model import GPT
from patching import get_act_patch_resid_pre, replace_with
from utils import UserError, read_json, write_json

FILE = "tracing.json"
FIELDS = ("clean", "corrupted", "answer", "wrong")
LEAST_PAIRS = 4  # of prompts, and of controls
LEAST_LEAD = 0.5  # nats by which the model prefers the right answer
LEAST_AT_ONE_PLACE = 0.7  # share of the answer
LEAST_CARRIED = 0.7  # share of the answer that the heads restore, and that is lost with them
MOST_IN_CONTROLS = 0.2
EXAMPLE = {
    "model": "gifts",
    "heads": ["L0H0"],
    "prompts": [
        {"clean": "\nWhen Ada and Ben went to the park, Ada gave a kite to",
         "corrupted": "\nWhen Ada and Ben went to the park, Ben gave a kite to",
         "answer": "Ben", "wrong": "Ada"}],
    "controls": [],
}


@dataclass
class Pair:
    """Two prompts. label: "prompt 2". clean_tokens, corrupted_tokens: [1, pos]. answer, wrong: ids;
    each of them a list until it is known to be one token."""

    label: str
    clean_tokens: torch.Tensor
    corrupted_tokens: torch.Tensor
    answer: list
    wrong: list
    words: dict

    @property
    def metric(self):
        """The lead of the answer over the wrong one at the last position, in nats."""
        return Metric.logit_diff(self.answer[0], self.wrong[0])


@dataclass
class Work:
    """What the file says. heads: [(layer, head)]."""

    model: GPT
    heads: list
    prompts: list
    controls: list


def gather(folder, given):
    """The Work of the learner's file, or of the file `given`. Without a file, writes an example."""
    path = Path(given or folder / FILE)
    shown = f"{path.parent.name}/{path.name}"
    if not path.exists():
        if given is None:
            folder.mkdir(exist_ok=True)
            write_json(path, EXAMPLE)
            raise NotYet(f"{shown} was not there and holds an example now; write your own prompts "
                         "and controls into it, and the heads that carry the answer")
        raise UserError(f"{shown} is not there")
    found = read_json(path, "correct it, or delete it and be given the example again")
    check_form(found, shown)

    try:
        model, tokenizer = load_model(found["model"])
    except UserError as problem:
        raise NotYet(f"{problem} (chapter 8's block keeps gifts: make block CHAPTER=8)") from None
    model.check_predicts_tokens("the answers are words: name a model of text")
    pairs = {kind: [read_pair(tokenizer, words, f"{kind[:-1]} {place}")
                    for place, words in enumerate(found[kind], 1)]
             for kind in ("prompts", "controls")}
    return Work(model=model, heads=[read_head(model, label) for label in found["heads"]], **pairs)


def check_form(found, shown):
    """Raises UserError unless the file has the fields of the example."""
    if not isinstance(found, dict) or set(found) != set(EXAMPLE):
        raise UserError(f"{shown} needs the fields {', '.join(EXAMPLE)}, and no others")
    if not isinstance(found["model"], str):
        raise UserError(f"{shown}: model needs a name in quotes, such as \"gifts\"")
    for kind in ("heads", "prompts", "controls"):
        if not isinstance(found[kind], list):
            raise UserError(f"{shown}: {kind} needs a list in square brackets")
    for kind in ("prompts", "controls"):
        for place, pair in enumerate(found[kind], 1):
            if not isinstance(pair, dict) or set(pair) != set(FIELDS):
                raise UserError(f"{shown}: {kind[:-1]} {place} needs the fields "
                                f"{', '.join(FIELDS)}, and no others")


def read_pair(tokenizer, words, label):
    """A Pair from its four texts. Raises UserError, naming it, for what the tokenizer lacks."""
    try:
        clean, corrupted, answer, wrong = (tokenizer.encode(str(words[field])) for field in FIELDS)
    except UserError as problem:
        raise UserError(f"{label}: {problem}") from None
    return Pair(label, torch.tensor([clean]), torch.tensor([corrupted]), answer, wrong, words)


def read_head(model, label):
    """(layer, head) of a label such as L0H1. Raises UserError where the model has no such head."""
    found = re.fullmatch(r"L(\d+)H(\d+)", str(label))
    layer, head = (int(number) for number in found.groups()) if found else (-1, -1)
    if not (0 <= layer < model.cfg.n_layers and 0 <= head < model.cfg.n_heads):
        raise UserError(f"{label} is no head of this model of {model.cfg.n_layers} layers of "
                        f"{model.cfg.n_heads}; write L0H1 for head 1 of layer 0")
    return layer, head


# Measuring


def lead(model, tokens, pair, edits=()):
    """The metric of one run, a float; edits: hooks."""
    with torch.no_grad():
        return pair.metric(model.run_with_hooks(tokens, fwd_hooks=list(edits))).item()


def effect(model, pair, heads, direction):
    """(effect, gap) in nats: how far the lead moves if heads take their values from the other run,
    and how far it is to the other run's lead."""
    own, source = pair.corrupted_tokens, pair.clean_tokens
    if direction == "noising":
        own, source = source, own
    with torch.no_grad():
        _, cache = model.run_with_cache(source, lambda name: name.endswith("hook_z"))
    edits = []
    for layer in sorted({layer for layer, _ in heads}):
        name = f"blocks.{layer}.attn.hook_z"
        edits.append((name, replace_with(cache[name], [h for at, h in heads if at == layer])))
    before = lead(model, own, pair)
    return lead(model, own, pair, edits) - before, lead(model, source, pair) - before


def share_of(model, pairs, heads, direction):
    """The share of the answer that heads carry, over all pairs."""
    found = [effect(model, pair, heads, direction) for pair in pairs]
    return sum(moved for moved, _ in found) / sum(gap for _, gap in found)


def names_of(heads):
    """The labels of heads, "L0H1, L1H0"."""
    return ", ".join(head_label(*head) for head in heads)


# Checks


def the_pairs_are_well_formed(work):
    """in each pair clean and corrupted are two prompts of one length that end alike, and the two
    answers are one token each"""
    for pair in work.prompts + work.controls:
        sizes = (pair.clean_tokens.shape[1], pair.corrupted_tokens.shape[1])
        expect(min(sizes) > 0, f"{pair.label}: one of the two prompts is empty")
        expect(sizes[0] == sizes[1], f"{pair.label}: clean has {sizes[0]} tokens and corrupted "
               f"{sizes[1]}, so that a position is not the same place in both")
        expect(not torch.equal(pair.clean_tokens, pair.corrupted_tokens),
               f"{pair.label}: clean and corrupted are the same text; patching can't move anything")
        expect(pair.clean_tokens[0, -1] == pair.corrupted_tokens[0, -1],
               f"{pair.label}: clean and corrupted end with different tokens, so that the last "
               "position carries everything from the start")
        for field, ids in (("answer", pair.answer), ("wrong", pair.wrong)):
            expect(len(ids) == 1, f"{pair.label}: {field} {pair.words[field]!r} is {len(ids)} "
                   "tokens of this model; the metric reads one (is a space missing, or one too "
                   "many?)")
        expect(pair.answer != pair.wrong, f"{pair.label}: answer and wrong are the same word")


def there_are_enough(work):
    """there are four pairs of prompts or more, and four controls, no two alike"""
    for kind, pairs in (("prompts", work.prompts), ("controls", work.controls)):
        texts = {(pair.words["clean"], pair.words["corrupted"]) for pair in pairs}
        expect(len(texts) == len(pairs), f"two of the {kind} are the same: each counts once")
        expect(len(pairs) >= LEAST_PAIRS, f"{kind}: {len(pairs)} so far; write at least "
               f"{LEAST_PAIRS}, since a single one may work by luck")


def the_model_knows_the_answers(work):
    """the model prefers the answer in clean and the wrong one in corrupted"""
    for pair in work.prompts:
        clean = lead(work.model, pair.clean_tokens, pair)
        corrupted = lead(work.model, pair.corrupted_tokens, pair)
        answer, wrong = pair.words["answer"], pair.words["wrong"]
        expect(not (clean < -LEAST_LEAD and corrupted > LEAST_LEAD), f"{pair.label} is the wrong "
               f"way round: in clean the model prefers {wrong!r} by {-clean:.1f} nats, and in "
               f"corrupted {answer!r}: exchange the two prompts, or the two answers")
        expect(clean > LEAST_LEAD, f"{pair.label}: in clean, {answer!r} leads {wrong!r} by "
               f"{clean:.1f} nats; the model does not know the answer, so there is nothing to "
               "trace")
        expect(corrupted < -LEAST_LEAD, f"{pair.label}: in corrupted, {answer!r} still leads by "
               f"{corrupted:.1f} nats; change what decides the answer")


def the_effect_is_at_one_place(work):
    """before each block, one position carries most of the answer: a share of 0.7"""
    n_layers = work.model.cfg.n_layers
    best = torch.zeros(n_layers)
    for pair in work.prompts:
        with torch.no_grad():
            _, cache = work.model.run_with_cache(pair.clean_tokens)
        found = get_act_patch_resid_pre(work.model, pair.corrupted_tokens, cache, pair.metric)
        best += found.normalized().max(-1).values / len(work.prompts)
    layer = best.argmin().item()
    expect(best[layer] > LEAST_AT_ONE_PLACE, f"before block {layer}, the position that carries "
           f"most restores {best[layer]:.2f} of the answer on average: the two prompts differ in "
           "more than one thing, or the answer is on its way through several places there")


def the_heads_carry_the_answer(work):
    """the heads that you name, at most half of all, restore 0.7 of it and are needed for 0.7"""
    n_heads = work.model.cfg.n_layers * work.model.cfg.n_heads
    named = sorted(set(work.heads))
    expect(0 < len(named) <= n_heads // 2, f"you name {len(named)} of {n_heads} heads: name at "
           "least one, and at most half of them")
    enough = share_of(work.model, work.prompts, named, "denoising")
    expect(enough > LEAST_CARRIED, f"patching {names_of(named)} from clean into corrupted restores "
           f"{enough:.2f} of the answer: other heads carry it, or carry it too")
    needed = share_of(work.model, work.prompts, named, "noising")
    expect(needed > LEAST_CARRIED, f"patching {names_of(named)} restores {enough:.2f} of the "
           f"answer, but patched from corrupted into clean only {needed:.2f} of it is lost: they "
           "are enough and not needed, so another head does the same; name it, too")


def the_controls_show_nothing(work):
    """in the controls the model gives the same answer twice, and the same heads move it by less
    than 0.2 of what they move in the prompts"""
    # Whatever the heads do, they hardly move the lead of one unrelated word over another
    asked = {ids[0] for pair in work.prompts for ids in (pair.answer, pair.wrong)}
    for pair in work.controls:
        for field, ids in (("answer", pair.answer), ("wrong", pair.wrong)):
            expect(ids[0] in asked, f"{pair.label}: its {field} {pair.words[field]!r} is neither "
                   "answer nor wrong in any prompt; a control asks for the words that the prompts "
                   "ask for")

    moved = [effect(work.model, pair, work.heads, "denoising")[0] for pair in work.prompts]
    scale = abs(sum(moved)) / len(moved)
    for pair in work.controls:
        for which, tokens in (("clean", pair.clean_tokens), ("corrupted", pair.corrupted_tokens)):
            ahead = lead(work.model, tokens, pair)
            expect(ahead > LEAST_LEAD, f"{pair.label}: in {which}, {pair.words['answer']!r} leads "
                   f"by {ahead:.1f} nats; a control changes something that leaves the answer as it "
                   "is")
    shares = [abs(effect(work.model, pair, work.heads, "denoising")[0]) / scale
              for pair in work.controls]
    mean = sum(shares) / len(shares)
    expect(mean < MOST_IN_CONTROLS, f"in the controls, patching {names_of(work.heads)} moves the "
           f"lead by {mean:.2f} of what it moves in the prompts: so this is not about the answer "
           "alone")


MILESTONE = Milestone(
    letter="C", title="causal tracing", chapter=9,
    hand_in=f"exercises/{FILE}, with prompts, controls, and the heads that carry the answer",
    gather=gather,
    checks=(the_pairs_are_well_formed, there_are_enough, the_model_knows_the_answers,
            the_effect_is_at_one_place, the_heads_carry_the_answer, the_controls_show_nothing))
