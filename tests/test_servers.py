"""Judging by a model: every server's ways, curation, the verdict."""
import email.utils, json, re, shutil, socket, ssl, subprocess, threading, time
from collections import Counter
from pathlib import Path

from tests.helpers import HOSTILE, NAMES
from tests.judges import Handler, curate_clips, judgement, says, start_server, stop_server

import imageio.v2 as imageio
import numpy as np
import pytest

import data
import judging.curate, judging.verdict
from judging import vlm
from judging.server import KEY, PATIENCE, TRIAL, Server, ServerOptions, chat_address
from model import UserError

pytest_plugins = "tests.helpers", "tests.judges"


def ask(server, read=judging.curate.read_judgement, **options):
    """(answer, reason) of one question to the stub."""
    return Server(ServerOptions(**{**server.options, **options})).ask("What is it?", [b"a picture"], read)


# ---- The way there --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base, address", [
    ("http://localhost:8000", "http://localhost:8000/v1/chat/completions"),
    ("http://localhost:8000/", "http://localhost:8000/v1/chat/completions"),
    ("http://[::1]:8000/v1", "http://[::1]:8000/v1/chat/completions"),
    ("https://a.example/v1beta/openai/", "https://a.example/v1beta/openai/chat/completions"),
    ("https://a.example/api/paas/v4", "https://a.example/api/paas/v4/chat/completions"),
    ("https://a.example/v1/chat/completions", "https://a.example/v1/chat/completions"),
    ("https://a.example/openai/v1?api-version=1", "https://a.example/openai/v1/chat/completions?api-version=1")])
def test_a_base_without_a_path_gets_v1_and_others_stay(base, address):
    assert chat_address(base) == address


@pytest.mark.parametrize("base", ["", "localhost:8000", "ftp://a", "http://", "http://user:word@a/v1", "http://a:b/v1"])
def test_what_is_no_address_is_refused(base):
    with pytest.raises(UserError, match="--endpoint .*expected .*http://localhost:8000/v1"):
        chat_address(base)


def test_a_question_is_sent_as_every_server_wants_it(server):
    server.answer = lambda *_: judgement()
    assert ask(server, max_tokens=77) == (judgement(), "")
    ((text, pictures, body, headers, path),) = server.asked
    assert (text, pictures, path) == ("What is it?", [b"a picture"], "/v1/chat/completions")
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("judge", 77, 0)
    assert headers["Content-Type"] == "application/json" and "urllib" not in headers["User-Agent"]


@pytest.fixture
def proxy():
    """Another server, which records what is sent through it."""
    proxy = start_server(lambda *_: judgement())
    yield proxy
    stop_server(proxy)


def test_a_server_on_this_machine_never_goes_through_a_proxy(server, proxy, monkeypatch):
    server.answer = lambda *_: judgement()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, address in (("http_proxy", f"http://127.0.0.1:{proxy.server_port}"), ("ALL_PROXY", "socks5://127.0.0.1:1")):
        monkeypatch.setenv(name, address)
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            assert ask(server, endpoint=f"http://{host}:{server.server_port}")[0]
    assert len(server.asked) == 6 and not proxy.asked


def test_other_servers_go_where_the_environment_says(server, proxy, monkeypatch):
    address, far = f"127.0.0.1:{proxy.server_port}", dict(endpoint="http://far.invalid:81/v1")
    for name, value in (("http_proxy", f"http://me:secret@{address}"), ("ALL_PROXY", address)):
        monkeypatch.setenv(name, value)
        assert ask(server, **far)[0]
        assert proxy.asked.pop()[-1] == "http://far.invalid:81/v1/chat/completions"
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", f"http://me:secret@{address}")
    monkeypatch.setenv("no_proxy", "far.invalid")
    with pytest.raises(UserError, match="far.invalid") as error:
        ask(server, **far)
    assert "proxy" not in str(error.value) and not proxy.asked
    monkeypatch.delenv("no_proxy")
    proxy.answer = lambda *_: (403, {}, "not from here")
    with pytest.raises(UserError, match=f"by the proxy {address}: 403 not from here") as error:
        ask(server, **far)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("https_proxy", f"http://{address}")
    with pytest.raises(UserError, match=f"by the proxy http://{address}: OSError: Tunnel connection failed: 501"):
        ask(server, endpoint="https://far.invalid")        # the proxy knows no CONNECT


