"""Judging by a model: every server's ways, curation, the verdict."""
import email.utils, json, re, select, shutil, socket, time
from collections import Counter
from pathlib import Path

from tests.helpers import HOSTILE, NAMES
from tests.judges import says, start_server, stop_server

from support import UserError
from support.lists import list_clips
import imageio.v2 as imageio
import numpy as np
import pytest

import judging.curate, judging.verdict
from judging import vlm
from judging.curate import read_judgement
from judging.server import KEY, PATIENCE, TRIAL, Server, ServerOptions, find_proxy

pytest_plugins = "tests.helpers", "tests.judges"

def judgement(**changes):
    """What curate.txt asks for."""
    return json.dumps(dict.fromkeys(judging.curate.CHECKS, "yes") | dict(reason="", description="a figure") | changes)

def ask(server, **options):
    """(answer, reason) of one question to the stub."""
    return Server(ServerOptions(**server.options | options)).ask("What is it?", [b"a picture"], read_judgement)


# ---- Questions ------------------------------------------------------------------------------------------------------

def test_a_question_is_sent_as_every_server_wants_it_and_the_key_is_never_shown(server, monkeypatch):
    server.answer = lambda *_: judgement()
    monkeypatch.delenv(KEY, raising=False)
    ask(server, endpoint=server.options["endpoint"].removesuffix("/v1"))   # which is added
    monkeypatch.setenv(KEY, " mine\n")
    assert ask(server, max_tokens=77) == (judgement(), "")
    (*_, before, first), (text, pictures, body, headers, path) = server.asked
    assert (text, pictures) == ("What is it?", [b"a picture"]) and first == path == "/v1/chat/completions"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 77, 0)
    assert before["Authorization"] is None and headers["Authorization"] == "Bearer mine"
    monkeypatch.setenv(KEY, "a key\nof two lines")
    with pytest.raises(UserError, match=KEY) as error:
        ask(server)
    assert "two lines" not in str(error.value)

def test_other_servers_go_where_the_environment_says(server, monkeypatch):
    proxy, far = start_server(lambda *_: judgement()), "http://far.invalid:81/v1"
    address = f"127.0.0.1:{proxy.server_port}"
    monkeypatch.setenv("http_proxy", f"http://me:secret@{address}")
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        assert find_proxy(f"http://{host}:8000/v1") == ""
    assert ask(server, endpoint=far)[0]
    assert proxy.asked[0][-1] == "http://far.invalid:81/v1/chat/completions" and not server.asked
    proxy.answer = lambda *_: (403, {}, "not from here")
    with pytest.raises(UserError, match=f"by the proxy {address}: 403 not from here") as error:
        ask(server, endpoint=far)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("no_proxy", "far.invalid")
    assert find_proxy(far) == ""
    stop_server(proxy)

DRAFT = judgement(theme="no", reason="a draft")

@pytest.mark.parametrize("said", [
    f"<think>{DRAFT}</think>\n{judgement()}", f"{DRAFT}</think>{DRAFT}</think>{judgement()}",
    [{"type": "thinking", "thinking": DRAFT}, {"type": "text", "text": judgement()}]], ids=["whole", "end", "part"])
def test_what_follows_the_thinking_is_the_answer(said, server):
    server.answer = lambda *_: says(said, finish_reason=None)
    assert ask(server) == (judgement(), "") and len(server.asked) == 1

NO_ANSWERS = {                                             # what it sends, the reason, how often it is asked
    "cut while thinking": (says(f"<think>{DRAFT}", "length"), r"tokens ran out: raise --max-tokens \(8000\)", 2),
    "thinking without an end": (says(f"<think>{DRAFT}"), "thinking without an end", 2),
    "refused": (says(None, refusal="I will not."), "refused: I will not.", 1),
    "filtered": (says(DRAFT, "content_filter"), "ended by content_filter", 2),
    "an error": ((500, {}, "out of memory"), "500 out of memory", 2),
    "a page": ((200, {}, "<html>"), "<html>", 2),
    "a lost connection": (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), "RemoteDisconnected", 2),
    "silence": (lambda handler: select.select([handler.rfile], [], [], 2), "timed out", 2),      # until the client goes
}

@pytest.mark.parametrize("case", NO_ANSWERS)
def test_what_is_no_answer_is_a_reason_in_words(case, server):
    reply, words, askings = NO_ANSWERS[case]
    server.answer = lambda *_: reply
    answer, reason = ask(server, timeout=0.1)
    assert answer == "" and re.search(f"^no answer: .*{words}", reason)
    temperatures = [body["temperature"] for _, _, body, _, _ in server.asked]
    assert temperatures == [0, 0.7][:askings]              # a second answer may differ

