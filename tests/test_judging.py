"""Curation, the study for raters, its tally, a language model's verdict."""
import base64, json, re, shutil, subprocess, threading
import time, urllib.request
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path

from tests.helpers import HOSTILE, NAMES, contents

import huggingface_hub
import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import data
import judging.curate, judging.study, judging.tally, judging.verdict
from judging import vlm
from model import UserError

pytest_plugins = "tests.helpers"


def write_study(methods, shots, out):
    judging.study.main(judging.study.Options(videos=str(methods), bench=str(shots), out=str(out)))
    return json.loads(Path(f"{out}-key.json").read_text())


@pytest.fixture(scope="session")
def study(shots, methods):
    return write_study(methods, shots, shots.parent / "study") and shots.parent / "study"


def test_a_study_hides_the_methods_and_is_the_same_when_written_again(shots, methods, study, tmp_path):
    key, before = json.loads(Path(f"{study}-key.json").read_text()), contents(study)
    assert write_study(methods, shots, study) == key and contents(study) == before
    names = [*before, before["study.html"].decode()]
    for word in ("method", "alpha", "somersault", "walk-12", key["secret"]):
        assert not any(word in name for name in names)
    for method, clips in key["clips"].items():
        first = ["somersault-0.mp4" if method == "beta-method" else "somersault.mp4", "walk-12-0.mp4"]
        assert [before[f"clips/{clip}.mp4"] for clip in clips] == [(methods / method / n).read_bytes() for n in first]
    assert write_study(methods, shots, tmp_path / "other")["study"] != key["study"]        # drawn anew: other names


def test_raters_and_judges_see_the_picture_that_the_model_got(tmp_path):
    picture = np.full((48, 64, 4), (250, 10, 10, 0), np.uint8)             # all transparent, so white
    Image.fromarray(picture).save(tmp_path / "a.png")
    (shown,) = vlm.frames_as_jpeg(tmp_path / "a.png", 1)
    assert imageio.imread(shown).shape == (48, 64, 3) and imageio.imread(shown).min() > 250


def test_of_a_bench_of_clips_raters_see_the_first_frames(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "methods" / "real")
    write_study(tmp_path / "methods", videos, tmp_path / "study")
    shown = imageio.imread(tmp_path / "study" / "clips" / "0.jpg").astype(int)
    assert np.abs(shown - imageio.mimread(videos / "00000.mp4")[0]).mean() < 8


def answer_study(study, rater, rate, **changes):
    """An answers file: `rate(method, prompt number)` gives the five ratings."""
    key = json.loads(Path(f"{study}-key.json").read_text())
    ratings = {clip: rate(method, i) for method, clips in key["clips"].items() for i, clip in enumerate(clips)}
    return {"study": key["study"], "rater": rater, "ratings": ratings, **changes}


def print_tally(study, answers, folder, capsys):
    files = []
    for i, answer in enumerate(answers):
        files.append(folder / f"{i}.json")
        files[-1].write_text(json.dumps(answer))
    judging.tally.main(judging.tally.Options(answers=[str(file) for file in files], study=str(study)))
    return capsys.readouterr().out


def test_the_tally_is_table_1(study, tmp_path, capsys):
    rates = {"alpha-method": [[5, 1, 3, 3, 4], [5, 2, 3, 3, 4]], "beta-method": [[5, 3, 3, 3, 4], [5, 4, 3, 3, 2]],
             "gamma-method": [[1, 5, 3, 3, 1], [1, 5, 3, 3, 1]]}
    answers = [answer_study(study, rater, lambda method, i: rates[method][i]) for rater in "ab"]
    out = print_tally(study, answers, tmp_path, capsys)
    rows, won = ({name: cells for name, *cells in (line.strip("| ").split(" | ") for line in table.splitlines())}
                 for table in out.split("\n\n")[:2])
    assert [cell.split()[0] for cell in rows["alpha-method"]] == ["100.00", "30.00", "60.00", "60.00", "80.00"]
    assert [cell.split()[0] for cell in rows["beta-method"]] == ["100.00", "70.00", "60.00", "60.00", "60.00"]
    assert rows["alpha-method"][0].endswith("[100.0, 100.0]") and rows["alpha-method"][1].endswith("[20.0, 40.0]")
    assert [cell.split()[0] for cell in won["alpha-method"]] == ["50.00", "75.00", "100.00"]      # a tie and a win: 3/4
    assert [cell.split()[0] for cell in won["gamma-method"]] == ["0.00", "0.00", "50.00"]
    assert "2 raters, 2 prompts" in out and "visual alignment 1.00" in out and "motion quality nan" in out


