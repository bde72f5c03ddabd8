"""The benchmark of sizes: what is compared with what; nothing is painted here."""

import argparse
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zquant.convert.plan import ConvertRequest, plan_conversion

with pytest.MonkeyPatch.context() as patch:  # its neighbours are on the path for the import only
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    target_size: Any = importlib.import_module("target_size")

MATRIX = "layers.1.attention.qkv.weight"


@pytest.fixture
def args(toy_folder: Path, tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        checkpoint=toy_folder, work=tmp_path, prompts=1, steps=1, policies=["Q4_0"]
    )


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans in whose pictures' place stands the number of pictures before."""
    plans: list[Any] = []

    def paint(plan: Any, _: Any) -> list[torch.Tensor]:
        plans.append(plan)
        return [torch.tensor([float(len(plans))])]

    monkeypatch.setattr(target_size, "_paint", paint)
    return plans


@pytest.fixture
def planned(args: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> list[ConvertRequest]:
    """The requests, for all of which there is one plan."""
    real = plan_conversion(ConvertRequest(source=str(args.checkpoint), out=args.work))
    requests: list[ConvertRequest] = []

    def plan(request: ConvertRequest) -> Any:
        requests.append(request)
        return SimpleNamespace(outputs=real.outputs, allocation=request.allocation)

    monkeypatch.setattr(target_size, "plan_conversion", plan)
    return requests


def test_a_size_is_compared_with_the_policy_whose_bytes_it_has(
    args: argparse.Namespace,
    painted: list[Any],
    planned: list[ConvertRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[tuple[bool, int]] = []

    def plan(request: ConvertRequest, target_bytes: int) -> Any:
        sizes.append((bool(request.imatrix), target_bytes))
        return SimpleNamespace(plan=target_size.plan_conversion(request), beside={"Q4_0": 0.5})

    monkeypatch.setattr(target_size, "plan_to_size", plan)
    monkeypatch.setattr(target_size, "_importance", lambda args: args.work / "imatrix.gguf")
    rows = target_size.compare(args)
    assert [(row["how"], row["imatrix"], row["latent_error_rms"]) for row in rows] == [
        ("Q4_0", False, 1),
        ("target size", False, 2),
        ("Q4_0", True, 3),
        ("target size", True, 4),
    ]
    assert [row.get("expected") for row in rows] == [None, 0.5, None, 0.5]
    assert sizes == [(row["imatrix"], row["dit_bytes"]) for row in rows[::2]]
    assert [bool(request.imatrix) for request in planned] == [False] * 3 + [True] * 2
    assert target_size._compared_table(rows).count("\n") == 5


def test_every_matrix_of_the_blocks_is_stored_alone(
    args: argparse.Namespace, painted: list[Any], planned: list[ConvertRequest]
) -> None:
    rows = target_size.one_by_one(args)
    assert painted[0].allocation == {}
    probed = [[n for n, q in p.allocation["dit"].items() if not q.is_float] for p in painted[1:]]
    assert probed == [[row["name"]] for row in rows]
    # the second picture's number is 2, and so on, where the first one's is 1
    assert [row["sensitivity"] * row["loss"] for row in rows] == pytest.approx(
        [n * n for n in range(1, len(rows) + 1)]
    )
    assert MATRIX in target_size._sensitivity_table(rows)
