"""One cached-gradient step, run by torchrun with one rank or two: writes loss, summed gradient and vectors."""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402
from batches import Examples, prepare  # noqa: E402
from model import Embedder, leave  # noqa: E402

base, data, queries, tokens, out = sys.argv[1:]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
embedder = Embedder.load(base, dtype="float64", max_length=32)
embedder.decoder.add_lora(4, 8, 0.0)
embedder.decoder.double().train()
generator = torch.Generator().manual_seed(1)
parameters = embedder.decoder.lora_parameters()
for name, p in parameters.items():
    if name.endswith("lora_B"):
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    p.grad = torch.zeros_like(p)
args = train.options(["--base", base, "--data", data, "--out", "unused"])
batch = prepare(Examples([data]), np.arange(int(queries)), embedder.tokenize, args, 0, rank, world)
targets = torch.arange(batch.queries)
loss, vectors, _, _ = train.cached_gradients(
    embedder.embed, batch, lambda v: train.info_nce(v[:batch.queries], v[batch.queries:], targets, 0.02, batch.valid),
    int(tokens) if rank == 0 else int(tokens) // 3, 0, (0, 0, rank))       # other chunks on the other rank
train.sum_over_ranks([p.grad for p in parameters.values()])
if rank == 0:
    torch.save((loss, torch.cat([p.grad.flatten() for p in parameters.values()]), vectors), out)
dist.barrier()                    # nobody tears the connections down while another still needs them
dist.destroy_process_group()
leave(0)
