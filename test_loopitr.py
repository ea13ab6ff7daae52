# SPDX-License-Identifier: MIT
"""Each function against an oracle written the slow and obvious way, then the real command line on
tiny data that the tests draw. Offline; `pytest` runs them all."""
import argparse
import http.server
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageColor

import loopitr
from loopitr import (contrastive_loss, distillation_loss, load_captions, loop_losses,
                     make_toy_dataset, matching_loss, recall_at_k, rerank, sample_hard_negatives)


def tiny_model(seed=0, text_layers=2, image_layers=1):
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, initializer_range=0.2)
    image = transformers.AutoModel.from_config(
        transformers.ViTConfig(num_hidden_layers=image_layers, image_size=32, patch_size=16,
                               **shape))
    text = transformers.AutoModel.from_config(
        transformers.BertConfig(num_hidden_layers=4, vocab_size=50, **shape))
    return loopitr.LoopITR(image, text, text_layers, embedding=16).eval()


def random_batch(model, images=4, texts=5, length=9, seed=1, size=32):
    """Image tokens, text tokens and a mask with texts of different lengths."""
    torch.manual_seed(seed)
    mask = torch.arange(length) < torch.randint(2, length + 1, (texts, 1))
    ids = torch.randint(5, 50, (texts, length)) * mask
    pixels = torch.randn(images, 3, size, size)
    return pixels, ids, mask.long()


# ------------------------------------------------------------------------------------------------
# Recall


def slow_recall(scores, image_of_text, ks):
    scores, image_of_text = scores.tolist(), image_of_text.tolist()
    images, texts = range(len(scores)), range(len(image_of_text))
    result = {}
    for k in ks:
        hits = []
        for i in images:
            # A wrong candidate sorts before a right one of the same score.
            ranked = sorted(texts, key=lambda t: (-scores[i][t], image_of_text[t] == i))
            hits.append(any(image_of_text[t] == i for t in ranked[:k]))
        result[f"TR@{k}"] = 100 * sum(hits) / len(hits)
    for k in ks:
        hits = []
        for t in texts:
            ranked = sorted(images, key=lambda i: (-scores[i][t], image_of_text[t] == i))
            hits.append(image_of_text[t] in ranked[:k])
        result[f"IR@{k}"] = 100 * sum(hits) / len(hits)
    return {**result, "rsum": sum(result.values())}


@pytest.mark.parametrize("levels", [2, 5, 1000])  # few levels make many ties
@pytest.mark.parametrize("captions", [1, 5])
def test_recall_equals_sorted_lists(captions, levels):
    torch.manual_seed(levels)
    image_of_text = torch.arange(12).repeat_interleave(captions)[torch.randperm(12 * captions)]
    scores = torch.randint(levels, (12, 12 * captions)).float()
    ks = (1, 3, 10, 500)  # 500 is more than the gallery holds
    expected = slow_recall(scores, image_of_text, ks)
    result = recall_at_k(scores, image_of_text, ks)
    assert list(result) == list(expected)
    assert result == pytest.approx(expected, abs=1e-3)
    assert result["TR@500"] == result["IR@500"] == 100


def test_constant_and_nan_scores_earn_nothing():
    image_of_text = torch.arange(20)
    for value in (0.5, math.nan):
        result = recall_at_k(torch.full((20, 20), value), image_of_text)
        assert result["rsum"] == 0


def test_an_image_without_captions_asks_no_question():
    scores = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert recall_at_k(scores, torch.tensor([0, 1]), ks=(1,))["TR@1"] == 100


# ------------------------------------------------------------------------------------------------
# Losses


def test_contrastive_loss_spreads_the_target_over_all_positives():
    torch.manual_seed(0)
    ids = [0, 1, 0, 2]
    logits = torch.randn(4, 4)

    def one_way(rows):
        total = 0
        for row, own in zip(rows, ids):
            positives = [j for j, other in enumerate(ids) if other == own]
            log_sum = math.log(sum(math.exp(v) for v in row))
            total += sum(log_sum - row[j] for j in positives) / len(positives)
        return total / len(ids)

    expected = (one_way(logits.tolist()) + one_way(logits.T.tolist())) / 2
    ids_tensor = torch.tensor(ids)
    result = contrastive_loss(logits, ids_tensor[:, None] == ids_tensor)
    assert result.item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_loss_takes_more_texts_than_images():
    logits = torch.tensor([[3.0, 2.0, 0.0], [0.0, 1.0, 4.0]])
    positive = torch.tensor([[True, True, False], [False, False, True]])
    rows = [(2 * math.log(sum(map(math.exp, (3, 2, 0)))) - 5) / 2,
            math.log(sum(map(math.exp, (0, 1, 4)))) - 4]
    columns = [math.log(1 + math.exp(-3)), math.log(1 + math.exp(-1)), math.log(1 + math.exp(-4))]
    assert contrastive_loss(logits, positive).item() == pytest.approx(
        (sum(rows) / 2 + sum(columns) / 3) / 2, rel=1e-5)


def test_matching_loss_is_the_mean_negative_log_likelihood():
    logits, labels = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, False])
    sigmoid = [1 / (1 + math.exp(-v)) for v in logits.tolist()]
    expected = -(math.log(sigmoid[0]) + math.log(1 - sigmoid[1]) + math.log(1 - sigmoid[2])) / 3
    assert matching_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


OBJECTIVES = ["kl", "mse", "margin", "rank", "label"]


def slow_distillation(student, teacher, objective, temperature):
    total = 0
    for d, c in zip(student.tolist(), teacher.tolist()):
        c = [value / temperature for value in c]
        n = len(d)
        if objective == "kl":
            p = [math.exp(v) / sum(map(math.exp, c)) for v in c]
            q = [math.exp(v) / sum(map(math.exp, d)) for v in d]
            total += sum(a * math.log(a / b) for a, b in zip(p, q))
        elif objective == "mse":
            total += sum((a - sum(d) / n - b + sum(c) / n) ** 2 for a, b in zip(d, c)) / n
        elif objective == "margin":
            total += sum(((d[0] - d[j]) - (c[0] - c[j])) ** 2 for j in range(1, n)) / (n - 1)
        elif objective == "label":
            total -= math.log(math.exp(d[0]) / sum(map(math.exp, d)))
        else:
            best_first = sorted(range(1, n), key=lambda j: -c[j])
            for place, j in enumerate(best_first):
                rest = sum(math.exp(d[other]) for other in best_first[place:])
                total -= math.log(math.exp(d[j]) / rest)
    return total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distillation_objectives_equal_their_formulas(objective, temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5), 3 * torch.randn(6, 5)
    teacher[::2, 0] += 9  # half of the teacher's rows have the positive first
    result = distillation_loss(student, teacher, objective, temperature).item()
    assert result == pytest.approx(slow_distillation(student, teacher, objective, temperature),
                                   rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_teacher_is_not_taught_and_no_negatives_teach_nothing(objective):
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    distillation_loss(student, teacher + torch.tensor([9.0, 0, 0, 0]), objective).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    assert distillation_loss(student[:, :1], teacher[:, :1], objective).item() == 0


def test_an_unknown_objective_is_an_error():
    with pytest.raises(ValueError, match="cosine"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), "cosine")


# ------------------------------------------------------------------------------------------------
# Hard negatives


@pytest.mark.parametrize("strategy", ["softmax", "topk", "random"])
@pytest.mark.parametrize("scale", [1.0, 1e6])  # 1e6: logits at a tiny temperature
def test_hard_negatives_are_distinct_and_never_positive(strategy, scale):
    torch.manual_seed(0)
    ids = torch.tensor([0, 0, 1, 2, 3, 4, 5, 0])
    positive = ids[:, None] == ids
    similarity = scale * (torch.randn(8, 8) + 10 * positive)  # positives look the most alike
    for _ in range(50):
        chosen = sample_hard_negatives(similarity, positive, 5, strategy)
        assert chosen.shape == (8, 5)
        assert not positive.gather(1, chosen).any()
        assert all(len(set(row)) == 5 for row in chosen.tolist())


def test_softmax_sampling_has_the_frequencies_of_drawing_without_replacement():
    logits = [1.0, 0.0, 9.0, -1.0, 0.5]  # number 2 is the positive
    positive = torch.tensor([[False, False, True, False, False]])
    weight = {j: math.exp(v) for j, v in enumerate(logits) if j != 2}
    total = sum(weight.values())
    expected = {(a, b): weight[a] / total * weight[b] / (total - weight[a])
                for a in weight for b in weight if a != b}
    torch.manual_seed(0)
    draws = 40_000
    chosen = sample_hard_negatives(torch.tensor([logits]).repeat(draws, 1),
                                   positive.repeat(draws, 1), 2)
    counts = Counter(map(tuple, chosen.tolist()))
    assert set(counts) <= set(expected)
    for pair, probability in expected.items():
        error = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[pair] / draws - probability) < 5 * error


