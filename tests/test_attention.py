"""Attention in a step: torch's fused kernel, `nn.MultiheadAttention` and transformer layers, compiled, with lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unrolled as ur
from matching import assert_match
from random_cells import assert_as_reference, decision, unrolled
from row_by_row import Batch, answers
from unrolled.operations.attention import attention, attention_backward

F64 = torch.float64
HEADS, SLOTS, SIZE = 2, 3, 4
LENGTHS, T = (2, 4, 0), 4

attend = F.scaled_dot_product_attention
BLIND = torch.tensor([[False, False, False], [True, False, True], [True, True, True]])

KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda x, blind: attend(x, x.flip(1), x),
    "causal": lambda x, blind: attend(x, x, x, is_causal=True),
    "scaled": lambda x, blind: attend(x, x[..., :2, :], x[..., 1:, :], scale=0.7),
    "bool mask": lambda x, blind: attend(x, x, x, attn_mask=blind),
    "float mask": lambda x, blind: attend(x, x, x, attn_mask=blind.to(x.dtype).log()),
    "mask of rows": lambda x, blind: attend(x, x, x, attn_mask=x[:, :1, :, :1] > 0),
    "mask with gradient": lambda x, blind: attend(x, x, x, attn_mask=x[..., :SLOTS]),
    "few heads of keys": lambda x, blind: attend(x, x[:, :1], x[:, 1:], enable_gqa=True),
    "one head": lambda x, blind: attend(x[:, 0], x[:, 1], x[:, 0], attn_mask=blind).unsqueeze(1),
    "narrow values": lambda x, blind: attend(x, x, x[..., 1:], is_causal=True).repeat(1, 1, 1, 2)[..., 1:-1],
}


class KernelsCell(nn.Module):
    """Slots that look at each other, `[B, heads, slots, size]`; the input drives them."""

    def __init__(self, kernels: list[Callable[[Tensor, Tensor], Tensor]]) -> None:
        super().__init__()
        self.kernels, self.linear = kernels, nn.Linear(SIZE, SIZE)
        self.register_buffer("blind", BLIND)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        count = HEADS * SLOTS * SIZE
        slots = torch.linspace(-1, 1, count, device=device, dtype=dtype).view(HEADS, SLOTS, SIZE)
        return slots.expand(batch_size, *slots.shape)

    def forward(self, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.linear(state) + input[:, None, None]
        taken = sum(kernel(x, self.blind) for kernel in self.kernels)
        state = torch.tanh(taken + x)
        return state.flatten(1), state


def _checked(cell: nn.Module, inputs: Tensor, state: Any = None, context: Any = None, *, resets: bool = True) -> None:
    """Native, with the reference's numbers for the whole batch, and with those of each row on its own."""
    found = decision(cell, inputs, "native", state, context)
    assert found.engine == "native", found.why
    net = unrolled(cell, "native")
    assert_as_reference(cell, inputs, state, context=context, engine="native", rnn=net)
    mask = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    mask[1, 0] = mask[3, 1] = resets
    for given in (None, mask) if resets else (None,):
        batch = Batch(inputs, LENGTHS, state, given, context)
        assert_match(answers(net, batch, "list"), answers(net, batch), "rows that end")
        assert net.ran == "native"


@pytest.mark.parametrize("names", [list(KERNELS)[::2], list(KERNELS)[1::2]], ids=", ".join)
def test_every_form_of_torchs_attention_runs_as_c(names):
    torch.manual_seed(0)
    _checked(KernelsCell([KERNELS[name] for name in names]).double(), torch.randn(T, 3, SIZE, dtype=F64))


