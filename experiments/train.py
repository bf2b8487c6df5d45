"""One cell's training, through the product as a user would run it: from_pretrained, LongLoraConfig, the Trainer.

Called by `run`.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
from cells import Cell
from course import Course, cut_rows
from losses import token_losses
from peft import PeftModel, get_peft_model
from records import answer_losses
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from work import attention_share, layer_share, shape_of

from peft_longlora import LongLoraConfig
from peft_longlora.memory.blocks import find_blocks
from peft_longlora.rope.learned import STRETCH


class LongRowTrainer(Trainer):
    """The Trainer with a loss that never holds a whole row's logits (losses.py says why)."""

    losses: list[torch.Tensor]
    course: Course

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "labels" in inputs:
            losses = answer_losses(model, inputs)
            loss = losses.sum() / num_items_in_batch  # an accumulated step is the mean over its tokens
        else:
            losses = token_losses(model, inputs["input_ids"])
            loss = self.course.weigh(self.state.global_step, losses)
        self.losses.append(losses.detach().mean())
        return loss


class Watch(TrainerCallback):
    """Times the steps, prints every tenth, and keeps to the course."""

    def __init__(self, trainer: LongRowTrainer):
        self.trainer, self.seconds = trainer, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.course.begin(state.global_step)
        self.start = _now(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now(args.device) - self.start)
        self.trainer.course.end()
        if state.global_step % 10 == 0 or state.global_step == state.max_steps:
            loss, seconds = self.trainer.losses[-1].item(), statistics.median(self.seconds[-10:])
            print(f"  step {state.global_step}/{state.max_steps}: loss {loss:.4f}, {seconds:.3f} s", flush=True)


def make_model(cell: Cell, folder: str, device: str) -> PeftModel:
    """The base with a new adapter, as the cell's config says.

    Raises: ValueError: a field that the installed LongLoraConfig does not have, or a value that it refuses.
    """
    known = {field.name for field in dataclasses.fields(LongLoraConfig)}
    if unknown := sorted(set(cell.config) - known):
        raise ValueError(f"config has {unknown}, which the installed peft_longlora's LongLoraConfig does not know.")
    skips = dict(skip_positions=True) if cell.training["skip_positions"] else {}
    config = LongLoraConfig(task_type="CAUSAL_LM", **cell.config, **skips)
    torch.manual_seed(cell.seed)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="s2_attn", dtype=dtype).to(device)
    return get_peft_model(model, config)


