"""The workbench of wired_circuits.py: a GPT of zeros with a stream in named slots, to put heads in.

A slot (token, position, what was before, what is said) is an orthonormal set of directions that
have no mean. All tokens share a constant part, far longer than whatever heads write, so LayerNorm
divides by the same number everywhere, to a part in a thousand, and no circuit needs norm="none".

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Read before: model.py, metrics.py; after: experiments/wired_circuits.py
Source: Elhage et al. 2021 (QK, OV, the stream as a shared space)
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from config import ModelConfig
from metrics import Metric
from model import GPT
from utils import seeded_generator

N_CTX, N_HEADS, D_HEAD = 10, 4, 26
BOS, YES, NO, D_VOCAB = 0, 11, 12, 13
CONTENT = list(range(1, 11))  # the tokens that texts are made of
SHAPE = {"n_heads": N_HEADS, "d_model": N_HEADS * D_HEAD, "d_mlp": 6, "n_ctx": N_CTX,
         "d_vocab": D_VOCAB, "activation": "relu", "unembed_bias": True}
SLOTS = {"constant": 1, "token": D_VOCAB, "position": N_CTX, "before": D_VOCAB, "goal": N_CTX,
         "said": D_VOCAB, "flag": 1, "unread": D_VOCAB}
SHRINK = 4.0  # what LayerNorm divides by, nearly
GAIN = 8.0  # nats of what is said once: the unit of effects
SHARP, SOFT = 40.0, 10.0  # a match in the scores: e^-20 or e^-5 is left for what is next


@dataclass(frozen=True)
class Pairs:
    """Texts that differ in what the circuit reads: clean and corrupt, [batch, pos]; the metric is
    the logit of `right` less that of `wrong`, [batch] each, at the last position."""

    clean: torch.Tensor
    corrupt: torch.Tensor
    right: torch.Tensor
    wrong: torch.Tensor

    @property
    def metric(self):
        """The logit difference, a Metric."""
        return Metric.logit_diff(self.right, self.wrong)


@dataclass(frozen=True)
class Truth:
    """What each tool must find, {(layer, head): size}; a head that is not named counts nothing.

    restores: the share of the effect that comes back where the clean head is put into the corrupt
    run (denoising), and `slope` what the gradient there says of it (None: the size is not exact).
    breaks: the share that is lost where the corrupt head is put into the clean run (noising).
    removed, direct: of the clean metric, in units of GAIN, what is lost where the head writes zero,
    and what it adds itself.
    edges: {(writer, reader): share}, the connections that carry the effect, and the share that the
    clean write of a head restores through this one alone (None: not measured); flat: those of them
    through which no gradient passes, because what reads them is saturated.
    looks: {pattern: heads that matter and have it}; decoys: dead ones have it more sharply.
    copies: 1 for a head that raises what it looks at, -1 for one that lowers it. composes: pairs
    ("Q" or "K", layer, head, later layer, later head), of which one reads what the other writes.
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
    def circuit(self):
        """The heads that matter, whichever tool sees them."""
        return set(self.restores) | set(self.breaks)


@dataclass(frozen=True)
class Wired:
    """A model with a known circuit.

    answer: a text, as a list of ids, -> the id that the model says after it, or None where the
    wiring leaves it open. make_pair: generator -> (clean, corrupt, right, wrong), lists and ids.
    bits: {name: text -> bool}, what can be decoded from the last position.
    """

    name: str
    model: GPT
    answer: Callable
    make_pair: Callable
    truth: Truth
    bits: dict = field(default_factory=dict)

    def pairs(self, n, generator):
        """n Pairs, drawn from a generator."""
        return Pairs(*map(torch.tensor, zip(*(self.make_pair(generator) for _ in range(n)),
                                            strict=True)))


def named(head, letter=""):
    """A head as a node of `circuits`, "0.3", or one of its inputs, "0.3.k"."""
    return ".".join([*map(str, head), *letter])


def alone(head, reads="v", **more):
    """The Truth of a head that does all by itself and says it; `reads` is the input that differs
    between clean and corrupt."""
    all_of_it = {head: 1.0}
    edges = {("embed", named(head, reads)): None, (named(head), "logits"): 1.0}
    return Truth(all_of_it, all_of_it, all_of_it, all_of_it, all_of_it, edges, **more)


