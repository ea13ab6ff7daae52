# SPDX-License-Identifier: MIT
"""LoopITR (arXiv 2203.05465) in one file: a dual and a cross encoder that teach each other.

    image -> image encoder --+--> [CLS] -> projection --.
                             |                           dot product = dual score (one vector each)
    text  -> text encoder ---+--> [CLS] -> projection --'    |                       ^
                             |                         hard negatives          distillation
                             |                               v                       |
                             '--> tokens --> cross encoder of 1 + m candidates: match score

One turn of the loop is `loop_losses`: (1) dual logits of all pairs in the batch, contrastive loss;
(2) they choose m hard negatives per image and per text; (3) the cross encoder learns to tell the
true pair from those; (4) its logits of the same candidates are distilled into the dual logits.

    python loopitr.py --train                                          # toy scenes, on a laptop
    python loopitr.py --data flickr30k --train                         # full size, on a GPU
    python loopitr.py --evaluate --checkpoint runs/toy/best.pt --rerank all

Left out of ALBEF, whose recipe this is: masked language modelling (its pre-training), momentum
encoders and queues (its fine-tuning too). Ours, because what we know of the paper is silent: all of
the distillation but its direction, m, random negatives first, the learning rate of fresh parts,
gradient clipping, dual logits added in re-ranking.

Shapes: B images or texts of a batch, I images, T texts, P pairs, N image tokens, L text tokens,
V text tokens without padding, D width (image and text tokens may differ in it), E embedding,
Q queries, C candidates, m hard negatives.
"""
import argparse
import datetime
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput
from transformers.trainer_pt_utils import torch_distributed_zero_first


class InputError(ValueError):
    """Something the user can mend: `main` prints it as one line and exits with code 2."""


# ------------------------------------------------------------------------------------------------
# Data


class Record(NamedTuple):
    """One image with its captions. Everything after `load_captions` sees only this form."""
    image: str  # path
    captions: list
    split: str  # train, val or test


def load_captions(path, images=None):
    """Read a captions file, in either of the two forms found in the wild, into Records.

    Karpathy's: {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}, ..]}, ..]}.
    ALBEF's and BLIP's rows: [{"image", "caption": string or list}, ..], one file per split, named
    *train*, *val* or *test*; the rows of one image are joined. `images`: the folder that image
    paths start from (default: that of `path`). InputError for anything else, and blank captions.
    """
    captions, split_of = {}, {}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            rows = [(Path(entry.get("filepath", ""), entry["filename"]), entry["split"],
                     [sentence["raw"] for sentence in entry["sentences"]])
                    for entry in content["images"]]
        else:
            # Exactly one of them, else ValueError; the "val" within "retrieval" names no split.
            split, = set(re.findall("(?<![a-z])(?:train|val|test)", Path(path).stem))
            rows = [(row["image"], split, [row["caption"]] if isinstance(row["caption"], str)
                     else row["caption"]) for row in content]
        for image, split, texts in rows:
            image = str(Path(images or Path(path).parent, image))
            captions.setdefault(image, []).extend(text.strip() for text in texts)
            split_of[image] = split.replace("restval", "train")  # rest of COCO's val: for training
    except OSError as error:
        raise InputError(f"cannot read captions file {path}: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError(
            f"{path} is empty or of an unknown form; read are Karpathy's {{'images': [{{'filename'"
            ", 'split', 'sentences': [{'raw'}]}]} and ALBEF's rows [{'image', 'caption'}], one "
            "file per split with train, val or test in its name") from None
    blank = [image for image, texts in captions.items() if not texts or not all(texts)]
    if blank:
        raise InputError(f"{path}: {len(blank)} images have a blank caption or none, such as "
                         f"{blank[0]}; fill or remove them")
    return [Record(image, texts, split_of[image]) for image, texts in captions.items()]


def make_toy_dataset(folder, train=4000, val=300, test=500, noise=0.0, seed=0):
    """Draw scenes of three objects on a 3 x 3 grid, with captions of how two of them lie.

    Relations are what one vector per image finds hard and cross-attention finds easy. Writes PNGs,
    configurations of two small backbones and, last, captions.json (Karpathy's form) -> its path.
    When that file is there, nothing is drawn again. noise: the part of training captions that go
    to wrong images, as many do on the web.
    """
    target = Path(folder, "captions.json")
    if target.exists():
        return target
    polygons = {"square": (4, 0), "diamond": (4, 45), "triangle": (3, 0), "wedge": (3, 180)}
    shapes = ("circle", "ring", *polygons)
    colours = ("red", "green", "blue", "yellow", "purple", "orange", "white", "cyan")
    radii = {"small": 4, "large": 7}  # pixels, in a cell of 16, which is one patch of the ViT
    relations = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
    rng, entries = random.Random(seed), []
    Path(folder, "images").mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(train + val + test), "drawing toy scenes", disable=None):
        canvas, scene = Image.new("RGB", (48, 48), (40, 40, 40)), []
        for cell in rng.sample(range(9), 3):
            size, colour, shape = rng.choice(list(radii)), rng.choice(colours), rng.choice(shapes)
            (row, column), r, draw = divmod(cell, 3), radii[size], ImageDraw.Draw(canvas)
            x, y = 16 * column + 8, 16 * row + 8
            if shape in polygons:
                draw.regular_polygon((x, y, r), *polygons[shape], fill=colour)
            else:
                draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), outline=colour, width=2,
                             fill=colour if shape == "circle" else None)
            scene.append((f"a {size} {colour} {shape}", column, row))
        facts = {f"{a} {words} {b}" for a, ax, ay in scene for b, bx, by in scene
                 for words, (dx, dy) in relations.items() if (bx - ax) * dx + (by - ay) * dy > 0}
        entries.append({"filename": f"images/{number:05d}.png", "split": "train" if number < train
                        else "val" if number < train + val else "test", "sentences":
                        [{"raw": fact} for fact in rng.sample(sorted(facts), 2)]})
        canvas.save(Path(folder, entries[-1]["filename"]))
    moved = [sentence for entry in entries[:train] for sentence in entry["sentences"]]
    moved = rng.sample(moved, int(noise * len(moved)))
    for sentence, raw in zip(moved, [s["raw"] for s in moved[1:] + moved[:1]]):
        sentence["raw"] = raw
    words = sorted({word for e in entries for s in e["sentences"] for word in s["raw"].split()})
    save_toy_backbones(folder, words)
    target.with_suffix(".part").write_text(json.dumps({"images": entries, "dataset": "toy"}))
    os.replace(target.with_suffix(".part"), target)
    return target


