"""Two ranks that save at every second step and go on from the newest step that both have saved.

``python elastic.py FOLDER RECIPE [STEP]``: the first attempt of rank 1 dies in the middle of STEP. Every rank ends with
a digest of all that it consists of, in FOLDER.
"""

import hashlib
import io
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torch_molere import MetaReweighter

STEPS, EVERY = 12, 2

folder, recipe = Path(sys.argv[1]), {}
exec(Path(sys.argv[2]).read_text(), recipe)

torch.set_num_threads(1)
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], int(os.environ["RANK"])
# In a place of this attempt's own: gloo did not find the new ranks by the store that the agent keeps.
meeting = f"file://{folder / 'meeting'}-{attempt}"
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=int(os.environ["WORLD_SIZE"]))
dies = int(sys.argv[3]) if len(sys.argv) > 3 and attempt == "0" else STEPS
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
model = DistributedDataParallel(network)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
reweighter = MetaReweighter(model, optimizer, warmup_steps=2, every=2)
parts = {"model": model, "optimizer": optimizer, "reweighter": reweighter}
torch.manual_seed(100 + rank)  # dropout and batches differ

saved = [step for step in range(0, STEPS, EVERY) if (folder / f"{step}-{rank}.pt").exists()]
newest = torch.tensor(max(saved, default=0))
dist.all_reduce(newest, dist.ReduceOp.MIN)
done = int(newest)
if done:
    recipe["load_checkpoint"](folder / f"{done}-{rank}.pt", **parts)
for step in range(done, STEPS):
    rows = torch.randperm(40)[:10] + 40 * rank
    inputs = torch.sin(rows[:, None] * torch.arange(1.0, 7.0))
    outputs = model(inputs)
    if step == dies and rank == 1:
        os._exit(1)  # while rank 0 waits in its backward
    optimizer.zero_grad()
    reweighter.loss(outputs, rows % 3, rows).backward()
    optimizer.step()
    if (step + 1) % EVERY == 0 and step + 1 < STEPS:
        recipe["save_checkpoint"](folder / f"{step + 1}-{rank}.pt", step + 1, **parts)

everything = io.BytesIO()
torch.save([{name: part.state_dict() for name, part in parts.items()}, torch.get_rng_state()], everything)
assert reweighter.meta_updates == (STEPS - 2) // 2
(folder / f"end-{rank}").write_text(f"{attempt} {done} {hashlib.sha256(everything.getvalue()).hexdigest()}")
dist.barrier()
dist.destroy_process_group()
