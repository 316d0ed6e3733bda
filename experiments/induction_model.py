"""The model in which an induction circuit forms: its texts, its training, and which heads it is.

Every row is a segment of distinct random tokens, filling around it, and the segment again: how
long it is, where it begins and how far apart the two are differ from row to row. One row in four
is a *map* in its place: a few tokens, each of which is always followed by the same one of them,
but for random jumps. Segments alone can be told without an induction head: all tokens of a row come
again at one distance, which a model may learn to find and to look back by; in a map no one distance
holds. It must be no circle, in which each token also follows one alone: trained with `circles` in
place of maps the model finds another way, on which its loss falls and no head scores.

    model, history = trained(Path("outputs/induction_head_detection"), seed=0)
    found = circuit(model)            # found.previous, found.induction: (layer, head)

Chapter: COURSE_ROADMAP.md, 11 (induction)
Read before: train.py, metrics.py; after: experiments/induction_proof.py
Source: Olsson et al. 2022 (induction heads, their phase change); Elhage et al. 2021 (the circuit)
"""

import string
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from config import ModelConfig, TrainConfig
from experiments.common import as_run, load_or_make
from losses import per_token_loss
from metrics import (
    Metric,
    duplicate_token_score,
    earlier_occurrences,
    induction_score,
    prev_token_score,
)
from model import GPT
from tokenizer import CharTokenizer
from train import fit
from utils import Progress, seeded_generator

WORDS = string.printable  # 100 characters: names for the tokens, so that a run can be read
UNKNOWN = 0.1  # what a token counts in training that nothing before it tells
JUMPS = 0.25
MEASURED_ON = 999  # the seed of the texts that are measured, on which nothing is trained


@dataclass(frozen=True)
class Recipe:
    """All that the trained model depends on, but its seed."""

    n_layers: int = 2
    n_heads: int = 2
    d_model: int = 64
    n_ctx: int = 40
    steps: int = 1600
    batch_size: int = 32
    maps: float = 0.25
    circles: bool = False
    lr: float = 0.02
    muon_lr: float = 0.02
    every: int = 10


@dataclass(frozen=True)
class Repeats:
    """Texts in which a segment comes twice, and what varies from one to the next.

    n_pos: tokens a text. lengths, gaps: the least and the most of the segment's tokens, and of
    those between the two; it begins anywhere. counting: the ids of all that is not repeated count
    upwards, a, a + 1, …, in place of a random order; no token comes twice in either.
    """

    n_pos: int = 41
    d_vocab: int = len(WORDS)
    lengths: tuple[int, int] = (6, 16)
    gaps: tuple[int, int] = (0, 8)
    counting: bool = False

    def draw(self, n_rows, generator):
        """(tokens, known), each [batch, pos]; known: whether a token is told by those before it, as
        all of the second segment are but its first."""
        length = between(*self.lengths, n_rows, generator)
        gap = between(*self.gaps, n_rows, generator)
        start = between(0, self.n_pos - 2 * length - gap, n_rows, generator)
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


