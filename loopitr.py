# SPDX-License-Identifier: MIT
"""LoopITR (https://arxiv.org/abs/2203.05465) in one file.

A dual encoder gives every image and every text one vector; a dot product scores a pair, so it is
fast. A cross encoder reads an image and a text together, token by token; it must run once for
every pair, so it is slow but accurate. LoopITR puts both into one network, where each teaches the
other:

    image -> image encoder ---+--> [CLS] -> projection --.
             (ViT)            |                           dot product = dual logit
    text  -> text encoder ----+--> [CLS] -> projection --'    |              ^
             (lower BERT)     |                        hard negatives   distillation
                              |                               v              |
                              '--> all tokens --> cross encoder = match logit
                                                  (upper BERT, attends to image tokens)

The function `loop_losses` is one turn of the loop:

1. The dual encoder learns to find each image's text in the batch and each text's image
   (image-text contrastive loss, ITC).
2. Its logits choose hard negatives: m wrong texts for each image, m wrong images for each text.
3. The cross encoder learns to tell the true pairs from these (image-text matching loss, ITM).
4. The cross encoder's logits of the same candidates are distilled into the dual encoder's.

    python loopitr.py --train                                   # toy scenes, minutes on a laptop
    python loopitr.py --data flickr30k --train                  # full size, on a GPU
    python loopitr.py --search "a small blue circle right of a small red ring"

ALBEF (https://arxiv.org/abs/2107.07651) has steps 1 to 3, with one negative for each query.
LoopITR draws m of them and adds step 4, which closes the loop. The recipe here is ALBEF's, without
masked language modelling, which belongs to its pre-training, and without momentum encoders and
their queues, which give softer targets and more negatives.

All that we know of the paper is its abstract and its tables. They leave open how and from when on
to distil, the value of m, whether the first negatives are random, the learning rate of new layers,
the warm-up, gradient clipping, the strength of the augmentation, and whether both logits are added
in re-ranking. These are our choices, marked (ours) below.

Letters for shapes: B images or texts of a batch, I images, T texts, P pairs, N image tokens, L text
tokens, S tokens that are attended to, D width, E size of an embedding, H and W pixels, Q queries, C
candidates, m hard negatives. In an attention_mask, tokens have 1, padding has 0.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import urllib.request
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFile, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, ViTConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput
from transformers.trainer_pt_utils import torch_distributed_zero_first

# ----------------------------------------------------------------------------------------- Settings

def number_from(kind, low, high=1e9):
    """-> what an option may be: a number from low to high, so neither NaN nor infinity"""
    def convert(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high:g}")
        return kind(text)
    return {"type": convert}


COUNT, WHOLE = number_from(int, 1), number_from(int, 0)
SHARE, WEIGHT = number_from(float, 0, 1), number_from(float, 0)
TEXT, TEXTS, SWITCH = {}, {"nargs": "+"}, {"action": argparse.BooleanOptionalAction}

DEIT, BERT = "facebook/deit-base-patch16-224", "google-bert/bert-base-uncased"  # ALBEF's backbones

OPTIONS = {  # group: {name: (default, what it may be, for argparse, meaning)}
    "the loop": {
        "negatives": (1, COUNT, "m, hard negatives for each image and for each text"),
        "sampling": ("softmax", {"choices": ("softmax", "topk", "random")}, "how they are chosen"),
        "random_first": (0.3, SHARE, "share of training in which they are random instead"),
        "distill": ("mse", {"choices": ("none", "kl", "mse", "margin", "label")}, "objective"),
        "distill_weight": (0.05, WEIGHT, "of distillation in the total loss; 1 suits kl and label"),
        "distill_temperature": (0.5, number_from(float, 0.001), "of the teacher; 1 suits kl"),
        "distill_from": (0.4, SHARE, "share of training before distillation begins"),
        "matching_weight": (1.0, WEIGHT, "of matching in the total loss"),
    }, "training": {
        "init": ("backbones", TEXT, "backbones, scratch, albef, or a checkpoint's path"),
        "freeze_image": (False, SWITCH, "train no weight of the image encoder"),
        "epochs": (10, COUNT, "passes over all captions"),
        "batch_size": (256, COUNT, "captions with their images, of all processes together"),
        "lr": (1e-5, SHARE, "peak learning rate of pre-trained layers"),
        "new_lr": (1e-4, SHARE, "peak learning rate of new layers, and of the temperature"),
        "augment": (True, SWITCH, "crop, flip and RandAugment"),
        "grad_checkpointing": (False, SWITCH, "less memory, slower"),
        "seed": (0, WHOLE, "of weights, batches, negatives and augmentation"),
    }, "evaluation and search": {
        "checkpoint": (None, TEXT, "to evaluate or search with; else runs/DATA/best.pt"),
        "rerank": (16, COUNT, "candidates of each query that are re-ranked"),
        "dual_weight": (1.0, WEIGHT, "of the dual logits in re-ranking"),
    }, "model, files and devices": {
        "image_model": (DEIT, TEXT, "a ViT, name or folder"),
        "text_model": (BERT, TEXT, "a BERT, name or folder"),
        "image_size": (384, COUNT, "pixels of a side"),
        "data": (["toy"], TEXTS, "toy, flickr30k, coco, captions; to search, photos"),
        "images": (None, TEXT, "folder where image paths start, and downloads go"),
        "output": (None, TEXT, "folder to write to; in training, else runs/DATA"),
        "workers": (min(8, os.cpu_count()), WHOLE, "processes that load images"),
        "device": (str(torch.accelerator.current_accelerator(True) or "cpu"), TEXT, "for torch"),
        "bf16": (None, SWITCH, "mixed precision; else on accelerators"),
    }}

PRESETS = {  # what --data toy, flickr30k and coco use instead
    "toy": dict(
        images="data/toy", image_model="image-model", text_model="text-model",  # in that folder
        init="scratch",  # these models are small, and have no weights
        image_size=48, epochs=1, batch_size=64, lr=1e-3, new_lr=1e-3, workers=0,
        augment=False,  # in a flipped scene, left would be right
        random_first=0.0),  # on scenes this small, hard negatives work from the start
    "flickr30k": dict(images="data/flickr30k", init="albef", negatives=4, grad_checkpointing=True),
    "coco": dict(images="data/coco", init="albef", negatives=4, grad_checkpointing=True, epochs=5)}

# With a checkpoint as --init no layer is new, so that nothing has to wait, and one learning rate is
# right for all layers (ALBEF).
TRAINED_START = dict(random_first=0.0, distill_from=0.0, new_lr=1e-5)


# -------------------------------------------------------------------------------------- Data loader

SPLITS = {"train": "train", "restval": "train",  # restval: the rest of COCO's val (Karpathy)
          "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


def load_captions(*paths, images=None):
    """Read captions files -> {"train": {image path: [caption, ..]}, "val": {..}, "test": {..}}.

    Karpathy's  {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}, ...]}, ...]}
    ALBEF's     [{"image", "caption": string or list}, ...], one file per split, named after it
    images: the folder that image paths start from; that of the file, if not given."""
    splits = {"train": {}, "val": {}, "test": {}}
    for path in map(Path, paths):
        with input_errors(f"{path} cannot be read as JSON: if it was downloaded, delete it; for a "
                          "CSV, see Your own data in the README"):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            rows = list(content["images"] if isinstance(content, dict) else content)
        for position, row in enumerate(rows, start=1):
            with input_errors(f"{path}, row {position}"):
                if "sentences" in row:
                    name = row["split"]
                    image = Path(row.get("filepath", ""), row["filename"])
                    captions = [sentence["raw"] for sentence in row["sentences"]]
                else:
                    name, image, captions = path.stem, row["image"], row["caption"]
                    captions = captions if isinstance(captions, list) else [captions]
                found = SPLITS.keys() & re.findall("[a-z]+", name.lower())
                if len(found) != 1:
                    raise ValueError(f"{name!r} must contain one of the words {', '.join(SPLITS)}")
                split = SPLITS[found.pop()]
                image = os.path.normpath(Path(images or path.parent, image))
                if any(image in splits[other] for other in splits.keys() - {split}):
                    raise ValueError(f"{image} is in the split {split}, and in another one")
                for caption in captions:
                    if not caption.strip():
                        raise ValueError(f"a caption of {image} is blank")
                    splits[split].setdefault(image, []).append(caption.strip())
    return splits


class RandAugment(v2.RandAugment):
    """ALBEF's operations: torchvision's without Color, Contrast, Posterize and Solarize."""
    _AUGMENTATION_SPACE = {
        name: change for name, change in v2.RandAugment._AUGMENTATION_SPACE.items()
        if name not in ("Color", "Contrast", "Posterize", "Solarize")}


def image_transform(size, augment=False):
    """PIL image -> uint8 tensor (3,size,size). Resizing and augmentation are ALBEF's, but for the
    strength of RandAugment, which torchvision scales in its own way. Bytes, since they are a
    quarter of floats on their way to the device, where `encode_image` normalises them."""
    bicubic = InterpolationMode.BICUBIC
    steps = [v2.Resize((size, size), bicubic)]
    if augment:
        steps = [v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=bicubic),
                 v2.RandomHorizontalFlip(), RandAugment(num_ops=2, magnitude=7)]
    return v2.Compose([*steps, v2.PILToTensor()])


# Pillow shall load photos whose end is missing (as ALBEF does), and photos of 200 megapixels.
ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = True, None


def read_image(path):
    """-> RGB image as a person sees it: upright, transparent parts white, 16 bits scaled to 8"""
    with input_errors(f"{path} cannot be read as an image"), Image.open(path) as image:
        image.load()
        with suppress(Exception):  # a good picture is not refused for its metadata
            ImageOps.exif_transpose(image, in_place=True)  # turns it before it rewrites these
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel, which `convert` would cut off at 255
            high = 65535 if image.mode[0] == "I" else image.getextrema()[1] or 1
            image = image.convert("F").point(lambda value: value * (255 / high) + 0)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def load_images(paths, transform):
    """-> pixels (B,3,H,W), uint8, and the errors of images that cannot be read: {path: error}.
    Errors are values, since DataLoader would turn an exception into a text with its traceback."""
    pixels, errors = [], {}
    for path in paths:
        try:
            image = read_image(path)
        except InputError as error:
            image, errors[path] = Image.new("RGB", (1, 1)), error
        pixels.append(transform(image))
    return torch.stack(pixels), errors


def image_loader(items, batch_size, collate, image_size, workers, **options):
    """-> DataLoader whose `collate` reads images, in as many processes as `workers`"""
    needed = 2 * workers * batch_size * 3 * image_size ** 2  # two batches wait for each process
    if os.path.exists("/dev/shm") and shutil.disk_usage("/dev/shm").free < needed:
        raise InputError(f"{workers} processes need {needed / 1e9:.1f} GB of /dev/shm, which has "
                         "less: give --workers 0, or docker's --shm-size")
    return DataLoader(items, batch_size, collate_fn=collate, num_workers=workers,
                      worker_init_fn=stop_at_sigterm, **options)


def tokenize(tokenizer, captions):
    """Captions, cleaned as ALBEF's are -> input_ids (T,L), attention_mask (T,L), L at most 30."""
    marks = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")  # two become blanks, the others vanish
    cleaned = []
    for caption in captions:
        caption = caption.encode(errors="replace").decode()  # half a surrogate pair becomes ?
        caption = caption.lower().translate(marks).replace("<person>", "person")
        cleaned.append(" ".join(caption.split()))
    text = tokenizer(cleaned, padding=True, padding_side="right", truncation=True, max_length=31,
                     return_tensors="pt")
    # ALBEF's tokenizer adds no [SEP] at the end of a text, ours does. The mask is moved left by
    # one place, so that it ends before [SEP]:
    #     [CLS] a dog [SEP] [PAD]   with mask 1 1 1 1 0   becomes
    #     [CLS] a dog [SEP]         with mask 1 1 1 0
    return text["input_ids"][:, :-1], text["attention_mask"][:, 1:]


