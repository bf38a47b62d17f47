"""Weights in the published files: read strictly, each rank its own rows; written whole or not at all."""
import json, shutil
from collections import Counter

from support import UserError
from support.files import MARK, cannot_write, open_tensors, visible, whole_file
import huggingface_hub
import torch
from safetensors import SafetensorError
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
def fill(target, folder, prefix=""):
    """Fill the tensors of `target` {name: tensor}, which may be sharded, from all .safetensors files in a folder. Names
    and shapes must match exactly; names without `prefix` are ignored. In a checkpoint, each rank has written its own
    rows of a tensor into a file of its own. Index files are not needed, so none is read."""
    found = Counter()
    for file in visible(folder, "*.safetensors"):
        with open_tensors(file) as f:
            parts = json.loads((f.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
            for name in [name for name in f.keys() if name.startswith(prefix)]:
                if name not in target:
                    raise UserError(f"{file}: tensor {name} is not expected")
                stored = f.get_slice(name)
                shape, expected = stored.get_shape(), list(target[name].shape)
                if len(shape) != len(expected) or shape[1:] != expected[1:]:
                    raise UserError(f"{file}: tensor {name} is {shape}, expected {expected}")
                rows = shape[0]
                found[name] += rows
                begin = parts[name]["saved_offsets"][0] if parts else 0
                mine, first = own_rows(target[name])
                low, high = max(first, begin), min(first + len(mine), begin + rows)
                if low < high:
                    mine[low - first:high - first] = stored[low - begin:high - begin]
    if not found:
        raise UserError(f"{folder}: holds no .safetensors weights (pickled weights are not read)")
    for name, tensor in target.items():
        if found[name] != len(tensor):
            raise UserError(f"{folder}: cannot be read into this network: tensor {name} has {found[name]} rows, expected "
                            f"{len(tensor)} ({len(target)} tensors expected, {len(found)} found)")


def read_weights(net, folder, prefix=""):
    """`fill` a network, and return it."""
    fill({prefix + name: tensor for name, tensor in net.state_dict().items()}, folder, prefix)
    return net


def read_adapters(folder, prefix):
    """{name: tensor} of the adapters in a folder's .safetensors files, whole and in fp32."""
    rows = Counter()
    tensors = {}
    for file in visible(folder, "*.safetensors"):
        with open_tensors(file) as f:
            for name in [name for name in f.keys() if name.startswith(prefix)]:
                shape = f.get_slice(name).get_shape()      # in a checkpoint, of one rank's rows
                rows[name] += shape[0]
                tensors[name] = torch.empty(rows[name], *shape[1:])
    fill(tensors, folder, prefix)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def save_adapters(tensors, file, base):
    """Write adapters {name: tensor}, which may be sharded, as diffusers does, with the fingerprint of their base. Every
    rank must call it. Raises UserError if there is no room."""
    whole = {}
    for name, tensor in tensors.items():                   # a collective, where they are sharded
        tensor = tensor.detach()
        whole[f"transformer.{name}"] = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.cpu()
    layers = {name.rpartition(".lora_A")[0]: len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    rank = max(layers.values())
    config = {"transformer.r": rank, "transformer.lora_alpha": rank, "transformer.target_modules": list(layers)}
    noted = {"format": "pt", "base": base, "lora_adapter_metadata": json.dumps(config)}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with whole_file(file) as part:
            save_file(whole, part, noted)


def save_part(net, config, where, dtype=None, stem="diffusion_pytorch_model"):
    """Write a network and its config as the folder `where`, whole or not at all. Every rank must call it; rank 0 then
    holds the whole network in CPU memory (22 GB in fp32 at 5B, 11 GB more to convert it to bf16). Raises UserError if
    there is no room."""
    # A collective, which leaves everything on rank 0.
    tensors = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    part, before = where.with_name(where.name + MARK), where.with_name(where.name + ".old" + MARK)
    try:
        if before.exists() and not where.exists():         # killed between the two renames below
            before.rename(where)
        shutil.rmtree(part, ignore_errors=True)            # of a process that was killed while writing
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        # split at 5 GB, as the published files are
        huggingface_hub.save_torch_state_dict(tensors, part, filename_pattern=stem + "{suffix}.safetensors")
        if where.exists():
            where.rename(before)
        part.rename(where)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(part, ignore_errors=True)
        raise cannot_write(where, e) from e
