"""Tiny random models as Hugging Face folders, made by transformers, for the tests to compare with."""
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")      # nothing in these tests may ask the hub

import torch  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.disable_progress_bar()


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def tiny_config(family="mistral", **changes):
    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
             "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15, "attn_implementation": "eager"}
    if family == "mistral":
        shape["sliding_window"] = None
    return transformers.AutoConfig.for_model(family, **{**shape, **changes})


def random_model(config, seed=0, causal_lm=False):
    """A model of transformers whose weights, norms included, are large enough for every part to matter."""
    torch.manual_seed(seed)
    auto = transformers.AutoModelForCausalLM if causal_lm else transformers.AutoModel
    model = auto.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def save(model, folder, tokenizer=None, **options):
    """Write the folder that a user would download; returns it."""
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copy(file, folder)
    return folder


def random_ids(rows: int, length: int, vocabulary: int, seed=0) -> torch.Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
