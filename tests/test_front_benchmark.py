"""The benchmark of the front: comparable systems, rivals that compute what they claim, and tables of the right rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from serving_models import write_adapter
from tiny_models import tiny_classifier

from benchmarks.comparison.systems import Ready
from benchmarks.front import models, smaller, student
from benchmarks.front.page import front_words
from benchmarks.front.plans import plan_folder
from benchmarks.front.plot import LOOKS, plot_front
from benchmarks.front.systems import ablations, recipe_of, systems
from revmux import BackboneShape
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.ladder import Ladder
from revmux.methods import method_class
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import load_pretrained
from revmux.serving.adapters import load_adapters
from revmux.training.recipe import check

pytestmark = pytest.mark.numeric

SHAPE = BackboneShape(384, 6, 2, 384, True, 100)


def ready() -> Ready:
    nothing: Any = None
    data, store = DataConfig("tiny"), StoreConfig()
    return Ready("SST-2", nothing, nothing, data, BackboneConfig("model"), store, Path("kept"))


def test_every_system_can_be_trained_and_has_its_own_row() -> None:
    chosen = [*systems(), *ablations()]
    names = Counter((system.title, system.method.num_inputs) for system in chosen)
    assert set(names.values()) == {1}
    for system in chosen:
        check(recipe_of(system, ready(), 0), SHAPE)
    assert {system.method.name for system in chosen} <= LOOKS.keys()


def test_rivals_train_as_long_as_the_mixers_and_with_the_same_distillation() -> None:
    recipes = [recipe_of(system, ready(), 0) for system in systems()]
    mixers = [one for one in recipes if method_class(one.method.name).multiplexes()]
    least = min(one.optim.epochs for one in mixers)
    for recipe in recipes:
        assert recipe.optim.epochs >= least
        assert recipe.loss.distillation_weight == mixers[0].loss.distillation_weight
        assert recipe.optim.learning_rate == mixers[0].optim.learning_rate


@torch.no_grad()
def test_rivals_that_leave_nothing_out_are_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_classifier("bert")
    ids = torch.randint(1, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [5], [6]])).long()
    tokens = {"input_ids": ids * mask, "attention_mask": mask}
    plain = backbone(tokens)
    assert_close(models.WithoutUpperLayers(backbone, 3)(tokens), plain)
    assert not torch.allclose(models.WithoutUpperLayers(backbone, 2)(tokens), plain)
    assert not torch.allclose(models.PrunedTokens(backbone, 1)(tokens), plain)
    monkeypatch.setattr(models, "PRUNED_SHARE", 1.0)
    assert_close(models.PrunedTokens(backbone, 1)(tokens), plain)
    assert_close(models.PrunedTokens(backbone, 3)(tokens), plain)


def test_a_student_learns_with_its_lower_layers_alone(
    tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(str(tiny_csv))
    task = load_task(data)
    backbone = BackboneConfig(str(tiny_model_folder), max_length=16)
    own = Ready("toy", task, task, data, backbone, StoreConfig(root=str(tmp_path)), tmp_path)
    teacher = load_pretrained(backbone)
    split = teacher.tokenize(task.test, 16)
    monkeypatch.setattr(student, "LEARNING_RATE", 1e-2)
    monkeypatch.setattr(student, "BATCH", 8)
    learned = student.distilled_student(own, 1, 10)
    assert models.accuracy(learned, split) > models.accuracy(models.WithoutUpperLayers(teacher.backbone, 1), split)
    trained = {name for name, weight in learned.named_parameters() if weight.requires_grad}
    for (name, weight), before in zip(learned.named_parameters(), teacher.backbone.parameters(), strict=True):
        if name not in trained:
            assert torch.equal(weight, before)
    assert 0 < len(trained) < len(list(learned.parameters()))


@pytest.mark.parametrize(("rank", "types"), [(0, ["float32", "bfloat16", "int8"]), (2, ["float32", "bfloat16"])])
def test_the_ladder_of_a_plan_runs_on_each_type_of_weights(
    rank: int,
    types: list[str],
    tiny_model_folder: Path,
    tiny_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, backbone = DataConfig(str(tiny_csv)), BackboneConfig(str(tiny_model_folder), max_length=16)
    task, pretrained = load_task(data), load_pretrained(backbone)
    own = Ready("toy", task, task, data, backbone, StoreConfig(root=str(tmp_path)), tmp_path)
    home = plan_folder(own, "all systems", 0.5) / "adapters"
    home.mkdir(parents=True)
    stages = []
    for number, threshold in enumerate((0.6, 0.55), 1):
        options = {"layer": 2 * number - 1, "lora_rank": rank * (number - 1)}
        folder = write_adapter(tmp_path, pretrained, 1, 1, "exit-head", **options).rename(home / f"stage{number}-n1")
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"stage": number, "fallback_threshold": threshold}))
        stages.append({"num_inputs": 1, "threshold": threshold, "options": options})
    ladders: list[Ladder] = []
    made = smaller.Ladder
    monkeypatch.setattr(smaller, "Ladder", lambda stages: ladders.append(made(stages)) or ladders[-1])
    planned = {"systems": "all systems", "allowance": 0.5, "stages": stages}
    rows = smaller.smaller_ladder_rows(own, planned)
    assert [row["weights"] for row in rows] == types
    split = pretrained.tokenize(task.test, 16)
    whole = Ladder([one.stage for one in load_adapters(sorted(home.iterdir()), pretrained)])
    assert rows[0]["accuracy_mean"] == models.accuracy(whole, split)
    kinds = [type(ladder.backbone.layer(0).attention.self.query) for ladder in ladders]
    assert [kind is torch.nn.Linear for kind in kinds] == [name != "int8" for name in types]
    assert [ladder.backbone.dtype for ladder in ladders[:2]] == [torch.float32, torch.bfloat16]
    for ladder in ladders:
        assert [stage.threshold for stage in ladder.stages] == [0.6, 0.55]
        assert len({id(stage.model.backbone) for stage in ladder.stages}) == 1
    assert smaller.smaller_ladder_rows(own, planned | {"stages": stages[:1]}) == []


PLAIN = {"method": "siso", "num_inputs": 1, "prefill_layers": 0, "options": {}, "threshold": None}


def row(title: str, method: str, **values: Any) -> dict[str, Any]:
    base = {"table": "front", "task": "toy", "num_inputs": 1, "prefill_layers": 0, "seeds": 1, "accuracy_std": None}
    base |= {"siso_accuracy": 0.9, "siso_agreement": 0.95, "cost_counted": 0.5, "throughput_ratio": 1.9}
    return base | {"title": title, "method": method} | values


def plan(**values: Any) -> dict[str, Any]:
    head = {"method": "exit-head", "num_inputs": 1, "prefill_layers": 1, "options": {"layer": 2, "lora_rank": 8}}
    head |= {"threshold": 0.9}
    mixed = {"method": "revmux", "num_inputs": 4, "prefill_layers": 3, "options": {}, "threshold": 0.8}
    base = {"table": "plan", "task": "toy", "systems": "all systems", "allowance": 1.0, "verdict": "not proven"}
    base |= {
        "stages": [head, mixed],
        "fallback": 0.02,
        "promised_loss": 0.2,
        "promised_bound": 0.6,
        "cost_counted": 0.4,
    }
    base |= {"verified_loss": 0.3, "verified_lower": -0.2, "verified_upper": 0.8, "throughput_ratio": 2.4}
    return base | {"accuracy_mean": 0.897, "siso_accuracy": 0.9} | values


def test_the_tables_and_the_picture_show_every_row(tmp_path: Path) -> None:
    rows = [
        row("SISO", "siso", accuracy_mean=0.9, cost_counted=1.0, throughput_ratio=1.0),
        row("RevMUX l=3", "revmux", accuracy_mean=0.885, num_inputs=4, prefill_layers=3, seeds=3, accuracy_std=0.002),
        row("int8 weights", "rival", accuracy_mean=0.899, cost_counted=None, throughput_ratio=3.0),
        row("without distillation", "revmux", table="ablation", accuracy_mean=0.86, num_inputs=4, prefill_layers=3),
        plan(),
        plan(systems="without multiplexing", stages=[PLAIN], throughput_ratio=None, promised_bound=None, fallback=0.0),
    ]
    meta = {
        "data": {"toy": {"train": 1000, "choosing": 100, "test": 50}},
        "machine": {"cores": 2},
        "versions": {"torch": "2"},
        "commit": None,
    }
    words = front_words({"meta": meta, "rows": rows})
    assert "| RevMUX l=3 | 4 | 0.50 | 1.90× | 88.5 | 1.5 ± 0.2 | – | 3 |" in words["front-systems"]
    assert "| int8 weights | 1 | – | 3.00× | 89.9 | 0.1 | – | 1 |" in words["front-systems"]
    assert "| strong | 88.5 | 1.5 ± 0.2 | 95.0 | 3 |" in words["front-ablation"]
    assert "| without distillation | 86.0 | 4.0 | 95.0 | 1 |" in words["front-ablation"]
    served = "exit head with LoRA, layer 2 → revmux N=4 l=3 → plain model"
    assert f"| toy | 1 | {served} | 2.40× | 0.30 (-0.20 to 0.80) | not proven |" in words["front"]
    assert "without multiplexing" not in words["front"]
    assert "| toy | 1 | without multiplexing | plain model | 0% |" in words["front-plans"]
    assert "toy 1,000 / 100 / 50" in words["front"]
    plot_front(rows, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000
