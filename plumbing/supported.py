"""plumbing/supported.py: what model and adapter folders may say.

Known keys with known values pass; a key that is not known is refused by name, unless it is empty. A key that
nobody read would be a wrong vector without a word.

Each table maps a key to the values that are computed here, or to ANY, where the value is checked elsewhere
or changes no number.
"""
from pathlib import Path

from plumbing.errors import check

ANY = object()
EMPTY = (None, False, 0, "", [], {})

ROPE = {                                        # rope_parameters, or rope_scaling as it was called before
    "rope_theta": ANY, "rope_type": (None, "default"), "type": (None, "default"),
    "partial_rotary_factor": (None, 1),
}
CONFIG = {                                      # config.json
    "model_type": ("mistral", "llama"),
    # the decoder's shape, which read_config checks
    "vocab_size": ANY, "hidden_size": ANY, "intermediate_size": ANY, "num_hidden_layers": ANY,
    "num_attention_heads": ANY, "num_key_value_heads": ANY, "head_dim": ANY, "rms_norm_eps": ANY,
    "rope_theta": ANY, "rope_parameters": ANY, "rope_scaling": ANY, "sliding_window": ANY,
    "tie_word_embeddings": ANY, "bos_token_id": ANY, "eos_token_id": ANY,
    # what is computed in one way only
    "hidden_act": ("silu",), "attention_bias": EMPTY, "mlp_bias": EMPTY, "attention_dropout": EMPTY,
    "is_causal": (None, True), "partial_rotary_factor": (None, 1),
    # what changes no vector
    "architectures": ANY, "transformers_version": ANY, "dtype": ANY, "torch_dtype": ANY,
    "_name_or_path": ANY, "use_cache": ANY, "pad_token_id": ANY, "unk_token_id": ANY, "sep_token_id": ANY,
    "cls_token_id": ANY, "max_position_embeddings": ANY, "max_length": ANY, "model_max_length": ANY,
    "initializer_range": ANY, "pretraining_tp": ANY, "id2label": ANY, "label2id": ANY,
    "problem_type": ANY, "return_dict": ANY,
    "output_hidden_states": ANY, "output_attentions": ANY, "is_decoder": ANY, "chunk_size_feed_forward": ANY,
    "_attn_implementation": ANY, "attn_implementation": ANY, "_attn_implementation_autoset": ANY,
    "unsloth_version": ANY, "unsloth_fixed": ANY, "_unsloth_fixed": ANY, "vocab_padding": ANY,
    "is_llama_config": ANY, "transformers.js_config": ANY, "tokenizer_class": ANY,
    "max_sequence_length": ANY, "max_window_layers": ANY,
    "keys_to_ignore_at_inference": ANY, "gradient_checkpointing": ANY, "_flash_attn_2_enabled": ANY,
    "use_flash_attention_2": ANY, "finetuning_task": ANY, "task_specific_params": ANY, "pad_token": ANY,
    # how a text is generated, which older versions of transformers wrote here
    "do_sample": ANY, "temperature": ANY, "top_p": ANY, "top_k": ANY, "max_new_tokens": ANY,
    "num_beams": ANY, "repetition_penalty": ANY,
}
ADAPTER = {                                     # adapter_config.json
    "peft_type": ("LORA",), "bias": ("none",), "use_rslora": (None, False, True),
    # Starts that leave the base's own weights alone; PiSSA and its like do not.
    "init_lora_weights": (None, False, True, "gaussian", "eva", "orthogonal"),
    # what read_adapter checks
    "r": ANY, "lora_alpha": ANY, "lora_dropout": ANY, "target_modules": ANY,
    # what changes no vector, or only together with a key that is refused
    "base_model_name_or_path": ANY, "revision": ANY, "task_type": ANY, "auto_mapping": ANY,
    "peft_version": ANY, "inference_mode": ANY, "exclude_modules": ANY, "layers_pattern": ANY,
    "loftq_config": ANY, "eva_config": ANY, "megatron_core": ANY, "qalora_group_size": ANY,
    "runtime_config": ANY,
}
POOLING = {                              # 1_Pooling/config.json; which mode it names is checked elsewhere
    "word_embedding_dimension": ANY, "embedding_dimension": ANY, "pooling_mode": ANY, "include_prompt": ANY,
    "pooling_mode_lasttoken": ANY, "pooling_mode_mean_tokens": ANY, "pooling_mode_weightedmean_tokens": ANY,
}
TRANSFORMER = {                                 # sentence_bert_config.json
    "max_seq_length": ANY, "do_lower_case": (None, False), "transformer_task": (None, "feature-extraction"),
    "modality_config": ANY, "module_output_name": ANY, "model_args": ANY, "tokenizer_args": ANY,
    "processor_args": ANY, "config_args": ANY, "model_kwargs": ANY, "processor_kwargs": ANY,
    "config_kwargs": ANY, "unpad_inputs": ANY,
}
MODULES = ("Transformer", "Pooling", "Normalize")           # modules.json: the classes of a folder's steps


def check_known(path: Path, values: dict, known: dict) -> None:
    """Refuse what is not in the table. UserError names file, key and value."""
    for key, value in values.items():
        shown = f"{path}: {key} {value!r:.60}"
        if key not in known:
            check(value in EMPTY,
                  f"{shown}: not known here; if it changes no vector, remove it from the file")
        elif known[key] is not ANY:
            check(value in known[key], f"{shown}: not supported here")


def check_config(path: Path, raw: dict) -> None:
    """Refuse a config.json that asks for what the decoder does not compute."""
    check(raw.get("model_type") in CONFIG["model_type"],
          f"{path}: model_type {raw.get('model_type')!r}: not supported here (only mistral and llama are)")
    check(not raw.get("quantization_config"),
          f"{path}: quantised weights (quantization_config): not supported here")
    check(not raw.get("auto_map"), f"{path}: code of its own (auto_map): not supported here")
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name) or {}
        check(isinstance(rope, dict), f"{path}: {name} {rope!r}: scaled RoPE is not supported here")
        for key, value in rope.items():
            good = key in ROPE and (ROPE[key] is ANY or value in ROPE[key])
            check(good or (key not in ROPE and value in EMPTY),
                  f"{path}: {name}: {key} {value!r}: scaled RoPE is not supported here")
    check_known(path, raw, CONFIG)


def check_modules(path: Path, modules: list) -> None:
    """Refuse an exported folder with other steps than a decoder, pooling and a norm."""
    for module in modules:
        kind = str(module.get("type") if isinstance(module, dict) else None)
        check(kind.rsplit(".", 1)[-1] in MODULES, f"{path}: a module of type {kind}: not supported here")
