"""The text of the library's functions, and stubs that keep only signature and docstring.

The library is read by `ast` when the command runs, so no signature or docstring is written twice.
A method becomes a function that takes `self`.
"""

import ast
import importlib.abc
import importlib.util
import re
import textwrap

from course.engine.catalogue import ROOT, number_of, solution_name


def split_name(dotted):
    """The module of a dotted name and the names inside: ("attention", ["Attention", "attend"])."""
    parts = dotted.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if (ROOT / "/".join(parts[:end])).with_suffix(".py").exists():
            return ".".join(parts[:end]), parts[end:]
    raise ValueError(f"{dotted} is in no file")


def find_function(dotted):
    """A function's source, moved to the left margin, and its syntax tree: (text, node)."""
    module, way = split_name(dotted)
    path = (ROOT / module.replace(".", "/")).with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    node = ast.parse(text)
    for name in way:
        node = next(child for child in node.body if getattr(child, "name", None) == name)

    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    text = textwrap.dedent("\n".join(lines)) + "\n"
    return text, ast.parse(text).body[0]


def solution_text(chapter, exercise):
    """Our solution of an exercise as text, under the exercise's name."""
    text, node = find_function(solution_name(chapter, exercise))
    return text.replace(f"def {node.name}(", f"def {exercise.name}(", 1)


def shape_comments(text, node):
    """The shapes in a function's comments, as lines such as "# z: [batch, pos, head, d_head]"."""
    lines = text.splitlines()
    for statement in ast.walk(node):
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            continue
        comment = re.search(r"# (\[[^\]]*\])", lines[statement.end_lineno - 1])
        if comment:
            yield f"    # {statement.targets[0].id}: {comment[1]}"


def stub(chapter, exercise, place):
    """An exercise as the learner gets it: task, signature, docstring and shapes, no solution.

    place: "2 of 7".
    """
    text, node = find_function(solution_name(chapter, exercise))
    if exercise.source and ast.get_docstring(node) is None:
        text, node = find_function(exercise.source)
    lines = text.splitlines()
    docstring = node.body[0]
    has_docstring = ast.get_docstring(node) is not None
    end = docstring.end_lineno if has_docstring else docstring.lineno - 1
    promised = "\n".join(lines[node.lineno - 1 : end])
    promised = promised.replace(f"def {node.name}(", f"def {exercise.name}(", 1)
    decorators = [line for line in lines[: node.lineno - 1]
                  if "no_grad" in line or "contextmanager" in line]

    where = f" · in the library: {exercise.source}" if exercise.source else ""
    heading = [f"{place} · {exercise.minutes} minutes · difficulty {exercise.difficulty} of 3 · "
               f"needed for {exercise.needed_for}{where}", exercise.task]
    comment = "\n".join(textwrap.fill(part, 96, initial_indent="# ", subsequent_indent="# ",
                                      break_long_words=False, break_on_hyphens=False)
                        for part in heading)
    left = f'    raise NotImplementedError("chapter {number_of(chapter)}: {exercise.name}")'
    shapes = list(shape_comments(*find_function(solution_name(chapter, exercise))))
    if shapes:
        shapes.insert(0, "    # shapes on the way:")
    return "\n".join([comment, *decorators, promised, *shapes, left]) + "\n"


# Text that becomes a function


class TextLoader(importlib.abc.InspectLoader):
    """Loads a module from text, as if it were a file."""

    def __init__(self, text):
        self.text = text

    def get_source(self, fullname):
        return self.text


def function_from(text, name, names):
    """The function `name` that a text defines. names: {name: value}, known in the text."""
    loader = TextLoader(text)
    spec = importlib.util.spec_from_loader(f"course_text_{name}", loader)
    module = importlib.util.module_from_spec(spec)
    vars(module).update({key: value for key, value in names.items() if not key.startswith("__")})
    loader.exec_module(module)
    return getattr(module, name)
