"""The ladder: each input goes on while its stage is unsure, no layer runs twice, and the last answer is the plain model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from numeric import assert_close
from serving_models import load, plain_scores, text, write_model
from torch import Tensor

from revmux.data.tokens import TokenizedSplit
from revmux.errors import UserError
from revmux.estimate.flops import count_flops, ladder_cost, plain_cost, relative_cost, resume_cost
from revmux.estimate.throughput import paired_throughput
from revmux.fallback import confidence
from revmux.features.online import OnlineFeatures
from revmux.grouping import Grouping
from revmux.ladder import Ladder, LadderAnswers, Stage, climb, first_answers
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier, plain_classifier
from revmux.pretrained.pretrained import Pretrained
from revmux.training.ladder_evaluation import evaluate_ladder, going_on

pytestmark = pytest.mark.numeric

TEXTS = [text(index) for index in range(40)]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    made = load(write_model(tmp_path_factory.mktemp("model")))
    made.backbone.freeze()
    return made


@pytest.fixture(scope="module")
def tokens(pretrained: Pretrained) -> dict[str, Tensor]:
    return dict(pretrained.tokenizer(TEXTS, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def features(pretrained: Pretrained) -> OnlineFeatures:
    labels = plain_scores(pretrained, TEXTS).argmax(-1)
    labels[::4] = (labels[::4] + 1) % 3  # the plain model is right three times in four
    split = Dataset.from_dict({"text": TEXTS, "label": labels.tolist()})
    return OnlineFeatures(TokenizedSplit(split, pretrained.tokenizer, 64), pretrained.backbone)


def model(pretrained: Pretrained, name: str, num_inputs: int, cut: int, **options: object) -> MultiplexedClassifier:
    """An adapter with random weights, whose answers differ from the plain model's."""
    torch.manual_seed(num_inputs + cut)
    method = build_method(name, BackboneShape.of(pretrained.backbone), num_inputs, options)
    for parameter in method.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return MultiplexedClassifier(pretrained.backbone, method, cut).requires_grad_(False).eval()


def exit_head(pretrained: Pretrained, layer: int) -> MultiplexedClassifier:
    return model(pretrained, "exit-head", 1, layer, layer=layer)


def three_stages(pretrained: Pretrained, first: float = 0.6, second: float = 0.7, third: float = 0.8) -> Ladder:
    """An exit head at layer 1, groups of four above layer 2, and pairs above layer 3."""
    four, pairs = model(pretrained, "revmux", 4, 2), model(pretrained, "revmux", 2, 3)
    return Ladder([Stage(exit_head(pretrained, 1), first), Stage(four, second), Stage(pairs, third)])


