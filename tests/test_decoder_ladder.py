"""A ladder on a decoder with a chat prompt: exact answers over HTTP, and the memory that it takes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from itertools import chain

import httpx
import pytest
import torch
from decoder_ladder import (
    CONSTANT,
    MAX_LENGTH,
    TEXTS,
    DecoderLadder,
    whole_model_scores,
    write_decoder_ladder,
)
from numeric import assert_close
from safetensors.torch import load_file
from serving_http import listening
from torch import Tensor

from revmux.__main__ import main
from revmux.adapters.folder import load_adapter
from revmux.backbone.decoder import DecoderBackbone
from revmux.errors import UserError
from revmux.estimate.memory import estimate_memory
from revmux.estimate.peak import PeakMemory
from revmux.estimate.serving_memory import KeptMemory, kept_memory, pass_memory
from revmux.ladder import Ladder, Stage
from revmux.methods import BackboneShape, build_method
from revmux.model import MultiplexedClassifier
from revmux.pretrained.loading import outline
from revmux.serving import Limits
from serve_app.__main__ import parse
from serve_app.config import AppConfig, server_config
from serve_app.service import Service
from serve_app.web import create_app

pytestmark = pytest.mark.numeric

LAYERS, WIDTH, FLOAT = 3, 32, 4
UNLIMITED = 2**40


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> DecoderLadder:
    return write_decoder_ladder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def service(ladder: DecoderLadder) -> Iterator[Service]:
    config = AppConfig(model=str(ladder.model), adapters=ladder.adapters, plain_load=1)
    made = Service(config)
    made.serve(config.served)
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(create_app(service)) as base:
        yield base


def ask(url: str, texts: list[str], **more: object) -> tuple[Tensor, httpx.Headers]:
    """The raw scores of "bad" and "good", (B, 2), and the headers."""
    body = {"inputs": [[text] for text in texts], "raw_scores": True, **more}
    reply = httpx.post(f"{url}/predict", json=body, timeout=60).raise_for_status()
    found = [{item["label"]: item["score"] for item in answer} for answer in reply.json()]
    return torch.tensor([[scores["bad"], scores["good"]] for scores in found]), reply.headers


def test_the_plain_model_answers_over_http_as_the_whole_model_does(url: str, ladder: DecoderLadder) -> None:
    expected = whole_model_scores(ladder, TEXTS)
    assert expected.std(dim=0).min() > 1e-2
    scores, headers = ask(url, TEXTS, max_multiplex=1)
    assert set(headers["x-revmux-method"].split(",")) == {"siso"}
    assert_close(scores, expected)
    quiet, headers = ask(url, TEXTS[:1])
    assert (headers["x-revmux-method"], headers["x-revmux-width"]) == ("siso", "1")
    assert_close(quiet, expected[:1])


def test_each_stage_of_the_ladder_answers_and_the_rest_get_the_whole_models_answer(
    url: str, ladder: DecoderLadder
) -> None:
    scores, headers = ask(url, TEXTS)
    stages, fell_back = headers["x-revmux-stage"].split(","), headers["x-revmux-fallback"].split(",")
    by = dict(zip(("0", "1", "2"), ([index for index, one in enumerate(stages) if one == stage] for stage in "012")))
    assert all(by.values()), stages
    assert [fell_back[index] for index in by["0"]] == ["true"] * len(by["0"])
    assert_close(scores[by["0"]], whole_model_scores(ladder, [TEXTS[index] for index in by["0"]]))
    pretrained = ladder.pretrained()
    head = load_adapter(ladder.head, pretrained)
    with torch.no_grad():
        expected = head(pretrained.encode(TEXTS, max_length=MAX_LENGTH))
    assert_close(scores[by["1"]], expected[by["1"]])
    widths = headers["x-revmux-width"].split(",")
    assert {widths[index] for index in by["2"]} == {"2"}


def test_the_prefix_is_computed_once_and_every_pass_leaves_it_out(
    url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = service.engine.task().backbone
    assert isinstance(backbone, DecoderBackbone)
    assert len(backbone.constant_tokens) == CONSTANT
    monkeypatch.setattr(backbone, "prefix_above", lambda *_: pytest.fail("the prefix was computed again"))
    seen: list[int] = []
    hook = backbone.layer(0).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    try:
        _, headers = ask(url, ["w1 w2 w3"], max_multiplex=1)
    finally:
        hook.remove()
    assert headers["x-compute-tokens"] == str(CONSTANT + 3 + 1)
    assert seen[0] == 3 + 1  # the text and "Answer:"


def tensor_bytes(tensors: Iterator[Tensor]) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def prefix_bytes(first: int, last: int) -> int:
    """Float32 states at layers ``first`` to ``last``, keys and values of the layers between, positions."""
    return FLOAT * CONSTANT * WIDTH * ((last - first + 1) + 2 * (last - first)) + 8 * CONSTANT


def models(ladder: DecoderLadder, merge_limit: int = UNLIMITED) -> list[MultiplexedClassifier]:
    pretrained = ladder.pretrained()
    return [load_adapter(adapter, pretrained, merge_limit=merge_limit) for adapter in ladder.adapters]


def on_meta(ladder: DecoderLadder, merge_limit: int = UNLIMITED) -> list[MultiplexedClassifier]:
    """The same adapters on the outline of the model, which has no values."""
    backbone = outline(ladder.config())[0].freeze()
    made = []
    for real in models(ladder, 0):
        with torch.device("meta"):
            method = build_method(
                real.method.name, BackboneShape.of(backbone), real.num_inputs, real.method.options_dict()
            )
        model = MultiplexedClassifier(backbone, method, real.prefill_layers).eval()
        model.merge_lora(merge_limit)
        made.append(model)
    return made


def test_what_is_kept_is_known_before_anything_is_loaded(ladder: DecoderLadder) -> None:
    found = models(ladder)
    backbone = found[0].backbone
    kept = kept_memory(backbone, found)
    assert kept == kept_memory((estimated := on_meta(ladder))[0].backbone, estimated)
    assert kept.backbone == tensor_bytes(chain(backbone.parameters(), backbone.buffers()))
    assert kept.prefix == prefix_bytes(0, LAYERS)
    own = {tensor.data_ptr() for tensor in backbone.parameters()}
    for model, folder, memory in zip(found, (ladder.head, ladder.two), kept.adapters, strict=True):
        assert memory.weights == tensor_bytes(iter(load_file(folder / "adapter_model.safetensors").values()))
        copied = (tensor for tensor in model.upper_backbone.parameters() if tensor.data_ptr() not in own)
        assert memory.merged == tensor_bytes(copied) > 0
        assert memory.unmerged == 0
        assert memory.prefix == prefix_bytes(model.prefill_layers, model.method.exit_layer())
    assert kept.total == kept.backbone + kept.prefix + sum(memory.total for memory in kept.adapters)


def test_a_copy_above_the_limit_is_not_made(ladder: DecoderLadder) -> None:
    needed = [memory.merged for memory in kept_memory_of(models(ladder)).adapters]
    for build in (models, on_meta):
        kept = kept_memory_of(build(ladder, min(needed) - 1))
        assert [memory.merged for memory in kept.adapters] == [0, 0]
        assert [memory.unmerged for memory in kept.adapters] == needed
    pretrained = ladder.pretrained()
    with pytest.raises(UserError, match=r"merge_limit is -1; choose 0 \(LoRA stays unmerged\) or more bytes"):
        load_adapter(ladder.two, pretrained, merge_limit=-1)
    with pytest.raises(UserError, match="merge_limit is -1"):
        Limits(merge_limit=-1)


def kept_memory_of(found: list[MultiplexedClassifier]) -> KeptMemory:
    return kept_memory(found[0].backbone, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_pass_is_known_before_anything_is_loaded(ladder: DecoderLadder, dtype: torch.dtype) -> None:
    found = models(ladder, 0)
    backbone = found[0].backbone.to(dtype)
    ids = torch.tensor([[*backbone.constant_tokens, *range(4, 4 + MAX_LENGTH - CONSTANT)]]).expand(32, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    running = Ladder([Stage(model, 1.0) for model in found])
    with torch.no_grad():
        running.classify(batch)  # computes the prefixes
        with PeakMemory() as memory:
            answers = running.classify(batch)
        assert bool(answers.fell_back.all())
        assert memory.bytes < memory.peak / 2, "most of it is temporary"
    estimated = on_meta(ladder, 0)
    expected = pass_memory(estimated[0].backbone, estimated, len(ids), MAX_LENGTH, dtype)
    assert memory.peak == pytest.approx(expected, rel=0.1)


def test_peak_memory_follows_tensors_until_nothing_refers_to_them() -> None:
    before = torch.ones(1000)
    with PeakMemory() as memory:
        first = before * 2
        assert memory.bytes == 4000
        view = first[:10]
        del first
        assert memory.bytes == 4000
        del view
        assert memory.bytes == 0
        for _ in range(3):
            (before + 1).sum()
    assert 8000 > memory.peak >= 4000


def test_training_keeps_the_plain_models_prefix(ladder: DecoderLadder) -> None:
    for model in on_meta(ladder, 0):
        method, layers = model.method, model.prefill_layers
        assert estimate_memory(model.backbone, method, layers, 4, 12, torch.float32).prefix == prefix_bytes(0, LAYERS)
        with pytest.raises(UserError, match="length is 7, but 7 tokens are the same in every input; choose 8 or more"):
            estimate_memory(model.backbone, method, layers, 4, CONSTANT)


def test_the_server_states_its_memory_in_the_log_and_in_info(
    ladder: DecoderLadder, service: Service, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = AppConfig(model=str(ladder.model), adapters=ladder.adapters, merge_limit_mib=0)
    other = Service(config)
    with caplog.at_level(logging.INFO, "serve_app.tasks"):
        try:
            other.serve(config.served)
        finally:
            other.close()
    (line,) = [record.getMessage() for record in caplog.records if "in memory" in record.getMessage()]
    kept = httpx.get(f"{url}/info", timeout=60).json()["memory"]
    merged = sum(adapter["merged"] for adapter in kept["adapters"])
    assert kept["total"] == kept_memory_of(models(ladder)).total
    mib = {
        name: f"{size / 2**20:,.1f}" for name, size in (("total", kept["total"] - merged), ("model", kept["backbone"]))
    }
    assert line.startswith(f"task 'default' keeps {mib['total']} MiB in memory: {mib['model']} model, ")
    assert "0.0 merged LoRA (2 not merged: a copy takes up to 0.0 MiB, the limit is 0), " in line
    assert line.endswith(" constant prefix")
    assert parse(["--model", str(ladder.model), "--merge_limit_mib", "0"]).limits().merge_limit == 0
    for size in (-1, "much"):
        with pytest.raises(UserError, match="merge_limit_mib"):
            server_config(model=str(ladder.model), merge_limit_mib=size)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run ``revmux memory ...`` in this process: exit status, output and errors."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["revmux", "memory", *arguments])
        status = main()
        return status, "".join(capsys.readouterr())

    return run


def test_the_command_line_estimates_a_ladder(command: Callable[..., tuple[int, str]], ladder: DecoderLadder) -> None:
    head = "{method: exit-head, prefill_layers: 1, options: {layer: 2, lora_rank: 2}}"
    stages = f"[{head}, {{num_inputs: 2, prefill_layers: 2, options: {{lora_rank: 2}}}}]"
    settings = ("--model", str(ladder.model), "--prompt", str(ladder.prompt), "--length", "[20]")
    status, output = command(*settings, "--stages", stages, "--merge_limit_mib", "0", "--max_batch", "4")
    assert status == 0
    lines = output.splitlines()
    assert lines[3].strip() == "exit-head, N = 1, l = 1, LoRA of rank 2"
    assert lines[7].strip() == "revmux, N = 2, l = 2, LoRA of rank 2"
    assert "Serving passes of 4 inputs of 20 tokens" in lines
    assert sum("LoRA is not merged: a copy takes 0.00" in line for line in lines) == 2
    assert lines[-1].strip().startswith("largest pass 0.00, total 0.00")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "bert-base", "--constant_tokens", "3"],
            "only decoders such as llama and gpt2 can compute them once",
        ),
        (["--model", "llama-3-8b", "--constant_tokens", "-1"], "constant_tokens is -1; choose 0 or more"),
        (["--merge_limit_mib", "-1"], "merge_limit_mib is -1; choose 0"),
        (["--max_batch", "0", "--length", "[8]"], "max_batch is 0; choose 1 or more inputs"),
        (["--stages", "[{method: revmx}]"], "unknown method 'revmx'"),
    ],
)
def test_wrong_sizes_are_refused(command: Callable[..., tuple[int, str]], arguments: list[str], message: str) -> None:
    status, output = command(*arguments)
    assert status == 2
    assert message in output


def test_constant_tokens_and_a_prompt_exclude_each_other(
    command: Callable[..., tuple[int, str]], ladder: DecoderLadder
) -> None:
    settings = ("--model", str(ladder.model), "--prompt", str(ladder.prompt), "--constant_tokens", "3")
    status, output = command(*settings)
    assert status == 2
    assert "the tokens of the prompt are known; omit constant_tokens or prompt" in output
