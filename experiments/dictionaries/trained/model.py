"""Load or train the models whose activations get a dictionary, and choose hook points and texts.

A run of train.py or a pretrained model can be named. Two kinds of models are trained here, unless
they were kept. One is a model of the words of the built-in corpus; there `known_variables` says
what a dictionary could find. The other is the model of `python train.py`, with fewer steps.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: corpus.py, train.py, experiments/dictionaries/model.py
Next: experiments/dictionaries/trained/measure.py
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
from experiments.dictionaries.trained.variables import known_variables, word_to_come
from model import GPT
from tokenizer import WordTokenizer
from utils import UserError, suggest_closest

POINTS = ("blocks.-1.mlp.hook_post", "blocks.-1.hook_resid_post")  # used unless one is named
TRAIN_TEXT, DICTIONARY_TEXT, HELD_OUT_TEXT = 0, 1, 2  # seeds of the corpus: no story in common
PRETRAINED_WINDOWS = 100
HELD_OUT_SHARE = 1 / 3  # the end of a text that has no validation part of its own


@dataclass(frozen=True)
class Subject:
    """A model whose activations at one hook point get a dictionary.

    at: the hook point, [batch, pos, d]. tokens: [batch, pos], to train the dictionary on; held_out:
    [batch, pos], to measure it on. variables: {name: [batch, pos], bool}, the variables that hold
    at each position of held_out; empty if none are known. to_come: {name of a variable: id of the
    token that it says will come}, for those that name one. seed: the model's, if it has one.
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
        """The ModelConfig of the model. d_vocab: the number of words."""
        return ModelConfig(n_layers=self.n_layers, n_heads=self.n_heads, d_model=self.d_model,
                           d_mlp=self.d_mlp, n_ctx=self.n_ctx, d_vocab=d_vocab)

    @classmethod
    def quick(cls):
        """A small recipe, for quick runs."""
        return cls(d_model=32, d_mlp=32, characters=60_000, steps=60, windows=150, held_out=100)


@dataclass(frozen=True)
class TextRecipe:
    """How the model of text is trained if there is no run: as by train.py, with fewer steps."""

    steps: int = 600
    windows: int = 900  # of the validation text, at most

    @classmethod
    def quick(cls):
        """A small recipe, for quick runs."""
        return cls(steps=20, windows=120)


def load_subjects(cfg, folder, trainings=None):
    """Yield the Subjects: of the run or pretrained model that was named, or else of the word model
    of each seed and then of one model of text.

    cfg: has run_name, model, text (a file for these two; None: the validation text, or the built-in
    corpus), at (a hook point; None: those of POINTS that the model has), seeds, out_dir, retrain
    and quick. folder: where the models that are trained here are kept. trainings: the Trainings
    that these are among, with the steps of `training_steps`. Raises UserError for a wrong request,
    before anything is trained.
    """
    if cfg.run_name is not None:
        yield from run_subjects(cfg.run_name, cfg.at, cfg.out_dir, text=cfg.text)
    elif cfg.model is not None:
        yield from pretrained_subjects(cfg.model, cfg.at, text=cfg.text)
    else:
        word_recipe = model_recipe(WordRecipe, cfg)
        for seed in cfg.seeds:
            yield from word_subjects(seed, cfg.at, folder, word_recipe, retrain=cfg.retrain,
                                     trainings=trainings)
        yield from text_subjects(cfg, folder, trainings)


def model_recipe(kind, cfg):
    """A recipe for a run of the program: kind() or, if cfg.quick, kind.quick()."""
    return kind.quick() if cfg.quick else kind()


def training_steps(cfg):
    """The steps of each training of `load_subjects`, if no run or pretrained model is named."""
    of_words = model_recipe(WordRecipe, cfg).steps
    return [of_words] * len(cfg.seeds) + [model_recipe(TextRecipe, cfg).steps]


# Hook points


