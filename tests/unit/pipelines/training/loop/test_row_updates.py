"""AdamW on rows of embedding tables: which rows change, and against the formula on each row."""

import torch
from torch import Tensor, nn

from pipelines.training.config.run import TrainingConfig
from pipelines.training.loop.optimizer import build_optimizer, clip_gradients, update_weights
from pipelines.training.loop.row_updates import use_sparse_gradients

ROWS, DIM = 12, 3
CONFIG = TrainingConfig(lr=0.1, weight_decay=0.3)
#: Rows that each of three steps reads; a row may occur twice.
BATCHES = ([1, 4, 4], [4, 7, 1], [2, 2, 4])


class TableModel(nn.Module):
    """A table and a matrix, as the stem and the layers of a model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(ROWS, DIM)
        self.project = nn.Linear(DIM, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.project(self.embedding(rows)).square().sum()


def train(
    model: TableModel, batches: tuple[list[int], ...], *, sparse: bool = True
) -> torch.optim.AdamW:
    tables = use_sparse_gradients(model) if sparse else []
    optimizer = build_optimizer(model.named_parameters(), CONFIG, tables)
    step(model, optimizer, batches)
    return optimizer


def step(model: TableModel, optimizer: torch.optim.AdamW, batches: tuple[list[int], ...]) -> None:
    for rows in batches:
        model(torch.tensor(rows)).backward()
        update_weights(optimizer, list(model.named_parameters()), 0.5)
        optimizer.zero_grad()


def test_rows_without_gradient_keep_weight_and_state() -> None:
    model, start = TableModel(), TableModel().embedding.weight.detach()
    optimizer = train(model, BATCHES)
    state = optimizer.state[model.embedding.weight]
    used = torch.zeros(ROWS, dtype=torch.bool)
    used[[1, 2, 4, 7]] = True
    assert torch.equal(model.embedding.weight[~used], start[~used])
    assert not (model.embedding.weight[used] == start[used]).any()
    assert not state["exp_avg"][~used].any()
    assert not state["exp_avg_sq"][~used].any()
    assert float(state["step"]) == len(BATCHES)


def test_a_step_equals_adamw_on_the_rows_of_the_batch() -> None:
    """All rows have a gradient, so the lazy update is AdamW's; also of the other parameters."""
    batches = (list(range(ROWS)),) * 3
    ours, theirs = TableModel().double(), TableModel().double()
    mine, other = train(ours, batches), train(theirs, batches, sparse=False)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
        for name, value in mine.state[one].items():
            torch.testing.assert_close(value, other.state[two][name], rtol=1e-12, atol=1e-14)


def test_sparse_and_dense_gradients_update_the_same_rows_with_the_same_numbers() -> None:
    """Several workers sum dense gradients; one worker has sparse ones."""
    one, other = TableModel().double(), TableModel().double()
    train(one, BATCHES)
    tables = [other.embedding.weight]
    step(other, build_optimizer(other.named_parameters(), CONFIG, tables), BATCHES)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = TableModel()
    optimizer = train(model, BATCHES)
    table = model.embedding.weight
    before, count = table.detach().clone(), float(optimizer.state[table]["step"])
    model(torch.tensor([1])).mul(float("nan")).backward()
    _, is_finite = update_weights(optimizer, list(model.named_parameters()), 1.0)
    assert not is_finite
    assert torch.equal(table, before)
    assert float(optimizer.state[table]["step"]) == count


def test_clipping_of_sparse_gradients_equals_that_of_dense_ones() -> None:
    norms, scaled = [], []
    for sparse in (False, True):
        model = TableModel().double()
        if sparse:
            use_sparse_gradients(model)
        model(torch.tensor([3, 3, 5])).backward()
        norms.append(clip_gradients(model.parameters(), 0.01))
        gradient = model.embedding.weight.grad
        assert gradient is not None
        assert gradient.is_sparse == sparse
        scaled.append(gradient.to_dense())
    torch.testing.assert_close(norms[0], norms[1])
    torch.testing.assert_close(scaled[0], scaled[1])


def test_sparse_gradients_add_to_the_dense_buckets_of_several_workers() -> None:
    sparse, dense = TableModel(), TableModel()
    use_sparse_gradients(sparse)
    bucket = torch.zeros(ROWS * DIM + 1)
    sparse.embedding.weight.grad = bucket[:-1].view(ROWS, DIM)
    for model in (sparse, dense):
        model(torch.tensor([3, 3, 5])).backward()
    expected = dense.embedding.weight.grad
    assert expected is not None
    torch.testing.assert_close(bucket[:-1].view(ROWS, DIM), expected)
