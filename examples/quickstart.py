"""Extend the embedded model's window from 512 to 4096 tokens, measure the result, save the adapter and load it again.

    python examples/quickstart.py

Hardware: 2 idle CPU cores, 3 to 5 minutes, 2 GB; no GPU and no download.

The model (examples/assets) is a 5.5 M parameter Llama, trained on CPython's standard library in windows of 512 tokens.
This script trains it with S2-Attn on the library's long modules, and measures it with dense attention on modules that
it has never seen.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from command_line import Parser, check_output, positive, rate
from peft import AutoPeftModelForCausalLM, PeftConfig, get_peft_model
from stdlib_text import by_position, cut_windows, plot, read_stdlib, token_losses
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from peft_longlora import LongLoraConfig

BASE = Path(__file__).resolve().parent / "assets" / "stdlib-llama-512"


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of the adapter")
    parser.add_argument("--context-length", type=positive, default=4096, help="window to extend to, in tokens")
    parser.add_argument("--max-steps", type=positive, default=70, help="training steps, one window each")
    parser.add_argument("--learning-rate", type=rate, default=4e-4)
    parser.add_argument("--windows", type=positive, default=2, help="windows to measure of each held-out module")
    parser.add_argument("--evaluate", action="store_true", help="only load the adapter in --output and measure it")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    start = time.time()
    with parser.refusing():
        check_output(args.output)
        if args.evaluate:
            PeftConfig.from_pretrained(args.output)
    if not args.evaluate and (args.output / "adapter_config.json").exists():
        print(f"The adapter that lies in {args.output} will be written over (--output names another folder).")
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    train_texts, held_out = read_stdlib()
    windows = cut_windows(tokenizer, held_out, args.context_length, args.windows)
    if args.evaluate:
        model = AutoPeftModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
        print(json.dumps(by_position(token_losses(model, windows))))
        return

    print(f"1/5 Measuring the base on {len(windows)} held-out windows of {args.context_length} tokens ...", flush=True)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="s2_attn")
    native_window = model.config.max_position_embeddings
    before = token_losses(model, windows)

    print("2/5 Adding the adapter, which rescales RoPE, and measuring it untrained ...", flush=True)
    model = get_peft_model(model, LongLoraConfig(r=16, lora_alpha=32, context_length=args.context_length))
    model.print_trainable_parameters()
    rescaled = token_losses(model, windows)

    train_windows = cut_windows(tokenizer, train_texts, args.context_length)
    print(f"3/5 Training {args.max_steps} of {len(train_windows)} windows, with S2-Attn ...", flush=True)
    training_args = TrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        per_device_train_batch_size=1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    Trainer(model, training_args, train_dataset=[{"input_ids": w, "labels": w} for w in train_windows]).train()
    after = token_losses(model, windows)
    model.save_pretrained(args.output)
    curves = {"before": before, "RoPE rescaled, not trained": rescaled, "after LongLoRA": after}
    plot(curves, args.output / "perplexity.png", native_window)

    print("4/5 Perplexity of the held-out modules by position, dense attention:\n", flush=True)
    table = {label: by_position(losses) for label, losses in curves.items()}
    print(f"{'tokens':>12}" + "".join(f"{label:>28}" for label in table))
    for bucket in table["before"]:
        print(f"{bucket:>12}" + "".join(f"{column[bucket]:>28.2f}" for column in table.values()))

    print("\n5/5 Loading the adapter in a fresh process ...", flush=True)
    command = [sys.executable, __file__, "--evaluate", "--output", args.output]
    command += ["--context-length", str(args.context_length), "--windows", str(args.windows)]
    fresh = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for bucket, value in table["after LongLoRA"].items():
        print(f"{bucket:>12}: {value:.3f} here, {fresh[bucket]:.3f} there")
        if abs(fresh[bucket] / value - 1) > 1e-3:
            sys.exit("The adapter does not compute the same after loading: please report this.")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 ** (3 if sys.platform == "darwin" else 2)
    print(f"\nAdapter, card and perplexity.png are in {args.output}.")
    print(f"{time.time() - start:.0f} s, peak memory {peak:.1f} GiB.")


if __name__ == "__main__":
    main()
