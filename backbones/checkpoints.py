"""Checkpoints of transformers, on disk or on the hub, and the device that they go to: what can go
wrong is said in one sentence, before a weight is read."""

import copy
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    BatchFeature,
    PreTrainedConfig,
    Qwen2_5_VLProcessor,
)
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

# what transformers reads of a checkpoint beside its weights and templates; objects all of them
FILES = ("config", "generation_config", "preprocessor_config", "processor_config",
         "video_preprocessor_config", "tokenizer", "tokenizer_config", "special_tokens_map",
         "added_tokens", "chat_template", "model.safetensors.index")
# of these {} would be read as settings that no checkpoint means
NEVER_EMPTY = ("config", "preprocessor_config", "tokenizer", "tokenizer_config")


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """The stock processor without its video half, which cannot be built without torchvision."""

    # transformers reads the parts to load from this signature: none of them is a video_processor
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token = self.video_token_id = self.video_processor = None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


BY_LENGTH = "flash_by_length"         # what is called flash is given all pieces at once


def attend_by_length(module, query, key, value, attention_mask=None, scaling=None,
                     cu_seq_lens_q=None, **kwargs):
    """Attention within the pieces of one sequence, such as the windows of Qwen2.5-VL's encoder, all
    of a length in one call: transformers' own sdpa is called once for each of a hundred windows.

    query, key, value (1, heads, n, d) | cu_seq_lens_q (pieces + 1,): where they begin and end
    -> (1, n, heads, d), None
    """
    lengths = cu_seq_lens_q.diff()
    of_token = lengths.repeat_interleave(lengths)
    output = torch.empty_like(query)
    for length in {*lengths.tolist()}:
        at = (of_token == length).nonzero().squeeze(1)         # piece after piece
        pieces = (x[0, :, at].unflatten(1, (-1, length)).transpose(0, 1)
                  for x in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(*pieces, scale=scaling)
        output[0, :, at] = attended.transpose(0, 1).flatten(1, 2)
    return output.transpose(1, 2), None


AttentionInterface.register(BY_LENGTH, attend_by_length)


def check_files(folder: Path) -> None:
    """Raises ValueError naming a file of a checkpoint that is damaged, as a download that was cut
    short leaves it, FileNotFoundError for missing weights. Of weights the headers are read alone.
    """
    def damaged(file: Path, cause) -> ValueError:
        return ValueError(f"{file} is damaged ({cause}): download or copy it again")
    for file in (folder / f"{name}.json" for name in FILES):
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (ValueError, OSError) as error:
            raise damaged(file, error) from error
        is_empty = file.stem in NEVER_EMPTY and file.exists() and not content
        if is_empty or not isinstance(content, dict):
            raise damaged(file, "expected an object of JSON that holds something")
        shards = content.get("weight_map", {}) if "index" in file.name else {}
        lacking = sorted(shard for shard in {*shards.values()} if not (folder / shard).exists())
        if lacking:
            raise FileNotFoundError(f"{folder / lacking[0]} is missing, and {file.name} names it: "
                                    "download or copy it")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from error


def folder_of(name: str) -> Path | None:
    """Where a checkpoint lies, here or in the hub's cache; None if nowhere."""
    if Path(name).is_dir():
        return Path(name)
    try:
        file = try_to_load_from_cache(name, "config.json")
    except hub.HFValidationError:                     # no name on the hub either
        return None
    return Path(file).parent if isinstance(file, str) else None


@contextmanager
def reading(name: str):
    """What goes wrong while the checkpoint `name` is read -> one sentence: cause, what to do."""
    try:
        yield
    except (MemoryError, ImportError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)

        def is_due_to(*kinds) -> bool:
            return any(isinstance(cause, kinds) for cause in causes)
        nowhere = f"no checkpoint at {name!r}: "
        if is_due_to(hub.GatedRepoError):
            raise PermissionError(
                f"{name!r} is gated: accept its terms at https://huggingface.co/{name}, then log "
                "in with `hf auth login` or set HF_TOKEN to a token of that account") from error
        if is_due_to(hub.RepositoryNotFoundError):
            raise FileNotFoundError(
                f"{nowhere}neither a folder here nor a model on the Hugging Face hub; check the "
                "spelling, or log in with `hf auth login` if it is private") from error
        offline = is_due_to(hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError)
        if offline and not Path(name).is_dir():
            raise ConnectionError(
                f"{nowhere}neither a folder here nor in the hub's cache, and the hub cannot be "
                "reached; connect, unset HF_HUB_OFFLINE, or name a folder") from error
        if folder := folder_of(name):
            check_files(folder)
        raise FileNotFoundError(
            f"{nowhere}expected a folder with a config.json and weights, or a name on the Hugging "
            f"Face hub; train or download it first ({error})") from error
    except Exception as error:        # at a broken file, transformers and tokenizers raise any type
        if folder := folder_of(name):
            check_files(folder)
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"{name!r} cannot be read ({cause}): expected a whole checkpoint of "
                         "transformers; download or copy it again") from error


