# SPDX-License-Identifier: MIT
"""Each function against an oracle written the slow and obvious way, then the real command line on
tiny data that the tests draw. Offline; `pytest` runs them all."""
import http.server
import inspect
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
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


def tiny_model(seed=0, text_layers=2, image_layers=1, **options):
    torch.manual_seed(seed)
    shape = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64, initializer_range=0.2)
    image = transformers.AutoModel.from_config(
        transformers.ViTConfig(num_hidden_layers=image_layers, image_size=32, patch_size=16,
                               **shape))
    text = transformers.AutoModel.from_config(
        transformers.BertConfig(num_hidden_layers=4, vocab_size=50, **shape))
    return loopitr.LoopITR(image, text, text_layers, embedding=16, **options).eval()


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


OBJECTIVES = ["kl", "mse", "margin", "label"]


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
        else:
            total -= math.log(math.exp(d[0]) / sum(map(math.exp, d)))
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
        layer.crossattention.forward = lambda x, source, places: x
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


def test_bf16_is_the_default_except_on_a_cpu(here):
    folder = Path("data/toy")
    for device, bf16, enabled in (("cpu", None, False), ("cpu:0", None, False),
                                  ("cpu", True, True), ("meta", None, True),
                                  ("meta", False, False)):
        model, _ = loopitr.build_model(folder / "image-model", folder / "text-model", 48,
                                       scratch=True, bf16=bf16, device=device)
        assert model.autocast.keywords["enabled"] is enabled


def test_scores_are_not_rounded_to_bf16():
    model, exact = tiny_model(bf16=True), tiny_model(bf16=False)
    pixels, ids, mask = random_batch(model, images=40, texts=40)
    scores = []
    for one in (model, exact):
        with torch.no_grad():
            image_tokens, image = one.encode_image(pixels)
            text_tokens, text = one.encode_text(ids, mask)
            dual = image @ text.T / one.temperature
            every = torch.arange(40)
            scores.append((dual, one.match(image_tokens, text_tokens, mask, every, every)))
    for rounded, close in zip(*scores):
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, rounded.bfloat16().float())
        assert not torch.equal(rounded, close)  # bf16 was used inside
        torch.testing.assert_close(rounded, close, atol=1.0, rtol=0.1)


def test_only_layers_that_no_backbone_holds_learn_at_the_new_rate():
    model = tiny_model()
    optimizer = loopitr.make_optimizer(model, lr=1e-5, new_lr=1e-4)
    rate = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rate[id(parameter)] = (group["peak"], group["weight_decay"])
    rates = {name: rate[id(p)] for name, p in model.named_parameters()}
    patch = next(name for name in rates if "patch_embeddings" in name and "weight" in name)
    assert rates[patch] == (1e-5, 0.02)
    assert rates["cross_encoder.0.attention.self.query.weight"] == (1e-5, 0.02)
    assert rates["cross_encoder.0.crossattention.self.query.weight"] == (1e-4, 0.02)
    assert rates["text_encoder.embeddings.LayerNorm.weight"] == (1e-5, 0)
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
        "dual_recall": (student.argmax(1) == 0).float().mean(),
        "cross_recall": (teacher.argmax(1) == 0).float().mean(),
        "temperature": model.temperature.detach()}
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
    assert model.log_temperature.grad is None


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
    """Each query's own shortlist, the candidates that tie with its k-th included."""
    model = tiny_model()
    pixels, ids, mask = random_batch(model, images=6, texts=11)
    ids[3:5], mask[3:5] = ids[2], mask[2]  # three equal captions, so that dual scores tie
    with torch.no_grad():
        image_tokens, image = model.encode_image(pixels)
        text_tokens, text = model.encode_text(ids, mask)
        dual = (image @ text.T).double()
        dual[:, 3:5] = dual[:, 2:3]
        before = dual.clone()
        matrices = rerank(model, image_tokens, text_tokens, mask, dual, k, dual_weight,
                          pairs_per_pass=pairs_per_pass)
        every = torch.cartesian_prod(torch.arange(6), torch.arange(11)).unbind(1)
        match = slow_match(model, image_tokens, text_tokens, mask, *every).view(6, 11)
    assert torch.equal(dual, before)  # the caller's scores are as they were
    expected = match + dual_weight * dual
    for matrix, dual, expected in ((matrices[0], dual, expected),
                                   (matrices[1].T, dual.T, expected.T)):
        listed = [[c for c in range(len(row)) if sorted(row, reverse=True)[:k][-1] <= row[c]]
                  for row in dual.tolist()]
        lowest = min(matrix[q, c].item() for q, row in enumerate(listed) for c in row)
        for q, row in enumerate(listed):
            torch.testing.assert_close(matrix[q, row], expected[q, row], atol=1e-4, rtol=1e-4)
            rest = [c for c in range(dual.shape[1]) if c not in row]
            assert all(matrix[q, c] < lowest for c in rest)
            assert matrix[q, rest].argsort(stable=True).tolist() == (
                dual[q, rest].argsort(stable=True).tolist())


def test_a_silent_cross_encoder_gains_nothing():
    """On captions of which many are equal, so that leaving some of them out would pay."""
    torch.manual_seed(0)
    model = tiny_model()
    torch.nn.init.zeros_(model.match_head.weight)
    pixels, ids, mask = random_batch(model, images=40, texts=80)
    kinds = torch.randint(6, (80,))
    ids, mask = ids[kinds], mask[kinds]
    image_of_text = torch.arange(40).repeat_interleave(2)
    with torch.no_grad():
        image_tokens, image = model.encode_image(pixels)
        text_tokens, text = model.encode_text(ids, mask)
        dual = image @ torch.nn.functional.normalize(torch.randn(6, 16), dim=1)[kinds].T
    alone = recall_at_k(dual, image_of_text)
    for k in (1, 2, 4, 16, 100):
        matrices = rerank(model, image_tokens, text_tokens, mask, dual, k)
        result = recall_at_k(matrices[0], image_of_text, text_to_image=matrices[1])
        assert all(result[name] <= alone[name] + 1e-4 for name in result), k


def test_recall_takes_a_matrix_for_each_direction():
    image_of_text = torch.arange(3)
    result = recall_at_k(torch.eye(3), image_of_text, ks=(1,), text_to_image=-torch.eye(3))
    assert (result["TR@1"], result["IR@1"]) == (100, 0)


# ------------------------------------------------------------------------------------------------
# Captions, images and batches


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_karpathy_files_are_read(tmp_path):
    entries = [{"filename": f"{n}.jpg", "filepath": "val2014", "split": split, "imgid": n,
                "sentences": [{"raw": f"  caption {n} {c} \n"} for c in range(n)]}
               for n, split in ((1, "train"), (7, "restval"), (5, "val"), (2, "test"))]
    del entries[0]["filepath"]
    splits = load_captions(write_json(tmp_path / "d.json", {"images": entries}),
                           images="pictures")
    assert {split: len(images) for split, images in splits.items()} == {
        "train": 2, "val": 1, "test": 1}
    first, second = splits["train"]
    assert first == os.path.join("pictures", "1.jpg")
    assert second == os.path.join("pictures", "val2014", "7.jpg")
    captions = splits["train"][second]
    assert len(captions) == 7 and captions[6] == "caption 7 6"
    assert list(load_captions(tmp_path / "d.json")["train"])[0] == str(tmp_path / "1.jpg")


def test_the_rows_of_one_image_are_joined(tmp_path):
    rows = [{"image": "f/a.jpg", "caption": " one ", "image_id": 0},
            {"image": "f/b.jpg", "caption": "two", "image_id": 1},
            {"image": "f/a.jpg", "caption": "three", "image_id": 0}]
    splits = load_captions(write_json(tmp_path / "flickr30k_retrieval_train.json", rows))
    assert splits == {"train": {str(tmp_path / "f/a.jpg"): ["one", "three"],
                                str(tmp_path / "f/b.jpg"): ["two"]}, "val": {}, "test": {}}
    rows = [{"image": "a.jpg", "caption": ["1", "2", " 3", "4 ", "5"]}]
    splits = load_captions(write_json(tmp_path / "coco_karpathy_val.json", rows), images="x")
    assert splits["val"] == {os.path.join("x", "a.jpg"): ["1", "2", "3", "4", "5"]}


@pytest.mark.parametrize("name, content", [
    ("a.json", {"pictures": []}), ("a_train.json", {"images": [3]}), ("a.json", 5),
    ("nothing.json", [{"image": "a.jpg", "caption": "x"}]),
    ("a_val.json", [{"image": "a.jpg", "caption": " "}]),
    ("a.json", {"images": [{"filename": "a", "split": "val", "sentences": None}]})])
