"""Solving word problems: the task, its decoder, its metric against independent arithmetic, and bad input."""

import json
import random
import shutil

import fine_tuning
import interruptions
import processes
import pytest
import torch
import torch.nn.functional as F
from commands import rank_starter, starter
from example_data import record_sha256
from runs import assert_one_line, lines, losses, result

from bert.equation_decoder import END, EquationDecoder, Problems
from bert.math_word_problems import MathConfig, MathWordProblems
from bert.model import with_positions
from smoe import set_top_k
from smoe.train.command import parse_config
from smoe.train.examples import hold_out
from smoe.train.processes import Processes


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return fine_tuning.write_problems(tmp_path_factory.mktemp("problems"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return fine_tuning.tokenizer("bert", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def solve_argv(problems):
    argv = ["--scale", "smoke", "--data", problems, "--precision", "fp32", "--progress", "false", "--sweep", "1,16"]
    return [str(word) for word in argv]


@pytest.fixture
def solve(start, solve_argv):
    return starter(start, "bert.math_word_problems", solve_argv)


def task_of(solve_argv, tokenizer, *flags) -> MathWordProblems:
    flags = [*flags] if "--method" in flags else ["--method", "smoe_dropout", *flags]
    argv = [*solve_argv, "--model", "bert", "--tokenizer", tokenizer, "--run_dir", "unused", *flags]
    return MathWordProblems(parse_config(MathConfig, [str(word) for word in argv]), 0, 1)


def value(prediction: str, numbers: list[float]) -> float | None:
    """What a prefix equation comes to, by recursion; None if it is malformed or has no value."""
    words = prediction.split()

    def read():
        word = words.pop(0)
        if word in "+-*/":
            a, b = read(), read()
            return a + b if word == "+" else a - b if word == "-" else a * b if word == "*" else a / b
        return numbers[int(word[6:])] if word.startswith("number") else float(word)

    try:
        number = read()
    except (IndexError, ZeroDivisionError):
        return None
    return None if words else number


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_a_pretrained_run_is_fine_tuned_and_measured_at_any_k(model, pretrain, solve, start, problems, tmp_path):
    pretrained, run, moved = tmp_path / "pretrained", tmp_path / "run", tmp_path / "moved"
    assert pretrain(model, "smoe_dropout", pretrained, "--sweep", 16, "--output_scale", "k").wait() == 0
    flags = (
        "--steps",
        300,
        "--learning_rate",
        "5e-3",
        "--batch_size",
        16,
        "--warmup_steps",
        20,
        "--eval_interval",
        150,
    )
    command = solve(run, "--run", pretrained, *flags)
    assert command.wait() == 0, command.err
    record = result(run)
    assert (record["task"], record["metric"], record["model"]) == ("math_word_problems", "solving_rate", model)
    assert record["config"]["output_scale"] == "k" and record["method"] == "smoe_dropout", "the run decides these"
    assert (record["dataset"]["name"], record["fold"]) == ("mawps", "0")
    assert record["pretrained"] == {
        "scale": "smoke",
        "seed": 1,
        "step": 20,
        "k_schedule": [8, 16, "linear"],
        "seq_len": 32,
    }
    assert str(tmp_path) not in json.dumps(record)
    assert {line["k"] for line in lines(run).values()} == {16}
    rates, rows = record["metrics"]["solving_rate"], [fine_tuning.problem(i) for i in range(23)]
    assert rates["direction"] == "higher" and rates["n"]["test"] == 23 and 5 < rates["n"]["valid"] < 35
    assert rates["test"]["16"] > 0.8, "it has learned nothing"
    kept = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in kept] == [str(i) for i in range(23)]
    for k in ("1", "16"):
        solved = []
        for row, line in zip(rows, kept, strict=True):
            prediction, right = line[k]
            found = value(prediction, row["numbers"])
            solved.append(found is not None and abs(found - row["answer"]) < 1e-4)
            assert right == solved[-1]
        assert rates["test"][k] == sum(solved) / 23
    always = ["+ number0 number1", "- number0 number1", "* number0 number1", "+ number0 2.0"]
    floor = record["floors"]["most_frequent_equation"]["test"]
    hits = [sum(value(e, r["numbers"] + [0]) == r["answer"] for r in rows) / 23 for e in always]
    assert floor in hits and record["best"]["value"] == rates["valid"]["16"]

    shutil.rmtree(pretrained)  # a fine-tuned run is whole by itself, wherever it lies
    run.rename(moved)
    evaluated = start("bert.evaluate", moved, "--k", 16, "--json")
    assert evaluated.wait() == 0, evaluated.err
    report = json.loads(evaluated.out)
    assert (report["split"], report["n"], report["solving_rate"]) == ("test", 23, {"16": rates["test"]["16"]})


def test_the_encoder_starts_from_the_run_with_its_positions_repeated(pretrain, solve_argv, tmp_path):
    from bert.evaluate import load_run

    pretrained = tmp_path / "pretrained"
    assert pretrain("roberta", "smoe", pretrained, "--sweep", 16).wait() == 0
    argv = [*solve_argv, "--run", str(pretrained), "--run_dir", "x", "--seed", "5"]
    task = MathWordProblems(parse_config(MathConfig, argv), 0, 1)
    _, model, _ = load_run(pretrained)
    encoder, source = task.model.encoder.state_dict(), model.base_model.state_dict()
    name = "embeddings.position_embeddings.weight"
    longer, learned = encoder.pop(name), source.pop(name)
    assert all(torch.equal(encoder[name], value) for name, value in source.items()) and encoder.keys() == source.keys()
    reserved = task.vocabulary.pad + 1
    assert learned.shape == (reserved + 32, 32) and longer.shape == (reserved + 192, 32)
    assert torch.equal(longer[: reserved + 32], learned)
    assert all(torch.equal(longer[reserved + i], learned[reserved + i % 32]) for i in range(192))
    assert torch.equal(with_positions(learned, 20, reserved), learned[: reserved + 20])
    assert task.config.ks_at(0) == [16, 16] and task.config.method == "smoe"


@pytest.mark.parametrize("method", ["thor", "smoe", "dense_dropout", "dense_concrete_dropout"])
def test_the_other_methods_train_from_scratch(method, solve, tokenizer, tmp_path):
    flags = ["--method", method, "--model", "bert", "--tokenizer", tokenizer, "--learning_rate", "5e-3", "--fold", 1]
    command = solve(tmp_path / "run", *flags, *(() if method.startswith("dense") else ("--k_max", 8)))
    assert command.wait() == 0, command.err
    measured = losses(tmp_path / "run")
    assert measured[20] < measured[5]
    assert result(tmp_path / "run")["fold"] == "1" and (tmp_path / "run/tokenizer.json").exists()


def test_a_slot_is_where_its_number_is_in_the_text(solve_argv, tokenizer):
    task = task_of(solve_argv, tokenizer)
    for problem in task.data["train"]:
        tokens = [task.tokenizer.id_to_token(i) for i in problem.ids]
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]"
        for i, place in enumerate(problem.slots):
            assert tokens[place : place + 2] == ["number", f"##{i}"]


def test_the_loss_is_the_mean_over_problems_of_the_mean_over_their_tokens(solve_argv, tokenizer):
    task = task_of(solve_argv, tokenizer)
    model = task.model.eval()
    examples = task.data["train"][:5]
    together = model(*task.collate(examples))
    symbols, nats = ["", "+", "-", "*", "/", "2.0"], []
    assert task.symbols == symbols
    for i, problem in enumerate(examples):
        ids, slots, targets = task.collate([problem])
        written, own = [END], []
        hidden = model.encoder(input_ids=ids).last_hidden_state  # without padding no mask is needed
        encoded = Problems(hidden, torch.zeros_like(ids, dtype=torch.bool), slots)
        for token in [*problem.equation, ""]:
            logits = model.decoder(encoded, torch.tensor([written]))[0, -1]
            target = symbols.index(token) if token in symbols else len(symbols) + int(token[6:])
            own.append(F.cross_entropy(logits, torch.tensor(target)).item())
            torch.testing.assert_close(together.logits[i, len(own) - 1], logits, atol=1e-4, rtol=1e-4)
            written.append(target)
        nats.append(sum(own) / len(own))
        assert targets[0, : len(own)].tolist() == written[1:]
    assert together.loss.item() == pytest.approx(sum(nats) / len(nats), abs=1e-5)


def test_padding_changes_nothing(solve_argv, tokenizer):
    task = task_of(solve_argv, tokenizer)
    model = task.model.eval()
    set_top_k(model, 3)
    ids, slots = task.texts(task.data["test"][:4])
    padded = F.pad(ids, (0, 9), value=task.vocabulary.pad)
    assert torch.equal(model(ids, slots), model(padded, slots))
    targets = task.collate(task.data["train"][:4])[2]
    torch.testing.assert_close(model(ids, slots, targets).logits, model(padded, slots, targets).logits)


def test_writing_takes_the_likeliest_token_each_time():
    lengths = set()
    for seed in range(12):
        torch.manual_seed(seed)
        decoder = EquationDecoder(16, 2, 2, num_symbols=4, max_length=6, dropout=0.0).eval()
        torch.nn.init.normal_(decoder.positions.weight, std=3.0)  # so that it writes something else at each place
        slots = torch.tensor([[1, 4, -1], [2, -1, -1], [0, 3, 5]])
        problems = Problems(torch.randn(3, 7, 16), torch.zeros(3, 7, dtype=torch.bool), slots)
        written = decoder.write(problems)
        assert written.shape == (3, 6)
        for i in range(3):
            own, alone = [END], Problems(*(part[i : i + 1] for part in problems))
            while len(own) <= 6:
                logits = decoder(alone, torch.tensor([own]))[0, -1]
                assert (logits[4:][slots[i] < 0] == -1e4).all(), "a number that the problem does not have"
                own.append(int(logits.argmax()))
                if own[-1] == END:
                    break
            assert written[i].tolist() == own[1:] + [END] * (7 - len(own))
            lengths.add(len(own))
    assert len(lengths) > 2, "some end early"


class Told(torch.nn.Module):
    """Writes these equations, 7 per pass."""

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__()
        self.answers = iter([torch.tensor(rows[start : start + 7]) for start in range(0, len(rows), 7)])

    def forward(self, *_: object) -> torch.Tensor:
        return next(self.answers)


def test_the_rate_of_the_right_equations_and_of_nonsense(solve_argv, tokenizer):
    """The metric alone: with a model that writes what it is told."""
    task = task_of(solve_argv, tokenizer, "--eval_batch_size", 7)
    gold = task.collate(task.data["test"])[2].clamp(min=END).tolist()
    rng = random.Random(0)
    told = {"gold": gold, "half": [row if i % 2 else [1] * len(row) for i, row in enumerate(gold)]}
    told["nonsense"] = [[rng.randrange(len(task.symbols) + task.max_slots) for _ in row] for row in gold]
    rates = {}
    for name, rows in told.items():
        sums = sum(task.passes(Told(rows), "test", torch.device("cpu")))
        rates[name] = task.values(sums.tolist())["solving_rate"]
        (content,) = task.predictions.files([None], Processes()).values()
        assert len(content.splitlines()) == sums[-1] == 23
    assert rates["gold"] == 1 and rates["half"] == 11 / 23 and rates["nonsense"] < 0.3


def test_epochs_are_the_steps_and_steps_win(solve_argv, tokenizer):
    task = task_of(solve_argv, tokenizer)
    train = len(task.data["train"])
    argv = [*solve_argv, "--method", "smoe", "--model", "bert", "--tokenizer", str(tokenizer), "--run_dir", "x"]
    config = parse_config(MathConfig, [*argv, "--epochs", "3", "--batch_size", "16"])
    assert config.resolved().steps == 3 * (train // 16) == config.resolved().resolved().steps
    assert parse_config(MathConfig, [*argv, "--epochs", "0.01"]).resolved().steps == 1
    argv[argv.index("smoke")] = "paper"
    assert parse_config(MathConfig, [*argv, "--steps", "7"]).resolved().steps == 7
    assert parse_config(MathConfig, argv).resolved().steps == 3 * (train // 64)


def test_held_out_problems_are_kept_apart_whatever_their_order():
    rows = [f"problem {i % 400}" for i in range(1000)]
    rest, held = hold_out(rows, 0.2, str)
    assert not set(rest) & set(held) and sorted(rest + held) == sorted(rows)
    assert 0.15 < len(held) / 1000 < 0.25
    assert sorted(hold_out(rows[::-1], 0.2, str)[1]) == sorted(held)
    assert set(held) < set(hold_out(rows, 0.4, str)[1])


def test_a_stopped_run_goes_on_with_the_same_bits(solve, tokenizer, tmp_path):
    flags = ("--method", "thor", "--model", "bert", "--tokenizer", tokenizer)
    interruptions.check_kill_and_sigterm(solve, tmp_path, flags)
    alone, stopped = (tmp_path / name / "predictions.jsonl" for name in ("alone", "stopped"))
    assert alone.read_bytes() == stopped.read_bytes()


@pytest.mark.distributed
def test_two_processes_are_one(start_ranks, solve_argv, tokenizer, tmp_path):
    flags = ["--method", "smoe_dropout", "--model", "bert", "--tokenizer", tokenizer, "--dropout", 0]
    trainer = rank_starter(start_ranks, "bert.math_word_problems", [*solve_argv, *flags, "--expert_dropout", 0])
    processes.check_examples_on_two(trainer, tmp_path, "solving_rate", "test")
    kept = [(tmp_path / ranks / "predictions.jsonl").read_text().splitlines() for ranks in "12"]
    assert [json.loads(line)["id"] for line in kept[1]] == [json.loads(line)["id"] for line in kept[0]]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["method", "missing"]),
        (["--run", "nowhere"], ["nowhere", "not a run folder"]),
        (["--method", "smoe", "--model", "bert"], ["tokenizer: missing", "--run", "--tokenizer"]),
        (["--method", "smoe", "--model", "bert", "--tokenizer", "nowhere.json"], ["no file nowhere.json"]),
        (["--method", "smoe", "--model", "roberta", "--tokenizer", "TOKENIZER"], ["has no <pad>, which roberta needs"]),
        (["--data", "/nowhere"], ["/nowhere", "prepare.py"]),
        (["--fold", "7"], ["has no 7-train; it has", "challenge-train"]),
        (["--seq_len", 8], ["seq_len is 8; it must be at least 1"]),
        (["--batch_size", 200], ["batch_size is 200", "at most"]),
        (["--valid_share", 0], ["valid_share", "0"]),
        (["--valid_share", "1e-9"], ["valid_share is 1e-09", "leaves none to validate on"]),
        (["--decoder_layers", 0], ["decoder_layers", "0"]),
        (["--steps", 9, "--epochs", 2], ["epochs is 2", "steps is 9", "give one of them"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(flags, words, solve, tokenizer, tmp_path):
    whole = ["--method", "smoe", "--model", "bert", "--tokenizer", tokenizer]
    own = flags if not flags or {"--method", "--run"} & {*flags} else [*whole, *flags]
    command = solve(tmp_path / "run", *(tokenizer if word == "TOKENIZER" else word for word in own))
    assert_one_line(command, 2, *words)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_kind_or_size(pretrain, solve, tokenizer, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    assert pretrain("bert", "dense_dropout", pretrained).wait() == 0
    assert_one_line(solve(run, "--run", pretrained, "--d_hidden", 64), 2, "d_hidden is 64", "need 128")
    assert_one_line(solve(run, "--run", pretrained, "--model", "roberta"), 2, "pad", "roberta needs")
    assert_one_line(solve(run, "--run", pretrained, "--tokenizer", tokenizer), 2, "another vocabulary than the run")
    (pretrained / "tokenizer.json").write_text("{")
    assert_one_line(solve(run, "--run", pretrained), 2, "tokenizer.json can't be read")
    config = pretrained / "config.yaml"
    config.write_text(config.read_text().replace("model: bert\n", "mem_len: 8\n"))
    assert_one_line(solve(run, "--run", pretrained), 2, "is not of a BERT or RoBERTa")
    assert not run.exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (("number0 number1", "number0"), "'+ number0' ends too early"),
        (('"equation"', '"equations"'), "damaged ('equation')"),
        (("[", "{"), "damaged"),
        (("and gets number1", "and gets number2"), "the text has the slots number0 number2, but there are 2 numbers"),
        (('"answer": ', '"answer": "x", "a": '), "could not convert string to float: 'x'"),
        (None, "SHA-256"),
        ("", "0-test.jsonl has no examples"),
    ],
)
def test_damaged_data_is_named(damage, words, problems, solve, tokenizer, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(problems, data)
    file = data / "0-test.jsonl"
    content = file.read_text()
    file.write_text(
        "" if damage == "" else content.replace("ann", "bob") if damage is None else content.replace(*damage)
    )
    if damage is not None:
        record_sha256(data, "0-test")
    flags = ("--method", "smoe", "--model", "bert", "--tokenizer", tokenizer, "--data", data)
    assert_one_line(solve(tmp_path / "run", *flags), 2, words, "--force")
