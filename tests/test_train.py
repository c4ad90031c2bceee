"""The main job on a small real text: it learns, it can be stopped, and bad input is told apart."""

import functools
import hashlib
import io
import json
import math
import os
import pydoc_data.topics
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from unrolled import unroll
from unrolled.cli import main
from unrolled.errors import ConfigError, DataError, DivergedError, OptionError, RunError
from unrolled.train.baselines import context_model_bits, entropy_bits, xz_bits
from unrolled.train.config import CELLS, TrainConfig
from unrolled.train.config_file import read_config
from unrolled.train.jobs import plan_run
from unrolled.train.loop import bits_per_character, train_model
from unrolled.train.model import CharacterModel
from unrolled.train.run import create_run, load_run
from unrolled.train.sampling import sample
from unrolled.train.text import Split, Vocabulary, each_window, read_text, split_text, window_count

TOPICS = pydoc_data.topics.topics
SMALL = "\n".join(TOPICS[name] for name in ("for", "while", "if", "with", "try", "function", "class"))
QUICK = {"hidden_size": 64, "embedding_size": 16, "window": 32, "batch": 16, "epochs": 4, "learning_rate": 1e-2}
BUILT_IN = "\n".join(TOPICS.values())
TINY = {"hidden_size": 4, "embedding_size": 4, "window": 16, "batch": 4, "epochs": 1}


class Silent:
    def updated(self, update):
        pass

    def epoch_ended(self, epoch):
        pass


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.fixture
def short_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(SMALL[:3000], encoding="utf-8")
    return path


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def untrained_run(path):
    config, vocabulary = TrainConfig(out=str(path), hidden_size=8), Vocabulary.of(SMALL)
    run = create_run(config)
    run.save_model(CharacterModel(config, len(vocabulary)), vocabulary)
    return run


def flags(**options):
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_the_command_learns_a_small_real_text_and_keeps_a_usable_run(text_file, tmp_path, capsys):
    out = tmp_path / "run"
    code, printed, _ = command(capsys, "train", text_file, *flags(out=out, **QUICK))
    assert code == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    test = lines[-1]
    split = split_text(SMALL, batch=QUICK["batch"], window=QUICK["window"])
    assert test["kind"] == "test"
    assert test["bits"] < entropy_bits(split.test) - 0.5
    assert {"order-2 character model", "order-3 character model", "xz -9e"} <= set(test)
    assert [line["number"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3, 4]
    updates = window_count(len(split.train), QUICK["batch"], QUICK["window"]) * QUICK["epochs"]
    assert sum(line["kind"] == "update" for line in lines) == updates
    assert str(out) in printed
    assert f"{test['bits']:.3f}" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "page.html",
    ]
    code, printed, _ = command(capsys, "sample", out, "--prompt", "The ", "--length", 40)
    assert code == 0
    assert printed.startswith("The ")
    assert len(printed) == len("The ") + 40 + 1


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_same_seed_gives_the_same_model_and_a_loaded_run_the_same_score(cell, tmp_path):
    split = split_text(SMALL, batch=16, window=32)
    models = []
    for name in ("a", "b"):
        config = TrainConfig(cell=cell, out=str(tmp_path / name), **{**QUICK, "epochs": 1})
        models.append(train_model(config, split, create_run(config), Silent())[0])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    config, loaded, vocabulary = load_run(tmp_path / "a")
    numbers = vocabulary.encode(split.test)
    assert bits_per_character(loaded, numbers, config) == bits_per_character(models[0], numbers, config)


class FirstUpdates:
    """Stops a training after so many updates, and keeps their losses."""

    def __init__(self, most):
        self.most, self.losses = most, []

    def updated(self, update):
        self.losses.append(update.loss)
        if len(self.losses) == self.most:
            raise KeyboardInterrupt

    def epoch_ended(self, epoch):
        pass


def test_the_first_50_updates_on_the_default_engine_have_the_losses_of_the_reference(tmp_path, monkeypatch):
    split = split_text(BUILT_IN, batch=32, window=64)
    losses = {}
    for engine in ("auto", "reference"):
        monkeypatch.setattr("unrolled.train.model.unroll", functools.partial(unroll, engine=engine))
        config, watcher = TrainConfig(out=str(tmp_path / engine)), FirstUpdates(50)
        with pytest.raises(KeyboardInterrupt):
            train_model(config, split, create_run(config), watcher)
        losses[engine] = watcher.losses
    assert losses["auto"] == pytest.approx(losses["reference"], rel=1e-4)
    assert losses["auto"][-1] < 0.9 * losses["auto"][0]


