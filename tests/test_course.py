"""The course's engine: stubs, checks, and messages to the learner."""

import ast
import builtins
import dataclasses
import io
import symtable
import sys

import pytest
import torch
from helpers import run_here

import attention
from course import exercise, mistakes
from course.engine import catalogue, checking, stubs
from course.engine.expect import Wrong, expect_close
from utils import UserError

ATTEND = """
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k){scale}
    seen = causal_mask(q.shape[1], q.shape[1])
    pattern = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", pattern, v)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder instead of the learner's."""
    monkeypatch.setattr(catalogue, "EXERCISES_FOLDER", tmp_path / "exercises")
    return tmp_path / "exercises"


def write_solution(path, chapter, name, body):
    """Replace one stub of the learner's file by a solution."""
    text = path.read_text(encoding="utf-8")
    left = f'    raise NotImplementedError("chapter {chapter}: {name}")\n'
    assert text.count(left) == 1
    path.write_text(text.replace(left, body), encoding="utf-8")


def verdict_on(folder, name, number=4):
    """The Verdict on one function of the learner's file."""
    chapter = catalogue.load_chapter(number)
    path = folder / f"chapter_{number:02}.py"
    module = checking.load_learner(path)
    found = catalogue.find_exercise(chapter, name)
    return checking.judge_learner(chapter, found, module, path)


# Cutting


def test_every_exercise_is_complete_and_its_library_function_exists():
    for number in catalogue.chapter_numbers():
        chapter = catalogue.load_chapter(number)
        names = [each.name for each in chapter.EXERCISES]
        assert len(set(names)) == len(names) >= 4, f"chapter {number}: {names}"
        for each in chapter.EXERCISES:
            place = f"chapter {number}, {each.name}"
            assert len(each.hints) == 3 and each.mistakes and len(each.checks) >= 2, place
            assert all(check.__doc__ for check in each.checks), f"{place}: a check has no docstring"
            named = [mistake.name for mistake in each.mistakes]
            assert len(set(named)) == len(named), f"{place}: two mistakes have one name"
            if each.source:
                checking.lookup(each.source)  # raises if it does not exist
            text, _ = stubs.find_function(catalogue.solution_name(chapter, each))
            for mistake in each.mistakes:
                assert mistake.apply(text) != text, f"{place}: {mistake.name} changes nothing"


def test_a_stub_has_the_signature_and_docstring_of_the_library_and_no_solution():
    chapter = catalogue.load_chapter(4)
    found = catalogue.find_exercise(chapter, "causal_mask")
    node = ast.parse(stubs.stub(chapter, found, "1 of 9")).body[0]
    library = stubs.find_function("attention.causal_mask")[1]
    assert ast.unparse(node.args) == ast.unparse(library.args)
    assert ast.get_docstring(node) == ast.get_docstring(library)
    assert [type(each) for each in node.body[1:]] == [ast.Raise]


def test_a_printed_solution_runs_in_the_learner_s_file():
    """It uses names of Python, of the file's imports and of its functions, and no others."""
    for number in catalogue.chapter_numbers():
        chapter = catalogue.load_chapter(number)
        imports = ast.parse("\n".join(chapter.IMPORTS)).body
        imported = {alias.asname or alias.name for line in imports for alias in line.names}
        known = imported | set(dir(builtins)) | {each.name for each in chapter.EXERCISES}
        for each in chapter.EXERCISES:
            text = stubs.solution_text(chapter, each)
            table = symtable.symtable(text, each.name, "exec").get_children()[0]
            unknown = global_names(table) - known
            assert not unknown, f"chapter {number}, {each.name}: {unknown} is not in the file"


def global_names(table):
    """The names that a function takes from its module, inside its inner functions too."""
    names = {name.get_name() for name in table.get_symbols() if name.is_global()}
    return names.union(*map(global_names, table.get_children()))


def test_nothing_that_a_learner_wrote_is_overwritten(folder, capsys):
    exercise.main(["start", "4"])
    path = folder / "chapter_04.py"
    own = path.read_text(encoding="utf-8").replace("def attend(", "def mine(") + "# my note\n"
    path.write_text(own, encoding="utf-8")
    exercise.main(["start", "4"])
    text = path.read_text(encoding="utf-8")
    assert text.startswith(own) and text.count("def attend(") == 1
    assert "attend added at its end" in capsys.readouterr().out
    exercise.main(["start", "4"])
    assert path.read_text(encoding="utf-8") == text


