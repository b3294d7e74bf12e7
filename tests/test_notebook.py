"""The notebook of the docs: executed on a tiny model, and shown with the outputs of a whole run."""

import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_its_outputs_are_of_one_run_without_errors():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    texts = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"\b1\. \w+", texts), "captions are shown"
    assert "Traceback" not in texts
    assert not re.search(r"/(home|root|tmp|Users|work)/", NOTEBOOK.read_text()), "paths of the machine that ran it"


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    """On random weights and with three steps of training; what it says of images is nonsense then."""
    nbclient = pytest.importorskip("nbclient")
    import blip
    from blip.models.blip import Blip

    tokenizer = blip.Tokenizer.load("world")
    config = blip.BlipConfig(blip.TINY.vision, tokenizer.text_config(blip.TINY.text), blip.TINY.embed_dim)
    blip.save_pretrained(Blip(config).eval(), tokenizer, tmp_path / "runs/demo/model")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = code_cells(notebook)[0]
    assert settings.source.count("STEPS = 200") == 1
    settings.source = settings.source.replace("STEPS = 200", "STEPS = 3")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs/notebook/captioner/model/model.safetensors").is_file()
    assert len(list((tmp_path / "runs/notebook/photos").glob("*.txt"))) == 60
    search = next(cell for cell in code_cells(notebook) if 'blip", "search' in cell.source)
    assert any("image/png" in output.get("data", {}) for output in search.outputs)
