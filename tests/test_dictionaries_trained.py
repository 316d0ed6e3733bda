"""Dictionaries of trained models: the known variables of a text, and the measures."""

import itertools
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from helpers import refusal, tiny_model

import corpus
import train
from checkpoint import export_pretrained, save_checkpoint
from config import Config, DataConfig, ModelConfig
from experiments.common import as_run
from experiments.dictionaries.model import DictionaryRecipe
from experiments.dictionaries.trained import measure
from experiments.dictionaries.trained import model as subjects
from experiments.dictionaries.trained.model import Subject, choose_points
from experiments.dictionaries.trained.report import trained_claims, variables_figure
from experiments.dictionaries.trained.variables import (
    VARIABLES,
    known_variables,
    siblings,
    word_to_come,
)
from losses import next_token_loss
from metrics import auroc
from model import GPT
from probing import fit_probe
from tokenizer import BPETokenizer, CharTokenizer, WordTokenizer
from utils import UserError, seeded_generator

STORY = ("When Ola and Leo went to the park , Leo gave a kite to Ola . "
         "Ivo sings ri sa ri , again ri sa ri . What has Ola ? A kite .").split()


def holding(words, place):
    """The names of the variables that hold at a place."""
    return {name for name, holds in known_variables(words).items() if holds[place]}


# The variables of a story


def test_the_variables_of_a_story_are_those_found_by_hand_word_by_word():
    giver = STORY.index(",") + 1
    receiver = STORY.index(".") - 1
    assert "receiver: Ola" not in holding(STORY, giver - 1), "known before the giver is named"
    assert holding(STORY, giver) == {"story: a place is known", "sentence: gift", "next: syntax",
                                     "receiver: Ola"}
    assert holding(STORY, receiver - 1) == {"story: a place is known", "sentence: gift",
                                            "next: indirect object", "receiver: Ola"}
    assert holding(STORY, receiver) == {"story: a place is known", "story: somebody has a thing",
                                        "has a thing: Ola", "sentence: gift", "next: syntax"}

    known = {"story: a place is known", "story: somebody has a thing", "has a thing: Ola"}
    again = STORY.index("again")
    assert holding(STORY, again - 2) == known | {"sentence: song", "song: 3rd", "next: choice"}
    assert holding(STORY, again) == known | {"sentence: song", "song: again", "to sing: ri",
                                            "next: copying"}
    assert holding(STORY, again + 2) == known | {"sentence: song", "song: again", "song: 2nd",
                                                "to sing: ri", "next: copying"}
    assert holding(STORY, again + 3) == known | {"sentence: song", "song: again", "song: 3rd",
                                                "song: sung", "next: copying"}

    asked = STORY.index("?")
    known.add("story: may end")
    assert holding(STORY, asked - 2) == known | {"sentence: question", "next: choice"}
    assert holding(STORY, asked + 1) == known | {"sentence: question", "answer: kite",
                                                "next: recall"}
    assert holding(STORY, asked + 2) == known | {"sentence: question", "next: syntax"}
    assert holding([*STORY, corpus.END], -1) == {"next: choice"}, "a story's end forgets it"


class Witness(corpus.Storyteller):
    """A storyteller that records, for each word, what it knew after this word."""

    def __init__(self, seed):
        self.knew = []
        super().__init__(seed)

    def draw(self, options, category="choice"):
        # the storyteller has updated its state by the time that the next word is drawn
        self.knew.append((dict(self.place_of), dict(self.thing_of), category))
        return super().draw(options, category)


def test_variables_are_what_the_storyteller_knows_when_the_next_word_is_drawn():
    witness = Witness(5)
    for _ in range(60):
        witness.story()
    words = witness.sample.words
    known = known_variables(words)
    for place, (word, following) in enumerate(itertools.pairwise(words)):
        if word == corpus.END:
            continue  # the teller forgets a story when it begins the next
        place_of, thing_of, category = witness.knew[place + 1]
        options = witness.sample.options[place + 1]
        has = {name for name in corpus.NAMES if known[f"has a thing: {name}"][place]}
        assert has == set(thing_of), f"word {place}, {word!r}"
        assert known["story: somebody has a thing"][place] == bool(thing_of)
        assert known["story: a place is known"][place] == bool(place_of)
        assert known[f"next: {category}"][place], f"{category} after word {place}, {word!r}"
        if corpus.END in options:
            assert known["story: may end"][place], f"after word {place}, {word!r}"
        coming = {word_to_come(name) for name in VARIABLES
                  if known[name][place] and word_to_come(name)}
        if category in ("indirect object", "recall") or (
                category == "copying" and following in corpus.SYLLABLES):
            assert coming == {following}, f"after word {place}, {word!r}"


