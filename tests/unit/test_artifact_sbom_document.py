"""Bills of materials as they are written: valid under the strict validator, the same for the same inputs, and with
hashes that anybody can compute again."""

import hashlib
import json

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given
from hypothesis import strategies as st

from aether.artifact import sbom, strictjson, treehash
from aether.artifact.manifest import Listed
from aether.artifact.sbom_document import Package, Subject, component, document, legacy, properties_of, purl

SUBJECT = Subject("shop", "a" * 64, "b" * 64, "node20", "1.0.0", "0.1.0", None, {"lockfile": "package-lock.json"})
SPDX = frozenset({"MIT", "Apache-2.0", "GPL-2.0-only", "Classpath-exception-2.0"})
FULL = Package(
    ref="pkg:npm/%40x/a@1.0.0",
    name="@x/a",
    version="1.0.0",
    path="node_modules/@x/a",
    purl="pkg:npm/%40x/a@1.0.0",
    tree=treehash.Tree("c" * 64, 3),
    licenses=("MIT",),
    url="https://registry.example/@x/a/-/a-1.0.0.tgz",
    integrity=(("SHA-512", "d" * 128),),
    vcs="https://github.com/x/a.git@0123",
    status="differs",
    finding="1 changed (index.js)",
    notes={"alias": "b"},
    depends_on=("b",),
)

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
some_licenses = st.sampled_from(["MIT", "Custom", "(MIT OR Apache-2.0)", "SEE LICENSE IN x"])
some_packages = st.lists(
    st.builds(
        Package,
        ref=texts.filter(bool),
        name=texts.filter(lambda text: bool(text.rpartition("/")[2])),
        version=texts,
        path=texts,
        licenses=st.lists(some_licenses, max_size=2, unique=True).map(tuple),
        notes=st.dictionaries(texts, texts, max_size=2),
        tree=st.none() | st.just(treehash.Tree("c" * 64, 3)),
    ),
    max_size=4,
    unique_by=lambda package: package.ref,
)


def bytes_of(packages: list[Package]) -> bytes:
    dependencies = {"app": [package.ref for package in packages], **{one.ref: one.depends_on for one in packages}}
    return strictjson.write(document(SUBJECT, [component(one, SPDX) for one in packages], dependencies, "app"))


