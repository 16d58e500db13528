"""Inputs without a task: which of 24 domains a text belongs to, and what a wrong choice costs.

A domain is the manual of a language. Its task names the page that a paragraph comes from. One model
has all 24 tasks, so a prediction without a task must find the language first. A harder set has 24
pages of the German manual as domains. Paragraphs that two languages have are left out. So are
paragraphs that a translator left in English (two words of ``ENGLISH``): they belong to another
domain than their page. The sets "with English" keep them.

The packages of Debian are pinned in ``ARCHIVES``; download them into the archives of the run root
with ``apt-get download``. The tokenizer is that of prepared corpora, and the encoder is new, so
neither has seen these languages. Heads are solved in closed form on the encoder's vectors.
"""

import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Result, plain
from pipelines.data.tokenizer.training import load_tokenizer
from pipelines.serving.inputs import PredictionItem
from pipelines.serving.predictor import TaskPredictor
from pipelines.training.evaluation.inference import memory_inputs
from skillnet import SkillNet
from skillnet.config import SkillNetConfig
from skillnet.modality import find_stem
from skillnet.objectives.heads import mean_pool
from skillnet.router import InputCounts, InputRouter, count_features, hash_tokens, name_counts
from skillnet.skills import SkillPlan, Task
from skillnet_platform.errors import UserError
from skillnet_platform.storage import run_root, sha256_file

ARCHIVES = """
manpages-cs 4.27.0-1 e97e6769ceb2129bc4f697d1df7798f253af699386e209dda3ed1460c3935f5b
manpages-da 4.27.0-1 e39d41541ce26b0a56ae228095db0f0fbbbe72d34b7e52915f14145c2165528a
manpages-de 4.27.0-1 82b0674a475ff39c7a366121f5823ff842300ecdeb596ad467787459cc539845
manpages-es 4.27.0-1 feecf5e9105f612faeddff1df07459ee94da7e1ad9e51380dedf508487a17de5
manpages-fi 4.27.0-1 2cfe412153f763f3d458d46a2e8de149a87d8ca36759d89bd53af51a9c7fa756
manpages-fr 4.27.0-1 20a563c41d9483796260870634bb2a07b271026b99b888db87ea0ae0a99a63e5
manpages-hu 1%3a4.27.0-1 a8a89cc7397117eebd2326f3b70821c5d7fb42abe7d128d78bb75dfd23ac111b
manpages-it 4.27.0-1 a84d150e056ced478410ba47c715e9c59da08475311978a642f4f71a70d3724b
manpages-ja 0.5.0.0.20221215+dfsg-1 4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743
manpages-ko 4.27.0-1 1ff5483f4114ed536edea079f80e4fbbfda4eefbd09ee70cbc24ff1d065728c8
manpages-nb 4.27.0-1 23757ddea3c786fb95e4ffd7e8173343a13e7f4ba0005df5faa7d334cabbb1b8
manpages-nl 4.27.0-1 71244eec28caeeff5298bbc24297f3f8ad4524527d76071c8f54de210923855a
manpages-pl 1%3a4.27.0-1 a6bb9118f90d27c97517349b051722babcb73c9fa53b90e8806304a587d86498
manpages-pt-br 4.27.0-1 d1785d426400beb36d69fac22d6d8b3cd390ffd45fab062bf5c70cfa46947d2b
manpages-ro 4.27.0-1 ecc97d83f1faf0e5a7c97f39b9e7097fcc85ebe9bb1d0e301f12b95c8223494d
manpages-ru 4.27.0-1 8e86695991e187a1e08332fd2fcfea5d25390439e8020171987db77f35b3f1b6
manpages-sr 4.27.0-1 d5aa8836f262b7083408f688854f61e3c41fa17483caedb1bc433c1695b0187f
manpages-sv 4.27.0-1 6aebb56919849a335e22b4da1c1546153f17b45e4cfaa04bd0f133be7c8eeba0
manpages-tr 2.0.6-2 babf3ded00dd7c30db8fb333c1ff482fd5a52483d2bffec7557e3f78ed77eef1
manpages-uk 4.27.0-1 6e20a3e729d9c4d9473b50b16433d4ffd7d5b2067389aecfb15de0593eaf120e
manpages-vi 4.27.0-1 aa2fa7229dbd33d6381d7212368be5eb16f8fb5b0fc7f86e60ff7befbfcb0bbc
manpages-zh 1.6.4.3-1 12ea83950d4d25c6fe56d9f9cb736a360d84efc2d2ed451cc20e708340c5807d
manpages 6.9.1-1 91b7df0b4bd4e1a3b8ba5b229abd844e03f4c82c45ccb8c964a035190c29a501
"""
#: Rows of a domain that are counted, that calibrate, and that are predicted; pages of a task.
COUNTED, CALIBRATING, TESTED, PAGES = 900, 100, 250, 12
#: Domains of the second set, and its language.
ONE_LANGUAGE, DOMAINS = "de", 24
#: Words of English that no other of these languages has often.
ENGLISH = frozenset(("the", "of", "and", "to", "is", "for", "this", "with", "be", "by"))
MAX_TOKENS = 64
CLOCK = ""
#: Coverage at which the precision is reported, and of the goal.
COVERAGES, GOAL = (0.7, 0.8, 0.9, 1.0), 0.9
_PAGE = re.compile(r"\./usr/share/man/(?:([^/]+)/)?man\d/([^/]+)\.gz")
_MACRO = re.compile(r"[.'](?:B|I|BR|IR|RB|RI|BI|IB) (.*)")
_ESCAPE = re.compile(r"\\f(?:\(..|\[.*?\]|.)|\\[*]?\(..|\\[*]?\[[^\]]*\]|\\.")