def make_batch(pairs, transform, tokenizer, epoch_seed):
    """[(image number, path, caption)] -> the batch that `loop_losses` takes, and errors of images.

    Augmentation is drawn from the batch's own seed, so that it is the same in whichever process,
    and after however many epochs, the batch is loaded. epoch_seed: a tensor in shared memory."""
    numbers, paths, captions = zip(*pairs)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash((int(epoch_seed), *numbers)))
        pixels, errors = load_images(paths, transform)
    return [pixels, *tokenize(tokenizer, captions), torch.tensor(numbers)], errors


# -------------------------------------------------------------------------------------------- Model

# cuDNN's attention, which torch prefers on new GPUs, plans anew for each shape of its inputs, and
# here nearly each call has its own: on an H200, the first re-ranking took 7.2 s, and 0.9 s without.
torch.backends.cuda.enable_cudnn_sdp(False)


class Attention(nn.Module):
    """Multi-head attention, then BERT's residual connection and norm. `self` and `output` are
    BERT's names of the parts, so that its weights load. Attention weights are not dropped out
    (ours)."""

    def __init__(self, config, source_width):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.self = nn.ModuleDict({"query": nn.Linear(width, width),
                                   "key": nn.Linear(source_width, width),
                                   "value": nn.Linear(source_width, width)})
        self.output = BertSelfOutput(config)

    def forward(self, x, source, mask):
        """x (P,L,D) attends to source (P,S,D) where mask (P,1,1,S) is True -> like x"""
        return self.output(self.attend(self.self.query(x), source, mask), x)

    def attend(self, query, source, mask=None):
        """query (P,L,D), source (P,S,D) -> (P,L,D): for each query, a weighted mean of values"""
        key, value = self.self.key(source), self.self.value(source)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)
                             for part in (query, key, value))  # (P,heads,L or S,D/heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)  # (P,L,D)


class CrossAttention(Attention):
    """Attention from the texts of P pairs to their images, which many pairs share.

    The simple way would repeat each image's tokens for each of its texts. Here all texts of an
    image form one long query to it, so that keys and values, most of the work at 577 tokens, are
    computed once for the image. Say image 0 is paired with texts 3 and 5, image 1 with text 4.
    The three texts are put into a table with a row for each image, here of 2 columns, in the
    slots [0, 1, 2], counted row by row:

        image 0:  text 3, text 5
        image 1:  text 4, nothing

    Texts do not see each other there, and what empty places give is dropped. An image with far more
    texts than the others gets several rows, see `LoopITR.match`."""

    def forward(self, x, image_tokens, slot, columns):
        """x (P,L,D) in the slots slot (P,) attends to image_tokens (rows,N,D) -> like x"""
        query = self.self.query(x)
        rows, (_, length, width) = len(image_tokens), query.shape
        table = query.new_zeros(rows * columns, length, width).index_copy(0, slot, query)
        attended = self.attend(table.view(rows, columns * length, width), image_tokens)
        attended = attended.view_as(table).index_select(0, slot)  # (P,L,D) again
        return self.output(attended, x)


class CrossLayer(nn.Module):
    """BERT layer with cross-attention between self-attention and feed-forward (ALBEF)."""

    def __init__(self, config, image_width):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = CrossAttention(config, image_width)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, x, text, mask, image_tokens, slot, columns):
        """x: all tokens of text (P,L,D), or only its first (P,1,D); mask (P,1,1,L), bool;
        image_tokens, slot, columns: see `CrossAttention` -> like x"""
        x = self.attention(x, text, mask)
        x = self.crossattention(x, image_tokens, slot, columns)
        return self.output(self.intermediate(x), x)