def draw(items, generator):
    """One of them."""
    items = list(items)
    return items[int(torch.randint(len(items), (), generator=generator))]


def shuffled(items, generator):
    """A list of them in random order."""
    items = list(items)
    return [items[k] for k in torch.randperm(len(items), generator=generator)]


def random_texts(n, generator):
    """[n, pos]: BOS, then random content."""
    texts = torch.tensor(CONTENT)[torch.randint(len(CONTENT), (n, N_CTX), generator=generator)]
    texts[:, 0] = BOS
    return texts


def hyperplane(width):
    """[width - 1, width], float64: orthonormal waves, none of which has a mean."""
    frequency, place = torch.arange(1, width)[:, None], torch.arange(width).double() + 0.5
    return math.sqrt(2 / width) * (math.pi / width * place * frequency).cos()


class Board:
    """A GPT of zeros, the slots of its stream, and the means to put heads into it.

    The seed says which vectors are whose, and which heads are free to be what.
    """

    @torch.no_grad()
    def __init__(self, seed, n_layers=1):
        self.generator = seeded_generator(seed)
        self.model = GPT(ModelConfig(n_layers=n_layers, **SHAPE), seed=None).double().eval()
        for name, weight in self.model.named_parameters():
            weight.fill_(1.0 if name.endswith(".w") else 0.0)
        width = self.model.cfg.d_model
        waves = hyperplane(width)[torch.randperm(width - 1, generator=self.generator)]
        n_spare = width - 1 - sum(SLOTS.values())
        *slots, self.spare = waves.split([*SLOTS.values(), n_spare])
        self.slots = dict(zip(SLOTS, slots, strict=True))
        self.free = [torch.randperm(N_HEADS, generator=self.generator).tolist()
                     for _ in range(n_layers)]
        length = math.sqrt(SHRINK**2 * width - 2)  # token and position have length 1 each
        self.model.W_E.copy_(self.slots["token"] + length * self.slots["constant"])
        self.model.W_pos.copy_(self.slots["position"])
        self.model.W_U.copy_(GAIN * SHRINK * self.slots["said"].T)

    def some(self, name, ids=CONTENT):
        """Rows of a slot, [n, d_model]."""
        return self.slots[name][list(ids)]

    def random(self, *shape):
        """Normal numbers from the board's own generator."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @torch.no_grad()
    def put(self, layer, *, looks, moves=None, sharp=SHARP):
        """Wires a free head of a layer and returns it as (layer, head).

        looks: (query, key, rest): the score is `sharp` times the sum of the products of what query
        and key [n, d_model] read, and `sharp * rest` on BOS, where a head rests that finds nothing;
        with query None the key's alone counts. moves: (value, write), each [n, d_model].
        """
        attn, head = self.model.blocks[layer].attn, self.free[layer].pop()
        query, key, rest = looks
        keys = torch.cat([key, rest * self.some("token", [BOS])])
        n = len(keys)
        attn.W_K[head, :, :n] = SHRINK * sharp * math.sqrt(D_HEAD) * keys.T
        if query is None:
            attn.b_Q[head, :n] = 1.0
        else:
            attn.W_Q[head, :, :n - 1] = SHRINK * query.T
            attn.b_Q[head, n - 1] = 1.0
        if moves is not None:
            value, write = moves
            attn.W_V[head, :, :len(value)] = SHRINK * value.T
            attn.W_O[head, :len(write)] = write
        return layer, head

    def previous(self):
        """Looks at the position before; the first at itself."""
        return self.slots["position"][1:], self.slots["position"][:-1], 0.0

    def itself(self):
        """Looks at its own position."""
        return self.slots["position"], self.slots["position"], 0.0

    def at(self, position):
        """Looks at one position; before it, at BOS."""
        return None, self.some("position", [position]), 0.5

    def saying(self, size=1.0):
        """Moves the token that is looked at into what is said, so many times."""
        return self.some("token"), size * self.some("said")

    @torch.no_grad()
    def put_step(self, low, high):
        """An MLP that says YES where the flag is above `high` and NO where it is below `low`."""
        mlp, verdict = self.model.blocks[0].mlp, self.some("said", [YES]) - self.some("said", [NO])
        mlp.W_in[:, :2] = SHRINK / (high - low) * self.slots["flag"].T
        mlp.b_in[:2] = -torch.tensor([low, high]) / (high - low)
        mlp.W_out[:2] = torch.tensor([[1.0], [-1.0]]) * verdict
        mlp.b_out.copy_(-0.5 * verdict[0])

    def fill(self, *ways):
        """Makes every head that is left a dead one: a sharp pattern, and no effect, because it
        writes to a slot that nothing reads, or the mean, which LayerNorm takes out, or nothing.

        ways: what they look at in turn, as in `put`: themselves, the first, the one before.
        """
        ways, token = ways or (self.itself(), self.at(0), self.previous()), self.slots["token"]
        mean = 0.1 * self.random(D_VOCAB, 1).expand(-1, token.shape[1])
        ends = (token, self.slots["unread"]), (token, mean), None
        for layer, free in enumerate(self.free):
            for index in range(len(free)):
                self.put(layer, looks=ways[index % len(ways)], moves=ends[index % len(ends)])

    @torch.no_grad()
    def finish(self):
        """The model, with random values wherever they leave its function as it is.

        They are gains and biases of LayerNorm, undone by those who read; biases of keys, which add
        the same to all scores of a row; queries and values in dimensions that no key and no W_O
        reads; neurons that write the mean; means of embeddings; b_O where nothing reads.
        """
        model = self.model
        for block in model.blocks:
            attn, mlp = block.attn, block.mlp
            unread = (attn.W_O == 0).all(-1)  # [head, d_head]
            attn.W_V.transpose(1, 2)[unread] = self.random(int(unread.sum()), attn.W_V.shape[1])
            attn.b_V[unread] = self.random(int(unread.sum()))
            unread = (attn.W_K == 0).all(1)
            attn.W_Q.transpose(1, 2)[unread] = self.random(int(unread.sum()), attn.W_Q.shape[1])
            attn.b_K.copy_(self.random(*attn.b_K.shape))
            n_spare = len(self.spare)
            attn.b_O.copy_(self.random(n_spare) @ self.spare / math.sqrt(n_spare))
            dead = (mlp.W_out == 0).all(-1)
            mlp.W_in[:, dead] = 0.1 * self.random(len(mlp.W_in), int(dead.sum()))
            mlp.W_out[dead] = 0.1 * self.random(int(dead.sum()), 1).expand(-1, len(mlp.W_in))
            self.dress_(block.ln1, attn.W_QKV, attn.b_QKV)
            self.dress_(block.ln2, mlp.W_in, mlp.b_in)
        self.dress_(model.ln_final, model.W_U, model.b_U)
        model.W_E.add_(0.1 * self.random(D_VOCAB, 1))
        model.W_pos.add_(0.1 * self.random(N_CTX, 1))
        return model

    def dress_(self, norm, W, b):
        """Gives a LayerNorm a random bias and a gain, the same in all coordinates so that it can be
        rotated, and takes both out of its reader."""
        gain = 0.5 + float(torch.rand(1, generator=self.generator))
        norm.w.mul_(gain)
        norm.b.copy_(0.3 * self.random(len(norm.b)))
        W.div_(gain)
        b.sub_(norm.b @ W)


@torch.no_grad()
def rotated(wired, seed):
    """The same circuit in another basis of the stream: all that is written is multiplied by an
    orthogonal matrix that keeps the all-ones direction, all that reads by its transpose.

    LayerNorm takes a mean along that direction, so it commutes with the matrix as long as its gain
    is the same in all coordinates.
    """
    model = copy.deepcopy(wired.model)
    width = model.cfg.d_model
    waves = hyperplane(width)
    noise = torch.randn(width - 1, width - 1, generator=seeded_generator(seed)).to(waves)
    turn = waves.T @ torch.linalg.qr(noise)[0] @ waves + 1 / width  # [d_model, d_model]
    for name, weight in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("W_E", "W_pos", "W_heads_out", "b_heads_out", "W_out", "b_out", "b"):
            weight.copy_(weight @ turn)
        elif leaf in ("W_QKV", "W_in", "W_U"):
            weight.copy_(turn.T @ weight)
    return dataclasses.replace(wired, model=model)
