"""Raw clips to a list (Sec. 4.1): a vision-language model says which clips to keep and describes them; people check.

    python -m judging.curate --videos RAW --theme "people eating and drinking" --endpoint URL --vlm NAME --out DIR
"""
import json, os, shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from support import UserError
from support.command import command, option
from support.lists import SUFFIXES
from judging.server import Server, ServerOptions
from judging.vlm import HERE, ask_about, frames_as_jpeg, is_done, read_rows, write_page

CHECKS = "theme", "action", "sharp", "uncut", "clean"      # of curate.txt; a clip is kept if all are true
VERDICTS = {"yes": True, "true": True, "no": False, "false": False}

def read_judgement(answer):
    """{text, keep, reason} from an answer to curate.txt, or None if it is not in the form that curate.txt asks for."""
    try:
        found = json.loads(answer[answer.index("{"):answer.rindex("}") + 1])
        verdicts = {name: VERDICTS[str(found[name]).strip(" .").lower()] for name in CHECKS}
        text = found["description"].strip()
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    failed = [name for name in CHECKS if not verdicts[name]]
    if not failed and not text:
        return None
    reason = f"not {', '.join(failed)}: {found.get('reason') or 'no reason given'}" if failed else ""
    return dict(text=text, keep=not failed, reason=reason)

def find_videos(folder):
    """(videos in or below a folder, {kind: number} of what is left out). Linked folders are followed, hidden ones are
    not. A file or folder that is reached twice counts once, so loops end."""
    videos = []
    left_out = Counter()
    folders = [folder]
    seen = {os.path.realpath(folder)}
    while folders:
        for path in sorted(folders.pop().iterdir()):
            real = os.path.realpath(path)
            if path.name.startswith("."):
                left_out["hidden"] += 1
            elif real in seen:
                left_out["linked twice"] += 1
            elif path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
                left_out["folders that cannot be read"] += 1
            elif path.is_dir():
                folders.append(path)
            elif path.suffix.lower() in SUFFIXES["video"]:
                videos.append(path)
            else:
                left_out["of other kinds"] += 1
            seen.add(real)
    return videos, left_out

@dataclass
class Options(ServerOptions):
    """Let a vision-language model select and describe raw clips."""
    videos: str = option("", "folder of raw clips, searched with all folders in it")
    theme: str = option("", "what the clips are to show, such as: people eating and drinking")
    out: str = option("curated", "folder for the list")

def main(options):
    """Sec. 4.1: a model judges and describes every clip in or below a folder. OUT/metadata.jsonl gets a row for each,
    with keep true, false, or null if there is no answer; OUT/inspect.html shows them to a person."""
    out, raw = Path(options.out).resolve(), Path(options.videos).resolve()
    videos, left_out = find_videos(raw) if options.videos and raw.is_dir() else ([], {})
    if not videos or not options.theme:
        raise UserError(f"--videos {options.videos} --theme {options.theme}: expected a folder with videos in or below "
                        "it, and what they are to show")
    others = ", ".join(f"{number} {kind}" for kind, number in left_out.items())
    print(f"{options.videos}: {len(videos)} clips; left out: {others or 'nothing'}")
    clips = {Path(os.path.relpath(path, out)).as_posix(): path for path in videos}
    server = Server(options)
    file = out / "metadata.jsonl"
    asked = dict(theme=options.theme, vlm=options.vlm)
    question = (HERE / "curate.txt").read_text(encoding="utf-8").format(theme=options.theme)

    def judge(name):
        row = dict(file_name=name, text="", keep=None, reason="", **asked)
        try:
            images = frames_as_jpeg(clips[name], 8)
        except UserError as e:                             # not a video, or damaged
            return row | dict(keep=False, reason=str(e))
        answer, row["reason"] = server.ask(question, images, read_judgement)
        return row | (read_judgement(answer) or {})

    try:
        rows, seconds = ask_about(clips, judge, server, file, "file_name", asked)
    finally:
        write_page("inspect.html", out / "inspect.html", list(read_rows(file, "file_name").values()))
    kept = Counter(row.get("keep", True) for row in rows.values())
    for reason, number in Counter(row["reason"] for row in rows.values() if not is_done(row)).most_common(3):
        print(f"{number} without an answer, asked again by the same command: {reason}")
    print(f"{kept[True]} clips kept, {kept[False]} dropped, {kept[None]} undecided, {seconds:.2f} s for each that was "
          f"asked about: see {options.out}/inspect.html, move what it saves to {options.out}/metadata.jsonl, then: "
          f"python data.py --videos {shlex.quote(options.out)}")

if __name__ == "__main__":
    command(main, Options, "judging.curate")
