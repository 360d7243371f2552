"""tools/study/table.py: means by category, their spread, and the table in Markdown."""
import pytest

from plumbing.tasks import CATEGORIES
from tools.study import table


def test_the_average_is_over_categories_and_wants_all_seven():
    kinds = {f"{kind}{i}": kind for kind in CATEGORIES for i in range(2)}
    scores = {name: 0.5 for name in kinds} | {"sts0": 0.1, "sts1": 0.2, "bitext0": 0.0}
    found = table.summarize(scores, kinds)
    assert found["STS"] == pytest.approx(0.15) and found["Average"] == pytest.approx((6 * 0.5 + 0.15) / 7)
    del scores["sts0"], scores["sts1"]
    assert table.summarize(scores, kinds)["Average"] is None


def test_the_table_shows_spread_and_marks_what_is_older():
    def run(average, recipe):
        return {"summary": {"Average": average, "STS": average}, "model": "m", "settings": {
            "common": {"subset": "dev", "recipe": recipe}}}
    study = {"common": {"subset": "dev", "recipe": "new", "language": "Dutch"}, "data": {}, "rows": {
        "b": {"what": "B", "examples": 5, "runs": {"0": run(0.5, "new"), "1": run(0.7, "new")}},
        "a": {"what": "A", "examples": 0, "runs": {"0": run(0.25, "old")}}}}
    table.collect(study, ["a", "b"])
    text = table.table(study)
    assert "in Dutch alone" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = {line[0]: line for line in lines if len(line) > 10}
    assert list(rows)[2:] == ["A (`a`) †", "B (`b`)"]
    assert rows["B (`b`)"][1:3] == ["2", "60.0 ±14.1"] and rows["A (`a`) †"][1:3] == ["1", "25.0"]
