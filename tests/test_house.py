"""The house rules, read from the source by `ast` alone: floors, packages, headers, and the pages.

No rule here counts lines, arguments or characters: how long a thing may be is a reader's judgement.
"""

import ast
import functools
import re
import sys
from pathlib import Path

import mutants

from experiments.cards.model import REPLICATIONS

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # imports point to an earlier row, never up and never sideways
    "utils",
    "positions download",
    "losses config plotting activation_cache",
    "metrics",
    "tokenizer corpus documents pretrained optim hooks",
    "token_files formats",
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
LABS = sorted(ROOT.glob("course/labs/*.py"))
TESTS = sorted(ROOT.glob("tests/*.py"))
STUDIES = [ROOT / "research" / name / "study.py" for name in REPLICATIONS]
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
ROOT_ON_PATH = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"
ROOT_FROM_FURTHER_DOWN = ROOT_ON_PATH.replace("parent.parent", "parent.parent.parent")


def name_of(path):
    return str(path.relative_to(ROOT))


@functools.cache
def parse(path):
    """A file's syntax tree, read once for all rules."""
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def nodes(path):
    """All nodes of a file's syntax tree, outermost first, walked once for all rules."""
    return list(ast.walk(parse(path)))


@functools.cache
def imported(path):
    """The dotted names of all that a file imports, inside its functions too."""
    names = set()
    for node in nodes(path):
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
        from_experiments = {name for name in imported(path) if name.startswith("experiments")}
        allowed = ()
        if path in LABS:  # claims, seeds, the program around a lab
            allowed = ("experiments.common",)
        elif path.name in ("chapter_16.py", "milestone_e.py"):  # they are about claim cards
            allowed = ("experiments.cards",)
        from_experiments = {name for name in from_experiments if not name.startswith(allowed)}
        assert not from_experiments, f"{name_of(path)} imports {from_experiments}"
        if path not in COURSE_PROGRAMS + LABS:
            assert "sys.path" not in path.read_text(encoding="utf-8"), f"{name_of(path)}: sys.path"


def test_imports_are_absolute_and_named():
    for path in MODULES + EXPERIMENTS + COURSE + TESTS + STUDIES:
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom):
                place = f"{name_of(path)}:{node.lineno}"
                assert node.level == 0, f"{place} is relative"
                assert node.names[0].name != "*", f"{place} imports everything"


def test_importing_a_module_runs_nothing():
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.ClassDef, *FUNCTION)
    for path in MODULES + EXPERIMENTS + COURSE + STUDIES:
        for node in parse(path).body[1:]:
            if isinstance(node, quiet):
                continue
            text = ast.unparse(node)
            is_program = isinstance(node, ast.If) and "__name__ == '__main__'" in text
            is_path = path in PROGRAMS + COURSE_PROGRAMS and text == ROOT_ON_PATH
            is_path |= path in LABS + STUDIES and text == ROOT_FROM_FURTHER_DOWN
            assert is_program or is_path, (
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


# The labs: each a program in one file


def test_each_lab_is_a_program_that_stands_alone_and_says_how_to_extend_it():
    labs = {f"course.labs.{path.stem}" for path in LABS}
    for path in LABS:
        text = path.read_text(encoding="utf-8")
        assert ROOT_FROM_FURTHER_DOWN in text and '__name__ == "__main__"' in text, name_of(path)
        for said in (f"python course/labs/{path.name}", "\nClaim: ", "\nExpected: "):
            assert said in ast.get_docstring(parse(path)), f"{name_of(path)} leaves out {said!r}"
        assert "Extend it:" in text.split('__name__ == "__main__"')[1], name_of(path)
    for path in COURSE:
        assert not imported(path) & labs, f"{name_of(path)} imports a lab"


def test_a_study_is_a_program_beside_its_card_and_imports_no_program():
    programs = {f"experiments.{path.stem}" for path in PROGRAMS}
    for path in STUDIES:
        text = path.read_text(encoding="utf-8")
        assert (path.parent / "card.md").exists(), f"{name_of(path)} has no card beside it"
        assert text.count(ROOT_FROM_FURTHER_DOWN) == 1, name_of(path)
        assert '__name__ == "__main__"' in text, name_of(path)
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


def test_every_planted_bug_stands_where_it_can_be_planted():
    for mutant in mutants.MUTANTS:
        found = (ROOT / f"{mutant.module}.py").read_text(encoding="utf-8").count(mutant.old)
        assert found == 1, f"{mutant.module} has {found} times: {mutant.old}"


def test_nothing_forbidden_is_written():
    unfinished = "TO" + "DO", "FIX" + "ME"
    for path in MODULES + EXPERIMENTS + COURSE + TESTS + STUDIES:
        found = [word for word in unfinished if word in path.read_text(encoding="utf-8")]
        assert not found, f"{name_of(path)}: {found}"
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                is_string_run = node.func.id in ("exec", "eval")
                assert not is_string_run, f"{name_of(path)}:{node.lineno} runs a string"
            elif isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name_of(path)}:{node.lineno}: bare except"
            elif isinstance(node, (*FUNCTION, ast.Lambda)):
                check_defaults(node, path)


