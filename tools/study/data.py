"""tools/study/data.py: the study's training files, cleared of the test sets, and their mixture.

For tools/study/reproduce.py; tools/data/clean.py does the clearing.
"""
import random
from pathlib import Path

from plumbing.errors import check
from plumbing.files import (read_json, read_jsonl, read_lines, replace_file, sha256, write_json,
                            write_jsonl, write_text)
from tools.data import clean, mine
from tools.study.subsets import file_hash

# What train.py's --both-sides and type need to know of public files: their task type. Others have none.
PUBLIC_TYPES = {"multi30k_bitext": "bitext", "tanaka_enja": "bitext", "lafand_bitext": "bitext",
                "snli_triplets": "sts", "wikisplit_sts": "sts", "asset_simplify": "sts",
                "clinc150_intent": "long-short"}


MINED = "mined"
MOST_MINED = 8000                       # pairs of a public file that get a mined negative, at most
MINED_AN_EPOCH = 1500                   # of them in an epoch, at most: no file may drown the others
ALL_LANGUAGES = "all-languages"         # the whole synthetic file's name, beside that of one language
OURS = ("synthetic", ALL_LANGUAGES)


def file_key(paths: list[Path]) -> str:
    lines = "".join(f"{path.name} {file_hash(path)}\n" for path in paths)
    return sha256(lines.encode())[:16]


def prepare_data(synthetic: Path, public: Path | None, evaldata: Path, folder: Path,
                 language: str | None = None, all_languages=False) -> dict[str, dict]:
    """Clean each file into a folder, if that is not done: {name: {"file", "key", and the counts of clean}}.

    public: the folder of public pairs, if they are wanted; language: that of the synthetic examples to take,
    if not all; all_languages: take all of them too, under that name. Raises UserError.
    """
    sources = {"synthetic": synthetic}
    if public:
        sources |= {path.stem: path for path in sorted(public.glob("*.jsonl"))}
        check(len(sources) > 1, f"--traindata {public}: no .jsonl file in it")
    check(synthetic.is_file(), f"{synthetic}: no such file: `make data` writes it")
    folder.mkdir(parents=True, exist_ok=True)
    if all_languages:
        sources[ALL_LANGUAGES] = synthetic
    against = file_key(sorted(evaldata.rglob("*.jsonl")))
    known = read_json(folder / "report.json") if (folder / "report.json").exists() else {}
    for name, path in sources.items():
        out, key = folder / f"{name}.jsonl", f"{file_key([path])} {against}"
        wanted = language if name == "synthetic" else None
        if wanted:
            key += f" {wanted}"
        if known.get(name, {}).get("key") == key and out.exists():
            continue
        print(f"cleaning {path}", flush=True)
        report = clean.clean(path, out, [evaldata], language=wanted)
        report.pop("samples")                                         # texts of the sets: not to be spread
        if name in PUBLIC_TYPES:
            write_jsonl(out, ({**row, "type": PUBLIC_TYPES[name]} for row in read_jsonl(out)))
        known[name] = {"file": str(out), "key": key, **report}
        write_json(folder / "report.json", known)
    return {name: known[name] for name in sources}


def draw_examples(info: dict, number: int) -> dict:
    """So many examples of a cleaned file, drawn once: a smaller draw is part of a larger one.

    info: the file, as prepare_data describes it. Returns the like for the drawn ones.
    """
    file = Path(info["file"])
    lines = [line for _, line in read_lines(file)]
    check(number <= len(lines), f"{file}: {len(lines)} examples, of which {number} cannot be drawn")
    drawn = random.Random(0).sample(lines, len(lines))[:number]
    out = file.with_name(f"{file.stem}.{number}.jsonl")
    replace_file(out, lambda beside: beside.write_bytes(b"".join(drawn)))
    return info | {"file": str(out), "kept": number}


def mined_files(files: dict[str, dict], model: Path, max_length: int, dtype: str | None) -> dict[str, dict]:
    """The synthetic file as it is, and of each public one a part, with hard negatives that a model of the
    study has found, beside those that a row has: the paper mined its public data, too (section 4.2).

    Translations stay away: the study's base reads English. model: the run that mines. A file that it has
    mined before is left as it is.
    """
    adapter = model / "adapter_model.safetensors"
    check(adapter.exists(), f"{model}: not trained yet: it is to mine the negatives, so run its row first")
    mined = {"synthetic": files["synthetic"]}
    for name, info in files.items():
        if name in OURS or not info["kept"] or PUBLIC_TYPES.get(name) == "bitext":
            continue
        few = draw_examples(info, min(info["kept"], MOST_MINED))
        out = Path(few["file"]).with_suffix(".mined.jsonl")
        done, key = out.with_suffix(".key"), f"{few['key']} {few['kept']} and mined by {file_hash(adapter)}"
        if not (out.exists() and done.exists() and done.read_text() == key):
            print(f"mining {few['file']}", flush=True)
            flags = ["--keep", "--max-length", str(max_length), *(["--dtype", dtype] if dtype else [])]
            mine.main([str(model), few["file"], "--out", str(out), *flags])
            write_text(done, key)
        mined[name] = few | {"file": str(out), "key": key}
    return mined


def mixture(data: str, files: dict[str, dict]) -> dict[str, float]:
    """{file: share of it in each epoch}. Public files count alike, together as much as the synthetic set.

    data: "synthetic", "public", "both" or "all-languages"; "mined": of mined_files' public ones, up to
    MINED_AN_EPOCH each.
    """
    if data == ALL_LANGUAGES:
        return {ALL_LANGUAGES: 1.0}
    public = {name: info["kept"] for name, info in files.items() if name not in OURS and info["kept"]}
    each = MINED_AN_EPOCH if data == MINED else files["synthetic"]["kept"] / max(1, len(public))
    shares = {"synthetic": 1.0} if data in ("synthetic", "both", MINED) else {}
    if data in ("public", "both", MINED):
        shares |= {name: round(min(1, each / kept), 6) for name, kept in public.items()}
    return shares
