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
        help="source: official folder, all-in-one file, Hugging Face id (owner/name[@revision]), "
        "URL (http, https, hf) of one of these, or demo, the small model inside zquant; not needed "
        "when all three files are given. OUT: folder to write",
    )
    for flag in ("--dit", "--text-encoder", "--vae"):
        parser.add_argument(flag, metavar="FILE", help="single file for this part, or its URL")
    parser.add_argument("--qtype", default="Q4_K_M", help="policy (default: %(default)s)")
    parser.add_argument("--text-encoder-qtype", metavar="QTYPE", help="policy of the text encoder")
    parser.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=QTYPE",
        help="qtype of every tensor whose name matches; may be repeated, first match wins",
    )
    parser.add_argument(
        "--target-size",
        metavar="SIZE",
        help="bytes of the DiT's file, such as 3.3GiB: its qtypes are measured and solved for",
    )
    parser.add_argument(
        "--allocation",
        type=Path,
        metavar="FILE",
        help="qtypes by name: a model.json, or what --dry-run --json printed",
    )
    parser.add_argument(
        "--imatrix",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="importance of inputs, from zquant calibrate or llama-imatrix; may be repeated",
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
    parser.add_argument(
        "--dry-run", action="store_true", help="show what every tensor becomes, and stop"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from zquant.convert.earlier import finished
    from zquant.convert.execute import convert
    from zquant.convert.summary import plan_rows, result_lines
    from zquant.formats.model_folder import demo_notice

    request = _request(args)
    if notice := demo_notice(request.source):
        print(f"note: {notice}", file=sys.stderr)
    plan = _plan(request, args)
    if args.dry_run:
        return _show(plan, args)
    if args.resume and (manifest := finished(plan)) is not None:
        print(f"{request.out}: complete; without --resume it is written anew", file=sys.stderr)
        if args.json:
            print(json.dumps(manifest))
        return 0
    if args.json:
        print(plan.place.summary, file=sys.stderr)
    else:
        print("\n".join(plan_rows(plan)), flush=True)
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


def _show(plan: Any, args: argparse.Namespace) -> int:
    """The plan with every tensor, and whether there is room for it."""
    from zquant.convert.earlier import check_disk
    from zquant.convert.summary import plan_rows, tensor_rows
    from zquant.errors import PlanError

    if args.json:
        print(plan.place.summary, file=sys.stderr)
        print(json.dumps({o.component: _tensors(o) for o in plan.outputs}))
    else:
        print("\n".join([*tensor_rows(plan), *plan_rows(plan)]))
    try:
        check_disk(plan)
    except PlanError as error:
        print(f"note: {error}", file=sys.stderr)
    return 0


def _plan(request: Any, args: argparse.Namespace) -> Any:
    """The plan; for a size after measuring, with a word about the result on stderr."""
    from zquant.cli.progress import PhaseBar
    from zquant.convert.earlier import check_disk, check_parts
    from zquant.convert.plan import plan_conversion
    from zquant.convert.summary import size_rows
    from zquant.convert.target_size import plan_to_size
    from zquant.units import parse_bytes

    if args.target_size is None:
        return plan_conversion(request)

    def check(least: Any) -> None:
        if not args.dry_run:
            check_disk(least)
            check_parts(least)

    with closing(PhaseBar("matrix")) as bar:
        sized = plan_to_size(request, parse_bytes(args.target_size), bar, check)
    print("\n".join(size_rows(sized)), file=sys.stderr)
    return sized.plan


def _request(args: argparse.Namespace) -> Any:
    from zquant.convert.allocation import read_allocation
    from zquant.convert.plan import ConvertRequest
    from zquant.quant.qtypes import qtype_by_name

    if len(args.paths) > 2:
        raise ValueError(
            f"convert takes SOURCE and OUT; got {len(args.paths)} paths: {' '.join(args.paths)}"
        )
    if len(args.paths) == 1 and not (args.dit and args.text_encoder and args.vae):
        raise ValueError(
            f"{args.paths[0]!r} was taken as OUT. Write: zquant convert SOURCE OUT; only with all "
            f"of --dit, --text-encoder and --vae there is no SOURCE"
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
        allocation=read_allocation(args.allocation) if args.allocation else {},
        variant=args.variant,
        imatrix=tuple(args.imatrix),
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
