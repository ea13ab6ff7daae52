# SPDX-License-Identifier: MIT
"""Each function against an oracle written the slow and obvious way, then the real command line on
tiny data that the tests draw. Offline; `pytest` runs them all."""
import contextlib
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageColor
from torch.testing import assert_close
from torchvision.transforms import v2

import loopitr
from loopitr import (InputError, contrastive_loss, distillation_loss, load_captions, loop_losses,
                     make_toy_dataset, read_image, recall_at_k, rerank, sample_hard_negatives)

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # ALBEF's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
SHAPE = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, initializer_range=0.2,
             hidden_dropout_prob=0.1)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(45))]
NO_PICTURE = b"\x89PNG\r\n\x1a\n and then nothing"
torch.set_num_threads(1)  # for models this small, more threads only wait for each other


def tiny_model(seed=0, text_layers=2, image_layers=1, **options):
    torch.manual_seed(seed)
    image = transformers.AutoModel.from_config(transformers.ViTConfig(
        num_hidden_layers=image_layers, image_size=32, patch_size=16, **SHAPE))
    text = transformers.AutoModel.from_config(transformers.BertConfig(
        num_hidden_layers=4, vocab_size=50, **SHAPE))
    options = {"embedding": 16, "image_size": 32} | options
    return loopitr.LoopITR(image, text, text_layers, **options).eval()


def random_batch(model, images=4, texts=5, length=9, seed=1, size=32):
    torch.manual_seed(seed)
    mask = torch.arange(length) < torch.randint(2, length + 1, (texts, 1))
    ids = torch.randint(5, 50, (texts, length)) * mask
    return torch.randint(256, (images, 3, size, size)).float(), ids, mask.long()


@torch.no_grad()
def encoded(model, **options):
    """A random batch's image tokens and embeddings, text tokens and embeddings, mask."""
    pixels, ids, mask = random_batch(model, **options)
    return *model.encode_image(pixels), *model.encode_text(ids, mask), mask


