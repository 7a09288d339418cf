"""Prepared data sets of examples, as the scripts of data/ leave them: JSON lines for each split, and meta.json."""

import hashlib
import json
from pathlib import Path

SIZES = {"train": 40_000, "valid": 6_000, "test": 6_000}  # bytes
WORDS = {0: ["awful", "dull", "a bore"], 1: ["great", "moving", "a joy"]}


def write_examples(folder: Path, name: str, splits: dict[str, list[dict]]) -> Path:
    folder.mkdir(exist_ok=True)
    meta = {"dataset": name, "sha256": "0" * 64, "splits": {}}
    for split, rows in splits.items():
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / f"{split}.jsonl").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        meta["splits"][split] = {"file": f"{split}.jsonl", "examples": len(rows), "sha256": digest}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def write_words(folder: Path) -> Path:
    """52 kB in the format of data/enwik8: words drawn at random."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, size=rng.integers(2, 8), dtype=np.uint8)) for _ in range(50)]
    text = b" ".join(words[i] for i in rng.integers(0, 50, size=20_000))[: sum(SIZES.values())]
    folder.mkdir(exist_ok=True)
    meta = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "splits": {}}
    position = 0
    for name, size in SIZES.items():
        part = text[position : position + size]
        (folder / f"{name}.bin").write_bytes(part)
        meta["splits"][name] = {"file": f"{name}.bin", "bytes": size, "sha256": hashlib.sha256(part).hexdigest()}
        position += size
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def write_sentences(folder: Path, counts: dict[str, int]) -> Path:
    """As many sentences for each split; a single word gives the class of a sentence away."""
    splits = {
        split: [{"text": f"film {i % 7} is {'so ' * (i % 3)}{WORDS[i % 2][i % 3]} .", "label": i % 2} for i in range(n)]
        for split, n in counts.items()
    }
    return write_examples(folder, "sst2", splits)


def record_sha256(folder: Path, split: str) -> None:
    """Makes meta.json say what the changed file of a split holds now."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"][split]["sha256"] = hashlib.sha256((folder / f"{split}.jsonl").read_bytes()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
