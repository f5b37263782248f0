"""PowerSGD: what is compressed and by how much, one update beside an independent reference, what errors bring back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from devices import Bucket, Devices
from torch import Tensor, nn

from dalle1.models.clip import CLIP, CLIPConfig
from dalle1.models.dvae import DVAE, DVAEConfig
from dalle1.models.transformer import DalleTransformer, TransformerConfig
from dalle1.training import communication
from dalle1.training.communication import Bf16, Bf16Reducer, Communication, handed_bytes
from dalle1.training.powersgd import PAPER_RANKS, PowerSGD, PowerSGDReducer, default_rank, draw_q, orthogonalize

WHOLE = PowerSGD(rank=2, factors="fp32")


class Network(nn.Module):
    """A matrix that is compressed, between a head and a bias that are not."""

    def __init__(self, outputs: int = 6, inputs: int = 10) -> None:
        super().__init__()
        self.head = nn.Linear(inputs, 3, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(inputs, outputs)])


def matrix_of(network: nn.Module) -> nn.Parameter:
    return next(each for name, each in network.named_parameters() if "blocks." in name and each.ndim == 2)


@pytest.fixture(params=[1, 2, 3])
def devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Devices:
    several = Devices(request.param)
    monkeypatch.setattr(communication, "dist", several)
    return several


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Devices:
    several = Devices(2)
    monkeypatch.setattr(communication, "dist", several)
    return several


def gradients(device: int, update: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * update + device))


class Ranks:
    """A network and a reducer on each device."""

    def __init__(self, devices: Devices, config: PowerSGD, network: Callable[[], nn.Module] = Network, **more: Any):
        self.devices = devices
        self.networks = [network() for _ in range(devices.count)]
        self.reducers = [PowerSGDReducer(config, each, seed=5, **more) for each in self.networks]

    def reduce(self, gradient: Callable[[int], Tensor]) -> list[Tensor]:
        """The matrix's gradient on each device after one update, in which it has been `gradient(rank)`."""

        def work(rank: int) -> Tensor:
            bucket = Bucket([matrix_of(self.networks[rank])], [gradient(rank)])
            self.reducers[rank].reduce(bucket)  # type: ignore[arg-type]
            return bucket.gradients()[0]

        return self.devices.run(work)

    def errors(self) -> list[Tensor]:
        return [next(iter(each.errors().values())) for each in self.reducers]


def mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.double() for each in tensors]).mean(0)


def projected(matrix: Tensor, q: Tensor) -> Tensor:
    """What of `matrix` is in the span of the columns of `matrix @ q`, whatever their basis."""
    p = matrix.double() @ q.double()
    return p @ torch.linalg.pinv(p) @ matrix.double()


