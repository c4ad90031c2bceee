"""Batches of samples that differ in length: each sample once, little padding, much chance; and what a batch is."""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence, unpack_sequence
from torch.utils.data import DataLoader

import unrolled as ur
from unrolled.errors import InputError, OptionError

# -- which samples go together ---------------------------------------------------------------------------------------

Law = Callable[[np.random.Generator, int], np.ndarray]

LAWS: dict[str, Law] = {
    "geometric, mean 5": lambda chance, n: chance.geometric(0.2, n),
    "geometric, mean 50": lambda chance, n: chance.geometric(0.02, n),
    "log-normal, median 20": lambda chance, n: np.ceil(chance.lognormal(3, 1, n)),
    "log-normal, median 150": lambda chance, n: np.ceil(chance.lognormal(5, 0.5, n)),
    "uniform": lambda chance, n: chance.integers(1, 500, n),
    "two lengths": lambda chance, n: chance.choice([10, 1000], n),
    "all the same": lambda chance, n: np.full(n, 7),
}


def drawn(law: Law, n: int, seed: int = 0) -> np.ndarray:
    return law(np.random.default_rng(seed), n).astype(np.int64)


def padding_share(batches: list[list[int]], lengths: np.ndarray) -> float:
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / padded


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("seed", range(3))
def test_less_than_a_tenth_is_padding(law, seed):
    lengths = drawn(LAWS[law], 20_000, seed)
    sampler = ur.BucketSampler(lengths, 32, seed=seed)
    for _ in range(2):
        assert padding_share(list(sampler), lengths) < 0.1


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("n", "batch_size"), [(500, 64), (3000, 8), (3000, 100)])
def test_chance_costs_little_padding_beyond_what_strict_order_has(law, n, batch_size):
    lengths = drawn(LAWS[law], n)
    strict = padding_share(list(ur.BucketSampler(lengths, batch_size, shuffle=False)), lengths)
    sampler = ur.BucketSampler(lengths, batch_size)
    by_chance = np.mean([padding_share(list(sampler), lengths) for _ in range(5)])
    assert by_chance < strict + 0.05


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    batch_size=st.integers(1, 70),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**70),
)
def test_every_sample_comes_once_per_epoch(lengths, batch_size, shuffle, seed):
    sampler = ur.BucketSampler(lengths, batch_size, shuffle=shuffle, seed=seed)
    rest = len(lengths) % batch_size
    for _ in range(3):
        batches = list(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert len(batches) == len(sampler) == -(-len(lengths) // batch_size)
        sizes = Counter(map(len, batches))
        assert sizes[batch_size] == len(lengths) // batch_size
        assert not rest or sizes[rest] == 1
        assert all(type(i) is int for batch in batches for i in batch)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=5, max_size=60), batch_size=st.integers(1, 5), shuffle=st.booleans()
)
def test_drop_last_leaves_whole_batches_without_repetition(lengths, batch_size, shuffle):
    sampler = ur.BucketSampler(lengths, batch_size, shuffle=shuffle, drop_last=True)
    batches = list(sampler)
    assert len(batches) == len(sampler) == len(lengths) // batch_size
    assert {len(batch) for batch in batches} == {batch_size}
    assert len({i for batch in batches for i in batch}) == batch_size * len(batches)


def test_what_drop_last_drops_is_another_each_epoch_and_of_every_length():
    lengths = np.arange(1, 104)
    sampler = ur.BucketSampler(lengths, 10, drop_last=True)
    dropped = Counter(i for _ in range(400) for i in set(range(103)) - {i for batch in sampler for i in batch})
    # 1200 are dropped, 11.7 of each on average; Poisson's law leaves this range once in 100 000 draws.
    assert len(dropped) == 103
    assert max(dropped.values()) < 32


def test_the_order_depends_on_seed_and_epoch_only():
    lengths = drawn(LAWS["geometric, mean 50"], 500)
    one, other = ur.BucketSampler(lengths, 8, seed=3), ur.BucketSampler(torch.tensor(lengths), 8, seed=3)
    epochs = [list(one) for _ in range(4)]
    torch.manual_seed(99)
    assert [list(other) for _ in range(4)] == epochs
    assert len({str(epoch) for epoch in epochs}) == 4
    assert list(ur.BucketSampler(lengths, 8, seed=4)) != epochs[0]
    # Seed and epoch are no sum: the second epoch of seed 3 is not the first of seed 4.
    assert list(ur.BucketSampler(lengths, 8, seed=4)) != epochs[1]


