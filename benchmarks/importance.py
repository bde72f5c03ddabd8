"""What quantizing with importance gives: the output of linears, and pictures, on held-out prompts.

    python benchmarks/importance.py CHECKPOINT WORK --out FILE

Importance is measured on scenes of the demo's kind (`zquant calibrate`), everything else on scenes
that are held out from the demo's training and are none of these.

`linears`: every matrix of the blocks is stored as each qtype that its rows are whole qblocks of,
with importance and without. What the rounding does to the output is exact, from the inputs' second
moments H = sum x x^T over all tokens and steps of the held-out prompts:

    output error = sqrt( tr(E H E^T) / tr(W H W^T) ),  E = stored weights - W

`latents`: the whole model by policies, with and without; |z - z0| / |z0| of the final latents of
the same noise, z0 by the checkpoint's own weights. The demo's rows of 192 weights are no whole
qblocks of 256, so that K types and IQ4_XS reach w2 and the text encoder only.

All in float32 on the CPU, nothing is timed. The last line is one JSON document.
"""

import argparse
import json
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from demo_quality import relative_l2
from machine import describe_machine, new_file, write_document
from torch import Tensor, nn

from zquant import Engine, RunRequest
from zquant.calibrate import Calibration, calibrate, exact_device
from zquant.convert.execute import convert
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.formats.imatrix import Imatrix, write_imatrix
from zquant.formats.model_folder import find_model
from zquant.formats.names import dit_file_names, text_encoder_file_names
from zquant.layers.linear import QuantLinear
from zquant.models.checkpoint import Checkpoint
from zquant.quant.codec import dequantize, quantize
from zquant.quant.policy import POLICIES
from zquant.quant.qtypes import QTYPES, QType

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from demo_scenes import caption, random_scene
from judge_demo import held_out_cases

