"""Train dictionaries (sparse autoencoders), which write an activation as a sum of a few features.

    pre = x W_enc + b_enc            [batch, latent]
    z = activate(pre)                [batch, latent], mostly 0
    x' = z W_dec + b_dec             [batch, d_out]

Row i of W_dec, of length 1, is the direction that latent i writes, its *feature*; z_i is its
strength. There are many latents, but only a few are active at a time. The kinds of dictionaries
differ in `activate` and in what they add to the loss, so each is a class of a few lines. The
gradient is worked out by hand, as for the toy models of superposition.

An autoencoder learns to write x itself. A transcoder reads x and learns to write something else,
such as an MLP's output. The code is the same for both.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: optim.py, experiments/superposition/measure.py
Next: experiments/dictionaries/features.py
Source: Bricken et al. 2023 (ReLU and L1; waking dead latents); Gao et al. 2024 (TopK); Bussmann et
al. 2024 (BatchTopK) and 2025 (Matryoshka); Rajamanoharan et al. 2024 (JumpReLU); Dunefsky et al.
2024 (transcoders)
"""

import itertools
import math
from dataclasses import dataclass

import torch

from optim import AdamW, schedule
from utils import (
    UserError,
    check_choice,
    check_count,
    check_number,
    check_tensor,
    seeded_generator,
)

KERNEL_WIDTH = 0.1  # a JumpReLU's threshold learns from activations within half of this
FIRST_THRESHOLD = 0.1
THRESHOLD_MEMORY = 0.99  # the share of a BatchTopK's threshold that stays from batch to batch
# The axis of each trained tensor that latents lie along
LATENT_AXIS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "log_threshold": 0}
NESTED = (1 / 8, 1 / 4, 1 / 2, 1)  # the prefixes of a Matryoshka, as shares of all latents
WAKE_EVERY = 10  # steps
WAKE_UNTIL = 0.7  # of the steps; the rest gives all latents time to settle
# What random numbers are drawn for. If two things were drawn from one seed, they would be the same
# numbers: a dictionary would begin with the true features, or with the model's first weights.
PURPOSES = ("true directions", "texts", "held-out texts", "dictionary", "features that stay",
            "noise", "shuffled activations", "untrained model", "reading at random",
            "steering at random", "random partners")


def seed_for(purpose, seed):
    """The seed for one of PURPOSES: no two purposes share one, nor does any with a model's weights.

    This holds for seeds less than a million apart.
    """
    check_choice("purpose", purpose, PURPOSES)
    return seed + 1_000_003 * (1 + PURPOSES.index(purpose))


def unit_rows(matrix):
    """The rows of a matrix, [..., row, column], scaled to length 1."""
    return matrix / matrix.norm(dim=-1, keepdim=True)


# The kinds


