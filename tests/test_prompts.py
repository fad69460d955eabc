"""Prompts are readable files, checked when loaded and again against a tokenizer."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from revmux import UserError
from revmux.data.prompt import Prompt, load_prompt, prompt_names

CORPUS = [
    "Answer: yes no negative positive equivalent entailment notable",
    "Is the sentiment of this sentence negative or positive, yes or no? Answer: no yes",
] * 20


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words include the preceding space, as in GPT-2, BART and LLaMA 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<s>", "<pad>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that marks the start of a word with or without a space, as in T5 and LLaMA 2."""
    words = ["<unk>", "<pad>", *(f"▁{word}" for word in ("yes", "no", "negative", "positive", "not"))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def sentiment(**changes: object) -> Prompt:
    settings = {"template": "{text} Answer:", "labels": {"a": ("negative",), "b": ("positive",)}}
    return Prompt(name="mine", **{**settings, **changes})  # type: ignore[arg-type]


def test_every_task_has_a_prompt_for_every_kind_of_model() -> None:
    tasks = [f"{task}{kind}" for task in ("sst2", "mrpc", "rte", "qnli") for kind in ("", "-t5", "-chat")]
    assert set(prompt_names()) == {"default", "sst2-few-shot", *tasks}


@pytest.mark.parametrize("name", prompt_names())
def test_shipped_prompts_can_be_read(name: str) -> None:
    prompt = load_prompt(name)
    pair = None if name.startswith("sst2") else "second"
    assert prompt.needs_pair == (pair is not None and name != "default")
    rendered = prompt.render("the {first} text", pair)
    assert "the {first} text" in rendered
    assert pair is None or pair in rendered
    assert not rendered[-1].isspace()
    assert prompt.chat == name.endswith("-chat")
    assert rendered.endswith("<extra_id_0>") == (prompt.answer_prefix == "<extra_id_0>") == name.endswith("-t5")


def test_label_words_follow_the_classes_of_glue() -> None:
    for kind in ("", "-t5", "-chat"):
        assert list(load_prompt(f"sst2{kind}").labels) == ["negative", "positive"]
        assert load_prompt(f"mrpc{kind}").labels == {"not_equivalent": ("no",), "equivalent": ("yes",)}
        for name in ("rte", "qnli"):
            assert load_prompt(f"{name}{kind}").labels == {"entailment": ("yes",), "not_entailment": ("no",)}


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), word_tokenizer()])
def test_label_words_become_the_tokens_that_continue_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    verbalizer = load_prompt("mrpc").verbalizer(tokenizer)
    assert verbalizer.label_names == ("not_equivalent", "equivalent")
    for ids, word in zip(verbalizer.token_ids, (" no", " yes"), strict=True):
        template = "yes no Answer:" if tokenizer is byte_tokenizer() else "yes no"
        following = tokenizer(template + word)["input_ids"][len(tokenizer(template)["input_ids"]) :]
        assert list(ids) == following


def test_words_without_a_leading_space_are_used_after_a_template_that_ends_in_a_space() -> None:
    tokenizer = byte_tokenizer()
    letters = {"a": ("x",), "b": ("z",)}
    expected = tuple((tokenizer.convert_tokens_to_ids(letter),) for letter in "xz")
    assert sentiment(template="{text} Answer:\n", labels=letters).verbalizer(tokenizer).token_ids == expected


def test_scores_are_in_the_label_order_of_the_task() -> None:
    prompt, tokenizer = load_prompt("sst2"), byte_tokenizer()
    turned = prompt.verbalizer(tokenizer, ["positive", "negative"])
    assert turned.label_names == ("positive", "negative")
    assert turned.token_ids == prompt.verbalizer(tokenizer).token_ids[::-1]


def test_class_names_are_the_label_words_by_default() -> None:
    verbalizer = load_prompt("default").verbalizer(byte_tokenizer(), ["negative", "positive"])
    assert verbalizer == load_prompt("sst2").verbalizer(byte_tokenizer())
    with pytest.raises(UserError, match="prompt default lists no labels"):
        load_prompt("default").verbalizer(byte_tokenizer())


