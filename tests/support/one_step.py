"""One cached-gradient step, run by torchrun with one rank or more: writes loss, summed gradient and vectors."""
import sys

import numpy as np
import torch

import train
from model import Embedder
from plumbing.errors import leave
from plumbing.examples import Examples
from plumbing.ranks import end_ranks, rank, start_ranks, sum_over_ranks, world_size

base, data, queries, tokens, out = sys.argv[1:]
start_ranks("cpu")
embedder = Embedder.load(base, dtype="float64", max_length=32)
embedder.decoder.add_lora(4, 8, 0.0)
embedder.decoder.double().train()
generator = torch.Generator().manual_seed(1)
parameters = embedder.decoder.lora_parameters()
for name, parameter in parameters.items():
    if name.endswith("lora_B"):
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    parameter.grad = torch.zeros_like(parameter)
args = train.options(["--base", base, "--data", data, "--out", "unused"])
batch = train.prepare(Examples([data]), np.arange(int(queries)), embedder.tokenize, args, 0, rank(), world_size())
tokens = int(tokens) if rank() == 0 else int(tokens) // 3                      # other chunks on the other ranks
chunks = train.make_chunks(batch, tokens, embedder.device)
vectors = torch.zeros(batch.text_count, 32, dtype=torch.float64)
loss = train.cached_gradients(
    embedder.embed, chunks, vectors, lambda v: train.batch_loss(v, batch.query_count, batch.valid, args),
    key=(0, 0, rank()))
sum_over_ranks(*[parameter.grad for parameter in parameters.values()])
if rank() == 0:
    torch.save((loss, torch.cat([p.grad.flatten() for p in parameters.values()]), vectors), out)
end_ranks()
leave(0)
