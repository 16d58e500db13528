"""A task as a model of Sentence Transformers: equal vectors, and an evaluation by mteb."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.serving.bundle import build_bundle, check_bundle
from skillnet.model import SkillNet
from skillnet_serving.model_export import export_bundle
from tests.helpers.served_place import ServedPlace

#: Each process that collects this file would import the package for six seconds.
pytestmark = pytest.mark.skipif(
    find_spec("sentence_transformers") is None, reason="needs the extra sentence-transformers"
)

TEXTS = ["红色的心", "蓝色的鱼在水里游", "猫"]


Folders = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def folders(place: ServedPlace, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return the bundle of the source and the folders of two tasks."""
    root = tmp_path_factory.mktemp("sentences")
    bundle = build_bundle(place.source, place.data, root / "bundle")
    for task in ("text_to_image", "text_to_code"):
        report = export_bundle(
            bundle, check_bundle(bundle), root / task, "sentence-transformers", task
        )
        assert report.difference == 0
        assert report.tasks == [task]
    return bundle, root / "text_to_image", root / "text_to_code"


def plain(vectors: torch.Tensor) -> np.ndarray:
    return vectors.as_subclass(torch.Tensor).numpy()


def test_vectors_are_those_of_skillnet_also_after_saving_again(
    folders: Folders, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    bundle, of_images, of_code = folders
    source = SkillNet.from_pretrained(bundle)
    model = SentenceTransformer(str(of_images), device="cpu", trust_remote_code=True)
    model.save(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (30, 30, 3)).astype(np.uint8)) for _ in "ab"]
    pictures[0].save(tmp_path / "a.png")
    texts = plain(source.encode_text(TEXTS, task="text_to_image"))
    images = plain(source.encode_image(pictures, task="text_to_image"))
    for each in (model, again):
        assert np.array_equal(each.encode(TEXTS), texts)
        assert np.array_equal(each.encode_query(TEXTS), texts)
        assert np.array_equal(each.encode_document(pictures), images)
        one = plain(source.encode_image(pictures[:1], task="text_to_image"))
        assert np.array_equal(each.encode([str(tmp_path / "a.png")]), one)
        assert each.get_embedding_dimension() == texts.shape[1]
        cosines = each.similarity(each.encode(TEXTS), each.encode(pictures))
        assert torch.allclose(cosines, torch.from_numpy(texts @ images.T), atol=1e-5)
    # The folder is an export for the Hub, too.
    assert np.array_equal(
        plain(SkillNet.from_pretrained(tmp_path / "again").encode_text(TEXTS)), texts
    )
    codes = ["def f(x):\n    return x", "def g():\n    pass"]
    code = SentenceTransformer(str(of_code), device="cpu", trust_remote_code=True)
    assert np.array_equal(code.encode_document(codes), plain(source.encode_code(codes)))
    expected = source.encode_text(TEXTS, task="text_to_code")
    assert np.array_equal(code.encode_query(TEXTS), plain(expected))
    with pytest.raises(ValueError, match="'image' is not supported"):
        code.encode(pictures)


@pytest.mark.slow(
    "test_sentence_export.py::test_vectors_are_those_of_skillnet_also_after_saving_again"
)
def test_mteb_evaluates_a_local_task(folders: Folders) -> None:
    mteb = pytest.importorskip("mteb", reason="mteb is not installed")
    datasets = pytest.importorskip("datasets")
    from mteb.abstasks import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

    class LocalPairs(AbsTaskSTS):
        metadata = TaskMetadata(
            name="LocalPairs",
            dataset={"path": "local", "revision": "1"},
            type="STS",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["cmn-Hans"],
            main_score="cosine_spearman",
            description="Pairs of texts that share characters.",
            reference=None,
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )
        min_score, max_score = 0, 5

        def load_data(self, **kwargs: object) -> None:
            pairs = {"sentence1": TEXTS, "sentence2": TEXTS[::-1], "score": [0.0, 5.0, 1.0]}
            self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(pairs)})
            self.data_loaded = True

    model = SentenceTransformer(str(folders[1]), device="cpu", trust_remote_code=True)
    found = mteb.evaluate(model, LocalPairs(), cache=None)
    (score,) = found.task_results[0].scores["test"]
    vectors = model.encode(TEXTS)
    cosines = (vectors * vectors[::-1]).sum(1)
    ranks = [np.argsort(np.argsort(values)) for values in (cosines, [0.0, 5.0, 1.0])]
    # The first and the last pair are equal, so their order among each other is free.
    assert abs(score["cosine_spearman"]) <= 1
    assert (score["cosine_spearman"] > 0) == (np.corrcoef(*ranks)[0, 1] > 0)
