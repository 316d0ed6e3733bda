"""A little language whose entropy is known: every word is drawn with a probability that is kept.

What comes next depends on the visible text alone (the source is *unifilar*): whoever has read the
story so far knows which words can follow and how likely each is, so the probability with which a
word is drawn **is** the best possible prediction. The mean of -log p is then the floor that no
model can pass, except by luck or by having seen the text before.

    When Ola and Leo went to the park, Leo gave a kite to Ola. What has Ola? A kite.
    Ivo sings ri sa do mu, again ri sa do mu. Mia is at the lake. Where is Mia? At the lake.

Each word has a category, the ability that it takes: `syntax` (the rule leaves one word), `choice`
(chance among some), `duplicate` (one of the two who were just named), `indirect object` (the other
one), `copying` (the song again), `recall` (what was said of somebody earlier in the story).

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Prerequisites: losses.py, tokenizer.py
Next: data.py
Source: Shannon 1951; Crutchfield & Young 1989 (unifilar sources)
"""

import itertools
import math
import random
from dataclasses import dataclass, field

import torch

NAMES = ["Ada", "Ben", "Eve", "Ivo", "Leo", "Mia", "Noa", "Ola"]
PLACES = ["park", "shop", "lake", "farm", "bridge", "market"]
THINGS = ["kite", "book", "drum", "coin", "lamp", "ring"]
ANIMALS = ["cat", "dog", "fox", "hen"]
LOOKS = ["old", "small", "red", "quiet"]
VERBS = ["sleeps", "waits", "plays", "hides"]
SYLLABLES = ["ri", "sa", "do", "mu", "la", "fe", "to", "ni"]
SHORTEST, LONGEST = 3, 6  # songs, in syllables
MARKS = (",", ".", "?")
END = "\n"  # of a story; the next begins after it
FEWEST, MOST = 2, 5  # sentences in a story
CHARACTERS_A_STORY = 125  # on average
CATEGORIES = ("syntax", "choice", "duplicate", "indirect object", "copying", "recall")


@dataclass
class Sample:
    """Words, and for each: its log-probability in nats, its category, and {word: probability} of
    all that could have stood there."""

    words: list = field(default_factory=list)
    log_probs: list = field(default_factory=list)
    categories: list = field(default_factory=list)
    options: list = field(default_factory=list)


@dataclass(frozen=True)
class Floor:
    """The best possible prediction of a text: log_probs [n], in nats, the category of each token,
    and where stories begin (`starts`, positions of the ends before them)."""

    log_probs: torch.Tensor
    categories: list
    starts: list

    def above(self, losses):
        """{category: nats} by which losses [n - 1], of the tokens after the first, lie above the
        floor on average; "all" comes first, the others as in CATEGORIES, if they occur."""
        excess = losses + self.log_probs[1:]
        kinds = {kind: [other == kind for other in self.categories[1:]]
                 for kind in CATEGORIES}
        return {"all": excess.mean().item()} | {
            kind: excess[torch.tensor(mask)].mean().item() for kind, mask in kinds.items()
            if any(mask)}


