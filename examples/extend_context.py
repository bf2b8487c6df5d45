"""Continued pre-training on long text: extend a model's window with LongLoRA and the plain Trainer.

    python examples/extend_context.py --model meta-llama/Llama-2-7b-hf --data my/books/ --context-length 32768

`longlora train` does the same without code, and measures the result (docs/training.md). This script is to copy.

--data takes .txt, .md, .pdf, .jsonl, .json and .parquet files, folders of such files, or ids of datasets on the Hub. A
row is one window of one document, so use documents longer than the window. The defaults are the paper's
recipe (arXiv:2309.12307: AdamW .9/.95, 2e-5, 20 steps of warm-up, 1000 steps of 8 windows a GPU, on 8 GPUs) with one
difference: RoPE is YaRN instead of linear. 2e-5 is low for LoRA; 2e-4 trains faster.

On several GPUs: `accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/extend_context.py --model ...`

Hardware: on one CPU core the embedded model (--model examples/assets/stdlib-llama-512 --context-length 2048 --max-steps
10 --accumulation 2 --learning-rate 1e-3 --warmup-steps 2 --eval-windows 4, 49 books) takes 1.1 minutes. A 7B model
needs a GPU (not measured). On one GPU `fit_memory` chooses what is computed twice; without `pip install liger-kernel`
the Trainer holds several copies of the logits of a whole window (window x vocabulary x 4 bytes each).
"""

import json

import torch
from command_line import Parser, check_output, checkpointing, count, is_fitted, positive, rate
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from peft_longlora import LongLoraConfig
from peft_longlora.data import check_held_out, load_rows
from peft_longlora.memory import explain_out_of_memory, fit_memory
from peft_longlora.memory.fragments import expand_segments
from peft_longlora.training import last_checkpoint, leave


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="a rotary causal language model: folder or Hub id")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders or Hub ids")
    parser.add_argument("--eval-data", nargs="+", default=[], help="the same, for the loss before and after (dense)")
    parser.add_argument("--eval-windows", type=positive, default=16, help="of --eval-data; a multiple of the GPUs")
    parser.add_argument("--split", default="train", help="split of Hub datasets")
    parser.add_argument("--config", help="configuration of Hub datasets")
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--skip-empty", action="store_true", help="go on after an empty document")
    parser.add_argument("--output", default="runs/extend_context")
    parser.add_argument("--context-length", type=positive, default=32768, help="the window to extend to, tokens")
    parser.add_argument("--rope-type", default="yarn", help="linear (the paper's), ntk, dynamic, yarn, llama3")
    parser.add_argument("--rope-parameters", type=json.loads, help="as JSON, for bases whose RoPE is scaled already")
    parser.add_argument("--group-size", type=positive, help="tokens; default: a quarter of the window")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--four-bit", action="store_true", help="keep the base in 4 bits (bitsandbytes, nf4)")
    parser.add_argument("--learning-rate", type=rate, default=2e-5)
    parser.add_argument("--max-steps", type=positive, default=1000)
    parser.add_argument("--warmup-steps", type=count, default=20)
    parser.add_argument("--batch-size", type=positive, default=1, help="windows a device and step")
    parser.add_argument("--accumulation", type=positive, default=8, help="steps whose gradients are summed")
    parser.add_argument("--save-steps", type=positive, default=100)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    expand_segments()
    torch.manual_seed(args.seed)
    has_gpu = torch.cuda.is_available()
    tokens = args.context_length * args.batch_size  # of a step on one GPU
    fitted = is_fitted(tokens)
    options = dict(split=args.split, config=args.config, field=args.text_field, skip_empty=args.skip_empty)
    last = last_checkpoint(args.output)
    with parser.refusing():
        check_output(args.output)
        if args.resume and last is None:
            raise ValueError(f"--resume: there is no whole checkpoint in {args.output}.")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        config = LongLoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            context_length=args.context_length,
            rope_type=args.rope_type,
            rope_parameters=args.rope_parameters,
            group_size=args.group_size,
            task_type="CAUSAL_LM",
        )
    if tokenizer.pad_token is None:  # the labels say what is padding, so any token will do
        tokenizer.pad_token = tokenizer.eos_token

    # Before the model: DeepSpeed ZeRO-3 shares its weights out while they are loaded.
    arguments = TrainingArguments(
        output_dir=args.output, max_steps=args.max_steps, save_steps=args.save_steps, seed=args.seed, report_to="none",
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=1,
        gradient_accumulation_steps=args.accumulation, learning_rate=args.learning_rate, adam_beta2=0.95,
        lr_scheduler_type="constant_with_warmup", warmup_steps=args.warmup_steps, bf16=has_gpu,
        **checkpointing(fitted),
        logging_steps=1 if args.max_steps < 100 else 10, eval_on_start=bool(args.eval_data),
        dataloader_pin_memory=has_gpu,
    )  # fmt: skip
    with parser.refusing(), arguments.main_process_first():
        rows = load_rows(args.data, tokenizer, args.context_length, **options)
        if args.eval_data:
            held_out = load_rows(args.eval_data, tokenizer, args.context_length, **options)
            check_held_out(rows, held_out, "--eval-data")
            held_out = held_out.select(range(min(args.eval_windows, len(held_out))))
    dtype = torch.bfloat16 if has_gpu else torch.float32
    four_bit = {}
    if args.four_bit:  # stored as the other weights are, so that FSDP can share them out
        four_bit = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype)
        four_bit = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **four_bit)}
    with parser.refusing():
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="s2_attn", **four_bit)
        model = get_peft_model(base, config)
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held_out if args.eval_data else None,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    if fitted:
        print(fit_memory(model, tokens, accumulates=args.accumulation > 1))
    with explain_out_of_memory(model):
        trainer.train(resume_from_checkpoint=str(last) if args.resume else None)
    say = trainer.accelerator.print
    if args.eval_data:
        before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        say(f"Loss before, RoPE rescaled, dense attention: {before:.4f}")
        say(f"Loss after, dense attention: {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model()
    say(f"Text read: {rows.info.description}.\nThe adapter is in {args.output}.")
    leave(trainer)


if __name__ == "__main__":
    main()
