"""Two runs compared on the same examples, from the predictions beside their records."""

import gzip
import json
import math
import random

import pytest
from commands import assert_main_refuses
from made_up import fine_tuned

from smoe.report import main
from smoe.report.predictions import compare_right, read_right


def write_run(folder, name, right, **fields):
    """A record with predictions beside it, as --collect leaves them; ``right``: by k, example by example."""
    record = fine_tuned("smoe_dropout", right=right) | fields
    (folder / f"{name}.json").write_text(json.dumps(record))
    rows = [
        {"id": str(i)} | {k: [str(i % 3), int(of_k[i])] for k, of_k in right.items()}
        for i in range(len(next(iter(right.values()))))
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / f"{name}.predictions.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    return folder / f"{name}.json"


@pytest.fixture(scope="module")
def right():
    rng = random.Random(3)
    a = {k: [rng.random() < share for _ in range(200)] for k, share in (("8", 0.5), ("16", 0.8))}
    return a, {k: [x if rng.random() < 0.8 else not x for x in of_k] for k, of_k in a.items()}


def test_two_runs_are_compared_example_by_example(right, tmp_path, capsys):
    a, b = (write_run(tmp_path, name, said) for name, said in zip("ab", right, strict=True))
    main(["--compare", str(a), str(b), "--json"])
    found = json.loads(capsys.readouterr().out)
    of_a, of_b = right[0]["16"], right[1]["16"]
    only_a = sum(x and not y for x, y in zip(of_a, of_b, strict=True))
    only_b = sum(y and not x for x, y in zip(of_a, of_b, strict=True))
    assert (found["n"], found["only_a"], found["only_b"]) == (200, only_a, only_b)
    assert found["a"]["right"] == sum(of_a) and found["b"]["share"] == sum(of_b) / 200 and found["b"]["k"] == "16"
    assert found["difference"] == pytest.approx((only_a - only_b) / 200)
    few, both = min(only_a, only_b), only_a + only_b
    tail = sum(math.comb(both, i) for i in range(few + 1)) / 2**both
    assert found["p"] == pytest.approx(min(1, 2 * tail))
    deviation = math.sqrt(both / 200 - found["difference"] ** 2) / math.sqrt(200)
    expected = [found["difference"] + sign * 1.96 * deviation for sign in (-1, 1)]
    assert [found["low"], found["high"]] == pytest.approx(expected, abs=0.01)
    main(["--compare", str(a), str(b), "--k", "8", "16"])
    text = capsys.readouterr().out
    assert f"k = 8): {sum(right[0]['8'])} of 200 right" in text and f"k = 16): {sum(of_b)} of 200 right" in text
    assert "McNemar's exact test: p < 0.0001" in text and text.count("\n") == 5


@pytest.mark.parametrize("differ, shown", [(13, "p = 0.0002"), (15, "p < 0.0001"), (40, "p < 0.0001")])
def test_a_tiny_p_is_no_zero(differ, shown, tmp_path, capsys):
    """2 / 2**13 is 0.0002, 2 / 2**15 is 0.00006, which four digits would round to 0.0001."""
    every, some = [True] * 100, [i >= differ for i in range(100)]
    a, b = (write_run(tmp_path, name, {"16": values}) for name, values in (("a", every), ("b", some)))
    main(["--compare", str(a), str(b)])
    assert f"McNemar's exact test: {shown}\n" in capsys.readouterr().out


def test_a_run_folder_has_them_too(right, tmp_path, capsys):
    a = write_run(tmp_path, "a", right[0])
    run = tmp_path / "run"
    run.mkdir()
    a.rename(run / "result.json")
    packed = tmp_path / "a.predictions.jsonl.gz"
    (run / "predictions.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    main(["--compare", str(run), str(run / "result.json")])
    assert "a - b: +0.00 points, paired bootstrap +0.00 to +0.00\nMcNemar's exact test: p = 1.0000" in (
        capsys.readouterr().out
    )
    assert read_right(packed) == read_right(run / "predictions.jsonl")


def test_what_can_not_be_compared_is_one_line(right, tmp_path, capsys):
    a, b = (str(write_run(tmp_path, name, right[0])) for name in "ab")
    fewer = {k: of_k[:-1] for k, of_k in right[0].items()}
    short, other = str(write_run(tmp_path, "c", fewer)), str(write_run(tmp_path, "d", right[0], fold="3"))
    bare, damaged = tmp_path / "bare.json", tmp_path / "e.predictions.jsonl.gz"
    bare.write_text((tmp_path / "a.json").read_text())
    write_run(tmp_path, "e", right[0])
    damaged.write_bytes(damaged.read_bytes()[:-9])
    for argv, words in (
        (["--compare", a, short], "the runs have 200 and 199 examples, 199 of them the same"),
        (["--compare", a, other], "of different examples: fold is None and 3"),
        (["--compare", a, str(bare)], "has no predictions beside it"),
        (["--compare", a, b, "--k", "4"], "k is 4; "),
        (["--compare", a, b, "--k", "4", "5", "6"], "--k is given 3 numbers"),
        (["--compare", a, str(tmp_path / "e.json")], "e.predictions.jsonl.gz is damaged"),
        (["--compare", a, b, "--plot", "x.png"], "--plot has no effect with --compare"),
        ([a, "--k", "4"], "--k has no effect without --compare"),
    ):
        assert_main_refuses(main, argv, words, capsys)
    with pytest.raises(ValueError, match="2 and 1 examples, 1 of them the same"):
        compare_right({"x": True, "y": False}, {"x": True})
