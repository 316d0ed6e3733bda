"""Check the learner's functions, one at a time, and name the mistake in a wrong one.

    1. The learner's file is loaded, and its other exercises are replaced by our solutions. So one
       wrong function does not make the others fail.
    2. The function replaces the library's, wrapped so that its calls are recorded.
    3. The checks run one after another, up to the first that fails.
    4. The results of the calls in that check are compared with those of known mistakes for the same
       arguments. If one mistake gives the same results, it is named.

`check_in_process` does this in a separate process, which is stopped after SECONDS for a function.
"""

import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import multiprocessing
import re
import sys
import traceback
from dataclasses import dataclass

import torch

from course.engine.catalogue import (
    ROOT,
    find_exercise,
    learner_file,
    load_chapter,
    solution_name,
)
from course.engine.expect import Wrong, describe
from course.engine.stubs import function_from, solution_text, split_name
from utils import UserError

SECONDS = 15  # the most that the checks of one function may take
SECONDS_TO_BEGIN = 60  # the most until the process has loaded the library
MOST_CALLS = 50  # the most calls that are recorded
REMEDIES = {  # what torch says, and what that means here
    "Boolean value of Tensor with more than one value is ambiguous":
        "`if`, `or` and `==` can't decide about a whole tensor; did you mean `is None`?",
    "appears to not have been used in the graph":
        "the value was not computed from this tensor; is it a copy (clone, detach) of the one with "
        "which the model went on?",
    "does not require grad":
        "no graph leads to this tensor; was it detached, or made under no_grad?",
}


@dataclass
class Verdict:
    """The result of checking a function.

    status: "right", "wrong" or "missing" (not written yet). held: the statements that held; failed:
    the one that did not. message: what is wrong, in a sentence. mistake: the known mistake that
    gives the same results, or "".
    """

    status: str
    message: str = ""
    held: tuple = ()
    failed: str = ""
    mistake: str = ""


@dataclass
class Call:
    """One call of the learner's function: its arguments before, its result and arguments after."""

    before: tuple  # (args, kwargs)
    after: tuple | None = None  # (result, args, kwargs)


# Our solutions


def lookup(dotted):
    """The object with a dotted name: (owner, name, value), with value as in the class's body."""
    module, way = split_name(dotted)
    owner = importlib.import_module(module)
    for name in way[:-1]:
        owner = getattr(owner, name)
    return owner, way[-1], vars(owner)[way[-1]]


def our_solution(chapter, exercise):
    """Our solution of an exercise, a function."""
    value = lookup(solution_name(chapter, exercise))[2]
    return getattr(value, "__func__", value)


def variant(chapter, exercise, text):
    """The function that a changed text of our solution defines, in the solution's own module."""
    module = importlib.import_module(split_name(solution_name(chapter, exercise))[0])
    return function_from(text, exercise.name, vars(module))


@contextlib.contextmanager
def in_place(exercise, function):
    """A context in which a function replaces the library's in every module that has it."""
    if exercise.source is None:
        yield
        return
    owner, name, original = lookup(exercise.source)
    owners = [owner]
    if not isinstance(owner, type):
        owners = [module for module in list(sys.modules.values())
                  if str(ROOT) in str(getattr(module, "__file__", None))
                  and vars(module).get(name) is original]
    for each in owners:
        setattr(each, name, staticmethod(function) if isinstance(original, staticmethod)
                else function)
    try:
        yield
    finally:
        for each in owners:
            setattr(each, name, original)


# Calls, and known mistakes


