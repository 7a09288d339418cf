"""SST-2, the Stanford Sentiment Treebank as GLUE has it: sentences and phrases of film reviews, 0 negative, 1 positive.

    python data/sst2/prepare.py [--source FILE|FOLDER] [--out DIR] [--force] [--verify]

Writes train.jsonl (67 349 examples) and valid.jsonl (872, GLUE's dev) and meta.json (examples, SHA-256, where it came
from). A line is {"text": "...", "label": 0}, the text as GLUE has it: lower case, in tokens, with a blank at its end.
GLUE keeps the labels of its test split to itself, so there is none. Does nothing when the files are already there.

Socher et al. 2013, "Recursive Deep Models for Semantic Compositionality Over a Sentiment Treebank"; Wang et al. 2019,
"GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding".
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.dataset import DataSet
from data.errors import SourceError, printable
from data.fetch import Folder, Url
from data.unpack import read_file, read_zip_member, text_of

TABLES = {"train": "train.tsv", "valid": "dev.tsv"}  # GLUE's names
EXAMPLES = {"train": 67_349, "valid": 872}
HEADER = "sentence\tlabel"
_MAX_BYTES = 20_000_000
_MIRROR = "https://raw.githubusercontent.com/eyalbd2/Reproducing-AutoPrompt/6288fb5bec9c572f2492875ae0111df5b6daed11"


def convert(path: Path, folder: Path, examples: Mapping[str, int] = EXAMPLES) -> dict[str, dict[str, int]]:
    """Write the tables at `path`, GLUE's .zip or a folder, to SPLIT.jsonl in `folder`; return each one's examples.

    Raises SourceError for a table that is missing, is not as GLUE has it, or does not have as many `examples`.
    """
    for split, table in TABLES.items():
        count = 0
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for text, label in read_table(path, table):
                file.write(json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n")
                count += 1
        if count != examples[split]:
            raise SourceError(f"{table} has {count} examples, expected {examples[split]}")
    return {split: {"examples": count} for split, count in examples.items()}


def read_table(path: Path, table: str) -> Iterator[tuple[str, int]]:
    """Text and label of each example in the file `table` of the folder or .zip at `path`. Raises SourceError."""
    pieces = read_file(path / table, _MAX_BYTES) if path.is_dir() else read_zip_member(path, table, _MAX_BYTES)
    lines = text_of(pieces, table).removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")  # of a copy with the line ends of Windows
        text, tab, label = line.rpartition("\t")
        if number == 1:
            if line != HEADER:
                raise SourceError(f"{table}, line 1: the header is {_shown(line)}, expected {HEADER!r}")
        elif not tab or "\t" in text:
            raise SourceError(f"{table}, line {number}: {_shown(line)}, expected a sentence, one tab and a label")
        elif label not in ("0", "1"):
            raise SourceError(f"{table}, line {number}: the label is {_shown(label)}, expected '0' or '1'")
        else:
            yield text, int(label)


def _shown(text: str) -> str:
    return printable(repr(text), 60)


SST2 = DataSet(
    name="sst2",
    folder=Path(__file__).resolve().parent,
    files={split: f"{split}.jsonl" for split in TABLES},
    sha256="fbe5c62ac2e41d91559b42f380e5cce32df3b2f106d39cde67b0e4f970bcc758",
    sources=(
        Url("https://dl.fbaipublicfiles.com/glue/data/SST-2.zip", _MAX_BYTES),
        Folder(
            {
                "train.tsv": Url(f"{_MIRROR}/glue_data/SST-2/train_full.tsv", _MAX_BYTES),
                "dev.tsv": Url(f"{_MIRROR}/glue_data/SST-2/dev.tsv", _MAX_BYTES),
            }
        ),
    ),
    read=convert,
    local="GLUE's SST-2.zip or a folder with its train.tsv and dev.tsv",
)

if __name__ == "__main__":
    sys.exit(SST2.main())
