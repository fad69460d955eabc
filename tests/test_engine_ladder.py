"""A ladder in the engine: later stages run inside the pass, and every limit holds as without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from serving_models import load, plain_scores, text, write_model, write_stage
from torch import Tensor

from revmux.adapters.config import load_adapter_config
from revmux.errors import UserError
from revmux.pretrained.pretrained import Pretrained
from revmux.serving import Answer, Engine, InferenceFailed, Limits, PassReport
from revmux.serving.scheduling import PLAIN, Group

pytestmark = pytest.mark.numeric

TEXTS = [text(index) for index in range(40)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pretrained(model_folder: Path) -> Pretrained:
    return load(model_folder)


@pytest.fixture
def stages(pretrained: Pretrained, tmp_path: Path) -> list[Path]:
    """An exit head at layer 1 that is never sure, groups of four above layer 2, and pairs above layer 3."""
    return [
        write_stage(tmp_path, pretrained, 1, 1, 1, 1.0, method="exit-head", layer=1),
        write_stage(tmp_path, pretrained, 2, 4, 2, 0.8),
        write_stage(tmp_path, pretrained, 3, 2, 3, 0.6),  # it has the same confidence as stage 2
    ]


@pytest.fixture
def make_engine(pretrained: Pretrained) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(folders: list[Path], threshold: float | None = None, **limits: Any) -> Engine:
        limits = {"plain_load": 0, **limits}
        made.append(Engine(pretrained, folders, Limits(**limits), threshold=threshold))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def answers_of(engine: Engine, texts: list[str] = TEXTS, **wanted: Any) -> list[Answer]:
    futures = engine.submit(texts, **wanted)
    if not engine.alive:
        engine.start()
    return [future.result(60) for future in futures]


def scores_of(answers: list[Answer]) -> Tensor:
    return torch.stack([answer.scores for answer in answers])


def test_unsure_inputs_go_on_in_the_same_pass_and_no_layer_runs_twice(
    make_engine: Callable[..., Engine], stages: list[Path], pretrained: Pretrained
) -> None:
    reports: list[PassReport] = []
    engine = make_engine(stages)
    engine._worker.on_pass = reports.append
    rows: list[list[int]] = [[] for _ in range(4)]
    for layer, own in enumerate(rows):
        pretrained.backbone.layer(layer).register_forward_pre_hook(
            lambda module, inputs, own=own: own.append(len(inputs[0]))
        )
    answers = answers_of(engine, TEXTS)
    for layer in range(4):
        pretrained.backbone.layer(layer)._forward_pre_hooks.clear()
    reached = [answer.stage for answer in answers]
    assert set(reached) == {0, 2, 3}  # the exit head is never sure
    expected = plain_scores(pretrained, TEXTS)
    torch.testing.assert_close(scores_of(answers), expected, atol=1e-3, rtol=0)  # by construction, see write_model
    for answer in answers:
        assert answer.fell_back == (answer.stage == 0)
        assert (answer.width, answer.method) in {(4, "token-split"), (2, "token-split")}
        if answer.stage == 2:
            assert answer.width == 4
    fell_back = sum(answer.fell_back for answer in answers)
    assert sum(rows[0]) == sum(rows[1]) == len(TEXTS)
    assert sum(rows[3]) <= len(TEXTS) / 4 + len(TEXTS) / 2 + fell_back
    stats = engine.stats()
    assert stats["ladder"] == {stage: reached.count(stage) for stage in set(reached)}
    assert stats["fell_back"] == fell_back
    assert stats["inputs"] == {width: [answer.width for answer in answers].count(width) for width in (2, 4)}
    assert sum(sum(report.answered_by.count(stage) for stage in (0, 2, 3)) for report in reports) == len(TEXTS)
    groups: dict[int, set[int]] = {}
    for answer in answers:
        groups.setdefault(answer.group, set()).add(answer.width)
    assert all(len(widths) == 1 for widths in groups.values())
    assert all([answer.group for answer in answers].count(group) <= max(widths) for group, widths in groups.items())


def test_a_request_never_joins_a_wider_later_stage_than_it_allows(
    make_engine: Callable[..., Engine], stages: list[Path], pretrained: Pretrained
) -> None:
    engine = make_engine(stages)
    narrow = engine.submit(TEXTS[:10], max_multiplex=2)
    exact = engine.submit(TEXTS[10:11], max_multiplex=1)
    wide = engine.submit(TEXTS[11:31])
    engine.start()
    for future in narrow:  # from the exit head to the plain model, past groups of four and the pairs after them
        answer = future.result(60)
        assert (answer.width, answer.stage, answer.fell_back, answer.method) == (1, 0, True, "exit-head")
    assert_close(scores_of([future.result(60) for future in narrow]), plain_scores(pretrained, TEXTS[:10]))
    alone = exact[0].result(60)
    assert (alone.width, alone.stage, alone.fell_back, alone.method) == (1, 0, False, "siso")
    assert torch.equal(alone.scores, plain_scores(pretrained, TEXTS[10:11])[0])
    assert 4 in {future.result(60).width for future in wide}


def test_the_limit_of_the_operator_ends_the_ladder(
    make_engine: Callable[..., Engine], stages: list[Path], pretrained: Pretrained
) -> None:
    engine = make_engine(stages, max_multiplex=2)
    assert [adapter.config.stage for adapter in engine.task().lineup.adapters] == [1]
    assert {answer.stage for answer in answers_of(engine)} == {0}
    assert make_engine(stages, max_multiplex=1).task().lineup.adapters == ()


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(1, 1, 1, 0.9), (3, 2, 2, None)], r"stage-3.* serves stage 3, but no adapter serves stage 2"),
        ([(2, 2, 2, None)], r"serves stage 2, but no adapter serves stage 1"),
        ([(1, 1, 1, None), (2, 2, 2, None)], r"serves stage 2, but stage 1 has no threshold"),
        ([(1, 1, 1, 0.9), (2, 2, 2, 0.9), (2, 4, 2, 0.9)], r"both serve stage 2; give one for each stage above 1"),
        ([(1, 1, 2, 0.9), (2, 2, 1, None)], r"stage 2 .* has 1 prefill layers and stage 1 .* has 2"),
    ],
)
def test_adapters_that_form_no_ladder_are_refused_when_they_are_loaded(
    make_engine: Callable[..., Engine],
    pretrained: Pretrained,
    tmp_path: Path,
    places: list[tuple[int, int, int, float | None]],
    message: str,
) -> None:
    folders = [
        write_stage(tmp_path, pretrained, stage, width, cut, threshold, method="exit-head", layer=cut)
        if width == 1
        else write_stage(tmp_path, pretrained, stage, width, cut, threshold)
        for stage, width, cut, threshold in places
    ]
    with pytest.raises(UserError, match=message):
        make_engine(folders)


def test_the_threshold_of_the_operator_applies_to_every_stage(
    make_engine: Callable[..., Engine], stages: list[Path]
) -> None:
    assert {answer.stage for answer in answers_of(make_engine(stages, threshold=1.0))} == {0}
    with pytest.raises(UserError, match="serves stage 3, but stage 1 has no threshold"):
        make_engine(stages, threshold=0.0)


def test_a_method_that_changes_the_tokens_is_no_later_stage(
    make_engine: Callable[..., Engine], stages: list[Path], pretrained: Pretrained, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"demultiplexer": "index", "tune_backbone": False}
    slots = write_stage(tmp_path, pretrained, 2, 2, 2, method="datamux", **options)
    with pytest.raises(UserError, match=r"stage 2 \(datamux, N = 2\) cannot continue .* changes the tokens"):
        make_engine([stages[0], slots])


def test_stages_are_added_replaced_and_removed_while_requests_are_answered(
    make_engine: Callable[..., Engine], stages: list[Path], pretrained: Pretrained, tmp_path: Path
) -> None:
    engine = make_engine(stages[:1])
    assert {answer.stage for answer in answers_of(engine)} == {0}
    final = write_stage(tmp_path / "final", pretrained, 2, 4, 2)
    assert engine.load(final).config.stage == 2
    assert {answer.stage for answer in answers_of(engine)} == {2}
    pairs = write_stage(tmp_path / "pairs", pretrained, 2, 2, 2)
    engine.load(pairs)  # a stage has one adapter, of any N
    assert {answer.width for answer in answers_of(engine)} == {2}
    with pytest.raises(UserError, match="serves stage 3, but stage 2 has no threshold"):
        engine.load(stages[2])
    with pytest.raises(UserError, match="no adapter serves stage 1"):
        engine.retire(1)
    with pytest.raises(UserError, match=r"no adapter of N = 4 in stage 2; loaded: 2"):
        engine.retire(4, stage=2)
    assert {answer.stage for answer in answers_of(engine)} == {2}
    engine.retire(2, stage=2)
    assert {answer.stage for answer in answers_of(engine)} == {0}


def test_partners_in_a_later_stage_of_scores_that_are_not_finite_run_again_alone(
    make_engine: Callable[..., Engine], stages: list[Path], pretrained: Pretrained, tmp_path: Path
) -> None:
    final = write_stage(tmp_path / "final", pretrained, 2, 4, 2)
    engine = make_engine([stages[0], final])
    pooling = engine.task().lineup.later[0].model.method.pooling
    calls: list[int] = []

    def break_first_group(module: object, inputs: object, output: Tensor) -> Tensor:
        calls.append(len(output))
        broken = output.clone()
        broken[0] = float("nan")
        return broken

    pooling.register_forward_hook(break_first_group)
    answers = answers_of(engine, [text(19)] * 8)
    assert calls == [2]  # groups
    assert [answer.stage for answer in answers].count(2) == 4
    assert [(answer.method, answer.fell_back) for answer in answers].count(("siso", False)) == 4
    torch.testing.assert_close(scores_of(answers), plain_scores(pretrained, [text(19)] * 8), atol=1e-3, rtol=0)


def test_an_error_in_a_later_stage_fails_the_inputs_of_the_pass_and_no_others(
    make_engine: Callable[..., Engine], stages: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(stages)
    method = engine.task().lineup.later[0].model.method
    with monkeypatch.context() as patch:
        patch.setattr(method, "multiplex", lambda states: 1 / 0)
        futures = engine.submit(TEXTS[:8])
        exact = engine.submit(TEXTS[:1], max_multiplex=1)
        engine.start()
        for future in futures:
            with pytest.raises(InferenceFailed, match="ZeroDivisionError"):
                future.result(60)
        assert exact[0].result(60).method == "siso"
    assert len(answers_of(engine)) == len(TEXTS)


def test_a_later_stage_that_runs_out_of_memory_is_retried_in_halves(
    make_engine: Callable[..., Engine], stages: list[Path], pretrained: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(stages)
    method = engine.task().lineup.later[0].model.method
    multiplex, sizes = method.multiplex, []

    def small(states: Any) -> Any:
        sizes.append(len(states))
        if len(states) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return multiplex(states)

    monkeypatch.setattr(method, "multiplex", small)
    answers = answers_of(engine, [text(19)] * 16)
    assert sizes[:3] == [4, 2, 2]
    torch.testing.assert_close(scores_of(answers), plain_scores(pretrained, [text(19)] * 16), atol=1e-3, rtol=0)
    assert engine.stats()["failed"] == 0


def test_the_expected_share_that_goes_on_is_part_of_the_cost_of_a_route(
    make_engine: Callable[..., Engine], pretrained: Pretrained, tmp_path: Path
) -> None:
    def line_up(share: float | None, threshold: float | None = None, later: float = 0.1) -> Any:
        root = tmp_path / f"{share}-{threshold}-{later}"
        metrics = {} if share is None else {"share_on": share}
        head = write_stage(root, pretrained, 1, 1, 1, 0.9, metrics, method="exit-head", layer=1)
        pairs = write_stage(root, pretrained, 2, 2, 2, 0.8, {"share_on": later})
        return make_engine([head, pairs], threshold).task().lineup

    bare = line_up(None)
    head, pairs = (adapter.route for adapter in bare.adapters)
    assert bare.routes == [PLAIN, head]
    beyond = pairs.per_input - head.alone + 0.1 * (1 - pairs.alone)
    found = line_up(0.3)
    assert found.routes[1].per_input == pytest.approx(head.per_input + 0.3 * beyond)
    assert found.routes[1].stem == head.stem
    assert line_up(0.3, 0.5).routes == [PLAIN, head]  # measured at another threshold
    dear = line_up(1.0, later=1.0)
    assert dear.routes == [PLAIN]
    assert not any(dear.uses(adapter) for adapter in dear.adapters)


def test_the_cost_of_a_pass_counts_the_stages_that_ran(make_engine: Callable[..., Engine], stages: list[Path]) -> None:
    lineup = make_engine(stages).task().lineup
    head, four, pairs = (adapter.route for adapter in lineup.adapters)
    groups = [Group(lineup.routes[1], (index,)) for index in range(5)]
    cost = lineup.pass_cost(groups, [1, 2, 2, 3, 3], [False, False, True, False, True])
    assert cost == pytest.approx(
        5 * head.group_cost(1)
        + four.shared
        + pairs.shared
        + (four.alone - head.alone)
        + (pairs.alone - head.alone)
        + 2 * (1 - head.alone)
    )
    assert lineup.pass_cost([Group(PLAIN, (0,))], [0], [False]) == 1


def test_the_stage_is_recorded_and_checked(tmp_path: Path, pretrained: Pretrained) -> None:
    folder = write_stage(tmp_path, pretrained, 2, 2, 2, 0.9)
    config = load_adapter_config(folder)
    assert (config.stage, config.fallback_threshold) == (2, 0.9)
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace('"stage": 2', '"stage": 0'))
    with pytest.raises(UserError, match="has stage 0; the stages of a ladder start at 1"):
        load_adapter_config(folder)