def copied(value, memo):
    """A copy of an argument, gradients included, that no later change can reach.

    memo: {id: copy}, as in copy.deepcopy. So an object that occurs twice (in a model and in its
    optimiser) is one object in the copy, too.
    """
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, torch.Tensor):
        copy_ = value.detach().clone()
        if value.is_leaf:
            copy_.requires_grad_(value.requires_grad)
            if value.grad is not None:
                copy_.grad = value.grad.detach().clone()
        if isinstance(value, torch.nn.Parameter):
            copy_.__class__ = torch.nn.Parameter
    elif isinstance(value, torch.Generator):
        copy_ = value.clone_state()
    elif type(value) in (list, tuple):
        copy_ = type(value)(copied(each, memo) for each in value)
    elif type(value) is dict:
        copy_ = {key: copied(each, memo) for key, each in value.items()}
    elif isinstance(value, torch.nn.Module):
        for p in value.parameters():
            copied(p, memo)
        copy_ = copy.deepcopy(value, memo)
    elif hasattr(value, "__dict__") and not callable(value):
        copy_ = copy.copy(value)
        vars(copy_).update({name: copied(each, memo) for name, each in vars(value).items()})
    else:
        copy_ = copy.deepcopy(value, memo)
    memo[id(value)] = copy_

    return copy_


def recording(function, calls):
    """The function, wrapped so that each call is appended to the list `calls`, as a Call."""

    @functools.wraps(function)
    def recorded(*args, **kwargs):
        if len(calls) >= MOST_CALLS:
            return function(*args, **kwargs)
        try:
            call = Call(copied((args, kwargs), {}))
        except (RuntimeError, TypeError):  # arguments that can't be copied can't be compared
            return function(*args, **kwargs)
        calls.append(call)
        result = function(*args, **kwargs)
        with contextlib.suppress(RuntimeError, TypeError):
            call.after = copied((result, args, kwargs), {})
        return result

    return recorded


