"""Which layers ``chosen_layers`` selects."""

import pytest

from smoe.modulize.layers import LAYERS, chosen_layers


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("early", 4, [0, 1]),  # the paper's options for 4 layers, Figure 5 (e)
        ("middle", 4, [1, 2]),
        ("later", 4, [2, 3]),
        ("every-2", 4, [1, 3]),
        ("later", 12, list(range(6, 12))),
        ("middle", 12, list(range(3, 9))),
        ([3, 0], 4, [0, 3]),
        ("later", 1, [0]),
    ],
)
def test_choice_of_layers(layers, count, expected):
    assert chosen_layers(layers, count) == expected


def test_every_name_selects_something():
    assert all(chosen_layers(name, 2) for name in LAYERS)


@pytest.mark.parametrize("layers", ["last", [4], [-1], [0, 0], [], [True], [1.0]])
def test_wrong_choice_names_the_field(layers):
    with pytest.raises(ValueError, match="^layers is "):
        chosen_layers(layers, 4)