def test_a_variable_never_looks_ahead():
    words = corpus.sample(30, 3).words
    whole = known_variables(words)
    for end in (7, 40, 111, 200):
        part = known_variables(words[:end])
        for name in VARIABLES:
            assert torch.equal(part[name], whole[name][:end]), name


def test_variables_are_distinct_and_only_those_about_the_next_word_name_one():
    assert len(set(VARIABLES)) == len(VARIABLES) == 56
    assert siblings("receiver: Ada") == [f"receiver: {name}" for name in corpus.NAMES]
    assert siblings("answer: lake") == [f"answer: {place}" for place in corpus.PLACES]
    assert word_to_come("has a thing: Ada") is None and word_to_come("to sing: ri") == "ri"


def test_windows_begin_where_stories_do_and_do_not_overlap():
    windows = subjects.story_windows(2, 20, 31)
    words = [corpus.END, *corpus.sample_of_length(7 * 20 * 31, 2).words]
    assert len(windows) == 20 and {len(window) for window in windows} == {31}
    place = 0
    for window in windows:
        assert window[0] == corpus.END
        while place < len(words) and words[place : place + 31] != window:
            place += 1
        assert place < len(words), "a window is not there, or overlaps the one before"
        place += 31


# Subjects and hook points


def small_gpt(**more):
    """A tiny model of random weights that reads stories."""
    shape = {"n_heads": 2, "d_model": 8, "d_mlp": 12, "n_ctx": 24, "d_vocab": 70}
    return tiny_model(**shape | more)


def test_layers_below_zero_count_from_the_last_and_wrong_points_are_refused_in_one_line():
    model = small_gpt()
    assert choose_points(model) == ["blocks.1.mlp.hook_post", "blocks.1.hook_resid_post"]
    assert choose_points(model, "blocks.-2.hook_mlp_out") == ["blocks.0.hook_mlp_out"]
    assert choose_points(small_gpt(attn_only=True)) == ["blocks.1.hook_resid_post"]
    assert choose_points(small_gpt(n_layers=0)) == ["hook_embed"]

    refused = {"blocks.1.mlp.hook_pots": "blocks.1.mlp.hook_post", "blocks.7.hook_resid_post": "",
               "blocks.-3.hook_resid_post": "", "blocks.0.attn.hook_z": "head",
               "blocks.0.attn.hook_pattern": "query_pos", "ln_final.hook_scale": "[batch, pos, 1]"}
    for at, named in refused.items():
        message = refusal(lambda at=at: choose_points(model, at), at)
        assert named in message and "\n" not in message, at
    refusal(lambda: choose_points(small_gpt(attn_only=True), "blocks.0.mlp.hook_post"))


def word_subject(model=None, at="blocks.1.mlp.hook_post", windows=40):
    """A Subject of stories, with an untrained model."""
    tokenizer = WordTokenizer().fit(corpus.text(60_000))
    model = model or small_gpt(d_vocab=tokenizer.d_vocab)
    stories = subjects.story_windows(2, windows, model.cfg.n_ctx)
    variables = subjects.variables_of(stories)
    held_out = subjects.as_ids(stories, tokenizer)
    tokens = subjects.as_ids(subjects.story_windows(1, windows, model.cfg.n_ctx), tokenizer)
    to_come = {name: tokenizer.ids[word_to_come(name)] for name in variables if word_to_come(name)}
    return Subject("stories", model, tokenizer, at, tokens, held_out, variables, to_come)


