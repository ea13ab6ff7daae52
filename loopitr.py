# SPDX-License-Identifier: MIT
"""LoopITR (https://arxiv.org/abs/2203.05465) in one file.

A dual encoder gives every image and every text one vector; a dot product scores a pair, so it is
fast. A cross encoder reads an image and a text together, token by token; it must run once for every
pair, so it is slow but accurate. LoopITR puts both into one network and lets each teach the other:

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
    python loopitr.py --search "a red circle above a blue square"

The recipe is that of ALBEF (https://arxiv.org/abs/2107.07651), which has both encoders, but no
feedback. Left out of it: masked language modelling (part of its pre-training), momentum encoders
and queues (softer targets and more negatives; the loop can be understood without them).

The paper's abstract and tables, all that we know of it, leave open: how and from when on to distil;
the value of m; random negatives first; the learning rate of new layers; warm-up; gradient clipping;
the strength of augmentation; adding both logits in re-ranking. These are our choices.

Shapes: B images or texts of a batch, I images, T texts, P pairs, N image tokens, L text tokens,
D width, E embedding, Q queries, C candidates, m hard negatives.
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
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, ViTConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput, BertSelfOutput
from transformers.trainer_pt_utils import torch_distributed_zero_first

# What --data toy, flickr30k and coco use instead of the defaults, which stand in `argument_parser`.
PRESETS = {
    "toy": dict(
        images="data/toy", image_model="data/toy/image-model", text_model="data/toy/text-model",
        init="scratch",  # `make_toy_dataset` writes configurations of small backbones, no weights
        image_size=48, epochs=1, batch_size=64, lr=1e-3, new_lr=1e-3, workers=0,
        augment=False,  # a flipped scene has its left on the right
        random_first=0.0),  # on scenes this small, hard negatives work from the start
    "flickr30k": dict(images="data/flickr30k", init="albef", negatives=4, grad_checkpointing=True),
    "coco": dict(images="data/coco", init="albef", negatives=4, grad_checkpointing=True, epochs=5)}

# With a checkpoint as --init, all parts are trained: none has to wait, one rate suits all (ALBEF).
TRAINED_START = dict(random_first=0.0, distill_from=0.0, new_lr=1e-5)


class InputError(Exception):
    """Something that the user can fix; any function may raise it, `main` prints it as one line."""


# -------------------------------------------------------------------------------------- Data loader

class RandAugment(v2.RandAugment):
    """ALBEF's operations: torchvision's without Color, Contrast, Posterize and Solarize."""
    _AUGMENTATION_SPACE = {
        name: change for name, change in v2.RandAugment._AUGMENTATION_SPACE.items()
        if name not in ("Color", "Contrast", "Posterize", "Solarize")}


def image_transform(size, augment=False):
    """PIL image -> tensor (3,size,size). Mean, standard deviation and augmentation are ALBEF's, but
    for the strength of RandAugment, which torchvision scales in its own way."""
    bicubic = InterpolationMode.BICUBIC
    steps = [v2.Resize((size, size), bicubic)]
    if augment:
        steps = [v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=bicubic),
                 v2.RandomHorizontalFlip(), RandAugment(num_ops=2, magnitude=7)]
    return v2.Compose([*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize((0.48145466, 0.4578275, 0.40821073),
                                    (0.26862954, 0.26130258, 0.27577711))])


def read_image(path):
    """-> RGB image, rotated as its EXIF data say"""
    with input_errors(f"{path} cannot be read as an image"), Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def load_images(paths, transform):
    """-> pixels (B,3,H,W)"""
    return torch.stack([transform(read_image(path)) for path in paths])


def tokenize(tokenizer, captions):
    """Captions, cleaned as ALBEF's are -> input_ids (T,L), attention_mask (T,L), L at most 30."""
    marks = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")  # two become blanks, the others vanish
    captions = [caption.lower().translate(marks) for caption in captions]
    captions = [" ".join(caption.replace("<person>", "person").split()) for caption in captions]
    text = tokenizer(captions, padding=True, padding_side="right", truncation=True, max_length=31,
                     return_tensors="pt")
    # ALBEF's tokenizer adds no [SEP]; ours ends every text with it. Shifting the mask left by one
    # hides it: of [CLS] a dog [SEP] [PAD], mask 1 1 1 1 0, remain [CLS] a dog [SEP], mask 1 1 1 0.
    return text["input_ids"][:, :-1], text["attention_mask"][:, 1:]


def make_batch(pairs, transform, tokenizer):
    """[(image number, path, caption)] -> the batch that `loop_losses` takes"""
    numbers, paths, captions = zip(*pairs)
    return load_images(paths, transform), *tokenize(tokenizer, captions), torch.tensor(numbers)


# -------------------------------------------------------------------------------------------- Model

