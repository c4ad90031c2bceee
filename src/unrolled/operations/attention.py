"""Attention: the rule for its rows, and what torch's fused kernel and its derivative compute, in simpler operations.

Queries `[B, heads, L, E]` look at keys `[B, heads, S, E]` and take a mean of values `[B, heads, S, E]`. What a query
that may look at nothing takes is zero: its sum of weights is told as infinite, by which every weight is zero.

Source: T. Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", NeurIPS 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unrolled.operations.operation import Operation, declare
from unrolled.operations.row_rules import Place, Rows


def _rows(first: int, count: int) -> Callable[[Rows], list[Place]]:
    """A rule for what reads so many tensors from the first one on, and has all rows in front."""

    def rule(rows: Rows) -> list[Place]:
        mask = rows.keyword("attn_mask")
        places = {rows.place(ref) for ref in rows.op.args[first : first + count]}
        if places != {0} or (mask is not None and rows.place(mask) not in (None, 0)):
            raise rows.refusal("looks at other rows")
        return rows.all_at(0)

    return rule


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`aten._scaled_dot_product_flash_attention_for_cpu`, which knows no dropout.

    Returns:
        What each query takes, `[B, heads, L, E]`, and the logarithm of its sum of weights, `[B, heads, L]`.
    """
    scores = _scores(query, key, is_causal, attn_mask, scale)
    top = scores.amax(-1, True)
    if attn_mask is not None:
        top = top.masked_fill(top == -math.inf, 0.0)
    powers = (scores - top).exp()
    total = powers.sum(-1, True)
    logsumexp = total.log() + top
    if attn_mask is not None:
        blind = total == 0
        total, logsumexp = total.masked_fill(blind, 1.0), logsumexp.masked_fill(blind, math.inf)
    taken = _by_head(powers / total, _repeated(value, query))
    return taken.to(query.dtype), logsumexp.squeeze(-1)


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    taken: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten._scaled_dot_product_flash_attention_for_cpu_backward`: the gradients of queries, keys and values."""
    keys, values = _repeated(key, query), _repeated(value, query)
    weights = (_scores(query, key, is_causal, attn_mask, scale) - logsumexp.unsqueeze(-1)).exp()
    of_weights = _by_head(grad, values.transpose(-2, -1))
    mean = (grad * taken).sum(-1, True)
    of_scores = weights * (of_weights - mean) * _factor(query, scale)
    of_key = _by_head(of_scores.transpose(-2, -1), query)
    of_value = _by_head(weights.transpose(-2, -1), grad)
    return _by_head(of_scores, keys), _added_up(of_key, key), _added_up(of_value, value)


def _factor(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _scores(query: Tensor, key: Tensor, is_causal: bool, attn_mask: Tensor | None, scale: float | None) -> Tensor:
    """What a mask leaves of how well each query fits each key, `[B, heads, L, S]`."""
    scores = _by_head(query * _factor(query, scale), _repeated(key, query).transpose(-2, -1))
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores if attn_mask is None else scores + attn_mask


def _by_head(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices for each head of each row: composite operations would be noted as they are."""
    B, heads, n, k = a.shape
    m = b.shape[-1]
    return torch.bmm(a.reshape(B * heads, n, k), b.reshape(B * heads, k, m)).reshape(B, heads, n, m)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values with as many heads as there are of queries: each serves several that follow each other."""
    B, heads, S, E = x.shape
    many = query.shape[1] // heads
    return x if many == 1 else x.unsqueeze(2).expand(B, heads, many, S, E).reshape(B, heads * many, S, E)


def _added_up(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of keys or values, each of which served several queries."""
    B, heads, S, E = x.shape
    many = grad.shape[1] // heads
    return grad if many == 1 else grad.reshape(B, heads, many, S, E).sum(2)


declare(
    {
        "_scaled_dot_product_flash_attention_for_cpu": Operation(_rows(0, 3), formula=attention),
        "_scaled_dot_product_flash_attention_for_cpu_backward": Operation(_rows(0, 6), formula=attention_backward),
    }
)
