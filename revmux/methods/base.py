"""The interface of a method: all that training, evaluation, cost counting and serving use.

A method sits between the prefill and the head of a frozen backbone::

    tokens ─ embed ─ layers 1..l ─ multiplex ─ layers l+1..e ─ read ─ demultiplex ─ vector ─ score

It overrides only the steps in which it differs. The steps operate on :class:`HiddenState` objects, so a
method may change the length of the shared sequence, its mask, its positions and its answer positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.errors import UserError
from revmux.methods.lora import LoRA
from revmux.methods.naming import MethodNaming


@dataclass(frozen=True)
class BackboneShape:
    """The properties of a backbone that determine the weights of a method.

    Attributes:
        hidden_size: d.
        num_layers: L.
        num_labels: C.
        readout_size: size of the vector that the classifier reads.
        shared_answer: whether the answers of all inputs in a group are at one position.
        vocab_size: size of the token vocabulary.
        encoder_decoder: whether a decoder follows the layers, so that answers are not read from the shared sequence.
    """

    hidden_size: int
    num_layers: int
    num_labels: int
    readout_size: int
    shared_answer: bool
    vocab_size: int
    encoder_decoder: bool = False

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneShape:
        """The shape of a cut backbone."""
        return cls(
            hidden_size=backbone.hidden_size,
            num_layers=backbone.num_layers,
            num_labels=backbone.num_labels,
            readout_size=backbone.readout_size,
            shared_answer=backbone.shared_answer,
            vocab_size=int(backbone.config.vocab_size),
            encoder_decoder=bool(getattr(backbone.config, "is_encoder_decoder", False)),
        )


@dataclass(frozen=True)
class NoOptions:
    """The settings of a method that has none."""


class Method(MethodNaming, nn.Module, ABC):
    """One way for N inputs to share the upper layers of a backbone.

    Args:
        shape: the shape of the backbone that the method is built for.
        num_inputs: N, the number of inputs per group.
        options: an instance of the method's ``Options``.

    Attributes:
        name: the name in configurations, tables and artifacts. :class:`MethodNaming` derives the display names from it.
        Options: dataclass of the method's own settings.
        tunes_backbone: whether the backbone is trained too, in which case its states cannot be stored.
        prepares_tokens: whether :meth:`prepare` changes the tokens, so that the prefill depends on the slot.
        added_tokens: number of tokens that :meth:`prepare` adds to each input. Texts are truncated accordingly.
        matches_teacher: whether :meth:`vector` is in the same space as the backbone's own readout.
        has_auxiliary_loss: whether :meth:`auxiliary_loss` is added to the loss in training.
        warmup_steps: number of first optimizer steps that train on the auxiliary loss only.
        training_only: names of submodules that only the auxiliary loss needs. Artifacts do not contain them.
        lora: low-rank updates of layers l+1..e, if the option ``lora_rank`` is above 0.
    """

    Options: ClassVar[type] = NoOptions
    tunes_backbone: bool = False
    prepares_tokens: bool = False
    added_tokens: int = 0
    matches_teacher: ClassVar[bool] = True
    has_auxiliary_loss: bool = False
    warmup_steps: int = 0
    training_only: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: BackboneShape, num_inputs: int, options: Any = None) -> None:
        super().__init__()
        if num_inputs < 1:
            raise UserError(f"{self.name}: num_inputs is {num_inputs}; choose 1 or more")
        if self.fixed_num_inputs is not None and num_inputs != self.fixed_num_inputs:
            raise UserError(f"{self.name} supports only N = {self.fixed_num_inputs}, not N = {num_inputs}")
        self.shape = shape
        self.num_inputs = num_inputs
        self.options = self.Options() if options is None else options
        self.lora: LoRA | None = None
        if self.lora_rank < 0:
            raise UserError(f"{self.name}: lora_rank is {self.lora_rank}; choose 0 (no LoRA) or more, such as 8")

    @property
    def lora_rank(self) -> int:
        """The rank of the low-rank updates of layers l+1..e; 0 means none."""
        return int(getattr(self.options, "lora_rank", 0))

    def attach(self, backbone: Backbone, prefill_layers: int) -> None:
        """Create the weights that depend on the backbone's layers above the cut. A second call changes nothing.

        Raises:
            UserError: LoRA together with a tuned backbone.
        """
        first, last = prefill_layers, self.exit_layer()
        if not self.lora_rank or first == last:
            return
        if self.tunes_backbone:
            raise UserError(
                f"{self.name}: lora_rank is {self.lora_rank}, but tune_backbone trains the layers themselves; set one of them"
            )
        if self.lora is None:
            self.lora = LoRA(backbone, first, last, self.lora_rank)
        elif (self.lora.first, self.lora.last) != (first, last):
            raise ValueError(f"LoRA belongs to layers {self.lora.first + 1}..{self.lora.last}, not {first + 1}..{last}")

    @property
    def tunes_prefill(self) -> bool:
        """Whether layers 1..l are trained too. A tuned task model keeps its lowest layers frozen."""
        return self.tunes_backbone

    def unfreeze(self, backbone: Backbone, prefill_layers: int) -> None:
        """Unfreeze the part of the backbone that the method tunes. Called only if ``tunes_backbone`` is set."""
        backbone.unfreeze_above(0 if self.tunes_prefill else prefill_layers)

    @property
    def reads_own_states(self) -> bool:
        """Whether answers depend on :meth:`own_states`."""
        return getattr(self.options, "own_state", "none") != "none"

    @property
    def reads_answers_alone(self) -> bool:
        """Whether only the answer states of the shared sequences are read, both for answers and for the loss."""
        return type(self).read is Method.read and not self.has_auxiliary_loss

    @property
    def reads_whole_inputs(self) -> bool:
        """Whether a constant prefix has to be mixed with each input, since :meth:`multiplex` mixes positions with each
        other, or a loss reads all tokens. Otherwise it is mixed once."""
        return self.has_auxiliary_loss

    def exit_layer(self) -> int:
        """e, the layer after which answers are read. It is L unless the method exits early."""
        return self.shape.num_layers

    def check_prefill(self, prefill_layers: int) -> None:
        """Check that l is in 0..e.

        Raises:
            UserError: l is out of range.
        """
        if not 0 <= prefill_layers <= self.exit_layer():
            raise UserError(
                f"prefill_layers is {prefill_layers}, but {self.name} on this backbone supports 0..{self.exit_layer()}; "
                "choose one of these"
            )

    def prepare(self, tokens: TokenBatch) -> TokenBatch:
        """Map grouped tokens (G, N, S) to the tokens that are embedded, (G, N, S')."""
        return tokens

    @abstractmethod
    def multiplex(self, states: HiddenState) -> HiddenState:
        """Mix N prefilled states per group, each tensor (G, N, ...), into one shared sequence (G, ...)."""

    def multiplex_prefix(self, states: HiddenState) -> HiddenState:
        """Mix N copies of the constant prefix, each tensor (1, N, ...), into that of the shared sequences, (1, ...)."""
        return self.multiplex(states)

    def read(self, backbone: Backbone, state: HiddenState) -> Tensor:
        """The answer states of the shared sequences: (G, A, d)."""
        return backbone.answers(state)

    def own_states(self, backbone: Backbone, prefilled: HiddenState) -> Tensor:
        """What :meth:`demultiplex` receives for each of B prefilled inputs: (B, 2d), see :meth:`Backbone.own_states`."""
        return backbone.own_states(prefilled)

    @abstractmethod
    def demultiplex(self, answers: Tensor, own: Tensor) -> Tensor:
        """Recover one answer state per input from the shared answer states.

        Args:
            answers: (G, A, d). A = 1 if all inputs are read at one position, otherwise A = N.
            own: (G, N, 2d), from :meth:`own_states`.

        Returns:
            (G, N, d).
        """

    def vector(self, backbone: Backbone, answer: Tensor) -> Tensor:
        """The vector that the classifier reads: (..., readout_size)."""
        return backbone.readout(answer.to(backbone.dtype))

    def score(self, backbone: Backbone, vector: Tensor) -> Tensor:
        """Label scores (..., C)."""
        return backbone.score(vector)

    def auxiliary_loss(self, backbone: Backbone, shared: HiddenState, token_ids: Tensor, mask: Tensor) -> Tensor:
        """The weighted loss that is added to the task loss. Called only if ``has_auxiliary_loss`` is set.

        Args:
            backbone: the backbone that computed the shared sequences.
            shared: the shared sequences after the upper layers, (G, S', d).
            token_ids: (G, N, S) long, the tokens in each slot, before :meth:`prepare`.
            mask: (G, N, S), their attention mask: 0 or False at padding.

        Returns:
            A scalar.
        """
        raise NotImplementedError(f"{self.name} sets has_auxiliary_loss but defines no auxiliary_loss")

    def inference_state(self) -> dict[str, Tensor]:
        """The state that inference needs: the state dict without the ``training_only`` submodules."""
        return {
            name: value for name, value in self.state_dict().items() if name.partition(".")[0] not in self.training_only
        }

    def drop_training_parts(self) -> None:
        """Remove the ``training_only`` submodules and the auxiliary loss. Answers do not change."""
        for name in self.training_only:
            if hasattr(self, name):
                delattr(self, name)
        self.has_auxiliary_loss = False
        self.warmup_steps = 0

    def options_dict(self) -> dict[str, Any]:
        """The settings as a plain dictionary, for artifacts and logs."""
        return asdict(self.options) if is_dataclass(self.options) else dict(self.options)  # type: ignore[arg-type]

    def tunable_parameters(self) -> int:
        """Number of trainable weights of the method, without those of the backbone."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def divide_width(hidden_size: int, num_inputs: int) -> int:
    """The width of one slot, d / N.

    Raises:
        UserError: d is not divisible by N.
    """
    if hidden_size % num_inputs:
        valid = [n for n in range(2, 33) if hidden_size % n == 0]
        raise UserError(
            f"hidden_size ({hidden_size}) must be divisible by num_inputs ({num_inputs}); "
            f"choose N from {', '.join(map(str, valid))}"
        )
    return hidden_size // num_inputs


def checked_exit_layer(method: str, layer: int | None, num_layers: int) -> int:
    """e, the layer after which answers are read.

    Args:
        method: the method's name, for the error message.
        layer: the setting. None means L.
        num_layers: L.

    Raises:
        UserError: e is not in 0..L.
    """
    if layer is None:
        return num_layers
    if not 0 <= layer <= num_layers:
        raise UserError(
            f"{method}: exit_layer is {layer}; this backbone has layers 0..{num_layers}; choose one of these"
        )
    return layer


def pick_own(slots: Tensor) -> Tensor:
    """For each input, its slot at its own answer position.

    Args:
        slots: (G, A, N, ...), the states of all N slots at each of A answer positions.

    Returns:
        (G, N, ...): all slots of the shared position (A = 1), or the diagonal (A = N).
    """
    if slots.shape[1] == 1:
        return slots[:, 0]
    return slots.diagonal(dim1=1, dim2=2).movedim(-1, 1)


def mix_channels(states: HiddenState, hidden: Tensor, shared_answer: bool) -> HiddenState:
    """Build a shared sequence of the inputs' padded length. Masks are combined by OR, positions by maximum.

    Args:
        states: the prefilled states, each tensor (G, N, ...).
        hidden: the mixed states (G, S, d).
        shared_answer: whether all inputs have the same answer position.

    Returns:
        A state with tensors (G, ...).
    """
    answer = states.answer.squeeze(-1)  # (G, N)
    spans = states.spans
    return HiddenState(
        hidden=hidden,
        mask=states.mask.any(dim=1),  # (G, S)
        answer=answer[:, :1] if shared_answer else answer,
        depth=states.depth,
        positions=None if states.positions is None else states.positions.amax(dim=1),  # (G, S)
        spans=None if spans is None else spans.squeeze(2),  # (G, N, S)
    )
