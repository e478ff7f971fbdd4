from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

from sllmdask.errors import Cancelled, CheckpointCorrupt, CheckpointNotFound, ConfigError, DiskFull, SourceUnreachable
from sllmdask.loader import http_origin, libc
from sllmdask.loader.access import Access
from sllmdask.loader.buffers import BufferPool, address_of
from sllmdask.loader.convert import convert
from sllmdask.loader.fetch import Fetch
from sllmdask.loader.format import read_index
from sllmdask.loader.http_origin import HttpDirectory
from sllmdask.loader.hub import HubModel
from sllmdask.loader.plan import plan_reads
from sllmdask.loader.reader import read_chunks
from sllmdask.loader.remote import find_fetched, local_name, open_remote
from sllmdask.loader.sockets import Limits
from sllmdask.loader.tiers import tensor_views
from tests.loader.tensors import files_of

CHUNK = 32 * 1024
QUICK = Limits(connect_s=5, idle_s=5, attempts=4, backoff_s=0.001)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Asked:
    """One request, and how it is to be answered."""

    path: str
    span: tuple[int, int] | None
    headers: dict[str, str]
    status: int | None = None
    location: str | None = None
    ranges: bool = True
    etag: str | None = None
    content_range: str | None = None
    content_length: int | None = None
    chunked: bool = False
    #: Bytes of the body after which the connection is cut.
    cut: int | None = None
    retry_after: str | None = None


@dataclass
class Site:
    """An HTTP server for the files below `root`; `rule` may change how a request is answered, in any of its threads."""

    root: Path
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    rule: Callable[[Asked], None] = lambda _: None

    def data(self) -> list[Asked]:
        """Requests for data files, without those that only looked for their heads."""
        return [a for a in self.asked if a.path.endswith((".safetensors", ".bin")) and a.span and a.span[0] > 0]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        span = None
        if text := self.headers.get("Range"):
            first, last = text.removeprefix("bytes=").split("-")
            span = (int(first), int(last))
        asked = Asked(unquote(urlsplit(self.path).path), span, {name.lower(): value for name, value in self.headers.items()})
        self.site.asked.append(asked)
        self.site.rule(asked)
        if asked.location is not None:
            self.answer(302, Location=asked.location)
        elif asked.status is not None:
            self.answer(asked.status, b"no", **({"Retry_After": asked.retry_after} if asked.retry_after else {}))
        else:
            self.file(asked, self.site.root / asked.path.lstrip("/"))

    def file(self, asked: Asked, path: Path) -> None:
        if not path.is_file():
            return self.answer(404)
        data = path.read_bytes()
        etag = asked.etag or f'"{hashlib.md5(data).hexdigest()}"'
        headers = {"ETag": etag} if etag != "none" else {}
        if asked.span and asked.ranges:
            first, last = asked.span
            if first >= len(data):
                return self.answer(416, Content_Range=f"bytes */{len(data)}")
            last = min(last, len(data) - 1)
            headers["Content_Range"] = asked.content_range or f"bytes {first}-{last}/{len(data)}"
            body, status = data[first : last + 1], 206
        else:
            body, status = data, 200
        if asked.content_length is not None:
            headers["Content_Length"] = str(asked.content_length)
        if asked.cut is not None:
            headers.setdefault("Content_Length", str(len(body)))
            self.answer(status, body[: asked.cut], **headers)
            self.close_connection = True
            return None
        return self.answer(status, body, **headers)


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *args: object) -> None:
        """A client that leaves, or a rule that cuts the connection, is part of many tests."""


@pytest.fixture
def serve(tmp_path):
    """``serve(root, handler)``: a :class:`Site`."""
    with contextlib.ExitStack() as stack:

        def start(root: Path, kind: type[Handler] = Handler, host: str = "127.0.0.1") -> Site:
            site = Site(root)
            handler = type("Handler", (kind,), {"site": site})
            server = Server((host, 0), handler)
            server.daemon_threads = True
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            site.url = f"http://{host}:{server.server_port}/"
            return site

        yield start


@pytest.fixture
def site(serve, checkpoint):
    return serve(checkpoint)


@pytest.fixture
def final(tmp_path):
    return tmp_path / "store" / "m"