def check_defaults(function, path):
    """Fails for a default that one call could change for the next."""
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for default in [d for d in function.args.defaults + function.args.kw_defaults if d]:
        called = ast.unparse(default.func) if isinstance(default, ast.Call) else ""
        made = called in ("list", "dict", "set")
        assert not isinstance(default, mutable) and not made, (
            f"{name_of(path)}:{function.lineno}: mutable default")


# Headers and docstrings


@functools.cache
def header(path):
    """{"Chapter": …, "Prerequisites": …, "Next": …, "Source": …} of a module's docstring."""
    fields = r"^(Chapter|Prerequisites|Next|Source): (.+)"
    return dict(re.findall(fields, ast.get_docstring(parse(path)), re.MULTILINE))


def chapter_of(path):
    """The number of the chapter in which a module is read first."""
    return int(re.match(r"COURSE_ROADMAP\.md, (\d+)", header(path)["Chapter"])[1])


def test_a_module_opens_with_its_chapter_its_neighbours_and_its_source():
    for path in MODULES + EXPERIMENTS + LABS:
        assert set(header(path)) == {"Chapter", "Prerequisites", "Next", "Source"}, name_of(path)


# The course's order is that of the *Read* lists in the roadmap. A file that they do not name is
# optional; from its header, `Next` leads back to a file of the lists, or ends in the last chapter.


def read_lists(page):
    """{chapter: (its title, the whole files in its *Read* lists, all files in them)}.

    A file is named in part as "`GELU` in `mlp.py`" or "the second half of `attribution.py`".
    """
    found = {}
    pieces = re.split(r"^## (\d+) · (.+)$", page, flags=re.MULTILINE)
    for number, title, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        lists = re.findall(r"^\*\*Read\.\*\*(.*?)\n\n", text, flags=re.MULTILINE | re.DOTALL)
        named = re.findall(r"(\bin\s+|half of\s+)?`([\w/]+\.py)`", " ".join(lists))
        whole = [file for is_part, file in named if not is_part]
        found[int(number)] = title, whole, [file for _, file in named]
    return found


def order_faults(page, headers):
    """The contradictions between the roadmap's order and the headers: a list of sentences.

    headers: {file: its header, as `header` gives it}.
    """
    lists = read_lists(page)
    course = [file for _, whole, _ in lists.values() for file in whole]
    place = {file: number for number, file in enumerate(course)}
    faults = [f"{file} is in two Read lists" for file in course if course.count(file) > 1]
    faults += [f"{file} is in no Read list" for file in headers
               if "/" not in file and file not in place]
    faults += [f"the roadmap names {file}, which is not there" for file in course
               if file not in headers]

    # the table at the top has some files of each list, in the list's order
    first_page = page.split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|", first_page, flags=re.MULTILINE)
    for number, cell in rows:
        left = iter(lists[int(number)][2])
        cell = re.findall(r"[\w/]+\.py", cell)
        if not all(file in left for file in cell):  # goes through `left` once
            faults.append(f"the table has {cell} in chapter {number}, and its Read list does not")

    for file, fields in headers.items():
        for number, title in re.findall(r"(\d+) \(([^)]+)\)", fields["Chapter"]):
            if int(number) not in lists or title.lower() != lists[int(number)][0].lower():
                faults.append(f"{file}: chapter {number} is not called {title}")
        needs = re.findall(r"[\w/]+\.py", fields["Prerequisites"])
        [following] = re.findall(r"[\w/]+\.py", fields["Next"]) or [None]
        lost = {*needs, *filter(None, [following])} - set(headers)
        if lost:
            faults.append(f"{file} names {sorted(lost)}, which is not there")
        elif file in place:
            faults += faults_in_course(file, fields, needs, following, course, lists)
        else:
            faults += faults_of_optional(file, needs, following, place, headers)
    return faults


def faults_in_course(file, fields, needs, following, course, lists):
    """As `order_faults`, for one file of the Read lists."""
    here = course.index(file)
    earlier = [each for each in course[:here] if each in needs]
    faults = []
    if needs != earlier:
        faults.append(f"{file} needs {needs}; before it the course reads {earlier}, in this order")
    if following != (course[here + 1] if here + 1 < len(course) else None):
        faults.append(f"{file} is followed by {course[here + 1:here + 2]}, not by {following}")
    number = next(number for number, (_, whole, _) in lists.items() if file in whole)
    if not fields["Chapter"].startswith(f"COURSE_ROADMAP.md, {number} "):
        faults.append(f"{file} is read in chapter {number}, not {fields['Chapter']}")
    return faults


