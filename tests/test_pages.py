"""The pages for people, in Chromium: rating and inspecting by keyboard, on a phone, at a zoom of 200 %."""
import json, shutil, subprocess
from collections import Counter
from pathlib import Path

from tests.helpers import HOSTILE
from tests.judges import print_tally

import imageio_ffmpeg
import numpy as np
import pytest

from judging import vlm

pytest_plugins = "tests.helpers", "tests.judges"

PLAYING = "[...document.querySelectorAll('video')].every(video => video.videoWidth && !video.paused)"


# ---- The page for raters --------------------------------------------------------------------------------------------

def test_a_study_is_rated_by_keyboard_reloaded_saved_and_tallied(browser, study, tmp_path, capsys):
    browser.open(study / "study.html")
    browser.press("Ann Ø\ue007")
    browser.until(PLAYING)
    assert browser.text("caption").strip() == HOSTILE.strip().replace("\u2028", "\n")
    assert browser.run("!window.ran")
    assert browser.run("document.getElementById('videos').innerText.replace(/\\s/g, '')") == "ABC"
    browser.press("123451234512345")
    assert browser.run("document.activeElement.id") == "next"
    shown = browser.run("[state.orders, state.ratings]")
    browser.press("\ue007")
    assert browser.run("state.page") == 1 and browser.run("document.getElementById('next').disabled")
    browser.press("44")
    browser.open(study / "study.html")                     # a reload in the middle
    assert browser.run("[state.rater, state.page, state.orders]") == ["Ann Ø", 1, shown[0]]
    assert browser.run("unrated(0).length == 0 && document.querySelectorAll(':checked').length == 2")
    browser.press("b")
    assert browser.run("state.page") == 0 and browser.run("document.querySelectorAll(':checked').length") == 15
    browser.press("\ue007" + "4" * 13 + "\ue007")
    browser.press("\ue007")                                # on the button that saves
    answers = json.loads(browser.downloaded("answers-Ann-Ø.json"))
    assert answers["rater"] == "Ann Ø" and answers["ratings"].items() >= shown[1].items()
    key = json.loads(Path(f"{study}-key.json").read_text())
    by_row = np.array([answers["ratings"][clip] for clip in answers["orders"][0]]).T   # as typed: row by row
    assert by_row.ravel().tolist() == [1, 2, 3, 4, 5] * 3
    assert sorted(answers["orders"][0]) == sorted(clips[0] for clips in key["clips"].values())
    assert "1 raters, 2 prompts" in print_tally(study, [answers], tmp_path, capsys)
    browser.run("document.getElementById('other').click()")
    browser.press("Bob\ue007")
    assert browser.run("[state.rater, state.page, state.ratings]") == ["Bob", 0, {}]

def test_each_page_has_an_order_of_its_own(browser, tmp_path):
    pages = [dict(caption=f"{i}", clips=[f"{i}a", f"{i}b", f"{i}c"]) for i in range(100)]
    vlm.write_page("study.html", tmp_path / "study.html", dict(study="many", pages=pages))
    browser.open(tmp_path / "study.html")
    browser.press("Ann\ue007")
    orders = browser.run("state.orders.map(order => order.map(clip => clip.at(-1)).join(''))")
    assert len(orders) == 100 and min(Counter(orders).values()) >= 5 and len({*orders}) == 6     # about 17 of each

def test_a_browser_without_storage_says_so_and_still_saves(browser, study):
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no') } })"
    script = browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=refuse)["identifier"]
    try:
        browser.open(study / "study.html")
        browser.press("Ann\ue007")
        assert "does not keep" in browser.text("notice")
        browser.press("3" * 15 + "\ue007" + "3" * 15 + "\ue007")
        browser.press("\ue007")
        assert len(json.loads(browser.downloaded("answers-Ann.json"))["ratings"]) == 6
    finally:
        browser.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=script)

@pytest.fixture
def own_study(study, tmp_path):
    """A copy of the study to change, with a name of its own in the browser's storage."""
    shutil.copytree(study, tmp_path / "own")
    page, key = tmp_path / "own" / "study.html", json.loads(Path(f"{study}-key.json").read_text())
    page.write_text(page.read_text().replace(key["study"], tmp_path.name))
    return tmp_path / "own", key

