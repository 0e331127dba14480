"""Tiny training runs in processes of their own, one or several that train together on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, os, sys
import tiny
from datasets import Dataset
from fastdpo import DPOConfig, DPOTrainer

out, settings = sys.argv[1], json.loads(sys.argv[2])
tokenizer = tiny.tokenizer()
rows = tiny.rows()
rows[0]["chosen"] *= 6  # one rank has a long pair, and more packs than the other
trainer = DPOTrainer(
    model=tiny.model("llama", len(tokenizer)),
    args=DPOConfig(
        output_dir=out, max_steps=3, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
        **settings,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
if trainer.is_world_process_zero():
    print("LOGGED", json.dumps([e for e in trainer.state.log_history if "loss" in e]))
trainer.accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # gloo's threads now and then abort a process that tears them down
"""


def logged_by(world_size: int, tmp_path: Path, **settings) -> list[dict[str, float]]:
    """What `world_size` processes log of three updates, a dictionary each."""
    paths = [str(Path(__file__).parent), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable]
    if world_size > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
        launcher += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path / "run"), json.dumps(settings)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOGGED"))
    return json.loads(line.removeprefix("LOGGED"))
