"""The study of arXiv 2309.17224 in small, through fp8scope itself: train, watch, read the answers from the database.

    make paper ARGS=--quick                         # one very small size, about a minute
    make paper                                      # three sizes; writes docs/study.md
    make paper ARGS=--report                        # figures and pages again, from the runs that are there

`training.py` trains under the agent, `inference.py` evaluates what was trained, both stream to one collector;
`measure.py` and `observations.py` read the answers from its database; `figures.py` and `report.py` show them. A run
that the folder has a result of is not run again: a study that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from fp8scope_collector.storage.reader import Reader  # noqa: E402 - the path above is for what follows
from paper import inference, training  # noqa: E402
from paper.figures import draw, write_pictures  # noqa: E402
from paper.inference import EncoderEvaluation, Evaluation  # noqa: E402
from paper.measure import study  # noqa: E402
from paper.report import page, web_page  # noqa: E402
from paper.training import Job, Size  # noqa: E402

Work = Job | Evaluation | EncoderEvaluation
Result = dict[str, Any]

LOSS_SCALE = 2.0**12  # as the paper's; gradients then bear constants that inputs bear, too
SEEDS = 3
VALIDATION_BATCHES = 8  # of four times a training batch
TASKS = ("kind", "package")
BESIDE = ("bf16", "amax-margin-0-all", "amax-margin-3-all", "current", "delayed")
SMALL = Size("1M", layers=4, width=144, heads=2, context=96, batch=8, steps=300, lr=1e-3, tuning_steps=100)
MIDDLE = Size("4M", layers=6, width=240, heads=3, context=96, batch=8, steps=200, lr=5e-4, tuning_steps=70)
LARGE = Size("12M", layers=8, width=352, heads=4, context=96, batch=8, steps=150, lr=6e-4, tuning_steps=50)
TINY = Size("0.1M", layers=2, width=64, heads=2, context=48, batch=8, steps=400, lr=3e-3, tuning_steps=0)
# Constants by size: all of them where a run is cheap, the ends of the interval where it is not.
SWEEP = {"1M": range(-8, 10), "4M": (-4, 2, 6, 7, 8), "12M": (-3, 2, 6, 7, 8)}
ENDS = (-6, -5, 5, 6, 7)  # with the other seeds
TUNED = {"1M": SEEDS, "4M": SEEDS, "12M": 2}  # seeds of fine-tuning
FINE_TUNED = {"1M": (-8, -6, -5, -4, -3, 2, *range(6, 11)), "4M": (-4, 2, 6, 7, 8), "12M": (2, 6, 7, 8)}
# At rest, after training.
AT_REST = {"1M": range(-9, 10), "4M": (-8, -6, -5, -4, -3, 0, 3, 4, 5, 6, 7, 8), "12M": (-8, -5, -4, 0, 5, 6, 7, 8)}


def full_plan() -> list[list[Work]]:
    """What is run, in stages: each may need the weights of those before it. The first stages are worth most."""
    one, rest = range(1), range(1, SEEDS)
    both, sizes = ("fp32", "amax-graphcore"), (SMALL, MIDDLE, LARGE)
    first = jobs([SMALL], both, range(SEEDS)) + jobs([SMALL], constants(SWEEP["1M"]), one)
    first += jobs([SMALL], ("amax-hybrid",), range(SEEDS)) + jobs([MIDDLE, LARGE], both, range(SEEDS))
    tuned = [job for size in sizes for task in TASKS for job in jobs([size], both, range(TUNED[size.name]), task)]
    more = jobs([SMALL], (*BESIDE, "stale"), one) + jobs([MIDDLE, LARGE], ("amax-hybrid",), one)
    more += jobs([SMALL], constants(ENDS), rest)
    for size in (MIDDLE, LARGE):
        more += jobs([size], constants(SWEEP[size.name]), one)
    for size in sizes:
        more += jobs([size], constants(FINE_TUNED[size.name]), one, TASKS[0])
    more += jobs([SMALL], ("bf16",), rest)
    rests: list[Work] = [
        Evaluation(size, task, tuple(AT_REST[size.name])) for size in sizes for task in ("text", *TASKS)
    ]
    return [[*first], [*tuned], [*more], [*rests, EncoderEvaluation((-10, -8, -6, -4, -2, 0, 2, 3, 4, 5, 6))]]


def quick_plan() -> list[list[Work]]:
    """One model that is trained in seconds, four constants in training, many at rest."""
    trained = jobs([TINY], ("fp32", "amax-graphcore", *constants((-8, 5, 9))), range(1))
    return [[*trained], [Evaluation(TINY, "text", tuple(range(-12, 12)), sweep_examples=192)]]


def constants(values: Iterable[int]) -> tuple[str, ...]:
    """The methods' names."""
    return tuple(f"constant{value:+d}" for value in values)


