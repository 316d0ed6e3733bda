"""The model in which an induction circuit forms: its texts, its training, and which heads it is.

Every row is a segment of distinct random tokens, filling around it, and the segment again: how
long it is, where it begins and how far apart the two are differ from row to row. One row in four
is a *map* in place of it: a few tokens, each followed by one and the same, but for random jumps.
In segments alone the second occurrence lies a fixed distance behind the first, for all tokens of
a row, and a model may learn to look that far back, with little loss and no induction head. In a map
a token has been there many times, at no fixed distance, and only what followed it then is of use.

    model, history = trained(Path("outputs/induction_head_detection"), seed=0)
    found = circuit(model)            # found.previous, found.induction: (layer, head)

Chapter: COURSE_ROADMAP.md, 11 (induction)
Read before: train.py, metrics.py; after: experiments/induction_proof.py
Source: Olsson et al. 2022 (induction heads, their phase change); Elhage et al. 2021 (the circuit)
"""

import string
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from config import ModelConfig, TrainConfig
from experiments.common import as_run, kept
from losses import per_token_loss
from metrics import duplicate_token_score, induction_score, prev_token_score
from model import GPT
from tokenizer import CharTokenizer
from train import fit
from utils import Progress, seeded_generator

WORDS = string.printable  # 100 characters: names for the tokens, so that a run can be read
UNKNOWN = 0.1  # what a token counts in training that nothing before it tells
MEASURED_ON = 999  # the seed of the texts that are measured, on which nothing is trained


@dataclass(frozen=True)
class Recipe:
    """All that the trained model depends on, but its seed."""

    n_layers: int = 2
    n_heads: int = 2
    d_model: int = 64
    n_ctx: int = 48
    steps: int = 1400
    batch_size: int = 32
    maps: float = 0.25
    lr: float = 0.02
    muon_lr: float = 0.02
    every: int = 10


@dataclass(frozen=True)
class Repeats:
    """Texts in which a segment comes twice, and what varies from one to the next.

    n_pos: tokens a text. lengths, gaps: the least and the most of the segment's tokens, and of
    those between the two; it begins anywhere. cut: the text's end may cut the second one off, so
    that late places too are followed by a repeat. counting: the ids of all that is not repeated
    count upwards, a, a + 1, …, in place of a random order; no token comes twice in either.
    """

    n_pos: int = 49
    d_vocab: int = len(WORDS)
    lengths: tuple[int, int] = (4, 18)
    gaps: tuple[int, int] = (0, 8)
    cut: bool = True
    counting: bool = False

    def draw(self, n_rows, generator):
        """(tokens, known), each [batch, pos]; known: whether a token is told by those before it, as
        all of the second segment are but its first."""
        length = between(*self.lengths, n_rows, generator)
        gap = between(*self.gaps, n_rows, generator)
        least = 2 if self.cut else length  # of the second segment
        start = between(0, self.n_pos - length - gap - least, n_rows, generator)
        if self.counting:
            first = between(0, self.d_vocab - 1, n_rows, generator)
            order = (first + torch.arange(self.n_pos)) % self.d_vocab
        else:
            order = torch.rand(n_rows, self.d_vocab, generator=generator).argsort(-1)
        at, again = torch.arange(self.n_pos), start + length + gap  # [pos], [batch, 1]
        second = (again <= at) & (at < again + length)
        source = torch.where(second, at - length - gap, at)  # [batch, pos]
        return order.gather(1, source), second & (at > again)


def between(low, high, n_rows, generator):
    """Whole numbers from low to high, both included, which may be [batch, 1]: [batch, 1]."""
    return low + ((high - low + 1) * torch.rand(n_rows, 1, generator=generator)).long()


