"""A Z-Image of 0.1 M weights on disk, small enough to paint in milliseconds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import zquant

TOY = {  # the smallest networks with every kind of tensor; 8 pixels per latent, as in the original
    "transformer": {
        "dim": 32,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "cap_feat_dim": 32,
        "axes_dims": [8, 4, 4],
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
}


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official layout; read-only. It has no tokenizer folder, so the bundled one is used."""
    import checkpoint_layout
    import make_checkpoint

    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoint_layout.PRESETS, "toy", TOY)
        patch.setattr(make_checkpoint, "_write_tokenizer", lambda _: None)
        return make_checkpoint.make_checkpoint(folder, make_checkpoint.Spec(preset="toy"))


@pytest.fixture(scope="session")
def toy_engine(toy_folder: Path) -> Iterator[zquant.Engine]:
    """One engine for all tests, as a server would have it: no request may change the next."""
    engine = zquant.Engine.open(toy_folder, device="cpu", compute_dtype="float32")
    yield engine
    engine.close()
