"""tools/models/fetch.py: a base model from the Hugging Face hub, by `hf download`, into a folder.

    python -m tools.models.fetch mistralai/Mistral-7B-v0.1 models/mistralai/Mistral-7B-v0.1

It asks for the configuration first, so that a model this decoder cannot run is refused before its weights
travel. Files land in OUT.part, where a rerun goes on; OUT appears once it is whole.
"""
import os
import subprocess
import sys
from pathlib import Path

from model import Config
from plumbing.checkpoint import read_config
from plumbing.errors import Parser, check, command
from plumbing.files import read_json


def download(base: str, part: Path, *files: str) -> None:
    """Run `hf download`, whose progress and errors go to the terminal as they come."""
    hf = Path(sys.executable).with_name("hf")
    done = subprocess.run([hf if hf.exists() else "hf", "download", base, *files, "--local-dir", part],
                          stdout=subprocess.DEVNULL)
    check(done.returncode == 0,
          f"{base} was not downloaded, for the reason above. Check the id and the network "
          "(HF_ENDPOINT names a mirror); a gated model wants its terms accepted on its page "
          "and `hf auth login`. A rerun goes on where this stopped; `make base` needs no hub")


def fetch(base: str, out: Path) -> None:
    part = out.with_name(out.name + ".part")
    download(base, part, "config.json")
    read_config(part / "config.json", Config.__annotations__)
    download(base, part, "--include", "*.json", "--include", "model*.safetensors",
             "--include", "tokenizer.model")              # llama.cpp wants it: export --gguf passes it on
    index = part / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists():
        weights = set(read_json(index, {"weight_map": dict})["weight_map"].values())
    # `hf download` calls it a success when the hub is out of reach but the folder exists, so look.
    missing = [name for name in sorted({"tokenizer.json", *weights}) if not (part / name).exists()]
    check(not missing,
          f"{base}: {', '.join(missing)} did not arrive: either the hub has no such file, and "
          "the model cannot be used here, or it was out of reach, and a rerun goes on")
    os.rename(part, out)


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the model's id on the hub, as in mistralai/Mistral-7B-v0.1")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    check(not args.out.exists(), f"{args.out}: already there; remove it to fetch it again")
    fetch(args.base, args.out)
    print(f"{args.out}: {args.base}")


if __name__ == "__main__":
    command(main)
