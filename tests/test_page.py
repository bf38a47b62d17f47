"""A run as a page: its curves are what was measured, and in Chromium its videos play."""
import json, re, shutil

import numpy as np
import pytest

import train
from support import UserError, page
from tests.helpers import metrics

pytest_plugins = "tests.helpers", "tests.judges"

@pytest.fixture
def run(straight, videos, tmp_path):
    """A run with videos of two pictures at ten checkpoints."""
    run = shutil.copytree(straight, tmp_path / "run", ignore=shutil.ignore_patterns("videos"))
    captions = {"00000": "an arm <script>document.title = 'run'</script>", "00001": "a leg & more"}
    for step in range(0, 100, 10):
        for name in captions:
            file = run / "videos" / f"step-{step:06d}" / f"{name}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(videos / f"{name}.mp4", file)
    (run / "videos" / "bench.json").write_text(json.dumps(dict(captions=captions)))
    return run

def test_curves_are_what_was_measured(run):
    page.main(page.Options(run=str(run)))
    picture = (run / "curves.svg").read_text()
    assert 'width="900"' in picture
    panels = dict(re.findall(r'font-weight="bold">(.*?)</text>(.*?)<rect', picture, re.DOTALL))
    logged = metrics(run)
    measured = {"preference loss (log 2 = 0.69)": "preference", "gradient norm": "grad_norm", "learning rate": "lr",
                "held-out win error, by t": "eval_win_t0.1", "accuracy (z > 0)": "accuracy"}
    for title, name in measured.items():
        path = re.search(r'class="line".*? d="M(.*?)"', panels[title])[1]
        heights = [float(point.split()[1]) for point in path.split("L")]
        values = [line[name] for line in logged]
        assert len(heights) == len(values) and 40 <= min(heights) and max(heights) <= 190
        assert np.argmin(heights) == np.argmax(values) and np.argmax(heights) == np.argmin(values), title
    lines = [{"step": 0, "win": 3.0, "ref_win": 1.0}, {"step": 1, "win": 5.0}]        # no reference between comparisons
    assert page.curve(lines, "win", "ref_win") == [(0, 2.0)] and page.curve(lines, "win") == [(0, 3.0), (1, 5.0)]
    assert len(page.curve([{"step": step, "lr": 1.0} for step in range(1000)], "lr")) <= page.POINTS
    assert page.CLIP == train.CLIP

def test_a_page_says_what_runs_and_cannot_end_it(run, tmp_path, capsys):
    page.update_page(run)
    written = (run / "index.html").read_text()
    for words in ("realdpo on tiny", "1 × cpu", "step 4 of 4", "all steps are done", "--beta 25.0"):
        assert words in written
    shown = re.findall(r"step (\d+)</figure>", written)
    assert shown[:8] == shown[8:] == ["0", "10", "30", "40", "50", "60", "80", "90"]
    (run / "index.html").unlink()
    (run / "index.html").mkdir()
    page.update_page(run)
    assert re.fullmatch(r"no page: .*index.html: cannot be written .*\n", capsys.readouterr().out)
    with pytest.raises(UserError, match="run.json: cannot be read"):
        page.write_page(tmp_path)

@pytest.mark.parametrize("width", [1280, 390])
def test_videos_play_and_captions_are_text(run, browser, width):
    page.write_page(run)
    browser.open(run / "index.html", width)
    assert browser.run("document.querySelectorAll('.panels svg .line').length") >= 10
    browser.run("document.querySelector('.videos').scrollIntoView()")         # only what is seen plays
    browser.until("[...document.querySelectorAll('video')].filter(video => video.currentTime > 0).length >= 2")
    caption = browser.run("document.querySelector('p + .videos').previousElementSibling.innerText")
    assert caption == "an arm <script>document.title = 'run'</script>"
    assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("document.querySelector('video').click()")
    browser.until("document.querySelector('dialog[open] video').currentTime > 0")