Manual = dict[str, str]


def run(rounds: int, threads: int) -> list[Result]:
    """Precision and coverage of both sets, and the score beside that of the known task."""
    manuals = read_manuals()
    everything = {
        name: rows for name, rows in manuals.items() if len(rows) >= COUNTED + CALIBRATING
    }
    languages = {
        name: {text: page for text, page in rows.items() if name == "en" or not _is_english(text)}
        for name, rows in everything.items()
    }
    pages: dict[str, Manual] = defaultdict(dict)
    for text, page in manuals[ONE_LANGUAGE].items():
        pages[page][text] = page
    longest = sorted(pages, key=lambda page: (-len(pages[page]), page))[:DOMAINS]
    data = Path(os.environ.get("SKILLNET_BENCHMARK_DATA") or run_root() / "corpora")
    tokenizer = load_tokenizer(data / "tokenizer.json")
    found = _measure_routes("24 languages", languages, tokenizer)
    found += _measure_scores("24 languages", languages, tokenizer)
    found += _measure_ridge("24 languages", languages, tokenizer)
    found += _measure_routes("with English", everything, tokenizer)
    found += _measure_scores("with English", everything, tokenizer)
    one = {page: pages[page] for page in longest}
    return found + _measure_routes("24 pages of one manual", one, tokenizer)


