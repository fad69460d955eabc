"""From a recipe to a trained model: what is checked first, and which weights each method trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from tiny_training import changed, snapshot
from transformers import LlamaForCausalLM

from revmux import BackboneShape, UserError
from revmux.backbone.llama import LlamaBackbone
from revmux.backbone.verbalizer import Verbalizer
from revmux.data.config import DataConfig
from revmux.data.task import load_task
from revmux.features.config import StoreConfig
from revmux.pretrained.config import BackboneConfig, Dtype
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import LossConfig, MethodConfig, OptimConfig, Recipe
from revmux.training.recipe import check, prepare

pytestmark = pytest.mark.numeric


@pytest.fixture
def recipe_of(tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Makes a recipe for a method on the tiny task model."""

    def make(method: MethodConfig, dtype: Dtype = "float32", **settings: Any) -> Recipe:
        backbone = BackboneConfig(model=str(tiny_model_folder), max_length=16, dtype=dtype)
        store = StoreConfig(root=str(tmp_path))
        return Recipe(backbone, DataConfig(source=str(tiny_csv)), method, store=store, **settings)

    return make


@pytest.mark.parametrize("frozen_layers", [0, 1, 2])
def test_tuning_a_task_model_changes_only_what_is_above_the_frozen_layers(
    frozen_layers: int, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    method = MethodConfig("siso", 1, frozen_layers, {"tune_backbone": True})
    recipe = recipe_of(method, optim=OptimConfig(epochs=1, batch_size=16))
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


def test_a_recipe_runs_from_files_to_metrics(recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(MethodConfig("revmux", 2, 1), optim=OptimConfig(epochs=2, batch_size=8), shuffles=3)
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
    recipe_of: Callable[..., Recipe],
) -> None:
    """Data-parallel training of adapters waits for each of them."""
    recipe = recipe_of(MethodConfig(name, num_inputs, prefill_layers, options))
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
    recipe_of: Callable[..., Recipe],
) -> None:
    dtype, precision = half_width.get("dtype", "float32"), half_width.get("precision", "float32")
    recipe = recipe_of(
        MethodConfig(name, num_inputs, prefill_layers, options),
        dtype,
        optim=OptimConfig(epochs=6, batch_size=16, learning_rate=2e-3, precision=precision),
        loss=LossConfig(distillation_weight=1.0),
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
