"""Evaluation: every input gets its own group's answer, whatever the batch, the shuffle or the number of workers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from revmux import BackboneShape, MultiplexedClassifier, build_method
from revmux.data.tokens import TokenizedSplit
from revmux.estimate.flops import count_flops, plain_cost
from revmux.features.online import OnlineFeatures
from revmux.grouping import served_groups, shuffled_groups
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.training.evaluation import evaluate, evaluate_both, grouped_cost, predict

pytestmark = pytest.mark.numeric


def features(pretrained: Pretrained, rows: list[dict[str, str]], with_teacher: bool = True) -> OnlineFeatures:
    names = pretrained.backbone.label_names
    split = Dataset.from_list([row | {"label": names.index(row["label"])} for row in rows])
    return OnlineFeatures(TokenizedSplit(split, pretrained.tokenizer, 16), pretrained.backbone, with_teacher)


def multiplexed(pretrained: Pretrained, name: str = "revmux", num_inputs: int = 2) -> MultiplexedClassifier:
    torch.manual_seed(5)
    method = build_method(name, BackboneShape.of(pretrained.backbone), num_inputs)
    for parameter in method.parameters():  # random adapters, so that answers depend on the group
        torch.nn.init.normal_(parameter, std=0.3)
    return MultiplexedClassifier(pretrained.backbone, method, 1).eval()


def own_labels(pretrained: Pretrained, data: OnlineFeatures) -> Tensor:
    """Return the answers of the whole Hugging Face model, one input at a time."""
    with torch.no_grad():
        return torch.cat([pretrained.backbone.model(**data.split.batch([row])).logits for row in range(len(data))])


def test_siso_is_the_plain_model_and_is_evaluated_once(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    data = features(tiny_pretrained, tiny_rows)
    expected = (own_labels(tiny_pretrained, data).argmax(-1) == data.labels).double().mean().item()
    found = evaluate(multiplexed(tiny_pretrained, "siso", 1), data, shuffles=10)
    assert found.accuracies == [pytest.approx(expected)]
    assert found.siso_accuracy == found.accuracy_mean
    assert found.siso_agreement == 1.0
    assert found.accuracy_std == 0.0
    assert 0.0 < expected < 1.0


def test_every_input_gets_the_answer_of_its_own_slot(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    model, data = multiplexed(tiny_pretrained), features(tiny_pretrained, tiny_rows)
    groups = shuffled_groups(len(data), 2, seed=0)
    predicted, teacher, _ = predict(model, data, groups)
    assert teacher is not None
    assert torch.equal(teacher, own_labels(tiny_pretrained, data).argmax(-1))
    with torch.no_grad():
        for group in groups:
            alone = model.run_tokens(data.split.batch(group), torch.tensor([[0, 1]])).scores[0]  # (2, C)
            assert torch.equal(predicted[group], alone.argmax(-1))
    assert predicted.unique().numel() == 2, "a model that predicts one class would prove nothing"


def test_the_batch_size_does_not_change_an_answer(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    model, data = multiplexed(tiny_pretrained), features(tiny_pretrained, tiny_rows)
    groups = shuffled_groups(len(data), 2, seed=1)
    one_by_one = predict(model, data, groups, batch_size=1).labels
    assert torch.equal(one_by_one, predict(model, data, groups, batch_size=64)[0])


def test_an_input_that_fills_several_slots_gets_their_mean(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    data = features(tiny_pretrained, tiny_rows[:1])
    groups = torch.tensor([[0, 0, 0, 0]])
    for seed in range(20):
        torch.manual_seed(seed)
        method = build_method("revmux", BackboneShape.of(tiny_pretrained.backbone), 4)
        for parameter in method.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model = MultiplexedClassifier(tiny_pretrained.backbone, method, 1).eval()
        with torch.no_grad():
            scores = model.run_tokens(data.split.batch([0]), groups).scores[0]  # (4, C)
        mean, first = int(scores.mean(0).argmax()), int(scores[0].argmax())
        assert predict(model, data, groups)[0].tolist() == [mean]
        if mean != first:
            return
    pytest.fail("found no random adapter whose slots disagree")


def test_shuffles_are_averaged_and_seeded(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    model, data = multiplexed(tiny_pretrained), features(tiny_pretrained, tiny_rows)
    found = evaluate(model, data, shuffles=4, seed=10)
    assert len(found.accuracies) == 4
    assert len(set(found.accuracies)) > 1, "random adapters depend on who shares a group"
    spread = torch.tensor(found.accuracies, dtype=torch.float64)
    assert found.accuracy_mean == pytest.approx(spread.mean().item())
    assert found.accuracy_std == pytest.approx(spread.std(correction=0).item())
    assert evaluate(model, data, shuffles=2, seed=10).accuracies == found.accuracies[:2]
    assert set(evaluate(model, data, shuffles=4, seed=11).accuracies[:3]) != set(found.accuracies[1:])
    assert 0.0 < found.siso_agreement < 1.0
    assert set(found.metrics()) == set(asdict(found)) - {"accuracies", "served", "cost_grouped"}


def test_random_groups_and_groups_by_length_are_reported_with_their_own_costs(
    tiny_pretrained: Pretrained, tiny_rows: list
) -> None:
    model, data = multiplexed(tiny_pretrained, num_inputs=4), features(tiny_pretrained, tiny_rows)
    found = evaluate_both(model, data, shuffles=2, seed=3)
    assert found.served is not None
    assert found.served.served is None
    by_length = [
        float((predict(model, data, served_groups(data.lengths, 4, 3, shuffle))[0] == data.labels).double().mean())
        for shuffle in range(2)
    ]
    assert found.served.accuracies == by_length != found.accuracies
    assert replace(found, served=None, cost_grouped=0) == replace(evaluate(model, data, 2, 3), cost_grouped=0)
    metrics = found.metrics()
    assert metrics["accuracy_mean_served"] == found.served.accuracy_mean
    assert metrics["cost_grouped_served"] < metrics["cost_grouped"], "groups of like length carry less padding"
    alone = evaluate_both(multiplexed(tiny_pretrained, "siso", 1), data)
    assert alone.served is None
    assert alone.cost_grouped == pytest.approx(1.0)


def test_the_cost_of_groups_is_counted_at_the_length_of_their_longest_member(
    tiny_pretrained: Pretrained, tiny_rows: list
) -> None:
    model, data = multiplexed(tiny_pretrained), features(tiny_pretrained, tiny_rows)
    groups = shuffled_groups(len(data), 2, seed=5)
    own = round(float(data.lengths.double().mean()))
    longest = round(float(data.lengths[groups].amax(1).double().mean()))
    assert longest > own
    alone, shared = (count_flops(model.backbone, model.method, 1, length) for length in (own, longest))
    expected = alone.prefill + shared.multiplex + shared.upper + shared.head
    assert grouped_cost(model, data.lengths, "random", 1, 5) == pytest.approx(
        expected / plain_cost(model.backbone, own).per_input
    )


def test_without_a_teacher_there_are_no_siso_metrics(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    found = evaluate(multiplexed(tiny_pretrained), features(tiny_pretrained, tiny_rows, with_teacher=False), shuffles=2)
    assert math.isnan(found.siso_agreement)
    assert math.isnan(found.siso_accuracy)
    assert 0.0 < found.accuracy_mean < 1.0


def test_evaluation_restores_the_training_mode(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    model = multiplexed(tiny_pretrained).train()
    evaluate(model, features(tiny_pretrained, tiny_rows[:6]), shuffles=1)
    assert model.training
    assert model.method.training
    assert not model.backbone.training


def evaluated(folder: str, rows: list[dict[str, str]]) -> tuple[list[float], float, Tensor]:
    pretrained = load_pretrained(BackboneConfig(model=folder, max_length=16))
    pretrained.backbone.freeze()
    model, data = multiplexed(pretrained), features(pretrained, rows)
    found = evaluate(model, data, shuffles=3, batch_size=10)
    return found.accuracies, found.siso_agreement, predict(model, data, shuffled_groups(len(data), 2, 0))[0]


@pytest.mark.parametrize("inputs", [37, 2], ids=["an odd number of groups", "one group"])
def test_workers_divide_the_groups_and_return_the_same_result(
    inputs: int, run_workers: Callable, tiny_model_folder: Path, tiny_rows: list
) -> None:
    rows = tiny_rows[:inputs]
    expected = evaluated(str(tiny_model_folder), rows)
    for accuracies, agreement, predicted in run_workers(evaluated, 2, str(tiny_model_folder), rows):
        assert accuracies == expected[0]
        assert agreement == expected[1]
        assert torch.equal(predicted, expected[2])


def test_progress_is_reported_after_each_shuffle(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    seen: list[tuple[int, int, float]] = []
    found = evaluate(
        multiplexed(tiny_pretrained), features(tiny_pretrained, tiny_rows), 3, on_shuffle=lambda *at: seen.append(at)
    )
    assert [at[:2] for at in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0][2] == found.accuracies[0]
    assert seen[-1][2] == pytest.approx(found.accuracy_mean)
