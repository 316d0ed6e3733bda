"""Tests the checks of the course: they must catch mistakes, and accept other right solutions.

    python course/mistakes.py            # every chapter, in about a minute
    python course/mistakes.py 4 6        # some chapters
    python course/mistakes.py --verbose  # also prints the message for each mistake

For each exercise four things must hold. Our solution is right. The stub counts as missing. Each of
the named mistakes, an edit of our solution, is caught. Each of the other solutions passes. The
program exits with 1 if one of these fails, or if less than 80 % of the mistakes are called by name.

Source: DeMillo, Lipton & Sayward 1978 (mutation testing)
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from course.engine import catalogue, stubs
from course.engine.checking import judge, our_solution, variant
from utils import run_program

LEAST_BY_NAME = 0.8


@dataclass
class Tally:
    """The results of the checks of some exercises. failures: lines that name what fails."""

    exercises: int = 0
    mistakes: int = 0
    caught: int = 0
    by_name: int = 0
    others: int = 0
    accepted: int = 0
    minutes: int = 0
    failures: list = field(default_factory=list)

    def add(self, other):
        """Adds another tally to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def __str__(self):
        return (f"{self.exercises} exercises of {self.minutes} minutes; {self.mistakes} mistakes: "
                f"{self.caught} caught, {self.by_name} by name; {self.others} other right "
                f"solutions: {self.accepted} accepted")


def judge_exercise(chapter, exercise, tell):
    """The Tally of one exercise; tell: called with a line for each mistake."""
    tally = Tally(exercises=1, minutes=exercise.minutes)
    place = f"chapter {catalogue.number_of(chapter)}, {exercise.name}"

    verdict = judge(chapter, exercise, our_solution(chapter, exercise))
    if verdict.status != "right":
        tally.failures.append(f"{place}: our solution is {verdict.status}: {verdict.failed}: "
                              f"{verdict.message}")
    stub = stubs.function_from("\n".join(chapter.IMPORTS) + "\n"
                               + stubs.stub(chapter, exercise, "1 of 1"), exercise.name, {})
    if judge(chapter, exercise, stub).status != "missing":
        tally.failures.append(f"{place}: the stub does not count as missing")

    for mistake in exercise.mistakes:
        text = mistake.apply(stubs.solution_text(chapter, exercise))
        verdict = judge(chapter, exercise, variant(chapter, exercise, text))
        tally.mistakes += 1
        tally.caught += verdict.status == "wrong"
        tally.by_name += verdict.mistake == mistake.name
        tell(f"{place}, {mistake.name}\n    {verdict.failed}\n    {verdict.message}\n"
             f"    named: {verdict.mistake or '-'}")
        if verdict.status != "wrong":
            tally.failures.append(f"{place}: not caught: {mistake.name}")

    for other in catalogue.other_solutions(chapter, exercise):
        verdict = judge(chapter, exercise, other)
        tally.others += 1
        tally.accepted += verdict.status == "right"
        if verdict.status != "right":
            tally.failures.append(f"{place}: {other.__name__} is refused: {verdict.failed}: "
                                  f"{verdict.message}")
    return tally


def judge_chapters(numbers, tell):
    """The Tally of whole chapters, printed one by one."""
    total = Tally()
    for number in numbers:
        began = time.perf_counter()
        chapter = catalogue.load_chapter(number)
        tally = Tally()
        for exercise in chapter.EXERCISES:
            tally.add(judge_exercise(chapter, exercise, tell))
        print(f"chapter {number}: {tally}  ({time.perf_counter() - began:.0f} s)", flush=True)
        total.add(tally)
    return total


def main(argv=None):
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", type=int, nargs="*")
    parser.add_argument("--verbose", action="store_true", help="print the message for each mistake")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    tell = print if args.verbose else lambda line: None
    total = judge_chapters(args.chapters or catalogue.chapter_numbers(), tell)
    print(f"in all: {total}")
    for failure in total.failures:
        print(failure)
    if total.failures or total.by_name < LEAST_BY_NAME * total.mistakes:
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(main)
