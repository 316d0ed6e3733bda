"""The models whose activations get a dictionary, the hook points, and the texts.

Two are trained here where they are not kept: a model of the words of the built-in corpus, of which
`known_variables` says what there is to find, and what `python train.py` makes, in short.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: train.py, experiments/dictionaries/variables.py
Next: experiments/dictionaries/trained.py
Source: Bricken et al. 2023 (a dictionary of an MLP's neurons)
"""

import re
from dataclasses import asdict, dataclass, field, replace

import torch

import corpus
from activation_cache import UnknownName
from checkpoint import (
    config_of,
    find_run,
    list_runs,
    load_checkpoint,
    load_model,
    load_pretrained,
)
from config import DataConfig, ModelConfig, TrainConfig
from data import load_dataset
from experiments.common import (
    encode_start,
    train_on_text_,
    trained_gpt,
    validation_tokens,
)
from experiments.dictionaries.variables import known_variables, word_to_come
from model import GPT
from tokenizer import WordTokenizer
from utils import UserError, suggest_closest

POINTS = ("blocks.-1.mlp.hook_post", "blocks.-1.hook_resid_post")  # looked at, unless one is named
TRAIN_TEXT, DICTIONARY_TEXT, HELD_OUT_TEXT = 0, 1, 2  # seeds of the corpus: no story in common
PRETRAINED_WINDOWS = 100
HELD_OUT_SHARE = 1 / 3  # of a text that only has a beginning and an end


@dataclass(frozen=True)
class Subject:
    """A model whose activations at one hook point get a dictionary.

    at: the hook point, [batch, pos, d]. tokens: [batch, pos], to train the dictionary on; held_out:
    [batch, pos], to measure it on. variables: {name: [batch, pos], bool}, what is known of each
    position of held_out; empty where nothing is. to_come: {name of a variable: the id of the token
    that it says will come}, for those that name one. seed: of the model, where it has one.
    """

    name: str
    model: GPT
    tokenizer: object
    at: str
    tokens: torch.Tensor
    held_out: torch.Tensor
    variables: dict = field(default_factory=dict)
    to_come: dict = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class WordRecipe:
    """How the model of words is trained."""

    n_layers: int = 2
    n_heads: int = 4
    d_model: int = 64
    d_mlp: int = 128
    n_ctx: int = 48
    characters: int = 600_000  # of the corpus
    steps: int = 1400
    batch_size: int = 24
    lr: float = 8e-3
    muon_lr: float = 0.02
    windows: int = 2000  # of stories, to train a dictionary on
    held_out: int = 360  # windows, to measure it on

    def shape(self, d_vocab):
        """The ModelConfig of the model."""
        return ModelConfig(n_layers=self.n_layers, n_heads=self.n_heads, d_model=self.d_model,
                           d_mlp=self.d_mlp, n_ctx=self.n_ctx, d_vocab=d_vocab)

    @classmethod
    def quick(cls):
        """A small one, to see that it runs."""
        return cls(d_model=32, d_mlp=32, characters=60_000, steps=60, windows=150, held_out=100)


@dataclass(frozen=True)
class TextRecipe:
    """How the model of text is trained where no run is there: train.py's, with fewer steps."""

    steps: int = 600
    windows: int = 900  # of the validation text, at most

    @classmethod
    def quick(cls):
        """A small one, to see that it runs."""
        return cls(steps=20, windows=120)


def load_subjects(cfg, folder):
    """Yields the Subjects: of the run or pretrained model that was named; else of the word model of
    each seed, and then of one model of text.

    cfg: has run_name, model, text (a file for these two; None: the validation text, or the built-in
    corpus), at (a hook point; None: POINTS, as far as the model has them), seeds, out_dir, retrain
    and quick. folder: where the models that are trained here are kept. What can
    be wrong with what was asked for is raised as UserError before a training.
    """
    if cfg.run_name is not None:
        yield from run_subjects(cfg.run_name, cfg.at, cfg.out_dir, text=cfg.text)
    elif cfg.model is not None:
        yield from pretrained_subjects(cfg.model, cfg.at, text=cfg.text)
    else:
        word_recipe = WordRecipe.quick() if cfg.quick else WordRecipe()
        for seed in cfg.seeds:
            yield from word_subjects(seed, cfg.at, folder, word_recipe, retrain=cfg.retrain)
        yield from text_subjects(cfg, folder)


