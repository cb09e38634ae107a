# Tokens per second of a PyTorch DataLoader over token shards made by `marimba data prepare`, on one thread.
#
# The common practice for mapped tokens: row i is T + 1 tokens at i T, in random order, widened to int64 and collated by eight; no documents,
# segments or positions, which Marimba's rows have. Run by `marimba bench data --python PYTHON`; prints the best of five passes.
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

T, B = 2048, 8
TYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}


class Rows(Dataset):
    def __init__(self, folder):
        part = json.loads((folder / "manifest.json").read_text())["parts"][0]
        self.tokens = np.memmap(folder / f"{part['name']}.tok", dtype=TYPES[part["width"]], mode="r")
        self.n = (len(self.tokens) - 1) // T

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        row = torch.from_numpy(self.tokens[i * T : i * T + T + 1].astype(np.int64))
        return row[:-1], row[1:]


torch.set_num_threads(1)
rows = Rows(Path(sys.argv[1]))
rows.tokens.sum(dtype=np.int64)  # brings the pages into memory
best = 0.0
for _ in range(5):
    start, count = time.thread_time(), 0
    for x, _y in DataLoader(rows, batch_size=B, shuffle=True, num_workers=0):
        count += x.numel()
    best = max(best, count / (time.thread_time() - start))
print(best)
