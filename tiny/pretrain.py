"""How the two tiny VLMs came to know the world of scenes: `python tiny/pretrain.py --model llava`
(or qwen2_5_vl).

Both are real Hugging Face classes with small configs, saved like any checkpoint, so
`from_pretrained` loads them by the code path that loads 7B weights. The recipe, in order (each
stage is resumed where it was killed):

    pool       render the training scenes once
    vision     tower + projector learn a label per patch: kind, colour, cell, letter and its place,
               "here is a thing's centre", all read against the language model's own word
               embeddings, so that an image token arrives in the language model as a sum of words;
               [CLS] learns what stands in the scene
    language   projector + language model on frozen vision features: a caption in half of the
               sequences, then a dozen questions packed as turns of one dialogue; in half of the
               sequences random BACKGROUND tokens are hidden (positions kept), or else the model
               would count by density and break when pruned
    save       bf16 safetensors, tokenizer, processor and chat template into tiny/<model>/
"""

import math
import os
import sys
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs  # noqa: E402  (run as a script, the project's root is not on the path yet)
from tiny import scenes  # noqa: E402

N, CELL = 144, scenes.CELL
SIZES = {
    "llava": [(144, 144)],
    "qwen2_5_vl": [(144, 144), (192, 108), (108, 192)],
}  # 144 units each
SPECIAL = {
    "llava": ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:"],
    "qwen2_5_vl": [
        "<pad>",
        "<unk>",
        "<|im_start|>",
        "<|im_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "user",
        "assistant",
    ],
}
TEMPLATE = {
    "llava": "<s>{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image> ' }}{% else %}"
    "{{ c['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% else %}{{ 'ASSISTANT: ' }}{% for c in m['content'] %}{{ c['text'] }}"
    "{% endfor %}{{ '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'ASSISTANT: ' }}"
    "{% endif %}",
    "qwen2_5_vl": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}",
}
# the same dialogue as lists of words, for the packed training sequences; a test holds it against
# the template
TURN = {
    "llava": (["<s>"], ["USER:"], ["<image>"] * N, ["ASSISTANT:"], ["</s>"]),
    "qwen2_5_vl": (
        [],
        ["<|im_start|>", "user"],
        ["<|vision_start|>"] + ["<|image_pad|>"] * N + ["<|vision_end|>"],
        ["<|im_end|>", "<|im_start|>", "assistant"],
        ["<|im_end|>"],
    ),
}


# ------------------------------------------------------------------------------------------- the
# two models


def build_tokenizer(name):
    words = SPECIAL[name] + [w for w in scenes.vocabulary() if w not in SPECIAL[name]]
    tok = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.normalizer, tok.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    eos, bos = ("</s>", "<s>") if name == "llava" else ("<|im_end|>", None)
    image = (
        {"image_token": "<image>"}
        if name == "llava"
        else {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        }
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=eos,
        bos_token=bos,
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens=image,
    )
    fast.add_special_tokens(
        {
            "additional_special_tokens": [
                w for w in SPECIAL[name] if w[-1] in ":>" or w in ("user", "assistant")
            ]
        },
        replace_extra_special_tokens=False,
    )
    return fast


def save_processor(name, tok, out):
    """Tokenizer, chat template and image processor, in the layout of the hub."""
    if name == "llava":
        images = CLIPImageProcessorPil(size={"height": 144, "width": 144}, do_center_crop=False)
        LlavaProcessor(
            images,
            tok,
            patch_size=CELL,
            vision_feature_select_strategy="default",
            chat_template=TEMPLATE[name],
            num_additional_image_tokens=1,
        ).save_pretrained(out)
    else:  # the stock processor wants a video part, hence torchvision; its pieces do not
        tok.chat_template = TEMPLATE[name]
        tok.save_pretrained(out)
        Qwen2VLImageProcessorPil(
            patch_size=CELL // 2,
            merge_size=2,
            temporal_patch_size=1,
            size={"shortest_edge": 36 * CELL**2, "longest_edge": 400 * CELL**2},
        ).save_pretrained(out)


