"""Merge an adapter into its base, save a plain model, and generate with it in a process without this package.

    python examples/merge_and_generate.py --adapter runs/quickstart --output runs/merged --prompt "def main():"

Hardware: 0.2 minutes on one CPU core for the embedded model. Other models need memory for the base and one copy of it.
Inference servers load the merged folder: it is an ordinary checkpoint whose config.json holds the longer window.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from command_line import Parser, check_output, positive
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoTokenizer

import peft_longlora  # noqa: F401  registers the adapter type: without it PEFT raises KeyError 'LONGLORA'

# What a user of the merged model writes, but for the first two lines, which make peft_longlora impossible to import.
PLAIN = """
import sys
sys.modules["peft_longlora"] = None
import json
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, dtype, prompt, max_new_tokens = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
model.to("cuda" if torch.cuda.is_available() else "cpu")
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
tokens = model.generate(**inputs, max_new_tokens=int(max_new_tokens), do_sample=False)[0]
print(json.dumps({"tokens": tokens.tolist(), "text": tokenizer.decode(tokens, skip_special_tokens=True)}))
"""


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("--adapter", required=True, help="folder or Hub id; it names its base")
    parser.add_argument("--tokenizer", help="folder or Hub id; default: the adapter's, else its base's")
    parser.add_argument("--output", type=Path, default=Path("runs/merged"))
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--prompt-file", type=Path, help="a file with the prompt, instead of --prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=32)
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="float32 merges exactly; bfloat16 rounds, on both sides",
    )
    return parser


def load_tokenizer(adapter: str, tokenizer: str | None, base: str):
    if tokenizer is None and not (Path(adapter) / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(base)
    return AutoTokenizer.from_pretrained(tokenizer or adapter)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with parser.refusing():
        check_output(args.output)
        prompt = args.prompt_file.read_text(encoding="utf-8") if args.prompt_file else args.prompt
        base = PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
        tokenizer = load_tokenizer(args.adapter, args.tokenizer, base)
        model = AutoPeftModelForCausalLM.from_pretrained(args.adapter, dtype=getattr(torch, args.dtype)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)[0].tolist()

    merged = model.merge_and_unload()
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"Merged model in {args.output}: {merged.config.rope_parameters}")

    command = [sys.executable, "-c", PLAIN, str(args.output), args.dtype, prompt, str(args.max_new_tokens)]
    there = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"Generated without peft_longlora:\n{there['text']}")
    if there["tokens"] != tokens:
        same = next((i for i, (a, b) in enumerate(zip(tokens, there["tokens"])) if a != b), len(tokens))  # noqa: B905
        sys.exit(f"The merged model's tokens part from the adapter's at {same} of {len(tokens)} ({args.dtype}).")
    print(f"The same {len(tokens) - inputs['input_ids'].shape[1]} new tokens as with the adapter.")


if __name__ == "__main__":
    main()
