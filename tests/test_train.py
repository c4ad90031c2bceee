"""The main job on a small real text: it learns, it can be stopped, and bad input is told apart."""

import json
import math
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from unrolled.cli import main
from unrolled.errors import ConfigError, DataError, OptionError, RunError
from unrolled.train.baselines import context_model_bits, entropy_bits, xz_bits
from unrolled.train.config import TrainConfig, read_config
from unrolled.train.loop import bits_per_character, train
from unrolled.train.model import CharacterModel
from unrolled.train.run import create_run, load_run
from unrolled.train.sampling import sample
from unrolled.train.text import Split, Vocabulary, read_text, split_text
from unrolled.train.windows import each_window, window_count

TOPICS = pydoc_data.topics.topics
SMALL = "\n".join(TOPICS[name] for name in ("for", "while", "if", "with", "try", "function", "class"))
QUICK = {"hidden_size": 64, "embedding_size": 16, "window": 32, "batch": 16, "epochs": 4, "learning_rate": 1e-2}


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


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


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
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "metrics.jsonl", "model.safetensors"]
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
        models.append(train(config, split, create_run(config), Silent())[0])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    config, loaded, vocabulary = load_run(tmp_path / "a")
    numbers = vocabulary.encode(split.test)
    assert bits_per_character(loaded, numbers, config) == bits_per_character(models[0], numbers, config)


def test_the_state_is_carried_from_window_to_window(monkeypatch, tmp_path):
    split = split_text(SMALL, batch=4, window=8)
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
    train(config, split, create_run(config), Silent())
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
    job = subprocess.Popen([sys.executable, "-m", "unrolled", *arguments], stdout=subprocess.PIPE)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    printed = job.communicate(timeout=60)[0].decode()
    assert job.returncode == 130
    assert "interrupted" in printed
    _, model, vocabulary = load_run(out)
    assert len("".join(sample(model, vocabulary, length=5, temperature=1.0, seed=0))) == 5


def test_bits_per_character_is_the_mean_of_minus_log2_of_each_chance():
    config = TrainConfig(hidden_size=5, embedding_size=3)
    model = CharacterModel(config, 4).eval()
    numbers = torch.tensor([1, 2, 3, 1, 2, 0, 3])
    logits, _ = model(numbers[:-1].unsqueeze(1))
    chances = logits.squeeze(1).softmax(-1)[range(6), numbers[1:]]
    assert math.isclose(bits_per_character(model, numbers, config), -chances.log2().mean().item(), rel_tol=1e-5)


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
        ({"device": "abacus"}, "device must be one that torch has here"),
        ({"hidden": 3}, "unknown options: hidden"),
    ],
)
def test_a_bad_option_is_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        TrainConfig.from_mapping(options, source="test")


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_options_come_from_a_file_and_flags_go_first(suffix, text_file, tmp_path, capsys):
    path = tmp_path / f"config{suffix}"
    path.write_text(json.dumps({**QUICK, "epochs": 1, "cell": "rnn"}))  # JSON is YAML too
    out = tmp_path / "run"
    code, *_ = command(capsys, "train", text_file, "--config", path, "--cell", "gru", "--out", out)
    assert code == 0
    saved = json.loads((out / "config.json").read_text())
    assert (saved["cell"], saved["hidden_size"], saved["epochs"]) == ("gru", 64, 1)
    assert TrainConfig.from_mapping(read_config(out / "config.json"), source="saved").cell == "gru"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("c.toml", "", "ends in .json, .yaml or .yml"),
        ("c.json", "{", "cannot be read"),
        ("c.yaml", "- 1", "must hold one mapping"),
        ("c.yaml", "!!python/object/apply:os.getcwd []", "cannot be read"),
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

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(run.path), "replace", interrupted)
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
        ({"temperature": 1.0, "length": 3, "prompt": "a€"}, DataError),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_refused(options, error):
    model = CharacterModel(TrainConfig(hidden_size=8), 4).eval()
    with pytest.raises(error):
        list(sample(model, Vocabulary("abc"), seed=0, **options))


def test_the_command_without_arguments_shows_its_help():
    environment = {**os.environ, "NO_COLOR": "1"}
    shown = subprocess.run([sys.executable, "-m", "unrolled"], capture_output=True, text=True, env=environment)
    assert "train" in shown.stdout + shown.stderr
    assert "sample" in shown.stdout + shown.stderr
