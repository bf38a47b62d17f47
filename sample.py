"""Videos out: one picture and one sentence become an mp4, every record of a cache gets its offline negatives, and a
bench of pictures becomes a folder of mp4s, which people and a language model compare with those of other methods.

    python sample.py --image first.png --prompt "a figure waves its left arm slowly" --out video.mp4
    python sample.py --data CACHE                                      (torchrun --nproc_per_node 8 sample.py … as well)
    python sample.py --bench BENCH --out videos/METHOD                 (torchrun as well)
    python sample.py --study videos --bench BENCH, then --tally answers/*.json; or --verdict videos --bench BENCH …

MODEL is a model folder, a hub id or a training run. BENCH is a folder of pictures with captions in the forms that
data.py knows; images.txt and prompts.txt, or the only other text file, stand for its video.txt and prompt.txt.
"""
import hashlib, math, re, secrets, shutil
from collections import namedtuple
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data import (ASSETS, KEY, Records, ask, ask_about, check_metadata, clip_shape, command, digest, frames_as_jpeg,
                  generator, missing, option, read_image, read_list, read_rows, read_tensors, say, this_process,
                  to_uint8, whole_file, write_json, write_page, write_tensors, write_video)
from model import UserError, load_dit, load_text_encoder, load_vae, read_json, resolve
from realdpo import Condition, sample


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
    made_by = dict(transformer=digest(folder / "transformer"), negatives=options.negatives, steps=options.steps,
                   guidance=options.guidance, solver=options.solver, seed=options.seed)
    expected, lose_folder = {}, Path(options.data) / "lose"
    for name in records.names[process.rank::process.world_size]:
        expected[name] = dict(fingerprint=made_by, win=records.hashes[name])
    todo = missing(expected, lose_folder)
    if todo:
        denoiser, empty = load_denoiser(options, folder, process), records.empty_text()
    for name in tqdm(todo, desc="sampling negatives", disable=process.rank > 0):
        record = read_tensors(Path(options.data) / "win" / f"{name}.safetensors")
        lose = generate(denoiser, record, empty, options, process.device, "negative", options.seed, name,
                        count=options.negatives, progress=False)
        write_tensors(lose_folder / f"{name}.safetensors", {"lose": lose.bfloat16()}, model=folder, **expected[name])
    done = len(list(lose_folder.glob("*.safetensors")))    # other ranks may still be at work
    say(f"{done} of {len(records)} records have {options.negatives} negatives in {lose_folder}; "
        f"next: python train.py --model {options.model} --data {options.data}")


Prompt = namedtuple("Prompt", "name image caption")        # a row of a bench; NAME.mp4 is its video


def hashed(value, *files):
    """A short name for a value and for what the files hold."""
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(repr((value, contents)).encode()).hexdigest()[:16]


def read_bench(folder):
    """The Prompts of a folder of pictures with captions, and a hash of their names, captions and pictures.
    Raises UserError for one that cannot be read."""
    if not folder:
        raise UserError("--bench is missing: the folder of pictures with captions that the videos are made of")
    folder, prompts = Path(folder), {}
    lists = [path.name for path in folder.glob("*.txt") if path.name not in ("images.txt", "videos.txt")]
    clips, faults = read_list(folder, "images.txt", lists[0] if len(lists) == 1 else "prompts.txt", what="picture")
    if faults:
        raise UserError(faults[0])
    for clip in clips:
        name = str(clip.extra.get("name") or clip.file.stem)
        if not clip.file.is_file():
            raise UserError(f"{clip.where}: {clip.file} is not there")
        if name in prompts or "/" in name:
            raise UserError(f"{clip.where}: is named {name}; expected a name of its own, without a slash")
        prompts[name] = Prompt(name, clip.file, clip.caption)
    for name in prompts:
        stem = re.sub(r"-\d+$", "", name)
        if stem != name and stem in prompts:
            raise UserError(f"{folder}: {name} could be a picture or video {name} of {stem}; rename one of them")
    texts = [(prompt.name, prompt.caption) for prompt in prompts.values()]
    images = [prompt.image for prompt in prompts.values()]
    return list(prompts.values()), hashed(texts, *images)


