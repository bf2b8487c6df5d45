"""Run by test_another_process.py in a process of its own: read what another one saved, write down the logits.

First without the package, as if it were not installed: merged folders, in plain transformers. Then with it: all
adapters through PeftModel, those named through every door. Usage: python another_process.py FOLDER NAME ...
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids, use_cache=False).logits.float()


def load_base(config):
    """The base that an adapter names, with as many tokens as it was made for."""
    model = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    if model.config.vocab_size != config["vocab_size"]:
        model.resize_token_embeddings(config["vocab_size"])
    return model


def main(folder: Path, doors: list[str]) -> None:
    ids = load_file(folder / "ids.safetensors")["ids"]
    found, report = {}, {}

    sys.modules["peft_longlora"] = None  # an import of it fails from now on
    try:
        import peft_longlora
    except ImportError:
        report["is_blocked"] = True
    for path in sorted(folder.glob("*/merged")):
        model = AutoModelForCausalLM.from_pretrained(path)
        found[f"{path.parent.name}/merged"] = logits(model, ids)
        tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        report[f"{path.parent.name}/merged"] = dict(tied=tied, attention=model.config._attn_implementation)
    from peft import AutoPeftModelForCausalLM, PeftModel

    some = next(path for path in sorted(folder.glob("*/adapter")))
    try:
        AutoPeftModelForCausalLM.from_pretrained(some)
    except KeyError as error:
        report["without_import"] = str(error)

    del sys.modules["peft_longlora"]
    import peft_longlora  # noqa: F401

    for path in sorted(folder.glob("*/adapter")):
        config = json.loads((path / "adapter_config.json").read_text())
        base, name = config["base_model_name_or_path"], path.parent.name
        found[f"{name}/PeftModel"] = logits(PeftModel.from_pretrained(load_base(config), path), ids)
        trained = PeftModel.from_pretrained(load_base(config), path, is_trainable=True)
        report[f"{name}/trainable"] = sorted(n for n, p in trained.named_parameters() if p.requires_grad)
        if name not in doors:
            continue
        found[f"{name}/AutoPeftModel"] = logits(AutoPeftModelForCausalLM.from_pretrained(path), ids)
        for door in ("AutoModel", "load_adapter"):
            try:
                if door == "AutoModel":
                    model = AutoModelForCausalLM.from_pretrained(path)
                else:
                    model = AutoModelForCausalLM.from_pretrained(base)
                    model.load_adapter(str(path))
                found[f"{name}/{door}"] = logits(model, ids)
            except NotImplementedError as error:
                report[f"{name}/{door}"] = str(error)
    save_file(found, folder / "found.safetensors")
    (folder / "found.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