def test_topk_takes_the_most_similar_and_random_ignores_similarity():
    similarity = torch.tensor([[5.0, 1.0, 4.0, 3.0]]).repeat(9000, 1)
    positive = torch.tensor([[True, False, False, False]]).repeat(9000, 1)
    assert set(map(tuple, sample_hard_negatives(similarity, positive, 2, "topk").tolist())) == {
        (2, 3)}
    torch.manual_seed(0)
    counts = Counter(sample_hard_negatives(similarity, positive, 1, "random").flatten().tolist())
    assert all(abs(counts[j] / 9000 - 1 / 3) < 0.03 for j in (1, 2, 3))


def test_queries_with_too_few_negatives_get_fewer_instead_of_positives():
    ids = torch.tensor([0, 0, 0, 1])
    positive = ids[:, None] == ids
    assert sample_hard_negatives(torch.randn(4, 4), positive, 3).shape == (4, 1)
    assert sample_hard_negatives(torch.randn(1, 1), torch.ones(1, 1, dtype=bool), 3).shape == (1, 0)


def test_match_logit_plus_dual_logit_is_the_log_probability_of_the_pair():
    """One kind of image whose text is number j with probability p[j], and a dual encoder that
    believes otherwise. The best logit of a classifier is log(times true / times negative), which
    says what the dual encoder does not: hence --dual-weight 1."""
    torch.manual_seed(0)
    queries, m = 200_000, 2
    p = torch.linspace(1, 3, 12)[torch.randperm(12)]
    p = p / p.sum()
    similarity = torch.randn(12).expand(queries, 12)
    true = p.multinomial(queries, replacement=True)[:, None] == torch.arange(12)
    negatives = sample_hard_negatives(similarity, true, m)
    best = (true.sum(0) / negatives.flatten().bincount()).log()
    assert (best + similarity[0] - p.log()).std() < 0.15
    assert (best - p.log()).std() > 0.5


# ------------------------------------------------------------------------------------------------
# Model


def slow_attention(block, x, source):
    width = x.shape[1] // block.heads
    query, key, value = block.self.query(x), block.self.key(source), block.self.value(source)
    heads = []
    for h in range(block.heads):
        part = slice(h * width, (h + 1) * width)
        weights = (query[:, part] @ key[:, part].T / math.sqrt(width)).softmax(1)
        heads.append(weights @ value[:, part])
    return block.output.LayerNorm(x + block.output.dense(torch.cat(heads, 1)))


def slow_match(model, image_tokens, text_tokens, attention_mask, image_index, text_index):
    """Pair by pair, image tokens repeated, padding cut off."""
    logits = []
    for i, t in zip(image_index.tolist(), text_index.tolist()):
        x = text_tokens[t][attention_mask[t].bool()]
        for layer in model.cross_encoder:
            x = slow_attention(layer.attention, x, x)
            x = slow_attention(layer.crossattention, x, image_tokens[i])
            up = F.gelu(layer.intermediate.dense(x))
            x = layer.output.LayerNorm(x + layer.output.dense(up))
        logits.append(model.match_head(x[0])[0])
    return torch.stack(logits)


@pytest.mark.parametrize("text_layers", [1, 3])
def test_match_equals_pair_by_pair_in_values_and_gradients(text_layers):
    model = tiny_model(text_layers=text_layers)
    pixels, ids, mask = random_batch(model)
    with torch.no_grad():
        tokens = [model.encode_image(pixels)[0], model.encode_text(ids, mask)[0]]
    image_index = torch.tensor([3, 0, 0, 3, 1, 0, 3])  # unsorted, uneven, image 2 never
    text_index = torch.tensor([0, 4, 2, 1, 1, 0, 4])
    results = []
    for function in (type(model).match, slow_match):
        leaves = [t.clone().requires_grad_() for t in tokens]
        model.zero_grad()
        logits = function(model, *leaves, mask, image_index, text_index)
        (logits * torch.arange(1.0, 8.0)).sum().backward()
        results.append([logits.detach(), *(t.grad for t in leaves),
                        *(p.grad for p in model.cross_encoder.parameters())])
    assert results[0][0].std() > 0.01
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


def test_text_padding_changes_neither_embedding_nor_match_logit():
    model = tiny_model()
    pixels, ids, mask = random_batch(model)
    image_tokens, _ = model.encode_image(pixels)
    index = torch.arange(4)
    short = model.encode_text(ids, mask)
    ids, mask = F.pad(ids, (0, 6), value=7), F.pad(mask, (0, 6))
    padded = model.encode_text(ids, mask)
    torch.testing.assert_close(short[1], padded[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.match(image_tokens, short[0], mask[:, :-6], index, index),
        model.match(image_tokens, padded[0], mask, index, index), atol=1e-5, rtol=1e-4)


def test_without_cross_attention_the_split_bert_is_still_that_bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=4, vocab_size=50, hidden_size=32,
                                     num_attention_heads=4, intermediate_size=64)
    bert = transformers.AutoModel.from_config(config).eval()
    _, ids, mask = random_batch(None)
    whole = bert(ids, attention_mask=mask).last_hidden_state[:, 0]
    image = transformers.AutoModel.from_config(transformers.ViTConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=1))
    model = loopitr.LoopITR(image, bert, text_layers=1).eval()
    for layer in model.cross_encoder:
        layer.crossattention.forward = lambda x, layout, image_tokens: x
    seen = []
    model.match_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    index = torch.arange(len(ids))
    model.match(torch.zeros(len(ids), 2, 32), model.encode_text(ids, mask)[0], mask, index, index)
    torch.testing.assert_close(seen[0], whole, atol=1e-5, rtol=1e-4)


def test_embeddings_have_unit_length_and_contract_shapes():
    model = tiny_model()
    pixels, ids, mask = random_batch(model)
    tokens, embedding = model.encode_image(pixels)
    assert tokens.shape == (4, 5, 32) and embedding.shape == (4, 16)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
    tokens, embedding = model.encode_text(ids, mask)
    assert tokens.shape == (5, 9, 32) and embedding.shape == (5, 16)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(5))
    assert model.temperature.shape == () and model.temperature.item() == pytest.approx(0.07)


def test_scores_are_not_rounded_to_bf16_under_autocast():
    model = tiny_model()
    pixels, ids, mask = random_batch(model, images=40, texts=40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        image_tokens, image = model.encode_image(pixels)
        text_tokens, text = model.encode_text(ids, mask)
        dual = model.dual_logits(image, text)
        logits = model.match(image_tokens, text_tokens, mask, torch.arange(40), torch.arange(40))
    for scores in (dual, logits):
        assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())
    torch.testing.assert_close(dual, model.dual_logits(*(
        e.detach() for e in (model.encode_image(pixels)[1], model.encode_text(ids, mask)[1]))),
        atol=1.0, rtol=0.1)