def save_backbone(folder, name, weights=True, **more):
    """A tiny model for transformers, with a tokenizer's vocabulary beside it -> folder"""
    small = dict(image_size=32, patch_size=16, num_hidden_layers=2, vocab_size=len(WORDS))
    small = {} if name in ("swin", "resnet") else SHAPE | small
    config = transformers.AutoConfig.for_model(name, **small | more)
    config.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    if weights:
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def log_of(output, key):
    lines = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def bytes_in(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy_dataset(folder / "data" / "toy", train=40, val=8, test=12)
    return folder


@pytest.fixture
def here(toy, monkeypatch):
    monkeypatch.chdir(toy)
    return toy


def command(output, *more):
    """Training of two epochs of five steps."""
    return ["--train", "--output", str(output), "--batch-size", "16", "--epochs", "2",
            "--distill-from", "0.5", *map(str, more)]


def call(*arguments):
    return loopitr.run([str(argument) for argument in arguments])


def fails(capsys, arguments, *messages):
    capsys.readouterr()
    code = call(*arguments)
    error = capsys.readouterr().err
    line, = [line for line in error.splitlines() if line.startswith("loopitr:")]
    assert code == 2 and "Traceback" not in error
    assert all(message in line for message in messages), line


@pytest.fixture(scope="session")
def trained(toy, tmp_path_factory):
    output, printed = tmp_path_factory.mktemp("runs") / "toy", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(toy)
        assert call(*command(output)) == 0
    return output, printed.getvalue()


def own_data(here, folder, first=None):
    """Options to train on the toy images with other captions, whose first image is another."""
    content = json.loads((here / "data" / "toy" / "captions.json").read_text())
    if first:
        content["images"][0]["filename"] = str(first)
    return ["--workers", 0, "--images", "data/toy", "--image-model", "data/toy/image-model",
            "--text-model", "data/toy/text-model", "--image-size", 48, "--init", "scratch",
            "--data", write_json(folder / "captions.json", content)]


def table_of(output):
    lines = [line.split() for line in output.splitlines()]  # of the last table, without seconds
    return [line[:9] for line in lines if line[:1] in (["dual"], ["cross"])][-2:]


# Processes are forked from a server that has imported torch, which takes seconds, once.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload([__name__])


def child(arguments, folder, place, variables):
    """What a shell does: a group of processes of its own, a folder, variables, files for output."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)  # of loaders: the usual one
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{place}/{name}", os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, open(number, "w", buffering=1, encoding="ascii", closefd=False))
    sys.argv = [loopitr.__file__, *arguments]
    runpy.run_path(loopitr.__file__, run_name="__main__")


def start(arguments, folder, place, **variables):
    place.mkdir(parents=True)
    process = FORK.Process(target=child, args=(list(map(str, arguments)), folder, place, variables))
    process.start()
    return process


def finish(process, place):
    process.join(60)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a process did not end")
    return process.exitcode, *((place / name).read_text() for name in ("stdout", "stderr"))


# ----------------------------------------------------------------------------------------- Settings

DEFAULTS = dict(
    negatives=1, sampling="softmax", random_first=0.3, distill="mse", distill_weight=0.05,
    distill_temperature=0.5, distill_from=0.4, matching_weight=1.0, init="backbones",
    freeze_image=False, epochs=10, batch_size=256, lr=1e-5, new_lr=1e-4, augment=True,
    grad_checkpointing=False, seed=0, rerank=16, dual_weight=1.0, checkpoint=None,
    image_model="facebook/deit-base-patch16-224", text_model="google-bert/bert-base-uncased",
    image_size=384, images=None)
TOY = dict(init="scratch", image_size=48, epochs=1, batch_size=64, lr=1e-3, new_lr=1e-3, workers=0,
           augment=False, random_first=0.0, image_model="data/toy/image-model",
           text_model="data/toy/text-model")
FULL_SIZE = dict(negatives=4, grad_checkpointing=True)
ALBEF = dict(init="albef", random_first=0.0, distill_from=0.0, new_lr=1e-5)


@pytest.mark.parametrize("arguments, changed, start, output", [
    ("own.json", {}, None, "runs/own"), ("toy", TOY, None, "runs/toy"),
    ("flickr30k", FULL_SIZE | ALBEF, "data/ALBEF_4M.pth", "runs/flickr30k"),
    ("coco", FULL_SIZE | ALBEF | dict(epochs=5), "data/ALBEF_4M.pth", "runs/coco"),
    ("own.json --init its/ours.pt --new-lr 0.5", ALBEF | dict(new_lr=0.5, init="its/ours.pt"),
     "its/ours.pt", "runs/own"),
    ("toy --init ours.pt --augment", TOY | dict(distill_from=0.0, augment=True, init="ours.pt"),
     "ours.pt", "runs/toy"),
    ("coco --epochs 7 --no-grad-checkpointing --output there", ALBEF | dict(
        negatives=4, epochs=7), "data/ALBEF_4M.pth", "there")])
def test_what_is_given_wins_over_presets_and_these_over_defaults(
        tmp_path, monkeypatch, arguments, changed, start, output):
    monkeypatch.chdir(tmp_path)
    args = loopitr.parse_arguments(["--train", "--data", *arguments.split()])
    expected = DEFAULTS | {"workers": min(8, os.cpu_count())} | changed
    expected["bf16"] = args.device != "cpu"
    data = arguments.split()[0]
    if data != "own.json":
        expected["images"] = str(tmp_path / "data" / data)
    if data == "toy":
        for kind in ("image_model", "text_model"):
            setattr(args, kind, os.path.relpath(getattr(args, kind)))
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.start, args.resume, args.train, args.search) == (start, False, True, None)
    assert Path(args.output) == Path(output)


# -------------------------------------------------------------------------------------- Data loader

def karpathy(filename="a.jpg", split="val", sentences=({"raw": "a"},)):
    return {"filename": filename, "split": split, "sentences": sentences}


def test_captions_of_karpathy_and_of_albef_are_read_and_joined(tmp_path):
    path = write_json(tmp_path / "d.json", {"images": [
        karpathy("1.jpg", "train", [{"raw": " one\n"}, {"raw": "two"}]), karpathy("2.jpg", "val"),
        karpathy("3.jpg", "restval") | {"filepath": "val2014"}]})
    assert load_captions(path, images="x") == {
        "train": {"x/1.jpg": ["one", "two"], "x/val2014/3.jpg": ["a"]}, "val": {"x/2.jpg": ["a"]},
        "test": {}}
    assert list(load_captions(path)["train"])[0] == str(tmp_path / "1.jpg")
    rows = [{"image": "f/a.jpg", "caption": " one ", "image_id": 0},
            {"image": "f/c.jpg", "caption": []}, {"image": "f/b.jpg", "caption": ["1", " 2"]},
            {"image": "f/../f/a.jpg", "caption": "three", "image_id": 0}]
    train = tmp_path / "flickr30k_train.json"
    train.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")  # as some editors begin a file
    val = write_json(tmp_path / "coco_karpathy_val.json", [{"image": "d.jpg", "caption": "d"}])
    assert load_captions(train, val, images="x") == {
        "train": {"x/f/a.jpg": ["one", "three"], "x/f/b.jpg": ["1", "2"]},
        "val": {"x/d.jpg": ["d"]}, "test": {}}


@pytest.mark.parametrize("content, message", [*((content, "captions_val.json") for content in (
        b"\xff\xfe", b"[" * 100_000, {}, {"pictures": []}, {"images": {"a": 1}}, 5, None,
        {"images": 5}, {"images": None})),
    (b"<html>log in first</html>", "captions_val.json.* delete it"),
    *(({"images": [karpathy(), row]}, "row 2") for row in (
        None, "a", {"filename": "a.jpg"}, karpathy(5), karpathy(split=["val"]),
        karpathy(sentences=None), karpathy(sentences=["a"]), karpathy(sentences=[{"raw": 5}]))),
    *(([{"image": "b.jpg", "caption": "b"}, row], "row 2") for row in (
        {"image": "a.jpg"}, {"image": None, "caption": "a"}, {"image": "a.jpg", "caption": [5]})),
    ([{"image": "a.jpg", "caption": {"a": 1}}], "row 1"),
    ([{"image": "a.jpg", "caption": ["a", " "]}], "captions_val.json.* row 1.*a.jpg.* blank"),
    ({"images": [karpathy("a/x.jpg"), karpathy("b/.././a/x.jpg", "test")]},  # one image
     "a/x.jpg .* split test.* another")])
def test_captions_that_cannot_be_read_are_located(tmp_path, content, message):
    path = tmp_path / "captions_val.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(InputError, match=message):
        load_captions(path)


def test_splits_have_the_names_that_people_give_them(tmp_path):
    rows = [{"image": "a.jpg", "caption": "a"}]
    for name, split in (("Train", "train"), ("restval", "train"), ("VALID", "val"), ("dev", "val"),
                        ("validation", "val"), ("test", "test"), ("latest", None),
                        ("trainval", None), ("train_val", None)):
        for path in (write_json(tmp_path / "captions.json", {"images": [karpathy(split=name)]}),
                     write_json(tmp_path / f"my-{name}_2014.json", rows)):
            if split:
                assert load_captions(path)[split]
            else:
                with pytest.raises(InputError, match=f"{path}.* train, restval, val, .*test"):
                    load_captions(path)


def photo_of(width, height):
    """A photo with something to see at every place."""
    x, y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    pixels = torch.stack([x * 255 // width, y * 255 // height, 40 * ((x // 5 + y // 7) % 6)], 2)
    return Image.fromarray(pixels.byte().numpy())


def pixels_of(image):
    """uint8 (3,H,W)"""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def test_photos_are_squeezed_to_a_square_or_augmented_as_albefs():
    """The same steps, written down here, from the same seed."""
    photo = photo_of(60, 40)
    plain = loopitr.image_transform(24)(photo)
    assert torch.equal(plain, pixels_of(photo.resize((24, 24), Image.BICUBIC)))
    space = v2.RandAugment._AUGMENTATION_SPACE
    kept = ("Identity", "AutoContrast", "Equalize", "Brightness", "Sharpness", "ShearX", "ShearY",
            "TranslateX", "TranslateY", "Rotate")
    chosen = v2.RandAugment(2, 7)
    chosen._AUGMENTATION_SPACE = {name: space[name] for name in space if name in kept}
    crop = v2.RandomResizedCrop(24, (0.5, 1), (3 / 4, 4 / 3), v2.InterpolationMode.BICUBIC)
    expected = v2.Compose([crop, v2.RandomHorizontalFlip(0.5), chosen])
    transform = loopitr.image_transform(24, augment=True)
    transform = pickle.loads(pickle.dumps(transform))  # as it gets to a loader's processes
    for seed in range(40):
        torch.manual_seed(seed)
        wanted = pixels_of(expected(photo))
        torch.manual_seed(seed)
        assert torch.equal(transform(photo), wanted)


RED, GREY, WHITE = (120, 0, 0), (100, 100, 100), (255, 255, 255)
PALETTE = Image.new("P", (4, 4), 0)
PALETTE.putpalette(RED)
FLOATS = Image.new("F", (4, 4), 100.0)
FLOATS.putpixel((3, 3), 255.0)
TURNED = b"\1\x12\0\3\0\0\0\1\0\6\0\0"  # EXIF's entry for a camera that was held upright


@pytest.mark.parametrize("name, image, seen", [
    ("a.odd", Image.new("RGB", (4, 4), RED), RED),
    ("a.png", Image.new("1", (20_000, 10_000), 1), WHITE),  # 200 megapixels, which are no bomb
    ("a.png", PALETTE, RED), ("clear.png", PALETTE, WHITE), ("clear.gif", PALETTE, WHITE),
    ("a.png", Image.new("RGBA", (4, 4), (*RED, 51)), (228, 204, 204)),
    ("a.png", Image.new("LA", (4, 4), (100, 0)), WHITE),
    ("a.jpg", Image.new("CMYK", (4, 4), (0, 255, 255, 135)), RED),
    ("a.tif", Image.new("LAB", (4, 4), (100, 128, 128)), (94, 94, 94)),
    ("a.png", Image.frombytes("I;16", (4, 4), bytes([100] * 32)), GREY),
    ("a.tif", Image.frombytes("I;16B", (4, 4), bytes([100] * 32)), GREY),
    ("a.tif", Image.new("I", (4, 4), 257 * 100), GREY), ("a.tif", FLOATS, GREY),
    ("a.tif", FLOATS.point(lambda value: value * (1 / 255) + 0), GREY)])
def test_a_picture_of_any_mode_is_read_as_a_person_sees_it(tmp_path, name, image, seen):
    options = {"transparency": 0} if name.startswith("clear") else {}
    image.save(tmp_path / name, "BMP" if name == "a.odd" else None, **options)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == pytest.approx(seen, abs=0 if seen == WHITE else 2)


@pytest.mark.parametrize("metadata, size", [
    (b"Exif\0\0MM\0*\0\0\0\x08\0\1" + TURNED + bytes(4), (20, 40)),
    (b"Exif\0\0MM\0*\0\0\0\x08\0\2" + TURNED + b"\1\x19\0\x08\0\0\0\1\xff\xff\xff\xff" + bytes(4),
     (20, 40)),  # a number below zero, beside it, where none may be
    (b"Exif\0\0MM\0*", (40, 20)), (b"Exif\0\0XX*\0\x08\0\0\0", (40, 20))])
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_lying_photos_are_turned_if_their_metadata_can_be_read(tmp_path, name, metadata, size):
    photo = Image.new("RGB", (40, 20), "red")
    photo.paste("blue", (0, 0, 20, 20))
    photo.save(tmp_path / name, exif=metadata)
    image = read_image(tmp_path / name)
    assert image.size == size and image.getpixel((2, 2))[2] > 200  # blue, left or above


def test_a_photo_whose_end_is_missing_is_read_as_far_as_it_goes(tmp_path):
    photo_of(160, 120).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[:3 * len(content) // 4])
    whole, part = (pixels_of(loopitr.read_image(tmp_path / name)) for name in ("a.jpg", "b.jpg"))
    assert torch.equal(whole[:, :40], part[:, :40]) and not torch.equal(whole, part)


def test_captions_are_tokenized_as_albefs_and_checked(tmp_path, capsys):
    """Without [SEP] and most marks, and with at most 30 tokens."""
    expected = {" A dog's  ball, (red); it's \"his\"!\n": "a dogs ball red its his", "...": "",
                "T-shirt/cap ~ #1: <person>?": "t shirt cap 1 person", "a * b": "a b",
                "one " * 40: "one " * 29}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                  *sorted(set(" ".join(expected.values()).split()))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False)
    ids, mask = loopitr.tokenize(tokenizer, [*expected, "a \ud800 b"])
    assert ids.shape == mask.shape == (6, 30)
    for words, row, attended in zip(expected.values(), ids.tolist(), mask.tolist()):
        words = ["[CLS]", *words.split()]
        assert attended == [1] * len(words) + [0] * (30 - len(words))
        assert [vocabulary[number] for number in row[:len(words)]] == words
    assert vocabulary.index("b") in ids[5]  # what is no text costs one character
    # What is lost is counted (of 2 + 2 + 29 tokens, 1 is unknown), and too much of it is refused.
    loopitr.check_texts(tokenizer, {"a.jpg": ["a b", *2 * ["a dog"]], "b.jpg": ["a b", "a " * 40]})
    assert re.search(r" 3\.0% .*unknown; of 3 captions 33\.3% reach 30 .* 1 belong to several",
                     capsys.readouterr().out)
    for captions in (["dog", "a"], ["..."]):
        with pytest.raises(InputError, match="unknown"):
            loopitr.check_texts(tokenizer, {"a.jpg": captions})


def test_batches_hold_captions_with_images_that_follow_the_seed_of_epoch_and_batch(toy):
    """Whatever was drawn before, and whichever process loads the batch."""
    scenes = load_captions(toy / "data" / "toy" / "captions.json")["train"]
    pairs = [(number, path, both[number % 2]) for number, (path, both) in enumerate(scenes.items())]
    tokenizer = transformers.AutoTokenizer.from_pretrained(toy / "data" / "toy" / "text-model")
    epoch_seed = torch.zeros(1, dtype=torch.long).share_memory_()
    (pixels, ids, mask, numbers), errors = loopitr.make_batch(
        [pairs[3], pairs[3], (5, "none.png", "red")], loopitr.image_transform(32), tokenizer,
        epoch_seed)
    assert numbers.tolist() == [3, 3, 5] and list(errors) == ["none.png"]
    image = Image.open(pairs[3][1]).resize((32, 32), Image.BICUBIC)
    assert torch.equal(pixels[0], pixels_of(image)) and not pixels[2].any()
    assert tokenizer.decode(ids[0][mask[0] > 0], skip_special_tokens=True) == pairs[3][2]
    collate = partial(loopitr.make_batch, transform=loopitr.image_transform(32, augment=True),
                      tokenizer=tokenizer, epoch_seed=epoch_seed)
    loaders = [loopitr.image_loader(pairs[:9], 3, collate, 32, workers,
                                    persistent_workers=workers > 0) for workers in (0, 1)]
    epochs = []
    for seed in (7, 8, 7):
        epoch_seed[0] = seed
        alone, divided = ([batch for batch, _ in loader] for loader in loaders)
        assert len(alone) == 3 and all(map(torch.equal, sum(alone, []), sum(divided, [])))
        epochs.append([batch[0] for batch in alone])
    assert all(map(torch.equal, epochs[0], epochs[2]))
    assert not any(map(torch.equal, epochs[0], epochs[1]))
    first = [collate([pairs[0], pairs[other]])[0][0][0] for other in (1, 2)]
    assert not torch.equal(*first)
    with mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=15 * 3 * 48 ** 2)):
        loopitr.image_loader([1], 4, list, 48, 1)
        with pytest.raises(InputError, match="--workers 0.*--shm-size"):
            loopitr.image_loader([1], 4, list, 48, 2)  # shared memory is too small for two


# -------------------------------------------------------------------------------------------- Model

def slow_attention(block, x, source):
    width = x.shape[1] // block.heads
    query, key, value = block.self.query(x), block.self.key(source), block.self.value(source)
    heads = []
    for h in range(block.heads):
        part = slice(h * width, (h + 1) * width)
        weights = (query[:, part] @ key[:, part].T / math.sqrt(width)).softmax(1)
        heads.append(weights @ value[:, part])
    return block.output.LayerNorm(x + block.output.dense(torch.cat(heads, 1)))


def slow_match(model, image_tokens, text_tokens, attention_mask, wanted):
    """Pair by pair, with padding cut off -> logits of the wanted pairs (P,), row by row."""
    logits = []
    for i, t in wanted.nonzero().tolist():
        x = text_tokens[t][attention_mask[t].bool()]
        for layer in model.cross_encoder:
            x = slow_attention(layer.attention, x, x)
            x = slow_attention(layer.crossattention, x, image_tokens[i])
            up = F.gelu(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(x + layer.output.dense(up))
        logits.append(model.match_head(x[0])[0])
    return torch.stack(logits)


@pytest.mark.parametrize("text_layers", [1, 3])
@pytest.mark.parametrize("texts", [  # of each image; None: `match` is called without `wanted`
    None, [3, 1, 0, 3], [5, 1, 1, 1], [0, 0, 5, 0], [0, 2, 0, 0]])
def test_match_equals_pair_by_pair_in_values_and_gradients(text_layers, texts):
    model = tiny_model(text_layers=text_layers)
    image_tokens, _, text_tokens, _, mask = encoded(model)
    wanted = torch.rand(4, 5).argsort(1) < torch.tensor(texts or [5, 5, 5, 5])[:, None]
    results = []
    for fast in (True, False):
        leaves = [t.clone().requires_grad_() for t in (image_tokens, text_tokens)]
        weights = [*model.cross_encoder.parameters(), *model.match_head.parameters()]
        if fast:
            matrix = model.match(*leaves, mask, wanted if texts else None)
            logits = matrix[wanted]
        else:
            logits = slow_match(model, *leaves, mask, wanted)
        loss = (logits * torch.arange(1.0, len(logits) + 1)).sum()
        results.append([logits, *torch.autograd.grad(loss, [*leaves, *weights])])
    assert len(logits) < 5 or logits.std() > 0.01
    assert not matrix[~wanted].any()
    assert_close(*results, atol=2e-4, rtol=1e-4)
    assert not model.match(image_tokens, text_tokens, mask, torch.zeros_like(wanted)).any()


def test_mixed_precision_is_used_in_every_encoder_but_scores_are_not_rounded():
    results, every = [], tiny_model()
    exact_tokens, _, exact_text, _, mask = encoded(every, images=40, texts=40)
    for model, dtype in ((tiny_model(bf16=True), torch.bfloat16), (every, torch.float32)):
        image_tokens, image, text_tokens, text, _ = encoded(model, images=40, texts=40)
        assert image_tokens.dtype == dtype
        with torch.no_grad():  # `match` takes any tokens; these are exact in each format
            logits = [model.match(exact_tokens.bfloat16().to(kind), exact_text.bfloat16().float(),
                                  mask) for kind in (torch.bfloat16, torch.float32)]
        results.append([text_tokens, image, text, image @ text.T / 0.07, *logits])
    for number, (fast, exact) in enumerate(zip(*results)):
        assert fast.dtype == exact.dtype == torch.float32
        assert not torch.equal(fast, exact)  # bf16 was used inside
        assert number == 0 or not torch.equal(fast, fast.bfloat16().float())
        assert_close(fast, exact, atol=1.0, rtol=0.1)


def test_recomputation_changes_neither_losses_nor_gradients_and_keeps_less():
    results, kept = [], []
    for recompute in (False, True):
        model, sizes = tiny_model(image_layers=2).train(), []  # dropout must be drawn alike again
        batch = (*random_batch(model, images=5, texts=5), torch.arange(5))
        if recompute:
            model.recompute_activations()
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
            losses = loop_losses(model, batch, 2)
        kept.append(sum(sizes))
        (losses["contrastive"] + losses["matching"] + losses["distillation"]).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*losses.values(), *gradients])
    assert len(results[0]) == len(results[1]) > 50 and kept[1] < 0.5 * kept[0]
    assert_close(*results, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------ Hard negatives and losses

@pytest.mark.parametrize("strategy", ["softmax", "topk", "random"])
@pytest.mark.parametrize("scale", [1.0, 1e6])  # 1e6: logits at a tiny temperature
def test_hard_negatives_are_distinct_and_never_positive(strategy, scale):
    torch.manual_seed(0)
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 0])
    positive = ids[:, None] == ids
    similarity = scale * (torch.randn(8, 8) + 10 * positive)  # positives look the most alike
    for given, fewest in ((3, 3), (5, 5), (6, 5)):  # of 8 texts, 3 belong to the first image
        chosen = sample_hard_negatives(similarity, positive, given, strategy)
        assert chosen.shape == (8, fewest) and not positive.gather(1, chosen).any()
        assert all(len(set(row)) == fewest for row in chosen.tolist())


@pytest.mark.parametrize("strategy, weigh", [
    ("softmax", math.exp), ("random", lambda logit: 1), ("topk", lambda logit: 1e99 ** logit)])
def test_sampling_has_the_frequencies_of_drawing_without_replacement(strategy, weigh):
    logits = [1.0, 0.0, 6.0, -1.0, 0.5]  # number 2 is the positive
    weight = {j: weigh(v) for j, v in enumerate(logits) if j != 2}
    total, draws = sum(weight.values()), 20_000
    torch.manual_seed(0)
    chosen = sample_hard_negatives(torch.tensor([logits]).repeat(draws, 1),
                                   (torch.arange(5) == 2).repeat(draws, 1), 2, strategy)
    counts = Counter(map(tuple, chosen.tolist()))
    for a, b in itertools.permutations(weight, 2):
        p = weight[a] / total * weight[b] / (sum(weight[j] for j in weight if j != a))
        assert abs(counts[a, b] / draws - p) <= 5 * math.sqrt(p * (1 - p) / draws) + 1e-9


@pytest.mark.parametrize("positive", [  # rows are images, columns are texts
    [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]],  # texts 0 and 2 share an image
    [[1, 1, 0], [0, 0, 1]], [[1, 0], [0, 1], [0, 0]]])  # a query without positives adds nothing
def test_contrastive_loss_spreads_the_target_over_all_positives(positive):
    torch.manual_seed(0)
    positive = torch.tensor(positive).bool()
    logits, expected = 3 * torch.randn(positive.shape), 0
    for scores, right in ((logits, positive), (logits.T, positive.T)):
        log_p = (scores.exp() / scores.exp().sum(1, True)).log()
        expected -= ((log_p * right).sum(1) / right.sum(1).clamp(min=1)).mean() / 2
    assert_close(contrastive_loss(logits, positive), expected)


def slow_distillation(student, teacher, objective, temperature):
    losses = []
    for d, c in zip(student, teacher.detach() / temperature):
        q, p = d.exp() / d.exp().sum(), c.exp() / c.exp().sum()
        losses.append({"kl": sum(p[j] * (p[j] / q[j]).log() for j in range(5)),
                       "mse": sum((d[j] - d.mean() - c[j] + c.mean()) ** 2 for j in range(5)) / 5,
                       "margin": sum((d[0] - d[j] - c[0] + c[j]) ** 2 for j in range(1, 5)) / 4,
                       "label": -q[0].log()}[objective])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("objective", ["kl", "mse", "margin", "label"])
def test_distillation_equals_its_formula_and_teaches_only_the_student(objective, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, requires_grad=True), 3 * torch.randn(6, 5)
    teacher[::2, 0] += 9  # half of the teacher's rows have the positive first
    teacher.requires_grad_()
    results = []
    for function in (distillation_loss, slow_distillation):
        loss = function(student, teacher, objective, temperature)
        results.append((loss, *torch.autograd.grad(loss, (student, teacher), allow_unused=True)))
    assert_close(results[0][:2], results[1][:2], rtol=1e-4, atol=1e-5)
    assert results[0][2] is None
    assert distillation_loss(student[:, :1], teacher[:, :1], objective) == 0  # no negatives
    assert distillation_loss(student, teacher, "none") == 0
    with pytest.raises(ValueError, match="cosine"):
        distillation_loss(student, teacher, "cosine")


# ----------------------------------------------------------------------------------------- The loop

def slow_loop(model, batch, m, objective, temperature):
    """One turn of the loop with the m hardest negatives, query by query."""
    pixels, ids, mask, image_ids = batch
    image_tokens, image = model.encode_image(pixels)
    text_tokens, text = model.encode_text(ids, mask)
    cross = slow_match(model, image_tokens, text_tokens, mask, torch.ones(5, 5)).view(5, 5)
    dual = image @ text.T / model.temperature.item()  # without gradient
    positives, negatives, student, teacher, drawn = list(cross.diag()), [], [], [], []
    for d, c, turn in ((dual, cross, 1), (dual.T, cross.T, -1)):
        for q in range(5):
            wrong = [j for j in range(5) if image_ids[j] != image_ids[q]]
            hard = sorted(wrong, key=lambda j: -d[q, j].item())[:m]
            drawn += [(q, j)[::turn] for j in hard]
            student.append(d[q, [q, *hard]])
            teacher.append(c[q, [q, *hard]])
            negatives += c[q, hard]
    assert len(set(drawn)) < len(drawn)  # some pairs were drawn twice, and are counted twice
    student, teacher = torch.stack(student), torch.stack(teacher)
    probabilities = [F.sigmoid(v) for v in positives] + [1 - F.sigmoid(v) for v in negatives]
    return {"contrastive": contrastive_loss(image @ text.T / model.log_temperature.exp(),
                                        image_ids[:, None] == image_ids),
        "matching": -torch.stack(probabilities).log().mean(),
        "distillation": distillation_loss(student, teacher, objective, temperature),
        "dual_recall": (student.argmax(1) == 0).float().mean(),
        "cross_recall": (teacher.argmax(1) == 0).float().mean(), "temperature": torch.tensor(0.07)}


@pytest.mark.parametrize("objective, temperature", [("kl", 2.0), ("mse", 0.5)])
@pytest.mark.parametrize("m", [1, 3])
def test_one_turn_of_the_loop_equals_the_slow_way(m, objective, temperature):
    """The values, and the gradients of each loss alone in each weight of the network."""
    model = tiny_model()
    pixels, ids, mask = random_batch(model, images=5, texts=5)
    pixels[2] = pixels[0]
    batch = (pixels, ids, mask, torch.tensor([0, 1, 0, 2, 3]))  # texts 0 and 2: the same image
    losses = loop_losses(model, batch, m, "topk", objective, temperature)
    expected = slow_loop(model, batch, m, objective, temperature)
    assert set(losses) == set(expected)
    for loss, value in expected.items():
        assert_close(losses[loss], value, atol=1e-5, rtol=1e-4, msg=loss)
        assert losses[loss].requires_grad == value.requires_grad
        if value.requires_grad:
            gradients = [torch.autograd.grad(
                result[loss], [*model.parameters()], retain_graph=True, materialize_grads=True)
                for result in (losses, expected)]
            assert_close(*gradients, atol=1e-4, rtol=1e-3)


def given_embeddings(image, text, temperature, wanted):
    """In the model's place: a cross encoder that says 0, and notes which pairs are wanted."""
    return SimpleNamespace(
        encode_image=lambda pixels: (None, image), encode_text=lambda ids, mask: (None, text),
        temperature=torch.tensor(temperature),
        match=lambda *inputs: wanted.append(inputs[3].clone()) or torch.zeros(inputs[3].shape))


@pytest.mark.parametrize("sampling, temperature, hardest", [
    ("softmax", 0.002, True), ("softmax", 50.0, False), ("random", 0.002, False)])
def test_hard_negatives_are_drawn_at_the_temperature_of_training(sampling, temperature, hardest):
    """At a low temperature, softmax draws only the hardest, though cosines differ little."""
    torch.manual_seed(0)
    cosines, own = torch.randperm(36).view(6, 6) / 36, torch.eye(6).bool()
    model = given_embeddings(cosines, torch.eye(6), temperature, wanted := [])
    for _ in range(60):
        loop_losses(model, (None, None, None, torch.arange(6)), 1, sampling)
    often = torch.stack(wanted).float().mean(0)
    wrong = cosines.masked_fill(own, -1)
    expected = own | (wrong == wrong.amax(1, keepdim=True)) | (wrong == wrong.amax(0))
    assert torch.equal(often, expected.float()) is hardest
    assert hardest or 0.05 < often[~own].min() < often[~own].max() < 0.8


def test_a_tie_is_no_win_in_the_logged_recalls_and_one_image_trains_without_negatives():
    for images, dual_recall in ((torch.ones(4, 4), 0), (torch.eye(4), 1)):
        model = given_embeddings(images, torch.eye(4), 1.0, [])
        losses = loop_losses(model, (None, None, None, torch.arange(4)), 2)
        assert (losses["dual_recall"], losses["cross_recall"]) == (dual_recall, 0)
    model = tiny_model()
    batch = (*random_batch(model, images=2, texts=2), torch.tensor([3, 3]))
    losses = loop_losses(model, batch, negatives=2)
    assert all(value.isfinite() for value in losses.values()) and losses["distillation"] == 0
    losses["matching"].backward()


def weighted(losses):
    return losses["contrastive"] + losses["matching"] + 0.5 * losses["distillation"]


def one_step(rank, folder, halves):
    """Save the losses and gradients of one of two processes."""
    model = tiny_model()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    losses = parallel(halves[rank], negatives=2, sampling="topk")
    weighted(losses).backward()
    losses = {name: loss.detach() for name, loss in losses.items()}
    torch.save([losses, {name: p.grad for name, p in model.named_parameters()}], folder / str(rank))
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one_on_the_joined_batch(tmp_path):
    """Contrastive over the joined batch; the other losses are the mean of both halves."""
    model = tiny_model()
    pixels, ids, mask = random_batch(model, images=8, texts=8)
    image_ids = torch.tensor([0, 1, 2, 3, 0, 4, 5, 1])  # positives are spread over both halves
    halves = list(zip(*(part.chunk(2) for part in (pixels, ids, mask, image_ids))))
    torch.multiprocessing.start_processes(one_step, (tmp_path, halves), nprocs=2,
                                          start_method="forkserver")
    logits = model.encode_image(pixels)[1] @ model.encode_text(ids, mask)[1].T / model.temperature
    contrastive = contrastive_loss(logits, image_ids[:, None] == image_ids)
    parts = [loop_losses(model, half, 2, "topk") | {"contrastive": contrastive} for half in halves]
    (sum(map(weighted, parts)) / 2).backward()
    for rank, expected in enumerate(parts):
        losses, gradients = torch.load(tmp_path / str(rank))
        for name, loss in losses.items():
            assert_close(loss, expected[name].detach(), rtol=1e-4, atol=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------- Training

def test_new_layers_learn_at_the_new_rate_and_matrices_alone_decay():
    """Without a gradient, AdamW's decay is all that changes a weight, by its share of the rate."""
    model = tiny_model()
    optimizer = loopitr.make_optimizer(model, lr=0.5, new_lr=2.0)
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
        rates |= {id(parameter): group["peak"] for parameter in group["params"]}
    assert len(optimizer.param_groups) <= 4 and len(rates) == len([*model.parameters()])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sum(0 * parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        part, *rest = name.split(".")
        rate = 0.5 if part.endswith("_encoder") and "crossattention" not in rest else 2.0
        decay = 0.0 if parameter.ndim < 2 else 0.02
        assert rates[id(parameter)] == rate, name
        assert_close(parameter.detach(), (1 - rate * decay) * before[name])


class OneNumber(torch.nn.Module):
    """In the model's place: a parameter, losses of known gradients, what it was called with."""

    def __init__(self):
        super().__init__()
        self.log_temperature = torch.nn.Parameter(torch.tensor(0.0))
        self.temperature, self.calls = torch.tensor(1.0), []

    def forward(self, batch, **options):
        self.calls.append(options | {"training": self.training, "batch": batch[0].item()})
        return {name: factor * self.log_temperature for name, factor in (
            ("contrastive", 1e-3), ("matching", 2e-3), ("distillation", 4e-3))}


def epoch_of_one_number(tmp_path, epoch, batches=200, errors={}, **options):
    """-> the model after `train_epoch`, and rate and gradient of each step."""
    args = SimpleNamespace(**{
        "epochs": 2, "random_first": 0.25, "sampling": "topk", "distill_from": 0.4, "negatives": 3,
        "distill_weight": 0.5, "matching_weight": 3.0, "distill": "margin", "device": "cpu",
        "distill_temperature": 0.7, "batch_size": 8, "output": str(tmp_path), "rank": 0} | options)
    model, steps = OneNumber().eval(), []
    optimizer = loopitr.make_optimizer(model, lr=1e-3, new_lr=1e-2)
    optimizer.register_step_post_hook(lambda optimizer, *_: steps.append(
        (optimizer.param_groups[0]["lr"], model.log_temperature.grad.item())))
    loader = [([torch.tensor(number)], errors) for number in range(batches)]
    loopitr.train_epoch(model, loader, optimizer, epoch, args)
    return model, steps


@pytest.mark.parametrize("batches, warmup", [(4, 0), (100, 20), (600, 100)])
def test_rate_weights_and_sampling_follow_the_progress_of_training(tmp_path, batches, warmup):
    calls, steps, total = [], [], 2 * batches
    for epoch in (0, 1):
        model, some = epoch_of_one_number(tmp_path, epoch, batches)
        calls += model.calls
        steps += some
    assert len(calls) == len(steps) == total
    for step, (call, (rate, gradient)) in enumerate(zip(calls, steps)):
        factor = 0.1 + 0.9 * (1 + math.cos(math.pi * step / total)) / 2
        factor = (step + 1) / warmup if step < warmup else factor
        assert rate == pytest.approx(1e-2 * factor, rel=1e-6)
        distilled = step >= 0.4 * total
        assert gradient == pytest.approx(1e-3 + 3 * 2e-3 + 0.5 * 4e-3 * distilled)
        assert call == {"sampling": "random" if step < total / 4 else "topk", "training": True,
                        "negatives": 3, "objective": "margin", "distill_temperature": 0.7,
                        "batch": step % batches}
    every = 10 if batches >= 100 else 1
    for line, step in zip(log_of(tmp_path, "step"), range(every, total + 1, every), strict=True):
        weight = 0.5 * (step - 1 >= 0.4 * total)
        loss = line["contrastive"] + 3 * line["matching"] + weight * line["distillation"]
        assert line["loss"] == pytest.approx(loss, abs=5e-5)
        assert (line["step"], line["epoch"]) == (step, 1 + (step - 1) // batches)


def test_gradients_are_clipped_and_what_cannot_be_trained_on_stops_the_run(tmp_path):
    _, steps = epoch_of_one_number(tmp_path, 0, 7, matching_weight=1e6, rank=1)
    assert all(gradient == pytest.approx(1, abs=1e-4) for _, gradient in steps)
    assert not bytes_in(tmp_path)  # only the first process writes
    for weight in (math.nan, math.inf):
        with pytest.raises(InputError, match="not finite, step 8"):
            epoch_of_one_number(tmp_path, 1, 7, matching_weight=weight)
    with pytest.raises(InputError, match="x.png is no image"):
        epoch_of_one_number(tmp_path, 0, 7, {"x.png": InputError("x.png is no image")})


def test_training_writes_checkpoints_log_picture_and_table(trained):
    output, stdout = trained
    assert {path.name for path in output.iterdir()} == {
        "best.pt", "last.pt", "log.jsonl", "retrieval.png", "image-model", "text-model"}
    head, = log_of(output, "options")
    assert head["options"].items() >= {"batch_size": 16, "lr": 1e-3, "data": ["toy"]}.items()
    assert head["device"] and (head["processes"], head["torch"], head["transformers"]) == (
        1, torch.__version__, transformers.__version__)
    assert re.search("80 captions of 40 images; 2 epochs of 5 steps, 0 .*\nSo few", stdout)
    # The test split is touched once, at the end.
    lines = log_of(output, "split")
    assert [(line["split"], line["epoch"]) for line in lines] == [
        ("val", 1), ("val", 2), ("test", None)]
    for name, row in zip(("dual", "cross"), table_of(stdout)):
        logged = list(lines[2][name].values())[:7]
        assert row[0] == name and list(map(float, row[2:])) == pytest.approx(logged, abs=0.06)


def contents_of(output):
    """Weights, optimiser state, progress, and the log but for times, the last of each line."""
    content, lines = torch.load(output / "last.pt"), {}
    states = content["optimizer"]["state"].values()
    tensors = [*content["model"].values(), *(value for one in states for value in one.values())]
    for line in log_of(output, "epoch"):
        for name in {"dual", "cross"} & line.keys():
            del line[name]["seconds"]
        lines[line["epoch"], line.get("step"), line.get("split")] = line
    return tensors, content["state"], lines


def stopped_at(name, count):
    """Within this context, the count-th call of a function of loopitr is stopped by Ctrl-C."""
    real, before = getattr(loopitr, name), (count - 1) * [mock.DEFAULT]
    return mock.patch.object(loopitr, name, wraps=real, side_effect=[*before, KeyboardInterrupt])


@pytest.mark.parametrize("name, count, state", [
    ("loop_losses", 2, None), ("rerank", 1, (1, 0)), ("loop_losses", 7, (1, 1)),
    ("evaluate", 2, (2, 1))])
def test_the_same_command_goes_on_exactly(here, trained, tmp_path, name, count, state):
    """Stopped within an epoch, within its validation, and between both."""
    with stopped_at(name, count):
        assert call(*command(tmp_path)) == 130
    if state:
        reached = torch.load(tmp_path / "last.pt")["state"]
        assert (reached["trained"], reached["validated"]) == state
    assert call(*command(tmp_path)) == 0
    (tensors, *rest), (expected, *others) = contents_of(tmp_path), contents_of(trained[0])
    assert rest == others and len(tensors) == len(expected) > 100
    assert all(map(torch.equal, tensors, expected))
    assert len(log_of(tmp_path, "options")) == 1  # a fresh run begins its log anew
    assert state or len(log_of(tmp_path, "step")) == 10


@pytest.mark.parametrize("weight, kept", [(1, 1), (0, 0)])  # by re-ranked rsum; by the dual's
def test_the_best_epoch_on_val_is_kept_when_resumed(here, tmp_path, monkeypatch, weight, kept):
    seen, dual, cross = [], iter([3, 1, 2, 4]), iter([5, 9, 7, 1])

    def evaluate(model, tokenizer, captions_of, *_):
        seen.append((len(captions_of), model.log_temperature.item()))
        return {"dual": {"rsum": next(dual)}, "cross": {"rsum": next(cross)}}
    monkeypatch.setattr(loopitr, "evaluate", evaluate)
    train = command(tmp_path, "--epochs", 3, "--matching-weight", weight, "--distill", "none",
                    "--batch-size", 40)
    with stopped_at("loop_losses", 6):  # within the third epoch
        assert call(*train) == 130
    assert call(*train) == 0
    assert [count for count, _ in seen] == [8, 8, 8, 12]  # val, val, val, test
    assert seen[3][1] == seen[kept][1] and len({value for _, value in seen[:3]}) == 3
    assert torch.load(tmp_path / "best.pt")["model"]["log_temperature"].item() == seen[kept][1]


@pytest.mark.parametrize("one, seed, rank, other", [  # numbers of batches: four an epoch
    (0, 0, 0, 12), (0, 0, 1, 8), (0, 1, 0, 8), (4, 1, 0, 8)])
def test_seeds_differ_by_run_epoch_and_process_and_a_smaller_last_batch_is_dropped(
        here, tmp_path, monkeypatch, one, seed, rank, other):
    # All captions belong to one image, so that only the seed can change what is drawn for it.
    captions_of = load_captions("data/toy/captions.json")["train"]
    image, captions = list(captions_of)[0], sum(captions_of.values(), [])[:38]
    real, seen = loopitr.loop_losses, []

    def record(model, batch, **options):
        assert model.training and len(batch[1]) == 4
        seen.append((batch[1].tolist(), batch[0].flatten().tolist(), torch.rand(4).tolist()))
        return real(model, batch, **options)
    monkeypatch.setattr(loopitr, "loop_losses", record)
    monkeypatch.setattr(loopitr, "evaluate", lambda *_: {"cross": {"rsum": 1.0}})
    # One process after the other, so there is nothing to share gradients with.
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **_: model)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda all_of, own: (
        all_of.__setitem__(slice(None), len(all_of) * [own])))
    for run in ((0, 0), (seed, rank)):
        args = loopitr.parse_arguments(command(
            tmp_path / str(len(seen)), "--batch-size", 8, "--augment", "--seed", run[0]))
        args.rank, args.processes = run[1], 2
        torch.manual_seed(0)
        model, tokenizer = loopitr.build_model(args.image_model, args.text_model, 48, True)
        Path(args.output).mkdir()
        loopitr.train(model, tokenizer, {"train": {image: captions}, "val": {}}, args)
    assert len(seen) == 2 * 8  # 19 captions make four batches of 4 in each of two epochs
    assert (seed, rank) != (0, 0) or seen[:8] == seen[8:]
    for first, second in zip(seen[one], seen[other]):
        assert first != second


def test_own_captions_know_their_photos_and_a_run_starts_from_another(here, tmp_path, capsys):
    own = own_data(here, tmp_path)
    train = [*command(tmp_path / "run"), *own, "--epochs", 1]
    assert call(*train) == 0
    fails(capsys, [*train, "--images", tmp_path], f"--images {here / 'data' / 'toy'}", "--output")
    still = command(tmp_path / "next", *own, "--init", tmp_path / "run" / "best.pt")
    assert call(*still, "--lr", 0, "--new-lr", 0) == 0
    start, end = (torch.load(tmp_path / name / "best.pt")["model"] for name in ("run", "next"))
    assert all(torch.equal(start[name], end[name]) for name in start)
    known = ["--evaluate", "--checkpoint", str(tmp_path / "run" / "best.pt")]
    assert call(*known) == 0
    assert loopitr.parse_arguments(known).workers == min(8, os.cpu_count())  # nothing of toy's
    args = loopitr.parse_arguments(["--train", "--data", "x.json", "--init", known[2]])
    assert args.image_size == 48 and args.image_model == "data/toy/image-model"  # what it has


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_all_processes_end_with_one_line_and_whole_files(toy, tmp_path, number, code):
    process = start(command(tmp_path / "run", "--epochs", 99, "--batch-size", 4, "--workers", 1),
                    toy, tmp_path / "printed")
    log, deadline = tmp_path / "run" / "log.jsonl", time.time() + 60
    while not (log.exists() and '"epoch": 2' in log.read_text()) and time.time() < deadline:
        time.sleep(0.05)  # until it trains its second epoch
    os.killpg(process.pid, number)
    status, _, stderr = finish(process, tmp_path / "printed")
    line, = [line for line in stderr.splitlines() if line]
    assert status == code and line.startswith("loopitr: stopped")
    torch.load(tmp_path / "run" / "last.pt")


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130), (RuntimeError("full"), 2)])
def test_a_broken_save_leaves_the_earlier_checkpoint(here, tmp_path, monkeypatch, error, code):
    real, whole = torch.save, []

    def half(content, path):
        if whole:
            Path(path).write_bytes(whole[0][:100])
            raise error
        real(content, path)
        whole.append(Path(path).read_bytes())
    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(loopitr, "evaluate", lambda *_: {"cross": {"rsum": -2.0}})
    assert call(*command(tmp_path)) == code  # the first epoch is saved after training, and then
    assert (tmp_path / "last.pt").read_bytes() == whole[0]


