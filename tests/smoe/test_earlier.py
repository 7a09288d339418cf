"""What runs from before a field did."""

from smoe.earlier import EARLIER, with_earlier


def test_a_recorded_field_wins_and_only_known_ones_are_added():
    recorded = {"beta2": 0.9, "clip": 1.0}
    names = ["beta2", "group_by_length", "clip", "new"]
    assert with_earlier(recorded, names) == {"beta2": 0.9, "group_by_length": False, "clip": 1.0}
    assert with_earlier(recorded, []) == recorded and recorded == {"beta2": 0.9, "clip": 1.0}
    assert EARLIER["group_by_length"] is False
