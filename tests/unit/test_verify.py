"""`zquant verify`: sound models pass, every damage is found and named, memory is bounded."""

import json
import shutil
import struct
import tracemalloc
import zlib

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import wild_files as wild
from tests.unit.conftest import TOY
from tests.unit.convert.conftest import cut
from zquant.cli.main import main
from zquant.convert.execute import convert
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.formats.detect import open_source
from zquant.formats.imatrix import Imatrix, InputSums, write_imatrix
from zquant.models.tokenizer import Vocabulary
from zquant.verify import against, check, scan
from zquant.verify.check import verify

DIT = "dit-Q4_0.gguf"
TENSOR = "layers.1.attention.qkv.weight"


@pytest.fixture(scope="module")
def generate():
    """Makes a toy of few words in a folder; the full vocabulary is slow to read."""
    import checkpoint_layout
    import make_checkpoint

    words = cut(Vocabulary.bundled())
    preset = {**TOY, "text_encoder": {**TOY["text_encoder"], "vocab_size": 384}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoint_layout.PRESETS, "toy", preset)
        patch.setattr(make_checkpoint, "_write_tokenizer", lambda _: None)
        patch.setattr(Vocabulary, "bundled", lambda: words)
        yield lambda folder, seed: make_checkpoint.make_checkpoint(
            folder, make_checkpoint.Spec(preset="toy", seed=seed)
        )


@pytest.fixture(scope="module")
def toy_folder(generate, tmp_path_factory):
    """The original; read-only."""
    return generate(tmp_path_factory.mktemp("original"), 1)


@pytest.fixture(scope="module")
def model(toy_folder, tmp_path_factory):
    """The toy as Q4_0; read-only."""
    out = tmp_path_factory.mktemp("verified") / "model"
    convert(plan_conversion(ConvertRequest(source=str(toy_folder), out=out, qtype="Q4_0")))
    return out


@pytest.fixture
def copied(model, tmp_path):
    """A copy to damage."""
    return shutil.copytree(model, tmp_path / "model")


def edit(path, change):
    """Rewrites a file with what `change` makes of its bytes."""
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def edit_manifest(folder, change):
    path = folder / "model.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def spoil(path, tensor, value, at=0):
    """Overwrites some bytes of a tensor."""
    info = open_source(path).tensors[tensor]
    start = info.offset + at
    edit(path, lambda data: data.__setitem__(slice(start, start + len(value)), value))
    return info


def test_a_sound_model_is_said_in_one_line(model, capsys):
    assert main(["verify", str(model)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"OK: {model}: 3 files, ")
    assert out.endswith("whole and sound; not compared with a source\n")
    assert out.count("\n") == 1
    assert err == ""  # no bar where nobody is watching


def test_a_model_is_as_its_source_makes_it(model, toy_folder, capsys):
    assert main(["verify", str(model), "--source", str(toy_folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["findings"], document["notes"]) == (True, [], [])
    said = json.loads((model / "model.json").read_text())
    for part, entry in said["files"].items():
        found = document["files"][entry["name"]]
        assert (found["bytes"], found["sha256"]) == (entry["bytes"], entry["sha256"])
        assert found["networks"] == [part]
        errors = {n: t["relative_rms_error"] for n, t in said["tensors"][part].items()}
        # the same sums in another order
        assert found["errors"] == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("file", [DIT, "text_encoder-Q4_0.gguf", "vae.safetensors"])
def test_a_file_alone_is_checked_by_its_own_receipt(file, model, toy_folder):
    verdict = verify(model / file, str(toy_folder))
    assert verdict.ok
    assert verdict.compared
    unvouched = [f"{file}: without a receipt its errors are measured but compared with nothing"]
    assert verdict.notes == (unvouched if file.startswith("vae") else [])


@pytest.mark.parametrize("source", ["toy_folder", "demo"])
def test_an_original_and_the_demo_are_sound(source, request):
    path = source if source == "demo" else request.getfixturevalue(source)
    verdict = verify(path)
    assert verdict.findings == []
    assert len(verdict.files) == 3


def test_a_flipped_bit_is_found_by_both_checksums(copied):
    spoil(copied / DIT, TENSOR, b"\x55", at=7)
    hashes, changed = sorted(verify(copied).findings, key=lambda text: "crc32" in text)
    assert f"{DIT}: sha256 is " in hashes
    assert "damaged or replaced; download or convert it again" in hashes
    assert f"{DIT}: the bytes of '{TENSOR}' were changed: crc32 is " in changed
    assert verify(copied / DIT).findings == [changed]


def test_a_flipped_bit_between_tensors_is_found_by_sha256(copied):
    edit(copied / DIT, lambda data: data.append(0))
    findings = verify(copied).findings
    assert [("sha256" in text, "bytes; model.json says" in text) for text in findings] == [
        (False, True),
        (True, False),
    ]


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_that_is_no_number_is_found_with_its_place(scale, copied):
    info = spoil(copied / DIT, TENSOR, struct.pack("<e", scale), at=18 * 5)
    found = [text for text in verify(copied / DIT).findings if "holds" in text]
    row, column = divmod(5 * 32, info.shape[1])
    assert len(found) == 1
    assert found[0].startswith(f"{DIT}: '{TENSOR}' holds ")
    assert f"(row {row}, column {column}); expected numbers only. Download or" in found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[TENSOR].update(relative_rms_error=0.5), "by the file and 0.5 by model.json"),
        (lambda t: t[TENSOR].update(qtype="Q8_0"), "is Q4_0; model.json says 'Q8_0'"),
        (lambda t: t.pop(TENSOR), "1 tensors are not in both the file and model.json"),
    ],
    ids=["error", "qtype", "name"],
)
def test_what_model_json_says_otherwise_is_found(change, message, copied):
    edit_manifest(copied, lambda document: change(document["tensors"]["dit"]))
    (finding,) = verify(copied).findings
    assert message in finding
    assert finding.startswith(f"{DIT}: ")