def read_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint, before anything large is read. Raises as from_pretrained()."""
    with reading(name):
        # names on the hub are owner/model
        is_folder = Path(name).is_dir() or name.count("/") > 1 or name[:1] in "./~"
        if is_folder and not Path(name, "config.json").is_file():
            raise OSError("the folder has no config.json")
        if is_folder:
            check_files(Path(name))
        values, _ = PreTrainedConfig.get_config_dict(name)
    if (kind := values.get("model_type")) not in CONFIG_MAPPING:
        raise ValueError(f"{name!r} has model_type {kind!r}, which transformers does "
                         "not know: expected a vision-language model")
    with reading(name):
        return AutoConfig.from_pretrained(name)


def read_processor(name: str, processor_class):
    """Tokenizer, image processor and chat template of a checkpoint. Raises as from_pretrained()."""
    with reading(name):
        processor = processor_class.from_pretrained(name)
        tokenizer, text = processor.tokenizer, ""
        template = processor.chat_template or tokenizer.chat_template
        if template:                                  # one that was cut short raises
            said = [{"role": "user", "content": [{"type": "text", "text": "\ue000"}]}]
            text = tokenizer.apply_chat_template(said, chat_template=template, tokenize=False)
    folder = folder_of(name)
    is_told = folder is None or (folder / "tokenizer_config.json").exists()
    parts = {"tokenizer_config.json": is_told,
             "a chat template that writes what is said (chat_template.jinja)": "\ue000" in text,
             "an end-of-sequence token (tokenizer_config.json)": tokenizer.eos_token,
             "a patch_size (processor_config.json)": getattr(processor, "patch_size", True)}
    if lacking := [part for part, there in parts.items() if not there]:
        raise ValueError(f"{name!r} lacks {' and '.join(lacking)}: download or copy it again")
    return processor


def each_once(processor):
    """A copy of a processor, or image processor, for which a picture that stands several times in a
    list is resized and cut up once; the tensors are those of the whole list. Many rows of a batch
    ask about the picture of another row."""
    changed = copy.copy(processor)
    if hasattr(processor, "image_processor"):
        changed.image_processor = each_once(processor.image_processor)
        return changed

    def preprocess(images: list, *args, **how) -> BatchFeature:
        first = {id(image): image for image in images}
        made = processor.preprocess([*first.values()], *args, **how)
        if len(first) == len(images):
            return made
        place = {key: n for n, key in enumerate(first)}
        order = [place[id(image)] for image in images]
        # of some families a picture has several rows of pixels: patches, or crops
        counts = made["image_grid_thw"].prod(1) if "image_grid_thw" in made else (
            made.get("num_patches"))
        for name, x in made.items():
            if len(x) == len(first):
                made[name] = x[order]
            else:
                parts = x.split(counts.tolist())
                made[name] = torch.cat([parts[n] for n in order])
        return made
    changed.preprocess = preprocess
    return changed


def blank_model(config, dtype=torch.bfloat16, device="meta", attn: str = "sdpa") -> nn.Module:
    """The model of a config with random weights, always the same, made on the device in dtype.
    On "meta" it has shapes alone, in no memory."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config, dtype=dtype,
                                                       attn_implementation=attn)


def read_weights(name: str, config, dtype, device: torch.device, attn: str) -> nn.Module:
    """The model of a checkpoint. Raises ValueError if it lacks weights, which transformers would
    draw at random."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()              # its report on weights is the sentence below
    with reading(name):
        # straight to the device: the CPU's memory may be smaller than the GPU's
        model, found = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation=attn, output_loading_info=True,
            device_map=None if device.type == "cpu" else {"": device})
    logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{name!r} lacks {len(missing)} of its weights, such as {missing[0]}: "
                         "expected a whole checkpoint; download it again, or convert it to the "
                         "layout of the Hugging Face hub")
    return model


def weight_bytes(config, dtype=torch.bfloat16) -> int:
    """What the weights of a config take in dtype, counted on its modules."""
    return sum(p.numel() * p.element_size() for p in blank_model(config, dtype).parameters())


def check_device(name, dtype) -> torch.device:
    """The device of this name. Raises ValueError for one that is not there or lacks the type."""
    n = torch.cuda.device_count()
    known = ["cpu", *["cuda"] * (n > 0), *(f"cuda:{i}" for i in range(n))]
    if str(name) not in [*known, "cpu:0", "meta"]:
        raise ValueError(f"device={str(name)!r}: this machine has {', '.join(known)}")
    device = torch.device(name)
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise ValueError("dtype=bfloat16: this GPU does not have it, expected float16 or float32")
    return device


def free_bytes(device: torch.device) -> int | None:
    """Memory that a device has left for new tensors; None where nothing tells."""
    info = Path("/proc/meminfo")
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not info.exists():
        return None
    lines = dict(line.split(":") for line in info.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def check_room(name: str, config, dtype, device: torch.device) -> None:
    """Raises MemoryError if the weights of a config do not fit the device."""
    need, free = weight_bytes(config, dtype), free_bytes(device)
    if free is not None and need > free:
        raise MemoryError(
            f"the weights of {name!r} need {need / 2**30:.1f} GiB in {dtype}, {device} has "
            f"{free / 2**30:.1f} GiB free: choose a smaller dtype, such as bfloat16, or another "
            "device, or end what else runs there")


def most_positions(config) -> int:
    """Tokens that a language model can read exactly: those that it has positions for, by a scaled
    rotary embedding too, and no more than fit its window where attention slides. Beyond it, what a
    token sees would depend on how many were pruned before it."""
    rope = getattr(config, "rope_parameters", None) or {}
    most = config.max_position_embeddings
    base = rope.get("original_max_position_embeddings") or most
    most = max(most, int(base * (rope.get("factor") or 1)))
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return min(most, window) if window and slides else most