def test_a_proxy_of_another_kind_is_named(server, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1")
    with pytest.raises(UserError, match="ALL_PROXY .*SOCKS.* set https_proxy .* add far.invalid to no_proxy"):
        ask(server, endpoint="https://far.invalid/v1")


def test_key_and_pictures_go_to_the_server_that_was_named_alone(server, proxy, monkeypatch):
    monkeypatch.setenv(KEY, " mine\n")
    monkeypatch.setenv("HF_TOKEN", "hf_set")
    for status in (301, 302, 303, 307, 308):
        server.answer = lambda *_: (status, {"Location": f"http://127.0.0.1:{proxy.server_port}/v1"}, "")
        with pytest.raises(UserError, match=f"{status} http://127.0.0.1:{proxy.server_port}"):
            ask(server)
    assert not proxy.asked and {headers["Authorization"] for *_, headers, _ in server.asked} == {"Bearer mine"}
    monkeypatch.delenv(KEY)
    server.answer = lambda *_: judgement()
    ask(server)
    assert server.asked[-1][3]["Authorization"] is None
    assert not any("hf_set" in str(headers) for *_, headers, _ in server.asked)
    monkeypatch.setenv(KEY, "a key\nof two lines")
    with pytest.raises(UserError, match=KEY) as error:
        ask(server)
    assert "two lines" not in str(error.value)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes the certificate")
def test_a_certificate_is_checked_and_may_be_ones_own(slept, tmp_path, monkeypatch):
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "key", "-out",
                    tmp_path / "certificate", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
                   check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server = start_server(lambda *_: judgement(), lambda sock: context.wrap_socket(sock, server_side=True))
    try:
        secure = dict(endpoint=f"https://localhost:{server.server_port}/v1")
        with pytest.raises(UserError, match="certificate verify failed.*SSL_CERT_FILE"):
            ask(server, **secure)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
        assert ask(server, **secure)[0]
    finally:
        stop_server(server)


# ---- What an answer is ----------------------------------------------------------------------------------------------

DRAFT = judgement(theme="no", reason="a draft")
THOUGHTS = [{"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]}, {"type": "reasoning", "text": DRAFT},
            "so"]
ANSWERS = {                                                # what the server sends, and what its answer is
    "plain": (says(judgement()), judgement()),
    "thinking before it": (says(f"<think>{DRAFT}</think>\n{judgement()}"), judgement()),
    "only the end of the thinking": (says(f"{DRAFT}</think>{judgement()}"), judgement()),
    "thinking twice": (says(f"<think>{DRAFT}</think>{DRAFT}</think>{judgement()}"), judgement()),
    "parts": (says([*THOUGHTS, {"type": "text", "text": judgement()}]), judgement()),
    "no finish_reason": (says(judgement(), None), judgement()),
    "another word for the end": (says(judgement(), "eos_token"), judgement()),
    "thinking in a field of its own": (says(judgement(), reasoning_content=DRAFT), judgement()),
}
NO_ANSWERS = {                                             # …, the reason, how often it is asked
    "cut while thinking": (says(f"<think>{DRAFT}", "length"), r"tokens ran out: raise --max-tokens \(8000\)", 2),
    "cut after a whole draft": (says(DRAFT, "length"), "--max-tokens", 2),
    "cut in a field of its own": (says(None, "length", reasoning_content=DRAFT), "--max-tokens", 2),
    "thinking without an end": (says(f"<think>{DRAFT}"), "thinking without an end", 2),
    "empty": (says(""), "empty", 2),
    "nothing": (says(None), "empty", 2),
    "nothing but thinking": (says(THOUGHTS), "empty", 2),
    "refused": (says(None, refusal="I will not."), "refused: I will not.", 1),
    "filtered": (says(DRAFT, "content_filter"), "ended by content_filter", 2),
    "filtered by a 400": ((400, {}, '{"error": {"code": "content_filter"}}'), '400 .*"content_filter"', 1),
    "too large": ((413, {}, "too large"), "413 too large", 1),
    "not understood": ((422, {}, "a\nb"), "422 a b", 1),
    "an error": ((500, {}, "out of memory"), "500 out of memory", 2),
    "a page": ((200, {}, "<html>"), "<html>", 2),
    "an error as a reply": ((200, {}, '{"error": "busy"}'), "busy", 2),
    "no choices": ((200, {}, '{"choices": []}'), "choices", 2),
    "choices of another kind": ((200, {}, '{"choices": [{"message": "hello"}]}'), "hello", 2),
    "half a reply": (lambda handler: Handler.reply(handler, 200, {}, '{"choices"', 500), "IncompleteRead", 2),
    "a lost connection": (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), "RemoteDisconnected", 2),
    "silence": (lambda handler: handler.server.silent.wait(2), "timed out", 2),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_follows_the_thinking_is_the_answer(case, server):
    reply, answer = ANSWERS[case]
    server.answer = lambda *_: reply
    assert ask(server) == (answer, "") and len(server.asked) == 1


@pytest.mark.parametrize("case", NO_ANSWERS)
def test_what_is_no_answer_is_a_reason_in_words(case, server):
    reply, words, askings = NO_ANSWERS[case]
    server.silent = threading.Event()
    server.answer = lambda *_: reply
    answer, reason = ask(server, timeout=0.1)
    server.silent.set()
    assert answer == "" and re.search(f"^no answer: .*{words}", reason) and len(server.asked) == askings
    temperatures = [body["temperature"] for _, _, body, _, _ in server.asked]
    assert temperatures == [0, 0.7][:askings]              # a second answer may differ


def test_what_cannot_be_read_is_asked_again_and_the_second_answer_counts(server):
    replies = iter(["I like it.", judgement(description="second")])
    server.answer = lambda *_: next(replies)
    assert ask(server) == (judgement(description="second"), "")
    server.answer = lambda *_: "I like it."
    assert ask(server) == ("", "cannot read the answer: I like it.") and len(server.asked) == 4


@pytest.mark.parametrize("yes, no", [("yes", "no"), ("Yes.", " NO "), (True, False), ("true", "False")])
def test_yes_and_no_are_read_however_they_are_said(yes, no):
    read = judging.curate.read_judgement
    all_yes = dict.fromkeys(judging.curate.CHECKS, yes)
    assert read(f"Sure: ```{judgement(**all_yes)}```") == dict(text="a figure", keep=True, reason="")
    bad = judgement(**{**all_yes, "sharp": no, "clean": no}, reason="blurred")
    assert read(bad) == dict(text="a figure", keep=False, reason="not sharp, clean: blurred")
    for other in ("perhaps", None, 1, ""):
        assert read(judgement(**{**all_yes, "uncut": other})) is None
    assert read(judgement(**all_yes, description=" ")) is None and read("{}") is None and read("no") is None
    assert read(judgement(**all_yes, description=None)) is None and read(judgement()[:-9]) is None


def test_a_server_may_want_other_parameters(server, capsys):
    def answer(text, pictures, body):
        if "max_tokens" in body:
            return 400, {}, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        if "temperature" in body:
            return 400, {}, "Unsupported value: 'temperature' does not support 0"
        return judgement()

    server.answer, client = answer, Server(ServerOptions(**server.options))
    for _ in range(2):
        assert client.ask("", [], judging.curate.read_judgement) == (judgement(), "")
    assert len(server.asked) == 4                          # what was learned is not asked again
    assert server.asked[-1][2]["max_completion_tokens"] == 8000
    assert "judge takes no temperature" in capsys.readouterr().out


# ---- Waiting and giving up ------------------------------------------------------------------------------------------

def test_a_busy_server_is_waited_for_as_it_asks(server, slept):
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    waits = [(429, {"Retry-After": 10}, "slow down"), (503, {"Retry-After": soon}, ""), (503, {}, "Loading model"),
             (502, {"Retry-After": "later"}, ""), (429, {"Retry-After": 0}, "")]
    server.answer = lambda *_: waits[len(server.asked) - 1] if len(server.asked) <= len(waits) else judgement()
    told, client = [], Server(ServerOptions(**server.options))
    client.tell = told.append
    assert client.ask("", [], judging.curate.read_judgement)[0]
    assert slept == [10, pytest.approx(29, abs=2), 4, 8, 1]
    assert told[0] == "waiting 10 s: 429 slow down" and told[1] == "" and "503 Loading model" in told[4]


def test_after_ten_minutes_the_run_ends_in_one_line(server, slept):
    server.answer = lambda *_: (503, {}, "Loading model")
    with pytest.raises(UserError, match="503 Loading model.*the same command goes on"):
        ask(server)
    assert slept[:7] == [1, 2, 4, 8, 16, 32, 60] and PATIENCE - 60 < sum(slept) <= PATIENCE == 600
    slept.clear()
    server.answer = lambda *_: (429, {"Retry-After": 3600}, "")
    with pytest.raises(UserError, match="429 .*3600 s"):
        ask(server)
    assert not slept


@pytest.mark.parametrize("status", [401, 402, 403, 404, 407])
def test_what_every_question_would_meet_ends_the_run(status, server, slept):
    server.answer = lambda *_: (status, {}, '{"detail": "no"}')
    with pytest.raises(UserError, match=re.escape(server.options["endpoint"]) + f'.*: {status} .*"no"'):
        ask(server)
    assert len(server.asked) == 1 and not slept


def test_a_server_that_is_not_there_is_named_and_one_that_goes_away_is_waited_for(slept):
    server, read = start_server(lambda *_: judgement()), judging.curate.read_judgement
    client = Server(ServerOptions(**server.options))
    assert client.ask("", [], read)[0]
    stop_server(server)
    with pytest.raises(UserError, match="ConnectionRefusedError"):
        client.ask("", [], read)
    assert sum(slept) > PATIENCE - 60
    slept.clear()
    with pytest.raises(UserError, match=re.escape(server.options["endpoint"]) + ".*ConnectionRefusedError"):
        ask(server)
    assert not slept


# ---- Curation -------------------------------------------------------------------------------------------------------

@pytest.fixture
def raw(tmp_path):
    """A folder with the names of twelve clips, for tests that do not look at pictures."""
    for number in range(12):
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number:02d}.mp4").touch()
    return tmp_path / "raw"


def by_name(answers):
    """A server's answer to the pictures of `names_for_pictures`; the usual judgement where `answers` has none."""
    return lambda text, pictures, body: answers.get(pictures[0].decode()[:-4], judgement())


def asked_for(server):
    return Counter(pictures[0].decode()[:-4] for _, pictures, *_ in server.asked)


def test_curating_keeps_drops_and_leaves_undecided(server, videos, tmp_path, capsys):
    raw, out = shutil.copytree(videos, tmp_path / "raw", ignore=shutil.ignore_patterns("*.txt")), tmp_path / "a b"
    (raw / "more").mkdir()
    (raw / "more" / "broken.mp4").write_bytes(b"no video")
    answers = ["Sure! " + judgement(), judgement(sharp="No", reason="blurred"), judgement()[:-9], "no",
               judgement(uncut="perhaps"), judgement(description="a second try")]
    server.answer = lambda *_: answers[len(server.asked) - 1]
    rows = curate_clips(raw, out, server, parallel=1)
    assert [rows[name]["keep"] for name in NAMES] == [True, False, None, True] and rows["broken"]["keep"] is False
    assert rows["00001"]["reason"] == "not sharp: blurred" and "cannot read the answer: no" in rows["00002"]["reason"]
    assert "broken.mp4" in rows["broken"]["reason"] and rows["00003"]["text"] == "a second try"
    assert all(len(pictures) == 8 and "figures" in text for text, pictures, *_ in server.asked)
    first = imageio.imread(server.asked[0][1][0]).astype(int)
    assert np.abs(first - imageio.mimread(raw / "00000.mp4")[0]).mean() < 8
    said = capsys.readouterr().out
    assert "5 clips" in said and re.search(r"2 clips kept, 2 dropped, 1 undecided, \d+\.\d\d s for each", said)
    assert f"python data.py --videos '{out}'" in said      # to be pasted
    assert rows == curate_clips(raw, out, server) and len(server.asked) == 6           # nothing is asked again
    capsys.readouterr()
    assert [clip.file.name for clip in data.list_clips(out)[0]] == ["00000.mp4", "00003.mp4"]
    assert "3 clips" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="theme figures"):
        curate_clips(raw, out, server, theme="dogs")