def test_only_parts_that_no_backbone_holds_learn_at_the_fresh_rate():
    model = tiny_model()
    args = argparse.Namespace(lr=1e-5, fresh_lr=1e-4, warmup_steps=1)
    optimizer, _ = loopitr.make_optimizer(model, args, total_steps=10)
    rate = {id(p): (g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups
            for p in g["params"]}
    rates = {name: rate[id(p)] for name, p in model.named_parameters()}
    patch = next(name for name in rates if "patch_embeddings" in name and "weight" in name)
    assert rates[patch] == (1e-5, 0.02)
    assert rates["cross_encoder.0.attention.self.query.weight"] == (1e-5, 0.02)
    assert rates["cross_encoder.0.crossattention.self.query.weight"] == (1e-4, 0.02)
    assert rates["image_projection.bias"] == rates["log_temperature"] == (1e-4, 0)


def test_position_embeddings_are_interpolated_to_another_image_size():
    model = tiny_model()
    assert model.encode_image(torch.randn(2, 3, 48, 48))[0].shape == (2, 10, 32)


def test_one_turn_of_the_loop_equals_the_slow_way():
    model = tiny_model()
    pixels, ids, mask = random_batch(model, images=5, texts=5)
    image_ids, m = torch.tensor([0, 1, 0, 2, 3]), 2  # texts 0 and 2 belong to the same image
    pixels[2] = pixels[0]
    losses = loop_losses(model, (pixels, ids, mask, image_ids), m, "topk", "kl", 2.0)

    image_tokens, image = model.encode_image(pixels)
    text_tokens, text = model.encode_text(ids, mask)
    dual = image @ text.T / 0.07
    labels, logits, student, teacher = [], [], [], []
    every = torch.arange(5)
    cross = torch.stack([slow_match(model, image_tokens, text_tokens, mask,
                                    torch.full((5,), i), every) for i in range(5)])
    for d, c in ((dual, cross), (dual.T, cross.T)):
        for q in range(5):
            negatives = [j for j in range(5) if image_ids[j] != image_ids[q]]
            hard = sorted(negatives, key=lambda j: -d[q, j].item())[:m]
            student.append(d[q, [q, *hard]])
            teacher.append(c[q, [q, *hard]])
            true = [q] if d is dual else []  # the true pairs are in the loss once
            logits.append(c[q, true + hard])
            labels += [1] * len(true) + [0] * m
    student, teacher = torch.stack(student), torch.stack(teacher)
    expected = {
        "contrastive": contrastive_loss(dual, image_ids[:, None] == image_ids),
        "matching": matching_loss(torch.cat(logits), torch.tensor(labels)),
        "distillation": distillation_loss(student, teacher, "kl", 2.0),
        "student_recall": (student.argmax(1) == 0).float().mean(),
        "cross_recall": (teacher.argmax(1) == 0).float().mean(),
        "dual_recall": (image_ids[dual.argmax(1)] == image_ids).float().mean()}
    assert set(losses) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_distillation_reaches_the_dual_heads_but_neither_teacher_nor_temperature():
    model = tiny_model()
    batch = (*random_batch(model, images=5, texts=5), torch.arange(5))
    loop_losses(model, batch, negatives=2)["distillation"].backward()
    for part in (model.image_projection, model.text_projection, model.text_encoder):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0
    for part in (model.cross_encoder, model.match_head):
        assert all(p.grad is None for p in part.parameters())
    assert model.log_temperature.grad.item() == pytest.approx(0, abs=1e-5)


def test_a_batch_of_one_image_trains_without_negatives():
    model = tiny_model()
    batch = (*random_batch(model, images=2, texts=2), torch.tensor([3, 3]))
    losses = loop_losses(model, batch, negatives=2)
    assert all(value.isfinite() for value in losses.values()) and losses["distillation"] == 0


# ------------------------------------------------------------------------------------------------
# Re-ranking


@pytest.mark.parametrize("pairs_per_pass", [3, 1000])
@pytest.mark.parametrize("k", [1, 2, 100])
@pytest.mark.parametrize("dual_weight", [0, 2])
def test_rerank_equals_scoring_every_pair_one_by_one(k, pairs_per_pass, dual_weight):
    model = tiny_model()
    pixels, ids, mask = random_batch(model, images=6, texts=11)
    with torch.no_grad():
        image_tokens, image = model.encode_image(pixels)
        text_tokens, text = model.encode_text(ids, mask)
        dual = (image @ text.T).double()
        before = dual.clone()
        scores = rerank(model, image_tokens, text_tokens, mask, dual, k, dual_weight,
                        pairs_per_pass=pairs_per_pass)
        listed = {(i, t) for i in range(6)
                  for t in sorted(range(11), key=lambda t: -dual[i, t])[:k]}
        listed |= {(i, t) for t in range(11)
                   for i in sorted(range(6), key=lambda i: -dual[i, t])[:k]}
        for i, t in listed:
            expected = slow_match(model, image_tokens, text_tokens, mask, torch.tensor([i]),
                                  torch.tensor([t]))
            assert scores[i, t].item() == pytest.approx(
                expected.item() + dual_weight * dual[i, t].item(), abs=1e-4)
    assert torch.equal(dual, before)  # and the caller's scores are as they were
    rest = [(i, t) for i in range(6) for t in range(11) if (i, t) not in listed]
    assert bool(rest) == (k < 6)
    if rest:
        assert max(scores[p] for p in rest) < min(scores[p] for p in listed)
        assert sorted(rest, key=lambda p: scores[p]) == sorted(rest, key=lambda p: dual[p])


# ------------------------------------------------------------------------------------------------
# Loader


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_loader_reads_karpathy_files(tmp_path):
    entries = [{"filename": f"{n}.jpg", "filepath": "val2014", "split": split, "imgid": n,
                "sentences": [{"raw": f"  caption {n} {c} \n"} for c in range(n)]}
               for n, split in ((1, "train"), (7, "restval"), (5, "val"), (2, "test"))]
    del entries[0]["filepath"]
    records = load_captions(write_json(tmp_path / "d.json", {"images": entries}), "pictures")
    assert [r.split for r in records] == ["train", "train", "val", "test"]
    assert records[0].image == os.path.join("pictures", "1.jpg")
    assert records[1].image == os.path.join("pictures", "val2014", "7.jpg")
    assert [len(r.captions) for r in records] == [1, 7, 5, 2]
    assert records[1].captions[6] == "caption 7 6"
    assert load_captions(tmp_path / "d.json")[0].image == str(tmp_path / "1.jpg")


def test_loader_joins_the_rows_of_one_image(tmp_path):
    rows = [{"image": "f/a.jpg", "caption": " one ", "image_id": 0},
            {"image": "f/b.jpg", "caption": "two", "image_id": 1},
            {"image": "f/a.jpg", "caption": "three", "image_id": 0}]
    records = load_captions(write_json(tmp_path / "flickr30k_retrieval_train.json", rows))
    assert records == [(str(tmp_path / "f/a.jpg"), ["one", "three"], "train"),
                       (str(tmp_path / "f/b.jpg"), ["two"], "train")]
    rows = [{"image": "a.jpg", "caption": ["1", "2", " 3", "4 ", "5"]}]
    records = load_captions(write_json(tmp_path / "coco_karpathy_val.json", rows), "x")
    assert records == [(os.path.join("x", "a.jpg"), ["1", "2", "3", "4", "5"], "val")]


@pytest.mark.parametrize("name, content, message", [
    ("a.json", {"pictures": []}, "unknown form"), ("a_train.json", {"images": [3]}, "unknown form"),
    ("nothing.json", [{"image": "a.jpg", "caption": "x"}], "in its name"),
    ("a_val.json", [{"image": "a.jpg", "caption": " "}], "blank"),
    ("a.json", {"images": [{"filename": "a", "split": "val", "sentences": []}]}, "blank"),
    ("a.json", "", "Karpathy"), ("a.json", None, "Karpathy")])
def test_loader_says_what_is_wrong_with_a_file(tmp_path, name, content, message):
    path = write_json(tmp_path / name, content)
    if content is None:
        path.write_text("")
    with pytest.raises(loopitr.InputError, match=message):
        load_captions(path)


def test_toy_scenes_are_drawn_once_and_say_what_they_show(tmp_path):
    path = make_toy_dataset(tmp_path / "toy", train=8, val=2, test=3)
    records = load_captions(path)
    assert Counter(r.split for r in records) == {"train": 8, "val": 2, "test": 3}
    assert all(os.path.exists(r.image) and len(set(r.captions)) == 2 for r in records)
    checked = 0
    for record in records:  # both objects' colours are in the picture, on the side that is told
        image = Image.open(record.image)
        for caption in record.captions:
            words = caption.split()
            first, second = words[2], words[-2]
            if first == second:
                continue
            where = {colour: [(x, y) for x in range(48) for y in range(48)
                              if image.getpixel((x, y)) == ImageColor.getrgb(colour)]
                     for colour in (first, second)}
            assert all(where.values())
            axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1),
                          "below": (1, 1)}[words[4]]
            ends = [[sign * place[axis] for place in where[colour]] for colour in (first, second)]
            assert max(ends[0]) > min(ends[1])
            checked += 1
    assert checked > 10
    before = path.stat().st_mtime_ns
    make_toy_dataset(tmp_path / "toy", train=99)
    assert path.stat().st_mtime_ns == before


def test_toy_noise_gives_training_captions_to_wrong_images_and_loses_none(tmp_path):
    clean, noisy = (load_captions(make_toy_dataset(
        tmp_path / str(noise), train=20, val=4, test=4, noise=noise)) for noise in (0, 0.3))
    wrong = [set(a.captions) - set(b.captions) for a, b in zip(clean, noisy)]
    assert 10 <= sum(map(len, wrong[:20])) <= 12  # 0.3 of 40 captions; two may be the same words
    assert not any(wrong[20:])
    assert (Counter(text for r in clean for text in r.captions)
            == Counter(text for r in noisy for text in r.captions))


