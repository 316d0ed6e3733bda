"""Errors, choices, files, progress, devices and seeds."""

import errno
import io
import itertools
import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import refusal

import utils
from utils import (
    Progress,
    RankLost,
    UserError,
    atomic_write,
    check_choice,
    count_of,
    joined_ranks,
    list_names,
    mean_over_ranks,
    n_ranks,
    open_regular,
    pick_device,
    printable,
    rank,
    read_json,
    read_text,
    read_torch_file,
    run_program,
    seeded_generator,
    suggest_closest,
    write_json,
)

HOOKS = ["hook_embed", "blocks.0.attn.hook_pattern", "blocks.0.hook_resid_pre"]


def raiser(error):
    def main():
        raise error
    return main


def test_a_user_error_is_one_line_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        run_program(raiser(UserError("lr=-1 is not possible")))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.endswith(": error: lr=-1 is not possible\n") and err.count("\n") == 1


def test_a_real_bug_is_raised_unchanged():
    for bug in (ValueError("a bug"), RuntimeError("a bug"), OSError("a bug")):
        with pytest.raises(type(bug)) as caught:
            run_program(raiser(bug))
        assert caught.value is bug


def test_an_interrupted_program_exits_with_130_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        run_program(raiser(KeyboardInterrupt()))
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_program_that_ends_well_raises_nothing():
    called = []
    run_program(lambda: called.append(1))
    assert called == [1]


def test_text_that_the_terminal_cannot_show_is_replaced(monkeypatch):
    def program():
        print("Мороз ☃ é")
        sys.stdout.write("\ud800\n")  # half a surrogate pair, as in a strange file's name
        progress = Progress(2)
        progress.show(2, "☃")
        raise UserError("день")

    for encoding in ("ascii", "cp1252", "utf-8", "shift_jis"):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
                   for name in ("stdout", "stderr")}
        with monkeypatch.context() as patched:
            for name, stream in streams.items():
                patched.setattr(sys, name, stream)
            with pytest.raises(SystemExit):
                run_program(program)
        shown = {name: stream.detach().getvalue().decode(encoding)
                 for name, stream in streams.items() if not stream.flush()}
        assert shown["stdout"].endswith("?\n"), encoding
        assert ("☃" in shown["stdout"]) == (encoding == "utf-8"), encoding
        assert "error: " in shown["stderr"] and "2/2" in shown["stderr"], encoding


