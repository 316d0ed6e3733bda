"""The model in which an induction circuit forms: its texts, its training, and which heads it is.

Every row of a text is a segment of distinct random tokens, filling around it, and the segment
again. How long the segment is, where it begins and how far apart the two are differ from row to
row.

One row in four is a *map* instead: a few tokens, each of which is always followed by the same one
of them, but for random jumps. Segments alone can be predicted without an induction head: all tokens
of a row come again at one distance, which a model may learn to find and to look back by. In a map
no single distance holds.

A map must not be a circle, in which each token also follows only one other. A model that is trained
with `circles` instead of maps finds another way: its loss falls, and no head scores.

    model, history = trained_induction_model(Path("outputs/induction_head_detection"), seed=0)
    circuit = find_circuit(model)     # circuit.previous, circuit.induction: (layer, head)

Chapter: COURSE_ROADMAP.md, 11 (induction)
Prerequisites: train.py, metrics.py
Next: experiments/induction/measure.py
Source: Olsson et al. 2022 (induction heads, their phase change); Elhage et al. 2021 (the circuit)
"""

import string
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from config import ModelConfig, TrainConfig
from experiments.common import Trainings, trained_gpt
from losses import per_token_loss
from metrics import (
    Metric,
    duplicate_token_score,
    earlier_occurrences,
    induction_score,
    prev_token_score,
)
from tokenizer import CharTokenizer
from train import fit
from utils import seeded_generator

WORDS = string.printable  # 100 characters: names for the tokens, so that a run can be read
UNKNOWN = 0.1  # the weight in training of a token that nothing before it tells
JUMPS = 0.25  # the share of a map's places that a random token takes
MEASURED_ON = 999  # the seed of the texts that are measured, on which nothing is trained


@dataclass(frozen=True)
class InductionRecipe:
    """All that the trained model depends on, but its seed.

    maps: the share of rows that are maps; circles: whether these are circles. every: steps between
    two measurements.
    """

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


# The texts


@dataclass(frozen=True)
class Repeats:
    """Texts in which a segment comes twice, and what varies from one to the next.

    n_pos: tokens a text. lengths: the least and the most tokens of the segment; gaps: the least and
    the most tokens between the two. The segment begins anywhere. counting: the ids of all that is
    not repeated count upwards, a, a + 1, …, instead of coming in a random order. Either way no
    token comes twice outside of the segment.
    """

    n_pos: int = 41
    d_vocab: int = len(WORDS)
    lengths: tuple[int, int] = (6, 16)
    gaps: tuple[int, int] = (0, 8)
    counting: bool = False

    def draw(self, n_rows, generator):
        """(tokens, known), each [batch, pos].

        known: whether the tokens before tell this one, as they do for all of the second segment but
        its first token.
        """
        length = random_integers(*self.lengths, n_rows, generator)
        gap = random_integers(*self.gaps, n_rows, generator)
        start = random_integers(0, self.n_pos - 2 * length - gap, n_rows, generator)

        # One order of all ids a row, of which the text takes the first ones.
        if self.counting:
            first = random_integers(0, self.d_vocab - 1, n_rows, generator)
            order = (first + torch.arange(self.n_pos)) % self.d_vocab
        else:
            order = torch.rand(n_rows, self.d_vocab, generator=generator).argsort(-1)

        # The second segment takes its tokens from the places of the first.
        pos = torch.arange(self.n_pos)
        again = start + length + gap  # [batch, 1], where the second segment begins
        in_second = (again <= pos) & (pos < again + length)
        source = torch.where(in_second, pos - length - gap, pos)  # [batch, pos]
        return order.gather(1, source), in_second & (pos > again)


def random_integers(low, high, n_rows, generator):
    """Random whole numbers [batch, 1] from low to high, both included; each may be [batch, 1]."""
    return low + ((high - low + 1) * torch.rand(n_rows, 1, generator=generator)).long()


