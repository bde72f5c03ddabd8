"""What a conversion writes: files, names, metadata, model.json; and how: threads, slabs, memory."""

import json
import math
import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch

from zquant.cli.main import main
from zquant.convert import slabs
from zquant.convert.execute import convert
from zquant.convert.plan import ConvertRequest, plan_conversion
from zquant.convert.summary import plan_rows
from zquant.formats.detect import open_source
from zquant.formats.model_folder import find_model
from zquant.quant.codec import dequantize
from zquant.quant.policy import POLICIES
from zquant.quant.qtypes import QTYPES


def fields(path):
    """Metadata of a GGUF file, read by gguf-py."""
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}


def test_the_folder_holds_four_files_and_is_a_model(q4):
    names = {"dit-Q4_K_M.gguf", "text_encoder-Q4_K_M.gguf", "vae.safetensors", "model.json"}
    assert {path.name for path in q4.iterdir()} == names
    assert find_model(q4).dit == q4 / "dit-Q4_K_M.gguf"


def test_dit_metadata(q4):
    found = fields(q4 / "dit-Q4_K_M.gguf")
    assert found["general.architecture"] == "lumina2"
    assert found["general.name"] == "mini"
    assert found["general.file_type"] == 15
    assert found["lumina2.block_count"] == 1
    assert found["lumina2.rope.dimension_sections"] == [32, 48, 48]


def test_text_encoder_metadata_has_the_tokenizer_and_the_template(q4, small_vocabulary):
    found = fields(q4 / "text_encoder-Q4_K_M.gguf")
    assert found["general.architecture"] == "qwen3"
    assert found["qwen3.attention.head_count_kv"] == 1
    n = len(small_vocabulary.tokens)
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[:n] == list(small_vocabulary.tokens)
    assert tokens[n:] == [f"[PAD{i}]" for i in range(n, 384)]
    assert found["tokenizer.ggml.merges"] == [f"{a} {b}" for a, b in small_vocabulary.merges]
    assert "<|im_start|>" in found["tokenizer.chat_template"]


@pytest.mark.parametrize("file", ["dit-Q4_K_M.gguf", "text_encoder-Q4_K_M.gguf"])
def test_the_tensors_of_a_block_are_contiguous(q4, file):
    names = list(open_source(q4 / file).tensors)
    found = (re.match(r"(layers|blk|\w+_refiner)\.\d+\.", name) for name in names)
    blocks = [match[0] for match in found if match]
    changes = [b for i, b in enumerate(blocks) if i == 0 or b != blocks[i - 1]]
    assert len(changes) == len(set(changes)) >= 3


def test_model_json_says_what_the_files_are(q4, look):
    manifest = json.loads((q4 / "model.json").read_text())
    assert look.is_whole(q4)
    assert (manifest["variant"], manifest["shift"], manifest["steps"]) == ("turbo", 3.0, 8)
    assert manifest["guidance_scale"] == 0.0
    assert manifest["source"].endswith("mini")
    for part, entry in manifest["files"].items():
        path = q4 / entry["name"]
        source = open_source(path)
        assert entry["bytes"] == path.stat().st_size
        assert entry["weights"] == sum(i.n_weights for i in source.tensors.values())
        assert entry["bpw"] == pytest.approx(8 * source.n_bytes / entry["weights"], abs=1e-4)
        assert entry["policy"] == ("as stored" if part == "vae" else "Q4_K_M")
        types = {name: t["qtype"] for name, t in manifest["tensors"][part].items()}
        assert types == {name: info.qtype.name for name, info in source.tensors.items()}


