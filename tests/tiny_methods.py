"""Methods on tiny backbones, and inputs of different lengths."""

import torch
from tiny_models import tiny_classifier
from torch import Tensor

from revmux import BackboneShape, build_method
from revmux.backbone import Backbone, TokenBatch
from revmux.methods import Method

LENGTH, PADDING = 9, 0


def tiny_bert(hidden: int = 80) -> Backbone:
    return tiny_classifier("bert", hidden_size=hidden, intermediate_size=96)


def tiny_llama() -> Backbone:
    return tiny_classifier("llama", num_key_value_heads=2, pad_token_id=PADDING)


def randomised(backbone: Backbone, name: str, num_inputs: int, options: dict) -> Method:
    """A method whose zero-initialised layers are made non-zero."""
    torch.manual_seed(1)
    method = build_method(name, BackboneShape.of(backbone), num_inputs, options)
    for parameter in method.parameters():
        parameter.data.normal_(0, 0.2)
    return method.eval()


def texts(rows: int, length: int = LENGTH) -> TokenBatch:
    """Random inputs of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (rows, length), generator=generator)
    mask = (torch.arange(length) < (3 + torch.arange(rows) % (length - 2)).unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def groups_of(num_inputs: int) -> Tensor:
    return torch.arange(2 * num_inputs).view(2, num_inputs)


def with_padding(tokens: TokenBatch, columns: int, garbage: int) -> TokenBatch:
    """The same inputs with more padding columns, and another token under all padding."""
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    more = torch.zeros(len(ids), columns, dtype=torch.long)
    mask = torch.cat([mask, more], dim=1)
    return {"input_ids": torch.cat([ids, more], dim=1) * mask + garbage * (1 - mask), "attention_mask": mask}
