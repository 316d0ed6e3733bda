"""The house rules, read from the source by `ast` alone: floors, packages, headers, and the pages.

No rule here counts lines, arguments or characters: how long a thing may be is a reader's judgement.
"""

import ast
import functools
import re
import sys
from pathlib import Path

from helpers import REPLICATIONS

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # imports point to an earlier row, never up and never sideways
    "utils",
    "positions",
    "losses config plotting activation_cache",
    "metrics",
    "tokenizer corpus pretrained optim hooks",
    "data",
    "embeddings attention mlp",
    "transformer_block",
    "model",
    "residual_stream_analysis weight_circuits checkpoint",
    "rerun",
    "logit_lens patching attribution head_ablation probing",
    "circuits",
    "circuit_evaluation",
    "generate",
    "train",
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
PACKAGES = {"torch", "numpy", "requests", "matplotlib", "pytest"}
PAGES = ["README.md", "COURSE_ROADMAP.md"]

MODULES = sorted(ROOT.glob("*.py"))
PROGRAMS = [path for path in sorted(ROOT.glob("experiments/*.py")) if path.stem != "common"]
EXPERIMENTS = sorted(ROOT.glob("experiments/**/*.py"))
COURSE = sorted(ROOT.glob("course/**/*.py"))
COURSE_PROGRAMS = sorted(ROOT.glob("course/*.py"))
TESTS = sorted(ROOT.glob("tests/*.py"))
STUDIES = [ROOT / "research" / name / "study.py" for name in REPLICATIONS]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
ROOT_ON_PATH = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"
ROOT_OF_STUDY = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))"


def name_of(path):
    return str(path.relative_to(ROOT))


@functools.cache
def parse(path):
    """A file's syntax tree, read once for all rules."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported(path):
    """The dotted names of all that a file imports, inside its functions too."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or "."
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def packages(path):
    """The first words of what a file imports."""
    return {name.split(".")[0] for name in imported(path)}


# Floors


def test_every_module_has_a_floor_and_its_imports_point_down():
    for path in MODULES:
        assert path.stem in FLOOR, f"{name_of(path)} has no floor"
        up = {name for name in packages(path) & set(FLOOR) if FLOOR[name] >= FLOOR[path.stem]}
        assert not up, f"{name_of(path)} imports {up}, which is not below it"


def test_nothing_is_imported_but_the_five_packages_and_python():
    python = set(sys.stdlib_module_names)
    own = set(FLOOR) | {"experiments", "course"} | {path.stem for path in TESTS}
    for path in MODULES:
        strange = packages(path) - (set(FLOOR) | PACKAGES - {"pytest"} | python)
        assert not strange, f"{name_of(path)} imports {strange}"
    for path in EXPERIMENTS + COURSE + TESTS + STUDIES:
        strange = packages(path) - (own | PACKAGES | python)
        assert not strange, f"{name_of(path)} imports {strange}"


def test_the_course_stands_on_top_beside_the_experiments():
    for path in MODULES + EXPERIMENTS + STUDIES:
        assert "course" not in packages(path), f"{name_of(path)} imports the course"
    for path in COURSE:
        assert "experiments" not in packages(path), f"{name_of(path)} imports an experiment"
        if path not in COURSE_PROGRAMS:
            assert "sys.path" not in path.read_text(encoding="utf-8"), f"{name_of(path)}: sys.path"


def test_imports_are_absolute_and_named():
    for path in MODULES + EXPERIMENTS + COURSE + TESTS + STUDIES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom):
                place = f"{name_of(path)}:{node.lineno}"
                assert node.level == 0, f"{place} is relative"
                assert node.names[0].name != "*", f"{place} imports everything"


def test_importing_a_module_runs_nothing():
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.ClassDef, *FUNCTION)
    for path in MODULES + EXPERIMENTS + COURSE + STUDIES:
        for node in parse(path).body[1:]:
            text = ast.unparse(node)
            is_program = isinstance(node, ast.If) and "__name__ == '__main__'" in text
            is_path = ((path in PROGRAMS + COURSE_PROGRAMS and text == ROOT_ON_PATH)
                       or (path in STUDIES and text == ROOT_OF_STUDY))
            assert isinstance(node, quiet) or is_program or is_path, (
                f"{name_of(path)}:{node.lineno} does something when it is imported")


# The experiments: programs, and beside them a folder a study


def test_each_program_is_one_and_stands_alone():
    folders = {path.parent.name for path in EXPERIMENTS if path.parent.name != "experiments"}
    programs = {f"experiments.{path.stem}" for path in PROGRAMS}
    assert not folders & {path.stem for path in [*PROGRAMS, *MODULES]}, "one name, two things"
    for path in PROGRAMS:
        text = path.read_text(encoding="utf-8")
        assert text.count(ROOT_ON_PATH) == 1 and '__name__ == "__main__"' in text, name_of(path)
        assert f"python experiments/{path.name}" in text, f"{name_of(path)} does not say how to run"
    for path in EXPERIMENTS + MODULES:
        assert not imported(path) & programs, f"{name_of(path)} imports a program"
        if path not in PROGRAMS:
            assert "sys.path" not in path.read_text(encoding="utf-8"), f"{name_of(path)}: sys.path"