def test_a_file_of_another_form_is_named(tmp_path, name, content):
    with pytest.raises(loopitr.InputError, match=name):
        load_captions(write_json(tmp_path / name, content))


@pytest.mark.parametrize("name", ["captions.json", "trainval.json", "train_and_val.json"])
def test_a_file_of_rows_is_named_after_one_split(tmp_path, name):
    with pytest.raises(loopitr.InputError, match=f"{name} .*is named after its split"):
        load_captions(write_json(tmp_path / name, [{"image": "a.jpg", "caption": "x"}]))


def test_toy_scenes_are_drawn_once_and_say_what_they_show(tmp_path):
    path = make_toy_dataset(tmp_path / "toy", train=8, val=2, test=3)
    splits = load_captions(path)
    assert [len(splits[split]) for split in ("train", "val", "test")] == [8, 2, 3]
    captions_of = splits["train"] | splits["val"] | splits["test"]
    assert all(os.path.exists(path) and len(set(pair)) == 2 for path, pair in captions_of.items())
    checked = 0
    for path, captions in captions_of.items():  # both colours are there, on the side that is told
        image = Image.open(path)
        for caption in captions:
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
    path = tmp_path / "toy" / "captions.json"
    before = path.stat().st_mtime_ns
    assert make_toy_dataset(tmp_path / "toy", train=99) == path
    assert path.stat().st_mtime_ns == before


def clean_slowly(caption):
    """ALBEF's cleaning, character by character."""
    result = ""
    for letter in caption.lower().replace("<person>", "person"):
        if letter in "-/" or letter.isspace():
            result += " "
        elif letter not in ",.'!?\"()*#:;~":
            result += letter
    while "  " in result:
        result = result.replace("  ", " ")
    return result.strip(" ")


def test_captions_are_tokenized_as_albefs(tmp_path):
    captions = [" A dog's  ball, (red); it's \"his\"!\n", "T-shirt/cap ~ #1: <person>?", "a * b",
                "...", "one " * 40]
    words = sorted({word for caption in captions for word in clean_slowly(caption).split()})
    assert words == ["1", "a", "b", "ball", "cap", "dogs", "his", "its", "one", "person", "red",
                     "shirt", "t"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False)
    ids, mask = loopitr.tokenize(tokenizer, captions)
    assert ids.shape == mask.shape == (5, 30)
    for caption, row, attended in zip(captions, ids.tolist(), mask.tolist()):
        expected = [vocabulary.index(word) for word in ["[CLS]", *clean_slowly(caption).split()]]
        expected = expected[:30]  # no [SEP], and long captions are cut
        assert attended == [1] * len(expected) + [0] * (30 - len(expected))
        assert row[:len(expected)] == expected


def test_a_batch_holds_captions_with_their_images(tmp_path):
    records = list(load_captions(
        make_toy_dataset(tmp_path / "toy", train=9, val=1, test=1))["train"].items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "toy" / "text-model")
    transform = loopitr.image_transform(48)
    pairs = [(number, path, both[number % 2]) for number, (path, both) in enumerate(records)]
    pixels, ids, mask, image_ids = loopitr.make_batch(pairs[3:7], transform, tokenizer)
    assert pixels.shape == (4, 3, 48, 48) and image_ids.tolist() == [3, 4, 5, 6]
    for image, words, row, number in zip(pixels, ids, mask, (3, 4, 5, 6)):
        assert torch.equal(image, transform(Image.open(records[number][0])))
        words = tokenizer.decode(words[row > 0], skip_special_tokens=True)
        assert words == records[number][1][number % 2]


