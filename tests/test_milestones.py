"""The milestones: what is right is reached, and each natural fault is told in a sentence."""

import copy
import dataclasses
import json

import pytest
import torch

import data
import train
from config import Config, DataConfig, ModelConfig
from course import exercise
from course.engine import catalogue, milestones, stubs
from course.milestones import milestone_b, milestone_c, milestone_d, milestone_e
from experiments import claim_card
from experiments.cards.model import EXAMPLE, REPLICATIONS, RESULT, results_path
from experiments.cards.report import filled_card
from experiments.wired.model import copying, logic_gate, previous_token
from model import GPT
from tokenizer import WordTokenizer
from utils import UserError, seeded_generator, write_json


def write_solutions(folder, numbers, **changed):
    """Our solutions of some chapters as a learner's files; changed: {name: [(old, new), …]}."""
    folder.mkdir(exist_ok=True)
    for number in numbers:
        chapter = catalogue.load_chapter(number)
        pieces = ["\n".join(chapter.IMPORTS)]
        for each in chapter.EXERCISES:
            text = stubs.solution_text(chapter, each)
            for old, new in changed.get(each.name, ()):
                assert text.count(old) == 1, f"{each.name}: {old}"
                text = text.replace(old, new)
            pieces.append(text)
        path = folder / f"chapter_{number:02}.py"
        path.write_text("\n\n\n".join(pieces), encoding="utf-8")
    return folder


def verdict_on(letter, folder, given=None):
    """What the check of a milestone says, in this process."""
    return milestones.judge_milestone(milestones.load_milestone(letter), folder, given)


# A


@pytest.mark.slow
def test_our_solutions_of_three_chapters_are_a_transformer(tmp_path):
    found = verdict_on("A", write_solutions(tmp_path / "right", (3, 4, 5)))
    assert found.status == "right" and len(found.held) == 6, found


@pytest.mark.parametrize("number, name, old, new, said", [
    # each of the first three passes a check of outputs alone, or of one shape
    (5, "layer_norm", ".sqrt()\n", ".sqrt().detach()\n", "the gradient of"),
    (5, "block_forward", "resid = resid + self.attn", "resid += self.attn", "is there a +="),
    (4, "attend", "visible = causal_mask(q.shape[2], k.shape[2], key_mask)",
     "visible = causal_mask(7, 7)", "raised"),
    (4, "attend", "scores.masked_fill(~visible, -math.inf)", "scores", "should be"),
    (4, "causal_mask", "return key <= query\n", "return key <= query + 1\n", "should be"),
])
def test_the_function_at_fault_is_named(tmp_path, number, name, old, new, said):
    folder = write_solutions(tmp_path, (3, 4, 5), **{name: [(old, new)]})
    found = verdict_on("A", folder)
    assert found.status == "wrong" and said in found.message, found
    assert f"CHAPTER={number} FUNCTION={name}" in found.mistake, found.mistake


def test_two_functions_at_fault_are_both_named(tmp_path):
    folder = write_solutions(
        tmp_path, (3, 4, 5), embed_text=[(" + W_pos[:n_pos]", "")],
        mlp_forward=[(" + self.b_out", "")])
    found = verdict_on("A", folder)
    assert found.mistake == "each of these spoils it by itself: embed_text, mlp_forward"


def test_a_function_that_is_not_written_is_missing_and_nothing_is_judged(tmp_path):
    folder = write_solutions(tmp_path, (3, 5))
    found = verdict_on("A", folder)
    assert found.status == "missing"
    assert "causal_mask, project, attend, write (make exercise CHAPTER=4)" in found.message
    assert not found.held and "embed_text" not in found.message


def test_stubs_are_not_taken_for_functions(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "EXERCISES_FOLDER", tmp_path / "exercises")
    for number in ("3", "4", "5"):
        exercise.main(["start", number])
    found = verdict_on("A", tmp_path / "exercises")
    assert found.status == "missing" and "causal_mask" in found.message


# B


