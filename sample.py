"""Videos out: a picture and a sentence to an mp4, a cache's offline negatives, a bench that raters and models judge.

    python sample.py --image first.png --prompt "a figure waves its left arm slowly" --out video.mp4
    python sample.py --data CACHE                                      (torchrun --nproc_per_node 8 sample.py … as well)
    python sample.py --bench BENCH --out videos/METHOD                 (torchrun as well)
    python sample.py --study videos --bench BENCH, then --tally answers/*.json; or --verdict videos --bench BENCH …
"""
import hashlib, math, re, secrets, shutil
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data import (ASSETS, KEY, Clip, Records, ask, ask_about, check_metadata, clip_shape, command, digest,
                  frames_as_jpeg, generator, is_made, option, read_image, read_list, read_rows, say, this_process,
                  to_uint8, whole_file, write_json, write_page, write_tensors, write_video)
from model import UserError, load_dit, load_text_encoder, load_vae, read_json, resolve
from realdpo import Condition, sample

DIMENSIONS = "visual alignment", "text alignment", "motion quality", "human quality", "overall quality"     # Fig. 10


@dataclass
class Options:
    """Generate videos, or find out which method's are better."""
    model: str = option("", "model folder, hub id, run or tiny; default: CogVideoX-5B-I2V with a GPU, else tiny")
    out: str = option("", "where it goes (--tally: the study); default: video.mp4, videos, study, verdict.jsonl")
    image: str = option("", "one video: its first frame, a picture of any size", "What to do")
    data: str = option("", "negatives: the cache of records to make them for")
    bench: str = option("", "a video of each picture in a folder of pictures with captions")
    study: str = option("", "write a page for raters; FOLDER has one folder of videos per method, of one --bench")
    tally: list = option((), "print the table of what raters answered")
    verdict: str = option("", "ask a vision-language model about such a FOLDER; or print a finished verdict.jsonl")
    prompt: str = option("", "what happens; may be empty", "Sampling")
    negatives: int = option(3, "generated videos per record")
    samples: int = option(0, "videos per picture, as NAME-0.mp4 …; default: one, as NAME.mp4")
    steps: int = option(0, "evaluations of the transformer; default: 50 with euler, 25 with multistep")
    guidance: float = option(6.0, "scale of classifier-free guidance; 1: none (release: 6)")
    solver: Literal["euler", "multistep"] = option("", "default: multistep for --data, else euler (on CogVideoX: DDIM)")
    frames: int = option(0, "of the video, 8k + 1; default: the model's")
    height: int = option(0, "of the video; default: the model's")
    width: int = option(0, "of the video; default: the model's")
    fps: int = option(8, "of the video")
    seed: int = option(0, "of the noise")
    compile: bool = option(False, "compile the transformer's blocks: slow to start, then faster")
    endpoint: str = option("", f"an OpenAI-compatible server's address; its key: environment variable {KEY}", "Verdict")
    vlm: str = option("", "name of the model there")
    parallel: int = option(4, "requests under way at once")
    timeout: float = option(300.0, "seconds to wait for an answer")


def load_sampler(options, empty, device, dtype):
    """`realdpo.sample` with the model's transformer and these options; `empty` (1,L,D) is the text of no caption."""
    denoiser = load_dit(options.model, device, dtype)
    if options.compile:
        denoiser.net.compile_blocks()
    return partial(sample, denoiser, steps=options.steps, guidance=options.guidance, solver=options.solver,
                   uncond=empty.to(device), progress=bool(options.image))


