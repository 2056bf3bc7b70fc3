"""Turns the packaged GGUF file into a safetensors folder that vLLM serves. Runs inside the virtual environment.

Usage: model_folder.py GGUF_FILE TARGET_FOLDER. The target appears whole or not at all.
"""

import shutil
import sys
from pathlib import Path

QUESTION = "The capital of France is"
ANSWER = " Paris"


def build(gguf_file: Path, target: Path) -> None:
    """Dequantise to bf16, save beside `target`, check an answer of the saved copy, then rename into place."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent),
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name).save_pretrained(partial)
    check(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def check(folder: Path) -> None:
    """Load the saved folder and ask it one question.

    Raises:
        SystemExit: the answer is not the expected one, or the tokenizer carries no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    if not tokenizer.chat_template:
        raise SystemExit("the converted tokenizer has no chat template")
    prompt = tokenizer(QUESTION, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    logits = model(**prompt).logits[0, -1]
    answer = str(tokenizer.decode([int(logits.argmax())]))
    if not answer.startswith(ANSWER):
        raise SystemExit(f"the converted model answers {answer!r} to {QUESTION!r}, expected {ANSWER!r}")


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
