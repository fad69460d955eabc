"""The systems of the LLaMA benchmark on the frozen teacher: multiplexers, their controls, and early exits."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.comparison.systems import Ready, System, build_recipe
from revmux.methods import method_class
from revmux.training.config import MethodConfig, Recipe
from revmux.training.recipe import exit_head_config

BATCH, LEARNING_RATE, RANK = 32, 1e-3, 8
SHUFFLES = 1
MOST_EPOCHS = 8
DEPTH = 30
"""Layers of smollm2-135m."""
CUTS = (3, 6, 10, 15, 20)
LORA_EXITS = {6: 3, 10: 3, 12: 6, 15: 6, 20: 10}
"""Exit layers with LoRA, and the layer below which nothing changes."""
WIDTHS = (2, 4, 8)
PAPER_LAMBDA = 0.5
"""The paper's λ for LLaMA."""


def stored_layers() -> list[int]:
    """The layers whose states the systems on the teacher read."""
    return sorted({*CUTS, *LORA_EXITS, *LORA_EXITS.values()})


def lora_exit(layer: int) -> System:
    """An exit head with LoRA in the layers below it."""
    method = MethodConfig("exit-head", 1, LORA_EXITS[layer], {"layer": layer, "lora_rank": RANK})
    return System(f"Exit head with LoRA, layer {layer}", method)


def skip_only(layer: int) -> System:
    """The control of every multiplexer with the same cut."""
    return System(f"Skip-only, layer {layer}", MethodConfig("skip-only", 1, layer, {"layer": layer}))


def mixer(title: str, name: str, layer: int, width: int) -> System:
    """A multiplexer with the recipe strong."""
    return System(f"{title} l={layer}", MethodConfig(name, width, layer))


def paper_form(title: str, name: str, layer: int, width: int) -> System:
    """A multiplexer with the paper's form and loss, trained by the same optimizer as all others."""
    loss = {"infonce_weight": PAPER_LAMBDA}
    return System(f"{title} l={layer}, paper's form and loss", MethodConfig(name, width, layer), "paper", loss)


def systems() -> Iterator[System]:
    """All systems, those with the most to say first; every one once."""
    seen: set[tuple[str, int]] = set()
    for system in _systems():
        key = (system.title, system.method.num_inputs)
        if key not in seen:
            seen.add(key)
            yield system


def _systems() -> Iterator[System]:
    half = DEPTH // 2
    baselines = (
        ("Vanilla adapters", "vanilla-adapter"),
        ("Only multiplexer reversible", "only-multiplexer-reversible"),
    )
    yield mixer("RevMUX", "revmux", half, 2)
    yield skip_only(half)
    yield from (lora_exit(12), lora_exit(half))
    yield mixer("Token split", "token-split", half, 2)
    yield from (mixer("RevMUX", "revmux", half, width) for width in WIDTHS)
    yield from (System(f"Exit head, layer {layer}", exit_head_config(layer)) for layer in (12, half, 20, 10, 6, 3))
    for layer in (20, 10):
        yield from (mixer("RevMUX", "revmux", layer, 2), skip_only(layer), lora_exit(layer))
    alone = MethodConfig("revmux", 2, half, {"own_state": "none"})
    yield System(f"RevMUX l={half}, without the own-state correction", alone)
    for title, name in (("RevMUX", "revmux"), *baselines):
        yield paper_form(title, name, half, 2)
    for title, name in baselines:
        yield from (mixer(title, name, half, width) for width in WIDTHS)
    yield from (mixer("Token split", "token-split", half, width) for width in WIDTHS)
    for layer in (20, 10, 6, 3):
        yield skip_only(layer)
        for width in WIDTHS:
            yield mixer("RevMUX", "revmux", layer, width)
            yield mixer("Token split", "token-split", layer, width)
    yield from (lora_exit(layer) for layer in LORA_EXITS)


def epochs_of(method: MethodConfig) -> int:
    """Epochs such that every system runs the same number of layers in training: half a model per input.

    Systems that run no layer, such as exit heads on stored states, get :data:`MOST_EPOCHS`.
    """
    option = method_class(method.name).exit_option
    last = DEPTH if option is None else int(method.options[option])
    layers = (last - method.prefill_layers) / method.num_inputs
    return MOST_EPOCHS if layers == 0 else max(1, min(MOST_EPOCHS, round(DEPTH / 2 / layers)))


def recipe_of(system: System, ready: Ready, seed: int) -> Recipe:
    """The recipe of one run."""
    optim = {"batch_size": BATCH, "learning_rate": LEARNING_RATE, "warmup_share": 0.05}
    return build_recipe(system, ready, epochs_of(system.method), seed, SHUFFLES, **optim)