def test_batches_follow_from_seed_and_step_alone(tmp_path):
    records = load_captions(make_toy_dataset(tmp_path / "toy", train=9, val=1, test=1))[:9]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "toy" / "text-model")
    transform = loopitr.image_transform(48, ((0.5,) * 3, (0.2,) * 3), augment=True)
    images = loopitr.Images(records, transform)
    batches = loopitr.Batches(records, images, tokenizer, batch_size=4, seed=3)
    assert batches.per_epoch == 4  # of 18 captions, 2 are left over
    epochs = [[batches[step] for step in range(start, start + 4)] for start in (0, 4)]
    seen = [[tuple(ids.tolist()) for batch in epoch for ids in batch[1][:, :9]] for epoch in epochs]
    assert [len(set(captions)) for captions in seen] == [16, 16] and seen[0] != seen[1]
    for pixels, _, mask, image_ids in epochs[0]:
        assert pixels.shape == (4, 3, 48, 48) and mask.shape[0] == 4
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(*epochs))
    resumed = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(6, 8),
                                          num_workers=1)
    for batch, expected in zip(resumed, epochs[1][2:]):
        for part, expected_part in zip(batch, expected):
            torch.testing.assert_close(part, expected_part, rtol=0, atol=0)
    plain = loopitr.Images(records, loopitr.image_transform(48, ((0.5,) * 3, (0.2,) * 3)))
    pixels, ids, mask, image_ids = loopitr.Batches(records, plain, tokenizer, 4, seed=3)[0]
    for image, words, i in zip(pixels, ids, image_ids.tolist()):  # a caption and ITS image
        assert torch.equal(image, plain[i])
        assert tokenizer.decode(words, skip_special_tokens=True) in records[i].captions


def test_augmentation_changes_images_but_not_their_colours():
    transform = loopitr.image_transform(24, ((0.0,) * 3, (1.0,) * 3), augment=True)
    torch.manual_seed(0)
    images = torch.stack([transform(Image.new("RGB", (30, 40), (180, 0, 0))) for _ in range(60)])
    assert images[:, 1:].max() == 0  # desaturated, lower in contrast or solarised it would be more
    assert len(set(images[:, 0].mean((1, 2)).tolist())) > 5
    pickle.dumps(transform)  # as loader processes that are not forked need it


def test_photos_are_turned_as_their_camera_says(tmp_path):
    photo = Image.new("RGB", (40, 20), "red")
    photo.getexif()[0x0112] = 6  # orientation: lying on its side
    photo.save(tmp_path / "a.jpg", exif=photo.getexif())
    assert loopitr.read_image(tmp_path / "a.jpg").size == (20, 40)


# ------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_toy_dataset(folder / "toy", train=40, val=8, test=12)
    return folder


def command(root, output, *more):
    return ["--root", str(root), "--output", str(output), "--batch-size", "16", "--epochs", "2",
            "--log-every", "1", "--warmup-steps", "2", "--distill-warmup", "0", *map(str, more)]


def log_of(output, key="loss"):
    lines = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def losses_of(output):
    return [[line[name] for name in ("step", "contrastive", "matching", "distillation", "lr")]
            for line in log_of(output)]


