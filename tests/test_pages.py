"""The pages for people, in Chromium: rating and inspecting by keyboard, on a phone."""
import json, shutil
from collections import Counter

from tests.helpers import HOSTILE, NAMES
from tests.judges import print_tally, write_study

import numpy as np

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
    by_row = np.array([answers["ratings"][clip] for clip in answers["orders"][0]]).T   # as typed: row by row
    assert by_row.ravel().tolist() == [1, 2, 3, 4, 5] * 3
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

def test_on_a_phone_a_clip_that_does_not_play_says_so_and_cannot_be_rated(browser, shots, methods, tmp_path):
    folder, page = tmp_path / "study", tmp_path / "study" / "study.html"
    key = write_study(methods, shots, folder)
    lost = key["clips"]["beta-method"][0]
    file = folder / "clips" / f"{lost}.mp4"
    whole = file.read_bytes()
    browser.open(page, 360, 700)
    browser.press("Ann\ue007")
    browser.until("document.querySelector('video').videoWidth")
    right = "[...document.querySelectorAll('video, input, button')].map(e => e.getBoundingClientRect().right)"
    assert 300 < browser.run(f"Math.max(...{right})") <= 360
    browser.press("123451234512345")                       # points are given as they are seen, video by video
    order, ratings = browser.run("[state.orders[0], state.ratings]")
    assert [ratings[clip] for clip in order] == [[1, 2, 3, 4, 5]] * 3
    file.unlink()                                          # rated before anybody notices
    browser.open(page)
    browser.until("document.querySelector('.lost')")
    assert browser.run("[...document.querySelectorAll('fieldset:disabled')].map(f => f.dataset.clip)") == [lost] * 5
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
    page.write_text(page.read_text().replace(key["study"], "another"))     # in the same place; it begins anew
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
    names = [f"../{raw.name}/{name}.mp4" for name in (*NAMES, "absent")]
    rows = [dict(file_name=name, text=HOSTILE, keep=None, reason="<b>", theme="x") for name in names]
    (tmp_path / "curated").mkdir()
    page = write_list(tmp_path / "curated", rows)
    browser.open(page)
    browser.until(PLAYING)
    shown = browser.run("[document.getElementById('text').value, document.getElementById('reason').textContent]")
    assert shown == [HOSTILE, "<b>"] and browser.run("!window.ran")
    browser.press("dke kd\ue00cu")                         # keys in the caption of the third are text
    browser.open(page)                                     # a reload in the middle
    assert browser.run("[current, rows[0].keep, rows[1].keep, rows[2].keep]") == [3, False, True, None]
    assert browser.run("document.getElementById('stale').hidden")
    browser.run("(t => { t.value = ' '; t.oninput() })(document.getElementById('text'))")
    browser.press("k")
    assert "needs a caption" in browser.text("notice")
    saved = press_until_saved(browser, "\ue00c" + "d")
    changed = {0: dict(keep=False), 1: dict(keep=True), 3: dict(keep=False, text=" ")}
    expected = [{**row, **changed.get(i, {})} for i, row in enumerate(rows)]
    expected[2]["text"] = saved[2]["text"]
    assert saved == expected and saved[2]["text"] in (HOSTILE + " kd", " kd" + HOSTILE)
    browser.until("document.getElementById('notice').innerText.includes('cannot play')")         # the last is absent

def test_changes_made_on_another_list_are_told_and_asked_about(browser, tmp_path):
    rows = [row(i, keep=None) for i in range(3)]
    page = write_list(tmp_path, rows)
    browser.open(page)
    browser.press("d")                                     # the first
    browser.run("(t => { t.value = 'mine'; t.oninput() })(document.getElementById('text'))")             # of the second
    browser.press("\ue014k")                               # an arrow to the third
    (tmp_path / "other").mkdir()                           # a list in another place knows nothing of that
    browser.open(write_list(tmp_path / "other", rows))
    assert press_until_saved(browser, "") == rows
    # The same clips asked about once more: one row is as it was, one has another caption, one says what was chosen.
    write_list(tmp_path, [row(0, keep=None), row(1, keep=None, text="new"), row(2)])
    for _ in range(2):                                     # who does not answer is asked again
        browser.open(page)
        assert browser.text("stale").startswith("1 of your changes")
        found = browser.run("rows.map(row => [row.text, row.keep])")
        assert found == [["clip 0", False], ["new", None], ["clip 2", True]]
    browser.run("document.getElementById('forget').click()")
    write_list(tmp_path, [row(0, text="newer"), row(1), row(2)])
    browser.open(page)
    assert browser.text("stale").startswith("1 of your changes") and browser.run("rows[0].keep")
    browser.run("document.getElementById('use').click()")
    browser.open(page)
    assert browser.run("document.getElementById('stale').hidden")
    assert browser.run("[rows[0].text, rows[0].keep]") == ["newer", False]
