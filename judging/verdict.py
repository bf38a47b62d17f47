"""Which method's videos are better? A vision-language model's scores (App. B.3), as Table 2 of the paper.

    python -m judging.verdict --videos METHODS --bench BENCH --endpoint URL --vlm NAME --out verdict.jsonl
    python -m judging.verdict --out verdict.jsonl                       the table again, from the answers
"""
import math, re
from itertools import product
from pathlib import Path

from dataclasses import dataclass
import torch

from data import command, option
from judging.study import list_videos
from judging.tally import DIMENSIONS, print_table
from judging.vlm import HERE, KEY, ask, ask_about, frames_as_jpeg, read_rows
from sample import hashed, read_bench


def read_scores(answer):
    """The numbers of "Answer 1: …" to "Answer 5: …", a line each; None if these are not five from 0 to 10."""
    found = re.findall(r"^ *Answer (\d+): *(\d+(?:\.\d+)?)(?: */ *10)? *$", answer.replace("*", ""), re.MULTILINE)
    scores = [float(score) for _, score in found]
    return scores if [number for number, _ in found] == list("12345") and max(scores) <= 10 else None


def ask_verdicts(options, file):
    """Ask about each dimension of every video in a folder of methods; the answers go to `file`, which keeps them."""
    template, *sections = (HERE / "verdict.txt").read_text(encoding="utf-8").split("\n# ")
    prompts, bench = read_bench(options.bench)
    asked, jobs = dict(vlm=options.vlm, bench=bench), {}
    for (method, prompt, video), section in product(list_videos(options.videos, prompts, bench), sections):
        dimension, questions = section.split("\n", 1)
        text = template.format(caption=prompt.caption, dimension=dimension, questions=questions)
        row = dict(method=method, name=prompt.name, dimension=dimension)
        jobs[hashed([row, text], prompt.file, video)] = row, text, prompt.file, video

    def judge(about):
        row, text, image, video = jobs[about]
        pictures = [*frames_as_jpeg(image, 1), *frames_as_jpeg(video, 8)]
        return dict(about=about, **row, **asked, answers=ask(options, text, pictures, read_scores))

    ask_about(jobs, judge, file, "about", options, **asked)


@dataclass
class Options:
    """Ask a vision-language model about the videos of several methods; without --videos, print what it said."""
    videos: str = option("", "folder with a folder of videos for each method, all of one --bench")
    bench: str = option("", "the pictures with captions that the videos were made of")
    endpoint: str = option("", f"address of an OpenAI-compatible server; its key: environment variable {KEY}")
    vlm: str = option("", "name of the model there")
    out: str = option("verdict.jsonl", "file for the answers")
    parallel: int = option(4, "requests under way at once")
    timeout: float = option(300.0, "seconds to wait for an answer")


def main(options):
    """Table 2 of the paper: a vision-language model answers five questions about each dimension of every video."""
    file = Path(options.out)
    if options.videos:
        ask_verdicts(options, file)
    rows = read_rows(file, "about").values()
    # Of two rows about one dimension of a video, the later counts: the video has changed since the earlier.
    scores = {(row["method"], row["name"], row["dimension"]): read_scores(row["answers"][-1]) for row in rows}
    methods = sorted({row["method"] for row in rows})
    names = sorted({row["name"] for row in rows})
    asked = list(product(methods, names, DIMENSIONS[:4]))
    values = torch.tensor([sum(scores.get(key) or [math.nan]) / 50 for key in asked])
    print_table("score, % of the highest", methods, DIMENSIONS[:4], values.view(1, len(methods), len(names), 4))
    print(f"by {' and '.join({row['vlm'] for row in rows})}; 95 % intervals over prompts in brackets; answers: {file}")
    left_out = ", ".join(" ".join(key) for key in asked if not scores.get(key))
    print(f"left out for lack of five numbers from 0 to 10: {left_out or 'none'}")


if __name__ == "__main__":
    command(main, Options, "judging.verdict")
