from __future__ import annotations

from pathlib import Path

import pytest
import typer.testing
from hypothesis import given
from hypothesis import strategies as st

from splitserve.cli.main import app
from splitserve.cli.options import parse_bytes, parse_cores, parse_list
from splitserve.cli.up import local_workers
from splitserve.cluster import Role
from splitserve.config import WorkerConfig
from splitserve.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("512K", 512 << 10),
        ("512M", 512 << 20),
        ("1.5g", 3 << 29),
        (" 4G ", 4 << 30),
        ("2GiB", 2 << 30),
        ("2GB", 2 << 30),
        ("100b", 100),
        ("1T", 1 << 40),
    ],
)
def test_sizes_have_units_of_1024(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_no_size_is_no_size() -> None:
    assert parse_bytes(None) is None


@pytest.mark.parametrize("text", ["", "G", "lots", "-1G", "0", "nan", "inf", "1e30", "1X", "1 2", "0.1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_bytes(text)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = parse_bytes(text)
    except ConfigError:
        return
    assert size is not None and 0 < size < 2**63


@pytest.mark.parametrize(
    ("text", "cores"),
    [(None, ()), ("", ()), ("3", (3,)), ("0-2", (0, 1, 2)), ("0-2,5", (0, 1, 2, 5)), ("5, 1,1-2", (1, 2, 5))],
)
def test_cores_are_numbers_and_ranges(text: str | None, cores: tuple[int, ...]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["x", "1-", "-1", "3-1", "1,,2", "0-2-4", "1.5", "0-99999999999", ","])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="list of cores"):
        parse_cores(text)


@given(st.sets(st.integers(0, 4000), min_size=1, max_size=20))
def test_cores_are_sorted_and_each_is_there_once(cores: set[int]) -> None:
    assert parse_cores(",".join(map(str, cores))) == tuple(sorted(cores))


def test_lists_are_split_at_commas() -> None:
    assert parse_list(" ucx, tcp,") == ("ucx", "tcp")
    assert parse_list(None) == ()


def refused(*arguments: str, env: dict[str, str] | None = None) -> str:
    """What the command line says to values that it refuses before it starts anything."""
    result = typer.testing.CliRunner().invoke(app, arguments, env=env)
    assert isinstance(result.exception, ConfigError)
    return str(result.exception)


# The message of a refused block size tells which of the four sources won.
FLAG, ENV, YAML = ["--block-size", "7"], {"SPLITSERVE_BLOCK_SIZE": "8"}, "block-size: 9\n"


@pytest.mark.parametrize(
    ("flags", "env", "yaml", "winner"),
    [
        (FLAG, ENV, YAML, "not 7"),
        ([], ENV, YAML, "not 8"),
        ([], {}, YAML, "not 9"),
        ([], {}, "block_size: 9\n", "not 9"),
    ],
)
def test_flag_beats_variable_beats_file(
    tmp_path: Path, flags: list[str], env: dict[str, str], yaml: str, winner: str
) -> None:
    file = tmp_path / "defaults.yaml"
    file.write_text(yaml)
    assert refused("up", "--config", str(file), *flags, env=env).endswith(winner)


def test_a_file_may_set_what_is_required(tmp_path: Path) -> None:
    file = tmp_path / "defaults.yaml"
    file.write_text("model: smollm2\n")
    assert "--redis-url is needed" in refused("decode", "--config", str(file))


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("modle: x\n", "sets modle, which this command does not have"),
        ("a: [\n", "is not YAML"),
        ("- a\n", "must map flags to values"),
        (None, "can't be read"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, yaml: str | None, words: str) -> None:
    file = tmp_path / "defaults.yaml"
    if yaml is not None:
        file.write_text(yaml)
    said = refused("up", "--config", str(file))
    assert str(file) in said and words in said


def test_workers_of_one_machine_share_its_gpu() -> None:
    workers = [WorkerConfig(role, "m", "", gpu_memory_utilization=0.8) for role in Role]
    assert [worker.gpu_memory_utilization for worker in local_workers(workers)] == [0.4, 0.4]