# Hook points


def choose_points(model, at=None):
    """The hook points of a model to look at, full names: `at` alone or, where it is None, those of
    POINTS that the model has.

    at: "blocks.1.mlp.hook_post"; a layer below 0 counts from the last. Raises UserError for a name
    that the model does not have, and for a point that is not [batch, pos, d], d more than 1.
    """
    if at is not None:
        return [check_point(model, at)]
    points = [name for name in (count_layer(model, point) for point in POINTS)
              if can_be_looked_at(model, name)]
    return points or [check_point(model, "hook_embed")]


def count_layer(model, at):
    """The name of a hook point whose layer is counted from 0."""
    layer = re.match(r"blocks\.(-\d+)\.", at)
    if not layer:
        return at
    number = model.cfg.n_layers + int(layer[1])
    return f"blocks.{number}.{at[layer.end():]}" if number >= 0 else at


def can_be_looked_at(model, name):
    """Whether a model has a hook point of that name, and can come there."""
    return name in model.hook_points() and not (model.cfg.attn_only and ".mlp" in name)


def check_point(model, at):
    """The full name of a hook point [batch, pos, d]; UserError for any other."""
    name = count_layer(model, at)
    points = model.hook_points()
    if not can_be_looked_at(model, name):
        raise UnknownName(f"{at} is not a hook of this model{suggest_closest(name, points)}")
    axes = points[name].axes.split()
    if axes[:2] != ["batch", "pos"] or len(axes) != 3 or axes[2] == "1":
        raise UserError(f"{at} is [{', '.join(axes)}], and a dictionary reads [batch, pos, d]; "
                        "choose another, such as blocks.0.hook_resid_post")
    return name


# The model of words


def word_subjects(seed, at, folder, recipe, *, retrain=False):
    """The Subjects of the word model of a seed, one for each point of `choose_points`."""
    points = choose_points(GPT(recipe.shape(d_vocab=1)), at)  # refused before a training
    model, tokenizer = trained_word_model(seed, folder, recipe, retrain=retrain)
    train_stories = story_windows(DICTIONARY_TEXT, recipe.windows, recipe.n_ctx)
    held_out_stories = story_windows(HELD_OUT_TEXT, recipe.held_out, recipe.n_ctx)
    tokens, held_out = (as_ids(stories, tokenizer) for stories in (train_stories, held_out_stories))
    variables = variables_of(held_out_stories)
    to_come = {name: tokenizer.ids[word_to_come(name)] for name in variables if word_to_come(name)}
    return [Subject(f"words, seed {seed}", model, tokenizer, point, tokens, held_out, variables,
                    to_come, seed) for point in points]


def word_subject(seed, at, folder, recipe=None, *, retrain=False):
    """The Subject of the word model of a seed at one hook point."""
    return word_subjects(seed, at, folder, recipe or WordRecipe(), retrain=retrain)[0]


def trained_word_model(seed, folder, recipe, *, retrain=False):
    """(model, tokenizer) of a WordRecipe, trained or read where it was kept."""
    text = corpus.text(recipe.characters, TRAIN_TEXT)
    tokenizer = WordTokenizer().fit(text)
    how = TrainConfig(max_steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lr,
                      muon_lr=recipe.muon_lr)

    def train_(model):
        train_on_text_(model, torch.tensor(tokenizer.encode(text)), how, seed,
                       f"words, seed {seed}")

    model, _ = trained_gpt(folder / f"words_seed_{seed}" / "checkpoint.pt",
                           recipe.shape(tokenizer.d_vocab), seed, train_, tokenizer=tokenizer,
                           retrain=retrain,
                           settings={"train": asdict(how), "characters": recipe.characters})
    return model, tokenizer


def story_windows(text_seed, n_windows, n_ctx):
    """[n_windows lists of n_ctx words] of the corpus. Each begins with the END before a story, so
    that all that a story has said is in the window; one may reach into the next story."""
    characters = 7 * n_windows * n_ctx  # a word and the space before it have fewer
    words = [corpus.END, *corpus.sample_of_length(characters, text_seed).words]
    windows = []
    begin = 0
    while len(windows) < n_windows:
        windows.append(words[begin : begin + n_ctx])
        begin = words.index(corpus.END, begin + n_ctx)
    return windows