def train(cell: Cell, model: PeftModel, rows: list[dict[str, list[int]]], device: str) -> dict[str, Any]:
    """Train on the rows, one a forward: {"input_ids"}, and "labels" where only an answer is trained.

    Returns: "loss" of every forward and "step_seconds" of every step, "median_step_seconds", "mean_step_seconds" (of
        the second half: nothing is compiled there any more), "training_seconds" of wall clock, "peak_gib",
        "attention_share".

    Raises: RuntimeError: a loss is not finite.
    """
    options, each = cell.training, cell.training["accumulation"] or 1
    dense_every = cell.config.get("dense_every")
    whole_rows, (rows, before) = rows, cut_rows(rows, options["parts"], dense_every)
    steps = len(rows) // each
    is_cuda = device != "cpu"
    if options["compile"]:
        _compile_blocks(model)
    groups = _parameter_groups(model, options)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=is_cuda)
    course = Course(model, options, steps, dense_every if each == 1 else None)

    def factor(step: int) -> float:
        if not options["parts"]:
            return rate(step, steps, options)
        part = 1.0 if step in course.dense else options["part_rate"] or 1.0
        return part * rate(before[min(step, steps - 1)], len(whole_rows), options)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=1,
            gradient_accumulation_steps=each, seed=cell.seed, use_cpu=not is_cuda,
            max_grad_norm=options["max_grad_norm"], bf16=options["bf16"], train_sampling_strategy="sequential",
            gradient_checkpointing=options["gradient_checkpointing"],
            gradient_checkpointing_kwargs={"use_reentrant": False}, remove_unused_columns=False,
            dataloader_pin_memory=is_cuda, disable_tqdm=True, logging_strategy="no", save_strategy="no",
            report_to="none", use_liger_kernel=options["liger"],
            liger_kernel_config=dict(fused_linear_cross_entropy=False, cross_entropy=False),  # the loss is losses.py's
        )  # fmt: skip
        data = [{name: torch.tensor(value) for name, value in row.items()} for row in rows]
        trainer = LongRowTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
        trainer.losses, trainer.course = [], course
        watch = Watch(trainer)
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(watch)
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
        start = _now(arguments.device)
        trainer.train()
        seconds = _now(arguments.device) - start
    losses = torch.stack(trainer.losses).tolist()
    if not all(map(math.isfinite, losses)) or len(losses) != len(rows):
        raise RuntimeError(f"{cell}: {len(losses)} losses of {len(rows)} forwards, the last of them {losses[-5:]}.")
    lengths = [len(row["input_ids"]) for row in rows]
    shares = [course.share(n // each, partial(_layer_share, model, length)) for n, length in enumerate(lengths)]
    if dense_every and each > 1:  # it counts forwards
        shares = [1.0 if (number + 1) % dense_every == 0 else share for number, share in enumerate(shares)]
    if options["parts"]:  # a step of the line is a row's
        losses = list(map(statistics.fmean, of_rows(losses, before)))
        watch.seconds = list(map(sum, of_rows(watch.seconds, before)))
        dense_every = dense_every and (dense_every - 1) // options["parts"] + 1
    return dict(
        loss=[round(loss, 5) for loss in losses],
        step_seconds=[round(one, 4) for one in watch.seconds],
        median_step_seconds=statistics.median(watch.seconds),
        mean_step_seconds=steady_mean(watch.seconds, dense_every or course.period),
        training_seconds=seconds,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        attention_share=attention_share(lengths, shares, [len(row["input_ids"]) for row in whole_rows]),
        group_size=model.peft_config["default"].applied_group_size,
        trained_parameters=sum(parameter.numel() for group in groups for parameter in group["params"]),
    )


def _compile_blocks(model: nn.Module) -> None:
    """Compile every block by itself: they share their code, so a minute is enough, and the loss stays as it is."""
    torch.compiler.reset()  # a cell before this one had its own
    for block in find_blocks(model):
        block.compile()


def _layer_share(model: PeftModel, length: int, group_size: int) -> float:
    """The share of full attention's pairs in one sparse layer."""
    config, (_, *heads) = model.peft_config["default"], shape_of(model.config.get_text_config())
    return layer_share(config.attention_pattern, length, group_size, *heads, config.chosen_blocks)


def rate(step: int, steps: int, options: dict[str, Any]) -> float:
    """Factor on the learning rates: linear warm-up, then full, then down to near 0 over the last part (`decay`)."""
    warm = min(1.0, (step + 1) / options["warmup_steps"]) if options["warmup_steps"] else 1.0
    return warm * (min(1.0, (steps - step) / (steps * options["decay"])) if options["decay"] else 1.0)


def of_rows(values: list[float], before: list[float]) -> list[list[float]]:
    """What steps have, row by row; `before` as `cut_rows` gives it.

    Example: 1, 2 and 4 of steps that begin after 0, 0.5 and 1 rows: [1, 2] and [4].
    """
    found: list[list[float]] = [[] for _ in range(int(before[-1]) + 1)]
    for value, number in zip(values, before, strict=True):
        found[int(number)].append(value)
    return found


def steady_mean(seconds: list[float], period: int) -> float:
    """Mean of the steps of the second half, a whole number of periods of them where that is possible.

    Example: 150 steps of period 6: of the last 72.
    """
    half = max(1, len(seconds) // 2)
    return statistics.fmean(seconds[-(half // period * period or half) :])


def _parameter_groups(model: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """LoRA's weights at one learning rate, embeddings and norms at another."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    is_lora = {name: "lora_" in name or name.endswith(STRETCH) for name, _ in trained}  # factors of a learned RoPE too
    lora = [parameter for name, parameter in trained if is_lora[name]]
    other = [parameter for name, parameter in trained if not is_lora[name]]
    pairs = (lora, options["learning_rate"]), (other, options["embedding_learning_rate"])
    return [{"params": params, "lr": lr} for params, lr in pairs if params]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
