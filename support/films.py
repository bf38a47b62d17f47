"""A film or a picture as a player or a viewer shows it, and mp4s. ffmpeg decodes, Pillow opens pictures."""
import math, re, subprocess
from collections import deque, namedtuple
from contextlib import suppress
from functools import lru_cache
from io import BytesIO
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path

from support import UserError
from support.files import whole_file
import imageio.v2 as imageio
import numpy as np
import torch
from einops import rearrange
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageCms, ImageOps

READERS = 4                                                # clips read ahead in threads; 200 MB each at 49×480×720
FAULT = r"\[error\]|\[fatal\]|corrupt|concealing|first frame|Reconfiguring"               # what ffmpeg says of damage
MEND = "leave it out, or make a plain file of it: ffmpeg -i OLD -c:v libx264 -crf 12 -pix_fmt yuv420p NEW.mp4"

# As ffmpeg describes it: `pixels` such as yuv420p(tv, bt709, progressive), the size as stored, the length it claims.
Film = namedtuple("Film", "stream codec pixels width height seconds")

def from_uint8(frames):
    """(F,H,W,3) uint8 -> (3,F,H,W) fp32 in [-1,1]."""
    return rearrange(torch.from_numpy(frames).float().div_(127.5).sub_(1), "f h w c -> c f h w")

def to_uint8(video):
    """(3,F,H,W) in [-1,1] -> (F,H,W,3) uint8."""
    return rearrange((video.float().clamp(-1, 1) + 1) * 127.5, "c f h w -> f h w c").round().byte().cpu().numpy()

@lru_cache
def find_ffmpeg():
    """The path of ffmpeg. Raises UserError if it is missing or, as a trial tells, too old."""
    trial = "-v level+info -debug_ts -f lavfi -i color=s=16x16:d=0.1 -fps_mode passthrough -f null -"
    try:
        ffmpeg = get_ffmpeg_exe()
        log = subprocess.run([ffmpeg, *trial.split()], capture_output=True, text=True).stderr
    except (OSError, RuntimeError) as e:
        raise UserError(f"ffmpeg: cannot be run ({e}); try: pip install 'imageio-ffmpeg>=0.8'") from e
    if not picture_times(log):
        raise UserError(f"{ffmpeg}: is too old; unset IMAGEIO_FFMPEG_EXE, and pip install 'imageio-ffmpeg>=0.8'")
    return ffmpeg

