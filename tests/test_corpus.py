"""The built-in language against its grammar, written out a second time as lists of sentences."""

import itertools
import math
import re
from functools import cache

import pytest

import corpus
from corpus import ANIMALS, LOOKS, NAMES, PLACES, SYLLABLES, THINGS, VERBS, WHERE

N = 3000  # sentences in the samples that are counted
PATTERN = r"[A-Za-z]+|[,:.\n]"  # what a word of the language looks like in a text


@cache
def sample(n_sentences=N, seed=0):
    return corpus.sample(n_sentences, seed)


def sentences(words, values):
    """Both lists cut after each end of line: [(words of a sentence, its values), ...]."""
    ends = [i + 1 for i, word in enumerate(words) if word == "\n"]
    return [(tuple(words[a:b]), values[a:b]) for a, b in itertools.pairwise([0, *ends])]


@cache
def language():
    """{kind: every sentence of that kind}, straight from the examples and the lists of words."""
    gifts = [
        f"When {a} and {b} went to the {place} , {giver} gave a {thing} to {taker} . \n"
        for a, b in itertools.permutations(NAMES, 2) for giver, taker in ((a, b), (b, a))
        for place in PLACES for thing in THINGS
    ]
    songs = [f"{name} sings : {song} , again : {song} . \n" for name in NAMES
             for song in map(" ".join, itertools.product(SYLLABLES, repeat=4))]
    scenes = [f"The {look} {animal} {verb} {where} a {other} {thing} . \n"
              for look, animal, verb, where, other, thing
              in itertools.product(LOOKS, ANIMALS, VERBS, WHERE, LOOKS, THINGS)]
    return {name: [tuple(s.split(" ")) for s in all_of_them] for name, all_of_them
            in (("gift", gifts), ("song", songs), ("scene", scenes))}


def kind_of(words):
    return {"When": "gift", "The": "scene"}.get(words[0], "song")


def test_the_same_seed_gives_the_same_words_and_another_seed_others():
    assert corpus.sample(20, 5) == corpus.sample(20, 5)
    assert corpus.sample(20, 5)[0] != corpus.sample(20, 6)[0]
    assert corpus.text(2000) == corpus.text(2000, seed=0) != corpus.text(2000, seed=1)


def test_a_longer_sample_begins_like_a_shorter_one():
    words, log_probs = corpus.sample(10, 3)
    longer, longer_log_probs = corpus.sample(20, 3)
    assert longer[: len(words)] == words and longer_log_probs[: len(words)] == log_probs


def test_a_text_spells_each_word_so_that_all_can_be_read_back():
    words, _ = sample()
    text = corpus.spell(words)
    assert re.findall(PATTERN, text) == words
    assert re.sub(PATTERN, "", text).strip(" ") == ""  # nothing else is in it but spaces


def test_spelling_is_ordinary_english():
    words = "When Ola and Leo went to the park , Leo gave a kite to Ola . \n Ivo sings : ri . \n"
    assert corpus.spell(words.split(" ")) == (
        "When Ola and Leo went to the park, Leo gave a kite to Ola.\nIvo sings: ri.\n")


@pytest.mark.parametrize("n_characters", [10_000, 100_000])
def test_a_text_is_about_as_long_as_asked_and_ends_with_a_sentence(n_characters):
    text = corpus.text(n_characters)
    assert abs(len(text) / n_characters - 1) < 0.1 and text.endswith(".\n")


def test_the_shortest_text_is_one_sentence():
    assert corpus.text(1).count("\n") == 1


def test_no_sentence_can_be_made_in_two_ways():
    everything = [sentence for kind in language().values() for sentence in kind]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_the_sentences_of_a_kind_are_equally_likely_and_sum_to_one_third(kind):
    possible = set(language()[kind])
    drawn = [s for s in sentences(*sample()) if kind_of(s[0]) == kind]
    assert len(drawn) > 100
    for words, log_probs in drawn:
        assert words in possible
        assert math.isclose(math.exp(sum(log_probs)) * len(possible), 1 / 3, rel_tol=1e-9)


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_each_kept_probability_is_that_of_the_word_after_the_visible_ones(kind):
    weighted = [(s, 1 / (3 * len(all_of_them))) for all_of_them in language().values()
                for s in all_of_them]
    words, log_probs = next(s for s in sentences(*sample()) if kind_of(s[0]) == kind)
    for i, (word, log_prob) in enumerate(zip(words, log_probs, strict=True)):
        before = sum(weight for _, weight in weighted)
        weighted = [(s, weight) for s, weight in weighted if s[i] == word]  # those it leaves
        wanted = sum(weight for _, weight in weighted) / before
        assert math.isclose(math.exp(log_prob), wanted, rel_tol=1e-9), (i, word)


def test_the_mean_surprise_of_a_sentence_approaches_the_entropy():
    costs = [-sum(log_probs) for _, log_probs in sentences(*sample())]
    entropy = math.log(3) + sum(math.log(len(kind)) for kind in language().values()) / 3
    mean = sum(costs) / N
    error = math.sqrt(sum((cost - mean) ** 2 for cost in costs) / (N - 1) / N)
    assert abs(mean - entropy) < 4 * error and error < 0.02


def test_words_occur_as_often_as_their_probability_says():
    drawn = [words for words, _ in sentences(*sample())]
    chances = {"When": 1 / 3, "The": 1 / 3, **dict.fromkeys(NAMES, 1 / 24)}
    gifts, scenes = ([w for w in drawn if w[0] == first] for first in ("When", "The"))
    tallies = [(w[0], p, drawn, 0) for w, p in (((k,), v) for k, v in chances.items())]
    tallies += [(name, 1 / 8, gifts, place) for name in NAMES for place in (1, 3, 9)]
    tallies += [(verb, 1 / 5, scenes, 3) for verb in VERBS]
    for word, chance, among, place in tallies:
        n = sum(words[place] == word for words in among)
        error = math.sqrt(chance * (1 - chance) * len(among))
        assert abs(n - chance * len(among)) < 4 * error, (word, place)


def test_each_of_the_two_gives_half_of_the_time():
    gifts = [words for words, _ in sentences(*sample()) if words[0] == "When"]
    n_first = sum(words[9] == words[1] for words in gifts)
    assert abs(n_first - len(gifts) / 2) < 4 * math.sqrt(len(gifts)) / 2


def test_the_repeated_half_of_a_song_costs_nothing_and_the_first_half_all():
    for words, log_probs in sentences(*sample()):
        if kind_of(words) == "song":
            again = words.index("again")
            assert not any(log_probs[again - 1:]) and words[3:7] == words[again + 2: again + 6]
            assert all(math.isclose(p, -math.log(8)) for p in log_probs[3:7])
