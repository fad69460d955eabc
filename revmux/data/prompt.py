"""Prompts: the template that a language model reads, and the words that represent the classes.

A prompt is a YAML file, one file per task, in the ``prompts`` folder of this package or anywhere on disk::

    template: "Sentence: {text}\\nIs it negative or positive?\\nAnswer:"   # {text_pair} for pairs
    labels:                      # class name: its words; without labels, the class names are the words
      negative: [negative]
      positive: [positive]
    pair_template: ...           # replaces template for inputs with a second text
    reading: single              # single: every word is one token; first: the score of a word is that of its
                                 # first token; mean: the mean over all its tokens
    answer_prefix: ""            # decoder input before the answer, for an encoder-decoder
    chat: false                  # true: the template is a user message in the model's own chat template
    bias:                        # added to the score of a class; revmux calibrate fits it
      negative: -0.4
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Any

import yaml

from revmux.errors import UserError, one_of
from revmux.utils.files import write_durably

if TYPE_CHECKING:  # a prompt is a setting too, and settings are read before torch and transformers are imported
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from revmux.backbone import Verbalizer

_WORD = re.compile(r"\s*\S+|\s+")
FIELDS = ("text", "text_pair")
READINGS = ("single", "first", "mean")
_FOLDER = Path(__file__).with_name("prompts")


@dataclass(frozen=True)
class Prompt:
    """A task's template and label words. The name does not count in comparisons.

    Args:
        name: name of the task, or of the file without its suffix.
        template: the text that the model reads, with ``{text}`` and, for pairs, ``{text_pair}``. ``{{`` is a brace.
        labels: the words of each class, in the order of the classes. If empty, the class names are the words.
        pair_template: the template for pairs, if ``template`` is for single texts.
        reading: ``single``, ``first`` or ``mean``; see the module docstring.
        answer_prefix: decoder input before the answer, for an encoder-decoder.
        chat: whether the template is a user message, to be wrapped in the tokenizer's chat template.
        bias: what is added to the score of a class, by its name. Classes that are left out have none.

    Raises:
        UserError: a template has an unknown or missing field, a class has no word, the reading is unknown, or a bias
            belongs to no class.
    """

    name: str = field(compare=False)
    template: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pair_template: str | None = None
    reading: str = "single"
    answer_prefix: str = ""
    chat: bool = False
    bias: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_template(self.name, "template", self.template, required=("text",))
        if self.pair_template is not None:
            _check_template(self.name, "pair_template", self.pair_template, required=FIELDS)
        if self.reading not in READINGS:
            raise one_of("reading", self.reading, READINGS, f"choose one of these in prompt {self.name}")
        for label, words in self.labels.items():
            if not words or not all(word.strip() for word in words):
                raise UserError(f"class {label!r} of prompt {self.name} has no word; add one, such as [{label}]")
        for label in self.bias if self.labels else ():
            if label not in self.labels:
                raise one_of("class", label, self.labels, f"correct the bias of prompt {self.name}")

    @property
    def needs_pair(self) -> bool:
        """Whether an input must have two texts."""
        return "text_pair" in _fields(self.template)

    def with_labels(self, label_names: Sequence[str] | None) -> Prompt:
        """The prompt itself if it lists labels; otherwise a copy in which each class name is its word.

        Raises:
            UserError: the prompt lists no labels and ``label_names`` is empty.
        """
        if self.labels:
            return self
        if not label_names:
            raise UserError(f"prompt {self.name} lists no labels; name the classes, or add labels to the prompt")
        return replace(self, labels={name: (name,) for name in label_names})

    def to_dict(self) -> dict[str, Any]:
        """The prompt as plain data, for artifacts, without values that are None."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content["bias"] = dict(self.bias) or None
        labels = {label: list(words) for label, words in self.labels.items()}
        return {key: value for key, value in (content | {"labels": labels}).items() if value is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], label_names: Sequence[str] | None = None) -> Prompt:
        """Restore a prompt from the output of :meth:`to_dict`.

        Args:
            content: the plain data.
            label_names: the order of the classes, if the data does not keep it.

        Raises:
            UserError: the data is not a prompt.
        """
        rest = dict(content)
        prompt = _read(str(rest.pop("name", "unnamed")), rest)
        if label_names is None or set(label_names) != set(prompt.labels):
            return prompt
        return replace(prompt, labels={name: prompt.labels[name] for name in label_names})

    def difference(self, other: Prompt) -> str:
        """The first difference between two prompts, for messages: ``template 'Text: …' here, 'Sentence: …' there``."""
        own, others = self.to_dict(), other.to_dict()
        for key in ("template", "pair_template", "labels", "reading", "answer_prefix", "chat", "bias"):
            if own.get(key) != others.get(key):
                return f"{key} {own.get(key)!r:.60} here, {others.get(key)!r:.60} there"
        return "no difference"

    def render(self, text: str, text_pair: str | None = None) -> str:
        """The template, filled with one input.

        Raises:
            UserError: the template needs a second text and the input has none, or the reverse.
        """
        if text_pair is None:
            if self.needs_pair:
                raise UserError(
                    f"prompt {self.name} is for pairs of texts, but an input has only one text; choose another prompt"
                )
            return self.template.format(text=text)
        template = self.template if self.pair_template is None else self.pair_template
        if "text_pair" not in _fields(template):
            raise UserError(
                f"prompt {self.name} has no {{text_pair}}, but an input has a second text; add a pair_template"
            )
        return template.format(text=text, text_pair=text_pair)

    def write(self, tokenizer: PreTrainedTokenizerBase, text: str, text_pair: str | None = None) -> str:
        """The complete text that the model reads: :meth:`render`, in the chat template if ``chat`` is set.

        Raises:
            UserError: as in :meth:`render`, or the tokenizer has no chat template.
        """
        rendered = self.render(text, text_pair)
        if not self.chat:
            return rendered
        if not tokenizer.chat_template:
            raise UserError(
                f"prompt {self.name} is a chat prompt, but the model's tokenizer has no chat template; choose a chat "
                "model or another prompt"
            )
        message = {"role": "user", "content": rendered}
        # The answer is read from the next token, so a model with a thinking mode must not use it.
        return str(
            tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        )

    def encode(self, tokenizer: PreTrainedTokenizerBase, written: list[str]) -> BatchEncoding:
        """Tokenize the output of :meth:`write`, without truncation."""
        # A chat template contains the special tokens.
        encoded: BatchEncoding = tokenizer(written, add_special_tokens=not self.chat, verbose=False)
        return encoded

    def fit(self, tokenizer: PreTrainedTokenizerBase, text: str, text_pair: str | None, max_length: int) -> str:
        """Like :meth:`write`, with the ends of the texts truncated so that the result has at most ``max_length`` tokens.

        Both texts keep the same number of words, and of the next word the same number of characters. Truncating the
        prompt itself would remove its end, where a decoder reads the answer.

        Raises:
            UserError: the template alone is longer than ``max_length``.
        """
        # The number of tokens grows with every whole word, but not with every character: half a word may have more
        # tokens than the word. Words are therefore searched first.
        ends = [[match.end() for match in _WORD.finditer(part)] for part in (text, text_pair or "")]

        def shortened(words: int, characters: int = 0) -> str:
            parts = []
            for part, own in zip((text, text_pair), ends, strict=True):
                if part is None or words >= len(own):
                    parts.append(part)
                    continue
                start = own[words - 1] if words else 0
                parts.append(part[: min(start + characters, own[words])])
            first, second = parts
            assert first is not None
            return self.write(tokenizer, first, second)

        def fits(words: int, characters: int = 0) -> bool:
            written = shortened(words, characters)
            return len(self.encode(tokenizer, [written])["input_ids"][0]) <= max_length

        if not fits(0):
            template = self.encode(tokenizer, [shortened(0)])["input_ids"][0]
            raise UserError(
                f"max_length is {max_length}, but the template of prompt {self.name} alone has {len(template)} tokens; "
                "raise max_length or shorten the template"
            )
        words = _largest(lambda count: fits(count), max(map(len, ends)))
        if all(words >= len(own) for own in ends):
            return shortened(words)
        rest = [own[words] - (own[words - 1] if words else 0) for own in ends if words < len(own)]
        return shortened(words, _largest(lambda count: fits(words, count), max(rest)))

    def verbalizer(self, tokenizer: PreTrainedTokenizerBase, label_names: Sequence[str] | None = None) -> Verbalizer:
        """The label words as tokens of one model.

        Args:
            tokenizer: the model's tokenizer.
            label_names: class names in the order of the scores. By default, the order of the prompt.

        Raises:
            UserError: a class has no word, a word does not fit ``reading``, or words of two classes begin with the same
                token.
        """
        named = self.with_labels(label_names)
        names = list(named.labels) if label_names is None else list(label_names)
        if set(names) != set(named.labels):
            raise UserError(
                f"the task has classes {', '.join(names)}, but prompt {self.name} has words for "
                f"{', '.join(named.labels)}; list words for every class under labels"
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
        from revmux.backbone import Verbalizer

        bias = tuple(float(self.bias.get(name, 0.0)) for name in names) if self.bias else ()
        return Verbalizer(tuple(names), tuple(ids), tuple(prefix), bias)

    def _word_tokens(self, tokenizer: PreTrainedTokenizerBase, label: str, word: str) -> list[int]:
        """The tokens of a word that continues the prompt: after a space, unless the prompt ends in one.

        Some tokenizers mark the beginning of words themselves and need the bare word. The form with fewer
        tokens is the one that the tokenizer was trained on.
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
    """Names of the prompts in the library."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_prompt(name: str) -> Prompt:
    """Load a prompt by the name of its task, or from a YAML file.

    Args:
        name: one of :func:`prompt_names`, or a path that ends in ``.yaml`` or ``.yml``.

    Raises:
        UserError: the prompt or file cannot be found, or the file is not a prompt.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if name not in prompt_names():
            raise one_of("prompt", name, prompt_names(), "choose one of these, or name your own .yaml file")
        path = _FOLDER / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompt file {name!r} ({error}); name an existing YAML file") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"prompt file {name!r} is not YAML ({reason}); {_FOLDER / 'sst2.yaml'} is an example") from None
    return replace(_read(name, content), name=path.stem)


def write_prompt(prompt: Prompt, file: Path) -> None:
    """Write a prompt as a YAML file, which has everything but its name."""
    content = {key: value for key, value in prompt.to_dict().items() if key != "name"}
    write_durably(file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _read(name: str, content: Any) -> Prompt:
    keys = tuple(item.name for item in fields(Prompt) if item.name != "name")
    if not isinstance(content, dict) or "template" not in content:
        raise UserError(f"prompt {name} has no template; known keys: {', '.join(keys)}; add template")
    for key, value in content.items():
        if key not in keys:
            raise one_of("key", key, keys, f"remove it from prompt {name}")
        if key == "chat" and not isinstance(value, bool):
            raise UserError(f"chat of prompt {name} is {value!r}; write true or false")
        if key == "bias" and not (
            isinstance(value, dict) and all(type(number) in (int, float) for number in value.values())
        ):
            raise UserError(f"bias of prompt {name} is {value!r}; write one number per class, such as positive: 0.4")
        if key not in ("labels", "chat", "bias") and not isinstance(value, str):
            raise UserError(f"{key} of prompt {name} is {value!r}; write text in quotes")
    labels = content.get("labels", {})
    if not isinstance(labels, dict):
        raise UserError(
            f"labels of prompt {name} are {labels!r}; write one line per class, such as positive: [positive]"
        )
    return Prompt(
        name=name,
        template=content["template"],
        labels={_text(name, label): _words(name, label, words) for label, words in labels.items()},
        pair_template=content.get("pair_template"),
        reading=content.get("reading", "single"),
        answer_prefix=content.get("answer_prefix", ""),
        chat=content.get("chat", False),
        bias={_text(name, label): float(number) for label, number in content.get("bias", {}).items()},
    )


def _words(name: str, label: Any, words: Any) -> tuple[str, ...]:
    if words is None:
        return ()
    return tuple(_text(name, word) for word in (words if isinstance(words, list) else [words]))


def _text(name: str, value: Any) -> str:
    """A class name or word as text. YAML reads an unquoted yes or no as a Boolean, which is an error."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f'prompt {name} has {value!r} in place of a word; put words in quotes, such as "yes"')
    return str(value)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _fields(template: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(template) if name is not None}


def _check_template(prompt: str, key: str, template: str, required: tuple[str, ...]) -> None:
    valid = " and ".join(f"{{{name}}}" for name in FIELDS)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"{key} of prompt {prompt}: {error}; valid fields are {valid}; write a literal brace twice"
        ) from None
    for _, name, form, conversion in parts:
        if name is not None and (name not in FIELDS or form or conversion):
            raise UserError(
                f"unknown field {{{name}}} in {key} of prompt {prompt}; valid fields are {valid}, without a format; "
                "write a literal brace twice"
            )
    for name in required:
        if name not in _fields(template):
            raise UserError(f"{key} of prompt {prompt} has no {{{name}}}; add it at the position of the text")


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to ``limit`` that fits, found by doubling from 1, so that numbers far beyond it are not tried.

    Args:
        fits: whether a number fits; 0 does.
        limit: largest number that is considered.
    """
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit)
    if high == limit and fits(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