def test_augmentation_changes_images_but_not_their_colours():
    transform = loopitr.image_transform(24, augment=True)
    torch.manual_seed(0)
    images = torch.stack([transform(Image.new("RGB", (30, 40), (180, 0, 0))) for _ in range(60)])
    mean, std = (torch.tensor(v)[:, None, None] for v in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    images = images * std + mean
    assert images[:, 1:].max() < 1e-6  # desaturated, lower in contrast, solarised: it would be more
    assert len(set(images[:, 0].mean((1, 2)).tolist())) > 5
    pickle.dumps(transform)  # as loader processes that are not forked need it
    plain, photo = loopitr.image_transform(24), Image.new("RGB", (9, 7), "red")
    assert torch.equal(plain(photo), plain(photo))


def test_photos_are_turned_as_their_camera_says(tmp_path):
    photo = Image.new("RGB", (40, 20), "red")
    photo.getexif()[0x0112] = 6  # orientation: lying on its side
    photo.save(tmp_path / "a.jpg", exif=photo.getexif())
    assert loopitr.read_image(tmp_path / "a.jpg").size == (20, 40)


# ------------------------------------------------------------------------------------------------
# The command line, on toy scenes


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A working folder with a small toy data set."""
    folder = tmp_path_factory.mktemp("toy")
    make_toy_dataset(folder / "data" / "toy", train=40, val=8, test=12)
    return folder


@pytest.fixture
def here(toy, monkeypatch):
    """The test runs in that folder."""
    monkeypatch.chdir(toy)
    return toy


def command(output, *more):
    """Training of two epochs of five steps."""
    return ["--train", "--output", str(output), "--batch-size", "16", "--epochs", "2",
            "--distill-from", "0.5", *map(str, more)]


def run(arguments, folder, launcher=()):
    """The command in a process of its own."""
    return subprocess.run([sys.executable, *launcher, loopitr.__file__, *map(str, arguments)],
                          cwd=folder, capture_output=True, text=True, timeout=200)


def log_of(output, key):
    lines = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def same(a, b):
    """Whether two runs have the same weights and optimiser state, and the same log but for time."""
    one, other = (torch.load(Path(run, "last.pt")) for run in (a, b))
    logs = []
    for run in (a, b):
        logs.append(log_of(run, "epoch"))
        for line in logs[-1]:
            for name in ("dual", "cross"):
                line.get(name, {}).pop("seconds", None)
    moments = []
    for content in (one, other):
        states = content["optimizer"]["state"].values()
        moments.append([value for state in states for value in state.values()])
    return (one["state"] == other["state"] and logs[0] == logs[1]
            and all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
            and all(map(torch.equal, *moments)))


@pytest.fixture(scope="session")
def trained(toy, tmp_path_factory):
    """A finished run, and what the command printed."""
    output = tmp_path_factory.mktemp("runs") / "toy"
    done = run(command(output), toy)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_training_writes_checkpoints_log_picture_and_table(trained):
    output, stdout = trained
    assert {path.name for path in output.iterdir()} == {
        "best.pt", "last.pt", "log.jsonl", "retrieval.png", "image-model", "text-model"}
    first = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    assert first["options"]["batch_size"] == 16 and first["options"]["lr"] == 1e-3
    assert first["options"]["data"] == ["toy"] and first["device"]
    assert first["torch"] == torch.__version__
    assert first["transformers"] == transformers.__version__
    step, = log_of(output, "step")
    assert step["step"] == 10 and step["loss"] == pytest.approx(
        step["contrastive"] + step["matching"] + 0.05 * step["distillation"], abs=1e-4)
    assert set(step) >= {"dual_recall", "cross_recall", "temperature", "lr_factor"}
    splits = [line["split"] for line in log_of(output, "split")]
    assert splits == ["val", "val", "test"]  # the test split is touched once, at the end
    table = stdout.splitlines()
    head = [i for i, line in enumerate(table) if "TR@1" in line][2]  # of val, val, test
    assert all(part in table[head - 1] for part in ("test: 12 images, 24 texts", "top 16"))
    assert table[head].split() == [*"TR@1 TR@5 TR@10 IR@1 IR@5 IR@10 rsum seconds".split()]
    for name, line in zip(("dual", "cross"), table[head + 1:]):
        values = [float(value) for value in line.removeprefix(f"{name} encoder").split()]
        assert values[6] == pytest.approx(sum(values[:6]), abs=0.5)
        assert values[:6] == pytest.approx(list(log_of(output, "split")[2][name].values())[:6],
                                           abs=0.06)
    assert 0 < log_of(output, "split")[2]["dual"]["seconds"] <= log_of(output, "split")[2]["cross"][
        "seconds"]


def test_the_picture_frames_the_right_image(here, tmp_path):
    captions_of = load_captions("data/toy/captions.json")["test"]
    texts = [caption for captions in captions_of.values() for caption in captions]
    queries = list(captions_of), texts, [i // 2 for i in range(24)]
    oracle = torch.eye(12).repeat_interleave(2, dim=1)  # two captions of each image
    loopitr.draw_retrieval(tmp_path / "a.png", *queries, -oracle, oracle, count=3)
    picture = Image.open(tmp_path / "a.png")
    width, height = picture.size
    for half, frames in (((0, 0, width // 2, height), 0), ((width // 2, 0, width, height), 3)):
        colours = {colour: count for count, colour in picture.crop(half).getcolors(1 << 20)}
        assert colours.get((50, 205, 50), 0) == frames * (104 ** 2 - 96 ** 2)  # lime green
    loopitr.draw_retrieval(tmp_path / "b.png", *queries, oracle, oracle)
    assert Image.open(tmp_path / "b.png").size[1] == 32  # nothing changed: only the heading


def test_the_same_command_goes_on_as_if_never_interrupted(here, trained, tmp_path, monkeypatch):
    """Stopped within the second epoch, after it, and within its validation."""
    for name, count in (("loop_losses", 7), ("evaluate", 2), ("rerank", 2)):
        real, calls = getattr(loopitr, name), []

        def stop(*args, **kwargs):
            calls.append(1)
            if len(calls) == count:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(loopitr, name, stop)
            assert loopitr.main(command(tmp_path / name)) == 130
        phase = torch.load(tmp_path / name / "last.pt")["state"]["phase"]
        assert phase == (2 if name == "loop_losses" else 3)  # 3: only to be validated
        assert loopitr.main(command(tmp_path / name)) == 0
        assert same(tmp_path / name, trained[0])


def test_a_finished_run_is_only_tested_again(here, trained, capsys, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("best.pt", "last.pt")}
    assert loopitr.main(command(tmp_path / "run", "--workers", 1)) == 0
    assert table_of(capsys.readouterr().out) == table_of(trained[1])
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}
    assert [line["split"] for line in log_of(tmp_path / "run", "split")] == [
        "val", "val", "test", "test"]
    content = torch.load(tmp_path / "run" / "last.pt")
    content["options"]["images"] = "/before/it/was/moved"
    torch.save(content, tmp_path / "run" / "last.pt")
    assert loopitr.main(command(tmp_path / "run")) == 0
    torch.save({"a": torch.zeros(1)}, tmp_path / "run" / "best.pt")
    fails(capsys, command(tmp_path / "run"), "best.pt is damaged, or no checkpoint")


def table_of(output):
    """Both rows of the last table that was printed, without the seconds."""
    lines = [line.split() for line in output.splitlines()]
    return [line[:9] for line in lines if line[:1] in (["dual"], ["cross"])][-2:]


def test_a_run_with_other_options_is_refused_and_left_as_it_is(here, trained, capsys, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    for option, value, old in (("--lr", "0.5", "{'lr': 0.001}"), ("--epochs", 3, "{'epochs': 2}"),
                               ("--seed", 1, "{'seed': 0}"), ("--negatives", 2, "'negatives': 1"),
                               ("--data", "x.json", "'data': ['toy']")):
        fails(capsys, command(tmp_path / "run", option, value), old, "--output")
    fails(capsys, ["--evaluate", "--output", tmp_path / "run", "--checkpoint",
                   tmp_path / "run" / "best.pt"], "nothing may overwrite", "--output")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    (tmp_path / "run" / "last.pt").unlink()
    fails(capsys, command(tmp_path / "run"), "nothing may overwrite", "--output")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_one_line_and_whole_files(toy, tmp_path, number, code):
    process = subprocess.Popen(
        [sys.executable, loopitr.__file__, *command(tmp_path, "--epochs", 1000)],
        cwd=toy, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # Whoever runs the tests in the background of a shell passes on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 60
    while not (tmp_path / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    line, = [line for line in error.splitlines() if "loopitr" in line]
    assert process.returncode == code and line.startswith("loopitr: stopped")
    assert "Traceback" not in error
    torch.load(tmp_path / "last.pt")


def test_a_run_folder_works_from_anywhere(here, trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained[0], tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    best = str(tmp_path / "moved" / "best.pt")
    before = {path: path.read_bytes() for path in (tmp_path / "moved").glob("*.*")}
    assert loopitr.main(["--evaluate", "--checkpoint", best]) == 0
    assert table_of(capsys.readouterr().out) == table_of(trained[1])
    assert before == {path: path.read_bytes() for path in (tmp_path / "moved").glob("*.*")}
    assert loopitr.main(["--search", "a ring", "--checkpoint", best, "--output", "found"]) == 0
    assert os.listdir() == ["found"] and os.listdir("found") == ["search.png"]


def test_evaluation_writes_only_to_its_output(here, trained, tmp_path, capsys):
    make_toy_dataset(tmp_path / "fresh", train=0, val=0, test=5, seed=1)
    best = str(trained[0] / "best.pt")
    assert loopitr.main(["--evaluate", "--checkpoint", best, "--data",
                         str(tmp_path / "fresh" / "captions.json")]) == 0
    assert "5 images, 10 texts" in capsys.readouterr().out
    assert loopitr.main(["--evaluate", "--checkpoint", best, "--rerank", "24", "--output",
                         str(tmp_path / "all")]) == 0
    assert "top 24" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"log.jsonl", "retrieval.png"}
    assert not (here / "runs").exists()


def test_a_huge_dual_weight_leaves_the_dual_order(here, trained, capsys):
    for weight, equal in (("1e9", True), ("0", False)):
        assert loopitr.main(["--evaluate", "--checkpoint", str(trained[0] / "best.pt"),
                             "--dual-weight", weight]) == 0
        dual, cross = table_of(capsys.readouterr().out)
        assert (dual[2:] == cross[2:]) == equal


def test_each_direction_is_ranked_by_its_own_matrix(here, trained, capsys, monkeypatch):
    right = torch.eye(12).repeat_interleave(2, dim=1)  # two captions of each image
    monkeypatch.setattr(loopitr, "rerank", lambda *_: (right, -right))
    assert loopitr.main(["--evaluate", "--checkpoint", str(trained[0] / "best.pt")]) == 0
    _, cross = table_of(capsys.readouterr().out)
    assert (cross[2], cross[5]) == ("100.0", "0.0")  # TR@1, IR@1


def test_another_seed_gives_another_run(here, trained, tmp_path):
    assert loopitr.main(command(tmp_path, "--seed", 1)) == 0
    assert not same(tmp_path, trained[0])


def test_options_of_the_loop_reach_it(here, tmp_path, monkeypatch):
    real, seen = loopitr.loop_losses, []
    orders = []

    def record(model, batch, **options):
        seen.append(options)
        orders.append(batch[3].tolist())
        return real(model, batch, **options)

    monkeypatch.setattr(loopitr, "loop_losses", record)
    assert loopitr.main(command(tmp_path, "--random-first", 0.3, "--negatives", 3, "--distill",
                                "margin", "--sampling", "topk", "--distill-temperature", 2)) == 0
    assert [options.pop("sampling") for options in seen] == ["random"] * 3 + ["topk"] * 7
    assert all(options == {"negatives": 3, "objective": "margin", "distill_temperature": 2}
               for options in seen)
    assert [line["epoch"] for line in log_of(tmp_path, "split")] == [0, 1, None]
    first, second = sum(orders[:5], []), sum(orders[5:], [])  # all captions, in another order
    assert sorted(first) == sorted(second) == sorted(2 * list(range(40))) and first != second


def test_distillation_sets_in_when_told(here, tmp_path, monkeypatch):
    """Up to there, a run does not depend on its weight; after it, it does."""
    for start, equal in ((0.5, True), (0.4, False)):  # of ten steps, five or four
        weights = []
        for weight in (0, 2):
            output = tmp_path / f"{start}-{weight}"
            stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            with monkeypatch.context() as patch:
                patch.setattr(loopitr, "evaluate", stop)
                assert loopitr.main(command(output, "--distill-weight", weight, "--distill-from",
                                            start)) == 130
            weights.append(torch.load(output / "last.pt")["model"])
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]) == equal


def test_presets_and_the_start_decide_defaults_and_help_shows_them(here, capsys, monkeypatch):
    monkeypatch.setattr(loopitr, "load_checkpoint", lambda path: {"path": path})
    def options(*argv):
        args, start = loopitr.parse_arguments(["--train", "--data", *argv])
        return (start["path"] if start else None, args.new_lr, args.random_first,
                args.distill_from, args.negatives, args.epochs, args.grad_checkpointing)
    albef = "data/ALBEF_4M.pth"
    assert options("flickr30k") == (albef, 1e-5, 0.0, 0.0, 4, 10, True)
    assert options("coco") == (albef, 1e-5, 0.0, 0.0, 4, 5, True)
    assert options("own.json") == (None, 1e-4, 0.3, 0.4, 1, 10, False)
    assert options("own.json", "--init", "albef") == (albef, 1e-5, 0.0, 0.0, 1, 10, False)
    assert options("own.json", "--init", "ours.pt")[:4] == ("ours.pt", 1e-5, 0.0, 0.0)
    assert options("flickr30k", "--init", "backbones")[:5] == (None, 1e-4, 0.3, 0.4, 4)
    assert options("own.json", "--init", "albef", "--new-lr", "1")[1] == 1
    assert options("toy")[:4] == (None, 1e-3, 0.0, 0.4)
    assert options("toy", "--init", "ours.pt")[:4] == ("ours.pt", 1e-3, 0.0, 0.0)
    with pytest.raises(SystemExit, match="0"):
        loopitr.main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # lines may be broken anywhere
    for preset in (*loopitr.PRESETS.values(), loopitr.TRAINED_START):
        assert all(f"'{name}':{value!r}" in text for name, value in preset.items())


def test_own_captions_and_frozen_image_encoder_from_saved_backbones(here, tmp_path, monkeypatch,
                                                                    capsys):
    """Any Karpathy file with pre-trained backbones in local folders."""
    for kind in ("image", "text"):
        folder = here / "data" / "toy" / f"{kind}-model"
        config = transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModel.from_config(config).save_pretrained(tmp_path / kind)
    (tmp_path / "text" / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    train = command(
        tmp_path / "run", "--data", "data/toy/captions.json", "--image-model", tmp_path / "image",
        "--text-model", tmp_path / "text", "--image-size", 64, "--workers", 1,
        "--freeze-image", "--lr", 1e-3)
    assert loopitr.main(train) == 0
    fails(capsys, [*train, "--images", tmp_path], "holds a run with {'images': None}")
    saved = torch.load(tmp_path / "run" / "best.pt")["model"]
    start = transformers.AutoModel.from_pretrained(tmp_path / "image").state_dict()
    names = [name for name in start if "pooler" not in name]
    assert all(torch.equal(saved[f"image_encoder.{name}"], start[name]) for name in names)
    start = transformers.AutoModel.from_pretrained(tmp_path / "text").state_dict()
    moved = [name for name in start if f"text_encoder.{name}" in saved and "weight" in name]
    assert not any(torch.equal(saved[f"text_encoder.{name}"], start[name]) for name in moved)
    monkeypatch.chdir(tmp_path)  # the run knows where its data are
    assert loopitr.main(["--evaluate", "--checkpoint", "run/best.pt"]) == 0


def test_training_starts_from_a_checkpoint_of_ours(here, trained, tmp_path):
    assert loopitr.main(command(tmp_path, "--init", trained[0] / "best.pt", "--lr", 0, "--new-lr",
                                0)) == 0
    start, end = (torch.load(path / "best.pt")["model"] for path in (trained[0], tmp_path))
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_grad_checkpointing_keeps_less_and_changes_nothing(here, trained, tmp_path, monkeypatch):
    real, calls = loopitr.LoopITR.recompute_activations, []
    with monkeypatch.context() as patch:
        patch.setattr(loopitr.LoopITR, "recompute_activations",
                      lambda model: calls.append(1) or real(model))
        assert loopitr.main(command(tmp_path, "--grad-checkpointing")) == 0
    assert calls == [1]
    one, other = (torch.load(path / "last.pt")["model"] for path in (tmp_path, trained[0]))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
    pixels, input_ids, mask = random_batch(None, images=8, texts=8)
    every = torch.arange(8)
    for part in ("image encoder", "text encoder", "cross encoder"):
        kept = []
        for recompute in (False, True):
            model, tensors = tiny_model(image_layers=2).train(), {}
            image_tokens, text_tokens = torch.randn(8, 5, 32), torch.randn(*mask.shape, 32)
            if recompute:
                model.recompute_activations()

            def keep(tensor):
                tensors[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                if part == "image encoder":
                    result = model.encode_image(pixels)
                elif part == "text encoder":
                    result = model.encode_text(input_ids, mask)
                else:
                    result = model.match(image_tokens, text_tokens, mask, every, every)
            weights = {parameter.data_ptr() for parameter in model.parameters()}
            kept.append(sum(tensor.untyped_storage().nbytes()
                            for place, tensor in tensors.items() if place not in weights))
            del result
        assert kept[1] < 0.7 * kept[0], (part, kept)


def test_search_by_words_equals_scoring_every_image(here, trained, tmp_path, capsys):
    words = "a small red circle above a large blue square"
    best = str(trained[0] / "best.pt")
    assert loopitr.main(["--search", words, "--checkpoint", best, "--rerank", "24",
                         "--dual-weight", "3", "--output", str(tmp_path)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    content = loopitr.load_checkpoint(best)
    model, tokenizer = loopitr.build_model(None, None, 48, content)
    model.eval()
    paths = list(load_captions("data/toy/captions.json")["test"])
    transform = loopitr.image_transform(48)
    images = torch.stack([transform(Image.open(path)) for path in paths])
    with torch.no_grad():
        tokens, vectors = model.encode_image(images)
        text, mask, vector = loopitr.encode_texts(model, tokenizer, [words])
        index = torch.arange(len(paths))
        match = model.match(tokens, text, mask, index, index * 0)
        dual = (vectors @ vector.T / model.temperature)[:, 0]
    expected = sorted(zip(match.tolist(), dual.tolist(), paths),
                      key=lambda one: -one[0] - 3 * one[1])
    assert [Path(line[2]).name for line in printed] == [Path(e[2]).name for e in expected]
    for line, (one, other, _) in zip(printed, expected):
        assert [float(number) for number in line[:2]] == pytest.approx(
            [one + 3 * other, other], abs=0.03)
    assert Image.open(tmp_path / "search.png").size[0] > 500


def test_search_in_a_folder_of_photos(here, trained, tmp_path, capsys):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("more/b.jpg", "blue"), ("c.PNG", "green")):
        Image.new("RGB", (20, 30), colour).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.pdf").write_text("no photo, though Pillow has a name for it")
    (tmp_path / "photos" / "folder.jpg").mkdir()
    for rerank, count in (("16", 3), ("2", 2)):
        assert loopitr.main(["--search", "a ring", "--checkpoint", str(trained[0] / "best.pt"),
                             "--data", str(tmp_path / "photos"), "--rerank", rerank,
                             "--output", str(tmp_path / "out")]) == 0
        lines = capsys.readouterr().out.splitlines()[1:-1]
        assert len(lines) == count and all("photos" in line for line in lines)
    fails(capsys, ["--search", "a ring", "--checkpoint", trained[0] / "best.pt", "--data",
                   tmp_path / "photos", tmp_path / "photos" / "more"], "photos")  # not one alone


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


def toy_without(here, folder, change):
    """A copy of the toy captions that `change` has altered; returns the path."""
    content = json.loads((here / "data" / "toy" / "captions.json").read_text())
    change(content["images"])
    return write_json(folder / "captions.json", content)


def own_data(path):
    """Options to train on the toy images with other captions."""
    return ["--images", "data/toy", "--image-model", "data/toy/image-model", "--init", "scratch",
            "--text-model", "data/toy/text-model", "--image-size", 48,
            "--data", path]


def test_errors_of_the_command_line(here, tmp_path, capsys, trained):
    train = command(tmp_path / "new")
    fails(capsys, [*train, "--negatives", "16"], "--negatives 16")
    fails(capsys, [*train, "--batch-size", "100"], "--batch-size 100", "80 captions")
    fails(capsys, [*train, "--device", "nowhere"], "nowhere")
    fails(capsys, [*train, "--text-model", tmp_path / "none"], "none")
    fails(capsys, [*train, "--text-model", "data/toy/image-model"], "cannot load")
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "none.pt"], "none.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "text.pt"],
          "text.pt is damaged, or no checkpoint")
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "foreign.pt"], "foreign.pt into")
    torch.save({"model": {"a": os.getcwd}, "options": {}}, tmp_path / "pickled.pt")
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "pickled.pt"], "pickled.pt is damaged")


@pytest.mark.parametrize("arguments", [
    [], ["--train", "--evaluate"], ["--train", "--negatives", "few"], ["--train", "--unknown"],
    ["--train", "--distill", "rank"]])
def test_a_wrong_option_is_one_line_too(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        loopitr.main(arguments)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_errors_of_captions_and_images(here, tmp_path, capsys):
    train = [*command(tmp_path / "out"), *own_data("")][:-1]
    fails(capsys, [*train, tmp_path / "none.json"], "none.json")
    fails(capsys, [*train, "toy", "more.json"], "toy cannot be read as captions")
    fails(capsys, command(tmp_path / "out", "--images", tmp_path / "photos"), "toy cannot be read")
    assert not (tmp_path / "photos").exists()  # no scenes are drawn among them
    path = toy_without(here, tmp_path, lambda images: [
        images.remove(entry) for entry in list(images) if entry["split"] == "val"])
    fails(capsys, [*train, path], "captions.json: 0 of 0 val images")
    path = toy_without(here, tmp_path, lambda images: [
        entry.update(filename=f"gone{n}") for n, entry in enumerate(images[:5])])
    line = fails(capsys, [*train, path], "5 of 40 train images", "gone0")
    assert "gone1" not in line
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    path = toy_without(here, tmp_path, lambda images: images[3].update(
        filename=str(tmp_path / "broken.png")))
    for workers in (0, 1):
        line = fails(capsys, [*train, path, "--workers", workers], "broken.png", "cannot be read")
        assert line.count("InputError") == 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights(here, tmp_path, capsys,
                                                                         monkeypatch):
    real_losses, calls = loopitr.loop_losses, []

    def poisoned(*args, **kwargs):
        losses = real_losses(*args, **kwargs)
        calls.append(1)
        factor = math.nan if len(calls) == 8 else 1
        return {**losses, "contrastive": losses["contrastive"] * factor}

    monkeypatch.setattr(loopitr, "loop_losses", poisoned)
    fails(capsys, command(tmp_path), "nan", "not finite", "step 8")
    kept = torch.load(tmp_path / "last.pt")
    assert kept["state"]["phase"] == 2
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


@pytest.mark.parametrize("error, message", [
    (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory"),
    (TimeoutError(), "TimeoutError")])  # has no text of its own
def test_memory_that_does_not_suffice_is_one_line(here, tmp_path, capsys, monkeypatch, error,
                                                  message):
    def exhausted(*_, **__):
        raise error
    monkeypatch.setattr(loopitr, "loop_losses", exhausted)
    fails(capsys, command(tmp_path), message)


# ------------------------------------------------------------------------------------------------
# Training: schedule, weights, modes, which epoch is kept


class OneNumber(torch.nn.Module):
    """In the model's place: a parameter, losses of known gradients, what it was called with."""

    def __init__(self):
        super().__init__()
        self.log_temperature = torch.nn.Parameter(torch.tensor(0.0))
        self.temperature, self.calls = torch.tensor(1.0), []

    def forward(self, batch, **options):
        self.calls.append((options["sampling"], self.training))
        return {name: factor * self.log_temperature for name, factor in (
            ("contrastive", 1e-3), ("matching", 2e-3), ("distillation", 4e-3))}


def epoch_of_one_number(tmp_path, epoch, **options):
    """-> the model after `train_epoch`, and rate and gradient of each of 200 steps."""
    args = SimpleNamespace(**{
        "epochs": 2, "random_first": 0.25, "sampling": "topk", "distill_from": 0.4, "negatives": 1,
        "distill_weight": 0.5, "matching_weight": 3.0, "distill": "mse", "device": "cpu",
        "distill_temperature": 1.0, "batch_size": 8, "output": str(tmp_path), "rank": 0}
        | options)
    model, steps = OneNumber(), []
    optimizer = loopitr.make_optimizer(model, lr=1e-3, new_lr=1e-2)
    optimizer.register_step_post_hook(lambda optimizer, *_: steps.append(
        (optimizer.param_groups[0]["lr"], model.log_temperature.grad.item())))
    loopitr.train_epoch(model, [[torch.zeros(1)]] * 200, optimizer, epoch, args)
    return model, steps


def test_rate_weights_and_sampling_follow_the_progress_of_training(tmp_path):
    calls, steps = [], []
    for epoch in (0, 1):
        model, some = epoch_of_one_number(tmp_path, epoch)
        calls += model.calls
        steps += some
    for step, ((sampling, training), (rate, gradient)) in enumerate(zip(calls, steps)):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 400)) / 2
        assert rate == pytest.approx(1e-2 * min((step + 1) / 100, cosine), rel=1e-6)
        assert sampling == ("random" if step < 100 else "topk") and training
        assert gradient == pytest.approx(1e-3 + 3 * 2e-3 + (0.5 * 4e-3 if step >= 160 else 0))
    lines = log_of(tmp_path, "step")
    assert [line["step"] for line in lines] == list(range(10, 401, 10))


