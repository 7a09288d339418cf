"""The paper's findings on made-up runs in which they hold, and on ones in which they don't."""

from __future__ import annotations

import copy

import pytest
from made_up import every_panel, made_up

from smoe.methods import METHODS
from smoe.report.checks import Status, check_words, compare
from smoe.report.claims import CLAIMS, findings_of
from smoe.report.runs import contexts_of, read_run

BPC = {"key": "bpc", "direction": "lower"}


def findings(records: list[dict]) -> dict[str, list]:
    """The findings by claim."""
    found = findings_of(contexts_of(read_run(record, "record") for record in records))
    return {key: [finding for finding in found if finding.key == key] for key in CLAIMS}


def one(records: list[dict], key: str):
    (finding,) = findings(records)[key]
    return finding


def worsen(records: list[dict], by: float, key: str | None = None, **config) -> list[dict]:
    """The records, those with this method and configuration worse by so much, at one k or at all."""
    changed = copy.deepcopy(records)
    hit = [r for r in changed if all(r["config"].get(name) == value for name, value in config.items())]
    assert hit
    for record in hit:
        test = record["metrics"]["bpc"]["test"]
        for k in test:
            test[k] += by if key in (None, k) else 0
    return changed


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return every_panel()


def test_all_claims_hold_where_the_numbers_say_so(records):
    for key, found in findings(records).items():
        assert [finding.words for finding in found] == ["held"], key
        assert found[0].scale == "cpu" and found[0].context == "transformer_xl on enwik8, scale cpu"
        assert all(check.difference.seeds == (1, 2, 3) for check in found[0].checks)


def test_numbers_of_a_check_are_means_over_the_seeds(records):
    check = one(records, "beats_baselines").checks[0]
    at = {}
    for method, k in (("smoe_dropout", "16"), ("dense_dropout", "dense")):
        (runs,) = [
            [r for r in records if r["method"] == method and r["config"] == made_up(method, r["seed"])["config"]]
        ]
        at[method] = sum(r["metrics"]["bpc"]["test"][k] for r in runs) / 3
    assert check.worse == METHODS["dense_dropout"].title
    assert check.at == pytest.approx((at["smoe_dropout"], at["dense_dropout"]))
    assert check.difference.mean == pytest.approx(at["dense_dropout"] - at["smoe_dropout"])


@pytest.mark.parametrize(
    "key, change",
    [
        ("beats_baselines", {"by": -1, "method": "thor"}),
        ("improves_with_k", {"by": 0.5, "key": "12", "method": "smoe_dropout"}),
        ("learned_deteriorates", {"by": -1, "key": "16", "method": "smoe"}),
        ("growing_matters", {"by": -1, "schedule": "constant"}),
        ("later_layers", {"by": -1, "layers": "early"}),
        ("random_routing", {"by": -1, "key": "2", "router": "hash"}),
        ("depth", {"by": -1, "method": "smoe", "num_layers": 8}),
        ("width", {"by": -1, "method": "smoe", "num_experts": 8}),
        ("no_overfitting", {"by": 1, "method": "dense_dropout", "num_layers": 12}),
        ("learned_overfits", {"by": -1, "method": "smoe", "num_layers": 12}),
    ],
)
def test_a_claim_does_not_hold_where_the_numbers_say_otherwise(records, key, change):
    assert one(worsen(records, **change), key).status is Status.NOT_HELD


def test_one_or_two_seeds_never_hold(records):
    for seeds, words in (((1,), "one seed"), ((1, 2), "two seeds")):
        some = [record for record in records if record["seed"] in seeds]
        for key in CLAIMS:
            finding = one(some, key)
            count = len(finding.checks)
            assert finding.words == f"{words}, no interval (as claimed in {count} of {count})", key


def test_what_was_not_run_is_said(records):
    table1 = [made_up(method) for method in METHODS]
    found = findings(table1)
    assert [f.words for f in found["depth"]] == ["not run"] and found["depth"][0].checks == []
    without = [record for record in records if record["method"] != "thor"]
    finding = one(without, "beats_baselines")
    assert finding.words == "not run in full"
    assert [c.worse for c in finding.checks if c.status is Status.NOT_RUN] == ["THOR"]
    assert one([], "beats_baselines").words == "not run"


