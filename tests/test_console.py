"""Progress in logs: a line now and then with what is done and how long is left."""

from latentscenes.core import console


def test_a_line_comes_every_thirty_seconds(monkeypatch, capfd):
    clock = iter([0.0, 0.0, 20.0, 40.0, 60.0, 80.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    assert list(console.tracked(iter("abcde"), "rendering meshes", 5)) == list("abcde")
    assert capfd.readouterr().err.splitlines() == [
        "rendering meshes: 2 of 5 done; about 60.0 s left",
        "rendering meshes: 4 of 5 done; about 20.0 s left",
    ]
