"""Train a GPT on addition mod p, and keep its weights along the way.

Every text is "a b =", and the answer at "=" is (a + b) mod p or, for a control, a fixed random
number. The weights of many steps are kept, so that whatever is found in the last state can be
searched for in all earlier ones.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: train.py
Next: experiments/grokking/fourier.py
Source: Power et al. 2022; Nanda et al. 2023, section 3 (the model and its training)
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn

from config import ModelConfig, TrainConfig
from experiments.common import Trainings, trained_gpt
from experiments.grokking.fourier import pair_sums
from losses import cross_entropy
from model import GPT
from tokenizer import WordTokenizer
from train import fit
from utils import seeded_generator

CANONICAL_ADDITION = {"p": 113, "fraction": 0.3, "d_model": 128}
LEARNED = 1e-3  # nats: with a smaller loss on the test pairs, a model has learned to add
STEPS_APART = 1.1  # each state is kept about this many times as late as the one before
QUICK_ADDITION = {"p": 17, "fraction": 0.6, "d_model": 32, "max_steps": 120}


@dataclass(frozen=True)
class GrokkingRecipe:
    """Everything that one trained model depends on.

    p: the modulus. fraction: the share of pairs to train on. max_steps: the most steps; a model
    that has learned to add is trained for as many steps again, to tidy up, and no longer. threads:
    CPU threads, on which the last bits depend. symmetric: (a, b) and (b, a) are always in the same
    split. random_answers: the control with random answers, in which there is no rule to find.
    """

    p: int = 59
    fraction: float = 0.6
    d_model: int = 64
    weight_decay: float = 1.0
    lr: float = 7e-3
    max_steps: int = 5000
    threads: int = 1
    seed: int = 0
    symmetric: bool = True
    random_answers: bool = False

    def model_config(self):
        """The ModelConfig, as in Nanda et al.: one layer, initial weights of 1 / sqrt(d_model)."""
        return ModelConfig(
            n_layers=1, n_heads=4, d_model=self.d_model, n_ctx=3, d_vocab=self.p + 1, norm="none",
            activation="relu", attn_bias=False, init_scale=self.d_model**-0.5)

    def pairs(self):
        """All pairs of numbers, [p * p, 2], in the order of a grid [a, b]."""
        numbers = torch.arange(self.p)
        return torch.cartesian_prod(numbers, numbers)

    def answers(self):
        """(a + b) mod p for each pair, or fixed random numbers: [p * p]."""
        if not self.random_answers:
            return pair_sums(self.p).flatten()
        return torch.randint(self.p, (self.p**2,), generator=seeded_generator(self.seed + 1))

    def trained_on(self):
        """Which pairs are in the training set, [p * p], bool."""
        drawn = torch.rand(self.p, self.p, generator=seeded_generator(self.seed))
        if self.symmetric:
            drawn = drawn.triu() + drawn.triu(1).T
        return (drawn < drawn.quantile(self.fraction)).flatten()

    def kept_steps(self):
        """The steps whose weights are kept: 0, then each about STEPS_APART times the one before, up
        to the last."""
        n = math.ceil(math.log(self.max_steps, STEPS_APART))
        return sorted({0, self.max_steps} | {round(STEPS_APART**i) for i in range(n)})



class AtEquals(nn.Module):
    """The model's logits of the p numbers after "a b =", computed in a quarter of the time.

    In one layer without LayerNorm, what "=" reads of a number depends only on that number and its
    place. So keys and values are computed once for each number in each of the two places, and only
    "=" is computed further. The result is exactly that of the model.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.p = model.cfg.d_vocab - 1

    def forward(self, pairs):
        """pairs [n, 2] -> logits [n, p]."""
        attn, mlp = self.model.blocks[0].attn, self.model.blocks[0].mlp

        # keys and values of every number in both places; the query, key and value of "="
        places = torch.arange(2)[:, None].expand(2, self.p)
        numbers = self.model.embed(torch.arange(self.p).expand(2, self.p), places)
        equals = self.model.embed(torch.tensor([[self.p]]), torch.tensor([2]))  # [1, 1, d_model]
        q, own_k, own_v = attn.project(equals, equals, equals)  # [1, 1, head, d_head]
        _, k, v = attn.project(numbers, numbers, numbers)  # [place, p, head, d_head]

        # how much "=" looks at a, at b and at itself
        scores = (k * q).sum(-1) / math.sqrt(attn.d_head)  # [place, p, head]
        own = (own_k * q).sum(-1)[0] / math.sqrt(attn.d_head)  # [1, head]
        a, b = pairs.unbind(1)
        scores = torch.stack([scores[0][a], scores[1][b], own.expand(len(pairs), -1)])
        pattern = scores.softmax(0).unsqueeze(-1)  # [key, n, head, 1]: rows of three are slow
        from_a, from_b, from_own = pattern
        z = from_a * v[0][a] + from_b * v[1][b] + from_own * own_v[0]  # [n, head, d_head]

        # the rest of the block, at "=" alone
        resid = equals + attn.write(z.unsqueeze(1))  # [n, 1, d_model]
        resid = resid + mlp(resid)
        return self.model.unembed(resid)[:, 0, :self.p]