def load(fetch, *, tee=True, cancel=None, finish=True):
    """Read a fetch as the store does; the tensors."""
    plan = plan_reads(fetch.index, CHUNK)
    buffer = BufferPool(2**30).lease(plan.nbytes)
    if not tee:
        read_chunks(plan, address_of(buffer), source=fetch.chunks(cancel), cancel=cancel)
        return tensor_views(fetch.index, plan, buffer)
    with fetch.tee(plan, buffer) as beside:
        read_chunks(plan, address_of(buffer), source=fetch.chunks(cancel), tee=beside, cancel=cancel)
        if finish:
            beside.finish()
    return tensor_views(fetch.index, plan, buffer)


def opened(site, final, **options):
    return Fetch.open(HttpDirectory(site.url, limits=options.pop("limits", QUICK), **options), final)


def partial_of(final):
    return final.with_name(final.name + ".partial")


# --- a directory behind HTTP -----------------------------------------------------------------------------------------


def test_a_checkpoint_behind_http_comes_to_memory_and_to_disk_at_once(site, final, checkpoint, tensors, assert_equal, n_fds):
    before = n_fds()
    with opened(site, final) as fetch:
        assert not final.exists()
        assert_equal(load(fetch), tensors)
    expected = files_of(checkpoint)
    del expected["README.md"]
    assert files_of(final) == expected
    assert not partial_of(final).exists()
    sizes = {name: len(data) for name, data in expected.items()}
    fetched = sum(min(a.span[1] + 1, sizes[a.path[1:]]) - a.span[0] for a in site.data())
    assert fetched <= sum(size for name, size in sizes.items() if name.endswith(".safetensors")), "no byte is fetched twice"
    assert n_fds() <= before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("tee", "cancel-watch", "read-"))]


def test_a_connection_is_used_for_many_chunks(serve, checkpoint, final):
    ports = set()

    class Noting(Handler):
        def do_GET(self):
            ports.add(self.client_address)
            super().do_GET()

    site = serve(checkpoint, Noting)
    with opened(site, final) as fetch:
        ports.clear()
        load(fetch)
    assert len(site.data()) > 20
    assert len(ports) <= 4, "one for each of the reader's threads"


def test_the_fingerprint_and_the_index_are_those_that_the_complete_copy_has(site, final):
    with opened(site, final) as fetch:
        load(fetch)
        complete = read_index(final)
        assert (complete.fingerprint, complete.tensors) == (fetch.index.fingerprint, fetch.index.tensors)
        assert fetch.directory == final


def test_a_complete_copy_is_taken_as_it_is(site, final):
    with opened(site, final) as fetch:
        load(fetch)
    n = len(site.asked)
    assert opened(site, final) is None
    assert len(site.asked) == n


def test_a_load_without_a_disk_copy_leaves_nothing_behind(site, final, tensors, assert_equal):
    fetch = opened(site, final)
    assert_equal(load(fetch, tee=False), tensors)
    fetch.close(keep=False)
    assert list(final.parent.iterdir()) == []


def test_a_pull_needs_no_buffer_and_tells_how_far_it_is(site, final, checkpoint):
    seen = []
    with opened(site, final) as fetch:
        assert fetch.pull(CHUNK, on_progress=lambda *progress: seen.append(progress)) == final
    assert {name: data for name, data in files_of(checkpoint).items() if name != "README.md"} == files_of(final)
    assert seen == sorted(seen) and seen[-1] == (fetch.index.nbytes, fetch.index.nbytes)