def test_a_resumed_run_sees_the_order_that_it_would_have_seen():
    lengths = drawn(LAWS["geometric, mean 50"], 500)
    epochs = [list(epoch) for epoch in [ur.BucketSampler(lengths, 8)] * 4]
    resumed = ur.BucketSampler(lengths, 8)
    resumed.set_epoch(2)
    assert resumed.epoch == 2
    assert [list(resumed), list(resumed)] == epochs[2:]
    resumed.set_epoch(1)
    assert list(resumed) == epochs[1]
    restored = pickle.loads(pickle.dumps(resumed))
    assert list(restored) == list(resumed) == epochs[2]


def test_batches_come_in_random_order():
    """Over many epochs the first batch is as long as any other on average."""
    lengths = drawn(LAWS["uniform"], 1000)
    sampler = ur.BucketSampler(lengths, 10)
    firsts = [lengths[next(iter(sampler))].mean() for _ in range(300)]
    assert abs(np.mean(firsts) - lengths.mean()) < 4 * lengths.std() / np.sqrt(300)
    assert np.std(firsts) > lengths.std() / 2


def test_the_smaller_batch_is_neither_always_the_shortest_nor_always_the_longest():
    lengths = np.arange(1, 104)
    sampler = ur.BucketSampler(lengths, 10)
    means = [lengths[min(sampler, key=len)].mean() for _ in range(50)]
    assert min(means) < 25 < 75 < max(means)


@pytest.mark.parametrize("law", ["geometric, mean 50", "log-normal, median 150", "uniform", "all the same"])
def test_a_sample_has_other_neighbours_each_epoch(law):
    lengths = drawn(LAWS[law], 2000)
    sampler = ur.BucketSampler(lengths, 20)
    shared = []
    for _ in range(10):
        mates = [{i: frozenset(batch) for batch in epoch for i in batch} for epoch in (list(sampler), list(sampler))]
        shared += [(len(mates[0][i] & mates[1][i]) - 1) / 19 for i in range(0, 2000, 37)]
    assert np.mean(shared) < 0.5


def test_without_shuffle_the_longest_come_first_and_every_epoch_is_the_same():
    sampler = ur.BucketSampler([3, 9, 3, 7, 1], 2, shuffle=False)
    assert list(sampler) == list(sampler) == [[1, 3], [0, 2], [4]]
    assert list(ur.BucketSampler([3, 9, 3, 7, 1], 2, shuffle=False, drop_last=True)) == [[1, 3], [0, 2]]


SAMPLERS_REFUSED = [
    (lambda: ur.BucketSampler([], 2), InputError, r"N >= 1 samples, got float64\[0\]; pass \[len"),
    (lambda: ur.BucketSampler([1.5], 2), InputError, r"integers >= 0.*got float64\[1\]"),
    (lambda: ur.BucketSampler([True], 2), InputError, "got bool"),
    (lambda: ur.BucketSampler([[1], [2]], 2), InputError, r"got int64\[2, 1\]"),
    (lambda: ur.BucketSampler([[1], [2, 3]], 2), InputError, r"integers >= 0.*inhomogeneous.*pass \[len"),
    (lambda: ur.BucketSampler([3, -1, 4], 2), InputError, "got -1 for sample 1"),
    (lambda: ur.BucketSampler([3], 0), OptionError, "batch_size must be an integer >= 1, got 0"),
    (lambda: ur.BucketSampler([3], 2.0), OptionError, "batch_size must be an integer >= 1, got 2.0"),
    (lambda: ur.BucketSampler([3], True), OptionError, "batch_size must be an integer >= 1, got True"),
    (lambda: ur.BucketSampler([3], 1, seed=-1), OptionError, "seed must be an integer >= 0, got -1"),
    (lambda: ur.BucketSampler([3], 1).set_epoch(-1), OptionError, "epoch must be an integer >= 0, got -1"),
    (lambda: ur.BucketSampler([3, 4], 3, drop_last=True), OptionError, "batch_size 3 for 2 samples: all would be"),
]


@pytest.mark.parametrize(("call", "error", "says"), SAMPLERS_REFUSED)
def test_a_sampler_that_cannot_be_is_refused_in_words(call, error, says):
    with pytest.raises(error, match=f"(?s){says}"):
        call()


