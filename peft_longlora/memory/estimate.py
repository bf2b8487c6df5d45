"""The formula of `plan` from a model's shape, for users who have no GPU yet: `longlora plan`.

The numbers count the tensors of a decoder block with gated feed-forward layers, RoPE and RMSNorm (Llama, Mistral,
Qwen), with Liger's kernels and FlashAttention. tests/memory/test_estimate.py compares them with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from peft_longlora.memory.plan import GIB, MemoryPlan, fill, means_of
from peft_longlora.memory.sizes import COUNTS, SIZES, read_config
from peft_longlora.memory.weights import count_weights

HALF, SINGLE = 2, 4  # bytes of a number
FOUR_BIT = 0.5 + 1 / 64 + 4 / 64 / 256  # NF4: blocks of 64 numbers, whose factors take 8 bits and a factor for 256
ADAM = 2 * SINGLE  # two moments
STEADY_BYTES = int(0.4 * GIB)  # workspaces of cuBLAS, the loss's chunk, tables of RoPE
LOGITS = 12  # bytes a token and vocabulary entry: logits in half and single precision, their gradient


@dataclass(frozen=True)
class Shape:
    """What memory and work of a decoder follow from.

    Attributes:
        hidden: width of the model.
        inner: width of a feed-forward layer.
        query: width of all query heads together.
        key: width of all key heads together.
        heads: query heads.
        blocks: number of blocks.
        vocabulary: rows of the embeddings.
        tied: whether the output layer is the embeddings.
        experts: feed-forward layers of a block.
        active: how many of them a token passes.
        states: blocks of a hybrid with a state or without attention, which are counted as if they only attended.
        sixteen_bit: numbers that a 4-bit base keeps in half precision: experts that are one parameter, and others.
        more: numbers in the blocks beyond those of attention and gated feed-forward layers; below 0 if there are less.
        beside: numbers of other parts than the text model, such as an image encoder.
        routed: numbers in the experts of all blocks.
        stored: how the base is quantised already, "4 bits" (bitsandbytes) or another way's name; "" if it is not.
    """

    hidden: int
    inner: int
    query: int
    key: int
    heads: int
    blocks: int
    vocabulary: int
    tied: bool = False
    experts: int = 1
    active: int = 1
    sixteen_bit: int = 0
    states: int = 0
    more: int = 0
    beside: int = 0
    routed: int = 0
    stored: str = ""

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """The shape of a text model.

        Args:
            config: of a whole model, which says whether its output layer is tied, as transformers reads it there.

        Raises:
            ValueError: the config lacks a size, so this is not a decoder of the usual kind, or as `count_weights`.
        """
        whole, is_tied = config, bool(getattr(config, "tie_word_embeddings", False))
        config = config.get_text_config()
        try:
            heads, hidden = config.num_attention_heads, config.hidden_size
            dim = getattr(config, "head_dim", None) or hidden // heads
            experts, active = (next((n for x in names if (n := getattr(config, x, None))), 1) for names in _EXPERTS)
            shape = cls(
                hidden,
                (experts > 1 and getattr(config, "moe_intermediate_size", None)) or config.intermediate_size,
                heads * dim,
                (getattr(config, "num_key_value_heads", None) or heads) * dim,
                heads,
                config.num_hidden_layers,
                config.vocab_size,
                is_tied,
                experts,
                active if experts > 1 else 1,
                stored=_stored(whole),
                states=sum(map(_has_more, getattr(config, "layer_types", None) or ())),
            )
            if not all(isinstance(value, int | str) for value in vars(shape).values()):
                several = [name for name in SIZES + COUNTS if isinstance(getattr(config, name, None), list | tuple)]
                missing = [name for name in _NEEDED if getattr(config, name) is None]
                raise AttributeError(f"{', '.join(several or missing)}: {'several numbers' if several else None}")
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # transformers' for sizes that layers
            # differ in, and for sizes that are missing
            raise ValueError(
                f"model_type={config.model_type!r}: its config lacks a size of a decoder ({error}). "
                f"plan knows decoders such as Llama's; fit_memory measures any model on its GPU."
            ) from error
        return shape.counted(whole)

    def counted(self, config: PretrainedConfig) -> Shape:
        """This shape with the numbers of weights that the model of a config has, so of any kind of block."""
        found = count_weights(config, self.experts)
        if found is None:
            routed = self.blocks * self.experts * self.feed_forward_weights if self.experts > 1 else 0
            return replace(self, sixteen_bit=routed, routed=routed)  # as if experts were one parameter
        sixteen_bit = max(0, found.blocks + found.beside - found.four_bit)
        shape = self if found.experts else replace(self, experts=1, active=1)  # Doge's config names some it has not
        more = found.blocks - shape.linear_weights
        return replace(shape, more=more, beside=found.beside, sixteen_bit=sixteen_bit, routed=found.experts)

    @property
    def attention_weights(self) -> int:
        """Of q, k, v and o in one block."""
        return 2 * self.hidden * (self.query + self.key)

    @property
    def feed_forward_weights(self) -> int:
        """Of one feed-forward layer."""
        return 3 * self.hidden * self.inner

    @property
    def linear_weights(self) -> int:
        """Of all blocks."""
        return self.blocks * (self.attention_weights + self.experts * self.feed_forward_weights) + self.more

    @property
    def sixteen_bit_share(self) -> float:
        """How much of all weights but embeddings and output layer a 4-bit base keeps in half precision."""
        return self.sixteen_bit / (self.linear_weights + self.beside)

    def linear_bytes(self, four_bit: bool) -> float:
        """Of all weights but embeddings and output layer, in half precision or as a 4-bit base stores them."""
        every = self.linear_weights + self.beside
        return self.sixteen_bit * HALF + (every - self.sixteen_bit) * FOUR_BIT if four_bit else every * HALF

    @property
    def table(self) -> int:
        """Numbers in the embeddings."""
        return self.vocabulary * self.hidden


# Of common bases, so that `longlora plan` needs no file of theirs.
SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 4096, 4096, 32, 32, 32000),
    "llama-2-13b": Shape(5120, 13824, 5120, 5120, 40, 40, 32000),
    "llama-3.2-1b": Shape(2048, 8192, 2048, 512, 32, 16, 128256, tied=True),
    "llama-3.1-8b": Shape(4096, 14336, 4096, 1024, 32, 32, 128256),
    "llama-3.3-70b": Shape(8192, 28672, 8192, 1024, 64, 80, 128256),
}
# Fields of configs: experts of a block, and those that a token passes.
_EXPERTS = (
    ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    ("num_experts_per_tok", "moe_topk", "moe_k"),
)
_NEEDED = ("intermediate_size", "num_hidden_layers", "vocab_size")  # fields without which there is no shape


def _has_more(layer_type: str) -> bool:
    """Whether a layer that transformers calls so has a state, or does not attend."""
    return not layer_type.endswith("attention") or layer_type == "linear_attention"


def _stored(config: PretrainedConfig) -> str:
    quantised = getattr(config, "quantization_config", None) or {}
    quantised = quantised if isinstance(quantised, dict) else quantised.to_dict()  # of a loaded model
    return "4 bits" if quantised.get("load_in_4bit") else str(quantised.get("quant_method", ""))


def find_shape(model: str) -> Shape:
    """The shape of a name in `SHAPES`, or of the config in a folder or on the Hub.

    Raises:
        ValueError: as `Shape.of` and `read_config`.
        OSError: there is no such model.
    """
    return SHAPES.get(model.lower()) or Shape.of(read_config(model))


@dataclass(frozen=True)
class Training:
    """What is trained, and how the base is stored.

    Attributes:
        rank: of LoRA on q, k, v and o.
        embeddings: whether they are trained; norms always are.
        four_bit: whether the base's projections are stored as NF4 numbers.
        fused_loss: whether the loss makes no logits of the whole row.
        shards: GPUs that share weights, gradients and optimiser (FSDP2).
        keeps_gradients: whether gradients are there all the time, because those of several batches are summed.
        buckets: whether ranks add their gradients in DDP's buckets, unless they share weights (`shards`).
    """

    rank: int = 16
    embeddings: bool = True
    four_bit: bool = False
    fused_loss: bool = True
    shards: int = 1
    keeps_gradients: bool = False
    buckets: bool = False


def late_bytes(shape: Shape, training: Training) -> int:
    """Of the embeddings' gradient, made when the blocks are through. Tied, it and the output layer's add to a copy."""
    return shape.table * SINGLE * (2 if shape.tied else 1) if training.embeddings else 0


def loss_fixed(shape: Shape, training: Training) -> int:
    """Beside tied embeddings' gradient: two rounded matrices (Liger, autocast), or the gradient's sum (TRL, none)."""
    return shape.table * SINGLE if shape.tied and training.embeddings and training.fused_loss else 0


def fixed_parts(shape: Shape, training: Training) -> dict[str, int]:
    """Bytes on each GPU that do not grow with the row, by name, without `late_bytes`."""
    tables = shape.table * (1 if shape.tied else 2)
    linear = shape.linear_bytes(training.four_bit)
    lora = shape.blocks * training.rank * (4 * shape.hidden + 2 * shape.query + 2 * shape.key)
    # Copies of the embeddings and norms are trained in single precision; the base's stay, for disabled adapters.
    table, norms = shape.table if training.embeddings else 0, (2 * shape.blocks + 1) * shape.hidden
    trained = lora + table + norms
    # While the blocks are at their peak; tied embeddings have the output layer's by then.
    gradients = (trained if training.keeps_gradients else lora + norms) + (table if shape.tied else 0)
    parts = {
        "weights": linear + tables * HALF,
        "adapter": trained * SINGLE,
        "gradients": gradients * SINGLE,
        "optimiser": trained * ADAM,
    }
    parts = {name: round(size / training.shards) for name, size in parts.items()}
    if training.shards > 1:  # the block at hand and the next one are whole
        parts["gathered weights"] = round(2 * linear / shape.blocks) + shape.table * HALF
    elif training.buckets:
        parts["buckets of DDP"] = trained * SINGLE
    return parts | {"workspaces": STEADY_BYTES}


def block_bytes(shape: Shape, tiled: bool) -> float:
    """A token's bytes at the peak of a checkpointed block's backward, without its input."""
    h, q, kv, f = shape.hidden, shape.query, 2 * shape.key, shape.inner * shape.active
    # Normed input, q, k, v and attention's output, and the residual's gradient are there all the time.
    always = h + q + kv + q + h
    attention = 2 * q + kv + q  # gradients of the output, of q, k and v, and dq's float32 sum of half of the heads
    # The residual after attention, the saved input and its gradient; or the inner tensors.
    feed_forward = h + (2 * h if tiled else 3 * f + h)
    return HALF * (always + max(attention, feed_forward))


def estimate(
    shape: Shape, training: Training, length: int, budget: int, host_budget: int, means: dict[str, Any]
) -> MemoryPlan:
    """The plan of a step of `length` tokens a GPU with some `means`, filled (`plan.fill`)."""
    parts = fixed_parts(shape, training)
    input_bytes, kept_bytes = HALF * shape.hidden, HALF * shape.query + SINGLE * shape.heads
    inputs = input_bytes * (2 if means.get("offload") else shape.blocks)  # one is used while one comes back
    loss_bytes = inputs + (HALF * 5 * shape.hidden if training.fused_loss else LOGITS * shape.vocabulary)
    block, logits = block_bytes(shape, bool(means.get("tile_tokens"))), loss_bytes - inputs
    token_bytes = inputs + max(block, logits)
    largest = "working set of one block" if block >= logits else "loss" if training.fused_loss else "logits"
    token_parts = {"inputs of blocks": inputs, largest: max(block, logits)}
    saved = 2 * shape.hidden + 2 * shape.query + 2 * shape.key + 2 * shape.inner * shape.active
    free_bytes = HALF * saved + SINGLE * shape.heads + (input_bytes if means.get("offload") else 0)
    sizes = token_bytes, loss_bytes, free_bytes, kept_bytes, input_bytes
    plan = MemoryPlan(length, budget, sum(parts.values()), *sizes, shape.blocks, means=means)
    plan = replace(plan, late=late_bytes(shape, training), loss_fixed=loss_fixed(shape, training), parts=parts)
    return fill(replace(plan, host_budget=host_budget, kernels=("Liger",), token_parts=token_parts))


def best_estimate(shape: Shape, training: Training, length: int, budget: int, host_budget: int) -> MemoryPlan:
    """The estimate with the means that cost least time; if nothing fits, that which needs least memory."""
    plans = [estimate(shape, training, length, budget, host_budget, means) for means in means_of(length)]
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.work) if fitting else min(plans, key=lambda plan: plan.peak)


def longest(shape: Shape, training: Training, budget: int, host_budget: int) -> int:
    """Tokens of the longest step a GPU that fits with any means, to 1024 tokens."""
    low, high = 0, 2**15
    while low < high:
        middle = (low + high + 1) // 2
        fits = best_estimate(shape, training, 1024 * middle, budget, host_budget).fits
        low, high = (middle, high) if fits else (low, middle - 1)
    return 1024 * low


def flops(shape: Shape, length: int, group_size: int, plan: MemoryPlan | None = None) -> float:
    """Work of a step of one row on one GPU: frozen products forward and to their input, attention inside groups, and
    what `plan` computes a second time. Bytes that move are not counted.
    """
    idle = shape.routed * (1 - shape.active / shape.experts)  # in experts that a token does not pass
    per_block = (shape.linear_weights - idle) / shape.blocks
    pairs = min(group_size, length) / 2
    forward = shape.blocks * (2 * per_block + 4 * pairs * shape.query)
    once = 2 * shape.blocks * 2 * per_block + 4 * shape.table + shape.blocks * 3.5 * 4 * pairs * shape.query
    return length * (once + (plan.work if plan else 0.0) * forward)
