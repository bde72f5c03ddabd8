"""The networks on a GPU: kernels give what torch gives, and the pictures stay right."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from zquant_kernels import runtime

from zquant import Engine, RunRequest
from zquant.layers.compute import Compute
from zquant.memory.device import probe
from zquant.models.dit_block import Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QTYPES = ("Q4_K", "Q8_0")
# the two sides sum in another order, which float32 shows as 1e-6. What they then round, to int8 or
# bfloat16, lands on the other side for a few values in 1000: a step of 1/127 or 1/256 each
BOUNDS = {
    (torch.float32, False): 1e-5,
    (torch.float32, True): 1e-3,
    (torch.bfloat16, False): 1e-2,
    (torch.bfloat16, True): 1e-2,
    (torch.float16, False): 2e-3,
    (torch.float16, True): 2e-3,
}


def relative_l2(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.fixture(scope="module", params=QTYPES)
def block(request: pytest.FixtureRequest) -> Block:
    """Of 6 heads: every width is a multiple of 256, as in the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        from fidelity import random_block
        from kernel_cases import Shapes, small
    shapes = small(Shapes(device=DEVICE, dtype=torch.float32))
    return random_block(shapes.config, request.param, 0).to(DEVICE)


@pytest.mark.parametrize("tokens", [1, 33, 300])
@pytest.mark.parametrize(
    ("dtype", "int8"), BOUNDS, ids=lambda v: str(v).removeprefix("torch.") if v else ""
)
def test_a_block_with_kernels_is_the_block_of_torch(
    block: Block, dtype: torch.dtype, int8: bool, tokens: int
) -> None:
    compute = Compute(dtype=dtype, int8=int8)
    dim = block.attention_norm1.weight.shape[0]
    torch.manual_seed(tokens)
    x = torch.randn(1, tokens, dim, device=DEVICE)
    angles = torch.randn(tokens, 64, device=DEVICE)
    modulation = [1 + 0.1 * torch.randn(dim, device=DEVICE) for _ in range(4)]

    def run() -> Tensor:
        block.use(compute, "layers.1")
        return block(x.clone(), (angles.cos(), angles.sin()), modulation, compute) - x

    with torch.inference_mode():
        found = run()
        with runtime.forbidden("compared with kernels"):
            wanted = run()
    assert wanted.norm() > 0.1 * x.norm()  # the branches are not nothing beside the stream
    assert relative_l2(found, wanted) <= BOUNDS[dtype, int8]


def test_no_kernel_family_falls_back_to_torch() -> None:
    paths = {path.family: path for path in probe("cuda", kernels="triton").paths.families}
    for family in ("dequantize", "fused block", "VAE norm", "quantize (convert)"):
        assert paths[family].path == "Triton", paths[family].reason


@pytest.fixture(scope="module")
def cpu_engine() -> Iterator[Engine]:
    with closing(Engine.open("demo", device="cpu", compute_dtype="float32")) as engine:
        yield engine


@pytest.mark.parametrize("compute", ["exact", "int8"])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_the_demo_paints_as_asked(kernels: str, compute: str) -> None:
    from judge_demo import held_out_cases, measure

    with closing(Engine.open("demo", device="cuda", kernels=kernels, compute=compute)) as engine:
        judged = measure(engine, held_out_cases(10, 0))
    assert judged["accuracy"]["all"]["right"] >= 0.8, judged["failures"]


def latents(engine: Engine) -> Tensor:
    prompt = "a red circle left of a blue square"
    found = engine.generate(RunRequest(prompt=prompt, seed=3, keep_latents=True)).latents
    assert found is not None
    return found[-1].cpu()


def test_cpu_and_gpu_agree_in_float32(cpu_engine: Engine) -> None:
    with closing(Engine.open("demo", device="cuda", compute_dtype="float32", compute="exact")) as e:
        # 1e-6 per block from the order of sums, through eight steps that feed each other
        assert relative_l2(latents(e), latents(cpu_engine)) <= 1e-3


def test_kernels_and_torch_agree_on_the_latents(cpu_engine: Engine) -> None:
    options = {"device": "cuda", "compute_dtype": "float32", "compute": "exact"}
    with closing(Engine.open("demo", kernels="triton", **options)) as e:
        found = latents(e)
    with closing(Engine.open("demo", kernels="torch", **options)) as e:
        assert relative_l2(found, latents(e)) <= 1e-3
