"""Training: which weights change, when it stops, and that a restart does not change the result."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from numeric import approx, assert_close
from tiny_models import tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM

from revmux import BackboneShape, MultiplexedClassifier, UserError, build_method
from revmux.backbone.llama import LlamaBackbone
from revmux.backbone.verbalizer import Verbalizer
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.data.tokens import TokenizedSplit
from revmux.features.base import FeatureBatch
from revmux.features.config import StoreConfig
from revmux.features.online import OnlineFeatures
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.training.checkpoint import CheckpointFolder
from revmux.training.config import LossConfig, MethodConfig, Negatives, OptimConfig, Recipe
from revmux.training.distributed import mean_over_workers, rank_and_world
from revmux.training.losses import ContrastSet
from revmux.training.recipe import check, prepare
from revmux.training.trainer import Trainer, load_weights

pytestmark = pytest.mark.numeric

FAST = OptimConfig(epochs=4, batch_size=16, learning_rate=5e-3)


def split(pretrained: Pretrained, rows: list[dict[str, str]], with_teacher: bool = True) -> OnlineFeatures:
    names = pretrained.backbone.label_names
    data = Dataset.from_list([row | {"label": names.index(row["label"])} for row in rows])
    return OnlineFeatures(TokenizedSplit(data, pretrained.tokenizer, 16), pretrained.backbone, with_teacher)


def trainer(
    pretrained: Pretrained,
    rows: list[dict[str, str]],
    optim: OptimConfig = FAST,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """RevMUX with dropout, N = 2, l = 1, on 64 rows; 16 more rows are the selection split."""
    torch.manual_seed(seed)
    method = build_method(
        "revmux", BackboneShape.of(pretrained.backbone), 2, options or {"dropout": 0.1, "own_state": "linear"}
    )
    model = MultiplexedClassifier(pretrained.backbone, method, 1)
    train, selection = split(pretrained, rows[:64]), split(pretrained, rows[64:])
    return Trainer(model, train, selection, optim, LossConfig(), **arguments)


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(before[name], value)}


def test_the_loss_decreases_and_only_adapters_change(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=16, batch_size=16, learning_rate=5e-3, seed=2))
    backbone, method = snapshot(running.model.backbone), snapshot(running.model.method)
    reports = list(running.run())
    losses = [report.metrics["train_cross_entropy"] for report in reports]
    assert losses[-1] < 0.5 * losses[0]
    assert reports[-1].metrics["selection_accuracy"] > 0.8, "the first word determines the label"
    assert changed(backbone, running.model.backbone) == set()
    assert changed(method, running.model.method) == set(method)
    assert [report.epoch for report in reports] == list(range(1, 17))
    assert [report.stop for report in reports] == [False] * 15 + [True]
    best = max(report.metrics["selection_accuracy"] for report in reports)
    assert running.state.best_accuracy == best
    assert reports[running.state.best_epoch - 1].is_best


def history(running: Trainer) -> list[dict[str, float]]:
    return [
        {name: value for name, value in metrics.items() if not name.endswith("per_second")}
        for metrics in running.state.history
    ]


def test_a_resumed_run_ends_with_the_same_weights_as_an_uninterrupted_one(
    tiny_pretrained: Pretrained, tiny_rows: list
) -> None:
    unbroken = trainer(tiny_pretrained, tiny_rows)
    list(unbroken.run())

    broken = trainer(tiny_pretrained, tiny_rows)
    reports = broken.run()
    next(reports), next(reports)
    kept = broken.state_dict()
    on_disk = io.BytesIO()
    torch.save(kept, on_disk)
    on_disk.seek(0)
    next(reports)
    assert kept["state"]["epoch"] == 2, "the checkpoint must not change as the run continues"

    restarted = trainer(tiny_pretrained, tiny_rows, seed=99)
    restarted.load_state_dict(torch.load(on_disk, weights_only=True))
    assert [report.epoch for report in restarted.run()] == [3, 4]
    assert history(restarted) == history(unbroken)
    expected = unbroken.trained_weights()
    assert all(torch.equal(value, expected[name]) for name, value in restarted.trained_weights().items())
    assert restarted.state.step == unbroken.total_steps


def test_training_stops_when_accuracy_stops_improving_and_stays_stopped(
    tiny_pretrained: Pretrained, tiny_rows: list
) -> None:
    still = OptimConfig(epochs=9, batch_size=16, learning_rate=1e-12, patience=2)
    running = trainer(tiny_pretrained, tiny_rows, still)
    reports = list(running.run())
    assert [(report.is_best, report.stop) for report in reports] == [(True, False), (False, False), (False, True)]

    restarted = trainer(tiny_pretrained, tiny_rows, still)
    restarted.load_state_dict(running.state_dict())
    assert list(restarted.run()) == [], "a run that had stopped does not continue after a restart"


class Stopped(Exception):
    """The process is stopped here."""


def test_a_run_stopped_within_an_epoch_resumes_at_that_step(
    tiny_pretrained: Pretrained, tiny_rows: list, tmp_path: Path
) -> None:
    optim = OptimConfig(epochs=3, batch_size=8, learning_rate=5e-3)  # 8 steps per epoch
    unbroken = trainer(tiny_pretrained, tiny_rows, optim)
    list(unbroken.run())

    def stop_after(step: int) -> Callable:
        def on_step(done: int, total: int, metrics: dict) -> None:
            if done == step:
                raise Stopped

        return on_step

    saved: dict[str, Any] = {"checkpoints": CheckpointFolder(tmp_path / "run"), "checkpoint_steps": 3}
    begun = trainer(tiny_pretrained, tiny_rows, optim, on_step=stop_after(14), **saved)
    assert begun.resume() == 0
    with pytest.raises(Stopped):
        list(begun.run())
    again = trainer(tiny_pretrained, tiny_rows, optim, seed=99, on_step=stop_after(20), **saved)
    assert again.resume() == 12
    assert (again.state.epoch, again.state.epoch_step) == (1, 4)
    with pytest.raises(Stopped):
        list(again.run())
    steps: list[int] = []
    last = trainer(tiny_pretrained, tiny_rows, optim, 7, on_step=lambda step, *_: steps.append(step), **saved)
    assert last.resume() == 18
    list(last.run())
    assert steps == list(range(19, 25))
    assert last.state.step == unbroken.state.step == 24
    for weights, expected in ((last.trained_weights(), unbroken.trained_weights()), (last.best, unbroken.best)):
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    for epoch, other in zip(history(last), history(unbroken), strict=True):
        assert epoch == approx(other)


def test_the_steps_after_a_restart_use_the_remaining_inputs(
    tiny_pretrained: Pretrained, tiny_rows: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = OptimConfig(epochs=1, batch_size=8)
    asked: list[int] = []
    read = OnlineFeatures.batch

    def batch(self: OnlineFeatures, rows: Tensor) -> FeatureBatch:
        if len(self) == 64:  # the training split
            asked.extend(rows.tolist())
        return read(self, rows)

    def stop(done: int, total: int, metrics: dict) -> None:
        if done == 5:
            raise Stopped

    monkeypatch.setattr(OnlineFeatures, "batch", batch)
    saved: dict[str, Any] = {"checkpoints": CheckpointFolder(tmp_path / "run"), "checkpoint_steps": 5}
    with pytest.raises(Stopped):
        list(trainer(tiny_pretrained, tiny_rows, optim, on_step=stop, **saved).run())
    assert not (tmp_path / "run").exists(), "stopped before step 5 was saved"
    asked.clear()
    saved["checkpoint_steps"] = 4
    with pytest.raises(Stopped):
        list(trainer(tiny_pretrained, tiny_rows, optim, on_step=stop, **saved).run())
    done = asked[: 4 * 8]  # the inputs of the steps before the checkpoint
    asked.clear()
    again = trainer(tiny_pretrained, tiny_rows, optim, **saved)
    assert again.resume() == 4
    list(again.run())
    assert sorted(done + asked) == list(range(64))


def test_a_checkpoint_with_another_number_of_steps_is_refused(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    kept = trainer(tiny_pretrained, tiny_rows, OptimConfig(batch_size=16)).state_dict()
    with pytest.raises(UserError, match="the checkpoint has batch_size 16, but this run has 32"):
        trainer(tiny_pretrained, tiny_rows, OptimConfig(batch_size=32)).load_state_dict(kept)


def test_accumulated_steps_train_the_same_weights_as_whole_steps(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    def weights(accumulate: int) -> dict[str, Tensor]:
        optim = OptimConfig(epochs=2, batch_size=16, learning_rate=5e-3, accumulate=accumulate)
        running = trainer(tiny_pretrained, tiny_rows, optim, options={"own_state": "linear"})
        list(running.run())
        return running.trained_weights()

    whole, parts = weights(1), weights(4)
    for name, value in whole.items():
        assert_close(parts[name], value, layers=100)  # two epochs of steps
    with pytest.raises(UserError, match=r"num_inputs × workers × accumulate \(2 × 1 × 3 = 6\).* choose 6"):
        trainer(tiny_pretrained, tiny_rows, OptimConfig(batch_size=4, accumulate=3))


def test_each_part_of_a_step_uses_the_teachers_of_the_whole_step(
    tiny_pretrained: Pretrained, tiny_rows: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of an epoch repeats groups to fill up, and their inputs must not be their own negatives."""
    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=1, batch_size=24, accumulate=2))
    forward, twins = running.train_step.forward, []

    def checked(
        batch: FeatureBatch, groups: Tensor, teachers: Tensor, warmup: bool, candidates: ContrastSet
    ) -> dict[str, Tensor]:
        own = groups.numel()
        assert batch.teacher_vectors is not None
        assert torch.equal(teachers, batch.teacher_vectors[groups].float())
        assert candidates.rows is not None
        assert torch.equal(candidates.vectors[candidates.first :][:own], teachers.flatten(0, 1))
        everything = running.train_data.batch(candidates.rows).teacher_vectors
        assert_close(candidates.vectors, everything)
        twins.append(len(candidates.rows) - len(candidates.rows.unique()))
        return forward(batch, groups, teachers, warmup, candidates)

    monkeypatch.setattr(running.train_step, "forward", checked)
    list(running.run())
    assert sum(map(bool, twins)) == 2, "repeated inputs occur in both parts of one step"