# --------------------------------------------------------------------------------------- Evaluation

def slow_recall(scores, right, k):
    """Percent of the queries (rows) that have one of their right candidates among their first k."""
    hits = []
    for row, own in zip(scores.tolist(), right.tolist()):
        # A wrong candidate stands before a right one of the same score, and so does NaN.
        order = sorted(zip(row, own), key=lambda pair: (
            -math.inf if math.isnan(pair[0]) else -pair[0], pair[1]))
        if any(own):
            hits.append(any(is_right for _, is_right in order[:k]))
    return 100 * sum(hits) / len(hits)


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])  # few levels make many ties
@pytest.mark.parametrize("nan", [0, 0.03, 1])  # share of wrong pairs without a score
@pytest.mark.parametrize("captions", [[1] * 12, [5] * 12, [1, 0, 7, 2, 3, 1, 0, 5, 2, 1, 1, 4]])
def test_recall_equals_sorted_lists(captions, nan, levels):
    torch.manual_seed(levels)
    image_of_text = torch.arange(12).repeat_interleave(torch.tensor(captions))
    image_of_text = image_of_text[torch.randperm(len(image_of_text))]
    right = image_of_text == torch.arange(12)[:, None]
    matrices = torch.randint(levels, (2, *right.shape)).float()
    matrices[(torch.rand(matrices.shape) < nan) & ~right] = math.nan
    one, other = matrices
    for other, given in ((other, {"text_to_image": other}), (one, {})):
        result = recall_at_k(one, image_of_text, (1, 3, 500), **given)  # the gallery has fewer
        expected = {f"TR@{k}": slow_recall(one, right, k) for k in (1, 3, 500)}
        expected |= {f"IR@{k}": slow_recall(other.T, right.T, k) for k in (1, 3, 500)}
        expected["rsum"] = sum(expected.values())
        assert list(result) == list(expected) and result == pytest.approx(expected, abs=1e-3)
    for value in (0.5, math.nan, math.inf):  # a constant earns nothing
        assert recall_at_k(torch.full_like(one, value), image_of_text, (1,))["rsum"] == 0


