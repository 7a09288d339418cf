"""ASDiv-A: arithmetic word problems of primary school, in the five folds of Patel et al. 2021.

    python data/asdiv_a/prepare.py [--source FOLDER] [--out DIR] [--force] [--verify]

Writes 0-train.jsonl, 0-test.jsonl, ..., 4-test.jsonl (1217 problems, of which each is tested once) and meta.json; see
data/math_word_problems.py. The texts are CC BY-NC 4.0. Does nothing when the files are already there.

Miao et al. 2020, "A Diverse Corpus for Evaluating and Developing English Math Word Problem Solvers".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.math_word_problems import word_problems

ASDIV_A = word_problems(
    "asdiv_a",
    Path(__file__).resolve().parent,
    folds={str(fold): f"cv_asdiv-a/fold{fold}" for fold in range(5)},
    sha256="ee73e994794f49767a529268fb67d9df2a133dfcd2d1ecfc9380823316f27f3e",
)

if __name__ == "__main__":
    sys.exit(ASDIV_A.main())
