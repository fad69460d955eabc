"""How the engine groups what waits: the width, the bounds of a batch, and adapters with different cuts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from serving_models import CUT, plain_scores, text, write_adapter

from revmux.errors import UserError
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Engine, Limits

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(("waiting", "width"), [(1, 1), (3, 1), (64, 4)])
def test_the_engine_takes_all_waiting_inputs_and_chooses_the_width_from_their_number(
    make_engine: Callable[..., Engine], waiting: int, width: int
) -> None:
    engine = make_engine()
    futures = [engine.submit([text(index)])[0] for index in range(waiting)]
    engine.start()
    assert {future.result(60).width for future in futures} == {width}
    assert engine.stats()["groups"] == {width: waiting // width}


def test_the_width_respects_the_bounds_of_the_operator_and_of_the_request(
    make_engine: Callable[..., Engine], pretrained: Pretrained
) -> None:
    engine = make_engine(max_multiplex=3)
    engine.start()
    assert [route.width for route in engine.task().lineup.routes] == [1, 2]
    free = make_engine()
    bounded = free.submit([text(index) for index in range(30)], max_multiplex=3)
    others = free.submit([text(index) for index in range(30)], max_multiplex=99)
    free.start()
    assert max(future.result(60).width for future in bounded) == 2
    assert max(future.result(60).width for future in others) == 4
    with pytest.raises(UserError, match="max_multiplex is 0"):
        free.submit(["w1"], max_multiplex=0)


def test_batches_are_bounded(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch=8, max_batch_tokens=256)
    sizes: list[torch.Size] = []
    handle = (
        engine.task()
        .backbone.layer(0)
        .register_forward_hook(lambda layer, inputs, output: sizes.append(inputs[0].shape))
    )
    futures = engine.submit([text(index) for index in range(60)])
    engine.start()
    assert all(future.result(60) for future in futures)
    handle.remove()
    assert max(shape[0] for shape in sizes) <= 8
    assert max(shape[0] * shape[1] for shape in sizes) <= 256


def test_limits_too_small_for_one_group_are_refused(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(UserError, match="one group of 4 inputs of 64 tokens"):
        make_engine(max_batch_tokens=255)
    with pytest.raises(UserError, match="max_queue is 0"):
        Limits(max_queue=0)


def test_adapters_cut_at_different_layers_serve_one_batch(
    make_engine: Callable[..., Engine], pretrained: Pretrained, tmp_path: Path
) -> None:
    folders = [
        write_adapter(tmp_path, pretrained, 2, prefill_layers=2),
        write_adapter(tmp_path, pretrained, 4, prefill_layers=CUT),
    ]
    engine = make_engine(folders)
    texts = [text(index) for index in range(40)]
    futures = engine.submit(texts[:20], max_multiplex=2) + engine.submit(texts[20:])
    engine.start()
    answers = [future.result(60) for future in futures]
    assert {answer.width for answer in answers[:20]} == {2}
    assert {answer.width for answer in answers[20:]} == {4}
    torch.testing.assert_close(
        torch.stack([answer.scores for answer in answers]), plain_scores(pretrained, texts), atol=1e-3, rtol=0
    )


def test_adapters_with_the_same_cut_share_the_prefill(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.submit(["w1 w2 w3"] * 8, max_multiplex=2)
    futures = engine.submit(["w4 w5 w6"] * 8)
    batches: list[int] = []
    handle = (
        engine.task()
        .backbone.layer(0)
        .register_forward_hook(lambda layer, inputs, output: batches.append(len(inputs[0])))
    )
    engine.start()
    futures[-1].result(60)
    handle.remove()
    assert batches == [16]


def test_a_method_whose_tokens_depend_on_the_slot_is_served(
    make_engine: Callable[..., Engine], pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = write_adapter(
        tmp_path, pretrained, 2, prefill_layers=0, method="datamux", demultiplexer="index", tune_backbone=False
    )
    engine = make_engine([folder], plain_load=0)
    futures = engine.submit([text(index) for index in range(6)])
    engine.start()
    answers = [future.result(60) for future in futures]
    assert {answer.width for answer in answers} == {2}
    assert engine.task().max_length == 64 - engine.task().lineup.adapters[0].model.method.added_tokens


def test_adapter_that_tuned_the_backbone_is_refused(
    make_engine: Callable[..., Engine], pretrained: Pretrained, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, pretrained, 2, method="revmux", tune_backbone=True)
    with pytest.raises(UserError, match="tuned the backbone"):
        make_engine([folder])