def test_large_gradients_are_clipped(tmp_path, monkeypatch):
    _, steps = epoch_of_one_number(tmp_path, 0, matching_weight=1e6)
    assert all(gradient == pytest.approx(1, abs=1e-4) for _, gradient in steps)


@pytest.mark.parametrize("weight, kept", [(1, 1), (0, 0)])  # by re-ranked rsum; by the dual's
def test_the_best_epoch_on_val_is_kept_and_tested(here, tmp_path, monkeypatch, weight, kept):
    seen, dual, cross = [], iter([3, 1, 2, 4]), iter([5, 9, 9, 1])

    def evaluate(model, tokenizer, records, *_):
        seen.append((len(records), model.log_temperature.item(), model.training))
        return {"dual": {"rsum": next(dual)}, "cross": {"rsum": next(cross)}}

    monkeypatch.setattr(loopitr, "evaluate", evaluate)
    assert loopitr.main(command(tmp_path, "--epochs", 3, "--matching-weight", weight, "--distill",
                                "none")) == 0
    assert [count for count, *_ in seen] == [8, 8, 8, 12]  # val, val, val, test
    assert seen[3][1] == seen[kept][1] and len({bias for _, bias, _ in seen[:3]}) == 3
    assert torch.load(tmp_path / "best.pt")["model"]["log_temperature"].item() == seen[kept][1]


