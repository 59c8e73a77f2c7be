"""Few operators, many cells: who is attended when."""

import pytest

from sim.attention import Attention


def test_cells_queue_in_the_order_in_which_they_asked():
    attention = Attention(operators=2, patience_s=60.0)
    for second, cell in enumerate("abcd"):
        attention.hear(cell, 1, True, float(second))
    assert attention.granted == {"a": 1, "b": 1}
    assert attention.waiting == ["c", "d"]
    attention.hear("b", 1, False, 5.0)
    assert attention.granted == {"a": 1, "c": 1}
    attention.hear("b", 2, True, 5.5)
    attention.hear("a", 1, False, 6.0)
    assert attention.granted == {"c": 1, "d": 1}
    assert attention.waiting == ["b"]
    figures = attention.figures(8.0)
    # a and b at once, c from 2 to 5, d from 3 to 6.
    assert figures.waits_s == (0.0, 0.0, 3.0, 3.0)
    # a 0-6, b 1-5, c 5-8, d 6-8, of 2 operators over 8 s.
    assert figures.attended_s == 15.0
    assert figures.busy == pytest.approx(15 / 16)


def test_a_silent_cell_keeps_nobody():
    attention = Attention(operators=1, patience_s=5.0)
    attention.hear("dead", 1, True, 0.0)
    attention.hear("next", 1, True, 1.0)
    attention.hear("next", 1, True, 5.5)
    assert attention.granted == {"next": 1}
    attention.tick(20.0)
    assert attention.granted == {}


def test_a_new_ticket_is_a_new_place_in_the_queue():
    attention = Attention(operators=1)
    attention.hear("a", 1, True, 0.0)
    attention.hear("b", 1, True, 1.0)
    attention.hear("a", 2, True, 2.0)  # its release was lost
    assert attention.granted == {"b": 1}
    assert attention.waiting == ["a"]


def test_never_more_than_there_are_and_nobody_is_forgotten():
    import random

    source = random.Random(3)
    attention = Attention(operators=3)
    wants: dict[str, int] = {}
    served: set[tuple[str, int]] = set()
    asked: set[tuple[str, int]] = set()
    tickets = dict.fromkeys("abcdefgh", 0)
    for tick in range(4000):
        cell = source.choice("abcdefgh")
        if cell in wants and (cell, wants[cell]) in served:
            attention.hear(cell, wants.pop(cell), False, tick / 100)
        elif cell not in wants:
            tickets[cell] += 1
            wants[cell] = tickets[cell]
            asked.add((cell, tickets[cell]))
        for name, ticket in wants.items():
            attention.hear(name, ticket, True, tick / 100)
        assert len(attention.granted) <= 3
        served |= set(attention.granted.items())
    assert len(asked) > 1000
    assert len(asked - served) <= 8  # those that wait at the end


def test_no_operators_are_refused():
    with pytest.raises(ValueError, match="operators is 0"):
        Attention(operators=0)