class LoopITR(nn.Module):
    """The shared network: a transformers vision model whose first token is [CLS], and a BertModel,
    whose layers from `text_layers` on, half of them, become the cross encoder (ALBEF).

    embedding: E; image_size: pixels of a side, for who loads images; bf16: mixed precision"""

    def __init__(self, image_encoder, text_encoder, text_layers=None, embedding=256,
                 image_size=384, bf16=False):
        super().__init__()
        bert, image_width = text_encoder.config, getattr(image_encoder.config, "hidden_size", None)
        layers = getattr(getattr(text_encoder, "encoder", None), "layer", None)
        if image_width is None or layers is None:
            raise InputError(f"{type(image_encoder).__name__} is no ViT, or "
                             f"{type(text_encoder).__name__} no BERT")
        text_layers = len(layers) // 2 if text_layers is None else text_layers
        text_encoder.encoder.layer, upper = layers[:text_layers], layers[text_layers:]
        image_encoder.pooler = text_encoder.pooler = None  # [CLS] is projected as it is
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_projection = nn.Linear(image_width, embedding)
        self.text_projection = nn.Linear(bert.hidden_size, embedding)
        self.cross_encoder = nn.ModuleList(CrossLayer(bert, image_width) for _ in upper)
        # Only cross-attention, which a plain BERT lacks, may keep its random weights.
        missing, unknown = self.cross_encoder.load_state_dict(upper.state_dict(), strict=False)
        filled = all("crossattention" in name for name in missing)
        if text_layers < 1 or unknown or not filled:
            raise InputError(f"{type(text_encoder).__name__} has few layers, or others than BERT's")
        self.match_head = nn.Linear(bert.hidden_size, 1)
        # ALBEF's 0.07, learned as a logarithm, so that it stays positive without clamping.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        # ALBEF's mean and standard deviation of red, green and blue, for pixels from 0 to 255.
        mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(deviation).view(3, 1, 1), persistent=False)
        self.image_size = image_size
        # Autocast covers only the layers of the encoders: rounded to bf16, many scores would tie.
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.autocast = partial(torch.autocast, dtype=torch.bfloat16, enabled=bf16)

    @property
    def temperature(self):
        """Scalar tensor, positive; dual logits are embedding @ embedding.T / temperature."""
        return self.log_temperature.exp()

    @property
    def device(self):
        """torch.device of the weights, on which the inputs must be, too."""
        return self.log_temperature.device

    def recompute_activations(self):
        """Of each layer, keep only the input for the backward pass, and compute the rest again."""
        # By replacing `forward`, transformers' layers and ours are treated alike.
        for layer in self.modules():
            if isinstance(layer, (CrossLayer, GradientCheckpointingLayer)):  # transformers' layers
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)

    def forward(self, batch, **options):
        """`loop_losses`, under the name that DistributedDataParallel calls."""
        return loop_losses(self, batch, **options)

    def encode_image(self, pixels):
        """pixels (B,3,H,W), from 0 to 255, bytes or floats, at any H and W -> tokens (B,N,D), bf16
        in mixed precision, and unit embedding (B,E)"""
        with self.autocast(self.device.type):
            pixels = (pixels - self.mean) / self.std
            output = self.image_encoder(pixels, interpolate_pos_encoding=True)
        tokens = output.last_hidden_state
        cls = tokens[:, 0].float().clone()  # a copy, so that not all tokens are kept for backward
        return tokens.to(self.dtype), F.normalize(self.image_projection(cls), dim=-1)

    def encode_text(self, input_ids, attention_mask):
        """input_ids (B,L), attention_mask (B,L) -> tokens (B,L,D), unit embedding (B,E)"""
        with self.autocast(self.device.type):
            tokens = self.text_encoder(input_ids, attention_mask).last_hidden_state.float()
        return tokens, F.normalize(self.text_projection(tokens[:, 0]), dim=-1)

    def match(self, image_tokens, text_tokens, attention_mask, wanted=None):
        """The cross encoder -> match logits (I,T): the log-odds that a text is the image's own, and
        not one of the negatives that were drawn for it in training.

        image_tokens (I,N,D), text_tokens (T,L,D), attention_mask (T,L)
        wanted (I,T), bool: the pairs to compute; 0 for the others. All, if it is not given."""
        if wanted is None:
            wanted = torch.ones(len(image_tokens), len(text_tokens), dtype=bool, device=self.device)
        image_index, text_index = wanted.nonzero(as_tuple=True)  # P pairs, sorted by image
        # Where is each pair in the table of `CrossAttention`? An image with more than twice the
        # mean number of texts gets several rows, so that the others' rows have few empty places:
        # in a table of 2 columns, an image with 5 texts has 3 rows, the last with an empty place.
        text_count = wanted.sum(1)  # (I,)
        mean = math.ceil(len(text_index) / max(1, int((text_count > 0).sum())))
        columns = max(1, min(int(text_count.max()), 2 * mean))
        row_count = (text_count + columns - 1) // columns  # (I,)
        first_row = row_count.cumsum(0) - row_count
        number = wanted.cumsum(1)[image_index, text_index] - 1  # 0, 1, .. among its image's texts
        slot = first_row[image_index] * columns + number
        # Evaluation keeps image tokens in half precision, and on the host.
        image_tokens = image_tokens.to(self.device, self.dtype).repeat_interleave(row_count, 0)

        # index_select, because the backward pass of text_tokens[text_index] is not deterministic.
        text = text_tokens.index_select(0, text_index).float()  # (P,L,D)
        mask = attention_mask[text_index].bool()[:, None, None]  # (P,1,1,L)
        with self.autocast(self.device.type):
            for layer in self.cross_encoder[:-1]:
                text = layer(text, text, mask, image_tokens, slot, columns)
            # The match head reads only [CLS], so the last layer computes nothing else.
            last = self.cross_encoder[-1]
            cls = last(text[:, :1], text, mask, image_tokens, slot, columns)
        logits = torch.zeros(wanted.shape, device=self.device)
        logits[image_index, text_index] = self.match_head(cls.float()).flatten()
        return logits


# ------------------------------------------------------------------------ Hard negatives and losses

@torch.no_grad()
def sample_hard_negatives(similarity, is_positive, num_negatives, strategy="softmax"):
    """For each query, choose num_negatives different candidates that are not positives.

    similarity (Q,C): dual logits, which are divided by the learned temperature; is_positive (Q,C):
    bool -> indices (Q,m), without gradient. strategy: "softmax" draws without replacement from the
    softmax over the negatives (ALBEF), "topk" takes the hardest, "random" any. To draw spares some
    of the negatives that are right, but not marked so. When a query has too few negatives (one
    image in the batch: none), all queries get fewer, and none ever gets a positive."""
    # Gumbel noise is minus the log of an exponential variable. The m largest of logits plus Gumbel
    # noise are an exact draw of m without replacement from the softmax of the logits. ALBEF's
    # torch.multinomial needs probabilities, which underflow at low temperatures.
    noise = -torch.empty_like(similarity, dtype=torch.float32).exponential_().log()
    if strategy == "softmax":
        scores = similarity + noise
    elif strategy == "topk":
        scores = similarity
    elif strategy == "random":
        scores = noise
    else:
        raise ValueError(f"unknown strategy {strategy!r}")
    # Positives are masked before the choice. ALBEF zeroes their probabilities, which can leave a
    # row of zeros, from which nothing can be drawn.
    scores = scores.masked_fill(is_positive, -torch.inf)
    fewest = int((~is_positive).sum(1).min())
    return scores.topk(min(num_negatives, fewest), dim=1).indices


def contrastive_loss(logits, is_positive):
    """Softmax cross-entropy in both directions; a query's target is spread over its positives.

    logits (B,T): dual logits; is_positive (B,T): bool -> scalar. A query without positives adds
    0 to the mean. Source: ITC of ALBEF, without momentum targets."""
    targets = is_positive.float()
    image_to_text = F.cross_entropy(logits, F.normalize(targets, p=1, dim=1))
    text_to_image = F.cross_entropy(logits.T, F.normalize(targets.T, p=1, dim=1))
    return (image_to_text + text_to_image) / 2


def matching_loss(logits, labels):
    """Binary cross-entropy of match logits (P,) against labels (P,) -> scalar, mean over pairs.

    Source: ITM of ALBEF, whose cross-entropy over two logits is this one over their difference."""
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def distillation_loss(student, teacher, objective="mse", temperature=0.5):
    """Teach the dual encoder what the cross encoder thinks of the same candidates.

    student, teacher (Q,1+m): dual and match logits, the positive in column 0 -> scalar, mean over
    queries (mse, margin: and over candidates). The teacher's logits are divided by `temperature`.
    objective: kl, mse, margin, label or none: our choices, as the defaults, which training uses."""
    # What the model believes of a pair is the sum of both logits (`rerank` says why), so the sum
    # would be the natural target. We distil the match logits alone, with a small weight (0.05 in
    # training): a hint, not a value to reach. The sum as a target was tried and was no better.
    teacher = teacher.detach() / temperature  # detached: the student must not teach its teacher
    if objective == "none" or student.shape[1] == 1:  # without negatives there is nothing to learn
        return student.new_zeros(())
    if objective == "kl":
        # KL(softmax(teacher) || softmax(student)). Hinton (1503.02531) divides the student's logits
        # by the temperature, too, and multiplies the loss by its square. Not here: the dual logits
        # have a learned temperature of their own, and a constant factor belongs to the weight.
        return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    if objective == "mse":  # rows are centred: adding a constant does not change a ranking
        return F.mse_loss(student - student.mean(1, keepdim=True),
                          teacher - teacher.mean(1, keepdim=True))
    if objective == "margin":  # by how much the positive wins: Margin-MSE, 2010.02666
        return F.mse_loss(student[:, :1] - student[:, 1:], teacher[:, :1] - teacher[:, 1:])
    if objective == "label":  # control without a teacher: what hard negatives alone bring
        return -student.log_softmax(1)[:, 0].mean()
    raise ValueError(f"unknown distillation objective {objective!r}")


# ----------------------------------------------------------------------------------------- The loop

