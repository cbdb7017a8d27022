"""Before a model is loaded: whether it is there, whether it fits; and models of real shape without weights."""

from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import errors as hub
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaModel, PreTrainedConfig


@contextmanager
def reading(name: str):
    """What goes wrong in it while the checkpoint `name` is read -> one sentence with the cause and what to do."""
    try:
        yield
    except OSError as error:
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)

        def found(*kinds) -> bool:
            return any(isinstance(cause, kinds) for cause in causes)
        nowhere = f"no checkpoint at {name!r}: "
        if found(hub.GatedRepoError):
            raise PermissionError(f"{name!r} is gated: accept its terms at https://huggingface.co/{name}, then log in "
                                  "with `hf auth login` or set HF_TOKEN to a token of that account") from error
        if found(hub.RepositoryNotFoundError):
            raise FileNotFoundError(f"{nowhere}neither a folder here nor a model on the Hugging Face hub; check the "
                                    "spelling, or log in with `hf auth login` if it is private") from error
        if found(hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) and not Path(name).is_dir():
            raise ConnectionError(f"{nowhere}neither a folder here nor in the hub's cache, and the hub cannot be "
                                  "reached; connect, unset HF_HUB_OFFLINE, or name a folder") from error
        raise FileNotFoundError(f"{nowhere}expected a folder with a config.json and weights, or a name on the Hugging "
                                f"Face hub; train or download it first ({error})") from error


def blank_model(config: PreTrainedConfig, dtype=torch.bfloat16, device="meta", attn: str = "sdpa") -> nn.Module:
    """The model of a config with random weights, always the same, made on the device and in dtype from the start: no
    other copy is ever made. On "meta" it has shapes alone, in no memory."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attn)


def weight_bytes(config: PreTrainedConfig, dtype=torch.bfloat16) -> int:
    """What the weights of a config take in dtype, counted on its modules."""
    return sum(p.numel() * p.element_size() for p in blank_model(config, dtype).parameters())


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left for new tensors; None where nothing tells (other than CUDA and Linux)."""
    if device.type == "cuda":                          # what PyTorch holds without using it is free, too
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device)
    if device.type == "cpu" and (info := Path("/proc/meminfo")).exists():
        return 1024 * int(dict(line.split(":") for line in info.read_text().splitlines())["MemAvailable"].split()[0])
    return None


def random_language_model(layers: int, width: int = 4096, dtype=torch.bfloat16) -> nn.Module:
    """A decoder of LLaVA-1.5-7B's shape but `layers` deep, with random weights: for timing, it answers nothing."""
    config = LlamaConfig(hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
                         num_attention_heads=width // 128, vocab_size=32064)
    return LlamaModel._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
