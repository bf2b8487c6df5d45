"""What one process trains and saves, another reads: adapters through every door, merged models without this package.

One test and one process for all cases, because a process takes longer to start than all of them to run.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from tests.helpers.tiny import EXPERTS, IDS, extend, logits, make, train

EXPERT_PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
# of the base, of the adapter
CASES = {
    "llama": ({}, {}),
    "llama bf16": (dict(dtype=torch.bfloat16), {}),
    "tied": (dict(tie_word_embeddings=True), {}),
    "tied bf16": (dict(tie_word_embeddings=True, dtype=torch.bfloat16), {}),
    "tied gpt_neox": (dict(model_type="gpt_neox", tie_word_embeddings=True), dict(rope_type="linear")),
    "gemma3": (dict(model_type="gemma3_text", head_dim=8, sliding_window=16, num_hidden_layers=6), {}),
    "mixtral": (dict(model_type="mixtral", **EXPERTS["mixtral"]), dict(target_parameters=EXPERT_PARAMETERS)),
    "qwen3_moe": (dict(model_type="qwen3_moe", **EXPERTS["qwen3_moe"]), dict(target_parameters=EXPERT_PARAMETERS)),
    "dynamic": ({}, dict(rope_type="dynamic")),
    "lm_head": ({}, dict(modules_to_save=["lm_head"], use_rslora=True, rope_type="ntk")),
    "dora": ({}, dict(use_dora=True, rope_type="llama3")),
    "pissa": ({}, dict(init_lora_weights="pissa")),
    "pattern": ({}, dict(alpha_pattern={"q_proj": 32}, rank_pattern={"v_proj": 2})),
    "no extension": ({}, dict(context_length=None)),
    "added tokens": ({}, {}),
    "added tokens tied": (dict(tie_word_embeddings=True), {}),
}
EVERY_DOOR = ("llama", "llama bf16", "tied gpt_neox", "mixtral", "dora")


def test_a_fresh_process_computes_the_same(tmp_path):
    wanted, trainable, is_tied = {}, {}, {}
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    for name, (base, adapter) in CASES.items():
        folder = tmp_path / name
        make(**base).save_pretrained(folder / "base")
        model = make(**base)
        model.config.name_or_path = model.name_or_path = str(folder / "base")
        if name.startswith("added tokens"):
            model.resize_token_embeddings(100)
        peft_model = train(extend(model, **adapter))
        wanted[name] = logits(peft_model).float()
        trainable[name] = sorted(n for n, p in peft_model.named_parameters() if p.requires_grad)
        is_tied[name] = base.get("tie_word_embeddings", base.get("model_type") == "gemma3_text")
        peft_model.save_pretrained(folder / "adapter")
        assert not [path for path in (folder / "adapter").iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
        peft_model.merge_and_unload().save_pretrained(folder / "merged")
    script = Path(__file__).parents[1] / "helpers" / "another_process.py"
    child = subprocess.run([sys.executable, script, tmp_path, *EVERY_DOOR], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-4000:]
    found = load_file(tmp_path / "found.safetensors")
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["is_blocked"]
    assert "LONGLORA" in report["without_import"]
    # transformers' own loading drops a part of DoRA, and before 5.18 embeddings and norms
    refused = EVERY_DOOR if Version(transformers.__version__) < Version("5.18") else ("dora",)
    for name in refused:
        assert all("PeftModel.from_pretrained" in report[f"{name}/{door}"] for door in ("AutoModel", "load_adapter"))
    assert len(found) == 2 * len(CASES) + 3 * len(EVERY_DOOR) - 2 * len(refused)
    wrong = []
    for key, tensor in found.items():
        name, door = key.split("/")
        size, error = wanted[name].std(), (tensor - wanted[name]).abs()
        if door == "merged":
            # Rounding of the merged weights: on average 2 ** -24 or, in bf16, some 2 ** -9 of the logits' size.
            is_equal = error.max() < 1e-4 * size if "bf16" not in name else error.mean() < 0.03 * size
            is_equal &= report[key] == dict(tied=is_tied[name], attention="sdpa")
        elif "bf16" in name and door in ("AutoModel", "load_adapter"):  # which round LoRA's weights to bf16
            is_equal = error.mean() < 0.03 * size
        else:  # "pissa" decomposes the base's weights again
            is_equal = error.max() < 1e-5 * size if name == "pissa" else error.max() == 0
        if not is_equal:
            wrong.append(f"{key}: {error.max() / size:.1e} of the logits' size, {report.get(key, '')}")
    assert not wrong, "\n".join(wrong)
    assert {name: report[f"{name}/trainable"] for name in CASES} == trainable
