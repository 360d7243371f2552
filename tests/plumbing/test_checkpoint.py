"""plumbing/checkpoint.py: the layouts of model folders that are out there load, and what would be misread is refused."""
import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE

from model import PROJECTIONS, Config, Decoder, Embedder, load_decoder
from plumbing.checkpoint import pick_device, read_config, stored_pooling
from plumbing.errors import UserError
from plumbing.run import check_trained
from tiny import random_ids, random_model, relative, save, tiny_config

TOLERANCE = 1e-5
TEXTS = ["", "Hello world", "one two three four five six seven eight nine ten " * 5]


def edit(path, **changes):
    """Rewrite a JSON file with some keys changed; a value of KeyError drops the key."""
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not KeyError}))


def refused(words, call, *args, **options):
    """The call fails with one line for the user that names the cause."""
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- checkpoints

@pytest.fixture
def checkpoint(tmp_path):
    """A tiny tied model as one file, with what the loader must give for it."""
    theirs = random_model(tiny_config(tie_word_embeddings=True), causal_lm=True)
    path = save(theirs, tmp_path / "checkpoint")
    return path, load_file(path / "model.safetensors"), theirs.model(random_ids(2, 9, 97)).last_hidden_state


def load(path, dtype=torch.float32):
    return load_decoder(path, "cpu", dtype)(random_ids(2, 9, 97))


def test_layouts(checkpoint, tmp_path):
    path, tensors, wanted = checkpoint
    assert relative(load(path), wanted) <= TOLERANCE
    bare = {key.removeprefix("model."): value for key, value in tensors.items()}
    tied = {**bare, "lm_head.weight": bare["embed_tokens.weight"].clone()}
    del tied["embed_tokens.weight"]
    other_head = {**tensors, "lm_head.weight": torch.randn(97, 64)}
    constants = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    for layout in (bare, tied, other_head, constants):
        save_file(layout, path / "model.safetensors")
        assert relative(load(path), wanted) <= TOLERANCE
    save_file(tensors, path / "model.safetensors")
    shards = tmp_path / "shards"
    transformers.AutoModelForCausalLM.from_pretrained(path).save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    save_file({"stray": torch.ones(1)}, shards / "other.safetensors")          # not in the index: not read
    assert relative(load(shards), wanted) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_checkpoints(checkpoint, dtype):
    path, tensors, wanted = checkpoint
    save_file({key: value.to(dtype) for key, value in tensors.items()}, path / "model.safetensors")
    theirs = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
    half = theirs(random_ids(2, 9, 97)).last_hidden_state
    assert relative(load(path), half) <= TOLERANCE                 # read into float32
    assert load(path, dtype).dtype == dtype                        # or computed as stored
    assert relative(load(path, dtype), half) < 0.05


def test_rope_base_in_old_and_new_configs(checkpoint):
    path, _, wanted = checkpoint
    edit(path / "config.json", rope_parameters=KeyError, rope_theta=10000.0)
    assert relative(load(path), wanted) <= TOLERANCE
    edit(path / "config.json", rope_theta=500.0)
    assert relative(load(path), wanted) > 1e-3
    new = {"rope_theta": 1e4, "rope_type": "default"}
    edit(path / "config.json", rope_theta=KeyError, rope_parameters=new)
    assert relative(load(path), wanted) <= TOLERANCE


@pytest.mark.parametrize("said", [
    {"rope_scaling": {"type": "default", "rope_theta": 5e2}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 5e2}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e2}, "rope_theta": 1e4},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e2},
    {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "default", "rope_theta": 5e2}},
    {"rope_scaling": None, "rope_theta": 5e2},
])
def test_theta_is_where_transformers_finds_it(checkpoint, said):
    path, _, default = checkpoint
    edit(path / "config.json", **{"rope_parameters": KeyError, **said})
    theirs = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)(random_ids(2, 9, 97)).last_hidden_state
    assert relative(load(path), theirs) <= TOLERANCE and relative(theirs, default) > 1e-3


def test_a_stale_index_beside_the_single_file_is_not_read(checkpoint):
    path, _, wanted = checkpoint
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert relative(load(path), wanted) <= TOLERANCE


