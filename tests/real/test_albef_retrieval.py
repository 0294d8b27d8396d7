"""`retrieval --albef CONFIG` on the real ALBEF, against ALBEF's own `evaluation` and `itm_eval` of Retrieval.py."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from since import since

from . import albef, standins
from .checkouts import directory, inside, load

IMAGES, CAPTIONS, BEST = 6, 5, 6
VARIABLE = albef.VARIABLE
pytestmark = since("counting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A config, a vocabulary, six pictures and a list of ALBEF's kind, of five captions each."""
    directory(VARIABLE)
    np, Image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    found: Path = tmp_path_factory.mktemp("retrieval")
    random = np.random.default_rng(0)
    rows = []
    for place in range(IMAGES):
        Image.fromarray(random.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(found / f"{place}.jpg")
        rows.append({"image": f"{place}.jpg", "caption": standins.sentences(CAPTIONS, place)})
    (found / "test.json").write_text(json.dumps(rows))
    standins.bert(found)
    config = dict(
        image_res=64, vision_width=768, embed_dim=64, temp=0.07, mlm_probability=0.15, queue_size=24, momentum=0.995,
        bert_config=standins.json_file(found / "bert.json", **albef.BERT), k_test=BEST, batch_size_test=2,
    )  # fmt: skip
    standins.json_file(found / "config.yaml", **config)  # JSON is YAML
    return found


@pytest.fixture(scope="module")
def scripts() -> Any:
    """Retrieval.py and `dataset` of the checkout, which ask for a YAML package by conda's name for it."""
    yaml = pytest.importorskip("yaml")
    sys.modules.setdefault("ruamel_yaml", yaml)
    return load(VARIABLE, "Retrieval"), load(VARIABLE, "dataset")


def test_the_command_ranks_as_their_script_does(folder: Path, scripts: Any) -> None:
    script, dataset = scripts
    from benchmarks.accuracy.yours import retrieval
    from benchmarks.accuracy.yours.albef import load_albef

    standins.one_process(folder)
    asked = f"--data test.json --albef config.yaml --random-weights --relevance keys --against random --best {BEST}"
    asked += " --keep-rate 0.5 --batch 2 --device cpu --output results"
    with inside(folder):
        torch.manual_seed(3)
        report = retrieval.main(retrieval.parse(asked.split()))
        torch.manual_seed(3)
        host = load_albef(Path("config.yaml"), None)
        config = json.loads(Path("config.yaml").read_text())
        data = dataset.re_eval_dataset(str(folder / "test.json"), host.preprocess, str(folder))
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        script.args = argparse.Namespace(distributed=False)
        tokenizer = load(VARIABLE, "models.tokenization_bert").BertTokenizer.from_pretrained("bert-base-uncased")
        theirs = script.itm_eval(
            *script.evaluation(host.model, loader, tokenizer, torch.device("cpu"), config), data.txt2img, data.img2txt
        )
    arms = {record["arm"]: record["recall"] for record in report["results"]}
    assert list(arms) == ["first pass alone", "no selection", "text, keys", "text, -keys", "random"]
    own = arms["no selection"]
    for k in (1, 5):  # behind the best of the first pass their script leaves the order open
        assert own["image_to_text"][k] == pytest.approx(theirs[f"txt_r{k}"])
        assert own["text_to_image"][k] == pytest.approx(theirs[f"img_r{k}"])
    assert arms["text, keys"] != arms["text, -keys"], "or the selection would not count"
