import base64
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from nsvq.errors import UserError
from nsvq.eval.page import main, write_page

RESULT = {
    "kind": "reconstruction",
    "protocol": "ours",
    "metrics": {"psnr": 25.4321, "rfid": None},
    "meanings": {"psnr": "dB, <mean> over images"},
    "skipped": {"lpips_vgg": "no network"},
    "warnings": ["rfid is nan & gone"],
    "counts": {"images": 23},
    "data": {"image_size": 16, "split": "test", "source": "some/<where>"},
    "tokenizer": {"folder": "runs/t"},
    "versions": {"nsvq": "0.1"},
    "created": "2026-01-01",
    "usage_histogram": [
        {"from": 0, "to": 0, "codes": 3},
        {"from": 1, "to": 1, "codes": 0},
        {"from": 2, "to": 3, "codes": 6},
    ],
}


class Reader(HTMLParser):
    """Tags in order, attributes that could load something, and whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.sources += [value for name, value in attributes if name in ("src", "href", "data", "poster", "action")]
        if tag not in ("meta", "img", "rect", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(tmp_path):
    """A page of a result with pictures, and of a run; its text."""
    picture, run = tmp_path / "worst.png", tmp_path / "run"
    Image.new("RGB", (4, 2), "red").save(picture)
    run.mkdir()
    lines = [{"step": s, "phase": "stage1", "loss": 2.0 - s / 10, "nan": float("nan")} for s in range(0, 20, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generation = RESULT | {
        "kind": "generation",
        "pipeline": {"folder": "runs/p"},
        "seeds": "sample i has seed 0 + i",
        "setting": {"guidance_scale": 1.5, "steps": 50},
        "grid": {"file": str(picture), "rows": ["ant", "<bee>"]},
        "sweep": [{"guidance_scale": g, "steps": 50, "metrics": {"fid": 10 * g}} for g in (1, 1.5)],
        "counts": {"samples": 40},
    }
    generation.pop("tokenizer")
    pictures = {"worst": str(picture), "best": str(tmp_path / "gone.png")}
    ranked = RESULT | {"pictures": pictures, "ranked_by": "lpips_vgg"}
    write_page(tmp_path / "new" / "page.html", [ranked, generation], [run])
    return (tmp_path / "new" / "page.html").read_text()


def test_the_page_is_whole_and_loads_nothing_from_outside(page, tmp_path):
    reader = Reader(page)
    assert reader.open == []
    assert all(source.startswith("data:image/png;base64,") for source in reader.sources)
    assert base64.b64decode(reader.sources[0].partition(",")[2]) == (tmp_path / "worst.png").read_bytes()
    assert not re.search(r"url\(|@import|<script|https?:", page)


def test_the_page_says_every_number_with_its_meaning_and_protocol_and_what_is_missing(page):
    for part in (
        "25.432",
        "dB, &lt;mean&gt; over images",
        "protocol <b>ours</b>",
        "rfid is nan &amp; gone",
        "some/&lt;where&gt;",
        "no network",
        "gone.png is gone",
        "&lt;bee&gt;",
        "Guidance 1.5, 50 steps",
        "worst by lpips_vgg",
        "23 images",
        "40 images",
    ):
        assert part in page


def test_a_long_curve_is_thinned_and_keeps_its_end(tmp_path):
    lines = [{"step": step, "phase": "stage1", "loss": 1 / (step + 1)} for step in range(1000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_page(tmp_path / "page.html", [RESULT], [tmp_path])
    (curve,) = [a["points"] for tag, a in Reader((tmp_path / "page.html").read_text()).tags if tag == "polyline"]
    assert 400 <= len(curve.split()) <= 600
    assert "<b>loss</b> 0.001<" in (tmp_path / "page.html").read_text()
    assert ">step 999<" in (tmp_path / "page.html").read_text()


def test_bars_are_as_high_as_their_codes_and_curves_go_through_the_metrics(page):
    tags = Reader(page).tags
    bars = [float(a["height"]) for tag, a in tags if tag == "rect" and a.get("fill") == "#4477aa"][:3]
    assert bars == [80.0, 0.0, 160.0]
    curves = [a["points"] for tag, a in tags if tag == "polyline"]
    assert curves == ["50.0,4.0 296.0,126.0"]  # the loss falls from 2 to 1; a curve without finite values has no chart


def test_a_missing_result_or_run_is_one_clear_error(run_script, tmp_path):
    with pytest.raises(UserError, match=r"no result at .*gone\.json: run eval/reconstruction\.py"):
        run_script(main, "--results", tmp_path / "gone.json", "--output", tmp_path / "page.html")
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    with pytest.raises(UserError, match="no curves at"):
        run_script(main, "--results", tmp_path / "result.json", "--runs", tmp_path, "--output", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