def test_config_defaults_are_transformers_own(tmp_path):
    for family in ("mistral", "llama"):
        theirs = transformers.AutoConfig.for_model(family)
        needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size",
                  "num_hidden_layers", "num_attention_heads")
        (tmp_path / "config.json").write_text(json.dumps({key: getattr(theirs, key) for key in needed}))
        ours = Config(**read_config(tmp_path / "config.json", Config.__annotations__))
        assert ours.num_key_value_heads == theirs.num_key_value_heads
        assert ours.sliding_window == getattr(theirs, "sliding_window", None)
        for same in ("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
            assert getattr(ours, same) == getattr(theirs, same)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.head_dim == theirs.hidden_size // theirs.num_attention_heads


def test_tensors_that_do_not_fit_are_named(checkpoint):
    path, tensors, _ = checkpoint
    name = "model.layers.1.mlp.up_proj.weight"
    less = {key: value for key, value in tensors.items() if key != name}
    for changed, words in [
        (less, "layers.1.mlp.up_proj.weight"),
        ({**less, name: torch.ones(2, 64)}, f"{name} has shape (2, 64), wanted (112, 64)"),
        ({**tensors, "model.layers.3.mlp.up_proj.weight": torch.ones(1)}, "model.layers.3.mlp.up_proj"),
        ({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "q_proj.bias"),
        ({**tensors, name.removeprefix("model."): torch.ones(112, 64)}, "a second layers.1.mlp.up_proj.weight: keep one"),
        ({**less, name: tensors[name].to(torch.int8)}, f"{name} is I8"),
        ({**less, name: tensors[name].to(torch.float8_e4m3fn)}, f"{name} is F8_E4M3"),
    ]:
        save_file(changed, path / "model.safetensors")
        refused(words, load, path)


@pytest.mark.parametrize("changes, words", [
    ({"model_type": "qwen2"}, "'qwen2'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled RoPE"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scaled RoPE"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "scaled RoPE"),
    ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "yarn"}}, "scaled RoPE"),
    ({"rope_scaling": "linear"}, "scaled RoPE"),
    ({"rope_parameters": [1]}, "scaled RoPE"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"is_causal": False}, "is_causal False"),
    ({"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "scaled RoPE"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0: not known here"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention True: not known here"),
    ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ({"num_local_experts": 8}, "num_local_experts 8: not known here"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"hidden_size": KeyError}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": "64", "head_dim": KeyError}, "hidden_size cannot be '64'"),
    ({"intermediate_size": 112.0}, "intermediate_size cannot be 112.0"),
    ({"num_attention_heads": 0, "head_dim": KeyError}, "num_attention_heads cannot be 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers cannot be -1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": -2}, "num_key_value_heads cannot be -2"),
    ({"head_dim": 15}, "head_dim cannot be 15"),
    ({"rope_theta": 0}, "rope_theta cannot be 0"),
    ({"rope_theta": -1}, "rope_theta cannot be -1"),
    ({"rope_theta": None}, "rope_theta cannot be None"),
    ({"eos_token_id": None}, "eos_token_id"),
    ({"eos_token_id": []}, "eos_token_id cannot be []"),
    ({"bos_token_id": 97}, "bos_token_id"),
    *[({name: 10**30}, f"{name} cannot be 1000") for name in
      ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim")],
    *[({name: 10**400}, f"{name} cannot be 1000") for name in ("rope_theta", "rms_norm_eps", "eos_token_id")],
])
def test_configs_that_would_be_misread_are_refused(checkpoint, changes, words):
    path, _, _ = checkpoint
    edit(path / "config.json", **{"rope_parameters": KeyError, **changes})
    refused(words, load, path)
    refused("config.json", load, path)


def test_keys_of_published_configs_that_change_no_vector_pass(checkpoint):
    """The first two stand in HuggingFaceTB/SmolLM2-135M and its -Instruct, as they are on the hub."""
    path, _, wanted = checkpoint
    edit(path / "config.json", is_llama_config=True, rope_interleaved=False, pretraining_tp=1,
         tokenizer_class="LlamaTokenizer",
         keys_to_ignore_at_inference=["past_key_values"], max_sequence_length=2048, temperature=0.6, do_sample=True,
         **{"transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16"}}})
    assert relative(load(path), wanted) <= TOLERANCE
    edit(path / "config.json", rope_interleaved=True)
    refused("rope_interleaved True: not known here", load, path)


