"""Settings of a bulk classification. This module imports no large library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from revmux.data.prompt import Prompt, load_prompt
from revmux.errors import UserError
from revmux.pretrained.config import Dtype

DEFAULT_UNIT_ROWS = 16384


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """What to classify, with which system, and where to write the answers.

    Args:
        input: Rows to classify: a file, a folder, a glob or a URI (s3://, gs://, file://) of Parquet, CSV, TSV, JSON lines
            or Arrow files. All of them must have the same columns.
        output: Folder or URI for the answers. Running the same command again continues an interrupted job.
        model: Frozen task model: a folder or its URI, or a Hugging Face id. Default: the model that the adapter or the plan
            records.
        revision: Branch, tag or commit of the model on the hub. Ignored for folders. Default: the default branch.
        dtype: Data type of the frozen weights. Default: the type that the adapter was trained with, otherwise float32.
        prompt: Prompt with which a language model answers: the name of a shipped prompt, or a YAML file. Default: the
            prompt that the task model or the adapter was trained with.
        adapter: Adapter folder, a URI of one, an id on the Hugging Face hub, or, in a job, models:/NAME@ALIAS. Default: the
            plain model.
        plan: Folder or URI of a plan, or its plan.json. Its adapters and thresholds are used.
        threshold: Confidence below which an input goes on to the next stage of a ladder, or to the plain model. 0 makes
            all answers final. Default: the adapter's own threshold.
        max_length: Maximum number of tokens per input. Longer inputs are truncated. Default: the length that the adapter was
            trained with, otherwise the model's maximum.
        text_column: Column of the text. Default: found by its usual names, such as text or sentence.
        pair_column: Column of the second text, if each input is a pair. Default: found by the usual names of pairs.
        keep_columns: Columns of the input to copy to the output, as a list such as [id,date]. Default: all.
        column_prefix: Prefix of the columns that the job adds, for input columns with the same name.
        all_scores: Whether to write a column with the scores of all labels.
        function: Function that converts the model's scores. Default: softmax, or sigmoid if there is only one label.
        unit_rows: Maximum number of rows per unit of work, which is one output file. At least 1.
        max_batch_tokens: Maximum number of tokens per forward pass, including padding; a single group may always run. At
            least 1. Default: 4096 on CPUs, whose caches are small, and 16384 on GPUs.
        attempts: Number of times that a unit may fail before it is left out. At least 1.
        audit: Share of the rows that also run through the plain model, to measure how often the answers agree. 0..1.
        audit_floor: Stop the job if the agreement is below this share with 99.9% confidence. 0..1. Default: only log a
            warning.
        sample_rows: Number of rows with their texts on the summary page. 0 or more.
        price: Hourly price of a worker's hardware, such as its GPU, in any currency. Progress and summary then show the
            price of the job and of a million rows. Above 0. Default: no prices.
    """

    input: str
    output: str
    model: str | None = None
    revision: str | None = None
    dtype: Dtype | None = None
    prompt: str | Prompt | None = None
    adapter: str | None = None
    plan: str | None = None
    threshold: float | None = None
    max_length: int | None = None
    text_column: str | None = None
    pair_column: str | None = None
    keep_columns: list[str] | None = None
    column_prefix: str = ""
    all_scores: bool = False
    function: Literal["softmax", "sigmoid", "none"] | None = None
    unit_rows: int = DEFAULT_UNIT_ROWS
    max_batch_tokens: int | None = None
    attempts: int = 3
    audit: float = 0.0
    audit_floor: float | None = None
    sample_rows: int = 20
    price: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", load_prompt(self.prompt))
        if self.adapter is not None and self.plan is not None:
            raise UserError(
                f"adapter {self.adapter!r} and plan {self.plan!r} are both given; a plan names its adapters, so omit one"
            )
        if self.model is None and self.adapter is None and self.plan is None:
            raise UserError("model, adapter and plan are all missing; name at least one, such as --model FOLDER")
        for name in ("unit_rows", "max_batch_tokens", "attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; choose 1 or more")
        for name in ("audit", "audit_floor", "threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} is {value}; choose a value from 0 to 1")
        if self.audit_floor is not None and not self.audit:
            raise UserError(f"audit_floor is {self.audit_floor}, but audit is 0; set audit too, such as --audit 0.01")
        if self.sample_rows < 0:
            raise UserError(f"sample_rows is {self.sample_rows}; choose 0 or more")
        if self.price is not None and not self.price > 0:
            raise UserError(f"price is {self.price}; choose more than 0, such as 2.5 per hour")