class MemoryCell(nn.Module):
    """A memory of the latest inputs, `[B, slots, size]`, that torch's own layers look at a context from."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.eval()

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.linspace(-1, 1, SLOTS * SIZE, dtype=dtype).view(1, SLOTS, SIZE).repeat(batch_size, 1, 1)

    def forward(self, input: Tensor, state: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        text, blank = context
        x, seen = torch.cat([state[:, 1:], input.unsqueeze(1)], 1), None
        if isinstance(self.layer, nn.MultiheadAttention):
            time_major = x.transpose(0, 1), text.transpose(0, 1), text.transpose(0, 1)
            looked, seen = self.layer(*time_major, key_padding_mask=blank)
            x = x + looked.transpose(0, 1)
        else:
            x = self.layer(x, text, memory_key_padding_mask=blank)
        return x.mean(1) if seen is None else seen.flatten(1), torch.tanh(x)


LAYERS = {
    "attention, time first": lambda: nn.MultiheadAttention(SIZE, 2, dropout=0.1),
    "decoder, batch first": lambda: nn.TransformerDecoderLayer(SIZE, 2, 6, activation="gelu", batch_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torchs_over_a_context_run_as_c(name):
    torch.manual_seed(4)
    cell, text = MemoryCell(LAYERS[name]()).double(), torch.randn(3, 5, SIZE, dtype=F64)
    blank = torch.arange(5) >= torch.tensor([5, 2, 3]).unsqueeze(1)
    _checked(cell, torch.randn(T, 3, SIZE, dtype=F64), context=(text, blank), resets=False)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", [None, torch.zeros(SLOTS, SLOTS, dtype=F64).masked_fill(~BLIND, -torch.inf)])
def test_the_formula_gives_the_numbers_of_the_fused_kernel_and_its_derivative(mask, causal, heads):
    torch.manual_seed(1)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    query = torch.randn(2, 2, SLOTS, SIZE, dtype=F64)
    key, value, grad = torch.randn(3, 2, 2, SLOTS, SIZE, dtype=F64)
    given = query, key[:, :heads], value[:, :heads]
    taken, total = kernel(*given, 0.0, causal, attn_mask=mask)
    taken_here, total_here = attention(*given, 0.0, causal, attn_mask=mask)
    assert_match(taken_here, taken)
    seen = total_here.isfinite()
    assert_match(total_here[seen], total.to(F64)[seen])
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    want = backward(grad, *given, taken, total, 0.0, causal, attn_mask=mask)
    assert_match(attention_backward(grad, *given, taken, total_here, 0.0, causal, attn_mask=mask), tuple(want))


class GrowingCell(nn.Module):
    """Keys and values of all steps so far, as one writes a decoder: a state that no loop can hand on."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(SIZE, 3 * SIZE)

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        return {name: torch.zeros(batch_size, 0, SIZE, dtype=dtype) for name in ("keys", "values")}

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        query, key, value = self.qkv(input).unsqueeze(1).chunk(3, -1)
        state = {"keys": torch.cat([state["keys"], key], 1), "values": torch.cat([state["values"], value], 1)}
        return attend(query, state["keys"], state["values"]).squeeze(1), state


class RingCell(GrowingCell):
    """The same with the two lines that the refusal names."""

    def initial_state(self, batch_size: int, device: Any = None, dtype: Any = None) -> Any:
        cache = torch.zeros(batch_size, T, 2 * SIZE, dtype=dtype)
        return cache, torch.zeros(batch_size, dtype=torch.int64)

    def forward(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        (cache, count), N = state, T
        query, new = self.qkv(input).unsqueeze(1).split([SIZE, 2 * SIZE], -1)
        cache, count = torch.cat([cache[:, 1:], new], 1), count + 1
        seen = torch.arange(N) >= N - count.unsqueeze(1)
        keys, values = cache.chunk(2, -1)
        return attend(query, keys, values, attn_mask=seen.unsqueeze(1)).squeeze(1), (cache, count)


def test_a_state_that_grows_is_refused_by_name_and_the_remedy_runs_as_c():
    torch.manual_seed(3)
    growing, ring, inputs = GrowingCell().double(), RingCell().double(), torch.randn(T, 3, SIZE, dtype=F64)
    with pytest.raises(ur.CellError) as refusal:
        ur.unroll(growing)(inputs)
    for told in (
        "state['keys'] grew from [3, 0, 4] to [3, 1, 4]",
        "torch.cat([cache[:, 1:], new], 1), count + 1",
        "seen = torch.arange(N) >= N - count.unsqueeze(1)",
    ):
        assert told in str(refusal.value)
        assert told in ur.unroll(growing).plan(inputs).why
    ring.load_state_dict(growing.state_dict())
    _checked(ring, inputs, resets=False)
    state, outputs = growing.initial_state(3, dtype=F64), []
    for input in inputs:
        output, state = growing(input, state)
        outputs.append(output)
    assert_match(ur.unroll(ring)(inputs)[0], torch.stack(outputs))
