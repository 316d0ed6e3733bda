"""The built-in language: its probabilities against a second reading of the text, word by word."""

import itertools
import math
import re
from collections import Counter, defaultdict
from functools import cache

import pytest

import corpus
from corpus import ANIMALS, END, LOOKS, NAMES, PLACES, SYLLABLES, THINGS, VERBS
from tokenizer import WordTokenizer

N = 1500  # stories in the sample that is counted


@cache
def sample(n_stories=N, seed=0):
    return corpus.sample(n_stories, seed)


def stories(seed=0):
    """The words of each story, without its end."""
    words = sample(seed=seed).words
    ends = [i for i, word in enumerate(words) if word == END]
    return [words[a:b] for a, b in zip([0, *(e + 1 for e in ends[:-1])], ends, strict=True)]


def expected_cost(story):
    """A story's -log p, worked out again from its sentences by the rules of the language."""
    cost = 0.0
    place_of = {}
    thing_of = {}
    sentences = [s.split() for s in re.findall(r"[^.]+\.", " ".join(story).replace("? ", ""))]
    for number, words in enumerate(sentences):
        weight = 7 + 2 * bool(place_of) + 2 * bool(thing_of)
        kind = {"When": 2, "The": 1, "Where": 2, "What": 2}.get(words[0], 4 / len(NAMES))
        going_on = {0: 1, 1: 1, 5: 0}.get(number, 2 / 3)
        cost -= math.log(going_on * kind / weight)
        if words[0] == "When":
            _, one, _, two, _, _, _, place, _, giver, _, _, thing, _, receiver, _ = words
            cost += math.log(8 * 7 * len(PLACES) * 2 * len(THINGS))
            assert {giver, receiver} == {one, two} and one != two
            place_of |= {one: place, two: place}
            thing_of[receiver] = thing
        elif words[0] == "The":
            cost += math.log(len(LOOKS) * len(ANIMALS) * len(VERBS))
        elif words[0] == "Where":
            cost += math.log(len(place_of))
            assert words[5] == place_of[words[2]]
        elif words[0] == "What":
            cost += math.log(len(thing_of))
            assert words[4] == thing_of[words[2]]
        elif words[1] == "sings":
            n = words.index(",") - 2
            cost += math.log(2 * len(SYLLABLES) ** n * 4)  # four lengths
            assert 3 <= n <= 6 and words[2 : 2 + n] == words[4 + n : -1]
        else:
            cost += math.log(2 * len(PLACES))
            place_of[words[0]] = words[4]
    return cost - math.log({5: 1}.get(len(sentences), 1 / 3))


def test_a_story_costs_what_its_sentences_cost_by_the_rules():
    costs = []
    log_probs = iter(sample().log_probs)
    for story in stories():
        costs.append(-sum(itertools.islice(log_probs, len(story) + 1)))
        assert costs[-1] == pytest.approx(expected_cost(story), abs=1e-9)
    assert len(set(map(round, costs))) > 20


def test_each_word_was_drawn_with_the_probability_that_is_kept():
    """Among all draws of one probability, that share came out as the first of their options."""
    drawn = sample()
    hits = chances = spread = 0.0
    for word, options in zip(drawn.words, drawn.options, strict=True):
        first, p = next(iter(options.items()))
        assert sum(options.values()) == pytest.approx(1) and word in options
        hits += word == first
        chances += p
        spread += p * (1 - p)
    assert abs(hits - chances) < 4 * math.sqrt(spread)
    choices = Counter(w for w, o in zip(drawn.words, drawn.options, strict=True)
                      if set(o) == set(SYLLABLES))
    n = choices.total()
    chi2 = sum((choices[s] - n / 8) ** 2 / (n / 8) for s in SYLLABLES)
    assert chi2 < 24.3  # 7 degrees of freedom, one in a thousand


def test_the_probabilities_depend_on_the_visible_text_alone():
    """The source is unifilar: the same story so far, the same options, whatever the seed."""
    seen = {}
    for seed in range(20):
        drawn = corpus.sample(100, seed)
        begun = ()
        for word, options in zip(drawn.words, drawn.options, strict=True):
            assert seen.setdefault(begun, options) == options
            begun = () if word == END else (*begun, word)
    assert len(seen) > 5_000


