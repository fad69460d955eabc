"""Adapters are added and removed while requests are answered."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving_models import load, plain_scores, text, write_adapter, write_model

from revmux.errors import UserError
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Answer, Engine, Limits

pytestmark = pytest.mark.numeric

TEXTS = [text(index) for index in range(48)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    return load(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def folders(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {width: write_adapter(root, pretrained, width) for width in (2, 4, 8)}


@pytest.fixture
def engine(pretrained: Pretrained, folders: dict[int, Path]) -> Iterator[Engine]:
    made = Engine(pretrained, [folders[2]], Limits(plain_load=0, max_multiplex=4))
    yield made
    made.close()


def widths(engine: Engine) -> list[int]:
    return [route.width for route in engine.task().lineup.routes]


def answered(engine: Engine, **wanted: int) -> list[Answer]:
    answers = [future.result(60) for future in engine.submit(TEXTS, **wanted)]
    found = torch.stack([answer.scores for answer in answers])
    expected = plain_scores(engine.task().pretrained, TEXTS)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    return answers


def test_requests_use_the_adapters_that_are_loaded_now(engine: Engine, folders: dict[int, Path]) -> None:
    engine.start()
    assert {answer.width for answer in answered(engine)} == {2}
    assert engine.load(folders[4]).route.width == 4
    assert widths(engine) == [1, 2, 4]
    assert {answer.width for answer in answered(engine)} == {4}
    assert {answer.width for answer in answered(engine, max_multiplex=2)} == {2}
    engine.retire(4)
    engine.retire(2)
    assert {answer.width for answer in answered(engine)} == {1}


def test_an_adapter_replaces_the_one_with_the_same_n(
    engine: Engine, folders: dict[int, Path], pretrained: Pretrained, tmp_path: Path
) -> None:
    former = engine.task().lineup.adapters[0]
    newer = engine.load(write_adapter(tmp_path, pretrained, 2, prefill_layers=2))
    assert engine.task().lineup.adapters == (newer,)
    assert newer.model is not former.model
    assert newer.route.stem == "layer 2"


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(
    engine: Engine, folders: dict[int, Path], pretrained: Pretrained, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="serves N = 8, but max_multiplex is 4"):
        engine.load(folders[8])
    with pytest.raises(UserError, match="not an adapter folder"):
        engine.load(tmp_path)
    with pytest.raises(UserError, match=r"no adapter of N = 4; loaded: 2"):
        engine.retire(4)
    longer = write_adapter(tmp_path, pretrained, 4, 0, method="datamux", demultiplexer="index", tune_backbone=False)
    with pytest.raises(UserError, match="max_length of task 'default' is 64"):
        engine.load(longer)
    assert widths(engine) == [1, 2]


def test_a_group_in_flight_finishes_with_the_adapter_that_it_started_with(
    engine: Engine, folders: dict[int, Path]
) -> None:
    engine.load(folders[4])
    method = engine.task().lineup.first[4].model.method
    inside, go_on = threading.Event(), threading.Event()

    def wait(module: object, inputs: object) -> None:
        inside.set()
        assert go_on.wait(60)

    method.pooling.register_forward_pre_hook(wait)
    futures = engine.submit(TEXTS[:4])
    engine.start()
    assert inside.wait(60)
    engine.retire(4)
    engine.retire(2)
    engine.load(folders[2])  # its cost is counted while the model runs: neither disturbs the other
    waiting = engine.submit(TEXTS[4:8])
    go_on.set()
    answers = [future.result(60) for future in futures + waiting]
    assert [answer.width for answer in answers] == [4] * 4 + [2] * 4
    torch.testing.assert_close(
        torch.stack([answer.scores for answer in answers]),
        plain_scores(engine.task().pretrained, TEXTS[:8]),
        atol=1e-3,
        rtol=0,
    )


def test_no_request_is_lost_while_adapters_change(engine: Engine, folders: dict[int, Path]) -> None:
    engine.start()
    changing = threading.Event()
    found: list[list[Answer]] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not changing.is_set() or len(found) < 3:
                found.append(answered(engine))
        except BaseException as error:
            failures.append(error)

    client = threading.Thread(target=ask)
    client.start()
    for _ in range(5):
        engine.load(folders[4])
        engine.retire(2)
        engine.load(folders[2])
        engine.retire(4)
    changing.set()
    client.join()
    assert not failures
    assert sum(engine.stats()["inputs"].values()) == len(found) * len(TEXTS)
    assert widths(engine) == [1, 2]