class Seer(torch.nn.Module):
    """A model whose every position sees the whole text."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.cfg = model.cfg

    def forward(self, tokens):
        logits = self.model(tokens)
        return logits + logits.mean(1, keepdim=True)


@pytest.fixture
def run(monkeypatch):
    """A run on a little built-in corpus that is 0.05 nats a character above its floor."""
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 4000)
    cfg = Config(data=DataConfig(dataset="builtin"))
    dataset = data.load_dataset(cfg.data, 8)
    model = GPT(ModelConfig(n_layers=1, n_heads=1, d_model=4, n_ctx=8,
                            d_vocab=dataset.tokenizer.d_vocab))
    loss = dataset.floor.log_probs[1:].mean().neg().item() + 0.05
    return milestone_b.Work(name="mine", cfg=cfg, model=model, dataset=dataset,
                            step=cfg.train.max_steps, rows=[{"step": 1, "val_loss": loss}],
                            loss=loss, per_token=1.0)


def fault_of(milestone, work):
    """(check, message) of the first check that fails, or None."""
    for check in milestone.checks:
        message = milestones.failure(check, work)
        if message:
            return check.__name__, message
    return None


def test_a_run_near_its_floor_is_enough_and_each_fault_of_a_run_is_told(run):
    assert fault_of(milestone_b.MILESTONE, run) is None
    other_text = dataclasses.replace(run.dataset, floor=None, name="my.txt", sha256="")
    words = {"cfg": Config(data=DataConfig(tokenizer="word")), "dataset": dataclasses.replace(
        run.dataset, floor=None, sha256=data.SHAKESPEARE_SHA256)}
    for change, name, said in (
            ({"step": 40}, "it_was_trained_to_its_end", "stopped after 40 of"),
            ({"dataset": other_text}, "its_text_is_one_that_is_known", "my.txt"),
            (words, "its_text_is_one_that_is_known", "with word tokens"),
            ({"model": Seer(run.model)}, "the_future_is_hidden", "sees the answer"),
            ({"rows": [{"step": 1, "val_loss": run.loss - 0.5}]},
             "its_loss_is_the_one_that_it_reports", "of two runs"),
            ({"loss": run.loss - 0.1, "rows": [{"step": 1, "val_loss": run.loss - 0.1}]},
             "it_does_not_pass_the_floor", "below the floor"),
            ({"loss": run.loss + 0.1, "rows": [{"step": 1, "val_loss": run.loss + 0.1}]},
             "it_has_learned_its_text", "0.150 nats a character above")):
        found = fault_of(milestone_b.MILESTONE, dataclasses.replace(run, **change))
        assert found and found[0] == name and said in found[1], f"{change}: {found}"


def test_the_newest_run_of_train_py_is_read_and_its_loss_measured_as_training_measured_it(
        tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BUILTIN_CHARACTERS", 4000)
    monkeypatch.setattr(milestone_b, "OUT_DIR", str(tmp_path))
    assert verdict_on("B", tmp_path).status == "missing"
    tiny = ["--model.n_layers", "1", "--model.n_heads", "1", "--model.d_model", "8",
            "--model.n_ctx", "16", "--train.max_steps", "2", "--train.threads", "1"]
    train.main(["--data.dataset", "builtin", "--logging.out_dir", str(tmp_path), *tiny])
    found = verdict_on("B", tmp_path)
    assert found.failed == milestones.statement(milestone_b.it_has_learned_its_text), found
    work = milestone_b.gather(tmp_path, None)
    assert work.loss == pytest.approx(work.rows[-1]["val_loss"], abs=1e-5)
    assert verdict_on("B", tmp_path, "nothing").status == "missing"


def test_a_loss_in_words_is_judged_by_the_character(run):
    words = dataclasses.replace(run, per_token=0.2, loss=run.loss * 0.2,
                                rows=[{"step": 1, "val_loss": run.loss * 0.2}])
    floor = milestone_b.floor_of(words)
    assert abs(words.by_character - run.loss) < 1e-6
    assert floor == pytest.approx(5 * milestone_b.floor_of(run))


# C


def hand_in_of(wired, monkeypatch, heads):
    """What a learner would write of a wired circuit; its model is put in place of a run's."""
    tokenizer = WordTokenizer().fit(" ".join(f"w{i:02}" for i in range(wired.model.cfg.d_vocab)))
    monkeypatch.setattr(milestone_c, "load_model", lambda name: (wired.model, tokenizer))
    pairs = wired.draw_pairs(4, seeded_generator(0))
    rows = zip(pairs.clean_tokens, pairs.corrupted_tokens, pairs.right[:, None],
               pairs.wrong[:, None], strict=True)
    prompts = [dict(zip(milestone_c.FIELDS, map(tokenizer.decode, row), strict=True))
               for row in rows]

    # A control changes a place that nobody reads: here it is the first place after BOS
    controls = [pair | {"corrupted": replace_word(pair["clean"], 1, "w12")} for pair in prompts]
    return {"model": "wired", "heads": heads, "prompts": prompts, "controls": controls}