def save_toy_backbones(folder, words):
    """Write configurations of a small ViT and a small BERT, which knows `words` and no others."""
    # transformers draws weights with deviation 0.02, right for width 768; at 128 they hardly learn.
    small = dict(hidden_size=128, num_attention_heads=4, intermediate_size=512,
                 initializer_range=128 ** -0.5, hidden_dropout_prob=0.0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    transformers.ViTConfig(num_hidden_layers=2, image_size=48, patch_size=16,
                           **small).save_pretrained(Path(folder, "image-model"))
    transformers.BertConfig(
        num_hidden_layers=4, vocab_size=len(vocabulary), attention_probs_dropout_prob=0.0,
        **small).save_pretrained(Path(folder, "text-model"))
    Path(folder, "text-model", "vocab.txt").write_text("\n".join(vocabulary))


def fetch(url, folder, terms):
    """Download `url` into folder, unpack it if it is a zip -> path; nothing to do if that is there.
    Safe to repeat: nothing has its final name before it is whole. InputError if it cannot be had.
    """
    name, zipped = url.rpartition("/")[2], url.endswith(".zip")
    target = Path(folder, name.removesuffix(".zip"))
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(url, method="HEAD")
        size = int(urllib.request.urlopen(request, timeout=60).headers["Content-Length"])
        print(f"downloading {url}, {size / 1e6:,.1f} MB; {terms}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            file = Path(aside, name)
            torch.hub.download_url_to_file(url, str(file))
            if file.stat().st_size != size:  # torch.hub takes a cut connection for the file's end
                raise OSError(f"the connection broke after {file.stat().st_size} of {size} bytes")
            if zipped:
                shutil.unpack_archive(file, aside)
            os.replace(Path(aside, target.name), target)
    except Exception as error:  # a server, a disk and a damaged zip fail in many ways
        raise InputError(f"{url} failed ({error}): run again, or download it by hand"
                         f"{' and unpack it' * zipped} to {target}") from None
    return target


def load_splits(data, root, images, needed):
    """--data, --root and --images -> {split: Records} for the needed splits; flickr30k and coco
    are fetched when they are not there; without data, the images of a folder without captions are
    the test split. InputError for captions or images that are missing."""
    if not data:
        found = sorted(str(path) for path in Path(images).rglob("*")
                       if is_image_file(path.name) and path.is_file())
        if not found:
            raise InputError(f"there are no images in {images}")
        return {"test": [Record(path, [], "test") for path in found]}
    folder, files = Path(root, data[0]), data
    if data[0] == "toy":
        files = [make_toy_dataset(folder)]
    elif data[0] in ("flickr30k", "coco"):
        rows, pictures = {
            "flickr30k": ("flickr30k", ["https://huggingface.co/datasets/nlphuji/flickr30k/resolve/"
                                        "main/flickr30k-images.zip"]),
            "coco": ("coco_karpathy", ["http://images.cocodataset.org/zips/train2014.zip",
                                       "http://images.cocodataset.org/zips/val2014.zip"])}[data[0]]
        terms = "photos from Flickr, for research and education, under the terms of their owners"
        unpacked = [images] if images else [fetch(url, folder, terms) for url in pictures]
        files = [folder / f"dataset_{data[0]}.json"]  # Karpathy's, if someone put it there
        if not files[0].exists():
            files = [fetch("https://storage.googleapis.com/sfr-vision-language-research/datasets/"
                           f"{rows}_{split}.json", folder, terms)
                     for split in ("train", "val", "test")]
        elif len(unpacked) == 1:  # it names Flickr's images without their folder
            images = unpacked[0]
    records = [record for file in files for record in load_captions(file, images)]
    splits = {split: [r for r in records if r.split == split] for split in needed}
    empty = [split for split, part in splits.items() if not part]
    if empty:
        raise InputError(f"{files[0]}: the {empty[0]} split has no images")
    missing = [r.image for part in splits.values() for r in part if not os.path.exists(r.image)]
    if missing:
        raise InputError(f"{len(missing)} image files are missing, such as "
                         f"{', '.join(missing[:3])}; --images names the folder they start from")
    return splits


class RandAugment(v2.RandAugment):
    """ALBEF's ten operations: torchvision's without those that replace colours, which captions
    name. Brightness, AutoContrast and Equalize, which shift them, stay, as in ALBEF."""
    _AUGMENTATION_SPACE = {
        name: change for name, change in v2.RandAugment._AUGMENTATION_SPACE.items()
        if name not in ("Color", "Contrast", "Posterize", "Solarize")}


def image_transform(size, pixel_statistics, augment=False):
    """PIL image -> tensor (3,size,size), normalised by (mean, std). Augmented with the operations
    that ALBEF chose, at torchvision's magnitudes."""
    bicubic = InterpolationMode.BICUBIC
    steps = ([v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=bicubic),
              v2.RandomHorizontalFlip(), RandAugment(num_ops=2, magnitude=7)] if augment
             else [v2.Resize((size, size), interpolation=bicubic)])
    return v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize(*pixel_statistics)])


def read_image(path):
    """-> RGB image, turned as its EXIF says. InputError names a file that is no image."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow raises all
        raise InputError(f"{path} cannot be read as an image") from None


class Images(Dataset):
    """Item i: the transformed image of records[i]."""

    def __init__(self, records, transform):
        self.records, self.transform = records, transform

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return self.transform(read_image(self.records[i].image))


class Batches(Dataset):
    """Item s: the batch of training step s, B captions with their images: pixels (B,3,H,W),
    input_ids (B,L), attention_mask (B,L), image_ids (B,). Every `per_epoch` steps visit all
    captions once, but for a last, incomplete batch.

    Order and augmentation follow from seed and step alone, so that a resumed run meets the same
    batches with any number of workers (tokens of a frozen encoder, augmented: with the same).
    """

    def __init__(self, records, images, tokenizer, batch_size, seed):
        self.captions = [(number, text) for number, r in enumerate(records) for text in r.captions]
        self.images, self.tokenizer = images, tokenizer
        self.batch_size, self.seed = batch_size, seed
        self.share = world()  # rank, processes: asked here, since loaders are no part of the group
        self.per_epoch = len(self.captions) // batch_size
        if not self.per_epoch:
            raise InputError(f"--batch-size {batch_size}: there are {len(self.captions)} captions")

    def __getitem__(self, step):
        epoch, place = divmod(step, self.per_epoch)
        # Python salts the hash of strings, not of integers: this seed is the same in all processes.
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
        order = torch.randperm(len(self.captions), generator=generator)
        rank, processes = self.share  # of a batch, each process takes an equal part
        numbers, captions = zip(*[self.captions[i] for i in order[
            place * self.batch_size:][:self.batch_size].chunk(processes)[rank].tolist()])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, rank, step)))
            pixels = torch.stack([self.images[number] for number in numbers])
        return pixels, *tokenize(self.tokenizer, captions), torch.tensor(numbers)


def tokenize(tokenizer, captions):
    """-> input_ids (T,L), attention_mask (T,L), with L at most 30, as in ALBEF."""
    text = tokenizer(list(captions), padding=True, truncation=True, max_length=30,
                     return_tensors="pt")
    return text["input_ids"], text["attention_mask"]


def ignore_interrupt(_):
    """Ctrl-C reaches loader processes too, but only the main process shall answer it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------
# Model


# Text tokens travel packed, without padding, as one list (V,D). Only attention lays them out in
# rows: one of each pair where texts attend to themselves, one of each image where they attend to
# it, so that all texts of an image share its keys and values, the dearest part of a cross layer.

def row_layout(row, rows):
    """Where packed tokens stand in padded rows; row (V,), never falling, is the row of each token.
    -> present (rows,columns): bool, whether a token stands there; slots (V,): the place of each."""
    count = torch.bincount(row, minlength=rows)
    column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    present = torch.arange(int(count.max()), device=row.device) < count[:, None]
    return present, row * present.shape[1] + column


def to_rows(x, present, slots):
    """Packed tokens (V,D) -> padded rows (rows,columns,D), zeros where no token stands."""
    padded = x.new_zeros(present.numel(), x.shape[1]).index_copy(0, slots, x)
    return padded.unflatten(0, present.shape)


class Attention(nn.Module):
    """Multi-head attention of packed text tokens, with BERT's residual and norm after it.

    In cross-attention a row is one image with ALL texts paired with it as one long query: its keys
    and values are projected once, however many texts share it, and never copied per pair. The
    modules are named as in BERT and ALBEF, so that their weights load as they are. Attention
    weights, unlike theirs, are not dropped out (ours).
    """

    def __init__(self, config, source_width):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.self = nn.ModuleDict({
            "query": nn.Linear(width, width), "key": nn.Linear(source_width, width),
            "value": nn.Linear(source_width, width)})
        self.output = BertSelfOutput(config)

    def forward(self, x, layout, source, source_layout=None):
        """x (V,D): query tokens, in rows of `layout`; source: what keys and values are projected
        from, image tokens (rows,N,D), or packed text tokens (V,D) in rows of `source_layout`
        -> (V,D). A layout is (present, slots) of `row_layout`."""
        query, mask = to_rows(self.self.query(x), *layout), None
        key, value = self.self.key(source), self.self.value(source)
        if source_layout:
            key, value = to_rows(key, *source_layout), to_rows(value, *source_layout)
            mask = source_layout[0][:, None, None]
        query, key, value = (t.unflatten(2, (self.heads, -1)).transpose(1, 2)
                             for t in (query, key, value))  # (rows,heads,columns,D/heads)
        if x.device.type == "cpu":  # where this kernel's backward is slower in bf16 than in fp32
            query, key, value = query.float(), key.float(), value.float()
        with torch.autocast("cpu", enabled=False):  # which would cast them back
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, layout[1])
        return self.output(attended, x)


