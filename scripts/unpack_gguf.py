"""A chat model in a GGUF file as the Hugging Face folder that train.py takes, in float32.

    python -m scripts.unpack_gguf FOLDER_OR_FILE OUT

Needs `pip install gguf accelerate`. transformers reads the common architectures and their
quantizations; the weights are those of the file, multiplied out.
"""

import argparse
import sys
from pathlib import Path


def unpack(source: Path, out: Path) -> None:
    files = [source] if source.is_file() else sorted(source.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{source}: {len(files)} files end in .gguf, not 1; name one")
    if out.exists() and not out.is_dir():
        raise SystemExit(f"{out} is a file; OUT must be a folder")
    [file] = files
    # Here, so that --help needs neither.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": file.name}
    dequantized = GgufConfig(dequantize=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, **where, quantization_config=dequantized, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:  # of a broken file gguf and transformers raise many kinds
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"{file} cannot be unpacked: {type(error).__name__}: {reason}") from error
    if not tokenizer.chat_template:
        raise SystemExit(f"{file} has no chat template; take an instruction-tuned model")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, written to {out}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    unpack(args.source, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
