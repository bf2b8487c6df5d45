"""Instruction tuning on long prompts: LongAlpaca's records, TRL's SFTTrainer, packed rows, loss only on the answer.

    python examples/sft_longalpaca.py --model meta-llama/Llama-2-7b-hf --data Yukang/LongAlpaca-12k
    python examples/sft_longalpaca.py --model Qwen/Qwen2.5-0.5B-Instruct --data my_records.jsonl.gz --max-length 16384

`longlora train` with `kind: records` does the same without code (docs/training.md). This script is to copy.

--data takes .json, .jsonl or .parquet files, folders of such files, or Hub ids, with {"instruction", "input",
"output"}. The prompt is the tokenizer's chat template, or Llama 2's [INST] if it has none. A record longer than
--max-length is never cut silently: see --too-long.

On several GPUs: `accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/sft_longalpaca.py --model ...`

Hardware: on one CPU core the embedded model (--model examples/assets/stdlib-llama-512 --max-length 2048 --max-steps 4
--accumulation 1 --learning-rate 1e-3 --warmup-steps 1 --eval-records 4, 100 records) takes 0.6 minutes. A 7B model
needs a GPU (not measured).
"""

import json

import torch
from command_line import Parser, check_output, checkpointing, count, is_fitted, positive, rate
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from trl import SFTConfig, SFTTrainer

from peft_longlora import LongLoraConfig
from peft_longlora.data import load_rows
from peft_longlora.memory import explain_out_of_memory, fit_memory
from peft_longlora.memory.fragments import expand_segments
from peft_longlora.training import fused_loss, leave


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="a rotary causal language model: folder or Hub id")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders or Hub ids")
    parser.add_argument("--split", default="train", help="split of Hub datasets")
    parser.add_argument(
        "--eval-records", type=count, default=0, help="last records, held out for the loss before/after"
    )
    parser.add_argument("--output", default="runs/sft_longalpaca")
    parser.add_argument(
        "--max-length", type=positive, default=32768, help="of a row, and the window to extend to; tokens"
    )
    parser.add_argument("--too-long", default="truncate", choices=["truncate", "drop", "error"],
                        help="of longer records: cut the prompt's middle out, leave them out, or stop")  # fmt: skip
    parser.add_argument("--no-packing", action="store_true", help="one record a row")
    parser.add_argument("--rope-parameters", type=json.loads, help="as JSON, for bases whose RoPE is scaled already")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--four-bit", action="store_true", help="keep the base in 4 bits (bitsandbytes, nf4)")
    parser.add_argument("--learning-rate", type=rate, default=2e-5, help="the paper's; 2e-4 trains LoRA faster")
    parser.add_argument("--epochs", type=rate, default=5)
    parser.add_argument("--max-steps", type=positive, default=-1, help="instead of --epochs")
    parser.add_argument("--warmup-steps", type=count, default=20)
    parser.add_argument("--batch-size", type=positive, default=1, help="rows a device and step")
    parser.add_argument("--accumulation", type=positive, default=8, help="steps whose gradients are summed")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    expand_segments()
    set_seed(args.seed)
    has_gpu = torch.cuda.is_available()
    tokens = args.max_length * args.batch_size  # of a step on one GPU
    fitted = is_fitted(tokens)
    with parser.refusing():
        check_output(args.output)
        config = LongLoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            context_length=args.max_length,
            rope_parameters=args.rope_parameters,
            task_type="CAUSAL_LM",
        )
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    # Before the model: DeepSpeed ZeRO-3 shares its weights out while they are loaded.
    arguments = SFTConfig(
        output_dir=args.output,
        max_length=args.max_length,
        packing=not args.no_packing,
        eval_packing=False,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=args.warmup_steps,
        adam_beta2=0.95,
        bf16=has_gpu,
        **checkpointing(fitted),
        logging_steps=1,
        dataloader_pin_memory=has_gpu,
        report_to="none",
        seed=args.seed,
        eval_on_start=bool(args.eval_records),
    )
    with parser.refusing(), arguments.main_process_first():
        how = dict(kind="records", quiet=True, split=args.split, too_long=args.too_long)
        rows = load_rows(args.data, tokenizer, args.max_length, **how)
        split = len(rows) - args.eval_records
        if split < 1:
            raise ValueError(f"--eval-records {args.eval_records} of {len(rows)} rows leaves none to train on.")
    print(f"{rows.info.description}\n{split} rows to train on, {args.eval_records} held out")
    dtype = torch.bfloat16 if has_gpu else torch.float32
    four_bit = {}
    if args.four_bit:  # stored as the other weights are, so that FSDP can share them out
        four_bit = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype)
        four_bit = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four_bit)}
    with parser.refusing():
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="s2_attn", **four_bit)
        model = get_peft_model(base, config)
    model.print_trainable_parameters()

    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=rows.select(range(split)),
        eval_dataset=rows.select(range(split, len(rows))) if args.eval_records else None,
        processing_class=tokenizer,
    )
    for parameter in model.parameters():
        if args.four_bit and parameter.requires_grad:  # TRL has rounded it to bf16, which small steps cannot move
            parameter.data = parameter.data.float()
    if fitted:
        print(fit_memory(model, tokens, loss=fused_loss(arguments), accumulates=args.accumulation > 1))
    with explain_out_of_memory(model):
        trainer.train()
    say = trainer.accelerator.print
    if args.eval_records:
        before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        say(f"Loss of held-out answers before, dense attention: {before:.4f}")
        say(f"Loss of held-out answers after, dense attention: {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model()
    say(f"The adapter is in {args.output}.")
    leave(trainer)


if __name__ == "__main__":
    main()