SOUND_ALONE = "-f lavfi -i testsrc=d=1 -f lavfi -i sine=d=1 -c:v mpeg4 -c:a aac"          # which no browser shows
STATES = ("state.orders[state.page].map((clip, i) => [clip, ["
          "document.querySelectorAll('figure')[i].innerText.includes('does not play'),"
          "[...document.querySelectorAll('fieldset')].filter(f => f.dataset.clip == clip && !f.disabled).length]])")

@pytest.mark.parametrize("fault", ["missing", "sound alone"])
def test_a_clip_that_does_not_play_says_so_and_cannot_be_rated(fault, browser, own_study):
    folder, key = own_study
    lost = key["clips"]["beta-method"][0]
    file = folder / "clips" / f"{lost}.mp4"
    whole = file.read_bytes()
    browser.open(folder / "study.html")
    browser.press("Ann\ue007" + "1" * 15)                  # rated before anybody notices
    file.unlink()
    if fault == "sound alone":
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *SOUND_ALONE.split(), file], check=True)
    browser.open(folder / "study.html")
    browser.until("document.querySelector('.lost')")
    states = {clips[0]: [False, 5] for clips in key["clips"].values()} | {lost: [True, 0]}
    assert dict(browser.run(STATES)) == states             # whether it says so, and in how many ways it can be rated
    browser.press("\ue007" + "4" * 15 + "\ue007")          # the rest can be rated meanwhile
    assert lost not in browser.run("Object.keys(state.ratings)") and browser.run("state.page") == 2
    browser.press("\ue007")                                # on the button that saves: it shows what is lacking
    assert browser.run("state.page") == 0
    file.write_bytes(whole)                                # a rater gets the folder anew
    browser.run("show(0)")
    browser.until(PLAYING)
    assert browser.run("document.getElementById('next').disabled")         # now it has to be rated, too
    browser.press("5" * 5 + "\ue007\ue007")
    browser.press("\ue007")
    assert json.loads(browser.downloaded("answers-Ann.json"))["ratings"][lost] == [5] * 5

def test_all_of_a_study_fits_into_a_narrow_window_and_another_study_begins_anew(browser, own_study):
    folder, _ = own_study
    page = folder / "study.html"
    for width, beside in ((1280, True), (640, False), (360, False)):       # a desk, a zoom of 200 % there, a phone
        browser.open(page, width, 700)
        browser.run("welcome()")
        browser.press(f"{width}\ue007")
        browser.until("document.querySelector('video').videoWidth")
        assert browser.run("document.documentElement.scrollWidth") <= width
        places = browser.run(
            "[...document.querySelectorAll('video, input[type=radio], button')].filter(e => e.offsetParent)"
            ".map(e => e.getBoundingClientRect()).map(r => [r.left, r.right, r.top])")
        assert len(places) == 3 + 75 + 3
        assert all(0 <= left < right <= width for left, right, _ in places)
        assert (len({round(top) for *_, top in places[1:4]}) == 1) == beside           # of the videos
        browser.press("123451234512345")                   # points are given in the order in which they are seen
        order, ratings = browser.run("[state.orders[0], state.ratings]")
        rows = np.array([ratings[clip] for clip in order])
        assert (rows.T if beside else rows).ravel().tolist() == [1, 2, 3, 4, 5] * 3
    page.write_text(page.read_text().replace(folder.parent.name, f"{folder.parent.name}-later"))   # in the same place
    browser.open(page)
    assert browser.run("[state, document.getElementById('start').hidden]") == [None, False]


# ---- The page for those who inspect ---------------------------------------------------------------------------------

def write_list(folder, rows):
    vlm.write_page("inspect.html", folder / "inspect.html", rows)
    return folder / "inspect.html"

def row(number, **changes):
    return dict(file_name=f"{number}.mp4", text=f"clip {number}", keep=True, reason="", theme="x", vlm="y") | changes

def press_until_saved(browser, keys):
    browser.press(keys + "s")
    return [json.loads(line) for line in browser.downloaded("metadata.jsonl").split("\n")[:-1]]