# Checking


def test_a_known_mistake_is_named_even_if_it_is_written_in_another_way(folder):
    exercise.main(["start", "4"])
    path = folder / "chapter_04.py"
    write_solution(path, 4, "causal_mask", "    return None\n")  # attend calls our solution
    write_solution(path, 4, "attend", ATTEND.format(scale=""))
    found = verdict_on(folder, "attend")
    assert found.mistake == "without the division by sqrt(d_head)"
    assert verdict_on(folder, "causal_mask").status == "wrong"
    assert verdict_on(folder, "write").status == "missing"


def test_a_textbook_solution_without_hooks_passes_until_the_key_mask(folder):
    exercise.main(["start", "4"])
    write_solution(folder / "chapter_04.py", 4, "attend", ATTEND.format(scale=" / q.shape[-1]**.5"))
    found = verdict_on(folder, "attend")
    assert len(found.held) == 5 and found.mistake == "when key_mask is not used"


def test_a_crash_shows_the_line_of_the_learner_and_its_shapes(folder):
    exercise.main(["start", "4"])
    path = folder / "chapter_04.py"
    write_solution(path, 4, "attend", "    scores = q @ k\n    return scores\n")
    message = verdict_on(folder, "attend").message
    number = path.read_text(encoding="utf-8").splitlines().index("    scores = q @ k") + 1
    assert f"line {number}, `scores = q @ k`" in message and "q is [2, 5, 2, 3]" in message


def test_after_a_check_the_library_has_its_own_functions_again():
    chapter = catalogue.load_chapter(4)
    before = attention.Attention.attend
    mask_before = attention.causal_mask
    for name in ("attend", "causal_mask"):
        found = catalogue.find_exercise(chapter, name)
        assert checking.judge(chapter, found, lambda *args, **kwargs: None).status == "wrong"
    assert attention.Attention.attend is before and attention.causal_mask is mask_before


def test_no_mistake_is_named_if_two_of_them_give_the_same_result():
    chapter = catalogue.load_chapter(4)
    found = catalogue.find_exercise(chapter, "ov_matrix")

    def transposed(W_V, W_O):
        return (W_V @ W_O).mT

    assert checking.judge(chapter, found, transposed).mistake == "when the matrix is transposed"
    another = dataclasses.replace(found.mistakes[0], name="in another way")
    both = dataclasses.replace(found, mistakes=(*found.mistakes, another))
    verdict = checking.judge(chapter, both, transposed)
    assert verdict.status == "wrong" and verdict.mistake == ""


def test_a_result_of_nan_alone_names_no_mistake():
    chapter = catalogue.load_chapter(6)
    found = catalogue.find_exercise(chapter, "orthogonalise")
    verdict = checking.judge(chapter, found, lambda matrix: matrix * torch.nan)
    assert "not finite" in verdict.message
    assert verdict.mistake == ""  # though undivided matrices become NaN in the rounds, too


def test_a_function_that_writes_into_its_argument_is_told_so(folder):
    exercise.main(["start", "5"])
    write_solution(folder / "chapter_05.py", 5, "block_forward",
                   "    x = self.ln1(resid)\n    resid += self.attn(x, x, x)\n"
                   "    return resid + self.mlp(self.ln2(resid))\n")
    message = verdict_on(folder, "block_forward", number=5).message
    assert message.startswith("block_forward wrote into its argument resid")


def test_what_torch_says_of_a_lost_graph_is_put_into_plain_words(folder):
    exercise.main(["start", "7"])
    write_solution(folder / "chapter_07.py", 7, "activation_gradient",
                   "    kept = []\n    def keep(tensor, hook):\n"
                   "        kept.append(tensor.clone())\n"
                   "    with model.hooks([(name, keep)]):\n        value = metric(model(tokens))\n"
                   "    return kept[0], torch.autograd.grad(value, kept[0])[0]\n")
    message = verdict_on(folder, "activation_gradient", number=7).message
    assert "is it a copy (clone, detach)" in message and "allow_unused" not in message