def test_a_server_without_ranges_is_read_as_one_stream_for_each_file(site, final, tensors, assert_equal, checkpoint):
    def no_ranges(asked):
        asked.ranges = False

    site.rule = no_ranges
    with opened(site, final) as fetch:
        n = len(site.asked)
        assert_equal(load(fetch), tensors)
        assert sorted(a.path for a in site.asked[n:]) == [f"/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert files_of(final)["model-00001-of-00002.safetensors"] == (checkpoint / "model-00001-of-00002.safetensors").read_bytes()


def test_a_stream_that_breaks_off_is_taken_up_again(site, final, tensors, assert_equal):
    cuts = iter([70_000, 150_000])

    def rule(asked):
        asked.ranges = False
        if asked.span is None and "00002-of" in asked.path:
            asked.cut = next(cuts, None)

    site.rule = rule
    with opened(site, final) as fetch:
        assert_equal(load(fetch), tensors)


@pytest.mark.parametrize("failure", ["503", "429", "cut", "reset"])
def test_what_fails_now_and_then_is_asked_again(site, final, tensors, assert_equal, failure):
    rng, lock = random.Random(7), threading.Lock()

    def rule(asked):
        with lock:
            bad = rng.random() < 0.25
        if bad and failure == "cut":
            asked.cut = 1000
        elif bad and failure == "reset":
            raise ConnectionResetError
        elif bad:
            asked.status = int(failure)

    with opened(site, final, limits=Limits(idle_s=5, attempts=12, backoff_s=0.001)) as fetch:
        site.rule = rule
        assert_equal(load(fetch), tensors)


def test_a_server_that_cuts_every_answer_short_is_read_to_the_end(site, final, tensors, assert_equal):
    def rule(asked):
        if asked.span and asked.span[0] > 0:
            asked.cut = 30_000

    with opened(site, final) as fetch:
        site.rule = rule
        assert_equal(load(fetch), tensors)


def test_a_server_that_never_recovers_is_given_up_after_so_many_attempts(site, final):
    with opened(site, final) as fetch:
        n = len(site.asked)
        site.rule = lambda asked: setattr(asked, "status", 503)
        with pytest.raises(SourceUnreachable, match="4 attempts failed, the last with 503") as caught:
            read_chunks(plan := plan_reads(fetch.index, CHUNK), address_of(lease(plan)), source=fetch.chunks(), n_threads=1)
        assert len(site.asked) - n == 4
        assert site.url in caught.value.source


def lease(plan):
    return BufferPool(2**30).lease(plan.nbytes)


def test_the_server_says_when_it_wants_to_be_asked_again(site, final):
    started = []

    def rule(asked):
        started.append(time.monotonic())
        if len(started) == 1:
            asked.status, asked.retry_after = 503, "1"

    site.rule = rule
    with opened(site, final):
        assert started[1] - started[0] >= 1


@pytest.mark.parametrize("variant", [None, "raw", "split16"])
def test_our_own_format_comes_over_http_in_the_variant_that_is_asked_for(
    serve, tmp_path, final, variant, write_single, assert_equal
):
    generator = torch.Generator().manual_seed(0)
    halves = {f"model.layers.{i}.weight": torch.randn(900, 900, generator=generator).bfloat16() for i in range(3)}
    convert(write_single(tmp_path / "halves", halves), tmp_path / "fast", compress="both")
    site = serve(tmp_path / "fast")
    with opened(site, final, variant=variant) as fetch:
        assert_equal(load(fetch), halves)
    compressed = "data-00000.split16.bin"
    assert (final / compressed).exists() == (variant != "raw"), "the smaller one, unless another is asked for"
    assert (final / "data-00000.bin").exists() == (variant == "raw")
    assert all((tmp_path / "fast" / name).read_bytes() == data for name, data in files_of(final).items())


def test_a_flipped_bit_in_our_own_format_is_found_by_its_checksum(serve, tmp_path, final, write_single):
    convert(write_single(tmp_path / "m", {"w": torch.ones(900, 900)}), tmp_path / "fast")
    data = bytearray((tmp_path / "fast" / "data-00000.bin").read_bytes())
    data[1_000_000] ^= 1
    (tmp_path / "fast" / "data-00000.bin").write_bytes(data)
    with opened(serve(tmp_path / "fast"), final) as fetch:
        with pytest.raises(CheckpointCorrupt, match="checksum") as caught:
            load(fetch)
        assert caught.value.tensor == "w"
        with pytest.raises(CheckpointCorrupt, match="checksum"):
            fetch.pull(CHUNK)
    assert not final.exists()


def test_a_server_that_falls_silent_is_given_up(serve, checkpoint, final):
    silent = threading.Event()

    class Silent(Handler):
        def file(self, asked, path):
            if asked.span and asked.span[0] > 0:
                silent.wait(30)
            super().file(asked, path)

    site = serve(checkpoint, Silent)
    limits = Limits(idle_s=0.1, attempts=2, backoff_s=0.001)
    with opened(site, final, limits=limits) as fetch, pytest.raises(SourceUnreachable, match="timed out"):
        load(fetch)
    silent.set()


def test_a_load_that_takes_too_long_in_all_is_given_up(site, final):
    fetch = opened(site, final)
    fetch._origin._limits = Limits(idle_s=5, total_s=0.05, attempts=10_000, backoff_s=0.01)
    site.rule = lambda asked: setattr(asked, "status", 503)
    with fetch, pytest.raises(SourceUnreachable, match=r"not done after 0.05 s"):
        load(fetch)


def test_a_cancelled_load_does_not_wait_for_a_silent_server(serve, checkpoint, final):
    reached, over, cancel = threading.Event(), threading.Event(), threading.Event()

    class Silent(Handler):
        def file(self, asked, path):
            if asked.span and asked.span[0] > 0:
                reached.set()
                over.wait(30)
            super().file(asked, path)

    site = serve(checkpoint, Silent)
    with opened(site, final, limits=Limits(idle_s=60)) as fetch:
        threading.Thread(target=lambda: reached.wait(30) and cancel.set()).start()
        started = time.monotonic()
        with pytest.raises(Cancelled):
            load(fetch, cancel=cancel)
        assert time.monotonic() - started < 10
    over.set()


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("etag", '"another"', "has changed at the source"),
        ("content_range", "bytes 0-9/1000000", "not what was asked for"),
        ("content_range", "bytes 5-1/7", "not what was asked for"),
        ("content_range", "items all", "not what was asked for"),
        ("content_length", 10, "not what was asked for"),
        ("ranges", False, "no ranges any more"),
        ("status", 404, "has changed at the source"),
        ("status", 416, "has changed at the source"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_ends_the_load(site, final, field, value, reason):
    def rule(asked):
        if asked.span and asked.span[0] > CHUNK:
            setattr(asked, field, value)

    with opened(site, final) as fetch:
        site.rule = rule
        with pytest.raises(CheckpointCorrupt, match=reason) as caught:
            load(fetch)
        assert "safetensors" in caught.value.file
    assert not final.exists()


def test_a_file_that_grows_during_the_load_is_told(site, final, checkpoint):
    def rule(asked):
        if asked.span and asked.span[0] > CHUNK:
            with open(checkpoint / asked.path[1:], "ab") as file:
                file.write(b"x")
        asked.etag = '"same"'

    site.rule = rule
    with opened(site, final) as fetch, pytest.raises(CheckpointCorrupt, match="not what was asked for"):
        load(fetch)


def test_a_directory_without_a_checkpoint_is_not_found(serve, tmp_path, final):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFound, match=r"neither model.safetensors nor"):
        opened(serve(tmp_path / "empty"), final)


def test_a_missing_shard_is_named(site, final, checkpoint):
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointNotFound, match=r"model-00002-of-00002.safetensors is not there"):
        opened(site, final)