def negatives(options):
    """The offline stage of Sec. 4.2: `lose` latents for this rank's share of the records that have none yet, stored as
    they leave the sampler, never decoded. Ranks never wait for each other."""
    rank, world, device, dtype = this_process()
    records, lose_folder = Records(options.data, negatives=False), Path(options.data) / "lose"
    made_by = {name: getattr(options, name) for name in ("negatives", "steps", "guidance", "solver", "seed")}
    made_by["transformer"] = digest(resolve(options.model, "transformer", "scheduler") / "transformer")
    todo = []
    for name in records.names[rank::world]:
        if not is_made(lose_folder / f"{name}.safetensors", dict(made_by, win=records.hashes[name])):
            todo.append(name)
    if todo:
        generate = load_sampler(options, records.empty_text()[None], device, dtype)
    for name in tqdm(todo, desc="sampling negatives", disable=rank > 0):
        record = records[records.names.index(name)]
        noise = [torch.randn(record["win"].shape, generator=generator("negative", options.seed, name, k))
                 for k in range(options.negatives)]
        cond = Condition(record["text"][None].to(device), record["image"][None].to(device)).repeat(options.negatives)
        lose = generate(torch.stack(noise).to(device), cond).bfloat16()                         # (N,C,F,H,W)
        write_tensors(lose_folder / f"{name}.safetensors", {"lose": lose}, model=options.model,
                      win=records.hashes[name], **made_by)
    done = len(list(lose_folder.glob("*.safetensors")))    # other ranks may still be at work
    say(f"{done} of {len(records)} records have {options.negatives} negatives in {lose_folder}; "
        f"next: python train.py --model {options.model} --data {options.data}")


def hashed(value, *files):
    """A short name for a value and for what the files hold."""
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(repr((value, contents)).encode()).hexdigest()[:16]


def read_bench(folder):
    """The Clips of a folder of pictures with captions, each with a name of its own, and a hash of their names, captions
    and pictures. Its lists are images.txt and prompts.txt, or the only other text file; or it has another form that
    `data.read_list` knows. Raises UserError for one that cannot be read."""
    if not folder:
        raise UserError("--bench is missing: the folder of pictures with captions that the videos are made of")
    lists = [path.name for path in Path(folder).glob("*.txt") if path.name not in ("images.txt", "videos.txt")]
    clips, faults = read_list(folder, "images.txt", lists[0] if len(lists) == 1 else "prompts.txt", what="picture")
    prompts = [clip._replace(name=str(clip.extra.get("name") or clip.file.stem)) for clip in clips]
    faults += [f"{prompt.where}: {prompt.file} is not there" for prompt in prompts if not prompt.file.is_file()]
    names = [prompt.name for prompt in prompts]
    for prompt in prompts:
        stem = re.sub(r"-\d+$", "", prompt.name)           # walk-12.mp4 could be video 12 of walk
        if names.count(prompt.name) > 1 or (stem != prompt.name and stem in names) or "/" in prompt.name:
            faults.append(f"{prompt.where}: is named {prompt.name}; expected a name of its own, without a slash")
    if faults:
        raise UserError(faults[0])
    texts = [(prompt.name, prompt.caption) for prompt in prompts]
    return prompts, hashed(texts, *[prompt.file for prompt in prompts])


def list_shots(options):
    """[(file, Clip, number)]: the video of --image, or `samples` of each picture of --bench, beside which bench.json
    says what makes them. Raises UserError for an --out that is no .mp4 or whose bench.json says otherwise."""
    if options.image:
        out = Path(options.out or "video.mp4")
        if out.suffix != ".mp4":
            raise UserError(f"--out {out}: expected a name that ends in .mp4")
        return [(out, Clip("", Path(options.image), options.prompt, "--image", {}), 0)]
    out = Path(options.out or "videos")
    prompts, bench = read_bench(options.bench)
    names = "steps", "guidance", "solver", "frames", "height", "width", "fps", "seed"
    made_by = {name: getattr(options, name) for name in names} | dict(bench=bench)
    made_by["transformer"] = digest(resolve(options.model, "transformer", "scheduler") / "transformer")
    if (out / "bench.json").is_file():
        check_metadata(out / "bench.json", read_json(out / "bench.json"), made_by)
    write_json(out / "bench.json", made_by)
    shots = []
    for prompt, number in product(prompts, range(options.samples or 1)):
        # VBench drops a number at the end of a video's name to find its picture: a name that has one gets another.
        ending = f"-{number}" if options.samples or re.search(r"-\d+$", prompt.name) else ""
        shots.append((out / f"{prompt.name}{ending}.mp4", prompt, number))
    return shots


