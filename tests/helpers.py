"""What the tests share: small networks with known answers, toy clips and caches, the commands called as functions."""
import gc, json, multiprocessing, re, shutil, sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

from support import command, files, films, folders, weights
import imageio.v2 as imageio
import numpy as np
import pytest
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.nn.utils import vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model
import realdpo
import sample
import train
from realdpo import Condition
from toy import world

REPO = Path(data.__file__).parent
gc.freeze()                                                # no collection looks at what is loaded by now

# Further processes are forked from one that has only loaded torch, once for all tests.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.helpers"])


# ---- Numbers --------------------------------------------------------------------------------------------------------

def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

def relative(ours, theirs):
    """Largest difference, relative to the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()

def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def assert_unrelated(numbers):
    """That the rows (N,…) are drawn from a standard normal distribution, each independently of the others."""
    similar = torch.corrcoef(numbers.flatten(1))
    assert (similar - torch.eye(len(numbers))).abs().max() < 0.1
    assert numbers.mean() == pytest.approx(0, abs=0.05) and numbers.std() == pytest.approx(1, abs=0.05)


# ---- Small networks with random weights, and configs of published ones ----------------------------------------------

DIT = dict(_class_name="CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, num_layers=2,
           in_channels=8, out_channels=4, patch_size=2, time_embed_dim=24, text_embed_dim=12, max_text_seq_length=7,
           sample_frames=17, sample_height=4, sample_width=6, temporal_compression_ratio=4, norm_eps=1e-5,
           use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True)
VAE = dict(_class_name="AutoencoderKLCogVideoX", block_out_channels=[8, 16, 16, 24], layers_per_block=1,
           latent_channels=6, norm_num_groups=4, in_channels=3, out_channels=3, norm_eps=1e-6,
           temporal_compression_ratio=4, scaling_factor=0.7)
T5 = dict(architectures=["T5EncoderModel"], vocab_size=160, d_model=12, d_kv=8, d_ff=32, num_layers=3, num_heads=2,
          feed_forward_proj="gated-gelu", relative_attention_num_buckets=32, relative_attention_max_distance=128,
          layer_norm_epsilon=1e-6)
SCHEDULER = dict(_class_name="CogVideoXDDIMScheduler", beta_start=0.00085, beta_end=0.012,
                 beta_schedule="scaled_linear", num_train_timesteps=1000, prediction_type="v_prediction",
                 rescale_betas_zero_snr=True, set_alpha_to_one=True, snr_shift_scale=1.0,
                 timestep_spacing="trailing", clip_sample=False)
FULL_DIT = DIT | dict(num_attention_heads=48, attention_head_dim=64, num_layers=42, in_channels=32, out_channels=16,
                      time_embed_dim=512, text_embed_dim=4096, max_text_seq_length=226,
                      sample_frames=49, sample_height=60, sample_width=90)
FULL_VAE = VAE | dict(block_out_channels=[128, 256, 256, 512], layers_per_block=3, latent_channels=16,
                      norm_num_groups=32)
FULL_T5 = T5 | dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)

CONFIG = "transformer/config.json"
SCHEDULE = "scheduler/scheduler_config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PROMPTS = ["a figure waves its left arm", "", "🤸🏽‍♀️ jumps 🎉", "cafe\u0301 nai\u0308ve Z\u0351\u036ba\u0310lgo\u0321",
           "شخص يلوح بيده اليسرى", "一个人挥动左手，然后坐下", "zero\u200bwidth\u200d\ufeff\u2060 marks",
           "ﬁne ligatures, ½, Ⅷ and ™", " \t\n ", "</s> <pad> \x00", "over-long " * 300]

@torch.no_grad()
def scramble(net, seed=0):
    """Seeded numbers in every weight and buffer, so that no ones, zeros or sine table can hide a mistake."""
    for i, (name, x) in enumerate(net.state_dict().items()):
        noise = randn(*x.shape, seed=1000 * seed + i)
        x.copy_(noise * x[0].numel() ** -0.5 if x.ndim > 1 else 0.1 * noise + name.endswith("weight"))
        if any(part in name for part in ("to_q", "to_k", "conv_in", "shared")):
            x *= 0.01                                      # faint, so that the epsilon of the norm behind it shows
    return net.eval()

def save_networks(folder, dit, vae, t5):
    """The three networks of these configs with random weights, as a model folder."""
    model.save_dit(model.Denoiser(scramble(model.DiT(dit)), model.VPrediction(SCHEDULER), SCHEDULER), folder)
    weights.save_part(scramble(model.VAE(vae)).state_dict(), vae, folder / "vae")
    weights.save_part(scramble(model.T5Encoder(t5)).state_dict(), t5, folder / "text_encoder", stem="model")
    return folder

@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A whole model folder, written by our own code."""
    folder = save_networks(tmp_path_factory.mktemp("models") / "small", DIT, VAE, T5)
    (folder / "tokenizer").mkdir()
    with open(folder / "tokenizer" / "spiece.model", "wb") as file:          # knows the letters of five prompts only
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(PROMPTS[:5]), model_writer=file,
                                                 vocab_size=T5["vocab_size"], hard_vocab_limit=False,
                                                 pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=3)
    return folder

