"""plumbing/blocks.py: a million texts through an embedder, whose `encode` is made for some hundreds.

Equal texts are embedded once. They go in blocks, the longest first, so that memory runs out at the start or
never. Progress is shown by the block, the cache keeps blocks, and the ranks share them.
"""
import torch

from plumbing.cache import PROBE, VectorCache
from plumbing.progress import progress
from plumbing.ranks import rank, sum_over_ranks, world_size

BLOCK = 256                           # texts: the unit of progress, of the cache and of sharing among ranks

Pair = tuple[str, str]                # (instruction, text)


class BlockEncoder:
    """encode(pairs) -> their vectors. batch_tokens: of a forward pass (None: the embedder's default)."""

    def __init__(self, embedder, cache: VectorCache | None = None, batch_tokens: int | None = None):
        self.embedder, self.cache, self.batch_tokens = embedder, cache, batch_tokens
        self.size = embedder.encode(PROBE[:1]).shape[1]      # D, whatever the text
        self.texts = 0                                       # embedded by this rank since take_counts
        self.truncated = 0                               # of these, longer than the embedder's max_length

    def encode(self, pairs: list[Pair], label: str, alone=False) -> torch.Tensor:
        """-> [n, D] on the CPU, in the order of the pairs, not normalised.

        label: names the work in lines of progress. alone: this rank does it all, whatever the others do.
        """
        distinct = sorted(set(pairs), key=lambda pair: (-len(pair[0]) - len(pair[1]), pair))
        blocks = [slice(i, i + BLOCK) for i in range(0, len(distinct), BLOCK)]
        if not alone:
            blocks = blocks[rank()::world_size()]
        vectors = torch.zeros(len(distinct), self.size)
        for block in progress(blocks, label, f"blocks of {BLOCK} texts"):
            vectors[block] = self.encode_block(distinct[block])
        if world_size() > 1 and not alone:
            vectors = vectors.to(self.embedder.device)
            sum_over_ranks(vectors)                          # each row is zero on all ranks but one
            vectors = vectors.cpu()
        row_of = {pair: row for row, pair in enumerate(distinct)}
        return vectors[[row_of[pair] for pair in pairs]]

    def encode_block(self, pairs: list[Pair]) -> torch.Tensor:
        """-> [n, D], from the cache if it has this block."""
        kept = self.cache.get(pairs) if self.cache else None
        if kept is None:
            instructions, texts = zip(*pairs)
            before = self.embedder.truncated
            vectors = self.embedder.encode(list(texts), list(instructions), normalize=False,
                                           tokens_per_chunk=self.batch_tokens)
            truncated = self.embedder.truncated - before
            if self.cache:
                vectors = self.cache.put(pairs, vectors, truncated)
            kept = vectors, truncated
        vectors, truncated = kept
        self.texts += len(pairs)
        self.truncated += truncated
        return vectors

    def take_counts(self) -> tuple[int, int]:
        """(texts embedded, texts truncated) by all ranks since the last call."""
        counts = torch.tensor([self.texts, self.truncated], device=self.embedder.device)
        sum_over_ranks(counts)
        self.texts = self.truncated = 0
        texts, truncated = counts.tolist()
        return texts, truncated
