"""tools/pictures.py: the committed pictures are what it draws, legible, and say what the code does."""
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

import evaluate
import generate
import model
import train
from plumbing import metrics
from plumbing.errors import UserError
from scripts import complaint
from tools import pictures

ROOT = Path(__file__).resolve().parents[2]
LESSONS = {"generate.py": generate, "train.py": train, "model.py": model, "evaluate.py": evaluate}
SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_pictures_are_what_the_script_draws(tmp_path):
    pictures.main(["--out", str(tmp_path)])
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text("utf-8") for path in (ROOT / "pictures").iterdir()}
    assert drawn == committed and len(drawn) == 3


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_legible_on_any_background(name):
    """Opaque paper comes first, letters are large enough, and all stands on the sheet."""
    sheet = xml.parse(ROOT / f"pictures/{name}.svg").getroot()
    width, height = int(sheet.get("width")), int(sheet.get("height"))
    paper = sheet.find(f"{SVG}rect")
    assert paper.get("fill") == "#ffffff" and float(paper.get("width")) >= width - 1
    assert float(paper.get("height")) >= height - 1
    for part in sheet:
        assert part.tag != f"{SVG}text" or float(part.get("font-size")) >= 12
        if part.tag in (f"{SVG}text", f"{SVG}rect"):
            x, y = float(part.get("x")), float(part.get("y"))
            assert 0 <= x <= x + float(part.get("width", 0)) <= width
            assert 0 <= y <= y + float(part.get("height", 0)) <= height


def test_a_line_that_runs_out_of_its_box_is_refused():
    picture = pictures.Picture("small", 100)
    picture.text(20, 50, "short enough", room=100)
    with pytest.raises(UserError, match="wider than its 100 pixels: a line that is too long"):
        picture.text(20, 50, "a line that is too long", room=100)


def test_the_flow_names_what_is_there():
    """Each function of a band is its lesson's, or plumbing.metrics'; files are the repository's, or made by it."""
    made = {"data/english.jsonl", "runs/demo/", "results/demo.json", "adapter_model.safetensors",
            "adapter_config.json", "log.jsonl"}
    functions = files = 0
    for lesson, _, _, stations in pictures.FLOW:
        for what, name, lines in stations:
            words = " ".join([name, *lines])
            for called in re.findall(r"([\w.]+)\(", words):
                owner = LESSONS[lesson]
                for part in called.removeprefix("metrics.").split("."):
                    owner = getattr(metrics if called.startswith("metrics.") else owner, part)
                functions += 1
            if what == "file":
                listed = re.findall(r"[\w.-]+(?:/[\w.-]+)*\.(?:jsonl?|txt|tsv|safetensors)\b", " ".join(lines))
                assert name in made or (ROOT / name).is_dir()
                assert all(file in made or (ROOT / name / file).is_file() for file in listed), listed
                files += len(listed)
    assert functions >= 15 and files >= 10


def test_the_score_matrix_masks_what_train_masks():
    texts, batch = pictures.small_batch()
    documents = [text for _, text in texts[batch.query_count:]]
    masked = {(row, column): pictures.why_masked(row, column, documents[:5], documents)
              for row in range(5) for column in range(10) if not batch.valid[row, column]}
    # by hand: 0 and 1 share the label billing, which is the hard negative of 2; 2's label is 0's hard negative;
    # 3 and 4 are one query with two positives
    assert masked == {(0, 1): "a", (1, 0): "a", (0, 7): "b", (1, 7): "b", (2, 5): "b", (3, 4): "c", (4, 3): "c"}
    drawn = xml.parse(ROOT / "pictures/score_matrix.svg").getroot()
    words = [part.text for part in drawn.iter(f"{SVG}text")]
    assert sorted(word for word in words if word in ("a", "b", "c")) == sorted([*masked.values(), "a", "b", "c"])
    assert words.count("own") == 5 and words.count("8 of 10") == 2 and words.count("9 of 10") == 3


def test_a_file_in_the_folders_place_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "a file stands where a folder is wanted" in complaint(capsys, pictures.main, "--out", tmp_path / "file")