def test_the_strict_validator_accepts_what_is_written() -> None:
    data = bytes_of([FULL])
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(data.decode()) is None
    assert sbom.check_document(data, "a" * 64) == "cyclonedx-1.6"
    value = json.loads(data)
    assert value["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert "timestamp" not in value["metadata"]
    (one,) = value["components"]
    assert (one["group"], one["name"], one["scope"]) == ("@x", "a", "required")
    assert one["externalReferences"][0]["hashes"] == [{"alg": "SHA-512", "content": "d" * 128}]
    assert properties_of(one)["finding"] == "1 changed (index.js)"


@given(some_packages)
def test_any_names_make_a_valid_document(packages: list[Package]) -> None:
    data = bytes_of(packages)
    assert sbom.check_document(data, "a" * 64) == "cyclonedx-1.6"
    assert bytes_of(packages) == data


@given(some_packages)
def test_any_names_make_a_valid_legacy_document(packages: list[Package]) -> None:
    named = [Package(**{name: getattr(one, name) for name in Package.__slots__} | {"path": "p"}) for one in packages]
    made = legacy(SUBJECT, [component(one, SPDX) for one in named], {})
    assert sbom.check_document(strictjson.write(made), "a" * 64) == "aether-sbom-v1"


def test_the_serial_number_is_the_artifact_s() -> None:
    first = document(SUBJECT, [], {}, "app")["serialNumber"]
    assert first == document(SUBJECT, [component(FULL, SPDX)], {}, "app")["serialNumber"]
    other = Subject("shop", "a" * 64, "c" * 64, "node20")
    assert document(other, [], {}, "app")["serialNumber"] != first


def test_licenses() -> None:
    cases = {
        ("MIT",): [{"license": {"id": "MIT"}}],
        ("Custom",): [{"license": {"name": "Custom"}}],
        ("(MIT OR Apache-2.0)",): [{"expression": "(MIT OR Apache-2.0)"}],
        ("GPL-2.0-only WITH Classpath-exception-2.0",): [{"expression": "GPL-2.0-only WITH Classpath-exception-2.0"}],
        ("SEE LICENSE IN LICENSE",): [{"license": {"name": "SEE LICENSE IN LICENSE"}}],
        ("MIT", "Apache-2.0"): [{"license": {"id": "MIT"}}, {"license": {"id": "Apache-2.0"}}],
    }
    for licenses, written in cases.items():
        package = Package("r", "n", "1", "p", licenses=licenses)
        assert component(package, SPDX)["licenses"] == written


def test_package_urls() -> None:
    assert purl("npm", "@x/a", "1.0.0+b") == "pkg:npm/%40x/a@1.0.0%2Bb"
    assert purl("npm", "a", "1", {"vcs_url": "git+https://h/x.git@1", "none": ""}) == (
        "pkg:npm/a@1?vcs_url=git%2Bhttps://h/x.git%401"
    )


def listed(path: bytes, content: bytes = b"", *, executable: bool = False, target: bytes = b"") -> Listed:
    if target:
        return Listed(path, "l", True, 0, "", target)
    return Listed(path, "f", executable, len(content), hashlib.sha256(content).hexdigest(), b"")


def test_the_rule_of_the_tree_hash() -> None:
    members = [
        listed(b"node_modules/a/run", b"x", executable=True),
        listed(b"node_modules/a/index.js", b"y"),
        listed(b"node_modules/a/link", target=b"index.js"),
        Listed(b"node_modules/a/empty", "d", True, 0, "", b""),
    ]
    text = b"".join(
        [
            b"0644 " + hashlib.sha256(b"y").hexdigest().encode() + b" index.js\0",
            b"0777 " + hashlib.sha256(b"index.js").hexdigest().encode() + b" link\0",
            b"0755 " + hashlib.sha256(b"x").hexdigest().encode() + b" run\0",
        ]
    )
    assert treehash.tree_of(members, b"node_modules/a/") == (hashlib.sha256(text).hexdigest(), 3)


@given(
    st.lists(st.lists(st.sampled_from([b"a", b"b", b"n"]), min_size=1, max_size=4), max_size=12), st.integers(0, 4)
)
def test_each_member_belongs_to_the_innermost_folder(paths: list[list[bytes]], depth: int) -> None:
    names = sorted({b"/".join(parts) for parts in paths})
    folders = {name.rpartition(b"/")[0] for name in names[:depth]} - {b""}
    owned = treehash.by_folder([listed(name + b".js") for name in names], folders)
    assert set(owned) == folders
    for folder, members in owned.items():
        for member in members:
            around = [one for one in folders if member.path.startswith(one + b"/")]
            assert folder == max(around, key=len)


def test_records_of_installed_wheels() -> None:
    text = (
        b"x.py,sha256=abc,3\n../../bin/x,sha256=def,1\n../../../etc/passwd,sha256=1,1\n/abs,sha256=1,1\n"
        b'"a,b.py",sha256=ghi,1\nx.dist-info/RECORD,,\na/../../y,,\n'
    )
    found = treehash.read_record(text, b".aether/python/x.dist-info")
    assert [line.path for line in found] == [
        b".aether/python/x.py",
        b".aether/python/bin/x",
        b".aether/python/a,b.py",
        b".aether/python/x.dist-info/RECORD",
    ]
    assert treehash.read_record(b"\xff", b"x.dist-info") == []
    pyc = listed(b"d/__pycache__/x.cpython-311.pyc")
    members = {b"d/x.py": listed(b"d/x.py"), pyc.path: pyc, b"d/other.py": listed(b"d/other.py")}
    record = [treehash.Recorded(b"d/x.py", ""), treehash.Recorded(b"d/gone.py", "")]
    owned = treehash.by_record(record, members, treehash.Bytecode(members.values()))
    assert {one.path for one in owned} == {b"d/x.py", pyc.path}