class Dictionary:
    """The part that all kinds of dictionaries share.

    Each kind adds activate(pre, training=False), [batch, latent] -> z [batch, latent], 0 or more.
    training: whether the batch is one to learn from.

    W_enc [d_in, latent], b_enc [latent], W_dec [latent, d_out], b_dec [d_out]. sparsity: the weight
    of a penalty, or how many latents may be active.
    """

    def __init__(self, d_in, d_out, n_latents, sparsity, generator, *, W_dec=None):
        """W_dec: a decoder that is not trained, [latent, d_out] (None: a random one, trained).

        If input and output have the same width, the encoder begins as the decoder's transpose.
        """
        self.sparsity = sparsity
        is_free = W_dec is None
        if is_free:
            W_dec = unit_rows(torch.randn(n_latents, d_out, generator=generator))
        self.W_dec = W_dec.clone().requires_grad_(is_free)
        if d_in == d_out:
            W_enc = W_dec.T.contiguous()
        else:
            W_enc = unit_rows(torch.randn(n_latents, d_in, generator=generator)).T.contiguous()
        self.W_enc = W_enc.clone().requires_grad_()
        self.b_enc = torch.zeros(n_latents).requires_grad_()
        self.b_dec = torch.zeros(d_out).requires_grad_()

    @property
    def prefixes(self):
        """The number of latents of each nested dictionary; here there is one, with all of them."""
        return (len(self.W_dec),)

    def tensors(self):
        """{name: tensor} of all weights and thresholds, as `DictionaryRecipe.restore` reads them.
        """
        return {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec,
                "b_dec": self.b_dec}

    def parameters(self):
        """The tensors that are trained."""
        return [tensor for tensor in self.tensors().values() if tensor.requires_grad]

    @torch.no_grad()
    def wake_(self, which, features, readers):
        """Give the latents `which` [n] new features [n, d_out], and encoders `readers` [n, d_in].
        """
        self.W_dec[which] = features
        self.W_enc[:, which] = readers.T
        self.b_enc[which] = 0

    # Reading and writing

    def pre(self, x):
        """x [batch, d_in] -> [batch, latent]: each latent's input, before its activation."""
        return torch.addmm(self.b_enc, x, self.W_enc)

    @torch.no_grad()
    def encode(self, x):
        """The activations of all latents: x [..., d_in] -> z [..., latent]."""
        z = self.activate(self.pre(x.reshape(-1, x.shape[-1])))
        return z.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def decode(self, z):
        """The sum of the active features: z [..., latent] -> x' [..., d_out]."""
        return z @ self.W_dec + self.b_dec

    # The gradient

    @torch.no_grad()
    def backward_(self, x, target):
        """Put the gradient of the loss into each parameter's `.grad`; return z [batch, latent].

        The loss is the mean over the batch of |x' - target|^2, plus the kind's penalty. If there
        are several prefixes, it is also a mean over them. The choice of active latents counts as
        fixed. All kinds but Matryoshka have one part; then d_written is 2 (x' - target) / batch.
        x [batch, d_in]; target [batch, d_out].
        """
        # forward: each prefix adds its own latents to the output of the shorter ones
        pre = self.pre(x)
        z = self.activate(pre, training=True)
        parts = self.parts()
        written = self.b_dec
        errors = []
        for part in parts:
            written = written + z[:, part] @ self.W_dec[part]
            errors.append(written - target)

        # backward: a latent's gradient sums the errors of all prefixes that contain it
        d_z = torch.empty_like(z)
        d_W_dec = torch.empty_like(self.W_dec)
        d_written = torch.zeros_like(target)
        for part, error in zip(reversed(parts), reversed(errors), strict=True):
            d_written += error * (2 / (len(x) * len(parts)))
            d_W_dec[part] = z[:, part].T @ d_written
            d_z[:, part] = d_written @ self.W_dec[part].T
        self.add_penalty_(d_z, pre, z)
        d_pre = d_z.mul_(z > 0)  # an inactive latent gets no gradient from this text

        self.W_dec.grad = d_W_dec
        self.b_dec.grad = d_written.sum(0)
        self.W_enc.grad = x.T @ d_pre
        self.b_enc.grad = d_pre.sum(0)
        return z

    def add_penalty_(self, d_z, pre, z):
        """Add the gradient of the kind's penalty to d_z; all are [batch, latent]."""

    def parts(self):
        """The slices of latents that each prefix adds to the one before."""
        ends = self.prefixes
        return [slice(start, end) for start, end in zip((0, *ends), ends, strict=False)]

    @torch.no_grad()
    def normalise_(self):
        """Scale each feature to length 1.

        Without this, small z and long features would evade an L1 penalty.
        """
        if self.W_dec.requires_grad:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True))

    @torch.no_grad()
    def absorb_scales_(self, of_x, of_target):
        """Turn a dictionary of standardised x and target into one of x and target.

        of_x, of_target: their Scales.
        """
        self.W_enc.div_(of_x.unit)
        self.b_enc.sub_(of_x.mean @ self.W_enc)
        self.b_dec.mul_(of_target.unit).add_(of_target.mean)
        self.stretch_latents_(of_target.unit)

    @torch.no_grad()
    def stretch_latents_(self, factor):
        """Multiply z by a number above 0; the same latents stay active."""
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)


class ReluL1(Dictionary):
    """z = ReLU(pre), with the penalty `sparsity` times the sum of z, which shrinks all of z."""

    def activate(self, pre, training=False):
        return pre.relu()

    def add_penalty_(self, d_z, pre, z):
        d_z += self.sparsity / len(z)


class TopK(Dictionary):
    """The `sparsity` largest latents of each text are active, with their whole value."""

    def activate(self, pre, training=False):
        values, which = pre.topk(self.sparsity, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, which, values.relu_())


