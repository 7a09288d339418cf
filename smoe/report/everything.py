"""The whole report, from a folder of records: REPORT.md, report.html and the plots."""

from __future__ import annotations

import os
from pathlib import Path

from smoe.files import write_atomic
from smoe.report.claims import findings_of
from smoe.report.collect import collect
from smoe.report.costs import read_encoder_times, read_step_times
from smoe.report.document import document
from smoe.report.kept import kept_plots
from smoe.report.page import page
from smoe.report.plots import draw, plots_of
from smoe.report.runs import contexts_of
from smoe.report.transfer import columns_of
from smoe.report.transfer_claims import transfer_findings


def write_report(results: str | Path, figures: str | Path) -> tuple[list[Path], list[str]]:
    """Writes ``REPORT.md`` and ``report.html`` into the folder ``results``, the plots into the folder ``figures``.

    Returns the files written and, one line each, the records that were left out and why. ValueError when a folder does
    not exist, or there is no record of a run.
    """
    results, figures = Path(results), Path(figures)
    if not figures.is_dir():
        raise ValueError(f"figures: {figures} does not exist; it must be a folder for the plots")
    runs, problems = collect(results)
    if not runs:
        first = f"; the first: {problems[0]}" if problems else ""
        raise ValueError(f"results: {results} has no record of a run that can be reported{first}")
    step_times, wrong = read_step_times(results)
    encoder_times, also_wrong = read_encoder_times(results)
    problems += wrong + also_wrong
    contexts = contexts_of(runs)
    columns, encoders = columns_of(runs), columns_of(runs, encoders=True)
    plots = plots_of(contexts) + kept_plots("figure4", columns) + kept_plots("encoder", encoders, sweep_all=True)
    findings = findings_of(contexts) + transfer_findings(columns)
    where = Path(os.path.relpath(figures, results)).as_posix()
    of_encoders = (encoders, encoder_times)
    texts = {
        results / "REPORT.md": document(contexts, findings, plots, problems, step_times, where, columns, *of_encoders),
        results / "report.html": page(contexts, step_times),
    }
    written = [file for plot in plots for file in draw(plot, figures)]
    for file, text in texts.items():
        write_atomic(file, text)
    return [*texts, *written], problems
