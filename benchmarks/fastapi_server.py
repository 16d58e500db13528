"""Server as a user would write it with FastAPI, beside which ``serving`` measures ours.

    python -m benchmarks.fastapi_server FOLDER PORT

It has no limits, no token and no batches, and reads texts only.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer

from skillnet import SkillNet

TASK, LONGEST, TOP = "text_classification", 24, 5

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = SkillNet.from_pretrained(folder)
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
names = json.loads((folder / "manifest.json").read_text())["serving"]["tasks"][TASK]["names"]
app = FastAPI()


@app.post("/v1/predict")
def predict(body: dict[str, Any]) -> dict[str, Any]:
    rows = [tokenizer.encode(row["text"]).ids[:LONGEST] for row in body["rows"]]
    tokens_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens_BT[index, : len(row)] = torch.tensor(row)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(TASK, {"input": {"tokens": tokens_BT}})["logits"]
    scores, classes = logits.float().softmax(-1).topk(TOP)
    found = [
        [{"answer": names[n], "score": s} for n, s in zip(*pair, strict=True)]
        for pair in zip(classes.tolist(), scores.tolist(), strict=True)
    ]
    return {
        "predictions": [
            {"row": n, "task": TASK, "input": row["text"], **best[0], "alternatives": best}
            for n, (row, best) in enumerate(zip(body["rows"], found, strict=True))
        ]
    }


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
