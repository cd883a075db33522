"""The files of a repository on the Hub at one commit: listed, downloaded into the cache, or read by byte range.

Nothing here knows what a file holds. The client is huggingface_hub (extra ``hub``): its cache, its token
(``HF_TOKEN`` or ``hf auth login``), its endpoint (``HF_ENDPOINT``) and its offline switch (``HF_HUB_OFFLINE``) are
the user's, as in every other tool.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from specbasis.checkpoint.entry import is_plain
from specbasis.checkpoint.patience import CutOffError, NoRangesError, patiently
from specbasis.core.errors import InputError
from specbasis.core.extras import require

REQUESTS = 8
"""Requests that are under way at once."""

FIRST_BYTES = 100_000
"""Bytes of a file that one request brings where the length of its header is not known; few headers are longer."""

LONGEST_HEADER = 100_000_000
"""Bytes; the same limit as in the safetensors library."""

T = TypeVar("T")

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class Address:
    """What ``hub:org/name@revision/subfolder`` names."""

    repository: str
    revision: str = "main"
    subfolder: str = ""


def parse_address(source: str) -> Address:
    """Read ``hub:org/name[@revision][/subfolder]``, the same without ``hub:``, or ``timm:name[@revision]``.

    A slash inside a revision is written %2F; ``refs/pr/1`` needs no such care. timm's models live in the Hub's
    ``timm`` organisation under the name of architecture and pretrained tag.

    Raises:
        InputError: not of this form, or a subfolder that leads out of the repository.
    """
    scheme, colon, rest = source.partition(":")
    if not colon:
        scheme, rest = "hub", source
    name, at, tail = rest.partition("@")
    if not at:
        parts = name.split("/")
        name, tail = "/".join(parts[:2]), "/".join(["", *parts[2:]])
    depth = 3 if tail.startswith("refs/") else 1
    pieces = tail.split("/")
    revision, subfolder = unquote("/".join(pieces[:depth])), "/".join(pieces[depth:]).rstrip("/")
    repository = f"timm/{name}" if scheme == "timm" else name
    if (
        not _REPOSITORY.fullmatch(repository)
        or (at and not revision)
        or not is_plain(revision)
        or ".." in repository
    ):
        raise InputError(
            f"{source!r}: not an address on the Hub; want hub:org/name@revision/subfolder (the last two may be "
            "left out) or timm:name"
        )
    if not is_plain(subfolder):
        raise InputError(f"{source!r}: the subfolder leads out of the repository and is refused")
    return Address(repository, revision or "main", subfolder)


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it: length in bytes; SHA-256, or git's SHA-1 for a small file kept in git itself."""

    size: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True, eq=False)
