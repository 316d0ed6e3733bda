"""The house rules, read from the source by `ast` alone: floors, budgets, headers, and the pages."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import corpus
import train
from config import ModelConfig
from model import GPT
from tokenizer import BPETokenizer

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [  # imports point to an earlier row, never up and never sideways
    "utils losses",
    "config metrics plotting activation_cache",
    "tokenizer corpus pretrained optim hooks",
    "data",
    "embeddings attention mlp",
    "transformer_block",
    "model",
    "residual_stream_analysis weight_circuits checkpoint",
    "rerun",
    "logit_lens patching attribution head_ablation probing",
    "circuits",
    "generate",
    "train",
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
PACKAGES = {"torch", "numpy", "requests", "matplotlib", "pytest"}
LONG_FUNCTIONS = {"train.fit": 60}
BY_POSITION = {"patching.activation_patch": 6, "patching.path_patch": 7}  # as people call them
PAGES = ["README.md", "COURSE_ROADMAP.md"]

MODULES = sorted(ROOT.glob("*.py"))
EXPERIMENTS = sorted(ROOT.glob("experiments/*.py"))
TESTS = sorted(ROOT.glob("tests/*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def each(paths):
    """A test for each file, called by its path below the root."""
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """The top names of all that a file imports, inside its functions too."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or ".").split(".")[0])
    return names


def functions(tree):
    """(function, whether it is a method) for every one, nested ones too."""
    methods = {item for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
               for item in node.body if isinstance(item, FUNCTION)}
    return [(node, node in methods) for node in ast.walk(tree) if isinstance(node, FUNCTION)]


def positional(function, is_method):
    """The names of the arguments that can be given by position, `self` or `cls` aside."""
    names = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    static = any(ast.unparse(mark) == "staticmethod" for mark in function.decorator_list)
    return names[1:] if is_method and not static else names


def length(node):
    return node.end_lineno - node.lineno + 1


# Floors


def test_every_module_has_a_floor():
    assert {path.stem for path in MODULES} <= set(FLOOR)


@each(MODULES)
def test_imports_point_down(path):
    up = {name for name in imports(path) & set(FLOOR) if FLOOR[name] >= FLOOR[path.stem]}
    assert not up


@each(MODULES)
def test_a_module_needs_only_the_floors_the_packages_and_python(path):
    assert imports(path) <= set(FLOOR) | PACKAGES - {"pytest"} | set(sys.stdlib_module_names)


@each(EXPERIMENTS + TESTS)
def test_experiments_and_tests_need_nothing_from_outside(path):
    own = {other.stem for other in EXPERIMENTS + TESTS} | {"experiments"}
    assert imports(path) <= set(FLOOR) | PACKAGES | own | set(sys.stdlib_module_names)


@each(MODULES + EXPERIMENTS + TESTS)
def test_imports_are_absolute_and_named(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} is relative"
            assert node.names[0].name != "*", f"line {node.lineno} imports everything"


@each(MODULES)
def test_importing_a_module_runs_nothing(path):
    quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.ClassDef, *FUNCTION)
    for node in parse(path).body[1:]:
        is_program = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert isinstance(node, quiet) or is_program, f"line {node.lineno}"


# Budgets


@each(MODULES + EXPERIMENTS)
def test_modules_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350
    for function, _ in functions(parse(path)):
        most = LONG_FUNCTIONS.get(f"{path.stem}.{function.name}", 40)
        assert length(function) <= most, f"{function.name} has {length(function)} lines"


@each(MODULES + EXPERIMENTS)
def test_functions_take_few_arguments_and_name_those_beyond_four(path):
    for function, is_method in functions(parse(path)):
        by_position = positional(function, is_method)
        most = BY_POSITION.get(f"{path.stem}.{function.name}", 4)
        assert len(by_position) <= most, f"{function.name}: more than {most} by position"
        assert len(by_position) + len(function.args.kwonlyargs) <= 8, f"{function.name}"


@each(MODULES + EXPERIMENTS + TESTS)
def test_lines_have_at_most_100_characters(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]


# What never stands in a file


