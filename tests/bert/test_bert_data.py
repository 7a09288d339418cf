"""Batches as pure functions of seed and step, and BERT's masking."""

import json
import shutil

import numpy as np
import pytest
import torch

from bert.data import Blocks, TrainingBatches, Vocabulary, evaluation_batches, mask

VOCABULARY = Vocabulary(size=300, pad=0, unknown=1, start=2, end=3, mask=4)


def sequences(count, length=32, seed=0):
    data = np.random.default_rng(seed).integers(5, 300, size=(count, length)).astype(np.uint16)
    data[:, 0], data[:, -1] = 2, 3
    return data


def test_masking_is_berts():
    tokens = sequences(2000, 40).astype(np.int64)
    inputs, positions, targets = mask(tokens, VOCABULARY, 0.15, np.random.default_rng(1))
    assert positions.shape == targets.shape == (2000, 6)
    assert (np.diff(positions, axis=1) > 0).all()
    assert np.array_equal(np.take_along_axis(tokens, positions, 1), targets)
    changed = inputs != tokens
    chosen = np.zeros_like(changed)
    np.put_along_axis(chosen, positions, True, axis=1)
    assert not (changed & ~chosen).any(), "a token that is not predicted was changed"
    assert not (chosen & np.isin(tokens, (0, 2, 3))).any()
    shown = np.take_along_axis(inputs, positions, 1)
    assert (shown == 4).mean() == pytest.approx(0.8, abs=0.02)
    assert (shown == targets).mean() == pytest.approx(0.1, abs=0.02)
    # Every place is as likely as any other.
    assert chosen[:, 1:-1].mean(0) == pytest.approx(6 / 38, abs=0.04)


def test_start_end_and_padding_are_never_predicted_even_if_little_else_is_there():
    tokens = np.zeros((1, 20), dtype=np.int64)
    tokens[0, :4] = (2, 17, 18, 3)
    inputs, positions, targets = mask(tokens, VOCABULARY, 0.5, np.random.default_rng(0))
    assert sorted(targets[targets >= 0]) == [17, 18] and (targets == -100).sum() == 8
    assert np.array_equal(inputs[0, 3:], tokens[0, 3:]) and inputs[0, 0] == 2


def test_every_epoch_shows_every_sequence_once_in_another_order():
    data = sequences(11)
    data[:, 1] = np.arange(11) + 100
    batches = TrainingBatches(data, VOCABULARY, 2, 0.15, seed=3)
    assert batches.steps_per_epoch == 5
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(5 * epoch, 5 * epoch + 5):
            batch = batches.batch(step)
            rows = batch.input_ids.clone().scatter(1, batch.positions, batch.targets)
            seen += rows[:, 1].tolist()
        assert len(set(seen)) == 10
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_a_step_depends_on_seed_and_step_alone():
    data = sequences(20)
    one = TrainingBatches(data, VOCABULARY, 4, 0.15, seed=1)
    for step in range(9):
        one.batch(step)
    fresh = TrainingBatches(data, VOCABULARY, 4, 0.15, seed=1)
    for step in (8, 2, 6):
        assert all(map(torch.equal, one.batch(step), fresh.batch(step)))
    other = TrainingBatches(data, VOCABULARY, 4, 0.15, seed=2)
    assert not torch.equal(other.batch(0).input_ids, fresh.batch(0).input_ids)
    # The same sequence is masked otherwise in the next epoch.
    assert not torch.equal(fresh.batch(0).positions, fresh.batch(5).positions)


