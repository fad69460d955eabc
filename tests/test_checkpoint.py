"""Checkpoints: they are restored as saved, damage is detected, and a full disk does not affect existing ones."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from revmux import UserError
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import CheckpointConfig
from revmux.training.distributed import fail_together, from_first, rank_and_world

pytestmark = pytest.mark.numeric


def save(folder: CheckpointFolder, step: int, best_epoch: int = 0) -> None:
    folder.save(step, {"step": step, "weights": torch.arange(step)}, {"w": torch.tensor(best_epoch)}, best_epoch)


def names(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Write two checkpoints, of steps 20 and 30, which share their best weights."""
    path = tmp_path / "run"
    folder = CheckpointFolder(path)
    for step in (10, 20, 30):
        save(folder, step, best_epoch=1)
    return path


def test_the_last_checkpoints_and_their_best_weights_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.load() is None
    for step, best in ((1, 0), (2, 0), (3, 1), (4, 1), (5, 1)):
        save(folder, step, best)
    assert names(tmp_path) == {
        "step-00000004.pt",
        "step-00000004.json",
        "step-00000005.pt",
        "step-00000005.json",
        "best-00000001.pt",
    }
    found = CheckpointFolder(tmp_path).load()
    assert found is not None
    assert (found.step, found.state["weights"].tolist(), found.best["w"].item()) == (5, [0, 1, 2, 3, 4], 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, halve, Path.unlink], ids=["flipped", "halved", "missing"])
@pytest.mark.parametrize("suffix", ["pt", "json"])
def test_the_previous_checkpoint_is_loaded_if_the_newest_is_damaged(
    damage: Callable[[Path], None], suffix: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(saved / f"step-00000030.{suffix}")
    folder = CheckpointFolder(saved)
    with caplog.at_level(logging.WARNING):
        found = folder.load()
    assert found is not None
    assert found.step == 20
    if not (damage is Path.unlink and suffix == "json"):  # in that case the checkpoint was never finished
        assert "the checkpoint of step 30" in caplog.text
        assert "is damaged" in caplog.text
    save(folder, 25, best_epoch=1)
    assert {name for name in names(saved) if name.endswith("json")} == {"step-00000020.json", "step-00000025.json"}
    latest = CheckpointFolder(saved).load()
    assert latest is not None
    assert latest.step == 25


@pytest.mark.parametrize("damage", [halve, Path.unlink], ids=["halved", "missing"])
@pytest.mark.parametrize("name", ["step-00000020.pt", "step-00000020.json"])
def test_damaged_checkpoints_do_not_evict_good_ones(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    folder = CheckpointFolder(path, keep=2)
    save(folder, 10, best_epoch=1)
    save(folder, 20, best_epoch=2)
    damage(path / name)
    save(folder, 30, best_epoch=2)
    flip(path / "step-00000030.pt")
    found = CheckpointFolder(path).load()
    assert found is not None
    assert (found.step, found.best["w"].item()) == (10, 1)
    for step in (40, 50):
        save(folder, step, best_epoch=3)
    assert names(path) == {f"step-000000{step}.{suffix}" for step in (40, 50) for suffix in ("pt", "json")} | {
        "best-00000003.pt"
    }


@pytest.mark.parametrize("damage", [halve, Path.unlink], ids=["halved", "missing"])
def test_lost_best_weights_are_written_again(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Later checkpoints share the file; without it none of them could be read."""
    folder = CheckpointFolder(tmp_path)
    save(folder, 10, best_epoch=1)
    damage(tmp_path / "best-00000001.pt")
    save(folder, 20, best_epoch=1)
    found = CheckpointFolder(tmp_path).load()
    assert found is not None
    assert (found.step, found.best["w"].item()) == (20, 1)


def test_training_does_not_restart_silently_when_all_checkpoints_are_damaged(saved: Path) -> None:
    flip(saved / "best-00000001.pt")
    with pytest.raises(
        UserError, match=r"every checkpoint in .*run is damaged \(step 30: best.*; step 20: .*delete that"
    ):
        CheckpointFolder(saved).load()


def test_unfinished_checkpoints_are_ignored(saved: Path) -> None:
    (saved / "step-00000040.pt").write_bytes(b"half")
    (saved / ".step-00000050.pt.77").write_bytes(b"half")
    folder = CheckpointFolder(saved)
    found = folder.load()
    assert found is not None
    assert found.step == 30
    save(folder, 35, 1)
    assert not names(saved) & {"step-00000040.pt", ".step-00000050.pt.77"}


def test_loading_a_checkpoint_does_not_execute_code(saved: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "harmed",)

    name = "step-00000030.pt"
    torch.save(Evil(), saved / name)
    manifest = json.loads((saved / "step-00000030.json").read_text())
    from revmux.training.checkpoint import file_digest

    manifest["files"][name] = file_digest((saved / name).read_bytes())
    (saved / "step-00000030.json").write_text(json.dumps(manifest))
    found = CheckpointFolder(saved).load()
    assert found is not None
    assert found.step == 20
    assert not (tmp_path / "harmed").exists()


def test_a_second_process_waits_for_the_lock_of_a_checkpoint_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workers of a killed driver may still run when those of the next driver start."""
    path, reported, entered = tmp_path / "run", SimpleQueue[str](), threading.Event()
    monkeypatch.setattr("revmux.utils.lock._log.warning", lambda words, *values: reported.put(words % values))

    def second() -> None:
        with CheckpointFolder(path).locked():
            entered.set()

    with CheckpointFolder(path).locked():
        thread = threading.Thread(target=second)
        thread.start()
        assert f"another process is writing {path}/.lock" in reported.get(timeout=30)
        save(CheckpointFolder(path), 10)
        assert not entered.is_set()
    assert entered.wait(30)
    thread.join()
    found = CheckpointFolder(path).load()
    assert found is not None
    assert found.step == 10


def test_a_folder_that_cannot_be_locked_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = pytest.raises(UserError, match=r"cannot write checkpoints to .*file/run .*; free some space")
    with refused, CheckpointFolder(tmp_path / "file" / "run").locked():
        pass


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(UserError, match="steps is -1; choose 0 or more"):
        CheckpointConfig(steps=-1)
    with pytest.raises(UserError, match="keep is 1; choose 2 or more"):
        CheckpointConfig(keep=1)


def fail_on_second(first: int) -> str:
    rank, _ = rank_and_world()
    assert from_first(rank + first) == first
    try:
        with fail_together():
            if rank == 1:
                raise UserError("the second has no disk")
    except UserError as error:
        return str(error)
    return "went on"


def test_an_error_of_one_worker_ends_all_workers(run_workers: Callable) -> None:
    assert run_workers(fail_on_second, 2, 5) == ["the second has no disk"] * 2