@pytest.fixture
def denoiser(folder):
    return model.load_dit(folder)

@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the model folder, to change."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))

@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")

def public(config):
    """A config without the remarks that diffusers adds to it."""
    return {k: v for k, v in config.items() if k[0] != "_"}

def rewrite(file, **changes):
    """Change entries of a JSON or safetensors file; ... drops one."""
    is_json = file.suffix == ".json"
    entries = json.loads(file.read_text()) if is_json else load_file(file)
    entries = {k: v for k, v in (entries | changes).items() if v is not ...}
    if is_json:
        file.write_text(json.dumps(entries))
    else:
        save_file(entries, file)


# ---- The method's arguments, small ----------------------------------------------------------------------------------

def inputs(batch=1, frames=5, height=4, width=6, seed=0, c=DIT):
    """x_t, and a condition with its own text and image a sample."""
    latents, text = (batch, c["out_channels"]), (batch, c["max_text_seq_length"], c["text_embed_dim"])
    return (randn(*latents, frames, height, width, seed=seed),
            Condition(randn(*text, seed=seed + 1), randn(*latents, 1, height, width, seed=seed + 2)))

def preference(batch, n):
    """Everything realdpo_loss is given, β apart."""
    win, cond = inputs(batch, frames=3)
    return dict(win=win, lose=randn(batch, n, *win.shape[1:], seed=4), cond=cond, t=torch.linspace(0.9, 0.1, batch),
                noise=randn(*win.shape, seed=5))

class Toy(nn.Module):
    """A denoiser of a few weights that looks at everything it is given."""

    def __init__(self, seed):
        super().__init__()
        self.mix, self.read = nn.Linear(4, 4), nn.Linear(12, 4)
        vector_to_parameters(0.5 * randn(72, seed=seed), self.parameters())

    def forward(self, x_t, cond, t):
        caption = self.read(cond.text.mean(1))[:, None, None, None]
        h = self.mix(x_t.movedim(1, -1)) + t.float()[:, None, None, None, None] * caption
        return torch.tanh(h).movedim(-1, 1) + 0.3 * cond.image

    time_grid = model.FlowPrediction.time_grid

class Watched(nn.Module):
    """A denoiser of one weight that notes how many videos each call has, and how many of its graphs are alive."""

    def __init__(self):
        super().__init__()
        self.weight, self.alive, self.most, self.calls = nn.Parameter(torch.tensor(0.5)), WeakSet(), 0, []

    def forward(self, x_t, cond, t):
        def keep(tensor):
            def kept():                                    # what the graph keeps for its backward pass
                return tensor

            self.alive.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept()):
            out = x_t * self.weight
        self.calls.append(len(x_t))
        self.most = max(self.most, len(self.alive))
        return out

def distances(denoiser, noise, cond):
    """How far multistep with 25 evaluations and Euler with 50 end from the exact path, which 1000 steps stand for:
    RMS, relative."""
    def solve(steps, solver="euler"):
        return realdpo.sample(denoiser, noise, cond, guidance=1, steps=steps, solver=solver, progress=False)

    exact, found = solve(1000), []
    for x in (solve(25, "multistep"), solve(50)):
        found.append(((x - exact).square().mean() / exact.square().mean()).sqrt().item())
    return found


# ---- The commands, called as functions ------------------------------------------------------------------------------

