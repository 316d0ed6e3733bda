"""The exercises of the course: begin a chapter, check what you wrote, ask for a hint.

    python course/exercise.py start 4            # writes stubs to fill in, exercises/chapter_04.py
    python course/exercise.py check 4            # checks your functions, up to the first mistake
    python course/exercise.py check 4 attend     # checks one function
    python course/exercise.py hint 4 attend      # prints a hint, each time the next one
    python course/exercise.py solution 4 attend  # prints our solution
    python course/exercise.py predict 4          # asks for the chapter's numbers, then compares
    python course/exercise.py milestone A        # checks what a part of the course ends with
    python course/exercise.py block 4 2          # runs the second block of chapter 4's page
    python course/exercise.py progress           # what is done, and what is next

Each function is checked alone, in any order; all others are the library's meanwhile. What you wrote
is never overwritten. Exit code: 0 if everything that was checked is right, 1 if something is wrong
or not written yet, 2 if the command cannot be carried out.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from course.engine import catalogue, milestones, notebook, page, stubs
from course.engine.checking import check_in_process
from utils import UserError, run_program

HEADER = '''"""Chapter {number}: {title}. Fill in what raises NotImplementedError, in any order.

    make check CHAPTER={number}                      # or one: FUNCTION={first}
    make hint CHAPTER={number} FUNCTION={first}

A function that the library has as a method takes `self`: the module, with its weights. Where a
docstring mentions UserError, hooks or a past, you may leave that out unless the task asks for it.
You may add functions of your own.
"""
'''


# start


def start(number):
    """Writes the stubs of a chapter's exercises; if the file exists, adds the missing ones."""
    chapter = catalogue.load_chapter(number)
    path = catalogue.learner_file(number)
    written = path.read_text(encoding="utf-8") if path.exists() else None

    n_exercises = len(chapter.EXERCISES)
    pieces = {exercise.name: stubs.stub(chapter, exercise, f"{place} of {n_exercises}")
              for place, exercise in enumerate(chapter.EXERCISES, 1)
              if written is None or f"def {exercise.name}(" not in written}
    imports = [line for line in chapter.IMPORTS if written is None or line not in written]
    shown = path.relative_to(catalogue.EXERCISES_FOLDER.parent)
    if written is not None and not pieces:
        print(f"{shown} has all {n_exercises} functions; nothing was changed")
        return

    path.parent.mkdir(exist_ok=True)
    code = "\n\n".join(["\n".join(imports) + "\n"] * bool(imports) + list(pieces.values()))
    if written is None:
        header = HEADER.format(number=number, title=catalogue.title_of(number),
                               first=chapter.EXERCISES[0].name)
        path.write_text(f"{header}\n{code}", encoding="utf-8")
        minutes = sum(exercise.minutes for exercise in chapter.EXERCISES)
        print(f"{shown}: {n_exercises} functions, about {minutes} minutes")
    else:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n\n{code}")
        print(f"{shown} existed: {', '.join(pieces)} added at its end, the rest left as it was")
    print(f"then: make check CHAPTER={number}")


# check


def check(number, name):
    """Checks a chapter's functions, or one of them. Returns whether all are right."""
    chapter = catalogue.load_chapter(number)
    exercises = chapter.EXERCISES
    if name is not None:
        exercises = [catalogue.find_exercise(chapter, name)]

    missing = []
    for name, verdict in check_in_process(number, [exercise.name for exercise in exercises]):
        notebook.note_result(number, name, verdict.status)
        if verdict.status == "missing":
            missing.append(name)
            continue
        print(f"{name}: {verdict.status}")
        for held in verdict.held:
            print(f"    ok     {held}")
        if verdict.status == "wrong":
            print(f"    WRONG  {verdict.failed or 'it comes to an end'}")
            print(f"           {verdict.message}")
            if verdict.mistake:
                print(f"           This is the result {verdict.mistake}.")
            print(f"    a hint: make hint CHAPTER={number} FUNCTION={name}")
            return False
    if missing:
        print(f"not written yet: {', '.join(missing)}")
    return not missing


# hint, solution


def hint(number, name):
    """Prints the next hint on a function."""
    exercise = catalogue.find_exercise(catalogue.load_chapter(number), name)
    place = notebook.next_hint(number, name, len(exercise.hints))
    print(f"hint {place + 1} of {len(exercise.hints)}: {exercise.hints[place]}")
    if place + 1 == len(exercise.hints):
        print(f"that was the last; our solution: make solution CHAPTER={number} FUNCTION={name}")


def solution(number, name):
    """Prints our solution of a function."""
    chapter = catalogue.load_chapter(number)
    exercise = catalogue.find_exercise(chapter, name)
    print(stubs.solution_text(chapter, exercise), end="")
    if exercise.source and catalogue.solution_name(chapter, exercise) != exercise.source:
        print(f"\n# the library's function, which does more: {exercise.source}")


# predict


def predict(number):
    """Asks for a chapter's numbers, or compares those that were given with the truth."""
    predictions = catalogue.load_chapter(number).PREDICTIONS
    notes = notebook.read_notes("predictions.json")
    given = notes.get(str(number))
    if given is None or len(given) != len(predictions):
        print("Give a low and a high for each number, so that you are 80 % sure of it.")
        notes[str(number)] = [ask(prediction.question) for prediction in predictions]
        notebook.write_notes("predictions.json", notes)
        print(f"Kept. Run the chapter, then again: make predict CHAPTER={number}")
        return

    for prediction, (low, high) in zip(predictions, given, strict=True):
        truth = prediction.truth()
        verdict = "inside" if low <= truth <= high else "outside"
        print(f"{prediction.question}\n    you: {low:g} to {high:g}; it is {truth:.4g} "
              f"({prediction.source}): {verdict}")


