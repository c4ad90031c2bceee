"""What is made of outputs: every number row by row by hand, and nothing of what stands in the padding."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import unrolled as ur
from unrolled.errors import InputError, OptionError
from unrolled.trees import Tree, leaves, map_leaves

F64 = torch.float64
T, B, H = 6, 4, 3
LAYOUTS = ["time first", "batch first", "packed"]
HOWS = ["mean", "max", "sum"]
GARBAGE = [float("nan"), float("inf"), 1e30]

BY_HAND = {
    "last": lambda row: row[-1],
    "mean": lambda row: row.sum(0) / len(row),
    "max": lambda row: row.amax(0),
    "sum": lambda row: row.sum(0),
}
ours = {"last": ur.last_output} | {how: partial(ur.pooled, how=how) for how in HOWS}


def rows_of(lengths: list[int], *shape: int, dtype: torch.dtype = F64) -> list[Tensor]:
    return [torch.randn(n, *shape, dtype=dtype) for n in lengths]


def padded(rows: list[Tensor], steps: int = T, garbage: float = float("nan")) -> Tensor:
    """Rows of different lengths as `[steps, B, ...]`, garbage where they have ended."""
    batch = torch.full((steps, len(rows), *rows[0].shape[1:]), garbage, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        batch[: len(row), i] = row
    return batch


def laid_out(batch: Tensor, lengths: list[int], layout: str) -> tuple[Any, dict[str, Any]]:
    """The batch as a caller has it, and what else is passed along."""
    if layout == "packed":
        return pack_padded_sequence(batch, torch.tensor(lengths), enforce_sorted=False), {}
    if layout == "batch first":
        return batch.transpose(0, 1).contiguous(), {"lengths": lengths, "batch_first": True}
    return batch, {"lengths": lengths}


def padding_of(lengths: list[int], steps: int = T) -> Tensor:
    return torch.arange(steps).unsqueeze(1) >= torch.tensor(lengths)


lengths_from = {
    least: st.lists(st.integers(least, T), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) > 0)
    for least in (0, 1)
}


# -- many to one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ours)
@settings(max_examples=25, deadline=None)
@given(lengths=lengths_from[1], garbage=st.sampled_from(GARBAGE))
def test_a_row_is_reduced_as_if_it_were_alone(name, layout, lengths, garbage):
    rows = [row.requires_grad_() for row in rows_of(lengths, H)]
    batch = padded([row.detach() for row in rows], garbage=garbage).requires_grad_()
    outputs, rest = laid_out(batch, lengths, layout)
    got, want = ours[name](outputs, **rest), torch.stack([BY_HAND[name](row) for row in rows])
    torch.testing.assert_close(got, want)

    factors = torch.randn_like(got)
    (got * factors).sum().backward()
    (want * factors).sum().backward()
    for i, row in enumerate(rows):
        torch.testing.assert_close(batch.grad[: len(row), i], row.grad)
    assert (batch.grad[padding_of(lengths)] == 0).all()


@settings(max_examples=25, deadline=None)
@given(lengths=lengths_from[0])
def test_the_sum_of_no_step_is_zero(lengths):
    rows = rows_of(lengths, H)
    got = ur.pooled(padded(rows), lengths, how="sum")
    torch.testing.assert_close(got, torch.stack([row.sum(0) for row in rows]))


@pytest.mark.parametrize("name", ours)
def test_without_lengths_all_steps_count(name):
    batch = torch.randn(T, B, H, dtype=F64)
    want = torch.stack([BY_HAND[name](row) for row in batch.unbind(1)])
    torch.testing.assert_close(ours[name](batch), want)
    torch.testing.assert_close(ours[name](batch.transpose(0, 1), batch_first=True), want)


@pytest.mark.parametrize("name", ours)
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, partial(torch.tensor, dtype=torch.uint8)])
def test_lengths_come_as_a_list_or_a_tensor(name, kind):
    rows = rows_of([3, 1, T], H)
    torch.testing.assert_close(ours[name](padded(rows), kind([3, 1, T])), ours[name](padded(rows), [3, 1, T]))


class Heads(NamedTuple):
    words: Tensor
    tags: dict[str, Tensor]


@pytest.mark.parametrize("name", ours)
def test_a_tree_of_outputs_gives_the_same_tree(name):
    lengths = [2, T, 1]
    outputs = Heads(padded(rows_of(lengths)), {"a": padded(rows_of(lengths, H)), "b": padded(rows_of(lengths, 2, H))})
    got = ours[name](outputs, lengths)
    assert isinstance(got, Heads)
    assert [leaf.shape for leaf in leaves(got)] == [(3,), (3, H), (3, 2, H)]
    for one, leaf in zip(leaves(got), leaves(outputs), strict=True):
        torch.testing.assert_close(one, ours[name](leaf, lengths))


@pytest.mark.parametrize("name", ["last", "max", "sum"])
def test_integers_are_outputs_too(name):
    lengths = [3, 1]
    tokens = torch.randint(-9, 9, (T, 2, H))
    want = torch.stack([BY_HAND[name](tokens[:n, i]) for i, n in enumerate(lengths)])
    assert torch.equal(ours[name](tokens, lengths), want)


def test_where_all_is_minus_infinity_so_is_the_largest_and_its_gradient_stays_in_the_row():
    outputs = torch.full((T, 1), float("-inf"), requires_grad=True)
    largest = ur.pooled(outputs, [2], how="max")
    largest.sum().backward()
    assert largest.item() == float("-inf")
    assert outputs.grad[:2].sum() == 1
    assert (outputs.grad[2:] == 0).all()


@pytest.mark.parametrize("name", ours)
def test_nan_that_is_no_padding_is_not_hidden(name):
    batch = torch.zeros(T, 2)
    batch[1, 0] = float("nan")
    assert ours[name](batch, [2, T]).isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_mean_of_halves_is_as_exact_as_torchs(dtype):
    """Their sum is beyond the range of float16, and bfloat16 would stop counting at 256."""
    batch = torch.full((3000, 2), 100.0, dtype=dtype)
    got = ur.pooled(batch, [3000, 2999])
    assert got.dtype == dtype
    assert torch.equal(got, batch[:2, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ours)
def test_gradients_pass_gradcheck_twice(name, layout):
    lengths = [T, 2, 1]

    def reduced(batch: Tensor) -> Tensor:
        outputs, rest = laid_out(batch, lengths, layout)
        return ours[name](outputs, **rest)

    batch = torch.randn(T, 3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(reduced, batch)
    assert torch.autograd.gradgradcheck(reduced, batch)


# -- many to many ----------------------------------------------------------------------------------------------------

CLASSES = 5


def problem(lengths: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    scores = [row.requires_grad_() for row in rows_of(lengths, CLASSES)]
    return scores, [torch.randint(CLASSES, (n,)) for n in lengths]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data(), garbage=st.sampled_from(GARBAGE))
def test_cross_entropy_is_that_of_the_rows_one_after_the_other(layout, data, garbage):
    lengths = data.draw(lengths_from[int(layout == "packed")])
    scores, labels = problem(lengths)
    batch = padded([row.detach() for row in scores], garbage=garbage).requires_grad_()
    # A label that no class has: who computes with it gets an error.
    targets = padded(labels, garbage=-7)
    outputs, rest = laid_out(batch, lengths, layout)
    got = ur.sequence_loss(F.cross_entropy, outputs, laid_out(targets, lengths, layout)[0], **rest)
    want = F.cross_entropy(torch.cat(scores), torch.cat(labels))
    torch.testing.assert_close(got, want)

    got.backward()
    want.backward()
    for i, row in enumerate(scores):
        torch.testing.assert_close(batch.grad[: len(row), i], row.grad)
    assert (batch.grad[padding_of(lengths)] == 0).all()


def test_packed_outputs_and_targets_need_not_have_the_same_order_inside():
    scores, labels = problem([2, 2, 2])
    turned = torch.tensor([2, 0, 1])
    outputs = pack_sequence(scores)
    data = torch.stack(labels)[turned].T.flatten()
    targets = PackedSequence(data, outputs.batch_sizes, turned, turned.argsort())
    torch.testing.assert_close(
        ur.sequence_loss(F.cross_entropy, outputs, targets), F.cross_entropy(torch.cat(scores), torch.cat(labels))
    )


LOSSES = [
    (F.mse_loss, F.mse_loss),
    (partial(F.smooth_l1_loss, beta=0.5), partial(F.smooth_l1_loss, beta=0.5)),
    (nn.L1Loss(reduction="none"), F.l1_loss),
    (lambda outputs, targets: (outputs - targets).abs().amax(1), lambda o, t: (o - t).abs().amax(1).mean()),
]


@pytest.mark.parametrize(("loss", "whole"), LOSSES)
def test_any_loss_of_steps_is_averaged_over_steps(loss, whole):
    lengths = [3, 0, T, 1]
    outputs, targets = rows_of(lengths, H), rows_of(lengths, H)
    torch.testing.assert_close(
        ur.sequence_loss(loss, padded(outputs), padded(targets), lengths), whole(torch.cat(outputs), torch.cat(targets))
    )


def test_outputs_and_targets_may_be_trees():
    lengths = [3, 1]
    outputs = {"mean": padded(rows_of(lengths)), "scale": padded(rows_of(lengths)).exp()}
    targets = padded(rows_of(lengths))

    def likelihood(outputs: Tree, targets: Tensor, reduction: str = "mean") -> Tensor:
        return F.gaussian_nll_loss(outputs["mean"], targets, outputs["scale"], reduction=reduction)

    kept = ~padding_of(lengths)
    want = likelihood(map_leaves(lambda leaf: leaf[kept], outputs), targets[kept])
    torch.testing.assert_close(ur.sequence_loss(likelihood, outputs, targets, lengths), want)


def test_without_lengths_the_loss_is_that_of_all_steps():
    outputs, targets = torch.randn(T, B, CLASSES), torch.randint(CLASSES, (T, B))
    want = F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(ur.sequence_loss(F.cross_entropy, outputs, targets), want)
    swapped = ur.sequence_loss(F.cross_entropy, outputs.transpose(0, 1), targets.T, batch_first=True)
    torch.testing.assert_close(swapped, want)


def test_a_network_learns_nothing_from_padding():
    """Gradients of the weights are those of the rows alone, with NaN in the targets' padding."""
    rnn, lengths = ur.unroll(ur.GRUCell(2, H, dtype=F64), engine="reference"), [T, 2, 4]
    inputs, targets = rows_of(lengths, 2), rows_of(lengths, H)
    outputs, _ = rnn(padded(inputs, garbage=0.0))
    got = torch.autograd.grad(ur.sequence_loss(F.mse_loss, outputs, padded(targets), lengths), rnn.parameters())
    alone = torch.cat([rnn(row.unsqueeze(1))[0].squeeze(1) for row in inputs])
    want = torch.autograd.grad(F.mse_loss(alone, torch.cat(targets)), rnn.parameters())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", [*ours, "loss"])