def test_a_busy_server_is_waited_for_as_it_asks_and_may_want_other_parameters(server, slept):
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    replies = [(429, {"Retry-After": 10}, "slow down"), (503, {"Retry-After": soon}, ""), (502, {}, ""),
               (400, {}, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
               (400, {}, "Unsupported value: 'temperature' does not support 0"), judgement(), judgement()]
    server.answer, client = lambda *_: replies.pop(0), Server(ServerOptions(**server.options))
    for _ in range(2):                                     # what was learned is not asked again
        assert client.ask("", [], read_judgement) == (judgement(), "")
    assert slept == [10, pytest.approx(29, abs=2), 4]
    body = server.asked[-1][2]
    assert body["max_completion_tokens"] == 8000 and not {"max_tokens", "temperature"} & body.keys()

@pytest.mark.parametrize("status", [307, 401, 404])
def test_what_every_question_would_meet_ends_the_run_and_no_redirection_is_followed(status, server, slept):
    place = server.options["endpoint"]
    server.answer = lambda *_: (status, {"Location": f"{place}/elsewhere"}, '{"detail": "no"}')
    with pytest.raises(UserError, match=re.escape(place) + f'.*: {status} .*"no"'):
        ask(server)
    assert len(server.asked) == 1 and not slept

def test_a_server_that_goes_away_is_waited_for_and_one_that_is_not_there_is_named(slept):
    server = start_server(lambda *_: judgement())
    client = Server(ServerOptions(**server.options))
    assert client.ask("", [], read_judgement)[0]
    stop_server(server)
    with pytest.raises(UserError, match="ConnectionRefusedError.*the same command goes on"):
        client.ask("", [], read_judgement)
    assert slept[:7] == [1, 2, 4, 8, 16, 32, 60] and PATIENCE - 60 < sum(slept) <= PATIENCE == 600
    slept.clear()
    with pytest.raises(UserError, match=re.escape(server.options["endpoint"]) + ".*ConnectionRefusedError"):
        ask(server)
    assert not slept


# ---- Curation -------------------------------------------------------------------------------------------------------

def curate_clips(videos, out, server, **options):
    """The rows that the curation of a folder writes, {stem: row}."""
    options = server.options | dict(theme="figures", videos=str(videos), out=str(out)) | options
    judging.curate.main(judging.curate.Options(**options))
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    return {Path(row["file_name"]).stem: row for row in rows}

def name_for_pictures(file, count):
    """Instead of pictures, the model is shown FOLDER-STEM of a file: for tests that do not look at pictures."""
    return [f"{Path(file).parent.name}-{Path(file).stem}".encode()]

@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A folder with the names of twelve clips, without pictures."""
    monkeypatch.setattr(judging.curate, "frames_as_jpeg", name_for_pictures)
    (tmp_path / "raw").mkdir()
    for number in range(12):
        (tmp_path / "raw" / f"{number:02d}.mp4").touch()
    return tmp_path / "raw"

def by_name(answers):
    """A server's answers to the clips of `raw`; the usual judgement where `answers` has none."""
    return lambda text, pictures, body: answers.get(pictures[0].decode()[4:], judgement())

def asked_for(server):
    return Counter(pictures[0].decode()[4:] for _, pictures, *_ in server.asked)

def test_curating_keeps_drops_and_leaves_undecided(server, videos, tmp_path, capsys):
    raw, out = shutil.copytree(videos, tmp_path / "raw", ignore=shutil.ignore_patterns("*.txt")), tmp_path / "a b"
    (raw / "more").mkdir()
    (raw / "more" / "broken.mp4").write_bytes(b"no video")
    answers = [f"Sure: ```{judgement(theme=True, clean='Yes.')}```",
               judgement(sharp=" NO ", clean=False, reason="blurred"),
               judgement(description=" "), "no",
               judgement(uncut="perhaps"), judgement(description="a second try")]
    server.answer = lambda *_: answers[len(server.asked) - 1]
    rows = curate_clips(raw, out, server, parallel=1)
    assert [rows[name]["keep"] for name in NAMES] == [True, False, None, True] and rows["broken"]["keep"] is False
    assert rows["00001"]["reason"] == "not sharp, clean: blurred"
    assert "cannot read the answer: no" in rows["00002"]["reason"]
    assert "broken.mp4" in rows["broken"]["reason"] and rows["00003"]["text"] == "a second try"
    assert all(len(pictures) == 8 and "figures" in text for text, pictures, *_ in server.asked)
    first = imageio.imread(server.asked[0][1][0]).astype(int)
    assert np.abs(first - imageio.mimread(raw / "00000.mp4")[0]).mean() < 8
    said = capsys.readouterr().out
    assert "2 clips kept, 2 dropped, 1 undecided" in said and f"python data.py --videos '{out}'" in said
    assert rows == curate_clips(raw, out, server) and len(server.asked) == 6           # nothing is asked again
    assert [clip.file.name for clip in list_clips(out)[0]] == ["00000.mp4", "00003.mp4"]
    with pytest.raises(UserError, match=r"metadata.jsonl: was made with theme figures \(now dogs\)"):
        curate_clips(raw, out, server, theme="dogs")

def test_one_clips_error_is_that_clips_and_is_asked_again_unless_a_person_decides(server, raw, tmp_path):
    faults = {"02": (400, {}, "content_filter"), "05": (413, {}, "too large"), "07": says("", "length"), "09": "hm",
              "10": says("", "length"), "11": says("", "length")}
    server.answer = by_name(faults)
    rows = curate_clips(raw, tmp_path / "out", server)
    assert {name for name, row in rows.items() if row["keep"] is None} == {*faults}
    assert "content_filter" in rows["02"]["reason"] and "413 too large" in rows["05"]["reason"]
    rows["10"]["keep"], rows["11"]["text"] = False, "written by hand"
    vlm.write_json(tmp_path / "out" / "metadata.jsonl", *rows.values())
    server.asked.clear()
    server.answer = by_name({"05": (413, {}, "too large")})
    rows = curate_clips(raw, tmp_path / "out", server)
    assert asked_for(server) == {"02": 1, "05": 1, "07": 1}        # the answer that cannot be read is for a person
    assert [name for name, row in rows.items() if row["keep"] is None] == ["05", "09", "11"]
    assert rows["10"]["keep"] is False and rows["11"]["text"] == "written by hand" and list(rows) == sorted(rows)
    assert (tmp_path / "out" / "inspect.html").read_text().count("413 too large") == 1

def test_a_run_stops_where_the_first_requests_all_fail_alike_but_not_for_filters(server, raw, tmp_path):
    server.answer = lambda *_: (400, {}, f"request {len(server.asked)}: no pictures, please")
    with pytest.raises(UserError, match="no pictures, please"):
        curate_clips(raw, tmp_path / "out", server, parallel=1, vlm="jugde")           # which hinders not the right one
    assert TRIAL <= len(server.asked) < 9                  # a thread may have gone on before all ended
    server.answer = by_name(dict.fromkeys(["00", "01", "02", "03", "04"], (400, {}, "no")))
    assert curate_clips(raw, tmp_path / "out", server, parallel=1)["11"]["keep"]       # begins with those never asked
    assert curate_clips(raw, tmp_path / "out", server)["00"]["keep"] is None           # five are left, and all fail
    server.answer = lambda *_: (400, {}, '{"code": "content_filter"}')
    assert {row["keep"] for row in curate_clips(raw, tmp_path / "other", server).values()} == {None}

def test_what_was_answered_stays_however_a_run_ends(server, raw, tmp_path):
    file, page = tmp_path / "out" / "metadata.jsonl", tmp_path / "out" / "inspect.html"
    server.answer = lambda *_: judgement(description="an é") if len(server.asked) <= 5 else (401, {}, "expired")
    with pytest.raises(UserError, match="401 expired"):
        curate_clips(raw, tmp_path / "out", server, parallel=1)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == page.read_text().count('"keep": true') == 5
    file.write_bytes(b"".join(lines)[:-9])                 # as a killed run may leave it
    server.asked.clear()
    server.answer = lambda *_: judgement(description="an é")
    assert len(curate_clips(raw, tmp_path / "out", server)) == 12
    assert set(asked_for(server)) == {f"{number:02d}" for number in range(4, 12)}
    assert file.read_bytes().startswith(b"".join(lines))
    file.write_bytes(lines[0][:-9] + b"\n" + lines[1])
    with pytest.raises(UserError, match="metadata.jsonl, row 1"):
        curate_clips(raw, tmp_path / "out", server)

def test_raw_folders_are_searched_with_all_that_is_in_them_and_links_are_followed_once(tmp_path):
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    for file in (raw / "a.mp4", raw / "deep" / "er" / "b.MOV", raw / ".cache" / "c.mp4", elsewhere / "d.webm"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (raw / "linked").symlink_to(elsewhere)
    (raw / "deep" / "loop").symlink_to(raw)
    (raw / "same.mp4").symlink_to(raw / "a.mp4")
    videos, left_out = judging.curate.find_videos(raw)
    assert sorted(path.name for path in videos) == ["a.mp4", "b.MOV", "d.webm"]
    assert left_out == {"hidden": 1, "linked twice": 2}


# ---- The verdict ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("said, scores", [
    ("Here you are.\n**Answer 1:** 8/10\nAnswer 2: 7.5\nAnswer 3: 0 \nAnswer 4: 10\nAnswer 5: 3\n", [8, 7.5, 0, 10, 3]),
    ("Draft: Answer 1: 3\nAnswer 1: 8\nAnswer 2: 7\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 3", [8, 7, 1, 2, 3]),
    ("Answer 1: 8\nAnswer 2: 7\nAnswer 3: 1\nAnswer 4: 2", None),
    ("Answer 1: 8\nAnswer 2: 7\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 11", None),
    ("Answer 1: 8\nAnswer 1: 7\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 1", None)])