def make_videos(options):
    """Generate this rank's share of the videos that are not there yet; noise depends on seed, name and number alone."""
    rank, world, device, dtype = this_process()
    shots = [shot for shot in list_shots(options)[rank::world] if options.image or not shot[0].exists()]
    if not shots:
        return say("nothing is missing")
    frames, height, width = clip_shape(options, resolve(options.model, "transformer/config.json", "vae/config.json"))
    files = dict.fromkeys(prompt.file for _, prompt, _ in shots)                               # each picture once
    pixels = {file: read_image(file, height, width) for file in files}                         # all, to fail early
    encode_text = load_text_encoder(options.model, device, dtype)
    texts = {text: encode_text([text]) for text in {"", *(prompt.caption for _, prompt, _ in shots)}}       # (1,L,D)
    del encode_text                                        # the largest network: it leaves before the others come
    vae, images = load_vae(options.model, device, dtype), {}
    for file, picture in pixels.items():
        images[file] = vae.encode(picture[None].to(device), generator("image", options.seed))            # (1,C,1,h,w)
    generate = load_sampler(options, texts[""], device, dtype)
    for file, prompt, number in tqdm(shots, desc="videos", disable=rank > 0 or bool(options.image)):
        image = images[prompt.file]
        shape = 1, image.shape[1], (frames - 1) // 4 + 1, *image.shape[3:]
        noise = torch.randn(shape, generator=generator("video", options.seed, prompt.name, number, 0)).to(device)
        latents = generate(noise, Condition(texts[prompt.caption], image))
        write_video(file, to_uint8(vae.decode(latents)[0]), options.fps)
    say(f"videos made: {len(shots)}, the last in {file}")


# ---- Which method is better? A study with raters (App. B.2), a language model's verdict (App. B.3) ------------------

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


def write_study(options):
    """OUT/study.html with its clips, for raters, and OUT-key.json, which tells what method a clip is of."""
    prompts, bench = read_bench(options.bench)
    videos = list_videos(options.study, prompts, bench)
    out, clips, pages = Path(options.out or "study"), {}, []
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
          f"what they save; then: python sample.py --tally answers/*.json --out {out}")


def print_table(title, rows, columns, values):
    """Markdown of values (raters, rows, prompts, columns) from 0 to 1, nan where there is none: the means in per cent
    and, in brackets, what holds 95 % of such means if raters and prompts are drawn again (bootstrap)."""
    raters, _, prompts, _ = values.shape
    draw, means = partial(torch.randint, generator=generator("bootstrap")), []
    for _ in range(2000):
        drawn = values[draw(raters, (raters,))][:, :, draw(prompts, (prompts,))]
        means.append(drawn.nanmean(dim=(0, 2)))
    low, high = 100 * torch.stack(means).nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    mean = 100 * values.nanmean(dim=(0, 2))                # (rows, columns)
    print(f"| {' | '.join([title, *columns])} |\n|{' --- |' * (len(columns) + 1)}")
    for r, row in enumerate(rows):
        cells = [f"{m:.2f} [{l:.1f}, {h:.1f}]" for m, l, h in zip(mean[r], low[r], high[r])]
        print(f"| {' | '.join([row, *cells])} |")
    print()


