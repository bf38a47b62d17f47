"""Videos out: one picture and one sentence become an mp4, every record of a cache gets its offline negatives, and a
bench of pictures becomes a folder of mp4s, which people and a language model compare with other methods' ones.

    python sample.py --image first.png --prompt "a figure waves its left arm slowly" --out video.mp4
    python sample.py --data CACHE                                      (torchrun --nproc_per_node 8 sample.py … as well)
    python sample.py --bench BENCH --out videos/METHOD                 (torchrun as well)
    python sample.py --study videos --bench BENCH, then --tally answers/*.json; or --verdict videos --bench BENCH …

MODEL is a model folder, a hub id, or the --out folder of a training run. BENCH is a folder of pictures with captions
in any of data.py's three forms. The text encoder, the largest network, leaves before the transformer comes.
"""
import hashlib, json, re, secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import (ASSETS, KEY, SUFFIXES, Records, ask, check_metadata, clip_shape, command, digest, frames_as_jpeg,
                  generator, in_parallel, missing, option, read_image, read_list, read_rows, read_video, this_process,
                  to_uint8, whole_file, write_json, write_page, write_tensors, write_video)
from model import UserError, load_dit, load_text_encoder, load_vae, read_json, resolve
from realdpo import Condition, sample


@dataclass
class Options:
    """Generate videos, or find out which method's are better."""
    model: str = option("", "model folder, hub id, training run or tiny; default: by whether a GPU is here")
    out: str = option("", "where it goes; default: video.mp4, videos, study, or FOLDER/verdict.jsonl")
    image: str = option("", "one video: its first frame, a picture of any size", "What to do")
    data: str = option("", "negatives: the cache of records to make them for")
    bench: str = option("", "a video a picture: the folder of pictures with captions")
    study: str = option("", "write a page for raters: FOLDER has a folder of videos a method, all of one --bench")
    tally: list = option((), "print the table of what raters answered")
    verdict: str = option("", "ask a vision-language model about such a FOLDER; or print a finished verdict.jsonl")
    prompt: str = option("", "what happens; may be empty", "Sampling")
    negatives: int = option(3, "generated videos a record")
    samples: int = option(0, "videos a picture, as NAME-0.mp4 …; default: one, as NAME.mp4")
    steps: int = option(0, "evaluations of the transformer; default: 50 by euler, 25 by multistep")
    guidance: float = option(6.0, "1 = none")
    solver: Literal["euler", "multistep"] = option("", "euler (on CogVideoX: DDIM; default) or multistep (of negatives)")
    frames: int = option(0, "of the video, 8k + 1; default: the model's")
    height: int = option(0, "of the video; default: the model's")
    width: int = option(0, "of the video; default: the model's")
    fps: int = option(8, "of the video")
    gif: bool = option(False, "also write a GIF beside each mp4")
    seed: int = option(0, "of the noise")
    compile: bool = option(False, "compile the transformer's blocks: slow to start, then faster")
    endpoint: str = option("", f"an OpenAI-compatible server's address; its key: environment variable {KEY}", "Verdict")
    vlm: str = option("", "name of the model there")
    parallel: int = option(4, "requests under way at once")
    timeout: float = option(300.0, "seconds to wait for an answer")


def load_denoiser(options, folder, process):
    """The transformer on this process's device, compiled if asked."""
    denoiser = load_dit(folder, process.device, process.dtype)
    if options.compile:
        denoiser.net.compile_blocks()
    return denoiser


def generate(denoiser, record, empty, options, device, *key, shape=None, count=1, progress=True):
    """`count` latents (count,C,F,H,W) of a record's caption and first frame; noise k depends on (*key, k) alone.

    `shape` (C,F,H,W) is that of the record's win, where it has none.
    """
    shape = shape or record["win"].shape
    noise = torch.stack([torch.randn(shape, generator=generator(*key, k)) for k in range(count)]).to(device)
    cond = Condition(record["text"][None].to(device), record["image"][None].to(device)).repeat(count)
    return sample(denoiser, noise, cond, steps=options.steps, guidance=options.guidance, uncond=empty[None].to(device),
                  solver=options.solver, progress=progress)