def test_agreement_is_krippendorffs_alpha(study, tmp_path, capsys):
    rng = np.random.default_rng(0)
    answers = [answer_study(study, rater, lambda method, i: rng.integers(1, 6, 5).tolist()) for rater in "abcd"]
    ratings = np.array([[*answer["ratings"].values()] for answer in answers])              # (raters, videos, 5)
    within = np.mean([(a - b) ** 2 for a, b in combinations(ratings, 2)], axis=(0, 1))
    among = np.mean([(a - b) ** 2 for a, b in combinations(ratings.reshape(-1, 5), 2)], axis=0)
    found = re.findall(r" quality (-?\d\.\d\d)| alignment (-?\d\.\d\d)", print_tally(study, answers, tmp_path, capsys))
    assert [float("".join(alpha)) for alpha in found] == pytest.approx(1 - within / among, abs=0.006)
    assert "visual alignment nan" in print_tally(study, answers[:1], tmp_path, capsys)           # of one rater


def test_intervals_come_from_both_raters_and_prompts(capsys):
    rng = np.random.default_rng(0)
    raters, prompts = rng.normal(size=(100, 1)) / 10, rng.normal(size=(1, 25)) / 10
    values = torch.from_numpy(np.stack([0.5 + raters + prompts, np.full((100, 25), np.nan)], axis=-1))
    values[0, 0] = torch.nan                               # a missing value is left out
    judging.tally.print_table("", ["row"], ["column", "nothing"], values[:, None])
    found = re.search(r"\| row \| (\S+) \[(\S+), (\S+)\] \| nan \[nan, nan\] \|", capsys.readouterr().out)
    mean, low, high = map(float, found.groups())
    assert mean == pytest.approx(100 * np.nanmean(values[..., 0]), abs=0.005) and low < mean < high
    assert (high - low) / 2 == pytest.approx(196 * 0.1 * (1 / 100 + 1 / 25) ** 0.5, rel=0.25)


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible server: `server.answer(text, count of pictures)` returns what the model says, or a function
    that does something else with the connection; `server.asked` fills with (text, pictures, headers)."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            *pictures, text = body["messages"][0]["content"]
            server.asked.append((text["text"], pictures, self.headers))
            answer = server.answer(text["text"], len(pictures))
            if callable(answer):
                return answer(self)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": answer}}
            self.reply(200, json.dumps({"id": "1", "created": 1, "model": body["model"], "choices": [choice]}).encode())

        def reply(self, status, content, length=None):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.asked, server.answer = True, [], None
    server.options = dict(endpoint=f"http://127.0.0.1:{server.server_port}/v1", vlm="judge", timeout=5.0)
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    monkeypatch.setattr(vlm.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


SERVER_FAULTS = {                                                 # what the server does, and what the one line says
    "an error": (lambda handler: handler.reply(500, b"{}"), 3, "500"),
    "a refusal": (lambda handler: handler.reply(401, b"{}"), 1, "401"),
    "no such model": (lambda handler: handler.reply(404, b'{"detail": "unknown"}'), 1, '404 {"detail": "unknown"}'),
    "HTML": (lambda handler: handler.reply(200, b"<html>"), 3, ""),
    "other JSON": (lambda handler: handler.reply(200, b'{"error": "busy"}'), 3, ""),
    "no choices": (lambda handler: handler.reply(200, b'{"choices": []}'), 3, ""),
    "half an answer": (lambda handler: handler.reply(200, b'{"choices"', 500), 3, ""),
    "silence": (lambda handler: threading.Event().wait(2), 3, "timed out"),
}


def test_frames_for_a_model_are_evenly_spaced_in_time_at_any_frame_rate(tmp_path):
    frames = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(48, 2).repeat(3, 3) * 4
    data.write_video(tmp_path / "even.mp4", frames, 30)
    slow = "setpts='if(lt(N,30),N,30+(N-30)*5)/30/TB'"                         # the second half five times as slow
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", tmp_path / "even.mp4", "-vf", slow,
                    "-fps_mode", "vfr", tmp_path / "uneven.mp4"], check=True)
    for name, instants in (("even", np.arange(60) / 30), ("uneven", np.r_[np.arange(30), 30 + 5 * np.arange(30)] / 30)):
        shown = [imageio.imread(jpeg).mean() / 4 for jpeg in vlm.frames_as_jpeg(tmp_path / f"{name}.mp4", 8)]
        times, step = np.interp(shown, np.arange(60), instants), instants[-1] / 8
        assert len(times) == 8 and np.abs(np.diff(times) - step).max() < 0.6 * step and np.ptp(times) > 6 * step