def test_collected_activations_stand_text_after_text():
    subject = word_subject()
    collected = measure.collect(subject.model, subject.tokens, subject.at).view(40, 24, 12)
    for text in (0, 17, 39):
        cache = subject.model.run_with_cache(subject.tokens[text : text + 1])[1]
        assert torch.allclose(collected[text], cache[subject.at][0], atol=1e-6)


# The loss recovered


class Copy:
    """A dictionary that copies its input exactly."""

    def encode(self, x):
        return x

    def decode(self, z):
        return z


class Constant(Copy):
    """A dictionary that always writes the same vector."""

    def __init__(self, written):
        self.written = written

    def decode(self, z):
        return self.written.expand_as(z)


def test_an_exact_dictionary_recovers_all_of_the_loss_and_a_constant_none():
    for at in ("blocks.1.mlp.hook_post", "blocks.0.hook_resid_post"):
        subject = word_subject(at=at)
        mean = measure.collect(subject.model, subject.tokens, at).mean(0)
        reference = measure.reference_losses(subject, mean)
        exact = measure.loss_recovered(subject, Copy(), reference)
        assert exact["against_mean"] == exact["against_zero"] == 1
        none = measure.loss_recovered(subject, Constant(mean), reference)
        assert none["against_mean"] == 0, none
        nothing = measure.loss_recovered(subject, Constant(torch.zeros_like(mean)), reference)
        assert nothing["against_zero"] == 0, nothing
        assert len({nothing["clean"], nothing["mean"], nothing["zero"]}) == 3


def test_a_spliced_activation_leaves_the_logits_as_they_were_and_a_half_does_not():
    subject = word_subject()
    model, tokens = subject.model, subject.held_out
    listened, cache = model.run_with_cache(tokens, subject.at)
    with model.hooks([(subject.at, lambda own, hook: cache[subject.at])]):
        assert torch.equal(model(tokens), listened)

    with model.hooks([(subject.at, lambda own, hook: own / 2)]):
        by_hand = next_token_loss(model(tokens), tokens).item()
    assert measure.spliced_loss(subject, lambda x: x / 2) == pytest.approx(by_hand, abs=1e-5)


def test_the_fit_of_a_dictionary_is_counted_by_hand():
    class Two(Copy):
        def decode(self, z):
            return z[:, :2]

    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [3.0, 2.0]])

    class Reader(Two):
        def encode(self, x):
            z = torch.cat([x, torch.zeros(4, 1)], 1)
            z[3, 1] = 0  # an error of 2 in the last text
            return z

    fit = measure.describe_fit(Reader(), x)
    assert fit["L0"] == 0.75 and fit["dead"] == pytest.approx(1 / 3)
    assert fit["explained"] == pytest.approx(1 - 4 / 10)  # variances 6 and 4


# Prediction


def random_places(n=120, n_words=5, n_variables=3, d=4, seed=0):
    """Random Places with rounded activations, so that many are equal."""
    generator = seeded_generator(seed)
    return measure.Places(torch.randn(n, d, generator=generator).round(decimals=1),
                          torch.randint(n_words, (n,), generator=generator),
                          torch.rand(n, n_variables, generator=generator) < 0.3, n_words)


def test_auroc_among_equal_words_counts_every_pair_of_the_same_word():
    places = random_places(n=60)
    compared = measure.Comparisons.of(places.x, places)
    for score, variable in itertools.product(range(4), range(3)):
        won = n_pairs = 0
        for i, j in itertools.product(range(60), repeat=2):
            if places.words[i] == places.words[j] and places.truth[i, variable] \
                    and not places.truth[j, variable]:
                one, other = places.x[i, score], places.x[j, score]
                won += 1.0 if one > other else 0.5 if one == other else 0.0
                n_pairs += 1
        assert compared.auroc[score, variable].item() == pytest.approx(won / n_pairs)
        assert compared.pairs[:, variable].sum() == n_pairs


