import hashlib
import json

import numpy as np
import pytest
import torch

from transformer_xl.data import SegmentStream, evaluation_segments, load_data


def _part(name, content):
    return {"file": f"{name}.bin", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.fixture
def data_dir(tmp_path):
    splits = {"train": bytes(range(200)), "valid": b"valid" * 4, "test": b"test" * 5}
    for name, content in splits.items():
        (tmp_path / f"{name}.bin").write_bytes(content)
    meta = {
        "sha256": "ab" * 32,
        "splits": {name: _part(name, content) for name, content in splits.items()},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def numbered(n):
    return (np.arange(n) % 251).astype(np.uint8)


PREPARE = "data/enwik8/prepare.py"


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def refusal(folder) -> str:
    with pytest.raises(ValueError) as error:
        load_data(folder)
    return one_line(error)


def test_splits_are_memory_mapped_raw_bytes(data_dir):
    data, record = load_data(str(data_dir))
    train = data["train"]
    assert isinstance(train, np.memmap) and train.dtype == np.uint8 and not train.flags.writeable
    assert bytes(train) == bytes(range(200)) and bytes(data["test"]) == b"test" * 5
    assert record == {"name": "enwik8", "sha256": "ab" * 32}


def test_missing_folder_names_it_and_the_command(tmp_path):
    folder = tmp_path / "none"
    assert refusal(folder).endswith(f"in {folder} (No such file or directory); run: python {PREPARE} --out {folder}")


def test_the_advice_prepares_the_same_variant(tmp_path):
    folder = tmp_path / "enwik8-no-newlines"
    assert refusal(folder).endswith(f"run: python {PREPARE} --newlines drop --out {folder}")


def test_missing_or_truncated_file(data_dir):
    again = f"; run: python {PREPARE} --out {data_dir} --force"
    (data_dir / "valid.bin").unlink()
    assert refusal(data_dir) == f"data: {data_dir / 'valid.bin'} is missing{again}"
    (data_dir / "train.bin").write_bytes(bytes(150))
    assert refusal(data_dir) == f"data: {data_dir / 'train.bin'}, 150 bytes, has not the SHA-256 of meta.json{again}"


def test_other_bytes_of_the_same_length_are_noticed(data_dir):
    (data_dir / "test.bin").write_bytes(b"tEst" * 5)
    assert "test.bin, 20 bytes, has not the SHA-256 of meta.json; run: " in refusal(data_dir)


@pytest.mark.parametrize("name", ["../test.bin", "/etc/passwd", "", 3])
def test_a_file_elsewhere_is_not_read(data_dir, name):
    meta = json.loads((data_dir / "meta.json").read_text())
    meta["splits"]["test"]["file"] = name
    (data_dir / "meta.json").write_text(json.dumps(meta))
    assert "meta.json is damaged (" in refusal(data_dir)


def test_a_missing_split_is_named_beside_those_there(data_dir):
    meta = json.loads((data_dir / "meta.json").read_text())
    del meta["splits"]["test"]
    (data_dir / "meta.json").write_text(json.dumps(meta))
    assert refusal(data_dir) == f"data: {data_dir} has no test; it has train, valid"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ("{}", "it has no 'sha256'"),
        ('{"splits": {"train": 1}, "sha256": ""}', "not subscriptable"),
        ('{"splits": [], "sha256": ""}', "no attribute 'items'"),
        ('{"splits": {}, "sha256": 3}', "sha256 is '3'"),
        ("[" * 100_000, "its values are nested"),
        ('{"sha256": ' + "1" * 5000 + "}", "4300"),
    ],
)
def test_damaged_record(data_dir, content, reason):
    (data_dir / "meta.json").write_text(content)
    message = refusal(data_dir)
    assert f"{data_dir / 'meta.json'} is damaged (" in message and reason in message and message.endswith("--force")
    assert len(message) < 500


@pytest.mark.parametrize(("n", "batch", "tgt_len"), [(100, 4, 6), (103, 4, 6), (97, 1, 96), (97, 3, 1), (64, 4, 5)])
def test_stream_against_naive_slicing(n, batch, tgt_len):
    data = numbered(n)
    stream = SegmentStream(data, batch, tgt_len)
    length = n // batch
    expected = []
    for start in range(0, length, tgt_len):
        if start + tgt_len + 1 <= length:  # whole segments with a target for their last token
            rows = [data[row * length + start :][: tgt_len + 1] for row in range(batch)]
            expected.append(([list(row[:-1]) for row in rows], [list(row[1:]) for row in rows]))
    assert stream.segments_per_epoch == len(expected) > 0
    for step in range(2 * len(expected) + 1):
        inputs, targets, starts_epoch = stream.segment(step)
        assert (inputs.tolist(), targets.tolist()) == expected[step % len(expected)]
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert starts_epoch == (step % len(expected) == 0)


