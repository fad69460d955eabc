"""The systems of the front, all on the same frozen task model: multiplexers, their skip-only controls, and their rivals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.comparison.systems import Ready, System, build_recipe
from benchmarks.front.tasks import TASKS
from revmux.methods import method_class
from revmux.training.config import MethodConfig, Recipe
from revmux.training.recipe import exit_head_config

SEEDS = 3
SHUFFLES = 10
"""Groupings of the test split in the evaluation of an adapter; the choosing set needs only one after training."""
EXIT_EPOCHS = 3
"""Exit heads on stored states train this many times as long as other adapters, since their epochs cost little."""


def lora_exit(layer: int, prefill_layers: int = 1) -> MethodConfig:
    """An exit head with LoRA in the layers between the cut and the exit."""
    return MethodConfig("exit-head", 1, prefill_layers, {"layer": layer, "lora_rank": 8})


def systems(num_layers: int = 6) -> Iterator[System]:
    """The systems, those with the most to say first."""
    half = num_layers // 2
    for inputs in (2, 4, 8):
        yield System(f"RevMUX l={half}", MethodConfig("revmux", inputs, half), first=True)
    for layer in (2, 3):
        yield System(f"Exit head with LoRA, layer {layer}", lora_exit(layer), first=True)
    yield System("RevMUX l=1", MethodConfig("revmux", 4, 1))
    yield System("Token split l=1", MethodConfig("token-split", 4, 1))
    for layer in (half, 1):
        control = MethodConfig("skip-only", 1, layer, {"layer": layer})
        yield System(f"Skip-only, layer {layer}", control, first=layer == half)
    for layer in range(1, num_layers):
        yield System(f"Exit head, layer {layer}", exit_head_config(layer))
    yield System("RevMUX l=1", MethodConfig("revmux", 8, 1))
    yield System("RevMUX l=2", MethodConfig("revmux", 4, 2))
    yield System("RevMUX l=2", MethodConfig("revmux", 8, 2))
    yield System("Skip-only, layer 2", MethodConfig("skip-only", 1, 2, {"layer": 2}))
    yield System("Token split l=2", MethodConfig("token-split", 4, 2))
    kept = {"ratio": 4, "kept_tokens": 2}
    yield System("Token split l=1, 2 tokens kept", MethodConfig("token-split", 1, 1, kept))
    yield System("Exit head with LoRA, layer 4", lora_exit(4))
    yield System(f"RevMUX l={half}", MethodConfig("revmux", 16, half))
    yield System("RevMUX l=1", MethodConfig("revmux", 2, 1))
    yield System(f"Vanilla adapter l={half}", MethodConfig("vanilla-adapter", 4, half))
    yield System(f"Only multiplexer reversible l={half}", MethodConfig("only-multiplexer-reversible", 4, half))


def ablations(num_layers: int = 6) -> Iterator[System]:
    """RevMUX with N = 4 at l = L/2 without one part of the recipe each, and with LoRA."""
    half = num_layers // 2
    whole = {"activation": "gelu", "up": "zero", "own_state": "attention"}

    def variant(title: str, change: dict[str, Any], **settings: Any) -> System:
        method = MethodConfig("revmux", 4, half, {**whole, **change})
        return System(title, method, options=False, ablation=True, **settings)

    yield variant("without distillation", {}, loss={"distillation_weight": 0.0})
    yield variant("without InfoNCE", {}, loss={"infonce_weight": 0.0})
    yield variant("without the own-state correction", {"own_state": "none"})
    yield variant("own-state correction by the mean over the tokens", {"own_state": "mlp"})
    yield variant("up-projection that starts as the inverse", {"up": "inverse"})
    yield variant("the paper's up-projection", {"up": "mlp"})
    yield variant("with LoRA of rank 8", {"lora_rank": 8})
    plain = {"activation": "relu", "up": "mlp", "own_state": "none"}
    yield variant("the paper's form and loss", plain, loss={"distillation_weight": 0.0, "infonce_weight": 0.25})


def recipe_of(system: System, ready: Ready, seed: int) -> Recipe:
    """The recipe of one run."""
    method = system.method
    epochs = TASKS[ready.name].epochs_of(method.num_inputs)
    if method_class(method.name).exit_option is not None and not method.options.get("lora_rank"):
        epochs *= EXIT_EPOCHS
    return build_recipe(system, ready, epochs, seed, shuffles=1, precision="bfloat16")
