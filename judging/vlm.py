"""One question with pictures to a vision-language model behind an OpenAI-compatible server, and what it answers."""
import base64, json, os, time
from functools import lru_cache
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path

from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from tqdm import tqdm

from data import (SUFFIXES, check_metadata, decode, open_image, picture_filters, read_lines, read_video_header,
                  whole_file, write_json)
from model import UserError

HERE = Path(__file__).parent                               # of the pages and questions
KEY = "VLM_API_KEY"                                        # the environment variable that holds the server's key


@lru_cache(maxsize=64)                                     # the verdict asks about a video four times
def frames_as_jpeg(video, count):
    """`count` frames of a whole clip, evenly spaced in time, or a picture, as a record shows them: JPEG files of at
    most 768 pixels a side."""
    suffix = Path(video).suffix.lower()
    if count == 1 and (suffix in SUFFIXES["picture"] or suffix not in SUFFIXES["video"]):
        image, file = open_image(video), BytesIO()
        image.thumbnail((768, 768))
        image.save(file, "JPEG", quality=95)
        return [file.getvalue()]
    film = read_video_header(video)
    _, pictures = decode(video, film, "null", "-f", "null", "-")
    seconds = pictures[-1].time + max(0.04, pictures[-1].duration)     # as long as the last picture is shown
    smaller = "min(1,768/max(iw*sar,ih))"                  # never larger
    fit = f"scale=w='max(1,round(iw*sar*{smaller}))':h='max(1,round(ih*{smaller}))':flags=area"
    filters = picture_filters(film, fit, instants=[f"fps={count / seconds}"])
    filters += ",scale=out_color_matrix=bt601:out_range=pc,format=yuvj444p"                    # a JPEG's colours
    coding = "-c:v", "mjpeg", "-q:v", "3", "-f", "image2pipe"
    made, _ = decode(video, film, filters, "-frames:v", str(count), *coding, "-")
    start = b"\xff\xd8\xff"                               # of a JPEG, and never inside one
    if start not in made:
        raise UserError(f"{video}: shows no picture")
    return [start + rest for rest in made.split(start)[1:]]


def ask(options, text, images, read):
    """The answers of --vlm to a text with JPEG images: one, or two where `read` makes None of the first. Raises
    UserError, with the address, where the server is absent, silent or answers with an error three times."""
    if not options.endpoint.startswith("http") or not options.vlm:
        raise UserError(f"--endpoint {options.endpoint} --vlm {options.vlm}: expected the address of an OpenAI-"
                        "compatible server, such as http://localhost:8000/v1, and the name of a model there")
    # With a key of its own, if only a made-up one: else the client would send the user's hub token.
    client = InferenceClient(base_url=options.endpoint, api_key=os.environ.get(KEY) or "none", timeout=options.timeout)
    urls = ["data:image/jpeg;base64," + base64.b64encode(image).decode() for image in images]
    content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
    answers, failures = [], 0
    while not answers or len(answers) < 2 and read(answers[-1]) is None:
        try:
            reply = client.chat_completion([{"role": "user", "content": content}], model=options.vlm, max_tokens=1000,
                                           temperature=0.7 * len(answers))     # the second answer may differ
            answers.append(reply.choices[0].message.content or "")
        except (HTTPError, OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            failures += 1
            status = e.response.status_code if isinstance(e, HfHubHTTPError) else None
            if failures == 3 or status in (400, 401, 403, 404, 413, 422):      # at these another try would not help
                reason = f"{status} {e.response.text or e}" if status else f"{type(e).__name__}: {e}"
                raise UserError(f"{options.endpoint}: {' '.join(reason.split()):.300}; "
                                "what was answered is kept, the same command goes on from here") from e
            time.sleep(failures ** 2)
    return answers


def read_rows(file, key, **asked):
    """{row[key]: row} of the JSON lines that an earlier call wrote. Raises UserError if it `asked` otherwise."""
    rows = {}
    for number, line in enumerate(read_lines(file) if file.is_file() else [], start=1):
        try:
            row = json.loads(line)
            rows[row[key]] = row
        except (ValueError, TypeError, LookupError) as e:
            raise UserError(f"{file}, row {number}: is not one that this command wrote; give another --out") from e
        check_metadata(file, row, asked)
    return rows


def ask_about(jobs, judge, file, key, options, **asked):
    """Return {job: row}. Rows that are in `file` stay; judge(job) makes the others, --parallel at a time, and each is
    written to `file` as it comes. row[key] is the job. Raises UserError if rows in `file` were `asked` otherwise."""
    rows = read_rows(file, key, **asked)
    todo = [job for job in jobs if job not in rows]
    with ThreadPool(max(1, options.parallel)) as pool:     # its threads do not outlive an interruption
        for row in tqdm(pool.imap_unordered(judge, todo), desc=f"asking {options.vlm}", total=len(todo)):
            rows[row[key]] = row
            write_json(file, *rows.values())
    return rows


def write_page(template, path, content):
    """A page of this folder with its content, which the page reads as JSON: no text in it can end the script or run."""
    page = (HERE / template).read_text(encoding="utf-8")
    with whole_file(path) as part:
        part.write_text(page.replace("{{content}}", json.dumps(content).replace("<", "\\u003c")), encoding="utf-8")
