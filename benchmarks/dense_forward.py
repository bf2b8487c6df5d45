"""Time of dense attention in evaluation: one forward of a prompt, as the model would run and by the fastest kernel.

A Llama-3-8B shape with random weights, bf16, batch 1, no cache, logits of the last token only. "sdpa" is the model
without this package, "s2_attn" the same model with it, "fastest" the same with dense_attention="fastest".

    python benchmarks/dense_forward.py --lengths 32768 65536 --output dense_forward.json

Hardware: one GPU with 40 GB or more. On a CPU: python benchmarks/dense_forward.py --tiny
"""

import json
import platform
import shlex
import statistics
import sys
import time

import torch
import transformers
from options import Parser, new_file, positive
from shapes import LLAMA_3_8B, TINY
from transformers import LlamaConfig, LlamaForCausalLM

from peft_longlora import configure_attention, use_attention
from peft_longlora.kernels import backends


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokens: torch.Tensor, repeats: int) -> tuple[float, torch.Tensor]:
    """Median seconds of a forward after one warm-up, and the logits of the last token."""
    synchronize = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    seconds = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), logits.float()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[32768])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--layers", type=positive, help="fewer layers than 32, to try it out")
    parser.add_argument("--tiny", action="store_true", help="a toy shape on the CPU, to see that it runs")
    parser.add_argument("--output", type=new_file, help="write the numbers here as JSON")
    args = parser.parse_args()
    device = "cpu" if args.tiny or not torch.cuda.is_available() else "cuda"
    shape = TINY if args.tiny else LLAMA_3_8B
    if args.layers:
        shape = {**shape, "num_hidden_layers": args.layers}
    lengths = [256] if args.tiny else args.lengths
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(**{**shape, "max_position_embeddings": max(lengths)})
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    about = dict(
        device=torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU",
        torch=torch.__version__,
        transformers=transformers.__version__,
        shape=shape,
        command="python " + shlex.join(sys.argv),
    )
    print(about, flush=True)
    rows = []
    for length in lengths:
        tokens = torch.randint(shape["vocab_size"], (1, length), device=device)
        model.set_attn_implementation("sdpa")
        seconds, want = measure(model, tokens, args.repeats)
        rows.append(dict(attention="sdpa", length=length, seconds=seconds))
        configure_attention(model, group_size=max(2, length // 4))
        seconds, got = measure(model, tokens, args.repeats)
        is_equal = torch.equal(got, want)
        rows.append(dict(attention="s2_attn", length=length, seconds=seconds, equals_sdpa=is_equal))
        with use_attention(model, "auto", dense_attention="fastest"):
            seconds, got = measure(model, tokens, args.repeats)
        heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        dim = shape["hidden_size"] // heads[0]
        call = torch.device(tokens.device), torch.bfloat16, dim, dim, heads[0] > heads[1]
        kernel = backends.choose_backend(None, True, *call)
        error = ((got - want).norm() / want.norm()).item()
        rows.append(dict(attention=f"fastest: {kernel}", length=length, seconds=seconds, error=error))
        for row in rows[-3:]:
            row["tokens_per_second"] = length / row["seconds"]
            print(row, flush=True)
    if args.output:
        with open(args.output, "w") as file:
            json.dump(dict(about=about, results=rows), file, indent=2)


if __name__ == "__main__":
    main()