@pytest.fixture(scope="session")
def trained(root, tmp_path_factory):
    """The real command, in a process of its own."""
    output = tmp_path_factory.mktemp("runs") / "toy"
    script = Path(loopitr.__file__)
    done = subprocess.run([sys.executable, script, "--train", *command(root, output)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_training_writes_checkpoints_log_picture_and_table(trained):
    output, stdout = trained
    assert {path.name for path in output.iterdir()} == {"best.pt", "last.pt", "log.jsonl",
                                                        "retrieval.png"}
    steps = log_of(output)
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert set(steps[0]) >= {"contrastive", "matching", "distillation", "dual_recall",
                             "student_recall", "cross_recall", "temperature", "lr",
                             "pairs_per_second"}
    splits = [line["split"] for line in log_of(output, "split")]
    assert splits == ["val", "val", "test"]  # the test split is touched once, at the end
    table = stdout.splitlines()
    head = next(i for i, line in enumerate(table) if "TR@1" in line)
    assert "top 16" in table[head - 1] and "12 images, 24 texts" in table[head - 1]
    assert table[head].split() == [*"TR@1 TR@5 TR@10 IR@1 IR@5 IR@10 rsum seconds".split()]
    for name, line in zip(("dual", "cross"), table[head + 1:]):
        values = [float(value) for value in line.removeprefix(f"{name} encoder").split()]
        assert values[6] == pytest.approx(sum(values[:6]), abs=0.5)
        assert values[:6] == pytest.approx(list(log_of(output, "split")[2][name].values())[:6],
                                           abs=0.06)


def test_the_picture_frames_the_right_image(root, tmp_path):
    records = load_captions(root / "toy" / "captions.json")[-12:]
    oracle = torch.eye(12).repeat_interleave(2, dim=1)  # two captions of each image
    loopitr.draw_retrieval(tmp_path / "a.png", records, -oracle, oracle, rows=3)
    picture = Image.open(tmp_path / "a.png")
    width, height = picture.size
    for half, frames in (((0, 0, width // 2, height), 0), ((width // 2, 0, width, height), 3)):
        colours = {colour: count for count, colour in picture.crop(half).getcolors(1 << 20)}
        assert colours.get((50, 205, 50), 0) == frames * (104 ** 2 - 96 ** 2)  # lime green


def test_bf16_trains_and_evaluates_on_any_machine(root, tmp_path):
    assert loopitr.main(["--train", *command(root, tmp_path, "--bf16", "--epochs", 1,
                                             "--freeze-image")]) == 0
    results = []
    for precision in ("--bf16", "--no-bf16"):
        args = loopitr.parse_arguments(["--evaluate", "--output", str(tmp_path), precision])
        model, tokenizer = loopitr.build_model(args.image_model, args.text_model, 2,
                                               init=tmp_path / "best.pt")
        results.append(loopitr.evaluate(
            model, tokenizer, load_captions(root / "toy" / "captions.json")[-12:], args)[1])
    torch.testing.assert_close(*results, rtol=0, atol=0.5)
    assert not torch.equal(*results)


def test_a_huge_dual_weight_leaves_the_dual_order(trained, capsys, tmp_path):
    evaluate = ["--evaluate", "--checkpoint", str(trained[0] / "best.pt"), "--output",
                str(tmp_path), "--dual-weight"]
    for weight, equal in (("1e9", True), ("0", False)):
        assert loopitr.main([*evaluate, weight]) == 0
        dual, cross = [line.split()[2:-1] for line in capsys.readouterr().out.splitlines()[2:4]]
        assert (dual == cross) == equal


def test_evaluate_alone_repeats_the_test_result_and_clamps_k(trained, capsys, tmp_path):
    output, stdout = trained
    assert loopitr.main(["--evaluate", "--checkpoint", str(output / "best.pt"), "--output",
                         str(tmp_path), "--rerank", "1000"]) == 0
    all_pairs = capsys.readouterr().out
    assert "top 24" in all_pairs
    assert loopitr.main(["--evaluate", "--checkpoint", str(output / "best.pt"), "--output",
                         str(tmp_path), "--rerank", "all"]) == 0
    assert [line.split()[:-1] for line in capsys.readouterr().out.splitlines()[1:4]] == [
        line.split()[:-1] for line in all_pairs.splitlines()[1:4]]
    dual = [line.split()[:-1] for text in (stdout, all_pairs) for line in text.splitlines()
            if line.startswith("dual")]
    assert dual[0] == dual[1]


def test_ctrl_c_then_resume_gives_the_losses_of_an_uninterrupted_run(root, trained, tmp_path,
                                                                    monkeypatch, capsys):
    real_step, steps = loopitr.training_step, []

    def step_then_ctrl_c(*args, **kwargs):
        steps.append(1)
        if len(steps) == 7:  # in the middle of the second epoch, and in the middle of a step
            os.kill(os.getpid(), signal.SIGINT)
        return real_step(*args, **kwargs)

    monkeypatch.setattr(loopitr, "training_step", step_then_ctrl_c)
    assert loopitr.main(["--train", *command(root, tmp_path)]) == 130
    assert "--resume" in capsys.readouterr().err and len(steps) == 7
    assert loopitr.main(["--resume", "--output", str(tmp_path)]) == 0
    assert len(steps) == 10
    assert losses_of(tmp_path) == losses_of(trained[0])
    assert log_of(tmp_path, "split")[1]["cross"]["rsum"] == pytest.approx(
        log_of(trained[0], "split")[1]["cross"]["rsum"])


def test_another_seed_gives_another_run(root, trained, tmp_path):
    assert loopitr.main(["--train", *command(root, tmp_path, "--seed", 1)]) == 0
    assert losses_of(tmp_path)[0] != losses_of(trained[0])[0]


def test_options_of_the_loop_reach_it(root, tmp_path, capsys):
    assert loopitr.main(["--train", *command(root, tmp_path, "--epochs", 1, "--distill", "none",
                                             "--negatives", 1, "--sampling", "topk")]) == 0
    assert "distillation" not in log_of(tmp_path)[0]
    assert loopitr.main(["--train", *command(root, tmp_path, "--epochs", 1,
                                             "--matching-weight", 0)]) == 0
    assert "matching" not in log_of(tmp_path)[0] and len(log_of(tmp_path)) == 5
    assert loopitr.main(["--train", *command(root, tmp_path, "--epochs", 2, "--distill", "margin",
                                             "--distill-warmup", 0.5, "--distill-weight", 2)]) == 0
    for line in log_of(tmp_path):  # the term sets in after half of the 10 steps
        weight = 2 * (line["step"] > 5)
        parts = line["contrastive"] + line["matching"] + line["distillation"] * weight
        assert line["loss"] == pytest.approx(parts, abs=1e-3)


def test_negatives_are_random_first_and_val_is_evaluated_each_epoch(root, tmp_path, monkeypatch):
    real, strategies = loopitr.sample_hard_negatives, []
    monkeypatch.setattr(loopitr, "sample_hard_negatives", lambda *args: strategies.append(args[3])
                        or real(*args))
    assert loopitr.main(["--train", *command(root, tmp_path, "--hard-warmup", 0.3,
                                             "--epochs", 3)]) == 0
    assert strategies == ["random"] * 2 * 5 + ["softmax"] * 2 * 10  # 0.3 of 15 steps is 4.5
    assert [line["epoch"] for line in log_of(tmp_path, "split")[:-1]] == [0, 1, 2]


def test_own_captions_and_frozen_image_encoder_from_saved_backbones(root, tmp_path):
    """Any Karpathy file with pre-trained backbones in local folders."""
    for kind in ("image", "text"):
        folder = root / "toy" / f"{kind}-model"
        config = transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / kind)
    (tmp_path / "text" / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    arguments = command(root, tmp_path / "run", "--data", root / "toy" / "captions.json",
                        "--image-model", tmp_path / "image", "--text-model", tmp_path / "text",
                        "--text-layers", 3, "--image-size", 64, "--workers", 1, "--freeze-image")
    assert loopitr.main(["--train", *arguments]) == 0
    saved = loopitr.load_checkpoint(tmp_path / "run" / "best.pt")["model"]
    start = transformers.AutoModel.from_pretrained(tmp_path / "image").state_dict()
    for name, tensor in start.items():
        if "pooler" not in name:
            torch.testing.assert_close(saved[f"image_encoder.{name}"], tensor, rtol=0, atol=0)
    assert losses_of(tmp_path / "run")[-1] != losses_of(tmp_path / "run")[0]
    # Augmented anew in each epoch, and the same again for the same epoch.
    args = loopitr.parse_arguments(["--evaluate", "--output", str(tmp_path / "run")])
    model, _ = loopitr.build_model(args.image_model, args.text_model, 3)
    images = loopitr.Images(load_captions(root / "toy" / "captions.json")[:5],
                            loopitr.image_transform(64, model.pixel_statistics, True))
    first, second, again = (loopitr.frozen_tokens(model, images, args, n) for n in (0, 1, 0))
    assert first.shape == (5, 17, 128) and torch.equal(first, again)
    assert not torch.equal(first, second)


def test_flickr30k_is_read_from_rows_or_karpathy_where_the_readme_puts_them(root, tmp_path):
    folder = tmp_path / "flickr30k"
    (folder / "flickr30k-images").mkdir(parents=True)
    for split in ("train", "val", "test"):
        Image.new("RGB", (8, 8)).save(folder / "flickr30k-images" / f"{split}.jpg")
        write_json(folder / f"flickr30k_{split}.json",
                   [{"image": f"flickr30k-images/{split}.jpg", "caption": ["a", "b"]}])
    args = loopitr.parse_arguments(["--train", "--data", "flickr30k", "--root", str(tmp_path)])
    assert (args.image_size, args.batch_size, args.lr, args.epochs) == (384, 256, 1e-5, 10)
    splits = ("train", "val", "test")
    rows = loopitr.load_splits(args.data, args.root, args.images, splits)
    assert [len(rows[split][0].captions) for split in ("train", "val", "test")] == [2, 2, 2]
    write_json(folder / "dataset_flickr30k.json", {"images": [
        {"filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "c"}]}
        for split in rows]})
    karpathy = loopitr.load_splits(args.data, args.root, args.images, splits)
    assert {s: part[0].image for s, part in karpathy.items()} == {
        s: part[0].image for s, part in rows.items()}
    assert karpathy["test"][0].captions == ["c"]


# ------------------------------------------------------------------------------------------------
# Errors: one line, exit code 2


def fails(capsys, arguments, *messages):
    code = loopitr.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    line, = [line for line in error.splitlines() if line.startswith("loopitr:")]
    assert code == 2 and "Traceback" not in error
    for message in messages:
        assert message in line
    return line


def toy_without(root, folder, change):
    """A copy of the toy captions that `change` has altered; returns the path."""
    content = json.loads((root / "toy" / "captions.json").read_text())
    change(content["images"])
    return write_json(folder / "captions.json", content)


def own_data(root, path):
    """Options to train on the toy images with other captions."""
    return ["--train", "--images", root / "toy", "--image-model", root / "toy" / "image-model",
            "--text-model", root / "toy" / "text-model", "--text-layers", 2, "--image-size", 48,
            "--from-scratch", "--data", path]


def test_errors_of_the_command_line(root, tmp_path, capsys, trained):
    train = ["--train", *command(root, tmp_path)]
    best = trained[0] / "best.pt"
    fails(capsys, [], "--train or --evaluate")
    fails(capsys, [*train, "--rerank", "0"], "--rerank 0")
    fails(capsys, [*train, "--rerank", "some"], "--rerank some")
    for option in ("--epochs", "--warmup-steps", "--log-every", "--batch-size", "--negatives"):
        fails(capsys, [*train, option, "0"], f"{option}: give a number from 1 on")
    fails(capsys, ["--resume", "--output", trained[0], "--batch-size", "8"], "--batch-size 16")
    fails(capsys, [*train, "--negatives", "16"], "--negatives 16", "15")
    fails(capsys, [*train, "--batch-size", "100"], "--batch-size 100", "80 captions")
    fails(capsys, [*train, "--text-layers", "4"], "--text-layers 4")
    fails(capsys, [*train, "--text-model", tmp_path / "none"], "none")
    fails(capsys, ["--resume", "--output", tmp_path / "new"], "last.pt", "train first")
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "none.pt"], "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "text.pt"], "is not a checkpoint")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "foreign.pt"], "is not a checkpoint")
    fails(capsys, ["--evaluate", "--checkpoint", best, "--embedding", "32"], "does not fit",
          "image_projection")


def test_what_does_not_fit_together_is_refused(root, tmp_path, capsys, trained, monkeypatch):
    train = ["--train", *command(root, tmp_path)]
    fails(capsys, [*train, "--accumulate", "3"], "--batch-size 16", "multiple of 3")
    fails(capsys, [*train, "--batch-size", "1"], "--batch-size 1", "no negatives")
    fails(capsys, [*train, "--distill", "rank", "--negatives", "1"], "rank", "--negatives 2")
    fails(capsys, [*train, "--checkpoint", trained[0] / "best.pt"], "--checkpoint", "--init")
    fails(capsys, [*train, "--device", "nowhere"], "--device nowhere")
    for option, value in (("--lr", "0.5"), ("--fresh-lr", "0.5")):
        fails(capsys, ["--resume", "--output", trained[0], option, value], f"{option} 0.001")
    fails(capsys, ["--search", "gone.jpg", "--output", trained[0]], "no photo gone.jpg")
    fails(capsys, [*train, "--text-layers", "1", "--embedding", "8", "--text-model",
                   root / "toy" / "image-model"], "cannot load")
    transformers.DistilBertConfig(dim=32, n_layers=3, n_heads=2, vocab_size=99).save_pretrained(
        tmp_path / "text")
    (tmp_path / "text" / "vocab.txt").write_text(
        (root / "toy" / "text-model" / "vocab.txt").read_text())
    fails(capsys, [*train, "--text-model", tmp_path / "text"], "no BERT")

    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(loopitr, "loop_losses", exhausted)
    fails(capsys, train, "CUDA out of memory", "--accumulate")


def test_defaults_follow_the_start_and_the_data_set():
    def options(*argv):
        args = loopitr.parse_arguments(["--train", "--data", *argv])
        return args.init, args.fresh_lr, args.hard_warmup, args.distill_warmup, args.epochs
    albef = os.path.join("data", "ALBEF_4M.pth")
    assert options("flickr30k") == (albef, 1e-5, 0.0, 0.0, 10)
    assert options("coco") == (albef, 1e-5, 0.0, 0.0, 5)
    assert options("own.json", "--init", "albef") == (albef, 1e-5, 0.0, 0.0, 10)
    assert options("own.json", "--init", "fine-tuned.pth")[1:] == (1e-5, 0.0, 0.0, 10)
    assert options("flickr30k", "--init", "none") == (None, 1e-4, 0.3, 0.4, 10)
    assert options("flickr30k", "--init", "ours.pt") == ("ours.pt", 1e-4, 0.0, 0.0, 10)
    assert options("own.json", "--init", "albef", "--fresh-lr", "1")[1] == 1


def test_a_wrong_option_is_one_line_too(capsys):
    with pytest.raises(SystemExit, match="2"):
        loopitr.main(["--train", "--negatives", "few"])
    line, = capsys.readouterr().err.splitlines()
    assert "--negatives" in line and "few" in line


def test_errors_of_captions_and_images(root, tmp_path, capsys):
    train = [*command(root, tmp_path / "out"), *own_data(root, "")][:-1]
    fails(capsys, [*train, tmp_path / "none.json"], "none.json")
    path = toy_without(root, tmp_path, lambda images: [
        images.remove(entry) for entry in list(images) if entry["split"] == "val"])
    fails(capsys, [*train, path], "the val split has no images")
    path = toy_without(root, tmp_path, lambda images: [
        entry.update(filename=f"gone{n}") for n, entry in enumerate(images[:5])])
    line = fails(capsys, [*train, path], "5 image files are missing", "gone0", "gone2")
    assert "gone3" not in line
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    path = toy_without(root, tmp_path, lambda images: images[3].update(
        filename=str(tmp_path / "broken.png")))
    for workers in (0, 1):
        fails(capsys, [*train, path, "--workers", workers], "broken.png", "cannot be read")
    # Nothing is lost: with the image mended, the run goes on from the step before it.
    step = loopitr.load_checkpoint(tmp_path / "out" / "last.pt")["state"]["step"]
    Image.new("RGB", (48, 48)).save(tmp_path / "broken.png")
    assert loopitr.main(["--resume", "--output", str(tmp_path / "out")]) == 0
    assert [line["step"] for line in log_of(tmp_path / "out")] == list(range(1, 11)) and step < 10


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(root, tmp_path, capsys,
                                                                         monkeypatch):
    real_losses, calls = loopitr.loop_losses, []

    def poisoned(*args, **kwargs):
        losses = real_losses(*args, **kwargs)
        calls.append(1)
        factor = math.nan if len(calls) == 8 else 1
        return {**losses, "contrastive": losses["contrastive"] * factor}

    monkeypatch.setattr(loopitr, "loop_losses", poisoned)
    fails(capsys, ["--train", *command(root, tmp_path, "--log-every", 100)], "nan", "not finite")
    kept = loopitr.load_checkpoint(tmp_path / "last.pt")
    assert kept["state"]["step"] == 7
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


# ------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real HTTP server of tmp_path/served, to which fetch is sent for every address. Names in
    `cut` are broken off half way, though their whole length was announced."""
    folder, cut, asked = tmp_path / "served", set(), []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *_):
            asked.append(f"{self.command} {self.path}")

        def copyfile(self, source, target):
            data = source.read()
            target.write(data[:len(data) // 2] if Path(self.path).name in cut else data)

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    real, port = loopitr.fetch, listener.server_port
    monkeypatch.setattr(loopitr, "fetch", lambda url, *rest: real(
        f"http://127.0.0.1:{port}/{url.rpartition('/')[2]}", *rest))
    yield SimpleNamespace(folder=folder, cut=cut, asked=asked)
    listener.shutdown()


def serve_flickr30k(folder):
    with zipfile.ZipFile(folder / "flickr30k-images.zip", "w") as archive:
        for split in ("train", "val", "test"):
            Image.new("RGB", (8, 8)).save(folder / "one.jpg")
            archive.write(folder / "one.jpg", f"flickr30k-images/{split}.jpg")
            write_json(folder / f"flickr30k_{split}.json",
                       [{"image": f"flickr30k-images/{split}.jpg", "caption": ["a", "b"]}])


def load_flickr30k(root):
    return loopitr.load_splits(["flickr30k"], root, None, ("train", "val", "test"))


def test_flickr30k_arrives_by_itself_and_only_once(server, tmp_path, capsys):
    serve_flickr30k(server.folder)
    splits = load_flickr30k(tmp_path)
    assert {s: len(part[0].captions) for s, part in splits.items()} == dict(train=2, val=2, test=2)
    said = capsys.readouterr().err
    assert "MB; " in said and "research and education" in said
    count = len(server.asked)
    assert load_flickr30k(tmp_path) == splits and len(server.asked) == count
    assert sorted(path.name for path in (tmp_path / "flickr30k").iterdir()) == [
        "flickr30k-images", *(f"flickr30k_{split}.json" for split in ("test", "train", "val"))]


def test_coco_arrives_by_itself(server, tmp_path):
    for split, year in (("train", "train2014"), ("val", "val2014"), ("test", "val2014")):
        name = f"{year}/COCO_{year}_{split}.jpg"
        Image.new("RGB", (8, 8)).save(server.folder / "one.jpg")
        with zipfile.ZipFile(server.folder / f"{year}.zip", "a") as archive:
            archive.write(server.folder / "one.jpg", name)
        write_json(server.folder / f"coco_karpathy_{split}.json",
                   [{"image": name, "caption": "a" if split == "train" else ["a"]}])
    splits = loopitr.load_splits(["coco"], tmp_path, None, ("train", "val", "test"))
    assert splits["test"][0].image.endswith("coco/val2014/COCO_val2014_test.jpg")


@pytest.mark.parametrize("name", ["flickr30k-images.zip", "flickr30k_val.json"])
def test_a_connection_cut_half_way_leaves_nothing_and_can_be_repeated(server, tmp_path, name):
    serve_flickr30k(server.folder)
    server.cut.add(name)
    with pytest.raises(loopitr.InputError, match="run again, or download it by hand"):
        load_flickr30k(tmp_path)
    left = {path.name for path in (tmp_path / "flickr30k").iterdir()}
    assert left == ({"flickr30k-images", "flickr30k_train.json"} if "json" in name else set())
    server.cut.clear()
    assert len(load_flickr30k(tmp_path)["val"]) == 1


def test_a_truncated_zip_or_one_of_wrong_content_is_never_used(server, tmp_path):
    serve_flickr30k(server.folder)
    archive = server.folder / "flickr30k-images.zip"
    whole = archive.read_bytes()
    damaged = bytearray(whole)
    damaged[60] ^= 255  # within the first image
    with zipfile.ZipFile(server.folder / "other.zip", "w") as other:
        other.writestr("readme.txt", "moved")
    with zipfile.ZipFile(server.folder / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("flickr30k-images/1.jpg", "photo")
    packed = bytearray((server.folder / "packed.zip").read_bytes())
    packed[30 + len("flickr30k-images/1.jpg")] = 255  # no deflate block starts so
    for content in (whole[:-100], bytes(damaged), bytes(packed),
                    (server.folder / "other.zip").read_bytes()):
        archive.write_bytes(content)
        with pytest.raises(loopitr.InputError, match="flickr30k-images.zip failed"):
            load_flickr30k(tmp_path)
        assert not list((tmp_path / "flickr30k").iterdir())


def test_without_the_file_or_the_server_the_message_says_what_to_do(server, tmp_path, capsys):
    fails(capsys, ["--train", "--data", "flickr30k", "--root", tmp_path], "404",
          str(tmp_path / "flickr30k" / "flickr30k-images"), "unpack it")


def test_a_karpathy_file_put_there_by_hand_is_used_instead(server, tmp_path):
    serve_flickr30k(server.folder)
    (tmp_path / "flickr30k").mkdir()
    write_json(tmp_path / "flickr30k" / "dataset_flickr30k.json", {"images": [
        {"filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "c"}]}
        for split in ("train", "val", "test")]})
    assert load_flickr30k(tmp_path)["test"][0].captions == ["c"]
    assert not any("json" in line for line in server.asked)


# ------------------------------------------------------------------------------------------------
# ALBEF's checkpoint, against a forward of its architecture in plain PyTorch


def albef_checkpoint(prefix, width=32, blocks=2, layers=4, grid=2, vocabulary=50, embedding=16):
    """Random weights under the names of its file format, with what is to be ignored."""
    torch.manual_seed(3)
    state = {"temp": torch.tensor(0.05)}

    def add(name, *shape):
        state[name] = 0.2 * torch.randn(shape)

    def linear(name, wide, narrow):
        add(f"{name}.weight", wide, narrow)
        add(f"{name}.bias", wide)

    def norm(name):
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    add("visual_encoder.cls_token", 1, 1, width)
    add("visual_encoder.pos_embed", 1, grid ** 2 + 1, width)
    add("visual_encoder.patch_embed.proj.weight", width, 3, 16, 16)
    add("visual_encoder.patch_embed.proj.bias", width)
    norm("visual_encoder.norm")
    for i in range(blocks):
        block = f"visual_encoder.blocks.{i}"
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.fc1", 2 * width, width)
        linear(f"{block}.mlp.fc2", width, 2 * width)
    for name, rows in (("word", vocabulary), ("position", 512), ("token_type", 2)):
        add(f"{prefix}embeddings.{name}_embeddings.weight", rows, width)
    norm(f"{prefix}embeddings.LayerNorm")
    for i in range(layers):
        layer = f"{prefix}encoder.layer.{i}"
        for kind in ("attention", "crossattention")[:1 + (i >= layers // 2)]:
            for part in ("query", "key", "value"):
                linear(f"{layer}.{kind}.self.{part}", width, width)
            linear(f"{layer}.{kind}.output.dense", width, width)
            norm(f"{layer}.{kind}.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", 2 * width, width)
        linear(f"{layer}.output.dense", width, 2 * width)
        norm(f"{layer}.output.LayerNorm")
    linear("vision_proj", embedding, width)
    linear("text_proj", embedding, width)
    linear("itm_head", 2, width)
    wanted = dict(state)
    for name in [*wanted][1:20:7]:
        state[name.replace("visual_encoder.", "visual_encoder_m.")] = torch.zeros(1)
    state.update({"vision_proj_m.weight": torch.zeros(1), "image_queue": torch.zeros(1),
                  "text_queue": torch.zeros(1), "queue_ptr": torch.zeros(1),
                  "text_encoder.cls.predictions.bias": torch.zeros(1),
                  f"{prefix}embeddings.position_ids": torch.arange(512)[None]})
    return state, wanted


def albef_forward(s, prefix, pixels, ids, heads=4, layers=4):
    """One image (3,H,W) and one unpadded text (L,) -> both unit embeddings, match logit."""
    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)

    def attend(q, k, v):
        q, k, v = (t.view(len(t), heads, -1).transpose(0, 1) for t in (q, k, v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    patches = F.conv2d(pixels[None], s["visual_encoder.patch_embed.proj.weight"],
                       s["visual_encoder.patch_embed.proj.bias"], stride=16)
    position = s["visual_encoder.pos_embed"]
    grid = int((position.shape[1] - 1) ** 0.5)
    grown = F.interpolate(position[:, 1:].mT.unflatten(2, (grid, grid)), patches.shape[2:],
                          mode="bicubic", align_corners=False)
    x = torch.cat([s["visual_encoder.cls_token"][0], patches[0].flatten(1).T])
    x = x + torch.cat([position[0, :1], grown[0].flatten(1).T])
    for i in range(2):
        block = f"visual_encoder.blocks.{i}"
        x = x + linear(attend(*linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv")
                              .chunk(3, 1)), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")),
                       f"{block}.mlp.fc2")
    image = norm(x, "visual_encoder.norm", 1e-6)
    x = (s[f"{prefix}embeddings.word_embeddings.weight"][ids]
         + s[f"{prefix}embeddings.position_embeddings.weight"][:len(ids)]
         + s[f"{prefix}embeddings.token_type_embeddings.weight"][0])
    x = norm(x, f"{prefix}embeddings.LayerNorm", 1e-12)
    for i in range(layers):
        if i == layers // 2:
            text = x
        layer = f"{prefix}encoder.layer.{i}"
        for kind in ("attention", "crossattention")[:1 + (i >= layers // 2)]:
            source = x if kind == "attention" else image
            name = f"{layer}.{kind}"
            attended = attend(linear(x, f"{name}.self.query"), linear(source, f"{name}.self.key"),
                              linear(source, f"{name}.self.value"))
            x = norm(x + linear(attended, f"{name}.output.dense"), f"{name}.output.LayerNorm",
                     1e-12)
        up = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(up, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    no, yes = linear(x[0], "itm_head")
    return (F.normalize(linear(image[0], "vision_proj"), dim=0),
            F.normalize(linear(text[0], "text_proj"), dim=0), yes - no)


@pytest.mark.parametrize("prefix, size", [("text_encoder.", 32), ("text_encoder.bert.", 48)])
def test_albef_gives_the_same_embeddings_and_match_logits_here(tmp_path, prefix, size):
    state, wanted = albef_checkpoint(prefix)
    torch.save({"model": state, "epoch": 3}, tmp_path / "albef.pth")
    model, (pixels, ids, mask) = tiny_model(image_layers=2), random_batch(None, size=size)
    loopitr.load_checkpoint(tmp_path / "albef.pth", model)
    model.eval()
    with torch.no_grad():
        image_tokens, images = model.encode_image(pixels)
        text_tokens, texts = model.encode_text(ids, mask)
        pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(len(texts)))
        logits = model.match(image_tokens, text_tokens, mask, *pairs.unbind(1))
    assert model.temperature.item() == pytest.approx(0.05)
    for (i, t), logit in zip(pairs.tolist(), logits):
        image, text, match = albef_forward(wanted, prefix, pixels[i], ids[t][mask[t] > 0])
        torch.testing.assert_close(images[i], image, rtol=0, atol=1e-5)
        torch.testing.assert_close(texts[t], text, rtol=0, atol=1e-5)
        torch.testing.assert_close(logit, match, rtol=1e-5, atol=1e-5)


def test_training_starts_from_albef_and_its_checkpoint_is_evaluated(root, tmp_path, capsys):
    shape = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    vocabulary = (root / "toy" / "text-model" / "vocab.txt").read_text()
    for kind, config in (
            ("vit", transformers.ViTConfig(num_hidden_layers=2, image_size=48, **shape)),
            ("dinov2", transformers.Dinov2Config(num_hidden_layers=2, image_size=32, patch_size=16,
                                                 **shape)),
            ("text", transformers.BertConfig(num_hidden_layers=4, vocab_size=len(
                vocabulary.split()), **shape))):
        config.save_pretrained(tmp_path / kind)
    (tmp_path / "text" / "vocab.txt").write_text(vocabulary)
    state, _ = albef_checkpoint("text_encoder.", vocabulary=len(vocabulary.split()))
    torch.save({"model": state}, tmp_path / "albef.pth")
    train = ["--train", *command(root, tmp_path / "run", "--data", root / "toy" / "captions.json",
                                 "--text-model", tmp_path / "text", "--text-layers", 2,
                                 "--embedding", 16, "--image-size", 64, "--workers", 0,
                                 "--init", tmp_path / "albef.pth", "--image-model")]
    assert loopitr.main([*train, str(tmp_path / "vit")]) == 0
    assert loopitr.main(["--evaluate", "--output", str(tmp_path / "run")]) == 0
    trained, alone = log_of(tmp_path / "run", "k")[-2:]
    assert trained["cross"]["rsum"] == alone["cross"]["rsum"]
    untrained = ["--evaluate", "--checkpoint", tmp_path / "albef.pth", *train[1:-3],
                 "--image-model", tmp_path / "vit"]
    assert loopitr.main([str(option) for option in untrained]) == 0
    best = torch.load(tmp_path / "run" / "best.pt")
    assert best["pixel_statistics"][0][0] == 0.48145466 and best["image_config"]["image_size"] == 32
    fails(capsys, [*train, tmp_path / "dinov2"], "albef.pth", "image encoder is a ViT")


def test_an_albef_checkpoint_that_lacks_a_tensor_is_refused(tmp_path):
    state, _ = albef_checkpoint("text_encoder.")
    del state["text_encoder.encoder.layer.3.crossattention.self.key.weight"]
    torch.save({"model": state}, tmp_path / "albef.pth")
    with pytest.raises(loopitr.InputError, match="cross_encoder.1.crossattention.self.key.weight"):
        loopitr.load_checkpoint(tmp_path / "albef.pth", tiny_model(image_layers=2))


# ------------------------------------------------------------------------------------------------
# Backbones


def save_backbones(folder, name):
    """A tiny pre-trained image model and BERT -> both folders."""
    small = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hidden_layers=2)
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(name, image_size=32, patch_size=16, **small)
    transformers.AutoModel.from_config(config).save_pretrained(folder / name)
    make_toy_dataset(folder / "toy", train=4, val=2, test=2)
    text = transformers.AutoConfig.from_pretrained(folder / "toy" / "text-model")
    transformers.AutoModel.from_config(text).save_pretrained(folder / "toy" / "text-model")
    return folder / name, folder / "toy" / "text-model"


@pytest.mark.parametrize("name", ["vit", "deit", "beit", "dinov2"])
def test_image_encoders_load_their_weights_and_say_how_many(tmp_path, capsys, name):
    image, text = save_backbones(tmp_path, name)
    torch.manual_seed(6)
    model, *_ = loopitr.build_model(image, text, 2)
    said = capsys.readouterr().err
    expected = transformers.AutoModel.from_pretrained(image).state_dict()
    loaded = model.image_encoder.state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded) and len(loaded) > 20
    assert f"{image}: {len(expected)} of {len(expected)} tensors" in said and "fresh: none" in said
    for size in (32, 48):  # at another size than it was trained for, if it can
        if name != "beit" or size == 32:
            tokens, embedding = model.encode_image(torch.randn(2, 3, size, size))
            assert tokens.shape == (2, (size // 16) ** 2 + (2 if name == "deit" else 1), 32)


def test_an_encoder_without_any_of_its_weights_is_an_error(tmp_path, capsys):
    image, text = save_backbones(tmp_path, "vit")
    file, = image.glob("*.safetensors")
    from safetensors.torch import load_file, save_file
    save_file({f"renamed.{key}": value for key, value in load_file(file).items()}, file,
              metadata={"format": "pt"})
    with pytest.raises(loopitr.InputError, match="no weights for ViTModel"):
        loopitr.build_model(image, text, 2)


# ------------------------------------------------------------------------------------------------
# Two processes


def one_step(rank, processes, folder, pairs=8):
    """The gradients of the contrastive loss on this process's part of a fixed batch."""
    model, (pixels, ids, mask) = tiny_model(), random_batch(None, images=pairs, texts=pairs)
    batch = pixels, ids, mask, torch.tensor([0, 1, 2, 3, 0, 4, 5, 1])  # positives across both
    batch = [part.chunk(processes)[rank] for part in batch]
    parallel = model
    if processes > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet",
                                             rank=rank, world_size=processes)
        parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    losses = parallel(batch, negatives=2, objective="none")
    losses["contrastive"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save((losses["contrastive"].detach(), gradients), f"{folder}/{processes}-{rank}")


def test_two_processes_have_the_gradients_of_one_on_the_joined_batch(tmp_path):
    one_step(0, 1, tmp_path)
    torch.multiprocessing.spawn(one_step, (2, tmp_path), nprocs=2)
    loss, gradients = torch.load(tmp_path / "1-0")
    for rank in (0, 1):
        its_loss, its_gradients = torch.load(tmp_path / f"2-{rank}")
        torch.testing.assert_close(its_loss, loss)
        assert set(its_gradients) >= set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(its_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_torchrun_trains_and_its_evaluation_equals_one_process(root, tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         loopitr.__file__, "--train", *command(root, tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 11))
    assert loopitr.main(["--evaluate", "--output", str(tmp_path)]) == 0
    alone = capsys.readouterr().out.splitlines()[-3:-1]
    assert [line.split()[:9] for line in done.stdout.splitlines()[-3:-1]] == [
        line.split()[:9] for line in alone]


def test_a_broken_image_ends_all_processes(root, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    path = toy_without(root, tmp_path, lambda images: images[3].update(
        filename=str(tmp_path / "broken.png")))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", loopitr.__file__,
         *command(root, tmp_path / "out", *own_data(root, path))],
        capture_output=True, text=True, timeout=100)  # the other process shall not wait for it
    assert done.returncode and "cannot be read as an image" in done.stderr


# ------------------------------------------------------------------------------------------------
# Memory and search


def test_accumulation_averages_the_gradients_of_the_parts(root, tmp_path):
    model, (pixels, ids, mask) = tiny_model(), random_batch(None, images=8, texts=8)
    batch = pixels, ids, mask, torch.arange(8)
    args = loopitr.parse_arguments(["--train", "--accumulate", "2", "--batch-size", "8",
                                    "--negatives", "3", "--sampling", "topk", "--device", "cpu"])
    seen = []
    optimizer = SimpleNamespace(zero_grad=model.zero_grad, step=lambda: seen.append(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    loopitr.training_step(model, batch, optimizer, SimpleNamespace(step=lambda: None), args, 1.0)
    model.zero_grad()
    for part in zip(*(tensor.chunk(2) for tensor in batch)):
        losses = loop_losses(model, part, 3, "topk")
        ((losses["contrastive"] + losses["matching"]
          + args.distill_weight * losses["distillation"]) / 2).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_grad_checkpointing_changes_no_loss(root, trained, tmp_path):
    assert loopitr.main(["--train", *command(root, tmp_path, "--grad-checkpointing")]) == 0
    assert losses_of(tmp_path) == losses_of(trained[0])


def test_search_by_words_equals_scoring_every_image(root, trained, tmp_path, capsys):
    words = "a small red circle above a large blue square"
    assert loopitr.main(["--search", words, "--checkpoint", str(trained[0] / "best.pt"),
                         "--rerank", "all", "--dual-weight", "3"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    args = loopitr.parse_arguments(["--evaluate", "--output", str(trained[0])])
    model, tokenizer = loopitr.build_model(args.image_model, args.text_model, 2,
                                           init=trained[0] / "best.pt")
    records = [r for r in load_captions(root / "toy" / "captions.json") if r.split == "test"]
    transform = loopitr.image_transform(48, model.pixel_statistics)
    images = torch.stack([transform(Image.open(record.image)) for record in records])
    with torch.no_grad():
        model.eval()
        tokens, vectors = model.encode_image(images)
        text, mask, vector = loopitr.encode_texts(model, tokenizer, [words])
        index = torch.arange(len(records))
        match = model.match(tokens, text, mask, index, index * 0)
        dual = model.dual_logits(vectors, vector)[:, 0]
    expected = sorted(zip(match.tolist(), dual.tolist(), (r.image for r in records)),
                      key=lambda one: -one[0] - 3 * one[1])
    assert [line[2] for line in printed] == [image for *_, image in expected]
    for line, (one, other, _) in zip(printed, expected):
        assert (float(line[0]), float(line[1])) == pytest.approx((one, other), abs=0.02)
    assert (trained[0] / "search.png").exists()


def test_a_gallery_is_encoded_once_until_a_file_or_the_checkpoint_changes(root, trained, tmp_path,
                                                                         monkeypatch, capsys):
    checkpoint = tmp_path / "run" / "best.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes((trained[0] / "best.pt").read_bytes())
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("more/b.jpg", "blue"), ("c.PNG", "green")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.pdf").write_text("no photo, though Pillow has a name for it")
    (tmp_path / "photos" / "folder.jpg").mkdir()
    real, encoded = loopitr.encode_images, []
    monkeypatch.setattr(loopitr, "encode_images", lambda model, images, *rest, **more: (
        encoded.append(len(images)) or real(model, images, *rest, **more)))
    for query, change, expected in (
            ("a red circle", None, [3, 3]), ("a ring", None, [3]),
            (tmp_path / "photos" / "a.png", None, [1]),
            ("a ring", tmp_path / "photos" / "a.png", [3, 3]), ("a ring", checkpoint, [3, 3])):
        if change:
            os.utime(change, (1, 1))
        encoded.clear()
        assert loopitr.main(["--search", str(query), "--checkpoint", str(checkpoint), "--images",
                             str(tmp_path / "photos")]) == 0
        lines = capsys.readouterr().out.splitlines()[1:-1]
        assert encoded == expected and len(lines) == 3
    assert loopitr.main(["--search", "a ring", "--checkpoint", str(checkpoint), "--images", str(
        tmp_path / "photos"), "--image-size", "64"]) == 0
    assert encoded == [3, 3, 3, 3]  # again, for the other size
    gallery = torch.load(f"{checkpoint}.gallery")
    assert sorted(Path(name).name for name in gallery["names"]) == ["a.png", "b.jpg", "c.PNG"]
    torch.testing.assert_close(gallery["vectors"].norm(dim=1), torch.ones(3))


def test_a_photo_finds_itself_first_by_the_dual_encoder(root, trained, capsys):
    photo = [r for r in load_captions(root / "toy" / "captions.json") if r.split == "test"][3].image
    assert loopitr.main(["--search", photo, "--output", str(trained[0]), "--rerank", "5",
                         "--dual-weight", "0"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert len(lines) == 5 and max(lines, key=lambda line: float(line[1]))[2] == photo
    scores = [float(line[0]) for line in lines]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1  # by its captions
