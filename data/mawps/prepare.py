"""MAWPS: arithmetic word problems, in the five folds of Patel et al. 2021.

    python data/mawps/prepare.py [--source FOLDER] [--out DIR] [--force] [--verify]

Writes 0-train.jsonl, 0-test.jsonl, ..., 4-test.jsonl (1920 problems, of which each is tested once) and meta.json; see
data/math_word_problems.py. Does nothing when the files are already there.

Koncel-Kedziorski et al. 2016, "MAWPS: A Math Word Problem Repository".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.math_word_problems import word_problems

MAWPS = word_problems(
    "mawps",
    Path(__file__).resolve().parent,
    folds={str(fold): f"cv_mawps/fold{fold}" for fold in range(5)},
    sha256="b831052a8213dc95223480f1f73a32111f93df5deb2990bfa525a31a2140d8d8",
)

if __name__ == "__main__":
    sys.exit(MAWPS.main())
