"""Answering questions about paragraphs: windows, spans and scores computed another way, smoke runs, bad input."""

import json
import shutil

import fine_tuning
import interruptions
import processes
import pytest
import torch
from commands import rank_starter, starter
from example_data import record_sha256
from runs import assert_one_line, result
from transformers import BertConfig, BertForQuestionAnswering

from bert.answers import f1, is_exact
from bert.question_answering import QuestionAnswering, QuestionAnsweringConfig, compositionality
from bert.span_reader import best_spans
from smoe.train.command import parse_config

# So short that every question has several windows.
SHORT = ("--seq_len", 27, "--overlap", 6)


@pytest.fixture(scope="module")
def paragraphs(tmp_path_factory):
    return fine_tuning.write_paragraphs(tmp_path_factory.mktemp("paragraphs"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return fine_tuning.tokenizer("bert", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def answer_argv(paragraphs):
    argv = ["--scale", "smoke", "--data", paragraphs, "--precision", "fp32", "--progress", "false", "--sweep", "1,16"]
    return [str(word) for word in (*argv, *SHORT)]


@pytest.fixture
def answer(start, answer_argv):
    return starter(start, "bert.question_answering", answer_argv)


def task_of(answer_argv, tokenizer, *flags, model="bert") -> QuestionAnswering:
    argv = [*answer_argv, "--model", model, "--tokenizer", tokenizer, "--run_dir", "unused", *flags]
    return QuestionAnswering(parse_config(QuestionAnsweringConfig, [str(word) for word in argv]), 0, 1)


@pytest.fixture(scope="module")
def task(answer_argv, tokenizer):
    return task_of(answer_argv, tokenizer, "--method", "dense_dropout", "--init_std", 0.5)


def windows(task, example):
    return [task.window(example, start) for start in task.starts(example)]


def test_a_pretrained_run_is_fine_tuned_and_measured_at_any_k(pretrain, answer, start, tmp_path):
    pretrained, run = tmp_path / "pretrained", tmp_path / "run"
    assert pretrain("bert", "smoe_dropout", pretrained, "--sweep", 16).wait() == 0
    # The vocabulary of the books cuts words into pieces.
    command = answer(run, "--run", pretrained, "--batch_size", 8, "--seq_len", 160, "--overlap", 16)
    assert command.wait() == 0, command.err
    record = result(run)
    assert (record["task"], record["metric"], record["model"]) == ("question_answering", "exact_match", "bert")
    assert (record["dataset"]["name"], record["dataset"]["files"]["test"]) == ("hotpotqa", {"a.json": 23})
    assert record["metrics"]["exact_match"]["n"] == record["metrics"]["f1"]["n"] == {
        "valid": record["metrics"]["f1"]["n"]["valid"], "test": 23, "multi_hop": 6, "single_hop": 12,
    }  # fmt: skip
    right = {}
    for split, name in (("test", ""), ("multi_hop", "_multi_hop"), ("single_hop", "_single_hop")):
        kept = [json.loads(line) for line in (run / f"predictions{name}.jsonl").read_text().splitlines()]
        rows = [fine_tuning.paragraphs(i, None if split == "test" else split) for i in range(len(kept))]
        for k in ("1", "16"):
            exact = right[split, k] = [line[k][0] == row["answer"] for line, row in zip(kept, rows, strict=True)]
            assert [line[k][1] for line in kept] == exact
            assert record["metrics"]["exact_match"][split][k] == sum(exact) / len(kept)
    gaps = record["compositionality"]["16"]
    assert gaps["exact_match"] == {
        "multi_hop": sum(right["multi_hop", "16"]) / 6,
        "single_hop": sum(right["single_hop", "16"]) / 12,
    }
    answers = [fine_tuning.paragraphs(i)["answer"] for i in range(23)]
    assert record["floors"]["most_frequent_answer"]["test"] in {answers.count(found) / 23 for found in answers}
    said = sum(fine_tuning.paragraphs(i)["answer"] in ("yes", "no") for i in range(23))
    assert (
        record["answerable"]["test"]
        == (said + sum(fine_tuning.paragraphs(i)["span"] is not None for i in range(23))) / 23
    )
    shutil.rmtree(pretrained)
    for split, flags in (("test", ()), ("single_hop", ("--split", "single_hop"))):
        evaluated = start("bert.evaluate", run, "--k", 16, "--json", *flags)
        assert evaluated.wait() == 0, evaluated.err
        assert json.loads(evaluated.out)["exact_match"] == {"16": record["metrics"]["exact_match"][split]["16"]}


def test_it_learns_to_mark_the_answer(answer, tokenizer, tmp_path):
    flags = ("--method", "dense_dropout", "--model", "bert", "--tokenizer", tokenizer, "--steps", 200)
    flags += ("--learning_rate", "3e-3", "--batch_size", 16, "--warmup_steps", 20, "--dropout", 0, "--init_std", 0.1)
    command = answer(tmp_path / "run", *flags, "--eval_interval", 100)
    assert command.wait() == 0, command.err
    record = result(tmp_path / "run")
    assert record["metrics"]["exact_match"]["test"]["dense"] > 0.5 > record["floors"]["most_frequent_answer"]["test"]
    assert record["compositionality"]["dense"]["exact_match"]["single_hop"] > 0.5


@pytest.mark.parametrize("model", ["bert", "roberta"])
def test_windows_hold_question_words_and_a_chunk(model, answer_argv, tmp_path):
    task = task_of(answer_argv, fine_tuning.tokenizer(model, tmp_path), "--method", "smoe", model=model)
    example, row = task.data["test"][1], fine_tuning.paragraphs(1)
    window = windows(task, example)[0]
    found = [task.tokenizer.id_to_token(token) for token in window.ids]
    head = [*row["question"].split(), *(["[SEP]"] if model == "bert" else ["</s>", "</s>"]), "yes", "no"]
    head = ["[CLS]" if model == "bert" else "<s>", *head]
    assert found == [*head, *row["context"].split()[: 27 - len(head) - 1], found[-1]]
    assert found[-1] == ("[SEP]" if model == "bert" else "</s>") and len(found) == 27
    ids, types, allowed, _ = task.collate([window, window._replace(ids=window.ids[:-3])])
    second = head.index("yes")
    assert types[0].tolist() == ([0] * second + [1] * (27 - second) if model == "bert" else [0] * 27)
    assert allowed[0].nonzero().flatten().tolist() == [0, *range(second, 26)]
    assert (
        allowed[1].nonzero().flatten().tolist() == [0, *range(second, 23)]
        and (ids[1, 24:] == task.vocabulary.pad).all()
    )


def test_windows_cover_the_paragraphs_and_find_every_answer(task):
    held = 0
    for example in (example for split in ("train", "valid", "test") for example in task.data[split]):
        starts = task.starts(example)
        chunks = [[*range(s, min(s + task.room(example), len(example.ids)))] for s in starts]
        assert sorted({token for chunk in chunks for token in chunk}) == [*range(len(example.ids))]
        assert all(len({*a} & {*b}) == 6 for a, b in zip(chunks, chunks[1:], strict=False)) and len(chunks) > 1
        question, named = example.question, set()
        for window in windows(task, example):
            assert len(window.ids) <= 27
            first, last = window.span
            if (first, last) != (0, 0):
                named.add(task.tokenizer.decode(window.ids[first : last + 1]))
        held += named == {question.answer}
        assert named == ({question.answer} if question.span or question.answer in ("yes", "no") else set())
    assert held > 100


def test_training_windows_are_drawn_from_seed_and_step(task, answer_argv, tokenizer):
    first, again, other = (task.batch(step) for step in (3, 3, 4))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    flags = ("--method", "dense_dropout", "--batch_size", 8, "--answer_share")
    shares = []
    for share in (1, 0):
        drawing = task_of(answer_argv, tokenizer, *flags, share)
        answerable = [example for example in drawing.data["train"] if example.question.span]
        spans = [drawing.drawn(example, 0.5, i / 160).span != (0, 0) for i, example in enumerate(answerable)]
        shares.append(sum(spans) / len(spans))
    assert shares[0] == 1 and 0.2 < shares[1] < 0.9
    whole = drawing.batch(2)
    for rank in (0, 1):
        drawing.share = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(drawing.batch(2)[3], whole[3][drawing.share])


def test_the_best_span_is_that_of_every_pair_of_places():
    torch.manual_seed(1)
    logits = torch.randn(40, 2, 17)
    chunk = torch.zeros(40, 17, dtype=torch.bool)
    words = torch.tensor([[3, 3], [4, 5]]).expand(40, 2, 2)
    for row in range(39):  # the last one has no chunk
        chunk[row, 6 : 8 + row % 9] = True
    spans = best_spans(logits, chunk, words, 4)
    for row in range(40):
        pairs = [(a, b) for a in range(17) for b in range(a, min(a + 4, 17)) if chunk[row, a] and chunk[row, b]]
        pairs += [(3, 3), (4, 5)]
        score = {(a, b): (logits[row, 0, a] + logits[row, 1, b] - logits[row, :, 0].sum()).item() for a, b in pairs}
        best = max(score, key=score.get)
        assert (spans.first[row].item(), spans.last[row].item()) == best
        assert spans.scores[row].item() == pytest.approx(score[best], abs=1e-5)
    assert {(3, 3), (4, 5)} < {*zip(spans.first.tolist(), spans.last.tolist(), strict=True)}


def test_the_answer_is_the_best_of_all_windows(task):
    task.model.eval()
    cpu = torch.device("cpu")
    sums = torch.stack(list(task.passes(task.model, "test", cpu))).sum(0)
    kept = task.kept["test"]._by_k["dense"]
    expected = {}
    for i, example in enumerate(task.data["test"]):
        found = [task.answers(task.model, [example], [(0, start)], cpu)[0] for start in task.starts(example)]
        expected[str(i)] = max(found, key=lambda pair: pair[0])[1]
        assert len({text for _, text in found}) > 1 or i  # the windows do not agree
    assert {i: text for i, (text, _) in kept.items()} == expected
    rights = [fine_tuning.paragraphs(i)["answer"] for i in range(23)]
    assert sums[2] == 23 and sums[0] == sum(expected[str(i)] == right for i, right in enumerate(rights))
    assert sums[1] == pytest.approx(sum(f1(expected[str(i)], right) for i, right in enumerate(rights)))


def test_the_model_is_transformers_own(task):
    """With the same weights, and every place allowed, it computes what BertForQuestionAnswering does."""
    model = task.model.eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = BertConfig(vocab_size=task.vocabulary.size, max_position_embeddings=27, **sizes)
    config.pad_token_id = task.vocabulary.pad
    theirs = BertForQuestionAnswering(config).eval()
    weights = {f"bert.{name}": value for name, value in model.encoder.state_dict().items()}
    for name in list(weights):
        renamed = name.replace("intermediate.up", "intermediate.dense").replace("intermediate.down", "output.dense")
        weights[renamed] = weights.pop(name)
    theirs.load_state_dict(weights | {f"qa_outputs.{part}": getattr(model.score, part) for part in ("weight", "bias")})
    ids, types, allowed, spans = task.collate([task.window(example, 0) for example in task.data["test"][:6]])
    mask = (ids != task.vocabulary.pad).long()
    places = {"start_positions": spans[:, 0], "end_positions": spans[:, 1]}
    expected = theirs(input_ids=ids, token_type_ids=types, attention_mask=mask, **places)
    ours = model(ids, types, torch.ones_like(allowed), spans)
    torch.testing.assert_close(ours.logits[:, 0], expected.start_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.logits[:, 1], expected.end_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.loss, expected.loss, atol=1e-4, rtol=1e-4)
    # Where no answer may start, none does.
    kept = model(ids, types, allowed, spans).logits.softmax(-1)
    assert kept.masked_select(~allowed[:, None]).max() == 0


@pytest.mark.parametrize(
    ("answer", "right", "exact", "words"),
    [
        ("The Beatles!", "beatles", True, 1.0),
        ("  an   apple", "Apple", True, 1.0),
        ("U.S.", "us", True, 1.0),
        ("theory", "ory", False, 0.0),
        ("Barack Obama", "Obama", False, 2 / 3),
        ("to be or not to be", "to be", False, 0.5),
        ("no way", "no", False, 0.0),
        ("yes", "no", False, 0.0),
        ("the", "a", True, 0.0),
    ],
)
def test_answers_are_compared_as_the_data_sets_own_evaluation_does(answer, right, exact, words):
    assert is_exact(answer, right) is exact and f1(answer, right) == pytest.approx(words)


def test_the_compositionality_gap_in_both_forms():
    multi = {"0": True, "1": False, "2": True, "3": False}
    single = dict(zip(map(str, range(8)), map(bool, [1, 1, 1, 1, 1, 0, 0, 0]), strict=True))
    found = compositionality(multi, single)
    assert found["gap"] == 0.5 and found["exact_match_difference"] == 5 / 8 - 2 / 4
    assert found["n"] == {"multi_hop": 4, "single_hop": 8, "both_single_hop_right": 2}
    assert compositionality(multi, dict.fromkeys(single, False))["gap"] is None


def test_a_stopped_run_goes_on_with_the_same_bits(answer, tokenizer, tmp_path):
    flags = ("--method", "smoe_dropout", "--model", "bert", "--tokenizer", tokenizer)
    interruptions.check_kill_and_sigterm(answer, tmp_path, flags)


@pytest.mark.distributed
def test_two_processes_are_one(start_ranks, answer_argv, tokenizer, tmp_path):
    flags = ["--method", "smoe_dropout", "--model", "bert", "--tokenizer", tokenizer, "--dropout", 0]
    trainer = rank_starter(start_ranks, "bert.question_answering", [*answer_argv, *flags])
    processes.check_examples_on_two(trainer, tmp_path, "exact_match", "test")
    gaps = [result(tmp_path / ranks)["compositionality"]["16"]["n"] for ranks in "12"]
    assert gaps[0] == gaps[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"span": [5, 9999]}, "span [5, 9999], expected a part of the context's"),
        ({"answer": 7}, "7, expected text"),
        ({"titles": None}, "damaged ("),
    ],
)
def test_damaged_data_is_named(change, words, answer, tokenizer, paragraphs, tmp_path):
    data = shutil.copytree(paragraphs, tmp_path / "data")
    with open(data / "test.jsonl", "a") as file:
        file.write(json.dumps({**fine_tuning.paragraphs(0), **change}) + "\n")
    record_sha256(data, "test")
    flags = ("--method", "smoe", "--model", "bert", "--tokenizer", tokenizer, "--data", data)
    assert_one_line(answer(tmp_path / "run", *flags), 2, words, "--force")
    assert not (tmp_path / "run").exists()


def test_bad_flags_are_one_line(answer, tokenizer, paragraphs, tmp_path):
    whole = ("--method", "smoe", "--model", "bert", "--tokenizer", tokenizer)
    assert_one_line(answer(tmp_path / "run", *whole, "--seq_len", 19), 2, "seq_len is 19; it must be at least 20")
    assert_one_line(answer(tmp_path / "run", *whole, "--answer_share", 1.5), 2, "answer_share is 1.5")
    data = shutil.copytree(paragraphs, tmp_path / "data")
    (data / "single_hop.jsonl").write_bytes((data / "multi_hop.jsonl").read_bytes())
    record_sha256(data, "single_hop")
    assert_one_line(answer(tmp_path / "run", *whole, "--data", data), 2, "has 6 single_hop questions, expected two")
    assert not (tmp_path / "run").exists()
