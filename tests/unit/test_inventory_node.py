"""Installed Node.js packages: which folders hold one, what each one loads, and what their bytes are held against."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from aether.artifact.sbom_document import DIFFERS, UNLISTED, UNPROMISED, UNPROVEN, VERIFIED, Package
from aether.build.inventory import node
from aether.build.inventory.contents import Contents
from aether.build.inventory.evidence import Distribution, has_hash, read_index, read_tarball
from aether.build.inventory.keeps import NpmCache, PnpmStore
from aether.build.inventory.node_packages import Sources, absent, packages, strays
from aether.build.inventory.npm_lock import NpmLock
from aether.build.inventory.promises import Promise
from support.installed import packed, tree

Files = dict[str, "str | bytes | dict[str, object]"]


def package(name: str, version: str = "1.0.0", **more: object) -> dict[str, object]:
    return {"name": name, "version": version, **more}


def contents(tmp_path: Path, files: Files, links: dict[str, str] | None = None) -> Contents:
    return packed(tree(tmp_path / "tree", files, links), tmp_path / "out")[1]


def tgz(files: dict[str, bytes], root: str = "package") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(out.getvalue(), mtime=0)


def test_node_s_own_way_of_finding_packages(tmp_path: Path) -> None:
    found = node.find(
        contents(
            tmp_path,
            {
                "package.json": package("shop", dependencies={"a": "*", "alias": "*", "gone": "*"}),
                "node_modules/a/package.json": package("a", dependencies={"b": "*", "@x/c": "*"}),
                "node_modules/a/node_modules/b/package.json": package("b", "2.0.0", dependencies={"b": "*"}),
                "node_modules/b/package.json": package("b", "1.0.0"),
                "node_modules/@x/c/package.json": package("@x/c", dependencies={"b": "*"}),
                "node_modules/alias/package.json": package("real", "3.0.0"),
                "node_modules/a/test/node_modules/fixture/package.json": package("fixture"),
                "node_modules/a/dist/package.json": {"type": "module"},
                "node_modules/.cache/x/package.json": package("cache"),
                "src/node_modules/mine/package.json": package("mine"),
            },
        ),
        [],
    )
    assert set(found.packages) == {
        "",
        "node_modules/a",
        "node_modules/a/node_modules/b",
        "node_modules/b",
        "node_modules/@x/c",
        "node_modules/alias",
    }
    assert found.edges[""] == ("node_modules/a", "node_modules/alias")
    assert found.edges["node_modules/a"] == ("node_modules/@x/c", "node_modules/a/node_modules/b")
    assert found.edges["node_modules/@x/c"] == ("node_modules/b",)
    assert (found.packages["node_modules/alias"].name, found.packages["node_modules/alias"].installed_as) == (
        "real",
        "alias",
    )


def test_workspaces_links_and_pnpm_s_store(tmp_path: Path) -> None:
    store = "node_modules/.pnpm"
    found = node.find(
        contents(
            tmp_path,
            {
                "package.json": package("shop", dependencies={"a": "*", "@shop/w": "*", "lib": "*"}),
                "packages/w/package.json": package("@shop/w", dependencies={"b": "*"}),
                "packages/w/node_modules/b/package.json": package("b", "2.0.0"),
                "libs/lib/package.json": package("lib"),
                f"{store}/a@1.0.0/node_modules/a/package.json": package("a", dependencies={"@x/b": "*"}),
                f"{store}/@x+b@1.0.0/node_modules/@x/b/package.json": package("@x/b"),
            },
            {
                "node_modules/a": ".pnpm/a@1.0.0/node_modules/a",
                "node_modules/@shop/w": "../../packages/w",
                "node_modules/lib": "../libs/lib",
                f"{store}/a@1.0.0/node_modules/@x/b": "../../../@x+b@1.0.0/node_modules/@x/b",
            },
        ),
        ["packages/w", "packages/absent"],
    )
    assert found.edges[""] == ("libs/lib", f"{store}/a@1.0.0/node_modules/a", "packages/w")
    assert found.edges[f"{store}/a@1.0.0/node_modules/a"] == (f"{store}/@x+b@1.0.0/node_modules/@x/b",)
    assert found.edges["packages/w"] == ("packages/w/node_modules/b",)
    assert found.packages["libs/lib"].local
    assert not found.packages["packages/w/node_modules/b"].local


def test_optional_and_peer_dependencies(tmp_path: Path) -> None:
    found = node.find(
        contents(
            tmp_path,
            {
                "package.json": package(
                    "shop", dependencies={"a": "*"}, optionalDependencies={"o": "*", "both": "*"}
                ),
                "node_modules/a/package.json": package("a", peerDependencies={"p": "*"}, dependencies={"both": "*"}),
                "node_modules/p/package.json": package("p"),
                "node_modules/o/package.json": package("o", dependencies={"deep": "*"}),
                "node_modules/deep/package.json": package("deep"),
                "node_modules/both/package.json": package("both"),
            },
        ),
        [],
    )
    assert found.edges["node_modules/a"] == ("node_modules/both", "node_modules/p")
    assert found.optional == {"node_modules/o", "node_modules/deep"}


def test_package_json_files_that_say_nothing(tmp_path: Path) -> None:
    found = node.find(
        contents(
            tmp_path,
            {
                "package.json": "[]",
                "node_modules/broken/package.json": "{ not json",
                "node_modules/odd/package.json": {
                    "name": 7,
                    "version": [],
                    "dependencies": "x",
                    "license": {"type": 1},
                },
                "node_modules/listed/index.js": "1",
                "node_modules/deep/package.json": '{"a":' * 50_000,
            },
        ),
        [],
        ["node_modules/listed", "node_modules/absent"],
    )
    assert set(found.packages) == {
        "", "node_modules/broken", "node_modules/odd", "node_modules/listed", "node_modules/deep"
    }  # fmt: skip
    assert found.packages["node_modules/odd"].name == "odd"


A_FILES = {"package.json": json.dumps(package("a")).encode(), "index.js": b"a", "lib/x.js": b"x"}
A_TGZ = tgz(A_FILES)
SRI = "sha512-" + __import__("base64").b64encode(hashlib.sha512(A_TGZ).digest()).decode()


def judged(tmp_path: Path, files: Files, distribution: Distribution | None, **entry: object) -> Package:
    there = contents(tmp_path, {"package.json": package("shop", dependencies={"a": "*"}), **files})
    lock = NpmLock("package-lock.json", json.dumps({"packages": {"node_modules/a": {"version": "1.0.0", **entry}}}))
    graph = node.find(there, [], lock.required())
    found = list(packages(there, graph, Sources(lock, lambda _: distribution, {})))
    return next(one for one in found if one.path == "node_modules/a")


def installed(**changes: str | bytes | None) -> Files:
    every: dict[str, str | bytes | None] = {
        **A_FILES,
        **{name.replace("__", "."): one for name, one in changes.items()},
    }
    return {f"node_modules/a/{name}": content for name, content in every.items() if content is not None}


def test_installed_bytes_are_held_against_the_distribution(tmp_path: Path) -> None:
    there = read_tarball(A_TGZ)
    cases: list[tuple[Files, Distribution | None, str, str | None]] = [
        (installed(), there, VERIFIED, None),
        (installed(index__js="b"), there, DIFFERS, "1 changed (index.js)"),
        (installed(index__js=None), there, DIFFERS, "1 missing (index.js)"),
        (installed(evil__js="!"), there, DIFFERS, "1 added (evil.js)"),
        (installed(), None, UNPROVEN, None),
    ]
    for number, (files, distribution, status, finding) in enumerate(cases):
        found = judged(tmp_path / str(number), files, distribution, integrity=SRI)
        assert (found.status, found.finding) == (status, finding)
    assert judged(tmp_path / "none", installed(), there).status == UNPROMISED


def test_what_npm_itself_changes_is_no_finding(tmp_path: Path) -> None:
    sent = {**A_FILES, ".gitignore": b"dist\n", "cli.js": b"#!/usr/bin/env node\r\nx\r\n"}
    there = read_tarball(tgz(sent, "whatever-root"))
    files = installed(cli__js="#!/usr/bin/env node\nx\r\n", __npmignore="dist\n")
    files["node_modules/a/node_modules/.bin/x"] = "y"
    assert judged(tmp_path, files, there, integrity=SRI).status == VERIFIED


def test_bundled_packages_are_held_against_the_distribution_around_them(tmp_path: Path) -> None:
    inner = json.dumps(package("c", "2.0.0")).encode()
    there = read_tarball(tgz({**A_FILES, "node_modules/c/package.json": inner, "node_modules/c/index.js": b"c"}))
    for folder, content, status in (("good", "c", VERIFIED), ("bad", "changed", DIFFERS)):
        files: Files = {
            "package.json": package("shop"),
            **installed(),
            "node_modules/a/node_modules/c/package.json": inner,
            "node_modules/a/node_modules/c/index.js": content,
        }
        here = contents(tmp_path / folder, files)
        entries = {
            "node_modules/a": {"version": "1.0.0", "integrity": SRI},
            "node_modules/a/node_modules/c": {"version": "2.0.0", "inBundle": True},
        }
        lock = NpmLock("package-lock.json", json.dumps({"packages": entries}))
        graph = node.find(here, [], lock.required())
        found = {one.name: one for one in packages(here, graph, Sources(lock, lambda _: there, {}))}
        assert found["a"].status == VERIFIED
        assert (found["c"].status, found["c"].notes["bundled"]) == (status, "yes")


def test_what_no_lockfile_lists_and_what_is_absent(tmp_path: Path) -> None:
    here = contents(
        tmp_path,
        {
            "package.json": package("shop"),
            "node_modules/extra/package.json": package("extra"),
            "node_modules/loose.js": "!",
            "node_modules/.package-lock.json": "{}",
            "node_modules/.bin/x": "x",
        },
    )
    lock = NpmLock("package-lock.json", json.dumps({"packages": {"node_modules/a": {"version": "1.0.0"}}}))
    graph = node.find(here, [], lock.required())
    (extra,) = packages(here, graph, Sources(lock, None, {}))
    assert extra.status == UNLISTED
    assert absent(here, graph, lock) == ["node_modules/a"]
    assert strays(here, graph) == ["node_modules/loose.js"]


def test_a_package_of_the_project_is_nobody_else_s(tmp_path: Path) -> None:
    here = contents(
        tmp_path,
        {
            "package.json": package("shop"),
            "packages/w/package.json": package("left-pad"),
            "node_modules/dup/package.json": package("dup", "1.0.0"),
            "node_modules/dup/node_modules/dup/package.json": package("dup", "1.0.0"),
        },
    )
    found = {one.path: one for one in packages(here, node.find(here, ["packages/w"]), Sources(None, None, {}))}
    assert found["packages/w"].purl is None
    assert found["packages/w"].ref == "left-pad#packages/w"
    assert found["node_modules/dup"].ref == "pkg:npm/dup@1.0.0#node_modules/dup"
    assert len({one.ref for one in found.values()}) == 3


def test_npm_s_cache_proves_only_what_has_the_promised_hash(tmp_path: Path) -> None:
    digest = hashlib.sha512(A_TGZ).hexdigest()
    place = tmp_path / "_cacache" / "content-v2" / "sha512" / digest[:2] / digest[2:4] / digest[4:]
    place.parent.mkdir(parents=True)
    place.write_bytes(A_TGZ)
    promise = Promise("a", "1.0.0", (("SHA-512", digest),))
    found = NpmCache(tmp_path)(promise)
    assert found is not None
    assert set(found.files) == {b"package.json", b"index.js", b"lib/x.js"}
    place.write_bytes(tgz({"index.js": b"evil"}))
    assert NpmCache(tmp_path)(promise) is None
    assert NpmCache(None)(promise) is None


def test_npm_s_cache_finds_an_older_hash_by_its_address(tmp_path: Path) -> None:
    url, digest = "https://r.example/a/-/a-1.0.0.tgz", hashlib.sha512(A_TGZ).hexdigest()
    place = tmp_path / "_cacache" / "content-v2" / "sha512" / digest[:2] / digest[2:4] / digest[4:]
    key = f"make-fetch-happen:request-cache:{url}"
    name = hashlib.sha256(key.encode()).hexdigest()
    index = tmp_path / "_cacache" / "index-v5" / name[:2] / name[2:4] / name[4:]
    for path in (place, index):
        path.parent.mkdir(parents=True)
    place.write_bytes(A_TGZ)
    index.write_text(f"\nbad line\nhash\t{json.dumps({'key': key, 'integrity': SRI})}")
    promised = Promise("a", "1.0.0", (("SHA-1", hashlib.sha1(A_TGZ).hexdigest()),), resolved=url)
    assert NpmCache(tmp_path)(promised) is not None
    assert NpmCache(tmp_path)(Promise("a", "1.0.0", (("SHA-1", "0" * 40),), resolved=url)) is None


@pytest.mark.parametrize("layout", ["files/ab/{rest}-index.json", "index/ab/{short}-a@1.0.0.json"])
def test_pnpm_s_index_of_files(tmp_path: Path, layout: str) -> None:
    digest = "ab" * 64
    content = {"files": {"index.js": {"integrity": SRI, "size": 1}}}
    path = tmp_path / layout.format(rest=digest[2:], short=digest[2:64])
    tree(tmp_path, {str(path.relative_to(tmp_path)): content})
    found = PnpmStore(tmp_path)(Promise("a", "1.0.0", (("SHA-512", digest),)))
    assert found is not None
    assert (found.algorithm, found.files[b"index.js"]) == ("sha512", (hashlib.sha512(A_TGZ).hexdigest(),))
    assert PnpmStore(tmp_path)(Promise("a", "1.0.0", (("SHA-512", "00" * 64),))) is None


@pytest.mark.parametrize(
    "data", [b"", b"x", gzip.compress(b"not a tar", mtime=0), A_TGZ[:-20], b"\x1f\x8b\x08" + bytes(40)]
)
def test_damaged_evidence_proves_nothing(data: bytes) -> None:
    found = read_tarball(data)
    assert found is None or not found.files
    assert read_index(data) is None
    assert not has_hash(data, ())
