"""What the tests of judging share: a stub that behaves like servers do, a browser, a study."""
import base64, json, os, re, shutil, subprocess, threading, time, urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import judging.study, judging.tally


# ---- A server -------------------------------------------------------------------------------------------------------

def says(content, finish_reason="stop", **message):
    """What a server sends that answers: (status, headers, body)."""
    message = {"role": "assistant", "content": content, **message}
    return 200, {}, json.dumps({"model": "judge", "choices": [{"finish_reason": finish_reason, "message": message}]})

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

    def reply(self, status, headers, content):
        self.send_response(status)
        for name, value in {"Content-Length": len(content.encode()), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, *_):
        pass

def start_server(answer=None):
    """A server at 127.0.0.1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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

@pytest.fixture
def server(slept, monkeypatch):
    """The stub, in an environment without proxies."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    server = start_server()
    yield server
    stop_server(server)


# ---- A study --------------------------------------------------------------------------------------------------------

def write_study(methods, shots, out):
    judging.study.main(judging.study.Options(videos=str(methods), bench=str(shots), out=str(out)))
    return json.loads(Path(f"{out}-key.json").read_text())

@pytest.fixture(scope="session")
def study(shots, methods):
    return write_study(methods, shots, shots.parent / "study") and shots.parent / "study"

def answer_study(study, rater, rate):
    """An answers file: `rate(method, prompt number)` gives the five ratings."""
    key = json.loads(Path(f"{study}-key.json").read_text())
    ratings = {}
    for method, clips in key["clips"].items():
        ratings |= {clip: rate(method, number) for number, clip in enumerate(clips)}
    return {"study": key["study"], "rater": rater, "ratings": ratings}

def print_tally(study, answers, folder, capsys):
    files = [folder / f"{i}.json" for i in range(len(answers))]
    for file, answer in zip(files, answers):
        file.write_text(json.dumps(answer))
    judging.tally.main(judging.tally.Options(answers=files, study=str(study)))
    return capsys.readouterr().out


# ---- A browser ------------------------------------------------------------------------------------------------------

def wait_for(happened, what):
    for _ in range(500):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError(f"never: {what}")

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
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), kind)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def cdp(self, command, **parameters):
        return self.call("/goog/cdp/execute", cmd=command, params=parameters)

    def open(self, page, width=1280, height=800):
        """A page in a window of that many CSS pixels; a zoom of 200 % halves them."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        self.call("/url", url=page.as_uri())

    def run(self, script):
        return self.call("/execute/sync", script=f"return {script}", args=[])

    def press(self, keys):
        """Keys as a person types them, one after the other; \\ue007 is Enter and \\ue00c Escape."""
        actions = []
        for key in keys:
            actions += [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def text(self, name):
        return self.run(f"document.getElementById('{name}').innerText")

    def until(self, script):
        wait_for(partial(self.run, script), script)

    def downloaded(self, name):
        """The content of a download, once it is there; it is then removed. Chromium first reserves its name, empty."""
        file = self.downloads / name
        wait_for(lambda: file.is_file() and file.stat().st_size, name)
        return shutil.move(file, file.with_name("taken")).read_text(encoding="utf-8")

@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    if not shutil.which("chromedriver"):
        pytest.skip("there is no Chromium here")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    with urllib.request.urlopen(urllib.request.Request(browser.url, method="DELETE")):
        browser.driver.terminate()
