"""Every method's formula on numbers small enough to compute by hand, for N = 2 and N = 4."""

import pytest
import torch
from torch import Tensor, nn

from revmux.backbone import HiddenState
from revmux.methods import BackboneShape, build_method

pytestmark = pytest.mark.numeric


def shape(hidden: int, shared_answer: bool = True) -> BackboneShape:
    return BackboneShape(
        hidden, num_layers=3, num_labels=2, readout_size=hidden, shared_answer=shared_answer, vocab_size=99
    )


def states(hidden: list, lengths: list[int] | None = None, answer: list[int] | None = None) -> HiddenState:
    """One group: ``hidden`` is (N, S, d) as nested lists."""
    tensor = torch.tensor(hidden, dtype=torch.float32).unsqueeze(0)
    _, inputs, length, _ = tensor.shape
    ends = torch.tensor(lengths or [length] * inputs)
    mask = (torch.arange(length) < ends.unsqueeze(1)).unsqueeze(0)
    return HiddenState(tensor, mask, torch.tensor(answer or [0] * inputs).view(1, inputs, 1), depth=0)


def fill(layer: nn.Linear, weight: list, bias: list | None = None) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=torch.float32))
        if layer.bias is not None:
            layer.bias.copy_(torch.tensor(bias or [0.0] * layer.out_features, dtype=torch.float32))


def close(actual: Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-4)


def reversible_pair(name: str):
    """N = 2, d = 2: f_1(x) = 2·max(x, 0) + 3·max(−x, 0) + 1 and f_2(x) = max(2x, 0) − max(x + 1, 0)."""
    method = build_method(name, shape(2), 2)
    fill(method.down, [[1, 2]])
    first, second = method.chain.functions
    fill(first.inner, [[1], [-1]])
    fill(first.outer, [[2, 3]], [1])
    fill(second.inner, [[2], [1]], [0, 1])
    fill(second.outer, [[1, -1]])
    return method


def reversible_four(name: str):
    """N = 4, d = 4: f_down takes the first channel, f_k(x) = k·max(x, 0)."""
    method = build_method(name, shape(4), 4)
    fill(method.down, [[1, 0, 0, 0]])
    for k, function in enumerate(method.chain.functions, start=1):
        fill(function.inner, [[1], [0], [0], [0]])
        fill(function.outer, [[k, 0, 0, 0]])
    return method


@pytest.mark.parametrize("name", ["revmux", "only-multiplexer-reversible"])
def test_reversible_multiplexer_of_two(name):
    # i = (1 + 4, 3 - 2) = (5, 1); o_1 = 5 + f_1(1) = 5 + 3 = 8; o_2 = 1 + f_2(8) = 1 + 16 - 9 = 8
    close(reversible_pair(name).multiplex(states([[[1, 2]], [[3, -1]]])).hidden, [[[8, 8]]])


@pytest.mark.parametrize("name", ["revmux", "only-multiplexer-reversible"])
def test_reversible_multiplexer_of_four(name):
    # i = (1, 2, 3, 4); o_1 = 1 + 1·2 = 3; o_2 = 2 + 2·3 = 8; o_3 = 3 + 3·8 = 27; o_4 = 4 + 4·27 = 112
    inputs = states([[[k, 9, 9, 9]] for k in (1, 2, 3, 4)])
    close(reversible_four(name).multiplex(inputs).hidden, [[[3, 8, 27, 112]]])


def test_reverse_demultiplexer_of_two():
    method = reversible_pair("revmux")
    method.up = nn.Linear(1, 2)
    fill(method.up, [[1], [10]])
    # î_2 = 1 - f_2(4) = 1 - (8 - 5) = -2; î_1 = 4 - f_1(-2) = 4 - (6 + 1) = -3
    close(method.demultiplex(torch.tensor([[[4.0, 1.0]]]), torch.zeros(1, 2, 2)), [[[-3, -30], [-2, -20]]])