def test_one_clips_error_is_that_clips_and_is_asked_again(server, names_for_pictures, raw, tmp_path, capsys):
    faults = {"02": (400, {}, "content_filter"), "05": (413, {}, "too large"), "07": says("", "length"), "09": "hm"}
    server.answer = by_name(faults)
    (raw / "note.txt").touch()
    rows = curate_clips(raw, tmp_path / "out", server)
    assert {name for name, row in rows.items() if row["keep"] is None} == {*faults}
    assert "content_filter" in rows["02"]["reason"] and "413 too large" in rows["05"]["reason"]
    said = capsys.readouterr().out
    assert "1 without an answer, asked again by the same command: no answer: 413" in said
    assert "raw: 12 clips; left out: 1 of other kinds\n" in said
    server.asked.clear()
    server.answer = by_name({"05": (413, {}, "too large")})
    rows = curate_clips(raw, tmp_path / "out", server)
    assert asked_for(server) == {"02": 1, "05": 1, "07": 1}        # the answer that cannot be read is for a person
    assert {name for name, row in rows.items() if row["keep"] is None} == {"05", "09"} and list(rows) == sorted(rows)
    assert (tmp_path / "out" / "inspect.html").read_text().count("413 too large") == 1


def test_what_a_person_has_written_is_not_asked_about_again(server, names_for_pictures, raw, tmp_path):
    server.answer = lambda *_: says("", "length")
    curate_clips(raw, tmp_path / "out", server)
    file = tmp_path / "out" / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["keep"], rows[1]["text"] = False, "written by hand"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.asked.clear()
    server.answer = lambda *_: judgement()
    rows = curate_clips(raw, tmp_path / "out", server)
    assert rows["00"]["keep"] is False and rows["01"]["text"] == "written by hand"
    assert set(asked_for(server)) == {f"{number:02d}" for number in range(2, 12)}


