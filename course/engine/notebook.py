"""The learner's results, hints and predictions, kept in exercises/ between two commands.

    exercises/progress.json      {"results": {"4.attend": "right"}, "hints": {"4.attend": 2},
                                  "milestones": {"A": "right"}}
    exercises/predictions.json   {"4": [[low, high], …]}
"""

from course.engine import catalogue
from utils import read_json, write_json


def read_notes(name):
    """The dict of one of the two files; empty if it does not exist yet."""
    path = catalogue.EXERCISES_FOLDER / name
    if not path.exists():
        return {}
    return read_json(path, "delete it to start again")


def write_notes(name, notes):
    """Writes one of the two files."""
    catalogue.EXERCISES_FOLDER.mkdir(exist_ok=True)
    write_json(catalogue.EXERCISES_FOLDER / name, notes)


def note_result(number, name, status):
    """Writes down the result of a function's check."""
    notes = read_notes("progress.json")
    notes.setdefault("results", {})[f"{number}.{name}"] = status
    write_notes("progress.json", notes)


def note_milestone(letter, status):
    """Keeps what came of a milestone's check."""
    notes = read_notes("progress.json")
    notes.setdefault("milestones", {})[letter] = status
    write_notes("progress.json", notes)


def next_hint(number, name, n_hints):
    """The number of the next hint, from 0; after the last hint, the last one again."""
    notes = read_notes("progress.json")
    given = notes.setdefault("hints", {})
    place = min(given.get(f"{number}.{name}", 0), n_hints - 1)
    given[f"{number}.{name}"] = place + 1
    write_notes("progress.json", notes)
    return place