class CrossLayer(nn.Module):
    """BERT layer with cross-attention between self-attention and feed-forward (ALBEF)."""

    def __init__(self, config, image_width):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, image_width)
        self.intermediate, self.output = BertIntermediate(config), BertOutput(config)

    def forward(self, x, x_layout, image_layout, text, text_layout, image_tokens):
        """x: packed query tokens, all of `text` (V,D), or [CLS] of each pair (P,D) in the last
        layer; x_layout lays them out in a row per pair, image_layout in a row per image.
        text, text_layout: what self-attention reads; image_tokens (I,N,D) -> like x."""
        x = self.attention(x, x_layout, text, text_layout)
        x = self.crossattention(x, image_layout, image_tokens)
        return self.output(self.intermediate(x), x)


def full_precision(x):
    """Context without autocast: rounded to bf16, many scores would tie."""
    return torch.autocast(x.device.type, enabled=False)


class LoopITR(nn.Module):
    """The shared network: image encoder, text encoder, their projections, and the cross encoder.

    image_encoder: transformers vision model, [CLS] first; text_encoder: BertModel, whose layers
    from `text_layers` on are moved to the cross encoder (ALBEF's split of one BERT).
    """

    def __init__(self, image_encoder, text_encoder, text_layers, embedding=256, temperature=0.07):
        super().__init__()
        bert, image_width = text_encoder.config, image_encoder.config.hidden_size
        upper = text_encoder.encoder.layer[text_layers:]
        text_encoder.encoder.layer = text_encoder.encoder.layer[:text_layers]
        image_encoder.pooler = text_encoder.pooler = None  # [CLS] is projected as it is
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_projection = nn.Linear(image_width, embedding)
        self.text_projection = nn.Linear(bert.hidden_size, embedding)
        self.cross_encoder = nn.ModuleList(CrossLayer(bert, image_width) for _ in upper)
        for layer, source in zip(self.cross_encoder, upper):
            # Not strict: no plain BERT has crossattention, which starts fresh.
            layer.load_state_dict(source.state_dict(), strict=False)
        self.match_head = nn.Linear(bert.hidden_size, 1)
        self.pixel_statistics = None  # (mean, std) of RGB, for image_transform
        # From ALBEF's 0.07 on; learned as a logarithm, so that it stays positive without clamping.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self):
        """Scalar tensor; dual logits are embedding @ embedding.T / temperature."""
        return self.log_temperature.exp()

    def forward(self, batch, **options):
        """`loop_losses`, under the name that DistributedDataParallel calls."""
        return loop_losses(self, batch, **options)

    def encode_image(self, pixels):
        """pixels (B,3,H,W), or a frozen encoder's tokens -> tokens (B,N,D), unit embedding (B,E).
        Position embeddings are interpolated to H and W where the model can (ViT, DeiT, and DINOv2,
        which does so without being asked)."""
        tokens = pixels.float()
        if pixels.ndim == 4:  # not those of a frozen encoder, which are stored in half precision
            able = "interpolate_pos_encoding" in inspect.signature(
                self.image_encoder.forward).parameters
            options = {"interpolate_pos_encoding": True} if able else {}
            tokens = self.image_encoder(pixels, **options).last_hidden_state
        with full_precision(tokens):
            return tokens, F.normalize(self.image_projection(tokens[:, 0].float()), dim=-1)

    def encode_text(self, input_ids, attention_mask):
        """input_ids (B,L), attention_mask (B,L) -> tokens (B,L,D), unit embedding (B,E)."""
        tokens = self.text_encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        with full_precision(tokens):
            return tokens, F.normalize(self.text_projection(tokens[:, 0].float()), dim=-1)

    def dual_logits(self, image_embedding, text_embedding):
        """(I,E), (T,E) -> (I,T)"""
        with full_precision(image_embedding):
            return image_embedding @ text_embedding.T / self.temperature

    def match(self, image_tokens, text_tokens, attention_mask, image_index, text_index):
        """Cross encoder: match logits (P,), the log-odds that each pair belongs together.

        image_tokens (I,N,D), text_tokens (T,L,D), attention_mask (T,L); pair p is image
        image_index[p] with text text_index[p]. Pairs may come in any order, at least one; texts
        are padded on the right and start with [CLS].
        """
        order = image_index.argsort(stable=True)  # texts of one image side by side
        image_index, text_index, pairs = image_index[order], text_index[order], len(order)
        pair, position = attention_mask[text_index].nonzero().unbind(1)  # of each real token
        token = text_index[pair] * attention_mask.shape[1] + position
        x = text_tokens.flatten(0, 1).index_select(0, token).float()
        image_tokens = image_tokens.float()
        text_layout = row_layout(pair, pairs)
        image_layout = row_layout(image_index[pair], len(image_tokens))
        for layer in self.cross_encoder[:-1]:
            x = layer(x, text_layout, image_layout, x, text_layout, image_tokens)
        # Of the last layer only [CLS] is read, so only [CLS] is computed: one token of each pair.
        rows = torch.arange(pairs, device=x.device)
        x = self.cross_encoder[-1](x[position == 0], row_layout(rows, pairs), row_layout(
            image_index, len(image_tokens)), x, text_layout, image_tokens)
        with full_precision(x):
            return self.match_head(x.float()).squeeze(1)[order.argsort()]


def load_backbone(name, from_scratch, **options):
    """-> transformers model of a hub name or folder; `from_scratch` reads only its configuration.
    Tells how much came from the checkpoint, since weights that silently stayed random are the best
    known cause of results that nobody can repeat. InputError when nothing came."""
    config = transformers.AutoConfig.from_pretrained(name, **options)
    if from_scratch:
        return transformers.AutoModel.from_config(config)
    model, report = transformers.AutoModel.from_pretrained(name, config=config,
                                                           output_loading_info=True)
    tensors = set(model.state_dict())
    fresh = tensors.intersection(report["missing_keys"])
    print(f"{name}: {len(tensors - fresh)} of {len(tensors)} tensors from its checkpoint; fresh: "
          f"{', '.join(sorted(fresh)[:4]) or 'none'}", file=sys.stderr)
    if fresh == tensors:
        raise InputError(f"{name} has no weights for {type(model).__name__}")
    return model


def build_model(image_model, text_model, text_layers, embedding=256, from_scratch=False,
                init=None):
    """-> LoopITR, tokenizer. The models are names or folders, as transformers takes them;
    `from_scratch` reads only their configurations and draws random weights, which `init`, the path
    of a checkpoint of ours or ALBEF's, replaces. embedding: E, 256 as in ALBEF. InputError when a
    model cannot be loaded, is of another kind, or has too few layers for text_layers."""
    image_config, pixel_statistics = {}, None
    if init is not None:
        from_scratch = True
        content = load_checkpoint(init)
        if "format" in content:
            image_config, pixel_statistics = content["image_config"], content["pixel_statistics"]
        else:  # ALBEF's: its grid of positions, its norms, and CLIP's pixel statistics
            positions = content["model"]["visual_encoder.pos_embed"].shape[1]
            image_config = dict(image_size=16 * math.isqrt(positions - 1), layer_norm_eps=1e-6)
            pixel_statistics = ((0.48145466, 0.4578275, 0.40821073),
                                (0.26862954, 0.26130258, 0.27577711))
    try:
        image_encoder = load_backbone(image_model, from_scratch, **image_config)
        text_encoder = load_backbone(text_model, from_scratch)
        tokenizer = transformers.AutoTokenizer.from_pretrained(text_model)
        model = LoopITR(image_encoder, text_encoder, text_layers, embedding).float()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"cannot load {image_model} and {text_model}, or they are no ViT and no "
                         f"BERT: {str(error).splitlines()[0]}") from None
    layers = text_encoder.config.num_hidden_layers
    if not 0 < text_layers < layers:
        raise InputError(f"--text-layers {text_layers}: {text_model} has {layers}, of which text "
                         "and cross encoder need at least one each")
    if pixel_statistics is None:
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(image_model)
            pixel_statistics = processor.image_mean, processor.image_std
        except (OSError, ValueError):  # no preprocessor_config.json in the folder: ImageNet's
            pixel_statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model.pixel_statistics = pixel_statistics
    if init is not None:
        load_checkpoint(init, model, content)
    return model, tokenizer