class Repository:
    """One repository at one commit.

    Attributes:
        source: what the user called it, for errors.
        name: ``org/name``.
        commit: the commit that the branch or tag stood for when it was opened.
        files: path in the repository → length and digest; offline, what the cache holds of it, digests unknown.
        revision: the branch, tag or commit that was asked for.
        online: false when ``HF_HUB_OFFLINE`` is set; then only the cache is read.
    """

    source: str
    name: str
    commit: str
    files: Mapping[str, RemoteFile]
    revision: str
    online: bool = True
    _verified: dict[str, Path] = field(default_factory=dict, repr=False)

    def path(self, file: str) -> Path:
        """The file on disk, downloaded into the client's cache unless it is there; checked against its SHA-256."""
        if file not in self._verified:
            hub = _client()
            path = Path(
                patiently(
                    lambda: hub.hf_hub_download(
                        self.name, file, revision=self.commit, local_files_only=not self.online
                    ),
                    self.source,
                    self.name,
                    file,
                )
            )
            self._verify(path, file)
            self._remember_revision()
            self._verified[file] = path
        return self._verified[file]

    def cached(self, file: str) -> bool:
        """Whether the file is in the client's cache, so that `path` needs no network."""
        return isinstance(_client().try_to_load_from_cache(self.name, file, revision=self.commit), str)

    def read(self, file: str, start: int, stop: int) -> bytearray:
        """The bytes [start, stop) of a file, and no others, by one range request; nothing is written to disk."""
        if start == stop:
            return bytearray()
        whole = (start, stop) == (0, self.files[file].size)
        url = _client().hf_hub_url(self.name, file, revision=self.commit)
        return patiently(lambda: _read_range(url, start, stop, whole), self.source, self.name, file)

    def header(self, file: str) -> bytearray:
        """The first bytes of a safetensors file, its length first, up to the end of its header.

        One request, and a second where the header is longer than `FIRST_BYTES`: with `at_once`, a model of s shards
        costs s requests and at most s · `FIRST_BYTES` bytes, and every worker process asks for itself.

        Raises:
            InputError: the file is too short for the header that it announces.
        """
        size = self.files[file].size
        if size < 8:
            raise InputError(f"{self.source}: {file} is no safetensors file ({size} bytes)")
        head = self.read(file, 0, min(size, FIRST_BYTES))
        stop = 8 + int.from_bytes(head[:8], "little")
        if not 10 <= stop <= min(size, 8 + LONGEST_HEADER):
            raise InputError(
                f"{self.source}: {file} is truncated or corrupted (header of {stop - 8} bytes in a file of {size})"
            )
        return head[:stop] + (self.read(file, len(head), stop) if stop > len(head) else b"")

    def _verify(self, path: Path, file: str) -> None:
        listed = self.files.get(file)
        if listed is None:
            return
        with path.open("rb") as opened:
            size = path.stat().st_size
            good = size == listed.size and (
                not listed.sha256 or hashlib.file_digest(opened, "sha256").hexdigest() == listed.sha256
            )
        if not good:
            raise InputError(
                f"{self.source}: {file} in the cache ({size} bytes) is not the file that {self.name} lists "
                f"({listed.size} bytes, other content); delete {path} and try again"
            )

    def _remember_revision(self) -> None:
        """Note in the cache which commit the branch stands for, so that it can be found again offline.

        The client does so only for downloads by branch, and this is a download by commit.
        """
        folder = Path(_client().constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"
        if self.online and self.revision != self.commit and folder.is_dir():
            ref = folder / "refs" / self.revision
            with suppress(OSError):  # a cache that cannot be written still serves this run
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(self.commit, encoding="utf-8")


def at_once(task: Callable[[str], T], files: Sequence[str]) -> list[T]:
    """What a task that waits for the Hub gives for each of several files, `REQUESTS` at a time."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(task, files))


def find_repository(source: str, address: Address) -> Repository:
    """Resolve a branch or tag to its commit and list the files there; offline, from the cache.

    Raises:
        InputError: no such repository, revision or access, the Hub cannot be reached, or nothing is in the cache.
    """
    hub = _client()
    if hub.constants.HF_HUB_OFFLINE:
        return _cached_repository(source, address)
    info = patiently(
        lambda: hub.HfApi().model_info(address.repository, revision=address.revision, files_metadata=True),
        source,
        address.repository,
        f"revision {address.revision}",
    )
    files = {
        file.rfilename: RemoteFile(file.size or 0, file.lfs.sha256 if file.lfs else "", file.blob_id or "")
        for file in info.siblings or ()
    }
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise InputError(f"{source}: {address.repository} answered without a commit; is HF_ENDPOINT a Hub?")
    return Repository(source, address.repository, info.sha, files, address.revision)


def _cached_repository(source: str, address: Address) -> Repository:
    hub = _client()
    try:
        # No pattern matches: only the place of the snapshot is asked for, whatever of it is there.
        folder = Path(
            hub.snapshot_download(
                address.repository, revision=address.revision, local_files_only=True, allow_patterns=[]
            )
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source}: HF_HUB_OFFLINE is set and {address.repository} at {address.revision} is not in the cache; "
            "unset it, or download the repository first"
        ) from error
    files = {
        path.relative_to(folder).as_posix(): RemoteFile(path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return Repository(source, address.repository, folder.name, files, address.revision, online=False)


def _read_range(url: str, start: int, stop: int, whole: bool) -> bytearray:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {
        **build_hf_headers(library_name="specbasis"),
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    body = bytearray()
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        expected = f"bytes {start}-{stop - 1}/"
        if response.status_code != 206 and not whole:
            raise NoRangesError(f"answered {response.status_code} to a request for bytes {start} to {stop - 1}")
        if response.status_code == 206 and not response.headers.get("Content-Range", "").startswith(expected):
            raise CutOffError(f"asked for {expected[:-1]}, got {response.headers.get('Content-Range')!r}")
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > stop - start:
                raise CutOffError(f"more than the {stop - start} bytes asked for")
    if len(body) != stop - start:
        raise CutOffError(f"{len(body)} of {stop - start} bytes")
    return body


def _client() -> Any:
    require("huggingface_hub", purpose="models on the Hub need")
    import huggingface_hub.constants

    return huggingface_hub


def list_revisions(source: str) -> list[str]:
    """Names of the branches and tags of ``hub:org/name``.

    Raises:
        InputError: no such repository or access, or the Hub cannot be reached.
    """
    repository = parse_address(source).repository
    refs = patiently(lambda: _client().HfApi().list_repo_refs(repository), source, repository, "branches and tags")
    return [ref.name for ref in (*refs.branches, *refs.tags)]
