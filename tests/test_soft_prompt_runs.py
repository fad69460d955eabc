"""Soft prompts of language models, from tuning to served answers, on tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from numeric import assert_close
from prompted_recipes import FAMILIES, PROMPT, TEXTS, backbone, prepared, recipe

from ray_jobs.training.config import FinetuneJob
from revmux import UserError
from revmux.adapters.folder import save_adapter
from revmux.data.config import DataConfig
from revmux.data.prompt import Prompt
from revmux.estimate.shapes import meta_backbone
from revmux.features.config import StoreConfig
from revmux.pretrained.loading import load_pretrained
from revmux.pretrained.task_model import save_task_model
from revmux.serving import Engine
from revmux.training.config import LossConfig, OptimConfig, Recipe
from revmux.training.recipe import train_here

pytestmark = pytest.mark.numeric


def soft_prompt_recipe(folder: Path, source: Path, store: Path, length: int = 4) -> Recipe:
    job = FinetuneJob(backbone(folder), DataConfig(source=str(source)), OptimConfig(20, 64, 0.02), soft_prompt=length)
    return replace(job.recipe(), store=StoreConfig(root=str(store)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_soft_prompt_is_tuned_saved_and_used_with_adapters(
    family: str, language_model: Callable[[str], Path], tiny_csv: Path, tmp_path: Path
) -> None:
    ready = prepared(soft_prompt_recipe(language_model(family), tiny_csv, tmp_path / "store"))
    before = {name: value.clone() for name, value in ready.model.state_dict().items()}
    trainer = ready.trainer()
    reports = list(trainer.run())
    # Both families reach about 0.6 of the first loss; how far exactly depends on rounding.
    assert reports[-1].metrics["train_loss"] < 0.9 * reports[0].metrics["train_loss"]
    after = ready.model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"backbone.soft_prompt.vectors"}

    tuned = save_task_model(ready.pretrained, tmp_path / "task-model")
    loaded = load_pretrained(backbone(tuned, None))
    assert loaded.prompt == PROMPT
    with torch.no_grad():
        expected = ready.pretrained.backbone.eval()(ready.pretrained.encode(TEXTS))
        assert_close(loaded.backbone.freeze()(loaded.encode(TEXTS)), expected)
    assert meta_backbone(str(tuned)).max_length == 40 - 4
    plain = load_pretrained(backbone(language_model(family)))
    assert loaded.identity["sha256"] != plain.identity["sha256"], "another soft prompt changes the identity"
    with pytest.raises(UserError, match="was tuned with prompt mine, not other"):
        load_pretrained(backbone(tuned, replace(PROMPT, name="other", template="{text}")))
    with pytest.raises(UserError, match=r"max_length is 37, .* accepts at most 36 tokens"):
        load_pretrained(backbone(tuned, None, max_length=37))

    adapters = prepared(
        recipe(tuned, tiny_csv, tmp_path / "store", backbone=backbone(tuned, None), loss=LossConfig(infonce_weight=0.0))
    )
    assert_close(
        adapters.test.batch(range(3)).teacher_scores,
        loaded.backbone(loaded.encode(adapters.task.test["text"][:3])).detach(),
    )
    train_here(adapters)
    folder = save_adapter(adapters.model, adapters.adapter_config({}), tmp_path / "adapter")
    with Engine(loaded, [folder]) as engine:
        own = engine.submit(TEXTS[:1], max_multiplex=1)[0].result(60)
    assert_close(own.scores, expected[0])


@pytest.mark.parametrize(
    ("family", "prompt", "length", "message"),
    [
        ("t5", None, 4, r"--backbone\.prompt"),
        ("t5", PROMPT, 39, "max_length is 24, but .* accepts at most 1 tokens"),
        ("t5", PROMPT, -1, "soft_prompt is -1; choose 0"),
    ],
)
def test_invalid_soft_prompts_are_refused(
    family: str,
    prompt: Prompt | None,
    length: int,
    message: str,
    language_model: Callable[[str], Path],
    tiny_csv: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=message):
        prepared(
            replace(
                soft_prompt_recipe(language_model(family), tiny_csv, tmp_path, length),
                backbone=backbone(language_model(family), prompt),
            )
        )


def test_a_soft_prompt_for_an_encoder_is_refused(tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path) -> None:
    running = soft_prompt_recipe(tiny_model_folder, tiny_csv, tmp_path)
    with pytest.raises(
        UserError, match="soft_prompt is 4, but bert does not support soft prompts; choose a language model"
    ):
        prepared(replace(running, backbone=backbone(tiny_model_folder, None)))