class Attention(nn.Module):
    """Multi-head attention with BERT's residual and norm after it, and with BERT's names for its
    parts, so that pre-trained weights load. Attention weights are not dropped out (ours)."""

    def __init__(self, config, source_width):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.self = nn.ModuleDict({"query": nn.Linear(width, width),
                                   "key": nn.Linear(source_width, width),
                                   "value": nn.Linear(source_width, width)})
        self.output = BertSelfOutput(config)

    def forward(self, x, source, mask=None, places=None):
        """x (P,L or 1,D) attends to source -> like x. Self-attention: source (P,L,D) is text, read
        where mask (P,1,1,L) is True. Cross-attention: source (I,N,D) is images, and places = (row
        (P,), column (P,), number of columns) puts the pairs into a table with a row per image."""
        query = self.self["query"](x)
        key, value = self.self["key"](source), self.self["value"](source)
        if places is not None:
            # All texts paired with an image form one long query to it. So its keys and values, most
            # of the work at 577 tokens, are projected once and never copied per pair. Cells that no
            # pair fills are computed in vain: many, if one image has far more texts than others.
            row, column, columns = places
            table = query.new_zeros(len(source), columns, *query.shape[1:])
            table[row, column] = query
            query = table.flatten(1, 2)  # (I,columns*L,D)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2)
                             for part in (query, key, value))  # (P or I,heads,tokens,D/heads)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = attended.transpose(1, 2).flatten(2)
        if places is not None:
            attended = attended.view_as(table)[row, column]  # like x again
        return self.output(attended, x)


class CrossLayer(nn.Module):
    """BERT layer with cross-attention between self-attention and feed-forward (ALBEF)."""

    def __init__(self, config, image_width):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.crossattention = Attention(config, image_width)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(self, x, text, mask, image_tokens, places):
        """x: all tokens of text (P,L,D), or only the first (P,1,D) -> like x"""
        x = self.attention(x, text, mask)
        x = self.crossattention(x, image_tokens, places=places)
        return self.output(self.intermediate(x), x)


class LoopITR(nn.Module):
    """The shared network: a transformers vision model, [CLS] first, and a BertModel, whose layers
    from `text_layers` on become the cross encoder (ALBEF). bf16: mixed precision."""

    def __init__(self, image_encoder, text_encoder, text_layers, embedding=256, bf16=False):
        super().__init__()
        bert, image_width = text_encoder.config, image_encoder.config.hidden_size
        layers = text_encoder.encoder.layer
        text_encoder.encoder.layer, upper = layers[:text_layers], layers[text_layers:]
        image_encoder.pooler = text_encoder.pooler = None  # [CLS] is projected as it is
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_projection = nn.Linear(image_width, embedding)
        self.text_projection = nn.Linear(bert.hidden_size, embedding)
        self.cross_encoder = nn.ModuleList(CrossLayer(bert, image_width) for _ in upper)
        # Only cross-attention, which a plain BERT lacks, may keep its random weights.
        missing, unknown = self.cross_encoder.load_state_dict(upper.state_dict(), strict=False)
        if text_layers < 1 or unknown or any("cross" not in name for name in missing):
            raise InputError(f"{type(text_encoder).__name__} has few layers, or others than BERT's")
        self.match_head = nn.Linear(bert.hidden_size, 1)
        # ALBEF's 0.07, learned as a logarithm, so that it stays positive without clamping.
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))
        # In the encoders alone: scores rounded to bf16 would tie by the dozen.
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
        for layer in self.modules():
            if isinstance(layer, (CrossLayer, GradientCheckpointingLayer)):  # transformers' layers
                layer.forward = partial(recompute, layer.forward, use_reentrant=False)

    def forward(self, batch, **options):
        """`loop_losses`, under the name that DistributedDataParallel calls."""
        return loop_losses(self, batch, **options)

    def encode_image(self, pixels):
        """pixels (B,3,H,W) -> tokens (B,N,D), unit embedding (B,E), at any H and W"""
        with self.autocast(self.device.type):
            output = self.image_encoder(pixels, interpolate_pos_encoding=True)
            tokens = output.last_hidden_state.float()
        return tokens, F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def encode_text(self, input_ids, attention_mask):
        """input_ids (B,L), attention_mask (B,L) -> tokens (B,L,D), unit embedding (B,E)"""
        with self.autocast(self.device.type):
            tokens = self.text_encoder(input_ids, attention_mask).last_hidden_state.float()
        return tokens, F.normalize(self.text_projection(tokens[:, 0]), dim=-1)

    def match(self, image_tokens, text_tokens, attention_mask, image_index, text_index):
        """The cross encoder -> match logits (P,): the log-odds that each pair belongs together.

        image_tokens (I,N,D), text_tokens (T,L,D), attention_mask (T,L); pair p is image
        image_index[p] with text text_index[p]. Pairs may come in any order, at least one."""
        image_tokens = image_tokens.float()  # evaluation keeps tokens in half precision
        # Not [text_index], whose backward pass adds up in another order each time, on a CPU.
        text = text_tokens.index_select(0, text_index).float()
        mask = attention_mask[text_index].bool()[:, None, None]  # the same for all heads, queries
        # In `Attention`'s table, each image has a row, its pairs columns: [0, 1, 0] -> [0, 0, 1].
        column = (image_index[:, None] == image_index).tril(-1).sum(1)
        places = (image_index, column, int(column.max()) + 1)
        with self.autocast(self.device.type):
            for layer in self.cross_encoder:
                # The match head reads only [CLS], so the last layer computes only [CLS].
                x = text[:, :1] if layer is self.cross_encoder[-1] else text
                text = layer(x, text, mask, image_tokens, places)
        return self.match_head(text[:, 0].float()).squeeze(1)