def judgement(**changes):
    return json.dumps({**dict.fromkeys(judging.curate.CHECKS, "yes"), "reason": "", "description": "a figure", **changes})


def curate_clips(videos, out, server, **options):
    options = {**server.options, "theme": "figures", **options}
    judging.curate.main(judging.curate.Options(videos=str(videos), out=str(out), **options))
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    return {Path(row["file_name"]).stem: row for row in rows}


@pytest.mark.parametrize("fault", SERVER_FAULTS)
def test_a_server_at_fault_ends_in_one_line_and_what_was_done_stays(fault, server, videos, tmp_path):
    act, tries, words = SERVER_FAULTS[fault]
    server.answer = lambda text, count: judgement() if len(server.asked) == 1 else act
    with pytest.raises(UserError) as error:
        curate_clips(videos, tmp_path, server, parallel=1, timeout=0.2 if fault == "silence" else 5.0)
    assert server.options["endpoint"] in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
    done, failing = server.asked[0][1], server.asked[1][1]
    assert [pictures for _, pictures, _ in server.asked].count(failing) == tries
    assert (tmp_path / "inspect.html").is_file()
    server.answer = lambda text, count: judgement()
    assert len(curate_clips(videos, tmp_path, server)) == len(NAMES)
    assert [pictures for _, pictures, _ in server.asked].count(done) == 1      # it is not asked about again


def test_an_absent_server_is_named(server, videos, tmp_path):
    server.server_close()
    with pytest.raises(UserError, match=re.escape(server.options["endpoint"])):
        curate_clips(videos, tmp_path, server)


def test_an_error_that_passes_is_no_error(server, videos, tmp_path):
    server.answer = lambda text, count: judgement() if len(server.asked) > 1 else SERVER_FAULTS["an error"][0]
    assert {row["keep"] for row in curate_clips(videos, tmp_path, server, parallel=1).values()} == {True}


