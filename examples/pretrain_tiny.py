"""Train the embedded model of examples/assets from random weights: a 5.5 M parameter Llama with a native window of 512
tokens.

    python examples/pretrain_tiny.py --output runs/stdlib-llama-512

Text: CPython's standard library, without the modules that stdlib_text.py holds out by name. The defaults are the recipe
of examples/assets/README.md.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from command_line import Parser, check_output, positive, rate
from stdlib_text import by_position, cut_windows, perplexity, read_stdlib, token_losses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 512
LONG_WINDOW = 4096


def train_tokenizer(texts, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every document begins with <bos>."""
    special = ["<bos>", "<eos>", "<pad>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def build_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        attention_dropout=args.attention_dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/stdlib-llama-512"))
    parser.add_argument("--stdlib", type=Path, help="folder of a standard library; default: the running Python's")
    parser.add_argument("--vocab-size", type=positive, default=4096)
    parser.add_argument("--steps", type=positive, default=900)
    parser.add_argument("--batch-size", type=positive, default=64, help="windows of 512 tokens a step")
    parser.add_argument("--learning-rate", type=rate, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=2.0)
    parser.add_argument("--attention-dropout", type=float, default=0.1)
    parser.add_argument("--warmup-steps", type=positive, default=100)
    parser.add_argument(
        "--eval-steps", type=positive, default=100, help="steps between two looks at the held-out modules"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    start = time.time()
    torch.manual_seed(args.seed)
    with parser.refusing():
        check_output(args.output)
        train_texts, held_out = read_stdlib(args.stdlib)
        if args.vocab_size < 259:
            raise ValueError(f"--vocab-size {args.vocab_size}: 256 bytes and 3 special tokens need 259.")
    tokenizer = train_tokenizer(train_texts.values(), args.vocab_size)
    documents = [torch.tensor(tokenizer(t)["input_ids"] + [tokenizer.eos_token_id]) for t in train_texts.values()]
    stream = torch.cat(documents).to(args.device)
    document_starts = torch.tensor([0] + [len(d) for d in documents]).cumsum(0)[:-1].to(args.device)
    document_starts = document_starts[document_starts <= len(stream) - WINDOW]
    short_windows = cut_windows(tokenizer, held_out, WINDOW)
    model = build_model(tokenizer, args).to(args.device)
    print(f"{len(documents)} modules, {len(stream):,} tokens to train on; {len(held_out)} modules held out")
    print(f"{model.num_parameters():,} parameters; {args.steps * args.batch_size * WINDOW / len(stream):.1f} epochs")

    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)

    def lr_factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / args.warmup_steps)
        return warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    best, best_step, best_weights = math.inf, 0, None
    model.train()
    for step in range(1, args.steps + 1):
        offsets = torch.randint(len(stream) - WINDOW, (args.batch_size,), device=args.device)
        # One window in eight starts where a document does, so that <bos> is known at position 0.
        first = torch.randint(len(document_starts), (args.batch_size // 8,), device=args.device)
        offsets[: len(first)] = document_starts[first]
        batch = stream[offsets[:, None] + torch.arange(WINDOW, device=args.device)]
        with torch.autocast(args.device.split(":")[0], torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if step % args.eval_steps == 0 or step == args.steps:
            held_out_ppl = perplexity(token_losses(model, short_windows, 32), 0, WINDOW)
            if held_out_ppl < best:
                best, best_step = held_out_ppl, step
                best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            scores = f"training loss {loss.item():.3f}, held-out perplexity {held_out_ppl:.3f}"
            print(f"step {step}: {scores}, {time.time() - start:.0f} s", flush=True)

    model.load_state_dict(best_weights)
    model.config.attention_dropout = 0.0  # whoever fine-tunes chooses anew
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(
        f"kept step {best_step}, held-out perplexity {best:.3f}, after {time.time() - start:.0f} s; see {args.output}"
    )

    losses = token_losses(model.float(), cut_windows(tokenizer, held_out, LONG_WINDOW))
    print(f"{len(losses)} held-out windows of {LONG_WINDOW} tokens, weights rounded to bf16, perplexity by position:")
    for bucket, value in by_position(losses).items():
        print(f"{bucket:>12}: {value:.3f}")


if __name__ == "__main__":
    main()
