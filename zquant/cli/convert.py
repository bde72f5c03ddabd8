"""`zquant convert SOURCE OUT`: an original checkpoint becomes a quantized model folder."""

import argparse
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [SOURCE] OUT [options]"
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="[SOURCE] OUT",
        help="source: official folder, all-in-one file, Hugging Face id (owner/name[@revision]) or "
        "demo, the small model inside zquant; not needed when all three files are given. OUT: "
        "folder to write",
    )
    for flag in ("--dit", "--text-encoder", "--vae"):
        parser.add_argument(flag, type=Path, metavar="FILE", help="single file for this part")
    parser.add_argument("--qtype", default="Q4_K_M", help="policy (default: %(default)s)")
    parser.add_argument("--text-encoder-qtype", metavar="QTYPE", help="policy of the text encoder")
    parser.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=QTYPE",
        help="qtype of every tensor whose name matches; may be repeated, first match wins",
    )
    parser.add_argument("--variant", choices=("turbo", "base"), help="when the source cannot tell")
    parser.add_argument("--allow-requantize", action="store_true", help="accept a quantized source")
    parser.add_argument("--threads", type=int, help="worker threads (default: all cores)")
    parser.add_argument(
        "--device",
        default="auto",
        help="where to quantize: auto, cpu, cuda or cuda:1; the bytes are the same",
    )
    parser.add_argument("--resume", action="store_true", help="finish an interrupted conversion")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from zquant.convert.execute import convert
    from zquant.convert.plan import plan_conversion
    from zquant.convert.summary import plan_rows, result_lines
    from zquant.formats.model_folder import demo_notice

    request = _request(args)
    if notice := demo_notice(request.source):
        print(f"note: {notice}", file=sys.stderr)
    plan = plan_conversion(request)
    if args.json:
        print(plan.place.summary, file=sys.stderr)
    else:
        print("\n".join(plan_rows(plan)), flush=True)
    if args.dry_run:
        if args.json:
            print(json.dumps({o.component: _tensors(o) for o in plan.outputs}))
        return 0
    try:
        with closing(_Bar(plan.n_weights)) as bar:
            result = convert(plan, bar)
    except KeyboardInterrupt:
        print(f"{plan.request.out}: not complete; go on with --resume", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps(result.manifest))
    else:
        print("\n".join(result_lines(result)))
    return 0


def _request(args: argparse.Namespace) -> Any:
    from zquant.convert.plan import ConvertRequest
    from zquant.quant.qtypes import qtype_by_name

    if len(args.paths) > 2:
        raise ValueError(
            f"convert takes SOURCE and OUT; got {len(args.paths)} paths: {' '.join(args.paths)}"
        )
    types = []
    for text in args.tensor_type:
        pattern, equals, name = text.rpartition("=")
        if not (pattern and equals):
            raise ValueError(
                f"--tensor-type {text!r} is not REGEX=QTYPE, e.g. 'layers[.]0[.]=Q8_0'"
            )
        types.append((pattern, qtype_by_name(name)))
    return ConvertRequest(
        source=args.paths[0] if len(args.paths) == 2 else None,
        out=Path(args.paths[-1]),
        dit=args.dit,
        text_encoder=args.text_encoder,
        vae=args.vae,
        qtype=args.qtype,
        text_encoder_qtype=args.text_encoder_qtype,
        tensor_types=tuple(types),
        variant=args.variant,
        allow_requantize=args.allow_requantize,
        threads=args.threads,
        device=args.device,
        resume=args.resume,
    )


def _tensors(output: Any) -> list[dict[str, Any]]:
    return [
        {"name": t.name, "qtype": t.qtype.name, "shape": t.shape, "bytes": t.nbytes}
        for t in output.tensors
    ]


class _Bar:
    """Weights per second over the whole conversion, with the file being written."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        # None: nothing is drawn where nobody is watching a terminal
        self._bar = tqdm(total=total, unit="weight", unit_scale=True, file=sys.stderr, disable=None)

    def __call__(self, name: str, n_weights: int) -> None:
        self._bar.set_description(name, refresh=False)
        self._bar.update(n_weights)

    def close(self) -> None:
        self._bar.close()
