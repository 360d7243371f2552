"""tools/models/mistral_tokenizer.py: the tokenizer of Mistral-7B-v0.1 and E5-Mistral, from a PyPI package.

    pip install sentencepiece && pip install --no-deps mistral-common==1.13.1
    python -m tools.models.mistral_tokenizer models/mistral-tokenizer

The package carries Mistral's SentencePiece model, byte for byte (Apache-2.0). This rebuilds it as a
tokenizer.json: the tests prove that the token ids are SentencePiece's own. Where a model folder came without
tokenizer.json, the file written here completes it.
"""
import importlib.util
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from plumbing.errors import Parser, UserError, command
from plumbing.files import file_sha256, write_json

SPACE = "\u2581"                                           # SentencePiece's sign for " "
SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"     # Mistral-7B-v0.1's own


def packaged_model() -> Path:
    """The SentencePiece file inside mistral-common, which is not imported: its own imports are not
    needed."""
    spec = importlib.util.find_spec("mistral_common")
    for folder in spec.submodule_search_locations if spec else []:
        path = Path(folder) / "data" / "tokenizer.model.v1"
        if path.exists() and file_sha256(path) == SHA256:
            return path
    raise UserError("no Mistral tokenizer: pip install --no-deps mistral-common==1.13.1")


def build(model: SentencePieceProcessor) -> Tokenizer:
    """The same BPE in the form of `tokenizers`.

    SentencePiece joins the neighbours whose joint piece scores best; `tokenizers` joins the pair that stands
    first in a list of merges. So every way to cut a piece into two pieces is a merge, best score first. Runs
    of spaces all score alike, and there the smaller id of the joint piece goes first.
    """
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    special = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    ids = {piece: i for i, piece in enumerate(pieces) if i not in special and not model.is_byte(i)}
    merges = []
    for piece, i in ids.items():
        for middle in range(1, len(piece)):
            left, right = piece[:middle], piece[middle:]
            if left in ids and right in ids:
                merges.append((-model.get_score(i), i, ids[left], ids[right], left, right))
    tokenizer = Tokenizer(models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[merge[-2:] for merge in sorted(merges)],
        unk_token=pieces[model.unk_id()], fuse_unk=True, byte_fallback=True,
    ))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE),
    ])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])
    tokenizer.add_special_tokens([AddedToken(pieces[i], special=True, normalized=False) for i in special])
    bos = pieces[model.bos_id()]
    tokenizer.post_processor = processors.TemplateProcessing(     # BOS, no EOS: as the published file has it
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, model.bos_id())])
    return tokenizer


def main():
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for tokenizer.json and tokenizer_config.json")
    args = parser.parse_args()
    model = SentencePieceProcessor(model_file=str(packaged_model()))
    args.out.mkdir(parents=True, exist_ok=True)
    build(model).save(str(args.out / "tokenizer.json"))
    names = {f"{name}_token": model.id_to_piece(getattr(model, f"{name}_id")())
             for name in ("unk", "bos", "eos")}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "pad_token": names["eos_token"],
                 "clean_up_tokenization_spaces": False, "model_max_length": 32768}
    write_json(args.out / "tokenizer_config.json", described)
    print(f"{args.out}: {model.get_piece_size():,} tokens")


if __name__ == "__main__":
    command(main)
