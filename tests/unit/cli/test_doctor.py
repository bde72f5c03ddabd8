"""`zquant doctor` from the command line."""

import json

import pytest

from zquant.cli.main import main


def test_doctor_lists_every_kernel_family(capsys):
    assert main(["doctor", "--device", "cpu", "--compute-dtype", "float32"]) == 0
    out = capsys.readouterr().out
    for family in ("dequantize", "linear, exact", "linear, int8", "fused block", "attention"):
        assert f"\n{family} " in out
    assert "why not faster" in out


def test_doctor_gives_json(capsys):
    assert main(["doctor", "--json", "--device", "cpu", "--compute", "int8"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kind"], document["compute"], document["compute_reason"]) == (
        "doctor",
        "int8",
        "as asked",
    )
    assert document["machine"]["torch"]


def test_doctor_says_that_triton_cannot_run(capsys, monkeypatch):
    from zquant_kernels import runtime

    monkeypatch.setattr(runtime, "why_not", lambda _: "no GPU for the test")
    assert main(["doctor", "--device", "cpu", "--kernels", "triton"]) == 1
    assert "--kernels triton cannot run here: no GPU for the test" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--compute", "--kernels", "--attention", "--compute-dtype"])
def test_an_unknown_choice_is_wrong_usage(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", flag, "fast"])
    assert stopped.value.code == 2
    assert "invalid choice: 'fast'" in capsys.readouterr().err