def test_scores_are_five_numbers_or_none(said, scores):
    assert judging.verdict.read_scores(said) == scores

def five(*scores):
    return "\n".join(f"Answer {i}: {score}" for i, score in enumerate(scores, start=1))

def ask_for_verdicts(methods, shots, file, server, **options):
    options = server.options | dict(videos=str(methods), bench=str(shots), out=str(file), parallel=1) | options
    judging.verdict.main(judging.verdict.Options(**options))

def test_the_verdict_is_table_2_and_can_be_made_again_without_asking(server, shots, methods, tmp_path, capsys):
    def answer(text, pictures, body):
        assert len(pictures) == 9 and "{" not in text.replace("{x}", "")
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
    assert capsys.readouterr().out == table and len(server.asked) == asked
    judging.verdict.main(judging.verdict.Options(out=str(file)))
    assert capsys.readouterr().out == table
    before = file.read_bytes()
    with pytest.raises(UserError, match="was made with vlm judge"):
        ask_for_verdicts(two, shots, file, server, vlm="another")
    assert file.read_bytes() == before

def cells(line):
    """(mean, low, high) of each cell of a printed row."""
    return [tuple(map(float, found)) for found in re.findall(r"(\S+) \[(\S+), (\S+)\]", line)]

def test_repeating_tells_how_often_the_model_repeats_itself(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judging.verdict, "frames_as_jpeg", name_for_pictures)
    bench, methods, file = tmp_path / "bench", tmp_path / "methods", tmp_path / "verdict.jsonl"
    for folder, suffix in ((bench, "png"), (bench, "txt"), (methods / "x", "mp4"), (methods / "y", "mp4")):
        folder.mkdir(parents=True, exist_ok=True)
        for prompt in "abcde":
            (folder / f"{prompt}.{suffix}").write_text(folder.name + prompt)

    def answer(text, pictures, body):
        if body["temperature"] == 0 or "motion quality of" not in text:
            return five(6, 6, 6, 6, 6)
        return five(6, 6, 6, 6, 10)

    server.answer = answer
    ask_for_verdicts(methods, bench, file, server)
    assert "asked again" not in capsys.readouterr().out and len(server.asked) == 2 * 5 * 4
    ask_for_verdicts(methods, bench, file, server, repeat=3, parallel=4)
    temperatures = Counter(body["temperature"] for _, _, body, _, _ in server.asked)
    assert temperatures == {0: 40, 0.7: 80}                # the first askings are there already
    said = capsys.readouterr().out
    assert "motion quality: asked again, the same number in 80 % of 100, 0.80 of 10 apart" in said
    assert [mean for mean, *_ in cells(said.splitlines()[2])] == [60, 60, pytest.approx(60 + 16 / 3, abs=0.01), 60]
    # A video that changes is judged anew, however often it was asked about.
    for video in (methods / "y").iterdir():
        video.write_text("another")
    server.answer = lambda *_: five(4, 4, 4, 4, 4)
    ask_for_verdicts(methods, bench, file, server, parallel=4)
    scores, differences, _ = capsys.readouterr().out.split("\n\n")
    assert [cells(line)[0][0] for line in scores.splitlines()[2:]] == [60, 40]
    assert cells(differences)[0] == (-20, -20, -20)
    askings = Counter(row["asking"] for row in vlm.read_rows(file, "question").values())
    assert askings == {0: 2 * 5 * 4, 1: 5 * 4, 2: 5 * 4}   # what was not asked about again stays, but for y's