def test_processes_share_the_batch_of_one():
    data = sequences(20)
    whole = TrainingBatches(data, VOCABULARY, 6, 0.15, seed=1).batch(1)
    parts = [TrainingBatches(data, VOCABULARY, 6, 0.15, seed=1, rank=r, world_size=3).batch(1) for r in range(3)]
    for field, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(field, torch.cat(of_parts))


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (4, 3), (100, 2)])
def test_evaluation_masks_never_change(batch_size, world_size):
    data = sequences(25)
    expected = list(evaluation_batches(data, VOCABULARY, 25, 0.15))[0]
    ranks = [list(evaluation_batches(data, VOCABULARY, batch_size, 0.15, r, world_size)) for r in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1, "every rank makes as many passes"
    batches = [batch for rank in ranks for batch in rank if (batch.targets >= 0).any()]
    got = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    assert all(map(torch.equal, expected, got))
    few = [
        torch.cat(parts) for parts in zip(*evaluation_batches(data, VOCABULARY, 4, 0.15, max_sequences=5), strict=True)
    ]
    assert all(torch.equal(part, whole[::5]) for part, whole in zip(few, expected, strict=True))


def test_blocks_are_cut_into_sequences(prepared):
    blocks = Blocks(prepared("bert"), "bert")
    whole, halves = blocks.sequences("train", 64), blocks.sequences("train", 32)
    assert np.array_equal(halves.reshape(-1, 64), whole)
    assert (whole[:, 0] == blocks.vocabulary.start).all() and (whole[:, -1] == blocks.vocabulary.end).all()
    with pytest.raises(ValueError, match="seq_len is 48; .* blocks of 64 tokens; --block_length 48 of"):
        blocks.sequences("train", 48)


def refusal(folder) -> str:
    with pytest.raises(ValueError) as error:
        Blocks(folder, "bert", "hour")
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message.replace(f"run: python data/bookcorpus/prepare.py --model bert --scale hour --out {folder}", "ADVICE")


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy of the prepared folder, and a function that changes its meta.json."""
    folder = tmp_path / "data"
    shutil.copytree(prepared("bert"), folder)

    def change(**fields) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | fields))

    return folder, change


def test_other_tokens_of_the_same_length_are_noticed(damaged):
    folder, _ = damaged
    for name in ("train.bin", "tokenizer.json"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        assert f"{name}, {len(content):,} bytes, has not the SHA-256 of meta.json; ADVICE --force" in refusal(folder)
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    Blocks(folder, "bert")
    (folder / "valid.bin").write_bytes(b"short")
    assert "valid.bin, 5 bytes, has not the SHA-256" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "valid.bin").unlink()
    assert "valid.bin is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("dtype", "object", "dtype is 'object', not one of uint16, int32"),
        ("dtype", "O", "dtype is 'O'"),
        ("block_length", 0, "block_length is 0"),
        ("block_length", "64", "block_length is '64'"),
        ("block_length", True, "block_length is 'True'"),
        ("vocab_size", -1, "vocab_size is -1"),
        ("special_ids", {"pad": 0}, "missing 4 required positional arguments"),
        (
            "special_ids",
            {"pad": 0, "mask": 1, "start": 2, "end": 3, "unknown": 10**9},
            "the id of unknown is 1000000000",
        ),
        ("special_ids", {"pad": 0, "mask": 1.5, "start": 2, "end": 3, "unknown": 4}, "the id of mask is 1.5"),
        ("origin", None, "origin is 'None'"),
        ("tokenizer", {}, "it has no 'sha256'"),
        ("splits", 7, "not iterable"),
    ],
)
def test_a_record_with_absurd_content_is_named(damaged, field, value, reason):
    folder, change = damaged
    change(**{field: value})
    message = refusal(folder)
    assert "meta.json is damaged (" in message and reason in message and message.endswith("; ADVICE --force")


def test_a_split_that_is_not_recorded_is_named(damaged):
    folder, change = damaged
    splits = json.loads((folder / "meta.json").read_text())["splits"]
    change(splits={name: splits[name] for name in ("train", "valid")})
    assert f"{folder} has no test; it has train, valid" in refusal(folder)
    change(splits=splits | {"valid": splits["valid"] | {"file": 300 * "x"}})
    assert "xxx is missing; ADVICE --force" in refusal(folder)
    change(splits=splits | {"valid": splits["valid"] | {"file": "\x1b[2J\n"}})
    assert r"file is '\x1b[2J\n', not a name" in refusal(folder)