SHORT = dict(model="tiny", steps=4, batch=4, micro_batch=4, lr=1e-4, warmup=1, decay=0.0, beta=25.0,
             anchor=1000.0, compare_every=1, t_draw="uniform", checkpointing="none", graphs="all", save_every=9)

def encode(videos, out, **options):
    data.main(data.Options(videos=str(videos), model="tiny", out=str(out), **options))
    return out

def add_negatives(cache, **options):
    few = dict(model="tiny", data=str(cache), negatives=2, steps=2, guidance=1.0)
    sample.main(sample.Options(**few | options))
    return cache

def make_video(out, picture, **options):
    short = dict(model="tiny", image=str(picture), prompt="a figure marches in place slowly", out=str(out), steps=2,
                 guidance=2.0)
    sample.main(sample.Options(**short | options))
    return np.stack(imageio.mimread(out, memtest=False))

def generate_bench(shots, out, **options):
    short = dict(model="tiny", steps=1, frames=9, guidance=1.0)
    sample.main(sample.Options(bench=str(shots), out=str(out), **short | options))
    return out

@contextmanager
def as_a_process():
    """What the end of a process would do for train.py: no process group is left behind."""
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

def run_training(out, cache, **options):
    """train.py; returns what metrics.jsonl then holds."""
    with as_a_process():
        train.main(train.Options(**SHORT | dict(data=str(cache), out=str(out)) | options))
    return metrics(out)

def on_rank(monkeypatch, rank, world_size):
    """Be one of several processes from here on, as torchrun says it."""
    for name, value in dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=rank).items():
        monkeypatch.setenv(name, str(value))

def spy_on_losses(monkeypatch, change=lambda count, loss: loss):
    """A list that fills with the tensors of every loss that training takes; `change` may turn the count-th into
    another."""
    loss, calls = train.realdpo_loss, []

    def spy(*models, **tensors):
        calls.append(tensors)
        value, numbers = loss(*models, **tensors)
        return change(len(calls), value), numbers

    monkeypatch.setattr(train, "realdpo_loss", spy)
    return calls

def spy_on_videos(monkeypatch):
    """A list that fills with the names of the videos that sample.py writes."""
    made, write = [], films.write_video

    def spy(file, *rest):
        made.append(file.name)
        write(file, *rest)

    monkeypatch.setattr(films, "write_video", spy)
    return made

def refusal(monkeypatch, name, *arguments):
    """The one line with which `python NAME.py ARGUMENTS` ends."""
    module = sys.modules[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as stopped, as_a_process():
        command.command(module.main, module.Options, name)
    message = stopped.value.code                       # a string: Python prints it to stderr and exits with status 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    return message


# ---- What the commands leave behind ---------------------------------------------------------------------------------

def metrics(out):
    """The lines of metrics.jsonl, without the times."""
    lines = []
    for text in (Path(out) / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines.append({k: v for k, v in line.items() if k != "seconds"})
    return lines

def checkpoint(out, step):
    """All tensors of a checkpoint that one rank wrote."""
    tensors = {}
    for file in (Path(out) / "checkpoints" / f"step-{step:06d}").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors

def exported(folder):
    return load_file(Path(folder) / "transformer" / "diffusion_pytorch_model.safetensors")

def contents(folder, what=Path.read_bytes):
    """{file: its bytes} of a folder, without what killed processes left half-written."""
    found = {}
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file() and files.MARK not in str(file) and file.name != ".owner":
            found[str(file.relative_to(folder))] = what(file)
    return found


# ---- Toy clips, a cache of their records, runs on it ----------------------------------------------------------------

NAMES = ["00000", "00001", "00002", "00003"]
SHIPPED = folders.TINY
HOSTILE = ("\"quoted\" 'text' <script>window.ran = 1</script><img src=x onerror='window.ran = 1'> </script> \\ € 人 {x}"
           "\u2028")

@pytest.fixture(scope="session", autouse=True)
def two_blocks(tmp_path_factory):
    """The tests' "tiny" has the first two of the five blocks that are SHIPPED: blocks take most of their time."""
    folder = shutil.copytree(SHIPPED, tmp_path_factory.mktemp("models") / "tiny")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(num_layers=2)))
    weights = exported(folder)
    kept = {name: weights[name] for name in weights if not re.match(r"transformer_blocks\.[2-4]\.", name)}
    save_file(kept, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "TINY", folder)
        yield