def test_a_run_stops_where_the_first_requests_all_fail_alike(server, names_for_pictures, raw, tmp_path):
    server.answer = lambda *_: (400, {}, f"request {len(server.asked)}: no pictures, please")
    with pytest.raises(UserError, match="no pictures, please"):
        curate_clips(raw, tmp_path / "out", server, parallel=1)
    assert TRIAL <= len(server.asked) < 9                  # a thread may have gone on before all ended
    server.answer = by_name(dict.fromkeys(["00", "01", "02", "03", "04"], (400, {}, "no")))
    assert curate_clips(raw, tmp_path / "out", server, parallel=1)["11"]["keep"]       # begins with those never asked
    assert curate_clips(raw, tmp_path / "out", server)["00"]["keep"] is None           # five are left, and all fail
    for name in ("20", "21"):
        (raw / f"{name}.mp4").touch()
    server.answer = lambda *_: (400, {}, "no")
    assert curate_clips(raw, tmp_path / "out", server)["20"]["keep"] is None           # so do two that are new


def test_filters_alone_stop_no_run(server, names_for_pictures, raw, tmp_path):
    server.answer = lambda *_: (400, {}, '{"code": "content_filter"}')
    assert {row["keep"] for row in curate_clips(raw, tmp_path / "out", server).values()} == {None}