def flash_windows(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **_):
    """Windowed attention spelled out, all windows of one length at once: query, key, value (1,
    heads, S, D), windows cut at cu_seq_lens_q. Stock attention loops over the windows, two thousand
    times a step. Only names with "flash" in them are handed the cuts."""
    lengths, heads, rows = cu_seq_lens_q.diff(), [], []
    with torch.autocast(query.device.type, enabled=False):
        for n in lengths.unique().tolist():
            rows.append(
                (
                    cu_seq_lens_q[:-1][lengths == n, None] + torch.arange(n, device=query.device)
                ).flatten()
            )
            q, k, v = (
                x[0, :, rows[-1]].unflatten(1, (-1, n)) for x in (query * scaling, key, value)
            )
            heads.append(((q @ k.mT).softmax(-1) @ v).flatten(1, 2))
    return torch.cat(heads, 1)[:, torch.cat(rows).argsort()].transpose(0, 1)[None], None


AttentionInterface.register("flash_windows", flash_windows)


def build_model(name, tok, width=128):
    """Random weights, float32, attention spelled out: SDPA's CPU backward is several times slower
    in bf16."""
    ids = dict(
        pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id, bos_token_id=tok.bos_token_id
    )
    text = dict(
        vocab_size=len(tok),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **ids,
    )
    if name == "llava":
        vision = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=6,
            projection_dim=128,
            num_attention_heads=2,
            image_size=144,
            patch_size=CELL,
        )
        cfg = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(rope_theta=10000.0, **text),
            image_token_id=tok.image_token_id,
            image_seq_length=N,
            tie_word_embeddings=True,
        )
        cls = LlavaForConditionalGeneration
    else:
        vision = dict(
            depth=4,
            hidden_size=128,
            intermediate_size=256,
            num_heads=2,
            out_hidden_size=width,
            patch_size=CELL // 2,
            spatial_merge_size=2,
            temporal_patch_size=1,
            window_size=4 * CELL,
            fullatt_block_indexes=[1, 3],
        )
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
        cfg = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=dict(text, rope_parameters=rope),
            image_token_id=tok.image_token_id,
            video_token_id=tok.video_token_id,
            vision_start_token_id=tok.vision_bos_token_id,
            vision_end_token_id=tok.vision_eos_token_id,
            tie_word_embeddings=True,
        )
        cls = Qwen2_5_VLForConditionalGeneration
    torch.manual_seed(0)
    model = cls._from_config(cfg, attn_implementation="eager").float()
    if name != "llava":
        model.model.visual.config._attn_implementation = (
            "flash_windows"  # the setter would look for a kernel
        )
    nn.init.normal_(
        model.get_input_embeddings().weight, std=0.2
    )  # words are targets of the vision stage too
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (
        tok.eos_token_id,
        tok.pad_token_id,
    )
    return model


# ---------------------------------------------------------------------------------------- pool of
# scenes


def scene_of(name, i):
    """Training scene i: its seed is its number; Qwen's aspect ratios come in runs of 64, so
    batches can be even."""
    sizes = SIZES[name]
    return scenes.make_scene(scenes.SPLITS["train"] + i, sizes[i // 64 % len(sizes)])


def _pixels(args):
    name, i = args
    return np.asarray(scenes.render(scene_of(name, i))).reshape(-1)


def pool(name, stages, size):
    """(size, 144*144*3) uint8 pictures, on disk and memory-mapped; every size of SIZES has as
    many pixels."""
    path, done = stages / f"pool{size}.npy", stages / f"pool{size}.done"
    if not done.exists():
        data = np.lib.format.open_memmap(path, "w+", np.uint8, (size, 144 * 144 * 3))
        with Pool() as workers:
            jobs = workers.imap(_pixels, ((name, i) for i in range(size)), chunksize=64)
            for i, pixels in enumerate(tqdm(jobs, "pool", total=size)):
                data[i] = pixels
        data.flush()
        done.touch()
    return np.load(path, mmap_mode="r")


def pixel_batch(name, data, index, device):
    """Pixels as the processor would hand them over (a test compares): the model's inputs for
    pictures `index`."""
    w, h = scene_of(name, int(index[0])).size
    x = torch.from_numpy(data[index]).to(device).view(-1, h, w, 3).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], device=device).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], device=device).view(3, 1, 1)
    x = (x - mean) / std
    if name == "llava":
        return dict(pixel_values=x)
    p, r, c = CELL // 2, h // CELL, w // CELL
    x = x.view(len(x), 3, r, 2, p, c, 2, p).permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3 * p * p)
    return dict(
        hidden_states=x, grid_thw=torch.tensor([[1, 2 * r, 2 * c]] * len(index), device=device)
    )


