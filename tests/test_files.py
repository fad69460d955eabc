"""Files and folders are complete or missing after a kill at any step, with and without an exchange system call."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from revmux.utils import files
from revmux.utils.files import atomic_file, atomic_folder, recover_folder, remove_folder, write_durably, write_json

KILLED_AT_EACH_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from revmux.utils import files

parent, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
whole = [{"weights": "old", "config": "old"}, {"weights": "new", "config": "new"}]


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else None


def replace_and_be_killed(folder, step):
    # The process kills itself before its step-th system call.
    left = step

    def counted(call):
        def wrapped(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)
        return wrapped

    for name in ("rename", "replace", "fsync", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    files._exchange = counted(files._exchange if exchange else lambda one, other: False)
    with files.atomic_folder(folder) as temporary:
        for name, text in whole[1].items():
            (temporary / name).write_text(text)
    os._exit(0)


for step in range(1, 1000):
    folder = parent / f"step-{step}" / "adapter"
    folder.mkdir(parents=True)
    for name, text in whole[0].items():
        (folder / name).write_text(text)
    child = os.fork()
    if child == 0:
        replace_and_be_killed(folder, step)
    _, status = os.waitpid(child, 0)
    if exchange:
        assert content(folder) in whole, f"step {step}: {content(folder)}"
    files.recover_folder(folder)
    assert content(folder) in whole, f"step {step}: {content(folder)}"
    with files.atomic_folder(folder) as temporary:
        (temporary / "weights").write_text("newest")
    assert content(folder) == {"weights": "newest"}
    assert not [path for path in folder.parent.iterdir() if ".old-" in path.name]
    if os.waitstatus_to_exitcode(status) == 0:
        print(step)
        break
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
"""


def text(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def write(folder: Path, **content: str) -> None:
    with atomic_folder(folder) as temporary:
        for name, value in content.items():
            (temporary / name).write_text(value)


@pytest.fixture(params=["exchange", "fallback"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "fallback":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


def can_exchange(folder: Path) -> bool:
    (folder / "one").mkdir()
    (folder / "other").mkdir()
    return files._exchange(folder / "one", folder / "other")


@pytest.mark.parametrize("way", ["exchange", "fallback"])
def test_a_folder_survives_a_kill_at_every_step_of_its_replacement(way: str, tmp_path: Path) -> None:
    if way == "exchange" and not can_exchange(tmp_path):
        pytest.skip("this file system cannot exchange folders")
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_STEP, str(tmp_path), way], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 6, "each rename and each sync is a step"


@pytest.mark.usefixtures("_either_way")
def test_a_folder_is_replaced_completely_and_no_temporary_files_remain(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adapter"
    write(folder, weights="old", other="old")
    write(folder, weights="new")
    assert text(folder) == {"weights": "new"}
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.usefixtures("_either_way")
def test_a_folder_is_unchanged_when_its_writer_fails(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write(folder, weights="old")
    with pytest.raises(UnicodeEncodeError):
        write(folder, weights="new", broken="\udc80")
    assert text(folder) == {"weights": "old"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("_either_way")
def test_a_link_to_a_folder_still_points_to_the_replaced_folder(tmp_path: Path) -> None:
    folder, link = tmp_path / "adapter", tmp_path / "latest"
    write(folder, weights="old")
    link.symlink_to(folder)
    write(link, weights="new")
    assert link.is_symlink()
    assert text(folder) == {"weights": "new"}


@pytest.mark.usefixtures("_either_way")
def test_a_folder_that_another_process_replaces_at_the_same_time_is_replaced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "adapter", os.rename
    write(folder, weights="old")

    def be_overtaken(source: Path, target: Path) -> None:
        rename(source, target)
        if ".old-" in str(target):  # the other process puts its own folder there first
            monkeypatch.setattr(os, "rename", rename)
            write(folder, weights="the other's")

    monkeypatch.setattr(os, "rename", be_overtaken)
    write(folder, weights="mine")
    assert text(folder) == {"weights": "mine"}
    assert list(tmp_path.iterdir()) == [folder]


def test_an_opener_that_recovers_a_folder_during_a_replacement_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "adapter", os.rename
    write(folder, weights="old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def recover_at_once(source: Path, target: Path) -> None:
        rename(source, target)
        if ".old-" in str(target):
            monkeypatch.setattr(os, "rename", rename)
            recover_folder(folder)
            assert text(folder) == {"weights": "old"}

    monkeypatch.setattr(os, "rename", recover_at_once)
    write(folder, weights="new")
    assert text(folder) == {"weights": "new"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_replacement_that_fails_after_the_old_folder_was_moved_moves_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "adapter", os.rename
    write(folder, weights="old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def refuse(source: Path, target: Path) -> None:
        if str(source).endswith(files.TEMPORARY) and not folder.exists():
            raise OSError(errno.EIO, "the disk fails")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="the disk fails"):
        write(folder, weights="new")
    assert text(folder) == {"weights": "old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_was_never_moved_aside_is_not_recovered(tmp_path: Path) -> None:
    recover_folder(tmp_path / "missing" / "adapter")
    recover_folder(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Record syncs and renames in order."""
    found: list[tuple[str, str]] = []

    def noted(name: str, call: Callable[..., Any], which: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            found.append((name, which(*args)))
            return call(*args)

        return wrapped

    monkeypatch.setattr(os, "fsync", noted("flush", os.fsync, lambda number: os.readlink(f"/proc/self/fd/{number}")))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noted("rename", getattr(os, name), lambda source, target: str(target)))
    monkeypatch.setattr(files, "_exchange", noted("rename", files._exchange, lambda one, other: str(other)))
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to find the names of open files")
def test_data_is_synced_before_the_rename_and_the_rename_before_the_call_returns(
    tmp_path: Path, steps: list[tuple[str, str]]
) -> None:
    folder = tmp_path / "adapter"
    for _ in range(2):
        steps.clear()
        with atomic_folder(folder) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "weights").write_text("weights")
            (temporary / "config").write_text("config")
        renames = [index for index, step in enumerate(steps) if step == ("rename", str(folder))]
        flushed = {path for step, path in steps[: renames[0]] if step == "flush"}
        written = (temporary, temporary / "config", temporary / "inner", temporary / "inner" / "weights")
        assert flushed == set(map(str, written))
        assert ("flush", str(tmp_path)) in steps[renames[-1] :]

    steps.clear()
    write_durably(tmp_path / "file", b"content")
    (temporary_file,) = [path for step, path in steps[:1] if step == "flush"]
    assert Path(temporary_file).parent == tmp_path
    assert steps[1:] == [("rename", str(tmp_path / "file")), ("flush", str(tmp_path))]


def fail_half_way(path: Path) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text("ne")
        raise ZeroDivisionError


def test_a_file_is_unchanged_when_its_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plot.png"
    write_durably(path, "old")
    with pytest.raises(ZeroDivisionError):
        fail_half_way(path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_json_is_indented_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "one.json", {"a": 1, "b": "ä"})
    assert (tmp_path / "one.json").read_text(encoding="utf-8") == '{\n  "a": 1,\n  "b": "ä"\n}\n'


def test_a_killed_removal_leaves_no_partial_folder_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    write(folder, checkpoint="weights")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the process ends before the files are removed
        remove_folder(folder)
    assert not folder.exists()
    write(folder, checkpoint="weights")
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []
    remove_folder(folder)
