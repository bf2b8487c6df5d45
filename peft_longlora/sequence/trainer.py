"""Sequence parallelism: ranks share each sequence, and the rest of the training stays data parallel.

Everything but attention works on one token at a time. So for DDP, FSDP and the Trainer, a rank with a stretch of the
sequence is a rank with a batch of its own: they sum the losses over all ranks and divide by the number of all labels,
as always. Two things are different. Every rank gets the same batch and keeps its stretch (`shard_batch`), and attention
exchanges with other ranks (`parallelize_sequence`). `SequenceParallelMixin` does both for a Trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.trainer_utils import has_length

from peft_longlora.data.records import IGNORED
from peft_longlora.sequence.batch import CHECKSUM, SequenceCollator, check_same
from peft_longlora.sequence.edges import gather
from peft_longlora.sequence.switch import parallelize_sequence


class SequenceParallelMixin:
    """Makes a Trainer share each sequence among ranks: `class LongTrainer(SequenceParallelMixin, SFTTrainer): ...`.

    A batch size then counts rows for each group of ranks that share. With 8 processes and sequence_parallel_size=4
    there are two groups, so per_device_train_batch_size=1 means 2 rows a step. With one process nothing changes.

    Args:
        sequence_parallel_size: how many neighbouring ranks share a sequence; None for all ranks. The groups of ranks
            train data parallel.
        args: positional arguments of the Trainer.
        kwargs: its other arguments.

    Raises:
        ValueError: a size that does not divide the number of processes, options with which the losses of stretches
            cannot be summed, or metrics that need predictions. Other errors as `parallelize_sequence`.
        TypeError: a class that names the Trainer before this mixin.

    It is a subclass because transformers, TRL and accelerate accept a shared sequence (`cp_size`, `sp_size`) only for
    their own attention. It overrides the Trainer's methods that make data loaders, `evaluation_loop`, `compute_loss`
    and `call_model_init`.

    Attributes:
        sequence_ranks: how many ranks share a sequence.
        sequence_mesh: this rank's group, if it has more than one rank.
    """

    sequence_ranks = 1
    sequence_mesh: DeviceMesh | None = None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(SequenceParallelMixin)]
        if any(hasattr(one, "train") and not issubclass(one, SequenceParallelMixin) for one in before):
            raise TypeError(
                f"{cls.__name__} names the Trainer before SequenceParallelMixin, so the mixin's methods would never "
                f"run. Write class {cls.__name__}(SequenceParallelMixin, ...)."
            )

    def __init__(self, *args: Any, sequence_parallel_size: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        processes = self.args.world_size
        size = processes if sequence_parallel_size is None else sequence_parallel_size
        if size < 1 or processes % size:
            raise ValueError(
                f"sequence_parallel_size={size} does not divide the {processes} processes. Use a divisor, or "
                f"None for all."
            )
        if size == 1:
            return
        self._check_options()
        # New process groups instead of a mesh over all ranks, so that ddp_timeout holds for them too.
        group, _ = dist.new_subgroups(size, timeout=timedelta(seconds=self.args.ddp_timeout))
        mesh = DeviceMesh.from_group(group, self.args.device.type, mesh_dim_names=("sequence",))
        self.sequence_ranks, self.sequence_mesh = size, mesh
        parallelize_sequence(self.model, mesh)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        pad_token_id = getattr(tokenizer, "pad_token_id", None) or 0
        self.data_collator = SequenceCollator(self.data_collator, mesh.get_local_rank(), mesh.size(), pad_token_id)
        # Each process reads the rows itself, because each must cut its own stretch.
        self.accelerator.dataloader_config.dispatch_batches = False

    def _check_options(self) -> None:
        wrong = {
            "label_smoothing_factor": self.args.label_smoothing_factor,
            "compute_loss_func": self.compute_loss_func,
            "average_tokens_across_devices=False": not self.args.average_tokens_across_devices,
            "a model whose forward takes no loss arguments": not self.model_accepts_loss_kwargs,
            "a Trainer with its own loss": getattr(self, "loss_is_scaled_for_ga", None) is not None,
            "output_router_logits of the model's config": getattr(
                self.model.config.get_text_config(), "output_router_logits", False
            ),
        }
        if found := [name for name, is_set in wrong.items() if is_set]:
            raise ValueError(
                f"Sequence parallelism cannot be used with {', '.join(found)}: the loss of a rank's stretch must be a "
                f"sum over its tokens, divided by the labels of all ranks."
            )
        if self.compute_metrics is not None:
            self._check_loss_only(self.args.prediction_loss_only)

    def _check_loss_only(self, is_loss_only: bool) -> None:
        if not is_loss_only:
            raise ValueError(
                "Sequence parallelism can evaluate only losses: each rank has the logits of its stretch, and the "
                "Trainer would treat them as rows. Leave out compute_metrics, or set prediction_loss_only=True, and "
                "call predict() in one process."
            )

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's, which makes a new model when training begins; the new model shares sequences too."""
        model = super().call_model_init(trial)
        if self.sequence_mesh is not None:
            parallelize_sequence(model, self.sequence_mesh)
        return model

    def get_train_dataloader(self) -> Any:
        """As the Trainer's, with the same batches on all ranks of a sequence."""
        return self._give_group_same_batches(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the same batches on all ranks of a sequence."""
        return self._give_group_same_batches(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with the same batches on all ranks of a sequence."""
        return self._give_group_same_batches(super().get_test_dataloader(*args, **kwargs))

    def _give_group_same_batches(self, loader: Any) -> Any:
        if self.sequence_ranks == 1:
            return loader
        # accelerate distributes batches to processes by these two numbers; here it distributes to groups.
        dealer = loader.batch_sampler if hasattr(loader.batch_sampler, "process_index") else loader.dataset
        if not hasattr(dealer, "process_index"):
            raise ValueError(
                f"{type(loader.dataset).__name__} cannot be distributed to groups of ranks: use a dataset with a "
                f"length, or a stream with fewer shards than processes."
            )
        rows = len(loader.dataset) if has_length(loader.dataset) else -1
        gathered = gather(torch.tensor([rows], device=self.args.device), self.sequence_mesh.get_group())
        found = [x.item() for x in gathered]
        if len(set(found)) > 1:
            raise ValueError(
                f"The ranks that share a sequence were given datasets of {found} rows. Give every rank the same "
                f"dataset, in the same order (the same seed)."
            )
        dealer.num_processes = self.args.world_size // self.sequence_ranks
        dealer.process_index = self.args.process_index // self.sequence_ranks
        if dealer.num_processes == 1:  # as in one process: the last batch is not filled up
            if hasattr(dealer, "even_batches"):
                dealer.even_batches = False
            else:
                dealer.batch_size = 1  # a stream, which is passed on row by row
        return loader

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the Trainer's, with one loss for each group of ranks. Raises: ValueError: predictions are needed."""
        if self.sequence_ranks > 1:
            is_loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
            self._check_loss_only(is_loss_only)
            self.gather_function = self._gather_from_groups
        return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)

    def _gather_from_groups(self, data: Any) -> Any:
        """As `accelerator.gather_for_metrics`, for data that is equal on all ranks of a group, as losses are."""
        if not isinstance(data, torch.Tensor) or data.dim() != 1:
            return self.accelerator.gather_for_metrics(data)
        found = self.accelerator.gather(data).unflatten(0, (-1, self.sequence_ranks, len(data)))[:, 0].flatten()
        state = self.accelerator.gradient_state
        is_short = state.end_of_dataloader and state.remainder > 0
        return found[: state.remainder] if is_short else found

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        """As the Trainer's. In evaluation it is the mean over the labels of the whole sequence, equal on all its ranks.

        Raises:
            ValueError: the ranks of a sequence got different batches (raised on all of them), or nothing averages
                their gradients.
        """
        checksum = inputs.pop(CHECKSUM, None)
        if checksum is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        group = self.sequence_mesh.get_group()
        check_same(checksum, group)
        if self.model.training:
            self._check_wrapped(model)
            with self._counting_every_rank():
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = (inputs["shift_labels"] != IGNORED).sum()
        dist.all_reduce(labels, group=group)
        with self._counting_every_rank():
            result = super().compute_loss(model, inputs, return_outputs, labels.clamp(min=1))
        loss, *others = result if return_outputs else (result,)
        # The Trainer scales the loss up, because gradients are averaged over the processes.
        loss = loss.detach() / self.accelerator.num_processes
        dist.all_reduce(loss, group=group)
        return (loss, *others) if return_outputs else loss

    @contextmanager
    def _counting_every_rank(self) -> Iterator[None]:
        """Keep all ranks in metrics: in a short last batch accelerate treats some as padding and drops them."""
        loader = self.accelerator.gradient_state.active_dataloader
        if loader is None:
            yield
            return
        remainder, loader.remainder = loader.remainder, -1  # as for a dataset without a length
        try:
            yield
        finally:
            loader.remainder = remainder

    def _check_wrapped(self, model: nn.Module) -> None:
        """Refuse a model without DDP: after an evaluation transformers 5.23 trains without it, silently."""
        is_left_to_ddp = self.accelerator.distributed_type.name.startswith("MULTI_")
        model = getattr(model, "_orig_mod", model)  # torch_compile=True adds a wrapper
        if is_left_to_ddp and not isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "The model is not wrapped in DistributedDataParallel, so each rank would train its own model. "
                "Do not call evaluate() before train(); to measure the loss before training, use eval_on_start=True."
            )
