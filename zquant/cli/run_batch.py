"""`zquant run --prompt-file FILE --out FOLDER`: many prompts, phase by phase, resumable.

Every line is one request; the flags of `zquant run` are its defaults. A picture without a seed of
its own gets the seed of the flags (or 0) plus its number in the file, so that running again paints
the same. State that `--resume` needs is in the output folder until all pictures are there.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from zquant.cli.run_request import open_engine, picture_fields

__all__ = ["batch_requests", "run_batch"]

ALLOWED = (  # settings of a JSON line
    *("name", "negative_prompt", "width", "height", "steps", "seed", "count"),
    *("guidance_scale", "cfg_normalization", "cfg_truncation", "shift"),
)
NOT_FOR_MANY = ("from_png", "initial_latents", "save_latents")


class _Journal:
    """The engine's journal, kept in a job folder."""

    def __init__(self, job: Any) -> None:
        from zquant.formats.job_folder import item_id

        self._job, self._id = job, item_id

    def load(self, recipe: Mapping[str, Any]) -> Any:
        return self._job.latents(self._id(recipe))

    def save(self, recipe: Mapping[str, Any], steps_done: int, latents: Any) -> None:
        self._job.save_latents(self._id(recipe), steps_done, latents)


def run_batch(args: argparse.Namespace) -> int:
    """Paint every prompt of the file that is not painted yet."""
    _check(args)
    requests = list(batch_requests(args))

    from zquant.cli.progress import PhaseBar
    from zquant.formats.job_folder import JobFolder, JobItem, item_id
    from zquant.image import save_png

    with closing(open_engine(args, {})) as engine:
        print(engine.device.summary, file=sys.stderr)
        items = [
            JobItem(id=item_id(engine.recipes(request)[0]), target=args.out / f"{name}.png")
            for name, request in requests
        ]
        with closing(JobFolder(args.out, resume=args.resume)) as job:
            job.begin(items)
            todo = [i for i, item in enumerate(items) if not job.is_done(item)]
            print(f"{len(todo)} of {len(items)} pictures to paint", file=sys.stderr)
            if todo:
                with closing(PhaseBar()) as bar, _can_go_on(args.out):
                    results = engine.generate_all(
                        [requests[i][1] for i in todo], bar, bar.note, _Journal(job)
                    )
                    for i, result in zip(todo, results, strict=True):
                        for notice in result.notices:
                            bar.note(f"{items[i].target.name}: {notice}")
                        save_png(result.images[0], items[i].target, result.recipes[0])
                        job.finish(items[i])
                        _show(args, items[i].target, result)
            job.end()
    return 0


@contextmanager
def _can_go_on(out: Path) -> Iterator[None]:
    """Ctrl-C inside also says that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{out}: not complete; go on with --resume", file=sys.stderr)
        raise


def _check(args: argparse.Namespace) -> None:
    if args.prompt is not None:
        raise ValueError("a PROMPT and --prompt-file cannot both be given")
    for name in NOT_FOR_MANY:
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is for one picture; it cannot be used with --prompt-file")
    if args.out is None:
        raise ValueError("--prompt-file needs --out FOLDER for its pictures")
    if args.out.suffix.lower() == ".png":
        raise ValueError(f"--out '{args.out}' is a picture; with --prompt-file name a folder")


def batch_requests(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """File name and request of every picture of `--prompt-file`: a line with a count is several."""
    from zquant.errors import FormatError
    from zquant.formats.prompt_file import read_prompts
    from zquant.request import RunRequest

    defaults = {"count": args.count, **picture_fields(args)}
    base, n_before = args.seed or 0, 0
    for line in read_prompts(args.prompt_file, ALLOWED):
        fields = {**defaults, **line.fields}
        name = fields.pop("name", f"{line.number:04d}")
        if "seed" not in line.fields:
            fields["seed"] = base + n_before
        try:
            whole = RunRequest(**fields)
        except ValueError as error:
            raise FormatError(f"{args.prompt_file}, line {line.number}: {error}.") from error
        n_before += whole.count
        fields.pop("count")
        for i in range(whole.count):
            request = RunRequest(**{**fields, "seed": fields["seed"] + i})
            yield (name if whole.count == 1 else f"{name}-{i + 1}"), request


def _show(args: argparse.Namespace, path: Path, result: Any) -> None:
    """One line per picture, as soon as it is there."""
    if args.json:
        document = {
            "image": str(path),
            "recipe": result.recipes[0],
            "timings": result.timings,
            "memory": result.memory,
            "notices": result.notices,
        }
        print(json.dumps(document), flush=True)
    else:
        print(f"{path}  seed {result.recipes[0]['seed']}", flush=True)