def choose_points(model, at=None):
    """The full names of the hook points to use: `at` alone, or those of POINTS that the model has.

    at: such as "blocks.1.mlp.hook_post", or None; a layer below 0 counts from the last. Raises
    UserError for a name that the model does not have, and for a point that is not [batch, pos, d]
    with d more than 1.
    """
    if at is not None:
        return [check_point(model, at)]
    points = [name for name in (count_layer(model, point) for point in POINTS)
              if is_reached(model, name)]
    return points or [check_point(model, "hook_embed")]


def count_layer(model, at):
    """The name of a hook point with its layer counted from 0."""
    layer = re.match(r"blocks\.(-\d+)\.", at)
    if not layer:
        return at
    number = model.cfg.n_layers + int(layer[1])
    return f"blocks.{number}.{at[layer.end():]}" if number >= 0 else at


def is_reached(model, name):
    """Whether a model has a hook point of this name and reaches it in a forward pass."""
    return name in model.hook_points() and not (model.cfg.attn_only and ".mlp" in name)


def check_point(model, at):
    """The full name of a hook point [batch, pos, d]. Raises UserError for any other."""
    name = count_layer(model, at)
    points = model.hook_points()
    if not is_reached(model, name):
        raise UnknownName(f"{at} is not a hook of this model{suggest_closest(name, points)}")
    axes = points[name].axes.split()
    if axes[:2] != ["batch", "pos"] or len(axes) != 3 or axes[2] == "1":
        raise UserError(f"{at} is [{', '.join(axes)}], and a dictionary reads [batch, pos, d]; "
                        "choose another, such as blocks.0.hook_resid_post")
    return name


# The model of words


def word_subjects(seed, at, folder, recipe, *, retrain=False, trainings=None):
    """The Subjects of the word model of a seed, one for each point of `choose_points`."""
    points = choose_points(GPT(recipe.shape(d_vocab=1)), at)  # a wrong `at` fails before training
    model, tokenizer = trained_word_model(seed, folder, recipe, retrain=retrain,
                                          trainings=trainings)
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


def trained_word_model(seed, folder, recipe, *, retrain=False, trainings=None):
    """(model, tokenizer) of a WordRecipe, trained, or read if it was kept."""
    text = corpus.text(recipe.characters, TRAIN_TEXT)
    tokenizer = WordTokenizer().fit(text)
    how = TrainConfig(max_steps=recipe.steps, batch_size=recipe.batch_size, lr=recipe.lr,
                      muon_lr=recipe.muon_lr)

    def train_(model):
        train_on_text_(model, torch.tensor(tokenizer.encode(text)), how, seed,
                       f"words, seed {seed}", trainings=trainings)

    model, _ = trained_gpt(folder / f"words_seed_{seed}" / "checkpoint.pt",
                           recipe.shape(tokenizer.d_vocab), seed, train_, tokenizer=tokenizer,
                           retrain=retrain, trainings=trainings,
                           settings={"train": asdict(how), "characters": recipe.characters})
    return model, tokenizer


def story_windows(text_seed, n_windows, n_ctx):
    """n_windows lists of n_ctx words each, from the corpus.

    Each window begins with the END before a story, so everything the story has told is in it. It
    may reach into the next story.
    """
    characters = 7 * n_windows * n_ctx  # a word and the space before it have fewer than 7
    words = [corpus.END, *corpus.sample_of_length(characters, text_seed).words]
    windows = []
    begin = 0
    while len(windows) < n_windows:
        windows.append(words[begin : begin + n_ctx])
        begin = words.index(corpus.END, begin + n_ctx)
    return windows


def as_ids(windows, tokenizer):
    """The ids of lists of words, [batch, pos]."""
    return torch.tensor([[tokenizer.ids[word] for word in words] for words in windows])


def variables_of(windows):
    """{name: [batch, pos], bool}: `known_variables` of each window."""
    found = [known_variables(words) for words in windows]
    return {name: torch.stack([each[name] for each in found]) for name in found[0]}


# A model of text: train.py's, or the one that was named