def test_errors_in_model_json_are_those_of_the_file(q4, official, run, look, tmp_path):
    run(source=str(official), out=tmp_path, qtype="F32")
    exact = look.data_of(tmp_path / "dit-F32.gguf")
    reported = json.loads((q4 / "model.json").read_text())["tensors"]["dit"]
    for name, (qtype, shape, data) in look.data_of(q4 / "dit-Q4_K_M.gguf").items():
        weights = torch.frombuffer(bytearray(exact[name][2]), dtype=torch.float32).double()
        rows = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        rows = rows.view(-1, QTYPES[qtype].row_bytes(shape[-1]))
        decoded = dequantize(rows, QTYPES[qtype], torch.float32).double().reshape(-1)
        error = ((weights - decoded).square().sum() / weights.square().sum()).sqrt().item()
        # a difference of float32 values is rounded once
        assert reported[name]["relative_rms_error"] == pytest.approx(error, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("chosen", "name", "shift"), [(None, "base", 6.0), ("turbo", "turbo", 3.0)]
)
def test_variant_is_the_schedulers_unless_given(official_f32, chosen, name, shift, tmp_path):
    request = ConvertRequest(source=str(official_f32), out=tmp_path / "out", variant=chosen)
    plan = plan_conversion(request)
    assert (plan.variant.name, plan.variant.shift) == (name, shift)
    assert "assumed" not in list(plan_rows(plan))[-1]