def test_training_and_evaluation_have_their_modes_and_transforms(here, tmp_path, monkeypatch):
    seen, transforms = set(), []
    encode, transform = loopitr.LoopITR.encode_image, loopitr.image_transform
    encode_text, match = loopitr.LoopITR.encode_text, loopitr.LoopITR.match

    def record(name, real):
        def method(self, *args):
            seen.add((name, self.training, torch.is_grad_enabled()))
            return real(self, *args)
        return method

    for name, real in (("encode_image", encode), ("encode_text", encode_text), ("match", match)):
        monkeypatch.setattr(loopitr.LoopITR, name, record(name, real))
    monkeypatch.setattr(loopitr, "image_transform", lambda size, augment=False: (
        transforms.append((size, augment)) or transform(size, augment)))
    drawn, draw = [], loopitr.draw_retrieval
    monkeypatch.setattr(loopitr, "draw_retrieval", lambda path, records, *rest: (
        drawn.append(len(records)) or draw(path, records, *rest)))
    assert loopitr.main(command(tmp_path, "--augment", "--epochs", 1)) == 0
    assert drawn == [8, 12]  # examples of val, replaced by those of the test split
    assert seen - {("encode_image", True, True)} == {  # that one is the try of build_model, too
        (name, mode, mode) for name in ("encode_text", "match") for mode in (True, False)} | {
        ("encode_image", False, False)}
    assert transforms == [(48, True), (48, False), (48, False)]  # train, val, test


def test_more_images_and_texts_than_one_batch_keep_their_order(tmp_path):
    model, paths = tiny_model(), []
    for number in range(70):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (32, 32), (3 * number, 255 - 3 * number, 128)).save(paths[-1])
    tokens, embeddings = loopitr.encode_images(model, paths, 32)
    transform = loopitr.image_transform(32)
    with torch.no_grad():
        one = model.encode_image(torch.stack([transform(Image.open(path)) for path in paths]))
    assert tokens.dtype == torch.half
    torch.testing.assert_close(tokens.float(), one[0], atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(embeddings, one[1], atol=1e-5, rtol=1e-4)
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *map(
        str, range(30))]))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    captions = [f"{number % 30} " * (1 + number % 7) for number in range(300)]
    tokens, mask, embeddings = loopitr.encode_texts(model, tokenizer, captions)
    assert len(tokens) == len(mask) == len(embeddings) == 300
    with torch.no_grad():
        for number in (0, 255, 256, 299):
            _, alone = model.encode_text(*loopitr.tokenize(tokenizer, [captions[number]]))
            torch.testing.assert_close(embeddings[number], alone[0], atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------------
# Wrong starts, options, files


def small_config(name, **more):
    if name != "swin":
        more = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64,
                    num_hidden_layers=2) | more
    return transformers.AutoConfig.for_model(name, **more)


