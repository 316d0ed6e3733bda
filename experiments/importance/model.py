"""Load the models whose heads are ranked: models of text, and models with an induction circuit.

Chapter 11 explains how the models with an induction circuit are trained. Here it is enough that two
of their heads are known to do the work.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: train.py, head_ablation.py
Next: experiments/importance/measure.py
Source: Michel et al. 2019 (ranked on one text, pruned on another)
"""

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from checkpoint import find_run, load_model
from config import DataConfig, ModelConfig, TrainConfig
from data import load_dataset
from experiments.common import (
    Trainings,
    train_on_text_,
    trained_gpt,
    validation_tokens,
)
from experiments.induction.model import (
    InductionRecipe,
    Repeats,
    find_circuit,
    repeats_metric,
    trained_induction_model,
)
from model import GPT
from utils import UserError, seeded_generator


@dataclass(frozen=True)
class ImportanceSubject:
    """A model whose heads are ranked, and its texts.

    tokens: the texts [batch, pos] to rank its heads on; held: the texts to prune on. metrics: the
    metrics on these two; None is each text's loss. truth: the heads of the circuit, if it is known;
    spares: the heads that look where the last head of the circuit looks.
    """

    name: str
    model: GPT
    tokens: torch.Tensor
    held: torch.Tensor
    metrics: tuple = (None, None)
    truth: tuple = ()
    spares: tuple = ()

    @property
    def heads(self):
        """All (layer, head), in order."""
        cfg = self.model.cfg
        return list(itertools.product(range(cfg.n_layers), range(cfg.n_heads)))


def load_subjects(cfg, folder):
    """Yield an ImportanceSubject for each model of text, then for each with an induction circuit.

    cfg: an ImportanceConfig; folder: the experiment's folder, where trained models are kept.
    """
    home = folder / "quick" if cfg.quick else Path(cfg.out_dir) / "induction_head_detection"
    recipe = InductionRecipe(steps=30) if cfg.quick else InductionRecipe()
    n_texts = len(cfg.seeds) if cfg.run_name is None else 0
    trainings = Trainings([cfg.steps] * n_texts + [recipe.steps] * len(cfg.seeds))

    if cfg.run_name is not None:
        yield subject_of_run(cfg)
    else:
        yield from trained_text_subjects(cfg, folder, trainings)

    for seed in cfg.seeds:
        model, _ = trained_induction_model(home, seed, recipe, retrain=cfg.retrain,
                                           trainings=trainings)
        yield subject_of_circuit(f"induction, seed {seed}", model, find_circuit(model), cfg)


# Models of text


def subject_of_run(cfg):
    """The ImportanceSubject of a run of train.py, with the text that it was validated on."""
    run = find_run(cfg.run_name, cfg.out_dir)
    model, _ = load_model(run)
    model.check_predicts_tokens("the heads of a model of text are ranked")
    if model.cfg.n_layers * model.cfg.n_heads < 3 or model.cfg.n_heads < 2:
        raise UserError(f"{run.name} has {model.cfg.n_layers} layers of {model.cfg.n_heads} "
                        "heads; rankings need 3 heads or more, 2 of them in a layer; choose "
                        "another run")
    return subject_of_text(run.name, model, validation_tokens(run), cfg)


def trained_text_subjects(cfg, folder, trainings=None):
    """Yield the ImportanceSubject of a model of text for each seed, trained, or read if kept."""
    n_ctx = ModelConfig().n_ctx
    dataset = load_dataset(DataConfig(dataset="builtin" if cfg.quick else cfg.dataset), n_ctx)
    shape = replace(ModelConfig(), d_vocab=dataset.tokenizer.d_vocab)
    how = TrainConfig(max_steps=cfg.steps)

    for seed in cfg.seeds:
        name = f"{dataset.name}, seed {seed}"

        def train(model, seed=seed, name=name):
            train_on_text_(model, dataset.train, how, seed, name, trainings=trainings)

        model, _ = trained_gpt(folder / f"seed_{seed}" / "checkpoint.pt", shape, seed, train,
                               tokenizer=dataset.tokenizer, retrain=cfg.retrain,
                               trainings=trainings,
                               settings={"train": asdict(how), "data": dataset.sha256})
        yield subject_of_text(name, model, dataset.val, cfg)


def subject_of_text(name, model, text, cfg):
    """The ImportanceSubject of a model and unseen ids [n], which are cut into windows."""
    n_ctx = model.cfg.n_ctx
    n_windows = cfg.windows + cfg.windows // 4
    if len(text) < n_windows * n_ctx:
        raise UserError(f"the validation text has {len(text)} tokens, too few for {n_windows} "
                        f"windows of {n_ctx}; choose a smaller --windows")
    windows = text[: n_windows * n_ctx].view(-1, n_ctx)
    return ImportanceSubject(name, model, windows[: cfg.windows], windows[cfg.windows :])


# Models whose circuit is known


def subject_of_circuit(name, model, circuit, cfg):
    """The ImportanceSubject of a model with an induction circuit; circuit: an InductionCircuit.

    Its texts hold a segment twice, and the loss is measured on the tokens that this makes
    predictable.
    """
    n_ctx, n_held = model.cfg.n_ctx, cfg.windows // 4
    tokens, metric = repeats_and_metric(n_ctx, cfg.windows, seeded_generator(cfg.windows))
    held, metric_held = repeats_and_metric(n_ctx, n_held, seeded_generator(n_held))
    spares = tuple(head for head in circuit.all_induction if head != circuit.induction)
    return ImportanceSubject(name, model, tokens, held, (metric, metric_held),
                             (circuit.previous, circuit.induction), spares)


def repeats_and_metric(n_ctx, n_rows, generator):
    """(tokens [batch, pos], the Metric of the loss on predictable tokens, in nats per token)."""
    tokens, known = Repeats(n_ctx + 1).draw(n_rows, generator)
    return tokens[:, :-1], repeats_metric(tokens, known)