@each(MODULES + EXPERIMENTS + TESTS)
def test_nothing_forbidden_is_written(path):
    unfinished = "TO" + "DO", "FIX" + "ME"
    assert not [word for word in unfinished if word in path.read_text(encoding="utf-8")]
    for node in ast.walk(parse(path)):
        line = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("exec", "eval"), f"{line}: runs a string"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{line}: bare except"
        if isinstance(node, (*FUNCTION, ast.Lambda)):
            defaults = [d for d in node.args.defaults + node.args.kw_defaults if d]
            mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
            for default in defaults:
                made = isinstance(default, ast.Call) and ast.unparse(default.func) in (
                    "list", "dict", "set")
                assert not isinstance(default, mutable) and not made, f"{line}: mutable default"


# Headers and docstrings


@each(MODULES)
def test_a_module_opens_with_its_chapter_its_neighbours_and_its_source(path):
    header = ast.get_docstring(parse(path))
    for line in (r"Chapter: COURSE_ROADMAP\.md, \d+", "Read before: .", "Source: ."):
        assert re.search(f"^{line}", header, re.MULTILINE), line


@each(MODULES)
def test_what_to_read_next_exists(path):
    reading = re.search(r"^Read before: .*", ast.get_docstring(parse(path)), re.MULTILINE)[0]
    for name in re.findall(r"[\w/]+\.\w+", reading):
        assert (ROOT / name).exists(), name


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


@each(MODULES)
def test_everything_public_has_a_docstring(path):
    assert not list(undocumented(parse(path).body))


# The pages


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def chapters():
    """{number: text} of the roadmap's chapters, headed `## 3 · The stream as a sum`."""
    pieces = re.split(r"^## (\d+) · ", page("COURSE_ROADMAP.md"), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@each(MODULES)
def test_a_module_and_its_chapter_name_each_other(path):
    number = re.search(r"^Chapter: COURSE_ROADMAP\.md, (\d+)", ast.get_docstring(parse(path)),
                       re.MULTILINE)[1]
    there = chapters()
    assert number in there, f"no chapter {number}"
    named = re.findall(r"\w+\.py\b", there[number])
    assert path.name in named, f"chapter {number} leaves it out"


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_only_files_that_exist(name):
    spans = re.findall(r"`([^`\n]+)`", page(name))
    named = {file for span in spans for file in re.findall(r"[\w/]+\.py\b", span)}
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page(name))
    assert not [file for file in sorted(named | set(links)) if not (ROOT / file).exists()]


def test_the_requirements_are_the_five_packages_pinned():
    lines = page("requirements.txt").split()
    assert {line.partition("==")[0] for line in lines} == PACKAGES
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in lines)


def readme_code(heading, n_blocks=1):
    """The first blocks of Python below a heading of the README, one after another."""
    section = re.split(rf"^#+ .*{heading}.*$", page("README.md"), flags=re.MULTILINE)[1]
    return "".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:n_blocks])


def output_of(code, folder):
    """What a program prints, run in a folder."""
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=100)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_readme_s_look_inside_runs_on_the_newest_run(tmp_path):
    text = tmp_path / "data" / "tiny_shakespeare.txt"
    text.parent.mkdir()
    text.write_text("".join(map(chr, range(32, 127))) + corpus.text(25_000), encoding="utf-8")
    train.main(["--data.path", str(text), "--logging.out_dir", str(tmp_path / "outputs"),
                "--train.max_steps", "2", "--train.batch_size", "2", "--train.device", "cpu",
                "--model.d_model", "24"])
    lines = output_of(readme_code("Look inside", n_blocks=2), tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"head {layer}.{head}" for layer in range(3) for head in range(4)]
    figures = ("heads.png", "attribution.png", "lens.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in figures)


def test_the_readme_s_gpt2_runs_on_a_folder_of_that_form(tmp_path):
    cfg = ModelConfig(n_layers=7, n_heads=1, d_model=8, n_ctx=64, d_vocab=256, tie_embeddings=True)
    GPT(cfg).save_pretrained(tmp_path)
    tokens = BPETokenizer().state_dict()["tokens"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    code = readme_code("GPT-2 itself")
    assert len(code.splitlines()) < 15 and code.count('"gpt2"') == 1
    assert output_of(code.replace('"gpt2"', repr(str(tmp_path))), tmp_path)