@contextmanager
def counted_layers(pretrained: Pretrained) -> Iterator[list[list[int]]]:
    """Yield the number of rows in each call of each layer."""
    rows: list[list[int]] = [[] for _ in range(4)]
    handles = [
        pretrained.backbone.layer(layer).register_forward_pre_hook(
            lambda module, inputs, own=own: own.append(len(inputs[0]))
        )
        for layer, own in enumerate(rows)
    ]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def by_hand(ladder: Ladder, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores and answering stages of a ladder of pairs, from whole models and one stage after another."""
    rows = torch.arange(len(tokens["input_ids"]))
    scores = torch.zeros(len(rows), 3)
    stages = torch.zeros_like(rows)
    left: list[Tensor] = []
    for number, stage in enumerate(ladder.stages, 1):
        if number > 1:
            lengths = tokens["attention_mask"].sum(dim=1)[rows]
            rows = rows[lengths.argsort(descending=True, stable=True)]
            full = len(rows) // 2 * 2
            left.append(rows[full:])
            rows = rows[:full]
        found = stage.model({name: tensor[rows] for name, tensor in tokens.items()})
        scores[rows], stages[rows] = found, number
        rows = rows[confidence(found) < stage.threshold].sort().values
    rows = torch.cat([rows, *left])
    scores[rows] = ladder.backbone({name: tensor[rows] for name, tensor in tokens.items()})
    stages[rows] = 0
    return scores, stages


@torch.no_grad()
def test_each_input_is_answered_by_the_first_stage_that_is_sure(
    pretrained: Pretrained, tokens: dict[str, Tensor]
) -> None:
    pairs = model(pretrained, "revmux", 2, 2)
    ladder = Ladder([Stage(exit_head(pretrained, 1), 0.5), Stage(pairs, 0.6)])
    found = ladder.classify(tokens)
    scores, stages = by_hand(ladder, tokens)
    assert torch.equal(found.stage, stages)
    assert set(stages.tolist()) == {0, 1, 2}
    assert_close(found.scores, scores)
    assert torch.equal(found.fell_back, stages == 0)
    assert torch.equal(ladder(tokens), found.scores)


@torch.no_grad()
def test_inputs_that_fall_back_get_the_plain_models_scores(pretrained: Pretrained, tokens: dict[str, Tensor]) -> None:
    expected = plain_scores(pretrained, TEXTS)
    always = three_stages(pretrained, 1.0, 1.0, 1.0).classify(tokens)
    assert bool(always.fell_back.all())
    assert torch.equal(always.last, torch.full_like(always.last, 3))
    assert_close(always.scores, expected)
    some = three_stages(pretrained).classify(tokens)
    assert set(some.stage.tolist()) == {0, 1, 2, 3}
    assert_close(some.scores[some.fell_back], expected[some.fell_back])


@torch.no_grad()
def test_inputs_go_on_from_the_plain_states_below_an_adapted_exit_head(
    pretrained: Pretrained, tokens: dict[str, Tensor]
) -> None:
    head = model(pretrained, "exit-head", 1, 1, layer=2, lora_rank=2)  # layers 2 and above are adapted
    ladder = Ladder([Stage(head, 1.0), Stage(model(pretrained, "revmux", 2, 1), 1.0)])
    found = ladder.classify(tokens)
    assert bool(found.fell_back.all())
    assert_close(found.scores, plain_scores(pretrained, TEXTS))


@torch.no_grad()
def test_a_layer_processes_no_input_alone_twice(pretrained: Pretrained, tokens: dict[str, Tensor]) -> None:
    ladder = three_stages(pretrained)
    with counted_layers(pretrained) as rows:
        found = ladder.classify(tokens)
    left = [int(((found.last > stage) | found.fell_back).sum()) for stage in (1, 2, 3)]
    groups = [len(found.group[found.last >= stage].unique()) for stage in (1, 2, 3)]
    assert groups[0] >= len(TEXTS) - left[0]
    assert rows[0] == [len(TEXTS)]
    assert rows[1] == [left[0]]
    in_two, in_three = int((found.last >= 2).sum()), int((found.last >= 3).sum())
    assert sum(rows[2]) == -(-in_two // 4) + left[1]
    assert sum(rows[3]) == -(-in_two // 4) + -(-in_three // 2) + int(found.fell_back.sum())


@torch.no_grad()
@pytest.mark.parametrize(
    ("unsure", "groups", "alone"), [(1, 0, 1), (2, 1, 0), (3, 1, 0), (4, 1, 0), (5, 1, 1), (7, 2, 0)]
)
def test_left_over_inputs_fill_a_group_or_go_to_the_plain_model_whichever_is_cheaper(
    pretrained: Pretrained, tokens: dict[str, Tensor], unsure: int, groups: int, alone: int
) -> None:
    found = climb_from_layer_one(pretrained, tokens, [Stage(model(pretrained, "revmux", 4, 2))], unsure)
    later = found.last == 2
    assert len(found.group[later].unique()) == groups
    assert int(found.fell_back.sum()) == alone
    assert int(later.sum()) == unsure - alone
    if alone:  # the shortest one
        lengths = tokens["attention_mask"].sum(dim=1)
        assert lengths[found.fell_back].item() == lengths[:unsure].min()


def climb_from_layer_one(
    pretrained: Pretrained,
    tokens: dict[str, Tensor],
    stages: Sequence[Stage],
    unsure: int,
    widest: Tensor | None = None,
) -> LadderAnswers:
    """Let the first ``unsure`` inputs go on from an exit head at layer 1."""
    backbone = pretrained.backbone
    state = backbone.run(backbone.embed(tokens), 1)
    first = first_answers(torch.zeros(len(TEXTS), 3), torch.arange(len(TEXTS)).unsqueeze(1))
    return climb(backbone, stages, state, first, torch.arange(len(TEXTS)) < unsure, widest=widest)


@torch.no_grad()
def test_an_input_never_joins_a_wider_group_than_it_allows(pretrained: Pretrained, tokens: dict[str, Tensor]) -> None:
    stages = [Stage(model(pretrained, "revmux", 4, 2), 1.0), Stage(model(pretrained, "revmux", 2, 3), 0.0)]
    widest = torch.full((len(TEXTS),), 4)
    widest[1::2] = 2
    found = climb_from_layer_one(pretrained, tokens, stages, 16, widest)
    assert found.last[:16].tolist() == [3, 1] * 8  # after a stage that it does not allow, an input resumes alone
    assert found.fell_back[:16].tolist() == [False, True] * 8
    assert_close(found.scores[1:16:2], plain_scores(pretrained, TEXTS)[1:16:2])


@torch.no_grad()
def test_inputs_of_similar_length_share_later_groups(pretrained: Pretrained, tokens: dict[str, Tensor]) -> None:
    found = climb_from_layer_one(pretrained, tokens, [Stage(model(pretrained, "revmux", 4, 2))], len(TEXTS))
    lengths = tokens["attention_mask"].sum(dim=1)
    spans = sorted(
        (int(lengths[found.group == group].min()), int(lengths[found.group == group].max()))
        for group in found.group.unique()
    )
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


@torch.no_grad()
def test_an_answer_that_is_not_finite_does_not_go_on(pretrained: Pretrained, tokens: dict[str, Tensor]) -> None:
    broken = {name: tensor[:8] for name, tensor in tokens.items()}
    backbone = pretrained.backbone
    state = backbone.run(backbone.embed(broken), 1)
    state.hidden[0] = float("nan")
    ladder = Ladder([Stage(exit_head(pretrained, 1), 1.0), Stage(model(pretrained, "revmux", 2, 2), 1.0)])
    found = ladder.run(state, torch.arange(8).unsqueeze(1))
    assert found.stage.tolist() == [1] + [0] * 7
    assert_close(found.scores[1:], plain_scores(pretrained, TEXTS)[1:8])


def test_stages_that_cannot_follow_each_other_are_refused(
    pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory
) -> None:
    early, pairs = exit_head(pretrained, 1), model(pretrained, "revmux", 2, 2)
    with pytest.raises(UserError, match="a ladder needs 1 or more stages"):
        Ladder([])
    with pytest.raises(
        UserError, match=r"stage 2 \(exit-head, N = 1\) has 1 prefill layers and stage 1 .* has 2;.* exchange"
    ):
        Ladder([Stage(pairs, 0.9), Stage(early, 0.9)])
    with pytest.raises(UserError, match=r"stage 1 \(exit-head, N = 1\) has no threshold"):
        Ladder([Stage(early), Stage(pairs, 0.9)])
    with pytest.raises(UserError, match=r"the fallback threshold is 1\.5"):
        Ladder([Stage(early, 1.5)])
    slots = model(pretrained, "datamux", 2, 2, demultiplexer="index", tune_backbone=False)
    with pytest.raises(UserError, match="changes the tokens"):
        Ladder([Stage(early, 0.9), Stage(slots)])
    other = load(write_model(tmp_path_factory.mktemp("other")))
    with pytest.raises(UserError, match="different backbones"):
        Ladder([Stage(early, 0.9), Stage(model(other, "revmux", 2, 2))])


@torch.no_grad()
def test_a_method_that_changes_the_tokens_is_a_ladder_of_its_own(
    pretrained: Pretrained, tokens: dict[str, Tensor]
) -> None:
    slots = model(pretrained, "datamux", 2, 0, demultiplexer="index", tune_backbone=False)
    found = Ladder([Stage(slots)]).classify(tokens)
    assert_close(found.scores, slots(tokens))
    assert set(found.stage.tolist()) == {1}


def test_the_cost_of_a_ladder_is_that_of_its_layers(pretrained: Pretrained) -> None:
    ladder = three_stages(pretrained)
    models, length = [stage.model for stage in ladder.stages], 12
    cost = ladder_cost(models, length)
    plain = plain_cost(pretrained.backbone, length)
    layer = plain.upper / 4 / plain.per_input
    counts = [count_flops(one.backbone, one.method, one.prefill_layers, length) for one in models]
    shared = [(count.per_input - count.prefill) / plain.per_input for count in counts]
    assert cost.first == relative_cost(pretrained.backbone, models[0].method, 1, length)
    assert cost.next == pytest.approx(
        (layer + shared[1], layer + shared[2], resume_cost(pretrained.backbone, 3, length))
    )
    assert cost.at([0.3, 0.2, 0.1]) == pytest.approx(
        cost.first + 0.3 * cost.next[0] + 0.2 * cost.next[1] + 0.1 * cost.next[2]
    )
    assert cost.at([0, 0, 0]) == cost.first
    assert cost.at([1, 1, 1]) < cost.first + 3  # each layer is counted once per input alone


def test_shares_go_on_from_stage_to_stage() -> None:
    assert going_on((0.1, 0.6, 0.3)) == pytest.approx((0.4, 0.1))
    assert going_on((0.25, 0.75)) == (0.25,)


@pytest.mark.parametrize("grouping", ["random", "length"])
def test_evaluation_reports_accuracy_shares_and_cost(
    pretrained: Pretrained, features: OnlineFeatures, grouping: Grouping
) -> None:
    ladder = three_stages(pretrained)
    found = evaluate_ladder(ladder, features, shuffles=3, seed=4, grouping=grouping)
    assert sum(found.answered) == pytest.approx(1)
    assert all(share > 0 for share in found.answered)
    cost = ladder_cost([stage.model for stage in ladder.stages], round(float(features.lengths.double().mean())))
    assert found.cost == pytest.approx(cost.at(found.going_on))
    assert found.share_on[0] == pytest.approx(1 - found.answered[1])
    assert found.share_on[1] * found.share_on[0] == pytest.approx(found.going_on[1])
    assert found.figures.accuracy_mean == pytest.approx(float(found.correct.mean()))
    assert len(found.figures.accuracies) == 3
    again = evaluate_ladder(ladder, features, shuffles=3, seed=4, grouping=grouping, cost=cost)
    assert torch.equal(again.correct, found.correct)
    always = evaluate_ladder(three_stages(pretrained, 1, 1, 1), features, shuffles=1, grouping=grouping)
    assert always.figures.accuracy_mean == always.figures.siso_accuracy == 0.75
    assert always.figures.siso_agreement == 1
    assert always.answered == (1, 0, 0, 0)


def test_without_a_teacher_the_plain_model_answers_the_rest(pretrained: Pretrained, features: OnlineFeatures) -> None:
    ladder = three_stages(pretrained)
    online = OnlineFeatures(features.split, pretrained.backbone, with_teacher=False)
    stored = OnlineFeatures(features.split, pretrained.backbone, prefill_layers=1)
    expected = evaluate_ladder(ladder, features, shuffles=2)
    for other in (online, stored):
        found = evaluate_ladder(ladder, other, shuffles=2)
        assert torch.equal(found.correct, expected.correct)
        assert found.answered == expected.answered


def test_an_unknown_grouping_is_refused(pretrained: Pretrained, features: OnlineFeatures) -> None:
    with pytest.raises(UserError, match="grouping 'size'"):
        evaluate_ladder(three_stages(pretrained), features, grouping="size")  # type: ignore[arg-type]


def test_the_throughput_of_a_ladder_is_measured_in_pairs_with_the_plain_model(
    pretrained: Pretrained, tokens: dict[str, Tensor]
) -> None:
    ratio = paired_throughput(plain_classifier(pretrained.backbone), three_stages(pretrained), [tokens], pairs=2)
    assert 0 < ratio.least <= ratio.median <= ratio.most