def run_ffmpeg(path, *arguments, options=()):
    """Run ffmpeg on a film, opened with `options`. Returns (output, log). Raises UserError if the file is missing."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video")
    # Damaged pictures are dropped, not patched up. One decoding thread keeps the log in order.
    strict = ["-max_error_rate", "1", "-err_detect", "crccheck+bitstream+buffer+explode", "-threads", "1"]
    done = subprocess.run([find_ffmpeg(), "-nostdin", "-hide_banner", "-nostats", "-v", "level+info", "-debug_ts",
                           *strict, *options, "-i", f"file:{path}", *arguments], capture_output=True)
    return done.stdout, done.stderr.decode(errors="replace").replace(f"'file:{path}'", "it")

def read_video_header(path):
    """The Film in a file. Raises UserError if it is missing, not a video, or of a kind that ffmpeg shows wrongly."""
    log = run_ffmpeg(path)[1]
    if "Stream #" not in log:
        reason = re.findall(r"\[(?:error|fatal)\] (.*)", log)[0]
        raise UserError(f"{path}: is damaged or not a video ({reason})")
    films = []
    # A line for each stream, with details indented below it. A file's own titles are indented too: none is a stream.
    for about in re.findall(r"^\[info\]   Stream #0:.*(?:\n\[info\]     .*)*", log, re.MULTILINE):
        found = re.match(r".*?(0:\d+)[^:]*: Video: (\w+)(?: \(.*?\))*, (\w+(?:\(.*?\))?), (\d+)x(\d+)(.*)", about)
        if found and not re.search(r"\((attached pic|still image|timed thumbnails)\)", found[6]):
            films.append((about, found))
    moving = [film for film in films if film[1][2] not in ("png", "mjpeg", "bmp", "webp")]     # covers are not films
    if not films:
        raise UserError(f"{path}: holds no moving picture")
    about, found = (moving or films)[0]
    dolby = re.search(r"\n.info. +DOVI configuration record:.* profile: (5|\d+(?=.*compatibility id: 0))", about)
    if dolby:
        raise UserError(f"{path}: is Dolby Vision {dolby[1]}, whose colours ffmpeg gets wrong; make it SDR or HDR10")
    alpha = re.match(r"yuva|gbrap|rgba|bgra|argb|abgr|pal8|ya\d|ayuv|vuya|uyva", found[3])
    if alpha or re.search(r"^\[info\] +alpha_mode +: 1$", about, re.MULTILINE):                  # the latter of webm
        raise UserError(f"{path}: has transparency, and nothing says what is behind it; {MEND}")
    length = re.search(r"^\[info\]   Duration: (\d+):(\d+):([\d.]+)", log, re.MULTILINE)
    seconds = 3600 * int(length[1]) + 60 * int(length[2]) + float(length[3]) if length else math.inf
    return Film(found[1], found[2], found[3], int(found[4]), int(found[5]), seconds)

def picture_filters(film, size, instants=()):
    """The ffmpeg filters that turn decoded pictures into what a player shows, RGB with square pixels. `size` is the
    filter that scales them; `instants` are filters that pick moments in time."""
    apart = re.search(r"([\w-]+)/([\w-]+)/([\w-]+)", film.pixels)       # three names, or one for all three
    alike = re.search(r"[( ]((bt|smpte|fcc|ycgco)[\w-]*)[,)]", film.pixels)
    if apart:
        matrix, primaries, transfer = apart.groups()
    else:
        matrix = primaries = transfer = alike[1] if alike else "unknown"
    hdr = transfer in ("arib-std-b67", "smpte2084")        # HLG or PQ
    if matrix == "unknown" and (hdr or film.height > 576 or film.width >= 1280):
        matrix = "bt2020nc" if hdr else "bt709"            # what players assume for HD if the file does not say
    filters = ["bwdif=mode=send_frame:deint=interlaced"]   # an interlaced picture shows two instants: separate them
    filters += instants
    if film.pixels.startswith("yuv") and matrix not in ("unknown", "reserved"):
        filters.append(f"setparams=colorspace={matrix}")   # the container may know what the stream does not say
    filters += [size, "setsar=1"]
    if hdr:
        filters += [f"setparams=color_primaries={primaries.replace('unknown', 'bt2020')}:color_trc={transfer}",
                    "format=yuv444p10le", "zscale=t=linear:npl=100",               # code values to linear light,
                    "format=gbrpf32le", "zscale=p=bt709",                          # SDR's primaries,
                    "tonemap=hable:desat=0",                                       # highlights compressed,
                    "zscale=t=bt709:r=pc", "format=gbrp"]                          # back to code values
    return ",".join([*filters, "format=rgb24"])

def picture_times(log):
    """[(time, duration)] of the pictures that ffmpeg decoded, in seconds, by its log."""
    found = re.findall(r"^\[.* @ .*\[info\] decoder -> .* pts_time:(\S+) .*duration_time:(\S+)", log, re.MULTILINE)
    return [(float(time), float(duration)) for time, duration in found if time != "NOPTS"]

def decode(path, film, filters, *output, start=0.0):
    """Decode a film strictly, from `start` seconds on. Returns what `filters` make of it and its pictures, [(time,
    duration)], counted from there or, if that comes later, from the first picture."""
    decoder = ["-c:v", "libvpx-vp9"] if film.codec == "vp9" else []    # ffmpeg's own does not notice damage
    for seek in (max(0, min(start, film.seconds) - 5), 0):             # from the beginning if one ends inside a group
        place = ["-noaccurate_seek", "-ss", str(seek)] if seek else []
        zero = f"max(STARTPTS,{start - seek}/TB)" if start else "STARTPTS"
        made, log = run_ffmpeg(path, "-map", film.stream, "-vf", f"settb=AVTB,setpts='PTS-{zero}',{filters}",
                               "-fps_mode", "passthrough", "-map_metadata", "-1", *output, options=[*decoder, *place])
        pictures = picture_times(log)
        opening, _, work = log.partition("\n[info] Stream mapping:")
        faults = re.findall(r"^\[in#.* @ .*\[error\].*", opening, re.MULTILINE)
        faults += re.findall(rf"^.* @ .*(?:{FAULT}).*", work, re.MULTILINE)
        whole = pictures and not faults
        if seek == 0 or whole and pictures[0][0] <= start - seek:
            break
    if not whole:
        reason = faults[0].rpartition("] ")[2] if faults else "no picture"
        raise UserError(f"{path}: is damaged, or begins inside a group of pictures ({reason}); {MEND}")
    begin = max(pictures[0][0], start - seek) if start else pictures[0][0]
    return made, [(time - begin, duration) for time, duration in pictures]

def read_video(path, frames, height, width, fps, start=0.0):
    """A film as a player shows it, (3,F,height,width) fp32 in [-1,1]. Frame k is what is on screen k/fps s after
    `start`, or after the first picture: upright, with square pixels, de-interlaced, in SDR, resized to cover and
    cropped at the centre. Raises UserError for a film that is missing, damaged, too short or of a rare kind."""
    film = read_video_header(path)
    flags = "area" if film.width * film.height > width * height else "bicubic"
    if (film.width, film.height) != (width, height):       # at the same size, ffmpeg's default colours, bit for bit
        flags += "+accurate_rnd+full_chroma_int+full_chroma_inp"
    cover = f"scale=w='max({width},round({height}*dar))':h='max({height},round({width}/dar))':flags={flags}"
    # On screen at k/fps is the last picture that began by then, so times are rounded up; 1 ms is taken off first, since
    # some formats round to that. The last picture is held on a fine grid, before the coarse one is taken.
    instants = ("setpts=PTS-1000", f"fps={30 * fps}:start_time=0:round=up",
                "tpad=stop_mode=clone:stop_duration=2", f"fps={fps}:round=up")
    filters = f"{picture_filters(film, cover, instants)},crop={width}:{height}:exact=1"
    pixels, pictures = decode(path, film, filters, "-frames:v", str(frames), "-f", "rawvideo", "-", start=start)
    video = np.frombuffer(bytearray(pixels), np.uint8).reshape(-1, height, width, 3)
    time, duration = pictures[-1]
    needed = (frames - 1) / fps
    if len(video) < frames or time + duration + min(duration, 1 / fps) < needed - 0.002:
        raise UserError(f"{path}: lasts {start + time + duration:.2f} s, but {frames} frames at {fps} fps from {start:g} "
                        f"s on need {start + needed:.2f} s; leave it out or choose fewer --frames")
    return from_uint8(video)

def write_video(path, frames, fps):
    """(F,H,W,3) uint8 -> .mp4: H.264, which plays anywhere; even sides."""
    content = imageio.mimwrite(imageio.RETURN_BYTES, frames, format="mp4", fps=fps, quality=None, macro_block_size=2,
                               output_params=["-crf", "12"])
    with whole_file(path) as part:
        part.write_bytes(content)

def open_image(path):
    """A picture as a viewer shows it, upright, in sRGB, on white, as Pillow's RGB image."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
            raise ValueError(f"its pixels are {image.mode}; save it as RGB with 8 bits a colour")
        profile = image.info.get("icc_profile")
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if profile:
            with suppress(ImageCms.PyCMSError):            # a broken profile: viewers ignore it too
                image = ImageCms.profileToProfile(image, BytesIO(profile), ImageCms.createProfile("sRGB"))
        image = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError) as e:
        raise UserError(f"{path}: cannot be read as a picture ({e!s:.120})") from e
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

def read_image(path, height, width):
    """A picture, (3,1,height,width) fp32 in [-1,1], as a viewer shows it, resized to cover and cropped at the centre.
    Raises UserError for one that cannot be read, or not of 8 bits a colour."""
    image = open_image(path)
    smaller = height < image.height and width < image.width
    image = ImageOps.fit(image, (width, height), Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC)
    return from_uint8(np.array(image)[None])

def read_ahead(clips, read, faults):
    """Yield (clip, read(clip)) in order, while READERS threads read on. A UserError goes to the list `faults`."""
    coming = iter(clips)
    queue = deque()
    with ThreadPool(READERS) as pool:
        while True:
            for clip in islice(coming, READERS - len(queue)):
                queue.append((clip, pool.apply_async(read, [clip])))
            if not queue:
                return
            clip, reading = queue.popleft()
            try:
                found = reading.get()
            except UserError as e:
                faults.append(str(e))
                continue
            yield clip, found