def ask(question):
    """A low and a high number from the terminal. Raises UserError if no answer comes."""
    while True:
        print(f"{question}\n    low high: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            raise UserError("there was no answer; run this in a terminal")
        try:
            low, high = (float(word) for word in line.replace(",", " ").split())
        except ValueError:
            print("    two numbers, such as: 0.1 0.3")
            continue
        return sorted([low, high])


def count_inside():
    """(inside, given): how many predictions were kept, and how many of them hold the truth."""
    inside = 0
    n_given = 0
    for number, given in notebook.read_notes("predictions.json").items():
        predictions = catalogue.load_chapter(int(number)).PREDICTIONS
        for prediction, (low, high) in zip(predictions, given, strict=False):
            inside += low <= prediction.truth() <= high
            n_given += 1
    return inside, n_given


# milestone


def milestone(letter, given):
    """Checks what is handed in for a milestone. Returns whether it is reached."""
    wanted = milestones.load_milestone(letter)
    print(f"milestone {letter}, {wanted.title}: {wanted.hand_in}")
    verdict = milestones.judge_in_process(letter, given)
    notebook.note_milestone(letter, verdict.status)
    for held in verdict.held:
        print(f"    ok     {held}")
    if verdict.status == "missing":
        print(f"    {verdict.message}")
    elif verdict.status == "wrong":
        print(f"    WRONG  {verdict.failed or 'it comes to an end'}")
        print(f"           {verdict.message}")
        if verdict.mistake:
            print(f"           {verdict.mistake}")
    else:
        print(f"milestone {letter} is reached")
    return verdict.status == "right"


# block


def run_block(number, place):
    """Runs a block of a chapter's page, from 1. Returns whether it came to its end."""
    code, _ = page.find_block(number, place)
    paths = [str(catalogue.ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# progress


def progress():
    """Prints what is done and what is next."""
    results = notebook.read_notes("progress.json").get("results", {})
    unfinished = []  # (chapter, its first exercise that is not right), those begun first
    minutes_done = 0
    minutes_all = 0
    for number in catalogue.chapter_numbers():
        exercises = catalogue.load_chapter(number).EXERCISES
        right = [each for each in exercises if results.get(f"{number}.{each.name}") == "right"]
        left = [each for each in exercises if each not in right]
        minutes = sum(each.minutes for each in exercises)
        minutes_right = sum(each.minutes for each in right)
        print(f"{number:3}  {catalogue.title_of(number):45} {len(right):2} of {len(exercises)}"
              f"   {minutes_right:3} of {minutes} minutes")

        minutes_done += minutes_right
        minutes_all += minutes
        if left:
            unfinished.append((not right, number, left[0]))
    print(f"in all {minutes_done} of {minutes_all} estimated minutes, by the last checks")

    if unfinished:
        _, number, exercise = min(unfinished, key=lambda each: each[:2])
        print(f"next: chapter {number}, {exercise.name} ({exercise.minutes} minutes)")
    reached = notebook.read_notes("progress.json").get("milestones", {})
    done = [letter for letter in milestones.LETTERS if reached.get(letter) == "right"]
    left = [letter for letter in milestones.LETTERS if letter not in done]
    print(f"milestones reached: {', '.join(done) or 'none yet'}"
          + (f"; next: make milestone NAME={left[0]}" if left else ""))
    inside, n_given = count_inside()
    if n_given:
        print(f"predictions: the truth lay in {inside} of {n_given} intervals of 80 %")


def main(argv=None):
    """The program. Exits with 1 if something is wrong or missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, wants, help_text in (
            ("start", "", "write the stubs of a chapter"),
            ("check", "function", "check a chapter, or one function"),
            ("hint", "function", "the next hint on a function"),
            ("solution", "function", "print our solution"),
            ("predict", "", "predict a chapter's numbers, then compare"),
            ("milestone", None, "check what a part of the course ends with"),
            ("block", "", "run a block of a chapter's page"),
            ("progress", None, "what is done, and what is next")):
        command = commands.add_parser(name, help=help_text)
        if name == "milestone":
            command.add_argument("letter")
            command.add_argument("given", nargs="?", help="a run (B), another file (C), a card (E)")
        if wants is not None:
            command.add_argument("chapter", type=int)
        if name == "block":
            command.add_argument("place", type=int, nargs="?", default=1)
        if wants:
            command.add_argument("function", nargs="?")
    args = parser.parse_args(argv)

    if args.command == "check":
        if not check(args.chapter, args.function):
            raise SystemExit(1)
    elif args.command in ("hint", "solution"):
        {"hint": hint, "solution": solution}[args.command](args.chapter, args.function)
    elif args.command == "milestone":
        if not milestone(args.letter, args.given):
            raise SystemExit(1)
    elif args.command == "block":
        if not run_block(args.chapter, args.place):
            raise SystemExit(1)
    elif args.command == "progress":
        progress()
    else:
        {"start": start, "predict": predict}[args.command](args.chapter)


if __name__ == "__main__":
    run_program(main)