# -- how they become one batch ---------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    label: int


def assert_padded(padded: Tensor, rows: list[Tensor], *, batch_first: bool = False) -> None:
    """Row by row: what was given, then zeros."""
    batch = padded if batch_first else padded.transpose(0, 1)
    assert batch.shape[:2] == (len(rows), max(map(len, rows)))
    for row, got in zip(rows, batch, strict=True):
        assert torch.equal(got[: len(row)], row)
        assert not got[len(row) :].any()


lengths_from_1 = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=6), shape=st.sampled_from([(), (3,), (2, 3)]))
@pytest.mark.parametrize("batch_first", [False, True])
def test_sequences_are_padded(lengths, shape, batch_first):
    rows = [torch.randn(n, *shape) for n in lengths]
    padded, found = ur.collate_padded(rows, batch_first=batch_first)
    assert_padded(padded, rows, batch_first=batch_first)
    assert found.dtype == torch.int64
    assert found.tolist() == lengths


@settings(max_examples=50, deadline=None)
@given(lengths=lengths_from_1, shape=st.sampled_from([(), (3,), (2, 3)]))
def test_sequences_are_packed_and_keep_their_order(lengths, shape):
    rows = [torch.randn(n, *shape) for n in lengths]
    for got, row in zip(unpack_sequence(ur.collate_packed(rows)), rows, strict=True):
        assert torch.equal(got, row)


LENGTHS = [2, 5, 1]
ROWS = [torch.arange(1.0, n * 2 + 1).view(n, 2) for n in LENGTHS]
TAGS = [torch.arange(1, n + 1) for n in LENGTHS]


def test_parts_of_a_tuple_are_named_by_position():
    samples = [(x, {"tags": y}, 0.5, "name") for x, y in zip(ROWS, TAGS, strict=True)]
    (x, tree, weights, names), lengths = ur.collate_padded(samples, sequences=[0, 1])
    assert_padded(x, ROWS)
    assert_padded(tree["tags"], TAGS)
    assert torch.equal(weights, torch.full((3,), 0.5, dtype=torch.float64))
    assert names == ["name"] * 3
    assert lengths.tolist() == LENGTHS


def test_parts_of_a_dict_are_named_by_key():
    samples = [OrderedDict(y=y, static=torch.ones(4), x=x) for x, y in zip(ROWS, TAGS, strict=True)]
    batch, lengths = ur.collate_padded(samples, sequences={"x", "y"}, batch_first=True)
    assert list(batch) == ["y", "static", "x"]
    assert_padded(batch["x"], ROWS, batch_first=True)
    assert_padded(batch["y"], TAGS, batch_first=True)
    assert torch.equal(batch["static"], torch.ones(3, 4))
    assert lengths.tolist() == LENGTHS


def test_parts_of_a_named_tuple_are_named_by_name():
    batch = ur.collate_packed([Pair(x, i) for i, x in enumerate(ROWS)], sequences=["x"])
    assert isinstance(batch, Pair)
    assert isinstance(batch.x, PackedSequence)
    assert_padded(pad_packed_sequence(batch.x)[0], ROWS)
    assert batch.label.tolist() == [0, 1, 2]


def test_packed_sequences_of_one_sample_may_differ_in_length():
    source, target = ur.collate_packed([(x, x[:1]) for x in ROWS], sequences=[0, 1])
    assert pad_packed_sequence(source)[1].tolist() == LENGTHS
    assert pad_packed_sequence(target)[1].tolist() == [1, 1, 1]


