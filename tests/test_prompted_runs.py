"""Language models that answer by label words, from a configuration to served answers, on tiny random checkpoints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from numeric import assert_close
from prompted_recipes import FAMILIES, PROMPT, TEXTS, backbone, prepared, recipe
from tiny_models import LABELS, WORDS
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from ray_jobs import cli, evaluate, train
from ray_jobs.training.config import EvaluateJob, FinetuneJob, TrainJob
from revmux import BackboneShape, UserError, build_method
from revmux.__main__ import main
from revmux.adapters.classifier import TextClassifier
from revmux.adapters.config import load_adapter_config, recorded_prompt
from revmux.adapters.folder import load_adapter, save_adapter
from revmux.data.config import DataConfig
from revmux.data.prompt import Prompt
from revmux.errors import TextError
from revmux.estimate.flops import count_flops
from revmux.estimate.shapes import meta_backbone
from revmux.features.config import StoreConfig
from revmux.features.store import open_features
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import check_answers, inspect, load_pretrained
from revmux.pretrained.task_model import save_task_model
from revmux.serving import Engine
from revmux.training.config import OptimConfig
from revmux.training.recipe import train_here
from serve_app.config import server_config
from serve_app.service import Service

pytestmark = pytest.mark.numeric


def whole_model_scores(folder: Path, family: str, texts: list[str]) -> Tensor:
    """Return the unmodified model's scores of "bad" and "good", one rendered text at a time, (B, 2)."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    words = tokenizer.convert_tokens_to_ids(["bad", "good"])
    model = (LlamaForCausalLM if family == "llama" else T5ForConditionalGeneration).from_pretrained(folder).eval()
    rows = []
    for text in texts:
        ids = tokenizer(f"Text: {text}\nIs it bad or good?\nAnswer:", return_tensors="pt")["input_ids"]
        more = {"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {}
        with torch.no_grad():
            rows.append(model(ids, **more).logits[0, -1, words])
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompted_scores_are_the_models_own_scores_of_the_label_words(
    family: str, language_model: Callable[[str], Path]
) -> None:
    folder = language_model(family)
    shape, labels = inspect(backbone(folder))
    assert (shape.hidden_size, shape.num_layers, shape.num_labels, labels) == (32, 3, 2, LABELS)
    pretrained = load_pretrained(backbone(folder))
    assert pretrained.backbone.label_names == LABELS
    assert not pretrained.has_head
    with torch.no_grad():
        scores = pretrained.backbone.freeze()(pretrained.encode(TEXTS, max_length=24))
    assert_close(scores, whole_model_scores(folder, family, TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_is_trained_saved_evaluated_and_served_with_its_prompt(
    family: str, language_model: Callable[[str], Path], tiny_csv: Path, tmp_path: Path
) -> None:
    folder = language_model(family)
    ready = prepared(recipe(folder, tiny_csv, tmp_path / "store"))
    task = ready.task
    rendered = [PROMPT.render(text) for text in task.test["text"]]
    lengths = [len(ready.pretrained.tokenizer(text)["input_ids"]) for text in rendered]
    assert ready.test.lengths.tolist() == lengths, "splits are tokenized inside the template"
    evaluation = train_here(ready)
    assert 0.0 <= evaluation.accuracy_mean <= 1.0
    teacher = torch.cat([whole_model_scores(folder, family, [text]) for text in task.test["text"][:6]])
    stored = ready.test.batch(range(6)).teacher_scores
    assert_close(stored, teacher)

    adapter = save_adapter(ready.model, ready.adapter_config({}), tmp_path / "adapter")
    assert load_adapter_config(adapter).recorded_prompt() == PROMPT
    assert list(recorded_prompt([adapter]).labels) == LABELS  # type: ignore[union-attr]
    fresh = load_pretrained(backbone(folder, recorded_prompt([adapter])))
    with torch.no_grad():
        expected = ready.model.eval()(ready.pretrained.encode(TEXTS[:2]))
        assert_close(load_adapter(adapter, fresh)(fresh.encode(TEXTS[:2])), expected)
    classifier = TextClassifier.from_pretrained(adapter, folder)
    assert classifier.scores(TEXTS[:2]).shape == (2, 2)

    with Engine(fresh, [adapter]) as engine:
        answers = [future.result(60) for future in engine.submit(TEXTS, max_multiplex=1)]
        assert engine.probe().result(60).width == 1
    scores = torch.stack([answer.scores for answer in answers])
    assert_close(scores, whole_model_scores(folder, family, TEXTS))


def test_an_adapter_with_another_prompt_is_refused_with_both_names(
    language_model: Callable[[str], Path], tiny_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = language_model("llama")
    ready = prepared(recipe(folder, tiny_csv, tmp_path / "store"))
    adapter = save_adapter(ready.model, ready.adapter_config({}), tmp_path / "adapter")
    other = load_pretrained(backbone(folder, replace(PROMPT, name="other", template="{text}\nAnswer:")))
    with pytest.raises(UserError, match=r"trained with prompt mine, but .* has prompt other \(template 'Text: .* here"):
        load_adapter(adapter, other)
    renamed = load_pretrained(backbone(folder, replace(PROMPT, name="a copy of it")))
    load_adapter(adapter, renamed)

    argv = ["--backbone.model", str(folder), "--backbone.prompt", "sst2", "--adapter", str(adapter)]
    assert cli.run(evaluate.main, EvaluateJob, None, [*argv, "--storage", str(tmp_path / "runs")]) == 2
    assert "was trained with prompt mine, but the given backbone has prompt sst2" in capsys.readouterr().err


def test_a_server_without_a_configured_prompt_uses_that_of_its_adapters(
    language_model: Callable[[str], Path], tiny_csv: Path, tmp_path: Path
) -> None:
    folder = language_model("t5")
    ready = prepared(recipe(folder, tiny_csv, tmp_path / "store"))
    adapter = save_adapter(ready.model, ready.adapter_config({}), tmp_path / "adapter")
    config = server_config(model=str(folder), adapters=[str(adapter)])
    service = Service(config)
    try:
        service.serve(config.served)
        (task,) = service.engine.tasks.values()
        assert task.pretrained.prompt == PROMPT
        (answer,) = service.engine.submit(TEXTS[:1], max_multiplex=1)
        assert_close(answer.result(60).scores, whole_model_scores(folder, "t5", TEXTS[:1])[0])
    finally:
        service.engine.close()


def test_a_server_checks_its_configured_prompt_before_it_starts(prompt_file: Path) -> None:
    settings = {"model": str(prompt_file.parent), "adapters": ["x"]}
    assert server_config(**settings, prompt="sst2").prompt == "sst2"
    assert server_config(**settings, prompt=str(prompt_file)).prompt == str(prompt_file)
    with pytest.raises(UserError, match="unknown prompt 'sst'; known: default"):
        server_config(**settings, prompt="sst")


def test_long_texts_are_truncated_and_the_template_is_not(
    language_model: Callable[[str], Path], tmp_path: Path
) -> None:
    pretrained = load_pretrained(backbone(language_model("llama")))
    long = " ".join(WORDS[:30])
    split = pretrained.tokenize(Dataset.from_dict({"text": [long, "w1"], "label": [0, 1]}), 14)
    tokenizer = pretrained.tokenizer
    assert split.truncated == 1
    first = split.batch([0])["input_ids"][0]
    assert tokenizer.decode(first) == "<s> Text: w0 w1 w2 w3 w4 w5 Is it bad or good? Answer:"
    with Engine(pretrained, max_length=14) as engine:
        with pytest.raises(TextError, match="an input has 38 tokens, but at most 14"):
            engine.submit([long])
        cut = engine.submit([long], truncate=True)[0].result(60)
    with torch.inference_mode():
        expected = pretrained.backbone(split.batch([0]))[0]
    assert cut.truncated
    assert_close(cut.scores, expected)
    with pytest.raises(UserError, match="the template of prompt mine alone has 8 tokens"):
        Engine(pretrained, max_length=6)


def test_pairs_and_single_texts_are_checked_before_they_are_queued(language_model: Callable[[str], Path]) -> None:
    pairs = replace(PROMPT, template="Text: {text} or {text_pair}\nAnswer:")
    with Engine(load_pretrained(backbone(language_model("llama"), pairs))) as engine:
        assert engine.probe().result(60).width == 1
        assert engine.submit([("w1", "w2")])[0].result(60).scores.shape == (2,)
        with pytest.raises(TextError, match="prompt mine is for pairs of texts, but an input has only one text"):
            engine.submit(["w1"])


def test_another_template_changes_the_store_key(language_model: Callable[[str], Path]) -> None:
    folder, rows = language_model("llama"), Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0]})

    def key(prompt: Prompt) -> str:
        return load_pretrained(backbone(folder, prompt)).tokenize(rows, 24).digest

    own = key(PROMPT)
    assert key(replace(PROMPT, name="a copy of it")) == own
    assert key(replace(PROMPT, template="Text: {text}\nIs it good? or bad\nAnswer:")) != own


def test_a_language_model_without_a_prompt_is_refused_with_both_remedies(
    language_model: Callable[[str], Path], tiny_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in FAMILIES:
        for refuse in (check_answers, load_pretrained):
            with pytest.raises(UserError, match=r"revmux finetune .* or .* --backbone\.prompt"):
                refuse(backbone(language_model(family), None))
    argv = [
        "--backbone.model",
        str(language_model("llama")),
        "--data.source",
        str(tiny_csv),
        "--storage",
        str(tmp_path),
    ]
    assert cli.run(train.main, TrainJob, None, argv) == 2
    assert "--backbone.prompt" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing may be written before the job starts"


def test_prompts_for_models_that_cannot_answer_by_words_are_refused(
    tiny_model_folder: Path, language_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is a bert, which cannot answer by words; .* gpt2, llama"):
        inspect(backbone(tiny_model_folder))
    with pytest.raises(UserError, match="word 'negative' of class 'negative' is unknown"):
        inspect(backbone(language_model("llama"), "sst2"))
    classifier = tmp_path / "classifier"
    torch.manual_seed(0)
    tuned = load_pretrained(backbone(language_model("llama"), None), LABELS)
    tuned.backbone.model.save_pretrained(classifier)
    tuned.tokenizer.save_pretrained(classifier)
    with pytest.raises(UserError, match=r"answers by a trained classification head; omit --backbone\.prompt"):
        load_pretrained(backbone(classifier))
    assert load_pretrained(backbone(classifier, None)).has_head


def test_a_checkpoint_without_its_output_embedding_is_refused(
    language_model: Callable[[str], Path], tmp_path: Path
) -> None:
    core = LlamaForCausalLM.from_pretrained(language_model("llama")).model
    core.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(language_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"LlamaModel without the weights that score its vocabulary \(lm_head.weight\)"):
        load_pretrained(backbone(tmp_path))


def test_class_names_are_the_label_words_if_a_prompt_lists_none(
    language_model: Callable[[str], Path], tiny_csv: Path, tmp_path: Path
) -> None:
    wordless = replace(PROMPT, labels={})
    running = recipe(language_model("llama"), tiny_csv, tmp_path, backbone=backbone(language_model("llama"), wordless))
    ready = prepared(running)
    assert ready.pretrained.prompt == PROMPT, "the words are recorded"
    with pytest.raises(UserError, match="prompt mine lists no labels"):
        load_pretrained(running.backbone)


def test_a_decoders_tokenizer_without_padding_is_padded(language_model: Callable[[str], Path]) -> None:
    folder = language_model("llama")
    assert PreTrainedTokenizerFast.from_pretrained(folder).pad_token is None
    torch.manual_seed(0)
    tuned = load_pretrained(backbone(folder, None), LABELS)
    tokens = tuned.encode(TEXTS)
    with torch.no_grad():
        together = tuned.backbone.freeze()(tokens)
        apart = torch.cat([tuned.backbone(tuned.encode([text])) for text in TEXTS])
        reference = tuned.backbone.model(**{name: tokens[name] for name in ("input_ids", "attention_mask")}).logits
    assert_close(together, apart)
    assert_close(together, reference)


def test_settings_contain_the_content_of_the_prompt(prompt_file: Path, language_model: Callable[[str], Path]) -> None:
    argv = ["--backbone.model", str(language_model("t5")), "--backbone.prompt", str(prompt_file)]
    job = cli.parse(TrainJob, None, argv)
    assert job.backbone.prompt == PROMPT
    assert job.backbone.prompt.name == "mine", "the name must not be a local path"
    assert PROMPT.template in repr(job.recipes()).replace("\\n", "\n"), "runs are distinguished by the template"
    inline = prompt_file.with_name("job.yaml")
    inline.write_text(json.dumps({"backbone": {"prompt": PROMPT.to_dict()}, "adapter": "x"}))
    assert cli.parse(EvaluateJob, None, ["--config", str(inline)]).backbone.prompt == PROMPT


def test_the_weights_of_a_language_model_can_be_tuned_with_its_prompt(
    language_model: Callable[[str], Path], tiny_csv: Path, tmp_path: Path
) -> None:
    folder = language_model("t5")
    job = FinetuneJob(backbone(folder), DataConfig(source=str(tiny_csv)), OptimConfig(2, 16, 2e-3))
    ready = prepared(replace(job.recipe(), store=StoreConfig(root=str(tmp_path))))
    train_here(ready)
    loaded = load_pretrained(backbone(save_task_model(ready.pretrained, tmp_path / "task-model"), None))
    with torch.no_grad():
        expected = ready.pretrained.backbone.eval()(ready.pretrained.encode(TEXTS))
        assert_close(loaded.backbone.freeze()(loaded.encode(TEXTS)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_cost_and_memory_account_for_prompts(
    family: str,
    language_model: Callable[[str], Path],
    prompt_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = str(language_model(family))

    def alone(**settings: object) -> float:
        backbone = meta_backbone(folder, **settings)  # type: ignore[arg-type]
        return count_flops(backbone, build_method("siso", BackboneShape.of(backbone), 1), 0, 16).per_input

    if family == "t5":
        assert alone(prompt=PROMPT) == alone()
        assert alone(soft_prompt=8) > 1.3 * alone()
    else:  # a constant prefix runs once, so that each input only reads it
        assert alone(prompt=PROMPT) < 0.9 * alone()
        assert alone() < alone(soft_prompt=8) < 1.1 * alone()

    def command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["revmux", *arguments])
        return main()

    assert command("cost", "--model", folder, "--prompt", str(prompt_file), "--length", "16") == 0
    assert command("memory", "--model", folder, "--soft_prompt", "4", "--length", "[16]") == 0
    assert command("cost", "--model", "t5-small", "--prompt", "sst2") == 2
    assert "the preset 't5-small', which has no tokenizer" in capsys.readouterr().err


def test_the_scores_of_label_words_are_stored_in_float32_for_a_model_in_bfloat16(
    language_model: Callable[[str], Path], prompt_file: Path, tmp_path: Path
) -> None:
    config = BackboneConfig(str(language_model("llama")), max_length=40, dtype="bfloat16", prompt=str(prompt_file))
    pretrained = load_pretrained(config, ["bad", "good"])
    pretrained.backbone.freeze()
    texts = [" ".join(WORDS[number : number + 3]) for number in range(3, 11)]
    split = pretrained.tokenize(Dataset.from_dict({"text": texts, "label": [0, 1] * 4}), 40)
    store = open_features(pretrained, split, [1], StoreConfig(root=str(tmp_path), dtype="bfloat16"))
    rows = torch.arange(len(split))
    for features in (store.at(1), store.with_tokens()):
        scores = features.batch(rows).teacher_scores
        assert scores is not None
        assert scores.dtype == torch.float32
        assert not torch.equal(scores, scores.bfloat16().float())