def test_an_assumed_variant_is_said(comfy, tmp_path):
    plan = plan_conversion(ConvertRequest(**comfy, out=tmp_path / "out"))
    assert "variant turbo (assumed: the source does not say" in list(plan_rows(plan))[-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_has_a_plan_that_fits_its_name(policy, official, tmp_path):
    request = ConvertRequest(
        source=str(official), out=tmp_path, qtype=policy, text_encoder_qtype="Q8_0"
    )
    dit, text_encoder, vae = plan_conversion(request).outputs
    assert [o.path.name for o in (dit, text_encoder, vae)] == [
        f"dit-{policy}.gguf",
        "text_encoder-Q8_0.gguf",
        "vae.safetensors",
    ]
    stem = policy.removesuffix("_M").removesuffix("_S")
    assert stem in {t.qtype.name for t in dit.tensors}
    assert "Q8_0" in {t.qtype.name for t in text_encoder.tensors}


@pytest.mark.parametrize("policy", ["Q4_0", "IQ4_NL"])
def test_weights_that_threads_cannot_share_are_counted(policy, official, tmp_path, monkeypatch):
    monkeypatch.setattr("zquant.quant.codec.compiled_loops", lambda: None)
    plan = plan_conversion(ConvertRequest(source=str(official), out=tmp_path, qtype=policy))
    tensors = [t for output in plan.outputs for t in output.tensors]
    rounded = {"F32", "F16", "BF16", "Q8_0", "Q4_0"}
    assert plan.n_locked == sum(t.n_weights for t in tensors if t.qtype.name not in rounded)
    assert 0 < plan.n_locked < plan.n_weights


def test_tensor_types_go_before_the_policy(official, tmp_path):
    types = ((r"layers\.0\.attention\.qkv", QTYPES["F16"]), (r"\.(qkv|attn_q)\.", QTYPES["Q5_0"]))
    request = ConvertRequest(source=str(official), out=tmp_path, tensor_types=types)
    dit, text_encoder, _ = plan_conversion(request).outputs
    found = {t.name: t.qtype.name for o in (dit, text_encoder) for t in o.tensors}
    assert found["layers.0.attention.qkv.weight"] == "F16"
    assert found["noise_refiner.0.attention.qkv.weight"] == "Q5_0"
    assert found["blk.0.attn_q.weight"] == "Q5_0"
    assert found["layers.0.attention.out.weight"] == "Q4_K"


def test_dry_run_shows_every_tensor_and_writes_nothing(official, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(official), str(out), "--qtype", "q8_0", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    plan = plan_conversion(ConvertRequest(source=str(official), out=out, qtype="Q8_0"))
    totals = {}  # what follows "= FILE: ", by file name
    for section in printed.split("= ")[1:]:
        totals[Path(section.split(": ")[0]).name] = section
    for output in plan.outputs:
        for tensor in output.tensors:
            assert any(
                line.split()[:2] == [tensor.name, tensor.qtype.name]
                for line in printed.splitlines()
            )
        assert f"= {output.path}: " in printed
        counts = [int(n) for n in re.findall(r"(\d+) tensors", totals[output.path.name])]
        assert sum(counts) == len(output.tensors)
    assert not out.exists()
    assert main(["convert", str(official), str(out), "--dry-run", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [len(listed[o.component]) for o in plan.outputs] == [
        len(o.tensors) for o in plan.outputs
    ]


def test_the_command_prints_the_plan_then_the_result(official, q4, tmp_path, capsys, look):
    assert main(["convert", str(official), str(tmp_path), "--threads", "1"]) == 0
    printed, err = capsys.readouterr()
    assert err == ""  # no bar where nobody is watching
    assert "layers.0." not in printed  # about a thousand rows, of a real model
    assert re.search(r"^  Q4_K +\d+ tensors +[\d.]+ [KM]iB$", printed, re.MULTILINE)
    assert printed.index(" in all, variant turbo") < printed.index("mean relative RMS error: Q4_K ")
    assert printed.endswith(f"next: zquant run PROMPT --model {tmp_path}\n")
    assert look.contents(tmp_path) == look.contents(q4)


def test_json_is_one_document(official, tmp_path, capsys):
    command = ["convert", str(official), str(tmp_path), "--qtype", "BF16", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "model.json").read_text())


@pytest.mark.parametrize(("threads", "slab"), [(1, None), (5, None), (3, 50_000)])
def test_bytes_do_not_depend_on_threads_or_slabs(
    threads, slab, official, q4, run, look, tmp_path, monkeypatch
):
    if slab is not None:
        monkeypatch.setattr(slabs, "SLAB_WEIGHTS", slab)
    before = torch.get_num_threads()
    run(source=str(official), out=tmp_path, threads=threads)
    assert torch.get_num_threads() == before
    ours, theirs = look.contents(tmp_path), look.contents(q4)
    if slab is not None:  # sums of squares are added in another order
        del ours["model.json"], theirs["model.json"]
    assert ours == theirs


def test_progress_adds_up_to_all_weights(official, tmp_path):
    plan = plan_conversion(ConvertRequest(source=str(official), out=tmp_path, qtype="BF16"))
    seen = {}

    def count(name, n_weights):
        seen[name] = seen.get(name, 0) + n_weights

    result = convert(plan, count)
    assert seen == {o.path.name: o.n_weights for o in plan.outputs}
    assert result.source_bytes == sum(o.source.n_bytes for o in plan.outputs)


def test_memory_is_bounded_by_the_slabs(official, run, tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 2**14)
    request = {"source": str(official), "qtype": "F32", "threads": 1}
    run(**request, out=tmp_path / "warm")
    tracemalloc.start()
    run(**request, out=tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    # headers, names and the vocabulary are most of it; all tensors would be `size`
    assert peak < 2 * 2**20 < size / 4


def test_only_a_window_of_slabs_is_under_way(official):
    plan = plan_conversion(ConvertRequest(source=str(official), out=official / "x", qtype="F32"))
    taken = 0

    def counted():
        nonlocal taken
        for slab in slabs.slabs_of(plan.outputs[0].tensors):
            taken += 1
            yield slab

    with ThreadPoolExecutor(2) as pool:
        for done, (slab, packed) in enumerate(slabs.in_order(pool, counted(), 3)):
            assert taken - done <= 3
            assert len(packed.data) == slab.n_weights * 4


def test_rows_of_a_tensor_are_in_slabs_once_and_in_order(official, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_WEIGHTS", 3000)
    plan = plan_conversion(ConvertRequest(source=str(official), out=official / "x"))
    for tensor in plan.outputs[0].tensors:
        found = list(slabs.slabs_of([tensor]))
        assert sum(slab.n_weights for slab in found) == tensor.n_weights == math.prod(tensor.shape)
        assert [slab.last for slab in found] == [False] * (len(found) - 1) + [True]
