"""What the tests of judging share: a stub that behaves like servers do, a browser, a study."""
import base64, json, re, shutil, subprocess, threading, time, urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import judging.curate, judging.study, judging.tally, judging.verdict


# ---- A server -------------------------------------------------------------------------------------------------------

def says(content, finish_reason="stop", **message):
    """What a server sends that answers: (status, headers, body)."""
    message = {"role": "assistant", "content": content, **message}
    choices = [{"index": 0, "finish_reason": finish_reason, "message": message}]
    return 200, {}, json.dumps({"id": "1", "created": 1, "model": "judge", "choices": choices})


class Handler(BaseHTTPRequestHandler):
    """Hands each request to `server.answer(text, pictures, body)`, which returns (status, headers, body), the words of
    an answer, or a function that does something else with the connection. `server.asked` fills with what was asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *urls, text = body["messages"][0]["content"]
        prefix = "data:image/jpeg;base64,"
        pictures = [base64.b64decode(url["image_url"]["url"].removeprefix(prefix)) for url in urls]
        self.server.asked.append((text["text"], pictures, body, self.headers, self.path))
        answer = self.server.answer(text["text"], pictures, body)
        if callable(answer):
            return answer(self)
        self.reply(*(says(answer) if isinstance(answer, str) else answer))

    def reply(self, status, headers, content, length=None):
        self.send_response(status)
        for name, value in {"Content-Length": length or len(content.encode()), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass


def start_server(answer=None, wrap=None):
    """A server at 127.0.0.1; `wrap` puts its socket into TLS."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if wrap:
        server.socket = wrap(server.socket)
    server.daemon_threads, server.asked, server.answer = True, [], answer
    server.options = dict(endpoint=f"http://127.0.0.1:{server.server_port}/v1", vlm="judge", timeout=5.0)
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
    return server


def stop_server(server):
    server.shutdown()
    server.server_close()


@pytest.fixture
def slept(monkeypatch):
    """The seconds that anything wanted to sleep; nothing does."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


@pytest.fixture(scope="session")
def one_server():
    server = start_server()
    yield server
    stop_server(server)


@pytest.fixture
def server(one_server, slept, monkeypatch):
    """The stub, which nobody has asked anything yet, in an environment without proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    one_server.asked, one_server.answer = [], None
    return one_server


def judgement(**changes):
    """What curate.txt asks for."""
    usual = dict.fromkeys(judging.curate.CHECKS, "yes") | {"reason": "", "description": "a figure"}
    return json.dumps(usual | changes)


def curate_clips(videos, out, server, **options):
    """The rows that the curation of a folder writes, {stem: row}."""
    options = {**server.options, "theme": "figures", **options}
    judging.curate.main(judging.curate.Options(videos=str(videos), out=str(out), **options))
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    return {Path(row["file_name"]).stem: row for row in rows}


@pytest.fixture
def names_for_pictures(monkeypatch):
    """Instead of eight pictures the model is shown the name of the file: for tests that do not look at pictures."""
    def name(video, count):
        return [Path(video).name.encode()]

    monkeypatch.setattr(judging.curate, "frames_as_jpeg", name)
    monkeypatch.setattr(judging.verdict, "frames_as_jpeg", name)


# ---- A study --------------------------------------------------------------------------------------------------------

def write_study(methods, shots, out):
    judging.study.main(judging.study.Options(videos=str(methods), bench=str(shots), out=str(out)))
    return json.loads(Path(f"{out}-key.json").read_text())


@pytest.fixture
def copied_clips(monkeypatch):
    """A list that fills with the clips of a study as they are made: copies, for tests that look at no pictures."""
    made = []

    def write_clip(video, path):
        made.append(path.stem)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, path)

    monkeypatch.setattr(judging.study, "write_clip", write_clip)
    return made


@pytest.fixture(scope="session")
def study(shots, methods):
    return write_study(methods, shots, shots.parent / "study") and shots.parent / "study"


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


# ---- A browser ------------------------------------------------------------------------------------------------------

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

    def open(self, page, width=1280, height=800):
        """A page in a window of that many CSS pixels; a zoom of 200 % halves them."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                 mobile=width < 500)
        self.call("/url", url=page.as_uri())

    def run(self, script, *arguments):
        return self.call("/execute/sync", script=f"return {script}", args=arguments)

    def press(self, keys):
        """Keys as a person types them, one after the other; \\ue007 is Enter and \\ue00c Escape."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def text(self, name):
        return self.run(f"document.getElementById('{name}').innerText")

    def picture(self):
        return base64.b64decode(self.cdp("Page.captureScreenshot")["data"])

    def until(self, script):
        for _ in range(500):
            if self.run(script):
                return
            time.sleep(0.02)
        raise AssertionError(f"never: {script}")

    def downloaded(self, name):
        """The content of a download, once it is there; it is then removed. Chromium first reserves its name, empty."""
        file = self.downloads / name
        for _ in range(500):
            if file.is_file() and file.stat().st_size:
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