def test_copies_of_arguments_keep_gradients_and_shared_objects():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 3.0)
    model = torch.nn.Module()
    model.p = p
    (copied_model, listed), _ = checking.copied(((model, [p]), {}), {})
    p.data.zero_()
    p.grad.zero_()
    assert copied_model.p is listed[0] and listed[0].tolist() == [1, 1]
    assert listed[0].grad.tolist() == [3, 3]


def test_the_message_on_a_difference_has_its_place_and_both_numbers():
    with pytest.raises(Wrong, match=r"z at batch 1, pos 0 is 0\.5, and should be 0 \(1 of 4"):
        expect_close(torch.tensor([[0.0, 0], [0.5, 0]]), torch.zeros(2, 2), "z", "batch pos")


def test_a_file_that_does_not_load_is_refused_in_one_line(folder):
    exercise.main(["start", "4"])
    path = folder / "chapter_04.py"
    for text, named in (("def attend(:\n", "line 1"), ("x = 1\nx.y\n", "line 2: AttributeError")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=named):
            checking.load_learner(path)


# The program


def test_each_call_gives_the_next_hint_and_the_last_one_is_repeated(folder, capsys):
    for _ in range(4):
        exercise.main(["hint", "4", "write"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hint")]
    assert [line[:11] for line in printed] == ["hint 1 of 3", "hint 2 of 3", *["hint 3 of 3"] * 2]


def test_a_prediction_is_asked_for_once_and_then_compared(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("0.1 0.2\nnonsense\n3 2\n2 1\n"))
    exercise.main(["predict", "4"])
    assert "inside" not in capsys.readouterr().out
    exercise.main(["predict", "4"])
    said = capsys.readouterr().out
    assert "you: 0.1 to 0.2; it is 0.1587" in said and said.count(": inside") == 2
    assert exercise.count_inside() == (2, 3)


def test_the_message_on_an_unknown_chapter_or_function_lists_the_known_ones(folder):
    for words, named in ((["start", "99"], "choose from 0"), (["hint", "4", "x"], "causal_mask")):
        with pytest.raises(UserError, match=named):
            exercise.main(words)


def test_a_block_of_the_page_runs_by_its_number_in_any_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exercise.subprocess, "run", run_here)
    monkeypatch.chdir(tmp_path)
    exercise.main(["block", "4", "1"])
    assert "attending to all alike: 0.159" in capsys.readouterr().out
    for words, said in ((["block", "4", "3"], "2 blocks"), (["block", "99", "1"], "choose from 0")):
        with pytest.raises(UserError, match=said):
            exercise.main(words)


@pytest.mark.slow
def test_a_check_in_its_own_process_stops_at_the_first_mistake_and_at_an_endless_loop(
        folder, capsys, monkeypatch):
    exercise.main(["start", "4"])
    path = folder / "chapter_04.py"
    write_solution(path, 4, "attention_pattern", "    return q @ k.T\n")
    write_solution(path, 4, "write", "    while True:\n        pass\n")
    with pytest.raises(SystemExit):
        exercise.main(["check", "4"])
    printed = capsys.readouterr().out
    assert "attention_pattern: wrong" in printed and "write" not in printed
    monkeypatch.setattr(checking, "SECONDS", 2)
    with pytest.raises(SystemExit):
        exercise.main(["check", "4", "write"])
    assert "stopped after 2 s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_chapter_of_right_solutions_passes_and_is_counted(folder, capsys):
    exercise.main(["start", "4"])
    chapter = catalogue.load_chapter(4)
    imports = "import math\nimport torch\nfrom attention import causal_mask\n\n"
    solutions = [stubs.solution_text(chapter, each) for each in chapter.EXERCISES]
    (folder / "chapter_04.py").write_text(imports + "\n\n".join(solutions), encoding="utf-8")
    exercise.main(["check", "4"])  # exits with 0: raises nothing
    capsys.readouterr()
    exercise.main(["progress"])
    assert "10 of 10   120 of 120 minutes" in capsys.readouterr().out


@pytest.mark.slow
def test_every_mistake_is_caught_and_every_other_right_solution_passes(capsys):
    mistakes.main([])  # exits with 1 if one of them does not
    assert "in all" in capsys.readouterr().out