def maps(n_rows, n_pos, d_vocab, generator):
    """(tokens, known), each [batch, pos]: 3 to 8 tokens, of which each has one that follows it, but
    for a random one in a quarter of all places."""
    size = between(3, 8, n_rows, generator)
    follower = (size * torch.rand(n_rows, 8, generator=generator)).long()
    jumps = torch.rand(n_rows, n_pos, generator=generator) < 0.25
    jumps[:, 0] = True
    anywhere = (size * torch.rand(n_rows, n_pos, generator=generator)).long()
    seen, here, text, known = torch.zeros(n_rows, 8, dtype=torch.bool), anywhere[:, :1], [], []
    for jump, other in zip(jumps.T[..., None], anywhere.T[..., None], strict=True):
        known.append(seen.gather(1, here) & ~jump)
        seen = seen.scatter(1, here, seen.gather(1, here) | ~jump)
        here = torch.where(jump, other, follower.gather(1, here))
        text.append(here)
    # Ids all even or all odd, so that none is followed by the next higher one.
    ids = 2 * torch.rand(n_rows, d_vocab // 2, generator=generator).argsort(-1)
    ids = ids + between(0, 1, n_rows, generator)
    return ids.gather(1, torch.cat(text, 1)), torch.cat(known, 1)


def training_batch(recipe, generator):
    """(inputs [batch, pos], targets [batch, pos, 2]: the next token and whether it is known).

    In no row does a token a follow a - 1: texts that count are made of pairs it has never seen.
    """
    n_maps, texts = round(recipe.maps * recipe.batch_size), Repeats(recipe.n_ctx + 1)
    n_rows = recipe.batch_size - n_maps
    tokens, known = texts.draw(4 * n_rows, generator)  # six in ten have no such pair
    fit_in = ((tokens.diff() - 1) % texts.d_vocab != 0).all(1).nonzero()[:n_rows, 0]
    parts = [(tokens[fit_in], known[fit_in]),
             maps(n_maps, recipe.n_ctx + 1, texts.d_vocab, generator)]
    tokens, known = (torch.cat(both) for both in zip(*parts, strict=True))
    return tokens[:, :-1], torch.stack([tokens[:, 1:], known[:, 1:].long()], -1)


def training_loss(logits, targets):
    """The mean surprise, in nats; what nothing tells counts UNKNOWN of what can be known."""
    weight = torch.where(targets[..., 1] == 1, 1.0, UNKNOWN)
    return (weight * per_token_loss(logits, targets[..., 0])).sum() / weight.sum()


def trained(folder, seed, recipe=None, *, retrain=False):
    """(model, history): the model of a seed, trained, or read where it has been.

    folder: the experiment's, in which the run seed_0 is made (one_layer_seed_0 for one layer).
    recipe: a Recipe, the default one unless given. history: a list of `measured`, from step 0.
    """
    recipe = recipe or Recipe()
    layers = "" if recipe.n_layers == 2 else f"{recipe.n_layers}_layers_"
    cfg = ModelConfig(recipe.n_layers, recipe.n_heads, recipe.d_model, n_ctx=recipe.n_ctx,
                      d_vocab=len(WORDS), attn_only=True)

    def make():
        model = GPT(cfg, seed)
        history = list(training(model, recipe, seed))
        return as_run(model, CharTokenizer().fit(WORDS), history=history)

    state = kept(Path(folder) / f"{layers}seed_{seed}" / "checkpoint.pt",
                 asdict(recipe) | {"seed": seed}, make, retrain)
    model = GPT(cfg, seed=None)
    model.load_state_dict(state["model"])
    return model.eval(), state["history"]


def training(model, recipe, seed):
    """Trains the model in place, and yields a `measured` every few steps, the first one before."""
    how = TrainConfig(max_steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lr,
                      muon_lr=recipe.muon_lr, warmup_steps=20, weight_decay=0.0)
    generator, progress = seeded_generator(seed), Progress(recipe.steps, " steps")
    yield measured(model, 0)
    for step in fit(model, lambda: training_batch(recipe, generator), how, loss_fn=training_loss):
        if step.number % recipe.every == 0 or step.number == recipe.steps:
            row = measured(model, step.number)
            yield row
            progress.show(step.number, f"seed {seed}, {model.cfg.n_layers} layers: "
                          f"loss on repeats {row['repeats']:.2f}")
    progress.close()


# What is measured


@torch.no_grad()
def losses(model, tokens, known):
    """(on what is known, on what is not): the mean loss in nats a token. Both [batch, pos]."""
    each, told = per_token_loss(model(tokens[:, :-1]), tokens[:, 1:]), known[:, 1:]
    return each[told].mean().item(), each[~told].mean().item()


@torch.no_grad()
def head_scores(model, tokens):
    """{kind: [layer, batch, head]}: how much each head looks at the previous token, at what came
    after an earlier occurrence of its token, and at that occurrence. tokens: [batch, pos]."""
    _, cache = model.run_with_cache(tokens, lambda name: name.endswith("hook_pattern"))
    pattern = cache.stack("pattern")
    return {"previous-token": prev_token_score(pattern),
            "induction": induction_score(pattern, tokens),
            "duplicate-token": duplicate_token_score(pattern, tokens)}


@torch.no_grad()
def in_context_score(model):
    """The loss on tokens 40 to 47 less that on tokens 8 to 15, in nats, of texts that are 24 tokens
    and the same again: below 0 where what came before is made use of."""
    texts = Repeats(48, lengths=(24, 24), gaps=(0, 0), cut=False)
    tokens, _ = texts.draw(16, seeded_generator(MEASURED_ON))
    loss = per_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean(0)
    return (loss[39:47].mean() - loss[7:15].mean()).item()


def measured(model, step=None):
    """A dict: step, the losses on repeats and on first occurrences (nats a token), the in-context
    score (nats), and each head's previous-token and induction score, [layer][head]."""
    tokens, known = Repeats(model.cfg.n_ctx + 1).draw(32, seeded_generator(MEASURED_ON))
    repeats, first = losses(model, tokens, known)
    scores = head_scores(model, tokens[:, :-1])
    return {"step": step, "repeats": repeats, "first": first,
            "in_context": in_context_score(model),
            **{kind: scores[kind].mean(1).tolist() for kind in ("previous-token", "induction")}}


@dataclass(frozen=True)
class Circuit:
    """The head of each part, (layer, head), by its score; beside it all that score above one half,
    and, of the first layers, those that do not."""

    previous: tuple[int, int]
    induction: tuple[int, int]
    all_induction: tuple
    others: tuple


def circuit(model):
    """The Circuit of a model of two layers or more: the previous-token head is looked for below the
    last layer, the induction head in it."""
    row, last = measured(model), model.cfg.n_layers - 1
    looks = torch.tensor(row["previous-token"])[:last]
    finds = torch.tensor(row["induction"])
    previous = divmod(looks.argmax().item(), model.cfg.n_heads)
    induction = (last, finds[last].argmax().item())
    every = {induction} | {(last, head) for head in range(model.cfg.n_heads)
                           if finds[last, head] > 0.5}
    others = [tuple(head) for head in (looks < 0.5).nonzero().tolist() if tuple(head) != previous]
    return Circuit(previous, induction, tuple(sorted(every)), tuple(others))


def shorter(recipe, quick):
    """The recipe, or one of a few steps, to see that it runs."""
    return replace(recipe, steps=30) if quick else recipe