def test_what_was_answered_stays_however_a_run_ends(server, names_for_pictures, raw, tmp_path, monkeypatch):
    file, page, whole = tmp_path / "out" / "metadata.jsonl", tmp_path / "out" / "inspect.html", []
    write = vlm.write_json
    monkeypatch.setattr(vlm, "write_json", lambda *rows: (whole.append(rows), write(*rows)))
    server.answer = lambda *_: judgement(description="an é") if len(server.asked) <= 5 else (401, {}, "expired")
    with pytest.raises(UserError, match="401 expired"):
        curate_clips(raw, tmp_path / "out", server, parallel=1)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(whole) == 1 and len(lines) == page.read_text().count('"keep": true') == 5       # each was added alone
    file.write_bytes(b"".join(lines)[:-9])                 # as a killed run may leave it
    server.asked.clear()
    server.answer = lambda *_: judgement(description="an é")
    assert len(curate_clips(raw, tmp_path / "out", server)) == 12 and set(asked_for(server)) == {
        f"{number:02d}" for number in range(4, 12)}
    assert len(whole) == 3 and file.read_bytes().startswith(b"".join(lines))
    file.write_bytes(lines[0][:-9] + b"\n" + lines[1])
    with pytest.raises(UserError, match="metadata.jsonl, row 1"):
        curate_clips(raw, tmp_path / "out", server)