def test_with_one_word_it_is_the_plain_auroc_and_each_word_has_its_own():
    places = random_places()
    one_word = replace(places, words=torch.zeros_like(places.words))
    compared = measure.Comparisons.of(places.x, one_word)
    by_word = measure.Comparisons.of(places.x, places).auroc_of_words
    for score, variable in itertools.product(range(4), range(3)):
        plain = auroc(places.x[:, score], places.truth[:, variable])
        assert compared.auroc[score, variable].item() == pytest.approx(plain)
        here = places.words == 2
        of_word = auroc(places.x[here, score], places.truth[here, variable])
        assert by_word[2, score, variable].item() == pytest.approx(of_word)


def test_a_score_that_depends_on_the_word_alone_has_an_auroc_of_one_half():
    places = random_places()
    word_alone = places.words[:, None].float()
    assert torch.equal(measure.Comparisons.of(word_alone, places).auroc,
                       torch.full((1, 3), 0.5, dtype=torch.float64))


def random_halves(sign=1):
    """Two halves of texts with three variables, planted in the numbers of x.

    Number 1 predicts variable 0, by being low if sign is -1. Variable 1 is predicted by number 2 at
    words below 2, and by number 3 at the other words. Nothing predicts variable 2.
    """
    halves = []
    for seed in (1, 2):
        places = random_places(n=2000, seed=seed)
        x = places.x.clone()
        x[:, 1] = sign * places.truth[:, 0].float()
        early = places.words < 2
        x[:, 2] = torch.where(early, 5.0 * places.truth[:, 1], x[:, 2])
        x[:, 3] = torch.where(early, x[:, 3], 5.0 * places.truth[:, 1])
        halves.append(replace(places, x=x))
    return measure.Halves(["first", "second", "third"], *halves)


def test_the_best_score_is_chosen_on_one_half_and_measured_on_the_other():
    for sign in (1, -1):
        best = measure.Prediction.of(lambda x: x, random_halves(sign))
        assert best.which[0] == 1 and best.one[0] == best.each_word[0] == 1
        assert best.one[1] < 0.9 and best.each_word[1] > 0.98, "one of two words has its own score"
        assert abs(best.one[2] - 0.5) < 0.06 and abs(best.each_word[2] - 0.5) < 0.06

    # a score that is right in the first half only is chosen, and then fails in the second
    halves = random_halves()
    fooled = replace(halves.measure, x=random_places(n=2000, seed=3).x)
    best = measure.Prediction.of(lambda x: x, replace(halves, measure=fooled))
    assert best.which[0] == 1 and abs(best.one[0] - 0.5) < 0.06


def test_the_mean_number_of_variables_carried_is_over_scores_that_carry_any():
    carried = measure.Prediction.of(lambda x: x, random_halves()).carried
    # numbers 1, 2 and 3: the last two carry variable 1 at two and three words of five
    compared = measure.Comparisons.of(random_halves().measure.x, random_halves().measure)
    by_hand = [sum(abs(value - 0.5) > 0.3 for value in row) for row in compared.auroc.tolist()]
    assert by_hand[0] == 0 and by_hand[1] == 1
    assert carried["share"] == sum(count > 0 for count in by_hand) / 4
    assert carried["mean"] == sum(by_hand) / sum(count > 0 for count in by_hand)

    for sign in (1, -1):  # a low score carries a variable too
        half = random_halves(sign).measure
        both = replace(half, truth=half.truth[:, [0, 0, 2]])
        halves = measure.Halves(["a", "b", "c"], both, both)
        best = measure.Prediction.of(lambda x: x[:, [0, 1]], halves)
        assert best.carried == {"mean": 2.0, "share": 0.5}


def test_the_probe_predicts_as_well_as_a_logistic_one_and_ignores_the_word():
    generator = seeded_generator(4)
    directions = torch.randn(2, 6, generator=generator)
    halves = []
    for _ in range(2):
        words = torch.randint(3, (400,), generator=generator)
        truth = torch.rand(400, 2, generator=generator) < 0.2 + 0.25 * words[:, None]
        x = truth.float() @ directions + torch.randn(400, 6, generator=generator)
        x[:, 5] += 40 * (words == 1)  # which word it is, loud
        halves.append(measure.Places(x, words, truth, 3))
    halves = measure.Halves(["first", "second"], *halves)
    found = measure.probe_auroc(halves)
    for variable in range(2):
        probe = fit_probe(halves.choose.x, halves.choose.truth[:, variable].long(), n_folds=2)
        scores = probe.logits(halves.measure.x.double())[:, 1:]
        logistic = measure.Comparisons.of(scores, halves.measure).auroc[0, variable]
        assert found[variable] > 0.7 and found[variable] > logistic - 0.01