def test_another_policy_or_hash_in_model_json_is_found(copied):
    edit_manifest(
        copied, lambda document: document["files"]["dit"].update(policy="Q8_0", sha256="")
    )
    policy, sha256 = verify(copied).findings
    assert "says it is Q4_0 by zquant" in policy
    assert f"{DIT}: sha256 is " in sha256


def test_another_source_is_one_finding_for_a_file(model, generate, tmp_path):
    findings = verify(model / DIT, str(generate(tmp_path, 7))).findings
    assert len(findings) == 1
    assert "tensors were made from other bytes than this source holds (first: " in findings[0]
    assert "It was made from diffusion_pytorch_model" in findings[0]


def test_a_file_changed_with_its_receipt_is_found_by_its_source(copied, toy_folder):
    path = copied / DIT
    source = open_source(path)
    info, before = source.tensors[TENSOR], source.raw(TENSOR).tobytes()
    after = bytes(before[0:2]) + bytes(16) + before[18:]  # other levels, the same scale
    spoil(path, TENSOR, after)
    at, sums = list(source.tensors).index(TENSOR), source.metadata["zquant.tensor_crc32"]
    lists = [sums, [*sums[:at], zlib.crc32(after), *sums[at + 1 :]]]
    old, new = (np.array(each, "<u4").tobytes() for each in lists)
    edit(path, lambda data: data.__setitem__(slice(*where(data, old)), new))
    assert info.nbytes == len(after)
    assert verify(path).ok
    error, stored = verify(path, str(toy_folder)).findings
    assert f"'{TENSOR}' has the error " in error
    assert "its receipt says" in error
    assert f"'{TENSOR}' is stored otherwise than its source is quantized now" in stored


def where(data, part):
    """Where the only copy of `part` is."""
    assert data.count(part) == 1
    return data.index(part), data.index(part) + len(part)


def test_what_another_version_wrote_is_not_quantized_again(copied, toy_folder, monkeypatch):
    monkeypatch.setattr(check.zquant, "__version__", "99.0")
    monkeypatch.setattr(against, "quantize", lambda *_: np.zeros(1, np.uint8))
    verdict = verify(copied / DIT, str(toy_folder))
    assert verdict.ok
    assert verdict.notes[0].startswith(f"{DIT}: made by zquant ")
    assert verdict.notes[0].endswith("; its bytes are not compared with new ones")


def test_what_importance_guided_is_not_quantized_again(model, toy_folder, tmp_path):
    entry = InputSums(squares=np.arange(32, dtype=np.float64), count=4)
    imatrix = Imatrix(entries={TENSOR: entry}, datasets=("a.txt",), n_chunks=1)
    write_imatrix(tmp_path / "i.gguf", imatrix)
    request = ConvertRequest(
        source=str(toy_folder), out=tmp_path / "out", qtype="Q4_0", imatrix=(tmp_path / "i.gguf",)
    )
    convert(plan_conversion(request))
    ours, plain = (open_source(folder / DIT).raw(TENSOR) for folder in (tmp_path / "out", model))
    assert not np.array_equal(ours, plain)
    verdict = verify(tmp_path / "out", str(toy_folder))
    assert verdict.findings == []
    assert f"{DIT}: made with i.gguf; not quantized again where that is used" in verdict.notes


