"""Make prompts from the gifts and songs of the built-in corpus, and train a model on the corpus.

A gift is "When A and B went to the PLACE, S gave a THING to". S is one of the two people, and the
other one, IO, comes next. Positions are named as in Wang et al.: S1 is the first mention of S, S2
is S as the giver, END is the last word. Three layers without MLPs have room for the three steps of
GPT-2's circuit (detect the duplicate, turn away from it, copy the other name), and every head
writes directly to the logits.

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
Prerequisites: corpus.py, train.py
Next: experiments/indirect_object/measure.py
Source: Wang et al. 2022 (prompts, and the three unrelated names of a corrupted one)
"""

from dataclasses import asdict, dataclass, replace

import torch

import corpus
from config import ModelConfig, TrainConfig
from experiments.common import train_on_text_, trained_gpt
from metrics import Metric
from tokenizer import WordTokenizer

SONG = 5  # syllables of a song in the prompts
SUNG = 2  # syllables that have been repeated when the prompt ends


@dataclass(frozen=True)
class GiftRecipe:
    """How a model is trained on the corpus, which takes 25 s on one core."""

    n_layers: int = 3
    n_heads: int = 4
    d_model: int = 64
    n_ctx: int = 48
    characters: int = 1_500_000  # of the text
    steps: int = 1500
    batch_size: int = 32


@dataclass(frozen=True)
class Gifts:
    """Prompts with an indirect object: clean, and corrupted by three unrelated names.

    clean_tokens, corrupted_tokens: [batch, pos]. receiver, giver: ids [batch] of IO and S. at:
    {"IO", "S1", "S2", "END": positions [batch]}. names: ids [n] of all names. tokens_without:
    clean_tokens with a third person as the giver, so that no name occurs twice.
    """

    clean_tokens: torch.Tensor
    corrupted_tokens: torch.Tensor
    tokens_without: torch.Tensor
    receiver: torch.Tensor
    giver: torch.Tensor
    at: dict
    names: torch.Tensor

    @property
    def tokens_swapped(self):
        """clean_tokens with the other person as the giver: ABBA for BABA, and BABA for ABBA."""
        return self.clean_tokens.scatter(1, self.at["S2"][:, None], self.receiver[:, None])

    @property
    def third(self):
        """The third person who gives in tokens_without, ids [batch]."""
        return self.tokens_without.gather(1, self.at["S2"][:, None])[:, 0]

    @property
    def metric(self):
        """A Metric: the logit of IO minus that of S, in nats."""
        return Metric.logit_diff(self.receiver, self.giver)

    @property
    def named_metric(self):
        """A Metric: the log-odds of the two people who were named against all other names."""
        is_one = (self.names == self.receiver[:, None]) | (self.names == self.giver[:, None])

        def log_odds(logits):
            of_names = logits[:, -1, self.names]  # [batch, name]
            named = of_names.masked_fill(~is_one, -torch.inf).logsumexp(-1)
            return named - of_names.masked_fill(is_one, -torch.inf).logsumexp(-1)

        return Metric(log_odds)


@dataclass(frozen=True)
class Songs:
    """Songs that are repeated up to some syllable.

    tokens: [batch, pos]. target: ids [batch] of the next syllable. source: positions [batch] of the
    target in the song. syllables: ids [n] of all syllables.
    """

    tokens: torch.Tensor
    target: torch.Tensor
    source: torch.Tensor
    syllables: torch.Tensor

    @property
    def metric(self):
        """A Metric: the log-probability of the right syllable among all syllables, in nats."""
        column = (self.syllables == self.target[:, None]).float().argmax(-1)
        return Metric(lambda logits: logits[:, -1, self.syllables].log_softmax(-1).gather(
            -1, column[:, None])[:, 0])


# Prompts