def test_update_is_the_mean_projected_on_the_span_of_its_product_with_q(devices: Devices) -> None:
    ranks = Ranks(devices, WHOLE)
    given = [gradients(rank, 0, 6, 10) for rank in range(devices.count)]
    arrived = ranks.reduce(lambda rank: given[rank])
    q = draw_q(WHOLE.cut("blocks.0.weight", torch.Size((6, 10))), 5, "blocks.0.weight")[0]  # type: ignore[arg-type]
    expected = projected(mean(given), q)
    assert torch.linalg.matrix_rank(expected) == 2
    for each, error, own in zip(arrived, ranks.errors(), given, strict=True):
        assert torch.equal(each, arrived[0]), "devices must go on with the same bits"
        torch.testing.assert_close(each.double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(error, own - each)


@pytest.mark.parametrize(
    ("name", "shape", "slices"),
    [
        # Parts are cut from the longer axis; rows and columns are turned so that there are fewer rows.
        ("blocks.0.attention.out.weight", (8, 8), lambda w: [w[:4], w[4:]]),
        ("blocks.0.mlp.0.weight", (32, 8), lambda w: [w[:16].T, w[16:].T]),
        ("blocks.0.mlp.2.weight", (8, 32), lambda w: [w[:, :16], w[:, 16:]]),
        ("blocks.0.attention.qkv.weight", (24, 8), lambda w: [w[4 * i : 4 * i + 4] for i in range(6)]),
    ],
)
def test_matrices_are_cut_as_the_papers_gpus_hold_them(
    two: Devices, name: str, shape: tuple[int, int], slices: Callable[[Tensor], list[Tensor]]
) -> None:
    config = PowerSGD(rank=2, shards=2, factors="fp32")
    cut = config.cut(name, torch.Size(shape))
    assert cut is not None
    assert cut.rank == 1
    weight = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    assert torch.equal(cut.pieces_of(weight), torch.stack(slices(weight)))
    assert cut.rows <= cut.columns

    network = nn.Module()
    *parents, last = name.split(".")
    owner = network
    for part in parents:
        owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.register_parameter(last, nn.Parameter(torch.zeros(shape)))
    given = [gradients(rank, 0, *shape) for rank in range(2)]
    ranks = Ranks(two, config, lambda: network)
    (arrived, _), q = ranks.reduce(lambda rank: given[rank]), draw_q(cut, 5, name)
    for piece, whole, each in zip(slices(arrived), slices(mean(given)), q, strict=True):
        torch.testing.assert_close(piece.double(), projected(whole, each), rtol=1e-4, atol=1e-5)


def test_gradient_of_no_higher_rank_arrives_whole(two: Devices) -> None:
    ranks = Ranks(two, WHOLE)
    given = [gradients(rank, 0, 6, 2) @ gradients(rank, 1, 2, 10) for rank in (0, 0)]
    arrived = ranks.reduce(lambda rank: given[rank])
    torch.testing.assert_close(arrived[0], given[0], rtol=1e-4, atol=1e-5)
    assert max(error.abs().max() for error in ranks.errors()) < 1e-4


@pytest.mark.parametrize("fixed_q", [True, False])
@pytest.mark.parametrize("factors", ["fp32", "bf16"])
def test_what_was_applied_and_what_is_left_are_all_gradients(devices: Devices, fixed_q: bool, factors: Any) -> None:
    ranks = Ranks(devices, PowerSGD(rank=2, shards=1, fixed_q=fixed_q, factors=factors))
    given = [[gradients(rank, update, 6, 10) for update in range(6)] for rank in range(devices.count)]
    applied = [ranks.reduce(lambda rank, update=update: given[rank][update])[0] for update in range(6)]
    # Exact whatever the factors travelled in: what rounding has taken is in the errors too.
    total = mean([torch.stack(each).double().sum(0) for each in given])
    torch.testing.assert_close(torch.stack(applied).double().sum(0) + mean(ranks.errors()), total, atol=1e-5, rtol=1e-4)
    for reducer in ranks.reducers:
        assert reducer.sent_bytes == 6 * (4 if factors == "fp32" else 2) * 2 * (6 + 10)


def test_constant_gradient_arrives_in_the_end_if_q_follows(two: Devices) -> None:
    ranks = Ranks(two, PowerSGD(rank=2, fixed_q=False))
    applied = torch.stack([ranks.reduce(lambda rank: gradients(rank, 0, 6, 10))[0] for _ in range(100)])
    expected = mean([gradients(rank, 0, 6, 10) for rank in range(2)])
    assert (applied.double().mean(0) - expected).norm() < 0.1 * expected.norm()


def test_errors_are_orthogonal_to_a_q_that_stays(two: Devices) -> None:
    # So they add nothing to P: they arrive only in directions that later gradients bring.
    ranks = Ranks(two, WHOLE)
    q = draw_q(WHOLE.cut("blocks.0.weight", torch.Size((6, 10))), 5, "blocks.0.weight")[0]  # type: ignore[arg-type]
    for update in range(3):
        ranks.reduce(lambda rank, update=update: gradients(rank, update, 6, 10))
        left = mean(ranks.errors())
        assert left.norm() > 1
        assert (left @ q.double()).norm() < 1e-4 * left.norm()


def test_q_stays_or_is_the_last_updates(two: Devices) -> None:
    given = [[gradients(rank, update, 6, 10) for update in range(2)] for rank in range(2)]
    q = draw_q(WHOLE.cut("blocks.0.weight", torch.Size((6, 10))), 5, "blocks.0.weight")[0]  # type: ignore[arg-type]
    for fixed_q in (True, False):
        ranks = Ranks(two, PowerSGD(rank=2, fixed_q=fixed_q, factors="fp32"))
        first = ranks.reduce(lambda rank: given[rank][0])[0].double()
        left = mean([each[1] for each in given]) + mean(ranks.errors())
        second = ranks.reduce(lambda rank: given[rank][1])[0].double()
        # The first update's Q is its M^T P, which spans what its rows span.
        following = q if fixed_q else torch.linalg.svd(first).Vh[:2].T
        torch.testing.assert_close(second, projected(left, following), rtol=1e-3, atol=1e-4)
        assert list(ranks.reducers[0].queries()) == ([] if fixed_q else ["blocks.0.weight"])


def test_q_is_a_function_of_seed_and_name() -> None:
    cut = WHOLE.cut("blocks.0.weight", torch.Size((6, 10)))
    assert cut is not None
    q = draw_q(cut, 0, "a")
    assert q.shape == (1, 10, 2)
    assert torch.equal(q, draw_q(cut, 0, "a"))
    assert not torch.equal(q, draw_q(cut, 1, "a"))
    assert not torch.equal(q, draw_q(cut, 0, "b"))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12])
