"""Tables of n-grams against counting in a loop, kept states against the training itself, and
verdicts that can fail."""

import copy
import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from helpers import quick_run, refusal, tiny_model, tiny_tokens
from torch.testing import assert_close

import corpus
from checkpoint import load_model, save_checkpoint
from config import DataConfig, ModelConfig, TrainConfig
from data import load_dataset
from experiments import training_dynamics as program
from experiments.common import as_run, train_on_text_, validation_tokens
from experiments.dynamics.compare import Compared, compare, compare_tokens, load_compared
from experiments.dynamics.measure import (
    HeldOut,
    beginning_of,
    effects_of_heads,
    hold_out,
    measure_state,
    measure_training,
    show_state,
)
from experiments.dynamics.model import DynamicsRecipe, kept_steps, states_of, trained_states
from experiments.dynamics.report import (
    LOOKING_BACK,
    ability_step,
    changed,
    claims_of_comparison,
    claims_of_dynamics,
    comparison_figure,
    describe_comparison,
    describe_findings,
    dip,
    figures_of_dynamics,
    lead,
    shown_tokens,
    watcher_steps,
)
from experiments.dynamics.tables import (
    TABLES,
    count_ngrams,
    ngram_tables,
    predict,
    renamed,
    shuffled,
    trigram_losses,
)
from experiments.training_dynamics import DynamicsConfig
from head_ablation import ablate_heads
from losses import next_token_loss
from metrics import prev_token_score
from model import GPT
from tokenizer import CharTokenizer
from utils import seeded_generator

V = 4
TEXT = torch.randint(V - 1, (60,), generator=seeded_generator(0))  # the last token never occurs


def naive_probability(tokens, context, token):
    """The smoothed probability of a token after a context, both counted in a loop over the text."""
    if context is None:
        return 1 / V
    n = len(context)
    seen = [tuple(tokens[i : i + n + 1]) for i in range(len(tokens) - n)]
    hits = sum(each == (*context, token) for each in seen)
    total = sum(each[:n] == tuple(context) for each in seen)
    shorter = context[1:] if context else None
    return (hits + naive_probability(tokens, shorter, token)) / (total + 1)


# Tables


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_are_counted_as_a_loop_counts_them(n):
    text = TEXT.tolist()
    counted = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
    counts = count_ngrams(TEXT, V, n)
    for place in itertools.product(range(V), repeat=n):
        assert counts[place] == counted[place], place
    assert counts.sum() == len(text) - n + 1


def test_tables_are_smoothed_by_one_observation_of_the_shorter_table():
    text = TEXT.tolist()
    tables = ngram_tables(TEXT, V)
    for n, table in enumerate(tables[1:]):
        for context in itertools.product(range(V), repeat=n):
            for token in range(V):
                expected = naive_probability(text, list(context), token)
                assert table[(*context, token)].exp() == pytest.approx(expected, rel=1e-5)
    assert_close(tables[0].exp(), torch.full((V,), 1 / V))
    assert_close(tables[3][V - 1, 0], tables[2][0], msg="an unseen context is not the shorter one")


def test_a_table_predicts_from_the_last_tokens_that_it_sees():
    tokens = tiny_tokens(3, 6, d_vocab=V)
    tables = ngram_tables(TEXT, V)
    for n, table in enumerate(tables):
        predicted = predict(table, tokens)
        for row, pos in itertools.product(range(3), range(1, 6)):
            context = tokens[row, pos + 1 - max(n - 1, 0) : pos + 1].tolist()
            assert_close(predicted[row, pos - 1], table[tuple(context)])


def test_the_loss_by_trigrams_is_that_of_a_loop():
    tokens = tiny_tokens(1, 9, d_vocab=V)[0]
    text, ids = TEXT.tolist(), tokens.tolist()
    losses = trigram_losses(ngram_tables(TEXT, V), tokens)
    for i in range(1, 9):
        context = ids[max(0, i - 2) : i]
        expected = -math.log(naive_probability(text, context, ids[i]))
        assert losses[i - 1] == pytest.approx(expected, rel=1e-5), i


def test_a_shuffled_text_keeps_its_tokens_and_a_renamed_one_its_pairs():
    assert_close(count_ngrams(shuffled(TEXT), V, 1), count_ngrams(TEXT, V, 1))
    assert not torch.equal(count_ngrams(shuffled(TEXT), V, 2), count_ngrams(TEXT, V, 2))
    other = renamed(TEXT, V)
    names = renamed(torch.arange(V), V)
    assert sorted(names.tolist()) == list(range(V)) and names.tolist() != list(range(V))
    assert_close(count_ngrams(other, V, 2)[names][:, names], count_ngrams(TEXT, V, 2))