def test_steps_are_reported_without_warnings(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    reported: list[tuple[int, int]] = []
    tokens = 0

    def on_step(step: int, total: int, metrics: dict) -> None:
        nonlocal tokens
        reported.append((step, total))
        tokens += metrics["tokens"]

    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=1, batch_size=16), on_step=on_step)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*requires_grad.*")
        list(running.run())
    assert reported == [(step, 4) for step in range(1, 5)]
    assert tokens == sum(len(row["text"].split()) + 2 for row in tiny_rows[:64])


def test_the_learning_rate_rises_then_falls_to_zero(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=5, batch_size=16, warmup_share=0.2))
    rates = [running._rate(step) for step in range(21)]  # 20 steps, 4 of them warm-up
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == 0.0


def test_a_loss_that_is_not_finite_ends_the_run(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    running = trainer(tiny_pretrained, tiny_rows, OptimConfig(epochs=3, batch_size=16, learning_rate=1e30))
    with pytest.raises(UserError, match=r"in epoch \d; lower learning_rate \(now 1e\+30\)"):
        list(running.run())


def test_a_batch_that_cannot_be_divided_into_groups_is_refused(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    with pytest.raises(UserError, match=r"batch_size \(15\) must be divisible"):
        trainer(tiny_pretrained, tiny_rows, OptimConfig(batch_size=15))


@pytest.mark.parametrize(
    ("field", "value"),
    [("epochs", 0), ("learning_rate", 0.0), ("clip", -1.0), ("patience", -1), ("warmup_share", 1.0)],
)
def test_invalid_settings_are_refused(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        OptimConfig(**{field: value})  # type: ignore[arg-type]


def test_a_method_with_nothing_to_train_is_refused(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    model = MultiplexedClassifier(
        tiny_pretrained.backbone, build_method("siso", BackboneShape.of(tiny_pretrained.backbone), 1), 1
    )
    data = split(tiny_pretrained, tiny_rows)
    with pytest.raises(UserError, match="siso has no weights to train"):
        Trainer(model, data, data, FAST, LossConfig())


def test_weights_of_another_model_are_refused(tiny_pretrained: Pretrained, tiny_rows: list) -> None:
    running = trainer(tiny_pretrained, tiny_rows)
    weights = running.trained_weights()
    weights.pop("method.down.bias")
    with pytest.raises(UserError, match=r"another model: .* method\.down\.bias"):
        load_weights(running.model, weights)


@pytest.mark.parametrize("frozen_layers", [0, 1, 2])
def test_tuning_a_task_model_changes_only_what_is_above_the_frozen_layers(
    frozen_layers: int, tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        backbone=BackboneConfig(model=str(tiny_model_folder), max_length=16),
        data=DataConfig(source=str(tiny_csv)),
        method=MethodConfig("siso", 1, frozen_layers, {"tune_backbone": True}),
        optim=OptimConfig(epochs=1, batch_size=16),
        store=StoreConfig(root=str(tmp_path)),
    )
    prepared = prepare(recipe, load_task(recipe.data))
    before = snapshot(prepared.model.backbone)
    list(prepared.trainer().run())
    moved = changed(before, prepared.model.backbone)
    frozen = [f"encoder.layer.{index}." for index in range(frozen_layers)] + ["embeddings."] * (frozen_layers > 0)
    assert moved == {name for name in before if not any(word in name for word in frozen)}
    assert list(tmp_path.iterdir()) == [], "features of a tuned backbone are not stored"


def test_a_soft_prompt_is_trained_only_if_no_layer_is_frozen() -> None:
    torch.manual_seed(0)
    config = tiny_config(
        "llama", vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    backbone = LlamaBackbone(LlamaForCausalLM(config), Verbalizer(("no", "yes"), ((7,), (9,))))
    backbone.add_soft_prompt(2)
    prompt = next(value for name, value in backbone.named_parameters() if "soft_prompt" in name)
    backbone.freeze()
    backbone.unfreeze_above(1)
    assert not prompt.requires_grad
    assert all(value.requires_grad for value in backbone.layer(1).parameters())
    backbone.unfreeze_above(0)
    assert prompt.requires_grad


def test_a_recipe_runs_from_files_to_metrics(tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        backbone=BackboneConfig(model=str(tiny_model_folder), max_length=16),
        data=DataConfig(source=str(tiny_csv)),
        method=MethodConfig("revmux", 2, 1),
        optim=OptimConfig(epochs=2, batch_size=8),
        store=StoreConfig(root=str(tmp_path)),
        shuffles=3,
    )
    prepared = prepare(recipe, load_task(recipe.data))
    first = prepared.model.method.down.weight.detach().clone()  # type: ignore[union-attr]
    list(prepared.trainer().run())
    found = prepared.evaluate_test()
    assert len(found.accuracies) == 3
    assert 0.5 < prepared.cost() < 1.5
    config = prepared.adapter_config(found.metrics())
    assert (config.method, config.num_inputs, config.prefill_layers) == ("revmux", 2, 1)
    assert config.training["optim"]["epochs"] == 2
    torch.manual_seed(123)
    again = prepare(recipe, load_task(recipe.data))
    assert torch.equal(again.model.method.down.weight, first), "the adapters depend only on the recipe's seed"  # type: ignore[union-attr]


def test_a_recipe_is_checked_from_shapes_without_weights(tiny_pretrained: Pretrained) -> None:
    shape = BackboneShape.of(tiny_pretrained.backbone)
    with pytest.raises(UserError, match=r"prefill_layers is 4, .* supports 0\.\.3"):
        check(Recipe(method=MethodConfig("revmux", 2, 4)), shape)
    with pytest.raises(UserError, match=r"hidden_size \(32\) must be divisible by num_inputs \(3\)"):
        check(Recipe(method=MethodConfig("revmux", 3, 1)), shape)
    with pytest.raises(UserError, match="choose 36"):
        check(Recipe(method=MethodConfig("revmux", 4, 1)), shape, workers=9)
    with pytest.raises(UserError, match="shuffles is 0"):
        check(Recipe(shuffles=0), shape)
    check(Recipe(), shape, workers=4)


def test_labels_that_differ_from_the_task_model_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("text,label\n" + "w1 w5,yes\nw2 w6,no\n" * 20)
    recipe = Recipe(
        backbone=BackboneConfig(model=str(tiny_model_folder), max_length=16), data=DataConfig(source=str(file))
    )
    with pytest.raises(UserError, match="tiny-bert has the labels bad, good, but the data has no, yes"):
        prepare(recipe, load_task(recipe.data))


def trained(folder: str, rows: list[dict[str, str]], name: str, prefill: int, options: dict) -> dict[str, Tensor]:
    pretrained = load_pretrained(BackboneConfig(model=folder, max_length=12))
    backbone = pretrained.backbone.freeze()
    torch.manual_seed(0)
    method = build_method(name, BackboneShape.of(backbone), 2, options)
    if method.tunes_backbone:
        backbone.unfreeze_above(0)
    model = MultiplexedClassifier(backbone, method, prefill)
    optim = OptimConfig(epochs=2, batch_size=16, learning_rate=1e-3)
    running = Trainer(model, split(pretrained, rows[:60]), split(pretrained, rows[60:]), optim, LossConfig())
    reports = list(running.run())
    figures = torch.tensor([[report.metrics["train_loss"], report.metrics["selection_accuracy"]] for report in reports])
    return running.trained_weights() | {"figures": figures}


def loss_curve(folder: str, rows: list[dict[str, str]], accumulate: int, negatives: Negatives) -> Tensor:
    """Return the losses of 50 steps of 64 inputs, averaged over the workers."""
    pretrained = load_pretrained(BackboneConfig(model=folder, max_length=12))
    backbone = pretrained.backbone.freeze()
    torch.manual_seed(0)
    model = MultiplexedClassifier(
        backbone, build_method("revmux", BackboneShape.of(backbone), 2, {"own_state": "linear"}), 1
    )
    losses: list[Tensor] = []
    running = Trainer(
        model,
        split(pretrained, rows * 2),  # 160 rows: the last step of an epoch is filled up
        split(pretrained, rows[:16]),
        OptimConfig(epochs=17, batch_size=64, learning_rate=1e-3, accumulate=accumulate),
        LossConfig(infonce_weight=0.5, negatives=negatives),
        on_step=lambda step, total, metrics: losses.append(metrics["loss"]),
    )
    list(running.run())
    return mean_over_workers(torch.stack(losses[:50]))


@pytest.mark.parametrize(
    ("workers", "accumulate", "negatives"), [(2, 1, "batch"), (2, 4, "batch"), (2, 1, "group"), (3, 4, "batch")]
)
def test_several_workers_follow_the_loss_curve_of_one(
    workers: int, accumulate: int, negatives: Negatives, run_workers: Callable, tiny_model_folder: Path, tiny_rows: list
) -> None:
    """Three workers have 11, 11 and 10 of the 32 groups of a step."""
    alone = loss_curve(str(tiny_model_folder), tiny_rows, 1, negatives)
    assert alone[-1] < 0.8 * alone[0], "the loss must decrease"
    for curve in run_workers(loss_curve, workers, str(tiny_model_folder), tiny_rows, accumulate, negatives):
        assert_close(curve, alone, layers=50)  # one per step


@pytest.mark.parametrize(
    ("name", "prefill", "options"),
    [("revmux", 1, {"tune_backbone": True, "exit_layer": 2}), ("datamux", 0, {})],
)
def test_two_workers_tune_a_backbone_with_unused_weights(
    name: str, prefill: int, options: dict, run_workers: Callable, tiny_model_folder: Path, tiny_rows: list
) -> None:
    first, second = run_workers(trained, 2, str(tiny_model_folder), tiny_rows, name, prefill, options)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[weight]) for weight, value in first.items())


def frozen_and_trained(folder: str, rows: list[dict[str, str]]) -> list[float]:
    """Sums of the weights after a trainer was made, where each worker started with other ones."""
    pretrained = load_pretrained(BackboneConfig(model=folder, max_length=12))
    backbone = pretrained.backbone.freeze()
    model = MultiplexedClassifier(backbone, build_method("revmux", BackboneShape.of(backbone), 2, {}), 1)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(float(rank_and_world()[0]))
    data = split(pretrained, rows)
    Trainer(model, data, data, OptimConfig(epochs=1, batch_size=8), LossConfig())
    return [float(sum(value.sum() for value in part.parameters())) for part in (model.backbone, model.method)]


def test_workers_share_the_weights_that_are_trained_and_send_no_frozen_ones(
    run_workers: Callable, tiny_model_folder: Path, tiny_rows: list
) -> None:
    (first, trained), (second, also_trained) = run_workers(frozen_and_trained, 2, str(tiny_model_folder), tiny_rows)
    assert first == 0.0 < second
    assert trained == also_trained == 0.0


EVERY_METHOD = pytest.mark.parametrize(
    ("name", "num_inputs", "prefill_layers", "options"),
    [
        ("revmux", 2, 1, {}),
        ("revmux", 2, 1, {"exit_layer": 2, "own_state": "linear"}),
        ("revmux", 2, 1, {"tune_backbone": True}),
        ("vanilla-adapter", 2, 1, {}),
        ("only-multiplexer-reversible", 2, 1, {}),
        ("token-split", 2, 1, {}),
        ("exit-head", 1, 1, {"layer": 1}),
        ("mux-plm", 2, 0, {}),
        ("mux-plm", 2, 0, {"multiplexer": "contextual"}),
        ("siso", 1, 0, {"tune_backbone": True}),
        ("siso", 1, 2, {"tune_backbone": True}),
    ],
)


@EVERY_METHOD
def test_every_trained_weight_has_a_gradient_in_every_step(
    name: str,
    num_inputs: int,
    prefill_layers: int,
    options: dict,
    tiny_model_folder: Path,
    tiny_csv: Path,
    tmp_path: Path,
) -> None:
    """Data-parallel training of adapters waits for each of them."""
    recipe = Recipe(
        backbone=BackboneConfig(model=str(tiny_model_folder), max_length=16),
        data=DataConfig(source=str(tiny_csv)),
        method=MethodConfig(name, num_inputs, prefill_layers, options),
        store=StoreConfig(root=str(tmp_path)),
    )
    prepared = prepare(recipe, load_task(recipe.data))
    running = prepared.trainer()
    batch = prepared.train.batch(range(8))
    running.step(batch, torch.arange(8).view(-1, num_inputs))["loss"].backward()
    without = [key for key, value in prepared.model.named_parameters() if value.requires_grad and value.grad is None]
    assert without == []


@EVERY_METHOD
@pytest.mark.parametrize("half_width", [{"dtype": "bfloat16"}, {"precision": "bfloat16"}], ids=["backbone", "autocast"])
def test_half_width_trains_full_width_weights(
    half_width: dict[str, Any],
    name: str,
    num_inputs: int,
    prefill_layers: int,
    options: dict,
    tiny_model_folder: Path,
    tiny_csv: Path,
    tmp_path: Path,
) -> None:
    dtype, precision = half_width.get("dtype", "float32"), half_width.get("precision", "float32")
    recipe = Recipe(
        backbone=BackboneConfig(model=str(tiny_model_folder), max_length=16, dtype=dtype),
        data=DataConfig(source=str(tiny_csv)),
        method=MethodConfig(name, num_inputs, prefill_layers, options),
        optim=OptimConfig(epochs=6, batch_size=16, learning_rate=2e-3, precision=precision),
        loss=LossConfig(distillation_weight=1.0),
        store=StoreConfig(root=str(tmp_path)),
    )
    prepared = prepare(recipe, load_task(recipe.data))
    if dtype == "bfloat16" and prepared.model.method.tunes_backbone:
        with pytest.raises(UserError, match=r"tunes a backbone that was loaded as torch\.bfloat16"):
            prepared.trainer()
        return
    reports = list(prepared.trainer().run())
    assert {value.dtype for value in prepared.trainer().parameters} == {torch.float32}
    losses = [report.metrics["train_loss"] for report in reports]
    assert min(losses[1:]) < losses[0]