class BatchTopK(Dictionary):
    """The largest latents of the whole batch are active, on average `sparsity` for each text.

    So one text may have more active latents than another. After training there is no batch to
    compare with. A latent is then active above a threshold: the smallest value that was kept in a
    batch, averaged over the batches of training.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.threshold = torch.tensor(float("nan"))

    def tensors(self):
        return super().tensors() | {"threshold": self.threshold}

    def activate(self, pre, training=False):
        if not training:
            return torch.where(pre > self.threshold, pre, 0.0).relu_()
        values, which = pre.flatten().topk(self.sparsity * len(pre), sorted=False)
        if (values > 0).any():
            self.remember_(values[values > 0].min())
        values.relu_()
        return torch.zeros_like(pre).view(-1).scatter_(0, which, values).view_as(pre)

    def remember_(self, smallest):
        """Move the threshold towards the smallest value that was kept in a batch."""
        if self.threshold.isnan():
            self.threshold.copy_(smallest)
        self.threshold.lerp_(smallest, 1 - THRESHOLD_MEMORY)

    @torch.no_grad()
    def stretch_latents_(self, factor):
        super().stretch_latents_(factor)
        self.threshold.mul_(factor)


class Matryoshka(BatchTopK):
    """A BatchTopK in which the first 1/8, 1/4 and 1/2 of the latents must each write x alone, too.

    The first latents cannot leave the common features to the later ones. This should keep the
    latents of children from absorbing the parent.
    """

    @property
    def prefixes(self):
        return tuple(round(share * len(self.W_dec)) for share in NESTED)


class JumpReLU(Dictionary):
    """z = pre where pre is above a learned threshold, else 0.

    The penalty is `sparsity` times the number of active latents. A step has no slope, so the
    threshold gets the slope of a ramp that is KERNEL_WIDTH wide (a straight-through estimate). Only
    activations near the threshold can move it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.log_threshold = torch.full_like(self.b_enc, FIRST_THRESHOLD).log().requires_grad_()

    def tensors(self):
        return super().tensors() | {"log_threshold": self.log_threshold}

    @torch.no_grad()
    def wake_(self, which, features, readers):
        super().wake_(which, features, readers)
        self.log_threshold[which] = math.log(FIRST_THRESHOLD)

    def activate(self, pre, training=False):
        return torch.where(pre > self.log_threshold.exp(), pre, 0.0)

    def add_penalty_(self, d_z, pre, z):
        threshold = self.log_threshold.exp()
        is_near = (pre - threshold).abs() < KERNEL_WIDTH / 2
        # If the threshold rises past pre, z falls from it to 0, and one penalty is saved.
        d_step = -(threshold * d_z + self.sparsity / len(z)) * is_near / KERNEL_WIDTH
        self.log_threshold.grad = d_step.sum(0) * threshold

    @torch.no_grad()
    def stretch_latents_(self, factor):
        super().stretch_latents_(factor)
        self.log_threshold.add_(math.log(factor))


KINDS = {
    "ReLU + L1": ReluL1,
    "TopK": TopK,
    "BatchTopK": BatchTopK,
    "JumpReLU": JumpReLU,
    "Matryoshka": Matryoshka,
}
LEARNING_RATES = {"ReLU + L1": 0.015, "TopK": 0.006, "BatchTopK": 0.004, "JumpReLU": 0.006,
                  "Matryoshka": 0.004}


# Training


@dataclass(frozen=True)
class DictionaryRecipe:
    """How a dictionary is trained: its kind, its sparsity, its number of latents, for how long.

    kind: one of KINDS. sparsity: how many latents are active; for ReLU + L1 and JumpReLU the weight
    of the penalty, for x with a mean squared length of 1 (see `Scale`).
    dead_after: a latent that was silent for this many steps is dead and gets a new direction.
    """

    kind: str
    sparsity: float
    n_latents: int
    steps: int = 2000
    batch: int = 256
    dead_after: int = 8

    def __post_init__(self):
        check_choice("kind", self.kind, KINDS)
        check_count("n_latents", self.n_latents)
        check_count("steps", self.steps, least=0)
        check_count("batch", self.batch)
        check_count("dead_after", self.dead_after)
        if issubclass(KINDS[self.kind], (TopK, BatchTopK)):
            check_count("sparsity", self.sparsity, most=self.n_latents)
        else:
            check_number("sparsity", self.sparsity, lambda weight: weight >= 0, "0 or more")

    def fresh(self, d_in, d_out, generator, W_dec=None):
        """The Dictionary before training."""
        return KINDS[self.kind](d_in, d_out, self.n_latents, self.sparsity, generator,
                                W_dec=W_dec)

    def restore(self, tensors):
        """The Dictionary that `tensors()` was saved from."""
        d_in, d_out = len(tensors["W_enc"]), len(tensors["b_dec"])
        dictionary = self.fresh(d_in, d_out, seeded_generator(0))
        for name, tensor in tensors.items():
            setattr(dictionary, name, tensor)
        return dictionary