def load_albef(model, state):
    """Fill model from ALBEF's released weights: checkpoint["model"] of a pre-trained or fine-tuned
    .pth, whose ViT may have been trained at another size, and BERT with cross-attention above."""
    text_layers, vit, ours = len(model.text_encoder.encoder.layer), {}, {}
    names = {  # there, as a regular expression -> here; a ViT's as from_pretrained understands it
        r"^text_encoder\.bert\.": "text_encoder.",  # the pre-trained file's
        **{rf"^text_encoder\.encoder\.layer\.{text_layers + i}\.": f"cross_encoder.{i}."
           for i in range(len(model.cross_encoder))},
        "^vision_proj": "image_projection", "^text_proj": "text_projection",
        "^itm_head": "match_head", "^temp$": "log_temperature", r"^visual_encoder\.": "",
        "^cls_token": "embeddings.cls_token", "^pos_embed": "embeddings.position_embeddings",
        r"^patch_embed\.proj": "embeddings.patch_embeddings.projection", "^norm": "layernorm",
        "^blocks": "encoder.layer", "norm1": "layernorm_before", "norm2": "layernorm_after",
        r"attn\.qkv": "attention.attention.qkv", r"attn\.proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense", r"mlp\.fc2": "output.dense"}
    for name, tensor in state.items():
        if re.search(r"_m\.|queue|\.cls\.|position_ids", name):
            continue  # momentum copies, their queues, the language model's head
        tensors = vit if name.startswith("visual_encoder.") else ours
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        if "qkv" in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3)):
                tensors[name.replace("qkv", part)] = piece
        else:
            tensors[name] = tensor
    for name in ("match_head.weight", "match_head.bias"):
        ours[name] = ours[name][1:] - ours[name][:1]  # class 1 is the match
    ours["log_temperature"] = ours["log_temperature"].log()
    # Through from_pretrained, which knows the names inside the ViT of this version of transformers.
    model.image_encoder, report = type(model.image_encoder).from_pretrained(
        None, config=model.image_encoder.config, state_dict=vit, output_loading_info=True)
    if any("pooler" not in name for name in report["missing_keys"]):
        raise ValueError("its image encoder is a ViT-B/16")
    model.image_encoder.float().pooler = None
    ours |= {f"image_encoder.{n}": t for n, t in model.image_encoder.state_dict().items()}
    model.load_state_dict(ours)
    print(f"ALBEF's checkpoint: all {len(ours)} tensors", file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# Hard negatives


def sample_hard_negatives(similarity, is_positive, num_negatives, strategy="softmax"):
    """Per query, num_negatives distinct candidates that are not positives: indices (Q,m).

    similarity (Q,C): dual logits; is_positive (Q,C): bool. strategy: "softmax" draws without
    replacement from softmax(similarity) over the negatives (ALBEF), "topk" takes the hardest,
    "random" any; KeyError for others. When a query has fewer negatives than asked for (one image in
    the batch: none), all queries get only as many, so that none ever gets a positive.
    """
    with torch.no_grad():
        # The largest of logits plus Gumbel noise are an exact draw without replacement from their
        # softmax, and cannot underflow at low temperatures as probabilities would.
        noise = -torch.empty_like(similarity, dtype=torch.float32).exponential_().log()
        scores = {"softmax": similarity + noise, "topk": similarity, "random": noise}[strategy]
        # Before the draw: zeroing positives after a softmax can leave a row without any weight,
        # at which multinomial fails, and an epsilon added to the logits does not change a softmax.
        scores = scores.masked_fill(is_positive, -torch.inf)
        fewest = int((~is_positive).sum(1).min())
        return scores.topk(min(num_negatives, fewest), dim=1).indices


# ------------------------------------------------------------------------------------------------
# Losses


def contrastive_loss(logits, is_positive):
    """Softmax cross-entropy, both directions, targets spread evenly over a query's positives.

    logits (B,T): dual logits; is_positive (B,T): bool -> scalar. A query without positives counts
    as 0. Source: ITC of ALBEF, without momentum targets.
    """
    targets = is_positive.float()
    return (F.cross_entropy(logits, F.normalize(targets, p=1, dim=1))
            + F.cross_entropy(logits.T, F.normalize(targets.T, p=1, dim=1))) / 2


def matching_loss(logits, labels):
    """Binary cross-entropy of match logits (P,) against labels (P,) -> scalar, mean over pairs.

    Source: ITM of ALBEF, whose cross-entropy over two logits is the same as ours over their
    difference.
    """
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def distillation_loss(student, teacher, objective="kl", temperature=1.0):
    """Teach the dual logits what the cross encoder thinks of the same candidates.

    student, teacher (Q,1+m): logits, column 0 the positive -> scalar, mean over queries. The
    teacher's are divided by `temperature` and detached: the student must not teach its teacher.
    objective: kl, mse (what training takes, at temperature 0.5: README, Results), margin, rank (0
    with one negative), label; ValueError for others. Ours: the paper's formula is not known to us.
    """
    teacher = teacher.detach() / temperature
    if student.shape[1] == 1:  # no negatives, nothing to compare
        return student.sum() * 0
    if objective == "kl":  # KL(softmax(teacher) || softmax(student)), 1503.02531
        return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")
    if objective == "mse":  # rows centred, since adding a constant to logits means nothing
        return F.mse_loss(student - student.mean(1, keepdim=True),
                          teacher - teacher.mean(1, keepdim=True))
    if objective == "margin":  # Margin-MSE, 2010.02666: how far each negative lies behind
        return F.mse_loss(student[:, :1] - student[:, 1:], teacher[:, :1] - teacher[:, 1:])
    if objective == "rank":  # only the order of the negatives, in the spirit of CPRD, 2407.07479
        ranked = student[:, 1:].gather(1, teacher[:, 1:].argsort(1, descending=True))
        # -log of the product over j of exp(d_j) / sum_{k >= j} exp(d_k)
        return (ranked.flip(1).logcumsumexp(1).flip(1) - ranked).sum(1).mean()
    if objective == "label":  # control without a teacher: what hard negatives alone bring (ours)
        return -student.log_softmax(1)[:, 0].mean()
    raise ValueError(f"unknown distillation objective {objective!r}")


# ------------------------------------------------------------------------------------------------
# Training


def loop_losses(model, batch, negatives=1, sampling="softmax", objective="mse",
                distill_temperature=0.5, cross=True):
    """One turn of the loop -> dict of scalars: contrastive, matching and distillation losses, and
    how often comes first: a right text in the batch (dual_recall), the true pair of its 1 + m
    candidates by dual logits (student_recall) and by match logits (cross_recall).
    batch: this process's pixels (B,3,H,W), or tokens (B,N,D) of a frozen image encoder, input_ids
    (B,L), attention_mask (B,L), image_ids (B,). negatives: m. sampling as `sample_hard_negatives`,
    objective (or "none") and distill_temperature as `distillation_loss` takes them. cross: False
    stops after the dual encoder."""
    pixels, input_ids, attention_mask, image_ids = batch
    image_tokens, image_embedding = model.encode_image(pixels)
    text_tokens, text_embedding = model.encode_text(input_ids, attention_mask)
    # `gather` joins the processes' parts, with gradient; in a single process it changes nothing.
    dual_logits = model.dual_logits(gather(image_embedding), gather(text_embedding))
    all_ids = gather(image_ids)
    # The image decides, not the row: another caption of the same image is a positive too.
    is_positive = all_ids[:, None] == all_ids[None, :]
    top1 = dual_logits.argmax(1, keepdim=True)
    losses = {"contrastive": contrastive_loss(dual_logits, is_positive),
              "dual_recall": is_positive.gather(1, top1).float().mean()}
    if not cross:
        return losses

    # The rest stays within a process, since its image tokens do.
    local = slice(world()[0] * len(image_ids), (world()[0] + 1) * len(image_ids))
    dual_logits, is_positive = dual_logits[local, local], is_positive[local, local]
    # Dual -> cross: the dual logits choose what the cross encoder has to tell apart.
    hard_texts = sample_hard_negatives(dual_logits, is_positive, negatives, sampling)
    hard_images = sample_hard_negatives(dual_logits.T, is_positive.T, negatives, sampling)
    m = hard_texts.shape[1]  # and of hard_images, since is_positive is symmetric
    own = torch.arange(len(image_ids), device=image_ids.device)
    # B true pairs, scored once for both directions; m hard texts an image; m hard images a text.
    pairs = (torch.cat([own, own.repeat_interleave(m), hard_images.flatten()]),
             torch.cat([own, hard_texts.flatten(), own.repeat_interleave(m)]))
    match_logits = model.match(image_tokens, text_tokens, attention_mask, *pairs)
    losses["matching"] = matching_loss(match_logits, is_positive[pairs])

    # Cross -> dual: both encoders' logits (2B,1+m) of the same candidates, the true pair first.
    negative = torch.arange(len(own), len(match_logits), device=own.device)  # where `pairs` has it
    candidates = torch.cat([own.repeat(2)[:, None], negative.view(2 * len(own), m)], dim=1)
    # Only the contrastive loss teaches the temperature, whose gradient is taken out here: to reach
    # the teacher's wider logits it would sink, draw harder negatives, and so widen them further.
    fixed = dual_logits * (model.temperature / model.temperature.detach())
    student, teacher = fixed[pairs][candidates], match_logits[candidates]
    for name, logits in (("student_recall", student), ("cross_recall", teacher)):
        losses[name] = (logits[:, :1] > logits[:, 1:]).all(1).float().mean()
    if objective != "none":
        losses["distillation"] = distillation_loss(student, teacher, objective, distill_temperature)
    return losses


def make_optimizer(model, args, total_steps):
    """AdamW, decay 0.02 but for biases and norms, cosine to lr / 10 (ALBEF), linear warm-up (ours).
    Parts that no backbone brings learn at --fresh-lr."""
    groups = {}
    for name, parameter in model.named_parameters():
        fresh = re.search("crossattention|_projection|match_head|temperature", name)
        key = (args.fresh_lr if fresh else args.lr, 0.02 if parameter.ndim > 1 else 0)  # lr, decay
        if parameter.requires_grad:
            groups.setdefault(key, []).append(parameter)
    optimizer = torch.optim.AdamW([dict(params=group, lr=lr, weight_decay=decay)
                                   for (lr, decay), group in groups.items()], fused=True)

    def factor(step):
        cosine = 0.55 + 0.45 * math.cos(math.pi * min(step / total_steps, 1))  # 1 to 0.1
        return min((step + 1) / args.warmup_steps, cosine)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def training_step(model, batch, optimizer, scheduler, args, progress):
    """One optimiser step, `progress` (0 to 1) through training -> what loop_losses returns, and
    the weighted sum as "loss", of the last of --accumulate parts of the batch."""
    # On random negatives a fresh cross-attention gets going early, on hard ones much later.
    sampling = args.sampling if progress >= args.hard_warmup else "random"
    # An untrained teacher teaches noise: begun at once, distillation gains the dual encoder no more
    # and costs the cross encoder some recall (README, Results).
    loss_weights = {"contrastive": args.contrastive_weight, "matching": args.matching_weight,
                    "distillation": args.distill_weight * (progress >= args.distill_warmup)}
    optimizer.zero_grad()
    for part in zip(*(tensor.to(args.device).chunk(args.accumulate) for tensor in batch)):
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16):
            losses = model(part, negatives=args.negatives, sampling=sampling,
                           objective=args.distill, distill_temperature=args.distill_temperature,
                           cross=args.matching_weight > 0)
        losses["loss"] = sum(weight * losses[name] for name, weight in loss_weights.items()
                             if name in losses)
        (losses["loss"] / args.accumulate).backward()
    # Ours: at the high rates that a fresh cross-attention needs, training can collapse unclipped.
    if not nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0).isfinite():
        raise InputError(f"loss {losses['loss'].item()} or its gradient is not finite; the "
                         "weights before it are kept: try lower learning rates and --init "
                         f"{args.output}/last.pt")
    optimizer.step()
    scheduler.step()
    return losses