def features(name, model, inputs):
    """(B, 144, C) or (B, 144, 4, C) tokens before the projector, and [CLS] states (B, C) or
    None."""
    if name == "llava":
        out = model.model.vision_tower(**inputs, output_hidden_states=True)
        state = out.hidden_states[model.config.vision_feature_layer]
        return state[:, 1:], (state[:, 0], out.last_hidden_state[:, 0])
    from transformers.vision_utils import get_vision_window_index

    visual, cfg = model.model.visual, model.config.vision_config
    window, _ = get_vision_window_index(inputs["grid_thw"], 2, cfg.window_size, cfg.patch_size)
    state = visual(**inputs).last_hidden_state.view(-1, 4, cfg.hidden_size)
    return state[torch.argsort(window)].view(len(inputs["grid_thw"]), N, 4, -1), None


def project(name, model, feats):
    if name == "llava":
        return model.model.multi_modal_projector(feats)
    return model.model.visual.merger(feats.flatten(0, 2)).view(*feats.shape[:2], -1)


# ------------------------------------------------------------------------------------- stage 1:
# the vision tower

GROUPS = {
    "kind": [*scenes.SHAPES, "sign"],
    "colour": list(scenes.COLOURS),
    "row": scenes.ROWS,
    "column": scenes.COLUMNS,
    "letter": list(scenes.LETTERS.lower()),
    "place": ["1", "2", "3"],
    "centre": ["thing"],
}


