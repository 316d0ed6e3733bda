"""A little language whose entropy is known: every word is drawn with a probability that is kept.

What comes next depends on the visible text alone (the source is *unifilar*): whoever has read the
sentence so far knows which rule is being followed, and so the probability with which each word is
drawn **is** the best possible prediction. The mean of -log p over a text is then the floor that no
model can pass, except by luck or by having seen the text before.

    When Ola and Leo went to the park, Leo gave a kite to Ola.
    Ivo sings: ri sa do mu, again: ri sa do mu.
    The old cat sleeps near a red boat.

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Read before: losses.py; after: data.py
Source: Shannon 1951; Crutchfield & Young 1989 (unifilar sources)
"""

import math
import random

NAMES = ["Ada", "Ben", "Eve", "Ivo", "Leo", "Mia", "Noa", "Ola"]
PLACES = ["park", "shop", "lake", "farm", "school", "market"]
THINGS = ["kite", "book", "drum", "apple", "lamp", "boat"]
ANIMALS = ["cat", "dog", "fox", "owl", "hen", "goat"]
LOOKS = ["old", "small", "red", "quiet", "happy", "brown"]
VERBS = ["sleeps", "waits", "plays", "hides", "sings"]
WHERE = ["near", "behind", "under"]
SYLLABLES = ["ri", "sa", "do", "mu", "la", "fe", "to", "ni"]
KINDS = ["gift", "song", "scene"]  # the first word tells them apart: When, a name, or The


class Source:
    """Draws words and keeps the log-probability of each."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.words, self.log_probs = [], []

    def say(self, *words, log_prob=0.0):
        """Appends words that could not have been others (or whose log-probability is given)."""
        for word in words:
            self.words.append(word)
            self.log_probs.append(log_prob)

    def draw(self, choices, log_prob=0.0):
        """Appends one of `choices`, all equally likely, and returns it.

        log_prob: of what the word reveals besides, such as the kind of sentence that it opens.
        """
        word = choices[int(self.random.random() * len(choices))]
        self.say(word, log_prob=log_prob - math.log(len(choices)))
        return word

    def sentence(self):
        """Appends one sentence and the end of its line."""
        kind = KINDS[int(self.random.random() * len(KINDS))]
        opening = -math.log(len(KINDS))  # paid by the first word, which shows the kind
        getattr(self, kind)(opening)
        self.say(".", "\n")

    def gift(self, opening):
        """Two people, one place; who gives and who gets are both people that were named."""
        self.say("When", log_prob=opening)
        one = self.draw(NAMES)
        self.say("and")
        two = self.draw([name for name in NAMES if name != one])
        self.say("went", "to", "the")
        self.draw(PLACES)
        self.say(",")
        giver = self.draw([one, two])
        self.say("gave", "a")
        self.draw(THINGS)
        self.say("to", two if giver == one else one)

    def song(self, opening):
        """Four syllables, and the same four again: after `again` nothing is left to chance."""
        self.draw(NAMES, log_prob=opening)
        self.say("sings", ":")
        song = [self.draw(SYLLABLES) for _ in range(4)]
        self.say(",", "again", ":", *song)

    def scene(self, opening):
        """An animal does something somewhere."""
        self.say("The", log_prob=opening)
        self.draw(LOOKS)
        self.draw(ANIMALS)
        self.draw(VERBS)
        self.draw(WHERE)
        self.say("a")
        self.draw(LOOKS)
        self.draw(THINGS)


def sample(n_sentences, seed):
    """(words, log_probs) of that many sentences: lists of str and of float, in nats.

    The text of the words shows each of them, so -sum(log_probs) / len(text) is also the floor of a
    model of its characters.
    """
    source = Source(seed)
    for _ in range(n_sentences):
        source.sentence()
    return source.words, source.log_probs


def spell(words):
    """The words as text: a space between two, none before punctuation or around a line's end."""
    text = " ".join(words)
    for mark in (",", ":", "."):
        text = text.replace(f" {mark}", mark)
    return text.replace(" \n", "\n").replace("\n ", "\n")


def text(n_characters, seed=0):
    """A text of about that many characters (whole sentences, at least one)."""
    words, _ = sample(max(1, n_characters // 45), seed)  # a sentence is about 45 characters long
    return spell(words)
