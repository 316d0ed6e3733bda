"""Find the facts that hold at each word of a story: who has what, what will be given or sung.

The built-in corpus has a hidden state, and its words reveal it. `known_variables` reads the words
one by one. At each it says which of VARIABLES hold there, judging by the words up to and including
this one. It never reads ahead, so a model that reads the same words could know all of them.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: corpus.py, experiments/dictionaries/measure.py
Next: experiments/dictionaries/trained/model.py
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
    "story: may end",  # enough sentences are over for the story to end after this one
    "story: a place is known",
    "story: somebody has a thing",
    *(f"has a thing: {name}" for name in NAMES),
    *(f"sentence: {kind}" for kind in SENTENCES),  # its kind, as soon as the words show it
    "song: again",  # from the word "again" to the full stop
    "song: sung",  # all of its syllables have been sung twice
    *(f"song: {ordinal}" for ordinal in ORDINALS),  # syllable, in the first singing or the second
    *(f"next: {category}" for category in CATEGORIES),  # what predicting the next word requires
    *(f"receiver: {name}" for name in NAMES),  # from the giver's name to the word before this name
    *(f"answer: {word}" for word in (*THINGS, *PLACES)),  # from the asked name to the word before
    *(f"to sing: {syllable}" for syllable in SYLLABLES),  # the next syllable, if it is a copy
)
# The variables that name a word to come, and that word's category
CATEGORY_OF = {"receiver": "indirect object", "answer": "recall", "to sing": "copying"}

# The category of the word after the i-th of a sentence; "syntax" if it is not listed
GIFT = "When one and two went to the place , giver gave a thing to receiver ."
AFTER = {
    "gift": dict.fromkeys((0, 2, 6, 11), "choice") | {8: "duplicate", 13: "indirect object"},
    "scene": dict.fromkeys((0, 1, 2), "choice"),
    "stay": {3: "choice"},
    None: {0: "choice"},  # a name, followed by "sings" or "is"
}
GIVER, THING, RECEIVER = (GIFT.split().index(word) for word in ("giver", "thing", "receiver"))
PLACE_OF_GIFT, PLACE_OF_STAY = 7, 4
ANSWER = {"What": 5, "Where": 6}  # the answer's place in the question's sentence


def known_variables(words):
    """Where each of VARIABLES holds, {name: [n] bool}, for n words of the corpus.

    words: a list that begins at the start of a story, or with the END of the story before.
    """
    index = {name: number for number, name in enumerate(VARIABLES)}
    found = torch.zeros(len(words), len(VARIABLES), dtype=torch.bool)
    reader = Reader()
    for place, word in enumerate(words):
        reader.read(word)
        found[place, [index[name] for name in reader.facts()]] = True
    return dict(zip(VARIABLES, found.T, strict=True))


def word_to_come(name):
    """The word that a variable says will come, or None: Ada for "receiver: Ada"."""
    group, word = name.split(": ")
    return word if group in CATEGORY_OF else None


def siblings(name):
    """The variables of the same group whose words are of the same kind, this one among them."""
    group, word = name.split(": ")
    kind = next(words for words in (NAMES, THINGS, PLACES, SYLLABLES) if word in words)
    return [f"{group}: {other}" for other in kind]


def is_next(known, name):
    """Where the next word is of the category that a variable names words of, as a bool tensor.

    If the variable holds there, its word is the next one. known: {variable: bool tensor}, all of
    one shape.
    """
    return known[f"next: {CATEGORY_OF[name.split(': ')[0]]}"]


class Reader:
    """A reader of stories, word by word, who knows the facts that `facts` lists.

    sentence: the words of the sentence so far, perhaps with its full stop.
    """

    def __init__(self):
        self.begin_story_()

    def begin_story_(self):
        """Forget everything."""
        self.sentence = []
        self.n_over = 0  # sentences
        self.place_of = {}
        self.thing_of = {}

    def read(self, word):
        """Read the next word."""
        if word == END:
            self.begin_story_()
            return
        if self.sentence[-1:] == ["."]:
            self.sentence = []
        self.sentence.append(word)
        self.n_over += word == "."
        self.remember_(word)

    def remember_(self, word):
        """Remember the place or thing of somebody, if the last word reveals it."""
        i = len(self.sentence) - 1
        if self.kind == "gift" and i == PLACE_OF_GIFT:
            self.place_of |= {self.sentence[1]: word, self.sentence[3]: word}
        elif self.kind == "gift" and i == RECEIVER:
            self.thing_of[word] = self.sentence[THING]
        elif self.kind == "stay" and i == PLACE_OF_STAY:
            self.place_of[self.sentence[0]] = word

    # The kind of sentence, and the place in it

    @property
    def kind(self):
        """The kind of the sentence: one of SENTENCES, or "stay".

        None before a sentence, and after a name alone.
        """
        first, second, *_ = [*self.sentence, None, None]
        of_first = {"When": "gift", "The": "scene", "What": "question", "Where": "question"}
        of_second = {"sings": "song", "is": "stay"}
        return of_first.get(first) or of_second.get(second)

    @property
    def to_sing(self):
        """The syllables still to be repeated, [] after the last; None if nothing is repeated."""
        if self.kind != "song" or "again" not in self.sentence:
            return None
        sung = self.sentence[2 : self.sentence.index(",")]
        n_again = len(self.sentence) - len(sung) - len(("Ada", "sings", ",", "again"))
        return sung[n_again:]

    @property
    def receiver(self):
        """Who will be given a thing, from the giver's name to the word before theirs; else None."""
        if self.kind != "gift" or not GIVER < len(self.sentence) <= RECEIVER:
            return None
        pair = {self.sentence[1], self.sentence[3]}
        return (pair - {self.sentence[GIVER]}).pop()

    @property
    def answer(self):
        """The word that answers a question, from the asked name to the word before it; else None.
        """
        if self.kind != "question" or not 2 < len(self.sentence) <= ANSWER[self.sentence[0]]:
            return None
        known = self.thing_of if self.sentence[0] == "What" else self.place_of
        return known[self.sentence[2]]

    @property
    def category_to_come(self):
        """What predicting the next word requires, one of CATEGORIES."""
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
        """Yield the names of the VARIABLES that hold at the last word."""
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
        """As `facts`, for the variables of songs."""
        to_sing = self.to_sing
        if to_sing is not None:
            yield "song: again"
            yield f"to sing: {to_sing[0]}" if to_sing else "song: sung"
        if self.sentence[-1] in SYLLABLES:
            begin = 1 if to_sing is None else self.sentence.index("again")
            number = len(self.sentence) - 1 - begin  # from 1
            if number <= len(ORDINALS):
                yield f"song: {ORDINALS[number - 1]}"
