"""A second user of one server: made by the admin, logged in with a password, kept to its own apps, let go."""

from __future__ import annotations

from pathlib import Path

from support.product import HELLO, Product, node_app


def test_a_team_member_comes_deploys_and_goes(own: Product, tmp_path: Path) -> None:
    own.deploy(node_app(tmp_path / "secret", HELLO % "secret"))
    own.run("user", "create", "bob", "--no-password")
    own.run("team", "create", "web")
    own.run("team", "add", "web", "bob")
    own.run("apps", "create", "site", "--team", "web")
    token = own.run("user", "token", "bob", "--expires", "1h").stdout.strip()

    own.extra_env["AETHER_TOKEN"] = token
    assert [app["name"] for app in own.run("list", "--format", "json").json["items"]] == ["site"]
    own.deploy(node_app(tmp_path / "site", HELLO % "site"))
    assert own.get("site")[1] == "site\n"
    denied = own.run("status", "--app", "secret", check=False)
    assert denied.code == 2
    assert "there is no app 'secret'" in denied.stderr
    del own.extra_env["AETHER_TOKEN"]

    own.stop()
    own.start()
    own.run("user", "disable", "bob")
    own.extra_env["AETHER_TOKEN"] = token
    assert own.run("list", check=False).code == 10
    del own.extra_env["AETHER_TOKEN"]
    assert own.get("site")[1] == "site\n", "what a user deployed goes on without it"