def test_a_table_that_would_be_too_large_is_refused():
    said = refusal(lambda: ngram_tables(torch.zeros(9, dtype=torch.long), 1024))
    assert "3-grams of 1,024 tokens" in said


# What is trained


def test_kept_steps_are_spaced_by_a_constant_factor_and_end_with_the_last():
    assert kept_steps(9) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    late = kept_steps(4500)[15:]
    ratios = [two / one for one, two in itertools.pairwise(late[:-1])]
    assert late[-1] == 4500 and all(1.2 < ratio < 1.32 for ratio in ratios)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the run, its recipe, its dataset, its history) of a tiny training."""
    folder = tmp_path_factory.mktemp("dynamics")
    (folder / "text.txt").write_text(corpus.text(6000), encoding="utf-8")
    recipe = DynamicsRecipe("tiny", ModelConfig(n_layers=2, n_heads=2, d_model=8, n_ctx=8),
                            DataConfig(path=str(folder / "text.txt")),
                            TrainConfig(max_steps=6, batch_size=4, warmup_steps=1))
    dataset = load_dataset(recipe.data, recipe.model.n_ctx)
    history = trained_states(folder / "run", recipe, dataset, 3)
    return folder / "run", recipe, dataset, history


def test_the_kept_states_are_those_of_the_same_training_without_keeping(trained):
    folder, recipe, dataset, history = trained
    states = [copy.deepcopy(model.state_dict()) for _, model in states_of(
        load_model(folder)[0].cfg, history)]
    model = GPT(load_model(folder)[0].cfg, 3)
    assert_close(states[0], model.state_dict(), msg="state 0 is not the untrained model")
    train_on_text_(model, dataset.train, recipe.train, 3, "again")
    assert_close(states[-1], model.state_dict(), rtol=0, atol=0)
    assert_close(states[-1], load_model(folder)[0].state_dict(), rtol=0, atol=0)
    distances = [(state["unembedding.W_U"] - states[-1]["unembedding.W_U"]).norm().item()
                 for state in states]
    assert distances == sorted(distances, reverse=True), "the states are not in the order of steps"


def test_a_second_run_reads_the_states_that_were_kept(trained, monkeypatch):
    folder, recipe, dataset, history = trained
    monkeypatch.setattr("experiments.dynamics.model.train_and_keep", None)  # must not be called
    again = trained_states(folder, recipe, dataset, 3)
    assert_close(again["weights"], history["weights"], rtol=0, atol=0)
    assert again["steps"] == history["steps"] == kept_steps(6)


# What is measured


def held_out(**changes):
    """A HeldOut of random windows, whose table of bigrams is that of TEXT's tokens."""
    windows = tiny_tokens(18, 7, d_vocab=V)
    tables = {name: predict(table, windows)
              for name, table in zip(TABLES, ngram_tables(TEXT, V), strict=True)}
    return HeldOut(**{"d_vocab": V, "windows": windows, "tables": tables, "tokens": windows[0],
                      "floor": None, "trigrams_above": None} | changes)


def test_the_distance_to_a_table_is_that_of_a_loop_over_all_predictions():
    model, held = tiny_model(d_vocab=V), held_out()
    found = measure_state(model, held)
    with torch.no_grad():
        p = model(held.windows).softmax(-1).double()
    text = TEXT.tolist()
    for n, name in enumerate(TABLES):
        total = 0.0
        for row, pos, token in itertools.product(range(18), range(1, 7), range(V)):
            ids = held.windows[row, pos + 2 - n : pos + 1].tolist() if n > 1 else []
            q = naive_probability(text, ids if n else None, token)
            total += q * math.log(q / p[row, pos, token])
        assert found["distance"][name] == pytest.approx(total / (18 * 6), rel=1e-4), name


def test_a_model_that_is_the_table_has_no_distance_to_it():
    held = held_out()
    model = tiny_model(d_vocab=V, n_layers=0, n_heads=1, d_model=V, norm="none", positions="none")
    with torch.no_grad():
        model.W_E.copy_(torch.eye(V))
        model.unembedding.W_U.copy_(ngram_tables(TEXT, V)[2])
    found = measure_state(model, held)
    assert found["distance"]["bigrams"] == pytest.approx(0, abs=1e-6)
    assert found["distance"]["unigrams"] > 0.01 and "heads" not in found


