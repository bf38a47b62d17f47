"""What a model is shown of a video, many questions and a file with a row for each answer, pages for people."""
import json, time
from functools import lru_cache
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from support import UserError
from support.files import check_same, hash_of, whole_file, write_json
from support.films import decode, open_image, picture_filters, read_video_header
from support.lists import SUFFIXES, read_lines
from judging.server import NO_ANSWER, TRIAL

HERE = Path(__file__).parent                               # of the pages and questions

@lru_cache(maxsize=64)                                     # the verdict asks about a video four times
def frames_as_jpeg(video, count):
    """`count` frames of a whole clip, evenly spaced in time, or a picture, looking as they do in a record: JPEG files
    of at most 768 pixels a side."""
    suffix = Path(video).suffix.lower()
    if count == 1 and (suffix in SUFFIXES["picture"] or suffix not in SUFFIXES["video"]):
        image = open_image(video)
        file = BytesIO()
        image.thumbnail((768, 768))
        image.save(file, "JPEG", quality=95)
        return [file.getvalue()]
    film = read_video_header(video)
    _, pictures = decode(video, film, "null", "-f", "null", "-")
    begin, duration = pictures[-1]
    seconds = begin + max(0.04, duration)                   # as long as the last picture is shown
    smaller = "min(1,768/max(iw*sar,ih))"                  # never larger
    fit = f"scale=w='max(1,round(iw*sar*{smaller}))':h='max(1,round(ih*{smaller}))':flags=area"
    filters = picture_filters(film, fit, instants=[f"fps={count / seconds}"])
    filters += ",scale=out_color_matrix=bt601:out_range=pc,format=yuvj444p"                    # a JPEG's colours
    coding = "-c:v", "mjpeg", "-q:v", "3", "-f", "image2pipe"
    made, _ = decode(video, film, filters, "-frames:v", str(count), *coding, "-")
    start = b"\xff\xd8\xff"                               # a JPEG begins so, and never has it inside
    if start not in made:
        raise UserError(f"{video}: shows no picture")
    return [start + rest for rest in made.split(start)[1:]]


# ---- Many questions, and a file with a row for each -----------------------------------------------------------------

def read_rows(file, key):
    """{row[key]: row} of the JSON lines that earlier calls wrote; of two with the same key, the later. Raises UserError
    for any other line, except half a line at the end, which a killed call may leave."""
    rows = {}
    lines = read_lines(file) if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line or "{}")
            if row:
                rows[row[key]] = row
        except (ValueError, TypeError, LookupError) as e:
            if number < len(lines) or file.read_bytes().endswith(b"\n"):
                raise UserError(f"{file}, row {number}: is not one that this command wrote; give another --out") from e
    return rows

def is_done(row):
    """Whether the model or a person has answered. An answer that cannot be read counts: people look at it."""
    decided = row.get("keep") is not None or bool(row.get("text"))
    return decided or not (row.get("reason") or "").startswith(NO_ANSWER)

def append_row(file, row):
    """Add a JSON line to a file. Raises UserError if it cannot be written."""
    try:
        with open(file, "a") as f:
            f.write(json.dumps(row) + "\n")
    except OSError as e:
        raise UserError(f"{file}: cannot be written ({e}); make room, then start again") from e

def ask_about(jobs, judge, server, file, key, asked):
    """({job: row} of all jobs, seconds for each that was asked). judge(job) makes a row, for which row[key] is the job.
    Jobs without a finished row in `file` are judged, several at a time, and each row is added to it at once. Raises
    UserError if rows in it were `asked` in another way."""
    rows = read_rows(file, key)
    for row in filter(is_done, rows.values()):
        check_same(file, row, asked)
    new = [job for job in jobs if job not in rows]         # first, since those that failed may fail again
    todo = new + [job for job in jobs if job in rows and not is_done(rows[job])]
    server.trial = min(TRIAL, len(new)) if len(new) >= TRIAL or not rows else 0
    write_json(file, *rows.values())                       # without the half line that a killed call may leave
    begin = time.time()
    with ThreadPool(max(1, server.options.parallel)) as pool:          # its threads do not outlive an interruption
        bar = tqdm(pool.imap_unordered(judge, todo), f"asking {server.options.vlm}", len(todo))
        server.tell = bar.set_postfix_str
        for row in bar:
            rows[row[key]] = row
            append_row(file, row)
    in_order = {job: rows[job] for job in jobs}            # in whatever order the answers came
    write_json(file, *(in_order | rows).values())
    return in_order, (time.time() - begin) / max(1, len(todo))

def write_page(template, path, content):
    """Write a page of this folder with its content, as JSON in which no text can end the script or run as code."""
    page = (HERE / template).read_text(encoding="utf-8").replace("{{page}}", hash_of(Path(path).resolve()))
    with whole_file(path) as part:
        part.write_text(page.replace("{{content}}", json.dumps(content).replace("<", "\\u003c")), encoding="utf-8")