SCHEMA = "zquant-importance-1"
SIZE = 128  # pixels, what the demo was made for
LINEAR_QTYPES = ("Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS")
LINEAR_QTYPES += ("Q3_K", "Q2_K")
POLICIES_SHOWN = ("Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
NOT_IN_BLOCKS = ("adaLN", "embedder", "final_layer")

Array = npt.NDArray[np.float64]
Moments = dict[str, Array]  # by name in the file: H, [K, K]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, end with the document."""
    args = _arguments(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    imatrix = calibrated(args)
    held_out = [_request(c.caption, c.seed, args.steps) for c in _held_out(args)]
    weights, moments = second_moments(args.checkpoint, held_out)
    report = {
        "schema": SCHEMA,
        "machine": describe_machine(),
        "settings": {
            "checkpoint": args.checkpoint.name,
            **{n: v for n, v in vars(args).items() if n not in ("checkpoint", "work", "out")},
        },
        "reference": "the checkpoint's weights, multiplied exactly in float32",
        "linears": linear_rows(weights, moments, imatrix, args.qtypes),
        "latents": latent_rows(args, imatrix, held_out),
    }
    print(_linear_table(report["linears"]) + "\n\n" + _latent_table(report["latents"]))
    if args.out:
        write_document(args.out, report)
    print(json.dumps(report))
    return 0


def calibrated(args: argparse.Namespace) -> Imatrix:
    """Importance from scenes of the training's kind."""
    rng = random.Random(args.seed + 1)
    captions = [caption(random_scene(rng, held_out=False), rng) for _ in range(args.calibration)]
    calibration = Calibration(
        files=find_model(args.checkpoint),
        requests=[_request(text, 1000 + i, args.steps) for i, text in enumerate(captions)],
        dataset=f"{args.calibration} scenes of the demo",
        device=exact_device("cpu"),
    )
    print(f"calibrating on {args.calibration} pictures", file=sys.stderr)
    return calibrate(calibration)


def second_moments(
    checkpoint: Path, requests: Sequence[RunRequest]
) -> tuple[dict[str, npt.NDArray[np.float32]], Moments]:
    """Weights float32 `[N, K]` and moments of every matrix of the blocks, by name in the file."""
    print(f"inputs of {len(requests)} held-out pictures", file=sys.stderr)
    observed = _Observed(find_model(checkpoint))
    with closing(Engine(observed, exact_device("cpu"))) as engine:
        for _ in engine.generate_all(requests):
            pass
        weights = {n: _weights(observed, officials) for n, officials in observed.names.items()}
    return weights, {name: h.double().numpy() for name, h in observed.moments.items()}


class _Observed(Checkpoint):
    """A checkpoint whose networks add up the second moments of their linears' inputs."""

    names: dict[str, tuple[str, ...]]
    moments: dict[str, Tensor]

    def dit(self, *args: Any) -> Any:
        return self._watch(super().dit(*args), dit_file_names(self.parts["dit"]))

    def text_encoder(self, *args: Any) -> Any:
        # it is the first to run
        self.names, self.moments = {}, {}
        names = text_encoder_file_names(self.parts["text_encoder"])
        return self._watch(super().text_encoder(*args), names)

    def _watch(self, network: nn.Module, names: Sequence[tuple[str, tuple[str, ...]]]) -> nn.Module:
        linears = {f"{n}.weight": m for n, m in network.named_modules()}
        for name, officials in names:
            module = linears.get(officials[0])
            if isinstance(module, QuantLinear) and not any(w in name for w in NOT_IN_BLOCKS):
                self.names[name] = officials
                k = module.in_features
                self.moments[name] = torch.zeros(k, k, dtype=torch.float64)
                module.register_forward_pre_hook(self._adder(name))
        return network

    def _adder(self, name: str) -> Callable[[nn.Module, Any], None]:
        def add(_: nn.Module, inputs: Any) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            self.moments[name] += x.t() @ x

        return add


def _weights(checkpoint: Checkpoint, officials: Sequence[str]) -> npt.NDArray[np.float32]:
    """float32 `[N, K]` of parts that a file stores as one."""
    rows = []
    for name in officials:
        part = next(p[name] for p in checkpoint.parts.values() if name in p)
        raw = torch.from_numpy(part.raw()).view(part.shape[0], -1)
        rows.append(dequantize(raw, part.qtype, torch.float32))
    return torch.cat(rows).numpy()


def linear_rows(
    weights: Mapping[str, npt.NDArray[np.float32]],
    moments: Moments,
    imatrix: Imatrix,
    qtypes: Sequence[str],
) -> list[dict[str, Any]]:
    """Per qtype and kind of matrix: output errors without and with importance."""
    rows = []
    for qtype in (QTYPES[name] for name in qtypes):
        kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for name, h in moments.items():
            if h.shape[0] % qtype.qblock:
                continue
            sums = imatrix.entries[name]
            importance = (sums.squares / sums.count).astype(np.float32)
            both = [output_error(weights[name], qtype, each, h) for each in (None, importance)]
            kinds[_kind(name)].append((both[0], both[1]))
        kinds["all"] = [pair for pairs in kinds.values() for pair in pairs]
        for kind, pairs in kinds.items():
            rows.append({"qtype": qtype.name, "kind": kind, "n": len(pairs), **_means(pairs)})
        print(f"{qtype}: {rows[-1]['without']:.3%} -> {rows[-1]['with']:.3%}", file=sys.stderr)
    return rows


def output_error(
    weights: npt.NDArray[np.float32],
    qtype: QType,
    importance: npt.NDArray[np.float32] | None,
    moments: Array,
) -> float:
    """Relative RMS error of `x @ weights.T` over inputs with those second moments."""
    packed = torch.from_numpy(quantize(weights, qtype, importance))
    exact = weights.astype(np.float64)
    error = dequantize(packed, qtype, torch.float32).numpy() - exact
    power = np.einsum("nk,nk->", exact @ moments, exact)
    return math.sqrt(np.einsum("nk,nk->", error @ moments, error) / power)


def _kind(name: str) -> str:
    """`layers.3.feed_forward.w2.weight` -> `feed_forward.w2`; `text encoder` before others'."""
    words = name.removesuffix(".weight").split(".")
    return ("text encoder " if words[0] == "blk" else "") + ".".join(words[2:])


def _means(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Of errors (without, with): means, geometric mean of their ratio, how often it is lower."""
    return {
        "without": statistics.fmean(a for a, _ in pairs),
        "with": statistics.fmean(b for _, b in pairs),
        "ratio": math.exp(statistics.fmean(math.log(b / a) for a, b in pairs)),
        "lower": sum(b < a for a, b in pairs) / len(pairs),
    }


def latent_rows(
    args: argparse.Namespace, imatrix: Imatrix, requests: Sequence[RunRequest]
) -> list[dict[str, Any]]:
    """Per policy: error of final latents without and with importance."""
    file = args.work / "importance.gguf"
    write_imatrix(file, imatrix)
    exact = final_latents(args.checkpoint, requests)
    rows = []
    for policy in args.policies:
        errors, n_tensors = [], 0
        for files in ((), (file,)):
            out = args.work / f"{policy}-{len(files)}"
            request = ConvertRequest(
                source=str(args.checkpoint), out=out, qtype=policy, imatrix=files, device="cpu"
            )
            plan = plan_conversion(request)
            convert(plan)
            n_tensors = sum(t.importance is not None for o in plan.outputs for t in o.tensors)
            found = final_latents(out, requests)
            errors.append([relative_l2(a, b) for a, b in zip(found, exact, strict=True)])
        rows.append({"policy": policy, "n": n_tensors, **_means(list(zip(*errors, strict=True)))})
        print(f"{policy}: {rows[-1]['without']:.3%} -> {rows[-1]['with']:.3%}", file=sys.stderr)
    return rows


def final_latents(folder: Path, requests: Sequence[RunRequest]) -> list[Tensor]:
    """`[1, C, H, W]` of every request."""
    with closing(Engine.open(folder, device="cpu", compute_dtype="float32")) as engine:
        results = engine.generate_all(requests)
        return [r.latents[-1].clone() for r in results if r.latents is not None]


def _request(prompt: str, seed: int, steps: int) -> RunRequest:
    return RunRequest(
        prompt=prompt,
        width=SIZE,
        height=SIZE,
        steps=steps,
        seed=seed,
        guidance_scale=0.0,
        keep_latents=True,
    )


def _held_out(args: argparse.Namespace) -> list[Any]:
    return held_out_cases(args.prompts, args.seed)


def _linear_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: every qtype over all its matrices."""
    lines = ["| qtype | matrices | without | with | ratio | lower in |", "|---" * 6 + "|"]
    lines += [
        f"| {row['qtype']} | {row['n']} | {row['without']:.2%} | {row['with']:.2%} "
        f"| {row['ratio']:.3f} | {row['lower']:.0%} |"
        for row in rows
        if row["kind"] == "all"
    ]
    return "\n".join(lines)


def _latent_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: final latents of every policy."""
    lines = ["| policy | tensors with | without | with | ratio | lower in |", "|---" * 6 + "|"]
    lines += [
        f"| {row['policy']} | {row['n']} | {row['without']:.2%} | {row['with']:.2%} "
        f"| {row['ratio']:.3f} | {row['lower']:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="the demo's official folder")
    parser.add_argument("work", type=Path, help="folder for converted models")
    parser.add_argument("--qtypes", nargs="*", default=list(LINEAR_QTYPES), choices=QTYPES)
    parser.add_argument("--policies", nargs="*", default=list(POLICIES_SHOWN), choices=POLICIES)
    parser.add_argument("--calibration", type=int, default=32, help="scenes to calibrate on")
    parser.add_argument("--prompts", type=int, default=16, help="held-out scenes to measure on")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of scenes")
    parser.add_argument("--out", type=new_file, help="write the document here as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