def test_size_of_a_gradient_does_not_matter(two: Devices, size: float) -> None:
    arrived = [Ranks(two, WHOLE).reduce(lambda r, s=s: s * gradients(r, 0, 6, 10))[0] for s in (1.0, size)]
    torch.testing.assert_close(arrived[1] / size, arrived[0], rtol=1e-3, atol=1e-5)


def test_no_gradient_is_none_and_columns_become_orthonormal_all_the_same(two: Devices) -> None:
    assert torch.equal(Ranks(two, WHOLE).reduce(lambda _: torch.zeros(6, 10))[0], torch.zeros(6, 10))
    same = torch.randn(3, 6, 1).repeat(1, 1, 4)
    for p in (torch.zeros(3, 6, 4), same, 1e-20 * torch.randn(3, 6, 4)):
        basis = orthogonalize(p)
        torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(3, 4, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_on_one_device_is_seen_by_all_and_costs_no_errors(two: Devices, bad: float) -> None:
    ranks = Ranks(two, WHOLE)
    ranks.reduce(lambda rank: gradients(rank, 0, 6, 10))
    before = ranks.errors()
    now = [gradients(rank, 1, 6, 10) for rank in range(2)]
    now[1][2, 3] = bad
    for arrived in ranks.reduce(lambda rank: now[rank]):
        assert arrived.isnan().all()
    # The finite gradient waits with the rest; the other is left out.
    torch.testing.assert_close(ranks.errors()[0], before[0] + now[0])
    assert torch.equal(ranks.errors()[1], before[1])

    ranks.reducers[1].load({"blocks.0.weight": torch.full((6, 10), bad)}, {})
    assert ranks.reduce(lambda _: torch.zeros(6, 10))[0].isnan().all()
    assert torch.equal(ranks.errors()[1], torch.zeros(6, 10)), "what is not finite itself cannot be kept"
    assert ranks.reduce(lambda _: torch.zeros(6, 10))[0].isfinite().all()


def test_scale_of_a_gradient_is_in_no_error_and_back_in_the_result(two: Devices) -> None:
    plain, scaled = Ranks(two, WHOLE), Ranks(two, WHOLE)
    scale = torch.tensor(0.0)
    for rank, network in enumerate(scaled.networks):
        scaled.reducers[rank] = PowerSGDReducer(WHOLE, network, seed=5, scales={matrix_of(network): scale})
    for update in range(3):
        scale.fill_(2.0 ** (13 - update))  # it changes from update to update
        expected = plain.reduce(lambda rank, update=update: gradients(rank, update, 6, 10))[0]
        arrived = scaled.reduce(lambda rank, update=update: gradients(rank, update, 6, 10) * scale)[0]
        torch.testing.assert_close(arrived / scale, expected)
    torch.testing.assert_close(scaled.errors(), plain.errors())


def test_others_of_a_bucket_are_means_in_fp32(two: Devices) -> None:
    networks = [Network(), Network()]
    config = PowerSGD(rank=2, shards=1, factors="bf16")
    reducers = [PowerSGDReducer(config, network, seed=5) for network in networks]
    buckets = []
    for rank, network in enumerate(networks):
        weights = [network.blocks[0].bias, matrix_of(network), network.head.weight]
        buckets.append(Bucket(weights, [gradients(rank, i, *each.shape) for i, each in enumerate(weights)]))  # type: ignore[arg-type]
    plain = [mean([bucket.gradients()[i] for bucket in buckets]) for i in range(3)]
    two.run(lambda rank: reducers[rank].reduce(buckets[rank]))  # type: ignore[arg-type]
    for bucket, reducer in zip(buckets, reducers, strict=True):
        for i in (0, 2):
            torch.testing.assert_close(bucket.gradients()[i].double(), plain[i])
        assert torch.equal(bucket.buffer(), buckets[0].buffer())
        assert reducer.sent_bytes == handed_bytes(config, networks[0]) == 4 * (6 + 30) + 2 * 2 * (6 + 10)


def test_bf16_is_the_mean_of_what_is_rounded(two: Devices) -> None:
    given = [gradients(rank, 0, 50) for rank in range(2)]
    given[0][0] = given[1][0] = 3e38  # their sum is no number of fp32 or bf16
    buckets = [Bucket([nn.Parameter(torch.zeros(50))], [each]) for each in given]
    reducers = [Bf16Reducer(), Bf16Reducer()]
    two.run(lambda rank: reducers[rank].reduce(buckets[rank]))  # type: ignore[arg-type]
    expected = ((given[0] / 2).bfloat16() + (given[1] / 2).bfloat16()).float()
    for bucket, reducer in zip(buckets, reducers, strict=True):
        assert torch.equal(bucket.buffer(), expected)
        assert reducer.sent_bytes == 100
    torch.testing.assert_close(expected.double(), mean(given), rtol=2**-7, atol=2**-7)


def paper_transformer(width: int) -> DalleTransformer:
    with torch.device("meta"):
        return DalleTransformer(TransformerConfig(n_layers=2, d_model=width, n_heads=width // 64))


@pytest.mark.parametrize(("width", "saved"), [(1920, 0.833), (2688, 0.851), (3968, 0.859)])
def test_paper_saves_what_its_table_says(width: int, saved: float) -> None:
    network, rank = paper_transformer(width), PAPER_RANKS[width]
    assert default_rank(width) == rank
    matrices = [each for name, each in network.named_parameters() if name.startswith("blocks.") and each.ndim == 2]
    plain = 4 * sum(each.numel() for each in matrices)
    others = 4 * sum(each.numel() for each in network.parameters()) - plain
    for shards in (1, 4, 8):
        sent = handed_bytes(PowerSGD(shards=shards, factors="fp32"), network) - others
        # r (m + 2) / (2 d m) for each of m parts (table 2); 5 r / (8 d) for 8 of them (table 1).
        assert sent * 2 * width * shards == plain * rank * (shards + 2)
        assert handed_bytes(PowerSGD(shards=shards, factors="bf16"), network) - others == sent / 2
    assert 1 - sent / plain == pytest.approx(saved, abs=5e-4)
    assert handed_bytes(Communication(), network) == 2 * handed_bytes(Bf16(), network) == plain + others


def test_everything_but_the_matrices_in_blocks_travels_as_it_is() -> None:
    config = PowerSGD()
    with torch.device("meta"):
        networks: list[nn.Module] = [paper_transformer(1920), CLIP(CLIPConfig()), DVAE(DVAEConfig())]
    compressed = [
        {n.split("blocks.")[-1][2:] for n, w in each.named_parameters() if config.cut(n, w.shape)} for each in networks
    ]
    assert compressed[0] == {
        *("attention.qkv.weight", "attention.out.weight", "mlp.0.weight", "mlp.2.weight"),
    }
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in compressed[1]} == {"qkv", "out", "0", "2"}
    assert compressed[2] == set()


def test_matrix_whose_factors_are_as_large_travels_as_it_is() -> None:
    shape = torch.Size((6, 12))
    assert PowerSGD(rank=3, shards=1).cut("blocks.0.weight", shape) is not None
    assert PowerSGD(rank=4, shards=1).cut("blocks.0.weight", shape) is None  # 4 (6 + 12) = 6 * 12
    assert PowerSGD(rank=4, shards=1).handed_bytes("blocks.0.weight", shape) == 4 * 6 * 12


def test_rank_between_the_papers_widths_is_that_of_the_narrower_one() -> None:
    assert [default_rank(width) for width in (128, 1024, 1920, 2048, 3968, 8000)] == [35, 274, 512, 547, 896, 1807]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "communication.rank must be null or a whole number >= 1, got 0"),
        ({"rank": 0.5}, "communication.rank must be null or a whole number >= 1, got 0.5"),
        ({"shards": 0}, "communication.shards must be >= 1, got 0"),
        ({"factors": "fp8"}, "PowerSGD.factors must be one of fp32, bf16, got 'fp8'"),
        ({"fixed_q": 1}, "PowerSGD.fixed_q must be true or false, got 1"),
    ],
)
def test_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PowerSGD(**options)
