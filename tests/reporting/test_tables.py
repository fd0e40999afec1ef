"""Oracles: files written by hand in CSVLogger's layout, and the csv module as the reader."""

import csv

from lightning_plugins.reporting.tables import layout, merge_metrics, read_metrics, write_table


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_phases_and_attempts_become_one_table(tmp_path):
    (tmp_path / "a.csv").write_text("epoch,step,train/loss,val/abs_rel\n0,9,1.0,\n0,19,0.9,\n0,19,,0.5\n1,29,0.8,\n1,39,0.7,\n")
    (tmp_path / "b.csv").write_text("epoch,step,train/loss,val/abs_rel,extra\n1,29,0.81,,\n1,39,,0.4,7\n")
    (tmp_path / "c.csv").write_text("epoch,step,val/rmse\n0,5,2.0\n")
    paths = {"teacher": [tmp_path / "a.csv", tmp_path / "b.csv"], "student": [tmp_path / "none.csv", tmp_path / "c.csv"]}
    rows = merge_metrics(paths, tmp_path / "metrics.csv")
    read = read_csv(tmp_path / "metrics.csv")
    assert list(read[0]) == ["phase", "epoch", "step", "train/loss", "val/abs_rel", "extra", "val/rmse"]
    assert [tuple(row.values()) for row in read] == [
        ("teacher", "0", "9", "1.0", "", "", ""),
        ("teacher", "0", "19", "0.9", "0.5", "", ""),
        ("teacher", "1", "29", "0.81", "", "", ""),
        ("teacher", "1", "39", "0.7", "0.4", "7", ""),
        ("student", "0", "5", "", "", "", "2.0"),
    ]
    assert [{column: value for column, value in row.items() if value} for row in read] == rows


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    (tmp_path / "a.csv").write_text("epoch,step,loss\n0,1,0.5\n0,2,0.1")
    assert read_metrics(tmp_path / "a.csv") == [{"epoch": "0", "step": "1", "loss": "0.5"}]
    (tmp_path / "a.csv").write_text("epoch,st")
    assert read_metrics(tmp_path / "a.csv") == []
    (tmp_path / "a.csv").write_text("")
    assert merge_metrics({"teacher": [tmp_path / "a.csv"]}, tmp_path / "metrics.csv") == []


def test_table_has_the_union_of_columns_and_all_digits(tmp_path):
    write_table(tmp_path / "t.csv", [{"name": 'a "b", c', "x": 0.1 + 0.2}, {"name": "d", "y": 3}])
    assert read_csv(tmp_path / "t.csv") == [
        {"name": 'a "b", c', "x": "0.30000000000000004", "y": ""},
        {"name": "d", "x": "", "y": "3"},
    ]


def test_numbers_stand_to_the_right():
    head, body = layout(
        [{"name": "student", "images": 100, "abs_rel": 0.123456}, {"name": "median", "abs_rel": "0.3", "best": False}]
    )
    assert [(cell.text, cell.is_number) for cell in head] == [
        ("name", False),
        ("images", True),
        ("abs_rel", True),
        ("best", False),
    ]
    assert [[cell.text for cell in line] for line in body] == [["student", "100", "0.1235", ""], ["median", "", "0.3", "no"]]
    assert layout([]) == ([], [])