def test_each_word_has_the_category_of_its_prediction():
    drawn = sample()
    by_kind = defaultdict(list)
    for word, p, kind in zip(drawn.words, drawn.log_probs, drawn.categories, strict=True):
        by_kind[kind].append((word, p))
    assert set(by_kind) == set(corpus.CATEGORIES)
    for kind in ("syntax", "indirect object", "copying", "recall"):
        assert all(p == 0 for _, p in by_kind[kind]), kind
    assert all(p == pytest.approx(-math.log(2)) for _, p in by_kind["duplicate"])
    assert {w for w, _ in by_kind["copying"]} == {*SYLLABLES, "."}
    assert {w for w, _ in by_kind["recall"]} == set(PLACES + THINGS)
    assert {w for w, _ in by_kind["indirect object"]} == set(NAMES)


def test_a_story_has_two_to_five_sentences():
    lengths = Counter(story.count(".") for story in stories())
    assert set(lengths) == {2, 3, 4, 5}
    assert lengths[2] / N == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / N))


def test_the_same_seed_gives_the_same_words_and_another_seed_others():
    assert corpus.sample(20, 5) == corpus.sample(20, 5)
    assert corpus.sample(20, 5).words != corpus.sample(20, 6).words
    assert corpus.text(2000) == corpus.text(2000, seed=0) != corpus.text(2000, seed=1)


def test_a_longer_sample_begins_like_a_shorter_one():
    short = corpus.sample(10, 3)
    long = corpus.sample(20, 3)
    for name in ("words", "log_probs", "categories", "options"):
        assert getattr(long, name)[: len(short.words)] == getattr(short, name)


# Characters


def test_no_word_that_can_follow_is_the_beginning_of_another():
    before = END
    for word, options in zip(sample().words, sample().options, strict=True):
        spellings = sorted(corpus.spell_word(before, other) for other in options)
        assert not any(b.startswith(a) for a, b in itertools.pairwise(spellings))
        before = word


def test_the_last_characters_are_those_of_the_whole_text():
    drawn = sample(2)
    log_probs, categories = corpus.characters(drawn)
    for n in range(1, 1 + len(log_probs)):
        assert corpus.characters(drawn, n) == (log_probs[-n:], categories[-n:]), n


def test_the_characters_of_a_word_cost_what_the_word_costs():
    drawn = sample()
    log_probs, categories = corpus.characters(drawn)
    costs = iter(log_probs)
    kinds = iter(categories)
    before = END
    for word, p, kind in zip(drawn.words, drawn.log_probs, drawn.categories, strict=True):
        n = len(corpus.spell_word(before, word))
        assert sum(itertools.islice(costs, n)) == pytest.approx(p, abs=1e-9)
        assert set(itertools.islice(kinds, n)) == {kind}
        before = word
    assert next(costs, None) is None


def test_each_character_has_the_probability_that_counting_continuations_gives():
    """The next character, from the words that can follow, listed out and summed."""
    drawn = corpus.sample(60, 4)
    log_probs, _ = corpus.characters(drawn)
    before = END
    at = 0
    for word, options in zip(drawn.words, drawn.options, strict=True):
        whole = corpus.spell_word(before, word)
        for i in range(len(whole)):
            going = {corpus.spell_word(before, w): p for w, p in options.items()
                     if corpus.spell_word(before, w)[:i] == whole[:i]}
            wanted = sum(p for w, p in going.items() if w[i] == whole[i]) / sum(going.values())
            assert math.exp(log_probs[at]) == pytest.approx(wanted)
            at += 1
        before = word
    assert at == len(corpus.spell(drawn.words))


def test_spelling_is_ordinary_english():
    words = "When Ola and Leo went to the park , Leo gave a kite to Ola . \n Where is Ola ?"
    assert corpus.spell(words.split(" ")) == (
        "When Ola and Leo went to the park, Leo gave a kite to Ola.\nWhere is Ola?")


def test_a_text_spells_each_word_so_that_all_can_be_read_back():
    text = corpus.spell(sample().words)
    tokenizer = WordTokenizer().fit(text)
    assert tokenizer.to_str_tokens(text) == sample().words
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("n_characters", [10_000, 100_000])
def test_a_text_is_about_as_long_as_asked_and_ends_with_a_story(n_characters):
    text = corpus.text(n_characters)
    assert abs(len(text) / n_characters - 1) < 0.1 and text.endswith(f".{END}")


def test_the_shortest_text_is_one_story():
    assert corpus.text(1).count(END) == 1