def test_more_images_than_one_batch_keep_their_order(tmp_path):
    model, paths = tiny_model(), [f"{tmp_path}/{number}.png" for number in range(130)]
    colours = torch.tensor([[number, 255 - number, 128] for number in range(130)])
    with torch.no_grad():
        one = model.encode_image(colours[:, :, None, None].expand(-1, -1, 32, 32))
    for path, colour in zip(paths, colours.tolist()):
        Image.new("RGB", (32, 32), tuple(colour)).save(path)
    tokens, embeddings = loopitr.encode_images(model.train(), paths)  # switches dropout off
    assert tokens.dtype == torch.half and tokens.device.type == "cpu"
    assert_close(tokens.float(), one[0], atol=5e-3, rtol=5e-3)
    assert_close(embeddings, one[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 100])
@pytest.mark.parametrize("dual_weight, pairs_per_pass", [(0, 1000), (2, 1)])
@pytest.mark.parametrize("kind", ["plain", "hubs", "NaN"])
def test_rerank_equals_scoring_every_pair_one_by_one(kind, dual_weight, pairs_per_pass, k):
    """Each query's own shortlist, the candidates that tie with its k-th included."""
    model = tiny_model()
    image_tokens, image, text_tokens, text, mask = encoded(model, images=6, texts=11)
    text_tokens[3:5], mask[3:5] = text_tokens[2], mask[2]
    dual = (image @ text.T).double()
    dual[:, 3:5] = dual[:, 2:3]  # three equal captions tie
    if kind == "hubs":
        dual[4] += 3  # every text likes image 4, every image likes text 8
        dual[:, 8] += 2
    if kind == "NaN":
        dual[:, 7] = dual[1, 3] = math.nan
    before, model.match = dual.clone(), mock.Mock(wraps=model.match)
    matrices = rerank(model.train(), image_tokens, text_tokens, mask, dual, k, dual_weight,
                      pairs_per_pass=pairs_per_pass)  # dropout is switched off
    assert torch.equal(dual.nan_to_num(9), before.nan_to_num(9))  # the caller's scores stay
    assert all(one.args[3].sum() <= 2 * pairs_per_pass for one in model.match.call_args_list)
    with torch.no_grad():
        match = slow_match(model, image_tokens, text_tokens, mask, torch.ones(6, 11)).view(6, 11)
    for matrix, match, dual in ((matrices[0], match, dual), (matrices[1].T, match.T, dual.T)):
        ranked = dual.nan_to_num(-math.inf)
        last = ranked.sort(1, descending=True).values[:, min(k, ranked.shape[1]) - 1:][:, :1]
        listed = (ranked >= last) & ~dual.isnan()
        assert_close(matrix[listed], (match + dual_weight * dual)[listed], atol=1e-3, rtol=1e-4)
        for row, rest, scores in zip(matrix, ~listed & ~dual.isnan(), dual):
            assert (row[rest] < matrix[listed].min()).all()
            assert row[rest].argsort(stable=True).equal(scores[rest].argsort(stable=True))


COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250), (0, 250, 250),
           (120, 60, 0), (60, 0, 120), (0, 120, 60)]


def test_what_stands_below_the_shortlist_keeps_its_order_to_the_last_bit():
    model = tiny_model()
    image_tokens, _, text_tokens, _, mask = encoded(model, images=3, texts=40)
    dual = 1 + torch.arange(40.0).repeat(3, 1) * 2 ** -23  # neighbours in single precision
    dual[:, 0] = 100.0
    image_to_text, _ = rerank(model, image_tokens, text_tokens, mask, dual, 1, 1.0)
    assert (image_to_text.roll(-1, dims=1).diff(dim=1) > 0).all()


def scene_of_colours(trained, folder, captions):
    """A model whose dual and match logits have about the same spread, images of one colour each
    -> model, tokenizer, the images' paths, dual and match logits (I,T)"""
    model, tokenizer = loopitr.load_model(trained[0] / "best.pt")
    paths = [f"{folder}/{number}.png" for number in range(len(COLOURS))]
    for path, colour in zip(paths, COLOURS):
        Image.new("RGB", (48, 48), colour).save(path)
    with torch.no_grad():
        model.log_temperature.fill_(math.log(0.1))
        for parameter in model.parameters():
            if parameter.ndim == 2:  # larger weights, so that scores depend on what is seen
                parameter.mul_(3)
        pixels = torch.tensor(COLOURS)[:, :, None, None].expand(-1, -1, 48, 48)
        image_tokens, images = model.eval().encode_image(pixels)
        ids, mask = loopitr.tokenize(tokenizer, captions)
        text_tokens, texts = model.encode_text(ids, mask)
        match = model.match(image_tokens, text_tokens, mask)
        return model, tokenizer, paths, images @ texts.T / model.temperature, match