BATCHES_REFUSED = [
    (lambda: ur.collate_padded([]), "at least one sample, got none"),
    (lambda: ur.collate_padded([(ROWS[0], 1)]), r"got \(\) for a sample with parts 0, 1; use functools.partial"),
    (lambda: ur.collate_padded([{"x": ROWS[0]}], sequences=["y"]), r"got \['y'\] for a sample with parts 'x'"),
    (lambda: ur.collate_padded(ROWS, sequences=[0]), r"got \[0\] for a sample with no parts, a Tensor; .*one tensor"),
    (lambda: ur.collate_padded([{"x": ROWS[0]}, {"y": ROWS[0]}], sequences=["x"]), "sample 1 has parts 'y'; fill in"),
    (lambda: ur.collate_padded([[1.0], [2.0]], sequences=[0]), "a float: 1.0; convert it with torch.as_tensor"),
    (lambda: ur.collate_padded([np.array(["a"])]), "type numpy.str_.*; convert it with torch.as_tensor"),
    (lambda: ur.collate_padded([torch.tensor(1.0)]), r"sample 0 has float32\[\]"),
    (lambda: ur.collate_padded([None]), "differ in T only: sample 0 has None"),
    (lambda: ur.collate_padded([ROWS[0], torch.ones(2, 3)]), r"float32\[2, 2\], sample 1 has float32\[2, 3\]"),
    (lambda: ur.collate_packed([ROWS[0], ROWS[0].long()]), r"sample 1 has int64\[2, 2\]"),
    (lambda: ur.collate_padded([ROWS[0], TAGS[0]]), r"sample 1 has int64\[2\]"),
    (
        lambda: ur.collate_padded([(ROWS[0], TAGS[0]), (ROWS[1], TAGS[0])], sequences=[0, 1]),
        r"must share T.*got lengths \[5, 2\] in sample 1; ur.collate_packed keeps",
    ),
    (lambda: ur.collate_packed([ROWS[0], ROWS[1][:0]]), "got length 0 in sample 1; leave such samples out"),
]


@pytest.mark.parametrize(("call", "says"), BATCHES_REFUSED)
def test_samples_that_make_no_batch_are_refused_in_words(call, says):
    with pytest.raises(InputError, match=f"(?s){says}"):
        call()


# -- in a DataLoader -------------------------------------------------------------------------------------------------

# From 3.12 on Python warns of every fork beside threads; workers are how torch loads data.
forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

DATA = [(torch.full((n,), float(i)), i) for i, n in enumerate(drawn(LAWS["geometric, mean 5"], 60))]


def loader(collate: Callable[..., object], workers: int) -> DataLoader:
    sampler = ur.BucketSampler([len(x) for x, _ in DATA], 8)
    return DataLoader(DATA, batch_sampler=sampler, collate_fn=partial(collate, sequences=[0]), num_workers=workers)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_each_sample_once_per_epoch_in_another_order(workers):
    batches = loader(ur.collate_padded, workers)
    epochs = []
    for _ in range(2):
        epochs.append([])
        for (x, labels), lengths in batches:
            assert_padded(x, [DATA[i][0] for i in labels])
            assert lengths.tolist() == [len(DATA[i][0]) for i in labels]
            epochs[-1] += labels.tolist()
        assert len(batches) == 8
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(60))
    assert epochs[0] != epochs[1]


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_packed_sequences(workers):
    seen = []
    for x, labels in loader(ur.collate_packed, workers):
        for row, i in zip(unpack_sequence(x), labels.tolist(), strict=True):
            assert torch.equal(row, DATA[i][0])
        seen += labels.tolist()
    assert sorted(seen) == list(range(60))


@forks
def test_a_batch_refused_in_a_worker_is_refused_in_the_same_words():
    broken = DataLoader([torch.ones(2), torch.ones(2, 3)], 2, collate_fn=ur.collate_padded, num_workers=1)
    with pytest.raises(InputError, match="differ in T only"):
        next(iter(broken))


def test_from_batches_to_a_loss():
    """All three kinds of many, on batches as they come: the loss is that of the rows alone."""
    embedding, rnn = torch.nn.Embedding(9, 4), ur.unroll(ur.GRUCell(4, 5), engine="reference")
    data = [(torch.randint(9, (n,)), torch.randn(n, 5)) for n in (4, 1, 7, 3, 3)]
    collate = partial(ur.collate_padded, sequences=[0, 1])
    sampler = ur.BucketSampler([len(x) for x, _ in data], 5)
    (((x, y), lengths),) = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
    outputs, _ = rnn(embedding(x))
    alone = [rnn(embedding(x).unsqueeze(1))[0].squeeze(1) for x, _ in data]
    whole = torch.nn.functional.mse_loss(torch.cat(alone), torch.cat([y for _, y in data]))
    torch.testing.assert_close(ur.sequence_loss(torch.nn.functional.mse_loss, outputs, y, lengths), whole)
    lasts = ur.last_output(outputs, lengths)
    torch.testing.assert_close(lasts.sum(0), torch.stack([row[-1] for row in alone]).sum(0))