def test_a_size_of_the_paper_that_was_not_run_is_missed(records):
    shallow = [record for record in records if record["config"]["num_layers"] < 12]
    found = findings(shallow)
    assert [f.words for f in found["learned_overfits"]] == ["not run"]  # the paper says it of 12 layers
    for key, missing in (("depth", ["lead with 12 layers"]), ("no_overfitting", ["Dense w. Dropout, 12 layers",
                                                                              "SMoE-Dropout, 12 layers"])):  # fmt: skip
        assert [f.words for f in found[key]] == ["not run in full"]
        assert [c.better for c in found[key][0].checks if c.status is Status.NOT_RUN] == missing
    narrow = [r for r in records if (r["method"], r["config"]["num_experts"]) != ("smoe", 2)]
    assert one(narrow, "width").words == "not run in full"


def test_a_tie_is_neither_for_nor_against_a_claim():
    one_seed = compare("a", {1: 2.0}, "b", {1: 2.0}, BPC)
    assert check_words(one_seed) == "one seed, no interval: a tie"


def test_differences_in_noise_and_differences_shown_to_be_none():
    zero = {seed: 2.0 for seed in (1, 2, 3)}
    noisy = {1: 2.2, 2: 1.9, 3: 2.0}
    same = {1: 2.001, 2: 1.999, 3: 2.002}
    assert compare("a", zero, "b", noisy, BPC).status is Status.WITHIN_NOISE
    assert compare("a", zero, "b", same, BPC).status is Status.NO_DIFFERENCE
    higher = {seed: value + 0.5 for seed, value in same.items()}
    assert compare("a", zero, "b", higher, BPC).status is Status.HELD
    assert compare("a", zero, "b", higher, {**BPC, "direction": "higher"}).status is Status.NOT_HELD
    assert compare("a", zero, "b", {7: 2.0}, BPC).status is Status.NOT_RUN  # no seed in common


def test_smoe_and_thor_are_compared_at_n_by_the_checkpoint_chosen_there(records):
    changed = copy.deepcopy(records)
    for record in changed:
        if record["method"] == "smoe":
            values = {k: value - 1 for k, value in record["metrics"]["bpc"]["test"].items()}
            other = {"bpc": {**record["metrics"]["bpc"], "test": values}}
            record["best"]["k"] = 2
            full = record["config"]["num_experts"]
            record["best_at_other_k"] = [{"step": 2000, "metric": "bpc", "value": 1.0, "k": full, "metrics": other}]
    finding = one(changed, "beats_baselines")
    assert [check.worse for check in finding.checks if check.status is Status.NOT_HELD] == ["SMoE"]
    # That it deteriorates is said of one checkpoint.
    assert one(changed, "learned_deteriorates").words == "held"


def test_variants_of_a_method_are_judged_apart_and_other_conditions_never_mixed():
    records = every_panel()
    scaled = [made_up("smoe_dropout", seed, output_scale="num_experts") for seed in (1, 2, 3)]
    longer = [made_up(method, seed, steps=9000) for seed in (1, 2, 3) for method in ("smoe_dropout", "smoe")]
    found = findings([*records, *worsen(scaled, 1.0), *longer])["beats_baselines"]
    title = "transformer_xl on enwik8, scale cpu"
    assert [(finding.subject, finding.context, finding.words) for finding in found] == [
        ("SMoE-Dropout", f"{title}, steps 3000", "held"),
        ("SMoE-Dropout, output_scale num_experts", f"{title}, steps 3000", "not held"),
        ("SMoE-Dropout", f"{title}, steps 9000", "not run in full"),
    ]


def test_trained_at_fewer_than_n_a_constant_k_is_also_compared_with_n():
    runs = [made_up("smoe_dropout", seed) for seed in (1, 2, 3)]
    fixed = [made_up("smoe_dropout", seed, schedule="constant", k_min=8, k_max=8) for seed in (1, 2, 3)]
    finding = one([*runs, *fixed], "growing_matters")
    last = finding.checks[-1]
    assert (last.better, last.worse) == ("k = 8 throughout, at k = 8", "k = 8 throughout, at k = 16")
    assert last.status is Status.NOT_HELD  # more experts are better in these numbers
    assert len(finding.checks) == 2
