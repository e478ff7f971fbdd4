"""Checkpoints on this machine, without a server: ``convert``, ``verify``."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from sllmdask.cli.output import POLL_S, bytes_bar, print_json, show_warnings
from sllmdask.cli.shell import FAILED, INTERRUPTED, command, json_option
from sllmdask.errors import CheckpointError, CheckpointExists

if TYPE_CHECKING:
    import threading

    from sllmdask.loader.convert import Written
    from sllmdask.loader.verify import Problem, Verified

T = TypeVar("T")
#: Tensors named in one line about a bad chunk.
N_NAMED = 3


@command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST", type=click.Path(path_type=Path))
@click.option(
    "--compress",
    type=click.Choice(["no", "yes", "both"]),
    default="no",
    show_default=True,
    help="Compress half-precision weights without loss; both: write both variants, and let each node choose.",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at DST.")
@json_option
def convert(source: str, target: Path, compress: str, overwrite: bool, as_json: bool) -> None:
    """Write the checkpoint SRC to the directory DST in the fast format; DST appears when all of it is on disk.

    SRC is a directory or a file with safetensors, with the fast format (to add or drop the compressed variant), or with pickled
    weights, of which only tensors are read; or the id of a model on the hub or an https URL, which is fetched first.
    """
    from sllmdask.loader.convert import convert as convert_checkpoint
    from sllmdask.loader.convert import files_beside
    from sllmdask.loader.format import read_index
    from sllmdask.units import format_bytes, format_seconds

    show_warnings()
    began_s = time.monotonic()
    path = _local(source)
    if path.exists() and files_beside(path).keys().isdisjoint({"config.json", "adapter_config.json"}):
        click.echo(f"Warning: {path} has no config.json: what is written can be loaded, but not served.", err=True)
    try:
        total: int | None = read_index(path).nbytes
    except CheckpointError:
        total = None  # pickled weights; whatever else it is, the conversion says

    def run(on_progress: Callable[[int], None], cancel: threading.Event) -> Written:
        return convert_checkpoint(path, target, compress, on_progress, cancel, overwrite=overwrite)

    try:
        written = _work("converting", total, run)
    except CheckpointExists as error:
        hint = "" if overwrite else " --overwrite replaces a checkpoint."
        raise click.ClickException(f"{error.message}{hint}") from error
    seconds = time.monotonic() - began_s
    facts = {
        "path": written.path,
        "n_tensors": written.n_tensors,
        "nbytes": written.nbytes,
        "stored_nbytes": dict(written.stored_nbytes),
        "seconds": seconds,
    }
    if as_json:
        print_json(facts)
        return
    sizes = ", ".join(f"{variant} {format_bytes(nbytes)}" for variant, nbytes in written.stored_nbytes.items())
    click.echo(f"wrote {written.path}: {written.n_tensors} tensors, {sizes}, in {format_seconds(seconds)}")


@command()
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def verify(path: Path, as_json: bool) -> None:
    """Read every byte of the checkpoint at PATH and check all of it; a line for each place that is wrong, and exit code 1.

    Of the fast format that is every checksum. safetensors has none: headers and lengths are checked, and that all can be read.
    """
    from sllmdask.loader.verify import verify as verify_checkpoint

    began_s = time.monotonic()

    def run(on_progress: Callable[[int], None], cancel: threading.Event) -> Verified:
        return verify_checkpoint(path, on_progress, cancel=cancel)

    verified = _work("verifying", _weights_nbytes(path), run, "the rest was not checked")
    _tell(verified, time.monotonic() - began_s, as_json)
    sys.exit(0 if verified.ok else FAILED)


def _tell(verified: Verified, seconds: float, as_json: bool) -> None:
    from sllmdask.units import format_bytes, format_seconds

    if as_json:
        print_json(
            {
                "path": verified.path,
                "ok": verified.ok,
                "format": verified.format,
                "variants": list(verified.variants),
                "n_tensors": verified.n_tensors,
                "nbytes": verified.nbytes,
                "seconds": seconds,
                "problems": [
                    {"file": problem.file, "tensors": list(problem.tensors), "reason": problem.reason}
                    for problem in verified.problems
                ],
            }
        )
        return
    for problem in verified.problems:
        click.echo(f"BAD {problem.file}: {problem.reason}{_named(problem)}")
    kind = f"fast format ({', '.join(verified.variants)})" if verified.format == "fast" else "safetensors, which has no checksums"
    what = f"{verified.path}: {kind}, {verified.n_tensors} tensors, {format_bytes(verified.nbytes)} in {format_seconds(seconds)}"
    n_bad = len(verified.problems)
    click.echo(f"OK {what}" if verified.ok else f"{n_bad} bad place{'s' if n_bad > 1 else ''} in {what}")


def _named(problem: Problem) -> str:
    if not problem.tensors:
        return ""
    more = len(problem.tensors) - N_NAMED
    return f" [{', '.join(problem.tensors[:N_NAMED])}{f' and {more} more' if more > 0 else ''}]"


def _weights_nbytes(path: Path) -> int | None:
    """About how much a verification will read, for its progress."""
    files = path.iterdir() if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files if file.is_file() and file.suffix not in (".json", ".txt", ".jinja", ".model")]
    return sum(sizes) or None


def _local(source: str) -> Path:
    """The directory or file `source`, fetched to the store if it is elsewhere."""
    from sllmdask.cluster.dask_settings import read_settings
    from sllmdask.loader.access import Access
    from sllmdask.loader.remote import is_remote, open_remote

    path = Path(source).expanduser()
    if path.exists() or not is_remote(source):
        return path
    settings = read_settings().worker
    store_dir = Path(settings.store_dir).expanduser()
    store_dir.mkdir(parents=True, exist_ok=True)

    def run(on_progress: Callable[[int], None], cancel: threading.Event) -> Path:
        fetch = open_remote(source, store_dir, access=Access(settings.remote_hosts), cancel=cancel)
        if isinstance(fetch, Path):
            return fetch
        with fetch:
            return fetch.pull(settings.chunk_size, on_progress=lambda done, _: on_progress(done), cancel=cancel)

    return _work(f"fetching {source}", None, run, "what was fetched is kept, and the next attempt goes on with it")


def _work(
    what: str,
    total: int | None,
    run: Callable[[Callable[[int], None], threading.Event], T],
    interrupted: str = "nothing was written",
) -> T:
    """`run` in a thread, with its bytes on stderr; Ctrl-C, or a kill, calls it off and waits until it has cleaned up."""
    import signal
    import threading
    from concurrent.futures import ThreadPoolExecutor, wait

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    cancel, default = threading.Event(), signal.signal(signal.SIGTERM, stop)
    with bytes_bar(what, total) as show, ThreadPoolExecutor(1) as executor:
        done = 0

        def on_progress(nbytes: int) -> None:
            nonlocal done
            done = nbytes

        future = executor.submit(run, on_progress, cancel)
        try:
            while not wait([future], timeout=POLL_S).done:
                show(done)
            show(done)
            return future.result()
        except KeyboardInterrupt:
            cancel.set()
            executor.shutdown()
        except OSError as error:
            raise click.ClickException(f"{os.fsdecode(error.filename or what)}: {error.strerror or error}") from error
        finally:
            signal.signal(signal.SIGTERM, default)
    click.echo(f"Interrupted; {interrupted}.", err=True)
    sys.exit(INTERRUPTED)
