"""Which method's videos are better? A vision-language model's scores (App. B.3), as Table 2 of the paper.

    python -m judging.verdict --videos METHODS --bench BENCH --endpoint URL --vlm NAME --out verdict.jsonl --repeat 3
    python -m judging.verdict --out verdict.jsonl                       the tables again, from the answers
"""
import math, re
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from support import UserError
from support.command import command, option
from support.files import check_same, fingerprint_of_file, hash_of, write_json
from support.lists import read_bench
import torch

from judging.server import Server, ServerOptions
from judging.study import list_videos
from judging.tally import DIMENSIONS, print_differences, print_table
from judging.vlm import HERE, ask_about, frames_as_jpeg, is_done, read_rows

JUDGED = DIMENSIONS[:4]                                    # all but overall quality

def read_scores(answer):
    """The numbers of "Answer 1: …" to "Answer 5: …", a line each; None if these are not five from 0 to 10."""
    found = re.findall(r"^ *Answer (\d+): *(\d+(?:\.\d+)?)(?: */ *10)? *$", answer.replace("*", ""), re.MULTILINE)
    scores = [float(score) for _, score in found]
    return scores if [number for number, _ in found] == list("12345") and max(scores) <= 10 else None

def subject(row):
    """What a row is about."""
    return row["method"], row["name"], row["dimension"]

def list_questions(options):
    """({question: (row, text, picture, video)}, the bench's hash): a question about each dimension of every video,
    --repeat times. Its key is a hash of what the model is shown, and the number of the asking."""
    if options.repeat < 1:
        raise UserError(f"--repeat {options.repeat}: expected how often to ask each question, at least 1")
    template, *sections = (HERE / "verdict.txt").read_text(encoding="utf-8").split("\n# ")
    prompts, bench = read_bench(options.bench)
    videos = list_videos(options.videos, prompts, bench)
    questions = {}
    for asking, (method, prompt, video), section in product(range(options.repeat), videos, sections):
        dimension, lines = section.split("\n", 1)
        text = template.format(caption=prompt.caption, dimension=dimension, questions=lines)
        row = dict(method=method, name=prompt.name, dimension=dimension, asking=asking)
        shown = hash_of(*subject(row), text, fingerprint_of_file(prompt.file), fingerprint_of_file(video))
        questions[f"{shown} {asking}"] = row, text, prompt.file, video
    return questions, bench

def ask_verdicts(options, file):
    """Ask about every video in a folder of methods; the answers go to `file`, which keeps them."""
    questions, bench = list_questions(options)
    server = Server(options)
    asked = dict(vlm=options.vlm, bench=bench)
    shown = {subject(row): question.split()[0] for question, (row, *_) in questions.items()}
    answered = filter(is_done, read_rows(file, "question").values())
    kept = []
    for row in answered:
        check_same(file, row, asked)
        if shown.get(subject(row)) in (None, row["question"].split()[0]):      # else the video has changed since then
            kept.append(row)
    write_json(file, *kept)

    def judge(question):
        row, text, image, video = questions[question]
        pictures = [*frames_as_jpeg(image, 1), *frames_as_jpeg(video, 8)]
        # At temperature 0 many servers only repeat themselves, so later askings use another.
        answer, reason = server.ask(text, pictures, read_scores, temperature=0.7 if row["asking"] else 0)
        return dict(question=question, **row, **asked, answer=answer, reason=reason)

    ask_about(questions, judge, server, file, "question", asked)

def print_consistency(scores):
    """How often a later asking gives the numbers of the first; scores (askings, methods, prompts, dimensions, 5)."""
    for d, dimension in enumerate(JUDGED):
        apart = (scores[1:, :, :, d] - scores[0, :, :, d]).abs()
        apart = apart[apart.isfinite()]
        same = 100 * (apart == 0).double().mean()
        print(f"{dimension}: asked again, the same number in {same:.0f} % of {len(apart)}, {apart.mean():.2f} of 10 "
              "apart")

@dataclass
class Options(ServerOptions):
    """Ask a vision-language model about the videos of several methods; without --videos, print what it said."""
    videos: str = option("", "folder with a folder of videos for each method, all of one --bench")
    bench: str = option("", "the pictures with captions that the videos were made of")
    out: str = option("verdict.jsonl", "file for the answers")
    repeat: int = option(1, "askings of each question: more than one tell how often the model repeats itself")

def main(options):
    """Table 2 of the paper: a vision-language model answers five questions about each dimension of every video."""
    file = Path(options.out)
    if options.videos:
        ask_verdicts(options, file)
    rows = read_rows(file, "question").values()
    if not rows:
        raise UserError(f"{file}: holds no answers; --videos, --bench, --endpoint and --vlm ask for them")
    methods, names = sorted({row["method"] for row in rows}), sorted({row["name"] for row in rows})
    askings = 1 + max(row["asking"] for row in rows)
    scores = torch.full((askings, len(methods), len(names), len(JUDGED), 5), math.nan, dtype=torch.float64)
    for row in rows:
        place = row["asking"], methods.index(row["method"]), names.index(row["name"]), JUDGED.index(row["dimension"])
        scores[place] = torch.tensor(read_scores(row["answer"]) or math.nan)
    values = scores.mean(-1).nanmean(0)[None] / 10         # (1, methods, prompts, dimensions), from 0 to 1
    print_table("score, % of the highest", methods, JUDGED, values)
    print_differences(methods, JUDGED, values)
    print(f"by {' and '.join({row['vlm'] for row in rows})}; 95 % intervals over prompts in brackets; answers: {file}")
    if askings > 1:
        print_consistency(scores)
    missing = [" ".join(key) for key, value in zip(product(methods, names, JUDGED), values.flatten()) if value.isnan()]
    print(f"left out for lack of five numbers from 0 to 10: {', '.join(missing) or 'none'}")

if __name__ == "__main__":
    command(main, Options, "judging.verdict")
