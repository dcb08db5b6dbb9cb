"""Schedulers and transfers under thousands of orders of faults, drawn from seeds, without a second of waiting."""

from __future__ import annotations

from collections import Counter

from tests.chaos.cluster import SECONDS
from tests.chaos.simulation import Simulation, answer

SEEDS = 3000 if SECONDS else 60


def test_every_request_gets_its_answer_and_every_block_comes_back_whatever_the_order_of_faults() -> None:
    faults: Counter[str] = Counter()
    preemptions = answers = left = 0
    for seed in range(SEEDS):
        simulation = Simulation(seed)
        simulation.run()
        for client in simulation.clients:
            expected = answer(client.prompt, client.count)
            assert client.given == expected[: len(client.given)], f"seed {seed}: a wrong token"
            assert client.left or len(client.given) == client.count, f"seed {seed}: tokens are missing"
            left += client.left
            answers += not client.left
        for worker in simulation.workers:
            assert not worker.attempts, f"seed {seed}: an attempt was forgotten"
            assert worker.engine.pool.num_used == 0, f"seed {seed}: a block was leaked"
            preemptions += worker.engine.scheduler.num_preemptions
        faults.update(simulation.faults)
    print(f"\n{SEEDS} seeds: {answers} answers, {left} clients left, {preemptions} preemptions, {dict(faults)}")
    assert min(faults["crash"], faults["stalled"], left, preemptions) > SEEDS // 5, "each thing has happened"
