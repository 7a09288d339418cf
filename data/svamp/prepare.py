"""SVAMP: word problems varied so that shallow patterns fail (Patel et al. 2021), in five folds and as a challenge.

    python data/svamp/prepare.py [--source FOLDER] [--out DIR] [--force] [--verify]

Folds 0 to 4 test on a fifth of SVAMP, and train on the rest of it with all of MAWPS and ASDiv-A. The fold `challenge`
trains on MAWPS and ASDiv-A alone and tests on all 1000 problems of SVAMP, as its authors do. Writes FOLD-train.jsonl,
FOLD-test.jsonl and meta.json; see data/math_word_problems.py. Does nothing when the files are already there.

Patel et al. 2021, "Are NLP Models really able to Solve Simple Math Word Problems?".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script of a checkout: `data` is not installed

from data.math_word_problems import word_problems

SVAMP = word_problems(
    "svamp",
    Path(__file__).resolve().parent,
    folds={
        **{str(fold): f"cv_svamp_augmented/fold{fold}" for fold in range(5)},
        "challenge": "mawps-asdiv-a_svamp",
    },
    sha256="c9159a37c35cceabdd65013d67d7db160d5dffd53d86ce769f1cfadfc7172f36",
)

if __name__ == "__main__":
    sys.exit(SVAMP.main())