def test_clips_are_inspected_by_keyboard_reloaded_and_saved(browser, videos, tmp_path):
    raw = shutil.copytree(videos, tmp_path / "raw #1?&%20'")
    names = [f"../{raw.name}/{number:05d}.mp4" for number in range(4)]
    rows = [dict(file_name=names[i % 4] if i < 4 else f"{i}.mp4", text=HOSTILE, keep=[True, False, None][i % 3],
                 reason="<b>", theme="x") for i in range(100)]
    (tmp_path / "curated").mkdir()
    page = write_list(tmp_path / "curated", rows)
    browser.open(page)
    browser.until(PLAYING)
    shown = browser.run("[document.getElementById('text').value, document.getElementById('reason').textContent]")
    assert shown == [HOSTILE, "<b>"] and browser.run("!window.ran")
    browser.press("dk")                                    # clips 0 and 1
    browser.press("e"), browser.press(" kd"), browser.press("\ue00c" + "u")          # keys in a caption are text
    browser.open(page)                                     # a reload in the middle
    assert browser.run("[current, rows[0].keep, rows[1].keep, rows[2].keep]") == [3, False, True, None]
    assert browser.run("document.getElementById('stale').hidden")
    browser.run("(f => { f.value = 'null'; f.onchange() })(document.getElementById('filter'))")
    assert browser.run("current") == 2
    browser.press("k")                                     # the next that is undecided
    assert browser.run("current") == 5
    assert "32 undecided" in browser.text("counts")
    browser.run("(t => { t.value = ' '; t.oninput() })(document.getElementById('text'))")
    browser.press("k")
    assert "needs a caption" in browser.text("notice")
    saved = press_until_saved(browser, "\ue00c" + "d")
    changed = {0: dict(keep=False), 1: dict(keep=True), 2: dict(keep=True), 5: dict(keep=False, text=" ")}
    expected = [{**row, **changed.get(i, {})} for i, row in enumerate(rows)]
    expected[2]["text"] = saved[2]["text"]
    assert saved == expected and saved[2]["text"] in (HOSTILE + " kd", " kd" + HOSTILE)
    browser.until("document.getElementById('notice').innerText.includes('cannot play')")         # 8.mp4 is not there

def test_changes_made_on_another_list_are_told_and_asked_about(browser, tmp_path):
    rows = [row(i, keep=None) for i in range(5)]
    page = write_list(tmp_path, rows)
    browser.open(page)
    browser.press("d")                                     # the first
    browser.run("(t => { t.value = 'mine'; t.oninput() })(document.getElementById('text'))")             # of the second
    browser.press("\ue014k")                               # an arrow to the third
    (tmp_path / "other").mkdir()                           # a list in another place knows nothing of that
    browser.open(write_list(tmp_path / "other", rows))
    assert browser.run("document.getElementById('stale').hidden") and press_until_saved(browser, "") == rows
    # The same clips asked about once more: one row is as it was, one has another caption, one says what was chosen.
    write_list(tmp_path, [row(0, keep=None), row(1, keep=None, text="new"), row(2), row(3), row(4)])
    browser.open(page)
    assert browser.text("stale").startswith("1 of your changes")
    assert browser.run("rows.map(row => [row.text, row.keep])") == [
        ["clip 0", False], ["new", None], ["clip 2", True], ["clip 3", True], ["clip 4", True]]
    browser.press("d")                                     # who does not answer is asked again
    browser.open(page)
    assert browser.run("!document.getElementById('stale').hidden && rows[1].text") == "new"
    browser.run("document.getElementById('forget').click()")
    browser.open(page)
    assert browser.run("document.getElementById('stale').hidden && rows[1].text") == "new"
    write_list(tmp_path, [row(0, text="newer"), row(1), row(2), row(3), row(4)])
    browser.open(page)
    assert browser.run("!document.getElementById('stale').hidden && rows[0].keep === true")
    browser.run("document.getElementById('use').click()")
    browser.open(page)
    assert browser.run("document.getElementById('stale').hidden && rows[0].keep === false && rows[0].text === 'newer'")

def test_all_of_a_list_fits_into_a_narrow_window(browser, tmp_path):
    for width in (640, 360):
        browser.open(write_list(tmp_path, [row(0, file_name="long" * 30 + ".mp4", text=HOSTILE * 9)]), width, 700)
        assert browser.run("document.documentElement.scrollWidth") <= width