def replace_word(text, place, word):
    """A text with another word at a place; another one still, where that one is there."""
    words = text.split()
    words[place] = word if words[place] != word else "w11"
    return " ".join(words)


def traced(folder, hand_in):
    """The verdict on a hand-in."""
    path = folder / "tracing.json"
    path.write_text(json.dumps(hand_in), encoding="utf-8")
    return verdict_on("C", folder, str(path))


@pytest.fixture
def sound(monkeypatch):
    """A sound hand-in: one head carries the token before the last one."""
    wired = previous_token(0)
    (layer, head), = wired.truth.restores
    return hand_in_of(wired, monkeypatch, [f"L{layer}H{head}"])


def test_sound_prompts_are_accepted_and_each_fault_of_prompts_is_told(tmp_path, sound):
    found = traced(tmp_path, sound)
    assert found.status == "right", found

    def turn_round(pair):
        pair["clean"], pair["corrupted"] = pair["corrupted"], pair["clean"]

    def lengthen(pair):
        pair["corrupted"] = pair["corrupted"] + " w05"

    def same(pair):
        pair["corrupted"] = pair["clean"]

    def two_words(pair):
        pair["answer"] += " w05"

    def unknown(pair):
        pair["answer"] = "w11"

    few = sound | {"prompts": sound["prompts"][:3]}
    twice = sound | {"controls": [*sound["controls"], sound["controls"][0]]}
    for wrong, said in ((few, "prompts: 3 so far"), (twice, "two of the controls are the same")):
        assert said in traced(tmp_path, wrong).message

    for kind, change, said in (
            ("prompts", unknown, "does not know the answer"),
            ("prompts", turn_round, "prompt 2 is the wrong way round"),
            ("prompts", lengthen, "prompt 2: clean has"),
            ("prompts", two_words, "is 2 tokens"),
            ("controls", same, "control 2: clean and corrupted are the same text")):
        wrong = copy.deepcopy(sound)
        change(wrong[kind][1])
        found = traced(tmp_path, wrong)
        assert found.status == "wrong" and said in found.message, f"{change.__name__}: {found}"


def test_a_control_in_which_the_answer_changes_is_none(tmp_path, sound):
    wrong = sound | {"controls": sound["prompts"]}
    found = traced(tmp_path, wrong)
    assert "leaves the answer as it is" in found.message, found


def test_a_model_that_is_no_name_is_told(tmp_path, sound):
    for model in (5, None, ["gifts"]):
        with pytest.raises(UserError, match="model needs a name"):
            traced(tmp_path, sound | {"model": model})


def test_a_control_that_asks_for_other_words_is_none(tmp_path, sound):
    asked = {pair[field] for pair in sound["prompts"] for field in ("answer", "wrong")}
    other = next(word for word in (f"w{i:02}" for i in range(12)) if word not in asked)
    for field in ("answer", "wrong"):
        wrong = copy.deepcopy(sound)
        wrong["controls"][1][field] = other
        found = traced(tmp_path, wrong)
        assert found.failed == milestones.statement(milestone_c.the_controls_show_nothing)
        assert f"control 2: its {field} {other!r} is neither" in found.message, found


def test_heads_that_do_not_carry_the_answer_are_told(tmp_path, sound):
    named = sound["heads"][0]
    other = next(f"L0H{head}" for head in range(4) if f"L0H{head}" != named)
    found = traced(tmp_path, sound | {"heads": [other]})
    assert f"{other} from clean into corrupted restores 0.00" in found.message, found
    found = traced(tmp_path, sound | {"heads": [f"L0H{head}" for head in range(4)]})
    assert "at most half of them" in found.message, found
    with pytest.raises(UserError, match="L7H0"):
        traced(tmp_path, sound | {"heads": ["L7H0"]})
    unknown = sound["prompts"][0] | {"clean": "w00 zebra"}
    with pytest.raises(UserError, match="prompt 1: unknown words 'zebra'"):
        traced(tmp_path, sound | {"prompts": [unknown]})


