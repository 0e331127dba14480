"""Where does the time of one training step go? A torch.profiler table, and a trace to look at.

    OMP_NUM_THREADS=1 python -m bench.profile_step [--profile chat] [--full] [--trace FILE]

One step of fastdpo at its fastest, after the warm-up.
"""

import argparse
import contextlib

import torch
from torch.profiler import ProfilerActivity, profile

from bench.contenders import CONTENDERS
from bench.length_profiles import DATASETS, TYPICAL
from bench.measure import CUDA
from bench.tables import environment
from bench.tasks import WARMUP_STEPS, task_of

ROWS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    profiles = ["tiny", *TYPICAL, *DATASETS, "real pairs"]
    parser.add_argument("--profile", default="chat", choices=profiles, help="of lengths")
    parser.add_argument("--full", action="store_true", help="all weights instead of LoRA")
    parser.add_argument("--trace", help="where to write a trace for chrome://tracing or Perfetto")
    args = parser.parse_args()
    task = task_of(args.profile, adapters=not args.full)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA
    with contextlib.closing(CONTENDERS["fastdpo, fastest"](task)) as trainer:
        for _ in range(WARMUP_STEPS):
            trainer.step()
        # the step runs in a thread of its own
        every_thread = torch.profiler._ExperimentalConfig(profile_all_threads=True)
        with profile(activities=activities, experimental_config=every_thread) as profiled:
            trainer.step()
            if CUDA:
                torch.cuda.synchronize()
    order = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
    print(f"one step of {task.batch} pairs, {task.model}; {environment()}")
    print(profiled.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60))
    if args.trace:
        profiled.export_chrome_trace(args.trace)


if __name__ == "__main__":
    main()
