"""FrozenVLM: a vision-language model that is never trained, between whose parts tokens can be taken out."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, BatchFeature, PreTrainedConfig

from common.adapters import Merge
from common.inside import Inside
from common.internvl import InternVLAdapter
from common.llava import LlavaAdapter, LlavaNextAdapter
from common.loading import blank_model, free_bytes, reading, weight_bytes
from common.qwen import QwenAdapter
from common.units import IGNORE, Prompt, Units, split_by
from common.video import LlavaNextVideoAdapter, LlavaOnevisionAdapter

ADAPTERS = {"llava": LlavaAdapter, "llava_next": LlavaNextAdapter, "qwen2_5_vl": QwenAdapter,
            "internvl": InternVLAdapter, "llava_next_video": LlavaNextVideoAdapter,
            "llava_onevision": LlavaOnevisionAdapter}


class FrozenVLM(Inside, nn.Module):
    """A VLM that is never trained, and whose visual tokens can be pruned. Build it with from_pretrained()."""

    def __init__(self, model: nn.Module, processor):
        super().__init__()
        self.model, self.lm = model.requires_grad_(False).eval(), model.model.language_model
        # generate() hands it a slice of the states, for which torch on a CPU copies the whole weight once per row
        self.model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
        self.adapter = ADAPTERS[model.config.model_type](model)
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_id = self.adapter.token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self.written = self.adapter.written(self.tokenizer, self.image_token)
        start = getattr(model.config, "vision_start_token_id", None)
        self.mark = self.written if start is None else self.tokenizer.convert_ids_to_tokens(start)
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        # Qwen's template ends an answer itself, LLaVA's does not, and a model must learn to stop
        ask, answer = self._message("user", "a"), self._message("assistant", "b")
        bare = self._template([ask, answer])[len(self._template([ask], generation=True)):].strip() == "b"
        self.end = self.tokenizer.eos_token if bare else ""

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=torch.bfloat16, device="cpu", attn="sdpa",
                        random_weights: bool = False) -> "FrozenVLM":
        """Load a checkpoint folder or hub name; attn is the attn_implementation of transformers.

        random_weights: read config, tokenizer and processor alone and draw the weights, always the same, on the device:
        memory and speed of a model without its download. Its answers mean nothing, and it says so.
        Raises before a weight is read: FileNotFoundError if there is no such checkpoint, PermissionError if it is
        gated, ConnectionError if the hub cannot be asked, ValueError if its family is not supported, MemoryError if the
        weights do not fit the device.
        """
        name, device = str(name_or_path), torch.device(device)
        with reading(name):
            folder = Path(name).is_dir() or name.count("/") > 1 or name[:1] in "./~"    # the hub's are owner/model
            if folder and not Path(name, "config.json").exists():
                raise OSError("there is none")
            family = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
        if family not in ADAPTERS:
            raise ValueError(f"{name!r} has model_type {family!r}: expected one of {', '.join(ADAPTERS)}; "
                             "a further family needs a subclass of Adapter, see common/adapters.py, and a line "
                             "in ADAPTERS there")
        with reading(name):
            config, processor = AutoConfig.from_pretrained(name), ADAPTERS[family].processor_class.from_pretrained(name)
        need, free = weight_bytes(config, dtype), free_bytes(device)
        if free is not None and need > free:
            raise MemoryError(f"the weights of {name!r} need {need / 2**30:.1f} GiB in {dtype}, {device} has "
                              f"{free / 2**30:.1f} GiB free: choose a smaller dtype, such as bfloat16, or another "
                              "device, or end what else runs there")
        if random_weights:
            print(f"RANDOM WEIGHTS: OF {name} ONLY THE SHAPES ARE REAL, ITS ANSWERS ARE MEANINGLESS")
            return cls(blank_model(config, dtype, device, attn), processor)
        with reading(name):
            # straight to the device: the CPU's memory may be smaller than the GPU's
            model = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, attn_implementation=attn, device_map=None if device.type == "cpu" else {"": device})
        return cls(model, processor)

    def train(self, mode: bool = True) -> "FrozenVLM":
        """Does nothing: a frozen model has no training mode, whatever the selector around it is put into."""
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def family(self) -> str:
        """Its key in ADAPTERS."""
        return self.model.config.model_type

    @property
    def width(self) -> int:
        """C, width of a patch after the vision encoder."""
        return self.adapter.width

    @property
    def unit_side(self) -> int:
        """Pixels that a unit is high and wide."""
        return self.adapter.unit_side

    @property
    def dim(self) -> int:
        """D, width of the language model."""
        return self.model.config.text_config.hidden_size

    def fingerprint(self) -> dict[str, str | int]:
        """What a selector's weights depend on: one that was trained for another backbone must be refused. Those that
        never saw the language model depend on the entries vision_* and feature_layer alone. vision_side: of the square
        grid of a view, before a video's pooling; 0 for native resolution."""
        config, vision = self.model.config, self.model.config.vision_config
        return dict(model_type=config.model_type, vision_width=self.width, vision_patch=self.adapter.patch,
                    vision_side=self.adapter.side,
                    vision_layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
                    feature_layer=getattr(config, "vision_feature_layer", -1), dim=self.dim,
                    layers=config.text_config.num_hidden_layers, vocabulary=config.text_config.vocab_size)

    # --------------------------------------------------------------------------------------------------- text

    def _message(self, role: str, text: str, images: int = 0) -> dict:
        return {"role": role, "content": [{"type": self.adapter.kind}] * images + [{"type": "text", "text": text}]}

    def _template(self, messages, generation: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.processor.chat_template,
                                                  tokenize=False, add_generation_prompt=generation)

    def _dialogue(self, turns, twice: bool = False, images: int = 1) -> tuple[str, list[tuple[int, int]]]:
        """Text of a dialogue, and the [start, end) characters of its answers, end-of-turn marks included."""
        messages, heads, spans, text = [], [], [], ""

        def render(**how) -> str:
            text = self._template(messages, **how).replace(self.image_token, self.written)
            # many templates write the image first, wherever it is put
            return text.replace(self.mark, f"{turns[0][0]} {self.mark}", 1) if twice else text
        for question, answer in turns:
            messages.append(self._message("user", question, 0 if messages else images))
            heads.append(text := render(generation=True))
            if answer is not None:
                messages.append(self._message("assistant", answer.strip() + self.end))
                text = render()
                spans.append((len(heads[-1]), len(text.rstrip())))
        if not all(text.startswith(head) for head in heads):
            raise ValueError("this checkpoint's chat template rewrites earlier turns when one is added: the "
                             "answers cannot be located, pass one turn per row")
        return text, spans

    def unknown_words(self, text: str) -> list[str]:
        """The words, or pieces of words, that the tokenizer cannot spell; none if it falls back to bytes."""
        unknown = self.tokenizer.unk_token_id
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(dict.fromkeys(text[start:end] for i, (start, end) in
                                  zip(tokens["input_ids"], tokens["offset_mapping"]) if i == unknown))

    def _check_turns(self, images, turns) -> None:
        if not len(images) == len(turns) > 0:
            raise ValueError(f"batch() got {len(images)} images and {len(turns)} dialogues: expected one of "
                             "each per row, and at least one row")
        for row, (image, dialogue) in enumerate(zip(images, turns)):
            several = image if isinstance(image, list) else [image]
            if not several or not all(isinstance(x, Image.Image) for x in several) or not dialogue:
                frames = ", its frames" if self.adapter.kind == "video" else ""
                raise ValueError(f"row {row} has a {type(image).__name__} and {len(dialogue)} turns: expected a PIL "
                                 f"image, or a list of them{frames}, see Image.open(), and at least one (question, "
                                 "answer)")
            for k, (question, answer) in enumerate(dialogue):
                where = f"turns[{row}][{k}]"
                if not question.strip():
                    raise ValueError(f"{where} has the empty question {question!r}: expected some text")
                if k < len(dialogue) - 1 if answer is None else not answer.strip():
                    raise ValueError(f"{where} has the answer {answer!r}: expected some text; only the last "
                                     "answer of a row may be None, for the model to give")
                if self.image_token in question + (answer or ""):
                    raise ValueError(f"{where} contains {self.image_token!r}: leave it out, batch() places it")
                if unknown := self.unknown_words(f"{question} {answer or ''}"):
                    vocabulary = self.tokenizer.get_vocab()
                    words = [word for word in sorted(vocabulary, key=vocabulary.get) if word.isalpha()][:80]
                    raise ValueError(f"{where}: this checkpoint cannot read {', '.join(map(repr, unknown))}; "
                                     f"among the words it knows are: {' '.join(words)}")

    def _inputs(self, images: list, *text, **how) -> BatchFeature:
        """Adapter.inputs() of the rows; with image_counts (B,), the pictures of each row, if there are several."""
        rows = [[x.convert("RGB") for x in (row if isinstance(row, list) else [row])] for row in images]
        video = self.adapter.kind == "video"
        counts = [1 if video else len(row) for row in rows]
        batch = self.adapter.inputs(self.processor, rows if video else sum(rows, []), *text, **how)
        if max(counts) > 1:
            batch["image_counts"] = torch.tensor(counts)
        batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        return batch

    def pictures(self, images: list[Image.Image | list[Image.Image]], device=None):
        """The pixels of batch() alone: all that encode() and pixels() need."""
        return self._inputs(images).to(self.device if device is None else device)

    def batch(self, images: list[Image.Image | list[Image.Image]], turns: list[list[tuple[str, str | None]]],
              device=None, twice: bool = False):
        """The tensors that the other methods take as `batch`: one image, or a list of images or of frames, and one
        dialogue per row. The prompt has all images of a row in front of its first question, in order.

        device: the model's if None; a loader's worker process passes "cpu", for it must not touch the GPU.
        twice: the first question stands in front of the image too, so that visual tokens can attend to it.

        turns[b] is [(question, answer), ...]; a last answer of None ends the prompt where the model is to
        speak. Returns a dict with input_ids, attention_mask and labels (B, L), left padded, and the processor's
        pixels. labels is -100 but for the tokens of the answers and of the end-of-turn mark after each.
        Raises ValueError on rows that do not fit, empty texts, words that the tokenizer does not know, and rows longer
        than the language model has positions.
        """
        self._check_turns(images, turns)
        counts = [len(x) if isinstance(x, list) and self.adapter.kind == "image" else 1 for x in images]
        texts, spans = zip(*(self._dialogue(dialogue, twice, n) for dialogue, n in zip(turns, counts)))
        # a template may bring the BOS token along; a second one would shift every position
        special = not (self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token))
        batch = self._inputs(images, list(texts), padding=True, add_special_tokens=special, return_tensors="pt")
        batch["labels"] = self._labels(batch, texts, spans, special)
        asked = self.tokenizer([" ".join(question for question, _ in dialogue) for dialogue in turns],
                               add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        self._check_lengths(batch["attention_mask"])
        batch["question_ids"], batch["question_mask"] = asked["input_ids"], asked["attention_mask"]
        return batch.to(self.device if device is None else device)

    def _check_lengths(self, mask: Tensor) -> None:
        limit, lengths = self.model.config.text_config.max_position_embeddings, mask.sum(1).tolist()
        if long := [row for row, n in enumerate(lengths) if n > limit]:
            raise ValueError(f"row {long[0]} has {lengths[long[0]]} tokens, those of its image included: expected at "
                             f"most {limit}, the language model's max_position_embeddings; shorten its turns, or take "
                             "a smaller picture or fewer frames")

    def _labels(self, batch, texts, spans, special: bool) -> Tensor:
        """(B, L): token ids inside the answers' spans, else -100.

        The text is tokenised once more, for the character offsets. There an image mark is one token, in
        input_ids it is one per unit: but for these the two agree, and that is checked.
        """
        ids = batch["input_ids"]
        written, labels = batch["attention_mask"].bool() & (ids != self.image_id), torch.full_like(ids, IGNORE)
        tokens = self.tokenizer(list(texts), add_special_tokens=special, return_offsets_mapping=True)
        for row, pairs in enumerate(map(zip, tokens["input_ids"], tokens["offset_mapping"])):
            column, text = written[row].nonzero().flatten(), [(i, at) for i, at in pairs if i != self.image_id]
            if ids[row, column].tolist() != [i for i, _ in text]:
                raise RuntimeError(f"row {row}: but for the image, the processor's tokens are not the "
                                   "tokenizer's: expected a stock processor, the answers cannot be located")
            inside = torch.tensor([any(y > a and x < b for a, b in spans[row]) for _, (x, y) in text])
            labels[row, column[inside]] = ids[row, column[inside]]
        return labels

    def question(self, batch) -> tuple[Tensor, Tensor]:
        """What a selector may read of the text: word embeddings (B, L, D) of each row's questions, right padded, and
        valid (B, L) bool. No template, no answers."""
        return self.lm.get_input_embeddings()(batch["question_ids"]).detach(), batch["question_mask"].bool()

    # ------------------------------------------------------------------------------------------------- vision

    def num_units(self, batch) -> list[int]:
        """Units that each row shows, read off the prompt: no encoder runs."""
        sizes = (batch["input_ids"] == self.image_id).sum(1).tolist()
        return [int((unit >= 0).sum()) for unit in self._slots(batch)[0].split(sizes)]

    def _slots(self, batch) -> tuple[Tensor, Tensor]:
        """Adapter.slots(), written out where unit i stands at the i-th image token."""
        n = int((batch["input_ids"] == self.image_id).sum())
        given = self.adapter.slots(batch) or (torch.arange(n), torch.full((n,), -1))
        return given[0].to(batch["input_ids"].device), given[1].to(batch["input_ids"].device)

    @torch.no_grad()
    def encode(self, batch, look: dict[str, tuple[str, int]] | None = None) -> Units:
        """Run the vision encoder once; the projector does not run unless it is looked at.

        look: name -> (what, layer), what Units.seen[name] is to hold of this very run, with any attention kernel.
        layer: a block of the encoder, from 0, one of adapter.whole. Of a unit's patches it is the mean. what, float32
        but for the last three:
          cls, received            (M,) attention that the unit gets of [CLS], or of all tokens of its view: mean over
                                   heads (and tokens), softmax over all tokens of the view
          keys                     (M, d) mean over heads, before any rotation
          cls wide, received wide, keys wide          the same where all heads are one of full width
          projected, cls state     (M, D) from the projector, (M, C) what [CLS] of the unit's view is beside feats
          crop                     (M,) int64, LLaVA-NeXT's crop_of(); for these three the layer is of no meaning
        Raises ValueError on one that this encoder does not have.
        """
        look, other = look or {}, ("projected", "cls state", "crop")
        layers = {layer for what, layer in look.values() if what not in other}
        self._check_look(look, layers)
        with self.adapter.watch(layers) as inputs:
            feats, grid, cls = self.adapter.encode(batch, max(layers, default=-1) + 1)
        units = self._units(batch, feats, grid)
        for name, (what, layer) in look.items():
            if what == "projected":
                units.seen[name] = self.project(feats)
            elif what == "cls state":
                units.seen[name] = cls[units.apart().image_of]
            elif what == "crop":
                units.seen[name] = self.adapter.crop_of(batch)
            else:
                units.seen[name] = self.adapter.read(what, layer, *inputs[layer], batch)
        return units

    def _check_look(self, look, layers: set[int]) -> None:
        known = [f"{what}{wide}" for what in ("cls", "received", "keys") for wide in ("", " wide")]
        known += ["projected", "cls state", "crop"]
        for name, (what, _) in look.items():
            if what not in known:
                raise ValueError(f"look[{name!r}] asks for {what!r}: expected one of {', '.join(known)}")
            if what.startswith("cls") and not self.adapter.has_cls or what == "crop" and not self.adapter.crops:
                raise ValueError(f"look[{name!r}]: the vision encoder of {self.family} has no {what!r}")
        if wrong := layers - set(self.adapter.whole):
            raise ValueError(f"block {min(wrong)} of the vision encoder cannot be looked at: expected one of "
                             f"{self.adapter.whole}, whose attention spans a whole view")

    @torch.no_grad()
    def merged(self, batch, rule: Merge) -> tuple[Tensor, Tensor]:
        """feats (B, K, C), anchor (B, K): the vision encoder run with tokens merged by the rule in every block; anchor
        is the unit where a merged token stands. Raises ValueError, with the reason, where that cannot be done."""
        if self.adapter.unmergeable:
            raise ValueError(f"{self.family} cannot merge inside its vision encoder: {self.adapter.unmergeable}")
        return self.adapter.merged(batch, rule)

    def _units(self, batch, feats: Tensor, grid) -> Units:
        """Units of what the adapter encoded."""
        views, slots, shown, shapes = self.adapter.views(batch), self.adapter.slots(batch), None, None
        if "image_counts" in batch:
            counts = batch["image_counts"].tolist()
            views = [sum(part) for part in split_by(views or [1] * sum(counts), counts)]
        if views is not None:
            parts = split_by(grid, views)
            shapes = None if all(len(set(part)) == 1 for part in parts) else grid
            grid = [(sum(r for r, _ in part), part[0][1]) if len({c for _, c in part}) == 1 else
                    (sum(r * c for r, c in part), 1) for part in parts]
        image_of = torch.arange(len(grid)).repeat_interleave(torch.tensor([r * c for r, c in grid]))
        if slots is not None:
            shown = torch.isin(torch.arange(len(feats), device=feats.device), slots[0].to(feats.device))
        return Units(feats, image_of.to(feats.device), grid, views, shown, shapes)

    def pixels(self, batch) -> list[Tensor]:
        """The pictures as the encoder sees them, (3, H, W) each: normalised, at the size that the units cover. Several
        views of an image stand one below another, as Units.grid has them; several images of a row come one by one."""
        pixels, views = self.adapter.pixels(batch), self.adapter.views(batch)
        return pixels if views is None else [torch.cat(part, 1) for part in split_by(pixels, views)]

    def project(self, feats: Tensor, unit: Tensor | None = None) -> Tensor:
        """(K, C) or (K, P, C) of the units (K,) int64, by default all M -> (K, D), the VLM's own projector.
        Differentiable."""
        unit = torch.arange(len(feats), device=feats.device) if unit is None else unit
        return self.adapter.project(feats.to(self.dtype), unit)

    # ------------------------------------------------------------------------------------------------- prompt

    def embed(self, batch, units: Units, feats: Tensor | None = None) -> Prompt:
        """The full prompt; feats, of the same shape, replace units.feats. Differentiable in feats."""
        feats = units.feats if feats is None else feats
        if feats.shape != units.feats.shape:
            raise ValueError(f"feats has shape {tuple(feats.shape)}: expected that of units.feats, "
                             f"{tuple(units.feats.shape)}; Units.flat() undoes Units.pad()")
        kept = torch.ones(len(feats), dtype=torch.bool, device=feats.device)
        return self._prompt(batch, units, feats, kept)

    def prune(self, batch, units: Units, keep: Tensor | list[Tensor], feats: Tensor | None = None,
              positions: str = "original") -> Prompt:
        """The prompt with the kept units only. What stays keeps its original position; positions="reindex" numbers it
        anew from 0, with M-RoPE on every axis alike, as the released code of most methods does.
        feats (sum of K_b, C) or (sum of K_b, P, C), row after row, stand in place of the kept units' own.

        keep[b] holds ascending int64 indices into the units of image b: a (B, K) tensor, or a list of (K_b,)
        tensors; K = 0 leaves no visual token. A newline stays if and only if a unit of its line does. Raises
        ValueError when keep does not fit the units, or names one that is not shown.
        """
        kept = self._kept(units, keep)
        own = units.feats[kept]
        if feats is not None and feats.shape != own.shape:
            raise ValueError(f"feats has shape {tuple(feats.shape)}: expected that of the kept units' own, "
                             f"{tuple(own.shape)}")
        if positions not in ("original", "reindex"):
            raise ValueError(f"positions={positions!r}: expected 'original' or 'reindex'")
        prompt = self._prompt(batch, units, own if feats is None else feats, kept)
        anew = (prompt.mask.cumsum(-1) - 1).clamp(min=0).expand_as(prompt.pos)
        return replace(prompt, pos=anew) if positions == "reindex" else prompt

    @staticmethod
    def _kept(units: Units, keep, name: str = "keep") -> Tensor:
        """keep -> (M,) bool, after checking it; name is what errors call it."""
        if len(keep) != len(units.grid):
            raise ValueError(f"{name} has {len(keep)} rows: expected one per image, that is {len(units.grid)}")
        kept = []
        for row, (index, n) in enumerate(zip(keep, units.counts)):
            index = index.cpu()
            if index.dtype != torch.int64 or index.ndim != 1:
                raise ValueError(f"{name}[{row}] is {index.dtype} {tuple(index.shape)}: expected int64 (K,)")
            if len(index) and not 0 <= index.min() <= index.max() < n:
                raise ValueError(f"{name}[{row}] spans {index.min()} to {index.max()}: expected 0 to {n - 1}, the "
                                 f"units that row {row} has; indices start anew with every row")
            if not (index[1:] > index[:-1]).all():
                raise ValueError(f"{name}[{row}] = {index.tolist()}: expected strictly ascending indices; sort "
                                 "them and name each unit once")
            kept.append(torch.zeros(n, dtype=torch.bool).index_fill(0, index, True))
        kept = torch.cat(kept).to(units.feats.device)
        if units.shown is not None and (lost := (kept & ~units.shown).nonzero().flatten().tolist()):
            row = int(units.image_of[lost[0]])
            raise ValueError(f"{name}[{row}] names {lost[0] - sum(units.counts[:row])}, a unit without a token: "
                             "expected units that pad() calls valid")
        return kept

    def _prompt(self, batch, units: Units, feats: Tensor, kept: Tensor) -> Prompt:
        """The prompt without the units that kept (M,) bool drops; feats has one row per kept unit."""
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        visual, (unit, line) = ids == self.image_id, self._slots(batch)
        there = torch.ones_like(kept) if units.shown is None else units.shown
        if not torch.equal(unit[unit >= 0].sort().values, there.nonzero().flatten()):
            raise ValueError(f"{int(there.sum())} units for a batch with {int((unit >= 0).sum())}: expected those that "
                             "encode() gave for this very batch")
        shows = (unit >= 0) & kept[unit]
        stays = shows | (unit < 0) & torch.isin(line, line[shows])
        tokens = self.project(feats, kept.nonzero().flatten())[(kept.cumsum(0) - 1)[unit[shows]]]
        # detach: with activation checkpointing the embedding layer marks its output as wanting gradients
        embeds = self.lm.get_input_embeddings()(ids).detach()
        if (unit < 0).any():
            embeds = torch.where(visual[..., None], self.model.model.image_newline, embeds)
        embeds = embeds.masked_scatter(visual.masked_scatter(visual, shows)[..., None], tokens)
        left = visual.masked_scatter(visual, stays)
        return Prompt(embeds, mask.long(), self.adapter.positions(batch), batch.get("labels"), left).only(
            mask & (left | ~visual))

    # ----------------------------------------------------------------------------------------- language model

    def _hidden(self, prompt: Prompt) -> Tensor:
        """(B, L, D), after the last layer and its norm."""
        # always with a mask: without one, transformers takes each gap in the positions for the start of
        # another packed text, and silently lets nothing attend across it
        return self.lm(inputs_embeds=prompt.embeds, attention_mask=prompt.mask, position_ids=prompt.pos,
                       use_cache=False).last_hidden_state

    def logits(self, prompt: Prompt) -> Tensor:
        """(B, L, V); logits[:, i] predict token i + 1."""
        return self.model.lm_head(self._hidden(prompt))

    def loss(self, prompt: Prompt, reduction: str = "mean") -> Tensor:
        """Negative log likelihood of the labels, in nats per token and at least float32.

        "mean": over all answer tokens of the batch, a scalar. "row": over those of each row, (B,).
        Raises ValueError when there is nothing to predict, or on another reduction.
        """
        if reduction not in ("mean", "row"):
            raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'row'")
        if prompt.labels is None:
            raise ValueError("this prompt has no labels: build its batch with answers")
        target = prompt.labels[:, 1:]
        count = (target != IGNORE).sum(1)
        if not (count.sum() if reduction == "mean" else count.min()):
            raise ValueError(f"the rows have {count.tolist()} answer tokens: expected some in each")
        # the output layer is run at the answers only: its logits are the largest tensor of a training step
        row, column = (target != IGNORE).nonzero(as_tuple=True)
        logits = self.model.lm_head(self._hidden(prompt)[row, column])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = F.cross_entropy(logits, target[row, column], reduction="none")
        return nll.mean() if reduction == "mean" else nll.new_zeros(len(count)).index_add(0, row, nll) / count

    @torch.no_grad()
    def generate(self, prompt: Prompt, max_new_tokens: int = 32, streamer=None) -> list[str]:
        """Greedy continuation of every row, without special tokens and outer blanks.

        The first new token stands one behind the last ORIGINAL position, whatever has been pruned. Sampling
        and penalties that the checkpoint's generation config may ask for are off. streamer: of transformers, is put
        nothing when the prompt goes in, then the tokens of a single row as they are made.
        """
        with self._decoding():
            tokens = self.model.generate(
                inputs_embeds=prompt.embeds, attention_mask=prompt.mask, position_ids=prompt.pos,
                max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                repetition_penalty=1.0, num_beams=1, use_cache=True, pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer)
        return self._texts(tokens)

    @contextmanager
    def _decoding(self):
        """Evaluation mode: in training mode, checkpointing drops the cache."""
        training = self.lm.training
        self.lm.eval()
        try:
            yield
        finally:
            self.lm.train(training)

    def _ends(self) -> Tensor:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return torch.tensor([ends] if isinstance(ends, int) else ends or [], dtype=torch.int64, device=self.device)

    def _texts(self, tokens: Tensor) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def checkpointing(self, on: bool) -> None:
        """Recompute the language model's activations in the backward pass: less memory, the same gradients.

        Raises ValueError if the language model has dropout, which its training mode would then switch on.
        """
        drops = [name for name, module in self.lm.named_modules()
                 if getattr(module, "attention_dropout", 0) or isinstance(module, nn.Dropout) and module.p]
        if on and drops:
            raise ValueError(f"{drops[0]} has dropout, which checkpointing would switch on: expected none; set "
                             "it to 0 in the config.json of the checkpoint")
        switch = f"checkpointing_{'enable' if on else 'disable'}"          # renamed within transformers 5.x
        new, old = f"activation_{switch}", f"gradient_{switch}"
        getattr(self.lm, new if hasattr(self.lm, new) else old)()
        self.lm.train(on)                             # it acts in training mode only