def test_files_that_cannot_be_read_are_named(folder, checkpoint, tmp_path):
    path, _, _ = checkpoint
    weights = path / "model.safetensors"
    refused("tokenizer.json", Embedder.load, path, device="cpu")
    (path / "tokenizer.json").write_text("{}")
    refused("tokenizer.json", Embedder.load, path, device="cpu")
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("model.safetensors", load, path)
    weights.rename(path / "pytorch_model.bin")
    refused("pickle", load, path)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001.safetensors"}}')
    refused("model-00001.safetensors", load, path)
    for names in ('["model.safetensors"]', "null", '{"a": 1}'):
        (path / "model.safetensors.index.json").write_text(f'{{"weight_map": {names}}}')
        refused("index.json: its weight_map", load, path)
    (path / "config.json").write_text("{")
    refused("config.json", load, path)
    (path / "config.json").write_text("[]")
    refused("config.json", load, path)
    refused("no such model folder", Embedder.load, tmp_path / "nowhere")
    for options, words in [({"pooling": "max"}, "pooling"), ({"max_length": 2}, "max_length"),
                           ({"dtype": "float7"}, "float7"), ({"device": "tpu9"}, "tpu9")]:
        refused(words, Embedder.load, folder, **options)


def test_a_tokenizer_with_ids_that_the_model_lacks_is_refused(checkpoint):
    """Embeddings are 0 to 96 here; fewer ids are usual, and an added padding token comes out of no text."""
    path, _, _ = checkpoint
    for last, special, plain in ((96, [], []), (96, ["<pad>"], []), (97, [], []), (96, [], ["[NEW]"])):
        tokenizer = Tokenizer(BPE({f"t{i}": i for i in range(last + 1)}, []))
        tokenizer.add_special_tokens(special)
        tokenizer.add_tokens(plain)
        tokenizer.save(str(path / "tokenizer.json"))
        if last < 97 and not plain:
            Embedder.load(path, device="cpu")
        else:
            refused("the id 97, the config's vocab_size is 97", Embedder.load, path, device="cpu")


def test_a_byte_order_mark_is_no_part_of_a_tokenizer(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "marked")
    for name in ("tokenizer.json", "config.json"):
        file = tmp_path / "marked" / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert Embedder.load(tmp_path / "marked", device="cpu").tokenize(TEXTS) == Embedder.load(folder).tokenize(TEXTS)


# ---------------------------------------------------------------------------------------------- adapters

# What the hub's intfloat/e5-mistral-7b-instruct says of its adapter, with what older versions of peft wrote.
PUBLISHED = {
    "auto_mapping": None, "base_model_name_or_path": "mistralai/Mistral-7B-v0.1", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_alpha": 32, "lora_dropout": 0.1, "modules_to_save": None,
    "peft_type": "LORA", "r": 16, "revision": None, "target_modules": list(PROJECTIONS),
    "task_type": "FEATURE_EXTRACTION",
}


@pytest.fixture
def adapter(folder, tmp_path):
    """A folder like the published adapter's: its config, weights of the tiny base's shapes."""
    decoder = load_decoder(folder, "cpu", torch.float32)
    decoder.add_lora(16)
    tensors = {f"base_model.model.{name}.weight": torch.randn_like(p) / 10
               for name, p in decoder.lora_parameters().items()}
    path = tmp_path / "adapter"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(PUBLISHED))
    return path


def test_the_published_adapters_config_loads(folder, adapter, embedder):
    loaded = Embedder.load(folder, adapter=adapter, device="cpu")
    assert loaded.decoder.layers[0].mlp.up_proj.scaling == 2 and loaded.decoder.lora["lora_dropout"] == 0.1
    assert relative(loaded.encode(TEXTS), embedder.encode(TEXTS)) > 0.01
    refused("make base BASE=mistralai/Mistral-7B-v0.1", Embedder.load, adapter)


def test_a_base_that_make_built_is_asked_for_by_its_layers(tmp_path):
    for name, words in [("models/no-such-l3", "`make base` with its BASE and LAYERS"), (5, "BASE=5")]:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
        refused(words, Embedder.load, tmp_path)


def test_all_that_peft_writes_by_default_loads(folder, adapter):
    """A key of the next release would be refused only where it asks for something."""
    defaults = peft.LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS)).to_dict()
    edit(adapter / "adapter_config.json", **json.loads(json.dumps(defaults, default=list)), new_in_peft_99=None)
    Embedder.load(folder, adapter=adapter, device="cpu")