def test_curating_keeps_drops_and_leaves_undecided(server, videos, tmp_path, monkeypatch, capsys):
    raw, out = shutil.copytree(videos, tmp_path / "raw", ignore=shutil.ignore_patterns("*.txt")), tmp_path / "curated"
    (raw / "more").mkdir()
    (raw / "more" / "broken.mp4").write_bytes(b"no video")
    answers = ["Sure! " + judgement(), judgement(sharp="No", reason="blurred"), judgement()[:-9], "no",
               judgement(uncut="perhaps"), judgement(description="a second try")]
    server.answer = lambda text, count: answers[len(server.asked) - 1]
    rows = curate_clips(raw, out, server, parallel=1)
    assert [rows[name]["keep"] for name in NAMES] == [True, False, None, True] and rows["broken"]["keep"] is False
    assert rows["00001"]["reason"] == "not sharp: blurred" and "cannot read the answer: no" in rows["00002"]["reason"]
    assert "broken.mp4" in rows["broken"]["reason"] and rows["00003"]["text"] == "a second try"
    assert all(len(pictures) == 8 and "figures" in text for text, pictures, _ in server.asked)
    first = base64.b64decode(server.asked[0][1][0]["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert np.abs(imageio.imread(first).astype(int) - imageio.mimread(raw / "00000.mp4")[0]).mean() < 8
    assert rows == curate_clips(raw, out, server) and len(server.asked) == 6                     # nothing is asked again
    capsys.readouterr()
    assert [clip.file.name for clip in data.list_clips(out)[0]] == ["00000.mp4", "00003.mp4"]
    assert "3 clips" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="theme figures"):
        curate_clips(raw, out, server, theme="dogs")


def test_the_hub_token_never_leaves(server, videos, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    server.answer = lambda text, count: judgement()
    for token, key, sent in ((None, None, "none"), ("hf_set", None, "none"), ("hf_set", "", "none"),
                             ("hf_set", "mine", "mine")):
        for name, value in (("HF_TOKEN", token), (vlm.KEY, key)):
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        curate_clips(videos, tmp_path / f"{token} {key}", server)
        assert {headers["Authorization"] for *_, headers in server.asked} == {f"Bearer {sent}"}
        assert not any(word in str(headers) for *_, headers in server.asked for word in ("hf_stored", "hf_set"))
        server.asked.clear()
    huggingface_hub.InferenceClient(server.options["endpoint"]).chat_completion([{"content": [{"text": ""}]}])
    assert server.asked[0][2]["Authorization"] == "Bearer hf_set"              # what a client without a key would do


def test_several_requests_are_under_way_at_once(server, videos, tmp_path):
    together = threading.Barrier(3, timeout=5)             # breaks unless three requests wait here together
    server.answer = lambda text, count: (len(server.asked) > 3 or together.wait(), judgement())[1]
    curate_clips(videos, tmp_path, server, parallel=3)
    assert not together.broken


@pytest.mark.parametrize("said, scores", [
    ("Answer 1: 8\nAnswer 2: 7.5\nAnswer 3: 0\nAnswer 4: 10\nAnswer 5: 9", [8, 7.5, 0, 10, 9]),
    ("Here you are.\n**Answer 1:** 8/10\nAnswer 2: 7\nAnswer 3: 1 \nAnswer 4: 2\nAnswer 5: 3\n", [8, 7, 1, 2, 3]),
    ("Answer 1: 8\nAnswer 2: 7\nAnswer 3: 1\nAnswer 4: 2", None), ("", None), ("I cannot judge this.", None),
    ("Answer 1: 8\nAnswer 2: 7\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 11", None),
    ("Answer 1: 8\nAnswer 2: 7\nAnswer 3: -1\nAnswer 4: 2\nAnswer 5: 1", None),
    ("Answer 1: 8\nAnswer 2: good\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 1\nAnswer 6: 4", None),
    ("Answer 1: 8\nAnswer 1: 7\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 1", None), ("8\n7\n1\n2\n1", None)])
def test_scores_are_five_numbers_or_none(said, scores):
    assert judging.verdict.read_scores(said) == scores


def five(*scores):
    return "\n".join(f"Answer {i}: {score}" for i, score in enumerate(scores, start=1))


def ask_for_verdicts(methods, shots, file, server):
    judging.verdict.main(judging.verdict.Options(videos=str(methods), bench=str(shots), out=str(file), parallel=1, **server.options))


def test_the_verdict_is_table_2_and_can_be_made_again_without_asking(server, shots, methods, tmp_path, capsys):
    def answer(text, count):
        assert count == 9 and "{" not in text.replace("{x}", "")
        if "walks" in text and "human quality of" in text:
            return "no"
        return five(10, 10, 10, 10, 10) if "text alignment of" in text else five(8, 7, 6, 5, 4)

    server.answer, file = answer, tmp_path / "verdict.jsonl"
    two = shutil.copytree(methods, tmp_path / "methods", ignore=shutil.ignore_patterns("gamma*"))
    ask_for_verdicts(two, shots, file, server)
    table, asked = capsys.readouterr().out, len(server.asked)
    assert asked == 2 * (2 * 4 + 1)                        # what cannot be read is asked twice
    assert "| alpha-method | 60.00 [60.0, 60.0] | 100.00 [100.0, 100.0] | 60.00 [60.0, 60.0] | 60.00 [60.0," in table
    assert "left out for lack of five numbers from 0 to 10: alpha-method walk-12 human quality, " in table
    assert table.count("walk-12") == 2
    assert sum(HOSTILE.strip() in text for text, *_ in server.asked) == 2 * 4
    ask_for_verdicts(two, shots, file, server)
    judging.verdict.main(judging.verdict.Options(out=str(file)))
    assert capsys.readouterr().out == 2 * table and len(server.asked) == asked
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:5] + rows[6:]))
    shutil.copy(methods / "beta-method" / "somersault-0.mp4", two / "alpha-method" / "somersault.mp4")
    server.answer = lambda text, count: five(3, 3, 3, 3, 3)
    ask_for_verdicts(two, shots, file, server)
    assert len(server.asked) == asked + 1 + 4              # the missing one, and those about the changed video
    table = capsys.readouterr().out
    judging.verdict.main(judging.verdict.Options(out=str(file)))
    assert capsys.readouterr().out == table                # in which its earlier scores do not count