def alike(one, other):
    """Whether two values are the same, except for rounding."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape:
            return False
        grads = (one.grad, other.grad) if one.is_leaf and other.is_leaf else (None, None)
        return (torch.allclose(one.detach().double(), other.detach().double(), rtol=1e-4,
                               atol=1e-6, equal_nan=True) and alike(*grads))
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, torch.nn.Module) and type(one) is type(other):
        return alike(one.state_dict(), other.state_dict())
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return alike(torch.tensor(float(one)), torch.tensor(float(other)))
    if isinstance(one, torch.Generator) and isinstance(other, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    if hasattr(one, "__dict__") and type(one) is type(other) and not callable(one):
        return alike(vars(one), vars(other))

    return type(one) is type(other) and (one is other or one == other
                                         or not hasattr(one, "__eq__"))


def replayed(function, call):
    """(result, args, kwargs) of another function for the arguments of a call; None if it raises."""
    args, kwargs = copied(call.before, {})
    try:
        result = function(*args, **kwargs)
    except Exception:
        return None
    return result, args, kwargs


def gives_the_same(function, call):
    """Whether another function gives what this call gave, in its result and in its arguments."""
    outcome = replayed(function, call)
    return outcome is not None and alike(outcome, call.after)


def matching(chapter, exercise, mistakes, calls):
    """The mistakes that give the same results as these calls; none if our solution gives them,
    too, or if no call has a result."""
    calls = [call for call in calls if call.after is not None]
    ours = our_solution(chapter, exercise)
    if all(gives_the_same(ours, call) for call in calls):
        return []
    variants = [variant(chapter, exercise, mistake.apply(solution_text(chapter, exercise)))
                for mistake in mistakes]
    return [mistake for mistake, function in zip(mistakes, variants, strict=True)
            if all(gives_the_same(function, call) for call in calls)]


def name_mistake(chapter, exercise, function, calls):
    """The name of the known mistake that gives the same results as the function, or "".

    calls: those of the check that failed. A mistake that gives the same results in all checks is
    named. If there is none (the function may have two mistakes), a mistake that gives the same in
    this check is named, unless it is only a few numbers, which can agree by chance.
    """
    found = matching(chapter, exercise, exercise.mistakes, calls)
    if not found:
        return ""
    all_calls = []
    recorded = recording(function, all_calls)
    with in_place(exercise, recorded):
        for check in exercise.checks:
            torch.manual_seed(0)
            with contextlib.suppress(Exception, SystemExit):
                check(recorded)

    if not any(count_numbers(call.after[0]) for call in all_calls if call.after):
        return ""  # nothing but NaN, as many mistakes give
    everywhere = matching(chapter, exercise, found, all_calls)
    if not everywhere and sum(count_numbers(call.after[0]) for call in calls if call.after) >= 4:
        everywhere = found
    return everywhere[0].name if len(everywhere) == 1 else ""


def count_numbers(value):
    """The number of different finite numbers or words in a result."""
    if isinstance(value, torch.Tensor):
        return len(value.detach()[value.isfinite()].unique())
    if isinstance(value, (list, tuple)):
        return sum(map(count_numbers, value))
    return 1


# One function


def judge(chapter, exercise, function, path=None, tell=lambda verdict: None):
    """The Verdict on a function.

    path: the learner's file, whose lines messages quote. tell: called with a Verdict that is wrong,
    before its mistake is looked for. The search runs the other checks, and the function may never
    return from them.
    """
    calls = []
    held = []
    recorded = recording(function, calls)
    with in_place(exercise, recorded):
        for check in exercise.checks:
            calls.clear()
            torch.manual_seed(0)
            message = ""
            try:
                with torch.enable_grad():
                    check(recorded)
            except NotImplementedError as error:
                if str(error).startswith("chapter "):
                    return Verdict("missing")
                message = explain_error(error, exercise, path, calls)
            except Wrong as wrong:
                message = str(wrong)
            except (Exception, SystemExit) as error:
                message = explain_error(error, exercise, path, calls)
            if message:
                message = (explain_result(chapter, exercise, calls)
                           or explain_argument(chapter, exercise, calls) or message)
                break
            held.append(statement(check))
        else:
            return Verdict("right", held=tuple(held))

    verdict = Verdict("wrong", message, tuple(held), statement(check))
    tell(verdict)
    verdict.mistake = name_mistake(chapter, exercise, function, calls)
    return verdict


def explain_result(chapter, exercise, calls):
    """A sentence if the last result is of another kind than that of our solution, or ""."""
    if not calls or calls[-1].after is None:
        return ""
    got = calls[-1].after[0]
    ours = replayed(our_solution(chapter, exercise), calls[-1])
    if ours is None or kind_of(got) == kind_of(ours[0]):
        return ""
    wanted = {"number": "a number", type(None): "None"}.get(kind_of(ours[0]), describe(ours[0]))
    return f"{exercise.name} returned {describe(got)}, and should return {wanted}"


def explain_argument(chapter, exercise, calls):
    """A sentence if the last call wrote into a tensor that our solution leaves alone, or ""."""
    if not calls or calls[-1].after is None:
        return ""
    ours = replayed(our_solution(chapter, exercise), calls[-1])
    names = inspect.signature(our_solution(chapter, exercise)).parameters
    for name, before, theirs, kept in zip(names, calls[-1].before[0], calls[-1].after[1],
                                          ours[1] if ours else (), strict=False):
        if isinstance(before, torch.Tensor) and alike(before, kept) and not alike(before, theirs):
            return (f"{exercise.name} wrote into its argument {name}, which must stay as it was: "
                    "is there a += on it, or another change in place? Make a new tensor")
    return ""


def kind_of(value):
    """The kind of a result; a tensor of one number counts as a number, a tuple as a list."""
    if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.ndim == 0):
        return "number"
    for kind in (torch.Tensor, (list, tuple), dict):
        if isinstance(value, kind):
            return kind
    return type(value)


def statement(check):
    """The statement that must hold for a check to pass: its docstring, in one line."""
    return " ".join((check.__doc__ or check.__name__).split())


def explain_error(error, exercise, path, calls):
    """An error as a sentence: the learner's line, the exception, and the shapes in that line."""
    said = str(error).strip().splitlines()[0] if str(error) else ""
    for torch_says, remedy in REMEDIES.items():
        said = remedy if torch_says in said else said
    raised = f"{type(error).__name__}: {said}"
    frames = [frame for frame in traceback.walk_tb(error.__traceback__)
              if path is not None and frame[0].f_code.co_filename == str(path)]
    if frames:
        frame, number = frames[-1]
        line = path.read_text(encoding="utf-8").splitlines()[number - 1].strip()
        shapes = [f"{name} is {list(value.shape)}" for name, value in frame.f_locals.items()
                  if isinstance(value, torch.Tensor) and re.search(rf"\b{name}\b", line)]
        there = f" ({', '.join(shapes)})" if shapes else ""
        return f"line {number}, `{line}`, raised {raised}{there}"
    if calls and calls[-1].after is not None:
        return f"{exercise.name} returned {describe(calls[-1].after[0])}, and with that {raised}"
    return f"{exercise.name} raised {raised}"


