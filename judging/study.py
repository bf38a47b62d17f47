"""Which method's videos are better? A page on which people rate them (App. B.2).

    python -m judging.study --videos METHODS --bench BENCH --out STUDY

METHODS holds a folder for each method, with its videos of the bench. Raters get STUDY/; STUDY-key.json, which tells
what method a clip is of, stays here for judging.tally.
"""
import secrets, shutil
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data import command, option, whole_file, write_json
from judging.vlm import frames_as_jpeg, write_page
from model import UserError, read_json
from sample import hashed, read_bench


def list_videos(folder, prompts, bench):
    """[(method, Clip, the method's first video of it)] of a folder with a folder per method. `prompts` and `bench` are
    what `read_bench` returned. Raises UserError for a method that lacks a video or was made of another bench."""
    videos = []
    for method in sorted(path for path in Path(folder).glob("[!.]*") if path.is_dir()):
        note = method / "bench.json"
        if note.is_file() and read_json(note)["bench"] != bench:
            raise UserError(f"{method}: was made from another bench than --bench, or from what that held before")
        for prompt in prompts:
            one, first = method / f"{prompt.name}.mp4", method / f"{prompt.name}-0.mp4"
            if not one.is_file() and not first.is_file():
                raise UserError(f"{method}: lacks {one.name} (or {first.name}), which --bench asks every method for")
            videos.append((method.name, prompt, one if one.is_file() else first))
    if not videos:
        raise UserError(f"{folder}: holds no folders; expected one per method, with its videos")
    return videos


@dataclass
class Options:
    """Write a page for raters, with the videos of several methods."""
    videos: str = option("", "folder with a folder of videos for each method, all of one --bench")
    bench: str = option("", "the pictures with captions that the videos were made of")
    out: str = option("study", "folder for the page and its clips")


def main(options):
    """OUT/study.html with its clips, for raters, and OUT-key.json, which tells what method a clip is of."""
    prompts, bench = read_bench(options.bench)
    videos = list_videos(options.videos, prompts, bench)
    out, clips, pages = Path(options.out), {}, []
    key = Path(f"{out}-key.json")
    secret = read_json(key)["secret"] if key.exists() else secrets.token_hex(16)     # written again, the same study
    for method, prompt, video in tqdm(videos, desc="copying clips"):
        clip = hashed([secret, method, prompt.name], video)
        clips.setdefault(method, []).append(clip)
        with whole_file(out / "clips" / f"{clip}.mp4") as part:
            shutil.copyfile(video, part)
    for number, (prompt, *beside) in enumerate(zip(prompts, *clips.values())):
        pages.append(dict(caption=prompt.caption, clips=sorted(beside)))
        with whole_file(out / "clips" / f"{number}.jpg") as part:
            part.write_bytes(frames_as_jpeg(prompt.file, 1)[0])
    study = hashed(pages)
    write_json(key, dict(study=study, secret=secret, clips=clips))
    write_page("study.html", out / "study.html", dict(study=study, pages=pages))
    print(f"{len(pages)} pages of {len(clips)} videos in {out}: give raters this folder, without {key}, and collect "
          f"what they save; then: python -m judging.tally --answers answers/*.json --study {out}")


if __name__ == "__main__":
    command(main, Options, "judging.study")