def make_videos(options, shots):
    """Generate and write the video of each shot (file, Prompt, number); its noise depends on seed, name and number."""
    model, process = options.model, this_process()
    frames, height, width = clip_shape(options, resolve(model, "transformer/config.json", "vae/config.json"))
    prompts = dict.fromkeys(prompt for _, prompt, _ in shots)
    pixels = {prompt: read_image(prompt.image, height, width) for prompt in prompts}           # all, to fail early
    encode_text = load_text_encoder(model, process.device, process.dtype)
    texts = {text: encode_text([text])[0] for text in {"", *(prompt.caption for prompt in prompts)}}
    del encode_text                                        # the largest network: it leaves before the others come
    torch.cuda.empty_cache()
    vae, images = load_vae(model, process.device, process.dtype), {}
    for prompt, image in pixels.items():
        images[prompt] = vae.encode(image[None].to(process.device), generator("image", options.seed))[0]   # (C,1,h,w)
    denoiser = load_denoiser(options, model, process)
    for file, prompt, number in tqdm(shots, desc="videos", disable=process.rank > 0 or len(shots) == 1):
        record = dict(text=texts[prompt.caption], image=images[prompt])
        channels, _, *size = record["image"].shape
        latents = generate(denoiser, record, texts[""], options, process.device, "video", options.seed, prompt.name,
                           number, shape=(channels, (frames - 1) // 4 + 1, *size), progress=len(shots) == 1)
        write_video(file, to_uint8(vae.decode(latents)[0]), options.fps)


def make_one(options):
    """One picture and one sentence to an mp4."""
    out = Path(options.out or "video.mp4")
    if out.suffix != ".mp4":
        raise UserError(f"--out {out}: expected a name that ends in .mp4")
    make_videos(options, [(out, Prompt("", Path(options.image), options.prompt), 0)])
    print(f"a video in {out}")


def make_bench(options):
    """A video, or `samples`, for every picture of a bench: this rank's share of those that are not there yet."""
    process, out, shots = this_process(), Path(options.out or "videos"), []
    prompts, bench = read_bench(options.bench)
    folder = resolve(options.model, "transformer", "scheduler")
    names = "steps", "guidance", "solver", "frames", "height", "width", "fps", "seed"
    made_by = {"fingerprint": {"transformer": digest(folder / "transformer"), "bench": bench,
                               **{name: getattr(options, name) for name in names}}}
    if (out / "bench.json").is_file():
        check_metadata(out / "bench.json", read_json(out / "bench.json"), made_by)
    write_json(out / "bench.json", made_by)
    for prompt in prompts:
        # VBench drops a number at the end of a video's name to find its picture: a name that has one gets another.
        numbered = options.samples or re.search(r"-\d+$", prompt.name)
        for number in range(max(1, options.samples)):
            file = f"{prompt.name}-{number}.mp4" if numbered else f"{prompt.name}.mp4"
            shots.append((out / file, prompt, number))
    todo = [shot for shot in shots[process.rank::process.world_size] if not shot[0].exists()]
    if todo:
        make_videos(options, todo)
    done = sum(file.exists() for file, _, _ in shots)      # other ranks may still be at work
    say(f"{done} of {len(shots)} videos of {len(prompts)} prompts are in {out}")


# ---- Which method is better? A study with raters (App. B.2), a language model's verdict (App. B.3) ------------------

DIMENSIONS = "visual alignment", "text alignment", "motion quality", "human quality", "overall quality"     # Fig. 10


def list_videos(folder, bench):
    """[(method, Prompt, the method's first video of it)] of a folder that holds one folder per method.
    Raises UserError for one that lacks a video or was made of another bench."""
    videos, (prompts, contents) = [], read_bench(bench)
    for method in sorted(path for path in Path(folder).glob("[!.]*") if path.is_dir()):
        note = method / "bench.json"
        if note.is_file() and read_json(note)["fingerprint"]["bench"] != contents:
            raise UserError(f"{method}: was made from another bench than {bench}, or from what it held before")
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
    videos = list_videos(options.study, options.bench)
    out = Path(options.out or "study")
    key = Path(f"{out}-key.json")
    secret = read_json(key)["secret"] if key.exists() else secrets.token_hex(16)     # written again, the same study
    method_clips, page_clips, pages = {}, {}, []
    for method, prompt, video in tqdm(videos, desc="copying clips"):
        clip = hashed([secret, method, prompt.name], video)
        method_clips.setdefault(method, []).append(clip)
        page_clips.setdefault(prompt, []).append(clip)
        with whole_file(out / "clips" / f"{clip}.mp4") as part:
            shutil.copyfile(video, part)
    for number, (prompt, clips) in enumerate(page_clips.items()):
        pages.append(dict(caption=prompt.caption, clips=sorted(clips)))
        with whole_file(out / "clips" / f"{number}.jpg") as part:
            part.write_bytes(frames_as_jpeg(prompt.image, 1)[0])
    study = hashed(pages)
    write_json(key, dict(study=study, secret=secret, clips=method_clips))
    write_page("study.html", out / "study.html", dict(study=study, pages=pages))
    print(f"{len(pages)} pages of {len(method_clips)} videos in {out}: give raters this folder, without {key}, and "
          f"collect what they save; then: python sample.py --tally answers/*.json --out {out}")


def print_table(title, rows, columns, values):
    """Markdown of values (raters, rows, prompts, columns) from 0 to 1, nan where there is none: the means in per cent
    and, in brackets, what holds 95 % of such means if raters and prompts are drawn again (bootstrap)."""
    raters, _, prompts, _ = values.shape
    rng, means = generator("bootstrap"), []
    for _ in range(2000):
        drawn = values[torch.randint(raters, (raters,), generator=rng)]
        drawn = drawn[:, :, torch.randint(prompts, (prompts,), generator=rng)]
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
        for five in raters[rater]:
            if len(five) != len(DIMENSIONS) or not {*five} <= {1, 2, 3, 4, 5}:
                raise UserError(f"{file}: lacks five ratings from 1 to 5 of a video; let {rater} go on and save again")
    ratings = torch.tensor(list(raters.values())).double()                     # (raters, videos, 5)
    within = ratings.var(dim=0, correction=0).mean(dim=0) / (1 - 1 / len(raters))      # unbiased; nan of one rater
    agreement = 1 - within / ratings.var(dim=(0, 1))                           # Krippendorff's alpha
    methods = list(key["clips"])
    ratings = ratings.view(len(raters), len(methods), -1, len(DIMENSIONS))     # (raters, methods, prompts, 5)
    overall = ratings[..., -1:]
    won = ((overall - overall.transpose(1, 3)).sign() + 1) / 2                 # (raters, methods, prompts, methods)
    print_table("rating, % of the highest", methods, DIMENSIONS, ratings / 5)
    print_table("overall quality, % won against (ties half)", methods, methods, won)
    alphas = ", ".join(f"{name} {alpha:.2f}" for name, alpha in zip(DIMENSIONS, agreement))
    print(f"{len(raters)} raters, {ratings.shape[2]} prompts, 95 % intervals over both in brackets; agreement of the "
          f"raters (Krippendorff's alpha, interval scale): {alphas}")


def read_scores(answer):
    """The numbers of "Answer 1: …" to "Answer 5: …", a line each; None if these are not five from 0 to 10."""
    found = re.findall(r"^ *Answer (\d+): *(\d+(?:\.\d+)?)(?: */ *10)? *$", answer.replace("*", ""), re.MULTILINE)
    scores = [float(score) for _, score in found]
    return scores if [number for number, _ in found] == list("12345") and max(scores) <= 10 else None


def ask_verdicts(options, file):
    """Rows with the model's answers about each dimension of every video: from `file`, or asked where it has none."""
    videos, jobs = list_videos(options.verdict, options.bench), {}
    template, *sections = (ASSETS / "verdict.txt").read_text(encoding="utf-8").split("\n# ")
    for (method, prompt, video), section in product(videos, sections):
        dimension, questions = section.split("\n", 1)
        text = template.format(caption=prompt.caption, dimension=dimension, questions=questions)
        row = dict(method=method, name=prompt.name, dimension=dimension, vlm=options.vlm)
        jobs[hashed([row, text], prompt.image, video)] = row, text, prompt.image, video

    def judge(about):
        row, text, image, video = jobs[about]
        pictures = [*frames_as_jpeg(image, 1), *frames_as_jpeg(video, 8)]
        return dict(about=about, **row, answers=ask(options, text, pictures, read_scores))

    rows = ask_about(jobs, judge, file, "about", options, vlm=options.vlm)
    return [rows[about] for about in jobs]


def verdict(options):
    """Table 2 of the paper: a vision-language model answers five questions about each dimension of every video."""
    file = Path(options.verdict)
    if file.is_file():
        rows = read_rows(file, "about").values()
    else:
        file = Path(options.out or file / "verdict.jsonl")
        rows = ask_verdicts(options, file)
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


# ---- The command ----------------------------------------------------------------------------------------------------

def main(options):
    """Do the one thing that is asked for."""
    # Multistep is as close to the exact path in half the evaluations; single videos keep the published sampler.
    options.solver = options.solver or ("multistep" if options.data else "euler")
    options.steps = options.steps or {"euler": 50, "multistep": 25}[options.solver]
    if not 1 <= options.steps <= 1000 or options.negatives < 1 or options.samples < 0:
        raise UserError(f"--steps {options.steps} --negatives {options.negatives} --samples {options.samples}: "
                        "expected 1 to 1000 steps, at least 1 negative and 0 samples")
    actions = dict(data=negatives, image=make_one, bench=make_bench, study=write_study, tally=tally, verdict=verdict)
    if options.study or options.verdict:
        del actions["bench"]                               # which only says what the videos were made from
    given = [name for name in actions if getattr(options, name)]
    if len(given) != 1:
        raise UserError("give one of --data CACHE (negatives), --image PICTURE and --prompt (one video), --bench BENCH "
                        "(many videos), --study FOLDER or --verdict FOLDER with --bench, --tally FILES")
    actions[given[0]](options)


if __name__ == "__main__":
    command(main, Options, "sample")
