"""Milestones: what a learner hands in when a part of the course is done, and the checks of it.

A milestone has a file in course/milestones/, `milestone_a.py`, with one MILESTONE. Its checks are
like those of an exercise: functions whose docstring is what must hold, from simple to subtle, up to
the first that fails. They look at the whole: at many of the learner's functions at once, at a run
on disk, at a file that the learner wrote.
"""

import contextlib
import dataclasses
import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from course.engine import catalogue
from course.engine.checking import (
    Verdict,
    in_place,
    load_learner,
    our_solution,
    own_process,
    statement,
)
from course.engine.expect import Wrong
from utils import UserError, check_choice

LETTERS = ("A", "B", "C", "D", "E")
SECONDS = 300  # the most that one milestone may take


class NotYet(Exception):
    """Something that is handed in is not there; the message says what to do."""


@dataclass(frozen=True)
class Milestone:
    """One milestone.

    letter: "A". title: in a few words. chapter: after which it is due. hand_in: what the learner
    brings, a sentence. gather(folder, given): the work that the checks look at; folder: the
    learner's, given: a run or a file that the command names, or None. It raises NotYet and
    UserError. checks: functions of the work, which raise Wrong. blame(work, check): a sentence that
    says which part of the work is at fault, or "".
    """

    letter: str
    title: str
    chapter: int
    hand_in: str
    gather: Callable
    checks: tuple[Callable, ...]
    blame: Callable = lambda work, check: ""


def load_milestone(letter):
    """The MILESTONE of a letter. Raises UserError for another one."""
    check_choice("a milestone", letter, LETTERS)
    return importlib.import_module(f"course.milestones.milestone_{letter.lower()}").MILESTONE


# Judging


def judge_milestone(milestone, folder, given):
    """The Verdict on a milestone."""
    try:
        work = milestone.gather(folder, given)
    except NotYet as missing:
        return Verdict("missing", str(missing))

    held = []
    for check in milestone.checks:
        message = failure(check, work)
        if message:
            blamed = milestone.blame(work, check)
            return Verdict("wrong", message, tuple(held), statement(check), blamed)
        held.append(statement(check))
    return Verdict("right", held=tuple(held))


def failure(check, work):
    """What is wrong by one check, a sentence, or "" where it holds."""
    torch.manual_seed(0)
    try:
        with torch.enable_grad():
            check(work)
    except (Wrong, UserError) as wrong:  # a UserError: the library refuses what it was given
        return str(wrong)
    except Exception as error:
        frames = [(frame.f_code.co_filename, number)
                  for frame, number in traceback.walk_tb(error.__traceback__)]
        ours = [each for each in frames if str(torch.__path__[0]) not in each[0]]
        path, number = ours[-1]
        return f"{Path(path).name}, line {number}, raised {type(error).__name__}: {error}"
    return ""


def send_verdict(connection, letter, folder, given):
    """What the process does: sends the Verdict, or the message of a UserError."""
    torch.set_num_threads(1)
    milestone = load_milestone(letter)
    connection.send("ready")
    try:
        connection.send(judge_milestone(milestone, folder, given))
    except UserError as error:
        connection.send(str(error))


def judge_in_process(letter, given=None):
    """The Verdict on a milestone, judged in another process, since it runs what a learner wrote.

    Raises UserError where the hand-in can't be read.
    """
    load_milestone(letter)
    with own_process(send_verdict, letter, catalogue.EXERCISES_FOLDER, given) as connection:
        if not connection.poll(SECONDS):
            return Verdict("wrong", f"it was stopped after {SECONDS} s: is there a loop that never "
                           "ends?")
        try:
            answer = connection.recv()
        except EOFError:
            return Verdict("wrong", "it ended Python itself: does it run out of memory?")
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


# Many functions of the learner's at once


@dataclass(frozen=True)
class Part:
    """One of the learner's functions, and ours. module: of the learner's file; place: the exercise,
    whose source is where the function stands in the library. adapt: the function as the library
    calls it there."""

    module: ModuleType
    place: catalogue.Exercise
    theirs: Callable
    ours: Callable
    adapt: Callable


class Together:
    """Functions of several chapters, which can be put in place of the library's all at once.

    folder: the learner's. wanted: {chapter: names}. places: {name: (dotted name in the library,
    adapt)}, where the exercise has no place there; adapt(function) is a function of the library's
    arguments. Raises NotYet where one is not written.
    """

    def __init__(self, folder, wanted, places):
        self.parts = {}
        self.chapter_of = {}
        missing = {}  # {chapter: names}
        for number, names in wanted.items():
            chapter = catalogue.load_chapter(number)
            path = folder / f"chapter_{number:02}.py"
            module = load_learner(path) if path.exists() else None
            for name in names:
                exercise = catalogue.find_exercise(chapter, name)
                theirs = getattr(module, name, None)
                if theirs is None or is_stub(theirs, number):
                    missing.setdefault(number, []).append(name)
                    continue
                source, adapt = places.get(name, (exercise.source, lambda function: function))
                place = dataclasses.replace(exercise, source=source)
                ours = our_solution(chapter, exercise)
                self.parts[name] = Part(module, place, theirs, ours, adapt)
                self.chapter_of[name] = number
        if missing:
            lists = [f"{', '.join(names)} (make exercise CHAPTER={number})"
                     for number, names in missing.items()]
            raise NotYet(f"not written yet: {'; '.join(lists)}")
        self.ours = frozenset()  # the names of those that are replaced by ours

    def function(self, name):
        """The learner's function, or ours where it is replaced."""
        part = self.parts[name]
        return part.ours if name in self.ours else part.theirs

    @contextlib.contextmanager
    def in_place(self):
        """Puts all of them in place of the library's, and takes them out again. Where one is
        replaced by ours, the learner's others call ours, too."""
        with contextlib.ExitStack() as stack:
            for name, part in self.parts.items():
                setattr(part.module, name, self.function(name))
                stack.callback(setattr, part.module, name, part.theirs)
                stack.enter_context(in_place(part.place, part.adapt(self.function(name))))
            yield

    def blame(self, check, work):
        """Which functions are at fault where a check of the work fails: a sentence."""
        names = list(self.parts)

        # Ours in place of one of theirs: does that mend it?
        alone = [name for name in names if not self.fails(check, work, {name})]
        if alone:
            name = alone[0]
            return (f"with ours in place of your {name} it holds; look at it: make check "
                    f"CHAPTER={self.chapter_of[name]} FUNCTION={name} (if that finds nothing: does "
                    "it change what it is given, remember an earlier call, or cut the gradient?)")

        # More than one is at fault: which of theirs, alone among ours, spoil it?
        spoil = [name for name in names if self.fails(check, work, set(names) - {name})]
        if spoil:
            return f"each of these spoils it by itself: {', '.join(spoil)}"
        return "each function holds among ours, and together yours do not"

    def fails(self, check, work, ours):
        """Whether a check of the work fails where some functions are replaced by ours."""
        self.ours = frozenset(ours)
        try:
            return bool(failure(check, work))
        finally:
            self.ours = frozenset()


def is_stub(function, number):
    """Whether a learner's function is the stub of its chapter, as it was written."""
    constants = getattr(getattr(function, "__code__", None), "co_consts", ())
    return any(isinstance(each, str) and each.startswith(f"chapter {number}: ")
               for each in constants)