# ------------------------------------------------------------------------ Hard negatives and losses

@torch.no_grad()
def sample_hard_negatives(similarity, is_positive, num_negatives, strategy="softmax"):
    """For each query, choose num_negatives different candidates that are not positives.

    similarity (Q,C): dual logits; is_positive (Q,C): bool -> indices (Q,m), without gradient.
    strategy: "softmax" draws without replacement from the softmax over the negatives (ALBEF),
    "topk" takes the hardest, "random" any. When a query has too few negatives (one image in the
    batch: none), all queries get fewer, and none ever gets a positive."""
    # Gumbel noise is minus the log of an exponential variable. The m largest of logits plus Gumbel
    # noise are an exact draw of m without replacement from the softmax of the logits. ALBEF's
    # torch.multinomial needs probabilities, which underflow at low temperatures.
    noise = -torch.empty_like(similarity, dtype=torch.float32).exponential_().log()
    scores = {"softmax": similarity + noise, "topk": similarity, "random": noise}[strategy]
    # Before the softmax, since positives that are zeroed after it (ALBEF) can leave a row of zeros.
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
    # Detached: the student must not teach its teacher. Trained on negatives that the dual encoder
    # draws, the teacher learns only what dual logits do not say yet (see `rerank`): its logits are
    # a correction, not a target, hence the small weight. Temperature 0.5 was chosen by trial.
    teacher = teacher.detach() / temperature
    if objective == "none" or student.shape[1] == 1:  # without negatives there is nothing to learn
        return student.new_zeros(())
    if objective == "kl":  # KL(softmax(teacher) || softmax(student)): as Hinton, 1503.02531
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

    batch of this process: pixels (B,3,H,W), input_ids, attention_mask (B,L), image_ids (B,)"""
    pixels, input_ids, attention_mask, image_ids = batch
    image_tokens, image_embedding = model.encode_image(pixels)
    text_tokens, text_embedding = model.encode_text(input_ids, attention_mask)

    # 1. Contrastive loss over the batches of all processes, which `gather` joins. The image decides
    # what is a positive, not the row: two captions of one image in a batch are both right.
    all_ids = gather(image_ids)
    logits = gather(image_embedding) @ gather(text_embedding).T / model.temperature
    contrastive = contrastive_loss(logits, all_ids[:, None] == all_ids)

    # 2. Dual -> cross: the dual logits of this process choose m hard texts for each image and m
    # hard images for each text. These logits give the temperature no gradient: distillation would
    # lower it until they spread as widely as the teacher's; at a lower temperature the negatives
    # that are drawn are harder; and to tell those apart the teacher spreads its logits further.
    dual_logits = image_embedding @ text_embedding.T / model.temperature.detach()  # (B,B)
    is_positive = image_ids[:, None] == image_ids
    hard_texts = sample_hard_negatives(dual_logits, is_positive, negatives, sampling)  # (B,m)
    hard_images = sample_hard_negatives(dual_logits.T, is_positive.T, negatives, sampling)

    # 3. One pass of the cross encoder over B true pairs, B * m hard texts and B * m hard images.
    m = hard_texts.shape[1]
    rows = torch.arange(len(image_ids), device=image_ids.device)
    repeated = rows.repeat_interleave(m)
    image_index = torch.cat([rows, repeated, hard_images.flatten()])
    text_index = torch.cat([rows, hard_texts.flatten(), repeated])
    match_logits = model.match(image_tokens, text_tokens, attention_mask, image_index, text_index)
    matching = matching_loss(match_logits, is_positive[image_index, text_index])

    # 4. Cross -> dual: both encoders' logits of the same candidates, (2B,1+m), the positive first:
    # B images that look for their text, then B texts that look for their image.
    hard_match = match_logits[len(rows):].view(2 * len(rows), m)
    teacher = torch.cat([match_logits[:len(rows)].repeat(2)[:, None], hard_match], dim=1)
    hard_dual = torch.cat([dual_logits.gather(1, hard_texts), dual_logits.T.gather(1, hard_images)])
    student = torch.cat([dual_logits.diag().repeat(2)[:, None], hard_dual], dim=1)
    distillation = distillation_loss(student, teacher, objective, distill_temperature)
    return {"contrastive": contrastive, "matching": matching, "distillation": distillation,
            "dual_recall": (student[:, :1] > student[:, 1:]).all(1).float().mean(),
            "cross_recall": (teacher[:, :1] > teacher[:, 1:]).all(1).float().mean(),
            "temperature": model.temperature.detach()}


# ----------------------------------------------------------------------------------------- Training

def make_optimizer(model, lr, new_lr):
    """AdamW; weight decay 0.02, none for biases and norms (ALBEF). Layers without pre-trained
    weights, and the temperature, learn at the peak rate new_lr, all others at lr (ours)."""
    groups = []
    for name, parameter in model.named_parameters():
        new = re.search("crossattention|_projection|match_head|temperature", name)
        groups.append(dict(params=[parameter], peak=new_lr if new else lr,
                           weight_decay=0.02 if parameter.ndim > 1 else 0.0))
    return torch.optim.AdamW(groups, fused=True)


def train(model, tokenizer, splits, args, checkpoint=None):
    """Train, and keep two checkpoints in --output: best.pt is the best epoch on val, with which the
    model ends, last.pt the one to go on from. If there is one, `checkpoint` is its content."""
    pairs = []  # (image number, path, caption)
    for number, (path, captions) in enumerate(splits["train"].items()):
        pairs += [(number, path, caption) for caption in captions]
    share, rest = divmod(args.batch_size, args.processes)
    if rest or not args.negatives < share <= len(pairs) // args.processes:
        raise InputError(f"--batch-size {args.batch_size} does not fit {len(pairs)} captions: each "
                         f"process needs an equal share, more than --negatives {args.negatives}")
    sampler = DistributedSampler(pairs, args.processes, args.rank, seed=args.seed)  # also shuffles
    transform = image_transform(args.image_size, args.augment)
    collate = partial(make_batch, transform=transform, tokenizer=tokenizer)  # reads the images
    loader = DataLoader(pairs, share, sampler=sampler, num_workers=args.workers, drop_last=True,
                        collate_fn=collate, pin_memory=args.device == "cuda")
    optimizer = make_optimizer(model, args.lr, args.new_lr)
    # Even phases train an epoch, odd ones validate it, so a validation can be repeated alone.
    state = {"phase": 0, "best": -1.0}  # best: rsum on val
    if Path(args.output, "last.pt").exists():
        with input_errors(f"{args.output}/last.pt is damaged"):
            optimizer.load_state_dict(checkpoint["optimizer"])
            state = {name: checkpoint["state"][name] for name in state}
    elif args.rank == 0:  # what a checkpoint needs beside it, and the head of the log
        model.image_encoder.config.save_pretrained(f"{args.output}/image-model")
        model.text_encoder.config.save_pretrained(f"{args.output}/text-model")
        tokenizer.save_pretrained(f"{args.output}/text-model")
        write_log(args, "w", options=args.of_run, processes=args.processes, device=args.device,
                  torch=torch.__version__, transformers=transformers.__version__)
    parallel = model
    if args.processes > 1:  # some parameters may get no gradient, such as DINOv2's mask token
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    for phase in range(state["phase"], 2 * args.epochs):
        epoch, validating = divmod(phase, 2)
        if not validating:
            # All that is random in an epoch follows from these two seeds, whatever happened before.
            sampler.set_epoch(epoch)
            torch.manual_seed(1_000_000 * args.seed + 1_000 * epoch + args.rank)
            train_epoch(parallel, loader, optimizer, epoch, args)
        elif args.rank == 0:  # the others wait in their next `gather`
            result = evaluate(model, tokenizer, splits["val"], args, "val", epoch)
            rsum = result["cross" if args.matching_weight else "dual"]["rsum"]  # cross if trained
            if rsum > state["best"]:
                state["best"] = rsum
                save(args, "best.pt", model)
        state["phase"] += 1
        save(args, "last.pt", model, state=state, optimizer=optimizer.state_dict())
    if args.rank == 0:
        model.load_state_dict(load_checkpoint(f"{args.output}/best.pt")["model"])


def train_epoch(model, loader, optimizer, epoch, args):
    """One pass over all captions. The first process shows a bar, on a terminal (disable=None)."""
    model.train()
    bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", disable=args.rank > 0 or None)
    for step, batch in enumerate(bar, start=epoch * len(loader)):
        progress = step / (args.epochs * len(loader))
        # Linear warm-up of 100 steps (ours), then a cosine to a tenth (ALBEF).
        factor = min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * progress))
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
        if not nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0).isfinite():
            raise InputError(f"loss {loss.item()} or its gradient is not finite, step {step + 1}; "
                             f"{args.output}/last.pt, if there is one, is from before, and good")
        optimizer.step()
        if step % 10 == 9 and args.rank == 0:
            line = {name: round(value.item(), 5) for name, value in losses.items()}
            bar.set_postfix(line)
            write_log(args, step=step + 1, epoch=epoch, loss=loss.item(), **line, lr_factor=factor)


# --------------------------------------------------------------------------------------- Evaluation

def recall_at_k(image_to_text, image_of_text, ks=(1, 5, 10), text_to_image=None):
    """Recall in percent: TR@k, image to text, a hit if any caption of the image is among the top
    k; IR@k, text to image; rsum, the sum of all.

    image_to_text (I,T): scores; text_to_image (I,T), if the other direction has its own;
    image_of_text (T,): the image that each text belongs to -> dict. A wrong candidate counts as
    ahead if its score equals the best right one's, or is NaN: a constant scorer wins nothing."""
    text_to_image = image_to_text if text_to_image is None else text_to_image
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
def encode_images(model, paths, image_size, workers=0, keep_tokens=True):
    """-> tokens (I,N,D), half precision, on the host (COCO: 4.1 GiB), or None; embeddings (I,E)"""
    model.eval()
    load = partial(load_images, transform=image_transform(image_size))
    loader = DataLoader(paths, 64, num_workers=workers, collate_fn=load)
    tokens, embeddings = None, []
    for number, pixels in enumerate(tqdm(loader, "images", leave=False, disable=None)):
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
    dual_weight is ours: trained on negatives drawn by dual scores, the cross encoder does not learn
    what the dual scores capture. With fewer pairs_per_pass, less memory is used on the device."""
    model.eval()
    # All that tie with the k-th best are in, too: if topk left some of them out, a right one could
    # win by luck, and a cross encoder that says nothing would seem to gain.
    best_texts = dual_scores >= dual_scores.topk(min(k, dual_scores.shape[1]), 1).values[:, -1:]
    best_images = dual_scores >= dual_scores.topk(min(k, dual_scores.shape[0]), 0).values[-1:]
    shortlisted = best_texts | best_images  # a pair that is in both is computed once
    scores = dual_weight * dual_scores  # the match logits of the shortlisted will be added
    # Captions have about 15 tokens; padded to 30 they would take twice the time. So texts of like
    # length go together, trimmed to the longest of them.
    length = attention_mask.sum(1)
    for texts in length.argsort().chunk(4):
        longest = int(length[texts].max())
        passes = shortlisted[:, texts].nonzero().split(pairs_per_pass)  # sorted by image
        for part in tqdm(passes, "re-ranking", leave=False, disable=None):
            image_index, text_index = part[:, 0], texts[part[:, 1]]
            first, last = int(image_index[0]), int(image_index[-1])
            scores[image_index, text_index] += model.match(
                image_tokens[first:last + 1].to(scores.device), text_tokens[:, :longest],
                attention_mask[:, :longest], image_index - first, text_index)
    # All others go below; in double precision, since in single the shift could make some equal.
    scores, dual_scores = scores.cpu().double(), dual_scores.cpu().double()
    below = dual_scores - dual_scores.max() + scores[shortlisted.cpu()].min() - 1
    return (torch.where(best_texts.cpu(), scores, below),
            torch.where(best_images.cpu(), scores, below))


@torch.no_grad()
def evaluate(model, tokenizer, captions_of, args, split="test", epoch=None):
    """Print recall@K of the dual encoder, and of the cross encoder re-ranking the dual's top
    --rerank, whose seconds include the dual's; with --output, log it, and draw examples.

    captions_of: {image path: captions} -> {"dual": {"TR@1", .., "seconds"}, "cross": {..}}"""
    paths, captions = list(captions_of), sum(captions_of.values(), [])
    counts = torch.tensor([len(captions_of[path]) for path in paths])
    image_of_text = torch.repeat_interleave(counts)  # [2, 3] -> [0, 0, 1, 1, 1]
    start = time.perf_counter()
    image_tokens, images = encode_images(model, paths, args.image_size, args.workers)
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

ALBEF = "https://storage.googleapis.com/sfr-pcl-data-research/ALBEF/ALBEF_4M.pth"
ROWS = "https://storage.googleapis.com/sfr-vision-language-research/datasets"
CAPTIONS = {"flickr30k": f"{ROWS}/flickr30k", "coco": f"{ROWS}/coco_karpathy"}
PHOTOS = {  # folder that the captions name -> site that has it as a zip
    "flickr30k-images": "https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main",
    "train2014": "http://images.cocodataset.org/zips",
    "val2014": "http://images.cocodataset.org/zips"}


def load_captions(*paths, images=None):
    """Read captions files -> {"train": {image path: [caption, ..]}, "val": {..}, "test": {..}}.

    Karpathy's  {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}, ...]}, ...]}
    ALBEF's     [{"image", "caption": string or list}, ...], one file per split, named after it
    images: the folder that image paths start from; that of the file, if not given."""
    splits = {"train": {}, "val": {}, "test": {}}
    for path in map(Path, paths):
        with input_errors(f"{path} cannot be read as captions; ALBEF's is named after its split"):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            for row in content["images"] if isinstance(content, dict) else content:
                if "sentences" in row:
                    split = row["split"].replace("restval", "train")  # COCO: the rest of its val
                    image = Path(row.get("filepath", ""), row["filename"])
                    captions = [sentence["raw"] for sentence in row["sentences"]]
                else:
                    (split,) = set(re.findall("(?<![a-z])(train|val|test)(?![a-z])", path.stem))
                    image, captions = row["image"], row["caption"]
                    captions = captions if isinstance(captions, list) else [captions]
                image = str(Path(images or path.parent, image))
                if any(image in splits[other] for other in splits.keys() - {split}):
                    raise ValueError(f"{image} is in the split {split}, and in another one")
                for caption in captions:
                    caption.strip().encode()[0]  # fails if it is blank or half a surrogate pair
                    splits[split].setdefault(image, []).append(caption.strip())
    return splits


def load_splits(args):
    """-> {split: {image path: captions}}. Of flickr30k and coco, fetch what the command needs."""
    needed = ("train", "val", "test") if args.train else ("test",)
    name, files = " ".join(map(str, args.data)), args.data
    if name in CAPTIONS:
        files = [fetch(f"{CAPTIONS[name]}_{split}.json", args.images) for split in needed]
    if args.search and os.path.isdir(name):  # photos without captions
        paths = sorted(path for path in Path(name).rglob("*") if is_image_file(path.name))
        splits = {"test": {str(path): [] for path in paths if path.is_file()}}
    else:
        splits = load_captions(*files, images=args.images)
    for split in needed:
        images = splits[split]
        if name in CAPTIONS:  # only what the captions name: to test on COCO, val2014 alone
            for folder in PHOTOS.keys() & {Path(image).parent.name for image in images}:
                fetch(f"{PHOTOS[folder]}/{folder}.zip", args.images)
        missing = [image for image in images if not os.path.isfile(image)]
        if missing or not images:
            raise InputError(f"{name}: {len(missing)} of {len(images)} {split} images are missing "
                             f"{missing[:1]}: correct --images; if downloaded, delete their folder")
    return splits


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


# --------------------------------------------------------------------------------- Starting weights

def build_model(image_model, text_model, image_size, checkpoint=None, scratch=False, bf16=None,
                device="cpu"):
    """-> LoopITR, tokenizer, from two backbones: names or folders, as transformers takes them. The
    upper half of the text model becomes the cross encoder (ALBEF). scratch: their weights are
    not read. checkpoint: what fills the model; ours has configurations and tokenizer beside it."""
    source = f"{checkpoint['path']} into " if checkpoint else ""
    ours = checkpoint and "options" in checkpoint
    if ours:
        folder = Path(checkpoint["path"]).parent
        image_model, text_model = f"{folder}/image-model", f"{folder}/text-model"
    backbones = []
    with input_errors(f"cannot load {source}{image_model} and {text_model} at {image_size} pixels"):
        for name in (image_model, text_model):
            if scratch or checkpoint:
                backbones.append(AutoModel.from_config(AutoConfig.from_pretrained(name)))
            else:
                backbone, report = AutoModel.from_pretrained(name, output_loading_info=True)
                backbones.append(backbone)
                if any("pooler" not in key for key in report["missing_keys"]):
                    raise InputError(f"{name} has no weights for {report['missing_keys']}")
        bf16 = torch.device(device).type != "cpu" if bf16 is None else bf16
        model = LoopITR(*backbones, backbones[1].config.num_hidden_layers // 2, bf16=bf16).float()
        if ours:
            model.load_state_dict(checkpoint["model"])
        elif checkpoint:
            load_albef(model, checkpoint["model"])
        tokens, _ = model.encode_image(torch.zeros(1, 3, image_size, image_size))
        if tokens.shape[1] <= (image_size // model.image_encoder.config.patch_size) ** 2:
            raise InputError(f"{image_model} gives no [CLS] beside a token for each patch")
        tokenizer = AutoTokenizer.from_pretrained(text_model)
        if tokenizer.tokenize("a") == [tokenizer.unk_token]:
            raise InputError(f"{text_model} has no vocabulary: every word is an unknown one")
        return model.to(device), tokenizer


def load_checkpoint(path):
    """-> content of a checkpoint, ours or ALBEF's (fetched if it is absent), with its "path"."""
    if Path(path).name == "ALBEF_4M.pth":
        fetch(ALBEF, Path(path).parent)
    # Errors are suppressed, since torch's advice is to unpickle everything.
    with open(path, "rb") as file, suppress(Exception):
        content = torch.load(file, map_location="cpu", weights_only=True)
        return content | {"path": str(path), "model": content["model"]}
    raise InputError(f"{path} is damaged, or no checkpoint of loopitr.py or ALBEF")