def maps(n_rows, n_pos, generator, circles=False):
    """(tokens, known), each [batch, pos]: 3 to 8 tokens, each followed by one of them, always the
    same, but for a random one in JUMPS of all places. circles: each by the next one."""
    size = between(3, 8, n_rows, generator)
    follower = (size * torch.rand(n_rows, 8, generator=generator)).long()
    follower = (torch.arange(8) + 1) % size if circles else follower
    jumps = torch.rand(n_rows, n_pos, generator=generator) < JUMPS
    jumps[:, 0] = True
    lands = (size * torch.rand(n_rows, n_pos, generator=generator)).long()
    path = [lands[:, :1]]
    for at in range(1, n_pos):
        on = follower.gather(1, path[-1])
        path.append(torch.where(jumps[:, at, None], lands[:, at, None], on))
    path = torch.cat(path, 1)
    gone_on = ~jumps.roll(-1, 1)  # whether each place is followed by its follower
    seen = (earlier_occurrences(path) & gone_on[:, None, :]).any(-1)  # [batch, pos]
    # Ids all even or all odd, so that none is followed by the next higher one.
    ids = 2 * torch.rand(n_rows, len(WORDS) // 2, generator=generator).argsort(-1)
    ids = ids + between(0, 1, n_rows, generator)
    return ids.gather(1, path), (seen & gone_on).roll(1, 1)


def training_batch(recipe, generator):
    """(inputs [batch, pos], targets [batch, pos, 2]: the next token and whether it is known).

    In no row does a token a follow a - 1: texts that count are made of pairs it has never seen.
    """
    n_maps, texts = round(recipe.maps * recipe.batch_size), Repeats(recipe.n_ctx + 1)
    n_rows = recipe.batch_size - n_maps
    tokens, known = texts.draw(4 * n_rows, generator)  # six in ten have no such pair
    fit_in = ((tokens.diff() - 1) % texts.d_vocab != 0).all(1).nonzero()[:n_rows, 0]
    parts = [(tokens[fit_in], known[fit_in]),
             maps(n_maps, recipe.n_ctx + 1, generator, recipe.circles)]
    tokens, known = (torch.cat(both) for both in zip(*parts, strict=True))
    return tokens[:, :-1], torch.stack([tokens[:, 1:], known[:, 1:].long()], -1)


def training_loss(logits, targets):
    """The mean surprise, in nats; what nothing tells counts UNKNOWN of what can be known."""
    weight = torch.where(targets[..., 1] == 1, 1.0, UNKNOWN)
    return (weight * per_token_loss(logits, targets[..., 0])).sum() / weight.sum()


def trained(folder, seed, recipe=None, *, retrain=False):
    """(model, history): the model of a seed, trained, or read where it has been.

    folder: the experiment's, in which the run seed_0 is made (one_layer_seed_0, circles_seed_0).
    recipe: a Recipe, the default one unless given. retrain: train it though it is there.
    history: a list of `measured`, from step 0 on.
    """
    recipe = recipe or Recipe()
    kind = "one_layer_" * (recipe.n_layers == 1) + "circles_" * recipe.circles
    cfg = ModelConfig(recipe.n_layers, recipe.n_heads, recipe.d_model, n_ctx=recipe.n_ctx,
                      d_vocab=len(WORDS), attn_only=True)

    def make():
        model = GPT(cfg, seed)
        history = list(training(model, recipe, seed))
        return as_run(model, CharTokenizer().fit(WORDS), history=history)

    state = load_or_make(Path(folder) / f"{kind}seed_{seed}" / "checkpoint.pt",
                 asdict(recipe) | {"seed": seed, "unknown": UNKNOWN, "jumps": JUMPS,
                                   "texts": asdict(Repeats(recipe.n_ctx + 1))}, make, retrain)
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
    """(on what is known, on what is not): the mean loss in nats a token. tokens, known: [batch,
    pos]."""
    each = torch.cat([per_token_loss(model(some[:, :-1]), some[:, 1:])
                      for some in tokens.split(16)])  # GPT-2's logits are large
    return each[known[:, 1:]].mean().item(), each[~known[:, 1:]].mean().item()


def repeats_metric(tokens, known):
    """The loss on what is known of each row, in nats a token: a Metric, [..., batch]."""
    targets, told = tokens[:, 1:], known[:, 1:].float()

    def of(logits):
        each = per_token_loss(logits, targets.expand(logits.shape[:-1]))
        return (each * told).sum(-1) / told.sum(-1)

    return Metric(of)


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
    """The loss on tokens 32 to 39 less that on tokens 8 to 15, in nats, of texts that are 20 tokens
    and the same again: below 0 where what came before is made use of."""
    texts = Repeats(40, lengths=(20, 20), gaps=(0, 0))
    tokens, _ = texts.draw(16, seeded_generator(MEASURED_ON))
    loss = per_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean(0)
    return (loss[31:39].mean() - loss[7:15].mean()).item()


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
