"""Text to integers and back: one id a character.

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Read before: utils.py; after: data.py
Source: Shannon 1951 (letters as the symbols of English)
"""

from utils import UserError


class CharTokenizer:
    """One id for each distinct character, in the order of their code points.

    The order depends on the characters alone, so the same text gives the same ids everywhere.
    """

    kind = "char"

    def __init__(self):
        self.characters = ""
        self.ids = {}

    @property
    def d_vocab(self):
        """How many ids there are: 0 to d_vocab - 1."""
        return len(self.characters)

    def fit(self, text):
        """Takes the characters of `text` as the vocabulary; returns itself."""
        return self.load_state_dict({"kind": self.kind, "characters": "".join(sorted(set(text)))})

    def encode(self, text):
        """The ids of a text, a list of int. Raises UserError naming the characters it lacks."""
        try:
            return [self.ids[character] for character in text]
        except KeyError:
            unknown = sorted(set(text) - set(self.ids))
            raise UserError(
                f"unknown characters {' '.join(map(repr, unknown[:10]))}; "
                f"this tokenizer knows {self.d_vocab}: {self.characters!r}"
            ) from None

    def decode(self, ids):
        """The text of ids, a sequence of int or a 1-D tensor. Raises UserError on unknown ids."""
        ids = [int(i) for i in ids]
        unknown = sorted({i for i in ids if not 0 <= i < self.d_vocab})
        if unknown:
            raise UserError(f"unknown ids {unknown[:10]}; they run from 0 to {self.d_vocab - 1}")
        return "".join(self.characters[i] for i in ids)

    def state_dict(self):
        """All that `load_state_dict` needs, in plain types."""
        return {"kind": self.kind, "characters": self.characters}

    def load_state_dict(self, state):
        """Becomes the tokenizer that `state_dict` came from; returns itself."""
        if state.get("kind") != self.kind:
            raise UserError(f"a {state.get('kind')!r} tokenizer cannot be loaded as {self.kind!r}")
        self.characters = state["characters"]
        self.ids = {character: i for i, character in enumerate(self.characters)}
        return self