def test_a_head_that_is_enough_but_not_needed_has_a_twin(tmp_path, monkeypatch):
    wired = logic_gate(0, "OR", 0.25, 0.75)
    one, other = sorted(f"L{layer}H{head}" for layer, head in wired.truth.restores)
    found = traced(tmp_path, hand_in_of(wired, monkeypatch, [one]))
    assert "enough and not needed" in found.message, found
    found = traced(tmp_path, hand_in_of(wired, monkeypatch, [one, other]))
    assert "enough and not needed" not in found.message


@pytest.fixture
def two_jobs(monkeypatch):
    """(hand-in, pairs): a head says the token at one place, another lowers the one at a second."""
    wired = copying(0)
    says, lowers = sorted(wired.truth.restores, key=wired.truth.restores.get, reverse=True)
    pairs = wired.draw_pairs(4, seeded_generator(0))
    hand_in = hand_in_of(wired, monkeypatch, [f"L0H{says[1]}", f"L0H{lowers[1]}"])
    return hand_in, pairs


def test_prompts_that_differ_in_two_things_are_told(tmp_path, two_jobs):
    found = traced(tmp_path, two_jobs[0])
    assert "restores 0.67 of the answer on average" in found.message, found


def test_a_head_that_moves_the_controls_too_is_told(tmp_path, two_jobs):
    hand_in, pairs = two_jobs
    said, lowered = pairs.clean_tokens[0], pairs.corrupted_tokens[0]
    first = (said == pairs.right[0]).nonzero().item()
    second = (lowered == pairs.right[0]).nonzero().item()
    for prompt, control in zip(hand_in["prompts"], hand_in["controls"], strict=True):
        words = prompt["clean"].split()
        new, = {f"w{i:02}" for i in range(1, 11)} - set(words)  # the one word that is not there
        prompt["corrupted"] = replace_word(prompt["clean"], first, new)
        control["corrupted"] = replace_word(prompt["clean"], second, new)
        prompt["answer"] = control["answer"] = words[first]
        prompt["wrong"] = control["wrong"] = new
    says_alone = hand_in | {"heads": hand_in["heads"][:1]}
    assert traced(tmp_path, says_alone).status == "right"
    found = traced(tmp_path, hand_in)
    assert "of what it moves in the prompts" in found.message, found


def test_without_a_file_an_example_is_written_once(tmp_path):
    folder = tmp_path / "exercises"
    assert verdict_on("C", folder).status == "missing"
    written = (folder / "tracing.json").read_text(encoding="utf-8")
    assert set(json.loads(written)) == set(milestone_c.EXAMPLE)


