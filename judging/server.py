"""A server that speaks OpenAI's protocol: how to reach it, how to ask a question, and what to do if that fails.

Environment: VLM_API_KEY is the server's key. http_proxy, https_proxy, ALL_PROXY and no_proxy apply to other machines; a
server on this machine is asked directly. SSL_CERT_FILE is the file of your own certificate.
"""
import base64, json, os, re, socket, time, urllib.request
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from urllib.error import URLError
from urllib.parse import urlsplit

from support import UserError
from support.command import option

KEY = "VLM_API_KEY"                                        # the environment variable that holds the server's key
PATIENCE = 600                                             # seconds to wait for a busy server
TRIAL = 4                                                  # if so many first requests fail alike, all others would
NO_ANSWER = "no answer"                                    # the reason in a row that is to be asked again begins so

@dataclass
class ServerOptions:
    """What a command that asks a model can be told about the server."""
    endpoint: str = option("", f"address of an OpenAI-compatible server; its key: environment variable {KEY}")
    vlm: str = option("", "name of the model there")
    max_tokens: int = option(8000, "of an answer, with the thinking before it")
    parallel: int = option(4, "requests under way at once")
    timeout: float = option(600.0, "seconds to wait for an answer")


# ---- The way there --------------------------------------------------------------------------------------------------

def chat_address(endpoint):
    """BASE/chat/completions; a BASE without a path gets /v1. Raises UserError if it is not an address."""
    if not re.fullmatch(r"https?://([\w.-]+|\[[\w:.]+\])(:\d+)?(/\S*)?", endpoint):
        raise UserError(f"--endpoint {endpoint}: expected the address of an OpenAI-compatible server, such as "
                        f"http://localhost:8000/v1 (its key goes into {KEY})")
    parts = urlsplit(endpoint)
    base = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return parts._replace(path=f"{base}/chat/completions").geturl()

def is_this_machine(host):
    """Whether a name or address belongs to this machine, so that a socket can be opened on it."""
    with suppress(OSError, UnicodeError):                  # only the proxy may know the name
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as trial:
                trial.bind(address)
                return True
    return False

def find_proxy(address):
    """The proxy that the environment names for an address, or "". Raises UserError for a SOCKS proxy, which urllib does
    not support."""
    parts = urlsplit(address)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not proxy or urllib.request.proxy_bypass(parts.netloc) or is_this_machine(parts.hostname):
        return ""
    if proxy.lower().startswith("socks"):
        raise UserError(f"--endpoint {address}: the proxy of {parts.scheme}_proxy or ALL_PROXY speaks SOCKS, expected "
                        f"HTTP; set {parts.scheme}_proxy to such a one, or add {parts.hostname} to no_proxy")
    return proxy

