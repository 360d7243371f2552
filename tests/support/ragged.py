"""Training examples of ragged lengths, for the tests that train."""
import json

import torch

WORDS = ("tea", "river", "stone", "¿qué?", "Быстрая лиса", "周末看书", "quickly", "under the bridge", "42", "né")


def write_rows(path, rows: int):
    """Ragged texts, some of them cut at the maximum length, each row with one negative."""
    generator = torch.Generator().manual_seed(3)

    def text():
        length = int(torch.randint(1, 30, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))
    with open(path, "w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps({"prompt": ("", "Find the reply")[i % 2], "query": text(), "pos": [text()],
                                   "neg": [text()]}, ensure_ascii=False) + "\n")
    return path