def as_ids(windows, tokenizer):
    """Lists of words as ids, [batch, pos]."""
    return torch.tensor([[tokenizer.ids[word] for word in words] for words in windows])


def variables_of(windows):
    """{name: [batch, pos], bool}: `known_variables` of each window."""
    found = [known_variables(words) for words in windows]
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


# A model of text: what train.py makes, or whatever was named


def run_subjects(run_name, at, out_dir, *, text=None, windows=TextRecipe.windows):
    """The Subjects of a run of train.py, on the text that it was validated on, or on a file."""
    run = find_run(run_name, out_dir)
    model, tokenizer = load_model(run)
    points = choose_points(model, at)
    if text is not None:
        ids = encode_start(text, tokenizer, windows * model.cfg.n_ctx, HELD_OUT_TEXT)
    else:
        try:
            ids = validation_tokens(run)
        except UserError as error:
            raise UserError(f"{error}; or give a file with --text") from None
    return text_subjects_of(run.name, model, tokenizer, points, ids, windows)


def pretrained_subjects(name, at, *, text=None, windows=PRETRAINED_WINDOWS):
    """The Subjects of a published model or its folder, on a file of text, or on stories of the
    built-in corpus."""
    model, tokenizer = load_pretrained(name)
    points = choose_points(model, at)
    ids = encode_start(text, tokenizer, windows * model.cfg.n_ctx, HELD_OUT_TEXT)
    return text_subjects_of(name, model, tokenizer, points, ids, windows)


def text_subjects(cfg, folder):
    """The Subjects of a run in out_dir with train.py's defaults, the newest, or else of a model
    that is trained here as train.py would, with fewer steps, and kept."""
    recipe = TextRecipe.quick() if cfg.quick else TextRecipe()
    run = None if cfg.quick else find_default_run(cfg.out_dir)
    if run is not None:
        return run_subjects(run, cfg.at, cfg.out_dir, windows=recipe.windows)

    dataset = load_dataset(DataConfig(dataset="builtin" if cfg.quick else "auto"),
                           ModelConfig().n_ctx)
    shape = replace(ModelConfig(), d_vocab=dataset.tokenizer.d_vocab)
    how = TrainConfig(max_steps=recipe.steps)
    model, _ = trained_gpt(
        folder / "text_seed_0" / "checkpoint.pt", shape, 0,
        lambda model: train_on_text_(model, dataset.train, how, 0, dataset.name),
        tokenizer=dataset.tokenizer, retrain=cfg.retrain,
        settings={"train": asdict(how), "data": dataset.sha256})
    return text_subjects_of(dataset.name, model, dataset.tokenizer, choose_points(model, cfg.at),
                            dataset.val, recipe.windows)


def find_default_run(out_dir):
    """The folder of the newest run in out_dir that has train.py's default shape and text, and whose
    text can be had; None where there is none."""
    for run in reversed(list_runs(out_dir)):
        path = run / "checkpoint.pt"
        state = load_checkpoint(path)
        cfg = config_of(state, path)
        if replace(cfg.model, d_vocab=None) != ModelConfig() or cfg.data != DataConfig():
            continue
        try:
            validation_tokens(run)
        except UserError:
            continue
        return run
    return None


def text_subjects_of(name, model, tokenizer, points, text, windows):
    """The Subjects of a model at some points: text, ids [n], is cut into windows; the last
    HELD_OUT_SHARE of them are held out."""
    length = min(model.cfg.n_ctx, ModelConfig().n_ctx)
    rows = min(windows, len(text) // length)
    n_held_out = round(HELD_OUT_SHARE * rows)
    if n_held_out < 2:
        raise UserError(f"the text of {name} has {len(text)} tokens, which are {rows} windows of "
                        f"{length}, and a dictionary wants 5 or more; choose a longer text")
    tokens = torch.as_tensor(text[: rows * length]).view(rows, length)
    return [Subject(name, model, tokenizer, point, tokens[:-n_held_out], tokens[-n_held_out:])
            for point in points]