class Browser:
    """Chromium without a window, by the WebDriver protocol."""

    def __init__(self, folder):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        started = next(line for line in self.driver.stdout if "started successfully" in line)
        flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
                 f"--disable-component-update --disable-sync --user-data-dir={folder / 'profile'}")
        self.url = "http://127.0.0.1:" + re.search(r"port (\d+)", started)[1] + "/session"
        made = self.call("", capabilities={"alwaysMatch": {"goog:chromeOptions": {"args": flags.split()}}})
        self.url, self.downloads = f"{self.url}/{made['sessionId']}", folder / "downloads"
        self.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def call(self, path, **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def cdp(self, command, **parameters):
        return self.call("/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, page):
        self.call("/url", url=page.as_uri())

    def run(self, script, *arguments):
        return self.call("/execute/sync", script=f"return {script}", args=arguments)

    def press(self, keys):
        """Keys as a person types them, one after the other; \\ue007 is Enter and \\ue00c Escape."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def downloaded(self, name):
        """The content of a download, once it is there; it is then removed."""
        file = self.downloads / name
        for _ in range(200):
            if file.is_file():
                content = file.read_text(encoding="utf-8")
                file.unlink()
                return content
            time.sleep(0.02)
        raise AssertionError(f"no download {name}, but {[*self.downloads.glob('*')]}")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not shutil.which("chromedriver"):
        pytest.skip("there is no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    with urllib.request.urlopen(urllib.request.Request(browser.url, method="DELETE")):
        browser.driver.terminate()


PLAYING = "[...document.querySelectorAll('video')].every(video => video.videoWidth && !video.paused)"


def until(browser, script):
    for _ in range(200):
        if browser.run(script):
            return
        time.sleep(0.02)
    raise AssertionError(f"never: {script}")


def test_a_study_is_rated_by_keyboard_reloaded_saved_and_tallied(browser, study, tmp_path, capsys):
    browser.open(study / "study.html")
    browser.press("Ann Ø\ue007")
    until(browser, PLAYING)
    assert browser.run("document.getElementById('caption').textContent") == HOSTILE.strip()
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
    by_row = np.array([answers["ratings"][clip] for clip in answers["orders"][0]]).T     # as typed: row by row
    assert by_row.ravel().tolist() == [1, 2, 3, 4, 5] * 3
    assert sorted(answers["orders"][0]) == sorted(clips[0] for clips in key["clips"].values())
    assert "1 raters, 2 prompts" in print_tally(study, [answers], tmp_path, capsys)
    browser.run("document.getElementById('other').click()")
    browser.press("Bob\ue007")
    assert browser.run("[state.rater, state.page, state.ratings]") == ["Bob", 0, {}]


@pytest.mark.slow
def test_of_a_hundred_pages_each_has_its_own_order_and_none_can_be_left_out(browser, tmp_path):
    many = dict(study="many", pages=[{"caption": f"{i}", "clips": [f"{i}a", f"{i}b", f"{i}c"]} for i in range(100)])
    vlm.write_page("study.html", tmp_path / "study.html", many)
    browser.open(tmp_path / "study.html")
    browser.press("Ann\ue007")
    orders = browser.run("state.orders.map(order => order.map(clip => clip.at(-1)).join(''))")
    assert len(orders) == 100 and min(Counter(orders).values()) >= 5 and len({*orders}) == 6      # about 17 of each
    browser.run("pages.forEach((page, i) => { show(i); if (i != 57) for (const row of document.querySelectorAll("
                "'fieldset')) row.querySelectorAll('input')[3].click() }), show(100), save()")
    assert browser.run("state.page") == 57                 # what lacks its ratings is shown instead of saved
    browser.press("2" * 15 + "\ue007")
    browser.run("show(100)")
    browser.press("\ue007")
    ratings = json.loads(browser.downloaded("answers-Ann.json"))["ratings"]
    assert len(ratings) == 300 and ratings["57b"] == [2] * 5 and ratings["99a"] == [4] * 5


def test_a_browser_without_storage_says_so_and_still_saves(browser, study):
    refuse = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no') } })"
    script = browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=refuse)["identifier"]
    try:
        browser.open(study / "study.html")
        browser.press("Ann\ue007")
        assert "does not keep" in browser.run("document.getElementById('notice').textContent")
        browser.press("3" * 15 + "\ue007" + "3" * 15 + "\ue007")
        browser.press("\ue007")
        assert len(json.loads(browser.downloaded("answers-Ann.json"))["ratings"]) == 6
    finally:
        browser.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_clips_are_inspected_by_keyboard_reloaded_and_saved(browser, videos, tmp_path):
    raw = shutil.copytree(videos, tmp_path / "raw #1?&%20'")
    names = [f"../{raw.name}/{number:05d}.mp4" for number in range(4)]
    rows = [dict(file_name=names[i % 4] if i < 4 else f"{i}.mp4", text=HOSTILE, keep=[True, False, None][i % 3],
                 reason="<b>", theme="x") for i in range(100)]
    (tmp_path / "curated").mkdir()
    vlm.write_page("inspect.html", tmp_path / "curated" / "inspect.html", rows)
    browser.open(tmp_path / "curated" / "inspect.html")
    until(browser, PLAYING)
    assert browser.run("[document.getElementById('text').value, document.getElementById('reason').textContent]") == [
        HOSTILE, "<b>"] and browser.run("!window.ran")
    browser.press("dk")                                    # clips 0 and 1
    browser.press("e"), browser.press(" kd"), browser.press("\ue00c" + "u")          # keys in a caption are text
    browser.open(tmp_path / "curated" / "inspect.html")    # a reload in the middle
    assert browser.run("[current, rows[0].keep, rows[1].keep, rows[2].keep]") == [3, False, True, None]
    browser.run("(f => { f.value = 'null'; f.onchange() })(document.getElementById('filter'))")
    assert browser.run("current") == 2
    browser.press("k")                                     # the next that is undecided
    assert browser.run("current") == 5
    assert "32 undecided" in browser.run("document.getElementById('counts').textContent")
    browser.run("(t => { t.value = ' '; t.oninput() })(document.getElementById('text'))")
    browser.press("k")
    assert "needs a caption" in browser.run("document.getElementById('notice').textContent")
    browser.press("\ue00c" + "d" + "s")
    saved = [json.loads(line) for line in browser.downloaded("metadata.jsonl").split("\n")[:-1]]
    changed = {0: dict(keep=False), 1: dict(keep=True), 2: dict(keep=True), 5: dict(keep=False, text=" ")}
    expected = [{**row, **changed.get(i, {})} for i, row in enumerate(rows)]
    expected[2]["text"] = saved[2]["text"]
    assert saved == expected and saved[2]["text"] in (HOSTILE + " kd", " kd" + HOSTILE)