def load_albef(model, state):
    """Fill model from checkpoint["model"] of ALBEF's .pth files, pre-trained or fine-tuned."""
    # There -> here, from top to bottom; no other name contains those of the ViT's parts. These get
    # the names of older transformers, which from_pretrained translates into the installed one's.
    names = {
        "text_encoder.bert.": "text_encoder.",  # the pre-trained file's
        "vision_proj": "image_projection", "text_proj": "text_projection",
        "itm_head": "match_head", "temp": "log_temperature", "visual_encoder.": "",
        "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks": "encoder.layer",
        "norm.": "layernorm.", "norm1": "layernorm_before", "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense", "attn.qkv": "attention.attention.qkv",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    layers, vit, rest = len(model.text_encoder.encoder.layer), {}, {}
    for i in range(len(model.cross_encoder)):
        names[f"text_encoder.encoder.layer.{layers + i}."] = f"cross_encoder.{i}."
    for name, tensor in state.items():
        tensors = vit if name.startswith("visual_encoder.") else rest
        for there, here in names.items():
            name = name.replace(there, here)
        tensors[name] = tensor.float()
    for name in [name for name in vit if "qkv" in name]:
        for part, tensor in zip(("query", "key", "value"), vit.pop(name).chunk(3)):
            vit[name.replace("qkv", part)] = tensor
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


# --------------------------------------------------------------- Files, processes, search, pictures

def write_log(args, mode="a", **values):
    """Append one JSON object to log.jsonl, or begin it anew (mode "w")."""
    with open(Path(args.output, "log.jsonl"), mode) as log:
        log.write(json.dumps(values) + "\n")


def save(args, name, model, **rest):
    """Write a checkpoint, in the first process; under another name first, so never half a file."""
    if args.rank == 0:
        path = f"{args.output}/{name}"
        with input_errors(f"{path} cannot be written"):
            torch.save({"model": model.state_dict(), "options": args.of_run} | rest, f"{path}.part")
            os.replace(f"{path}.part", path)


def gather(x):
    """x (B,..) of this process -> (processes * B,..) of all, with gradient; B is equal in all."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    # All compute the same loss of the whole, each the gradient of its own part alone. These must be
    # summed, and DistributedDataParallel averages: hence x with `processes` times its gradient.
    parts[dist.get_rank()] = x + (len(parts) - 1) * (x - x.detach())
    return torch.cat(parts)


@torch.no_grad()
def search(model, tokenizer, paths, args):
    """Print and draw the dual encoder's top --rerank images for --search, ordered by `rerank`."""
    embeddings = encode_images(model, paths, args.image_size, args.workers, keep_tokens=False)[1]
    text_tokens, mask, text = encode_texts(model, tokenizer, [args.search])
    dual, best = (embeddings @ text.T / model.temperature).topk(min(args.rerank, len(paths)), 0)
    paths = [paths[i] for i in best[:, 0].tolist()]
    image_tokens = encode_images(model, paths, args.image_size, args.workers)[0]
    scores = rerank(model, image_tokens, text_tokens, mask, dual, len(paths), args.dual_weight)[1]
    print("   score     dual")
    for i in scores[:, 0].argsort(descending=True, stable=True).tolist():
        print(f"{scores[i].item():8.2f} {dual[i].item():8.2f}  {paths[i]}")
    draw_retrieval(f"{args.output or '.'}/search.png", paths, [args.search], [None], dual, scores)


def draw_retrieval(path, images, texts, image_of_text, dual_logits, scores, count=6, cell=104):
    """Draw the five best images by the dual encoder (left) and re-ranked (right), for the only text
    or for some whose best image changed. The right image, if it is known, is framed."""
    changed = (dual_logits.argmax(0).cpu() != scores.argmax(0)).nonzero().flatten().tolist()
    shown = [0] if len(texts) == 1 else changed[::max(1, len(changed) // count)][:count]
    canvas = Image.new("RGB", (10 * cell + 40, 32 + len(shown) * (cell + 30)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((8, 6), "left: by the dual encoder; right: re-ranked", "black", font_size=16)
    for y, t in zip(range(32, canvas.height, cell + 30), shown):
        draw.text((8, y), texts[t], "black", font_size=16)
        for x, matrix in ((4, dual_logits), (5 * cell + 28, scores)):
            for i in matrix[:, t].argsort(descending=True, stable=True)[:5].tolist():
                image = read_image(images[i]).resize((cell - 8, cell - 8))
                frame = "limegreen" if i == image_of_text[t] else "white"
                canvas.paste(ImageOps.expand(image, 4, frame), (x, y + 20))
                x += cell
    canvas.save(path)
    print(f"picture {path}")


# --------------------------------------------------------------------------------------------- Main

def argument_parser():
    """All options with their defaults."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=f"Other defaults: {PRESETS}; and with a checkpoint as --init: {TRAINED_START}")
    positive, whole = between(1, kind=int), between(0, kind=int)
    unit, weight = between(0, 1), between(0)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true", help="train or resume, test the best epoch")
    mode.add_argument("--evaluate", action="store_true", help="test --checkpoint")
    mode.add_argument("--search", metavar="WORDS", help="find test images, or in a folder (--data)")
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--checkpoint", help="to evaluate or search with; runs/DATA/best.pt if not given")
    add("--output", help="folder to write to; runs/DATA for training, if not given")
    add("--rerank", type=positive, default=16, help="candidates per query to re-rank")
    add("--dual-weight", type=weight, default=1.0, help="of dual logits, added in re-ranking")
    add("--data", nargs="+", help="toy, flickr30k, coco, captions files; to search, a folder")
    add("--images", type=os.path.abspath, help="where image paths start, and downloads go")
    add("--augment", action=switch, default=True, help="crop, flip and RandAugment")
    add("--workers", type=whole, default=min(8, os.cpu_count()), help="processes that load images")
    add("--image-model", default="facebook/deit-base-patch16-224", help="transformers name or path")
    add("--text-model", default="google-bert/bert-base-uncased", help="a BERT, name or path")
    add("--image-size", type=positive, default=384, help="pixels")
    add("--init", default="backbones", help="backbones, scratch, albef, or path of a checkpoint")
    add("--freeze-image", action="store_true", help="no gradient for the image encoder")
    add("--negatives", type=positive, default=1, help="m, hard negatives per image and per text")
    add("--sampling", choices=("softmax", "topk", "random"), default="softmax", help="of negatives")
    add("--random-first", type=unit, default=0.3, help="share of training with random negatives")
    add("--distill", choices=("none", "kl", "mse", "margin", "label"), default="mse",
        help="objective; label is a control without a teacher")
    add("--distill-weight", type=weight, default=0.05, help="in the total loss; 1 suits kl, label")
    add("--distill-temperature", type=between(0.001), default=0.5, help="of teacher; 1 suits kl")
    add("--distill-from", type=unit, default=0.4, help="share of training before distillation")
    add("--matching-weight", type=weight, default=1.0, help="in the total loss")
    add("--epochs", type=positive, default=10, help="passes over all captions")
    add("--batch-size", type=positive, default=256, help="captions with images, of all processes")
    add("--lr", type=unit, default=1e-5, help="peak learning rate of the backbones")
    add("--new-lr", type=unit, default=1e-4, help="peak rate of new layers, and temperature")
    add("--grad-checkpointing", action=switch, default=False, help="less memory, slower")
    add("--seed", type=whole, default=0, help="of weights, batches, negatives and augmentation")
    add("--device", default=str(torch.accelerator.current_accelerator(True) or "cpu"),
        help="as torch names it; the default is this machine's")
    add("--bf16", action=switch, help="mixed precision; on accelerators if not given")
    return parser


def between(low, high=1e9, kind=float):
    """-> type of an option: a number from low to high, so neither NaN nor infinity."""
    def number(text):  # argparse shows this name: "invalid number value: 'few'"
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high:g}")
        return kind(text)
    return number


def parse_arguments(argv):
    """-> args, content of the checkpoint to start from or None. args.of_run: what a run stores."""
    # Parsed again after each change of defaults. What wins, in training: command line, PRESETS,
    # TRAINED_START, defaults; in evaluation: command line, the run's options, PRESETS, defaults.
    parser = argument_parser()
    args = parser.parse_args(argv)
    data = args.data or ["toy"]
    preset, run = PRESETS.get(data[0], {}), f"runs/{Path(data[0]).stem}"
    last = Path(args.output or run, "last.pt")
    parser.set_defaults(data=data, output=run if args.train else None, **preset)
    if args.train:
        init = parser.parse_args(argv).init
        start = {"backbones": None, "scratch": None, "albef": "data/ALBEF_4M.pth"}.get(init, init)
        if start:
            parser.set_defaults(**TRAINED_START | preset)
        start = last if last.exists() else start
        checkpoint = load_checkpoint(start) if start else None
    else:
        checkpoint = load_checkpoint(args.checkpoint or f"{run}/best.pt")
        parser.set_defaults(**checkpoint.get("options", {}))  # ALBEF's has none
        if args.data:
            parser.set_defaults(images=preset.get("images"))  # not those of the run
    args = parser.parse_args(argv)
    args.data = [name if name in PRESETS else os.path.abspath(name) for name in args.data]
    others = ("train", "evaluate", "search", "checkpoint", "output", "workers", "device")
    args.of_run = {name: value for name, value in vars(args).items() if name not in others}
    args.rank = dist.get_rank() if dist.is_initialized() else 0
    args.processes = dist.get_world_size() if dist.is_initialized() else 1
    if args.train and last.exists():
        moved = {"images": args.images} if preset else {}  # the folder may have moved
        stored = checkpoint.get("options", {}) | moved
        other = {name: value for name, value in stored.items() if value != args.of_run.get(name)}
        if other:
            raise InputError(f"choose another --output: {args.output} holds a run with {other}")
    elif args.output and any(Path(args.output).glob("*.pt")):
        raise InputError(f"nothing may overwrite the run in {args.output}: give another --output")
    return args, checkpoint


@contextmanager
def input_errors(problem):
    """Whatever goes wrong inside, where files or models are read, becomes an InputError."""
    try:
        yield
    except Exception as error:  # damaged and foreign files raise many kinds
        raise InputError(f"{problem}: {type(error).__name__}: {error}") from error


def main(argv=None):
    """Run the command line -> exit code: 0; 2 for what the user can fix; 130, 143 when stopped."""
    try:
        if "RANK" in os.environ:  # torchrun; a download may keep the others waiting for hours
            dist.init_process_group(timeout=timedelta(hours=12))
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # One process of each machine draws and downloads what the others then find.
        with torch_distributed_zero_first(int(os.environ.get("LOCAL_RANK", -1))):
            args, checkpoint = parse_arguments(argv)
            if args.data == ["toy"] and Path(args.images).name == "toy":  # with its backbones
                args.data = [make_toy_dataset(args.images)]
            torch.manual_seed(args.seed)
            model, tokenizer = build_model(
                args.image_model, args.text_model, args.image_size, checkpoint,
                args.init == "scratch", args.bf16, args.device)
            splits = load_splits(args)
        os.makedirs(args.output or ".", exist_ok=True)
        if args.train:
            model.image_encoder.requires_grad_(not args.freeze_image)
            if args.grad_checkpointing:
                model.recompute_activations()
            train(model, tokenizer, splits, args, checkpoint)
        if args.search:
            search(model, tokenizer, list(splits["test"]), args)
        elif args.rank == 0:
            evaluate(model, tokenizer, splits["test"], args)
        sys.stdout.flush()  # a closed pipe fails here, inside `try`
        if dist.is_initialized():
            dist.destroy_process_group()  # left to the interpreter's exit, it may abort
        return 0
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        message = " ".join((str(error) or repr(error)).split())
        # From a loader's process comes a traceback, which ends with "InputError: message".
        print("loopitr:", message.rpartition("InputError: ")[2][:500], file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("loopitr: stopped; repeat the command to go on", file=sys.stderr)
        return 143 if stop.args else 130  # `terminate` gives an argument, Ctrl-C none


def terminate(number, frame):
    """SIGTERM ends a run as Ctrl-C does."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns where loaders fork
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