def test_losses_are_told_by_token_and_by_position():
    model, held = tiny_model(d_vocab=V), held_out()
    found, shown = measure_state(model, held), show_state(model, held.windows)
    with torch.no_grad():
        log_p = model(held.windows).log_softmax(-1)
    losses = torch.tensor([[-log_p[row, pos, held.windows[row, pos + 1]] for pos in range(6)]
                           for row in range(18)])
    assert found["by_position"] == pytest.approx(losses.mean(0).tolist(), rel=1e-5)
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["quantiles"][2] == pytest.approx(losses.median().item(), abs=0.05)
    assert_close(torch.tensor(shown["losses"]), losses[:2])
    assert shown["guesses"] == log_p[:2, :-1].argmax(-1).tolist()
    below = (losses < 4 * (math.log(V) + 2) / 24).float().mean().item()
    assert sum(shown["histogram"][:4]) == pytest.approx(below)
    assert sum(shown["histogram"]) == pytest.approx(1)


def test_heads_are_scored_and_removed_one_by_one():
    model, held = tiny_model(d_vocab=V), held_out()
    found = measure_state(model, held)["heads"]
    ablated = held.windows[:16]
    with torch.no_grad():
        _, cache = model.run_with_cache(ablated)
        _, own = model.run_with_cache(held.windows)
        before = next_token_loss(model(ablated), ablated)
        for number, head in enumerate(itertools.product(range(2), range(3))):
            with ablate_heads(model, [head], "mean", reference=cache):
                rise = next_token_loss(model(ablated), ablated) - before
            assert found["effect"][number] == pytest.approx(rise.item(), abs=1e-5)
            score = prev_token_score(own["pattern", head[0]])[:, head[1]].mean().item()
            assert found["previous token"][number] == pytest.approx(score, abs=1e-5)


def test_the_beginning_of_a_floor_is_that_of_the_first_tokens():
    sample = corpus.sample_of_length(2000)
    dataset_floor = corpus.Floor(torch.tensor(sample.log_probs), sample.categories, [5, 60, 200])
    floor = beginning_of(dataset_floor, 100)
    losses = torch.rand(99, generator=seeded_generator(0)).double()
    for name, nats in floor.above(losses).items():
        mine = [losses[i - 1].item() + sample.log_probs[i] for i in range(1, 100)
                if name in ("all", sample.categories[i])]
        assert nats == pytest.approx(sum(mine) / len(mine), abs=1e-5)
    assert floor.starts == [5, 60]


def test_a_floor_is_known_for_the_words_of_the_corpus_and_for_no_other_text(trained, words):
    _, held = words
    assert held.trigrams_above["indirect object"] == pytest.approx(math.log(8), abs=0.1)
    assert held.trigrams_above["duplicate"] == pytest.approx(math.log(8 / 2), abs=0.1)
    assert hold_out(trained[2], 8).floor is None


def test_windows_are_of_the_text_that_was_held_out(trained):
    windows = hold_out(trained[2], 8).windows
    assert torch.equal(windows.flatten(), trained[2].val[: windows.numel()])
    assert not torch.equal(windows.flatten(), trained[2].train[: windows.numel()])


# What is claimed

STEPS = [0, 1, 4, 16, 64, 256]


def passing_run(seed=0):
    """A run in which every claim holds: nearest to unigrams at step 4, to bigrams at step 16, to
    trigrams at the end; heads after that; abilities one after another."""
    curves = {"uniform": [0.01, 0.1, 1, 1.5, 2, 2.5], "unigrams": [1, 0.8, 0.3, 0.8, 1, 1.5],
              "bigrams": [5, 4, 1, 0.2, 0.4, 0.8], "trigrams": [9, 8, 4, 2, 1, 0.9],
              "shuffled bigrams": [1, 0.8, 0.4, 0.8, 1, 1.5], "renamed bigrams": [5, 5, 6, 7, 8, 9]}
    score = [0.1, 0.1, 0.1, 0.1, 0.6, 0.8]
    effect = [0, 0, 0, 0.1, 0.3, 0.5]
    above = {"copying": [2, 2, 1.5, 0.1, 0, 0], "indirect object": [2, 2, 2, 2, 0.1, 0],
             "duplicate": [2, 2, 2, 2, 0.1, 0], "recall": [2, 2, 2, 2, 2, 0.1]}
    states = [{"distance": {name: values[i] for name, values in curves.items()},
               "loss": 3 - i / 3, "quantiles": [0.1, 0.2, 1, 2, 3],
               "by_position": [2.0 - i / 9] * 20,
               "heads": {"previous token": [0.1, score[i]], "effect": [0.0, effect[i]]},
               "above": {name: values[i] for name, values in above.items()}}
              for i in range(len(STEPS))]
    return {"steps": STEPS, "states": states, "heads": ["L0H0", "L0H1"],
            "trigrams_above": dict.fromkeys(LOOKING_BACK, 2.0)}


