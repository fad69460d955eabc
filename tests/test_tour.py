"""The quickstart's output and its plain parts; the whole tour runs as a long test."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from decoder_ladder import MAX_LENGTH, write_decoder_ladder
from polling import wait_until
from serving_http import free_port

import ray_jobs
from ray_jobs.cli import parse
from ray_jobs.tour.config import QuickstartJob
from ray_jobs.tour.live import LiveAnswer, answered_by, examples
from ray_jobs.tour.run import exit_layers, folder_name, run_tour, system_name
from ray_jobs.tour.screen import Screen, quiet
from ray_jobs.tracking.config import TrackingConfig
from ray_jobs.training.progress_board import Progress
from revmux import BackboneShape, UserError
from revmux.data.config import DataConfig
from revmux.plan.config import Goal, MeasureConfig
from revmux.pretrained.config import BackboneConfig
from revmux.training.config import OptimConfig
from revmux.training.recipe import check


class Terminal(io.StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def show(screen: Screen, written: io.StringIO) -> str:
    """Show a step with a table and with work whose progress reaches the screen."""
    read: list[Mapping[str, Progress]] = []

    def progress() -> Mapping[str, Progress]:
        read.append({"revmux-n2": Progress(3, 10, "loss 0.5"), "hidden": Progress(1, 2)})
        return read[-1]

    with screen.step("Adapters", "Training [two] of them."):
        with screen.working(progress, "Starting", {"revmux-n2": "RevMUX N=2"}):
            wait_until(lambda: len(read) > 2 and "3/10" in written.getvalue().replace(" of ", "/"))
        screen.table(["system", "cost"], [["RevMUX [N=2]", "0.75"], ["exit head", "0.5"]], ["cost"])
    return written.getvalue()


@pytest.mark.parametrize("terminal", ["", "dumb"])
def test_without_a_capable_terminal_the_screen_writes_plain_lines(
    terminal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", terminal or "xterm-256color")
    written = Terminal() if terminal else io.StringIO()
    text = show(Screen(written, steps=3, interval=0.05), written)
    assert text.isascii()
    assert all(character.isprintable() or character == "\n" for character in text), "no control codes"
    lines = [line.rstrip() for line in text.splitlines()]
    assert "Step 1 of 3  Adapters" in lines
    assert "   Training [two] of them." in lines
    assert "   RevMUX N=2 3 of 10 (0 s)" in lines
    assert "hidden" not in text
    assert [line.split() for line in lines if "RevMUX [N=2]" in line] == [["RevMUX", "[N=2]", "0.75"]]


def test_on_a_terminal_the_screen_draws_bars_and_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    written = Terminal()
    text = show(Screen(written, steps=3), written)
    assert "\x1b[" in text
    assert "RevMUX N=2" in text
    assert "3/10" in text
    assert "loss 0.5" in text


def test_what_libraries_print_goes_to_the_log_and_not_to_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(io.StringIO())
    log = tmp_path / "logs" / "quickstart.log"
    with quiet(log):
        print("a worker's line")
        print("an error line", file=sys.stderr)
        screen.line("a step")
    print("after")
    assert capsys.readouterr().out == "after\n"
    text = log.read_text()
    assert "a worker's line" in text
    assert "an error line" in text
    assert "a step" not in text


def answer(label: str, truth: str, width: int, method: str = "revmux") -> LiveAnswer:
    return LiveAnswer("some text", label, 0.9, truth, width, method)


def test_live_answers_are_counted_by_method_and_width() -> None:
    answers = [answer("good", "good", 1, "exit-head"), *[answer("good", "bad", 4)] * 8, *[answer("bad", "bad", 2)] * 3]
    assert answered_by(answers) == "1 by exit-head alone, 3 by revmux in groups of 2, 8 by revmux in groups of 4"
    assert sum(one.is_right for one in answers) == 4
    assert len(list(examples(answers, 5))) == 5


def test_exit_heads_are_on_a_third_half_and_two_thirds_of_the_layers() -> None:
    assert exit_layers(6) == [2, 3, 4]
    assert exit_layers(12) == [4, 6, 8]
    assert exit_layers(2) == [1]


def test_the_settings_of_make_llama_fit_the_model() -> None:
    """Parsed as make llama does, and checked against the shape of smollm2-135m, whose weights are not needed."""
    root = Path(ray_jobs.__file__).parents[1]
    recipe = (root / "Makefile").read_text().partition("\nllama: $(READY)")[2].partition("\n\n")[0]
    (config,) = re.findall(r"ray_jobs.quickstart --config (\S+)", recipe)
    job = parse(QuickstartJob, "", ["--config", str(root / config), "--backbone.prompt", "sst2-few-shot"], "quickstart")
    assert (job.data.test_share, job.data.selection_share) == tuple(
        float(re.findall(rf"--data.{name} (\S+)", recipe)[0]) for name in ("test_share", "selection_share")
    ), "the prompt is calibrated on the tour's own selection set"
    shape = BackboneShape(576, 30, 2, readout_size=576, shared_answer=False, vocab_size=49152)
    recipes = job.recipes(job.plan_job("smollm2-135m", TrackingConfig(), Path("runs")), job.exit_layers or [], 15)
    for one in recipes:
        check(one, shape)
    mixer, head = (one.method for one in recipes)
    assert (mixer.name, mixer.num_inputs, mixer.prefill_layers) == ("revmux", 2, 15)
    assert (head.name, head.prefill_layers, head.options["layer"], head.options["lora_rank"]) == ("exit-head", 8, 12, 8)
    assert (system_name(head), folder_name(head)) == ("exit head at layer 12", "exit-head-n1-l12")


@pytest.mark.parametrize(
    "settings", [{"port": 0}, {"prefill_layers": -1}, {"requests": 0}, {"shuffles": 0}, {"exit_adapted": -1}], ids=str
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        QuickstartJob(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_inputs": [2, 3]}, "must be divisible by num_inputs"),
        ({"prefill_layers": 99}, "prefill_layers"),
        ({"recipe": "nowhere"}, "unknown recipe 'nowhere'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_before_the_first_step(
    settings: dict[str, Any], says: str, tiny_model_folder: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    written = io.StringIO()
    job = QuickstartJob(
        backbone=BackboneConfig(model=str(tiny_model_folder), max_length=16),
        data=DataConfig(source=str(tiny_csv)),
        port=free_port(),
        storage=str(tmp_path),
        **settings,
    )
    with pytest.raises(UserError, match=says):
        run_tour(job, Screen(written))
    assert "Step" not in written.getvalue()


def tiny_tour(rows: list[dict[str, str]], folder: Path, **settings: Any) -> str:
    """Run a small tour, and return what it writes."""
    data = folder / "tiny.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows * 3))
    written = io.StringIO()
    job = QuickstartJob(
        data=DataConfig(source=str(data)),
        num_inputs=[2],
        optim=OptimConfig(epochs=1, batch_size=16),
        measure=MeasureConfig(shuffles=1, throughput_inputs=0, throughput_pairs=1),  # timings of a tiny model are noise
        requests=6,
        port=free_port(),
        storage=str(folder / "tour"),
        **settings,
    )
    run_tour(job, Screen(written))
    return written.getvalue()


@pytest.mark.long
@pytest.mark.cluster("serve")
def test_the_whole_tour_on_a_tiny_model(
    tiny_model_folder: Path, tiny_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """The tiny model has a head, so that it is not tuned."""
    text = tiny_tour(
        tiny_rows,
        tmp_path,
        backbone=BackboneConfig(model=str(tiny_model_folder), max_length=16),
        goal=Goal(allowance=100.0),
    )
    assert [line for line in text.splitlines() if line.startswith("Step")] == [
        f"Step {number} of 6  {title}"
        for number, title in enumerate(
            ("Data", "Features", "Adapters and exit heads", "Plan", "Server", "Report"), start=1
        )
    ]
    assert "\x1b" not in text
    found = json.loads((tmp_path / "tour" / "results.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"siso", "revmux", "exit-head"}
    assert found["live"]["requests"] == 6
    assert found["plan"], "something fits an allowance of 100 points"
    folders = [stage["adapter"] for system in found["plan"] for stage in system["stages"]]
    assert folders
    assert all(folder.startswith("plans/") for folder in folders), "relative to the storage folder"
    for name in (
        "front.png",
        "plans/quickstart/plan.md",
        "adapters/revmux-n2-l1/adapter_config.json",
        "logs/quickstart.log",
    ):
        assert (tmp_path / "tour" / name).is_file(), name


@pytest.mark.long
@pytest.mark.cluster("serve")
def test_a_tour_on_a_decoder_serves_the_plain_model_with_its_prompt(
    tiny_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    """The throughput that is wanted cannot be reached, so no adapter records the prompt for the server."""
    ladder = write_decoder_ladder(tmp_path)
    text = tiny_tour(
        tiny_rows,
        tmp_path,
        backbone=BackboneConfig(str(ladder.model), max_length=MAX_LENGTH, prompt=str(ladder.prompt)),
        prefill_layers=1,
        exit_layers=[2],
        exit_adapted=1,
        goal=Goal(throughput=1000.0),
    )
    assert "The plain model is served" in text
    assert "6 by plain model alone" in text
    assert f"--model {ladder.model} --prompt {tmp_path / 'tour' / 'prompt.yaml'}" in text
    assert (tmp_path / "tour" / "adapters" / "exit-head-n1-l2" / "adapter_config.json").is_file()