def test_the_halves_have_no_text_in_common_and_leave_out_rare_variables():
    subject = word_subject()
    halves = measure.Halves.of(subject)
    assert halves.choose.words.tolist() == subject.held_out[0::2].flatten().tolist()
    assert halves.measure.words.tolist() == subject.held_out[1::2].flatten().tolist()
    name = halves.names[3]
    assert torch.equal(halves.measure.truth[:, 3], subject.variables[name][1::2].flatten())
    assert "song: again" in halves.names and "answer: kite" not in halves.names
    for half in (halves.choose, halves.measure):
        assert measure.Comparisons.of(half.x, half).pairs.sum(0).min() >= measure.FEWEST_PAIRS


# Steering


def test_log_prob_changes_are_those_of_a_hook_that_adds_the_vector():
    for at in ("blocks.1.mlp.hook_post", "blocks.0.hook_resid_post", "hook_embed"):
        subject = word_subject(at=at)
        model = subject.model
        tokens = subject.held_out[:5]
        places = torch.tensor([3, 9, 1, 14, 9])
        d = measure.collect(model, tokens, at).shape[1]
        vectors = torch.randn(2, d, generator=seeded_generator(2))
        found = measure.log_prob_changes(subject, tokens, places, vectors)
        for number, vector in enumerate(vectors):
            total = 0
            for text, place in enumerate(places.tolist()):
                def add(own, hook, place=place, vector=vector):
                    steered = own.clone()
                    steered[0, place] += vector
                    return steered

                row = tokens[text : text + 1]
                after = model.run_with_hooks(row, [(at, add)])[0, place].log_softmax(-1)
                total = total + after - model(row)[0, place].log_softmax(-1)
            assert torch.allclose(found[number], total / 5, atol=1e-5), at


class Planted(Copy):
    """A dictionary of the last stream whose latents each predict a variable and write its word."""

    def __init__(self, subject, halves, names):
        self.places = {len(half.x): half for half in (halves.choose,)}
        self.columns = [halves.names.index(name) for name in names]
        W_U = subject.model.W_U.detach()
        rows = torch.stack([W_U[:, subject.to_come[name]] for name in names])
        self.W_dec = rows / rows.norm(dim=-1, keepdim=True)

    def encode(self, x):
        return self.places[len(x)].truth[:, self.columns].float() * 3


def test_steering_along_what_writes_a_word_beats_random_directions_and_the_reverse_does_not(
        monkeypatch):
    tokenizer = WordTokenizer().fit(corpus.text(60_000))
    model = small_gpt(d_vocab=tokenizer.d_vocab, d_model=32)
    subject = word_subject(model, "blocks.1.hook_resid_post", windows=400)
    halves = measure.Halves.of(subject)
    names = [name for name in halves.names if name.startswith("to sing")]
    planted = Planted(subject, halves, names)
    calls = []
    changes_of = measure.log_prob_changes

    def remember(subject, tokens, places, vectors):
        calls.append((tokens, places))
        return changes_of(subject, tokens, places, vectors)

    monkeypatch.setattr(measure, "log_prob_changes", remember)
    found = measure.steer_by_variables(subject, halves, planted, 0)
    own = [each for name, each in found.items() if name in names]
    assert len(own) == len(names) >= 6
    assert sum(each["feature"] > max(each["random"]) for each in own) >= 0.8 * len(names)

    # in the other half of the texts, where another word of the kind comes next
    others = {tuple(text): text for text in subject.held_out[1::2].tolist()}
    for name, (tokens, places) in zip(found, calls, strict=True):
        for text, place in zip(tokens.tolist(), places.tolist(), strict=True):
            following = tokenizer.decode([others[tuple(text)][place + 1]])
            kinds = {word_to_come(sibling) for sibling in siblings(name)}
            assert following in kinds - {word_to_come(name)}, (name, following)

    planted.W_dec = -planted.W_dec
    found = measure.steer_by_variables(subject, halves, planted, 0)
    assert all(found[name]["feature"] < 0 for name in names)