def test_stream_is_a_function_of_the_step_alone():
    stream = SegmentStream(numbered(100), 4, 6)
    later = [segment.clone() for segment in stream.segment(3)[:2]]
    stream.segment(0)
    inputs, targets, _ = stream.segment(3)
    assert torch.equal(inputs, later[0]) and torch.equal(targets, later[1])


def test_ranks_together_read_what_one_reads():
    data = numbered(500)
    whole = SegmentStream(data, 6, 7)
    for world in (2, 3, 6):
        parts = [SegmentStream(data, 6, 7, rank, world) for rank in range(world)]
        for step in (0, 5, 40):
            assert torch.equal(torch.cat([part.segment(step)[0] for part in parts]), whole.segment(step)[0])
            assert torch.equal(torch.cat([part.segment(step)[1] for part in parts]), whole.segment(step)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 3, 0, 2), "batch_size is 5; .* number of processes, 2"),
        ((4, 25), "4 x 25 .* at most 24"),
        ((101, 3), "101 x 3 .* at most 0"),
    ],
)
def test_stream_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        SegmentStream(numbered(100), *arguments)
    one_line(error)


@pytest.mark.parametrize("arguments", [(4, 0), (0, 3), (4, 3, 2, 2), (4, 3, 0, 0)])
@pytest.mark.parametrize("kind", [SegmentStream, evaluation_segments])
def test_sizes_that_a_configuration_never_has(kind, arguments):
    with pytest.raises(AssertionError):
        kind(numbered(100), *arguments)


def rows_of(segments):
    """The targets of each row over a whole pass, and its inputs."""
    segments = list(segments)
    return [torch.cat(side, dim=1).tolist() for side in zip(*segments, strict=True)] if segments else [[], []]


@pytest.mark.parametrize(("n", "batch", "tgt_len"), [(100, 4, 6), (103, 4, 8), (103, 4, 1000), (50, 1, 7), (9, 4, 3)])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_covers_each_token_once(n, batch, tgt_len, world):
    data = numbered(n)
    length = n // batch
    inputs, targets, per_rank, passes = [], [], [], set()
    for rank in range(world):
        segments = list(evaluation_segments(data, batch, tgt_len, rank, world))
        passes.add(len(segments))
        if all((part == -100).all() for _, part in segments):  # without rows of its own
            per_rank.append(0)
            continue
        assert all(part.shape[1] == tgt_len for part, _ in segments[:-1])
        assert all(0 < part.shape[1] <= tgt_len and part.shape[0] > 0 for part, _ in segments)
        rank_inputs, rank_targets = rows_of(segments)
        inputs += rank_inputs
        targets += rank_targets
        per_rank.append(len(rank_inputs))
    assert inputs == [data[row * length : (row + 1) * length - 1].tolist() for row in range(batch)]
    assert targets == [data[row * length + 1 : (row + 1) * length].tolist() for row in range(batch)]
    assert max(per_rank) - min(per_rank) <= 1
    assert len(passes) == 1, "every rank makes as many passes"


@pytest.mark.parametrize(("max_tokens", "a_row"), [(4, 1), (30, 7), (32, 8), (33, 8), (10_000, 24)])
def test_evaluation_of_a_part(max_tokens, a_row):
    data = numbered(100)
    inputs, targets = rows_of(evaluation_segments(data, 4, 6, max_tokens=max_tokens))
    assert inputs == [data[row * 25 :][:a_row].tolist() for row in range(4)]
    assert targets == [data[row * 25 + 1 :][:a_row].tolist() for row in range(4)]


def test_evaluation_says_what_is_wrong_at_the_call():
    with pytest.raises(ValueError, match="batch_size: 60 .* at most 50"):
        evaluation_segments(numbered(100), 60, 5)
    with pytest.raises(ValueError, match="eval_tokens is 3; it must be at least eval_batch_size = 4"):
        evaluation_segments(numbered(100), 4, 5, max_tokens=3)


def test_a_large_file_is_not_read_as_a_whole(tmp_path):
    path = tmp_path / "train.bin"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: no disk is used, and it would never fit in memory
    stream = SegmentStream(np.memmap(path, dtype=np.uint8, mode="r"), 22, 512)
    inputs, _, _ = stream.segment(10**6)
    assert inputs.shape == (22, 512)
    segments = evaluation_segments(np.memmap(path, dtype=np.uint8, mode="r"), 10, 128)
    assert next(iter(segments))[0].shape == (10, 128)