@dataclass(frozen=True)
class Scale:
    """The mean of activations, [d], and their unit: the root of the mean squared distance from it.
    """

    mean: torch.Tensor
    unit: float

    @classmethod
    def of(cls, x):
        """The Scale of x [n, d]."""
        mean = x.mean(0)
        unit = (x - mean).square().sum(-1).mean().sqrt().item()
        if unit == 0:
            raise UserError("all activations are the same, so there is nothing to find in them; "
                            "choose another hook point or more texts")
        if not math.isfinite(unit):
            raise UserError("some activations are nan or infinite, or too large to square; check "
                            "the model's weights")
        return cls(mean, unit)

    def standardise(self, x):
        """x with mean 0 and a mean squared length of 1."""
        return (x - self.mean) / self.unit


def fit_dictionary(recipe, x, seed, *, target=None, W_dec=None, progress=None):
    """Train the Dictionary of a recipe, in float32, and return it.

    x: [n, d_in], what it reads, in epochs, each in a new random order. target: [n, d_out], what it
    learns to write (None: x itself). W_dec: a decoder that is not trained. progress(steps): called
    after each step with the number of steps done. Raises UserError for other shapes, for numbers
    that are not finite, and if all rows of x or target are the same.
    """
    check_tensor("x", x, "n d_in", is_float=True)
    x = x.float()
    if target is None:
        target = x
    else:
        check_tensor("target", target, "n d_out", is_float=True)
        if len(target) != len(x):
            raise UserError(f"target has {len(target)} rows and x has {len(x)}; pass one row of "
                            "target for each row of x")
        target = target.float()
    of_x = Scale.of(x)
    of_target = of_x if target is x else Scale.of(target)
    generator = seeded_generator(seed_for("dictionary", seed))
    dictionary = recipe.fresh(x.shape[-1], target.shape[-1], generator, W_dec)
    optimizer = AdamW(dictionary.parameters(), LEARNING_RATES[recipe.kind], weight_decay=0.0)

    silent = torch.zeros(recipe.n_latents)  # steps since each latent was active
    batches = shuffled_rows(len(x), recipe.batch, generator)
    for step, rows in enumerate(itertools.islice(batches, recipe.steps)):
        batch = of_x.standardise(x[rows])
        wanted = batch if target is x else of_target.standardise(target[rows])

        z = dictionary.backward_(batch, wanted)
        optimizer.step(schedule(step, recipe.steps, shape="cosine"))
        dictionary.normalise_()

        silent = torch.where((z > 0).any(0), 0.0, silent + 1)
        if step % WAKE_EVERY == WAKE_EVERY - 1 and step < WAKE_UNTIL * recipe.steps:
            wake_dead_(dictionary, optimizer, silent >= recipe.dead_after, batch, wanted, generator)
        if progress:
            progress(step + 1)

    dictionary.absorb_scales_(of_x, of_target)
    return dictionary


def shuffled_rows(n_rows, batch, generator):
    """Yield [batch] indices without end: all rows in random order, then all in a new order."""
    batch = min(batch, n_rows)
    while True:
        order = torch.randperm(n_rows, generator=generator)
        yield from order[: n_rows - n_rows % batch].view(-1, batch)


@torch.no_grad()
def wake_dead_(dictionary, optimizer, dead, x, target, generator):
    """Give each dead latent a new direction: the error of a text that is badly reconstructed.

    The chance of drawing a text is in proportion to the square of its loss. dead: [latent], bool.
    """
    which = dead.nonzero().flatten()
    if len(which) == 0 or not dictionary.W_dec.requires_grad:
        return
    errors = target - dictionary.decode(dictionary.encode(x))
    chances = errors.square().sum(-1).square()
    texts = torch.multinomial(chances, len(which), replacement=True, generator=generator)

    features = unit_rows(errors[texts])
    readers = features if target is x else unit_rows(x[texts])
    dictionary.wake_(which, features, readers)

    # the optimiser forgets the old directions
    for averages in (optimizer.m, optimizer.v):
        of_parameter = dict(zip(map(id, optimizer.parameters), averages, strict=True))
        for name, tensor in dictionary.tensors().items():
            if name in LATENT_AXIS:
                of_parameter[id(tensor)].index_fill_(LATENT_AXIS[name], which, 0)