def test_torchs_transforms_know_them(name):
    lengths, batch = [3, 1, T], torch.randn(2, T, 3, H, dtype=F64)

    def reduced(outputs: Tensor) -> Tensor:
        if name == "loss":
            return ur.sequence_loss(F.mse_loss, outputs, torch.zeros_like(outputs), lengths)
        return ours[name](outputs, lengths).pow(2).sum()

    torch.testing.assert_close(torch.vmap(reduced)(batch), torch.stack([reduced(one) for one in batch]))
    directions = torch.randn_like(batch[0])
    _, along = torch.func.jvp(reduced, (batch[0],), (directions,))
    torch.testing.assert_close(along, (torch.func.grad(reduced)(batch[0]) * directions).sum())


# -- what is refused -------------------------------------------------------------------------------------------------

REFUSED = [
    (lambda: ur.last_output(torch.zeros(T, 3), [2, 0, 1]), InputError, "length 0 for row 1; leave rows"),
    (lambda: ur.pooled(torch.zeros(T, 3), [2, 1, 0]), InputError, r"pooled\(how='mean'\).*length 0 for row 2"),
    (lambda: ur.pooled(torch.zeros(T, 3), [0, 1, 0], how="max"), InputError, r"how='max'.*length 0 for row 0"),
    (lambda: ur.pooled(torch.zeros(T, 3), how="min"), OptionError, "'mean', 'max', 'sum', got 'min'"),
    (lambda: ur.pooled(torch.zeros(T, 3, dtype=torch.long)), InputError, r"int64; convert them: outputs.float\(\)"),
    (lambda: ur.pooled(torch.zeros(T, 3), [1, 1, T + 1]), InputError, "to T = 6, got 7 for row 2"),
    (lambda: ur.pooled(torch.zeros(T, 3), [1, 1]), InputError, r"got shape \[2\]"),
    (lambda: ur.pooled(torch.zeros(T)), InputError, r"outputs must be tensors \[T, B, ...\].*got float32\[6\]; pass"),
    (lambda: ur.pooled(torch.zeros(0, 2)), InputError, r"share T >= 1.*got float32\[0, 2\]; pass"),
    (lambda: ur.pooled((torch.zeros(T, 2), torch.zeros(T, 3))), InputError, r"share T.*float32\[6, 3\]"),
    (lambda: ur.pooled(torch.zeros(2), batch_first=True), InputError, r"\[B, T, ...\]"),
    (lambda: ur.pooled(()), InputError, r"got \(\); pass"),
    (lambda: ur.pooled([1.0]), InputError, "a float: 1.0; convert it with torch.as_tensor"),
    (lambda: ur.pooled(pack_sequence([torch.zeros(2)]), [2]), InputError, r"its own lengths, got \[2\].*leave lengths"),
    (
        lambda: ur.sequence_loss(F.mse_loss, pack_sequence([torch.zeros(2)]), torch.zeros(2, 1)),
        InputError,
        "both be packed or both be padded, got PackedSequence and Tensor",
    ),
    (
        lambda: ur.sequence_loss(F.mse_loss, pack_sequence([torch.zeros(2)]), pack_sequence([torch.zeros(1)])),
        InputError,
        r"T = 2, lengths \[2\] and T = 1, lengths \[1\]; one target",
    ),
    (
        lambda: ur.sequence_loss(
            F.mse_loss,
            pack_sequence([torch.zeros(2), torch.zeros(1)]),
            pack_sequence([torch.zeros(1), torch.zeros(2)], enforce_sorted=False),
        ),
        InputError,
        r"lengths \[2, 1\] and T = 2, lengths \[1, 2\]",
    ),
    (
        lambda: ur.sequence_loss(F.mse_loss, torch.zeros(3, 2), torch.zeros(4, 2)),
        InputError,
        r"share T, B and lengths, got T = 3, lengths \[3, 3\] and T = 4",
    ),
    (
        lambda: ur.sequence_loss(F.mse_loss, torch.zeros(3, 2), torch.zeros(4, 2), [1, 2]),
        InputError,
        r"share T, B and lengths, got T = 3",
    ),
    (lambda: ur.sequence_loss(F.mse_loss, torch.zeros(3, 2), torch.zeros(3), [1, 2]), InputError, "targets must be"),
    (
        lambda: ur.sequence_loss(F.mse_loss, torch.zeros(3, 2), torch.zeros(3, 2), [0, 0]),
        InputError,
        r"at least one step, got lengths \[0, 0\]; skip",
    ),
    (
        lambda: ur.sequence_loss(nn.MSELoss(), torch.zeros(3, 2), torch.zeros(3, 2)),
        OptionError,
        r'N = 6, got shape \[\]; do not reduce it: reduction="none"',
    ),
    (lambda: ur.sequence_loss(lambda o, t: 1.0, torch.zeros(3, 2), torch.zeros(3, 2)), OptionError, "got float"),
]


@pytest.mark.parametrize(("call", "error", "says"), REFUSED)
def test_what_does_not_fit_is_refused_in_words(call, error, says):
    with pytest.raises(error, match=f"(?s){says}"):
        call()
