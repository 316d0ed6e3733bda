"""Who is given something? The circuit that names the indirect object, and what forms in its place.

    python experiments/indirect_object_identification.py                # 2 minutes, one thread
    python experiments/indirect_object_identification.py --model gpt2   # the published prompts
    python experiments/indirect_object_identification.py --quick        # seconds: one seed

"When Ola and Leo went to the park, Leo gave a kite to": Ola. Three layers of attention learn this
from the built-in corpus, whose floor is known, and are taken apart by path patching from the logits
backwards, by edge attribution, and by exact edges.

Claim, of seeds 0 to 2: the models name the receiver at the floor, not in GPT-2's way. There, heads
mark the name that comes twice, and turn the queries of name movers away from it. Here, some heads
raise both names, and others look at whoever gives, named twice or not, and suppress that name
straight at the logits. The corpus always says who gives at one place, so nobody has to look for a
duplicate. Copying itself is there: without the heads that look at the names (or at the syllable of
a song) and copy them, the names (or the song) are lost; as many others matter less. None has
backups.
Expected: every line with a verdict passes on seeds 0 to 2, on which the thresholds were chosen, and
NOT on others. Of five seeds never looked at before (10 to 14) all were at the floor, and songs were
copied as claimed in all. The other claims held in part: heads that look at the giver carried the
difference in three (in two the strongest head looks at other words), queries carried less than 0.3
of it in four (0.31 in the fifth). Seven of the ten lines failed in one model or more. The program
says FAIL there, and exits with 1: the way that a model takes is a fact about that model.
With `--model`, a model in Hugging Face's layout is measured on prompts of the published form,
beside what Wang et al. report of GPT-2 small; nothing is judged.

Chapter: COURSE_ROADMAP.md, 12 (indirect objects)
Prerequisites: experiments/indirect_object/measure.py, experiments/indirect_object/report.py
Next: COURSE_ROADMAP.md, 12
Source: Wang et al. 2022 (indirect object identification)
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint import load_pretrained
from config import check_field, option
from experiments.common import ExperimentConfig, perform
from experiments.indirect_object.measure import measure_gifts
from experiments.indirect_object.model import (
    GiftRecipe,
    draw_gifts,
    draw_songs,
    gift_shape,
    gift_text,
    trained_gift_model,
)
from experiments.indirect_object.published import (
    describe_published,
    measure_published,
    published_claims,
)
from experiments.indirect_object.report import (
    describe_findings,
    gift_claims,
    heads_figure,
    published_figure,
)
from model import GPT
from utils import Progress, run_program

PROMPT_SEED = 12345  # of the prompts, which are the same for all models


@dataclass(frozen=True)
class IndirectObjectConfig(ExperimentConfig):
    """What is measured, and on how much."""

    model: str | None = option(None, "a pretrained model to measure: gpt2, …, or its folder")
    steps: int = option(1500, "of training")
    prompts: int = option(64, "to measure on; with --model, a quarter as many of each template")

    def __post_init__(self):
        super().__post_init__()
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        check_field(self, "prompts", lambda n: n >= 8, "8 or more")


def run(cfg, folder):
    """{"found": what came out, in words, "claims": [Claim], "models" or "published": what was
    measured}. cfg: an IndirectObjectConfig; folder: of the kept models."""
    if cfg.model is not None:
        found = measure_published(*load_pretrained(cfg.model), cfg.prompts // 4)
        return {"found": describe_published(found), "claims": published_claims(found),
                "published": found}

    recipe = GiftRecipe(steps=cfg.steps)
    if cfg.quick:
        cfg = replace(cfg, seeds=cfg.seeds[:1], prompts=16)
        recipe = replace(recipe, steps=20, characters=100_000)
    text = gift_text(recipe)
    tokenizer = text[1]
    gifts = draw_gifts(tokenizer, cfg.prompts, PROMPT_SEED)
    songs = draw_songs(tokenizer, cfg.prompts, PROMPT_SEED)

    models = []
    controls = []
    progress = Progress(len(cfg.seeds), " models")
    for seed in cfg.seeds:
        model = trained_gift_model(folder, seed, recipe, text, cfg.retrain)
        models.append({"seed": seed} | measure_gifts(model, gifts, songs))
        untrained = GPT(gift_shape(recipe, tokenizer), seed).eval()
        controls.append({"seed": seed} | measure_gifts(untrained, gifts, songs))
        progress.show(len(models), f"seed {seed} measured")
    progress.close()
    return {"found": describe_findings(models), "models": models, "controls": controls,
            "claims": gift_claims(models, controls, judged=not cfg.quick)}


def figures(result):
    """{name: Figure} of what `run` returned: every head of the first model."""
    if "published" in result:
        return {"heads": published_figure(result["published"])}
    return {"heads": heads_figure(result["models"][0])}


def main(argv=None):
    """The program: measures, prints the table, writes outputs/indirect_object_identification."""
    perform(IndirectObjectConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
