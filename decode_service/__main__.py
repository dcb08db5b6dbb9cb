"""``python -m decode_service``: a decode worker, as ``splitserve decode`` starts it."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # imports and weights leave next to nothing to find: on again once the engine has been made

from decode_service.role import DecodeRole
from engine import AsyncEngine, create_engine
from kvtransfer import (
    BlockMemory,
    DeviceBlocks,
    PullClient,
    default_transports,
    make_transports,
    prefer_loopback,
)  # fmt: skip
from splitserve.addresses import is_loopback
from splitserve.config import WorkerConfig
from splitserve.metrics import TransferMetrics
from splitserve.process import run_process
from splitserve.worker import WorkerContext, run_worker


def make_role(context: WorkerContext, engine: AsyncEngine) -> DecodeRole:
    config, description, runner = context.config, context.description, engine.engine.runner
    assert config.worker_id is not None and config.advertise_host is not None
    if is_loopback(config.advertise_host):
        prefer_loopback()
    transports = make_transports(config.transports) if config.transports else default_transports()
    pulls = PullClient(
        DeviceBlocks(runner.device_pool())
        if runner.on_gpu
        else BlockMemory(runner.memory(), runner.layout, runner.num_blocks),
        runner.fingerprint,
        config.worker_id,
        epoch=0,  # until the directory gives one
        transports=transports,
        observer=TransferMetrics(context.registry, description.model, config.role),
    )
    return DecodeRole(engine, pulls, transports, runner.layout, description.fingerprint, context.metrics)


if __name__ == "__main__":
    run_process(WorkerConfig, lambda config: run_worker(config, create_engine, make_role))
