"""Weights in the published files: read strictly, each rank its own rows; written whole or not at all."""
import json, shutil
from collections import Counter

from support import UserError
from support.files import MARK, open_tensors, visible, whole_file, writing
import huggingface_hub
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

def empty(network, config, dtype, device, shard=lambda net: None):
    """A network with uninitialised memory on `device`, sharded first, so that a rank allocates only its own part."""
    with torch.device("meta"):
        net = network(config)
    if dtype != torch.float32:                             # a dry run's fake tensors cannot be converted
        net.to(dtype)
    shard(net)
    return net.to_empty(device=device)

def own_rows(tensor):
    """What this process holds of a tensor, and the number of its first row: everything or, under FSDP, some rows."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0]

@torch.no_grad()
def fill(target, stored):
    """Fill the tensors of `target` {name: tensor}, which may be sharded, with the Stored ones of the same names. In a
    checkpoint, each rank has written its own rows of a tensor into a file of its own."""
    rows = Counter()
    for file in visible(stored.folder, "*.safetensors"):
        with open_tensors(file) as f:
            parts = json.loads((f.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in [name for name in f.keys() if name.startswith(stored.prefix)]:
                source = f.get_slice(name)
                shape = source.get_shape()
                tensor = target.get(name.removeprefix(stored.prefix))
                if tensor is None:
                    raise UserError(f"{file}: tensor {name} is not expected")
                if len(shape) != tensor.ndim or shape[1:] != list(tensor.shape[1:]):
                    raise UserError(f"{file}: tensor {name} is {shape}, expected {list(tensor.shape)}")
                begin = parts[name]["saved_offsets"][0] if parts else 0
                end = begin + shape[0]
                mine, first = own_rows(tensor)
                low, high = max(first, begin), min(first + len(mine), end)
                if low < high:
                    mine[low - first:high - first] = source[low - begin:high - begin]
                rows[name.removeprefix(stored.prefix)] += shape[0]
    if not rows:
        raise UserError(f"{stored.folder}: holds no .safetensors weights (pickled weights are not read)")
    for name, tensor in target.items():
        if rows[name] != len(tensor):
            raise UserError(f"{stored.folder}: cannot be read into this network: tensor {name} has {rows[name]} rows, "
                            f"expected {len(tensor)} ({len(target)} tensors expected, {len(rows)} found)")

def read_adapters(stored):
    """{name: tensor} of Stored adapters, whole and in fp32."""
    rows = Counter()
    tensors = {}
    for file in visible(stored.folder, "*.safetensors"):
        with open_tensors(file) as f:
            for name in [name for name in f.keys() if name.startswith(stored.prefix)]:
                shape = f.get_slice(name).get_shape()      # in a checkpoint, of one rank's rows
                rows[name] += shape[0]
                tensors[name.removeprefix(stored.prefix)] = torch.empty(rows[name], *shape[1:])
    fill(tensors, stored)
    return tensors

def gather(net, **which):
    """{name: tensor} of a network, whole and in CPU memory, on rank 0; {} on others. Every rank must call it."""
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True, **which))

def save_adapters(tensors, file, base):
    """Write adapters {name: tensor} as diffusers does, with the fingerprint of their base."""
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")]
    rank = len(tensors[f"{layers[0]}.lora_A.weight"])
    config = {"transformer.r": rank, "transformer.lora_alpha": rank, "transformer.target_modules": layers}
    noted = {"format": "pt", "base": base, "lora_adapter_metadata": json.dumps(config)}
    with whole_file(file) as part:
        save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, part, noted)

def save_part(tensors, config, where, dtype=None, stem="diffusion_pytorch_model"):
    """Write a network's {name: tensor} and its config as the folder `where`, whole or not at all, in files of at most
    5 GB, as the published ones."""
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    part = where.with_name(where.name + MARK)
    shutil.rmtree(part, ignore_errors=True)                # of a process that was killed while writing
    with writing(where):
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        huggingface_hub.save_torch_state_dict(tensors, part, filename_pattern=stem + "{suffix}.safetensors")
        shutil.rmtree(where, ignore_errors=True)
        part.rename(where)
