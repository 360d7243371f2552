"""tools/bench/peer.py: sentence-transformers + peft by their own classes, for train.py here and the
study."""
import time
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from sentence_transformers import (SentenceTransformer, SentenceTransformerTrainer,
                                   SentenceTransformerTrainingArguments)
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from transformers import TrainerCallback

from model import PROJECTIONS, instruct
from train import learning_rate


def train_peer(s: dict, args, batches: list[list[dict]]) -> tuple[list[float], list[float]]:
    """Train on these batches; returns the loss of each step and the time at which each step had ended.

    s: the settings of bench/train.py. args: train.py's flags for them, which make optimizer and schedule.
    "save_to" in s: the folder for the trained adapter, in PEFT's own form.
    """
    datasets.disable_progress_bars()
    folder = Path(s["folder"])
    # dtype: the weights' own; the adapter is float32, as peft makes it over a 16-bit base
    model = SentenceTransformer(str(folder / "exported"), device=s["device"],
                                model_kwargs={"dtype": s["dtype"]})
    config = LoraConfig(r=s["lora_rank"], lora_alpha=2 * s["lora_rank"], lora_dropout=s["lora_dropout"],
                        target_modules=list(PROJECTIONS), task_type="FEATURE_EXTRACTION")
    inner = get_peft_model(model[0].model, config)
    missed = set_peft_model_state_dict(inner, load_file(folder / "init" / "adapter_model.safetensors"))
    assert not missed.unexpected_keys
    model[0].model = inner

    rows = [row for batch in batches for row in batch]
    columns = {"anchor": [instruct(row["prompt"], row["query"]) for row in rows],
               "positive": [row["pos"][0] for row in rows]}
    if s["negatives"]:
        columns["negative"] = [row["neg"][0] for row in rows]
    loss = CachedMultipleNegativesRankingLoss(
        model, scale=1 / args.temperature, mini_batch_size=s["peer_rows"],
        mini_batch_num_tokens=s["tokens_per_chunk"] if s["variant"].endswith("tokens") else None)
    losses, ended, cuda = [], [], model.device.type == "cuda"
    loss.register_forward_hook(lambda module, inputs, value: losses.append(value.detach()))

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            ended.append(time.perf_counter())

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr,
                                  weight_decay=args.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, s["steps"], args) / args.lr)
    trainer = SentenceTransformerTrainer(
        model, SentenceTransformerTrainingArguments(
            output_dir=str(folder / "peer"), per_device_train_batch_size=s["batch_size"],
            max_steps=s["steps"], max_grad_norm=args.max_grad_norm,
            bf16=s["dtype"] == "bfloat16", fp16=s["dtype"] == "float16",
            use_cpu=not cuda, save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True,
            batch_sampler=lambda data, **kw: DefaultBatchSampler(
                torch.utils.data.SequentialSampler(data), kw["batch_size"], kw["drop_last"])),
        train_dataset=datasets.Dataset.from_dict(columns), loss=loss, optimizers=(optimizer, schedule),
        callbacks=[Watch()])
    trainer.train()
    if "save_to" in s:
        inner.save_pretrained(s["save_to"])
    return [float(value) for value in losses], ended