def loop_losses(model, batch, negatives=1, sampling="softmax", objective="mse",
                distill_temperature=0.5):
    """One turn of the loop -> dict of scalars: the contrastive, matching and distillation losses,
    how often a positive beats its m negatives, by dual and by match logits (dual_recall,
    cross_recall), and the temperature.

    batch of this process: pixels (B,3,H,W), input_ids, attention_mask (B,L), image_ids (B,).
    Contrastive trains the dual encoder and the temperature; matching the cross encoder and, through
    their tokens, both encoders; distillation the dual encoder alone."""
    pixels, input_ids, attention_mask, image_ids = batch
    image_tokens, image_embedding = model.encode_image(pixels)
    text_tokens, text_embedding = model.encode_text(input_ids, attention_mask)

    # 1. Contrastive loss over the batches of all processes. The image decides what is a positive,
    # not the row: two captions of one image in a batch are both right.
    all_ids = gather_from_all(image_ids)
    all_images, all_texts = gather_from_all(image_embedding), gather_from_all(text_embedding)
    logits = all_images @ all_texts.T / model.temperature
    contrastive = contrastive_loss(logits, all_ids[:, None] == all_ids)

    # 2. Dual -> cross: the dual logits of this process choose m hard texts for each image and m
    # hard images for each text. A query's candidates are its own partner, in front, and these, but
    # not what else is right, such as other captions of its image.
    # The temperature is detached, since distillation would set off a runaway: it would lower the
    # temperature until the dual logits spread as widely as the teacher's; a lower temperature draws
    # harder negatives; and to tell these apart, the teacher would spread its logits even further.
    dual_logits = image_embedding @ text_embedding.T / model.temperature.detach()  # (B,B)
    is_positive = image_ids[:, None] == image_ids
    hard_texts = sample_hard_negatives(dual_logits, is_positive, negatives, sampling)  # (B,m)
    hard_images = sample_hard_negatives(dual_logits.T, is_positive.T, negatives, sampling)
    own = torch.arange(len(image_ids), device=image_ids.device)[:, None]
    texts = torch.cat([own, hard_texts], dim=1)  # (B,1+m): each image's candidates
    images = torch.cat([own, hard_images], dim=1)  # (B,1+m): each text's candidates

    # 3. One pass of the cross encoder over all pairs of a query and a candidate: texts are marked
    # in the rows of `wanted`, images in its columns. The loss counts a pair as often as it was
    # drawn (ALBEF): B own pairs, B * m hard texts, B * m hard images.
    empty = torch.zeros_like(is_positive)
    wanted = empty.scatter(1, texts, True) | empty.scatter(1, images, True).T  # (B,B)
    match_logits = model.match(image_tokens, text_tokens, attention_mask, wanted)  # (B,B)
    teacher = torch.cat([match_logits.gather(1, texts), match_logits.T.gather(1, images)])
    own_pairs, hard_pairs = match_logits.diag(), teacher[:, 1:].flatten()
    labels = torch.cat([torch.ones_like(own_pairs), torch.zeros_like(hard_pairs)])
    matching = matching_loss(torch.cat([own_pairs, hard_pairs]), labels)

    # 4. Cross -> dual: both encoders' logits of the same candidates, (2B,1+m).
    student = torch.cat([dual_logits.gather(1, texts), dual_logits.T.gather(1, images)])
    distillation = distillation_loss(student, teacher, objective, distill_temperature)
    return {"contrastive": contrastive, "matching": matching, "distillation": distillation,
            "dual_recall": (student[:, :1] > student[:, 1:]).all(1).float().mean(),
            "cross_recall": (teacher[:, :1] > teacher[:, 1:]).all(1).float().mean(),
            "temperature": model.temperature.detach()}


def gather_from_all(x):
    """x (B,..) of this process -> (processes * B,..) of all, with gradient; B is equal in all."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    own = x.clone()
    if own.requires_grad:
        # All processes compute the same loss of the whole batch, and each propagates it back only
        # into its own rows. The gradients must be summed, but DistributedDataParallel takes their
        # mean; so each is multiplied by the number of processes.
        own.register_hook(lambda gradient: len(parts) * gradient)
    parts[dist.get_rank()] = own
    return torch.cat(parts)


# ----------------------------------------------------------------------------------------- Training

def make_optimizer(model, lr, new_lr):
    """AdamW; weight decay 0.02, none for biases and norms (ALBEF). Layers without pre-trained
    weights, and the temperature, learn at the peak rate new_lr, all others at lr (ours)."""
    groups = {}
    for name, parameter in model.named_parameters():
        is_new = re.search("crossattention|_projection|match_head|temperature", name)
        peak = new_lr if is_new else lr
        decay = 0.02 if parameter.ndim > 1 else 0.0
        group = groups.setdefault((peak, decay), dict(params=[], peak=peak, weight_decay=decay))
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), fused=True)


def lr_factor(step, steps):
    """Share of the peak rate: a linear warm-up over 100 steps, at most a tenth of all steps (ours),
    then a cosine down to a tenth (ALBEF)."""
    warmup = min(100, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * step / steps)


def training_loader(tokenizer, captions_of, epoch_seed, args):
    """-> DataLoader of this process's batches of all captions, as `make_batch` makes them"""
    pairs = []  # (image number, path, caption)
    for number, (path, captions) in enumerate(captions_of.items()):
        pairs += [(number, path, caption) for caption in captions]
    per_process, rest = divmod(args.batch_size, args.processes)
    if rest or not args.negatives < per_process <= len(pairs) // args.processes:
        raise InputError(f"--batch-size {args.batch_size} does not fit {len(pairs)} captions: each "
                         f"process needs an equal share, more than --negatives {args.negatives}")
    collate = partial(make_batch, transform=image_transform(args.image_size, args.augment),
                      tokenizer=tokenizer, epoch_seed=epoch_seed)
    # Shuffles, too; its seed for an epoch is seed + epoch.
    sampler = DistributedSampler(pairs, args.processes, args.rank, seed=1_000 * args.seed)
    return image_loader(pairs, per_process, collate, args.image_size, args.workers,
                        sampler=sampler, drop_last=True, persistent_workers=args.workers > 0,
                        pin_memory=torch.device(args.device).type == "cuda")


def train(model, tokenizer, splits, args):
    """Train, and keep two checkpoints in --output: best.pt is the best epoch on val, with which the
    model ends, last.pt the one to go on from. Beside the options, args has rank and processes, the
    options to store in a checkpoint (recipe), and resume (see `parse_arguments`)."""
    model.image_encoder.requires_grad_(not args.freeze_image)
    if args.grad_checkpointing:
        model.recompute_activations()
    epoch_seed = torch.zeros(1, dtype=torch.long).share_memory_()
    loader = training_loader(tokenizer, splits["train"], epoch_seed, args)
    optimizer = make_optimizer(model, args.lr, args.new_lr)
    state = {"trained": 0, "validated": 0, "best": -1.0}  # epochs; rsum of the best one on val
    if args.resume:
        checkpoint = load_checkpoint(f"{args.output}/last.pt")
        with input_errors(f"{args.output}/last.pt is damaged, or of another version"):
            optimizer.load_state_dict(checkpoint["optimizer"])
            state = {name: checkpoint["state"][name] for name in state}
        del checkpoint  # else the file stays mapped, and its disk taken, when it is replaced
    parallel = model
    if args.processes > 1:
        states = [None] * args.processes
        dist.all_gather_object(states, state)
        if states.count(state) < args.processes:
            raise InputError(f"not all processes see the same files in {args.output}")
        # Some parameters may get no gradient, such as DINOv2's mask token.
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True,
                                                       gradient_as_bucket_view=True)
    if args.rank == 0:
        begin_run(model, tokenizer, loader, state, args)
    for epoch in range(state["validated"], args.epochs):
        if state["trained"] == epoch:  # else the run was stopped in the validation
            # All that is random in an epoch follows from these seeds, whatever happened before.
            loader.sampler.set_epoch(epoch)
            epoch_seed[0] = 1_000_000 * args.seed + 1_000 * epoch + args.rank
            torch.manual_seed(int(epoch_seed))
            train_epoch(parallel, loader, optimizer, epoch, args)
            state["trained"] += 1
            save(args, "last.pt", model, state=state, optimizer=optimizer.state_dict())
        if args.rank == 0:  # the others go on, and wait for it in their next step
            result = evaluate(model, tokenizer, splits["val"], args, "val", epoch + 1)
            judge = "cross" if args.matching_weight else "dual"  # the cross encoder, if trained
            if result[judge]["rsum"] > state["best"]:
                state["best"] = result[judge]["rsum"]
                save(args, "best.pt", model)
        state["validated"] += 1
        save(args, "last.pt", model, state=state, optimizer=optimizer.state_dict())
    if args.rank == 0:
        model.load_state_dict(load_checkpoint(f"{args.output}/best.pt")["model"])


def begin_run(model, tokenizer, loader, state, args):
    """Say what will be trained; write what a checkpoint needs beside it, and the log's head."""
    pairs, steps = loader.dataset, len(loader)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{args.output}: {millions:.1f} million parameters from {args.start or args.init}; "
          f"{len(pairs):,} captions of {pairs[-1][0] + 1:,} images; {args.epochs} epochs of "
          f"{steps:,} steps, {state['trained']} are trained; {args.device}, {model.dtype}")
    if state["validated"] == args.epochs:
        print("This run is finished; its best epoch is tested again.")
    if steps < 20:
        print("So few steps an epoch train little: a smaller --batch-size makes more of them.")
    if not args.resume:
        model.image_encoder.config.save_pretrained(f"{args.output}/image-model")
        model.text_encoder.config.save_pretrained(f"{args.output}/text-model")
        tokenizer.save_pretrained(f"{args.output}/text-model")
        write_log(args, "w", options=args.recipe, processes=args.processes, device=args.device,
                  torch=torch.__version__, transformers=transformers.__version__)


