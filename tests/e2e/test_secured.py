"""A cluster with API keys and mutual TLS: it answers those who may ask, through both pools."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import trustme

from splitserve.api_keys import ApiKey
from splitserve.config import TlsFiles
from tests.e2e.conftest import pair, running

KEY = {"Authorization": "Bearer sk-test"}


def certificate(directory: Path) -> TlsFiles:
    ca = trustme.CA()
    leaf = ca.issue_cert("127.0.0.1")
    files = [directory / name for name in ("cert.pem", "key.pem", "ca.pem")]
    for path, blob in zip(files, (leaf.cert_chain_pems[0], leaf.private_key_pem, ca.cert_pem), strict=True):
        blob.write_to_path(str(path))
    return TlsFiles(*map(str, files))


def test_a_cluster_with_keys_and_certificates_answers_who_may_ask(
    tmp_path: Path, tiny_path: Callable[..., str]
) -> None:
    tls, keys = certificate(tmp_path), (ApiKey.of("sk-test", "tests"),)
    workers = pair(tiny_path(), served_model_name="tiny", kv_cache_memory=8 << 20, tls=tls, api_keys=keys)
    front, trust = TlsFiles(tls.cert, tls.key), ssl.create_default_context(cafile=tls.ca)
    with running(workers, tmp_path, decode_only_tokens=16, tls=tls, public_tls=front, api_keys=keys) as cluster:
        with httpx.Client(base_url=cluster.http_url, verify=trust, timeout=30) as client:
            body = {"prompt": list(range(100)), "max_tokens": 4, "ignore_eos": True}
            assert client.post("/v1/completions", json=body).status_code == 401
            answer = client.post("/v1/completions", json=body, headers=KEY)
            assert answer.json()["usage"]["completion_tokens"] == 4
            pulled = client.get(cluster.metrics_url("decode-0"), headers=KEY).text
            assert "splitserve_kv_transfer_bytes_total" in pulled, "it went through both pools"
            assert client.get(cluster.metrics_url("decode-0")).status_code == 401
