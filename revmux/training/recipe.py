"""One training run from end to end, in one process or in a worker: data, backbone, method, trainer.

Ray jobs call this module; a script can call it without Ray.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from revmux.adapters.config import AdapterConfig
from revmux.adapters.folder import describe_adapter
from revmux.data.task import TaskData
from revmux.data.tokens import SplitTokens
from revmux.errors import UserError
from revmux.estimate.flops import relative_cost
from revmux.features.base import Features
from revmux.features.key import backbone_digest
from revmux.features.online import OnlineFeatures
from revmux.features.store import open_features
from revmux.features.tokens import SPLITS, TokenizedTask
from revmux.methods import BackboneShape, ExitHead, Method, build_method, method_class
from revmux.model import MultiplexedClassifier
from revmux.pretrained.config import BackboneConfig
from revmux.pretrained.loading import check_length, load_pretrained
from revmux.pretrained.pretrained import Pretrained
from revmux.training.config import MethodConfig, Recipe
from revmux.training.evaluation import Evaluation, evaluate_both
from revmux.training.kept_backbone import keep_backbone, take_backbone
from revmux.training.trainer import Trainer, load_weights


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start.

    Attributes:
        recipe: the run's settings.
        pretrained: the backbone with its tokenizer and identity.
        task: the data.
        model: backbone and method.
        train: features of the training split.
        selection: features of the split that selects the best epoch.
        test: features of the split that is reported.
    """

    recipe: Recipe
    pretrained: Pretrained
    task: TaskData | TokenizedTask
    model: MultiplexedClassifier
    train: Features
    selection: Features
    test: Features

    def trainer(self, **arguments: Any) -> Trainer:
        """The trainer of this run; keyword arguments are passed on to :class:`Trainer`."""
        return Trainer(self.model, self.train, self.selection, self.recipe.optim, self.recipe.loss, **arguments)

    def evaluate_test(self) -> Evaluation:
        """The reported figures: those of the test split, over shuffles, with random groups and with groups by length."""
        return evaluate_both(self.model, self.test, shuffles=self.recipe.shuffles, seed=self.recipe.optim.seed)

    def cost(self) -> float:
        """Counted operations per input relative to SISO, at the mean length of the test split."""
        return relative_cost_at(self.model, self.test)

    def adapter_config(self, metrics: dict[str, float]) -> AdapterConfig:
        """The config of the adapter folder, with the measured figures."""
        training = {
            "recipe": self.recipe.name,
            "seed": self.recipe.optim.seed,
            "optim": vars(self.recipe.optim),
            "loss": vars(self.recipe.loss),
        }
        return describe_adapter(
            self.model,
            self.pretrained,
            self.recipe.backbone.max_length,
            self.task.identity | {"pairs": self.task.is_pair},
            training,
            metrics,
        )


def relative_cost_at(model: MultiplexedClassifier, features: Features) -> float:
    """Counted operations per input relative to SISO, at the mean length of a split."""
    length = max(1, round(float(features.lengths.double().mean())))
    return relative_cost(model.backbone, model.method, model.prefill_layers, length)


def exit_head_config(layer: int) -> MethodConfig:
    """The settings of an exit head at a layer of the backbone."""
    return MethodConfig(ExitHead.name, 1, layer, {"layer": layer})


def check(recipe: Recipe, shape: BackboneShape, workers: int = 1, longest: int | None = None) -> None:
    """Check from shapes alone that a run can be trained, before weights are loaded or a cluster starts.

    Args:
        recipe: the run.
        shape: shape of its backbone.
        workers: number of workers that share a step.
        longest: most tokens per input that the backbone can read; None if unknown.

    Raises:
        UserError: an unknown method or option, l out of range, d not divisible by N, a batch that cannot be
            divided into groups, or texts that leave no room for the tokens that the method adds.
    """
    method = recipe.method
    if recipe.shuffles < 1:
        raise UserError(f"shuffles is {recipe.shuffles}; choose 1 or more")
    with torch.device("meta"):
        built = build_method(method.name, shape, method.num_inputs, method.options)
    built.check_prefill(method.prefill_layers)
    recipe.optim.check_groups(method.num_inputs, workers)
    if longest is not None:
        check_room(recipe.backbone, built, longest)


def check_rows(recipes: Sequence[Recipe], rows: int) -> None:
    """Check that the train split can fill a group of every run.

    Raises:
        UserError: it has fewer rows than the largest N.
    """
    widest = max(recipe.method.num_inputs for recipe in recipes)
    if rows < widest:
        raise UserError(
            f"the train split has {rows} rows, fewer than a group of N = {widest}; choose a smaller N, or more rows"
        )


def check_room(config: BackboneConfig, method: Method, longest: int) -> None:
    """Check that texts leave room for the tokens that a method adds to them.

    Raises:
        UserError: they do not; the message has all three lengths and the largest ``max_length`` that fits.
    """
    added = method.added_tokens
    if added and config.max_length + added > longest:
        raise UserError(
            f"max_length is {config.max_length} and {method.name} adds {added} tokens to every text, but {config.model} "
            f"reads at most {longest}; choose max_length {longest - added} or fewer"
        )