def test_a_file_of_the_learner_s_that_is_no_json_is_never_to_be_downloaded(tmp_path, monkeypatch):
    (tmp_path / "tracing.json").write_text('{"model": "gifts",}', encoding="utf-8")
    with pytest.raises(UserError, match=r"not JSON.*; correct it, or delete it"):
        verdict_on("C", tmp_path)
    monkeypatch.setattr(catalogue, "EXERCISES_FOLDER", tmp_path)
    (tmp_path / "progress.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="not a JSON object; delete it to start again"):
        exercise.main(["progress"])


# D


@pytest.mark.slow
def test_a_toy_of_our_solutions_is_a_pentagon_and_a_measure_that_is_off_is_told(tmp_path):
    folder = write_solutions(tmp_path / "right", (14,))
    found = verdict_on("D", folder)
    assert found.status == "right", found

    folder = write_solutions(tmp_path / "wrong", (14,), dimensionality=[
        ("shared = (unit.T @ W).pow(2).sum(1)", "shared = (unit.T @ unit).pow(2).sum(1)")])
    found = verdict_on("D", folder)
    assert found.failed == "your dimensionality gives each of them 2/5", found
    assert "FUNCTION=dimensionality" in found.mistake


@pytest.mark.parametrize("name, old, new, said", [
    ("toy_forward", "(hidden @ W + b).relu()", "hidden @ W + b", "the gradient by"),
    ("toy_forward", "hidden = x @ W.T", "hidden = x @ W.T.detach()", "the gradient by W"),
    ("expected_feature_loss", "importance * error.pow(2)", "error.pow(2)", "the gradient by"),
])
def test_a_loss_that_trains_something_else_is_told_before_training(tmp_path, name, old, new, said):
    folder = write_solutions(tmp_path, (14,), **{name: [(old, new)]})
    found = verdict_on("D", folder)
    assert said in found.message and f"FUNCTION={name}" in found.mistake, found


def test_the_dense_control_can_fail(tmp_path):
    work = milestone_d.gather(write_solutions(tmp_path, (14,)), None)
    angle = torch.arange(5) * (2 * torch.pi / 5)
    pentagon = torch.stack([angle.cos(), angle.sin()])
    for density in (milestone_d.RARE, milestone_d.DENSE):
        work.toys[density] = (pentagon, torch.zeros(5))
    name, message = fault_of(milestone_d.MILESTONE, work)
    assert name == "dense_features_do_not_share" and "where there is none" in message


# E


def write_card(research, **changes):
    """The folder of a card that was checked, as `claim_card.py check` leaves it, with some of its
    parts changed before."""
    claim_card.new("mine", research)
    folder = research / "mine"
    study = (folder / "study.py").read_text(encoding="utf-8").replace(EXAMPLE, "# one")
    (folder / "study.py").write_text(study, encoding="utf-8")
    parts = {
        "Question": "Does one head look one back?", "Number": "the highest score, a share",
        "Hypothesis": "Some head of a trained model looks one back.",
        "Intervention": "None: patterns are read.", "Possible values": "0 to 1",
        "Holds if": "above 0.5, for every seed", "Threshold from": "seeds 0 1 2",
        "Predicted": "0.9", "Null": "The same number of an untrained model.",
        "Refuted by": "A seed with 0.5 or less.", "Judged on seeds": "10 11 12",
    } | {name.replace("_", " "): text for name, text in changes.items()}
    means = "\n\n".join(f"## {heading}\n\nA head of every one of these models does it."
                        for heading in milestone_e.SECTIONS)
    lines = [f"**{part}.** {text}\n" for part, text in parts.items()]
    text = "\n".join(["# mine\n", *lines, RESULT, "", "Nothing yet.", "", means])
    (folder / "card.md").write_text(text, encoding="utf-8")
    return folder


def measured_card(research, measured=(0.9, 0.8, 0.7), null=(0.1, 0.2, 0.3), ways=None, **changes):
    """The same card, with a result that its study would have measured."""
    folder = write_card(research, **changes)
    write_result(folder, measured, null, ways)
    (folder / "card.md").write_text(filled_card(folder), encoding="utf-8")
    return folder


def write_result(folder, measured, null, ways=None):
    """What `check` writes before it fills in the card."""
    seeds = list(range(10, 10 + len(measured)))
    results_path(folder).parent.mkdir(parents=True, exist_ok=True)
    write_json(results_path(folder), {
        "measured": list(measured), "null": list(null), "ways": ways or {}, "more": [],
        "torch": "2", "settings": {"seeds": seeds}})


def fault_of_card(folder):
    """(name of the check that fails, its message), or None."""
    return fault_of(milestone_e.MILESTONE, milestone_e.gather(None, str(folder)))


@pytest.mark.parametrize("measured, ways, threshold, verdict", [
    ((0.9, 0.8, 0.7), {}, "above 0.5", "HOLDS"), ((0.9, 0.8, 0.4), {}, "above 0.5", "REFUTED"),
    ((0.9, 0.8, 0.7), {"by zero": [0.4] * 3}, "above 0.5", "DEPENDS")])
def test_each_answer_reaches_the_milestone(tmp_path, measured, ways, threshold, verdict):
    folder = measured_card(tmp_path, measured, ways=ways, Holds_if=threshold)
    assert f"**{verdict}.**" in (folder / "card.md").read_text(encoding="utf-8")
    assert fault_of_card(folder) is None


def test_a_null_that_passes_or_is_the_same_measurement_does_not_reach_it(tmp_path):
    one_passes = measured_card(tmp_path / "one", null=(0.1, 0.2, 0.6))
    assert "**HOLDS.**" in (one_passes / "card.md").read_text(encoding="utf-8")
    name, message = fault_of_card(one_passes)
    assert name == "the_null_passes_for_no_seed" and "the null gives 0.6" in message

    # the same numbers claimed in the other direction: the null passes, the measured ones do not
    turned = measured_card(tmp_path / "two", Holds_if="below 0.5", Predicted="0.1")
    name, message = fault_of_card(turned)
    assert name == "the_null_passes_for_no_seed" and "0.1, 0.2, 0.3" in message

    same = measured_card(tmp_path / "three", measured=(0.1, 0.2, 0.3))
    assert "the same numbers" in fault_of_card(same)[1]


def test_what_a_card_lacks_is_asked_for(tmp_path):
    for place, (changes, said) in enumerate((
            ({"Null": "None needed."}, "Null is 2 words"),
            ({"Null": "Patterns are read, and nothing else.",
              "Intervention": "Patterns are read, and nothing else."}, "word for word"),
            ({"Hypothesis": "Heads look."}, "Hypothesis is 2 words"),
            ({"Judged_on_seeds": "10 11"}, "fewer than 3"))):
        assert said in fault_of_card(measured_card(tmp_path / f"{place}", **changes))[1], changes
    for place, (changes, said) in enumerate((
            ({"Null": ""}, "**Null.** is empty"), ({"Holds_if": "above 1"}, "no value"),
            ({"Threshold_from": "seeds 11"}, "chosen on seeds 11; judge others"))):
        found = verdict_on("E", None, str(write_card(tmp_path / f"card{place}", **changes)))
        assert found.status == "wrong" and said in found.message, found

    folder = measured_card(tmp_path / "silent")
    path = folder / "card.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("## What remains", "## What else"), encoding="utf-8")
    assert "What remains has 0 words" in fault_of_card(folder)[1]


def test_a_result_of_another_card_or_study_or_by_hand_is_told(tmp_path):
    assert "nothing was measured yet" in fault_of_card(write_card(tmp_path / "none"))[1]

    folder = measured_card(tmp_path / "hand")
    path = folder / "card.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("| 12 | 0.7 |", "| 12 | 0.9 |"), encoding="utf-8")
    assert "is not what" in fault_of_card(folder)[1]
    path.write_text(text.replace("above 0.5", "above 0.6"), encoding="utf-8")
    assert "changed since" in fault_of_card(folder)[1]
    path.write_text(text, encoding="utf-8")
    assert fault_of_card(folder) is None
    with (folder / "study.py").open("a", encoding="utf-8") as file:
        file.write("# another study\n")
    assert "changed since" in fault_of_card(folder)[1]
    with (folder / "study.py").open("a", encoding="utf-8") as file:
        file.write(f"{EXAMPLE}\n")
    assert fault_of_card(folder)[0] == "it_is_your_own"


def test_the_cards_of_the_course_are_nobody_s_own(tmp_path, monkeypatch):
    for name in REPLICATIONS:
        assert fault_of(milestone_e.MILESTONE, milestone_e.gather(None, name))[0] == (
            "it_is_your_own"), name
    monkeypatch.setattr(milestone_e, "RESEARCH", tmp_path)
    measured_card(tmp_path).rename(tmp_path / "dead_heads")
    assert "no card of yours" in verdict_on("E", None).message
    measured_card(tmp_path)
    assert verdict_on("E", None).status == "right"
    claim_card.new("other", tmp_path)
    assert "there are 2 cards of yours, mine, other" in verdict_on("E", None).message
    assert "has no card.md" in verdict_on("E", None, "gone").message


# The program


@pytest.mark.slow
def test_a_milestone_is_judged_in_its_own_process_and_noted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "EXERCISES_FOLDER", tmp_path / "exercises")
    exercise.main(["milestone", "E", str(measured_card(tmp_path))])  # exits with 0: raises nothing
    assert "milestone E is reached" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        exercise.main(["milestone", "A"])
    exercise.main(["progress"])
    said = capsys.readouterr().out
    assert "not written yet: embed_text" in said
    assert "milestones reached: E; next: make milestone NAME=A" in said
    with pytest.raises(UserError, match="A, B, C, D, E"):
        exercise.main(["milestone", "F"])


def test_every_milestone_is_whole():
    for letter in milestones.LETTERS:
        found = milestones.load_milestone(letter)
        assert found.letter == letter
        assert all(check.__doc__ for check in found.checks), f"{letter}: a check says nothing"
