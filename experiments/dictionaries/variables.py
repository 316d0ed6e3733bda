"""What is known of each word of a story: who has what, who is given it, where in a song one is.

The built-in corpus has a hidden state, and its words say what it is. `known_variables` reads words
one by one and says of each which of VARIABLES hold *there*, from the words up to and including it.
Nothing is read ahead, so a model that reads the same words could know all of it.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: corpus.py
Next: experiments/dictionaries/subjects.py
Source: the grammar is that of corpus.Storyteller
"""

import torch

from corpus import (
    CATEGORIES,
    END,
    FEWEST_SENTENCES,
    NAMES,
    PLACES,
    SYLLABLES,
    THINGS,
)

SENTENCES = ("gift", "scene", "song", "question")  # and "stay", "Ada is at the lake."
ORDINALS = ("1st", "2nd", "3rd", "4th", "5th")

VARIABLES = (
    "story: may end",  # so many sentences are over that an end can follow this one
    "story: a place is known",
    "story: somebody has a thing",
    *(f"has a thing: {name}" for name in NAMES),
    *(f"sentence: {kind}" for kind in SENTENCES),  # what kind it is, once that is known
    "song: again",  # from the word "again" to the full stop
    "song: sung",  # all of its syllables have been sung twice
    *(f"song: {ordinal}" for ordinal in ORDINALS),  # syllable, in the first singing or the second
    *(f"next: {category}" for category in CATEGORIES),  # what the next word takes
    *(f"receiver: {name}" for name in NAMES),  # from the giver's name to the word before theirs
    *(f"answer: {word}" for word in (*THINGS, *PLACES)),  # from who is asked about to before it
    *(f"to sing: {syllable}" for syllable in SYLLABLES),  # the next one, where it is a copy
)
# Variables that name a word that is to come, and its category
CATEGORY_OF = {"receiver": "indirect object", "answer": "recall", "to sing": "copying"}

# What the word after the i-th of a sentence takes; a word that is not listed is "syntax"
GIFT = "When one and two went to the place , giver gave a thing to receiver ."
AFTER = {
    "gift": dict.fromkeys((0, 2, 6, 11), "choice") | {8: "duplicate", 13: "indirect object"},
    "scene": dict.fromkeys((0, 1, 2), "choice"),
    "stay": {3: "choice"},
    None: {0: "choice"},  # a name, which may sing or be somewhere
}
GIVER, THING, RECEIVER = (GIFT.split().index(word) for word in ("giver", "thing", "receiver"))
PLACE_OF_GIFT, PLACE_OF_STAY = 7, 4
ANSWER = {"What": 5, "Where": 6}  # where it stands in the question's sentence


def known_variables(words):
    """{name: [n] bool} of each of VARIABLES, for n words of the corpus.

    words: a list that begins where a story does, or with the END of the one before.
    """
    index = {name: number for number, name in enumerate(VARIABLES)}
    found = torch.zeros(len(words), len(VARIABLES), dtype=torch.bool)
    reader = Reader()
    for place, word in enumerate(words):
        reader.read(word)
        found[place, [index[name] for name in reader.facts()]] = True
    return dict(zip(VARIABLES, found.T, strict=True))


def word_to_come(name):
    """The word that a variable says will come, or None: "receiver: Ada" says Ada."""
    group, word = name.split(": ")
    return word if group in CATEGORY_OF else None


def siblings(name):
    """The variables that say a word of the same kind as this one does, itself among them."""
    group, word = name.split(": ")
    kind = next(words for words in (NAMES, THINGS, PLACES, SYLLABLES) if word in words)
    return [f"{group}: {other}" for other in kind]


def is_next(known, name):
    """Where the word that a variable says comes next, if the variable holds: the category says so.

    known: {variable: bool tensor}, of the same shape.
    """
    return known[f"next: {CATEGORY_OF[name.split(': ')[0]]}"]