def ranked(dual, match, k, weight):
    """Candidates of a query: the k best by dual logits in the order of the sum, then the others."""
    dual, order = dual.tolist(), dual.argsort(descending=True).tolist()
    return sorted(order[:k], key=lambda j: -match[j].item() - weight * dual[j]) + order[k:]


def row_of(picture):
    """The colours of images from left to right, in both halves, in the first row of a picture."""
    picture = Image.open(picture).convert("RGB")
    line = [picture.getpixel((x, 100)) for x in range(picture.width)]
    halves = (line[:picture.width // 2], line[picture.width // 2:])
    return [[COLOURS.index(colour) for colour, _ in itertools.groupby(half) if colour in COLOURS]
            for half in halves]


def test_evaluation_ranks_by_match_and_dual_logits_and_draws_that(here, trained, tmp_path):
    captions = sum(load_captions("data/toy/captions.json")["train"].values(), [])[:18]
    numbers = [n for n in range(9) for _ in range(1 + n % 3)]  # one, two or three captions
    model, tokenizer, paths, dual, match = scene_of_colours(trained, tmp_path, captions)
    captions_of = {path: [] for path in paths}
    for caption, number in zip(captions, numbers):
        captions_of[paths[number]].append(caption)
    args = SimpleNamespace(rerank=4, dual_weight=1.5, workers=0, output=str(tmp_path), rank=0,
                           device="cpu")
    result = loopitr.evaluate(model, tokenizer, captions_of, args, "val", 3)
    right = torch.tensor(numbers) == torch.arange(9)[:, None]
    orders = {}
    for name, k, scale in (("dual", 0, 1), ("cross", 4, 1), ("wrong", 4, 0.1)):  # wrong: cosines
        orders[name] = [[ranked(scale * d, m, k, 1.5) for d, m in zip(*matrices)]
                        for matrices in ((dual, match), (dual.T, match.T))]
    assert orders["dual"] != orders["cross"] != orders["wrong"]
    for name in ("dual", "cross"):
        expected = {}
        for kind, order, own in zip(("TR", "IR"), orders[name], (right, right.T)):
            scores = -torch.tensor(order).argsort(1)  # minus the rank of each candidate
            expected |= {f"{kind}@{k}": slow_recall(scores, own, k) for k in (1, 5, 10)}
        expected["rsum"] = sum(expected.values())
        assert result[name].pop("seconds") > 0
        assert result[name] == pytest.approx(expected, abs=1e-3)
    changed = [[one[:5], other[:5]] for one, other in zip(orders["dual"][1], orders["cross"][1])
               if one[0] != other[0]]
    assert row_of(tmp_path / "retrieval.png") in changed


def test_evaluation_takes_best_and_other_captions_bring_their_own_photos(
        here, trained, tmp_path, capsys, monkeypatch):
    path = make_toy_dataset(tmp_path / "fresh", train=0, val=0, test=5, seed=1)
    path.write_text(path.read_text().replace("images/", "photos/"))
    (tmp_path / "fresh" / "images").rename(tmp_path / "fresh" / "photos")
    shutil.copytree(trained[0], tmp_path / "runs" / "toy")
    (tmp_path / "runs" / "toy" / "last.pt").write_text("not this one")
    before = bytes_in(tmp_path)
    monkeypatch.chdir(tmp_path)  # a run works from anywhere
    known = ["--evaluate", "--checkpoint", "runs/toy/best.pt"]  # it knows its photos
    for arguments in (["--evaluate", "--images", here / "data" / "toy"], known):
        assert call(*arguments) == 0
        assert table_of(capsys.readouterr().out) == table_of(trained[1])
    assert call(*known, "--data", "fresh/captions.json", "--rerank", 24) == 0
    assert "5 images, 10 texts; top 24" in capsys.readouterr().out
    assert bytes_in(tmp_path) == before  # without --output, nothing is written
    for weight, equal in (("1e9", True), ("0", False)):
        assert call(*known, "--dual-weight", weight, "--output", "out") == 0
        dual, cross = table_of(capsys.readouterr().out)
        assert (dual[2:] == cross[2:]) == equal
        assert Image.open("out/retrieval.png").height > 32  # though no best image changed


# --------------------------------------------------------------------------------------- Data sets

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files, name -> bytes. What is wrong with a name is in server.faults:
    cut (breaks off half way), no range, no length."""

    log_message = mock.Mock()

    def do_GET(self):
        name, sent = self.path.rpartition("/")[2], self.headers["Range"]
        fault, content = self.server.faults.get(name, ""), self.server.files.get(name)
        self.server.asked.append((name, sent))
        if content is None:
            return self.send_error(404)
        start = int(sent[6:-1]) if sent and "no range" not in fault else 0  # bytes=start-
        if start >= len(content):
            return self.send_error(416)
        content = content[start:]
        self.send_response(206 if start else 200)
        if "no length" not in fault:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if "cut" in fault else content)


@pytest.fixture
def server(monkeypatch):
    """A real HTTP server on loopback, to which every download is sent."""
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.files, listener.faults, listener.asked = {}, {}, []
    threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{listener.server_port}"
    monkeypatch.setattr(loopitr, "CAPTIONS", {"flickr30k": f"{address}/flickr30k"})
    monkeypatch.setattr(loopitr, "ALBEF", address)
    monkeypatch.setattr(loopitr, "PHOTOS", dict.fromkeys(loopitr.PHOTOS, address))
    yield listener
    listener.shutdown()


def zip_of(*names):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, f"the photo {name}")
    return content.getvalue()


PHOTO_ZIP = zip_of(*(f"flickr30k-images/{split}.jpg" for split in ("train", "val", "test")),
                   "../../evil.jpg", "/evil.jpg")  # which must not get out of the folder
ZIP, JSON = "flickr30k-images.zip", "flickr30k_val.json"
WHOLE = ["flickr30k-images", "flickr30k_test.json", "flickr30k_train.json", "flickr30k_val.json"]


def load(server, root):
    """Load Flickr30K, of which the server has what the test has not put there."""
    for split in ("train", "val", "test"):
        server.files.setdefault(f"flickr30k_{split}.json", json.dumps(
            [{"image": f"flickr30k-images/{split}.jpg", "caption": ["a", "b"]}]).encode())
    server.files.setdefault(ZIP, PHOTO_ZIP)
    return loopitr.load_splits(SimpleNamespace(
        data=["flickr30k"], images=str(root / "flickr30k"), train=True, search=None))


@pytest.mark.parametrize("fault", ["", "no length", "no range"])
def test_flickr30k_arrives_with_one_get_a_file_photos_last(server, tmp_path, fault):
    server.faults = dict.fromkeys((ZIP, JSON), fault)
    splits = load(server, tmp_path)
    assert all(list(part.values()) == [["a", "b"]] for part in splits.values())
    assert sorted(os.listdir(tmp_path / "flickr30k")) == WHOLE
    assert os.listdir(tmp_path) == ["flickr30k"]
    assert len(server.asked) == 4 and server.asked[-1][0] == ZIP
    server.asked.clear()
    assert load(server, tmp_path) == splits and server.asked == []  # it is all there
    gone = tmp_path / "flickr30k" / "flickr30k-images" / "val.jpg"
    gone.unlink()
    with pytest.raises(InputError, match=f"1 of 1 val .*{gone}.*delete their folder"):
        load(server, tmp_path)


@pytest.mark.parametrize("second", ["", "no range"])
@pytest.mark.parametrize("name", [ZIP, JSON])
def test_a_cut_connection_is_an_error_and_the_next_start_goes_on(server, tmp_path, name, second):
    server.faults[name] = "cut"
    with pytest.raises(InputError, match=f"{name} did not arrive: repeat"):
        load(server, tmp_path)
    assert not (tmp_path / "flickr30k" / name.removesuffix(".zip")).exists()
    server.faults[name] = second
    server.asked.clear()
    load(server, tmp_path)
    assert server.asked[0] == (name, f"bytes={len(server.files[name]) // 2 - 1}-")
    assert sorted(os.listdir(tmp_path / "flickr30k")) == WHOLE


@pytest.mark.parametrize("name, content, fault", [
    (ZIP, b"<html>log in first</html>", ""), (ZIP, zip_of("photos/train.jpg"), ""),
    (ZIP, PHOTO_ZIP[:-30], ""), (ZIP, PHOTO_ZIP[:60] + bytes(3) + PHOTO_ZIP[63:], ""),
    (ZIP, PHOTO_ZIP, "cut, no length"), (JSON, b"<html>log in first</html>", ""),
    (JSON, b"[1, 2, 3]", "cut, no length")])
def test_a_damaged_download_is_named_until_deleted(server, tmp_path, name, content, fault):
    server.files[name], server.faults[name] = content, fault
    file = tmp_path / "flickr30k" / name
    for _ in range(2):
        with pytest.raises(InputError, match=f"{file} .*delete it"):
            load(server, tmp_path)
    assert "flickr30k-images" not in os.listdir(tmp_path / "flickr30k")
    file.unlink()  # as the message says
    del server.files[name], server.faults[name]
    load(server, tmp_path)
    assert sorted(os.listdir(tmp_path / "flickr30k")) == WHOLE


def test_three_situations_have_three_messages(tmp_path):
    def message(data, search=None, train=False):
        args = SimpleNamespace(data=[str(data)], images=None, train=train, search=search)
        with pytest.raises(InputError) as error:
            loopitr.load_splits(args)
        return str(error.value)

    rows = [{"image": f"{name}.jpg", "caption": name} for name in "abc"]
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    missing = message(write_json(tmp_path / "test.json", rows))
    assert all(words in missing for words in ("2 of 3 test", f"{tmp_path}/b.jpg", "--images"))
    assert "c.jpg" not in missing and "delete" not in missing
    for content in (rows, []):
        path = write_json(tmp_path / "val.json", content)
        absent = message(path)
        assert re.search(rf"{path}.* no captions.*\btest\b", absent) and "--images" not in absent
        assert re.search(r"\btrain\b", message(path, train=True))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("nothing to see")
    assert re.search(f"no pictures.*{tmp_path}/photos", message(tmp_path / "photos", "a dog"))


def test_toy_scenes_follow_their_seed_and_are_what_their_captions_say(tmp_path):
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        path = make_toy_dataset(tmp_path / str(number), train=10, val=5, test=5, seed=seed)
        scenes = load_captions(path)["train"]
        drawn.append([Path(photo).read_bytes() for photo in scenes])
    assert drawn[0] == drawn[1] and not set(drawn[0]) & set(drawn[2])
    places = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
    for path, captions in scenes.items():
        image = Image.open(path)
        for words in map(str.split, captions):  # a small red ring left of a large blue square
            axis, sign = places[words[4]]
            first, second = ([sign * (x, y)[axis] for x in range(48) for y in range(48)
                              if image.getpixel((x, y)) == ImageColor.getrgb(colour)]
                             for colour in (words[2], words[-2]))
            assert words[2] == words[-2] or max(first) > min(second)


# --------------------------------------------------------------------------------- Starting weights

@pytest.mark.parametrize("name, tokens_of_48", [
    ("vit", 1 + 9), ("deit", 2 + 9), ("beit", 1 + 9), ("dinov2_with_registers", 5 + 9)])
def test_backbones_keep_their_weights_in_both_halves(tmp_path, name, tokens_of_48):
    image = save_backbone(tmp_path / "image", name)
    text = save_backbone(tmp_path / "text", "bert", num_hidden_layers=6)
    model, _ = loopitr.build_model(image, text, 32)
    ours = {re.sub(r"^cross_encoder\.(\d)", lambda layer: (
        f"text_encoder.encoder.layer.{3 + int(layer[1])}"), key): tensor
        for key, tensor in model.state_dict().items()}
    for part, folder in (("image_encoder", image), ("text_encoder", text)):
        for key, tensor in transformers.AutoModel.from_pretrained(folder).state_dict().items():
            assert "pooler" in key or torch.equal(ours[f"{part}.{key}"], tensor), key
    tokens, embedding = model.encode_image(torch.zeros(2, 3, 48, 48))  # at another size
    assert tokens.shape == (2, tokens_of_48, 32) and embedding.shape == (2, 256)


@pytest.mark.parametrize("kind, name, more", [
    ("text", "mpnet", {}), ("text", "distilbert", {"dim": 32}), ("text", "vit", {}),
    ("text", "bert", {"num_hidden_layers": 1}), ("image", "siglip_vision_model", {}),
    ("image", "vit_mae", {}), ("image", "bert", {}), ("image", "vit", {"num_channels": 1}),
    ("image", "resnet", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}),
    ("image", "swin", {"image_size": 32, "embed_dim": 16, "depths": [1], "num_heads": [2]})])
def test_backbones_that_do_not_fit_are_refused(tmp_path, kind, name, more):
    backbones = {"image": save_backbone(tmp_path / "i", "vit", weights=False),
                 "text": save_backbone(tmp_path / "t", "bert", weights=False)}
    backbones[kind] = save_backbone(tmp_path / "other", name, weights=False, **more)
    with pytest.raises(InputError):
        loopitr.build_model(*backbones.values(), 32, scratch=True)


def test_pre_trained_weights_that_do_not_arrive_are_an_error(tmp_path):
    image, text = save_backbone(tmp_path / "image", "vit"), save_backbone(tmp_path / "text", "bert")
    model = transformers.AutoModel.from_pretrained(image)
    model.save_pretrained(image, state_dict={
        name: tensor for name, tensor in model.state_dict().items() if "before" not in name})
    for folder, message in ((image, "has no weights for"), (tmp_path / "none", "none")):
        with pytest.raises(InputError, match=f"{folder}.*{message}|{message}$"):
            loopitr.build_model(folder, text, 32)


def albef_forward(s, prefix, pixels, ids, width=32, heads=4, vocabulary=50, embedding=256):
    """One image (3,H,W) and one unpadded text (L,) -> both unit embeddings, match logit; by the
    weights s of ALBEF's names, of which those that are absent are drawn."""
    def weight(name, *shape):
        return s.setdefault(name, 0.2 * torch.randn(shape))

    def linear(x, name, out=width):
        return x @ weight(f"{name}.weight", out, x.shape[-1]).T + weight(f"{name}.bias", out)

    def norm(x, name, eps=1e-12):
        return F.layer_norm(x, [width], weight(f"{name}.weight", width),
                            weight(f"{name}.bias", width), eps)

    def attend(q, k, v):
        q, k, v = (t.view(len(t), heads, -1).transpose(0, 1) for t in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def feed_forward(x, up, down):
        return linear(F.gelu(linear(x, up, 2 * width)), down)

    v, t = "visual_encoder.", f"{prefix}embeddings."
    patches = F.conv2d(pixels[None], weight(f"{v}patch_embed.proj.weight", width, 3, 16, 16),
                       weight(f"{v}patch_embed.proj.bias", width), stride=16)
    position = weight(f"{v}pos_embed", 1, 5, width)
    grown = F.interpolate(position[:, 1:].mT.unflatten(2, (2, 2)), patches.shape[2:],
                          mode="bicubic", align_corners=False)
    x = torch.cat([weight(f"{v}cls_token", 1, 1, width)[0], patches[0].flatten(1).T])
    x = x + torch.cat([position[0, :1], grown[0].flatten(1).T])
    for i in range(2):
        block = f"{v}blocks.{i}."
        qkv = linear(norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv", 3 * width)
        x = x + linear(attend(*qkv.chunk(3, 1)), f"{block}attn.proj")
        x = x + feed_forward(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1", f"{block}mlp.fc2")
    image = norm(x, f"{v}norm", 1e-6)
    x = (weight(f"{t}word_embeddings.weight", vocabulary, width)[ids]
         + weight(f"{t}position_embeddings.weight", 512, width)[:len(ids)]
         + weight(f"{t}token_type_embeddings.weight", 2, width)[0])
    x = norm(x, f"{t}LayerNorm")
    for i in range(4):
        layer = f"{prefix}encoder.layer.{i}."
        if i == 2:  # from here on, the cross encoder
            text = x
        for kind in ("attention", "crossattention")[:1 + (i >= 2)]:
            source, name = x if kind == "attention" else image, f"{layer}{kind}."
            attended = attend(linear(x, f"{name}self.query"), linear(source, f"{name}self.key"),
                              linear(source, f"{name}self.value"))
            x = norm(x + linear(attended, f"{name}output.dense"), f"{name}output.LayerNorm")
        down = feed_forward(x, f"{layer}intermediate.dense", f"{layer}output.dense")
        x = norm(x + down, f"{layer}output.LayerNorm")
    no, yes = linear(x[0], "itm_head", 2)
    return (F.normalize(linear(image[0], "vision_proj", embedding), dim=0),
            F.normalize(linear(text[0], "text_proj", embedding), dim=0), yes - no)


def albef_checkpoint(prefix, vocabulary=50, embedding=256):
    """Random weights under the names of its file format, with what is to be ignored."""
    torch.manual_seed(3)
    state = {"temp": torch.tensor(0.05)}
    albef_forward(state, prefix, torch.zeros(3, 32, 32), torch.zeros(1, dtype=torch.long),
                  vocabulary=vocabulary, embedding=embedding)
    ignored = ("visual_encoder_m.norm.bias", "vision_proj_m.weight", "image_queue",
               "text_encoder.cls.predictions.bias", f"{prefix}embeddings.position_ids")
    return state | dict.fromkeys(ignored, torch.zeros(1))


@pytest.fixture
def albef_backbones(tmp_path):
    return (save_backbone(tmp_path / "image", "vit", weights=False, image_size=48),
            save_backbone(tmp_path / "text", "bert", weights=False, num_hidden_layers=4))


@pytest.mark.parametrize("prefix, size, kind, file", [
    ("text_encoder.", 32, torch.float, "flickr30k.pth"),
    ("text_encoder.bert.", 48, torch.half, "ALBEF_4M.pth")])
def test_albef_gives_the_same_embeddings_and_match_logits_here(
        server, tmp_path, albef_backbones, prefix, size, kind, file):
    state = {name: tensor.to(kind) for name, tensor in albef_checkpoint(prefix).items()}
    # The fine-tuned files that are published hold the weights alone.
    torch.save(state if file == "flickr30k.pth" else {"model": state, "epoch": 3}, tmp_path / file)
    server.files[file] = (tmp_path / file).read_bytes()
    for _ in range(2):
        model, tokenizer = loopitr.load_model(tmp_path / "data" / file, "cpu", False, size,
                                              *albef_backbones)
    assert len(server.asked) == 1  # it is fetched once
    model.eval()
    pixels, ids, mask = random_batch(None, size=size)
    with torch.no_grad():
        image_tokens, images = model.encode_image(pixels.byte() if size == 32 else pixels)
        text_tokens, texts = model.encode_text(ids, mask)
        logits = model.match(image_tokens, text_tokens, mask)
    assert tokenizer.vocab_size == 50 and model.image_size == size
    assert model.temperature.item() == pytest.approx(0.05, abs=1e-4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float}
    config = model.image_encoder.config  # which training stores
    assert config.image_size == 32 and config.layer_norm_eps == 1e-6
    state = {name: tensor.float() for name, tensor in state.items()}
    pixels = (pixels / 255 - MEAN) / STD
    for i, image_pixels in enumerate(pixels):
        for t, row in enumerate(ids):
            expected = albef_forward(state, prefix, image_pixels, row[mask[t] > 0])
            assert_close((images[i], texts[t], logits[i, t]), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("missing, other", [
    ("temp", {}), ("itm_head.bias", {}), ("visual_encoder.pos_embed", {}),
    ("visual_encoder.blocks.1.attn.qkv.bias", {}),
    ("text_encoder.encoder.layer.3.crossattention.self.key.weight", {}),
    (None, {"name": "dinov2"}), (None, {"name": "vit", "hidden_size": 64})])
def test_an_albef_checkpoint_that_lacks_a_tensor_or_does_not_fit_is_refused(
        tmp_path, albef_backbones, missing, other):
    state, (image, text) = albef_checkpoint("text_encoder."), albef_backbones
    state.pop(missing, None)
    if other:
        image = save_backbone(tmp_path / "other", weights=False, **other)
    torch.save({"model": state}, tmp_path / "albef.pth")
    with pytest.raises(InputError, match="albef.pth"):
        loopitr.load_model(tmp_path / "albef.pth", "cpu", False, None, image, text)


# ------------------------------------------------------------------------------ Search and pictures

def test_search_equals_scoring_every_image_and_leaves_out_what_is_no_picture(
        here, trained, tmp_path, capsys):
    words, photos = "a small red circle above a large blue square", tmp_path / "photos"
    for folder in (photos, tmp_path / "linked"):
        folder.mkdir()
    (photos / "more").symlink_to(tmp_path / "linked")
    (photos / "more" / "back").symlink_to(photos)
    model, _, paths, dual, match = scene_of_colours(trained, photos / "more", [words])
    for path, name in zip(paths, ("a.PNG", "b.bmp", "d.tif")):
        Image.open(path).save(photos / name)
        os.remove(path)
    names = ["a.PNG", "b.bmp", "d.tif", *(Path(path).name for path in paths[3:])]
    (photos / "more" / "broken.png").write_bytes(NO_PICTURE)
    (photos / "empty.jpg").write_text("")
    (photos / "folder.jpg").mkdir()
    shutil.copytree(trained[0], tmp_path / "run")
    content = torch.load(tmp_path / "run" / "best.pt")
    torch.save(content | {"model": model.state_dict()}, tmp_path / "run" / "best.pt")
    search = ["--search", words, "--checkpoint", tmp_path / "run" / "best.pt", "--output",
              tmp_path / "out", "--dual-weight", 2]
    dual, match = dual[:, 0], match[:, 0]
    for k in (16, 6):
        assert call(*search, "--data", photos, "--rerank", k) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any("2 of 11 files are left out" in line for line in lines)
        found = [re.fullmatch(r" *(\S+) +(\S+)  .*/(\S+)", line) for line in lines]
        found = [line.groups() for line in found if line]
        expected = ranked(dual, match, k, 2)[:k]
        assert [name for *_, name in found] == [names[i] for i in expected]
        for (total, of_dual, _), i in zip(found, expected):
            assert [float(total), float(of_dual)] == pytest.approx(
                [(match[i] + 2 * dual[i]).item(), dual[i].item()], rel=2e-3, abs=0.03)
        picture = row_of(tmp_path / "out" / "search.png")
        assert picture == [ranked(dual, match, 0, 2)[:5], expected[:5]]
    assert call(*search) == 0  # in the test split
    assert sum("data/toy/images" in line for line in capsys.readouterr().out.splitlines()) == 12


# --------------------------------------------------------------------------------------------- Main

@pytest.mark.parametrize("words", [
    "--lr nan", "--lr -1", "--new-lr inf", "--image-size 0", "--batch-size -8", "--negatives 0",
    "--negatives few", "--workers -1", "--seed 1" + 40 * "0", "--random-first nan",
    "--distill-from 2", "--distill-temperature 0", "--matching-weight -1", "--rerank 2.5",
    "--distill rank", "--unknown 5", "--evaluate"])
def test_options_out_of_range_are_one_line(capsys, words):
    with pytest.raises(SystemExit, match="2"):
        call("--train", *words.split())
    line, = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words.split())


def test_errors_of_the_command_line(here, trained, tmp_path, capsys, monkeypatch):
    run, train = tmp_path / "run", command(tmp_path / "new")
    shutil.copytree(trained[0], run)
    whole, evaluate = torch.load(run / "best.pt"), ["--evaluate", "--checkpoint"]
    biases = {"nan": torch.tensor([math.nan]), "shape": torch.zeros(2)}
    damaged = {name: whole | {"model": whole["model"] | {"match_head.bias": biases[name]}}
               for name in biases}
    contents = {"pickled": {"model": {"a": os.getcwd}}, "foreign": {"model": {}}, "list": [1]}
    for name, content in (contents | damaged).items():
        torch.save(content, run / f"{name}.pt")
    (run / "cut.pt").write_bytes((run / "best.pt").read_bytes()[:-1000])
    (tmp_path / "file").write_text("not a checkpoint")
    (tmp_path / "rows.csv").write_text("image,caption\na.jpg,a dog\n")
    (tmp_path / "broken.png").write_bytes(NO_PICTURE)
    broken = own_data(here, tmp_path, tmp_path / "broken.png")
    for arguments, *messages in (*([[*mode, *option.split()], option.split()[0], "--train"]
              for mode in (["--evaluate"], ["--search", "a dog"])
              for option in ("--init albef", "--lr 0.5", "--negatives 2", "--freeze-image",
                             "--no-augment", "--batch-size 8", "--distill none", "--seed 0")),
            *([[*evaluate, run / f"{name}.pt"], f"{name}.pt"]
              for name in ("pickled", "foreign", "list", "nan", "shape", "cut", "absent")),
            [["--search", "a ring", "--checkpoint", run / "nan.pt"], "nan.pt", "weights"],
            [["--search", "a ring", "--checkpoint", run / "best.pt", "--data", run / "text-model"],
             "text-model"], [["--search", " \t"], "--search"], [["--evaluate"], "runs/toy/best.pt"],
            [[*evaluate, run / "best.pt", "--output", run], "nothing may overwrite"],
            [[*train, "--checkpoint", run / "best.pt"], "--checkpoint", "--init"],
            [[*train, "--negatives", 16], "--negatives 16"],
            [[*train, "--batch-size", 100], "--batch-size 100", "80 captions"],
            # What is cheap to check is checked first: these models are not there, either.
            [["--train", "--data", tmp_path / "rows.csv", "--text-model", "none"], "rows.csv",
             "README"], [[*train, *broken], "broken.png", "cannot be read"],
            [command(tmp_path / "file"), "file"], [[*train, "--device", "nowhere"], "nowhere"],
            [["--search", "a ring", "--checkpoint", run / "best.pt", "--data", "data", "elsewhere"],
             "data cannot be read"]):
        fails(capsys, arguments, *messages)
    with pytest.raises(SystemExit, match="2"):
        call()
    with monkeypatch.context() as patch:  # a reader such as `head` that left
        gone = mock.Mock(**{"flush.side_effect": BrokenPipeError(32, "Broken pipe")})
        patch.setattr(loopitr, "sys", SimpleNamespace(stdout=gone, stderr=sys.stderr))
        fails(capsys, [*evaluate, run / "best.pt"], "Broken pipe")
    with mock.patch.dict(os.environ, WORLD_SIZE="2"):
        assert call(*evaluate, run / "best.pt") == 0  # without RANK it counts for nothing
    with mock.patch.dict(os.environ, RANK="0", LOCAL_RANK="0"):
        fails(capsys, train, "RANK")  # the launcher's other variables are not there


def test_a_loader_process_that_is_killed_ends_the_run(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loopitr, "read_image", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(loopitr, "DataLoader", partial(
        loopitr.DataLoader, multiprocessing_context="fork"))  # which takes the line above along
    fails(capsys, [*command(tmp_path), "--workers", 1], "DataLoader worker")


def test_what_a_terminal_lacks_is_printed_in_other_characters(trained, tmp_path):
    """That of `child` knows ASCII alone; names and words may be in no encoding at all."""
    (tmp_path / "photos").mkdir()
    photo_of(48, 48).save(tmp_path / "photos" / "\udce4 \xe4.png")
    found = start(["--search", "a k\udcff", "--data", tmp_path / "photos", "--checkpoint",
                   trained[0] / "best.pt"], tmp_path, tmp_path / "printed")
    status, stdout, stderr = finish(found, tmp_path / "printed")
    assert status == 0, stderr
    assert "\\udce4 \\xe4.png" in stdout and "k\\udcff: unknown" in stdout


def test_a_run_with_other_options_is_refused_and_left_as_it_is(here, trained, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    assert call(*command(run)) == 0 and "is finished" in capsys.readouterr().out
    before = bytes_in(run)
    for option, old in (("--lr=0.5", "--lr 0.001"), ("--epochs=3", "--epochs 2"),
                        ("--seed=1", "--seed 0"), ("--data=x.json", "--data toy"),
                        ("--augment", "--no-augment")):
        fails(capsys, command(run, option), f" {old}", "--output", f"--init {run}/best.pt")
    assert before == bytes_in(run)
    content = torch.load(run / "last.pt")
    del content["optimizer"]["state"]
    torch.save(content, run / "last.pt")
    fails(capsys, command(run), "last.pt", "state")
    (run / "last.pt").unlink()
    fails(capsys, command(run), "nothing may overwrite", "--output")


@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory"),
    (MemoryError(), "MemoryError"), (TimeoutError(), "TimeoutError"),  # no text of their own
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "worker"),
    (OSError(28, "No space left on device"), "No space left"),
    (RuntimeError("a mistake"), None), (NotImplementedError("yet"), None)])
def test_memory_that_does_not_suffice_is_one_line_and_our_mistakes_are_none(
        here, tmp_path, capsys, monkeypatch, error, message):
    monkeypatch.setattr(loopitr, "loop_losses", mock.Mock(side_effect=error))
    with contextlib.nullcontext() if message else pytest.raises(type(error)):
        fails(capsys, command(tmp_path), message)


def run_two(place, folder, arguments, other=None, **variables):
    """Two processes, as torchrun starts them, the second with other arguments -> what they print"""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    variables |= dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    processes = [start(one, folder, place / str(rank), RANK=str(rank), **variables)
                 for rank, one in enumerate((arguments, other or arguments))]
    return [finish(process, place / str(rank)) for rank, process in enumerate(processes)]


def test_two_processes_end_together(here, tmp_path):
    (tmp_path / "broken.png").write_bytes(NO_PICTURE)
    broken = own_data(here, tmp_path, tmp_path / "broken.png")
    both = run_two(tmp_path / "printed", here, [
        *command(tmp_path / "out"), *broken, "--workers", 1])
    assert all(status for status, *_ in both)
    assert any("cannot be read as an image" in stderr for *_, stderr in both)


def test_two_processes_train_and_the_first_alone_writes(here, tmp_path, capsys):
    image = save_backbone(tmp_path / "image", "dinov2", image_size=48)  # it has an unused parameter
    runs = [command(tmp_path / name, "--image-model", image) for name in "ab"]
    (status, stdout, stderr), (other, silent, errors) = run_two(tmp_path / "printed", here, *runs)
    assert status == other == 0, stderr + errors
    assert not bytes_in(tmp_path / "b") and "encoder" not in silent
    assert [len(log_of(tmp_path / "a", key)) for key in ("step", "split")] == [10, 3]
    assert call("--evaluate", "--checkpoint", tmp_path / "a" / "best.pt") == 0
    assert table_of(capsys.readouterr().out) == table_of(stdout)


# ------------------------------------------------------------------------------------------- README

def test_every_function_and_option_that_the_readme_names_exists(capsys):
    text = Path(__file__).with_name("README.md").read_text()
    parts = [re.search(rf"## {title}.*?(?=\n## )", text, re.S)[0] for title in (
        "Where to find what", "Details that matter", "Copying pieces")]
    names = set(re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", "".join(parts))) - {
        "F", "nn", "SPDX", "match", "eval", "device", "dtype", "autocast", "cross_encoder",
        "match_head", "dual_weight"}
    assert len(names) > 10
    for name in names | set(re.findall(r"loopitr\.([a-z_]+)\(", text)):
        thing = loopitr
        for part in name.split("."):
            thing = getattr(thing, part)
    with pytest.raises(SystemExit, match="0"):
        call("--help")
    known = set(re.findall("--[a-z][a-z0-9-]+", capsys.readouterr().out))
    assert set(re.findall("--[a-z][a-z0-9-]+", text)) - {"--shm-size", "--nproc"} <= known
    # What a reader copies has the defaults of training.
    parameters = inspect.signature(loop_losses).parameters
    defaults = [parameter.default for parameter in parameters.values()][2:]
    assert defaults == [DEFAULTS[name] for name in (
        "negatives", "sampling", "distill", "distill_temperature")]