def patch_labels(scene):
    """(7, 144) labels by group, 0 for none, and (144, 2) where the thing's centre lies from -1 to
    1."""
    (w, h) = scene.size
    rows, columns = h // CELL, w // CELL
    labels, centre = np.zeros((len(GROUPS), N), np.int64), np.zeros((N, 2), np.float32)
    if not scene.things:
        return labels, centre
    cover = scenes.coverage(scene, rows, columns)
    for i, thing in enumerate(scene.things):
        on = (cover[i] >= 0.3) & (cover[i] == cover.max(0))
        x, y = thing.centre
        row, column = scene.cell(thing).split()
        words = [thing.kind, thing.colour, row, column]
        for g, word in enumerate(words):
            labels[g, on] = 1 + list(GROUPS.values())[g].index(word)
        centre[on] = 2 * x / w - 1, 2 * y / h - 1
        labels[6, int(y // CELL) * columns + int(x // CELL)] = 1
        for j, letter in enumerate(thing.text.lower()):
            x0, y0, _, _ = scenes.letter_box(thing, j)
            at = (y0 + CELL // 2) // CELL * columns + x0 // CELL
            labels[4, at], labels[5, at] = 1 + GROUPS["letter"].index(letter), j + 1
    return labels, centre


class VisionHeads(nn.Module):
    """What the tower is asked in stage 1; thrown away afterwards. Words come from the language
    model's embedding."""

    def __init__(self, tok, width, vision_width, patches):
        super().__init__()
        self.ids = {g: tok.convert_tokens_to_ids(w) for g, w in GROUPS.items()}
        self.none = nn.Parameter(torch.zeros(len(GROUPS)))
        self.centre = nn.Linear(vision_width * patches, 2)
        self.cls = nn.Linear(vision_width, 8 * 8 + 20)

    def loss(self, projected, feats, cls, words, labels, centre):
        total, hits, logits = 0.0, {}, projected @ words.T / words.shape[1] ** 0.5
        for g, (group, ids) in enumerate(self.ids.items()):
            one = torch.cat([self.none[g].expand(*logits.shape[:2], 1), logits[..., ids]], -1)
            total = total + F.cross_entropy(one.flatten(0, 1).float(), labels[:, g].flatten())
            some = labels[:, g] > 0
            hits[group] = (one.argmax(-1) == labels[:, g])[some].float().mean().item()
        where = (self.centre(feats.flatten(2)).float() - centre).square().mean(-1)
        total = total + (where * (labels[:, 0] > 0)).mean() * 4
        if cls is not None:  # kind x colour pairs and letters that stand in the scene
            names = (labels[:, 0] - 1) * 8 + labels[:, 1] - 1
            names = torch.where((labels[:, 0] > 0) & (labels[:, 0] < 9), names, 64).clamp(max=64)
            target = torch.zeros(len(labels), 85, device=labels.device).scatter_(1, names, 1.0)[
                :, :64
            ]
            text = torch.zeros(len(labels), 21, device=labels.device).scatter_(
                1, labels[:, 4], 1.0
            )[:, 1:]
            for state in cls:
                total = (
                    total
                    + F.binary_cross_entropy_with_logits(
                        self.cls(state).float(), torch.cat([target, text], 1)
                    )
                    * 4
                )
        return total, hits


# ------------------------------------------------------------------------------------- stage 2:
# the language model


def dialogue(name, vocab, turns):
    """A packed dialogue: token ids, labels (-100 but for answers and the end-of-turn mark)."""
    start, user, image, assistant, end = TURN[name]
    words, labels = list(start), [-100] * len(start)
    for i, (question, answer) in enumerate(turns):
        before = user + (image if i == 0 else []) + question.split() + assistant
        after = answer.split() + end
        words += before + after
        labels += [-100] * len(before) + [vocab[w] for w in after]
    return [vocab[w] for w in words], labels


def language_batch(name, vocab, index, rng, hide=True):
    """ids, labels, mask (B, L), right-padded, and the family of every turn; half of the rows hide a
    random share of the background tokens (0 in mask)."""
    rows, hidden, families = [], [], []
    for i in index:
        scene = scene_of(name, int(i))
        asked = scenes.questions(scene, rng, each=2)[:12]
        turns, family = [(q.question, q.answer) for q in asked], [q.family for q in asked]
        if rng.random() < 0.5:
            turns.insert(0, (scenes.CAPTION, scenes.caption(scene)))
            family.insert(0, "caption")
        families.append(family)
        rows.append(dialogue(name, vocab, turns))
        ground = scenes.coverage(scene, scene.size[1] // CELL, scene.size[0] // CELL).max(0) < 0.05
        hidden.append(
            ground & (rng.random(N) < rng.random() ** 0.5) & (hide and rng.random() < 0.5)
        )
    length = max(len(ids) for ids, _ in rows)
    ids, labels, mask = (np.full((len(rows), length), v) for v in (0, -100, 0))
    image = vocab[SPECIAL[name][4]]
    for b, (row, label) in enumerate(rows):
        ids[b, : len(row)], labels[b, : len(row)], mask[b, : len(row)] = row, label, 1
        mask[b, ids[b] == image] = ~hidden[b]
    return torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(mask), families


def language_logits(name, model, ids, mask, visual, size):
    """Logits (B, L, V) with projected tokens in the image's slots; hidden tokens keep their
    positions."""
    core = model.model
    embeds = core.get_input_embeddings()(ids)
    slot = ids == model.config.image_token_id
    embeds = embeds.masked_scatter(slot[..., None], visual.to(embeds.dtype))
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if name != "llava":
        grid = torch.tensor(
            [[1, size[1] // CELL * 2, size[0] // CELL * 2]] * len(ids), device=ids.device
        )
        positions, _ = core.get_rope_index(ids, mm_token_type_ids=slot.int(), image_grid_thw=grid)
    hidden = core.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden)


# -----------------------------------------------------------------------------------------------
# the loop


class Trainer:
    """Muon for the matrices, AdamW for the rest, cosine with warm-up; batches are a function of the
    step, so a resumed run is the same run. A checkpoint is written beside and renamed: whole or not
    at all."""

    def __init__(self, modules, steps, lr, path, every=250):
        self.modules, self.steps, self.lr, self.path, self.every, self.step = (
            modules,
            steps,
            lr,
            path,
            every,
            0,
        )
        params = {n: p for n, p in modules.named_parameters() if p.requires_grad}
        matrix = [
            p
            for n, p in params.items()
            if p.ndim == 2 and "embed" not in n and "lm_head" not in n and "heads." not in n
        ]
        chosen = {id(p) for p in matrix}
        self.optims = [
            torch.optim.Muon(matrix, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [p for p in params.values() if id(p) not in chosen], lr=lr, weight_decay=0.0
            ),
        ]
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step = state["step"]
            modules.load_state_dict(state["modules"])
            for optim, saved in zip(self.optims, state["optims"]):
                optim.load_state_dict(saved)

    def save(self):
        torch.save(
            dict(
                step=self.step,
                modules=self.modules.state_dict(),
                optims=[o.state_dict() for o in self.optims],
            ),
            f"{self.path}.tmp",
        )
        os.replace(f"{self.path}.tmp", self.path)

    def run(self, batch_loss, report):
        bar = tqdm(
            range(self.step, self.steps),
            self.path.stem,
            initial=self.step,
            total=self.steps,
            mininterval=5,
        )
        for step in bar:
            rate = (
                min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
                + 0.01
            )
            for optim in self.optims:
                for group in optim.param_groups:
                    group["lr"] = self.lr * rate
                optim.zero_grad(set_to_none=True)
            loss, shown = batch_loss(step)
            if not torch.isfinite(loss):
                raise RuntimeError(
                    f"loss {loss.item()} at step {step} of {self.path.stem}: lower --lr ({self.lr})"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for optim in self.optims:
                optim.step()
            self.step = step + 1
            if step % 25 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f} {shown}", refresh=False)
            if self.step % self.every == 0 or self.step == self.steps:
                self.save()
                line = f"step {self.step} loss {loss.item():.3f} {shown} {report()}"
                print(f"\n{self.path.stem} {line}", flush=True)


def pick(step, size, batch, stage):
    """The pictures of a step: a shuffle per epoch, in aligned groups of 64 cut into even
    batches."""
    per = size // batch
    order = np.random.default_rng([step // per, stage]).permutation(size // batch)
    return np.arange(batch) + batch * order[step % per]


def train_vision(name, model, tok, data, args, stages, device):
    heads = VisionHeads(tok, model.config.text_config.hidden_size, 128, 1 if name == "llava" else 4)
    tower = model.model.vision_tower if name == "llava" else model.model.visual
    modules = nn.ModuleDict(dict(tower=tower, heads=heads, embed=model.get_input_embeddings()))
    if name == "llava":
        modules["projector"] = model.model.multi_modal_projector
    modules.to(device)

    def batch_loss(step):
        index = pick(step, args.pool, args.batch, 1)
        labels, centre = (
            torch.from_numpy(np.stack(x)).to(device)
            for x in zip(*(patch_labels(scene_of(name, int(i))) for i in index))
        )
        with torch.autocast(device.type, torch.bfloat16):
            feats, cls = features(name, model, pixel_batch(name, data, index, device))
            loss, hits = heads.loss(
                project(name, model, feats), feats, cls, modules["embed"].weight, labels, centre
            )
        return loss, " ".join(f"{k} {100 * v:.0f}" for k, v in hits.items())

    trainer = Trainer(modules, args.vision_steps, args.lr, stages / "vision.pt")
    trainer.run(batch_loss, lambda: "")


def cache_features(name, model, data, size, stages, device):
    """Stage 2 never changes the tower: encode every picture of the pool once. Returns a bf16
    array on disk."""
    path, done = stages / f"features{size}.pt", stages / f"features{size}.done"
    shape = (size, N, 128) if name == "llava" else (size, N, 4, 128)
    store = torch.from_file(
        str(path), shared=True, size=math.prod(shape), dtype=torch.bfloat16
    ).view(shape)
    if not done.exists():
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            for i in tqdm(range(0, size, 64), "features"):
                store[i : i + 64] = features(
                    name, model, pixel_batch(name, data, np.arange(i, min(i + 64, size)), device)
                )[0].to("cpu", torch.bfloat16)
        done.touch()
    return store


def train_language(name, model, tok, store, args, stages, device):
    vocab = tok.get_vocab()
    modules = nn.ModuleDict(dict(lm=model.model.language_model))
    modules["projector"] = (
        model.model.multi_modal_projector if name == "llava" else model.model.visual.merger
    )
    modules.to(device)

    def forward(index, rng, hide):
        *tensors, families = language_batch(name, vocab, index, rng, hide)
        ids, labels, mask = (x.to(device) for x in tensors)
        with torch.autocast(device.type, torch.bfloat16):
            visual = project(name, model, store[index].to(device))
            logits = language_logits(
                name, model, ids, mask, visual, scene_of(name, int(index[0])).size
            )
        return logits, labels, families

    def batch_loss(step):
        index = pick(step, args.pool, args.language_batch, 2)
        logits, labels, _ = forward(index, np.random.default_rng([step, 7]), True)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()), ""

    def report():
        """Exact match of the answers about the pool's last pictures, which it trains on: a look,
        not the model card."""
        with torch.no_grad():
            logits, labels, families = forward(
                np.arange(args.pool - 64, args.pool), np.random.default_rng(3), False
            )
        answer, hits = labels[:, 1:] >= 0, {}
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~answer
        turn = (answer & (labels[:, :-1] < 0)).cumsum(
            1
        )  # 1 for the tokens of the first answer, ...
        for b, row in enumerate(families):
            for i, family in enumerate(row, 1):
                hits.setdefault(family, []).append(
                    right[b, answer[b] & (turn[b] == i)].all().item()
                )
        return " ".join(
            f"{family} {100 * np.mean(hit):.0f}" for family, hit in sorted(hits.items())
        )

    Trainer(modules, args.language_steps, args.lr, stages / "language.pt").run(batch_loss, report)


def main(words: list[str]) -> None:
    parser = runs.Parser([], description=__doc__)
    parser.add_argument("--model", choices=list(SIZES), required=True)
    parser.add_argument(
        "--pool", type=int, default=24576, help="training scenes, rendered once"
    )
    parser.add_argument(
        "--batch", type=int, default=64, help="pictures a step; divides 64"
    )
    parser.add_argument(
        "--language_batch", type=int, default=32, help="dialogues a step"
    )
    parser.add_argument("--vision_steps", type=int, default=1600, help="of stage vision")
    parser.add_argument("--language_steps", type=int, default=1800, help="of stage language")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="of Muon and AdamW, after warm-up"
    )
    parser.add_argument("--out", type=Path, help="where the checkpoint goes [tiny/<model>]")
    args = parser.parse_args(words)
    runs.check_options(
        args, pool=64, batch=1, language_batch=1, vision_steps=1, language_steps=1, lr=0
    )
    if 64 % args.batch or 64 % args.language_batch or args.pool % 64:
        parser.error(
            f"--batch {args.batch} and --language_batch {args.language_batch} must divide 64, and "
            f"--pool {args.pool} must be a multiple of it: pictures of one shape come in runs of 64"
        )
    name, device = args.model, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = args.out or Path(__file__).parent / name
    runs.writable(out)
    stages = out / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    tok = build_tokenizer(name)
    model = build_model(name, tok).to(device)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    data = pool(name, stages, args.pool)
    train_vision(name, model, tok, data, args, stages, device)
    store = cache_features(name, model, data, args.pool, stages, device)
    train_language(name, model, tok, store, args, stages, device)
    model.set_attn_implementation("sdpa")
    model.to("cpu", torch.bfloat16).save_pretrained(out)
    save_processor(name, tok, out)
    print(f"saved to {out}")


if __name__ == "__main__":
    runs.command(main)