def exact_loss(logits, answers):
    """Cross-entropy from float64 log-probabilities. In float32 a loss of 1e-7 is rounding error,
    and its gradient makes the weights jump."""
    return cross_entropy(logits.double(), answers)


def train_to_add(model, recipe, label, trainings=None):
    """Train the model in place on the pairs of a GrokkingRecipe, with all of them in each step.

    It ends at max_steps, or after twice the steps that it took to learn to add, if that is earlier:
    not all seeds are equally fast, and what was learned by heart goes away last.
    label: the training's name in its progress line; trainings: the Trainings that it is one of.
    Returns the history: {"steps": the kept ones, "weights": {name: [step, ...]}}.
    """
    known = recipe.trained_on()
    batch = recipe.pairs()[known], recipe.answers()[known]
    others = recipe.pairs()[~known], recipe.answers()[~known]
    how = TrainConfig(
        max_steps=recipe.max_steps, optimizer="adamw", lr=recipe.lr, beta2=0.98, warmup_steps=10,
        weight_decay=recipe.weight_decay, final_lr_fraction=1.0, grad_clip=0.0)

    at_equals = AtEquals(model)
    wanted = set(recipe.kept_steps())
    kept = [0]
    states = [copy_weights(model)]
    last = recipe.max_steps
    trainings = trainings or Trainings([recipe.max_steps])
    trainings.begin(label)
    for step in fit(at_equals, lambda: batch, how, loss_fn=exact_loss):
        trainings.show(step.number, f"loss {step.loss:.2g}")
        if step.number in wanted or step.number == last:
            kept.append(step.number)
            states.append(copy_weights(model))
            if last == recipe.max_steps and loss_on(at_equals, *others) < LEARNED:
                last = min(2 * step.number, recipe.max_steps)
        if step.number == last:
            break
    trainings.close()

    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    return {"steps": kept, "weights": weights}


@torch.no_grad()
def loss_on(at_equals, pairs, answers):
    """The mean loss on some pairs [n, 2], in nats; at_equals: an AtEquals; answers: [n]."""
    return exact_loss(at_equals(pairs), answers).item()


def trained_adder(path, recipe, label, *, retrain=False, trainings=None):
    """(model, history) of a GrokkingRecipe, trained, or read from the checkpoint.pt at `path`.

    label, trainings: as in `train_to_add`. retrain: train even if the model is there.
    """
    model, state = trained_gpt(
        path, recipe.model_config(), recipe.seed,
        lambda model: {"history": train_to_add(model, recipe, label, trainings)},
        tokenizer=numbers_tokenizer(recipe.p), settings=asdict(recipe), retrain=retrain,
        trainings=trainings)
    return model, state["history"]


def copy_weights(model):
    """{name: a copy of the weight}, which further training does not change."""
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def numbers_tokenizer(p):
    """A tokenizer for texts such as "3 4 =": the id of a number is the number, that of "=" is p."""
    words = [*map(str, range(p)), "="]
    return WordTokenizer().load_state_dict({"kind": "word", "symbols": words})


@torch.no_grad()
def states_of(recipe, history):
    """Yield (step, model, logits [a, b, c] in float64) of each kept state.

    The model is always the same object, with the weights of one state after another.
    """
    model = GPT(recipe.model_config(), seed=None).eval()
    p = recipe.p
    for i, step in enumerate(history["steps"]):
        weights = {name: each[i] for name, each in history["weights"].items()}
        model.load_weights_(weights, "history")
        yield step, model, AtEquals(model)(recipe.pairs()).double().view(p, p, p)