# Everything together


def test_shuffling_keeps_the_numbers_of_each_column_and_destroys_their_correlations():
    subject = word_subject()
    x = measure.collect(subject.model, subject.tokens, subject.at)
    shown = measure.shuffle_columns(x, 0)
    assert torch.equal(shown.sort(0).values, x.sort(0).values)
    before, after = (each.T.corrcoef().fill_diagonal_(0).abs().mean() for each in (x, shown))
    assert after < 0.5 * before


def measured(**more):
    """A result like those of `measure_subject`, for which every claim is true."""
    def scores(level, carried):
        return {"one": [level] * 4, "each_word": [level] * 4, "which": [0] * 4,
                "carried": {"mean": carried, "share": 0.5}, "busiest": ["a"]}

    fit = {"explained": 0.9, "L0": 8.0, "dead": 0.1}
    random = {"means": 2.5, "random": [0.1, -0.2]}
    steered = {"receiver: Ada": {"feature": 2.0} | random}
    loss = {"clean": 1.0, "spliced": 1.001, "mean": 2.0, "zero": 3.0, "against_mean": 0.999,
            "against_zero": 0.9995}
    return {"name": "words", "at": "blocks.1.mlp.hook_post", "fit": fit, "loss": loss,
            "shuffled": {"fit": fit, "loss": loss | {"spliced": 1.1, "against_mean": 0.9}},
            "untrained": {"fit": fit, "loss": loss | {"spliced": 1.2, "against_mean": 0.8}},
            "effects": [], "variables": ["a", "b", "c", "d"], "probe": [0.95] * 4,
            "probe_untrained": [0.6] * 4, "steered": steered,
            "steered_shuffled": {"receiver: Ada": {"feature": 0.5} | random},
            "steered_untrained": {"receiver: Ada": {"feature": 0.0} | random},
            "predicted": {
                "latent": scores(0.8, 1.5), "before": scores(0.86, 9.0),
                "neuron": scores(0.85, 4.0), "random": scores(0.85, 8.0),
                "shuffled": scores(0.78, 2.0), "untrained": scores(0.55, 0.0)}} | more


def test_each_claim_fails_where_its_control_takes_the_dictionarys_place():
    true = measured()
    verdicts = [line.holds for line in trained_claims([true])]
    assert verdicts == [True] * 2 + [None] * 3 + [True] + [None] * 3 + [True]

    # a dictionary like that of shuffled activations; latents like the untrained model's; ...
    worse = true["loss"] | {"spliced": 1.1, "against_mean": 0.9}
    predicted = true["predicted"]
    falsified = {
        0: measured(loss=worse), 1: measured(loss=worse),
        5: measured(predicted=predicted | {"latent": predicted["untrained"]}),
        9: measured(steered=true["steered_shuffled"]),
    }
    for number, result in falsified.items():
        results = [true, result, result]  # two of three, since the last claim is of the median
        claims = trained_claims(results)
        assert claims[number].holds is False, claims[number].claim
        assert all(line.holds is None for line in trained_claims(results, judged=False))


def test_every_claim_fails_for_a_dictionary_and_a_model_that_learned_nothing(monkeypatch):
    monkeypatch.setattr(measure, "FEWEST_PAIRS", 60)  # so that few texts are enough
    untrained = DictionaryRecipe("TopK", 4, 64, steps=0)
    result, _ = measure.measure_subject(word_subject(), untrained, 0)
    verdicts = [line.holds for line in trained_claims([result])]
    assert verdicts.count(False) == 4 and True not in verdicts


