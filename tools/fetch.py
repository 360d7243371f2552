"""tools/fetch.py: a base model from the Hugging Face hub, by `hf download`, into a folder under models/.

    python tools/fetch.py mistralai/Mistral-7B-v0.1 models/Mistral-7B-v0.1

It asks for the configuration first, so that a model this decoder cannot run is refused before its weights
travel. Files land in OUT.part, where a rerun goes on; OUT appears once it is whole.
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))     # model.py stands one folder up
from model import Config, UserError, command, read_json  # noqa: E402


def download(base: str, part: Path, *wanted: str) -> None:
    """Runs `hf download`, whose progress and errors go to the terminal as they come."""
    hf = Path(sys.executable).with_name("hf")
    done = subprocess.run([hf if hf.exists() else "hf", "download", base, *wanted, "--local-dir", part],
                          stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{base} was not downloaded, for the reason above. Check the id and the network "
                        "(HF_ENDPOINT names a mirror); a gated model wants its terms accepted on its page "
                        "and `hf auth login`. A rerun goes on where this stopped; `make base` needs no hub")


def fetch(base: str, out: Path) -> None:
    part = out.with_name(out.name + ".part")
    download(base, part, "config.json")
    Config.load(part / "config.json")
    download(base, part, "--include", "*.json", "--include", "model*.safetensors")
    index = part / "model.safetensors.index.json"
    weights = {"model.safetensors"}
    if index.exists():
        weights = set(read_json(index).get("weight_map", {}).values())
    # `hf download` calls it a success when the hub is out of reach but the folder exists, so look.
    missing = [name for name in sorted({"tokenizer.json", *weights}) if not (part / name).exists()]
    if missing:
        raise UserError(f"{base}: {', '.join(missing)} did not arrive: either the hub has no such file, and "
                        "the model cannot be used here, or it was out of reach, and a rerun goes on")
    os.rename(part, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="the model's id on the hub, as in mistralai/Mistral-7B-v0.1")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out}: already there; remove it to fetch it again")
    fetch(args.base, args.out)
    print(f"{args.out}: {args.base}")


if __name__ == "__main__":
    command(main)
