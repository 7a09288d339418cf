"""Made-up records of fine-tuned runs, with what each example is answered; and the tables of a report of them."""

from __future__ import annotations

import gzip
import json
import random

from made_up import fine_tuned

from smoe.paper import paper_results
from smoe.report.collect import collect
from smoe.report.document import document
from smoe.report.runs import contexts_of
from smoe.report.statistics import mcnemar
from smoe.report.transfer import FOLDS, columns_of
from smoe.report.transfer_claims import transfer_findings

COLUMNS = [(model, dataset) for model, tasks in paper_results()["table2"].items() for dataset in tasks]
TASK = {"sst2": ("classification", "accuracy"), "csqa": ("multiple_choice", "accuracy")}
PAPER, ALL = {"epochs": 3, "batch_size": 64}, {"patience": 4}
# Row of Table 2 -> method, kept experts, by how much more it is right than dense training.
KINDS = {
    "dense_dropout": ("dense_dropout", None, 0.0),
    "thor_k_N": ("thor", None, -0.10),
    "smoe_k_N": ("smoe", None, -0.05),
    "smoe_dropout_k_half": ("smoe_dropout", 8, -0.02),
    "smoe_dropout_k_N": ("smoe_dropout", None, 0.15),
}


def answers(share: float, n: int, seed: object) -> list[bool]:
    """Right in the examples whose own number is below ``share``, but for a few: runs agree on most examples."""
    own, noise = random.Random(n), random.Random(repr((share, n, seed)))
    return [own.random() + 0.1 * noise.random() < share for _ in range(n)]


def run(method: str, share: float, n: int, seed: int = 1, *, keep: int | None = None, growing=False, **fields) -> dict:
    """A record and, under ``said``, what its predictions are."""
    key = "dense" if method.startswith("dense") else str(keep or fields.get("num_experts", 16))
    said = {key: answers(share, n, (method, seed, keep, fields.get("teacher"), growing))}
    record = fine_tuned(method, seed, right=said, keep=keep, **fields) | {"said": said}
    if growing:
        record["pretrained"]["k_schedule"] = [8, 16, "linear"]
    return record


def table2(setting: dict, columns=COLUMNS, seeds=(1,), n=150) -> list[dict]:
    records = []
    for model, dataset in columns:
        task, metric = TASK.get(dataset, ("math_word_problems", "solving_rate"))
        pooled = task == "math_word_problems" and setting is ALL
        folds = [str(fold) for fold in range(FOLDS)] if pooled else [None] if dataset in TASK else ["4"]
        for seed in seeds:
            for method, keep, more in KINDS.values():
                shared = {"model": model, "dataset": dataset, "task": task, "metric": metric, "keep": keep, **setting}
                records += [
                    run(method, 0.5 + more, n + i, seed, **shared, **({} if fold is None else {"fold": fold}))
                    for i, fold in enumerate(folds)
                ]
    return records


def of_sst2() -> list[dict]:
    """Tables 3, A4 and A5."""
    records = table2(PAPER, columns=COLUMNS[:1], seeds=(1, 2, 3), n=400)
    for keep in (1, 2, 4, 8, None):
        more = 0.02 * [1, 2, 4, 8, None].index(keep)
        records += [run("smoe", 0.4 + more, 400, keep=keep, growing=True, **PAPER)]
        if keep is not None:
            records += [run("smoe", 0.45, 400, keep=keep, **PAPER)]
        if keep not in (None, 8):
            records += [run("smoe_dropout", 0.4 + more, 400, keep=keep, **PAPER)]
    teachers = {"dense_dropout": 0.5, "thor": 0.4, "smoe": 0.45, "smoe_dropout": 0.7}
    return records + [run("dense_dropout", s, 400, teacher=t, d_hidden=64) for t, s in teachers.items()]


def write(folder, records: list[dict]) -> None:
    """As --collect leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        said = record.get("said")
        content = {name: value for name, value in record.items() if name != "said"}
        (folder / f"{number}.json").write_text(json.dumps(content))
        if said is not None:
            rows = zip(*said.values(), strict=True)
            lines = [json.dumps({"id": str(i)} | {k: ["x", int(r)] for k, r in zip(said, row, strict=True)})
                     for i, row in enumerate(rows)]  # fmt: skip
            packed = gzip.compress("\n".join(lines).encode(), mtime=0)
            (folder / f"{number}.predictions.jsonl.gz").write_bytes(packed)


def report_of(folder, records: list[dict]) -> str:
    """REPORT.md without its plots."""
    write(folder, records)
    runs, problems = collect(folder)
    assert problems == []
    columns, encoders = columns_of(runs), columns_of(runs, encoders=True)
    return document(contexts_of(runs), transfer_findings(columns), [], problems, [], "Figs", columns, encoders)


def shown_p(a: list[bool], b: list[bool]) -> str:
    """McNemar's p as tables have it."""
    p = mcnemar(a, b)
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def rows_of(report: str, section: str, heading: str) -> list[dict[str, str]]:
    """The table under a heading within a section, by the names in its head."""
    part = report.split(f"## {section}\n", 1)[1].split(f"### {heading}", 1)[1]
    lines = [line for line in part.split("\n### ")[0].split("\n## ")[0].splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    names = [f"{name} of the difference" if name in head[:i] else name for i, name in enumerate(head)]
    return [dict(zip(names, line, strict=True)) for line in body]
