"""Train a small model on a task that needs copy suppression: no predicted token may come twice.

A text walks through tables of successors and never steps to a successor that it has already seen.
One table gives the successors of the last token, another those of the token before it. A model must
fetch that earlier token first, so the prediction has to be computed within the stream of one
position. In three places of ten the walk *jumps* instead, to any token that is not a successor,
seen or not. So a seen token is impossible if it is predicted, and possible if it is not. It is
wrong to suppress everything that was seen, and wrong to suppress everything that is predicted.

    p(next) = (1 - jumps) * (odds of the successors not seen yet, normalised)
            + jumps * (uniform over all tokens that are not successors)

Each probability depends on the visible text alone, so it is the best possible prediction. The mean
of -log p is the floor of the loss, as in corpus.py.

    texts = Walks(seed=0)
    tokens, chances = texts.draw(64, generator)   # chances: [batch, pos, d_vocab], the exact ones
    model = trained_suppressor(Path("outputs/copy_suppression/seed_0"), SuppressionRecipe(seed=0))

The model has two layers without MLPs, two heads in each, and tied embeddings, as in GPT-2. Other
designs were tried with seed 0 alone. With untied embeddings, the second layer looks at the key
*after* the predicted token (2.4 to 4.7 even shares), where a previous-token head has written it.
With four heads of 16 dimensions, each suppresses a third of the tokens. With one head per layer no
suppression head forms (0.36 nats above the floor). If jumps lead only to tokens that were seen,
the model first learns to raise seen tokens, and after 3,000 steps seven trials without MLPs lie
0.25 to 0.55 nats above the floor.

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
Prerequisites: corpus.py, train.py, experiments/wired/model.py
Next: experiments/suppression/cspa.py
Source: McDougall et al. 2023 (copy suppression); Crutchfield & Young 1989 (unifilar sources)
"""

import string
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

from config import ModelConfig, TrainConfig
from experiments.common import fit_with_progress, trained_gpt
from experiments.wired.model import Pairs
from losses import IGNORED
from tokenizer import CharTokenizer
from utils import UserError, seeded_generator

NAMES = string.printable  # characters that name the tokens, so that a run can be read
DRAWN_AT_ONCE = 64  # batches of texts; drawing them one by one would take a sixth of the time


# The texts


@dataclass(frozen=True)
class Walks:
    """Texts that walk through tables of successors.

    seed: of the tables. n_pos: tokens in a text. odds: of a token's successors in each table.
    lags: whose successors can come next: those of the last token (1), of the one before it (2), or
    of both, each with a table of its own. jumps: the share of steps to a token that is not a
    successor. goes_back: True is the control, in which a seen successor can come again.
    """

    seed: int = 0
    n_pos: int = 25
    d_vocab: int = 32
    odds: tuple = (2, 1)
    lags: tuple = (1, 2)
    jumps: float = 0.3
    goes_back: bool = False

    @cached_property
    def tables(self):
        """[lag, d_vocab, d_vocab] in float64: the odds of each token (column) after each source
        (row), and 0 for tokens that are not successors. Each token is a successor as often as it
        has successors, and never its own."""
        generator = seeded_generator(self.seed)
        every = torch.arange(self.d_vocab)
        tables = torch.zeros(len(self.lags), self.d_vocab, self.d_vocab, dtype=torch.float64)
        for table in tables:
            for odds in self.odds:
                follower = every
                while (follower == every).any() or table[every, follower].any():
                    follower = torch.randperm(self.d_vocab, generator=generator)
                table[every, follower] = float(odds)
        return tables

    def predicted_odds(self, tokens):
        """[batch, pos, d_vocab] in float64: the odds that a token comes next, after each position.

        tokens: [batch, pos]. A source that would lie before the text predicts nothing."""
        odds = torch.zeros(*tokens.shape, self.d_vocab, dtype=torch.float64)
        n_pos = tokens.shape[1]
        for lag, table in zip(self.lags, self.tables, strict=True):
            odds[:, lag - 1:] += table[tokens[:, :n_pos - lag + 1]]
        return odds

    def next_chances(self, odds, seen):
        """The exact chances of the next token, [..., d_vocab] in float64.

        odds: [..., d_vocab], those of `predicted_odds`. seen: [..., d_vocab], bool.
        """
        onward = odds if self.goes_back else odds * ~seen
        jump = (odds == 0).double()
        jump = jump / jump.sum(-1, keepdim=True)

        total = onward.sum(-1, keepdim=True)
        walk = (1 - self.jumps) * onward / total + self.jumps * jump
        return torch.where(total > 0, walk, jump)  # without an unseen successor: a jump

    def draw(self, n_rows, generator):
        """(tokens [batch, pos], chances [batch, pos, d_vocab]): texts, and the exact chances from
        which each token was drawn. The first tokens, up to the largest lag, are uniform."""
        rows = torch.arange(n_rows)
        first = max(self.lags)
        tokens = torch.zeros(n_rows, self.n_pos, dtype=torch.long)
        chances = torch.full((n_rows, self.n_pos, self.d_vocab), 1 / self.d_vocab).double()
        seen = torch.zeros(n_rows, self.d_vocab, dtype=torch.bool)
        for pos in range(self.n_pos):
            if pos >= first:
                odds = self.predicted_odds(tokens[:, pos - first:pos])[:, -1]
                chances[:, pos] = self.next_chances(odds, seen)
            tokens[:, pos] = torch.multinomial(chances[:, pos], 1, generator=generator)[:, 0]
            seen[rows, tokens[:, pos]] = True
        return tokens, chances

    def chances_after(self, tokens):
        """[batch, pos, d_vocab] in float64: the exact chances of the token after each position,
        valid from the first position that has all of its sources. tokens: [batch, pos]."""
        seen, _ = self.states(tokens)
        return self.next_chances(self.predicted_odds(tokens), seen)

    def are_possible(self, tokens):
        """[batch], bool: which texts, [batch, pos], have a chance above 0."""
        first = max(self.lags)
        chances = self.chances_after(tokens)[:, first - 1:-1]
        return (chances.gather(2, tokens[:, first:, None]) > 0).all(1)[:, 0]

    def states(self, tokens):
        """(seen, predicted), bool [batch, pos, d_vocab], after each position.

        seen: which tokens the text holds so far. predicted: which are successors of a source.
        """
        one_hot = torch.nn.functional.one_hot(tokens, self.d_vocab).bool()
        return one_hot.cummax(1).values, self.predicted_odds(tokens) > 0