def train_epoch(model, loader, optimizer, epoch, args):
    """One pass over all captions."""
    model.train()
    steps, log_every = args.epochs * len(loader), max(1, min(10, len(loader) // 10))
    bar = tqdm(loader, f"epoch {epoch + 1}", disable=args.rank > 0 or None,  # None: on a terminal
               bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining}{postfix}")
    last_line = time.monotonic()
    for step, (batch, errors) in enumerate(bar, start=epoch * len(loader)):
        if errors:
            raise next(iter(errors.values()))
        progress, factor = step / steps, lr_factor(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]
        # Fresh cross-attention learns much earlier from random negatives than from hard ones.
        sampling = args.sampling if progress >= args.random_first else "random"
        losses = model([part.to(args.device, non_blocking=True) for part in batch],
                       negatives=args.negatives, sampling=sampling, objective=args.distill,
                       distill_temperature=args.distill_temperature)
        # An untrained teacher teaches noise, so distillation waits until it has been taught itself.
        distill_weight = args.distill_weight if progress >= args.distill_from else 0.0
        loss = (losses["contrastive"] + args.matching_weight * losses["matching"]
                + distill_weight * losses["distillation"])
        optimizer.zero_grad()
        loss.backward()
        # At the high rates that new layers need, training can collapse unclipped.
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        if not norm.isfinite():
            raise InputError(f"loss {loss.item()} or its gradient is not finite, step {step + 1}; "
                             f"{args.output}/last.pt, if there is one, is from before, and good")
        optimizer.step()
        waited = time.monotonic() - last_line  # seconds
        if args.rank == 0 and ((step + 1) % log_every == 0 or waited > 30):
            line = {name: round(value.item(), 5) for name, value in losses.items()}
            write_log(args, step=step + 1, epoch=epoch + 1, loss=loss.item(), **line,
                      lr_factor=factor)
            text = (f"loss {loss.item():.2f}, ITC {line['contrastive']:.2f}, "
                    f"ITM {line['matching']:.2f}, distill {line['distillation']:.2f}")
            bar.set_postfix_str(text)
            if waited > 5:
                last_line = time.monotonic()
                if bar.disable:
                    print(f"epoch {epoch + 1}, step {step + 1} of {steps}: {text}", flush=True)


def write_log(args, mode="a", **values):
    """Append one JSON object to log.jsonl, or begin it anew (mode "w")."""
    with open(Path(args.output, "log.jsonl"), mode) as log:
        log.write(json.dumps(values) + "\n")


def save(args, name, model, **rest):
    """Write a checkpoint, in the first process; under another name first, so never half a file."""
    if args.rank == 0:
        path = f"{args.output}/{name}"
        with input_errors(f"{path} cannot be written"):
            torch.save({"model": model.state_dict(), "options": args.recipe} | rest, f"{path}.part")
            os.replace(f"{path}.part", path)


# --------------------------------------------------------------------------------------- Evaluation

def recall_at_k(image_to_text, image_of_text, ks=(1, 5, 10), text_to_image=None):
    """Recall in percent: TR@k, image to text, a hit if any caption of the image is among the top
    k; IR@k, text to image; rsum, the sum of all.

    image_to_text (I,T): the scores by which images rank texts; text_to_image (I,T): those by which
    texts rank images, if they are others; image_of_text (T,): the image that each text belongs to
    -> dict. A wrong candidate counts as ahead of the best right one if their scores are equal, or
    one of them is NaN: so a constant scorer wins nothing."""
    if text_to_image is None:
        text_to_image = image_to_text
    images = torch.arange(len(image_to_text), device=image_to_text.device)
    is_right = image_of_text.to(images.device) == images[:, None]  # (I,T)
    result = {}
    for name, scores, right in (("TR", image_to_text, is_right),
                                ("IR", text_to_image.T, is_right.T)):
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ahead = (~(scores < best) & ~right).sum(1)  # "not less" counts ties and NaN, too
        ahead = ahead[right.any(1)]  # an image without captions is no query
        for k in ks:
            result[f"{name}@{k}"] = 100 * (ahead < k).float().mean().item()
    return result | {"rsum": sum(result.values())}


@torch.no_grad()
def encode_images(model, paths, workers=0, keep_tokens=True, errors=None):
    """-> tokens (I,N,D), half precision, on the host (COCO: 4.1 GiB), or None; embeddings (I,E)

    errors: gets the errors of images that cannot be read, by path; without it, they are raised."""
    model.eval()
    collate = partial(load_images, transform=image_transform(model.image_size))
    loader = image_loader(paths, 64, collate, model.image_size, workers)
    tokens, embeddings = None, []
    for number, (pixels, failed) in enumerate(tqdm(loader, "images", leave=False, disable=None)):
        if failed and errors is None:
            raise next(iter(failed.values()))
        if failed:
            errors.update(failed)
        part, embedding = model.encode_image(pixels.to(model.device))
        embeddings.append(embedding)
        if keep_tokens and tokens is None:  # filled in place: torch.cat would hold all twice
            tokens = torch.empty(len(paths), *part.shape[1:], dtype=torch.half)
        if keep_tokens:
            tokens[64 * number:64 * (number + 1)] = part.half()
    return tokens, torch.cat(embeddings)


@torch.no_grad()
def encode_texts(model, tokenizer, captions):
    """-> tokens (T,L,D) in half precision, attention mask (T,L), embeddings (T,E)"""
    model.eval()
    input_ids, mask = (part.to(model.device) for part in tokenize(tokenizer, captions))
    parts = map(model.encode_text, input_ids.split(256), mask.split(256))
    tokens, embeddings = zip(*parts)
    return torch.cat([part.half() for part in tokens]), mask, torch.cat(embeddings)


@torch.no_grad()
def rerank(model, image_tokens, text_tokens, attention_mask, dual_scores, k, dual_weight=0.0,
           pairs_per_pass=2048):
    """Let the cross encoder order the k best candidates of each query by dual scores.

    image_tokens (I,N,D), text_tokens (T,L,D), attention_mask (T,L), dual_scores (I,T) ->
    image_to_text, text_to_image (I,T), on the CPU: match logit + dual_weight * dual score for the
    k best texts of each image, or the k best images of each text; all others below, in dual order.
    With fewer pairs_per_pass, less memory is used on the device.

    Why dual_weight, which is ours: if true pairs come from a distribution p and the drawn negatives
    from q, the match logit of a perfectly trained cross encoder is log(p / q). Negatives are drawn
    from the softmax of the dual scores, so the dual score is log q, up to a constant of the query.
    The sum of both is log p, which is what candidates should be ranked by."""
    model.eval()
    # All that tie with the k-th best are in, too. If topk left some of them out, right candidates
    # would lose rivals by chance, and even a cross encoder that says nothing would seem to gain.
    ranked = dual_scores.masked_fill(dual_scores.isnan(), -torch.inf)  # NaN comes last
    best_texts = dual_scores >= ranked.topk(min(k, ranked.shape[1]), 1).values[:, -1:]
    best_images = dual_scores >= ranked.topk(min(k, ranked.shape[0]), 0).values[-1:]
    shortlisted = best_texts | best_images  # a pair that is in both is computed once
    scores = dual_weight * dual_scores

    # In essence: scores += model.match(image_tokens, text_tokens, attention_mask, shortlisted).
    # All pairs at once would need much memory, so this goes in passes over images with like many
    # texts, which fill the table of `CrossAttention`. Each pass takes the texts in four blocks of
    # like length, trimmed to their longest: captions have about 15 tokens, but are padded to 30.
    # In a block, an image has a quarter of its pairs; its own tokens need as much memory as about
    # 8 pairs (an estimate). An image that thousands of texts like takes more blocks.
    length = attention_mask.sum(1)
    by_length = length.argsort()
    pairs, order = shortlisted.sum(1).sort()
    number = (pairs / 4 + 8).cumsum(0) // pairs_per_pass  # of each image's pass: 0, 0, .., 1, 1, ..
    sizes = number.unique_consecutive(return_counts=True)[1].tolist()
    passes = list(zip(order.split(sizes), pairs.split(sizes)))
    for images, counts in tqdm(passes, "re-ranking", leave=False, disable=None):
        tokens = image_tokens[images.to(image_tokens.device)].to(model.device)
        for block in by_length.chunk(max(4, int(counts.sum()) // pairs_per_pass)):
            longest = int(length[block].max())
            part = images[:, None], block  # of the matrices (I,T)
            if shortlisted[part].any():
                scores[part] += model.match(tokens, text_tokens[block, :longest],
                                            attention_mask[block, :longest], shortlisted[part])

    # All others go below; in double precision, since in single the shift could make some equal.
    lowest = scores[shortlisted].nan_to_num(torch.inf).min().item()
    below = dual_scores.double() - ranked.max().item() + lowest - 1
    return (torch.where(best_texts, scores.double(), below).cpu(),
            torch.where(best_images, scores.double(), below).cpu())


@torch.no_grad()
def evaluate(model, tokenizer, captions_of, args, split="test", epoch=None):
    """Print recall@K of the dual encoder, and of the cross encoder re-ranking the dual's top
    --rerank, whose seconds include the dual's; with --output, log it, and draw examples.

    captions_of: {image path: captions} -> {"dual": {"TR@1", .., "seconds"}, "cross": {..}}"""
    paths, captions = list(captions_of), sum(captions_of.values(), [])
    counts = torch.tensor([len(captions_of[path]) for path in paths])
    image_of_text = torch.repeat_interleave(counts)  # [2, 3] -> [0, 0, 1, 1, 1]
    start = time.perf_counter()
    image_tokens, images = encode_images(model, paths, args.workers)
    text_tokens, mask, texts = encode_texts(model, tokenizer, captions)
    dual_logits = images @ texts.T / model.temperature
    dual = recall_at_k(dual_logits, image_of_text)
    dual["seconds"] = time.perf_counter() - start
    image_to_text, text_to_image = rerank(model, image_tokens, text_tokens, mask, dual_logits,
                                          args.rerank, args.dual_weight)
    cross = recall_at_k(image_to_text, image_of_text, text_to_image=text_to_image)
    cross["seconds"] = time.perf_counter() - start
    result = {"dual": dual, "cross": cross}
    print(f"{split}: {len(paths)} images, {len(texts)} texts; top {args.rerank} of each re-ranked")
    print(" " * 13 + "".join(f"{name:>8}" for name in dual))
    for name, values in result.items():
        print(f"{name + ' encoder':13}" + "".join(f"{v:8.1f}" for v in values.values()))
    if args.output:
        write_log(args, split=split, epoch=epoch, images=len(paths), k=args.rerank, **result)
        draw_retrieval(f"{args.output}/retrieval.png", paths, captions, image_of_text, dual_logits,
                       text_to_image)
    return result


# ======================================================= The method ends here. Around it: Data sets

ROWS = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
CAPTIONS = {"flickr30k": f"{ROWS}/flickr30k", "coco": f"{ROWS}/coco_karpathy"}
PHOTOS = {  # folder that the captions name -> site that has it as a zip
    "flickr30k-images": "https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main",
    "train2014": "http://images.cocodataset.org/zips",
    "val2014": "http://images.cocodataset.org/zips"}


def load_splits(args):
    """-> {split: {image path: captions}}; toy, flickr30k and coco are drawn or fetched first."""
    needed = ("train", "val", "test") if args.train else ("test",)
    name, files = args.data[0], args.data
    if args.search and os.path.isdir(name) and len(files) == 1:  # photos without captions
        return {"test": {path: [] for path in find_photos(name)}}
    if name == "toy":
        files = [make_toy_dataset(args.images)]
    if name in CAPTIONS:
        files = [fetch(f"{CAPTIONS[name]}_{split}.json", args.images) for split in needed]
    splits = load_captions(*files, images=args.images)
    for split in needed:
        images = splits[split]
        if not images:
            raise InputError(f"{', '.join(map(str, files))}: there are no captions for {split}")
        advice = "do their paths start in --images, and is their upper and lower case right?"
        if name in CAPTIONS:  # only what the captions name: to test on COCO, val2014 alone
            for folder in PHOTOS.keys() & {Path(image).parent.name for image in images}:
                fetch(f"{PHOTOS[folder]}/{folder}.zip", args.images)
            advice = "delete their folder, and repeat the command"
        missing = [image for image in images if not os.path.isfile(image)]
        if missing:
            raise InputError(f"{len(missing)} of {len(images)} {split} images are missing, such as "
                             f"{missing[0]}: {advice}")
    return splits


def find_photos(folder):
    """-> paths of all files in folder, and in folders that it links to, with a picture's ending"""
    endings = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    photos, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()  # a link led back
            continue
        seen.add(os.path.realpath(place))
        photos += [f"{place}/{name}" for name in names if Path(name).suffix.lower() in endings]
    if not photos:
        raise InputError(f"there are no pictures in {folder}")
    return sorted(photos)


def fetch(url, folder):
    """Download url into folder if it is not there, and unpack a zip -> path, which exists only when
    it is whole. What broke off is resumed if the server can do that."""
    archive = Path(folder, url.rpartition("/")[2])
    target = Path(folder, archive.name.removesuffix(".zip"))
    part, unpacked = Path(f"{archive}.part"), Path(f"{archive}.unpacked")
    if not (target.exists() or archive.exists()):
        archive.parent.mkdir(parents=True, exist_ok=True)
        # The last byte that is there comes again, since a server refuses a range of no bytes.
        start = max(part.stat().st_size - 1, 0) if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
        with (input_errors(f"{url} did not arrive: repeat the command to go on, or delete {part}"),
              urllib.request.urlopen(request, timeout=60) as answer,
              open(part, "ab") as file,
              tqdm.wrapattr(answer, "read", desc=archive.name, total=answer.length) as source):
            file.truncate(start if answer.status == 206 else 0)  # 200: all of it comes once more
            shutil.copyfileobj(source, file)
            if answer.length:  # counts down to 0; None when the server does not tell it
                raise OSError(f"the connection broke {answer.length} bytes before the end")
        os.replace(part, archive)
    if not target.exists():
        with input_errors(f"{archive} did not unpack to {target.name}: if damaged, delete it"):
            shutil.unpack_archive(archive, unpacked, "zip")
            os.replace(unpacked / target.name, target)
        shutil.rmtree(unpacked)
        archive.unlink()
    return target


def make_toy_dataset(folder, train=40000, val=300, test=500, seed=0):
    """Draw scenes, once, and configure two small backbones -> path of the scenes' captions."""
    path = Path(folder, "captions.json")
    if path.exists():
        return path
    Path(folder, "images").mkdir(parents=True, exist_ok=True)
    rng, entries, words = random.Random(seed), [], set()
    splits = ["train"] * train + ["val"] * val + ["test"] * test
    for number, split in enumerate(tqdm(splits, "drawing toy scenes", disable=None)):
        canvas, captions = draw_scene(rng)
        entries.append({"filename": f"images/{number:05d}.png", "split": split,
                        "sentences": [{"raw": caption} for caption in captions]})
        canvas.save(Path(folder, entries[-1]["filename"]))
        words.update(" ".join(captions).split())
    # transformers draws weights with deviation 0.02, right for width 768; at 128 they hardly learn.
    small = dict(hidden_size=128, initializer_range=128 ** -0.5, num_attention_heads=4,
                 intermediate_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    vit = ViTConfig(num_hidden_layers=2, image_size=48, patch_size=16, **small)
    vit.save_pretrained(f"{folder}/image-model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    bert = BertConfig(num_hidden_layers=4, vocab_size=len(words), **small)
    bert.save_pretrained(f"{folder}/text-model")
    Path(folder, "text-model", "vocab.txt").write_text("\n".join(words))
    path.with_suffix(".part").write_text(json.dumps({"images": entries}))
    os.replace(path.with_suffix(".part"), path)  # last: its presence says that all is there
    return path


def draw_scene(rng):
    """-> picture of three objects on a 3 x 3 grid, two captions such as "a small red ring above a
    large blue square", which are hard for one vector per image and easy for cross-attention."""
    shapes = {"circle": None, "ring": None,  # the others: number of sides, rotation in degrees
              "square": (4, 0), "diamond": (4, 45), "triangle": (3, 0), "wedge": (3, 180)}
    colours = ["red", "green", "blue", "yellow", "purple", "orange", "white", "cyan"]
    radii = {"small": 4, "large": 7}  # pixels; a cell is 16, which is one patch of the ViT
    canvas, scene, captions = Image.new("RGB", (48, 48), (40, 40, 40)), [], set()
    draw = ImageDraw.Draw(canvas)
    for cell in rng.sample(range(9), 3):
        size, colour, shape = rng.choice(list(radii)), rng.choice(colours), rng.choice([*shapes])
        x, y, r = 16 * (cell % 3) + 8, 16 * (cell // 3) + 8, radii[size]
        if shapes[shape]:
            draw.regular_polygon((x, y, r), *shapes[shape], fill=colour)
        else:
            inside = colour if shape == "circle" else None
            draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), inside, outline=colour, width=2)
        scene.append((f"a {size} {colour} {shape}", x, y))
    for a, ax, ay in scene:
        for b, bx, by in scene:
            if ax < bx:
                captions |= {f"{a} left of {b}", f"{b} right of {a}"}
            if ay < by:
                captions |= {f"{a} above {b}", f"{b} below {a}"}
    return canvas, rng.sample(sorted(captions), 2)


def check_texts(tokenizer, captions_of):
    """Say what is lost of {image path: captions}; refuse them if most words are unknown."""
    # caption -> number of images that have it
    images_with = Counter(chain.from_iterable(map(set, captions_of.values())))
    sample = list(images_with)[::len(images_with) // 10_000 + 1]
    input_ids, mask = tokenize(tokenizer, sample)
    tokens = int(mask.sum()) - len(sample)  # without [CLS]
    unknown = int((input_ids[mask.bool()] == tokenizer.unk_token_id).sum())
    if tokens <= 2 * unknown:
        raise InputError(f"{unknown} of {tokens} tokens of the captions are unknown to this model")
    cut = (mask.sum(1) == 30).float().mean()
    shared = sum(images > 1 for images in images_with.values())
    print(f"texts: {unknown / tokens:.1%} of tokens are unknown; of {len(images_with):,} captions "
          f"{cut:.1%} reach 30 tokens, where they are cut, {shared:,} belong to several images")


# --------------------------------------------------------------------------------- Starting weights

ALBEF = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF"
# Pre-trained on 4 or 14 million images; fine-tuned from one of these for Flickr30K or COCO.
ALBEF_FILES = ("ALBEF_4M.pth", "ALBEF.pth", "flickr30k.pth", "mscoco.pth")


def build_model(image_model=DEIT, text_model=BERT, image_size=384, scratch=False, device="cpu",
                bf16=False):
    """-> LoopITR, tokenizer, from two backbones: names or folders, as transformers takes them. The
    upper half of the text model becomes the cross encoder (ALBEF). scratch: their weights are not
    read. bf16: mixed precision."""
    backbones = []
    for name in (image_model, text_model):
        with input_errors(f"cannot load {name}"):
            if scratch:
                backbones.append(AutoModel.from_config(AutoConfig.from_pretrained(name)))
                continue
            backbone, report = AutoModel.from_pretrained(name, output_loading_info=True)
            missing = [weight for weight in report["missing_keys"] if "pooler" not in weight]
            if missing:
                raise ValueError(f"it has no weights for {missing}")
            backbones.append(backbone)
    with input_errors(f"cannot load the tokenizer of {text_model}"):
        tokenizer = AutoTokenizer.from_pretrained(text_model)
    model = LoopITR(*backbones, image_size=image_size, bf16=bf16).float().to(device)
    with input_errors(f"{image_model} does not take {image_size} pixels"), torch.no_grad():
        tokens, _ = model.encode_image(torch.zeros(1, 3, image_size, image_size, device=device))
        if tokens.shape[1] <= (image_size // model.image_encoder.config.patch_size) ** 2:
            raise ValueError("it gives no [CLS] beside a token for each patch")
    return model, tokenizer


def load_model(path, device="cpu", bf16=False, image_size=None, image_model=DEIT, text_model=BERT):
    """-> LoopITR, tokenizer, from a checkpoint, such as load_model("runs/toy/best.pt").

    Ours has the configurations of its backbones and the tokenizer beside it, and knows its image
    size. ALBEF's has neither: image_model and text_model name backbones of the same shape, of
    which only configuration and tokenizer are read."""
    checkpoint = load_checkpoint(path)
    ours = "options" in checkpoint
    if ours:
        folder = Path(path).parent
        image_model, text_model = folder / "image-model", folder / "text-model"
        image_size = image_size or checkpoint["options"]["image_size"]
    model, tokenizer = build_model(image_model, text_model, image_size or 384, True, device, bf16)
    with input_errors(f"cannot load {path} into {image_model} and {text_model}"):
        if ours:
            model.load_state_dict(checkpoint["model"])
        else:
            load_albef(model, checkpoint["model"])
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise ValueError("some weights are NaN or infinite")
    return model.to(device), tokenizer


def load_checkpoint(path):
    """-> content of a checkpoint, ours or ALBEF's, which is fetched if it is absent"""
    if Path(path).name in ALBEF_FILES:
        fetch(f"{ALBEF}/{Path(path).name}", Path(path).parent)
    if not os.path.isfile(path):
        raise InputError(f"there is no checkpoint {path}")
    try:  # mmap: only what is used is read from the disk
        content = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if "model" not in content:  # the fine-tuned files that ALBEF's authors publish
            content = {"model": content}
        content["model"].keys()
    except Exception:  # torch's own advice would be to unpickle whatever the file holds
        raise InputError(f"{path} is damaged, or no checkpoint of loopitr.py or ALBEF; if it was "
                         "downloaded, delete it")
    return content


def load_albef(model, state):
    """Fill model from checkpoint["model"] of ALBEF's .pth files, pre-trained or fine-tuned."""
    # The image encoder's weights get the names that older transformers gave them, and
    # from_pretrained translates these into those of the installed version.
    block = r"^visual_encoder\.blocks\.(\d+)\."
    patterns = {  # of ALBEF's names -> ours
        r"^visual_encoder\.cls_token": "vit.embeddings.cls_token",
        r"^visual_encoder\.pos_embed": "vit.embeddings.position_embeddings",
        r"^visual_encoder\.patch_embed\.proj": "vit.embeddings.patch_embeddings.projection",
        r"^visual_encoder\.norm": "vit.layernorm",
        block + "norm1": r"vit.encoder.layer.\1.layernorm_before",
        block + "norm2": r"vit.encoder.layer.\1.layernorm_after",
        block + r"attn\.qkv": r"vit.encoder.layer.\1.attention.attention.qkv",
        block + r"attn\.proj": r"vit.encoder.layer.\1.attention.output.dense",
        block + r"mlp\.fc1": r"vit.encoder.layer.\1.intermediate.dense",
        block + r"mlp\.fc2": r"vit.encoder.layer.\1.output.dense",
        r"^text_encoder\.bert\.": "text_encoder.",  # so it is in the pre-trained files
        r"^vision_proj\.": "image_projection.", r"^text_proj\.": "text_projection.",
        r"^itm_head\.": "match_head.", r"^temp$": "log_temperature"}
    text_layers = len(model.text_encoder.encoder.layer)
    for i in range(len(model.cross_encoder)):
        upper = rf"^text_encoder\.encoder\.layer\.{text_layers + i}\."
        patterns[upper] = f"cross_encoder.{i}."
    vit, rest = {}, {}
    for name, tensor in state.items():
        for pattern, ours in patterns.items():
            name = re.sub(pattern, ours, name)
        tensors = vit if name.startswith("vit.") else rest
        tensors[name.removeprefix("vit.")] = tensor.float()
    for name in [name for name in vit if ".qkv." in name]:  # query, key and value in one
        for part, third in zip(("query", "key", "value"), vit.pop(name).chunk(3)):
            vit[name.replace("qkv", part)] = third
    for name in ("match_head.weight", "match_head.bias"):
        rest[name] = rest[name].diff(dim=0)  # class 1, the match, minus class 0
    rest["log_temperature"] = rest["log_temperature"].log()
    config = model.image_encoder.config
    config.image_size = 16 * math.isqrt(vit["embeddings.position_embeddings"].shape[1] - 1)
    config.layer_norm_eps, config.dtype = 1e-6, torch.float32
    model.image_encoder, report = type(model.image_encoder).from_pretrained(
        None, config=config, state_dict=vit, output_loading_info=True, add_pooling_layer=False)
    rest |= {f"image_encoder.{name}": t for name, t in model.image_encoder.state_dict().items()}
    # Not strict: there are momentum copies, their queues and the language model's head, too.
    missing = [*report["missing_keys"], *model.load_state_dict(rest, strict=False).missing_keys]
    if missing:
        raise ValueError(f"it has no weights for {missing}")


# ------------------------------------------------------------------------------ Search and pictures

@torch.no_grad()
def search(model, tokenizer, paths, args):
    """Print and draw the dual encoder's top --rerank images for --search, ordered by `rerank`."""
    for word in args.search.split():
        if tokenizer.unk_token_id in tokenize(tokenizer, [word])[0]:
            print(f"{word}: unknown to this model's vocabulary")
    errors = {} if os.path.isdir(args.data[0]) else None  # a folder may hold damaged pictures
    _, images = encode_images(model, paths, args.workers, keep_tokens=False, errors=errors)
    if errors:
        print(f"{len(errors)} of {len(paths)} files are left out, since they cannot be read")
    readable = [i for i, path in enumerate(paths) if path not in (errors or {})]
    if not readable:
        raise InputError(f"none of the files in {args.data[0]} can be read")
    text_tokens, mask, text = encode_texts(model, tokenizer, [args.search])
    dual = images[readable] @ text.T / model.temperature  # (I,1)
    dual, best = dual.topk(min(args.rerank, len(readable)), dim=0)
    paths = [paths[readable[i]] for i in best[:, 0].tolist()]
    image_tokens, _ = encode_images(model, paths, args.workers)
    _, scores = rerank(model, image_tokens, text_tokens, mask, dual, len(paths), args.dual_weight)
    print("   score     dual")
    for i in scores[:, 0].argsort(descending=True, stable=True).tolist():
        print(f"{scores[i].item():8.2f} {dual[i].item():8.2f}  {paths[i]}")
    draw_retrieval(f"{args.output or '.'}/search.png", paths, [args.search], [None], dual, scores)


def draw_retrieval(path, images, texts, image_of_text, dual_logits, scores, count=6, cell=104):
    """Draw the five best images by the dual encoder (left) and re-ranked (right), for some texts
    whose best image changed, or for any if none did. The right image, if it is known, is framed.

    images: I paths; texts: T captions; dual_logits, scores (I,T)"""
    changed = (dual_logits.argmax(0).cpu() != scores.argmax(0)).nonzero().flatten().tolist()
    candidates = changed or list(range(len(texts)))
    shown = candidates[::max(1, len(candidates) // count)][:count]
    canvas = Image.new("RGB", (10 * cell + 40, 32 + len(shown) * (cell + 30)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), "left: by the dual encoder; right: re-ranked", "black", font_size=16)
    for row, t in enumerate(shown):
        y = 32 + row * (cell + 30)
        draw.text((8, y), texts[t].encode(errors="replace").decode(), "black", font_size=16)
        for left, matrix in ((4, dual_logits), (5 * cell + 28, scores)):
            best = matrix[:, t].argsort(descending=True, stable=True)[:5].tolist()
            for column, i in enumerate(best):
                image = read_image(images[i]).resize((cell - 8, cell - 8))
                frame = "limegreen" if i == image_of_text[t] else "white"
                canvas.paste(ImageOps.expand(image, 4, frame), (left + column * cell, y + 20))
    canvas.save(path)
    print(f"picture {path}")


# --------------------------------------------------------------------------------------------- Main

class InputError(Exception):
    """Something that the user can fix; any function may raise it, `run` prints it as one line."""


@contextmanager
def input_errors(problem):
    """For calls that use a user's file or ask a hub: what they raise becomes an InputError."""
    try:
        yield
    except Exception as error:  # damaged and foreign files raise many kinds
        raise InputError(f"{problem}: {type(error).__name__}: {error}") from error


def typed(options):
    """{"new_lr": 0.1, "augment": False} -> "--new-lr 0.1 --no-augment", as a user types it"""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name} {' '.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def argument_parser():
    """-> parser that gives only what is typed, without defaults"""
    presets = [f"--data {name}: {typed(preset)}" for name, preset in PRESETS.items()]
    parser = argparse.ArgumentParser(
        argument_default=argparse.SUPPRESS, usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="python loopitr.py --train --negatives 4 --output runs/four\n"
                    "python loopitr.py --search 'a dog' --data photos --checkpoint runs/x/best.pt",
        epilog="other defaults:\n  " + "\n  ".join(
            [*presets, f"a checkpoint as --init: {typed(TRAINED_START)}"]))
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true", help="train or resume, test the best epoch")
    mode.add_argument("--evaluate", action="store_true", help="test --checkpoint")
    mode.add_argument("--search", metavar="WORDS", help="find test images, or in a folder (--data)")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, (default, allowed, meaning) in options.items():
            group.add_argument(f"--{name.replace('_', '-')}", **allowed,
                               help=f"{meaning} (default: {default})")
    return parser


def typed_options(argv):
    """-> {name: value} of the options that are typed, with whole paths; refuse what does nothing"""
    given = vars(argument_parser().parse_args(argv))
    training = "train" in given
    idle = ["checkpoint"] if training else [*OPTIONS["the loop"], *OPTIONS["training"]]
    idle = {name: given[name] for name in idle if name in given}
    if idle:
        raise InputError(f"{typed(idle)} does nothing here: --train starts from --init, --evaluate "
                         "and --search use --checkpoint")
    if not given.get("search", "words").strip():
        raise InputError("--search needs words")
    if "data" in given:
        given["data"] = [x if x in PRESETS else os.path.abspath(x) for x in given["data"]]
    if "images" in given:
        given["images"] = os.path.abspath(given["images"])
    return given


def parse_arguments(argv):
    """-> args, with an attribute for each option, and start, the checkpoint that the model is
    loaded from, or None; resume, whether that is the run's own last.pt; recipe, the options that
    checkpoints store; rank and processes."""
    given = typed_options(argv)
    training = "train" in given
    defaults, trained, stored = {}, {}, {}
    for options in OPTIONS.values():
        defaults |= {name: default for name, (default, _, _) in options.items()}
    # Evaluation takes the options of the run that wrote the checkpoint, among them its data. So the
    # checkpoint is read before it is known which preset applies.
    data = given.get("data", ["toy"])
    folder = f"runs/{Path(data[0]).stem}"
    if training:
        defaults["output"] = folder
    else:
        start = given.get("checkpoint", f"{folder}/best.pt")
        stored = load_checkpoint(start).get("options", {})  # ALBEF's has none
        data = (stored | given).get("data", data)
    preset = PRESETS.get(data[0], {})
    if training:
        init = (defaults | preset | given)["init"]
        start = {"backbones": None, "scratch": None, "albef": "data/ALBEF_4M.pth"}.get(init, init)
        trained = TRAINED_START if start else {}
        if start and os.path.isfile(start):  # a run of ours knows its image size and backbones
            known = load_checkpoint(start).get("options", {})
            trained = trained | {name: known[name] for name in known
                                 if name in ("image_size", "image_model", "text_model")}
    elif stored.get("data") != data:  # other captions, other photos
        stored = stored | {"images": preset.get("images")}
    options = defaults | trained | preset | stored | given  # later ones win
    options["images"] = options["images"] and os.path.abspath(options["images"])
    recipe = {name: options[name] for name in defaults
              if name not in ("checkpoint", "output", "workers", "device")}
    if data == ["toy"]:  # its backbones lie beside its scenes
        for name in {"image_model", "text_model"} - given.keys():
            options[name] = os.path.join(options["images"], options[name])

    resume = is_resumed(options["output"], training, recipe, preset)
    if resume:
        start = f"{options['output']}/last.pt"
    with input_errors(f"--device {options['device']}"):
        torch.zeros(1, device=options["device"])
    if options["bf16"] is None:
        options["bf16"] = torch.device(options["device"]).type != "cpu"
    options |= dict(train=training, search=given.get("search"), rank=0, processes=1)
    if dist.is_initialized():
        options |= dict(rank=dist.get_rank(), processes=dist.get_world_size())
    return argparse.Namespace(**options, start=start, resume=resume, recipe=recipe)


def is_resumed(output, training, recipe, preset):
    """-> whether output holds a run with this recipe, to be gone on with; refuse another run's"""
    if not (training and os.path.exists(f"{output}/last.pt")):
        if output and list(Path(output).glob("*.pt")):
            raise InputError(f"nothing may overwrite the run in {output}: choose another --output")
        return False
    stored = load_checkpoint(f"{output}/last.pt").get("options", {})
    if preset:
        stored["images"] = recipe["images"]  # the folder may have moved
    other = {name: value for name, value in stored.items() if value != recipe.get(name)}
    if other:
        raise InputError(f"{output} holds a run with {typed(other)}: choose another --output; "
                         f"--init {output}/best.pt goes on from its weights")
    return True


def stop_at_sigterm(worker=None):
    """SIGTERM ends a process as Ctrl-C does; a loader's process then just leaves."""
    def stop(number, frame):
        raise KeyboardInterrupt(number)
    signal.signal(signal.SIGTERM, stop)


def main(argv=None):
    """Settings, data, model; then training, evaluation or search."""
    # One process of each machine draws and downloads what the others then find.
    with torch_distributed_zero_first(int(os.environ.get("LOCAL_RANK", -1))):
        args = parse_arguments(argv)
        splits = load_splits(args)
        torch.manual_seed(args.seed)
        if args.start:
            model, tokenizer = load_model(args.start, args.device, args.bf16, args.image_size,
                                          args.image_model, args.text_model)
        else:
            model, tokenizer = build_model(args.image_model, args.text_model, args.image_size,
                                           args.init == "scratch", args.device, args.bf16)
    os.makedirs(args.output or ".", exist_ok=True)
    if args.rank == 0 and not args.search:
        check_texts(tokenizer, splits["train" if args.train else "test"])
    if args.train:
        train(model, tokenizer, splits, args)
    if args.search:
        search(model, tokenizer, list(splits["test"]), args)
    elif args.rank == 0:
        evaluate(model, tokenizer, splits["test"], args)


def run(argv=None):
    """`main`, and what surrounds it: processes, signals, errors -> exit code: 0; 2 for what the
    user can fix, said in one line; 130 and 143 when stopped."""
    try:
        if "RANK" in os.environ:  # torchrun; a download may keep processes waiting for hours
            os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
            with input_errors("RANK is set, but the processes do not find each other"):
                dist.init_process_group(timeout=timedelta(hours=12))
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        main(argv)
        sys.stdout.flush()  # a closed pipe fails here, inside `try`
        if dist.is_initialized():
            dist.destroy_process_group()  # left to the interpreter's exit, it may abort
        return 0
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        message = " ".join((str(error) or repr(error)).split())
        # A RuntimeError is torch's word for memory that does not suffice, on a CPU, say, and for a
        # loader's process that was killed. All others are mistakes in this file.
        known = re.search("allocate memory|out of memory|DataLoader worker", message)
        if isinstance(error, RuntimeError) and not known:
            raise
        print("loopitr:", message[:500], file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("loopitr: stopped; if an epoch was saved, the same command goes on after it",
              file=sys.stderr)
        return 143 if stop.args else 130  # `stop_at_sigterm` gives an argument, Ctrl-C none


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns where loaders fork
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file's name may be in no encoding
    stop_at_sigterm()
    sys.exit(run())
