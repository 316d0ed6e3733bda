"""Wire transformers by hand: a GPT of zeros whose residual stream has named parts.

A part of the stream (a slot: the token, the position, the token before, the answer in the slot
"said") is an orthonormal set of directions whose entries sum to 0. All tokens share a constant part
that is much longer than anything heads write. So LayerNorm divides by the same number everywhere,
up to one part in a thousand, and no circuit needs norm="none".

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: model.py
Next: experiments/wired/model.py
Source: Elhage et al. 2021 (QK, OV, the stream as a shared space)
"""

import copy
import math

import torch

from config import ModelConfig
from model import GPT
from utils import seeded_generator

N_CTX = 10
N_HEADS = 4
D_HEAD = 26

BOS = 0
CONTENT = list(range(1, 11))  # the tokens that texts are made of
YES = 11
NO = 12
D_VOCAB = 13

SHAPE = {"n_heads": N_HEADS, "d_model": N_HEADS * D_HEAD, "d_mlp": 6, "n_ctx": N_CTX,
         "d_vocab": D_VOCAB, "activation": "relu", "unembed_bias": True}
SLOTS = {"constant": 1, "token": D_VOCAB, "position": N_CTX, "before": D_VOCAB, "goal": N_CTX,
         "said": D_VOCAB, "flag": 1, "unread": D_VOCAB}  # directions of each
SHRINK = 4.0  # the number by which LayerNorm divides, nearly
GAIN = 8.0  # nats that a write of size 1 adds to the answer: the unit of effects
SHARP = 40.0  # score of a match; if BOS scores half of it, BOS gets e^-20 times the attention
SOFT = 10.0  # the same with e^-5


def random_texts(n, generator):
    """Random texts, [n, pos]: BOS, then random content tokens."""
    texts = torch.tensor(CONTENT)[torch.randint(len(CONTENT), (n, N_CTX), generator=generator)]
    texts[:, 0] = BOS
    return texts


def shuffled(items, generator):
    """A list of the items in random order."""
    items = list(items)
    return [items[k] for k in torch.randperm(len(items), generator=generator)]


def zero_mean_basis(width):
    """[width - 1, width], float64: orthonormal waves whose entries each sum to 0."""
    frequency = torch.arange(1, width)[:, None]
    place = torch.arange(width).double() + 0.5
    return math.sqrt(2 / width) * (math.pi / width * place * frequency).cos()