def faults_of_optional(file, needs, following, place, headers):
    """As `order_faults`, for one file that is in no Read list."""
    chapter = {name: int(re.search(r"\d+", each["Chapter"])[0]) for name, each in headers.items()}
    faults = [f"{file}, of chapter {chapter[file]}, needs {name} of chapter {chapter[name]}"
              for name in needs if chapter[name] > chapter[file]]
    read = [place[name] for name in needs if name in place]
    if read != sorted(read):
        faults.append(f"{file} needs {needs}, which the course reads in another order")

    seen = [file]
    while following is not None and following not in place:
        if following in seen:
            return [*faults, f"Next leads from {file} to {following} again and again"]
        seen.append(following)
        following = next(iter(re.findall(r"[\w/]+\.py", headers[following]["Next"])), None)
    if following is None:
        if chapter[file] < max(chapter.get(name, 0) for name in place):
            faults.append(f"{file} does not lead back to the course")
    elif place[following] <= max(read, default=-1):
        faults.append(f"{file} leads back to {following}, and needs {needs}")
    return faults


def test_headers_and_the_roadmap_have_one_order():
    headers = {name_of(path): header(path) for path in MODULES + EXPERIMENTS + LABS}
    faults = order_faults(page("COURSE_ROADMAP.md"), headers)
    assert not faults, "\n".join(faults)


def test_faults_of_the_order_are_found():
    roadmap = """
| # | chapter | modules | seen |
| 0 | Begin | `a.py` `b.py` | this |
| 1 | End | `c.py` | that |

## 0 · Begin
**Read.** `a.py`, `b.py`, and `f` in `c.py`.

## 1 · End
**Read.** The second half of `a.py`; `c.py`.

"""
    def fields(chapter, needs, following):
        return {"Chapter": f"COURSE_ROADMAP.md, {chapter}", "Prerequisites": needs,
                "Next": following}

    headers = {"a.py": fields("0 (begin)", "nothing", "b.py"),
               "b.py": fields("0 (begin) and 1 (end)", "a.py", "c.py"),
               "c.py": fields("1 (end)", "a.py, b.py", "nothing"),
               "e/d.py": fields("0 (begin)", "a.py", "e/f.py"),
               "e/f.py": fields("0 (begin)", "e/d.py", "b.py"),
               "e/g.py": fields("1 (end)", "c.py", "nothing")}
    assert not order_faults(roadmap, headers)

    bad_headers = {
        "b.py needs ['c.py']": {"b.py": fields("0 (begin)", "c.py", "c.py")},
        "c.py needs ['b.py', 'a.py']": {"c.py": fields("1 (end)", "b.py, a.py", "nothing")},
        "a.py is followed by ['b.py']": {"a.py": fields("0 (begin)", "nothing", "c.py")},
        "c.py is followed by []": {"c.py": fields("1 (end)", "a.py", "a.py")},
        "c.py is read in chapter 1": {"c.py": fields("0 (begin)", "a.py", "nothing")},
        "chapter 1 is not called end, too": {"c.py": fields("1 (end, too)", "a.py", "nothing")},
        "chapter 7 is not called end": {"e/d.py": fields("7 (end)", "a.py", "e/f.py")},
        "names ['z.py']": {"b.py": fields("0 (begin)", "z.py", "c.py")},
        "g.py is in no Read list": {"g.py": fields("0 (begin)", "a.py", "b.py")},
        "e/d.py, of chapter 0, needs c.py": {"e/d.py": fields("0 (begin)", "c.py", "nothing")},
        "e/d.py leads back to a.py": {"e/d.py": fields("0 (begin)", "a.py", "a.py")},
        "e/f.py does not lead back": {"e/f.py": fields("0 (begin)", "e/d.py", "nothing")},
        "Next leads from e/d.py to e/d.py": {"e/f.py": fields("0 (begin)", "a.py", "e/d.py")},
    }
    for fault, changed in bad_headers.items():
        faults = order_faults(roadmap, headers | changed)
        assert any(fault in each for each in faults), f"{fault}: {faults}"

    for before, after, fault in (
            ("| `a.py` `b.py` |", "| `b.py` `a.py` |", "the table has ['b.py', 'a.py']"),
            ("half of `a.py`; `c.py`", "half of `a.py`; `c.py`, `b.py`", "b.py is in two"),
            ("`b.py`, and", "`b.py`, `z.py`, and", "the roadmap names z.py")):
        faults = order_faults(roadmap.replace(before, after), headers)
        assert any(fault in each for each in faults), f"{fault}: {faults}"


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