class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Return every reply, whatever its status, and follow no redirection, which would send key and pictures elsewhere.
    """

    def http_response(self, request, reply):
        return reply

    https_response = http_response


# ---- What goes wrong ------------------------------------------------------------------------------------------------

class Trouble(Exception):
    """Why there is no answer. `action` is what to do: wait, ask again (once), skip the question or stop. `seconds` is
    how long the server asks to wait."""

    def __init__(self, action, words, seconds=0):
        super().__init__(" ".join(words.split())[:300])
        self.action, self.seconds = action, seconds

def action_at(status):
    """What to do after an HTTP status other than success."""
    if status in (429, 502, 503, 504, 529):                # busy, or loading its model
        return "wait"
    if status < 400 or status in (401, 402, 403, 404, 407):            # address, key, money or proxy: all would fail
        return "stop"
    return "again" if status >= 500 or status == 408 else "skip"

def seconds_asked(retry_after):
    """The seconds to wait by a Retry-After header, which is a number or a date; 0 if there is none."""
    with suppress(ValueError, TypeError):
        return max(1.0, float(retry_after))
    with suppress(ValueError, TypeError):
        return max(1.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    return 0

def answer_in(choice, max_tokens):
    """The text of a reply's choice, without the thinking before it. Raises Trouble if it was cut off, refused or is
    empty."""
    content = choice.get("content") or ""
    end = str(choice.get("finish_reason") or "stop").lower()
    if isinstance(content, list):                          # of parts, which may include thinking
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(str(part.get("text")) for part in parts)
    if end in ("length", "max_tokens"):
        raise Trouble("again", f"its tokens ran out: raise --max-tokens ({max_tokens}) or the server's own limit")
    if choice.get("refusal"):
        raise Trouble("skip", f"refused: {choice['refusal']}")
    if end not in ("stop", "eos", "eos_token", "stop_sequence", "end_turn"):           # content_filter, abort, error, …
        raise Trouble("again", f"it ended by {end}")
    answer = re.split(r"</think(?:ing)?>|\[/THINK\]|◁/think▷", str(content))[-1].strip()
    if not answer or "<think>" in answer:
        raise Trouble("again", "it is empty, or thinking without an end")
    return answer


# ---- Questions ------------------------------------------------------------------------------------------------------

class Server:
    """The server of --endpoint and what has been learned about it. All threads share one."""

    def __init__(self, options):
        key = os.environ.get(KEY, "").strip()
        if not options.vlm or not re.fullmatch("[!-~]*", key):
            raise UserError(f"--vlm {options.vlm}: expected the name of a model of the server, and in {KEY} a key "
                            "without blanks and special characters")
        self.options = options
        self.address = chat_address(options.endpoint)
        # Servers behind Cloudflare refuse urllib's own User-Agent.
        self.headers = {"Content-Type": "application/json", "User-Agent": "realdpo"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        proxy = find_proxy(self.address)
        proxies = {urlsplit(self.address).scheme: proxy} if proxy else {}
        self.opener = urllib.request.build_opener(AnyStatus(), urllib.request.ProxyHandler(proxies))
        self.via = f"by the proxy {proxy.rpartition('@')[2]}: " if proxy else ""       # without its password
        self.tokens, self.takes_temperature = "max_tokens", True
        self.answered = False
        self.failures = []
        self.trial = TRIAL
        self.tell = print                                  # called with what is waited for, then with ""

    def ask(self, text, images, read, temperature=0):
        """(the answer to a text with JPEG images, "") or ("", why there is none). Waits if the server is busy; asks
        twice if it fails or if `read` returns None for the answer. Raises UserError if all questions would fail."""
        urls = ["data:image/jpeg;base64," + base64.b64encode(image).decode() for image in images]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]
        waited = 0
        waits = 0
        asked_again = False
        while True:
            try:
                answer = answer_in(self.request(content, temperature), self.options.max_tokens)
                if read(answer) is not None:
                    return answer, ""
                trouble = Trouble("again", answer)
                reason = f"cannot read the answer: {trouble}"
            except Trouble as e:
                trouble, reason = e, f"{NO_ANSWER}: {self.via}{e}"
            if trouble.action == "skip" or trouble.action == "again" and asked_again:
                self.check_trial(trouble)
                return "", reason
            if trouble.action == "stop":
                raise self.end(trouble)
            if trouble.action == "again":
                asked_again, temperature = True, 0.7       # at which the answer may differ
            pause = trouble.seconds or min(60, 2 ** waits)
            waited, waits = waited + pause, waits + 1
            if waited > PATIENCE:
                raise self.end(f"{trouble} (to be waited for: {waited:.0f} s)")
            self.tell(f"waiting {pause:.0f} s: {self.via}{trouble}")
            time.sleep(pause)
            self.tell("")

    def request(self, content, temperature):
        """The message in the reply to one request, with its finish_reason. Raises Trouble if there is none."""
        body = {"model": self.options.vlm, "messages": [{"role": "user", "content": content}],
                self.tokens: self.options.max_tokens}
        if self.takes_temperature:
            body["temperature"] = temperature
        try:
            request = urllib.request.Request(self.address, json.dumps(body).encode(), self.headers)
            with self.opener.open(request, timeout=self.options.timeout) as reply:
                status = reply.status
                headers = reply.headers
                text = reply.read().decode(errors="replace")
        except (OSError, HTTPException, ValueError) as e:
            reason = e.reason if isinstance(e, URLError) else e            # URLError: the server was not reached
            words = f"{type(reason).__name__}: {reason}"
            if not isinstance(e, URLError) or isinstance(reason, (ConnectionResetError, BrokenPipeError)):
                raise Trouble("again", words) from e
            if "CERTIFICATE" in words:
                words += "; SSL_CERT_FILE names the file of a certificate of your own"
            raise Trouble("wait" if self.answered else "stop", words) from e       # it may be started again
        with suppress(ValueError, LookupError, TypeError):
            choice = json.loads(text)["choices"][0]
            message = {**choice["message"], "finish_reason": choice.get("finish_reason")}
            self.answered = True
            return message
        trouble = Trouble("again" if status == 200 else action_at(status),
                          f"{status} {headers['Location'] or ''} {text}", seconds_asked(headers["Retry-After"]))
        # Newer models of OpenAI have another name for max_tokens, and choose their temperature themselves.
        if trouble.action == "skip" and "max_tokens" in body and "max_completion_tokens" in str(trouble):
            self.tokens = "max_completion_tokens"
        elif trouble.action == "skip" and "temperature" in body and "temperature" in str(trouble).lower():
            self.takes_temperature = False
            print(f"{self.options.vlm} takes no temperature: its answers may differ from call to call")
        else:
            raise trouble
        return self.request(content, temperature)

    def check_trial(self, trouble):
        """Raise UserError if nothing was ever answered and the first questions all failed alike."""
        self.failures.append(str(trouble).split()[0])
        filtered = re.search("filter|safety|moderation|policy|sensitive|inappropriate", str(trouble), re.IGNORECASE)
        alike = len(self.failures) >= self.trial > 0 and len({*self.failures}) == 1
        if alike and not self.answered and not filtered:
            raise self.end(trouble)

    def end(self, trouble):
        """The UserError with which all asking ends."""
        return UserError(f"{self.address}: {self.via}{trouble}; what was answered is kept, the same command goes on")
