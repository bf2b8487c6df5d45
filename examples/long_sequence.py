"""Train on sequences that are too long for one GPU: the ranks share each sequence, and S2-Attn exchanges a halo.

    accelerate launch --num_processes 8 examples/long_sequence.py --model meta-llama/Llama-3.1-8B --rope-parameters \\
        '{"rope_type": "yarn", ...}' --data my/books/ --context-length 1048576 --group-size 8192 --sequence-parallel 8

--sequence-parallel says how many processes share a sequence. 1 is ordinary training; without the option all processes
share. A row is one window of one document. Every process reads it and keeps its stretch. If you launch the script with
an FSDP2 configuration of accelerate, the weights are split over the same processes.

Hardware: `torchrun --nproc-per-node 2` on two cores of a shared CPU, with the embedded model (--model
examples/assets/stdlib-llama-512 --context-length 2048 --group-size 512 --max-steps 2 --learning-rate 1e-3 --eval-rows
2), takes 0.9 minutes. docs/scaling.md says what fits on GPUs; this script itself was not run on GPUs.
"""

import json

import torch
from command_line import Parser, check_output, checkpointing, count, positive, rate
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from peft_longlora import LongLoraConfig
from peft_longlora.data import Counts, read_documents, to_windows
from peft_longlora.sequence import SequenceParallelMixin


class LongTrainer(SequenceParallelMixin, SFTTrainer):
    """TRL's trainer, which never holds the logits of a whole sequence, with sequences that processes share."""


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--model", required=True, help="a rotary causal language model: folder or Hub id")
    parser.add_argument("--data", required=True, nargs="+", help="files, folders or Hub ids")
    parser.add_argument("--eval-rows", type=count, default=0, help="last rows, held out for the loss before and after")
    parser.add_argument("--output", default="runs/long_sequence")
    parser.add_argument(
        "--context-length", type=positive, required=True, help="of a row, and the window to extend to; tokens"
    )
    parser.add_argument("--group-size", type=positive, help="tokens; default: a quarter of the window")
    parser.add_argument("--rope-parameters", type=json.loads, help="as JSON; for bases whose RoPE is scaled already")
    parser.add_argument("--sequence-parallel", type=positive, help="processes that share a sequence; default: all")
    parser.add_argument("--rank", type=positive, default=8)
    parser.add_argument("--learning-rate", type=rate, default=2e-4)
    parser.add_argument("--max-steps", type=positive, default=100)
    parser.add_argument("--accumulation", type=positive, default=1, help="steps whose gradients are summed")
    parser.add_argument("--offload", action="store_true", help="keep what layers save for the backward in host memory")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    set_seed(args.seed)
    has_gpu = torch.cuda.is_available()
    with parser.refusing():
        check_output(args.output)
        config = LongLoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            context_length=args.context_length,
            rope_parameters=args.rope_parameters,
            group_size=args.group_size,
            task_type="CAUSAL_LM",
        )
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        windows = to_windows(read_documents(args.data), tokenizer, args.context_length, Counts())
        rows = [{"input_ids": row["input_ids"]} for row in windows]
        if args.eval_rows >= len(rows):
            raise ValueError(f"--eval-rows {args.eval_rows} of {len(rows)} rows leaves none to train on.")
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.bfloat16 if has_gpu else torch.float32, attn_implementation="s2_attn"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = LongTrainer(
        model,
        SFTConfig(
            output_dir=args.output,
            max_length=None,
            max_steps=args.max_steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=args.accumulation,
            learning_rate=args.learning_rate,
            bf16=has_gpu,
            use_cpu=not has_gpu,
            activation_offloading=args.offload,
            **checkpointing(),
            dataloader_pin_memory=has_gpu,
            logging_steps=1,
            eval_on_start=bool(args.eval_rows),
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=Dataset.from_list(rows[: len(rows) - args.eval_rows]),
        eval_dataset=Dataset.from_list(rows[len(rows) - args.eval_rows :]) if args.eval_rows else None,
        processing_class=tokenizer,
        peft_config=config,
        sequence_parallel_size=args.sequence_parallel,
    )
    trainer.train()
    if args.eval_rows:
        trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"{trainer.sequence_ranks} of {trainer.args.world_size} processes share a sequence.")
        for loss in (entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry):
            print(f"Loss of held-out rows, dense attention: {loss:.4f}")
        print(f"The adapter is in {args.output}.")


if __name__ == "__main__":
    main()