@pytest.mark.parametrize(
    "shard", ["../../etc/passwd", "/etc/passwd", "a/../b.safetensors", "a\\b.safetensors", "a\nb.safetensors", ""]
)
def test_a_name_that_leads_out_of_the_directory_is_refused(site, final, checkpoint, shard):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointCorrupt):
        opened(site, final)
    assert not [asked for asked in site.asked if "passwd" in asked.path]


@pytest.mark.parametrize("header_nbytes", [2**63, 10**12, 200_000_000])
def test_a_header_that_claims_to_be_huge_is_not_fetched(serve, final, tmp_path, header_nbytes):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(header_nbytes.to_bytes(8, "little") + bytes(1000))
    site = serve(tmp_path / "bad")
    with pytest.raises(CheckpointCorrupt, match="header"):
        opened(site, final)


def test_a_size_that_no_file_can_have_is_told(site, final):
    def rule(asked):
        if "00001-of" in asked.path and asked.span:
            asked.content_range = f"bytes {asked.span[0]}-{asked.span[1]}/{2**63 - 1}"

    site.rule = rule
    with pytest.raises(CheckpointCorrupt):
        opened(site, final)


def test_a_header_longer_than_the_first_request_is_fetched_whole(serve, final, tmp_path, write_single, assert_equal):
    tensors = {f"a.rather.long.name.of.a.tensor.{i:05}": torch.full((2,), float(i)) for i in range(4000)}
    directory = write_single(tmp_path / "many", tensors)
    assert int.from_bytes((directory / "model.safetensors").read_bytes()[:8], "little") > http_origin.FIRST_READ
    with opened(serve(directory), final) as fetch:
        assert_equal(load(fetch), tensors)


