"""Which method's videos are better? A page on which people rate them (App. B.2).

    python -m judging.study --videos METHODS --bench BENCH --out STUDY

METHODS holds a folder for each method, with its videos of the bench. Raters get STUDY/, in which nothing tells which
method made a video. STUDY-key.json does, and stays here for judging.tally.
"""
import os, re, secrets, shlex
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from support import UserError
from support.command import command, option
from support.files import fingerprint_of_file, hash_of, read_json, whole_file, write_json
from support.films import decode, picture_filters, read_video_header, run_ffmpeg
from support.lists import read_bench
from tqdm import tqdm

from judging.vlm import frames_as_jpeg, write_page

# A rater's clip begins at its first picture and has no titles, comments, dates, chapters or names of programs, nor what
# encoders write into the pictures (H.264's units of type 6; 9 and 12 are padding).
CLEAN = ("-map_metadata", "-1", "-map_chapters", "-1", "-fflags", "+bitexact", "-flags:v", "+bitexact", "-bsf:v",
         "filter_units=remove_types=6|9|12,setts=pts=PTS-STARTPTS:dts=DTS-STARTPTS", "-movflags", "+faststart",
         "-f", "mp4", "-y")
# Visually lossless: at a crf of 17 or less, nobody sees a difference.
ENCODE = "-c:v", "libx264", "-crf", "12"
EXACT = "flags=bicubic+accurate_rnd+full_chroma_int"       # without, everything gets darker by 1 to 3 of 255
SQUARE = f"scale=w='2*round(iw*max(1,sar)/2)':h='2*round(ih*max(1,1/sar)/2)':{EXACT}"  # even sides, for 4:2:0
CODED = (f"scale=out_color_matrix=bt709:out_range=tv:{EXACT},format=yuv420p,"
         "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709")
ONE_TIME = 946684800                                       # 1 January 2000: the date of all files of a study


# ---- Videos of methods ----------------------------------------------------------------------------------------------

def list_videos(folder, prompts, bench):
    """[(method, Clip, the method's video of it)] of a folder with a folder per method. `prompts` and `bench` are
    what `read_bench` returned. Raises UserError for a method that lacks a video or was made of another bench."""
    videos = []
    for method in sorted(path for path in Path(folder).glob("[!.]*") if path.is_dir()):
        found, missing = [], []
        for prompt in prompts:
            video = method / f"{prompt.name}.mp4"
            if video.is_file():
                found.append((method.name, prompt, video))
            else:
                missing.append(video.name)
        if not found:
            print(f"{method}: holds no video of --bench, so it is not taken for a method")
            continue
        if missing:
            raise UserError(f"{method}: lacks {missing[0]}, which --bench asks every method for")
        note = method / "bench.json"
        if note.is_file() and read_json(note)["bench"] != bench:
            raise UserError(f"{method}: was made from another bench than --bench, or from what that held before")
        videos += found
    if not videos:
        raise UserError(f"{folder}: holds no method; expected a folder for each, with its videos of --bench")
    return videos


# ---- Clips for raters -----------------------------------------------------------------------------------------------

def copy_film(video, stream, path):
    """The coded pictures of a film and nothing else."""
    run_ffmpeg(video, "-map", stream, "-c", "copy", *CLEAN, path)

def hash_pictures(video, film):
    """A hash of all pictures of a film. Raises UserError for a damaged one."""
    return decode(video, film, "null", "-f", "md5", "-")[0]

def is_fit(video, film, copy):
    """Whether every browser shows a film as it is: H.264, 8 bits, 4:2:0, progressive, SDR, upright, with square pixels,
    and without parts that a player skips. If so, `copy` holds its clip for raters."""
    if film.codec != "h264" or not re.match(r"yuvj?420p\b(?!.*(first|2020|2084|b67))", film.pixels):
        return False
    copy_film(video, film.stream, copy)
    log = run_ffmpeg(copy)[1] if copy.is_file() else ""    # the copy has no titles that could hold such words
    usual = re.search(r"h264 \((Constrained Baseline|Baseline|Main|High)\)", log)
    turned = re.search(r"displaymatrix|display matrix|SAR (?!1:1 )", log, re.IGNORECASE)
    if not usual or turned:
        return False
    return hash_pictures(video, film) == hash_pictures(copy, film._replace(stream="0:0"))

