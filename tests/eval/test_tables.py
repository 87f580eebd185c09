import math

from scripts.eval.tables import cell, table


def test_table():
    assert table(("a", "b"), [(1, "x"), (2.5, "")]) == ["| a | b |", "|---|---|", "| 1 | x |", "| 2.5 |  |"]


def test_cells_leave_out_what_is_not_there():
    assert cell(0.5, (0.25, 0.75)) == "0.500 [0.250, 0.750]" and cell(0.5, (-0.25, 0.75), "+.1f") == "+0.5 [-0.2, +0.8]"
    assert cell(None) == cell(math.nan, (0, 1)) == "" and cell(0.5) == cell(0.5, (math.nan, math.nan)) == "0.500"