def negatives(options):
    """The offline stage of Sec. 4.2: `lose` latents for this rank's share of the records that have none yet.

    They are stored as they leave the sampler, never decoded. Ranks never wait for each other.
    """
    process = this_process()
    records = Records(options.data, negatives=False)
    folder = resolve(options.model, "transformer", "scheduler")
    made_by = dict(fingerprint=dict(
        transformer=digest(folder / "transformer"), negatives=options.negatives, steps=options.steps,
        guidance=options.guidance, solver=options.solver, seed=options.seed))
    todo = missing(dict.fromkeys(records.names[process.rank::process.world_size], made_by), Path(options.data) / "lose")
    if todo:
        denoiser, empty = load_denoiser(options, folder, process), records.empty_text()
    for name in tqdm(todo, desc="sampling negatives", disable=process.rank > 0):
        lose = generate(denoiser, records[records.names.index(name)], empty, options, process.device,
                        "negative", options.seed, name, count=options.negatives, progress=False)
        write_tensors(f"{options.data}/lose/{name}.safetensors", {"lose": lose.bfloat16()}, model=folder, **made_by)
    if process.rank == 0:
        print(f"{len(records)} × {options.negatives} negatives in {options.data}/lose; "
              f"next: python train.py --model {options.model} --data {options.data}")


class Prompt(NamedTuple):
    """One row of a bench."""
    name: str                                              # of its videos: NAME.mp4, or NAME-0.mp4 …
    image: Path                                            # a picture, or a clip for its first frame
    caption: str


def first_frame(path, height, width):
    """A picture, or the first frame of a clip: (3,1,height,width)."""
    is_clip = path.suffix.lower() in SUFFIXES["video"] and path.suffix.lower() not in SUFFIXES["picture"]
    return read_video(path, 1, height, width, 1) if is_clip else read_image(path, height, width)