@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "videos"
    world.write_toy_videos(folder, len(NAMES), seed=0)
    return folder

@pytest.fixture(scope="session")
def cache(videos):
    return add_negatives(encode(videos, videos.parent / "cache"))

@pytest.fixture
def own_cache(cache, tmp_path):
    """A copy of the cache that a test may change."""
    return shutil.copytree(cache, tmp_path / "cache")

@pytest.fixture(scope="session")
def looks(cache):
    """Options for a look at three held-out records, which two ranks cannot share evenly."""
    held_out = shutil.copytree(cache, cache.parent / "held-out", ignore=shutil.ignore_patterns("00003*"))
    return dict(eval_data=str(held_out), save_every=1)

@pytest.fixture(scope="session")
def straight(cache, looks):
    """Four steps on one rank, undisturbed, with every checkpoint kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "KEEP", 9)
        run_training(cache.parent / "straight", cache, **looks)
    return cache.parent / "straight"

@pytest.fixture(scope="session")
def half(cache, looks):
    """The first two of these steps."""
    run_training(cache.parent / "half", cache, steps=2, **looks)
    return cache.parent / "half"

@pytest.fixture(scope="session")
def picture(videos):
    """A first frame of another size than the model's."""
    imageio.imwrite(videos.parent / "first.png", world.enlarge(world.toy_video(9, 0)[0][:1], 3)[0, :, 8:-8])
    return videos.parent / "first.png"

@pytest.fixture(scope="session")
def shots(videos, tmp_path_factory):
    """A bench of two pictures; one has the name that VBench would cut."""
    folder = tmp_path_factory.mktemp("bench") / "shots"
    folder.mkdir()
    for name, clip, caption in (("somersault", "00000", HOSTILE), ("walk-12", "00001", "a figure walks")):
        imageio.imwrite(folder / f"{name}.png", imageio.mimread(videos / f"{clip}.mp4")[0])
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder

@pytest.fixture(scope="session")
def methods(shots):
    """Three methods' videos of the bench."""
    folder = shots.parent / "methods"
    for seed, name in enumerate(["alpha-method", "beta-method", "gamma-method"]):
        generate_bench(shots, folder / name, seed=seed)
    return folder


# ---- Lists and damage -----------------------------------------------------------------------------------------------

def write_list(folder, content, videos, clips=("a.mp4", "b.mp4")):
    """A folder of toy clips with a list, or captions, of the given bytes: {file: content}."""
    folder.mkdir()
    for name, video in zip(clips, sorted(videos.glob("*.mp4"))):
        shutil.copy(video, folder / name)
    for name, text in content.items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder

def jsonl(*rows):
    return {"metadata.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}

def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    file.write_bytes(content)

DAMAGES = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty": lambda file: file.write_bytes(b""),
    "pickle": lambda file: torch.save({"win": torch.zeros(8)}, file),
    "length of the header": lambda file: flip(file, 2),
    "a name in the header": lambda file: flip(file, file.read_bytes().index(b'":{"dtype"') - 1),
    "names of shards": lambda file: flip(file, file.read_bytes().index(b"saved_offsets")),
}


# ---- Counting bytes, operator by operator ---------------------------------------------------------------------------

class Count(TorchDispatchMode):
    """Adds up, operator by operator, the bytes that `of(function, arguments, result)` finds, while this is on, and the
    calls. A collective's name is followed by its group's: default_pg, mesh_shard, mesh_replicate."""

    def __init__(self, of):
        super().__init__()
        self.of, self.bytes, self.calls = of, Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, name = function(*args, **(kwargs or {})), function.name().split("::")[1]
        if function.namespace == "c10d":
            group = next(x for x in args if isinstance(x, torch.ScriptObject))
            name += " " + dist.ProcessGroup.unbox(group).group_desc
        tensors = [x for x in tree_leaves(self.of(function, args, result)) if isinstance(x, torch.Tensor)]
        self.bytes[name] += sum(x.nbytes for x in tensors)
        self.calls[name] += 1
        return result

def carried(function, args, result):
    """What a collective puts out."""
    return args[0] if function.namespace == "c10d" else ()

def touched(function, args, result):
    """What a kernel reads and writes. A number that was expanded is read once."""
    if function.namespace != "aten" or function.is_view:
        return ()
    return [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor) and 0 not in x.stride()]
