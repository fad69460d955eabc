"""Named recipes: what they contain, and how jobs and their settings use them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_jobs.cli import parse
from ray_jobs.training.config import TrainJob
from revmux import BackboneShape, UserError, build_method
from revmux.methods import method_class, method_names
from revmux.training.config import LossConfig
from revmux.training.recipes import named_recipe, recipe_names

SHAPE = BackboneShape(64, 4, 2, 64, True, 100)


def test_the_included_recipes_fit_the_methods() -> None:
    assert recipe_names() == ["paper", "strong"]
    for name in recipe_names():
        recipe = named_recipe(name)
        assert set(recipe.options) <= set(method_names())
        for method in recipe.options:
            build_method(method, SHAPE, method_class(method).fixed_num_inputs or 2, recipe.options_of(method))


def test_the_paper_trains_without_distillation_and_corrections() -> None:
    paper = named_recipe("paper")
    assert paper.loss_config() == LossConfig(infonce_weight=0.25)
    assert (paper.optim_config().learning_rate, paper.optim_config().epochs) == (2e-5, 50)
    assert all(not paper.options_of(method) for method in method_names())


def test_a_job_starts_from_its_recipe_and_settings_override_it() -> None:
    job = parse(TrainJob, None, ["--optim.epochs", "7"], prog="train")
    strong = named_recipe("strong")
    assert job.optim == strong.optim_config(epochs=7)
    assert job.loss == strong.loss_config()
    assert job == TrainJob(optim=strong.optim_config(epochs=7))
    recipe = next(iter(job.recipes().values()))
    assert (recipe.name, recipe.method.options) == ("strong", strong.options_of("revmux"))
    job = parse(TrainJob, None, ["--recipe", "paper", "--loss.temperature", "1", "--method.options", "{up: inverse}"])
    assert job.optim == named_recipe("paper").optim_config()
    assert job.loss == LossConfig(infonce_weight=0.25, temperature=1)
    assert next(iter(job.recipes().values())).method.options == {"up": "inverse"}


def test_a_file_can_be_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("optim: {epochs: 3}\noptions:\n  revmux: {own_state: linear}\n")
    job = parse(TrainJob, None, ["--recipe", str(file)])
    assert job.optim.epochs == 3
    assert next(iter(job.recipes().values())).method.options == {"own_state": "linear"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {epoch: 3}", "epoch"),
        ("optim: {epochs: 0}", "epochs is 0"),
        ("losses: {}", "unknown keys: losses; choose from optim, loss, options"),
        ("optim: 3", "not a mapping of mappings"),
        ("optim: {", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        named_recipe(str(file))


def test_an_unknown_recipe_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainJob, None, ["--recipe", "weak"])
    assert "unknown recipe 'weak'; known: paper, strong" in capsys.readouterr().err