def passing():
    """Runs in which every claim holds; the model without layers stays at the bigrams."""
    flat = passing_run()
    for i, distance in enumerate([5, 4, 1, 0.2, 0.2, 0.2]):
        flat["states"][i]["distance"]["bigrams"] = distance
    return {"characters": [passing_run()], "words": [passing_run()], "no layers": [flat]}


def failed(runs):
    return [line.claim for line in claims_of_dynamics(runs) if line.holds is False]


def test_every_claim_holds_where_it_is_true_and_most_fail_in_an_untrained_model():
    runs = passing()
    judged = [line for line in claims_of_dynamics(runs) if line.holds is not None]
    assert not failed(runs) and len(judged) == 14
    untrained = passing_run()
    untrained["states"] = [untrained["states"][0]] * len(STEPS)
    runs |= {"characters": [untrained], "words": [untrained]}
    assert len(failed(runs)) >= 12


@pytest.fixture(scope="module")
def words():
    """(the dataset of words of the built-in corpus, what is held out of it for 16 tokens)."""
    dataset = load_dataset(DataConfig(dataset="builtin", tokenizer="word"), 16)
    return dataset, hold_out(dataset, 16)


@pytest.fixture(scope="module")
def few_words(words):
    """The same with fewer tokens whose floor is known, for many models."""
    dataset, held = words
    return dataset, dataclasses.replace(held, tokens=held.tokens[:1000],
                                        floor=beginning_of(held.floor, 1000))


def test_every_claim_about_training_fails_for_a_model_that_never_learns(few_words):
    dataset, held = few_words
    runs = {}
    for n_layers in (0, 1):
        shape = ModelConfig(n_layers=n_layers, n_heads=2, d_model=8, n_ctx=16)
        recipe = DynamicsRecipe("untrained", shape, DataConfig(), TrainConfig())
        weights = GPT(dataclasses.replace(shape, d_vocab=dataset.tokenizer.d_vocab), 0).state_dict()
        history = {"steps": [0, 4, 16], "weights": {
            name: torch.stack([weight] * 3) for name, weight in weights.items()}}
        runs[n_layers] = measure_training(recipe, history, held, show=False)
    claims = claims_of_dynamics({"characters": [runs[1]], "words": [runs[1]],
                                 "no layers": [runs[0]]})
    # what holds is that the control, which has no layers, stays where it is
    assert [line.claim.split(":")[0] for line in claims if line.holds] == ["without layers"]
    assert sum(line.holds is False for line in claims) == 13


def test_no_claim_is_judged_in_a_quick_run():
    assert all(line.holds is None for line in claims_of_dynamics(passing(), judged=False))


@pytest.mark.parametrize(("table", "values", "said"), [
    ("bigrams", [5, 4, 1, 0.2, 0.21, 0.22], "distance at the end / then"),  # it stays
    ("bigrams", [0.5, 0.4, 0.3, 0.2, 0.4, 0.8], "distance before training / then"),
    ("unigrams", [1, 0.9, 0.8, 0.25, 1, 1.5], "nearest other table"),
    ("unigrams", [1, 0.9, 0.8, 0.7, 0.6, 1.5], "step nearest to unigrams"),
    ("trigrams", [9, 8, 1, 2, 3, 4], "step nearest to trigrams"),
])
def test_each_claim_about_tables_fails_alone(table, values, said):
    runs = passing()
    for state, value in zip(runs["words"][0]["states"], values, strict=True):
        state["distance"][table] = value
    assert said in " ".join(failed(runs)) and len(failed(runs)) <= 2