def test_several_requests_are_under_way_at_once(server, names_for_pictures, raw, tmp_path):
    together = threading.Barrier(3, timeout=5)             # breaks unless three requests wait here together

    def answer(*_):
        if len(server.asked) <= 3:
            together.wait()
        return judgement()

    server.answer = answer
    curate_clips(raw, tmp_path / "out", server, parallel=3)
    assert not together.broken


def test_raw_folders_are_searched_as_they_are(tmp_path):
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    for file in ("a.mp4", "deep/er/b.MOV", "note.txt", ".hidden.mp4", ".cache/c.mp4"):
        (raw / file).parent.mkdir(parents=True, exist_ok=True)
        (raw / file).touch()
    elsewhere.mkdir()
    (elsewhere / "d.webm").touch()
    (raw / "linked").symlink_to(elsewhere)
    (raw / "linked again").symlink_to(elsewhere)
    (raw / "deep" / "loop").symlink_to(raw)
    (raw / "same.mp4").symlink_to(raw / "a.mp4")
    videos, left_out = judging.curate.find_videos(raw)
    assert sorted(path.name for path in videos) == ["a.mp4", "b.MOV", "d.webm"]
    assert left_out == {"hidden": 2, "of other kinds": 1, "linked twice": 3}


# ---- The verdict ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("said, scores", [
    ("Answer 1: 8\nAnswer 2: 7.5\nAnswer 3: 0\nAnswer 4: 10\nAnswer 5: 9", [8, 7.5, 0, 10, 9]),
    ("Here you are.\n**Answer 1:** 8/10\nAnswer 2: 7\nAnswer 3: 1 \nAnswer 4: 2\nAnswer 5: 3\n", [8, 7, 1, 2, 3]),
    ("Draft: Answer 1: 3\nAnswer 1: 8\nAnswer 2: 7\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 3", [8, 7, 1, 2, 3]),
    ("Answer 1: 8\nAnswer 2: 7\nAnswer 3: 1\nAnswer 4: 2", None), ("", None), ("I cannot judge this.", None),
    ("Answer 1: 8\nAnswer 2: 7\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 11", None),
    ("Answer 1: 8\nAnswer 2: 7\nAnswer 3: -1\nAnswer 4: 2\nAnswer 5: 1", None),
    ("Answer 1: 8\nAnswer 2: good\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 1\nAnswer 6: 4", None),
    ("Answer 1: 8\nAnswer 1: 7\nAnswer 3: 1\nAnswer 4: 2\nAnswer 5: 1", None), ("8\n7\n1\n2\n1", None)])
def test_scores_are_five_numbers_or_none(said, scores):
    assert judging.verdict.read_scores(said) == scores


def five(*scores):
    return "\n".join(f"Answer {i}: {score}" for i, score in enumerate(scores, start=1))