# The learner's file, in a process of its own


def load_learner(path):
    """The module of the learner's file. Raises UserError if it can't be loaded."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path.name}, line {error.lineno}: {error.msg}: "
                        f"`{(error.text or '').strip()}`; correct it first") from None
    except (Exception, SystemExit) as error:
        lines = [number for frame, number in traceback.walk_tb(error.__traceback__)
                 if frame.f_code.co_filename == str(path)]
        raise UserError(f"{path.name}, line {lines[-1] if lines else '?'}: {type(error).__name__}: "
                        f"{error}; the file must load before a function is checked") from None
    return module


def judge_learner(chapter, exercise, module, path, tell=lambda verdict: None):
    """The Verdict on one function of the learner's module; the others are our solutions meanwhile.

    tell: as in `judge`.
    """
    function = getattr(module, exercise.name, None)
    if function is None:
        return Verdict("missing")
    others = {each.name: getattr(module, each.name) for each in chapter.EXERCISES
              if each is not exercise and hasattr(module, each.name)}
    for each in chapter.EXERCISES:
        if each is not exercise:
            setattr(module, each.name, our_solution(chapter, each))
    try:
        return judge(chapter, exercise, function, path, tell)
    finally:
        vars(module).update(others)


def work(connection, number, path, names):
    """The work of the process: sends a Verdict on each function, or the message of a UserError.

    A Verdict that is wrong is sent twice, first without its mistake (see `tell` in `judge`).
    """
    torch.set_num_threads(1)
    chapter = load_chapter(number)
    connection.send("ready")
    try:
        module = load_learner(path)
    except UserError as error:
        connection.send(str(error))
        return
    for name in names:
        exercise = find_exercise(chapter, name)
        connection.send(judge_learner(chapter, exercise, module, path, connection.send))


def receive_verdict(connection, name):
    """The Verdict on a function that the process sends, or one that says how the process ended."""
    try:
        if not connection.poll(SECONDS):
            return Verdict("wrong", f"{name} was stopped after {SECONDS} s: is there a loop that "
                           "never ends?")
        answer = connection.recv()
    except EOFError:
        return Verdict("wrong", f"{name} ended Python itself: does it run out of memory?")
    if isinstance(answer, str):
        raise UserError(answer)
    if answer.status != "wrong":
        return answer

    try:
        return connection.recv() if connection.poll(SECONDS) else answer
    except EOFError:
        return answer


def check_in_process(number, names):
    """Yields (name, Verdict) of the learner's functions, in order, checked in another process.

    A function that does not return is stopped. The caller must stop after a wrong function. Raises
    UserError if the learner's file does not exist or can't be loaded.
    """
    path = learner_file(number)
    if not path.exists():
        raise UserError(f"{path.parent.name}/{path.name} does not exist; begin with: make exercise "
                        f"CHAPTER={number}")
    with own_process(work, number, path, names) as connection:
        for name in names:
            yield name, receive_verdict(connection, name)


@contextlib.contextmanager
def own_process(target, *args):
    """The connection to a process that runs target(connection, *args); it is ended on the way out.

    target sends "ready" first. Raises UserError where that does not come in time.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS_TO_BEGIN):
            raise UserError(f"the library did not load in {SECONDS_TO_BEGIN} s; try again")
        ours.recv()
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()