@pytest.mark.parametrize("kind, name, more, message", [
    ("text", "mpnet", {}, "MPNetModel"), ("text", "deberta", {}, "DebertaModel"),
    ("text", "bert", {"num_hidden_layers": 1}, "few layers"),
    ("text", "distilbert", {"n_layers": 2, "dim": 32, "n_heads": 2}, "cannot load"),
    ("image", "siglip_vision_model", {"image_size": 48}, "CLS"),
    ("image", "vit_mae", {"image_size": 48}, "CLS"),
    ("image", "swin", {"image_size": 48, "embed_dim": 16, "depths": [1], "num_heads": [2],
                       "window_size": 3}, "CLS")])
def test_models_that_do_not_fit_are_refused(here, tmp_path, capsys, kind, name, more, message):
    small_config(name, **more).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text(
        Path("data/toy/text-model/vocab.txt").read_text())
    options = [f"--{kind}-model", tmp_path / "model"]
    fails(capsys, command(tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_vocabulary_is_refused(here, tmp_path, capsys):
    shutil.copytree("data/toy/text-model", tmp_path / "text")
    (tmp_path / "text" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]")
    fails(capsys, command(tmp_path / "out", "--text-model", tmp_path / "text"), "no vocabulary")
    (tmp_path / "text" / "vocab.txt").unlink()
    fails(capsys, command(tmp_path / "out", "--text-model", tmp_path / "text"), "text")
    assert not (tmp_path / "out").exists()


def test_pre_trained_weights_that_do_not_arrive_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file
    image, text = save_backbones(tmp_path, "vit")
    file, = image.glob("*.safetensors")
    weights = load_file(file)
    key = next(key for key in weights if "layernorm" in key.lower())
    weights[f"renamed.{key}"] = weights.pop(key)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(loopitr.InputError, match="no weights for"):
        loopitr.build_model(image, text, 32)


@pytest.mark.parametrize("option, value", [
    ("--lr", "nan"), ("--lr", "-1"), ("--new-lr", "inf"), ("--image-size", "0"), ("--epochs", "0"),
    ("--batch-size", "-8"), ("--negatives", "0"), ("--workers", "-1"),
    ("--seed", "1" + 40 * "0"), ("--seed", "-1"), ("--random-first", "nan"),
    ("--distill-from", "2"), ("--distill-weight", "nan"), ("--distill-temperature", "0"),
    ("--matching-weight", "-1"),
    ("--dual-weight", "inf"), ("--rerank", "0"), ("--rerank", "some"), ("--rerank", "2.5")])
def test_numbers_out_of_range_are_one_line(capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        loopitr.main(["--train", option, value])
    line, = capsys.readouterr().err.splitlines()
    assert option in line and value in line


def test_an_image_in_two_splits_is_an_error_that_names_it(here, tmp_path, capsys):
    train = [*command(tmp_path / "out"), *own_data("")][:-1]
    entry = {"filename": "images/00003.png", "split": "test", "sentences": [{"raw": "a"}]}
    path = toy_without(here, tmp_path, lambda images: images.append(entry))
    fails(capsys, [*train, path], "00003.png is in the split test, and in another one")
    entry["split"] = "dev"
    path = toy_without(here, tmp_path, lambda images: images.append(entry))
    fails(capsys, [*train, path], "captions.json", "dev")


@pytest.mark.parametrize("content", [
    b"[" * 100_000, b'{"images": [{"filename": 5, "split": "val", "sentences": [{"raw": "a"}]}]}',
    b'{"images": [{"filename": "a", "split": ["val"], "sentences": [{"raw": "a"}]}]}',
    b'{"images": [{"filename": "a", "split": "val", "sentences": [{"raw": 5}]}]}',
    b'{"images": [{"filename": "a", "split": "val", "sentences": [{"raw": "\\ud800"}]}]}',
    b'{"images": 5}', b"5", b"null", b"\xff\xfe", b'{"images": [null]}', b"[]"])
def test_captions_of_a_wrong_kind_are_one_line(here, tmp_path, capsys, content):
    path = tmp_path / "captions_val.json"
    path.write_bytes(content)
    fails(capsys, [*command(tmp_path / "out"), *own_data(path)], "captions_val.json")


def test_rows_whose_captions_are_no_text_are_refused_and_a_bom_is_read(tmp_path):
    path = tmp_path / "a_val.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([{"image": "a.jpg", "caption": "x"}]).encode())
    assert load_captions(path, images="p")["val"] == {os.path.join("p", "a.jpg"): ["x"]}
    for captions in ({"a": 1}, [5], 5, None):
        with pytest.raises(loopitr.InputError, match="a_val.json"):
            load_captions(write_json(path, [{"image": "a.jpg", "caption": captions}]))


def test_an_image_without_captions_is_left_out(here, tmp_path, capsys):
    assert load_captions(write_json(tmp_path / "a_val.json", [
        {"image": "a.jpg", "caption": []}, {"image": "b.jpg", "caption": ["x"]}]))["val"] == {
        str(tmp_path / "b.jpg"): ["x"]}
    path = toy_without(here, tmp_path, lambda images: [
        entry["sentences"].clear() for entry in images if entry["split"] == "test"])
    fails(capsys, [*command(tmp_path / "out"), *own_data(path)], "0 of 0 test images")


def test_files_that_cannot_be_read_or_written_are_named(here, trained, tmp_path, capsys):
    best = trained[0] / "best.pt"
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path], str(tmp_path))
    (tmp_path / "cut.pt").write_bytes(best.read_bytes()[:-1000])
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "cut.pt"], "cut.pt is damaged")
    (tmp_path / "file").write_text("")
    fails(capsys, command(tmp_path / "file"), str(tmp_path / "file"))
    fails(capsys, ["--evaluate", "--checkpoint", best, "--output", tmp_path / "file"], "file")
    content = torch.load(best)
    del content["model"]["match_head.bias"]
    shutil.copytree(trained[0], tmp_path / "run")
    torch.save(content, tmp_path / "run" / "best.pt")
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "run" / "best.pt"], "match_head.bias")
    for part, name in (("optimizer", "state"), ("state", "best")):
        content = torch.load(trained[0] / "last.pt")
        del content[part][name]
        torch.save(content, tmp_path / "run" / "last.pt")
        fails(capsys, command(tmp_path / "run"), "last.pt is damaged", name)
    torch.save({"model": {"visual_encoder.pos_embed": torch.zeros(1, 5, 8)}},
               tmp_path / "run" / "last.pt")
    fails(capsys, command(tmp_path / "run"), "last.pt")


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays_whole(here, trained, tmp_path):
    """The limit on the size of a file makes writes fail as a full disk does."""
    shutil.copytree(trained[0], tmp_path / "run")
    content = torch.load(tmp_path / "run" / "last.pt")
    content["state"]["phase"] = 2  # one of two epochs
    torch.save(content, tmp_path / "run" / "last.pt")
    before = (tmp_path / "run" / "last.pt").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    done = subprocess.run([sys.executable, loopitr.__file__, *command(tmp_path / "run")], cwd=here,
                          capture_output=True, text=True, timeout=200, preexec_fn=limit)
    line, = [line for line in done.stderr.splitlines() if "loopitr" in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr and "last.pt" in line
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_a_save_that_is_interrupted_leaves_the_earlier_checkpoint(here, trained, tmp_path,
                                                                  monkeypatch):
    shutil.copytree(trained[0], tmp_path / "run")
    before = (tmp_path / "run" / "best.pt").read_bytes()

    def half(content, path):
        Path(path).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    args = SimpleNamespace(output=str(tmp_path / "run"), of_run={}, rank=0)
    with pytest.raises(KeyboardInterrupt):
        loopitr.save(args, "best.pt", tiny_model())
    assert (tmp_path / "run" / "best.pt").read_bytes() == before


def test_a_closed_pipe_is_no_traceback(here, trained):
    process = subprocess.Popen(
        [sys.executable, loopitr.__file__, "--evaluate", "--checkpoint", trained[0] / "best.pt"],
        cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 2 and "Traceback" not in error and "Exception" not in error
    assert len([line for line in error.splitlines() if "loopitr" in line]) == 1


# ------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files, name -> bytes. What is wrong with a name is in server.faults:
    cut (breaks off half way), no range, no length, silent, redirect, or a status code."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.server.asked.append(("HEAD", self.path))
        self.send_error(403)

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        fault, content = self.server.faults.get(name), self.server.files.get(name)
        self.server.asked.append(("GET", name, self.headers["Range"]))
        if content is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        if fault == "redirect" and "moved" not in self.path:
            self.send_response(302)
            self.send_header("Location", f"/moved/{name}")
            return self.end_headers()
        start = 0
        if self.headers["Range"] and fault != "no range":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        content = content[start:]
        self.send_response(206 if start else 200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "silent":
            self.wfile.write(content[:1])
            time.sleep(3)
        elif fault == "cut":
            self.wfile.write(content[:len(content) // 2])
        else:
            self.wfile.write(content)


@pytest.fixture
def server(monkeypatch):
    """A real HTTP server on loopback, to which every download is sent."""
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.files, listener.faults, listener.asked = {}, {}, []
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{listener.server_port}"
    monkeypatch.setattr(loopitr, "CAPTIONS", {
        "flickr30k": f"{address}/flickr30k", "coco": f"{address}/coco_karpathy"})
    monkeypatch.setattr(loopitr, "ALBEF", f"{address}/ALBEF_4M.pth")
    monkeypatch.setattr(loopitr, "PHOTOS", dict.fromkeys(loopitr.PHOTOS, address))
    yield listener
    listener.shutdown()


def zip_of(*names):
    """A zip of small photos."""
    photo, content = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(photo, "JPEG")
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, photo.getvalue())
    return content.getvalue()


def offer_flickr30k(server):
    splits = ("train", "val", "test")
    server.files["flickr30k-images.zip"] = zip_of(*(f"flickr30k-images/{s}.jpg" for s in splits))
    for split in splits:
        server.files[f"flickr30k_{split}.json"] = json.dumps(
            [{"image": f"flickr30k-images/{split}.jpg", "caption": ["a", "b"]}]).encode()


def load(name, root, train=True):
    return loopitr.load_splits(SimpleNamespace(data=[name], images=str(root / name), train=train,
                                               search=None))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = ["flickr30k-images", "flickr30k_test.json", "flickr30k_train.json", "flickr30k_val.json"]


@pytest.mark.parametrize("fault", [None, "redirect", "no length", "no range"])
def test_flickr30k_arrives_with_one_get_a_file_photos_last(server, tmp_path, fault):
    offer_flickr30k(server)
    server.faults = dict.fromkeys(server.files, fault)
    splits = load("flickr30k", tmp_path)
    assert all(list(part.values()) == [["a", "b"]] for part in splits.values())
    assert names_in(tmp_path / "flickr30k") == WHOLE
    assert all(method == "GET" for method, *_ in server.asked)
    assert len(server.asked) == 4 * (1 + (fault == "redirect"))
    assert server.asked[-1][1] == "flickr30k-images.zip"
    server.asked.clear()
    assert load("flickr30k", tmp_path) == splits and server.asked == []  # it is all there


def test_coco_fetches_only_what_the_command_needs(server, tmp_path):
    for split, year in (("train", "train2014"), ("val", "val2014"), ("test", "val2014")):
        names = [f"{year}/COCO_{year}_{split}.jpg" for split in ("train", "val", "test")]
        server.files[f"{year}.zip"] = zip_of(*names)
        server.files[f"coco_karpathy_{split}.json"] = json.dumps(
            [{"image": f"{year}/COCO_{year}_{split}.jpg", "caption": "a"}]).encode()
    splits = load("coco", tmp_path, train=False)
    assert [name for _, name, _ in server.asked] == ["coco_karpathy_test.json", "val2014.zip"]
    assert list(splits["test"])[0].endswith("coco/val2014/COCO_val2014_test.jpg")
    load("coco", tmp_path)
    assert names_in(tmp_path / "coco") == [
        "coco_karpathy_test.json", "coco_karpathy_train.json", "coco_karpathy_val.json",
        "train2014", "val2014"]


@pytest.mark.parametrize("second", [None, "no range"])
@pytest.mark.parametrize("name", ["flickr30k-images.zip", "flickr30k_val.json"])
def test_a_cut_connection_is_an_error_and_the_next_start_goes_on(server, tmp_path, name, second):
    offer_flickr30k(server)
    server.faults[name] = "cut"
    with pytest.raises(loopitr.InputError, match=f"{name} did not arrive: repeat.* broke"):
        load("flickr30k", tmp_path)
    assert not (tmp_path / "flickr30k" / name.removesuffix(".zip")).exists()
    server.faults[name] = second
    server.asked.clear()
    load("flickr30k", tmp_path)
    assert server.asked[0] == ("GET", name, f"bytes={len(server.files[name]) // 2 - 1}-")
    assert names_in(tmp_path / "flickr30k") == WHOLE


def test_a_start_after_a_kill_needs_no_second_download(server, tmp_path):
    """Killed between the last byte and the new name, or while it was unpacked."""
    offer_flickr30k(server)
    folder = tmp_path / "flickr30k"
    folder.mkdir()
    whole = len(server.files["flickr30k_val.json"])
    (folder / "flickr30k_val.json.part").write_bytes(server.files["flickr30k_val.json"])
    (folder / "flickr30k-images.zip").write_bytes(server.files["flickr30k-images.zip"])
    (folder / "flickr30k-images.zip.unpacked" / "flickr30k-images").mkdir(parents=True)
    (folder / "flickr30k-images.zip.unpacked" / "flickr30k-images" / "val.jpg").write_text("half")
    load("flickr30k", tmp_path)
    assert ("GET", "flickr30k_val.json", f"bytes={whole - 1}-") in server.asked  # its last byte
    assert not any("zip" in name for _, name, _ in server.asked)
    assert names_in(folder) == WHOLE and len(names_in(folder / "flickr30k-images")) == 3
    assert Image.open(folder / "flickr30k-images" / "val.jpg").size == (8, 8)


def test_silence_and_missing_files_are_errors_of_one_line(server, tmp_path, monkeypatch, capsys):
    real = urllib.request.urlopen
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: real(request, timeout=(
        0.3 if timeout == 60 else None)))
    monkeypatch.chdir(tmp_path)
    offer_flickr30k(server)
    for fault, message in (("silent", "timed out"), (404, "404"), (503, "503")):
        server.faults["flickr30k_val.json"] = fault
        with pytest.raises(loopitr.InputError, match=f"val.json did not arrive.*{message}"):
            load("flickr30k", tmp_path)
    fails(capsys, ["--evaluate", "--data", "flickr30k", "--checkpoint", "data/ALBEF_4M.pth"],
          "ALBEF_4M.pth did not arrive", "404", "data/ALBEF_4M.pth")
    assert not list(Path("data").glob("ALBEF*"))


def damaged(content):
    return content[:60] + bytes([content[60] ^ 255]) + content[61:]  # within the first photo


@pytest.mark.parametrize("content, message", [
    (b"<html>log in first</html>", "not a zip"), (zip_of("train.jpg"), "No such file"),
    (zip_of("photos/train.jpg"), "No such file"),
    (zip_of("flickr30k-images/1.jpg")[:-30], "not a zip"),
    (damaged(zip_of("flickr30k-images/1.jpg")), "decompressing|CRC")])
def test_what_is_no_zip_of_the_folder_is_told_apart(server, tmp_path, content, message):
    offer_flickr30k(server)
    good = server.files["flickr30k-images.zip"]
    server.files["flickr30k-images.zip"] = content
    with pytest.raises(loopitr.InputError, match=f"did not unpack.*delete it.*({message})"):
        load("flickr30k", tmp_path)
    assert "flickr30k-images" not in names_in(tmp_path / "flickr30k")
    (tmp_path / "flickr30k" / "flickr30k-images.zip").unlink()  # as the message says
    server.files["flickr30k-images.zip"] = good
    load("flickr30k", tmp_path)
    assert names_in(tmp_path / "flickr30k") == WHOLE


def test_html_instead_of_captions_is_named(server, tmp_path):
    offer_flickr30k(server)
    server.files["flickr30k_val.json"] = b"<html>log in first</html>"
    with pytest.raises(loopitr.InputError, match="flickr30k_val.json cannot be read as captions"):
        load("flickr30k", tmp_path)


def test_a_zip_writes_nothing_outside_its_folder(server, tmp_path):
    offer_flickr30k(server)
    photos = [f"flickr30k-images/{split}.jpg" for split in ("train", "val", "test")]
    server.files["flickr30k-images.zip"] = zip_of("../../evil.jpg", "/evil.jpg", *photos)
    load("flickr30k", tmp_path)
    assert names_in(tmp_path) == ["flickr30k"] and names_in(tmp_path / "flickr30k") == WHOLE


def test_photos_that_are_missing_from_a_folder_name_it(server, tmp_path):
    offer_flickr30k(server)
    load("flickr30k", tmp_path)
    (tmp_path / "flickr30k" / "flickr30k-images" / "val.jpg").unlink()
    with pytest.raises(loopitr.InputError, match="flickr30k: 1 of 1 val images are missing "
                       ".*flickr30k-images/val.jpg.*delete their folder"):
        load("flickr30k", tmp_path)


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
    loopitr.load_albef(model, loopitr.load_checkpoint(tmp_path / "albef.pth")["model"])
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


def test_training_starts_from_albef_and_its_checkpoint_is_evaluated(here, tmp_path, capsys):
    shape = dict(hidden_size=32, num_attention_heads=4, intermediate_size=64)
    vocabulary = Path("data/toy/text-model/vocab.txt").read_text()
    for kind, config in (
            ("vit", transformers.ViTConfig(num_hidden_layers=2, image_size=48, **shape)),
            ("dinov2", transformers.Dinov2Config(num_hidden_layers=2, image_size=32, patch_size=16,
                                                 **shape)),
            ("text", transformers.BertConfig(num_hidden_layers=4, vocab_size=len(
                vocabulary.split()), **shape))):
        config.save_pretrained(tmp_path / kind)
    (tmp_path / "text" / "vocab.txt").write_text(vocabulary)
    state, _ = albef_checkpoint("text_encoder.", vocabulary=len(vocabulary.split()), embedding=256)
    torch.save({"model": state}, tmp_path / "albef.pth")
    data = ["--data", "data/toy/captions.json", "--text-model", tmp_path / "text", "--image-size",
            64, "--workers", 0]
    train = [*command(tmp_path / "run", *data), "--init", str(tmp_path / "albef.pth"),
             "--lr", "1e-3", "--new-lr", "1e-3", "--image-model"]
    assert loopitr.main([*train, str(tmp_path / "vit")]) == 0
    trained = table_of(capsys.readouterr().out)
    assert loopitr.main(["--evaluate", "--checkpoint", str(tmp_path / "run" / "best.pt")]) == 0
    assert table_of(capsys.readouterr().out) == trained
    assert loopitr.main([str(option) for option in (
        "--evaluate", "--checkpoint", tmp_path / "albef.pth", *data, "--image-model",
        tmp_path / "vit")]) == 0
    assert len(table_of(capsys.readouterr().out)) == 2
    config = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "image-model")
    assert config.image_size == 32 and config.layer_norm_eps == 1e-6
    fails(capsys, ["--evaluate", "--checkpoint", tmp_path / "albef.pth", *data, "--image-model",
                   tmp_path / "dinov2"], "albef.pth", "Dinov2Model")


def test_an_albef_checkpoint_that_lacks_a_tensor_is_refused():
    state, _ = albef_checkpoint("text_encoder.")
    del state["text_encoder.encoder.layer.3.crossattention.self.key.weight"]
    with pytest.raises(ValueError, match="no weights for.*cross_encoder.1.crossattention"):
        loopitr.load_albef(tiny_model(image_layers=2), state)


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
def test_image_encoders_load_their_weights(tmp_path, name):
    image, text = save_backbones(tmp_path, name)
    torch.manual_seed(6)
    model, _ = loopitr.build_model(image, text, 32)
    expected = transformers.AutoModel.from_pretrained(image).state_dict()
    loaded = model.image_encoder.state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded) and len(loaded) > 20
    for size in (32, 48):  # at another size than it was trained for, if it can
        if name != "beit" or size == 32:
            tokens, embedding = model.encode_image(torch.randn(2, 3, size, size))
            assert tokens.shape == (2, (size // 16) ** 2 + (2 if name == "deit" else 1), 32)


# ------------------------------------------------------------------------------------------------
# Two processes


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


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
    if processes > 1:
        torch.distributed.destroy_process_group()


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


def test_two_steps_of_two_processes_equal_those_of_one_on_both_halves(toy, tmp_path):
    """All three losses, through the real `train`: contrastive over the joined batch, the others the
    mean of both halves. Adam's moments are compared, which are sums of gradients; its steps are
    not, which turn the noise of gradients that are nearly 0 into full steps."""
    content = json.loads((toy / "data" / "toy" / "captions.json").read_text())
    content["images"] = [entry for n, entry in enumerate(content["images"]) if n < 16 or n >= 40]
    path = write_json(tmp_path / "captions.json", content)
    options = [*command(tmp_path / "run"), *own_data(path), "--images", toy / "data" / "toy",
               "--epochs", 1, "--negatives", 3, "--sampling", "topk", "--distill-from", 0,
               "--random-first", 0, "--no-augment", "--distill-weight", 0.5, "--lr", 1e-3]
    done = run(options, toy, TORCHRUN)
    assert done.returncode == 0, done.stderr

    torch.manual_seed(0)  # --seed
    folder = toy / "data" / "toy"
    model, tokenizer = loopitr.build_model(folder / "image-model", folder / "text-model", 48,
                                           scratch=True)
    captions_of = load_captions(path, images=folder)["train"]
    pairs = [(number, image, caption) for number, image in enumerate(captions_of)
             for caption in captions_of[image]]
    halves = []
    for rank in (0, 1):
        sampler = torch.utils.data.DistributedSampler(pairs, 2, rank, seed=0)
        sampler.set_epoch(0)
        order = list(sampler)
        halves.append([loopitr.make_batch([pairs[i] for i in part], loopitr.image_transform(48),
                                          tokenizer) for part in (order[:8], order[8:16])])
    optimizer = loopitr.make_optimizer(model, 1e-3, 1e-4)
    model.train()
    for step, batches in enumerate(zip(*halves)):
        images = torch.cat([model.encode_image(batch[0])[1] for batch in batches])
        texts = torch.cat([model.encode_text(*batch[1:3])[1] for batch in batches])
        ids = torch.cat([batch[3] for batch in batches])
        loss = contrastive_loss(images @ texts.T / model.temperature, ids[:, None] == ids)
        for batch in batches:
            losses = loop_losses(model, batch, 3, "topk", "mse", 0.5)
            loss = loss + (losses["matching"] + 0.5 * losses["distillation"]) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (step + 1) / 100
        optimizer.step()
    saved = torch.load(tmp_path / "run" / "last.pt")
    state, expected = saved["optimizer"]["state"], optimizer.state_dict()["state"]
    assert set(state) == set(expected) and len(state) > 100
    for number, moments in expected.items():
        assert state[number]["step"] == moments["step"] == 2
        torch.testing.assert_close(state[number]["exp_avg"], moments["exp_avg"], rtol=1e-3,
                                   atol=1e-6)
    weights = model.state_dict()
    assert all((saved["model"][name] - weights[name]).abs().max() < 1e-4 for name in weights)


def test_torchrun_trains_and_its_evaluation_equals_one_process(here, tmp_path, capsys):
    done = run(command(tmp_path), here, TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path, "step")[0]["step"] == 10
    assert loopitr.main(["--evaluate", "--checkpoint", str(tmp_path / "best.pt")]) == 0
    assert table_of(capsys.readouterr().out) == table_of(done.stdout)


def test_a_broken_image_ends_all_processes(here, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    path = toy_without(here, tmp_path, lambda images: images[3].update(
        filename=str(tmp_path / "broken.png")))
    done = run([*command(tmp_path / "out"), *own_data(path)], here, TORCHRUN)
    assert done.returncode and "cannot be read as an image" in done.stderr


# ------------------------------------------------------------------------------------------------
# What the README and the docstrings promise


def test_every_function_and_option_that_the_readme_names_exists():
    text = Path(loopitr.__file__).with_name("README.md").read_text()
    parts = [re.search(rf"## {title}.*?(?=\n## )", text, re.S)[0] for title in (
        "Where to find what", "Implementation details", "Copying pieces")]
    names = set(re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", "".join(parts))) - {
        "F", "nn", "SPDX", "match", "eval", "device", "autocast", "cross_encoder", "match_head",
        "dual_weight"}
    assert names >= {"LoopITR", "sample_hard_negatives", "loop_losses", "distillation_loss",
                     "gather", "rerank", "recall_at_k", "evaluate", "tokenize", "LoopITR.match"}
    for name in names:
        thing = loopitr
        for part in name.split("."):
            thing = getattr(thing, part)
    options = set(re.findall(r"(--[a-z][a-z0-9-]+)", text)) - {"--nproc", "--shm-size"}
    known = {option for action in loopitr.argument_parser()._actions
             for option in action.option_strings}
    assert options - {"--nproc_per_node"} <= known


def test_what_a_reader_copies_has_the_defaults_of_training():
    defaults = {name: parameter.default for function in (distillation_loss, loop_losses)
                for name, parameter in inspect.signature(function).parameters.items()}
    args = loopitr.argument_parser().parse_args(["--train"])
    assert (defaults["objective"], defaults["temperature"], defaults["distill_temperature"]) == (
        args.distill, args.distill_temperature, args.distill_temperature)
    assert (defaults["negatives"], defaults["sampling"]) == (args.negatives, args.sampling)
