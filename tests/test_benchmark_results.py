"""The tables of benchmarks/RESULTS.md are those of the records in results/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = (ROOT / "benchmarks/RESULTS.md").read_text()


def rows(header: str) -> list[list[str]]:
    """The cells of every row of the table whose first line starts with ``header``, without bold marks."""
    lines = RESULTS[RESULTS.index(f"\n| {header}") :].split("\n\n")[0].strip().splitlines()[2:]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def record(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def ratios(name: str) -> dict[tuple[str, str], dict[str, float]]:
    return {(r["shape"], r["dtype"]): r["ratio_to_dense"] for r in record(name)["records"]}


def best_peer(ratio: dict[str, float], k: str) -> tuple[float, str]:
    """The fastest peer's time over ours, and its name."""
    peers = [name for name in ratio if name.endswith(f" k={k}") and name.split(" k=")[0] not in ("smoe", "products")]
    best = min(peers, key=ratio.get)
    return ratio[best] / ratio[f"smoe k={k}"], best.split(" k=")[0]


def test_layer():
    records = {(r["shape"], r["dtype"]): r for r in record("bench_layer")["records"]}
    table = rows("shape | dtype | k | ours / dense")
    assert len(table) == 4 * len(records) == 32
    for shape, dtype, k, *cells in table:
        measured = records[shape, dtype]
        ratio, memory = measured["ratio_to_dense"], measured["peak_bytes"]
        ours = ratio[f"smoe k={k}"]
        dense = min(value for name, value in ratio.items() if name.startswith("dense"))
        target = 0.9 if k == "16" else int(k) / 16 + 0.04
        flops = measured["flops_over_dense"][f"smoe k={k}"]
        numbers = (ours, target, flops, ratio[f"products k={k}"], ours / dense, memory[f"smoe k={k}"] / memory["dense"])
        peer, name = best_peer(ratio, k)
        assert cells == [*(f"{number:.2f}" for number in numbers), f"{peer:.1f} x {name}"], (shape, dtype, k)
        assert (f"| {k} | **" in line_of(shape, dtype, k)) == (ours > target), (shape, dtype, k)


def line_of(shape: str, dtype: str, k: str) -> str:
    return re.search(rf"^\| {shape} \| {dtype} \| {k} \|.*$", RESULTS, flags=re.M)[0]


def test_layer_without_peers():
    measured = ratios("bench_layer_alone")
    for shape, *cells in rows("shape | k = 4 |"):
        ratio = measured[shape, "bf16"]
        ours, products = ([f"{ratio[f'{name} k={k}']:.2f}" for k in (4, 8, 12, 16)] for name in ("smoe", "products"))
        assert cells == [*ours, ", ".join(products)], shape


def test_layer_with_dropout():
    measured = {(r["shape"], r["dtype"]): r for r in record("bench_layer_dropout")["records"]}
    table = rows("shape | dtype | k = 8 | k = 16 |")
    assert len(table) == len(measured)
    for shape, dtype, *cells in table:
        found = measured[shape, dtype]
        assert found["dropout"] == 0.1
        assert cells == [f"{found['ratio_to_dense'][f'smoe k={k}']:.2f}" for k in (8, 16)]


def test_layer_forward_alone():
    measured = ratios("bench_layer_inference")
    table = rows("shape | k = 1 |")
    assert len(table) == len(measured) == 8
    for name, *cells in table:
        ratio, ks = measured[tuple(name.split(", "))], ("1", "2", "4", "8", "16")
        peers = [best_peer(ratio, k)[0] for k in ks]
        assert cells == [*(f"{ratio[f'smoe k={k}']:.2f}" for k in ks), f"{min(peers):.1f} to {max(peers):.1f}"], name


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("model | dtype | variant", ["bench_step_transformer_xl_paper", "bench_step"]),
        ("dtype | variant", ["bench_step_transformer_xl"]),
    ],
)
def test_training_step(header, names):
    measured = [row for name in names for row in record(name)["rows"]]
    columns = ["time_over_dense", "flops_over_dense"] + ["time_over_reference"] * (len(names) == 1)
    table = rows(header)
    assert len(table) == len(measured)
    for cells, row in zip(table, measured, strict=True):
        expected = [row["model"]] * (len(names) > 1)
        expected += [row["precision"], row["variant"], f"{row['median_s'] * 1e3:,.0f}"]
        expected += ["-" if row[column] is None else f"{row[column]:.2f}" for column in columns]
        assert cells == expected