def ask_for_verdicts(methods, shots, file, server, **options):
    options = {**server.options, "parallel": 1, **options}
    judging.verdict.main(judging.verdict.Options(videos=str(methods), bench=str(shots), out=str(file), **options))


def print_verdicts(file, capsys):
    capsys.readouterr()
    judging.verdict.main(judging.verdict.Options(out=str(file)))
    return capsys.readouterr().out


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
    assert capsys.readouterr().out == table == print_verdicts(file, capsys) and len(server.asked) == asked
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5] + lines[6:]))
    shutil.copy(methods / "beta-method" / "somersault-0.mp4", two / "alpha-method" / "somersault.mp4")
    server.answer = lambda *_: five(3, 3, 3, 3, 3)
    ask_for_verdicts(two, shots, file, server)
    assert len(server.asked) == asked + 1 + 4              # the missing one, and those about the changed video
    assert capsys.readouterr().out == print_verdicts(file, capsys)                     # its earlier scores do not count
    before, other = file.read_bytes(), shutil.copytree(shots, tmp_path / "other")
    (other / "walk-12.txt").write_text("another caption")
    for note in two.glob("*/bench.json"):
        note.unlink()
    for words, bench, changes in (("vlm judge", shots, dict(vlm="another")), ("bench ", other, {})):
        with pytest.raises(UserError, match=words):
            ask_for_verdicts(two, bench, file, server, **changes)
    with pytest.raises(UserError, match="--repeat 0"):
        ask_for_verdicts(two, shots, file, server, repeat=0)
    assert file.read_bytes() == before


def rate_by_method(scores):
    """Answers for videos that `names_for_pictures` names; `scores` {(method's letter, prompt's letter): number}."""
    def answer(text, pictures, body):
        method, prompt = pictures[1].decode().split(".")[0].split("-")
        return five(*[scores[method, prompt]] * 5)
    return answer


@pytest.fixture
def many(tmp_path, monkeypatch):
    """(bench, methods) of five prompts and three methods, without pictures: a video is named METHOD-PROMPT."""
    for prompt in "abcde":
        (tmp_path / "bench").mkdir(exist_ok=True)
        (tmp_path / "bench" / f"{prompt}.png").write_text(prompt)
        (tmp_path / "bench" / f"{prompt}.txt").write_text(prompt)
        for method in "xyz":
            (tmp_path / "methods" / method).mkdir(parents=True, exist_ok=True)
            (tmp_path / "methods" / method / f"{prompt}.mp4").write_text(method + prompt)

    def name(file, count):
        return [f"{Path(file).parent.name}-{Path(file).stem}.".encode()]

    monkeypatch.setattr(judging.verdict, "frames_as_jpeg", name)
    return tmp_path / "bench", tmp_path / "methods"


def cells(line):
    """(mean, low, high) of each cell of a printed row."""
    return [tuple(map(float, found)) for found in re.findall(r"(\S+) \[(\S+), (\S+)\]", line)]


def test_differences_are_taken_pair_by_pair(server, many, tmp_path, capsys):
    bench, methods = many
    level = dict(zip("abcde", [1, 9, 2, 8, 5]))
    scores = {(m, p): level[p] + better for m, better in (("x", 0), ("y", 1), ("z", 0)) for p in level}
    scores["z", "a"] = 6                                   # one outlier: an interval that holds 0
    server.answer = rate_by_method(scores)
    ask_for_verdicts(methods, bench, tmp_path / "verdict.jsonl", server, parallel=4)
    tables = capsys.readouterr().out.split("\n\n")
    rows = [line for line in tables[0].splitlines() if line.startswith(("| x", "| y", "| z"))]
    assert [cells(row)[0][0] for row in rows] == [50, 60, 60]
    assert all(high - low > 20 for row in rows for _, low, high in cells(row))         # prompts differ much
    assert tables[1].startswith("| minus x, points |") and "| x |" not in tables[1]
    y, z = [cells(line) for line in tables[1].splitlines() if line.startswith(("| y", "| z"))]
    assert y == [(10, 10, 10)] * 4                         # but on every prompt y is better by the same
    assert all(mean == 10 and low == 0 and high >= 20 for mean, low, high in z)
    assert "| y | +10.00 [+10.0, +10.0]" in tables[1]