def test_reverse_demultiplexer_of_four():
    method = reversible_four("revmux")
    method.up = nn.Linear(1, 4)
    fill(method.up, [[1], [0], [0], [2]])
    # î_4 = 5 - 4·2 = -3; î_3 = 2 - 3·max(-1, 0) = 2; î_2 = -1 - 2·10 = -21; î_1 = 10 - 1·max(-21, 0) = 10
    answers = torch.tensor([[[10.0, -1.0, 2.0, 5.0]]])
    expected = [[[10, 0, 0, 20], [-21, 0, 0, -42], [2, 0, 0, 4], [-3, 0, 0, -6]]]
    close(method.demultiplex(answers, torch.zeros(1, 4, 4)), expected)


def test_each_answer_position_is_read_for_its_own_slot():
    method = reversible_pair("revmux")
    method.up = nn.Linear(1, 2)
    fill(method.up, [[1], [0]])
    # Slot 1 is read where ô = (4, 1): -3 as above. Slot 2 where ô = (8, 8): 8 - f_2(8) = 8 - 7 = 1.
    answers = torch.tensor([[[4.0, 1.0], [8.0, 8.0]]])
    close(method.demultiplex(answers, torch.zeros(1, 2, 2)), [[[-3, 0], [1, 0]]])


def test_revmux_linear_correction_adds_a_map_of_the_own_state():
    method = build_method("revmux", shape(2), 2, {"own_state": "linear"})
    method.up = nn.Linear(1, 2)
    fill(method.up, [[0], [0]])
    fill(method.own_state.outer, [[1, 1, 1, 0], [0, 2, 0, 1]])
    # [answer ; mean] of slot 1: (1, 2, 5, 6) → (1 + 2 + 5, 4 + 6); of slot 2: (3, 4, 7, 8) → (3 + 4 + 7, 8 + 8)
    own = torch.tensor([[[1.0, 2.0, 5.0, 6.0], [3.0, 4.0, 7.0, 8.0]]])
    close(method.demultiplex(torch.zeros(1, 1, 2), own), [[[8, 10], [14, 16]]])


def test_vanilla_multiplexer_of_two():
    method = build_method("vanilla-adapter", shape(1), 2)
    fill(method.mapping, [[2]], [1])
    fill(method.inner, [[1, 1], [1, -1], [0, 1]], [0, 0, 6])
    fill(method.outer, [[5, 1, 2]], [-1])
    # mapped (3, -5); (-2, 8, 1) after the first layer, (0, 8, 1) after ReLU; 8 + 2 - 1 = 9
    close(method.multiplex(states([[[1]], [[-3]]])).hidden, [[[9]]])
    first, second, third = (layer for layer in method.demultiplexer.layers if isinstance(layer, nn.Linear))
    fill(first, [[1], [-1], [2]])
    fill(second, [[1, 0, 1], [0, 1, 0], [1, 0, -1]])
    fill(third, [[1, 0, 0], [0.5, 0, 0]], [0, 1])
    # 2 → (2, -2, 4) → ReLU (2, 0, 4) → (6, 0, -2) → ReLU (6, 0, 0) → (6, 3 + 1)
    close(method.demultiplex(torch.tensor([[[2.0]]]), torch.zeros(1, 2, 1)), [[[6], [4]]])


def test_vanilla_multiplexer_of_four():
    method = build_method("vanilla-adapter", shape(1), 4)
    fill(method.mapping, [[1]])
    fill(method.inner, [[1, 1, 1, 1], [1, -1, 1, -1], [0, 0, 0, 2]])
    fill(method.outer, [[1, 1, -1]])
    # (10, -2, 8) → ReLU (10, 0, 8) → 10 - 8 = 2
    close(method.multiplex(states([[[1]], [[2]], [[3]], [[4]]])).hidden, [[[2]]])
    first, second, third = (layer for layer in method.demultiplexer.layers if isinstance(layer, nn.Linear))
    fill(first, [[1], [-1], [2]])
    fill(second, [[1, 0, 1], [0, 1, 0], [1, 0, -1]])
    fill(third, [[1, 0, 0], [2, 0, 0], [3, 0, 0], [-1, 0, 0]])
    close(method.demultiplex(torch.tensor([[[2.0]]]), torch.zeros(1, 4, 1)), [[[6], [12], [18], [-6]]])


def test_output_relu_sets_negative_values_to_zero():
    method = build_method("vanilla-adapter", shape(1), 2, {"output_relu": True})
    fill(method.outer, [[0, 0, 0]], [-1])
    close(method.multiplex(states([[[1]], [[-3]]])).hidden, [[[0]]])