def write_clip(video, path):
    """Write a video for raters: copied if it is fit, else encoded once, with the filters that records are read with."""
    film = read_video_header(video)
    with whole_file(path) as part, TemporaryDirectory() as folder:
        if not is_fit(video, film, part):
            encoded = Path(folder) / "encoded.mp4"
            decode(video, film, f"{picture_filters(film, SQUARE)},{CODED}", *ENCODE, encoded)
            copy_film(encoded, "0:0", part)

def print_giveaways(videos, clips):
    """Print the prompts whose clips differ in length or size between methods. `clips` are the videos' files for raters.
    """
    looks = {}
    for (method, prompt, _), clip in zip(videos, clips):
        film = read_video_header(clip)
        look = f"{film.seconds:.1f} s of {film.width}×{film.height}"
        looks.setdefault(prompt.name, {}).setdefault(look, []).append(method)
    for prompt, methods in looks.items():
        if len(methods) > 1:
            parts = [f"{look}: {', '.join(names)}" for look, names in methods.items()]
            print(f"{prompt}: raters can tell methods apart by length or size ({'; '.join(parts)})")


# ---- The command ----------------------------------------------------------------------------------------------------

@dataclass
class Options:
    """Write a page for raters, with the videos of several methods."""
    videos: str = option("", "folder with a folder of videos for each method, all of one --bench")
    bench: str = option("", "the pictures with captions that the videos were made of")
    out: str = option("study", "folder for the page and its clips")

def main(options):
    """Write OUT/study.html with its clips, for raters, and OUT-key.json, which tells which method made a clip."""
    prompts, bench = read_bench(options.bench)
    videos = list_videos(options.videos, prompts, bench)
    out, key = Path(options.out), Path(f"{Path(options.out)}-key.json")
    secret = read_json(key)["secret"] if key.exists() else secrets.token_hex(16)       # the same study, if made again
    clips, methods = {}, {}                                # {file for raters: video}, in the order of `videos`
    for method, prompt, video in videos:
        name = hash_of(secret, method, prompt.name, CLEAN, ENCODE, fingerprint_of_file(video))
        methods.setdefault(method, []).append(name)
        clips[out / "clips" / f"{name}.mp4"] = video
    pages = []
    for prompt, *beside in zip(prompts, *methods.values()):
        pages.append(dict(caption=prompt.caption, clips=sorted(beside)))
    study = hash_of(pages)
    write_json(key, dict(study=study, secret=secret, clips=methods))
    for clip in tqdm(sorted(clips), desc="clips"):         # in an order that tells nothing about methods
        if not clip.exists():
            write_clip(clips[clip], clip)
    for number, prompt in enumerate(prompts):
        with whole_file(out / "clips" / f"{number}.jpg") as part:
            part.write_bytes(frames_as_jpeg(prompt.file, 1)[0])
    write_page("study.html", out / "study.html", dict(study=study, pages=pages))
    for file in [out / "study.html", *(out / "clips").iterdir()]:
        if re.fullmatch(r"[0-9a-f]{16}\.mp4", file.name) and file not in clips:        # of an earlier study
            file.unlink()
        else:
            os.utime(file, (ONE_TIME, ONE_TIME))
    print_giveaways(videos, clips)
    print(f"{len(pages)} pages with videos of {', '.join(methods)} in {out}: give raters this folder, without {key}, "
          "and collect what they save; then: "
          f"python -m judging.tally --answers answers/*.json --study {shlex.quote(str(out))}")

if __name__ == "__main__":
    command(main, Options, "judging.study")