def test_a_model_without_layers_that_leaves_the_bigrams_fails():
    runs = passing()
    runs["no layers"] = runs["characters"]
    assert [line for line in failed(runs) if line.startswith("without layers")]


def test_heads_that_come_too_early_and_abilities_in_another_order_fail():
    runs = passing()
    for state in runs["words"][0]["states"]:
        state["heads"]["previous token"][0] = 0.9
        state["above"] |= {"indirect object": state["above"]["copying"]}
    assert len(failed(runs)) == 2
    runs = passing()
    for state in runs["words"][0]["states"]:
        state["above"]["indirect object"] = 2.0  # never learned
    assert ["indirect object" in line for line in failed(runs)] == [True]


def test_a_dip_is_found_where_it_is():
    run = passing_run()
    found = dip(run, "bigrams")
    assert (found["step"], found["value"]) == (16, 0.2)
    assert (found["before"], found["after"]) == pytest.approx((25, 4))
    assert lead(run) == pytest.approx(4)  # unigrams are next, 0.8 away
    assert watcher_steps(run) == (64, 64)
    assert [ability_step(run, name) for name in ("copying", "indirect object", "recall")] == [
        16, 64, 256]


def test_the_summary_says_at_which_steps():
    said = describe_findings(passing())
    assert "bigrams at step 16 (0.20 nats away), and 0.80 nats away at the end" in said
    assert "to unigrams" in said.lower() and "copying at step 16" in said
    assert "recall at step 256" in said


def test_the_titles_of_figures_say_what_was_found():
    drawn = figures_of_dynamics(passing())
    titles = [" ".join(axes.get_title(loc="left").split())
              for figure in drawn.values() for axes in figure.axes]
    assert "nearest to bigrams at step 16, 0.20 nats away; then it leaves them: 0.80" in titles[0]
    assert "step, 16; the best score is half of its last value at step 64" in titles[2]
    assert titles[3] == "words: copying comes at step 16, recall at step 256"
    assert "cheapest tenth costs at most 0.1 nats, the dearest at least 3" in titles[4]


# Two models


def test_the_change_of_a_tokens_loss_is_that_of_a_loop():
    tokenizer = CharTokenizer().fit("abcd")
    targets = tiny_tokens(30, 6, d_vocab=3)
    change = torch.randn(30, 6, generator=seeded_generator(1))
    change[targets == 1] -= 5
    rows = {row["token"]: row for row in compare_tokens(change, targets, tokenizer)}
    assert set(rows) == set("abc")
    for token, row in rows.items():
        mine = [change[i, j].item() for i in range(30) for j in range(6)
                if targets[i, j] == tokenizer.ids[token]]
        assert row["n"] == len(mine)
        assert row["change"] == pytest.approx(sum(mine) / len(mine), abs=1e-5)
        assert row["of_all"] == pytest.approx(sum(mine) / 180, abs=1e-5)
        assert row["low"] < row["change"] < row["high"] < row["low"] + 1.5
    assert [row["token"] for row in changed(list(rows.values()))][:1] == ["b"]


def test_a_model_does_not_differ_from_itself_and_from_its_beginning_it_does(trained):
    folder, *_ = trained
    last = load_compared(str(folder), "outputs")
    same = compare(last, last)
    assert not changed(same["tokens"]) and not changed(same["heads"])
    assert not shown_tokens(same) and same["share_better"] == same["share_worse"] == 0

    first = load_compared(f"{folder}@0", "outputs")
    found = compare(first, last)
    assert found["losses"][1] < found["losses"][0] and len(changed(found["tokens"])) > 3
    total = sum(row["of_all"] for row in compare(first, last)["tokens"])
    assert total == pytest.approx(found["losses"][1] - found["losses"][0], rel=0.1)
    assert all(line.holds is None for line in claims_of_comparison(found))
    left, right = comparison_figure(found).axes
    n_changed = len(changed(found["tokens"]))
    assert f"{n_changed} of {len(found['tokens'])} frequent tokens" in left.get_title("left")
    assert right.get_title("left").startswith(f"{found['heads'][0]['name']} changes most")
    assert f"goes from {found['losses'][0]:.3f} to {found['losses'][1]:.3f}" in (
        describe_comparison(found))