@pytest.mark.parametrize("targets, kept, words", [
    (["q_proj", "v_proj"], (), "holds no tensor"),
    (["q_proj", "v_proj"], ("q_proj",), "no tensor of v_proj"),
    ("all-linear", ("q_proj", "up_proj"), "no tensor of k_proj"),
    (r".*\.(gate|up)_proj", ("up_proj",), "no tensor of gate_proj"),
    (["model.layers.0.self_attn.o_proj"], ("q_proj",), "no tensor of o_proj"),
])
def test_projections_that_the_adapters_file_lacks_are_named(folder, adapter, targets, kept, words):
    file = adapter / "adapter_model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name.split(".")[-3] in kept}
    save_file(tensors, file)
    edit(adapter / "adapter_config.json", target_modules=targets)
    refused(words, Embedder.load, folder, adapter=adapter, device="cpu")


def test_a_base_of_the_same_name_by_another_owner_is_another(folder, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "models" / "Mistral-7B-v0.1")
    refused("make base BASE=mistralai/Mistral-7B-v0.1", Embedder.load, adapter)
    shutil.move(tmp_path / "models" / "Mistral-7B-v0.1", tmp_path / "models" / "mistralai" / "Mistral-7B-v0.1")
    assert Embedder.load(adapter, device="cpu").base == "models/mistralai/Mistral-7B-v0.1"


@pytest.fixture
def exported(folder, tmp_path):
    """A folder of sentence-transformers around the tiny base."""
    path = tmp_path / "exported"
    shutil.copytree(folder, path)
    modules = [{"idx": i, "name": str(i), "path": name, "type": f"sentence_transformers.models.{kind}"}
               for i, (name, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("", "Normalize")])]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 7, "do_lower_case": false}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 64, "pooling_mode_mean_tokens": true}')
    return path


def test_an_exported_folder_says_how_it_pools_and_how_long_texts_are(exported):
    embedder = Embedder.load(exported, device="cpu")
    assert (embedder.pooling, embedder.max_length) == ("mean", 7)
    assert Embedder.load(exported, device="cpu", max_length=9).max_length == 9


@pytest.mark.parametrize("file, content, words", [
    ("modules.json", [{"type": "sentence_transformers.models.Transformer"}, {"type": "sentence_transformers.models.Dense"}],
     "a module of type sentence_transformers.models.Dense"),
    ("modules.json", {}, "holds no JSON list"),
    ("sentence_bert_config.json", {"max_seq_length": 7, "do_lower_case": True}, "do_lower_case True"),
    ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode_cls_token True: not known here"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, "names no pooling"),
    ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt false"),
    ("modules.json", [{"type": "Transformer", "path": ""}], "modules.json: names no pooling that is here"),
    ("modules.json", [{"type": "Pooling", "path": "1_Pooling"}] * 2, "names no pooling that is here, or several"),
    ("modules.json", [{"type": "Pooling"}], "modules.json: names no pooling that is here"),
    ("modules.json", [{"type": "Pooling", "path": "pool"}], "pool/config.json: named by"),
    ("modules.json", ["Pooling"], "a module of type None"),
])
def test_exported_folders_that_would_be_misread_are_refused(exported, file, content, words):
    (exported / file).write_text(json.dumps(content))
    refused(words, Embedder.load, exported, device="cpu")


def test_pooling_is_where_modules_json_says(exported):
    """Also beside an old 1_Pooling; a given pooling needs none of these files."""
    (exported / "modules.json").write_text('[{"type": "Transformer", "path": ""}, {"type": "Pooling", "path": "pool"}]')
    refused("give pooling=last or mean or weighted-mean", Embedder.load, exported, device="cpu")
    assert Embedder.load(exported, device="cpu", pooling="last").pooling == "last"
    (exported / "pool").mkdir()
    (exported / "pool/config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    assert Embedder.load(exported, device="cpu").pooling == "weighted-mean"


def test_a_runs_pooling_is_text(tmp_path):
    (tmp_path / "config.json").write_text('{"pooling": ["mean"]}')
    refused("'pooling' is missing or not a string", stored_pooling, tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "lora_only"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"layers_to_transform": [0]}, "layers_to_transform"),
    ({"peft_type": "IA3"}, "IA3"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
    ({"r": KeyError}, "r None"),
    ({"peft_type": KeyError}, "peft_type None"),
    ({"some_new_lora": {"a": 1}}, "some_new_lora {'a': 1}: not known here"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
    *[({"r": value}, f"but r is {value} in adapter_config.json") for value in (8, 10**12, 10**30)],
    *[({"r": value}, f"r {value!r}") for value in ("4", 0, -1, 4.0)],
    *[({"lora_alpha": value}, f"lora_alpha {value!r:.60}") for value in ("8", None, 10**400)],
    *[({"target_modules": value}, f"target_modules {value!r:.60}: a list of names or a regular expression")
      for value in ("(.*q_proj", "a{99999999999999999999}", 5, ["q_proj", 5], {"q_proj": 1})],
    *[({"lora_dropout": value}, f"lora_dropout {value!r}") for value in (None, 2)],
])
def test_adapters_that_would_be_misread_are_refused(folder, adapter, changes, words):
    edit(adapter / "adapter_config.json", **changes)
    refused(words, Embedder.load, folder, adapter=adapter, device="cpu")


