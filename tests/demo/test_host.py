"""How a ComfyUI is found, and what a person reads when it cannot start."""

from __future__ import annotations

import pytest

from para_core.demo import host
from para_core.demo.host import ComfyServer, HostError, find_comfyui


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A home and a pack inside custom_nodes, both without a ComfyUI; returns a function that puts one somewhere."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(host.Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(host, "PACK", tmp_path / "around" / "custom_nodes" / "pack")

    def put(name: str):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "main.py").touch()
        return tmp_path / name

    return put


def test_found_in_the_order_variable_then_around_the_pack_then_home(places, monkeypatch):
    assert find_comfyui() is None
    home = places("home/comfy/ComfyUI")
    assert find_comfyui() == home
    around = places("around")
    assert find_comfyui() == around
    chosen = places("chosen")
    monkeypatch.setenv("COMFYUI_PATH", str(chosen))
    assert find_comfyui() == chosen


def test_wrong_variable_is_refused(places, monkeypatch, tmp_path):
    places("home/comfy/ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r'COMFYUI_PATH is ".*nowhere", where there is no main.py; set it to'):
        find_comfyui()


def test_host_that_does_not_start_shows_its_last_words(places):
    broken = places("broken")
    (broken / "main.py").write_text("raise SystemExit('no space for a server')")
    with pytest.raises(HostError, match="did not start.*\n(.*\n)*.*no space for a server"):
        with ComfyServer(broken):
            pass


def test_pack_that_does_not_load_is_an_error(places):
    deaf = places("deaf")
    (deaf / "main.py").write_text(
        "import http.server, sys\n"
        "class Answer(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200), self.end_headers(), self.wfile.write(b'{}')\n"
        "print('Cannot import pack module for custom nodes: no such thing', flush=True)\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[sys.argv.index('--port') + 1])), Answer).serve_forever()\n"
    )
    with pytest.raises(HostError, match="could not load the pack: Cannot import .* no such thing"):
        with ComfyServer(deaf):
            pass
