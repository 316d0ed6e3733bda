"""The models whose heads are ranked, and their texts: of English, and with an induction circuit.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Read before: experiments/induction_model.py; after: experiments/head_importance.py
Source: Michel et al. 2019 (ranked on one text, pruned on another)
"""

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from checkpoint import config_of, dataset_again, find_run, load_checkpoint, load_model
from config import DataConfig, ModelConfig, TrainConfig
from data import load_dataset, random_batch
from experiments.common import as_run, load_or_make
from experiments.induction_model import Recipe, Repeats, circuit, repeats_metric
from experiments.induction_model import trained as induction_model
from model import GPT
from train import fit
from utils import Progress, UserError, seeded_generator


@dataclass(frozen=True)
class Subject:
    """A model and its texts: `tokens` to rank its heads on, `held` to prune on, [batch, pos] each.

    metrics: of the two, or None for each text's loss. Where it is known, truth: the heads that do
    the work; spares: those that look where the last of these looks.
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


# The models


def subjects(cfg, folder):
    """Yields a Subject for each model: of text, then those with an induction circuit."""
    if cfg.run_name is not None:
        yield of_run(cfg)
    else:
        yield from trained(cfg, folder)
    home = folder / "quick" if cfg.quick else Path(cfg.out_dir) / "induction_head_detection"
    for seed in cfg.seeds:
        recipe = Recipe(steps=30) if cfg.quick else Recipe()
        model, _ = induction_model(home, seed, recipe, retrain=cfg.retrain)
        yield of_circuit(f"induction, seed {seed}", model, circuit(model), cfg)


def of_run(cfg):
    """The Subject of a run of train.py, with the text that it was validated on."""
    place = find_run(cfg.run_name, cfg.out_dir)
    model, _ = load_model(place)
    if model.cfg.n_layers * model.cfg.n_heads < 3 or model.cfg.n_heads < 2:
        raise UserError(f"{place.name} has {model.cfg.n_layers} layers of {model.cfg.n_heads} "
                        "heads; to compare rankings takes 3 heads, 2 in a layer; choose another")
    state = load_checkpoint(place / "checkpoint.pt")
    if "data_sha256" not in state:
        raise UserError(f"{place} does not say what text it was trained on; name a run of train.py")
    text = dataset_again(place, state, config_of(state, place)).val
    return of_text(place.name, model, text, cfg)


def of_text(name, model, text, cfg):
    """The Subject of a model and ids [n] that it has not seen, cut into windows."""
    n_ctx, n_held = model.cfg.n_ctx, cfg.windows // 4
    if len(text) < (cfg.windows + n_held) * n_ctx:
        raise UserError(f"the validation text has {len(text)} tokens, and {cfg.windows + n_held} "
                        f"windows of {n_ctx} are wanted; choose a smaller --windows")
    windows = text[: (cfg.windows + n_held) * n_ctx].view(-1, n_ctx)
    return Subject(name, model, windows[: cfg.windows], windows[cfg.windows :])


def trained(cfg, folder):
    """Yields the Subject of a model of text for each seed, trained or kept from before."""
    shape = ModelConfig()
    text = "builtin" if cfg.quick else cfg.dataset
    dataset = load_dataset(DataConfig(dataset=text), shape.n_ctx)
    shape, how = replace(shape, d_vocab=dataset.tokenizer.d_vocab), TrainConfig(max_steps=cfg.steps)

    def make(seed):
        model, generator = GPT(shape, seed), seeded_generator(seed)
        progress = Progress(cfg.steps, " steps")
        for step in fit(model, lambda: random_batch(dataset.train, how.batch_size, shape.n_ctx,
                                                    generator), how):
            progress.show(step.number, f"{dataset.name}, seed {seed}: loss {step.loss:.2f}")
        progress.close()
        return as_run(model, dataset.tokenizer)

    for seed in cfg.seeds:
        settings = {"shape": asdict(shape), "train": asdict(how), "data": dataset.sha256}
        state = load_or_make(folder / f"seed_{seed}" / "checkpoint.pt", settings | {"seed": seed},
                     lambda seed=seed: make(seed), cfg.retrain)
        model = GPT(shape, seed=None)
        model.load_state_dict(state["model"])
        yield of_text(f"{dataset.name}, seed {seed}", model.eval(), dataset.val, cfg)


def of_circuit(name, model, found, cfg):
    """The Subject of a model with an induction circuit: its texts repeat, and what can be known
    from a repeat is what is measured. found: its Circuit."""
    texts = [repeats(model.cfg.n_ctx, n, seeded_generator(n)) for n in (cfg.windows,
                                                                        cfg.windows // 4)]
    (tokens, metric), (held, metric_held) = texts
    spares = tuple(head for head in found.all_induction if head != found.induction)
    return Subject(name, model, tokens, held, (metric, metric_held),
                   (found.previous, found.induction), spares)


def repeats(n_ctx, n_rows, generator):
    """(tokens [batch, pos], the Metric of their loss where it can be known, in nats a token)."""
    tokens, known = Repeats(n_ctx + 1).draw(n_rows, generator)
    return tokens[:, :-1], repeats_metric(tokens, known)