def test_adapter_files_that_do_not_fit_are_refused(folder, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    one = next(iter(tensors))
    for changed, words in [
        ({**tensors, one.replace("q_proj", "norm").replace("down_proj", "norm"): torch.ones(1)}, "norm"),
        ({**tensors, one.replace("layers.0", "layers.9"): torch.ones(1)}, "layers.9"),
        ({key: value for key, value in tensors.items() if key != one}, "layers.0"),
        ({**tensors, one.replace("model.layers", "layers").replace("base_model.", ""): tensors[one] + 1}, "a second layers.0"),
        ({**tensors, one: torch.ones(16)}, "has shape (16,), but r is 16"),
        ({**tensors, one: tensors[one].to(torch.int8)}, f"{one} is I8"),
    ]:
        save_file(changed, file)
        refused(words, Embedder.load, folder, adapter=adapter, device="cpu")
    file.rename(adapter / "adapter_model.bin")
    refused("pickle", Embedder.load, folder, adapter=adapter, device="cpu")


def test_a_run_finds_its_base_and_gives_the_trained_vectors(folder, tmp_path):
    trained = Embedder.load(folder, device="cpu")
    trained.decoder.add_lora(rank=4)
    for parameter in trained.decoder.lora_parameters().values():
        torch.nn.init.normal_(parameter, std=0.1)
    trained.save_adapter(tmp_path / "run")
    wanted = trained.encode(TEXTS)
    for again in (Embedder.load(tmp_path / "run", device="cpu"),
                  Embedder.load(folder, adapter=tmp_path / "run", device="cpu")):
        assert again.encode(TEXTS).equal(wanted)
    assert relative(Embedder.load(folder, device="cpu").encode(TEXTS), wanted) > 0.01
    refused("a second one", Embedder.load, tmp_path / "run", adapter=tmp_path / "run")
    trained.pooling = "weighted-mean"                # an adapter that is copied without its run keeps it
    trained.save_adapter(tmp_path / "run")
    for again in (Embedder.load(tmp_path / "run", device="cpu"),
                  Embedder.load(folder, adapter=tmp_path / "run", device="cpu")):
        assert again.encode(TEXTS).equal(trained.encode(TEXTS)) and again.pooling == "weighted-mean"
    (tmp_path / "run/config.json").write_text('{"pooling": "mean"}')
    assert Embedder.load(tmp_path / "run", device="cpu").pooling == "mean"


def test_a_device_that_is_not_there_is_one_line():
    for name in ("mps", "cuda:77", "meta", "gpu", "hpu", "privateuseone"):
        with pytest.raises(UserError, match=f"^device {name}: [^\\n]+$"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu"


def test_on_a_gpu_attention_leaves_cudnn_alone(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))           # as if it was there
    try:
        assert pick_device("cuda").type == "cuda" and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_mistral_7b_at_rank_16_trains_41_943_040_parameters():
    """The paper's figure, on the meta device, where 7B parameters take no memory."""
    with torch.device("meta"):
        decoder = Decoder(Config(32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 10000.0, 4096, False, 1, 2))
    decoder.add_lora(16)
    check_trained(decoder)
    assert sum(p.numel() for p in decoder.parameters() if p.requires_grad) == 41_943_040
    decoder.add_lora(8, targets=("q_proj", "v_proj"))              # over the first: five projections keep rank 16
    with pytest.raises(UserError, match="would be trained"):
        check_trained(decoder)
