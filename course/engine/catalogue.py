"""The parts of an exercise, and where to find them.

A chapter has a file in each of three folders, with the same name:

    course/chapters/chapter_04.py   EXERCISES in order: checks, hints, mistakes; and PREDICTIONS
    course/plain/chapter_04.py      solutions as a learner would write them, if the library's
                                    function does more (hooks, fused kernels) or does not exist
    course/others/chapter_04.py     other right solutions, which the checks must accept:
                                    `attend_as_loops` is one of `attend`

The signature and docstring of an exercise are read from the library (`source`), so that they are
written in one place.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
EXERCISES_FOLDER = ROOT / "exercises"  # the learner's files; git ignores them


@dataclass(frozen=True)
class Mistake:
    """A mistake that learners make, as an edit of our solution.

    name: it completes the sentence "This is the result …", such as "without the mask". old, new: a
    piece of our solution, and what replaces it; also: more such pairs.
    """

    name: str
    old: str
    new: str
    also: tuple = ()

    def apply(self, text):
        """The solution with the mistake in it; its docstring does not change.

        The docstring ends at the first triple quote at a line's end. Raises ValueError unless each
        piece occurs exactly once: then the solution has changed, and the mistake must follow it.
        """
        head, quotes, body = text.partition('"""\n')
        for old, new in ((self.old, self.new), *self.also):
            if body.count(old) != 1:
                raise ValueError(f"{self.name}: {old!r} occurs {body.count(old)} times")
            body = body.replace(old, new)
        return head + quotes + body


@dataclass(frozen=True)
class Exercise:
    """One function that the learner writes.

    name: of the learner's function. source: where the library has it, "attention.Attention.attend";
    None if only course/plain has it. task: what to do, in a sentence or two. minutes: an estimate;
    difficulty: 1 to 3; needed_for: what uses it later.
    checks: functions of the learner's function, from simple to subtle. A check's docstring says
    what must hold; if it does not hold, the check raises Wrong. hints: each goes a step further.
    mistakes: the mistakes that a message may name.
    """

    name: str
    source: str | None
    task: str
    minutes: int
    difficulty: int
    needed_for: str
    checks: tuple[Callable, ...]
    hints: tuple[str, ...]
    mistakes: tuple[Mistake, ...]


@dataclass(frozen=True)
class Prediction:
    """A number to write down before it is seen.

    question: a point of the page's list under *Predict first*. truth: a function without arguments
    that returns the number, read from the page (`page.stated`) or computed. source: where the
    learner finds it. printed: for a computed one, the words in which the page states it, with {} in
    its place.
    """

    question: str
    truth: Callable
    source: str
    printed: str = ""


def chapter_numbers():
    """The chapters that have exercises, in order."""
    files = (ROOT / "course" / "chapters").glob("chapter_*.py")
    return sorted(int(path.stem.removeprefix("chapter_")) for path in files)


def load_chapter(number):
    """The module of a chapter's exercises. Raises UserError if there is none."""
    if number not in chapter_numbers():
        there = ", ".join(map(str, chapter_numbers()))
        raise UserError(f"chapter {number} has no exercises; choose from {there}")
    return importlib.import_module(f"course.chapters.chapter_{number:02}")


def find_exercise(chapter, name):
    """An exercise of a chapter's module. Raises UserError for another name, and for none (None)."""
    for exercise in chapter.EXERCISES:
        if exercise.name == name:
            return exercise
    there = ", ".join(exercise.name for exercise in chapter.EXERCISES)
    problem = f"has no function {name}" if name else "has several functions"
    raise UserError(f"chapter {number_of(chapter)} {problem}; choose from {there}")


def number_of(chapter):
    """The number of a chapter's module."""
    return int(chapter.__name__[-2:])


def title_of(number):
    """A chapter's title in the roadmap."""
    page = (ROOT / "COURSE_ROADMAP.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {number} · (.+)$", page, flags=re.MULTILINE)
    return found[1] if found else ""


def learner_file(number):
    """Where the learner writes a chapter's functions."""
    return EXERCISES_FOLDER / f"chapter_{number:02}.py"


def companion(chapter, folder):
    """A chapter's module in course/plain or course/others, or None if it has none."""
    path = ROOT / "course" / folder / f"chapter_{number_of(chapter):02}.py"
    if not path.exists():
        return None
    return importlib.import_module(f"course.{folder}.{path.stem}")


def solution_name(chapter, exercise):
    """The dotted name of our solution: the one in course/plain if it exists, or the library's."""
    plain = companion(chapter, "plain")
    own = getattr(plain, exercise.name, None)
    if own is not None and own.__module__ == plain.__name__:  # not if it is only imported there
        return f"{plain.__name__}.{exercise.name}"
    return exercise.source


def other_solutions(chapter, exercise):
    """The other right solutions of an exercise, functions."""
    others = companion(chapter, "others")
    return [value for name, value in vars(others or object).items()
            if name.startswith(f"{exercise.name}_as_")]
