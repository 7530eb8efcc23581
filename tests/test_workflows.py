"""The shipped workflow files: complete, stamped with their packs, true to the nodes' schemas, and readable."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

from para_core.demo.workflow import NOTES, to_api, widget_inputs

ROOT = Path(__file__).absolute().parent.parent
FILES = sorted((ROOT / "workflows").glob("*.json"))
TITLE_HEIGHT = 30

workflows = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def is_own(node: dict) -> bool:
    return node["type"].startswith("Para")


def boxes(workflow: dict) -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right, bottom of every node with its title bar."""
    return {
        f"{node['id']} {node['type']}": (
            node["pos"][0],
            node["pos"][1] - TITLE_HEIGHT,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in workflow["nodes"]
    }


def test_all_workflows_are_there():
    assert [file.stem for file in FILES] == ["flux1_dev_fbcache", "para_demo", "para_demo_parallel"]


@workflows
def test_every_link_joins_two_slots_that_know_it(file):
    workflow = read(file)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, origin, output, target, slot, type_ in workflow["links"]:
        assert link in nodes[origin]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[origin]["outputs"][output]["type"] == type_
        assert nodes[target]["inputs"][slot]["type"] in (type_, "*")
    ends = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(ends) == sorted(link[0] for link in workflow["links"])
    assert workflow["version"] == 0.4
    assert workflow["last_node_id"] == max(nodes)
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])


@workflows
def test_every_node_says_which_pack_it_comes_from(file, pack):
    from comfy_config.config_parser import extract_node_configuration

    project = extract_node_configuration(str(ROOT)).project
    for node in read(file)["nodes"]:
        assert is_own(node) == (node["type"] in pack.nodes)
        properties = node["properties"]
        assert properties["Node name for S&R"] == node["type"]
        if is_own(node):
            assert (properties["cnr_id"], properties["ver"]) == (project.name, project.version)
        else:
            assert (properties["cnr_id"], properties["ver"]) == ("comfy-core", "0.33.0")


@workflows
def test_own_nodes_have_the_widgets_of_their_schema(file, server):
    info = server.object_info()
    own = [node for node in read(file)["nodes"] if is_own(node)]
    assert own
    for node in own:
        values = widget_inputs(node, info[node["type"]])
        for name, value in values.items():
            kinds = info[node["type"]]["input"]
            options = (kinds["required"] | kinds.get("optional", {}))[name][1]
            assert options.get("min", value) <= value <= options.get("max", value)


@workflows
def test_host_knows_every_node_and_input(file, server):
    info = server.object_info()
    for node in to_api(read(file), info).values():
        inputs = info[node["class_type"]]["input"]
        assert (
            set(inputs["required"]) <= set(node["inputs"]) <= set(inputs["required"]) | set(inputs.get("optional", ()))
        )


@workflows
def test_every_loaded_file_says_where_it_comes_from(file):
    shipped = {path.name for path in (ROOT / "para_core" / "demo" / "models").rglob("*.safetensors")}
    for node in read(file)["nodes"]:
        wanted = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")} - shipped
        models = {model["name"]: model for model in node["properties"].get("models", [])}
        assert set(models) == wanted
        assert all(model["url"].startswith("https://huggingface.co/") for model in models.values())
        assert all(model["url"].endswith(name) and model["directory"] for name, model in models.items())


@workflows
def test_nothing_covers_anything(file):
    workflow = read(file)
    for (one, a), (other, b) in combinations(boxes(workflow).items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one} and {other} overlap"
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        for name, (left, top, right, bottom) in boxes(workflow).items():
            outside = right <= x or left >= x + width or bottom <= y or top >= y + height
            inside = x <= left and y + TITLE_HEIGHT <= top and right <= x + width and bottom <= y + height
            assert outside or inside, f"{name} sticks out of {group['title']}"


@workflows
def test_note_speaks_both_languages(file):
    (note,) = [node for node in read(file)["nodes"] if node["type"] in NOTES]
    text = note["widgets_values"][0]
    assert "first-block cache" in text.lower() and "首块缓存" in text
