"""What cannot be converted: one message, the right exit code, nothing that looks like a model."""

import errno
import json
import math
import re
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from zquant.cli.main import main
from zquant.convert import workers
from zquant.convert.plan import ConvertRequest
from zquant.errors import CheckpointError, FormatError, PlanError, ZQuantError
from zquant.formats.resumable import ResumableFile
from zquant.quant.qtypes import QTYPES

Usage = namedtuple("Usage", "total used free")
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def copy(official, tmp_path):
    """A copy of the official folder to damage."""
    return shutil.copytree(official, tmp_path / "copy")


def edit_dit(comfy, path, change):
    """The fused DiT after `change`, as a single file; gives the fields of a request."""
    tensors = load_file(comfy["dit"])
    change(tensors)
    save_file(tensors, path)
    return {**comfy, "dit": path}


def truncated_shard(folder):
    shard = sorted((folder / "transformer").glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)


def missing_shard(folder):
    sorted((folder / "text_encoder").glob("*.safetensors"))[1].unlink()


def missing_tensor(folder):
    index = json.loads((folder / INDEX).read_text())
    shard = folder / "transformer" / index["weight_map"]["layers.0.attention.to_k.weight"]
    tensors = load_file(shard)
    del tensors["layers.0.attention.to_k.weight"]
    save_file(tensors, shard)
    del index["weight_map"]["layers.0.attention.to_k.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def outside(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["x_pad_token"] = "../vae/diffusion_pytorch_model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def no_scheduler(folder):
    (folder / "scheduler/scheduler_config.json").unlink()


def no_vae(folder):
    shutil.rmtree(folder / "vae")


DAMAGES = {
    truncated_shard: r"-00001-of-0000\d\.safetensors: the file is cut off: expected .* found .*",
    missing_shard: r"index\.json: 1 of \d shards missing \(first: 'model-00002-of-.*Download",
    missing_tensor: r"1 of \d+ tensors missing \(first: 'layers.0.attention.to_k.weight'\).*get or",
    outside: r"'x_pad_token' is said to be in '../vae/.*'; expected the name of a file in the same",
    no_scheduler: r"scheduler_config\.json: cannot be read \(No such file",
    no_vae: r"copy: lacks vae/\. Download the whole model",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damaged_folders(damage, copy, tmp_path, capsys):
    damage(copy)
    assert main(["convert", str(copy), str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("zquant: error: ")
    assert re.search(DAMAGES[damage], err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("policy", ["BF16", "Q4_K_M"], ids=["kept", "quantized"])
def test_non_finite_weights_are_named(value, policy, comfy, run, look, tmp_path, monkeypatch):
    if math.isnan(value) and policy == "Q4_K_M":  # once from another process
        monkeypatch.setattr(workers, "WORTH_PROCESSES", 0)

    def spoil(tensors):
        tensors["layers.0.attention.qkv.weight"][300, 17] = value  # a row of k

    request = edit_dit(comfy, tmp_path / "spoilt.safetensors", spoil)
    message = (
        rf"spoilt\.safetensors: tensor 'layers\.0\.attention\.qkv\.weight' holds {value} "
        r"\(row 300, column 17\); expected finite weights\. The file is damaged; download it again"
    )
    with pytest.raises(CheckpointError, match=message):
        run(**request, out=tmp_path / "out", qtype=policy, threads=2)
    assert not look.is_whole(tmp_path / "out")
    assert all(".part" in name for name in look.contents(tmp_path / "out"))


def test_weights_too_large_for_the_type(comfy, run, tmp_path):
    def enlarge(tensors):
        tensors["layers.0.attention.out.weight"][3, 4] = 1e6

    request = edit_dit(comfy, tmp_path / "large.safetensors", enlarge)
    message = r"'layers\.0\.attention\.out\.weight' holds a weight of 9.99e\+05, too large for F16"
    with pytest.raises(PlanError, match=message):
        run(**request, out=tmp_path / "out", qtype="F16")
    run(**request, out=tmp_path / "wide", qtype="BF16")


def test_a_zero_tensor_has_no_error(comfy, run, tmp_path):
    def clear(tensors):
        tensors["layers.0.attention.out.weight"].zero_()

    request = edit_dit(comfy, tmp_path / "zero.safetensors", clear)
    written = run(**request, out=tmp_path / "out", qtype="F16").manifest["tensors"]["dit"]
    assert written["layers.0.attention.out.weight"]["relative_rms_error"] == 0.0


def rename(tensors):
    for name in list(tensors):
        tensors[f"model.diffusion_model.input_blocks.{name}"] = tensors.pop(name)


WRONG_DIT = {
    "sdxl": (rename, r"not a Z-Image DiT: .* It looks like Stable Diffusion or SDXL; \d+ tensors"),
    "lora": (
        lambda t: t.update({"layers.0.lora_A.weight": torch.zeros(1, 4)}),
        r"1 unexpected tensors \(first: 'layers\.0\.lora_A\.weight'\)",
    ),
    "no-embedder": (
        lambda t: t.pop("x_embedder.weight"),
        r"tensor 'all_x_embedder.2-1.weight' is missing",
    ),
    "no-fused": (
        lambda t: t.pop("noise_refiner.0.attention.qkv.weight"),
        r"3 of \d+ tensors missing \(first: 'noise_refiner.0.attention.to_k.weight'\)",
    ),
    "odd-shape": (
        lambda t: t.update({"x_embedder.weight": torch.zeros(4, 4, 4)}),
        r"tensor 'all_x_embedder.2-1.weight' has shape \[4, 4, 4\]",
    ),
}


@pytest.mark.parametrize("name", WRONG_DIT)
def test_wrong_models(name, comfy, run, tmp_path):
    change, message = WRONG_DIT[name]
    request = edit_dit(comfy, tmp_path / "wrong.safetensors", change)
    with pytest.raises(CheckpointError, match=rf"wrong\.safetensors: .*{message}"):
        run(**request, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_all_in_one_file_is_recognised(tmp_path, run):
    sdxl = tmp_path / "sdxl.safetensors"
    names = ("input_blocks.0.0.weight", "time_embed.0.weight")
    save_file({f"model.diffusion_model.{n}": torch.zeros(4, 4) for n in names}, sdxl)
    with pytest.raises(CheckpointError, match=r"sdxl\.safetensors: .*looks like Stable Diffusion"):
        run(source=str(sdxl), out=tmp_path / "out")


USAGE = {
    "unknown-policy": (["--qtype", "Q3_K_L"], 2, "unknown policy 'Q3_K_L'; known: F32, BF16, F16"),
    "unsupported-policy": (["--text-encoder-qtype", "IQ2_XS"], 2, "unknown policy 'IQ2_XS'; known"),
    "unknown-qtype": (["--tensor-type", "a=Q9"], 2, "unknown qtype 'Q9'; known: F32, F16, BF16"),
    "no-equals": (["--tensor-type", "Q4_K"], 2, "--tensor-type 'Q4_K' is not REGEX=QTYPE"),
    "no-regex": (["--tensor-type", "=Q4_K"], 2, "--tensor-type '=Q4_K' is not REGEX=QTYPE"),
    "bad-regex": (["--tensor-type", "(=Q4_K"], 2, "--tensor-type '(' is not a regular expression"),
    "no-match": (["--tensor-type", "abc=F16"], 2, "--tensor-type abc=F16 matches none of "),
    "no-matrix": (["--tensor-type", "q_norm=Q8_0"], 1, "gives Q8_0 only to tensors that are not"),
    "no-qblocks": (["--tensor-type", "w2=Q4_K"], 1, "are not whole qblocks of 256. Narrow"),
    "no-threads": (["--threads", "0"], 2, "threads is 0; it must be at least 1"),
    "too-many": (["more"], 2, "convert takes SOURCE and OUT; got 3 paths"),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage(name, official, tmp_path, capsys):
    words, code, message = USAGE[name]
    assert main(["convert", str(official), str(tmp_path / "out"), *words]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["nothing.safetensors", "no/such/folder", "./x", "nothing"])
def test_a_source_that_is_not_there(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", source, "out"]) == 1
    expected = f"zquant: error: {source}: no such file or folder, and not a Hugging Face id such as"
    assert capsys.readouterr().err.startswith(expected)


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "not a model folder (has neither); expected model.json" in capsys.readouterr().err


def test_only_out(tmp_path, capsys):
    out = str(tmp_path / "out")
    for words in ([], ["--dit", "a.gguf", "--vae", "b.safetensors"]):
        assert main(["convert", out, *words]) == 2
        err = capsys.readouterr().err
        assert f"{out!r} was taken as OUT. Write: zquant convert SOURCE OUT; only with all" in err


def test_unknown_variant():
    with pytest.raises(ValueError, match=r"variant 'fast' is unknown; known: turbo, base"):
        ConvertRequest(out="out", variant="fast")


def test_too_little_disk_is_known_before_the_first_byte(official, run, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "out"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**6))
    message = (
        r"out: \d+\.\d MiB are needed, 976\.6 KiB are free\. Free some space or choose another"
    )
    with pytest.raises(PlanError, match=message):
        run(source=str(official), out=out)
    assert not out.parent.exists()


def test_what_is_written_already_needs_no_disk(official, bf16, run, look, tmp_path, monkeypatch):
    fail_at(monkeypatch, 60)
    with pytest.raises(PlanError, match="the disk is full"):
        run(source=str(official), out=tmp_path, qtype="BF16")
    monkeypatch.undo()
    have = sum(path.stat().st_size for path in tmp_path.glob("*.part"))
    need = sum(path.stat().st_size for path in bf16.iterdir() if path.suffix != ".json") - have
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, need))
    run(source=str(official), out=tmp_path, qtype="BF16", resume=True)


def fail_at(monkeypatch, n, error=errno.ENOSPC):
    """The n-th piece of output fails as a full disk does."""
    real, count = ResumableFile._write_line, [0]

    def write_line(self, value):
        count[0] += 1
        if count[0] == n:
            raise OSError(error, "No space left on device")
        real(self, value)

    monkeypatch.setattr(ResumableFile, "_write_line", write_line)


@pytest.mark.parametrize("moment", [1, 2, 30, 150])
def test_a_disk_that_fills_up(moment, official, bf16, run, look, tmp_path, monkeypatch):
    fail_at(monkeypatch, moment)
    message = r"\.part: the disk is full\. Free some space and run again with --resume"
    with pytest.raises(PlanError, match=message):
        run(source=str(official), out=tmp_path, qtype="BF16")
    assert not look.is_whole(tmp_path)
    monkeypatch.undo()
    run(source=str(official), out=tmp_path, qtype="BF16", resume=True)
    assert look.contents(tmp_path) == look.contents(bf16)


def test_a_failed_conversion_leaves_the_old_output(official, comfy, run, look, tmp_path):
    out = tmp_path / "out"
    run(source=str(official), out=out, qtype="BF16")
    before = look.contents(out)

    def spoil(tensors):
        tensors["final_layer.linear.bias"][0] = float("nan")

    request = edit_dit(comfy, tmp_path / "spoilt.safetensors", spoil)
    with pytest.raises(CheckpointError, match="holds nan"):
        run(**request, out=out, qtype="BF16")
    after = look.contents(out)
    assert {name: after[name] for name in before} == before
    assert look.is_whole(out)


def test_out_below_a_file(official, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out"):
        assert main(["convert", str(official), str(tmp_path / out)]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"zquant: error: {tmp_path / out}: cannot be created (")
        assert err.endswith("). Choose a folder you may write to.\n")


def test_a_folder_that_refuses_files(official, run, tmp_path):
    (tmp_path / "dit-Q4_K_M.gguf.part").mkdir()
    with pytest.raises(ZQuantError, match=r"gguf\.part: cannot be written \(Is a directory\)"):
        run(source=str(official), out=tmp_path)


def test_a_name_that_cannot_be_taken(official, run, tmp_path):
    (tmp_path / "vae.safetensors").mkdir()
    with pytest.raises(ZQuantError, match=r"cannot be completed \(.*\)\. Run again with --resume"):
        run(source=str(official), out=tmp_path, qtype="BF16")
    assert not (tmp_path / "model.json").exists()
    (tmp_path / "vae.safetensors").rmdir()
    run(source=str(official), out=tmp_path, qtype="BF16", resume=True)


def test_weights_no_reader_knows(comfy, run, tmp_path):
    bytes_ = load_file(comfy["dit"])
    bytes_["x_embedder.weight"] = bytes_["x_embedder.weight"].to(torch.uint8)
    save_file(bytes_, tmp_path / "u8.safetensors")
    message = r"'x_embedder.weight' is 'U8', which zquant cannot read. Readable: F32, F16, BF16"
    with pytest.raises(FormatError, match=message):
        run(**{**comfy, "dit": tmp_path / "u8.safetensors"}, out=tmp_path / "out")


def test_a_resumed_run_must_be_the_same(official, run, tmp_path, monkeypatch):
    fail_at(monkeypatch, 30)
    with pytest.raises(PlanError):
        run(source=str(official), out=tmp_path)
    monkeypatch.undo()
    message = r"dit-Q4_K_M\.gguf\.part: made with other options than Q8_0.*to start anew, remove"
    with pytest.raises(ZQuantError, match=message):
        run(source=str(official), out=tmp_path, qtype="Q8_0", resume=True)
    types = (("qkv", QTYPES["F16"]),)
    message = r"made from another source, with other options.*To start anew, remove it and dit-Q4"
    with pytest.raises(ZQuantError, match=message):
        run(source=str(official), out=tmp_path, tensor_types=types, resume=True)