def draw_gifts(tokenizer, n_prompts, seed):
    """Gifts from the corpus's own generator, ABBA and BABA mixed."""
    teller = corpus.Storyteller(seed)
    rows = {"clean": [], "corrupted": [], "without": []}
    receivers = []
    at_giver = []
    for _ in range(n_prompts):
        teller.sample = corpus.Sample()
        teller.say(corpus.END, "When")
        teller.gift()
        *words, receiver = teller.sample.words
        one, two, giver = (place for place, word in enumerate(words) if word in corpus.NAMES)

        # names that are not in the prompt replace those that are
        others = [name for name in corpus.NAMES if name not in (words[one], words[two])]
        strangers = teller.random.sample(others, 3)
        corrupted = list(words)
        for place, name in zip((one, two, giver), strangers, strict=True):
            corrupted[place] = name
        without = list(words)
        without[giver] = strangers[2]

        for kind, row in (("clean", words), ("corrupted", corrupted), ("without", without)):
            rows[kind].append([tokenizer.ids[word] for word in row])
        receivers.append(tokenizer.ids[receiver])
        at_giver.append(giver)

    clean, corrupted, without = (torch.tensor(rows[kind]) for kind in rows)
    names = torch.tensor([tokenizer.ids[name] for name in corpus.NAMES])
    return Gifts(clean, corrupted, without, torch.tensor(receivers),
                 clean.gather(1, torch.tensor(at_giver)[:, None])[:, 0],
                 places_of(clean, torch.tensor(receivers), torch.tensor(at_giver)), names)


def places_of(tokens, receiver, second):
    """{"IO", "S1", "S2", "END": positions [batch]}; second: the positions of S2, [batch]."""
    giver = tokens.gather(1, second[:, None])
    return {"IO": (tokens == receiver[:, None]).float().argmax(1),
            "S1": (tokens == giver).float().argmax(1), "S2": second,
            "END": torch.full_like(second, tokens.shape[1] - 1)}


def draw_songs(tokenizer, n_prompts, seed):
    """Songs from the corpus's own generator, each of SONG different syllables."""
    teller = corpus.Storyteller(seed)
    rows = []
    targets = []
    while len(rows) < n_prompts:
        teller.sample = corpus.Sample()
        teller.say(corpus.END)
        teller.draw(corpus.NAMES)
        teller.say("sings")
        teller.song()
        words = teller.sample.words
        song = words[3 : words.index(",")]
        if len(song) == len(set(song)) == SONG:
            end = words.index("again") + 1 + SUNG
            rows.append([tokenizer.ids[word] for word in words[:end]])
            targets.append(tokenizer.ids[words[end]])
    tokens, target = torch.tensor(rows), torch.tensor(targets)
    return Songs(tokens, target, (tokens == target[:, None]).float().argmax(1),
                 torch.tensor([tokenizer.ids[word] for word in corpus.SYLLABLES]))


# The model


def gift_text(recipe):
    """(tokens [n], tokenizer) of the text that a recipe trains on."""
    text = corpus.text(recipe.characters)
    tokenizer = WordTokenizer().fit(text)
    return torch.tensor(tokenizer.encode(text)), tokenizer


def gift_shape(recipe, tokenizer):
    """The ModelConfig of a recipe."""
    return replace(ModelConfig(), n_layers=recipe.n_layers, n_heads=recipe.n_heads,
                   d_model=recipe.d_model, d_head=None, n_ctx=recipe.n_ctx,
                   d_vocab=tokenizer.d_vocab, attn_only=True)


def trained_gift_model(folder, seed, recipe, text, *, retrain=False, trainings=None):
    """The model of a seed, trained, or read if it was kept.

    text: what `gift_text` returns. trainings: the Trainings that this model is one of.
    """
    tokens, tokenizer = text
    how = TrainConfig(max_steps=recipe.steps, batch_size=recipe.batch_size)

    def train(model):
        train_on_text_(model, tokens, how, seed, f"seed {seed}", trainings=trainings)

    model, _ = trained_gpt(folder / f"seed_{seed}" / "checkpoint.pt",
                           gift_shape(recipe, tokenizer), seed, train, tokenizer=tokenizer,
                           settings={"recipe": asdict(recipe), "train": asdict(how)},
                           retrain=retrain, trainings=trainings)
    return model
