"""Prompts: the template that a language model reads, and the words that stand for its classes.

Prompts are data, one YAML file a task, beside this module or anywhere on disk::

    template: "Sentence: {text}\\nIs it negative or positive?\\nAnswer:"   # {text_pair} for pairs
    labels:                      # class name: its words; without labels the class names are the words
      negative: [negative]
      positive: [positive]
    pair_template: ...           # in place of template for inputs that have a second text
    reading: single              # single: every word is one token; first: words are read by their first
                                 # token; mean: by the mean over all their tokens
    answer_prefix: ""            # what an encoder-decoder's decoder is given before it answers
    chat: false                  # true: the template is a user's message in the model's own chat template
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from string import Formatter
from typing import Any

import yaml
from transformers import BatchEncoding, PreTrainedTokenizerBase

from revmux.backbone import Verbalizer
from revmux.errors import UserError, one_of

FIELDS = ("text", "text_pair")
READINGS = ("single", "first", "mean")
_FOLDER = Path(__file__).with_name("prompts")


@dataclass(frozen=True)
class Prompt:
    """A task's template and label words; two of other names are equal where all else is.

    Args:
        name: the task, or that of the file that it was read from.
        template: what the model reads, with ``{text}`` and for pairs ``{text_pair}``; ``{{`` is a brace.
        labels: the words of each class, in the order of the classes; empty takes the class names as words.
        pair_template: the template for pairs, where ``template`` is for single texts.
        reading: ``single``, ``first`` or ``mean``; see the module.
        answer_prefix: text that an encoder-decoder's decoder is given before it answers.
        chat: whether the template is a user's message, which the tokenizer's chat template is put around.

    Raises:
        UserError: an unknown or missing field in a template, a class without a word, an unknown reading.
    """

    name: str = field(compare=False)
    template: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pair_template: str | None = None
    reading: str = "single"
    answer_prefix: str = ""
    chat: bool = False

    def __post_init__(self) -> None:
        _check_template(self.name, "template", self.template, required=("text",))
        if self.pair_template is not None:
            _check_template(self.name, "pair_template", self.pair_template, required=FIELDS)
        if self.reading not in READINGS:
            raise one_of("reading", self.reading, READINGS, f"choose one of these in prompt {self.name}")
        for label, words in self.labels.items():
            if not words or not all(word.strip() for word in words):
                raise UserError(f"class {label!r} of prompt {self.name} has no word; give it one, such as [{label}]")

    @property
    def needs_pair(self) -> bool:
        """Whether an input must have two texts."""
        return "text_pair" in _fields(self.template)

    def with_labels(self, label_names: Sequence[str] | None) -> Prompt:
        """Itself where it lists labels; else with these classes, each under its own name as its word.

        Raises:
            UserError: neither lists any.
        """
        if self.labels:
            return self
        if not label_names:
            raise UserError(f"prompt {self.name} lists no labels; name the classes, or add labels to the prompt")
        return replace(self, labels={name: (name,) for name in label_names})

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for artifacts; what is None is left out."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        labels = {label: list(words) for label, words in self.labels.items()}
        return {key: value for key, value in (content | {"labels": labels}).items() if value is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], label_names: Sequence[str] | None = None) -> Prompt:
        """What :meth:`to_dict` gave.

        Args:
            content: as plain data.
            label_names: the order of the classes, where the data has lost it.

        Raises:
            UserError: data that is no prompt.
        """
        rest = dict(content)
        prompt = _read(str(rest.pop("name", "unnamed")), rest)
        if label_names is None or set(label_names) != set(prompt.labels):
            return prompt
        return replace(prompt, labels={name: prompt.labels[name] for name in label_names})

    def difference(self, other: Prompt) -> str:
        """Where two prompts first differ, for messages: ``template 'Text: …' here, 'Sentence: …' there``."""
        own, others = self.to_dict(), other.to_dict()
        for key in ("template", "pair_template", "labels", "reading", "answer_prefix", "chat"):
            if own.get(key) != others.get(key):
                return f"{key} {own.get(key)!r:.60} here, {others.get(key)!r:.60} there"
        return "no difference"

    def render(self, text: str, text_pair: str | None = None) -> str:
        """The template for one input.

        Raises:
            UserError: the template wants a second text and there is none, or the reverse.
        """
        if text_pair is None:
            if self.needs_pair:
                raise UserError(
                    f"prompt {self.name} is for pairs of texts, but an input has one; choose another prompt"
                )
            return self.template.format(text=text)
        template = self.template if self.pair_template is None else self.pair_template
        if "text_pair" not in _fields(template):
            raise UserError(
                f"prompt {self.name} has no {{text_pair}}, but an input has a second text; add a pair_template"
            )
        return template.format(text=text, text_pair=text_pair)

    def write(self, tokenizer: PreTrainedTokenizerBase, text: str, text_pair: str | None = None) -> str:
        """All that the model reads of one input: :meth:`render`, inside the chat template where ``chat`` asks for it.

        Raises:
            UserError: as :meth:`render`, or the tokenizer has no chat template.
        """
        rendered = self.render(text, text_pair)
        if not self.chat:
            return rendered
        if not tokenizer.chat_template:
            raise UserError(
                f"prompt {self.name} is a chat, but the model's tokenizer has no chat template; choose a model that is "
                "tuned to chat, or another prompt"
            )
        message = {"role": "user", "content": rendered}
        # The answer is read at once, so a model that may think aloud first is told not to.
        return str(
            tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        )

    def encode(self, tokenizer: PreTrainedTokenizerBase, written: list[str]) -> BatchEncoding:
        """What :meth:`write` gave, to tokens, uncut."""
        # A chat template brings the special tokens itself.
        encoded: BatchEncoding = tokenizer(written, add_special_tokens=not self.chat, verbose=False)
        return encoded

    def fit(self, tokenizer: PreTrainedTokenizerBase, text: str, text_pair: str | None, max_length: int) -> str:
        """:meth:`write`, the input's longer text cut at the end until it has ``max_length`` tokens.

        Cutting the prompt itself would cut off its end, where a decoder reads the answer.

        Raises:
            UserError: the template alone is longer than ``max_length``.
        """

        def shortened(limit: int) -> str:
            return self.write(tokenizer, text[:limit], None if text_pair is None else text_pair[:limit])

        def tokens(limit: int) -> int:
            return len(self.encode(tokenizer, [shortened(limit)])["input_ids"][0])

        longest = max(len(text), len(text_pair or ""))
        if tokens(longest) <= max_length:
            return shortened(longest)
        if tokens(0) > max_length:
            raise UserError(
                f"max_length is {max_length}, but the template of prompt {self.name} alone has {tokens(0)} tokens; "
                "raise max_length or shorten the template"
            )
        # Doubled from few characters: what lies far behind the cut is not read, and so cannot move it.
        fits, over = 0, max_length  # characters of each text
        while over < longest and tokens(over) <= max_length:
            fits, over = over, 2 * over
        over = min(over, longest)
        while over - fits > 1:
            middle = (fits + over) // 2
            fits, over = (middle, over) if tokens(middle) <= max_length else (fits, middle)
        return shortened(fits)

    def verbalizer(self, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str] | None = None) -> Verbalizer:
        """The label words as tokens of one model.

        Args:
            tokenizer: the model's.
            label_names: class names in the order of the scores; by default as the prompt lists them.

        Raises:
            UserError: a class without a word, or a word that the tokenizer cannot read as ``reading`` says
                or that begins like another class's.
        """
        named = self.with_labels(label_names)
        names = list(named.labels) if label_names is None else list(label_names)
        if set(names) != set(named.labels):
            raise UserError(
                f"the task has classes {', '.join(names)}, but prompt {self.name} has words for "
                f"{', '.join(named.labels)}; give every class its words under labels"
            )
        owners: dict[int, tuple[str, str]] = {}
        ids: list[tuple[int, ...]] = []
        for name in names:
            of_class: list[int] = []
            for word in named.labels[name]:
                tokens = self._word_tokens(tokenizer, name, word)
                owner, other = owners.setdefault(tokens[0], (name, word))
                if owner != name:
                    raise UserError(
                        f"words {other!r} of class {owner!r} and {word!r} of class {name!r} begin with the same token "
                        f"{tokenizer.convert_ids_to_tokens(tokens[0])!r}; choose words in prompt {self.name} "
                        "that begin differently"
                    )
                of_class += tokens[:1] if self.reading == "first" else tokens
            ids.append(tuple(dict.fromkeys(of_class)))
        prefix = _encode(tokenizer, self.answer_prefix) if self.answer_prefix else []
        return Verbalizer(tuple(names), tuple(ids), tuple(prefix))

    def _word_tokens(self, tokenizer: PreTrainedTokenizerBase, label: str, word: str) -> list[int]:
        """A word as it goes on from the prompt: behind a space where the prompt does not end in one.

        Tokenizers that mark the beginning of words themselves take the bare word; the form with fewer
        tokens is the one that they were trained on.
        """
        pair = "" if self.needs_pair else None
        bare = self.write(tokenizer, "", pair)[-1:].isspace()
        forms = [word, f" {word}"] if bare else [f" {word}", word]
        tokens = min((_encode(tokenizer, form) for form in forms), key=len)
        pieces = tokenizer.convert_ids_to_tokens(tokens)
        if not tokens or tokenizer.unk_token_id in tokens:
            raise UserError(
                f"word {word!r} of class {label!r} is unknown to the tokenizer; choose another in prompt {self.name}"
            )
        if self.reading == "single" and len(tokens) > 1:
            raise UserError(
                f"word {word!r} of class {label!r} is {len(tokens)} tokens {pieces}, not a single one; choose another "
                f"word in prompt {self.name}, or set its reading to first or mean"
            )
        return tokens


def prompt_names() -> list[str]:
    """The prompts that come with the library."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_prompt(name: str) -> Prompt:
    """A prompt by the name of its task, or from a user's own YAML file.

    Args:
        name: one of :func:`prompt_names`, or a path that ends in ``.yaml`` or ``.yml``.

    Raises:
        UserError: no such prompt or file, or a file that is no prompt.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if name not in prompt_names():
            raise one_of("prompt", name, prompt_names(), "choose one of these, or name a .yaml file of your own")
        path = _FOLDER / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompt file {name!r} ({error}); name an existing YAML file") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"prompt file {name!r} is not YAML ({reason}); {_FOLDER / 'sst2.yaml'} is an example") from None
    return replace(_read(name, content), name=path.stem)


def _read(name: str, content: Any) -> Prompt:
    keys = tuple(item.name for item in fields(Prompt) if item.name != "name")
    if not isinstance(content, dict) or "template" not in content:
        raise UserError(f"prompt {name} has no template; known keys: {', '.join(keys)}; add template")
    for key, value in content.items():
        if key not in keys:
            raise one_of("key", key, keys, f"remove it from prompt {name}")
        if key == "chat" and not isinstance(value, bool):
            raise UserError(f"chat of prompt {name} is {value!r}; write true or false")
        if key not in ("labels", "chat") and not isinstance(value, str):
            raise UserError(f"{key} of prompt {name} is {value!r}; write a text in quotes")
    labels = content.get("labels", {})
    if not isinstance(labels, dict):
        raise UserError(f"labels of prompt {name} are {labels!r}; write one line a class, such as positive: [positive]")
    return Prompt(
        name=name,
        template=content["template"],
        labels={_text(name, label): _words(name, label, words) for label, words in labels.items()},
        pair_template=content.get("pair_template"),
        reading=content.get("reading", "single"),
        answer_prefix=content.get("answer_prefix", ""),
        chat=content.get("chat", False),
    )


def _words(name: str, label: Any, words: Any) -> tuple[str, ...]:
    if words is None:
        return ()
    return tuple(_text(name, word) for word in (words if isinstance(words, list) else [words]))


def _text(name: str, value: Any) -> str:
    """A class name or word; YAML turns a bare yes or no into a truth value."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f'prompt {name} has {value!r} where a word belongs; put words in quotes, such as "yes"')
    return str(value)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _check_template(prompt: str, key: str, template: str, required: tuple[str, ...]) -> None:
    legal = " and ".join(f"{{{name}}}" for name in FIELDS)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key} of prompt {prompt}: {error}; fields are {legal}, a brace is written twice") from None
    for _, name, form, conversion in parts:
        if name is not None and (name not in FIELDS or form or conversion):
            raise UserError(
                f"unknown field {{{name}}} in {key} of prompt {prompt}; fields are {legal}, without format; "
                "a brace is written twice"
            )
    for name in required:
        if name not in _fields(template):
            raise UserError(f"{key} of prompt {prompt} has no {{{name}}}; put it where the text belongs")
