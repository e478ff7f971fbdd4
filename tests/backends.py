"""A backend of another distribution: installed in a directory that is put on the path, as pip would leave it there."""

from __future__ import annotations

from pathlib import Path

SOURCE = """
from sllmdask.batching.backend import ModelFacts
from sllmdask.errors import UnsupportedArchitecture
from sllmdask.sim.engine import CostModelEngine


class CostsBackend:
    wants_tensors = {wants_tensors}

    def inspect(self, checkpoint_dir, config, task):
        if config["architectures"] != ["LlamaForCausalLM"]:
            raise UnsupportedArchitecture(config["architectures"][0], "what it costs is not known")
        return ModelFacts("LlamaForCausalLM", 128)

    def build(self, spec):
        assert (spec.checkpoint_dir / "config.json").is_file()
        assert (spec.tensors is not None) is self.wants_tensors
        spec.wait_for_all()
        return CostModelEngine(spec.settings, n_blocks=64, max_model_len=128, n_vocab=400)
"""


def install(
    directory: Path, name: str = "costs", module: str = "costs_backend", source: str = SOURCE, *, wants_tensors: bool = False
) -> Path:
    """Install a distribution ``MODULE`` whose ``CostsBackend`` is called `name`; returns the directory to put on the path."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{module}.py").write_text(source.format(wants_tensors=wants_tensors))
    facts = directory / f"{module}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[sllmdask.engines]\n{name} = {module}:CostsBackend\n")
    return directory