def jobs(sizes: Sequence[Size], methods: Sequence[str], seeds: Iterable[int], task: str | None = None) -> list[Job]:
    """Each method of each size with each seed."""
    return [
        Job(size, method, seed, LOSS_SCALE, VALIDATION_BATCHES, task)
        for size in sizes
        for seed in seeds
        for method in methods
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The study of arXiv 2309.17224 in small, through fp8scope itself.")
    parser.add_argument("--quick", action="store_true", help="one very small size and a short sweep")
    parser.add_argument("--report", action="store_true", help="run nothing: report what is there")
    parser.add_argument("--dir", type=Path, help="where runs are kept (default: runs/paper or runs/paper-quick)")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side (default %(default)s)")
    args = parser.parse_args(argv)
    plan = quick_plan() if args.quick else full_plan()
    folder: Path = (args.dir or Path("runs") / ("paper-quick" if args.quick else "paper")).resolve()
    (folder / "results").mkdir(parents=True, exist_ok=True)
    if not args.report:
        run_all(plan, folder, args.workers)
    finished = [work for stage in plan for work in stage if result_file(folder, work.name).exists()]
    if not finished:
        raise SystemExit(f"{folder} has no results; run the study without --report")
    report(finished, folder, published=not args.quick)
    return 0


def report(finished: list[Work], folder: Path, *, published: bool) -> None:
    """Writes results.json, study.md, report.html and figures into `folder`; what is published goes to docs, too."""
    reader = Reader(database(folder))
    costs = [json.loads(result_file(folder, work.name).read_text()) for work in finished]
    found = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"{datetime.now():%B %Y}",
        "cpu_seconds": round(sum(each["cpu_seconds"] for each in costs)),
        "collector_cpu_seconds": round(json.loads(collector_cost(folder).read_text())),
        "runs": len(finished),
        "rows": sum(each["rows_recorded"] for each in costs),
        "parameters": {each["name"].split("-")[0]: each["parameters"] for each in costs if "-train-" in each["name"]},
        "shapes": {work.size.name: vars(work.size) for work in finished if isinstance(work, Job)},
        **study(reader, [described(work) for work in finished], LOSS_SCALE),
    }
    accumulators = folder / "results" / "accumulators.json"
    if not accumulators.exists():
        shapes = {work.size.name: work.size for work in finished if isinstance(work, Job)}
        write(accumulators, {name: inference.accumulators(size, folder) for name, size in shapes.items()})
    found["accumulators"] = json.loads(accumulators.read_text())
    write(folder / "results.json", found)
    found = json.loads((folder / "results.json").read_text())  # keys are texts from here on
    figures = draw(reader, found)
    text = page(found, images="images/study")
    (folder / "study.md").write_text(text)
    (folder / "report.html").write_text(web_page(page(found, images="images"), figures))
    drawn = write_pictures(folder / "report.html", list(figures), folder / "images")
    if published:
        (HERE / "results").mkdir(exist_ok=True)
        shutil.copy(folder / "results.json", HERE / "results" / "study.json")
        (ROOT / "docs" / "study.md").write_text(text)
        for picture in drawn:
            (ROOT / "docs" / "images" / "study").mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, ROOT / "docs" / "images" / "study" / picture.name)
    print(f"{len(finished)} runs, {found['cpu_seconds']} CPU seconds; see {folder / 'report.html'}, or all runs with")
    print(f"  fp8scope dashboard --db {database(folder)}")


def described(work: Work) -> dict[str, Any]:
    """What `measure.study` wants to know of a run."""
    if isinstance(work, Job):
        kind = "train" if work.task is None else "tune"
        return {"name": work.name, "kind": kind, "size": work.size.name, "method": work.method, "seed": work.seed} | {
            "task": work.task
        }
    size, task = (work.size.name, work.task) if isinstance(work, Evaluation) else ("MiniLM", "retrieval")
    return {"name": work.name, "kind": "infer", "size": size, "method": "", "seed": 0, "task": task}