# --- who may be asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://anywhere.example/x", ("https://*",)),
        ("http://127.0.0.1:99/x", ()),
        ("http://[::1]/x", ()),
        ("http://10.1.2.3/x", ()),
        ("http://192.168.0.7:8080/x", ()),
        ("https://cdn.example.org/x", ("https://*.example.org",)),
        ("https://CDN.example.org/x", ("https://*.example.org",)),
        ("http://8.8.8.8:8080/x", ("http://8.8.8.8:8080",)),
    ],
)
def test_what_is_listed_and_what_is_private_may_be_asked(url, allowed):
    Access(allowed).check(url)


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("http://8.8.8.8/x", ("https://*",)),
        ("http://169.254.169.254/latest/meta-data", ("https://*",)),
        ("http://0.0.0.0/x", ("https://*",)),
        ("ftp://127.0.0.1/x", ("https://*",)),
        ("file:///etc/passwd", ("https://*",)),
        ("https://example.org.evil.net/x", ("https://*.example.org",)),
        ("https://evil.net/https://example.org", ("https://example.org",)),
        ("https://example.org:444/x", ("https://example.org",)),
        ("http://8.8.8.8:8081/x", ("http://8.8.8.8:8080",)),
        ("https://user:secret@example.org/x", ("https://*",)),
        ("https://exa mple.org/x", ("https://*",)),
        ("https://example.org:99999/x", ("https://*",)),
        ("https:///x", ("https://*",)),
    ],
)
def test_nothing_else_may_be_asked(url, allowed):
    with pytest.raises(ConfigError) as caught:
        Access(allowed).check(url)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("entry", ["example.org", "ftp://example.org", "https://", "https://example.org/path", "*"])
def test_a_list_of_hosts_that_cannot_be_meant_is_told(entry):
    with pytest.raises(ConfigError, match=r"remote_hosts|is not like"):
        Access([entry])


def test_a_redirect_must_not_lead_from_https_to_http_or_to_where_nobody_may_ask():
    access = Access(("https://*",))
    with pytest.raises(ConfigError, match="a redirect from"):
        access.check("http://127.0.0.1/x", before="https://hub.example/x")
    access.check("http://127.0.0.1/x", before="http://127.0.0.1/y")
    with pytest.raises(ConfigError, match=r"worker.remote_hosts"):
        Access(("http://127.0.0.1:1",)).check("https://else.where/x", before="http://127.0.0.1:1/x")


def test_credentials_are_not_taken_along_to_another_host(serve, checkpoint, final, tensors, assert_equal):
    mirror = serve(checkpoint, host="127.0.0.2")
    site = serve(checkpoint)

    def rule(asked):
        if asked.path.endswith(".safetensors"):
            asked.location = mirror.url + asked.path[1:] + "?signed=1"

    site.rule = rule
    with opened(site, final, headers={"Authorization": "Bearer secret", "X-Other": "1"}) as fetch:
        assert_equal(load(fetch), tensors)
    assert {asked.headers.get("authorization") for asked in site.asked} == {"Bearer secret"}
    assert len(mirror.data()) > 20
    assert not any("authorization" in asked.headers for asked in mirror.asked)
    assert len([asked for asked in site.asked if asked.path.endswith(".safetensors")]) < 20, "where a redirect led is remembered"


def test_a_redirect_to_a_host_that_is_not_listed_is_refused(serve, checkpoint, final):
    site = serve(checkpoint)
    site.rule = lambda asked: setattr(asked, "location", "http://8.8.8.8/x")
    with pytest.raises(ConfigError, match=r"a redirect from .* leads to http://8.8.8.8"):
        opened(site, final)


def test_a_redirect_in_a_circle_ends(site, final):
    site.rule = lambda asked: setattr(asked, "location", asked.path)
    with pytest.raises(SourceUnreachable, match="redirected more than 5 times"):
        opened(site, final)


def test_a_signed_address_that_has_expired_is_asked_for_again(serve, checkpoint, final, tensors, assert_equal):
    mirror, site = serve(checkpoint, host="127.0.0.2"), serve(checkpoint)
    site.rule = lambda asked: setattr(asked, "location", mirror.url + asked.path[1:])
    served = []

    def expire(asked):
        served.append(asked)
        if len(served) % 5 == 0:
            asked.status = 403

    with opened(site, final) as fetch:
        mirror.rule = expire
        assert_equal(load(fetch), tensors)


# --- taking up again -------------------------------------------------------------------------------------------------