def draw_maps(n_rows, n_pos, generator, circles=False):
    """(tokens, known), each [batch, pos]: texts that walk from a token to the one that follows it.

    A row has 3 to 8 tokens, each always followed by the same one of them, but for a random one in
    JUMPS of all places. circles: each is followed by the next one. known: as in `Repeats.draw`.
    """
    size = random_integers(3, 8, n_rows, generator)
    follower = (size * torch.rand(n_rows, 8, generator=generator)).long()
    if circles:
        follower = (torch.arange(8) + 1) % size

    # The walk, in numbers of the row's own tokens.
    jumps = torch.rand(n_rows, n_pos, generator=generator) < JUMPS
    jumps[:, 0] = True
    landings = (size * torch.rand(n_rows, n_pos, generator=generator)).long()
    path = [landings[:, :1]]
    for pos in range(1, n_pos):
        followed = follower.gather(1, path[-1])
        path.append(torch.where(jumps[:, pos, None], landings[:, pos, None], followed))
    path = torch.cat(path, 1)

    # A token is known where the one before it was there already, and was followed then too.
    goes_on = ~jumps.roll(-1, 1)  # whether each place is followed by its follower
    seen = (earlier_occurrences(path) & goes_on[:, None, :]).any(-1)  # [batch, pos]
    known = (seen & goes_on).roll(1, 1)

    # Ids all even or all odd, so that none is followed by the next higher one.
    ids = 2 * torch.rand(n_rows, len(WORDS) // 2, generator=generator).argsort(-1)
    ids = ids + random_integers(0, 1, n_rows, generator)
    return ids.gather(1, path), known


def training_batch(recipe, generator):
    """(inputs [batch, pos], targets [batch, pos, 2]: the next token and whether it is known).

    In no row does a token a follow a - 1, so that texts whose ids count upwards are made of pairs
    that the model has never seen.
    """
    n_maps = round(recipe.maps * recipe.batch_size)
    n_repeats = recipe.batch_size - n_maps

    # Four times as many as are wanted, since only six in ten have no such pair.
    texts = Repeats(recipe.n_ctx + 1)
    tokens, known = texts.draw(4 * n_repeats, generator)
    allowed = ((tokens.diff() - 1) % texts.d_vocab != 0).all(1).nonzero()[:n_repeats, 0]

    map_tokens, map_known = draw_maps(n_maps, recipe.n_ctx + 1, generator, recipe.circles)
    tokens = torch.cat([tokens[allowed], map_tokens])
    known = torch.cat([known[allowed], map_known])
    return tokens[:, :-1], torch.stack([tokens[:, 1:], known[:, 1:].long()], -1)


def training_loss(logits, targets):
    """The weighted mean loss, in nats a token: weight 1 for a known token, UNKNOWN for another."""
    weight = torch.where(targets[..., 1] == 1, 1.0, UNKNOWN)
    return (weight * per_token_loss(logits, targets[..., 0])).sum() / weight.sum()


# The training


def trained_induction_model(folder, seed, recipe=None, *, retrain=False, trainings=None):
    """(model, history): the model of a seed, trained, or read where it was kept.

    folder: the experiment's, in which the run seed_0 is made (one_layer_seed_0, circles_seed_0).
    recipe: an InductionRecipe, the default one unless given. retrain: train it though it is there.
    history: a list of what `measure_heads` gives, from step 0 on.
    """
    recipe = recipe or InductionRecipe()
    cfg = ModelConfig(recipe.n_layers, recipe.n_heads, recipe.d_model, n_ctx=recipe.n_ctx,
                      d_vocab=len(WORDS), attn_only=True)

    name = f"seed_{seed}"
    if recipe.circles:
        name = f"circles_{name}"
    if recipe.n_layers == 1:
        name = f"one_layer_{name}"

    def train(model):
        return {"history": train_and_measure(model, recipe, seed, trainings)}

    settings = asdict(recipe) | {"unknown": UNKNOWN, "jumps": JUMPS,
                                 "texts": asdict(Repeats(recipe.n_ctx + 1))}
    model, state = trained_gpt(Path(folder) / name / "checkpoint.pt", cfg, seed, train,
                               tokenizer=CharTokenizer().fit(WORDS), settings=settings,
                               retrain=retrain, trainings=trainings)
    return model, state["history"]


def train_and_measure(model, recipe, seed, trainings=None):
    """Trains the model in place. Returns a list of what `measure_heads` gives every few steps, the
    first one before any training. trainings: the Trainings that this is one of, for the progress.
    """
    how = TrainConfig(max_steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lr,
                      muon_lr=recipe.muon_lr, warmup_steps=20, weight_decay=0.0)
    generator = seeded_generator(seed)

    def next_batch():
        return training_batch(recipe, generator)

    trainings = trainings or Trainings([recipe.steps])
    layers = "one layer" if recipe.n_layers == 1 else f"{recipe.n_layers} layers"
    trainings.begin(f"{layers}{', circles' if recipe.circles else ''}, seed {seed}")
    history = [measure_heads(model, 0)]
    for step in fit(model, next_batch, how, loss_fn=training_loss):
        if step.number % recipe.every == 0 or step.number == recipe.steps:
            history.append(measure_heads(model, step.number))
            trainings.show(step.number, f"loss on repeats {history[-1]['repeats']:.2f}")
    trainings.close()
    return history


# What is measured during training


@torch.no_grad()
def repeat_losses(model, tokens, known):
    """(mean loss of the known tokens, of the others), in nats a token; tokens, known: [batch, pos].
    """
    each = torch.cat([per_token_loss(model(some[:, :-1]), some[:, 1:])
                      for some in tokens.split(16)])  # GPT-2's logits are large
    return each[known[:, 1:]].mean().item(), each[~known[:, 1:]].mean().item()


def repeats_metric(tokens, known):
    """A Metric [..., batch]: the mean loss of each row's known tokens, in nats a token."""
    targets = tokens[:, 1:]
    weight = known[:, 1:].float()

    def loss_of_known(logits):
        each = per_token_loss(logits, targets.expand(logits.shape[:-1]))
        return (each * weight).sum(-1) / weight.sum(-1)

    return Metric(loss_of_known)


@torch.no_grad()
def head_scores(model, tokens):
    """{kind: [layer, batch, head]}: shares of each head's attention, from 0 to 1.

    The attention to the token before (previous-token), to the token after an earlier occurrence of
    its own (induction), and to that occurrence (duplicate-token). tokens: [batch, pos].
    """
    _, cache = model.run_with_cache(tokens, lambda name: name.endswith("hook_pattern"))
    pattern = cache.stack("pattern")
    return {"previous-token": prev_token_score(pattern),
            "induction": induction_score(pattern, tokens),
            "duplicate-token": duplicate_token_score(pattern, tokens)}


@torch.no_grad()
def in_context_score(model):
    """The mean loss on tokens 32 to 39, minus that on tokens 8 to 15, in nats a token.

    The texts are 20 tokens and the same again. Below 0 where a model makes use of what came before.
    """
    texts = Repeats(40, lengths=(20, 20), gaps=(0, 0))
    tokens, _ = texts.draw(16, seeded_generator(MEASURED_ON))
    loss = per_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean(0)
    return (loss[31:39].mean() - loss[7:15].mean()).item()


def measure_heads(model, step=None):
    """The losses and the heads' scores of a model, as a dict of plain values.

    step; repeats and first: the losses on repeats and on first occurrences (nats a token);
    in_context: the in-context score (nats a token); previous-token and induction: each head's
    score, [layer][head].
    """
    tokens, known = Repeats(model.cfg.n_ctx + 1).draw(32, seeded_generator(MEASURED_ON))
    repeats, first = repeat_losses(model, tokens, known)
    scores = head_scores(model, tokens[:, :-1])
    return {"step": step, "repeats": repeats, "first": first,
            "in_context": in_context_score(model),
            "previous-token": scores["previous-token"].mean(1).tolist(),
            "induction": scores["induction"].mean(1).tolist()}


# Which heads it is


@dataclass(frozen=True)
class InductionCircuit:
    """The heads of an induction circuit, each (layer, head).

    previous, induction: the previous-token head and the induction head, each the best by its score.
    all_induction: that induction head, and all others of the last layer that score above one half.
    others: the heads below the last layer whose previous-token score is below one half.
    """

    previous: tuple[int, int]
    induction: tuple[int, int]
    all_induction: tuple
    others: tuple


def find_circuit(model):
    """The InductionCircuit of a model of two layers or more.

    The previous-token head is looked for below the last layer, the induction head in it.
    """
    row = measure_heads(model)
    last = model.cfg.n_layers - 1
    previous_scores = torch.tensor(row["previous-token"])[:last]
    induction_scores = torch.tensor(row["induction"])

    previous = divmod(previous_scores.argmax().item(), model.cfg.n_heads)
    induction = (last, induction_scores[last].argmax().item())

    all_induction = {induction} | {(last, head) for head in range(model.cfg.n_heads)
                                   if induction_scores[last, head] > 0.5}
    below_half = map(tuple, (previous_scores < 0.5).nonzero().tolist())
    others = tuple(head for head in below_half if head != previous)
    return InductionCircuit(previous, induction, tuple(sorted(all_induction)), others)