def test_a_head_that_is_silenced_is_the_head_that_changed(trained):
    folder, *_ = trained
    one = load_compared(str(folder), "outputs")
    with torch.no_grad():
        one.model.blocks[1].attn.W_O.mul_(20)  # the tiny training leaves heads that do little
    silenced = copy.deepcopy(one.model)
    with torch.no_grad():
        silenced.blocks[1].attn.W_O[1] = 0
    found = compare(one, Compared("silenced", silenced, one.tokenizer, folder))
    [row] = [row for row in found["heads"] if row["name"] == "L1H1"]
    assert row["effects"][1] == pytest.approx(0, abs=1e-6)
    before = effects_of_heads(one.model, windows_of(folder)[:16]).mean[1, 1].item()
    assert row["effects"][0] == pytest.approx(before, abs=1e-6)
    assert row["change"] == pytest.approx(-before, abs=1e-6)


def windows_of(folder):
    """The windows on which models of a run are compared."""
    text = validation_tokens(folder)
    return text[: len(text) // 8 * 8].view(-1, 8)[:128]


def test_what_cannot_be_compared_is_refused(trained, tmp_path):
    folder, *_ = trained
    assert "no state of step 7; it has 0, 1, 2, 3" in refusal(
        lambda: load_compared(f"{folder}@7", "outputs"))
    (tmp_path / "other").mkdir()
    tokenizer = CharTokenizer().fit("abcdefghijk")
    save_checkpoint(tmp_path / "other" / "checkpoint.pt", as_run(tiny_model(), tokenizer))
    other = load_compared("other", str(tmp_path))
    assert "last state only" in refusal(lambda: load_compared("other@3", str(tmp_path)))
    assert "no run 'gone'" in refusal(lambda: load_compared("gone/best.pt", str(tmp_path)))
    one = load_compared(str(folder), "outputs")
    assert "read different tokens" in refusal(lambda: compare(one, other))
    assert "train.py" in refusal(lambda: compare(other, other))
    for wrong in (("one",), ("one", "two", "three")):
        assert "compare" in refusal(lambda wrong=wrong: DynamicsConfig(compare=wrong))


def test_a_comparison_has_a_folder_of_its_own(trained, tmp_path, capsys):
    folder, *_ = trained
    with pytest.raises(SystemExit) as ended:
        program.main(["--compare", f"{folder}@0", str(folder), "--out_dir", str(tmp_path)])
    assert ended.value.code == 0 and "mean loss of" in capsys.readouterr().out
    assert [path.parent.name for path in tmp_path.glob("*/results.json")] == [
        "training_dynamics_compare"]


# The program


@pytest.mark.parametrize("quick", [False, True])
def test_every_seed_is_judged_and_the_page_shows_the_first_and_a_quick_run_judges_nothing(
        few_words, quick, tmp_path, monkeypatch):
    dataset, held = few_words
    shape = ModelConfig(n_layers=1, n_heads=2, d_model=8, n_ctx=16)
    how = TrainConfig(max_steps=1, batch_size=4, warmup_steps=1)
    recipes = [DynamicsRecipe(name, dataclasses.replace(shape, n_layers=int(name != "no layers")),
                              DataConfig(), how) for name in ("characters", "no layers", "words")]
    pages = []
    monkeypatch.setattr(program, "make_recipes", lambda *given: recipes)
    monkeypatch.setattr(program, "load_dataset", lambda *given: dataset)
    monkeypatch.setattr(program, "hold_out", lambda *given: held)
    monkeypatch.setattr(program, "make_page", pages.append)
    monkeypatch.setattr(program, "write_page", lambda *given: None)
    result = program.run(DynamicsConfig(seeds=(3, 4), quick=quick), tmp_path)
    seeds = [len(runs) for runs in result["runs"].values()]
    judged = [line.holds for line in result["claims"] if line.holds is not None]
    assert len(pages[0]) == 2, "the page shows more than the first seed's two models with layers"
    assert (seeds, len(judged)) == (([1] * 3, 0) if quick else ([2] * 3, 14))


@pytest.mark.slow
def test_the_quick_program_writes_everything_and_the_same_again(tmp_path):
    printed, results = quick_run("training_dynamics", tmp_path, n_trainings=3)
    folder = tmp_path / "training_dynamics_quick"
    assert all((folder / name).stat().st_size > 10_000
               for name in ("training_dynamics.png", "losses.png", "dynamics.html"))
    assert set(results["runs"]) == {"characters", "words", "no layers"}
    again, same = quick_run("training_dynamics", tmp_path)
    assert same == results and again.split("\nwritten")[0] == printed.split("\nwritten")[0]