def test_a_fetch_that_was_cut_off_goes_on_where_it_stopped(site, final, tensors, assert_equal, checkpoint):
    with opened(site, final) as fetch:
        site.rule = lambda asked: setattr(asked, "status", 500) if len(site.data()) > 12 else None
        with pytest.raises(SourceUnreachable):
            fetch.pull(CHUNK, n_threads=2)
    site.rule, got = lambda _: None, {a.span for a in site.data() if a.status is None}
    assert len(got) >= 10
    site.asked.clear()
    with opened(site, final) as fetch:
        assert_equal(load(fetch), tensors)
    again = {(a.path, a.span) for a in site.data()}
    assert len(again) < len(plan_reads(read_index(checkpoint), CHUNK).chunks) - 8
    assert files_of(final)["model-00002-of-00002.safetensors"] == (checkpoint / "model-00002-of-00002.safetensors").read_bytes()


def test_what_was_damaged_on_disk_in_between_is_fetched_again(site, final, tensors, assert_equal, checkpoint):
    with opened(site, final) as fetch:
        load(fetch, finish=False)
    shard = partial_of(final) / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[100_000] ^= 1
    shard.write_bytes(data)
    with opened(site, final) as fetch:
        assert_equal(load(fetch), tensors)
    assert files_of(final)[shard.name] == (checkpoint / shard.name).read_bytes()


def test_nothing_of_an_earlier_state_of_the_source_is_used(site, final, checkpoint, tensors, assert_equal, write_sharded):
    with opened(site, final) as fetch:
        load(fetch, finish=False)
    newer = {name: tensor + 1 for name, tensor in tensors.items()}
    names = sorted(newer)
    write_sharded(checkpoint, [{n: newer[n] for n in names[:9]}, {n: newer[n] for n in names[9:]}])
    with opened(site, final) as fetch:
        assert_equal(load(fetch), newer)


def test_nothing_is_taken_up_from_a_source_that_tells_no_state(site, final, tensors, assert_equal):
    site.rule = lambda asked: setattr(asked, "etag", "none")
    with opened(site, final) as fetch:
        load(fetch, finish=False)
    n = len(site.data())
    with opened(site, final) as fetch:
        assert_equal(load(fetch), tensors)
    assert len(site.data()) == 2 * n


def test_a_journal_that_was_torn_or_made_up_is_used_as_far_as_it_is_sound(site, final, tensors, assert_equal):
    with opened(site, final) as fetch:
        load(fetch, finish=False)
    journal = partial_of(final) / ".fetch.ranges"
    data = journal.read_bytes()
    journal.write_bytes(data[:200] + random.Random(0).randbytes(100) + data[300:-7])
    with opened(site, final) as fetch:
        assert_equal(load(fetch), tensors)


CHILD = """
import sys, threading
from pathlib import Path
from sllmdask.loader.fetch import Fetch
from sllmdask.loader.http_origin import HttpDirectory
fetch = Fetch.open(HttpDirectory(sys.argv[1]), Path(sys.argv[2]))
print("open", flush=True)
print(fetch.pull(32 * 1024, n_threads=2, on_progress=lambda *p: print(*p, flush=True)) if fetch else None, flush=True)
"""


