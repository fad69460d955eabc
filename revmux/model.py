"""The complete multiplexed model: prefill, multiplex, upper layers, demultiplex, classify.

Data flows in one direction: text → tokens → prefill state → mixed state → answer states → label scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from revmux.backbone import Backbone, HiddenState, TokenBatch
from revmux.backbone.decoder import DecoderBackbone
from revmux.backbone.prefix import KeptPrefix, kept_exactly
from revmux.backbone.state import Prefix
from revmux.errors import UserError
from revmux.grouping import consecutive_groups, gather_rows
from revmux.methods import BackboneShape, Method, Siso

OnStep = Callable[[str], None]
"""Called after each step with its name: prefill, multiplex, upper, head."""


def _ignore(step: str) -> None:
    """The default callback: do nothing."""


@dataclass(frozen=True)
class GroupOutput:
    """The output for each slot of each group.

    Attributes:
        answers: (G, N, d) demultiplexed answer states.
        vectors: (G, N, readout_size) input of the classifier.
        scores: (G, N, C) label scores before softmax.
        shared: the shared sequences (G, S', d) after the upper layers, for the method's auxiliary loss;
            None if the method has no auxiliary loss.
    """

    answers: Tensor
    vectors: Tensor
    scores: Tensor
    shared: HiddenState | None = None


class MultiplexedClassifier(nn.Module):
    """A frozen backbone with one multiplexing method around its upper layers.

    Args:
        backbone: the cut model. It is shared, not copied.
        method: the adapters, built for this backbone.
        prefill_layers: l, the number of layers that process each input alone.

    Raises:
        UserError: l is out of range for this backbone and method.
    """

    def __init__(self, backbone: Backbone, method: Method, prefill_layers: int) -> None:
        super().__init__()
        method.check_prefill(prefill_layers)
        method.attach(backbone, prefill_layers)
        self.backbone = backbone
        self.method = method
        self.prefill_layers = prefill_layers
        self._kept: KeptPrefix | None = None
        # Copies that share weights, as tuples, so that they are not registered as submodules.
        self._updated: tuple[Backbone] | None = None
        self._merged: tuple[Backbone] | None = None

    @property
    def num_inputs(self) -> int:
        """N, the number of inputs per group."""
        return self.method.num_inputs

    def train(self, mode: bool = True) -> MultiplexedClassifier:
        """Set training mode for the adapters. A frozen backbone stays in eval mode (no dropout)."""
        super().train(mode)
        self.backbone.train(mode and self.method.tunes_backbone)
        return self

    def prefill(self, tokens: TokenBatch) -> HiddenState:
        """Run each input alone through layers 1..l: tokens (B, S) to states (B, S, d).

        A constant prefix is left out, unless the method trains the backbone or puts tokens of its own before the input.
        """
        alone = self.method.tunes_backbone or self.method.prepares_tokens
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.method.tunes_backbone):
            state = self.backbone.embed_whole(tokens) if alone else self.backbone.embed(tokens)
            return self.backbone.run(state, self.prefill_layers)

    def run_groups(self, prefilled: HiddenState, groups: Tensor, on_step: OnStep = _ignore) -> GroupOutput:
        """Multiplex prefilled inputs, run the upper layers once per group, demultiplex and classify.

        Training, evaluation, serving and the operation counter all use this method.

        Args:
            prefilled: B inputs at depth l.
            groups: (G, N) long, the rows of ``prefilled`` in each group. A row may fill several slots.
            on_step: called after each step with its name: ``multiplex``, ``upper`` and ``head``.
        """
        if self.method.reads_whole_inputs:
            prefilled = prefilled.whole()
        own = self.method.own_states(self.backbone, prefilled)[groups]  # (G, N, 2d)
        mixed = self.multiplex(prefilled, groups)  # (G, S', d)
        on_step("multiplex")
        upper = self.upper_in_training(mixed) if self.training else self.upper(mixed)  # (G, S', d) or (G, A, d)
        on_step("upper")
        output = self.answer(upper, own)
        on_step("head")
        return output

    def multiplex(self, prefilled: HiddenState, groups: Tensor) -> HiddenState:
        """Mix B prefilled inputs into G shared sequences (G, S', d) at the same depth; ``groups`` is (G, N)."""
        states = prefilled.take(groups).cast(self._method_dtype)  # every tensor (G, N, ...)
        mixed = self.method.multiplex(states)  # (G, S', d)
        if states.decoder is not None:
            mixed = replace(mixed, decoder=self.method.multiplex(states.decoder))
        prefix = None if prefilled.prefix is None else self.upper_prefix(prefilled.prefix)
        return replace(mixed.cast(self.backbone.dtype), prefix=prefix)

    def upper_prefix(self, prefix: Prefix) -> Prefix:
        """The constant prefix of the shared sequences: N copies of the plain one, mixed, and run through layers l+1..e.

        It is computed once per adapter. In training it is computed in every step, with gradients.

        Args:
            prefix: that of the plain inputs.
        """
        if self.training or torch.is_grad_enabled():
            return self._mix_prefix(prefix)
        weights = [prefix.hidden[self.prefill_layers], *self.method.parameters()]
        if self._kept is None or not self._kept.is_current(weights):
            with kept_exactly(self.backbone.device):
                self._kept = KeptPrefix.of(self._mix_prefix(prefix), weights)
        return self._kept.prefix

    def _mix_prefix(self, prefix: Prefix) -> Prefix:
        constant = prefix.state(self.prefill_layers)  # (1, P, d)
        copies = constant.take(torch.zeros(1, self.num_inputs, dtype=torch.long, device=constant.hidden.device))
        mixed = self.method.multiplex_prefix(copies.cast(self._method_dtype)).cast(self.backbone.dtype)  # (1, P, d)
        upper = self.upper_backbone
        assert isinstance(upper, DecoderBackbone)
        return upper.prefix_above(mixed, self.method.exit_layer())

    @property
    def _method_dtype(self) -> torch.dtype:
        """The precision of the adapters (float32), which is independent of the backbone's precision."""
        return next((weight.dtype for weight in self.method.parameters()), self.backbone.dtype)

    @property
    def upper_backbone(self) -> Backbone:
        """The backbone whose layers l+1..e run shared sequences: with LoRA, a copy that shares its weights."""
        lora = self.method.lora
        if lora is None:
            return self.backbone
        if self._merged is not None and not self.training:
            return self._merged[0]
        if self._updated is None or not lora.is_applied_in(self._updated[0], self.backbone):
            self._updated = (lora.applied_to(self.backbone),)
        updated = self._updated[0]
        updated.gradient_checkpointing = self.backbone.gradient_checkpointing
        return updated

    def merge_lora(self, limit: int) -> None:
        """Merge LoRA's updates into a second copy of the weights that they change, which inference then uses.

        Call it again after the updates have changed. Without LoRA it does nothing.

        Args:
            limit: most bytes of the copy; a larger one is not made. 0 makes none.

        Raises:
            UserError: the limit is negative.
        """
        if limit < 0:
            raise UserError(f"merge_limit is {limit}; choose 0 (LoRA stays unmerged) or more bytes")
        lora = self.method.lora
        if lora is not None and lora.merged_bytes(self.backbone) <= limit:
            self._merged = (lora.merged_into(self.backbone),)

    def upper(self, mixed: HiddenState) -> HiddenState:
        """Run shared sequences through layers l+1..e; the shape does not change."""
        return self.upper_backbone.run(mixed, self.method.exit_layer())

    def upper_in_training(self, mixed: HiddenState) -> HiddenState:
        """Like :meth:`upper`, but the last layer may skip tokens that are not read, so its rounding may differ."""
        if not self.method.reads_answers_alone:
            return self.upper(mixed)
        return self.upper_backbone.run_to_answers(mixed, self.method.exit_layer())

    def answer(self, upper: HiddenState, own: Tensor) -> GroupOutput:
        """Demultiplex and classify the output of the upper layers.

        Args:
            upper: (G, S', d) at depth e, or (G, A, d) if it holds the answer positions only.
            own: (G, N, 2d), the own states of the inputs after the prefill.
        """
        dtype = self._method_dtype
        shared_answers = self.method.read(self.backbone, upper).to(dtype)  # (G, A, d)
        answers = self.method.demultiplex(shared_answers, own.to(dtype))  # (G, N, d)
        vectors = self.method.vector(self.backbone, answers)  # (G, N, readout_size)
        scores = self.method.score(self.backbone, vectors)  # (G, N, C)
        shared = upper.cast(dtype) if self.method.has_auxiliary_loss else None
        return GroupOutput(answers, vectors.float(), scores.float(), shared)

    def slot_tokens(self, tokens: TokenBatch, groups: Tensor) -> tuple[TokenBatch, Tensor]:
        """The tokens to prefill, and the rows of each group in them.

        Args:
            tokens: each (B, S).
            groups: (G, N) long, rows of ``tokens``.

        Returns:
            ``tokens`` and ``groups`` unchanged. If the method prepares tokens: one row per slot (G·N, S'), and
            the groups of those rows.

        Raises:
            UserError: the inputs are longer than the backbone's maximum length.
        """
        grouped = tokens
        if self.method.prepares_tokens:
            grouped = self.method.prepare({name: tensor[groups] for name, tensor in tokens.items()})  # (G, N, S')
        length, limit, added = grouped["input_ids"].shape[-1], self.backbone.max_length, self.method.added_tokens
        if length > limit:
            raise UserError(
                f"inputs have {length} tokens ({added} of them added by {self.method.name}), but the backbone accepts "
                f"at most {limit}; truncate texts to {limit - added} tokens"
            )
        if not self.method.prepares_tokens:
            return tokens, groups
        flat = {name: tensor.flatten(0, 1) for name, tensor in grouped.items()}  # (G·N, S')
        return flat, torch.arange(groups.numel(), device=groups.device).view_as(groups)

    def run_tokens(self, tokens: TokenBatch, groups: Tensor, on_step: OnStep = _ignore) -> GroupOutput:
        """Run :meth:`prefill` and :meth:`run_groups`, also for methods whose tokens depend on the slot.

        Args:
            tokens: each (B, S).
            groups: (G, N) long, rows of ``tokens``.
            on_step: called after each step with its name, ``prefill`` first.
        """
        tokens, groups = self.slot_tokens(tokens, groups)
        prefilled = self.prefill(tokens)
        on_step("prefill")
        return self.run_groups(prefilled, groups, on_step)

    def run_batch(self, tokens: TokenBatch | None, prefilled: HiddenState | None, groups: Tensor) -> GroupOutput:
        """Run a batch of features from its prefilled states if it has them, otherwise from its tokens.

        Args:
            tokens: each (B, S).
            prefilled: the same B inputs at depth l.
            groups: (G, N) long, rows of the batch.
        """
        if prefilled is not None:
            return self.run_groups(prefilled, groups)
        assert tokens is not None
        return self.run_tokens(tokens, groups)

    def forward(self, tokens: TokenBatch, groups: Tensor | None = None) -> Tensor:
        """Label scores per input.

        Args:
            tokens: each (B, S).
            groups: (G, N) long. By default, consecutive inputs form a group.

        Returns:
            (B, C) scores. An input that fills several slots gets the mean of its scores.
        """
        rows = tokens["input_ids"].shape[0]
        if groups is None:
            groups = consecutive_groups(rows, self.num_inputs).to(tokens["input_ids"].device)
        return gather_rows(self.run_tokens(tokens, groups).scores, groups, rows)


def plain_classifier(backbone: Backbone) -> MultiplexedClassifier:
    """SISO: the plain model, with the same interface as a multiplexed model."""
    return MultiplexedClassifier(backbone, Siso(BackboneShape.of(backbone)), 0)
