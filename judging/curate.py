"""Raw clips to a list (Sec. 4.1): a vision-language model says which clips to keep and describes them; people check.

    python -m judging.curate --videos RAW --theme "people eating and drinking" --endpoint URL --vlm NAME --out DIR
"""
import json, os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import SUFFIXES, command, option
from judging.vlm import HERE, KEY, ask, ask_about, frames_as_jpeg, read_rows, write_page
from model import UserError

CHECKS = "theme", "action", "sharp", "uncut", "clean"      # of curate.txt, in which all are to be true


def read_judgement(answer):
    """{text, keep, reason} in an answer to curate.txt, or None where it is not what that asks for."""
    try:
        found = json.loads(answer[answer.index("{"):answer.rindex("}") + 1])
        verdicts = [found[name].lower() for name in CHECKS]
        reason, text = found["reason"], found["description"].strip()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    failed = [name for name, verdict in zip(CHECKS, verdicts) if verdict == "no"]
    if not {*verdicts} <= {"yes", "no"} or not failed and not text:
        return None
    return dict(text=text, keep=not failed, reason=f"not {', '.join(failed)}: {reason}" if failed else "")


@dataclass
class Options:
    """Let a vision-language model select and describe raw clips."""
    videos: str = option("", "folder of raw clips, searched with all folders in it")
    theme: str = option("", "what the clips are to show, such as: people eating and drinking")
    endpoint: str = option("", f"address of an OpenAI-compatible server; its key: environment variable {KEY}")
    vlm: str = option("", "name of the model there")
    out: str = option("curated", "folder for the list")
    parallel: int = option(4, "requests under way at once")
    timeout: float = option(300.0, "seconds to wait for an answer")


def main(options):
    """Sec. 4.1: a model judges and describes every clip in or below a folder. OUT/metadata.jsonl gets a row for each,
    with keep true, false, or null where the answer could not be read; OUT/inspect.html shows them to a person."""
    out, clips = Path(options.out).resolve(), {}
    for path in sorted(Path(options.videos).resolve().rglob("[!.]*")):
        if path.suffix.lower() in SUFFIXES["video"]:
            clips[Path(os.path.relpath(path, out)).as_posix()] = path
    if not clips or not options.theme:
        raise UserError(f"--videos {options.videos} --theme {options.theme}: expected a folder with videos in or below "
                        "it, and what they are to show")
    asked, file = {"theme": options.theme, "vlm": options.vlm}, out / "metadata.jsonl"
    question = (HERE / "curate.txt").read_text(encoding="utf-8").format(theme=options.theme)

    def judge(name):
        try:
            images = frames_as_jpeg(clips[name], 8)
        except UserError as e:
            return dict(file_name=name, text="", keep=False, reason=str(e), **asked)
        answer = ask(options, question, images, read_judgement)[-1]
        undecided = dict(text="", keep=None, reason=f"cannot read the answer: {answer:.300}")
        return dict(file_name=name, **(read_judgement(answer) or undecided), **asked)

    try:
        rows = ask_about(clips, judge, file, "file_name", options, **asked)
    finally:
        write_page("inspect.html", out / "inspect.html", list(read_rows(file, "file_name").values()))
    kept = Counter(row.get("keep", True) for row in rows.values())
    print(f"{kept[True]} clips kept, {kept[False]} dropped, {kept[None]} undecided: see {options.out}/inspect.html, "
          f"move what it saves to {options.out}/metadata.jsonl, then: python data.py --videos {options.out}")


if __name__ == "__main__":
    command(main, Options, "judging.curate")
