"""Corpora larger than memory would hold, and two ranks that score as one."""
import json
import os
import subprocess
import sys

from scoring import MINI, ROOT

MEMORY = """
import resource, torch
from plumbing import metrics
size, count, chunk = 64, 1_000_000, 8192
def chunks():
    for first in range(0, count, chunk):
        generator = torch.Generator().manual_seed(first)
        yield first, torch.randn(min(chunk, count - first), size, generator=generator)
queries = next(chunks())[1][:20]                  # the first twenty documents: each must find itself
metrics.search(queries, [next(chunks())], 10)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scores, numbers = metrics.search(queries, chunks(), 1000)
assert numbers[:, 0].tolist() == list(range(20)) and (scores[:, 0] > 0.999).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""


def test_a_million_vectors_pass_in_fixed_memory():
    """256 MB of vectors go by; what stays is 20 x 1000 scores and a chunk of 2 MB."""
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000, f"{done.stdout} kB"


CORPUS = """
import json, resource, sys, zlib
from pathlib import Path
import torch
import evaluate
folder, documents = Path(sys.argv[1]), int(sys.argv[2])
class Sketch:                                     # the text's checksum decides its vector
    device, truncated = torch.device("cpu"), 0
    def encode(self, texts, prompts="", normalize=False, tokens_per_chunk=0):
        sums = torch.tensor([zlib.crc32(text.encode()) for text in texts])
        return torch.sin(sums[:, None] % 9973 * torch.arange(1, 9) + sums[:, None] // 9973).float()
(folder / "qrels").mkdir()
(folder / "task.json").write_text('{"name": "Large", "kind": "retrieval"}')
with open(folder / "corpus.jsonl", "w") as file:
    file.writelines(json.dumps({"_id": f"d{i}", "title": f"Title {i}", "text": f"text {i} " * 9}) + "\\n"
                    for i in range(documents))
with open(folder / "queries.jsonl", "w") as file:
    file.writelines(json.dumps({"_id": f"q{i}", "text": f"Title {i} " + (f"text {i} " * 9).strip()}) + "\\n"
                    for i in range(20))
(folder / "qrels/test.tsv").write_text("".join(f"q{i}\\td{i}\\t1\\n" for i in range(20)))
encoder = evaluate.Encoder(Sketch(), evaluate.options(["m"]))
scores = evaluate.evaluate(encoder, evaluate.find_tasks([str(folder)]))["details"]["Large"]
assert scores["recall_at_100"] == 1 and scores["texts"] == documents + 20, scores
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_retrieval_task_needs_no_more_memory_for_a_larger_corpus(tmp_path):
    """From disk to score, peak memory in kB: the texts alone of the 300,000 documents more are 33 MB in the
    file, and a set of their ids takes 44 MB; what may grow is a hash of 8 bytes a document."""
    peaks = []
    for documents in (20_000, 320_000):
        folder = tmp_path / str(documents)
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", CORPUS, folder, str(documents)], cwd=ROOT,
                              capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 12_000, peaks


SHARDS = """
import json, os, sys
import evaluate
from plumbing import blocks
from plumbing.errors import command
from scoring import Recorder
spy = Recorder()
evaluate.Embedder.load = lambda *_, **__: spy
blocks.BLOCK = 16                                 # enough blocks for both
def main():
    evaluate.main()
    embedded = [pair for pair in spy.seen if pair[1] not in blocks.PROBE]
    with open(f"{sys.argv[-1]}.{os.environ.get('RANK', 0)}", "w") as file:
        json.dump(embedded, file)
command(main)
"""


def test_two_processes_score_as_one_and_share_its_work(tmp_path):
    """evaluate.py's own main under torchrun: the same --out, and no text embedded by both ranks."""
    (tmp_path / "shards.py").write_text(SHARDS)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "OMP_NUM_THREADS": "1"}
    flags = [tmp_path / "shards.py", tmp_path, "--tasks", MINI, "--device", "cpu", "--corpus-chunk", "50",
             "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, out in ([], "one"), (torchrun, "two"):
        subprocess.run([sys.executable, *launcher, *flags, tmp_path / out], cwd=ROOT, env=environment,
                       check=True, timeout=300)
    one, two = (json.loads((tmp_path / out).read_text())[tmp_path.name] for out in ("one", "two"))
    for details in (one["details"], two["details"]):
        for scores in details.values():
            del scores["seconds"]
    assert one == two
    whole, *halves = (json.loads((tmp_path / name).read_text()) for name in ("one.0", "two.0", "two.1"))
    assert sorted(sum(halves, [])) == sorted(whole) and min(map(len, halves)) > len(whole) / 3
