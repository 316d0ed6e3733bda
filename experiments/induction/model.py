"""Train a small model that forms an induction circuit, and find the two heads of the circuit.

Each training text holds a segment of distinct random tokens twice, with filler tokens around it.
The segment's length, its start and the gap between the two copies differ from text to text.

One text in four is a *map* instead: it has a few tokens, and each is always followed by the same
one of them, except for random jumps. Maps are needed because segments alone can be predicted
without an induction head: all tokens of a text recur at one distance, so a model can find that
distance and look back by it. In a map no single distance works.

A map must not be a circle, in which each token also has only one predecessor. A model trained with
`circles` instead of maps finds another solution: its loss falls, and no head becomes an induction
head.

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
UNKNOWN = 0.1  # the weight in the training loss of a token that can't be predicted from the text
JUMPS = 0.25  # the share of a map's places that hold a random token
MEASURED_ON = 999  # the seed of the texts for measurements; no model is trained on them


@dataclass(frozen=True)
class InductionRecipe:
    """Everything that the trained model depends on, except its seed.

    maps: the share of texts that are maps; circles: whether these maps are circles. every: steps
    between two measurements.
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
    """Texts that hold a segment twice, at a random place.

    n_pos: tokens in a text. lengths: the smallest and the largest length of the segment, in tokens;
    gaps: the same for the gap between its two copies. counting: the ids outside of the second copy
    count upwards (a, a + 1, …) instead of being in random order. Either way, no token outside of
    the segment occurs twice.
    """

    n_pos: int = 41
    d_vocab: int = len(WORDS)
    lengths: tuple[int, int] = (6, 16)
    gaps: tuple[int, int] = (0, 8)
    counting: bool = False

    def draw(self, n_rows, generator):
        """(tokens, known), each [batch, pos].

        known: True where the token can be predicted from those before it: in the second copy of the
        segment, except for its first token.
        """
        length = random_integers(*self.lengths, n_rows, generator)
        gap = random_integers(*self.gaps, n_rows, generator)
        start = random_integers(0, self.n_pos - 2 * length - gap, n_rows, generator)

        # Each text takes the first ids of its own order of all ids.
        if self.counting:
            first = random_integers(0, self.d_vocab - 1, n_rows, generator)
            order = (first + torch.arange(self.n_pos)) % self.d_vocab
        else:
            order = torch.rand(n_rows, self.d_vocab, generator=generator).argsort(-1)

        # The second copy takes its tokens from the places of the first.
        pos = torch.arange(self.n_pos)
        again = start + length + gap  # [batch, 1], where the second copy begins
        in_second = (again <= pos) & (pos < again + length)
        source = torch.where(in_second, pos - length - gap, pos)  # [batch, pos]
        return order.gather(1, source), in_second & (pos > again)


def random_integers(low, high, n_rows, generator):
    """Random integers [batch, 1] from low to high, both included; low and high: numbers, or
    [batch, 1]."""
    return low + ((high - low + 1) * torch.rand(n_rows, 1, generator=generator)).long()