# Running -----------------------------------------------------------------------------------------------------------


def run_all(plan: list[list[Work]], folder: Path, workers: int) -> None:
    """Runs what has no result yet, `workers` at a time, one thread each, as `in_order` has them.

    No worker waits for the end of a stage: it takes the next run whose weights to start from are there.
    """
    waiting = [work for work in in_order(plan) if not result_file(folder, work.name).exists()]
    if not waiting:
        return
    # The workers inherit it: a thread each, and malloc keeps what is freed (page faults are a fifteenth of a step).
    kept = str(1 << 30)
    os.environ |= {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": kept, "MALLOC_MMAP_THRESHOLD_": kept}
    began, done, count, whole = time.monotonic(), 0.0, len(waiting), sum(work.cost for work in waiting)
    running: dict[Future[Result], Work] = {}
    with collector(folder) as address, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            while waiting or running:
                while len(running) < workers and (work := _ready(waiting, folder)):
                    waiting.remove(work)
                    running[pool.submit(run, work, address, folder)] = work
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    result = checked(future.result())
                    write(result_file(folder, result["name"]), result)
                    done += running.pop(future).cost
                    left_min = (time.monotonic() - began) / done * (whole - done) / 60
                    score = next(result[name] for name in ("validation_loss", "accuracy", "amax") if name in result)
                    cost = f"{result['cpu_seconds']:.0f} CPU s, about {left_min:.0f} min left"
                    number = count - len(waiting) - len(running)
                    print(f"{number}/{count}  {result['name']}  {score:.4f}  {cost}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def in_order(plan: list[list[Work]]) -> list[Work]:
    """Stage after stage; of each the longest first, so that the workers end together."""
    return [work for stage in plan for work in sorted(stage, key=lambda each: -each.cost)]


def _ready(waiting: list[Work], folder: Path) -> Work | None:
    """The first that has the weights it starts from."""
    return next((work for work in waiting if work.start is None or result_file(folder, work.start).exists()), None)


def run(work: Work, collector: str, folder: Path) -> Result:
    """What the work comes to; called in a process of its own."""
    if isinstance(work, Job):
        return training.run(work, collector=collector, folder=folder)
    if isinstance(work, Evaluation):
        return inference.run(work, collector=collector, folder=folder)
    return inference.run_encoder(work, collector=collector, folder=folder)


def checked(result: Result) -> Result:
    """The result, once all its rows have arrived."""
    if result["rows_dropped"] or result["rows_sent"] != result["rows_recorded"]:
        raise SystemExit(
            f"{result['name']}: of {result['rows_recorded']} rows {result['rows_sent']} arrived, and "
            f"{result['rows_dropped']} were dropped before; expected all. Start the study again: what is done stays"
        )
    return result


def result_file(folder: Path, name: str) -> Path:
    return folder / "results" / f"{name}.json"


def write(path: Path, value: object) -> None:
    """`value` as JSON, there as a whole or not at all."""
    path.with_suffix(".new").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".new").rename(path)


def database(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


@contextmanager
def collector(folder: Path) -> Iterator[str]:
    """A collector of the study's own; yields its address."""
    command = [sys.executable, "-m", "fp8scope_collector", "serve", "--grpc", "127.0.0.1:0"]
    environment = {**os.environ, "FP8SCOPE_DB": database(folder), "FP8SCOPE_METRICS": "127.0.0.1:0"}
    log = folder / "collector.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _address(process, log)
        finally:
            process.terminate()
            _, _, used = os.wait4(process.pid, 0)
            cost = collector_cost(folder)
            before = json.loads(cost.read_text()) if cost.exists() else 0.0
            write(cost, before + used.ru_utime + used.ru_stime)


def collector_cost(folder: Path) -> Path:
    """Where the processor seconds of all collectors of the study are kept; with those of the process that diagnoses."""
    return folder / "results" / "collector.json"


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(600):
        if found := re.search(r"grpc (\S+?), metrics", log.read_text()):
            return found[1]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the collector did not start; see {log}")


if __name__ == "__main__":
    sys.exit(main())