def test_a_budget_changes_no_loss_and_a_horizon_does(tmp_path):
    split, losses = split_text(BUILT_IN, batch=8, window=96), {}
    ways = {"whole": {}, "budget": {"memory": "40%"}, "horizon": {"horizon": 6, "stride": 3}}
    sizes = {"hidden_size": 32, "embedding_size": 16, "batch": 8, "window": 96}
    assert plan_run(TrainConfig(**sizes), None, "40%", None).chosen.schedule.segments > 1
    for name, way in ways.items():
        config, watcher = TrainConfig(out=str(tmp_path / name), **sizes, **way), FirstUpdates(30)
        with pytest.raises(KeyboardInterrupt):
            train_model(config, split, create_run(config), watcher)
        losses[name] = watcher.losses
    assert losses["budget"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["horizon"][0] == losses["whole"][0]
    assert losses["horizon"][-1] != pytest.approx(losses["whole"][-1], rel=1e-4)


def test_a_share_is_one_of_a_whole_window_and_too_small_a_one_leaves_no_run(short_file, tmp_path, capsys):
    sizes = {**TINY, "hidden_size": 8, "window": 40}  # the last window is shorter, and the sample at the end one step
    code, *_ = command(capsys, "train", short_file, *flags(out=tmp_path / "run", memory="60%", **sizes))
    assert code == 0
    assert command(capsys, "sample", tmp_path / "run", "--length", 5)[0] == 0
    code, _, error = command(capsys, "train", short_file, *flags(out=tmp_path / "none", memory="10B", **sizes))
    assert code == 2
    assert "memory='10B' is 10 bytes, but 40 steps of 4 rows take at least" in error
    assert not (tmp_path / "none").exists()
    code, _, error = command(capsys, "plan", tmp_path / "run", "--hidden-size", 9)
    assert code == 2
    assert "--hidden-size is for a network that is not trained yet" in error


def test_the_plan_command_prints_what_a_budget_costs(text_file, tmp_path, capsys):
    code, shown, _ = command(capsys, "plan", "--steps", 300, "--hidden-size", 32, "--memory", "3MB")
    assert code == 0
    assert "Unrolled[LSTMCell], T = 300, B = 32: activation memory against time" in shown
    assert shown.count("\n> ") == shown.count("●") == 1
    untrained_run(tmp_path / "run")
    code, shown, _ = command(capsys, "plan", tmp_path / "run")
    assert (code, "T = 64, B = 32" in shown, "> store_all" in shown) == (0, True, True)
    for wrong, told in (
        (("--memory", "3kB"), "memory='3kB' is 3.0 kB, but 1000 steps of 32 rows take at least"),
        (("--steps", 0), "steps must be at least 1, got 0"),
        ((tmp_path,), "is not a finished run"),
    ):
        code, _, error = command(capsys, "plan", *wrong)
        assert (code, told in error) == (2, True)


def test_the_state_is_carried_from_window_to_window(monkeypatch, tmp_path):
    split = split_text(SMALL[:6000], batch=4, window=8)
    received, returned = [], []
    forward = CharacterModel.forward

    def watched(self, characters, state=None):
        logits, following = forward(self, characters, state)
        if self.training:
            received.append(state)
            returned.append(following)
        return logits, following

    monkeypatch.setattr(CharacterModel, "forward", watched)
    config = TrainConfig(cell="gru", out=str(tmp_path / "r"), **{**QUICK, "epochs": 1, "batch": 4, "window": 8})
    train_model(config, split, create_run(config), Silent())
    assert received[0] is None
    for before, after in zip(returned, received[1:], strict=False):
        assert torch.equal(before, after)
        assert not after.requires_grad


def test_windows_cover_each_stream_once_and_in_order():
    numbers = torch.arange(103)
    windows = list(each_window(numbers, batch=4, window=7))
    characters, following = (torch.cat(column) for column in zip(*windows, strict=True))
    assert len(windows) == window_count(103, 4, 7)
    assert torch.equal(characters.t().flatten(), torch.arange(100))
    assert torch.equal(following, characters + 1)


def test_an_interrupted_run_is_usable_and_the_command_ends_with_130(text_file, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", str(text_file), "--out", str(out), "--epochs", "1000"]
    # What is started in the background ignores the signal, and so would what it starts.
    program = [sys.executable, "-m", "unrolled", *arguments]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    job = subprocess.Popen(program, stdout=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and '"update"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    printed = job.communicate(timeout=60)[0].decode()
    assert job.returncode == 130
    assert "interrupted" in printed
    _, model, vocabulary = load_run(out)
    assert len("".join(sample(model, vocabulary, length=5, temperature=1.0, seed=0))) == 5


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_run_interrupted_before_its_first_update_is_usable(short_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.lr_scheduler, "LambdaLR", interrupt)
        code, printed, _ = command(capsys, "train", short_file, *flags(out=out, **TINY))
    assert code == 130
    assert f"next: unrolled sample {out}" in printed
    _, model, vocabulary = load_run(out)
    assert len("".join(sample(model, vocabulary, length=5, temperature=1.0, seed=0))) == 5


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_interrupted_before_there_is_a_model_leaves_nothing(existed, short_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    if existed:
        out.mkdir()
    monkeypatch.setattr(Vocabulary, "of", interrupt)
    code, printed, _ = command(capsys, "train", short_file, *flags(out=out, **TINY))
    assert code == 130
    assert f"interrupted before there was a model; what was written to {out} is removed" in printed
    assert "next:" not in printed
    assert out.exists() == existed
    assert list(tmp_path.glob("run/*")) == []


def test_a_discarded_run_leaves_what_is_not_its_own(tmp_path):
    run = untrained_run(tmp_path / "run")
    (run.path / "mine").write_text("precious")
    run.discard()
    assert [path.name for path in run.path.iterdir()] == ["mine"]


def test_an_interrupt_while_the_command_is_being_imported_ends_with_130(capsys, monkeypatch):
    class Interrupting:
        def find_spec(self, name, *_):
            if name == "unrolled.train.commands":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "unrolled.train.commands", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    assert command(capsys, "--help") == (130, "", "")


def test_a_training_that_diverges_is_stopped_and_told(short_file, tmp_path, capsys):
    out = tmp_path / "run"
    code, _, error = command(capsys, "train", short_file, *flags(out=out, **TINY, learning_rate=1e38))
    assert code == 2
    assert re.search(r"training diverged at update \d: loss (inf|nan), gradient norm \S+, which must be finite", error)
    assert "lower --learning-rate (it is 1e+38) or --clip (it is 1)" in error
    assert "NaN" not in (out / "metrics.jsonl").read_text()
    assert all(tensor.isfinite().all() for tensor in load_file(out / "model.safetensors").values())


@pytest.mark.parametrize("in_training", [True, False])
def test_a_training_that_diverges_keeps_the_model_of_the_last_epoch(in_training, tmp_path, monkeypatch):
    saved = []

    class Keeping(Silent):
        def epoch_ended(self, epoch):
            saved.append((tmp_path / "run" / "model.safetensors").read_bytes())

    forward = CharacterModel.forward

    def poisoned(self, characters, state=None):
        logits, state = forward(self, characters, state)
        return logits * math.nan if saved and self.training == in_training else logits, state

    monkeypatch.setattr(CharacterModel, "forward", poisoned)
    config = TrainConfig(out=str(tmp_path / "run"), **{**TINY, "epochs": 3})
    told = r"at update \d+: loss nan, gradient norm nan" if in_training else "at the validation of epoch 2: .* nan"
    with pytest.raises(DivergedError, match=told):
        train_model(config, split_text(SMALL[:3000], batch=4, window=16), create_run(config), Keeping())
    assert saved == [(tmp_path / "run" / "model.safetensors").read_bytes()]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_a_model_that_gives_no_chances_is_not_drawn_from(temperature):
    model = CharacterModel(TrainConfig(hidden_size=8), 4).eval()
    with torch.no_grad():
        model.head.bias[1] = math.nan
    with pytest.raises(DivergedError, match="largest logit must be finite to draw from, got nan"):
        next(sample(model, Vocabulary("abc"), "a", length=1, temperature=temperature, seed=0))


def test_metrics_hold_no_figure_that_json_lacks(tmp_path):
    run = create_run(TrainConfig(out=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.log(kind="update", loss=math.nan)


def test_a_run_records_its_text_and_its_config_makes_another_run(short_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command(capsys, "train", short_file, *flags(out="first", **TINY))
    assert json.loads((tmp_path / "first" / "metrics.jsonl").read_text().splitlines()[0]) == {
        "kind": "text",
        "file": str(short_file),
        "characters": 3000,
        "sha256": hashlib.sha256(short_file.read_bytes()).hexdigest(),
        "torch": torch.__version__,
    }
    code, *_ = command(capsys, "train", short_file, "--config", "first/config.json")
    assert code == 0
    (second,) = (tmp_path / "runs").iterdir()
    assert (second / "config.json").read_text() == (tmp_path / "first" / "config.json").read_text()
    one, other = (load_file(path / "model.safetensors") for path in (tmp_path / "first", second))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_path_is_printed_as_it_is_and_quoted_in_the_next_command(short_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = "o[bold]x:smile: y"
    _, printed, _ = command(capsys, "train", short_file, *flags(out=out, **TINY))
    assert f"written: {out} (" in printed
    assert f"next: unrolled sample {shlex.quote(out)} --prompt 'The '" in printed
    code, _, error = command(capsys, "train", short_file, *flags(out=out, **TINY))
    assert code == 2
    assert f"the run directory {out} is not empty" in error


def test_the_sample_at_the_end_starts_like_a_sentence_if_the_text_has_such_letters(tmp_path, capsys):
    path = tmp_path / "text"
    for text, wanted in ((SMALL, True), (SMALL.lower(), False)):
        path.write_text(text[:3000], encoding="utf-8")
        _, printed, _ = command(capsys, "train", path, *flags(out=tmp_path / str(wanted), **TINY))
        assert ("(temperature 0.7)\nThe " in printed) == wanted
        assert ("--prompt 'The '" in printed) == wanted


def test_a_text_too_short_for_a_baseline_is_scored_without_it(tmp_path, capsys):
    path = tmp_path / "text"
    path.write_text(SMALL[:60], encoding="utf-8")
    code, *_ = command(capsys, "train", path, *flags(out=tmp_path / "run", **{**TINY, "batch": 1}))
    assert code == 0
    test = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(test) == {"kind", "bits", "order-2 character model", "xz -9e"}


def test_output_that_the_terminal_cannot_encode_does_not_end_the_command(tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "text", tmp_path / "röun"
    path.write_text("日本語 für " * 200, encoding="utf-8")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    for arguments in (["train", path, *flags(out=out, **TINY)], ["sample", out, "--prompt", "日本", "--length", 3]):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == 0
    printed = shown.buffer.getvalue().decode("ascii")
    assert "r?un (config.json" in printed
    assert printed.splitlines()[-1].startswith("??")


def test_nobody_reading_on_is_no_error(tmp_path):
    run = untrained_run(tmp_path / "run")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "unrolled", "sample", str(run.path), "--prompt", "The ", "--length", "0"]
    # Buffered, as it is in a pipe by default: what is so short is written out only at the end.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=buffered)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


@pytest.mark.slow
def test_two_epochs_on_the_built_in_text_score_better_than_two_characters_of_context(tmp_path, capsys):
    command(capsys, "train", *flags(out=tmp_path / "run", epochs=2))
    test = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert test["kind"] == "test"
    assert test["bits"] < min(2.4, test["order-2 character model"])


def test_bits_per_character_is_the_mean_of_minus_log2_of_each_chance():
    config = TrainConfig(hidden_size=5, embedding_size=3)
    model = CharacterModel(config, 4).eval()
    numbers = torch.tensor([1, 2, 3, 1, 2, 0, 3])
    logits, _ = model(numbers[:-1].unsqueeze(1))
    chances = logits.squeeze(1).softmax(-1)[range(6), numbers[1:]]
    assert math.isclose(bits_per_character(model, numbers, config), -chances.log2().mean().item(), rel_tol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_each_name_of_a_cell_makes_that_cell(cell):
    config = TrainConfig(cell=cell, hidden_size=5, embedding_size=3)
    assert type(CharacterModel(config, 4).rnn.cell) is CELLS[cell]


def test_a_context_model_by_hand():
    split = Split(train="abababac", validation="abab", test="aba")
    # Order 1, alphabet {unknown, a, b, c}: after a come b, b, b, c; after b comes a three times. The validation text
    # has nothing unseen, so that the least smoothing is best for it.
    k = 0.001
    wanted = -(math.log2((3 + k) / (4 + 4 * k)) + math.log2((3 + k) / (3 + 4 * k))) / 2
    assert math.isclose(context_model_bits(split, 1), wanted, rel_tol=1e-9)


def test_the_compressor_pays_little_for_a_text_it_has_seen():
    train_text = SMALL[:20000]
    seen, unseen = (xz_bits(Split(train_text, "", test)) for test in (train_text[:2000], SMALL[-2000:]))
    assert seen < 0.2 < unseen


def test_order_0_entropy_of_equal_letters_is_log2_of_their_number():
    assert math.isclose(entropy_bits("abcd" * 7), 2.0)


def test_sampling_at_temperature_0_takes_the_likeliest_and_never_the_unknown():
    vocabulary = Vocabulary.of(SMALL)
    model = CharacterModel(TrainConfig(hidden_size=8), len(vocabulary)).eval()
    with torch.no_grad():
        model.head.bias[0] = 1e4
        model.head.bias[7] = 1e3
    written = "".join(sample(model, vocabulary, length=4, temperature=0, seed=0))
    assert written == vocabulary.decode(7) * 4


def test_the_smallest_temperatures_take_the_likeliest_as_0_does():
    vocabulary = Vocabulary.of(SMALL)
    model = CharacterModel(TrainConfig(hidden_size=8), len(vocabulary)).eval()
    wanted, *written = (
        "".join(sample(model, vocabulary, length=20, temperature=temperature, seed=0))
        for temperature in (0, 1e-42, 5e-324)
    )
    assert written == [wanted, wanted]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"", "is empty"),
        (b"abc\0def", "is binary"),
        ("sch\xf6n".encode("latin-1"), "is not UTF-8"),
        (b"too short", "the text has 9 characters"),
    ],
)
def test_a_text_that_cannot_be_trained_on_is_refused_before_anything_is_written(content, told, tmp_path, capsys):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    code, _, error = command(capsys, "train", path, "--out", tmp_path / "run")
    assert code == 2
    assert told in error
    assert not (tmp_path / "run").exists()


def test_a_byte_order_mark_is_no_character(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfabc")
    assert read_text(path) == "abc"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"cell": "elman"}, "cell must be one of rnn, lstm, gru, got 'elman'"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": "8"}, "hidden_size must be of type int"),
        ({"epochs": True}, "epochs must be of type int"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"dropout": 1.0}, "dropout must be below 1"),
        ({"learning_rate": 10**400}, "learning_rate must be above 0.0 and finite"),
        ({"seed": 2**63}, "seed must be below 9223372036854775808"),
        ({"device": "abacus"}, "device must be one that torch has here"),
        ({"device": "meta"}, "device must be one that computes, got 'meta'"),
        ({"hidden": 3}, "unknown options: hidden"),
        ({"horizon": 65}, "horizon must be at most the window, 64 steps, got 65"),
        ({"horizon": 8, "stride": 9}, "stride must be from 1 to horizon = 8, got 9"),
        ({"stride": 9}, "stride needs a horizon"),
        ({"memory": "much"}, "memory must be bytes"),
        ({"memory": "1GB", "horizon": 8}, "a horizon, here 8, or a memory budget, not both"),
    ],
)
def test_a_bad_option_is_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        TrainConfig.from_mapping(options, source="test")


@pytest.mark.parametrize("flag", [("--seed", "99999999999999999999"), ("--device", "meta")])
def test_a_bad_flag_is_refused_before_anything_is_written(flag, text_file, tmp_path, capsys):
    code, _, error = command(capsys, "train", text_file, "--out", tmp_path / "run", *flag)
    assert code == 2
    assert error.startswith(f"unrolled: {flag[0][2:]} must be")
    assert not (tmp_path / "run").exists()


def test_yaml_as_people_write_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# mine\ncell: gru\nlearning_rate: 4e-3\nclip: 1E+1  # large\ndropout: .5\nepochs: 12\nout: 2e\n")
    wanted = {"cell": "gru", "learning_rate": 0.004, "clip": 10.0, "dropout": 0.5, "epochs": 12, "out": "2e"}
    assert read_config(path) == wanted
    assert TrainConfig.from_mapping(read_config(path), source="test").learning_rate == 0.004


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_options_come_from_a_file_and_flags_go_first(suffix, short_file, tmp_path, capsys):
    path = tmp_path / f"config{suffix}"
    path.write_text(json.dumps({**TINY, "cell": "rnn"}))  # JSON is YAML too
    out = tmp_path / "run"
    code, *_ = command(capsys, "train", short_file, "--config", path, "--cell", "gru", "--out", out)
    assert code == 0
    saved = json.loads((out / "config.json").read_text())
    assert (saved["cell"], saved["hidden_size"], saved["epochs"]) == ("gru", 4, 1)
    assert TrainConfig.from_mapping(read_config(out / "config.json"), source="saved").cell == "gru"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("c.toml", "", "ends in .json, .yaml or .yml"),
        ("c.json", "{", "cannot be read"),
        ("c.yaml", "- 1", "must hold one mapping"),
        ("c.yaml", "!!python/object/apply:os.getcwd []", "cannot be read"),
        ("c.yaml", "seed: 2024-13-45", "cannot be read"),
        ("c.json", '{"epochs": 1, "epochs": 2}', "got 'epochs' twice"),
        ("c.yaml", "epochs: 1\ncell: rnn\nepochs: 2\n", "got 'epochs' twice"),
    ],
)
def test_a_config_file_is_data_only(name, content, told, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        read_config(path)


def test_a_run_directory_that_holds_anything_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(RunError, match="not empty"):
        create_run(TrainConfig(out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        create_run(TrainConfig(out=str(tmp_path / "file" / "run")))


def test_what_is_no_run_or_a_damaged_one_is_told(tmp_path):
    with pytest.raises(RunError, match=r"has no config\.json"):
        load_run(tmp_path)
    config = TrainConfig(out=str(tmp_path / "run"), hidden_size=8)
    run = create_run(config)
    with pytest.raises(RunError, match=r"has no model\.safetensors"):
        load_run(run.path)
    vocabulary = Vocabulary("abc")
    run.save_model(CharacterModel(config, len(vocabulary)), vocabulary)
    whole = (run.path / "model.safetensors").read_bytes()
    (run.path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="cannot be read"):
        load_run(run.path)


def test_an_interrupted_write_leaves_the_model_before(tmp_path, monkeypatch):
    config = TrainConfig(out=str(tmp_path / "run"), hidden_size=8)
    run, vocabulary = create_run(config), Vocabulary("abc")
    run.save_model(CharacterModel(config, 4), vocabulary)
    before = load_file(run.path / "model.safetensors")

    monkeypatch.setattr(type(run.path), "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.save_model(CharacterModel(config, 4), vocabulary)
    monkeypatch.undo()
    after = load_file(run.path / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": -1.0, "length": 3}, OptionError),
        ({"temperature": float("nan"), "length": 3}, OptionError),
        ({"temperature": 1.0, "length": -3}, OptionError),
        ({"temperature": 1.0, "length": 3, "seed": 99999999999999999999}, OptionError),
        ({"temperature": 1.0, "length": 3, "seed": -1}, OptionError),
        ({"temperature": 1.0, "length": 3, "prompt": "a€"}, DataError),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_refused(options, error):
    model = CharacterModel(TrainConfig(hidden_size=8), 4).eval()
    with pytest.raises(error):
        sample(model, Vocabulary("abc"), **{"seed": 0, **options})  # refused when called, not when first read


def test_a_prompt_that_is_refused_is_not_printed(tmp_path, capsys):
    run = untrained_run(tmp_path / "run")
    code, printed, error = command(capsys, "sample", run.path, "--prompt", "日本")
    assert (code, printed) == (2, "")
    assert "the prompt has characters that the model never saw in training: '日本'" in error


def test_the_command_without_arguments_shows_its_help():
    environment = {**os.environ, "NO_COLOR": "1"}
    shown = subprocess.run([sys.executable, "-m", "unrolled"], capture_output=True, text=True, env=environment)
    assert "train" in shown.stdout + shown.stderr
    assert "sample" in shown.stdout + shown.stderr