def test_label_words_of_several_tokens_are_scored_in_each_mode() -> None:
    tokenizer = byte_tokenizer()
    labels = {"a": ("negative", "zzz"), "b": ("positive",)}
    pieces = min((tokenizer(form, add_special_tokens=False)["input_ids"] for form in (" zzz", "zzz")), key=len)
    negative = tokenizer(" negative", add_special_tokens=False)["input_ids"]
    first = sentiment(labels=labels, reading="first").verbalizer(tokenizer)
    assert first.token_ids[0] == (negative[0], pieces[0])
    mean = sentiment(labels=labels, reading="mean").verbalizer(tokenizer)
    assert mean.token_ids[0] == (negative[0], *dict.fromkeys(pieces))
    with pytest.raises(UserError, match=r"word 'zzz' of class 'a' is \d tokens .* not a single one; .*first or mean"):
        sentiment(labels=labels).verbalizer(tokenizer)


def test_answer_prefix_becomes_tokens() -> None:
    verbalizer = sentiment(answer_prefix="yes").verbalizer(word_tokenizer())
    assert verbalizer.answer_prefix == (word_tokenizer().convert_tokens_to_ids("▁yes"),)


@pytest.mark.parametrize("name", [name for name in prompt_names() if name.endswith("-t5")])
def test_the_decoder_of_t5_starts_with_the_space_that_ends_the_text(name: str) -> None:
    words = ["negative", "positive", "yes", "no"]
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", *(f"▁{word}" for word in words))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=2)
    prompt = load_prompt(name)
    gap = tokenizer.convert_tokens_to_ids("<extra_id_0>")
    assert prompt.verbalizer(tokenizer).answer_prefix == (gap,)
    written = prompt.write(tokenizer, "good film", "bad film" if prompt.needs_pair else None)
    assert prompt.encode(tokenizer, [written])["input_ids"][0][-2:] == [gap, tokenizer.eos_token_id]


def test_long_texts_are_truncated_but_the_template_is_not() -> None:
    prompt, tokenizer = load_prompt("rte"), byte_tokenizer()
    long, short = "yes or no? " * 60, "no answer"
    whole = prompt.render(long, short)
    limit = len(tokenizer(prompt.render("", ""))["input_ids"]) + 30
    cut = prompt.fit(tokenizer, long, short, limit)
    assert limit - 3 <= len(tokenizer(cut)["input_ids"]) <= limit
    assert cut.endswith(whole[whole.index("\nHypothesis:") :])
    assert long.startswith(cut.removeprefix("Premise: ").split("\nHypothesis")[0])
    assert prompt.fit(tokenizer, long, short, 10_000) == whole
    with pytest.raises(UserError, match=r"max_length is 5, but the template of prompt rte alone has \d+ tokens"):
        prompt.fit(tokenizer, long, short, 5)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.chat_template = (
        "<s>{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[model]{% if enable_thinking is not defined or enable_thinking %}<think>"
        "{% endif %}{{ '\n' }}{% endif %}"
    )
    return tokenizer


def test_a_chat_prompt_is_wrapped_in_the_chat_template_of_the_model() -> None:
    tokenizer = chat_tokenizer()
    prompt = sentiment(template="Is it? {text}", labels={"a": ("x",), "b": ("z",)}, chat=True)
    written = prompt.write(tokenizer, "so")
    assert written == "<s>[user]Is it? so\n[model]\n"
    tokens = prompt.encode(tokenizer, [written])["input_ids"][0]
    assert tokens.count(tokenizer.bos_token_id) == 1, "the chat template adds the special tokens"
    assert tokenizer.decode(tokens) == written
    bare = tuple((tokenizer.convert_tokens_to_ids(letter),) for letter in "xz")
    assert prompt.verbalizer(tokenizer).token_ids == bare, "the model answers on a new line, without a space"
    cut = prompt.fit(tokenizer, "yes or no? " * 60, None, len(tokens) + 9)
    assert cut.startswith("<s>[user]Is it? yes or no? ")
    assert cut.endswith("\n[model]\n")
    with pytest.raises(UserError, match="prompt mine is a chat prompt, but the model's tokenizer has no chat template"):
        prompt.verbalizer(byte_tokenizer())