@pytest.mark.parametrize("name", ["datamux", "mux-plm"])
def test_gaussian_keys(name):
    two = build_method(name, shape(2), 2)
    two.keys.keys.data = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    # (1, 1)·(1, 2) + (2, 4)·(3, -1) = (1, 2) + (6, -4) = (7, -2), halved
    close(two.multiplex(states([[[1, 1]], [[2, 4]]])).hidden, [[[3.5, -1]]])
    four = build_method(name, shape(1), 4)
    four.keys.keys.data = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    # 1 - 2 + 6 + 2 = 7, over 4
    close(four.multiplex(states([[[1]], [[-1]], [[2]], [[0.5]]])).hidden, [[[1.75]]])


def test_gaussian_keys_have_the_given_norm():
    method = build_method("datamux", shape(8), 4, {"key_norm": 20.0})
    close(method.keys.keys.norm(dim=-1), [20.0] * 4)


def test_orthogonal_keys():
    two = build_method("datamux", shape(2), 2, {"keys": "orthogonal"})
    fill(two.keys.keys[0], [[0, 1], [1, 0]])
    fill(two.keys.keys[1], [[1, 0], [0, -1]])
    # (2, 1) + (3, -4) = (5, -3), over √2 = 1.414214
    close(two.multiplex(states([[[1, 2]], [[3, 4]]])).hidden, [[[3.535534, -2.121320]]])
    four = build_method("datamux", shape(1), 4, {"keys": "orthogonal"})
    for key, sign in zip(four.keys.keys, (1, -1, 1, -1)):
        fill(key, [[sign]])
    # 1 - 2 + 3 - 10 = -8, over √4
    close(four.multiplex(states([[[1]], [[2]], [[3]], [[10]]])).hidden, [[[-4]]])


