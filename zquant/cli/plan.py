"""`zquant plan --model DIR`: the memory and time of a request, without painting."""

import argparse
import json
from contextlib import closing

from zquant.cli.run_request import (
    add_machine_arguments,
    add_memory_arguments,
    add_model_arguments,
    add_picture_arguments,
    open_engine,
    picture_fields,
)

__all__ = ["add_arguments", "run"]

N_PROMPT = 128  # tokens, when no prompt is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help=f"default: one of {N_PROMPT} tokens")
    add_model_arguments(parser.add_argument_group("model"))
    add_picture_arguments(parser.add_argument_group("picture (defaults: the model's own)"))
    machine = parser.add_argument_group("machine")
    add_machine_arguments(machine)
    add_memory_arguments(machine)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from zquant.memory.advice import recommendation
    from zquant.memory.plan_report import plan_document, plan_text
    from zquant.request import RunRequest

    prompt = args.prompt or "word " * (N_PROMPT - 8)  # the template has eight
    request = RunRequest(prompt=prompt, count=args.count, **picture_fields(args))
    with closing(open_engine(args, {})) as engine:
        plan = engine.plan(request)
        advice = recommendation(plan, engine.smallest(plan), engine.dit_bpw)
    document = plan_document(plan, advice)
    print(json.dumps(document, indent=2) if args.json else plan_text(document))
    return 0