class Storyteller:
    """Draws stories word by word, and keeps for each word how likely it was and what it takes."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.sample = Sample()
        self.place_of, self.thing_of = {}, {}

    def draw(self, options, category="choice"):
        """Appends one of {word: probability}, or of equally likely words, and returns it."""
        if not isinstance(options, dict):
            options = {word: 1 / len(options) for word in options}
        word = self.random.choices(list(options), list(options.values()))[0]
        self.sample.words.append(word)
        self.sample.log_probs.append(math.log(options[word]))
        self.sample.categories.append(category)
        self.sample.options.append(options)
        return word

    def say(self, *words, category="syntax"):
        """Appends words that could not have been others."""
        for word in words:
            self.draw({word: 1.0}, category)

    def story(self):
        """Appends a story, at least FEWEST and at most MOST sentences, and its end."""
        self.place_of, self.thing_of = {}, {}
        n_sentences = 0
        while True:
            first = self.draw(self.openings(n_sentences))
            if first == END:
                return
            self.sentence(first)
            n_sentences += 1

    def openings(self, n_sentences):
        """{first word: probability} after that many sentences; a question needs an answer that was
        given. It tells what kind of sentence follows, but for a name, after which the verb does."""
        weights = {"When": 2.0, "The": 1.0} | {name: 4.0 / len(NAMES) for name in NAMES}
        if self.place_of:
            weights["Where"] = 2.0
        if self.thing_of:
            weights["What"] = 2.0
        end = 0.0 if n_sentences < FEWEST else 1.0 if n_sentences == MOST else 1 / 3
        total = sum(weights.values())
        options = {word: (1 - end) * weight / total for word, weight in weights.items()}
        return {word: p for word, p in (options | {END: end}).items() if p}

    def sentence(self, first):
        """Appends the rest of a sentence that begins with `first`, and its full stop."""
        if first == "When":
            self.gift()
        elif first == "The":
            self.scene()
        elif first == "Where":
            self.question("is", self.place_of, "At", "the")
        elif first == "What":
            self.question("has", self.thing_of, "A")
        elif self.draw(["sings", "is"]) == "sings":
            self.song()
            return
        else:
            self.say("at", "the")
            self.place_of[first] = self.draw(PLACES)
        self.say(".")

    def gift(self):
        """Two people and a place; who gives and who gets are the two."""
        one = self.draw(NAMES)
        self.say("and")
        two = self.draw([name for name in NAMES if name != one])
        self.say("went", "to", "the")
        self.place_of[one] = self.place_of[two] = self.draw(PLACES)
        self.say(",")
        giver = self.draw([one, two], "duplicate")
        self.say("gave", "a")
        thing = self.draw(THINGS)
        self.say("to")
        receiver = two if giver == one else one
        self.say(receiver, category="indirect object")
        self.thing_of[receiver] = thing

    def song(self):
        """Three to six syllables, and the same again. How far back the first one lies is different
        each time: to copy, one must find where one is in the song."""
        song = []
        while (syllable := self.draw(self.going_on(len(song)))) != ",":
            song.append(syllable)
        self.say("again")
        self.say(*song, ".", category="copying")

    def going_on(self, n_syllables):
        """{word: probability} after that many syllables: every length of a song is as likely."""
        end = 1 / (1 + LONGEST - n_syllables) if n_syllables >= SHORTEST else 0.0
        options = {",": end} | {other: (1 - end) / len(SYLLABLES) for other in SYLLABLES}
        return {word: p for word, p in options.items() if p}

    def scene(self):
        """An animal does something."""
        for words in (LOOKS, ANIMALS, VERBS):
            self.draw(words)

    def question(self, verb, known, *answer):
        """Asks after somebody of whom it is known, and answers. known: {name: word}."""
        self.say(verb)
        name = self.draw(list(known))
        self.say("?", *answer)
        self.say(known[name], category="recall")


def sample(n_stories, seed):
    """A Sample of that many stories; a longer one begins like a shorter one."""
    teller = Storyteller(seed)
    for _ in range(n_stories):
        teller.story()
    return teller.sample


def spelled(before, word):
    """A word as characters: a space in front, but none before a mark or around a story's end."""
    return word if word in (*MARKS, END) or before == END else f" {word}"


def characters(sample):
    """(log_probs, categories) of a Sample's text, a value a character: its log-probability in nats,
    exactly, and the category of its word.

    Of the words that can follow, those that begin with the characters seen so far are still
    possible: p(next character) is the share of their probability that goes on with it (a walk down
    the trie of these words). No word that can follow is the beginning of another, so the
    characters of a word cost together what the word costs.
    """
    log_probs, categories, before = [], [], END
    columns = sample.words, sample.categories, sample.options
    for word, category, options in zip(*columns, strict=True):
        whole, possible = spelled(before, word), options
        for end in range(1, len(whole) + 1):
            total, seen = sum(possible.values()), whole[:end]
            if len(possible) > 1:
                possible = {other: p for other, p in possible.items()
                            if spelled(before, other).startswith(seen)}
            log_probs.append(math.log(sum(possible.values()) / total))
        categories += [category] * len(whole)
        before = word
    return log_probs, categories


def floor_of(sample, tokenizer, val):
    """The Floor of val [n], the last tokens of a Sample; None where it is not known, which
    is for any other text, and for pieces of words."""
    if sample is None or tokenizer.kind == "bpe":
        return None
    log_probs, categories = sample.log_probs, sample.categories
    if tokenizer.kind == "char":
        log_probs, categories = characters(sample)
    starts = (val == tokenizer.ids[END]).nonzero().flatten().tolist()
    return Floor(torch.tensor(log_probs[-len(val):]), categories[-len(val):], starts)


def sample_of_length(n_characters, seed=0):
    """A Sample of about that many characters (whole stories, at least one)."""
    return sample(max(1, n_characters // CHARACTERS_A_STORY), seed)


def spell(words):
    """Words as text."""
    return "".join(spelled(before, word) for before, word in itertools.pairwise([END, *words]))


def text(n_characters, seed=0):
    """The text of `sample_of_length`."""
    return spell(sample_of_length(n_characters, seed).words)