def test_a_program_runs_even_if_its_output_is_not_a_text_stream(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    run_program(lambda: print("é"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    run_program(lambda: print("é"))
    assert sys.stdout.getvalue() == "é\n"


def test_a_misspelt_name_finds_its_neighbour_in_full_or_by_its_last_part():
    for name in ("hook_patern", "blocks.0.attn.hook_patern", "attn.hook_patern",
                 "decoder.layers.11.self_attention.hook_patern"):
        suggested = suggest_closest(name, HOOKS)
        assert suggested.startswith("; the closest: blocks.0.attn.hook_pattern"), name

    # a last part that is right goes before a name that only looks alike
    assert suggest_closest("hook_z", ["hook_embed", "blocks.0.attn.hook_z"]).endswith(".hook_z")


def test_one_thing_is_singular_and_any_other_number_plural():
    assert [count_of(n, "layer") for n in (0, 1, 2, 1000)] == [
        "0 layers", "1 layer", "2 layers", "1,000 layers"]


def test_nothing_is_suggested_if_no_name_is_close():
    assert suggest_closest("zzzzzz", HOOKS) == "" == suggest_closest("hook_embed", [])


def test_a_choice_is_returned_and_another_value_is_refused_with_all_choices():
    assert check_choice("kind", "b", ("a", "b")) == "b"
    assert check_choice("kind", None, {"a": 1, None: 2}) is None
    for wrong in ("c", None, ["a"], 0):
        with pytest.raises(UserError) as error:
            check_choice("kind", wrong, ["a", "b"])
        assert f"kind={wrong!r} " in str(error.value) and "a, b" in str(error.value)


def test_an_atomic_write_creates_folders_and_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"a long first version", b"short"):
        with atomic_write(path) as file:
            file.write(content)
        assert path.read_bytes() == content


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as file:
            file.write(b"half of the n")
            raise error
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"], error


def test_a_full_disk_is_a_user_error_that_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    full = OSError(errno.ENOSPC, "No space left on device")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(UserError) as error:
            patched.setattr(utils.os, call, lambda *_: raiser(full)())
            with atomic_write(path) as file:
                file.write(b"new")
        assert str(path) in str(error.value) and full.strerror in str(error.value), call
        assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"], call


def test_a_place_that_cannot_be_written_is_a_user_error_with_its_path(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="file/below"):
        with atomic_write(tmp_path / "file" / "below" / "it") as file:
            file.write(b"")


def test_json_is_read_back_as_it_was_written(tmp_path):
    values = {"lr": 1e-3, "names": ["a", "é"], "none": None, "nested": {"yes": True}}
    write_json(tmp_path / "values.json", values)
    assert json.loads((tmp_path / "values.json").read_text(encoding="utf-8")) == values


def test_values_that_json_cannot_hold_leave_the_old_file(tmp_path):
    write_json(tmp_path / "values.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "values.json", {"new": torch.ones(1)})
    assert json.loads((tmp_path / "values.json").read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["values.json"]


def test_a_quotation_in_a_message_is_one_line_without_control_characters():
    nasty = "a\nb\x1b[31m\r\x00\u202e\ud800é" + "z" * 10**6
    for text in (str(UserError(nasty)), printable(nasty)):
        assert text.isprintable() and "\n" not in text and len(text) <= utils.MESSAGE_LENGTH
        text.encode()
    assert printable("aé b") == "aé b" and printable("a\n") == "a\\n"
    assert len(printable("é" * 200)) == 100 == len(printable("\x00" * 200))
    assert list_names(map(str, range(3))) == "0, 1, 2"
    assert list_names(map(str, range(9)), 2) == "0, 1 and 7 more"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_anything_but_a_regular_file_is_refused_at_once_by_every_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    readers = (open_regular, read_json, read_text,
               lambda path: read_torch_file(path, "a lens", "fit one"))
    for name in ("/dev/zero", "/dev/tty0", tmp_path / "pipe", tmp_path, tmp_path / "loop",
                 tmp_path / "none", "a\0b"):
        for read in readers:
            message = refusal(partial(read, name), name)
            assert message.startswith("cannot read") and "\n" not in message, f"{name}: {message}"


def test_a_json_file_of_a_terabyte_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(10**12)
    assert "1,000,000,000,000 bytes" in refusal(lambda: read_json(tmp_path / "x.json"))


def test_a_byte_order_mark_before_json_is_skipped(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


# Progress


def progress_output(monkeypatch, on_terminal, seconds_a_step, total=1000, steps=range(1, 101)):
    """The text that a Progress writes to stderr while a fake clock ticks between the steps."""
    clock = SimpleNamespace(now=0.0)
    stderr = io.StringIO()
    stderr.isatty = lambda: on_terminal
    monkeypatch.setattr(utils.sys, "stderr", stderr)
    monkeypatch.setattr(utils, "time", SimpleNamespace(monotonic=lambda: clock.now))
    progress = Progress(total, " steps")
    for step in steps:
        clock.now += seconds_a_step
        progress.show(step, "wide " * (100 // step))
    progress.close()
    return stderr.getvalue()


def test_in_a_log_progress_is_a_whole_line_every_ten_seconds(monkeypatch):
    written = progress_output(monkeypatch, on_terminal=False, seconds_a_step=0.5)  # 50 seconds
    assert "\r" not in written and written.endswith("\n")
    assert [line.split("/")[0] for line in written.splitlines()] == ["20", "40", "60", "80", "100"]


def test_on_a_terminal_progress_is_one_line_that_overwrites_the_last_one(monkeypatch):
    written = progress_output(monkeypatch, on_terminal=True, seconds_a_step=0.5)
    assert written.count("\n") == 1 and written.endswith("\n")
    lines = written.rstrip("\n").split("\r")[1:]
    assert len(lines) == 100
    for before, after in itertools.pairwise(lines):
        assert len(after) >= len(before.rstrip())


def test_a_terminal_is_rewritten_ten_times_a_second_at_most(monkeypatch):
    written = progress_output(monkeypatch, on_terminal=True, seconds_a_step=0.01)  # one second
    assert 8 <= written.count("\r") <= 10


def test_progress_shows_the_time_left_at_this_pace(monkeypatch):
    written = progress_output(monkeypatch, False, seconds_a_step=20, total=10, steps=[1, 2, 4])
    left = [line.split()[-3] for line in written.splitlines()]
    assert left == ["180", "160", "90"]  # 20 s a step, then 60 s for 4 of them


def test_the_last_step_is_always_shown(monkeypatch):
    written = progress_output(monkeypatch, False, seconds_a_step=0, total=100)
    assert written.count("\n") == 1 and written.startswith("100/100 steps")


def test_work_done_before_does_not_count_for_the_pace(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(utils, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(utils.sys, "stderr", io.StringIO())
    progress = Progress(100, done=90)
    clock.now = 50.0
    progress.show(95)
    assert "50 s left" in utils.sys.stderr.getvalue()  # 10 s a step, 5 steps left


def test_the_cpu_is_always_there_and_auto_takes_a_device_that_works():
    assert pick_device("cpu") == torch.device("cpu")
    assert torch.ones(2, device=pick_device("auto")).sum().item() == 2


def test_a_device_that_is_not_there_is_a_user_error_with_the_choices():
    for name in ("gpu", "cuda:99", "cuda:x", "cuda:-1", "cpu:x", "cpu:", "", "0"):
        with pytest.raises(UserError, match=f"device={name} .*choose auto, .*cpu"):
            pick_device(name)


def test_auto_prefers_cuda_to_mps_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda" and pick_device("cuda:1").index == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto").type == "mps"


def test_the_same_seed_draws_the_same_numbers_and_leaves_the_global_ones_alone():
    state = torch.random.get_rng_state()
    first, again, other = (torch.rand(9, generator=seeded_generator(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# Ranks (that several processes work is shown in test_train.py)


def test_a_single_process_is_rank_0_of_1(capsys):
    assert (rank(), n_ranks(), mean_over_ranks(2.5)) == (0, 1, 2.5)
    with joined_ranks("cpu") as device:
        assert device == torch.device("cpu") and n_ranks() == 1
        print("heard")
    assert capsys.readouterr().out == "heard\n"


def test_an_error_in_a_single_process_is_raised_unchanged():
    with pytest.raises(RuntimeError, match="a bug in gloo/"), joined_ranks("cpu"):
        raise RuntimeError("a bug in gloo/")


def test_each_process_that_torchrun_started_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").index is None
    for number in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", number)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="device=cuda:2 "):
        pick_device("auto")


def test_a_device_that_cannot_be_shared_is_not_chosen_for_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match=r"device=mps .*choose auto, cpu$"):
        pick_device("mps")


def test_the_first_rank_alone_shows_progress(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert progress_output(monkeypatch, False, seconds_a_step=20) == ""


def test_other_ranks_wait_for_the_message_of_the_first_unless_a_rank_is_lost(monkeypatch, capsys):
    for number, kind, pauses in (("0", UserError, 0), ("1", UserError, 1), ("1", RankLost, 0)):
        slept = []
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as end:
            patched.setenv("RANK", number)
            patched.setattr(utils.time, "sleep", slept.append)
            run_program(raiser(kind("x=1")))
        assert end.value.code == 2
        assert len(slept) == pauses, f"rank {number} waits {len(slept)} times on a {kind.__name__}"
        assert capsys.readouterr().err.count("error: x=1") == 1