def train_epoch(model, bar, optimizer, scheduler, state, args, total_steps):
    """Train on the batches of a tqdm bar, counting state["step"] and logging as asked. Ctrl-C waits
    for the step to end, so that never half a step is saved."""
    model.train()
    start, since, interrupted = time.perf_counter(), state["step"], []
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        for batch in bar:
            # Dropout and negatives follow from seed and step too, as a resumed run needs it; the 1
            # tells their seed from that of the batch's augmentation.
            torch.manual_seed(hash((args.seed, world()[0], state["step"], 1)))
            losses = training_step(model, batch, optimizer, scheduler, args,
                                   progress=state["step"] / total_steps)
            state["step"] += 1
            if state["step"] % args.log_every == 0:
                line = {name: round(value.item(), 5) for name, value in losses.items()}
                bar.set_postfix(line)
                rate = (state["step"] - since) * args.batch_size / (time.perf_counter() - start)
                write_line(args, step=state["step"], epoch=state["epoch"], **line,
                           temperature=round(getattr(model, "module", model).temperature.item(), 5),
                           lr=min(scheduler.get_last_lr()), pairs_per_second=round(rate, 1))
                start, since = time.perf_counter(), state["step"]
            if interrupted:
                raise KeyboardInterrupt("and saved: --resume continues")
    finally:
        signal.signal(signal.SIGINT, previous)


def frozen_tokens(model, images, args, epoch):
    """Tokens (I,N,D) of a frozen image encoder, augmented anew in each epoch, by its number."""
    with (torch.random.fork_rng(devices=[]),
          torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16)):
        torch.manual_seed(hash((args.seed, epoch)))
        return encode_images(model, images, args.workers)[0]