def prepare(
    recipe: Recipe,
    task: TaskData | TokenizedTask,
    device: torch.device | str = "cpu",
    verify: bool | None = None,
    keep: bool = False,
) -> Prepared:
    """Load the backbone, compute or open its features of each split, and build the method.

    Args:
        recipe: the run.
        task: the texts, which are tokenized in memory, or the location of their stored tokens.
        device: where the model runs.
        verify: see :func:`revmux.features.store.open_features`.
        keep: whether to keep the frozen backbone in memory for the next run of this process.

    Raises:
        UserError: the recipe does not fit the backbone or the data.
    """
    method_config = recipe.method
    key = f"{recipe.backbone!r} {task.label_names} {device}"
    kept = take_backbone(key) if keep and not makes_head(recipe) else None
    torch.manual_seed(recipe.optim.seed)  # for a newly created head
    pretrained = load_backbone(recipe, task.label_names, device) if kept is None else kept[0]
    check_labels(pretrained, task)
    backbone = pretrained.backbone.freeze().to(device)
    backbone.gradient_checkpointing = recipe.optim.gradient_checkpointing
    torch.manual_seed(recipe.optim.seed)  # the method's weights do not depend on earlier draws
    method = build_method(
        method_config.name, BackboneShape.of(backbone), method_config.num_inputs, method_config.options
    ).to(device)
    check_room(recipe.backbone, method, backbone.max_length)
    model = MultiplexedClassifier(backbone, method, method_config.prefill_layers)
    splits = tokens_of(task, pretrained, recipe)
    features: list[Features]
    layers = stored_layers(method, method_config.prefill_layers)
    if layers is None:
        features = [OnlineFeatures(split, backbone, with_teacher=False) for split in splits]
    else:
        weights = backbone_digest(backbone) if kept is None else kept[1]
        if keep and not method.tunes_backbone:
            keep_backbone(key, pretrained, weights)
        stores = [
            open_features(pretrained, split, layers, recipe.store, weights=weights, verify=verify) for split in splits
        ]
        if method.tunes_backbone and not all(store.has_teacher for store in stores):
            raise UserError(
                f"{method.name} tunes the backbone, so its teacher must be stored, but the store has no room for it; raise "
                "--store.budget_gb or free some disk space"
            )
        features = [store.at(layers[0]) if layers else store.with_tokens() for store in stores]
    if method.tunes_backbone:
        method.unfreeze(backbone, method_config.prefill_layers)
        check_length(recipe.backbone, backbone)  # a soft prompt uses some of the model's positions
    return Prepared(recipe, pretrained, task, model, *features)


def tokens_of(task: TaskData | TokenizedTask, pretrained: Pretrained, recipe: Recipe) -> list[SplitTokens]:
    """The tokens of the train, selection and test splits: memory-mapped if they are stored, otherwise in memory."""
    if isinstance(task, TokenizedTask):
        return [task.open(split, pretrained.tokenizer, recipe.store) for split in SPLITS]
    return [pretrained.tokenize(getattr(task, split), recipe.backbone.max_length) for split in SPLITS]


def stored_layers(method: Method, prefill_layers: int) -> list[int] | None:
    """The layers whose stored states a run reads, besides the teacher.

    Args:
        method: the run's method.
        prefill_layers: l.

    Returns:
        [l]; an empty list if the method changes the states up to layer l; None if it reads no store at all.
    """
    if method.is_plain and method.tunes_backbone:
        return None
    return [] if method.tunes_backbone or method.prepares_tokens else [prefill_layers]


def layers_read(recipe: Recipe, shape: BackboneShape) -> list[int] | None:
    """Like :func:`stored_layers`, from shapes alone."""
    method = recipe.method
    with torch.device("meta"):
        built = build_method(method.name, shape, method.num_inputs, method.options)
    return stored_layers(built, method.prefill_layers)


def load_backbone(recipe: Recipe, label_names: list[str], device: torch.device | str = "cpu") -> Pretrained:
    """The backbone of a run, with a new head or label words only if the run asks for them.

    Args:
        recipe: the run.
        label_names: the task's classes.
        device: where the caller moves it. Saved weights are loaded there at once, unless the run makes a new head, whose
            random values are drawn on the CPU.
    """
    straight = None if makes_head(recipe) or torch.device(device).type == "cpu" else device
    names = label_names if makes_head(recipe) or recipe.backbone.prompt else None
    return load_pretrained(recipe.backbone, names, device=straight)


def makes_head(recipe: Recipe) -> bool:
    """Whether a backbone without a head gets a new one, which is the case if a task model is tuned."""
    options = recipe.method.options
    return method_class(recipe.method.name).is_plain and bool(options.get("tune_backbone") or options.get("peft_rank"))


def check_labels(pretrained: Pretrained, task: TaskData | TokenizedTask) -> None:
    """Check that the task model has the classes of the data.

    Raises:
        UserError: the classes differ; the message lists both.
    """
    names = pretrained.backbone.label_names
    if names != task.label_names:
        raise UserError(
            f"{pretrained.identity['name']} has the labels {', '.join(names)}, but the data has {', '.join(task.label_names)}; "
            "tune a task model on this data, or choose the data that it was tuned on"
        )


def train_here(prepared: Prepared) -> Evaluation:
    """Train in this process, load the best epoch's weights, and evaluate on the test split."""
    trainer = prepared.trainer()
    for _ in trainer.run():
        pass
    load_weights(prepared.model, trainer.best)
    return prepared.evaluate_test()