def test_repeating_tells_how_often_the_model_repeats_itself(server, many, tmp_path, capsys):
    bench, methods = many
    shutil.rmtree(methods / "z")
    file, temperatures = tmp_path / "verdict.jsonl", Counter()

    def answer(text, pictures, body):
        temperatures[body["temperature"]] += 1
        if body["temperature"] == 0 or "motion quality of" not in text:
            return five(6, 6, 6, 6, 6)
        return five(6, 6, 6, 6, 10)

    server.answer = answer
    ask_for_verdicts(methods, bench, file, server)
    assert "asked again" not in capsys.readouterr().out and len(server.asked) == 2 * 5 * 4
    ask_for_verdicts(methods, bench, file, server, repeat=3, parallel=4)
    assert temperatures == {0: 40, 0.7: 80}               # the first askings are there already
    said = capsys.readouterr().out
    assert "motion quality: asked again, the same number in 80 % of 100, 0.80 of 10 apart" in said
    assert "human quality: asked again, the same number in 100 % of 100, 0.00 of 10 apart" in said
    assert [mean for mean, *_ in cells(said.splitlines()[2])] == [60, 60, pytest.approx(60 + 16 / 3, abs=0.01), 60]
    assert print_verdicts(file, capsys) == said


def test_a_video_that_changes_is_judged_anew_however_often_it_was_asked_about(server, many, tmp_path, capsys):
    bench, methods = many
    file = tmp_path / "verdict.jsonl"
    server.answer = lambda *_: five(2, 2, 2, 2, 2)
    ask_for_verdicts(methods, bench, file, server, repeat=2, parallel=4)
    for video in (methods / "y").iterdir():
        video.write_text("another")
    server.answer = lambda *_: five(4, 4, 4, 4, 4)
    ask_for_verdicts(methods, bench, file, server, parallel=4)
    said = capsys.readouterr().out.splitlines()
    assert [cells(line)[0][0] for line in said if line.startswith(("| x |", "| y |"))][-3:-1] == [20, 40]
    askings = Counter(row["asking"] for row in vlm.read_rows(tmp_path / "verdict.jsonl", "question").values())
    assert askings == {0: 3 * 5 * 4, 1: 2 * 5 * 4}         # what was not asked about again stays, but for y's


def test_a_question_without_an_answer_is_asked_again(server, many, tmp_path, capsys):
    bench, methods = many
    server.answer = lambda text, pictures, body: (400, {}, "no") if b"y-c." in pictures[1] else five(5, 5, 5, 5, 5)
    ask_for_verdicts(methods, bench, tmp_path / "verdict.jsonl", server)
    assert "left out for lack of five numbers from 0 to 10: y c visual alignment, y c text" in capsys.readouterr().out
    server.asked.clear()
    server.answer = lambda *_: five(5, 5, 5, 5, 5)
    ask_for_verdicts(methods, bench, tmp_path / "verdict.jsonl", server)
    assert len(server.asked) == 4 and "0 to 10: none" in capsys.readouterr().out


def test_a_mistaken_model_hinders_not_the_right_one(server, many, raw, names_for_pictures, tmp_path, capsys):
    def answer(text, pictures, body):
        return five(5, 5, 5, 5, 5) if body["model"] == "judge" else (400, {}, "no model")

    (bench, methods), server.answer = many, answer
    for name in ("jugde", "judge"):
        for ask_model in (lambda: curate_clips(raw, tmp_path / "out", server, vlm=name),
                          lambda: ask_for_verdicts(methods, bench, tmp_path / "verdict.jsonl", server, vlm=name)):
            if name == "judge":
                ask_model()
            else:
                with pytest.raises(UserError, match="no model"):
                    ask_model()
    assert "by judge;" in capsys.readouterr().out


def test_a_verdict_without_answers_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="holds no answers; --videos"):
        judging.verdict.main(judging.verdict.Options(out=str(tmp_path / "none.jsonl")))
