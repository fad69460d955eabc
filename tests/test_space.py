"""Search spaces: their points on a backbone, and spaces that are refused before a cluster starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ray_jobs.cli import parse
from ray_jobs.sweep.config import TuneJob
from ray_jobs.sweep.run import base_recipe
from revmux import UserError
from revmux.methods import BackboneShape
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import inspect
from revmux.training.config import OptimConfig, Recipe
from revmux.training.recipes import named_recipe
from tune_spaces.points import valid_points
from tune_spaces.space import SearchSpace, load_space, space_names

SHAPE = BackboneShape(768, 12, 2, 768, shared_answer=True, vocab_size=1000)
RECIPE = Recipe(optim=OptimConfig(batch_size=8))


def test_every_space_of_the_project_has_points_on_the_embedded_backbone() -> None:
    shape, _ = inspect(BackboneConfig())
    assert space_names() == ["paper", "plan", "quick", "wide"]
    for name in space_names():
        points, _ = valid_points(load_space(name), RECIPE, shape, 1)
        assert len({repr(point) for point in points}) == len(points) > 1


def test_the_paper_space_cuts_every_backbone_in_the_middle() -> None:
    for layers, cuts in ((12, {0, 3, 6}), (32, {0, 8, 16}), (6, {0, 2, 3})):
        points, left_out = valid_points(load_space("paper"), RECIPE, replace(SHAPE, num_layers=layers), 1)
        assert {point.method.prefill_layers for point in points} == cuts
        assert {point.method.num_inputs for point in points} == {2, 4, 8, 16}
        assert not left_out


def test_the_paper_space_trains_the_paper_s_recipe_whatever_the_job_s_is() -> None:
    job = replace(RECIPE, name="strong", loss=named_recipe("strong").loss_config())
    points, _ = valid_points(load_space("paper"), job, SHAPE, 1)
    for point in points:
        assert point.name == "paper"
        assert (point.optim.epochs, point.optim.learning_rate, point.optim.batch_size) == (50, 2e-5, 32)
        assert (point.loss.distillation_weight, point.method.options) == (0.0, {})


def test_a_command_with_the_paper_space_trains_the_paper_s_recipe_with_the_given_settings() -> None:
    flags = ["--space", "paper", "--optim.precision", "bfloat16"]
    job = parse(TuneJob, None, flags)
    assert (job.recipe, job.optim) == ("paper", named_recipe("paper").optim_config(precision="bfloat16"))
    assert job.loss == named_recipe("paper").loss_config()
    job = parse(TuneJob, None, [*flags, "--optim.learning_rate", "1e-4", "--optim.batch_size", "16"])
    points, _ = valid_points(load_space("paper"), base_recipe(job), SHAPE, 1)
    found = {(point.optim.learning_rate, point.optim.batch_size, point.optim.epochs) for point in points}
    assert found == {(1e-4, 16, 50)}


def test_a_recipe_that_the_space_replaces_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("optim: {epochs: 2}\n")
    for recipe in (str(own), "strong"):
        with pytest.raises(SystemExit):
            parse(TuneJob, None, ["--space", "paper", "--recipe", recipe])
        assert "the space 'paper' sets the recipe 'paper'; omit --recipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plan", "wide"])
def test_every_layer_and_every_kind_of_system_competes_with_equal_epochs(name: str) -> None:
    """The default space of plans is not built so that one kind must win."""
    strong = named_recipe("strong")
    job = replace(RECIPE, name="strong", optim=strong.optim_config(), loss=strong.loss_config())
    points, left_out = valid_points(load_space(name), job, SHAPE, 1)
    assert not left_out
    assert {point.optim.epochs for point in points} == {strong.optim_config().epochs}
    assert {point.loss.distillation_weight for point in points} == {strong.loss_config().distillation_weight}
    for method in ("revmux", "token-split"):
        found = {
            (point.method.num_inputs, point.method.prefill_layers) for point in points if point.method.name == method
        }
        assert found == {(inputs, layers) for inputs in (2, 4, 8) for layers in range(1, 12)}
    heads = [point.method for point in points if point.method.name == "exit-head"]
    exits = {(head.options["layer"], head.prefill_layers, head.options.get("lora_rank", 0)) for head in heads}
    plain, adapted = (
        {(layer, layer, 0) for layer in range(1, 12)},
        {(layer, max(0, layer - 2), 8) for layer in range(1, 12)},
    )
    assert exits == plain | adapted
    assert all(head.options["attention_pooling"] for head in heads), "options of the recipe"


def test_the_wide_space_has_an_exit_head_at_every_layer() -> None:
    points, _ = valid_points(load_space("wide"), RECIPE, SHAPE, 1)
    heads = [point for point in points if point.method.name == "exit-head"]
    assert {point.method.options["layer"] for point in heads} == set(range(1, 12))
    assert {(point.method.num_inputs, point.loss.infonce_weight) for point in heads} == {(1, 0.0)}


def test_invalid_points_are_skipped_with_the_reason() -> None:
    space = SearchSpace(num_inputs=[2, 5], prefill_layers=[3, 13])
    points, left_out = valid_points(space, RECIPE, SHAPE, 1)
    assert [(point.method.num_inputs, point.method.prefill_layers) for point in points] == [(2, 3)]
    assert len(left_out) == 3
    assert any("0..12" in reason for reason in left_out)
    assert any("768" in reason and "5" in reason for reason in left_out)


def test_a_space_without_a_valid_point_is_refused() -> None:
    with pytest.raises(UserError, match=r"no valid point.*prefill_layers is 13"):
        valid_points(SearchSpace(prefill_layers=[13]), RECIPE, SHAPE, 1)
    with pytest.raises(UserError, match=r"unknown method .revmax.; known"):
        valid_points(SearchSpace(methods=["revmax"]), RECIPE, SHAPE, 1)


def test_a_random_search_is_reproducible() -> None:
    space = replace(load_space("wide"), search="random", trials=7)
    first, second = (valid_points(space, RECIPE, SHAPE, 1)[0] for _ in range(2))
    assert first == second
    assert len(first) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_inputs: []", "num_inputs is empty"),
        ("num_input: [2]", "unknown keys: num_input"),
        ("num_inputs: 2", "give a list"),
        ("num_inputs: [two]", "num_inputs"),
        ("prefill_layers: [1.5]", "layer 1.5"),
        ("{methods: [exit-head], exit_adapted: [-1]}", "exit_adapted"),
        ("recipe: strongest", "recipe"),
        ("trials: 0", "trials is 0"),
        ("search: bayes", "search"),
        ("just words", "write keys"),
        ("[", "not valid YAML"),
    ],
)
def test_a_custom_space_is_checked(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_space(str(tmp_path / "mine.yaml")).points(RECIPE, 12)


def test_an_unknown_space_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="paper, plan, quick, wide"):
        load_space("huge")