def test_a_source_without_these_tensors_is_found(model, toy_folder, tmp_path):
    source = open_source(toy_folder / "vae")
    vae = {n: torch.zeros(i.shape) for n, i in source.tensors.items() if "conv_in" not in n}
    vae |= {n: torch.zeros(9, 9, 9, 9) for n in source.tensors if "conv_in.weight" in n}
    vae |= {"decoder.conv_in.bias": torch.zeros(1)}
    save_file(vae, tmp_path / "vae.safetensors")
    (finding,) = verify(model / "vae.safetensors", str(tmp_path / "vae.safetensors")).findings
    assert "tensors have no match in " in finding


def test_a_truncated_file_is_a_finding_beside_those_of_the_others(copied, capsys):
    edit(copied / DIT, lambda data: data.__delitem__(slice(len(data) - 4096, None)))
    spoil(copied / "vae.safetensors", "decoder.conv_in.bias", b"\xff\xff")
    assert main(["verify", str(copied)]) == 1
    first, *findings = capsys.readouterr().out.splitlines()
    assert first == f"FAILED: {copied}: {len(findings)} findings"
    assert any(DIT in text and "download it again" in text for text in findings)
    assert any("vae.safetensors: sha256 is " in text for text in findings)
    assert any("'decoder.conv_in.bias' holds nan (row 0, column 0)" in text for text in findings)


def test_many_findings_are_cut_and_counted(copied, capsys):
    names = list(open_source(copied / DIT).tensors)[:30]
    edit_manifest(
        copied, lambda d: [d["tensors"]["dit"][name].update(qtype="I8") for name in names]
    )
    assert main(["verify", str(copied)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22
    assert lines[-1] == "and 10 more; --json has all"


def test_a_missing_path_is_an_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none")]) == 1
    assert "none: does not exist" in capsys.readouterr().out + capsys.readouterr().err


def test_a_file_of_another_model_and_program_is_checked_as_far_as_it_goes(tmp_path, capsys):
    path = tmp_path / "wild.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("double_blocks.0.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["verify", str(path)]) == 0
    ok, *notes = capsys.readouterr().out.splitlines()
    assert ok.startswith(f"OK: {path}: 1 file, 1 tensor, ")
    assert notes == [
        "note: wild.gguf: no network that zquant knows; only its weights are checked",
        "note: wild.gguf: no receipt inside; tensors have no checksums of their own",
    ]


@pytest.mark.parametrize("style", ["plain", "legacy", "rows"])
def test_fp8_of_others_is_sound_and_a_spoilt_scale_is_found(style, tmp_path):
    weights = wild.plain_weights("transformer")
    path = tmp_path / "fp8.safetensors"
    wild.write_fp8(path, weights, wild.fused(weights), style=style)
    verdict = verify(path)
    assert verdict.findings == []
    assert verdict.files[path.name]["networks"] == ["dit"]
    name = "layers.0.attention.qkv.weight"
    spoilt = {"legacy": "layers.0.attention.qkv.scale_weight", "rows": f"{name}_scale"}.get(style)
    spoil(path, spoilt or name, b"\x7f" if spoilt is None else np.float32("nan").tobytes())
    (finding,) = verify(path).findings
    assert f"'{spoilt or name}' holds nan (row 0, column 0); expected numbers only" in finding


def test_what_no_network_uses_may_be_anything(toy_folder, tmp_path):
    source = open_source(toy_folder / "vae")
    tensors = {n: torch.zeros(i.shape) for n, i in source.tensors.items()}
    tensors |= {"position_ids": torch.tensor([1]), "ema.decay": torch.tensor([float("nan")])}
    save_file(tensors, tmp_path / "vae.safetensors")
    assert verify(tmp_path / "vae.safetensors").findings == []


def test_memory_is_bounded_by_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "PIECE_WEIGHTS", 2**14)
    path = tmp_path / "large.safetensors"
    save_file({"a": torch.ones(2**22)}, path)
    verify(path)
    tracemalloc.start()
    verdict = verify(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert verdict.ok
    assert peak < 2**21 < path.stat().st_size / 4