def test_a_study_is_a_program_beside_its_card_and_imports_no_program():
    programs = {f"experiments.{path.stem}" for path in PROGRAMS}
    for path in STUDIES:
        text = path.read_text(encoding="utf-8")
        assert (path.parent / "card.md").exists(), f"{name_of(path)} has no card beside it"
        assert text.count(ROOT_OF_STUDY) == 1 and '__name__ == "__main__"' in text, name_of(path)
        how = f"python experiments/claim_card.py check {path.parent.name}\n"
        assert how in text, f"{name_of(path)} does not say how to run"
        assert not imported(path) & programs, f"{name_of(path)} imports a program"
        assert not list(undocumented(parse(path).body)), f"{name_of(path)} has no docstrings"


# Names


def test_no_public_name_is_defined_in_two_modules():
    places = {}
    for path in MODULES:
        for node in parse(path).body:
            if isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.name)
    twice = {name: where for name, where in places.items() if len(where) > 1 and name != "main"}
    assert not twice


def test_nothing_forbidden_is_written():
    unfinished = "TO" + "DO", "FIX" + "ME"
    for path in MODULES + EXPERIMENTS + COURSE + TESTS + STUDIES:
        found = [word for word in unfinished if word in path.read_text(encoding="utf-8")]
        assert not found, f"{name_of(path)}: {found}"
        for node in ast.walk(parse(path)):
            place = f"{name_of(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("exec", "eval"), f"{place} runs a string"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{place}: bare except"
            if isinstance(node, (*FUNCTION, ast.Lambda)):
                check_defaults(node, place)


def check_defaults(function, place):
    """Fails for a default that one call could change for the next."""
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for default in [d for d in function.args.defaults + function.args.kw_defaults if d]:
        called = ast.unparse(default.func) if isinstance(default, ast.Call) else ""
        made = called in ("list", "dict", "set")
        assert not isinstance(default, mutable) and not made, f"{place}: mutable default"


# Headers and docstrings


@functools.cache
def header(path):
    """{"Chapter": …, "Prerequisites": …, "Next": …, "Source": …} of a module's docstring."""
    fields = r"^(Chapter|Prerequisites|Next|Source): (.+)"
    return dict(re.findall(fields, ast.get_docstring(parse(path)), re.MULTILINE))


def chapter_of(path):
    """The number of the chapter in which a module is read first."""
    return int(re.match(r"COURSE_ROADMAP\.md, (\d+)", header(path)["Chapter"])[1])


def read_next(path):
    """The files that a module's header says to read next."""
    return re.findall(r"[\w/]+\.py", header(path)["Next"])


def test_a_module_opens_with_its_chapter_its_neighbours_and_its_source():
    for path in MODULES + EXPERIMENTS:
        assert set(header(path)) == {"Chapter", "Prerequisites", "Next", "Source"}, name_of(path)


def test_prerequisites_are_read_earlier_in_the_course_and_what_is_next_later():
    for path in MODULES + EXPERIMENTS:
        for field, order in (("Prerequisites", -1), ("Next", 1)):
            for name in re.findall(r"[\w/]+\.py", header(path)[field]):
                assert (ROOT / name).exists(), f"{name_of(path)}: {name} is not there"
                way = chapter_of(ROOT / name) - chapter_of(path)
                assert way * order >= 0, f"{name_of(path)}: {field} {name} is {way:+} chapters away"


def test_who_reads_what_is_next_comes_to_an_end_and_past_every_module():
    there = [name_of(path) for path in MODULES + EXPERIMENTS]
    for start in there:
        seen = []
        name = start
        while name is not None:
            assert name not in seen, f"from {start} one comes back to {name}"
            seen.append(name)
            name = next(iter(read_next(ROOT / name)), None)
        if start == "utils.py":
            missed = {path.name for path in MODULES} - set(seen)
            assert not missed, f"who starts at utils.py never comes to {missed}"


def undocumented(body, class_=None):
    """The public definitions in a module's or a class's body that have no docstring.

    What only fills in a method of `argparse` is documented there.
    """
    override = class_ is not None and "argparse" in "".join(map(ast.unparse, class_.bases))
    for node in body:
        if not isinstance(node, (*FUNCTION, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and not override:
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, node)


def test_everything_public_has_a_docstring():
    for path in MODULES:
        missing = list(undocumented(parse(path).body))
        assert not missing, f"{name_of(path)}: {missing}"


# The pages


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def chapters():
    """{number: text} of the roadmap's chapters, headed `## 3 · The stream as a sum`."""
    pieces = re.split(r"^## (\d+) · ", page("COURSE_ROADMAP.md"), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_a_module_and_its_chapter_name_each_other():
    there = chapters()
    for path in MODULES:
        number = str(chapter_of(path))
        assert number in there, f"{name_of(path)}: no chapter {number}"
        named = re.findall(r"\w+\.py\b", there[number])
        assert path.name in named, f"chapter {number} leaves {path.name} out"


def test_a_page_names_only_files_that_exist():
    for name in PAGES:
        spans = re.findall(r"`([^`\n]+)`", page(name))
        named = {file for span in spans for file in re.findall(r"[\w/]+\.py\b", span)}
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page(name))
        lost = [file for file in sorted(named | set(links)) if not (ROOT / file).exists()]
        assert not lost, f"{name} names {lost}"


def test_the_requirements_are_the_five_packages_pinned():
    lines = page("requirements.txt").split()
    assert {line.partition("==")[0] for line in lines} == PACKAGES
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in lines)