def child(site, final):
    return subprocess.Popen([sys.executable, "-c", CHILD, site.url, str(final)], stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_what_the_next_one_goes_on_with(site, final, tensors, assert_equal):
    may, n = threading.Semaphore(10), []

    def rule(asked):
        if asked.span and asked.span[0] > 0:
            may.acquire()
            n.append(asked)

    site.rule = rule
    process = child(site, final)
    for line in process.stdout:
        if line.count(" ") == 1 and int(line.split()[0]) > 5 * CHUNK:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not final.exists()
    may.release(1000)
    site.rule, _ = lambda _: None, site.asked.clear()
    with opened(site, final) as fetch:
        assert_equal(load(fetch), tensors)
    assert len(site.data()) <= len(plan_reads(fetch.index, CHUNK).chunks) - 5


def test_of_two_processes_that_want_one_model_one_fetches_and_the_other_waits(site, final, tensors):
    may = threading.Event()
    site.rule = lambda asked: may.wait(30) and None if asked.span and asked.span[0] > CHUNK else None
    with child(site, final) as process:
        assert process.stdout.readline() == "open\n"
        found = []
        thread = threading.Thread(target=lambda: found.append(opened(site, final)))
        thread.start()
        n = len(site.asked)
        thread.join(0.2)
        assert thread.is_alive(), "it waits while the other fetches"
        may.set()
        thread.join(30)
        assert found == [None]
        assert str(final) in process.stdout.read()
    assert len([a for a in site.asked[n:] if a.path.endswith("index.json")]) == 0


def test_one_who_waits_for_another_process_can_be_called_off(site, final):
    cancel = threading.Event()
    cancel.set()
    with opened(site, final), pytest.raises(Cancelled):
        Fetch.open(HttpDirectory(site.url, limits=QUICK), final, cancel=cancel)


# --- a disk that fails -----------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """The n-th write of data, and all after it, find the disk full."""
    writes, pwrite = [], libc.pwrite

    def failing(fd, address, nbytes, offset):
        writes.append(offset)
        if len(writes) > 5:
            raise OSError(28, os.strerror(28))
        pwrite(fd, address, nbytes, offset)

    monkeypatch.setattr(libc, "pwrite", failing)
    return writes


def test_a_full_disk_ends_the_disk_copy_and_not_the_load(site, final, tensors, assert_equal, full_disk, caplog):
    with opened(site, final) as fetch:
        plan = plan_reads(fetch.index, CHUNK)
        buffer = lease(plan)
        with fetch.tee(plan, buffer) as tee:
            read_chunks(plan, address_of(buffer), source=fetch.chunks(), tee=tee)
            assert tee.finish() is None
            assert tee.failed
        assert_equal(tensor_views(fetch.index, plan, buffer), tensors)
        assert (fetch.directory / "tokenizer.json").read_text() == '{"a": 1}', "the model still needs it"
        on_disk = sum(path.stat().st_blocks * 512 for path in fetch.directory.glob("*.safetensors"))
        assert on_disk <= 4 * 4096, "what was written is given back"
    assert "the load goes on from memory" in caplog.text
    assert list(final.parent.iterdir()) == []


def test_a_pull_to_a_full_disk_says_so_and_leaves_nothing(site, final, full_disk):
    with opened(site, final) as fetch, pytest.raises(DiskFull, match="free"):
        fetch.pull(CHUNK)
    assert list(final.parent.iterdir()) == []


def test_a_slow_disk_slows_the_disk_copy_and_not_the_load(site, final, tensors, assert_equal, checkpoint, monkeypatch):
    may, pwrite = threading.Event(), libc.pwrite
    monkeypatch.setattr(libc, "pwrite", lambda *args: may.wait(30) and pwrite(*args))
    with opened(site, final) as fetch:
        plan = plan_reads(fetch.index, CHUNK)
        buffer = lease(plan)
        with fetch.tee(plan, buffer) as tee:
            # Through scratch memory, as to shared memory: more chunks than the tee may hold.
            read_chunks(plan, address_of(buffer), source=fetch.chunks(), tee=tee, direct_target=False)
            assert_equal(tensor_views(fetch.index, plan, buffer), tensors)
            assert len(tee._slots) == 0
            may.set()
            assert tee.finish() == final
    assert files_of(final)["model-00001-of-00002.safetensors"] == (checkpoint / "model-00001-of-00002.safetensors").read_bytes()


# --- the hub ---------------------------------------------------------------------------------------------------------


class Hub(Handler):
    """The hub as its client and its files' addresses know it: an API that lists, and a redirect to where the bytes are."""

    def file(self, asked, path):  # noqa: ARG002
        root, parts = self.site.root, asked.path.strip("/").split("/")
        if asked.path.startswith("/api/models/org/model/revision/") or asked.path == "/api/models/org/model":
            siblings = []
            for file in sorted(p for p in root.rglob("*") if p.is_file()):
                data = file.read_bytes()
                entry = {
                    "rfilename": file.relative_to(root).as_posix(),
                    "size": len(data),
                    "blobId": hashlib.sha1(data).hexdigest(),
                }
                if file.suffix in (".safetensors", ".bin"):
                    sha256 = self.site.lies.get(file.name) or hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
                siblings.append(entry)
            body = {
                "id": "org/model",
                "sha": COMMIT,
                "siblings": siblings,
                "lastModified": "2026-01-02T03:04:05.000Z",
                "tags": [],
            }
            return self.answer(200, json.dumps(body).encode(), Content_Type="application/json")
        if parts[:4] == ["org", "model", "resolve", COMMIT]:
            if (root / "/".join(parts[4:])).suffix == ".safetensors":
                return self.answer(302, Location=f"/cdn/{'/'.join(parts[4:])}?signature=x")
            return super().file(asked, root / "/".join(parts[4:]))
        if parts[0] == "cdn":
            return super().file(asked, root / "/".join(parts[1:]))
        return self.answer(404)


@pytest.fixture
def hub(serve, checkpoint, monkeypatch, tmp_path):
    site = serve(checkpoint, Hub)
    site.lies = {}
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", site.url.rstrip("/"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return site


def test_a_model_of_the_hub_is_loaded_and_kept(hub, tmp_path, checkpoint, tensors, assert_equal):
    fetch = open_remote("org/model", tmp_path / "store", limits=QUICK)
    with fetch:
        assert fetch.manifest.revision == COMMIT
        assert_equal(load(fetch), tensors)
    fetched = files_of(tmp_path / "store" / "org--model")
    assert fetched == {name: data for name, data in files_of(checkpoint).items() if name != "README.md"}
    assert open_remote("org/model", tmp_path / "store") == tmp_path / "store" / "org--model"
    assert not any("/main/" in asked.path for asked in hub.asked), "the commit is pinned"


def test_the_token_goes_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with open_remote("org/model", tmp_path / "store", limits=QUICK):
        assert {asked.headers.get("authorization") for asked in hub.asked} == {"Bearer hf_secret"}


def test_a_file_that_is_not_what_the_hub_lists_never_becomes_a_checkpoint(hub, tmp_path):
    hub.lies["model-00002-of-00002.safetensors"] = "0" * 64
    with open_remote("org/model", tmp_path / "store", limits=QUICK) as fetch, pytest.raises(CheckpointCorrupt, match="SHA-256"):
        fetch.pull(CHUNK)
    assert list((tmp_path / "store").iterdir()) == []


def test_what_the_hub_does_not_have_is_not_found(hub, tmp_path):
    with pytest.raises(CheckpointNotFound, match="the hub did not supply it"):
        open_remote("org/other", tmp_path / "store", limits=QUICK)
    assert list((tmp_path / "store").iterdir()) == []


def test_offline_only_what_is_here_is_found(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointNotFound, match="OfflineModeIsEnabled"):
        open_remote("org/model", tmp_path / "store", limits=QUICK)
    assert hub.asked == []


def cached(tmp_path, checkpoint, *, without=()):
    """The hub's cache, as its own client lays it out."""
    snapshot = tmp_path / "hf" / "models--org--model" / "snapshots" / COMMIT
    for path in checkpoint.iterdir():
        if path.name not in without:
            blob = tmp_path / "hf" / "models--org--model" / "blobs" / hashlib.sha1(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            snapshot.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(path.read_bytes())
            (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    refs = tmp_path / "hf" / "models--org--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    return snapshot


def test_a_complete_snapshot_in_the_hubs_cache_is_used_in_place(hub, tmp_path, checkpoint):
    snapshot = cached(tmp_path, checkpoint)
    assert open_remote("org/model", tmp_path / "store") == snapshot
    assert find_fetched("org/model", tmp_path / "store") == snapshot
    assert hub.asked == []


def test_a_snapshot_that_lacks_a_shard_is_not_used(hub, tmp_path, checkpoint):
    cached(tmp_path, checkpoint, without=["model-00002-of-00002.safetensors"])
    assert find_fetched("org/model", tmp_path / "store") is None
    with open_remote("org/model", tmp_path / "store", limits=QUICK) as fetch:
        assert isinstance(fetch, Fetch)


@pytest.mark.parametrize("source", ["/nowhere", "../x", "a/b/c", "a..b/c", "", "-x/y", "ftp://host/x"])
def test_what_is_no_address_and_no_id_is_not_found(tmp_path, source):
    with pytest.raises(CheckpointNotFound):
        open_remote(source, tmp_path)


def test_each_source_has_a_directory_of_its_own():
    sources = ["https://h/a", "https://h/b", "http://h/a", "https://h/a/b", "https://h/a--b", "org/model", "https://h/../../etc"]
    names = [local_name(source) for source in sources]
    assert len(set(names)) == len(names)
    assert local_name("org/model", "a/b") != local_name("org/model", "a--b") != local_name("org/model")
    assert local_name("https://h/a/") == local_name("https://h/a")
    assert all("/" not in name and not name.startswith(".") for name in names)


def test_a_hub_model_at_another_endpoint(serve, checkpoint, final, hub):
    other = serve(checkpoint, Hub)
    other.lies = {}
    with Fetch.open(HubModel("org/model", endpoint=other.url.rstrip("/"), limits=QUICK), final) as fetch:
        assert fetch.pull(CHUNK) == final
    assert hub.asked == []