def read_manuals() -> dict[str, Manual]:
    """Return language -> paragraph -> its page, without paragraphs of two languages."""
    manuals: dict[str, Manual] = defaultdict(dict)
    for line in ARCHIVES.split("\n")[1:-1]:
        package, version, digest = line.split()
        path = run_root() / "archives" / f"{package}_{version}_all.deb"
        if not path.is_file() or sha256_file(path) != digest:
            pin = f"{package}={version.replace('%3a', ':')}"
            raise UserError(
                f"{path}: missing, or not the pinned package. Run `apt-get download {pin}` in its "
                "folder"
            )
        # Pages have links to other pages, which the readers of corpora refuse.
        words = ["dpkg-deb", "--fsys-tarfile", str(path)]
        packed = subprocess.run(words, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as members:
            for member in members:
                place = _PAGE.fullmatch(member.name)
                if place and member.isfile():
                    content = gzip.decompress(members.extractfile(member).read())  # type: ignore[union-attr]
                    for paragraph in _cut_paragraphs(content.decode(errors="replace")):
                        manuals[place[1] or "en"].setdefault(paragraph, place[2])
    owners = Counter(text for rows in manuals.values() for text in rows)
    return {
        name: {text: page for text, page in rows.items() if owners[text] == 1}
        for name, rows in sorted(manuals.items())
    }


def _is_english(text: str) -> bool:
    return len(ENGLISH & set(re.findall("[a-z]+", text.lower()))) > 1


def _cut_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a page in roff, without its markup, at most 200 characters each."""
    parts: list[list[str]] = [[]]
    for line in text.splitlines():
        macro = _MACRO.match(line)
        if macro:
            parts[-1].append(macro[1].replace('"', ""))
        elif line.strip() and line[0] not in ".'":
            parts[-1].append(line)
        else:
            parts.append([])
    plain = (" ".join(_ESCAPE.sub("", " ".join(part)).split())[:200] for part in parts)
    return [each for each in plain if len(each) >= (40 if each.isascii() else 15)]


def _divide(rows: Manual) -> tuple[list[str], list[str], list[str]]:
    """Return the texts of a domain that are counted, that calibrate, and that are predicted."""
    texts = sorted(rows, key=lambda text: hashlib.sha256(text.encode()).digest())
    counted = min(COUNTED, int(0.6 * len(texts)))
    held = min(CALIBRATING, int(0.2 * len(texts)))
    return (
        texts[:counted],
        texts[counted : counted + held],
        texts[counted + held : counted + held + TESTED],
    )


def _encode(tokenizer: object, texts: list[str]) -> list[np.ndarray]:
    found = tokenizer.encode_batch(texts)  # type: ignore[attr-defined]
    return [np.array(each.ids[:MAX_TOKENS] or [1], np.int32) for each in found]


def _hash(tokenizer: object, texts: list[str]) -> np.ndarray:
    tokens = np.zeros((len(texts), MAX_TOKENS), np.int64)
    for row, ids in zip(tokens, _encode(tokenizer, texts), strict=True):
        row[: len(ids)] = ids
    return hash_tokens(tokens)


def _count(tokenizer: object, rows: Manual) -> InputCounts:
    counted, held, _ = _divide(rows)
    return count_features([_hash(tokenizer, counted)], [_hash(tokenizer, held)])


def _measure_routes(name: str, domains: dict[str, Manual], tokenizer: object) -> list[Result]:
    """Precision at given coverage, and at the threshold of the router, of held-out rows."""
    router = InputRouter({key: _count(tokenizer, rows) for key, rows in domains.items()})
    tested = {key: _hash(tokenizer, _divide(rows)[2]) for key, rows in domains.items()}
    owners = np.array([key for key, rows in tested.items() for _ in rows])
    routed = [router.route(row) for rows in tested.values() for row in rows]
    best, confidence = router._decide(router._score([r for x in tested.values() for r in x]))
    names = np.array([router.domains[number][0] for number in best])
    order = np.argsort(-confidence, kind="stable")
    is_right = names == owners
    size = f"{len(domains)} domains, {len(owners):,} held-out rows"
    results = []
    for share in COVERAGES:
        precision = float(is_right[order[: round(share * len(order))]].mean())
        target = ">= 0.97" if share == GOAL else ""
        label = f"{name}: right at coverage {share:.0%}"
        results.append(plain(label, "share", precision, target, size))
    answered = np.array([bool(each.tasks) for each in routed])
    hit = np.array([owner in each.tasks for owner, each in zip(owners, routed, strict=True)])
    foreign = np.mean([each.doubt.startswith("unlike") for each in routed])
    by = {key: (answered[owners == key].mean(), is_right[owners == key].mean()) for key in domains}
    print(f"{name}: domain, answered, right without doubt", file=sys.stderr)
    for key, (share, right) in by.items():
        print(f"  {key:30} {share:.3f} {right:.3f}", file=sys.stderr)
    lows, rights = zip(*by.values(), strict=True)
    for label, value, spread in (
        ("answered", answered.mean(), lows),
        ("right of the answered", hit[answered].mean(), (hit[answered].mean(),)),
        ("right without doubt, by domain", is_right.mean(), rights),
        ("called foreign", foreign, (foreign,)),
    ):
        low, high = float(min(spread)), float(max(spread))
        results.append(
            Result(f"{name}: {label}", "", "share", float(value), low, high, "", 1, size)
        )
    return results


def _measure_ridge(name: str, domains: dict[str, Manual], tokenizer: object) -> list[Result]:
    """Precision of ridge regression on mean vectors of a frozen stem, as a contender."""
    torch.manual_seed(0)
    plan, model = SkillPlan(("general",), "text"), _build_model({}, tokenizer)
    stem = find_stem(plan.stem)(model.config)

    def pool(texts: list[str]) -> np.ndarray:
        inputs = memory_inputs(_encode(tokenizer, texts), plan, model.config)
        parts = np.array_split(np.arange(len(texts)), len(texts) // 256 + 1)
        with torch.no_grad():
            means = [mean_pool(*stem(inputs.load_batch(part), plan.modality)) for part in parts]
        return torch.cat(means).double().numpy()

    counted, tested = ([pool(_divide(rows)[part]) for rows in domains.values()] for part in (0, 2))
    means_KD = np.stack([x.mean(0) for x in counted])
    centred_KD = means_KD - means_KD.mean(0)
    within = np.mean([np.cov(x.T, bias=True) for x in counted], 0)
    total = within + centred_KD.T @ centred_KD / len(counted)
    owners = np.concatenate([np.full(len(x), number) for number, x in enumerate(tested)])
    size = f"{len(domains)} domains, {len(owners):,} held-out rows, {within.shape[0]} numbers"
    precisions = []
    for constant in (1e-3, 1e-2, 1e-1):
        added = constant * np.trace(within) / len(within) * np.eye(len(within))
        weights = np.linalg.solve(total + added, centred_KD.T)
        scores = (np.concatenate(tested) - means_KD.mean(0)) @ weights
        best = np.sort(scores, 1)
        order = np.argsort(best[:, -2] - best[:, -1])[: round(GOAL * len(owners))]
        precisions.append(float((scores.argmax(1) == owners)[order].mean()))
    label = f"{name}: right at coverage {GOAL:.0%}, ridge regression"
    low, high = min(precisions), max(precisions)
    return [Result(label, "", "share", high, low, high, "", 1, size, "best of three constants")]


def _build_model(classes: dict[str, list[str]], tokenizer: object) -> SkillNet:
    """Return a new model with a classification task for each list of classes."""
    plan = SkillPlan(("general",), "text")
    torch.manual_seed(0)
    return SkillNet(
        SkillNetConfig(
            dim=192,
            num_layers=1,
            num_heads=4,
            ffn_dim=192,
            vocab_size=tokenizer.get_vocab_size(),  # type: ignore[attr-defined]
            max_tokens=MAX_TOKENS,
            bigram_buckets=2**14,
            skills=("general",),
            tasks={
                key: Task("classification", {"input": plan}, outputs=len(each))
                for key, each in classes.items()
            },
        )
    ).eval()


def _measure_scores(name: str, domains: dict[str, Manual], tokenizer: object) -> list[Result]:
    """Accuracy of the tasks with and without their names, by the predictor of every command."""
    kept = {}
    for key, rows in domains.items():
        pages = [page for page, _ in Counter(rows.values()).most_common(PAGES)]
        kept[key] = {text: page for text, page in rows.items() if page in pages}
    classes = {key: sorted(set(rows.values())) for key, rows in kept.items()}
    model = _build_model(classes, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        files = {key: Path(folder) / name_counts(key) for key in kept}
        for key, rows in kept.items():
            _count(tokenizer, rows).save(files[key])
        tasks: dict[str, dict[str, object]] = {
            key: {"names": names, "limit": None, "preprocessing": {}}
            for key, names in classes.items()
        }
        predictor = TaskPredictor(model, tokenizer, tasks, precision="fp32", counts=files)
        for key, rows in kept.items():
            _solve_head(predictor, key, rows, classes[key])
        hits: list[tuple[bool, bool, bool]] = []
        for key, rows in kept.items():
            tested = _divide(rows)[2]
            known = predictor.predict([PredictionItem(x, x, None, key) for x in tested], 1)
            found = predictor.predict([PredictionItem(x, x) for x in tested], 1)
            for text, one, other in zip(tested, known, found, strict=True):
                page = rows[text]
                is_right = other.task == key and other.answer == page
                hits.append((one.answer == page, is_right, bool(other.task)))
    known, routed, answered = np.array(hits).T
    size = f"{len(kept)} tasks, {len(hits):,} held-out rows of {PAGES} pages each"
    loss = float(known[answered].mean() - routed[answered].mean())
    figures = {
        "accuracy, known task": (float(known.mean()), ""),
        "answered without a task": (float(answered.mean()), ""),
        "accuracy of the answered, known task": (float(known[answered].mean()), ""),
        "accuracy of the answered, without a task": (float(routed[answered].mean()), ""),
        "points lost on the answered": (100 * loss, "<= 1"),
    }
    return [
        plain(f"{name}: {label}", "points" if "points" in label else "share", x, goal, size)
        for label, (x, goal) in figures.items()
    ]


def _solve_head(predictor: TaskPredictor, task: str, rows: Manual, classes: list[str]) -> None:
    """Give a task the head of ridge regression on the vectors of its counted rows."""
    counted = _divide(rows)[0]
    plan = predictor.model.config.tasks[task].towers["input"]
    inputs = memory_inputs(_encode(predictor.tokenizer, counted), plan, predictor.model.config)
    x = predictor.runner.pool(task, "input", inputs).astype(np.float64)
    y = np.array([[rows[text] == name for name in classes] for text in counted], float)
    mean = x.mean(0)
    centred = x - mean
    scale = centred.std() ** 2 * len(x)
    weight = np.linalg.solve(
        centred.T @ centred + 0.1 * scale * np.eye(x.shape[1]), centred.T @ (y - y.mean(0))
    )
    project: Any = predictor.model.heads[task].project
    with torch.no_grad():
        project.weight.copy_(torch.from_numpy(weight.T))
        project.bias.copy_(torch.from_numpy(y.mean(0) - mean @ weight))