def tally(options):
    """Table 1 of the paper from raters' answers: ratings in per cent of the highest, and comparisons won."""
    key, raters = read_json(Path(f"{Path(options.out or 'study')}-key.json")), {}
    for file in options.tally:
        answers = read_json(Path(file))
        study, rater = answers["study"], str(answers["rater"])
        if study != key["study"]:
            raise UserError(f"{file}: answers study {study}, not {key['study']}; --out names the folder of the study")
        if rater in raters:
            raise UserError(f"{file}: {rater} has answered in an earlier file, too; give one of the two")
        raters[rater] = [answers["ratings"].get(clip, []) for clip in chain(*key["clips"].values())]
        if not all(len(five) == len(DIMENSIONS) and {*five} <= {1, 2, 3, 4, 5} for five in raters[rater]):
            raise UserError(f"{file}: lacks five ratings from 1 to 5 of a video; let {rater} go on and save again")
    methods = list(key["clips"])
    ratings = torch.tensor(list(raters.values())).double().view(len(raters), len(methods), -1, len(DIMENSIONS))
    within = ratings.var(dim=0, correction=0).mean(dim=(0, 1)) / (1 - 1 / len(raters))     # unbiased; nan of one rater
    agreement = 1 - within / ratings.var(dim=(0, 1, 2))                        # Krippendorff's alpha
    overall = ratings[..., -1:]                                                # (raters, methods, prompts, 1)
    won = ((overall - overall.transpose(1, 3)).sign() + 1) / 2                 # (raters, methods, prompts, methods)
    print_table("rating, % of the highest", methods, DIMENSIONS, ratings / 5)
    print_table("overall quality, % won against (ties half)", methods, methods, won)
    alphas = ", ".join(f"{name} {alpha:.2f}" for name, alpha in zip(DIMENSIONS, agreement))
    print(f"{len(raters)} raters, {ratings.shape[2]} prompts, 95 % intervals over both; Krippendorff's alpha: {alphas}")


def read_scores(answer):
    """The numbers of "Answer 1: …" to "Answer 5: …", a line each; None if these are not five from 0 to 10."""
    found = re.findall(r"^ *Answer (\d+): *(\d+(?:\.\d+)?)(?: */ *10)? *$", answer.replace("*", ""), re.MULTILINE)
    scores = [float(score) for _, score in found]
    return scores if [number for number, _ in found] == list("12345") and max(scores) <= 10 else None


def ask_verdicts(options, file):
    """Ask about each dimension of every video in a folder of methods; the answers go to `file`, which keeps them."""
    template, *sections = (ASSETS / "verdict.txt").read_text(encoding="utf-8").split("\n# ")
    prompts, bench = read_bench(options.bench)
    asked, jobs = dict(vlm=options.vlm, bench=bench), {}
    for (method, prompt, video), section in product(list_videos(options.verdict, prompts, bench), sections):
        dimension, questions = section.split("\n", 1)
        text = template.format(caption=prompt.caption, dimension=dimension, questions=questions)
        row = dict(method=method, name=prompt.name, dimension=dimension)
        jobs[hashed([row, text], prompt.file, video)] = row, text, prompt.file, video

    def judge(about):
        row, text, image, video = jobs[about]
        pictures = [*frames_as_jpeg(image, 1), *frames_as_jpeg(video, 8)]
        return dict(about=about, **row, **asked, answers=ask(options, text, pictures, read_scores))

    ask_about(jobs, judge, file, "about", options, **asked)


def verdict(options):
    """Table 2 of the paper: a vision-language model answers five questions about each dimension of every video."""
    file = Path(options.verdict)
    if not file.is_file():
        file = Path(options.out or file / "verdict.jsonl")
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


def main(options):
    """Do the one thing that is asked for."""
    # Multistep is as close to the exact path in half the evaluations; single videos keep the published sampler.
    options.solver = options.solver or ("multistep" if options.data else "euler")
    options.steps = options.steps or {"euler": 50, "multistep": 25}[options.solver]
    if not 1 <= options.steps <= 1000 or options.negatives < 1 or options.samples < 0:
        raise UserError(f"--steps {options.steps} --negatives {options.negatives} --samples {options.samples}: "
                        "expected 1 to 1000 steps, at least 1 negative and 0 samples")
    actions = {"data": negatives, "image": make_videos, "bench": make_videos, "tally": tally, "study": write_study,
               "bench study": write_study, "verdict": verdict, "bench verdict": verdict}
    given = " ".join(name for name in ("data", "image", "bench", "study", "verdict", "tally") if getattr(options, name))
    if given not in actions:
        raise UserError("give one of --data, --image, --bench, --tally, or --study or --verdict with --bench")
    actions[given](options)


if __name__ == "__main__":
    command(main, Options, "sample")