class Reader:
    """Reads a story word by word, and knows of it what `facts` says.

    sentence: the words of the sentence so far, of which the last may be its full stop.
    """

    def __init__(self):
        self.begin_story_()

    def begin_story_(self):
        """Forgets all that was said."""
        self.sentence = []
        self.n_over = 0  # sentences
        self.place_of = {}
        self.thing_of = {}

    def read(self, word):
        """Takes in the next word."""
        if word == END:
            self.begin_story_()
            return
        if self.sentence[-1:] == ["."]:
            self.sentence = []
        self.sentence.append(word)
        self.n_over += word == "."
        self.remember_(word)

    def remember_(self, word):
        """Keeps what the last word says of somebody."""
        i = len(self.sentence) - 1
        if self.kind == "gift" and i == PLACE_OF_GIFT:
            self.place_of |= {self.sentence[1]: word, self.sentence[3]: word}
        elif self.kind == "gift" and i == RECEIVER:
            self.thing_of[word] = self.sentence[THING]
        elif self.kind == "stay" and i == PLACE_OF_STAY:
            self.place_of[self.sentence[0]] = word

    # What kind of sentence it is, and where in it one is

    @property
    def kind(self):
        """One of SENTENCES, or "stay"; None before a sentence, and after a name alone."""
        first, second, *_ = [*self.sentence, None, None]
        of_first = {"When": "gift", "The": "scene", "What": "question", "Where": "question"}
        of_second = {"sings": "song", "is": "stay"}
        return of_first.get(first) or of_second.get(second)

    @property
    def to_sing(self):
        """The syllables that are still to be sung again, [] where they all have been; None where
        nothing is sung again."""
        if self.kind != "song" or "again" not in self.sentence:
            return None
        sung = self.sentence[2 : self.sentence.index(",")]
        n_again = len(self.sentence) - len(sung) - len(("Ada", "sings", ",", "again"))
        return sung[n_again:]

    @property
    def receiver(self):
        """Who will be given a thing, from the giver's name on until it has been said; or None."""
        if self.kind != "gift" or not GIVER < len(self.sentence) <= RECEIVER:
            return None
        pair = {self.sentence[1], self.sentence[3]}
        return (pair - {self.sentence[GIVER]}).pop()

    @property
    def answer(self):
        """The word that answers a question, from the asked name on until it has been said; or None.
        """
        if self.kind != "question" or not 2 < len(self.sentence) <= ANSWER[self.sentence[0]]:
            return None
        known = self.thing_of if self.sentence[0] == "What" else self.place_of
        return known[self.sentence[2]]

    @property
    def category_to_come(self):
        """What the next word takes, one of CATEGORIES."""
        i = len(self.sentence) - 1
        if i < 0 or self.sentence[i] == ".":
            return "choice"  # how the next sentence begins
        if self.kind == "song" and self.to_sing is not None:
            return "copying"
        if self.kind == "song":
            return "syntax" if "," in self.sentence else "choice"
        if self.kind == "question":
            after = {1: "choice", ANSWER[self.sentence[0]] - 1: "recall"}
        else:
            after = AFTER[self.kind]
        return after.get(i, "syntax")

    # All of it

    def facts(self):
        """Yields the names of the VARIABLES that hold at the last word."""
        # of the story
        if self.n_over >= FEWEST_SENTENCES:
            yield "story: may end"
        if self.place_of:
            yield "story: a place is known"
        if self.thing_of:
            yield "story: somebody has a thing"
        for name in self.thing_of:
            yield f"has a thing: {name}"

        # of the sentence
        if self.kind in SENTENCES:
            yield f"sentence: {self.kind}"
        if self.kind == "song":
            yield from self.facts_of_song()

        # of the words to come
        yield f"next: {self.category_to_come}"
        if self.receiver is not None:
            yield f"receiver: {self.receiver}"
        if self.answer is not None:
            yield f"answer: {self.answer}"

    def facts_of_song(self):
        """As `facts`, of a song."""
        to_sing = self.to_sing
        if to_sing is not None:
            yield "song: again"
            yield f"to sing: {to_sing[0]}" if to_sing else "song: sung"
        if self.sentence[-1] in SYLLABLES:
            begin = 1 if to_sing is None else self.sentence.index("again")
            number = len(self.sentence) - 1 - begin  # from 1
            if number <= len(ORDINALS):
                yield f"song: {ORDINALS[number - 1]}"