@pytest.mark.parametrize("name", prompt_names())
def test_a_prompt_survives_as_plain_data(name: str) -> None:
    prompt = load_prompt(name)
    content = json.loads(json.dumps(prompt.to_dict(), sort_keys=True))
    again = Prompt.from_dict(content, list(prompt.labels))
    assert (again, again.name, list(again.labels)) == (prompt, name, list(prompt.labels))


def test_prompts_are_equal_if_their_content_is_equal() -> None:
    one = sentiment()
    assert one == replace(one, name="copy")
    other = replace(one, template="{text}?")
    assert one != other
    assert one.difference(other) == "template '{text} Answer:' here, '{text}?' there"


def test_a_users_prompt_file_overrides_a_shipped_one(tmp_path: Path) -> None:
    path = write(tmp_path, 'template: "{{{text}}} Answer:"\nlabels:\n  0: "no"\n  1: ["yes", "positive"]\n')
    prompt = load_prompt(path)
    assert prompt.render("so") == "{so} Answer:"
    assert prompt.labels == {"0": ("no",), "1": ("yes", "positive")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template: '{sentence}'", r"unknown field \{sentence\} in template .*fields are \{text\} and \{text_pair\}"),
        ("template: '{text!r}'", r"unknown field \{text\} .*without a format"),
        ("template: '{text'", "write a literal brace twice"),
        ("template: Answer", r"template of prompt .* has no \{text\}"),
        ("template: '{text}'\npair_template: '{text}'", r"pair_template of prompt .* has no \{text_pair\}"),
        ("template: '{text}'\nlabels: {a: [], b: [x]}", "class 'a' of prompt .* has no word"),
        ("template: '{text}'\nlabels: {a: , b: [x]}", "class 'a' of prompt .* has no word"),
        ("template: '{text}'\nlabels: {a: [no], b: [x]}", "has False in place of a word; put words in quotes"),
        ("template: '{text}'\nlabels: [a, b]", r"labels of prompt .* one line per class"),
        ("template: '{text}'\nreading: last", "unknown reading 'last'; known: single, first, mean"),
        ("template: '{text}'\nlabel: {a: [x]}", "unknown key 'label'; known: template, labels"),
        ("template: '{text}'\nchat: maybe", "chat of prompt .* is 'maybe'; write true or false"),
        ("template: 3", "template of prompt .* is 3; write text in quotes"),
        ("labels: {a: [x]}", "has no template"),
        ("- a", "has no template"),
        ("template: '{text}", "is not YAML"),
    ],
)
def test_a_file_that_is_not_a_prompt_is_refused_with_a_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        load_prompt(write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_unknown_prompts_are_refused_with_the_list_of_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown prompt 'sst'; known: default, mrpc, .*, sst2, sst2-chat, sst2-few-shot, sst2-t5"
    ):
        load_prompt("sst")
    with pytest.raises(UserError, match="cannot read prompt file"):
        load_prompt(str(tmp_path / "none.yaml"))


def test_label_words_with_the_same_tokens_are_refused() -> None:
    same = sentiment(labels={"a": ("no",), "b": ("yes", "no")})
    with pytest.raises(UserError, match="words 'no' of class 'a' and 'no' of class 'b' begin with the same token"):
        same.verbalizer(byte_tokenizer())
    with pytest.raises(UserError, match="word 'perhaps' of class 'b' is unknown to the tokenizer"):
        sentiment(labels={"a": ("no",), "b": ("perhaps",)}).verbalizer(word_tokenizer())
    with pytest.raises(UserError, match="the task has classes negative, neutral, but prompt mine has words for a, b"):
        sentiment().verbalizer(byte_tokenizer(), ["negative", "neutral"])


def test_texts_and_template_must_agree_on_pairs() -> None:
    with pytest.raises(UserError, match="prompt rte is for pairs of texts, but an input has only one text"):
        load_prompt("rte").render("alone")
    with pytest.raises(UserError, match=r"prompt sst2 has no \{text_pair\}"):
        load_prompt("sst2").render("one", "two")