class Board:
    """A GPT of zeros with a stream of slots, and methods that wire heads into it.

    The seed decides which directions each slot gets, and the order in which heads are used.
    """

    @torch.no_grad()
    def __init__(self, seed, n_layers=1):
        self.generator = seeded_generator(seed)
        self.model = GPT(ModelConfig(n_layers=n_layers, **SHAPE), seed=None).double().eval()
        for name, weight in self.model.named_parameters():
            weight.fill_(1.0 if name.endswith(".w") else 0.0)  # LayerNorm's gain, and the rest

        # Each slot gets some directions of a basis.
        width = self.model.cfg.d_model
        waves = zero_mean_basis(width)[torch.randperm(width - 1, generator=self.generator)]
        n_used = sum(SLOTS.values())
        in_slots = waves[:n_used].split(list(SLOTS.values()))
        self.slots = dict(zip(SLOTS, in_slots, strict=True))
        self.spare = waves[n_used:]
        self.free = [torch.randperm(N_HEADS, generator=self.generator).tolist()
                     for _ in range(n_layers)]

        # The embedding and the unembedding.
        length = math.sqrt(SHRINK**2 * width - 2)  # token and position have length 1 each
        self.model.W_E.copy_(self.slots["token"] + length * self.slots["constant"])
        self.model.W_pos.copy_(self.slots["position"])
        self.model.W_U.copy_(GAIN * SHRINK * self.slots["said"].T)

    def slot_rows(self, name, ids=CONTENT):
        """The directions of some tokens or positions in a slot, [n, d_model]."""
        return self.slots[name][list(ids)]

    def draw_normal(self, *shape):
        """Normally distributed numbers from the board's own generator."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    # Where a head can look (`looks` of wire_head), and what it can move (`moves`)

    def previous_position(self):
        """Look at the position before; the first position looks at itself."""
        return self.slots["position"][1:], self.slots["position"][:-1], 0.0

    def own_position(self):
        """Look at the own position."""
        return self.slots["position"], self.slots["position"], 0.0

    def fixed_position(self, position):
        """Look at one fixed position; earlier positions look at BOS."""
        return None, self.slot_rows("position", [position]), 0.5

    def token_to_said(self, size=1.0):
        """Add the token that the head looks at to the answer, `size` times."""
        return self.slot_rows("token"), size * self.slot_rows("said")

    # Wiring

    @torch.no_grad()
    def wire_head(self, layer, *, looks, moves=None, sharp=SHARP):
        """Wire a free head of a layer and return it as (layer, head).

        looks: (query, key, rest), query and key [n, d_model]. A key gets the score
        sharp * sum_i <query_i, stream at the query> <key_i, stream at the key>, and BOS gets
        sharp * rest, so that the head looks there if it finds no match. query None: only the key
        counts. moves: (value, write), each [n, d_model].
        """
        attn = self.model.blocks[layer].attn
        head = self.free[layer].pop()

        query, key, rest = looks
        keys = torch.cat([key, rest * self.slot_rows("token", [BOS])])
        n = len(keys)
        attn.W_K[head, :, :n] = SHRINK * sharp * math.sqrt(D_HEAD) * keys.T
        if query is None:
            attn.b_Q[head, :n] = 1.0
        else:
            attn.W_Q[head, :, :n - 1] = SHRINK * query.T
            attn.b_Q[head, n - 1] = 1.0  # the score on BOS needs no query

        if moves is not None:
            value, write = moves
            attn.W_V[head, :, :len(value)] = SHRINK * value.T
            attn.W_O[head, :len(write)] = write
        return layer, head

    @torch.no_grad()
    def wire_step_mlp(self, low, high):
        """Wire an MLP that writes YES if the flag is above `high`, and NO if it is below `low`."""
        mlp = self.model.blocks[0].mlp
        verdict = self.slot_rows("said", [YES]) - self.slot_rows("said", [NO])
        mlp.W_in[:, :2] = SHRINK / (high - low) * self.slots["flag"].T
        mlp.b_in[:2] = -torch.tensor([low, high]) / (high - low)
        mlp.W_out[:2] = torch.tensor([[1.0], [-1.0]]) * verdict
        mlp.b_out.copy_(-0.5 * verdict[0])

    def wire_dead_heads(self, *ways):
        """Turn every free head into a dead one, with a sharp pattern and no effect.

        A dead head writes to a slot that nothing reads, or the mean, which LayerNorm removes, or
        nothing. ways: where they look in turn, as in `wire_head`; by default at themselves, at the
        first position, and at the one before.
        """
        if not ways:
            ways = (self.own_position(), self.fixed_position(0), self.previous_position())
        token = self.slots["token"]
        mean = 0.1 * self.draw_normal(D_VOCAB, 1).expand(-1, token.shape[1])
        ends = ((token, self.slots["unread"]), (token, mean), None)
        for layer, free in enumerate(self.free):
            for index in range(len(free)):
                self.wire_head(layer, looks=ways[index % len(ways)], moves=ends[index % len(ends)])

    # Random values

    @torch.no_grad()
    def finish(self):
        """Return the model, with random values wherever they do not change its function.

        These are gains and biases of LayerNorm, undone by their readers; biases of keys, which add
        the same to all scores of a row; queries and values in dimensions that no key and no W_O
        reads; neurons that write the mean; means of embeddings; b_O in directions that nothing
        reads.
        """
        model = self.model
        for block in model.blocks:
            attn = block.attn
            unread = (attn.W_O == 0).all(-1)  # [head, d_head]
            attn.W_V.transpose(1, 2)[unread] = self.draw_normal(int(unread.sum()),
                                                                attn.W_V.shape[1])
            attn.b_V[unread] = self.draw_normal(int(unread.sum()))

            unread = (attn.W_K == 0).all(1)  # [head, d_head]
            attn.W_Q.transpose(1, 2)[unread] = self.draw_normal(int(unread.sum()),
                                                                attn.W_Q.shape[1])
            attn.b_K.copy_(self.draw_normal(*attn.b_K.shape))
            n_spare = len(self.spare)
            attn.b_O.copy_(self.draw_normal(n_spare) @ self.spare / math.sqrt(n_spare))

            mlp = block.mlp
            dead = (mlp.W_out == 0).all(-1)  # [d_mlp]
            n_dead = int(dead.sum())
            mlp.W_in[:, dead] = 0.1 * self.draw_normal(len(mlp.W_in), n_dead)
            mlp.W_out[dead] = 0.1 * self.draw_normal(n_dead, 1).expand(-1, len(mlp.W_in))

            self.randomise_norm_(block.ln1, attn.W_QKV, attn.b_QKV)
            self.randomise_norm_(block.ln2, mlp.W_in, mlp.b_in)

        self.randomise_norm_(model.ln_final, model.W_U, model.b_U)
        model.W_E.add_(0.1 * self.draw_normal(D_VOCAB, 1))
        model.W_pos.add_(0.1 * self.draw_normal(N_CTX, 1))
        return model

    def randomise_norm_(self, norm, W, b):
        """Give a LayerNorm a random bias and gain, and undo both in its reader.

        The gain is the same in all coordinates, so that the stream can be rotated.
        """
        gain = 0.5 + float(torch.rand(1, generator=self.generator))
        norm.w.mul_(gain)
        norm.b.copy_(0.3 * self.draw_normal(len(norm.b)))
        W.div_(gain)
        b.sub_(norm.b @ W)


@torch.no_grad()
def rotate_stream(model, seed):
    """Return the same model in another basis of the stream.

    Weights that write are multiplied by an orthogonal matrix that keeps the all-ones direction,
    weights that read by its transpose. LayerNorm takes a mean along that direction, so it commutes
    with the matrix as long as its gain is the same in all coordinates.
    """
    model = copy.deepcopy(model)
    width = model.cfg.d_model
    waves = zero_mean_basis(width)
    noise = torch.randn(width - 1, width - 1, generator=seeded_generator(seed)).to(waves)
    turn = waves.T @ torch.linalg.qr(noise)[0] @ waves + 1 / width  # [d_model, d_model]

    for name, weight in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf in ("W_E", "W_pos", "W_heads_out", "b_heads_out", "W_out", "b_out", "b"):
            weight.copy_(weight @ turn)
        elif leaf in ("W_QKV", "W_in", "W_U"):
            weight.copy_(turn.T @ weight)
    return model