def draw_maps(n_rows, n_pos, generator, circles=False):
    """(tokens, known), each [batch, pos]: texts in which each token has one fixed follower.

    A text has 3 to 8 different tokens. Each is always followed by the same one of them, except that
    a share JUMPS of all places holds a random one. circles: token i is followed by token i + 1, and
    the last by the first. known: as in `Repeats.draw`.
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

    # A token is known if the one before it occurred earlier and was followed by its follower then.
    goes_on = ~jumps.roll(-1, 1)  # whether each place is followed by its follower, without a jump
    seen = (earlier_occurrences(path) & goes_on[:, None, :]).any(-1)  # [batch, pos]
    known = (seen & goes_on).roll(1, 1)

    # The ids of a text are all even or all odd, so that none is followed by the next higher one.
    ids = 2 * torch.rand(n_rows, len(WORDS) // 2, generator=generator).argsort(-1)
    ids = ids + random_integers(0, 1, n_rows, generator)
    return ids.gather(1, path), known


def training_batch(recipe, generator):
    """(inputs [batch, pos], targets [batch, pos, 2]: the next token and whether it is known).

    No token a ever follows a - 1. So a text whose ids count upwards consists of pairs that the
    model has never seen.
    """
    n_maps = round(recipe.maps * recipe.batch_size)
    n_repeats = recipe.batch_size - n_maps

    # Draw four times as many texts as needed, because only six in ten have no such pair.
    texts = Repeats(recipe.n_ctx + 1)
    tokens, known = texts.draw(4 * n_repeats, generator)
    allowed = ((tokens.diff() - 1) % texts.d_vocab != 0).all(1).nonzero()[:n_repeats, 0]

    map_tokens, map_known = draw_maps(n_maps, recipe.n_ctx + 1, generator, recipe.circles)
    tokens = torch.cat([tokens[allowed], map_tokens])
    known = torch.cat([known[allowed], map_known])
    return tokens[:, :-1], torch.stack([tokens[:, 1:], known[:, 1:].long()], -1)


def training_loss(logits, targets):
    """The weighted mean loss, in nats per token: weight 1 for a known token, UNKNOWN otherwise."""
    weight = torch.where(targets[..., 1] == 1, 1.0, UNKNOWN)
    return (weight * per_token_loss(logits, targets[..., 0])).sum() / weight.sum()


# The training


def trained_induction_model(folder, seed, recipe=None, *, retrain=False, trainings=None):
    """(model, history): the model of a seed, trained, or read if it was kept.

    folder: the experiment's folder; the run in it is seed_0 (or one_layer_seed_0, circles_seed_0).
    recipe: an InductionRecipe; None is the default one. retrain: train even if the model is there.
    trainings: the Trainings that this model is one of. history: a list of what `measure_heads`
    returns, from step 0 on.
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
    """Train the model in place and return a list of what `measure_heads` returns every few steps,
    the first before any training. trainings: the Trainings that this one belongs to.
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
    """(mean loss of the known tokens, mean loss of the others), in nats per token.

    tokens, known: [batch, pos].
    """
    each = torch.cat([per_token_loss(model(some[:, :-1]), some[:, 1:])
                      for some in tokens.split(16)])  # GPT-2's logits are large
    return each[known[:, 1:]].mean().item(), each[~known[:, 1:]].mean().item()


def repeats_metric(tokens, known):
    """A Metric [..., batch]: the mean loss of each text's known tokens, in nats per token."""
    targets = tokens[:, 1:]
    weight = known[:, 1:].float()

    def loss_of_known(logits):
        each = per_token_loss(logits, targets.expand(logits.shape[:-1]))
        return (each * weight).sum(-1) / weight.sum(-1)

    return Metric(loss_of_known)


@torch.no_grad()
def head_scores(model, tokens):
    """{kind: [layer, batch, head]}: how much attention each head pays to one place, from 0 to 1.

    previous-token: to the token before. duplicate-token: to an earlier occurrence of the current
    token. induction: to the token after that occurrence. tokens: [batch, pos].
    """
    _, cache = model.run_with_cache(tokens, lambda name: name.endswith("hook_pattern"))
    pattern = cache.stack("pattern")
    return {"previous-token": prev_token_score(pattern),
            "induction": induction_score(pattern, tokens),
            "duplicate-token": duplicate_token_score(pattern, tokens)}


@torch.no_grad()
def in_context_score(model):
    """The mean loss on tokens 32 to 39 minus that on tokens 8 to 15, in nats per token.

    The texts are 20 tokens and the same 20 again. The score is below 0 if the model uses what came
    before.
    """
    texts = Repeats(40, lengths=(20, 20), gaps=(0, 0))
    tokens, _ = texts.draw(16, seeded_generator(MEASURED_ON))
    loss = per_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).mean(0)
    return (loss[31:39].mean() - loss[7:15].mean()).item()


def measure_heads(model, step=None):
    """The losses and the heads' scores of a model, as a dict of plain values.

    repeats and first: the losses on repeats and on first occurrences (nats per token). in_context:
    the in-context score (nats per token). previous-token and induction: each head's score,
    [layer][head]. step: as given.
    """
    tokens, known = Repeats(model.cfg.n_ctx + 1).draw(32, seeded_generator(MEASURED_ON))
    repeats, first = repeat_losses(model, tokens, known)
    scores = head_scores(model, tokens[:, :-1])
    return {"step": step, "repeats": repeats, "first": first,
            "in_context": in_context_score(model),
            "previous-token": scores["previous-token"].mean(1).tolist(),
            "induction": scores["induction"].mean(1).tolist()}


# Which heads form the circuit


@dataclass(frozen=True)
class InductionCircuit:
    """The heads of an induction circuit, each (layer, head).

    previous, induction: the heads with the highest previous-token and induction score.
    all_induction: that induction head and all other heads of the last layer with a score above 0.5.
    others: the heads below the last layer with a previous-token score below 0.5.
    """

    previous: tuple[int, int]
    induction: tuple[int, int]
    all_induction: tuple
    others: tuple


def find_circuit(model):
    """The InductionCircuit of a model with two layers or more.

    The induction head is searched for in the last layer, the previous-token head below it.
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