def prepare(model, args):
    """Freeze, and recompute activations, as asked -> the module to call in training: model, or,
    with several processes, its wrapper that averages their gradients."""
    if args.freeze_image:
        model.image_encoder.requires_grad_(False)
    if args.grad_checkpointing:
        for encoder in (model.image_encoder, model.text_encoder):
            enable = getattr(encoder, "activation_checkpointing_enable", None)
            # The other name is that of transformers 4, and goes with 6.
            (enable or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    if world()[1] == 1:
        return model
    # Parameters without a gradient: DINOv2's mask token, the cross encoder at --matching-weight 0.
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def train(model, tokenizer, splits, args):
    """Train, keeping last.pt (to resume) and best.pt (best re-ranked rsum on val) in --output.

    splits: {"train", "val"} -> Records. InputError when a gradient is not finite, KeyboardInterrupt
    on Ctrl-C; both after saving.
    """
    output = Path(args.output)
    images = Images(splits["train"], image_transform(args.image_size, model.pixel_statistics,
                                                     args.augment))
    parallel = prepare(model, args)
    batches = Batches(splits["train"], images, tokenizer, args.batch_size, args.seed)
    total_steps = batches.per_epoch * args.epochs
    optimizer, scheduler = make_optimizer(model, args, total_steps)
    state = {"step": 0, "epoch": 0, "best": -1.0}
    if args.resume:
        saved = load_checkpoint(output / "last.pt")
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        state = saved["state"]
    else:
        (output / "log.jsonl").unlink(missing_ok=True)
    for epoch in range(state["epoch"], args.epochs):
        state["epoch"], name = epoch, f"epoch {epoch + 1}/{args.epochs}"
        if args.freeze_image and (args.augment or batches.images is images):
            batches.images = frozen_tokens(model, images, args, epoch)
        loader = DataLoader(batches, batch_size=None, num_workers=args.workers,
                            sampler=range(state["step"], batches.per_epoch * (epoch + 1)),
                            worker_init_fn=ignore_interrupt,
                            pin_memory=args.device.startswith("cuda"))
        try:
            train_epoch(parallel, progress_bar(loader, name), optimizer, scheduler, state, args,
                        total_steps)
        finally:  # whatever stopped it, and an interrupted evaluation, shall cost no training
            save_checkpoint(output / "last.pt", model, args, state, optimizer=
                            optimizer.state_dict(), scheduler=scheduler.state_dict())
        result = evaluate(model, tokenizer, splits["val"], args)[0]
        write_line(args, split="val", step=state["step"], epoch=epoch, **result)
        dual, cross = result["dual"]["rsum"], result["cross"]["rsum"]
        if world()[0] == 0:
            tqdm.write(f"{name}: rsum on val {dual:.1f} dual, {cross:.1f} re-ranked")
        score = cross if args.matching_weight else dual  # untrained, the cross encoder has no say
        if score > state["best"]:
            state["best"] = score
            save_checkpoint(output / "best.pt", model, args, state)
    if world()[1] > 1:  # best.pt is written before the others read it
        torch.distributed.barrier()


def save_checkpoint(path, model, args, state, **rest):
    """Write what resuming and evaluating need; of several processes only the first writes."""
    config = model.image_encoder.config
    save(path, {"format": "loopitr", "model": model.state_dict(), "args": vars(args),
                "state": dict(state), "pixel_statistics": model.pixel_statistics, "image_config":
                dict(image_size=config.image_size, layer_norm_eps=config.layer_norm_eps), **rest})


def save(path, content):
    """torch.save in the first process, to a temporary file that is renamed: never half a file."""
    if world()[0] == 0:
        torch.save(content, f"{path}.part")
        os.replace(f"{path}.part", path)


def load_checkpoint(path, model=None, content=None):
    """-> what save_checkpoint wrote, on the CPU, and the model filled with it, or with an ALBEF
    .pth. Only tensors and plain values are unpickled. InputError when the file is missing, neither
    of the two, or does not fit. ALBEF's public file is fetched when it is not there. content: what
    an earlier call returned, so that nothing is read twice."""
    if Path(path).name == "ALBEF_4M.pth":
        fetch("https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/ALBEF_4M.pth",
              Path(path).parent, "weights under the BSD 3-clause licence")
    try:
        content = content or torch.load(path, map_location="cpu", weights_only=True)
        albef = "visual_encoder.pos_embed" in content["model"]
        if not albef and content["format"] != "loopitr":
            raise ValueError("written by another program")
        if model is not None:
            load_albef(model, content["model"]) if albef else model.load_state_dict(
                content["model"])
    except FileNotFoundError:
        raise InputError(f"there is no checkpoint {path}: train first") from None
    except Exception as error:  # foreign files make torch.load raise many kinds
        raise InputError(f"{path} is not a checkpoint of loopitr.py or does not fit this model: "
                         f"{' '.join(str(error).split())[:200]}") from None
    return content


def write_line(args, **values):
    """Append one JSON object to the log."""
    if world()[0] == 0:
        with open(Path(args.output, "log.jsonl"), "a") as log:
            log.write(json.dumps(values) + "\n")


# ------------------------------------------------------------------------------------------------
# Evaluation


def recall_at_k(scores, image_of_text, ks=(1, 5, 10)):
    """Recall in percent: TR@k, image to text, a hit if any caption of the image is among the top
    k; IR@k, text to image; rsum, their sum.

    scores (I,T), image_of_text (T,): the image each text belongs to -> dict. A wrong candidate
    that ties with the best right one, or is not a number, counts as ahead of it, so that a
    constant scorer gets no credit. Images without captions ask no question.
    """
    image_of_text = image_of_text.to(scores.device)
    right = image_of_text[None, :] == torch.arange(len(scores), device=scores.device)[:, None]

    def ranks(scores, right):
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        return (~(scores < best) & ~right).sum(1)[right.any(1)]

    result = {f"{name}@{k}": 100 * (rank < k).float().mean().item()
              for name, rank in (("TR", ranks(scores, right)), ("IR", ranks(scores.T, right.T)))
              for k in ks}
    return {**result, "rsum": sum(result.values())}


@torch.no_grad()
def encode_images(model, images, workers=0, batch_size=64, keep_tokens=True):
    """-> tokens (I,N,D) on the CPU in half precision, or None, embeddings (I,E). COCO's 5,000 test
    images at 384 px take 5000 * 577 * 768 * 2 bytes = 4.1 GiB."""
    model.eval()
    tokens, embeddings = None, []
    loader = DataLoader(images, batch_size, num_workers=workers, worker_init_fn=ignore_interrupt)
    for number, pixels in enumerate(progress_bar(loader, "images", leave=False)):
        part, embedding = model.encode_image(pixels.to(model.log_temperature.device))
        if tokens is None and keep_tokens:  # filled in place: torch.cat would hold all twice
            tokens = torch.empty(len(images), *part.shape[1:], dtype=torch.half)
        if keep_tokens:
            tokens[number * batch_size:][:len(part)] = part
        embeddings.append(embedding)
    return tokens, torch.cat(embeddings)


@torch.no_grad()
def encode_texts(model, tokenizer, captions, batch_size=256):
    """-> tokens (T,L,D) in half precision, attention mask (T,L), embeddings (T,E)."""
    model.eval()
    text = [part.to(model.log_temperature.device) for part in tokenize(tokenizer, captions)]
    parts = []
    for part in zip(*(part.split(batch_size) for part in text)):
        tokens, embedding = model.encode_text(*part)
        parts.append((tokens.half(), embedding))
    with full_precision(text[1]):  # autocast to bf16 refuses to join halves
        tokens, embeddings = map(torch.cat, zip(*parts))
    return tokens, text[1], embeddings


@torch.no_grad()
def rerank(model, image_tokens, text_tokens, attention_mask, dual_scores, k, dual_weight=0.0,
           first=0, pairs_per_pass=2048):
    """Cross encoder over the union of both directions' shortlists, each pair scored once.

    image_tokens (I,N,D), text_tokens (T,L,D), attention_mask (T,L), dual_scores (I,T); the top k
    texts of each image and the top k images of each text are taken (all, if k is larger). Of
    several processes each scores the images it holds, image_tokens[0] being image `first`.
    pairs_per_pass bounds what is on the device at a time. Re-ranking a shortlist is ALBEF's, the
    union, scored once, and dual_weight are ours.
    -> scores (I,T) in double precision on the CPU: match logits plus dual_weight * dual logits on
    the shortlists, everything else below them in dual order.
    """
    model.eval()
    shortlisted = torch.zeros_like(dual_scores, dtype=torch.bool)
    for dim in (0, 1):
        top = dual_scores.topk(min(k, dual_scores.shape[dim]), dim=dim).indices
        shortlisted.scatter_(dim, top, True)
    pairs, logits = shortlisted[first:first + len(image_tokens)].nonzero(), []  # sorted by image
    for chunk in progress_bar(pairs.split(pairs_per_pass), "re-ranking", leave=False):
        image_index, text_index = chunk.unbind(1)
        low, high = image_index[0].item(), image_index[-1].item()
        tokens = image_tokens[low:high + 1].to(text_tokens.device)
        logits.append(model.match(tokens, text_tokens, attention_mask, image_index - low,
                                  text_index))
    scores, shortlisted = dual_scores.cpu().double(), shortlisted.cpu()
    logits = collect(torch.cat(logits)).cpu().double() + dual_weight * scores[shortlisted]
    scores = scores + (logits.min() - scores.max() - 1)  # not in place: the caller keeps its own
    scores[shortlisted] = logits
    return scores


def shortlist_length(args, candidates):
    """--rerank, at most `candidates`, their number."""
    return candidates if args.rerank == "all" else min(int(args.rerank), candidates)


def evaluate(model, tokenizer, records, args):
    """Recall@K of the dual encoder, and of the cross encoder re-ranking the dual's top --rerank.

    Of args: rerank, dual_weight, image_size, workers, bf16.
    -> {"images", "texts", "k", "dual": {.., "seconds"}, "cross": {.., "seconds"}}, dual scores
    (I,T), cross scores (I,T). The cross encoder's seconds include the dual encoder's. Processes
    share the images.
    """
    captions = [text for record in records for text in record.captions]
    image_of_text = torch.tensor([i for i, r in enumerate(records) for _ in r.captions])
    k = shortlist_length(args, max(len(records), len(captions)))
    rank, size = world()
    first, last = (len(records) * r // size for r in (rank, rank + 1))
    images = Images(records[first:last], image_transform(args.image_size, model.pixel_statistics))
    start = time.perf_counter()
    with torch.autocast(model.log_temperature.device.type, torch.bfloat16, enabled=args.bf16):
        image_tokens, vectors = encode_images(model, images, args.workers)
        text_tokens, mask, texts = encode_texts(model, tokenizer, captions)
        dual_scores = model.dual_logits(collect(vectors), texts)
        dual = recall_at_k(dual_scores, image_of_text)
        dual["seconds"] = time.perf_counter() - start
        cross_scores = rerank(model, image_tokens, text_tokens, mask, dual_scores, k,
                              args.dual_weight, first)
    cross = recall_at_k(cross_scores, image_of_text)
    cross["seconds"] = time.perf_counter() - start
    result = dict(images=len(records), texts=len(captions), k=k, dual=dual, cross=cross)
    return result, dual_scores.cpu(), cross_scores


def draw_rows(path, rows, columns=5, side=96):
    """Picture with a row per query: its top images by dual (left) and by cross encoder (right).
    rows: [(query, [image paths], [image paths], path of the right image or None: framed green)]."""
    font, step = ImageFont.load_default(16), side + 8
    canvas = Image.new("RGB", (2 * columns * step + 40, 32 + len(rows) * (step + 30)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), "dual encoder's top images", "black", font)
    draw.text((columns * step + 32, 6), "after re-ranking by the cross encoder", "black", font)
    for row, (query, *halves, right) in enumerate(rows):
        y = 32 + row * (step + 30)
        draw.text((8, y), query, "black", font)
        for half, paths in enumerate(halves):
            for column, image in enumerate(paths[:columns]):
                x = 8 + half * (columns * step + 24) + column * step
                if image == right:
                    draw.rectangle((x - 4, y + 20, x + side + 3, y + 27 + side), fill="limegreen")
                canvas.paste(read_image(image).resize((side, side)), (x, y + 24))
    canvas.save(path)


def draw_retrieval(path, records, dual_scores, cross_scores, rows=6):
    """Picture of what re-ranking changed: some captions whose first image it replaced."""
    captions = [(record.image, text) for record in records for text in record.captions]
    tops = [scores.topk(min(5, len(records)), dim=0).indices.T
            for scores in (dual_scores, cross_scores)]
    changed = (tops[0][:, 0] != tops[1][:, 0]).nonzero().squeeze(1).tolist()
    shown = changed[::max(1, len(changed) // rows)][:rows] or list(range(min(rows, len(captions))))
    draw_rows(path, [(captions[t][1], *([records[i].image for i in top[t].tolist()]
                                        for top in tops), captions[t][0]) for t in shown])


def report(result, dual_scores, cross_scores, records, args):
    """Log and print what `evaluate` found, both encoders side by side, and draw what changed."""
    write_line(args, split="test", **result)
    if world()[0] > 0:
        return
    print(f"{result['images']} images, {result['texts']} texts; the cross encoder re-ranks the "
          f"dual encoder's top {result['k']}")
    print(" " * 13 + "".join(f"{name:>8}" for name in result["dual"]))
    for name in ("dual", "cross"):
        print(f"{name + ' encoder':13}" + "".join(f"{v:8.1f}" for v in result[name].values()))
    draw_retrieval(f"{args.output}/retrieval.png", records, dual_scores, cross_scores)
    print(f"checkpoint {args.checkpoint}, picture {args.output}/retrieval.png")


# ------------------------------------------------------------------------------------------------
# Search


def gallery_vectors(model, images, args):
    """Unit embeddings (I,E) of Images, computed once and kept beside the checkpoint, with their
    file names, until a file or the checkpoint changes."""
    store, names = Path(f"{args.checkpoint}.gallery"), [r.image for r in images.records]
    stamps = [args.image_size, *([path, os.stat(path).st_size, os.stat(path).st_mtime_ns]
                                 for path in (args.checkpoint, *names))]
    gallery = torch.load(store, weights_only=True) if store.exists() else {}
    if gallery.get("stamps") != stamps:
        vectors = encode_images(model, images, args.workers, keep_tokens=False)[1]
        gallery = dict(stamps=stamps, names=names, vectors=vectors.cpu())
        save(store, gallery)
    return gallery["vectors"]


@torch.no_grad()
def search(model, tokenizer, records, query, args):
    """Search the images of `records` by words, or by a photo if `query` is a file.

    -> [(record, dual logit, match logit)], the dual encoder's top --rerank, re-ranked. The cross
    encoder matches words with each image of the shortlist; a photo with their captions, of which
    the best counts (without captions all match logits are 0 and the dual order stays).
    """
    transform = image_transform(args.image_size, model.pixel_statistics)
    vectors = gallery_vectors(model, Images(records, transform), args).to(args.device)
    photo = os.path.isfile(query)
    if is_image_file(query) and not photo:
        raise InputError(f"there is no photo {query}")
    if photo:
        tokens, vector = encode_images(model, Images([Record(query, [], "")], transform))
    else:
        vector = encode_texts(model, tokenizer, [query])[2]
    dual, top = model.dual_logits(vectors, vector).squeeze(1).cpu().topk(
        shortlist_length(args, len(records)))
    shortlist = [records[i] for i in top.tolist()]
    if not photo:
        tokens = encode_images(model, Images(shortlist, transform), args.workers)[0]
    texts = [text for record in shortlist for text in record.captions] if photo else [query]
    match = torch.zeros(len(shortlist))
    if texts:
        text_tokens, mask, _ = encode_texts(model, tokenizer, texts)
        every_pair = torch.zeros(len(tokens), len(texts), device=args.device)
        logits = rerank(model, tokens, text_tokens, mask, every_pair, every_pair.numel())
        parts = logits.flatten().split([len(r.captions) if photo else 1 for r in shortlist])
        match = torch.stack([part.max() for part in parts])
    return [(shortlist[i], dual[i].item(), match[i].item()) for i in
            (match + args.dual_weight * dual).argsort(descending=True, stable=True).tolist()]


def show(found, args):
    """Print what `search` found, and draw it."""
    print("   match     dual")
    for record, dual, match in found:
        print(f"{match:8.2f} {dual:8.2f}  {record.image}")
    orders = sorted(found, key=lambda one: -one[1]), found
    draw_rows(f"{args.output}/search.png", [
        (args.search, *([record.image for record, *_ in order] for order in orders), None)])
    print(f"picture {args.output}/search.png")


# ------------------------------------------------------------------------------------------------
# Several processes


def world():
    """-> rank of this process, number of processes: (0, 1) without torchrun."""
    alone = not torch.distributed.is_initialized()
    return (0, 1) if alone else (torch.distributed.get_rank(), torch.distributed.get_world_size())


def join_world(device):
    """Meet the other processes, if torchrun started this one."""
    if "RANK" in os.environ:  # a download may keep the others waiting for hours
        torch.distributed.init_process_group(timeout=datetime.timedelta(hours=12))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


class Gather(torch.autograd.Function):
    """x (B,..) of this process -> (world * B,..) of all, in order of rank. Every process uses the
    whole in its loss, so the gradient of x is the sum of what all of them send back; the mean that
    DistributedDataParallel takes afterwards undoes the sum."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world()[1])]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        rank, size = world()
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(size)[rank]


def gather(x):
    """x (B,..) -> (world * B,..), with gradient; B is the same in all processes."""
    return Gather.apply(x) if world()[1] > 1 else x


def collect(x):
    """x (B,..) -> those of all processes in order of rank; B may differ. Without gradient."""
    parts = [x] * world()[1]
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, x.cpu())
    return torch.cat([part.to(x.device) for part in parts])


def progress_bar(items, name, leave=True):
    """tqdm, on a terminal and in the first process only."""
    return tqdm(items, name, leave=leave, disable=world()[0] > 0 or None)


# ------------------------------------------------------------------------------------------------
# Main


def argument_parser():
    """All options. `parse_arguments` has other defaults for toy, flickr30k and coco."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=argparse.SUPPRESS,
                                     epilog="The defaults are those for your own captions and "
                                     "--init none; toy, flickr30k, coco and ALBEF's .pth change "
                                     "some, a checkpoint brings its own.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # what to do
    add("--train", action="store_true", help="train, then test the best epoch")
    add("--evaluate", action="store_true", help="test a checkpoint")
    add("--resume", action="store_true", help="go on with the interrupted training in --output")
    add("--search", metavar="QUERY", help="words or a photo, in the test split or in --images")
    add("--checkpoint", help="to evaluate or search; best.pt of --output if not given")
    add("--output", help="folder of all that is written; the checkpoint's, or runs/DATA")
    add("--rerank", default="16", help="K of each query's shortlist, or all")
    add("--dual-weight", type=float, default=1.0, help="of dual logits, added to match logits")
    # data
    add("--data", nargs="+", help="toy (if not given), flickr30k, coco or captions file(s)")
    add("--images", help="folder that image paths start from; the captions file's if not given")
    add("--root", default="data", help="folder of toy, flickr30k and coco")
    add("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="crop, flip and RandAugment")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="image loading processes")
    # model
    add("--image-model", default="facebook/deit-base-patch16-224", help="transformers name or path")
    add("--text-model", default="google-bert/bert-base-uncased", help="a BERT, name or path")
    add("--text-layers", type=int, default=6, help="of the BERT; the rest are the cross encoder")
    add("--image-size", type=int, default=384, help="pixels")
    add("--embedding", type=int, default=256, help="length of the dual encoder's vectors")
    add("--from-scratch", action="store_true", help="backbones with random weights")
    add("--init", help="start from: our checkpoint, ALBEF's .pth, albef (fetched) or none")
    add("--freeze-image", action="store_true", help="compute its tokens once an epoch (LiT)")
    training_options(add)
    return parser


def training_options(add):
    """The options of the loop, of the optimiser and of the machine."""
    add("--negatives", type=int, default=1, help="m, hard negatives per image and per text")
    add("--sampling", choices=("softmax", "topk", "random"), default="softmax", help="of negatives")
    add("--hard-warmup", type=float, default=0.3, help="part of training with random ones first")
    add("--distill", choices=("none", "kl", "mse", "margin", "rank", "label"), default="mse",
        help="objective; label is a control without a teacher")
    add("--distill-weight", type=float, default=0.05, help="in the total loss; for kl, label: 1")
    add("--distill-temperature", type=float, default=0.5,
        help="divides the teacher's logits; for kl: 1")
    add("--distill-warmup", type=float, default=0.4, help="part of training before it sets in")
    add("--contrastive-weight", type=float, default=1.0, help="in the total loss")
    add("--matching-weight", type=float, default=1.0, help="0 trains the dual encoder alone")
    # optimisation and machine
    add("--epochs", type=int, default=10, help="passes over all captions")
    add("--batch-size", type=int, default=256, help="captions with their images, of all processes")
    add("--accumulate", type=int, default=1, help="parts of a batch, each with its own negatives")
    add("--grad-checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="of both encoders: less memory, slower")
    add("--lr", type=float, default=1e-5, help="peak learning rate of both backbones")
    add("--fresh-lr", type=float, default=1e-4,
        help="of cross-attention, projections, match head, temperature")
    add("--warmup-steps", type=int, default=100, help="of the learning rate")
    add("--seed", type=int, default=0, help="of weights, batches, negatives and augmentation")
    add("--log-every", type=int, default=10, help="steps")
    add("--device", help="CUDA, else MPS, else CPU, if not given")
    add("--bf16", action=argparse.BooleanOptionalAction, help="autocast; by device if not given")


def check_arguments(args, stored):
    """InputError for what cannot work. stored: the options of the checkpoint to resume."""
    if args.train + args.evaluate + bool(args.search) != 1:
        raise InputError("give --train or --evaluate or --search")
    for option in ("batch_size", "lr", "fresh_lr", "freeze_image") if args.resume else ():
        if getattr(args, option) != stored[option]:
            raise InputError(f"--resume goes on with --{option.replace('_', '-')} {stored[option]}")
    if args.rerank != "all" and not (args.rerank.isdigit() and int(args.rerank) > 0):
        raise InputError(f"--rerank {args.rerank}: give a number from 1 on, or all")
    for option in ("epochs", "warmup_steps", "log_every", "accumulate", "batch_size", "negatives"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option.replace('_', '-')}: give a number from 1 on")
    parts = args.accumulate * int(os.environ.get("WORLD_SIZE", 1))
    if args.train and args.batch_size % parts:
        raise InputError(f"--batch-size {args.batch_size}: give a multiple of {parts}, which is "
                         "--accumulate times the number of processes")
    most = args.batch_size // parts - 1
    if args.train and args.negatives > most:
        raise InputError(f"--negatives {args.negatives}: --batch-size {args.batch_size} in {parts} "
                         f"part(s) leaves {most or 'no'} negatives for each query")
    if args.train and args.distill == "rank" and args.negatives == 1:
        raise InputError("--distill rank teaches the order of negatives: give --negatives 2 or "
                         "more")


def parse_arguments(argv):
    """The command line; what it leaves open comes from the checkpoint to resume or evaluate, then
    from the preset of the data set, then from the defaults. InputError for what cannot work."""
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.checkpoint and (args.train or args.resume):
        raise InputError("--checkpoint is for --evaluate and --search; to train from it: --init")
    name = args.data[0] if args.data else "toy"
    presets = {"flickr30k": dict(init="albef", negatives=4, grad_checkpointing=True), "toy": dict(
        image_model=f"{args.root}/toy/image-model", text_model=f"{args.root}/toy/text-model",
        text_layers=2, image_size=48, from_scratch=True, batch_size=64, lr=1e-3, fresh_lr=1e-3,
        augment=False,  # a flipped scene has its left on the right
        hard_warmup=0.0,  # on scenes this small hard negatives work from the start
        workers=0, bf16=False)}
    presets["coco"] = presets["flickr30k"] | dict(epochs=5)
    preset = presets.get(name, {})
    init = args.init or preset.get("init", "none")
    if init != "none":  # all parts are trained, so that neither warm-up is needed
        preset |= dict(hard_warmup=0.0, distill_warmup=0.0)
    if init == "albef" or init.endswith(".pth"):
        preset["fresh_lr"] = 1e-5  # ALBEF's one rate for all parts
    output = args.output or str(Path(args.checkpoint).parent if args.checkpoint else
                                Path("runs", Path(name).stem))
    checkpoint = f"{output}/last.pt" if args.resume else args.checkpoint or f"{output}/best.pt"
    stored = {}
    if args.resume or args.evaluate or args.search:
        stored = load_checkpoint(checkpoint).get("args", {})  # ALBEF's file has none
        for option in ("train", "evaluate", "resume", "search", "device",
                       *(["images"] if args.data else [])):
            stored.pop(option, None)
        # To evaluate what bf16 has trained: in bf16 only where the device can.
        stored["bf16"] = stored.get("bf16") and (args.resume or None)
    if args.search and args.images and not args.data:  # a folder without captions
        stored["data"] = []
    parser.set_defaults(**{"data": ["toy"], **preset, **stored})
    args = parser.parse_args(argv)
    args.output, args.checkpoint = output, checkpoint
    args.init = {"albef": f"{args.root}/ALBEF_4M.pth", "none": None}.get(args.init, args.init)
    args.train = args.train or args.resume
    check_arguments(args, stored)
    choose_device(args)
    return args


def choose_device(args):
    """Fill in --device and --bf16. InputError for a device that is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    args.device = args.device or ("cuda" if cuda else "mps" if mps else "cpu")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if args.bf16 is None:  # hardware without units for bf16 is several times slower with it
        args.bf16 = (torch.cuda.is_bf16_supported(including_emulation=False)
                     if args.device.startswith("cuda") else args.device == "cpu" and
                     getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # bool() is False


def main(argv=None):
    """Run the command line -> exit code: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns where loaders fork
        args = parse_arguments(argv)
        join_world(args.device)
        torch.manual_seed(args.seed)
        # One process of each machine downloads or draws what the others then find.
        with torch_distributed_zero_first(int(os.environ.get("LOCAL_RANK", -1))):
            splits = load_splits(args.data, args.root, args.images,
                                 ("train", "val", "test") if args.train else ("test",))
            model, tokenizer = build_model(
                args.image_model, args.text_model, args.text_layers, args.embedding,
                args.from_scratch,
                args.init if args.train and not args.resume else args.checkpoint)
        model.to(args.device)
        Path(args.output).mkdir(parents=True, exist_ok=True)
        if args.search:
            show(search(model, tokenizer, splits["test"], args.search, args), args)
            return 0
        if args.train:
            train(model, tokenizer, splits, args)
            args.checkpoint = f"{args.output}/best.pt"
            load_checkpoint(args.checkpoint, model)
        report(*evaluate(model, tokenizer, splits["test"], args), splits["test"], args)
    except (InputError, torch.OutOfMemoryError) as error:
        # A loader process sends its traceback along; the message is in the last line.
        message = str(error).strip().splitlines()[-1].rpartition("InputError: ")[2]
        hint = " Try --grad-checkpointing, --accumulate or a smaller --batch-size"
        print(f"loopitr: {message}{'' if isinstance(error, InputError) else hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"loopitr: interrupted {interrupt}".strip(), file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