@pytest.mark.slow
def test_a_small_run_measures_words_and_text_and_a_second_run_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "N_RANDOM", 3)
    found = list(subjects.load_subjects(options(tmp_path, quick=True), tmp_path))
    assert [one.at for one in found] == ["blocks.1.mlp.hook_post", "blocks.1.hook_resid_post",
                                         "blocks.2.mlp.hook_post", "blocks.2.hook_resid_post"]
    recipe = DictionaryRecipe("TopK", 4, 64, steps=40)
    results = [measure.measure_subject(one, recipe, 0)[0] for one in found]
    assert len(trained_claims(results, judged=False)) == 10 + 2 * 3
    assert variables_figure(results[0]).axes[0].get_title(loc="left").startswith("words, seed 0")
    assert results[0] == measure.measure_subject(found[0], recipe, 0)[0], "not the same again"


def options(folder, **more):
    """Settings for `load_subjects`."""
    settings = {"run_name": None, "model": None, "text": None, "at": None, "seeds": (0,),
            "out_dir": folder, "retrain": False, "quick": False}
    return SimpleNamespace(**settings | more)


def test_runs_and_pretrained_models_are_measured_on_their_own_text_or_on_a_file(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefghij" * 60)
    train.main(["--data.path", str(tmp_path / "text.txt"), "--data.val_fraction", "0.4",
                "--model.n_layers", "1", "--model.n_heads", "1", "--model.d_model", "8",
                "--model.n_ctx", "8", "--train.max_steps", "1",
                "--logging.out_dir", str(tmp_path), "--logging.run_name", "mine"])
    found, = subjects.load_subjects(options(tmp_path, run_name="mine", at="blocks.-1.hook_mlp_in"),
                                    tmp_path)
    whole = torch.cat([found.tokens, found.held_out])
    assert found.at == "blocks.0.hook_mlp_in" and whole.shape == (30, 8)
    assert found.tokenizer.decode(whole.flatten().tolist()) == "abcdefghij" * 24
    assert len(found.held_out) == 10 and found.variables == {}
    assert subjects.find_default_run(tmp_path) is None, "a run of another shape is no default run"

    (tmp_path / "other.txt").write_text("jihgfedcba" * 20)
    other, _ = subjects.load_subjects(
        options(tmp_path, run_name="mine", text=tmp_path / "other.txt"), tmp_path)
    assert other.tokenizer.decode(other.tokens[0].tolist()) == "jihgfedc"

    model = tiny_model(n_heads=2, d_model=8, n_ctx=16, d_vocab=256, tie_embeddings=True)
    export_pretrained(tmp_path / "two", model, BPETokenizer())
    published, last = subjects.load_subjects(options(tmp_path, model=str(tmp_path / "two")),
                                             tmp_path)
    assert (published.at, last.at) == ("blocks.1.mlp.hook_post", "blocks.1.hook_resid_post")
    assert published.tokens.shape == (67, 16) and published.held_out.shape == (33, 16)

    # a wrong request is refused in one line, before anything is trained
    (tmp_path / "short.txt").write_text("abcdefghij")
    refused = {"no run 'nope'": {"run_name": "nope"}, "the closest": {"run_name": "mine",
               "at": "blocks.0.mlp.hook_pots"}, "windows of 8": {"run_name": "mine",
               "text": tmp_path / "short.txt"}}
    for named, asked in refused.items():
        message = refusal(lambda asked=asked: list(
            subjects.load_subjects(options(tmp_path, **asked), tmp_path)), named)
        assert named in message and "\n" not in message


def test_the_default_run_is_the_newest_of_trains_default_shape_and_text(tmp_path, monkeypatch):
    def tokens_of(run):
        if run.name == "lost":
            raise UserError("its text is gone")

    monkeypatch.setattr(subjects, "validation_tokens", tokens_of)
    tokenizer = CharTokenizer().fit("abc")
    shape = ModelConfig(d_vocab=3)
    state = as_run(GPT(shape), tokenizer, data_sha256="of its text")
    for name, cfg in (("old", Config(model=shape)), ("new", Config(model=shape)),
                      ("longer", Config(model=replace(shape, n_ctx=128))),
                      ("words", Config(model=shape, data=DataConfig(tokenizer="word"))),
                      ("lost", Config(model=shape))):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "checkpoint.pt", state | {"config": asdict(cfg)})
    assert subjects.find_default_run(tmp_path).name == "new"
