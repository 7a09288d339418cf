"""BookCorpus (or books of your own) as blocks of tokens for masked language models.

    python data/bookcorpus/prepare.py --model bert|roberta [--scale paper|hour|cpu|smoke|auto]
                                      [--source FILE|FOLDER ...] [--tokenizer FOLDER|FILES]
                                      [--vocab_size N] [--block_length N] [--out DIR] [--force]

Writes train.bin, valid.bin and test.bin, tokenizer.json and meta.json to --out, and prints that folder. A block is
[CLS] 510 tokens [SEP], or <s> ... </s>; documents run on within a split, with one more [SEP] or </s> between them.
Blocks are as long as the scale's sequences in bert/configs/masked_lm.yaml, so that every training sequence starts with
[CLS] and ends with [SEP]. For another --seq_len give the same number here as --block_length: longer blocks are cut into
equal sequences, and then only the first of each block starts with [CLS].

Of a folder given with --source, every .txt, .xz and .gz file is a document, in subfolders too; hidden files and those
about the text (README, LICENSE, SOURCE and the like) are left out and named. Without --source the text is BookCorpus
from the hub or, where the hub can't be reached, prose stripped out of enwik8; meta.json says which.

Whole documents are held out, duplicates are used once, and the vocabulary is learned from train alone. Does nothing
when the same is already there.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.bookcorpus.corpus import Corpus, Store, from_enwik8, from_files, from_hub, hold_out, listed, text_files
from data.bookcorpus.tokenizer import read_tokenizer, special_ids, train_tokenizer
from data.enwik8.prepare import ENWIK8
from data.errors import DownloadError, SourceError, run
from data.folder import RECORD, move_in, read_pieces, scratch, sha256_of

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SPLITS = ("train", "valid", "test")
BATCH_LENGTH = 1_000_000  # characters tokenised at a time
SMALL_VOCABULARY = {"bert": 1024, "roberta": 1024}
# By scale: entries of the vocabulary, bytes of text (None: all there is), and tokens of a block: the scale's seq_len.
SCALES = {
    "paper": {"vocab_size": {"bert": 30522, "roberta": 50265}, "max_bytes": None, "block_length": 512},
    "hour": {"vocab_size": SMALL_VOCABULARY, "max_bytes": 16_000_000, "block_length": 32},
    "cpu": {"vocab_size": SMALL_VOCABULARY, "max_bytes": 16_000_000, "block_length": 32},
    "smoke": {"vocab_size": SMALL_VOCABULARY, "max_bytes": 500_000, "block_length": 32},
}


def is_prepared(out: Path, request: dict[str, Any]) -> bool:
    """Whether `out` holds just what `request` asks for, by its record and the files' sizes."""
    try:
        meta = json.loads((out / RECORD).read_text())
        sizes = {part["file"]: part["bytes"] for part in meta["splits"].values()}
        return (
            meta["request"] == request
            and (out / "tokenizer.json").is_file()
            and all((out / file).stat().st_size == size for file, size in sizes.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def prepare(out: Path, corpus: Corpus, request: dict[str, Any], tokenizer_paths: Sequence[Path] = ()) -> dict[str, Any]:
    """Split, learn or read the vocabulary, tokenise and write everything to `out`; return the record (meta.json).

    Whatever stops it, `out` then holds the old files or the new ones, and meta.json only if all of them are whole.
    Raises ValueError for a corpus or a vocabulary that won't do, OSError when `out` can't be written.
    """
    model, block_length = request["model"], request["block_length"]
    given = read_tokenizer(model, tokenizer_paths) if tokenizer_paths else None
    with scratch(out) as partial:
        store = Store(partial / "text")
        store.fill(corpus.documents(), request["max_bytes"])
        parts = hold_out([size for _, size in store.spans], store.digests, corpus.whole)
        megabytes = sum(size for _, size in store.spans) / 1e6
        print(f"bookcorpus: {len(store.spans)} documents, {megabytes:.1f} MB, to be tokenised", file=sys.stderr)
        tokenizer = given or train_tokenizer(
            model, lambda: (line for lines in store.lines(parts["train"]) for line in lines), request["vocab_size"]
        )
        tokenizer.save(str(partial / "tokenizer.json"))
        ids = special_ids(tokenizer, model)
        dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "int32"
        splits = {}
        for split in SPLITS:
            path = partial / f"{split}.bin"
            blocks = write_blocks(path, tokenizer, store.lines(parts[split]), block_length, ids, dtype)
            if not blocks:
                raise ValueError(f"source: the documents for {split} have fewer tokens than a block of {block_length}")
            splits[split] = {
                "file": path.name,
                "blocks": blocks,
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
                "documents": len(parts[split]),
                "text_bytes": sum(store.spans[i][1] for i in parts[split]),
                "text_sha256": _digest(store.digests[i] for i in parts[split]),
            }
        tokenizer_sha256 = sha256_of(partial / "tokenizer.json")
        meta = {
            "dataset": corpus.name,
            "note": corpus.note,
            "sha256": _digest([*(part["sha256"] for part in splits.values()), tokenizer_sha256]),
            "origin": corpus.origin,
            "duplicates_left_out": store.duplicates,
            "model": model,
            "block_length": block_length,
            "dtype": dtype,
            "vocab_size": tokenizer.get_vocab_size(),
            "special_ids": ids,
            "tokenizer": {
                "file": "tokenizer.json",
                "sha256": tokenizer_sha256,
                "origin": "given" if given else "trained on train",
            },
            "splits": splits,
            "request": request,
        }
        (partial / RECORD).write_text(json.dumps(meta, indent=2) + "\n")
        move_in(partial, out, [*(part["file"] for part in splits.values()), "tokenizer.json"])
    return meta


def write_blocks(
    path: Path, tokenizer: Any, documents: Iterable[list[str]], block_length: int, ids: dict[str, int], dtype: str
) -> int:
    """Tokenise `documents` (lists of paragraphs) into blocks (n, block_length) of `dtype` at `path`; return n.

    What does not fill the last block is left out.
    """
    import numpy as np

    room, waiting, blocks = block_length - 2, np.empty(0, dtype=dtype), 0
    with open(path, "wb") as file:
        for tokens in _encode(tokenizer, documents, ids["end"]):
            waiting = np.concatenate([waiting, np.asarray(tokens, dtype=dtype)])
            full = len(waiting) // room
            block = np.empty((full, block_length), dtype=dtype)
            block[:, 0], block[:, -1] = ids["start"], ids["end"]
            block[:, 1:-1] = waiting[: full * room].reshape(full, room)
            file.write(block.tobytes())
            waiting, blocks = waiting[full * room :], blocks + full
    return blocks


def _encode(tokenizer: Any, documents: Iterable[list[str]], end: int) -> Iterator[list[int]]:
    """Token ids of all documents in order, with `end` between them, in parts that bound what is in memory at a time."""
    for number, paragraphs in enumerate(documents):
        if number:
            yield [end]
        for batch in _batches(paragraphs):
            encodings = tokenizer.encode_batch(batch, add_special_tokens=False)
            yield [token for encoding in encodings for token in encoding.ids]


def _batches(paragraphs: list[str], max_length: int = BATCH_LENGTH) -> Iterator[list[str]]:
    """`paragraphs` in order, in lists of at most `max_length` characters, or of a single one."""
    batch: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if batch and length + len(paragraph) > max_length:
            yield batch
            batch, length = [], 0
        batch.append(paragraph)
        length += len(paragraph)
    yield batch


def default_corpus() -> Corpus:
    """BookCorpus from the hub, else prose out of enwik8, which is fetched if it isn't there yet."""
    try:
        return from_hub()
    except SourceError as error:
        why = str(error)
    print(f"bookcorpus: can't be loaded from the hub ({why}); using prose out of enwik8 instead", file=sys.stderr)
    if not ENWIK8.is_prepared(ENWIK8.folder):
        ENWIK8.prepare(ENWIK8.folder, ENWIK8.sources)

    def pieces() -> Iterator[bytes]:
        for file in ENWIK8.files.values():
            yield from read_pieces(ENWIK8.folder / file)

    return from_enwik8(pieces, ENWIK8.sha256, why)


def default_out(options: argparse.Namespace, scale: str) -> Path:
    """data/bookcorpus/MODEL-SCALE, and a hash of the options that change what is prepared, if any is given."""
    own = {
        name: [str(path.resolve()) for path in value] if isinstance(value, list) else value
        for name in ("source", "tokenizer", "vocab_size", "max_bytes", "block_length", "name")
        if (value := getattr(options, name)) not in (None, [])
    }
    suffix = f"-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:8]}" if own else ""
    out = HERE / f"{options.model}-{scale}{suffix}"
    return out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, see `data.errors.run`."""
    options = _parse(arguments)
    scale = _scale(options.scale)
    out = options.out or default_out(options, scale)
    status = run("bookcorpus", out, lambda: _prepare_as_asked(out, options, SCALES[scale]))
    if status == 0:
        print(out)
    return status


def _prepare_as_asked(out: Path, options: argparse.Namespace, size: dict[str, Any]) -> None:
    """Prepare what the options ask for, unless `out` holds it already; `size` is the scale's entry of SCALES."""
    files, left_out = text_files(options.source)
    corpus = from_files(files, options.name or "text") if options.source else None
    request = {
        "model": options.model,
        "source": corpus.origin if corpus else "hub, else enwik8",
        "name": options.name,
        "tokenizer": [sha256_of(file) for path in options.tokenizer for file in _files(path)] or None,
        "vocab_size": options.vocab_size or size["vocab_size"][options.model],
        "max_bytes": options.max_bytes or size["max_bytes"],
        "block_length": options.block_length or size["block_length"],
    }
    if options.tokenizer:
        request["vocab_size"] = None
    if not options.force and is_prepared(out, request):
        return
    try:
        corpus = corpus or default_corpus()
    except DownloadError as error:
        raise DownloadError(f"{error}; give text files with --source") from error
    if left_out:
        print(f"bookcorpus: {listed('left out: ', left_out)}; give the path of a file to use it", file=sys.stderr)
    print(f"bookcorpus: preparing {corpus.name} for {options.model} in {out}", file=sys.stderr)
    meta = prepare(out, corpus, request, options.tokenizer)
    blocks = ", ".join(f"{split} {part['blocks']}" for split, part in meta["splits"].items())
    print(f"bookcorpus: {meta['dataset']}, {meta['vocab_size']} tokens, blocks: {blocks}", file=sys.stderr)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prepare BookCorpus, or books of your own, for masked language models."
    )
    parser.add_argument("--model", choices=("bert", "roberta"), default="bert", help="whose tokens (default: bert)")
    parser.add_argument(
        "--scale", choices=(*SCALES, "auto"), default="auto", help="vocab_size, max_bytes, block_length"
    )
    parser.add_argument("--source", type=Path, nargs="+", default=[], help="text: files, or folders of .txt, .xz, .gz")
    parser.add_argument("--tokenizer", type=Path, nargs="+", default=[], help="a vocabulary: a folder or its files")
    parser.add_argument("--vocab_size", type=_positive, help="of a vocabulary learned from the text")
    parser.add_argument("--max_bytes", type=_positive, help="of text to use")
    parser.add_argument("--block_length", type=_positive, help="tokens of a block: the seq_len to train with")
    parser.add_argument("--name", help="what results call your own text (default: text)")
    parser.add_argument("--out", type=Path, help="default: a folder beside this file, named after model and scale")
    parser.add_argument("--force", action="store_true", help="prepare again even if it is all there")
    options = parser.parse_args(arguments)
    if options.block_length is not None and options.block_length < 8:
        parser.error(f"--block_length is {options.block_length}; it must be at least 8")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _scale(scale: str) -> str:
    if scale != "auto":
        return scale
    from smoe.train.auto import resolve_scale

    return resolve_scale(scale, ("paper", "cpu"))[0]


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ValueError(f"tokenizer: no such file: {path}")
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _digest(digests: Any) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