def run_subjects(run_name, at, out_dir, *, text=None, windows=TextRecipe.windows):
    """The Subjects of a run of train.py, on its validation text, or on a file if `text` names one.
    """
    run = find_run(run_name, out_dir)
    model, tokenizer = load_model(run)
    model.check_predicts_tokens("dictionaries are judged by the loss on a text")
    points = choose_points(model, at)
    if text is not None:
        ids = encode_start(text, tokenizer, windows * model.cfg.n_ctx, HELD_OUT_TEXT)
    else:
        try:
            ids = validation_tokens(run)
        except UserError as error:
            raise UserError(f"{error}; or name a file with --text") from None
    return text_subjects_of(run.name, model, tokenizer, points, ids, windows)


def pretrained_subjects(name, at, *, text=None, windows=PRETRAINED_WINDOWS):
    """The Subjects of a pretrained model (a name, or its folder).

    text: a file; None: stories of the built-in corpus.
    """
    model, tokenizer = load_pretrained(name)
    points = choose_points(model, at)
    ids = encode_start(text, tokenizer, windows * model.cfg.n_ctx, HELD_OUT_TEXT)
    return text_subjects_of(name, model, tokenizer, points, ids, windows)


def text_subjects(cfg, folder, trainings=None):
    """The Subjects of the newest run in out_dir with train.py's defaults. If there is none, the
    model is trained here as train.py would, with fewer steps, and kept."""
    recipe = model_recipe(TextRecipe, cfg)
    run = None if cfg.quick else find_default_run(cfg.out_dir)
    if run is not None:
        if trainings is not None:
            trainings.count()
        return run_subjects(run, cfg.at, cfg.out_dir, windows=recipe.windows)

    dataset = load_dataset(DataConfig(dataset="builtin" if cfg.quick else "auto"),
                           ModelConfig().n_ctx)
    shape = replace(ModelConfig(), d_vocab=dataset.tokenizer.d_vocab)
    how = TrainConfig(max_steps=recipe.steps)
    model, _ = trained_gpt(
        folder / "text_seed_0" / "checkpoint.pt", shape, 0,
        lambda model: train_on_text_(model, dataset.train, how, 0, dataset.name,
                                     trainings=trainings),
        tokenizer=dataset.tokenizer, retrain=cfg.retrain, trainings=trainings,
        settings={"train": asdict(how), "data": dataset.sha256})
    return text_subjects_of(dataset.name, model, dataset.tokenizer, choose_points(model, cfg.at),
                            dataset.val, recipe.windows)


def find_default_run(out_dir):
    """The folder of the newest run in out_dir that has train.py's default shape and text.

    A run whose text is no longer available is passed over. None if there is no run left.
    """
    for run in reversed(list_runs(out_dir)):
        path = run / "checkpoint.pt"
        state = load_checkpoint(path)
        cfg = config_of(state, path)
        if cfg.model != ModelConfig(d_vocab=cfg.model.d_vocab) or cfg.data != DataConfig():
            continue
        try:
            validation_tokens(run)
        except UserError:
            continue
        return run
    return None


def text_subjects_of(name, model, tokenizer, points, text, windows):
    """The Subjects of a model at some hook points.

    text: ids [n], cut into at most `windows` windows; the last HELD_OUT_SHARE of them are held out.
    Raises UserError for a text that is too short.
    """
    length = min(model.cfg.n_ctx, ModelConfig().n_ctx)
    rows = min(windows, len(text) // length)
    n_held_out = round(HELD_OUT_SHARE * rows)
    if n_held_out < 2:
        raise UserError(f"the text of {name} has {len(text)} tokens, which are {rows} windows of "
                        f"{length}; a dictionary needs 5 or more, so choose a longer text")
    tokens = torch.as_tensor(text[: rows * length]).view(rows, length)
    return [Subject(name, model, tokenizer, point, tokens[:-n_held_out], tokens[-n_held_out:])
            for point in points]