# Texts in pairs


def suppression_pairs(walks, n_pairs, generator):
    """n Pairs of texts in which a predicted token was seen (clean) or not (corrupted).

    walks: Walks. At the end of both texts two tokens are predicted with the same odds: `right` was
    not seen, and `wrong` was seen in the clean text alone. In the corrupted text another token,
    which is not predicted at the end, replaces it. Both texts can be drawn from the walks. So the
    logit of right minus that of wrong is the suppression caused by what was seen.
    Raises UserError for walks in which no two successors are equally likely.
    """
    odds = walks.odds * len(walks.lags)
    if len(set(odds)) == len(odds):
        raise UserError(f"odds={walks.odds} with lags={walks.lags} make no two successors equally "
                        "likely; give two tokens the same odds")
    pairs = []
    while len(pairs) < n_pairs:
        tokens, _ = walks.draw(n_pairs, generator)
        found = [pair_of_text(walks, text, generator) for text in tokens[:, :-1]]
        pairs += [pair for pair in found if pair is not None]
    clean, corrupted, right, wrong = zip(*pairs[:n_pairs], strict=True)
    return Pairs(torch.stack(clean), torch.stack(corrupted), torch.stack(right),
                 torch.stack(wrong))


def pair_of_text(walks, text, generator):
    """(clean, corrupted [pos], right, wrong []) of one text [pos], as in `suppression_pairs`; None
    if the text has no such pair."""
    odds = walks.predicted_odds(text[None])[0, -1]  # [d_vocab]
    count = torch.bincount(text, minlength=walks.d_vocab)
    n_fixed = max(walks.lags)  # the sources of the last prediction stay
    count_early = torch.bincount(text[:-n_fixed], minlength=walks.d_vocab)

    # a seen and an unseen token, predicted with the same odds
    was_seen_once = (odds > 0) & (count == 1) & (count_early == 1)
    is_unseen = (odds > 0) & (count == 0)
    fits = was_seen_once[:, None] & is_unseen & (odds[:, None] == odds)  # [wrong, right]
    if not fits.any():
        return None
    wrong, right = draw_row(fits.nonzero(), generator)

    # a token to replace the seen one that leaves the text possible
    every = torch.arange(walks.d_vocab)
    others = torch.where(text == wrong, every[:, None], text)  # [replacement, pos]
    leaves_possible = walks.are_possible(others) & (odds == 0)
    if not leaves_possible.any():
        return None
    return text, draw_row(others[leaves_possible], generator), right, wrong


def draw_row(rows, generator):
    """A random row of a tensor, each equally likely."""
    return rows[torch.randint(len(rows), (), generator=generator)]


# The training


@dataclass(frozen=True)
class SuppressionRecipe(Walks):
    """Everything that a trained model depends on: its walks, its shape and its training.

    The seed of the walks is also that of the model.
    """

    n_layers: int = 2
    n_heads: int = 2
    d_model: int = 64
    attn_only: bool = True
    tie_embeddings: bool = True
    steps: int = 3000
    batch_size: int = 32
    lr: float = 5e-3
    muon_lr: float = 0.02

    @property
    def n_ctx(self):
        """The context: the length of a text without its last token."""
        return self.n_pos - 1

    def model_config(self):
        """The model's shape as a ModelConfig."""
        return ModelConfig(
            n_layers=self.n_layers, n_heads=self.n_heads, d_model=self.d_model, n_ctx=self.n_ctx,
            d_vocab=self.d_vocab, attn_only=self.attn_only,
            tie_embeddings=self.tie_embeddings)


def batches(recipe):
    """Yield (inputs, targets), each [batch, pos], forever. The uniform tokens at the start of a
    text are not targets."""
    generator = seeded_generator(recipe.seed)
    while True:
        tokens, _ = recipe.draw(DRAWN_AT_ONCE * recipe.batch_size, generator)
        targets = tokens.clone()
        targets[:, :max(recipe.lags)] = IGNORED
        for batch, wanted in zip(tokens.split(recipe.batch_size), targets.split(recipe.batch_size),
                                 strict=True):
            yield batch[:, :-1], wanted[:, 1:]


def trained_suppressor(folder, recipe, *, retrain=False, trainings=None):
    """The model of a SuppressionRecipe, trained, or read from the checkpoint.pt in `folder`.

    retrain: train it even if it is there. trainings: the Trainings that this model is one of.
    """
    how = TrainConfig(max_steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lr,
                      muon_lr=recipe.muon_lr, warmup_steps=40, weight_decay=0.0)
    supply = batches(recipe)

    def train(model):
        fit_with_progress(model, supply.__next__, how, folder.name.replace("_", " "),
                          trainings=trainings)

    model, _ = trained_gpt(folder / "checkpoint.pt", recipe.model_config(), recipe.seed, train,
                           tokenizer=CharTokenizer().fit(NAMES[:recipe.d_vocab]),
                           settings=asdict(recipe), retrain=retrain, trainings=trainings)
    return model
