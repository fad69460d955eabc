"""A distilled student: the lower layers of a copy of the task model, all of whose weights learn the task model's scores."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from benchmarks.comparison.systems import Ready
from benchmarks.front.models import WithoutUpperLayers, accuracy
from revmux.features.store import open_features
from revmux.grouping import EpochSchedule
from revmux.pretrained.loading import load_pretrained
from revmux.training.config import LossConfig
from revmux.training.losses import training_loss
from revmux.training.recipes import named_recipe

BATCH, LEARNING_RATE, WARMUP = 32, 1e-4, 0.05


def distilled_student(ready: Ready, layer: int, epochs: int, seed: int = 0) -> WithoutUpperLayers:
    """Train a student with the loss of all other systems, and keep the epoch that the selection set chooses.

    It starts from the lower layers of the task model. Its layers above are not trained and never run.

    Args:
        ready: the task.
        layer: the layers of the student, 1..L.
        epochs: epochs over the training inputs.
        seed: order of the training inputs.
    """
    pretrained = load_pretrained(ready.backbone)
    teacher = pretrained.backbone.freeze()
    split = pretrained.tokenize(ready.choosing.train, ready.backbone.max_length)
    features = open_features(pretrained, split, [], ready.store).with_tokens()
    selection = pretrained.tokenize(ready.choosing.selection, ready.backbone.max_length)
    student = WithoutUpperLayers(copy.deepcopy(teacher), layer).requires_grad_(True)
    for above in range(layer, teacher.num_layers):
        student.backbone.layer(above).requires_grad_(False)
    loss_of = replace(LossConfig(**named_recipe().loss), infonce_weight=0.0)
    steps = [EpochSchedule(split.lengths, 1, BATCH, seed, epoch) for epoch in range(epochs)]
    total = sum(map(len, steps))
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, WARMUP * total), (total - step) / total)
    )
    best, kept = -1.0, copy.deepcopy(student.state_dict())
    for schedule in steps:
        student.train()
        for groups in schedule.steps():
            batch = features.batch(groups[:, 0])
            assert batch.tokens is not None
            assert batch.teacher_scores is not None
            with torch.autocast("cpu", torch.bfloat16):
                scores = student(batch.tokens).float()
            found = training_loss(
                scores.unsqueeze(1),
                scores.unsqueeze(1),
                batch.labels.unsqueeze(1),
                None,
                batch.teacher_scores.unsqueeze(1),
                loss_of,
            )
            optimizer.zero_grad()
            found["loss"].backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            rate.step()
        reached = accuracy(student, selection)
        if reached > best:
            best, kept = reached, copy.deepcopy(student.state_dict())
    student.load_state_dict(kept)
    return student.eval()