def test_index_prefix_marks_each_slot():
    method = build_method("datamux", shape(1), 2, {"index_tokens": [91, 92, 90]})
    tokens = {
        "input_ids": torch.tensor([[[5, 6, 7], [5, 8, 0]]]),
        "attention_mask": torch.tensor([[[1, 1, 1], [1, 1, 0]]]),
        "token_type_ids": torch.tensor([[[0, 0, 1], [0, 1, 0]]]),
    }
    prepared = method.prepare(tokens)
    assert prepared["input_ids"].tolist() == [[[91, 90, 5, 5, 6, 7], [90, 92, 5, 5, 8, 0]]]
    assert prepared["attention_mask"].tolist() == [[[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]]
    assert prepared["token_type_ids"].tolist() == [[[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 0]]]


@pytest.mark.parametrize("num_inputs", [2, 4])
def test_index_demultiplexer_combines_index_token_and_cls(num_inputs):
    method = build_method("datamux", shape(1), num_inputs)
    fill(method.dense, [[2, 3]])
    method.norm = nn.Identity()
    method.eval()
    # At these sizes gelu(x) = x: 2 · place + 3 · 5; the last state read is the CLS.
    answers = torch.tensor([[*[[10.0], [20.0], [30.0], [40.0]][:num_inputs], [5.0]]])
    expected = [[[35], [55], [75], [95]][:num_inputs]]
    close(method.demultiplex(answers, torch.zeros(1, num_inputs, 1)), expected)


@pytest.mark.parametrize("num_inputs", [2, 4])
def test_mlp_demultiplexer_has_one_layer_per_slot(num_inputs):
    method = build_method("datamux", shape(1), num_inputs, {"demultiplexer": "mlp"}).eval()
    for k, layer in enumerate(method.slots.dense, start=2):
        fill(layer, [[k]])
    method.slots.norm = nn.ModuleList(nn.Identity() for _ in range(num_inputs))
    expected = [[[20], [30], [40], [50]][:num_inputs]]
    close(method.demultiplex(torch.tensor([[[10.0]]]), torch.zeros(1, num_inputs, 1)), expected)


@pytest.mark.parametrize("num_inputs", [2, 4])
def test_rsa_demultiplexer(num_inputs):
    method = build_method("mux-plm", shape(1), num_inputs)
    demultiplexer = method.demultiplexer
    demultiplexer.keys.data = torch.arange(1.0, num_inputs + 1).unsqueeze(1)
    fill(demultiplexer.dense[0], [[10, 1]])
    fill(demultiplexer.dense[1], [[2]])
    fill(demultiplexer.last, [[3]])
    demultiplexer.norm = nn.ModuleList([nn.Identity(), nn.Identity()])
    demultiplexer.last_norm = nn.Identity()
    # Slot k: 10k + 5; then x + 2x = 3x; then x + 3x = 4x. Slot 1: 15, 45, 180.
    expected = [[[180], [300], [420], [540]][:num_inputs]]
    close(method.demultiplex(torch.tensor([[[5.0]]]), torch.zeros(1, num_inputs, 1)), expected)


def test_contextual_multiplexer_adds_both_contexts():
    method = build_method("mux-plm", shape(1), 2, {"multiplexer": "contextual"}).eval()
    method.keys.keys.data = torch.tensor([[2.0], [3.0]])

    class Const(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, hidden, seen):
            return torch.full_like(hidden, self.value)

    method.mixer.over_tokens, method.mixer.over_slots = Const(1.0), Const(10.0)
    # c = ((4 + 1)·2, (6 + 1)·3) = (10, 21); mean of (20, 31); at place 2 the second input has ended: (5 + 1)·2 + 10 = 22, halved
    mixed = method.multiplex(states([[[4], [5]], [[6], [7]]], lengths=[2, 1]))
    close(mixed.hidden, [[[25.5], [11]]])


def test_token_split_of_two_pools_means_and_keeps_the_answer_token():
    method = build_method("token-split", shape(1), 2)
    mixed = method.multiplex(states([[[10], [1], [3], [8]], [[20], [5], [7], [99]]], lengths=[4, 3]))
    # First input: 10, mean(1, 3) = 2, 8 alone. Second: 20, mean(5, 7) = 6, and an empty block.
    close(mixed.hidden[0, :5], [[10], [2], [8], [20], [6]])
    assert mixed.segments.tolist() == [[1, 1, 1, 2, 2, 0]]
    assert mixed.mask.tolist() == [[True, True, True, True, True, False]]
    assert mixed.answer.tolist() == [[0, 3]]


def test_token_split_of_four():
    method = build_method("token-split", shape(1), 4)
    one = [[10], [1], [2], [3], [6], [50]]
    mixed = method.multiplex(states([one, one, one, one], lengths=[6, 5, 3, 1]))
    # (1 + 2 + 3 + 6) / 4 = 3 and 50 alone; 3; (1 + 2) / 2 = 1.5; only the answer token
    close(mixed.hidden[0, [0, 1, 2, 3, 4, 6, 7, 9]], [[10], [3], [50], [10], [3], [10], [1.5], [10]])
    assert mixed.segments.tolist() == [[1, 1, 1, 2, 2, 0, 3, 3, 0, 4, 0, 0]]
    assert mixed.answer.tolist() == [[0, 3, 6, 9]]


def test_token_split_keeps_the_last_token_last_for_causal_backbones():
    method = build_method("token-split", shape(1, shared_answer=False), 2)
    inputs = states([[[1], [3], [8], [10]], [[5], [7], [20], [99]]], lengths=[4, 3], answer=[3, 2])
    mixed = method.multiplex(inputs)
    close(mixed.hidden[0, [0, 1, 2, 3, 5]], [[2], [8], [10], [6], [20]])
    assert mixed.segments.tolist() == [[1, 1, 1, 2, 0, 2]]
    assert mixed.answer.tolist() == [[2, 5]]


def test_token_split_correction_reads_answer_and_own_state():
    method = build_method("token-split", shape(1), 2)
    fill(method.own_state.inner, [[2, 3, 1]])
    fill(method.own_state.outer, [[1]], [0.5])
    # 10 + (2·10 + 3·20 + 5 + 0.5) = 95.5; 20 + (2·20 + 3·10 + 5 + 0.5) = 95.5
    own = torch.tensor([[[20.0, 5.0], [10.0, 5.0]]])
    close(method.demultiplex(torch.tensor([[[10.0], [20.0]]]), own), [[[95.5], [95.5]]])
