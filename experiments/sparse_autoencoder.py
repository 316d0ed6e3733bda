"""Sparse autoencoders (dictionaries): what they find among known features and in trained models.

    python experiments/sparse_autoencoder.py                 # 10 minutes, one thread; then 4
    python experiments/sparse_autoencoder.py --quick         # seconds: one seed, few steps
    python experiments/sparse_autoencoder.py --run_name mine --at blocks.1.mlp.hook_post
    python experiments/sparse_autoencoder.py --model gpt2 --at blocks.5.hook_resid_post

Writes outputs/sparse_autoencoder/features.html, a page that needs no network: each feature of a
dictionary beside a random direction that is active as often.

Claim on known features (128 sparse features in 32 dimensions): the dictionaries that explain most
of the variance find none of the true features. At the right sparsity each of four kinds finds most
of them, and explains less. Features that are rare, that occur in pairs, or that have a parent are
found less often. Nested (Matryoshka) dictionaries mix a child less with its parent, at a price.
Claim on a model of a text with a known state: a reconstruction keeps the loss, and adding the
latent that predicts a word brings that word. But the best latent predicts a variable no better than
the best neuron does, and a linear probe predicts it better than both.
Claim on transcoders: with patterns and scales kept, an answer is exactly the sum of what features,
errors and biases add.
Expected: every line with a verdict passes. Five are about the median of the seeds and places: how
much less a nested dictionary mixes a child with its parent; what a dictionary loses as a share of
what one of shuffled activations loses; how much more a word gains along its latent than along a
latent of shuffled activations (in nine models 0.3 to 1.9 nats, except 0.08 after the last MLP with
seed 401); and for transcoders the share of the error nodes and how well effects are predicted (on
another kind of CPU than that of the choice, one of seeds 0 to 2 misses both: 0.32 and 0.88).

Thresholds: chosen on seeds 0 to 2.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/measure.py, experiments/dictionaries/transcoders/model.py
Next: experiments/grokking/model.py
Source: Bricken et al. 2023; Gao et al. 2024; Bussmann et al. 2024 and 2025; Rajamanoharan et al.
2024; Chanin et al. 2024; Dunefsky et al. 2024; arXiv 2602.14111 (random baselines)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataclasses import dataclass, replace

from config import check_field, option
from experiments.common import ExperimentConfig, Trainings, perform
from experiments.dictionaries.features import N_TEXTS, dictionary_jobs, trained_dictionaries
from experiments.dictionaries.measure import measure_known
from experiments.dictionaries.model import KINDS
from experiments.dictionaries.report import (
    known_claims,
    known_summary,
    recovery_figure,
    worlds_figure,
)
from experiments.dictionaries.trained.measure import measure_subject, recipe_for
from experiments.dictionaries.trained.model import load_subjects, training_steps
from experiments.dictionaries.trained.page import describe_features, make_page, write_page
from experiments.dictionaries.trained.report import trained_claims, variables_figure
from experiments.dictionaries.transcoders.measure import load_gift_subject, measure_transcoders
from experiments.dictionaries.transcoders.report import transcoder_claims, transcoder_figure
from experiments.scoreboard.model import gift_training
from utils import Progress, UserError, run_program

COUNTED = tuple(kind for kind in KINDS if "TopK" in kind or kind == "Matryoshka")


@dataclass(frozen=True)
class DictionaryConfig(ExperimentConfig):
    """The model that gets a dictionary (by default, those trained here), and the dictionary."""

    run_name: str | None = option(None, "a run of train.py to study, in out_dir")
    model: str | None = option(None, "a pretrained model to study: gpt2, …, or its folder")
    text: str | None = option(None, "a file of text for --run_name or --model (none: the run's "
                              "validation text, or stories of the built-in corpus)")
    at: str | None = option(None, "the hook point, such as blocks.1.mlp.hook_post (none: the last "
                            "MLP's neurons and the last stream)")
    kind: str | None = option(None, "the kind of a trained model's dictionary: "
                              f"{', '.join(COUNTED)} (none: TopK)")
    latents: int | None = option(None, "latents of that dictionary (none: 256 for words, else 512)")
    active: int | None = option(None, "latents active at a time (none: 8 for words, else 16)")
    shown: int = option(100, "features on the page: those whose removal changes the loss most")
    prompts: int = option(24, "gifts whose answers are split by transcoders")

    def __post_init__(self):
        super().__post_init__()
        if self.text is not None and self.other_model == (None, None):
            raise UserError(f"text={self.text!r} is for --run_name or --model; name one of them")
        for name in ("latents", "active", "shown"):
            check_field(self, name, lambda n: n is None or n >= 1, "1 or more")
        check_field(self, "prompts", lambda n: 2 <= n <= 56, "2 to 56")
        check_field(self, "kind", lambda kind: kind in (None, *COUNTED),
                    f"one of {', '.join(COUNTED)}")

    def recipe(self, subject):
        """The DictionaryRecipe for a Subject: the usual one, changed by the settings.

        Raises UserError if more latents are to be active than there are.
        """
        usual = recipe_for(subject)
        latents = self.latents or usual.n_latents
        active = self.active or usual.sparsity
        if active > latents:
            raise UserError(f"active={active} is more than latents={latents}; choose a smaller "
                            "active, or more latents")
        return replace(usual, kind=self.kind or usual.kind, n_latents=latents, sparsity=active,
                       steps=30 if self.quick else usual.steps)


def run(cfg, folder):
    """Train, measure, and write the page of features.

    cfg: a DictionaryConfig. folder: for the page and the trained models. Returns {"found": a
    summary, "claims": [Claim], "known", "trained", "transcoders": lists of what was measured}.
    """
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], prompts=min(cfg.prompts, 2),
                      shown=min(cfg.shown, 10))
    is_own = cfg.run_name is None and cfg.model is None
    judged = is_own and not cfg.quick

    # trained models; a run, model or hook point that cannot be used fails here, before any training
    models = Trainings(training_steps(cfg) + [gift_training(cfg).max_steps] * len(cfg.seeds))
    trained = []
    summary = []
    for number, subject in enumerate(load_subjects(cfg, folder, models)):
        measured, dictionary = measure_subject(subject, cfg.recipe(subject), subject.seed)
        trained.append(measured)
        if number == 0:
            summary.append(write_features(cfg, subject, dictionary, folder))
    claims = trained_claims(trained, judged)
    if not is_own:
        return {"found": " ".join(summary), "claims": claims, "trained": trained}

    # dictionaries of known features
    known = []
    jobs = dictionary_jobs(cfg.quick)
    steps = [job.recipe.steps for job in jobs.values()]
    trainings = Trainings(steps * len(cfg.seeds))
    for seed in cfg.seeds:
        dictionaries = trained_dictionaries(
            jobs, seed, folder / f"seed_{seed}", n_texts=8192 if cfg.quick else N_TEXTS,
            retrain=cfg.retrain, trainings=trainings)
        known.append(measure_known(jobs, dictionaries, seed))

    # transcoders
    transcoders = []
    subjects = [load_gift_subject(cfg, folder, seed, models) for seed in cfg.seeds]
    progress = Progress(len(cfg.seeds), " transcoders")
    for seed, subject in zip(cfg.seeds, subjects, strict=True):
        transcoders.append(measure_transcoders(subject, seed))
        progress.show(len(transcoders), f"seed {seed}")
    progress.close()

    return {"found": " ".join([known_summary(known), *summary]),
            "claims": [*known_claims(known, judged), *claims,
                       *transcoder_claims(transcoders, judged)],
            "known": known, "trained": trained, "transcoders": transcoders}


def write_features(cfg, subject, dictionary, folder):
    """Write the page of a Subject's features; return a sentence on what it shows."""
    features = describe_features(subject, dictionary, n_features=cfg.shown, seed=subject.seed)
    page = make_page(subject, dictionary, features)
    write_page(folder / "features.html", page)
    return (f"{folder / 'features.html'} shows {len(features)} features of {subject.name} at "
            f"{subject.at}, each beside a random direction.")


def figures(result):
    """{name: Figure} from what `run` returned; none if a run or model was named."""
    if "known" not in result:
        return {}
    return {"recovery": recovery_figure(result["known"]),
            "worlds": worlds_figure(result["known"]),
            "variables": variables_figure(result["trained"][0]),
            "transcoder": transcoder_figure(result["transcoders"][0])}


def main(argv=None):
    """Run the program: train, measure, print the table, write the page and the figures."""
    perform(DictionaryConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
