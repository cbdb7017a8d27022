"""The reference of every family: the stock model on the full prompt, with tokens hidden."""

import torch
import torch.nn.functional as F
from tiny_models import VIDEO

TOLERANCE = dict(rtol=0, atol=1e-10)
SIZES = [(24, 40), (32, 24), (24, 24)]  # height, width; three different grids for Qwen
QUESTIONS = ["what colour is the circle ?", "how many ?", "is the shape left of the red square ?"]
ANSWERED = [
    [("what colour is the circle ?", "red"), ("how many ?", "two circle")],
    [("is the square blue ?", "yes")],
    [("how many are there ?", "three"), ("what shape ?", "square"), ("yes ?", "no")],
]
GRIDS = {
    "llava": [(6, 6)] * 3,
    "qwen": [(3, 5), (4, 3), (3, 3)],
    "qwen3": [(3, 5), (4, 3), (3, 3)],
    "llava_next": [(3 * 4, 4), (4 * 4, 4), (3 * 4, 4)],
    "internvl": [(3 * 3, 3), (3 * 3, 3), (3, 3)],
    "llava_next_video": [(2 * 3, 3)] * 3,
    "llava_onevision": [(2 * 3, 3)] * 3,
}  # views stand one below another
SHOWN = {
    "llava_next": [16 + 4 * 6, 16 + 10 * 4 - 16, 16 + 4 * 4]
}  # the whole picture, the crops unpadded


def rows_for(family, images):
    """What batch() takes: the images, or for a video family each with a second frame."""
    return [[image, image.rotate(180)] for image in images] if family in VIDEO else images


def every(units):
    return [valid.nonzero().flatten() for valid in units.pad(units.image_of)[1]]


def token_id(stock):
    return (
        stock.config.video_token_id
        if stock.config.model_type in VIDEO
        else stock.config.image_token_id
    )


def stock_pixels(stock, batch):
    pixels = {
        name: batch[name]
        for name in ("pixel_values", "image_grid_thw", "image_sizes")
        if name in batch
    }
    return (
        {"pixel_values_videos": pixels["pixel_values"]}
        if stock.config.model_type in VIDEO
        else pixels
    )


def stock_inputs(stock, batch):
    text = {
        name: batch[name]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in batch
    }
    return text | stock_pixels(stock, batch)


def stock_features(stock, batch):
    """(S, D), what the stock model puts in place of the image tokens."""
    model = stock.model
    make = (
        model.get_video_features if stock.config.model_type in VIDEO else model.get_image_features
    )
    (_, pixels), *grid = stock_pixels(
        stock, batch
    ).items()  # some versions have another name for the first
    with torch.no_grad():
        rows = [x.flatten(0, -2) for x in make(pixels, **dict(grid)).pooler_output]
        if (
            stock.config.model_type == "llava_onevision" and len(rows[0]) % 9 == 0
        ):  # 3x3 units a frame: in 5.17,
            rows = [
                torch.cat([row, model.image_newline[None]]) for row in rows
            ]  # forward adds the newline
        return torch.cat(rows)


def has_mrope(stock):
    return stock.config.model_type.startswith("qwen")


def stock_positions(stock, batch):
    if not has_mrope(stock):
        return (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ids = batch["input_ids"]
    return stock.model.get_rope_index(
        ids,
        (ids == stock.config.image_token_id).int(),
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )[0]


def units_at(vlm, stock, batch):
    """For every row, the unit at each image token, -1 for a newline: told by the value of its
    stock feature."""
    units, features = vlm.encode(batch), stock_features(stock, batch)
    gap, unit = torch.cdist(
        features, vlm.project(units.feats), compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    for feature in features[gap > 1e-9]:
        torch.testing.assert_close(feature, stock.model.image_newline.data, **TOLERANCE)
    unit = torch.where(
        gap > 1e-9, -1, unit - torch.tensor([0, *units.counts]).cumsum(0)[units.image_of[unit]]
    )
    return unit.split((batch["input_ids"] == token_id(stock)).sum(1).tolist())


def whole_pictures(batch, row):
    """LLaVA-NeXT: which views of the row are whole pictures, not crops: the first one of every
    image."""
    counts = (
        batch["image_counts"].tolist() if "image_counts" in batch else [1] * len(batch["input_ids"])
    )
    sizes = batch["image_sizes"].tolist()[sum(counts[:row]) :][: counts[row]]
    # GRIDS has 3, 4 and 3 views
    views = [1 + {(24, 40): 2, (32, 24): 3, (24, 24): 2}[tuple(size)] for size in sizes]
    return [sum(views[:i]) for i in range(len(views))]


def visible_tokens(vlm, stock, batch, keep):
    """(B, L) bool: the tokens of the full prompt that pruning leaves, worked out row by row,
    token by token."""
    visible = batch["attention_mask"].bool().clone()
    for row, (kept, units) in enumerate(zip(keep, units_at(vlm, stock, batch))):
        whole = whole_pictures(batch, row) if stock.config.model_type == "llava_next" else []
        stays, line = torch.isin(units, kept), []
        for slot, unit in enumerate(units.tolist()):
            if unit < 0:  # a newline, for what came since the last
                stays[slot], line = stays[line].any(), []
            elif unit // 16 not in whole:  # of LLaVA-NeXT's views, whole pictures have no newlines
                line.append(slot)
        visible[row, batch["input_ids"][row] == token_id(stock)] = stays
    return visible


def full_embeds(stock, batch):
    """What the stock model feeds its language model."""
    slots = (batch["input_ids"] == token_id(stock))[..., None]
    with torch.no_grad():
        return stock.get_input_embeddings()(batch["input_ids"]).masked_scatter(
            slots, stock_features(stock, batch)
        )


def stock_logits(stock, batch, embeds, mask, positions):
    """Logits of what full_embeds() made of a batch, and of more text behind it. No cache. Where
    visual tokens enter at several layers, the stock language model adds all of them."""
    how = dict(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    )
    if not hasattr(stock.config.vision_config, "deepstack_visual_indexes"):
        return stock(**how).logits
    features = stock.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    visual = batch["input_ids"] == token_id(stock)
    states = stock.model.language_model(
        **how,
        visual_pos_masks=F.pad(visual, (0, embeds.shape[1] - visual.shape[1])),
        deepstack_visual_embeds=[  # of each picture in later versions
            x if isinstance(x, torch.Tensor) else torch.cat(x) for x in features.deepstack_features
        ],
    )
    return stock.lm_head(states.last_hidden_state)


def hidden_logits(stock, batch, embeds, positions, visible):
    """Logits of the full sequence, in which a 4-D mask hides what is not visible. No cache."""
    length = embeds.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & visible[:, None, None]
    mask = mask | torch.eye(length, dtype=torch.bool)  # a hidden token sees itself: no row of NaN
    mask = {"full_attention": mask} if stock.config.model_type == "qwen2_5_vl" else mask
    with torch.no_grad():
        return stock_logits(stock, batch, embeds, mask, positions)


def shown_units(vlm, batch):
    """Units that the prompt of each row shows, by its image tokens alone."""
    unit, _ = vlm._slots(batch)
    sizes = (batch["input_ids"] == vlm.image_id).sum(1).tolist()
    return [int((row >= 0).sum()) for row in unit.split(sizes)]
