"""A small artificial language with known entropy: the exact probability of each word is kept.

The next word's distribution depends only on the visible text (the source is *unifilar*). A reader
of the story so far knows which words can follow and how likely each is, so the probability with
which a word is drawn **is** the best possible prediction. The mean of -log p is therefore a floor:
no model can get below it, except by luck or by having seen the text before.

    When Ola and Leo went to the park, Leo gave a kite to Ola. What has Ola? A kite.
    Ivo sings ri sa do mu, again ri sa do mu. Mia is at the lake. Where is Mia? At the lake.

Each word has a category, the ability needed to predict it: `syntax` (the grammar leaves one word),
`choice` (random among several), `duplicate` (one of the two people just named), `indirect object`
(the other one), `copying` (the song again), `recall` (a fact from earlier in the story).

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
SHORTEST_SONG = 3  # syllables
LONGEST_SONG = 6
MARKS = (",", ".", "?")
END = "\n"  # the end of a story; the next one begins after it
FEWEST_SENTENCES = 2  # in a story
MOST_SENTENCES = 5
CHARACTERS_A_STORY = 125  # the average length of a story
CATEGORIES = ("syntax", "choice", "duplicate", "indirect object", "copying", "recall")


@dataclass
class Sample:
    """Words that were drawn, with the probability and category of each.

    words, log_probs (in nats), categories, and options ({word: probability} of all words that were
    possible there): lists with one item for each word of the text.
    """

    words: list = field(default_factory=list)
    log_probs: list = field(default_factory=list)
    categories: list = field(default_factory=list)
    options: list = field(default_factory=list)


@dataclass(frozen=True)
class Floor:
    """The best possible prediction of a text of n tokens.

    log_probs: [n], in nats. categories: of each token. starts: where stories begin, given as the
    position of the previous story's end.
    """

    log_probs: torch.Tensor
    categories: list
    starts: list

    def above(self, losses):
        """{category: the mean excess of the losses over the floor, in nats}.

        losses: [n - 1], of the tokens after the first. "all" comes first; the others follow in the
        order of CATEGORIES, if they occur.
        """
        excess = losses + self.log_probs[1:]
        means = {"all": excess.mean().item()}
        for category in CATEGORIES:
            mask = [other == category for other in self.categories[1:]]
            if any(mask):
                means[category] = excess[torch.tensor(mask)].mean().item()
        return means


class Storyteller:
    """Draws stories word by word, and records each word's probability and category."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.sample = Sample()
        self.place_of = {}  # {name: the place where they are}, as stated in this story
        self.thing_of = {}  # {name: the thing that they have}

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
        """Appends words that are certain, with probability one."""
        for word in words:
            self.draw({word: 1.0}, category)

    def story(self):
        """Appends a story of FEWEST_SENTENCES to MOST_SENTENCES sentences, and its end."""
        self.place_of = {}
        self.thing_of = {}
        n_sentences = 0
        while True:
            first = self.draw(self.opening_options(n_sentences))
            if first == END:
                return
            self.sentence(first)
            n_sentences += 1

    def opening_options(self, n_sentences):
        """{first word: probability} of the next sentence after n_sentences, or of END.

        The first word determines the kind of sentence; after a name, the verb does. A question is
        possible only if its answer was given earlier.
        """
        weights = {"When": 2.0, "The": 1.0} | {name: 4.0 / len(NAMES) for name in NAMES}
        if self.place_of:
            weights["Where"] = 2.0
        if self.thing_of:
            weights["What"] = 2.0

        if n_sentences < FEWEST_SENTENCES:
            p_end = 0.0
        elif n_sentences == MOST_SENTENCES:
            p_end = 1.0
        else:
            p_end = 1 / 3

        total = sum(weights.values())
        options = {word: (1 - p_end) * weight / total for word, weight in weights.items()}
        options[END] = p_end
        return without_impossible(options)

    def sentence(self, first):
        """Appends the rest of a sentence that begins with `first`, and its full stop."""
        # The first word determines the kind of sentence; after a name, the verb is drawn.
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
            return  # a song adds its own full stop
        else:
            self.say("at", "the")
            self.place_of[first] = self.draw(PLACES)
        self.say(".")

    def gift(self):
        """Appends the rest after "When": two people go somewhere, and one gives something."""
        one = self.draw(NAMES)
        self.say("and")
        two = self.draw([name for name in NAMES if name != one])
        self.say("went", "to", "the")
        place = self.draw(PLACES)
        self.place_of[one] = place
        self.place_of[two] = place
        self.say(",")

        giver = self.draw([one, two], "duplicate")
        self.say("gave", "a")
        thing = self.draw(THINGS)
        self.say("to")
        receiver = two if giver == one else one
        self.say(receiver, category="indirect object")
        self.thing_of[receiver] = thing

    def song(self):
        """Appends a song of three to six syllables, and the same syllables again.

        Songs differ in length, so the syllable to copy is at a different distance each time. To
        copy it, one has to know one's place in the song.
        """
        song = []
        while (syllable := self.draw(self.song_options(len(song)))) != ",":
            song.append(syllable)
        self.say("again")
        self.say(*song, ".", category="copying")

    def song_options(self, n_syllables):
        """{word: probability} after n_syllables of a song; all possible lengths are equally likely.

        A comma ends the song.
        """
        p_end = 0.0
        if n_syllables >= SHORTEST_SONG:
            p_end = 1 / (1 + LONGEST_SONG - n_syllables)
        options = {",": p_end}
        for syllable in SYLLABLES:
            options[syllable] = (1 - p_end) / len(SYLLABLES)
        return without_impossible(options)

    def scene(self):
        """Appends the rest after "The": an animal, and what it does."""
        for words in (LOOKS, ANIMALS, VERBS):
            self.draw(words)

    def question(self, verb, answers, *answer_begin):
        """Appends a question about a person whose answer is known, and that answer.

        answers: {name: word}. answer_begin: the words of the answer before that word.
        """
        self.say(verb)
        name = self.draw(list(answers))
        self.say("?", *answer_begin)
        self.say(answers[name], category="recall")