def film(options, shots):
    """Generate and write the video of every shot: a Prompt, a file, and the key that its noise depends on."""
    model, process = options.model, this_process()
    device, dtype = process.device, process.dtype
    frames, height, width = clip_shape(options, resolve(model, "transformer/config.json", "vae/config.json"))
    images = {prompt.image: first_frame(prompt.image, height, width) for prompt, _, _ in shots}    # all, to fail early
    encode_text = load_text_encoder(model, device, dtype)
    texts = {text: encode_text([text])[0] for text in {"", *(prompt.caption for prompt, _, _ in shots)}}
    del encode_text
    torch.cuda.empty_cache()
    vae = load_vae(model, device, dtype)
    for path, image in images.items():
        images[path] = vae.encode(image[None].to(device), generator("image", options.seed))[0]     # (C,1,h,w)
    denoiser = load_denoiser(options, model, process)
    for prompt, file, key in tqdm(shots, desc="videos", disable=process.rank > 0 or len(shots) == 1):
        image = images[prompt.image]
        shape = (image.shape[0], (frames - 1) // 4 + 1, *image.shape[2:])
        latents = generate(denoiser, dict(text=texts[prompt.caption], image=image), texts[""], options, device, *key,
                           shape=shape, progress=len(shots) == 1)
        video = to_uint8(vae.decode(latents)[0])
        write_video(file, video, options.fps)
        if options.gif:
            write_video(file.with_suffix(".gif"), video, options.fps)


def generate_one(options):
    """One picture and one sentence to an mp4."""
    out = Path(options.out or "video.mp4")
    if out.suffix != ".mp4":
        raise UserError(f"--out {out}: expected a name that ends in .mp4")
    film(options, [(Prompt("", Path(options.image), options.prompt), out, ("video", options.seed))])
    print(f"a video in {out}" + (" and .gif" if options.gif else ""))


def read_bench(folder):
    """The Prompts of a folder of pictures with captions. Raises UserError for one that cannot be read."""
    if not folder:
        raise UserError("--bench is missing: the folder of pictures with captions that the videos are made of")
    folder, prompts = Path(folder), {}
    lists = [path.name for path in folder.glob("*.txt") if path.name not in ("images.txt", "videos.txt")]
    for clip in read_list(folder, "images.txt", lists[0] if len(lists) == 1 else "prompts.txt", what="picture"):
        name = str(clip.extra.get("name") or clip.file.stem)
        if not clip.file.is_file():
            raise UserError(f"{clip.where}: {clip.file} is not there")
        if name in prompts or "/" in name:
            raise UserError(f"{clip.where}: is named {name}; expected a name of its own, without a slash")
        prompts[name] = Prompt(name, clip.file, clip.caption)
    return list(prompts.values())


def fingerprint(prompts):
    """A short name for what a bench holds: its names, captions and pictures."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(repr((prompt.name, prompt.caption)).encode() + prompt.image.read_bytes())
    return sha.hexdigest()[:16]


def generate_bench(options):
    """A video, or `samples`, for every picture of a bench: this rank's share of those that are not there yet.

    VBench finds the picture of a video by its name, less a dash and a number at its end; so a name that has these of
    its own gets a number more.
    """
    process, out, shots = this_process(), Path(options.out or "videos"), []
    prompts = read_bench(options.bench)
    folder = resolve(options.model, "transformer", "scheduler")
    names = "steps", "guidance", "solver", "frames", "height", "width", "fps", "seed"
    made_by = {"fingerprint": {"transformer": digest(folder / "transformer"), "bench": fingerprint(prompts),
                               **{name: getattr(options, name) for name in names}}}
    if (out / "bench.json").is_file():
        check_metadata(out / "bench.json", read_json(out / "bench.json"), made_by)
    write_json(out / "bench.json", made_by)
    for prompt in prompts:
        for number in range(max(1, options.samples)):
            ending = f"-{number}" if options.samples or re.search(r"-\d+$", prompt.name) else ""
            shots.append((prompt, out / f"{prompt.name}{ending}.mp4", ("bench", options.seed, prompt.name, number)))
    todo = [shot for shot in shots[process.rank::process.world_size] if not shot[1].exists()]
    if todo:
        film(options, todo)
    if process.rank == 0:
        print(f"{len(shots)} videos of {len(prompts)} prompts in {out}")


# ---- Which method is better? A study with raters (App. B.2), a language model's verdict (App. B.3) ------------------

STUDY = "visual alignment", "text alignment", "motion quality", "human quality", "overall quality"      # Fig. 10


def read_methods(folder, prompts):
    """{method: the first video of every prompt} of a folder with a folder a method. Raises UserError if one lacks."""
    methods = {}
    for path in sorted(path for path in Path(folder).glob("[!.]*") if path.is_dir()):
        if (path / "bench.json").is_file():
            made_by = {"bench": read_json(path / "bench.json")["fingerprint"]["bench"]}
            check_metadata(path, {"fingerprint": made_by}, {"fingerprint": {"bench": fingerprint(prompts)}})
        methods[path.name] = []
        for prompt in prompts:
            one, first = path / f"{prompt.name}.mp4", path / f"{prompt.name}-0.mp4"
            if not one.is_file() and not first.is_file():
                raise UserError(f"{path}: lacks {one.name} (or {first.name}), which --bench asks every method for")
            methods[path.name].append(one if one.is_file() else first)
    if not methods:
        raise UserError(f"{folder}: holds no folders; expected one a method, with its videos")
    return methods


def write_study(options):
    """OUT/study.html with its clips, for raters, and OUT-key.json, which tells what method a clip is of.

    The names of the clips come from a secret in the key: a study that is written again is the same study.
    """
    out, pages, clips, contents = Path(options.out or "study"), [], {}, hashlib.sha256()
    prompts, key = read_bench(options.bench), Path(f"{out}-key.json")
    methods = read_methods(options.study, prompts)
    secret = read_json(key)["secret"] if key.exists() else secrets.token_hex(16)
    for i, prompt in enumerate(tqdm(prompts, desc="copying clips")):
        files = {}
        for method, videos in methods.items():
            clip = hashlib.sha256(f"{secret}/{method}/{prompt.name}".encode()).hexdigest()[:16]
            clips.setdefault(method, []).append(clip)
            files[clip + ".mp4"] = videos[i].read_bytes()
        pages.append(dict(caption=prompt.caption, clips=sorted(Path(file).stem for file in files)))
        files[pages[-1]["clips"][0] + ".jpg"] = frames_as_jpeg(prompt.image, 1)[0]
        for file, content in sorted(files.items()):
            with whole_file(out / "clips" / file) as part:
                part.write_bytes(content)
            contents.update(content)
    contents.update(json.dumps([secret, pages]).encode())
    study = contents.hexdigest()[:16]
    write_json(key, dict(study=study, secret=secret, clips=clips))
    write_page("study.html", out / "study.html", dict(study=study, pages=pages))
    print(f"{len(pages)} pages of {len(methods)} videos in {out}: give raters this folder, without {key}, and collect "
          f"what they save; then: python sample.py --tally answers/*.json --out {out}")


def read_answers(file, key):
    """A rater's name and {clip: five ratings}. Raises UserError for a file cut short or of another study."""
    found = read_json(Path(file))
    study, rater, ratings = found["study"], str(found["rater"]), found["ratings"]
    if study != key["study"]:
        raise UserError(f"{file}: answers study {study}, not {key['study']}; --out names the folder of the study")
    for clip in sum(key["clips"].values(), []):
        five = ratings.get(clip, [])
        if len(five) != len(STUDY) or not all(points in (1, 2, 3, 4, 5) for points in five):
            raise UserError(f"{file}: has not five ratings from 1 to 5 of {clip}; let {rater} go on and save again")
    return rater, ratings


def agreement(ratings):
    """Krippendorff's alpha of ratings (raters, videos) on an interval scale: 1 perfect, 0 by chance."""
    if len(ratings) < 2 or ratings.var() == 0:
        return float("nan")
    return 1 - ratings.var(axis=0, ddof=1).mean() / ratings.var(ddof=1)


def print_table(title, table):
    """Markdown of {row: {column: values (raters, prompts) from 0 to 1}}: the means in per cent and, in brackets, what
    holds 95 % of such means if raters and prompts are drawn again (bootstrap)."""
    columns = list(next(iter(table.values())))
    print(f"| {' | '.join([title, *columns])} |\n|{' --- |' * (len(columns) + 1)}")
    for name, cells in table.items():
        texts = [name]
        for values in cells.values():
            rng, means = np.random.default_rng(0), []
            for _ in range(2000 if values.size else 0):
                raters, prompts = (rng.integers(size, size=size) for size in values.shape)
                means.append(100 * values[raters][:, prompts].mean())
            low, high = np.percentile(means, (2.5, 97.5)) if means else (np.nan, np.nan)
            texts.append(f"{100 * values.mean():.2f} [{low:.1f}, {high:.1f}]" if means else "–")
        print(f"| {' | '.join(texts)} |")
    print()


def tally(options):
    """Table 1 of the paper from raters' answers: ratings in per cent of the highest, and comparisons won."""
    key, raters, ratings, rated, won = read_json(Path(f"{options.out or 'study'}-key.json")), {}, {}, {}, {}
    for file in options.tally:
        rater, answers = read_answers(file, key)
        if rater in raters:
            raise UserError(f"{file}: {rater} has answered in an earlier file, too; give one of the two")
        raters[rater] = answers
    for method, clips in key["clips"].items():
        ratings[method] = np.array([[answers[clip] for clip in clips] for answers in raters.values()])
    for method, mine in ratings.items():                                       # (raters, prompts, 5)
        rated[method] = {name: mine[..., d] / 5 for d, name in enumerate(STUDY)}
        won[method] = {other: (np.sign(mine - theirs)[..., -1] + 1) / 2 for other, theirs in ratings.items()}
    print_table("rating, % of the highest", rated)
    print_table("overall quality, % won against (ties half)", won)
    videos = np.concatenate(list(ratings.values()), axis=1)                    # (raters, all videos, 5)
    alphas = [f"{name} {agreement(videos[..., d]):.2f}" for d, name in enumerate(STUDY)]
    print(f"{len(raters)} raters, {len(clips)} prompts, 95 % intervals over both in brackets; agreement of the raters "
          f"(Krippendorff's alpha, interval scale): {', '.join(alphas)}")


def read_scores(answer):
    """The numbers of "Answer 1: …" to "Answer 5: …", a line each; None if these are not five from 0 to 10."""
    found = re.findall(r"^ *Answer (\d+): *(\d+(?:\.\d+)?)(?: */ *10)? *$", answer.replace("*", ""), re.MULTILINE)
    scores = [float(score) for _, score in found]
    return scores if [number for number, _ in found] == list("12345") and max(scores) <= 10 else None


def ask_verdicts(options, file):
    """Rows with the model's answers about each dimension of every video: from `file`, or asked where it lacks one."""
    prompts, jobs = read_bench(options.bench), {}
    template, *sections = (ASSETS / "verdict.txt").read_text(encoding="utf-8").split("\n# ")
    for method, videos in read_methods(options.verdict, prompts).items():
        for prompt, video in zip(prompts, videos):
            for section in sections:
                dimension, questions = section.split("\n", 1)
                text = template.format(caption=prompt.caption, dimension=dimension, questions=questions)
                about = repr((method, prompt.name, text)).encode() + prompt.image.read_bytes() + video.read_bytes()
                row = dict(method=method, name=prompt.name, dimension=dimension, vlm=options.vlm)
                jobs[hashlib.sha256(about).hexdigest()[:16]] = row, text, prompt.image, video

    def judge(about):
        row, text, image, video = jobs[about]
        pictures = [*frames_as_jpeg(image, 1), *frames_as_jpeg(video, 8)]
        return dict(about=about, **row, answers=ask(options, text, pictures, read_scores))

    rows = read_rows(file, "about", vlm=options.vlm)
    for row in in_parallel(judge, [about for about in jobs if about not in rows], options):
        rows[row["about"]] = row
        write_json(file, *rows.values())
    return [rows[about] for about in jobs]


def verdict(options):
    """Table 2 of the paper: a vision-language model answers five questions about each dimension of every video."""
    path, table, unreadable = Path(options.verdict), {}, []
    file = path if path.is_file() else Path(options.out or path / "verdict.jsonl")
    rows = read_rows(file, "about").values() if path.is_file() else ask_verdicts(options, file)
    for row in rows:
        scores = read_scores(row["answers"][-1])
        column = table.setdefault(row["method"], {}).setdefault(row["dimension"], [])
        if scores:
            column.append(sum(scores) / 50)
        else:
            unreadable.append(f"{row['method']}/{row['name']} {row['dimension']}")
    for columns in table.values():
        for dimension, column in columns.items():
            columns[dimension] = np.array([column])                            # (1, prompts)
    print_table("score, % of the highest", table)
    print(f"by {row['vlm']}; 95 % intervals over prompts in brackets; every answer is in {file}")
    if unreadable:
        print(f"left out, twice without five numbers from 0 to 10: {', '.join(unreadable)}")


# ---- The command ----------------------------------------------------------------------------------------------------

def main(options):
    """Do the one thing that is asked for."""
    # As near to the exact path in half the evaluations; a video of one's own is to be the published sampler's.
    options.solver = options.solver or ("multistep" if options.data else "euler")
    options.steps = options.steps or {"euler": 50, "multistep": 25}[options.solver]
    if not 1 <= options.steps <= 1000 or options.negatives < 1 or options.samples < 0:
        raise UserError(f"--steps {options.steps} --negatives {options.negatives} --samples {options.samples}: "
                        "expected 1 to 1000 steps, at least 1 negative and 0 samples")
    actions = dict(data=negatives, image=generate_one, study=write_study, verdict=verdict, tally=tally,
                   bench=generate_bench)
    given = [name for name in actions if getattr(options, name)]
    if len(given) > 1 and given[0] in ("study", "verdict"):
        given.remove("bench")
    if len(given) != 1:
        raise UserError("give one of --data CACHE (negatives), --image PICTURE and --prompt (one video), --bench BENCH "
                        "(many videos), --study FOLDER or --verdict FOLDER with --bench, --tally FILES")
    actions[given[0]](options)


if __name__ == "__main__":
    command(main, Options, "sample")