def without_impossible(options):
    """{word: probability} without the words of probability zero."""
    return {word: p for word, p in options.items() if p}


def sample(n_stories, seed):
    """A Sample of n_stories; for the same seed, a shorter one is the beginning of a longer one."""
    teller = Storyteller(seed)
    for _ in range(n_stories):
        teller.story()
    return teller.sample


def sample_of_length(n_characters, seed=0):
    """A Sample of about n_characters (whole stories, at least one)."""
    return sample(max(1, n_characters // CHARACTERS_A_STORY), seed)


def spell_word(before, word):
    """A word as written after the word `before`: in most cases with a space in front."""
    if word in (*MARKS, END) or before == END:
        return word
    return f" {word}"


def spell(words):
    """Words as text."""
    return "".join(spellings_of(words))


def spellings_of(words):
    """Each word as it is written after the word before it."""
    return list(itertools.starmap(spell_word, itertools.pairwise([END, *words])))


def text(n_characters, seed=0):
    """The text of `sample_of_length`."""
    return spell(sample_of_length(n_characters, seed).words)


def characters(sample, n=None):
    """(log_probs, categories) of the last n characters of a Sample's text (default: of all).

    log_probs: of each character, exact, in nats. categories: of the word that it belongs to.

    After some characters of a word, the possible words are those that begin with them.
    p(next character) is the share of their probability that continues with it (a walk down the trie
    of these words). No possible word is the beginning of another, so the characters of a word
    together have the same log-probability as the word.
    """
    spellings = spellings_of(sample.words)
    if n is None:
        n = sum(map(len, spellings))

    # The first word of which a character is wanted
    first = len(spellings)
    left = n
    while left > 0:
        first -= 1
        left -= len(spellings[first])

    log_probs = []
    categories = []
    before = sample.words[first - 1] if first else END
    for spelling, word, category, options in zip(
            spellings[first:], sample.words[first:], sample.categories[first:],
            sample.options[first:], strict=True):
        possible = options
        for end in range(1, len(spelling) + 1):
            total = sum(possible.values())
            if len(possible) > 1:
                possible = {other: p for other, p in possible.items()
                            if spell_word(before, other).startswith(spelling[:end])}
            log_probs.append(math.log(sum(possible.values()) / total))

        categories += [category] * len(spelling)
        before = word
    skipped = len(log_probs) - n  # the first word's characters that are not wanted
    return log_probs[skipped:], categories[skipped:]


def floor_of(sample, tokenizer, val):
    """The Floor of val [n], the last tokens of a Sample's text.

    None if it is unknown: for any other text (sample is None), and for tokens that split words.
    """
    if sample is None or tokenizer.kind == "bpe":
        return None

    n = len(val)
    if tokenizer.kind == "char":
        log_probs, categories = characters(sample, n)
    else:
        log_probs = sample.log_probs[-n:]
        categories = sample.categories[-n:]

    starts = (val == tokenizer.ids[END]).nonzero().flatten().tolist()
    return Floor(torch.tensor(log_probs), categories, starts)
